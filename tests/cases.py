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

# ---- distances and components -------------------------------------------------------------------

# ---- metrics ------------------------------------------------------------------------------------

# ---- random walker ------------------------------------------------------------------------------
