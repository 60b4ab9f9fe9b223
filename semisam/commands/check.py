# SPDX-License-Identifier: Apache-2.0
"""List every broken, missing or mismatched case of a folder, with its reason.

Reads all images and labels of a folder in one of the known layouts (nnU-Net or decathlon, the h5 lists of
UA-MT and SSL4MIS, images + masks) and ends with exit code 1 if there is an error, else 0.

examples:
  semisam check data/hippocampus
  semisam check data/hippocampus --quick            headers only
  semisam check data/brats --label-map 1=1 2=2 4=3  values of the files = classes
  semisam check data/la --json > problems.json
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from semisam.cli import CommandError


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("root", metavar="DIR", help="folder with the data")
    parser.add_argument("--layout", default="auto", choices=("auto", "nnunet", "h5", "images"))
    parser.add_argument("--quick", action="store_true", help="read headers only, no voxels")
    parser.add_argument("--label-map", nargs="+", metavar="VALUE=CLASS", help="as data.label_map in training")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def label_map(words: list[str] | None) -> dict[int, int] | None:
    """{1: 1, 4: 3} of ["1=1", "4=3"]."""
    made = {}
    for word in words or ():
        value, sign, target = word.partition("=")
        if not (sign and value.isdigit() and target.isdigit()):
            raise CommandError(f"--label-map: expected VALUE=CLASS, e.g. 4=3, got {word}")
        made[int(value)] = int(target)
    return made or None


def run(options: argparse.Namespace) -> int:
    """Print the findings; 1 if there is an error among them."""
    from semisam.engine.check import SEVERITIES, check_folder  # noqa: PLC0415

    report = check_folder(
        options.root, options.layout, quick=options.quick, label_map=label_map(options.label_map)
    )
    found, problems = report.found, report.problems
    counts = {severity: report.count(severity) for severity in SEVERITIES}
    code = 1 if counts["error"] else 0
    cases = [*found.cases, *found.validation, *found.test] if found else []
    if options.json:
        about = {
            "root": str(options.root),
            "layout": found.layout if found else None,
            "cases": len(cases),
            "labeled": [case.id for case in cases if case.labeled],
            "unlabeled": [case.id for case in cases if not case.labeled],
            "counts": counts,
            "problems": [asdict(problem) for problem in problems],
        }
        print(json.dumps(about, indent=2))
        return code
    if found:
        labeled = sum(case.labeled for case in cases)
        names = ", ".join(found.class_names) or ", ".join(map(str, report.values)) or "unknown"
        print(
            f"{options.root}: layout {found.layout}, {found.spatial_dims}-D, {found.channels} channel(s), "
            f"{len(cases)} cases: {len(found.cases)} for training, {len(found.validation)} validation, "
            f"{len(found.test)} test; {labeled} labeled, {len(cases) - labeled} unlabeled; classes: {names}"
        )
    for problem in problems:
        if problem.kind != "unlabeled":
            print(f"{problem.severity:8}{problem}")
    unlabeled = [problem.case for problem in problems if problem.kind == "unlabeled"]
    if unlabeled:
        print(f"note    unlabeled: {', '.join(unlabeled)}")
    what = "headers" if options.quick else "all voxels"
    print(
        f"{counts['error']} error(s), {counts['warning']} warning(s), {counts['note']} note(s); {what} read"
    )
    return code
