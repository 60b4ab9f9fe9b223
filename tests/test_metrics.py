# SPDX-License-Identifier: Apache-2.0
"""Metrics against SciPy, MONAI and surface-distance, hand-made cases, laws, and bad input."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from cases import _perturbed
from hypothesis import given, settings
from hypothesis import strategies as st

import semisam
from semisam import metrics, ops

ndimage = pytest.importorskip("scipy.ndimage")

# float64 against float64: distances are the same products and sums, means add in another order.
EXACT = {"rtol": 1e-12, "atol": 1e-12}
# MONAI rounds distances to float32 and takes percentiles in float32: rank 0.95 n is off by 1e-7 n
# places, which moves an interpolated value by about 1e-3 of the gap between neighbours.
MONAI = {"rtol": 2e-6, "atol": 2e-3}


def surface(m):
    return m & ~ndimage.binary_erosion(m)


def distances(a, g, spacing=None):
    """Both lists of surface distances, in SciPy; medpy's definition."""
    a, g = surface(a.astype(bool)), surface(g.astype(bool))
    return (
        ndimage.distance_transform_edt(~g, sampling=spacing)[a],
        ndimage.distance_transform_edt(~a, sampling=spacing)[g],
    )


def expected(a, g, spacing=None, tolerance=1.0):
    da, dg = distances(a, g, spacing)
    both = np.concatenate([da, dg])
    return {
        "dice": 2 * (a & g).sum() / (a.sum() + g.sum()),
        "jaccard": (a & g).sum() / (a | g).sum(),
        "hd": both.max(),
        "hd95": np.percentile(both, 95),
        "asd": da.mean(),
        "assd": (da.mean() + dg.mean()) / 2,
        "nsd": (both.astype(np.float32) <= np.float32(tolerance)).mean(),
    }


def check(a, g, spacing=None, tolerance=1.0):
    got = metrics.evaluate_case(a.astype(np.uint8), g.astype(np.uint8), 2, spacing, [tolerance])[1]
    for name, value in expected(a.astype(bool), g.astype(bool), spacing, tolerance).items():
        np.testing.assert_allclose(got[name], value, **EXACT, err_msg=name)


def blob(rng, shape, smooth=2.0):
    m = ndimage.gaussian_filter(rng.normal(size=shape), smooth) > 0
    m[tuple(n // 2 for n in shape)] = True  # never empty
    return m


def one_hot(label, classes):
    return torch.from_numpy(np.stack([label == c for c in range(classes)])[None].astype(np.float32))


@pytest.fixture
def monai_metrics():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield pytest.importorskip("monai.metrics")


# ---- hand-made ----------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("definition", ["pooled", "monai", "deepmind"])
@pytest.mark.parametrize("side", [8, 10])
def test_cube_shifted_by_5(axis, definition, side):
    # More than 5 % of each surface is the end face, all of it 5 away from the other cube.
    y = np.zeros((1, 1, 40, 40, 40), np.uint8)
    y[..., 10 : 10 + side, 10 : 10 + side, 10 : 10 + side] = 1
    moved = np.roll(y, 5, axis + 2)
    spacing = [0.5, 1.0, 3.0]
    assert metrics.hd95(moved, y, num_classes=2, definition=definition).item() == 5
    scaled = metrics.hd95(moved, y, num_classes=2, definition=definition, spacing=spacing)
    assert scaled.item() <= 5 * spacing[axis]
    same = metrics.hd95(moved, y, num_classes=2, definition=definition, spacing=2.5)
    assert same.item() == 12.5
    got = metrics.dice(moved, y, num_classes=2, include_background=False).item()
    assert math.isclose(got, 1 - 5 / side, rel_tol=1e-15)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_plate_shifted_along_each_axis_scales_with_its_spacing(axis):
    y = np.zeros((1, 1, 30, 30, 30), np.uint8)
    y[(..., *(7 if k == axis else slice(None) for k in range(3)))] = 1
    spacing = [0.7, 1.1, 2.9]
    for definition in ("pooled", "monai", "deepmind"):
        got = metrics.compute_all(np.roll(y, 5, axis + 2), y, 2, spacing, definition=definition)
        for name in ("hd", "hd95", "asd", "assd"):
            # In "deepmind" a plate one voxel thick has two faces, 4 and 5 away, and rims.
            if definition != "deepmind":
                assert got[name].item() == pytest.approx(5 * spacing[axis], rel=1e-15)
        assert got["hd"].item() == pytest.approx(5 * spacing[axis], rel=1e-15)


def test_square_shifted_by_20_rows_is_20_away():
    """D-23: a published "95HD" compares rows as vectors and scores this 0.0."""
    y = np.zeros((1, 1, 64, 64), np.uint8)
    y[..., 8:24, 20:36] = 1
    moved = np.roll(y, 20, 2)
    rows = {tuple(r) for r in moved[0, 0]}
    assert {tuple(r) for r in y[0, 0]} == rows  # which is why: the sets of rows are equal
    for definition in ("pooled", "monai", "deepmind"):
        assert metrics.hd95(moved, y, num_classes=2, definition=definition).item() == 20
    assert metrics.hausdorff_distance(moved, y, num_classes=2).item() == 20


def test_single_voxels_and_percentile_between_ties():
    a = np.zeros((1, 1, 1, 30), np.uint8)
    a[..., 3] = 1
    b = np.zeros_like(a)
    b[..., [3, 7, 13]] = 1
    # a -> b: 0; b -> a: 0, 4, 10. Pooled: 0 0 4 10; rank 0.95 * 3 = 2.85.
    assert metrics.hd95(a, b, num_classes=2).item() == pytest.approx(4 + 0.85 * 6)
    # Directed: 0, and of 0 4 10 at rank 1.9: 4 + 0.9 * 6.
    assert metrics.hd95(a, b, num_classes=2, definition="monai").item() == pytest.approx(9.4)
    run = metrics.hausdorff_distance
    assert run(a, b, num_classes=2).item() == 10
    assert run(a, b, num_classes=2, directed=True).item() == 0
    assert run(b, a, num_classes=2, directed=True, percentile=50).item() == 4
    assd = metrics.average_surface_distance
    assert assd(b, a, num_classes=2).item() == pytest.approx(14 / 3)
    assert assd(b, a, num_classes=2, symmetric=True).item() == pytest.approx(14 / 6)
    assert assd(b, a, num_classes=2, symmetric=True, definition="monai").item() == pytest.approx(14 / 4)
    near = metrics.normalized_surface_dice
    assert [near(a, b, [t], num_classes=2).item() for t in (0, 3.9, 4, 10)] == [0.5, 0.5, 0.75, 1.0]


def test_three_voxels_of_a_tenth_are_within_three_tenths():
    a = np.zeros((1, 1, 9, 9), np.uint8)
    a[..., 1, 4] = 1
    got = metrics.normalized_surface_dice(np.roll(a, 3, 2), a, [0.3], num_classes=2, spacing=0.1)
    assert got.item() == 1  # though 3 * 0.1 > 0.3


# ---- against others -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(31, 70), (1, 5), (19, 23, 17), (9, 1, 12), (3, 4, 150)])
@pytest.mark.parametrize("spacing", [None, 1.0, "axes"])
def test_pooled_against_scipy(shape, spacing, rng):
    if spacing == "axes":
        spacing = [0.6, 1.25, 3.0][: len(shape)]
    for smooth in (0.5, 2.0):
        check(blob(rng, shape, smooth), blob(rng, shape, smooth), spacing)


def test_far_apart_and_sparse_against_scipy(rng):
    a = np.zeros((70, 60, 80), bool)
    g = np.zeros_like(a)
    a[:4, :5, :6] = True
    g[60:, 50:, 66:] = blob(rng, (10, 10, 14), 1.0)
    check(a, g, [1.0, 0.3, 2.0])
    check(rng.random(a.shape) < 3e-4, rng.random(a.shape) < 3e-4)
    ball = sum(
        ((np.arange(n) - n / 2) ** 2).reshape([-1 if k == d else 1 for k in range(3)])
        for d, n in enumerate(a.shape)
    )
    check(ball < 9, (ball > 600) & (ball < 800))  # every point of the shell is about as near


def test_real_atrium_against_scipy_and_monai(la_case, rng, monai_metrics):
    y = la_case[1]
    pred = _perturbed(rng, y)
    check(pred.astype(bool), y.astype(bool), 0.625, 1.25)
    compare_with_monai(monai_metrics, pred, y, 2, [1.3, 1.0, 0.6], [2.0])


def test_real_hippocampus(hippocampus_cases, rng, monai_metrics):
    for _, y, spacing in hippocampus_cases[:3]:
        pred = np.roll(y, rng.integers(-2, 3, 3), (0, 1, 2))
        got = metrics.evaluate_case(pred, y, 3, spacing, [1.0, 1.0])
        assert list(got) == [1, 2]
        for c in (1, 2):
            for name, value in expected(pred == c, y == c, spacing).items():
                np.testing.assert_allclose(got[c][name], value, **EXACT, err_msg=name)
        compare_with_monai(monai_metrics, pred, y, 3, list(spacing), [1.0, 2.0])


def test_real_heart(acdc_volumes, rng, monai_metrics):
    for _, y in acdc_volumes[:2]:
        pred = np.where(rng.random(y.shape) < 0.01, 0, np.roll(y, 3, 2)).astype(np.uint8)
        compare_with_monai(monai_metrics, pred, y, 4, [10.0, 1.4, 1.4], [2.0, 2.0, 3.0])
        got = metrics.evaluate_case(pred, y, 4, [10.0, 1.4, 1.4], [2.0, 2.0, 2.0])
        for c in (1, 2, 3):
            for name, value in expected(pred == c, y == c, [10.0, 1.4, 1.4], 2.0).items():
                np.testing.assert_allclose(got[c][name], value, **EXACT, err_msg=name)


def compare_with_monai(m, pred, y, classes, spacing, thresholds):
    p, t = one_hot(pred, classes), one_hot(y, classes)
    ours = {"num_classes": classes, "definition": "monai", "spacing": spacing}
    a, b = torch.from_numpy(pred[None, None].copy()), torch.from_numpy(y[None, None].copy())
    for percentile, directed in itertools.product((None, 95, 50), (False, True)):
        theirs = m.compute_hausdorff_distance(p, t, percentile=percentile, directed=directed, spacing=spacing)
        got = metrics.hausdorff_distance(a, b, percentile=percentile, directed=directed, **ours)
        np.testing.assert_allclose(got, theirs, **MONAI)
    for symmetric in (False, True):
        theirs = m.compute_average_surface_distance(p, t, symmetric=symmetric, spacing=spacing)
        got = metrics.average_surface_distance(a, b, symmetric=symmetric, **ours)
        np.testing.assert_allclose(got, theirs, rtol=1e-5)  # a float32 mean
    theirs = m.compute_surface_dice(p, t, thresholds, spacing=spacing)
    np.testing.assert_allclose(metrics.normalized_surface_dice(a, b, thresholds, **ours), theirs, rtol=1e-6)
    np.testing.assert_allclose(metrics.dice(a, b, num_classes=classes), m.compute_dice(p, t), rtol=1e-6)
    # The same from masks, and the elements of "deepmind" from MONAI's subvoxel mode.
    masks = {**ours, "num_classes": None}
    np.testing.assert_array_equal(
        metrics.hausdorff_distance(p, t, percentile=95, **masks),
        metrics.hausdorff_distance(a, b, percentile=95, **ours),
    )
    theirs = m.compute_surface_dice(p, t, thresholds, spacing=spacing, use_subvoxels=True)
    got = metrics.normalized_surface_dice(p, t, thresholds, spacing=spacing, definition="deepmind")
    np.testing.assert_allclose(got, theirs, rtol=1e-5)


@pytest.mark.parametrize("shape", [(2, 3, 33, 40), (2, 2, 12, 14, 19)])
def test_monai_on_blobs(shape, rng, monai_metrics):
    b, c, *size = shape
    p = np.stack([[blob(rng, size, 1.5) for _ in range(c)] for _ in range(b)])  # masks may overlap
    t = np.stack([[blob(rng, size, 1.5) for _ in range(c)] for _ in range(b)])
    spacing = [[1.5, 0.7, 0.9][: len(size)], [0.4, 1.2, 2.0][: len(size)]]
    tp, tt = torch.from_numpy(p).float(), torch.from_numpy(t).float()
    for background in (False, True):
        near = [1.0, 2.0, 0.6][: c - (not background)]
        kw = {"include_background": background, "spacing": spacing}
        theirs = monai_metrics.compute_hausdorff_distance(tp, tt, percentile=90, **kw)
        got = metrics.hausdorff_distance(tp, tt, percentile=90, definition="monai", **kw)
        np.testing.assert_allclose(got, theirs, **MONAI)
        theirs = monai_metrics.compute_surface_dice(tp, tt, near, **kw)
        got = metrics.normalized_surface_dice(p, t, near, definition="monai", **kw)
        np.testing.assert_allclose(got, theirs, rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "spacing"), [((40, 31), (0.7, 1.3)), ((17, 21, 26), (2.0, 0.7, 1.1)), ((15, 15, 15), (1, 1, 1))]
)
def test_deepmind_against_surface_distance(shape, spacing, rng):
    package = pytest.importorskip("surface_distance")
    if not hasattr(ndimage, "filters"):
        pytest.skip("this surface-distance needs scipy.ndimage.filters")
    for smooth in (0.7, 2.0):
        a, g = blob(rng, shape, smooth), blob(rng, shape, smooth)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            d = package.compute_surface_distances(g, a, spacing)
        args = (a[None, None], g[None, None])
        kw = {"spacing": spacing, "definition": "deepmind", "include_background": True}
        for p in (50, 95, 100):
            got = metrics.hausdorff_distance(*args, percentile=p, **kw).item()
            assert got == pytest.approx(package.compute_robust_hausdorff(d, p), rel=1e-12)
        back, forth = package.compute_average_surface_distance(d)
        assert metrics.average_surface_distance(*args, **kw).item() == pytest.approx(forth, rel=1e-12)
        both = metrics.average_surface_distance(*args, symmetric=True, **kw).item()
        assert both == pytest.approx((back + forth) / 2, rel=1e-12)
        for t in (0.0, 0.77, 1.77):
            got = metrics.normalized_surface_dice(*args, [t], **kw).item()
            assert got == pytest.approx(package.compute_surface_dice_at_tolerance(d, t), rel=1e-12)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.7, 0.3, 9.0), (1.0, 2.0), (0.4, 0.4)])
def test_areas_equal_the_published_table(spacing):
    tables = pytest.importorskip("surface_distance.lookup_tables")
    make = (
        tables.create_table_neighbour_code_to_surface_area
        if len(spacing) == 3
        else tables.create_table_neighbour_code_to_contour_length
    )
    np.testing.assert_allclose(metrics.surface_element_areas(spacing), make(spacing), rtol=1e-12)


def test_areas_from_geometry():
    areas = metrics.surface_element_areas((1.0, 1.0, 1.0))
    corner = math.sqrt(3) / 8  # an equilateral triangle of side sqrt(1/2)
    assert areas[0] == areas[255] == 0
    assert [areas[1 << k] for k in range(8)] == pytest.approx([corner] * 8)
    assert areas[0b10010110] == pytest.approx(4 * corner)
    assert areas[0b11110000] == pytest.approx(1)
    np.testing.assert_allclose(areas, areas[::-1])  # inside and outside share their surface
    # A box's elements: faces, edges and corners of its bevelled hull.
    measure = pytest.importorskip("skimage.measure")
    box = np.zeros((8, 9, 10), np.float32)
    box[2:6, 2:6, 2:7] = 1
    vertices, faces, *_ = measure.marching_cubes(box, 0.5)
    codes = np.zeros((9, 10, 11), int)
    for z, y, x in itertools.product((0, 1), repeat=3):
        codes = 2 * codes + np.pad(box, 1)[z : z + 9, y : y + 10, x : x + 11].astype(int)
    assert areas[codes].sum() == pytest.approx(measure.mesh_surface_area(vertices, faces), rel=1e-5)


# ---- empty masks --------------------------------------------------------------------------------


def test_empty_masks():
    y = np.zeros((3, 1, 6, 8), np.uint8)
    y[0, :, 2:4, 2:4] = 1
    pred = np.zeros_like(y)
    pred[1, :, 1:3, 3] = 1  # cases: missed, invented, rightly nothing
    for definition in ("pooled", "monai", "deepmind"):
        got = metrics.compute_all(pred, y, 2, 0.5, class_thresholds=[1.0], definition=definition)
        for name in ("dice", "jaccard", "nsd"):
            assert got[name].ravel().tolist() == [0, 0, 1]
        for name in ("hd", "hd95", "asd", "assd"):
            np.testing.assert_array_equal(got[name].ravel(), [np.nan, np.nan, 0])
        assert got["failed"].ravel().tolist() == [True, True, False]
        assert got["voxels_pred"].ravel().tolist() == [0, 2, 0]
        assert got["voxels_ref"].ravel().tolist() == [4, 0, 0]
        filled = metrics.hd95(pred, y, num_classes=2, spacing=0.5, empty="diagonal", definition=definition)
        np.testing.assert_allclose(filled.ravel(), [5, 5, 0])  # 3 x 4 in units of spacing
    per_case = metrics.hd95(pred, y, num_classes=2, spacing=[[1.0], [0.5], [2.0]], empty="diagonal")
    np.testing.assert_allclose(per_case.ravel(), [10, 5, 0])
    np.testing.assert_array_equal(
        metrics.dice(pred, y, num_classes=2, include_background=False, ignore_empty=True).ravel(),
        [0, np.nan, np.nan],
    )


def test_absent_classes_do_not_disturb_present_ones(rng):
    y = (blob(rng, (12, 13, 14)) * 2).astype(np.int16)
    pred = (blob(rng, (12, 13, 14)) * 2).astype(np.int64)
    got = metrics.evaluate_case(pred, y, 5)
    want = expected(pred == 2, y == 2)
    assert got[2]["hd95"] == pytest.approx(want["hd95"], rel=1e-12)
    assert [got[c]["hd95"] for c in (1, 3, 4)] == [0, 0, 0]


# ---- laws ---------------------------------------------------------------------------------------

seeds = st.integers(0, 2**32 - 1)
law = settings(max_examples=25, deadline=None)


def pair(seed):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 14, rng.integers(2, 4)))
    return (
        rng,
        *((ndimage.gaussian_filter(rng.normal(size=shape), 1.0) > 0.1).astype(np.uint8) for _ in range(2)),
    )


@law
@given(seeds)
def test_symmetry_and_identity(seed):
    rng, a, g = pair(seed)
    spacing = rng.uniform(0.2, 4, a.ndim)
    for definition in ("pooled", "monai", "deepmind"):
        there = metrics.evaluate_case(a, g, 2, spacing, [1.5], definition=definition)[1]
        back = metrics.evaluate_case(g, a, 2, spacing, [1.5], definition=definition)[1]
        for name in ("dice", "jaccard", "hd", "hd95", "assd", "nsd"):
            np.testing.assert_allclose(there[name], back[name], rtol=1e-14)
        if not there["failed"]:
            assert 0 <= there["hd95"] <= there["hd"]
        same = metrics.evaluate_case(a, a, 2, spacing, [0.0], definition=definition)[1]
        assert [same[k] for k in ("dice", "jaccard", "hd", "hd95", "asd", "assd", "nsd")] == [
            1,
            1,
            0,
            0,
            0,
            0,
            1,
        ]


@law
@given(seeds)
def test_jaccard_is_dice_over_two_minus_dice(seed):
    _, a, g = pair(seed)
    d, j = (
        metrics.dice(a[None, None], g[None, None], num_classes=2),
        metrics.jaccard(a[None, None], g[None, None], num_classes=2),
    )
    np.testing.assert_allclose(j, d / (2 - d), rtol=1e-14)


@law
@given(seeds)
def test_translation_and_scale(seed):
    rng, a, g = pair(seed)
    wide = [(int(rng.integers(0, 5)), int(rng.integers(0, 70))) for _ in range(a.ndim)]
    factor = float(2.0 ** rng.integers(-3, 4))  # exact in floating point
    for definition in ("pooled", "monai", "deepmind"):
        first = metrics.evaluate_case(a, g, 2, 1.5, definition=definition)[1]
        moved = metrics.evaluate_case(np.pad(a, wide), np.pad(g, wide), 2, 1.5, definition=definition)[1]
        scaled = metrics.evaluate_case(a, g, 2, 1.5 * factor, definition=definition)[1]
        for name in ("hd", "hd95", "asd", "assd"):
            np.testing.assert_allclose(moved[name], first[name], rtol=1e-13)
            np.testing.assert_allclose(scaled[name], first[name] * factor, rtol=1e-13)


@law
@given(seeds)
def test_any_pair_against_scipy(seed):
    rng, a, g = pair(seed)
    if a.any() and g.any():
        check(a.astype(bool), g.astype(bool), rng.uniform(0.2, 4, a.ndim), float(rng.uniform(0.3, 3)))


# ---- forms of input -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        bool,
        np.uint8,
        np.int8,
        np.uint16,
        np.int16,
        np.uint32,
        np.int32,
        np.uint64,
        np.int64,
        np.float16,
        np.float32,
        np.float64,
    ],
)
def test_every_dtype(kind, rng):
    a, g = blob(rng, (9, 10, 70)), blob(rng, (9, 10, 70))
    want = expected(a, g)
    got = metrics.evaluate_case(a.astype(kind), g.astype(kind), 2)[1]
    assert got["hd95"] == pytest.approx(want["hd95"], rel=1e-12)
    assert got["dice"] == pytest.approx(want["dice"], rel=1e-15)


def test_labels_and_masks_agree_and_kinds_come_back(rng):
    y, pred = rng.integers(0, 3, (2, 11, 12)), rng.integers(0, 3, (2, 11, 12))
    masks = [np.moveaxis(np.eye(3, dtype=np.float32)[v], -1, 1) for v in (pred, y)]
    for function in (metrics.dice, metrics.jaccard, metrics.hd95, metrics.average_surface_distance):
        from_labels = function(pred, y, num_classes=3)
        assert isinstance(from_labels, np.ndarray)
        assert from_labels.dtype == np.float64
        np.testing.assert_array_equal(from_labels, function(pred[:, None], y[:, None], num_classes=3))
        np.testing.assert_array_equal(from_labels, function(*masks))
        t = function(torch.from_numpy(pred), torch.from_numpy(y), num_classes=3)
        assert isinstance(t, torch.Tensor)
        assert t.dtype == torch.float64
        np.testing.assert_array_equal(from_labels, t)
    full = metrics.hd95(pred, y, num_classes=3, include_background=True)
    assert full.shape == (2, 3)
    np.testing.assert_array_equal(full[:, 1:], metrics.hd95(pred, y, num_classes=3))
    near = [0.5, 2.0]
    np.testing.assert_array_equal(
        metrics.normalized_surface_dice(pred, y, near, num_classes=3),
        metrics.normalized_surface_dice(*masks, near),
    )


def test_metatensor_graph_and_strides(rng):
    monai_data = pytest.importorskip("monai.data")
    y = torch.from_numpy(rng.integers(0, 2, (1, 1, 9, 10, 11)))
    pred = torch.from_numpy(rng.integers(0, 2, (1, 1, 11, 10, 9))).permute(0, 1, 4, 3, 2)
    want = metrics.hd95(pred.contiguous(), y, num_classes=2)
    got = metrics.hd95(monai_data.MetaTensor(pred), monai_data.MetaTensor(y), num_classes=2)
    assert type(got) is torch.Tensor
    assert torch.equal(got, want)
    assert torch.equal(metrics.hd95(pred.float().requires_grad_(), y.float(), num_classes=2), want)


def test_batches_with_their_own_spacing(rng):
    a, g = (np.stack([blob(rng, (8, 9, 10)) for _ in range(3)]).astype(np.uint8)[:, None] for _ in range(2))
    spacing = rng.uniform(0.3, 3, (3, 3))
    for definition in ("pooled", "monai", "deepmind"):
        got = metrics.hd95(a, g, num_classes=2, spacing=spacing, definition=definition)
        one = [
            metrics.hd95(a[b : b + 1], g[b : b + 1], num_classes=2, spacing=spacing[b], definition=definition)
            for b in range(3)
        ]
        np.testing.assert_array_equal(got, np.concatenate(one))


def test_ignored_voxels(rng):
    y, pred = rng.integers(0, 3, (1, 14, 15)), rng.integers(0, 3, (1, 14, 15))
    void = rng.random(y.shape) < 0.2
    for ignore in (255, -1, 70000):
        labels = np.where(void, ignore, y)
        clean = [(np.where(void, 0, v) == c) for c in (1, 2) for v in (pred, y)]
        got = metrics.compute_all(pred, labels, 3, ignore_index=ignore)
        for c in (1, 2):
            want = expected(clean[2 * c - 2][0], clean[2 * c - 1][0])
            for name in ("dice", "jaccard", "hd95", "assd"):
                assert got[name][0, c - 1] == pytest.approx(want[name], rel=1e-12)
    both = metrics.compute_all(pred, y, 3, ignore_index=2)
    assert all(np.isnan(both[k][0, 1]) for k in ("dice", "jaccard", "hd95", "asd"))
    assert not np.isnan(both["dice"][0, 0])


def test_same_bits_for_every_thread_count(la_case, rng):
    y = la_case[1][None, None, 40:140]
    pred = _perturbed(rng, y[0, 0])[None, None]
    results = []
    for threads in (1, 2, 5):
        semisam.set_num_threads(threads)
        results.append(
            [
                v.tobytes()
                for d in ("pooled", "deepmind")
                for v in metrics.compute_all(
                    pred, y, 2, [0.7, 1.1, 1.3], class_thresholds=[1.0], definition=d
                ).values()
            ]
        )
    semisam.set_num_threads(0)
    assert results[0] == results[1] == results[2]


# ---- cumulative classes -------------------------------------------------------------------------

REDUCTIONS = ["none", "mean", "sum", "mean_batch", "sum_batch", "mean_channel", "sum_channel"]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions_are_monais(reduction, monai_metrics):
    value = np.array([[1.0, np.nan, 3.0], [np.nan, np.nan, np.nan], [2.0, 5.0, np.nan]])
    theirs, their_n = monai_metrics.utils.do_metric_reduction(torch.from_numpy(value.copy()), reduction)
    ours, n = metrics._reduce(value.copy(), reduction)
    np.testing.assert_allclose(ours, theirs.squeeze(), rtol=1e-6)
    np.testing.assert_array_equal(n, their_n.squeeze())


def test_classes_in_monais_calling_form(rng, monai_metrics):
    shape = (2, 3, 16, 17)
    batches = [
        tuple(
            torch.from_numpy(
                np.stack([[blob(rng, shape[2:], 1.0) for _ in range(3)] for _ in range(2)])
            ).float()
            for _ in range(2)
        )
        for _ in range(3)
    ]
    batches[1][1][0, 1] = 0  # an empty reference
    batches[1][0][0, 1] = 0
    pairs = [
        (
            metrics.DiceMetric(include_background=False, ignore_empty=True),
            monai_metrics.DiceMetric(include_background=False),
            {},
        ),
        (
            metrics.HausdorffDistanceMetric(percentile=95, definition="monai", get_not_nans=True),
            monai_metrics.HausdorffDistanceMetric(percentile=95, get_not_nans=True),
            {"spacing": [0.5, 2.0]},
        ),
        (
            metrics.SurfaceDistanceMetric(symmetric=True, definition="monai"),
            monai_metrics.SurfaceDistanceMetric(symmetric=True),
            {"spacing": 2.0},
        ),
        (
            metrics.SurfaceDiceMetric([1.0, 2.0], definition="monai"),
            monai_metrics.SurfaceDiceMetric([1.0, 2.0]),
            {},
        ),
    ]
    for ours, theirs, options in pairs:
        for p, t in batches[::2]:  # both empty is 0 here and NaN there; see test_empty_masks
            np.testing.assert_allclose(
                ours(y_pred=p, y=t, **options), theirs(y_pred=p, y=t, **options), **MONAI
            )
        assert len(ours) == 4
        for reduction in REDUCTIONS:
            a, b = ours.aggregate(reduction), theirs.aggregate(reduction)
            for x, z in zip(a if ours.get_not_nans else [a], b if ours.get_not_nans else [b], strict=True):
                assert isinstance(x, torch.Tensor)
                np.testing.assert_allclose(x, z.squeeze(), rtol=1e-4)
        ours.reset()
        assert len(ours) == 0
        assert ours.get_buffer() is None
    p, t = batches[1]
    ours, theirs, _ = pairs[0]
    theirs.reset()
    np.testing.assert_allclose(ours(p, t), theirs(p, t), rtol=1e-6)
    np.testing.assert_allclose(ours.aggregate(), theirs.aggregate().squeeze(), rtol=1e-6)


def test_lists_of_cases(rng):
    cases = [rng.integers(0, 2, (1, n, n + 1)) for n in (5, 9, 12)]  # of different sizes
    metric = metrics.HausdorffDistanceMetric(num_classes=2, reduction="none")
    values = metric([np.roll(c, 1, 1) for c in cases], cases)
    assert values.shape == (3, 1)
    np.testing.assert_array_equal(metric.aggregate(), values)
    spacing = [[1.0, 1.0], [0.5, 0.5], [3.0, 3.0]]
    scaled = metric([np.roll(c, 1, 1) for c in cases], cases, spacing=spacing)
    np.testing.assert_allclose(scaled, values * np.array([[1.0], [0.5], [3.0]]))
    with pytest.raises(ValueError, match=r"HausdorffDistanceMetric\(\): y: expected as many cases as y_pred"):
        metric(cases, cases[:2])


# ---- bad input ----------------------------------------------------------------------------------

Y = np.zeros((1, 1, 4, 5, 6), np.uint8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: metrics.dice([[0]], Y),
            TypeError,
            r"dice\(\): y_pred: expected a NumPy array or torch tensor, got <class 'list'>",
        ),
        (
            lambda: metrics.dice(Y, Y[..., :3]),
            ValueError,
            r"dice\(\): y: expected y_pred's shape \(1, 1, 4, 5, 6\), got \(1, 1, 4, 5, 3\)",
        ),
        (
            lambda: metrics.dice(Y, torch.from_numpy(Y)),
            TypeError,
            "all arrays to be NumPy arrays or all torch tensors",
        ),
        (
            lambda: metrics.dice(Y + 2, Y, num_classes=2),
            ValueError,
            r"overlap\(\): y_pred: expected labels from 0 to 1, got 2",
        ),
        (
            lambda: metrics.hd95(Y, Y + 7, num_classes=2),
            ValueError,
            r"surface_metrics\(\): y: expected labels from 0 to 1, got 7",
        ),
        (
            lambda: metrics.hd95(Y, Y.astype(np.int8) - 1, num_classes=2),
            ValueError,
            "y: expected labels from 0 to 1, got -1",
        ),
        (
            lambda: metrics.hd95(Y, Y + 7, num_classes=2, ignore_index=9),
            ValueError,
            "from 0 to 1 or the ignored one, got 7",
        ),
        (lambda: metrics.hd95(Y, Y + 3), ValueError, "expected labels from 0 to 1, got 3"),
        (lambda: metrics.hd95(Y[:, 0], Y[:, 0], num_classes=4), ValueError, "which could be one-hot"),
        (lambda: metrics.hd95(Y[0, 0, 0], Y[0, 0, 0], num_classes=2), ValueError, "expected label maps"),
        (lambda: metrics.hd95(Y[0, 0], Y[0, 0]), ValueError, "for label maps give num_classes"),
        (lambda: metrics.hd95(Y, Y, num_classes=0), ValueError, r"num_classes: expected 1 to 65535, got 0"),
        (
            lambda: metrics.hd95(Y + 0.5, Y, num_classes=2),
            ValueError,
            r"hd95\(\): y_pred: expected labels or masks of whole numbers",
        ),
        (
            lambda: metrics.hd95(Y, Y * np.nan, num_classes=2),
            ValueError,
            r"hd95\(\): y: expected labels or masks of whole numbers",
        ),
        (
            lambda: metrics.hd95(Y, torch.full(Y.shape, torch.inf)),
            ValueError,
            "of whole numbers|y_pred: expected",
        ),
        (
            lambda: metrics.hd95(Y, Y, num_classes=2, spacing=0),
            ValueError,
            r"hd95\(\): spacing: expected positive finite numbers, got 0",
        ),
        (
            lambda: metrics.hd95(Y, Y, num_classes=2, spacing=[1, np.nan, 1]),
            ValueError,
            "spacing: expected positive finite numbers",
        ),
        (
            lambda: metrics.hd95(Y, Y, num_classes=2, spacing=[1, -1, 1]),
            ValueError,
            "spacing: expected positive finite numbers",
        ),
        (
            lambda: metrics.hd95(Y, Y, num_classes=2, spacing=[1, np.inf, 1]),
            ValueError,
            "spacing: expected positive finite numbers",
        ),
        (
            lambda: metrics.hd95(Y, Y, num_classes=2, spacing=[1, 1]),
            ValueError,
            r"spacing: expected a number, 3 numbers, or one such",
        ),
        (
            lambda: metrics.hd95(Y, Y, num_classes=2, spacing="mm"),
            TypeError,
            "spacing: expected numbers, got 'mm'",
        ),
        (
            lambda: metrics.hd95(Y, Y, num_classes=2, spacing=1e200),
            ValueError,
            "spacing: expected positive finite numbers",
        ),
        (
            lambda: metrics.hd95(Y, Y, num_classes=2, definition="itk"),
            ValueError,
            "definition: expected one of pooled, monai, deepmind, got 'itk'",
        ),
        (
            lambda: metrics.hd95(Y, Y, num_classes=2, empty="zero"),
            ValueError,
            "empty: expected one of nan, diagonal, got 'zero'",
        ),
        (
            lambda: metrics.hausdorff_distance(Y, Y, num_classes=2, percentile=0),
            ValueError,
            "percentile: expected a number above 0",
        ),
        (
            lambda: metrics.hausdorff_distance(Y, Y, num_classes=2, percentile=101),
            ValueError,
            "percentile: expected a number above 0",
        ),
        (
            lambda: metrics.hausdorff_distance(Y, Y, num_classes=2, percentile=np.nan),
            ValueError,
            "percentile: expected a number above 0",
        ),
        (
            lambda: metrics.hausdorff_distance(Y, Y, num_classes=2, distance_metric="taxicab"),
            ValueError,
            "distance_metric: expected one of euclidean, got 'taxicab'",
        ),
        (
            lambda: metrics.normalized_surface_dice(Y, Y, [1, 2], num_classes=2),
            ValueError,
            "class_thresholds: expected 1 numbers",
        ),
        (
            lambda: metrics.normalized_surface_dice(Y, Y, [-1], num_classes=2),
            ValueError,
            "class_thresholds: expected finite numbers >= 0",
        ),
        (
            lambda: metrics.normalized_surface_dice(Y, Y, [np.nan], num_classes=2),
            ValueError,
            "class_thresholds: expected finite",
        ),
        (
            lambda: metrics.dice(Y, Y, ignore_index=1),
            ValueError,
            r"ignore_index: expected label maps \(give num_classes\), got masks",
        ),
        (
            lambda: metrics.evaluate_case(Y, Y, 2),
            ValueError,
            r"evaluate_case\(\): y_pred: expected a label map \[D, H, W\] or \[H, W\]",
        ),
        (lambda: metrics.hd95(Y[:0], Y[:0], num_classes=2), ValueError, "expected at least one element"),
        (
            lambda: metrics.dice(Y[..., :0], Y[..., :0], num_classes=2),
            ValueError,
            "expected at least one element",
        ),
        (lambda: metrics.dice(Y + 0j, Y + 0j, num_classes=2), TypeError, "y_pred"),
        (
            lambda: metrics.DiceMetric(reduction="median"),
            ValueError,
            r"DiceMetric\(\): reduction: expected one of none, mean",
        ),
        (
            lambda: metrics.DiceMetric().aggregate(),
            ValueError,
            r"DiceMetric.aggregate\(\): expected at least one case before",
        ),
        (
            lambda: metrics.DiceMetric(num_classes=2)(Y, Y, spacing=1),
            TypeError,
            r"DiceMetric\(\): spacing: expected none",
        ),
        (lambda: metrics.surface_element_areas((1.0,)), ValueError, "spacing: expected 2 or 3 numbers"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def core(**changes):
    args = {
        "y_pred": Y[0],
        "y": Y[0],
        "areas": None,
        "num_classes": 2,
        "first": 1,
        "dims": 3,
        "has_ignore": 0,
        "ignore_index": 0,
        "percentile": 95.0,
        "spacing": [1.0, 1.0, 1.0],
        "tolerance": [],
    }
    return ops.call("surface_metrics", *{**args, **changes}.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spacing": [1.0, 1.0]}, r"spacing: expected 3 numbers, or 3 per case \(3\), got 2"),
        ({"spacing": [1.0, math.nan, 1.0]}, "spacing: expected positive finite numbers, got nan"),
        ({"tolerance": [1.0]}, r"tolerance: expected one number per class \(2\), got 1"),
        ({"tolerance": [1.0, math.nan]}, "tolerance: expected finite numbers >= 0, got nan"),
        ({"tolerance": [1.0, math.inf]}, "tolerance: expected finite numbers >= 0, got inf"),
        ({"dims": 2}, "y: expected D = 1 for dims = 2, got 4"),
        ({"dims": 4}, "dims: expected an integer from 2 to 3, got 4"),
        ({"percentile": math.nan}, "percentile: expected a number from 0 to 100"),
        ({"num_classes": 65536}, "num_classes: expected an integer from 1 to 65535"),
    ],
)
def test_bad_input_to_the_operator(changes, message):
    with pytest.raises(ValueError, match=message):
        core(**changes)


def test_many_classes():
    y = np.arange(65535, dtype=np.int32).reshape(1, 1, 255, 257)
    got = metrics.dice(y, y[:, :, ::-1].copy(), num_classes=65535)
    assert got.sum() == 257  # the middle row stays
    assert core(y_pred=y, y=y, num_classes=65535, first=65534, dims=2)[0, -1, :2].tolist() == [1, 1]
    with pytest.raises(ValueError, match="expected labels from 0 to 65533, got 65534"):
        metrics.dice(y, y, num_classes=65534)


@pytest.mark.parametrize("definition", ["pooled", "deepmind"])
def test_nothing_is_read_from_a_device_before_all_operators_are_called(monkeypatch, definition):
    events = []
    call, read = ops.call, metrics._numpy
    monkeypatch.setattr(ops, "call", lambda op, *args: (events.append(op), call(op, *args))[1])
    monkeypatch.setattr(metrics, "_numpy", lambda a: (events.append("read"), read(a))[1])
    y = np.random.default_rng(3).random((2, 3, 9, 8)) < 0.4
    metrics.compute_all(y, y[:, ::-1].copy(), spacing=[[1.0, 2.0], [2.0, 1.0]], definition=definition)
    calls = 2 * (2 if definition == "deepmind" else 1)  # of classes, and of cases where areas differ
    assert events == ["overlap", *["surface_metrics"] * calls, "read", "read"]
