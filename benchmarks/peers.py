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


def _ritm(errors, transform):
    fn, fp = errors
    d_fn, d_fp = (transform(np.pad(e, 1))[1:-1, 1:-1, 1:-1] for e in (fn, fp))
    positive = d_fn.max() > d_fp.max()
    d = d_fn if positive else d_fp
    candidates = np.argwhere(d > d.max() / 2)
    return candidates[np.random.randint(len(candidates))], positive


def _errors(masks):
    target, current = (m[0, 0].numpy() for m in masks)
    return target & ~current, ~target & current


def ritm_published(masks):
    """As SAM-Med3D's training does it: the edt package on padded error masks, argwhere, a draw."""
    edt = _package("edt")

    threads = torch.get_num_threads()
    return _ritm(_errors(masks), lambda e: edt.edt(e, black_border=True, parallel=threads))


def ritm_scipy(masks):
    distance_transform_edt = _package("scipy.ndimage").distance_transform_edt

    return _ritm(_errors(masks), distance_transform_edt)


def random_published(masks):
    target, current = (m[0, 0] for m in masks)
    fn, fp = target & ~current, ~target & current
    candidates = torch.argwhere(fn | fp)
    point = candidates[np.random.randint(len(candidates))]
    return point, bool(fn[tuple(point)])


def points_published(prob):
    """Per image and class: coordinates of the region and of the rest, a choice of each."""
    winner = prob.argmax(1)
    out = []
    for image in winner:
        for c in range(prob.shape[1]):
            for inside in (image == c, image != c):
                rows, columns = torch.where(inside)
                chosen = np.random.choice(len(rows), min(5, len(rows)), replace=False)
                out.append(torch.stack([rows[chosen], columns[chosen]], 1))
    return out


def boxes_published(masks):
    """As MedSAM's training does it: extremes of all coordinates inside."""
    out = []
    for mask in masks.numpy()[:, 0]:
        rows, columns = np.where(mask > 0)
        low, high = (columns.min(), rows.min()), (columns.max(), rows.max())
        out.append((*low, *high))
    return np.array(out, np.float32)


def boxes_monai(masks):
    generate_spatial_bounding_box = _package("monai.transforms.utils").generate_spatial_bounding_box

    return [generate_spatial_bounding_box(mask, lambda v: v > 0) for mask in masks]


def boxes_numpy(masks):
    """Extremes of the rows and columns that have anything inside."""
    out = []
    for mask in masks.numpy()[:, 0]:
        rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        out.append((columns[0], rows[0], columns[-1], rows[-1]))
    return np.array(out, np.float32)


def targets_torch(prob):
    top = prob[:, 1:].amax((2, 3, 4), keepdim=True)
    target = prob[:, 1:] >= torch.where(top < 0.5, 0.5 * top, 0.5)
    entropy = -torch.xlogy(prob, prob).sum(1, keepdim=True) / np.log(prob.shape[1])
    return target, (entropy <= 0.5) | (top < 0.5), top < 0.2


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
