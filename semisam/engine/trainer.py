# SPDX-License-Identifier: Apache-2.0
"""Training from files to checkpoints: `train`, and the loop in `_Training.run`.

Everything that happens in step t is a function of the settings, the weights and t: a run that was killed
at any moment continues from its last checkpoint and ends with the weights that it would have had.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from semisam import methods, metrics, specialists
from semisam.engine import checkpoint, gate, inference, offline, record
from semisam.engine.cases import CaseSet, Split, find_cases, read_image, read_label
from semisam.engine.cases import split as make_split
from semisam.engine.checkpoint import CheckpointError, Loaded, load
from semisam.engine.config import Config, ConfigError, check, dump
from semisam.engine.files import Table, write_json, write_text
from semisam.engine.position import PositionPrior
from semisam.engine.preprocess import Preprocessing
from semisam.engine.progress import progress, say
from semisam.engine.published import LeakedLabels
from semisam.engine.sampling import PatchSource
from semisam.engine.setup import (
    TrainingError,
    build_term,
    check_data,
    check_folder,
    check_patch,
    is_out_of_memory,
    overlaps,
    room_for_scans,
    scan_device,
)
from semisam.engine.stepper import NotFinite, Stepper, fabric_for
from semisam.generalists.cache import can_be_cached

__all__ = ["CheckpointError", "Interrupted", "Loaded", "Run", "TrainingError", "load", "train"]

DIAGNOSTICS = (
    *("term_weight", "term_mean_u", "term_agreement", "term_clicks", "term_skipped", "term_failed_rows"),
    *("term_ms_generalist", "term_ms_rest", "term_s", "term_mb", "term_cache_hits", "term_cache_misses"),
)
ROUNDED = ("term_ms_generalist", "term_ms_rest", "term_s", "term_mb")
SAMPLES = 6


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM (`number`) arrived; last.ckpt was saved.

    >>> from semisam.engine.trainer import Interrupted
    >>> print(Interrupted(15, 200))
    stopped by SIGTERM after step 200
    """

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}")
        self.number = number


@dataclass
class Run:
    """What a training left behind: the folder, steps done, and step and Dice of the best checkpoint.

    >>> from pathlib import Path
    >>> from semisam.engine.trainer import Run
    >>> Run(Path("runs/first"), 6000, {"step": 5800, "dice": 0.86}, 3600.0).best["dice"]
    0.86
    """

    out: Path
    steps: int
    best: dict[str, float] | None
    seconds: float


def train(
    config: Config,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    case_set: CaseSet | None = None,
    split: Split | None = None,
    command: Sequence[str] | None = None,
) -> Run:
    """Train a specialist on the data of `config`, everything into the folder `out`, and return the run.

    The folder gets config.yaml, run.json, log.csv, validation.csv, gate.csv, last.ckpt, best.ckpt, samples/.
    It must be new or empty, unless `resume`: then training goes on from last.ckpt (from the start if
    there is none), and settings that decide about the weights must be those of config.yaml. `case_set`
    and `split` replace what `config.data` says. With `term.first_stage` the method without the term is
    trained first, into the folder first_stage in `out`; a new network learns from its labels. Under
    `torchrun` all processes train one network; rank 0 writes. SIGINT and SIGTERM save a checkpoint and
    raise Interrupted.

    Raises ConfigError for settings, CaseError for data, TrainingError for the rest that a user can mend (run
    folder, memory, numbers that are not finite), CheckpointError if a checkpoint cannot be written or read.

    >>> import pathlib, tempfile
    >>> from semisam.engine import config, trainer
    >>> from semisam.engine.phantom import write_phantoms
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> root = write_phantoms(folder / "data", labeled=1, unlabeled=1, test=0, shape=(16, 16, 16))
    >>> made = config.load(settings=[
    ...     ("data.root", str(root)), ("method.name", "mean-teacher"), ("train.steps", 2),
    ...     ("train.patch_size", [16, 16, 16]), ("specialist.options", {"channels": [4, 8]})])
    >>> trainer.train(made, folder / "run").steps
    2
    >>> type(trainer.load(folder / "run").network).__name__
    'UNet3d'
    """
    check(config)
    before = torch.are_deterministic_algorithms_enabled()
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        with _signals() as received:
            given = (case_set, split, command, received)
            seconds = 0.0
            first = offline.first_stage(config)
            if first is not None:
                seconds = _first_stage(config, first, Path(out), resume, *given)
                resume = True  # the folder is there now
            return _Training(config, Path(out), resume, *given, seconds=seconds).run()
    except TrainingError:
        raise
    except RuntimeError as error:
        if is_out_of_memory(error):
            t = config.train
            raise TrainingError(
                f"the GPU's memory does not suffice: lower train.batch_size (now {t.batch_size}), "
                f"train.patch_size (now {t.patch_size}) or train.precision (now {t.precision}; bf16 and fp16 "
                f"take half); train.accumulate makes up for a smaller batch ({str(error).splitlines()[0]})"
            ) from error
        if "DataLoader worker" not in str(error):
            raise
        raise TrainingError(
            f"a data worker died, most often for lack of memory: lower data.workers (now "
            f"{config.data.workers}; 0 needs none) and continue with --resume ({error})"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before)


def _first_stage(config: Config, first: Config, out: Path, resume: bool, *given: Any) -> float:
    """Train the run before a run, or what is missing of it; return how many seconds it took.

    What the run itself would refuse is refused now, not after its first stage.
    """
    fabric, place = fabric_for(config.train), out / offline.FIRST_STAGE
    check_folder(out, config, resume)
    record_file = place / "run.json"
    done = json.loads(record_file.read_text(encoding="utf-8")) if record_file.exists() else {}
    fabric.barrier()  # before rank 0 makes the folder
    if done.get("finished"):
        return float(done["seconds"])
    case_set, split, *rest = given
    case_set = case_set or find_cases(config.data.root, config.data.layout)
    split = split or make_split(case_set, config.data)
    build_term(config, case_set.spatial_dims, len(split.class_names) - 1)
    training = _Training(first, place, True, case_set, split, *rest)
    if fabric.is_global_zero:
        write_text(out / "config.yaml", yaml.safe_dump(dump(config), sort_keys=False))
        say(f"first stage: {first.method.name}, {first.train.steps} steps, in {place}")
    return training.run().seconds


class _Training:
    """One run: what it is made of (`__init__`), the loop (`run`), and what the loop calls."""

    def __init__(
        self,
        config: Config,
        out: Path,
        resume: bool,
        case_set: CaseSet | None,
        split: Split | None,
        command: Sequence[str] | None,
        received: list[int],
        seconds: float = 0.0,
    ) -> None:
        self.config, self.out, self.received = config, out, received
        self.board_kind = _board_kind() if config.train.tensorboard else None
        self.board: Any = None
        self.fabric = fabric_for(config.train)
        self.first = self.fabric.is_global_zero
        check_folder(out, config, resume)
        self.fabric.barrier()  # before rank 0 makes the folder
        case_set = case_set or find_cases(config.data.root, config.data.layout)
        self.split = split or make_split(case_set, config.data)
        self.preprocessing = Preprocessing.of(config, case_set.spatial_dims)
        self.meta: dict[str, Any] = {
            "class_names": list(self.split.class_names),
            "num_classes": len(self.split.class_names),
            "spatial_dims": case_set.spatial_dims,
            "channels": case_set.channels,
            "layout": case_set.layout,
            "best": None,
            "gate": None,
            "seconds": seconds,
        }
        torch.manual_seed(config.train.seed)
        student = checkpoint.network_of(config, self.meta)
        check_patch(config, student, case_set.spatial_dims)
        if config.specialist.weights:
            specialists.load_weights(student, config.specialist.weights)
        uses_unlabeled = methods.needs_unlabeled(config.method.name)
        if not uses_unlabeled:
            self.split.unlabeled = []
        elif not self.split.unlabeled and self.first:
            say("there are no unlabeled cases: only labeled ones are learned from")
        self.source = PatchSource(
            *(self.split, self.preprocessing, config.train, config.data, self.meta["num_classes"]),
            *(self.fabric.global_rank, self.fabric.world_size),
        )
        self.meta["spacing"] = self.source.spacing and list(self.source.spacing)
        self.term: Any = None
        self.overlaps: list[str] = []
        if methods.needs_term(config.method.name):
            self.term = build_term(config, case_set.spatial_dims, self.meta["num_classes"] - 1)
            self.overlaps = overlaps(self.term, case_set)
            if self.first and self.term.cache is not None and not self._cached():
                say("term.cache: these generalists have no encoder outputs that could be kept")
        self._open_labels(case_set)
        if self.term is not None and config.term.offline and self.split.unlabeled:
            soft = self.term.settings["target"] == "soft"
            self.source.pseudo = offline.PseudoLabels(self.meta["num_classes"], soft=soft)
        self.method = methods.build(
            *(config.method, student),
            num_classes=self.meta["num_classes"],
            total_steps=config.train.steps,
            seed=config.train.seed,
            term=self.term,
            channels=case_set.channels,
            spatial_dims=case_set.spatial_dims,
        )
        self.stepper = Stepper(self.fabric, config.train, self.method, config.train.steps)
        self.done = 0
        self._open_folder(command)

    def _cached(self) -> list[str]:
        """Names of the generalists whose encoder outputs are kept."""
        return [name for name, made in self.term.generalists.items() if can_be_cached(made)]

    def _open_labels(self, case_set: CaseSet) -> None:
        """For the leaky reference, and loudly."""
        defects = getattr(self.term, "defects", None)
        if defects is None:
            return
        self.meta["defects"] = list(defects.numbers)
        if self.first:
            say(
                "WARNING: the preset 'published' does wrong on purpose; its results must not be reported as a"
            )
            say(f"WARNING: method's. Defects that are on: {', '.join(defects.numbers) or 'none'}")
            for sentence in defects.sentences:
                say(f"WARNING: {sentence}")
        if defects.label_clicks:
            if self.first:
                say("WARNING: labels of unlabeled scans are opened")
            self.term.open_labels(LeakedLabels(self.config, case_set, self.split, self.preprocessing))

    # ---- the loop -------------------------------------------------------------------------------

    def run(self) -> Run:
        """Train from where the run is to its last step."""
        train, total = self.config.train, self.config.train.steps
        self._restore_or_begin()
        self._open_tables()
        started = time.monotonic() - self.meta["seconds"]
        batches: Any = None
        steps = range(self.done, total)
        for step in progress(steps, total, "training", initial=self.done, show=self.first):
            if batches is None or (self.source.pseudo is not None and offline.due(self.config, step)):
                batches = self._batches_from(step, batches)
            batch = [next(batches) for _ in range(train.accumulate)]
            try:
                values = self.stepper.step(step, batch)
            except NotFinite as error:
                raise self._not_finite(step, error) from error
            self.done = step + 1
            self.meta["seconds"] = time.monotonic() - started
            self._log(values)
            if self.term is not None and self.config.term.gate and self._due(self.config.term.gate_every):
                self._score_generalists(batch[-1])
            if self._due(train.validate_every) and self.split.validation:
                self._validate()
            if self._due(train.checkpoint_every):
                self._save("last")
            self._stop_if_asked()
        if self.first:
            self._record(finished=True)
        if self.board is not None:
            self.board.close()
        self.fabric.barrier()
        return Run(self.out, self.done, self.meta["best"], self.meta["seconds"])

    def _batches_from(self, step: int, before: Any) -> Iterator[Any]:
        """The batches from a step on; in an offline run with the labels that belong to it."""
        if before is not None:
            before.close()
        if self.source.pseudo is not None:
            known = offline.last_round(self.config, step)
            if known == step:
                self._label_scans(step)
            if known is not None:
                offline.read_round(self.source, offline.place_of(self.out, known))
        return self.source.loader(step * self.config.train.accumulate)

    def _label_scans(self, step: int) -> None:
        """A round of labels of the whole unlabeled scans; a killed one goes on where it was."""
        if step:
            self._save("last")  # from here on the labels of the round before are not needed any more
        student: Any = self.method.student
        teacher: Any = student if self.method.teacher is None else self.method.teacher
        other = offline.other_run(self.config, self.out)
        if step == 0 and other:
            teacher = offline.network_from(other, self.meta, self.fabric.device)
        place, cache = offline.place_of(self.out, step), self.term.cache
        known = 0 if cache is None else cache.hits
        alone = self.fabric.world_size == 1  # ranks have different numbers of scans
        offline.label_scans(
            *(self.config, self.source, teacher, self.term, place, step),
            prior=self._position_prior(),
            fabric=self.fabric,
            tick=self._stop_if_asked if alone else lambda: None,
        )
        student.train()  # where it is the one that was asked
        self.fabric.barrier()
        if self.first:
            rows = offline.write_table(self.source, place)
            share = sum(row["weight"] for row in rows) / len(rows)
            silent = sum(row["weight"] == 0 for row in rows)
            without = f", {silent} of them without a label" if silent else ""
            cached = f", {cache.hits - known} images known before" if cache is not None else ""
            say(
                f"step {step}: {len(rows)} unlabeled scans labeled as wholes{without}, mean weight "
                f"{share:.3f}{cached}"
            )
            if silent == len(rows):
                base = self.config.method.name.removeprefix("semisam-")
                say(
                    f"WARNING: no scan has a label, so that this round teaches nothing beyond {base}: most "
                    "often the network that was asked had been trained too little"
                )
        self.fabric.barrier()

    def _position_prior(self) -> Any:
        """The labeled scans' position prior, unless there is none or the gate found it of no use."""
        strength = self.config.term.position_prior
        judged = self.config.term.gate
        if not strength or (judged and not (self.meta["gate"] or {}).get("position_prior")):
            return None
        labels = [gate.source_label(self.config, self.preprocessing, c) for c in self.split.labeled]
        return PositionPrior(labels, self.meta["num_classes"], strength=strength)

    def _due(self, every: int) -> bool:
        return self.done % every == 0 or self.done == self.config.train.steps

    def _stop_if_asked(self) -> None:
        number = self.received[0] if self.received else 0
        if self.fabric.world_size > 1:  # all ranks stop after the same step
            asked = torch.tensor(float(number), device=self.fabric.device)
            number = int(self.fabric.all_reduce(asked, reduce_op="sum"))
            number = self.received[0] if self.received else signal.SIGTERM if number else 0
        if number:
            if self.done and self.tables:
                self._save("last")
            raise Interrupted(number, self.done)

    def _not_finite(self, step: int, error: NotFinite) -> TrainingError:
        path = self.out / "nan" / f"step_{step:06d}.pt"
        if self.fabric.global_rank:
            path = path.with_name(f"step_{step:06d}_rank_{self.fabric.global_rank}.pt")
        path.parent.mkdir(exist_ok=True)
        inputs = [{"image": b.image, "label": b.label, "ids": list(b.ids)} for b in error.batches]
        checkpoint.save(
            path,
            {
                "format": checkpoint.FORMAT,
                "step": step,
                "losses": error.values,
                "batches": inputs,
                "student": self.method.student.state_dict(),
            },
        )
        return TrainingError(
            f"step {step}: {', '.join(error.names)} is not finite; the step's inputs and weights are in "
            f"{path}, last.ckpt is of an earlier step. Lower train.lr (now {self.config.train.lr}), set "
            f"train.clip_gradient, or look at the images"
        )

    # ---- beginning and going on -----------------------------------------------------------------

    def _open_folder(self, command: Sequence[str] | None) -> None:
        self.tables: dict[str, Table] = {}
        self.digests = record.digests(self.split) if self.first else {}
        if self.first and (self.out / "run.json").exists():
            check_data(self.out, self.digests)
        self.command = list(command or [])
        if self.first:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / "samples").mkdir(exist_ok=True)
            write_text(self.out / "config.yaml", yaml.safe_dump(dump(self.config), sort_keys=False))
            if not (self.out / "run.json").exists():
                self._record(finished=False)

    def _record(self, *, finished: bool) -> None:
        weights = self.config.specialist.weights
        write_json(
            self.out / "run.json",
            {
                "command": self.command,
                "method": methods.canonical_name(self.config.method.name),
                "versions": record.versions(),
                "split": self.split.ids(),
                "seed": self.config.train.seed,
                **{name: self.meta[name] for name in self.meta if name not in ("best", "seconds")},
                "parameters": sum(p.numel() for p in self.method.student.parameters()),
                "device": _device_name(self.fabric.device),
                "precision": str(self.fabric.strategy.precision.precision),
                "processes": self.fabric.world_size,
                "sha256": self.digests,
                "start_weights": weights and {"path": weights, "sha256": record.sha256(Path(weights))},
                "generalist_weights": self._generalist_weights(),
                "generalist_overlaps": self.overlaps,
                "offline_from": self._offline_from(),
                "steps": self.done,
                "finished": finished,
                "best": self.meta["best"],
                "seconds": round(self.meta["seconds"], 3),
            },
        )

    def _generalist_weights(self) -> dict[str, dict[str, Any]]:
        """The files that generalists were given, by name, with their hashes; one per file of a folder."""
        if self.term is None:
            return {}
        found: dict[str, dict[str, Any]] = {}
        for name, made in zip(self.config.term.generalists, self.term.generalists.values(), strict=True):
            files = tuple(getattr(made, "files", ()))
            options = self.config.term.generalist_options.get(name, {})
            given = options.get("checkpoint") or (files and files[0]) or ""
            if given:
                single = Path(given).is_file()
                hashed = record.sha256(Path(given)) if single else {f.name: record.sha256(f) for f in files}
                found[name] = {"path": str(given), "sha256": hashed}
        return found

    def _offline_from(self) -> dict[str, str] | None:
        """The checkpoint of another run that makes the first labels, with its hash."""
        other = offline.other_run(self.config, self.out)
        if self.term is None or not (self.config.term.offline and other):
            return None
        path = offline.weights_of(other)
        return {"path": str(path), "sha256": record.sha256(path)}

    def _restore_or_begin(self) -> None:
        last = self.out / "last.ckpt"
        self.fabric.barrier()
        if not last.exists():
            if self.first:
                for text in self.overlaps:
                    say(f"warning: {text}")
            if self.term is not None and self.config.term.gate:
                self._calibrate()
            self._save("last")
            return
        state = checkpoint.read(last)
        self.method.student.load_state_dict(state["student"])
        if self.method.teacher is not None:
            self.method.teacher.load_state_dict(state["teacher"])
        self.stepper.optimizer.load_state_dict(state["optimizer"])
        self.stepper.load_scaler(state["scaler"])
        self.method.load_state_dict(state["method"])
        torch.set_rng_state(state["rng"])
        self.done, self.meta = state["step"], state["meta"]
        if self.first:
            say(f"{self.out}: continues after step {self.done} of {self.config.train.steps}")
            self._record(finished=False)

    def _open_tables(self) -> None:
        classes = ("step", "candidate", "class", "dice", "chosen")
        losses = [*self.method.terms, *self.method.measures] if self.split.unlabeled else ["ce", "dice"]
        log = ("step", "loss", *losses, "lr", "seconds", *(DIAGNOSTICS if self.term is not None else ()))
        columns = {"log": log}
        if self.split.validation:
            columns["validation"] = ("step", "network", "case", "class", "dice")
        if self.term is not None and self.config.term.gate:
            columns["gate"] = classes
        for name, names in columns.items():
            place = self.out / f"{name}.csv"
            self.tables[name] = Table(place, names, keep=self.done or -1, write=self.first)
        if (
            self.first and self.board_kind is not None
        ):  # what a killed run wrote beyond its checkpoint is void
            self.board = self.board_kind(str(self.out / "tensorboard"), purge_step=self.done + 1)
        if self.done == 0 and "gate" in self.tables and self.meta["gate"]:
            self._log_gate(self.meta["gate"])

    def _save(self, name: str) -> None:
        if not self.first:
            return
        teacher = self.method.teacher
        state = {
            "format": checkpoint.FORMAT,
            "step": self.done,
            "student": self.method.student.state_dict(),
            "teacher": None if teacher is None else teacher.state_dict(),
            "optimizer": self.stepper.optimizer.state_dict(),
            "scaler": self.stepper.scaler,
            "method": self.method.state_dict(),
            "rng": torch.get_rng_state(),
            "config": dump(self.config),
            "meta": self.meta,
        }
        checkpoint.save(self.out / f"{name}.ckpt", state)

    # ---- what is written while training ---------------------------------------------------------

    def _log(self, values: dict[str, float]) -> None:
        if self.done == 1 or self._due(self.config.train.log_every):
            row = {**values, **self.method.measured, "seconds": round(self.meta["seconds"], 3)}
            if self.term is not None:
                found = {name: self.term.diagnostics.get(name.removeprefix("term_")) for name in DIAGNOSTICS}
                row |= {n: round(v, 3) if n in ROUNDED and v is not None else v for n, v in found.items()}
            self.tables["log"].add(step=self.done, **row)
            if self.board is not None:
                for name, value in row.items():
                    if value is not None:
                        self.board.add_scalar(name, value, self.done)
        wanted = {round(k * self.config.train.steps / SAMPLES) for k in range(1, SAMPLES + 1)}
        last = getattr(self.term, "last", None)
        if last is not None and self.done in wanted and self.first:
            path = self.out / "samples" / f"step_{self.done:06d}.npz"
            record.write_sample(path, last, *self.method.unlabeled)

    def _validate(self) -> None:
        """Dice of student and teacher on the validation cases, which the ranks share."""
        cases, classes = self.split.validation, self.meta["num_classes"]
        networks = {"student": self.method.student}
        if self.method.teacher is not None:
            networks["teacher"] = self.method.teacher
        dice = torch.zeros(len(networks), len(cases), classes - 1, dtype=torch.float64)
        for i in range(self.fabric.global_rank, len(cases), self.fabric.world_size):
            prepared = self.preprocessing.prepare(read_image(cases[i]))
            truth = read_label(cases[i], self.config.data.label_map)
            for k, network in enumerate(networks.values()):
                patch = self.config.train.patch_size
                with self.fabric.autocast():
                    prob = inference.sliding_window(network, prepared.image, patch)
                labels = self.preprocessing.restore(prob, prepared).argmax(0).astype(np.uint8)
                found = metrics.dice(labels[None, None], truth[None, None], False, False, classes, 255)
                dice[k, i] = torch.from_numpy(found[0])
        if self.fabric.world_size > 1:
            dice = self.fabric.all_reduce(dice.to(self.fabric.device), reduce_op="sum").cpu()
        for k, name in enumerate(networks):
            for i, case in enumerate(cases):
                for c, value in enumerate(dice[k, i].tolist(), 1):
                    row = {"network": name, "case": case.id, "class": self.meta["class_names"][c]}
                    self.tables["validation"].add(step=self.done, **row, dice=value)
        means = dict(zip(networks, dice.mean((1, 2)).tolist(), strict=True))
        chosen = next(n for n, network in networks.items() if network is self.method.evaluation_network())
        if self.first:
            say(f"step {self.done}: validation Dice", ", ".join(f"{v:.4f} ({n})" for n, v in means.items()))
        if self.meta["best"] is None or means[chosen] > self.meta["best"]["dice"]:
            self.meta["best"] = {"step": self.done, "dice": means[chosen], "network": chosen}
            self._save("best")

    # ---- the gate -------------------------------------------------------------------------------

    def _calibrate(self) -> None:
        """Let the term choose its source on scans that short runs did not train on."""
        if self.first:
            steps = gate.gate_steps(self.config)
            say(f"gate: who may teach? Runs of {steps} steps, each without one labeled patient")
        try:
            scans = list(
                gate.held_out(
                    *(self.config, self.split, self.preprocessing, self.meta, self.fabric),
                    tick=self._stop_if_asked,
                )
            )
        except NotFinite as error:
            raise TrainingError(
                f"the gate's short runs: {', '.join(error.names)} is not finite. Lower train.lr (now "
                f"{self.config.train.lr}), set train.clip_gradient, or look at the labeled images"
            ) from error
        if self.first:
            with room_for_scans(self.config, "gate"):
                found = gate.choose(self.term, scans, device=scan_device(self.config, self.fabric.device))
            say(f"gate: {gate.sentence(found)}")
            self.meta["gate"] = found
        self._share_term()
        if self.fabric.world_size > 1:
            self.meta["gate"] = self.fabric.broadcast(self.meta["gate"])

    def _score_generalists(self, batch: Any) -> None:
        """Keep the generalists' reliabilities up to date, on disturbed labeled patches."""
        if self.first:
            random = np.random.default_rng([self.config.train.seed, self.done])
            labeled = batch.image[: batch.labeled].numpy()
            copies = [gate.disturbed(image, None, random, rotate=False)[0] for image in labeled]
            images = torch.from_numpy(np.stack(copies)).to(self.fabric.device)  # generalists follow them
            with self.fabric.autocast():
                probs = self.method.prompt_probabilities(images)
            self._log_gate(self.term.score(images, probs, batch.label, batch.spacing))
        self._share_term()

    def _log_gate(self, found: dict[str, Any]) -> None:
        names = self.meta["class_names"][1:]
        teaching = {found["best"], *(c for name, c in found["choice"].items() if c == name)}
        for candidate, values in found["per_class"].items():
            chosen = int(candidate in teaching)
            for name, value in zip(names, values, strict=True):
                row = {"candidate": candidate, "class": name, "dice": value, "chosen": chosen}
                self.tables["gate"].add(step=self.done, **row)

    def _share_term(self) -> None:
        if self.fabric.world_size > 1:
            self.term.load_state_dict(self.fabric.broadcast(self.term.state_dict()))


def _board_kind() -> Any:
    """TensorBoard's writer; ConfigError where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(
            "train.tensorboard: expected false, as TensorBoard is not installed (pip install "
            f"'semisam[tensorboard]'), got true ({error})"
        ) from error
    return SummaryWriter


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM; the second one acts as if this were not here."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _: Any) -> None:
        received.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
