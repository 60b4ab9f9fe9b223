# SPDX-License-Identifier: Apache-2.0
"""Segment scans with the network of a run.

INPUT is a scan, a folder of scans, a data set (nnU-Net, h5 lists, images) or the id of a case of the run's
data; without INPUT the run's test cases are taken. Outputs are named by case ids: NIfTI in gives NIfTI out
with the same affine and header geometry (labels uint8), h5 gives h5 (keys label, probability,
uncertainty), pictures give PNG. --probability adds probability/ID (NIfTI: float32, 4-D, classes on the last
axis), --uncertainty adds uncertainty/ID (0 sure, 1 no idea). Files that are there already are skipped, those
by another network or by hand, too (predictions.jsonl says who made what); only in the run's own folder are
predictions of an earlier state of the network made again.
Broken inputs do not stop the others; they are listed at the end, and the exit code is then 1.

examples:
  semisam predict runs/hippocampus-4 new_scans --out segmented
  semisam predict runs/hippocampus-4 scan.nii.gz --out segmented --probability --uncertainty --mc 8
  semisam predict runs/la-4 --role unlabeled --out segmented --largest-component
  semisam predict runs/la-4 --stride 18 18 4 --device cuda:1 --batch 8
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from semisam.cli import CommandError

ROLES = ("test", "validation", "unlabeled", "labeled")


def add_network(parser: Any) -> None:
    """Add the options that choose a run's network and how it runs."""
    add = parser.add_argument
    add("--checkpoint", default="auto", choices=("auto", "best", "last"), help="best if there is one (auto)")
    add("--network", default="student", choices=("student", "teacher"), help="(student)")
    add("--stride", type=int, nargs="+", metavar="N", help="of the windows, one number or one per axis")
    add("--batch", type=int, default=4, metavar="N", help="windows at once (4)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (auto)")
    add(
        "--accumulate",
        choices=("device", "cpu"),
        default="device",
        help="where sums are kept: cpu needs less memory of the GPU (device)",
    )


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("run_dir", metavar="RUN", help="folder of a training run")
    add(
        "inputs",
        nargs="*",
        metavar="INPUT",
        help="scans, folders, or ids of the run's cases (its test cases)",
    )
    add("--role", choices=ROLES, help="predict the run's cases of this role")
    add("--out", metavar="DIR", help="folder to write to (RUN/ROLE/CHECKPOINT-NETWORK/predictions)")
    add("--probability", action="store_true", help="write probabilities, too")
    add("--uncertainty", action="store_true", help="write the normalised entropy, too")
    add("--mc", type=int, default=0, metavar="N", help="entropy of the mean of N passes with dropout (0)")
    add("--largest-component", action="store_true", help="keep each class's largest component alone")
    add("--overwrite", action="store_true", help="predict cases whose files are there again")
    add_network(parser)
    parser.set_defaults(refuse=parser.error)


def settings_of(options: argparse.Namespace, **more: Any) -> Any:
    """Return the inference settings of the command line."""
    from semisam.engine.inference import Settings  # noqa: PLC0415

    if options.batch < 1 or any(s < 1 for s in options.stride or ()) or getattr(options, "mc", 0) < 0:
        options.refuse("--batch and --stride: expected numbers from 1, --mc from 0")
    stride = options.stride[0] if options.stride and len(options.stride) == 1 else options.stride
    accumulate = "cpu" if options.accumulate == "cpu" else None
    return Settings(stride=stride, batch=options.batch, accumulate=accumulate, **more)


def guarded(work: Callable[[], Any]) -> Any:
    """Return what `work` does, with what a user can mend as CommandError."""
    from semisam.engine.cases import CaseError  # noqa: PLC0415
    from semisam.engine.checkpoint import CheckpointError  # noqa: PLC0415
    from semisam.engine.evaluation import EvaluationError  # noqa: PLC0415

    try:
        return work()
    except (CaseError, CheckpointError, EvaluationError, ValueError) as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(
            f"stopped: {error}; files written before are whole, and the same command goes on from there"
        ) from error


def run(options: argparse.Namespace) -> int:
    """Predict and report."""
    if options.inputs and options.role:
        options.refuse("expected inputs or --role, not both")
    if options.inputs and not options.out:
        options.refuse("--out: expected a folder for predictions of inputs")
    if options.mc and not options.uncertainty:
        options.refuse("--mc: gives the uncertainty map; add --uncertainty")
    settings = settings_of(
        options, uncertainty=options.uncertainty, mc=options.mc, largest_component=options.largest_component
    )
    return int(guarded(lambda: _predict(options, settings)))


def _predict(options: argparse.Namespace, settings: Any) -> int:
    from semisam.engine import inference  # noqa: PLC0415

    loaded = inference.load_run(options.run_dir, options.checkpoint, options.network, options.device)
    role = options.role or "test"
    if options.inputs:
        ids = [word for word in options.inputs if not Path(word).exists()]
        known = inference.run_cases(loaded) if ids else None
        cases = inference.cases_of(options.inputs, known, int(loaded.meta["channels"]))
    else:
        cases = inference.role_cases(loaded, role)
    out = options.out or inference.split_folder(loaded, role, options.network) / "predictions"
    outcome = inference.predict_cases(
        *(loaded, cases, out, settings),
        probability=options.probability,
        overwrite=options.overwrite,
        renew=options.out is None,
    )
    print(outcome.report())
    print(f"in {out}")
    return 1 if outcome.failed else 0
