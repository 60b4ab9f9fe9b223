# SPDX-License-Identifier: Apache-2.0
"""The precision in which a frozen network runs, by device, and how it gets there."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["autocast", "bring", "check_precision"]

_KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_precision(precision: str, who: str) -> None:
    """Raise ValueError for a name that `autocast` does not know.

    >>> from semisam.generalists.precision import check_precision
    >>> check_precision("fp8", "Model()")
    Traceback (most recent call last):
    ValueError: Model(): precision: expected auto, float32, bfloat16, float16, got 'fp8'
    """
    if precision != "auto" and precision not in _KINDS:
        raise ValueError(f"{who}: precision: expected auto, {', '.join(_KINDS)}, got {precision!r}")


def autocast(precision: str, device: torch.device) -> tuple[Any, torch.dtype]:
    """Return the context to run a network in, and its dtype.

    `precision` "float32", "bfloat16", "float16" or "auto": bfloat16 on GPUs that have it, float16 on other
    GPUs, float32 elsewhere.

    >>> import torch
    >>> from semisam.generalists.precision import autocast
    >>> autocast("auto", torch.device("cpu"))[1]
    torch.float32
    """
    if precision == "auto":
        on_gpu = device.type == "cuda"
        half = "bfloat16" if on_gpu and torch.cuda.is_bf16_supported() else "float16"
        precision = half if on_gpu else "float32"
    kind = _KINDS[precision]
    return torch.autocast(device.type, kind, enabled=kind is not torch.float32), kind


def bring(network: torch.nn.Module, device: torch.device) -> None:
    """Move a network to a device, as a whole; looking at one parameter tells whether it is there.

    >>> import torch
    >>> from semisam.generalists.precision import bring
    >>> layer = torch.nn.Linear(2, 2)
    >>> bring(layer, torch.device("meta"))
    >>> layer.weight.device.type
    'meta'
    """
    first = next(network.parameters(), None)
    if first is None or first.device != device:
        network.to(device)
