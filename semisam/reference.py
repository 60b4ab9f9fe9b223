# SPDX-License-Identifier: Apache-2.0
"""The definition of right: every operator once more in plain PyTorch, short and float64-clean.

Arguments and results are those of the operator of the same name in `csrc/ops.def`. Written to be
read, not to be fast; tests compare every kernel with it and nothing else imports it.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

# ---- prompts ------------------------------------------------------------------------------------


def mask_logits(prob: Tensor, d: int, h: int, w: int) -> Tensor:
    """clip(ln(m / (1 - m)), -10, 10) of the mean m over each cell of adaptive average pooling."""
    return F.adaptive_avg_pool3d(prob[:, None], (d, h, w))[:, 0].logit().clamp(-10, 10)


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
