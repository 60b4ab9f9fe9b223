# SPDX-License-Identifier: Apache-2.0
"""Measure predictions against the truth: Dice, Jaccard, 95HD, ASD, ASSD and surface Dice per case and class.

PRED and TRUTH are folders of label files (NIfTI, HDF5 with the key `label`, PNG) named by case ids, or
single files. With --run the cases of a run's split are predicted first and measured twice: as they are,
and with the largest component of every class alone. Everything that is wrong (missing predictions, other
shapes or affines, unexpected labels, unreadable files) is listed at once before anything is computed.
Distances are in mm where the spacing is known, else in voxels, never mixed.

examples:
  semisam evaluate predictions labelsTs --out scores
  semisam evaluate predictions labelsTs --classes Anterior Posterior --largest-component
  semisam evaluate predictions "2018LA_Seg_Training Set" --spacing 0.625 0.625 0.625 --only-predicted
  semisam evaluate --run runs/la-4 --role test
"""

from __future__ import annotations

import argparse
from typing import Any

from semisam.cli import CommandError
from semisam.commands.predict import add_network, guarded, settings_of


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("prediction", nargs="?", metavar="PRED", help="folder (or file) of predicted labels")
    add("truth", nargs="?", metavar="TRUTH", help="folder (or file) of true labels")
    add("--run", dest="run_dir", metavar="RUN", help="a run's folder: predict and measure its split")
    add("--role", default="test", choices=("test", "validation"), help="which cases of the run (test)")
    add_network(parser.add_argument_group("with --run"))
    add("--overwrite", action="store_true", help="predict cases of the run again")
    add("--out", metavar="DIR", help="write metrics.csv and summary.json here (with --run: into the run)")
    add("--classes", nargs="+", metavar="NAME", help="names of the labels 1, 2, ... (dataset.json)")
    add("--label-map", nargs="+", metavar="A=B", help="value A in the truth's files is class B")
    add("--largest-component", action="store_true", help="keep each class's largest component alone")
    add(
        "--definition",
        default="pooled",
        choices=("pooled", "monai", "deepmind"),
        help="of distances (pooled)",
    )
    add("--tolerance", type=float, default=1.0, help="of the surface Dice, in the unit of distances (1)")
    add("--spacing", type=float, nargs="+", metavar="MM", help="mm per axis of files without a spacing")
    add("--unit", default="auto", choices=("auto", "mm", "voxels"), help="of distances (auto)")
    add("--only-predicted", action="store_true", help="leave truths without a prediction out")
    parser.set_defaults(refuse=parser.error)


def run(options: argparse.Namespace) -> int:
    """Evaluate and print the table."""
    two = options.prediction is not None and options.truth is not None
    if (options.run_dir is None) != two or (options.run_dir is not None and options.prediction is not None):
        options.refuse("expected PRED and TRUTH, or --run RUN")
    if options.run_dir is not None:
        return _of_a_run(options)
    from semisam.engine import evaluation  # noqa: PLC0415

    try:
        found = evaluation.evaluate_folders(
            options.prediction,
            options.truth,
            classes=None if options.classes is None else dict(enumerate(options.classes, 1)),
            only_predicted=options.only_predicted,
            largest_component=options.largest_component,
            label_map=_label_map(options),
            **_options(options),
        )
    except (evaluation.EvaluationError, ValueError) as error:
        raise CommandError(str(error)) from error
    if options.out is not None:
        try:
            place = found.write(options.out)
        except OSError as error:
            raise CommandError(f"cannot write to {options.out}: {error}") from error
    print(found.table())
    if options.out is not None:
        print(f"written: {place / 'metrics.csv'}, {place / 'summary.json'}")
    return 0


def _options(options: argparse.Namespace) -> dict[str, object]:
    if not options.tolerance >= 0:
        options.refuse(f"--tolerance: expected 0 or more, got {options.tolerance}")
    names = ("definition", "tolerance", "spacing", "unit")
    return {name: getattr(options, name) for name in names}


def _label_map(options: argparse.Namespace) -> dict[int, int] | None:
    if options.label_map is None:
        return None
    try:
        pairs = [word.split("=") for word in options.label_map]
        result = {int(a): int(b) for a, b in pairs}
    except ValueError:
        options.refuse(f"--label-map: expected words like 200=1, got {' '.join(options.label_map)}")
    if not all(0 <= n <= 255 for pair in result.items() for n in pair):
        options.refuse(f"--label-map: expected numbers from 0 to 255, got {' '.join(options.label_map)}")
    return result


def _of_a_run(options: argparse.Namespace) -> int:
    for name in ("out", "classes", "label_map", "largest_component", "only_predicted"):
        if getattr(options, name):
            options.refuse(f"--{name.replace('_', '-')}: not with --run, which knows it from the run")
    settings = settings_of(options)
    return int(guarded(lambda: _predict_and_measure(options, settings)))


def _predict_and_measure(options: argparse.Namespace, settings: Any) -> int:
    from semisam.engine import evaluation, inference  # noqa: PLC0415

    loaded = inference.load_run(options.run_dir, options.checkpoint, options.network, options.device)
    outcome, _ = inference.predict_split(
        loaded, options.role, options.network, settings, overwrite=options.overwrite
    )
    print(outcome.report())
    if outcome.failed:
        return 1
    folders = evaluation.evaluate_run(loaded, options.role, options.network, **_options(options))
    for folder, found in folders.items():
        print(f"\n{folder}\n{found.table()}")
    return 0
