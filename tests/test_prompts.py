# SPDX-License-Identifier: Apache-2.0
"""Prompts: targets, clicks, points, boxes, mask prompts, and the batch that carries them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import data_dir
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage, stats

from semisam import prompts, reference
from semisam.prompts import (
    PromptBatch,
    boxes,
    next_click,
    sample_points,
    specialist_targets,
    targets_and_spread,
)

# Random123's known answers for Philox4x32-10: key, counter, first two words.
KNOWN = [
    (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D)),
    (2**64 - 1, (2**32 - 1,) * 4, (0x408F276D, 0x41C83B0E)),
    (
        0x299F31D0_A4093822,
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB),
    ),
]


def click(target, current=None, region=None, **options):
    """One sample and one class: (index, label) as Python numbers."""
    wrap = [None if m is None else m[None, None] for m in (target, current, region)]
    options = {"seed": 0, "iteration": 0, "sample_ids": [0], "round": 0, **options}
    point, label = next_click(*wrap, **options)
    return tuple(point[0, 0].tolist()), int(label[0, 0])


def ball(shape, center, radius):
    grid = np.ogrid[tuple(slice(n) for n in shape)]
    return sum((g - c) ** 2 for g, c in zip(grid, center, strict=True)) <= radius**2


# ---- random numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "counter", "words"), KNOWN)
def test_philox_known_answers(key, counter, words):
    r = words[0] | words[1] << 32
    assert reference.philox64(key, list(counter)) == r
    # The kernel shows the leading bits of r: which of 2^22 equal candidates is picked.
    target = np.ones((1, 1, 2, 2**21), bool)
    signed = key - 2**64 if key >= 2**63 else key
    args = (target, None, None, None, np.array([counter], np.int64), signed, 0, 3)
    point, _ = prompts.ops.call("next_click", *args)
    assert point[0, 1] * 2**21 + point[0, 2] == r >> 42


def test_random_clicks_are_uniform():
    # 40 candidates, 8000 sample ids: chi-square below its 99.9 % point, with a fixed seed.
    one = np.zeros((9, 9), bool)
    one[2:7, :8] = True
    n = 8000
    target = np.broadcast_to(one, (n, 1, 9, 9))
    point, label = next_click(target, seed=11, iteration=5, sample_ids=range(n), round=2)
    hits = np.zeros((9, 9), int)
    np.add.at(hits, tuple(point[:, 0].T), 1)
    assert (label == 1).all()
    assert hits[~one].sum() == 0
    assert stats.chisquare(hits[one]).pvalue > 1e-3


def test_sampled_points_are_uniform_subsets():
    # Floyd's subsets of 3 out of 7: all 35 are equally likely.
    prob = np.zeros((7000, 2, 1, 12), np.float32)
    prob[:, 0, :, :5], prob[:, 1, :, 5:] = 1, 1
    batch = sample_points(prob, 3, seed=3, iteration=1, sample_ids=range(7000))
    columns = batch.points[:, 1, :3, 1]
    assert (np.diff(columns, axis=1) > 0).all()
    _, counts = np.unique(columns, axis=0, return_counts=True)
    assert len(counts) == 35
    assert stats.chisquare(counts).pvalue > 1e-3


def test_words_of_the_counter_matter_one_by_one():
    target = np.ones((1, 1, 64, 64), bool)
    base = {"seed": 1, "iteration": 1, "sample_ids": [1], "round": 2, "rule": "random"}
    points = [next_click(target, **base)[0]]
    for change in ({"seed": 2}, {"iteration": 2}, {"sample_ids": [2]}, {"round": 3}, {"classes": [2]}):
        points.append(next_click(target, **{**base, **change})[0])
    assert len({tuple(p.ravel()) for p in points}) == 6
    assert prompts.click_counter(
        iteration=9, sample_ids=[4, 8], round=1, clicks=6, classes=[1, 3]
    ).tolist() == [[9, 4, 7, 0], [9, 4, 19, 0], [9, 8, 7, 0], [9, 8, 19, 0]]


# ---- clicks -------------------------------------------------------------------------------------


def test_all_true_cube_has_the_inner_cube_as_candidates():
    target = np.ones((1, 1, 128, 128, 128), bool)
    d = reference.inner_distance2(torch.ones(8, 8, 8, dtype=torch.bool), 3)
    assert int(d.max()) == 16  # the same by brute force at side 8: largest distance 4
    for seed in (0, 1, 2**64 - 1, -5):
        point, label = next_click(target, seed=seed, iteration=3, sample_ids=[7], round=1)
        r = reference.philox64(seed, [3, 7, 1 * 10 + 1, 0])
        inner = np.unravel_index(64**3 * r >> 64, (64, 64, 64))
        assert point[0, 0].tolist() == [32 + int(i) for i in inner]
        assert label.tolist() == [[1]]


def test_every_candidate_of_the_cube_can_be_drawn():
    # Side 8: distances 1..4, so candidates have d > 2: the cube 2..5, all of whose 64 voxels come.
    n = 2000
    target = np.ones((n, 1, 8, 8, 8), bool)
    point, label = next_click(target, seed=0, iteration=0, sample_ids=range(n), round=0)
    assert (label == 1).all()
    assert len(np.unique(point[:, 0], axis=0)) == 64
    assert point.min() == 2
    assert point.max() == 5


@pytest.mark.parametrize("rule", ["ritm", "random"])
def test_first_click_on_convex_objects_is_inside_and_independent_of_the_batch(rule, rng):
    shapes = [ball((20, 24, 18), (9, 12, 8), r) for r in (1, 3, 7.5)]
    shapes.append(ball((20, 24, 18), (2, 2, 2), 4))  # cut by the patch
    box = np.zeros((20, 24, 18), bool)
    box[3:5, 2:20, 7:16] = True
    shapes.append(box)
    for seed in range(20):
        common = {"seed": seed, "iteration": seed * 3, "round": 0, "rule": rule}
        alone = {i: next_click(m[None, None], sample_ids=[100 + i], **common) for i, m in enumerate(shapes)}
        order = rng.permutation(len(shapes))
        masks = np.stack([shapes[i] for i in order])[:, None]
        points, labels = next_click(masks, sample_ids=[100 + int(i) for i in order], **common)
        assert (labels == 1).all()
        for position, i in enumerate(order):
            assert shapes[i][tuple(points[position, 0])]
            assert np.array_equal(points[position], alone[i][0][0])


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(bool, st.tuples(*[st.integers(1, 7)] * 3)),
    st.integers(0, 2**32 - 1),
    st.integers(0, 3),
)
def test_ritm_rule_against_scipy(target, seed, shift):
    current = np.roll(target, shift, 2) ^ (np.arange(target.size).reshape(target.shape) % 5 == 0)
    fn, fp = target & ~current, ~target & current
    distance = [ndimage.distance_transform_edt(np.pad(e, 1))[1:-1, 1:-1, 1:-1] for e in (fn, fp)]
    point, label = click(target, current, seed=seed)
    if not (fn | fp).any():
        assert label == -1
        assert point == (0, 0, 0)
        return
    positive = distance[0].max() > distance[1].max()
    d = distance[0] if positive else distance[1]
    assert label == positive
    # SciPy's square roots decide 4 d^2 > m^2 up to rounding; squares of small distances are exact.
    assert 4 * round(d[point] ** 2) > round(d.max() ** 2)


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 40))), st.integers(0, 99))
def test_random_rule_in_2d(target, seed):
    current = np.roll(target, 1, 0) & (np.arange(target.shape[1]) % 3 > 0)
    point, label = click(target, current, seed=seed, rule="random")
    errors = target ^ current
    if not errors.any():
        assert label == -1
        return
    assert errors[point]
    assert label == (target & ~current)[point]
    candidates = np.argwhere(errors)
    r = reference.philox64(seed, [0, 0, 10, 0])
    assert tuple(candidates[len(candidates) * r >> 64]) == point


@pytest.mark.parametrize("shape", [(9, 11, 63), (8, 9, 64), (12, 7, 65), (7, 8, 150), (21, 130), (15, 64)])
def test_ritm_in_thin_and_deep_regions(shape, rng):
    """Rims and specks are measured by bits, what is deeper than 3 voxels by distances: all exactly."""
    depths = set()
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"))
    for seed in range(80):
        at = np.stack([rng.integers(n) for n in shape]).reshape(-1, *(1,) * len(shape))
        solid = ((grid - at) ** 2).sum(0) <= rng.integers(0, 22)
        target = solid ^ (rng.random(shape) < rng.choice([0.0, 0.001, 0.03, 0.4, 0.97]))
        current = rng.random(shape) < rng.choice([0.0, 0.01, 0.3])
        errors = target & ~current, ~target & current
        if not (errors[0] | errors[1]).any():
            continue
        fn, fp = (np.rint(ndimage.distance_transform_edt(np.pad(e, 1)) ** 2).astype(int) for e in errors)
        d2 = (fn if fn.max() > fp.max() else fp)[(slice(1, -1),) * len(shape)]
        depths.add(min(d2.max(), 10))
        candidates = np.argwhere(4 * d2 > d2.max())
        chosen = candidates[len(candidates) * reference.philox64(seed, [0, 0, 10, 0]) >> 64]
        assert click(target, current, seed=seed) == (tuple(chosen), int(fn.max() > fp.max()))
    assert len(depths) >= 6


def test_ritm_means_the_largest_inscribed_ball_not_the_largest_volume():
    target, current = np.zeros((2, 40, 40), bool)
    target[5:7, :] = True  # 80 voxels, 2 thick
    current[20:27, 20:27] = True  # 49 voxels, 7 thick
    point, label = click(target, current)
    assert label == 0
    assert current[point]


def test_a_wide_region_with_a_smaller_ball_does_not_win():
    # FN: a full 3^3 cube, d2 = 4 in the middle. FP: in a larger box, the same cube without a corner, d2 = 3.
    target, current = np.zeros((2, 30, 30, 30), bool)
    target[1:4, 1:4, 1:4] = True
    current[10:13, 10:13, 10:13] = True
    current[12, 12, 12] = False
    current[17, 17, 17] = True
    assert click(target, current) == ((2, 2, 2), 1)


def test_equal_balls_give_a_negative_click():
    target, current = np.zeros((2, 9, 20), bool)
    target[2:5, 2:5] = True
    current[2:5, 12:15] = True
    assert click(target, current) == ((3, 13), 0)


def test_flat_volume_is_not_an_image():
    # In a volume of one slice every voxel touches the outside: all are candidates. An image has none.
    target = np.zeros((1, 1, 1, 21, 21), bool)
    target[..., 3:18, 3:18] = True
    rows = {"seed": 0, "iteration": 0, "round": 0}
    n = 300
    volume, _ = next_click(np.repeat(target, n, 0), sample_ids=range(n), **rows)
    image, _ = next_click(np.repeat(target[:, :, 0], n, 0), sample_ids=range(n), **rows)
    assert volume[..., 1:].min() == 3
    assert image.min() == 7  # distances 1..8, candidates > 4: pixels 4 away from the border at 3
    assert image.max() == 13


def test_region_restricts_and_is_dropped_when_it_holds_no_error():
    target, region = np.zeros((2, 16, 16), bool)
    target[2:14, 2:14] = True
    region[3, 4] = True
    for rule in ("ritm", "random"):
        assert click(target, None, region, rule=rule) == ((3, 4), 1)
        region_elsewhere = np.zeros_like(region)
        region_elsewhere[0, 0] = True
        assert click(target, None, region_elsewhere, rule=rule) == click(target, rule=rule)
        assert click(target, target, region, rule=rule) == ((0, 0), -1)
        assert click(np.zeros_like(target), rule=rule) == ((0, 0), -1)


def test_skipped_rows_get_no_click():
    target = np.ones((2, 3, 8, 8), bool)
    skip = np.array([[True, False, False], [False, True, False]])
    point, label = next_click(target, skip=skip, seed=0, iteration=0, sample_ids=[0, 1], round=0)
    assert np.array_equal(label == -1, skip)
    assert (point[skip] == 0).all()


def test_any_nonzero_byte_is_true():
    target = np.zeros((6, 6), np.uint8)
    target[1:5, 1:5] = 255
    current = (target > 0).astype(np.uint8) * 7
    current[2, 3] = 0
    assert click(target, current) == ((2, 3), 1)


def test_torch_and_numpy_agree_and_subclasses_are_stripped(rng):
    monai = pytest.importorskip("monai")
    target = rng.random((2, 3, 5, 9, 11)) > 0.6
    current = rng.random(target.shape) > 0.6
    options = {"seed": 9, "iteration": 8, "sample_ids": [5, 6], "round": 1}
    point, label = next_click(target, current, **options)
    for kind in (torch.from_numpy, lambda a: monai.data.MetaTensor(torch.from_numpy(a))):
        p, lab = next_click(kind(target), kind(current), **options)
        assert isinstance(p, torch.Tensor)
        assert np.array_equal(p.numpy(), point)
        assert np.array_equal(lab.numpy(), label)


def test_one_correction_after_the_other_reaches_the_target():
    """A user who repaints a disc at each click ends with the target, then gets no click."""
    target = ball((40, 40), (18, 22), 9)
    current = ball((40, 40), (24, 18), 6)
    for k in range(200):
        point, label = click(target, current, round=k, clicks=200, rule="ritm" if k % 2 else "random")
        if label == -1:
            break
        assert bool(target[point]) == (label == 1)
        assert bool(current[point]) == (label == 0)
        disc = ball((40, 40), point, 3)
        current = np.where(disc, target, current)
    assert np.array_equal(target, current)


def test_first_clicks_lie_inside_the_atrium(la_case):
    atrium = la_case[1] > 0
    depth = ndimage.distance_transform_edt(np.pad(atrium, 1))[1:-1, 1:-1, 1:-1]
    for seed in range(5):
        point, label = click(atrium, seed=seed)
        assert label == 1
        assert depth[point] > depth.max() / 2
        point, label = click(atrium, seed=seed, rule="random")
        assert label == 1
        assert atrium[point]
    moved = np.roll(atrium, (6, -9, 2), (0, 1, 2))
    fn, fp = atrium & ~moved, moved & ~atrium
    distance = [ndimage.distance_transform_edt(np.pad(e, 1))[1:-1, 1:-1, 1:-1] for e in (fn, fp)]
    point, label = click(atrium, moved)
    assert label == (distance[0].max() > distance[1].max())
    d = distance[1 - label]
    assert 4 * round(d[point] ** 2) > round(d.max() ** 2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"target": np.zeros((1, 1, 8, 8), np.float32)},
            TypeError,
            r"target: expected dtype bool, u8, got f32",
        ),
        (
            {"target": np.zeros((8, 8), bool)},
            ValueError,
            r"target: expected \[B, F, H, W\] or .* shape \(8, 8\)",
        ),
        ({"target": [[True]]}, TypeError, "target: expected a NumPy array or torch tensor, got list"),
        (
            {"current": np.zeros((1, 1, 8, 9), bool)},
            ValueError,
            r"current: expected target's shape \(1, 1, 8, 8\)",
        ),
        ({"region": np.zeros((1, 8, 8), bool)}, ValueError, r"region: expected target's shape"),
        ({"skip": np.zeros((1, 2), bool)}, ValueError, r"skip: expected shape \(1, 1\), got \(1, 2\)"),
        ({"sample_ids": [1, 2]}, ValueError, r"sample_ids: expected one per sample \(1\), got 2"),
        ({"classes": [1, 2]}, ValueError, r"classes: expected one number per class \(1\), got 2"),
        ({"sample_ids": [-1]}, ValueError, r"sample_ids: expected numbers of 32 bits .* got -1"),
        ({"iteration": 2**32}, ValueError, r"iteration: expected numbers of 32 bits"),
        ({"seed": 2**64}, ValueError, r"next_click\(\): seed: expected a number of 64 bits"),
        ({"round": 10}, ValueError, r"round: expected 0 to clicks - 1 = 9, got 10"),
        ({"rule": "middle"}, ValueError, r"rule: expected 'ritm' or 'random', got 'middle'"),
        (
            {"target": np.zeros((0, 1, 8, 8), bool), "sample_ids": []},
            ValueError,
            r"expected at least one element",
        ),
    ],
)
def test_bad_clicks(change, error, message):
    options = {
        "target": np.ones((1, 1, 8, 8), bool),
        "seed": 0,
        "iteration": 0,
        "sample_ids": [0],
        "round": 0,
        **change,
    }
    with pytest.raises(error, match=message):
        next_click(**options)


def test_errors_too_wide_for_exact_distances_are_refused():
    target = np.ones((1, 1, 1, 20000), bool)
    with pytest.raises(
        ValueError, match=r"next_click\(\): target: expected errors within 16384 voxels, got 20000"
    ):
        next_click(target, seed=0, iteration=0, sample_ids=[0], round=0)


# ---- targets ------------------------------------------------------------------------------------


def _binary(values):
    p = np.array(values, np.float64)[None, None, None]
    return np.concatenate([1 - p, p], 1)


def test_threshold_rule_by_hand():
    target, region, skip = specialist_targets(_binary([0.1, 0.49, 0.5, 0.99]))
    assert target.tolist() == [[[[False, False, True, True]]]]
    assert region.tolist() == [[[[True, False, False, True]]]]
    assert skip.tolist() == [[False]]
    # Nothing reaches one half: half the maximum, and clicks may go anywhere.
    target, region, skip = specialist_targets(_binary([0.1, 0.19, 0.2, 0.4]))
    assert target.tolist() == [[[[False, False, True, True]]]]
    assert region.all()
    assert not skip.any()
    # Too weak to ask for: both masks empty.
    target, region, skip = specialist_targets(_binary([0.1, 0.15, 0.19, 0.0]))
    assert skip.tolist() == [[True]]
    assert not target.any()
    assert not region.any()


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_only_the_largest_component_if_asked(kind):
    p = np.zeros((2, 3, 12, 12), np.float32)
    p[0, 1, 1:4, 1:4] = p[0, 1, 4, 4] = p[0, 1, 8:10, 8:11] = 0.9  # 3 x 3 with a corner; 2 x 3
    p[1, 2, 0, 0] = 0.3
    p[:, 0] = 1 - p[:, 1:].sum(1)
    target, _, skip = specialist_targets(kind(p), largest_component=True)
    assert int(target[0, 0].sum()) == 10
    assert bool(target[0, 0, 4, 4])
    assert int(target[1, 1].sum()) == 1
    assert skip.tolist() == [[False, True], [True, False]]
    assert int(specialist_targets(kind(p)).target[0, 0].sum()) == 16


def test_confident_region_of_two_classes_is_outside_011_089():
    p = np.linspace(0, 1, 1001)
    region = specialist_targets(_binary(p), tau_p=0.5).region[0, 0, 0]
    inside = p[~region]
    # H(0.1100) = ln 2 / 2: of thousandths, 0.111 to 0.889 are uncertain.
    assert inside.min() == pytest.approx(0.111)
    assert inside.max() == pytest.approx(0.889)
    assert len(inside) == 779
    assert specialist_targets(_binary(p), tau_p=1.0).region.all()


def test_targets_have_no_gradient_and_follow_each_class_alone(rng):
    logits = torch.from_numpy(rng.standard_normal((2, 4, 6, 7, 8))).requires_grad_()
    prob = logits.softmax(1)
    target, region, skip = specialist_targets(prob)
    assert not target.requires_grad
    assert target.dtype == region.dtype == skip.dtype == torch.bool
    assert tuple(target.shape) == (2, 3, 6, 7, 8)
    assert tuple(skip.shape) == (2, 3)
    assert torch.equal(target[:, 0], prob[:, 1] >= 0.5)


def test_nan_is_in_no_mask():
    p = _binary([np.nan, 0.9, 0.1])
    target, region, skip = specialist_targets(p)
    assert target.tolist() == [[[[False, True, False]]]]
    assert region.tolist() == [[[[False, True, True]]]]
    assert not skip.any()
    assert specialist_targets(_binary([np.nan] * 3)).skip.all()


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_answer_mask_sees_what_says_nothing(rng, kind):
    """Row by row: NaN anywhere, infinities, one number everywhere; zeros of both signs are one number."""
    z = rng.standard_normal((6, 1, 5, 30, 41)).astype(np.float32)
    z[1, 0, 4, 29, 40] = np.nan
    z[2, 0, 0, 0, 0], z[2, 0, 0, 0, 1] = -np.inf, np.inf
    z[3] = -1.5
    z[4], z[4, ..., ::2] = 0.0, -0.0
    z[5] = np.nan
    mask, span = prompts.answer_mask(kind(z))
    assert np.array_equal(np.asarray(mask), z > 0)
    rows = z.reshape(6, 1, -1)
    np.testing.assert_array_equal(np.asarray(span), np.stack([rows.min(2), rows.max(2)], 2))
    assert not np.signbit(np.asarray(span)[4]).any()
    with pytest.raises(ValueError, match=r"answer_mask\(\): logits: expected \[B, F, H, W\]"):
        prompts.answer_mask(kind(z[0, 0]))
    with pytest.raises(TypeError, match="answer_mask"):
        prompts.answer_mask(kind((z > 0).astype(np.uint8)))


@pytest.mark.parametrize("classes", [2, 3, 4, 7])
@pytest.mark.parametrize("tau_p", [0.5, 1.0])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_spread_tells_what_is_no_distribution(rng, classes, tau_p, kind):
    """Per sample: rounding for a softmax, how far a sum is off, how far a value is below 0, NaN for NaN."""
    z = np.exp(rng.standard_normal((4, classes, 5, 9, 40)))
    p = (z / z.sum(1, keepdims=True)).astype(np.float32)
    p[1, :, 4, 8, 39] *= 1.5
    p[2, :2, 0, 0, 0] = -0.25, p[2, :2, 0, 0, 0].sum() + 0.25
    p[3, 1, 2, 3, 4] = np.nan
    settings = {"threshold": 0.5, "p_min": 0.2, "tau_p": tau_p, "largest_component": False}
    (_, region, _), spread = targets_and_spread(kind(p), **settings)
    off, below = np.asarray(spread).T
    np.testing.assert_allclose(off[:3], [0, 0.5, 0], atol=1e-6)
    np.testing.assert_allclose(below, [0, 0, 0.25, 0], atol=0)
    assert np.isnan(off[3])
    assert bool(np.asarray(region)[2, 0, 0, 0, 0]) == (tau_p >= 1)


@pytest.mark.parametrize(
    ("prob", "options", "error", "message"),
    [
        (np.zeros((1, 1, 4, 4)), {}, ValueError, "prob: expected at least 2 classes"),
        (np.zeros((2, 4, 4)), {}, ValueError, r"prob: expected \[B, C, H, W\] or \[B, C, D, H, W\]"),
        (np.zeros((1, 2, 4, 4), int), {}, TypeError, "prob: expected dtype f16, bf16, f32, f64, got i64"),
        (
            np.zeros((1, 2, 4, 4)),
            {"threshold": 1.5},
            ValueError,
            "threshold: expected a number from 0 to 1, got 1.5",
        ),
        (np.zeros((1, 2, 4, 4)), {"tau_p": float("nan")}, ValueError, "tau_p: expected a number"),
        (np.zeros((1, 2, 4, 4)), {"p_min": -1}, ValueError, "p_min: expected a number from 0 to 1, got -1"),
        (np.zeros((1, 2, 4, 0)), {}, ValueError, "prob: expected at least one element"),
    ],
)
def test_bad_targets(prob, options, error, message):
    with pytest.raises(error, match=message):
        specialist_targets(prob, **options)


def test_clicks_from_a_specialist_find_the_real_atrium(la_case):
    """Prompts from a blurred prediction: no label is looked at, yet the first click is in the atrium."""
    atrium = la_case[1] > 0
    p = ndimage.gaussian_filter(atrium.astype(np.float32), 2.0)
    target, region, skip = specialist_targets(np.stack([1 - p, p])[None])
    assert not skip.any()
    point, label = next_click(target, None, region, skip=skip, seed=4, iteration=0, sample_ids=[0], round=0)
    assert label.tolist() == [[1]]
    assert atrium[tuple(point[0, 0])]


# ---- sampled points -----------------------------------------------------------------------------


def test_points_are_distinct_confident_and_in_their_region(rng):
    logits = 3 * rng.standard_normal((3, 4, 30, 41))
    prob = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    batch = sample_points(prob, 5, seed=0, iteration=0, sample_ids=[3, 1, 2])
    winner, best = prob.argmax(1), prob.max(1)
    assert batch.points.shape == (3, 4, 10, 2)
    assert np.array_equal(batch.labels, np.broadcast_to([1] * 5 + [0] * 5, (3, 4, 10)))
    for b in range(3):
        for c in range(4):
            rows, columns = batch.points[b, c].T
            assert len({*zip(rows.tolist(), columns.tolist(), strict=True)}) == 10
            assert np.array_equal(winner[b, rows, columns] == c, batch.labels[b, c] == 1)
            assert (best[b, rows, columns] >= 0.8).all()
    # A sample's points do not depend on where in which batch it lies.
    again = sample_points(prob[1:2], 5, seed=0, iteration=0, sample_ids=[1])
    assert np.array_equal(again.points[0], batch.points[1])


def test_few_confident_voxels_mean_no_restriction():
    prob = np.full((1, 2, 6, 6), 0.5, np.float32)
    prob[:, 1] += 0.1
    prob[:, 0] -= 0.1
    prob[0, :, 0, :4] = [[0.1], [0.9]]
    four = sample_points(prob, 4, seed=1, iteration=0, sample_ids=[0])
    assert sorted(four.points[0, 1, :4].tolist()) == [[0, 0], [0, 1], [0, 2], [0, 3]]
    drawn = {
        tuple(p)
        for i in range(50)
        for p in sample_points(prob, 5, seed=i, iteration=0, sample_ids=[0]).points[0, 1, :5].tolist()
    }
    assert len(drawn) == 36


def test_missing_points_are_padding():
    prob = np.zeros((1, 3, 2, 2, 2), np.float32)
    prob[:, 0] = 1
    prob[0, :, 1, 0, 1] = [0, 1, 0]
    batch = sample_points(prob, 5, seed=0, iteration=0, sample_ids=[0])
    assert batch.labels[0, 0].tolist() == [1] * 5 + [0, -1, -1, -1, -1]
    assert batch.labels[0, 1].tolist() == [1, -1, -1, -1, -1, 0, 0, 0, 0, 0]
    assert batch.labels[0, 2].tolist() == [-1] * 5 + [0] * 5
    assert batch.points[0, 1, 0].tolist() == [1, 0, 1]
    assert (batch.points[batch.labels == -1] == 0).all()


def test_ties_go_to_the_smallest_class_and_low_precision_is_accepted():
    prob = torch.full((1, 2, 3, 3), 0.5, dtype=torch.bfloat16)
    batch = sample_points(prob, 2, seed=0, iteration=0, sample_ids=[0])
    assert batch.labels.tolist() == [[[1, 1, -1, -1], [-1, -1, 0, 0]]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"n": 0}, ValueError, r"sample_points\(\): n: expected an integer from 1 to 1024, got 0"),
        ({"n": 1025}, ValueError, r"n: expected an integer from 1 to 1024, got 1025"),
        ({"confidence": float("nan")}, ValueError, r"confidence: expected a number"),
        ({"sample_ids": []}, ValueError, r"sample_ids: expected one per sample \(1\), got 0"),
        ({"prob": np.zeros((1, 2, 4), np.float32)}, ValueError, r"prob: expected \[B, C, H, W\]"),
        (
            {"prob": np.zeros((1, 2, 4, 4), np.uint8)},
            TypeError,
            r"prob: expected dtype f16, bf16, f32, f64, got u8",
        ),
        ({"seed": -(2**63) - 1}, ValueError, r"sample_points\(\): seed: expected a number of 64 bits"),
    ],
)
def test_bad_points(change, error, message):
    options = {
        "prob": np.full((1, 2, 4, 4), 0.5),
        "n": 5,
        "seed": 0,
        "iteration": 0,
        "sample_ids": [0],
        **change,
    }
    with pytest.raises(error, match=message):
        sample_points(**options)


# ---- boxes and mask prompts ---------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(bool, st.tuples(st.integers(1, 300), st.integers(1, 70)), fill=st.just(False)))
def test_boxes_against_numpy(mask):
    box, found = boxes(mask[None, None], 0.0, order="xy")
    assert bool(found[0, 0]) == bool(mask.any())
    if mask.any():
        rows, columns = np.where(mask)
        assert box[0, 0].tolist() == [columns.min(), rows.min(), columns.max(), rows.max()]
    else:
        assert box[0, 0].tolist() == [0, 0, 0, 0]


def test_margin_and_clipping_by_hand():
    mask = torch.zeros(1, 2, 40, 60, 100, dtype=torch.uint8)
    mask[0, 1, 10:30, 0:20, 50:100] = 2
    box, found = boxes(mask)
    assert found.tolist() == [[False, True]]
    assert box[0, 1].tolist() == [9, 0, 47.5, 30, 20, 99]  # 5 % of 20, 20, 50
    assert boxes(mask, 0.0, order="xy")[0][0, 1].tolist() == [50, 0, 10, 99, 19, 29]


def test_boxes_of_the_heart(acdc_volumes):
    for _, label in acdc_volumes[:3]:
        masks = np.stack([label == c for c in (1, 2, 3)], 1)  # slices x classes x H x W
        box, found = boxes(masks, 0.0)
        for s, c in np.ndindex(*found.shape):
            where = np.argwhere(masks[s, c])
            assert found[s, c] == (len(where) > 0)
            if len(where):
                assert box[s, c].tolist() == [*where.min(0), *where.max(0)]


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((np.zeros((1, 1, 4, 4)),), TypeError, r"boxes\(\): mask: expected dtype bool, u8, got f64"),
        ((np.zeros((4, 4), bool),), ValueError, r"mask: expected \[B, F, H, W\]"),
        (
            (np.zeros((1, 1, 4, 4), bool), -0.1),
            ValueError,
            r"margin: expected a number from 0 to 1024, got -0.1",
        ),
        ((np.zeros((1, 1, 0, 4), bool),), ValueError, r"mask: expected at least one element"),
    ],
)
def test_bad_boxes(args, error, message):
    with pytest.raises(error, match=message):
        boxes(*args)
    with pytest.raises(ValueError, match=r"order: expected 'array' or 'xy', got 'yx'"):
        boxes(np.zeros((1, 1, 4, 4), bool), order="yx")


def test_mask_logits_at_the_ends():
    prob = np.array([[[0.0, 1.0, 0.5, np.nan, 1 - 1e-4, 1e-30]]])
    out = prompts.mask_logits(prob, (1, 6))[0, 0]
    assert out[:3].tolist() == [-10, 10, 0]
    assert np.isnan(out[3])
    assert abs(out[4] - np.log(0.9999 / 1e-4)) < 2e-6
    assert out[5] == -10
    outside = np.array([[[-1e-7, 0.0, 1 + 1e-7, 1.0, -np.inf, 0.5, np.inf, 0.5]]])
    assert prompts.mask_logits(outside, (1, 4))[0, 0].tolist() == [-10, 10, -10, 10]


def test_mask_logits_is_the_average_not_a_sample(rng):
    prob = rng.random((2, 64, 64, 32)).astype(np.float32)
    cells = prob.reshape(2, 16, 4, 16, 4, 8, 4).mean((2, 4, 6), dtype=np.float64)
    out = prompts.mask_logits(prob, (16, 16, 8))
    # Averages lie near one half, where a float32 logit is good to about 1e-7 and its logarithms to more.
    np.testing.assert_allclose(out, np.log(cells / (1 - cells)), atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "size", "message"),
    [
        ((1, 8, 8), (9, 8), r"size: expected at most the input's \(1, 8, 8\), got \(1, 9, 8\)"),
        ((1, 8, 8), (8, 8, 8), r"size: expected one number per spatial dimension"),
        ((8, 8), (8,), r"size: expected one number per spatial dimension"),
        ((1, 8, 8), (0, 8), r"h: expected an integer of at least 1, got 0"),
    ],
)
def test_bad_mask_logits(shape, size, message):
    with pytest.raises(ValueError, match=message):
        prompts.mask_logits(np.zeros(shape), size)


# ---- PromptBatch --------------------------------------------------------------------------------


def _batch(rng, shape, *, b=2, f=3, k=4, kind=np.asarray, with_boxes=False, masks=None):
    points = np.stack([rng.integers(0, n, (b, f, k)) for n in shape], -1)
    labels = rng.integers(-1, 2, (b, f, k))
    box = None
    if with_boxes:
        corners = np.sort(np.stack([rng.integers(0, n, (b, f, 2)) for n in shape], -1), axis=2)
        box = kind(corners.reshape(b, f, 2 * len(shape)).astype(np.float32))
    return PromptBatch(shape, kind(points), kind(labels), box, masks)


def _equal(a, b):
    return np.array_equal(np.asarray(a), np.asarray(b))


@settings(max_examples=40, deadline=None)
@example(1, 2049, 0, True, False)  # an image that the resizing makes one pixel high
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 2**32), st.booleans(), st.booleans())
def test_hf_round_trip(rows, columns, seed, keep_aspect, on_torch):
    rng = np.random.default_rng(seed)
    kind = torch.from_numpy if on_torch else np.asarray
    batch = _batch(rng, (rows, columns), kind=kind, with_boxes=True)
    inputs = batch.to_hf(keep_aspect=keep_aspect)
    assert all(isinstance(v, torch.Tensor) == on_torch for v in inputs.values())
    back = PromptBatch.from_hf(inputs, (rows, columns), keep_aspect=keep_aspect)
    assert _equal(back.points, batch.points)
    assert _equal(back.labels, batch.labels)
    # Boxes are real numbers: two roundings to float32 of coordinates below 4096.
    np.testing.assert_allclose(np.asarray(back.boxes), np.asarray(batch.boxes), rtol=3e-7, atol=1e-6)


def test_hf_is_x_y_in_the_resized_frame():
    # 300 x 400 image: longest side 400 -> 1024, so x' = 2.56 x and y' = y * 768 / 300.
    one = PromptBatch(
        (300, 400),
        np.array([[[[30, 100], [299, 0], [0, 0]]]]),
        np.array([[[1, 0, -1]]]),
        np.array([[[10, 20, 110, 220]]], np.float32),
    )
    inputs = one.to_hf()
    np.testing.assert_allclose(inputs["input_points"][0, 0, :2], [[256, 76.8], [0, 765.44]], rtol=1e-6)
    assert inputs["input_points"].dtype == np.float32
    assert inputs["input_labels"].tolist() == [[[1, 0, -10]]]
    assert one.to_hf(pad_label=-1)["input_labels"].tolist() == [[[1, 0, -1]]]
    np.testing.assert_allclose(inputs["input_boxes"][0, 0], [51.2, 25.6, 563.2, 281.6], rtol=1e-6)
    square = one.to_hf(keep_aspect=False)
    np.testing.assert_allclose(square["input_points"][0, 0, 1], [0, 299 * 1024 / 300], rtol=1e-6)
    # A side that does not divide: 333 * 1024 / 500 = 681.98 is 682 pixels.
    odd = PromptBatch((333, 500), np.array([[[[100, 0]]]]), np.array([[[1]]])).to_hf()
    np.testing.assert_allclose(odd["input_points"][0, 0, 0, 1], 100 * 682 / 333, rtol=1e-6)


def test_hf_without_points_and_with_masks(rng):
    none = PromptBatch.empty(2, 1, (64, 64), like=torch.zeros(1))
    assert none.to_hf() == {}
    box = torch.tensor([[[1.0, 2, 3, 4]], [[5, 6, 7, 8]]])
    masks = torch.zeros(2, 1, 16, 16)
    full = PromptBatch((64, 64), none.points, none.labels, box, masks)
    assert set(full.to_hf()) == {"input_boxes", "input_masks"}
    back = PromptBatch.from_hf(full.to_hf(), (64, 64))
    assert tuple(back.points.shape) == (2, 1, 0, 2)
    assert torch.equal(back.boxes, box)
    many = _batch(rng, (64, 64), masks=np.zeros((2, 3, 16, 16), np.float32))
    with pytest.raises(ValueError, match=r"to_hf\(\): mask_logits: expected one class"):
        many.to_hf()
    folded = many.fold_classes()
    assert folded.to_hf()["input_masks"].shape == (6, 1, 16, 16)
    assert _equal(folded.points[4, 0], many.points[1, 1])


@settings(max_examples=40, deadline=None)
@given(st.tuples(*[st.integers(1, 400)] * 3), st.integers(0, 2**32), st.booleans())
def test_sam_med3d_round_trip(shape, seed, on_torch):
    kind = torch.from_numpy if on_torch else np.asarray
    batch = _batch(np.random.default_rng(seed), shape, kind=kind)
    inputs = batch.to_sam_med3d()
    points = np.asarray(inputs["points"])
    assert points.shape == (6, 4, 3)
    assert points.dtype == np.float32
    # Centres of voxels stay inside the cube: from half a cell below 0 to half a cell below 128.
    assert points.min() > -0.5
    assert points.max() < 127.5
    back = PromptBatch.from_sam_med3d(inputs, shape, 2)
    assert _equal(back.points, batch.points)
    assert _equal(back.labels, batch.labels)


def test_sam_med3d_by_hand():
    one = PromptBatch((112, 112, 80), np.array([[[[0, 1, 79], [111, 5, 0]]]]), np.array([[[1, -1]]]))
    assert one.to_sam_med3d()["points"].tolist() == [[[8, 9, 103], [119, 13, 24]]]
    assert one.to_sam_med3d()["labels"].tolist() == [[1, -1]]
    # One side does not fit: every axis is resized, voxel centres to voxel centres.
    big = PromptBatch((256, 64, 128), np.array([[[[0, 0, 100]]]]), np.array([[[1]]]))
    assert big.to_sam_med3d()["points"].tolist() == [[[-0.25, 0.5, 100]]]
    odd = PromptBatch((127, 128, 1), np.array([[[[0, 0, 0]]]]), np.array([[[1]]]))
    assert odd.to_sam_med3d()["points"].tolist() == [[[0, 0, 63]]]  # (128 - n) // 2 in front


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_vista3d_round_trip_and_labels(kind, rng):
    batch = _batch(rng, (96, 64, 33), kind=kind)
    samples = batch.to_vista3d([3, 25, 200], class_prompts=True)
    assert len(samples) == 2
    labels = np.asarray(batch.labels)
    for b, sample in enumerate(samples):
        assert np.asarray(sample["prompt_class"]).tolist() == [[3], [25], [200]]
        assert _equal(sample["class_vector"], sample["prompt_class"])
        expected = labels[b].copy()
        expected[1][expected[1] >= 0] += 2  # class 25 is one of the special ones
        assert _equal(sample["point_labels"], expected)
        assert _equal(sample["point_coords"], np.asarray(batch.points)[b])
    back = PromptBatch.from_vista3d(samples, (96, 64, 33))
    assert _equal(back.points, batch.points)
    assert _equal(back.labels, batch.labels)
    only_classes = PromptBatch.empty(1, 2, (8, 8, 8)).to_vista3d([1, 2])
    assert set(only_classes[0]) == {"class_vector"}
    assert PromptBatch.from_vista3d(only_classes, (8, 8, 8)).points.shape == (1, 2, 0, 3)


def test_vista3d_coordinates_are_those_of_monai(rng):
    utils = pytest.importorskip("monai.transforms.utils")
    batch = _batch(rng, (17, 9, 12), b=1, f=2, k=1, kind=torch.from_numpy)
    batch = PromptBatch(batch.shape, batch.points, torch.tensor([[[1], [0]]]))
    sample = batch.to_vista3d([1, 25])[0]
    disc = utils.convert_points_to_disc((17, 9, 12), sample["point_coords"], sample["point_labels"], radius=1)
    for f, channel in ((0, 1), (1, 0)):  # channel 1: positive (1 or 3), 0: negative (0 or 2)
        assert disc[f, 1 - channel].max() == 0
        top = np.unravel_index(int(disc[f, channel].argmax()), (17, 9, 12))
        assert list(map(int, top)) == batch.points[0, f, 0].tolist()


def test_who_says_that_there_is_no_padding():
    """The statement is of one batch: the next click may be missing."""
    batch = PromptBatch.empty(2, 3, (9, 9)).append(np.zeros((2, 3, 2), np.int64), np.ones((2, 3), np.int32))
    assert not batch.unpadded
    said = replace(batch, unpadded=True)
    assert said.fold_classes().unpadded
    assert not said.append(batch.points[:, :, 0], batch.labels[:, :, 0] - 2).unpadded


def test_click_memory():
    batch = PromptBatch.empty(1, 2, (20, 30, 40), like=torch.zeros(1))
    for k in range(3):
        points = torch.full((1, 2, 3), k)
        labels = torch.tensor([[1, -1 if k == 2 else 0]])
        last = batch.append(points, labels)
        batch = batch.append(points, labels, click_memory="all")
        assert tuple(last.points.shape) == (1, 2, 1, 3)
    assert batch.points[0, 1, :, 0].tolist() == [0, 1, 2]
    assert batch.labels.tolist() == [[[1, 1, 1], [0, 0, -1]]]
    masks = torch.zeros(1, 2, 5, 5, 5)
    with_masks = batch.append(points, labels, mask_logits=masks)
    assert with_masks.mask_logits is masks
    assert with_masks.append(points, labels).mask_logits is masks
    assert with_masks.to_sam_med3d()["mask_logits"].shape == (2, 1, 5, 5, 5)


def test_human_scribbles_survive_the_converters():
    """Clicks taken from people's scribbles: mostly on their structure, and nothing moves on the way."""
    shares = []
    for path in sorted(data_dir("medscribble").glob("*.npz")):
        with np.load(path) as f:
            seg, scribbles = f["seg"] > 0.5, f["scribbles"]
        points, labels = [], []
        for annotator in range(3):
            for kind in (0, 1):  # positive, negative
                where = np.argwhere(scribbles[annotator, kind] > 127)
                if len(where):
                    points.append(where[len(where) // 2])
                    labels.append(1 - kind)
        point, label = np.array(points)[None, None], np.array(labels)[None, None]
        batch = PromptBatch((256, 256), point, label)
        inputs = batch.to_hf()
        x, y = inputs["input_points"][0, 0].T
        assert np.array_equal(np.stack([y, x], 1), 4 * point[0, 0].astype(np.float32))  # 256 -> 1024
        assert _equal(PromptBatch.from_hf(inputs, (256, 256)).points, point)
        slab = PromptBatch((3, 256, 256), np.pad(point, [(0, 0)] * 3 + [(1, 0)], constant_values=1), label)
        assert _equal(PromptBatch.from_sam_med3d(slab.to_sam_med3d(), slab.shape, 1).points, slab.points)
        if path.name.startswith(("ACDC", "CHAOS", "BTCV", "HipXRay")):
            hits = seg[tuple(point[0, 0].T)] == (label[0, 0] == 1)
            shares.append(hits.mean())
    assert np.mean(shares) > 0.8  # people are right on blobs, but not always


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (8,)}, r"shape: expected 2 or 3 positive sides, got \(8,\)"),
        ({"shape": (8, 0)}, r"shape: expected 2 or 3 positive sides"),
        ({"shape": (8, 8, 8)}, r"points: expected \[B, F, K, 3\], got shape \(1, 1, 2, 2\)"),
        ({"labels": np.zeros((1, 1, 3), int)}, r"labels: expected shape \(1, 1, 2\), got \(1, 1, 3\)"),
        ({"labels": np.full((1, 1, 2), -10)}, r"labels: expected 1, 0 or -1"),
        ({"labels": torch.full((1, 1, 2), 2)}, r"labels: expected 1, 0 or -1"),
        ({"boxes": np.zeros((1, 1, 6))}, r"boxes: expected shape \(1, 1, 4\), got \(1, 1, 6\)"),
        ({"mask_logits": np.zeros((1, 4, 4))}, r"mask_logits: expected \[1, 1, \*size\] with 2 spatial"),
    ],
)
def test_bad_batches(change, message):
    fields = {"shape": (8, 8), "points": np.zeros((1, 1, 2, 2), int), "labels": np.zeros((1, 1, 2), int)}
    with pytest.raises(ValueError, match=message):
        PromptBatch(**{**fields, **change})


def test_converters_refuse_what_the_model_cannot_take(rng):
    flat = _batch(rng, (8, 9), with_boxes=True)
    deep = _batch(rng, (8, 9, 10), with_boxes=True)
    with pytest.raises(ValueError, match=r"to_hf\(\): shape: expected a 2-D patch"):
        deep.to_hf()
    with pytest.raises(ValueError, match=r"to_sam_med3d\(\): boxes: expected None"):
        deep.to_sam_med3d()
    with pytest.raises(ValueError, match=r"to_vista3d\(\): boxes: expected None"):
        deep.to_vista3d([1, 2, 3])
    with pytest.raises(ValueError, match=r"to_sam_med3d\(\): shape: expected a 3-D patch"):
        _batch(rng, (8, 9)).to_sam_med3d()
    with pytest.raises(ValueError, match=r"to_vista3d\(\): shape: expected a 3-D patch"):
        flat.to_vista3d([1, 2, 3])
    with pytest.raises(ValueError, match=r"to_vista3d\(\): classes: expected one per class \(3\), got 2"):
        _batch(rng, (8, 9, 10)).to_vista3d([1, 2])
    with pytest.raises(ValueError, match=r"append\(\): click_memory: expected 'last' or 'all', got 'some'"):
        flat.append(np.zeros((2, 3, 2), int), np.ones((2, 3), int), "some")
    with pytest.raises(ValueError, match=r"append\(\): points: expected shape \(2, 3, 2\), got \(2, 3, 3\)"):
        flat.append(np.zeros((2, 3, 3), int), np.ones((2, 3), int))
    with pytest.raises(ValueError, match=r"append\(\): labels: expected shape \(2, 3\), got \(2,\)"):
        flat.append(np.zeros((2, 3, 2), int), np.ones(2, int))
    with pytest.raises(
        ValueError, match=r"from_sam_med3d\(\): batch: expected a divisor of the 6 rows, got 4"
    ):
        PromptBatch.from_sam_med3d(_batch(rng, (8, 9, 10)).to_sam_med3d(), (8, 9, 10), 4)
    with pytest.raises(ValueError, match=r"from_hf\(\): inputs: expected input_points or input_boxes"):
        PromptBatch.from_hf({}, (8, 9))
    with pytest.raises(ValueError, match=r"from_vista3d\(\): samples: expected at least one, got none"):
        PromptBatch.from_vista3d([], (8, 9, 10))
