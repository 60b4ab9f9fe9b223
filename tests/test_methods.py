# SPDX-License-Identifier: Apache-2.0
"""Methods against their formulas in plain torch, and what must not leak from one part to another."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from semisam import methods, ops, schedules
from semisam.engine.config import MethodConfig
from semisam.losses import uncertainty_weighted_loss
from semisam.methods import base as methods_base
from semisam.methods.base import Batch, Method, PseudoLabel, random_key
from semisam.specialists import UNet3d, VNet
from semisam.term import SemiSAMTerm

pytestmark = pytest.mark.usefixtures("one_thread")

TEACHERS = ("mean-teacher", "ua-mt")
BASES = (*TEACHERS, "dan")
TOTAL = 20


def batch_of(labeled=2, unlabeled=2, side=8, seed=0, classes=2):
    generator = torch.Generator().manual_seed(seed)
    n = labeled + unlabeled
    label = torch.zeros(labeled, side, side, side, dtype=torch.uint8)
    label[:, 2:6, 1:5, 2:7] = classes - 1
    image = torch.randn(n, 1, side, side, side, generator=generator)
    image[:, :, 2:6, 1:5, 2:7] += 2
    return Batch(image, label, tuple(range(100, 100 + n)))


def network(classes=2, dropout=True):
    torch.manual_seed(0)
    made = UNet3d(in_channels=1, num_classes=classes, channels=(4, 8))
    if not dropout:
        for module in made.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.p = 0.0
    return made


def build(name, student, **options):
    term = options.pop("term", None)
    config = MethodConfig(name, **{"discriminator_channels": [4, 8], **options})
    classes = 2
    return methods.build(config, student, num_classes=classes, total_steps=TOTAL, seed=7, term=term)


def train(method, steps=4, batches=None):
    """A plain loop, as the trainer's: dropout is a function of the step."""
    optimizer = torch.optim.SGD(method.student.parameters(), 0.1, 0.9)
    method.student.train()
    history = []
    for step in range(steps):
        torch.manual_seed(random_key(7, step))
        losses = method.losses(batches[step] if batches else batch_of(seed=step), step)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        method.after_step(step)
        history.append({name: value.item() for name, value in losses.items()})
    return history


def same(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in ours.items())


# ---- formulas -----------------------------------------------------------------------------------


def reference_sup(logits, label, background=True):
    p = logits.double().softmax(1)
    t = F.one_hot(label.long(), logits.shape[1]).movedim(-1, 1).double()
    space = (0, 2, 3, 4)
    dice = 1 - (2 * (p * t).sum(space) + 1e-5) / ((p * p).sum(space) + (t * t).sum(space) + 1e-5)
    return F.cross_entropy(logits.double(), label.long()), dice[0 if background else 1 :].mean()


@pytest.mark.parametrize("background", [True, False])
def test_supervised_is_the_formula(background):
    batch, student = batch_of(), network(dropout=False)
    method = build("supervised", student, lambda_ce=0.3, lambda_dice=0.7, include_background=background)
    losses = method.losses(batch, 0)
    ce, dice = reference_sup(student(batch.image[:2]), batch.label, background)
    assert losses["ce"].item() == pytest.approx(0.3 * ce.item(), rel=1e-6)
    assert losses["dice"].item() == pytest.approx(0.7 * dice.item(), rel=1e-6)


def test_mean_teacher_is_the_formula():
    batch, student = batch_of(), network(dropout=False)
    method = build("mean-teacher", student, noise=0.3)
    for p in method.teacher.parameters():  # a teacher of its own
        p.data += 0.05 * torch.randn_like(p)
    losses = method.losses(batch, 10)
    ce, dice = reference_sup(student(batch.image)[:2], batch.label)
    target = method.teacher(method._noisy(batch.image[2:], batch.ids[2:], 10, 0)).softmax(1)
    mse = (student(batch.image)[2:].softmax(1) - target).square().mean()
    assert losses["ce"].item() == pytest.approx(0.5 * ce.item(), rel=1e-6)
    assert losses["dice"].item() == pytest.approx(0.5 * dice.item(), rel=1e-6)
    expected = schedules.consistency_weight(10, TOTAL) * mse.item()
    assert losses["consistency"].item() == pytest.approx(expected, rel=1e-5)
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is None for p in method.teacher.parameters())
    assert student.final.weight.grad.abs().sum() > 0


def test_uamt_is_the_formula():
    batch, student = batch_of(side=8), network(dropout=False)
    with torch.no_grad():
        student.final.weight *= 12  # some voxels certain, others not
    method = build("ua-mt", student, mc_passes=8, noise=0.5)
    step = 15
    losses = method.losses(batch, step)
    images, ids = batch.image[2:], batch.ids[2:]
    with torch.no_grad():
        passes = [method.teacher(method._noisy(images, ids, step, d)).softmax(1) for d in range(1, 9)]
        pbar = torch.stack(passes).double().mean(0)
        entropy = -(pbar * (pbar + 1e-6).log()).sum(1)
        mask = (entropy < schedules.uamt_threshold(step, TOTAL)).double()
        target = method.teacher(method._noisy(images, ids, step, 0)).softmax(1)
        distance = (student(batch.image)[2:].softmax(1) - target).double().square().sum(1)
    assert 0.02 < mask.mean() < 0.98
    expected = (mask * distance).sum() / (2 * mask.sum() + 1e-16)
    weight = schedules.consistency_weight(step, TOTAL)
    assert losses["consistency"].item() == pytest.approx(weight * expected.item(), rel=1e-4)


def test_uamt_with_nothing_certain_is_zero():
    method = build("ua-mt", network(), noise=0.1)
    for p in method.teacher.parameters():
        p.data.zero_()  # 1/2 everywhere: entropy ln 2, above every threshold before the end
    losses = method.losses(batch_of(), 0)
    assert losses["consistency"].item() == 0.0
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad.isfinite().all() for p in method.student.parameters())


def test_odd_numbers_of_passes_run_too():
    assert build("ua-mt", network(), mc_passes=3).losses(batch_of(), 0)["consistency"] >= 0


# ---- the discriminator --------------------------------------------------------------------------


def by_hand(discriminator, probs, images):
    """The discriminator's layers, one after the other, without dropout."""
    x = F.leaky_relu(discriminator.conv0(probs) + discriminator.conv1(images), 0.2)
    for name in discriminator.deeper:
        x = F.leaky_relu(getattr(discriminator, name)(x), 0.2)
    return F.linear(x.mean((2, 3, 4)), discriminator.classifier.weight, discriminator.classifier.bias)


def test_the_discriminator_is_the_published_one():
    made = methods.dan.Discriminator()
    assert sum(p.numel() for p in made.parameters()) == 11_024_386
    widths = [getattr(made, name).weight.shape[:3] for name in ("conv0", "conv1", "conv2", "conv3", "conv4")]
    assert widths == [(64, 2, 4), (64, 1, 4), (128, 64, 4), (256, 128, 4), (512, 256, 4)]
    small = methods.dan.Discriminator(channels=(4, 8))
    probs, images = torch.rand(3, 2, 8, 12, 10).softmax(1), torch.randn(3, 1, 8, 12, 10)
    assert torch.allclose(small.eval()(probs, images), by_hand(small, probs, images), atol=1e-6)
    assert not torch.equal(small.train()(probs, images), small(probs, images))  # dropout
    with pytest.raises(ValueError, match=r"sides of at least 4, got \(1, 2, 3, 8, 8\)"):
        small(probs[:1, :, :3, :8, :8], images[:1, :, :3, :8, :8])


def test_dan_is_the_formula():
    batch, student = batch_of(labeled=1, unlabeled=3), network(dropout=False)
    method = build("dan", student)
    losses = method.losses(batch, 10)
    ce, dice = reference_sup(student(batch.image)[:1], batch.label)
    assert losses["ce"].item() == pytest.approx(0.5 * ce.item(), rel=1e-6)
    assert losses["dice"].item() == pytest.approx(0.5 * dice.item(), rel=1e-6)
    found = by_hand(method.discriminator, student(batch.image)[1:].softmax(1), batch.image[1:])
    expected = schedules.consistency_weight(10, TOTAL) * -found.log_softmax(1)[:, 1].mean().item()
    assert losses["adversarial"].item() == pytest.approx(expected, rel=1e-5)
    losses["adversarial"].backward()
    assert all(
        p.grad is not None and p.grad.any() for p in (student.final.weight, student.conv1[0][0].weight)
    )
    assert all(p.grad is None for p in method.discriminator.parameters())


def test_the_discriminator_learns_who_is_labeled():
    """One step of Adam on CE(labeled: 1, unlabeled: 0), of the student's prediction after its own step."""
    batch, student = batch_of(labeled=1, unlabeled=3), network()
    method = build("dan", student, discriminator_dropout=0.0, discriminator_lr=1e-3)
    student.train()
    method.losses(batch, 0)
    with torch.no_grad():
        student.final.weight *= 3  # the optimiser's step
    reference = deepcopy(method.discriminator).requires_grad_(True)
    optimizer = torch.optim.Adam(reference.parameters(), 1e-3, (0.9, 0.99))
    probs = student.eval()(batch.image).softmax(1).detach()
    loss = F.cross_entropy(by_hand(reference, probs, batch.image), torch.tensor([1, 0, 0, 0]))
    loss.backward()
    optimizer.step()
    student.train()
    before = deepcopy(student.state_dict())
    method.after_step(0)
    assert student.training
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert method.measured["discriminator"] == pytest.approx(loss.item(), rel=1e-5)
    for ours, theirs in zip(method.discriminator.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-5)  # of a step of 1e-3 (the sign, at first)
        assert not ours.requires_grad
    assert not method.discriminator.training


def test_dan_continues_where_it_was():
    first = build("dan", network())
    untouched = deepcopy(first.discriminator)
    train(first, 2)
    second = build("dan", deepcopy(first.student))
    second.load_state_dict(deepcopy(first.state_dict()))
    assert same(second.discriminator, first.discriminator)
    assert len(second.optimizer.state) == len(list(second.discriminator.parameters()))
    for method in (first, second):  # the student's optimiser begins anew in both
        method.student.train()
        history = train(method, 2, [batch_of(seed=7), batch_of(seed=8)])
        assert np.isfinite(list(history[-1].values())).all()
    assert same(first.student, second.student)
    assert same(first.discriminator, second.discriminator)
    assert not same(first.discriminator, untouched)


def test_accumulated_batches_are_one_for_the_discriminator():
    both, apart = (build("dan", network(dropout=False), discriminator_dropout=0.0) for _ in range(2))
    whole = batch_of(labeled=2, unlabeled=2)
    halves = [
        Batch(whole.image[[i, i + 2]], whole.label[i : i + 1], (whole.ids[i], whole.ids[i + 2]))
        for i in (0, 1)
    ]
    both.losses(whole, 0)
    for half in halves:
        apart.losses(half, 0)
    both.after_step(0)
    apart.after_step(0)
    assert both.measured["discriminator"] == pytest.approx(apart.measured["discriminator"], rel=1e-6)
    for a, b in zip(both.discriminator.parameters(), apart.discriminator.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


# ---- teacher ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEACHERS)
def test_teacher_is_the_running_mean_and_copies_buffers(name):
    torch.manual_seed(0)
    student = VNet(in_channels=1, num_classes=2, channels=(2, 4))
    method = build(name, student, ema_decay=0.9)
    assert same(method.teacher, student)
    assert method.teacher is not student
    weight = student.out_conv.weight
    expected = weight.detach().clone()
    for step in range(15):
        with torch.no_grad():
            weight.add_(step + 1.0)
            student.block_one.conv[1].running_mean.fill_(step)
        method.after_step(step)
        a = min(1 - 1 / (step + 1), 0.9)
        expected = a * expected + (1 - a) * weight.detach()
        assert torch.allclose(method.teacher.out_conv.weight, expected, rtol=1e-6)
        assert method.teacher.block_one.conv[1].running_mean.eq(step).all()
        if step == 0:
            assert same(method.teacher, student)
    assert not any(p.requires_grad for p in method.teacher.parameters())


@pytest.mark.parametrize("name", TEACHERS)
def test_noisy_passes_leave_running_statistics_alone(name):
    torch.manual_seed(0)
    method = build(name, VNet(in_channels=1, num_classes=2, channels=(2, 4)))
    before = {k: v.clone() for k, v in method.teacher.named_buffers()}
    student_before = method.student.block_one.conv[1].running_mean.clone()
    method.student.train()
    method.losses(batch_of(), 0)
    assert all(torch.equal(v, before[k]) for k, v in method.teacher.named_buffers())
    assert not torch.equal(method.student.block_one.conv[1].running_mean, student_before)
    assert not method.teacher.training


def test_the_teacher_runs_with_dropout():
    method = build("mean-teacher", network(), noise=0.0)
    with method._stochastic_teacher() as teacher:
        x = batch_of().image
        assert not torch.equal(teacher(x), teacher(x))
    assert torch.equal(method.teacher(x), method.teacher(x))


def test_noise_belongs_to_seed_step_sample_and_draw():
    method = build("mean-teacher", network())
    images = torch.zeros(3, 1, 16, 16, 16)
    noise = method._noisy(images, (5, 6, 7), 3, 0)
    assert torch.equal(method._noisy(images[:1], (6,), 3, 0)[0], noise[1])  # whoever is beside it
    for other in (((5, 6, 7), 4, 0), ((5, 6, 7), 3, 1), ((8, 9, 10), 3, 0)):
        assert not torch.equal(method._noisy(images, *other), noise)
    assert not torch.equal(noise[0], noise[1])
    assert noise.abs().max().item() == pytest.approx(0.2)
    assert noise.std().item() == pytest.approx(
        0.1 * 0.9594, rel=0.02
    )  # of a normal number clipped at two sigma
    method.seed = 8
    assert not torch.equal(method._noisy(images, (5, 6, 7), 3, 0), noise)


# ---- what must not change anything --------------------------------------------------------------


@pytest.mark.parametrize("name", BASES)
def test_lam_sam_0_is_the_base_method_bit_for_bit(name):
    plain = build(name, network())
    with_term = build(f"semisam-{name}", network(), term=SemiSAMTerm(total_steps=TOTAL, lam_sam=0.0))
    a, b = train(plain), train(with_term)
    assert [{**row, "semisam": 0.0} for row in a] == b
    assert same(plain.student, with_term.student)
    if name == "dan":
        assert same(plain.discriminator, with_term.discriminator)
        assert plain.measured == with_term.measured != {}
    else:
        assert same(plain.teacher, with_term.teacher)


@pytest.mark.parametrize("name", BASES)
def test_the_term_moves_the_student(name):
    """The check above is not empty: with a weight the result is another one."""
    student = network()
    teach = SemiSAMTerm(total_steps=TOTAL, lam_sam=5.0, warmup=0.0)
    plain, with_term = build(name, deepcopy(student)), build(f"semisam-{name}", student, term=teach)
    train(plain)
    history = train(with_term)
    assert any(row["semisam"] > 0 for row in history)
    assert not same(plain.student, with_term.student)


@pytest.mark.parametrize("name", ["supervised", *BASES])
def test_without_unlabeled_samples(name):
    method = build(name, network())
    losses = method.losses(batch_of(unlabeled=0), 3)
    assert set(losses) == {"ce", "dice"}
    method.after_step(3)
    assert method.measured == {}


def test_supervised_never_sees_unlabeled_images():
    """Batch statistics would carry them."""
    torch.manual_seed(0)
    first = build("supervised", VNet(in_channels=1, num_classes=2, channels=(2, 4)))
    second = build("supervised", deepcopy(first.student))
    changed = [batch_of(seed=s) for s in range(3)]
    for batch in changed:
        batch.image[batch.labeled :] = 1e3
    assert train(first, 3) == train(second, 3, changed)
    assert same(first.student, second.student)


# ---- what the term is given ---------------------------------------------------------------------


class Probe:
    """Stands where the term does and keeps what it was given."""

    def __init__(self):
        self.calls = []
        self.diagnostics = {"weight_share": [1.0], "skipped": 0}

    def due(self, step):
        return True

    def __call__(self, images_u, logits_u, teacher_probs, *, step, sample_ids, spacing):
        self.calls.append((images_u, logits_u, teacher_probs, step, sample_ids, spacing))
        return logits_u.square().mean()

    def state_dict(self):
        return {"calls": len(self.calls)}

    def load_state_dict(self, state):
        self.loaded = state


@pytest.mark.parametrize("name", BASES)
def test_the_term_gets_unlabeled_samples_and_the_teacher(name):
    probe = Probe()
    method = build(f"semisam-{name}", network(), term=probe)
    batch = replace(batch_of(), spacing=(1.0, 1.0, 2.0))
    losses = method.losses(batch, 5)
    ((images, logits, probs, step, ids, spacing),) = probe.calls
    assert torch.equal(images, batch.image[2:])
    assert (step, ids, spacing) == (5, [102, 103], (1.0, 1.0, 2.0))
    assert logits.requires_grad
    assert not probs.requires_grad
    source = method.student.eval() if name == "dan" else method.teacher
    clean = source(batch.image[2:]).softmax(1)
    assert torch.equal(probs, clean) == (name != "ua-mt")  # UA-MT: the mean of its passes
    assert torch.allclose(probs.sum(1), torch.ones(()))
    assert losses["semisam"].item() == pytest.approx(logits.square().mean().item())
    assert method.state_dict()["term"] == {"calls": 1}
    method.load_state_dict(method.state_dict() | {"term": {"calls": 3}})
    assert probe.loaded == {"calls": 3}


# ---- names and options --------------------------------------------------------------------------


def test_names():
    assert methods.canonical_name("semisam-uamt") == "semisam-ua-mt"
    for name, base in (*zip(BASES, BASES, strict=True), ("mt", "mean-teacher"), ("uamt", "ua-mt")):
        assert build(name, network()).name == base
    with pytest.raises(ValueError, match="did you mean 'supervised'"):
        methods.canonical_name("supervized")
    with pytest.raises(ValueError, match="expected one of supervised"):
        methods.canonical_name("semisam-supervised")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mt", {"noise": -1.0}, "noise"),
        ("mt", {"ema_decay": 1.5}, "limit"),
        ("ua-mt", {"mc_passes": 0}, "mc_passes"),
        ("dan", {"discriminator_channels": []}, "discriminator_channels"),
        ("dan", {"discriminator_lr": 0.0}, "discriminator_lr"),
        ("dan", {"discriminator_dropout": 1.0}, "discriminator_dropout"),
        ("dan", {"consistency_weight": -1.0}, "consistency_weight"),
        ("supervised", {"lambda_ce": 0.0, "lambda_dice": 0.0}, "lambda"),
        ("semisam-mt", {}, "term: expected a SemiSAMTerm"),
        ("mt", {"term": Probe()}, "term: expected None"),
    ],
)
def test_bad_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, network(), **options)


def test_a_batch_has_no_place_for_labels_of_unlabeled_samples():
    assert set(Batch.__dataclass_fields__) == {"image", "label", "ids", "spacing", "pseudo"}
    assert Method.uses_unlabeled is False


# ---- labels of whole scans ----------------------------------------------------------------------


@pytest.mark.parametrize("name", TEACHERS)
def test_labels_from_before_take_the_place_of_the_dialogue(name):
    """The term's loss of exactly these labels, and nobody is asked."""
    term = SemiSAMTerm("random-walker", total_steps=10, ramp="flat", warmup=0.0)
    asked = []
    term._teach = lambda *a, **k: asked.append(a)
    method = build(f"semisam-{name}", network(), term=term)
    batch = batch_of()
    space = batch.image.shape[2:]
    target = torch.rand(2, 2, *space).softmax(1)
    pseudo = methods.PseudoLabel(target, torch.rand(2, *space), torch.zeros(2, *space))
    value = method.losses(replace(batch, pseudo=pseudo), 5)["semisam"]
    logits = method.unlabeled[1]
    assert not asked
    assert method.unlabeled[0].shape == batch.image[2:].shape
    expected = term.factor(5) * uncertainty_weighted_loss(logits, target, pseudo.weight)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    silent = pseudo._replace(weight=torch.zeros(2, *space))
    assert method.losses(replace(batch, pseudo=silent), 5)["semisam"].item() == 0
    assert term.diagnostics["skipped"] == 2


@pytest.mark.parametrize("name", BASES)
def test_no_pass_for_prompts_that_nobody_is_asked_with(name, monkeypatch):
    """In steps that `sam_every` leaves out, the network behind the prompts does not run."""
    method = build(
        f"semisam-{name}", network(), term=SemiSAMTerm("random-walker", total_steps=10, sam_every=3)
    )
    passes, whole = [], method.prompt_probabilities
    monkeypatch.setattr(method, "prompt_probabilities", lambda x: passes.append(step) or whole(x))
    for step in range(1, 7):
        method.losses(batch_of(), step)
    assert passes == ([] if name == "ua-mt" else [3, 6])  # UA-MT has the mean of its own passes


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("offline", [False, True])
def test_the_term_that_nobody_waits_for_in_every_method(name, offline, monkeypatch):
    """As on a GPU: its diagnostics are no dictionary there, and get seconds and memory all the same."""
    found = []
    for stays in (False, True):
        monkeypatch.setattr(ops, "stays", lambda device, stays=stays: stays)
        term = SemiSAMTerm("random-walker", total_steps=TOTAL, sample_gate=0.0)
        method = build(f"semisam-{name}", network(dropout=False), term=term)
        batch = batch_of()
        if offline:
            given = torch.rand(2, 2, 8, 8, 8, generator=torch.Generator().manual_seed(1)).softmax(1)
            batch = replace(batch, pseudo=PseudoLabel(given, given[:, 0], given[:, 1]))
        value = method.losses(batch, 8)["semisam"]
        assert term.diagnostics["asynchronous"] is stays
        assert term.diagnostics["s"] > 0
        assert "mb" in term.diagnostics
        found.append(value.item())
    assert found[0] > 0
    assert found[1] == pytest.approx(found[0], rel=2e-3)


def test_generalists_get_the_images_where_they_are(monkeypatch):
    """On a device without kernels of the core's, all but the generalist is computed on the CPU."""
    monkeypatch.setattr(methods_base, "on_core", lambda tensor: tensor + 0)  # a copy, as of another device
    seen = []

    def mine(images, prompts):
        seen.append(images.data_ptr())
        return 8 * (images - 0.5)

    method = build("semisam-mean-teacher", network(), term=SemiSAMTerm(mine, total_steps=TOTAL))
    batch = batch_of()
    method.losses(batch, 8)
    assert set(seen) == {batch.image[2:].data_ptr()}
