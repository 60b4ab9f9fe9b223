# SPDX-License-Identifier: Apache-2.0
"""Phantoms: seeded, of one organ, and found by neither a threshold nor the mean position."""

import json

import numpy as np
import pytest

ndimage = pytest.importorskip("scipy.ndimage")
nib = pytest.importorskip("nibabel")

from semisam.engine.phantom import phantom, write_phantoms  # noqa: E402


@pytest.fixture(scope="module")
def volumes():
    return [phantom(seed) for seed in range(12)]


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def test_the_seed_decides():
    assert np.array_equal(phantom(3, (16, 20, 24))[0], phantom(3, (16, 20, 24))[0])
    assert not np.array_equal(phantom(3, (16, 20, 24))[1], phantom(4, (16, 20, 24))[1])


def test_organs_are_one_part_and_of_sensible_size(volumes):
    for image, label in volumes:
        assert image.dtype == np.float32
        assert label.dtype == np.uint8
        assert np.isfinite(image).all()
        assert set(np.unique(label)) == {0, 1}
        assert 0.008 < label.mean() < 0.09
        parts = ndimage.label(label)[0]
        assert np.bincount(parts.ravel())[1:].max() > 0.99 * label.sum()


def test_two_classes_are_halves_of_the_organ():
    for seed in range(4):
        one, two = phantom(seed)[1], phantom(seed, classes=2)[1]
        assert np.array_equal(two > 0, one > 0)
        assert min((two == 1).sum(), (two == 2).sum()) > 0.1 * one.sum()
        assert (two == 1).sum() > (two == 2).sum()  # the head is the thick half


def test_neither_threshold_nor_position_finds_the_organ(volumes):
    labels = np.stack([label > 0 for _, label in volumes])
    prior = labels.mean(0)
    position = max(np.mean([dice(prior > t, label) for label in labels]) for t in np.linspace(0.1, 0.9, 9))
    assert position < 0.6
    best = []
    for image, label in volumes:
        smooth = ndimage.gaussian_filter(image / image.std(), 1)
        cuts = np.quantile(smooth, np.linspace(0.6, 0.98, 12))
        tried = [dice(smooth > cut, label > 0) for cut in cuts]
        for cut in cuts:  # even the right component at the best threshold, both chosen by the truth
            parts, _ = ndimage.label(smooth > cut)
            tried += [
                dice(parts == k, label > 0) for k in np.argsort(-np.bincount(parts.ravel())[1:])[:3] + 1
            ]
        best.append(max(tried))
    assert np.mean(best) < 0.7


def test_a_neighbour_of_the_same_grey_touches_the_organ():
    """Outside of the organ there are voxels as bright as it, right at its surface."""
    touching = 0
    for seed in range(12):
        image, label = phantom(seed)
        smooth = ndimage.gaussian_filter(image, 1)
        inside = np.median(smooth[label > 0])
        near = ndimage.binary_dilation(label, iterations=4) & ~ndimage.binary_dilation(label, iterations=2)
        touching += (smooth[near] > 0.93 * inside).mean() > 0.05
    assert touching >= 9


def test_written_folder(tmp_path):
    root = write_phantoms(
        tmp_path / "p", labeled=1, unlabeled=2, test=1, seed=5, shape=(16, 16, 16), classes=2
    )
    files = sorted(str(path.relative_to(root)) for path in root.rglob("*.nii.gz"))
    assert files == [
        "imagesTr/phantom_000_0000.nii.gz",
        "imagesTs/phantom_003_0000.nii.gz",
        "imagesUn/phantom_001_0000.nii.gz",
        "imagesUn/phantom_002_0000.nii.gz",
        "labelsTr/phantom_000.nii.gz",
        "labelsTs/phantom_003.nii.gz",
    ]
    about = json.loads((root / "dataset.json").read_text())
    assert about["labels"] == {"background": 0, "head": 1, "tail": 2}
    image, label = phantom(50_003, (16, 16, 16), 2)
    assert np.array_equal(np.asarray(nib.load(root / files[1]).dataobj), image)
    assert np.array_equal(np.asarray(nib.load(root / files[5]).dataobj), label)
    with pytest.raises(FileExistsError, match="imagesTr exists"):
        write_phantoms(root)


@pytest.mark.parametrize("wrong", [{"classes": 3}, {"shape": (16, 16)}, {"shape": (16, 16, 15)}])
def test_refused_phantoms(wrong):
    with pytest.raises(ValueError, match="expected"):
        phantom(0, **wrong)
