# SPDX-License-Identifier: Apache-2.0
"""Pseudo-labels of whole scans: cut with the patch, made when they are due, the same after a kill."""

from __future__ import annotations

import contextlib
import csv
import gc
import json
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import data_dir
from test_trainer import losses, same, settings, together, weights

from semisam.engine import checkpoint, config, gate, offline, results, setup, trainer
from semisam.engine.cases import CaseError, find_cases
from semisam.engine.cases import split as make_split
from semisam.engine.files import read_table
from semisam.engine.phantom import write_phantoms
from semisam.engine.preprocess import Preprocessing
from semisam.engine.sampling import PatchSource, augment_slice
from semisam.engine.setup import TrainingError
from semisam.term import SemiSAMTerm

pytestmark = pytest.mark.usefixtures("one_thread")

OFFLINE = {
    "term__offline": True,
    "term__offline_start": 4,
    "term__refresh": 4,
    "term__gate": False,
    "term__options": {"lam_sam": 5.0, "ramp": "flat", "warmup": 0.0, "sample_gate": 0.0},
    "train__steps": 12,
    "train__lr": 0.05,
    "train__checkpoint_every": 3,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantoms")
    return write_phantoms(root, labeled=4, unlabeled=3, test=0, shape=(20, 20, 20))


@pytest.fixture(scope="module")
def sure(tmp_path_factory):
    """Weights whose predictions have a foreground: prompts, and so labels, from the first round on."""
    from semisam import specialists  # noqa: PLC0415

    torch.manual_seed(0)
    network = specialists.build("unet3d", in_channels=1, num_classes=2, channels=[4, 8])
    with torch.no_grad():
        network.final.weight *= 8
    path = tmp_path_factory.mktemp("weights") / "sure.pth"
    torch.save(network.state_dict(), path)
    return str(path)


def made(data, sure, **more):
    return settings(data, **{**OFFLINE, "specialist__weights": sure, **more})


@pytest.fixture(scope="module")
def whole(data, sure, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    torch.set_num_threads(1)
    trainer.train(made(data, sure), out)
    return out


# ---- planes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("soft", [True, False])
def test_planes_are_what_they_encode(rng, soft):
    labels = offline.PseudoLabels(3, soft=soft)
    q = rng.dirichlet((1, 1, 1), (5, 6, 7)).transpose(3, 0, 1, 2)
    target = q if soft else rng.choice([0, 1, 2, 255], (5, 6, 7))
    weight, doubt = rng.random((2, 5, 6, 7))
    planes = labels.encoded(target, weight, doubt)
    assert planes.dtype == np.uint8
    assert planes.shape == (labels.count, 5, 6, 7)
    found = labels.decoded(torch.from_numpy(planes[None]))
    if soft:  # rounded to 1/255 per foreground class, and the background by their sum
        assert np.abs(found.target[0].numpy() - q).max() <= 1 / 255 + 1e-6
        assert np.allclose(found.target.sum(1), 1, atol=1e-6)
    else:
        assert found.target.dtype == torch.uint8
        assert np.array_equal(found.target[0], target)
    assert np.abs(found.weight[0].numpy() - weight).max() <= 0.5 / 255 + 1e-6
    assert np.abs(found.uncertainty[0].numpy() - doubt).max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize("augment", [True, False])
def test_labels_are_cut_with_their_patch(data, augment):
    """The image itself as label: patch and label are then the same numbers, whatever was turned."""
    changed = settings(data, train__augment=augment)
    roles = make_split(find_cases(data), changed.data)
    source = PatchSource(roles, Preprocessing(normalize="minmax"), changed.train, changed.data, 2)
    before = [source.batch(step) for step in range(6)]
    assert all(batch.pseudo is None for batch in before)
    source.pseudo = offline.PseudoLabels(2, soft=True)
    for case in source.unlabeled_cases[1:]:
        image = source.image(case)[0]
        source.pseudo.planes[case.id] = source.pseudo.encoded(
            np.stack([1 - image, image]), np.ones_like(image), image
        )
    none = source.unlabeled_cases[0].id
    seen = 0
    for step, earlier in enumerate(before):
        batch = source.batch(step)
        assert torch.equal(batch.image, earlier.image)
        for k in range(batch.unlabeled):
            target, weight, doubt = (part[k] for part in batch.pseudo)
            if source.case(step, batch.labeled + k).id == none:
                assert not weight.any()
                continue
            seen += 1
            image = batch.image[batch.labeled + k, 0]
            assert (target[1] - image).abs().max() <= 0.5 / 255 + 1e-6
            assert (doubt - image).abs().max() <= 0.5 / 255 + 1e-6
            assert not weight[image > 0].ne(1).any()  # beyond the scan nothing is known
    assert seen > 3


def test_slices_move_with_their_labels():
    """A smooth picture as its own label: as the picture is resampled linearly, up to a voxel's step."""
    axis = np.linspace(0, 1, 64)
    picture = np.stack(np.broadcast_arrays(axis[:, None] * axis)).astype(np.float32)
    planes = np.rint(255 * picture).astype(np.uint8)
    for seed in range(20):
        view, _ = augment_slice(np.concatenate([picture, picture]), None, np.random.default_rng(seed))
        moved, _ = augment_slice(planes, None, np.random.default_rng(seed), picture=False)
        assert moved.dtype == np.uint8
        holes = (view[0] == 0) | (moved[0] == 0)
        a, b = view[0][~holes], moved[0][~holes] / 255
        if len(a) > 100:  # brightness and contrast are one line
            assert np.corrcoef(a, b)[0, 1] > 0.995, seed


def test_workers_get_the_labels_too(data):
    changed = settings(data, data__workers=2, train__steps=3)
    roles = make_split(find_cases(data), changed.data)

    def source(workers):
        found = PatchSource(roles, Preprocessing(), changed.train, replace(changed.data, workers=workers), 2)
        found.pseudo = offline.PseudoLabels(2, soft=False)
        for case in found.unlabeled_cases:
            space = found.image(case).shape[1:]
            ones = np.ones(space)
            found.pseudo.planes[case.id] = found.pseudo.encoded(ones, ones, ones)
        return found

    for a, b in zip(source(2).loader(), source(0).loader(), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.pseudo, b.pseudo, strict=True))
        assert a.pseudo.weight.any()


# ---- rounds -------------------------------------------------------------------------------------


def test_rounds_and_their_files(whole, data, sure):
    log = losses(whole)
    assert [float(row["semisam"]) > 0 for row in log] == [False] * 4 + [True] * 8
    (place,) = (whole / "pseudo").iterdir()  # only the last round is kept
    assert place.name == "step_000008"
    ids = sorted(make_split(find_cases(data), made(data, sure).data).ids()["unlabeled"])
    assert sorted(path.stem for path in place.glob("*.npz")) == ids
    with (place / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["case"] for row in rows) == ids
    assert all(float(row["weight"]) > 0 and int(row["foreground_voxels"]) > 0 for row in rows)
    assert not list(whole.rglob(".*.tmp.*"))


def test_until_the_first_round_it_is_mean_teacher(data, sure, tmp_path):
    late = trainer.train(made(data, sure, term__offline_start=6, train__steps=7), tmp_path / "late").out
    plain = trainer.train(made(data, sure, method__name="mt", train__steps=7), tmp_path / "plain").out
    ours, theirs = losses(late), losses(plain)
    for a, b in zip(ours[:6], theirs[:6], strict=True):
        assert {name: a[name] for name in b} == b
    assert not same(weights(late), weights(plain))  # the seventh step had labels


def test_the_label_is_the_terms_own(data, sure, tmp_path):
    """One round, by hand: sliding windows of the teacher, `teach`, planes."""
    from semisam.engine.inference import sliding_window  # noqa: PLC0415
    from semisam.engine.setup import build_term  # noqa: PLC0415

    changed = made(data, sure, train__steps=5, train__checkpoint_every=4, term__refresh=0)
    run = trainer.train(changed, tmp_path / "r").out
    teacher = checkpoint.network_of(changed, {"channels": 1, "num_classes": 2})
    stopped = _teacher_at(changed, tmp_path / "stopped", 4)
    teacher.load_state_dict(stopped)
    teacher.eval()
    roles = make_split(find_cases(data), changed.data)
    source = PatchSource(roles, Preprocessing(), changed.train, changed.data, 2)
    term = build_term(changed)
    labels = offline.PseudoLabels(2, soft=True)
    for number, case in enumerate(source.unlabeled_cases):
        image = torch.from_numpy(np.ascontiguousarray(source.image(case)))
        prob = sliding_window(teacher, image, [16, 16, 16])
        found = term.teach(
            image[None], prob[None], step=4, sample_ids=[number], spacing=source.spacing_of(case)
        )
        expected = labels.encoded(*(a[0].numpy() for a in (found.target, found.weight, found.uncertainty)))
        with np.load(offline.place_of(run, 4) / f"{case.id}.npz") as file:
            assert np.array_equal(file["planes"], expected)


def _teacher_at(changed, out, step):
    """The teacher's weights after `step` steps, from the checkpoint that a round begins with."""
    kept = {}
    save = trainer._Training._save

    def saved(self, name):
        save(self, name)
        if self.done == step:
            kept.update(checkpoint.read(self.out / f"{name}.ckpt")["teacher"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer._Training, "_save", saved)
        trainer.train(changed, out)
    return kept


@pytest.mark.parametrize("when", ["labeling", "training"])
def test_after_a_kill_it_ends_with_the_same_bits(data, sure, whole, tmp_path, monkeypatch, when):
    """Stopped between two scans of a round, or in a step after it: the rest, and nothing twice."""
    out = tmp_path / "r"

    class Killed(BaseException):
        pass

    written = []
    write = offline._write

    def and_die(place, case, arrays):
        if when == "labeling" and len(written) == 5:  # the second of the second round's
            raise Killed
        write(place, case, arrays)
        written.append((place.name, case.id))

    log = trainer._Training._log

    def or_here(self, values):
        if when == "training" and self.done == 10 and self.term.settings:
            raise Killed
        log(self, values)

    monkeypatch.setattr(offline, "_write", and_die)
    monkeypatch.setattr(trainer._Training, "_log", or_here)
    with pytest.raises(Killed):
        trainer.train(made(data, sure), out)
    assert checkpoint.read(out / "last.ckpt")["step"] == (8 if when == "labeling" else 9)
    monkeypatch.undo()
    again = []
    monkeypatch.setattr(
        offline, "_write", lambda place, case, a: (write(place, case, a), again.append(case.id))
    )
    trainer.train(made(data, sure), out, resume=True)
    scans = len(written) - 4 if when == "labeling" else 0
    assert len(again) == (4 - scans if when == "labeling" else 0), "whole files are kept"
    for network in ("student", "teacher"):
        assert same(weights(out, network=network), weights(whole, network=network))
    assert losses(out) == losses(whole)


def test_labels_that_are_gone_stop_a_resumed_run(data, sure, tmp_path, monkeypatch):
    out = tmp_path / "r"
    step = trainer.Stepper.step

    def stopped(self, number, batch):
        if number == 7:
            raise KeyboardInterrupt
        return step(self, number, batch)

    monkeypatch.setattr(trainer.Stepper, "step", stopped)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(made(data, sure), out)
    monkeypatch.undo()
    damaged = next((out / "pseudo" / "step_000004").glob("*.npz"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(TrainingError, match=f"{damaged.name}: is missing or damaged"):
        trainer.train(made(data, sure), out, resume=True)


def test_a_file_of_another_teacher_is_changedagain(data, sure, tmp_path):
    from semisam.engine.setup import build_term  # noqa: PLC0415
    from semisam.engine.stepper import fabric_for  # noqa: PLC0415

    changed = made(data, sure)
    roles = make_split(find_cases(data), changed.data)
    source = PatchSource(roles, Preprocessing(), changed.train, changed.data, 2)
    source.pseudo = offline.PseudoLabels(2, soft=True)
    network = checkpoint.network_of(changed, {"channels": 1, "num_classes": 2})
    network.load_state_dict(torch.load(sure))

    def times():
        offline.label_scans(
            *(changed, source, network, build_term(changed), tmp_path, 4), fabric=fabric_for(changed.train)
        )
        return {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.npz")}

    first = times()
    assert first == times()
    with torch.no_grad():
        network.final.bias += 0.01
    assert not set(first.items()) & set(times().items())


@pytest.mark.parametrize("method", ["semisam-mean-teacher", "semisam-ua-mt"])
def test_two_processes_are_one(data, sure, tmp_path, method):
    """Labels are shared out and read by all; tolerances as in test_trainer.py's test of this name.

    Weights differ by float32 sums in another order, and a label by a step of 1/255 where that tips it over.
    """
    changed = made(
        data, sure, method__name=method, method__mc_passes=2, train__steps=8, term__refresh=2,
        specialist__options={"channels": [4, 8], "dropout": 0.0},
    )  # fmt: skip
    trainer.train(changed, tmp_path / "one")
    assert together(changed, tmp_path / "two") == [0, 0]
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert [float(row["semisam"]) > 0 for row in one] == [False] * 4 + [True] * 4
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "ce", "dice", "consistency", "semisam"):
            assert float(b[name]) == pytest.approx(float(a[name]), rel=1e-3, abs=1e-6), (a["step"], name)
    names = [
        sorted(p.name for p in (tmp_path / run / "pseudo" / "step_000006").iterdir())
        for run in ("one", "two")
    ]
    assert names[0] == names[1]


def test_from_another_run(data, sure, whole, tmp_path):
    changed = made(data, sure, term__offline_start=None, term__offline_from=str(whole), term__refresh=0)
    assert offline.start_of(changed) == 0
    run = trainer.train(changed, tmp_path / "r").out
    assert all(float(row["semisam"]) > 0 for row in losses(run))
    assert json.loads((run / "run.json").read_text())["offline_from"]["sha256"]
    wrong = write_phantoms(tmp_path / "two", labeled=4, unlabeled=3, test=0, shape=(20, 20, 20), classes=2)
    with pytest.raises(TrainingError, match="expected a run with num_classes 3"):
        trainer.train(
            made(wrong, None, term__offline_start=None, term__offline_from=str(whole)), tmp_path / "w"
        )


STAGES = {
    "term__offline_start": None,
    "term__refresh": 0,
    "term__first_stage": 7,
    "train__steps": 6,
}


def test_a_first_stage_is_a_run_before(data, sure, tmp_path):
    """One command is two: the same weights as by `term.offline_from`; the time is that of both."""
    staged = made(data, sure, **STAGES)
    run = trainer.train(staged, tmp_path / "one")
    base = {"method__name": "mean-teacher", "train__steps": 7, "term__offline": False}
    trainer.train(made(data, sure, **STAGES | base | {"term__first_stage": 0}), tmp_path / "teacher")
    other = {"term__first_stage": 0, "term__offline_from": str(tmp_path / "teacher")}
    trainer.train(made(data, sure, **STAGES | other), tmp_path / "two")
    assert same(weights(tmp_path / "one" / "first_stage"), weights(tmp_path / "teacher"))
    assert same(weights(tmp_path / "one"), weights(tmp_path / "two"))
    first = json.loads((tmp_path / "one" / "first_stage" / "run.json").read_text())
    assert first["method"] == "mean-teacher"
    assert run.seconds > first["seconds"] > 0
    asked = json.loads((run.out / "run.json").read_text())["offline_from"]["path"]
    assert asked == str(tmp_path / "one" / "first_stage" / "best.ckpt")
    assert [r.path.name for r in results.find_runs([tmp_path])] == ["one", "teacher", "two"]
    with pytest.raises(TrainingError, match="exists and is not empty"):
        trainer.train(staged, tmp_path / "one")


@pytest.mark.parametrize("after", ["first_stage", "."])
def test_stages_go_on_after_a_kill(data, sure, tmp_path, after, monkeypatch):
    """In the first or the second one; and from the run's own settings, as `--resume` alone reads them."""
    staged = made(data, sure, **STAGES)
    whole = trainer.train(staged, tmp_path / "whole").out
    log, out = trainer._Training._log, tmp_path / "killed"

    def killed(training, values):
        log(training, values)
        if training.out == out / after and training.done == 5:
            raise MemoryError  # not caught anywhere

    monkeypatch.setattr(trainer._Training, "_log", killed)
    with pytest.raises(MemoryError):
        trainer.train(staged, out)
    monkeypatch.undo()
    saved = config.load(out / "config.yaml")
    assert saved == staged
    trainer.train(saved, out, resume=True)
    assert same(weights(out), weights(whole))
    assert same(weights(out / "first_stage"), weights(whole / "first_stage"))
    trainer.train(saved, out, resume=True)  # nothing is left to do
    with pytest.raises(TrainingError, match=r"term.first_stage: 7, now 8"):
        trainer.train(replace(saved, term=replace(saved.term, first_stage=8)), out, resume=True)


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ({"term__generalists": ["sam-med3d"]}, config.ConfigError),
        ({"train__patch_size": [10, 10, 9]}, config.ConfigError),
        ({"data__labeled": 99}, CaseError),
    ],
)
def test_what_the_second_stage_would_refuse_is_refused_before_the_first(data, sure, tmp_path, more, error):
    """And nothing is written: the next try is no --resume."""
    with pytest.raises(error):
        trainer.train(made(data, sure, **STAGES, **more), tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_stages_in_two_processes(data, sure, tmp_path):
    staged = made(data, sure, **STAGES, specialist__options={"channels": [4, 8], "dropout": 0.0})
    trainer.train(staged, tmp_path / "one")
    assert together(staged, tmp_path / "two") == [0, 0]
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 6
    for a, b in zip(one, two, strict=True):
        assert float(b["loss"]) == pytest.approx(float(a["loss"]), rel=1e-3, abs=1e-6)


def test_a_round_that_says_nothing_is_told_of(data, sure, tmp_path, capsys, monkeypatch):
    """As where the first stage was too short for prompts: it must not look like a method's result."""
    monkeypatch.setattr("semisam.term.SemiSAMTerm.teach", lambda *_, **__: None)
    trainer.train(made(data, sure, train__steps=6), tmp_path / "r")
    told = "".join(capsys.readouterr())
    assert "step 4: 4 unlabeled scans labeled as wholes, 4 of them without a label, mean weight 0.000" in told
    assert "teaches nothing beyond mean-teacher" in told


def test_pictures_are_written(whole):
    with np.load(sorted((whole / "samples").glob("*.npz"))[-1]) as file:
        assert file["clicks"].shape == (0, 4)
        assert file["target"].shape == (2, 16, 16, 16)


def test_hard_targets_and_slices(tmp_path, rng):
    import PIL.Image  # noqa: PLC0415

    for folder in ("images", "masks"):
        (tmp_path / "d" / folder).mkdir(parents=True)
    for i in range(6):
        mask = np.zeros((32, 32), np.uint8)
        mask[8:20, 8 + i : 22] = 1
        picture = (100 * mask + 60 + 10 * rng.random((32, 32))).astype(np.uint8)
        PIL.Image.fromarray(picture).save(tmp_path / "d" / "images" / f"{i}.png")
        if i < 3:
            PIL.Image.fromarray(mask * 255).save(tmp_path / "d" / "masks" / f"{i}.png")
    options = {**OFFLINE["term__options"], "target": "hard", "tau_c": 0.5, "tau_u": 1.0}
    changed = settings(
        tmp_path / "d",
        **{**OFFLINE, "term__options": options},
        specialist__name="unet2d",
        train__patch_size=[32, 32],
        data__validation=0,
        data__label_map={0: 0, 255: 1},
    )
    run = trainer.train(changed, tmp_path / "r").out
    assert len(read_table(run / "log.csv")) == 12


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"term__offline_start": 0}, "term.offline_start: expected at least 1"),
        ({"term__offline_start": 12}, r"term.offline_start: expected less than train.steps \(12\), got 12"),
        (
            {"term__offline_from": "runs/x"},
            "term.offline_start: expected 0 or nothing with term.offline_from",
        ),
        ({"term__first_stage": 5}, "term.offline_start: expected 0 or nothing with term.first_stage"),
        ({"term__first_stage": 5, "term__offline_from": "runs/x"}, "term.first_stage: expected 0 with"),
        ({"term__first_stage": 5, "term__offline": False}, "term.first_stage: expected 0 without term.off"),
        ({"term__first_stage": -1}, "term.first_stage: expected at least 0"),
        ({"term__refresh": -1}, "term.refresh: expected at least 0"),
    ],
)
def test_settings_that_cannot_work(data, sure, more, message):
    with pytest.raises(config.ConfigError, match=message):
        config.check(made(data, sure, **more))


@pytest.mark.parametrize(("recipe", "settings"), [("offline", "SETTINGS"), ("two-stages", "STAGES")])
def test_recipes_are_what_the_evidence_was_made_with(recipe, settings, tmp_path, monkeypatch):
    """As far as the term goes; a file of that name comes first."""
    from benchmarks import evidence  # noqa: PLC0415

    made = config.load(recipe, [("train.steps", 250)])
    config.check(made)
    theirs = config.load(settings=list(getattr(evidence, settings).items()))
    assert replace(made.term, gate_steps=theirs.term.gate_steps, first_stage=0) == theirs.term
    assert made.train.memory_format == theirs.train.memory_format
    monkeypatch.chdir(tmp_path)
    (tmp_path / recipe).mkdir()  # a folder is no file
    assert config.load(recipe, [("train.steps", 250)]) == made
    (tmp_path / recipe).rmdir()
    (tmp_path / recipe).write_text("train: {steps: 7}")
    assert config.load(recipe).train.steps == 7
    with pytest.raises(config.ConfigError, match=r"cannot be read: .*; recipes are offline, two-stages"):
        config.load("three-stages")


@pytest.mark.parametrize("recipe", config.recipes())
def test_a_quick_check_labels_scans(data, tmp_path, capsys, recipe):
    from semisam.cli import main  # noqa: PLC0415

    line = ["train", str(data), "--out", str(tmp_path / "r"), "--config", recipe, "--quick-check"]
    line += ["--labeled", "2", "--patch", "16", "16", "16", "--device", "cpu"]
    assert main([*line, "--set", "specialist.options={channels: [4, 8]}"]) == 0
    assert "labeled as wholes" in "".join(capsys.readouterr())


@pytest.mark.data
def test_real_scans(tmp_path):
    """Two classes, odd shapes, a prior of two scans."""
    root = data_dir("hippocampus")
    ids = [case.id for case in find_cases(root).cases]
    changed = settings(
        root,
        **{**OFFLINE, "term__gate": True, "term__offline_start": 2, "train__steps": 4, "term__refresh": 0},
        term__position_prior=1.0,
        data__labeled=ids[:2],
        data__unlabeled=ids[2:4],
        data__validation=[],
        data__test=[],
        train__patch_size=[32, 32, 32],
    )
    run = trainer.train(changed, tmp_path / "r").out
    for name in ids[2:4]:
        with np.load(run / "pseudo" / "step_000002" / f"{name}.npz") as file:
            assert file["planes"].shape[0] == 4  # two foreground classes, weight, uncertainty


def test_workers_are_started_again_with_every_round(data, sure, whole, tmp_path):
    """What they fetched ahead has the labels of the round before, and is thrown away."""
    run = trainer.train(made(data, sure, data__workers=2), tmp_path / "r").out
    assert same(weights(run), weights(whole))
    assert losses(run) == losses(whole)


# ---- where generalists are asked ----------------------------------------------------------------


class Moves:
    """Tensors that were sent to a device that is not there: they stay, and it is seen who keeps them."""

    def __init__(self, monkeypatch, device):
        self.shapes, self.kept, self.device = [], [], device
        to = torch.Tensor.to

        def moved(tensor, *arguments, **options):
            if arguments[:1] != (device,):
                return to(tensor, *arguments, **options)
            self.shapes.append(tuple(tensor.shape))
            copy = tensor.clone()
            self.kept.append(weakref.ref(copy))
            return copy

        monkeypatch.setattr(torch.Tensor, "to", moved)
        monkeypatch.setattr(torch.Tensor, "cpu", torch.Tensor.clone)  # what comes back is a copy

    def alive(self):
        return [tuple(t.shape) for ref in self.kept if (t := ref()) is not None]


def labeling(data, sure, place, device, **more):
    """A round of labels where a device of that name is the training's."""
    changed = made(data, sure, **more)
    roles = make_split(find_cases(data), changed.data)
    source = PatchSource(roles, Preprocessing(), changed.train, changed.data, 2)
    source.pseudo = offline.PseudoLabels(2, soft=True)
    network = checkpoint.network_of(changed, {"channels": 1, "num_classes": 2})
    network.load_state_dict(torch.load(sure))
    fabric = SimpleNamespace(device=device, global_rank=0, world_size=1, autocast=contextlib.nullcontext)

    def run(term):
        offline.label_scans(changed, source, network, term, place, 4, fabric=fabric)
        offline.read_round(source, place)
        return source.pseudo.planes

    return changed, source, run


@pytest.mark.parametrize("where", ["auto", "cpu"])
def test_whole_scans_go_to_the_training_s_device_one_by_one(data, sure, tmp_path, monkeypatch, where):
    gpu = torch.device("meta")
    changed, source, run = labeling(data, sure, tmp_path / "gpu", gpu, term__scan_device=where)
    windows = offline.inference.sliding_window
    asked, left = [], []

    def here(network, image, patch, *, device, accumulate):
        asked.append((device, accumulate))
        return windows(network, image, patch)

    def seen():
        gc.collect()
        left.append(moves.alive())

    monkeypatch.setattr(offline.inference, "sliding_window", here)
    moves = Moves(monkeypatch, gpu)
    term = setup.build_term(changed)
    read = source.image
    monkeypatch.setattr(source, "image", lambda case: (seen(), read(case))[1])
    found = run(term)
    scans = len(source.unlabeled_cases)
    assert scans > 2
    assert not any(left), "a scan is still on the device when the next one is read"
    if where == "auto":
        assert moves.shapes == [(1, 1, 20, 20, 20), (1, 2, 20, 20, 20)] * scans
        assert asked == [(gpu, None)] * scans
    else:
        assert moves.shapes == []
        assert asked == [(gpu, torch.device("cpu"))] * scans
    monkeypatch.undo()
    changed, source, run = labeling(data, sure, tmp_path / "cpu", torch.device("cpu"))
    expected = run(setup.build_term(changed))
    assert all(np.array_equal(found[case], expected[case]) for case in expected)


def test_a_scan_without_room_says_which_setting_to_lower(data, sure, tmp_path, monkeypatch):
    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")

    expected = (
        r"phantom_\d+ \(20, 20, 20\): the GPU's memory does not suffice for a whole scan: lower "
        r"term\.options\.clicks \(now 3; .* set term\.scan_device \(now auto\) to cpu.*Tried to allocate 9"
    )
    options = {**OFFLINE["term__options"], "clicks": 3}
    changed = made(data, sure, term__options=options)
    with monkeypatch.context() as patch:
        patch.setattr("semisam.term.SemiSAMTerm.teach", exhausted)
        with pytest.raises(TrainingError, match=expected):
            trainer.train(changed, tmp_path / "r")
    monkeypatch.setattr("monai.inferers.utils.sliding_window_inference", exhausted)
    with pytest.raises(TrainingError, match=expected):
        trainer.train(changed, tmp_path / "r", resume=True)


def test_the_gate_asks_on_the_training_s_device(data, sure, tmp_path, monkeypatch):
    """Volume by volume, and the same choice."""
    changed = made(data, sure, term__gate=True, term__gate_steps=1, train__steps=5)
    given = []
    choose = gate.choose

    def spied(term, scans, *, device):
        given.append((scans, device))
        return choose(term, scans, device=device)

    monkeypatch.setattr(gate, "choose", spied)
    trainer.train(changed, tmp_path / "r")
    ((scans, device),) = given
    assert device == torch.device("cpu")
    assert len(scans) > 1
    gpu = torch.device("meta")
    terms = [SemiSAMTerm(["random-walker", "random-walker"], total_steps=9) for _ in range(2)]
    expected = choose(terms[0], scans)
    left = []
    with monkeypatch.context() as patch:
        moves = Moves(patch, gpu)
        compare = SemiSAMTerm._compare

        def seen(self, *arguments):
            gc.collect()
            left.append(len(moves.alive()))
            return compare(self, *arguments)

        patch.setattr(SemiSAMTerm, "_compare", seen)
        assert choose(terms[1], scans, device=gpu) == expected
    space = scans[0].label.shape
    assert moves.shapes == [(1, *space), (2, *space), space] * len(scans)
    assert left == [3] * len(scans)

    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(SemiSAMTerm, "calibrate", exhausted)
    with pytest.raises(TrainingError, match="gate: the GPU's memory does not suffice for a whole scan"):
        trainer.train(changed, tmp_path / "again")
