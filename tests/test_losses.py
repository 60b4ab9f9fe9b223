# SPDX-License-Identifier: Apache-2.0
"""Losses by name: against MONAI and torch, their formulas, what they refuse, and real labels."""

from __future__ import annotations

import copy
import doctest
import inspect
import itertools
import math
import pickle
import random
import re
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from semisam import losses as L

monai_losses = pytest.importorskip("monai.losses")

# The promise is 1e-5 against MONAI. MONAI runs in float64 here, so its own rounding does not eat it up, and
# gradients are measured against their largest entry, since a mean over voxels makes all of them tiny.
TOLERANCE = 1e-5


def value_and_gradient(loss, logits, *args):
    z = logits.clone().requires_grad_()
    value = loss(z, *args)
    return value.detach(), torch.autograd.grad(value.sum(), z)[0]


def agree(ours, theirs, logits, target):
    """Same value, same shape, same gradient: ours on `logits`, theirs on their float64 copy."""
    value, gradient = value_and_gradient(ours, logits, target)
    wide = target.double() if target.ndim == logits.ndim else target  # MONAI takes no integer one-hot form
    expected, expected_gradient = value_and_gradient(theirs.double(), logits.double(), wide)
    assert value.shape == expected.shape
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, atol=TOLERANCE, rtol=TOLERANCE)
    scale = float(expected_gradient.abs().max())
    assert float((gradient.double() - expected_gradient).abs().max()) <= TOLERANCE * scale
    return value


SHAPES = [(2, 3, 5, 7), (1, 2, 6, 6), (3, 4, 4, 5), (2, 2, 3, 4, 5), (1, 3, 4, 3, 2), (2, 14, 4, 4, 4)]


def inputs(shape, seed, *, probabilities=False, soft=False, onehot=True, one_channel=False):
    """Logits or probabilities, and a target: class indices [B, 1, *S], one-hot or soft [B, C, *S]."""
    g = torch.Generator().manual_seed(seed)
    if one_channel:
        shape = (shape[0], 1, *shape[2:])
    c = shape[1]
    z = torch.rand(shape, generator=g) if probabilities else 2 * torch.randn(shape, generator=g)
    if soft:
        q = torch.rand(shape, generator=g)
        return z, q / q.sum(1, keepdim=True) if c > 1 else q
    y = torch.randint(0, max(c, 2), (shape[0], 1, *shape[2:]), generator=g)
    if not onehot or c == 1:
        return z, y
    return z, F.one_hot(y[:, 0], c).movedim(-1, 1)


def dice_grid(n, seed):
    """A seeded sample of all combinations of DiceLoss's options; nothing in it is meaningless."""
    keys = {
        "shape": SHAPES,
        "activation": ["softmax", "softmax", "sigmoid", "none", "tanh"],
        "to_onehot_y": [False, True],
        "include_background": [True, False],
        "squared_pred": [False, True],
        "jaccard": [False, True],
        "reduction": ["mean", "sum", "none"],
        "batch": [False, True],
        "weight": [None, "scalar", "sequence"],
        "soft_label": [False, True],
        "target": ["hard", "soft"],
        "smooth": [(1e-5, 1e-5), (0.0, 1e-6), (1.0, 1.0)],
    }
    combinations = list(itertools.product(*keys.values()))
    picks = random.Random(seed).sample(combinations, n)
    return [dict(zip(keys, p, strict=True)) for p in picks]


def ident(o):
    return "-".join(str(v).replace(" ", "") for v in o.values()) if isinstance(o, dict) else str(o)


@pytest.mark.parametrize("o", dice_grid(300, 1), ids=ident)
def test_dice_loss_is_monais(o):
    classes = o["shape"][1] - (not o["include_background"])
    weight = {"scalar": 1.7, "sequence": [0.5 + 0.3 * i for i in range(classes)], None: None}[o["weight"]]
    options = {
        k: o[k] for k in ("include_background", "squared_pred", "jaccard", "reduction", "batch", "soft_label")
    }
    options |= {
        "to_onehot_y": o["to_onehot_y"],
        "softmax": o["activation"] == "softmax",
        "sigmoid": o["activation"] == "sigmoid",
        "other_act": torch.tanh if o["activation"] == "tanh" else None,
        "weight": None if classes == 1 else weight,
        "smooth_nr": o["smooth"][0],
        "smooth_dr": o["smooth"][1],
    }
    soft = o["target"] == "soft" and not o["to_onehot_y"]
    z, y = inputs(
        o["shape"], 3, probabilities=o["activation"] == "none", soft=soft, onehot=not o["to_onehot_y"]
    )
    if o["activation"] == "tanh":
        z = z.abs()  # Dice is meant for values of one sign; with both, denominators can be near 0
    agree(L.DiceLoss(**options), monai_losses.DiceLoss(**options), z, y)


@pytest.mark.parametrize("act", ["sigmoid", "none"])
@pytest.mark.parametrize(("squared", "jaccard", "batch"), list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("soft_label", [False, True])
def test_dice_loss_with_one_channel_is_monais(act, squared, jaccard, batch, soft, soft_label):
    options = {"sigmoid": act == "sigmoid", "squared_pred": squared, "jaccard": jaccard, "batch": batch}
    options["soft_label"] = soft_label
    for shape, reduction in (((2, 1, 5, 6), "mean"), ((3, 1, 4, 3, 5), "none")):
        z, y = inputs(shape, 5, probabilities=act == "none", soft=soft, one_channel=True)
        options["reduction"] = reduction
        agree(L.DiceLoss(**options), monai_losses.DiceLoss(**options), z, y)


has_ignore_index = pytest.mark.skipif(
    "ignore_index" not in inspect.signature(monai_losses.DiceLoss).parameters,
    reason="this MONAI's losses have no ignore_index",
)


@has_ignore_index
@pytest.mark.parametrize("ignore_index", [1, 0, 255])
@pytest.mark.parametrize("kind", ["labels", "onehot", "mask"])
@pytest.mark.parametrize("batch", [False, True])
def test_ignore_index_is_monais(ignore_index, kind, batch):
    z, y = inputs((2, 3, 6, 5), 11, onehot=False, one_channel=kind == "mask")
    if ignore_index == 255:
        y[:, :, :2, 1:4] = 255
    if kind == "onehot":
        y = F.one_hot(y[:, 0].masked_fill(y[:, 0] == 255, 3), 4).movedim(-1, 1)[:, :3].float()
    options = {
        "softmax": kind != "mask",
        "sigmoid": kind == "mask",
        "to_onehot_y": kind == "labels",
        "ignore_index": ignore_index,
        "batch": batch,
        "include_background": kind != "labels",
    }
    agree(L.DiceLoss(**options), monai_losses.DiceLoss(**options), z, y)
    if kind == "mask":  # the same mask as floats, as a data loader may hand it over
        agree(L.DiceLoss(**options), monai_losses.DiceLoss(**options), z, y.float())


def dice_ce_grid(n, seed):
    keys = {
        "shape": SHAPES,
        "activation": ["softmax", "softmax", "sigmoid", "none", "tanh"],
        "to_onehot_y": [False, True],
        "include_background": [True, False],
        "squared_pred": [False, True],
        "jaccard": [False, True],
        "reduction": ["mean", "sum"],
        "batch": [False, True],
        "weight": [False, True],
        "lambdas": [(1.0, 1.0), (0.3, 2.0), (0.0, 1.0), (1.0, 0.0)],
        "label_smoothing": [0.0, 0.1],
        "target": ["hard", "soft"],
    }
    combinations = list(itertools.product(*keys.values()))
    picks = random.Random(seed).sample(combinations, n)
    return [dict(zip(keys, p, strict=True)) for p in picks]


@pytest.mark.filterwarnings("ignore:dice_ce_loss")
@pytest.mark.parametrize("o", dice_ce_grid(200, 2), ids=ident)
def test_dice_ce_loss_is_monais(o):
    names = ("to_onehot_y", "include_background", "squared_pred", "jaccard", "reduction", "batch")
    options = {k: o[k] for k in (*names, "label_smoothing")}
    options |= {
        "softmax": o["activation"] == "softmax",
        "sigmoid": o["activation"] == "sigmoid",
        "other_act": torch.tanh if o["activation"] == "tanh" else None,
        "lambda_dice": o["lambdas"][0],
        "lambda_ce": o["lambdas"][1],
        "weight": torch.linspace(0.5, 2.0, o["shape"][1]) if o["weight"] else None,
    }
    soft = o["target"] == "soft" and not o["to_onehot_y"]
    z, y = inputs(o["shape"], 4, soft=soft, onehot=not o["to_onehot_y"])
    if o["activation"] in ("none", "tanh"):
        z = z.abs() + 0.1
    agree(L.DiceCELoss(**options), monai_losses.DiceCELoss(**options), z, y)


@pytest.mark.filterwarnings("ignore:dice_ce_loss")
@pytest.mark.parametrize("weight", [None, 3.0, 0.0])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("act", ["sigmoid", "none"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_dice_ce_loss_with_one_channel_is_monais(weight, soft, act, reduction):
    w = None if weight is None else torch.tensor([weight])
    options = {"sigmoid": act == "sigmoid", "weight": w, "reduction": reduction, "lambda_ce": 0.7}
    z, y = inputs((2, 1, 4, 5, 3), 6, soft=soft, one_channel=True)
    if act == "none":
        z = z.abs() + 0.1
    agree(L.DiceCELoss(**options), monai_losses.DiceCELoss(**options), z, y)


@has_ignore_index
def test_arguments_and_defaults_are_monais():
    for name in ("DiceLoss", "DiceCELoss"):
        theirs = inspect.signature(getattr(monai_losses, name)).parameters
        ours = inspect.signature(getattr(L, name)).parameters
        assert list(ours)[: len(theirs)] == list(theirs)
        for key, parameter in theirs.items():
            assert str(getattr(ours[key].default, "value", ours[key].default)) == str(
                getattr(parameter.default, "value", parameter.default)
            )
        extra = list(ours.values())[len(theirs) :]
        assert all(p.kind is p.KEYWORD_ONLY for p in extra)


def test_functions_take_the_arguments_of_their_modules():
    for function, module in (
        (L.dice_loss, L.DiceLoss),
        (L.dice_ce_loss, L.DiceCELoss),
        (L.cross_entropy, L.CrossEntropyLoss),
        (L.softmax_mse_loss, L.SoftmaxMSELoss),
        (L.softmax_kl_loss, L.SoftmaxKLLoss),
        (L.entropy_loss, L.EntropyLoss),
        (L.uncertainty_weighted_loss, L.UncertaintyWeightedLoss),
        (L.cross_pseudo_label_loss, L.CrossPseudoLabelLoss),
    ):
        given_ = {
            k: v
            for k, v in inspect.signature(function).parameters.items()
            if k not in ("input", "target", "voxel_weight")
        }
        kept = inspect.signature(module).parameters
        assert list(given_) == list(kept)
        assert [p.default for p in given_.values()] == [p.default for p in kept.values()]


# ---- cross entropy and consistency --------------------------------------------------------------


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cross_entropy_is_torchs(soft, smoothing, weighted, reduction):
    z, y = inputs((2, 4, 5, 6), 8, soft=soft, onehot=False)
    if not soft:
        y = y[:, 0]
        y[0, :2] = 255
    weight = torch.tensor([0.5, 1.0, 2.0, 0.0]) if weighted else None
    options = {"reduction": reduction, "label_smoothing": smoothing}
    options |= {} if soft else {"ignore_index": 255}
    theirs = torch.nn.CrossEntropyLoss(weight=weight, **options)
    agree(L.CrossEntropyLoss(weight=weight, **options), theirs, z, y)


def test_cross_entropy_of_ignored_labels_alone_is_zero():
    z = torch.randn(1, 2, 3, 3, requires_grad=True)
    loss = L.cross_entropy(z, torch.full((1, 3, 3), 255))
    loss.backward()
    assert loss.item() == 0.0
    assert not z.grad.any()
    with pytest.raises(ValueError, match="255"):
        L.cross_entropy(z, torch.full((1, 3, 3), 255), ignore_index=None)


@pytest.mark.parametrize("weighted", [False, True])
def test_consistency_losses_against_their_formulas(weighted):
    z, q = inputs((3, 4, 5, 6), 9, soft=True)
    w = torch.rand(3, 5, 6, generator=torch.Generator().manual_seed(1)) if weighted else torch.ones(3, 5, 6)
    given_w = w if weighted else None
    p, lp = z.double().softmax(1), z.double().log_softmax(1)
    square = (w * ((p - q) ** 2).sum(1)).double()
    kl = (w * (q * (q.log() - lp)).sum(1)).double()
    entropy = -(w * (p * lp).sum(1)).double() / math.log(4)
    n = w.double().sum()
    for ours, d in ((L.softmax_mse_loss, square), (L.softmax_kl_loss, kl)):
        per_sample = (d.flatten(1).sum(1) / w.flatten(1).sum(1)).mean()
        for reduction, expected in (("mean", d.sum() / n / 4), ("voxel", d.sum() / n), ("sum", d.sum())):
            assert ours(z, q, voxel_weight=given_w, reduction=reduction).item() == pytest.approx(
                expected.item(), rel=1e-5
            )
        c = 4 if ours is L.softmax_mse_loss else 1
        got = ours(z, q, voxel_weight=given_w, reduction="sample").item()
        assert got == pytest.approx(per_sample.item() / c, rel=1e-5)
    assert L.entropy_loss(z, voxel_weight=given_w).item() == pytest.approx(
        (entropy.sum() / n).item(), rel=1e-5
    )
    assert L.entropy_loss(z, voxel_weight=given_w, reduction="sum").item() == pytest.approx(
        entropy.sum().item(), rel=1e-5
    )


def test_target_logits():
    z, t = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert torch.equal(L.softmax_mse_loss(z, t, target_logits=True), L.softmax_mse_loss(z, t.softmax(1)))
    assert L.softmax_kl_loss(z, z, target_logits=True).item() == pytest.approx(0.0, abs=1e-7)
    numpy = L.softmax_mse_loss(z.numpy(), t.numpy(), target_logits=True)
    assert float(numpy) == pytest.approx(L.softmax_mse_loss(z, t.softmax(1)).item(), rel=1e-5)


def test_kl_is_torchs():
    z, q = inputs((2, 3, 4, 5), 10, soft=True)
    expected = F.kl_div(z.log_softmax(1), q, reduction="none").mean()
    torch.testing.assert_close(L.softmax_kl_loss(z, q), expected, atol=1e-6, rtol=1e-5)


def test_uncertainty_weighted_loss_by_hand():
    # p = 1/2 everywhere, q = one-hot: d = ((1/2)^2 + (1/2)^2) / 2 = 1/4 for mse, ln 2 for ce.
    z = torch.zeros(2, 2, 4, 4, requires_grad=True)
    hard = torch.ones(2, 4, 4, dtype=torch.uint8)
    w = torch.rand(2, 4, 4) + 0.1
    assert L.uncertainty_weighted_loss(z, hard, w).item() == pytest.approx(0.25)
    assert L.uncertainty_weighted_loss(z, hard, w, loss="ce").item() == pytest.approx(math.log(2))
    # A sample without weight leaves the mean; its gradient is 0.
    w[1] = 0
    loss = L.uncertainty_weighted_loss(z, hard, w)
    loss.backward()
    assert loss.item() == pytest.approx(0.25)
    assert z.grad[0].abs().min() > 0
    assert not z.grad[1].any()
    # No sample left: exactly 0 with zero gradient.
    z.grad = None
    for kind in ("mse", "ce", "ce_dice"):
        nothing = L.uncertainty_weighted_loss(z, hard, torch.zeros(2, 4, 4), loss=kind)
        nothing.backward()
        assert nothing.item() == 0.0
        assert not z.grad.any()


@pytest.mark.parametrize("kind", ["mse", "ce", "ce_dice"])
def test_a_sample_below_the_least_weight_is_left_out(kind):
    z, q = inputs((2, 3, 8, 8), 12, soft=True)
    w = torch.ones(2, 8, 8)
    w[1] = 0.9e-3
    alone = L.uncertainty_weighted_loss(z[:1], q[:1], w[:1], loss=kind)
    torch.testing.assert_close(L.uncertainty_weighted_loss(z, q, w, loss=kind), alone)
    w[1] = 1e-2
    raised = L.uncertainty_weighted_loss(z, q, w, loss=kind, min_weight=5e-2)
    torch.testing.assert_close(raised, alone)
    w[1] = 1.1e-3
    assert L.uncertainty_weighted_loss(z, q, w, loss=kind).item() != pytest.approx(alone.item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["mse", "ce", "ce_dice"])
def test_ignored_voxels_do_not_count_as_weight(kind):
    z, y = inputs((2, 3, 40, 40), 12, onehot=False)
    alone = L.uncertainty_weighted_loss(z[:1], y[:1], loss=kind)
    y[1] = 255
    y[1, 0, 3, 4] = 1  # one voxel of 1600 is less than the least weight
    torch.testing.assert_close(L.uncertainty_weighted_loss(z, y, loss=kind), alone)
    assert L.uncertainty_weighted_loss(z, y, loss=kind, min_weight=1e-4).item() != pytest.approx(alone.item())


def test_cross_pseudo_label_loss_is_cross_entropy_plus_dice():
    z, y = inputs((2, 4, 5, 6), 13, onehot=False)
    w = torch.rand(2, 5, 6)
    y[0, 0, :2] = 255
    both = L.cross_pseudo_label_loss(z, y, w, smooth=1e-10)
    p = z.double().softmax(1)
    m = (w * (y[:, 0] != 255)).double()[:, None]
    t = F.one_hot(y[:, 0].masked_fill(y[:, 0] == 255, 0), 4).movedim(-1, 1)
    i, zz, yy = ((m * a).sum((0, 2, 3)) for a in (p * t, p * p, t))
    dice = (1 - (2 * i + 1e-10) / (zz + yy + 1e-10)).mean()
    ce = -(m * t * z.double().log_softmax(1)).sum() / m.sum()
    assert both.item() == pytest.approx((ce + dice).item(), rel=1e-5)


# ---- one objective, one sweep -------------------------------------------------------------------


def objective_inputs(seed=14):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(4, 3, 6, 5, 4, generator=g)
    labels = torch.randint(0, 3, (2, 6, 5, 4), generator=g, dtype=torch.uint8)
    pseudo = torch.randn(2, 3, 6, 5, 4, generator=g).softmax(1)
    w = torch.rand(2, 6, 5, 4, generator=g)
    return z, labels, pseudo, w


def test_ssl_objective_is_the_sum_of_its_parts():
    z, labels, pseudo, w = objective_inputs()
    z.requires_grad_()
    lambdas = {"lambda_ce": 0.5, "lambda_dice": 0.7, "lambda_pseudo": 0.1, "lambda_entropy": 0.9}
    whole = L.ssl_objective(z, labels, pseudo, w, **lambdas, include_background=False)
    (gradient,) = torch.autograd.grad(whole, z)
    parts = (
        0.5 * L.cross_entropy(z[:2], labels)
        + 0.7
        * L.dice_loss(
            *(z[:2], labels),
            include_background=False,
            to_onehot_y=True,
            softmax=True,
            squared_pred=True,
            batch=True,
        )
        + 0.1 * L.uncertainty_weighted_loss(z[2:], pseudo, w)
        + 0.9 * L.entropy_loss(z[2:])
    )
    (expected,) = torch.autograd.grad(parts, z)
    torch.testing.assert_close(whole, parts, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradient, expected, atol=1e-8, rtol=1e-4)


def test_ssl_objective_as_its_docstring_writes_it_out():
    z, labels, pseudo, w = objective_inputs()
    terms = [
        L.Term("ce", labels, samples=(0, 2), scale=0.5),
        L.Term("dice", labels, samples=(0, 2), scale=0.5),
        L.Term("mse", pseudo, w, (2, 4), 0.1, reduction="sample"),
        L.Term("entropy", samples=(2, 4), scale=0.2),
    ]
    ours = L.ssl_objective(z, labels, pseudo, w, lambda_pseudo=0.1, lambda_entropy=0.2)
    assert torch.equal(ours, L.voxel_loss(z, terms))


def test_ssl_objective_leaves_terms_out():
    z, labels, pseudo, w = objective_inputs()
    supervised = L.ssl_objective(z, labels, lambda_dice=0.0)
    torch.testing.assert_close(supervised, 0.5 * L.cross_entropy(z[:2], labels))
    z.requires_grad_()
    (gradient,) = torch.autograd.grad(L.ssl_objective(z, labels, pseudo, w, lambda_pseudo=0.0), z)
    assert gradient[:2].any()
    assert not gradient[2:].any()
    assert L.ssl_objective(z[:2], labels).isfinite()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"labels": torch.zeros(5, 6, 5, 4)},
            r"ssl_objective\(\): labels: expected 1 to 4 samples, .* got 5",
        ),
        ({"labels": torch.zeros(4, 6, 5, 4)}, r"ssl_objective\(\): pseudo, voxel_weight: expected None"),
        ({"pseudo": None}, r"ssl_objective\(\): voxel_weight: expected None without pseudo"),
        ({"pseudo": torch.zeros(3, 3, 6, 5, 4)}, r"ssl_objective\(\): pseudo: expected labels .* got \(3, 3"),
        ({"labels": torch.zeros(2, 6, 5)}, r"ssl_objective\(\): labels: expected labels .* got \(2, 6, 5\)"),
        ({"lambda_ce": -1.0}, r"ssl_objective\(\): lambda_ce: expected a finite number >= 0, got -1.0"),
        ({"loss": "kl"}, r"ssl_objective\(\): loss: expected one of mse, ce, got 'kl'"),
        (
            {"lambda_ce": 0, "lambda_dice": 0, "lambda_pseudo": 0},
            r"ssl_objective\(\): lambda_ce, ...: expected one above 0",
        ),
    ],
)
def test_ssl_objective_refuses(change, message):
    z, labels, pseudo, w = objective_inputs()
    options = {"labels": labels, "pseudo": pseudo, "voxel_weight": w, **change}
    with pytest.raises(ValueError, match=message):
        L.ssl_objective(z, **options)


# ---- what MONAI lets pass -----------------------------------------------------------------------

ONE = torch.zeros(1, 1, 4, 4)
TWO = torch.zeros(1, 2, 4, 4)
LABELS = torch.ones(1, 1, 4, 4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: L.DiceLoss(softmax=True)(ONE, LABELS),
            ValueError,
            r"dice_loss\(\): input: expected at least 2 channels for softmax, got 1, where it is always 1",
        ),
        (
            lambda: L.DiceLoss(sigmoid=True, include_background=False)(ONE, LABELS),
            ValueError,
            r"dice_loss\(\): include_background: expected True with one channel, got False",
        ),
        (
            lambda: L.DiceLoss(sigmoid=True, weight=2.0)(ONE, LABELS),
            ValueError,
            r"dice_loss\(\): weight: expected None where one class remains, got 2.0",
        ),
        (
            lambda: L.dice_loss(TWO, LABELS, False, True, softmax=True, weight=[1.0]),
            ValueError,
            r"dice_loss\(\): weight: expected None where one class remains, got \[1.0\]",
        ),
        (
            lambda: L.dice_loss(TWO, LABELS, to_onehot_y=True, softmax=True, weight=[1.0]),
            ValueError,
            r"dice_loss\(\): weight: expected 2 numbers, one per class that is in, got 1",
        ),
        (
            lambda: L.DiceLoss(weight=[1.0, -1.0]),
            ValueError,
            r"DiceLoss\(\): weight: expected finite numbers >= 0, got \[1.0, -1.0\]",
        ),
        (
            lambda: L.DiceLoss(weight=torch.ones(2, requires_grad=True)),
            ValueError,
            r"DiceLoss\(\): weight: expected numbers, got a tensor that requires a gradient",
        ),
        (
            lambda: L.dice_loss(TWO, LABELS * 0.7, to_onehot_y=True, softmax=True),
            ValueError,
            r"dice_loss\(\): target: expected whole class indices, got 0.69999\d*",
        ),
        (
            lambda: L.dice_loss(TWO, (LABELS * 3).float(), to_onehot_y=True, softmax=True),
            ValueError,
            r"target: expected .*, got .*3",
        ),
        (
            lambda: L.dice_loss(TWO, torch.full((1, 1, 4, 4), torch.nan), to_onehot_y=True, softmax=True),
            ValueError,
            r"dice_loss\(\): target: expected whole class indices, got nan",
        ),
        (
            lambda: L.dice_loss(TWO, LABELS * 255, to_onehot_y=True, softmax=True),
            ValueError,
            r"target: expected .*, got .*255",
        ),
        (
            lambda: L.dice_ce_loss(TWO, LABELS.long() * -100, to_onehot_y=True, softmax=True),
            ValueError,
            r"target: expected .*, got .*-100",
        ),
        (
            lambda: L.dice_loss(ONE, LABELS * 2, sigmoid=True),
            ValueError,
            r"target: expected .*, got .*2",
        ),
        (
            lambda: L.dice_loss(TWO, LABELS.expand(1, 2, 4, 4) * 3, softmax=True),
            ValueError,
            r"dice_loss\(\): target: expected a one-hot target of 0 and 1, got values 3 to 3",
        ),
        (
            lambda: L.dice_loss(TWO, TWO.clone().requires_grad_(), softmax=True),
            ValueError,
            r"dice_loss\(\): target: expected a tensor without gradient, got one that requires it: detach it",
        ),
        (
            lambda: L.dice_loss(TWO, TWO, softmax=True, voxel_weight=ONE.clone().requires_grad_()),
            ValueError,
            r"dice_loss\(\): voxel_weight: expected a tensor without gradient",
        ),
        (
            lambda: L.dice_loss(TWO, LABELS, softmax=True),
            ValueError,
            r"dice_loss\(\): target: expected shape \(1, 2, 4, 4\), .* class indices need to_onehot_y=True",
        ),
        (
            lambda: L.dice_loss(TWO, TWO, softmax=True, to_onehot_y=True),
            ValueError,
            r"dice_loss\(\): target: expected class indices \(1, 1, 4, 4\) for to_onehot_y=True",
        ),
        (
            lambda: L.dice_loss(TWO, TWO[:, :, :3], softmax=True),
            ValueError,
            r"dice_loss\(\): target: expected shape \(1, 2, 4, 4\), .* got \(1, 2, 3, 4\)$",
        ),
        (
            lambda: L.DiceLoss(softmax=True, sigmoid=True),
            ValueError,
            r"DiceLoss\(\): sigmoid, softmax, other_act: expected at most one of them, got 2",
        ),
        (
            lambda: L.DiceLoss(other_act="tanh"),
            TypeError,
            r"DiceLoss\(\): other_act: expected a callable or None, got str",
        ),
        (
            lambda: L.dice_loss(TWO, TWO, other_act=lambda x: x[:, :1]),
            ValueError,
            r"dice_loss\(\): other_act: expected it to keep the shape \(1, 2, 4, 4\), got \(1, 1, 4, 4\)",
        ),
        (
            lambda: L.DiceLoss(reduction="average"),
            ValueError,
            r"DiceLoss\(\): reduction: expected one of mean, sum, none, got 'average'",
        ),
        (
            lambda: L.DiceCELoss(reduction="none"),
            ValueError,
            r"DiceCELoss\(\): reduction: expected one of mean, sum, got 'none'",
        ),
        (
            lambda: L.DiceCELoss(lambda_ce=-1),
            ValueError,
            r"DiceCELoss\(\): lambda_ce: expected a finite number >= 0, got -1",
        ),
        (
            lambda: L.DiceLoss(smooth_dr=-1e-5),
            ValueError,
            r"DiceLoss\(\): smooth_dr: expected a finite number >= 0, got -1e-05",
        ),
        (
            lambda: L.DiceCELoss(sigmoid=True, label_smoothing=0.1)(ONE, LABELS),
            ValueError,
            r"dice_ce_loss\(\): label_smoothing: expected 0 with one channel, got 0.1",
        ),
        (
            lambda: L.dice_loss([1.0], LABELS, softmax=True),
            TypeError,
            r"dice_loss\(\): input: expected a torch tensor or NumPy array, got list",
        ),
        (
            lambda: L.dice_loss(torch.zeros(2, 2), LABELS, softmax=True),
            ValueError,
            r"dice_loss\(\): input: expected shape \(B, C, spatial...\) .* got \(2, 2\)",
        ),
        (
            lambda: L.cross_entropy(TWO, LABELS, reduction="none"),
            ValueError,
            r"cross_entropy\(\): reduction: expected one of mean, sum, got 'none'",
        ),
        (
            lambda: L.cross_pseudo_label_loss(TWO, TWO),
            ValueError,
            r"cross_pseudo_label_loss\(\): target: expected labels .* take the argmax over the classes",
        ),
        (
            lambda: L.softmax_mse_loss(TWO, LABELS, target_logits=True),
            ValueError,
            r"softmax_mse_loss\(\): target: expected logits \(1, 2, 4, 4\), got \(1, 1, 4, 4\)",
        ),
        (
            lambda: L.softmax_mse_loss(TWO, torch.zeros(1, 3, 4, 4)),
            ValueError,
            r"softmax_mse_loss\(\): target: expected labels .* or a distribution .* got \(1, 3, 4, 4\)",
        ),
        (
            lambda: L.uncertainty_weighted_loss(TWO, TWO, torch.ones(1, 3, 3)),
            ValueError,
            r"weight: expected shape \(1, 4, 4\), got \(1, 3, 3\)",
        ),
        (
            lambda: L.dice_loss(TWO, TWO.numpy(), softmax=True),
            TypeError,
            r"target: expected a torch tensor as the logits are, got ndarray",
        ),
    ],
)
def test_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: L.dice_loss(ONE, LABELS, to_onehot_y=True, sigmoid=True),
            r"dice_loss\(\): to_onehot_y: has no effect with one channel",
        ),
        (
            lambda: L.dice_ce_loss(TWO, LABELS, to_onehot_y=True),
            r"dice_ce_loss\(\): Dice takes logits for probabilities",
        ),
        (
            lambda: L.dice_ce_loss(TWO, LABELS, False, True, softmax=True, weight=[1, 2]),
            r"dice_ce_loss\(\): weight: acts on the cross entropy only",
        ),
    ],
)
def test_warned(call, message):
    with pytest.warns(UserWarning, match=message):
        call()


def test_no_warning_in_ordinary_use():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        L.DiceCELoss(to_onehot_y=True, softmax=True)(TWO, LABELS)
        L.DiceLoss(sigmoid=True)(ONE, LABELS)


# ---- kinds of arrays ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_logits_under_amp(dtype):
    torch.manual_seed(0)
    z = torch.randn(2, 3, 6, 6, 6).to(dtype).requires_grad_()
    y = torch.randint(0, 3, (2, 1, 6, 6, 6))
    loss = L.DiceCELoss(to_onehot_y=True, softmax=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(z, y)
    value.backward()
    wide = z.detach().float().requires_grad_()
    expected = loss(wide, y)
    expected.backward()
    assert value.dtype == torch.float32
    assert z.grad.dtype == dtype
    torch.testing.assert_close(value, expected)
    # One rounding of each gradient to the dtype: half an ulp, 2^-11 or 2^-8, and f16's subnormals.
    torch.testing.assert_close(z.grad.float(), wide.grad, atol=2**-25, rtol=2**-8)


def test_a_patch_of_ones_in_half_precision_does_not_overflow():
    z = torch.ones(1, 2, 112, 112, 80, dtype=torch.float16)
    y = torch.ones(1, 112, 112, 80, dtype=torch.uint8)
    # p = 1/2: linear Dice of class 1 is 1 - 2 (V/2) / (V/2 + V) = 1/3, cross entropy ln 2
    value = L.dice_ce_loss(z, y, include_background=False, to_onehot_y=True, softmax=True)
    assert value.item() == pytest.approx(1 / 3 + math.log(2), rel=1e-5)


def test_float64_stays_float64():
    z = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    y = torch.randint(0, 2, (2, 4, 4))
    assert L.dice_loss(z, y, to_onehot_y=True, softmax=True).dtype == torch.float64
    options = {"to_onehot_y": True, "softmax": True, "squared_pred": True, "weight": [1.0, 2.0]}
    assert torch.autograd.gradcheck(lambda x: L.dice_ce_loss(x, y, **options), (z,))


def test_metatensor():
    monai_data = pytest.importorskip("monai.data")
    z, y = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randint(0, 3, (2, 1, 4, 5)).float()
    expected = L.DiceCELoss(to_onehot_y=True, softmax=True)(z, y)
    (expected_gradient,) = torch.autograd.grad(expected, z)
    meta = monai_data.MetaTensor(z.detach()).requires_grad_()
    value = L.DiceCELoss(to_onehot_y=True, softmax=True)(meta, monai_data.MetaTensor(y))
    (gradient,) = torch.autograd.grad(value, meta)
    assert type(value) is torch.Tensor
    assert torch.equal(value, expected)
    assert torch.equal(torch.as_tensor(gradient), expected_gradient)
    soft = L.DiceLoss(softmax=True, soft_label=True, ignore_index=7)(
        meta, monai_data.MetaTensor(z.softmax(1).detach())
    )
    assert soft.isfinite()


def test_numpy():
    z, y = inputs((2, 3, 5, 6), 15, onehot=False)
    w = torch.rand(2, 5, 6)
    calls = [
        lambda a, b, c: L.dice_loss(a, b, to_onehot_y=True, softmax=True),
        lambda a, b, c: L.dice_loss(a, b, to_onehot_y=True, softmax=True, reduction="none", voxel_weight=c),
        lambda a, b, c: L.dice_ce_loss(a, b, to_onehot_y=True, sigmoid=True, weight=[1, 2, 3]),
        lambda a, b, c: L.dice_ce_loss(a[:, :1], (b > 0)[:, 0], sigmoid=True, weight=2.0, voxel_weight=c),
        lambda a, b, c: L.dice_loss(a, a, soft_label=True, ignore_index=4),
        lambda a, b, c: L.cross_entropy(a, b, voxel_weight=c),
        lambda a, b, c: L.uncertainty_weighted_loss(a, b, c, loss="ce_dice"),
        lambda a, b, c: L.entropy_loss(a, voxel_weight=c),
        lambda a, b, c: L.ssl_objective(a, b[:1], b[1:], c[1:]),
    ]
    for call in calls:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = call(z, y, w)
            got = call(z.numpy(), y.numpy(), w.numpy())
        assert not isinstance(got, torch.Tensor)
        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.uint16, torch.int16, torch.int64, torch.float32, torch.float16]
)
def test_labels_of_any_dtype_with_and_without_channel(dtype):
    z, y = inputs((2, 3, 5, 6), 16, onehot=False)
    loss = L.DiceCELoss(to_onehot_y=True, softmax=True)
    expected = loss(z, y)
    assert torch.equal(loss(z, y.to(dtype)), expected)
    assert torch.equal(loss(z, y[:, 0].to(dtype)), expected)
    onehot = F.one_hot(y[:, 0], 3).movedim(-1, 1)
    dice = L.DiceLoss(softmax=True)
    torch.testing.assert_close(dice(z, onehot.to(dtype)), dice(z, onehot))


def test_voxel_weight_zero_is_as_if_the_voxel_were_not_there():
    z, y = inputs((1, 3, 6, 6), 17, onehot=False)
    w = torch.ones(1, 6, 6)
    w[:, 4:] = 0
    k = torch.arange(3).reshape(1, 3, 1, 1)
    for call in (
        lambda a, b, c: L.dice_loss(a, b, to_onehot_y=True, softmax=True, voxel_weight=c),
        lambda a, b, c: L.dice_ce_loss(a, b, to_onehot_y=True, softmax=True, voxel_weight=c),
        lambda a, b, c: L.dice_loss(a.softmax(1), (b + a.abs()) / 9, soft_label=True, voxel_weight=c),
        lambda a, b, c: L.dice_loss(a, (b == k).float(), softmax=True, ignore_index=1, voxel_weight=c),
        lambda a, b, c: L.cross_entropy(a, b, voxel_weight=c),
        lambda a, b, c: L.dice_ce_loss(a[:, :1], b.clamp(max=1), sigmoid=True, weight=3.0, voxel_weight=c),
        lambda a, b, c: L.entropy_loss(a, voxel_weight=c),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.testing.assert_close(call(z, y, w), call(z[:, :, :4], y[:, :, :4], None))


# ---- modules as objects -------------------------------------------------------------------------

MODULES = [
    L.DiceLoss(to_onehot_y=True, softmax=True, weight=torch.tensor([1.0, 2.0, 3.0])),
    L.DiceLoss(other_act=torch.sigmoid, to_onehot_y=True, reduction="none"),
    L.DiceCELoss(to_onehot_y=True, softmax=True, ignore_index=255, lambda_ce=0.5),
    L.CrossEntropyLoss(weight=[1, 2, 3], label_smoothing=0.1),
    L.SoftmaxMSELoss(),
    L.SoftmaxKLLoss(reduction="voxel"),
    L.UncertaintyWeightedLoss(loss="ce_dice"),
    L.CrossPseudoLabelLoss(smooth=1e-10),
]


@pytest.mark.parametrize("module", MODULES, ids=lambda m: re.sub(r" at 0x[0-9a-f]+", "", repr(m)))
def test_copies_pickles_and_states(module):
    z, y = inputs((2, 3, 4, 4), 18, onehot=False)
    expected = module(z, y)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module.to(torch.float64)):
        assert torch.equal(other(z, y), expected)
        assert repr(other) == repr(module)
    assert module.state_dict() == {}
    module.load_state_dict({})
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1), module)
    assert [k for k, _ in model.named_parameters()] == ["0.weight", "0.bias"]


def test_repr_names_what_is_not_default():
    assert repr(L.DiceLoss()) == "DiceLoss()"
    loss = L.DiceCELoss(softmax=True, weight=np.array([1.0, 2.0]), ignore_index=255)
    assert repr(loss) == "DiceCELoss(softmax=True, weight=(1.0, 2.0), ignore_index=255)"
    assert repr(L.EntropyLoss(reduction="sum")) == "EntropyLoss(reduction='sum')"


def test_reduction_as_monais_enum():
    from monai.utils import LossReduction  # noqa: PLC0415

    assert L.DiceLoss(reduction=LossReduction.SUM).reduction == "sum"


# ---- properties ---------------------------------------------------------------------------------

shapes = st.tuples(st.integers(1, 3), st.integers(2, 5), st.integers(1, 6), st.integers(1, 6))
seeds = st.integers(0, 2**31)


def named_losses():
    return {
        "dice": lambda z, y, q, w: L.dice_loss(z, y, to_onehot_y=True, softmax=True, voxel_weight=w),
        "jaccard": lambda z, y, q, w: L.dice_loss(
            *(z, y), to_onehot_y=True, sigmoid=True, jaccard=True, squared_pred=True, voxel_weight=w
        ),
        "dice_ce": lambda z, y, q, w: L.dice_ce_loss(
            *(z, y), to_onehot_y=True, softmax=True, batch=True, label_smoothing=0.1, voxel_weight=w
        ),
        "ce": lambda z, y, q, w: L.cross_entropy(z, q, voxel_weight=w),
        "mse": lambda z, y, q, w: L.softmax_mse_loss(z, q, voxel_weight=w),
        "kl": lambda z, y, q, w: L.softmax_kl_loss(z, q, voxel_weight=w),
        "entropy": lambda z, y, q, w: L.entropy_loss(z, voxel_weight=w),
        "sam": lambda z, y, q, w: L.uncertainty_weighted_loss(z, q, w, loss="ce_dice"),
        "pseudo": lambda z, y, q, w: L.cross_pseudo_label_loss(z, y, w),
    }


def draw(shape, seed):
    g = torch.Generator().manual_seed(seed)
    b, c, h, w = shape
    z = 3 * torch.randn(shape, generator=g)
    y = torch.randint(0, c, (b, 1, h, w), generator=g)
    return z, y, torch.randn(shape, generator=g).softmax(1), torch.rand(b, h, w, generator=g) + 0.05


@pytest.mark.parametrize("name", list(named_losses()))
@settings(max_examples=25, deadline=None)
@given(shape=shapes, seed=seeds)
def test_order_of_voxels_and_samples_does_not_matter_and_losses_are_not_negative(name, shape, seed):
    loss = named_losses()[name]
    z, y, q, w = draw(shape, seed)
    value = loss(z, y, q, w)
    # KL near 0 is a difference of logarithms, exact to a few ulp of them; Dice is 1 - (nearly 1).
    assert value.item() >= -2e-6
    b, _, height, width = shape
    g = torch.Generator().manual_seed(seed + 1)
    voxels, samples = torch.randperm(height * width, generator=g), torch.randperm(b, generator=g)

    def permuted(a):
        return a.flatten(-2)[..., voxels].reshape(a.shape)[samples]

    torch.testing.assert_close(loss(*map(permuted, (z, y, q, w))), value, atol=2e-6, rtol=1e-5)


@settings(max_examples=50, deadline=None)
@given(shape=shapes, seed=seeds, factor=st.floats(0.25, 4.0), kind=st.sampled_from(["mse", "ce"]))
def test_weights_of_one_sample_are_relative(shape, seed, factor, kind):
    z, _, q, w = draw(shape, seed)
    z.requires_grad_()
    scaled = w.clone()
    scaled[-1] *= factor
    value = L.uncertainty_weighted_loss(z, q, w, loss=kind)
    other = L.uncertainty_weighted_loss(z, q, scaled, loss=kind)
    torch.testing.assert_close(other, value, atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(
        *(torch.autograd.grad(other, z)[0], torch.autograd.grad(value, z)[0]), atol=1e-7, rtol=1e-5
    )


@settings(max_examples=50, deadline=None)
@given(shape=shapes, seed=seeds)
def test_gradient_of_the_generalists_term_lives_on_weighted_voxels_only(shape, seed):
    z, _, q, w = draw(shape, seed)
    w[:, ::2] = 0
    z.requires_grad_()
    (gradient,) = torch.autograd.grad(L.uncertainty_weighted_loss(z, q, w), z)
    moved = gradient.abs().sum(1) > 0
    assert not moved[w == 0].any()
    assert moved[w > 0].all()


@settings(max_examples=50, deadline=None)
@given(shape=shapes, seed=seeds, batch=st.booleans(), jaccard=st.booleans(), squared=st.booleans())
def test_dice_of_a_perfect_prediction_is_zero(shape, seed, batch, jaccard, squared):
    _, y, _, _ = draw(shape, seed)
    z = 60.0 * F.one_hot(y[:, 0], shape[1]).movedim(-1, 1)
    options = {"batch": batch, "jaccard": jaccard, "squared_pred": squared}
    value = L.dice_loss(z, y, to_onehot_y=True, softmax=True, **options).item()
    assert value == pytest.approx(0.0, abs=2e-6)
    assert L.dice_loss(z.softmax(1), F.one_hot(y[:, 0], shape[1]).movedim(-1, 1), **options).item() == (
        pytest.approx(0.0, abs=2e-6)
    )


@settings(max_examples=50, deadline=None)
@given(shape=shapes, seed=seeds)
def test_soft_label_dice_is_least_at_the_target(shape, seed):
    _, _, q, _ = draw(shape, seed)
    p = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).softmax(1)
    at_target = L.dice_loss(q, q, soft_label=True).item()
    assert at_target == pytest.approx(0.0, abs=1e-6)
    assert L.dice_loss(p, q, soft_label=True).item() >= at_target - 1e-6


def test_non_finite_logits_are_not_hidden():
    z, y, q, w = draw((2, 3, 4, 4), 0)
    z[0, 1, 2, 3] = torch.nan
    for name, loss in named_losses().items():
        assert loss(z, y, q, w).isnan(), name
    assert L.ssl_objective(z, y[:1], q[1:]).isnan()


# ---- real labels --------------------------------------------------------------------------------


def from_labels(labels, classes, seed=0):
    """Logits of an imperfect network: smoothed labels, noise, and some confidence."""
    g = torch.Generator().manual_seed(seed)
    onehot = F.one_hot(labels.long(), classes).movedim(-1, 1).float()
    pool = F.avg_pool3d if onehot.ndim == 5 else F.avg_pool2d
    return 6 * pool(onehot, 3, 1, 1) + torch.randn(onehot.shape, generator=g)


def real_batch(name, request):
    if name == "la":
        label = request.getfixturevalue("la_case")[1]
        return torch.from_numpy(np.ascontiguousarray(label[40:120, 30:110, 20:76]))[None], 2
    if name == "hippocampus":
        labels = [case[1][:31, :40, :24] for case in request.getfixturevalue("hippocampus_cases")]
        return torch.from_numpy(np.stack(labels[:4])), 3
    volume = request.getfixturevalue("acdc_volumes")[0][1].astype(np.uint8)
    return torch.from_numpy(volume), 4


@pytest.mark.parametrize("name", ["la", "hippocampus", "acdc"])
def test_real_labels_against_monai(name, request):
    labels, classes = real_batch(name, request)
    assert int(labels.max()) == classes - 1
    z = from_labels(labels, classes)
    for options in (
        {"include_background": False, "batch": True, "squared_pred": True},
        {"weight": torch.arange(1, classes + 1).float(), "jaccard": True},
        {},
    ):
        both = {"to_onehot_y": True, "softmax": True, **options}
        agree(L.DiceCELoss(**both), monai_losses.DiceCELoss(**both), z, labels[:, None])


def test_class_missing_from_a_slice(acdc_volumes):
    """Slices without a class: Dice of that class is that of an empty target, finite, as MONAI's."""
    volume = torch.from_numpy(acdc_volumes[0][1].astype(np.uint8))
    missing = [s for s in volume if len(s.unique()) < 4][:2] or [torch.zeros_like(volume[0])]
    labels = torch.stack([*missing, torch.zeros_like(volume[0])])
    z = from_labels(labels, 4)
    options = {"to_onehot_y": True, "softmax": True, "reduction": "none"}
    value = agree(L.DiceLoss(**options), monai_losses.DiceLoss(**options), z, labels[:, None])
    assert value.isfinite().all()


def test_labels_of_unlabeled_samples_are_no_argument():
    """No function takes labels for the unlabeled part: the objective sees B_l labels only."""
    z, labels, pseudo, w = objective_inputs()
    before = L.ssl_objective(z, labels, pseudo, w)
    with pytest.raises(
        ValueError, match="pseudo, voxel_weight: expected None, for all 4 samples are labeled"
    ):
        L.ssl_objective(z, torch.cat([labels, labels]), pseudo, w)
    assert torch.equal(L.ssl_objective(z, labels, pseudo, w), before)


def test_examples():
    result = doctest.testmod(L)
    assert result.attempted >= 40
    assert result.failed == 0
