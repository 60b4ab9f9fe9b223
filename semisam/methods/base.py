# SPDX-License-Identifier: Apache-2.0
"""A training method: how one batch of labeled and unlabeled patches becomes a loss.

The trainer owns the loop, optimiser, files and devices; a method owns losses and, where it has one,
the teacher. A new method is one subclass of `Method` and one entry of `methods.METHODS`.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import semisam
from semisam._memory import cost_of
from semisam.losses import Term, voxel_loss
from semisam.schedules import consistency_weight, ema_decay

__all__ = ["Batch", "Method", "PseudoLabel", "TeacherMethod"]


class PseudoLabel(NamedTuple):
    """What generalists said of whole scans, cut like the patches of a batch's unlabeled samples.

    >>> import torch
    >>> from semisam.methods.base import PseudoLabel
    >>> PseudoLabel(torch.zeros(1, 2, 8, 8), torch.ones(1, 8, 8), torch.zeros(1, 8, 8)).weight.mean().item()
    1.0
    """

    target: Any  # [B_u, C, *S] float32, or hard [B_u, *S] uint8 (255: ignored)
    weight: Any  # [B_u, *S] float32, 0..1; 0: nothing is known there
    uncertainty: Any  # [B_u, *S] float32, 0..1


@dataclass
class Batch:
    """One step's patches: the first `len(label)` samples are labeled, the others are not.

    There is no place for a label of an unlabeled sample. `ids` are the samples' numbers (unique within
    a step over all ranks) on which every random choice depends; `spacing` is in mm, None if unknown.
    `pseudo` is what the term made of the unlabeled scans as wholes; None where it is asked step by step.

    >>> import torch
    >>> from semisam.methods.base import Batch
    >>> batch = Batch(torch.zeros(2, 1, 8, 8), torch.zeros(1, 8, 8, dtype=torch.uint8), ids=(0, 1))
    >>> batch.labeled, batch.unlabeled
    (1, 1)
    """

    image: Any  # [B, channels, *S] float32
    label: Any  # [B_l, *S] uint8; 255: ignored
    ids: tuple[int, ...]
    spacing: tuple[float, ...] | None = None
    pseudo: PseudoLabel | None = None

    @property
    def labeled(self) -> int:
        """Number of labeled samples, B_l."""
        return int(self.label.shape[0])

    @property
    def unlabeled(self) -> int:
        """Number of unlabeled samples, B_u."""
        return int(self.image.shape[0]) - self.labeled


class Method:
    """Supervised training, and the base of all methods; subclasses add terms to `losses`.

        L_sup = lambda_ce CE + lambda_dice Dice

    over the labeled samples of all ranks jointly, Dice with squared denominators. `config` is a
    `MethodConfig` (any object with its fields); `student` is the network that is trained, on images of
    `channels` channels and `spatial_dims` axes; `seed` with (step, sample id) determines all randomness that
    is not dropout. `forward` is what runs the student and may be replaced by a wrapper of it (the
    trainer's, for several ranks and mixed precision). `measured` are numbers for the log beside the terms,
    named in `measures`.

    Papers: V-Net (arXiv 1606.04797) for Dice.

    >>> import torch
    >>> from semisam.engine.config import MethodConfig
    >>> from semisam.methods.base import Batch, Method
    >>> method = Method(MethodConfig(), torch.nn.Conv2d(1, 2, 1), num_classes=2, total_steps=10)
    >>> batch = Batch(torch.rand(2, 1, 8, 8), torch.ones(1, 8, 8, dtype=torch.uint8), ids=(0, 1))
    >>> sorted(method.losses(batch, step=0))
    ['ce', 'dice']
    """

    name = "supervised"
    uses_unlabeled = False
    terms: tuple[str, ...] = ("ce", "dice")
    measures: tuple[str, ...] = ()
    teacher: nn.Module | None = None
    unlabeled: tuple[Tensor, Tensor]  # images and student's logits that the term saw last

    def __init__(
        self,
        config: Any,
        student: nn.Module,
        *,
        num_classes: int,
        total_steps: int,
        seed: int = 0,
        term: Any = None,
        channels: int = 1,
        spatial_dims: int = 3,
    ) -> None:
        if term is not None and not self.uses_unlabeled:
            raise ValueError(f"{self.name}: term: expected None, as no unlabeled image is used, got {term}")
        if not config.lambda_ce + config.lambda_dice > 0 or min(config.lambda_ce, config.lambda_dice) < 0:
            raise ValueError(
                f"method.lambda_ce, method.lambda_dice: expected numbers of at least 0, one above, got "
                f"{config.lambda_ce} and {config.lambda_dice}"
            )
        self.config = config
        self.student = student
        self.forward: Callable[[Any], Any] = student
        self.num_classes = num_classes
        self.total_steps = total_steps
        self.seed = seed
        self.channels = channels
        self.spatial_dims = spatial_dims
        self.term = term
        self.measured: dict[str, float] = {}
        if term is not None:
            self.terms = (*self.terms, "semisam")

    def losses(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Return the weighted terms of step `step` (from 0), by name; the loss is their sum."""
        return self._sweep(on_core(self.forward(batch.image[: batch.labeled])), batch, {})

    def after_step(self, step: int) -> None:
        """Do what follows the optimiser's step `step` (from 0)."""

    def to(self, device: Any) -> None:
        """Bring what the method owns beside the student to a device."""
        if self.teacher is not None:
            self.teacher.to(device)

    def evaluation_network(self) -> nn.Module:
        """Return the network that the best checkpoint is chosen by: the student, as published."""
        return self.student

    @torch.no_grad()
    def prompt_probabilities(self, images: Any) -> Any:
        """Return what prompts are made from, [B, C, *S] float32 without gradient: the student's prediction.

        The student predicts in evaluation mode and is left in the mode that it was in.
        """
        before = self.student.training
        self.student.eval()
        try:
            return self.student(images).float().softmax(1)
        finally:
            self.student.train(before)

    def state_dict(self) -> dict[str, Any]:
        """Return what else than student and teacher a resumed run needs: the term's state."""
        return {} if self.term is None else {"term": self.term.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        if self.term is not None:
            self.term.load_state_dict(state["term"])

    def _from_generalists(
        self, batch: Batch, logits: Tensor, source: Tensor | None, step: int
    ) -> dict[str, Tensor]:
        """The generalists' term on the unlabeled samples; `source`: what the prompts are made from.

        `logits` [B, C, *S] are the whole batch's, on the core's device.
        """
        if self.term is None:
            return {}
        with cost_of(batch.image.device) as cost:
            value = self._taught(batch, logits[batch.labeled :], source, step)
        for name, number in (("s", cost.seconds), ("mb", cost.mib)):
            self.term.diagnostics[name] = number  # no dictionary, where nobody has waited for its numbers
        if ranks() > 1:  # it is a mean over the samples that have something to teach
            found = self.term.diagnostics
            kept = torch.tensor(float(len(found["weight_share"]) - found["skipped"]))
            value = value * share_of(kept.to(batch.image.device))
        self.unlabeled = on_core(batch.image[batch.labeled :]), logits[batch.labeled :].detach()
        return {"semisam": value}

    def _taught(self, batch: Batch, logits: Tensor, source: Tensor | None, step: int) -> Tensor:
        """The term's value: from answers to these patches, or from labels of whole scans."""
        images = batch.image[batch.labeled :]  # where the generalists run, wherever the core's operators do
        if batch.pseudo is not None:
            target, weight, doubt = batch.pseudo
            made = self.term.from_labels(images, logits, target, weight, step=step, uncertainty=doubt)
        else:
            if source is None and self.term.due(step):
                source = self.prompt_probabilities(images)
            probs = None if source is None else on_core(source)
            ids = list(batch.ids[batch.labeled :])
            made = self.term(images, logits, probs, step=step, sample_ids=ids, spacing=batch.spacing)
        value: Tensor = made
        return value

    def _weight(self, step: int) -> float:
        """The rising weight of what is learned from unlabeled samples."""
        weight: float = consistency_weight(step, self.total_steps, weight=self.config.consistency_weight)
        return weight

    def _sweep(self, logits: Tensor, batch: Batch, more: dict[str, Term]) -> dict[str, Tensor]:
        """Supervised terms and `more` (on the samples behind the labeled ones), in one sweep over voxels."""
        labels = batch.label.to(logits.device)
        if ranks() > 1:
            logits, labels = _with_labeled_of_all_ranks(logits, labels)
        shift = len(labels) - batch.labeled
        shared: dict[str, Any] = {"target": labels, "samples": (0, len(labels))}
        terms = {
            "ce": Term("ce", **shared, scale=self.config.lambda_ce),
            "dice": Term(
                "dice",
                **shared,
                scale=self.config.lambda_dice,
                include_background=self.config.include_background,
            ),
        }
        for name, term in more.items():
            first, last = term.samples or (0, 0)
            terms[name] = replace(term, samples=(first + shift, last + shift))
        values = voxel_loss(logits, list(terms.values()), reduction="terms")
        return dict(zip(terms, values.unbind(), strict=True))


class TeacherMethod(Method):
    """Base of the methods whose teacher is the running mean of the student's weights.

        theta_T <- a theta_T + (1 - a) theta_S after step t,   a = min(1 - 1/(t + 1), ema_decay)

    Buffers (running statistics) are copied. Subclasses say in `_consistency` what the teacher teaches
    and in `_prompt_source` which of its predictions (detached) the generalist's prompts are made from.

    Paper: Mean Teacher (arXiv 1703.01780).

    >>> import torch
    >>> from semisam import methods
    >>> from semisam.engine.config import MethodConfig
    >>> student = torch.nn.Conv2d(1, 2, 1)
    >>> method = methods.build(MethodConfig("mean-teacher"), student, num_classes=2, total_steps=10)
    >>> with torch.no_grad():
    ...     _ = student.bias.add_(1.0)
    >>> method.after_step(0)  # the teacher begins as a copy
    >>> torch.equal(method.teacher.bias, student.bias)
    True
    """

    uses_unlabeled = True
    terms = ("ce", "dice", "consistency")
    teacher: nn.Module

    def __init__(self, config: Any, student: nn.Module, **options: Any) -> None:
        super().__init__(config, student, **options)
        if config.noise < 0 or config.consistency_weight < 0:
            raise ValueError(
                f"method.noise, method.consistency_weight: expected numbers of at least 0, got "
                f"{config.noise} and {config.consistency_weight}"
            )
        ema_decay(0, config.ema_decay)
        self.teacher = deepcopy(student).requires_grad_(False).eval()

    def losses(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Return the weighted terms of step `step` (from 0); `semisam` is the generalist's."""
        logits = on_core(self.forward(batch.image))
        if not batch.unlabeled:
            return self._sweep(logits, batch, {})
        first, last = batch.labeled, batch.labeled + batch.unlabeled
        images, ids = batch.image[first:], batch.ids[first:]
        consistency, source = self._consistency(images, ids, step, (first, last))
        losses = self._sweep(logits, batch, {"consistency": consistency})
        return losses | self._from_generalists(batch, logits, source, step)

    def _consistency(
        self, images: Tensor, ids: Sequence[int], step: int, samples: tuple[int, int]
    ) -> tuple[Term, Tensor | None]:
        """Return the consistency term and, where the method has one, its own source of prompts."""
        raise NotImplementedError

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Update the teacher after the optimiser's step `step` (from 0)."""
        a = ema_decay(step, self.config.ema_decay)
        for ours, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            ours.mul_(a).add_(theirs, alpha=1 - a)
        for copy, buffer in zip(self.teacher.buffers(), self.student.buffers(), strict=True):
            copy.copy_(buffer)

    @torch.no_grad()
    def prompt_probabilities(self, images: Any) -> Any:
        """Return the teacher's clean prediction [B, C, *S] in evaluation mode, float32, without gradient."""
        return self.teacher(images).float().softmax(1)

    def _noisy(self, images: Tensor, ids: Sequence[int], step: int, draw: int) -> Tensor:
        """Images + clip(noise N(0, 1), +-2 noise), the same for a sample whatever rank or batch it is in."""
        sigma = self.config.noise
        noise = torch.empty_like(images)
        generator = torch.Generator(device=images.device)
        for n, number in enumerate(ids):
            generator.manual_seed(random_key(self.seed, step, number, draw))
            noise[n].normal_(0.0, sigma, generator=generator)
        return images + noise.clamp_(-2 * sigma, 2 * sigma)

    @contextmanager
    def _stochastic_teacher(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """The teacher with dropout and batch statistics; its running statistics are left as they were."""
        before = [buffer.clone() for buffer in self.teacher.buffers()]
        self.teacher.train()
        try:
            with torch.no_grad():
                yield lambda images: self.teacher(images).float()
                for buffer, value in zip(self.teacher.buffers(), before, strict=True):
                    buffer.copy_(value)
        finally:
            self.teacher.eval()


def random_key(*numbers: int) -> int:
    """Return a seed (0 .. 2^63 - 1) that is a well-mixed function of integers.

    >>> from semisam.methods.base import random_key
    >>> random_key(1337, 0, 1) == random_key(1337, 0, 1) != random_key(1337, 1, 0)
    True
    """
    words = ",".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little") >> 1


def on_core(tensor: Any) -> Any:
    """Return the tensor where the core's operators can read it: its device, or the CPU if that has none.

    Gradients flow back through the copy.
    """
    return tensor if tensor.device.type in _devices() else tensor.cpu()


@functools.cache
def _devices() -> frozenset[str]:
    return frozenset(semisam.info()["operators"]["voxel_loss_forward"])


def ranks() -> int:
    """Return the number of processes that train together."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def share_of(count: Tensor) -> float:
    """Return this rank's `count` over the mean of all ranks: weights a local mean for a joint one."""
    if ranks() == 1:
        return 1.0
    total = count.detach().double()
    own = float(total)
    torch.distributed.all_reduce(total)
    return own * ranks() / float(total) if float(total) > 0 else 0.0


def _with_labeled_of_all_ranks(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Put the labeled samples of every rank first, so that sums over them run over the whole batch.

    Dice is no mean over samples, and cross entropy's is one over labeled voxels. The other ranks'
    samples are constants here. As gradients are averaged over the ranks, the own ones are multiplied
    by their number.
    """
    world, rank = ranks(), torch.distributed.get_rank()
    own = logits[: len(labels)]
    fixed = own.detach().contiguous()
    pieces = [torch.empty_like(fixed) for _ in range(world)]
    theirs = [torch.empty_like(labels) for _ in range(world)]
    torch.distributed.all_gather(pieces, fixed)
    torch.distributed.all_gather(theirs, labels.contiguous())
    pieces[rank] = fixed + world * (own - fixed)  # the value of `own`, and `world` times its gradient
    return torch.cat([*pieces, logits[len(labels) :]]), torch.cat(theirs)
