# SPDX-License-Identifier: Apache-2.0
"""Mean Teacher (arXiv 1703.01780): the student shall predict what its running mean predicts."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from semisam.losses import Term
from semisam.methods.base import TeacherMethod, on_core

__all__ = ["MeanTeacher"]


class MeanTeacher(TeacherMethod):
    """Mean Teacher: squared distance to the prediction of the teacher on noisy images.

        L_unsup = w_con(t) mean over unlabeled samples, classes and voxels of (p - softmax T(x + n))^2
        n = clip(noise N(0, 1), +-2 noise)

    The teacher runs with dropout and without gradient. Prompts for a generalist come from a second,
    clean pass in evaluation mode. See `Method` for the arguments.

    >>> import torch
    >>> from semisam.engine.config import MethodConfig
    >>> from semisam.methods.base import Batch
    >>> from semisam.methods.mean_teacher import MeanTeacher
    >>> method = MeanTeacher(MethodConfig(), torch.nn.Conv2d(1, 2, 1), num_classes=2, total_steps=10)
    >>> batch = Batch(torch.rand(2, 1, 8, 8), torch.ones(1, 8, 8, dtype=torch.uint8), ids=(0, 1))
    >>> list(method.losses(batch, step=0))
    ['ce', 'dice', 'consistency']
    """

    name = "mean-teacher"

    def _consistency(
        self, images: Tensor, ids: Sequence[int], step: int, samples: tuple[int, int]
    ) -> tuple[Term, Tensor | None]:
        with self._stochastic_teacher() as teacher:
            target = on_core(teacher(self._noisy(images, ids, step, 0)).softmax(1))
        return Term("mse", target, samples=samples, scale=self._weight(step), reduction="element"), None
