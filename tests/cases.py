# SPDX-License-Identifier: Apache-2.0
"""THE table: every operator with the inputs that tests and benchmarks run it on.

A `Case` makes an operator's inputs in schema order as NumPy arrays (floating ones in float64; they
are cast to the dtype under test) and states how far a result may be from `semisam.reference`:
`atol + rtol * |reference|` per output. Integer outputs must be equal. The reference always sees the
cast inputs in float64, so a tolerance measures the kernel alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

FLOATS = ("f16", "bf16", "f32", "f64")
Inputs = Callable[[np.random.Generator], tuple[Any, ...]]


@dataclass(frozen=True)
class Case:
    op: str
    name: str
    inputs: Inputs
    dtypes: tuple[str, ...] = ("f32",)  # of the floating inputs; () if there are none
    atol: float = 0.0
    rtol: float = 0.0
    why: str = ""  # where the tolerance comes from

    @property
    def id(self) -> str:
        return f"{self.op}-{self.name}"


def _prob(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.random(shape)


CASES: list[Case] = []

# ---- prompts ------------------------------------------------------------------------------------

_ROUNDING = "one rounding of a float64 result to float32, and log(m) - log1p(-m) near m = 1/2"
CASES += [
    Case("mask_logits", "3d", lambda r: (_prob(r, 2, 16, 20, 12), 4, 5, 3), FLOATS, 1e-6, 1e-6, _ROUNDING),
    Case("mask_logits", "uneven", lambda r: (_prob(r, 1, 7, 11, 13), 3, 4, 5), FLOATS, 1e-6, 1e-6, _ROUNDING),
    Case(
        "mask_logits",
        "clipped",
        lambda r: (np.round(_prob(r, 1, 4, 8, 8)), 2, 4, 4),
        FLOATS,
        1e-6,
        1e-6,
        _ROUNDING,
    ),
]

# ---- losses -------------------------------------------------------------------------------------

# ---- fusion -------------------------------------------------------------------------------------

# ---- distances and components -------------------------------------------------------------------

# ---- metrics ------------------------------------------------------------------------------------


def _blobs(rng: np.random.Generator, classes: int, *shape: int, kind: Any = np.uint8) -> np.ndarray:
    """Label maps [N, *S]: boxes of random classes, painted over each other."""
    out = np.zeros(shape, kind)
    for case in out:
        for _ in range(3 * classes):
            corner = [rng.integers(0, n) for n in case.shape]
            box = tuple(
                slice(c, c + rng.integers(1, 1 + n // 2 + 1)) for c, n in zip(corner, case.shape, strict=True)
            )
            case[box] = rng.integers(0, classes)
    return out


def _surface(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    classes: int = 3,
    areas: bool = False,
    dims: int = 3,
    ignore: tuple[int, int] = (0, 0),
    percentile: float = 95.0,
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0),
    kind: Any = np.uint8,
) -> tuple[Any, ...]:
    maps = (_blobs(rng, classes, *shape, kind=kind), _blobs(rng, classes, *shape, kind=kind))
    # Any weights do: whole numbers, so that no rounding decides where a share of weight is reached.
    table = 1.0 + np.arange(256) % 7 if areas else None
    near = [1.0 + c for c in range(classes)]
    return (*maps, table, classes, 1, dims, *ignore, percentile, list(spacing), near)


_ORDER = "sums in another order; distances round once more where coordinates are scaled first"
CASES += [
    Case("overlap", "u8", lambda r: (_blobs(r, 4, 2, 9, 21, 30), _blobs(r, 4, 2, 9, 21, 30), 4, 0, 0), ()),
    Case(
        "overlap",
        "long",
        lambda r: (_blobs(r, 3, 1, 70000), _blobs(r, 3, 1, 70000, kind=np.int64), 3, 0, 0),
        (),
    ),
    Case(
        "overlap",
        "ignore",
        lambda r: (
            _blobs(r, 5, 3, 40, 41, kind=np.int16),
            _blobs(r, 5, 3, 40, 41, kind=np.int32) - 1,
            5,
            1,
            -1,
        ),
        (),
    ),
    Case("surface_metrics", "3d", lambda r: _surface(r, (2, 12, 17, 23)), (), 1e-12, 1e-12, _ORDER),
    Case("surface_metrics", "one voxel", lambda r: _surface(r, (3, 1, 1, 1), 2), (), 1e-12, 1e-12, _ORDER),
    Case(
        "surface_metrics",
        "long rows",
        lambda r: _surface(r, (1, 1, 2, 4500), 2, spacing=(1.0, 2.0, 0.25), kind=np.int64),
        (),
        1e-12,
        1e-12,
        _ORDER,
    ),
    Case(
        "surface_metrics",
        "2d spacing",
        lambda r: _surface(r, (2, 1, 60, 71), dims=2, spacing=(1.0, 0.7, 1.3, 1.0, 2.0, 0.5), kind=np.int32),
        (),
        1e-12,
        1e-12,
        _ORDER,
    ),
    Case(
        "surface_metrics",
        "ignore, median",
        lambda r: _surface(r, (1, 14, 15, 70), 4, ignore=(1, 2), percentile=50.0, spacing=(3.0, 0.7, 0.7)),
        (),
        1e-12,
        1e-12,
        _ORDER,
    ),
    Case(
        "surface_metrics",
        "areas 3d",
        lambda r: _surface(r, (2, 9, 14, 20), areas=True),
        ("f64",),
        1e-12,
        1e-12,
        _ORDER,
    ),
    Case(
        "surface_metrics",
        "areas 2d",
        lambda r: _surface(r, (2, 1, 31, 66), areas=True, dims=2, spacing=(1.0, 0.5, 2.0)),
        ("f64",),
        1e-12,
        1e-12,
        _ORDER,
    ),
]

# ---- random walker ------------------------------------------------------------------------------

# ==== speed ======================================================================================


@dataclass(frozen=True)
class Speed:
    """One line of the benchmark: what to run, who to compare with, and what was promised.

    `make` builds the data once; `ours(data)` is a call of the public interface; `peers` names
    functions of `benchmarks/peers.py`, called with the same data. `moved(data)` is the least number
    of bytes that any program must read and write. `targets` maps a peer's name, or "best" (the
    fastest peer), to the least wanted ratio, and "floor" to the largest wanted multiple of
    moved / bandwidth. `error(ours, peer)` measures how far two results are apart.
    """

    name: str
    make: Callable[[np.random.Generator], Any]
    ours: Callable[[Any], Any]
    peers: tuple[str, ...]
    moved: Callable[[Any], int]
    targets: dict[str, float]
    error: Callable[[Any, Any], float] | None = None
    repeat: int = 7


SPEEDS: list[Speed] = []


def _ours(path: str, *args: Any, **kwargs: Any) -> Any:
    """Call semisam.<module>.<function>; imported late so that the table itself needs NumPy only."""
    module, function = path.split(".")
    return getattr(importlib.import_module(f"semisam.{module}"), function)(*args, **kwargs)


def _torch(a: np.ndarray) -> Any:
    return importlib.import_module("torch").from_numpy(a)


# ---- prompts ------------------------------------------------------------------------------------

SPEEDS += [
    Speed(
        "mask_logits 2x128^3 -> 32^3",
        lambda r: _torch(r.random((2, 128, 128, 128), np.float32)),
        lambda p: _ours("prompts.mask_logits", p, (32, 32, 32)),
        ("mask_logits_torch",),
        lambda p: p.nbytes + 2 * 32**3 * 4,
        {},
        lambda a, b: float((a - b).abs().max()),
    ),
]

# ---- losses -------------------------------------------------------------------------------------

# ---- fusion -------------------------------------------------------------------------------------

# ---- distances and components -------------------------------------------------------------------

# ---- metrics ------------------------------------------------------------------------------------


def _perturbed(rng: np.random.Generator, y: np.ndarray) -> np.ndarray:
    """A prediction as a trained network makes it: wavy borders, a shift, one false island."""
    coarse = rng.normal(0, 1, [n // 8 + 1 for n in y.shape])
    for axis, n in enumerate(y.shape):
        coarse = coarse.repeat(8, axis).take(range(n), axis)
    pred = y.copy()
    for axis in range(y.ndim):
        grown = np.maximum(np.roll(pred, 1, axis), np.roll(pred, -1, axis))
        shrunk = np.minimum(np.roll(pred, 1, axis), np.roll(pred, -1, axis))
        pred = np.where(coarse > 0.5, grown, np.where(coarse < -0.5, shrunk, pred)).astype(y.dtype)
    pred = np.roll(pred, 2, 0)
    pred[4:9, 4:9, 4:9] = 1
    return pred


def _atrium(rng: np.random.Generator, crop: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(prediction, reference): a left atrium where the data set is present, else an ellipsoid."""
    try:
        conftest = importlib.import_module("conftest")
        path = sorted((conftest.DATA / "la").glob("*/*/mri_norm2.h5"))[0]
        with importlib.import_module("h5py").File(path) as f:
            y = f["label"][()]
    except (ImportError, IndexError):
        axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in (183, 140, 88)), indexing="ij", sparse=True)
        y = (sum((a / s) ** 2 for a, s in zip(axes, (0.4, 0.4, 0.6), strict=True)) < 1).astype(np.uint8)
    if crop:
        start = [(n - s) // 2 for n, s in zip(y.shape, (112, 112, 80), strict=True)]
        y = y[tuple(slice(b, b + s) for b, s in zip(start, (112, 112, 80), strict=True))]
    y = np.ascontiguousarray(y)
    return _perturbed(rng, y), y


def _hd95_asd(data: Any) -> tuple[float, float]:
    m = _ours("metrics.compute_all", data[0][None, None], data[1][None, None], 2)
    return m["hd95"].item(), m["asd"].item()


def _hd95_asd_monai(data: Any) -> tuple[float, float]:
    m = _ours("metrics.compute_all", data[0][None, None], data[1][None, None], 2, definition="monai")
    return m["hd95"].item(), m["asd"].item()


def _hd95_asd_deepmind(data: Any) -> tuple[float, float]:
    m = _ours("metrics.compute_all", data[0][None, None], data[1][None, None], 2, definition="deepmind")
    return m["hd95"].item(), m["asd"].item()


def _apart(a: Any, b: Any) -> float:
    return max(abs(p - q) for p, q in zip(a, b, strict=True))


for _where, _crop in (("LA case", False), ("crop 112^2x80", True)):
    for _definition, _mine, _peer, _ratio in (
        ("pooled", _hd95_asd, "hd95_asd_medpy", 25.0),
        ("monai", _hd95_asd_monai, "hd95_asd_monai", 8.0),
        ("deepmind", _hd95_asd_deepmind, "hd95_asd_deepmind", 8.0),
    ):
        SPEEDS.append(
            Speed(
                f"HD95 + ASD {_definition}, {_where}",
                lambda r, crop=_crop: _atrium(r, crop),
                _mine,
                (_peer,),
                lambda d: d[0].nbytes + d[1].nbytes,
                {_peer: _ratio},
                _apart,
                repeat=5,
            )
        )
SPEEDS += [
    Speed(
        "Dice, LA case",
        lambda r: tuple(map(_torch, _atrium(r))),
        lambda d: _ours("metrics.dice", d[0][None, None], d[1][None, None], num_classes=2),
        ("dice_monai",),
        lambda d: d[0].nbytes + d[1].nbytes,
        {},
        lambda a, b: float((a - b).abs().max()),
    ),
]

# ---- random walker ------------------------------------------------------------------------------
