# SPDX-License-Identifier: Apache-2.0
"""Optimiser and learning rate by the names of the settings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from semisam.engine.config import TrainConfig
from semisam.schedules import polynomial_lr, step_lr

__all__ = ["build", "learning_rate"]


def build(train: TrainConfig, parameters: Iterable[Any]) -> torch.optim.Optimizer:
    """Return SGD (momentum, weight decay) or Adam (weight decay) over all parameters.

    >>> import torch
    >>> from semisam.engine import optimisers
    >>> from semisam.engine.config import TrainConfig
    >>> type(optimisers.build(TrainConfig(optimizer="adam"), torch.nn.Conv2d(1, 2, 1).parameters())).__name__
    'Adam'
    """
    if train.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=train.lr, weight_decay=train.weight_decay)
    return torch.optim.SGD(parameters, lr=train.lr, momentum=train.momentum, weight_decay=train.weight_decay)


def learning_rate(train: TrainConfig, step: int, total_steps: int) -> float:
    """Return the learning rate of step `step` (from 0) after the schedule's name: poly, step, constant.

    >>> from semisam.engine import optimisers
    >>> from semisam.engine.config import TrainConfig
    >>> optimisers.learning_rate(TrainConfig(schedule="step", milestones=[2, 4]), 3, 6)
    0.001
    """
    if train.schedule == "poly":
        return train.lr * polynomial_lr(step, total_steps)
    return train.lr * (step_lr(step, train.milestones) if train.schedule == "step" else 1.0)
