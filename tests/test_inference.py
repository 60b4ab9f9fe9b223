# SPDX-License-Identifier: Apache-2.0
"""Inference: windows against a plain loop, geometry and files on real data, faults."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("monai")

from semisam.engine import inference  # noqa: E402
from semisam.engine.inference import sliding_window, window_starts  # noqa: E402

torch.set_num_threads(1)


# ---- windows ------------------------------------------------------------------------------------


class Positional(torch.nn.Module):
    """Logits that depend on the place in the window and on the values: any wrong window shows."""

    def __init__(self, channels, classes, patch):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.where = torch.nn.Parameter(torch.randn(classes, *patch, generator=generator))
        self.mix = torch.nn.Parameter(torch.randn(classes, channels, generator=generator))

    def forward(self, x):
        return torch.einsum("kc,nc...->nk...", self.mix, x) + self.where


def naive(network, image, patch, stride):
    """Method 2.8, written as it stands there."""
    spatial = image.shape[1:]
    low = [max(p - n, 0) // 2 for n, p in zip(spatial, patch, strict=True)]
    size = [max(n, p) for n, p in zip(spatial, patch, strict=True)]
    padded = np.zeros((image.shape[0], *size), np.float32)
    inside = (slice(None), *(slice(a, a + n) for a, n in zip(low, spatial, strict=True)))
    padded[inside] = image
    total = np.zeros((network.where.shape[0], *size))
    count = np.zeros(size)
    starts = [
        [min(s * i, n - p) for i in range(int(np.ceil((n - p) / s)) + 1)]
        for n, p, s in zip(size, patch, stride, strict=True)
    ]
    for corner in itertools.product(*starts):
        window = tuple(slice(c, c + p) for c, p in zip(corner, patch, strict=True))
        with torch.no_grad():
            logits = network(torch.from_numpy(padded[(slice(None), *window)])[None])[0]
        total[(slice(None), *window)] += logits.softmax(0).numpy()
        count[window] += 1
    return (total / count)[inside]


@st.composite
def problems(draw):
    dims = draw(st.sampled_from([2, 3]))
    patch = [draw(st.integers(1, 9)) for _ in range(dims)]
    stride = [draw(st.integers(1, p)) for p in patch]
    size = [draw(st.integers(1, 14)) for _ in range(dims)]
    return draw(st.integers(1, 2)), draw(st.integers(2, 3)), patch, stride, size, draw(st.integers(1, 5))


@given(problems())
@settings(max_examples=60, deadline=None)
def test_windows_are_those_of_the_plain_loop(problem):
    channels, classes, patch, stride, size, batch = problem
    network = Positional(channels, classes, patch)
    image = np.random.default_rng(0).normal(size=(channels, *size)).astype(np.float32)
    got = sliding_window(network, image, patch, stride, batch=batch)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, naive(network, image, patch, stride), atol=2e-6)


def test_every_stride_of_every_patch_survives_the_rounding_of_an_overlap():
    """MONAI is told an overlap, not a stride; the fraction must come back as the stride."""
    from monai.inferers.utils import _get_scan_interval  # noqa: PLC0415

    for patch in range(1, 257):
        for stride in range(1, patch + 1):
            overlap = 0.0 if stride == patch else 1 - (stride + 0.5) / patch
            assert _get_scan_interval([patch + 1], [patch], 1, [overlap]) == (stride,)


def test_published_windows_of_the_left_atrium():
    assert window_starts(148, 112, 18) == [0, 18, 36]
    assert window_starts(88, 80, 4) == [0, 4, 8]
    assert window_starts(70, 80, 4) == [0]
    assert window_starts(149, 112, 18) == [0, 18, 36, 37]


def test_slice_by_slice_equals_each_slice_alone(rng):
    network = Positional(2, 3, (6, 5))
    image = rng.normal(size=(2, 7, 4, 9)).astype(np.float32)
    for axis in range(3):
        whole = sliding_window(network, image, (6, 5), (2, 3), slice_axis=axis)
        assert whole.shape == (3, 7, 4, 9)
        for i in range(image.shape[1 + axis]):
            alone = sliding_window(network, image.take(i, 1 + axis), (6, 5), (2, 3))
            np.testing.assert_allclose(whole.take(i, 1 + axis), alone, atol=1e-6)


def test_tensors_give_tensors_and_the_network_keeps_its_modes():
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.Dropout(0.5))
    network.train()
    network[1].eval()
    image = torch.randn(1, 8, 8)
    a, b = (sliding_window(network, image, (8, 8)) for _ in range(2))
    assert isinstance(a, torch.Tensor)
    assert torch.equal(a, b), "dropout must be off"
    assert [m.training for m in network] == [True, False, True]
    c, d = (sliding_window(network, image, (8, 8), dropout=True) for _ in range(2))
    assert not torch.equal(c, d), "dropout must be on"
    assert [m.training for m in network] == [True, False, True]


@pytest.mark.parametrize(
    ("shape", "patch", "stride", "word"),
    [
        ((1, 8, 8), (4, 4, 4), None, r"image: expected \[channels, 3 axes\]"),
        ((1, 8, 0, 8), (4, 4, 4), None, "no empty axis"),
        ((1, 8, 8, 8), (4, 4, 4), 5, r"stride: expected 3 numbers from 1 to the patch's \(4, 4, 4\), got 5"),
        ((1, 8, 8, 8), (4, 4, 4), (1, 1), "stride: expected 3 numbers"),
        ((1, 8, 8, 8), (4, 4, 4), 0, "stride"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shape, patch, stride, word):
    with pytest.raises(ValueError, match=word):
        sliding_window(torch.nn.Conv3d(1, 2, 1), np.zeros(shape, np.float32), patch, stride)


def test_outputs_that_do_not_fit_are_refused():
    for network in (torch.nn.Conv3d(1, 2, 3), torch.nn.Conv3d(1, 1, 1), lambda x: [x]):
        with pytest.raises(ValueError, match="network: expected logits"):
            sliding_window(network, np.zeros((1, 8, 8, 8), np.float32), (8, 8, 8))


def test_out_of_memory_names_the_settings():
    def network(_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(RuntimeError, match='lower batch, or accumulate="cpu"'):
        sliding_window(network, np.zeros((1, 8, 8, 8), np.float32), (8, 8, 8))


# ---- maps ---------------------------------------------------------------------------------------


def test_entropy_is_that_of_scipy(rng):
    from scipy.stats import entropy  # noqa: PLC0415

    p = rng.dirichlet([0.3] * 4, (5, 6, 7)).astype(np.float32)
    p = np.ascontiguousarray(np.moveaxis(p, -1, 0))
    np.testing.assert_allclose(inference.entropy(p), entropy(p, axis=0) / np.log(4), atol=1e-5)


def test_largest_component_per_class_uses_all_neighbours(rng):
    cc3d = pytest.importorskip("cc3d")
    label = rng.integers(0, 3, (9, 10, 11)).astype(np.uint8)
    label[rng.random(label.shape) < 0.8] = 0
    kept = inference.keep_largest(label, 3)
    for c in (1, 2):
        sizes = np.bincount(cc3d.connected_components(label == c, connectivity=26).ravel())[1:]
        assert (kept == c).sum() == sizes.max()
        assert (label[kept == c] == c).all()
    diagonal = np.eye(4, dtype=np.uint8)
    assert (inference.keep_largest(diagonal, 2) == diagonal).all()
