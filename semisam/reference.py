# SPDX-License-Identifier: Apache-2.0
"""The definition of right: every operator once more in plain PyTorch, short and float64-clean.

Arguments and results are those of the operator of the same name in `csrc/ops.def`. Written to be
read, not to be fast; tests compare every kernel with it and nothing else imports it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

# ---- prompts ------------------------------------------------------------------------------------


def mask_logits(prob: Tensor, d: int, h: int, w: int) -> Tensor:
    """clip(ln(m / (1 - m)), -10, 10) of the mean m over each cell of adaptive average pooling."""
    return F.adaptive_avg_pool3d(prob[:, None], (d, h, w))[:, 0].logit().clamp(-10, 10)


# ---- losses -------------------------------------------------------------------------------------

TERM_FIELDS = (
    *("kind", "target", "weight", "first", "last", "has_ignore", "ignore_index", "label_smoothing"),
    *("include_background", "squared_pred", "batch", "jaccard", "smooth_nr", "smooth_dr"),
    *("reduction", "min_weight", "pooled"),
)


def _terms(params: Sequence[float], terms: int, channels: int) -> list[SimpleNamespace]:
    """Unpack `params`: per term TERM_FIELDS, then one class weight per channel."""
    size = len(TERM_FIELDS) + channels
    out = []
    for i in range(terms):
        row = params[i * size : (i + 1) * size]
        term = SimpleNamespace(**dict(zip(TERM_FIELDS, row, strict=False)))
        term.kind = ("ce", "dice", "mse", "kl", "entropy")[int(term.kind)]
        term.reduction = ("voxel", "element", "sample", "sum")[int(term.reduction)]
        term.samples = slice(int(term.first), int(term.last))
        term.a = row[len(TERM_FIELDS) :]
        out.append(term)
    return out


def _target(
    t: SimpleNamespace, targets: Sequence[Tensor], weights: Sequence[Tensor], p: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return voxel weights m [b, S], target distribution q [b, C, S] and hard-label weights a_y."""
    b, c, s = p.shape
    m = p.new_ones(b, s) if t.weight < 0 else weights[int(t.weight)].to(p).reshape(b, s)
    if t.target < 0:
        return m, p.new_zeros(b, c, s), p.new_ones(b, s)
    target = targets[int(t.target)]
    if target.numel() == b * c * s and (c > 1 or target.is_floating_point()):
        return m, target.to(p).reshape(b, c, s), p.new_ones(b, s)
    y = target.long().reshape(b, s)
    ignored = (y == int(t.ignore_index)) if t.has_ignore else torch.zeros_like(y, dtype=torch.bool)
    classes = 2 if c == 1 else c  # a single channel is the foreground's
    q = F.one_hot(y.masked_fill(ignored, 0), classes).movedim(-1, 1).to(p)[:, classes - c :]
    a_y = p.new_tensor(t.a)[y.masked_fill(ignored, 0)] if c > 1 else p.new_ones(b, s)
    return m.masked_fill(ignored, 0), q.masked_fill(ignored[:, None], 0), a_y


def _voxel_sums(
    logits: Tensor,
    targets: Sequence[Tensor],
    weights: Sequence[Tensor],
    params: Sequence[float],
    activation: int,
    terms: int,
) -> Tensor:
    """All sums over voxels: [terms, B, C, 4]; Dice I, Z, Y, W per class, others num, den, W, 0 in class 0."""
    z = logits.flatten(2)
    c = z.shape[1]
    log_p = z.log_softmax(1)
    p = (log_p.exp(), z.sigmoid(), z)[activation]
    out = z.new_zeros(terms, *z.shape[:2], 4)
    for i, t in enumerate(_terms(params, terms, c)):
        pt, zt, lp = p[t.samples], z[t.samples], log_p[t.samples]
        m, q, a_y = _target(t, targets, weights, pt)
        if t.kind == "dice":
            power = 2 if t.squared_pred else 1
            w = m[:, None].expand_as(pt)
            sums = torch.stack([w * q * pt, w * pt**power, w * q**power, w], -1).sum(2)
            out[i, t.samples] = sums
            continue
        if t.kind == "ce" and activation == 1:
            d = (F.softplus(zt) - q * zt).sum(1)
        elif t.kind == "ce":
            r = p.new_tensor(t.a)[:, None] * ((1 - t.label_smoothing) * q + t.label_smoothing / c)
            d = -(r * lp).sum(1)
        elif t.kind == "mse":
            d = ((pt - q) ** 2).sum(1)
        elif t.kind == "kl":
            d = (torch.xlogy(q, q) - q * lp).sum(1)
        else:
            d = -(pt * lp).sum(1)
        den = m * a_y if t.kind == "ce" and activation == 0 else m
        out[i, t.samples, 0] = torch.stack([m * d, den, m, torch.zeros_like(m)], -1).sum(1)
    return out


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0."""
    return torch.where(b == 0, 0.0, a / torch.where(b == 0, 1.0, b))


def _dice_values(t: SimpleNamespace, sums: Tensor) -> Tensor:
    """Per-class losses of one Dice term: [b, C] or, over the whole batch, [1, C] and zeros below."""
    i, zz, y, w = (sums.sum(0, keepdim=True) if t.batch else sums).unbind(-1)
    den = zz + y
    den = (2 * (den - i) if t.jaccard else den) + t.smooth_dr
    f = torch.where((w == 0) | (den == 0), 0.0, 1 - _ratio(2 * i + t.smooth_nr, den))
    a = f.new_tensor(t.a)
    if not t.include_background:
        a[0] = 0
    f = f * a
    if t.pooled:
        f = f / a.sum() / f.shape[0] if a.sum() > 0 else 0 * f
    return torch.cat([f, f.new_zeros(len(sums) - len(f), f.shape[1])])


def _voxel_values(sums: Tensor, params: Sequence[float], voxels: int, activation: int) -> Tensor:
    """Losses [terms, B, C] from the sums; a term's loss is the sum of its entries (if pooled)."""
    terms, b, c, _ = sums.shape
    values = sums.new_zeros(terms, b, c)
    for i, t in enumerate(_terms(params, terms, c)):
        if t.kind == "dice":
            values[i, t.samples] = _dice_values(t, sums[i, t.samples])
            continue
        num, den, w, _ = sums[i, t.samples, 0].unbind(-1)
        factor = 1.0 / math.log(c) if t.kind == "entropy" else 1.0
        binary = t.kind == "ce" and activation == 1
        if t.reduction == "sum":
            values[i, t.samples, 0] = factor * num
            continue
        if t.reduction == "element" or binary or (t.reduction == "sample" and t.kind == "mse"):
            factor /= c
        if t.reduction == "sample":
            kept = ~(w < t.min_weight * voxels) & (den != 0)
            factor = factor * kept.to(num) / (kept.sum().clamp(min=1) if t.pooled else 1)
        elif t.pooled:
            den = den.sum().expand_as(den)
        values[i, t.samples, 0] = factor * _ratio(num, den)
    return values


def voxel_loss_forward(
    logits: Tensor,
    targets: Sequence[Tensor],
    weights: Sequence[Tensor],
    params: Sequence[float],
    activation: int,
    terms: int,
) -> tuple[Tensor, Tensor]:
    """Losses [terms, B, C] of several terms on the same logits, and the sums that they come from."""
    sums = _voxel_sums(logits, targets, weights, params, activation, terms)
    return _voxel_values(sums, params, logits[0, 0].numel(), activation).double(), sums.double()


def voxel_loss_backward(
    logits: Tensor,
    targets: Sequence[Tensor],
    weights: Sequence[Tensor],
    params: Sequence[float],
    stats: Tensor,
    grad: Tensor,
    activation: int,
    terms: int,
) -> Tensor:
    """d(sum of grad * values) / d(logits), at the sums that the forward call reported."""
    with torch.enable_grad():
        z, s = logits.detach().requires_grad_(), stats.detach().requires_grad_()
        values = _voxel_values(s, params, logits[0, 0].numel(), activation)
        (upstream,) = torch.autograd.grad((values * grad).sum(), s)
        sums = _voxel_sums(z, targets, weights, params, activation, terms)
        return torch.autograd.grad((sums * upstream).sum(), z)[0]


# ---- fusion -------------------------------------------------------------------------------------

# ---- distances and components -------------------------------------------------------------------

# ---- metrics ------------------------------------------------------------------------------------

# ---- random walker ------------------------------------------------------------------------------
