# SPDX-License-Identifier: Apache-2.0
"""The definition of right: every operator once more in plain PyTorch, short and float64-clean.

Arguments and results are those of the operator of the same name in `csrc/ops.def`. Written to be
read, not to be fast; tests compare every kernel with it and nothing else imports it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

# ---- prompts ------------------------------------------------------------------------------------


def mask_logits(prob: Tensor, d: int, h: int, w: int) -> Tensor:
    """clip(ln(m / (1 - m)), -10, 10) of the mean m over each cell of adaptive average pooling."""
    return F.adaptive_avg_pool3d(prob[:, None], (d, h, w))[:, 0].clamp(0, 1).logit().clamp(-10, 10)


def specialist_targets(
    prob: Tensor, F: int, threshold: float, p_min: float, tau_p: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Target, confident region and skip flag per sample and foreground class [B, F, ...]; spread [B, 2]."""
    foreground = prob[:, 1:]
    assert foreground.shape[1] == F
    top = foreground.flatten(2).amax(2)
    skip = top < min(threshold, p_min)
    low = top < threshold
    th = torch.where(low, 0.5 * top, threshold)
    around = (..., *[None] * (prob.ndim - 2))
    target = (foreground >= th[around]) & ~skip[around]
    entropy = -torch.xlogy(prob, prob).sum(1, keepdim=True) / math.log(F + 1)
    region = ((entropy <= tau_p) | low[around] | (tau_p >= 1)) & ~skip[around]
    off = (prob.sum(1) - 1).abs().flatten(1).amax(1)
    spread = torch.stack([off, (-prob).clamp_min(0).nan_to_num(0).flatten(1).amax(1)], 1)
    return target, region, skip, spread


def answer_mask(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Foreground, and the smallest and largest logit of each row."""
    rows = logits.flatten(1)
    return logits > 0, torch.stack([rows.amin(1), rows.amax(1)], 1)


def philox64(seed: int, counter: list[int]) -> int:
    """The first 64 bits of Philox4x32-10, low word first."""
    c, k = list(counter), [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[0] | c[1] << 32


def inner_distance2(mask: Tensor, dims: int) -> Tensor:
    """Squared distance [D, H, W] to the nearest voxel outside `mask`, the patch's outside included."""
    margin = [1, 1, 1, 1, int(dims == 3), int(dims == 3)]
    outside = (~F.pad(mask, margin)).nonzero() - torch.tensor(margin[::-2])
    inside = mask.nonzero()
    d2 = torch.zeros(mask.shape, dtype=torch.int64)
    if len(inside):
        d2[mask] = (inside[:, None] - outside[None]).square().sum(-1).amin(1)
    return d2


def next_click(
    target: Tensor,
    current: Tensor | None,
    region: Tensor | None,
    skip: Tensor | None,
    counter: Tensor,
    seed: int,
    ritm: int,
    dims: int,
) -> tuple[Tensor, Tensor]:
    """Click by the RITM or the random rule in every row: index [N, 3] and label [N]."""
    point = torch.zeros(len(target), 3, dtype=torch.int64)
    label = torch.full((len(target),), -1)
    for n in range(len(target)):
        t = target[n].bool()
        g = torch.zeros_like(t) if current is None else current[n].bool()
        r = torch.ones_like(t) if region is None else region[n].bool()
        fn, fp = t & ~g & r, ~t & g & r
        if not (fn | fp).any():
            fn, fp = t & ~g, ~t & g
        if not (fn | fp).any() or (skip is not None and skip[n]):
            continue
        if ritm:
            d_fn, d_fp = inner_distance2(fn, dims), inner_distance2(fp, dims)
            d2 = d_fn if d_fn.max() > d_fp.max() else d_fp
            candidates = (4 * d2 > d2.max()).nonzero()
        else:
            candidates = (fn | fp).nonzero()
        point[n] = candidates[len(candidates) * philox64(seed, counter[n].tolist()) >> 64]
        label[n] = fn[tuple(point[n])]
    return point, label


def sample_points(
    prob: Tensor, counter: Tensor, seed: int, n: int, confidence: float
) -> tuple[Tensor, Tensor]:
    """n points inside and n outside {argmax = c}: index [B, C, 2, n, 3], label [B, C, 2, n]."""
    best, winner = prob.max(1)
    point = torch.zeros(*prob.shape[:2], 2, n, 3, dtype=torch.int64)
    label = torch.full((*prob.shape[:2], 2, n), -1)
    for b in range(prob.shape[0]):
        for c in range(prob.shape[1]):
            for side in (0, 1):
                inside = (winner[b] == c) ^ bool(side)
                voxels = (inside & (best[b] >= confidence)).nonzero()
                voxels = voxels if len(voxels) >= n else inside.nonzero()
                m, ranks = len(voxels), set[int]()
                for i in range(min(n, m)):
                    j = m - min(n, m) + i  # Floyd: a rank of 0..j, or j itself if that one is taken
                    words = counter[b].tolist()
                    words[2] = (words[2] + (2 * c + side) * n + i) & 0xFFFFFFFF
                    rank = (j + 1) * philox64(seed, words) >> 64
                    ranks.add(j if rank in ranks else rank)
                for i, rank in enumerate(sorted(ranks)):
                    point[b, c, side, i] = voxels[rank]
                    label[b, c, side, i] = 1 - side
    return point, label


def boxes(mask: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Bounding boxes [N, 6] (all lower, then all upper inclusive indices) with margin, and found [N]."""
    box = torch.zeros(len(mask), 6, dtype=torch.float64)
    found = mask.bool().flatten(1).any(1)
    for n in found.nonzero().flatten().tolist():
        voxels = mask[n].nonzero().double()
        lo, hi = voxels.amin(0), voxels.amax(0)
        grow = margin * (hi - lo + 1)
        last = torch.tensor(mask.shape[1:]).double() - 1
        box[n] = torch.cat([(lo - grow).clamp(min=0), torch.minimum(hi + grow, last)])
    return box, found


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


def fuse(
    sources: list[Tensor],
    weights: Tensor | None,
    uncertainty_weights: Tensor | None,
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

    def table(r: Tensor | None) -> Tensor:
        r_sb = torch.ones(len(sources), batch, dtype=torch.float64) if r is None else r
        return (r_sb / r_sb.sum(0)).reshape(len(sources), batch, *[1] * (first.ndim - 1))

    def mean(r: Tensor, values: list[Tensor]) -> Tensor:
        parts = [torch.where(w > 0, w, 0) * torch.where(w > 0, v, 0) for w, v in zip(r, values, strict=True)]
        return torch.stack(parts).sum(0)

    p = [distribution(s.double()) for s in sources]
    lab, doubt = table(weights), table(weights if uncertainty_weights is None else uncertainty_weights)
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


def edt(
    mask: Tensor, spacing: list[float], border: int, squared: int, want_index: int
) -> tuple[Tensor, Tensor]:
    """Distance to the nearest 0-voxel and the first such voxel in C order, by looking at all pairs."""
    shape = torch.tensor(mask.shape[1:])
    places = torch.cartesian_prod(*(torch.arange(n) for n in mask.shape[1:]))
    step = torch.tensor(spacing or [1.0, 1.0, 1.0], dtype=torch.float64)
    way_out = (torch.minimum(places + 1, shape - places) * step) ** 2
    way_out = {0: torch.tensor(torch.inf), 1: way_out.amin(1), 2: way_out[:, 1:].amin(1)}[border]
    squares, indices = [], []
    for m in mask.flatten(1):
        zeros = torch.nonzero(m == 0)[:, 0]
        d2 = (((places[:, None] - places[zeros]) * step) ** 2).sum(-1)
        d2 = torch.cat([d2, torch.full((len(m), 1), torch.inf, dtype=torch.float64)], 1)
        least, column = d2.min(1)
        column = (d2 == least[:, None]).int().argmax(1)
        index = torch.cat([zeros, torch.tensor([-1])])[column]
        out = (way_out <= least) & (m != 0)
        squares.append(torch.where(out, way_out, least))
        indices.append(torch.where(out, -1, index))
    distance = torch.stack(squares).reshape(mask.shape)
    index = torch.stack(indices).reshape(mask.shape)[None]
    return (distance if squared else distance.sqrt()), index[:want_index]


def components(image: Tensor, connectivity: int, by_value: int) -> tuple[Tensor, Tensor]:
    """Spread the smallest voxel number through each component, then count the distinct ones."""
    most = {6: 1, 18: 2, 26: 3}[connectivity]
    steps = [s for s in itertools.product((-1, 0, 1), repeat=3) if 0 < sum(map(abs, s)) <= most]
    d, h, w = image.shape[1:]
    everywhere = F.pad(image.long(), (1,) * 6)
    far = image[0].numel()
    number = torch.arange(far).reshape(1, d, h, w).expand(image.shape)
    number = torch.where(image != 0, number, far)
    while True:
        before = number
        padded = F.pad(number, (1,) * 6, value=far)
        for z, y, x in steps:
            there = (..., slice(1 + z, 1 + z + d), slice(1 + y, 1 + y + h), slice(1 + x, 1 + x + w))
            same = (everywhere[there] == image) if by_value else (everywhere[there] != 0)
            number = torch.where(same & (image != 0), torch.minimum(number, padded[there]), number)
        if torch.equal(number, before):
            break
    labels = torch.zeros_like(number)
    count = torch.zeros(len(image), dtype=torch.int64)
    for n, (v, m) in enumerate(zip(number, image, strict=True)):
        roots, inverse = v[m != 0].unique(return_inverse=True)
        labels[n][m != 0] = inverse + 1
        count[n] = len(roots)
    return labels, count


def keep_components(mask: Tensor, connectivity: int, min_size: int) -> Tensor:
    """The mask where its component is the largest one (the first of equals), or large enough."""
    labels, _ = components(mask, connectivity, 0)
    kept = torch.zeros_like(mask)
    for k, m, label in zip(kept, mask, labels, strict=True):
        size = label.flatten().bincount()
        size[0] = 0
        chosen = (size >= min_size) & (size > 0) if min_size else torch.arange(len(size)) == size.argmax()
        k.copy_(torch.where(chosen[label], m, torch.zeros_like(m)))
    return kept


# ---- metrics ------------------------------------------------------------------------------------


def overlap(y_pred: Tensor, y: Tensor, num_classes: int, has_ignore: int, ignore_index: int) -> Tensor:
    """|A|, |G|, |A & G| of the masks of each class; voxels with the ignored reference label left out."""
    used = (y != ignore_index) | (has_ignore == 0)
    a, g = (torch.stack([(t == c) & used for c in range(num_classes)], 1) for t in (y_pred, y))
    return torch.stack([m.flatten(2).sum(-1) for m in (a, g, a & g)], -1)


def surface_metrics(
    y_pred: Tensor,
    y: Tensor,
    areas: Tensor | None,
    num_classes: int,
    first: int,
    dims: int,
    has_ignore: int,
    ignore_index: int,
    percentile: float,
    spacing: Sequence[float],
    tolerance: Sequence[float],
) -> Tensor:
    """Weights, means, maxima, percentiles and near weights of surface distances, by brute force."""
    cases = y.shape[0]
    out = torch.full((cases, num_classes, 11), float("nan"), dtype=torch.float64)
    used = (y != ignore_index) | (has_ignore == 0)
    for n, c in itertools.product(range(cases), range(first, num_classes)):
        scale = torch.tensor(spacing, dtype=torch.float64).view(-1, 3)[n if len(spacing) > 3 else 0]
        masks = [(t[n] == c) & used[n] for t in (y_pred, y)]
        (a, wa), (g, wg) = (_surface_elements(m, areas, dims) for m in masks)
        out[n, c, :2] = torch.stack([wa.sum(), wg.sum()])
        if not len(a) or not len(g):
            continue
        apart = torch.cdist(a * scale, g * scale, compute_mode="donot_use_mm_for_euclid_dist")
        da, dg = apart.min(1).values, apart.min(0).values
        limit = torch.tensor(tolerance[c] if tolerance else 0.0, dtype=torch.float32)
        pa, pg = _percentile(da, wa, areas, percentile), _percentile(dg, wg, areas, percentile)
        both = (
            torch.quantile(torch.cat([da, dg]), percentile / 100) if areas is None else torch.maximum(pa, pg)
        )
        near = [w[d.float() <= limit].sum() for d, w in ((da, wa), (dg, wg))]
        mean = [(w * d).sum() / w.sum() for d, w in ((da, wa), (dg, wg))]
        out[n, c, 2:] = torch.stack([*mean, da.max(), dg.max(), pa, pg, both, *near])
    return out


def _surface_elements(mask: Tensor, areas: Tensor | None, dims: int) -> tuple[Tensor, Tensor]:
    """Coordinates and weights of surface voxels, or of the points between voxels if there are areas."""
    shape = mask.shape
    if areas is None:
        wide = F.pad(mask, (1, 1, 1, 1, 1, 1))
        inner = mask.clone()
        for axis, move in itertools.product(range(3 - dims, 3), (-1, 1)):
            inner &= wide.roll(move, axis)[1:-1, 1:-1, 1:-1]
        at = (mask & ~inner).nonzero().double()
        return at, torch.ones(len(at), dtype=torch.float64)
    wide = F.pad(mask, (1, 1, 1, 1, 1, 1)).long()
    code = torch.zeros(tuple(n + 1 for n in shape), dtype=torch.long)
    corners = list(itertools.product((0, 1) if dims == 3 else (1,), (0, 1), (0, 1)))
    for z, y, x in corners:
        code = 2 * code + wide[z : z + shape[0] + 1, y : y + shape[1] + 1, x : x + shape[2] + 1]
    if dims == 2:
        code = code[:1]
    mixed = (code > 0) & (code < 2 ** len(corners) - 1)
    return mixed.nonzero().double(), areas[code[mixed]]


def _percentile(d: Tensor, weight: Tensor, areas: Tensor | None, percentile: float) -> Tensor:
    """Linear between order statistics; with areas the first distance that has this share of area."""
    if areas is None:
        return torch.quantile(d, percentile / 100)
    d, order = d.sort(stable=True)
    share = weight[order].cumsum(0)
    return d[int((share / share[-1] < percentile / 100).sum().clamp(max=len(d) - 1))]


# ---- random walker ------------------------------------------------------------------------------


def random_walker(
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


def geodesic(image: Tensor, mask: Tensor, classes: int, weight: float, spacing: Sequence[float]) -> Tensor:
    """Relax every step between face neighbours until nothing changes (Bellman-Ford)."""
    image = image.repeat_interleave(classes, 0).double()
    distance = torch.where(mask != 0, 0.0, torch.inf).double()
    h = list(spacing) or [1.0] * 3
    while True:
        before = distance.clone()
        for axis in (1, 2, 3):
            n = image.shape[axis] - 1
            step = (h[axis - 1] ** 2 + (weight * image.diff(dim=axis)) ** 2).sqrt()
            a, b = distance.narrow(axis, 0, n), distance.narrow(axis, 1, n)
            shorter = torch.minimum(a, b + step), torch.minimum(b, a + step)
            a.copy_(shorter[0])
            b.copy_(torch.minimum(b, shorter[1]))
        if torch.equal(before, distance):
            return distance
