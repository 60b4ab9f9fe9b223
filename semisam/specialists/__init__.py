# SPDX-License-Identifier: Apache-2.0
"""Specialists: the small networks that are trained, by name, and their weights from files.

`build` makes a network by name: those of the papers, which are here, or any class on the import path.
A specialist maps an image [B, in_channels, *spatial] to logits [B, num_classes, *spatial].
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
from typing import Any

from torch import nn

from semisam import weights
from semisam.specialists._base import Specialist
from semisam.specialists.unet import UNet2d, UNet3d
from semisam.specialists.vnet import VNet

__all__ = ["UNet2d", "UNet3d", "VNet", "build", "divisor", "load_weights"]

_NETWORKS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "vnet": (VNet, {}),
    "unet3d": (UNet3d, {}),
    "unet2d": (UNet2d, {}),
    "unet2d-transpose": (UNet2d, {"up": "transpose"}),
}
# What other libraries call the two numbers that every specialist has.
_INPUTS = ("in_channels", "input_channels", "in_chans", "in_chns", "n_channels")
_OUTPUTS = ("num_classes", "out_channels", "n_classes", "classes", "out_chans", "class_num")


def build(name: str, *, in_channels: int, num_classes: int, **options: Any) -> nn.Module:
    """Return a new network by name, with torch's current random state.

    `name` is vnet, unet3d, unet2d (bilinear) or unet2d-transpose; `options` are the class' own, such as
    `channels`. A dotted name imports any subclass of `nn.Module`, for example
    "monai.networks.nets.BasicUNet"; the two numbers are passed as the class calls them (`in_channels`
    and `out_channels` in MONAI), `options` as they are. Importing runs code: names belong into
    configurations that you trust.

    Raises ValueError for unknown names and what the class refuses; TypeError for a class that is no
    network, lacks an argument for the two numbers, or does not take the options or needs more.

    >>> from semisam import specialists
    >>> network = specialists.build("unet2d", in_channels=3, num_classes=4, channels=(8, 16, 32))
    >>> sum(p.numel() for p in network.parameters())
    28148
    >>> specialists.build("unet", in_channels=1, num_classes=2)
    Traceback (most recent call last):
    ValueError: build(): name: expected vnet, unet3d, unet2d, ... got 'unet'; did you mean 'unet3d'?
    """
    known, preset = _NETWORKS.get(name, (None, {}))
    network = known or _import(name)
    signature = inspect.signature(network)
    taken = f"{network.__name__}({', '.join(signature.parameters)})"
    numbers = {}
    for value, argument, aliases in (
        (in_channels, "in_channels", _INPUTS),
        (num_classes, "num_classes", _OUTPUTS),
    ):
        theirs = next((alias for alias in aliases if alias in signature.parameters), None)
        if theirs is None:
            raise TypeError(
                f"build(): {argument}: expected {name} to take one of {', '.join(aliases)}, got {taken}"
            )
        if theirs in options:
            raise TypeError(f"build(): {theirs}: expected {argument} instead, got both")
        numbers[theirs] = value
    arguments = {**numbers, **preset, **options}
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise TypeError(
            f"build(): options: expected those of {taken}, got {sorted(options)}: {error}"
        ) from None
    return network(**arguments)


def _import(name: str) -> type[nn.Module]:
    module, _, attribute = name.rpartition(".")
    if not module or not all(part.isidentifier() for part in name.split(".")):
        nearest = difflib.get_close_matches(name.lower(), _NETWORKS, 1, 0.0)[0]
        raise ValueError(
            f"build(): name: expected {', '.join(_NETWORKS)} or a dotted package.module.Class, "
            f"got {name!r}; did you mean {nearest!r}?"
        )
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):  # the module is there and lacks another one
            raise
        raise ValueError(
            f"build(): name: expected a class that can be imported, got {name!r}: {error}"
        ) from error
    if found is None:
        raise ValueError(f"build(): name: expected a class of {module}, which has no {attribute!r}")
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise TypeError(f"build(): name: expected a subclass of torch.nn.Module, got {name!r}: {found!r}")
    return found


def divisor(network: nn.Module) -> int:
    """Return what the sides of a patch must be multiples of; 1 for networks that are not from here.

    That is 2 ** (levels - 1): 16 for V-Net and the U-Nets with their published five levels. Wrappers
    (DataParallel, a compiled network) are looked through.

    >>> from semisam import specialists
    >>> specialists.divisor(specialists.VNet()), specialists.divisor(specialists.UNet3d(channels=(4, 8, 16)))
    (16, 4)
    """
    return max((m.divisor for m in network.modules() if isinstance(m, Specialist)), default=1)


def load_weights(network: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load the network's parameters and buffers by name from a safetensors or torch file.

    A file ending in .safetensors is read as such, any other by `torch.load(weights_only=True)`, which
    builds tensors and runs nothing. The names may lie under "state_dict", "model_state_dict" or "model",
    and all begin with "module." (DataParallel). Every name must be there, and no other, except for
    `num_batches_tracked`, which old files lack. On error the network stays as it was.

    Raises ValueError for a file that holds anything but tensors, for missing and unexpected names and
    for shapes that differ; OSError if it cannot be read; ImportError without safetensors.

    >>> import tempfile, torch
    >>> from semisam import specialists
    >>> old, new = specialists.UNet2d(channels=(4, 8)), specialists.UNet2d(channels=(4, 8))
    >>> with tempfile.NamedTemporaryFile(suffix=".pth") as file:
    ...     torch.save({"state_dict": old.state_dict()}, file.name)
    ...     specialists.load_weights(new, file.name)
    >>> all(torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters()))
    True
    """
    weights.load(network, path, "load_weights")
