# SPDX-License-Identifier: Apache-2.0
"""Segmentation metrics per case and class: overlap and surface distances, functions and classes.

Inputs are label maps [B, *S] or [B, 1, *S] of any integer dtype (then `num_classes` is given), or
binary masks per class [B, C, *S], which may overlap (then `num_classes` is left out); S is (H, W) or
(D, H, W). NumPy arrays and torch tensors; results are float64 [B, C'], the same kind of array, C'
without class 0 unless `include_background`. Floating arrays must hold whole numbers: threshold or
argmax first.

**Empty masks.** Both empty: Dice = Jaccard = NSD = 1, distances 0. Exactly one empty: Dice = Jaccard =
NSD = 0 and distances NaN, so that a failure is counted (`failed`, `get_not_nans`) and never averaged
as a perfect 0; `empty="diagonal"` puts the image diagonal there instead.

**Definitions.** One case can have a 95 % Hausdorff distance of 17, 49 or 51 depending on who is
asked; so the definition is an argument:

- `"pooled"`: surfaces are the mask's voxels with a face neighbour outside; percentile of the pooled
  distances of both directions; symmetric average: mean of both directions' means. (medpy's.)
- `"monai"`: the same surfaces; larger of both directions' percentiles; symmetric average: mean of
  the pooled distances.
- `"deepmind"`: surfaces are the marching-cubes elements between voxels, weighted by their area;
  larger of both directions' weighted percentiles; symmetric average: mean of both directions' means.

Distances count voxels, or units of `spacing` if it is given. They are distances between surfaces: a
published script that hands whole arrays to a point-set routine compares image rows as vectors
instead, and gives a square shifted by 20 rows the distance 0; its figures compare with nothing.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from semisam import ops

__all__ = [
    "DiceMetric",
    "HausdorffDistanceMetric",
    "SurfaceDiceMetric",
    "SurfaceDistanceMetric",
    "average_surface_distance",
    "compute_all",
    "dice",
    "evaluate_case",
    "hausdorff_distance",
    "hd95",
    "jaccard",
    "normalized_surface_dice",
    "surface_element_areas",
]

Float = NDArray[np.float64]

_DEFINITIONS = ("pooled", "monai", "deepmind")
# Columns of the operator `surface_metrics`; a: prediction to reference, g: the other way.
_WEIGHT, _MEAN, _MAX, _PERCENTILE, _POOLED, _NEAR = 0, 2, 4, 6, 8, 9


# ---- inputs -------------------------------------------------------------------------------------


class _Pair(NamedTuple):
    """Prediction and reference as [B, C, D, H, W] masks or [B, 1, D, H, W] label maps (D = 1 in 2-D)."""

    function: str
    pred: Any
    ref: Any
    labels: bool
    classes: int
    first: int  # of the classes that are reported
    dims: int
    ignore: int | None

    @property
    def cases(self) -> int:
        return int(self.ref.shape[0])

    @property
    def size(self) -> tuple[int, ...]:
        return tuple(self.ref.shape[5 - self.dims :])

    def like(self, value: Float) -> Any:
        """Return `value` as the caller's kind of array, where the reference is."""
        return sys.modules["torch"].from_numpy(value).to(self.ref.device) if ops.is_torch(self.ref) else value

    def all_like(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return arrays of one shape as `like` does, by one copy: they are double, or whole numbers."""
        if not ops.is_torch(self.ref):
            return values
        torch: Any = sys.modules["torch"]
        table = self.like(np.stack([np.asarray(value, np.float64) for value in values.values()]))
        kinds = [torch.from_numpy(value[:0]).dtype for value in values.values()]
        return {name: table[i].to(kind) for i, (name, kind) in enumerate(zip(values, kinds, strict=True))}


def _pair(
    function: str,
    y_pred: Any,
    y: Any,
    num_classes: int | None,
    include_background: bool,
    ignore_index: int | None,
) -> _Pair:
    for name, a in (("y_pred", y_pred), ("y", y)):
        if not (isinstance(a, np.ndarray) or ops.is_torch(a)):
            raise TypeError(f"{function}(): {name}: expected a NumPy array or torch tensor, got {type(a)}")
    if tuple(y_pred.shape) != tuple(y.shape):
        raise ValueError(
            f"{function}(): y: expected y_pred's shape {tuple(y_pred.shape)}, got {tuple(y.shape)}"
        )
    ops.one_device(function, y_pred=y_pred, y=y)
    shape = tuple(y.shape)
    labels = num_classes is not None
    if num_classes is None:
        if len(shape) not in (4, 5):
            raise ValueError(
                f"{function}(): y: expected masks [B, C, H, W] or [B, C, D, H, W], got {shape}; "
                "for label maps give num_classes"
            )
        if ignore_index is not None:
            raise ValueError(f"{function}(): ignore_index: expected label maps (give num_classes), got masks")
        classes, size = shape[1], shape[2:]
    else:
        if isinstance(num_classes, bool) or not 1 <= num_classes <= 65535:
            raise ValueError(f"{function}(): num_classes: expected 1 to 65535, got {num_classes}")
        classes, size = num_classes, _label_size(function, shape, num_classes)
    channels = 1 if labels else classes
    full = (shape[0], channels, *(1,) * (3 - len(size)), *size)
    pred, ref = (_whole(function, n, a).reshape(full) for n, a in (("y_pred", y_pred), ("y", y)))
    first = 0 if include_background or classes == 1 else 1
    return _Pair(function, pred, ref, labels, classes, first, len(size), ignore_index)


def _label_size(function: str, shape: tuple[int, ...], num_classes: int) -> tuple[int, ...]:
    """Spatial size of label maps; refuses what could as well be one-hot."""
    expected = f"{function}(): y: expected label maps [B, *S] or [B, 1, *S] as num_classes is given"
    if len(shape) == 3:
        return shape[1:]
    if len(shape) in (4, 5) and shape[1] == 1:
        return shape[2:]
    if len(shape) == 4 and shape[1] != num_classes:
        return shape[1:]
    if len(shape) == 4:
        raise ValueError(
            f"{expected}, got {shape}, which could be one-hot; write [B, 1, D, H, W] for volumes, or leave "
            "num_classes out for masks"
        )
    raise ValueError(f"{expected}, got {shape}; leave num_classes out for masks [B, C, *S]")


def _whole(function: str, name: str, a: Any) -> Any:
    """Turn whole numbers in a floating dtype into int32; other dtypes stay."""
    if ops.is_torch(a):
        torch: Any = sys.modules["torch"]
        a = a.detach()
        a = a if type(a) is torch.Tensor else a.as_subclass(torch.Tensor)
        if not a.is_floating_point():
            return a
        whole = a.to(torch.int32)
        same = bool((whole == a).all())
    else:
        if a.dtype.kind != "f":
            return a
        with np.errstate(invalid="ignore"):  # NaN becomes some integer, which differs from it
            whole = a.astype(np.int32)
        same = bool((whole == a).all())
    if not same:
        raise ValueError(
            f"{function}(): {name}: expected labels or masks of whole numbers, got fractions, infinities or "
            "NaN; threshold or argmax first"
        )
    return whole


def _spacing(p: _Pair, spacing: Any) -> Float:
    """[B or 1, 3] from a number, one per axis, or a sequence of those per case."""
    try:
        s = np.asarray(1.0 if spacing is None else spacing, np.float64)
    except (TypeError, ValueError) as e:
        raise TypeError(f"{p.function}(): spacing: expected numbers, got {spacing!r}") from e
    per_case = s.ndim == 2 and s.shape[0] == p.cases and s.shape[1] in (1, p.dims)
    if not (s.ndim == 0 or s.shape == (p.dims,) or per_case):
        raise ValueError(
            f"{p.function}(): spacing: expected a number, {p.dims} numbers, or one such sequence for each "
            f"of {p.cases} cases, got {spacing!r}"
        )
    if not (np.isfinite(s) & (s > 0)).all():
        raise ValueError(f"{p.function}(): spacing: expected positive finite numbers, got {spacing!r}")
    full = np.ones((s.shape[0] if s.ndim == 2 else 1, 3))
    full[:, 3 - p.dims :] = s
    return full


def _thresholds(p: _Pair, class_thresholds: Sequence[float]) -> Float:
    """One tolerance per class; 0 for classes that are not reported."""
    t = np.asarray(class_thresholds, np.float64)
    wanted = p.classes - p.first
    if t.shape != (wanted,):
        raise ValueError(
            f"{p.function}(): class_thresholds: expected {wanted} numbers, one per reported class, "
            f"got {class_thresholds!r}"
        )
    if not (np.isfinite(t) & (t >= 0)).all():
        raise ValueError(
            f"{p.function}(): class_thresholds: expected finite numbers >= 0, got {class_thresholds!r}"
        )
    return np.concatenate([np.zeros(p.first), t])


def _one_of(function: str, name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{function}(): {name}: expected one of {', '.join(choices)}, got {value!r}")


def _percentile(function: str, percentile: float | None) -> float:
    if percentile is None:
        return 100.0
    if not 0 < percentile <= 100:  # NaN, too; 0 would be a minimum, not a Hausdorff distance
        raise ValueError(
            f"{function}(): percentile: expected a number above 0 and up to 100, or None for the maximum, "
            f"got {percentile!r}"
        )
    return float(percentile)


# ---- overlap ------------------------------------------------------------------------------------


def _numpy(a: Any) -> Any:
    if not ops.is_torch(a):
        return a
    found = a.cpu().numpy()
    if a.device.type != "cpu":
        ops.refuse_faults()  # labels that are no class, which the CPU has refused by now
    return found


def _counted(p: _Pair) -> Any:
    """|A|, |G| and |A & G| per case and reported class, where the arrays are: nothing waits for them."""
    n = 1 if p.labels else p.classes
    flat = (p.cases * n, *p.ref.shape[2:])
    ignore = (int(p.ignore is not None), p.ignore or 0)
    counts = ops.call(
        "overlap", p.pred.reshape(flat), p.ref.reshape(flat), p.classes if p.labels else 2, *ignore
    )
    table = counts if p.labels else counts[:, 1].reshape(p.cases, p.classes, 3)
    return table[:, p.first :]


def _counts(p: _Pair) -> NDArray[np.int64]:
    return np.asarray(_numpy(_counted(p)))


def _without_ignored(p: _Pair, value: Float) -> Float:
    """The ignored class has no voxels of its own: NaN, not a score."""
    if p.ignore is not None and p.first <= p.ignore < p.classes:
        value[:, p.ignore - p.first] = np.nan
    return value


def _dice(p: _Pair, counts: NDArray[np.int64], ignore_empty: bool = False) -> Float:
    both = counts[..., 0] + counts[..., 1]
    value = np.where(both > 0, 2.0 * counts[..., 2] / np.maximum(both, 1), 1.0)
    if ignore_empty:
        value[counts[..., 1] == 0] = np.nan
    return _without_ignored(p, value)


def _jaccard(p: _Pair, counts: NDArray[np.int64], ignore_empty: bool = False) -> Float:
    union = counts[..., 0] + counts[..., 1] - counts[..., 2]
    value = np.where(union > 0, counts[..., 2] / np.maximum(union, 1), 1.0)
    if ignore_empty:
        value[counts[..., 1] == 0] = np.nan
    return _without_ignored(p, value)


def dice(
    y_pred: Any,
    y: Any,
    include_background: bool = True,
    ignore_empty: bool = False,
    num_classes: int | None = None,
    ignore_index: int | None = None,
) -> Any:
    """Return the Dice coefficient of every case and class, [B, C'].

        D = 2 |A & G| / (|A| + |G|),   1 if both are empty

    `ignore_empty` gives NaN where the reference is empty (MONAI's default). Voxels whose reference
    has the label `ignore_index` count nowhere. See the module for shapes.

    Raises TypeError for what is not an array, ValueError for shapes that differ and for labels that
    are no class. Paper: Dice, Ecology 26 (1945).

    >>> import numpy as np
    >>> from semisam import metrics
    >>> a, b = np.array([[[1, 1, 0, 2]]]), np.array([[[1, 0, 0, 2]]])
    >>> metrics.dice(a, b, num_classes=3, include_background=False).round(3).tolist()
    [[0.667, 1.0]]
    """
    p = _pair("dice", y_pred, y, num_classes, include_background, ignore_index)
    return p.like(_dice(p, _counts(p), ignore_empty))


def jaccard(
    y_pred: Any,
    y: Any,
    include_background: bool = True,
    ignore_empty: bool = False,
    num_classes: int | None = None,
    ignore_index: int | None = None,
) -> Any:
    """Return the Jaccard index (intersection over union) of every case and class, [B, C'].

        J = |A & G| / |A | G| = D / (2 - D),   1 if both are empty

    Arguments and errors are those of `dice`. Paper: Jaccard, New Phytologist 11 (1912).

    >>> import numpy as np
    >>> from semisam import metrics
    >>> a, b = np.array([[[1, 1, 0, 2]]]), np.array([[[1, 0, 0, 2]]])
    >>> metrics.jaccard(a, b, num_classes=3, include_background=False).tolist()
    [[0.5, 1.0]]
    """
    p = _pair("jaccard", y_pred, y, num_classes, include_background, ignore_index)
    return p.like(_jaccard(p, _counts(p), ignore_empty))


# ---- surface distances --------------------------------------------------------------------------


class _Surfaces(NamedTuple):
    """Statistics of both directions, [B, C', 11], and the rules to read them by."""

    pair: _Pair
    stats: Float
    definition: str
    fill: Float  # [B, 1]: what stands for the distance to an empty mask

    def _with_empties(self, value: Float) -> Float:
        a, g = self.stats[..., _WEIGHT] > 0, self.stats[..., _WEIGHT + 1] > 0
        value = np.where(a & g, value, np.where(a | g, self.fill, 0.0))
        return _without_ignored(self.pair, value)

    def hausdorff(self, percentile: float | None, directed: bool) -> Float:
        both = self.stats[..., _MAX : _MAX + 2]
        if percentile is not None:
            both = self.stats[..., _PERCENTILE : _PERCENTILE + 2]
        if directed:
            return self._with_empties(both[..., 0])
        if percentile is not None and self.definition == "pooled":
            return self._with_empties(self.stats[..., _POOLED])
        return self._with_empties(both.max(-1))

    def average(self, symmetric: bool) -> Float:
        mean = self.stats[..., _MEAN : _MEAN + 2]
        if not symmetric:
            return self._with_empties(mean[..., 0])
        if self.definition != "monai":
            return self._with_empties(mean.mean(-1))
        weight = self.stats[..., _WEIGHT : _WEIGHT + 2]
        return self._with_empties((mean * weight).sum(-1) / np.maximum(weight.sum(-1), 1.0))

    def surface_dice(self) -> Float:
        total = self.stats[..., _WEIGHT : _WEIGHT + 2].sum(-1)
        near = np.nan_to_num(self.stats[..., _NEAR : _NEAR + 2]).sum(-1)
        value = np.where(total > 0, near / np.where(total > 0, total, 1.0), 1.0)
        return _without_ignored(self.pair, value)

    def failed(self) -> NDArray[np.bool_]:
        weight = self.stats[..., _WEIGHT : _WEIGHT + 2]
        return np.asarray((weight > 0).sum(-1) == 1)


def _surfaces(
    p: _Pair, spacing: Any, definition: str, empty: str, percentile: float, tolerance: Float | None = None
) -> _Surfaces:
    _one_of(p.function, "definition", definition, _DEFINITIONS)
    _one_of(p.function, "empty", empty, ("nan", "diagonal"))
    s = _spacing(p, spacing)
    fill = np.full((p.cases, 1), np.nan)
    if empty == "diagonal":
        fill[:] = np.sqrt(((s[:, 3 - p.dims :] * p.size) ** 2).sum(-1, keepdims=True))
    if definition == "deepmind" and len(s) > 1:
        stats = _join(
            "concatenate",
            [
                _stats(p, slice(b, b + 1), s[b : b + 1], definition, percentile, tolerance)
                for b in range(len(s))
            ],
            0,
        )
    else:
        stats = _stats(p, slice(None), s, definition, percentile, tolerance)
    return _Surfaces(p, np.asarray(_numpy(stats)), definition, fill)


def _join(how: str, parts: Sequence[Any], axis: int) -> Any:
    library = sys.modules["torch"] if ops.is_torch(parts[0]) else np
    return getattr(library, how)(parts, axis)


def _stats(
    p: _Pair, cases: slice, spacing: Float, definition: str, percentile: float, tolerance: Float | None
) -> Any:
    """The operator's table of reported classes, where the arrays are: nothing waits for it."""
    areas = None
    if definition == "deepmind":
        table = surface_element_areas(tuple(spacing[0, 3 - p.dims :]))
        areas = p.like(np.pad(table, (0, 256 - len(table))))
    ignore = (int(p.ignore is not None), p.ignore or 0)

    def run(channel: int, classes: int, first: int, near: Sequence[float]) -> Any:
        a, g = p.pred[cases, channel], p.ref[cases, channel]
        numbers = [float(v) for v in spacing.ravel()]
        return ops.call(
            "surface_metrics", a, g, areas, classes, first, p.dims, *ignore, percentile, numbers, near
        )

    if p.labels:
        near = [] if tolerance is None else [float(t) for t in tolerance]
        return run(0, p.classes, p.first, near)[:, p.first :]
    parts = []
    for c in range(p.first, p.classes):
        near = [] if tolerance is None else [0.0, float(tolerance[c])]
        parts.append(run(c, 2, 1, near)[:, 1])
    return _join("stack", parts, 1)


def hausdorff_distance(
    y_pred: Any,
    y: Any,
    include_background: bool = False,
    distance_metric: str = "euclidean",
    percentile: float | None = None,
    directed: bool = False,
    spacing: Any = None,
    *,
    num_classes: int | None = None,
    ignore_index: int | None = None,
    definition: str = "pooled",
    empty: str = "nan",
) -> Any:
    """Return the Hausdorff distance between surfaces of every case and class, [B, C'].

        max of d(A -> G) and d(G -> A); with `percentile`, that percentile instead of the maximum

    `directed` takes d(A -> G) alone, from prediction to reference. `spacing` is a number, one number
    per axis, or a sequence of those per case; distances come in its unit. `definition` ("pooled",
    "monai", "deepmind") and `empty` ("nan", "diagonal": the length of the image's diagonal in the unit
    of spacing) are explained in the module.

    Raises ValueError for shapes that differ, labels that are no class, spacing that is not positive
    and finite, and unknown choices. Paper: Huttenlocher et al., IEEE TPAMI 15 (1993).

    >>> import numpy as np
    >>> from semisam import metrics
    >>> y = np.zeros((1, 20, 20), np.uint8)
    >>> y[:, 2:8, 2:8] = 1
    >>> metrics.hausdorff_distance(np.roll(y, 5, 1), y, spacing=0.5, num_classes=2).tolist()
    [[2.5]]
    """
    name = "hausdorff_distance"
    _one_of(name, "distance_metric", distance_metric, ("euclidean",))
    p = _pair(name, y_pred, y, num_classes, include_background, ignore_index)
    s = _surfaces(p, spacing, definition, empty, _percentile(name, percentile))
    return p.like(s.hausdorff(percentile, directed))


def hd95(
    y_pred: Any,
    y: Any,
    include_background: bool = False,
    spacing: Any = None,
    *,
    num_classes: int | None = None,
    ignore_index: int | None = None,
    definition: str = "pooled",
    empty: str = "nan",
) -> Any:
    """Return the 95th percentile Hausdorff distance of every case and class, [B, C'].

    It is `hausdorff_distance(..., percentile=95)`, and so are its arguments and errors.

    >>> import numpy as np
    >>> from semisam import metrics
    >>> y = np.zeros((1, 20, 20), np.uint8)
    >>> y[:, 2:8, 2:8] = 1
    >>> metrics.hd95(np.roll(y, 5, 1), y, num_classes=2).tolist()
    [[5.0]]
    """
    p = _pair("hd95", y_pred, y, num_classes, include_background, ignore_index)
    return p.like(_surfaces(p, spacing, definition, empty, 95.0).hausdorff(95.0, directed=False))


def average_surface_distance(
    y_pred: Any,
    y: Any,
    include_background: bool = False,
    symmetric: bool = False,
    distance_metric: str = "euclidean",
    spacing: Any = None,
    *,
    num_classes: int | None = None,
    ignore_index: int | None = None,
    definition: str = "pooled",
    empty: str = "nan",
) -> Any:
    """Return the average surface distance of every case and class, [B, C'].

        ASD = mean of d(A -> G), from prediction to reference
        ASSD (`symmetric`) = (mean of d(A -> G) + mean of d(G -> A)) / 2

    With definition="monai" the symmetric average is the mean of both lists together. Arguments and
    errors are those of `hausdorff_distance`. Paper: Heimann et al., IEEE TMI 28 (2009).

    >>> import numpy as np
    >>> from semisam import metrics
    >>> y = np.zeros((1, 8, 8), np.uint8)
    >>> y[:, 2, 2:6] = 1
    >>> metrics.average_surface_distance(np.roll(y, 3, 1), y, num_classes=2).tolist()
    [[3.0]]
    """
    name = "average_surface_distance"
    _one_of(name, "distance_metric", distance_metric, ("euclidean",))
    p = _pair(name, y_pred, y, num_classes, include_background, ignore_index)
    return p.like(_surfaces(p, spacing, definition, empty, 100.0).average(symmetric))


def normalized_surface_dice(
    y_pred: Any,
    y: Any,
    class_thresholds: Sequence[float],
    include_background: bool = False,
    distance_metric: str = "euclidean",
    spacing: Any = None,
    *,
    num_classes: int | None = None,
    ignore_index: int | None = None,
    definition: str = "pooled",
) -> Any:
    """Return the surface Dice at a tolerance of every case and class, [B, C'].

        NSD = (|{a in A' : d <= t}| + |{g in G' : d <= t}|) / (|A'| + |G'|)

    A' and G' are the surfaces, counted in voxels, or in area with definition="deepmind";
    `class_thresholds` has one tolerance t per reported class in the unit of `spacing`. Distances and
    tolerances are compared in float32, so that three voxels of 0.1 are within 0.3. Other arguments
    and errors are those of `hausdorff_distance`. Paper: Nikolov et al., arXiv 1809.04430.

    >>> import numpy as np
    >>> from semisam import metrics
    >>> y = np.zeros((1, 8, 8), np.uint8)
    >>> y[:, 2, 2:6] = 1
    >>> moved = np.roll(y, 1, 1)
    >>> [metrics.normalized_surface_dice(moved, y, [t], num_classes=2).item() for t in (0.5, 1.0)]
    [0.0, 1.0]
    """
    name = "normalized_surface_dice"
    _one_of(name, "distance_metric", distance_metric, ("euclidean",))
    p = _pair(name, y_pred, y, num_classes, include_background, ignore_index)
    s = _surfaces(p, spacing, definition, "nan", 100.0, _thresholds(p, class_thresholds))
    return p.like(s.surface_dice())


# ---- everything at once -------------------------------------------------------------------------


def compute_all(
    y_pred: Any,
    y: Any,
    num_classes: int | None = None,
    spacing: Any = None,
    include_background: bool = False,
    class_thresholds: Sequence[float] | None = None,
    *,
    ignore_index: int | None = None,
    definition: str = "pooled",
    empty: str = "nan",
) -> dict[str, Any]:
    """Return all metrics of every case and class from one pass over voxels and one over surfaces.

    The keys are dice, jaccard, hd, hd95, asd, assd, nsd (if `class_thresholds` is given), voxels_pred,
    voxels_ref and failed (exactly one mask empty); each value is [B, C']. Arguments, definitions and
    errors are those of `hausdorff_distance` and `normalized_surface_dice`.

    >>> import numpy as np
    >>> from semisam import metrics
    >>> y = np.zeros((1, 20, 20), np.uint8)
    >>> y[:, 2:8, 2:8] = 1
    >>> {k: v.item() for k, v in metrics.compute_all(np.roll(y, 3, 1), y, 2).items() if k in ("dice", "hd95")}
    {'dice': 0.5, 'hd95': 3.0}
    """
    p, values = _measured(
        *(y_pred, y, num_classes, spacing, include_background, class_thresholds),
        ignore_index=ignore_index,
        definition=definition,
        empty=empty,
    )
    return p.all_like(values)


def _measured(
    y_pred: Any,
    y: Any,
    num_classes: int | None = None,
    spacing: Any = None,
    include_background: bool = False,
    class_thresholds: Sequence[float] | None = None,
    *,
    ignore_index: int | None = None,
    definition: str = "pooled",
    empty: str = "nan",
) -> tuple[_Pair, dict[str, Any]]:
    """What `compute_all` returns, as NumPy arrays; both operators run before either is waited for."""
    p = _pair("compute_all", y_pred, y, num_classes, include_background, ignore_index)
    near = None if class_thresholds is None else _thresholds(p, class_thresholds)
    counted = _counted(p)
    s = _surfaces(p, spacing, definition, empty, 95.0, near)
    counts = np.asarray(_numpy(counted))
    values: dict[str, Any] = {
        "dice": _dice(p, counts),
        "jaccard": _jaccard(p, counts),
        "hd": s.hausdorff(None, directed=False),
        "hd95": s.hausdorff(95.0, directed=False),
        "asd": s.average(symmetric=False),
        "assd": s.average(symmetric=True),
    }
    if near is not None:
        values["nsd"] = s.surface_dice()
    values["voxels_pred"] = np.ascontiguousarray(counts[..., 0])
    values["voxels_ref"] = np.ascontiguousarray(counts[..., 1])
    values["failed"] = s.failed()
    return p, values


def evaluate_case(
    y_pred: Any,
    y: Any,
    num_classes: int,
    spacing: Any = None,
    class_thresholds: Sequence[float] | None = None,
    **options: Any,
) -> dict[int, dict[str, float]]:
    """Return {class: {metric: value}} of one case, label maps [D, H, W] or [H, W] without a batch.

    `options` are those of `compute_all`, which see for metrics and errors; counts and `failed` are
    numbers, too.

    >>> import numpy as np
    >>> from semisam import metrics
    >>> y = np.zeros((20, 20), np.uint8)
    >>> y[2:8, 2:8] = 1
    >>> metrics.evaluate_case(np.roll(y, 3, 0), y, 2)[1]["assd"]
    1.5
    """
    for name, a in (("y_pred", y_pred), ("y", y)):
        if len(getattr(a, "shape", ())) not in (2, 3):
            raise ValueError(
                f"evaluate_case(): {name}: expected a label map [D, H, W] or [H, W], "
                f"got {getattr(a, 'shape', type(a))}"
            )
    _, values = _measured(
        y_pred[None, None], y[None, None], num_classes, spacing, class_thresholds=class_thresholds, **options
    )
    shown = next(iter(values.values())).shape[1]
    return {
        num_classes - shown + c: {name: value[0, c].item() for name, value in values.items()}
        for c in range(shown)
    }


# ---- areas of surface elements ------------------------------------------------------------------

_Point = tuple[float, ...]


@functools.cache
def _element_normals(dims: int) -> list[Float]:
    """For each code the area vectors (half cross products) of its polygons at unit spacing.

    Corners are numbered in memory order; the first is the highest bit of the code.
    """
    corners = list(itertools.product((0, 1), repeat=dims))
    codes = 1 << len(corners)
    normals: list[Float] = []
    for code in range(codes):
        # A code and its complement have the same surface; the smaller set is taken as inside.
        few = code if 2 * code.bit_count() <= len(corners) else codes - 1 - code
        inside = {c for i, c in enumerate(corners) if few >> (len(corners) - 1 - i) & 1}
        segments = [s for face in _faces(dims) for s in _face_segments(face, inside)]
        if dims == 2:
            vectors = [np.subtract(a, b) for a, b in segments]
        else:
            vectors = [v for polygon in _polygons(segments) for v in _flattest(tuple(polygon))]
        normals.append(np.array(vectors, np.float64).reshape(-1, dims))
    return normals


def _faces(dims: int) -> list[list[_Point]]:
    """The corners of every square face, in circular order; in 2-D there is one face."""
    circle = ((0, 0), (0, 1), (1, 1), (1, 0))
    if dims == 2:
        return [list(circle)]
    return [
        [(*c[:axis], side, *c[axis:]) for c in circle] for axis, side in itertools.product(range(3), (0, 1))
    ]


def _face_segments(face: list[_Point], inside: set[Any]) -> list[tuple[_Point, _Point]]:
    """Where the surface crosses a face: lines between edge midpoints, cutting off inside corners.

    Two inside corners across a diagonal are cut off separately.
    """

    def middle(i: int) -> _Point:
        return tuple((a + b) / 2 for a, b in zip(face[i % 4], face[(i + 1) % 4], strict=True))

    crossed = [i for i in range(4) if (face[i] in inside) != (face[(i + 1) % 4] in inside)]
    if len(crossed) == 4:
        return [(middle(i - 1), middle(i)) for i in range(4) if face[i] in inside]
    return [(middle(crossed[0]), middle(crossed[1]))] if crossed else []


def _polygons(segments: list[tuple[_Point, _Point]]) -> list[list[_Point]]:
    """Join segments, of which two meet at every point, into closed polygons."""
    left = list(segments)
    polygons = []
    while left:
        polygon = list(left.pop())
        while polygon[0] != polygon[-1]:
            i = next(i for i, s in enumerate(left) if polygon[-1] in s)
            a, b = left.pop(i)
            polygon.append(b if a == polygon[-1] else a)
        polygons.append(polygon[:-1])
    return polygons


@functools.cache
def _flattest(polygon: tuple[_Point, ...]) -> list[Float]:
    """Area vectors of the triangulation that keeps planar parts whole: the one of largest area."""
    if len(polygon) < 3:
        return []
    ways = []
    for k in range(1, len(polygon) - 1):
        a, b = np.subtract(polygon[k], polygon[0]), np.subtract(polygon[-1], polygon[0])
        ways.append([np.cross(a, b) / 2, *_flattest(polygon[: k + 1]), *_flattest(polygon[k:])])
    return max(ways, key=lambda way: round(sum(float(np.linalg.norm(v)) for v in way), 9))


def surface_element_areas(spacing: Sequence[float]) -> Float:
    """Return the area of every 2x2x2 neighbourhood's surface, [256], or length of every 2x2 one, [16].

    A code's highest bit is the first voxel in memory order. The surface separates set voxels from
    others through the midpoints of the edges between them, as marching cubes does: set corners that
    meet only across a face or the cube are cut off separately (if more than half are set, the unset
    ones are), and polygons that are not planar are triangulated with the largest area, which keeps
    their planar parts whole. `spacing` has 3 or 2 numbers; areas come in its unit squared.

    Raises ValueError for another number of them. Paper: Lorensen and Cline, SIGGRAPH 1987.

    >>> from semisam import metrics
    >>> float(metrics.surface_element_areas((2.0, 1.0, 1.0))[0b11110000])
    1.0
    """
    if len(spacing) not in (2, 3):
        raise ValueError(f"surface_element_areas(): spacing: expected 2 or 3 numbers, got {spacing!r}")
    s = np.asarray(spacing, np.float64)
    scale = math.prod(spacing) / s if len(s) == 3 else s  # an area vector scales with the other axes
    return np.array([np.linalg.norm(v * scale, axis=-1).sum() for v in _element_normals(len(s))])


# ---- cumulative classes -------------------------------------------------------------------------

_REDUCTIONS = ("none", "mean", "sum", "mean_batch", "sum_batch", "mean_channel", "sum_channel")


def _mean_of_valid(value: Float, valid: NDArray[np.bool_], axis: int) -> tuple[Float, Float]:
    n = valid.sum(axis).astype(np.float64)
    total = np.where(valid, value, 0.0).sum(axis)
    return np.where(n > 0, total / np.maximum(n, 1.0), 0.0), n


def _reduce(value: Float, reduction: str) -> tuple[Float, Float]:
    """MONAI's reductions of [B, C] over values that are not NaN, and how many those are."""
    valid = ~np.isnan(value)
    kept = np.where(valid, value, 0.0)
    if reduction == "none":
        return value, valid.astype(np.float64)
    if reduction == "mean":  # of classes first, then of the cases that have any
        per_case, n = _mean_of_valid(value, valid, 1)
        return _mean_of_valid(per_case, n > 0, 0)
    if reduction == "sum":
        return np.asarray(kept.sum()), np.asarray(valid.sum(), np.float64)
    axis = 0 if reduction.endswith("batch") else 1
    if reduction.startswith("mean"):
        return _mean_of_valid(value, valid, axis)
    return kept.sum(axis), valid.sum(axis).astype(np.float64)


class _Cumulative:
    """Collects [B, C'] per call; MONAI's `metric(y_pred=, y=)`, `aggregate()`, `reset()`.

    It knows the cases of its own process: gather `get_buffer()` to aggregate over several.
    """

    def __init__(self, reduction: str, get_not_nans: bool) -> None:
        _one_of(type(self).__name__, "reduction", str(getattr(reduction, "value", reduction)), _REDUCTIONS)
        self.reduction = reduction
        self.get_not_nans = get_not_nans
        self.reset()

    def _compute(self, y_pred: Any, y: Any, spacing: Any) -> Any:
        raise NotImplementedError

    def __call__(self, y_pred: Any, y: Any, spacing: Any = None) -> Any:
        """Return the metric of these cases, [B, C'], and remember it.

        `y_pred` and `y` are batches, or lists of cases without the batch dimension; `spacing` is that
        of the function.
        """
        if isinstance(y_pred, (list, tuple)) or isinstance(y, (list, tuple)):
            if len(y_pred) != len(y) or not len(y):
                raise ValueError(
                    f"{type(self).__name__}(): y: expected as many cases as y_pred has ({len(y_pred)}, at "
                    f"least 1), got {len(y)}"
                )
            each = spacing if np.ndim(spacing) == 2 else [spacing] * len(y)
            values = [self._compute(p[None], t[None], s) for p, t, s in zip(y_pred, y, each, strict=True)]
            kind = values[0]
            value = np.concatenate([_numpy(v) for v in values])
            value = sys.modules["torch"].from_numpy(value) if ops.is_torch(kind) else value
        else:
            value = self._compute(y_pred, y, spacing)
        if self._values and self._values[0].shape[1] != value.shape[1]:
            raise ValueError(
                f"{type(self).__name__}(): y: expected {self._values[0].shape[1]} classes as before, "
                f"got {value.shape[1]}"
            )
        self._torch = ops.is_torch(value)
        self._values.append(_numpy(value).copy())
        return value

    def _like(self, value: Float) -> Any:
        return sys.modules["torch"].from_numpy(np.asarray(value)) if self._torch else value

    def get_buffer(self) -> Any:
        """Return the values of all cases so far, [cases, C'], or None."""
        return self._like(np.concatenate(self._values)) if self._values else None

    def aggregate(self, reduction: str | None = None) -> Any:
        """Return the reduced values, and with `get_not_nans` also how many were not NaN.

        "mean" averages classes, then cases; "mean_batch" and "sum_batch" reduce cases, "mean_channel"
        and "sum_channel" classes; "sum" both; "none" nothing. NaN values take no part.

        Raises ValueError for an unknown reduction or before the first call.
        """
        reduction = str(
            getattr(reduction, "value", reduction) or getattr(self.reduction, "value", self.reduction)
        )
        _one_of(f"{type(self).__name__}.aggregate", "reduction", reduction, _REDUCTIONS)
        if not self._values:
            raise ValueError(
                f"{type(self).__name__}.aggregate(): expected at least one case before, got none"
            )
        value, n = _reduce(np.concatenate(self._values), reduction)
        return (self._like(value), self._like(n)) if self.get_not_nans else self._like(value)

    def reset(self) -> None:
        """Forget all cases."""
        self._values: list[Float] = []
        self._torch = False

    def __len__(self) -> int:
        return sum(len(v) for v in self._values)


class DiceMetric(_Cumulative):
    """`dice` over many calls; `reduction` and `get_not_nans` as in `aggregate`.

    >>> import numpy as np
    >>> from semisam import metrics
    >>> metric = metrics.DiceMetric(include_background=False, num_classes=2)
    >>> y = np.zeros((2, 1, 8, 8), np.uint8)
    >>> y[0, 0, 2:6, 2:6] = 1
    >>> metric(y_pred=y, y=y).tolist(), metric(y_pred=1 - y, y=y).tolist()
    ([[1.0], [1.0]], [[0.0], [0.0]])
    >>> float(metric.aggregate())
    0.5
    """

    def __init__(
        self,
        include_background: bool = True,
        reduction: str = "mean",
        get_not_nans: bool = False,
        ignore_empty: bool = False,
        num_classes: int | None = None,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(reduction, get_not_nans)
        self.options: dict[str, Any] = {
            "include_background": include_background,
            "ignore_empty": ignore_empty,
            "num_classes": num_classes,
            "ignore_index": ignore_index,
        }

    def _compute(self, y_pred: Any, y: Any, spacing: Any) -> Any:
        if spacing is not None:
            raise TypeError("DiceMetric(): spacing: expected none, as overlap has no unit")
        return dice(y_pred, y, **self.options)


class HausdorffDistanceMetric(_Cumulative):
    """`hausdorff_distance` over many calls; `spacing` is an argument of each call.

    >>> import numpy as np
    >>> from semisam import metrics
    >>> metric = metrics.HausdorffDistanceMetric(percentile=95, num_classes=2, get_not_nans=True)
    >>> y = np.zeros((1, 1, 20, 20), np.uint8)
    >>> y[..., 2:8, 2:8] = 1
    >>> _ = metric(np.roll(y, 5, 2), y, spacing=0.5), metric(np.zeros_like(y), y)
    >>> [float(v) for v in metric.aggregate()]
    [2.5, 1.0]
    """

    def __init__(
        self,
        include_background: bool = False,
        distance_metric: str = "euclidean",
        percentile: float | None = None,
        directed: bool = False,
        reduction: str = "mean",
        get_not_nans: bool = False,
        num_classes: int | None = None,
        ignore_index: int | None = None,
        definition: str = "pooled",
        empty: str = "nan",
    ) -> None:
        super().__init__(reduction, get_not_nans)
        self.options: dict[str, Any] = {
            "include_background": include_background,
            "distance_metric": distance_metric,
            "percentile": percentile,
            "directed": directed,
            "num_classes": num_classes,
            "ignore_index": ignore_index,
            "definition": definition,
            "empty": empty,
        }

    def _compute(self, y_pred: Any, y: Any, spacing: Any) -> Any:
        return hausdorff_distance(y_pred, y, spacing=spacing, **self.options)


class SurfaceDistanceMetric(_Cumulative):
    """`average_surface_distance` over many calls; `spacing` is an argument of each call.

    >>> import numpy as np
    >>> from semisam import metrics
    >>> metric = metrics.SurfaceDistanceMetric(num_classes=2)
    >>> y = np.zeros((1, 1, 8, 8), np.uint8)
    >>> y[..., 2, 2:6] = 1
    >>> _ = metric(y_pred=np.roll(y, 3, 2), y=y)
    >>> float(metric.aggregate())
    3.0
    """

    def __init__(
        self,
        include_background: bool = False,
        symmetric: bool = False,
        distance_metric: str = "euclidean",
        reduction: str = "mean",
        get_not_nans: bool = False,
        num_classes: int | None = None,
        ignore_index: int | None = None,
        definition: str = "pooled",
        empty: str = "nan",
    ) -> None:
        super().__init__(reduction, get_not_nans)
        self.options: dict[str, Any] = {
            "include_background": include_background,
            "symmetric": symmetric,
            "distance_metric": distance_metric,
            "num_classes": num_classes,
            "ignore_index": ignore_index,
            "definition": definition,
            "empty": empty,
        }

    def _compute(self, y_pred: Any, y: Any, spacing: Any) -> Any:
        return average_surface_distance(y_pred, y, spacing=spacing, **self.options)


class SurfaceDiceMetric(_Cumulative):
    """`normalized_surface_dice` over many calls; `spacing` is an argument of each call.

    >>> import numpy as np
    >>> from semisam import metrics
    >>> metric = metrics.SurfaceDiceMetric(class_thresholds=[1.0], num_classes=2)
    >>> y = np.zeros((1, 1, 8, 8), np.uint8)
    >>> y[..., 2, 2:6] = 1
    >>> _ = metric(y_pred=np.roll(y, 1, 2), y=y)
    >>> float(metric.aggregate())
    1.0
    """

    def __init__(
        self,
        class_thresholds: Sequence[float],
        include_background: bool = False,
        distance_metric: str = "euclidean",
        reduction: str = "mean",
        get_not_nans: bool = False,
        num_classes: int | None = None,
        ignore_index: int | None = None,
        definition: str = "pooled",
    ) -> None:
        super().__init__(reduction, get_not_nans)
        self.options: dict[str, Any] = {
            "class_thresholds": class_thresholds,
            "include_background": include_background,
            "distance_metric": distance_metric,
            "num_classes": num_classes,
            "ignore_index": ignore_index,
            "definition": definition,
        }

    def _compute(self, y_pred: Any, y: Any, spacing: Any) -> Any:
        return normalized_surface_dice(y_pred, y, spacing=spacing, **self.options)
