# SPDX-License-Identifier: Apache-2.0
"""Label unlabeled scans with the network of a run, ranked by uncertainty for human review.

DATA is a data set or a folder of scans. Cases without a label file are taken; in the folder that the run was
trained on these are its unlabeled cases. Written to DIR: pseudo/ID (labels), uncertainty/ID (normalised
entropy: 0 sure, 1 no idea; h5 scans keep it in the file of the label) and ranking.csv, the most doubtful
case first: mean uncertainty around the predicted object and over the whole volume, its size, number of
components, and the Dice between student and teacher. For NIfTI scans dataset.json makes DIR an nnU-Net
(v2) data set: link or move it to nnUNet_raw/DatasetXXX_Name. Cases that are done are skipped, and labels that
you have corrected in pseudo/ are left as they are.

examples:
  semisam pseudo-label runs/hippocampus-4 data/hippocampus --out pseudo
  semisam pseudo-label runs/hippocampus-4 new_scans --out pseudo --mc 8 --device cuda
  semisam pseudo-label runs/la-4 data/la --out pseudo --all --network teacher
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from semisam.commands.predict import add_network, guarded, settings_of


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("run_dir", metavar="RUN", help="folder of a training run")
    add("data", metavar="DATA", help="data set or folder of scans")
    add("--out", metavar="DIR", required=True, help="folder to write to")
    add("--all", action="store_true", help="label all cases of DATA, those with a label file, too")
    add("--mc", type=int, default=0, metavar="N", help="entropy of the mean of N passes with dropout (0)")
    add("--largest-component", action="store_true", help="keep each class's largest component alone")
    add("--overwrite", action="store_true", help="label cases that are done again")
    add_network(parser)
    parser.set_defaults(refuse=parser.error)


def run(options: argparse.Namespace) -> int:
    """Label, rank and report."""
    settings = settings_of(options, mc=options.mc, largest_component=options.largest_component)
    return int(guarded(lambda: _pseudo_label(options, settings)))


def _pseudo_label(options: argparse.Namespace, settings: Any) -> int:
    from semisam.engine import inference  # noqa: PLC0415
    from semisam.engine.checkpoint import CheckpointError  # noqa: PLC0415
    from semisam.engine.pseudo_labels import pseudo_label  # noqa: PLC0415

    load = inference.load_run
    student = load(options.run_dir, options.checkpoint, options.network, options.device)
    cases = _cases(student, options)
    other = "teacher" if options.network == "student" else "student"
    try:
        teacher = load(options.run_dir, options.checkpoint, other, options.device)
    except CheckpointError:  # the method has no teacher
        teacher = None
    outcome, rows = pseudo_label(
        student, cases, options.out, settings, teacher=teacher, overwrite=options.overwrite
    )
    print(outcome.report())
    for row in rows[:10]:
        flag = "  nothing predicted" if int(row["empty"]) else ""
        print(f"{row['rank']:>4}  {row['case']}  uncertainty {float(row['mean_uncertainty']):.3f}{flag}")
    print(f"the most doubtful case first: {Path(options.out) / 'ranking.csv'}")
    return 1 if outcome.failed else 0


def _cases(loaded: Any, options: argparse.Namespace) -> list[Any]:
    from semisam.engine import inference  # noqa: PLC0415
    from semisam.engine.cases import CaseError, find_cases  # noqa: PLC0415
    from semisam.engine.pseudo_labels import unlabeled_cases  # noqa: PLC0415

    try:
        found = find_cases(options.data)
    except CaseError as error:
        if error.problems:
            raise
        return inference.cases_of([options.data], None, int(loaded.meta["channels"]))  # a folder of scans
    if options.all:
        return list(inference.all_cases(found).values())
    cases = unlabeled_cases(found, loaded.config.data.root, inference.split_of(loaded.path))
    if not cases:
        raise CaseError(f"{options.data}: every case has a label; --all labels them all the same")
    return cases
