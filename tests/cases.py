# SPDX-License-Identifier: Apache-2.0
"""THE table: every operator with the inputs that tests and benchmarks run it on.

A `Case` makes an operator's inputs in schema order as NumPy arrays (floating ones in float64; they
are cast to the dtype under test) and states how far a result may be from `semisam.reference`:
`atol + rtol * |reference|` per output. Integer outputs must be equal. The reference always sees the
cast inputs in float64, so a tolerance measures the kernel alone.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
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


def _softmax(r: np.random.Generator, *shape: int, scale: float = 3.0) -> np.ndarray:
    z = np.exp(scale * r.standard_normal(shape))
    return z / z.sum(1, keepdims=True)


def _masks(r: np.random.Generator, *shape: int, share: float = 0.5) -> np.ndarray:
    """Blobs rather than noise: regions with an inside."""
    z = r.standard_normal(shape)
    for axis in range(1, len(shape)):
        for _ in range(2):
            z = z + np.roll(z, 1, axis) + np.roll(z, -1, axis)
    return z > np.quantile(z, 1 - share)


def _counter(r: np.random.Generator, n: int) -> np.ndarray:
    return r.integers(0, 2**32, (n, 4))


def _clicks(r: np.random.Generator, *shape: int, ritm: int, dims: int = 3, optional: str = "gr") -> tuple:
    t, g, m, n = _masks(r, *shape), _masks(r, *shape), _masks(r, *shape), shape[0]
    t[-1] = g[-1]  # a converged row
    skip = (np.arange(n) == 1) if "s" in optional else None
    return (
        t,
        g.view(np.uint8) * 255 if "g" in optional else None,
        m if "r" in optional else None,
        skip,
        _counter(r, n),
        -(2**63) + 12345 if ritm else 2**62 + 7,
        ritm,
        dims,
    )


CASES += [
    Case("specialist_targets", "2d", lambda r: (_softmax(r, 2, 4, 33, 35), 3, 0.5, 0.2, 0.5), FLOATS),
    Case("specialist_targets", "binary", lambda r: (_softmax(r, 3, 2, 9, 10, 13), 1, 0.5, 0.2, 0.5), FLOATS),
    Case("specialist_targets", "low", lambda r: (_softmax(r, 2, 9, 13, scale=0.3), 8, 0.5, 0.2, 0.9)),
    Case("specialist_targets", "all", lambda r: (_softmax(r, 2, 3, 50, scale=0.5), 2, 0.9, 0.6, 1.0)),
    Case("next_click", "ritm", lambda r: _clicks(r, 5, 9, 8, 11, ritm=1), ()),
    Case("next_click", "ritm-skip", lambda r: _clicks(r, 4, 6, 12, 7, ritm=1, optional="grs"), ()),
    Case("next_click", "ritm-first", lambda r: _clicks(r, 3, 8, 10, 9, ritm=1, optional="r"), ()),
    Case("next_click", "ritm-2d", lambda r: _clicks(r, 6, 1, 20, 33, ritm=1, dims=2, optional="g"), ()),
    Case("next_click", "ritm-flat", lambda r: _clicks(r, 2, 1, 9, 21, ritm=1), ()),
    Case("next_click", "random", lambda r: _clicks(r, 5, 7, 20, 19, ritm=0), ()),
    Case("next_click", "random-first", lambda r: _clicks(r, 2, 1, 200, 3, ritm=0, optional="s"), ()),
    Case("sample_points", "2d", lambda r: (_softmax(r, 3, 2, 1, 40, 33), _counter(r, 3), 7, 5, 0.8), FLOATS),
    Case("sample_points", "3d", lambda r: (_softmax(r, 2, 5, 7, 9, 21), _counter(r, 2), -3, 5, 0.8)),
    Case("sample_points", "few", lambda r: (_softmax(r, 1, 6, 1, 4, 5), _counter(r, 1), 0, 12, 0.5)),
    Case("sample_points", "many", lambda r: (_softmax(r, 1, 3, 5, 30, 31), _counter(r, 1), 1, 700, 0.9)),
    Case("boxes", "3d", lambda r: (r.random((5, 9, 8, 11)) > 0.995, 0.05), (), 1e-6, 1e-6, _ROUNDING),
    Case("boxes", "lines", lambda r: (r.random((2, 1, 300, 70)) > 0.9997, 0.0), ()),
    Case("boxes", "full", lambda r: (np.full((2, 1, 7, 5), 3, np.uint8), 0.5), ()),
]

# ---- losses -------------------------------------------------------------------------------------

# ---- fusion -------------------------------------------------------------------------------------

# ---- distances and components -------------------------------------------------------------------

_ONE_ROUNDING = "squares are exact integers: the root and the store round once each"
_ROUNDINGS = "three roundings of the squares in float32, one of the root"


def _mask(rng: np.random.Generator, p: float, *shape: int) -> np.ndarray:
    return rng.random(shape) < p


def _slit(*shape: int) -> np.ndarray:
    """Foreground everywhere but in one voxel of a corner: far from everything."""
    m = np.ones(shape, np.uint8)
    m[:, 0, 0, 0] = 0
    return m


CASES += [
    Case("edt", "noise", lambda r: (_mask(r, 0.9, 2, 9, 12, 17), [], 0, 1, 1), ()),
    Case("edt", "wide", lambda r: (_mask(r, 0.97, 1, 5, 7, 70), [], 1, 1, 1), ()),
    Case("edt", "far", lambda r: (_slit(1, 3, 4, 300), [], 0, 0, 1), (), 0.0, 1.2e-7, _ONE_ROUNDING),
    Case("edt", "tall", lambda r: (_slit(1, 2, 250, 3), [], 0, 1, 0), ()),
    Case("edt", "2d", lambda r: (_mask(r, 0.9, 3, 1, 20, 31).astype(np.uint8), [], 2, 1, 1), ()),
    Case("edt", "no-background", lambda r: (np.ones((2, 3, 4, 5), bool), [], 0, 0, 1), ()),
    Case(
        "edt",
        "spacing",
        lambda r: (_mask(r, 0.95, 2, 9, 11, 13), [2.5, 0.7, 1.1], 1, 1, 0),
        (),
        0.0,
        1.8e-7,
        _ROUNDINGS,
    ),
    Case(
        "edt",
        "spacing-root",
        lambda r: (_mask(r, 0.99, 1, 9, 11, 33), [0.3, 0.7, 1.1], 0, 0, 0),
        (),
        0.0,
        1.8e-7,
        _ROUNDINGS,
    ),
    Case("components", "6", lambda r: (_mask(r, 0.3, 2, 9, 10, 70), 6, 0), ()),
    Case("components", "18", lambda r: (_mask(r, 0.15, 1, 9, 11, 20).astype(np.int64), 18, 0), ()),
    Case("components", "26", lambda r: (_mask(r, 0.07, 2, 9, 11, 130).astype(np.uint8), 26, 0), ()),
    Case("components", "2d", lambda r: (_mask(r, 0.3, 3, 1, 21, 33).astype(np.int16), 26, 0), ()),
    Case("components", "values-6", lambda r: (r.integers(0, 3, (2, 5, 9, 20), np.int32), 6, 1), ()),
    Case("components", "values-26", lambda r: (r.integers(0, 5, (1, 5, 9, 20)), 26, 1), ()),
    Case("components", "slabs", lambda r: (_mask(r, 0.02, 1, 5, 130, 260), 26, 0), ()),
    Case("keep_components", "largest-26", lambda r: (_mask(r, 0.08, 2, 9, 11, 70), 26, 0), ()),
    Case("keep_components", "largest-6", lambda r: (_mask(r, 0.3, 1, 9, 11, 20) * np.uint8(7), 6, 0), ()),
    Case("keep_components", "small-18", lambda r: (_mask(r, 0.15, 2, 9, 11, 20), 18, 4), ()),
]

# ---- metrics ------------------------------------------------------------------------------------

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
        {"mask_logits_torch": 1.5, "floor": 1.5},
        lambda a, b: float((a - b).abs().max()),
    ),
]


def _ball(shape: tuple[int, ...], center: tuple[float, ...], radius: float) -> np.ndarray:
    grid = np.ogrid[tuple(slice(n) for n in shape)]
    return sum((g - c) ** 2 for g, c in zip(grid, center, strict=True)) <= radius**2


def _organ(moved: bool) -> tuple[Any, Any]:
    """A target of 8 % of 128^3, and a mask that lies 4 voxels beside it and is too small, or is empty."""
    target = _ball((128,) * 3, (64, 60, 66), 34)
    current = _ball((128,) * 3, (68, 60, 62), 33) if moved else np.zeros_like(target)
    return _torch(target[None, None]), _torch(current[None, None])


def _click(data: Any, rule: str) -> Any:
    return _ours("prompts.next_click", *data, seed=1, iteration=2, sample_ids=[3], round=0, rule=rule)


def _disc_prob(side: int) -> Any:
    p = np.where(_ball((side, side), (side / 2, side / 3), side / 4), 0.9, 0.05).astype(np.float32)
    return _torch(np.ascontiguousarray(np.broadcast_to(np.stack([1 - p, p]), (8, 2, side, side))))


SPEEDS += [
    *(
        Speed(
            f"RITM click 128^3, {'second' if moved else 'first'}",
            lambda r, moved=moved: _organ(moved),
            lambda data: _click(data, "ritm"),
            ("ritm_published", "ritm_scipy"),
            lambda data: 2 * data[0].numel(),
            {"ritm_published": 6},
        )
        for moved in (False, True)
    ),
    Speed(
        "random click 128^3",
        lambda r: _organ(True),
        lambda data: _click(data, "random"),
        ("random_published",),
        lambda data: 2 * data[0].numel(),
        {"best": 5, "floor": 1.3},
    ),
    *(
        Speed(
            f"SC-SAM points 8x2x{side}^2",
            lambda r, side=side: _disc_prob(side),
            lambda p: _ours("prompts.sample_points", p, 5, seed=1, iteration=2, sample_ids=list(range(8))),
            ("points_published",),
            lambda p: p.nbytes,
            {"best": 20, "floor": 1.5},
        )
        for side in (256, 512, 1024)
    ),
    *(
        Speed(
            f"boxes 8x{side}^2",
            lambda r, side=side: _disc_prob(side)[:, 1:] > 0.5,
            lambda m: _ours("prompts.boxes", m, 0.0, order="xy")[0],
            ("boxes_published", "boxes_monai", "boxes_numpy"),
            lambda m: m.numel(),
            {"boxes_published": 3, "floor": 1.5},
        )
        for side in (256, 512, 1024)
    ),
    Speed(
        "specialist targets 2x2x128^3",
        lambda r: _torch(_softmax(r, 2, 2, 128, 128, 128).astype(np.float32)),
        lambda p: _ours("prompts.specialist_targets", p),
        ("targets_torch",),
        lambda p: p.nbytes + 2 * p.nbytes // 8,
        {"best": 5},
    ),
]

# ---- losses -------------------------------------------------------------------------------------

# ---- fusion -------------------------------------------------------------------------------------

# ---- distances and components -------------------------------------------------------------------


def _smooth(a: np.ndarray, steps: int) -> np.ndarray:
    """Repeated averages of three with wrap-around, along every axis."""
    for axis in range(a.ndim):
        for _ in range(steps):
            a = (np.roll(a, 1, axis) + a + np.roll(a, -1, axis)) / np.float32(3)
    return a


def organ(rng: np.random.Generator, shape: tuple[int, ...], fill: float) -> np.ndarray:
    """One organ-like mask: an ellipsoid with a bumpy surface that fills a given part of the volume."""
    bumps = rng.standard_normal([-(-n // 8) for n in shape]).astype(np.float32)
    bumps = _smooth(bumps, 2)
    bumps = _smooth(np.kron(bumps / bumps.std(), np.ones((8,) * len(shape), np.float32)), 6)
    axes = [((np.arange(n, dtype=np.float32) + 0.5) * 2 / n - 1) ** 2 for n in shape]
    radius = sum(np.meshgrid(*axes, indexing="ij", sparse=True))
    level = 0.15 * bumps[tuple(slice(n) for n in shape)] - radius
    return (level > np.quantile(level[::2, ::2, ::2], 1 - fill)).astype(np.uint8)


def _atrium(rng: np.random.Generator) -> np.ndarray:
    """The label of the first left atrium case; a synthetic organ of its size where data are absent."""
    root = Path(os.environ.get("SEMISAM_DATA", Path(__file__).parents[2] / "shared" / "data"))
    try:
        h5py = importlib.import_module("h5py")
        with h5py.File(sorted((root / "la").glob("*/*/mri_norm2.h5"))[0]) as f:
            return f["label"][()]
    except (ImportError, IndexError):
        return organ(rng, (183, 140, 88), 0.08)


def _all_but_one(*shape: int) -> np.ndarray:
    m = np.ones(shape, np.uint8)
    m[tuple(n // 2 for n in shape)] = 0
    return m


def _edt_speed(
    name: str, make: Inputs, targets: dict[str, float], repeat: int = 7, scipy: bool = True
) -> Speed:
    return Speed(
        f"edt {name}",
        make,
        lambda m: _ours("masks.edt", m[None])[0],
        ("edt_edt", "edt_scipy") if scipy else ("edt_edt",),
        lambda m: 5 * m.size,
        targets,
        lambda a, b: float(np.abs(a - b).max()),
        repeat,
    )


_FAST = {"edt_edt": 5, "floor": 2.5}
_ORGAN = {**_FAST, "edt_scipy": 50}
SPEEDS += [
    _edt_speed("128^3, 8 % full", lambda r: organ(r, (128,) * 3, 0.08), _ORGAN, 7),
    _edt_speed("128^3, 50 % full", lambda r: organ(r, (128,) * 3, 0.5), _ORGAN, 7),
    _edt_speed("256^3, 8 % full", lambda r: organ(r, (256,) * 3, 0.08), _FAST, 3, False),
    _edt_speed("512x512x200, 8 % full", lambda r: organ(r, (512, 512, 200), 0.08), _FAST, 3, False),
    _edt_speed("128^3, all but one voxel", lambda r: _all_but_one(128, 128, 128), {"edt_edt": 2}),
    _edt_speed("128^3, all but a corner", lambda r: _slit(1, 128, 128, 128)[0], {"edt_edt": 2}),
    _edt_speed("128^3, noise 50 %", lambda r: _mask(r, 0.5, 128, 128, 128).view(np.uint8), {"edt_edt": 2}),
]


def _labels_speed(name: str, make: Inputs, target: float, floor: bool, connectivity: int = 26) -> Speed:
    return Speed(
        f"components {name}",
        make,
        lambda m: _ours("masks.components", m[None], connectivity)[0][0],
        (f"components_cc3d_{connectivity}", "components_scipy")
        if connectivity == 26
        else ("components_cc3d_6",),
        lambda m: 5 * m.size,
        {f"components_cc3d_{connectivity}": target, **({"floor": 2.5} if floor else {})},
        lambda a, b: float(a.max() != b.max()),
    )


def _largest_speed(name: str, make: Inputs) -> Speed:
    return Speed(
        f"largest component {name}",
        make,
        lambda m: _ours("masks.largest_component", m[None])[0],
        ("largest_component_cc3d", "largest_component_published"),
        lambda m: 2 * m.size,
        {"best": 5},
        lambda a, b: float(np.count_nonzero((a != 0) != (b != 0))),
        5,
    )


def _specks(rng: np.random.Generator, n: int) -> np.ndarray:
    """What a network predicts: an organ and a few hundred false voxels."""
    return organ(rng, (n,) * 3, 0.08) | _mask(rng, 1e-4, n, n, n).view(np.uint8)


SPEEDS += [
    _labels_speed("LA", _atrium, 2, True),
    _labels_speed("128^3", lambda r: _specks(r, 128), 2, True),
    _labels_speed("256^3", lambda r: _specks(r, 256), 2, True),
    _labels_speed("LA, 6 neighbours", _atrium, 2, True, 6),
    _labels_speed("128^3, noise 30 %", lambda r: _mask(r, 0.3, 128, 128, 128).view(np.uint8), 1, False),
    _labels_speed("128^3, noise 5 %", lambda r: _mask(r, 0.05, 128, 128, 128).view(np.uint8), 1, False),
    _largest_speed("LA", _atrium),
    _largest_speed("128^3", lambda r: _specks(r, 128)),
    _largest_speed("256^3", lambda r: _specks(r, 256)),
]

# ---- metrics ------------------------------------------------------------------------------------

# ---- random walker ------------------------------------------------------------------------------
