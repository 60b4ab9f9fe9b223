# SPDX-License-Identifier: Apache-2.0
"""The definition of right: every operator once more in plain PyTorch, short and float64-clean.

Arguments and results are those of the operator of the same name in `csrc/ops.def`. Written to be
read, not to be fast; tests compare every kernel with it and nothing else imports it.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

# ---- prompts ------------------------------------------------------------------------------------


def mask_logits(prob: Tensor, d: int, h: int, w: int) -> Tensor:
    """clip(ln(m / (1 - m)), -10, 10) of the mean m over each cell of adaptive average pooling."""
    return F.adaptive_avg_pool3d(prob[:, None], (d, h, w))[:, 0].logit().clamp(-10, 10)


def specialist_targets(
    prob: Tensor, F: int, threshold: float, p_min: float, tau_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Target, confident region and skip flag of every sample and foreground class [B, F, ...]."""
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
    return target, region, skip


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


def next_click(  # noqa: PLR0917  (the operator's arguments)
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

# ---- fusion -------------------------------------------------------------------------------------

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

# ---- random walker ------------------------------------------------------------------------------
