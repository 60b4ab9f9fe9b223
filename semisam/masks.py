# SPDX-License-Identifier: Apache-2.0
"""Geometry of masks: Euclidean distances, connected components, and cleaning up with them.

All functions take batches, [N, H, W] or [N, D, H, W], NumPy or torch, and return the caller's kind.
"""

from __future__ import annotations

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
) -> Any:
    """Return the exact Euclidean distance of every foreground voxel to the nearest background voxel.

    `mask` is [N, H, W] or [N, D, H, W], bool or uint8, nonzero = foreground, sides up to 16384;
    `spacing` is one number or one per spatial dimension in the same order, in any unit (1 by
    default). The result is float32, shaped like the mask, in that unit, 0 in the background.

        d(p) = min over background voxels q of sqrt(sum_k (spacing_k (p_k - q_k))^2)

    With `squared` the root is left out. With `border` everything outside the image is background. An
    image without any background has distances +inf. With `return_indices` the result is
    (distance, index): index, int64 and shaped like the mask, is the position of that nearest voxel
    in its flattened image (`np.unravel_index` gives coordinates), of equally near ones the first in
    C order, and -1 where the outside is as near or nothing is there.

    Equal spacings are computed in integers: squares in voxels are exact (below 2^24, where float32
    stops having all integers). With other spacings float32 rounding may add a relative error of
    1.8e-7 to the squares and decides between voxels whose distances differ by less than that.

    Raises ValueError for a mask without 3 or 4 dimensions and for a spacing that is not positive
    (1e-12 to 1e12) or has another number of dimensions; TypeError for a mask of another dtype.
    Paper: the separable form is that of Saito and Toriwaki, Pattern Recognition 27 (1994).

    >>> import numpy as np
    >>> from semisam import masks
    >>> masks.edt(np.array([[[0, 1, 1, 1, 0]]], np.uint8))[0, 0].tolist()
    [0.0, 1.0, 2.0, 1.0, 0.0]
    """
    flat = _is_flat("edt", mask)
    step = _spacing(spacing, 2 if flat else 3)
    around = (2 if flat else 1) if border else 0
    image = mask[:, None] if flat else mask
    distance, index = ops.call("edt", image, step, around, int(bool(squared)), int(bool(return_indices)))
    distance = distance[:, 0] if flat else distance
    if not return_indices:
        return distance
    return distance, (index[0, :, 0] if flat else index[0])


def components(
    image: Any, connectivity: int | None = None, *, by_value: bool = False, return_sizes: bool = False
) -> Components:
    """Return the connected components of the nonzero voxels of every image of a batch.

    `image` is [N, H, W] or [N, D, H, W], bool or any integer dtype. `connectivity` is 4 or 8 in 2-D and
    6, 18 or 26 in 3-D (default: 8 or 26). With `by_value` only voxels of equal value connect, so
    that every class of a label image falls into its own components.

    The result is (labels, count, sizes): `labels` int32 like the image, 0 in the background, 1 to
    count[n] in image n, numbered by their first voxels in C order; `count` int64 [N]; `sizes`
    int64 [N, max(count)], the number of voxels of component i at [n, i - 1], 0 beyond count[n], and
    None unless `return_sizes`.

    Raises ValueError for an image without 3 or 4 dimensions, with 2^31 voxels or more, and for
    a connectivity that its dimension does not have; TypeError for a dtype that is not integer.

    >>> import numpy as np
    >>> from semisam import masks
    >>> labels, count, sizes = masks.components(np.array([[[1, 1, 0, 1]]], np.uint8), return_sizes=True)
    >>> labels.tolist(), count.tolist(), sizes.tolist()
    ([[[1, 1, 0, 2]]], [2], [[2, 1]])
    """
    flat = _is_flat("components", image)
    around = _connectivity("components", connectivity, flat)
    labels, count = ops.call("components", image[:, None] if flat else image, around, int(bool(by_value)))
    labels = labels[:, 0] if flat else labels
    return Components(labels, count, _sizes(labels, count) if return_sizes else None)


def largest_component(mask: Any, connectivity: int | None = None) -> Any:
    """Return each image's largest connected component, everything else set to 0.

    `mask` is [N, H, W] or [N, D, H, W], bool or uint8; the result has its shape and dtype, and its
    values where it is kept. `connectivity` as in `components`. Of equally large components the one
    with the first voxel in C order stays; an empty image stays empty. Raises as `components` does.

    >>> import numpy as np
    >>> from semisam import masks
    >>> masks.largest_component(np.array([[[1, 1, 0, 1]]], np.uint8)).tolist()
    [[[1, 1, 0, 0]]]
    """
    return _keep("largest_component", mask, 0, connectivity)


def remove_small(mask: Any, min_size: int, connectivity: int | None = None) -> Any:
    """Return the mask without its connected components of fewer than `min_size` voxels.

    `mask` and result are as in `largest_component`, `connectivity` as in `components`. Raises
    ValueError for a `min_size` below 1, TypeError for one that is no integer, and otherwise as
    `components` does.

    >>> import numpy as np
    >>> from semisam import masks
    >>> masks.remove_small(np.array([[[1, 1, 0, 1]]], np.uint8), 2).tolist()
    [[[1, 1, 0, 0]]]
    """
    if not isinstance(min_size, (int, np.integer)) or isinstance(min_size, bool):
        raise TypeError(f"remove_small(): min_size: expected an integer, got {type(min_size).__name__}")
    if min_size < 1:
        raise ValueError(f"remove_small(): min_size: expected at least 1 voxel, got {min_size}")
    return _keep("remove_small", mask, int(min_size), connectivity)


def _keep(function: str, mask: Any, min_size: int, connectivity: int | None) -> Any:
    flat = _is_flat(function, mask)
    around = _connectivity(function, connectivity, flat)
    # More than all voxels is more than any component has; the core counts in what a double can hold.
    out = ops.call("keep_components", mask[:, None] if flat else mask, around, min(min_size, 2**53))
    return out[:, 0] if flat else out


def _is_flat(function: str, mask: Any) -> bool:
    shape = tuple(np.shape(mask))
    if not hasattr(mask, "dtype"):
        raise TypeError(f"{function}(): expected a NumPy array or torch tensor, got {type(mask).__name__}")
    if len(shape) not in (3, 4):
        raise ValueError(
            f"{function}(): expected shape (N, H, W) or (N, D, H, W), got {shape}; "
            "add the batch dimension of a single image with [None]"
        )
    return len(shape) == 3


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


def _connectivity(function: str, connectivity: int | None, flat: bool) -> int:
    known = {4: 6, 8: 26} if flat else {6: 6, 18: 18, 26: 26}
    if connectivity is None:
        return 26
    if connectivity not in known:
        expected = "4 or 8 for (N, H, W)" if flat else "6, 18 or 26 for (N, D, H, W)"
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
