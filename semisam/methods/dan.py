# SPDX-License-Identifier: Apache-2.0
"""Deep adversarial network (DAN): predictions on unlabeled scans shall look like those on labeled ones."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semisam.methods.base import Batch, Method, on_core, random_key, ranks

__all__ = ["DeepAdversarial", "Discriminator"]

_BETAS = (0.9, 0.99)
_LABELED = 1
"""What the discriminator answers for a labeled scan; 0 for an unlabeled one."""


class Discriminator(nn.Module):
    """Tells predictions on labeled scans from those on unlabeled ones: 11 024 386 parameters in 3-D.

        conv0 (probabilities) + conv1 (image)  64 ── conv2 128 ── conv3 256 ── conv4 512 ── mean ── linear 2

    Convolutions of side 4, stride 2, padding 1; leaky ReLU (0.2) after each, and dropout of whole channels
    (0.5) after each but the last. The mean runs over the whole map, whatever the patch (the published
    program pools a fixed window of 6^3, right for patches of 96^3 alone).

    Input: probabilities [B, num_classes, *S] and images [B, in_channels, *S], sides of at least
    2 ** len(channels); output [B, 2], logits. Raises ValueError for sides below that.
    Papers: DAN (MICCAI 2017), SemiSAM+ (arXiv 2502.20749).

    >>> import torch
    >>> from semisam.methods.dan import Discriminator
    >>> sum(p.numel() for p in Discriminator().parameters())
    11024386
    >>> small = Discriminator(num_classes=3, channels=(4, 8), spatial_dims=2)
    >>> small(torch.rand(5, 3, 12, 9), torch.rand(5, 1, 12, 9)).shape
    torch.Size([5, 2])
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 2,
        *,
        channels: Sequence[int] = (64, 128, 256, 512),
        dropout: float = 0.5,
        spatial_dims: int = 3,
    ) -> None:
        super().__init__()
        conv: Any = {2: nn.Conv2d, 3: nn.Conv3d}[spatial_dims]
        drop: Any = {2: nn.Dropout2d, 3: nn.Dropout3d}[spatial_dims]
        self.conv0 = conv(num_classes, channels[0], 4, 2, 1)
        self.conv1 = conv(in_channels, channels[0], 4, 2, 1)
        self.deeper: list[str] = []
        for k, (above, width) in enumerate(pairwise(channels), 2):
            self.add_module(f"conv{k}", conv(above, width, 4, 2, 1))
            self.deeper.append(f"conv{k}")
        self.dropout = drop(dropout)
        self.classifier = nn.Linear(channels[-1], 2)

    def forward(self, probs: Tensor, images: Tensor) -> Tensor:
        """Return the logits [B, 2] of "unlabeled" and "labeled"."""
        least = 2 ** (1 + len(self.deeper))
        if min(probs.shape[2:]) < least:
            raise ValueError(
                f"Discriminator(): probs: expected sides of at least {least}, got {tuple(probs.shape)}"
            )
        x = F.leaky_relu(self.conv0(probs) + self.conv1(images), 0.2)
        for name in self.deeper:
            x = F.leaky_relu(getattr(self, name)(self.dropout(x)), 0.2)
        logits: Tensor = self.classifier(x.flatten(2).mean(2))
        return logits


class DeepAdversarial(Method):
    """DAN: a discriminator is trained beside the student, and the student tries to deceive it.

        L_unsup = w_con(t) mean over unlabeled samples of CE(D(p, x), "labeled"),  D in evaluation mode
        then the student's step, and one step of Adam on D, in train mode and float32:
        L_D = mean over all samples of CE(D(p, x), "labeled" or "unlabeled")

    Only the student learns from L_unsup, only D from L_D, where p is what the student now predicts in
    evaluation mode. D's gradients are averaged over the ranks. There is no teacher: prompts for a generalist
    come from the student in evaluation mode. `measured` has "discriminator", the L_D of the last step.
    Settings: `discriminator_channels`, `discriminator_lr`, `discriminator_dropout`. See `Method` for the
    arguments. Paper: Zhang et al., "Deep Adversarial Networks for Biomedical Image Segmentation Utilizing
    Unannotated Images" (MICCAI 2017).

    >>> import torch
    >>> from semisam.engine.config import MethodConfig
    >>> from semisam.methods.base import Batch
    >>> from semisam.methods.dan import DeepAdversarial
    >>> config = MethodConfig(discriminator_channels=[4, 8])
    >>> method = DeepAdversarial(
    ...     config, torch.nn.Conv2d(1, 2, 1), num_classes=2, total_steps=10, spatial_dims=2)
    >>> batch = Batch(torch.rand(2, 1, 8, 8), torch.ones(1, 8, 8, dtype=torch.uint8), ids=(0, 1))
    >>> list(method.losses(batch, step=0))
    ['ce', 'dice', 'adversarial']
    >>> method.after_step(0)
    >>> list(method.measured)
    ['discriminator']
    """

    name = "dan"
    uses_unlabeled = True
    terms = ("ce", "dice", "adversarial")
    measures = ("discriminator",)

    def __init__(self, config: Any, student: nn.Module, **options: Any) -> None:
        super().__init__(config, student, **options)
        channels, rate = config.discriminator_channels, config.discriminator_lr
        if not channels or min(channels) < 1:
            raise ValueError(f"method.discriminator_channels: expected positive widths, got {channels}")
        if not 0 < rate < float("inf"):
            raise ValueError(f"method.discriminator_lr: expected a number above 0, got {rate}")
        if not 0 <= config.discriminator_dropout < 1:
            raise ValueError(
                f"method.discriminator_dropout: expected at least 0 and below 1, got "
                f"{config.discriminator_dropout}"
            )
        if config.consistency_weight < 0:
            raise ValueError(
                f"method.consistency_weight: expected a number of at least 0, got {config.consistency_weight}"
            )
        with torch.random.fork_rng(devices=[]):  # the same in every process, and no draw of anybody else's
            torch.manual_seed(random_key(self.seed, 0))
            self.discriminator = Discriminator(
                self.channels,
                self.num_classes,
                channels=channels,
                dropout=config.discriminator_dropout,
                spatial_dims=self.spatial_dims,
            )
        self.discriminator.requires_grad_(False).eval()
        self.optimizer = torch.optim.Adam(self.discriminator.parameters(), lr=rate, betas=_BETAS)
        self._seen: list[tuple[Tensor, int]] = []  # images and number of labeled ones of this step's batches

    def losses(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Return the weighted terms of step `step` (from 0); `semisam` is the generalist's."""
        raw = self.forward(batch.image)
        logits = on_core(raw)
        losses = self._sweep(logits, batch, {})
        if not batch.unlabeled:
            return losses
        probs = raw[batch.labeled :].float().softmax(1)
        found = self.discriminator(probs, batch.image[batch.labeled :]).float()
        deceived = F.cross_entropy(found, torch.full((len(found),), _LABELED, device=found.device))
        losses["adversarial"] = (self._weight(step) * deceived).to(logits.device)
        self._seen.append((batch.image, batch.labeled))
        return losses | self._from_generalists(batch, logits, None, step)

    def after_step(self, step: int) -> None:
        """Train the discriminator for one step on the patches that the student has just seen."""
        seen, self._seen = self._seen, []
        if not seen:
            return
        rank = torch.distributed.get_rank() if ranks() > 1 else 0
        torch.manual_seed(random_key(self.seed, step, rank, 1))
        self.discriminator.requires_grad_(True).train()
        self.optimizer.zero_grad()
        total = torch.zeros((), device=seen[0][0].device)
        for images, labeled in seen:
            target = (torch.arange(len(images), device=images.device) < labeled).long()
            found = self.discriminator(self.prompt_probabilities(images), images)
            loss = F.cross_entropy(found, target) / len(seen)
            loss.backward()  # type: ignore[no-untyped-call]
            total = total + loss.detach()
        if ranks() > 1:
            total = self._averaged(total)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.discriminator.requires_grad_(False).eval()
        self.measured["discriminator"] = float(total)

    def _averaged(self, total: Tensor) -> Tensor:
        """Make gradients and loss the mean over the ranks, all in one message."""
        gradients = [p.grad for p in self.discriminator.parameters() if p.grad is not None]
        flat = torch.cat([*(g.reshape(-1) for g in gradients), total.reshape(1)])
        torch.distributed.all_reduce(flat)
        flat /= ranks()
        first = 0
        for gradient in gradients:
            gradient.copy_(flat[first : first + gradient.numel()].reshape(gradient.shape))
            first += gradient.numel()
        return flat[-1]

    def to(self, device: Any) -> None:
        """Bring the discriminator to a device."""
        super().to(device)
        self.discriminator.to(device)

    def state_dict(self) -> dict[str, Any]:
        """Return the discriminator and its optimiser beside the term's state."""
        own = {"discriminator": self.discriminator.state_dict(), "optimizer": self.optimizer.state_dict()}
        return super().state_dict() | own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        super().load_state_dict(state)
        self.discriminator.load_state_dict(state["discriminator"])
        self.optimizer.load_state_dict(state["optimizer"])
