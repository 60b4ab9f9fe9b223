# SPDX-License-Identifier: Apache-2.0
"""What the term needs beside `fusion` for devices whose values the host does not look at.

What `fusion.source_weights` and the term compute from round counts on the host is computed here from counts
that are tensors. Every source keeps its place, whether it has weight or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["masked_mean", "source_table"]


def source_table(
    scores: Sequence[float],
    done: Sequence[Any],
    places: Sequence[int],
    teacher: bool,
    share: float,
    *,
    label: str,
    doubt: str,
) -> tuple[Any, Any]:
    """Return (weights, uncertainty_weights) [S, B] as `fusion.source_weights` does, from tensors.

    `done[g]` [B] (int64) is how many of the `places[g]` rounds of generalist g count, `scores[g]` its score.
    S is the sum of `places`, and one more with a `teacher`, whose part of the doubt is `share`.

    >>> import torch
    >>> from semisam import fusion
    >>> from semisam._fusing import source_table
    >>> done = [torch.tensor([4, 1]), torch.tensor([2, 0])]
    >>> rounds = {"label": "late", "doubt": "all"}
    >>> ours = source_table([0.8, 0.4], done, [4, 2], True, 0.5, **rounds)
    >>> theirs = fusion.source_weights([0.8, 0.4], [d.tolist() for d in done], True, 0.5, **rounds)
    >>> all(abs(a.numpy() - b).max() < 1e-15 for a, b in zip(ours, theirs))
    True
    """
    r_lab = _rounds_weighted(scores, done, places, label, teacher)
    r_unc = r_lab if doubt == label else _rounds_weighted(scores, done, places, doubt, teacher)
    if teacher:
        r_unc = r_unc * (1 - share)
        r_unc[-1] = share * (r_lab.sum(0) > 0).double()
    return r_lab, r_unc


def _rounds_weighted(
    scores: Sequence[float], done: Sequence[Any], places: Sequence[int], which: str, teacher: bool
) -> Any:
    """Weights [S, B] of all rounds: squared score per generalist, equal over the rounds that count."""
    rows = []
    for score, rounds, n in zip(scores, done, places, strict=True):
        first = {"late": torch.minimum((rounds + 1) // 2, rounds - 1), "last": rounds - 1, "all": 0 * rounds}
        k = torch.arange(n, device=rounds.device)[:, None]
        counts = (k >= first[which]) & (k < rounds)
        rows.append(score**2 * counts.double() / counts.sum(0).clamp_min(1))
    if teacher:
        rows.append(rows[0].new_zeros(1, len(done[0])))
    weights = torch.cat(rows)
    total = weights.sum(0)
    return torch.where(total > 0, weights / torch.where(total > 0, total, 1.0), 0.0)


def masked_mean(values: Any, kept: Any) -> Any:
    """Return the mean of `values` [B] where `kept`; NaN if that is nowhere.

    >>> import torch
    >>> from semisam._fusing import masked_mean
    >>> masked_mean(torch.tensor([1.0, 2.0, float("nan")]), torch.tensor([True, True, False])).item()
    1.5
    """
    return torch.where(kept, values, 0).sum() / kept.sum()
