# SPDX-License-Identifier: Apache-2.0
"""All settings of a training run, as dataclasses: defaults <- YAML or TOML file <- flags."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Config", "DataConfig", "MethodConfig", "SpecialistConfig", "TermConfig", "TrainConfig"]


@dataclass
class DataConfig:
    """What is trained on, and which cases may show their label.

    `labeled`, `unlabeled`, `validation` and `test` are a number of cases or a list of ids; None takes
    what the folder says: cases with a label file or without, `val.list`, `test.list` or labeled `imagesTs`.
    Numbers are drawn by `draw` (0: the first ones of the list, in order; k > 0: the k-th random draw), `test`
    from the end of the list. A case that is unlabeled by this choice has its label never opened.
    """

    root: str = ""
    layout: str = "auto"  # auto | nnunet | h5 | images
    labeled: int | list[str] | None = None
    unlabeled: int | list[str] | None = None
    validation: int | list[str] | None = None
    test: int | list[str] | None = None
    draw: int = 0
    spacing: list[float] | None = None  # mm; None: as the files are
    normalize: str = "zscore"  # zscore | minmax | none
    label_map: dict[int, int] | None = None
    cache: bool = True
    workers: int = 0


@dataclass
class SpecialistConfig:
    """The network: a name of `semisam.specialists` or a dotted path, its options and start weights."""

    name: str = "unet3d"
    options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None


@dataclass
class MethodConfig:
    """The training method: supervised, mean-teacher, ua-mt; semisam-* adds the generalist's term."""

    name: str = "semisam-mean-teacher"
    lambda_ce: float = 0.5
    lambda_dice: float = 0.5
    include_background: bool = True
    consistency_weight: float = 0.1
    ema_decay: float = 0.99
    noise: float = 0.1
    mc_passes: int = 8


@dataclass
class TermConfig:
    """The generalist's term; None takes the preset's value, other names go to `SemiSAMTerm` as they are."""

    generalists: list[str] = field(default_factory=lambda: ["random-walker"])
    preset: str = "plus"
    options: dict[str, Any] = field(default_factory=dict)  # of SemiSAMTerm: lam_sam, mode, clicks, ...
    generalist_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    gate: bool = True
    gate_steps: int | None = None  # steps of each leave-one-out run; None: a tenth of the steps
    gate_every: int = 100


@dataclass
class TrainConfig:
    """The loop: steps, patches, optimiser, precision, checkpoints."""

    steps: int = 6000
    batch_size: int = 4
    labeled_batch: int = 2
    patch_size: list[int] = field(default_factory=lambda: [96, 96, 96])
    optimizer: str = "sgd"
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: str = "poly"  # poly | step | constant
    milestones: list[int] = field(default_factory=lambda: [2500, 5000])
    precision: str = "auto"  # auto | 32 | bf16 | fp16
    accumulate: int = 1
    clip_gradient: float | None = None
    augment: bool = True
    seed: int = 1337
    deterministic: bool = False
    device: str = "auto"
    validate_every: int = 200
    checkpoint_every: int = 200
    log_every: int = 10
    tensorboard: bool = False


@dataclass
class Config:
    """A whole run."""

    data: DataConfig = field(default_factory=DataConfig)
    specialist: SpecialistConfig = field(default_factory=SpecialistConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    term: TermConfig = field(default_factory=TermConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
