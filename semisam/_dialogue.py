# SPDX-License-Identifier: Apache-2.0
"""The dialogue of the generalist's term with one generalist: prompts out, answers in, round by round."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from semisam import prompts
from semisam.gate import largest_components

__all__ = ["MODES", "Answers", "Request", "Slot", "joined", "largest", "usable"]

MODES: dict[str, frozenset[str]] = {
    "point": frozenset({"points"}),
    "unc": frozenset({"points"}),
    "mask": frozenset({"mask"}),
    "mixed": frozenset({"points", "mask"}),
    "box": frozenset({"box"}),
}
"""Prompt modes, and the kinds of prompts that a generalist must take for them."""

_SURE = 10.0  # the logit of a certain answer
_SAME = "are the same in every voxel"


@dataclass(frozen=True)
class Request:
    """What all generalists are asked in one step."""

    images: Any
    prob: Any  # [B, C, *S] float32
    targets: prompts.SpecialistTargets
    step: Any
    ids: Any
    spacing: Any
    quiet: bool = False  # look at no value of a tensor: step and ids may be tensors, all rounds are asked for
    spread: Any = None  # [B, 2] float32: how far prob is from a distribution (prompts.targets_and_spread)
    began: float = 0.0  # time.perf_counter()


@dataclass
class Answers:
    """What one source said: logits [B, F, *S] of each round; `done` rounds count for each sample.

    Of a quiet request `done` is a tensor [B], numbers of rows are tensors, and no round is left out.
    """

    rounds: list[Any]
    done: Any
    clicks: prompts.PromptBatch
    failed: dict[str, Any] = field(default_factory=dict)  # what was wrong: rows
    seconds: float = 0.0
    info: dict[str, Any] = field(default_factory=dict)
    score: float = 1.0


@dataclass(frozen=True)
class Slot:
    """One generalist and how it is asked."""

    name: str
    generalist: Any
    mode: str
    number: int
    cache: Any = None  # of encoder outputs: semisam.generalists.cache.EncoderCache

    def check(self, space: tuple[int, ...], classes: int) -> None:
        """Raise ValueError for images and numbers of foreground classes that the generalist cannot take."""
        spec, who = self.generalist.spec, "SemiSAMTerm(): generalist: "
        if len(space) not in spec.spatial_dims and self._slice_axis(len(space)) is None:
            wanted = " or ".join(f"{n}-D" for n in spec.spatial_dims)
            raise ValueError(
                f"{who}{self.name} takes {wanted} images, got {len(space)}-D ones of shape {space}; choose "
                "another generalist"
            )
        if spec.max_classes is not None and classes > spec.max_classes:
            raise ValueError(
                f"{who}{self.name} takes prompts for {spec.max_classes} foreground classes at most, got "
                f"{classes}; choose another generalist, or give it more"
            )

    def _slice_axis(self, dims: int) -> int | None:
        """The axis along which images of so many axes are cut for it; None: they are not."""
        spec = self.generalist.spec
        return (
            spec.slice_axis if dims == 3 and 3 not in spec.spatial_dims and 2 in spec.spatial_dims else None
        )

    def _encode(self, request: Request) -> Any:
        if self.cache is not None:
            return self.cache.encode(self.generalist, request.images, spacing=request.spacing)
        return self.generalist.encode(request.images, spacing=request.spacing)

    def waits(self, dims: int) -> bool:
        """Tell whether asking about images of so many axes needs values of tensors in between."""
        promised = getattr(self.generalist.spec, "asynchronous", False)
        return not promised or self._slice_axis(dims) is not None or self.cache is not None

    def ask(self, request: Request, settings: Mapping[str, Any], *, whole: bool = True) -> Answers:
        """All rounds; a row that has converged or failed keeps its last answer and is not asked again.

        The same number everywhere is no answer to learn from. With `whole=False` it is one: in a slice, and
        where answers are judged, so that one class without a voxel does not cost the others their score.
        """
        (target, _, skip), quiet = request.targets, request.quiet
        self.check(tuple(target.shape[2:]), target.shape[1])
        axis = self._slice_axis(target.ndim - 2)
        if axis is not None:
            return _slice_by_slice(self, request, settings, axis, whole)
        if not quiet and bool(skip.all()):
            nothing = prompts.PromptBatch.empty(len(target), target.shape[1], target.shape[2:], target)
            return Answers([], [0] * len(skip), nothing)
        began = time.perf_counter()
        state = self._encode(request)
        seconds = time.perf_counter() - began
        dialogue = _Dialogue(self, request, settings, state)
        answer = current = low = None
        answered, active = torch.zeros_like(skip), ~skip
        made = Answers([], None, dialogue.clicks)
        done = torch.zeros(len(skip), dtype=torch.int64, device=skip.device)
        for k in range(settings["clicks"] if "points" in MODES[self.mode] else 1):
            active = dialogue.prepare(k, current, active, low)
            if not quiet and not bool(active.any()):
                break
            began = time.perf_counter()
            decoded = self.generalist.decode(state, dialogue.sent(request.images.device), active)
            logits = decoded.logits.to(target.device, torch.float32)  # waits for a GPU, unless it is at home
            seconds += time.perf_counter() - began
            right, mask = usable(logits, target, active, made.failed, whole, quiet=quiet)
            good = active & right
            if logits.shape != target.shape or (not quiet and not bool(good.any())):
                break
            active, answered, done = good, answered | good, done + good.any(1)
            every = not quiet and bool(good.all())
            answer = logits if every else _renewed(good, logits, answer, -_SURE)
            current = mask if every else _renewed(good, mask, current, False)
            given = decoded.low_res.to(target.device)
            low = given if every else _renewed(good, given, low, 0.0)
            made.rounds.append(answer)
            for name, value in (decoded.info or {}).items():
                made.info[name] = made.info.get(name, 0) + value
        done = done * (answered | skip).all(1)
        if self.mode == "point":
            made.rounds, done = made.rounds[-1:], done.clamp_max(1)
        made.done, made.clicks, made.seconds = done, dialogue.clicks, seconds
        if not quiet:  # rounds beyond those of every sample that counts have no weight, and no place
            made.done = done.tolist()
            made.rounds = made.rounds[: max(made.done)]
        return made


def usable(
    logits: Any, target: Any, active: Any, failed: dict[str, Any], whole: bool = True, *, quiet: bool = False
) -> tuple[Any, Any]:
    """Rows [B, F] that say something, and the mask that they draw (None: of another shape than the target).

    Rows that are asked for and say nothing are counted, by what is wrong.
    """
    if tuple(logits.shape) != tuple(target.shape):
        what = f"have shape {tuple(logits.shape)}, expected {tuple(target.shape)}"
        failed[what] = failed.get(what, 0) + (active.sum() if quiet else int(active.sum()))
        return torch.zeros_like(active), None
    mask, span = prompts.answer_mask(logits)
    low, high = span.unbind(-1)  # both are NaN where a voxel is
    finite = low.isfinite() & high.isfinite()
    varied = ~finite | (low != high) if whole else torch.ones_like(finite)
    for what, right in (("are not finite", finite), (_SAME, varied)):
        wrong = (active & ~right).sum()
        count = wrong if quiet else int(wrong)
        if quiet or count:
            failed[what] = failed.get(what, 0) + count
    return finite & varied, mask


def _slice_by_slice(
    slot: Slot, request: Request, settings: Mapping[str, Any], axis: int, whole: bool
) -> Answers:
    """Ask a 2-D generalist about volumes [B, *, D, H, W]: every slice along `axis` is an image of its own.

    Asked are the slices in which the target of a class has a voxel; each has the prompts that the mode makes
    of that slice: its own clicks, mask prompt and box. All slices of all samples are one batch. A slice
    that is not asked is background, and a sample's rounds are those of its slice with the most.
    """
    volumes = request.targets
    batch, f = volumes.target.shape[:2]
    depth = volumes.target.shape[2 + axis]

    def cut(a: Any) -> Any:
        return a.movedim(2 + axis, 1).flatten(0, 1)

    target = cut(volumes.target)
    skip = volumes.skip.repeat_interleave(depth, 0) | ~target.flatten(2).any(2)
    kept = (~skip).any(1).nonzero()[:, 0]
    if not len(kept):
        empty = prompts.PromptBatch.empty(batch, f, volumes.target.shape[2:], volumes.target)
        return Answers([], [0] * batch, empty)
    spacing = None
    if request.spacing is not None:
        spacing = tuple(s for i, s in enumerate(request.spacing) if i != axis)
    one = Request(
        cut(request.images)[kept.to(request.images.device)],
        cut(request.prob)[kept],
        prompts.SpecialistTargets(target[kept], cut(volumes.region)[kept], skip[kept]),
        request.step,
        # Words of 32 bits, different for the slices of one step unless ids are larger than any data set.
        [(request.ids[i // depth] * depth + i % depth) % 2**32 for i in kept.tolist()],
        spacing,
    )
    made = slot.ask(one, settings, whole=False)

    def joined_again(values: Any, otherwise: float) -> Any:
        every = torch.full((batch * depth, *values.shape[1:]), otherwise, dtype=values.dtype)
        every = every.to(values.device)
        every[kept] = values
        return every.reshape(batch, depth, *values.shape[1:])

    silent = torch.zeros_like(volumes.skip)
    if made.rounds and whole:  # over a whole volume the same number everywhere says nothing
        low, high = made.rounds[-1].flatten(2).aminmax(dim=2)
        low = joined_again(torch.where(skip[kept], torch.inf, low), torch.inf).amin(1)
        high = joined_again(torch.where(skip[kept], -torch.inf, high), -torch.inf).amax(1)
        silent = low == high
        if count := int(silent.sum()):
            made.failed[_SAME] = made.failed.get(_SAME, 0) + count
    done = torch.tensor(made.done)
    # The largest; 0 if a slice has no answer, for its part of the target is not background.
    rounds = joined_again(torch.where(done > 0, done, torch.iinfo(torch.int32).min).to(kept.device), 0)
    failed = (rounds < 0).any(1) | silent.any(1)
    made.done = torch.where(failed, 0, rounds.amax(1)).tolist()
    counted = made.rounds[: max(made.done)]
    made.rounds = [joined_again(r, -_SURE).movedim(1, 2 + axis).contiguous() for r in counted]
    made.clicks = _clicks_of_slices(made.clicks, kept, axis, volumes.target.shape, joined_again)
    return made


def _clicks_of_slices(clicks: Any, kept: Any, axis: int, shape: Any, joined_again: Any) -> Any:
    """Clicks [M, F, K, 2] on slices as clicks [B, F, D K, 3] on volumes."""
    batch, f, depth = shape[0], shape[1], shape[2 + axis]
    place = (kept % depth).reshape(-1, 1, 1, 1).expand(*clicks.points.shape[:3], 1)
    points = torch.cat([clicks.points[..., :axis], place, clicks.points[..., axis:]], -1)
    points, labels = joined_again(points, 0).transpose(1, 2), joined_again(clicks.labels, -1).transpose(1, 2)
    return prompts.PromptBatch(
        tuple(shape[2:]), points.reshape(batch, f, -1, 3), labels.reshape(batch, f, -1)
    )


class _Dialogue:
    """The prompts of one generalist, round by round."""

    def __init__(self, slot: Slot, request: Request, settings: Mapping[str, Any], state: Any) -> None:
        target = request.targets.target
        self.slot, self.request, self.settings, self.state = slot, request, settings, state
        self.takes = slot.generalist.spec.prompts
        self.batch = prompts.PromptBatch.empty(len(target), target.shape[1], target.shape[2:], target)
        self.clicks = self.batch
        if "box" in self.takes and (settings["box"] or slot.mode == "box"):
            box, _ = prompts.boxes(target, settings["box_margin"])
            self.batch = replace(self.batch, boxes=box)

    def prepare(self, k: int, current: Any, active: Any, low: Any) -> Any:
        """Make round k's prompts from the mask so far; returns the rows [B, F] that have one."""
        if self.slot.mode == "box":
            return active
        if k == 0 and "mask" in MODES[self.slot.mode]:
            self.batch = replace(self.batch, mask_logits=self._mask())
            return active
        s, (target, region, _) = self.settings, self.request.targets
        point, label = prompts.next_click(
            target,
            current,
            region,
            # Generalists draw independently: one that has erred alike must not get the same clicks.
            seed=(int(s["seed"]) + self.slot.number * 0x9E3779B97F4A7C15) % 2**64,
            iteration=self.request.step,
            sample_ids=self.request.ids,
            round=k,
            clicks=s["clicks"],
            rule=s["rule"],
            skip=~active,
        )
        # Without a mask prompt its clicks are all that a generalist knows of the rounds before.
        memory, handed = (s["click_memory"], low) if "mask" in self.takes else ("all", None)
        self.batch = self.batch.append(point, label, memory, handed)
        self.clicks = self.clicks.append(point, label, "all")
        return label >= 0

    def _mask(self) -> Any:
        prob = self.request.prob[:, 1:]
        own = getattr(self.slot.generalist, "mask_prompt", None)
        if own is not None:
            return own(prob, self.state)
        size = self.slot.generalist.spec.mask_size or tuple(prob.shape[2:])
        rows = prompts.mask_logits(prob.flatten(0, 1), size)
        return rows.reshape(*prob.shape[:2], *size)

    def sent(self, device: Any) -> prompts.PromptBatch:
        """The prompts where the images are.

        A row is asked for as long as there is a click for it: rows that are have one in every place.
        """
        b, quiet = self.batch, self.request.quiet
        if b.points.device == device:
            return replace(b, unpadded=True) if quiet else b
        boxes, masks = (None if a is None else a.to(device) for a in (b.boxes, b.mask_logits))
        return prompts.PromptBatch(b.shape, b.points.to(device), b.labels.to(device), boxes, masks, quiet)


def largest(request: Request) -> Answers:
    """The prompt mask's largest component per class, as one certain answer.

    A sample counts only if every class that is asked for has a voxel: else its target would deny a class
    that the teacher suspects.
    """
    prob, (target, _, skip) = request.prob, request.targets
    kept = largest_components(prob.argmax(1).byte(), prob.shape[1])
    inside = torch.stack([kept == c for c in range(1, prob.shape[1])], 1)
    logits = torch.where(inside, _SURE, -_SURE)
    asked = ~skip
    usable = ((inside.flatten(2).any(2) | skip).all(1) & asked.any(1)).long()
    clicks = prompts.PromptBatch.empty(len(target), target.shape[1], target.shape[2:], target)
    return Answers([logits], usable if request.quiet else usable.tolist(), clicks)


def joined(logits: Any) -> Any:
    """One-vs-rest logits [B, F, *S] as `fuse` takes them: of all classes, (0, l_1, ..., l_F), or as they are
    if there is one foreground class.
    """
    if logits.shape[1] == 1:
        return logits
    return torch.cat([torch.zeros_like(logits[:, :1]), logits], 1)


def _renewed(rows: Any, new: Any, old: Any, otherwise: float) -> Any:
    """`new` [B, F, *any] in the rows [B, F], `old` (None: `otherwise`) in the others."""
    return torch.where(_over(rows, new), new, torch.full_like(new, otherwise) if old is None else old)


def _over(rows: Any, array: Any) -> Any:
    """Flags [B, F] in a shape that goes over [B, F, *any]."""
    return rows.reshape(*rows.shape, *(1,) * (array.ndim - 2))
