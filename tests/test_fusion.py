# SPDX-License-Identifier: Apache-2.0
"""Fusion: check 6 of the method, formulas against NumPy and SciPy, numerics, bad input, real labels."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, special, stats

from semisam import fusion
from semisam.fusion import (
    Reliability,
    agreement,
    fuse,
    join_classes,
    mc_uncertainty,
    pseudo_label,
    source_weights,
)

EPS = float(np.finfo(np.float32).eps)


def distributions(rng, s, *shape, sharp=1.0):
    return list(special.softmax(sharp * rng.standard_normal((s, *shape)), axis=2))


def normalised(rng, *shape):
    r = rng.random(shape)
    return r / r.sum(0)


# ---- check 6: identical and opposed sources, MI as a mean of divergences ------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("channels", [1, 2, 3, 7])
@pytest.mark.parametrize("logits", [False, True])
def test_identical_sources_have_no_doubt_at_all(rng, dtype, channels, logits):
    p = rng.standard_normal((2, channels, 11, 13)) * 3
    if not logits:
        p = special.expit(p) if channels == 1 else special.softmax(p, axis=1)
    p = p.astype(dtype)
    for s in (2, 3, 10):
        weights = normalised(rng, s)
        for unc in ("var", "mi"):
            fused = fuse([p] * s, weights, normalised(rng, s), unc=unc, logits=logits)
            alone = fuse([p], logits=logits)
            assert not fused.uncertainty.any()
            assert (fused.weight == 1).all()
            # Exactly the source's own distribution, whatever the weights' rounding.
            assert np.array_equal(fused.mean, alone.mean)
            assert np.array_equal(fused.label, alone.label)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 1, 4), (1, 2, 4)])
def test_opposed_one_hot_sources_are_as_doubtful_as_can_be(dtype, shape):
    p = np.zeros(shape, dtype)
    p[:, 0] = [0, 1, 0, 1]
    p[:, -1] = 1 - p[:, 0] if shape[1] == 2 else p[:, 0]
    for unc in ("var", "mi", "ent"):
        fused = fuse([p, 1 - p], unc=unc)
        np.testing.assert_allclose(fused.uncertainty, 1, rtol=1e-6)
        np.testing.assert_allclose(fused.weight, math.exp(-4), rtol=1e-5)
    assert (fuse([p, 1 - p]).uncertainty == 1).all()
    assert (fuse([p, 1 - p]).label == 0).all()  # a tie: the smallest class


@pytest.mark.parametrize("channels", [2, 5])
def test_mutual_information_is_the_mean_divergence_from_the_mixture(rng, channels):
    p = distributions(rng, 6, 2, channels, 9, 10)
    r = normalised(rng, 6)
    mixture = np.tensordot(r, np.stack(p), 1)
    kl = sum(w * special.rel_entr(q, mixture).sum(1) for w, q in zip(r, p, strict=True))
    u = fuse(p, r, unc="mi", want=("uncertainty",)).uncertainty
    np.testing.assert_allclose(u * math.log(channels), kl, atol=1e-12, rtol=0)
    single = fuse([q.astype(np.float32) for q in p], r, unc="mi", want=("uncertainty",)).uncertainty
    np.testing.assert_allclose(single * math.log(channels), kl, atol=2e-6, rtol=0)  # a few eps of ln C


# ---- formulas -----------------------------------------------------------------------------------


def test_every_map_by_its_formula(rng):
    p = np.stack(distributions(rng, 5, 2, 3, 8, 9, sharp=2))
    r_lab, r_unc = normalised(rng, 5), normalised(rng, 5)
    pbar, mu = np.tensordot(r_lab, p, 1), np.tensordot(r_unc, p, 1)
    var = np.tensordot(r_unc, (p - mu) ** 2, 1).sum(1) / (1 - 1 / 3)
    fused = fuse(list(p), r_lab, r_unc)
    np.testing.assert_allclose(fused.mean, pbar, atol=1e-15)
    np.testing.assert_array_equal(fused.label, pbar.argmax(1))
    np.testing.assert_allclose(fused.confidence, pbar.max(1), atol=1e-15)
    np.testing.assert_allclose(fused.uncertainty, var, atol=1e-14)
    np.testing.assert_allclose(fused.weight, np.exp(-4 * var), atol=1e-13)
    entropy = stats.entropy(mu, axis=1) / math.log(3)
    linear = fuse(list(p), r_lab, r_unc, unc="ent", weight="linear")
    np.testing.assert_allclose(linear.uncertainty, entropy, atol=1e-13)
    np.testing.assert_allclose(linear.weight, 1 - entropy, atol=1e-13)
    gate = fuse(list(p), r_lab, r_unc, unc="ent", weight="gate", tau_u=0.8)
    np.testing.assert_array_equal(gate.weight, entropy <= 0.8)
    np.testing.assert_array_equal(gate.label, np.where(entropy <= 0.8, pbar.argmax(1), 255))
    conf = fuse(list(p), r_lab, r_unc, weight="conf", kappa=0)
    np.testing.assert_allclose(conf.weight, np.maximum(0, (pbar.max(1) - 1 / 3) * 1.5), atol=1e-14)
    assert (fuse(list(p), weight="none").weight == 1).all()


@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("unc", ["var", "ent", "mi"])
def test_one_channel_is_the_foreground_of_two_classes(rng, logits, unc):
    z = rng.standard_normal((4, 2, 1, 7, 8)) * 3
    f = z if logits else special.expit(z)
    both = np.concatenate([np.zeros_like(z), z] if logits else [1 - f, f], 2)
    one = fuse(list(f), unc=unc, logits=logits, tau_c=0.6)
    two = fuse(list(both), unc=unc, logits=logits, tau_c=0.6)
    np.testing.assert_allclose(one.mean, two.mean[:, 1:], atol=1e-15)
    for name in ("confidence", "uncertainty", "weight"):
        np.testing.assert_allclose(getattr(one, name), getattr(two, name), atol=1e-14)
    np.testing.assert_array_equal(one.label, two.label)
    wide = fuse(list(f), unc=unc, logits=logits, two_channels=True)
    np.testing.assert_allclose(wide.mean, two.mean, atol=1e-15)


def test_a_table_of_weights_is_one_call_per_sample(rng):
    p = [q.astype(np.float32) for q in distributions(rng, 4, 3, 4, 300)]
    r_lab, r_unc = normalised(rng, 4, 3), normalised(rng, 4, 3)
    r_lab[1, 0], r_lab[0, 0] = 0, r_lab[0, 0] + r_lab[1, 0]
    whole = fuse(p, r_lab, r_unc, unc="mi")
    for b in range(3):
        alone = fuse([q[b : b + 1] for q in p], r_lab[:, b], r_unc[:, b], unc="mi")
        for x, y in zip(whole, alone, strict=True):
            assert np.array_equal(x[b : b + 1], y)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("unc", ["var", "ent", "mi"])
def test_what_has_no_weight_may_be_anything(rng, channels, logits, unc):
    """A source counts in one sample and not in the other, where it is NaN: as if it were not there."""
    z = [rng.standard_normal((2, channels, 700)) for _ in range(5)]
    maps = z if logits else [special.expit(v) if channels == 1 else special.softmax(v, 1) for v in z]
    lab, doubt = np.zeros((5, 2)), np.zeros((5, 2))
    lab[[0, 2], 0], doubt[[0, 3], 0] = 0.5, 0.5
    lab[[1, 4], 1], doubt[[1, 4], 1] = (0.25, 0.75), (0.5, 0.5)
    for s, b in ((1, 0), (4, 0), (0, 1), (2, 1), (3, 1)):
        maps[s][b] = np.nan
    whole = fuse(maps, lab, doubt, unc=unc, logits=logits)
    for b, counts in enumerate(([0, 2, 3], [1, 4])):
        few = [maps[s][b : b + 1] for s in counts]
        alone = fuse(few, lab[counts, b], doubt[counts, b], unc=unc, logits=logits)
        for x, y in zip(whole, alone, strict=True):
            assert np.array_equal(x[b : b + 1], y)


def test_a_sample_without_sources_knows_nothing(rng):
    p = distributions(rng, 2, 2, 4, 5)
    fused = fuse(p, [[0.5, 0], [0.5, 0]], unc="ent", ignore_index=9)
    assert (fused.mean[1] == 0.25).all()
    assert (fused.label[1] == 9).all()
    assert (fused.confidence[1] == 0.25).all()
    assert (fused.uncertainty[1] == 1).all()
    assert not fused.weight[1].any()


def test_weights_as_list_array_and_tensor_are_one(rng):
    p = [torch.from_numpy(q) for q in distributions(rng, 3, 2, 2, 50)]
    r = normalised(rng, 3)
    want = [t.numpy() for t in fuse(p, r.tolist())]
    for weights in (r, torch.from_numpy(r), tuple(r)):
        for x, y in zip(fuse(p, weights), want, strict=True):
            assert np.array_equal(x.numpy(), y)
    stacked = fuse(torch.stack(p), r)
    assert all(np.array_equal(x.numpy(), y) for x, y in zip(stacked, want, strict=True))


def test_what_is_not_asked_for_is_not_there(rng):
    p = distributions(rng, 3, 1, 2, 70)
    whole = fuse(p, unc="mi", tau_c=0.6, tau_u=0.3)
    for name in fusion.Fused._fields:
        part = fuse(p, unc="mi", tau_c=0.6, tau_u=0.3, want=(name,))
        for other in fusion.Fused._fields:
            if other == name:
                assert np.array_equal(getattr(part, name), getattr(whole, name))
            else:
                assert getattr(part, other) is None


# ---- numerics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2])
def test_a_small_spread_is_not_lost_in_rounding(rng, channels):
    """The relative error stays at a few S eps, where E[p^2] - E[p]^2 in float32 has no digit left."""
    s = 10
    p = 0.7 + 1e-4 * rng.standard_normal((s, 1, 1, 5000))
    p = np.concatenate([1 - p, p], 2)[:, :, -channels:].astype(np.float32)
    exact = (2 / channels) * 2 * p.astype(np.float64).var(0).sum(1)
    u = fuse(list(p), want=("uncertainty",)).uncertainty
    assert np.abs(u / exact - 1).max() < 4 * s * EPS
    naive = (2 / channels) * 2 * ((p * p).mean(0) - p.mean(0) ** 2).sum(1)
    assert np.abs(naive / exact - 1).max() > 1  # so this test can tell the difference


def test_sigmoid_is_accurate_everywhere():
    """One source: its mean is the sigmoid itself. 1.5e-7 and relative (|x| + 3) 1e-7 are promised."""
    x = np.concatenate([np.linspace(-80, 80, 400_001), [-1e30, 1e30, -np.inf, np.inf, 0.0]]).astype(
        np.float32
    )
    got = fuse([x.reshape(1, 1, -1)], logits=True, want=("mean",)).mean.ravel()
    exact = special.expit(x.astype(np.float64))
    assert np.abs(got - exact).max() < 1.5e-7
    inside = np.abs(x) <= 80
    relative = np.abs(got[inside] / exact[inside] - 1) / ((np.abs(x[inside]) + 3) * 1e-7)
    assert relative.max() < 1
    assert np.isnan(fuse([np.full((1, 1, 3), np.nan, np.float32)], logits=True).mean).all()


@pytest.mark.parametrize("weight", ["exp", "linear"])
@pytest.mark.parametrize("s", range(2, 15))
def test_every_number_of_maps_has_its_sums(rng, s, weight):
    """Up to 12 maps each have a loop of their own; one more source has no weight, one voxel is NaN."""
    maps = rng.random((s + 1, 2, 1, 1283), np.float32)
    maps[s // 2, 1, 0, 700] = np.nan
    r = np.append(np.arange(s) % 3 + 1.0, 0)
    r /= r.sum()
    got = fuse(list(maps), r, weight=weight, want=("mean", "uncertainty", "weight", "label", "confidence"))
    p = maps[:s].astype(np.float64)
    mean = np.tensordot(r[:s], p, 1)
    u = np.clip(4 * (np.tensordot(r[:s], p**2, 1) - mean**2), 0, 1)[:, 0]
    for made, exact in (
        (got.mean, mean),
        (got.uncertainty, u),
        (got.weight, np.exp(-4 * u) if weight == "exp" else 1 - u),
        (got.confidence, np.maximum(mean, 1 - mean)[:, 0]),
    ):
        np.testing.assert_allclose(np.asarray(made).reshape(exact.shape), exact, atol=1e-6)
    sure = np.abs(mean[:, 0] - 0.5) > 1e-6
    assert (got.label[sure] == (mean[:, 0] > 0.5)[sure]).all()


@pytest.mark.parametrize("s", [3, 4, 5, 8])
@pytest.mark.parametrize("channels", [1, 2])
def test_mean_of_logits_is_accurate_everywhere(rng, s, channels):
    """Sigmoids that share a division: absolute error 4e-7, and non-finite logits as in a softmax."""
    z = (rng.uniform(-1, 1, (s, 1, channels, 50_000)) * np.linspace(0, 150, 50_000)).astype(np.float32)
    weights = (np.arange(s) + 1.0) / (s * (s + 1) / 2)
    d = z[:, 0, -1].astype(np.float64) - (z[:, 0, 0] if channels == 2 else 0)
    exact = (weights[:, None] * special.expit(d)).sum(0)
    got = fuse(list(z), weights, logits=True, want=("mean",)).mean[0, -1]
    assert np.abs(got - exact).max() < 4e-7

    z[s - 1, 0, channels - 1, 1000:1003] = np.nan, np.inf, -np.inf  # one block of many
    odd = fuse(list(z), weights, logits=True, want=("mean",)).mean[0, -1]
    rest = (weights[:-1, None] * special.expit(d[:-1, 1000:1003])).sum(0)
    up = np.nan if channels == 2 else rest[1] + weights[-1]
    np.testing.assert_allclose(odd[1000:1003], [np.nan, up, rest[2]], atol=4e-7)
    assert np.abs(np.delete(odd - exact, range(1000, 1003))).max() < 4e-7


@pytest.mark.parametrize(
    ("channels", "options"),
    [
        (1, {"want": ("mean", "uncertainty", "weight")}),
        (1, {"want": ("mean", "uncertainty", "weight"), "two_channels": True}),
        (1, {"want": ("uncertainty",)}),
        (1, {"two_channels": True, "weight": "linear", "tau_u": 0.2}),
        (2, {"two_channels": False}),
        (2, {"logits": True, "unc": "ent"}),
        (1, {"logits": True, "unc": "ent"}),
    ],
)
@pytest.mark.parametrize("space", [(64, 64, 96), (41, 83, 93)])
def test_large_maps_are_small_ones_side_by_side(rng, channels, options, space):
    """Outputs of a MiB and more go past the caches in strips of whole lines; every voxel is its own."""
    sources = [rng.random((2, channels, *space), np.float32) for _ in range(5)]
    if channels == 2 and not options.get("logits"):
        sources = [p / p.sum(1, keepdims=True) for p in sources]
    assert 4 * sources[0][:, 0].size >= 1 << 20
    whole = fusion.fuse(sources, **options)
    for cut in (slice(0, 7), slice(space[0] - 8, None)):
        part = fusion.fuse([np.ascontiguousarray(p[:, :, cut]) for p in sources], **options)
        assert 4 * part[3].size < 1 << 20
        for name, large, small in zip(whole._fields, whole, part, strict=True):
            assert (large is None) == (small is None), name
            if large is not None:
                view = large[:, :, cut] if large.ndim == 5 else large[:, cut]
                np.testing.assert_array_equal(view, small, err_msg=name)


@pytest.mark.parametrize("kappa", [0.0, 0.5, 4.0, 80.0])
def test_exponential_weight_is_accurate(rng, kappa):
    p = rng.random((2, 1, 1, 20000)).astype(np.float32)
    fused = fuse(list(p), kappa=kappa)
    exact = np.exp(-kappa * fused.uncertainty.astype(np.float64))
    # u * kappa / ln 2 is rounded to float32 before the power of two is taken.
    np.testing.assert_allclose(fused.weight, exact, rtol=(kappa + 3) * 1e-7, atol=1e-37)
    assert fused.weight.max() <= 1


@given(
    seed=st.integers(0, 2**32 - 1),
    s=st.integers(1, 12),
    channels=st.integers(1, 5),
    unc=st.sampled_from(["var", "ent", "mi"]),
    weight=st.sampled_from(["exp", "linear", "conf"]),
    logits=st.booleans(),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
)
@settings(max_examples=60, deadline=None)
def test_maps_stay_in_their_ranges_and_ignore_order(seed, s, channels, unc, weight, logits, scale):
    rng = np.random.default_rng(seed)
    z = scale * rng.standard_normal((s, 2, channels, 23))
    p = z if logits else (special.expit(z) if channels == 1 else special.softmax(z, axis=2))
    p = p.astype(np.float32)
    r = normalised(rng, s)
    fused = fuse(list(p), r, unc=unc, weight=weight, logits=logits)
    assert fused.mean.min() >= 0
    assert fused.mean.max() <= 1 + s * EPS
    for one in (fused.uncertainty, fused.weight):
        assert one.min() >= 0
        assert one.max() <= 1
    assert fused.confidence.min() >= 1 / max(channels, 2) - s * EPS
    order = rng.permutation(s)
    other = fuse(list(p[order]), r[order], unc=unc, weight=weight, logits=logits)
    np.testing.assert_allclose(other.mean, fused.mean, atol=2 * s * EPS)
    np.testing.assert_allclose(other.uncertainty, fused.uncertainty, atol=8e-6)  # cases.py says why


def test_nan_is_never_hidden(rng):
    p = [q.astype(np.float32) for q in distributions(rng, 5, 1, 3, 40)]
    p[2][0, 1, 7] = np.nan
    for unc in ("var", "ent", "mi"):
        for weight in ("exp", "linear", "gate", "conf"):
            fused = fuse(p, unc=unc, weight=weight, tau_u=0.9)
            for one in (fused.confidence, fused.uncertainty, fused.weight):
                assert np.isnan(one[0, 7])
                assert np.isfinite(np.delete(one[0], 7)).all()
            assert fused.label[0, 7] == 255
    fused = fuse(p, [0.25, 0.25, 0, 0.25, 0.25])  # a source of weight 0 is not read
    assert all(np.isfinite(one).all() for one in fused)
    doubt = fuse(p, [0.25, 0.25, 0, 0.25, 0.25], [0.2] * 5)
    assert np.isnan(doubt.uncertainty[0, 7])
    assert np.isfinite(doubt.mean).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [2, 3])
def test_infinite_logits_are_those_of_softmax(dtype, channels):
    inf = math.inf
    rows = [(0.0, inf), (inf, 0.0), (-inf, 0.0), (0.0, -inf), (-inf, -inf), (inf, inf), (math.nan, 0.0)]
    z = torch.tensor(rows, dtype=dtype).T[None]
    if channels == 3:
        z = torch.cat([z, torch.full((1, 1, len(rows)), -inf, dtype=dtype)], 1)
    torch.testing.assert_close(
        fuse([z], logits=True).mean, z.softmax(1), equal_nan=True, atol=1e-30, rtol=1e-7
    )


# ---- labels, pseudo-labels, passes --------------------------------------------------------------


def test_label_is_ignored_where_unsure():
    p = np.array([[[0.9, 0.65, 0.2, 0.5]]])
    q = np.array([[[0.8, 0.65, 0.9, 0.5]]])
    assert fuse([p, q]).label.tolist() == [[1, 1, 1, 0]]
    assert fuse([p, q], tau_c=0.7).label.tolist() == [[1, 255, 255, 255]]
    assert fuse([p, q], tau_u=0.4).label.tolist() == [[1, 1, 255, 0]]
    assert fuse([p, q], tau_c=0.5, tau_u=1).label.tolist() == [[1, 1, 1, 0]]
    assert fuse([p, q], tau_c=0.7, ignore_index=2).label.dtype == np.uint8


def test_pseudo_label(rng):
    p = [torch.from_numpy(rng.random((2, 1, 6, 7, 8)).astype(np.float32)) for _ in range(3)]
    soft = pseudo_label(p)
    assert tuple(soft.target.shape) == (2, 2, 6, 7, 8)
    torch.testing.assert_close(soft.target.sum(1), torch.ones(2, 6, 7, 8))
    fused = fuse(p, tau_c=0.7, tau_u=0.5)
    assert torch.equal(soft.target[:, 1:], fused.mean)
    hard = pseudo_label(p, target="hard")
    assert torch.equal(hard.target, fused.label)
    assert torch.equal(hard.weight, fused.weight)
    assert torch.equal(hard.uncertainty, fused.uncertainty)
    assert (pseudo_label(p, target="hard", tau_c=None, tau_u=None).target < 2).all()
    assert tuple(pseudo_label(distributions(rng, 2, 1, 3, 9)).target.shape) == (1, 3, 9)


@pytest.mark.parametrize("channels", [2, 4])
def test_mc_uncertainty_is_that_of_ua_mt(rng, channels):
    z = torch.from_numpy(4 * rng.standard_normal((8, 2, channels, 10, 9, 8)))
    preds = z.softmax(2).mean(0)
    entropy = -(preds * torch.log(preds + 1e-6)).sum(1)
    for threshold in (0.3, 0.75, 1.0):
        got = mc_uncertainty(z, threshold)
        torch.testing.assert_close(got.mean, preds, atol=1e-14, rtol=0)
        torch.testing.assert_close(
            got.uncertainty, (entropy / math.log(channels)).clamp(0, 1), atol=1e-13, rtol=0
        )
        assert torch.equal(got.mask, (entropy < threshold * math.log(channels)).double())
    halves = [h for pair in z.reshape(4, 4, channels, 10, 9, 8) for h in pair.chunk(2)]
    only = mc_uncertainty([h.float() for h in halves], want=("mask",))
    assert only.mean is None
    assert only.uncertainty is None
    torch.testing.assert_close(only.mask, mc_uncertainty(z, want=("mask",)).mask.float())


def test_mc_mask_is_strict():
    """A threshold that is hit exactly does not count as sure (H < tau)."""
    for dtype in (np.float32, np.float64):
        p = np.full((1, 1, 5), 0.3, dtype)
        u = float(mc_uncertainty([p], logits=False).uncertainty[0, 0])
        assert not mc_uncertainty([p], u, logits=False).mask.any()
        assert mc_uncertainty([p], float(np.nextafter(dtype(u), dtype(1))), logits=False).mask.all()
    assert not mc_uncertainty([np.zeros((1, 1, 2))], 0.0, logits=False).mask[0, 0] > 1


# ---- reliability, weights, gate, joining --------------------------------------------------------


def test_reliability_runs():
    reliability = Reliability(2)
    for _ in range(3):
        reliability.update(1, 1.0)
    np.testing.assert_allclose(reliability.scores, [0.5, 1 - 0.5 * 0.9**3])
    for args, message in (
        ((2, 0.5), r"Reliability.update\(\): generalist: expected 0 to 1, got 2"),
        ((0, math.nan), r"Reliability.update\(\): dice: expected a number from 0 to 1, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            reliability.update(*args)
    with pytest.raises(ValueError, match=r"Reliability\(\): generalists: expected at least 1, got 0"):
        Reliability(0)
    with pytest.raises(ValueError, match=r"Reliability\(\): momentum: expected a number from 0 to 1, got 2"):
        Reliability(1, momentum=2)


def test_source_weights():
    r_lab, r_unc = source_weights([0.8, 0.05, 0.4], [10, 10, 1])
    expected = np.zeros(22)
    expected[5:10] = 0.64 / 0.8 / 5  # rounds 5..9 of the first; the second is dropped
    expected[20] = 0.16 / 0.8  # the only round of the third counts
    np.testing.assert_allclose(r_lab, expected, atol=1e-15)
    np.testing.assert_allclose(r_unc[:-1], expected[:-1] / 2, atol=1e-15)
    assert r_unc[-1] == 0.5
    alone, same = source_weights([0.8, 0.4], [3, 4], teacher=False)
    assert np.array_equal(alone, same)
    np.testing.assert_allclose(alone, [0, 0, 0.8, 0, 0, 0.1, 0.1], atol=1e-15)
    assert not np.any(source_weights([0.05, 0.0], [4, 4]))


def test_source_weights_of_other_rounds():
    """The published choice: the last round is the label, all rounds are the doubt; per sample, too."""
    r_lab, r_unc = source_weights([0.8, 0.4], [[4, 2], [1, 0]], teacher=False, label="last", doubt="all")
    assert r_lab[:, 0].tolist() == pytest.approx([0, 0, 0, 0.8, 0.2])
    assert r_unc[:, 0].tolist() == pytest.approx([0.2, 0.2, 0.2, 0.2, 0.2])
    assert r_lab[:, 1].tolist() == [0, 1, 0, 0, 0]
    assert r_unc[:, 1].tolist() == [0.5, 0.5, 0, 0, 0]
    _, doubt = source_weights([0.5], [4], label="all", doubt="late", b=0.2)
    assert doubt.tolist() == pytest.approx([0, 0, 0.4, 0.4, 0.2])
    late = source_weights([0.5, 0.7], [5, 3])
    assert np.array_equal(late, source_weights([0.5, 0.7], [5, 3], label="late", doubt="late"))
    with pytest.raises(ValueError, match="label: expected one of late, last, all, got 'first'"):
        source_weights([0.5], [4], label="first")


def test_source_weights_per_sample_feed_fuse(rng):
    # The second sample has fewer rounds, the third none at all.
    r_lab, r_unc = source_weights(Reliability(1), [[4, 2, 0]])
    np.testing.assert_allclose(r_lab.T, [[0, 0, 0.5, 0.5, 0], [0, 1, 0, 0, 0], [0] * 5])
    np.testing.assert_allclose(r_unc.T, [[0, 0, 0.25, 0.25, 0.5], [0, 0.5, 0, 0, 0.5], [0] * 5])
    p = distributions(rng, 5, 3, 2, 11)
    fused = fuse(p, r_lab, r_unc)
    np.testing.assert_allclose(fused.mean[0], (p[2][0] + p[3][0]) / 2)
    assert np.array_equal(fused.mean[1], p[1][1])
    assert not fused.weight[2].any()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (([0.5, 1.5], [1, 1]), r"source_weights\(\): reliability: expected one number in 0\.\.1"),
        (([], []), r"source_weights\(\): reliability: expected one number in 0\.\.1"),
        (([0.5], [1, 2]), r"source_weights\(\): rounds: expected an integer"),
        (([0.5], [1.5]), r"source_weights\(\): rounds: expected an integer"),
        (([0.5], [-1]), r"source_weights\(\): rounds: expected at least 0"),
        (([0.5], [1], True, 1.5), r"source_weights\(\): b: expected a number from 0 to 1, got 1\.5"),
    ],
)
def test_source_weights_refuse(args, message):
    with pytest.raises(ValueError, match=message):
        source_weights(*args)


def test_agreement_is_dice_per_class(hippocampus_cases):
    monai = pytest.importorskip("monai.metrics")
    for _, label, _ in hippocampus_cases[:4]:
        moved = np.roll(label, 2, axis=0)
        hot = [
            torch.nn.functional.one_hot(torch.from_numpy(a).long(), 3).movedim(-1, 0)[None]
            for a in (label, moved)
        ]
        expected = float(monai.compute_dice(hot[0], hot[1], include_background=False).mean())
        assert agreement(label[None], moved[None], 3)[0] == pytest.approx(expected, abs=1e-6)
        assert float(agreement(torch.from_numpy(label)[None], hot[1][:, 1:], 3)[0]) == pytest.approx(
            expected, abs=1e-6
        )


def test_agreement_of_special_cases():
    zero, one = np.zeros((1, 4), np.uint8), np.ones((1, 4), np.uint8)
    assert agreement(zero, zero, 2).tolist() == [1.0]
    assert agreement(zero, one, 2).tolist() == [0.0]
    assert agreement(np.array([[255, 1, 1, 0]]), np.array([[1, 1, 0, 0]]), 2)[0] == pytest.approx(2 / 3)
    assert agreement(torch.ones(2, 4), torch.ones(2, 4), 2).dtype == torch.float64
    with pytest.raises(ValueError, match=r"agreement\(\): target: expected the label's shape \(1, 4\)"):
        agreement(zero, np.zeros((1, 5)), 2)
    with pytest.raises(TypeError, match="expected two NumPy arrays or two torch tensors"):
        agreement(zero, torch.zeros(1, 4), 2)


def test_joined_classes(rng):
    z = [rng.standard_normal((2, 1, 5, 6)) for _ in range(3)]
    joined = join_classes(z)
    expected = special.softmax(np.concatenate([np.zeros((2, 1, 5, 6)), *z], 1), axis=1)
    np.testing.assert_allclose(fuse([joined], logits=True).mean, expected, atol=1e-14)
    single = fuse([join_classes(z[:1])], logits=True).mean
    np.testing.assert_allclose(single[:, 1:], special.expit(z[0]), atol=1e-15)
    t = join_classes([None, torch.from_numpy(z[0])])
    assert isinstance(t, torch.Tensor)
    assert (t[:, 1] == -10).all()
    with pytest.raises(ValueError, match="expected at least one array, got none"):
        join_classes([None])
    with pytest.raises(ValueError, match="expected arrays of one shape"):
        join_classes([z[0], z[0][:1]])
    with pytest.raises(TypeError, match="all NumPy arrays or all torch tensors"):
        join_classes([z[0], torch.from_numpy(z[0])])


# ---- torch --------------------------------------------------------------------------------------


def test_nothing_carries_a_gradient_or_shares_memory(rng):
    p = torch.from_numpy(rng.random((1, 1, 2000))).float().requires_grad_()
    fused = fuse([p], weight="none")
    assert not any(t.requires_grad for t in fused)
    assert fused.mean.data_ptr() != p.data_ptr()
    with torch.inference_mode():
        assert torch.equal(fuse([p]).mean, fused.mean)


def test_metatensor_channels_last_and_half(rng):
    monai_data = pytest.importorskip("monai.data")
    p = [torch.from_numpy(q).float() for q in distributions(rng, 3, 2, 2, 6, 7, 8)]
    want = fuse(p)
    for other in (
        [monai_data.MetaTensor(q) for q in p],
        [q.to(memory_format=torch.channels_last_3d) for q in p],
    ):
        got = fuse(other)
        assert all(type(t) is torch.Tensor for t in got)
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    mixed = fuse([p[0].half(), p[1].bfloat16(), p[2]])
    assert mixed.mean.dtype == torch.float32
    torch.testing.assert_close(mixed.mean, want.mean, atol=4e-3, rtol=0)  # half an ulp of bfloat16 at 1


def test_compiles_without_a_break(rng):
    p = [torch.from_numpy(q).float() for q in distributions(rng, 3, 2, 2, 40)]

    def step(a, b, c):
        fused = fuse([a, b, c], [0.5, 0.25, 0.25], unc="mi")
        return fused.mean * fused.weight[:, None]

    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(*p), step(*p))


# ---- bad input ----------------------------------------------------------------------------------

P = np.full((2, 1, 4), 0.5, np.float32)
BAD = [
    (([],), {}, ValueError, r"fuse\(\): sources: expected 1 to 128 arrays, got 0"),
    (([P] * 129,), {}, ValueError, r"fuse\(\): sources: expected 1 to 128 arrays, got 129"),
    (("ab",), {}, TypeError, r"fuse\(\): sources: expected a list of arrays .*, got str"),
    (([P, 3],), {}, TypeError, r"fuse\(\): sources\[1\]: expected an array, got int"),
    (([P, P[:1]],), {}, ValueError, r"fuse\(\): sources\[1\]: expected shape \(2, 1, 4\), got \(1, 1, 4\)"),
    (([P[0]],), {}, ValueError, r"fuse\(\): sources\[0\]: expected shape \(B, C, \*spatial\), got \(1, 4\)"),
    (
        ([P[:0]],),
        {},
        ValueError,
        r"fuse\(\): sources\[0\]: expected at least one element, got shape \(0, 1, 4\)",
    ),
    (
        ([P.astype(int)],),
        {},
        TypeError,
        r"fuse\(\): sources\[0\]: expected dtype f16, bf16, f32, f64, got i64",
    ),
    (([P, P.astype(float)],), {}, TypeError, r"fuse\(\): sources: expected float64 for all or for none"),
    (
        ([P, torch.from_numpy(P)],),
        {},
        TypeError,
        r"fuse\(\): expected all arrays to be NumPy arrays or all torch",
    ),
    (([P, P], [1.0]), {}, ValueError, r"fuse\(\): weights: expected one number per source \(2\)"),
    (([P, P], [[0.5, 0.5], [0.5]]), {}, ValueError, r"fuse\(\): weights: .* table of 2 sources x 2 samples"),
    (
        ([P, P], [0.5, 0.6]),
        {},
        ValueError,
        r"fuse\(\): weights: expected weights that sum to 1 \(divide them by",
    ),
    (([P, P], [1.5, -0.5]), {}, ValueError, r"fuse\(\): weights: expected weights from 0 to 1, got -0.5"),
    (([P, P], [0.5, math.nan]), {}, ValueError, r"fuse\(\): weights: expected weights from 0 to 1, got nan"),
    (([P, P], [0.5, math.inf]), {}, ValueError, r"fuse\(\): weights: expected weights from 0 to 1, got inf"),
    (
        ([P, P], [0, 0]),
        {},
        ValueError,
        r"fuse\(\): uncertainty_weights|weights: expected at least one weight above 0",
    ),
    (
        ([P, P], np.zeros((2, 2))),
        {},
        ValueError,
        r"fuse\(\): weights: expected at least one weight above 0, got none",
    ),
    (
        ([torch.from_numpy(P)] * 2, torch.full((2, 2), -1.0)),
        {},
        ValueError,
        r"fuse\(\): weights: expected weights from 0 to 1, got -1 for source 0",
    ),
    (
        ([P, P], None, [0.5, 0.7]),
        {},
        ValueError,
        r"fuse\(\): uncertainty_weights: expected weights that sum to 1",
    ),
    (
        ([P, P], None, [[0, 1], [0, 0]]),
        {},
        ValueError,
        r"fuse\(\): uncertainty_weights: expected all 0 exactly where",
    ),
    (([P],), {"unc": "std"}, ValueError, r"fuse\(\): unc: expected one of var, ent, mi, got 'std'"),
    (
        ([P],),
        {"weight": "log"},
        ValueError,
        r"fuse\(\): weight: expected one of exp, linear, gate, conf, none",
    ),
    (
        ([P],),
        {"weight": "gate"},
        ValueError,
        r"fuse\(\): tau_u: expected a threshold in 0..1 for weight='gate'",
    ),
    (([P],), {"kappa": -1}, ValueError, r"fuse\(\): kappa: expected a number from 0 to 1e\+06, got -1"),
    (([P],), {"kappa": math.nan}, ValueError, r"fuse\(\): kappa: expected a number of at least 0, got nan"),
    (([P],), {"tau_c": 1.5}, ValueError, r"fuse\(\): tau_c: expected a number from 0 to 1, got 1.5"),
    (([P],), {"tau_u": math.nan}, ValueError, r"fuse\(\): tau_u: expected a number from 0 to 1, got -?nan"),
    (
        ([P],),
        {"ignore_index": -100},
        ValueError,
        r"fuse\(\): ignore_index: expected an integer from 0 to 255",
    ),
    (
        ([P],),
        {"ignore_index": 1},
        ValueError,
        r"fuse\(\): ignore_index: expected a number from 2 to 255, got 1",
    ),
    (
        ([P.repeat(2, 1)],),
        {"two_channels": True},
        ValueError,
        r"fuse\(\): two_channels: expected one-channel",
    ),
    (([P],), {"want": ()}, ValueError, r"fuse\(\): want: expected at least one of mean, label"),
    (([P],), {"want": ("map",)}, ValueError, r"fuse\(\): want: expected one of mean, label, .*, got 'map'"),
]


@pytest.mark.parametrize(("args", "kwargs", "error", "message"), BAD)
def test_bad_input(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        fuse(*args, **kwargs)


def test_bad_input_elsewhere():
    with pytest.raises(ValueError, match=r"pseudo_label\(\): target: expected one of soft, hard, got 'both'"):
        pseudo_label([P], target="both")
    with pytest.raises(ValueError, match=r"pseudo_label\(\): tau_u: expected a threshold"):
        pseudo_label([P], weight="gate", tau_u=None)
    with pytest.raises(
        ValueError, match=r"mc_uncertainty\(\): threshold: expected a number from 0 to 1, got 1\.2"
    ):
        mc_uncertainty([P], 1.2)
    with pytest.raises(ValueError, match=r"mc_uncertainty\(\): passes: expected 1 to 128 arrays, got 0"):
        mc_uncertainty([])
    with pytest.raises(
        ValueError, match=r"mc_uncertainty\(\): want: expected one of mean, uncertainty, mask"
    ):
        mc_uncertainty([P], want=("weight",))


# ---- real labels --------------------------------------------------------------------------------


def test_many_noisy_readers_of_a_left_atrium(la_case, rng):
    """Shifted copies of a real label: the fused one is better than any, doubt sits on the surface."""
    label = la_case[1].astype(bool)
    readers = []
    for _ in range(9):
        shift = rng.integers(-3, 4, 3)
        soft = ndimage.gaussian_filter(np.roll(label, shift, (0, 1, 2)).astype(np.float32), 1)
        readers.append(torch.from_numpy(soft)[None, None])
    fused = fuse(readers, unc="mi", tau_u=0.1)
    target = torch.from_numpy(label.astype(np.uint8))[None]
    scores = [float(agreement((r[:, 0] > 0.5).to(torch.uint8), target, 2)[0]) for r in readers]
    plain = fuse(readers, want=("label",)).label
    assert float(agreement(plain, target, 2)[0]) > max(np.mean(scores), 0.9)
    assert float(agreement(fused.label, target, 2)[0]) > float(agreement(plain, target, 2)[0])
    depth = ndimage.distance_transform_edt(label) + ndimage.distance_transform_edt(~label)
    u = fused.uncertainty[0].numpy()
    assert u[depth <= 2].mean() > 20 * u[depth > 8].mean()
    assert (fused.weight[0].numpy()[depth > 12] == 1).mean() > 0.99


def test_slices_of_four_classes(acdc_volumes):
    """2-D, four classes: agreeing one-hot readers give the label back, with full confidence."""
    label = acdc_volumes[0][1][:3].astype(np.int64)
    hot = np.eye(4, dtype=np.float32)[label].transpose(0, 3, 1, 2)
    fused = fuse([hot, np.ascontiguousarray(hot.transpose(0, 1, 3, 2)).transpose(0, 1, 3, 2), hot], unc="mi")
    assert np.array_equal(fused.label, label)
    assert (fused.confidence == 1).all()
    assert (fused.weight == 1).all()


def test_examples_in_the_docstrings():
    assert doctest.testmod(fusion).failed == 0
