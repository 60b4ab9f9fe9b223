# SPDX-License-Identifier: Apache-2.0
"""What a run was made of: versions, command, split, and digests of the files that it read."""

from __future__ import annotations

import hashlib
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import semisam
from semisam.engine.files import atomic

__all__ = ["digests", "sha256", "versions", "write_sample"]


def versions() -> dict[str, str]:
    """Return the versions of semisam, Python and the libraries that decide about numbers.

    >>> from semisam.engine import record
    >>> sorted(record.versions())
    ['lightning-fabric', 'monai', 'numpy', 'platform', 'python', 'semisam', 'torch']
    """
    found = {"semisam": semisam.__version__, "python": sys.version.split()[0]}
    for name in ("torch", "numpy", "monai", "lightning-fabric"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return {**found, "platform": platform.platform()}


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file.

    >>> import tempfile, pathlib
    >>> from semisam.engine import record
    >>> place = pathlib.Path(tempfile.mkdtemp()) / "empty"
    >>> _ = place.write_bytes(b"")
    >>> record.sha256(place)[:8]
    'e3b0c442'
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def digests(split: Any) -> dict[str, str]:
    """Return SHA-256 by file of what training reads: images, and labels of labeled and validation cases.

    Of an h5 file the arrays count by themselves (`file.h5:image`), so that the label that lies beside
    an unlabeled image is not read here either.

    >>> import tempfile
    >>> from semisam.engine import cases, config, record
    >>> from semisam.engine.phantom import write_phantoms
    >>> root = write_phantoms(tempfile.mkdtemp(), labeled=1, unlabeled=1, test=0, shape=(16, 16, 16))
    >>> split = cases.split(cases.find_cases(root), config.DataConfig())
    >>> len(record.digests(split))  # two images and one label
    3
    """
    found: dict[str, str] = {}
    for role in ("labeled", "unlabeled", "validation", "test"):
        for case in getattr(split, role):
            used = case.label if role in ("labeled", "validation") else None
            if case.kind == "h5":
                keys = ("image",) if used is None else ("image", "label")
                found.update({f"{case.images[0]}:{key}": _h5(case.images[0], key) for key in keys})
            else:
                found.update({str(path): sha256(path) for path in (*case.images, used) if path})
    return found


def _h5(path: Path, key: str) -> str:
    import h5py  # noqa: PLC0415

    with h5py.File(path, "r") as file:
        return hashlib.sha256(file[key][()].tobytes()).hexdigest()


def write_sample(path: Path, last: Any, images: Any, logits: Any) -> None:
    """Write what the term made of the middle sample of a batch, for pictures, as compressed NumPy arrays.

    `last` is `SemiSAMTerm.last`, `images` [B, channels, *S] and `logits` [B, C, *S] of the student. The file
    has image [channels, *S], target ([C, *S] or labels [*S]), weight, uncertainty and prediction [*S], and
    clicks [n, axes + 1]: array indices and 1 (positive) or 0.

    >>> import pathlib, tempfile, torch
    >>> from semisam.engine import record
    >>> from semisam.term import SemiSAMTerm
    >>> term = SemiSAMTerm(total_steps=100)
    >>> image = torch.zeros(1, 1, 24, 24)
    >>> image[..., 6:18, 6:18] = 1
    >>> logits = 4 * torch.stack([0.5 - image[:, 0], image[:, 0] - 0.5], 1)
    >>> _ = term(image, logits, step=50)
    >>> place = pathlib.Path(tempfile.mkdtemp()) / "step_000050.npz"
    >>> record.write_sample(place, term.last, image, logits)
    >>> sorted(np.load(place).files)
    ['clicks', 'image', 'prediction', 'target', 'uncertainty', 'weight']
    """
    n = len(images) // 2
    clicks = []
    for prompts in last.clicks.values():
        points, labels = prompts.points[n].cpu().numpy(), prompts.labels[n].cpu().numpy()
        table = np.concatenate([points, labels[..., None]], -1).reshape(-1, points.shape[-1] + 1)
        clicks.append(table[table[:, -1] >= 0])
    arrays = {name: getattr(last, name)[n].cpu().numpy() for name in ("target", "weight", "uncertainty")}
    arrays["image"] = images[n].cpu().numpy()
    arrays["prediction"] = logits[n].argmax(0).to("cpu").numpy().astype(np.uint8)
    arrays["clicks"] = np.concatenate(clicks) if clicks else np.zeros((0, images.ndim - 1), np.int64)
    with atomic(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)
