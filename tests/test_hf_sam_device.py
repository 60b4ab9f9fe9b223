# SPDX-License-Identifier: Apache-2.0
"""The SAM family where nobody looks at a value (tests/watched.py), and in deterministic trainings."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace

import pytest
import torch
from test_hf_sam import CLICKED, FAMILIES, every_family, generalist, picture, prompted
from test_term_device import STEP, TOTAL, Deterministic, both, scene
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from watched import Waited, watched

from semisam import SemiSAMTerm, ops
from semisam.generalists import hf_sam
from semisam.prompts import PromptBatch

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = (40, 52)


def answers(sam, images, batch, active):
    state = sam.encode(images)
    prob = torch.linspace(0, 1, batch.labels.shape[0] * batch.labels.shape[1] * 40 * 52)
    prob = prob.reshape(*batch.labels.shape[:2], *SHAPE)
    drawn = None if sam.spec.name == "medsam" else sam.mask_prompt(prob, state)
    return state, drawn, sam.decode(state, batch, active)


def near(ours, theirs):
    """Batches of another size round in another way."""
    torch.testing.assert_close(ours, theirs, atol=3e-4, rtol=0)


@every_family
@pytest.mark.parametrize("window", [None, (0.0, 200.0)])
def test_nothing_waits_and_answers_are_the_same(name, window, monkeypatch):
    sam = generalist(name, window=window, multimask=name != "medsam", decode_batch=4)
    images = picture(SHAPE, batch=2, channels=1)
    batch = prompted(name, SHAPE, batch=2, classes=3)
    active = torch.tensor([[True, False, True], [False, True, True]])
    state, drawn, expected = answers(sam, images, batch, active)
    with watched(monkeypatch), Deterministic():
        ours, map_, given = answers(sam, images, replace(batch, unpadded=True), active)
    near(ours.features, state.features)
    near(given.logits, expected.logits)
    near(given.low_res, expected.low_res)
    assert (given.logits[~active] == -10).all()
    if drawn is not None:
        near(map_, drawn)


@pytest.mark.parametrize("name", CLICKED)
@pytest.mark.parametrize("clicks", [0, 2])
def test_mask_prompts_of_some_rows(name, clicks, monkeypatch):
    """A mask prompt of zeros says nothing; a row without any prompt is no answer."""
    sam = generalist(name)
    batch = prompted(name, SHAPE, batch=2, classes=2)
    drawn = torch.randn(2, 2, sam.mask_side, sam.mask_side, generator=torch.Generator().manual_seed(2))
    drawn[0, 1] = drawn[1, 0] = 0
    batch = replace(
        batch, points=batch.points[:, :, :clicks], labels=batch.labels[:, :, :clicks], mask_logits=drawn
    )
    asked = torch.tensor([[True, clicks > 0], [clicks > 0, True]])
    state = sam.encode(picture(SHAPE, batch=2, channels=1))
    expected = sam.decode(state, batch, asked)
    with watched(monkeypatch):
        given = sam.decode(state, replace(batch, unpadded=True), asked)
        silent = sam.decode(state, replace(batch, unpadded=True))
    near(given.logits, expected.logits)
    assert silent.logits.isnan().flatten(2).all(2).equal(~asked)
    none = replace(batch, mask_logits=None)
    with watched(monkeypatch):
        if not clicks:
            with pytest.raises(
                ValueError, match=r"expected a click, a mask prompt or a box.*got none at all"
            ):
                sam.decode(state, replace(none, unpadded=True))
        with pytest.raises(Waited):  # who does not say that there is no padding
            sam.decode(state, batch)


def test_medsam_refuses_clicks_without_a_look(monkeypatch):
    sam = generalist("medsam")
    boxes = prompted("medsam", SHAPE)
    batch = PromptBatch(
        SHAPE, *(getattr(prompted("sam", SHAPE), n) for n in ("points", "labels")), boxes.boxes
    )
    state = sam.encode(picture(SHAPE))
    with watched(monkeypatch), pytest.raises(ValueError, match=r"prompts\.points: expected none"):
        sam.decode(state, replace(batch, unpadded=True))


class OneDevice(TorchDispatchMode):
    """Every tensor that goes into an operator, or comes out of it, lies on one device."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, made)) if isinstance(t, torch.Tensor)]
        assert {t.device for t in tensors} <= {self.device}, func
        return made


@every_family
def test_nothing_is_made_on_the_cpu(name, monkeypatch):
    """A table made there would be copied to the GPU in every call, and the host would wait for the copies."""
    gpu = torch.device("meta")
    monkeypatch.setattr(ops, "stays", lambda device: device.type == "meta")
    monkeypatch.setattr(hf_sam, "autocast", lambda *_: (contextlib.nullcontext(), torch.float32))
    sam = FAMILIES[name](model=clone(name))
    sam.model.to(gpu)
    images = torch.empty(2, 1, *SHAPE, device=gpu)
    batch = prompted(name, SHAPE, batch=2, classes=3)
    kept = {n: getattr(batch, n) for n in ("points", "labels", "boxes")}
    batch = PromptBatch(
        SHAPE, **{n: None if a is None else a.to(gpu) for n, a in kept.items()}, unpadded=True
    )
    with OneDevice(gpu):
        state = sam.encode(images)
        answer = sam.decode(state, batch, torch.ones(2, 3, dtype=torch.bool, device=gpu))
        if name != "medsam":
            sam.mask_prompt(torch.empty(2, 3, *SHAPE, device=gpu), state)
    assert answer.logits.shape == (2, 3, *SHAPE)


def clone(name):
    """A model that may be moved."""
    return copy.deepcopy(generalist(name).model)


@pytest.mark.parametrize(
    ("name", "mode"), [*((n, m) for n in CLICKED for m in ("unc", "mixed", "mask", "box")), ("medsam", "box")]
)
def test_the_term_waits_for_nothing(name, mode, monkeypatch):
    images, _, prob = scene(dims=2, classes=3)
    sam = generalist(name)
    found = both(
        monkeypatch,
        lambda: SemiSAMTerm(sam, total_steps=TOTAL, mode=mode, clicks=3, sample_gate=0.0, box=mode == "box"),
        images,
        prob,
    )
    near_enough(found)


def near_enough(found):
    """As `same` asks, but for the rounding of batches of another size, which several rounds enlarge."""
    (value, grad, numbers, last), (value_q, grad_q, numbers_q, last_q) = found
    assert float(value) > 0
    torch.testing.assert_close(value_q, value, rtol=1e-3, atol=0)
    torch.testing.assert_close(grad_q, grad, rtol=1e-2, atol=1e-7)
    for name in ("clicks", "skipped", "skipped_rows", "failed_rows", "dropped"):
        assert numbers_q[name] == numbers[name], name
    for name in ("target", "weight"):
        torch.testing.assert_close(getattr(last_q, name), getattr(last, name), rtol=0, atol=1e-3)


def test_slices_of_volumes_still_wait(monkeypatch):
    images, _, prob = scene(dims=3)
    term = SemiSAMTerm(generalist("sam"), total_steps=TOTAL, mode="point", clicks=2)
    assert not term._is_quiet(torch.device("cuda"), 3)
    assert term._is_quiet(torch.device("cuda"), 2)
    with watched(monkeypatch), pytest.raises(Waited):
        term(images, prob.log(), prob, step=STEP)
