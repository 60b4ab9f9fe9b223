# SPDX-License-Identifier: Apache-2.0
"""THE table: every operator with the inputs that tests and benchmarks run it on.

A `Case` makes an operator's inputs in schema order as NumPy arrays (floating ones in float64; they
are cast to the dtype under test) and states how far a result may be from `semisam.reference`:
`atol + rtol * |reference|` per output. Integer outputs must be equal. The reference always sees the
cast inputs in float64, so a tolerance measures the kernel alone.
"""

from __future__ import annotations

import importlib
import math
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

_VAR, _ENT, _MI = range(3)
_EXP, _LINEAR, _GATE, _CONF, _NONE = range(5)
_SUMS = (
    "float32: sums over S <= 10 numbers of at most 1 and differences of entropies of at most ln C, each "
    "within a few eps = 6e-8; a map is scaled by at most 2 and a weight by kappa = 4. Half precision is "
    "input only. The reference has the sources in float64, so float64 is far below that."
)


def _fuse(  # noqa: PLR0917
    sources: list[np.ndarray],
    unc: int = _VAR,
    weighting: int = _EXP,
    r_lab: Any = None,
    r_unc: Any = None,
    logits: int = 0,
    tau: tuple[float, float] = (0.0, 1.0),
    channels: int | None = None,
    want: tuple[int, ...] = (1, 1, 1, 1, 1),
    log_offset: float = 0.0,
) -> tuple[Any, ...]:
    s = len(sources)
    lab = [1 / s] * s if r_lab is None else r_lab
    doubt = lab if r_unc is None else r_unc
    numbers = (4.0, *tau, log_offset, 255, channels or sources[0].shape[1])
    return (sources, lab, doubt, logits, unc, weighting, *numbers, *want)


def _simplex(rng: np.random.Generator, s: int, *shape: int, dim: int = 1) -> list[np.ndarray]:
    """S distributions that mostly agree: one common logit map and some disagreement."""
    common = 3 * rng.standard_normal(shape)
    z = [np.exp(common + rng.standard_normal(shape)) for _ in range(s)]
    return [v / v.sum(dim, keepdims=True) for v in z]


def _logits(rng: np.random.Generator, s: int, *shape: int) -> list[np.ndarray]:
    common = 4 * rng.standard_normal(shape)
    return [common + 2 * rng.standard_normal(shape) for _ in range(s)]


_R4 = ([0.5, 0.25, 0.25, 0.0], [0.25, 0.125, 0.125, 0.5])
_TABLE = ([1, 0.25, 0, 0.25, 0, 0.5], [0.5, 0.125, 0, 0.125, 0.5, 0.75])  # [3 sources, 2 samples]
_EMPTY = ([0.5, 0, 0.5, 0], [0.75, 0, 0.25, 0])  # the second sample has no source

CASES += [
    Case("fuse", name, inputs, FLOATS, 4e-6, 1e-6, _SUMS)
    for name, inputs in {
        "one-channel-var": lambda r: _fuse([_prob(r, 2, 1, 7, 11, 13) for _ in range(10)]),
        "one-channel-mi": lambda r: _fuse([_prob(r, 2, 1, 31, 33) for _ in range(4)], _MI, _LINEAR),
        "one-channel-as-two": lambda r: _fuse([_prob(r, 1, 1, 5, 9, 31)] * 2, _ENT, _GATE, channels=2),
        "one-channel-logits": lambda r: _fuse(_logits(r, 4, 2, 1, 9, 9, 5), _MI, _EXP, *_R4, logits=1),
        "two-channels": lambda r: _fuse(_simplex(r, 4, 2, 2, 9, 9, 17), _VAR, _EXP, *_R4, tau=(0.7, 0.5)),
        "two-channels-logits": lambda r: _fuse(_logits(r, 8, 2, 2, 14, 14, 10), _ENT, _GATE, logits=1),
        "three-classes-mi": lambda r: _fuse(_simplex(r, 4, 2, 3, 25, 43), _MI, _CONF, *_R4, tau=(0.6, 0.25)),
        "logits-ent": lambda r: _fuse(_logits(r, 3, 1, 4, 12, 11, 10), _ENT, _LINEAR, logits=1),
        "logits-table": lambda r: _fuse(_logits(r, 3, 2, 5, 40, 41), _VAR, _EXP, *_TABLE, logits=1),
        "table": lambda r: _fuse(_simplex(r, 3, 2, 3, 6, 50, 5), _VAR, _NONE, *_TABLE),
        "sample-without-source": lambda r: _fuse(_simplex(r, 2, 2, 3, 30, 4), _MI, _EXP, *_EMPTY),
        "many-classes": lambda r: _fuse(_simplex(r, 2, 1, 70, 10, 13), _VAR, _CONF, tau=(0.1, 1.0)),
        "one-source": lambda r: _fuse(_simplex(r, 1, 1, 4, 100), _VAR),
        "one-voxel": lambda r: _fuse(_simplex(r, 3, 1, 2, 1), _VAR, tau=(0.7, 0.5)),
        "mean-only": lambda r: _fuse(_simplex(r, 3, 1, 2, 77), _VAR, want=(1, 0, 0, 0, 0)),
        "label-only": lambda r: _fuse(_simplex(r, 4, 1, 2, 77), _MI, r_lab=_R4[0], want=(0, 1, 0, 0, 0)),
        "weight-only": lambda r: _fuse(_simplex(r, 4, 1, 3, 77), _MI, _GATE, *_R4, want=(0, 0, 0, 0, 1)),
        "conf-weight-only": lambda r: _fuse(_logits(r, 2, 1, 2, 77), _MI, _CONF, want=(0, 0, 0, 0, 1)),
        "offset": lambda r: _fuse(_simplex(r, 2, 1, 2, 77), _ENT, _GATE, tau=(0, 0.5), log_offset=1e-6),
    }.items()
]

# ---- distances and components -------------------------------------------------------------------

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
        {},
        lambda a, b: float((a - b).abs().max()),
    ),
]

# ---- losses -------------------------------------------------------------------------------------

# ---- fusion -------------------------------------------------------------------------------------

_LA_HALF = (2, 2, 112, 112, 80)  # the unlabeled half of a batch of left atrium patches


def _largest(a: Any, b: Any) -> float:
    """Largest absolute difference over a tuple of arrays."""
    return max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in zip(a, b, strict=True))


def _passes(r: np.random.Generator, shape: tuple[int, ...], n: int = 8) -> list[Any]:
    return [_torch(4 * r.standard_normal(shape, np.float32)) for _ in range(n)]


def _simplex32(r: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    p = r.random(shape, np.float32)
    return p / p.sum(1, keepdims=True)


def _fuse_maps(maps: list[Any]) -> tuple[Any, ...]:
    fused = _ours("fusion.fuse", maps, want=("mean", "uncertainty", "weight"))
    return fused.mean, fused.uncertainty, fused.weight


def _masked_mse(data: Any) -> tuple[Any, Any]:
    """UA-MT's consistency term: where 8 passes are sure, student against one teacher pass."""
    passes, student, teacher = data
    mask = _ours("fusion.mc_uncertainty", passes, 0.75, want=("mask",)).mask
    z = student.detach().requires_grad_()
    term = _ours("losses.Term", "mse", teacher, weight=mask, reduction="element")
    loss = _ours("losses.voxel_loss", z, [term])
    loss.backward()
    return loss.detach(), z.grad


SPEEDS += [
    Speed(
        "fuse 10 maps 1x1x128^3",
        lambda r: [_torch(r.random((1, 1, 128, 128, 128), np.float32)) for _ in range(10)],
        _fuse_maps,
        ("fuse_maps_torch", "fuse_maps_compile", "fuse_maps_numpy"),
        lambda maps: 13 * maps[0].nbytes,
        {"fuse_maps_compile": 2, "fuse_maps_torch": 5, "floor": 1.1},
        _largest,
    ),
    Speed(
        "uncertainty map T=8 half LA batch",
        lambda r: _passes(r, _LA_HALF),
        lambda z: _ours("fusion.mc_uncertainty", z, want=("uncertainty",)).uncertainty * math.log(2),
        ("mc_entropy_torch", "mc_entropy_compile"),
        lambda z: 8 * z[0].nbytes + z[0].nbytes // 2,
        {"best": 6, "floor": 1.5},
        lambda a, b: float((a - b).abs().max()),
    ),
    Speed(
        "uncertainty map T=8 + masked MSE fwd+bwd half LA batch",
        lambda r: (_passes(r, _LA_HALF), *_passes(r, _LA_HALF, 1), _torch(_simplex32(r, _LA_HALF))),
        _masked_mse,
        ("uamt_torch", "uamt_compile"),
        # The passes, the mask out and twice in, student and teacher twice each, the gradient.
        lambda d: 8 * d[1].nbytes + 3 * d[1].nbytes // 2 + 5 * d[1].nbytes,
        {"best": 7, "floor": 1.4},
        _largest,
    ),
]

# ---- distances and components -------------------------------------------------------------------

# ---- metrics ------------------------------------------------------------------------------------

# ---- random walker ------------------------------------------------------------------------------
