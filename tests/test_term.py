# SPDX-License-Identifier: Apache-2.0
"""The generalist's term: prompts, dialogue, fusion, weights, loss, gate, state and bad input."""

from __future__ import annotations

import inspect
import json
import warnings

import numpy as np
import pytest
import torch
from generalist_fakes import Fake

import semisam
from semisam import fusion, generalists, losses, metrics, prompts, schedules
from semisam.engine.gate import sentence as gate_sentence
from semisam.gate import Gate, doubt_of, largest_components, sets_of
from semisam.generalists.random_walker import RandomWalker
from semisam.term import PRESETS, SemiSAMTerm

STEP, TOTAL = 500, 1000


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def scene(dims: int = 3, classes: int = 2, batch: int = 2, seed: int = 0):
    """Images, truth [B, F, *S] and a teacher's probabilities, a voxel or two off."""
    rng = np.random.default_rng(seed)
    space = (20, 24, 18)[:dims]
    grid = np.indices(space)
    truth = np.zeros((batch, classes - 1, *space), bool)
    for b in range(batch):
        for c in range(classes - 1):
            centre = np.array(
                [n * (2 * c + 1) / (2 * (classes - 1)) if d == 1 else n / 2 for d, n in enumerate(space)]
            )
            radius = (7 - b) if classes == 2 else 5
            truth[b, c] = ((grid - centre.reshape(-1, *(1,) * dims)) ** 2).sum(0) < radius**2
    image = truth.any(1, keepdims=True) + 0.2 * rng.standard_normal((batch, 1, *space))
    shift = np.roll(truth, 2, axis=-1)
    prob = np.where(shift, 0.9, 0.05) + 0.04 * rng.random(shift.shape)
    prob = np.concatenate([1 - prob.sum(1, keepdims=True).clip(0, 0.98), prob], 1)
    prob /= prob.sum(1, keepdims=True)
    as_tensor = torch.from_numpy
    return as_tensor(image.astype(np.float32)), as_tensor(truth), as_tensor(prob.astype(np.float32))


def student(prob: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    noise = torch.randn(prob.shape, generator=torch.Generator().manual_seed(7))
    return (prob.log() + 0.3 * noise).to(dtype).requires_grad_()


def make(generalist, **options) -> SemiSAMTerm:
    return SemiSAMTerm(generalist, **{"total_steps": TOTAL, **options})


def shifted(truth: torch.Tensor, by: int) -> torch.Tensor:
    """What to turn around so that a fake answers the truth shifted by some voxels."""
    return truth ^ truth.roll(by, -1)


# ---- the formula --------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("classes", [2, 3])
def test_value_is_that_of_the_building_blocks(dims, classes):
    """Preset plus on the random walker, written out once more."""
    images, _, prob = scene(dims, classes)
    logits = student(prob)
    term = make("random-walker")
    loss = term(images, logits, prob, step=STEP)

    walker = RandomWalker()
    masks = prompts.mask_logits(prob[:, 1:].flatten(0, 1), prob.shape[2:]).reshape(prob[:, 1:].shape)
    empty = prompts.PromptBatch.empty(2, classes - 1, prob.shape[2:], prob)
    batch = prompts.PromptBatch(empty.shape, empty.points, empty.labels, None, masks)
    answer = walker.decode(walker.encode(images), batch).logits
    joined = fusion.join_classes([answer[:, c : c + 1] for c in range(classes - 1)])
    q = joined.softmax(1)
    fused = fusion.fuse([q, prob], [1.0, 0.0], [0.5, 0.5], unc="var", weight="exp", kappa=4.0)
    value = losses.uncertainty_weighted_loss(logits, q, fused.weight)
    factor = 0.5 * schedules.sam_weight(STEP, TOTAL)
    assert loss.item() == pytest.approx(factor * value.item(), rel=1e-5)
    assert term.diagnostics["loss"] == pytest.approx(value.item(), rel=1e-5)
    assert term.diagnostics["weight"] == pytest.approx(factor, rel=1e-12)
    assert term.diagnostics["mean_u"] == pytest.approx(fused.uncertainty.double().mean().item(), rel=1e-4)
    torch.testing.assert_close(term.last.target, q, atol=1e-5, rtol=0)
    torch.testing.assert_close(term.last.weight, fused.weight, atol=1e-4, rtol=0)


def test_weight_over_the_training():
    """Check 4 through the term: 0.1 at the start and both weights equal halfway; lam_sam and warm-up."""
    total = 6000
    plain = SemiSAMTerm(total_steps=total, lam_sam=1.0, warmup=0.0)
    assert plain.factor(0) == 0.1
    assert plain.factor(total // 2) == pytest.approx(
        schedules.consistency_weight(total // 2, total), abs=1e-12
    )
    assert plain.factor(total // 2) == pytest.approx(0.028650, abs=5e-7)
    assert plain.factor(total) == pytest.approx(6.7379e-4, rel=1e-4)
    warm = SemiSAMTerm(total_steps=total, lam_sam=2.0, warmup=0.1)
    assert warm.factor(0) == 0.0
    assert warm.factor(300) == pytest.approx(2 * 0.5 * plain.factor(300), rel=1e-12)
    short = SemiSAMTerm(total_steps=total, lam_sam=1.0, warmup=0.0, w0=0.3, ramp_length=10)
    assert short.factor(0) == short.factor(total - 150 * 10) == 0.3
    assert short.factor(total) == pytest.approx(0.3 * np.exp(-5), rel=1e-9)
    rising = SemiSAMTerm(total_steps=total, lam_sam=2.0, warmup=0.0, w0=0.3, ramp="rising", ramp_length=10)
    assert rising.factor(0) == pytest.approx(0.6 * np.exp(-5), rel=1e-9)
    assert rising.factor(150 * 10) == rising.factor(total) == 0.6
    flat = SemiSAMTerm(total_steps=total, lam_sam=2.0, warmup=0.5, ramp="flat")
    assert [flat.factor(t) for t in (0, 1500, 3000, total)] == [0.0, 0.1, 0.2, 0.2]
    for preset in ("ref", "plus"):
        assert SemiSAMTerm(total_steps=total, preset=preset).settings["ramp"] == "falling"  # as published


@pytest.mark.parametrize("loss", ["mse", "ce", "ce_dice"])
@pytest.mark.parametrize("target", ["soft", "hard"])
def test_check_5_gradient(loss, target):
    """Non-zero wherever p != q and w > 0, zero where w = 0, nothing to images and teacher."""
    images, truth, prob = scene()
    images.requires_grad_(), prob.requires_grad_()
    logits = student(prob.detach())
    term = make(Fake(truth, mask_size=(4, 4, 4)), loss=loss, target=target, weight="gate", tau_u=0.1)
    term(images, logits, prob, step=STEP).backward()
    assert images.grad is None
    assert prob.grad is None
    weight = term.last.weight
    assert 0 < (weight == 0).sum() < weight.numel()
    moved = logits.grad.abs().sum(1) > 0
    assert not moved[weight == 0].any()
    assert moved[weight > 0].float().mean() > 0.999


def test_gradient_points_to_the_target():
    images, truth, prob = scene()
    logits = student(prob)
    term = make(Fake(truth), weight="none")
    first = term(images, logits, prob, step=STEP)
    first.backward()
    stepped = (logits - 1e3 * logits.grad).detach().requires_grad_()
    assert term(images, stepped, prob, step=STEP) < first


def test_check_5_scaling_weights_of_a_sample_changes_nothing():
    """A sample that is unsure everywhere counts as much as a sure one: kappa scales one sample's weights."""
    images, truth, _ = scene()
    even = torch.full((2, 2, *truth.shape[2:]), 0.5)
    even[1, 0] = 0.4999
    logits = student(even)
    sure = Fake(truth, sure=3.0)
    losses_ = []
    for kappa in (0.0, 1.0, 3.0):
        # Teacher and answers differ by the same amount everywhere, so that the weight is a constant.
        term = make(sure, mode="mask", kappa=kappa, unc="ent", teacher_share=0.0, sample_gate=0.0, p_min=0.0)
        losses_.append(term(images, logits, even.flip(1), step=STEP).item())
    weights = term.last.weight
    assert weights.std(dim=(1, 2, 3)).max() < 1e-6
    assert weights.mean() < 0.5
    assert losses_[1] == pytest.approx(losses_[0], rel=1e-5)
    assert losses_[2] == pytest.approx(losses_[0], rel=1e-5)


def test_check_6_identical_sources_have_no_doubt():
    """Generalist and teacher agree: u = 0 and w = 1. They contradict each other: u = 1."""
    images, truth, _ = scene(batch=1)
    for answer, u in ((truth, 0.0), (~truth, 1.0)):
        prob = torch.stack([~truth[:, 0], truth[:, 0]], 1).float()
        for unc in ("var", "mi"):
            term = make(Fake(answer, sure=30.0), unc=unc, clicks=4, sample_gate=0.0)
            term(images, student(prob.clamp(0.01, 0.99)), prob, step=STEP)
            assert term.last.uncertainty.min() == pytest.approx(u, abs=1e-5)
            assert term.last.uncertainty.max() == pytest.approx(u, abs=1e-5)
            assert term.last.weight.mean() == pytest.approx(np.exp(-4 * u), abs=1e-4)


def test_samples_of_next_to_no_weight_are_left_out():
    images, truth, _ = scene(batch=1)
    prob = torch.stack([~truth[:, 0], truth[:, 0]], 1).float()
    for kappa, skipped in ((5.0, 0), (10.0, 1)):  # u = 1 everywhere: w = exp(-kappa)
        term = make(Fake(~truth, sure=30.0), kappa=kappa, mode="mask", sample_gate=0.0)
        logits = student(prob.clamp(0.01, 0.99))
        loss = term(images, logits, prob, step=STEP)
        loss.backward()
        assert term.diagnostics["skipped"] == skipped
        assert (loss == 0) == (not logits.grad.any()) == bool(skipped)


def test_check_3_labels_have_no_way_in():
    """Nothing that computes the term takes a label, and nothing that takes one returns a loss."""
    takes = {
        name: set(inspect.signature(getattr(SemiSAMTerm, name)).parameters)
        for name in ("__init__", "__call__", "calibrate", "score")
    }
    assert not any("label" in p for p in takes["__call__"])
    assert {p for p in takes["__init__"] if "label" in p} == {"label_rounds"}
    assert "labels" in takes["calibrate"]
    images, _, prob = scene()
    values = []
    for truth in (torch.zeros(2, 20, 24, 18), torch.ones(2, 20, 24, 18)):
        term = make("random-walker")
        term.score(images, prob, truth.byte())
        logits = student(prob)
        loss = term(images, logits, prob, step=STEP)
        loss.backward()
        values.append((loss.detach(), logits.grad))
    assert torch.equal(values[0][0], values[1][0])  # one generalist: reliabilities have no ratio
    assert torch.equal(values[0][1], values[1][1])


def test_check_10_lam_sam_0_calls_nothing_and_changes_no_bit():
    images, truth, prob = scene()
    fake = Fake(truth)

    def train(term):
        torch.manual_seed(3)
        network = torch.nn.Sequential(
            torch.nn.Conv3d(1, 4, 3, padding=1), torch.nn.Dropout(0.5), torch.nn.Conv3d(4, 2, 1)
        )
        optimiser = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
        for step in range(4):
            logits = network(images)
            loss = logits.square().mean()
            if term is not None:
                loss = loss + term(images, logits, prob, step=step)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return [p.detach() for p in network.parameters()], torch.get_rng_state()

    plain, state = train(None)
    off, state_off = train(make(fake, lam_sam=0.0, warmup=0.0))
    on, state_on = train(make("random-walker", lam_sam=5.0, warmup=0.0))
    assert fake.encoded == []
    assert not make(fake, lam_sam=0.0)(images, student(prob), prob, step=1).requires_grad
    assert all(torch.equal(a, b) for a, b in zip(plain, off, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(plain, on, strict=True))
    assert torch.equal(state, state_off)
    assert torch.equal(state, state_on)  # the term draws nothing from torch


# ---- presets and modes --------------------------------------------------------------------------


def test_presets_are_those_of_the_table():
    plus, ref = (
        SemiSAMTerm(total_steps=6000, preset=p, mode=m).settings for p, m in (("plus", None), ("ref", "unc"))
    )
    assert plus["mode"] == ["mask"]  # the random walker's own
    expected = {
        "tau_p": 0.5,
        "clicks": 6,
        "target": "soft",
        "label_rounds": "late",
        "kappa": 4.0,
        "lam_sam": 0.5,
    }
    expected |= {"weight": "exp", "unc": "var", "teacher_share": 0.5, "sample_gate": 0.1, "warmup": 0.05}
    assert {name: plus[name] for name in expected} == expected
    assert plus["reliability"]
    expected = {"tau_p": 1.0, "clicks": 10, "target": "hard", "label_rounds": "last", "doubt_rounds": "all"}
    expected |= {"kappa": 1.0, "lam_sam": 0.1, "weight": "exp", "teacher_share": 0.0, "sample_gate": 0.0}
    assert {name: ref[name] for name in expected} == expected
    assert not ref["reliability"]
    assert ref["warmup"] == 0
    for mode in ("point", "mask"):
        settings = SemiSAMTerm(total_steps=6000, preset="ref", mode=mode).settings
        assert (settings["weight"], settings["lam_sam"]) == ("none", 0.5)
    for settings in (plus, ref):
        assert (settings["loss"], settings["w0"], settings["click_memory"]) == ("mse", 0.1, "last")
        assert settings["sam_every"] == 1


def test_ref_is_the_last_hard_mask():
    """Mode point: the last round alone, hard, weight 1: mean over samples and voxels of (p - q)^2."""
    images, truth, prob = scene()
    logits = student(prob)
    wrong = [shifted(truth, by) for by in (4, 3, 2)]
    term = make(Fake(truth, wrong, prompts=frozenset({"points"})), preset="ref", clicks=3)
    loss = term(images, logits, prob, step=STEP)
    q = truth[:, 0] ^ wrong[2][:, 0]
    assert torch.equal(term.last.label, q.byte())
    assert (term.last.weight == 1).all()
    p = logits.detach().softmax(1)[:, 1]
    assert loss.item() == pytest.approx(term.factor(STEP) * (p - q.float()).square().mean().item(), rel=1e-4)


def test_ref_unc_doubts_over_all_rounds():
    images, truth, prob = scene(batch=1)
    wrong = [shifted(truth, by) for by in (6, 4, 5, 0)]  # all but the last would be wrong
    term = make(Fake(truth, wrong, sure=30.0), preset="ref", mode="unc", clicks=4)
    term(images, student(prob), prob, step=STEP)
    rounds = torch.stack([(truth ^ w)[:, 0].float() for w in wrong])
    share = rounds.mean(0)
    torch.testing.assert_close(term.last.uncertainty, 4 * share * (1 - share), atol=1e-4, rtol=0)
    torch.testing.assert_close(term.last.weight, (-4 * share * (1 - share)).exp(), atol=1e-4, rtol=0)
    assert torch.equal(term.last.label, truth[:, 0].byte())


def test_point_takes_the_last_answer_of_every_row():
    """Mode point in preset plus: rows that stopped early count with their last answer, no round before it."""
    images, truth, prob = scene()
    target = prompts.specialist_targets(prob).target
    wrong = [truth ^ target for _ in range(4)]
    wrong[0][0] = wrong[1][0] = wrong[2][0] = shifted(truth, 5)[0]
    wrong[3][0] = shifted(truth, 3)[0]
    term = make(Fake(truth, wrong), mode="point", clicks=4)
    term(images, student(prob), prob, step=STEP)
    sure = torch.sigmoid(torch.tensor(6.0))
    answer = torch.stack([(truth ^ wrong[3])[0, 0], target[1, 0]])
    torch.testing.assert_close(term.last.target[:, 1], torch.where(answer, sure, 1 - sure), atol=1e-5, rtol=0)
    assert term.diagnostics["rounds"] == {"fake": [1, 1]}


def test_late_rounds_define_the_label():
    """Of 4 rounds the last 2 count: early mistakes leave no trace."""
    images, truth, prob = scene(batch=1)
    wrong = [shifted(truth, 5), shifted(truth, 4), shifted(truth, 0), shifted(truth, 0)]
    term = make(Fake(truth, wrong), clicks=4, mode="unc")
    term(images, student(prob), prob, step=STEP)
    assert term.diagnostics["rounds"] == {"fake": [4]}
    sure = torch.sigmoid(torch.tensor(6.0))
    expected = torch.where(truth[:, 0], sure, 1 - sure)
    torch.testing.assert_close(term.last.target[:, 1], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("mode", "calls", "clicks", "masks"),
    [
        ("point", 4, [True] * 4, [False, True, True, True]),
        ("unc", 4, [True] * 4, [False, True, True, True]),
        ("mixed", 4, [False, True, True, True], [True] * 4),
        ("mask", 1, [False], [True]),
        ("box", 1, [False], [False]),
    ],
)
def test_modes(mode, calls, clicks, masks):
    """What is asked in each round: a click, a mask prompt, a box; encoded once."""
    images, truth, prob = scene()
    fake = Fake(truth, [shifted(truth, by) for by in (5, 4, 3, 2)], mask_size=(5, 6, 3))
    term = make(fake, mode=mode, clicks=4)
    term(images, student(prob), prob, step=STEP, spacing=(1.0, 1.0, 2.0))
    assert len(fake.encoded) == 1
    assert fake.encoded[0][1] == (1.0, 1.0, 2.0)
    assert [bool((p.labels >= 0).any()) for p, _ in fake.asked] == clicks
    assert [p.mask_logits is not None for p, _ in fake.asked] == masks
    assert len(fake.asked) == calls
    assert all(p.boxes is not None for p, _ in fake.asked)
    if mode in ("mask", "mixed"):
        first = fake.asked[0][0].mask_logits
        torch.testing.assert_close(first[:, 0], prompts.mask_logits(prob[:, 1], (5, 6, 3)))
    for k in range(1, calls):  # the answer of the round before, as the fake numbers them
        assert (fake.asked[k][0].mask_logits == k).all()


def test_a_generalist_may_frame_its_mask_prompt_itself():
    images, truth, prob = scene()
    fake, seen = Fake(truth, mask_size=(4, 4, 4)), []

    def mask_prompt(p, state):
        seen.append((p, state))
        return torch.full((*p.shape[:2], 4, 4, 4), 0.25)

    fake.mask_prompt = mask_prompt
    make(fake, mode="mask")(images, student(prob), prob, step=STEP)
    assert (fake.asked[0][0].mask_logits == 0.25).all()
    ((given, state),) = seen
    assert torch.equal(given, prob[:, 1:])
    assert state == len(images)  # what the fake's encode returns


def test_prompts_go_only_where_a_generalist_takes_them():
    images, truth, prob = scene()
    fake = Fake(truth, [shifted(truth, 5)] * 3, prompts=frozenset({"points"}))
    make(fake, mode="unc", clicks=3)(images, student(prob), prob, step=STEP)
    assert all(p.mask_logits is None and p.boxes is None for p, _ in fake.asked)
    fake = Fake(truth)
    make(fake, mode="unc", clicks=1, box=False)(images, student(prob), prob, step=STEP)
    assert fake.asked[0][0].boxes is None


@pytest.mark.parametrize(("memory", "counts"), [("last", [1, 1, 1]), ("all", [1, 2, 3])])
def test_click_memory(memory, counts):
    images, truth, prob = scene()
    fake = Fake(truth, [shifted(truth, by) for by in (5, 4, 3)])
    term = make(fake, mode="unc", clicks=3, click_memory=memory)
    term(images, student(prob), prob, step=STEP)
    assert [p.labels.shape[2] for p, _ in fake.asked] == counts
    assert term.last.clicks["fake"].labels.shape[2] == 3
    assert term.diagnostics["clicks"] == 6


def test_clicks_are_those_of_next_click():
    """Own error region, the step as iteration, sample ids and rounds as counters, the seed as given."""
    images, truth, prob = scene()
    wrong = [shifted(truth, 5), shifted(truth, 3)]
    fake = Fake(truth, wrong)
    make(fake, mode="unc", clicks=2, seed=11)(images, student(prob), prob, step=STEP, sample_ids=[40, 7])
    target, region, skip = prompts.specialist_targets(prob)
    current = None
    for k in range(2):
        point, label = prompts.next_click(
            target, current, region, seed=11, iteration=STEP, sample_ids=[40, 7], round=k, clicks=2, skip=skip
        )
        assert torch.equal(fake.asked[k][0].points[:, :, -1], point)
        assert torch.equal(fake.asked[k][0].labels[:, :, -1], label)
        current = truth ^ wrong[k]


def test_clicks_keep_to_the_confident_region():
    images, truth, prob = scene(batch=1)
    target, _, _ = prompts.specialist_targets(prob)
    sure = torch.zeros_like(target)
    sure[..., :11, :] = True  # unsure beyond: P stays on its side of one half
    prob[:, 1] = torch.where(sure[:, 0], prob[:, 1], torch.where(target[:, 0], 0.55, 0.45))
    prob[:, 0] = 1 - prob[:, 1]
    for tau_p, inside in ((0.5, True), (1.0, False)):
        term = make(Fake(truth), mode="unc", clicks=1, rule="random", tau_p=tau_p)
        found = []
        for step in range(100, 130):
            term(images, student(prob), prob, step=step)
            found.append(bool(sure[0, 0][tuple(term.last.clicks["fake"].points[0, 0, 0])]))
        assert all(found) == inside


def test_rule():
    images, truth, prob = scene(batch=1)
    at = {}
    for rule in (None, "ritm", "random"):
        term = make(Fake(truth), mode="unc", clicks=1, rule=rule)
        term(images, student(prob), prob, step=STEP)
        at[rule] = term.last.clicks["fake"].points
    assert torch.equal(at[None], at["ritm"])
    assert not torch.equal(at[None], at["random"])


# ---- samples and classes ------------------------------------------------------------------------


def test_stop_rule_per_row():
    """A row whose answer equals the target is asked no more; the others go on."""
    images, truth, prob = scene()
    target = prompts.specialist_targets(prob).target
    wrong = [truth ^ target for _ in range(4)]
    for k in range(2):
        wrong[k][0] = shifted(truth, 5)[0]  # sample 0 needs three rounds, sample 1 one
    fake = Fake(truth, wrong)
    term = make(fake, mode="unc", clicks=4)
    term(images, student(prob), prob, step=STEP)
    assert [active.flatten().tolist() for _, active in fake.asked] == [
        [True, True],
        [True, False],
        [True, False],
    ]
    assert term.diagnostics["rounds"] == {"fake": [3, 1]}
    assert torch.equal(term.last.label.bool(), target[:, 0])
    assert term.diagnostics["skipped"] == 0


def test_sample_does_not_depend_on_its_neighbours():
    """Batch of two against each alone, in both orders: target, weight, clicks and gradient, bit for bit."""
    images, _, prob = scene(classes=3)
    logits = student(prob).detach()

    def one(order, ids):
        z = logits[order].clone().requires_grad_()
        term = make("random-walker", mode="mixed", clicks=3)
        term(images[order], z, prob[order], step=STEP, sample_ids=ids).backward()
        last = term.last
        return last.target, last.weight, last.clicks["random-walker"].points, len(order) * z.grad

    both = one([0, 1], [5, 9])
    turned = one([1, 0], [9, 5])
    for a, b in zip(both, turned, strict=True):
        assert torch.equal(a, b.flip(0))
    for i, number in enumerate((5, 9)):
        alone = one([i], [number])
        for a, b in zip(both, alone, strict=True):
            if a.dtype == torch.int64:
                assert torch.equal(a[i, :, : b.shape[2]], b[0])
            else:
                torch.testing.assert_close(a[i], b[0], atol=0 if a.ndim < 5 else 1e-9, rtol=0)


def test_nothing_stays_from_call_to_call():
    """Double use: the same call gives the same bits, whatever was asked in between, and on a new term."""
    images, _, prob = scene()
    other_images, _, other = scene(seed=5)
    values = []
    term = make("random-walker", mode="mixed", clicks=3)
    for one in (term, term, make("random-walker", mode="mixed", clicks=3)):
        logits = student(prob)
        loss = one(images, logits, prob, step=STEP)
        loss.backward()
        values.append((loss.detach(), logits.grad, one.last.target))
        one(other_images, student(other), other, step=STEP + 1)
    for value in values[1:]:
        assert all(torch.equal(a, b) for a, b in zip(values[0], value, strict=True))


def test_results_do_not_depend_on_threads():
    images, _, prob = scene(classes=3)
    values = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        logits = student(prob)
        loss = make("random-walker", mode="mixed", clicks=3)(images, logits, prob, step=STEP)
        loss.backward()
        values.append((loss.detach(), logits.grad))
    assert torch.equal(values[0][0], values[1][0])
    assert torch.equal(values[0][1], values[1][1])


def test_seed_step_and_ids_change_clicks():
    images, truth, prob = scene()

    def points(**options):
        fake = Fake(truth)
        call = {"step": STEP, "sample_ids": [0, 1], **{k: v for k, v in options.items() if k != "seed"}}
        make(fake, mode="unc", clicks=1, rule="random", seed=options.get("seed", 0))(
            images, student(prob), prob, **call
        )
        return fake.asked[0][0].points

    base = points()
    assert torch.equal(base, points())
    for other in ({"seed": 1}, {"step": STEP + 1}, {"sample_ids": [2, 3]}):
        assert not torch.equal(base, points(**other))


def test_skipped_class_and_sample():
    """A class below p_min is not asked for; a sample without any class drops out."""
    images, truth, prob = scene(classes=3, batch=2)
    prob[0, 0] += prob[0, 2]  # sample 0 lacks class 2
    prob[0, 2] = 0
    prob[1, 0] = 0.95  # sample 1 lacks both
    prob[1, 1:] = 0.025
    fake = Fake(truth)
    logits = student(prob.clamp_min(1e-3))
    term = make(fake, mode="mixed", clicks=2)
    loss = term(images, logits, prob, step=STEP)
    loss.backward()
    assert all(active.tolist()[1] == [False, False] and not active[0, 1] for _, active in fake.asked)
    d = term.diagnostics
    assert (d["skipped_rows"], d["skipped"]) == (3, 1)
    assert d["weight_share"][1] == 0
    assert not logits.grad[1].any()
    assert logits.grad[0].any()
    assert not (term.last.label[0] == 2).any()
    assert term.last.target[0, 2].max() < 1e-3


def test_all_skipped_is_exactly_zero():
    images, truth, prob = scene()
    prob[:, 0], prob[:, 1] = 0.95, 0.05
    logits = student(prob)
    fake = Fake(truth)
    term = make(fake)
    loss = term(images, logits, prob, step=STEP)
    assert loss.item() == 0
    loss.backward()
    assert logits.grad is not None
    assert not logits.grad.any()
    assert term.last is None
    assert term.diagnostics["skipped_rows"] == 2
    assert fake.asked == []


def test_weak_class_is_asked_for_below_half():
    """0.2 <= max P < 0.5: the threshold goes down, and the region is everything."""
    images, truth, prob = scene(batch=1)
    prob[:, 1] = torch.where(truth[:, 0], 0.4, 0.02)
    prob[:, 0] = 1 - prob[:, 1]
    term = make(Fake(truth), mode="unc", clicks=2)
    term(images, student(prob), prob, step=STEP)
    assert torch.equal(term.last.prompt_target, truth)
    assert term.diagnostics["agreement"] == 1


def test_sample_gate():
    """A generalist that found something else teaches nothing about that sample."""
    images, truth, prob = scene()
    wrong = torch.zeros_like(truth)
    wrong[1] = truth[1] | truth[1].roll(9, 2)  # sample 1 answers a place beside
    target = prompts.specialist_targets(prob).target
    wrong[1] = truth[1] ^ (truth[1].roll(10, 2) & ~target[1])
    logits = student(prob)
    term = make(Fake(truth, [wrong] * 9), mode="mask")
    term(images, logits, prob, step=STEP).backward()
    assert term.diagnostics["skipped"] == 1
    assert not logits.grad[1].any()
    assert logits.grad[0].any()
    open_ = make(Fake(truth, [wrong] * 9), mode="mask", sample_gate=0.0)
    open_(images, student(prob), prob, step=STEP)
    assert open_.diagnostics["skipped"] == 0


def test_student_is_its_own_source_without_a_teacher():
    images, truth, prob = scene()
    logits = prob.log().requires_grad_()
    term, same = make(Fake(truth), mode="mask"), make(Fake(truth), mode="mask", teacher_share=0.0)
    assert torch.equal(
        term(images, logits, step=STEP), same(images, logits, logits.detach().softmax(1), step=STEP)
    )
    assert (term.last.weight == 1).all()  # one source only: no doubt


def test_hard_targets_ignore_what_is_doubtful():
    images, truth, prob = scene(batch=1)
    term = make(Fake(truth, sure=1.0), mode="mask", target="hard", tau_c=0.9, sample_gate=0.0)
    logits = student(prob)
    term(images, logits, prob, step=STEP).backward()
    assert (term.last.target == 255).all()
    assert not logits.grad.any()
    term = make(Fake(truth, sure=5.0), mode="mask", target="hard", tau_c=0.9)
    term(images, student(prob), prob, step=STEP)
    assert (term.last.target != 255).any()
    assert (term.last.target == 255).any()  # where the teacher contradicts: u > 0.5


# ---- several generalists ------------------------------------------------------------------------


def test_each_generalist_has_its_own_clicks():
    """Own error regions and own draws; answers meet in the fusion."""
    images, truth, prob = scene()
    good, bad = Fake(truth, name="good"), Fake(truth, [shifted(truth, by) for by in (6, 6, 6)], name="bad")
    term = make([good, bad], mode="unc", clicks=3)
    term(images, student(prob), prob, step=STEP)
    assert set(term.diagnostics["rounds"]) == {"good", "bad"}
    target = prompts.specialist_targets(prob).target
    for fake, current in ((good, truth), (bad, truth ^ shifted(truth, 6))):
        at, label = fake.asked[1][0].points[0, 0, -1], fake.asked[1][0].labels[0, 0, -1]
        assert (target[0, 0] ^ current[0, 0])[tuple(at)]
        assert bool(label) == bool(target[0, 0][tuple(at)])
    twins = [Fake(truth, name="twin"), Fake(truth, name="twin")]
    term = make(twins, mode="unc", clicks=1, rule="random")
    term(images, student(prob), prob, step=STEP)
    assert not torch.equal(twins[0].asked[0][0].points, twins[1].asked[0][0].points)
    assert list(term.generalists) == ["twin", "twin-2"]


def test_reliability_weighs_generalists():
    images, truth, prob = scene(batch=1)
    other = truth.roll(4, -2)
    term = make([Fake(truth, name="a"), Fake(other, name="b")], mode="mask", sample_gate=0.0)
    only_b = (other & ~truth)[:, 0]
    for scores, share in (((0.5, 0.5), 0.5), ((0.8, 0.4), 0.2), ((0.8, 0.05), 0.0), ((0.05, 0.8), 1.0)):
        term.gate.reliability.scores[:] = scores
        term(images, student(prob), prob, step=STEP)
        assert term.last.target[:, 1][only_b].mean() == pytest.approx(share, abs=0.01)
    fakes = term.generalists
    for fake in fakes.values():
        fake.encoded.clear()
    term.gate.reliability.scores[:] = 0.05
    assert term(images, student(prob), prob, step=STEP).item() == 0  # all dropped: no term
    assert all(not fake.encoded for fake in fakes.values())
    even = make(list(fakes.values()), mode="mask", sample_gate=0.0, reliability=False)
    even.gate.reliability.scores[:] = (0.9, 0.05)
    even(images, student(prob), prob, step=STEP)
    assert even.last.target[:, 1][only_b].mean() == pytest.approx(0.5, abs=0.01)


def test_modes_per_generalist():
    images, truth, prob = scene()
    fakes = [Fake(truth, name="a"), Fake(truth, name="b")]
    term = make(fakes, mode=["mask", "point"], clicks=3)
    term(images, student(prob), prob, step=STEP)
    assert term.settings["mode"] == ["mask", "point"]
    assert fakes[0].asked[0][0].labels.shape[2] == 0
    assert fakes[1].asked[0][0].labels.shape[2] == 1
    assert fakes[1].asked[0][0].mask_logits is None


# ---- failures -----------------------------------------------------------------------------------


class Broken(Fake):
    """Answers NaN for sample `row` from round `since` on."""

    def __init__(self, truth, row, since=0, **options):
        super().__init__(truth, [shifted(truth, 5)] * 9, **options)
        self.row, self.since = row, since

    def decode(self, state, prompts, active=None):
        answer = super().decode(state, prompts, active)
        if len(self.asked) > self.since:
            answer.logits[self.row, 0, 0] = float("nan")
            answer.low_res[self.row] = float("nan")
        return answer


def test_a_sample_whose_answer_failed_is_left_out():
    images, truth, prob = scene()
    logits = student(prob)
    term = make(Broken(truth, 1), mode="mixed", clicks=3)
    with pytest.warns(RuntimeWarning, match=r"fake: 1 answers are not finite at step 500"):
        term(images, logits, prob, step=STEP).backward()
    assert logits.grad.isfinite().all()
    assert not logits.grad[1].any()
    assert logits.grad[0].any()
    assert (term.diagnostics["failed_rows"], term.diagnostics["skipped"]) == (1, 1)


def test_a_later_failure_keeps_the_answers_before():
    images, truth, prob = scene()
    term = make(Broken(truth, 1, since=2), mode="mixed", clicks=4)
    with pytest.warns(RuntimeWarning, match="1 answers are not finite"):
        term(images, student(prob), prob, step=STEP)
    assert term.diagnostics["rounds"] == {"fake": [4, 2]}
    assert term.diagnostics["skipped"] == 0
    assert term.last.target.isfinite().all()


def test_rounds_of_a_sample_that_failed_are_nobodys():
    """A class of sample 0 has no answer while the other goes on for three rounds; sample 1 needs one."""
    images, truth, prob = scene(classes=3)
    target = prompts.specialist_targets(prob).target

    class Stops(Broken):
        def decode(self, state, prompts, active=None):
            answer = super().decode(state, prompts, active)
            answer.logits[1] = torch.where(target[1], 6.0, -6.0)
            return answer

    term = make(Stops(truth, 0), mode="unc", clicks=3)
    logits = student(prob)
    with pytest.warns(RuntimeWarning, match="1 answers are not finite"):
        term(images, logits, prob, step=STEP).backward()
    assert term.diagnostics["rounds"] == {"fake": [0, 1]}
    assert term.diagnostics["clicks"] == 2 + 1 + 1 + 2
    assert not logits.grad[0].any()
    assert logits.grad[1].any()
    sure = torch.sigmoid(torch.tensor(6.0))
    assert term.last.target[1, 1:].amax() == pytest.approx(sure.item(), abs=0.01)


def test_a_solve_that_does_not_converge_is_in_the_diagnostics():
    images, _, prob = scene()
    term = make(RandomWalker(max_iter=2))
    with pytest.warns(RuntimeWarning, match="did not converge"):
        term(images, student(prob), prob, step=STEP)
    assert term.diagnostics["solver"]["random-walker"] == {"solves": 2, "iterations": 4, "unconverged": 2}


def test_nan_in_an_image_takes_that_sample_out():
    images, _, prob = scene()
    images[0, 0, 3, 3, 3] = float("nan")
    logits = student(prob)
    with pytest.warns(RuntimeWarning):
        make("random-walker")(images, logits, prob, step=STEP).backward()
    assert not logits.grad[0].any()
    assert logits.grad[1].any()


def test_logits_that_are_not_finite_are_not_hidden():
    images, truth, prob = scene()
    for teacher in (None, prob):
        logits = student(prob).detach()
        logits[1, 1, 2, 2, 2] = float("nan")
        loss = make(Fake(truth))(images, logits.requires_grad_(), teacher, step=STEP)
        assert loss.isnan()
    nothing = torch.full_like(prob, float("nan"), requires_grad=True)
    assert make(Fake(truth))(images, nothing, step=STEP).isnan()


# ---- when nothing is to be done -----------------------------------------------------------------


def test_sam_every_and_warm_up_give_exact_zeros():
    images, truth, prob = scene()
    fake = Fake(truth)
    term = make(fake, sam_every=5, warmup=0.1)
    called = {}
    for step in (0, 1, 499, 500, 501, 505):
        logits = student(prob)
        before = len(fake.encoded)
        loss = term(images, logits, prob, step=step)
        loss.backward()  # always possible
        called[step] = len(fake.encoded) - before
        assert (loss.item() != 0) == (logits.grad.abs().sum() > 0).item() == bool(called[step])
        assert term.diagnostics["called"] == bool(called[step])
    assert called == {0: 0, 1: 0, 499: 0, 500: 1, 501: 0, 505: 1}


def test_no_unlabeled_sample():
    images, truth, prob = scene()
    fake = Fake(truth)
    loss = make(fake)(images[:0], student(prob)[:0], prob[:0], step=STEP)
    assert loss.item() == 0
    loss.backward()
    assert fake.encoded == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_amp_logits(dtype):
    images, _, prob = scene()
    logits, exact = student(prob, dtype), student(prob)
    term = make("random-walker")
    loss = term(images, logits, prob.to(dtype), step=STEP)
    loss.backward()
    assert logits.grad.dtype == dtype
    assert logits.grad.isfinite().all()
    assert loss.item() == pytest.approx(
        make("random-walker")(images, exact, prob, step=STEP).item(), rel=0.05
    )
    term(images, logits, step=STEP)  # the student as its own source
    assert term.last.prob.dtype == torch.float32
    assert (term.last.prob.sum(1) - 1).abs().max() < 1e-5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = term(images, logits, prob, step=STEP)
    assert inside.item() == pytest.approx(loss.item(), rel=0.05)


def test_diagnostics_are_plain_and_complete():
    images, _, prob = scene(classes=3)
    term = make("random-walker", mode="mixed", clicks=3)
    blank = None
    for step in (0, STEP):
        term(images, student(prob), prob, step=step)
        json.dumps(term.diagnostics, allow_nan=False)
        blank = blank or set(term.diagnostics)
        assert set(term.diagnostics) == blank
    d = term.diagnostics
    assert d["called"]
    assert len(d["weight_share"]) == 2
    assert 0.5 < d["agreement"] <= 1
    assert 0 < d["mean_u"] < 1
    assert d["clicks"] > 0
    assert d["solver"]["random-walker"]["unconverged"] == 0
    assert d["ms_generalist"] > 0
    assert d["ms_rest"] > 0


def test_picture():
    images, truth, prob = scene(dims=2, classes=3)
    for target in ("soft", "hard"):
        term = make(Fake(truth, [shifted(truth, 4)] * 3), mode="unc", clicks=3, target=target)
        term(images, student(prob), prob, step=STEP)
        one = term.last.picture(1)
        assert {name: a.shape for name, a in one.items() if name != "clicks"} == {
            "image": (1, 20, 24),
            "prediction": (3, 20, 24),
            "target": (3, 20, 24),
            "weight": (20, 24),
            "uncertainty": (20, 24),
        }
        assert one["clicks"].shape == (6, 3)
        assert one["clicks"].dtype == np.int32
        assert all(a.dtype == np.float32 for name, a in one.items() if name != "clicks")


# ---- the gate -----------------------------------------------------------------------------------


def judged(candidate_truths, prob=None, **options):
    """A term with one fake per given answer, calibrated on two volumes."""
    images, truth, made = scene()
    prob = made if prob is None else prob
    fakes = [Fake(t[:1], name=f"g{i}") for i, t in enumerate(candidate_truths)]
    term = make(fakes, mode="mask", **options)
    label = truth[:, 0].byte()
    return term, term.calibrate(images[:1], prob[:1], label[:1]), (images, truth, prob, label)


def test_gate_takes_a_generalist_that_is_better():
    _, truth, _ = scene()
    term, found, _ = judged([truth])
    assert found["choice"] == {"g0": "g0"}
    assert found["scores"]["g0"] == 1
    assert found["scores"]["mask"] == found["scores"]["largest_component"] < 0.9
    assert found["reliability"] == {"g0": 1.0}
    assert term.gate.reliability.scores.tolist() == [1.0]
    json.dumps(found, allow_nan=False)


def test_gate_takes_the_largest_component_that_is_better():
    images, truth, _ = scene(batch=1)
    exact = torch.stack([~truth[:, 0], truth[:, 0]], 1).float() * 0.9 + 0.05
    exact[:, 1, :4, :4, :4], exact[:, 0, :4, :4, :4] = 0.9, 0.1  # a stray blob
    fake = Fake(truth.roll(2, 2))
    term = make(fake, mode="mask")
    label = truth[:, 0].byte()
    found = term.calibrate(images, exact, label)
    assert found["choice"] == {"fake": "largest_component"}
    assert found["scores"]["largest_component"] == 1
    assert found["switched"] == ["fake"]
    assert found["reliability"] == {"fake": 1.0}  # that of what it contributes
    calls = len(fake.encoded)
    logits = student(exact)
    term(images, logits, exact, step=STEP).backward()
    assert len(fake.encoded) == calls  # the generalist is not asked any more
    assert torch.equal(term.last.label, label)
    assert logits.grad.any()
    assert term.diagnostics["choice"] == {"fake": "largest_component"}
    assert term.last.target[:, 1].amax() > 0.9999


def test_gate_shuts_when_the_mask_is_best():
    images, truth, _ = scene(batch=1)
    exact = torch.stack([~truth[:, 0], truth[:, 0]], 1).float() * 0.9 + 0.05
    fake = Fake(truth.roll(2, 2))
    term = make(fake, mode="mask")
    found = term.calibrate(images, exact, truth[:, 0].byte())
    assert found["choice"] == {"fake": "mask"}
    calls = len(fake.encoded)
    logits = student(exact)
    loss = term(images, logits, exact, step=STEP)
    loss.backward()
    assert loss.item() == 0
    assert len(fake.encoded) == calls


def test_gate_judges_each_generalist():
    _, truth, _ = scene()
    term, found, (images, _, prob, _) = judged([truth.roll(8, 2), truth])
    assert found["choice"] == {"g0": "mask", "g1": "g1"}
    assert set(found["scores"]) == {"mask", "largest_component", "g0", "g1", "g0 + g1"}
    assert found["best"] == "g1"
    term(images[:1], student(prob[:1]), prob[:1], step=STEP)
    assert set(term.diagnostics["rounds"]) == {"g1"}


def test_gate_lets_those_teach_who_are_better_together():
    """Each is wrong somewhere else: the majority of three is right, no pair is."""
    _, truth, _ = scene()
    wrong = []
    for k in range(3):
        one = truth.clone()
        one[:, :, 3 * k : 3 * k + 2] = ~one[:, :, 3 * k : 3 * k + 2]
        wrong.append(one)
    term, found, (images, _, prob, label) = judged(wrong)
    assert found["best"] != "g0 + g1 + g2"  # a single scan says nothing about a gain
    found = term.calibrate(images[[0, 0]], prob[[0, 0]], label[[0, 0]])
    assert found["best"] == "g0 + g1 + g2"
    assert found["choice"] == {"g0": "g0", "g1": "g1", "g2": "g2"}
    scores = found["scores"]
    assert scores["g0 + g1 + g2"] == 1 > max(scores[p] for p in ("g0", "g0 + g1", "g1 + g2"))
    term.settings["sample_gate"] = 0.0
    term(images[:1], student(prob[:1]), prob[:1], step=STEP)
    assert torch.equal(term.last.label, label[:1])  # the term's own fusion says what was judged


def test_gate_silences_those_who_make_others_worse():
    """All are better than the mask, yet one alone is better than with two that err alike."""
    _, truth, _ = scene()
    term, found, (images, _, prob, _) = judged([truth.roll(1, 2), truth, truth.roll(1, 2)])
    scores = found["scores"]
    assert scores["largest_component"] < scores["g0"] < scores["g1"]
    assert scores["g0 + g1 + g2"] < scores["g1"]
    assert found["choice"] == {"g0": "mask", "g1": "g1", "g2": "mask"}
    assert "g0 teaches nothing: g1 is better without it; g1 teaches" in gate_sentence(found)
    term(images[:1], student(prob[:1]), prob[:1], step=STEP)
    assert set(term.diagnostics["rounds"]) == {"g1"}


@pytest.mark.parametrize("reliability", [True, False])
def test_gate_fuses_as_the_term_does(reliability):
    """Sets are weighted by reliability, or not: as in the training afterwards."""
    images, truth, prob = (a[:1] for a in scene(classes=3))
    fakes = [Fake(truth.roll(k, 2 + k), name=f"g{k}", sure=1.0 + k) for k in range(2)]
    term = make(fakes, mode="mask", reliability=reliability, teacher_share=0.0, sample_gate=0.0)
    label = (truth.byte() * torch.tensor([1, 2], dtype=torch.uint8)[:, None, None, None]).amax(1)
    found = term.calibrate(images, prob, label)
    term.gate.choice = {"g0": "g0", "g1": "g1"}
    for g, name in enumerate(("g0", "g1")):
        term.gate.reliability.scores[g] = found["scores"][name]
    term(images, student(prob), prob, step=STEP)
    dice = metrics.dice(term.last.label, label, include_background=False, num_classes=3)
    assert found["scores"]["g0 + g1"] == pytest.approx(float(dice.mean()), abs=1e-6)


def test_gate_averages_volumes_of_different_shapes_and_classes():
    big, small = scene(classes=3), scene(classes=3, seed=3)
    cut = (..., slice(1, 19), slice(2, 24), slice(0, 17))
    images = [big[0][0], small[0][1][cut]]
    probs = [big[2][0], small[2][1][cut]]
    labels = [
        (t.byte() * torch.tensor([1, 2], dtype=torch.uint8)[:, None, None, None]).amax(0)
        for t in (big[1][0], small[1][1][cut])
    ]
    labels[1] = labels[1].clone()
    labels[1][0] = 255
    for as_given in (list, lambda v: [a.numpy() for a in v]):
        term = make("random-walker")
        found = term.calibrate(*map(as_given, (images, probs, labels)), spacing=[(1.0, 1.0, 1.0), None])
        assert found["volumes"] == 2
        assert [len(v) for v in found["per_class"].values()] == [2, 2, 2]
        assert found["choice"] == {"random-walker": "random-walker"}
        assert found["scores"]["random-walker"] > found["scores"]["mask"] + 0.02
        each = [
            make("random-walker").calibrate(i[None], p[None], y[None])
            for i, p, y in zip(images, probs, labels, strict=True)
        ]
        for name, value in found["scores"].items():
            assert value == pytest.approx(np.mean([e["scores"][name] for e in each]), abs=1e-12)


def test_score_on_seen_scans_changes_reliability_alone():
    _, truth, _ = scene()
    term, _, (images, _, _, label) = judged([truth])
    term.gate.reliability.scores[:] = 0.5
    perfect = torch.stack([~truth[:, 0], truth[:, 0]], 1).float()[:1]
    term.generalists["g0"].truth = truth[:1].roll(3, 2)  # now worse than the mask
    found = term.score(images[:1], perfect, label[:1])
    assert found["choice"] == {"g0": "g0"}
    assert found["switched"] == []
    dice = found["scores"]["g0"]
    assert dice < found["scores"]["mask"] == 1
    assert found["reliability"]["g0"] == pytest.approx(0.9 * 0.5 + 0.1 * dice)


def test_score_on_held_out_scans_may_switch():
    _, truth, _ = scene()
    term, first, (images, _, prob, label) = judged([truth])
    term.generalists["g0"].truth = truth[:1].roll(9, 2)
    choices = []
    for _ in range(9):
        found = term.score(images[:1], prob[:1], label[:1], held_out=True)
        choices.append(found["choice"]["g0"])
        if found["switched"]:
            break
    assert choices[0] == "g0"  # momentum: not at once
    assert choices[-1] == "mask"
    assert found["switched"] == ["g0"]
    assert first["choice"] == {"g0": "g0"}


def test_score_without_calibration():
    images, truth, prob = scene()
    term = make(Fake(truth[:1]), mode="mask")
    found = term.score(images[:1], prob[:1], truth[:1, 0].byte())
    assert found["reliability"]["fake"] == pytest.approx(0.5 * 0.9 + 0.1)
    assert found["choice"] == {"fake": "fake"}


def test_state_survives(tmp_path):
    _, truth, _ = scene()
    term, _, (images, _, prob, label) = judged([truth.roll(8, 2), truth])
    term.score(images[:1], prob[:1], label[:1], held_out=True)
    torch.save(term.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    fresh = make(list(term.generalists.values()), mode="mask")
    fresh.load_state_dict(state)
    assert fresh.state_dict() == term.state_dict()
    assert fresh.gate.choice == {"g0": "mask", "g1": "g1"}
    values = [t(images[:1], student(prob[:1]), prob[:1], step=STEP) for t in (term, fresh)]
    assert torch.equal(*values)
    with pytest.raises(ValueError, match=r"expected generalists \['fake'\], got \['g0', 'g1'\]"):
        make(Fake(truth)).load_state_dict(state)


def test_largest_components_of_every_class():
    labels = np.zeros((2, 5, 9), np.int64)
    labels[0, :2, :3], labels[0, 4, 8] = 1, 1
    labels[0, 4, :2], labels[1, 0, 0] = 2, 2
    kept = largest_components(labels, 3)
    labels[0, 4, 8] = 0
    assert kept.dtype == np.uint8
    assert np.array_equal(kept, labels)
    assert torch.equal(largest_components(torch.from_numpy(labels), 3), torch.from_numpy(kept))


def test_gate_ties_go_to_the_simpler():
    gate = Gate(["g"])
    for scores, choice in (
        ({"mask": [0.7], "largest_component": [0.7], "g": [0.7]}, "mask"),
        ({"mask": [0.6], "largest_component": [0.7], "g": [0.7]}, "largest_component"),
        ({"mask": [0.6, 0.8], "largest_component": [0.7, 0.7], "g": [0.6, 0.9]}, "g"),
    ):
        gate.start(scores)
        assert gate.choice == {"g": choice}
        assert gate.best == choice


def test_a_gain_within_its_doubt_is_none():
    gate = Gate(["a", "b"])
    scores = {"mask": [0.5], "largest_component": [0.5], "a": [0.7], "b": [0.6], "a + b": [0.74]}
    for doubt, best in ((0.05, "a"), (0.03, "a + b")):
        gate.start(scores, {"a + b": doubt})
        assert gate.best == best
    gate.update(scores, held_out=True, doubt={"a + b": 0.9})
    assert gate.doubt["a + b"] == pytest.approx(0.9 * 0.03 + 0.1 * 0.9)
    assert gate.best == "a"
    fresh = Gate(["a", "b"])
    fresh.load_state_dict(gate.state_dict())
    assert (fresh.doubt, fresh.best, fresh.choice) == (gate.doubt, gate.best, gate.choice)


def test_doubt_is_that_of_the_volumes():
    """A gain on one of two volumes and none on the other: the error of the mean is the mean."""
    images, truth, prob = scene(batch=2)

    class Other(Fake):
        """Wrong about one part of the first volume, right about the second."""

        def encode(self, images, *, spacing=None):
            n = len(self.encoded)
            self.truth = truth[n : n + 1].clone()
            if n == 0:
                self.truth[:, :, self.part] = ~self.truth[:, :, self.part]
            return super().encode(images, spacing=spacing)

    fakes = [Other(truth, name=f"g{k}") for k in range(3)]
    for k, fake in enumerate(fakes):
        fake.part = slice(3 * k, 3 * k + 2)
    term = make(fakes, mode="mask")
    scores = term.calibrate(images, prob, truth[:, 0].byte())["scores"]
    gain = scores["g0 + g1 + g2"] - max(scores[f"g{k}"] for k in range(3))
    assert scores["g0 + g1 + g2"] == 1
    assert term.gate.doubt["g0 + g1 + g2"] == pytest.approx(3.078 * gain, rel=1e-6)
    assert term.gate.best != "g0 + g1 + g2"


def test_doubt_follows_student():
    stats = pytest.importorskip("scipy.stats")
    for n in (2, 3, 7, 11):
        gains = np.random.default_rng(n).normal(0.1, 0.05, n)
        expected = stats.t.ppf(0.9, n - 1) * gains.std(ddof=1) / n**0.5
        assert doubt_of(gains) == pytest.approx(expected, rel=1e-3)


def test_many_generalists_are_judged_in_pairs_and_all_together():
    names = [f"g{k}" for k in range(6)]
    sets = sets_of(names)
    assert len(sets) == 15 + 1
    gate = Gate(names)
    scores = {name: [0.5] for name in ("mask", "largest_component", *names, *sets)}
    gate.start(scores | {"g1 + g4": [0.6]})
    assert gate.choice == {name: name if name in ("g1", "g4") else "mask" for name in names}
    for _ in range(9):
        gate.update(scores | {" + ".join(names): [0.8]}, held_out=True)
    assert gate.best == " + ".join(names)
    assert gate.choice == {name: name for name in names}


def test_largest_component_source_never_denies_a_class_that_was_asked_for():
    """A class below one half has no voxel in the argmax: that sample has no source."""
    images, truth, prob = scene()
    prob[1, 1] = torch.where(truth[1, 0], 0.4, 0.02)
    prob[1, 0] = 1 - prob[1, 1]
    term = make(Fake(truth), mode="mask")
    term.gate.choice["fake"] = "largest_component"
    logits = student(prob)
    term.settings["sample_gate"] = 0.0
    term(images, logits, prob, step=STEP).backward()
    assert term.diagnostics["skipped"] == 1
    assert logits.grad[0].any()
    assert not logits.grad[1].any()


# ---- real data ----------------------------------------------------------------------------------


@pytest.mark.data
def test_hippocampus_two_classes(hippocampus_cases):
    """Noisy masks of real volumes: the walker's pseudo-label is better in both classes, so it may teach."""
    rng = np.random.default_rng(0)
    images, probs, labels = [], [], []
    for image, label, _ in hippocampus_cases[:4]:
        shift = rng.integers(-2, 3, 3)
        rough = np.roll(label, shift, (0, 1, 2))
        prob = np.stack([np.where(rough == c, 0.9, 0.05) for c in range(3)]).astype(np.float32)
        images.append(((image - image.mean()) / image.std())[None])
        probs.append(prob / prob.sum(0))
        labels.append(label)
    term = make("random-walker")
    found = term.calibrate(images, probs, labels)
    assert found["choice"] == {"random-walker": "random-walker"}
    for mask, walker in zip(found["per_class"]["mask"], found["per_class"]["random-walker"], strict=True):
        assert walker > mask + 0.01
    prob = torch.from_numpy(probs[0])[None]
    logits = student(prob)
    loss = term(torch.from_numpy(images[0])[None], logits, prob, step=STEP)
    loss.backward()
    assert loss > 0
    assert logits.grad[:, 1].any()
    assert logits.grad[:, 2].any()
    assert set(term.last.label.unique().tolist()) == {0, 1, 2}


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"preset": "pluss"}, r"preset: expected one of ref, plus, got 'pluss'; did you mean 'plus'"),
        ({"mode": "masks"}, r"mode: expected one of .* got 'masks'; did you mean 'mask'"),
        ({"generalist": "randomwalker"}, r"name: .* did you mean 'random-walker'"),
        ({"generalist": []}, "generalist: expected at least one"),
        ({"mode": ["mask", "mask"]}, r"mode: expected one, or one per generalist \(1\)"),
        ({"target": "softt"}, "target: expected one of soft, hard"),
        ({"unc": "variance"}, "unc: expected one of var, mi, ent"),
        ({"rule": "rtm"}, "rule: expected one of ritm, random, .*did you mean 'ritm'"),
        ({"click_memory": "none"}, "click_memory: expected one of last, all"),
        ({"clicks": 0}, "clicks: expected a number from 1 to 64, got 0"),
        ({"clicks": 2.5}, "clicks: expected a whole number"),
        ({"kappa": -1}, "kappa: expected a number from 0"),
        ({"lam_sam": float("nan")}, "lam_sam: expected a number from 0"),
        ({"lam_sam": "0.5"}, "lam_sam: expected a number from 0 .* got '0.5'"),
        ({"tau_p": 2}, "tau_p: expected a number from 0 to 1"),
        ({"sam_every": 0}, "sam_every: expected a number from 1"),
        ({"total_steps": 0}, "total_steps: expected a number from 1"),
        ({"ramp": "raising"}, "ramp: expected one of falling, rising, flat, .* did you mean 'rising'"),
        ({"budget": "1"}, "budget: expected a positive number of seconds, got '1'"),
        ({"ramp_length": -1}, "ramp_length: expected 0 or a positive number"),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(ValueError, match=text):
        SemiSAMTerm(**{"total_steps": 100, **options})


def test_a_mode_that_the_generalist_cannot_take():
    _, truth, _ = scene()
    clicks_only = Fake(truth, name="clicker", prompts=frozenset({"points"}), default_mode="unc")
    with pytest.raises(
        ValueError, match=r"mode: expected point or unc for clicker, which takes points, got 'mask'"
    ):
        make(clicks_only, mode="mask")
    assert make(clicks_only).settings["mode"] == ["unc"]
    with pytest.raises(TypeError, match=r"generalist: expected a name, something with spec.* got dict"):
        make({})


def test_bad_batches():
    images, truth, prob = scene()
    logits = student(prob)
    term = make(Fake(truth))
    call = {"step": STEP}
    with pytest.raises(
        ValueError, match=r"images_u: expected \(2, channels, 20, 24, 18\).* got \(2, 1, 20, 24, 17\)"
    ):
        term(images[..., :17], logits, prob, **call)
    with pytest.raises(ValueError, match=r"images_u: .* got \(1, 1, 20, 24, 18\)"):
        term(images[:1], logits, prob, **call)
    with pytest.raises(ValueError, match=r"logits_u: expected .* at least 2 classes .* got shape \(2, 1, 20"):
        term(images, logits[:, :1], None, **call)
    with pytest.raises(
        ValueError, match=r"teacher_probs: expected the shape of logits_u .* got \(2, 3, 20, 24, 18\)"
    ):
        term(images, logits, torch.cat([prob, prob[:, :1]], 1), **call)
    bad = prob.clone()
    bad[0, 1, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"teacher_probs: expected probabilities .* a minimum of nan"):
        term(images, logits, bad, **call)
    with pytest.raises(ValueError, match=r"teacher_probs: expected probabilities .*not logits"):
        term(images, logits, logits.detach(), **call)
    with pytest.raises(ValueError, match=r"sample_ids: expected one per sample \(2\), got 1"):
        term(images, logits, prob, sample_ids=[3], **call)
    with pytest.raises(ValueError, match="step: expected 0 or more, got -1"):
        term(images, logits, prob, step=-1)
    with pytest.raises(TypeError, match="logits_u: expected a torch tensor, got ndarray"):
        term(images, logits.detach().numpy(), prob, **call)


def test_dimensions_and_classes_that_a_generalist_does_not_take():
    for dims, wanted in ((3, 2), (2, 3)):
        images, truth, prob = scene(dims, classes=3)
        fake = Fake(truth, name="other", spatial_dims=(wanted,))
        term = make(fake)
        with pytest.raises(ValueError, match=rf"other takes {wanted}-D images, got {dims}-D ones of shape"):
            term(images, student(prob), prob, step=STEP)
        with pytest.raises(ValueError, match=rf"other takes {wanted}-D images, got {dims}-D"):
            term.check(dims, 2)
        term.check(wanted, 2)
        assert fake.encoded == []
    images, truth, prob = scene(3, classes=3)
    few = make(Fake(truth, max_classes=1))
    with pytest.raises(ValueError, match="fake takes prompts for 1 foreground classes at most, got 2"):
        few(images, student(prob), prob, step=STEP)
    few.check(3, 1)
    make(Fake(truth, spatial_dims=(2,), slice_axis=1)).check(3, 2)
    with pytest.raises(ValueError, match="takes 3-D images, got 2-D"):
        make(Fake(truth, spatial_dims=(3,), slice_axis=1)).check(2, 1)


# ---- answers that say nothing -------------------------------------------------------------------


class Told(Fake):
    """Answers what `says(logits)` makes of the right answer."""

    def __init__(self, truth, says, **spec):
        super().__init__(truth, **spec)
        self.says = says

    def decode(self, state, prompts, active=None):
        answer = super().decode(state, prompts, active)
        return answer._replace(logits=self.says(answer.logits))


USELESS = {
    "are not finite": lambda logits: logits * float("nan"),
    r"have shape \(2, 1, 20, 24, 17\), expected \(2, 1, 20, 24, 18\)": lambda logits: logits[..., :17],
    "are the same in every voxel": torch.ones_like,
}


@pytest.mark.parametrize("what", USELESS)
def test_a_source_that_says_nothing_is_dropped(what):
    """Alone it makes a step of exactly 0; beside another one it is as if it were not there."""
    images, truth, prob = scene()
    for mode in ("mask", "mixed", "point", "box"):
        term = make(Told(truth, USELESS[what], name="bad"), mode=mode, clicks=3)
        logits = student(prob)
        with pytest.warns(RuntimeWarning, match=rf"bad: 2 answers {what} at step 500; a sample without"):
            loss = term(images, logits, prob, step=STEP)
        loss.backward()
        assert loss.item() == 0
        assert not logits.grad.any()
        d = term.diagnostics
        assert (d["failed_rows"], d["rounds"]) == (2, {"bad": [0, 0]})
        assert list(d["dropped"]) == ["bad"]
        assert d["drops"] == {"bad": 1}
        json.dumps(d, allow_nan=False)
    both = make([Told(truth, USELESS[what], name="bad"), Fake(truth)], mode="mask")
    with pytest.warns(RuntimeWarning, match="bad: 2 answers"):
        loss = both(images, student(prob), prob, step=STEP)
    assert loss == make(Fake(truth), mode="mask")(images, student(prob), prob, step=STEP) > 0
    assert both.diagnostics["drops"] == {"bad": 1, "fake": 0}
    assert set(both.last.answers) == {"fake"}


def test_a_constant_answer_leaves_its_sample_out():
    images, truth, prob = scene()

    def says(logits):
        logits[1] = 3.0
        return logits

    logits = student(prob)
    term = make(Told(truth, says), mode="mixed", clicks=2)
    with pytest.warns(RuntimeWarning, match="fake: 1 answers are the same in every voxel"):
        term(images, logits, prob, step=STEP).backward()
    assert logits.grad[0].any()
    assert not logits.grad[1].any()
    d = term.diagnostics
    assert (d["failed_rows"], d["dropped"], d["drops"], d["skipped"]) == (1, {}, {"fake": 0}, 1)


def test_warnings_become_rare():
    images, truth, prob = scene()
    term = make(Told(truth, torch.zeros_like), mode="mask")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for step in range(STEP, STEP + 12):
            term(images, student(prob), prob, step=step)
    assert [str(w.message).partition(" at ")[2] for w in told] == [
        "step 500; a sample without an earlier answer is left out",
        "step 509; a sample without an earlier answer is left out (10 times so far)",
    ]
    assert term.diagnostics["drops"] == {"fake": 12}


def test_a_gate_shuts_on_a_source_that_says_nothing():
    images, truth, prob = scene()
    term = make(Told(truth, lambda logits: logits[..., :17]), mode="mask")
    with pytest.warns(RuntimeWarning, match="have shape"):
        found = term.calibrate(images, prob, truth[:, 0].byte())
    assert found["scores"]["fake"] == 0
    assert found["choice"]["fake"] != "fake"


def test_a_class_without_a_voxel_does_not_cost_the_others_their_score():
    """In the gate the same number everywhere is an answer; in a step that sample is left out."""
    images, truth, prob = scene(classes=3, batch=1)

    def says(logits):
        logits[:, 1] = -10.0
        return logits

    term = make(Told(truth, says), mode="mask")
    label = (truth[:, 0] + 2 * truth[:, 1].int()).byte()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = term.calibrate(images, prob, label)
    assert found["per_class"]["fake"] == [1.0, 0.0]
    term.gate.choice["fake"] = "fake"
    with pytest.warns(RuntimeWarning, match="1 answers are the same"):
        assert term(images, student(prob), prob, step=STEP) == 0


def test_budget():
    images, truth, prob = scene()
    patient, hurried = make(Fake(truth), budget=1e6), make([Fake(truth), Fake(truth)], budget=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value = patient(images, student(prob), prob, step=STEP)
        assert patient.diagnostics["slow"] == {}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert hurried(images, student(prob), prob, step=STEP) == value  # slow, and used all the same
    for name, warning in zip(("fake", "fake-2"), told, strict=True):
        assert str(warning.message).startswith(f"SemiSAMTerm(): {name}: took ")
        assert str(warning.message).endswith(" s at step 500, budget 1e-09 s")
    assert set(hurried.diagnostics["slow"]) == {"fake", "fake-2"}
    with pytest.raises(ValueError, match="budget: expected a positive number of seconds, got 0"):
        make(Fake(truth), budget=0)


# ---- functions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [2, 3])
def test_a_function_is_a_generalist(dims):
    images, truth, prob = scene(dims, classes=3)
    asked = []

    def knows(images, batch):
        assert not torch.is_grad_enabled()
        asked.append(batch)
        return torch.where(truth, 6.0, -6.0)

    fake = make(Fake(truth), clicks=3)
    term = make(knows, clicks=3)
    assert term(images, student(prob), prob, step=STEP) == fake(images, student(prob), prob, step=STEP) > 0
    assert list(term.generalists) == ["knows"]
    assert term.settings["mode"] == ["mixed"]
    assert asked[0].mask_logits.shape == truth.shape
    assert asked[0].boxes is not None
    assert asked[1].points.shape == (2, 2, 1, dims)
    assert torch.equal(asked[1].mask_logits, torch.where(truth, 6.0, -6.0))


def test_functions_and_names_together():
    images, _, prob = scene()
    term = make(["random-walker", lambda images, batch: 4 * (images - 0.5)], mode="mask")
    assert term(images, student(prob), prob, step=STEP) > 0
    assert list(term.generalists) == ["random-walker", "<lambda>"]
    with pytest.raises(TypeError, match=r"function \(images, prompts\) -> logits, got function"):
        make(lambda images: images)
    with pytest.raises(TypeError, match=r"got type"):
        make(Fake)


def test_bad_calibration():
    images, truth, prob = scene()
    term, label = make(Fake(truth)), truth[:, 0].byte()
    with pytest.raises(ValueError, match="expected equally many volumes, at least one, got 2, 2, 1"):
        term.calibrate(images, prob, label[:1])
    with pytest.raises(ValueError, match="at least one, got 0, 0, 0"):
        term.calibrate([], [], [])
    with pytest.raises(
        ValueError, match=r"labels: expected shape \(20, 24, 18\) for volume 0, got \(20, 24, 17\)"
    ):
        term.calibrate(images, prob, label[..., :17])
    with pytest.raises(ValueError, match=r"calibrate\(\): images: expected"):
        term.calibrate(images[..., :17], prob, label)
    with pytest.raises(ValueError, match=r"calibrate\(\): probs: expected probabilities"):
        term.calibrate(images, prob * 2, label)


def test_warns_about_nothing_in_ordinary_use():
    images, _, prob = scene(classes=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make("random-walker", mode="mixed", clicks=3)(images, student(prob), prob, step=STEP)


def test_names():
    assert semisam.SemiSAMTerm is SemiSAMTerm
    assert set(PRESETS) == {"ref", "plus"}
    assert "random-walker" in generalists.GENERALISTS
