# SPDX-License-Identifier: Apache-2.0
"""Geometry of masks: Euclidean distances, connected components, and cleaning up with them.

All functions take [*batch, D, H, W] or [H, W], NumPy or torch, and return the caller's kind. An array of
three or more dimensions is 3-D in its last three; a batch of 2-D images needs `spatial_dims=2`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from semisam import ops

__all__ = ["Components", "components", "edt", "largest_component", "remove_small"]


class Components(NamedTuple):
    """What `components` returns: labels like the image, and per image count and sizes."""

    labels: Any
    count: Any
    sizes: Any


def edt(
    mask: Any,
    spacing: float | Sequence[float] | None = None,
    *,
    squared: bool = False,
    border: bool = False,
    return_indices: bool = False,
    spatial_dims: int | None = None,
) -> Any:
    """Return the exact Euclidean distance of every foreground voxel to the nearest background voxel.

    `mask` is [*batch, D, H, W] or [H, W] (with `spatial_dims=2` [*batch, H, W]), bool or uint8,
    nonzero = foreground, sides up to 16384; `spacing` is one number or one per spatial dimension in the same
    order, in any unit (1 by default). The result is float32, shaped like the mask, in that unit, 0 in
    the background.

        d(p) = min over background voxels q of sqrt(sum_k (spacing_k (p_k - q_k))^2)

    With `squared` the root is left out. With `border` everything outside the image is background. An
    image without any background has distances +inf. With `return_indices` the result is
    (distance, index): index, int64 and shaped like the mask, is the position of that nearest voxel
    in its flattened image (`np.unravel_index` gives coordinates), of equally near ones the first in
    C order, and -1 where the outside is as near or nothing is there.

    Equal spacings are computed in integers: squares in voxels are exact (below 2^24, where float32
    stops having all integers). With other spacings float32 rounding may add a relative error of
    1.8e-7 to the squares and decides between voxels whose distances differ by less than that.

    Raises ValueError for a mask with fewer dimensions than it needs and for a spacing that is not positive
    (1e-12 to 1e12) or has another number of dimensions; TypeError for a mask of another dtype.
    Paper: the separable form is that of Saito and Toriwaki, Pattern Recognition 27 (1994).

    >>> import numpy as np
    >>> from semisam import masks
    >>> masks.edt(np.array([[0, 1, 1, 1, 0]], np.uint8))[0].tolist()
    [0.0, 1.0, 2.0, 1.0, 0.0]
    """
    images, _, dims = _images("edt", mask, spatial_dims)
    step = _spacing(spacing, dims)
    around = (2 if dims == 2 else 1) if border else 0
    distance, index = ops.call("edt", images, step, around, int(bool(squared)), int(bool(return_indices)))
    distance = distance.reshape(mask.shape)
    return (distance, index[0].reshape(mask.shape)) if return_indices else distance


def components(
    image: Any,
    connectivity: int | None = None,
    *,
    by_value: bool = False,
    return_sizes: bool = False,
    spatial_dims: int | None = None,
) -> Components:
    """Return the connected components of the nonzero voxels of every image of a batch.

    `image` is [*batch, D, H, W] or [H, W] (with `spatial_dims=2` [*batch, H, W]), bool or any integer
    dtype. `connectivity` is 4 or 8 in 2-D and
    6, 18 or 26 in 3-D (default: 8 or 26). With `by_value` only voxels of equal value connect, so
    that every class of a label image falls into its own components.

    The result is (labels, count, sizes): `labels` int32 like the image, 0 in the background, 1 to
    count[n] in image n, numbered by their first voxels in C order; `count` int64 [*batch] (0-d for one
    image); `sizes` int64 [*batch, max(count)], the number of voxels of component i at [..., i - 1], 0
    beyond count, and None unless `return_sizes`.

    Raises ValueError for an image with fewer dimensions than it needs, with 2^31 voxels or more, and for
    a connectivity that its dimension does not have; TypeError for a dtype that is not integer.

    >>> import numpy as np
    >>> from semisam import masks
    >>> labels, count, sizes = masks.components(np.array([[1, 1, 0, 1]], np.uint8), return_sizes=True)
    >>> labels.tolist(), count.tolist(), sizes.tolist()
    ([[1, 1, 0, 2]], 2, [2, 1])
    """
    images, batch, dims = _images("components", image, spatial_dims)
    around = _connectivity("components", connectivity, dims)
    labels, count = ops.call("components", images, around, int(bool(by_value)))
    sizes = _sizes(labels, count) if return_sizes else None
    sizes = sizes if sizes is None else sizes.reshape(*batch, sizes.shape[1])
    return Components(labels.reshape(image.shape), count.reshape(batch), sizes)


def largest_component(mask: Any, connectivity: int | None = None, *, spatial_dims: int | None = None) -> Any:
    """Return each image's largest connected component, everything else set to 0.

    `mask` is [*batch, D, H, W] or [H, W] (with `spatial_dims=2` [*batch, H, W]), bool or uint8; the result
    has its shape and dtype, and its values where it is kept. `connectivity` as in `components`. Of
    equally large components the one with the first voxel in C order stays; an empty image stays empty.
    Raises as `components` does.

    >>> import numpy as np
    >>> from semisam import masks
    >>> masks.largest_component(np.array([[1, 1, 0, 1]], np.uint8)).tolist()
    [[1, 1, 0, 0]]
    """
    return _keep("largest_component", mask, 0, connectivity, spatial_dims)


def remove_small(
    mask: Any, min_size: int, connectivity: int | None = None, *, spatial_dims: int | None = None
) -> Any:
    """Return the mask without its connected components of fewer than `min_size` voxels.

    `mask` and result are as in `largest_component`, `connectivity` as in `components`. Raises
    ValueError for a `min_size` below 1, TypeError for one that is no integer, and otherwise as
    `components` does.

    >>> import numpy as np
    >>> from semisam import masks
    >>> masks.remove_small(np.array([[1, 1, 0, 1]], np.uint8), 2).tolist()
    [[1, 1, 0, 0]]
    """
    if not isinstance(min_size, (int, np.integer)) or isinstance(min_size, bool):
        raise TypeError(f"remove_small(): min_size: expected an integer, got {type(min_size).__name__}")
    if min_size < 1:
        raise ValueError(f"remove_small(): min_size: expected at least 1 voxel, got {min_size}")
    return _keep("remove_small", mask, int(min_size), connectivity, spatial_dims)


def _keep(function: str, mask: Any, min_size: int, connectivity: int | None, spatial_dims: int | None) -> Any:
    images, _, dims = _images(function, mask, spatial_dims)
    around = _connectivity(function, connectivity, dims)
    # More than all voxels is more than any component has; the core counts in what a double can hold.
    return ops.call("keep_components", images, around, min(min_size, 2**53)).reshape(mask.shape)


def _images(function: str, mask: Any, spatial_dims: int | None) -> tuple[Any, tuple[int, ...], int]:
    """The mask as [N, D, H, W], the shape of its batch, and 2 or 3."""
    if not hasattr(mask, "dtype"):
        raise TypeError(f"{function}(): expected a NumPy array or torch tensor, got {type(mask).__name__}")
    shape = tuple(mask.shape)
    if spatial_dims not in (None, 2, 3):
        raise ValueError(f"{function}(): spatial_dims: expected 2 or 3, got {spatial_dims}")
    dims = spatial_dims or min(len(shape), 3)
    if len(shape) < max(dims, 2):
        expected = "[*batch, H, W]" if dims == 2 else "[*batch, D, H, W] or [H, W]"
        raise ValueError(f"{function}(): expected shape {expected}, got {shape}")
    batch, space = shape[: len(shape) - dims], shape[len(shape) - dims :]
    # Counted, since -1 would not tell how many images an empty array has.
    return mask.reshape(math.prod(batch), *((1,) if dims == 2 else ()), *space), batch, dims


def _spacing(spacing: float | Sequence[float] | None, dims: int) -> list[float]:
    """Three positive numbers for the core, or none."""
    if spacing is None:
        return []
    try:
        step = [float(v) for v in np.broadcast_to(np.asarray(spacing, np.float64), dims)]
    except TypeError:
        raise TypeError(f"edt(): spacing: expected numbers, got {spacing!r}") from None
    except ValueError:
        raise ValueError(f"edt(): spacing: expected one number or {dims}, got {spacing!r}") from None
    if any(not 1e-12 <= v <= 1e12 for v in step):
        shown = ", ".join(f"{v:g}" for v in step)
        raise ValueError(f"edt(): spacing: expected positive numbers (1e-12 to 1e12), got ({shown})")
    # Without a depth its spacing is that of the rows: then equal spacings stay recognisable.
    return [step[0], *step] if dims == 2 else step


def _connectivity(function: str, connectivity: int | None, dims: int) -> int:
    known = {4: 6, 8: 26} if dims == 2 else {6: 6, 18: 18, 26: 26}
    if connectivity is None:
        return 26
    if connectivity not in known:
        expected = "4 or 8 in 2-D" if dims == 2 else "6, 18 or 26 in 3-D"
        raise ValueError(f"{function}(): connectivity: expected {expected}, got {connectivity}")
    return known[connectivity]


def _sizes(labels: Any, count: Any) -> Any:
    most = int(count.max())
    if ops.is_torch(labels):
        sizes = count.new_zeros((len(labels), most))
        for row, label in zip(sizes, labels, strict=True):
            row.copy_(label.flatten().bincount(minlength=most + 1)[1:])
        return sizes
    return np.stack([np.bincount(v.ravel(), minlength=most + 1)[1:] for v in labels])
