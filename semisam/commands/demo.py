# SPDX-License-Identifier: Apache-2.0
"""Train three methods on few labeled scans, compare them honestly, and write report.html.

Without --data, volumes are generated: nothing is downloaded. Supervised training, mean teacher and
SemiSAM over mean teacher see the same scans, seeds and steps, for several draws of the labeled set; held-out
scans are the test. Ctrl-C leaves what was done, --resume goes on.

examples:
  semisam demo                                        about 6 minutes on 2 cores
  semisam demo --out first --minutes 2                fewer steps: rougher numbers
  semisam demo --data DATA --out runs/mine --labeled 4 --test 20 --set train.steps=2000
  semisam demo --out first --resume
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from semisam.cli import CommandError


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add(
        "--out", default="semisam-demo", metavar="DIR", help="folder for data, runs and report (semisam-demo)"
    )
    add("--data", metavar="DIR", help="your folder of scans (nnunet, h5, images) in the place of phantoms")
    add("--draws", type=int, default=3, metavar="N", help="draws of the labeled set (3)")
    add("--labeled", type=int, metavar="N", help="labeled scans (2)")
    add("--unlabeled", type=int, metavar="N", help="unlabeled scans (all others)")
    add("--test", type=int, metavar="N", help="test scans (the folder's own, else a quarter of the labeled)")
    add("--minutes", type=float, metavar="M", help="choose the steps so that all takes about so long here")
    add("--jobs", type=int, metavar="N", help="runs at a time (one per core)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting, as train.steps=1000")
    add("--resume", action="store_true", help="go on with the runs in --out")
    parser.set_defaults(refuse=parser.error)


def run(options: argparse.Namespace) -> int:
    """Run it; return 0, or 130 after Ctrl-C."""
    for name, low in (("draws", 1), ("labeled", 1), ("unlabeled", 0), ("test", 1), ("jobs", 1)):
        value = getattr(options, name)
        if value is not None and value < low:
            options.refuse(f"--{name}: expected a number from {low}, got {value}")
    if options.minutes is not None and not options.minutes > 0:
        options.refuse(f"--minutes: expected a number above 0, got {options.minutes}")
    from semisam.engine import config as settings  # noqa: PLC0415

    pairs: list[tuple[str, Any]] = [
        (f"data.{name}", getattr(options, name))
        for name in ("labeled", "unlabeled", "test")
        if getattr(options, name) is not None
    ]
    try:
        pairs += [settings.parse_setting(text) for text in options.set]
        found = _demo(options, pairs)
    except settings.ConfigError as error:
        raise CommandError(str(error)) from error
    except KeyboardInterrupt:
        words = [word for word in options.words if word != "--resume"]
        print(f"\nstopped; what was done is in {options.out}. Go on with: semisam {' '.join(words)} --resume")
        return 130
    from semisam.engine import demo  # noqa: PLC0415

    print(f"\n{demo.table(found)}\n\nwritten: {(Path(options.out) / 'report.html').resolve()}")
    return 0


def _demo(options: argparse.Namespace, pairs: list[tuple[str, Any]]) -> Any:
    from semisam.engine import demo  # noqa: PLC0415
    from semisam.engine.cases import CaseError  # noqa: PLC0415
    from semisam.engine.checkpoint import CheckpointError  # noqa: PLC0415
    from semisam.engine.setup import TrainingError  # noqa: PLC0415

    try:
        return demo.demo(
            options.out,
            options.data,
            draws=options.draws,
            pairs=pairs,
            minutes=options.minutes,
            jobs=options.jobs,
            resume=options.resume,
            command=["semisam", *options.words],
        )
    except (CaseError, CheckpointError, TrainingError, demo.DemoError) as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(f"{error}; what was done stays, and --resume goes on from there") from error
