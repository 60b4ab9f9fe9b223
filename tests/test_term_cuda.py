# SPDX-License-Identifier: Apache-2.0
"""The generalist's term on a CUDA device: no wait, graphs, streams; tests/gpu.py says how to rehearse.

python -m pytest -m cuda tests/test_term_cuda.py
SEMISAM_CUDA_REHEARSAL=cpu python -m pytest tests/test_term_cuda.py
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from gpu import DEVICE, REHEARSAL, Graph, Stream, bits, keep_busy, missing, move, no_waits, wait
from test_term_device import MODES, STEP, TOTAL, Remote, nowhere, sam, scene, spoil
from watched import watched

from semisam import SemiSAMTerm, losses, ops

__all__ = ["sam"]  # a fixture

WHY = missing()
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(bool(WHY), reason=WHY or "-")]
BOUND: dict[str, Any] = {"rtol": 1e-4, "atol": 5e-6}  # of kernels that sum in another order than the CPU's


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    if REHEARSAL:
        monkeypatch.setattr(ops, "stays", lambda device: True)


@pytest.fixture
def quietly(monkeypatch):
    """An error where the host would wait; in a rehearsal, where somebody looks at a value."""
    return (lambda: watched(monkeypatch)) if REHEARSAL else no_waits


def placed(*shape: Any, **options: Any):
    """A scene on the device: images, truth, probabilities, and logits of a student."""
    images, truth, prob = move(list(scene(*shape, **options)))
    return images, truth, prob, prob.clamp_min(1e-6).log() + 0.3 * prob.roll(1, -1)


def taught(term: Any, images: Any, logits: Any, prob: Any, **call: Any):
    """Value and gradient."""
    z = logits.detach().requires_grad_()
    value = term(images, z, prob, **{"step": STEP, "sample_ids": [4, 9][: len(images)], **call})
    return [value.detach(), *torch.autograd.grad(value, z)]


def close(got: Any, expected: Any, **bound: Any) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs.cpu(), **{**BOUND, **bound})


OPTIONS = [
    pytest.param({"mode": mode, "preset": preset, "target": target}, id=f"{mode}-{preset}-{target}")
    for mode in MODES
    for preset, target in (("plus", "soft"), ("ref", "hard"))
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("dims", "classes"), [(3, 2), (2, 3)])
def test_no_call_waits_and_all_is_as_on_the_cpu(options, dims, classes, quietly, monkeypatch):
    images, truth, prob, logits = placed(dims, classes)

    def make(mask):
        return SemiSAMTerm(Remote(mask, [5, 4, 2]), total_steps=TOTAL, clicks=4, **options)

    term = make(truth)
    taught(term, images, logits, prob)  # loads kernels
    with quietly():
        got = taught(term, images, logits, prob)
    assert term.diagnostics["asynchronous"]
    monkeypatch.setattr(ops, "stays", lambda device: False)
    cpu = make(truth.cpu())
    close(got, taught(cpu, images.cpu(), logits.cpu(), prob.cpu()), atol=1e-9)
    for name, clicks in cpu.last.clicks.items():  # no rounding here; rounds that nobody needed are behind
        k, ours = clicks.labels.shape[2], term.last.clicks[name]
        assert torch.equal(ours.labels[:, :, :k].cpu(), clicks.labels)
        assert torch.equal(ours.points[:, :, :k].cpu(), clicks.points)
        assert (ours.labels[:, :, k:] < 0).all()
    for name in ("rounds", "clicks", "skipped", "skipped_rows", "failed_rows"):
        assert term.diagnostics[name] == cpu.diagnostics[name], name


@pytest.mark.parametrize("mode", ["unc", "mixed"])
def test_sam_med3d_does_not_wait(sam, mode, quietly):
    images, _, prob, logits = placed()
    term = SemiSAMTerm(sam, total_steps=TOTAL, mode=mode, clicks=2, click_memory="all", sample_gate=0.0)
    taught(term, images, logits, prob)
    with quietly():
        got = taught(term, images, logits, prob)
    assert all(t.isfinite().all() for t in got)
    assert got[0] > 0


def test_several_generalists_one_of_which_fails(quietly):
    images, truth, prob, logits = placed()
    bad = Remote(truth, [4, 2], fail=spoil("nan", 1, 0))
    term = SemiSAMTerm([bad, Remote(truth, [1], name="good")], total_steps=TOTAL, mode="unc", clicks=3)
    taught(term, images, logits, prob)
    with quietly():
        got = taught(term, images, logits, prob)
    assert all(t.isfinite().all() for t in got)
    with pytest.warns(RuntimeWarning, match="remote: 1 answers are not finite"):
        assert term.diagnostics["failed_rows"] == 1


def test_nothing_to_learn_from_is_exactly_0(quietly):
    images, truth, prob, logits = placed()
    term, empty = SemiSAMTerm(Remote(truth), total_steps=TOTAL), nowhere(prob)
    taught(term, images, logits, empty)
    with quietly():
        got = taught(term, images, logits, empty)
    assert not any(t.any() for t in got)


def test_labels_from_before_do_not_wait(quietly):
    images, _, prob, logits = placed()
    term = SemiSAMTerm(total_steps=TOTAL)

    def learn():
        z = logits.detach().requires_grad_()
        value = term.from_labels(images, z, prob, prob[:, 1], step=STEP)
        return [value.detach(), *torch.autograd.grad(value, z)]

    expected = learn()
    with quietly():
        got = learn()
    assert bits(got) == bits(expected)
    assert got[0] > 0


# ---- graphs and streams -------------------------------------------------------------------------


def objective(term: Any, step: Any, ids: Any, images: Any, logits: Any, prob: Any, labels: Any):
    """A whole objective of one labeled and two unlabeled samples, and its gradient."""
    z = logits.detach().requires_grad_()
    terms = [losses.Term(kind, labels, samples=(0, 1), scale=0.5) for kind in ("ce", "dice")]
    terms.append(losses.Term("mse", prob, samples=(1, 3), scale=0.1))
    value = losses.voxel_loss(z, terms) + term(images, z[1:], prob, step=step, sample_ids=ids)
    return [value.detach(), *torch.autograd.grad(value, z)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("generalist", ["remote", "sam"])
def test_a_graph_replays_with_other_data_steps_and_samples(mode, generalist, sam):
    if generalist == "sam" and mode in ("box", "unc", "point"):
        pytest.skip("what is not in its prompts, or in another mode, too")
    first, second = placed(seed=0), placed(seed=5)
    labels = first[1][:1, 0].byte()
    model = sam if generalist == "sam" else Remote(first[1], [4, 2])
    term = SemiSAMTerm(model, total_steps=TOTAL, mode=mode, clicks=2, sample_gate=0.0, seed=3)

    def inputs(images, truth, prob, logits):
        return images, torch.cat([logits[:1], logits]), prob

    held = [t.clone() for t in inputs(*first)]
    step, ids = move(torch.tensor(STEP)), move(torch.tensor([4, 9]))
    with contextlib.nullcontext() if REHEARSAL else no_waits():
        graph = Graph(lambda: objective(term, step, ids, *held, labels))
    for data, t, who in ((second, 700, [1, 2**31]), (first, 120, [4, 9]), (second, 10, [7, 8])):
        for room, values in zip(held, inputs(*data), strict=True):
            room.copy_(values)
        step.fill_(t)
        ids.copy_(torch.tensor(who))
        got = [v.clone() for v in graph.replay()]
        numbers = dict(term.diagnostics)
        again = SemiSAMTerm(model, total_steps=TOTAL, mode=mode, clicks=2, sample_gate=0.0, seed=3)
        expected = objective(again, t, who, *inputs(*data), labels)
        close(got, expected, rtol=1e-5, atol=1e-9)
        assert numbers["clicks"] == again.diagnostics["clicks"]
        assert numbers["rounds"] == again.diagnostics["rounds"]
        assert numbers["weight"] == pytest.approx(again.factor(t), rel=1e-12)


def test_two_streams_at_once():
    """Two terms side by side give what they give one after the other."""
    scenes = [placed(seed=0), placed(seed=5)]

    def make(images, truth, prob, logits):
        term = SemiSAMTerm(Remote(truth, [4, 2]), total_steps=TOTAL, mode="mixed", clicks=4)
        return lambda: taught(term, images, logits, prob)

    calls = [make(*one) for one in scenes]
    expected = [bits(call()) for call in calls]
    wait()
    streams, got = [Stream(), Stream()], []
    for stream, call in zip(streams, calls, strict=True):
        with stream:
            keep_busy()
            got.append(call())
    for stream in streams:
        stream.join()
    assert [bits(values) for values in got] == expected


def test_diagnostics_are_on_the_device_until_they_are_read(quietly):
    images, truth, prob, logits = placed()
    term = SemiSAMTerm(Remote(truth, [3]), total_steps=TOTAL)
    taught(term, images, logits, prob)
    with quietly():
        names = list(term.diagnostics)
        held = term.diagnostics._values
    assert held["loss"].device.type == held["weight_share"].device.type == DEVICE.type
    assert {name: type(term.diagnostics[name]) for name in ("loss", "weight_share", "skipped")} == {
        "loss": float,
        "weight_share": list,
        "skipped": int,
    }
    assert "mean_u" in names
