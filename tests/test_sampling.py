# SPDX-License-Identifier: Apache-2.0
"""Patches of labeled and unlabeled cases: a function of (seed, step, slot), aligned, shared by ranks."""

import os
import shutil
import signal
from collections import Counter

import numpy as np
import pytest
from conftest import data_dir
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("nibabel")
torch = pytest.importorskip("torch")

from semisam.engine.cases import CaseError, Split, Volume, find_cases, split, write_label  # noqa: E402
from semisam.engine.config import Config, DataConfig, TrainConfig  # noqa: E402
from semisam.engine.phantom import write_phantoms  # noqa: E402
from semisam.engine.preprocess import Preprocessing  # noqa: E402
from semisam.engine.sampling import PatchSource, augment_slice, augment_volume, crop  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def roles(tmp_path_factory):
    root = write_phantoms(tmp_path_factory.mktemp("p"), labeled=3, unlabeled=5, test=0, shape=(20, 22, 18))
    return split(find_cases(root), DataConfig())


def source(roles, rank=0, world=1, data=None, **train):
    train = {"patch_size": [16, 16, 16], "batch_size": 4, "labeled_batch": 2, "steps": 20} | train
    return PatchSource(roles, Preprocessing(), TrainConfig(**train), data or DataConfig(), 2, rank, world)


def equal(a, b):
    return (
        torch.equal(a.image, b.image)
        and torch.equal(a.label, b.label)
        and (a.ids, a.spacing) == (b.ids, b.spacing)
    )


def test_a_batch_is_a_function_of_its_step(roles):
    one, other = source(roles), source(roles)
    forward = [one.batch(step) for step in range(6)]
    backward = [other.batch(step) for step in reversed(range(6))][::-1]
    assert all(equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert not equal(forward[0], forward[3])
    assert not torch.equal(forward[0].image, source(roles, seed=1).batch(0).image)
    batch = forward[2]
    assert (batch.labeled, batch.unlabeled) == (2, 2)
    assert batch.image.dtype == torch.float32
    assert batch.label.dtype == torch.uint8
    assert batch.ids == (8, 9, 10, 11)
    assert batch.spacing == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_batch_of_one_rank(roles, world):
    whole = source(roles, batch_size=8, labeled_batch=4)
    parts = [source(roles, rank, world, batch_size=8, labeled_batch=4) for rank in range(world)]
    for step in (0, 5):
        alone, shared = whole.batch(step), [part.batch(step) for part in parts]
        n = 4 // world
        image = torch.cat([b.image[:n] for b in shared] + [b.image[n:] for b in shared])
        assert torch.equal(image, alone.image)
        assert torch.equal(torch.cat([b.label for b in shared]), alone.label)
        assert sum((b.ids[:n] for b in shared), ()) + sum((b.ids[n:] for b in shared), ()) == alone.ids


def test_loader_equals_batches_and_resumes(roles):
    every = list(source(roles, steps=6).loader())
    assert len(every) == 6
    late = list(source(roles, steps=6).loader(4))
    assert all(equal(a, b) for a, b in zip(every[4:], late, strict=True))
    assert len(list(source(roles, steps=2, accumulate=3).loader())) == 6
    working = list(source(roles, steps=6, data=DataConfig(workers=2)).loader(1))
    assert all(equal(a, b) for a, b in zip(every[1:], working, strict=True))


def test_a_killed_worker_is_named(roles):
    made = source(roles, data=DataConfig(workers=1))
    real = made.arrays

    def arrays(step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(step)

    made.arrays = arrays
    with pytest.raises(RuntimeError, match=r"a data worker died .*lower data.workers \(now 1"):
        list(made.loader())


def test_a_workers_case_error_arrives_as_one(roles):
    made = source(roles, data=DataConfig(workers=1))

    def arrays(step):
        raise CaseError("scan_01: torn")

    made.arrays = arrays
    with pytest.raises(CaseError, match=r"^scan_01: torn$"):
        list(made.loader())


def test_both_streams_cover_their_cases(roles):
    made = source(roles, labeled_batch=2, batch_size=5)
    drawn = [[made.case(step, slot).id for slot in range(5)] for step in range(50)]
    for step in drawn:  # one group of a permutation: never the same labeled case twice
        assert len(set(step[:2])) == 2
    labeled = Counter(i for step in drawn for i in step[:2])
    assert set(labeled) == {case.id for case in roles.labeled}
    unlabeled = [i for step in drawn for i in step[2:]]
    for epoch in range(0, 150, 5):  # endless permutations: each 5 in a row hold everyone
        assert set(unlabeled[epoch : epoch + 5]) == {case.id for case in roles.unlabeled}
    assert len({tuple(unlabeled[e : e + 5]) for e in range(0, 150, 5)}) > 10


def test_fewer_labeled_cases_than_slots(roles):
    few = Split(roles.labeled[:1], roles.unlabeled)
    batch = source(few).batch(0)
    assert batch.labeled == 2
    assert not torch.equal(batch.image[0], batch.image[1])


def test_without_unlabeled_cases(roles):
    batch = source(Split(roles.labeled, [])).batch(3)
    assert (batch.labeled, batch.unlabeled, batch.ids) == (2, 0, (6, 7))
    assert source(roles, batch_size=2).batch(0).unlabeled == 0


def test_cache_and_its_size(roles):
    made = source(roles)
    voxels = 20 * 22 * 18
    assert made.memory == 8 * voxels * 4 + 3 * voxels
    made.load()
    assert sum(i.nbytes + (0 if la is None else la.nbytes) for i, la in made._cache.values()) == made.memory
    plain = source(roles, data=DataConfig(cache=False))
    assert equal(plain.batch(2), made.batch(2))
    assert not plain._cache


@pytest.mark.parametrize(
    ("train", "world", "message"),
    [
        ({"labeled_batch": 0}, 1, "train.labeled_batch: expected 1..4"),
        ({"labeled_batch": 5}, 1, "train.labeled_batch: expected 1..4"),
        ({"labeled_batch": 3}, 2, "train.labeled_batch: 3 cannot be shared evenly by 2"),
        ({"labeled_batch": 2, "batch_size": 5}, 2, "unlabeled patches: 3 cannot be shared"),
        ({"patch_size": [8, 8]}, 1, "train.patch_size: expected 3 numbers"),
        ({"patch_size": [8, 8, 0]}, 1, "train.patch_size: expected 3 numbers"),
    ],
)
def test_refused_settings(roles, train, world, message):
    with pytest.raises(ValueError, match=message):
        source(roles, 0, world, **train)


def test_no_labeled_case_and_wrong_labels(roles, tmp_path):
    with pytest.raises(CaseError, match="no labeled case to train on"):
        source(Split([], roles.unlabeled))
    root = write_phantoms(tmp_path / "p", labeled=1, unlabeled=0, test=0, shape=(16, 16, 16))
    like = Volume(np.zeros((1, 16, 16, 16), np.float32), (1.0, 1.0, 1.0))
    path = root / "labelsTr/phantom_000.nii.gz"
    write_label(path, np.full((16, 16, 16), 5), like)
    with pytest.raises(CaseError, match=r"phantom_000: label values \[5\]: expected 0..1"):
        source(split(find_cases(root), DataConfig())).batch(0)
    write_label(path, np.zeros((16, 16, 17)), like._replace(array=np.zeros((1, 16, 16, 17))))
    with pytest.raises(CaseError, match="phantom_000: image is 16 x 16 x 16, label 16 x 16 x 17"):
        source(split(find_cases(root), DataConfig())).batch(0)


# ---- augmentation -------------------------------------------------------------------------------


def padded_crop(array, size, random):
    """The formula of UA-MT, word for word."""
    if any(n <= p for n, p in zip(array.shape, size, strict=True)):
        pads = [max((p - n) // 2 + 3, 0) for n, p in zip(array.shape, size, strict=True)]
        array = np.pad(array, [(q, q) for q in pads])
    starts = [int(random.integers(0, n - p)) for n, p in zip(array.shape, size, strict=True)]
    return array[tuple(slice(s, s + p) for s, p in zip(starts, size, strict=True))]


@settings(max_examples=150, deadline=None)
@example(shape=(1, 1, 3), size=(1, 1, 1), seed=2)  # a window that misses the image
@given(
    shape=st.tuples(*[st.integers(1, 14)] * 3),
    size=st.tuples(*[st.integers(1, 12)] * 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_crop_is_the_published_one_and_keeps_the_label_on_its_image(shape, size, seed):
    label = np.arange(1, np.prod(shape) + 1, dtype=np.int64).reshape(shape)
    image = np.stack([label, -label]).astype(np.float64)
    patch, cut = crop(image, label, size, np.random.default_rng(seed))
    assert patch.shape == (2, *size)
    assert np.array_equal(patch[0], cut)
    assert np.array_equal(patch[1], -cut)
    assert np.array_equal(cut, padded_crop(label, size, np.random.default_rng(seed)))
    assert np.array_equal(patch, crop(image, None, size, np.random.default_rng(seed))[0])


def test_augmented_volume_is_one_of_the_mirrored_turns():
    label = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    wanted = {
        np.flip(np.rot90(label, k, (0, 1)), axis).tobytes(): (k, axis) for k in range(4) for axis in range(2)
    }
    seen = Counter()
    for seed in range(400):
        image, turned = augment_volume(label[None], label, np.random.default_rng(seed))
        assert np.array_equal(image[0], turned)
        seen[wanted[np.ascontiguousarray(turned).tobytes()]] += 1
    assert len(seen) == 4  # a turn and a flip: four mirror images, each in two ways
    assert min(seen.values()) > 60


def test_labels_lie_on_their_images_through_the_whole_source(tmp_path):
    """Images that are their labels stay so: reading, resampling, turning, cropping."""
    root = write_phantoms(tmp_path / "p", labeled=2, unlabeled=1, test=0, shape=(20, 22, 18))
    for path in (root / "imagesTr").iterdir():
        path.unlink()
        shutil.copy(root / "labelsTr" / path.name.replace("_0000", ""), path)
    steps = Preprocessing(normalize="none")
    train = TrainConfig(patch_size=[16, 24, 16])
    made = PatchSource(split(find_cases(root), DataConfig()), steps, train, DataConfig(), 2)
    total = 0
    for step in range(5):
        batch = made.batch(step)
        assert torch.equal(batch.image[:2, 0], batch.label.float())
        total += int(batch.label.sum())
    assert total > 100


def test_without_augmentation_the_crop_stays(roles):
    made = source(roles, augment=False, patch_size=[20, 22, 18])
    patch = made.patch(0, 0)[0]
    image = made._cache[made.case(0, 0).id][0]
    inner = patch[0, 6:14, 6:14, 6:14]
    windows = np.lib.stride_tricks.sliding_window_view(image[0], inner.shape)
    assert (windows == inner).all((3, 4, 5)).any()
    starts = {made.patch(step, 0)[0].tobytes() for step in range(8)}
    assert len(starts) > 4


@pytest.mark.data
def test_la_volumes_are_cropped_as_published():
    roles = split(find_cases(data_dir("la")), DataConfig(labeled=2, unlabeled=2))
    train = TrainConfig(patch_size=[112, 112, 80], batch_size=2, labeled_batch=1)
    batch = PatchSource(roles, Preprocessing(), train, DataConfig(), 2).batch(0)
    assert tuple(batch.image.shape) == (2, 1, 112, 112, 80)
    assert batch.spacing is None
    assert set(batch.label.unique().tolist()) <= {0, 1}


@pytest.mark.data
def test_acdc_slices_and_polyps_fill_the_patch():
    for folder, classes, channels in (("acdc", 4, 1), ("polyp/kvasir_native", 2, 3)):
        root = data_dir(folder.split("/")[0]).joinpath(*folder.split("/")[1:])
        config = Config(train=TrainConfig(patch_size=[64, 48], augment=False))
        roles = split(find_cases(root), DataConfig(labeled=2))
        made = PatchSource(roles, Preprocessing.of(config, 2), config.train, config.data, classes)
        batch = made.batch(0)
        assert tuple(batch.image.shape) == (4, channels, 64, 48)
        assert batch.image[0].mean().abs() < 1e-5
        assert torch.equal(batch.image[0], torch.from_numpy(made._cache[made.case(0, 0).id][0]))
        config.train.augment = True
        views = {made.patch(step, 0)[0].tobytes() for step in range(20)}
        assert len(views) > 10


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_weak_view_keeps_the_mask_on_its_image(seed):
    rows, columns = np.mgrid[:40, :48]
    disk = ((rows - 15) ** 2 + (columns - 26) ** 2 < 110).astype(np.uint8)
    image = np.stack([disk, 1 - disk]).astype(np.float32)
    before = image.copy()
    view, label = augment_slice(image, disk, np.random.default_rng(seed))
    assert np.array_equal(image, before)
    assert view.dtype == np.float32
    assert label.dtype == np.uint8
    middle = (view[0] + view[1]) / 2
    holes = (view == 0).all(0)
    assert (label[holes] == 0).all()
    assert ((view[0] > middle) == (label == 1))[~holes].mean() > 0.96
    assert view.min() >= 0
    assert view.max() <= 1
    alone, none = augment_slice(image, None, np.random.default_rng(seed))
    assert none is None
    assert np.array_equal(alone, view)


def test_weak_view_does_each_thing_as_often_as_stated():
    image = np.random.default_rng(0).random((1, 32, 32)).astype(np.float32) + 1
    seen = Counter()
    for seed in range(400):
        view, _ = augment_slice(image, None, np.random.default_rng(seed))
        seen["holes"] += bool((view == 0).any())
        flips = {
            name: np.flip(image, axes).tobytes() == view.tobytes()
            for name, axes in (("none", ()), ("rows", 1), ("columns", 2), ("both", (1, 2)))
        }
        seen.update(name for name, same in flips.items() if same)
    assert 160 < seen["holes"] < 240
    untouched = sum(seen[name] for name in ("none", "rows", "columns", "both"))
    assert 50 < untouched < 115  # 0.8 x 0.5 x 0.5 of them
    assert all(seen[name] > 5 for name in ("none", "rows", "columns", "both"))
