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


def random_walker_skimage_cg_j(data):
    """scikit-image's Jacobi mode at its default tolerance (1e-3). It has no prior: seeds alone."""
    segmentation = _package("skimage.segmentation")
    image, seeds = data["image"], data["seeds"]
    beta = 90 * 10 * float(image.std())  # it divides beta by 10 std
    full = segmentation.random_walker(image, seeds, beta=beta, mode="cg_j", return_full_prob=True)
    return full[0]


def random_walker_scipy_cg(data):
    """The same system and preconditioner as a sparse matrix over the free voxels in SciPy, float64."""
    sparse = _package("scipy.sparse")
    linalg = _package("scipy.sparse.linalg")
    image, seeds, prior, gamma = data["image"], data["seeds"], data["prior"], data["gamma"]
    free = np.flatnonzero(seeds == 0)
    number = np.full(image.size, -1)
    number[free] = np.arange(free.size)
    grid = np.arange(image.size).reshape(image.shape)
    fixed = (seeds == 1).ravel()
    diagonal = np.full(free.size, gamma)
    right = gamma * prior.ravel()[free].astype(np.float64)
    rows, columns, values = [], [], []
    for axis in range(image.ndim):
        weights = np.exp(-90 * np.diff(image, axis=axis).ravel() ** 2) + 1e-5
        i = grid.take(range(image.shape[axis] - 1), axis).ravel()
        j = grid.take(range(1, image.shape[axis]), axis).ravel()
        for here, there in ((i, j), (j, i)):
            a, b = number[here], number[there]
            of = a >= 0
            diagonal += np.bincount(a[of], weights[of], free.size)
            seed = of & (b < 0) & fixed[there]
            right += np.bincount(a[seed], weights[seed], free.size)
            both = of & (b >= 0)
            rows.append(a[both])
            columns.append(b[both])
            values.append(-weights[both])
    off = sparse.csr_matrix((np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))))
    off.resize(free.size, free.size)
    jacobi = sparse.diags(1 / diagonal)
    x = fixed.astype(np.float32)
    x[free], _ = linalg.cg(off + sparse.diags(diagonal), right, prior.ravel()[free], rtol=1e-4, M=jacobi)
    return x.reshape(image.shape)


def geodesic_scipy_dijkstra(data):
    """The same steps as a sparse graph in SciPy's Dijkstra, float64."""
    sparse = _package("scipy.sparse")
    image, mask = data["image"], data["mask"]
    grid = np.arange(image.size).reshape(image.shape)
    rows, columns, steps = [], [], []
    for axis in range(image.ndim):
        rows.append(grid.take(range(image.shape[axis] - 1), axis).ravel())
        columns.append(grid.take(range(1, image.shape[axis]), axis).ravel())
        steps.append(np.hypot(1.0, data["weight"] * np.diff(image, axis=axis)).ravel())
    ends = (np.concatenate(rows), np.concatenate(columns))
    graph = sparse.csr_matrix((np.concatenate(steps), ends), (image.size, image.size))
    find = _package("scipy.sparse.csgraph").dijkstra
    d = find(graph, directed=False, indices=np.flatnonzero(mask), min_only=True)
    return d.reshape(image.shape).astype(np.float32)
