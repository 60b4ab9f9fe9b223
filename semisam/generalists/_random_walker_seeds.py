# SPDX-License-Identifier: Apache-2.0
"""Seeds and priors of the random walker where the host looks at no value: `random_walk` in torch, by masks.

The formulas are those of `semisam.random_walk.mask_seeds` and `click_seeds`, for all rows at once: images are
[B, *S], everything else [B * F, *S], where row b * F + f belongs to image b.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from semisam import masks, random_walk

__all__ = ["Grey", "box_filled", "click_seeds", "grey_of", "mask_seeds", "standardize"]

_BINS = 64


class Grey(NamedTuple):
    """What colour is judged by: each voxel's bin [B, V], and whether the images have several grey values."""

    bins: Any
    varied: Any


def standardize(image: Any, sigma: float) -> Any:
    """Return images [R, *S] with mean 0 and deviation 1, smoothed by `sigma` voxels."""
    x = image.double()
    space = tuple(range(1, x.ndim))
    mean, deviation = x.mean(space, keepdim=True), x.std(space, keepdim=True, correction=0)
    scaled = ((x - mean) / torch.where(deviation > 0, deviation, 1.0)).float()
    return _gaussian(scaled, sigma, space)


def grey_of(image: Any) -> Grey:
    """Return the bins of images [B, *S] between their outer 0.5 %."""
    rows = image.flatten(1)
    last = rows.shape[1] - 1
    ordered = rows.sort(1).values  # kthvalue is refused on a GPU where torch is to be deterministic
    ends = []
    for share in (0.005, 0.995):
        at = share * last
        below, above = (ordered[:, min(last, math.floor(at) + i), None].double() for i in (0, 1))
        ends.append(below + (above - below) * (at - math.floor(at)))
    low, high = ends
    varied = high > low
    scale = (_BINS / torch.where(varied, high - low, 1.0)).float()
    bins = ((rows - low.float()) * scale).clamp(0, _BINS - 1).long()
    return Grey(bins, varied[:, 0])


def mask_seeds(grey: Grey, inside: Any, clicks: Any, *, radius: float, weight: float, colour: float) -> Any:
    """Return (seeds, prior) of boolean masks `inside`; `clicks` are (points [N, K, n], labels [N, K])."""
    dims = inside.ndim - 1
    within, beyond = (masks.edt(m, spatial_dims=dims) for m in (inside, ~inside))
    signed = torch.where(inside, within, -beyond)
    most = signed.flatten(1).amax(1).double()
    sure = (0.6 * most).clamp_max(3.0).float().reshape(-1, *(1,) * dims)
    seeds = 2 * (signed <= -7).byte()
    seeds = torch.where(inside & (signed >= sure), 1, seeds)
    evidence = weight * signed.clamp(-8, 8)
    if colour:
        evidence = evidence + colour * _colour(grey, seeds)
    return _stamped(seeds, clicks, radius), evidence.sigmoid()


def click_seeds(
    image: Any,
    grey: Grey,
    box: Any,
    clicks: Any,
    *,
    radius: float,
    colour: float,
    geodesic_weight: float,
    edge_weight: float,
) -> Any:
    """Return (seeds, prior) of clicks alone; `box` [N, 2, n] or None: background far outside of it."""
    space, rows = tuple(image.shape[1:]), len(clicks[1])
    if box is None:
        seeds = torch.zeros((rows, *space), dtype=torch.uint8, device=image.device)
    else:
        margin = 4 + 0.1 * (box[:, 1] - box[:, 0] + 1).double()
        seeds = 2 * (~_between((box[:, 0] - margin).floor(), (box[:, 1] + margin).ceil(), space)).byte()
    seeds = _stamped(seeds, clicks, radius)
    grouped = seeds.reshape(len(image), -1, *space)
    evidence = geodesic_weight * _nearness(image, grouped, edge_weight).reshape(seeds.shape)
    if colour:
        evidence = evidence + colour * _colour(grey, seeds)
    return seeds, evidence.sigmoid()


def box_filled(box: Any, space: tuple[int, ...]) -> Any:
    """Return the voxels [N, *S] inside boxes [N, 2, n]."""
    return _between(box[:, 0].ceil(), box[:, 1].floor(), space)


def _between(begin: Any, end: Any, space: tuple[int, ...]) -> Any:
    inside = torch.ones((len(begin), *space), dtype=torch.bool, device=begin.device)
    for axis, n in enumerate(space):
        shape = [1] * (len(space) + 1)
        shape[axis + 1] = n
        at = torch.arange(n, device=begin.device).reshape(shape)
        first, last = (v[:, axis].reshape(-1, *(1,) * len(space)) for v in (begin, end))
        inside &= (at >= first) & (at <= last)
    return inside


def _stamped(seeds: Any, clicks: tuple[Any, Any], radius: float) -> Any:
    """Seeds with balls around the clicks, then the clicks themselves; a later one wins."""
    points, labels = clicks
    rows, number = labels.shape
    if not number:
        return seeds
    points = points.round().long() if points.is_floating_point() else points
    space, dims = tuple(seeds.shape[1:]), seeds.ndim - 1
    reach = int(radius)
    side = torch.arange(-reach, reach + 1, device=seeds.device)
    offsets = torch.stack(torch.meshgrid(*[side] * dims, indexing="ij"), -1).reshape(-1, dims)
    near = (offsets**2).sum(1) <= radius * radius  # the others are written to a place that nobody reads
    room = torch.cat([seeds.flatten(1), seeds.new_zeros(rows, 1)], 1)
    for around, counts in ((offsets, near), (torch.zeros_like(offsets[:1]), torch.ones_like(near[:1]))):
        for k in range(number):
            at = points[:, k, None] + around
            there, index = counts & (labels[:, k, None] >= 0), torch.zeros_like(at[..., 0])
            for axis, n in enumerate(space):
                there = there & (at[..., axis] >= 0) & (at[..., axis] < n)
                index = index * n + at[..., axis]
            index = torch.where(there, index, room.shape[1] - 1)
            kind = torch.where(labels[:, k, None] == 1, 1, 2).to(room.dtype)
            room.scatter_(1, index, kind.expand_as(index))
    return room[:, :-1].reshape(seeds.shape)


def _nearness(image: Any, seeds: Any, edge_weight: float) -> Any:
    """As `random_walk` has it: 1 at foreground, -1 at background, of seeds [B, F, *S]."""
    dims = seeds.ndim - 2
    d_fg, d_bg = (
        random_walk.geodesic(image, seeds == kind, weight=edge_weight, spatial_dims=dims) for kind in (1, 2)
    )
    neither = d_fg.isinf() & d_bg.isinf()
    ratio = torch.where(d_fg.isinf(), float("inf"), d_fg / d_bg)
    near = torch.where(ratio.isinf(), -1.0, (1 - ratio) / (1 + ratio))
    return torch.where(neither, 0.0, near)


def _colour(grey: Grey, seeds: Any) -> Any:
    """Log-ratio of the seeds' histograms at every voxel, 0 where one set is empty."""
    flat = seeds.flatten(1)
    rows, per_image = len(flat), len(flat) // max(len(grey.bins), 1)
    bins = grey.bins.repeat_interleave(per_image, 0)
    share, used = [], grey.varied.repeat_interleave(per_image, 0)
    for kind in (1, 2):
        marked = flat == kind
        counts = torch.zeros(rows, _BINS, dtype=torch.int64, device=flat.device)
        counts.scatter_add_(1, bins, marked.long())
        used = used & marked.any(1)
        smooth = _gaussian(counts.double(), 2.0, (1,))
        share.append(0.9 * smooth / smooth.sum(1, keepdim=True) + 0.1 / _BINS)
    ratio = (share[0] / share[1]).log().clamp(-3, 3).float()
    return torch.where(used[:, None], ratio, 0.0).gather(1, bins).reshape(seeds.shape)


def _gaussian(x: Any, sigma: float, axes: tuple[int, ...]) -> Any:
    """Convolution along `axes` with a normalised Gaussian of radius 4 sigma; edges are repeated."""
    radius = int(4 * sigma + 0.5)
    taps = [math.exp(-0.5 * (k / max(sigma, 1e-9)) ** 2) for k in range(-radius, radius + 1)]
    whole = sum(taps)
    for axis in axes:
        n, smooth = x.shape[axis], torch.zeros_like(x)
        at = torch.arange(n, device=x.device)
        for k, tap in enumerate(taps):
            smooth = smooth + (tap / whole) * x.index_select(axis, (at + (k - radius)).clamp(0, n - 1))
        x = smooth
    return x
