# SPDX-License-Identifier: Apache-2.0
"""Pseudo-labels of unlabeled scans, ranked so that a person looks at the doubtful ones first."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from semisam import masks
from semisam.engine.cases import Case, CaseSet
from semisam.engine.files import write_json, write_text
from semisam.engine.inference import Outcome, Prediction, Settings, predict_case, predict_cases

__all__ = ["COLUMNS", "describe", "dice_between", "nnunet_dataset", "pseudo_label", "unlabeled_cases"]

COLUMNS = (
    *("rank", "case", "mean_uncertainty", "mean_uncertainty_volume", "foreground_voxels", "foreground_ml"),
    *("components", "empty", "dice_student_teacher"),
)
REACH = 3.0  # voxels around the object that count as its neighbourhood

Row = dict[str, Any]


def unlabeled_cases(found: CaseSet, run_root: str, split: Mapping[str, Sequence[str]]) -> list[Case]:
    """Return the cases of a data set that have no label, without any label path.

    In the folder that a run was trained on these are the run's unlabeled cases, whose labels count as
    hidden; elsewhere those without a label file.

    >>> import tempfile
    >>> from semisam.engine.cases import find_cases
    >>> from semisam.engine.phantom import write_phantoms
    >>> from semisam.engine.pseudo_labels import unlabeled_cases
    >>> root = write_phantoms(tempfile.mkdtemp(), labeled=1, unlabeled=2, test=0, shape=(16, 16, 16))
    >>> len(unlabeled_cases(find_cases(root), "", {}))
    2
    """
    everything = {case.id: case for case in (*found.cases, *found.validation, *found.test)}
    own = bool(run_root) and Path(run_root).resolve() == found.root.resolve()
    chosen = (
        [everything[i] for i in split.get("unlabeled", ()) if i in everything]
        if own
        else [case for case in everything.values() if case.label is None]
    )
    return [replace(case, label=None) for case in chosen]


def describe(label: Any, uncertainty: Any, spacing: Sequence[float] | None = None) -> Row:
    """Return what the ranking says of one pseudo-label [*S] with its uncertainty map [*S].

    `mean_uncertainty` is over the predicted object and what lies within 3 voxels of it (the whole volume
    if nothing is predicted); `foreground_ml` needs the spacing in mm, and is None in 2-D;
    `components` counts those of all classes (26 neighbours; 8 in 2-D).

    >>> import numpy as np
    >>> from semisam.engine.pseudo_labels import describe
    >>> label = np.zeros((10, 10, 10), np.uint8)
    >>> label[:5, :2, :1] = 1
    >>> row = describe(label, np.full(label.shape, 0.25, np.float32), (10.0, 10.0, 10.0))
    >>> row["mean_uncertainty"], row["foreground_ml"], row["components"], row["empty"]
    (0.25, 10.0, 1, 0)
    """
    foreground = label > 0
    voxels = int(foreground.sum())
    near = uncertainty
    if voxels:
        away = np.ascontiguousarray(~foreground)
        near = uncertainty[masks.edt(away, border=False, spatial_dims=label.ndim) <= REACH]
    known = spacing is not None and len(spacing) == 3
    components = masks.components(np.ascontiguousarray(label), by_value=True, spatial_dims=label.ndim)
    return {
        "mean_uncertainty": float(near.mean(dtype=np.float64)),
        "mean_uncertainty_volume": float(uncertainty.mean(dtype=np.float64)),
        "foreground_voxels": voxels,
        "foreground_ml": voxels * math.prod(spacing) / 1000 if known and spacing is not None else None,
        "components": int(components.count),
        "empty": int(voxels == 0),
    }


def dice_between(a: Any, b: Any, num_classes: int) -> float:
    """Return the mean Dice over foreground classes of two label maps; a class absent from both counts 1.

    >>> import numpy as np
    >>> from semisam.engine.pseudo_labels import dice_between
    >>> dice_between(np.array([[1, 1, 0, 2]], np.uint8), np.array([[1, 1, 0, 0]], np.uint8), 3)
    0.5
    """
    from semisam import metrics  # noqa: PLC0415

    values = metrics.dice(a[None, None], b[None, None], include_background=False, num_classes=num_classes)
    return float(values.mean())


def pseudo_label(
    student: Any,
    cases: Sequence[Case],
    out: str | os.PathLike[str],
    settings: Settings | None = None,
    *,
    teacher: Any = None,
    overwrite: bool = False,
) -> tuple[Outcome, list[Row]]:
    """Predict cases into `out` and rank them; returns the outcome and the rows of ranking.csv.

    Files: `pseudo/<id>` (labels), `uncertainty/<id>` (normalised entropy, 0..1; h5 scans: the key
    uncertainty of the file in `pseudo`), `ranking.csv` (empty predictions first, then by falling
    mean_uncertainty) and, for NIfTI scans with one file per channel, `dataset.json`, with which the folder
    is an nnU-Net (v2) data set. With `teacher` (another `Loaded`) the ranking has the Dice between both
    networks' labels. A case with files and a row in ranking.csv is skipped unless `overwrite`, and labels
    that a person has corrected are left as they are; the ranking is written after every case.

    Raises OSError if nothing can be written.

    >>> import pathlib, tempfile
    >>> import torch
    >>> from semisam.engine.cases import find_cases
    >>> from semisam.engine.checkpoint import Loaded
    >>> from semisam.engine.config import Config
    >>> from semisam.engine.phantom import write_phantoms
    >>> from semisam.engine.pseudo_labels import pseudo_label
    >>> root = write_phantoms(tempfile.mkdtemp(), labeled=2, unlabeled=0, test=0, shape=(16, 16, 16))
    >>> names = ["background", "organ"]
    >>> meta = {"channels": 1, "num_classes": 2, "spatial_dims": 3, "class_names": names}
    >>> loaded = Loaded(torch.nn.Conv3d(1, 2, 1), Config(), meta, 0, "last", root)
    >>> out = pathlib.Path(tempfile.mkdtemp())
    >>> _, rows = pseudo_label(loaded, find_cases(root).cases, out)
    >>> [row["rank"] for row in rows], (out / "dataset.json").is_file()
    ([1, 2], True)
    """
    place = Path(out)
    place.mkdir(parents=True, exist_ok=True)
    rows = {} if overwrite else _read_ranking(place / "ranking.csv")
    num_classes = int(student.meta["num_classes"])
    chosen = replace(settings or Settings(), uncertainty=True)

    def add(case: Case, prediction: Prediction) -> None:
        row = {
            "case": case.id,
            **describe(prediction.label, prediction.uncertainty, prediction.volume.spacing),
        }
        if teacher is not None:
            other = predict_case(teacher, case, replace(chosen, uncertainty=False, mc=0))
            row["dice_student_teacher"] = dice_between(prediction.label, other.label, num_classes)
        rows[case.id] = row
        write_text(place / "ranking.csv", _csv(_ranked(rows)))

    new = [case.id for case in cases if case.id not in rows]
    outcome = predict_cases(
        student, cases, place, chosen, overwrite=overwrite, redo=new, each=add, label_folder="pseudo"
    )
    ranked = _ranked(rows)
    write_text(place / "ranking.csv", _csv(ranked))
    made = [case for case in cases if case.id in rows]
    if made and all(c.kind == "nifti" and len(c.images) == int(student.meta["channels"]) for c in made):
        names = [str(name) for name in student.meta["class_names"]]
        write_json(place / "dataset.json", nnunet_dataset(made, names))
    return outcome, ranked


def _ranked(rows: Mapping[str, Row]) -> list[Row]:
    order = sorted(
        rows.values(), key=lambda r: (-int(r["empty"]), -float(r["mean_uncertainty"]), str(r["case"]))
    )
    return [{**row, "rank": rank} for rank, row in enumerate(order, 1)]


def _csv(rows: Sequence[Row]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _read_ranking(path: Path) -> dict[str, Row]:
    """The rows of an earlier ranking; none if there is none or it is of another form."""
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            return {}
        return {row["case"]: dict(row) for row in reader}


def nnunet_dataset(cases: Sequence[Case], class_names: Sequence[str]) -> dict[str, Any]:
    """Return the dataset.json with which nnU-Net (v2) trains on NIfTI scans and their pseudo-labels.

    nnU-Net reads the images from where they are (key "dataset", absolute paths): link or move the folder
    to `nnUNet_raw/DatasetXXX_Name`. Names of channels are "channel 0", ...: change "channel 0" to "CT"
    for CT scans, as nnU-Net normalises by that name.

    >>> from pathlib import Path
    >>> from semisam.engine.cases import Case
    >>> from semisam.engine.pseudo_labels import nnunet_dataset
    >>> case = Case("a", (Path("/d/a.nii.gz"),), None, "nifti")
    >>> made = nnunet_dataset([case], ["background", "x"])
    >>> made["labels"], made["dataset"]["a"]["label"]
    ({'background': 0, 'x': 1}, 'pseudo/a.nii.gz')
    """
    channels = max(len(case.images) for case in cases)
    return {
        "channel_names": {str(i): f"channel {i}" for i in range(channels)},
        "labels": {name: i for i, name in enumerate(("background", *class_names[1:]))},
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
        "dataset": {
            case.id: {
                "images": [str(path.resolve()) for path in case.images],
                "label": f"pseudo/{case.id}.nii.gz",
            }
            for case in cases
        },
    }
