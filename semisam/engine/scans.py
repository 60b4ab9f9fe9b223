# SPDX-License-Identifier: Apache-2.0
"""Read and write scans, labels and maps: NIfTI, the h5 files of UA-MT and SSL4MIS, PNG and JPEG."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from semisam.engine.files import atomic

__all__ = [
    "IGNORE",
    "Case",
    "CaseError",
    "Header",
    "Problem",
    "Volume",
    "read_header",
    "read_image",
    "read_label",
    "read_label_header",
    "write_label",
    "write_map",
]

IGNORE = 255
NIFTI = (".nii.gz", ".nii")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp")
LOSSY = (".jpg", ".jpeg")
H5 = (".h5", ".hdf5")
PALETTE = "000000e6503c46a0f06ec85af0be3caa64d25ad2d2f082b4"  # red, green, blue of classes 0, 1, 2, ...

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a case, or worth knowing: severity "error", "warning" or "note".

    >>> from semisam.engine.cases import Problem
    >>> print(Problem("scan_01", "shape", "error", "image 4 x 4 x 4, label 4 x 4 x 5"))
    scan_01: shape: image 4 x 4 x 4, label 4 x 4 x 5
    """

    case: str
    kind: str
    severity: str
    message: str

    def __str__(self) -> str:
        return f"{self.case}: {self.kind}: {self.message}"


class CaseError(ValueError):
    """Data that cannot be used as they are; `problems` has one entry per finding.

    >>> from semisam.engine.cases import CaseError, Problem
    >>> CaseError("2 cases are broken", [Problem("a", "unreadable", "error", "empty file")]).problems[0].case
    'a'
    """

    def __init__(self, message: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


class WrongData(ValueError):
    """What is wrong with a file, and its kind; callers put the case's name in front."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def broken(case: str, kind: str, message: str) -> CaseError:
    """The exception for one fault of one case."""
    return CaseError(f"{case}: {message}", [Problem(case, kind, "error", message)])


def cannot_read(case: str, path: Path, error: BaseException) -> CaseError:
    """The exception for a file that another exception kept from being read."""
    kind = getattr(error, "kind", "missing-file" if isinstance(error, FileNotFoundError) else "unreadable")
    return broken(case, kind, f"cannot read {path}: {reason(error)}")


@dataclass(frozen=True)
class Case:
    """The files of one scan: one image file per channel, and a label unless it is unlabeled.

    `kind` is "nifti", "h5" or "image"; `group` is the patient, where file names tell that several cases
    are of one; `channels` is how many channels the image must have.

    >>> from pathlib import Path
    >>> from semisam.engine.cases import Case
    >>> Case("scan_01", (Path("imagesTr/scan_01.nii.gz"),), None, "nifti").labeled
    False
    """

    id: str
    images: tuple[Path, ...]
    label: Path | None
    kind: str
    group: str = ""
    channels: int = 1

    @property
    def labeled(self) -> bool:
        """Whether the case has a label that may be opened."""
        return self.label is not None


class Header(NamedTuple):
    """What a file says about an image without its voxels being read."""

    shape: tuple[int, ...]  # [*S], channels left out
    channels: int
    spacing: tuple[float, ...] | None  # mm per axis
    affine: Array | None


class Volume(NamedTuple):
    """A scan in memory; `header` is what writing back needs (None for h5 and pictures)."""

    array: Array  # [channels, *S] float32
    spacing: tuple[float, ...] | None  # mm per axis, array order
    header: Any = None


def suffix_of(path: Path, known: Iterable[str]) -> str:
    """The one of the known suffixes that a file name has, in lower case, or nothing."""
    return next((suffix for suffix in known if path.name.lower().endswith(suffix)), "")


def stem_of(path: Path, known: Iterable[str]) -> str:
    """A file name without its known suffix."""
    return path.name[: len(path.name) - len(suffix_of(path, known))]


def is_grey(mode: str) -> bool:
    """Whether a picture of this PIL mode has one channel."""
    return mode in ("1", "L", "LA", "I", "F") or mode.startswith("I;16")


# ---- reading ------------------------------------------------------------------------------------


def reason(error: BaseException) -> str:
    """One line of what an exception says."""
    return " ".join(str(error).split()) or type(error).__name__


def times(shape: Iterable[int]) -> str:
    """A shape for people."""
    return " x ".join(map(str, shape))


def _nifti(path: Path) -> Any:
    import nibabel  # noqa: PLC0415

    return nibabel.load(path)


def _split_channels(shape: tuple[int, ...], channels: int) -> tuple[tuple[int, ...], int]:
    """Spatial shape and channels of one NIfTI file; a fourth axis must be the expected channels."""
    if len(shape) in (2, 3):
        return shape, 1
    if len(shape) == 4 and shape[3] == channels:
        return shape[:3], shape[3]
    if len(shape) == 4:
        raise WrongData(
            "dimensions",
            f"4-D image {times(shape)}: expected 3 axes, or {channels} channel(s) on the last one, which "
            f"dataset.json names; split a time series into one file per case",
        )
    raise WrongData("dimensions", f"{len(shape)}-D image {times(shape)}: expected 2 or 3 axes")


def read_header(case: Case) -> Header:
    """Return shape, channels, spacing (mm) and affine of a case's first image file, reading no voxels.

    Raises CaseError if the file is missing, is not what its name says, or has more axes than it may.

    >>> import tempfile
    >>> from semisam.engine.cases import find_cases, read_header
    >>> from semisam.engine.phantom import write_phantoms
    >>> root = write_phantoms(tempfile.mkdtemp(), labeled=1, unlabeled=0, test=0, shape=(16, 16, 16))
    >>> read_header(find_cases(root).cases[0]).shape
    (16, 16, 16)
    """
    path = case.images[0]
    try:
        return _header(path, case.kind, "image", case.channels)
    except Exception as error:
        raise cannot_read(case.id, path, error) from error


def read_label_header(case: Case) -> Header:
    """Return what the label file of a case says about itself, reading no voxels; errors as `read_header`.

    >>> from semisam.engine.cases import Case, CaseError, read_label_header
    >>> try:
    ...     read_label_header(Case("scan_01", (), None, "nifti"))
    ... except CaseError as error:
    ...     print(error)
    scan_01: has no label, or is unlabeled in this split
    """
    if case.label is None:
        raise broken(case.id, "missing-label", "has no label, or is unlabeled in this split")
    try:
        kind = "image" if suffix_of(case.label, PICTURES) else case.kind
        return _header(case.label, kind, "label", 1)
    except Exception as error:
        raise cannot_read(case.id, case.label, error) from error


def _header(path: Path, kind: str, key: str, channels: int) -> Header:
    if kind == "h5":
        import h5py  # noqa: PLC0415

        with h5py.File(path, "r") as file:
            if key not in file:
                raise WrongData("missing-key", f"no key {key!r}, only {sorted(file)}")
            shape = tuple(file[key].shape)
            if len(shape) not in (2, 3):
                raise WrongData(
                    "dimensions", f"{key} is {len(shape)}-D, {times(shape)}: expected 2 or 3 axes"
                )
            return Header(shape, 1, *_h5_geometry(file, len(shape)))
    if kind == "image":
        from PIL import Image  # noqa: PLC0415

        with Image.open(path) as picture:
            channels = 1 if is_grey(picture.mode) else 3
            return Header((picture.height, picture.width), channels, None, None)
    image = _nifti(path)
    shape, channels = _split_channels(tuple(map(int, image.shape)), channels)
    spacing = tuple(map(float, image.header.get_zooms()[: len(shape)]))
    return Header(shape, channels, spacing, np.asarray(image.affine, np.float64))


def _h5_geometry(file: Any, dims: int) -> tuple[tuple[float, ...] | None, Array | None]:
    spacing, affine = file.attrs.get("spacing"), file.attrs.get("affine")
    known = spacing is not None and np.shape(spacing) == (dims,)
    return (
        tuple(map(float, spacing)) if known else None,
        np.asarray(affine, np.float64) if np.shape(affine) == (4, 4) else None,
    )


def read_image(case: Case) -> Volume:
    """Return the scan of a case: float32 [channels, *S], its spacing in mm and its header.

    Values are those of the file, for 8- and 16-bit pictures divided by 255 or 65535. Raises CaseError for
    files that are missing, truncated or not what their name says, wrong numbers of axes or channels,
    channel files of different shapes, and voxels that are not finite.

    >>> import tempfile
    >>> from semisam.engine.cases import find_cases, read_image
    >>> from semisam.engine.phantom import write_phantoms
    >>> root = write_phantoms(tempfile.mkdtemp(), labeled=1, unlabeled=0, test=0, shape=(16, 16, 16))
    >>> volume = read_image(find_cases(root).cases[0])
    >>> volume.array.shape, str(volume.array.dtype), volume.spacing
    ((1, 16, 16, 16), 'float32', (1.0, 1.0, 1.0))
    """
    parts: list[Array] = []
    spacing: tuple[float, ...] | None = None
    header: Any = None
    for path in case.images:
        try:
            array, found, kept = _read_image_file(path, case)
        except Exception as error:
            raise cannot_read(case.id, path, error) from error
        if parts and array.shape[1:] != parts[0].shape[1:]:
            shapes = f"{times(parts[0].shape[1:])} and {times(array.shape[1:])} ({path.name})"
            raise broken(case.id, "shape", f"channels of different shapes: {shapes}")
        if not parts:
            spacing, header = found, kept
        parts.append(array)
    array = parts[0] if len(parts) == 1 else np.concatenate(parts)
    if len(array) != case.channels:
        raise broken(case.id, "channels", f"expected {case.channels} channel(s), got {len(array)}")
    bad = array.size - int(np.isfinite(array).sum())
    if bad:
        raise broken(case.id, "non-finite", f"{bad} of {array.size} voxels are NaN or infinite")
    return Volume(array, spacing, header)


def _read_image_file(path: Path, case: Case) -> tuple[Array, tuple[float, ...] | None, Any]:
    if case.kind == "h5":
        import h5py  # noqa: PLC0415

        head = _header(path, "h5", "image", 1)
        with h5py.File(path, "r") as file:
            array = np.asarray(file["image"][()])
        return _numbers(array)[None], head.spacing, _header_of(head)
    if case.kind == "image":
        return _read_picture(path, case.channels if len(case.images) == 1 else 1), None, None
    image = _nifti(path)
    shape, channels = _split_channels(tuple(map(int, image.shape)), case.channels)
    array = _numbers(np.asarray(image.dataobj))
    array = np.moveaxis(array, -1, 0) if array.ndim == 4 else array[None]
    if array.shape != (channels, *shape):
        raise WrongData(
            "unreadable", f"expected {times((channels, *shape))} voxels, got {times(array.shape)}"
        )
    spacing = tuple(map(float, image.header.get_zooms()[: len(shape)]))
    return np.ascontiguousarray(array), spacing, image.header


def _numbers(array: Array) -> Array:
    """float32 of any real numbers; too large ones become infinite, which is found later."""
    if array.dtype.kind not in "biuf":
        raise WrongData("unreadable", f"voxels of type {array.dtype}: expected numbers")
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(np.float32)


def _header_of(head: Header) -> Any:
    """A NIfTI header with the affine that an h5 file holds."""
    if head.affine is None:
        return None
    nibabel: Any = importlib.import_module("nibabel")
    header = nibabel.Nifti1Header()
    header.set_data_shape(head.shape)
    header.set_zooms(head.spacing or (1.0,) * len(head.shape))
    header.set_sform(head.affine, 1)
    header.set_xyzt_units("mm")
    return header


def _read_picture(path: Path, channels: int) -> Array:
    from PIL import Image  # noqa: PLC0415

    with Image.open(path) as picture:
        grey = is_grey(picture.mode)
        if channels == 1 and not grey:
            raise WrongData(
                "channels", f"colour picture ({picture.mode}): expected a grey one, as the others are"
            )
        if grey:
            array = np.asarray(picture.convert("L") if picture.mode in ("1", "LA") else picture)
            scale = {"L": 255.0, "LA": 255.0, "1": 255.0}.get(picture.mode, 65535.0)
            array = array.astype(np.float32) / (1.0 if picture.mode == "F" else np.float32(scale))
            return np.repeat(array[None], channels, axis=0)
        colour = np.asarray(picture.convert("RGB"), np.float32) / np.float32(255.0)
        return np.ascontiguousarray(np.moveaxis(colour, -1, 0))


def read_label(case: Case, label_map: Mapping[int, int] | None = None) -> Array:
    """Return the label of a case: uint8 [*S], 255 = not used.

    `label_map` {value in the file: class}; values that it leaves out are errors, but for 0 and 255. Pictures:
    JPEG masks, and others that hold 0 and 255 alone, are thresholded at 128 (others than JPEG only
    without `label_map`); palette and other masks are taken as numbers. Raises CaseError
    if there is no label, it cannot be read, or its values are not whole numbers in 0..255.

    >>> import tempfile
    >>> from semisam.engine.cases import find_cases, read_label
    >>> from semisam.engine.phantom import write_phantoms
    >>> root = write_phantoms(tempfile.mkdtemp(), labeled=1, unlabeled=0, test=0, shape=(16, 16, 16))
    >>> label = read_label(find_cases(root).cases[0])
    >>> label.shape, str(label.dtype), label.max().item()
    ((16, 16, 16), 'uint8', 1)
    """
    if case.label is None:
        raise broken(case.id, "missing-label", "has no label, or is unlabeled in this split")
    try:
        label = _read_label_file(case.label, case.kind, bool(label_map))
        return label if not label_map else _mapped(label, complete_map(label_map))
    except Exception as error:
        raise cannot_read(case.id, case.label, error) from error


def complete_map(label_map: Mapping[int, int]) -> dict[int, int]:
    """The map with 0 and 255 in it, which stay what they are unless it says otherwise."""
    made = {0: 0, IGNORE: IGNORE} | {int(k): int(v) for k, v in label_map.items()}
    wrong = sorted(v for v in {*made, *made.values()} if not 0 <= v <= IGNORE)
    if wrong:
        raise CaseError(f"data.label_map: expected numbers in 0..255, got {wrong}")
    return made


def _mapped(label: Array, targets: Mapping[int, int]) -> Array:
    unknown = sorted(set(np.unique(label).tolist()) - set(targets))
    if unknown:
        raise WrongData("labels", f"values {unknown} are not in data.label_map")
    table = np.zeros(256, np.uint8)
    for value, target in targets.items():
        table[value] = target
    return table[label]


def _read_label_file(path: Path, kind: str, mapped: bool) -> Array:
    if kind == "h5":
        import h5py  # noqa: PLC0415

        with h5py.File(path, "r") as file:
            if "label" not in file:
                raise WrongData("missing-key", f"no key 'label', only {sorted(file)}")
            return _whole(np.asarray(file["label"][()]))
    if suffix_of(path, PICTURES):
        return _read_mask(path, mapped)
    image = _nifti(path)
    array = np.asarray(image.dataobj)
    if array.ndim == 4 and array.shape[3] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3):
        raise WrongData("dimensions", f"{array.ndim}-D label {times(array.shape)}: expected 2 or 3 axes")
    return _whole(array)


def _whole(array: Array) -> Array:
    """uint8 of an array whose values must be whole numbers in 0..255."""
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind not in "biuf":
        raise WrongData("labels", f"voxels of type {array.dtype}: expected whole numbers")
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise WrongData("non-finite", "NaN or infinite values: expected whole numbers")
        parts = array != np.rint(array)
        if parts.any():
            example = float(array[parts].flat[0])
            raise WrongData(
                "float-labels", f"{int(parts.sum())} values are not whole numbers, e.g. {example:g}"
            )
    if array.size and (array.min() < 0 or array.max() > IGNORE):
        raise WrongData("labels", f"values {array.min():g}..{array.max():g}: expected 0..255")
    return array.astype(np.uint8)


def _read_mask(path: Path, mapped: bool) -> Array:
    from PIL import Image  # noqa: PLC0415

    with Image.open(path) as picture:
        if suffix_of(path, LOSSY):
            return (np.asarray(picture.convert("L")) >= 128).astype(np.uint8)
        if picture.mode in ("P", "1"):
            return np.asarray(picture).astype(np.uint8)
        array = np.asarray(picture.convert("L") if picture.mode == "LA" else picture)
        if array.ndim == 3:
            colours = array[..., :3]
            if (colours != colours[..., :1]).any():
                raise WrongData(
                    "labels", "colour-coded mask: expected a grey or palette picture of class numbers"
                )
            array = colours[..., 0]
    label = _whole(array)
    if not mapped and set(np.unique(label).tolist()) in ({IGNORE}, {0, IGNORE}):
        return (label >= 128).astype(np.uint8)
    return label


# ---- writing ------------------------------------------------------------------------------------


def write_label(path: str | Path, labels: Array, like: Volume) -> None:
    """Write a label map [*S] as uint8: `.nii.gz` or `.nii` (affine and header of `like`), `.h5` or `.png`.

    A PNG holds class numbers with a palette; an h5 file holds the key `label`. The file appears whole or not
    at all. Raises ValueError for another shape than that of `like` or an unknown suffix.

    >>> import tempfile
    >>> import numpy as np
    >>> from semisam.engine.cases import Volume, write_label
    >>> like = Volume(np.zeros((1, 4, 4, 4), np.float32), (1.0, 1.0, 2.0))
    >>> write_label(tempfile.mkdtemp() + "/scan.nii.gz", np.zeros((4, 4, 4), np.uint8), like)
    """
    _write(Path(path), _whole(np.asarray(labels)), like, "label")


def write_map(path: str | Path, values: Array, like: Volume) -> None:
    """Write a map [*S] (a probability, an uncertainty): float32 as `.nii.gz`, `.nii` or `.h5` (key `map`).

    A `.png` holds round(255 x value) of values in [0, 1]. Otherwise as `write_label`.

    >>> import tempfile
    >>> import numpy as np
    >>> from semisam.engine.cases import Volume, write_map
    >>> like = Volume(np.zeros((1, 4, 4, 4), np.float32), (1.0, 1.0, 2.0))
    >>> write_map(tempfile.mkdtemp() + "/scan.nii.gz", np.zeros((4, 4, 4), np.float32), like)
    """
    _write(Path(path), np.asarray(values, np.float32), like, "map")


def _write(path: Path, array: Array, like: Volume, key: str) -> None:
    if array.shape != like.array.shape[1:]:
        raise ValueError(f"{key}: expected shape {like.array.shape[1:]}, got {array.shape}")
    suffix = suffix_of(path, (*NIFTI, *H5, ".png"))
    if not suffix or (suffix == ".png" and array.ndim != 2):
        wanted = ".nii.gz, .nii, .h5" + (", .png" if array.ndim == 2 else "")
        raise ValueError(f"path: expected a name that ends in {wanted}, got {path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        if suffix in NIFTI:
            _write_nifti(temporary, array, like)
        elif suffix == ".png":
            _write_png(temporary, array, key)
        else:
            write_h5(temporary, {key: array}, like)


def _write_nifti(path: Path, array: Array, like: Volume) -> None:
    nibabel: Any = importlib.import_module("nibabel")  # untyped
    if like.header is not None:
        header = like.header.copy()
        header.set_data_dtype(array.dtype)
        header["cal_max"] = header["cal_min"] = 0
        image = type_of_image(header)(array, header.get_best_affine(), header)
    else:
        steps = [*(like.spacing or ()), 1.0, 1.0, 1.0][:3]
        image = nibabel.Nifti1Image(array, np.diag([*steps, 1.0]))
        if like.spacing:
            image.header.set_xyzt_units("mm")
    image.to_filename(path)


def type_of_image(header: Any) -> Any:
    """The nibabel class that goes with a header."""
    import nibabel  # noqa: PLC0415

    return nibabel.Nifti2Image if isinstance(header, nibabel.Nifti2Header) else nibabel.Nifti1Image


def _write_png(path: Path, array: Array, key: str) -> None:
    from PIL import Image  # noqa: PLC0415

    if key == "label":
        picture = Image.fromarray(array, mode="P")
        colours = bytes.fromhex(PALETTE)
        grey = (bytes([i, i, i]) for i in range(len(colours) // 3, 256))
        picture.putpalette(colours + b"".join(grey))
    else:
        picture = Image.fromarray(np.rint(np.clip(array, 0, 1) * 255).astype(np.uint8))
    picture.save(path)


def write_h5(path: Path, arrays: Mapping[str, Array], like: Volume) -> None:
    import h5py  # noqa: PLC0415

    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            file.create_dataset(key, data=array, compression="gzip")
        if like.spacing:
            file.attrs["spacing"] = like.spacing
        if like.header is not None:
            file.attrs["affine"] = like.header.get_best_affine()
