# SPDX-License-Identifier: Apache-2.0
"""Uncertainty-aware Mean Teacher (arXiv 1907.07034): learn from the teacher where it is certain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from semisam.fusion import mc_uncertainty
from semisam.losses import Term
from semisam.methods.base import TeacherMethod, on_core, share_of
from semisam.schedules import uamt_threshold

__all__ = ["UncertaintyAwareMeanTeacher"]


class UncertaintyAwareMeanTeacher(TeacherMethod):
    """UA-MT: squared distance to the teacher where its entropy over stochastic passes is low.

        pbar = mean of `mc_passes` softmaxes, fresh noise and dropout each
        H = -sum_c pbar_c ln(pbar_c + 1e-6)
        M = 1[H < tau(t)]     L_unsup = w_con(t) sum_v M_v sum_c (p_c - pT_c)^2 / (C sum_v M_v)

    with pT one separate noisy pass and tau from `schedules.uamt_threshold`; 0 where nothing is certain.
    The sums run over the unlabeled samples of all ranks jointly. Passes run two at a time, as a doubled
    batch. Prompts for a generalist come from pbar. See `Method` for the arguments.

    >>> import torch
    >>> from semisam.engine.config import MethodConfig
    >>> from semisam.methods.base import Batch
    >>> from semisam.methods.uamt import UncertaintyAwareMeanTeacher
    >>> method = UncertaintyAwareMeanTeacher(
    ...     MethodConfig(), torch.nn.Conv2d(1, 2, 1), num_classes=2, total_steps=10)
    >>> batch = Batch(torch.rand(2, 1, 8, 8), torch.ones(1, 8, 8, dtype=torch.uint8), ids=(0, 1))
    >>> list(method.losses(batch, step=0))
    ['ce', 'dice', 'consistency']
    """

    name = "ua-mt"

    def __init__(self, config: Any, student: nn.Module, **options: Any) -> None:
        super().__init__(config, student, **options)
        if config.mc_passes < 1:
            raise ValueError(f"method.mc_passes: expected at least 1, got {config.mc_passes}")

    def _consistency(
        self, images: Tensor, ids: Sequence[int], step: int, samples: tuple[int, int]
    ) -> tuple[Term, Tensor | None]:
        passes: list[Tensor] = []
        with self._stochastic_teacher() as teacher:
            for draw in range(1, self.config.mc_passes + 1, 2):
                draws = range(draw, min(draw + 2, self.config.mc_passes + 1))
                doubled = torch.cat([self._noisy(images, ids, step, d) for d in draws])
                passes.extend(on_core(teacher(doubled)).split(len(images)))
            target = on_core(teacher(self._noisy(images, ids, step, 0)).softmax(1))
        threshold = uamt_threshold(step, self.total_steps, self.num_classes) / math.log(self.num_classes)
        mc = mc_uncertainty(passes, min(threshold, 1.0), want=("mean", "mask"))
        weight = self._weight(step) * share_of(mc.mask.sum().to(images.device))
        return Term("mse", target, mc.mask, samples, weight, reduction="element"), mc.mean
