# SPDX-License-Identifier: Apache-2.0
"""The report's pictures of scans: best, median and worst test case, and what the generalist taught."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from semisam.engine import pictures
from semisam.engine.pictures import CLASS_COLOURS, Click, Contour
from semisam.engine.results import RunRecord, compare, draw_text

__all__ = ["samples", "test_cases"]

SAMPLE_ROWS = 6


# ---- test cases -------------------------------------------------------------------------------------


def test_cases(focus: RunRecord, baseline: RunRecord | None) -> dict[str, Any]:
    """Return best, median and worst case of the focus run as slices, or in "why" why there are none.

    `baseline` is a run on the same draw whose predictions stand beside them.

    >>> from pathlib import Path
    >>> from semisam.engine import gallery
    >>> from semisam.engine.results import RunRecord
    >>> gallery.test_cases(RunRecord(Path("run")), None)["why"]
    'The run was not tested, so there are no cases to show.'
    """
    if not focus.scores:
        return {"rows": [], "why": "The run was not tested, so there are no cases to show."}
    if not focus.predictions:
        return {"rows": [], "why": "The predicted label maps were not kept beside the figures."}
    means = focus.scores.case_means("dice")
    order = sorted(means, key=lambda case: (-means[case], case))
    chosen = {"best": order[0], "median": order[len(order) // 2], "worst": order[-1]}
    chosen = {rank: case for i, (rank, case) in enumerate(chosen.items()) if case not in order[:1] or i == 0}
    rows = []
    problems = []
    for rank, case in chosen.items():
        try:
            rows.append(_case_row(rank, case, means[case], focus, baseline))
        except (OSError, ValueError, LookupError) as error:
            problems.append(f"{case}: {error}")
    return {
        "rows": rows,
        "why": f"The scans could not be shown: {problems[0]}" if problems else "",
        "run": compare([focus]).methods[0].title + f", {draw_text(focus.draw)}",
        "classes": _class_legend(focus),
    }


def _class_legend(run: RunRecord) -> list[tuple[str, str]]:
    names = list(run.meta.get("class_names", []))[1:] or (run.scores.classes if run.scores else [])
    return [(name, CLASS_COLOURS[i % len(CLASS_COLOURS)]) for i, name in enumerate(names)]


def _case_row(
    rank: str, case: str, dice: float, focus: RunRecord, baseline: RunRecord | None
) -> dict[str, Any]:
    image, spacing, truth = _read_case(focus, case)
    prediction = _read_map(focus.predictions, case, truth.shape)
    axis = pictures.slice_axis(truth.shape, spacing) if truth.ndim == 3 else None
    index = _fullest(np.isin(truth, (0, 255), invert=True), axis)
    aspect = _aspect(spacing, axis, truth.ndim)

    def at(array: Any) -> Any:
        return pictures.take_slice(array, axis, index)

    shown = np.moveaxis(image, 0, -1)[..., :3] if axis is None and image.shape[0] == 3 else at(image[0])
    if shown.ndim == 3:
        shown = (shown - shown.min()) / max(float(shown.max() - shown.min()), 1e-6)
    outline = _outlines(at(truth))
    where = f"{rank} case {case}"
    panels = [
        _figure("image", pictures.panel(shown, alt=f"{where}: the scan", aspect=aspect)),
        _figure(
            "truth", pictures.panel(shown, alt=f"{where}: true outline", contours=outline, aspect=aspect)
        ),
        _figure(
            f"{compare([focus]).methods[0].title}, Dice {dice:.3f}",
            pictures.panel(
                shown,
                alt=f"{where}: outline predicted by {compare([focus]).methods[0].title}, Dice {dice:.3f}",
                contours=_outlines(at(prediction)),
                aspect=aspect,
            ),
        ),
    ]
    if baseline and baseline.predictions and baseline.scores:
        other = baseline.scores.case_means("dice").get(case, float("nan"))
        name = compare([baseline]).methods[0].title
        try:
            label = _read_map(baseline.predictions, case, truth.shape)
        except (OSError, ValueError):
            label = None
        if label is not None:
            panels.append(
                _figure(
                    f"{name}, Dice {other:.3f}",
                    pictures.panel(
                        shown,
                        alt=f"{where}: outline predicted by {name}, Dice {other:.3f}",
                        contours=_outlines(at(label)),
                        aspect=aspect,
                    ),
                )
            )
    uncertainty = _uncertainty(focus, case, truth.shape)
    if uncertainty is not None:
        panels.append(
            _figure(
                "uncertainty",
                pictures.panel(
                    at(uncertainty),
                    alt=f"{where}: uncertainty, with the true outline",
                    heat=True,
                    window=(0.0, 1.0),
                    contours=[Contour(c.mask, "#ffffff", dashed=True, width=1.1) for c in outline],
                    aspect=aspect,
                ),
            )
        )
    place = f"slice {index} of axis {axis}" if axis is not None else ""
    return {"rank": rank, "case": case, "place": place, "panels": panels}


def _figure(caption: str, svg: str) -> dict[str, str]:
    return {"caption": caption, "svg": svg}


def _outlines(label: Any) -> list[Contour]:
    values = [v for v in np.unique(label) if v not in (0, 255)]
    return [Contour(label == v, CLASS_COLOURS[(int(v) - 1) % len(CLASS_COLOURS)]) for v in values]


def _fullest(mask: Any, axis: int | None) -> int | None:
    if axis is None:
        return None
    counts = mask.sum(axis=tuple(i for i in range(mask.ndim) if i != axis))
    return int(np.argmax(counts)) if counts.any() else mask.shape[axis] // 2


def _aspect(spacing: Sequence[float] | None, axis: int | None, ndim: int) -> float:
    """Height over width of a voxel in `pictures.take_slice`."""
    if spacing is None:
        return 1.0
    if axis is None:
        return float(spacing[0] / spacing[1])
    across, up = (spacing[i] for i in range(ndim) if i != axis)
    return float(up / across)


def _read_case(run: RunRecord, case: str) -> tuple[Any, Any, Any]:
    """(image [channels, *S], spacing, label [*S]) of a test case of a run."""
    from semisam.engine import cases  # noqa: PLC0415

    root = run.setting("data.root", "")
    if not root or not Path(root).is_dir():
        raise ValueError(f"the data folder {root or '(not named in config.yaml)'} is not there")
    found = cases.find_cases(root, layout=run.setting("data.layout", "auto"))
    for one in (*found.test, *found.validation, *found.cases):
        if one.id == case:
            volume = cases.read_image(one)
            label = cases.read_label(one, run.setting("data.label_map"))
            return volume.array, volume.spacing, label
    raise ValueError(f"no such case in {root}")


def _read_map(folder: Path | None, case: str, shape: tuple[int, ...], key: str = "label") -> Any:
    """A label or probability map of one case as an array of that shape."""
    if folder is None:
        raise ValueError("no folder of predictions")
    for suffix in (".nii.gz", ".nii", ".png", ".h5"):
        path = folder / f"{case}{suffix}"
        if path.is_file():
            array = _read_array(path, key)
            if array.shape != shape:
                raise ValueError(f"{path.name}: expected shape {shape}, got {array.shape}")
            return array
    raise ValueError(f"no map of it in {folder}")


def _read_array(path: Path, key: str) -> Any:
    """A map of any kind; whatever a damaged file makes a library raise becomes a ValueError."""
    try:
        if path.suffix == ".h5":
            import h5py  # noqa: PLC0415

            with h5py.File(path) as file:
                return file[key][()]
        if path.suffix == ".png":
            from PIL import Image  # noqa: PLC0415

            with Image.open(path) as image:
                return np.asarray(image)
        import nibabel  # noqa: PLC0415

        volume: Any = nibabel.load(path)
        return np.asarray(volume.dataobj)
    except Exception as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error


def _uncertainty(run: RunRecord, case: str, shape: tuple[int, ...]) -> Any:
    """The uncertainty map beside a predicted label map (in its h5 file), 0..1, or None."""
    if run.predictions is None:
        return None
    beside = (
        run.predictions if (run.predictions / f"{case}.h5").is_file() else run.predictions / "uncertainty"
    )
    try:
        found = _read_map(beside, case, shape, "uncertainty")
    except ValueError:
        return None
    return found.astype(np.float32) / 255 if found.dtype == np.uint8 else found


# ---- what the generalist taught -----------------------------------------------------------------------


def samples(focus: RunRecord) -> dict[str, Any]:
    """Return rows of pictures of what the term saw and answered, from the first step to the last.

    >>> from pathlib import Path
    >>> from semisam.engine import gallery
    >>> from semisam.engine.results import RunRecord
    >>> gallery.samples(RunRecord(Path("run")))["why"]
    "This method has no generalist's term, or the run kept no samples of it."
    """
    files = focus.samples
    if len(files) > SAMPLE_ROWS:
        files = [files[i] for i in np.linspace(0, len(files) - 1, SAMPLE_ROWS).round().astype(int)]
    rows = []
    problems = []
    for path in files:
        try:
            rows.append(_sample_row(path))
        except (OSError, ValueError, LookupError, zipfile.BadZipFile) as error:
            problems.append(f"{path.name}: {error}")
    why = "This method has no generalist's term, or the run kept no samples of it." if not files else ""
    if problems:
        why = "Some samples could not be shown: " + "; ".join(problems)
    clicked = any(row["clicked"] for row in rows)
    return {"rows": rows, "why": why, "clicked": clicked, "classes": _class_legend(focus)}


def _sample_row(path: Path) -> dict[str, Any]:
    step = int(path.stem.split("_")[1])
    with np.load(path, allow_pickle=False) as file:
        sample = {name: file[name] for name in file.files}
    image = np.asarray(sample["image"], np.float32)
    space = np.asarray(sample["weight"]).shape
    image = image.reshape(-1, *space)[0]
    target, prediction = (_labels(sample[name], space) for name in ("target", "prediction"))
    axis = pictures.slice_axis(space) if len(space) == 3 else None
    clicks, signs = _clicks(sample, len(space))
    inside = np.isin(target, (0, 255), invert=True)
    index = _fullest(inside if inside.any() else prediction > 0, axis)

    def at(array: Any) -> Any:
        return pictures.take_slice(array, axis, index)

    marks = [_mark(click, bool(sign), axis, index, space) for click, sign in zip(clicks, signs, strict=True)]
    marks = [mark for mark in marks if mark.away <= 6]
    base = at(image)
    where = f"step {step}"
    clicked = len(clicks) > 0  # a generalist that was asked with a mask or a box has none
    positive = sum(mark.positive for mark in marks)
    shown = f", {positive} positive and {len(marks) - positive} negative clicks" if clicked else ""
    panels = [
        _figure(
            "specialist and clicks" if clicked else "specialist",
            pictures.panel(
                base,
                alt=f"{where}: patch with the specialist's outline{shown}",
                contours=_outlines(at(prediction)),
                clicks=marks,
            ),
        ),
        _figure(
            "pseudo-label",
            pictures.panel(base, alt=f"{where}: outline of the pseudo-label", contours=_outlines(at(target))),
        ),
        _figure(
            "uncertainty",
            pictures.panel(
                at(sample["uncertainty"]), alt=f"{where}: uncertainty", heat=True, window=(0.0, 1.0)
            ),
        ),
        _figure(
            "weight",
            pictures.panel(at(sample["weight"]), alt=f"{where}: weight", heat=True, window=(0.0, 1.0)),
        ),
    ]
    return {"step": step, "panels": panels, "clicked": clicked}


def _labels(probability: Any, space: tuple[int, ...]) -> Any:
    """Labels [*S] of class probabilities [C, *S]; labels stay as they are."""
    array = np.asarray(probability)
    return array.argmax(0) if array.ndim == len(space) + 1 else array


def _clicks(sample: dict[str, Any], ndim: int) -> tuple[Any, Any]:
    """Coordinates [n, ndim] and signs [n] of the clicks that were made (label -1: none)."""
    table = np.asarray(sample.get("clicks", np.zeros((0, ndim + 1)))).reshape(-1, ndim + 1)
    table = table[table[:, -1] >= 0]
    return table[:, :ndim], table[:, ndim] == 1


def _mark(click: Any, positive: bool, axis: int | None, index: int | None, space: tuple[int, ...]) -> Click:
    """Where a click lies in `pictures.take_slice` of the volume."""
    if axis is None or index is None:
        return Click(float(click[0]), float(click[1]), positive)
    across, up = (i for i in range(3) if i != axis)
    away = abs(float(click[axis]) - index)
    return Click(space[up] - 1 - float(click[up]), float(click[across]), positive, away)
