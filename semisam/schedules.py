# SPDX-License-Identifier: Apache-2.0
"""Numbers that change with the training step: loss weights, learning rates, thresholds, decays.

Every function takes the step `t`, counted from 0, and returns a float; none keeps state, so a resumed
run continues exactly. Standard library only. The loss weights (`sam_weight`, `consistency_weight`,
`warmup`) and `uamt_threshold` also take a step that is a torch tensor: the result is a float64 tensor where
the step is, from arithmetic that looks at no value.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

__all__ = [
    "consistency_weight",
    "ema_decay",
    "polynomial_lr",
    "sam_weight",
    "sigmoid_rampup",
    "step_lr",
    "uamt_threshold",
    "warmup",
]

BLOCK = 150
"""Steps that share one value of the two loss weights, in trainings of 6000 steps and more."""

SAM_RAMPS = ("falling", "rising", "flat")
"""The published course of the generalist's weight, its mirror image, and none."""


def sigmoid_rampup(t: Any, length: float) -> Any:
    """Return the ramp rho from exp(-5) at t = 0 up to 1 at t = length, and 1 from there on.

        rho(t, R) = exp(-5 (1 - clip(t, 0, R) / R)^2),   1 if R = 0

    Raises ValueError for a negative or non-finite length and for a step that is NaN.
    Paper: Temporal Ensembling (arXiv 1610.02242).

    >>> [round(sigmoid_rampup(t, 40), 6) for t in (0, 20, 40, 99)]
    [0.006738, 0.286505, 1.0, 1.0]
    """
    if not 0 <= length < math.inf:
        raise ValueError(
            f"sigmoid_rampup(): length: expected a finite number of at least 0 (steps, in the unit of t), "
            f"got {length}"
        )
    if _is_tensor(t):
        left = 1.0 - t.double().clamp(0.0, length) / length if length else 0.0 * t.double()
        return (-5.0 * left**2).exp()
    if math.isnan(t):
        raise ValueError(f"sigmoid_rampup(): t: expected a step, got {t}")
    if length == 0:
        return 1.0
    return math.exp(-5.0 * (1.0 - min(max(t, 0.0), length) / length) ** 2)


def consistency_weight(
    t: Any,
    total_steps: float,
    *,
    weight: float = 0.1,
    length: float | None = None,
    block: int | None = None,
) -> Any:
    """Return w_con(t), the rising weight of the consistency term of mean-teacher methods.

        w_con(t) = weight * rho(floor(t / block), R),   R = length, or total_steps / block

    It stays constant over blocks of `block` steps: 150, fewer in trainings of less than 6000 steps, so that
    the ramp always has 40 of them. `length` counts blocks. With the default length it meets `sam_weight`
    at half of the training.

    Raises ValueError for a negative step, total_steps <= 0, block < 1 or a negative length.
    Papers: Mean Teacher (arXiv 1703.01780), UA-MT (arXiv 1907.07034).

    >>> f"{consistency_weight(0, 6000):.4e}", f"{consistency_weight(3000, 6000):.6f}"
    ('6.7379e-04', '0.028650')
    """
    _check_step("consistency_weight", t, total_steps)
    block = _block("consistency_weight", block, total_steps)
    return weight * sigmoid_rampup(t // block, _length(total_steps, length, block))


def sam_weight(
    t: Any,
    total_steps: float,
    *,
    weight: float = 0.1,
    length: float | None = None,
    block: int | None = None,
    ramp: str = "falling",
) -> Any:
    """Return w_sam(t), the weight of the generalist's term: by default `consistency_weight` in reverse.

        falling   w_sam(t) = weight * rho(floor((total_steps - t) / block), R)
        rising    w_sam(t) = weight * rho(floor(t / block), R)          R = length, or total_steps / block
        flat      w_sam(t) = weight

    The published ramp falls: the generalist leads while the specialist knows nothing. But what it answers is
    made from the specialist's prompts, and these are worst then; "rising" and "flat" let it speak when
    they are good.

    Raises ValueError as `consistency_weight` does, and for another ramp. Paper: SemiSAM (arXiv 2312.06316).

    >>> sam_weight(0, 6000), f"{sam_weight(3000, 6000):.6f}", f"{sam_weight(6000, 6000):.4e}"
    (0.1, '0.028650', '6.7379e-04')
    >>> [round(sam_weight(t, 6000, ramp="rising"), 6) for t in (0, 3000, 6000)]
    [0.000674, 0.02865, 0.1]
    """
    _check_step("sam_weight", t, total_steps)
    block = _block("sam_weight", block, total_steps)
    if ramp not in SAM_RAMPS:
        raise ValueError(f"sam_weight(): ramp: expected one of {', '.join(SAM_RAMPS)}, got {ramp!r}")
    r = _length(total_steps, length, block)
    if ramp == "flat":
        r = 0.0
    return weight * sigmoid_rampup((total_steps - t if ramp == "falling" else t) // block, r)


def warmup(t: Any, total_steps: float, fraction: float = 0.05) -> Any:
    """Return the factor min(1, t / (fraction * total_steps)) that starts a term at zero.

    `sam_weight` is largest exactly when the specialist's prompts are worst; this factor is the remedy.
    A fraction of 0 switches it off (1 from the first step on).

    Raises ValueError for a negative step, total_steps <= 0 or a fraction outside 0..1.

    >>> [warmup(t, 1000) for t in (0, 25, 50, 900)]
    [0.0, 0.5, 1.0, 1.0]
    """
    _check_step("warmup", t, total_steps)
    if not 0 <= fraction <= 1:
        raise ValueError(f"warmup(): fraction: expected 0 to 1 (share of total_steps), got {fraction}")
    if _is_tensor(t) and fraction > 0:
        return (t.double() / (fraction * total_steps)).clamp_max(1.0)
    return min(1.0, t / (fraction * total_steps)) if fraction > 0 else 1.0


def ema_decay(t: float, limit: float = 0.99) -> float:
    """Return the decay a of the teacher's update `teacher = a * teacher + (1 - a) * student`.

        a = min(1 - 1 / (t + 1), limit)

    t is the step before it is counted up, so that a = 0 at the first update: the teacher starts as a
    copy of the student, then averages all of its past, then the last 1 / (1 - limit) steps.

    Raises ValueError for a negative step or a limit outside 0..1. Paper: arXiv 1703.01780.

    >>> ema_decay(0), ema_decay(3), ema_decay(1000)
    (0.0, 0.75, 0.99)
    """
    _check_step("ema_decay", t)
    if not 0 <= limit <= 1:
        raise ValueError(f"ema_decay(): limit: expected 0 to 1, got {limit}")
    return min(1.0 - 1.0 / (t + 1.0), limit)


def polynomial_lr(t: float, total_steps: float, power: float = 0.9) -> float:
    """Return the factor (1 - t / total_steps)^power on the base learning rate; 0 after the last step.

    power 0.9: SemiSAM+ (arXiv 2502.20749) and nnU-Net; power 1: SC-SAM (arXiv 2601.17934).

    Raises ValueError for a negative step, total_steps <= 0 or power < 0.

    >>> polynomial_lr(0, 30000), polynomial_lr(10000, 40000, power=1), polynomial_lr(30000, 30000)
    (1.0, 0.75, 0.0)
    """
    _check_step("polynomial_lr", t, total_steps)
    if not 0 <= power < math.inf:
        raise ValueError(f"polynomial_lr(): power: expected a finite number of at least 0, got {power}")
    return float((1.0 - min(t / total_steps, 1.0)) ** power)


def step_lr(t: float, milestones: Sequence[float] = (2500, 5000), factor: float = 0.1) -> float:
    """Return factor^(number of milestones that step t has reached), to multiply the base learning rate.

    The defaults are those of SemiSAM (arXiv 2312.06316) with 6 000 steps.

    Raises ValueError for a negative step, milestones that do not increase or factor <= 0.

    >>> [round(step_lr(t), 3) for t in (0, 2499, 2500, 5000)]
    [1.0, 1.0, 0.1, 0.01]
    """
    _check_step("step_lr", t)
    if any(not a < b for a, b in pairwise(milestones)):
        raise ValueError(f"step_lr(): milestones: expected increasing steps, got {tuple(milestones)}")
    if not 0 < factor < math.inf:
        raise ValueError(f"step_lr(): factor: expected a finite number above 0, got {factor}")
    return float(factor ** bisect_right(milestones, t))


def uamt_threshold(t: Any, total_steps: float, classes: int = 2) -> Any:
    """Return UA-MT's entropy threshold (nats) below which a voxel of the teacher counts as certain.

        tau(t) = (3/4 + rho(t, total_steps) / 4) ln classes

    The ramp counts steps, not blocks. For two classes this is the published ln 2; for more, the
    largest possible entropy takes its place.

    Raises ValueError for a negative step, total_steps <= 0 or classes < 2. Paper: arXiv 1907.07034.

    >>> round(uamt_threshold(6000, 6000), 6), round(uamt_threshold(0, 6000, classes=4), 6)
    (0.693147, 1.042056)
    """
    _check_step("uamt_threshold", t, total_steps)
    if classes < 2:
        raise ValueError(
            f"uamt_threshold(): classes: expected at least 2, background included, got {classes}"
        )
    return (0.75 + 0.25 * sigmoid_rampup(t, total_steps)) * math.log(classes)


def _is_tensor(t: Any) -> bool:
    return not isinstance(t, (int, float)) and hasattr(t, "clamp")


def _check_step(function: str, t: Any, total_steps: float = 1) -> None:
    if not _is_tensor(t) and not 0 <= t < math.inf:
        raise ValueError(f"{function}(): t: expected a step of at least 0, got {t}")
    if not 0 < total_steps < math.inf:
        raise ValueError(f"{function}(): total_steps: expected a finite number above 0, got {total_steps}")


def _block(function: str, block: int | None, total_steps: float) -> int:
    if block is None:
        return max(1, min(BLOCK, int(total_steps) // 40))
    if block < 1:
        raise ValueError(f"{function}(): block: expected at least 1 step, got {block}")
    return block


def _length(total_steps: float, length: float | None, block: int) -> float:
    return total_steps / block if length is None else length
