# SPDX-License-Identifier: Apache-2.0
"""What is checked and built before the first step: run folder, patch, term."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from semisam import specialists
from semisam.engine.config import PUBLISHED, Config, ConfigError, cache_of, differences
from semisam.engine.config import load as load_config

__all__ = [
    "TrainingError",
    "build_term",
    "check_data",
    "check_folder",
    "check_patch",
    "overlaps",
    "room_for_scans",
    "scan_device",
]

MAY_CHANGE = {
    *("data.root", "data.workers", "data.cache", "train.device", "term.scan_device"),
    *("train.log_every", "train.checkpoint_every", "train.tensorboard"),
    *("term.cache", "term.cache_ram_mb", "term.cache_mb"),
}
"""Settings that a resumed run may change: they do not decide about the weights."""


class TrainingError(RuntimeError):
    """A run that cannot start or go on; the text says what to do."""


def scan_device(config: Config, training: Any) -> Any:
    """Return the device on which generalists are asked about whole scans; `training` is the training's.

    >>> import torch
    >>> from semisam.engine import config, setup
    >>> made = config.load(settings=[("term.scan_device", "cpu")])
    >>> [setup.scan_device(c, torch.device("cuda", 1)) for c in (config.Config(), made)]
    [device(type='cuda', index=1), device(type='cpu')]
    """
    import torch  # noqa: PLC0415

    return training if config.term.scan_device == "auto" else torch.device(config.term.scan_device)


@contextmanager
def room_for_scans(config: Config, what: str) -> Iterator[None]:
    """Raise TrainingError that says which setting to lower where a GPU has no room for whole scans (`what`).

    >>> import torch
    >>> from semisam.engine import config, setup
    >>> with setup.room_for_scans(config.Config(), "scan_01"):
    ...     raise torch.OutOfMemoryError("CUDA out of memory")
    Traceback (most recent call last):
    semisam.engine.setup.TrainingError: scan_01: the GPU's memory does not suffice for a whole scan: ...
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        term = config.term
        clicks = term.options.get("clicks", "the preset's")
        raise TrainingError(
            f"{what}: the GPU's memory does not suffice for a whole scan: lower term.options.clicks (now "
            f"{clicks}; the answers to all of them are kept), or set term.scan_device (now "
            f"{term.scan_device}) to cpu, which is slower, and continue with --resume "
            f"({str(error).splitlines()[0]})"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error is a GPU's lack of memory, or one that `inference.sliding_window` made of it."""
    import torch  # noqa: PLC0415

    return any(isinstance(e, torch.OutOfMemoryError) for e in (error, error.__cause__))


def build_term(config: Config, spatial_dims: int | None = None, classes: int = 1) -> Any:
    """Return the generalists' term of a configuration; ConfigError names the setting that does not fit.

    With `spatial_dims` the generalists must take images of so many axes and `classes` foreground classes.

    >>> from semisam.engine import config, setup
    >>> setup.build_term(config.load(settings=[("term.options.lam_sam", 1.0)])).settings["lam_sam"]
    1.0
    """
    from semisam import generalists  # noqa: PLC0415
    from semisam.published import PublishedTerm  # noqa: PLC0415
    from semisam.term import SemiSAMTerm  # noqa: PLC0415

    term = config.term
    unknown = set(term.generalist_options) - set(term.generalists)
    if unknown:
        raise ConfigError(
            f"term.generalist_options: expected names of term.generalists ({', '.join(term.generalists)}), "
            f"got {', '.join(sorted(unknown))}"
        )
    makers = [
        functools.partial(generalists.build, n, **term.generalist_options.get(n, {}))
        for n in term.generalists
    ]
    try:
        made = [make() for make in makers]
    except (TypeError, ValueError, OSError, ImportError) as error:
        raise ConfigError(f"term.generalists: {error}") from error
    course: dict[str, Any] = {"total_steps": config.train.steps, "seed": config.train.seed}
    try:
        if term.preset == PUBLISHED:
            built: SemiSAMTerm = PublishedTerm(made, makers=makers, **course, **term.options)
        else:
            built = SemiSAMTerm(made, preset=term.preset, cache=_cache(config), **course, **term.options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"term.options: {error}") from error
    if spatial_dims is not None:
        try:
            built.check(spatial_dims, classes)
        except ValueError as error:
            raise ConfigError(f"term.generalists: {error}") from error
    return built


def _cache(config: Config) -> Any:
    from semisam.generalists.cache import EncoderCache  # noqa: PLC0415

    where, term = cache_of(config), config.term
    if where == "off":
        return None
    try:
        folder = None if where == "ram" else where
        return EncoderCache(folder, ram_mb=term.cache_ram_mb, disk_mb=term.cache_mb)
    except OSError as error:
        raise ConfigError(f"term.cache: {where}: expected a folder, or none yet: {error.strerror}") from error


def overlaps(term: Any, case_set: Any) -> list[str]:
    """Return one sentence for each generalist that was trained on the data set that a folder's names tell of.

    The names are those of the folder, of the one above it, and in dataset.json.

    >>> from types import SimpleNamespace
    >>> from pathlib import Path
    >>> from semisam.engine import setup
    >>> from semisam.term import SemiSAMTerm
    >>> setup.overlaps(SemiSAMTerm(total_steps=9), SimpleNamespace(root=Path("Task04_Hippocampus")))
    []
    """
    from semisam.generalists import benchmarks  # noqa: PLC0415

    root = Path(case_set.root).absolute()
    names = [root.name, root.parent.name]
    try:
        content = json.loads((root / "dataset.json").read_text(encoding="utf-8"))
        names.append(str(content.get("name", "")))
    except (OSError, ValueError, AttributeError):
        pass  # not there, or told of by `check`
    found = []
    for name, generalist in term.generalists.items():
        for key in benchmarks.recognise(names):
            state, how = benchmarks.overlap(generalist.spec, key)
            if state in ("yes", "related"):
                what = "was trained on" if state == "yes" else "may have been trained on part of"
                found.append(
                    f"{name} {what} {key} ({how}), which this data set seems to be: what it teaches there "
                    "says little about other data"
                )
    return found


def check_folder(out: Path, config: Config, resume: bool) -> None:
    """Refuse to write over a run, and to continue one with other settings: TrainingError.

    >>> import pathlib, tempfile
    >>> from semisam.engine import config, setup
    >>> out = pathlib.Path(tempfile.mkdtemp())
    >>> setup.check_folder(out, config.Config(), resume=False)  # empty
    >>> _ = (out / "notes.txt").write_text("mine")
    >>> setup.check_folder(out, config.Config(), resume=False)
    Traceback (most recent call last):
    semisam.engine.setup.TrainingError: ...: exists and is not empty: continue it with --resume, or ...
    """
    saved = out / "config.yaml"
    if not resume:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise TrainingError(
                f"{out}: exists and is not empty: continue it with --resume, or give another folder"
            )
    elif saved.exists():
        found = differences(load_config(saved), config)
        changed = {key: pair for key, pair in found.items() if key not in MAY_CHANGE}
        if changed:
            lines = "".join(f"\n  {key}: {old!r}, now {new!r}" for key, (old, new) in changed.items())
            raise TrainingError(
                f"{out}: a run continues with the settings it began with; these differ:{lines}"
            )
    elif out.exists() and (out / "last.ckpt").exists():
        raise TrainingError(f"{out}: there is a checkpoint, but no config.yaml to compare the settings with")


def check_data(out: Path, digests: dict[str, str]) -> None:
    """Refuse to continue a run on other data than it began with (TrainingError); files may have moved.

    >>> import pathlib, tempfile
    >>> from semisam.engine import setup
    >>> from semisam.engine.files import write_json
    >>> out = pathlib.Path(tempfile.mkdtemp())
    >>> write_json(out / "run.json", {"sha256": {"old/imagesTr/a.nii.gz": "c0ffee"}})
    >>> setup.check_data(out, {"new/imagesTr/a.nii.gz": "c0ffee"})
    >>> setup.check_data(out, {"new/imagesTr/a.nii.gz": "decaf"})
    Traceback (most recent call last):
    semisam.engine.setup.TrainingError: ...; these changed: new/imagesTr/a.nii.gz
    """
    run = json.loads((out / "run.json").read_text(encoding="utf-8"))
    began = {_end(path): digest for path, digest in run["sha256"].items()}
    changed = [path for path, digest in digests.items() if began.get(_end(path)) != digest]
    if changed or len(digests) != len(began):
        which = ", ".join(changed[:3]) or "there are fewer files"
        raise TrainingError(f"{out}: a run continues on the data it began with; these changed: {which}")


def _end(path: str) -> str:
    return "/".join(Path(path).parts[-2:])


def check_patch(config: Config, network: Any, spatial_dims: int) -> None:
    """Raise ConfigError for a patch that the network cannot take, with the sizes that it can.

    >>> from semisam.engine import config, setup
    >>> from semisam.specialists import UNet3d
    >>> made = config.load(settings=[("train.patch_size", [32, 40, 32])])
    >>> setup.check_patch(made, UNet3d(channels=(4, 8, 16)), 3)
    >>> setup.check_patch(made, UNet3d(), 3)
    Traceback (most recent call last):
    semisam.engine.config.ConfigError: train.patch_size: ... these fit: [32, 32, 32] or [32, 48, 32]
    """
    patch = config.train.patch_size
    if len(patch) != spatial_dims:
        raise ConfigError(
            f"train.patch_size: expected {spatial_dims} sides, as the images have axes, got {patch}"
        )
    divisor = specialists.divisor(network)
    if any(side % divisor for side in patch):
        below = [max(side // divisor, 1) * divisor for side in patch]
        above = [-(-side // divisor) * divisor for side in patch]
        raise ConfigError(
            f"train.patch_size: {config.specialist.name} halves the patch, so that its sides must be "
            f"multiples of {divisor}; got {patch}, these fit: {below} or {above}"
        )
