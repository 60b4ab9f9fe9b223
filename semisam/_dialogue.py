# SPDX-License-Identifier: Apache-2.0
"""The dialogue of the generalist's term with one generalist: prompts out, answers in, round by round."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from semisam import prompts
from semisam.gate import largest_components

__all__ = ["MODES", "Answers", "Request", "Slot", "joined", "largest"]

MODES: dict[str, frozenset[str]] = {
    "point": frozenset({"points"}),
    "unc": frozenset({"points"}),
    "mask": frozenset({"mask"}),
    "mixed": frozenset({"points", "mask"}),
    "box": frozenset({"box"}),
}
"""Prompt modes, and the kinds of prompts that a generalist must take for them."""

_SURE = 10.0  # the logit of a certain answer


@dataclass(frozen=True)
class Request:
    """What all generalists are asked in one step."""

    images: Any
    prob: Any  # [B, C, *S] float32
    targets: prompts.SpecialistTargets
    step: int
    ids: list[int]
    spacing: Any


@dataclass
class Answers:
    """What one source said: logits [B, F, *S] of each round; `done` rounds count for each sample."""

    rounds: list[Any]
    done: list[int]
    clicks: prompts.PromptBatch
    failed: int = 0
    seconds: float = 0.0
    info: dict[str, float] = field(default_factory=dict)
    score: float = 1.0


@dataclass(frozen=True)
class Slot:
    """One generalist and how it is asked."""

    name: str
    generalist: Any
    mode: str
    number: int

    def ask(self, request: Request, settings: Mapping[str, Any]) -> Answers:
        """All rounds; a row that has converged or failed keeps its last answer and is not asked again."""
        spec = self.generalist.spec
        space = tuple(request.prob.shape[2:])
        if len(space) not in spec.spatial_dims:
            wanted = " or ".join(f"{n}-D" for n in spec.spatial_dims)
            raise ValueError(
                f"SemiSAMTerm(): generalist: {self.name} takes {wanted} images, got {len(space)}-D ones of "
                f"shape {space}; choose another generalist"
            )
        target, _, skip = request.targets
        began = time.perf_counter()
        state = self.generalist.encode(request.images, spacing=request.spacing)
        seconds = time.perf_counter() - began
        dialogue = _Dialogue(self, request, settings, state)
        answer = low = None
        answered, active = torch.zeros_like(skip), ~skip
        made = Answers([], [0] * len(skip), dialogue.clicks)
        done = torch.zeros(len(skip), dtype=torch.int64, device=skip.device)
        for k in range(settings["clicks"] if "points" in MODES[self.mode] else 1):
            active = dialogue.prepare(k, answer, active, low)
            if not bool(active.any()):
                break
            began = time.perf_counter()
            decoded = self.generalist.decode(state, dialogue.sent(request.images.device), active)
            seconds += time.perf_counter() - began
            logits = self._checked(decoded.logits, target).to(target.device, torch.float32)
            good = active & _finite(logits)
            made.failed += int((active & ~good).sum())
            active, answered, done = good, answered | good, done + good.any(1)
            answer = _renewed(good, logits, answer, -_SURE)
            low = _renewed(good, decoded.low_res.to(target.device), low, 0.0)
            made.rounds.append(answer)
            for name, value in (decoded.info or {}).items():
                made.info[name] = made.info.get(name, 0) + value
        done = done * (answered | skip).all(1)
        if made.failed:
            warnings.warn(
                f"SemiSAMTerm(): {self.name}: {made.failed} answers are not finite at step {request.step}; "
                "a sample without an earlier answer is left out",
                RuntimeWarning,
                stacklevel=2,
            )
        if self.mode == "point":
            made.rounds, done = made.rounds[-1:], done.clamp_max(1)
        # Rounds beyond those of every sample that counts have no weight in the fusion, and no place.
        made.done = done.tolist()
        made.rounds = made.rounds[: max(made.done)]
        made.clicks, made.seconds = dialogue.clicks, seconds
        return made

    def _checked(self, logits: Any, target: Any) -> Any:
        if tuple(logits.shape) != tuple(target.shape):
            raise ValueError(
                f"SemiSAMTerm(): generalist: expected logits {tuple(target.shape)} from {self.name}, "
                f"got {tuple(logits.shape)}"
            )
        return logits


class _Dialogue:
    """The prompts of one generalist, round by round."""

    def __init__(self, slot: Slot, request: Request, settings: Mapping[str, Any], state: Any) -> None:
        target = request.targets.target
        self.slot, self.request, self.settings, self.state = slot, request, settings, state
        self.takes = slot.generalist.spec.prompts
        self.batch = prompts.PromptBatch.empty(len(target), target.shape[1], target.shape[2:], target)
        self.clicks = self.batch
        self.current: Any = None  # the mask so far, in the same memory in every round
        if "box" in self.takes and (settings["box"] or slot.mode == "box"):
            box, _ = prompts.boxes(target, settings["box_margin"])
            self.batch = replace(self.batch, boxes=box)

    def prepare(self, k: int, answer: Any, active: Any, low: Any) -> Any:
        """Make round k's prompts; returns the rows [B, F] that have one."""
        if self.slot.mode == "box":
            return active
        if k == 0 and "mask" in MODES[self.slot.mode]:
            self.batch = replace(self.batch, mask_logits=self._mask())
            return active
        s, (target, region, _) = self.settings, self.request.targets
        if answer is not None:
            self.current = torch.gt(answer, 0, out=self.current)
        point, label = prompts.next_click(
            target,
            self.current,
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
        handed = low if "mask" in self.takes else None
        self.batch = self.batch.append(point, label, s["click_memory"], handed)
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
        """The prompts where the images are."""
        b = self.batch
        if b.points.device == device:
            return b
        optional = [None if a is None else a.to(device) for a in (b.boxes, b.mask_logits)]
        return prompts.PromptBatch(b.shape, b.points.to(device), b.labels.to(device), *optional)


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
    usable = (inside.flatten(2).any(2) | skip).all(1) & asked.any(1)
    clicks = prompts.PromptBatch.empty(len(target), target.shape[1], target.shape[2:], target)
    return Answers([logits], usable.long().tolist(), clicks)


def joined(logits: Any) -> Any:
    """One-vs-rest logits [B, F, *S] as `fuse` takes them: of all classes, (0, l_1, ..., l_F), or as they are
    if there is one foreground class.
    """
    if logits.shape[1] == 1:
        return logits
    return torch.cat([torch.zeros_like(logits[:, :1]), logits], 1)


def _finite(logits: Any) -> Any:
    """Flags [B, F] of the rows without NaN and infinity."""
    rows = logits.flatten(2)
    good = rows.sum(2).isfinite()  # one pass: whatever is not finite stays so in a sum
    if bool(good.all()):
        return good
    return good | rows.isfinite().all(2)  # a sum may also overflow


def _renewed(rows: Any, new: Any, old: Any, otherwise: float) -> Any:
    """`new` [B, F, *any] in the rows [B, F], `old` (None: `otherwise`) in the others."""
    if bool(rows.all()):
        return new
    return torch.where(_over(rows, new), new, torch.full_like(new, otherwise) if old is None else old)


def _over(rows: Any, array: Any) -> Any:
    """Flags [B, F] in a shape that goes over [B, F, *any]."""
    return rows.reshape(*rows.shape, *(1,) * (array.ndim - 2))
