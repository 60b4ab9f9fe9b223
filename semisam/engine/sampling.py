# SPDX-License-Identifier: Apache-2.0
"""Batches of labeled and unlabeled patches, each a function of (seed, step, slot) alone.

There is no state to save: `batch(step)` is the same in a new process, after `--resume`, in a worker, and
split over any number of ranks. The labeled stream is one permutation of the labeled cases per epoch, cut
into groups (the remainder waits for another epoch); the unlabeled stream is endless permutations.

MONAI's transforms and cached data sets are not used here: their random state follows the order of calls, and
they read a case's label together with its image, which of an unlabeled case must never be opened.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from semisam.engine.cases import Split
from semisam.engine.config import DataConfig, TrainConfig
from semisam.engine.preprocess import Preprocessing
from semisam.engine.scans import IGNORE, Case, CaseError, read_header, read_image, read_label, times
from semisam.methods.base import Batch

__all__ = ["PatchSource", "augment_slice", "augment_volume", "crop"]

Array = np.ndarray[Any, Any]
LABELED, UNLABELED, AUGMENT = 1, 2, 3  # what a random number is for


class PatchSource:
    """Two-stream batches of patches of a split.

    Every batch holds `labeled_batch` patches of labeled cases, then `batch_size - labeled_batch` of
    unlabeled ones (none if there are no unlabeled cases); a rank of `world` gets its share of both. Scans
    are read once and kept in memory (`data.cache`): `memory` is how many bytes that takes in all. Patches of
    3 axes are augmented by `augment_volume`, of 2 by `augment_slice`; without `train.augment` only the
    random crop of volumes remains.

    Raises CaseError if there is no labeled case, and ValueError for batches that cannot be shared by
    the ranks or a patch of another number of axes than the scans.

    >>> import tempfile
    >>> from semisam.engine.cases import find_cases, split
    >>> from semisam.engine.config import DataConfig, TrainConfig
    >>> from semisam.engine.phantom import write_phantoms
    >>> from semisam.engine.preprocess import Preprocessing
    >>> from semisam.engine.sampling import PatchSource
    >>> root = write_phantoms(tempfile.mkdtemp(), labeled=2, unlabeled=2, test=0, shape=(20, 20, 20))
    >>> roles = split(find_cases(root), DataConfig())
    >>> source = PatchSource(roles, Preprocessing(), TrainConfig(patch_size=[16, 16, 16]), DataConfig(), 2)
    >>> batch = source.batch(7)
    >>> tuple(batch.image.shape), tuple(batch.label.shape), batch.ids
    ((4, 1, 16, 16, 16), (2, 16, 16, 16), (28, 29, 30, 31))
    """

    def __init__(
        self,
        split: Split,
        preprocessing: Preprocessing,
        train: TrainConfig,
        data: DataConfig,
        num_classes: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.labeled_cases, self.unlabeled_cases = list(split.labeled), list(split.unlabeled)
        self.preprocessing, self.train, self.data = preprocessing, train, data
        self.num_classes = num_classes
        self.rank, self.world = rank, world
        self.patch_size = tuple(int(n) for n in train.patch_size)
        self.labeled = int(train.labeled_batch)
        self.unlabeled = int(train.batch_size) - self.labeled if self.unlabeled_cases else 0
        self._check()
        self.pseudo: Any = None  # semisam.engine.offline.PseudoLabels, if whole scans are labeled
        self._cache: dict[str, tuple[Array, Array | None]] = {}
        self._headers = [read_header(case) for case in (*self.labeled_cases, *self.unlabeled_cases)]
        self.spacing = self._spacing()

    def _check(self) -> None:
        if not self.labeled_cases:
            raise CaseError("no labeled case to train on: set data.labeled, or add label files")
        if not 1 <= self.labeled <= self.train.batch_size:
            raise ValueError(
                f"train.labeled_batch: expected 1..{self.train.batch_size} (train.batch_size), "
                f"got {self.labeled}"
            )
        for name, count in (("train.labeled_batch", self.labeled), ("unlabeled patches", self.unlabeled)):
            if count % self.world:
                raise ValueError(f"{name}: {count} cannot be shared evenly by {self.world} processes")
        dims = self.preprocessing.spatial_dims
        if len(self.patch_size) != dims or min(self.patch_size) < 1:
            raise ValueError(f"train.patch_size: expected {dims} numbers > 0, got {list(self.patch_size)}")

    def _spacing(self) -> tuple[float, ...] | None:
        """Median spacing of the prepared scans, or None if one does not know its own."""
        if self.preprocessing.size is not None:
            return None
        known = [self.preprocessing.grid(h.shape, h.spacing)[1] for h in self._headers]
        if any(spacing is None for spacing in known):
            return None
        return tuple(float(v) for v in np.median(np.asarray(known, np.float64), axis=0))

    @property
    def memory(self) -> int:
        """Bytes that all prepared scans and labels take (float32 images, uint8 labels)."""
        total = 0
        for i, head in enumerate(self._headers):
            voxels = math.prod(self.preprocessing.grid(head.shape, head.spacing)[0])
            total += voxels * (4 * self._case(i).channels + (i < len(self.labeled_cases)))
        return total

    def _case(self, i: int) -> Case:
        return (*self.labeled_cases, *self.unlabeled_cases)[i]

    def load(self) -> None:
        """Read every scan into memory now; otherwise that happens as they are drawn."""
        if self.data.cache:
            for case in (*self.labeled_cases, *self.unlabeled_cases):
                self._prepared(case)

    def batch(self, step: int) -> Batch:
        """Return this rank's share of the batch of `step`, as CPU tensors.

        `ids` are slot + batch size x step (mod 2^32), the same as in a run with one rank. Raises CaseError
        for a scan or label that cannot be used.
        """
        return self._as_tensors(self.arrays(step))

    def arrays(self, step: int) -> tuple[Array, Array, tuple[int, ...], Array | None]:
        """Image, label, ids and planes of the pseudo-labels (None without) of `batch(step)`, as arrays."""
        per_rank = self.labeled // self.world, self.unlabeled // self.world
        slots = [self.rank * per_rank[0] + i for i in range(per_rank[0])]
        slots += [self.labeled + self.rank * per_rank[1] + i for i in range(per_rank[1])]
        patches = [self.patch(step, slot) for slot in slots]
        images = np.stack([image for image, _ in patches])
        labels = np.stack([label for _, label in patches if label is not None])
        ids = tuple((slot + (self.labeled + self.unlabeled) * step) % 2**32 for slot in slots)
        taught = self.pseudo is not None and len(slots) > per_rank[0]
        planes = np.stack([self.planes(step, slot) for slot in slots[per_rank[0] :]]) if taught else None
        return images, labels, ids, planes

    def case(self, step: int, slot: int) -> Case:
        """The case that a slot of a step's whole batch is cut from."""
        if slot < self.labeled:
            cases, k = self.labeled_cases, slot
            groups = len(cases) // self.labeled
            if groups:  # whole groups of one permutation; too few cases for one: as the other stream
                epoch, group = divmod(step, groups)
                order = self._permutation(LABELED, epoch, len(cases))
                return cases[int(order[group * self.labeled + k])]
            count, stream = step * self.labeled + k, LABELED
        else:
            cases, stream = self.unlabeled_cases, UNLABELED
            count = step * self.unlabeled + slot - self.labeled
        epoch, position = divmod(count, len(cases))
        return cases[int(self._permutation(stream, epoch, len(cases))[position])]

    def _random(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.train.seed, *key])

    def _permutation(self, stream: int, epoch: int, count: int) -> Array:
        return self._random(stream, epoch).permutation(count)

    def patch(self, step: int, slot: int) -> tuple[Array, Array | None]:
        """One patch: image [channels, *P] float32, label [*P] uint8 (None in an unlabeled slot)."""
        image, label = self._prepared(self.case(step, slot))
        random = self._random(AUGMENT, step, slot)
        if len(self.patch_size) == 2:
            return augment_slice(image, label, random) if self.train.augment else (image, label)
        if self.train.augment:
            image, label = augment_volume(image, label, random)
        return crop(image, label, self.patch_size, random)

    def planes(self, step: int, slot: int) -> Array:
        """The pseudo-label's planes [P, *patch], uint8, of the same patch; zeros where there is no label."""
        image, _ = self._prepared(self.case(step, slot))
        planes = self.pseudo.of(self.case(step, slot).id, image.shape[1:])
        random = self._random(AUGMENT, step, slot)  # from its beginning: the same turns, the same place
        if len(self.patch_size) == 2:
            if self.train.augment:
                planes, _ = augment_slice(planes, None, random, picture=False)
            return np.ascontiguousarray(planes)
        if self.train.augment:
            planes, _ = augment_volume(planes, None, random)
        return crop(planes, None, self.patch_size, random)[0]

    def image(self, case: Case) -> Array:
        """A scan of the split as the network sees it, [channels, *S] float32."""
        return self._prepared(case)[0]

    def spacing_of(self, case: Case) -> tuple[float, ...] | None:
        """The spacing of a prepared scan in mm, or None if it is not known."""
        head = self._headers[[*self.labeled_cases, *self.unlabeled_cases].index(case)]
        if self.preprocessing.size is not None:
            return None
        return self.preprocessing.grid(head.shape, head.spacing)[1]

    def _as_tensors(self, arrays: tuple[Array, Array, tuple[int, ...], Array | None]) -> Batch:
        import torch  # noqa: PLC0415

        images, labels, ids, planes = arrays
        pseudo = None if planes is None else self.pseudo.decoded(torch.from_numpy(planes))
        return Batch(torch.from_numpy(images), torch.from_numpy(labels), ids, self.spacing, pseudo)

    def _prepared(self, case: Case) -> tuple[Array, Array | None]:
        if case.id in self._cache:
            return self._cache[case.id]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            prepared = self.preprocessing.prepare(read_image(case))
        for warning in caught:
            warnings.warn(f"{case.id}: {warning.message}", stacklevel=2)
        label = None
        if case.labeled:
            label = read_label(case, self.data.label_map)
            try:
                label = self.preprocessing.prepare_label(label, prepared)
            except CaseError as error:
                raise CaseError(f"{case.id}: {error}") from None
            wrong = sorted(set(np.unique(label).tolist()) - {*range(self.num_classes), IGNORE})
            if wrong:
                raise CaseError(
                    f"{case.id}: label values {wrong}: expected 0..{self.num_classes - 1} (or {IGNORE}): "
                    f"set data.label_map"
                )
        if len(self.patch_size) != prepared.image.ndim - 1:
            raise CaseError(
                f"{case.id}: {times(prepared.original_shape)} is not a {len(self.patch_size)}-D image"
            )
        if self.data.cache:
            self._cache[case.id] = prepared.image, label
        return prepared.image, label

    def loader(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Yield the batches of steps start, start + 1, ..., stop - 1 (default: all of the run).

        With `data.workers` > 0 processes prepare them ahead, in order; scans are read before these start, so
        that all share one copy. Raises RuntimeError if a worker is killed.
        """
        last = self.train.steps * self.train.accumulate if stop is None else stop
        if self.data.workers < 1:
            for step in range(start, last):
                yield self.batch(step)
            return
        from torch.utils.data import DataLoader  # noqa: PLC0415

        self.load()
        source: Any = _Steps(self)
        loader: Any = DataLoader(
            source,
            batch_size=None,
            sampler=range(start, last),
            num_workers=self.data.workers,
            collate_fn=_as_it_is,
            multiprocessing_context="fork",  # shares the scans
        )
        try:
            for made in loader:
                if isinstance(made, CaseError):
                    raise made
                yield self._as_tensors(made)
        except (RuntimeError, EOFError, ConnectionError) as error:
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            raise RuntimeError(
                f"a data worker died ({' '.join(str(error).split())}), most often for lack of memory: lower "
                f"data.workers (now {self.data.workers}; 0 needs no workers) and start again with --resume"
            ) from error


class _Steps:
    """The steps of a source as a data set with one item per step."""

    def __init__(self, source: PatchSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return self.source.train.steps * self.source.train.accumulate

    def __getitem__(self, step: int) -> Any:  # arrays: they need no room in /dev/shm, as tensors would
        try:
            return self.source.arrays(step)
        except CaseError as error:  # raised again by the loader, without a worker's traceback
            return error


def _as_it_is(batch: Any) -> Any:
    return batch


def augment_volume(
    image: Array, label: Array | None, random: np.random.Generator
) -> tuple[Array, Array | None]:
    """Return views of a volume [channels, n0, n1, n2] and its label, rotated and flipped alike.

    Rotation by k x 90 degrees (k = 0..3) in the plane of axes 0 and 1, then a flip along axis 0 or 1 (always
    one of the two): the augmentation of UA-MT (Yu et al., MICCAI 2019).

    >>> import numpy as np
    >>> from semisam.engine.sampling import augment_volume
    >>> image = np.arange(24.0).reshape(1, 2, 3, 4)
    >>> turned, label = augment_volume(image, image[0], np.random.default_rng(3))
    >>> bool((turned[0] == label).all()), sorted(turned.shape)
    (True, [1, 2, 3, 4])
    """
    k, axis = int(random.integers(4)), int(random.integers(2))
    image = np.flip(np.rot90(image, k, (1, 2)), 1 + axis)
    return image, None if label is None else np.flip(np.rot90(label, k, (0, 1)), axis)


def crop(
    image: Array, label: Array | None, size: Sequence[int], random: np.random.Generator
) -> tuple[Array, Array | None]:
    """Return a random patch of `size` voxels of an image [channels, *S] and its label [*S].

    If any side is not longer than the patch, every side n is padded with max((P - n)//2 + 3, 0) zeros at both
    ends; the start is uniform in [0, n - P), as in UA-MT.

    >>> import numpy as np
    >>> from semisam.engine.sampling import crop
    >>> image = np.ones((1, 4, 9, 9), np.float32)
    >>> patch, label = crop(image, image[0], (8, 8, 8), np.random.default_rng(0))
    >>> patch.shape, bool((patch[0] == label).all()), patch.sum().item() <= 4 * 8 * 8
    ((1, 8, 8, 8), True, True)
    """
    shape = image.shape[1:]
    short = any(n <= p for n, p in zip(shape, size, strict=True))
    pads = [max((p - n) // 2 + 3, 0) if short else 0 for n, p in zip(shape, size, strict=True)]
    starts = [int(random.integers(n + 2 * q - p)) - q for n, p, q in zip(shape, size, pads, strict=True)]
    ends = [s + p for s, p in zip(starts, size, strict=True)]
    # What of the window lies inside; a small patch may miss the image altogether.
    inside = tuple(
        slice(max(s, 0), max(min(e, n), s, 0)) for s, e, n in zip(starts, ends, shape, strict=True)
    )
    place = tuple(slice(i.start - s, i.stop - s) for i, s in zip(inside, starts, strict=True))
    patch = np.zeros((len(image), *size), image.dtype)
    for filled, channel in zip(patch, image, strict=True):
        filled[place] = channel[inside]
    if label is None:
        return patch, None
    cut = np.zeros(tuple(size), label.dtype)
    cut[place] = label[inside]
    return patch, cut


def augment_slice(
    image: Array, label: Array | None, random: np.random.Generator, *, picture: bool = True
) -> tuple[Array, Array | None]:
    """Return a weakly augmented copy of an image [channels, H, W] and its label [H, W].

    SC-SAM's weak view, in this order: flips (0.5 each); brightness and contrast (p 0.2, each +-0.2 of the
    image's range, clipped to it); shift, scale, rotation (p 0.5: up to 0.0625 of the side, 5 %, 10 degrees;
    linear for the image, nearest for the label, mirrored beyond the border); 5 to 8 holes of sides up
    to 12 pixels (p 0.5), 0 in image and label. `picture=False`: an array of label-like planes, for which
    brightness and contrast are left out, neighbours are nearest ones and the dtype stays; with a random
    generator in the same state it moves as the image did. Paper: arXiv 2601.17934.

    >>> import numpy as np
    >>> from semisam.engine.sampling import augment_slice
    >>> image = np.random.default_rng(0).random((3, 32, 32), np.float32)
    >>> view, label = augment_slice(image, np.ones((32, 32), np.uint8), np.random.default_rng(1))
    >>> view.shape, label.shape, str(view.dtype)
    ((3, 32, 32), (32, 32), 'float32')
    """
    image = np.array(image, np.float32 if picture else image.dtype)
    label = None if label is None else label.copy()
    for axis in (0, 1):
        if random.random() < 0.5:
            image = np.flip(image, 1 + axis)
            label = None if label is None else np.flip(label, axis)
    if random.random() < 0.2:
        contrast, brightness = random.uniform(-0.2, 0.2, 2)
        low, high = image.min(), image.max()
        span = high - low
        if picture:
            image = np.clip(low + (image - low) * (1 + contrast) + span * brightness, low, high)
    if random.random() < 0.5:
        image, label = _affine(image, label, random, 1 if picture else 0)
    image = np.array(image, np.float32 if picture else image.dtype)
    label = None if label is None else np.array(label)
    if random.random() < 0.5:
        for _ in range(int(random.integers(5, 9))):
            height, width = image.shape[1:]
            h, w = (int(v) for v in random.integers(1, 13, 2))
            top, left = (
                int(random.integers(max(height - h, 0) + 1)),
                int(random.integers(max(width - w, 0) + 1)),
            )
            image[:, top : top + h, left : left + w] = 0
            if label is not None:
                label[top : top + h, left : left + w] = 0
    return image, label


def _affine(
    image: Array, label: Array | None, random: np.random.Generator, order: int
) -> tuple[Array, Array | None]:
    """Shift, scale and rotate about the centre."""
    from scipy import ndimage  # noqa: PLC0415

    side = np.asarray(image.shape[1:], np.float64)
    shift = random.uniform(-0.0625, 0.0625, 2) * side
    scale = 1 + random.uniform(-0.05, 0.05)
    angle = np.deg2rad(random.uniform(-10, 10))
    # Output voxel o reads input M (o - centre - shift) + centre.
    matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / scale
    centre = (side - 1) / 2
    offset = centre - matrix @ (centre + shift)
    moved = [ndimage.affine_transform(part, matrix, offset, order=order, mode="mirror") for part in image]
    if label is not None:
        label = ndimage.affine_transform(label, matrix, offset, order=0, mode="mirror")
    return np.stack(moved), label
