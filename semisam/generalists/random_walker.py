# SPDX-License-Identifier: Apache-2.0
"""The embedded generalist: a random walker with priors, which needs no weights and no download."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from semisam import masks, ops, random_walk
from semisam.generalists.protocol import Decoded, GeneralistSpec
from semisam.prompts import PromptBatch

__all__ = ["RandomWalker", "WalkState"]

_LIMIT = 10.0  # of the logits, as of mask prompts
_OPERATORS = ("random_walker", "geodesic", "edt", "keep_components")  # that a GPU must have for images there


@dataclass(frozen=True)
class WalkState:
    """What `RandomWalker.encode` keeps of a batch of images: grey values of mean 0 and deviation 1.

    >>> import numpy as np
    >>> from semisam.generalists.random_walker import RandomWalker
    >>> RandomWalker().encode(np.zeros((2, 1, 8, 8))).image.shape
    (2, 8, 8)
    """

    image: Any  # [B, *S]: NumPy, or a tensor where the images stay on their device
    spacing: tuple[float, ...] | None
    like: Any  # an empty array of the images' kind and device
    grey: Any = None  # of a tensor: what colour is judged by


class RandomWalker:
    """Segmentation by a random walk between seeds on the image's grid, with a prior: takes every prompt.

    `gamma`, `beta`, `weight`, `colour_weight`: the solve for a mask prompt (`random_walk.mask_prompt`);
    `largest_component` keeps only that of the mask prompt, for organs of one part. `click_gamma`,
    `radius`, `geodesic_weight`, `edge_weight`: the solve for clicks alone (`random_walk.click_prompt`).
    `sigma` smooths the image, in voxels. The solve ends at `tol` or after `max_iter` iterations, then with
    a RuntimeWarning and `info["unconverged"]` above 0.

    Images on a GPU are segmented there, without a wait: all rows at once, of which those that are not asked
    for cost nothing. A row without any prompt is background then, no warning is given, and `info` has
    tensors. `device="cpu"` does the work on the CPU, wherever the images are; answers return to
    them. 2-D and 3-D, NumPy or torch. Images of several channels are standardised by channel and averaged.

    Papers: Grady, Random Walks for Image Segmentation (TPAMI 2006); with priors: Grady, Multilabel Random
    Walker Segmentation Using Prior Models (CVPR 2005).

    >>> import numpy as np
    >>> from semisam.generalists.random_walker import RandomWalker
    >>> from semisam.prompts import PromptBatch, mask_logits
    >>> image = np.zeros((1, 1, 40, 40), np.float32)
    >>> image[..., 10:30, 10:30] = 1
    >>> rough = np.full((1, 1, 40, 40), 0.1)
    >>> rough[..., 12:32, 9:29] = 0.9  # a specialist's probability, two voxels off
    >>> walker = RandomWalker()
    >>> state = walker.encode(image)
    >>> from dataclasses import replace
    >>> ask = replace(PromptBatch.empty(1, 1, (40, 40)), mask_logits=mask_logits(rough[0], (40, 40))[None])
    >>> answer = walker.decode(state, ask)
    >>> errors = [int(((m > 0.5) != image).sum()) for m in (rough, 1 / (1 + np.exp(-answer.logits)))]
    >>> errors[1] < errors[0], answer.info["unconverged"]
    (True, 0)
    """

    spec = GeneralistSpec(
        "random-walker",
        spatial_dims=(2, 3),
        prompts=frozenset({"points", "mask", "box"}),
        default_mode="mask",
        licence="Apache-2.0",
        paper="Grady, TPAMI 2006 and CVPR 2005",
        training_list="none",
        asynchronous=True,
    )

    def __init__(
        self,
        gamma: float = 0.05,
        beta: float = 90.0,
        weight: float = 2.0,
        colour_weight: float = 0.5,
        largest_component: bool = False,
        device: str | None = None,
        *,
        click_gamma: float = 0.005,
        radius: float = 2.0,
        geodesic_weight: float = 4.0,
        edge_weight: float = 30.0,
        sigma: float = 0.5,
        tol: float = 1e-4,
        max_iter: int = 1000,
    ) -> None:
        """Keep the settings; ValueError for one outside its range."""
        if device not in (None, "cpu"):
            raise ValueError(
                f"RandomWalker(): device: expected 'cpu', or None for where the images are, got {device!r}"
            )
        self._on_cpu = device == "cpu"
        if self._on_cpu:
            self.spec = replace(self.spec, asynchronous=False)
        numbers = {"gamma": gamma, "beta": beta, "weight": weight, "colour_weight": colour_weight}
        numbers |= {"click_gamma": click_gamma, "radius": radius, "geodesic_weight": geodesic_weight}
        numbers |= {"edge_weight": edge_weight, "sigma": sigma, "tol": tol}
        for name, value in numbers.items():
            if not 0 <= value < float("inf"):
                raise ValueError(f"RandomWalker(): {name}: expected 0 or a positive number, got {value}")
        if max_iter < 1:
            raise ValueError(f"RandomWalker(): max_iter: expected at least 1, got {max_iter}")
        self.gamma, self.beta, self.tol, self.max_iter = gamma, beta, tol, max_iter
        self.largest_component, self.sigma, self.click_gamma = largest_component, sigma, click_gamma
        self._shared: dict[str, Any] = {"radius": radius, "colour_weight": colour_weight}
        self._mask: dict[str, Any] = {"weight": weight}
        self._clicks: dict[str, Any] = {"geodesic_weight": geodesic_weight, "edge_weight": edge_weight}

    def encode(self, images: Any, *, spacing: Sequence[float] | None = None) -> WalkState:
        """Standardise images [B, channels, *S] once; `spacing` in mm makes steps along long axes harder.

        Raises ValueError for another number of dimensions.
        """
        shape = tuple(images.shape)
        if len(shape) not in (4, 5) or not shape[1]:
            raise ValueError(
                f"RandomWalker.encode(): images: expected [B, channels, H, W] or [B, channels, D, H, W], "
                f"got shape {shape}"
            )
        n, step = len(shape) - 2, None if spacing is None else tuple(spacing)
        if self._stay(images):
            walking, whole = _seeds_there(), images.detach().float()
            if shape[1] > 1:
                whole = walking.standardize(whole.flatten(0, 1), 0.0).reshape(shape).mean(1, keepdim=True)
            scaled = walking.standardize(whole[:, 0], self.sigma)
            return WalkState(scaled, step, images[:0], walking.grey_of(scaled))
        image = _numpy(images).astype(np.float32, copy=False)
        if shape[1] > 1:
            image = random_walk.standardize(image, sigma=0, spatial_dims=n).mean(1, keepdims=True)
        image = random_walk.standardize(image[:, 0], sigma=self.sigma, spatial_dims=n)
        return WalkState(image, step, images[:0])

    def _stay(self, array: Any) -> bool:
        """Tell whether the work is done on the array's device."""
        if self._on_cpu or not ops.is_torch(array) or not ops.stays(array.device):
            return False
        return not ops.lacks(array.device, _OPERATORS)

    def decode(self, state: WalkState, prompts: PromptBatch, active: Any = None) -> Decoded:
        """Solve for all rows asked for, in one batch per kind of prompt.

        A row with a mask prompt starts from it, and its clicks become seeds, too, and win; a row with
        clicks alone has background outside its box, if it has one; a row with a box alone takes the box's
        inside for its mask. A mask prompt of nothing but zeros says nothing. `info` counts "solves",
        "iterations" and "unconverged". The next round's mask prompt is the answer itself.

        Raises ValueError for prompts that do not fit the images and for a row without any prompt.
        """
        if state.grey is not None:
            return self._decode_there(state, prompts, active)
        rows = _rows_asked_for(state, prompts, active)
        shape = (*prompts.labels.shape[:2], *prompts.shape)
        logits = np.full((shape[0] * shape[1], *prompts.shape), -_LIMIT, np.float32)
        info = {"solves": 0, "iterations": 0, "unconverged": 0}
        clicked = (rows.labels >= 0).any(1)
        by_clicks = clicked if rows.mask is None else clicked & ~_says(rows.mask)
        for part in (_with_masks(rows.only(~by_clicks), prompts.shape), rows.only(by_clicks, mask=False)):
            if not len(part.index):
                continue
            prob, walk = self._solve(state, part)
            with np.errstate(divide="ignore"):
                found = np.log(prob) - np.log1p(-prob)
            logits[part.index] = np.clip(found, -_LIMIT, _LIMIT)
            info["solves"] += len(part.index)
            info["iterations"] += int(walk.iterations.sum())
            info["unconverged"] += int((~walk.converged).sum())
        answer = _like(logits.reshape(shape), state.like)
        return Decoded(answer, answer, info)

    def _decode_there(self, state: WalkState, prompts: PromptBatch, active: Any) -> Decoded:
        """All rows on the images' device, once by masks and once by clicks; others have seeds everywhere."""
        torch: Any = sys.modules["torch"]
        walking = _seeds_there()
        batch, classes, k = prompts.labels.shape
        _check_prompts(tuple(state.image.shape), prompts, active)
        space, total, device = prompts.shape, batch * classes, state.image.device
        drawn, boxes = prompts.mask_logits, prompts.boxes
        points = prompts.points.to(device).reshape(total, k, len(space))
        labels = prompts.labels.to(device).reshape(total, k)
        box = None if boxes is None else boxes.to(device).reshape(total, 2, len(space))
        asked = torch.ones(total, dtype=torch.bool, device=device)
        asked = asked if active is None else active.to(device).reshape(-1) != 0
        clicked = (labels >= 0).any(1)
        says = torch.zeros_like(clicked)
        if drawn is not None:
            mask = drawn.to(device).reshape(total, *space)
            says = (mask != 0).flatten(1).any(1)
        own: dict[str, Any] = {"radius": self._shared["radius"], "colour": self._shared["colour_weight"]}
        where = (-1, *(1,) * len(space))
        logits = torch.full((total, *space), -_LIMIT, device=device)
        info = {"solves": 0, "iterations": 0, "unconverged": 0}
        for by_clicks in (False, True):
            if by_clicks:
                if not k:
                    continue
                rows = asked & clicked & ~says
                seeds, prior = walking.click_seeds(
                    state.image, state.grey, box, (points, labels), **own, **self._clicks
                )
            else:
                if drawn is None and box is None:
                    continue
                inside = None if drawn is None else mask >= 0
                if box is not None:
                    filled = walking.box_filled(box, space)
                    inside = filled if inside is None else torch.where(says.reshape(where), inside, filled)
                rows = asked & ~(clicked & ~says) & (says if box is None else torch.ones_like(says))
                if self.largest_component:
                    inside = masks.largest_component(inside, spatial_dims=len(space))
                seeds, prior = walking.mask_seeds(
                    state.grey, inside, (points, labels), weight=self._mask["weight"], **own
                )
            kept = rows.reshape(where)
            seeds, prior = torch.where(kept, seeds, 2), torch.where(kept, prior, 0.5)
            prob, iterations, residual = random_walk.solved(
                state.image,
                seeds.reshape(batch, classes, *space),
                prior.reshape(batch, classes, *space),
                gamma=self.click_gamma if by_clicks else self.gamma,
                beta=self.beta,
                spacing=state.spacing,
                tol=self.tol,
                max_iter=self.max_iter,
                spatial_dims=len(space),
            )
            prob = prob.reshape(total, *space)
            found = (prob.log() - (-prob).log1p()).clamp(-_LIMIT, _LIMIT)
            logits = torch.where(kept, found, logits)
            info["solves"] += rows.sum()
            info["iterations"] += (iterations * rows).sum()
            info["unconverged"] += (~(residual <= self.tol) & rows).sum()
        answer = logits.reshape(batch, classes, *space)
        return Decoded(answer, answer, info)

    def _solve(self, state: WalkState, rows: _Rows) -> Any:
        n = state.image.ndim - 1
        image = state.image[rows.sample]
        clicks: dict[str, Any] = {"points": rows.points, "labels": rows.labels, "spatial_dims": n}
        clicks |= self._shared
        if rows.mask is None:
            seeds, prior = random_walk.click_seeds(image, box=rows.box, **clicks, **self._clicks)
        else:
            mask = rows.mask
            if self.largest_component:
                mask = masks.largest_component(mask, spatial_dims=n)
            seeds, prior = random_walk.mask_seeds(image, mask, **clicks, **self._mask)
        return random_walk.random_walker(
            image,
            seeds,
            prior,
            gamma=self.click_gamma if rows.mask is None else self.gamma,
            beta=self.beta,
            spacing=state.spacing,
            tol=self.tol,
            max_iter=self.max_iter,
            spatial_dims=n,
            return_info=True,
        )


def _seeds_there() -> Any:
    """What is done in torch, which only callers with tensors have."""
    from semisam.generalists import _random_walker_seeds  # noqa: PLC0415

    return _random_walker_seeds


class _Rows(NamedTuple):
    """Rows (one class of one sample each) and their prompts, as NumPy arrays."""

    index: Any  # [n], of sample * classes + class
    sample: Any  # [n]
    points: Any  # [n, K, ndim]
    labels: Any  # [n, K]
    mask: Any  # [n, *S] or None
    box: Any  # [n, 2, ndim] or None

    def only(self, keep: NDArray[np.bool_], *, mask: bool = True) -> _Rows:
        kept = _Rows(*(None if value is None else value[keep] for value in self))
        return kept if mask else kept._replace(mask=None)


def _rows_asked_for(state: WalkState, prompts: PromptBatch, active: Any) -> _Rows:
    """The active rows, after making sure that prompts fit the images."""
    batch, classes, clicks = prompts.labels.shape
    space = tuple(state.image.shape[1:])
    drawn = prompts.mask_logits
    _check_prompts(tuple(state.image.shape), prompts, active)
    total, n = batch * classes, len(space)
    rows = _Rows(
        np.arange(total),
        np.arange(total) // classes,
        _numpy(prompts.points).reshape(total, clicks, n),
        _numpy(prompts.labels).reshape(total, clicks),
        None if drawn is None else _numpy(drawn).reshape(total, *space),
        None if prompts.boxes is None else _numpy(prompts.boxes).reshape(total, 2, n),
    )
    if active is not None:
        rows = rows.only(_numpy(active).reshape(-1) != 0)
    silent = ~(rows.labels >= 0).any(1)
    if rows.mask is not None:
        silent &= ~_says(rows.mask)
    if rows.box is None and silent.any():
        row = int(rows.index[silent][0])
        raise ValueError(
            f"RandomWalker.decode(): prompts: expected a click, a mask prompt or a box for every row asked "
            f"for, got none for sample {row // classes}, class {row % classes + 1}"
        )
    return rows


def _check_prompts(images: tuple[int, ...], prompts: PromptBatch, active: Any) -> None:
    """Make sure that prompts fit images [B, *S]."""
    (batch, classes, _), space, drawn = prompts.labels.shape, images[1:], prompts.mask_logits
    if prompts.shape != space or batch != images[0]:
        raise ValueError(
            f"RandomWalker.decode(): prompts: expected {images[0]} samples of the images' shape "
            f"{space}, got {batch} of {prompts.shape}"
        )
    if active is not None and tuple(active.shape) != (batch, classes):
        raise ValueError(
            f"RandomWalker.decode(): active: expected shape {(batch, classes)}, got {tuple(active.shape)}"
        )
    if drawn is not None and tuple(drawn.shape[2:]) != space:
        raise ValueError(
            f"RandomWalker.decode(): prompts.mask_logits: expected the images' shape {space}, "
            f"got {tuple(drawn.shape[2:])}"
        )


def _says(mask: NDArray[Any]) -> NDArray[np.bool_]:
    """Which mask prompts say anything: all zeros is what models get that must have one."""
    return np.asarray(mask.any(axis=tuple(range(1, mask.ndim))))


def _with_masks(rows: _Rows, space: tuple[int, ...]) -> _Rows:
    """The same rows with boolean masks; the inside of the box where there is no mask prompt."""
    if rows.mask is None:
        inside = np.zeros((len(rows.index), *space), bool)
        drawn = np.zeros(len(rows.index), bool)
    else:
        inside, drawn = rows.mask >= 0, _says(rows.mask)
    for i in np.flatnonzero(~drawn):
        inside[i] = _filled(rows.box[i], space)
    return rows._replace(mask=inside)


def _filled(box: NDArray[Any], space: tuple[int, ...]) -> NDArray[np.bool_]:
    mask = np.zeros(space, bool)
    low, high = np.ceil(box[0]).astype(int), np.floor(box[1]).astype(int)
    mask[tuple(slice(a, b + 1) for a, b in zip(low, high, strict=True))] = True
    return mask


def _numpy(array: Any) -> NDArray[Any]:
    if ops.is_torch(array):
        array = array.detach().cpu()
        array = array.float() if array.is_floating_point() else array
    return np.asarray(array)


def _like(result: NDArray[Any], array: Any) -> Any:
    if ops.is_torch(array):
        return sys.modules["torch"].from_numpy(result).to(array.device)
    return result
