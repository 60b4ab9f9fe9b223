# SPDX-License-Identifier: Apache-2.0
"""The definition of right: every operator once more in plain PyTorch, short and float64-clean.

Arguments and results are those of the operator of the same name in `csrc/ops.def`. Written to be
read, not to be fast; tests compare every kernel with it and nothing else imports it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# ---- prompts ------------------------------------------------------------------------------------


def mask_logits(prob: Tensor, d: int, h: int, w: int) -> Tensor:
    """clip(ln(m / (1 - m)), -10, 10) of the mean m over each cell of adaptive average pooling."""
    return F.adaptive_avg_pool3d(prob[:, None], (d, h, w))[:, 0].logit().clamp(-10, 10)


# ---- losses -------------------------------------------------------------------------------------

# ---- fusion -------------------------------------------------------------------------------------


def fuse(  # noqa: PLR0917
    sources: list[Tensor],
    r_lab: list[float],
    r_unc: list[float],
    logits: int,
    unc: int,
    weighting: int,
    kappa: float,
    tau_c: float,
    tau_u: float,
    log_offset: float,
    ignore_index: int,
    channels: int,
    *want: int,
) -> list[Tensor]:
    """Mean, label, confidence, uncertainty and weight map; a source of weight 0 is not looked at."""
    first = sources[0]
    batch, space = first.shape[0], first.shape[2:]
    foreground = first.shape[1] == 1

    def distribution(p: Tensor) -> Tensor:
        if logits:
            p = p.sigmoid() if foreground else p.softmax(1)
        return torch.cat([1 - p, p], 1) if foreground else p

    def entropy(p: Tensor) -> Tensor:
        return -(p * (p + log_offset).clamp(min=1e-7).log()).sum(1)

    def table(r: list[float]) -> Tensor:
        r_sb = torch.tensor(r, dtype=torch.float64).reshape(len(sources), -1).expand(-1, batch)
        return (r_sb / r_sb.sum(0)).reshape(len(sources), batch, *[1] * (first.ndim - 1))

    def mean(r: Tensor, values: list[Tensor]) -> Tensor:
        parts = [torch.where(w > 0, w, 0) * torch.where(w > 0, v, 0) for w, v in zip(r, values, strict=True)]
        return torch.stack(parts).sum(0)

    p = [distribution(s.double()) for s in sources]
    lab, doubt = table(r_lab), table(r_unc)
    known = ~lab[0].isnan()  # samples that have a source
    classes = p[0].shape[1]
    mu = mean(doubt, p)
    if unc == 0:
        u = mean(doubt, [(q - mu) ** 2 for q in p]).sum(1) / (1 - 1 / classes)
    elif unc == 1:
        u = entropy(mu) / math.log(classes)
    else:
        u = (entropy(mu) - mean(doubt, [entropy(q)[:, None] for q in p])[:, 0]) / math.log(classes)
    pbar = torch.where(known, mean(lab, p), 1 / classes)
    u = torch.where(known[:, 0], u.clamp(0, 1), 1)
    confidence, label = pbar.max(1)
    keep = known[:, 0] & (confidence >= tau_c)
    if tau_u < 1:
        keep &= u <= tau_u
    weight = [
        lambda: torch.exp(-kappa * u),
        lambda: 1 - u,
        lambda: (u <= tau_u).double() + (u - u),
        lambda: ((confidence - 1 / classes) / (1 - 1 / classes)).clamp(0, 1),
        lambda: torch.ones_like(u),
    ][weighting]()
    outputs = [
        pbar if channels > 1 else pbar[:, 1:],
        torch.where(keep, label, ignore_index).to(torch.uint8),
        confidence,
        u,
        torch.where(known[:, 0], weight, 0),
    ]
    shapes = [(batch, channels, *space), *[(batch, *space)] * 4]
    return [
        o.expand(shape)[None] if asked else torch.empty(0, *shape)
        for o, shape, asked in zip(outputs, shapes, want, strict=True)
    ]


# ---- distances and components -------------------------------------------------------------------

# ---- metrics ------------------------------------------------------------------------------------

# ---- random walker ------------------------------------------------------------------------------
