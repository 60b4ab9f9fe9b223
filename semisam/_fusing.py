# SPDX-License-Identifier: Apache-2.0
"""The step of fusion for devices whose values the host does not look at: weights, gates and means by masks.

What `fusion.source_weights` and the term compute from round counts on the host is computed here from counts
that are tensors. Every source keeps its place, whether it has weight or not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["fused", "masked_mean", "source_table"]


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


def fused(
    maps: Sequence[Any],
    r_lab: Any,
    r_unc: Any,
    *,
    unc: str,
    weight: str,
    kappa: float,
    tau_c: float,
    tau_u: float,
    ignore_index: int,
    logits: bool,
    two_channels: bool,
) -> tuple[Any, Any, Any, Any, Any]:
    """Return mean, label, confidence, uncertainty, weight of `fusion.fuse` by weights that are tensors.

    `r_lab` and `r_unc` [S, B] sum to 1 over the sources, or are 0 throughout a sample.

    >>> import torch
    >>> from semisam import fusion
    >>> from semisam._fusing import fused
    >>> maps, r = [torch.rand(2, 1, 5) for _ in range(3)], torch.tensor([[0.5, 0.0], [0.5, 0.0], [0.0, 1.0]])
    >>> options = {"unc": "var", "weight": "exp", "kappa": 4.0, "tau_c": 0.0, "tau_u": 1.0}
    >>> ours = fused(maps, r, r, **options, ignore_index=255, logits=False, two_channels=False)
    >>> theirs = fusion.fuse(maps, r.tolist())
    >>> all(torch.allclose(a, b, atol=2e-6) for a, b in zip(ours, theirs))
    True
    """
    first = maps[0]
    kind = torch.float64 if first.dtype == torch.float64 else torch.float32
    rows, space = first.shape[1], (1,) * (first.ndim - 2)
    classes = max(rows, 2)
    known = (r_lab.sum(0) > 0).reshape(-1, *space)

    def distribution(z: Any) -> Any:
        z = z.to(kind)
        return z if not logits else z.sigmoid() if rows == 1 else z.softmax(1)

    def entropy(p: Any) -> Any:
        found = -(p * p.clamp_min(1e-7).log()).sum(1)
        return found - ((1 - p) * (1 - p).clamp_min(1e-7).log()).sum(1) if rows == 1 else found

    def added(r: Any, values: Any) -> Any:
        """Sum over sources; what has no weight is not looked at."""
        total: Any = 0.0
        for column, value in zip(r.to(kind), values, strict=True):
            w = column.reshape(-1, *(1,) * (value.ndim - 1))
            total = total + torch.where(w > 0, w * value, 0.0)
        return total

    lab = added(r_lab, map(distribution, maps))
    mu = added(r_unc, map(distribution, maps))
    if unc == "var":
        spread = added(r_unc, ((distribution(z) - mu).square().sum(1) for z in maps))
        u = spread * ((2.0 if rows == 1 else 1.0) / (1 - 1 / classes))
    else:
        u = entropy(mu)
        if unc == "mi":
            u = u - added(r_unc, (entropy(distribution(z)) for z in maps))
        u = u / math.log(classes)
    u = torch.where(known, u.clamp(0, 1), 1.0)
    pair = torch.cat([1 - lab, lab], 1) if rows == 1 else lab
    confidence, label = pair.max(1)
    confidence = torch.where(known, confidence, 1 / classes)
    keep = known & (confidence >= tau_c) & (u <= tau_u if tau_u < 1 else known)
    label = torch.where(keep, label, ignore_index).byte()
    if weight == "exp":
        m = (-kappa * u).exp()
    elif weight == "linear":
        m = 1 - u
    elif weight == "gate":
        m = (u <= tau_u).to(kind) + (u - u)
    elif weight == "conf":
        m = ((confidence - 1 / classes) / (1 - 1 / classes)).clamp(0, 1)
    else:
        m = torch.ones_like(u)
    mean = torch.where(known[:, None], pair if two_channels else lab, 1 / classes)
    return mean, label, confidence, u, torch.where(known, m, 0.0)


def masked_mean(values: Any, kept: Any) -> Any:
    """Return the mean of `values` [B] where `kept`; NaN if that is nowhere.

    >>> import torch
    >>> from semisam._fusing import masked_mean
    >>> masked_mean(torch.tensor([1.0, 2.0, float("nan")]), torch.tensor([True, True, False])).item()
    1.5
    """
    return torch.where(kept, values, 0).sum() / kept.sum()
