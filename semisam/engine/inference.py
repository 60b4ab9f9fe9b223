# SPDX-License-Identifier: Apache-2.0
"""Inference of a specialist: sliding windows over a volume, uncertainty, components.

Only the network is used here: no generalist and no prompt. The steps of a case are

    read -> prepare (spacing, intensities) -> sliding windows -> mean softmax -> restore the grid -> argmax
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from semisam import fusion, masks

__all__ = ["entropy", "keep_largest", "sliding_window", "window_starts"]


# ---- windows ------------------------------------------------------------------------------------


def window_starts(size: int, patch: int, stride: int) -> list[int]:
    """Return where the windows of one axis begin: min(stride i, size - patch) until the end is covered.

    An axis shorter than the patch is padded to it and has one window. Raises ValueError for a stride
    that is not within 1 and `patch`, as voxels between windows would have no prediction.

    >>> from semisam.engine.inference import window_starts
    >>> window_starts(20, 8, 5)
    [0, 5, 10, 12]
    """
    if not 1 <= stride <= patch:
        raise ValueError(f"window_starts(): stride: expected 1 to the patch's {patch}, got {stride}")
    room = max(size - patch, 0)
    return [min(stride * i, room) for i in range(-(-room // stride) + 1)]


def sliding_window(
    network: Callable[[Any], Any],
    image: Any,
    patch_size: Sequence[int],
    stride: Sequence[int] | int | None = None,
    *,
    device: Any = None,
    batch: int = 4,
    accumulate: Any = None,
    slice_axis: int = 0,
    dropout: bool = False,
    progress: bool = False,
) -> Any:
    """Return class probabilities [C, *S] of an image [channels, *S]: the mean softmax over all windows.

    Windows begin at `window_starts` on every axis; `stride` is a number or one per axis (default: half
    the patch). An axis shorter than the patch is padded with zeros, the same on both sides (one more at
    the end if odd), and cut back afterwards. A 2-D patch with a 3-D image goes slice by slice along
    `slice_axis`. `batch` windows run at once on `device` (default: where the network is); sums are
    kept there, too, or on `accumulate`, which a volume too large for a GPU sets to "cpu".

    `network` maps [N, channels, *patch] to logits [N, C, *patch]; it runs in evaluation mode, with its
    dropout layers active if `dropout`, without gradient, and is left in the mode it came in. NumPy
    images give NumPy results, tensors give tensors; float32. `progress` shows a bar on a terminal.

    Raises ValueError for shapes, strides and outputs that do not fit, and RuntimeError naming the
    settings to lower if the device's memory does not suffice.

    >>> import numpy as np, torch
    >>> from semisam.engine.inference import sliding_window
    >>> network = torch.nn.Conv3d(1, 2, 1)
    >>> probability = sliding_window(network, np.zeros((1, 9, 7, 5), np.float32), (8, 8, 8), 4)
    >>> probability.shape, np.allclose(probability.sum(0), 1)
    ((2, 9, 7, 5), True)
    """
    import torch  # noqa: PLC0415
    from monai.inferers.utils import sliding_window_inference  # noqa: PLC0415

    given = image
    image = torch.as_tensor(image, dtype=torch.float32)
    patch = tuple(int(p) for p in patch_size)
    slices = len(patch) == 2 and image.ndim == 4
    if image.ndim != len(patch) + 1 and not slices:
        raise ValueError(
            f"sliding_window(): image: expected [channels, {len(patch)} axes] for the patch {patch}, "
            f"got {tuple(image.shape)}"
        )
    if min(image.shape) < 1:
        raise ValueError(f"sliding_window(): image: expected no empty axis, got {tuple(image.shape)}")
    strides = _strides(patch, stride)
    device = _device_of(network) if device is None else torch.device(device)
    # [N, channels, *S] with the slices as a batch, or a batch of one
    stack = image.movedim(1 + slice_axis, 0) if slices else image[None]

    def probabilities(windows: Any) -> Any:
        logits = network(windows)
        expected = (windows.shape[0], *windows.shape[2:])
        shape = tuple(getattr(logits, "shape", ()))
        if (*shape[:1], *shape[2:]) != expected or shape[1] < 2:
            raise ValueError(
                f"sliding_window(): network: expected logits [{expected[0]}, 2 or more classes, "
                f"{', '.join(map(str, expected[1:]))}] for windows of shape {tuple(windows.shape)}, "
                f"got {shape or type(logits).__name__}"
            )
        return logits.float().softmax(1)

    # MONAI takes int(patch (1 - overlap)) as stride: half a voxel more than asked survives rounding.
    overlap = [0.0 if s == p else 1 - (s + 0.5) / p for p, s in zip(patch, strides, strict=True)]
    try:
        with _evaluation(network, dropout), torch.no_grad():
            result: Any = sliding_window_inference(
                stack,
                patch,
                batch,
                probabilities,
                overlap=overlap,
                mode="constant",
                padding_mode="constant",
                sw_device=device,
                device=device if accumulate is None else torch.device(accumulate),
                progress=progress and _terminal(),
            )
    except torch.OutOfMemoryError as error:
        raise RuntimeError(
            f"sliding_window(): {device} has not enough memory for {batch} windows of {patch} and an image "
            f'of {tuple(image.shape)}: lower batch, or accumulate="cpu" ({error})'
        ) from error
    result = result.movedim(0, 1 + slice_axis) if slices else result[0]
    return result if isinstance(given, torch.Tensor) else result.cpu().numpy()


def _strides(patch: tuple[int, ...], stride: Sequence[int] | int | None) -> tuple[int, ...]:
    if stride is None:
        strides = tuple(max(p // 2, 1) for p in patch)
    elif isinstance(stride, int):
        strides = (stride,) * len(patch)
    else:
        strides = tuple(int(s) for s in stride)
    if len(strides) != len(patch) or any(not 1 <= s <= p for s, p in zip(strides, patch, strict=True)):
        raise ValueError(
            f"sliding_window(): stride: expected {len(patch)} numbers from 1 to the patch's {patch}, "
            f"got {stride}"
        )
    return strides


def _device_of(network: Any) -> Any:
    import torch  # noqa: PLC0415

    parameters = network.parameters() if hasattr(network, "parameters") else iter(())
    first = next(parameters, None)
    return torch.device("cpu") if first is None else first.device


def _terminal() -> bool:
    import sys  # noqa: PLC0415

    return sys.stderr.isatty()


def _dropouts(network: Any) -> list[Any]:
    """Every active dropout layer of a network."""
    from torch.nn.modules.dropout import _DropoutNd  # noqa: PLC0415

    modules = network.modules() if hasattr(network, "modules") else ()
    return [m for m in modules if isinstance(m, _DropoutNd) and m.p > 0]


@contextmanager
def _evaluation(network: Any, dropout: bool) -> Iterator[None]:
    """Evaluation mode, with dropout if asked; every module gets back its own mode."""
    before = [(m, m.training) for m in network.modules()] if hasattr(network, "modules") else []
    try:
        for module, _ in before:
            module.training = False
        for module in _dropouts(network) if dropout else ():
            module.training = True
        yield
    finally:
        for module, training in before:
            module.training = training


# ---- maps ---------------------------------------------------------------------------------------


def entropy(probability: Any) -> Any:
    """Return the normalised entropy [*S] of class probabilities [C, *S]: 0 sure, 1 no idea.

        u = -sum_c p_c ln p_c / ln C

    Raises ValueError for fewer than two classes.

    >>> import numpy as np
    >>> from semisam.engine.inference import entropy
    >>> entropy(np.array([[1.0, 0.5], [0.0, 0.5]], np.float32)).round(3).tolist()
    [0.0, 1.0]
    """
    if probability.shape[0] < 2:
        raise ValueError(f"entropy(): probability: expected 2 or more classes, got {probability.shape[0]}")
    return fusion.fuse([probability[None]], unc="ent", want=("uncertainty",)).uncertainty[0]


def keep_largest(label: Any, num_classes: int) -> Any:
    """Return a label map with only the largest component of each foreground class; the rest becomes 0.

    Voxels of one class connect over faces, edges and corners (26 neighbours; 8 in 2-D).

    >>> import numpy as np
    >>> from semisam.engine.inference import keep_largest
    >>> keep_largest(np.array([[1, 1, 0, 1, 2]], np.uint8), 3).tolist()
    [[1, 1, 0, 0, 2]]
    """
    kept = np.zeros_like(label)
    for c in range(1, num_classes):
        mask = np.ascontiguousarray(label == c)
        if mask.any():
            kept[masks.largest_component(mask, spatial_dims=label.ndim)] = c
    return kept
