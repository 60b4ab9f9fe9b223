# SPDX-License-Identifier: Apache-2.0
"""A training method: how one batch of labeled and unlabeled patches becomes a loss.

The trainer owns the loop, optimiser, files and devices; a method owns losses and, where it has one,
the teacher. A new method is one subclass of `Method` and one entry of `methods.METHODS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Batch", "Method"]


@dataclass
class Batch:
    """One step's patches: the first `len(label)` samples are labeled, the others are not.

    There is no place for a label of an unlabeled sample. `ids` are the samples' numbers (unique within
    a step over all ranks) on which every random choice depends; `spacing` is in mm, None if unknown.

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

    @property
    def labeled(self) -> int:
        """Number of labeled samples, B_l."""
        return int(self.label.shape[0])

    @property
    def unlabeled(self) -> int:
        """Number of unlabeled samples, B_u."""
        return int(self.image.shape[0]) - self.labeled


class Method:
    """Supervised training and the base of all methods; subclasses add terms to `losses`.

    `student` is the network being trained, `seed` with (step, sample id) determines all randomness that is
    not dropout.
    """

    name = "supervised"
    uses_unlabeled = False
