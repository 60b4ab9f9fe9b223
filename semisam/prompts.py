# SPDX-License-Identifier: Apache-2.0
"""Prompts for a generalist, computed from the specialist's prediction and never from a label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from semisam import ops

__all__ = ["mask_logits"]


def mask_logits(prob: Any, size: Sequence[int]) -> Any:
    """Return the mask prompt of a foreground probability map: clipped logits of cell averages.

    `prob` is [N, D, H, W] or [N, H, W] with values in 0..1 (NumPy or torch, any floating dtype), `size`
    the prompt's (d, h, w) or (h, w), at most the map's; the result is [N, *size], float32, the same
    kind of array. Cells are those of adaptive average pooling.

        out = clip(ln(m / (1 - m)), -10, 10),   m = mean of prob over the cell

    Raises ValueError for a size that is larger than the map or has another number of dimensions,
    TypeError for a dtype that is not floating. Paper: SAM (arXiv 2304.02643), mask input.

    >>> import numpy as np
    >>> from semisam import prompts
    >>> prompts.mask_logits(np.full((1, 8, 8), 0.5), (2, 2)).tolist()
    [[[0.0, 0.0], [0.0, 0.0]]]
    """
    shape = tuple(prob.shape)
    if len(size) != len(shape) - 1 or len(size) not in (2, 3):
        raise ValueError(
            f"mask_logits(): size: expected one number per spatial dimension of prob {shape}, "
            f"(d, h, w) or (h, w), got {tuple(size)}"
        )
    flat = len(size) == 2
    out = ops.call("mask_logits", prob[:, None] if flat else prob, *((1,) if flat else ()), *map(int, size))
    return out[:, 0] if flat else out
