# SPDX-License-Identifier: Apache-2.0
"""Losses over voxels: any sum of terms on the same logits in one forward and one backward sweep.

`voxel_loss` is the engine: a list of `Term`s (cross entropy, Dice, squared error, Kullback-Leibler
divergence, entropy), each on all or some samples of the batch, with or without voxel weights. One-hot
labels and probabilities are never stored. Below it are the losses by name, in the calling form of MONAI
and torch: functions that make such a list, and modules that keep a function's arguments.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from semisam import ops

__all__ = [
    "CrossEntropyLoss",
    "CrossPseudoLabelLoss",
    "DiceCELoss",
    "DiceLoss",
    "EntropyLoss",
    "SoftmaxKLLoss",
    "SoftmaxMSELoss",
    "Term",
    "UncertaintyWeightedLoss",
    "cross_entropy",
    "cross_pseudo_label_loss",
    "dice_ce_loss",
    "dice_loss",
    "entropy_loss",
    "softmax_kl_loss",
    "softmax_mse_loss",
    "ssl_objective",
    "uncertainty_weighted_loss",
    "voxel_loss",
]

Weights: TypeAlias = Sequence[float] | float | torch.Tensor | None

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

    >>> import torch
    >>> from semisam.losses import Term, voxel_loss
    >>> labels = torch.ones(1, 4, 4, dtype=torch.uint8)
    >>> half = torch.zeros(3, 2, 4, 4)  # logits of one labeled and two unlabeled samples
    >>> terms = [Term("ce", labels, samples=(0, 1)), Term("entropy", samples=(1, 3), scale=0.1)]
    >>> round(voxel_loss(half, terms).item(), 4)
    0.7931
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
    "none": the input already is a probability (dice, mse). `reduction="terms"` returns the summands
    [terms], each with its scale; "none" returns a tuple with an array per term, without scale: dice
    [b or 1, C'] class losses times class weight (C' = C - 1 without background), others one value per
    sample [b], normalized by that sample's weights.

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
        if reduction not in ("sum", "terms", "none"):
            raise ValueError(f"voxel_loss(): reduction: expected sum, terms or none, got {reduction!r}")
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
        self.reduction = reduction
        self.sum = reduction != "none"
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
        if array.device != self.logits.device:
            raise ValueError(
                f"voxel_loss(): {label}: expected a tensor on {self.logits.device}, where the logits are, "
                f"got one on {array.device}"
            )

    def reduced(self, values: Any) -> Any:
        """Return the weighted sum of the terms, or the tuple of their values."""
        if isinstance(values, np.ndarray):
            dtype: Any = np.float64 if self.logits.dtype == np.float64 else np.float32
            if self.sum:
                summands = values.sum((1, 2)) * np.array([t.scale for t in self.terms])
                return summands.astype(dtype) if self.reduction == "terms" else dtype(summands.sum())
            return tuple(self._none(i, values[i]).astype(dtype) for i in range(len(self.terms)))
        dtype = torch.float64 if self.logits.dtype == torch.float64 else torch.float32
        if self.sum:
            # Filled where they are needed: a copy from the host would make it wait for a GPU.
            scales = torch.stack([values.new_full((), t.scale) for t in self.terms])
            summands = values.sum((1, 2)) * scales
            return (summands if self.reduction == "terms" else summands.sum()).to(dtype)
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


# ---- losses by name -----------------------------------------------------------------------------
#
# Functions first; the modules below only keep their arguments. Every function makes a list of terms
# and hands it to `voxel_loss`.


def dice_loss(
    input: Any,
    target: Any,
    include_background: bool = True,
    to_onehot_y: bool = False,
    sigmoid: bool = False,
    softmax: bool = False,
    other_act: Callable[[Any], Any] | None = None,
    squared_pred: bool = False,
    jaccard: bool = False,
    reduction: str = "mean",
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    batch: bool = False,
    weight: Weights = None,
    soft_label: bool = False,
    ignore_index: int | None = None,
    *,
    voxel_weight: Any = None,
) -> Any:
    """Return the Dice (or Jaccard) loss; arguments, defaults and values are those of MONAI's DiceLoss.

    `input` is [B, C, *S]: logits if `sigmoid`, `softmax` or `other_act` is given, else probabilities.
    `target` is [B, C, *S], or with `to_onehot_y` class indices [B, 1, *S] or [B, *S] of any dtype; with one
    channel it is the mask [B, 1, *S]. `voxel_weight`: [B, *S] or [B, 1, *S], at least 0. With
    the sums over voxels I = sum p q, Z = sum p and Y = sum q (`squared_pred`: of the squares):

        f = 1 - (2 I + smooth_nr) / (Z + Y + smooth_dr)          jaccard: 2 (Z + Y - I) for Z + Y

    per class and sample, or per class if `batch`; `weight` multiplies the classes that
    are in (background out: C - 1 numbers). `reduction`: "mean" over classes and samples, "sum", or "none":
    [B, C', 1, ...], with `batch` [C', 1, ...]. `soft_label` takes sum min(p, q) for I, which is least at
    p = q for soft targets, too; with `squared_pred` the plain formula already is. `ignore_index` leaves
    voxels out: those of that label; of a one-hot target those of that channel, or, if there is none such,
    those that are 0 in every channel.

    What MONAI drops or lets pass without effect is refused here: one channel with `softmax` or with
    `include_background=False`, `weight` where one class remains, fractional class indices (MONAI cuts them
    off), integer masks with other values than 0 and 1, a negative weight also where it is unused, and a
    target that requires a gradient. One channel with `to_onehot_y` is a warning.

    Raises ValueError for those and for shapes, labels or options that do not fit, TypeError for an
    `other_act` that is not callable. Papers: V-Net (arXiv 1606.04797), Dice semimetric losses
    (arXiv 2303.16296).

    >>> import torch
    >>> from semisam.losses import dice_loss
    >>> labels = torch.tensor([[[[0, 1], [1, 2]]]])
    >>> logits = 20.0 * torch.nn.functional.one_hot(labels[:, 0], 3).movedim(-1, 1)
    >>> round(dice_loss(logits, labels, to_onehot_y=True, softmax=True).item(), 4)
    0.0
    """
    name = "dice_loss"
    _check_options(name, sigmoid, softmax, other_act, reduction, ("mean", "sum", "none"))
    classes = _check_channels(name, input, include_background, to_onehot_y, softmax)
    weights = _class_weights(name, weight, classes)
    if weights is not None and classes == 1:
        raise ValueError(f"{name}(): weight: expected None where one class remains, got {weight}")
    prob, activation = _activated(name, input, sigmoid, softmax, other_act)
    y, m, ignore = _target(name, input, target, to_onehot_y, ignore_index, voxel_weight)
    term = _dice_term(
        *(y, m, ignore, input.shape[1], include_background, squared_pred, jaccard),
        *(reduction, smooth_nr, smooth_dr, batch, weights, 1.0, input.shape[0]),
    )
    if soft_label and not squared_pred and not (to_onehot_y and activation != "none"):
        return _reduced(_l1_dice(prob, term, activation), reduction, batch, input.ndim)
    if reduction != "none":
        return voxel_loss(prob, [term], activation=activation)
    return _reduced(
        voxel_loss(prob, [term], activation=activation, reduction="none")[0], reduction, batch, input.ndim
    )


def dice_ce_loss(
    input: Any,
    target: Any,
    include_background: bool = True,
    to_onehot_y: bool = False,
    sigmoid: bool = False,
    softmax: bool = False,
    other_act: Callable[[Any], Any] | None = None,
    squared_pred: bool = False,
    jaccard: bool = False,
    reduction: str = "mean",
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    batch: bool = False,
    weight: Weights = None,
    lambda_dice: float = 1.0,
    lambda_ce: float = 1.0,
    label_smoothing: float = 0.0,
    *,
    ignore_index: int | None = None,
    voxel_weight: Any = None,
) -> Any:
    """Return lambda_dice * Dice + lambda_ce * cross entropy; arguments and values of MONAI's DiceCELoss.

    Shapes and the Dice options are those of `dice_loss`. The cross entropy is always that of the logits
    `input`: over the softmax, with one channel binary; `sigmoid`, `softmax` and `other_act` act on Dice
    only. `weight` has one number per class (background included) and weighs both; with one channel it is the
    weight of the positive voxels. `label_smoothing` acts on the cross entropy. With `softmax=True` (one
    channel: `sigmoid=True`) both share one sweep over the voxels, otherwise they take one each.
    `ignore_index` and `voxel_weight` are not in MONAI; they act on both.

    Besides what `dice_loss` refuses: `label_smoothing` with one channel, and labels of -100 (MONAI's cross
    entropy skips them). `weight` where one class remains is a warning, because it acts on the cross entropy
    alone; so is the lack of `sigmoid`, `softmax` and `other_act`, because Dice then takes logits for
    probabilities.

    Raises ValueError and TypeError as `dice_loss` does.

    >>> import torch
    >>> from semisam.losses import dice_ce_loss
    >>> labels = torch.ones(1, 1, 4, 4, dtype=torch.uint8)
    >>> round(dice_ce_loss(torch.zeros(1, 2, 4, 4), labels, to_onehot_y=True, softmax=True).item(), 4)
    1.3598
    """
    name = "dice_ce_loss"
    _check_options(name, sigmoid, softmax, other_act, reduction, ("mean", "sum"))
    _check_lambdas(name, lambda_dice=lambda_dice, lambda_ce=lambda_ce)
    if not (sigmoid or softmax or other_act):
        _warn(f"{name}(): Dice takes logits for probabilities; set softmax=True or sigmoid=True")
    classes = _check_channels(name, input, include_background, to_onehot_y, softmax)
    channels = input.shape[1]
    weights = _class_weights(name, weight, channels)
    if channels == 1 and label_smoothing:
        raise ValueError(f"{name}(): label_smoothing: expected 0 with one channel, got {label_smoothing}")
    if weights is not None and classes == 1:
        _warn(f"{name}(): weight: acts on the cross entropy only, for one class remains for Dice")
    y, m, ignore = _target(name, input, target, to_onehot_y, ignore_index, voxel_weight)
    dice = _dice_term(
        *(y, m, ignore, channels, include_background, squared_pred, jaccard, reduction, smooth_nr, smooth_dr),
        *(batch, None if classes == 1 or weights is None else weights[channels - classes :]),
        *(lambda_dice, input.shape[0]),
    )
    how = "voxel" if reduction == "mean" else "sum"
    prob, activation = _activated(name, input, sigmoid, softmax, other_act)
    if channels == 1 and weights is not None:
        total = lambda_ce * _positive_weighted(input, y, m, ignore, weights[0], how)
        return total + voxel_loss(prob, [dice], activation=activation) if lambda_dice else total
    ce = Term(
        *("ce", y, m, None, lambda_ce, weights, ignore, label_smoothing),
        reduction=how,
    )
    shared = "softmax" if channels > 1 else "sigmoid"
    if not lambda_dice:
        return voxel_loss(input, [ce], activation=shared)
    if not lambda_ce:
        return voxel_loss(prob, [dice], activation=activation)
    if activation == shared:
        return voxel_loss(input, [dice, ce], activation=shared)
    return voxel_loss(prob, [dice], activation=activation) + voxel_loss(input, [ce], activation=shared)


def cross_entropy(
    input: Any,
    target: Any,
    weight: Weights = None,
    ignore_index: int | None = 255,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    voxel_weight: Any = None,
) -> Any:
    """Return the cross entropy of logits [B, C, *S], C >= 2, as torch's cross_entropy defines it.

    `target`: class indices [B, *S] or [B, 1, *S], or a distribution [B, C, *S]; `weight`: one number per
    class; `voxel_weight` m: [B, *S] or [B, 1, *S]. With a the class weights, lse z = ln sum exp z, "mean" is

        sum m a_y (lse z - z_y) / sum m a_y,     for a distribution  sum m sum_c a_c q_c (lse z - z_c) / sum m

    and "sum" is that without the division. Unlike torch's, the default `ignore_index` is 255, the usual one
    of uint8 labels (None: no label is ignored), and where everything is ignored the loss is 0, not NaN.

    Raises ValueError for labels outside 0..C-1, shapes and options that do not fit.

    >>> import torch
    >>> from semisam.losses import cross_entropy
    >>> round(cross_entropy(torch.zeros(1, 4, 2, 2), torch.tensor([[[0, 1], [3, 255]]])).item(), 4)
    1.3863
    """
    name = "cross_entropy"
    _check_choice(name, "reduction", reduction, ("mean", "sum"))
    _check_channels(name, input, True, False, True)
    y = _labels_or_distribution(name, input, target)
    how = "voxel" if reduction == "mean" else "sum"
    weights = _class_weights(name, weight, input.shape[1])
    m = _fixed(name, "voxel_weight", voxel_weight, input)
    return voxel_loss(
        input, [Term("ce", y, m, None, 1.0, weights, ignore_index, label_smoothing, reduction=how)]
    )


def softmax_mse_loss(
    input: Any, target: Any, *, target_logits: bool = False, voxel_weight: Any = None, reduction: str = "mean"
) -> Any:
    """Return the weighted squared distance between softmax(input) and `target`.

    `input`: logits [B, C, *S]. `target`: a distribution q [B, C, *S], logits of one (`target_logits`), or
    class indices [B, *S] or [B, 1, *S]. `voxel_weight` w: [B, *S] or [B, 1, *S]; default 1.

        "mean": sum w sum_c (p_c - q_c)^2 / (C sum w)          "voxel": without C          "sum": not divided
        "sample": as "mean" for each sample by itself, averaged over samples that have weight (see
        `uncertainty_weighted_loss`)

    The consistency loss of Mean Teacher (arXiv 1703.01780) and UA-MT (arXiv 1907.07034: w is the mask of
    certain voxels), whose own function takes logits on both sides. All weights 0: loss and gradient are 0.

    Raises ValueError for shapes, labels and options that do not fit.

    >>> import torch
    >>> from semisam.losses import softmax_mse_loss
    >>> teacher = torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1).expand(1, 2, 4, 4)
    >>> softmax_mse_loss(torch.zeros(1, 2, 4, 4), teacher).item()
    0.25
    """
    return _distance("softmax_mse_loss", "mse", input, target, target_logits, voxel_weight, reduction)


def softmax_kl_loss(
    input: Any, target: Any, *, target_logits: bool = False, voxel_weight: Any = None, reduction: str = "mean"
) -> Any:
    """Return the weighted Kullback-Leibler divergence of softmax(input) from the distribution `target`.

    Arguments as in `softmax_mse_loss`.

        "mean": sum w sum_c q_c ln(q_c / p_c) / (C sum w)      "voxel": without C          "sum": not divided

    "mean" is torch's kl_div(reduction="mean"), "voxel" the divergence in nats; q_c = 0 adds 0.

    Raises ValueError for shapes, labels and options that do not fit.

    >>> import torch
    >>> from semisam.losses import softmax_kl_loss
    >>> one_hot = torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1).expand(1, 2, 4, 4)
    >>> round(softmax_kl_loss(torch.zeros(1, 2, 4, 4), one_hot, reduction="voxel").item(), 4)
    0.6931
    """
    return _distance("softmax_kl_loss", "kl", input, target, target_logits, voxel_weight, reduction)


def entropy_loss(input: Any, *, voxel_weight: Any = None, reduction: str = "mean") -> Any:
    """Return the weighted normalised entropy of softmax(input), 0 (certain) to 1 (uniform).

    `input`: logits [B, C, *S]; `voxel_weight` w: [B, *S] or [B, 1, *S]; default 1.

        "mean": -sum w sum_c p_c ln p_c / (sum w ln C)         "sum": without sum w
        "sample": as "mean" for each sample by itself, averaged over samples that have weight

    Computed from logits, exact down to entropy 0: no constant inside the logarithm.

    Raises ValueError for shapes and options that do not fit. Paper: arXiv 1811.12833.

    >>> import torch
    >>> from semisam.losses import entropy_loss
    >>> round(entropy_loss(torch.zeros(2, 3, 4, 4)).item(), 4)
    1.0
    """
    name = "entropy_loss"
    _check_choice(name, "reduction", reduction, ("mean", "sample", "sum"))
    _check_channels(name, input, True, False, True)
    m = _fixed(name, "voxel_weight", voxel_weight, input)
    how = "voxel" if reduction == "mean" else reduction
    return voxel_loss(input, [Term("entropy", weight=m, reduction=how)])


def uncertainty_weighted_loss(
    input: Any,
    target: Any,
    voxel_weight: Any = None,
    *,
    loss: str = "mse",
    min_weight: float = 1e-3,
    ignore_index: int | None = 255,
    smooth: float = 1e-5,
) -> Any:
    """Return L_sam, the generalist's term: each sample's distance to its pseudo-label, weighted per voxel.

    `input`: logits [B, C, *S] of the unlabeled samples. `target`: the fused distribution q [B, C, *S] or hard
    pseudo-labels [B, *S] or [B, 1, *S] (`ignore_index`: too uncertain). `voxel_weight` w: [B, *S] or
    [B, 1, *S] in 0..1, falling with uncertainty; default 1.

        L = (1 / |V'|) sum over n in V' of (1 / W_n) sum_v w_nv d_nv,     W_n = sum_v w_nv
        V' = {n: W_n >= min_weight * number of voxels};  empty: L = 0 with zero gradient
        d: "mse" (1/C) sum_c (p_c - q_c)^2;  "ce" cross entropy;  "ce_dice" that plus Dice, weighted likewise

    Dividing each sample by its own weight keeps a scan that is badly understood from dominating or from
    drowning; scaling all weights of a sample changes nothing (with "mse" and "ce").

    Raises ValueError for shapes, labels and options that do not fit. Paper: SemiSAM+ (arXiv 2502.20749).

    >>> import torch
    >>> from semisam.losses import uncertainty_weighted_loss
    >>> pseudo = torch.ones(2, 8, 8, dtype=torch.uint8)
    >>> certain = torch.ones(2, 8, 8)
    >>> certain[1] = 0.0
    >>> uncertainty_weighted_loss(torch.zeros(2, 2, 8, 8), pseudo, certain).item()
    0.25
    """
    name = "uncertainty_weighted_loss"
    _check_choice(name, "loss", loss, ("mse", "ce", "ce_dice"))
    _check_channels(name, input, True, False, True)
    y = _labels_or_distribution(name, input, target)
    m = _fixed(name, "voxel_weight", voxel_weight, input)
    kind = "mse" if loss == "mse" else "ce"
    terms = [Term(kind, y, m, ignore_index=ignore_index, reduction="sample", min_weight=min_weight)]
    if loss == "ce_dice":
        kept = _kept(input, y, m, ignore_index, min_weight)
        terms.append(Term("dice", y, kept, ignore_index=ignore_index, smooth_nr=smooth, smooth_dr=smooth))
    return voxel_loss(input, terms)


def cross_pseudo_label_loss(
    input: Any,
    target: Any,
    voxel_weight: Any = None,
    *,
    include_background: bool = True,
    ignore_index: int | None = 255,
    smooth: float = 1e-5,
) -> Any:
    """Return cross entropy + Dice against the other network's hard labels, under one voxel weight.

    `input`: logits [B, C, *S]; `target`: the other network's argmax, [B, *S] or [B, 1, *S];
    `voxel_weight` m: [B, *S] or [B, 1, *S]; default 1. Dice is that with squared denominators
    over the whole batch, averaged over classes:

        sum m (lse z - z_y) / sum m  +  mean_c (1 - (2 I_c + smooth) / (Z_c + Y_c + smooth)),
        I = sum m p t,  Z = sum m p^2,  Y = sum m t

    where t is the one-hot form of the labels and m = 0 where the label is `ignore_index`.

    Raises TypeError for labels that are not integers, ValueError for labels outside 0..C-1 and shapes that
    do not fit. Papers: SC-SAM (arXiv 2601.17934), cross pseudo supervision (arXiv 2106.01226).

    >>> import torch
    >>> from semisam.losses import cross_pseudo_label_loss
    >>> other = torch.ones(1, 4, 4, dtype=torch.uint8)
    >>> round(cross_pseudo_label_loss(torch.zeros(1, 2, 4, 4), other, include_background=False).item(), 4)
    0.8931
    """
    name = "cross_pseudo_label_loss"
    _check_channels(name, input, include_background, False, True)
    y = _labels_or_distribution(name, input, target)
    if tuple(y.shape) == tuple(input.shape):
        raise ValueError(
            f"{name}(): target: expected labels {(input.shape[0], *input.shape[2:])}, got {tuple(y.shape)}; "
            "take the argmax over the classes"
        )
    m = _fixed(name, "voxel_weight", voxel_weight, input)
    dice = Term(
        *("dice", y, m),
        ignore_index=ignore_index,
        include_background=include_background,
        smooth_nr=smooth,
        smooth_dr=smooth,
    )
    return voxel_loss(input, [Term("ce", y, m, ignore_index=ignore_index), dice])


def ssl_objective(
    input: Any,
    labels: Any,
    pseudo: Any = None,
    voxel_weight: Any = None,
    *,
    lambda_ce: float = 0.5,
    lambda_dice: float = 0.5,
    lambda_pseudo: float = 1.0,
    lambda_entropy: float = 0.0,
    loss: str = "mse",
    include_background: bool = True,
    ignore_index: int | None = 255,
    smooth: float = 1e-5,
    min_weight: float = 1e-3,
) -> Any:
    """Return a whole semi-supervised objective on one batch of logits, in one sweep over its voxels.

    `input`: logits [B, C, *S]; the first B_l samples are labeled, the last B_u = B - B_l are not. `labels`:
    [B_l, *S] or [B_l, 1, *S]. `pseudo`: distribution [B_u, C, *S] or labels [B_u, *S]; `voxel_weight`:
    [B_u, *S]. With l the labeled and u the unlabeled samples:

        lambda_ce * ce(l) + lambda_dice * dice(l) + lambda_pseudo * L_sam(u) + lambda_entropy * entropy(u)

    ce: mean over voxels; dice: squared, over the labeled samples jointly; L_sam:
    `uncertainty_weighted_loss` with `loss` "mse" or "ce"; entropy: `entropy_loss` without weights. Another
    objective is another list of terms; this one is

        voxel_loss(input, [Term("ce", labels, samples=(0, l), scale=lambda_ce),
                           Term("dice", labels, samples=(0, l), scale=lambda_dice),
                           Term("mse", pseudo, voxel_weight, (l, b), lambda_pseudo, reduction="sample"),
                           Term("entropy", samples=(l, b), scale=lambda_entropy)])

    A term whose lambda is 0 is left out. Labels of unlabeled samples are no argument, so that none can leak.

    Raises ValueError for shapes, labels and options that do not fit.

    >>> import torch
    >>> from semisam.losses import ssl_objective
    >>> labels = torch.ones(1, 4, 4, dtype=torch.uint8)
    >>> pseudo = torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1).expand(1, 2, 4, 4)
    >>> round(ssl_objective(torch.zeros(2, 2, 4, 4), labels, pseudo, lambda_pseudo=0.1).item(), 4)
    0.6716
    """
    name = "ssl_objective"
    _check_choice(name, "loss", loss, ("mse", "ce"))
    _check_lambdas(
        name,
        lambda_ce=lambda_ce,
        lambda_dice=lambda_dice,
        lambda_pseudo=lambda_pseudo,
        lambda_entropy=lambda_entropy,
    )
    _check_channels(name, input, include_background, False, True)
    b, first = input.shape[0], labels.shape[0]
    if not 0 < first <= b:
        raise ValueError(f"{name}(): labels: expected 1 to {b} samples, as input has, got {first}")
    if first == b and (pseudo is not None or voxel_weight is not None):
        raise ValueError(f"{name}(): pseudo, voxel_weight: expected None, for all {b} samples are labeled")
    if pseudo is None and voxel_weight is not None:
        raise ValueError(
            f"{name}(): voxel_weight: expected None without pseudo, got {tuple(voxel_weight.shape)}"
        )
    y = _labels_or_distribution(name, input, labels, (0, first), "labels")
    shared: dict[str, Any] = {"samples": (0, first), "ignore_index": ignore_index}
    terms = [
        Term("ce", y, scale=lambda_ce, **shared),
        Term(
            *("dice", y),
            **shared,
            scale=lambda_dice,
            include_background=include_background,
            smooth_nr=smooth,
            smooth_dr=smooth,
        ),
    ]
    terms = [term for term, factor in zip(terms, (lambda_ce, lambda_dice), strict=True) if factor]
    if pseudo is not None and lambda_pseudo:
        q = _labels_or_distribution(name, input, pseudo, (first, b), "pseudo")
        m = _fixed(name, "voxel_weight", voxel_weight, input)
        terms.append(
            Term(
                *(loss, q, m, (first, b), lambda_pseudo),
                ignore_index=ignore_index,
                reduction="sample",
                min_weight=min_weight,
            )
        )
    if lambda_entropy and first < b:
        terms.append(Term("entropy", samples=(first, b), scale=lambda_entropy))
    if not terms:
        raise ValueError(f"{name}(): lambda_ce, ...: expected one above 0 that has samples, got none")
    return voxel_loss(input, terms)


# ---- what the functions share -------------------------------------------------------------------


def _warn(message: str) -> None:
    if not torch.compiler.is_compiling():
        warnings.warn(message, UserWarning, stacklevel=3)


def _check_choice(name: str, argument: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}(): {argument}: expected one of {', '.join(choices)}, got {value!r}")


def _check_lambdas(name: str, **lambdas: float) -> None:
    for argument, value in lambdas.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}(): {argument}: expected a finite number >= 0, got {value}")


def _check_options(
    name: str, sigmoid: bool, softmax: bool, other_act: Any, reduction: str, reductions: tuple[str, ...]
) -> None:
    if other_act is not None and not callable(other_act):
        raise TypeError(f"{name}(): other_act: expected a callable or None, got {type(other_act).__name__}")
    given = int(sigmoid) + int(softmax) + int(other_act is not None)
    if given > 1:
        raise ValueError(f"{name}(): sigmoid, softmax, other_act: expected at most one of them, got {given}")
    _check_choice(name, "reduction", reduction, reductions)


def _check_channels(name: str, input: Any, include_background: bool, to_onehot_y: bool, softmax: bool) -> int:
    """Return how many classes Dice averages; refuse options that one channel makes meaningless."""
    if not isinstance(input, (torch.Tensor, np.ndarray)):
        raise TypeError(
            f"{name}(): input: expected a torch tensor or NumPy array, got {type(input).__name__}"
        )
    if not 3 <= input.ndim <= 5:
        raise ValueError(
            f"{name}(): input: expected shape (B, C, spatial...) with 1 to 3 spatial dimensions, "
            f"got {tuple(input.shape)}"
        )
    if input.shape[1] == 1:
        if softmax:
            raise ValueError(
                f"{name}(): input: expected at least 2 channels for softmax, got 1, where it is always 1"
            )
        if not include_background:
            raise ValueError(
                f"{name}(): include_background: expected True with one channel, got False: no class remains"
            )
        if to_onehot_y:
            _warn(f"{name}(): to_onehot_y: has no effect with one channel, where the target is the mask")
    return int(input.shape[1]) - (0 if include_background else 1)


def _numbers(name: str, weight: Weights) -> float | tuple[float, ...] | None:
    """Return class weights as plain numbers, so that a module that keeps them has no device."""
    if weight is None:
        return None
    if isinstance(weight, torch.Tensor) and weight.requires_grad:
        raise ValueError(f"{name}(): weight: expected numbers, got a tensor that requires a gradient")
    plain: Any = weight.tolist() if isinstance(weight, (torch.Tensor, np.ndarray)) else weight
    values = (float(plain),) if isinstance(plain, (int, float)) else tuple(float(v) for v in plain)
    if not all(0 <= v < math.inf for v in values):
        raise ValueError(f"{name}(): weight: expected finite numbers >= 0, got {plain}")
    return values[0] if isinstance(plain, (int, float)) else values


def _class_weights(name: str, weight: Weights, classes: int) -> tuple[float, ...] | None:
    values = _numbers(name, weight)
    if values is None:
        return None
    if isinstance(values, float):
        return (values,) * classes
    if len(values) != classes:
        raise ValueError(
            f"{name}(): weight: expected {classes} numbers, one per class that is in, got {len(values)}"
        )
    return values


def _activated(name: str, input: Any, sigmoid: bool, softmax: bool, other_act: Any) -> tuple[Any, str]:
    """Return what Dice sees and how the engine makes probabilities of it."""
    if other_act is not None:
        prob = other_act(input)
        if tuple(prob.shape) != tuple(input.shape):
            raise ValueError(
                f"{name}(): other_act: expected it to keep the shape {tuple(input.shape)}, "
                f"got {tuple(prob.shape)}"
            )
        return prob, "none"
    return input, "sigmoid" if sigmoid else "softmax" if softmax else "none"


def _fixed(name: str, argument: str, array: Any, input: Any) -> Any:
    """Refuse an array that wants a gradient (it would silently get none) or is not where the input is."""
    both = isinstance(array, torch.Tensor) and isinstance(input, torch.Tensor)
    if both and array.device != input.device:
        raise ValueError(
            f"{name}(): {argument}: expected a tensor on {input.device}, where input is, "
            f"got one on {array.device}"
        )
    if getattr(array, "requires_grad", False):
        raise ValueError(
            f"{name}(): {argument}: expected a tensor without gradient, got one that requires it: detach it"
        )
    return array


def _is_labels(input: Any, target: Any) -> bool:
    """Tell class indices from a distribution: one channel or none, against the C of the input."""
    return bool(target.ndim == input.ndim - 1 or (target.shape[1] == 1 and input.shape[1] > 1))


def _indices(name: str, argument: str, target: Any) -> Any:
    """Return class indices as integers; datasets often hand them over as floats."""
    if not _is_floating(target):
        return target
    tensor = torch.as_tensor(target)
    labels = tensor.to(torch.int16)
    whole = labels == tensor
    if torch.compiler.is_compiling():
        # Nothing can be raised here; the engine refuses this label.
        return torch.where(whole, labels, torch.iinfo(torch.int16).min)
    if not bool(whole.all()):
        bad = tensor[~whole][0].item()
        raise ValueError(f"{name}(): {argument}: expected whole class indices, got {bad}")
    return labels if isinstance(target, torch.Tensor) else labels.numpy()


def _labels_or_distribution(
    name: str, input: Any, target: Any, samples: tuple[int, int] | None = None, argument: str = "target"
) -> Any:
    _fixed(name, argument, target, input)
    first, last = samples or (0, input.shape[0])
    space = tuple(input.shape[2:])
    b, c = last - first, input.shape[1]
    if tuple(target.shape) not in ((b, *space), (b, 1, *space), (b, c, *space)):
        raise ValueError(
            f"{name}(): {argument}: expected labels {(b, *space)} or {(b, 1, *space)} "
            f"or a distribution {(b, c, *space)}, got {tuple(target.shape)}"
        )
    return _indices(name, argument, target) if _is_labels(input, target) else target


def _target(
    name: str, input: Any, target: Any, to_onehot_y: bool, ignore_index: int | None, voxel_weight: Any
) -> tuple[Any, Any, int | None]:
    """Return target, voxel weights and ignored label as a Term wants them, from MONAI's conventions."""
    _fixed(name, "target", target, input)
    m = _fixed(name, "voxel_weight", voxel_weight, input)
    b, c, *space = input.shape
    shape = tuple(target.shape)
    if to_onehot_y and c > 1:
        if shape not in ((b, 1, *space), (b, *space)):
            raise ValueError(
                f"{name}(): target: expected class indices {(b, 1, *space)} for to_onehot_y=True, got {shape}"
            )
        return _indices(name, "target", target), m, ignore_index
    if c == 1 and shape == (b, *space):
        target, shape = target[:, None], (b, 1, *space)
    if shape != (b, c, *space):
        hint = "; class indices need to_onehot_y=True" if shape in ((b, 1, *space), (b, *space)) else ""
        raise ValueError(
            f"{name}(): target: expected shape {(b, c, *space)}, as input has, got {shape}{hint}"
        )
    if not _is_floating(target):
        if c == 1:
            return target, m, ignore_index
        _check_binary(name, target)
    if ignore_index is None:
        return target, m, None
    if c == 1:
        used = target != ignore_index
        # An ignored value may be anything, also one that weight 0 cannot silence.
        target = (
            torch.where(used, target, 0.0) if isinstance(target, torch.Tensor) else np.where(used, target, 0)
        )
    elif 0 <= ignore_index < c:
        used = 1.0 - target[:, ignore_index : ignore_index + 1] * 1.0
    else:
        used = target.sum(1)[:, None] > 0
    if m is None:
        return target, used, None
    return target, used * m.reshape(used.shape), None


def _check_binary(name: str, target: Any) -> None:
    """Refuse an integer one-hot target that holds class indices; one cheap pass, on the CPU only."""
    if torch.compiler.is_compiling() or str(target.dtype) in ("torch.bool", "bool") or _on_gpu(target):
        return
    tensor = torch.as_tensor(target)
    wide = tensor.dtype in (torch.uint16, torch.uint32, torch.uint64)  # which torch only converts
    low, high = map(int, (tensor.to(torch.int64) if wide else tensor).aminmax())
    if low < 0 or high > 1:
        raise ValueError(
            f"{name}(): target: expected a one-hot target of 0 and 1, got values {low} to {high}"
        )


def _on_gpu(array: Any) -> bool:
    return isinstance(array, torch.Tensor) and array.device.type != "cpu"


def _dice_term(
    y: Any,
    m: Any,
    ignore: int | None,
    channels: int,
    include_background: bool,
    squared_pred: bool,
    jaccard: bool,
    reduction: str,
    smooth_nr: float,
    smooth_dr: float,
    batch: bool,
    weights: tuple[float, ...] | None,
    factor: float,
    samples: int,
) -> Term:
    """Return the Dice term whose scale makes MONAI's reduction of the engine's weighted mean."""
    classes = channels - (0 if include_background else 1)
    total = float(classes) if weights is None else sum(weights)
    scale = total / classes if reduction == "mean" else total * (1 if batch else samples)
    return Term(
        *("dice", y, m, None, factor * scale),
        class_weight=None if weights is None else ((1.0,) * (channels - classes) + weights),
        ignore_index=ignore,
        include_background=include_background,
        squared_pred=squared_pred,
        batch=batch,
        jaccard=jaccard,
        smooth_nr=smooth_nr,
        smooth_dr=smooth_dr,
    )


def _reduced(f: Any, reduction: str, batch: bool, ndim: int) -> Any:
    """Reduce class losses [B or 1, C'] as MONAI does."""
    if reduction == "none":
        return f.reshape(*f.shape[1 if batch else 0 :], *(1,) * (ndim - 2))
    return f.mean() if reduction == "mean" else f.sum()


def _l1_dice(prob: Any, term: Term, activation: str) -> Any:
    """Class losses [B or 1, C'] with sum (|p| + |q| - |p - q|) / 2 for the overlap, which no sweep offers."""
    if not isinstance(prob, torch.Tensor):
        weight = None if term.weight is None else torch.as_tensor(term.weight)
        term = replace(term, target=torch.as_tensor(term.target), weight=weight)
        return _l1_dice(torch.as_tensor(prob), term, activation).numpy()
    x = prob.double() if prob.dtype == torch.float64 else prob.float()
    p = x.softmax(1) if activation == "softmax" else x.sigmoid() if activation == "sigmoid" else x
    b, c, *space = p.shape
    m = torch.ones_like(p[:, :1]) if term.weight is None else term.weight.reshape(b, 1, *space).to(p)
    q = term.target
    if not q.is_floating_point() and (c == 1 or tuple(q.shape) != tuple(p.shape)):
        q, m = _one_hot(q.reshape(b, 1, *space), m, c, term.ignore_index)
    first = 0 if term.include_background else 1
    p, q = p[:, first:], q[:, first:].to(p)
    axes = ((0,) if term.batch else ()) + tuple(range(2, p.ndim))
    whole = (m * p.abs()).sum(axes) + (m * q.abs()).sum(axes)
    overlap = (whole - (m * (p - q).abs()).sum(axes)) / 2
    below = 2 * (whole - overlap) if term.jaccard else whole
    f = (1 - (2 * overlap + term.smooth_nr) / (below + term.smooth_dr)).reshape(-1, c - first)
    return (
        f
        if term.class_weight is None
        else f * torch.stack([f.new_full((), w) for w in term.class_weight[first:]])
    )


def _one_hot(y: Any, m: Any, channels: int, ignore_index: int | None) -> tuple[Any, Any]:
    """Return labels [B, 1, *S] in one-hot form and weights that are 0 where the label is ignored."""
    classes = torch.arange(channels, device=y.device) + (1 if channels == 1 else 0)
    used = torch.ones_like(y, dtype=torch.bool) if ignore_index is None else y != ignore_index
    if not torch.compiler.is_compiling():
        bad = y[used & ((y < 0) | (y >= max(channels, 2)))]
        if len(bad):
            raise ValueError(
                f"dice_loss(): target: expected labels 0 to {max(channels, 2) - 1}, got {bad[0].item()}"
            )
    return used & (y == classes.reshape(1, -1, *(1,) * (y.ndim - 2))), m * used


def _positive_weighted(input: Any, y: Any, m: Any, ignore: int | None, weight: float, reduction: str) -> Any:
    """Binary cross entropy whose positive voxels count `weight` times and which divides by the voxels.

    With r = weight q + 1 - q per voxel, weight q ln s + (1 - q) ln(1 - s) is r times the plain binary
    cross entropy against the target weight q / r.
    """
    if not isinstance(input, torch.Tensor):
        m = None if m is None else torch.as_tensor(m)
        z, y = torch.as_tensor(input), torch.as_tensor(y)
        return _positive_weighted(z, y, m, ignore, weight, reduction).numpy()[()]
    shape = (input.shape[0], 1, *input.shape[2:])
    used = torch.ones(shape, device=input.device) if m is None else m.reshape(shape).to(torch.float32)
    if y.is_floating_point():
        r = weight * y + 1 - y
        y = torch.where(r > 0, weight * y / torch.where(r > 0, r, 1.0), 0.0)
    else:
        y = y.reshape(shape)
        used = used if ignore is None else used * (y != ignore)
        r = torch.where(y == 1, weight, 1.0)
    term = Term("ce", y, used * r, ignore_index=ignore, reduction="sum")
    total = voxel_loss(input, [term], activation="sigmoid")
    return total / used.sum(dtype=torch.float64).to(total) if reduction == "voxel" else total


def _kept(input: Any, y: Any, m: Any, ignore_index: int | None, min_weight: float) -> Any:
    """Voxel weights that are 0 throughout samples with next to no weight."""
    b, _, *space = input.shape
    torch_in = isinstance(input, torch.Tensor)
    ones = torch.ones((b, *space), device=input.device) if torch_in else np.ones((b, *space), np.float32)
    m = ones if m is None else m.reshape((b, *space)) * ones
    used = m
    if ignore_index is not None and tuple(y.shape) != tuple(input.shape):
        used = m * (y.reshape((b, *space)) != ignore_index)
    sums = used.reshape(b, -1).sum(1)
    kept = sums >= min_weight * math.prod(space)
    return m * kept.reshape(b, *(1,) * len(space))


def _distance(
    name: str, kind: str, input: Any, target: Any, target_logits: bool, voxel_weight: Any, reduction: str
) -> Any:
    _check_choice(name, "reduction", reduction, ("mean", "voxel", "sample", "sum"))
    _check_channels(name, input, True, False, True)
    q = _labels_or_distribution(name, input, target)
    if target_logits:
        if tuple(q.shape) != tuple(input.shape):
            raise ValueError(f"{name}(): target: expected logits {tuple(input.shape)}, got {tuple(q.shape)}")
        q = _softmax(q)
    m = _fixed(name, "voxel_weight", voxel_weight, input)
    how = "element" if reduction == "mean" else reduction
    return voxel_loss(input, [Term(kind, q, m, reduction=how)])


def _softmax(z: Any) -> Any:
    if isinstance(z, torch.Tensor):
        return (z if z.dtype == torch.float64 else z.float()).softmax(1)
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


# ---- modules ------------------------------------------------------------------------------------


class _Loss(nn.Module):
    """A loss that keeps its arguments as attributes of the same names, and has no other state."""

    _names: tuple[str, ...] = ()
    reduction: str
    weight: float | tuple[float, ...] | None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls._names = tuple(inspect.signature(cls).parameters)

    def _keep(self, given: dict[str, Any]) -> None:
        name = type(self).__name__
        for key in self._names:
            setattr(self, key, given[key])
        if "reduction" in self._names:
            self.reduction = str(getattr(self.reduction, "value", self.reduction))
        if "weight" in self._names:
            self.weight = _numbers(name, self.weight)
        for key in ("smooth", "smooth_nr", "smooth_dr", "min_weight"):
            if key in self._names and not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"{name}(): {key}: expected a finite number >= 0, got {getattr(self, key)}")

    def _options(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in self._names}

    def extra_repr(self) -> str:
        """Name the arguments that differ from their defaults."""
        parameters = inspect.signature(type(self)).parameters
        options = self._options().items()
        return ", ".join(f"{key}={value!r}" for key, value in options if value != parameters[key].default)


class DiceLoss(_Loss):
    """Module of `dice_loss`: MONAI's DiceLoss, argument for argument.

    Call it with input [B, C, *S], target and optionally voxel weights. Like every loss here it has neither
    parameters nor buffers (class weights are kept as numbers) and can be copied, pickled and compiled.
    Arguments that contradict each other are refused at once, the others when shapes are known.

    >>> import torch
    >>> from semisam.losses import DiceLoss
    >>> loss = DiceLoss(to_onehot_y=True, softmax=True, include_background=False)
    >>> loss
    DiceLoss(include_background=False, to_onehot_y=True, softmax=True)
    >>> round(loss(torch.zeros(1, 2, 4, 4), torch.ones(1, 1, 4, 4)).item(), 4)
    0.3333
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Any], Any] | None = None,
        squared_pred: bool = False,
        jaccard: bool = False,
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        weight: Weights = None,
        soft_label: bool = False,
        ignore_index: int | None = None,
    ) -> None:
        """Keep the arguments of `dice_loss`."""
        super().__init__()
        self._keep(locals())
        _check_options("DiceLoss", sigmoid, softmax, other_act, self.reduction, ("mean", "sum", "none"))

    def forward(self, input: Any, target: Any, voxel_weight: Any = None) -> Any:
        """Return the loss."""
        return dice_loss(input, target, voxel_weight=voxel_weight, **self._options())


class DiceCELoss(_Loss):
    """Module of `dice_ce_loss`: MONAI's DiceCELoss, argument for argument, and `ignore_index`.

    >>> import torch
    >>> from semisam.losses import DiceCELoss
    >>> loss = DiceCELoss(to_onehot_y=True, softmax=True, lambda_ce=0.5)
    >>> loss
    DiceCELoss(to_onehot_y=True, softmax=True, lambda_ce=0.5)
    >>> round(loss(torch.zeros(1, 2, 4, 4), torch.ones(1, 1, 4, 4)).item(), 4)
    1.0132
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Any], Any] | None = None,
        squared_pred: bool = False,
        jaccard: bool = False,
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        weight: Weights = None,
        lambda_dice: float = 1.0,
        lambda_ce: float = 1.0,
        label_smoothing: float = 0.0,
        *,
        ignore_index: int | None = None,
    ) -> None:
        """Keep the arguments of `dice_ce_loss`."""
        super().__init__()
        self._keep(locals())
        _check_options("DiceCELoss", sigmoid, softmax, other_act, self.reduction, ("mean", "sum"))
        _check_lambdas("DiceCELoss", lambda_dice=lambda_dice, lambda_ce=lambda_ce)

    def forward(self, input: Any, target: Any, voxel_weight: Any = None) -> Any:
        """Return the loss."""
        return dice_ce_loss(input, target, voxel_weight=voxel_weight, **self._options())


class CrossEntropyLoss(_Loss):
    """Module of `cross_entropy`, with the arguments of torch's.

    >>> import torch
    >>> from semisam.losses import CrossEntropyLoss
    >>> round(CrossEntropyLoss(weight=[1, 3])(torch.zeros(1, 2, 4, 4), torch.ones(1, 4, 4).long()).item(), 4)
    0.6931
    """

    def __init__(
        self,
        weight: Weights = None,
        ignore_index: int | None = 255,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        """Keep the arguments of `cross_entropy`."""
        super().__init__()
        self._keep(locals())
        _check_choice("CrossEntropyLoss", "reduction", self.reduction, ("mean", "sum"))

    def forward(self, input: Any, target: Any, voxel_weight: Any = None) -> Any:
        """Return the loss."""
        return cross_entropy(input, target, voxel_weight=voxel_weight, **self._options())


class SoftmaxMSELoss(_Loss):
    """Module of `softmax_mse_loss`.

    >>> from semisam.losses import SoftmaxMSELoss
    >>> SoftmaxMSELoss(target_logits=True)
    SoftmaxMSELoss(target_logits=True)
    """

    def __init__(self, *, target_logits: bool = False, reduction: str = "mean") -> None:
        """Keep the arguments of `softmax_mse_loss`."""
        super().__init__()
        self._keep(locals())
        _check_choice("SoftmaxMSELoss", "reduction", self.reduction, ("mean", "voxel", "sample", "sum"))

    def forward(self, input: Any, target: Any, voxel_weight: Any = None) -> Any:
        """Return the loss."""
        return softmax_mse_loss(input, target, voxel_weight=voxel_weight, **self._options())


class SoftmaxKLLoss(_Loss):
    """Module of `softmax_kl_loss`.

    >>> from semisam.losses import SoftmaxKLLoss
    >>> SoftmaxKLLoss(reduction="voxel")
    SoftmaxKLLoss(reduction='voxel')
    """

    def __init__(self, *, target_logits: bool = False, reduction: str = "mean") -> None:
        """Keep the arguments of `softmax_kl_loss`."""
        super().__init__()
        self._keep(locals())
        _check_choice("SoftmaxKLLoss", "reduction", self.reduction, ("mean", "voxel", "sample", "sum"))

    def forward(self, input: Any, target: Any, voxel_weight: Any = None) -> Any:
        """Return the loss."""
        return softmax_kl_loss(input, target, voxel_weight=voxel_weight, **self._options())


class EntropyLoss(_Loss):
    """Module of `entropy_loss`.

    >>> import torch
    >>> from semisam.losses import EntropyLoss
    >>> round(EntropyLoss()(torch.zeros(1, 2, 4, 4)).item(), 4)
    1.0
    """

    def __init__(self, *, reduction: str = "mean") -> None:
        """Keep the arguments of `entropy_loss`."""
        super().__init__()
        self._keep(locals())
        _check_choice("EntropyLoss", "reduction", self.reduction, ("mean", "sample", "sum"))

    def forward(self, input: Any, voxel_weight: Any = None) -> Any:
        """Return the loss."""
        return entropy_loss(input, voxel_weight=voxel_weight, **self._options())


class UncertaintyWeightedLoss(_Loss):
    """Module of `uncertainty_weighted_loss`, the generalist's term L_sam.

    >>> from semisam.losses import UncertaintyWeightedLoss
    >>> UncertaintyWeightedLoss(loss="ce_dice")
    UncertaintyWeightedLoss(loss='ce_dice')
    """

    def __init__(
        self,
        *,
        loss: str = "mse",
        min_weight: float = 1e-3,
        ignore_index: int | None = 255,
        smooth: float = 1e-5,
    ) -> None:
        """Keep the arguments of `uncertainty_weighted_loss`."""
        super().__init__()
        self._keep(locals())
        _check_choice("UncertaintyWeightedLoss", "loss", loss, ("mse", "ce", "ce_dice"))

    def forward(self, input: Any, target: Any, voxel_weight: Any = None) -> Any:
        """Return the loss."""
        return uncertainty_weighted_loss(input, target, voxel_weight, **self._options())


class CrossPseudoLabelLoss(_Loss):
    """Module of `cross_pseudo_label_loss`.

    >>> from semisam.losses import CrossPseudoLabelLoss
    >>> CrossPseudoLabelLoss(smooth=1e-10)
    CrossPseudoLabelLoss(smooth=1e-10)
    """

    def __init__(
        self, *, include_background: bool = True, ignore_index: int | None = 255, smooth: float = 1e-5
    ) -> None:
        """Keep the arguments of `cross_pseudo_label_loss`."""
        super().__init__()
        self._keep(locals())

    def forward(self, input: Any, target: Any, voxel_weight: Any = None) -> Any:
        """Return the loss."""
        return cross_pseudo_label_loss(input, target, voxel_weight, **self._options())
