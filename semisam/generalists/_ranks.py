# SPDX-License-Identifier: Apache-2.0
"""Percentiles of images, which say what is shown as black and white."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from semisam import ops

__all__ = ["at_shares"]


def at_shares(rows: Tensor, shares: Sequence[float]) -> list[Tensor]:
    """Return, for each share q, the values [N] of rank round(q (V - 1)) in rows [N, V]: no interpolation.

    >>> import torch
    >>> from semisam.generalists._ranks import at_shares
    >>> [v.tolist() for v in at_shares(torch.tensor([[3.0, 1.0, 2.0, 5.0]]), (0.0, 0.7))]
    [[1.0], [3.0]]
    """
    places = [round(q * (rows.shape[1] - 1)) for q in shares]
    if ops.stays(rows.device):  # kthvalue is refused on a GPU where torch is to be deterministic
        ordered = rows.sort(1).values
        return [ordered[:, k] for k in places]
    return [rows.kthvalue(1 + k, 1).values for k in places]  # several times as fast as sorting on the CPU
