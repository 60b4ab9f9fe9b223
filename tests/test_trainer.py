# SPDX-License-Identifier: Apache-2.0
"""Training from files: what a run writes, that nothing leaks into it, and that it survives the night."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from multiprocessing import active_children
from types import SimpleNamespace

import numpy as np
import processes
import pytest
import torch
from conftest import data_dir

from semisam import methods, specialists
from semisam.cli import main
from semisam.engine import checkpoint, config, gate, record, trainer
from semisam.engine.cases import CaseError, find_cases
from semisam.engine.cases import split as make_split
from semisam.engine.files import Table, atomic, read_table, write_text
from semisam.engine.phantom import write_phantoms
from semisam.engine.preprocess import Preprocessing
from semisam.engine.progress import progress
from semisam.engine.published import LeakedLabels
from semisam.engine.sampling import PatchSource
from semisam.engine.stepper import Stepper, fabric_for, memory_format_of
from semisam.methods.base import Batch
from semisam.term import SemiSAMTerm

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {
    "specialist.options": {"channels": [4, 8]},
    "method.discriminator_channels": [4, 8],
    "train.patch_size": [16, 16, 16],
    "train.steps": 6,
    "train.device": "cpu",
    "train.checkpoint_every": 2,
    "train.validate_every": 3,
    "train.log_every": 1,
    "term.gate_steps": 2,
    "term.gate_every": 3,
    "data.labeled": 2,
    "data.validation": 1,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four labeled scans and three without a label."""
    root = tmp_path_factory.mktemp("phantoms")
    return write_phantoms(root, labeled=4, unlabeled=3, test=0, shape=(20, 20, 20))


def flat(images, prompts):
    """A function by its dotted name is a generalist, too."""
    return 4.0 * images


def settings(data, **more):
    changed = {"data.root": str(data), **TINY, **{k.replace("__", "."): v for k, v in more.items()}}
    return config.load(settings=list(changed.items()))


def weights(run, name="last", network="student"):
    return checkpoint.read(run / f"{name}.ckpt")[network]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def losses(run):
    clocks = ("seconds", "term_ms_generalist", "term_ms_rest", "term_s", "term_mb")
    return [{k: v for k, v in row.items() if k not in clocks} for row in read_table(run / "log.csv")]


def words(settings_of, out, *more):
    """The command line that means these settings."""
    pairs = config.differences(config.Config(), settings_of)
    sets = [w for key, (_, value) in pairs.items() for w in ("--set", f"{key}={json.dumps(value)}")]
    return ["train", "--out", str(out), *sets, *more]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run of the default method that nothing disturbed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    torch.set_num_threads(1)
    trainer.train(settings(data), out, command=["semisam", "train"])
    return out


# ---- what a run writes --------------------------------------------------------------------------


def test_a_run_folder_has_everything(whole, data):
    names = {path.name for path in whole.iterdir()}
    assert names >= {
        "config.yaml",
        "run.json",
        "log.csv",
        "validation.csv",
        "gate.csv",
        "last.ckpt",
        "best.ckpt",
    }
    assert not [name for name in names if name.startswith(".")]
    run = json.loads((whole / "run.json").read_text())
    assert run["finished"] is True
    assert run["steps"] == 6
    assert run["method"] == "semisam-mean-teacher"
    assert run["class_names"] == ["background", "organ"]
    assert run["spacing"] == [1.0, 1.0, 1.0]
    assert set(run["versions"]) >= {"semisam", "torch", "monai", "python"}
    assert [len(run["split"][role]) for role in ("labeled", "unlabeled", "validation")] == [2, 4, 1]
    assert len(run["sha256"]) == 7 + 3  # images, and labels of labeled and validation cases
    path = find_cases(data).cases[0].images[0]
    assert run["sha256"][str(path)] == record.sha256(path)
    assert config.load(whole / "config.yaml") == settings(data)


def test_tables_have_their_columns(whole):
    log = read_table(whole / "log.csv")
    assert [row["step"] for row in log] == ["1", "2", "3", "4", "5", "6"]
    terms = ("ce", "dice", "consistency", "semisam")
    for row in log:
        assert float(row["loss"]) == pytest.approx(sum(float(row[name]) for name in terms), rel=1e-6)
    assert set(log[0]) >= {"lr", "seconds", "term_weight", "term_mean_u", "term_clicks", "term_skipped"}
    assert {row["term_failed_rows"] for row in log} == {"0"}
    assert float(log[-1]["term_ms_rest"]) > 0
    assert float(log[-1]["term_s"]) >= float(log[-1]["term_ms_rest"]) / 1e3
    assert all(row["term_mb"] == "" or float(row["term_mb"]) >= 0 for row in log)
    assert {row[f"term_cache_{what}"] for row in log for what in ("hits", "misses")} == {"0"}
    assert float(log[0]["lr"]) == 0.01
    assert float(log[3]["lr"]) == pytest.approx(0.01 * 0.5**0.9)
    validation = read_table(whole / "validation.csv")
    assert {(r["step"], r["network"]) for r in validation} == {
        (step, network) for step in ("3", "6") for network in ("student", "teacher")
    }
    rows = read_table(whole / "gate.csv")
    assert {row["step"] for row in rows} == {"0", "3", "6"}
    assert {row["candidate"] for row in rows} == {"mask", "largest_component", "random-walker"}
    assert {row["chosen"] for row in rows if row["step"] == "0"} == {"0", "1"}


def test_a_generalist_that_does_not_fit_is_refused_before_anything_is_trained(data, tmp_path):
    made = settings(data, term__generalists=["test_trainer.flat"])
    made.term.generalist_options = {"test_trainer.flat": {"spatial_dims": [2]}}
    with pytest.raises(config.ConfigError, match=r"term.generalists: .*flat takes 2-D images, got 3-D"):
        trainer.train(made, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    made.term.generalist_options = {}
    assert trainer.train(made, tmp_path / "run").steps == 6


def test_loading_a_run(whole):
    loaded = trainer.load(whole)
    assert loaded.checkpoint == "best"
    assert not loaded.network.training
    assert loaded.meta["class_names"] == ["background", "organ"]
    best = json.loads((whole / "run.json").read_text())["best"]
    assert loaded.step == best["step"]
    last = trainer.load(whole, "last", "teacher")
    assert same(last.network.state_dict(), weights(whole, network="teacher"))
    assert last.network(torch.zeros(1, 1, 16, 16, 16)).shape == (1, 2, 16, 16, 16)
    with pytest.raises(ValueError, match="expected one of auto, best, last"):
        trainer.load(whole, "latest")
    with pytest.raises(trainer.CheckpointError, match="expected the folder of a training run"):
        trainer.load(whole.parent)


def test_loading_does_not_touch_random_numbers(whole):
    state = torch.get_rng_state()
    trainer.load(whole)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_best_checkpoint_is_the_best_by_validation(whole):
    rows = [row for row in read_table(whole / "validation.csv") if row["network"] == "student"]
    by_step = {row["step"]: float(row["dice"]) for row in rows}
    best = checkpoint.read(whole / "best.ckpt")
    assert best["meta"]["best"]["dice"] == pytest.approx(max(by_step.values()), rel=1e-6)
    assert str(best["step"]) == max(by_step, key=by_step.get)


def test_without_validation_there_is_only_last(data, tmp_path):
    run = trainer.train(
        settings(data, data__validation=0, method__name="mean-teacher", train__steps=2), tmp_path / "r"
    )
    assert run.best is None
    assert not (run.out / "validation.csv").exists()
    assert trainer.load(run.out).checkpoint == "last"
    with pytest.raises(trainer.CheckpointError, match=r'no best\.ckpt.*use the checkpoint "last"'):
        trainer.load(run.out, "best")


def test_supervised_has_no_teacher_and_no_gate(data, tmp_path):
    run = trainer.train(settings(data, method__name="supervised", train__steps=2), tmp_path / "r")
    assert not (run.out / "gate.csv").exists()
    assert set(losses(run.out)[0]) == {"step", "loss", "ce", "dice", "lr"}
    assert json.loads((run.out / "run.json").read_text())["split"]["unlabeled"] == []
    with pytest.raises(trainer.CheckpointError, match="'supervised' has no teacher; use the student"):
        trainer.load(run.out, "last", "teacher")


@pytest.mark.parametrize(
    "more",
    [
        {"method__name": "semisam-ua-mt", "method__mc_passes": 2},
        {"method__name": "semisam-dan", "train__accumulate": 2},
        {"train__optimizer": "adam", "train__schedule": "step", "train__milestones": [1, 2]},
        {"train__precision": "bf16", "train__accumulate": 2, "train__clip_gradient": 1.0},
        {"train__schedule": "constant", "train__deterministic": True, "method__name": "mt"},
        {"data__unlabeled": 0, "train__augment": False},
        {"data__labeled": 1, "specialist__name": "vnet", "data__validation": 0},
        {"specialist__name": "monai.networks.nets.UNet", "method__name": "mt",
         "specialist__options": {"channels": [4, 8], "strides": [2], "spatial_dims": 3}},
    ],
    ids=lambda more: "-".join(str(v) for v in more.values() if not isinstance(v, dict))[:40],
)  # fmt: skip
def test_other_settings_train_too(data, tmp_path, more):
    run = trainer.train(settings(data, **{"train__steps": 3, **more}), tmp_path / "r")
    rows = losses(run.out)
    assert len(rows) == 3
    assert all(np.isfinite(float(row["loss"])) for row in rows)
    assert not torch.are_deterministic_algorithms_enabled()
    if more.get("train__schedule") == "step":
        assert [float(row["lr"]) for row in rows] == pytest.approx([0.01, 0.001, 0.0001])


def test_training_lowers_the_loss(data, tmp_path):
    made = settings(data, method__name="supervised", train__steps=40, data__validation=0, train__lr=0.1)
    rows = losses(trainer.train(made, tmp_path / "r").out)
    first, last = (np.mean([float(r["loss"]) for r in part]) for part in (rows[:5], rows[-5:]))
    assert last < 0.8 * first


def test_pictures_in_two_dimensions(tmp_path, rng):
    image = pytest.importorskip("PIL.Image")
    for folder in ("images", "masks"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    for n in range(5):
        mask = np.zeros((40, 36), np.uint8)
        mask[8 + n : 24, 6:20] = 255
        picture = np.clip(mask * 0.5 + rng.normal(60, 20, mask.shape), 0, 255).astype(np.uint8)
        image.fromarray(picture).save(tmp_path / "data" / "images" / f"p{n}.png")
        image.fromarray(mask).save(tmp_path / "data" / "masks" / f"p{n}.png")
    made = settings(tmp_path / "data", train__patch_size=[32, 32], specialist__name="unet2d", train__steps=3)
    run = trainer.train(made, tmp_path / "r")
    assert run.best is not None
    assert trainer.load(run.out).network(torch.zeros(2, 1, 32, 32)).shape == (2, 2, 32, 32)
    assert {row["candidate"] for row in read_table(run.out / "gate.csv")} >= {"mask", "random-walker"}


@pytest.mark.data
@pytest.mark.parametrize(("name", "classes"), [("hippocampus", 3), ("la", 2)])
def test_real_scans(tmp_path, name, classes):
    made = settings(data_dir(name), data__unlabeled=2, data__test=1, train__steps=3, term__gate_every=2)
    made.train.patch_size = [32, 32, 32]
    if name == "la":  # whole volumes of 3 million voxels take a minute
        made.data.validation, made.term.gate = 0, False
    run = trainer.train(made, tmp_path / "r")
    assert trainer.load(run.out).meta["num_classes"] == classes
    sums = json.loads((run.out / "run.json").read_text())["sha256"]
    # labeled and validation cases with their labels, unlabeled and test images alone
    assert len(sums) == 2 * 2 + 2 + 2 * made.data.validation + 1


MODES_OF_ALL = ("unc", "point", "mask", "mixed")


@pytest.fixture(scope="module", params=["hippocampus", "la"])
def real_patches(request):
    """Two batches of small patches of real scans, and the number of classes."""
    name = request.param
    made = settings(data_dir(name), data__labeled=1, data__unlabeled=1, data__validation=0, data__test=0)
    made.train.batch_size, made.train.labeled_batch, made.train.augment = 2, 1, False
    made.train.patch_size = [24, 32, 24]
    found = find_cases(made.data.root)
    roles = make_split(found, made.data)
    classes = len(roles.class_names)
    preparation = Preprocessing.of(made, 3)
    return classes, [PatchSource(roles, preparation, made.train, made.data, classes).batch(k) for k in (0, 1)]


@pytest.mark.data
@pytest.mark.parametrize("mode", MODES_OF_ALL)
@pytest.mark.parametrize("base", ["mean-teacher", "ua-mt", "dan"])
def test_every_method_trains_with_every_mode_on_real_scans(real_patches, base, mode):
    """Two steps by the trainer's stepper: finite, and the term moves the student and nothing else."""
    classes, batches = real_patches
    torch.manual_seed(0)
    student = specialists.build("unet3d", in_channels=1, num_classes=classes, channels=[4, 8])
    options = {"mc_passes": 2, "discriminator_channels": [4, 8]}
    method = methods.build(
        *(config.MethodConfig(f"semisam-{base}", **options), student),
        num_classes=classes,
        total_steps=4,
        term=SemiSAMTerm(total_steps=4, mode=mode, clicks=2, warmup=0.0, sample_gate=0.0),
    )
    losses = method.losses(batches[0], 0)
    assert method.term.diagnostics["called"]
    assert losses["semisam"] > 0
    losses["semisam"].backward()
    assert any(p.grad is not None and p.grad.any() for p in student.parameters())
    others = [*(method.teacher.parameters() if method.teacher is not None else ())]
    others += [*(method.discriminator.parameters() if base == "dan" else ())]
    assert others
    assert all(p.grad is None for p in others)
    train = config.TrainConfig(device="cpu", precision="32")
    stepper = Stepper(fabric_for(train), train, method, 4)
    before = student.final.weight.detach().clone()
    for step, batch in enumerate(batches):
        assert np.isfinite(list(stepper.step(step, [batch]).values())).all()
    assert not torch.equal(student.final.weight, before)
    assert all(p.isfinite().all() for p in student.parameters())


# ---- nothing leaks ------------------------------------------------------------------------------


def test_labels_of_unlabeled_cases_are_never_opened(data, whole, tmp_path):
    """Check 3: the unlabeled cases' labels are gone in one copy and garbage in another."""
    run = json.loads((whole / "run.json").read_text())
    for what in ("gone", "garbage"):
        root = shutil.copytree(data, tmp_path / what)
        changed = 0
        for case in find_cases(data).cases:
            if case.id in run["split"]["unlabeled"] and case.label is not None:
                place = root / case.label.relative_to(data)
                place.unlink()
                if what == "garbage":
                    place.write_bytes(b"not an image")
                changed += 1
        assert changed == 1
        ids = {role: run["split"][role] for role in ("labeled", "unlabeled", "validation")}
        made = settings(root, **{f"data__{role}": names for role, names in ids.items()})
        trainer.train(made, tmp_path / f"run-{what}")
        assert losses(tmp_path / f"run-{what}") == losses(whole)
        assert same(weights(tmp_path / f"run-{what}"), weights(whole))


@pytest.mark.parametrize("number", ["D-01", "D-02", "all"])
def test_only_d01_of_the_leaky_reference_opens_labels(data, tmp_path, monkeypatch, capsys, number):
    """Another case's label file is garbage: found out where D-01 is on, and nowhere else."""
    root = shutil.copytree(data, tmp_path / "data")
    (hidden,) = [c for c in find_cases(root).cases if c.label is not None][2:3]
    roles = [c.id for c in find_cases(root).cases if c.label is not None]
    options = {"defects": [number], "clicks": 2}
    made = settings(
        *(root,),
        data__labeled=roles[:2],
        data__unlabeled=[hidden.id],
        data__validation=0,
        train__steps=2,
        term__preset="published",
        term__gate=False,
        term__options=options,
    )
    run = trainer.train(made, tmp_path / "sound").out
    said = capsys.readouterr()
    loud = said.out + said.err
    assert "does wrong on purpose" in loud
    leaks = number != "D-02"
    assert ("labels of unlabeled scans are opened" in loud) == leaks
    assert (number in json.loads((run / "run.json").read_text())["defects"]) == (number != "all")
    hidden.label.write_bytes(b"not an image")
    if leaks:
        with pytest.raises(CaseError, match=hidden.id):
            trainer.train(made, tmp_path / "damaged")
    else:
        assert losses(trainer.train(made, tmp_path / "damaged").out) == losses(run)


def test_leaked_labels_are_those_of_the_patches(data):
    """The images that the same ids give are the batch's, and the labels lie on them."""
    made = settings(data, data__labeled=1, data__unlabeled=2, data__validation=0)
    found = find_cases(data)
    roles = make_split(found, made.data)
    roles.unlabeled = [c for c in roles.unlabeled if (data / "labelsTr" / f"{c.id}.nii.gz").exists()]
    preparation = Preprocessing.of(made, 3)
    leaked = LeakedLabels(made, found, roles, preparation)
    batch = PatchSource(roles, preparation, made.train, made.data, 2).batch(5)
    image = batch.image[batch.labeled :, 0].numpy()
    label = leaked(batch.ids[batch.labeled :])
    assert label.shape == image.shape
    assert label.any()
    for one, organ in zip(image, label, strict=True):
        assert one[organ == 1].mean() > one[organ == 0].mean()


def test_the_leaky_reference_needs_labels_and_no_gate(data, tmp_path):
    leaky = {"term__preset": "published", "term__gate": False}
    with pytest.raises(trainer.TrainingError, match=r"D-01 takes its clicks from labels.* has none"):
        trainer.train(settings(data, **leaky), tmp_path / "r")  # three cases have no label file
    with pytest.raises(config.ConfigError, match=r"term\.gate: expected false with the preset 'published'"):
        trainer.train(settings(data, term__preset="published"), tmp_path / "r")
    with pytest.raises(config.ConfigError, match=r"term\.options: .*got 'D-99'"):
        trainer.train(settings(data, **leaky, term__options={"defects": ["D-99"]}), tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_lam_sam_0_is_mean_teacher(data, tmp_path):
    """Check 10, with gate, files and all."""
    plain = trainer.train(settings(data, method__name="mt"), tmp_path / "plain").out
    none = trainer.train(settings(data, term__options={"lam_sam": 0}), tmp_path / "none").out
    assert same(weights(plain), weights(none))
    assert same(weights(plain, network="teacher"), weights(none, network="teacher"))
    for a, b in zip(losses(plain), losses(none), strict=True):
        assert {name: b[name] for name in a} == a


# ---- nights -------------------------------------------------------------------------------------


def equal(a, b):
    """Nested values, tensors by their bits."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize(
    ("when", "method"),
    [("gate", "semisam-mean-teacher"), ("training", "semisam-mean-teacher"), ("training", "semisam-dan")],
)
def test_killed_at_any_moment_it_ends_with_the_same_bits(data, tmp_path, when, method):
    made = settings(data, train__steps=24, train__validate_every=5, method__name=method)
    if when == "gate":
        made.term.gate_steps = 12
    trainer.train(made, tmp_path / "whole")
    out = tmp_path / "killed"
    chance = random.Random(os.urandom(8))
    process = processes.start(words(made, out))
    steps = chance.randint(3, 14)
    deadline = time.monotonic() + 120

    def there_yet():
        if when == "gate":
            return (out / "config.yaml").exists()
        return len(read_table(out / "log.csv")) >= steps

    while not there_yet():
        assert time.monotonic() < deadline
        assert process.is_alive(), "it ended before it could be killed"
        time.sleep(0.002)
    time.sleep(delay := chance.uniform(0, 0.4 if when == "gate" else 0.05))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    left = [path.name for path in out.iterdir() if path.suffix == ".ckpt"]
    found = [checkpoint.read(out / name)["step"] for name in left]  # whole
    assert (max(found) >= 2 and min(found) < 24) if when == "training" else not any(found)
    trainer.train(made, out, resume=True)
    why = f"killed {delay} s after {when} ({steps} steps)"
    assert same(weights(out, "best"), weights(tmp_path / "whole", "best")), why
    ours, theirs = (checkpoint.read(p / "last.ckpt") for p in (out, tmp_path / "whole"))
    for part in ("student", "teacher", "method", "optimizer"):
        assert equal(ours[part], theirs[part]), (part, why)
    if method == "semisam-dan":
        assert ours["method"]["optimizer"]["state"][0]["step"] == 24
    assert losses(out) == losses(tmp_path / "whole"), why
    for table in ("validation.csv", "gate.csv"):
        assert read_table(out / table) == read_table(tmp_path / "whole" / table)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_stops(data, whole, tmp_path, monkeypatch, capsys, number, code):
    made = settings(data, train__checkpoint_every=100)
    step = Stepper.step

    def and_signal(self, number_of_step, batches):
        if number_of_step == 3 and "semisam" in self.method.terms:
            os.kill(os.getpid(), number)
        return step(self, number_of_step, batches)

    out = tmp_path / "r"
    monkeypatch.setattr(Stepper, "step", and_signal)
    before = signal.getsignal(number)
    assert main(words(made, out)) == code
    assert signal.getsignal(number) is before
    assert "--resume" in capsys.readouterr().out
    assert checkpoint.read(out / "last.ckpt")["step"] == 4
    monkeypatch.undo()
    monkeypatch.setattr(gate, "held_out", lambda *_, **__: pytest.fail("the gate was asked again"))
    assert main(["train", "--out", str(out), "--resume"]) == 0
    assert same(weights(out), weights(whole))


def test_a_signal_during_the_gate(data, tmp_path, monkeypatch):
    made = settings(data)
    monkeypatch.setattr(gate, "disturbed", None)
    step = Stepper.step

    def and_signal(self, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments)

    monkeypatch.setattr(Stepper, "step", and_signal)
    with pytest.raises(trainer.Interrupted, match="SIGTERM after step 0"):
        trainer.train(made, tmp_path / "r")
    assert not (tmp_path / "r" / "last.ckpt").exists()


def test_only_the_main_thread_listens_to_signals(data, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    made = settings(data, method__name="supervised", train__steps=1, data__validation=0)
    thread = threading.Thread(target=trainer.train, args=(made, tmp_path / "r"))
    thread.start()
    thread.join()
    assert (tmp_path / "r" / "last.ckpt").exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path):
    path = tmp_path / "last.ckpt"
    checkpoint.save(path, {"format": 1, "step": 1, "w": torch.ones(100_000)})
    kept = path.read_bytes()
    temporary = tmp_path / f".{os.getpid()}.tmp.last.ckpt"
    temporary.symlink_to("/dev/full")  # every write fails for lack of space
    with pytest.raises(trainer.CheckpointError, match=r"No space left.*one before it is intact.*--resume"):
        checkpoint.save(path, {"format": 1, "step": 2, "w": torch.zeros(100_000)})
    assert path.read_bytes() == kept
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_full_disk_ends_the_command_with_one_line(data, tmp_path, monkeypatch, capsys):
    made = settings(data, method__name="supervised", data__validation=0)
    save = checkpoint.save

    def fail_later(path, state):
        if state["step"] == 4:
            path.with_name(f".{os.getpid()}.tmp.{path.name}").symlink_to("/dev/full")
        save(path, state)

    monkeypatch.setattr(checkpoint, "save", fail_later)
    assert main(words(made, tmp_path / "r")) == 1
    error = capsys.readouterr().err
    assert "last.ckpt: cannot be written: No space left" in error
    assert "Traceback" not in error
    assert checkpoint.read(tmp_path / "r" / "last.ckpt")["step"] == 2


def test_numbers_that_are_not_finite_stop_the_run(data, tmp_path):
    made = settings(data, method__name="mt", train__lr=1e30, train__schedule="constant", data__validation=0)
    with pytest.raises(
        trainer.TrainingError, match=r"step 1: .*(ce|gradient).* not finite.*nan/step_000001\.pt"
    ):
        trainer.train(made, tmp_path / "r")
    saved = torch.load(tmp_path / "r" / "nan" / "step_000001.pt", weights_only=True)
    assert saved["batches"][0]["image"].shape == (4, 1, 16, 16, 16)
    assert saved["batches"][0]["label"].shape[0] == 2
    assert not np.isfinite(list(saved["losses"].values())).all()
    assert all(v.isfinite().all() for v in weights(tmp_path / "r").values())  # of an earlier step
    assert saved["student"].keys() == weights(tmp_path / "r").keys()


def test_numbers_that_are_not_finite_in_the_gate_stop_the_run(data, tmp_path):
    made = settings(data, method__name="semisam-mt", term__gate_steps=3, train__lr=1e30, data__validation=0)
    with pytest.raises(trainer.TrainingError, match=r"the gate's short runs: .* not finite"):
        trainer.train(made, tmp_path / "r")


def test_a_gradient_that_is_not_finite_is_named(data, tmp_path, monkeypatch):
    made = settings(data, method__name="supervised", data__validation=0)
    clip = torch.nn.utils.clip_grad_norm_

    def spoiled(parameters, *arguments, **options):
        parameters = list(parameters)
        parameters[0].grad[0] = float("nan")
        return clip(parameters, *arguments, **options)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoiled)
    with pytest.raises(trainer.TrainingError, match="step 0: gradient is not finite"):
        trainer.train(made, tmp_path / "r")


def test_out_of_memory_says_what_to_lower(data, tmp_path, monkeypatch):
    def exhausted(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")

    monkeypatch.setattr(Stepper, "step", exhausted)
    expected = (
        r"lower train\.batch_size \(now 4\), train\.patch_size \(now \[16, 16, 16\]\) or "
        r"train\.precision \(now auto.*Tried to allocate 9 GiB"
    )
    with pytest.raises(trainer.TrainingError, match=expected):
        trainer.train(settings(data, method__name="mt"), tmp_path / "r")


def test_a_killed_worker_ends_the_run_with_a_reason(data, tmp_path, monkeypatch):
    made = settings(data, method__name="mt", data__workers=1, data__validation=0, train__steps=500)
    step = Stepper.step

    def and_kill(self, number, batches):
        if number == 2:
            for worker in active_children():
                os.kill(worker.pid, signal.SIGKILL)
        return step(self, number, batches)

    monkeypatch.setattr(Stepper, "step", and_kill)
    with pytest.raises(trainer.TrainingError, match=r"worker died.*data\.workers"):
        trainer.train(made, tmp_path / "r")


def test_workers_change_nothing(data, tmp_path):
    runs = []
    for workers in (0, 1):
        made = settings(data, method__name="mt", data__workers=workers, data__validation=0)
        runs.append(trainer.train(made, tmp_path / str(workers)).out)
    assert same(weights(runs[0]), weights(runs[1]))


# ---- what is refused ----------------------------------------------------------------------------


def test_an_existing_run_is_not_written_over(data, whole):
    before = (whole / "last.ckpt").read_bytes()
    with pytest.raises(trainer.TrainingError, match="exists and is not empty: continue it with --resume"):
        trainer.train(settings(data), whole)
    assert (whole / "last.ckpt").read_bytes() == before


def test_a_run_continues_with_its_settings_only(data, whole):
    made = settings(data, train__lr=0.5, train__steps=7, train__log_every=3)
    with pytest.raises(trainer.TrainingError, match="differ") as error:
        trainer.train(made, whole, resume=True)
    text = str(error.value)
    assert "train.lr: 0.01, now 0.5" in text
    assert "train.steps: 6, now 7" in text
    assert "log_every" not in text


def test_a_run_continues_on_its_data_only(data, whole, tmp_path):
    root = shutil.copytree(data, tmp_path / "data")
    moved = replace(settings(data), data=replace(settings(data).data, root=str(root)))
    out = shutil.copytree(whole, tmp_path / "run")
    trainer.train(moved, out, resume=True)  # moved, not changed
    image = find_cases(root).cases[0].images[0]
    image.write_bytes(find_cases(root).cases[1].images[0].read_bytes()[:-1] + b"\0")
    with pytest.raises(trainer.TrainingError, match="these changed: .*" + image.name):
        trainer.train(moved, out, resume=True)


def test_resume_of_nothing_begins(data, tmp_path):
    made = settings(data, method__name="supervised", train__steps=1, data__validation=0)
    assert trainer.train(made, tmp_path / "new", resume=True).steps == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"train__patch_size": [16, 17, 16]},
            r"multiples of 2; got \[16, 17, 16\].*\[16, 16, 16\] or \[16, 18, 16\]",
        ),
        ({"train__patch_size": [16, 16]}, "expected 3 sides"),
        (
            {"method__name": "dan", "method__discriminator_channels": [4] * 5},
            "at least 32, as the discriminator halves",
        ),
        ({"term__options": {"lam_same": 1}}, r"term\.options: .*lam_same"),
        ({"term__generalists": ["random-waker"]}, "did you mean 'random-walker'"),
        ({"term__generalist_options": {"sam": {}}}, "generalist_options: expected names of"),
        ({"train__device": "cuda"}, "expected a CUDA device"),
        ({"train__precision": "fp16"}, "expected 32 or bf16 on the CPU"),
    ],
)
def test_settings_that_cannot_work(data, tmp_path, more, message):
    if "train__device" in more and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    with pytest.raises(config.ConfigError, match=message):
        trainer.train(settings(data, **more), tmp_path / "r")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "cannot be read"), (b"PK\x03\x04 half a file", "cannot be read"), (None, "no such checkpoint")],
)
def test_damaged_checkpoints(tmp_path, content, message):
    path = tmp_path / "last.ckpt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(trainer.CheckpointError, match=message):
        checkpoint.read(path)


def test_checkpoints_run_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    torch.save({"format": 1, "x": Evil()}, tmp_path / "last.ckpt")
    with pytest.raises(trainer.CheckpointError, match="cannot be read"):
        checkpoint.read(tmp_path / "last.ckpt")
    assert not (tmp_path / "owned").exists()
    torch.save({"format": 99}, tmp_path / "last.ckpt")
    with pytest.raises(trainer.CheckpointError, match="expected a checkpoint of format 1, got 99"):
        checkpoint.read(tmp_path / "last.ckpt")


# ---- one step -----------------------------------------------------------------------------------


def test_accumulation_is_the_mean(data, tmp_path):
    """The same batch twice is the same step."""
    made = settings(data, method__name="supervised", data__validation=0)
    result = []
    for times in (1, 2):
        made.train.accumulate = times
        made.train.seed = 5
        roles = make_split(find_cases(data), made.data)
        run = trainer._Training(made, tmp_path / str(times), False, None, roles, None, [])
        batch = run.source.batch(0)
        with torch.no_grad():
            for module in run.method.student.modules():
                if isinstance(module, torch.nn.modules.dropout._DropoutNd):
                    module.p = 0.0
        run.stepper.step(0, [batch] * times)
        result.append({k: v.clone() for k, v in run.method.student.state_dict().items()})
    for name, value in result[0].items():
        assert torch.allclose(value, result[1][name], rtol=1e-5, atol=1e-8), name


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_channels_last_is_the_same_training(data, tmp_path, precision):
    """Another order of sums in the convolutions, the same bits in every run and after --resume."""
    more = {
        "train__memory_format": "channels_last",
        "train__precision": precision,
        "train__deterministic": True,
    }
    first = trainer.train(settings(data, **more), tmp_path / "first").out
    assert all(
        v.is_contiguous(memory_format=torch.channels_last_3d) for v in weights(first).values() if v.ndim == 5
    )
    again = tmp_path / "again"
    step = Stepper.step

    def stopped(self, number, batch):
        if number == 4 and "semisam" in self.method.terms:
            raise KeyboardInterrupt
        return step(self, number, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "step", stopped)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(settings(data, **more), again)
    trainer.train(settings(data, **more), again, resume=True)
    assert same(weights(first), weights(again))
    assert same(weights(first, network="teacher"), weights(again, network="teacher"))
    plain = trainer.train(
        settings(data, **more, **{"train.memory_format": "contiguous"}), tmp_path / "plain"
    ).out
    tolerance = 1e-4 if precision == "32" else 0.05  # bfloat16 has 8 bits
    for a, b in zip(losses(first), losses(plain), strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=tolerance)


def test_memory_format_of_two_and_three_dimensions():
    flat, deep = config.TrainConfig(patch_size=[32, 32]), config.TrainConfig(patch_size=[32] * 3)
    assert memory_format_of(flat, "cpu") == torch.channels_last
    assert memory_format_of(flat, "cuda") == torch.contiguous_format
    assert memory_format_of(deep, "cpu") == torch.contiguous_format
    wanted = replace(deep, memory_format="channels_last")
    assert memory_format_of(wanted, "cuda") == torch.channels_last_3d


def test_fabric_takes_the_wanted_precision():
    made = config.TrainConfig(device="cpu")
    assert fabric_for(made).strategy.precision.precision == "32-true"
    assert fabric_for(replace(made, precision="bf16")).strategy.precision.precision == "bf16-mixed"


# ---- the gate -----------------------------------------------------------------------------------


def held_out(data, out, **more):
    made = settings(data, data__validation=0, **more)
    run = trainer._Training(made, out, False, None, None, None, [])
    return run, list(gate.held_out(made, run.split, run.preprocessing, run.meta, run.fabric))


def test_folds_leave_one_patient_out(data, tmp_path, monkeypatch):
    seen = []
    short = gate._short_run

    def spy(made, roles, *rest):
        seen.append([case.id for case in roles.labeled])
        return short(made, roles, *rest)

    monkeypatch.setattr(gate, "_short_run", spy)
    run, scans = held_out(data, tmp_path / "r", data__labeled=3)
    everyone = [case.id for case in run.split.labeled]
    assert [scan.case for scan in scans] == everyone
    assert seen == [[c for c in everyone if c != left] for left in everyone]
    for scan in scans:
        assert scan.image.shape == (1, 20, 20, 20)
        assert scan.probability.shape == (2, 20, 20, 20)
        assert np.allclose(scan.probability.sum(0), 1, atol=1e-5)
        assert scan.label.shape == (20, 20, 20)
    _, again = held_out(data, tmp_path / "r2", data__labeled=3)
    assert all(np.array_equal(a.probability, b.probability) for a, b in zip(scans, again, strict=True))


def test_one_labeled_case_is_disturbed(data, tmp_path):
    run, scans = held_out(data, tmp_path / "r", data__labeled=1)
    prepared = run.source.batch(0)
    assert len(scans) == 2
    assert not np.array_equal(scans[0].image, scans[1].image)
    assert all((scan.label == 1).sum() > 0 for scan in scans)
    assert prepared.labeled == 2


def test_the_network_of_the_gate_learns(data, tmp_path):
    """Not its own starting point: with more steps it is another network, and a better one."""
    _, short = held_out(data, tmp_path / "a", term__gate_steps=1)
    _, longer = held_out(data, tmp_path / "b", term__gate_steps=40, train__lr=0.1)
    error = [
        np.mean([np.abs(s.probability[1] - (s.label == 1)).mean() for s in scans])
        for scans in (short, longer)
    ]
    assert error[1] < 0.8 * error[0]


def test_the_choice_is_kept(whole):
    state = checkpoint.read(whole / "last.ckpt")
    assert set(state["method"]["term"]["gate"]["scores"]) == {"mask", "largest_component", "random-walker"}
    rows = [row for row in read_table(whole / "gate.csv") if row["step"] == "0"]
    chosen = {row["candidate"] for row in rows if row["chosen"] == "1"}
    assert chosen == set(state["method"]["term"]["gate"]["choice"].values())


def test_disturbed_keeps_what_it_should(rng):
    image = rng.standard_normal((2, 24, 24, 24)).astype(np.float32)
    image[:, 6:18, 6:18, 6:18] += 3
    label = np.zeros((24, 24, 24), np.uint8)
    label[6:18, 6:18, 6:18] = 1
    copy, turned = gate.disturbed(image, label, rng)
    assert copy.dtype == np.float32
    assert set(np.unique(turned)) == {0, 1}
    assert int(turned.sum()) == pytest.approx(int(label.sum()), rel=0.05)
    assert not np.array_equal(turned, label)
    assert copy[0][turned == 1].mean() > copy[0][turned == 0].mean() + 1
    for a, b in zip(image, copy, strict=True):
        assert b.mean() == pytest.approx(a.mean(), abs=1e-4)
        assert b.std() == pytest.approx(a.std(), rel=1e-3)
    still, untouched = gate.disturbed(image, label, rng, rotate=False)
    assert untouched is label
    assert not np.array_equal(still, image)
    flat, _ = gate.disturbed(np.zeros((1, 8, 8), np.float32), None, rng, rotate=False)
    assert np.isfinite(flat).all()


# ---- several processes --------------------------------------------------------------------------


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def together(made, out, world=2, *more):
    """As `torchrun --nproc-per-node 2 -m semisam train` does."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    common |= {"LOCAL_WORLD_SIZE": str(world), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "none"}
    started = [
        processes.start(words(made, out, *more), {**common, "RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(world)
    ]
    for process in started:
        process.join(120)
        if process.is_alive():
            process.kill()
    return [process.exitcode for process in started]


@pytest.mark.parametrize(
    ("method", "gated"), [("semisam-mean-teacher", True), ("semisam-ua-mt", False), ("semisam-dan", False)]
)
def test_two_processes_are_one(data, tmp_path, method, gated):
    """1 x B = 4 and 2 x B = 2 have the same losses and weights, up to the order of float32 sums.

    Dice is of all labeled samples jointly, UA-MT's mask too. Gradients are sums of about 10^4 products
    in another order: relative differences of some 1e-6 per step, which 8 steps of momentum multiply by
    less than 100.
    """
    torch.manual_seed(0)
    sure = specialists.build("unet3d", in_channels=1, num_classes=2, channels=[4, 8])
    with torch.no_grad():
        sure.final.weight *= 8  # so that UA-MT's mask is neither empty nor full
    torch.save(sure.state_dict(), tmp_path / "sure.pth")
    made = settings(
        data,
        method__name=method,
        method__mc_passes=2,
        method__discriminator_dropout=0.0,
        train__steps=8,
        train__lr=0.05,
        term__gate=gated,
        specialist__weights=str(tmp_path / "sure.pth"),
        specialist__options={"channels": [4, 8], "dropout": 0.0},
        term__options={"lam_sam": 5.0, "warmup": 0.0},
    )
    trainer.train(made, tmp_path / "one")
    assert together(made, tmp_path / "two") == [0, 0]
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 8
    names = [name for name in one[0] if name in ("consistency", "adversarial", "discriminator", "semisam")]
    assert len(names) == (3 if method == "semisam-dan" else 2)
    assert gated or all(float(row[name]) > 0 for row in one for name in names)
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "ce", "dice", *names):
            assert float(b[name]) == pytest.approx(float(a[name]), rel=1e-4, abs=1e-10), (a["step"], name)
    for name, value in weights(tmp_path / "one").items():
        assert torch.allclose(value, weights(tmp_path / "two")[name], rtol=1e-3, atol=1e-5), name
    assert json.loads((tmp_path / "two" / "run.json").read_text())["processes"] == 2
    a, b = (read_table(tmp_path / run / "validation.csv") for run in ("one", "two"))
    assert [r["case"] for r in a] == [r["case"] for r in b]


def test_ranks_have_other_samples_and_the_same_numbers_as_one_process(data):
    made = settings(data)
    roles = make_split(find_cases(data), made.data)
    from semisam.engine.preprocess import Preprocessing  # noqa: PLC0415

    def ids(rank, world):
        return PatchSource(roles, Preprocessing(), made.train, made.data, 2, rank, world).batch(3).ids

    assert not set(ids(0, 2)) & set(ids(1, 2))
    assert set(ids(0, 2)) | set(ids(1, 2)) == set(ids(0, 1))


# ---- command line -------------------------------------------------------------------------------


def test_the_command_trains(data, tmp_path, capsys):
    out = tmp_path / "r"
    line = ["train", str(data), "--out", str(out), "--method", "mt", "--labeled", "2", "--unlabeled", "3"]
    line += ["--validation", "1", "--steps", "2", "--patch", "16", "16", "16", "--specialist", "unet3d"]
    line += ["--set", "specialist.options={channels: [4, 8]}", "--set", "train.lr=1e-3", "--device", "cpu"]
    assert main(line) == 0
    captured = capsys.readouterr()
    assert "trained 2 steps" in captured.out
    assert "semisam report" in captured.out
    assert "training: 2/2" in captured.err  # plain lines, as this is no terminal
    assert "\r" not in captured.err
    run = json.loads((out / "run.json").read_text())
    assert run["command"] == ["semisam", *line]
    assert run["method"] == "mean-teacher"
    assert config.load(out / "config.yaml").train.lr == 1e-3
    assert main(line) == 1
    assert "continue it with --resume" in capsys.readouterr().err
    assert main(["train", "--out", str(out), "--resume", "--set", "train.lr=1"]) == 1
    assert "train.lr: 0.001, now 1.0" in capsys.readouterr().err


def test_the_command_takes_ids(data, tmp_path):
    names = [case.id for case in find_cases(data).cases]
    out = tmp_path / "r"
    made = settings(data, method__name="supervised", train__steps=1, data__validation=0)
    made.data.labeled = None
    assert main([*words(made, out), "--labeled", f"{names[1]},{names[2]}"]) == 0
    assert json.loads((out / "run.json").read_text())["split"]["labeled"] == names[1:3]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--set", "train.stpes=3"], "did you mean train.steps?"),
        (["--set", "train.steps"], "expected KEY=VALUE"),
        (["--method", "meanteacher"], "did you mean"),
        (["--labeled", "99"], "99"),
        (["--config", "nowhere.yaml"], "cannot be read"),
    ],
)
def test_the_command_says_what_is_wrong(data, tmp_path, capsys, more, message):
    assert main(["train", str(data), "--out", str(tmp_path / "r"), *more]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("semisam train: ")
    assert not (tmp_path / "r").exists()


def test_the_command_needs_data(tmp_path, capsys):
    assert main(["train", "--out", str(tmp_path / "r")]) == 1
    assert "expected the folder with the scans" in capsys.readouterr().err


def test_a_quick_check_leaves_nothing(data, tmp_path, capsys):
    assert main([*words(settings(data), tmp_path / "r"), "--quick-check"]) == 0
    assert "quick check: 4 steps" in capsys.readouterr().out
    assert not (tmp_path / "r").exists()


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--resume" in text
    assert "examples:" in text


# ---- files and progress -------------------------------------------------------------------------


def test_atomic_leaves_the_old_file(tmp_path):
    place = tmp_path / "scan.nii.gz"
    place.write_text("old")

    def fail():
        with atomic(place) as temporary:
            assert temporary.parent == tmp_path
            assert temporary.name.endswith("scan.nii.gz")
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert place.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_table_drops_what_a_kill_left(tmp_path):
    place = tmp_path / "log.csv"
    table = Table(place, ("step", "loss"))
    for step in (1, 2, 3):
        table.add(step=step, loss=step / 3)
    with place.open("a") as file:
        file.write("4,0.1")  # torn
    assert [row["step"] for row in read_table(place)] == ["1", "2", "3"]
    Table(place, ("step", "loss"), keep=2).add(step=3, loss=None)
    assert place.read_text() == "step,loss\n1,0.33333333\n2,0.66666667\n3,\n"
    with pytest.raises(ValueError, match="expected the columns"):
        table.add(step=4, los=1)
    Table(place, ("step", "loss"), keep=0, write=False).add(step=1, loss=1)
    assert len(read_table(place)) == 3


def test_write_text_is_utf8(tmp_path):
    write_text(tmp_path / "a", "±")
    assert (tmp_path / "a").read_bytes() == "±".encode()


def test_progress_off_a_terminal(capsys):
    assert list(progress(range(3), label="cases", every=0.0)) == [0, 1, 2]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" ")[1] for line in lines] == ["1/3", "2/3", "3/3"]
    assert list(progress(iter("ab"), show=False)) == ["a", "b"]
    assert capsys.readouterr().err == ""
    list(progress([], label="cases"))
    assert "0/0" in capsys.readouterr().err


def test_generalists_are_scored_where_they_teach():
    """Labeled patches go to the device: a generalist's network would follow them to the CPU and back."""
    gpu, seen = torch.device("meta"), {}

    def score(images, probs, labels, spacing):
        seen.update(images=images.device, probs=probs.device)
        return {}

    training = SimpleNamespace(
        first=True,
        config=config.Config(),
        done=100,
        fabric=SimpleNamespace(device=gpu, autocast=nullcontext),
        method=SimpleNamespace(prompt_probabilities=lambda images: images.softmax(1)),
        term=SimpleNamespace(score=score),
        _log_gate=lambda found: None,
        _share_term=lambda: None,
    )
    batch = Batch(torch.rand(2, 1, 8, 8, 8), torch.ones(1, 8, 8, 8, dtype=torch.uint8), (0, 1))
    trainer._Training._score_generalists(training, batch)
    assert seen == {"images": gpu, "probs": gpu}


# ---- TensorBoard --------------------------------------------------------------------------------


def test_tensorboard_has_what_the_log_has(data, tmp_path, monkeypatch):
    """Also of a run that was killed behind its last checkpoint: no step twice."""
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    made = settings(data, train__steps=6, train__checkpoint_every=3, train__log_every=1, term__gate=False)
    made = replace(made, train=replace(made.train, tensorboard=True))
    out, log = tmp_path / "r", trainer._Training._log

    def killed(training, values):
        log(training, values)
        if training.done == 5:
            training.board.flush()
            raise MemoryError  # not caught anywhere

    monkeypatch.setattr(trainer._Training, "_log", killed)
    with pytest.raises(MemoryError):
        trainer.train(made, out)
    monkeypatch.undo()
    trainer.train(made, out, resume=True)
    board = reading.EventAccumulator(str(out / "tensorboard"))
    board.Reload()
    rows = read_table(out / "log.csv")
    assert [event.step for event in board.Scalars("loss")] == [int(row["step"]) for row in rows]
    assert [event.value for event in board.Scalars("loss")] == pytest.approx([float(r["loss"]) for r in rows])


def test_without_tensorboard_nothing_begins(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    made = settings(data)
    with pytest.raises(
        config.ConfigError, match=r"train.tensorboard: .*pip install 'semisam\[tensorboard\]'"
    ):
        trainer.train(replace(made, train=replace(made.train, tensorboard=True)), tmp_path / "r")
    assert not (tmp_path / "r").exists()
