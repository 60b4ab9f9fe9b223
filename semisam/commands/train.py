# SPDX-License-Identifier: Apache-2.0
"""Train a specialist on a folder of labeled and unlabeled scans.

Settings come from defaults, then --config FILE (YAML or TOML), then flags and --set KEY=VALUE.

examples:
  semisam train DATA --out runs/first --labeled 4 --unlabeled 40 --test 40
  semisam train DATA --out runs/mt --method mean-teacher --labeled 4 --steps 2000 --patch 32 48 32
  semisam train DATA --out runs/tuned --config plus.yaml --set train.lr=0.02 --set term.options.lam_sam=1
  semisam train DATA --out runs/sam --generalist sam-med3d-turbo --checkpoint sam_med3d_turbo.pth
  semisam train DATA --out runs/two-stages --config two-stages --steps 500 --patch 32 32 32
  semisam train DATA --out runs/first --quick-check        a few steps of everything, in a minute
  semisam train --out runs/first --resume                  continues after a kill, with the same bits
  torchrun --nproc-per-node 2 -m semisam train DATA --out runs/two-gpus

methods: supervised, mean-teacher (mt), ua-mt (uamt), dan; with the generalist's term: semisam-mean-teacher
(semisam-mt), semisam-ua-mt, semisam-dan
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from semisam.cli import CommandError
from semisam.engine import config as settings

FLAGS = {
    "method": "method.name",
    "labeled": "data.labeled",
    "unlabeled": "data.unlabeled",
    "validation": "data.validation",
    "test": "data.test",
    "draw": "data.draw",
    "layout": "data.layout",
    "steps": "train.steps",
    "batch": "train.batch_size",
    "patch": "train.patch_size",
    "seed": "train.seed",
    "device": "train.device",
    "precision": "train.precision",
    "specialist": "specialist.name",
    "weights": "specialist.weights",
    "generalist": "term.generalists",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("data", nargs="?", metavar="DATA", help="folder with the scans (layouts: nnunet, h5, images)")
    add("--out", required=True, metavar="RUN", help="run folder; new, or with --resume one to continue")
    add(
        "--config",
        metavar="FILE",
        help="YAML or TOML file with sections data, specialist, method, term, train, or a recipe: "
        + ", ".join(settings.recipes()),
    )
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting, as train.lr=0.02")
    add("--resume", action="store_true", help="continue RUN from its last checkpoint")
    add("--quick-check", action="store_true", help="run 4 steps of everything and write nothing to RUN")
    add("--method", metavar="NAME", help="see above; default semisam-mean-teacher")
    for name, what in (
        ("labeled", "cases that may show their label"),
        ("unlabeled", "cases whose label is never opened"),
        ("validation", "cases that choose best.ckpt"),
        ("test", "cases kept for the end"),
    ):
        add(f"--{name}", type=_ids, metavar="N|IDS", help=f"{what}: a number, or ids with commas")
    add("--draw", type=int, metavar="K", help="0: the first cases; K > 0: the K-th random draw of them")
    add("--layout", metavar="NAME", help="auto, nnunet, h5 or images")
    add("--steps", type=int, metavar="N", help="steps of the optimiser")
    add("--batch", type=int, metavar="N", help="patches per step, labeled and unlabeled together")
    add("--patch", type=int, nargs="+", metavar="N", help="sides of the patches in voxels")
    add("--specialist", metavar="NAME", help="unet3d, vnet, unet2d or a dotted class name")
    add("--weights", metavar="FILE", help="start weights of the specialist")
    add("--generalist", nargs="+", metavar="NAME", help="who teaches; default random-walker")
    add(
        "--checkpoint",
        nargs="+",
        default=[],
        metavar="FILE",
        help="weights of the generalist; NAME=FILE for each of several",
    )
    add("--seed", type=int, metavar="N", help="decides about everything random")
    add("--device", metavar="NAME", help="auto, cpu or cuda")
    add("--precision", metavar="NAME", help="auto, 32, bf16 or fp16")


def _ids(text: str) -> int | list[str]:
    return int(text) if text.isdecimal() else [name.strip() for name in text.split(",") if name.strip()]


def run(options: argparse.Namespace) -> int:
    """Train; return 0, or 130 or 143 after SIGINT or SIGTERM."""
    try:
        config = _config(options)
        settings.check(config)
    except settings.ConfigError as error:
        raise CommandError(str(error)) from error
    # torch, MONAI and Fabric: only now that the settings are right
    from semisam.engine import trainer  # noqa: PLC0415
    from semisam.engine.cases import CaseError  # noqa: PLC0415

    try:
        if options.quick_check:
            return _quick_check(config, trainer)
        done = trainer.train(config, options.out, resume=options.resume, command=["semisam", *options.words])
    except trainer.Interrupted as stop:
        print(f"{stop}; continue with: semisam train --out {options.out} --resume")
        return 128 + stop.number
    except (settings.ConfigError, CaseError, trainer.TrainingError, trainer.CheckpointError) as error:
        raise CommandError(str(error)) from error
    if os.environ.get("RANK", "0") == "0":  # under torchrun one process speaks
        _tell(done, config)
    return 0


def _config(options: argparse.Namespace) -> settings.Config:
    """Defaults, or those of the run to continue; then file, flags, --set."""
    saved = Path(options.out) / "config.yaml"
    file = options.config
    if options.resume and saved.exists() and file is None:
        file = saved
    pairs: list[tuple[str, Any]] = []
    if options.data is not None:
        pairs.append(("data.root", options.data))
    for flag, key in FLAGS.items():
        value = getattr(options, flag)
        if value is not None:
            pairs.append((key, value))
    pairs += [_checkpoint(text, options.generalist or []) for text in options.checkpoint]
    pairs += [settings.parse_setting(text) for text in options.set]
    config = settings.load(file, pairs)
    if not config.data.root:
        raise settings.ConfigError("DATA: expected the folder with the scans, got nothing")
    return config


def _checkpoint(text: str, names: list[str]) -> tuple[str, Any]:
    """The setting that --checkpoint means: NAME=FILE, or the file of the only generalist."""
    name, equals, path = text.partition("=")
    if not equals or name not in names:
        if len(names) != 1:
            raise settings.ConfigError(
                f"--checkpoint {text}: expected NAME=FILE with a name of --generalist "
                f"({', '.join(names) or 'which is missing'})"
            )
        name, path = names[0], text
    if "." in name:
        raise settings.ConfigError(
            f"--checkpoint {text}: {name} is a class of yours: give its options in term.generalist_options "
            "of a --config file"
        )
    return f"term.generalist_options.{name}.checkpoint", path


def _quick_check(config: settings.Config, trainer: Any) -> int:
    """Everything once, small and in a folder that goes away."""
    short = replace(
        config,
        train=replace(config.train, steps=4, validate_every=4, checkpoint_every=2, log_every=1),
        term=replace(
            config.term,
            gate_steps=2,
            gate_every=2,
            offline_start=None if config.term.offline_from or config.term.first_stage else 2,
            first_stage=min(config.term.first_stage, 4),
            refresh=min(config.term.refresh, 1),
        ),
    )
    with tempfile.TemporaryDirectory() as folder:
        done = trainer.train(short, Path(folder) / "run")
    print(f"quick check: 4 steps, validation, checkpoints and gate work ({done.seconds / 4:.2f} s per step)")
    return 0


def _tell(done: Any, config: settings.Config) -> None:
    from semisam.engine import offline  # noqa: PLC0415

    first = offline.first_stage(config)
    before = f"{first.train.steps} steps of {first.method.name}, then " if first else ""
    hours, rest = divmod(round(done.seconds), 3600)
    took = f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
    print(f"trained {before}{done.steps} steps in {took}; everything is in {done.out}")
    if done.best:
        print(f"  best.ckpt   validation Dice {done.best['dice']:.4f} at step {done.best['step']}")
    print("  last.ckpt   the last step")
    print("  log.csv     losses by step; run.json and config.yaml: what this run was made of")
    print(f"next: semisam predict --help, semisam evaluate --help, semisam report {done.out}")
