# SPDX-License-Identifier: Apache-2.0
"""The random walker against direct solvers, scikit-image, its own symmetries and real volumes."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.sparse.csgraph import dijkstra as shortest
from scipy.sparse.linalg import spsolve

from semisam import ops
from semisam.random_walk import (
    click_prompt,
    click_seeds,
    geodesic,
    mask_prompt,
    mask_seeds,
    random_walker,
    standardize,
)


def direct(image, seeds, prior=None, gamma=0.0, *, beta=90.0, spacing=None):
    """The same system, assembled and factorised by SciPy in float64."""
    image = np.asarray(image, np.float64)
    spacing = np.ones(image.ndim) if spacing is None else np.asarray(spacing)
    number = np.arange(image.size).reshape(image.shape)
    rows, columns, weights = [], [], []
    for axis in range(image.ndim):
        i = np.delete(number, -1, axis).ravel()
        j = np.delete(number, 0, axis).ravel()
        w = np.exp(-beta * np.diff(image, axis=axis).ravel() ** 2) + 1e-5
        weights += [w / (spacing[axis] / spacing.min()) ** 2] * 2
        rows += [i, j]
        columns += [j, i]
    shape = (image.size, image.size)
    between = sp.csr_matrix((np.concatenate(weights), (np.concatenate(rows), np.concatenate(columns))), shape)
    matrix = sp.diags(np.asarray(between.sum(1)).ravel() + gamma) - between
    kind = seeds.ravel()
    free, fixed = np.flatnonzero(kind == 0), np.flatnonzero(kind)
    x = (kind == 1).astype(np.float64)
    right = -matrix.tocsr()[free][:, fixed] @ x[fixed]
    if gamma:
        right += gamma * np.asarray(prior, np.float64).ravel()[free]
    x[free] = spsolve(matrix.tocsr()[free][:, free].tocsc(), right)
    return x.reshape(image.shape)


def problem(rng, *shape, noise=0.2):
    """A ball of other brightness in noise, seeds in its middle and far from it, and a soft prior."""
    centre = np.array([n / 2 for n in shape]).reshape(-1, *[1] * len(shape))
    distance = np.sqrt(((np.indices(shape) - centre) ** 2).sum(0))
    radius = min(n for n in shape if n > 3) / 3
    image = (distance < radius) + noise * ndimage.gaussian_filter(rng.standard_normal(shape), 1)
    seeds = np.zeros(shape, np.uint8)
    seeds[distance < radius / 2] = 1
    seeds[distance > 1.5 * radius] = 2
    prior = 1 / (1 + np.exp(distance - radius + 0.3 * rng.standard_normal(shape)))
    return image.astype(np.float32), seeds, prior.astype(np.float32)


def dice(a, b):
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


# ---- against other solvers ----------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12, 14, 19), (1, 30, 33), (40, 37), (3, 5, 50), (16, 16, 16), (15, 9, 1)])
@pytest.mark.parametrize("gamma", [0.0, 0.005, 0.5])
def test_direct_solver(rng, shape, gamma):
    image, seeds, prior = problem(rng, *shape)
    if not (seeds == 1).any():
        seeds.flat[seeds.size // 2] = 1
    expected = direct(image, seeds, prior, gamma)
    # The default stops at a residual of 1e-4; errors are that times the condition number (~50 here).
    np.testing.assert_allclose(random_walker(image, seeds, prior, gamma=gamma), expected, atol=5e-3)
    # Far below, only the rounding of float32 vectors (6e-8) times the condition number is left.
    tight = random_walker(image, seeds, prior, gamma=gamma, tol=1e-7)
    np.testing.assert_allclose(tight, expected, atol=2e-5)


@pytest.mark.parametrize("beta", [0.0, 1.0, 1e4])
def test_direct_solver_on_weak_edges(rng, beta):
    """beta 1e4 leaves islands that hang on weights of 1e-5: the worst case for rounding."""
    image, seeds, _ = problem(rng, 14, 13, 18, noise=1.0)
    got = random_walker(image, seeds, beta=beta, tol=1e-7, max_iter=5000)
    np.testing.assert_allclose(got, direct(image, seeds, beta=beta), atol=2e-3 if beta > 100 else 2e-5)


def test_spacing(rng):
    image, seeds, prior = problem(rng, 9, 14, 20)
    for spacing in [(3, 1, 1), (1, 2, 0.5), (0.7, 0.7, 5)]:
        got = random_walker(image, seeds, prior, gamma=0.01, spacing=spacing, tol=1e-7)
        np.testing.assert_allclose(got, direct(image, seeds, prior, 0.01, spacing=spacing), atol=2e-5)
    thick = random_walker(image, seeds, spacing=(3, 1, 1))
    assert np.abs(thick - random_walker(image, seeds)).max() > 1e-3
    same = random_walker(image, seeds, prior, gamma=0.01, spacing=(2, 2, 2))
    assert np.array_equal(same, random_walker(image, seeds, prior, gamma=0.01))


def test_scikit_image(rng):
    """Same seeds and the same beta after its scaling: beta / (10 std of the image)."""
    skimage = pytest.importorskip("skimage.segmentation")
    image, seeds, _ = problem(rng, 20, 40, 40, noise=0.5)
    theirs = skimage.random_walker(image, seeds, beta=90 * 10 * image.std(), mode="cg_j", tol=1e-4)
    ours = random_walker(image, seeds, beta=90)
    free = seeds == 0
    assert np.mean((ours > 0.5)[free] == (theirs == 1)[free]) > 0.99


def test_path_of_three_by_hand():
    """Between the seeds two equal edges and one of weight 1e-5: x falls almost only at the weak one.

    Resistances 1, 1, 1e5 in series (each + 1e-5 relative): x1 = 1 - 1/(2 + 1e5) = 0.99999.
    """
    x = random_walker(np.float32([[0, 0, 0, 9]]), np.uint8([[1, 0, 0, 2]]), tol=1e-9)
    np.testing.assert_allclose(x, [[1, 1 - 1e-5, 1 - 2e-5, 0]], atol=2e-7)
    flat = random_walker(np.zeros((1, 5), np.float32), np.uint8([[1, 0, 0, 0, 2]]), tol=1e-9)
    np.testing.assert_allclose(flat, [[1, 0.75, 0.5, 0.25, 0]], atol=1e-6)


# ---- properties ---------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.01, 1.0]), st.sampled_from([0.0, 1.0, 90.0]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_random_problems(seed, gamma, beta):
    """Any pattern of seeds: solved, inside 0..1, exact on seeds, 1 - x when the seeds change places."""
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, (6, 8, 40)))
    image = rng.standard_normal(shape).astype(np.float32)
    seeds = rng.choice([0, 1, 2], shape, p=[0.9, 0.05, 0.05]).astype(np.uint8)
    seeds.flat[rng.integers(seeds.size)] = rng.integers(1, 3)
    prior = rng.random(shape, np.float32)
    solve = {"gamma": gamma, "beta": beta, "tol": 1e-7, "max_iter": 20000}
    x, info = random_walker(image, seeds, prior, return_info=True, **solve)
    assert info.converged.all()
    assert x.min() >= 0
    assert x.max() <= 1
    assert (x[seeds == 1] == 1).all()
    assert (x[seeds == 2] == 0).all()
    # White noise at beta 90: islands of free voxels hang on weights of 1e-5, condition numbers are
    # above 1e5, and float32 vectors leave errors of a percent there. At beta 1 they are 1e3.
    atol = 1e-4 if beta < 10 else 5e-2
    np.testing.assert_allclose(x, direct(image, seeds, prior, gamma, beta=beta), atol=atol)
    swapped = np.array([0, 2, 1], np.uint8)[seeds]
    np.testing.assert_allclose(random_walker(image, swapped, 1 - prior, **solve), 1 - x, atol=atol)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_flips(rng, axis):
    image, seeds, prior = problem(rng, 11, 13, 18)
    turned = [np.flip(a, axis) for a in (image, seeds, prior)]
    x = random_walker(image, seeds, prior, gamma=0.01, tol=1e-7)
    np.testing.assert_allclose(np.flip(random_walker(*turned, gamma=0.01, tol=1e-7), axis), x, atol=1e-5)


def test_batch_and_classes_equal_single_calls_bit_for_bit(rng):
    parts = [[problem(rng, 9, 12, 20) for _ in range(3)] for _ in range(2)]
    image = np.stack([p[0][0] for p in parts])
    seeds = np.stack([[q[1] for q in p] for p in parts])
    prior = np.stack([[q[2] for q in p] for p in parts])
    together, info = random_walker(image, seeds, prior, gamma=0.02, return_info=True)
    assert together.shape == (2, 3, 9, 12, 20)
    assert info.iterations.shape == info.residual.shape == info.converged.shape == (2, 3)
    for b in range(2):
        for c in range(3):
            alone, one = random_walker(image[b], seeds[b, c], prior[b, c], gamma=0.02, return_info=True)
            assert np.array_equal(alone, together[b, c])
            assert one.iterations == info.iterations[b, c]
    per_image = random_walker(image, seeds[:, 0], prior[:, 0], gamma=0.02)
    assert np.array_equal(per_image, together[:, 0])


def test_two_dimensions_equal_one_thin_volume(rng):
    image, seeds, prior = problem(rng, 30, 41)
    flat = random_walker(image, seeds, prior, gamma=0.01, spacing=(1, 2))
    assert np.array_equal(
        flat, random_walker(image[None], seeds[None], prior[None], gamma=0.01, spacing=(1, 1, 2))[0]
    )
    stack = random_walker(image[None], seeds[None], prior[None], gamma=0.01, spacing=(1, 2), spatial_dims=2)
    assert np.array_equal(stack[0], flat)


def test_torch_and_integer_dtypes(rng):
    image, seeds, prior = problem(rng, 8, 9, 20)
    expected = random_walker(image, seeds, prior, gamma=0.1)
    tensors = [torch.from_numpy(a) for a in (image, seeds, prior)]
    got, info = random_walker(*tensors, gamma=0.1, return_info=True)
    assert torch.equal(got, torch.from_numpy(expected))
    assert isinstance(info.iterations, torch.Tensor)
    for dtype in (np.int64, np.uint16, np.int8):
        assert np.array_equal(random_walker(image, seeds.astype(dtype), prior, gamma=0.1), expected)
    assert torch.equal(random_walker(tensors[0], tensors[1].long(), tensors[2], gamma=0.1), got)
    marked = tensors[0].clone().requires_grad_()
    assert torch.equal(random_walker(marked, *tensors[1:], gamma=0.1), got)


def test_large_enough_for_several_threads(rng):
    """Problems above the grain run as a team: equal bits, also when the team is larger than the machine."""
    image, seeds, prior = problem(rng, 30, 60, 70)
    seeds[:, :, 1:] = 0  # nearly everything is free
    inputs = (image[None], seeds[None], prior[None], 1, 0.05, 90.0, [], 1e-5, 500)
    expected = None
    for threads in (1, 2, 3, 5):
        ops.set_num_threads(threads)
        try:
            got = [a.tobytes() for a in ops.call("random_walker", *inputs)]
        finally:
            ops.set_num_threads(0)
        expected = expected or got
        assert got == expected, threads


# ---- ends of a solve ----------------------------------------------------------------------------


def test_max_iter_warns_and_says_so(rng):
    image, seeds, _ = problem(rng, 12, 14, 19)
    message = (
        r"random_walker\(\): 1 of 1 problems did not converge: problem 0 has residual .* after 2 iterations"
    )
    with pytest.warns(RuntimeWarning, match=message):
        x, info = random_walker(image, seeds, max_iter=2, return_info=True)
    assert info.iterations == 2
    assert info.residual > 1e-4
    assert not info.converged
    assert np.isfinite(x).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x, info = random_walker(image, seeds, return_info=True)
    assert info.converged
    assert info.residual <= 1e-4


def test_no_free_voxel():
    x, info = random_walker(np.zeros((2, 3, 4)), np.ones((2, 3, 4), np.uint8), return_info=True)
    assert (x == 1).all()
    assert info.iterations == 0
    assert info.residual == 0


def test_only_one_kind_of_seed_and_one_voxel():
    image = np.random.default_rng(3).random((4, 5, 6), np.float32)
    for kind in (1, 2):
        seeds = np.zeros(image.shape, np.uint8)
        seeds[0, 0, 0] = kind
        np.testing.assert_allclose(random_walker(image, seeds, tol=1e-6), 2 - kind, atol=1e-3)
    one = random_walker(
        np.zeros((1, 1, 1)), np.zeros((1, 1, 1), np.uint8), np.full((1, 1, 1), 0.3), gamma=0.1
    )
    np.testing.assert_allclose(one, 0.3, rtol=1e-6)


@pytest.mark.parametrize("where", ["image", "prior"])
def test_nan_is_visible_and_stays_in_its_problem(rng, where):
    image, seeds, prior = problem(rng, 9, 12, 20)
    clean = random_walker(image, seeds, prior, gamma=0.1)
    both = [np.stack([a, a]) for a in (image, seeds, prior)]
    index = tuple(np.argwhere(seeds == 0)[7])
    both[0 if where == "image" else 2][(1, *index)] = np.nan
    with pytest.warns(RuntimeWarning, match="problem 1 has residual nan"):
        x, info = random_walker(*both, gamma=0.1, return_info=True)
    assert np.array_equal(x[0], clean)
    assert np.isnan(x[1][seeds == 0]).all()
    assert (x[1][seeds == 1] == 1).all()
    assert info.converged.tolist() == [True, False]


def test_nan_far_from_free_voxels_does_not_matter(rng):
    image, seeds, _ = problem(rng, 9, 12, 20)
    clean = random_walker(image, seeds)
    image[0, 0, 0] = np.nan
    assert seeds[:2, :2, :2].all()
    assert np.array_equal(random_walker(image, seeds), clean)


def test_infinite_image_is_an_edge_or_nan(rng):
    image, seeds, _ = problem(rng, 9, 12, 20)
    index = tuple(np.argwhere(seeds == 0)[7])
    image[index] = np.inf
    assert np.isfinite(random_walker(image, seeds)).all()


# ---- bad input ----------------------------------------------------------------------------------

IMAGE = np.zeros((2, 3, 4), np.float32)
SEEDS = np.uint8([[[1, 0, 0, 2]] * 3] * 2)
HALF = np.full((2, 3, 4), 0.5)
BAD = [
    ({"image": IMAGE[0, 0]}, ValueError, r"image: expected \[..., D, H, W\] or .* got shape \(4,\)"),
    ({"seeds": SEEDS[:1]}, ValueError, r"seeds: expected shape \('...', 2, 3, 4\) .* got \(1, 3, 4\)"),
    ({"prior": HALF[:1]}, ValueError, r"prior: expected the shape of seeds \(2, 3, 4\), got \(1, 3, 4\)"),
    ({"seeds": SEEDS + np.uint8(2)}, ValueError, r"seeds: expected 0 \(free\), 1 .* got 3"),
    ({"seeds": SEEDS.astype(np.int8) * -1}, ValueError, r"seeds: expected 0 \(free\), 1 .* got -1"),
    ({"seeds": SEEDS.astype(np.int64) * 257}, ValueError, r"seeds: expected 0 \(free\), 1 .* got 514"),
    ({"seeds": SEEDS.astype(np.float32)}, TypeError, r"seeds: expected dtype u8, i8, got f32"),
    ({"seeds": SEEDS * 0}, ValueError, r"seeds: expected at least one seed per problem where gamma is 0"),
    ({"image": IMAGE.astype(np.int16)}, TypeError, r"image: expected dtype f16, bf16, f32, f64, got i16"),
    ({"prior": HALF.astype(np.uint8)}, TypeError, r"prior: expected dtype f16, bf16, f32, f64, got u8"),
    ({"prior": HALF + 1}, ValueError, r"prior: expected probabilities from 0 to 1, got 1.5"),
    ({"prior": -HALF}, ValueError, r"prior: expected probabilities from 0 to 1, got -0.5"),
    ({"gamma": 0.1}, ValueError, r"gamma: expected 0 without a prior, got 0.1"),
    ({"gamma": -1.0}, ValueError, r"gamma: expected a number from 0 to 1e\+06, got -1"),
    ({"gamma": float("nan")}, ValueError, r"gamma: expected a number from 0 .* got nan"),
    ({"beta": -1.0}, ValueError, r"beta: expected a number from 0 .* got -1"),
    ({"tol": float("nan")}, ValueError, r"tol: expected a number from 0 to 1, got nan"),
    ({"max_iter": -1}, ValueError, r"max_iter: expected an integer of at least 0, got -1"),
    ({"max_iter": 2.5}, TypeError, r"max_iter: expected an integer, got .*float"),
    ({"spacing": (1, 1)}, ValueError, r"spacing: expected 3 positive numbers, .* got \(1, 1\)"),
    ({"spacing": (1, 0, 1)}, ValueError, r"spacing: expected 3 positive numbers"),
    ({"spacing": (1, float("nan"), 1)}, ValueError, r"spacing: expected 3 positive numbers"),
    ({"spacing": (1, 1, 1e9)}, ValueError, r"spacing: expected ratios up to 1e6, got 1e\+09"),
    ({"spatial_dims": 1}, ValueError, r"image: expected .* got shape \(2, 3, 4\) and spatial_dims=1"),
]


@pytest.mark.parametrize(
    ("change", "kind", "message"), BAD, ids=[f"{next(iter(b[0]))}-{i}" for i, b in enumerate(BAD)]
)
def test_bad_input(change, kind, message):
    arguments = {"image": IMAGE, "seeds": SEEDS, **change}
    with pytest.raises(kind, match=r"random_walker\(\): " + message):
        random_walker(**arguments)


def test_bad_input_of_the_operator_itself():
    image, seeds = IMAGE[None], np.stack([SEEDS, SEEDS])
    with pytest.raises(ValueError, match=r"seeds: expected 1 x 1 problems \(images x classes\), got 2"):
        ops.call("random_walker", image, seeds, None, 1, 0.0, 90.0, [], 1e-4, 10)
    with pytest.raises(ValueError, match=r"spacing: expected 3 numbers, got 2"):
        ops.call("random_walker", image, seeds[:1], None, 1, 0.0, 90.0, [1.0, 1.0], 1e-4, 10)
    with pytest.raises(ValueError, match=r"spacing: expected positive numbers, got -1"):
        ops.call("random_walker", image, seeds[:1], None, 1, 0.0, 90.0, [1.0, 1.0, -1.0], 1e-4, 10)
    # Many problems run one per thread: the first bad one is named whatever the order was.
    many = np.stack([SEEDS] * 9)
    prior = np.stack([HALF] * 4 + [HALF * 14] * 5)
    with pytest.raises(ValueError, match=r"prior: expected probabilities from 0 to 1, got 7"):
        ops.call("random_walker", image, many, prior, 9, 0.1, 90.0, [], 1e-4, 10)


# ---- mask prompt --------------------------------------------------------------------------------


def test_standardize(rng):
    image = (50 + 9 * rng.standard_normal((2, 6, 20, 30))).astype(np.float32)
    got = standardize(image)
    for b in range(2):
        scaled = (image[b] - image[b].mean()) / image[b].std()
        expected = ndimage.gaussian_filter(scaled, 0.5, mode="nearest", truncate=4)
        np.testing.assert_allclose(got[b], expected, atol=1e-5)
    assert torch.equal(standardize(torch.from_numpy(image)), torch.from_numpy(got))
    assert (standardize(np.full((4, 5), 7)) == 0).all()
    with pytest.raises(ValueError, match=r"standardize\(\): sigma: expected 0 or a positive number, got -1"):
        standardize(image, sigma=-1)


def test_mask_seeds_by_hand():
    """A bar of 9 in a row of 30: distances 1..5..1 inside, so that 3 = min(3, 0.6 * 5) is the seed."""
    mask = np.zeros((1, 30), bool)
    mask[0, 10:19] = True
    seeds, prior = mask_seeds(np.zeros((1, 30)), mask)
    assert "".join(map(str, seeds[0])) == "2222" + "000000" + "00" + "11111" + "00" + "000000" + "22222"
    s = np.float64([-8, -8, -8, -7, -6, -5, -4, -3, -2, -1, 1, 2, 3, 4, 5])
    np.testing.assert_allclose(prior[0, :15], 1 / (1 + np.exp(-2 * s)), rtol=1e-5)


def test_mask_seeds_use_colour(rng):
    image = np.zeros((40, 40), np.float32)
    image[10:30, 10:30] = 1
    image += 0.05 * rng.standard_normal(image.shape).astype(np.float32)
    rough = np.zeros(image.shape, bool)
    rough[13:33, 10:30] = True
    seeds, with_colour = mask_seeds(image, rough)
    _, without = mask_seeds(image, rough, colour_weight=0.0)
    band = seeds == 0
    assert (with_colour > without)[band & (image > 0.5)].all()
    assert (with_colour < without)[band & (image < 0.5)].all()
    near = (without > 0.01) & (without < 0.99)
    evidence = [np.log(p[near] / (1 - p[near])) for p in (with_colour, without)]
    assert 1 < np.abs(evidence[0] - evidence[1]).max() <= 1.5 + 1e-3  # 0.5 * 3, in float32


def test_mask_seeds_of_empty_and_full_masks_and_probabilities():
    image = np.zeros((6, 7, 8))
    seeds, prior = mask_seeds(image, np.zeros(image.shape, bool))
    assert (seeds == 2).all()
    assert (prior < 1e-6).all()
    seeds, prior = mask_seeds(image, np.ones(image.shape, bool))
    assert (seeds == 1).all()
    soft = np.random.default_rng(0).random(image.shape)
    for a, b in zip(mask_seeds(image, soft), mask_seeds(image, soft >= 0.5), strict=True):
        assert np.array_equal(a, b)
    assert (mask_prompt(image, np.zeros(image.shape, bool)) == 0).all()
    with pytest.raises(ValueError, match=r"mask_seeds\(\): mask: expected probabilities, got NaN"):
        mask_seeds(image, soft * np.nan)
    with pytest.raises(ValueError, match=r"mask_seeds\(\): mask: expected shape .* got \(6, 7\)"):
        mask_seeds(image, soft[..., 0])


def test_mask_prompt_of_classes_and_torch(rng):
    image = rng.standard_normal((2, 12, 20, 24)).astype(np.float32)
    mask = np.zeros((2, 3, 12, 20, 24), bool)
    for c in range(3):
        mask[:, c, 3:9, 4 + 3 * c : 10 + 3 * c, 5:15] = True
    got = mask_prompt(image, mask)
    assert got.shape == mask.shape
    for b in range(2):
        for c in range(3):
            assert np.array_equal(mask_prompt(image[b], mask[b, c]), got[b, c])
    tensors = mask_prompt(torch.from_numpy(image), torch.from_numpy(mask))
    assert torch.equal(tensors, torch.from_numpy(got))


def _rough(rng, truth):
    """The truth with its surface moved by smooth noise of about 1.5 voxels."""
    noise = ndimage.gaussian_filter(rng.standard_normal(truth.shape), 2)
    signed = ndimage.distance_transform_edt(truth) - ndimage.distance_transform_edt(~truth)
    return signed + 1.5 * noise / noise.std() > 0


def test_mask_prompt_on_hippocampus(rng, hippocampus_cases):
    """Rough masks of the whole hippocampus become better on average, and none becomes useless."""
    before, after = [], []
    for image, label, spacing in hippocampus_cases:
        truth = label > 0
        rough = _rough(rng, truth)
        x, info = mask_prompt(image, rough, spacing=spacing, return_info=True)
        assert info.iterations < 100
        before.append(dice(rough, truth))
        after.append(dice(x > 0.5, truth))
    print(f"hippocampus: Dice {np.mean(before):.3f} -> {np.mean(after):.3f}")
    assert min(after) > 0.75
    assert np.mean(after) > np.mean(before)


def test_mask_prompt_on_left_atrium(rng, la_case):
    image, label = la_case[0][::2, ::2, ::2], la_case[1][::2, ::2, ::2] > 0
    rough = _rough(rng, label)
    after = dice(mask_prompt(image, rough) > 0.5, label)
    print(f"left atrium: Dice {dice(rough, label):.3f} -> {after:.3f}")
    assert after > 0.75
    eroded = ndimage.binary_erosion(label)
    assert dice(mask_prompt(image, eroded) > 0.5, label) > 0.75


# ---- geodesic distances and clicks --------------------------------------------------------------


def dijkstra(image, mask, weight, spacing):
    """The same graph in SciPy's Dijkstra, float64."""
    number = np.arange(image.size).reshape(image.shape)
    rows, columns, steps = [], [], []
    for axis in range(image.ndim):
        rows.append(np.delete(number, -1, axis).ravel())
        columns.append(np.delete(number, 0, axis).ravel())
        steps.append(np.hypot(spacing[axis], weight * np.diff(image.astype(np.float64), axis=axis)).ravel())
    graph = sp.csr_matrix(
        (np.concatenate(steps), (np.concatenate(rows), np.concatenate(columns))), (image.size, image.size)
    )
    sources = np.flatnonzero(mask)
    d = shortest(graph, directed=False, indices=sources, min_only=True)
    return d.reshape(image.shape)


@pytest.mark.parametrize("shape", [(9, 14, 37), (1, 20, 1), (30, 41), (6, 1, 50)])
@pytest.mark.parametrize("weight", [0.0, 3.0, 100.0])
def test_geodesic_is_exact(rng, shape, weight):
    """White noise makes paths winding: a fixed number of sweeps would not do."""
    image = rng.standard_normal(shape).astype(np.float32)
    mask = np.zeros(shape, bool)
    mask.flat[[3, image.size // 2]] = True
    spacing = (1.0, 0.5, 2.0)[: len(shape)]
    expected = dijkstra(image, mask, weight, spacing)
    # Float sums of up to a few hundred steps, each rounded to 6e-8 of the sum.
    np.testing.assert_allclose(geodesic(image, mask, weight=weight, spacing=spacing), expected, rtol=2e-5)


def test_geodesic_in_a_spiral():
    """A corridor that winds through walls of height 1e3: the way along it, counted by hand."""
    walls = np.zeros((9, 9), np.float32)
    walls[1::4, :8] = 1e3
    walls[3::4, 1:] = 1e3
    mask = np.zeros((9, 9), bool)
    mask[0, 0] = True
    # Four switchbacks of 8 steps along a row and 2 down, then 8 along the last row.
    assert geodesic(walls, mask, weight=1.0)[8, 8] == 4 * (8 + 2) + 8


def test_geodesic_without_marks_and_with_nan(rng):
    image = np.zeros((2, 4, 5), np.float32)
    mask = np.zeros((2, 3, 4, 5), bool)
    mask[:, 0, 0, 0] = True
    image[1, :, 2] = np.nan
    d = geodesic(image, mask, spatial_dims=2)
    assert np.isinf(d[:, 1:]).all()
    assert np.array_equal(d[0, 0], np.add.outer(np.arange(4), np.arange(5)))
    assert np.isinf(d[1, 0, :, 2:]).all()
    assert np.isfinite(d[1, 0, :, :2]).all()
    assert torch.equal(
        geodesic(torch.from_numpy(image), torch.from_numpy(mask), spatial_dims=2), torch.from_numpy(d)
    )


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (
            {"mask": np.zeros((2, 3), bool)},
            ValueError,
            r"mask: expected shape \('...', 4, 5\) .* got \(2, 3\)",
        ),
        ({"mask": np.zeros((4, 5))}, TypeError, r"mask: expected dtype bool, u8, got f64"),
        ({"weight": -1.0}, ValueError, r"weight: expected a number from 0 to 1e\+06, got -1"),
        ({"spacing": (1, -1)}, ValueError, r"spacing: expected 2 positive numbers"),
        ({"spacing": (1, 1e10)}, ValueError, r"spacing: expected numbers from 1e-9 to 1e9, got 1e\+10"),
    ],
)
def test_geodesic_bad_input(change, kind, message):
    arguments = {"image": np.zeros((4, 5)), "mask": np.eye(4, 5, dtype=bool), **change}
    with pytest.raises(kind, match=r"geodesic\(\): " + message):
        geodesic(**arguments)
    image, mask = np.zeros((1, 1, 4, 5)), np.zeros((2, 1, 4, 5), bool)
    with pytest.raises(ValueError, match=r"mask: expected 1 x 1 problems \(images x classes\), got 2"):
        ops.call("geodesic", image, mask, 1, 1.0, [])


def test_click_seeds_by_hand():
    """Balls of radius 2, the later one on top, each click on its own voxel; -1 is no click."""
    image = np.zeros((1, 14))
    points = np.array([[0, 3], [0, 9], [0, 0], [0, 5]])
    seeds, prior = click_seeds(image, points, np.array([1, 0, -1, 0]))
    assert "".join(map(str, seeds[0])) == "0111" + "22222222" + "00"
    assert prior[0, 1] > 0.9
    assert prior[0, 9] < 0.1
    only, flat = click_seeds(image, points, np.array([1, -1, -1, -1]))
    assert (only[0] == [0, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]).all()
    assert (flat > 0.95).all()  # nothing speaks for background
    none, even = click_seeds(image, points, np.full(4, -1))
    assert not none.any()
    assert (even == 0.5).all()


def test_click_seeds_box(rng):
    """A box of 10 grows by 1 + 4 at either side; clicks win over its outside."""
    image = rng.standard_normal((40, 50)).astype(np.float32)
    points, labels = np.array([[15, 20], [1, 1]]), np.array([1, 1])
    seeds, _ = click_seeds(image, points, labels, box=np.array([[10, 15], [19, 24]]))
    inside = np.zeros(image.shape, bool)
    inside[5:25, 10:30] = True
    assert (seeds[~inside] != 0).all()
    assert (seeds[inside] != 2).all()
    assert seeds[1, 1] == 1
    assert seeds[39, 49] == 2


def test_no_clicks_at_all(rng):
    """K = 0 is a list of clicks, too: an empty one."""
    image = rng.standard_normal((2, 9, 11)).astype(np.float32)
    points, labels = np.zeros((2, 3, 0, 2), np.int64), np.zeros((2, 3, 0), np.int32)
    seeds, prior = click_seeds(image, points, labels, spatial_dims=2)
    assert seeds.shape == (2, 3, 9, 11)
    assert not seeds.any()
    assert (prior == 0.5).all()
    mask = np.broadcast_to(image[:, None] > 0, (2, 3, 9, 11))
    plain = mask_seeds(image, mask, spatial_dims=2)
    for a, b in zip(
        plain, mask_seeds(image, mask, points=points, labels=labels, spatial_dims=2), strict=True
    ):
        assert np.array_equal(a, b)


def test_clicks_bad_input():
    image, points, labels = np.zeros((9, 9)), np.array([[1, 1], [2, 9]]), np.array([1, 0])
    with pytest.raises(
        ValueError, match=r"click_seeds\(\): points: expected voxels of \(9, 9\), got \[2, 9\]"
    ):
        click_seeds(image, points, labels)
    with pytest.raises(ValueError, match=r"click_seeds\(\): labels: expected 1, 0 or -1 \(padding\), got 2"):
        click_seeds(image, points, labels * 2)
    with pytest.raises(ValueError, match=r"click_seeds\(\): labels: expected shape \(2,\), .* got \(1,\)"):
        click_seeds(image, points, labels[:1])
    with pytest.raises(ValueError, match=r"click_seeds\(\): points: expected shape .* got \(2, 3\)"):
        click_seeds(image, np.zeros((2, 3)), labels)
    with pytest.raises(ValueError, match=r"click_seeds\(\): box: expected shape \(2, 2\), got \(4,\)"):
        click_seeds(image, points // 2, labels, box=np.zeros(4))
    with pytest.raises(ValueError, match=r"mask_seeds\(\): labels: expected shape \(2,\), .* got None"):
        mask_prompt(image, image > 0, points=points // 2)
    with pytest.raises(ValueError, match=r"mask_seeds\(\): labels: expected shape \('K',\), got \(2, 2\)"):
        mask_prompt(image, image > 0, points=np.zeros((2, 2, 2)), labels=np.ones((2, 2)))


def test_clicks_win_over_the_mask(rng):
    image = rng.standard_normal((30, 40)).astype(np.float32)
    mask = np.zeros(image.shape, bool)
    mask[5:25, 5:25] = True
    points, labels = np.array([[15, 15], [15, 38]]), np.array([0, 1])
    x = mask_prompt(image, mask, points=points, labels=labels)
    assert x[15, 15] == x[13, 15] == 0
    assert x[15, 38] == x[17, 38] == 1
    tensors = mask_prompt(
        *map(torch.from_numpy, (image, mask)), points=torch.from_numpy(points), labels=labels
    )
    assert torch.equal(tensors, torch.from_numpy(x))


def test_click_prompt_of_classes_equals_single_calls(rng):
    image = rng.standard_normal((2, 8, 20, 24)).astype(np.float32)
    points = rng.integers(0, 8, (2, 3, 4, 3))
    labels = rng.integers(-1, 2, (2, 3, 4))
    labels[..., 0], labels[..., 1] = 1, 0
    got = click_prompt(image, points, labels)
    assert got.shape == (2, 3, 8, 20, 24)
    assert np.array_equal(got[1, 2], click_prompt(image[1], points[1, 2], labels[1, 2]))


def test_click_prompt_on_left_atrium(la_case):
    """One click in the middle of the atrium and its box find most of it."""
    image, truth = la_case[0][::2, ::2, ::2], la_case[1][::2, ::2, ::2] > 0
    depth = ndimage.distance_transform_edt(truth)
    middle = np.array([np.unravel_index(depth.argmax(), depth.shape)])
    voxels = np.argwhere(truth)
    box = np.stack([voxels.min(0), voxels.max(0)])
    x, info = click_prompt(image, middle, np.array([1]), box=box, return_info=True)
    print(f"left atrium, one click and a box: Dice {dice(x > 0.5, truth):.3f}, {info.iterations} iterations")
    assert dice(x > 0.5, truth) > 0.6
