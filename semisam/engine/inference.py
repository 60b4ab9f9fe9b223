# SPDX-License-Identifier: Apache-2.0
"""Inference of a specialist: sliding windows, uncertainty, components, and from files to files.

Only the network is used here: no generalist and no prompt. The steps of a case are

    read -> prepare (spacing, intensities) -> sliding windows -> mean softmax -> restore the grid -> argmax
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from semisam import fusion, masks
from semisam.engine.cases import (
    Case,
    CaseError,
    CaseSet,
    Volume,
    find_cases,
    read_image,
    write_label,
    write_map,
)
from semisam.engine.files import atomic
from semisam.engine.preprocess import Preprocessing
from semisam.engine.progress import progress as reported
from semisam.engine.progress import say
from semisam.engine.record import sha256
from semisam.engine.scans import H5, NIFTI, PICTURES, stem_of, suffix_of

__all__ = [
    "Outcome",
    "Prediction",
    "Settings",
    "cases_of",
    "device_named",
    "entropy",
    "keep_largest",
    "load_run",
    "predict_case",
    "predict_cases",
    "predict_split",
    "role_cases",
    "sliding_window",
    "window_starts",
]


# ---- windows ------------------------------------------------------------------------------------


def window_starts(size: int, patch: int, stride: int) -> list[int]:
    """Return where the windows of one axis begin: min(stride i, size - patch) until the end is covered.

    An axis shorter than the patch is padded to it and has one window. Raises ValueError for a stride
    that is not within 1 and `patch`, as voxels between windows would have no prediction.

    >>> from semisam.engine.inference import window_starts
    >>> window_starts(20, 8, 5)
    [0, 5, 10, 12]
    """
    if not 1 <= stride <= patch:
        raise ValueError(f"window_starts(): stride: expected 1 to the patch's {patch}, got {stride}")
    room = max(size - patch, 0)
    return [min(stride * i, room) for i in range(-(-room // stride) + 1)]


def sliding_window(
    network: Callable[[Any], Any],
    image: Any,
    patch_size: Sequence[int],
    stride: Sequence[int] | int | None = None,
    *,
    device: Any = None,
    batch: int = 4,
    accumulate: Any = None,
    slice_axis: int = 0,
    dropout: bool = False,
    progress: bool = False,
) -> Any:
    """Return class probabilities [C, *S] of an image [channels, *S]: the mean softmax over all windows.

    Windows begin at `window_starts` on every axis; `stride` is a number or one per axis (default: half
    the patch). An axis shorter than the patch is padded with zeros, the same on both sides (one more at
    the end if odd), and cut back afterwards. A 2-D patch with a 3-D image goes slice by slice along
    `slice_axis`. `batch` windows run at once on `device` (default: where the network is); sums are
    kept there, too, or on `accumulate`, which a volume too large for a GPU sets to "cpu".

    `network` maps [N, channels, *patch] to logits [N, C, *patch]; it runs in evaluation mode, with its
    dropout layers active if `dropout`, without gradient, and is left in the mode it came in. NumPy
    images give NumPy results, tensors give tensors; float32. `progress` shows a bar on a terminal.

    Raises ValueError for shapes, strides and outputs that do not fit, and RuntimeError naming the
    settings to lower if the device's memory does not suffice.

    >>> import numpy as np, torch
    >>> from semisam.engine.inference import sliding_window
    >>> network = torch.nn.Conv3d(1, 2, 1)
    >>> probability = sliding_window(network, np.zeros((1, 9, 7, 5), np.float32), (8, 8, 8), 4)
    >>> probability.shape, np.allclose(probability.sum(0), 1)
    ((2, 9, 7, 5), True)
    """
    import torch  # noqa: PLC0415
    from monai.inferers.utils import sliding_window_inference  # noqa: PLC0415

    given = image
    image = torch.as_tensor(image, dtype=torch.float32)
    patch = tuple(int(p) for p in patch_size)
    slices = len(patch) == 2 and image.ndim == 4
    if image.ndim != len(patch) + 1 and not slices:
        raise ValueError(
            f"sliding_window(): image: expected [channels, {len(patch)} axes] for the patch {patch}, "
            f"got {tuple(image.shape)}"
        )
    if min(image.shape) < 1:
        raise ValueError(f"sliding_window(): image: expected no empty axis, got {tuple(image.shape)}")
    strides = _strides(patch, stride)
    device = _device_of(network) if device is None else torch.device(device)
    # [N, channels, *S] with the slices as a batch, or a batch of one
    stack = image.movedim(1 + slice_axis, 0) if slices else image[None]

    def probabilities(windows: Any) -> Any:
        logits = network(windows)
        expected = (windows.shape[0], *windows.shape[2:])
        shape = tuple(getattr(logits, "shape", ()))
        if (*shape[:1], *shape[2:]) != expected or shape[1] < 2:
            raise ValueError(
                f"sliding_window(): network: expected logits [{expected[0]}, 2 or more classes, "
                f"{', '.join(map(str, expected[1:]))}] for windows of shape {tuple(windows.shape)}, "
                f"got {shape or type(logits).__name__}"
            )
        return logits.float().softmax(1)

    overlap = [_overlap(p, s) for p, s in zip(patch, strides, strict=True)]
    try:
        with _evaluation(network, dropout), torch.no_grad():
            result: Any = sliding_window_inference(
                stack,
                patch,
                batch,
                probabilities,
                overlap=overlap,
                mode="constant",
                padding_mode="constant",
                sw_device=device,
                device=device if accumulate is None else torch.device(accumulate),
                progress=progress and _terminal(),
            )
    except torch.OutOfMemoryError as error:
        raise RuntimeError(
            f"sliding_window(): {device} has not enough memory for {batch} windows of {patch} and an image "
            f'of {tuple(image.shape)}: lower batch, or accumulate="cpu" ({error})'
        ) from error
    result = result.movedim(0, 1 + slice_axis) if slices else result[0]
    return result if isinstance(given, torch.Tensor) else result.cpu().numpy()


def _strides(patch: tuple[int, ...], stride: Sequence[int] | int | None) -> tuple[int, ...]:
    if stride is None:
        strides = tuple(max(p // 2, 1) for p in patch)
    elif isinstance(stride, int):
        strides = (stride,) * len(patch)
    else:
        strides = tuple(int(s) for s in stride)
    if len(strides) != len(patch) or any(not 1 <= s <= p for s, p in zip(strides, patch, strict=True)):
        raise ValueError(
            f"sliding_window(): stride: expected {len(patch)} numbers from 1 to the patch's {patch}, "
            f"got {stride}"
        )
    return strides


def _overlap(patch: int, stride: int) -> float:
    """MONAI takes int(patch (1 - overlap)) as stride: half a voxel more than asked survives rounding."""
    return 0.0 if stride == patch else 1 - (stride + 0.5) / patch


def _device_of(network: Any) -> Any:
    import torch  # noqa: PLC0415

    parameters = network.parameters() if hasattr(network, "parameters") else iter(())
    first = next(parameters, None)
    return torch.device("cpu") if first is None else first.device


def _terminal() -> bool:
    return sys.stderr.isatty()


def _dropouts(network: Any) -> list[Any]:
    """Every active dropout layer of a network."""
    from torch.nn.modules.dropout import _DropoutNd  # noqa: PLC0415

    modules = network.modules() if hasattr(network, "modules") else ()
    return [m for m in modules if isinstance(m, _DropoutNd) and m.p > 0]


@contextmanager
def _evaluation(network: Any, dropout: bool) -> Iterator[None]:
    """Evaluation mode, with dropout if asked; every module gets back its own mode."""
    before = [(m, m.training) for m in network.modules()] if hasattr(network, "modules") else []
    try:
        for module, _ in before:
            module.training = False
        for module in _dropouts(network) if dropout else ():
            module.training = True
        yield
    finally:
        for module, training in before:
            module.training = training


# ---- maps ---------------------------------------------------------------------------------------


def entropy(probability: Any) -> Any:
    """Return the normalised entropy [*S] of class probabilities [C, *S]: 0 sure, 1 no idea.

        u = -sum_c p_c ln p_c / ln C

    Raises ValueError for fewer than two classes.

    >>> import numpy as np
    >>> from semisam.engine.inference import entropy
    >>> entropy(np.array([[1.0, 0.5], [0.0, 0.5]], np.float32)).round(3).tolist()
    [0.0, 1.0]
    """
    if probability.shape[0] < 2:
        raise ValueError(f"entropy(): probability: expected 2 or more classes, got {probability.shape[0]}")
    return fusion.fuse([probability[None]], unc="ent", want=("uncertainty",)).uncertainty[0]


def keep_largest(label: Any, num_classes: int) -> Any:
    """Return a label map with only the largest component of each foreground class; the rest becomes 0.

    Voxels of one class connect over faces, edges and corners (26 neighbours; 8 in 2-D).

    >>> import numpy as np
    >>> from semisam.engine.inference import keep_largest
    >>> keep_largest(np.array([[1, 1, 0, 1, 2]], np.uint8), 3).tolist()
    [[1, 1, 0, 0, 2]]
    """
    kept = np.zeros_like(label)
    for c in range(1, num_classes):
        mask = np.ascontiguousarray(label == c)
        if mask.any():
            kept[masks.largest_component(mask, spatial_dims=label.ndim)] = c
    return kept


# ---- cases --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """How cases are predicted.

    `stride` of the windows (a number, one per axis, or None: half the patch), `batch` windows at once,
    `accumulate` as in `sliding_window`; `uncertainty` asks for a map: the normalised entropy of the mean
    softmax, with `mc` > 0 that of the mean of `mc` passes with dropout (seeded by `seed`). Dropout never
    changes label or probability. `largest_component` keeps each class's largest component.

    >>> from semisam.engine.inference import Settings
    >>> Settings(stride=(18, 18, 4)).uncertainty
    False
    """

    stride: Sequence[int] | int | None = None
    batch: int = 4
    accumulate: str | None = None
    uncertainty: bool = False
    mc: int = 0
    seed: int = 1337
    largest_component: bool = False


class Prediction(NamedTuple):
    """What `predict_case` returns, on the grid of the scan's file."""

    label: Any  # [*S] uint8
    probability: Any  # [C, *S] float32
    uncertainty: Any  # [*S] float32 in 0..1, or None
    volume: Volume


def device_named(name: str = "auto") -> Any:
    """Return the torch device of a name; "auto" is the GPU if there is one.

    Raises ValueError for a device that torch does not have here.

    >>> from semisam.engine.inference import device_named
    >>> device_named("cpu")
    device(type='cpu')
    """
    import torch  # noqa: PLC0415

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device: expected auto, cpu or a GPU that is here (cuda, cuda:1), got {name!r}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return device


def predict_case(
    loaded: Any, case: Case, settings: Settings = Settings(), *, progress: bool = False
) -> Prediction:
    """Return label, probabilities and, if asked, uncertainty of one scan.

    `loaded` is what `semisam.engine.checkpoint.load` returns; the network decides the device. The label
    is the class of the largest mean softmax (of equal ones the first), restored to the file's grid. A 2-D
    network predicts a volume slice by slice: along the first axis of h5 files, the last of NIfTI files.

    Raises CaseError for scans that cannot be read or do not fit the network (number of channels or axes),
    ValueError for settings that do not fit, RuntimeError if the device's memory does not suffice.

    >>> import tempfile
    >>> import torch
    >>> from semisam.engine.cases import find_cases
    >>> from semisam.engine.checkpoint import Loaded
    >>> from semisam.engine.config import Config
    >>> from semisam.engine.inference import predict_case
    >>> from semisam.engine.phantom import write_phantoms
    >>> root = write_phantoms(tempfile.mkdtemp(), labeled=1, unlabeled=0, test=0, shape=(16, 16, 16))
    >>> meta = {"channels": 1, "num_classes": 2, "spatial_dims": 3}
    >>> loaded = Loaded(torch.nn.Conv3d(1, 2, 1), Config(), meta, 0, "last", root)
    >>> prediction = predict_case(loaded, find_cases(root).cases[0])
    >>> prediction.label.shape, prediction.probability.shape
    ((16, 16, 16), (2, 16, 16, 16))
    """
    import torch  # noqa: PLC0415

    network, config, meta = loaded.network, loaded.config, loaded.meta
    _check_settings(loaded, settings)
    volume = read_image(replace(case, label=None, channels=int(meta["channels"])))
    _check_axes(case, volume, int(meta["spatial_dims"]))
    # The slices of a stack come first in h5 files, last in NIfTI files.
    stacked = volume.array.ndim - 1 > int(meta["spatial_dims"])
    axis = volume.array.ndim - 2 if stacked and case.kind == "nifti" else 0
    preparation = Preprocessing.of(config, int(meta["spatial_dims"]))
    prepared = preparation.prepare(_axis_first(volume, axis))

    def pass_over(dropout: bool) -> Any:
        probability = sliding_window(
            network,
            prepared.image,
            config.train.patch_size,
            settings.stride,
            batch=settings.batch,
            accumulate=settings.accumulate,
            dropout=dropout,
            progress=progress,
        )
        return np.ascontiguousarray(np.moveaxis(preparation.restore(probability, prepared), 1, 1 + axis))

    probability = pass_over(False)
    uncertainty = None
    if settings.uncertainty:
        mean = probability
        if settings.mc:
            with torch.random.fork_rng():
                torch.manual_seed(settings.seed)
                mean = sum(pass_over(True) for _ in range(settings.mc)) / np.float32(settings.mc)
        uncertainty = entropy(mean)
    label = probability.argmax(0).astype(np.uint8)
    if settings.largest_component:
        label = keep_largest(label, probability.shape[0])
    return Prediction(label, probability, uncertainty, volume)


def _check_settings(loaded: Any, settings: Settings) -> None:
    _strides(tuple(loaded.config.train.patch_size), settings.stride)
    if settings.mc and not _dropouts(loaded.network):
        raise ValueError("mc: the network has no dropout layer: every pass would be the same; leave mc out")


def _axis_first(volume: Volume, axis: int) -> Volume:
    """The scan with one of its axes moved to the front."""
    if axis == 0:
        return volume
    order = [axis, *(i for i in range(volume.array.ndim - 1) if i != axis)]
    spacing = None if volume.spacing is None else tuple(volume.spacing[i] for i in order)
    return Volume(np.moveaxis(volume.array, 1 + axis, 1), spacing, volume.header)


def _check_axes(case: Case, volume: Volume, dims: int) -> None:
    axes = volume.array.ndim - 1
    if axes != dims and (axes, dims) != (3, 2):
        raise CaseError(
            f"{case.id}: expected a scan of {'2 or 3' if dims == 2 else 3} axes for this {dims}-D network, "
            f"got {' x '.join(map(str, volume.array.shape[1:]))}"
        )


# ---- files --------------------------------------------------------------------------------------

CHANNEL = re.compile(r"^(?P<id>.+)_(?P<channel>\d{4})$")
SUFFIXES = (*NIFTI, *H5, *PICTURES)
ENDINGS = {"nifti": ".nii.gz", "h5": ".h5", "image": ".png"}


@dataclass
class Outcome:
    """What became of a list of cases: ids that were written and skipped, and why others failed.

    >>> from semisam.engine.inference import Outcome
    >>> print(Outcome(["a", "b"], ["c"]).report())
    2 predicted, 1 skipped, as their files are there (--overwrite predicts them again)
    """

    written: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)  # skipped, but not made by this network and settings
    failed: dict[str, str] = field(default_factory=dict)

    def report(self) -> str:
        """Return the counts, and a line for every case that failed.

        >>> from semisam.engine.inference import Outcome
        >>> print(Outcome(["a", "b"], failed={"c": "cannot be read"}).report())
        2 predicted, 1 failed:
          c: cannot be read
        """
        parts = [f"{len(self.written)} predicted"]
        if self.skipped:
            parts.append(
                f"{len(self.skipped)} skipped, as their files are there (--overwrite predicts them again)"
            )
        if self.foreign:
            parts.append(
                f"{len(self.foreign)} left as they are, though another network, other settings or a person "
                "made them (--overwrite predicts them again)"
            )
        if self.failed:
            parts.append(f"{len(self.failed)} failed:")
        lines = [", ".join(parts), *(f"  {reason_of(case, why)}" for case, why in self.failed.items())]
        return "\n".join(lines)


def reason_of(case: str, why: str) -> str:
    """Return "case: why" with the case named once."""
    return why if why.startswith(f"{case}:") else f"{case}: {why}"


def predict_cases(
    loaded: Any,
    cases: Sequence[Case],
    out: str | os.PathLike[str],
    settings: Settings = Settings(),
    *,
    probability: bool = False,
    overwrite: bool = False,
    renew: bool = False,
    redo: Collection[str] = (),
    each: Callable[[Case, Prediction], None] | None = None,
    label_folder: str = "",
) -> Outcome:
    """Predict cases into a folder, file by file; what cannot be predicted is told at the end.

    NIfTI scans give `<id>.nii.gz` (uint8, affine and header geometry of the scan), on demand
    `probability/<id>.nii.gz` (float32, 4-D, classes last) and `uncertainty/<id>.nii.gz` (float32). h5 scans
    give `<id>.h5` with the keys label, probability [C, *S] and uncertainty; pictures `<id>.png` (class
    numbers with a palette), `probability/<id>.h5` and `uncertainty/<id>.png` (0..255). Labels go to
    `label_folder` in `out`. Cases whose files are all there are skipped unless `overwrite`. `each` is
    called with every prediction after its files were written.

    `predictions.jsonl` in `out` has a line for every case with the network and settings behind it. Labels
    that something else made (another network, a person's corrections) are left as they are, too, and
    counted in the outcome; with `renew` they are predicted again. `redo` are ids not to skip.

    Raises ValueError for settings that do not fit the network, and OSError if nothing can be written
    (disk full): what was written before is whole, and the same command goes on from there.

    >>> import pathlib, tempfile
    >>> import torch
    >>> from semisam.engine.cases import find_cases
    >>> from semisam.engine.checkpoint import Loaded
    >>> from semisam.engine.config import Config
    >>> from semisam.engine.inference import predict_cases
    >>> from semisam.engine.phantom import write_phantoms
    >>> root = write_phantoms(tempfile.mkdtemp(), labeled=1, unlabeled=0, test=0, shape=(16, 16, 16))
    >>> meta = {"channels": 1, "num_classes": 2, "spatial_dims": 3}
    >>> loaded = Loaded(torch.nn.Conv3d(1, 2, 1), Config(), meta, 0, "last", root)
    >>> out = pathlib.Path(tempfile.mkdtemp())
    >>> print(predict_cases(loaded, find_cases(root).cases, out).report())
    1 predicted
    >>> len(list(out.glob("*.nii.gz")))
    1
    """
    _check_settings(loaded, settings)
    place = Path(out)
    outcome = Outcome()
    maker = _maker(loaded, settings)
    made = _makers(place)
    for case in reported(cases, label="predict"):
        names = _outputs(case, place, label_folder, probability, settings.uncertainty)
        label = names["label"]
        mine = label.is_file() and _same(made.get(case.id), {**maker, "sha256": sha256(label)})
        if mine and not overwrite and case.id not in redo and _there(case, names):
            outcome.skipped.append(case.id)
            continue
        if label.is_file() and not (mine or overwrite or renew):
            outcome.foreign.append(case.id)
            continue
        try:
            prediction = predict_case(loaded, case, settings, progress=len(cases) == 1)
        except (CaseError, ValueError, RuntimeError, MemoryError) as error:
            outcome.failed[case.id] = " ".join(str(error).split()) or type(error).__name__
            say(f"failed: {reason_of(case.id, outcome.failed[case.id])}")
            continue
        _write(case, prediction, names)
        _append(place / RECORD, {"case": case.id, "sha256": sha256(label), **maker})
        outcome.written.append(case.id)
        if each is not None:
            each(case, prediction)
    return outcome


RECORD = "predictions.jsonl"


def _append(path: Path, entry: Mapping[str, Any]) -> None:
    """Add a line; one that a kill has cut stays a line of its own."""
    with path.open("a+b") as file:
        file.seek(max(file.tell() - 1, 0))
        cut = file.read(1) not in (b"", b"\n")
        file.write((b"\n" if cut else b"") + json.dumps(entry).encode() + b"\n")


def _maker(loaded: Any, settings: Settings) -> dict[str, Any]:
    """What decides about a prediction, and where it came from."""
    digest = hashlib.sha256()
    for name, tensor in loaded.network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().numpy().tobytes())
    data, train = loaded.config.data, loaded.config.train
    doubt = {"mc": settings.mc, "seed": settings.seed} if settings.uncertainty else None
    made: dict[str, Any] = {
        "weights": digest.hexdigest(),
        "patch_size": list(train.patch_size),
        "stride": list(_strides(tuple(train.patch_size), settings.stride)),
        "spacing": data.spacing,
        "normalize": data.normalize,
        "largest_component": settings.largest_component,
        "uncertainty": doubt,
    }
    origin = {"run": str(Path(loaded.path).resolve()), "checkpoint": loaded.checkpoint, "step": loaded.step}
    return {**made, **origin}


def _same(old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> bool:
    """Whether two predictions of a case would be equal, maps that only one of them has left out."""
    if old is None:
        return False
    keys = ["sha256", "weights", "patch_size", "stride", "spacing", "normalize", "largest_component"]
    keys += ["uncertainty"] if old.get("uncertainty") and new["uncertainty"] else []
    return all(old.get(key) == new[key] for key in keys)


def _makers(out: Path) -> dict[str, dict[str, Any]]:
    """The last line of every case in the record; a line that was cut by a kill is no line."""
    found: dict[str, dict[str, Any]] = {}
    if (out / RECORD).is_file():
        for line in (out / RECORD).read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
                found[str(entry["case"])] = entry
            except (ValueError, KeyError, TypeError):
                continue
    return found


def _outputs(case: Case, out: Path, label: str, probability: bool, uncertainty: bool) -> dict[str, Path]:
    """The file of every output."""
    ending = ENDINGS[case.kind]
    names = {"label": out / label / f"{case.id}{ending}"}
    for name, wanted in (("probability", probability), ("uncertainty", uncertainty)):
        if wanted and case.kind == "h5":
            names[name] = names["label"]
        elif wanted:
            other = ".h5" if name == "probability" and case.kind == "image" else ending
            names[name] = out / name / f"{case.id}{other}"
    return names


def _there(case: Case, names: Mapping[str, Path]) -> bool:
    """Whether all outputs of a case are there; those of h5 files are keys."""
    if not all(path.is_file() for path in names.values()):
        return False
    if case.kind != "h5":
        return True
    import h5py  # noqa: PLC0415

    try:
        with h5py.File(names["label"], "r") as file:
            return all(name in file for name in names)
    except OSError:
        return False


def _write(case: Case, prediction: Prediction, names: Mapping[str, Path]) -> None:
    """Write all outputs of a case, the label last: where a label is, the maps are."""
    values = {name: getattr(prediction, name) for name in names}
    for path in names.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    if case.kind == "h5":
        _write_h5(names["label"], values, prediction.volume)
        return
    if "probability" in names and case.kind == "nifti":
        _write_probability(names["probability"], prediction)
    elif "probability" in names:
        _write_h5(names["probability"], {"probability": prediction.probability}, prediction.volume)
    if "uncertainty" in names:
        write_map(names["uncertainty"], prediction.uncertainty, prediction.volume)
    write_label(names["label"], prediction.label, prediction.volume)


def _write_h5(path: Path, values: Mapping[str, Any], like: Volume) -> None:
    import h5py  # noqa: PLC0415

    buffer = io.BytesIO()  # HDF5 may notice a full disk only after it says that the file is closed
    with h5py.File(buffer, "w") as file:
        for name, value in values.items():
            file.create_dataset(name, data=value, compression="gzip")
        if like.spacing:
            file.attrs["spacing"] = like.spacing
    with atomic(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def _write_probability(path: Path, prediction: Prediction) -> None:
    """All classes as one 4-D image, classes last, with the scan's geometry."""
    nibabel: Any = importlib.import_module("nibabel")  # untyped
    array = np.ascontiguousarray(np.moveaxis(prediction.probability, 0, -1))
    while array.ndim < 4:  # a 2-D scan: classes stay on the fourth axis
        array = array[..., None, :]
    header = prediction.volume.header.copy()
    header.set_data_dtype(np.float32)
    kind = nibabel.Nifti2Image if isinstance(header, nibabel.Nifti2Header) else nibabel.Nifti1Image
    image = kind(array, header.get_best_affine(), header)
    with atomic(path) as temporary:
        image.to_filename(temporary)


# ---- which cases --------------------------------------------------------------------------------


def cases_of(
    inputs: Sequence[str | os.PathLike[str]], known: Mapping[str, Case] | None = None, channels: int = 1
) -> list[Case]:
    """Return the cases of files, folders and ids; none of them has a label.

    A folder is a data set of a known layout (then all of its cases) or holds scans; files that end in
    `_0000`, `_0001`, ... are the channels of one case. Words that are neither file nor folder are ids in
    `known`. Raises CaseError naming everything that is not found, and ids that occur twice.

    >>> import pathlib, tempfile
    >>> from semisam.engine.inference import cases_of
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> for name in ("a_0000.nii.gz", "a_0001.nii.gz"):
    ...     (folder / name).touch()
    >>> [(case.id, len(case.images)) for case in cases_of([folder], channels=2)]
    [('a', 2)]
    """
    found: list[Case] = []
    files: list[Path] = []
    unknown: list[str] = []
    for word in inputs:
        path = Path(word)
        if path.is_dir():
            inside = _folder(path)
            found += [one for one in inside if isinstance(one, Case)]
            files += [one for one in inside if isinstance(one, Path)]
        elif path.is_file():
            files.append(path)
        elif known is not None and str(word) in known:
            found.append(known[str(word)])
        else:
            unknown.append(str(word))
    found += _group_files(files, channels)
    problems = [f"{word}: no such file or folder, and no case of the run's data" for word in unknown]
    seen: dict[str, Case] = {}
    for case in found:
        if case.id in seen:
            problems.append(
                f"{case.id}: two inputs have this id: {seen[case.id].images[0]} and {case.images[0]}"
            )
        seen[case.id] = case
    if problems:
        raise CaseError("\n".join(["the inputs cannot be used:", *(f"  {p}" for p in problems)]))
    return [replace(case, label=None) for case in seen.values()]


def all_cases(found: CaseSet) -> dict[str, Case]:
    """Return every case of a data set by its id: training pool, validation, test."""
    return {case.id: case for case in (*found.cases, *found.validation, *found.test)}


def split_of(run_dir: str | os.PathLike[str]) -> dict[str, list[str]]:
    """Return the ids of a run by role, from its run.json; {} where it has none.

    Raises CaseError if the file cannot be read.
    """
    place = Path(run_dir) / "run.json"
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CaseError(f"{place}: cannot be read: {error}") from error
    found = content.get("split", {}) if isinstance(content, dict) else {}
    return {str(role): [str(i) for i in ids] for role, ids in found.items() if isinstance(ids, list)}


def run_cases(loaded: Any) -> dict[str, Case]:
    """Return every case of the folder that a run was trained on, by id.

    Raises CaseError if the folder is not there any more or has problems.
    """
    data = loaded.config.data
    return all_cases(find_cases(data.root, data.layout))


def role_cases(loaded: Any, role: str) -> list[Case]:
    """Return the cases of a run with a role: labeled, unlabeled, validation or test.

    The unlabeled ones come without their label, as in training. Raises CaseError if there are none of
    that role, or some are not in the run's data any more.

    >>> import pathlib, tempfile
    >>> from semisam.engine.checkpoint import Loaded
    >>> from semisam.engine.config import Config, DataConfig
    >>> from semisam.engine.files import write_json
    >>> from semisam.engine.inference import role_cases
    >>> from semisam.engine.phantom import write_phantoms
    >>> root = write_phantoms(tempfile.mkdtemp(), labeled=1, unlabeled=1, test=1, shape=(16, 16, 16))
    >>> run = pathlib.Path(tempfile.mkdtemp())
    >>> name = sorted(p.name for p in (root / "labelsTs").iterdir())[0].removesuffix(".nii.gz")
    >>> write_json(run / "run.json", {"split": {"test": [name]}})
    >>> loaded = Loaded(None, Config(data=DataConfig(root=str(root))), {}, 0, "last", run)
    >>> [case.labeled for case in role_cases(loaded, "test")]
    [True]
    """
    ids = split_of(loaded.path).get(role, [])
    if not ids:
        raise CaseError(f"{loaded.path}: the run has no {role} cases: set data.{role} in training")
    known = run_cases(loaded)
    gone = [i for i in ids if i not in known]
    if gone:
        raise CaseError(
            f"{loaded.config.data.root}: {role} cases of the run are gone: {', '.join(gone[:20])}"
        )
    found = [known[i] for i in ids]
    return [replace(case, label=None) for case in found] if role == "unlabeled" else found


def split_folder(loaded: Any, role: str, network: str) -> Path:
    """Return where a run's predictions and scores of a role belong: RUN/role/checkpoint-network."""
    return Path(loaded.path) / role / f"{loaded.checkpoint}-{network}"


def predict_split(
    loaded: Any,
    role: str = "test",
    network: str = "student",
    settings: Settings = Settings(),
    **options: Any,
) -> tuple[Outcome, Path]:
    """Predict the cases of a run's role into RUN/role/checkpoint-network/predictions.

    `network` names the folder; `options` are those of `predict_cases`. Predictions that an earlier state
    of the network made are made again. Returns outcome and folder.
    Raises as `role_cases` and `predict_cases` do.

    >>> import pathlib, tempfile
    >>> import torch
    >>> from semisam.engine.checkpoint import Loaded
    >>> from semisam.engine.config import Config, DataConfig
    >>> from semisam.engine.files import write_json
    >>> from semisam.engine.inference import predict_split
    >>> from semisam.engine.phantom import write_phantoms
    >>> root = write_phantoms(tempfile.mkdtemp(), labeled=1, unlabeled=1, test=1, shape=(16, 16, 16))
    >>> run = pathlib.Path(tempfile.mkdtemp())
    >>> name = sorted(p.name for p in (root / "labelsTs").iterdir())[0].removesuffix(".nii.gz")
    >>> write_json(run / "run.json", {"split": {"test": [name]}})
    >>> meta = {"channels": 1, "num_classes": 2, "spatial_dims": 3}
    >>> config = Config(data=DataConfig(root=str(root)))
    >>> loaded = Loaded(torch.nn.Conv3d(1, 2, 1), config, meta, 0, "last", run)
    >>> outcome, place = predict_split(loaded, "test")
    >>> len(outcome.written), str(place.relative_to(run))
    (1, 'test/last-student/predictions')
    """
    place = split_folder(loaded, role, network) / "predictions"
    return predict_cases(loaded, role_cases(loaded, role), place, settings, renew=True, **options), place


def _folder(path: Path) -> Sequence[Case | Path]:
    """Cases of a data set, or the files of scans."""
    try:
        return list(all_cases(find_cases(path)).values())
    except CaseError as error:
        if error.problems:
            raise
    shown = [p for p in sorted(path.iterdir()) if not p.name.startswith(".")]
    files = [p for p in shown if p.is_file() and kind_of(p)]
    files += [p / "mri_norm2.h5" for p in shown if (p / "mri_norm2.h5").is_file()]
    if not files:
        raise CaseError(f"{path}: no scans here: expected a data set or files of {', '.join(SUFFIXES)}")
    return files


def kind_of(path: Path) -> str:
    """Return "nifti", "h5" or "image" by a file's name, "" for others."""
    kinds = {"nifti": NIFTI, "h5": H5, "image": PICTURES}
    return next((kind for kind, known in kinds.items() if suffix_of(path, known)), "")


def _group_files(files: Sequence[Path], channels: int) -> list[Case]:
    """One case for each file, or for the channel files of one name."""
    groups: dict[tuple[Path, str], dict[int, Path]] = {}
    for path in files:
        if not kind_of(path):
            raise CaseError(f"{path}: expected a scan of {', '.join(SUFFIXES)}")
        stem = path.parent.name if path.name == "mri_norm2.h5" else stem_of(path, SUFFIXES)
        match = CHANNEL.match(stem)
        if match and int(match["channel"]) < channels:
            groups.setdefault((path.parent, match["id"]), {})[int(match["channel"])] = path
        else:
            groups.setdefault((path.parent, stem), {})[0] = path
    cases = []
    for (_, name), parts in groups.items():
        images = tuple(parts[k] for k in sorted(parts))
        cases.append(Case(name, images, None, kind_of(images[0]), "", channels))
    return cases


def load_run(
    run_dir: str | os.PathLike[str], checkpoint: str = "auto", network: str = "student", device: str = "auto"
) -> Any:
    """Return the network of a run on a device, as `semisam.engine.checkpoint.load` does.

    >>> from semisam.engine.checkpoint import CheckpointError
    >>> from semisam.engine.inference import load_run
    >>> try:
    ...     load_run("no/such/run", device="cpu")
    ... except CheckpointError as error:
    ...     print(error)
    no/such/run: expected the folder of a training run, got one without last.ckpt
    """
    from semisam.engine.checkpoint import load  # noqa: PLC0415

    return load(run_dir, checkpoint, network, device_named(device))
