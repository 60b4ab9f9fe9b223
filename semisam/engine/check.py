# SPDX-License-Identifier: Apache-2.0
"""Look at every case of a folder and list all that is broken, missing or does not fit together."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from semisam.engine.cases import CaseSet, Split, scan_folder
from semisam.engine.scans import (
    IGNORE,
    LOSSY,
    PICTURES,
    Case,
    CaseError,
    Header,
    Problem,
    cannot_read,
    read_header,
    read_image,
    read_label,
    read_label_header,
    suffix_of,
    times,
)

__all__ = ["Problem", "Report", "check_cases", "check_folder"]

SEVERITIES = ("error", "warning", "note")


@dataclass
class Report:
    """What `check_folder` found: the cases (None if there is no layout) and all problems."""

    found: CaseSet | None
    problems: list[Problem]
    values: dict[int, int] = field(default_factory=dict)  # label value -> in how many cases

    def count(self, severity: str) -> int:
        """How many problems have this severity."""
        return sum(problem.severity == severity for problem in self.problems)


def check_cases(
    root: str | Path,
    layout: str = "auto",
    *,
    split: Split | None = None,
    quick: bool = False,
    label_map: Mapping[int, int] | None = None,
) -> list[Problem]:
    """Return every problem of a folder's cases, errors first; an empty list or notes alone mean: go on.

    `quick` reads headers only (shapes, geometry, missing files), else every voxel is read. With `split`
    only its cases are read, and no label of an unlabeled one is opened. `label_map` as in `read_label`.
    Kinds: layout, dataset, unreadable, missing-file, missing-image, missing-label, missing-key,
    duplicate, shape, geometry, dimensions, channels, non-finite, constant, labels, float-labels, mixed-masks,
    patient (all errors or warnings), empty, unlabeled (notes).

    >>> import tempfile
    >>> from semisam.engine.check import check_cases
    >>> from semisam.engine.phantom import write_phantoms
    >>> root = write_phantoms(tempfile.mkdtemp(), labeled=1, unlabeled=1, test=0, shape=(16, 16, 16))
    >>> [str(problem) for problem in check_cases(root)]
    ['phantom_001: unlabeled: no label file']
    """
    return check_folder(root, layout, split=split, quick=quick, label_map=label_map).problems


def check_folder(
    root: str | Path,
    layout: str = "auto",
    *,
    split: Split | None = None,
    quick: bool = False,
    label_map: Mapping[int, int] | None = None,
) -> Report:
    """Return the problems of `check_cases` together with the cases that were looked at.

    >>> from semisam.engine.check import check_folder
    >>> check_folder("no/such/folder").problems[0].kind
    'layout'
    """
    try:
        found, problems = scan_folder(root, layout)
    except CaseError as error:
        return Report(None, [Problem(str(root), "layout", "error", str(error))])
    report = Report(found, problems)
    if split is None:
        cases = [*found.cases, *found.validation, *found.test]
    else:
        cases = [*split.labeled, *split.unlabeled, *split.validation, *split.test]
    seen: dict[int, list[str]] = defaultdict(list)
    for case in cases:
        problems += _check_case(case, found, quick, label_map, seen)
    report.values = {value: len(seen[value]) for value in sorted(seen)}
    problems += _values(found, label_map, seen)
    if not quick:
        problems += _mixed_masks([case for case in cases if case.labeled], label_map)
    problems += _patients(found, split)
    order = {severity: i for i, severity in enumerate(SEVERITIES)}
    problems.sort(key=lambda problem: order[problem.severity])
    return report


def _check_case(
    case: Case,
    found: CaseSet,
    quick: bool,
    label_map: Mapping[int, int] | None,
    seen: dict[int, list[str]],
) -> list[Problem]:
    problems: list[Problem] = []
    head = _attempt(problems, case, read_header, case)
    if head is not None:
        problems += _check_header(case, found, head)
    if not quick and head is not None and not problems:
        volume = _attempt(problems, case, read_image, case)
        for i, channel in enumerate(() if volume is None else volume.array):
            if channel.min() == channel.max():
                part = f"channel {i}" if len(volume.array) > 1 else "image"
                message = f"the {part} is {channel.flat[0]:g} everywhere"
                problems.append(Problem(case.id, "constant", "warning", message))
    if not case.labeled:
        message = "no label file" if case.kind != "h5" else "no key 'label'"
        return [*problems, Problem(case.id, "unlabeled", "note", message)]
    label_head = _attempt(problems, case, read_label_header, case)
    if label_head is not None and head is not None:
        problems += _geometry(case, head, label_head)
    if not quick and label_head is not None:
        label = _attempt(problems, case, read_label, case, label_map)
        if label is not None:
            values = np.unique(label).tolist()
            problems += _check_values(case, values, found.label_names if not label_map else {})
            for value in values:
                seen[value].append(case.id)
    return problems


def _attempt(problems: list[Problem], case: Case, what: Any, *arguments: Any) -> Any:
    """What a function returns, or None with its complaint among the problems."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return what(*arguments)
    except CaseError as error:
        problems += [problem for problem in error.problems if problem not in problems]
    except Exception as error:
        problems += cannot_read(case.id, case.images[0], error).problems
    return None


def _check_header(case: Case, found: CaseSet, head: Header) -> list[Problem]:
    problems = []
    slices = case.kind == "h5" and len(head.shape) == 3 and found.spatial_dims == 2
    if len(head.shape) != found.spatial_dims and not (slices and case not in found.cases):
        message = f"{len(head.shape)}-D, but the first case is {found.spatial_dims}-D"
        problems.append(Problem(case.id, "dimensions", "error", message))
    channels = head.channels if len(case.images) == 1 else len(case.images)
    grey_among_colours = case.kind == "image" and head.channels == 1 and len(case.images) == 1
    if channels != case.channels and not grey_among_colours:
        message = f"{channels} channel(s), expected {case.channels}"
        problems.append(Problem(case.id, "channels", "error", message))
    if min(head.shape, default=0) < 1:
        problems.append(Problem(case.id, "shape", "error", f"an empty image: {times(head.shape)}"))
    return problems


def _check_values(case: Case, values: list[int], names: Mapping[int, str]) -> list[Problem]:
    problems = []
    unexpected = sorted(set(values) - set(names) - {IGNORE})
    if names and unexpected:
        message = f"label values {_some(unexpected)}, but dataset.json names {_some(list(names))}"
        problems.append(Problem(case.id, "labels", "error", message))
    if not set(values) - {0, IGNORE}:
        problems.append(Problem(case.id, "empty", "note", "the label has no foreground"))
    return problems


def _geometry(case: Case, head: Header, label: Header) -> list[Problem]:
    if head.shape != label.shape:
        message = f"image is {times(head.shape)}, label {times(label.shape)}"
        return [Problem(case.id, "shape", "error", message)]
    if head.affine is None or label.affine is None:
        return []
    # The farthest that any corner lies from where the other file puts it, in voxels.
    ends = [(0, n - 1) for n in (*head.shape, *[1] * (3 - len(head.shape)))]
    corners = np.stack([*np.meshgrid(*ends, indexing="ij"), np.ones((2, 2, 2))]).reshape(4, -1)
    apart = np.linalg.norm(((head.affine - label.affine) @ corners)[:3], axis=0).max()
    apart /= max(min(np.linalg.norm(head.affine[:3, :3], axis=0)), 1e-9)
    if not apart > 0.01:
        return []
    message = f"image and label lie {apart:.3g} voxels apart in space (different affine)"
    if head.spacing and label.spacing and not np.allclose(head.spacing, label.spacing, rtol=1e-3):
        message = f"image spacing {_numbers(head.spacing)} mm, label {_numbers(label.spacing)} mm"
    return [Problem(case.id, "geometry", "error" if apart > 0.5 else "warning", message)]


def _numbers(values: Iterable[float]) -> str:
    return " x ".join(f"{value:.4g}" for value in values)


def _some(values: list[Any]) -> str:
    return ", ".join(map(str, values[:6])) + (f", ... ({len(values)} in all)" if len(values) > 6 else "")


def _values(
    found: CaseSet, label_map: Mapping[int, int] | None, seen: Mapping[int, list[str]]
) -> list[Problem]:
    """Label values of the whole folder must be 0, 1, 2, ..."""
    names = found.label_names if not label_map else {}
    values = sorted({0, *(names or seen)} - {IGNORE})
    if not (seen or names) or values == list(range(len(values))):
        return []
    who = "dataset.json names" if names else "the labels hold"
    example = {value: i for i, value in enumerate(values)}
    message = f"{who} the values {_some(values)}, which are not 0, 1, 2, ...: set label_map, e.g. "
    message += str(example) if len(example) <= 12 else "{0: 0, 255: 1}; a soft mask must be thresholded"
    rare = min((v for v in values if v in seen and v), key=lambda v: len(seen[v]), default=None)
    if not names and rare is not None:
        message += f"; {rare} is in {len(seen[rare])} case(s): {_some(seen[rare])}"
    return [Problem("all labels", "labels", "error", message)]


def _mixed_masks(cases: Iterable[Case], label_map: Mapping[int, int] | None) -> list[Problem]:
    """Masks that hold 0 and 255 alone are read as 0 and 1; beside masks of class numbers that is a trap."""
    from PIL import Image  # noqa: PLC0415

    binary, numbers = [], []
    for case in cases if not label_map else ():
        path = case.label
        if path is None or not suffix_of(path, PICTURES) or suffix_of(path, LOSSY):
            continue
        try:
            with Image.open(path) as picture:
                values = set(np.unique(np.asarray(picture)).tolist()) if picture.mode == "L" else set()
        except OSError:
            continue
        if IGNORE in values and values <= {0, IGNORE}:
            binary.append(case.id)
        elif values & set(range(1, IGNORE)):
            numbers.append(case.id)
    if not (binary and numbers):
        return []
    message = (
        f"{len(binary)} mask(s) hold 0 and 255 alone and would be read as 0 and 1 ({_some(binary)}), "
        f"{len(numbers)} hold class numbers ({_some(numbers)}): set label_map, or save them alike"
    )
    return [Problem("all masks", "mixed-masks", "error", message)]


def _patients(found: CaseSet, split: Split | None) -> list[Problem]:
    """One patient's scans in training and in what it is judged by."""
    if split is None:
        training, roles = found.cases, {"validation": found.validation, "test": found.test}
    else:
        training = [*split.labeled, *split.unlabeled]
        roles = {"validation": split.validation, "test": split.test}
    groups = {case.group for case in training if case.group}
    return [
        Problem(case.id, "patient", "warning", f"{role} case of {case.group}, who is in training too")
        for role, cases in roles.items()
        for case in cases
        if case.group in groups
    ]
