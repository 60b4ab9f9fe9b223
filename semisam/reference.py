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
