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

_SPAN = "one rounding of a float64 extreme to float32, which the reference keeps"
_ROUNDING = "one rounding of a float64 result to float32, and log(m) - log1p(-m) near m = 1/2"
CASES += [
    Case("mask_logits", "3d", lambda r: (_prob(r, 2, 16, 20, 12), 4, 5, 3), FLOATS, 1e-6, 1e-6, _ROUNDING),
    Case(
        "mask_logits",
        "off",
        lambda r: (_prob(r, 2, 4, 3, 5) * 1.2 - 0.1, 4, 3, 5),
        FLOATS,
        1e-6,
        1e-6,
        _ROUNDING,
    ),
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


def _targets(name: str, inputs: Inputs, dtypes: tuple[str, ...] = ("f32",)) -> Case:
    why = "sums over up to 9 classes in float32, of a spread around 0; the masks are exact"
    return Case("specialist_targets", name, inputs, dtypes, 5e-7, 0.0, why)


CASES += [
    _targets("2d", lambda r: (_softmax(r, 2, 4, 33, 35), 3, 0.5, 0.2, 0.5), FLOATS),
    _targets("binary", lambda r: (_softmax(r, 3, 2, 9, 10, 13), 1, 0.5, 0.2, 0.5), FLOATS),
    _targets("low", lambda r: (_softmax(r, 2, 9, 13, scale=0.3), 8, 0.5, 0.2, 0.9)),
    _targets("all", lambda r: (_softmax(r, 2, 3, 50, scale=0.5), 2, 0.9, 0.6, 1.0)),
    _targets("off", lambda r: (_softmax(r, 3, 3, 4, 700) * 1.1 - 0.02, 2, 0.5, 0.2, 0.5), FLOATS),
    Case("answer_mask", "3d", lambda r: (r.standard_normal((3, 9, 20, 21)),), FLOATS, 1e-7, 1e-7, _SPAN),
    Case("answer_mask", "constant", lambda r: (np.full((2, 1, 1, 1030), -0.5),), FLOATS),
    Case("answer_mask", "large", lambda r: (r.standard_normal((2, 1, 130, 140)) - 2,)),
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


def _term(channels: int, kind: str, target: int, weight: int, first: int, last: int, **fields: Any) -> list:
    """One term of a voxel loss as numbers: `TERM_FIELDS` of reference.py, then class weights."""
    row: dict[str, Any] = {
        "kind": ("ce", "dice", "mse", "kl", "entropy").index(kind),
        "target": target,
        "weight": weight,
        "first": first,
        "last": last,
        "has_ignore": 1,
        "ignore_index": 255,
        "label_smoothing": 0,
        "include_background": 1,
        "squared_pred": 1,
        "batch": 1,
        "jaccard": 0,
        "smooth_nr": 1e-5,
        "smooth_dr": 1e-5,
        "reduction": 0,
        "min_weight": 1e-3,
        "pooled": 1,
    }
    weights = fields.pop("class_weight", [1.0] * channels)
    return [float(v) for v in {**row, **fields}.values()] + list(weights)


def _voxel_loss(shape: tuple[int, ...], activation: int, *terms: tuple) -> Inputs:
    """Inputs of `voxel_loss_forward`: target 0 labels, 1 a distribution; weight 0; for the whole batch."""

    def make(rng: np.random.Generator) -> tuple[Any, ...]:
        b, c, *space = shape
        z = 3 * rng.standard_normal(shape)
        y = rng.integers(0, max(c, 2), (b, *space)).astype(np.uint8)
        y[0, :1] = 255
        q = rng.random(shape)
        q /= q.sum(1, keepdims=True)
        q[:, -1, :1] = 0.0
        w = rng.random((b, *space)) * (rng.random((b, *space)) > 0.2)
        params = [
            v
            for kind, target, weight, fields in terms
            for v in _term(c, kind, target, weight, 0, b, **fields)
        ]
        logits = rng.random(shape) if activation == 2 else z
        return logits, [y, q], [w], params, activation, len(terms)

    return make


def _voxel_loss_gradient(forward: Inputs) -> Inputs:
    """The same for `voxel_loss_backward`: any sums and upstream gradients will do."""

    def make(rng: np.random.Generator) -> tuple[Any, ...]:
        logits, targets, weights, params, activation, terms = forward(rng)
        stats = 50 + 50 * rng.random((terms, *logits.shape[:2], 4))
        grad = rng.standard_normal((terms, *logits.shape[:2]))
        return logits, targets, weights, params, stats, grad, activation, terms

    return make


_LINEAR = {"squared_pred": 0, "batch": 0, "jaccard": 1, "include_background": 0}
_VOXEL_LOSSES: dict[str, Inputs] = {
    "ce_dice": _voxel_loss((2, 2, 9, 20, 15), 0, ("ce", 0, -1, {}), ("dice", 0, -1, {})),
    "ce_dice_3": _voxel_loss(
        (2, 3, 40, 70), 0, ("ce", 0, 0, {"class_weight": [1, 0, 2]}), ("dice", 0, 0, {})
    ),
    "ce_dice_4": _voxel_loss((1, 4, 9, 20, 15), 0, ("ce", 0, 0, {}), ("dice", 0, 0, {"squared_pred": 0})),
    "ce_dice_14": _voxel_loss((1, 14, 9, 20, 15), 0, ("ce", 0, 0, {}), ("dice", 0, 0, {})),
    # Without voxel weights: the loops for few and for many classes.
    **{
        f"ce_dice_{c}_plain": _voxel_loss(
            (2, c, 9, 20, 15), 0, ("ce", 0, -1, {}), ("dice", 0, -1, {"squared_pred": c % 2})
        )
        for c in (3, 4, 5)
    },
    "ce_smooth": _voxel_loss((2, 3, 31, 43), 0, ("ce", 0, 0, {"label_smoothing": 0.1})),
    "ce_soft": _voxel_loss((2, 3, 31, 43), 0, ("ce", 1, 0, {"reduction": 2})),
    "dice_linear": _voxel_loss((3, 3, 31, 43), 0, ("dice", 0, 0, _LINEAR), ("dice", 1, 0, {})),
    "mse": _voxel_loss((2, 2, 31, 43), 0, ("mse", 1, 0, {"reduction": 2})),
    "mse_entropy_4": _voxel_loss((2, 4, 31, 43), 0, ("mse", 1, 0, {}), ("entropy", -1, -1, {})),
    "kl": _voxel_loss((2, 2, 31, 43), 0, ("kl", 1, 0, {"reduction": 1})),
    "kl_entropy": _voxel_loss((2, 4, 31, 43), 0, ("kl", 1, 0, {}), ("entropy", -1, 0, {})),
    "all": _voxel_loss(
        (2, 5, 9, 10, 15), 0, *((k, t, 0, {}) for k, t in (("ce", 0), ("dice", 1), ("mse", 1), ("kl", 1)))
    ),
    "sigmoid": _voxel_loss((2, 1, 31, 43), 1, ("ce", 0, 0, {}), ("dice", 0, -1, {}), ("mse", 0, -1, {})),
    "sigmoid_weighted": _voxel_loss(  # binary cross entropy knows neither class weights nor smoothing
        (2, 3, 31, 43), 1, ("ce", 1, 0, {"class_weight": [1, 0, 2], "label_smoothing": 0.1})
    ),
    "sigmoid_soft": _voxel_loss((2, 3, 31, 43), 1, ("ce", 1, 0, {}), ("dice", 1, 0, {})),
    "probability": _voxel_loss((2, 3, 31, 43), 2, ("dice", 0, -1, {}), ("mse", 1, 0, {})),
}
_WHY_LOSS = "p within 4 ulp, 64 float additions per lane and block: 1e-6 of values near 1, sums up to 1e4"
_WHY_GRADIENT = "p within 4 ulp times derivatives below 1, then one rounding to the logits' dtype"
for _name, _inputs in _VOXEL_LOSSES.items():
    CASES += [
        Case("voxel_loss_forward", _name, _inputs, FLOATS, 2e-5, 2e-6, _WHY_LOSS),
        *(
            Case(
                "voxel_loss_backward",
                f"{_name}_{dtypes[0]}",
                _voxel_loss_gradient(_inputs),
                dtypes,
                a,
                r,
                why,
            )
            for dtypes, a, r, why in (
                (("f64",), 1e-13, 1e-11, "float64 throughout"),
                (("f32",), 2e-6, 1e-5, _WHY_GRADIENT),
                (("f16",), 1e-5, 1e-3, _WHY_GRADIENT),
                (("bf16",), 1e-5, 8e-3, _WHY_GRADIENT),
            )
        ),
    ]

# ---- fusion -------------------------------------------------------------------------------------

_VAR, _ENT, _MI = range(3)
_EXP, _LINEAR, _GATE, _CONF, _NONE = range(5)
_SUMS = (
    "float32: sums of S numbers of at most 1 and weight 1/S, differences of entropies of at most ln C, each "
    "within a few eps = 6e-8; a map is scaled by at most 2 and a weight by kappa = 4. Half precision is "
    "input only. The reference has the sources in float64, so float64 is far below that."
)


def _fuse(
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
    numbers = (4.0, *tau, log_offset, 255, channels or sources[0].shape[1])
    tables = [None if r is None else _per_sample(r, sources) for r in (r_lab, r_unc)]
    return (sources, *tables, logits, unc, weighting, *numbers, *want)


def _per_sample(r: Any, sources: list[np.ndarray]) -> np.ndarray:
    """One weight per source, or per source and sample, as a table [S, B]."""
    s, b = len(sources), len(sources[0])
    return np.array(np.broadcast_to(np.reshape(r, (s, -1)), (s, b)), np.float64)


def _simplex(rng: np.random.Generator, s: int, *shape: int, dim: int = 1) -> list[np.ndarray]:
    """S distributions that mostly agree: one common logit map and some disagreement."""
    common = 3 * rng.standard_normal(shape)
    z = [np.exp(common + rng.standard_normal(shape)) for _ in range(s)]
    return [v / v.sum(dim, keepdims=True) for v in z]


def _logits(rng: np.random.Generator, s: int, *shape: int) -> list[np.ndarray]:
    common = 4 * rng.standard_normal(shape)
    return [common + 2 * rng.standard_normal(shape) for _ in range(s)]


def _columns(rng: np.random.Generator, s: int, b: int) -> np.ndarray:
    """A table [S, B]: some 0, the rest at random, with sum 1."""
    r = rng.random((s, b)) * (rng.random((s, b)) > 0.3)
    r[0] += 0.1
    return r / r.sum(0)


def _fuse_by_table(
    logits: int, channels: int, unc: int, weighting: int, rng: np.random.Generator
) -> tuple[Any, ...]:
    """Five sources, four samples: random weights, one source alone, none, the same for label and doubt.

    What has no weight in a sample is NaN there.
    """
    lab, doubt = _columns(rng, 5, 4), _columns(rng, 5, 4)
    lab[:, 1], doubt[:, 1] = np.eye(5)[2], np.eye(5)[2]
    lab[:, 2] = doubt[:, 2] = 0
    doubt[:, 3] = lab[:, 3]
    if logits:
        sources = _logits(rng, 5, 4, channels, 9, 12)
    elif channels == 1:
        sources = [_prob(rng, 4, 1, 9, 12) for _ in range(5)]
    else:
        sources = _simplex(rng, 5, 4, channels, 9, 12)
    for s, p in enumerate(sources):
        p[(lab[s] == 0) & (doubt[s] == 0)] = np.nan
    tau = (0.61, 0.43) if weighting in (_GATE, _EXP) else (0.0, 1.0)
    return _fuse(sources, unc, weighting, lab, doubt, logits=logits, tau=tau)


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
        # Widths, alignments and counts that CUDA kernels tell apart.
        "one-channel-wide": lambda r: _fuse([_prob(r, 2, 1, 8, 12) for _ in range(6)], channels=2),
        "one-channel-logits-two-means": lambda r: _fuse(
            _logits(r, 4, 2, 1, 9, 12), _ENT, _LINEAR, *_R4, logits=1
        ),
        "two-channels-logits-var": lambda r: _fuse(_logits(r, 4, 2, 2, 9, 12), _VAR, _EXP, *_R4, logits=1),
        "logits-14": lambda r: _fuse(_logits(r, 3, 1, 14, 7, 9), _MI, _CONF, logits=1),
        "logits-14-two-means": lambda r: _fuse(_logits(r, 4, 1, 14, 7, 9), _VAR, _EXP, *_R4, logits=1),
        "logits-many": lambda r: _fuse(_logits(r, 50, 1, 20, 37), _ENT, _LINEAR, logits=1),
        "many-sources": lambda r: _fuse(_simplex(r, 128, 1, 2, 40), _MI),
        # Tables: of every kernel, with other sources in every sample, and none in some.
        **{
            f"table-{name}": partial(_fuse_by_table, *settings)
            for name, settings in {
                "one-channel": (0, 1, _VAR, _EXP),
                "one-channel-mi": (0, 1, _MI, _LINEAR),
                "one-channel-logits": (1, 1, _ENT, _LINEAR),
                "two-channels": (0, 2, _VAR, _GATE),
                "two-channels-logits": (1, 2, _ENT, _LINEAR),
                "two-channels-logits-var": (1, 2, _VAR, _EXP),
                "logits-4": (1, 4, _MI, _CONF),
                "logits-7": (1, 7, _VAR, _EXP),
                "logits-14": (1, 14, _ENT, _NONE),
                "logits-20": (1, 20, _MI, _EXP),
            }.items()
        },
        "table-of-labels-alone": lambda r: _fuse(_simplex(r, 3, 2, 3, 50), _VAR, _EXP, _TABLE[0]),
        "table-of-doubt-alone": lambda r: _fuse(_simplex(r, 3, 2, 3, 50), _VAR, _EXP, None, _TABLE[1]),
        "table-of-nothing": lambda r: _fuse(_simplex(r, 3, 2, 3, 50), _ENT, _EXP, np.zeros((3, 2))),
        "table-of-many-sources": lambda r: _fuse(
            _simplex(r, 128, 3, 2, 20), _VAR, _EXP, _columns(r, 128, 3), _columns(r, 128, 3)
        ),
    }.items()
]

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


def _rimmed(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """A mask whose last voxels are to be ignored (255)."""
    mask = _blobs(rng, 2, *shape)
    mask[:, -700:] = 255
    return mask


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
    Case("overlap", "bits", lambda r: (_blobs(r, 2, 3, 9001) > 0, _blobs(r, 2, 3, 9001), 2, 0, 0), ()),
    Case("overlap", "bits, many", lambda r: (_blobs(r, 2, 2, 4160), _blobs(r, 2, 2, 4160), 9, 1, 3), ()),
    Case("overlap", "bits, 0 ignored", lambda r: (_blobs(r, 2, 2, 5000), _blobs(r, 2, 2, 5000), 2, 1, 0), ()),
    Case("overlap", "bits, 1 ignored", lambda r: (_blobs(r, 2, 2, 5000), _blobs(r, 2, 2, 5000), 2, 1, 1), ()),
    Case(
        "overlap", "bits, some ignored", lambda r: (_blobs(r, 2, 2, 9000), _rimmed(r, 2, 9000), 2, 1, 255), ()
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
    """A tensor in memory of torch's own, which begins with a cache line, as a network's outputs do."""
    return importlib.import_module("torch").from_numpy(a).clone()


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
        "answer's mask and span 2x128^3",
        lambda r: _torch(r.standard_normal((2, 1, 128, 128, 128), np.float32)),
        lambda z: _ours("prompts.answer_mask", z),
        ("answer_torch",),
        lambda z: z.nbytes + z.nbytes // 4,
        {"best": 2, "floor": 1.5},
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


def _labeled(shape: tuple[int, ...], dtype: Any) -> Callable[[np.random.Generator], Any]:
    """Logits of a trained network (right for most voxels) and labels of round organs."""

    def make(rng: np.random.Generator) -> Any:
        b, c, *space = shape
        labels = np.zeros((b, *space), dtype)
        grid = np.meshgrid(*(np.linspace(-1, 1, s) for s in space), indexing="ij")
        for k in range(1, c):
            middle = rng.uniform(-0.6, 0.6, (b, len(space)))
            for i in range(b):
                distance = sum((g - m) ** 2 for g, m in zip(grid, middle[i], strict=True))
                labels[i][distance < 0.12] = k
        z = rng.standard_normal(shape, np.float32)
        z += 3 * (labels[:, None] == np.arange(c).reshape(1, -1, *[1] * len(space)))
        return _torch(z).requires_grad_(), _torch(labels)

    return make


def _soft(shape: tuple[int, ...]) -> Callable[[np.random.Generator], Any]:
    def make(rng: np.random.Generator) -> Any:
        z, labels = _labeled(shape, np.int64)(rng)
        q = (z + _torch(rng.standard_normal(shape, np.float32))).softmax(1).detach()
        w = _torch(rng.random(labels.shape, np.float32))
        return z, labels, q, w

    return make


def _loss_and_gradient(terms: Callable[..., list]) -> Callable[[Any], Any]:
    def run(data: Any) -> Any:
        term = importlib.import_module("semisam.losses").Term
        z = data[0]
        z.grad = None
        loss = _ours("losses.voxel_loss", z, terms(term, *data[1:]))
        loss.backward()
        return loss.item(), z.grad

    return run


def _gradient_buffer(data: Any) -> Any:
    """The two operators themselves, writing into buffers that exist."""
    z, y, buffer, values, stats, params = data
    core, threads = (
        importlib.import_module("semisam._core"),
        importlib.import_module("torch").get_num_threads(),
    )
    core.voxel_loss_forward(z, [y], [], params, 0, 2, values, stats, threads)
    core.voxel_loss_backward(z, [y], [], params, stats, values * 0 + 1, 0, 2, buffer, threads)
    return values.sum().item(), buffer


def _buffered(shape: tuple[int, ...], dtype: Any) -> Callable[[np.random.Generator], Any]:
    def make(rng: np.random.Generator) -> Any:
        z, y = _labeled(shape, dtype)(rng)
        z = z.detach()
        b, c = shape[:2]
        params = _term(c, "ce", 0, -1, 0, b) + _term(c, "dice", 0, -1, 0, b)
        values, stats = z.new_zeros(2, b, c).double(), z.new_zeros(2, b, c, 4).double()
        return z, y, z * 0, values, stats, params

    return make


def _loss_difference(a: Any, b: Any) -> float:
    """The larger relative difference of loss and gradient."""
    return max(abs(a[0] - b[0]) / abs(b[0]), float((a[1] - b[1]).abs().max() / b[1].abs().max()))


def _moved(data: Any) -> int:
    """Logits and targets twice, the gradient once."""
    return 3 * data[0].nbytes + 2 * data[1].nbytes


_LA, _DICE_CE = (
    (4, 2, 112, 112, 80),
    ("dice_ce_torch", "dice_ce_compiled", "dice_ce_monai", "dice_ce_published"),
)
_dice_ce = _loss_and_gradient(lambda term, y: [term("ce", y), term("dice", y)])
for _name, _shape, _dtype, _targets in (
    ("LA 4x2x112x112x80 int64", _LA, np.int64, {"best": 8.0, "dice_ce_published": 12.0, "floor": 1.25}),
    ("LA 4x2x112x112x80 uint8", _LA, np.uint8, {"best": 8.0, "dice_ce_published": 12.0, "floor": 1.4}),
    ("2x4x96^3 int64", (2, 4, 96, 96, 96), np.int64, {"best": 8.0, "dice_ce_published": 12.0, "floor": 1.25}),
    ("2x14x96^3 int64", (2, 14, 96, 96, 96), np.int64, {"best": 3.0}),
    ("8x2x256^2 int64", (8, 2, 256, 256), np.int64, {"best": 8.0, "dice_ce_published": 12.0, "floor": 1.1}),
):
    SPEEDS.append(
        Speed(
            f"dice+ce {_name}",
            _labeled(_shape, _dtype),
            _dice_ce,
            _DICE_CE,
            _moved,
            _targets,
            _loss_difference,
            5,
        )
    )
SPEEDS += [
    Speed(
        "dice+ce 2x14x96^3 int64 given buffer",
        _buffered((2, 14, 96, 96, 96), np.int64),
        _gradient_buffer,
        ("dice_ce_torch", "dice_ce_compiled"),
        _moved,
        {"best": 5.0, "floor": 1.4},
        _loss_difference,
        5,
    ),
    *(
        Speed(
            f"{name} LA 4x2x112x112x80",
            _soft(_LA),
            _loss_and_gradient(terms),
            (f"{peer}_torch", f"{peer}_compiled"),
            moved,
            targets,
            _loss_difference,
            5,
        )
        for name, peer, terms, moved, targets in (
            (
                "softmax mse",
                "mse",
                lambda term, y, q, w: [term("mse", q)],
                lambda d: 5 * d[0].nbytes,
                {"best": 6.0, "floor": 1.3},
            ),
            (
                "kl",
                "kl",
                lambda term, y, q, w: [term("kl", q)],
                lambda d: 5 * d[0].nbytes,
                {"best": 6.0, "floor": 1.3},
            ),
            (
                "entropy",
                "entropy",
                lambda term, y, q, w: [term("entropy")],
                lambda d: 3 * d[0].nbytes,
                {"best": 5.0, "floor": 1.5},
            ),
        )
    ),
    Speed(
        "ssl objective LA 2 labeled + 2 unlabeled",
        _soft(_LA),
        _loss_and_gradient(
            lambda term, y, q, w: [
                term("ce", h := y[:2], samples=(0, 2)),
                term("dice", h, samples=(0, 2)),
                term("mse", q[2:], w[2:], samples=(2, 4), scale=0.1, reduction="element"),
                term("entropy", samples=(2, 4), scale=0.01),
            ]
        ),
        ("ssl_torch", "ssl_compiled"),
        lambda d: 3 * d[0].nbytes + d[1].nbytes + d[2].nbytes + d[3].nbytes,
        {"ssl_torch": 8.0, "floor": 1.4},
        _loss_difference,
        5,
    ),
]

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
        lambda z: _ours("fusion.mc_uncertainty", z, want=("uncertainty",)).uncertainty,
        ("mc_entropy_torch", "mc_entropy_compile"),
        lambda z: 8 * z[0].nbytes + z[0].nbytes // 2,
        {"best": 6, "floor": 1.5},
        lambda a, b: float((math.log(2) * a - b).abs().max()),  # ours is 1 where the peers' is ln 2
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
    _edt_speed("40x50x35, 8 % full", lambda r: organ(r, (40, 50, 35), 0.08), {"edt_edt": 2.5}),
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
