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
from functools import partial
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
    Case("components", "slabs", lambda r: (_mask(r, 0.03, 1, 5, 150, 450), 26, 0), ()),
    Case("keep_components", "largest-26", lambda r: (_mask(r, 0.08, 2, 9, 11, 70), 26, 0), ()),
    Case("keep_components", "largest-6", lambda r: (_mask(r, 0.3, 1, 9, 11, 20) * np.uint8(7), 6, 0), ()),
    Case("keep_components", "small-18", lambda r: (_mask(r, 0.15, 2, 9, 11, 20), 18, 4), ()),
]

# ---- metrics ------------------------------------------------------------------------------------

# ---- random walker ------------------------------------------------------------------------------


def _walk(r: np.random.Generator, images: int, classes: int, *space: int) -> tuple[np.ndarray, ...]:
    """Smooth images; seeds that leave a band around a random plane free; a prior."""
    image = r.standard_normal((images, *space))
    for axis in (1, 2, 3):
        image = (image + np.roll(image, 1, axis)) / 2
    seeds = np.zeros((images * classes, *space), np.uint8)
    height = np.arange(space[-1]) + r.integers(-2, 3, (images * classes, *space[:-1], 1))
    seeds[height < space[-1] // 4] = 1
    seeds[height > 3 * space[-1] // 4] = 2
    return image, seeds, r.random(seeds.shape)


_WALK = "CG stops at a relative residual of 1e-6; float32 vectors round to 6e-8, times the condition number"
CASES += [
    Case(
        "random_walker",
        "prior",
        lambda r: (*_walk(r, 1, 1, 5, 9, 20), 1, 0.05, 30.0, [], 1e-6, 500),
        FLOATS,
        2e-5,
        0,
        _WALK,
    ),
    Case(
        "random_walker",
        "no prior, spacing",
        lambda r: (*_walk(r, 1, 2, 4, 7, 18)[:2], None, 2, 0.0, 3.0, [3.0, 1.0, 1.5], 1e-6, 500),
        ("f32", "f64"),
        2e-5,
        0,
        _WALK,
    ),
    Case(
        "random_walker",
        "batch of classes",
        lambda r: (*_walk(r, 2, 2, 3, 6, 17), 2, 0.005, 10.0, [1.0, 1.0, 1.0], 1e-5, 500),
        ("f32",),
        2e-5,
        0,
        _WALK,
    ),
    Case(
        "random_walker",
        "2d, stopped early",
        lambda r: (*_walk(r, 1, 1, 1, 30, 40), 1, 0.01, 10.0, [], 0.0, 3),
        ("f32",),
        2e-5,
        0,
        "three iterations in float32",
    ),
    Case(
        "random_walker",
        "signed seeds, all free",
        lambda r: (
            _walk(r, 1, 1, 3, 5, 33)[0],
            np.zeros((1, 3, 5, 33), np.int8),
            r.random((1, 3, 5, 33)),
            1,
            0.5,
            90.0,
            [],
            1e-6,
            500,
        ),
        ("f32",),
        2e-5,
        0,
        _WALK,
    ),
]


def _marks(r: np.random.Generator, *shape: int) -> np.ndarray:
    mask = r.random(shape) < 0.01
    mask.reshape(shape[0], -1)[:, 5] = True
    return mask


_STEPS = "a path has up to some 50 steps, each rounded to 6e-8 of the sum"
CASES += [
    Case(
        "geodesic",
        "3d",
        lambda r: (r.standard_normal((1, 7, 9, 21)), _marks(r, 1, 7, 9, 21), 1, 2.0, []),
        FLOATS,
        0,
        5e-6,
        _STEPS,
    ),
    Case(
        "geodesic",
        "classes, spacing, one unmarked",
        lambda r: (
            r.standard_normal((2, 3, 8, 17)),
            np.concatenate([_marks(r, 3, 3, 8, 17).astype(np.uint8) * 7, np.zeros((1, 3, 8, 17), np.uint8)]),
            2,
            30.0,
            [2.0, 0.5, 1.0],
        ),
        ("f32",),
        0,
        5e-6,
        _STEPS,
    ),
    Case(
        "geodesic",
        "2d",
        lambda r: (r.standard_normal((1, 1, 31, 20)), _marks(r, 1, 1, 31, 20), 1, 0.0, [1.0, 1.0, 1.0]),
        ("f32",),
        0,
        5e-6,
        _STEPS,
    ),
]

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


_ORGAN = {"edt_edt": 5, "edt_scipy": 50, "floor": 2.5}
SPEEDS += [
    _edt_speed("128^3, 8 % full", lambda r: organ(r, (128,) * 3, 0.08), _ORGAN, 7),
    _edt_speed("128^3, 50 % full", lambda r: organ(r, (128,) * 3, 0.5), _ORGAN, 7),
    _edt_speed("256^3, 8 % full", lambda r: organ(r, (256,) * 3, 0.08), _ORGAN, 3),
    _edt_speed("512x512x200, 8 % full", lambda r: organ(r, (512, 512, 200), 0.08), {"edt_edt": 5}, 3, False),
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


def _mask_problem(r: np.random.Generator, *space: int) -> dict[str, Any]:
    """An ellipsoid of other brightness in noise, and seeds and prior from a roughened copy of it."""
    ndimage = importlib.import_module("scipy.ndimage")
    grid = np.stack(np.meshgrid(*[np.linspace(-2, 2, n) for n in space], indexing="ij"))
    inside = (grid**2).sum(0) < 1
    image = _ours("random_walk.standardize", inside + 0.4 * r.standard_normal(space).astype(np.float32))
    noise = ndimage.gaussian_filter(r.standard_normal(space), 2)
    signed = ndimage.distance_transform_edt(inside) - ndimage.distance_transform_edt(~inside)
    mask = signed + 1.5 * noise / noise.std() > 0
    seeds, prior = _ours("random_walk.mask_seeds", image, mask)
    data = {"image": image, "mask": mask, "seeds": seeds, "prior": prior, "gamma": 0.05}
    _, info = _walk_ours({**data, "return_info": True})
    return {**data, "sweeps": int(info.iterations)}


def _walk_ours(d: dict[str, Any]) -> Any:
    more = {"gamma": d["gamma"], "return_info": d.get("return_info", False)}
    return _ours("random_walk.random_walker", d["image"], d["seeds"], d["prior"], **more)


def _walk_bytes(d: dict[str, Any]) -> int:
    """56 bytes per free voxel and iteration; image, seeds, prior in and x out once."""
    return int(np.count_nonzero(d["seeds"] == 0)) * 56 * d["sweeps"] + 13 * d["seeds"].size


SPEEDS += [
    Speed(
        f"random walker, mask prompt, {name} voxels",
        partial(lambda space, r: _mask_problem(r, *space), space),
        _walk_ours,
        ("random_walker_skimage_cg_j", "random_walker_scipy_cg"),
        _walk_bytes,
        {"random_walker_skimage_cg_j": 20, "floor": 2},
        lambda a, b: float(np.mean((a > 0.5) != (b > 0.5))),
        repeat,
    )
    for name, space, repeat in (
        ("62 k", (35, 51, 35), 5),
        ("225 k", (90, 70, 36), 3),
        ("1.8 M", (180, 140, 72), 1),
    )
]
SPEEDS += [
    Speed(
        "random walker, image and mask to x, 62 k",
        lambda r: _mask_problem(r, 35, 51, 35),
        lambda d: _ours("random_walk.mask_prompt", d["image"], d["mask"]),
        (),
        _walk_bytes,
        {},
    ),
]


def _geodesic_problem(r: np.random.Generator, *space: int) -> dict[str, Any]:
    """A noisy image and a ball of radius 2 in its middle: the distances that a click needs."""
    ndimage = importlib.import_module("scipy.ndimage")
    image = ndimage.gaussian_filter(r.standard_normal(space), 1).astype(np.float32)
    away = np.indices(space) - np.array([n // 2 for n in space]).reshape(-1, 1, 1, 1)
    return {"image": image, "mask": (away**2).sum(0) <= 4, "weight": 30.0}


SPEEDS += [
    Speed(
        f"geodesic distance, {name} voxels",
        partial(lambda space, r: _geodesic_problem(r, *space), space),
        lambda d: _ours("random_walk.geodesic", d["image"], d["mask"], weight=d["weight"]),
        ("geodesic_scipy_dijkstra",),
        lambda d: 9 * d["image"].size,
        {},
        lambda a, b: float(np.abs(a - b).max() / b.max()),
        3,
    )
    for name, space in (("62 k", (35, 51, 35)), ("225 k", (90, 70, 36)))
]
