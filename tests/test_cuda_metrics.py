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

from semisam import _core, ops

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
