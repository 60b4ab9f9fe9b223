# SPDX-License-Identifier: Apache-2.0
"""Cases, splits, reading and writing, preprocessing, check and convert: on real files and on broken ones."""

import doctest
import importlib
import json
import os
import shutil
import sys

import numpy as np
import pytest
from conftest import data_dir
from hypothesis import given, settings
from hypothesis import strategies as st

h5py = pytest.importorskip("h5py")
nib = pytest.importorskip("nibabel")
torch = pytest.importorskip("torch")
Image = pytest.importorskip("PIL.Image")

from semisam import cli  # noqa: E402
from semisam.engine import cases, scans  # noqa: E402
from semisam.engine.cases import (  # noqa: E402
    Case,
    CaseError,
    Volume,
    find_cases,
    read_header,
    read_image,
    read_label,
    split,
    write_label,
    write_map,
)
from semisam.engine.check import check_cases, check_folder  # noqa: E402
from semisam.engine.config import Config, DataConfig, TrainConfig  # noqa: E402
from semisam.engine.convert import convert  # noqa: E402
from semisam.engine.phantom import phantom, write_phantoms  # noqa: E402
from semisam.engine.preprocess import Preprocessing  # noqa: E402
from semisam.engine.sampling import PatchSource  # noqa: E402


@pytest.mark.parametrize(
    "module", ["cases", "scans", "preprocess", "sampling", "phantom", "check", "convert"]
)
def test_docstring_examples(module):
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.testmod(importlib.import_module(f"semisam.engine.{module}"), optionflags=options)
    assert result.attempted > 0
    assert result.failed == 0


# ---- folders to look at -------------------------------------------------------------------------


def nifti(path, array, affine=None, dtype=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, np.eye(4) if affine is None else affine)
    if dtype is not None:
        image.set_data_dtype(dtype)
    image.to_filename(path)


def scan(shape=(6, 7, 8), seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def mask(shape=(6, 7, 8), values=(0, 1)):
    return np.resize(np.array(values, np.uint8), shape)


def dataset_json(root, labels=("background", "organ"), channels=1, **more):
    about = {
        "channel_names": {str(i): f"c{i}" for i in range(channels)},
        "labels": {name: i for i, name in enumerate(labels)},
    }
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset.json").write_text(json.dumps(about | more))


def picture(path, array, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    made = Image.fromarray(array)
    (made.convert(mode) if mode else made).save(path)


def hippocampus_part(root, count):
    """The first cases of the real set, copied."""
    source = data_dir("hippocampus")
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
        for path in sorted((source / folder).iterdir())[:count]:
            shutil.copy(path, root / folder / path.name)
    about = json.loads((source / "dataset.json").read_text())
    about["training"] = about["training"][:count]
    (root / "dataset.json").write_text(json.dumps(about))
    return root


def ids(found):
    return [case.id for case in found]


# ---- finding ------------------------------------------------------------------------------------


def test_hippocampus_is_found():
    found = find_cases(data_dir("hippocampus"))
    assert (found.layout, found.spatial_dims, found.channels) == ("nnunet", 3, 1)
    assert len(found.cases) == 200
    assert found.class_names == ("background", "Anterior", "Posterior")
    assert all(case.labeled for case in found.cases)
    assert ids(found.cases) == sorted(ids(found.cases))
    case = found.cases[1]
    assert case.label is not None
    assert case.label.name == case.images[0].name == f"{case.id}.nii.gz"


def test_la_is_found():
    found = find_cases(data_dir("la"))
    listed = (data_dir("la") / "train.list").read_text().split()
    assert (found.layout, found.spatial_dims) == ("h5", 3)
    assert ids(found.cases) == listed
    assert len(found.validation) == 8
    assert found.test == []
    assert found.cases[0].images[0].parent.parent.name == "2018LA_Seg_Training Set"
    assert split(found, DataConfig(labeled=1)).class_names == ("background", "foreground")


def test_acdc_slices_train_and_volumes_validate():
    found = find_cases(data_dir("acdc"))
    assert (found.layout, found.spatial_dims, len(found.cases), len(found.validation)) == ("h5", 2, 306, 10)
    assert len(read_header(found.cases[0]).shape) == 2
    assert len(read_header(found.validation[0]).shape) == 3
    roles = split(found, DataConfig(labeled=3))
    patients = {case.group for case in roles.labeled}
    assert patients == {"patient099", "patient038", "patient098"} or len(patients) == 3
    assert not patients & {case.group for case in roles.unlabeled}
    assert roles.class_names == ("background", "class 1", "class 2", "class 3")


@pytest.mark.parametrize(
    ("name", "count"), [("kvasir_seg", 200), ("cvc_clinicdb", 116), ("kvasir_native", 5)]
)
def test_polyps_are_paired_by_name(name, count):
    found = find_cases(data_dir("polyp") / name)
    assert (found.layout, found.spatial_dims, found.channels, len(found.cases)) == ("images", 2, 3, count)
    for case in found.cases:
        assert case.label is not None
        assert case.label.stem == case.images[0].stem == case.id
    if name == "cvc_clinicdb":  # frame numbers count as numbers
        assert [int(case.id) for case in found.cases] == sorted(int(case.id) for case in found.cases)


def test_kvasir_native_masks_lose_their_jpeg_noise():
    case = find_cases(data_dir("polyp") / "kvasir_native").cases[0]
    assert case.label is not None
    raw = np.asarray(Image.open(case.label).convert("L"))
    label = read_label(case)
    assert set(np.unique(raw)) > {0, 255}
    assert np.array_equal(label, raw >= 128)


@pytest.mark.parametrize("suffix", ["", "_0000"])
def test_channel_suffix_is_optional(tmp_path, suffix):
    for name in ("a_2017", "b_2018"):  # four digits that are no channel
        nifti(tmp_path / "imagesTr" / f"{name}{suffix}.nii.gz", scan())
        nifti(tmp_path / "labelsTr" / f"{name}.nii.gz", mask())
    nifti(tmp_path / "imagesUn" / f"c_0003{suffix}.nii.gz", scan())
    found = find_cases(tmp_path)
    assert ids(found.cases) == ["a_2017", "b_2018", "c_0003"]
    assert [case.labeled for case in found.cases] == [True, True, False]
    assert found.channels == 1
    assert split(found, DataConfig()).class_names == ("background", "foreground")


def test_a_year_is_no_channel(tmp_path):
    nifti(tmp_path / "imagesTr/scan_2017.nii.gz", scan())
    nifti(tmp_path / "imagesTr/other_0000.nii.gz", scan())
    assert ids(find_cases(tmp_path).cases) == ["other", "scan_2017"]


def test_channels_of_nnunet_are_stacked_in_order(tmp_path):
    for i in (1, 0):
        nifti(tmp_path / "imagesTr" / f"a_{i:04d}.nii.gz", scan(seed=i))
    nifti(tmp_path / "labelsTr" / "a.nii.gz", mask())
    dataset_json(tmp_path, channels=2)
    found = find_cases(tmp_path)
    assert (found.channels, len(found.cases)) == (2, 1)
    array = read_image(found.cases[0]).array
    assert np.array_equal(array, np.stack([scan(seed=0), scan(seed=1)]))
    (tmp_path / "imagesTr" / "a_0000.nii.gz").unlink()
    with pytest.raises(CaseError, match=r"a: channels: channel file.s. missing: a_0000"):
        find_cases(tmp_path)


def test_channels_on_the_fourth_axis(tmp_path):
    array = scan((5, 6, 7, 2))
    nifti(tmp_path / "imagesTr" / "a.nii.gz", array)
    nifti(tmp_path / "labelsTr" / "a.nii.gz", mask((5, 6, 7)))
    dataset_json(tmp_path, channels=2)
    volume = read_image(find_cases(tmp_path).cases[0])
    assert np.array_equal(volume.array, np.moveaxis(array, -1, 0))
    write_label(tmp_path / "out.nii.gz", mask((5, 6, 7)), volume)
    assert nib.load(tmp_path / "out.nii.gz").shape == (5, 6, 7)
    dataset_json(tmp_path, channels=1)
    with pytest.raises(CaseError, match="4-D image 5 x 6 x 7 x 2"):
        read_image(find_cases(tmp_path).cases[0])


def test_too_few_channels(tmp_path):
    for name, channels in (("a", 2), ("b", 1)):
        for i in range(channels):
            nifti(tmp_path / f"imagesTr/{name}_{i:04d}.nii.gz", scan())
        nifti(tmp_path / f"labelsTr/{name}.nii.gz", mask())
    assert kinds(check_cases(tmp_path, quick=True)) == {("b", "channels", "error")}
    with pytest.raises(CaseError, match=r"b: expected 2 channel.s., got 1"):
        read_image(find_cases(tmp_path).cases[1])


def test_both_styles_of_dataset_json(tmp_path):
    names = {0: "background", 1: "left", 2: "right"}
    for labels in ({str(v): n for v, n in names.items()}, {n: v for v, n in names.items()}):
        assert cases._label_names({"labels": labels}, []) == names
    problems: list = []
    cases._label_names({"labels": {"background": 0, "whole": [1, 2]}}, problems)
    assert "region" in problems[0].message


def test_test_cases_are_labeled_imagests(tmp_path):
    root = write_phantoms(tmp_path / "p", labeled=1, unlabeled=1, test=2, shape=(16, 16, 16))
    (root / "labelsTs" / "phantom_003.nii.gz").unlink()
    found = find_cases(root)
    assert ids(found.test) == ["phantom_002"]
    assert ids(found.cases) == ["phantom_000", "phantom_001"]


def test_hippocampus_bad_is_refused_at_once():
    with pytest.raises(CaseError) as caught:
        find_cases(data_dir("hippocampus_bad"))
    assert [p.case for p in caught.value.problems] == ["hippocampus_010", "hippocampus_281"]
    assert "labelsTr/hippocampus_281.nii.gz" in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "no known layout"),
        (lambda root: (root / "imagesTr").mkdir(), "no case found"),
        (lambda root: (root / "train.list").write_text("a\n"), "a: missing-image: listed in train.list"),
        (lambda root: (root / "images").mkdir(), "no case found"),
    ],
)
def test_folders_without_cases(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(CaseError, match=message):
        find_cases(tmp_path)


def test_one_case_twice(tmp_path):
    picture(tmp_path / "images/a.png", mask((4, 4)))
    picture(tmp_path / "images/a.jpg", mask((4, 4)))
    with pytest.raises(CaseError, match=r"two image files for one case: a.jpg and a.png"):
        find_cases(tmp_path)


# ---- splitting ----------------------------------------------------------------------------------


def test_split_by_numbers_is_nested_and_disjoint():
    found = find_cases(data_dir("hippocampus"))
    seen = set()
    for draw in range(3):
        two, four = (split(found, DataConfig(labeled=n, validation=10, test=40, draw=draw)) for n in (2, 4))
        assert ids(two.test) == ids(found.cases)[-40:]
        assert ids(four.labeled)[:2] == ids(two.labeled)
        assert ids(four.validation) == ids(two.validation)
        everyone = [i for role in four.ids().values() for i in role]
        assert len(everyone) == len(set(everyone)) == 200
        assert len(four.unlabeled) == 146
        assert all(case.label is None for case in four.unlabeled)
        seen.add(tuple(ids(two.labeled)))
    assert len(seen) == 3
    assert ids(split(found, DataConfig(labeled=2)).labeled) == ids(found.cases)[:2]


def test_split_of_ids_repeats_a_split():
    found = find_cases(data_dir("hippocampus"))
    first = split(found, DataConfig(labeled=3, unlabeled=5, validation=2, test=4, draw=7))
    again = split(found, DataConfig(**first.ids()))
    assert again == first


def test_split_takes_what_the_folder_says(tmp_path):
    root = write_phantoms(tmp_path / "p", labeled=2, unlabeled=3, test=1, shape=(16, 16, 16))
    roles = split(find_cases(root), DataConfig())
    assert [len(v) for v in roles.ids().values()] == [2, 3, 0, 1]
    assert roles.class_names == ("background", "organ")
    none = split(find_cases(root), DataConfig(unlabeled=0, test=0))
    assert [len(v) for v in none.ids().values()] == [2, 0, 0, 0]


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"labeled": 201}, "data.labeled: 201 asked for, but only 200"),
        ({"labeled": 190, "test": 40}, "190 asked for, but only 160"),
        ({"labeled": -1}, "expected a number >= 0"),
        ({"labeled": "two"}, "a number or a list of ids"),
        ({"labeled": ["nobody"]}, "no such case"),
        ({"labeled": ["hippocampus_001"], "test": ["hippocampus_001"]}, "in data.labeled and in data.test"),
        ({"labeled": 2, "label_map": {1: 1, 2: 3}}, r"must be 0, 1, 2, ..., got \[0, 1, 3\]"),
        ({"labeled": 2, "label_map": {1: 300}}, "numbers in 0..255"),
        ({"labeled": 2, "draw": -1}, "data.draw"),
    ],
)
def test_splits_that_cannot_be(settings_, message):
    found = find_cases(data_dir("hippocampus"))
    with pytest.raises(CaseError, match=message):
        split(found, DataConfig(**settings_))


def test_label_map_joins_classes():
    found = find_cases(data_dir("hippocampus"))
    roles = split(found, DataConfig(labeled=1, label_map={1: 1, 2: 1}))
    assert roles.class_names == ("background", "Anterior+Posterior")
    raw, joined = read_label(roles.labeled[0]), read_label(roles.labeled[0], {1: 1, 2: 1})
    assert np.array_equal(joined, raw > 0)


def test_classes_are_counted_in_labels_that_may_be_seen(tmp_path):
    for i, values in enumerate([(0, 1), (0, 1, 2)]):
        nifti(tmp_path / f"imagesTr/s{i}.nii.gz", scan())
        nifti(tmp_path / f"labelsTr/s{i}.nii.gz", mask(values=values))
    assert split(find_cases(tmp_path), DataConfig(labeled=1)).num_classes == 2
    assert split(find_cases(tmp_path), DataConfig(labeled=2)).num_classes == 3
    nifti(tmp_path / "labelsTr/s1.nii.gz", mask(values=(0, 4)))
    with pytest.raises(CaseError, match=r"got \[0, 1, 4\]: set data.label_map, e.g. {0: 0, 1: 1, 4: 2}"):
        split(find_cases(tmp_path), DataConfig(labeled=2))
    dataset_json(tmp_path, labels=("background", "organ", "ignore"))
    with pytest.raises(CaseError, match=r"label 'ignore': set data.label_map to {0: 0, 1: 1, 2: 255}"):
        split(find_cases(tmp_path), DataConfig())


# ---- no label of an unlabeled case is opened ----------------------------------------------------


def folder_of(kind, root):
    """A small folder of real data and the paths of its labels."""
    if kind == "nifti":
        hippocampus_part(root, 5)
        return {p.name.split(".")[0]: p for p in (root / "labelsTr").iterdir()}
    if kind == "image":
        source = data_dir("polyp") / "kvasir_seg"
        (root / "images").mkdir(parents=True)
        (root / "masks").mkdir()
        for path in sorted((source / "images").iterdir())[:5]:
            shutil.copy(path, root / "images" / path.name)
            shutil.copy(source / "masks" / f"{path.stem}.png", root / "masks" / f"{path.stem}.png")
        return {p.stem: p for p in (root / "masks").iterdir()}
    source = data_dir("acdc")
    names = (source / "train_slices.list").read_text().split()[::40][:5]
    (root / "data/slices").mkdir(parents=True)
    (root / "train_slices.list").write_text("\n".join(names))
    for name in names:
        shutil.copy(source / f"data/slices/{name}.h5", root / f"data/slices/{name}.h5")
    return {name: root / f"data/slices/{name}.h5" for name in names}


def destroy(kind, path, how):
    if kind == "h5":
        with h5py.File(path, "a") as file:
            del file["label"]
            if how == "garbage":
                file["label"] = np.frombuffer(b"no label at all", "S1")
    elif how == "garbage":
        path.write_bytes(b"no label at all")
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["gone", "garbage"])
@pytest.mark.parametrize("kind", ["nifti", "image", "h5"])
def test_no_label_of_an_unlabeled_case_is_opened(tmp_path, kind, how):
    labels = folder_of(kind, tmp_path / "data")
    data = DataConfig(labeled=2)
    flat = kind != "nifti"
    train = TrainConfig(patch_size=[24, 24] if flat else [16, 16, 16], steps=4)
    steps = Preprocessing.of(Config(data=data, train=train), 2 if flat else 3)

    def batches():
        roles = split(find_cases(tmp_path / "data"), data)
        check = check_cases(tmp_path / "data", split=roles)
        assert not [problem for problem in check if problem.severity == "error"]
        source = PatchSource(roles, steps, train, data, 4)
        return roles, [source.batch(step) for step in range(4)]

    roles, before = batches()
    for case in roles.unlabeled:
        destroy(kind, labels[case.id], how)
        with pytest.raises(CaseError, match=r"no label|cannot read"):
            read_label(next(c for c in find_cases(tmp_path / "data").cases if c.id == case.id))
    opened = []
    watching = True

    def watch(event, arguments):
        if watching and event == "open":
            opened.append(str(arguments[0]))

    sys.addaudithook(watch)
    after = batches()[1]
    watching = False
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a.image, b.image)
        assert torch.equal(a.label, b.label)
    if kind != "h5":
        assert str(labels[roles.labeled[0].id]) in opened
        assert not {str(labels[case.id]) for case in roles.unlabeled} & set(opened)
    if how == "garbage":  # such a label is noticed as soon as it may be opened

        def load_everything():
            everything = split(find_cases(tmp_path / "data"), DataConfig())
            PatchSource(everything, steps, train, DataConfig(), 4).load()

        with pytest.raises(CaseError, match="cannot read"):
            load_everything()


# ---- reading and writing ------------------------------------------------------------------------


def test_oblique_nifti_keeps_its_place(tmp_path):
    path = data_dir("extra") / "brain_t1post_oblique.nii.gz"
    original = nib.load(path)
    volume = read_image(Case("brain", (path,), None, "nifti"))
    assert volume.array.shape == (1, 280, 320, 22)
    assert volume.spacing == pytest.approx((0.6875, 0.6875, 6.5))
    label = (volume.array[0] > volume.array.mean()).astype(np.uint8)
    write_label(tmp_path / "label.nii.gz", label, volume)
    write_map(tmp_path / "map.nii.gz", volume.array[0], volume)
    for name, dtype, array in (("label", np.uint8, label), ("map", np.float32, volume.array[0])):
        written = nib.load(tmp_path / f"{name}.nii.gz")
        assert np.array_equal(written.affine, original.affine)
        assert written.get_data_dtype() == dtype
        assert np.array_equal(np.asarray(written.dataobj), array)
        for key in ("qform_code", "sform_code", "xyzt_units"):
            assert written.header[key] == original.header[key]
        assert written.header.get_zooms() == original.header.get_zooms()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["label.nii.gz", "map.nii.gz"]


def test_scaled_integers_are_read_as_numbers(tmp_path):
    nifti(tmp_path / "a.nii.gz", scan() * 1000, dtype=np.int16)
    array = read_image(Case("a", (tmp_path / "a.nii.gz",), None, "nifti")).array[0]
    assert np.abs(array - scan() * 1000).max() < 0.2


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    like = Volume(scan()[None], None)
    write_label(tmp_path / "a.nii.gz", mask(), like)
    before = (tmp_path / "a.nii.gz").read_bytes()

    def full(self, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nib.Nifti1Image, "to_filename", full)
    with pytest.raises(OSError, match="No space"):
        write_label(tmp_path / "a.nii.gz", 1 - mask(), like)
    assert [p.name for p in tmp_path.iterdir()] == ["a.nii.gz"]
    assert (tmp_path / "a.nii.gz").read_bytes() == before


def test_png_labels_hold_class_numbers(tmp_path):
    label = mask((5, 6), (0, 1, 2, 255))
    write_label(tmp_path / "a.png", label, Volume(np.zeros((3, 5, 6), np.float32), None))
    assert np.array_equal(read_label(Case("a", (), tmp_path / "a.png", "image")), label)
    write_label(tmp_path / "b.png", label * 0 + 255, Volume(np.zeros((3, 5, 6), np.float32), None))
    assert (read_label(Case("b", (), tmp_path / "b.png", "image")) == 255).all()
    write_map(tmp_path / "m.png", np.full((5, 6), 0.5), Volume(np.zeros((3, 5, 6), np.float32), None))
    assert (np.asarray(Image.open(tmp_path / "m.png")) == 128).all()


@pytest.mark.parametrize(
    ("values", "mode", "label_map", "wanted"),
    [
        ((0, 255), "L", None, {0, 1}),
        ((0, 255), "RGB", None, {0, 1}),
        ((255,), "L", None, {1}),
        ((0,), "L", None, {0}),
        ((0, 1, 2), "L", None, {0, 1, 2}),
        ((0, 1, 255), "L", None, {0, 1, 255}),
        ((0, 1, 255), "P", None, {0, 1, 255}),
        ((0, 255), "L", {255: 255}, {0, 255}),
        ((0, 128), "L", {128: 1}, {0, 1}),
    ],
)
def test_masks_of_pictures(tmp_path, values, mode, label_map, wanted):
    array = mask((4, 5), values)
    if mode == "P":
        write_label(tmp_path / "m.png", array, Volume(np.zeros((1, 4, 5), np.float32), None))
    else:
        picture(tmp_path / "m.png", array, mode)
    found = read_label(Case("a", (), tmp_path / "m.png", "image"), label_map)
    assert set(np.unique(found).tolist()) == wanted
    assert found.dtype == np.uint8


@pytest.mark.parametrize("writer", [write_label, write_map])
def test_refused_writes(tmp_path, writer):
    like = Volume(scan()[None], None)
    with pytest.raises(ValueError, match="expected shape"):
        writer(tmp_path / "a.nii.gz", mask((2, 2, 2)), like)
    for name in ("a.png", "a.tif", "a"):
        with pytest.raises(ValueError, match=r"path: expected a name that ends in .nii.gz, .nii, .h5, got"):
            writer(tmp_path / name, mask(), like)


def test_a_grey_picture_among_colours_gets_three_channels(tmp_path):
    picture(tmp_path / "images/a.png", mask((4, 4, 3), range(200)))
    picture(tmp_path / "images/b.png", mask((4, 4), range(200)))
    found = find_cases(tmp_path)
    assert found.channels == 3
    array = read_image(found.cases[1]).array
    assert array.shape == (3, 4, 4)
    assert (array[0] == array[2]).all()
    assert array.max() <= 1


def test_pictures_of_sixteen_bits(tmp_path):
    Image.fromarray(np.full((4, 4), 65535, np.uint16)).save(tmp_path / "a.png")
    assert (read_image(Case("a", (tmp_path / "a.png",), None, "image")).array == 1).all()


# ---- preprocessing ------------------------------------------------------------------------------


def test_zscore_is_of_the_whole_scan():
    for case in find_cases(data_dir("hippocampus")).cases[:3]:
        volume = read_image(case)
        image = Preprocessing().prepare(volume).image
        x = volume.array.astype(np.float64)
        assert np.abs(image - (x - x.mean()) / x.std()).max() < 1e-5
        assert image.dtype == np.float32


def test_minmax_none_and_channels():
    array = np.stack([scan(), 100 + 3 * scan(seed=1)])
    image = Preprocessing(normalize="minmax").prepare(Volume(array, None)).image
    assert [(c.min(), c.max()) for c in image] == [(0, 1), (0, 1)]
    assert np.array_equal(Preprocessing(normalize="none").prepare(Volume(array, None)).image, array)
    image = Preprocessing().prepare(Volume(array, None)).image
    assert image.mean((1, 2, 3)) == pytest.approx([0, 0], abs=1e-6)


@pytest.mark.parametrize("how", ["zscore", "minmax"])
def test_constant_image_becomes_zeros(how):
    with pytest.warns(UserWarning, match="constant image"):
        prepared = Preprocessing(normalize=how).prepare(Volume(np.full((1, 3, 3, 3), 7.1, np.float32), None))
    assert (prepared.image == 0).all()


def test_slices_of_a_stack_are_normalised_as_in_training():
    volume = read_image(find_cases(data_dir("acdc")).validation[0])
    steps = Preprocessing(size=(64, 64), spatial_dims=2)
    stack = steps.prepare(volume)
    assert stack.image.shape == (1, volume.array.shape[1], 64, 64)
    for i in (0, 3):
        alone = steps.prepare(Volume(volume.array[:, i], None))
        assert np.array_equal(alone.image, stack.image[:, i])
    prob = np.random.default_rng(0).dirichlet(np.ones(4), stack.shape).astype(np.float32)
    back = steps.restore(np.moveaxis(prob, -1, 0), stack)
    assert back.shape == (4, *volume.array.shape[1:])
    assert np.abs(back.sum(0) - 1).max() < 1e-5


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(*[st.integers(2, 9)] * 3),
    spacing=st.tuples(*[st.sampled_from([0.5, 0.7, 1.0, 2.5])] * 3),
)
def test_resampling_agrees_with_torch_and_image_stays_on_label(shape, spacing):
    steps = Preprocessing(spacing=(1.0, 1.0, 1.0), normalize="none")
    array = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
    prepared = steps.prepare(Volume(array, spacing))
    wanted = tuple(max(1, round(n * s)) for n, s in zip(shape, spacing, strict=True))
    assert prepared.shape == wanted
    assert prepared.spacing == pytest.approx(
        [s * n / m for s, n, m in zip(spacing, shape, wanted, strict=True)]
    )
    peer = torch.nn.functional.interpolate(torch.from_numpy(array)[None], wanted, mode="trilinear")[0]
    assert np.abs(prepared.image - peer.numpy()).max() < 1e-4
    label = np.zeros(shape, np.uint8)
    label[: shape[0] // 2 + 1] = 1
    moved = steps.prepare_label(label, prepared)
    image = steps.prepare(Volume(label[None].astype(np.float32), spacing)).image[0]
    sure = np.abs(image - 0.5) > 0.01
    assert np.array_equal(moved[sure], image[sure] > 0.5)
    prob = steps.restore(np.stack([1 - image, image]), prepared)
    assert prob.shape == (2, *shape)
    assert np.abs(prob.sum(0) - 1).max() < 1e-5


def test_restoring_without_resampling_changes_nothing():
    prepared = Preprocessing().prepare(Volume(scan()[None], None))
    prob = scan((2, 6, 7, 8))
    assert np.array_equal(Preprocessing().restore(prob, prepared), prob)


def test_refused_preprocessing():
    for wrong, message in (
        ({"normalize": "max"}, "normalize: expected zscore"),
        ({"spacing": (1.0, 1.0)}, "spacing: expected 3 numbers"),
        ({"spacing": (1.0, 0.0, 1.0)}, "spacing: expected 3 numbers"),
        ({"spatial_dims": 4}, "spatial_dims"),
        ({"spacing": (1.0, 1.0), "size": (8, 8), "spatial_dims": 2}, "leave data.spacing empty"),
    ):
        with pytest.raises(ValueError, match=message):
            Preprocessing(**wrong)
    with pytest.raises(CaseError, match="do not say their spacing"):
        Preprocessing(spacing=(1.0, 1.0, 1.0)).prepare(Volume(scan()[None], None))
    with pytest.raises(ValueError, match="expected 3 spatial axes, got 2"):
        Preprocessing().prepare(Volume(scan((1, 4, 4)), None))
    prepared = Preprocessing().prepare(Volume(scan()[None], None))
    with pytest.raises(CaseError, match="image is 6 x 7 x 8, label 6 x 7 x 9"):
        Preprocessing().prepare_label(mask((6, 7, 9)), prepared)
    with pytest.raises(ValueError, match="prob: expected"):
        Preprocessing().restore(scan((2, 3, 3, 3)), prepared)


# ---- check --------------------------------------------------------------------------------------


def kinds(problems):
    return {(problem.case, problem.kind, problem.severity) for problem in problems}


def broken_folder(root):
    """One folder with every fault; what must be said of it, headers alone and in full."""
    dataset_json(root, training=[{"image": "./imagesTr/listed.nii.gz", "label": "./labelsTr/listed.nii.gz"}])
    shift = np.eye(4)
    shift[0, 3] = 3
    good = {"image": scan(), "label": mask(), "affine": None}
    images = {
        "nan": {"image": np.where(scan() > 2, np.nan, scan())},
        "constant": {"image": np.full((6, 7, 8), 5.0, np.float32)},
        "shape": {"label": mask((6, 7, 9))},
        "geometry": {"affine": shift},
        "spacing": {"affine": np.diag([1.0, 1.0, 2.0, 1.0])},
        "fourd": {"image": scan((6, 7, 8, 3))},
        "values": {"label": mask(values=(0, 1, 7))},
        "halves": {"label": mask().astype(np.float32) / 2},
        "negative": {"label": mask().astype(np.int16) - 1},
        "empty": {"label": mask(values=(0,))},
        "fine": {},
        "whole": {"label": mask().astype(np.float32)},
    }
    for name, change in images.items():
        made = good | change
        nifti(root / f"imagesTr/{name}.nii.gz", made["image"])
        nifti(root / f"labelsTr/{name}.nii.gz", made["label"], made["affine"])
    nifti(root / "imagesTr/unlabeled.nii.gz", scan())
    nifti(root / "imagesUn/fine.nii.gz", scan())
    nifti(root / "labelsTr/orphan.nii.gz", mask())
    nifti(root / "imagesTr/cut.nii.gz", scan((20, 20, 20)))
    content = (root / "imagesTr/cut.nii.gz").read_bytes()
    (root / "imagesTr/cut.nii.gz").write_bytes(content[: len(content) // 2])
    (root / "imagesTr/junk.nii.gz").write_bytes(b"not a scan")
    (root / "imagesTr/zero.nii.gz").write_bytes(b"")
    quick = {
        ("listed", "missing-image", "error"),
        ("orphan", "missing-image", "error"),
        ("fine", "duplicate", "error"),
        ("shape", "shape", "error"),
        ("geometry", "geometry", "error"),
        ("spacing", "geometry", "error"),
        ("fourd", "dimensions", "error"),
        ("junk", "unreadable", "error"),
        ("zero", "unreadable", "error"),
        *((name, "unlabeled", "note") for name in ("unlabeled", "cut", "junk", "zero", "fine")),
    }
    full = quick | {
        ("nan", "non-finite", "error"),
        ("constant", "constant", "warning"),
        ("cut", "unreadable", "error"),
        ("values", "labels", "error"),
        ("halves", "float-labels", "error"),
        ("negative", "labels", "error"),
        ("empty", "empty", "note"),
    }
    return quick, full


def test_check_lists_every_fault_at_once(tmp_path):
    quick, full = broken_folder(tmp_path)
    assert kinds(check_cases(tmp_path, quick=True)) == quick
    problems = check_cases(tmp_path)
    assert kinds(problems) == full
    severities = [problem.severity for problem in problems]
    assert severities == sorted(severities, key=["error", "warning", "note"].index)
    said = {problem.case: problem.message for problem in problems if problem.severity == "error"}
    assert said["shape"] == "image is 6 x 7 x 8, label 6 x 7 x 9"
    assert said["spacing"] == "image spacing 1 x 1 x 1 mm, label 1 x 1 x 2 mm"
    assert said["values"] == "label values 7, but dataset.json names 0, 1"
    assert "e.g. 0.5" in said["halves"]


def test_check_of_hippocampus_bad(tmp_path, capsys):
    root = data_dir("hippocampus_bad")
    assert kinds(check_cases(root)) == {
        ("hippocampus_010", "missing-image", "error"),
        ("hippocampus_281", "missing-image", "error"),
        ("hippocampus_118", "unlabeled", "note"),
    }
    assert cli.main(["check", str(root)]) == 1
    printed = capsys.readouterr().out
    for name in ("hippocampus_010", "hippocampus_281", "unlabeled: hippocampus_118", "2 error(s)"):
        assert name in printed
    # The same labels under the image's name: a real mismatch of shapes, then of everything.
    for wrong, kind in (("010", "shape"), ("281", "shape")):
        place = tmp_path / wrong
        for folder, name in (("imagesTr", "118"), ("labelsTr", wrong)):
            (place / folder).mkdir(parents=True)
            source = root / folder / f"hippocampus_{name}.nii.gz"
            shutil.copy(source, place / folder / "hippocampus_118.nii.gz")
        assert ("hippocampus_118", kind, "error") in kinds(check_cases(place, quick=True))


@pytest.mark.parametrize("name", ["la", "acdc", "hippocampus", "polyp/kvasir_native"])
def test_real_folders_have_no_errors(name):
    report = check_folder(data_dir(name.split("/")[0]).joinpath(*name.split("/")[1:]), quick=name != "acdc")
    assert report.count("error") == report.count("warning") == 0
    if name == "acdc":
        assert {p.kind for p in report.problems} == {"empty"}
        assert len(report.problems) == 10
        assert list(report.values) == [0, 1, 2, 3]


def test_check_with_a_split_leaves_other_labels_alone(tmp_path):
    hippocampus_part(tmp_path, 4)
    roles = split(find_cases(tmp_path), DataConfig(labeled=2))
    unlabeled = [f"{case.id}.nii.gz" for case in roles.unlabeled]
    for name in unlabeled:
        (tmp_path / "labelsTr" / name).write_bytes(b"junk")
    assert kinds(check_cases(tmp_path, split=roles)) == {(c.id, "unlabeled", "note") for c in roles.unlabeled}
    assert len([p for p in check_cases(tmp_path) if p.severity == "error"]) == 2


def test_check_of_h5_and_pictures(tmp_path):
    root = tmp_path / "h5"
    root.mkdir()
    (root / "train.list").write_text("good\nnokey\ncut\ngone\nshape\ngood\nflat\n")
    for name, content in {
        "good": {"image": scan(), "label": mask()},
        "nokey": {"label": mask()},
        "cut": {"image": scan()},
        "shape": {"image": scan(), "label": mask((6, 7, 9))},
        "flat": {"image": scan((6, 7))},
    }.items():
        (root / name).mkdir()
        with h5py.File(root / name / "mri_norm2.h5", "w") as file:
            for key, array in content.items():
                file[key] = array
    (root / "cut/mri_norm2.h5").write_bytes((root / "good/mri_norm2.h5").read_bytes()[:900])
    found = kinds(check_cases(root))
    assert {
        ("nokey", "missing-key", "error"),
        ("cut", "unreadable", "error"),
        ("gone", "missing-image", "error"),
        ("shape", "shape", "error"),
        ("good", "duplicate", "error"),
        ("flat", "dimensions", "error"),
        ("flat", "unlabeled", "note"),
    } == {entry for entry in found if entry[0] != "cut" or entry[1] == "unreadable"}
    root = tmp_path / "pictures"
    for name, values in (("a", (0, 255)), ("b", (0, 1, 2)), ("c", (0, 1, 2))):
        picture(root / f"images/{name}.png", mask((4, 5), range(20)))
        picture(root / f"masks/{name}.png", mask((4, 5), values))
    picture(root / "masks/c.png", mask((4, 4)))
    picture(root / "masks/d.png", mask((4, 4)))
    assert {
        ("c", "shape", "error"),
        ("d", "missing-image", "error"),
        ("all masks", "mixed-masks", "error"),
    } == kinds(check_cases(root))


def test_check_wants_consecutive_labels(tmp_path):
    for i, values in enumerate([(0, 1), (0, 1, 4)]):
        nifti(tmp_path / f"imagesTr/s{i}.nii.gz", scan())
        nifti(tmp_path / f"labelsTr/s{i}.nii.gz", mask(values=values))
    (problem,) = check_cases(tmp_path)
    assert (problem.case, problem.kind) == ("all labels", "labels")
    assert "{0: 0, 1: 1, 4: 2}; 4 is in 1 case(s): s1" in problem.message
    assert check_cases(tmp_path, label_map={1: 1, 4: 2}) == []
    (problem,) = check_cases(tmp_path, label_map={1: 1})
    assert "values [4] are not in data.label_map" in problem.message


def test_check_sees_one_patient_on_both_sides(tmp_path):
    for name in ("p1_frame01", "p1_frame02"):
        (tmp_path / name).mkdir()
        with h5py.File(tmp_path / name / "mri_norm2.h5", "w") as file:
            file["image"], file["label"] = scan(), mask()
    (tmp_path / "train.list").write_text("p1_frame01")
    (tmp_path / "val.list").write_text("p1_frame02")
    assert kinds(check_cases(tmp_path)) == {("p1_frame02", "patient", "warning")}


def test_check_command(tmp_path, capsys):
    broken_folder(tmp_path / "broken")
    assert cli.main(["check", str(tmp_path / "broken"), "--json"]) == 1
    about = json.loads(capsys.readouterr().out)
    assert about["layout"] == "nnunet"
    assert len([p for p in about["problems"] if p["severity"] == "error"]) == about["counts"]["error"] == 14
    root = write_phantoms(tmp_path / "good", labeled=1, unlabeled=1, test=0, shape=(16, 16, 16))
    assert cli.main(["check", str(root), "--label-map", "1=1"]) == 0
    assert "1 labeled, 1 unlabeled" in capsys.readouterr().out
    assert cli.main(["check", str(root), "--label-map", "one"]) == 1
    assert "expected VALUE=CLASS" in capsys.readouterr().err
    assert cli.main(["check", str(tmp_path / "nowhere")]) == 1
    assert "expected a folder" in capsys.readouterr().out


# ---- convert ------------------------------------------------------------------------------------


def same_cases(one, other):
    assert ids(one) == ids(other)
    for a, b in zip(one, other, strict=True):
        assert a.labeled == b.labeled
        first, second = read_image(a), read_image(b)
        assert np.array_equal(first.array, second.array)
        assert first.spacing == second.spacing
        if first.header is not None and second.header is not None:
            assert np.array_equal(first.header.get_best_affine(), second.header.get_best_affine())
        if a.labeled:
            assert np.array_equal(read_label(a), read_label(b))


def test_nifti_to_h5_and_back(tmp_path):
    root = hippocampus_part(tmp_path / "nifti", 3)
    (root / "labelsTr" / "hippocampus_003.nii.gz").unlink()
    about = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps(about))
    write_phantoms(tmp_path / "p", labeled=1, unlabeled=0, test=1, shape=(16, 16, 16))
    shutil.copytree(tmp_path / "p/imagesTs", root / "imagesTs")
    shutil.copytree(tmp_path / "p/labelsTs", root / "labelsTs")
    (root / "imagesTs/phantom_001_0000.nii.gz").rename(root / "imagesTs/phantom_001.nii.gz")
    assert convert(root, tmp_path / "h5", "h5") == []
    assert (tmp_path / "h5/data/hippocampus_001/mri_norm2.h5").is_file()
    assert convert(tmp_path / "h5", tmp_path / "again", "nnunet") == []
    first, middle, last = (find_cases(tmp_path / name) for name in ("nifti", "h5", "again"))
    same_cases(first.cases, middle.cases)
    same_cases(first.test, middle.test)
    same_cases(first.test, last.test)
    same_cases(sorted(first.cases, key=lambda c: not c.labeled), last.cases)
    assert (tmp_path / "again/imagesUn/hippocampus_003_0000.nii.gz").is_file()
    assert check_cases(tmp_path / "again")[-1].kind == "unlabeled"


def test_la_to_nifti_needs_a_spacing(tmp_path):
    source = data_dir("la")
    names = (source / "train.list").read_text().split()[:1], (source / "val.list").read_text().split()[:1]
    root = tmp_path / "la"
    for part, listed in zip(("train", "val"), names, strict=True):
        for name in listed:
            shutil.copytree(source / "2018LA_Seg_Training Set" / name, root / "with space" / name)
        (root / f"{part}.list").write_text("\n".join(listed))
    with pytest.raises(CaseError, match="give spacing"):
        convert(root, tmp_path / "out", "nnunet")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["la"]
    assert (
        cli.main(["convert", str(root), str(tmp_path / "out"), "--to", "nnunet", "--spacing", *["0.625"] * 3])
        == 0
    )
    found = find_cases(tmp_path / "out")
    assert set(ids(found.cases)) == {*names[0], *names[1]}
    assert found.class_names == ("background", "foreground")
    volume = read_image(found.cases[0])
    assert volume.spacing == (0.625, 0.625, 0.625)
    with h5py.File(root / "with space" / found.cases[0].id / "mri_norm2.h5") as file:
        assert np.array_equal(volume.array[0], file["image"][()])
        assert np.array_equal(read_label(found.cases[0]), file["label"][()])


def test_pictures_to_nnunet_and_back(tmp_path):
    folder_of("image", tmp_path / "images")
    source = find_cases(tmp_path / "images")
    assert convert(tmp_path / "images", tmp_path / "nnunet", "nnunet") == []
    assert convert(tmp_path / "nnunet", tmp_path / "again", "images") == []
    middle, last = find_cases(tmp_path / "nnunet"), find_cases(tmp_path / "again")
    assert (middle.layout, middle.spatial_dims, middle.channels) == ("nnunet", 2, 3)
    same_cases(source.cases, middle.cases)
    same_cases(source.cases, last.cases)
    with pytest.raises(CaseError, match=r"holds one channel, .* has 3"):
        convert(tmp_path / "images", tmp_path / "h5", "h5")


def test_grey_pictures_to_h5_slices(tmp_path):
    for name in ("a", "b"):
        picture(tmp_path / f"images/{name}.png", mask((6, 7), range(40)))
    picture(tmp_path / "masks/a.png", mask((6, 7), (0, 255)))
    convert(tmp_path, tmp_path / "h5", "h5")
    assert (tmp_path / "h5/train_slices.list").read_text() == "a\nb\n"
    convert(tmp_path / "h5", tmp_path / "again", "images")
    same_cases(find_cases(tmp_path).cases, find_cases(tmp_path / "again").cases)


def test_refused_conversions(tmp_path, monkeypatch):
    acdc, root = data_dir("acdc"), hippocampus_part(tmp_path / "n", 2)
    for source, to, message in (
        (acdc, "nnunet", "not NIfTI volumes"),
        (acdc, "images", "no list of test or validation cases"),
        (root, "images", "holds 2-D pictures"),
        (root, "nnunet", "has layout nnunet already"),
        (root, "dicom", "to: expected nnunet, h5, images"),
    ):
        with pytest.raises(CaseError, match=message):
            convert(source, tmp_path / "out", to)
    (tmp_path / "taken").mkdir()
    with pytest.raises(FileExistsError, match="exists"):
        convert(root, tmp_path / "taken", "h5")
    shutil.copytree(acdc / "data/slices", tmp_path / "s/data", copy_function=os.symlink)
    (tmp_path / "s/train_slices.list").write_text("patient099_frame01_slice_1")
    with pytest.raises(CaseError, match="not of 8 bits"):
        convert(tmp_path / "s", tmp_path / "out", "images")
    (root / "imagesTr/hippocampus_003.nii.gz").write_bytes(b"junk")  # the second case: after one was written
    with pytest.raises(CaseError, match="hippocampus_003"):
        convert(root, tmp_path / "out", "h5")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["n", "s", "taken"]


def test_commands_have_help_with_examples(capsys):
    for command in ("check", "convert"):
        with pytest.raises(SystemExit) as done:
            cli.main([command, "--help"])
        assert done.value.code == 0
        assert "examples:" in capsys.readouterr().out


def test_settings_default_to_the_whole_folder():
    assert scans.IGNORE == cases.IGNORE == 255
    assert phantom(0, (16, 16, 16))[1].max() == 1
