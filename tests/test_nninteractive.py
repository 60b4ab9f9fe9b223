# SPDX-License-Identifier: Apache-2.0
"""nnInteractive as a generalist, through a stand-in with the interface that its documentation shows."""

from __future__ import annotations

import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_term import STEP, make, scene, student

from semisam import generalists
from semisam.generalists import licences
from semisam.generalists.nninteractive import NnInteractive
from semisam.prompts import PromptBatch

SHAPE = (10, 12, 8)


class Session:
    """Checks what the documentation asks for, and "predicts" a ball of radius 3 around every positive click.

    Interactions add up until they are reset; nothing is predicted unless it is said.
    """

    def __init__(self, device, use_torch_compile=False, verbose=False, torch_n_threads=8, do_autozoom=True):
        assert isinstance(device, torch.device)
        self.device, self.autozoom, self.threads = device, do_autozoom, torch_n_threads
        self.folder = self.image = self.target_buffer = None
        self.calls: list[tuple] = []
        self.initial, self.points = None, []

    def initialize_from_trained_model_folder(
        self, folder, use_fold=None, checkpoint_name="checkpoint_final.pth"
    ):
        assert isinstance(folder, str)
        self.folder = folder

    def set_image(self, image, image_properties=None):
        assert isinstance(image, np.ndarray)
        assert image.ndim == 4
        self.image, self.target_buffer = image, None
        self.calls.append(("image", float(image.mean())))

    def set_target_buffer(self, buffer):
        assert tuple(buffer.shape) == self.image.shape[1:]
        self.target_buffer = buffer

    def reset_interactions(self):
        self.initial, self.points = None, []
        self.target_buffer.zero_()

    def add_initial_seg_interaction(self, initial_seg, run_prediction=False):
        assert isinstance(initial_seg, np.ndarray)
        assert initial_seg.shape == self.image.shape[1:]
        self.reset_interactions()
        self.initial = initial_seg
        self.target_buffer[:] = torch.from_numpy(initial_seg)
        self.calls.append(("mask", int(initial_seg.sum()), run_prediction))
        if run_prediction:
            self._predict()

    def add_point_interaction(self, coordinates, include_interaction, run_prediction=True):
        assert isinstance(coordinates, tuple)
        assert all(isinstance(i, int) for i in coordinates)
        assert isinstance(include_interaction, bool)
        self.points.append((coordinates, include_interaction))
        self.calls.append(("point", coordinates, include_interaction, run_prediction))
        if run_prediction:
            self._predict()

    def _predict(self):
        found = torch.zeros(self.image.shape[1:], dtype=torch.bool)
        if self.initial is not None:
            found |= torch.from_numpy(self.initial) > 0
        grid = torch.from_numpy(np.indices(self.image.shape[1:]))
        for point, positive in self.points:
            near = ((grid - torch.tensor(point).reshape(3, 1, 1, 1)) ** 2).sum(0) <= 9
            found = found | near if positive else found & ~near
        self.target_buffer[:] = found.byte()


def session():
    return Session(torch.device("cpu"))


def ball(point, shape=SHAPE):
    grid = np.indices(shape) - np.array(point).reshape(3, 1, 1, 1)
    return torch.from_numpy((grid**2).sum(0) <= 9)


@pytest.fixture
def images(rng):
    return torch.from_numpy(rng.random((2, 1, *SHAPE), np.float32))


def test_clicks_and_masks_reach_the_session(images):
    made = NnInteractive(session=session(), sure=3.0)
    points = torch.tensor([[[[4, 5, 3], [1, 1, 1]], [[5, 5, 5], [0, 0, 0]]], [[[2, 3, 4], [0, 0, 0]]] * 2])
    labels = torch.tensor([[[1, 0], [1, -1]], [[1, -1], [-1, -1]]])
    masks = torch.full((2, 2, *SHAPE), -4.0)
    masks[1, 1, 2:5] = 4
    active = torch.tensor([[True, True], [False, True]])
    batch = PromptBatch(SHAPE, points, labels, None, masks)
    answer = made.decode(made.encode(images), batch, active)
    expected = torch.full((2, 2, *SHAPE), -10.0)
    expected[0, 0] = torch.where(ball((4, 5, 3)) & ~ball((1, 1, 1)), 3.0, -3.0)
    expected[0, 1] = torch.where(ball((5, 5, 5)), 3.0, -3.0)
    expected[1, 1] = torch.where(masks[1, 1] > 0, 3.0, -3.0)
    assert torch.equal(answer.logits, expected)
    assert torch.equal(answer.low_res, expected)
    assert made.session.calls == [
        ("image", float(images[0].numpy().mean())),
        ("point", (4, 5, 3), True, False),
        ("point", (1, 1, 1), False, True),
        ("point", (5, 5, 5), True, True),
        ("image", float(images[1].numpy().mean())),
        ("mask", 3 * 12 * 8, True),
    ]


def test_a_mask_and_clicks_are_predicted_from_once(images):
    made = NnInteractive(session=session())
    batch = PromptBatch(SHAPE, torch.tensor([[[[8, 9, 6]]]]), torch.tensor([[[1]]]))
    batch = replace(batch, mask_logits=torch.where(ball((3, 3, 3)), 1.0, -1.0)[None, None])
    answer = made.decode(made.encode(images[:1]), batch).logits
    assert torch.equal(answer[0, 0] > 0, ball((3, 3, 3)) | ball((8, 9, 6)))
    assert [call[-1] for call in made.session.calls[1:]] == [False, True]


def test_rows_do_not_see_each_other(images):
    made = NnInteractive(session=session())
    batch = PromptBatch(
        SHAPE, torch.tensor([[[[4, 5, 3]]], [[[7, 2, 6]]]]), torch.ones(2, 1, 1, dtype=torch.int64)
    )
    both = made.decode(made.encode(images), batch).logits
    turned = PromptBatch(SHAPE, batch.points.flip(0), batch.labels)
    assert torch.equal(made.decode(made.encode(images.flip(0)), turned).logits.flip(0), both)
    three = made.encode(torch.cat([images, images + 1, images + 2], 1))
    torch.testing.assert_close(torch.from_numpy(three.images[0]), images[0] + 1)  # channels are averaged


def test_the_whole_path():
    images, _, prob = scene()
    logits = student(prob)
    term = make(NnInteractive(session=session()), clicks=3)
    loss = term(images, logits, prob, step=STEP)
    loss.backward()
    assert loss > 0
    assert logits.grad.any()
    assert term.settings["mode"] == ["mixed"]
    assert term.last.prompt_target.any()


def test_a_model_from_its_folder(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "home" / "nninteractive" / "nnInteractive_v1.0"
    (folder / "fold_0").mkdir(parents=True)
    for name in ("dataset.json", "plans.json", "inference_session_class.json", "fold_0/checkpoint_final.pth"):
        (folder / name).write_text("{}")
    package = types.ModuleType("nnInteractive.inference.inference_session")
    package.nnInteractiveInferenceSession = Session
    for name in ("nnInteractive", "nnInteractive.inference"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setattr(licences, "_told", set())
    monkeypatch.setenv("SEMISAM_HOME", str(tmp_path / "home"))
    threads = torch.get_num_threads()
    for _ in range(2):
        made = generalists.build("nninteractive", device="cpu", autozoom=False)  # found by its name
    assert made.session.folder == str(folder)
    assert (made.session.device, made.session.autozoom) == (torch.device("cpu"), False)
    assert made.session.threads == threads
    assert len(made.files) == 4
    told = capsys.readouterr().err.splitlines()
    assert told == [f"nninteractive: licence of the weights: {NnInteractive.spec.licence}"]
    with pytest.raises(ValueError, match="device: expected auto, cpu, cuda, got 'tpu'"):
        NnInteractive(folder, device="tpu")


def test_the_package_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nnInteractive", None)
    (tmp_path / "dataset.json").write_text("{}")
    with pytest.raises(ImportError, match=r"needs the package nnInteractive, .* pip install nninteractive"):
        NnInteractive(tmp_path)


def test_bad_input(tmp_path, images):
    with pytest.raises(ValueError, match=r"checkpoint: expected the folder .* got neither"):
        NnInteractive()
    with pytest.raises(ValueError, match="got both"):
        NnInteractive(tmp_path, session=session())
    with pytest.raises(ValueError, match=r"with dataset.json in it, got"):
        NnInteractive(tmp_path)
    with pytest.raises(ValueError, match="sure: expected a positive number, got 0"):
        NnInteractive(session=session(), sure=0)
    made = NnInteractive(session=session())
    state = made.encode(images)
    with pytest.raises(TypeError, match="expected a torch tensor, got ndarray"):
        made.encode(images.numpy())
    with pytest.raises(ValueError, match=r"expected \[B, channels, D, H, W\], got shape \(2, 1, 10, 12\)"):
        made.encode(images[..., 0])
    empty = PromptBatch.empty(2, 1, SHAPE, images)
    with pytest.raises(
        ValueError, match="expected a click or a mask for every row, got none for sample 0, class 1"
    ):
        made.decode(state, empty)
    with pytest.raises(ValueError, match="expected 2 samples of the images' shape"):
        made.decode(state, PromptBatch.empty(1, 1, SHAPE, images))
    with pytest.raises(ValueError, match=r"prompts.boxes: expected None"):
        made.decode(state, replace(empty, boxes=torch.zeros(2, 1, 6)))
    with pytest.raises(ValueError, match=r"mask_logits: expected the images' shape .* got \(4, 4, 4\)"):
        made.decode(state, replace(empty, mask_logits=torch.zeros(2, 1, 4, 4, 4)))
    with pytest.raises(ValueError, match=r"active: expected shape \(2, 1\), got \(1, 1\)"):
        made.decode(state, empty, torch.ones(1, 1, dtype=torch.bool))
