# SPDX-License-Identifier: Apache-2.0
"""What people use today for each operator: the functions that `tests/cases.py` names as peers.

Each takes the data of its `Speed` entry. A peer whose package is missing raises ImportError, and the
benchmark says so in its row. "published" peers are written here from the formulas of the methods'
descriptions in the way that training scripts usually write them.
"""

from __future__ import annotations

import functools
import importlib
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

_package = importlib.import_module  # inside the functions: a peer may be missing

# ---- torch.compile as a peer ----------------------------------------------------------------------

_compiled_functions: dict[str, Any] = {}


def _compile(name, function):
    """torch.compile, once per thread count (the generated loops fix it); ImportError if it cannot."""
    key = f"{name} {torch.get_num_threads()}"
    if key not in _compiled_functions:
        # Beyond the default of 8 shapes and thread counts a function would silently run uncompiled.
        torch._dynamo.config.recompile_limit = 64
        _compiled_functions[key] = torch.compile(function, dynamic=False)

    def run(*data):
        try:
            return _compiled_functions[key](*data)
        except Exception as e:
            raise ImportError(f"torch.compile does not work here: {str(e).splitlines()[0]}") from e

    return run


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


def answer_torch(z):
    rows = z.flatten(2)
    return z > 0, rows.amin(2), rows.amax(2)


def targets_torch(prob):
    top = prob[:, 1:].amax((2, 3, 4), keepdim=True)
    target = prob[:, 1:] >= torch.where(top < 0.5, 0.5 * top, 0.5)
    entropy = -torch.xlogy(prob, prob).sum(1, keepdim=True) / np.log(prob.shape[1])
    return target, (entropy <= 0.5) | (top < 0.5), top < 0.2


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
    """The same under torch.compile."""

    def run(data):
        return _gradient_of(_compile(function.__name__, function))(data)

    return run


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
    # The same quantity; in float32 MONAI's sums over the LA shape are off by 3e-3, in float64 by 2e-8.
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


def fuse_maps_torch(maps):
    """Mean, normalised variance and exp(-4u) of foreground maps, as one writes it."""
    p = torch.stack(maps)
    mean = p.mean(0)
    u = (4 * p.var(0, unbiased=False)).clamp(0, 1)
    return mean, u[:, 0], torch.exp(-4 * u[:, 0])


def _fuse_maps_sums(maps):
    mean = sum(maps) / len(maps)
    u = (4 * (sum(p * p for p in maps) / len(maps) - mean * mean)).clamp(0, 1)
    return mean, u[:, 0], torch.exp(-4 * u[:, 0])


def fuse_maps_compile(maps):
    return _compile("fuse_maps", _fuse_maps_sums)(maps)


def fuse_maps_numpy(maps):
    p = np.stack([m.numpy() for m in maps])
    u = np.clip(4 * p.var(0), 0, 1)[:, 0]
    return p.mean(0), u, np.exp(-4 * u)


def mc_entropy_torch(passes):
    """UA-MT as published: softmaxes collected in one tensor, mean, entropy."""
    preds = torch.zeros([len(passes), *passes[0].shape])
    for i, z in enumerate(passes):
        preds[i] = F.softmax(z, dim=1)
    mean = preds.mean(0)
    return -(mean * torch.log(mean + 1e-6)).sum(1)


def _mc_entropy_sums(passes):
    mean = sum(F.softmax(z, dim=1) for z in passes) / len(passes)
    return -(mean * torch.log(mean + 1e-6)).sum(1)


def mc_entropy_compile(passes):
    return _compile("mc_entropy", _mc_entropy_sums)(passes)


def _masked_mse(passes, z, q, entropy):
    mask = (entropy < 0.75 * math.log(2)).float()
    distance = (torch.softmax(z, 1) - q) ** 2
    loss = (mask[:, None] * distance).sum() / (2 * mask.sum() + 1e-16)
    return loss


def uamt_torch(data):
    passes, z, q = data
    with torch.no_grad():
        entropy = mc_entropy_torch(passes)
    z = z.detach().requires_grad_()
    loss = _masked_mse(passes, z, q, entropy)
    loss.backward()
    return loss.detach(), z.grad


def uamt_compile(data):
    passes, z, q = data
    with torch.no_grad():
        entropy = mc_entropy_compile(passes)
    z = z.detach().requires_grad_()
    loss = _compile("masked_mse", _masked_mse_only)((z, q, entropy))
    loss.backward()
    return loss.detach(), z.grad


def _masked_mse_only(data):
    return _masked_mse(None, *data)


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
