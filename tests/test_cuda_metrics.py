# SPDX-License-Identifier: Apache-2.0
"""The metrics' CUDA kernels, emulated, against the CPU on random settings beyond the table of cases."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from cases import Case
from cuda_emulation import load
from test_cuda_emulation import emulated
from test_ops import run

from semisam import _core, metrics, ops

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to build the emulated kernels")

KINDS = (bool, np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64)


@pytest.fixture(scope="module", autouse=True)
def _loaded():
    load()


def both(op, inputs):
    """What the emulated kernel and the CPU return."""
    inputs = [torch.from_numpy(v) if isinstance(v, np.ndarray) else v for v in inputs]
    case = Case(op, "random", lambda r: tuple(inputs))
    return emulated(case, inputs)[0], run(case, inputs)[0]


def label_maps(g, classes, shape, extra):
    """Two label maps of dtypes that can hold the classes; some voxels have the label `extra`."""
    for _ in range(2):
        fitting = [
            kind
            for kind in KINDS
            if kind is not bool
            and np.iinfo(kind).max >= max(classes - 1, extra)
            and extra >= np.iinfo(kind).min
        ]
        kinds = fitting + [bool] * (classes <= 2 and extra in (0, 1))
        labels = np.where(g.random(shape) < g.choice([0.0, 0.2]), extra, g.integers(0, classes, shape))
        yield labels.astype(kinds[g.integers(len(kinds))])


@pytest.mark.parametrize("seed", range(60))
def test_overlap_counts_are_those_of_the_cpu(seed):
    g = np.random.default_rng(seed)
    classes = int(g.choice([1, 2, 3, 14, 300, 4000, 4001, 65535]))
    has_ignore = int(g.integers(0, 2))
    ignore = int(g.choice([-1, 0, 1, 255, 70000, classes]))
    shape = (int(g.integers(1, 4)), int(g.choice([1, 31, 500, 9000])))
    maps = label_maps(g, classes, shape, ignore if has_ignore else 0)
    ours, cpu = both("overlap", [*maps, classes, has_ignore, ignore])
    assert torch.equal(ours, cpu)


def test_labels_that_are_no_class_are_left_out_and_counted():
    y_pred = np.array([[0, 1, 2, 9, 1, 255, 2]], np.uint8)
    y = np.array([[0, 1, 1, 2, -5, 2, -1]], np.int64)
    counts, faults = np.empty((1, 3, 3), np.int64), np.zeros(len(ops.SCHEMA), np.int64)
    _core.overlap(y_pred, y, 3, 1, -1, counts, 0, "emulated", ops._host_workspace, faults)
    good = [0, 1, 2]
    assert counts.tolist() == ops.call("overlap", y_pred[:, good], y[:, good], 3, 0, 0).tolist()
    assert faults[list(ops.SCHEMA).index("overlap")] == 3
    assert faults.sum() == 3


# ---- surfaces -----------------------------------------------------------------------------------


def mask_of(g, shape):
    """Empty, one voxel, full, noise, or a few boxes."""
    kind = g.choice(["empty", "voxel", "full", "noise", "boxes", "boxes", "boxes"])
    mask = np.full(shape, kind == "full")
    if kind == "noise":
        mask = g.random(shape) < g.choice([0.02, 0.3, 0.9])
    for _ in range({"voxel": 1, "boxes": 4}.get(kind, 0)):
        corner = [int(g.integers(0, n)) for n in shape]
        side = [1 if kind == "voxel" else int(g.integers(1, n + 1)) for n in shape]
        mask[tuple(slice(c, c + s) for c, s in zip(corner, side, strict=True))] = True
    return mask


def surface_setting(seed):
    """Inputs of surface_metrics, most of them odd in some way."""
    g = np.random.default_rng(seed)
    dims = int(g.choice([2, 3, 3]))
    sides = [1, 2, 5, 9, 14] if dims == 3 else [1, 7, 30, 45]
    shape = [
        1 if dims == 2 else int(g.choice([1, 3, 8, 40])),
        int(g.choice(sides)),
        int(g.choice([*sides, 50])),
    ]
    cases, classes = int(g.integers(1, 3)), int(g.choice([1, 2, 3, 4]))
    maps = []
    for _ in range(2):
        labels = np.zeros((cases, *shape), g.choice([np.uint8, np.int16, np.int64]))
        for case in labels:
            for c in range(1, classes):
                case[mask_of(g, shape)] = c
        maps.append(labels)
    areas = 1.0 + np.arange(256) % 7 if g.random() < 0.4 else None
    ignore = (int(g.integers(0, 2)), int(g.choice([0, 1, 2])))
    lengths = [1.0, 1.0, 0.7, 3.0] if g.random() < 0.7 else [1.0]
    spacing = [float(g.choice(lengths)) for _ in range(3 * int(g.choice([1, cases])))]
    near = [float(g.choice([0.0, 1.0, 2.1])) for _ in range(classes)] if g.random() < 0.7 else []
    percentile = float(g.choice([0.0, 50.0, 95.0, 99.9, 100.0]))
    first = int(g.integers(0, classes + 1))
    return [*maps, areas, classes, first, dims, *ignore, percentile, spacing, near]


def check_surfaces(inputs):
    """Equal bits but for sums of distances, whose terms the CPU adds in another order."""
    ours, cpu = both("surface_metrics", inputs)
    assert torch.equal(ours.isnan(), cpu.isnan())
    ours, cpu = ours.nan_to_num(-1.0), cpu.nan_to_num(-1.0)
    exact = [0, 1, *range(4, 11)]
    assert torch.equal(ours[..., exact], cpu[..., exact])
    elements = cpu[..., :2].amax()  # weights are 1 or more, so there are no more elements than that
    bound = max(float(elements), 1.0) * 2.0**-52
    torch.testing.assert_close(ours[..., 2:4], cpu[..., 2:4], rtol=bound, atol=0.0)


@pytest.mark.parametrize("block", range(10))
def test_surface_metrics_are_those_of_the_cpu(block):
    for seed in range(30 * block, 30 * block + 30):
        check_surfaces(surface_setting(seed))


def test_surface_metrics_of_more_classes_than_one_block_has_boxes_for():
    g = np.random.default_rng(0)
    maps = [g.integers(0, 1400, (1, 4, 8, 50)).astype(np.int16) for _ in range(2)]
    check_surfaces([*maps, None, 1400, 1390, 3, 0, 0, 95.0, [1.0, 0.7, 2.0], []])


@pytest.mark.parametrize("definition", ["voxels", "areas"])
def test_surface_metrics_of_a_real_scan(la_case, definition):
    """An atrium in twelve classes, more than fit into the workspace at once; one fills the image's box."""
    mask = la_case[1] > 0
    y = mask * (1 + np.indices(mask.shape).sum(0) // 24 % 12)
    y[0, 0, 0] = y[-1, -1, -1] = 12
    moved = np.roll(y, (2, -1, 3), (0, 1, 2))
    moved[moved == 5] = 0
    areas = metrics.surface_element_areas((1.0, 0.5, 2.0)) if definition == "areas" else None
    inputs = [moved[None], y[None], areas, 13, 1, 3, 0, 0, 95.0, [1.0, 0.5, 2.0], [2.0] * 13]
    if definition == "voxels":
        return check_surfaces(inputs)
    ours, cpu = both("surface_metrics", inputs)  # sums of areas that are no whole numbers round
    torch.testing.assert_close(ours, cpu, rtol=1e-12, atol=0.0, equal_nan=True)
    return None


def test_surface_metrics_leave_out_what_is_no_class_and_count_it():
    y = np.zeros((1, 4, 5, 6), np.uint8)
    y[0, 1:3, 1:4, 1:5] = 1
    wrong = y.copy()
    wrong[0, 0, 0, :3] = 7
    stats, faults = np.empty((1, 2, 11)), np.zeros(len(ops.SCHEMA), np.int64)
    rest = (None, 2, 1, 3, 0, 0, 95.0, [1.0, 1.0, 1.0], [])
    _core.surface_metrics(wrong, y, *rest, stats, 0, "emulated", ops._host_workspace, faults)
    assert stats[0, 1].tolist() == ops.call("surface_metrics", y, y, *rest)[0, 1].tolist()
    assert faults[list(ops.SCHEMA).index("surface_metrics")] == 3
    assert faults.sum() == 3


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"spacing": [1.0, 1.0]}, r"spacing: expected 3 numbers, or 3 per case \(3\), got 2"),
        ({"spacing": [1.0, 0.0, 1.0]}, "spacing: expected positive finite numbers, got 0"),
        ({"tolerance": [1.0]}, r"tolerance: expected one number per class \(2\), got 1"),
        ({"tolerance": [1.0, -1.0]}, "tolerance: expected finite numbers >= 0, got -1"),
        ({"dims": 2}, "y: expected D = 1 for dims = 2, got 2"),
        ({"shape": (1, 1, 70000, 1)}, "y: expected D and H up to 65534 and fewer than 2.31 voxels"),
    ],
)
def test_surface_metrics_refuse_numbers_as_the_cpu_does(change, sentence):
    s = {"spacing": [1.0, 1.0, 1.0], "tolerance": [], "dims": 3, "shape": (1, 2, 3, 4), **change}
    y = np.zeros(s["shape"], np.uint8)
    rest = (None, 2, 1, s["dims"], 0, 0, 95.0, s["spacing"], s["tolerance"], np.empty((1, 2, 11)))
    with pytest.raises(ValueError, match=rf"surface_metrics\(\): {sentence}"):
        _core.surface_metrics(y, y, *rest, 0, "emulated", ops._host_workspace)
    if "shape" not in change:
        with pytest.raises(ValueError, match=sentence):
            _core.surface_metrics(y, y, *rest, 0)
