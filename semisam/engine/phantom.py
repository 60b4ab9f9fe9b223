# SPDX-License-Identifier: Apache-2.0
"""Seeded volumes with anatomy-like shapes, for the demonstration and for tests without data.

A bent, tapering organ lies somewhere in a body of textured tissue. A round neighbour of the same grey
touches it, so that its grey does not say where it ends; another blob of that grey, a bright tube and a dark
cavity lie about; a smooth bias field and noise lie over all of it. Position, size, orientation and shape vary
so much that neither a threshold nor the mean position finds the organ.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from semisam.engine.files import write_json
from semisam.engine.scans import Volume, write_label, write_map

__all__ = ["phantom", "write_phantoms"]

Array = np.ndarray[Any, Any]
NAMES = {1: ("background", "organ"), 2: ("background", "head", "tail")}


def phantom(seed: int, shape: Sequence[int] = (48, 48, 48), classes: int = 1) -> tuple[Array, Array]:
    """Return an image (float32 `shape`) and its label (uint8), the same ones for the same arguments.

    `classes` 1: the organ; 2: its thick half ("head", 1) and its thin half ("tail", 2). Raises
    ValueError for other numbers, or sides shorter than 16 voxels.

    >>> from semisam.engine.phantom import phantom
    >>> image, label = phantom(0, (32, 32, 32))
    >>> image.shape, str(image.dtype), label.max().item()
    ((32, 32, 32), 'float32', 1)
    """
    if classes not in NAMES:
        raise ValueError(f"classes: expected 1 or 2, got {classes}")
    if len(shape) != 3 or min(shape) < 16:
        raise ValueError(f"shape: expected 3 sides of at least 16 voxels, got {list(shape)}")
    random = np.random.default_rng([seed, 0x0F])
    axes = [np.linspace(-1, 1, n, dtype=np.float32) for n in shape]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"))
    warp = np.stack([_smooth(random, shape, 6.0) for _ in range(3)])
    voxel = 2.0 / min(shape)

    # The organ: long axis near the plane of axes 0 and 1, thicker at one end, bent.
    turn = _rotation(random.uniform(-np.pi, np.pi), *random.uniform(-0.4, 0.4, 2))
    centre = random.uniform(-0.3, 0.3, 3) * (1, 1, 0.7) - (0, 0, 0.15)
    length, width, depth = (
        np.array((0.6, 0.34, 0.28)) * random.uniform(0.85, 1.2) * random.uniform(0.9, 1.1, 3)
    )
    moved = grid + 0.07 * warp
    x, y, z = np.einsum("ij,j...->i...", turn.T, moved - centre.reshape(3, 1, 1, 1))
    along = x / length
    y = y + random.uniform(0.08, 0.2) * (along**2 - 0.5)
    taper = np.clip(1 - 0.38 * along, 0.35, 1.6)
    organ = (np.sqrt(along**2 + (y / (width * taper)) ** 2 + (z / (depth * taper)) ** 2) - 1) * depth

    # Its neighbour: round, of the same grey, on the far side of axis 2, touching.
    away = _unit(np.array((*random.uniform(-0.6, 0.6, 2), 1.0)))
    radius = random.uniform(0.24, 0.34)
    steps = np.linspace(0, 1.2, 61)
    path = [np.round(((centre + s * away + 1) / 2) * (np.array(shape) - 1)).astype(int) for s in steps]
    edge = next((s for s, p in zip(steps, path, strict=True) if _outside(organ, p)), 0.3)
    neighbour = _ball(moved, centre + (edge + 0.85 * radius) * away, radius * random.uniform(0.85, 1.15, 3))

    # Elsewhere: a blob of the organ's grey, a bright tube, a dark cavity.
    far = -_unit(np.array((*random.uniform(-1, 1, 2), random.uniform(-0.2, 0.6)))) * random.uniform(0.7, 0.85)
    blob = _ball(moved, centre * 0.3 - far, random.uniform(0.12, 0.2, 3))
    line = _rotation(*random.uniform(-np.pi, np.pi, 3)).T
    a, b, c = np.einsum("ij,j...->i...", line, grid - random.uniform(-0.5, 0.5, 3).reshape(3, 1, 1, 1))
    tube = np.sqrt((a + 0.15 * np.sin(3 * c)) ** 2 + b**2) - random.uniform(0.05, 0.09)
    cavity = _ball(moved, random.uniform(-0.7, 0.7, 3), random.uniform(0.15, 0.3, 3))
    body = _ball(grid + 0.1 * warp[::-1], random.uniform(-0.05, 0.05, 3), random.uniform(1.0, 1.2, 3))

    contrast = random.uniform(0.35, 0.5)
    image = 0.1 + 0.9 * _cover(body, voxel) * (1 + 0.09 * _smooth(random, shape, 2.0))
    for part, grey in ((cavity, 0.45), (tube, 1.15 + contrast), (blob, 1 + contrast)):
        image = _over(image, part, grey, voxel)
    image = _over(image, neighbour, 1 + contrast, voxel)
    image = _over(image, organ - 0.8 * voxel, 1 + 0.3 * contrast, voxel)  # a thin capsule, fainter than both
    image = _over(image, organ, 1 + contrast * (1 + 0.1 * np.clip(along, -1, 1)), voxel)
    image *= np.exp(0.22 * _smooth(random, shape, min(shape) / 3))
    image += random.normal(0, random.uniform(0.1, 0.16), shape)
    label = (organ < 0).astype(np.uint8)
    if classes == 2:
        label[(organ < 0) & (along > random.uniform(-0.1, 0.1))] = 2
    return (image * random.uniform(80, 800)).astype(np.float32), label


def write_phantoms(
    root: str | Path,
    labeled: int = 2,
    unlabeled: int = 14,
    test: int = 8,
    seed: int = 0,
    shape: Sequence[int] = (48, 48, 48),
    classes: int = 1,
) -> Path:
    """Write phantoms as an nnU-Net folder (imagesTr, labelsTr, imagesUn, imagesTs, labelsTs); return it.

    No label is written for the unlabeled ones. Raises FileExistsError if the folder has an imagesTr already.

    >>> import tempfile
    >>> from semisam.engine.phantom import write_phantoms
    >>> root = write_phantoms(tempfile.mkdtemp(), labeled=1, unlabeled=1, test=0, shape=(16, 16, 16))
    >>> sorted(path.name for path in root.iterdir())
    ['dataset.json', 'imagesTr', 'imagesUn', 'labelsTr']
    """
    folder = Path(root)
    if (folder / "imagesTr").exists():
        raise FileExistsError(f"{folder / 'imagesTr'} exists: give another folder, or remove it")
    number = 0
    for images, labels, count in (("Tr", "Tr", labeled), ("Un", "", unlabeled), ("Ts", "Ts", test)):
        for _ in range(count):
            image, label = phantom(seed * 10_000 + number, shape, classes)
            like = Volume(image[None], (1.0, 1.0, 1.0))
            write_map(folder / f"images{images}" / f"phantom_{number:03d}_0000.nii.gz", image, like)
            if labels:
                write_label(folder / f"labels{labels}" / f"phantom_{number:03d}.nii.gz", label, like)
            number += 1
    about = {
        "name": "Phantoms",
        "description": "Generated volumes; no patient data",
        "channel_names": {"0": "phantom"},
        "labels": {name: i for i, name in enumerate(NAMES[classes])},
        "numTraining": labeled,
        "file_ending": ".nii.gz",
    }
    write_json(folder / "dataset.json", about)
    return folder


def _smooth(random: np.random.Generator, shape: Sequence[int], sigma: float) -> Array:
    """A random field without detail below `sigma` voxels, standard deviation 1."""
    from scipy import ndimage  # noqa: PLC0415

    field = ndimage.gaussian_filter(random.standard_normal(tuple(shape)), sigma, mode="reflect")
    field -= field.mean()
    return np.asarray(field / max(field.std(), 1e-12), np.float32)


def _rotation(a: float, b: float, c: float) -> Array:
    """Rotation by `a` about axis 2, then by `b` and `c` about axes 0 and 1."""
    rz = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    rx = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    ry = np.array([[np.cos(c), 0, np.sin(c)], [0, 1, 0], [-np.sin(c), 0, np.cos(c)]])
    return np.asarray(rx @ ry @ rz)


def _unit(vector: Array) -> Array:
    return np.asarray(vector / np.linalg.norm(vector))


def _outside(field: Array, index: Array) -> bool:
    inside = all(0 <= i < n for i, n in zip(index, field.shape, strict=True))
    return not inside or bool(field[tuple(index)] > 0)


def _ball(grid: Array, centre: Array, radii: Array) -> Array:
    """Roughly the distance to an ellipsoid, negative inside."""
    ratio = (grid - centre.reshape(3, 1, 1, 1)) / radii.reshape(3, 1, 1, 1)
    return np.asarray((np.sqrt((ratio**2).sum(0)) - 1) * radii.min())


def _cover(distance: Array, voxel: float) -> Array:
    """How much of a voxel a part covers: partial volume over about one voxel."""
    return np.asarray(np.clip(0.5 - distance / voxel, 0, 1))


def _over(image: Array, part: Array, grey: Any, voxel: float) -> Array:
    cover = _cover(part, voxel)
    return np.asarray(image * (1 - cover) + grey * cover)
