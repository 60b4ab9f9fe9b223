# SPDX-License-Identifier: Apache-2.0
"""What people use today for each operator: the functions that `tests/cases.py` names as peers.

Each takes the data of its `Speed` entry. A peer whose package is missing raises ImportError, and the
benchmark says so in its row. "published" peers are written here from the formulas of the methods'
descriptions in the way that training scripts usually write them.
"""

from __future__ import annotations

import importlib

import numpy as np
import torch
import torch.nn.functional as F

# ---- prompts ------------------------------------------------------------------------------------


def mask_logits_torch(prob):
    return F.adaptive_avg_pool3d(prob[:, None], (32, 32, 32))[:, 0].logit().clamp(-10, 10)


# ---- losses -------------------------------------------------------------------------------------

# ---- fusion -------------------------------------------------------------------------------------

# ---- distances and components -------------------------------------------------------------------

# ---- metrics ------------------------------------------------------------------------------------


def _one_hot(data):
    return [torch.from_numpy(np.stack([a == 0, a == 1])[None].astype(np.float32)) for a in data]


def hd95_asd_monai(data):
    monai = importlib.import_module("monai.metrics")
    pred, ref = _one_hot(data)
    hd = monai.compute_hausdorff_distance(pred, ref, percentile=95)
    return hd.item(), monai.compute_average_surface_distance(pred, ref).item()


def _surface_distances(a, b):
    """medpy's formula: distances from the surface voxels of a to the surface of b."""
    ndimage = importlib.import_module("scipy.ndimage")
    cross = ndimage.generate_binary_structure(a.ndim, 1)
    surface_a = a ^ ndimage.binary_erosion(a, cross)
    surface_b = b ^ ndimage.binary_erosion(b, cross)
    return ndimage.distance_transform_edt(~surface_b)[surface_a]


def hd95_asd_medpy(data):
    """hd95(a, b) and asd(a, b) as two calls, each from the masks."""
    pred, ref = (a.astype(bool) for a in data)
    both = np.hstack([_surface_distances(pred, ref), _surface_distances(ref, pred)])
    return float(np.percentile(both, 95)), float(_surface_distances(pred, ref).mean())


def hd95_asd_deepmind(data):
    package = importlib.import_module("surface_distance")
    pred, ref = (a.astype(bool) for a in data)
    d = package.compute_surface_distances(ref, pred, (1, 1, 1))
    return float(package.compute_robust_hausdorff(d, 95)), float(
        package.compute_average_surface_distance(d)[1]
    )


def dice_monai(data):
    monai = importlib.import_module("monai.metrics")
    return monai.compute_dice(data[0][None, None], data[1][None, None], num_classes=2)


# ---- random walker ------------------------------------------------------------------------------
