# SPDX-License-Identifier: Apache-2.0
"""Distances and components against SciPy, edt, cc3d and scikit-image, on made-up and on real masks."""

from __future__ import annotations

import cc3d
import edt as edt_package
import numpy as np
import pytest
import torch
from cases import organ
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage
from skimage import measure

from semisam import masks

CUBE = np.ones((3, 3, 3), int)
CROSS = ndimage.generate_binary_structure(3, 1)
EDGES = ndimage.generate_binary_structure(3, 2)
AROUND = {6: CROSS, 18: EDGES, 26: CUBE}


def spiral(n):
    """A one-voxel-wide path that winds to the middle of a square: one component, far to walk."""
    m = np.zeros((n, n), np.uint8)
    y, x, dy, dx = 0, 0, 0, 1
    m[0, 0] = 1
    for step in [n - 1, *(k for k in range(n - 1, 0, -2) for _ in range(2))]:
        for _ in range(step):
            y, x = y + dy, x + dx
            m[y, x] = 1
        dy, dx = dx, -dy
    return m


def kinds(shape, seed=0):
    """(name, mask) of everything that has gone wrong somewhere."""
    rng = np.random.default_rng(seed)
    grid = np.indices(shape).sum(0)
    yield "empty", np.zeros(shape, bool)
    yield "full", np.ones(shape, bool)
    for p in (0.02, 0.2, 0.5, 0.95):
        yield f"noise {p}", rng.random(shape) < p
    yield "checkerboard", grid % 2 == 0
    yield "every third", grid % 3 == 0
    yield "planes", np.broadcast_to((np.arange(shape[0]) % 2 == 0)[:, None, None], shape).copy()
    yield "columns", np.broadcast_to(np.arange(shape[-1]) % 5 != 0, shape).copy()
    hole = np.ones(shape, bool)
    hole[tuple(rng.integers(0, shape))] = False
    yield "one hole", hole
    yield "one voxel", ~hole
    yield "blobs", ndimage.gaussian_filter(rng.standard_normal(shape), 2) > 0


SHAPES = [(1, 1, 7), (1, 9, 1), (5, 1, 1), (1, 30, 41), (2, 2, 2), (7, 33, 65), (9, 8, 130), (40, 12, 31)]


# ---- distances ----------------------------------------------------------------------------------


def scipy_squares(mask, spacing=None, border=False):
    """Exact-as-float64-can-be squares; SciPy calls a mask without background undefined: here inf."""
    m = np.pad(mask, 1) if border else mask
    if m.all():
        return np.full(mask.shape, np.inf)
    d2 = ndimage.distance_transform_edt(m, sampling=spacing) ** 2
    return d2[tuple(slice(1, -1) for _ in mask.shape)] if border else d2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("border", [False, True])
def test_edt_is_scipys(shape, border):
    for name, mask in kinds(shape):
        expected = np.round(scipy_squares(mask, border=border))
        got = masks.edt(mask[None], squared=True, border=border)[0]
        np.testing.assert_array_equal(got, expected.astype(np.float32), name)
        root = masks.edt(mask[None], border=border)[0]
        np.testing.assert_array_equal(root, np.sqrt(got), name)


@pytest.mark.parametrize(
    "spacing", [(2.5, 0.7, 1.1), (0.1, 1.0, 10.0), (6.5, 0.6875, 0.6875), (3.0, 3.0, 3.0)]
)
@pytest.mark.parametrize("border", [False, True])
def test_edt_with_spacing_is_scipys(spacing, border):
    for shape in SHAPES:
        for name, mask in kinds(shape, 1):
            expected = scipy_squares(mask, spacing, border)
            got = masks.edt(mask[None], spacing, squared=True, border=border)[0]
            # three roundings to nearest in float32: 3 x 2^-24
            np.testing.assert_allclose(got, expected, rtol=1.8e-7, atol=0, err_msg=name)


@pytest.mark.parametrize("shape", [(1, 1, 1000), (1, 300, 290), (400, 3, 2), (2, 700, 5), (120, 100, 190)])
def test_edt_beyond_16_bit_squares(shape):
    for hole in ([0, 0, 0], [n // 3 for n in shape]):
        mask = np.ones(shape, np.uint8)
        mask[tuple(hole)] = 0
        at = np.indices(shape, sparse=True)
        expected = sum((a - h) ** 2 for a, h in zip(at, hole, strict=True))
        got, index = masks.edt(mask[None], squared=True, return_indices=True)
        np.testing.assert_array_equal(got[0], expected)
        assert (index == np.ravel_multi_index(hole, shape)).all()
        step = (1.5, 1.0, 0.5)
        expected = sum((s * (a - h)) ** 2 for s, a, h in zip(step, at, hole, strict=True))
        np.testing.assert_allclose(masks.edt(mask[None], step, squared=True)[0], expected, rtol=1.8e-7)


def test_edt_far_from_scattered_background():
    """Rows beyond the bounded search, whose nearest rows differ from column to column."""
    rng = np.random.default_rng(3)
    for shape in [(150, 140, 70), (300, 9, 160), (3, 250, 333)]:
        for holes in (2, 7, 40):
            mask = np.ones(shape, bool)
            mask[tuple(rng.integers(0, n, holes) for n in shape)] = False
            expected = np.round(scipy_squares(mask))
            np.testing.assert_array_equal(masks.edt(mask[None], squared=True)[0], expected)
            expected = scipy_squares(mask, (0.9, 1.0, 1.3))
            got = masks.edt(mask[None], (0.9, 1.0, 1.3), squared=True)[0]
            np.testing.assert_allclose(got, expected, rtol=1.8e-7)


def first_nearest(mask, border):
    """By looking at all pairs: the first of the nearest background voxels, -1 for the outside."""
    voxels = np.argwhere(np.ones(mask.shape, bool))
    zeros = np.argwhere(~mask)
    out = np.minimum(voxels + 1, np.array(mask.shape) - voxels).min(1) ** 2
    if not len(zeros):
        return np.full(mask.shape, -1)
    d2 = ((voxels[:, None] - zeros[None]) ** 2).sum(-1)
    index = np.ravel_multi_index(zeros[d2.argmin(1)].T, mask.shape)
    outside = (out <= d2.min(1)) & mask.ravel() & border
    return np.where(outside, -1, index).reshape(mask.shape)


@pytest.mark.parametrize("border", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 9), (1, 11, 9), (9, 7, 8), (3, 4, 40), (20, 3, 5)])
def test_edt_indices_are_the_first_nearest(shape, border):
    for name, mask in kinds(shape, 2):
        _, index = masks.edt(mask[None], return_indices=True, border=border)
        np.testing.assert_array_equal(index[0], first_nearest(mask, border), name)


def test_edt_indices_lead_to_the_distance():
    for _, mask in kinds((30, 40, 50), 4):
        spacing = np.array([2.0, 1.0, 0.7])
        distance, index = masks.edt(mask[None], spacing, return_indices=True)
        if mask.all():
            assert (index == -1).all()
            assert np.isposinf(distance).all()
            continue
        assert not mask.ravel()[index[0]].any()
        apart = np.array(np.unravel_index(index[0], mask.shape)) - np.indices(mask.shape)
        length = np.sqrt(((apart * spacing[:, None, None, None]) ** 2).sum(0))
        np.testing.assert_allclose(distance[0], length, rtol=3e-7)


@given(
    hnp.arrays(np.bool_, hnp.array_shapes(min_dims=3, max_dims=3, max_side=24)),
    st.tuples(*[st.floats(0.05, 20)] * 3),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_edt_properties(mask, spacing, border):
    got = masks.edt(mask[None], spacing, squared=True, border=border)[0]
    np.testing.assert_allclose(got, scipy_squares(mask, spacing, border), rtol=1.8e-7)
    assert ((got == 0) == ~mask).all()
    # flips and transposes of the mask are those of the distance: to rounding, as sums change order
    turned = masks.edt(
        mask.transpose(2, 0, 1)[None, ::-1], (spacing[2], *spacing[:2]), squared=True, border=border
    )
    np.testing.assert_allclose(turned[0, ::-1], got.transpose(2, 0, 1), rtol=4e-7)


def test_edt_of_the_half_radius_cube():
    """All true with the border as background: the largest distance is 64, in a 2 x 2 x 2 core."""
    d2 = masks.edt(np.ones((1, 128, 128, 128), bool), squared=True, border=True)[0]
    assert d2.max() == 64**2
    assert (d2 == 64**2).sum() == 8
    inner = 4 * d2 > 64**2
    assert inner.sum() == 64**3
    assert inner[32:96, 32:96, 32:96].all()


def test_edt_on_real_labels(la_case, hippocampus_cases, acdc_volumes):
    label = la_case[1]
    expected = np.round(scipy_squares(label != 0))
    np.testing.assert_array_equal(masks.edt(label[None], squared=True)[0], expected)
    np.testing.assert_allclose(masks.edt(label[None])[0], edt_package.edt(label), rtol=1e-6)
    for _, label, spacing in hippocampus_cases[:4]:
        got = masks.edt((label == 1)[None], spacing, border=True)[0]
        np.testing.assert_allclose(got, np.sqrt(scipy_squares(label == 1, spacing, True)), rtol=2e-7)
    for _, label in acdc_volumes[:3]:
        mask = label == 3
        got = masks.edt(mask, (1.5, 1.3), squared=True, spatial_dims=2)
        for d2, m in zip(got, mask, strict=True):
            np.testing.assert_allclose(d2, scipy_squares(m, (1.5, 1.3)), rtol=1.8e-7)


# ---- components ---------------------------------------------------------------------------------


def in_c_order(labels):
    """The same partition, numbered by first voxels."""
    values, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    order = np.argsort(np.where(values == 0, -1, first))
    number = np.empty(len(values), int)
    number[order] = np.arange(len(values)) + (0 if 0 in values else 1)
    return number[inverse].reshape(labels.shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("connectivity", [6, 18, 26])
def test_components_are_scipys(shape, connectivity):
    for name, mask in kinds(shape):
        expected, count = ndimage.label(mask, AROUND[connectivity])
        labels, counts, sizes = masks.components(mask[None], connectivity, return_sizes=True)
        np.testing.assert_array_equal(labels[0], in_c_order(expected), name)
        assert labels.dtype == np.int32
        assert counts.tolist() == [count]
        np.testing.assert_array_equal(sizes[0], np.bincount(labels.ravel())[1:])


@pytest.mark.parametrize("connectivity", [6, 18, 26])
def test_components_are_cc3ds_and_skimages(connectivity):
    rng = np.random.default_rng(5)
    for shape in [(7, 33, 65), (40, 12, 31), (3, 20, 129)]:
        for p in (0.05, 0.3, 0.8):
            image = (rng.integers(1, 4, shape) * (rng.random(shape) < p)).astype(np.uint16)
            labels = masks.components(image[None], connectivity)[0][0]
            expected = cc3d.connected_components(image != 0, connectivity=connectivity)
            np.testing.assert_array_equal(labels, in_c_order(expected))
            by_value = masks.components(image[None], connectivity, by_value=True)[0][0]
            expected = cc3d.connected_components(image, connectivity=connectivity)
            np.testing.assert_array_equal(by_value, in_c_order(expected))
            level = {6: 1, 18: 2, 26: 3}[connectivity]
            expected = measure.label(image, background=0, connectivity=level)
            np.testing.assert_array_equal(by_value, in_c_order(expected))


def test_components_of_touching_values():
    """Runs of different values end at the same column and meet diagonally on both sides."""
    image = np.array([[1, 1, 2, 2], [2, 2, 1, 1]])
    assert masks.components(image, 4, by_value=True).labels.tolist() == [[1, 1, 2, 2], [3, 3, 4, 4]]
    assert masks.components(image, 8, by_value=True).labels.tolist() == [[1, 1, 2, 2], [2, 2, 1, 1]]


@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint16, np.int32, np.uint64, np.int64])
def test_components_of_every_integer(dtype):
    rng = np.random.default_rng(6)
    image = rng.integers(0, 3, (2, 6, 7, 70)).astype(dtype)
    for by_value in (False, True):
        expected = np.stack(
            [in_c_order(cc3d.connected_components(v.astype(np.uint8) if by_value else v != 0)) for v in image]
        )
        np.testing.assert_array_equal(masks.components(image, by_value=by_value).labels, expected)
    if np.iinfo(dtype).min < 0 if dtype is not bool else False:
        np.testing.assert_array_equal(
            masks.components(-image, by_value=True).labels, masks.components(image, by_value=True).labels
        )


def test_components_of_a_spiral():
    m = spiral(61)
    assert masks.components(m, 4).count == 1
    assert masks.components(1 - m, 4).count == 1
    assert masks.components(np.stack([m, m.T, m[::-1]]), 8, spatial_dims=2).count.tolist() == [1, 1, 1]
    tower = np.stack([m, np.zeros_like(m), m])
    assert masks.components(tower[None], 26).count.tolist() == [2]


@given(
    hnp.arrays(np.uint8, hnp.array_shapes(min_dims=3, max_dims=3, max_side=40), elements=st.integers(0, 2)),
    st.sampled_from([6, 18, 26]),
)
@settings(max_examples=150, deadline=None)
def test_components_properties(image, connectivity):
    mask = image == 1
    labels, count, sizes = masks.components(mask[None], connectivity, return_sizes=True)
    np.testing.assert_array_equal(labels[0], in_c_order(ndimage.label(mask, AROUND[connectivity])[0]))
    assert sizes.sum() == mask.sum()
    assert count[0] == labels.max()
    kept = masks.largest_component(mask[None], connectivity)[0]
    assert kept.sum() == (sizes.max() if count[0] else 0)
    if count[0]:
        np.testing.assert_array_equal(kept, labels[0] == 1 + sizes[0].argmax())
    for least in (1, 2, 5):
        np.testing.assert_array_equal(
            masks.remove_small(mask[None], least, connectivity)[0],
            np.concatenate([[False], sizes[0] >= least])[labels[0]],
        )


def test_largest_of_equals_is_the_first_in_c_order():
    """The second component starts in an earlier bundle of rows, but at a later voxel."""
    m = np.zeros((1, 4, 6, 6), np.uint8)
    m[0, 1, 0, 0:2] = 200  # plane 1, row 0: C order last
    m[0, 0, 4, 4:6] = 100  # plane 0, row 4: C order first
    assert masks.components(m).labels[0, 0, 4, 4] == 1
    kept = masks.largest_component(m)
    assert kept[0, 0, 4, 4:6].tolist() == [100, 100]
    assert kept.sum() == 200
    assert masks.remove_small(m, 2).sum() == m.sum()
    assert masks.remove_small(m, 3).sum() == 0
    assert masks.remove_small(m, 2**70).sum() == 0


def test_components_on_real_labels(la_case, hippocampus_cases, acdc_volumes):
    label = la_case[1]
    expected = cc3d.connected_components(label, connectivity=26)
    np.testing.assert_array_equal(masks.components(label[None]).labels[0], in_c_order(expected))
    sizes = np.bincount(expected.ravel())
    sizes[0] = 0
    largest = np.where(expected == sizes.argmax(), label, 0)
    np.testing.assert_array_equal(masks.largest_component(label[None])[0], largest)
    for _, label, _ in hippocampus_cases:
        got = masks.components(label[None], 6, by_value=True).labels[0]
        expected = cc3d.connected_components(label, connectivity=6)
        np.testing.assert_array_equal(got, in_c_order(expected))
    for _, label in acdc_volumes:
        got = masks.components(label, 8, by_value=True, spatial_dims=2).labels
        for g, m in zip(got, label, strict=True):
            np.testing.assert_array_equal(g, in_c_order(measure.label(m, connectivity=2)))


# ---- both ---------------------------------------------------------------------------------------


def test_torch_in_torch_out():
    m = torch.from_numpy(organ(np.random.default_rng(8), (20, 24, 28), 0.3))[None]
    distance, index = masks.edt(m.bool(), (1.0, 2.0, 1.0), return_indices=True)
    assert distance.dtype == torch.float32
    assert index.dtype == torch.int64
    labels, count, sizes = masks.components(m, return_sizes=True)
    assert (labels.dtype, count.dtype, sizes.dtype) == (torch.int32, torch.int64, torch.int64)
    assert sizes.sum() == m.sum()
    assert masks.largest_component(m).dtype == torch.uint8
    nowhere = masks.components(torch.zeros(2, 1, 3, 4, dtype=torch.uint8), return_sizes=True)
    assert nowhere.count.tolist() == [0, 0]
    assert nowhere.sizes.shape == (2, 0)
    assert torch.equal(masks.edt(m.transpose(1, 3)), masks.edt(m.transpose(1, 3).contiguous()))


def test_two_dimensions_are_one_plane():
    rng = np.random.default_rng(9)
    m = rng.random((5, 20, 33)) < 0.8
    flat, step = masks.edt(m, spatial_dims=2), masks.edt(m, (2.0, 0.5), spatial_dims=2)
    np.testing.assert_array_equal(flat, masks.edt(m[:, None])[:, 0])
    np.testing.assert_array_equal(step, masks.edt(m[:, None], (7.0, 2.0, 0.5))[:, 0])
    for got, plane in zip(masks.edt(m, border=True, spatial_dims=2), m, strict=True):
        np.testing.assert_allclose(got, np.sqrt(scipy_squares(plane, border=True)), rtol=1e-7)
        np.testing.assert_array_equal(got, masks.edt(plane, border=True))
    labels = masks.components(m, spatial_dims=2).labels
    np.testing.assert_array_equal(labels, masks.components(m[:, None]).labels[:, 0])
    assert masks.largest_component(m, 4, spatial_dims=2).shape == m.shape


def test_three_dimensions_are_a_volume():
    """The trap that a batch of 2-D images would be: a volume is never taken for its slices."""
    m = np.zeros((3, 5, 5), bool)
    m[1, 1:4, 1:4] = True
    m[2, 2, 2] = True
    np.testing.assert_array_equal(masks.edt(m), masks.edt(m[None])[0])
    assert masks.edt(m).max() == 1
    assert masks.components(m).count.shape == ()
    assert masks.components(m, return_sizes=True).sizes.tolist() == [10]
    assert masks.components(m[None, None]).count.shape == (1, 1)


def test_a_batch_is_its_images():
    rng = np.random.default_rng(10)
    m = (rng.random((4, 9, 30, 40)) < [[[[0.9]]], [[[0.0]]], [[[1.1]]], [[[0.1]]]]).astype(np.uint8)
    alone = [masks.edt(v[None], return_indices=True) for v in m]
    distance, index = masks.edt(m, return_indices=True)
    np.testing.assert_array_equal(distance, np.concatenate([d for d, _ in alone]))
    np.testing.assert_array_equal(index, np.concatenate([i for _, i in alone]))
    labels = np.concatenate([masks.components(v[None]).labels for v in m])
    np.testing.assert_array_equal(masks.components(m).labels, labels)
    kept = np.concatenate([masks.largest_component(v[None]) for v in m])
    np.testing.assert_array_equal(masks.largest_component(m), kept)


ONE = np.ones((1, 4, 4, 4), np.uint8)
BAD = [
    (
        lambda: masks.edt(ONE[0, 0, 0]),
        ValueError,
        r"edt\(\): expected shape \[\*batch, D, H, W\] or \[H, W\], got \(4,\)",
    ),
    (
        lambda: masks.edt(ONE.tolist()),
        TypeError,
        r"edt\(\): expected a NumPy array or torch tensor, got list",
    ),
    (
        lambda: masks.edt(ONE.astype(np.float32)),
        TypeError,
        r"edt\(\): mask: expected dtype bool, u8, got f32",
    ),
    (
        lambda: masks.edt(ONE[:0]),
        ValueError,
        r"edt\(\): mask: expected at least one element, got shape \(0, 4, 4, 4\)",
    ),
    (
        lambda: masks.edt(ONE, 0.0),
        ValueError,
        r"edt\(\): spacing: expected positive numbers .*, got \(0, 0, 0\)",
    ),
    (
        lambda: masks.edt(ONE, (1, -1, 1)),
        ValueError,
        r"edt\(\): spacing: expected positive numbers .*, got \(1, -1, 1\)",
    ),
    (
        lambda: masks.edt(ONE, (1, 1, np.nan)),
        ValueError,
        r"edt\(\): spacing: expected positive numbers .*nan\)",
    ),
    (lambda: masks.edt(ONE, np.inf), ValueError, r"edt\(\): spacing: expected positive numbers .*inf"),
    (lambda: masks.edt(ONE, (1, 1)), ValueError, r"edt\(\): spacing: expected one number or 3, got \(1, 1\)"),
    (lambda: masks.edt(ONE, "wide"), ValueError, r"edt\(\): spacing: expected one number or 3, got 'wide'"),
    (lambda: masks.edt(ONE, (1, None, object())), TypeError, r"edt\(\): spacing: expected numbers, got"),
    (
        lambda: masks.edt(np.ones((1, 1, 20000), bool)),
        ValueError,
        r"edt\(\): mask: expected sides of at most 16384, got \(1, 1, 20000\)",
    ),
    (
        lambda: masks.components(ONE, 8),
        ValueError,
        r"components\(\): connectivity: expected 6, 18 or 26 .*, got 8",
    ),
    (
        lambda: masks.components(ONE[0, 0], 6),
        ValueError,
        r"components\(\): connectivity: expected 4 or 8 .*, got 6",
    ),
    (
        lambda: masks.components(ONE * 0.5),
        TypeError,
        r"components\(\): image: expected dtype bool, .*, got f64",
    ),
    (
        lambda: masks.largest_component(ONE, 4),
        ValueError,
        r"largest_component\(\): connectivity: expected 6, 18 or 26",
    ),
    (
        lambda: masks.largest_component(ONE[0, 0], spatial_dims=3),
        ValueError,
        r"largest_component\(\): expected shape .*, got \(4, 4\)",
    ),
    (
        lambda: masks.remove_small(ONE, 0),
        ValueError,
        r"remove_small\(\): min_size: expected at least 1 voxel, got 0",
    ),
    (
        lambda: masks.remove_small(ONE, 2.5),
        TypeError,
        r"remove_small\(\): min_size: expected an integer, got float",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[m[:60] for _, _, m in BAD])
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
