# SPDX-License-Identifier: Apache-2.0
"""Offline teaching: pseudo-labels of whole unlabeled scans, written to files, from which patches are cut.

    teacher's prediction of the scan -> prompts -> generalists -> fused label, weight, doubt -> one file

At step `term.offline_start` and then every `term.refresh` steps all unlabeled scans are labeled by what the
generalists make of the prediction of the teacher of that moment; in between nobody is asked. A generalist
sees the organ whole, as the gate did when it was chosen, and not cut off by the patch.
Papers: SemiSAM+ (arXiv 2502.20749) for the label, Noisy Student (arXiv 1911.04252) for training in rounds.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from semisam import methods
from semisam.engine import checkpoint, inference
from semisam.engine.config import Config, TermConfig, dump
from semisam.engine.files import atomic, write_text
from semisam.engine.position import PositionPrior
from semisam.engine.sampling import PatchSource
from semisam.engine.scans import Case
from semisam.engine.setup import MAY_CHANGE, TrainingError, room_for_scans, scan_device
from semisam.methods.base import PseudoLabel

__all__ = [
    "PseudoLabels",
    "due",
    "first_stage",
    "label_scans",
    "last_round",
    "other_run",
    "place_of",
    "read_round",
    "weights_of",
    "write_table",
]

FIRST_STAGE = "first_stage"  # folder in the run's
COLUMNS = ("case", "weight", "agreement", "uncertainty", "foreground_voxels")


def due(config: Config, step: int) -> bool:
    """Return whether the unlabeled scans are labeled anew before step `step` (from 0).

    >>> from semisam.engine import config, offline
    >>> made = config.load(settings=[
    ...     ("term.offline", True), ("term.offline_start", 100), ("term.refresh", 50), ("train.steps", 200)])
    >>> [step for step in range(200) if offline.due(made, step)]
    [100, 150]
    """
    first, every = start_of(config), config.term.refresh
    return config.term.offline and (
        step == first or (step > first and every > 0 and (step - first) % every == 0)
    )


def start_of(config: Config) -> int:
    """Return the step before which the first round of labels is made.

    `term.offline_start`; by default 0 with the network of another run (`term.offline_from`) or of a first
    stage (`term.first_stage`), else a quarter of the training.

    >>> from semisam.engine import config, offline
    >>> offline.start_of(config.load(settings=[("train.steps", 2000)]))
    500
    """
    if config.term.offline_start is not None:
        return config.term.offline_start
    return 0 if config.term.offline_from or config.term.first_stage else max(config.train.steps // 4, 1)


def last_round(config: Config, step: int) -> int | None:
    """Return the step of the labels that step `step` learns from, None if there are none yet.

    >>> from semisam.engine import config, offline
    >>> made = config.load(settings=[
    ...     ("term.offline", True), ("term.offline_start", 100), ("term.refresh", 50), ("train.steps", 200)])
    >>> offline.last_round(made, 99), offline.last_round(made, 160)
    (None, 150)
    """
    first, every = start_of(config), config.term.refresh
    if not config.term.offline or step < first:
        return None
    return first + (step - first) // every * every if every else first


def place_of(out: Path, step: int) -> Path:
    """Return the folder of a round's files in a run folder.

    >>> from pathlib import Path
    >>> from semisam.engine import offline
    >>> offline.place_of(Path("run"), 100).as_posix()
    'run/pseudo/step_000100'
    """
    return out / "pseudo" / f"step_{step:06d}"


class PseudoLabels:
    """Labels of whole scans in memory, as planes [P, *S] of uint8: target, weight, uncertainty.

    A soft target takes one plane per foreground class (probability x 255, the background is what is left),
    a hard one a single plane (255: ignored); weight and uncertainty are x 255, too. Scans without a label
    have a weight of 0 everywhere.

    >>> import numpy as np, torch
    >>> from semisam.engine.offline import PseudoLabels
    >>> labels = PseudoLabels(num_classes=3, soft=True)
    >>> planes = labels.encoded(np.full((3, 4, 4), 1 / 3), np.ones((4, 4)), np.zeros((4, 4)))
    >>> labels.planes["a"] = planes
    >>> planes.shape, labels.of("b", (4, 4)).any().item()
    ((4, 4, 4), False)
    >>> target = labels.decoded(torch.from_numpy(planes[None])).target  # 85 of 255 for every class
    >>> [round(v, 3) for v in target[0, :, 0, 0].tolist()]
    [0.333, 0.333, 0.333]
    """

    def __init__(self, num_classes: int, *, soft: bool) -> None:
        self.num_classes, self.soft = num_classes, soft
        self.planes: dict[str, Any] = {}
        self.count = (num_classes - 1 if soft else 1) + 2

    def of(self, case: str, shape: Sequence[int]) -> Any:
        """Return the planes of a case, zeros if there are none."""
        found = self.planes.get(case)
        return np.zeros((self.count, *shape), np.uint8) if found is None else found

    def encoded(self, target: Any, weight: Any, uncertainty: Any) -> Any:
        """Return planes [P, *S] of one scan: `target` [C, *S] or hard [*S], the maps [*S]."""
        parts = [_bytes(np.asarray(target)[1:])] if self.soft else [np.asarray(target, np.uint8)[None]]
        return np.concatenate([*parts, _bytes(np.stack([weight, uncertainty]))])

    def decoded(self, planes: Any) -> PseudoLabel:
        """Return the tensors that planes [B, P, *S] stand for."""
        weight, uncertainty = (planes[:, k].float() / 255 for k in (-2, -1))
        if not self.soft:
            return PseudoLabel(planes[:, 0].contiguous(), weight, uncertainty)
        foreground = planes[:, :-2].float() / 255
        q = torch.cat([(1 - foreground.sum(1, keepdim=True)).clamp_min(0), foreground], 1)
        return PseudoLabel(q / q.sum(1, keepdim=True), weight, uncertainty)


def _bytes(values: Any) -> Any:
    return np.rint(255 * np.clip(values, 0, 1)).astype(np.uint8)


# ---- making them ----------------------------------------------------------------------------------


def label_scans(
    config: Config,
    source: PatchSource,
    network: Any,
    term: Any,
    place: Path,
    step: int,
    *,
    fabric: Any,
    prior: PositionPrior | None = None,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Label this rank's share of the unlabeled scans into `place`; what is there and whole is kept.

    A file belongs to the network's weights, the settings and the gate that it was made with: another one is
    made again. `network` is the teacher, or the student of a method without one; every scan is one pass of
    sliding windows and one dialogue, both on the device of `fabric` (the dialogue on the CPU if
    `term.scan_device` says so): one whole scan at a time lies there, its labels come back. With a `prior` the
    generalists are prompted by, and the labels doubted with, the sharpened prediction. `tick` is called
    before every scan and may raise to stop. Raises TrainingError if a file cannot be written, or if the
    device's memory does not suffice.

    >>> import tempfile, torch
    >>> from pathlib import Path
    >>> from semisam.engine import cases, config, offline, setup
    >>> from semisam.engine.phantom import write_phantoms
    >>> from semisam.engine.preprocess import Preprocessing
    >>> from semisam.engine.sampling import PatchSource
    >>> from semisam.engine.stepper import fabric_for
    >>> root = write_phantoms(tempfile.mkdtemp(), labeled=2, unlabeled=1, test=0, shape=(16, 16, 16))
    >>> made = config.load(settings=[("train.patch_size", [16, 16, 16]), ("term.offline", True),
    ...                              ("train.device", "cpu")])
    >>> roles = cases.split(cases.find_cases(root), made.data)
    >>> source = PatchSource(roles, Preprocessing(), made.train, made.data, 2)
    >>> source.pseudo = offline.PseudoLabels(2, soft=True)
    >>> place = offline.place_of(Path(tempfile.mkdtemp()), 5)
    >>> offline.label_scans(made, source, torch.nn.Conv3d(1, 2, 1), setup.build_term(made), place, 5,
    ...                     fabric=fabric_for(made.train))
    >>> [path.name for path in place.iterdir()]
    ['phantom_002.npz']
    >>> offline.read_round(source, place)
    >>> source.pseudo.planes["phantom_002"].shape
    (3, 16, 16, 16)
    """
    labels = source.pseudo
    mark = _mark(config, network, term, prior)
    place.mkdir(parents=True, exist_ok=True)
    network.eval()
    for number in range(fabric.global_rank, len(source.unlabeled_cases), fabric.world_size):
        tick()
        case = source.unlabeled_cases[number]
        if _read(place, case, mark) is not None:
            continue
        image = torch.from_numpy(np.ascontiguousarray(source.image(case)))
        options = {"step": step, "sample_ids": [number], "spacing": source.spacing_of(case)}
        with room_for_scans(config, f"{case.id} {tuple(image.shape[1:])}"):
            found = _taught(config, network, term, image, fabric, prior, options)
        if found is None:  # the teacher sees nothing here, or the generalist failed
            planes, foreground = labels.of("", tuple(image.shape[1:])), 0
        else:
            *maps, foreground = found
            planes = labels.encoded(*maps)
        row = {
            "case": case.id,
            "weight": float(planes[-2].mean(dtype=np.float64) / 255),
            "agreement": term.diagnostics["agreement"],
            "uncertainty": float(planes[-1].mean(dtype=np.float64) / 255),
            "foreground_voxels": foreground,
        }
        _write(place, case, {"planes": planes, "mark": np.array(mark), "row": np.array(json.dumps(row))})


def _taught(
    config: Config, network: Any, term: Any, image: Any, fabric: Any, prior: Any, options: dict[str, Any]
) -> tuple[Any, ...] | None:
    """Target, weight and doubt of a scan as arrays, and its foreground voxels; None where nothing came of it.

    A function of its own so that nothing of the scan is left on the device when the next one comes.
    """
    device = scan_device(config, fabric.device)
    sums = None if device == fabric.device else device
    with fabric.autocast():
        prob = inference.sliding_window(
            network, image, config.train.patch_size, device=fabric.device, accumulate=sums
        )
    if prior is not None:
        prob = torch.from_numpy(prior.sharpen(prob.cpu().numpy()))
    made = term.teach(image[None].to(device), prob[None].to(device), **options)
    if made is None:
        return None
    maps = (a[0].cpu().numpy() for a in (made.target, made.weight, made.uncertainty))
    return *maps, int((made.label[0] > 0).sum())


def first_stage(config: Config) -> Config | None:
    """Return the settings of the run before a run, None if there is none: its method without the term.

    >>> from semisam.engine import config, offline
    >>> made = config.load(settings=[("term.offline", True), ("term.first_stage", 500)])
    >>> first = offline.first_stage(made)
    >>> first.method.name, first.train.steps
    ('mean-teacher', 500)
    """
    if not config.term.first_stage or not methods.needs_term(config.method.name):
        return None
    base = methods.canonical_name(config.method.name).removeprefix("semisam-")
    return replace(
        config,
        method=replace(config.method, name=base),
        term=TermConfig(),
        train=replace(config.train, steps=config.term.first_stage),
    )


def other_run(config: Config, out: Path) -> str | None:
    """Return the folder of the run whose network makes the first labels of a run in `out`, if another.

    >>> from pathlib import Path
    >>> from semisam.engine import config, offline
    >>> made = config.load(settings=[("term.offline", True), ("term.first_stage", 500)])
    >>> Path(offline.other_run(made, Path("runs/a"))).as_posix()
    'runs/a/first_stage'
    """
    return str(out / FIRST_STAGE) if config.term.first_stage else config.term.offline_from


def weights_of(run_dir: str) -> Path:
    """Return the checkpoint that `network_from` takes from a run folder: best.ckpt, else last.ckpt.

    >>> from semisam.engine import offline
    >>> offline.weights_of("runs/first").as_posix()
    'runs/first/last.ckpt'
    """
    best = Path(run_dir) / "best.ckpt"
    return best if best.exists() else best.with_name("last.ckpt")


def network_from(run_dir: str, meta: Mapping[str, Any], device: Any) -> Any:
    """Return the teacher of another run, its student if it has none; TrainingError if it does not fit.

    `meta` has channels, num_classes and spatial_dims of the data. Raises CheckpointError if there is none.

    >>> from semisam.engine import offline
    >>> offline.network_from("no/such/run", {}, "cpu")
    Traceback (most recent call last):
    semisam.engine.checkpoint.CheckpointError: no/such/run: expected the folder of a training run, got ...
    """
    try:
        loaded = checkpoint.load(run_dir, network="teacher", device=device)
    except checkpoint.CheckpointError:
        loaded = checkpoint.load(run_dir, device=device)
    for name in ("channels", "num_classes", "spatial_dims"):
        if loaded.meta[name] != meta[name]:
            raise TrainingError(
                f"term.offline_from: {run_dir}: expected a run with {name} {meta[name]}, as these data have, "
                f"got {loaded.meta[name]}"
            )
    return loaded.network


def _mark(config: Config, network: Any, term: Any, prior: PositionPrior | None) -> str:
    """What a label depends on, as a digest."""
    digest = hashlib.blake2b(digest_size=16)
    settings = dump(config)
    chosen = {"data": settings["data"], "term": settings["term"], "state": term.state_dict()}
    chosen["train"] = {k: settings["train"][k] for k in ("patch_size", "precision", "memory_format", "seed")}
    for name in MAY_CHANGE:  # between a kill and going on
        section, _, key = name.partition(".")
        chosen.get(section, {}).pop(key, None)
    digest.update(json.dumps(chosen, sort_keys=True, default=str).encode())
    if prior is not None:
        digest.update(prior.distance.tobytes())
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _file(place: Path, case: Case) -> Path:
    return place / f"{case.id}.npz"


def _write(place: Path, case: Case, arrays: Mapping[str, Any]) -> None:
    path = _file(place, case)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)
    except OSError as error:
        raise TrainingError(
            f"{path}: cannot be written: {error.strerror}. Free some space, then continue with --resume"
        ) from error


def _read(place: Path, case: Case, mark: str | None) -> Any:
    """The planes of a whole file of this mark (None: of any), else None."""
    try:
        with np.load(_file(place, case)) as file:
            return file["planes"] if mark is None or str(file["mark"]) == mark else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


# ---- using them -----------------------------------------------------------------------------------


def read_round(source: PatchSource, place: Path) -> None:
    """Put the labels of a round's files into `source.pseudo`, in the place of earlier ones.

    Raises TrainingError for a file that is missing, damaged or of another shape than its scan.

    >>> from pathlib import Path
    >>> from types import SimpleNamespace
    >>> from semisam.engine import offline
    >>> source = SimpleNamespace(unlabeled_cases=[], pseudo=offline.PseudoLabels(2, soft=True))
    >>> offline.read_round(source, Path("run/pseudo/step_000100"))
    >>> source.pseudo.planes
    {}
    """
    labels: dict[str, Any] = {}
    for case in source.unlabeled_cases:
        planes = _read(place, case, None)
        if planes is None:
            raise TrainingError(
                f"{_file(place, case)}: is missing or damaged, and the teacher that made it is gone: start "
                f"the run again in another folder"
            )
        expected = (source.pseudo.count, *source.image(case).shape[1:])
        if planes.shape != expected or planes.dtype != np.uint8:
            raise TrainingError(
                f"{_file(place, case)}: expected uint8 planes {expected}, got {planes.dtype} {planes.shape}"
            )
        labels[case.id] = planes
    source.pseudo.planes = labels


def write_table(source: PatchSource, place: Path) -> list[dict[str, Any]]:
    """Write `labels.csv` of a round, one row per scan, and remove the rounds before it; return the rows.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from types import SimpleNamespace
    >>> from semisam.engine import offline
    >>> place = Path(tempfile.mkdtemp())
    >>> offline.write_table(SimpleNamespace(unlabeled_cases=[]), place)
    []
    >>> (place / "labels.csv").read_text().split(",")[:2]
    ['case', 'weight']
    """
    rows = []
    for case in source.unlabeled_cases:
        with np.load(_file(place, case)) as file:
            rows.append(json.loads(str(file["row"])))
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(place / "labels.csv", out.getvalue())
    for old in sorted(place.parent.glob("step_*")):
        if old.name < place.name:
            shutil.rmtree(old, ignore_errors=True)
    return rows
