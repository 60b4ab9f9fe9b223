# SPDX-License-Identifier: Apache-2.0
"""Evaluation of predicted label maps: every case and class, mean and standard deviation, empties counted.

Distances come in mm if the spacing of every case is known, in voxels if that of none is (or if it is
asked for), never in both. A class that is empty on one side alone has no distance: such cases are
counted as failed and left out of the mean of the distances; a second mean has the image's diagonal in
their place. What an empty class scores otherwise is told in `semisam.metrics`.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from semisam import metrics
from semisam.engine import inference
from semisam.engine.cases import Case, read_header, read_label
from semisam.engine.files import write_json, write_text
from semisam.engine.progress import progress
from semisam.engine.scans import IGNORE, stem_of

__all__ = [
    "DISTANCES",
    "METRICS",
    "Evaluation",
    "EvaluationError",
    "LabelFile",
    "Pair",
    "case_rows",
    "evaluate_folders",
    "evaluate_pairs",
    "evaluate_run",
    "match_folders",
    "read_label_file",
]

METRICS = ("dice", "jaccard", "hd95", "asd", "assd", "nsd")
DISTANCES = ("hd95", "asd", "assd")
LARGEST = "-largest-component"  # ending of the folder with largest components
COLUMNS = (
    *("case", "group", "label", "class"),
    *METRICS,
    *("empty", "voxels_pred", "voxels_ref", "diagonal", "unit"),
)

Row = dict[str, Any]


class EvaluationError(Exception):
    """Everything that keeps a set of predictions from being evaluated; `problems` has one line for each."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        many = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__("\n".join([f"{many}, nothing was evaluated:", *(f"  {p}" for p in self.problems)]))


# ---- one case -----------------------------------------------------------------------------------


def case_rows(
    case: str,
    prediction: Any,
    truth: Any,
    classes: Mapping[int, str],
    *,
    spacing: Sequence[float] | None = None,
    group: str = "",
    definition: str = "pooled",
    tolerance: float = 1.0,
) -> list[Row]:
    """Return one row for every class of a case: metrics, empties, voxel counts.

    `prediction` and `truth` are label maps [*S] of whole numbers; `classes` maps the labels to report to
    their names; voxels whose truth is 255 count nowhere. With `spacing` (mm per axis, array order)
    distances and `tolerance` of the surface Dice (NSD) are in mm, else in voxels. `definition` is that
    of `semisam.metrics`. A row's `empty` is "", "prediction", "truth" or "both".

    Raises ValueError for shapes that differ.

    >>> import numpy as np
    >>> from semisam.engine.evaluation import case_rows
    >>> y = np.zeros((20, 20), np.uint8)
    >>> y[2:8, 2:8] = 1
    >>> row = case_rows("a", np.roll(y, 3, 1), y, {1: "organ"}, spacing=(0.5, 0.5))[0]
    >>> row["dice"], row["hd95"], row["unit"], row["empty"]
    (0.5, 1.5, 'mm', '')
    """
    if prediction.shape != truth.shape:
        raise ValueError(
            f"case_rows(): prediction: expected the truth's shape {truth.shape}, got {prediction.shape}"
        )
    labels = sorted(classes)
    ignored = truth == IGNORE
    size = len(labels) + 1
    values = metrics.evaluate_case(
        _consecutive(prediction, labels),
        np.where(ignored, np.uint8(IGNORE), _consecutive(truth, labels)),
        size,
        spacing,
        [tolerance] * (size - 1),
        definition=definition,
        ignore_index=IGNORE if ignored.any() else None,
    )
    step = np.ones(truth.ndim) if spacing is None else np.asarray(spacing, np.float64)
    diagonal = float(np.linalg.norm(step * truth.shape))
    rows = []
    for i, label in enumerate(labels, 1):
        value = values[i]
        a, g = int(value["voxels_pred"]), int(value["voxels_ref"])
        empty = {(0, 0): "both", (0, 1): "prediction", (1, 0): "truth"}.get((min(a, 1), min(g, 1)), "")
        rows.append(
            {
                "case": case,
                "group": group or case,
                "label": label,
                "class": classes[label],
                **{name: value[name] for name in METRICS},
                "empty": empty,
                "voxels_pred": a,
                "voxels_ref": g,
                "diagonal": diagonal,
                "unit": "voxels" if spacing is None else "mm",
            }
        )
    return rows


def _consecutive(array: Any, labels: Sequence[int]) -> Any:
    """Labels 1 to n in the order of `labels`, 0 elsewhere."""
    result = np.zeros(array.shape, np.uint8)
    for i, label in enumerate(labels, 1):
        result[array == label] = i
    return result


# ---- many cases ---------------------------------------------------------------------------------


@dataclass
class Evaluation:
    """Rows of all cases and classes with what was measured how; `summary` has means, `write` the files.

    `rows` are those of `case_rows`; `unit` is "mm" or "voxels"; `notes` are sentences for the reader
    (cases left out, a post-processing step).

    >>> import numpy as np
    >>> from semisam.engine.evaluation import Evaluation, case_rows
    >>> y = np.eye(6, dtype=np.uint8)
    >>> rows = case_rows("a", y, y, {1: "line"}) + case_rows("b", 0 * y, y, {1: "line"})
    >>> found = Evaluation(rows, "voxels")
    >>> found.summary()["per_class"]["line"]["dice"]
    {'mean': 0.5, 'sd': 0.7071067811865476, 'n': 2}
    >>> found.summary()["per_class"]["line"]["hd95"]
    {'mean': 0.0, 'sd': None, 'n': 1, 'mean_with_diagonal': 4.242640687119285}
    """

    rows: list[Row]
    unit: str
    definition: str = "pooled"
    tolerance: float = 1.0
    notes: list[str] = field(default_factory=list)

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of their labels."""
        return list(dict.fromkeys(row["class"] for row in sorted(self.rows, key=lambda r: int(r["label"]))))

    @property
    def cases(self) -> list[str]:
        """Ids of the cases, in order of evaluation."""
        return list(dict.fromkeys(row["case"] for row in self.rows))

    def summary(self) -> dict[str, Any]:
        """Return means, standard deviations (n - 1) and counts per class, over classes and per patient.

        "mean" is over cases of each case's mean over classes. A mean of no value, and the deviation of
        fewer than two, are None. "per_group" is there if a group (patient) has more than one case: there
        each group counts once, by the mean of its cases.
        """
        per_class = {}
        for name in self.classes:
            rows = [row for row in self.rows if row["class"] == name]
            per_class[name] = {**_statistics(rows), **_empties(rows)}
        summary: dict[str, Any] = {
            "per_class": per_class,
            "mean": _statistics(_means(self.rows, "case")),
            "unit": self.unit,
            "definition": self.definition,
            "tolerance": self.tolerance,
            "cases": len(self.cases),
            **_empties(self.rows),
            "notes": self.notes,
        }
        groups = self.per_group()
        if groups:
            summary["groups"] = len({row["group"] for row in groups})
            summary["per_group"] = {
                name: _statistics([row for row in groups if row["class"] == name]) for name in self.classes
            }
        return summary

    def per_group(self) -> list[Row]:
        """Return one row per group and class, the mean of the group's cases; [] if every case is a group.

        `dice_pooled` is the Dice coefficient of all voxels of the group together.
        """
        if len({row["group"] for row in self.rows}) == len(self.cases):
            return []
        result = []
        for name in self.classes:
            for row in _means([row for row in self.rows if row["class"] == name], "group"):
                members = [r for r in self.rows if r["class"] == name and r["group"] == row["group"]]
                both = sum(r["voxels_pred"] + r["voxels_ref"] for r in members)
                shared = sum(r["dice"] * (r["voxels_pred"] + r["voxels_ref"]) for r in members)
                pooled = shared / both if both else 1.0
                result.append({**row, "class": name, "cases": len(members), "dice_pooled": pooled})
        return result

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Write metrics.csv, summary.json and, where patients have several cases, groups.csv."""
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        write_text(place / "metrics.csv", _csv(COLUMNS, self.rows))
        groups = self.per_group()
        if groups:
            columns = ("group", "class", "cases", *METRICS, "dice_pooled")
            write_text(place / "groups.csv", _csv(columns, groups))
        write_json(place / "summary.json", self.summary())
        return place

    def table(self) -> str:
        """Return the summary as lines of text: one per class, mean ± standard deviation."""
        summary = self.summary()
        head = ["class", "Dice", "Jaccard"]
        head += [f"{name} ({self.unit})" for name in ("95HD", "ASD", "ASSD")]
        head += [f"NSD@{self.tolerance:g} {self.unit}", "failed", "empty p/t/both"]
        lines = [head]
        entries = [*summary["per_class"].items(), ("mean", summary["mean"])]
        for name, entry in entries:
            line = [name, *(_plus_minus(entry[m]) for m in METRICS)]
            if name == "mean" and entry is summary["mean"]:
                entry = summary  # noqa: PLW2901
            empties = f"{entry['empty_predictions']}/{entry['empty_truths']}/{entry['empty_both']}"
            lines.append([*line, str(entry["failed"]), empties])
        text = _aligned(lines)
        text.append(f"{summary['cases']} cases; definition of distances: {self.definition}; mean ± sd")
        if summary["failed"]:
            text.append(
                "failed: empty on one side alone; Dice 0, no distance. With the image's diagonal for it, "
                + ", ".join(
                    f"95HD of {name} is {entry['hd95']['mean_with_diagonal']:.2f}"
                    for name, entry in summary["per_class"].items()
                    if entry["failed"]
                )
            )
        if "groups" in summary:
            text.append(f"per patient ({summary['groups']}), each the mean of its cases:")
            lines = [["class", *METRICS]]
            lines += [
                [n, *(_plus_minus(entry[m]) for m in METRICS)] for n, entry in summary["per_group"].items()
            ]
            text += _aligned(lines)
        return "\n".join([*text, *(f"note: {note}" for note in self.notes)])


def _means(rows: Sequence[Row], key: str) -> list[Row]:
    """For each value of `key` the means of its rows, values that are not numbers left out."""
    members: dict[str, list[Row]] = {}
    for row in rows:
        members.setdefault(row[key], []).append(row)
    result = []
    for name, those in members.items():
        mean = {metric: _mean([row[metric] for row in those]) for metric in METRICS}
        full = {f"{metric}_full": _mean([_filled(row, metric) for row in those]) for metric in DISTANCES}
        result.append({key: name, **mean, **full})
    return result


def _filled(row: Row, metric: str) -> float:
    """The value with the image's diagonal where a class is empty on one side alone."""
    if f"{metric}_full" in row:
        return float(row[f"{metric}_full"])
    return float(row["diagonal"] if math.isnan(row[metric]) else row[metric])


def _mean(values: Iterable[float]) -> float:
    kept = [value for value in values if not math.isnan(value)]
    return math.fsum(kept) / len(kept) if kept else math.nan


def _statistics(rows: Sequence[Row]) -> dict[str, dict[str, float | int | None]]:
    result: dict[str, dict[str, float | int | None]] = {}
    for metric in METRICS:
        values = [float(row[metric]) for row in rows if not math.isnan(row[metric])]
        result[metric] = {
            "mean": _mean(values) if values else None,
            "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
            "n": len(values),
        }
        if metric in DISTANCES:
            result[metric]["mean_with_diagonal"] = (
                _mean(_filled(row, metric) for row in rows) if rows else None
            )
    return result


def _empties(rows: Sequence[Row]) -> dict[str, int]:
    """How many (case, class) are empty in the prediction alone, in the truth alone, in both."""
    kinds = [row["empty"] for row in rows]
    return {
        "empty_predictions": kinds.count("prediction"),
        "empty_truths": kinds.count("truth"),
        "empty_both": kinds.count("both"),
        "failed": kinds.count("prediction") + kinds.count("truth"),
    }


def _csv(columns: Sequence[str], rows: Sequence[Row]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _plus_minus(entry: Mapping[str, float | None]) -> str:
    if entry["mean"] is None:
        return "-"
    sd = "" if entry["sd"] is None else f" ± {entry['sd']:.3f}"
    return f"{entry['mean']:.3f}{sd}"


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return ["  ".join(word.ljust(w) for word, w in zip(line, widths, strict=True)).rstrip() for line in lines]


# ---- files --------------------------------------------------------------------------------------


class LabelFile(NamedTuple):
    """A label file as it is: whole numbers [*S], mm per axis and affine (None where the file has none)."""

    labels: Any
    spacing: tuple[float, ...] | None
    affine: Any


class Pair(NamedTuple):
    """A case to evaluate: where its prediction and its truth are, and whose it is."""

    case: str
    prediction: Path
    truth: Path
    group: str = ""


def read_label_file(path: str | os.PathLike[str], label_map: Mapping[int, int] | None = None) -> LabelFile:
    """Return the labels of a NIfTI, HDF5 (key `label`) or picture file with its spacing and affine.

    Values and `label_map` are taken as `semisam.engine.cases.read_label` does. Raises ValueError with the
    reason for what cannot be read as labels.

    >>> import pathlib, tempfile
    >>> import nibabel, numpy as np
    >>> from semisam.engine.evaluation import read_label_file
    >>> place = pathlib.Path(tempfile.mkdtemp()) / "a.nii.gz"
    >>> nibabel.save(nibabel.Nifti1Image(np.eye(3)[None], np.diag([1, 2, 3, 1])), place)
    >>> read_label_file(place).labels.shape, read_label_file(place).spacing
    ((1, 3, 3), (1.0, 2.0, 3.0))
    """
    place = Path(path)
    kind = inference.kind_of(place)
    if not kind:
        raise ValueError(f"{place}: expected a label file of {', '.join(inference.SUFFIXES)}")
    case = Case(case_name(place), (place,), place, kind)
    labels = read_label(case, label_map)
    if kind == "h5":
        return LabelFile(labels, _h5_spacing(place, labels.ndim), None)
    header = read_header(case)
    return LabelFile(labels, header.spacing, header.affine)


def _h5_spacing(path: Path, dims: int) -> tuple[float, ...] | None:
    import h5py  # noqa: PLC0415

    with h5py.File(path, "r") as file:
        spacing = np.ravel(file.attrs.get("spacing", ()))
    return tuple(map(float, spacing)) if len(spacing) == dims else None


def match_folders(
    prediction: str | os.PathLike[str], truth: str | os.PathLike[str], *, only_predicted: bool = False
) -> tuple[list[Pair], list[str], list[str]]:
    """Return (pairs, problems, notes) of two folders (or two files) whose files are named by case ids.

    A truth without a prediction is a problem, with `only_predicted` a note; a prediction without a truth
    is a note, a problem if no prediction has one.

    >>> import pathlib, tempfile
    >>> from semisam.engine.evaluation import match_folders
    >>> root = pathlib.Path(tempfile.mkdtemp())
    >>> for name in ("pred/a.nii.gz", "truth/a.nii.gz", "truth/b.nii.gz"):
    ...     (root / name).parent.mkdir(exist_ok=True)
    ...     (root / name).touch()
    >>> pairs, problems, _ = match_folders(root / "pred", root / "truth")
    >>> [pair.case for pair in pairs], len(problems)
    (['a'], 1)
    """
    found, real = _label_files(Path(prediction)), _label_files(Path(truth))
    if Path(prediction).is_file() and Path(truth).is_file():
        case = next(iter(real))
        return [Pair(case, Path(prediction), Path(truth))], [], []
    problems: list[str] = []
    notes: list[str] = []
    missing = [case for case in real if case not in found]
    extra = [case for case in found if case not in real]
    pairs = [Pair(case, found[case], real[case]) for case in real if case in found]
    if not pairs:
        problems.append(
            f"no prediction has a truth: {prediction} has {_listed(list(found))}, {truth} has "
            f"{_listed(list(real))}; files are matched by their names without suffix"
        )
    elif missing and only_predicted:
        notes.append(f"{len(missing)} cases without a prediction were left out: {_listed(missing)}")
    else:
        problems += [f"{case}: no prediction in {prediction}" for case in missing]
    if extra and pairs:
        notes.append(f"{len(extra)} predictions without a truth were left out: {_listed(extra)}")
    return pairs, problems, notes


def _label_files(place: Path) -> dict[str, Path]:
    """{case id: file} of a folder; files in folders of their own (`<case>/mri_norm2.h5`) if it has none."""
    if place.is_file():
        return {case_name(place): place}
    if not place.is_dir():
        raise EvaluationError([f"{place}: no such file or folder"])
    shown = sorted(p for p in place.iterdir() if not p.name.startswith("."))
    files = [p for p in shown if p.is_file() and inference.kind_of(p)]
    if files:
        return {case_name(p): p for p in files}
    nested = [p / "mri_norm2.h5" for p in shown if p.is_dir()]
    return {p.parent.name: p for p in nested if p.is_file()}


def case_name(path: Path) -> str:
    """Return a file's name without the suffix of its format."""
    return stem_of(path, inference.SUFFIXES)


def _listed(words: Sequence[Any], most: int = 8) -> str:
    shown = ", ".join(map(str, words[:most])) or "none"
    return shown if len(words) <= most else f"{shown}, ... ({len(words)} in all)"


def class_names_of(truth: Path) -> dict[int, str] | None:
    """Return {label: name} of the dataset.json in `truth` or beside it; None where there is none."""
    import json  # noqa: PLC0415

    for folder in (truth, truth.parent):
        if (folder / "dataset.json").is_file():
            labels = json.loads((folder / "dataset.json").read_text(encoding="utf-8")).get("labels", {})
            pairs = [(k, v) if str(k).isdigit() else (v, k) for k, v in labels.items()]
            if all(str(label).isdigit() for label, _ in pairs):
                return {int(label): str(name) for label, name in pairs if 0 < int(label) < IGNORE} or None
    return None


def evaluate_folders(
    prediction: str | os.PathLike[str],
    truth: str | os.PathLike[str],
    *,
    classes: Mapping[int, str] | None = None,
    only_predicted: bool = False,
    **options: Any,
) -> Evaluation:
    """Return the evaluation of a folder of predictions against a folder of label files.

    Files are matched by name without suffix; both may be single files. `classes` are {label: name}
    (default: dataset.json in or beside `truth`, else the labels that the truths have).
    `only_predicted` leaves truths without a prediction out. `options` are those of `evaluate_pairs`.

    Raises EvaluationError with everything that is wrong at once: missing predictions, unreadable files,
    shapes and affines that differ, unexpected labels, spacings known for some cases only.

    >>> import pathlib, tempfile
    >>> import nibabel, numpy as np
    >>> from semisam.engine.evaluation import evaluate_folders
    >>> root = pathlib.Path(tempfile.mkdtemp())
    >>> for name, shift in (("pred", 1), ("truth", 0)):
    ...     (root / name).mkdir()
    ...     image = np.roll(np.pad(np.ones((4, 4, 4), np.uint8), 3), shift, 0)
    ...     nibabel.save(nibabel.Nifti1Image(image, np.diag([2, 1, 1, 1])), root / name / "a.nii.gz")
    >>> found = evaluate_folders(root / "pred", root / "truth", show=False)
    >>> found.rows[0]["dice"], found.rows[0]["hd95"], found.unit
    (0.75, 2.0, 'mm')
    """
    pairs, problems, notes = match_folders(prediction, truth, only_predicted=only_predicted)
    found = evaluate_pairs(
        pairs, classes=classes or class_names_of(Path(truth)), problems=problems, **options
    )
    found.notes[:0] = notes
    return found


def evaluate_pairs(
    pairs: Sequence[Pair],
    *,
    classes: Mapping[int, str] | None = None,
    largest_component: bool = False,
    definition: str = "pooled",
    tolerance: float = 1.0,
    spacing: Sequence[float] | None = None,
    unit: str = "auto",
    label_map: Mapping[int, int] | None = None,
    problems: Sequence[str] = (),
    show: bool = True,
) -> Evaluation:
    """Return the evaluation of pairs of files; nothing is computed before all of them have been checked.

    `largest_component` keeps each predicted class's largest component (26 neighbours) first. `spacing`
    (mm per axis) is used where a file has none; `unit="voxels"` ignores all spacings. `label_map`
    {value in the truth's file: class} is applied to truths. `problems` are known ones, to be reported with
    what is found. Raises EvaluationError as `evaluate_folders` does.

    >>> import pathlib, tempfile
    >>> import nibabel, numpy as np
    >>> from semisam.engine.evaluation import Pair, evaluate_pairs
    >>> place = pathlib.Path(tempfile.mkdtemp()) / "a.nii.gz"
    >>> nibabel.save(nibabel.Nifti1Image(np.pad(np.ones((4, 4, 4), np.uint8), 3), np.eye(4)), place)
    >>> evaluate_pairs([Pair("a", place, place)], show=False).rows[0]["dice"]
    1.0
    """
    if definition not in metrics._DEFINITIONS or unit not in ("auto", "mm", "voxels") or not tolerance >= 0:
        raise ValueError(
            "evaluate_pairs(): expected definition pooled, monai or deepmind, unit auto, mm or voxels and "
            f"tolerance >= 0, got {definition!r}, {unit!r}, {tolerance!r}"
        )
    read = _Reader(label_map, spacing)
    names, spacings = _check(pairs, read, classes, unit, list(problems), show)
    rows: list[Row] = []
    for pair in progress(pairs, label="metrics", show=show):
        prediction, truth = read(pair.prediction), read(pair.truth, truth=True)
        label = prediction.labels
        if largest_component:
            label = inference.keep_largest(label, max(names) + 1)
        rows += case_rows(
            pair.case,
            label,
            truth.labels,
            names,
            spacing=spacings[pair.case],
            group=pair.group,
            definition=definition,
            tolerance=tolerance,
        )
    measured = "mm" if any(s is not None for s in spacings.values()) else "voxels"
    notes = ["predictions: largest component of each class"] if largest_component else []
    return Evaluation(rows, measured, definition, tolerance, notes)


class _Reader:
    """Reads label files; truths with the label map and the spacing that the user gave."""

    def __init__(self, label_map: Mapping[int, int] | None, spacing: Sequence[float] | None) -> None:
        self.label_map = label_map
        self.spacing = spacing

    def __call__(self, path: Path, truth: bool = False) -> LabelFile:
        if not truth:
            return read_label_file(path)
        file = read_label_file(path, self.label_map)
        if file.spacing is not None or self.spacing is None:
            return file
        if len(self.spacing) != file.labels.ndim:
            raise ValueError(f"expected a spacing of {file.labels.ndim} numbers, got {list(self.spacing)}")
        return file._replace(spacing=tuple(float(s) for s in self.spacing))


def _check(
    pairs: Sequence[Pair],
    read: Callable[..., LabelFile],
    classes: Mapping[int, str] | None,
    unit: str,
    problems: list[str],
    show: bool,
) -> tuple[dict[int, str], dict[str, tuple[float, ...] | None]]:
    """Return the classes and the spacing of every case, or raise with all that is wrong."""
    spacings: dict[str, tuple[float, ...] | None] = {}
    seen: set[int] = set()
    predicted: dict[str, set[int]] = {}
    for pair in progress(pairs, label="check", show=show and bool(pairs)):
        try:
            prediction, truth = read(pair.prediction), read(pair.truth, truth=True)
        except ValueError as error:
            problems.append(inference.reason_of(pair.case, str(error)))
            continue
        if prediction.labels.shape != truth.labels.shape:
            problems.append(
                f"{pair.case}: the prediction's shape {prediction.labels.shape} is not the truth's "
                f"{truth.labels.shape}"
            )
        elif prediction.affine is not None and truth.affine is not None:
            apart = float(np.abs(prediction.affine - truth.affine).max())
            if not apart < 1e-3:
                problems.append(f"{pair.case}: the prediction's affine is not the truth's (by {apart:g} mm)")
        spacings[pair.case] = None if unit == "voxels" else truth.spacing
        labels = set(np.unique(truth.labels).tolist()) - {0, IGNORE}
        if classes is not None and labels - set(classes):
            problems.append(
                f"{pair.case}: the truth has the unexpected labels {_listed(sorted(labels - set(classes)))}"
            )
        seen |= labels
        predicted[pair.case] = set(np.unique(prediction.labels).tolist()) - {0}
    known = dict(classes) if classes is not None else {label: str(label) for label in sorted(seen)}
    for case, labels in predicted.items():
        if labels - set(known):
            problems.append(
                f"{case}: the prediction has the unexpected labels {_listed(sorted(labels - set(known)))}; "
                f"expected {_listed(sorted(known))}"
            )
    without = [case for case, s in spacings.items() if s is None]
    if unit != "voxels" and without and (unit == "mm" or len(without) < len(spacings)):
        problems.append(
            f"spacing is unknown for {_listed(without)}: give it, or measure all cases in voxels; mm and "
            "voxels are not mixed"
        )
    if not pairs and not problems:
        problems.append("no cases")
    if not known and not problems:
        problems.append("no truth has a label other than 0: name the classes")
    if problems:
        raise EvaluationError(problems)
    return known, spacings


# ---- runs ---------------------------------------------------------------------------------------


def evaluate_run(
    loaded: Any, role: str = "test", network: str = "student", **options: Any
) -> dict[Path, Evaluation]:
    """Measure the predictions of a run's role twice; returns both evaluations by the folder they are in.

    RUN/role/checkpoint-network has metrics.csv and summary.json of the predictions in its folder
    `predictions`, as they are; a folder of that name with "-largest-component" has those of each class's
    largest component alone. `options` are those of `evaluate_pairs`. Classes and label map are the run's.

    Raises EvaluationError as `evaluate_pairs` does, and CaseError as `semisam.engine.inference.role_cases`.

    >>> import pathlib, tempfile
    >>> import torch
    >>> from semisam.engine.checkpoint import Loaded
    >>> from semisam.engine.config import Config, DataConfig
    >>> from semisam.engine.evaluation import evaluate_run
    >>> from semisam.engine.files import write_json
    >>> from semisam.engine.inference import predict_split
    >>> from semisam.engine.phantom import write_phantoms
    >>> root = write_phantoms(tempfile.mkdtemp(), labeled=1, unlabeled=1, test=1, shape=(16, 16, 16))
    >>> run = pathlib.Path(tempfile.mkdtemp())
    >>> name = sorted(p.name for p in (root / "labelsTs").iterdir())[0].removesuffix(".nii.gz")
    >>> write_json(run / "run.json", {"split": {"test": [name]}})
    >>> names = ["background", "organ"]
    >>> meta = {"channels": 1, "num_classes": 2, "spatial_dims": 3, "class_names": names}
    >>> config = Config(data=DataConfig(root=str(root)))
    >>> loaded = Loaded(torch.nn.Conv3d(1, 2, 1), config, meta, 0, "last", run)
    >>> _ = predict_split(loaded, "test")
    >>> [folder.name for folder in evaluate_run(loaded, "test", show=False)]
    ['last-student', 'last-student-largest-component']
    """
    place = inference.split_folder(loaded, role, network)
    problems: list[str] = []
    pairs = []
    for case in inference.role_cases(loaded, role):
        path = place / "predictions" / f"{case.id}{inference.ENDINGS[case.kind]}"
        if case.label is None:
            problems.append(f"{case.id}: has no label")
        elif not path.is_file():
            problems.append(f"{case.id}: no prediction {path}")
        else:
            pairs.append(Pair(case.id, path, case.label, case.group))
    names = {i: str(name) for i, name in enumerate(loaded.meta["class_names"]) if i}
    options = {"classes": names, "label_map": loaded.config.data.label_map, "problems": problems} | options
    folders = {}
    for largest in (False, True):
        found = evaluate_pairs(pairs, largest_component=largest, **options)
        folder = place.with_name(place.name + LARGEST) if largest else place
        folders[found.write(folder)] = found
    return folders
