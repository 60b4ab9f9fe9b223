# SPDX-License-Identifier: Apache-2.0
"""What people use today for each operator: the functions that `tests/cases.py` names as peers.

Each takes the data of its `Speed` entry. A peer whose package is missing raises ImportError, and the
benchmark says so in its row. "published" peers are written here from the formulas of the methods'
descriptions in the way that training scripts usually write them.
"""

from __future__ import annotations

import functools
import math
import os
import shutil

import torch
import torch.nn.functional as F

# ---- prompts ------------------------------------------------------------------------------------


def mask_logits_torch(prob):
    return F.adaptive_avg_pool3d(prob[:, None], (32, 32, 32))[:, 0].logit().clamp(-10, 10)


# ---- losses -------------------------------------------------------------------------------------


def _backward(loss, z):
    z.grad = None
    loss.backward()
    return loss.item(), z.grad


def _gradient_of(function):
    """A peer from a loss function of (logits, *data): value and gradient."""

    def run(data):
        z = data[0].requires_grad_()
        return _backward(function(z, *data[1:]), z)

    return run


def _compiled(function):
    """The same under torch.compile, compiled once for each number of dimensions."""

    def run(data):
        if not shutil.which(os.environ.get("CXX", "g++")):
            raise ImportError("torch.compile needs a C++ compiler")
        return _gradient_of(_compile(function))(data)

    return run


@functools.cache
def _compile(function):
    return torch.compile(function, dynamic=False)


def _dice_ce(z, y, *_):
    p = z.softmax(1)
    y = y.long()
    t = F.one_hot(y, z.shape[1]).movedim(-1, 1).to(p)
    dims = [0, *range(2, z.ndim)]
    i, den = (p * t).sum(dims), (p * p).sum(dims) + (t * t).sum(dims)
    return F.cross_entropy(z, y) + (1 - (2 * i + 1e-5) / (den + 1e-5)).mean()


def _dice_ce_published(z, y, *_):
    """As training scripts have it: softmax, one-hot by a loop over classes, a Dice per class."""
    classes, y = z.shape[1], y.long()
    p = torch.softmax(z, dim=1)
    hot = torch.cat([(y == c).unsqueeze(1) for c in range(classes)], dim=1).float()
    total = 0.0
    for c in range(classes):
        score, target = p[:, c], hot[:, c]
        inter = torch.sum(score * target)
        total = total + 1 - (2 * inter + 1e-5) / (torch.sum(score**2) + torch.sum(target**2) + 1e-5)
    return F.cross_entropy(z, y) + total / classes


def _dice_ce_monai(z, y, *_):
    return _monai_dice_ce()(z, y[:, None])


@functools.cache
def _monai_dice_ce():
    from monai.losses import DiceCELoss  # noqa: PLC0415

    return DiceCELoss(softmax=True, to_onehot_y=True, squared_pred=True, batch=True)


def _mse(z, _, q, __):
    return ((z.softmax(1) - q) ** 2).sum(1).mean()


def _kl(z, _, q, __):
    return F.kl_div(z.log_softmax(1), q, reduction="none").sum(1).mean()


def _entropy(z, *_):
    log_p = z.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1).mean() / math.log(z.shape[1])


def _ssl(z, y, q, w):
    mse = (((z[2:].softmax(1) - q[2:]) ** 2).mean(1) * w[2:]).sum() / w[2:].sum()
    return _dice_ce(z[:2], y[:2]) + 0.1 * mse + 0.01 * _entropy(z[2:])


dice_ce_torch, dice_ce_compiled = _gradient_of(_dice_ce), _compiled(_dice_ce)
dice_ce_published, dice_ce_monai = _gradient_of(_dice_ce_published), _gradient_of(_dice_ce_monai)
mse_torch, mse_compiled = _gradient_of(_mse), _compiled(_mse)
kl_torch, kl_compiled = _gradient_of(_kl), _compiled(_kl)
entropy_torch, entropy_compiled = _gradient_of(_entropy), _compiled(_entropy)
ssl_torch, ssl_compiled = _gradient_of(_ssl), _compiled(_ssl)


# ---- fusion -------------------------------------------------------------------------------------

# ---- distances and components -------------------------------------------------------------------

# ---- metrics ------------------------------------------------------------------------------------

# ---- random walker ------------------------------------------------------------------------------
