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

_package = importlib.import_module  # inside the functions: a peer may be missing

# ---- prompts ------------------------------------------------------------------------------------


def mask_logits_torch(prob):
    return F.adaptive_avg_pool3d(prob[:, None], (32, 32, 32))[:, 0].logit().clamp(-10, 10)


# ---- losses -------------------------------------------------------------------------------------

# ---- fusion -------------------------------------------------------------------------------------

# ---- distances and components -------------------------------------------------------------------


def edt_edt(mask):
    # One thread where torch has one: its own default is one as well.
    return _package("edt").edt(mask, parallel=torch.get_num_threads())


def edt_scipy(mask):
    return _package("scipy.ndimage").distance_transform_edt(mask)


def components_cc3d_26(mask):
    return _package("cc3d").connected_components(mask, connectivity=26)


def components_cc3d_6(mask):
    return _package("cc3d").connected_components(mask, connectivity=6)


def components_scipy(mask):
    return _package("scipy.ndimage").label(mask, np.ones((3, 3, 3)))[0]


def largest_component_cc3d(mask):
    return _package("cc3d").largest_k(mask, k=1, connectivity=26)


def largest_component_published(mask):
    labels = _package("skimage.measure").label(mask)
    return labels == np.argmax(np.bincount(labels.flat)[1:]) + 1


# ---- metrics ------------------------------------------------------------------------------------

# ---- random walker ------------------------------------------------------------------------------
