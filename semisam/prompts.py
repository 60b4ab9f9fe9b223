# SPDX-License-Identifier: Apache-2.0
"""Prompts for a generalist, computed from the specialist's prediction and never from a label.

The way of one round of clicks:

    target, region, skip = specialist_targets(prob)     # what to ask for, once per iteration
    point, label = next_click(target, current, region, skip=skip, seed=0, iteration=t, sample_ids=i, round=k)
    batch = batch.append(point, label)                  # a PromptBatch
    model(**batch.to_hf())                              # or to_sam_med3d, to_vista3d

All coordinates are array indices (axis 0 first) of the patch; only the converters know other frames.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from semisam import ops

__all__ = [
    "PromptBatch",
    "SpecialistTargets",
    "answer_mask",
    "boxes",
    "click_counter",
    "mask_logits",
    "next_click",
    "sample_points",
    "specialist_targets",
]

# Fourth word of the random counter: operators never share random numbers.
_CLICKS, _POINTS = 0, 1


class SpecialistTargets(NamedTuple):
    """What to ask a generalist for: masks [B, F, ...] and flags [B, F] of the foreground classes."""

    target: Any
    region: Any
    skip: Any


def specialist_targets(
    prob: Any,
    *,
    threshold: float = 0.5,
    p_min: float = 0.2,
    tau_p: float = 0.5,
    largest_component: bool = False,
) -> SpecialistTargets:
    """Turn a specialist's (or teacher's) probabilities into targets, confident regions and skip flags.

    `prob` is the softmax [B, C, H, W] or [B, C, D, H, W], C >= 2, class 0 background (NumPy or torch, any
    floating dtype). Returns (target, region, skip) for the F = C - 1 foreground classes: boolean masks
    [B, F, ...] and flags [B, F], the same kind of array, without gradient.

        th     = threshold if max P_c >= threshold, else max P_c / 2 if max P_c >= p_min, else skip
        target = {P_c >= th}, its largest component only if `largest_component` (26- or 8-connected)
        region = {H(P) / ln C <= tau_p}, everything if th < threshold or tau_p >= 1

    Both masks of a skipped class are empty. Raises TypeError for a dtype that is not floating, ValueError
    for a wrong shape or a number outside its range. Papers: SemiSAM (arXiv 2312.06316), SemiSAM+
    (arXiv 2502.20749).

    >>> import numpy as np
    >>> from semisam import prompts
    >>> prob = np.float32([[[[0.1, 0.45, 0.9]], [[0.9, 0.55, 0.1]]]])  # B C H W = 1 2 1 3
    >>> target, region, skip = prompts.specialist_targets(prob)
    >>> target.tolist(), region.tolist(), skip.tolist()
    ([[[[True, True, False]]]], [[[[True, False, True]]]], [[False]])
    """
    shape = _shape(prob, "specialist_targets", "prob", (4, 5), "[B, C, H, W] or [B, C, D, H, W]")
    if shape[1] < 2:
        raise ValueError(
            f"specialist_targets(): prob: expected at least 2 classes (background first), got shape {shape}"
        )
    made, _ = targets_and_spread(
        prob, threshold=threshold, p_min=p_min, tau_p=tau_p, largest_component=largest_component
    )
    return made


def targets_and_spread(
    prob: Any, *, threshold: float, p_min: float, tau_p: float, largest_component: bool
) -> tuple[SpecialistTargets, Any]:
    """Return `specialist_targets` of a map [B, C, ...] and how far it is from a softmax, in one sweep.

    The second result [B, 2] (float32) has, per sample, how far the sums over the classes are from 1 at most
    (NaN where one is) and how far the values go below 0.

    >>> import numpy as np
    >>> from semisam import prompts
    >>> prob = np.float32([[[[0.1, 0.5, 1.0]], [[0.9, 0.25, -0.5]]]])
    >>> settings = {"threshold": 0.5, "p_min": 0.2, "tau_p": 0.5, "largest_component": False}
    >>> prompts.targets_and_spread(prob, **settings)[1].tolist()
    [[0.5, 0.5]]
    """
    shape = tuple(prob.shape)
    made = ops.call("specialist_targets", prob, shape[1] - 1, float(threshold), float(p_min), float(tau_p))
    target, region, skip, spread = made
    if largest_component:
        f = shape[1] - 1
        volumes = target.reshape(shape[0] * f, *(1,) * (5 - len(shape)), *shape[2:])
        target = ops.call("keep_components", volumes, 26, 0).reshape(shape[0], f, *shape[2:])
    return SpecialistTargets(target, region, skip), spread


def click_counter(
    *,
    iteration: Any,
    sample_ids: Any,
    round: int,
    clicks: int = 10,
    classes: Sequence[int],
    like: Any = None,
) -> Any:
    """Return the random counters [B * F, 4] of one round of clicks, int64, of the kind of `like`.

        counter = (iteration, sample id, c * clicks + round, stream 0)   for every sample and class c

    All four are words of 32 bits; ValueError if one does not fit. Together with the seed they are all
    that a click's randomness depends on, wherever in a batch the sample lies. `iteration` may be a torch
    tensor of one number and `sample_ids` one of B, so that a captured graph draws anew at every replay; of
    these the lowest 32 bits count.

    >>> from semisam import prompts
    >>> prompts.click_counter(iteration=3, sample_ids=[7], round=1, clicks=10, classes=[1, 2]).tolist()
    [[3, 7, 11, 0], [3, 7, 21, 0]]
    """
    if not 0 <= round < clicks:
        raise ValueError(f"click_counter(): round: expected 0 to clicks - 1 = {clicks - 1}, got {round}")
    third = [c * clicks + round for c in map(int, classes)]
    return _words(iteration, sample_ids, third, _CLICKS, like, "click_counter")


def next_click(
    target: Any,
    current: Any = None,
    region: Any = None,
    *,
    seed: int,
    iteration: Any,
    sample_ids: Any,
    round: int,
    clicks: int = 10,
    rule: str | None = None,
    classes: Sequence[int] | None = None,
    skip: Any = None,
) -> tuple[Any, Any]:
    """Return the next click of every sample and class, as an interactive user would set it.

    `target` [B, F, H, W] or [B, F, D, H, W] (bool or uint8) is what the generalist should find, `current`
    its mask so far (None: empty), `region` where clicks may go (None: everywhere), `skip` [B, F] rows to
    leave out. `rule` is "ritm" or "random"; by default RITM in rounds 0 and 1, random later. Returns array
    indices [B, F, ndim] (int64) and labels [B, F] (int32): 1 positive, 0 negative, -1 no click, because
    current equals target (or the row is skipped): that row has converged.

        FN = target & ~current & region,   FP = ~target & current & region;   without region if both empty
        ritm:   positive iff max d_FN > max d_FP; one voxel of {d > max d / 2} of that region, where d is the
                distance to the nearest voxel outside the region, the patch's outside included
        random: one voxel of FN | FP, positive iff it is in FN

    The choice is Philox4x32-10 of `seed` (64 bits) and the counter (iteration, sample id, class, round) of
    `click_counter`; `classes` are the classes' numbers, 1..F by default, `clicks` the planned rounds.
    Comparisons are exact integers, so every thread count and device gives the same click. Raises TypeError
    for a dtype that is not bool or uint8, ValueError for shapes that differ. Paper: Sofiiuk et al.,
    "Reviving Iterative Training with Mask Guidance" (RITM, arXiv 2102.06583).

    >>> import numpy as np
    >>> from semisam import prompts
    >>> target = np.zeros((1, 1, 5, 5), bool)
    >>> target[..., 1:4, 1:4] = True
    >>> prompts.next_click(target, seed=0, iteration=0, sample_ids=[0], round=0)
    (array([[[2, 2]]]), array([[1]], dtype=int32))
    """
    shape = _shape(target, "next_click", "target", (4, 5), "[B, F, H, W] or [B, F, D, H, W]")
    batch, f = shape[:2]
    classes = range(1, f + 1) if classes is None else classes
    if len(classes) != f:
        raise ValueError(f"next_click(): classes: expected one number per class ({f}), got {len(classes)}")
    if len(sample_ids) != batch:
        raise ValueError(
            f"next_click(): sample_ids: expected one per sample ({batch}), got {len(sample_ids)}"
        )
    rule = rule or ("ritm" if round < 2 else "random")
    if rule not in ("ritm", "random"):
        raise ValueError(f"next_click(): rule: expected 'ritm' or 'random', got {rule!r}")
    for name, mask in (("current", current), ("region", region)):
        if mask is not None and tuple(mask.shape) != shape:
            raise ValueError(
                f"next_click(): {name}: expected target's shape {shape}, got {tuple(mask.shape)}"
            )
    if skip is not None and tuple(skip.shape) != shape[:2]:
        raise ValueError(f"next_click(): skip: expected shape {shape[:2]}, got {tuple(skip.shape)}")
    ops.one_device("next_click", target=target, current=current, region=region, skip=skip)
    counter = click_counter(
        iteration=iteration, sample_ids=sample_ids, round=round, clicks=clicks, classes=classes, like=target
    )
    flat = (batch * f, *(1,) * (5 - len(shape)), *shape[2:])
    rows = [None if mask is None else mask.reshape(flat) for mask in (target, current, region)]
    rows.append(None if skip is None else skip.reshape(-1))
    ndim = len(shape) - 2
    point, label = ops.call("next_click", *rows, counter, _seed(seed, "next_click"), rule == "ritm", ndim)
    return point[:, 3 - ndim :].reshape(batch, f, ndim), label.reshape(batch, f)


def answer_mask(logits: Any) -> tuple[Any, Any]:
    """Return what an answer calls foreground, the next round's `current`, and whether it says anything.

    `logits` [B, F, H, W] or [B, F, D, H, W], any floating dtype. Returns the mask {logits > 0} (bool, the
    same shape) and the span [B, F, 2] (float32): the smallest and the largest logit of each row, NaN both
    where a voxel is. An answer whose span is not finite is broken; one that is the same number twice says
    nothing. Raises TypeError for a dtype that is not floating, ValueError for another number of dimensions.

    >>> import numpy as np
    >>> from semisam import prompts
    >>> mask, span = prompts.answer_mask(np.float32([[[[-2, 1, 3]]]]))
    >>> mask.tolist(), span.tolist()
    ([[[[False, True, True]]]], [[[-2.0, 3.0]]])
    """
    shape = _shape(logits, "answer_mask", "logits", (4, 5), "[B, F, H, W] or [B, F, D, H, W]")
    mask, span = ops.call("answer_mask", logits.reshape(shape[0] * shape[1], *shape[2:]))
    return mask.reshape(shape), span.reshape(*shape[:2], 2)


def sample_points(
    prob: Any, n: int = 5, *, seed: int, iteration: Any, sample_ids: Any, confidence: float = 0.8
) -> PromptBatch:
    """Draw n points inside and n outside the region {argmax prob = c} of every class, background too.

    `prob` is the softmax [B, C, H, W] or [B, C, D, H, W] (NumPy or torch, any floating dtype; compared as
    float32). Returns a PromptBatch with points [B, C, 2 n, ndim]: n positive ones, then n negative ones,
    each without replacement. Only voxels with max_c prob >= `confidence` are drawn where at least n of
    them are in the region; a region with fewer than n voxels is padded with label -1.

    Randomness is Philox4x32-10 of `seed` and (iteration, sample id, class, index): the same points on any
    thread count and device, wherever in a batch a sample lies. Raises TypeError for a dtype that is not
    floating, ValueError for a wrong shape and n outside 1..1024. Paper: SC-SAM (arXiv 2601.17934).

    >>> import numpy as np
    >>> from semisam import prompts
    >>> prob = np.float32([[[[0.9, 0.9, 0.1]], [[0.1, 0.1, 0.9]]]])  # class 1 is the last pixel
    >>> batch = prompts.sample_points(prob, 2, seed=0, iteration=0, sample_ids=[0])
    >>> batch.points[0, 1].tolist(), batch.labels[0, 1].tolist()
    ([[0, 2], [0, 0], [0, 0], [0, 1]], [1, -1, 0, 0])
    """
    shape = _shape(prob, "sample_points", "prob", (4, 5), "[B, C, H, W] or [B, C, D, H, W]")
    batch, c = shape[:2]
    if len(sample_ids) != batch:
        raise ValueError(
            f"sample_points(): sample_ids: expected one per sample ({batch}), got {len(sample_ids)}"
        )
    counter = _words(iteration, sample_ids, [0], _POINTS, prob, "sample_points")
    volume = prob[:, :, None] if len(shape) == 4 else prob
    point, label = ops.call(
        "sample_points", volume, counter, _seed(seed, "sample_points"), int(n), float(confidence)
    )
    ndim = len(shape) - 2
    points = point.reshape(batch, c, 2 * n, 3)[..., 3 - ndim :]
    return PromptBatch(shape[2:], points, label.reshape(batch, c, 2 * n))


def boxes(mask: Any, margin: float = 0.05, *, order: str = "array") -> tuple[Any, Any]:
    """Return the bounding boxes of masks, enlarged by `margin` times their sides and clipped.

    `mask` is [B, F, H, W] or [B, F, D, H, W] (bool or uint8, NumPy or torch). Returns boxes
    [B, F, 2 * ndim] (float32) and found [B, F] (bool); the box of an empty mask is zeros. Order "array":
    all lower, then all upper inclusive indices, axis 0 first, as in PromptBatch; "xy": axes reversed, in
    2-D SAM's (min col, min row, max col, max row).

        side = hi - lo + 1,   box = (max(lo - margin * side, 0), min(hi + margin * side, size - 1))

    Raises TypeError for another dtype, ValueError for a wrong shape, order or a margin that is not in
    0..1024. Paper: MedSAM (arXiv 2304.12306), box prompts.

    >>> import numpy as np
    >>> from semisam import prompts
    >>> mask = np.zeros((1, 1, 40, 50), bool)
    >>> mask[0, 0, 10:30, 20:50] = True
    >>> prompts.boxes(mask, order="xy")[0].tolist()
    [[[18.5, 9.0, 49.0, 30.0]]]
    """
    shape = _shape(mask, "boxes", "mask", (4, 5), "[B, F, H, W] or [B, F, D, H, W]")
    if order not in ("array", "xy"):
        raise ValueError(f"boxes(): order: expected 'array' or 'xy', got {order!r}")
    ndim = len(shape) - 2
    flat = (shape[0] * shape[1], *(1,) * (3 - ndim), *shape[2:])
    box, found = ops.call("boxes", mask.reshape(flat), float(margin))
    box = box.reshape(*shape[:2], 2, 3)[..., 3 - ndim :]
    if order == "xy":
        box = _reverse(box)
    return box.reshape(*shape[:2], 2 * ndim), found.reshape(shape[:2])


def mask_logits(prob: Any, size: Sequence[int]) -> Any:
    """Return the mask prompt of a foreground probability map: clipped logits of cell averages.

    `prob` is [N, D, H, W] or [N, H, W] with values in 0..1 (NumPy or torch, any floating dtype; a mean
    that rounding has put outside counts as the nearer end, NaN stays), `size` the prompt's (d, h, w) or
    (h, w), at most the map's; the result is [N, *size], float32, the same kind of array. Cells are those of
    adaptive average pooling.

        out = clip(ln(m / (1 - m)), -10, 10),   m = clip(mean of prob over the cell, 0, 1)

    Raises ValueError for a size that is larger than the map or has another number of dimensions,
    TypeError for a dtype that is not floating. Paper: SAM (arXiv 2304.02643), mask input.

    >>> import numpy as np
    >>> from semisam import prompts
    >>> prompts.mask_logits(np.full((1, 8, 8), 0.5), (2, 2)).tolist()
    [[[0.0, 0.0], [0.0, 0.0]]]
    """
    shape = tuple(prob.shape)
    if len(size) != len(shape) - 1 or len(size) not in (2, 3):
        raise ValueError(
            f"mask_logits(): size: expected one number per spatial dimension of prob {shape}, "
            f"(d, h, w) or (h, w), got {tuple(size)}"
        )
    flat = len(size) == 2
    out = ops.call("mask_logits", prob[:, None] if flat else prob, *((1,) if flat else ()), *map(int, size))
    return out[:, 0] if flat else out


# ---- the batch ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """All prompts of a batch, in array-index order; the converters turn them into a model's own.

    `shape` is the patch's spatial shape (n0, n1[, n2]); `points` [B, F, K, ndim] are array indices,
    `labels` [B, F, K] 1 positive, 0 negative, -1 no point (padding); optional `boxes` [B, F, 2 * ndim] (all
    lower, then all upper inclusive indices) and `mask_logits` [B, F, *size] in the frame and the
    resolution of the generalist's mask input. `unpadded` is a statement of whoever made the batch: rows that
    are asked for have a click in each of the K places, so that nobody need look at the labels to know it.
    Arrays are all NumPy or all torch. ValueError for shapes that do not fit each other and labels other than
    1, 0, -1.

    >>> import numpy as np
    >>> from semisam.prompts import PromptBatch
    >>> batch = PromptBatch.empty(1, 1, (100, 200)).append(np.array([[[30, 40]]]), np.array([[1]]))
    >>> batch.to_hf()["input_points"].tolist()
    [[[[204.8000030517578, 153.60000610351562]]]]
    """

    shape: tuple[int, ...]
    points: Any
    labels: Any
    boxes: Any = None
    mask_logits: Any = None
    unpadded: bool = False

    def __post_init__(self) -> None:
        shape = tuple(int(n) for n in self.shape)
        object.__setattr__(self, "shape", shape)
        ndim = len(shape)
        if ndim not in (2, 3) or min(shape) < 1:
            raise ValueError(f"PromptBatch(): shape: expected 2 or 3 positive sides, got {shape}")
        p = tuple(self.points.shape)
        if len(p) != 4 or p[3] != ndim:
            raise ValueError(f"PromptBatch(): points: expected [B, F, K, {ndim}], got shape {p}")
        wanted = {"labels": p[:3], "boxes": (*p[:2], 2 * ndim)}
        for name, expected in wanted.items():
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != expected:
                raise ValueError(
                    f"PromptBatch(): {name}: expected shape {expected}, got {tuple(value.shape)}"
                )
        m = self.mask_logits
        if m is not None and (tuple(m.shape[:2]) != p[:2] or len(m.shape) != 2 + ndim):
            raise ValueError(
                f"PromptBatch(): mask_logits: expected [{p[0]}, {p[1]}, *size] with {ndim} spatial "
                f"dimensions, got shape {tuple(m.shape)}"
            )
        ops.one_device("PromptBatch", points=self.points, labels=self.labels, boxes=self.boxes, mask_logits=m)
        # Values are looked at where that costs nothing; on a GPU it would make the host wait.
        on_torch = ops.is_torch(self.labels)
        if not on_torch or not ops.stays(self.labels.device):
            values = self.labels.cpu().numpy() if on_torch else np.asarray(self.labels)
            if values.size and (values.min() < -1 or values.max() > 1):
                raise ValueError("PromptBatch(): labels: expected 1, 0 or -1 (no point), got other values")

    @classmethod
    def empty(cls, batch: int, classes: int, shape: Sequence[int], like: Any = None) -> PromptBatch:
        """Return a batch without any point, of the kind (and on the device) of `like`.

        >>> from semisam.prompts import PromptBatch
        >>> PromptBatch.empty(2, 1, (32, 32, 32)).points.shape
        (2, 1, 0, 3)
        """
        points = _array(np.zeros((batch, classes, 0, len(shape)), np.int64), like)
        labels = _array(np.zeros((batch, classes, 0), np.int32), like)
        return cls(tuple(shape), points, labels)

    def append(
        self, points: Any, labels: Any, click_memory: str = "last", mask_logits: Any = None
    ) -> PromptBatch:
        """Return the batch of the next round: points [B, F, ndim] and labels [B, F] join.

        `click_memory` "last" keeps only the new click (how SAM-Med3D was trained), "all" keeps the earlier
        ones in front. `mask_logits` is the previous round's answer; None keeps what the batch has. Label -1
        (no click) becomes padding. Boxes stay; the batch no longer says that it is `unpadded`.

        >>> import numpy as np
        >>> from semisam.prompts import PromptBatch
        >>> batch = PromptBatch.empty(1, 1, (9, 9))
        >>> for k in range(3):
        ...     batch = batch.append(np.array([[[k, 0]]]), np.array([[1]]), click_memory="all")
        >>> batch.points[0, 0].tolist()
        [[0, 0], [1, 0], [2, 0]]
        """
        if click_memory not in ("last", "all"):
            raise ValueError(f"append(): click_memory: expected 'last' or 'all', got {click_memory!r}")
        expected = (*self.points.shape[:2], len(self.shape))
        if tuple(points.shape) != expected:
            raise ValueError(f"append(): points: expected shape {expected}, got {tuple(points.shape)}")
        if tuple(labels.shape) != expected[:2]:
            raise ValueError(f"append(): labels: expected shape {expected[:2]}, got {tuple(labels.shape)}")
        ops.one_device("append", batch=self.points, points=points, labels=labels, mask_logits=mask_logits)
        points, labels = points[:, :, None], labels[:, :, None]
        if click_memory == "all" and self.points.shape[2]:
            points = _join([self.points, points], 2)
            labels = _join([self.labels, labels], 2)
        masks = self.mask_logits if mask_logits is None else mask_logits
        return replace(self, points=points, labels=labels, mask_logits=masks, unpadded=False)

    def fold_classes(self) -> PromptBatch:
        """Return the same prompts as a batch of B * F samples with one class each.

        >>> from semisam.prompts import PromptBatch
        >>> PromptBatch.empty(2, 3, (8, 8)).fold_classes().points.shape
        (6, 1, 0, 2)
        """

        def fold(a: Any) -> Any:
            return None if a is None else a.reshape(a.shape[0] * a.shape[1], 1, *a.shape[2:])

        return PromptBatch(
            self.shape,
            fold(self.points),
            fold(self.labels),
            fold(self.boxes),
            fold(self.mask_logits),
            self.unpadded,
        )

    # ---- Hugging Face SAM, MedSAM

    def to_hf(self, size: int = 1024, pad_label: int = -10, *, keep_aspect: bool = True) -> dict[str, Any]:
        """Return keyword arguments of Hugging Face's SamModel: 2-D, (x, y) = (column, row), P = F prompts.

        `input_points` [B, F, K, 2] and `input_labels` [B, F, K] (absent for K = 0), `input_boxes` [B, F, 4]
        as (x0, y0, x1, y1), `input_masks` [B, 1, h, w], each only if the batch has it; floats are float32,
        labels int64. Coordinates go to the frame of the image resized so that its longest side is `size`,
        x' = x * (new_w / old_w), or of a size x size image if not `keep_aspect` (MedSAM). Label -1 becomes
        `pad_label`: -10 drops the token, -1 makes SAM's "not a point".

        Raises ValueError for 3-D prompts, and for mask prompts of several classes, since SamModel takes one
        mask per image: use fold_classes() and repeat the image embeddings.

        >>> import numpy as np
        >>> from semisam.prompts import PromptBatch
        >>> one = PromptBatch((512, 256), np.array([[[[100, 50]]]]), np.array([[[1]]]))
        >>> one.to_hf()["input_points"].tolist()  # x = 50 * 512 / 256, y = 100 * 1024 / 512
        [[[[100.0, 200.0]]]]
        """
        scale = self._hf_scale(self.shape, size, keep_aspect, "to_hf")
        out: dict[str, Any] = {}
        if self.points.shape[2]:
            out["input_points"] = _float32(_reverse(_float64(self.points) * _array(scale, self.points)))
            out["input_labels"] = _int64(_where(self.labels == -1, pad_label, self.labels))
        if self.boxes is not None:
            corners = self.boxes.reshape(*self.boxes.shape[:2], 2, 2)
            scaled = _reverse(_float64(corners) * _array(scale, self.boxes))
            out["input_boxes"] = _float32(scaled.reshape(self.boxes.shape))
        if self.mask_logits is not None:
            if self.mask_logits.shape[1] != 1:
                raise ValueError(
                    f"to_hf(): mask_logits: expected one class, as SamModel takes one mask per image, got "
                    f"{self.mask_logits.shape[1]}; use fold_classes() and repeat the image embeddings"
                )
            out["input_masks"] = self.mask_logits
        return out

    @classmethod
    def from_hf(
        cls,
        inputs: Mapping[str, Any],
        shape: Sequence[int],
        size: int = 1024,
        pad_label: int = -10,
        *,
        keep_aspect: bool = True,
    ) -> PromptBatch:
        """Return the PromptBatch that `to_hf` with the same arguments made `inputs` from.

        Points are rounded to whole indices, boxes are float32.

        >>> from semisam.prompts import PromptBatch
        >>> import numpy as np
        >>> one = PromptBatch((500, 333), np.array([[[[499, 17]]]]), np.array([[[0]]]))
        >>> PromptBatch.from_hf(one.to_hf(), (500, 333)).points.tolist()
        [[[[499, 17]]]]
        """
        scale = cls._hf_scale(tuple(shape), size, keep_aspect, "from_hf")
        box = inputs.get("input_boxes")
        points, labels = inputs.get("input_points"), inputs.get("input_labels")
        if points is None:
            if box is None:
                raise ValueError("from_hf(): inputs: expected input_points or input_boxes, got neither")
            points = _array(np.zeros((*box.shape[:2], 0, 2), np.float32), box)
            labels = _array(np.zeros((*box.shape[:2], 0), np.int64), box)
        points = _round(_reverse(_float64(points)) / _array(scale, points))
        labels = _where(labels == pad_label, -1, labels)
        if box is not None:
            corners = _reverse(_float64(box.reshape(*box.shape[:2], 2, 2))) / _array(scale, box)
            box = _float32(corners.reshape(box.shape))
        return cls(tuple(shape), points, labels, box, inputs.get("input_masks"))

    @staticmethod
    def _hf_scale(shape: Sequence[int], size: int, keep_aspect: bool, who: str) -> Any:
        """Rows and columns of the resized image per row and column."""
        if len(shape) != 2:
            raise ValueError(f"{who}(): shape: expected a 2-D patch (rows, columns), got {tuple(shape)}")
        if keep_aspect:
            longest = size / max(shape)
            return np.array([max(1, int(n * longest + 0.5)) / n for n in shape])  # at least a pixel
        return np.array([size / n for n in shape])

    # ---- SAM-Med3D, SAM-Med3D-turbo, SegAnyPET

    def to_sam_med3d(self, side: int = 128) -> dict[str, Any]:
        """Return prompts for SAM-Med3D: indices of its side^3 cube in array order, one row per class.

        `points` [B * F, K, 3] (float32), `labels` [B * F, K] (int64; -1 padding), and `mask_logits`
        [B * F, 1, *size] if the batch has them (already in the cube's frame). A patch that fits is padded
        symmetrically, any other is resized to the cube:

            all sides <= side: c' = c + (side - n) // 2        else: c' = (c + 0.5) * side / n - 0.5

        Raises ValueError for 2-D prompts and for boxes, which SAM-Med3D cannot take.

        >>> import numpy as np
        >>> from semisam.prompts import PromptBatch
        >>> one = PromptBatch((112, 112, 80), np.array([[[[0, 56, 79]]]]), np.array([[[1]]]))
        >>> one.to_sam_med3d()["points"].tolist()
        [[[8.0, 64.0, 103.0]]]
        """
        if self.boxes is not None:
            raise ValueError(
                "to_sam_med3d(): boxes: expected None, as SAM-Med3D has no box prompts, got boxes"
            )
        scale, shift = self._cube_frame(self.shape, side, "to_sam_med3d")
        points = _float64(self.points) * _array(scale, self.points) + _array(shift, self.points)
        rows = self.points.shape[0] * self.points.shape[1]
        out = {
            "points": _float32(points.reshape(rows, *points.shape[2:])),
            "labels": _int64(self.labels.reshape(rows, self.labels.shape[2])),
        }
        if self.mask_logits is not None:
            out["mask_logits"] = self.mask_logits.reshape(rows, 1, *self.mask_logits.shape[2:])
        return out

    @classmethod
    def from_sam_med3d(
        cls, inputs: Mapping[str, Any], shape: Sequence[int], batch: int, side: int = 128
    ) -> PromptBatch:
        """Return the PromptBatch of `batch` samples that `to_sam_med3d` made `inputs` from.

        >>> import numpy as np
        >>> from semisam.prompts import PromptBatch
        >>> one = PromptBatch((183, 140, 88), np.array([[[[182, 0, 44]]]]), np.array([[[1]]]))
        >>> PromptBatch.from_sam_med3d(one.to_sam_med3d(), one.shape, 1).points.tolist()
        [[[[182, 0, 44]]]]
        """
        scale, shift = cls._cube_frame(tuple(shape), side, "from_sam_med3d")
        points, labels = inputs["points"], inputs["labels"]
        if batch < 1 or points.shape[0] % batch:
            raise ValueError(
                f"from_sam_med3d(): batch: expected a divisor of the {points.shape[0]} rows, got {batch}"
            )
        points = _round((_float64(points) - _array(shift, points)) / _array(scale, points))
        head = (batch, points.shape[0] // batch)
        masks = inputs.get("mask_logits")
        return cls(
            tuple(shape),
            points.reshape(*head, *points.shape[1:]),
            labels.reshape(*head, labels.shape[1]),
            mask_logits=None if masks is None else masks.reshape(*head, *masks.shape[2:]),
        )

    @staticmethod
    def _cube_frame(shape: Sequence[int], side: int, who: str) -> tuple[Any, Any]:
        if len(shape) != 3:
            raise ValueError(f"{who}(): shape: expected a 3-D patch, got {tuple(shape)}")
        n = np.array(shape, np.float64)
        if max(shape) <= side:
            return np.ones(3), (side - n) // 2
        return side / n, 0.5 * side / n - 0.5

    # ---- VISTA3D

    def to_vista3d(
        self,
        classes: Sequence[int],
        special: Sequence[int] = (25, 26, 27, 28, 29, 117),
        *,
        class_prompts: bool = False,
    ) -> list[dict[str, Any]]:
        """Return one dictionary per sample with keyword arguments of MONAI's VISTA3D.

        VISTA3D takes one image at a time and F objects of it: `point_coords` [F, K, 3] (float32 array
        indices of the patch), `point_labels` [F, K] (int64: 0, 1, padding -1; 2, 3 instead of 0, 1 for the
        `special` classes, tumours and vessels), `prompt_class` [F, 1]: the global numbers `classes` of the F
        classes, above 132 for zero-shot. With `class_prompts`, `class_vector` [F, 1] asks the class head,
        too; without any point (K = 0) it stands alone.

        Raises ValueError for 2-D prompts, boxes, or another number of classes than F.

        >>> import numpy as np
        >>> from semisam.prompts import PromptBatch
        >>> one = PromptBatch((64, 64, 32), np.array([[[[1, 2, 3]]]]), np.array([[[1]]]))
        >>> one.to_vista3d([25])[0]["point_labels"].tolist()
        [[3]]
        """
        batch, f, k = self.labels.shape
        if len(self.shape) != 3:
            raise ValueError(f"to_vista3d(): shape: expected a 3-D patch, got {self.shape}")
        if self.boxes is not None:
            raise ValueError("to_vista3d(): boxes: expected None, as VISTA3D has no box prompts, got boxes")
        if len(classes) != f:
            raise ValueError(f"to_vista3d(): classes: expected one per class ({f}), got {len(classes)}")
        numbers = _array(np.array(classes, np.int64)[:, None], self.labels)
        is_special = _array(np.isin(np.array(classes), special)[:, None], self.labels)
        samples = []
        for b in range(batch):
            sample: dict[str, Any] = {}
            if k:
                labels = _int64(self.labels[b])
                sample["point_coords"] = _float32(self.points[b])
                sample["point_labels"] = labels + 2 * _int64(is_special & (labels >= 0))
                sample["prompt_class"] = numbers
            if class_prompts or not k:
                sample["class_vector"] = numbers
            samples.append(sample)
        return samples

    @classmethod
    def from_vista3d(cls, samples: Sequence[Mapping[str, Any]], shape: Sequence[int]) -> PromptBatch:
        """Return the PromptBatch that `to_vista3d` made `samples` from (class numbers are not part of it).

        >>> import numpy as np
        >>> from semisam.prompts import PromptBatch
        >>> one = PromptBatch((64, 64, 32), np.array([[[[1, 2, 3]]]]), np.array([[[0]]]))
        >>> PromptBatch.from_vista3d(one.to_vista3d([117]), one.shape).labels.tolist()
        [[[0]]]
        """
        if not samples:
            raise ValueError("from_vista3d(): samples: expected at least one, got none")
        if "point_coords" not in samples[0]:
            vector = samples[0]["class_vector"]
            return cls.empty(len(samples), vector.shape[0], shape, like=vector)
        points = _join([s["point_coords"][None] for s in samples], 0)
        labels = _join([s["point_labels"][None] for s in samples], 0)
        return cls(tuple(shape), _round(_float64(points)), _where(labels > 1, labels - 2, labels))


# ---- NumPy and torch alike ----------------------------------------------------------------------


def _shape(array: Any, who: str, name: str, ndims: tuple[int, ...], expected: str) -> tuple[int, ...]:
    shape = getattr(array, "shape", None)
    if shape is None:
        raise TypeError(
            f"{who}(): {name}: expected a NumPy array or torch tensor, got {type(array).__name__}"
        )
    if len(shape) not in ndims:
        raise ValueError(f"{who}(): {name}: expected {expected}, got shape {tuple(shape)}")
    return tuple(int(n) for n in shape)


def _seed(seed: int, who: str) -> int:
    """A seed of 0..2^64-1 as the signed number with the same bits."""
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"{who}(): seed: expected a number of 64 bits, got {seed}")
    return int(seed) - 2**64 if seed >= 2**63 else int(seed)


def _words(iteration: Any, sample_ids: Any, third: Sequence[int], stream: int, like: Any, who: str) -> Any:
    """Counters (iteration, sample, third, stream) [samples * len(third), 4] of all samples and thirds."""
    host = [v for v in (iteration, sample_ids) if not ops.is_torch(v)]
    if len(host) == 2 and not (ops.is_torch(like) and ops.stays(like.device)):
        rows = [(iteration, s, t, stream) for s in map(int, sample_ids) for t in third]
        _check_words(iteration, [row[1] for row in rows], third, who)
        return _array(np.array(rows, np.int64).reshape(len(rows), 4), like)
    torch = importlib.import_module("torch")
    _check_words(
        0 if ops.is_torch(iteration) else int(iteration),
        [] if ops.is_torch(sample_ids) else [int(s) for s in sample_ids],
        third,
        who,
    )
    n, device = len(sample_ids), like.device
    ids = sample_ids if ops.is_torch(sample_ids) else ops.numbers(list(sample_ids), torch.int64, device)
    step = iteration if ops.is_torch(iteration) else ops.numbers(iteration, torch.int64, device)
    made = torch.full((n, len(third), 4), stream, dtype=torch.int64, device=device)
    made[:, :, 0] = step.to(device, torch.int64).reshape(()) & 0xFFFFFFFF
    made[:, :, 1] = ids.to(device, torch.int64).reshape(n, 1) & 0xFFFFFFFF
    for i, word in enumerate(third):
        made[:, i, 2].fill_(word)
    return made.reshape(-1, 4)


def _check_words(iteration: int, ids: Sequence[int], third: Sequence[int], who: str) -> None:
    for name, words in (("iteration", [iteration]), ("sample_ids", ids), ("classes", third)):
        for word in words:
            if not 0 <= word < 2**32:
                raise ValueError(f"{who}(): {name}: expected numbers of 32 bits (0 to 2^32 - 1), got {word}")


def _array(values: Any, like: Any) -> Any:
    """`values` as the kind of array that `like` is, on its device."""
    if not ops.is_torch(like):
        return values
    torch = importlib.import_module("torch")
    if ops.stays(like.device) and values.size <= 64:
        return ops.numbers(values, getattr(torch, values.dtype.name), like.device)
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if like.device.type == "cuda":
        tensor = tensor.pin_memory()  # from other memory the host would wait for the copy
    return tensor.to(like.device, non_blocking=True)


def _join(arrays: Sequence[Any], axis: int) -> Any:
    if ops.is_torch(arrays[0]):
        return importlib.import_module("torch").cat(list(arrays), axis)
    return np.concatenate(arrays, axis)


def _reverse(a: Any) -> Any:
    """The last axis backwards: (row, column) <-> (x, y)."""
    return a.flip(-1) if ops.is_torch(a) else a[..., ::-1].copy()


def _float64(a: Any) -> Any:
    return a.double() if ops.is_torch(a) else np.asarray(a, np.float64)


def _float32(a: Any) -> Any:
    return a.float() if ops.is_torch(a) else np.asarray(a, np.float32)


def _int64(a: Any) -> Any:
    return a.long() if ops.is_torch(a) else np.asarray(a, np.int64)


def _round(a: Any) -> Any:
    return _int64(a.round())


def _where(condition: Any, value: Any, other: Any) -> Any:
    if ops.is_torch(condition):
        return importlib.import_module("torch").where(condition, value, other)
    return np.where(condition, value, other)
