# SPDX-License-Identifier: Apache-2.0
"""Fusion of several predictions into a pseudo-label: mean, label, confidence, uncertainty, weight.

`fuse` is the operator, one pass over all sources; everything else here prepares its arguments
(`Reliability`, `source_weights`, `join_classes`) or reads its results (`pseudo_label`,
`mc_uncertainty`, `agreement`). Nothing carries a gradient: pseudo-labels are constants of the loss.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from semisam import ops

__all__ = [
    "Fused",
    "MCUncertainty",
    "PseudoLabel",
    "Reliability",
    "agreement",
    "fuse",
    "join_classes",
    "mc_uncertainty",
    "pseudo_label",
    "source_weights",
]

_UNC = ("var", "ent", "mi")
_WEIGHT = ("exp", "linear", "gate", "conf", "none")
_ROUNDS = ("late", "last", "all")
_WANT = ("mean", "label", "confidence", "uncertainty", "weight")


class Fused(NamedTuple):
    """What `fuse` returns; None where it was not asked for."""

    mean: Any  # [B, C, *spatial]
    label: Any  # [B, *spatial], uint8
    confidence: Any  # [B, *spatial]
    uncertainty: Any  # [B, *spatial], 0..1
    weight: Any  # [B, *spatial], 0..1


class PseudoLabel(NamedTuple):
    """What `pseudo_label` returns: the target of a loss and how much each voxel counts."""

    target: Any  # soft: [B, C, *spatial]; hard: [B, *spatial], uint8
    weight: Any  # [B, *spatial], 0..1
    uncertainty: Any  # [B, *spatial], 0..1; its mean is worth watching


class MCUncertainty(NamedTuple):
    """What `mc_uncertainty` returns; None where it was not asked for."""

    mean: Any  # [B, C, *spatial]
    uncertainty: Any  # [B, *spatial], 0..1
    mask: Any  # [B, *spatial], 1 where the passes are sure, else 0


def fuse(
    sources: Any,
    weights: Any = None,
    uncertainty_weights: Any = None,
    *,
    unc: str = "var",
    weight: str = "exp",
    kappa: float = 4.0,
    tau_c: float | None = None,
    tau_u: float | None = None,
    ignore_index: int = 255,
    logits: bool = False,
    two_channels: bool = False,
    want: Sequence[str] = _WANT,
) -> Fused:
    """Fuse S sources into mean, hard label, confidence, uncertainty and weight map in one pass.

    `sources`: list of 1 to 128 arrays [B, C, *spatial] (or one array [S, B, C, *spatial]), NumPy or
    torch, floating dtypes (float64 for all or for none). They are probabilities that sum to 1 over C,
    or, with `logits=True`, logits whose softmax is taken on the fly. C = 1 means the foreground of
    two classes (probability, or logit of a sigmoid); `two_channels=True` then gives the mean as
    [B, 2, *spatial]. Values are not checked to lie in 0..1; NaN propagates into every map, and such
    a voxel's label is `ignore_index`.

    `weights` (r_lab: who defines the label) and `uncertainty_weights` (r_unc: who defines the doubt;
    default: the same) are S numbers, or a table [S, B], that sum to 1 over the sources; default 1/S.
    A source of weight 0 is not read. A sample whose weights are all 0 has no source: uniform mean,
    uncertainty 1, weight 0, label `ignore_index`. Weights that are tensors on a GPU stay there, unseen:
    what is no weight (negative, above 2, NaN) is taken for 0, each sample's are divided by their sum, it
    has no source if either of its sums is 0, and `ops.faults` counts the samples where something was wrong.

        mean pbar = sum_s r_lab p^s     label = argmax pbar (ties: smallest class)     confidence = max pbar
        mu = sum_s r_unc p^s            H(p) = -sum_c p_c ln max(p_c, 1e-7)
        unc:    var  sum_c sum_s r_unc (p^s_c - mu_c)^2 / (1 - 1/C)
                ent  H(mu) / ln C
                mi   (H(mu) - sum_s r_unc H(p^s)) / ln C
        weight: exp  e^(-kappa u)    linear  1 - u    gate  1 where u <= tau_u, else 0
                conf  (confidence - 1/C) / (1 - 1/C)    none  1

    Labels are `ignore_index` (C..255) where confidence < `tau_c` or uncertainty > `tau_u`, if given.
    `want` names the outputs to compute. Results are float32 (float64 for float64 sources), labels
    uint8; shapes are those of `Fused`.

    Raises ValueError for wrong shapes, weights that are negative, NaN or do not sum to 1, all of them 0
    (but not of a tensor on a GPU), tensors on different devices, and unknown choices; TypeError for
    dtypes that are not floating and mixed kinds. Papers: SemiSAM+ (arXiv 2502.20749) for the variance;
    mutual information after Gal et al. (arXiv 1703.02910).

    >>> import numpy as np
    >>> from semisam import fusion
    >>> sure, unsure = np.array([[[0.9, 0.8]]]), np.array([[[0.9, 0.2]]])
    >>> fused = fusion.fuse([sure, unsure], want=("mean", "uncertainty"))
    >>> fused.mean.round(3).tolist(), fused.uncertainty.round(3).tolist()
    ([[[0.9, 0.5]]], [[0.0, 0.36]])
    """
    maps = _sources("fuse", sources)
    _choice("fuse", "unc", unc, _UNC)
    _choice("fuse", "weight", weight, _WEIGHT)
    for name in want:
        _choice("fuse", "want", name, _WANT)
    if not want:
        raise ValueError(f"fuse(): want: expected at least one of {', '.join(_WANT)}, got nothing")
    if weight == "gate" and tau_u is None and "weight" in want:
        raise ValueError(
            "fuse(): tau_u: expected a threshold in 0..1 for weight='gate' (0.5 is usual), got None"
        )
    outputs = _run(
        maps,
        *_tables(weights, uncertainty_weights, maps),
        want=want,
        unc=unc,
        weight=weight,
        kappa=kappa,
        tau_c=0.0 if tau_c is None else tau_c,
        tau_u=1.0 if tau_u is None else tau_u,
        ignore_index=ignore_index,
        logits=logits,
        two_channels=two_channels,
    )
    return Fused(*outputs)


def pseudo_label(
    sources: Any,
    weights: Any = None,
    uncertainty_weights: Any = None,
    *,
    target: str = "soft",
    unc: str = "var",
    weight: str = "exp",
    kappa: float = 4.0,
    tau_c: float | None = 0.7,
    tau_u: float | None = 0.5,
    ignore_index: int = 255,
    logits: bool = False,
) -> PseudoLabel:
    """Return the target of the pseudo-label loss, its voxel weights and the uncertainty behind them.

    Arguments are those of `fuse`. `target="soft"` gives the mean distribution [B, C, *spatial] (C = 2
    for one-channel sources); "hard" gives labels [B, *spatial], uint8, which are `ignore_index` where
    confidence < `tau_c` or uncertainty > `tau_u` (None: never).

    Raises what `fuse` raises. Paper: SemiSAM+ (arXiv 2502.20749).

    >>> import numpy as np
    >>> from semisam import fusion
    >>> a, b = np.array([[[0.95, 0.9, 0.2]]]), np.array([[[0.85, 0.3, 0.1]]])
    >>> fusion.pseudo_label([a, b], target="hard").target.tolist()
    [[1, 255, 0]]
    """
    _choice("pseudo_label", "target", target, ("soft", "hard"))
    if weight == "gate" and tau_u is None:
        raise ValueError(
            "pseudo_label(): tau_u: expected a threshold in 0..1 for weight='gate' (0.5 is usual), got None"
        )
    soft = target == "soft"
    fused = fuse(
        sources,
        weights,
        uncertainty_weights,
        unc=unc,
        weight=weight,
        kappa=kappa,
        tau_c=tau_c,
        tau_u=tau_u,
        ignore_index=ignore_index,
        logits=logits,
        two_channels=soft and _sources("pseudo_label", sources)[0].shape[1] == 1,
        want=("mean" if soft else "label", "uncertainty", "weight"),
    )
    return PseudoLabel(fused.mean if soft else fused.label, fused.weight, fused.uncertainty)


def mc_uncertainty(
    passes: Any,
    threshold: float = 0.75,
    *,
    logits: bool = True,
    want: Sequence[str] = ("mean", "uncertainty", "mask"),
) -> MCUncertainty:
    """Return mean and entropy of T stochastic passes of a teacher, and where they are sure.

    `passes`: list of T arrays [B, C, *spatial] or one array [T, B, C, *spatial]: logits, or
    probabilities with `logits=False` (one channel: foreground). Two passes that ran as one doubled
    batch are its two halves. `threshold` is a fraction of the largest entropy; UA-MT lets it rise as
    0.75 + 0.25 ramp(t, T_max).

        pbar = mean of the softmaxes     H = -sum_c pbar_c ln(pbar_c + 1e-6)
        uncertainty = H / ln C (0..1)    mask = 1 where H < threshold ln C, else 0

    `want` names the outputs to compute. Results are float32 (float64 for float64 passes). The mask is
    the voxel weight of the consistency loss. Raises ValueError for wrong shapes and a threshold
    outside 0..1, TypeError for dtypes that are not floating. Paper: UA-MT (arXiv 1907.07034).

    >>> import numpy as np
    >>> from semisam import fusion
    >>> z = np.zeros((8, 1, 2, 3))
    >>> z[:, :, 1, 0] = 5
    >>> fusion.mc_uncertainty(z).mask.tolist()
    [[1.0, 0.0, 0.0]]
    """
    maps = _sources("mc_uncertainty", passes, "passes")
    names = {"mean": "mean", "uncertainty": "uncertainty", "mask": "weight"}
    for name in want:
        _choice("mc_uncertainty", "want", name, tuple(names))
    if not want:
        raise ValueError(
            "mc_uncertainty(): want: expected at least one of mean, uncertainty, mask, got nothing"
        )
    if not 0 <= threshold <= 1:
        raise ValueError(f"mc_uncertainty(): threshold: expected a number from 0 to 1, got {threshold}")
    # H < threshold is H <= the next smaller number of the dtype that the core computes in.
    real = np.float64 if ops.dtype_name(maps[0]) == "f64" else np.float32
    mean, _, _, uncertainty, mask = _run(
        maps,
        None,
        None,
        unc="ent",
        weight="gate",
        tau_u=max(0.0, float(np.nextafter(real(threshold), real(-1)))),
        logits=logits,
        log_offset=1e-6,
        want=tuple(names[name] for name in want),
    )
    return MCUncertainty(mean, uncertainty, mask)


class Reliability:
    """Running score of each generalist, R <- momentum R + (1 - momentum) Dice, from a start value.

    Only ratios between generalists are used: the prompts come from a specialist that has seen the
    labeled scans, so absolute values are optimistic. `scores` is float64, one per generalist, and may
    be assigned (a checkpoint).

    >>> from semisam import fusion
    >>> reliability = fusion.Reliability(2)
    >>> reliability.update(0, 0.9)
    >>> reliability.scores.round(3).tolist()
    [0.54, 0.5]
    """

    def __init__(self, generalists: int, momentum: float = 0.9, start: float = 0.5) -> None:
        if generalists < 1:
            raise ValueError(f"Reliability(): generalists: expected at least 1, got {generalists}")
        for name, value in (("momentum", momentum), ("start", start)):
            if not 0 <= value <= 1:
                raise ValueError(f"Reliability(): {name}: expected a number from 0 to 1, got {value}")
        self.momentum = momentum
        self.scores: np.ndarray = np.full(generalists, start, np.float64)

    def update(self, generalist: int, dice: float) -> None:
        """Take in the Dice (0..1) of generalist number `generalist` on labeled scans."""
        if not 0 <= generalist < len(self.scores):
            raise ValueError(
                f"Reliability.update(): generalist: expected 0 to {len(self.scores) - 1}, got {generalist}"
            )
        if not 0 <= dice <= 1:
            raise ValueError(f"Reliability.update(): dice: expected a number from 0 to 1, got {dice}")
        self.scores[generalist] = self.momentum * self.scores[generalist] + (1 - self.momentum) * dice


def source_weights(
    reliability: Reliability | Sequence[float],
    rounds: Sequence[int] | Sequence[Sequence[int]],
    teacher: bool = True,
    b: float = 0.5,
    drop: float = 0.1,
    *,
    label: str = "late",
    doubt: str | None = None,
) -> tuple[Any, Any]:
    """Return (weights, uncertainty_weights) for `fuse` from reliabilities and click rounds.

    `reliability` has one score per generalist; `rounds[g]` is the number K' of rounds that generalist
    g has done, or a list of such numbers, one per sample. The sources are meant in the order: all
    rounds of generalist 0, of generalist 1, ... (the largest K' of its samples each), then the
    teacher. Results are float64 arrays [S] or [S, B]:

        r_lab: 0 for rounds k < ceil(K'/2) (but the last round always counts), for generalists of
               reliability < `drop` and for the teacher; else proportional to reliability^2 over
               generalists and equal over the rounds of one
        r_unc: (1 - b) r_lab, and b on the teacher (r_lab without a teacher)

    `label` chooses the rounds that define the label: "late" as above, "last" or "all"; `doubt` those
    behind r_unc (None: the same). The published SemiSAM+ is label="last", doubt="all", no teacher.

    A sample for which no generalist is left has zeros only, and `fuse` gives it weight 0; if that is
    every sample (`not weights.any()`) there is nothing to fuse. Raises ValueError for wrong lengths
    and numbers out of range. Paper: SemiSAM+ (arXiv 2502.20749) for the use of several rounds.

    >>> from semisam import fusion
    >>> r_lab, r_unc = fusion.source_weights([0.8, 0.4], [4, 2])
    >>> r_lab.tolist()
    [0.0, 0.0, 0.4, 0.4, 0.0, 0.2, 0.0]
    >>> r_unc.tolist()
    [0.0, 0.0, 0.2, 0.2, 0.0, 0.1, 0.5]
    """
    scores = np.asarray(
        reliability.scores if isinstance(reliability, Reliability) else reliability, np.float64
    )
    done = np.asarray(rounds)
    if scores.ndim != 1 or not scores.size or not np.all((scores >= 0) & (scores <= 1)):
        raise ValueError(
            f"source_weights(): reliability: expected one number in 0..1 per generalist, "
            f"got {scores.tolist()}"
        )
    if done.ndim not in (1, 2) or len(done) != len(scores) or done.size == 0 or done.dtype.kind not in "iu":
        raise ValueError(
            f"source_weights(): rounds: expected an integer (or one per sample) for each of {len(scores)} "
            f"generalists, got {done.tolist()}"
        )
    if (done < 0).any():
        raise ValueError(f"source_weights(): rounds: expected at least 0, got {done.tolist()}")
    if not 0 <= b <= 1:
        raise ValueError(f"source_weights(): b: expected a number from 0 to 1, got {b}")
    _choice("source_weights", "label", label, _ROUNDS)
    _choice("source_weights", "doubt", doubt or label, _ROUNDS)
    table = done.reshape(len(scores), -1)
    square = np.where(scores >= drop, scores**2, 0.0)
    r_lab = _rounds_weighted(square, table, label, teacher)
    r_unc = r_lab.copy() if doubt is None else _rounds_weighted(square, table, doubt, teacher)
    if teacher:
        r_unc *= 1 - b
        r_unc[-1] = b * (r_lab.sum(0) > 0)
    return (r_lab[:, 0], r_unc[:, 0]) if done.ndim == 1 else (r_lab, r_unc)


def _rounds_weighted(square: Any, table: Any, which: str, teacher: bool) -> Any:
    """Weights [S, B] of all rounds: `square` per generalist, equal over the rounds that count."""
    rows = []
    for score, done in zip(square, table, strict=True):
        first = {"late": np.minimum((done + 1) // 2, done - 1), "last": done - 1, "all": 0 * done}[which]
        k = np.arange(done.max())[:, None]
        counts = (k >= first) & (k < done)
        rows.append(score * counts / np.maximum(counts.sum(0), 1))
    weights = np.concatenate([*rows, np.zeros((int(teacher), table.shape[1]))])
    total = weights.sum(0)
    return np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)


def agreement(label: Any, target: Any, num_classes: int, *, ignore_index: int = 255) -> Any:
    """Return each sample's Dice between a fused hard label and the prompts' target: the sample gate.

    `label` [B, *spatial] holds classes 0..num_classes-1, `target` the same, or masks
    [B, num_classes - 1, *spatial] of the foreground classes. Voxels where either is `ignore_index`
    do not count. The result [B] (float64, the caller's kind) is the mean over the foreground classes
    that occur in either:

        a = mean_c 2 |label = c and T_c| / (|label = c| + |T_c|);   1 if no foreground class occurs

    A sample below 0.1 gets weight 0: the generalist found something else. Raises ValueError for
    wrong shapes, TypeError for mixed kinds.

    >>> import numpy as np
    >>> from semisam import fusion
    >>> fusion.agreement(np.array([[0, 1, 1, 2]]), np.array([[0, 1, 2, 2]]), 3).round(3).tolist()
    [0.667]
    """
    if ops.is_torch(label) != ops.is_torch(target):
        raise TypeError("agreement(): expected two NumPy arrays or two torch tensors, got a mixture")
    masks = tuple(target.shape) == (label.shape[0], num_classes - 1, *label.shape[1:])
    if num_classes < 2 or label.ndim < 2 or not (masks or tuple(target.shape) == tuple(label.shape)):
        raise ValueError(
            f"agreement(): target: expected the label's shape {tuple(label.shape)}, or masks with "
            f"{num_classes - 1} channels behind the batch, got {tuple(target.shape)}"
        )
    ops.one_device("agreement", label=label, target=target)
    total: Any = 0.0
    count: Any = 0
    for c in range(1, num_classes):
        ours, theirs, both = _overlap(label, target, c, num_classes, ignore_index, masks)
        size = ours + theirs
        occurs = size > 0
        total = total + 2.0 * both / (size + ~occurs)
        count = count + 1 * occurs
    none = count == 0
    result = (total + none) / (count + none)
    return result.double() if ops.is_torch(result) else result


def _overlap(
    label: Any, target: Any, c: int, num_classes: int, ignore_index: int, masks: bool
) -> tuple[Any, Any, Any]:
    """Voxels [B] of class c in the label, in the target and in both."""
    if masks and ops.dtype_name(label) == "u8" and ops.dtype_name(target) == "bool":
        # The target stands for the prediction: the operator looks for ignored voxels in the reference.
        mask = target[:, c - 1].view(label.dtype) * c if num_classes > 2 else target[:, 0]
        counts = ops.call("overlap", mask, label, num_classes, 1, ignore_index)[:, c]
        return counts[:, 1], counts[:, 0], counts[:, 2]
    valid = label != ignore_index
    if not masks:
        valid = valid & (target != ignore_index)
    space = tuple(range(1, label.ndim))
    ours = (label == c) & valid
    theirs = ((target[:, c - 1] != 0) if masks else (target == c)) & valid
    return ours.sum(space), theirs.sum(space), (ours & theirs).sum(space)


def join_classes(logits: Sequence[Any]) -> Any:
    """Join one-vs-rest logits of F foreground classes into logits of F + 1 classes.

    `logits` is a list of F arrays [B, 1, *spatial]; None stands for a class that was not asked for.
    The result [B, F + 1, *spatial] is (0, l_1, ..., l_F), with l = -10 for None: its softmax is the
    joint distribution, for one class exactly the sigmoid. Hand it to `fuse(..., logits=True)`.

    Raises ValueError for wrong shapes and if every class is None, TypeError for mixed kinds.

    >>> import numpy as np
    >>> from semisam import fusion
    >>> fusion.join_classes([np.ones((1, 1, 2)), None]).tolist()
    [[[0.0, 0.0], [1.0, 1.0], [-10.0, -10.0]]]
    """
    given = [z for z in logits if z is not None]
    if not given:
        raise ValueError("join_classes(): logits: expected at least one array, got none")
    first = given[0]
    for z in given:
        if tuple(z.shape) != tuple(first.shape) or len(z.shape) < 3 or z.shape[1] != 1:
            raise ValueError(
                f"join_classes(): logits: expected arrays of one shape (B, 1, *spatial), got "
                f"{tuple(z.shape)} beside {tuple(first.shape)}"
            )
        if ops.is_torch(z) != ops.is_torch(first):
            raise TypeError("join_classes(): expected all NumPy arrays or all torch tensors, got a mixture")
    ops.one_device("join_classes", **{f"logits[{i}]": z for i, z in enumerate(logits)})
    xp: Any = sys.modules["torch"] if ops.is_torch(first) else np
    skipped = xp.full_like(first, -10.0)
    return xp.concatenate([xp.zeros_like(first), *(skipped if z is None else z for z in logits)], 1)


# ---- arguments ----------------------------------------------------------------------------------


def _choice(function: str, argument: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{function}(): {argument}: expected one of {', '.join(choices)}, got {value!r}")


def _sources(function: str, sources: Any, argument: str = "sources") -> list[Any]:
    if not isinstance(sources, (list, tuple)) and not hasattr(sources, "shape"):
        raise TypeError(
            f"{function}(): {argument}: expected a list of arrays or one array with a leading source "
            f"dimension, got {type(sources).__name__}"
        )
    maps = list(sources)
    if not 1 <= len(maps) <= 128:
        raise ValueError(f"{function}(): {argument}: expected 1 to 128 arrays, got {len(maps)}")
    for i, p in enumerate(maps):
        if not hasattr(p, "shape"):
            raise TypeError(f"{function}(): {argument}[{i}]: expected an array, got {type(p).__name__}")
        if len(p.shape) < 3 or tuple(p.shape) != tuple(maps[0].shape):
            raise ValueError(
                f"{function}(): {argument}[{i}]: expected shape "
                f"{'(B, C, *spatial)' if i == 0 else tuple(maps[0].shape)}, got {tuple(p.shape)}"
            )
    ops.one_device(function, **{f"{argument}[{i}]": p for i, p in enumerate(maps)})
    return maps


def _tables(weights: Any, uncertainty_weights: Any, maps: list[Any]) -> list[Any]:
    """Return both weights as the operator has them: [S, B], where the sources are; None as it came."""
    tables: list[Any] = []
    known: list[Any] = []  # per sample, whether it has a source; None: unseen
    for name, given in (("weights", weights), ("uncertainty_weights", uncertainty_weights)):
        if ops.is_torch(given) and ops.stays(given.device):
            tables.append(_unseen(name, given, maps))
            known.append(None)
            continue
        columns = None if given is None else _columns(name, given, maps)
        tables.append(None if columns is None else _table(columns, maps))
        known.append([True] * maps[0].shape[0] if columns is None else [any(c) for c in columns])
    label, doubt = known[0], known[0] if uncertainty_weights is None else known[1]
    if label is not None and doubt is not None and label != doubt:
        b = next(b for b in range(len(label)) if label[b] != doubt[b])
        raise ValueError(
            "fuse(): uncertainty_weights: expected all 0 exactly where weights are, got something else "
            f"for sample {b}"
        )
    if label and not any(label):
        raise ValueError("fuse(): weights: expected at least one weight above 0, got none")
    return tables


def _unseen(argument: str, weights: Any, maps: list[Any]) -> Any:
    """A table of a tensor that nobody looks at."""
    s, batch = len(maps), maps[0].shape[0]
    if tuple(weights.shape) not in ((s,), (s, batch)):
        raise ValueError(
            f"fuse(): {argument}: expected a tensor of shape {(s,)}, one number per source, or {(s, batch)}, "
            f"got {tuple(weights.shape)}"
        )
    return weights.double().reshape(s, -1).expand(s, batch)


def _columns(argument: str, weights: Any, maps: list[Any]) -> list[list[float]]:
    """Weights that may be looked at, checked: one column per sample."""
    s, batch = len(maps), maps[0].shape[0]
    rows = weights.tolist() if hasattr(weights, "tolist") else list(weights)
    wide = [isinstance(row, (list, tuple)) for row in rows]
    if len(rows) != s or any(wide) != all(wide) or (all(wide) and any(len(row) != batch for row in rows)):
        raise ValueError(
            f"fuse(): {argument}: expected one number per source ({s}), or a table of {s} sources x "
            f"{batch} samples, got {rows}"
        )
    columns = [[float(v) for v in c] for c in (zip(*rows, strict=True) if all(wide) else [rows] * batch)]
    for b, column in enumerate(columns):
        for i, v in enumerate(column):
            if not 0 <= v <= 2:
                raise ValueError(
                    f"fuse(): {argument}: expected weights from 0 to 1, got {v:g} for source {i}"
                )
        if any(column) and not 1 - 1e-4 < sum(column) < 1 + 1e-4:
            raise ValueError(
                f"fuse(): {argument}: expected weights that sum to 1 (divide them by their sum), got a sum "
                f"of {sum(column):g} for sample {b}"
            )
    return columns


def _table(columns: list[list[float]], maps: list[Any]) -> Any:
    """Columns of numbers as an array [S, B] where the sources are."""
    flat = [v for row in zip(*columns, strict=True) for v in row]
    if ops.is_torch(maps[0]):
        made = ops.numbers(flat, sys.modules["torch"].float64, maps[0].device)
    else:
        made = np.array(flat, np.float64)
    return made.reshape(len(maps), -1)


def _run(
    maps: list[Any],
    weights: Any,
    uncertainty_weights: Any,
    *,
    unc: str,
    weight: str,
    logits: bool,
    want: Sequence[str],
    kappa: float = 4.0,
    tau_c: float = 0.0,
    tau_u: float = 1.0,
    log_offset: float = 0.0,
    ignore_index: int = 255,
    two_channels: bool = False,
) -> list[Any]:
    channels = maps[0].shape[1]
    if two_channels and channels != 1:
        raise ValueError(f"fuse(): two_channels: expected one-channel sources, got {channels} channels")
    if not math.isfinite(kappa):
        raise ValueError(f"fuse(): kappa: expected a number of at least 0, got {kappa}")
    outputs = ops.call(
        "fuse",
        maps,
        weights,
        uncertainty_weights,
        int(logits),
        _UNC.index(unc),
        _WEIGHT.index(weight),
        float(kappa),
        float(tau_c),
        float(tau_u),
        log_offset,
        ignore_index,
        2 if two_channels else channels,
        *(int(name in want) for name in _WANT),
    )
    return [out[0] if name in want else None for name, out in zip(_WANT, outputs, strict=True)]
