# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: whole or not there, tensors and plain values alone, and networks made from them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from semisam import specialists
from semisam.engine.config import Config, from_dict
from semisam.engine.files import atomic

__all__ = ["CheckpointError", "Loaded", "load", "network_of", "read", "save"]

FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, is not there, is damaged or does not fit."""


@dataclass
class Loaded:
    """A trained network in evaluation mode, and what is needed to use it.

    `meta` has class_names, spatial_dims, channels, num_classes, spacing and the best validation so far;
    `step` is the number of training steps behind the weights.

    >>> import torch
    >>> from semisam.engine.checkpoint import Loaded
    >>> from semisam.engine.config import Config
    >>> Loaded(torch.nn.Conv3d(1, 2, 1), Config(), {"num_classes": 2}, 6000, "best", None).step
    6000
    """

    network: nn.Module
    config: Config
    meta: dict[str, Any]
    step: int
    checkpoint: str
    path: Path


def save(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write a checkpoint and flush it to the disk; what was at `path` stays until the new one is whole.

    Raises CheckpointError if it cannot be written (disk full): the old file is then untouched.

    >>> import tempfile, pathlib, torch
    >>> from semisam.engine import checkpoint
    >>> place = pathlib.Path(tempfile.mkdtemp()) / "last.ckpt"
    >>> checkpoint.save(place, {"format": 1, "step": 3, "student": {"w": torch.ones(2)}})
    >>> checkpoint.read(place)["step"]
    3
    """
    path = Path(path)
    try:
        with atomic(path) as temporary, temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        kept = "the one before it is intact" if path.exists() else "there is none before it"
        raise CheckpointError(
            f"{path}: cannot be written: {why}; {kept}. Free some space, then continue with --resume"
        ) from error


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return a checkpoint's content on the CPU; only tensors and plain values are unpickled.

    Raises CheckpointError if there is none, it is damaged, or of another format.

    >>> from semisam.engine import checkpoint
    >>> checkpoint.read("nowhere/last.ckpt")
    Traceback (most recent call last):
    semisam.engine.checkpoint.CheckpointError: nowhere/last.ckpt: there is no such checkpoint
    """
    path = Path(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such checkpoint") from None
    except Exception as error:  # damaged files fail in many ways
        raise CheckpointError(
            f"{path}: cannot be read: {[*str(error).splitlines(), type(error).__name__][0]}"
        ) from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"{path}: expected a checkpoint of format {FORMAT}, got {found}")
    return state


def network_of(config: Config, meta: dict[str, Any]) -> nn.Module:
    """Return the specialist that a configuration describes, for the data that `meta` describes.

    >>> from semisam.engine import checkpoint, config
    >>> made = config.load(settings=[("specialist.options", {"channels": [4, 8]})])
    >>> type(checkpoint.network_of(made, {"channels": 1, "num_classes": 3})).__name__
    'UNet3d'
    """
    return specialists.build(
        config.specialist.name,
        in_channels=meta["channels"],
        num_classes=meta["num_classes"],
        **config.specialist.options,
    )


def load(
    run_dir: str | os.PathLike[str],
    checkpoint: str = "auto",
    network: str = "student",
    device: Any = "cpu",
) -> Loaded:
    """Return the network of a run folder, ready for inference.

    `checkpoint`: "best" (by validation Dice), "last", or "auto": best if there is one. `network`:
    "student" or "teacher". Raises CheckpointError if the run has no such checkpoint or network and
    ValueError for other words.

    >>> import tempfile
    >>> from semisam.engine import checkpoint
    >>> checkpoint.load(tempfile.gettempdir(), "last")
    Traceback (most recent call last):
    semisam.engine.checkpoint.CheckpointError: ...: expected the folder of a training run, got one ...
    """
    run = Path(run_dir)
    for argument, value, choices in (
        ("checkpoint", checkpoint, ("auto", "best", "last")),
        ("network", network, ("student", "teacher")),
    ):
        if value not in choices:
            raise ValueError(f"load(): {argument}: expected one of {', '.join(choices)}, got {value!r}")
    chosen = checkpoint
    if checkpoint == "auto":
        chosen = "best" if (run / "best.ckpt").exists() else "last"
    if not (run / f"{chosen}.ckpt").exists():
        if chosen == "best" and (run / "last.ckpt").exists():
            raise CheckpointError(
                f"{run}: there is no best.ckpt, as the run had no validation cases or has not validated yet; "
                'use the checkpoint "last"'
            )
        raise CheckpointError(f"{run}: expected the folder of a training run, got one without {chosen}.ckpt")
    state = read(run / f"{chosen}.ckpt")
    if state[network] is None:
        raise CheckpointError(
            f"{run}: the method {state['config']['method']['name']!r} has no teacher; use the student"
        )
    config = from_dict(state["config"])
    with torch.random.fork_rng(devices=[]):
        made = network_of(config, state["meta"])
    made.load_state_dict(state[network])
    made.to(device).eval()
    return Loaded(made, config, state["meta"], state["step"], chosen, run)
