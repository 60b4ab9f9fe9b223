# SPDX-License-Identifier: Apache-2.0
"""The definition of right: every operator once more in plain PyTorch, short and float64-clean.

Arguments and results are those of the operator of the same name in `csrc/ops.def`. Written to be
read, not to be fast; tests compare every kernel with it and nothing else imports it.
"""

from __future__ import annotations

import itertools
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

# ---- distances and components -------------------------------------------------------------------

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
