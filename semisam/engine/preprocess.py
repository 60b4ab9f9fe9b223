# SPDX-License-Identifier: Apache-2.0
"""Bring a scan to what the network sees, and probabilities back to the scan's grid."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from semisam.engine.config import Config
from semisam.engine.scans import CaseError, Volume, times

__all__ = ["Prepared", "Preprocessing", "resized"]

Array = np.ndarray[Any, Any]
NORMALIZE = ("zscore", "minmax", "none")


@dataclass(frozen=True)
class Prepared:
    """A scan as the network sees it, and what it was before."""

    image: Array  # [channels, *S'] float32
    spacing: tuple[float, ...] | None  # mm per axis of S'
    original_shape: tuple[int, ...]  # S
    original_spacing: tuple[float, ...] | None

    @property
    def shape(self) -> tuple[int, ...]:
        """S', the grid of the network's patches."""
        return tuple(self.image.shape[1:])


@dataclass(frozen=True)
class Preprocessing:
    """Resample (optional), then normalise a scan; nothing here looks at a label's values.

    `spacing` (mm per axis) resamples images linearly and labels by nearest neighbour, voxel centres kept in
    place; None leaves the grid. `normalize`: "zscore" (x - mean)/sd, "minmax" (x - min)/(max - min), both per
    scan and channel over all its voxels, or "none". `size` (2-D) resizes by nearest neighbour to a
    fixed size, as SC-SAM does. With `spatial_dims` 2 a volume [channels, n, H, W] is a stack of slices along
    its first axis: each is normalised and resized by itself, as training sees it.

    Raises ValueError for wrong options. Paper: Zhang et al., arXiv 2502.20749.

    >>> import numpy as np
    >>> from semisam.engine.cases import Volume
    >>> from semisam.engine.preprocess import Preprocessing
    >>> steps = Preprocessing(spacing=(1.0, 1.0, 1.0))
    >>> scan = Volume(np.random.default_rng(0).random((1, 8, 8, 4), np.float32), (1.0, 1.0, 2.0))
    >>> ready = steps.prepare(scan)
    >>> ready.image.shape, abs(ready.image.mean().item()) < 1e-6
    ((1, 8, 8, 8), True)
    >>> steps.restore(np.zeros((2, 8, 8, 8), np.float32), ready).shape
    (2, 8, 8, 4)
    """

    spacing: tuple[float, ...] | None = None
    normalize: str = "zscore"
    size: tuple[int, ...] | None = None
    spatial_dims: int = 3

    def __post_init__(self) -> None:
        if self.normalize not in NORMALIZE:
            raise ValueError(f"normalize: expected {', '.join(NORMALIZE)}, got {self.normalize!r}")
        if self.spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims: expected 2 or 3, got {self.spatial_dims}")
        for name, wanted in (("spacing", self.spacing), ("size", self.size)):
            if wanted is not None and (len(wanted) != self.spatial_dims or not all(v > 0 for v in wanted)):
                raise ValueError(f"{name}: expected {self.spatial_dims} numbers > 0, got {list(wanted)}")
        if self.size is not None and self.spacing is not None:
            raise ValueError("spacing: 2-D images are resized to the patch size; leave data.spacing empty")

    @classmethod
    def of(cls, config: Config, spatial_dims: int) -> Preprocessing:
        """The preprocessing of a run: 2-D images are resized to its patch size.

        >>> from semisam.engine.config import Config
        >>> from semisam.engine.preprocess import Preprocessing
        >>> Preprocessing.of(Config(), 3)
        Preprocessing(spacing=None, normalize='zscore', size=None, spatial_dims=3)
        """
        spacing = None if config.data.spacing is None else tuple(map(float, config.data.spacing))
        size = tuple(config.train.patch_size) if spatial_dims == 2 else None
        return cls(spacing, config.data.normalize, size, spatial_dims)

    def prepare(self, volume: Volume) -> Prepared:
        """Return the scan as the network sees it: float32 [channels, *S'].

        A constant scan becomes zeros, with a warning. Raises CaseError if resampling is asked for
        and the scan's spacing is unknown, and ValueError for a scan with another number of axes.

        >>> import numpy as np
        >>> from semisam.engine.cases import Volume
        >>> from semisam.engine.preprocess import Preprocessing
        >>> scan = Volume(np.arange(8, dtype=np.float32).reshape(1, 2, 2, 2), None)
        >>> Preprocessing(normalize="minmax").prepare(scan).image.max().item()
        1.0
        """
        array = np.asarray(volume.array, np.float32)
        axes = array.ndim - 1
        if axes != self.spatial_dims and not (axes == 3 and self.spatial_dims == 2):
            raise ValueError(f"volume: expected {self.spatial_dims} spatial axes, got {axes}")
        shape = array.shape[1:]
        target, spacing = self.grid(shape, volume.spacing)
        array = resized(array, target, 0 if self.size else 1)
        slices = 1 if axes > self.spatial_dims else 0
        return Prepared(_normalized(array, self.normalize, slices), spacing, tuple(shape), volume.spacing)

    def prepare_label(self, label: Array, prepared: Prepared) -> Array:
        """Return a label [*S] on the grid of `prepared`, uint8 [*S'], by nearest neighbour.

        Raises CaseError if the label has another shape than the scan.

        >>> import numpy as np
        >>> from semisam.engine.cases import Volume
        >>> from semisam.engine.preprocess import Preprocessing
        >>> steps = Preprocessing(spacing=(1.0, 1.0, 1.0))
        >>> ready = steps.prepare(Volume(np.eye(4, dtype=np.float32)[None, None], (1.0, 2.0, 2.0)))
        >>> steps.prepare_label(np.ones((1, 4, 4), np.uint8), ready).shape
        (1, 8, 8)
        """
        if tuple(label.shape) != prepared.original_shape:
            raise CaseError(f"image is {times(prepared.original_shape)}, label {times(label.shape)}")
        return np.ascontiguousarray(resized(label[None], prepared.shape, 0)[0], np.uint8)

    def restore(self, prob: Array, prepared: Prepared) -> Array:
        """Return probabilities [C, *S'] on the scan's own grid, [C, *S] float32.

        Linear interpolation, which keeps sums over C; the same array if the grid was left alone.

        >>> import numpy as np
        >>> from semisam.engine.cases import Volume
        >>> from semisam.engine.preprocess import Preprocessing
        >>> ready = Preprocessing().prepare(Volume(np.eye(4, dtype=np.float32)[None, None], None))
        >>> Preprocessing().restore(np.ones((2, 1, 4, 4), np.float32), ready).shape
        (2, 1, 4, 4)
        """
        prob = np.asarray(prob, np.float32)
        if prob.shape[1:] != prepared.shape:
            raise ValueError(f"prob: expected [C, {times(prepared.shape)}], got {times(prob.shape)}")
        return resized(prob, prepared.original_shape, 1)

    def grid(
        self, shape: Sequence[int], spacing: tuple[float, ...] | None
    ) -> tuple[tuple[int, ...], tuple[float, ...] | None]:
        """Return the shape and spacing that a scan of this shape and spacing is brought to.

        >>> from semisam.engine.preprocess import Preprocessing
        >>> Preprocessing(spacing=(1.0, 1.0, 1.0)).grid((8, 8, 4), (1.0, 1.0, 2.0))
        ((8, 8, 8), (1.0, 1.0, 1.0))
        """
        lead = len(shape) - self.spatial_dims
        if self.size is not None:
            target = (*shape[:lead], *map(int, self.size))
        elif self.spacing is not None:
            if spacing is None:
                raise CaseError(
                    "data.spacing asks for resampling, but the files do not say their spacing: leave it empty"
                )
            new = (*spacing[:lead], *self.spacing)
            target = tuple(max(1, round(n * s / t)) for n, s, t in zip(shape, spacing, new, strict=True))
        else:
            target = tuple(shape)
        if spacing is None:
            return target, None
        return target, tuple(s * n / m for s, n, m in zip(spacing, shape, target, strict=True))


def resized(array: Array, shape: Sequence[int], order: int) -> Array:
    """Return [channels, *S] on another grid over the same extent; voxels are cells, not points.

    `order` 0 takes the nearest neighbour, 1 interpolates linearly.

    >>> import numpy as np
    >>> from semisam.engine.preprocess import resized
    >>> resized(np.array([[[0.0, 1.0]]]), (1, 4), 0).tolist()
    [[[0.0, 0.0, 1.0, 1.0]]]
    """
    if array.shape[1:] == tuple(shape):
        return array
    from scipy import ndimage  # noqa: PLC0415

    out = np.empty((len(array), *shape), array.dtype)
    factors = [m / n for m, n in zip(shape, array.shape[1:], strict=True)]
    for channel, result in zip(array, out, strict=True):
        ndimage.zoom(channel, factors, output=result, order=order, mode="nearest", grid_mode=True)
    return out


def _normalized(array: Array, how: str, slices: int) -> Array:
    """Per channel, and per slice of axis 1 if `slices`; statistics in float64."""
    if how == "none":
        return np.ascontiguousarray(array, np.float32)
    axes = tuple(range(1 + slices, array.ndim))
    if how == "zscore":
        offset = array.mean(axes, np.float64, keepdims=True)
        scale = array.std(axes, np.float64, keepdims=True)
    else:
        offset = array.min(axes, keepdims=True).astype(np.float64)
        scale = array.max(axes, keepdims=True) - offset
    constant = array.max(axes, keepdims=True) == array.min(axes, keepdims=True)
    if constant.any():
        part = (
            f"{int(constant.sum())} of {constant.size} slices or channels" if constant.size > 1 else "image"
        )
        warnings.warn(f"constant {part}: every voxel becomes 0", stacklevel=3)
    scale = np.where(constant | ~(scale > 0), math.inf, scale)
    return np.ascontiguousarray((array - offset) / scale, np.float32)
