# SPDX-License-Identifier: Apache-2.0
"""Inference: windows against a plain loop, geometry and files on real data, faults."""

from __future__ import annotations

import csv
import itertools
import json
import shutil
import signal
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from conftest import data_dir
from hypothesis import given, settings
from hypothesis import strategies as st

from semisam import cli, metrics

torch = pytest.importorskip("torch")
pytest.importorskip("monai")
nib = pytest.importorskip("nibabel")
h5py = pytest.importorskip("h5py")
Image = pytest.importorskip("PIL.Image")
ndimage = pytest.importorskip("scipy.ndimage")

from semisam.engine import checkpoint, evaluation, inference, pseudo_labels  # noqa: E402
from semisam.engine.cases import CaseError  # noqa: E402
from semisam.engine.config import Config  # noqa: E402
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
            overlap = inference._overlap(patch, stride)
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


# ---- runs ---------------------------------------------------------------------------------------


def make_run(folder, *, specialist, patch, classes, channels=1, dims=3, weights=None, split=None, **data):
    """A run's folder as training leaves it, with given or random weights (seed 0)."""
    config = Config()
    config.specialist.name, config.specialist.options = specialist
    config.train.patch_size = list(patch)
    for name, value in data.items():
        setattr(config.data, name, value)
    names = ["background", *(f"class {c}" for c in range(1, classes))]
    meta = {
        "class_names": names,
        "spatial_dims": dims,
        "channels": channels,
        "num_classes": classes,
        "spacing": None,
    }
    torch.manual_seed(0)
    network = checkpoint.network_of(config, meta)
    if weights is not None:
        network.load_state_dict({k: torch.as_tensor(v, dtype=torch.float32) for k, v in weights.items()})
    other = checkpoint.network_of(config, meta)
    folder.mkdir(parents=True)
    state = {
        "format": 1,
        "step": 7,
        "student": network.state_dict(),
        "teacher": other.state_dict(),
        "config": asdict(config),
        "meta": meta,
    }
    checkpoint.save(folder / "last.ckpt", state)
    (folder / "run.json").write_text(json.dumps({"split": split or {}, "class_names": names}))
    return folder


def grey_levels(thresholds, dims=3, channels=1):
    """Weights of a 1x1 convolution whose class is the number of thresholds below the first channel."""
    classes = len(thresholds) + 1
    weight, bias = np.zeros((classes, channels, *(1,) * dims)), np.zeros(classes)
    for c in range(1, classes):
        weight[c, 0], bias[c] = c, -sum(thresholds[:c])
    return {"weight": 4 * weight, "bias": 4 * bias}


CONV3 = ("torch.nn.Conv3d", {"kernel_size": 1})
CONV2 = ("torch.nn.Conv2d", {"kernel_size": 1})
SMALL = ("unet3d", {"channels": [2, 4]})


def zscore(x, axes=None):
    x = np.asarray(x, np.float64)
    return (x - x.mean(axes, keepdims=True)) / x.std(axes, keepdims=True)


def some_hippocampus(folder, names=("001", "003", "243")):
    root = data_dir("hippocampus")
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    for name in names:
        for kind in ("imagesTr", "labelsTr"):
            shutil.copy(root / kind / f"hippocampus_{name}.nii.gz", folder / kind)
    return folder


@pytest.fixture(scope="module")
def hippocampus_run(tmp_path_factory):
    """A grey-level segmentation of 3 classes and three real cases: one labeled, one unlabeled, one test."""
    place = tmp_path_factory.mktemp("runs")
    data = some_hippocampus(place / "data")
    ids = [f"hippocampus_{name}" for name in ("001", "003", "243")]
    return make_run(
        place / "run",
        specialist=CONV3,
        patch=(32, 32, 32),
        classes=3,
        weights=grey_levels((0.5, 1.5)),
        split={"labeled": ids[:1], "unlabeled": ids[1:2], "validation": [], "test": ids[2:]},
        root=str(data),
    )


def predicted(image):
    z = zscore(image)
    return (z > 0.5).astype(np.uint8) + (z > 1.5)


# ---- files in, files out ------------------------------------------------------------------------


def geometry(image):
    header = image.header
    keys = ("pixdim", "qform_code", "sform_code", "srow_x", "srow_y", "srow_z", "xyzt_units", "qoffset_x")
    return [np.asarray(header[key]).tolist() for key in keys]


def test_nifti_keeps_its_geometry_and_the_label_is_the_argmax(hippocampus_run, tmp_path, capsys):
    images = Path(json_config(hippocampus_run)["data"]["root"]) / "imagesTr"
    words = [
        "predict",
        str(hippocampus_run),
        str(images),
        "--out",
        str(tmp_path),
        "--probability",
        "--uncertainty",
    ]
    assert cli.main(words) == 0
    files = sorted(images.iterdir())
    assert sorted(p.name for p in tmp_path.glob("*.nii.gz")) == [p.name for p in files]
    for file in files:
        scan = nib.load(file)
        label, probability, uncertainty = (
            nib.load(tmp_path / k / file.name) for k in ("", "probability", "uncertainty")
        )
        for made in (label, probability, uncertainty):
            assert (made.affine == scan.affine).all()
            assert geometry(made)[1:] == geometry(scan)[1:]
            assert np.array_equal(made.header["pixdim"][:4], scan.header["pixdim"][:4])
        assert label.get_data_dtype() == np.uint8
        assert probability.get_data_dtype() == uncertainty.get_data_dtype() == np.float32
        assert (np.asarray(label.dataobj) == predicted(scan.dataobj)).all()
        p = np.asarray(probability.dataobj)
        assert p.shape == (*scan.shape, 3)
        np.testing.assert_allclose(p.sum(-1), 1, atol=1e-5)
        np.testing.assert_allclose(
            np.asarray(uncertainty.dataobj), -(p * np.log(np.maximum(p, 1e-7))).sum(-1) / np.log(3), atol=1e-4
        )
    assert "3 predicted" in capsys.readouterr().out
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.nii.gz")}
    assert cli.main(words) == 0
    assert "0 predicted, 3 skipped, as their files are there (--overwrite" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.nii.gz")}
    assert cli.main([*words, "--overwrite"]) == 0
    assert all(p.stat().st_mtime_ns > t for p, t in before.items())
    next(tmp_path.glob("uncertainty/*.nii.gz")).unlink()
    capsys.readouterr()
    assert cli.main(words) == 0
    assert "1 predicted, 2 skipped" in capsys.readouterr().out


def with_other_weights(run, place):
    """The run after more training: the same settings, another network."""
    shutil.copytree(run, place)
    state = checkpoint.read(place / "last.ckpt")
    state["student"] = state["teacher"]
    checkpoint.save(place / "last.ckpt", state)
    return place


def test_labels_of_another_network_or_of_a_person_are_left_alone(hippocampus_run, tmp_path, capsys):
    images = Path(json_config(hippocampus_run)["data"]["root"]) / "imagesTr"
    out = tmp_path / "out"
    words = [str(images), "--out", str(out)]
    assert cli.main(["predict", str(hippocampus_run), *words]) == 0
    corrected = out / "hippocampus_003.nii.gz"
    image = nib.load(corrected)
    array = np.asarray(image.dataobj).copy()
    array[:3] = 2
    nib.save(nib.Nifti1Image(array, image.affine), corrected)
    before = {p: p.read_bytes() for p in out.glob("*.gz")}
    (out / "predictions.jsonl").open("a").write('{"case": "hippocampus_0')  # a line that a kill has cut
    capsys.readouterr()
    assert cli.main(["predict", str(hippocampus_run), *words, "--uncertainty"]) == 0
    assert "2 predicted, 1 left as they are" in capsys.readouterr().out
    assert cli.main(["predict", str(hippocampus_run), *words, "--uncertainty"]) == 0
    assert "0 predicted, 2 skipped" in capsys.readouterr().out
    other = with_other_weights(hippocampus_run, tmp_path / "other")
    for more in ([], ["--probability"], ["--stride", "8"]):
        assert cli.main(["predict", str(other), *words, *more]) == 0
        assert "0 predicted, 3 left as they are" in capsys.readouterr().out
    assert before == {p: p.read_bytes() for p in out.glob("*.gz")}
    assert cli.main(["predict", str(hippocampus_run), *words, "--stride", "8"]) == 0
    assert "3 left as they are" in capsys.readouterr().out
    assert cli.main(["predict", str(other), *words, "--overwrite"]) == 0
    assert all(p.read_bytes() != old for p, old in before.items())


def json_config(run):
    return checkpoint.read(run / "last.ckpt")["config"]


def test_oblique_scan_keeps_its_affine(tmp_path):
    scan = data_dir("extra") / "brain_t1post_oblique.nii.gz"
    run = make_run(
        tmp_path / "run", specialist=CONV3, patch=(96, 96, 16), classes=2, weights=grey_levels((1.0,))
    )
    assert cli.main(["predict", str(run), str(scan), "--out", str(tmp_path / "out")]) == 0
    image, made = nib.load(scan), nib.load(tmp_path / "out" / scan.name)
    assert (made.affine == image.affine).all()
    assert geometry(made) == geometry(image)
    assert made.get_data_dtype() == np.uint8
    assert (np.asarray(made.dataobj) == (zscore(image.dataobj) > 1)).all()


def test_resampled_scans_come_back_on_their_own_grid(tmp_path):
    scan = data_dir("hippocampus") / "imagesTr" / "hippocampus_001.nii.gz"
    run = make_run(
        tmp_path / "run",
        specialist=CONV3,
        patch=(16, 16, 16),
        classes=2,
        weights=grey_levels((1.0,)),
        spacing=[2.0, 1.5, 1.0],
    )
    assert cli.main(["predict", str(run), str(scan), "--out", str(tmp_path / "out")]) == 0
    made = nib.load(tmp_path / "out" / scan.name)
    expected = zscore(nib.load(scan).dataobj) > 1
    assert made.shape == expected.shape
    assert (
        metrics.dice(np.asarray(made.dataobj)[None, None], expected[None, None].astype(np.uint8))[0, 0] > 0.7
    )


def test_left_atrium_h5(tmp_path):
    root = data_dir("la") / "2018LA_Seg_Training Set"
    name = sorted(p.name for p in root.iterdir())[0]
    run = make_run(
        tmp_path / "run",
        specialist=CONV3,
        patch=(112, 112, 80),
        classes=2,
        weights=grey_levels((1.0,)),
        normalize="none",
    )
    words = ["predict", str(run), str(root / name / "mri_norm2.h5"), "--out", str(tmp_path / "out")]
    assert cli.main(words) == 0
    with h5py.File(root / name / "mri_norm2.h5") as f:
        image = f["image"][()]
    with h5py.File(tmp_path / "out" / f"{name}.h5") as f:
        assert list(f) == ["label"]
        assert f["label"].dtype == np.uint8
        assert (f["label"][()] == (image > 1)).all()
    assert cli.main([*words, "--probability"]) == 0, "a key that is missing is written"
    with h5py.File(tmp_path / "out" / f"{name}.h5") as f:
        assert sorted(f) == ["label", "probability"]
        assert f["probability"].shape == (2, *image.shape)


def test_cardiac_volume_with_a_slice_network(tmp_path):
    file = sorted((data_dir("acdc") / "data").glob("*.h5"))[0]
    run = make_run(
        tmp_path / "run",
        specialist=("unet2d", {"channels": [2, 4], "dropout": [0.1, 0.1]}),
        patch=(64, 64),
        classes=4,
        dims=2,
    )
    loaded = checkpoint.load(run)
    case = inference.cases_of([file])[0]
    whole = inference.predict_case(loaded, case)
    with h5py.File(file) as f:
        image = f["image"][()]
    assert whole.label.shape == image.shape
    for i in (0, len(image) - 1):
        alone = tmp_path / "slice.h5"
        with h5py.File(alone, "w") as f:
            f["image"] = image[i]
        one = inference.predict_case(loaded, inference.cases_of([alone])[0])
        np.testing.assert_allclose(whole.probability[:, i], one.probability, atol=1e-5)


def test_nifti_slices_are_those_of_the_last_axis(tmp_path, rng):
    run = make_run(
        tmp_path / "run",
        specialist=CONV2,
        patch=(16, 16),
        classes=2,
        dims=2,
        weights=grey_levels((1.0,), dims=2),
    )
    image = rng.normal(size=(16, 16, 5)).astype(np.float32) * np.arange(1, 6)
    nib.save(nib.Nifti1Image(image, np.diag([1, 1, 8, 1])), tmp_path / "a.nii.gz")
    made = inference.predict_case(checkpoint.load(run), inference.cases_of([tmp_path / "a.nii.gz"])[0])
    assert (made.label == (zscore(image, (0, 1)) > 1)).mean() > 0.999  # each slice has its own z-score


def test_polyp_pictures(tmp_path):
    root = data_dir("polyp") / "cvc_clinicdb"
    images = sorted((root / "images").iterdir())[:2]
    run = make_run(
        tmp_path / "run",
        specialist=CONV2,
        patch=(256, 256),
        classes=2,
        channels=3,
        dims=2,
        weights=grey_levels((1.0,), dims=2, channels=3),
    )
    words = ["--out", str(tmp_path / "out"), "--probability", "--uncertainty"]
    assert cli.main(["predict", str(run), *map(str, images), *words]) == 0
    for file in images:
        red = np.asarray(Image.open(file).convert("RGB"), np.float32)[..., 0]
        made = Image.open(tmp_path / "out" / f"{file.stem}.png")
        assert made.mode == "P"
        assert (np.asarray(made) == (zscore(red) > 1)).all()
        assert (
            np.asarray(Image.open(tmp_path / "out" / "uncertainty" / f"{file.stem}.png")).shape == red.shape
        )
        with h5py.File(tmp_path / "out" / "probability" / f"{file.stem}.h5") as f:
            assert f["probability"].shape == (2, *red.shape)


# ---- which cases --------------------------------------------------------------------------------


def test_ids_of_the_run_and_its_test_cases(hippocampus_run, tmp_path, capsys):
    words = ["predict", str(hippocampus_run), "hippocampus_003", "--out", str(tmp_path)]
    assert cli.main(words) == 0
    assert [p.name for p in tmp_path.glob("*.gz")] == ["hippocampus_003.nii.gz"]
    assert cli.main(["predict", str(hippocampus_run)]) == 0
    folder = hippocampus_run / "test" / "last-student" / "predictions"
    assert [p.name for p in folder.glob("*.gz")] == ["hippocampus_243.nii.gz"]
    assert cli.main(["predict", str(hippocampus_run), "--role", "validation"]) == 1
    assert "has no validation cases" in capsys.readouterr().err
    assert cli.main(["predict", str(hippocampus_run), "nobody", "elsewhere", "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "nobody: no such file or folder" in error
    assert "elsewhere: no such" in error


def test_channel_files_are_one_case(tmp_path):
    for name in ("a_0000", "a_0001", "b_0000", "b_0001", "plain_2017"):
        (tmp_path / f"{name}.nii.gz").touch()
    cases = {case.id: case for case in inference.cases_of([tmp_path], channels=2)}
    assert sorted(cases) == ["a", "b", "plain_2017"]
    assert [p.name for p in cases["a"].images] == ["a_0000.nii.gz", "a_0001.nii.gz"]


def test_two_inputs_of_one_id_are_refused(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.nii.gz").touch()
    with pytest.raises(CaseError, match="a: two inputs have this id"):
        inference.cases_of([tmp_path / "x", tmp_path / "y"])
    (tmp_path / "z").mkdir()
    with pytest.raises(CaseError, match="no scans here"):
        inference.cases_of([tmp_path / "z"])


def test_labels_of_data_sets_are_not_opened(hippocampus_run, tmp_path):
    data = some_hippocampus(tmp_path / "data")
    for file in (data / "labelsTr").iterdir():
        file.write_bytes(b"not a label")
    assert all(case.label is None for case in inference.cases_of([data]))
    assert cli.main(["predict", str(hippocampus_run), str(data), "--out", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 3


# ---- faults -------------------------------------------------------------------------------------


def test_broken_scans_do_not_stop_the_others(hippocampus_run, tmp_path, capsys):
    folder = some_hippocampus(tmp_path / "data") / "imagesTr"
    whole = (folder / "hippocampus_001.nii.gz").read_bytes()
    (folder / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.nii.gz").touch()
    image = nib.load(folder / "hippocampus_001.nii.gz")
    array = np.asarray(image.dataobj, np.float32)
    array[0, 0, 0] = np.nan
    nib.save(nib.Nifti1Image(array, image.affine), folder / "nan.nii.gz")
    nib.save(nib.Nifti1Image(np.stack([array] * 2, -1), image.affine), folder / "time.nii.gz")
    nib.save(nib.Nifti1Image(array[1], image.affine), folder / "flat.nii.gz")
    assert cli.main(["predict", str(hippocampus_run), str(folder), "--out", str(tmp_path / "out")]) == 1
    out = capsys.readouterr().out
    assert "3 predicted, 5 failed" in out
    for name, word in (("cut", ""), ("empty", ""), ("nan", "NaN"), ("time", "4-D"), ("flat", "axes")):
        line = next(line for line in out.splitlines() if line.startswith(f"  {name}:"))
        assert word in line
        assert "Traceback" not in line
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 3


def test_wrong_number_of_channels_is_named(hippocampus_run, tmp_path, capsys):
    run = make_run(tmp_path / "run", specialist=CONV3, patch=(16, 16, 16), classes=2, channels=2)
    file = data_dir("hippocampus") / "imagesTr" / "hippocampus_001.nii.gz"
    assert cli.main(["predict", str(run), str(file), "--out", str(tmp_path / "out")]) == 1
    assert "expected 2 channel(s), got 1" in capsys.readouterr().out
    colour = sorted((data_dir("polyp") / "cvc_clinicdb" / "images").iterdir())[0]
    assert cli.main(["predict", str(hippocampus_run), str(colour), "--out", str(tmp_path / "out")]) == 1
    assert "colour picture" in capsys.readouterr().out


@contextmanager
def full_disk(size):
    """A limit on the size of files stands for a full disk: the same error at the same places."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("kind", ["nifti", "h5"])
def test_full_disk_leaves_no_half_file(hippocampus_run, tmp_path, capsys, kind):
    scans = Path(json_config(hippocampus_run)["data"]["root"]) / "imagesTr"
    if kind == "h5":
        scans = tmp_path / "scan.h5"
        with h5py.File(scans, "w") as f:
            f["image"] = np.random.default_rng(0).normal(size=(40, 40, 40)).astype(np.float32)
    words = ["predict", str(hippocampus_run), str(scans), "--out", str(tmp_path / "out"), "--probability"]
    with full_disk(20_000):
        assert cli.main(words) == 1
    assert "stopped: " in capsys.readouterr().err
    assert [p for p in (tmp_path / "out").rglob("*") if p.is_file()] == []
    assert cli.main(words) == 0


def test_runs_that_are_none_and_devices_that_are_not_here(hippocampus_run, tmp_path, capsys):
    assert cli.main(["predict", str(tmp_path)]) == 1
    assert "expected the folder of a training run" in capsys.readouterr().err
    assert cli.main(["predict", str(hippocampus_run), "--device", "tpu"]) == 1
    assert "device: expected auto, cpu or a GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["x", "--out", "y", "--role", "test"],
        ["x"],
        ["--mc", "3"],
        ["--batch", "0"],
        ["--stride", "0"],
        ["--network", "nurse"],
    ],
)
def test_wrong_usage(hippocampus_run, words):
    with pytest.raises(SystemExit) as caught:
        cli.main(["predict", str(hippocampus_run), *words])
    assert caught.value.code == 2


@pytest.mark.parametrize("command", ["predict", "evaluate", "pseudo-label"])
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    assert f"  semisam {command} " in capsys.readouterr().out


# ---- settings -----------------------------------------------------------------------------------


def test_dropout_passes_change_the_uncertainty_alone(tmp_path):
    run = make_run(tmp_path / "run", specialist=SMALL, patch=(16, 16, 16), classes=2)
    loaded = checkpoint.load(run)
    case = inference.cases_of([data_dir("hippocampus") / "imagesTr" / "hippocampus_001.nii.gz"])[0]
    plain = inference.predict_case(loaded, case, inference.Settings(uncertainty=True))
    state = torch.get_rng_state()
    a = inference.predict_case(loaded, case, inference.Settings(uncertainty=True, mc=3))
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(1)
    b = inference.predict_case(loaded, case, inference.Settings(uncertainty=True, mc=3))
    assert (plain.probability == a.probability).all()
    assert (plain.label == a.label).all()
    assert (a.uncertainty == b.uncertainty).all(), "the same seed gives the same passes"
    assert not np.allclose(a.uncertainty, plain.uncertainty)
    still = make_run(tmp_path / "still", specialist=CONV3, patch=(16, 16, 16), classes=2)
    with pytest.raises(ValueError, match="no dropout layer"):
        inference.predict_case(checkpoint.load(still), case, inference.Settings(uncertainty=True, mc=3))


def test_teacher_stride_and_largest_component(hippocampus_run, tmp_path):
    file = data_dir("hippocampus") / "imagesTr" / "hippocampus_001.nii.gz"
    student, teacher = (checkpoint.load(hippocampus_run, network=n) for n in ("student", "teacher"))
    case = inference.cases_of([file])[0]
    one = inference.predict_case(student, case)
    assert (inference.predict_case(teacher, case).label != one.label).any()
    kept = inference.predict_case(
        student, case, inference.Settings(largest_component=True, stride=(8, 16, 32))
    )
    assert (kept.label == inference.keep_largest(predicted(nib.load(file).dataobj), 3)).all()
    with pytest.raises(ValueError, match="stride: expected 3 numbers"):
        inference.predict_case(student, case, inference.Settings(stride=40))


# ---- pseudo-labels ------------------------------------------------------------------------------


def ranking(folder):
    with (folder / "ranking.csv").open() as f:
        return list(csv.DictReader(f))


@pytest.fixture
def unlabeled_scans(tmp_path):
    """Four real cases, three of them without a label; 004 has no voxel above the network's thresholds."""
    data = some_hippocampus(tmp_path / "data", ("001", "003", "004", "006"))
    for name in ("001", "003", "004"):
        (data / "labelsTr" / f"hippocampus_{name}.nii.gz").unlink()
    nothing = nib.load(data / "imagesTr" / "hippocampus_004.nii.gz")
    flat = np.zeros(nothing.shape, np.float32)
    flat[:2] = -1.0  # two slabs: no voxel reaches the threshold of 0.5
    flat[2:] = 0.01
    nib.save(nib.Nifti1Image(flat, nothing.affine), data / "imagesTr" / "hippocampus_004.nii.gz")
    return data


def test_pseudo_labels_are_ranked_by_doubt(hippocampus_run, unlabeled_scans, tmp_path):
    data, out = unlabeled_scans, tmp_path / "out"
    assert cli.main(["pseudo-label", str(hippocampus_run), str(data), "--out", str(out)]) == 0
    rows = ranking(out)
    assert [row["rank"] for row in rows] == ["1", "2", "3"]
    assert rows[0]["case"] == "hippocampus_004"
    assert (rows[0]["empty"], rows[0]["components"], rows[0]["foreground_voxels"]) == ("1", "0", "0")
    doubt = [float(row["mean_uncertainty"]) for row in rows[1:]]
    assert doubt == sorted(doubt, reverse=True)
    teacher = checkpoint.load(hippocampus_run, network="teacher")
    for row in rows[1:]:
        label = np.asarray(nib.load(out / "pseudo" / f"{row['case']}.nii.gz").dataobj)
        doubts = np.asarray(nib.load(out / "uncertainty" / f"{row['case']}.nii.gz").dataobj)
        scan = data / "imagesTr" / f"{row['case']}.nii.gz"
        assert (label == predicted(nib.load(scan).dataobj)).all()
        near = ndimage.distance_transform_edt(label == 0) <= 3
        assert float(row["mean_uncertainty"]) == pytest.approx(doubts[near].mean(), rel=1e-4)
        assert float(row["mean_uncertainty_volume"]) == pytest.approx(doubts.mean(), rel=1e-4)
        assert float(row["foreground_ml"]) == pytest.approx((label > 0).sum() / 1000)
        count = sum(ndimage.label(label == c, np.ones((3, 3, 3)))[1] for c in (1, 2))
        assert int(row["components"]) == count
        other = inference.predict_case(teacher, inference.cases_of([scan])[0]).label
        dice = [
            2 * ((label == c) & (other == c)).sum() / max((label == c).sum() + (other == c).sum(), 1)
            for c in (1, 2)
        ]
        assert float(row["dice_student_teacher"]) == pytest.approx(np.mean(dice))
    content = json.loads((out / "dataset.json").read_text())
    assert content["numTraining"] == len(content["dataset"]) == 3
    assert content["labels"] == {"background": 0, "class 1": 1, "class 2": 2}
    for entry in content["dataset"].values():
        assert (out / entry["label"]).is_file()
        assert all(Path(image).is_file() for image in entry["images"])


def test_empty_predictions_come_first_however_sure_the_network_is():
    doubts = {"a": (0, 0.9), "b": (1, 0.1), "c": (0, 0.95)}
    rows = {case: {"case": case, "empty": e, "mean_uncertainty": u} for case, (e, u) in doubts.items()}
    assert [row["case"] for row in pseudo_labels._ranked(rows)] == ["b", "c", "a"]


def test_pseudo_labels_go_on_where_they_stopped(hippocampus_run, unlabeled_scans, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["pseudo-label", str(hippocampus_run), str(unlabeled_scans), "--out", str(out)]
    assert cli.main(words) == 0
    rows = ranking(out)
    capsys.readouterr()
    assert cli.main(words) == 0
    assert "0 predicted, 3 skipped" in capsys.readouterr().out
    assert ranking(out) == rows
    (out / "pseudo" / f"{rows[2]['case']}.nii.gz").unlink()
    assert cli.main(words) == 0
    assert "1 predicted, 2 skipped" in capsys.readouterr().out
    assert ranking(out) == rows
    (out / "ranking.csv").unlink()  # a kill before the row was written
    assert cli.main(words) == 0
    assert ranking(out) == rows
    corrected = out / "pseudo" / f"{rows[1]['case']}.nii.gz"
    image = nib.load(corrected)
    nib.save(nib.Nifti1Image(np.ones(image.shape, np.uint8), image.affine), corrected)
    capsys.readouterr()
    assert cli.main(words) == 0
    assert "2 skipped" in (out_text := capsys.readouterr().out)
    assert "1 left as they are" in out_text
    assert np.asarray(nib.load(corrected).dataobj).all()


def test_pseudo_labels_of_h5_and_pictures(tmp_path):
    with h5py.File(tmp_path / "scan.h5", "w") as f:
        f["image"] = np.random.default_rng(0).normal(size=(20, 18, 16)).astype(np.float32)
    volumes = make_run(
        tmp_path / "run3", specialist=CONV3, patch=(16, 16, 16), classes=2, weights=grey_levels((1.0,))
    )
    assert cli.main(["pseudo-label", str(volumes), str(tmp_path), "--out", str(tmp_path / "a")]) == 0
    with h5py.File(tmp_path / "a" / "pseudo" / "scan.h5") as f:
        assert sorted(f) == ["label", "uncertainty"]
    assert not (tmp_path / "a" / "dataset.json").exists()
    assert ranking(tmp_path / "a")[0]["foreground_ml"] == ""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    shutil.copy(sorted((data_dir("polyp") / "cvc_clinicdb" / "images").iterdir())[0], pictures / "a.jpg")
    run = make_run(
        tmp_path / "run2",
        specialist=CONV2,
        patch=(64, 64),
        classes=2,
        channels=3,
        dims=2,
        weights=grey_levels((1.0,), dims=2, channels=3),
    )
    assert cli.main(["pseudo-label", str(run), str(pictures), "--out", str(tmp_path / "b")]) == 0
    assert (tmp_path / "b" / "pseudo" / "a.png").is_file()
    assert (tmp_path / "b" / "uncertainty" / "a.png").is_file()


def test_pseudo_labels_of_the_run_s_own_data_are_those_of_its_unlabeled_cases(
    hippocampus_run, tmp_path, capsys
):
    root = json_config(hippocampus_run)["data"]["root"]
    assert cli.main(["pseudo-label", str(hippocampus_run), root, "--out", str(tmp_path / "out")]) == 0
    assert [row["case"] for row in ranking(tmp_path / "out")] == ["hippocampus_003"]
    full = some_hippocampus(tmp_path / "other", ("001", "003"))
    assert cli.main(["pseudo-label", str(hippocampus_run), str(full), "--out", str(tmp_path / "b")]) == 1
    assert "every case has a label; --all" in capsys.readouterr().err
    assert (
        cli.main(["pseudo-label", str(hippocampus_run), str(full), "--out", str(tmp_path / "b"), "--all"])
        == 0
    )
    assert len(ranking(tmp_path / "b")) == 2


def test_broken_scans_do_not_stop_pseudo_labels(hippocampus_run, tmp_path, capsys):
    folder = tmp_path / "scans"
    folder.mkdir()
    shutil.copy(data_dir("hippocampus") / "imagesTr" / "hippocampus_001.nii.gz", folder)
    (folder / "cut.nii.gz").write_bytes((folder / "hippocampus_001.nii.gz").read_bytes()[:500])
    assert cli.main(["pseudo-label", str(hippocampus_run), str(folder), "--out", str(tmp_path / "out")]) == 1
    assert "1 predicted, 1 failed" in capsys.readouterr().out
    assert [row["case"] for row in ranking(tmp_path / "out")] == ["hippocampus_001"]
    assert list(json.loads((tmp_path / "out" / "dataset.json").read_text())["dataset"]) == ["hippocampus_001"]


# ---- a run's own scores --------------------------------------------------------------------------


def test_evaluate_run_predicts_and_measures_twice(tmp_path, capsys):
    names = ("001", "003", "243")
    ids = [f"hippocampus_{name}" for name in names]
    data = some_hippocampus(tmp_path / "data", names)
    run = make_run(
        tmp_path / "run",
        specialist=CONV3,
        patch=(32, 32, 32),
        classes=3,
        weights=grey_levels((0.5, 1.5)),
        split={"labeled": ids[:1], "test": ids[1:]},
        root=str(data),
    )
    assert cli.main(["evaluate", "--run", str(run)]) == 0
    out = capsys.readouterr().out
    assert "95HD (mm)" in out
    assert "largest component" in out
    place = run / "test" / "last-student"
    direct = evaluation.evaluate_folders(
        place / "predictions", data / "labelsTr", only_predicted=True, show=False
    ).summary()
    raw = json.loads((place / "summary.json").read_text())
    assert raw["cases"] == 2
    assert raw["unit"] == "mm"
    for c in (1, 2):
        assert raw["per_class"][f"class {c}"]["hd95"] == direct["per_class"][str(c)]["hd95"]
    largest = json.loads((run / "test" / "last-student-largest-component" / "summary.json").read_text())
    assert largest["per_class"]["class 1"]["dice"]["mean"] != raw["per_class"]["class 1"]["dice"]["mean"]
    state = checkpoint.read(run / "last.ckpt")
    state["student"] = state["teacher"]
    checkpoint.save(run / "last.ckpt", state)
    assert cli.main(["evaluate", "--run", str(run)]) == 0
    assert "2 predicted" in capsys.readouterr().out, "scores are of the network as it is now"
    assert json.loads((place / "summary.json").read_text())["per_class"] != raw["per_class"]
    assert cli.main(["evaluate", "--run", str(run), "--definition", "monai"]) == 0
    assert "0 predicted, 2 skipped" in capsys.readouterr().out
    (data / "labelsTr" / f"{ids[2]}.nii.gz").unlink()
    assert cli.main(["evaluate", "--run", str(run)]) == 1
    assert f"{ids[2]}: has no label" in capsys.readouterr().err
