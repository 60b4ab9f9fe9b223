# SPDX-License-Identifier: Apache-2.0
"""The term where nobody looks at a value (tests/watched.py): no wait, and the CPU's results."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from watched import Waited, watched

from semisam import fusion, ops, prompts, random_walk
from semisam._fusing import masked_mean, source_table
from semisam.generalists import Decoded, GeneralistSpec
from semisam.generalists import _random_walker_seeds as walking
from semisam.generalists.callable import CallableGeneralist
from semisam.generalists.random_walker import RandomWalker
from semisam.generalists.sam_med3d import SamMed3D
from semisam.generalists.sam_med3d_network import Architecture, SamMed3DNetwork
from semisam.term import SemiSAMTerm

# ---- the watch itself ---------------------------------------------------------------------------

X = torch.linspace(-1, 1, 12).reshape(3, 4)
WAITS = {
    "bool": lambda: bool(X.any()),
    "if": lambda: 1 if X.sum() > 0 else 0,
    "item": lambda: X.sum().item(),
    "float": lambda: float(X.sum()),
    "tolist": X.tolist,
    "numpy": X.numpy,
    "array": lambda: np.asarray(X),
    "cpu": X.cpu,
    "format": lambda: f"{X.sum():.3f}",
    "mask": lambda: X[X > 0],
    "set by mask": lambda: X.clone().__setitem__(X > 0, 1.0),
    "nonzero": X.nonzero,
    "where": lambda: torch.where(X > 0),
    "unique": X.unique,
    "slice": lambda: X[: X.argmax()],
    "repeats": lambda: torch.repeat_interleave(X.argmax(1)),
    "tensor": lambda: torch.tensor([1.0, 2.0]),
    "new_tensor": lambda: X.new_tensor([1.0]),
    "as_tensor": lambda: torch.as_tensor([1.0]),
    "from_numpy": lambda: torch.from_numpy(np.zeros(3)),
    "list as index": lambda: X[[0, 2]],
}


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_is_seen(name, monkeypatch):
    WAITS[name]()
    with watched(monkeypatch), pytest.raises(Waited):
        WAITS[name]()


def test_what_needs_no_value_passes(monkeypatch):
    with watched(monkeypatch):
        assert ops.stays(X.device)
        made = torch.where(X > 0, X, 0).masked_fill(X > 0.5, 2.0)[:, 1:].sum(0)
        made += ops.numbers([1, 2, 3], torch.float32, X.device)
    assert not ops.stays(X.device)
    assert made.shape == (3,)


# ---- building blocks ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12, 13), (7, 9, 8)])
def test_clicks_are_the_same(shape, monkeypatch, rng):
    target = torch.from_numpy(rng.random((2, 2, *shape)) < 0.4)
    options = {"seed": 5, "round": 1, "clicks": 6}
    expected = prompts.next_click(target, iteration=2**32 - 1, sample_ids=[3, 70000], **options)
    step, ids = torch.tensor(2**32 - 1), torch.tensor([3, 70000])
    with watched(monkeypatch):
        given = [
            prompts.next_click(target, iteration=t, sample_ids=i, **options)
            for t in (2**32 - 1, step)
            for i in ([3, 70000], ids)
        ]
    given.append(prompts.next_click(target, iteration=step, sample_ids=ids, **options))
    for point, label in given:
        assert torch.equal(point, expected[0])
        assert torch.equal(label, expected[1])


def test_counters_that_do_not_fit_are_refused(monkeypatch):
    options = {"round": 0, "classes": [1], "like": torch.empty(0)}
    with watched(monkeypatch):
        for wrong in ({"iteration": 2**32, "sample_ids": [0]}, {"iteration": 0, "sample_ids": [-1]}):
            with pytest.raises(ValueError, match="expected numbers of 32 bits"):
                prompts.click_counter(**wrong, **options)


def test_points_and_converters(monkeypatch, rng):
    prob = torch.from_numpy(rng.random((2, 3, 9, 8, 7), np.float32)).softmax(1)
    where = {"seed": 1, "iteration": 4, "sample_ids": [0, 1], "confidence": 0.0}

    def converted():
        batch = prompts.sample_points(prob, 3, **where)
        flat = prompts.PromptBatch((8, 7), batch.points[..., 1:], batch.labels)
        return [batch.points, batch.labels, *batch.to_sam_med3d(32).values(), *flat.to_hf(64).values()]

    expected = converted()
    with watched(monkeypatch):
        given = converted()
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))


@pytest.mark.parametrize("label", ["late", "last", "all"])
@pytest.mark.parametrize("doubt", ["late", "last", "all"])
@pytest.mark.parametrize("teacher", [False, True])
def test_source_weights_are_the_same(label, doubt, teacher, monkeypatch, rng):
    places = [6, 1, 3]
    done = [torch.from_numpy(rng.integers(0, n + 1, 8)) for n in places]
    done[0][0], done[1][0], done[2][0] = 0, 0, 0  # a sample without any source
    scores = [0.8, 0.25, 1.0]
    with watched(monkeypatch):
        ours = source_table(scores, done, places, teacher, 0.3, label=label, doubt=doubt)
    for a, n in zip(done, places, strict=True):
        a[-1] = n  # the host's table has as many places as the longest dialogue has rounds
    ours = source_table(scores, done, places, teacher, 0.3, label=label, doubt=doubt)
    theirs = fusion.source_weights(
        scores, [d.tolist() for d in done], teacher, 0.3, label=label, doubt=None if doubt == label else doubt
    )
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a.numpy(), b, rtol=1e-15)
        assert (a[:, 0] == 0).all()


@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("unc", ["var", "ent", "mi"])
@pytest.mark.parametrize("weight", ["exp", "linear", "gate", "conf", "none"])
def test_fusion_with_weights_that_stay(channels, logits, unc, weight, monkeypatch, rng):
    sources = [torch.from_numpy(3 * rng.standard_normal((3, channels, 9, 8, 7))).float() for _ in range(4)]
    if not logits:
        sources = [z.sigmoid() if channels == 1 else z.softmax(1) for z in sources]
    sources[1][1] = sources[3][1] = float("nan")  # of no weight there
    sources[0][0, :, 0, 0, 0] = float("nan")
    r_lab, r_unc = fusion.source_weights([0.8, 0.5], [[2, 1, 0], [1, 0, 0]], label="all", doubt="last")
    tables = [torch.from_numpy(r) for r in (r_lab, r_unc)]
    options = {"unc": unc, "weight": weight, "logits": logits, "two_channels": channels == 1}
    options |= {"tau_c": 0.6, "tau_u": 0.4, "kappa": 3.0}
    expected = fusion.fuse(sources, r_lab, r_unc, **options)
    with watched(monkeypatch):
        given = fusion.fuse(sources, *tables, **options)
        nothing = fusion.fuse(sources, 0 * tables[0], logits=logits)
        agreed = fusion.agreement(given.label, given.label, max(channels, 2))
        few = fusion.fuse(sources, *tables, **options, want=("label",))
        alike = fusion.fuse(sources, r_lab.tolist(), tables[1], **options)
        per_source = fusion.fuse(sources, tables[0][:, 0], logits=logits, want=("mean",)).mean
    for ours, theirs, too in zip(given, expected, alike, strict=True):
        assert ours.numpy().tobytes() == theirs.numpy().tobytes() == too.numpy().tobytes()
    numbers = fusion.fuse(sources, r_lab[:, 0], logits=logits, want=("mean",)).mean
    assert per_source.numpy().tobytes() == numbers.numpy().tobytes()
    assert (given.label[2] == 255).all()
    assert (nothing.label == 255).all()
    assert torch.equal(nothing.weight, torch.zeros_like(nothing.weight))
    assert agreed.shape == (3,)
    assert torch.equal(few.label, given.label)
    assert few.mean is few.weight is None


def test_weights_that_stay_are_checked_by_shape(monkeypatch):
    sources = [torch.zeros(2, 1, 4, 4)] * 3
    good, flat, short = (torch.zeros(n, dtype=torch.float64) for n in ((3, 2), (6,), (2, 2)))
    with watched(monkeypatch):
        for pair in ((flat,), (short,), (good, flat), ([0.5, 0.5, 0], short), (good[None],)):
            with pytest.raises(ValueError, match=r"fuse\(\): (uncertainty_)?weights: expected a tensor"):
                fusion.fuse(sources, *pair)
        with pytest.raises(ValueError, match=r"fuse\(\): weights: expected weights from 0 to 1, got -1"):
            fusion.fuse(sources, [-1.0, 1.0, 1.0], good)  # numbers of the host are looked at, as ever
        with pytest.raises(ValueError, match=r"fuse\(\): uncertainty_weights: expected all 0 exactly where"):
            fusion.fuse(sources, None, [[0.5, 0]] * 2 + [[0, 0]])


def test_numbers_of_the_host_for_a_device(monkeypatch):
    """The operator sees tables alone, and equal weights are none at all: nothing is made for them."""
    seen = []
    monkeypatch.setattr(ops, "call", lambda op, maps, lab, unc, *_: seen.append((lab, unc)) or [maps[:1]] * 5)
    sources = [torch.zeros(2, 1, 4, 4)] * 3
    with watched(monkeypatch):
        for pair in ((), ([0.5, 0.25, 0.25],), (None, np.array([[1, 0], [0, 0.5], [0, 0.5]]))):
            fusion.fuse(sources, *pair)
    (none, neither), (lab, same), (equal, unc) = seen
    assert none is neither is same is equal is None
    assert lab.tolist() == [[0.5, 0.5], [0.25, 0.25], [0.25, 0.25]]
    assert unc.tolist() == [[1, 0], [0, 0.5], [0, 0.5]]
    assert lab.dtype == unc.dtype == torch.float64


def test_masked_mean():
    values, kept = torch.tensor([1.0, float("nan"), 4.0]), torch.tensor([True, False, True])
    assert masked_mean(values, kept).item() == 2.5
    assert masked_mean(values, ~kept | kept).isnan()
    assert masked_mean(values, kept & ~kept).isnan()


# ---- the term -----------------------------------------------------------------------------------

STEP, TOTAL = 500, 1000


def scene(dims: int = 3, classes: int = 2, batch: int = 2, seed: int = 0):
    """Images, truth [B, F, *S] and a teacher's probabilities, a voxel or two off."""
    rng = np.random.default_rng(seed)
    space = (16, 20, 14)[:dims]
    grid = np.indices(space)
    truth = np.zeros((batch, classes - 1, *space), bool)
    for b in range(batch):
        for c in range(classes - 1):
            centre = [n * (2 * c + 1) / (2 * (classes - 1)) if d == 1 else n / 2 for d, n in enumerate(space)]
            distance = ((grid - np.array(centre).reshape(-1, *(1,) * dims)) ** 2).sum(0)
            truth[b, c] = distance < ((6 - b) if classes == 2 else 4) ** 2
    image = truth.any(1, keepdims=True) + 0.2 * rng.standard_normal((batch, 1, *space))
    shift = np.roll(truth, 2, axis=-1)
    prob = np.where(shift, 0.9, 0.05) + 0.04 * rng.random(shift.shape)
    prob = np.concatenate([1 - prob.sum(1, keepdims=True).clip(0, 0.98), prob], 1)
    prob /= prob.sum(1, keepdims=True)
    return (torch.from_numpy(a) for a in (image.astype(np.float32), truth, prob.astype(np.float32)))


class Remote:
    """A generalist that promises not to wait: the truth, with faults that depend on sample and round."""

    def __init__(self, truth, faults=(), *, name="remote", fail=None, **spec):
        self.truth, self.faults, self.fail, self.round = truth, list(faults), fail, 0
        options = {"spatial_dims": (2, 3), "prompts": frozenset({"points", "mask", "box"})} | spec
        self.spec = GeneralistSpec(name, asynchronous=True, **options)

    def encode(self, images, *, spacing=None):
        self.round = 0
        return images

    def decode(self, state, prompts, active=None):
        mask, k = self.truth, self.round
        self.round += 1
        by = self.faults[k] if k < len(self.faults) else 0
        logits = torch.where(mask.roll(by, -1), 3.0, -3.0) + 0.25 * state
        logits = torch.where(active.reshape(*active.shape, *(1,) * (mask.ndim - 2)), logits, -10.0)
        if self.fail is not None:
            logits = self.fail(logits, k)
        size = self.spec.mask_size or tuple(mask.shape[2:])
        low = torch.full((*mask.shape[:2], *size), float(k + 1))
        return Decoded(logits, low, {"calls": 1})


def both(monkeypatch, make, images, prob, logits=None, **call):
    """(value, gradient, diagnostics, last) of the CPU's way and of the one that looks at nothing."""
    found = []
    given = prob.clamp_min(1e-6).log() + 0.3 * prob.roll(1, -1) if logits is None else logits
    for quiet in (False, True):
        term, z = make(), given.clone().requires_grad_()
        options = {"step": STEP, "sample_ids": [4, 9][: len(images)], **call}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with watched(monkeypatch) if quiet else contextlib.nullcontext():
                value = term(images, z, options.pop("teacher", prob), **options)
                value.backward()
            diagnostics = dict(term.diagnostics)
        assert diagnostics.pop("asynchronous") == quiet
        found.append((value.detach(), z.grad, diagnostics, term.last))
    return found


def same(found):
    """One operator fuses for both, but the quiet one has sources that do not count: other sums of four."""
    (value, grad, numbers, last), (value_q, grad_q, numbers_q, last_q) = found
    torch.testing.assert_close(value_q, value, rtol=2e-5, atol=0)
    torch.testing.assert_close(grad_q, grad, rtol=1e-4, atol=1e-9)
    for name, number in numbers.items():
        if name != "solver" and not name.startswith("ms_"):  # rounds that nobody needs are asked for, too
            near = number if number is None or isinstance(number, dict) else pytest.approx(number, rel=2e-5)
            assert numbers_q[name] == near, name
    for name in ("target", "weight", "uncertainty") if last is not None else ():
        torch.testing.assert_close(getattr(last_q, name), getattr(last, name), rtol=0, atol=8e-6)


MODES = ("unc", "point", "mask", "mixed", "box")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("preset", ["plus", "ref"])
@pytest.mark.parametrize(("dims", "classes"), [(3, 2), (2, 3)])
def test_every_mode(mode, preset, dims, classes, monkeypatch):
    images, truth, prob = scene(dims, classes)
    same(
        both(
            monkeypatch,
            lambda: SemiSAMTerm(
                Remote(truth, [5, 4, 2]), total_steps=TOTAL, mode=mode, preset=preset, clicks=4
            ),
            images,
            prob,
        )
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("memory", ["last", "all"])
def test_rows_that_are_asked_for_have_every_click(mode, memory, monkeypatch):
    """What `unpadded` says to generalists that group rows by their numbers of clicks."""
    images, truth, prob = scene(dims=2, classes=3)
    prob[1, 1] = 0  # a class that nobody sees
    prob /= prob.sum(1, keepdim=True)
    seen = []

    class Noting(Remote):
        def decode(self, state, prompts, active=None):
            seen.append((prompts, active))
            return super().decode(state, prompts, active)

    def gone(logits, k):  # a row that fails is not asked again
        if k:
            logits[0, 1].fill_(float("nan"))
        return logits

    options = {"mode": mode, "click_memory": memory, "clicks": 4, "tau_p": 1.0}
    term = SemiSAMTerm(Noting(truth, [5, 3, 2], fail=gone), total_steps=TOTAL, **options)
    for quiet in (True, False):
        seen.clear()
        with warnings.catch_warnings(), watched(monkeypatch) if quiet else contextlib.nullcontext():
            warnings.simplefilter("ignore")
            term(images, prob.clamp_min(1e-6).log(), prob, step=STEP)
        assert all(batch.unpadded == quiet for batch, _ in seen)
        assert all((batch.labels >= 0).all(2)[active].all() for batch, active in seen)
        assert not seen[-1][1].all()


@pytest.mark.parametrize("memory", ["last", "all"])
@pytest.mark.parametrize("clicks", [1, 5])
@pytest.mark.parametrize("doubt", ["late", "last", "all"])
def test_clicks_and_rounds(memory, clicks, doubt, monkeypatch):
    images, truth, prob = scene(classes=3)
    options = {
        "clicks": clicks,
        "click_memory": memory,
        "mode": "unc",
        "doubt_rounds": doubt,
        "target": "hard",
    }

    def make():
        return SemiSAMTerm(Remote(truth, [6, 3, 3, 1]), total_steps=TOTAL, tau_c=0.6, **options)

    same(both(monkeypatch, make, images, prob))


def test_several_generalists_with_reliabilities(monkeypatch):
    images, truth, prob = scene()

    def make():
        pair = [Remote(truth, [4, 2]), Remote(truth, [1], name="other", prompts=frozenset({"points"}))]
        term = SemiSAMTerm(pair, total_steps=TOTAL, mode=["mixed", "unc"], clicks=3, unc="mi")
        term.gate.reliability.scores[:] = 0.9, 0.4
        return term

    same(both(monkeypatch, make, images, prob))


@pytest.mark.parametrize("choice", ["mask", "largest_component"])
def test_what_the_gate_decides(choice, monkeypatch):
    images, truth, prob = scene()
    prob[0, 1, :3, :3, :3] = 0.95  # a second component
    prob[0, 0, :3, :3, :3] = 0.05

    def make():
        term = SemiSAMTerm(Remote(truth), total_steps=TOTAL, clicks=3)
        term.gate.choice["remote"] = choice
        return term

    found = both(monkeypatch, make, images, prob)
    same(found)
    assert (found[1][0] > 0) == (choice != "mask")


def nowhere(prob):
    empty = torch.zeros_like(prob)
    empty[:, 0] = 1
    return empty


def test_no_foreground_anywhere_is_exactly_0(monkeypatch):
    images, truth, prob = scene()
    for batch in (2, 1):
        made = both(
            monkeypatch,
            lambda n=batch: SemiSAMTerm(Remote(truth[:n], [3]), total_steps=TOTAL, mode="unc", clicks=3),
            images[:batch],
            nowhere(prob[:batch]),
            prob[:batch].log(),
        )
        for value, grad, numbers, _ in made:
            assert value.item() == 0
            assert not grad.any()
            assert numbers["agreement"] is numbers["mean_u"] is None
        assert made[1][2]["skipped"] == batch
        assert made[1][3].weight.max() == 0


def test_a_sample_without_foreground_counts_nothing(monkeypatch):
    images, truth, prob = scene()
    prob[1] = nowhere(prob)[1]
    same(both(monkeypatch, lambda: SemiSAMTerm(Remote(truth, [3]), total_steps=TOTAL), images, prob))


def spoil(kind, after=0, sample=0):
    def fail(logits, k):
        if k < after:
            return logits
        if kind == "shape":
            return logits[..., :-1]
        rows = torch.zeros_like(logits[:, 0, 0, 0, 0], dtype=torch.bool)
        rows[sample if sample is not None else slice(None)].fill_(True)
        value = float("nan") if kind == "nan" else 2.0
        return torch.where(rows.reshape(-1, 1, 1, 1, 1), value, logits)

    return fail


@pytest.mark.parametrize("kind", ["nan", "constant", "shape"])
@pytest.mark.parametrize(("after", "sample"), [(0, 0), (2, 0), (0, None), (1, None)])
def test_answers_that_say_nothing(kind, after, sample, monkeypatch):
    images, truth, prob = scene()

    def make():
        bad = Remote(truth, [5, 4, 2], fail=spoil(kind, after, sample))
        return SemiSAMTerm([bad, Remote(truth, [3], name="good")], total_steps=TOTAL, mode="unc", clicks=4)

    found = both(monkeypatch, make, images, prob)
    same(found)
    assert found[1][2]["failed_rows"] > 0
    assert found[1][2]["drops"]["remote"] == int(not any(found[0][2]["rounds"]["remote"]))


def test_nobody_has_anything_to_say(monkeypatch):
    images, truth, prob = scene()
    for kind in ("nan", "shape"):
        found = both(
            monkeypatch,
            lambda kind=kind: SemiSAMTerm(Remote(truth, fail=spoil(kind, 0, None)), total_steps=TOTAL),
            images,
            prob,
        )
        for value, grad, numbers, _ in found:
            assert value.item() == 0
            assert not grad.any()
            assert set(numbers["dropped"]) == {"remote"}
            assert numbers["failed_rows"] == 2


def test_failures_are_told_when_they_are_read_and_counted_without_it(monkeypatch):
    images, truth, prob = scene()
    bad = Remote(truth, fail=spoil("nan", 0, None))
    term = SemiSAMTerm(bad, total_steps=TOTAL, mode="mask", sam_every=2)
    with watched(monkeypatch), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            term(images, prob.log(), prob, step=STEP)
    with pytest.warns(RuntimeWarning, match=r"remote: 2 answers are not finite at step 500"):
        assert term.diagnostics["failed_rows"] == 2
    assert term.diagnostics["dropped"] == {"remote": "are not finite"}
    assert term.diagnostics["drops"] == {"remote": 3}
    with watched(monkeypatch):
        term(images, prob.log(), prob, step=STEP + 1)  # nobody is asked
    assert term.diagnostics["drops"] == {"remote": 3}
    with watched(monkeypatch):
        term.from_labels(images, prob.log(), prob, prob[:, 0], step=STEP)
    assert term.diagnostics["drops"] == {"remote": 3}
    term(images, prob.log(), prob, step=STEP)  # on the CPU
    assert term.diagnostics["drops"] == {"remote": 4}


def test_a_step_of_the_cpu_is_a_number(monkeypatch):
    """A tensor of the host's, which may be looked at: it is none of those that a graph may change."""
    monkeypatch.setattr(ops, "lacks", lambda device, wanted: [])
    monkeypatch.setattr(ops, "stays", lambda device: device.type == "meta")
    gpu = torch.device("meta")
    images, truth = torch.rand(2, 1, 9, 8, 7, device=gpu), torch.ones(2, 1, 9, 8, 7, device=gpu) > 0
    prob = torch.rand(2, 2, 9, 8, 7, device=gpu).softmax(1)
    term = SemiSAMTerm(Remote(truth), total_steps=TOTAL, mode="mask")
    value = term(images, prob.log(), prob, step=torch.tensor(STEP))
    assert value.device == gpu
    assert isinstance(term.diagnostics._values["weight"], float)


def test_numbers_of_a_solver_are_plain_where_the_host_waits():
    images, truth, prob = scene()

    class Counting(Remote):
        def decode(self, state, prompts, active=None):
            return super().decode(state, prompts, active)._replace(info={"calls": torch.tensor(2)})

    term = SemiSAMTerm(Counting(truth), total_steps=TOTAL, mode="mask")
    term(images, prob.log(), prob, step=STEP)
    assert term.diagnostics["solver"] == {"remote": {"calls": 2}}
    assert isinstance(term.diagnostics["solver"]["remote"]["calls"], int)


def test_a_slow_generalist_is_told_of_without_a_wait(monkeypatch):
    images, truth, prob = scene()
    term = SemiSAMTerm(Remote(truth), total_steps=TOTAL, budget=1e-9)
    with watched(monkeypatch), pytest.warns(RuntimeWarning, match=r"remote: took .* s at step 500, budget"):
        term(images, prob.log(), prob, step=STEP)
    assert term.diagnostics["slow"]["remote"] > 0


def test_no_teacher_and_logits_that_are_not_finite(monkeypatch):
    images, truth, prob = scene()

    def make():
        return SemiSAMTerm(Remote(truth, [3, 1]), total_steps=TOTAL)

    logits = 2 * prob.log()
    same(both(monkeypatch, make, images, prob, logits, teacher=None))
    logits[0, 0, 3, 3, 3] = float("inf")
    for value, grad, *_ in both(monkeypatch, make, images, prob, logits, teacher=None):
        assert value.isnan()
        assert grad.isnan().any()


def test_a_teacher_that_is_no_distribution_makes_nan_and_is_told(monkeypatch):
    images, truth, prob = scene()
    for wrong in (2 * prob, prob.log(), prob / prob.new_zeros(())):
        term = SemiSAMTerm(Remote(truth), total_steps=TOTAL)
        with watched(monkeypatch):
            value = term(images, prob.log(), wrong, step=STEP)
        assert value.isnan()
        with pytest.raises(ValueError, match="teacher_probs: expected probabilities that sum to 1"):
            term.diagnostics["loss"]


@pytest.mark.parametrize("step", [0, 30, 500, 501, 1000])
def test_steps_and_ids_that_are_tensors(step, monkeypatch):
    images, truth, prob = scene()

    def make():
        return SemiSAMTerm(Remote(truth, [3, 1]), total_steps=TOTAL, sam_every=2, mode="unc", clicks=3)

    expected = make()(images, prob.log(), prob, step=step, sample_ids=[4, 9])
    term, moving = make(), torch.tensor(step)
    with watched(monkeypatch):
        value = term(images, prob.log(), prob, step=moving, sample_ids=TENSORS[1])
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (value.item() == 0) == (step % 2 == 1 or step == 0)
    assert term.diagnostics["weight"] == pytest.approx(term.factor(step), rel=1e-12)
    # Without `watched` a generalist may be asked as ever, and tensors are read.
    waited = make()(images, prob.log(), prob, step=torch.tensor(step), sample_ids=torch.tensor([4, 9]))
    assert torch.equal(waited, expected)


TENSORS = (torch.tensor(STEP), torch.tensor([4, 9]))


@pytest.mark.parametrize("target", ["soft", "hard"])
@pytest.mark.parametrize("kind", ["all", "one", "none"])
def test_labels_from_before(target, kind, monkeypatch):
    images, truth, prob = scene()
    weight = torch.rand(2, 16, 20, 14, generator=torch.Generator().manual_seed(0))
    weight = weight * torch.tensor({"all": [1.0, 1.0], "one": [0.0, 1.0], "none": [0.0, 0.0]}[kind]).reshape(
        -1, 1, 1, 1
    )
    labels = prob.roll(1, 3) if target == "soft" else truth[:, 0].byte()
    found = []
    for step in (STEP, None):
        term, logits = (
            SemiSAMTerm("random-walker", total_steps=TOTAL, target=target),
            prob.log().requires_grad_(),
        )
        with contextlib.nullcontext() if step else watched(monkeypatch):
            value = term.from_labels(images, logits, labels, weight, step=step or TENSORS[0])
            value.backward()
        found.append((value.detach(), logits.grad, dict(term.diagnostics)))
    (value, grad, numbers), (value_q, grad_q, numbers_q) = found
    torch.testing.assert_close(value_q, value, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad_q, grad, rtol=1e-6, atol=0)
    assert numbers_q["skipped"] == numbers["skipped"]
    if kind == "none":
        assert value_q == 0
        assert numbers_q["mean_u"] is None
    else:
        assert numbers_q["mean_u"] == pytest.approx(numbers["mean_u"], rel=1e-6)


def test_who_waits(monkeypatch):
    """No promise, slices and whole scans (`teach`) are asked as on the CPU, and the diagnostics say so."""
    _, truth, _ = scene()
    flat = {"spatial_dims": (2,), "slice_axis": 0}
    monkeypatch.setattr(ops, "stays", lambda device: True)
    cpu = torch.device("cpu")
    assert SemiSAMTerm(Remote(truth), total_steps=TOTAL)._is_quiet(cpu, 3)
    assert not SemiSAMTerm(RandomWalker(device="cpu"), total_steps=TOTAL)._is_quiet(cpu, 3)
    assert SemiSAMTerm("random-walker", total_steps=TOTAL)._is_quiet(cpu, 3)
    assert not SemiSAMTerm(Remote(truth, **flat), total_steps=TOTAL)._is_quiet(cpu, 3)
    assert SemiSAMTerm(Remote(truth, **flat), total_steps=TOTAL)._is_quiet(cpu, 2)
    mixed = SemiSAMTerm([Remote(truth), RandomWalker(device="cpu")], total_steps=TOTAL)
    assert not mixed._is_quiet(cpu, 3)
    mixed.gate.choice["random-walker"] = "largest_component"
    assert mixed._is_quiet(cpu, 3)


# ---- generalists that promise it ----------------------------------------------------------------


@pytest.fixture(scope="module")
def sam():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = SamMed3DNetwork(Architecture.small())
        for name, parameter in network.named_parameters():
            if "rel_pos" in name or name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.5)
    return SamMed3D(network=network)


@pytest.mark.parametrize("shape", [(20, 24, 16), (45, 32, 20)])
@pytest.mark.parametrize("drawn", [False, True])
def test_sam_med3d_answers_the_same(sam, shape, drawn, monkeypatch):
    """Rows of 0 to 3 clicks in one batch, in any place; a row that is not asked for."""
    g = torch.Generator().manual_seed(2)
    images = torch.rand(2, 2, *shape, generator=g)
    points = torch.randint(0, 16, (2, 3, 3, 3), generator=g)
    labels = torch.tensor([[[1, -1, 0], [-1, -1, -1], [1, 1, 1]], [[-1, -1, 0], [0, 1, -1], [1, 0, 1]]])
    active = torch.tensor([[True, True, True], [True, True, False]])
    masks = torch.randn(2, 3, *sam.spec.mask_size, generator=g) if drawn else None
    batch = prompts.PromptBatch(shape, points, labels.int(), None, masks)

    def asked():
        state = sam.encode(images, spacing=(1.0, 1.0, 2.0))
        return sam.decode(state, batch, active), sam.mask_prompt(images[:, :1], state)

    expected, expected_mask = asked()
    with watched(monkeypatch):
        given, given_mask = asked()
        sam.decode(sam.encode(images), prompts.PromptBatch.empty(2, 3, shape, images))
    for ours, theirs in ((given.logits, expected.logits), (given.low_res, expected.low_res)):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
    assert torch.equal(given_mask, expected_mask)
    assert (given.logits[1, 2] == -10).all()


@pytest.mark.parametrize(("mode", "memory"), [("unc", "all"), ("point", "last"), ("mixed", "last")])
def test_the_term_with_sam_med3d(sam, mode, memory, monkeypatch):
    images, _, prob = scene()

    def make():
        options = {"mode": mode, "clicks": 2, "click_memory": memory, "sample_gate": 0.0}
        return SemiSAMTerm(sam, total_steps=TOTAL, **options)

    (value, _, numbers, last), (value_q, _, numbers_q, last_q) = both(monkeypatch, make, images, prob)
    assert value > 0
    assert numbers_q["rounds"] == numbers["rounds"]
    assert numbers_q["clicks"] == numbers["clicks"]
    assert value_q.item() == pytest.approx(value.item(), rel=1e-3)
    torch.testing.assert_close(last_q.target, last.target, atol=1e-3, rtol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("dims", "classes"), [(3, 2), (2, 3)])
def test_the_term_with_the_random_walker(mode, dims, classes, monkeypatch):
    images, _, prob = scene(dims, classes)
    images = torch.cat([images, images.roll(1, 2) ** 2], 1)

    def make():
        return SemiSAMTerm("random-walker", total_steps=TOTAL, mode=mode, clicks=3)

    found = both(monkeypatch, make, images, prob)
    (value, _, numbers, last), (value_q, _, numbers_q, last_q) = found
    assert value > 0
    for name in ("rounds", "clicks", "failed_rows"):
        assert numbers_q[name] == numbers[name], name
    assert value_q.item() == pytest.approx(value.item(), rel=2e-3)
    solver, solver_q = numbers["solver"]["random-walker"], numbers_q["solver"]["random-walker"]
    assert (solver_q["solves"], solver_q["unconverged"]) == (solver["solves"], 0)
    assert solver_q["iterations"] == pytest.approx(solver["iterations"], rel=0.1)
    torch.testing.assert_close(last_q.target, last.target, atol=2e-3, rtol=0)


@pytest.mark.parametrize("shape", [(16, 12, 9), (21, 17)])
def test_the_random_walker_answers_the_same(shape, monkeypatch):
    """Rows with and without mask, box and clicks, clicks that cover each other, a row not asked for."""
    g = torch.Generator().manual_seed(3)
    images = torch.rand(2, 1, *shape, generator=g)
    n = len(shape)
    points = torch.stack([torch.randint(0, s, (2, 3, 3), generator=g) for s in shape], -1)
    points[0, 0, 1] = points[0, 0, 0]
    labels = torch.tensor([[[1, 0, 1], [-1, -1, -1], [1, -1, 0]], [[-1, -1, -1], [0, 1, -1], [1, 0, 1]]])
    active = torch.tensor([[True, True, True], [True, True, False]])
    masks = torch.randn(2, 3, *shape, generator=g)
    masks[0, 0] = masks[1, 0] = masks[1, 1] = 0  # says nothing
    low = torch.full((2, 3, n), 2.25)
    boxes = torch.cat([low, low + torch.tensor([4.5, 6.5, 3.0])[:n]], -1)
    given = [(masks, boxes), (None, boxes), (masks, None)]
    for walker in (RandomWalker(), RandomWalker(largest_component=True, colour_weight=0.0, radius=1.0)):
        for mask, box in given:
            asked = active & (
                (labels >= 0).any(2) | (False if mask is None else (mask != 0).flatten(2).any(2))
            )
            asked = active if box is not None else asked
            batch = prompts.PromptBatch(shape, points, labels.int(), box, mask)
            expected = walker.decode(walker.encode(images), batch, asked)
            with watched(monkeypatch):
                ours = walker.decode(walker.encode(images), batch, asked)
            # Where a solve ends is decided by a sum, in another order; its bound is relative to `tol`.
            torch.testing.assert_close(ours.logits.sigmoid(), expected.logits.sigmoid(), atol=2e-3, rtol=0)
            assert (ours.logits[~asked] == -10).all()
            assert int(ours.info["solves"]) == expected.info["solves"] == int(asked.sum())


def test_seeds_of_the_random_walker_are_the_same(monkeypatch, rng):
    """Without the solve: seeds exactly, priors within rounding."""
    image = random_walk.standardize(torch.from_numpy(rng.random((2, 14, 11, 9), np.float32)), spatial_dims=3)
    mask = torch.from_numpy(rng.random((4, 14, 11, 9)) < 0.5)
    mask[0, 2:12, 2:9, 1:8], mask[1], mask[2] = True, False, True
    points = torch.from_numpy(rng.integers(0, 9, (4, 3, 3)))
    labels = torch.from_numpy(rng.integers(-1, 2, (4, 3)))
    box = torch.tensor([[[1.5, 2.0, 0.0], [3.0, 3.5, 2.0]]]).expand(4, 2, 3).contiguous()
    own = {"radius": 2.0, "colour": 0.5}
    shown = image.repeat_interleave(2, 0)
    for clicks in ((points, labels), (points[:, :0], labels[:, :0])):
        with watched(monkeypatch):
            grey = walking.grey_of(image)
            by_mask = walking.mask_seeds(grey, mask, clicks, weight=2.0, **own)
            by_clicks = walking.click_seeds(
                image, grey, box, clicks, geodesic_weight=4.0, edge_weight=30.0, **own
            )
        pair = dict(zip(("points", "labels"), clicks, strict=True))
        for ours, theirs in (
            (by_mask, random_walk.mask_seeds(shown, mask, spatial_dims=3, **pair)),
            (by_clicks, random_walk.click_seeds(shown, box=box, spatial_dims=3, **pair)),
        ):
            assert torch.equal(ours[0], theirs[0])
            torch.testing.assert_close(ours[1], theirs[1], atol=3e-5, rtol=0)


class Deterministic(TorchDispatchMode):
    """Refuses what deterministic torch refuses of tensors on a GPU, as far as we might use it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        refused = ("kthvalue", "median", "nanmedian", "histc", "bincount", "cumsum", "put_")
        assert func.__name__.split(".")[0] not in refused
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["point", "mixed"])
def test_generalists_may_be_asked_in_deterministic_trainings(sam, mode, monkeypatch):
    images, _, prob = scene()
    term = SemiSAMTerm([sam, "random-walker"], total_steps=TOTAL, mode=mode, clicks=2, sample_gate=0.0)
    with watched(monkeypatch), Deterministic():
        term(images, prob.clamp_min(1e-6).log(), prob, step=STEP)
    assert term.diagnostics["loss"] > 0


def test_a_function_that_promises_it(monkeypatch):
    images, _, prob = scene()

    def bright(images, prompts):
        return 6 * (images - 0.5)

    model = CallableGeneralist(bright, asynchronous=True, mask_size=(4, 5, 2))
    same(both(monkeypatch, lambda: SemiSAMTerm(model, total_steps=TOTAL, clicks=3), images, prob))
    assert not CallableGeneralist(bright).spec.asynchronous


# ---- one device ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("given", ["numbers", "tensors"])
def test_nothing_is_left_on_the_cpu(mode, given, monkeypatch):
    """On tensors without values, for which two devices in one operation are an error, as is a look at one."""
    monkeypatch.setattr(ops, "lacks", lambda device, wanted: [])
    monkeypatch.setattr(ops, "stays", lambda device: device.type == "meta")
    gpu = torch.device("meta")
    images, truth = torch.rand(2, 1, 9, 8, 7, device=gpu), torch.ones(2, 2, 9, 8, 7, device=gpu) > 0
    prob = torch.rand(2, 3, 9, 8, 7, device=gpu).softmax(1)
    logits = torch.rand(2, 3, 9, 8, 7, device=gpu).requires_grad_()
    pair = [Remote(truth, [2]), Remote(truth, name="other", mask_size=(3, 3, 3))]
    term = SemiSAMTerm(pair, total_steps=TOTAL, mode=mode, clicks=3, target="hard", loss="ce_dice")
    step, ids = STEP, [4, 9]
    if given == "tensors":
        step = torch.zeros((), dtype=torch.int64, device=gpu)
        ids = torch.zeros(2, dtype=torch.int64, device=gpu)
    value = term(images, logits, prob, step=step, sample_ids=ids)
    value.backward()
    held = [value, logits.grad, *term.diagnostics._values.values(), *term.last]
    held.append(term.from_labels(images, logits, prob.argmax(1).byte(), prob[:, 0], step=step))
    assert {t.device for t in held if isinstance(t, torch.Tensor)} == {gpu}
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        dict(term.diagnostics)


def test_the_tests_for_a_gpu_are_rehearsed():
    """A part of tests/test_term_cuda.py, watched: so that its code is right on the day of a GPU."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "cuda"),
            *("-k", "streams or from_before or exactly_0 or diagnostics or remote-unc or remote-mask"),
            "tests/test_term_cuda.py",
        ],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "SEMISAM_CUDA_REHEARSAL": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 passed" in done.stdout
