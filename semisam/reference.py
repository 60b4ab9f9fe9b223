# SPDX-License-Identifier: Apache-2.0
"""The definition of right: every operator once more in plain PyTorch, short and float64-clean.

Arguments and results are those of the operator of the same name in `csrc/ops.def`. Written to be
read, not to be fast; tests compare every kernel with it and nothing else imports it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# ---- prompts ------------------------------------------------------------------------------------


def mask_logits(prob: Tensor, d: int, h: int, w: int) -> Tensor:
    """clip(ln(m / (1 - m)), -10, 10) of the mean m over each cell of adaptive average pooling."""
    return F.adaptive_avg_pool3d(prob[:, None], (d, h, w))[:, 0].logit().clamp(-10, 10)


# ---- losses -------------------------------------------------------------------------------------

# ---- fusion -------------------------------------------------------------------------------------


def fuse(
    sources: list[Tensor],
    r_lab: list[float],
    r_unc: list[float],
    logits: int,
    unc: int,
    weighting: int,
    kappa: float,
    tau_c: float,
    tau_u: float,
    log_offset: float,
    ignore_index: int,
    channels: int,
    *want: int,
) -> list[Tensor]:
    """Mean, label, confidence, uncertainty and weight map; a source of weight 0 is not looked at."""
    first = sources[0]
    batch, space = first.shape[0], first.shape[2:]
    foreground = first.shape[1] == 1

    def distribution(p: Tensor) -> Tensor:
        if logits:
            p = p.sigmoid() if foreground else p.softmax(1)
        return torch.cat([1 - p, p], 1) if foreground else p

    def entropy(p: Tensor) -> Tensor:
        return -(p * (p + log_offset).clamp(min=1e-7).log()).sum(1)

    def table(r: list[float]) -> Tensor:
        r_sb = torch.tensor(r, dtype=torch.float64).reshape(len(sources), -1).expand(-1, batch)
        return (r_sb / r_sb.sum(0)).reshape(len(sources), batch, *[1] * (first.ndim - 1))

    def mean(r: Tensor, values: list[Tensor]) -> Tensor:
        parts = [torch.where(w > 0, w, 0) * torch.where(w > 0, v, 0) for w, v in zip(r, values, strict=True)]
        return torch.stack(parts).sum(0)

    p = [distribution(s.double()) for s in sources]
    lab, doubt = table(r_lab), table(r_unc)
    known = ~lab[0].isnan()  # samples that have a source
    classes = p[0].shape[1]
    mu = mean(doubt, p)
    if unc == 0:
        u = mean(doubt, [(q - mu) ** 2 for q in p]).sum(1) / (1 - 1 / classes)
    elif unc == 1:
        u = entropy(mu) / math.log(classes)
    else:
        u = (entropy(mu) - mean(doubt, [entropy(q)[:, None] for q in p])[:, 0]) / math.log(classes)
    pbar = torch.where(known, mean(lab, p), 1 / classes)
    u = torch.where(known[:, 0], u.clamp(0, 1), 1)
    confidence, label = pbar.max(1)
    keep = known[:, 0] & (confidence >= tau_c)
    if tau_u < 1:
        keep &= u <= tau_u
    weight = [
        lambda: torch.exp(-kappa * u),
        lambda: 1 - u,
        lambda: (u <= tau_u).double() + (u - u),
        lambda: ((confidence - 1 / classes) / (1 - 1 / classes)).clamp(0, 1),
        lambda: torch.ones_like(u),
    ][weighting]()
    outputs = [
        pbar if channels > 1 else pbar[:, 1:],
        torch.where(keep, label, ignore_index).to(torch.uint8),
        confidence,
        u,
        torch.where(known[:, 0], weight, 0),
    ]
    shapes = [(batch, channels, *space), *[(batch, *space)] * 4]
    return [
        o.expand(shape)[None] if asked else torch.empty(0, *shape)
        for o, shape, asked in zip(outputs, shapes, want, strict=True)
    ]


# ---- distances and components -------------------------------------------------------------------

# ---- metrics ------------------------------------------------------------------------------------

# ---- random walker ------------------------------------------------------------------------------


def random_walker(  # noqa: PLR0917  (the operator's own order)
    image: Tensor,
    seeds: Tensor,
    prior: Tensor | None,
    classes: int,
    gamma: float,
    beta: float,
    spacing: Sequence[float],
    tol: float,
    max_iter: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Jacobi-preconditioned conjugate gradients on (L + gamma I) x = gamma pi, from x = pi or 1/2.

    They stop when sqrt(r' D^-1 r / c' D^-1 c) <= tol, with D the diagonal and c = A 1.
    """
    matrices = [_walk_matrix(i.double(), gamma, beta, list(spacing) or [1.0] * 3) for i in image]
    results = []
    for n in range(len(seeds)):
        kind, matrix = seeds[n].flatten(), matrices[n // classes]
        start = torch.full(kind.shape, 0.5) if prior is None else prior[n].flatten()
        x = torch.where(kind == 0, start.double(), (kind == 1).double())
        free = kind == 0
        a, pi = matrix[free][:, free], x[free]
        r = gamma * pi - matrix[free] @ x
        c, d = a.sum(1), a.diagonal()
        total, p, rz, k = c @ (c / d), r / d, r @ (r / d), 0
        while k < max_iter and rz > tol * tol * total:
            q = a @ p
            alpha = rz / (p @ q)
            x[free] += alpha * p
            r = r - alpha * q
            p, rz, k = r / d + (r @ (r / d)) / rz * p, r @ (r / d), k + 1
        residual = (rz / total).sqrt() if free.any() else torch.zeros(()).double()
        results.append((x.clamp(0, 1).view(seeds.shape[1:]), torch.tensor(k), residual))
    prob, iterations, residuals = zip(*results, strict=True)
    return torch.stack(prob), torch.stack(iterations), torch.stack(residuals)


def _walk_matrix(image: Tensor, gamma: float, beta: float, spacing: Sequence[float]) -> Tensor:
    """L + gamma I of a [D, H, W] grid, dense: for small ones."""
    number = torch.arange(image.numel()).view(image.shape)
    matrix = gamma * torch.eye(image.numel(), dtype=torch.float64)
    for axis in range(3):
        steps = image.diff(dim=axis).flatten()
        w = (torch.exp(-beta * steps**2) + 1e-5) * (min(spacing) / spacing[axis]) ** 2
        i = number.narrow(axis, 0, image.shape[axis] - 1).flatten()
        j = number.narrow(axis, 1, image.shape[axis] - 1).flatten()
        for a, b in ((i, j), (j, i)):
            matrix.index_put_((a, b), -w, accumulate=True)
            matrix.index_put_((a, a), w, accumulate=True)
    return matrix
