# SPDX-License-Identifier: Apache-2.0
"""The voxel-loss engine: against torch, MONAI and the formulas, its gradients, and bad input."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from semisam import ops
from semisam.losses import Term, voxel_loss

monai_losses = pytest.importorskip("monai.losses")


def problem(shape=(3, 4, 5, 6, 7), dtype=torch.float64, seed=0):
    """Logits, labels with ignored voxels, a distribution with zeros, weights with zeros."""
    g = torch.Generator().manual_seed(seed)
    b, c, *space = shape
    z = 2 * torch.randn(shape, generator=g, dtype=torch.float64)
    y = torch.randint(0, max(c, 2), (b, *space), generator=g)
    y[0, :1] = 255
    q = torch.rand(shape, generator=g, dtype=torch.float64)
    q = q / q.sum(1, keepdim=True)
    q[:, 0, :1] = 0
    w = torch.rand((b, *space), generator=g, dtype=torch.float64)
    w[w < 0.2] = 0
    return z.to(dtype).requires_grad_(), y, q.to(dtype), w.to(dtype)


def value_and_gradient(loss, z):
    (gradient,) = torch.autograd.grad(loss, z, retain_graph=True)
    return loss.detach(), gradient


def assert_same(ours, theirs, z, tolerance):
    for a, b in zip(value_and_gradient(ours, z), value_and_gradient(theirs, z), strict=True):
        torch.testing.assert_close(
            a.double(), b.double(), rtol=tolerance, atol=tolerance * float(b.abs().max())
        )


# ---- against other people's programs --------------------------------------------------------------

A = [0.5, 1.0, 2.0, 0.25]


@pytest.mark.parametrize(
    "options",
    [{}, {"label_smoothing": 0.2}, {"class_weight": A}, {"class_weight": A, "label_smoothing": 0.1}],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cross_entropy_is_torchs(options, dtype):
    z, y, q, _ = problem(dtype=dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    theirs = {"label_smoothing": options.get("label_smoothing", 0.0)}
    if "class_weight" in options:
        theirs["weight"] = torch.tensor(A, dtype=dtype)
    assert_same(
        voxel_loss(z, [Term("ce", y, **options)]),
        F.cross_entropy(z, y, ignore_index=255, **theirs),
        z,
        tolerance,
    )
    assert_same(voxel_loss(z, [Term("ce", q, **options)]), F.cross_entropy(z, q, **theirs), z, tolerance)


@pytest.mark.parametrize("options", [{}, {"squared_pred": True}, {"jaccard": True}, {"batch": True}])
@pytest.mark.parametrize("include_background", [True, False])
@pytest.mark.parametrize("channels", [2, 3, 4, 6])
def test_dice_is_monais(options, include_background, channels):
    z, y, _, _ = problem((2, channels, 6, 7, 9), torch.float32)
    y = y % channels  # MONAI has no ignore_index
    ours = {"squared_pred": False, "batch": False, "include_background": include_background, **options}
    theirs = monai_losses.DiceLoss(
        softmax=True, to_onehot_y=True, include_background=include_background, **options
    )
    assert_same(voxel_loss(z, [Term("dice", y, **ours)]), theirs(z, y[:, None]), z, 1e-5)


def test_sigmoid_is_monais_and_torchs():
    z, y, q, w = problem((2, 1, 6, 7, 9), torch.float32)
    y = y % 2
    theirs = monai_losses.DiceCELoss(sigmoid=True)
    t = y[:, None].float()
    ours = [Term("dice", y, squared_pred=False, batch=False), Term("ce", y)]
    assert_same(voxel_loss(z, ours, activation="sigmoid"), theirs(z, t), z, 1e-5)
    z, _, q, w = problem((2, 3, 6, 7), torch.float32)
    bce = F.binary_cross_entropy_with_logits(z, q)
    assert_same(voxel_loss(z, [Term("ce", q)], activation="sigmoid"), bce, z, 1e-5)
    weighted = F.binary_cross_entropy_with_logits(z, q, reduction="none").mean(1)
    weighted = (w * weighted).sum() / w.sum()
    assert_same(voxel_loss(z, [Term("ce", q, w)], activation="sigmoid"), weighted, z, 1e-5)


def test_consistency_terms_are_torchs():
    z, _, q, w = problem()
    p, log_p = z.softmax(1), z.log_softmax(1)
    assert_same(voxel_loss(z, [Term("mse", q, reduction="element")]), F.mse_loss(p, q), z, 1e-12)
    kl = F.kl_div(log_p, q, reduction="none")
    assert_same(voxel_loss(z, [Term("kl", q, reduction="element")]), kl.mean(), z, 1e-12)
    assert_same(voxel_loss(z, [Term("kl", q, w)]), (w * kl.sum(1)).sum() / w.sum(), z, 1e-12)
    entropy = -(p * log_p).sum(1) / math.log(4)
    assert_same(voxel_loss(z, [Term("entropy", weight=w)]), (w * entropy).sum() / w.sum(), z, 1e-12)
    assert_same(
        voxel_loss(z, [Term("mse", q, w, reduction="sum")]), (w * ((p - q) ** 2).sum(1)).sum(), z, 1e-12
    )


def test_uncertainty_weighted_loss_normalizes_each_sample():
    z, _, q, w = problem()
    w[1] = 0
    w[1, 0, 0, 0] = 1e-4  # below a thousandth of the voxels: left out
    p = z.softmax(1)
    d = ((p - q) ** 2).mean(1)
    expected = sum((w[n] * d[n]).sum() / w[n].sum() for n in (0, 2)) / 2
    assert_same(voxel_loss(z, [Term("mse", q, w, reduction="sample")]), expected, z, 1e-12)


def test_a_small_example_by_hand():
    # two voxels, logits (0, ln 3) and (0, 0): p = (1/4, 3/4), (1/2, 1/2); labels 1, 0
    z = torch.tensor([[[0.0, 0.0], [math.log(3.0), 0.0]]], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([[1, 0]])
    ce = voxel_loss(z, [Term("ce", y)])
    assert ce.item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2, rel=1e-14)
    assert value_and_gradient(ce, z)[1].flatten().tolist() == pytest.approx([1 / 8, -1 / 4, -1 / 8, 1 / 4])
    dice = voxel_loss(z, [Term("dice", y, smooth_nr=0, smooth_dr=0)], reduction="none")[0]
    # class 0: I = 1/2, Z = 1/16 + 1/4, Y = 1; class 1: I = 3/4, Z = 9/16 + 1/4, Y = 1
    assert dice.tolist() == [pytest.approx([1 - 1 / 1.3125, 1 - 1.5 / 1.8125])]
    entropy = voxel_loss(z, [Term("entropy")], reduction="none")[0].item()
    quarter = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / math.log(2)
    assert entropy == pytest.approx((quarter + 1) / 2, rel=1e-14)


# ---- gradients ------------------------------------------------------------------------------------


def terms_of_every_kind(y, q, w):
    return {
        "ce": [Term("ce", y, w, class_weight=A)],
        "ce smooth": [Term("ce", y, label_smoothing=0.1)],
        "ce soft": [Term("ce", q, w, reduction="sample")],
        "dice": [Term("dice", y, w)],
        "dice linear": [Term("dice", y, squared_pred=False, batch=False, include_background=False)],
        "dice jaccard soft": [Term("dice", q, w, jaccard=True)],
        "mse": [Term("mse", q, w, reduction="sample")],
        "kl": [Term("kl", q, w)],
        "entropy": [Term("entropy", weight=w)],
        "parts": [
            Term("ce", y[:1], samples=(0, 1), scale=0.5),
            Term("dice", y[:1], samples=(0, 1)),
            Term("mse", q[1:], w[1:], samples=(1, 3), scale=2.0),
            Term("entropy", samples=(1, 3)),
        ],
    }


@pytest.mark.parametrize("name", list(terms_of_every_kind(*problem()[1:])))
def test_gradcheck(name):
    z, y, q, w = problem((3, 4, 3, 2))
    terms = terms_of_every_kind(y, q, w)[name]
    assert torch.autograd.gradcheck(lambda x: voxel_loss(x, terms), z, eps=1e-6, atol=1e-9, rtol=1e-6)
    assert torch.autograd.gradcheck(lambda x: voxel_loss(x, terms, reduction="none"), z, eps=1e-6, atol=1e-8)


@pytest.mark.parametrize("activation", ["sigmoid", "none"])
def test_gradcheck_without_softmax(activation):
    z, y, q, w = problem((2, 3, 3, 2))
    terms = [Term("dice", y, w), Term("mse", q, w)] + ([Term("ce", y)] if activation == "sigmoid" else [])
    assert torch.autograd.gradcheck(lambda x: voxel_loss(x, terms, activation=activation), z, atol=1e-8)


@pytest.mark.parametrize("name", list(terms_of_every_kind(*problem()[1:])))
@pytest.mark.parametrize("channels", [2, 3, 4, 7])
def test_float32_is_within_1e5_of_float64(name, channels):
    shape = (3, channels, 11, 13, 17)  # several blocks and a tail
    z, y, q, w = problem(shape)
    terms = terms_of_every_kind(y, q, w)[name]
    if name == "ce":
        terms = [Term("ce", y, w, class_weight=[0.5, 1.0, 2.0, 0.0, 1.0, 1.0, 3.0][:channels])]
    exact = value_and_gradient(voxel_loss(z, terms), z)
    z32 = z.detach().float().requires_grad_()
    got = value_and_gradient(voxel_loss(z32, terms), z32)
    assert got[0].dtype == got[1].dtype == torch.float32
    assert float((got[0] - exact[0]).abs() / exact[0].abs()) < 1e-5
    assert float((got[1] - exact[1]).abs().max() / exact[1].abs().max()) < 1e-5


def test_many_blocks_and_chunks_against_float64():
    z, y, q, w = problem((2, 2, 61, 40, 33))  # 80 520 voxels: five chunks and a tail of lanes
    terms = [Term("ce", y), Term("dice", y), Term("mse", q, w, reduction="sample"), Term("entropy")]
    exact = value_and_gradient(voxel_loss(z, terms), z)
    z32 = z.detach().float().requires_grad_()
    got = value_and_gradient(voxel_loss(z32, terms), z32)
    assert float((got[0] - exact[0]).abs() / exact[0]) < 2e-6
    assert float((got[1] - exact[1]).abs().max() / exact[1].abs().max()) < 1e-5


def test_weighted_gradient_rules():
    z, _, q, w = problem()
    term = lambda weight: [Term("mse", q, weight, reduction="sample")]  # noqa: E731
    _, gradient = value_and_gradient(voxel_loss(z, term(w)), z)
    used = (w > 0)[:, None].expand_as(gradient)
    assert (gradient[used] != 0).all()
    assert (gradient[~used] == 0).all()
    scaled = w * torch.tensor([0.5, 3.0, 100.0])[:, None, None, None]
    _, again = value_and_gradient(voxel_loss(z, term(scaled)), z)
    torch.testing.assert_close(again, gradient, rtol=1e-12, atol=0)


def test_samples_without_a_term_are_not_read_and_get_no_gradient():
    z, y, _, _ = problem(dtype=torch.float32)
    with torch.no_grad():
        z[1] = math.nan
    loss, gradient = value_and_gradient(voxel_loss(z, [Term("ce", y[2:], samples=(2, 3))]), z)
    assert torch.isfinite(loss)
    assert (gradient[:2] == 0).all()
    assert (gradient[2] != 0).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [2, 5])
def test_nothing_to_learn_from_gives_zero(dtype, channels):
    z, y, q, w = problem((2, channels, 6, 7), dtype)
    none, zero = torch.full_like(y, 255), torch.zeros_like(w)
    for terms in (
        [Term("ce", none), Term("dice", none)],
        [Term("ce", none, label_smoothing=0.1)],
        [Term("dice", none, batch=False, smooth_nr=0.0)],
        [Term("ce", q, zero), Term("dice", q, zero), Term("kl", q, zero)],
        [Term("mse", q, zero), Term("entropy", weight=zero)],
        [Term("mse", q, zero, reduction="sample")],
    ):
        loss, gradient = value_and_gradient(voxel_loss(z, terms), z)
        assert loss == 0
        assert (gradient == 0).all()
    empty = Term("dice", torch.zeros_like(y), include_background=False)
    sure = torch.zeros_like(z)
    sure[:, 0] = 200.0 if dtype != torch.float16 else 100.0
    assert voxel_loss(sure, [empty]) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("channels", [2, 3, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_that_are_not_finite_are_not_hidden(bad, channels, dtype):
    z, y, q, _ = problem((2, channels, 6, 7), dtype)
    y = y % channels
    with torch.no_grad():
        z[1, 1, 2, 3] = bad
    for term in (Term("ce", y), Term("dice", y), Term("mse", q), Term("kl", q), Term("entropy")):
        loss, gradient = value_and_gradient(voxel_loss(z, [term]), z)
        assert torch.isnan(loss), term.kind
        assert torch.isnan(gradient[1, :, 2, 3]).all(), term.kind


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_patch_of_ones_does_not_overflow(dtype):
    z = torch.ones(1, 2, 112, 112, 80, dtype=dtype, requires_grad=True)
    y = torch.ones(1, 112, 112, 80, dtype=torch.uint8)
    loss, gradient = value_and_gradient(voxel_loss(z, [Term("ce", y), Term("dice", y)]), z)
    # CE ln 2; Dice of class 1: 2 (n/2) / (n/4 + n) = 0.8; of class 0: I = 0, so about 0
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log(2) + (1 + 0.2) / 2, rel=1e-5)
    assert gradient.dtype == dtype
    assert torch.isfinite(gradient).all()


# ---- torch ----------------------------------------------------------------------------------------


def test_strides_formats_and_dtypes_of_labels_do_not_matter():
    z, y, _, _ = problem((2, 3, 4, 6, 8), torch.float32)
    terms = lambda labels: [Term("ce", labels), Term("dice", labels)]  # noqa: E731
    loss, gradient = value_and_gradient(voxel_loss(z, terms(y)), z)
    for other in (
        z.detach().to(memory_format=torch.channels_last_3d).requires_grad_(),
        z.detach().transpose(2, 4).contiguous().transpose(2, 4).requires_grad_(),
    ):
        assert not other.is_contiguous()
        again = value_and_gradient(voxel_loss(other, terms(y)), other)
        assert again[0] == loss
        assert torch.equal(again[1], gradient)
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.uint64):
        assert voxel_loss(z, terms(y.to(dtype))) == loss
        assert voxel_loss(z, terms(y[:, None].to(dtype))) == loss
    signed = y.clone()
    signed[signed == 255] = -1
    for dtype in (torch.int8, torch.int32, torch.int64):
        shared = signed.to(dtype)
        assert voxel_loss(z, [Term(k, shared, ignore_index=-1) for k in ("ce", "dice")]) == loss
    assert voxel_loss(z.detach(), [Term("ce", (y % 2).bool())]) == voxel_loss(z.detach(), [Term("ce", y % 2)])


def test_used_twice_in_one_graph():
    z, y, q, _ = problem(dtype=torch.float32)
    both = voxel_loss(z, [Term("ce", y)]) + 3 * voxel_loss(2 * z, [Term("mse", q)])
    one, two = voxel_loss(z, [Term("ce", y)]), voxel_loss(2 * z, [Term("mse", q)])
    expected = value_and_gradient(one, z)[1] + 3 * value_and_gradient(two, z)[1]
    torch.testing.assert_close(value_and_gradient(both, z)[1], expected)


def test_sum_of_terms_is_the_sum_of_the_terms():
    z, y, q, w = problem(dtype=torch.float32)
    for terms in terms_of_every_kind(y, q, w).values():
        apart = sum(voxel_loss(z, [t]) for t in terms)
        assert_same(voxel_loss(z, terms), apart, z, 1e-5)


def test_reduction_none():
    z, y, q, w = problem()
    dice, per_sample, mse = voxel_loss(
        z,
        [
            Term("dice", y, include_background=False),
            Term("dice", y[1:], samples=(1, 3), batch=False),
            Term("mse", q, w),
        ],
        reduction="none",
    )
    assert dice.shape == (1, 3)
    assert per_sample.shape == (2, 4)
    assert mse.shape == (3,)
    for n in range(3):
        torch.testing.assert_close(
            mse[n], voxel_loss(z[n : n + 1], [Term("mse", q[n : n + 1], w[n : n + 1])])
        )
    torch.testing.assert_close(dice.mean(), voxel_loss(z, [Term("dice", y, include_background=False)]))


def test_inference_mode_and_no_gradient():
    z, y, _, _ = problem(dtype=torch.float32)
    expected = voxel_loss(z, [Term("ce", y)]).item()
    with torch.inference_mode():
        assert voxel_loss(z.detach(), [Term("ce", y)]).item() == expected
    with torch.no_grad():
        assert not voxel_loss(z, [Term("ce", y)]).requires_grad


def test_second_derivative_is_refused():
    z, y, _, _ = problem()
    with pytest.raises(RuntimeError, match="differentiable once only"):
        torch.autograd.grad(voxel_loss(z, [Term("ce", y)]), z, create_graph=True)


def test_autocast_leaves_dtypes_alone():
    z, y, _, _ = problem(dtype=torch.bfloat16)
    plain = value_and_gradient(voxel_loss(z, [Term("ce", y)]), z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = value_and_gradient(voxel_loss(z, [Term("ce", y)]), z)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(plain, cast, strict=True))


def test_tensor_subclass_is_unwrapped():
    meta = pytest.importorskip("monai.data").MetaTensor
    z, y, _, _ = problem(dtype=torch.float32)
    leaf = z.detach().clone().requires_grad_()
    loss = voxel_loss(meta(leaf), [Term("ce", meta(y))])
    assert type(loss) is torch.Tensor
    assert loss == voxel_loss(z, [Term("ce", y)])


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on the CPU needs g++")
def test_compiles_in_one_graph():
    def objective(z, y, q, w):
        terms = [
            Term("ce", y, samples=(0, 1)),
            Term("dice", y, samples=(0, 1)),
            Term("mse", q, w, samples=(1, 3), scale=0.3),
        ]
        return voxel_loss(2 * z, terms)

    z, y, q, w = problem((3, 2, 8, 9), torch.float32)
    data = (z, y[:1], q[1:], w[1:])
    eager = value_and_gradient(objective(*data), z)
    compiled = value_and_gradient(torch.compile(objective, fullgraph=True)(*data), z)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


# ---- NumPy, real data, properties -----------------------------------------------------------------


def test_numpy_gives_values():
    z, y, q, w = problem(dtype=torch.float32)
    terms = [Term("ce", y), Term("dice", y), Term("mse", q, w)]
    arrays = [Term("ce", y.numpy()), Term("dice", y.numpy()), Term("mse", q.numpy(), w.numpy())]
    got = voxel_loss(z.detach().numpy(), arrays)
    assert isinstance(got, np.float32)
    assert got == pytest.approx(voxel_loss(z, terms).item(), rel=1e-6)
    parts = voxel_loss(z.detach().numpy(), arrays, reduction="none")
    assert all(isinstance(p, np.ndarray) and p.dtype == np.float32 for p in parts)


def test_real_atrium(la_case):
    image, label = la_case
    x, y = torch.from_numpy(image), torch.from_numpy(label)
    assert set(np.unique(label)) <= {0, 1}
    z = torch.stack([-x, x])[None].requires_grad_()
    ours = voxel_loss(z, [Term("ce", y[None]), Term("dice", y[None])])
    exact = z.detach().double().requires_grad_()
    p, t = exact.softmax(1), F.one_hot(y[None].long(), 2).movedim(-1, 1).double()
    dims = (0, 2, 3, 4)
    dice = 1 - (2 * (p * t).sum(dims) + 1e-5) / ((p * p).sum(dims) + t.sum(dims) + 1e-5)
    theirs = value_and_gradient(F.cross_entropy(exact, y[None].long()) + dice.mean(), exact)
    got = value_and_gradient(ours, z)
    assert float(got[0]) == pytest.approx(float(theirs[0]), rel=1e-6)
    assert float((got[1] - theirs[1]).abs().max() / theirs[1].abs().max()) < 1e-5


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(2, 6), st.integers(1, 40), st.integers(1, 3), st.integers(0, 2**31))
def test_properties(b, c, h, w, seed):
    z, y, q, m = problem((b, c, h, w), torch.float64, seed)
    _, gradient = value_and_gradient(voxel_loss(z, [Term("ce", y), Term("dice", y), Term("kl", q, m)]), z)
    # softmax does not see a common shift, so gradients sum up to 0 over classes (q sums up to 1)
    q1 = q / q.sum(1, keepdim=True)
    _, of_kl = value_and_gradient(voxel_loss(z, [Term("kl", q1, m), Term("ce", y), Term("dice", y)]), z)
    assert float(of_kl.sum(1).abs().max()) < 1e-12
    assert torch.isfinite(gradient).all()
    shifted = voxel_loss(z + 5.0, [Term("ce", y), Term("dice", y)])
    assert (shifted - voxel_loss(z, [Term("ce", y), Term("dice", y)])).item() == pytest.approx(0, abs=1e-11)
    values = voxel_loss(
        z, [Term("dice", y), Term("mse", q1, m), Term("kl", q1, m), Term("entropy")], reduction="none"
    )
    assert all((v >= -1e-12).all() for v in values)
    assert (values[0] <= 1).all()
    assert (values[3] <= 1 + 1e-12).all()


# ---- bad input ------------------------------------------------------------------------------------

Z = torch.zeros(2, 3, 4, 5)
Y = torch.zeros(2, 4, 5, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: Term("iou", Y),
            ValueError,
            r"Term\(\): kind: expected one of ce, dice, mse, kl, entropy, got 'iou'",
        ),
        (
            lambda: Term("ce"),
            ValueError,
            r"Term\(\): target: expected labels or a distribution for 'ce', got NoneType",
        ),
        (
            lambda: Term("entropy", Y),
            ValueError,
            r"Term\(\): target: expected no target for 'entropy', got Tensor",
        ),
        (
            lambda: Term("ce", Y, reduction="mean"),
            ValueError,
            r"Term\(\): reduction: expected one of voxel, .* got 'mean'",
        ),
        (
            lambda: Term("ce", Y, label_smoothing=1.0),
            ValueError,
            r"Term\(\): label_smoothing: expected .*\[0, 1\), got 1.0",
        ),
        (
            lambda: Term("dice", Y, smooth_dr=-1.0),
            ValueError,
            r"Term\(\): smooth_dr: expected a number >= 0, got -1.0",
        ),
        (
            lambda: voxel_loss(Z, []),
            ValueError,
            r"voxel_loss\(\): terms: expected at least one Term, got none",
        ),
        (
            lambda: voxel_loss(Z, [Term("ce", Y)], activation="tanh"),
            ValueError,
            r"activation: expected one of softmax, .* got 'tanh'",
        ),
        (
            lambda: voxel_loss(Z, [Term("ce", Y)], reduction="mean"),
            ValueError,
            r"reduction: expected sum, terms or none, got 'mean'",
        ),
        (
            lambda: voxel_loss([1.0], [Term("ce", Y)]),
            TypeError,
            r"logits: expected a torch tensor or NumPy array, got list",
        ),
        (
            lambda: voxel_loss(Z[0, 0], [Term("ce", Y)]),
            ValueError,
            r"logits: expected shape \(B, C, spatial...\) .* got \(4, 5\)",
        ),
        (
            lambda: voxel_loss(Z[:, :1], [Term("ce", Y)]),
            ValueError,
            r"logits: expected at least 2 channels for softmax, got 1",
        ),
        (
            lambda: voxel_loss(Z[:0], [Term("entropy")]),
            ValueError,
            r"terms\[0\].samples: expected 0 <= first < last <= 0",
        ),
        (
            lambda: voxel_loss(Z.long(), [Term("ce", Y)]),
            TypeError,
            r"logits: expected dtype f16, bf16, f32, f64, got i64",
        ),
        (
            lambda: voxel_loss(Z, [Term("ce", Y[:1])]),
            ValueError,
            r"terms\[0\].target: expected labels \(2, 4, 5\) or .* got \(1, 4, 5\)",
        ),
        (
            lambda: voxel_loss(Z, [Term("ce", Y.float())]),
            TypeError,
            r"terms\[0\].target: expected an integer dtype .* got f32",
        ),
        (
            lambda: voxel_loss(Z, [Term("ce", Y.numpy())]),
            TypeError,
            r"terms\[0\].target: expected a torch tensor as the logits are, got ndarray",
        ),
        (
            lambda: voxel_loss(Z, [Term("ce", Y, Y[:, 0])]),
            ValueError,
            r"terms\[0\].weight: expected shape \(2, 4, 5\), got \(2, 5\)",
        ),
        (
            lambda: voxel_loss(Z, [Term("ce", Y, -1.0 * torch.ones(2, 4, 5))]),
            ValueError,
            r"weight: expected values >= 0",
        ),
        (
            lambda: voxel_loss(Z, [Term("ce", Y, class_weight=[1.0])]),
            ValueError,
            r"class_weight: expected 3 numbers >= 0, got \[1.0\]",
        ),
        (
            lambda: voxel_loss(Z, [Term("mse", Y, class_weight=[1.0] * 3)]),
            ValueError,
            r"class_weight: expected None",
        ),
        (
            lambda: voxel_loss(Z, [Term("ce", Y, samples=(1, 3))]),
            ValueError,
            r"samples: expected 0 <= first < last <= 2, got \(1, 3\)",
        ),
        (
            lambda: voxel_loss(Z, [Term("entropy")], activation="sigmoid"),
            ValueError,
            r"terms\[0\]: expected one of ce, dice, mse with activation 'sigmoid', got 'entropy'",
        ),
        (
            lambda: voxel_loss(Z, [Term("ce", Y + 3)]),
            ValueError,
            r"target: expected labels 0 to 2 \(or ignore_index\) for 3 classes, got 3",
        ),
        (lambda: voxel_loss(Z, [Term("dice", Y - 7)]), ValueError, r"expected labels 0 to 2 .* got -7"),
        (
            lambda: voxel_loss(Z, [Term("ce", Y + 255, ignore_index=None)]),
            ValueError,
            r"expected labels 0 to 2 .* got 255",
        ),
        (
            lambda: voxel_loss(Z.double(), [Term("mse", Y + 300)]),
            ValueError,
            r"expected labels 0 to 2 .* got 300",
        ),
        (
            lambda: voxel_loss(Z, [Term("ce", Y + 2**40)]),
            ValueError,
            r"expected labels 0 to 2 .* got 1099511627776",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_raw_operator_checks_its_numbers():
    z, y = Z.numpy(), Y.numpy()
    row = [0, 0, -1, 0, 2, 1, 255, 0, 1, 1, 1, 0, 1e-5, 1e-5, 0, 1e-3, 1, 1, 1, 1]

    def run(at=None, value=None, **changes):
        params = [*row]
        if at is not None:
            params[at] = value
        given = {"targets": [y], "weights": [], "params": params, "activation": 0, "terms": 1, **changes}
        return ops.call("voxel_loss_forward", z, *given.values())

    run()
    for at, value in ((0, 5), (0, 0.5), (0, math.nan), (1, 1), (1, -1), (2, 0), (3, -1), (4, 3), (14, 4)):
        with pytest.raises(ValueError, match=r"voxel_loss_forward\(\): params: term 0: expected .*, got"):
            run(at, value)
    with pytest.raises(ValueError, match=r"params: expected 20 numbers for each of 2 terms, got 20"):
        run(terms=2)
    with pytest.raises(
        ValueError, match=r"targets\[0\]: expected integer labels of 40 voxels .* got 20 values"
    ):
        run(targets=[y[:1]])
    with pytest.raises(ValueError, match=r"weights\[0\]: expected 40 values, got 20"):
        run(2, 0, weights=[np.ones((1, 4, 5), np.float32)])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("channels", [2, 3, 5])
@pytest.mark.parametrize("odd", [None, "ignored", "ignored class", "infinite"])
def test_whole_lanes_and_their_exceptions(channels, dtype, odd):
    """Voxels in whole lanes, with what the fastest loops leave to the general sweep in some of them."""
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(2, channels, 16, 256, generator=generator)
    y = torch.randint(channels, (2, 16, 256), generator=generator).to(dtype)
    ignore = 1 if odd == "ignored class" else 99
    if odd == "ignored":
        y[1, 8, 5] = 99
    if odd == "infinite":
        z[0, 0, 4, 7] = -math.inf
        y[0, 4, 7] = 1
    found, expected = [], []
    for values, logits in ((found, z.clone()), (expected, z.double())):
        logits.requires_grad_()
        loss = voxel_loss(logits, [Term("ce", y, ignore_index=ignore), Term("dice", y, ignore_index=ignore)])
        loss.backward()
        values += [loss.detach().double(), logits.grad.double()]
    torch.testing.assert_close(found[0], expected[0], rtol=2e-6, atol=0)
    # float32 at each voxel; the largest gradients are about 2 / voxels
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-9)
