# SPDX-License-Identifier: Apache-2.0
"""Weights from files: tensors by name, from safetensors or torch files, without running anything in them."""

from __future__ import annotations

import argparse
import importlib
import os
import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["load", "read"]


def load(
    network: nn.Module,
    path: str | os.PathLike[str],
    who: str = "load",
    *,
    name: str = "path",
    rest: bool = False,
) -> None:
    """Load the network's parameters and buffers by name from a file; on error it stays as it was.

    The names may all begin with "module." (DataParallel). Every name must be there, and no other, except for
    `num_batches_tracked`, which old files lack. See `read` for the files, `rest` and the errors; ValueError,
    too, for missing and unexpected names and for shapes that differ.

    >>> import tempfile, torch
    >>> from semisam import weights
    >>> old, new = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    >>> with tempfile.NamedTemporaryFile(suffix=".pth") as file:
    ...     torch.save({"model_state_dict": old.state_dict()}, file.name)
    ...     weights.load(new, file.name)
    >>> torch.equal(old.weight, new.weight)
    True
    """
    state = read(path, who, name=name, rest=rest)
    own = network.state_dict()
    if all(n.startswith("module.") for n in state) and not any(n.startswith("module.") for n in own):
        state = {n.removeprefix("module."): value for n, value in state.items()}
    optional = {n for n in own if n.endswith("num_batches_tracked")}
    problems = {
        "missing": [n for n in own if n not in state and n not in optional],
        "unexpected": [n for n in state if n not in own],
        "of another shape": [
            f"{n} {tuple(value.shape)}, expected {tuple(own[n].shape)}"
            for n, value in state.items()
            if n in own and value.shape != own[n].shape
        ],
    }
    if any(problems.values()):
        found = "; ".join(f"{kind}: {_first(names)}" for kind, names in problems.items() if names)
        raise ValueError(
            f"{who}(): {name}: expected the weights of {type(network).__name__}, got {path}: {found}"
        )
    network.load_state_dict(state)


def read(
    path: str | os.PathLike[str], who: str = "read", *, name: str = "path", rest: bool = False
) -> dict[str, torch.Tensor]:
    """Return the tensors of a file by name, on the CPU.

    A file ending in .safetensors is read as such, any other by `torch.load(weights_only=True)`, which
    builds tensors and runs nothing. The names may lie under "state_dict", "model_state_dict" or "model".
    With `rest`, a training's own notes beside them are ignored, command-line options (argparse.Namespace)
    included. `who` and `name` are what error texts call the caller and its argument.

    Raises ValueError for a file that holds anything but tensors by name, OSError if it cannot be read,
    ImportError without safetensors.

    >>> import tempfile, torch
    >>> from semisam import weights
    >>> with tempfile.NamedTemporaryFile(suffix=".pth") as file:
    ...     torch.save({"a": torch.zeros(2)}, file.name)
    ...     weights.read(file.name)
    {'a': tensor([0., 0.])}
    """
    path = Path(path)
    with path.open("rb"):
        pass  # what fails from here on is the content: torch raises OSError for some truncated files, too
    reader: Callable[[Path], Any] = partial(torch.load, map_location="cpu", weights_only=True)
    if path.suffix == ".safetensors":
        try:
            reader = importlib.import_module("safetensors.torch").load_file
        except ImportError as error:
            raise ImportError(
                f"{who}(): reading {path} needs safetensors: pip install safetensors"
            ) from error
    try:
        # A Namespace holds attributes and has no code of its own.
        with torch.serialization.safe_globals([argparse.Namespace]) if rest else nullcontext():
            content = reader(path)
    except MemoryError:
        raise
    except Exception as error:  # damaged files fail in many ways
        found = re.search(r"GLOBAL (\S+)", str(error))
        # Without the cause: torch's own text advises to switch its safety off.
        raise ValueError(
            f"{who}(): {name}: expected a safetensors or torch file of tensors alone, got {path} with "
            + (f"the Python object {found[1]}" if found else "damage or in another format")
        ) from None
    if isinstance(content, Mapping):
        nested = (content.get(key) for key in ("state_dict", "model_state_dict", "model"))
        content = next((inner for inner in nested if isinstance(inner, Mapping)), content)
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{who}(): {name}: expected tensors by name, got {type(content).__name__} in {path}")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise ValueError(
                f"{who}(): {name}: expected tensors by name, got {type(value).__name__} "
                f"under {key!r} in {path}"
            )
    return dict(content)


def _first(names: list[str], count: int = 4) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
