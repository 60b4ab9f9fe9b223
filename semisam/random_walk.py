# SPDX-License-Identifier: Apache-2.0
"""Segmentation by a random walk with priors: a promptable generalist that needs no weights.

`random_walker` solves for the foreground probability given seeds; `mask_seeds` and `click_seeds` turn
a rough mask or clicks into seeds and a prior, `mask_prompt` and `click_prompt` do all of it.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from semisam import masks, ops

__all__ = [
    "WalkInfo",
    "click_prompt",
    "click_seeds",
    "geodesic",
    "mask_prompt",
    "mask_seeds",
    "random_walker",
    "standardize",
]


class WalkInfo(NamedTuple):
    """How a solve ended, one entry per problem: `converged` is `residual <= tol`."""

    iterations: Any
    residual: Any
    converged: Any


def random_walker(
    image: Any,
    seeds: Any,
    prior: Any = None,
    *,
    gamma: float = 0.0,
    beta: float = 90.0,
    spacing: Sequence[float] | None = None,
    tol: float = 1e-4,
    max_iter: int = 1000,
    spatial_dims: int | None = None,
    return_info: bool = False,
) -> Any:
    """Return each voxel's foreground probability: that a random walk from it meets foreground first.

    `image` is [*batch, D, H, W] or [H, W], floating, scaled so that differences of 1 are large
    (`standardize` does it); `seeds` is [*batch, *classes, *space] with 0 free, 1 foreground,
    2 background, any integer dtype; `prior` has the shape of `seeds`, floating, the probability pi of
    foreground in 0..1. Classes are separate problems on the same image. NumPy arrays or torch tensors;
    the result is float32 with the shape of `seeds`, exactly 1 and 0 on seeds.

        (L + gamma I) x = gamma pi  on free voxels,  L the Laplacian of the grid with the weights
        w_ij = (exp(-beta (I_i - I_j)^2) + 1e-5) / (h_axis / h_min)^2  between face neighbours

    `gamma` is the prior's strength; `spacing` the voxel size per axis, in any unit (default: equal).
    `spatial_dims` is needed only for a batch of 2-D images [B, H, W]: 2. Conjugate gradients stop when
    the preconditioned residual is below `tol` relative to that of the zero guess for x = 1, or after
    `max_iter` iterations with a RuntimeWarning. With `return_info` the result is (x, `WalkInfo`).
    Where NaN in image or prior touches a problem, all its free voxels are NaN and it did not converge.
    Results do not depend on the thread count, nor on what else is in the batch.

    Raises ValueError for shapes that do not fit, other seeds than 0, 1, 2, a problem without a seed
    where gamma is 0, gamma > 0 without a prior, probabilities outside 0..1 and spacings that are not
    positive; TypeError for dtypes. Papers: Grady, Random Walks for Image Segmentation (TPAMI 2006);
    with priors: Grady, Multilabel Random Walker Segmentation Using Prior Models (CVPR 2005).

    >>> import numpy as np
    >>> from semisam.random_walk import random_walker
    >>> image = np.float32([[0, 0, 0, 5, 5]])
    >>> seeds = np.uint8([[1, 0, 0, 0, 2]])
    >>> random_walker(image, seeds).round(2).tolist()
    [[1.0, 1.0, 1.0, 0.0, 0.0]]
    """
    prob, iterations, residual = solved(
        *(image, seeds, prior),
        gamma=gamma,
        beta=beta,
        spacing=spacing,
        tol=tol,
        max_iter=max_iter,
        spatial_dims=spatial_dims,
    )
    _warn_unless_converged(iterations, residual, tol)
    if not return_info:
        return prob
    lead = tuple(seeds.shape[: len(seeds.shape) - len(_space("random_walker", image, spatial_dims))])
    info = WalkInfo(iterations.reshape(lead), residual.reshape(lead), (residual <= tol).reshape(lead))
    return prob, info


def solved(
    image: Any,
    seeds: Any,
    prior: Any,
    *,
    gamma: float,
    beta: float,
    spacing: Sequence[float] | None,
    tol: float,
    max_iter: int,
    spatial_dims: int | None,
) -> tuple[Any, Any, Any]:
    """Return what `random_walker` solves, and iterations and residual of each problem, judged by nobody.

    >>> import numpy as np
    >>> from semisam.random_walk import solved
    >>> numbers = {"gamma": 0.0, "beta": 90.0, "spacing": None, "tol": 1e-4, "max_iter": 100}
    >>> prob, iterations, residual = solved(
    ...     np.float32([[0, 5]]), np.uint8([[1, 2]]), None, **numbers, spatial_dims=None)
    >>> prob.tolist()
    [[1.0, 0.0]]
    """
    space = _space("random_walker", image, spatial_dims)
    n = len(space)
    lead = _lead("random_walker", "seeds", seeds, image, space)
    if prior is not None and tuple(prior.shape) != tuple(seeds.shape):
        raise ValueError(
            f"random_walker(): prior: expected the shape of seeds {tuple(seeds.shape)}, "
            f"got {tuple(prior.shape)}"
        )
    ops.one_device("random_walker", image=image, seeds=seeds, prior=prior)
    h = _spacing("random_walker", spacing, n)
    full = (1,) * (3 - n) + space
    classes = math.prod(lead[len(image.shape) - n :])
    prob, iterations, residual = ops.call(
        "random_walker",
        image.reshape(-1, *full),
        _narrow_seeds(seeds).reshape(-1, *full),
        None if prior is None else prior.reshape(-1, *full),
        classes,
        float(gamma),
        float(beta),
        [min(h)] * (3 - n) + h,
        float(tol),
        max_iter,
    )
    return prob.reshape(seeds.shape), iterations, residual


def _space(function: str, image: Any, spatial_dims: int | None) -> tuple[int, ...]:
    n = min(len(image.shape), 3) if spatial_dims is None else spatial_dims
    if n not in (2, 3) or len(image.shape) < n:
        raise ValueError(
            f"{function}(): image: expected [..., D, H, W] or [..., H, W] with 3 or 2 spatial dimensions, "
            f"got shape {tuple(image.shape)} and spatial_dims={spatial_dims}"
        )
    return tuple(image.shape[-n:])


def _lead(function: str, name: str, array: Any, image: Any, space: tuple[int, ...]) -> tuple[int, ...]:
    """The dimensions in front of the spatial ones, which begin with those of the image."""
    shape, batch = tuple(array.shape), tuple(image.shape[: len(image.shape) - len(space)])
    if shape[-len(space) :] != space or shape[: len(batch)] != batch:
        raise ValueError(
            f"{function}(): {name}: expected shape {(*batch, '...', *space)} to fit the image, got {shape}"
        )
    return shape[: len(shape) - len(space)]


def _spacing(function: str, spacing: Sequence[float] | None, n: int) -> list[float]:
    h = [1.0] * n if spacing is None else [float(v) for v in spacing]
    if len(h) != n or not all(0 < v < math.inf for v in h):
        raise ValueError(
            f"{function}(): spacing: expected {n} positive numbers, one per spatial dimension, got {spacing}"
        )
    return h


def _narrow_seeds(seeds: Any) -> Any:
    """Any integer dtype as uint8, after making sure that no value wraps around on the way."""
    name = ops.dtype_name(seeds)
    if name in ("u8", "i8") or name[:1] not in ("u", "i"):
        return seeds  # the core says what is wrong with other dtypes
    low, high = int(seeds.min()), int(seeds.max())
    if low < 0 or high > 2:
        raise ValueError(
            "random_walker(): seeds: expected 0 (free), 1 (foreground) or 2 (background), "
            f"got {low if low < 0 else high}"
        )
    return seeds.astype(np.uint8) if isinstance(seeds, np.ndarray) else seeds.byte()


def _warn_unless_converged(iterations: Any, residual: Any, tol: float) -> None:
    failed = [i for i, v in enumerate(residual.tolist()) if not v <= tol]
    if failed:
        i = failed[0]
        warnings.warn(
            f"random_walker(): {len(failed)} of {len(residual)} problems did not converge: problem {i} has "
            f"residual {float(residual[i]):.2g} after {int(iterations[i])} iterations, wanted {tol:.2g}",
            RuntimeWarning,
            stacklevel=3,
        )


def geodesic(
    image: Any,
    mask: Any,
    *,
    weight: float = 1.0,
    spacing: Sequence[float] | None = None,
    spatial_dims: int | None = None,
) -> Any:
    """Return the length of the shortest path through the image from every voxel to a marked one.

    `image` is [*batch, D, H, W] or [H, W] as in `random_walker`, `mask` [*batch, *classes, *space],
    bool or uint8, nonzero = marked; the result is float32 of the mask's shape and the caller's kind.
    Steps go between face neighbours, with h the voxel size along their axis (`spacing`, default 1):

        d(i) = min over paths of sum over steps of sqrt(h^2 + (weight (I_i - I_j))^2)

    +inf where nothing is marked. A step to NaN cannot be taken. Exact, not an approximation by a few
    sweeps. Raises ValueError for shapes that do not fit, a negative weight and a bad spacing, TypeError
    for dtypes. Paper: Criminisi et al., GeoS: Geodesic Image Segmentation (ECCV 2008).

    >>> import numpy as np
    >>> from semisam.random_walk import geodesic
    >>> geodesic(np.float32([[0, 0, 3, 3]]), np.array([[True, False, False, False]]), weight=4).round(2)
    array([[ 0.  ,  1.  , 13.04, 14.04]], dtype=float32)
    """
    space = _space("geodesic", image, spatial_dims)
    n = len(space)
    lead = _lead("geodesic", "mask", mask, image, space)
    ops.one_device("geodesic", image=image, mask=mask)
    full = (1,) * (3 - n) + space
    distance = ops.call(
        "geodesic",
        image.reshape(-1, *full),
        mask.reshape(-1, *full),
        math.prod(lead[len(image.shape) - n :]),
        float(weight),
        [1.0] * (3 - n) + _spacing("geodesic", spacing, n),
    )
    return distance.reshape(mask.shape)


# ---- prompts ------------------------------------------------------------------------------------


def standardize(image: Any, *, sigma: float = 0.5, spatial_dims: int | None = None) -> Any:
    """Return the image with mean 0 and standard deviation 1, smoothed: the scale that `beta` is for.

    `image` is [*batch, D, H, W] or [H, W] (see `random_walker`), any real dtype; every volume is scaled
    by itself, then convolved with a Gaussian of `sigma` voxels (radius 4 sigma, edges repeated). A
    constant image becomes zeros. The result is float32, the caller's kind of array.

    >>> import numpy as np
    >>> from semisam.random_walk import standardize
    >>> standardize(np.array([[1.0, 3.0], [1.0, 3.0]]), sigma=0).tolist()
    [[-1.0, 1.0], [-1.0, 1.0]]
    """
    n = len(_space("standardize", image, spatial_dims))
    if not 0 <= sigma < math.inf:
        raise ValueError(f"standardize(): sigma: expected 0 or a positive number, got {sigma}")
    return _like(_standardize(_numpy(image), n, sigma), image)


def mask_seeds(
    image: Any,
    mask: Any,
    *,
    points: Any = None,
    labels: Any = None,
    radius: float = 2.0,
    weight: float = 2.0,
    colour_weight: float = 0.5,
    spatial_dims: int | None = None,
) -> tuple[Any, Any]:
    """Return (seeds, prior) for `random_walker` from a rough mask: sure inside, sure outside, a band.

    `image` is as in `random_walker`, `mask` [*batch, *classes, *space], boolean, integer 0/1, or a
    foreground probability (foreground where >= 0.5). With s the distance to the mask's surface in
    voxels, positive inside:

        foreground where s >= min(3, 0.6 max s), background where s <= -7,
        prior = sigmoid(weight clip(s, -8, 8) + colour_weight c)

    where c is the log-ratio of the smoothed 64-bin grey value histograms of the two seed sets, each
    mixed with 10 % uniform, clipped to +-3 (0 where one set is empty). An empty mask gives background
    everywhere. Clicks (`points`, `labels`, `radius` as in `click_seeds`) become seeds, too, and win over
    those of the mask. Seeds are uint8, the prior float32, both of the mask's shape and the image's kind.

    Raises ValueError for a mask whose shape does not fit the image or that has NaN, and as `click_seeds`
    does for clicks.

    >>> import numpy as np
    >>> from semisam.random_walk import mask_seeds
    >>> mask = np.zeros((1, 20), bool)
    >>> mask[:, 5:9] = True
    >>> mask_seeds(np.zeros((1, 20)), mask)[0].tolist()
    [[0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2, 2]]
    """
    space = _space("mask_seeds", image, spatial_dims)
    _lead("mask_seeds", "mask", mask, image, space)
    flat = _numpy(mask).reshape(-1, *space)
    if flat.dtype.kind == "f" and np.isnan(flat).any():
        raise ValueError("mask_seeds(): mask: expected probabilities, got NaN")
    inside = flat >= 0.5 if flat.dtype.kind == "f" else flat != 0
    images = _numpy(image).astype(np.float32, copy=False).reshape(-1, *space)
    signed = _signed_distance(inside)
    seeds = np.zeros(flat.shape, np.uint8)
    evidence = np.float32(weight) * np.clip(signed, -8, 8)
    for i in range(len(flat)):
        sure = min(3.0, 0.6 * float(signed[i].max()))
        seeds[i][signed[i] <= -7] = 2
        seeds[i][inside[i] & (signed[i] >= sure)] = 1
        if colour_weight:
            picture = images[i * len(images) // len(flat)]
            evidence[i] += np.float32(colour_weight) * _colour(picture, seeds[i])
    if points is not None:
        clicks, kinds = _clicks("mask_seeds", image, points, labels, space)
        if len(kinds) != len(seeds):
            raise ValueError(
                f"mask_seeds(): labels: expected shape {(*mask.shape[: -len(space)], 'K')}, "
                f"got {tuple(labels.shape)}"
            )
        for one, at, kind in zip(seeds, clicks, kinds, strict=True):
            _stamp(one, at, kind, radius)
    prior = 1 / (1 + np.exp(-evidence))
    return _like(seeds.reshape(mask.shape), image), _like(prior.reshape(mask.shape), image)


def click_seeds(
    image: Any,
    points: Any,
    labels: Any,
    *,
    box: Any = None,
    radius: float = 2.0,
    colour_weight: float = 0.5,
    geodesic_weight: float = 4.0,
    edge_weight: float = 30.0,
    spatial_dims: int | None = None,
) -> tuple[Any, Any]:
    """Return (seeds, prior) for `random_walker` from clicks, and perhaps a box around the target.

    `image` is as in `random_walker`; `points` [*batch, *classes, K, n] in voxels, in array-index order,
    n = 2 or 3; `labels` [*batch, *classes, K]: 1 foreground, 0 background, -1 no click (padding); `box`
    [*batch, *classes, 2, n], the first and the last voxel of the target per axis.

        foreground and background within `radius` voxels of the clicks (a later click wins, and
        every click wins on its own voxel), background outside the box grown by 20 % + 4 voxels,
        prior = sigmoid(colour_weight c + geodesic_weight (d_bg - d_fg) / (d_bg + d_fg))

    with c as in `mask_seeds`, and d the `geodesic` distances (weight `edge_weight`) to the background
    and the foreground seeds; the last term is 0 where both are missing. Seeds are uint8, the prior
    float32, [*batch, *classes, *space], of the image's kind.

    Raises ValueError for shapes that do not fit, a point outside the image and other labels.

    >>> import numpy as np
    >>> from semisam.random_walk import click_seeds
    >>> click_seeds(np.zeros((1, 9)), np.array([[0, 1], [0, 8]]), np.array([1, 0]))[0].tolist()
    [[1, 1, 1, 1, 0, 0, 2, 2, 2]]
    """
    space = _space("click_seeds", image, spatial_dims)
    clicks, kinds = _clicks("click_seeds", image, points, labels, space)
    lead = tuple(labels.shape[:-1])
    images = _numpy(image).astype(np.float32, copy=False).reshape(-1, *space)
    seeds = np.zeros((len(kinds), *space), np.uint8)
    if box is not None:
        if tuple(box.shape) != (*lead, 2, len(space)):
            raise ValueError(
                f"click_seeds(): box: expected shape {(*lead, 2, len(space))}, got {tuple(box.shape)}"
            )
        _close_outside(seeds, _numpy(box).reshape(-1, 2, len(space)))
    for i in range(len(seeds)):
        _stamp(seeds[i], clicks[i], kinds[i], radius)
    grouped = seeds.reshape(len(images), -1, *space)
    evidence = np.float32(geodesic_weight) * _nearness(images, grouped, edge_weight).reshape(seeds.shape)
    if colour_weight:
        for i in range(len(seeds)):
            picture = images[i * len(images) // len(seeds)]
            evidence[i] += np.float32(colour_weight) * _colour(picture, seeds[i])
    prior = 1 / (1 + np.exp(-evidence))
    return _like(seeds.reshape(*lead, *space), image), _like(prior.reshape(*lead, *space), image)


def mask_prompt(
    image: Any,
    mask: Any,
    *,
    points: Any = None,
    labels: Any = None,
    radius: float = 2.0,
    gamma: float = 0.05,
    beta: float = 90.0,
    weight: float = 2.0,
    colour_weight: float = 0.5,
    sigma: float = 0.5,
    spacing: Sequence[float] | None = None,
    tol: float = 1e-4,
    max_iter: int = 1000,
    spatial_dims: int | None = None,
    return_info: bool = False,
) -> Any:
    """Return the foreground probability that image and a rough mask suggest together.

    `random_walker` on the `standardize`-d image (`sigma`) with `mask_seeds` (`weight`,
    `colour_weight`, and the clicks `points`, `labels`, `radius`); see there for shapes, formulas, the
    other arguments and errors.

    >>> import numpy as np
    >>> from semisam.random_walk import mask_prompt
    >>> image = np.zeros((40, 40), np.float32)
    >>> image[10:30, 10:30] = 1
    >>> rough = np.zeros((40, 40), bool)
    >>> rough[12:32, 9:29] = True
    >>> better = mask_prompt(image, rough) > 0.5
    >>> bool((better != (image > 0)).sum() < 0.7 * (rough != (image > 0)).sum())
    True
    """
    scaled = standardize(image, sigma=sigma, spatial_dims=spatial_dims)
    seeds, prior = mask_seeds(
        scaled,
        mask,
        points=points,
        labels=labels,
        radius=radius,
        weight=weight,
        colour_weight=colour_weight,
        spatial_dims=spatial_dims,
    )
    return random_walker(
        scaled,
        seeds,
        prior,
        gamma=gamma,
        beta=beta,
        spacing=spacing,
        tol=tol,
        max_iter=max_iter,
        spatial_dims=spatial_dims,
        return_info=return_info,
    )


def click_prompt(
    image: Any,
    points: Any,
    labels: Any,
    *,
    box: Any = None,
    radius: float = 2.0,
    gamma: float = 0.005,
    beta: float = 90.0,
    colour_weight: float = 0.5,
    geodesic_weight: float = 4.0,
    edge_weight: float = 30.0,
    sigma: float = 0.5,
    spacing: Sequence[float] | None = None,
    tol: float = 1e-4,
    max_iter: int = 1000,
    spatial_dims: int | None = None,
    return_info: bool = False,
) -> Any:
    """Return the foreground probability that image and clicks suggest together.

    `random_walker` on the `standardize`-d image (`sigma`) with `click_seeds`; see there for shapes,
    formulas, the other arguments and errors.

    >>> import numpy as np
    >>> from semisam.random_walk import click_prompt
    >>> image = np.zeros((40, 40), np.float32)
    >>> image[10:30, 10:30] = 1
    >>> x = click_prompt(image, np.array([[20, 20], [4, 4]]), np.array([1, 0]))
    >>> bool(((x > 0.5) == (image > 0)).all())
    True
    """
    scaled = standardize(image, sigma=sigma, spatial_dims=spatial_dims)
    seeds, prior = click_seeds(
        scaled,
        points,
        labels,
        box=box,
        radius=radius,
        colour_weight=colour_weight,
        geodesic_weight=geodesic_weight,
        edge_weight=edge_weight,
        spatial_dims=spatial_dims,
    )
    return random_walker(
        scaled,
        seeds,
        prior,
        gamma=gamma,
        beta=beta,
        spacing=spacing,
        tol=tol,
        max_iter=max_iter,
        spatial_dims=spatial_dims,
        return_info=return_info,
    )


def _numpy(array: Any) -> np.ndarray[Any, Any]:
    if ops.is_torch(array):
        array = array.detach().cpu()
        array = array.float() if array.is_floating_point() else array
    return np.asarray(array)


def _like(result: np.ndarray[Any, Any], array: Any) -> Any:
    if ops.is_torch(array):
        return sys.modules["torch"].from_numpy(result).to(array.device)
    return result


def _gaussian(image: np.ndarray[Any, Any], sigma: float, axes: range) -> np.ndarray[Any, Any]:
    """Convolution along `axes` with a normalised Gaussian of radius 4 sigma; edges are repeated."""
    radius = int(4 * sigma + 0.5)
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / max(sigma, 1e-9)) ** 2)
    taps = (taps / taps.sum()).astype(image.dtype)
    for axis in axes:
        size = image.shape[axis]
        padded = np.pad(image, [(radius, radius) if a == axis else (0, 0) for a in range(image.ndim)], "edge")
        smooth = np.zeros_like(image)
        for k, tap in enumerate(taps):
            smooth += tap * padded.take(range(k, k + size), axis)
        image = smooth
    return image


def _standardize(image: np.ndarray[Any, Any], n: int, sigma: float) -> np.ndarray[Any, Any]:
    space = tuple(range(image.ndim - n, image.ndim))
    mean = image.mean(axis=space, keepdims=True, dtype=np.float64)
    deviation = image.std(axis=space, keepdims=True, dtype=np.float64)
    scaled = ((image - mean) / np.where(deviation > 0, deviation, 1.0)).astype(np.float32)
    return _gaussian(scaled, sigma, range(image.ndim - n, image.ndim))


def _signed_distance(inside: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Distance in voxels to the nearest voxel of the other kind; infinite where there is none."""
    n = inside.ndim - 1
    within, beyond = (masks.edt(m, spatial_dims=n) for m in (inside, ~inside))
    return np.asarray(np.where(inside, within, -beyond), np.float32)


def _clicks(
    function: str, image: Any, points: Any, labels: Any, space: tuple[int, ...]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Clicks as [problems, K, n] and [problems, K] int64, checked."""
    batch = tuple(image.shape[: len(image.shape) - len(space)])
    shape = tuple(points.shape)
    if labels is None or shape[:-1] != tuple(labels.shape) or not labels.shape:
        got = None if labels is None else tuple(labels.shape)
        raise ValueError(f"{function}(): labels: expected shape {shape[:-1]}, one per point, got {got}")
    if shape[-1] != len(space) or shape[: len(batch)] != batch:
        raise ValueError(
            f"{function}(): points: expected shape {(*batch, '...', 'K', len(space))}, got {shape}"
        )
    problems = math.prod(shape[:-2])  # counted, since K = 0 leaves nothing to count by
    at = np.rint(_numpy(points)).astype(np.int64).reshape(problems, *shape[-2:])
    kinds = _numpy(labels).reshape(problems, shape[-2])
    if not np.isin(kinds, (-1, 0, 1)).all():
        wrong = kinds[~np.isin(kinds, (-1, 0, 1))][0]
        raise ValueError(f"{function}(): labels: expected 1, 0 or -1 (padding), got {wrong}")
    outside = (kinds >= 0) & ((at < 0) | (at >= np.array(space))).any(-1)
    if outside.any():
        raise ValueError(f"{function}(): points: expected voxels of {space}, got {at[outside][0].tolist()}")
    return at, kinds


def _stamp(
    seeds: np.ndarray[Any, Any], points: np.ndarray[Any, Any], kinds: np.ndarray[Any, Any], radius: float
) -> None:
    """Write balls around the clicks, then the clicks themselves, into one problem's seeds."""
    reach = int(radius)
    offsets = np.indices((2 * reach + 1,) * seeds.ndim).reshape(seeds.ndim, -1).T - reach
    ball = offsets[(offsets**2).sum(1) <= radius * radius]
    for around in (ball, ball[:0]):
        for point, kind in zip(points, kinds, strict=True):
            if kind >= 0:
                at = point + around if len(around) else point[None]
                at = at[((at >= 0) & (at < np.array(seeds.shape))).all(1)]
                seeds[tuple(at.T)] = 1 if kind == 1 else 2


def _close_outside(seeds: np.ndarray[Any, Any], boxes: np.ndarray[Any, Any]) -> None:
    """Background outside the boxes, grown by 20 % (10 % at either side) and 4 voxels."""
    for one, (low, high) in zip(seeds, boxes.astype(np.float64), strict=True):
        margin = 4 + 0.1 * (high - low + 1)
        begin = np.maximum(np.floor(low - margin), 0).astype(int)
        end = np.minimum(np.ceil(high + margin), np.array(one.shape) - 1).astype(int)
        keep = tuple(slice(b, e + 1) for b, e in zip(begin, end, strict=True))
        one[keep] += 2  # wraps nothing: seeds are still 0
        one[...] = np.where(one == 2, 0, 2)


def _nearness(
    images: np.ndarray[Any, Any], seeds: np.ndarray[Any, Any], edge_weight: float
) -> np.ndarray[Any, Any]:
    """(d_bg - d_fg) / (d_bg + d_fg) of [B, classes, *space] seeds: 1 at foreground, -1 at background."""
    dims = seeds.ndim - 2
    d_fg = geodesic(images, seeds == 1, weight=edge_weight, spatial_dims=dims)
    d_bg = geodesic(images, seeds == 2, weight=edge_weight, spatial_dims=dims)
    # In terms of d_fg / d_bg, which is 0 or infinite where one kind of seed is missing.
    neither = np.isinf(d_fg) & np.isinf(d_bg)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(np.isinf(d_fg), np.inf, d_fg / d_bg)
        near = np.where(np.isinf(ratio), -1.0, (1 - ratio) / (1 + ratio))
    return np.where(neither, 0.0, near).astype(np.float32)


def _colour(image: np.ndarray[Any, Any], seeds: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Log-ratio of the seeds' histograms at every voxel; bins between the image's outer 0.5 %."""
    low, high = np.percentile(image, [0.5, 99.5])
    if not high > low or not (seeds == 1).any() or not (seeds == 2).any():
        return np.zeros(image.shape, np.float32)
    scaled = (image - np.float32(low)) * np.float32(64 / (high - low))
    bins = np.clip(scaled, 0, 63).astype(np.uint8)
    share = []
    for kind in (1, 2):
        counts = np.bincount(bins[seeds == kind], minlength=64).astype(np.float64)
        smooth = _gaussian(counts, 2.0, range(1))
        share.append(0.9 * smooth / smooth.sum() + 0.1 / 64)
    ratio = np.clip(np.log(share[0] / share[1]), -3, 3).astype(np.float32)
    return np.asarray(ratio[bins])
