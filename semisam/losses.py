# SPDX-License-Identifier: Apache-2.0
"""Losses over voxels: any sum of terms on the same logits in one forward and one backward sweep.

`voxel_loss` is the engine: a list of `Term`s (cross entropy, Dice, squared error, Kullback-Leibler
divergence, entropy), each on all or some samples of the batch, with or without voxel weights. One-hot
labels and probabilities are never stored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from semisam import ops

__all__ = ["Term", "voxel_loss"]

_KINDS = ("ce", "dice", "mse", "kl", "entropy")
_ACTIVATIONS = ("softmax", "sigmoid", "none")
_REDUCTIONS = ("voxel", "element", "sample", "sum")
_ALLOWED = {"softmax": _KINDS, "sigmoid": ("ce", "dice", "mse"), "none": ("dice", "mse")}


@dataclass(frozen=True, eq=False)
class Term:
    """One term of a sum of losses on the same logits [B, C, *S]; see `voxel_loss`.

    `target`: integer labels [b, *S] or [b, 1, *S], or a distribution over classes [b, C, *S]; none for
    entropy. `weight`: voxel weights [b, *S] or [b, 1, *S], at least 0, any dtype. `samples`: the first
    sample of the batch that target and weight belong to, and the last one + 1. With m the weight (0
    where a label is `ignore_index`), p the probabilities, q the target distribution, a the class weights:

        ce       sum m a_y (lse z - z_y) / sum m a_y;  soft targets: sum m sum_c a_c q_c (lse z - z_c) / sum m
                 (sigmoid: binary cross entropy, mean over voxels and channels)
        dice     sum_c a_c (1 - (2 I_c + smooth_nr) / (Z_c + Y_c + smooth_dr)) / sum a,
                 I = sum m p q,  Z, Y = sum m p^2, sum m q^2 (not `squared_pred`: without the squares);
                 `jaccard`: 2 (Z + Y - I) for Z + Y; `batch`: sums over all samples, else per sample, averaged
        mse      sum m sum_c (p_c - q_c)^2 / sum m
        kl       sum m sum_c q_c ln(q_c / p_c) / sum m
        entropy  -sum m sum_c p_c ln p_c / (sum m ln C)

    `reduction` (not for dice): "voxel" as above; "element" divides by C, too; "sum" does not divide;
    "sample" divides by the weights of each sample by itself (mse: and by C), and averages over those
    samples whose weights sum up to at least `min_weight` times their number of voxels. Where all
    weights are 0, the loss and its gradient are 0.
    """

    kind: str
    target: Any = None
    weight: Any = None
    samples: tuple[int, int] | None = None
    scale: float = 1.0
    class_weight: Sequence[float] | None = None
    ignore_index: int | None = 255
    label_smoothing: float = 0.0
    include_background: bool = True
    squared_pred: bool = True
    batch: bool = True
    jaccard: bool = False
    smooth_nr: float = 1e-5
    smooth_dr: float = 1e-5
    reduction: str = "voxel"
    min_weight: float = 1e-3

    def __post_init__(self) -> None:
        """Check what can be checked without the logits."""
        if self.kind not in _KINDS:
            raise ValueError(f"Term(): kind: expected one of {', '.join(_KINDS)}, got {self.kind!r}")
        if self.reduction not in _REDUCTIONS:
            raise ValueError(
                f"Term(): reduction: expected one of {', '.join(_REDUCTIONS)}, got {self.reduction!r}"
            )
        if (self.target is None) != (self.kind == "entropy"):
            what = "no target" if self.kind == "entropy" else "labels or a distribution"
            raise ValueError(
                f"Term(): target: expected {what} for {self.kind!r}, got {type(self.target).__name__}"
            )
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(
                f"Term(): label_smoothing: expected a number in [0, 1), got {self.label_smoothing}"
            )
        for name in ("smooth_nr", "smooth_dr", "min_weight"):
            value = getattr(self, name)
            if not 0.0 <= value < math.inf:
                raise ValueError(f"Term(): {name}: expected a number >= 0, got {value}")


def voxel_loss(
    logits: Any, terms: Sequence[Term], *, activation: str = "softmax", reduction: str = "sum"
) -> Any:
    """Return the sum of `scale * term` over voxels, each voxel read once forward and once backward.

    `logits` is [B, C, *S] with one to three spatial dimensions, f16, bf16, f32 or f64, torch (with
    gradient) or NumPy (values only); arithmetic is float32 (float64 for float64), sums are float64.
    `activation`: "softmax", "sigmoid" (ce, dice, mse; with C = 1 a label 1 is the channel's class), or
    "none": the input already is a probability (dice, mse). `reduction="none"` returns a tuple with an
    array per term instead, without scale: dice [b or 1, C'] class losses times class weight (C' = C - 1
    without background), others one value per sample [b], normalized by that sample's weights.

    Results are float32 (float64 for float64 logits) and do not depend on the number of threads.
    Raises TypeError for arrays of mixed kinds or wrong dtypes, ValueError for shapes that do not fit,
    labels outside 0..C-1 that are not `ignore_index`, and negative weights.

    >>> import torch
    >>> from semisam.losses import Term, voxel_loss
    >>> logits = torch.zeros(1, 2, 4, 4, requires_grad=True)
    >>> labels = torch.ones(1, 4, 4, dtype=torch.uint8)
    >>> loss = voxel_loss(logits, [Term("ce", labels), Term("dice", labels, include_background=False)])
    >>> loss.backward()
    >>> round(loss.item(), 4), logits.grad.shape
    (0.8931, torch.Size([1, 2, 4, 4]))
    """
    plan = _Plan(logits, terms, activation, reduction)
    if isinstance(logits, torch.Tensor):
        values = ops.voxel_loss(
            plan.logits, plan.targets, plan.weights, plan.params, plan.activation, len(terms)
        )
    else:
        values = ops.call(
            *("voxel_loss_forward", plan.logits, plan.targets, plan.weights, plan.params),
            *(plan.activation, len(terms)),
        )[0]
    return plan.reduced(values)


class _Plan:
    """Arguments of the operator made from logits and terms, checked; and what to do with its values."""

    def __init__(self, logits: Any, terms: Sequence[Term], activation: str, reduction: str) -> None:
        if activation not in _ACTIVATIONS:
            raise ValueError(
                f"voxel_loss(): activation: expected one of {', '.join(_ACTIVATIONS)}, got {activation!r}"
            )
        if reduction not in ("sum", "none"):
            raise ValueError(f"voxel_loss(): reduction: expected sum or none, got {reduction!r}")
        if not len(terms):
            raise ValueError("voxel_loss(): terms: expected at least one Term, got none")
        if not isinstance(logits, (torch.Tensor, np.ndarray)):
            raise TypeError(
                f"voxel_loss(): logits: expected a torch tensor or NumPy array, got {type(logits).__name__}"
            )
        if not 3 <= logits.ndim <= 5:
            raise ValueError(
                f"voxel_loss(): logits: expected shape (B, C, spatial...) with 1 to 3 spatial dimensions, "
                f"got {tuple(logits.shape)}"
            )
        if activation == "softmax" and logits.shape[1] == 1:
            raise ValueError(
                "voxel_loss(): logits: expected at least 2 channels for softmax, got 1; use sigmoid"
            )
        self.logits = logits
        self.shape = tuple(logits.shape)
        self.terms = tuple(terms)
        self.sum = reduction == "sum"
        self.activation = _ACTIVATIONS.index(activation)
        self.targets: list[Any] = []
        self.weights: list[Any] = []
        self.params: list[float] = []
        for i, term in enumerate(self.terms):
            if term.kind not in _ALLOWED[activation]:
                raise ValueError(
                    f"voxel_loss(): terms[{i}]: expected one of {', '.join(_ALLOWED[activation])} "
                    f"with activation {activation!r}, got {term.kind!r}"
                )
            self.params += self._row(term, f"terms[{i}]")

    def _row(self, term: Term, label: str) -> list[float]:
        """Return one term as numbers: `TERM_FIELDS` of reference.py, then class weights."""
        b, c, *_ = self.shape
        first, last = (0, b) if term.samples is None else map(int, term.samples)
        if not 0 <= first < last <= b:
            raise ValueError(
                f"voxel_loss(): {label}.samples: expected 0 <= first < last <= {b}, got {(first, last)}"
            )
        target = self._target(term.target, last - first, label)
        weight = self._weight(term.weight, last - first, label)
        numbers = (
            *(_KINDS.index(term.kind), target, weight, first, last),
            *(term.ignore_index is not None, -1 if term.ignore_index is None else term.ignore_index),
            *(term.label_smoothing, term.include_background, term.squared_pred, term.batch, term.jaccard),
            *(term.smooth_nr, term.smooth_dr, _REDUCTIONS.index(term.reduction), term.min_weight, self.sum),
        )
        return [float(v) for v in numbers] + self._class_weight(term, c, label)

    def _class_weight(self, term: Term, channels: int, label: str) -> list[float]:
        if term.class_weight is None:
            return [1.0] * channels
        if term.kind not in ("ce", "dice") or (term.kind == "ce" and self.activation != 0):
            raise ValueError(
                f"voxel_loss(): {label}.class_weight: expected None; only dice, and ce with softmax, have one"
            )
        values = [float(v) for v in term.class_weight]
        if len(values) != channels or not all(0.0 <= v < math.inf for v in values):
            raise ValueError(
                f"voxel_loss(): {label}.class_weight: expected {channels} numbers >= 0, got {values}"
            )
        return values

    def _target(self, target: Any, samples: int, label: str) -> int:
        if target is None:
            return -1
        self._check_kind(target, f"{label}.target")
        _, c, *space = self.shape
        shape = tuple(target.shape)
        hard = shape in ((samples, *space), (samples, 1, *space))
        floating = _is_floating(target)
        if shape == (samples, c, *space) and (c > 1 or floating):
            return _place(self.targets, target)
        if hard and floating:
            raise TypeError(
                f"voxel_loss(): {label}.target: expected an integer dtype for labels of shape {shape}, "
                f"got {ops.dtype_name(target)}"
            )
        if not hard:
            raise ValueError(
                f"voxel_loss(): {label}.target: expected labels {(samples, *space)} "
                f"or a distribution {(samples, c, *space)}, got {shape}"
            )
        return _place(self.targets, target)

    def _weight(self, weight: Any, samples: int, label: str) -> int:
        if weight is None:
            return -1
        self._check_kind(weight, f"{label}.weight")
        space = self.shape[2:]
        shape = tuple(weight.shape)
        if shape not in ((samples, *space), (samples, 1, *space)):
            raise ValueError(f"voxel_loss(): {label}.weight: expected shape {(samples, *space)}, got {shape}")
        return _place(self.weights, weight)

    def _check_kind(self, array: Any, label: str) -> None:
        kind = torch.Tensor if isinstance(self.logits, torch.Tensor) else np.ndarray
        if not isinstance(array, kind):
            name = "torch tensor" if kind is torch.Tensor else "NumPy array"
            raise TypeError(
                f"voxel_loss(): {label}: expected a {name} as the logits are, got {type(array).__name__}"
            )

    def reduced(self, values: Any) -> Any:
        """Return the weighted sum of the terms, or the tuple of their values."""
        if isinstance(values, np.ndarray):
            dtype: Any = np.float64 if self.logits.dtype == np.float64 else np.float32
            if self.sum:
                scales = np.array([t.scale for t in self.terms])
                return dtype((values.sum((1, 2)) * scales).sum())
            return tuple(self._none(i, values[i]).astype(dtype) for i in range(len(self.terms)))
        dtype = torch.float64 if self.logits.dtype == torch.float64 else torch.float32
        if self.sum:
            scales = values.new_tensor([t.scale for t in self.terms])
            return (values.sum((1, 2)) * scales).sum().to(dtype)
        return tuple(self._none(i, values[i]).to(dtype) for i in range(len(self.terms)))

    def _none(self, i: int, value: Any) -> Any:
        term = self.terms[i]
        first, last = (0, self.shape[0]) if term.samples is None else term.samples
        if term.kind != "dice":
            return value[first:last, 0]
        return value[first : first + 1 if term.batch else last, 0 if term.include_background else 1 :]


def _is_floating(array: Any) -> bool:
    if isinstance(array, torch.Tensor):
        return array.is_floating_point()
    return bool(np.issubdtype(array.dtype, np.floating))


def _place(places: list[Any], array: Any) -> int:
    """Return the index of `array` in `places`, adding it if need be: terms share what they share."""
    for i, other in enumerate(places):
        if other is array:
            return i
    places.append(array)
    return len(places) - 1
