# SPDX-License-Identifier: Apache-2.0
"""Copy a folder of cases into another layout, all of it or nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from semisam.engine.cases import LAYOUTS, Case, CaseSet, find_cases
from semisam.engine.files import write_json, write_text
from semisam.engine.scans import (
    CaseError,
    Volume,
    read_image,
    read_label,
    write_h5,
    write_label,
    write_map,
)

__all__ = ["convert"]


def convert(
    source: str | Path,
    target: str | Path,
    to: str,
    *,
    layout: str = "auto",
    spacing: Sequence[float] | None = None,
) -> list[str]:
    """Copy a data folder into layout `to` ("nnunet", "h5", "images"); return notes on what it could not keep.

    Values are those of the source; h5 files of 3-D scans hold `image` float32 and `label` uint8 at
    `data/<id>/mri_norm2.h5`, not normalised. `spacing` (mm per axis) is needed where NIfTI is written and the
    source does not say it. Test cases become imagesTs or test.list, unlabeled ones imagesUn or files
    without a label. The folder appears when it is complete.

    Raises CaseError for broken sources and for what the layout cannot hold: several channels or 3-D in h5 or
    pictures, 2-D slices of h5 as NIfTI, values that are not of 8 bits in pictures, test cases of
    `images`; FileExistsError if `target` is there.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from semisam.engine.convert import convert
    >>> from semisam.engine.phantom import write_phantoms
    >>> place = Path(tempfile.mkdtemp())
    >>> root = write_phantoms(place / "nifti", labeled=1, unlabeled=1, test=1, shape=(16, 16, 16))
    >>> convert(root, place / "h5", "h5")
    []
    >>> sorted(path.name for path in (place / "h5").iterdir())
    ['data', 'test.list', 'train.list']
    """
    if to not in LAYOUTS:
        raise CaseError(f"to: expected {', '.join(LAYOUTS)}, got {to!r}")
    found = find_cases(source, layout)
    if found.layout == to:
        raise CaseError(f"{source} has layout {to} already")
    place = Path(target)
    if place.exists():
        raise FileExistsError(f"{place} exists: give a folder that does not, or remove it")
    _refuse(found, to, spacing)
    place.parent.mkdir(parents=True, exist_ok=True)
    unfinished = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        unfinished.mkdir()
        notes = {"h5": _to_h5, "images": _to_images, "nnunet": _to_nnunet}[to](found, unfinished, spacing)
        os.rename(unfinished, place)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return notes


def _refuse(found: CaseSet, to: str, spacing: Sequence[float] | None) -> None:
    pictures = all(case.kind == "image" for case in found.cases)
    if to == "h5" and found.channels != 1:
        raise CaseError(f"layout h5 holds one channel, {found.root} has {found.channels}")
    if to == "images" and found.spatial_dims != 2:
        raise CaseError(f"layout images holds 2-D pictures, {found.root} is {found.spatial_dims}-D")
    if to == "images" and (found.test or found.validation):
        raise CaseError("layout images has no list of test or validation cases, so they would be trained on")
    if to == "images" and any(len(case.images) > 1 for case in found.cases):
        raise CaseError("layout images holds one file per case, not one per channel")
    if to == "nnunet" and not pictures and found.spatial_dims == 2:
        raise CaseError(
            "2-D slices in h5 files are not NIfTI volumes: convert the volumes they were cut from"
        )
    if spacing is not None and (len(spacing) != found.spatial_dims or not all(s > 0 for s in spacing)):
        raise CaseError(f"spacing: expected {found.spatial_dims} numbers > 0, got {list(spacing)}")


def _to_h5(found: CaseSet, out: Path, _: Any) -> list[str]:
    for case in (*found.cases, *found.validation, *found.test):
        volume = read_image(case)
        arrays = {"image": volume.array[0]}
        if case.labeled:
            arrays["label"] = _label(case, volume)
        flat = volume.array.ndim == 3
        path = out / "data" / ("slices" if flat else case.id) / (f"{case.id}.h5" if flat else "mri_norm2.h5")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_h5(path, arrays, volume)
    train = "train_slices.list" if found.spatial_dims == 2 else "train.list"
    for name, cases in ((train, found.cases), ("val.list", found.validation), ("test.list", found.test)):
        if cases or name == train:
            write_text(out / name, "".join(f"{case.id}\n" for case in cases))
    return []


def _to_images(found: CaseSet, out: Path, _: Any) -> list[str]:
    for folder in ("images", "masks"):
        (out / folder).mkdir()
    for case in found.cases:
        volume = read_image(case)
        _write_picture(out / "images" / f"{case.id}.png", volume, case)
        if case.labeled:
            write_label(out / "masks" / f"{case.id}.png", _label(case, volume), volume)
    names = found.class_names
    if names:
        write_json(out / "dataset.json", {"labels": {name: i for i, name in enumerate(names)}})
    return []


def _to_nnunet(found: CaseSet, out: Path, spacing: Sequence[float] | None) -> list[str]:
    highest = 0
    ending = ".png" if found.spatial_dims == 2 else ".nii.gz"
    (out / "imagesTr").mkdir()
    for case in (*found.cases, *found.validation, *found.test):
        volume = read_image(case)
        if ending == ".nii.gz":
            volume = _placed(volume, case, spacing)
        part = "Ts" if case in found.test else "Tr" if case.labeled else "Un"
        image = out / f"images{part}" / f"{case.id}_0000{ending}"
        image.parent.mkdir(exist_ok=True)
        if ending == ".png":
            _write_picture(image, volume, case)
        else:
            write_map(image, volume.array[0], volume)
        if case.labeled:
            label = _label(case, volume)
            highest = max(highest, int(label[label < 255].max(initial=0)))
            place = out / f"labels{part}" / f"{case.id}{ending}"
            place.parent.mkdir(exist_ok=True)
            if ending == ".png":
                _save_grey(place, label)
            else:
                write_label(place, label, volume)
    default = ("background", "foreground") if highest == 1 else ()
    names = found.class_names or default or ("background", *(f"class {i}" for i in range(1, highest + 1)))
    about = {
        "channel_names": {str(i): name for i, name in enumerate("RGB" if found.channels == 3 else ["image"])},
        "labels": {name: i for i, name in enumerate(names)},
        "numTraining": sum(case.labeled for case in (*found.cases, *found.validation)),
        "file_ending": ending,
    }
    write_json(out / "dataset.json", about)
    if not found.validation:
        return []
    held = ", ".join(case.id for case in found.validation)
    return [f"layout nnunet has no list of validation cases; they lie in imagesTr: name them again: {held}"]


def _label(case: Case, volume: Volume) -> Any:
    label = read_label(case)
    if label.shape != volume.array.shape[1:]:
        raise CaseError(f"{case.id}: image {volume.array.shape[1:]}, label {label.shape}")
    return label


def _placed(volume: Volume, case: Case, spacing: Sequence[float] | None) -> Volume:
    """The volume with the spacing that NIfTI must state."""
    if volume.spacing is None and spacing is None:
        raise CaseError(f"{case.id}: the file does not say its spacing, and NIfTI must: give spacing (mm)")
    return volume if volume.spacing else volume._replace(spacing=tuple(map(float, spacing or ())))


def _write_picture(path: Path, volume: Volume, case: Case) -> None:
    from PIL import Image  # noqa: PLC0415

    scaled = volume.array * 255
    bytes_ = np.rint(scaled)
    if not (np.abs(scaled - bytes_) < 1e-3).all() or bytes_.min() < 0 or bytes_.max() > 255:
        raise CaseError(f"{case.id}: values that are not of 8 bits cannot be kept in a PNG")
    array = np.moveaxis(bytes_.astype(np.uint8), 0, -1)
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(path)


def _save_grey(path: Path, label: Any) -> None:
    from PIL import Image  # noqa: PLC0415

    Image.fromarray(label).save(path)
