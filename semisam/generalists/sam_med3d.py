# SPDX-License-Identifier: Apache-2.0
"""SAM-Med3D, SAM-Med3D-turbo and SegAnyPET: one network, three sets of weights, as generalists."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from semisam import ops, prompts, weights
from semisam.fetch import Weights
from semisam.generalists.cache import WeightsHash
from semisam.generalists.precision import autocast, bring, check_precision
from semisam.generalists.protocol import Decoded, GeneralistSpec
from semisam.generalists.sam_med3d_network import SamMed3DNetwork
from semisam.prompts import PromptBatch

__all__ = ["CubeState", "SamMed3D", "SamMed3DTurbo", "SegAnyPET"]

_UNASKED = -10.0  # the logit of rows that were not asked for
_PIECE = 1 << 16  # voxels of an image that are converted together, within the caches
_SEEN = {  # utils/data_paths.py of the repository
    "LA": "related: LAScarQS 2022 and decathlon task 2: left atria in MRI, in part of the same hospital",
    "Hippocampus": "as MSD04_Hippocampus",
    "MSD Heart": "as MSD02_Heart",
    "MSD Prostate": "as MSD05_Prostate",
    "MSD Pancreas": "as MSD07_Pancreas",
    "MSD Spleen": "as MSD09_Spleen",
    "BTCV": "as BTCV_Abdomen",
    "AMOS": "as AMOS2022, CT and MRI",
    "FLARE": "as FLARE21",
    "WORD": "as WORD",
    "LiTS": "as LITS",
    "TotalSegmentator": "as Totalsegmentator_dataset",
    "BraTS": "as BraTS2021 and BrainTumour",
    "PROMISE12": "as PROMISE12",
}


@dataclass(frozen=True)
class CubeState:
    """What `SamMed3D.encode` keeps of a batch of images: features, and how patch and cube relate."""

    features: Tensor  # [B, channels, grid, grid, grid]
    shape: tuple[int, ...]  # of the patch
    resampled: tuple[int, ...]  # of the patch on the network's spacing, before it goes into the cube


class SamMed3D:
    """SAM-Med3D: clicks and mask prompts on volumes, one cube of 128^3 voxels at a time.

    `checkpoint` is the published file (a dictionary with "model_state_dict"), or any safetensors or torch
    file with the same 324 tensors; nothing in it is run. `network` is a `SamMed3DNetwork` of yours instead,
    such as a fine-tuned or a small one.

    Images: a patch that fits is padded on both sides with its background to the cube, any other is resized
    to it; then the voxels above the background `background` (None: each image's minimum; 0 for raw
    intensities) get mean 0 and deviation 1. `resample_mm` (such as 1.5, what the weights were trained on)
    first brings patches of known spacing to that voxel size. Several channels are averaged afterwards.
    `normalize=False` leaves the intensities as they are, which is not what the weights were trained on.

    `precision` "float32", "bfloat16", "float16" or "auto": bfloat16 on GPUs that have it, float16 on other
    GPUs, float32 elsewhere. The network follows the images' device. It is frozen: in evaluation mode,
    without gradient.

    Raises ValueError for a file that does not fit (with what differs) and settings out of range, OSError for
    one that cannot be read. Paper: Wang et al., SAM-Med3D (arXiv 2310.15161).

    >>> import torch
    >>> from semisam.generalists.sam_med3d import SamMed3D
    >>> from semisam.generalists.sam_med3d_network import Architecture, SamMed3DNetwork
    >>> from semisam.prompts import PromptBatch
    >>> sam = SamMed3D(network=SamMed3DNetwork(Architecture.small()))  # random weights
    >>> state = sam.encode(torch.rand(1, 1, 20, 24, 16))
    >>> click = PromptBatch.empty(1, 1, (20, 24, 16), torch.empty(0)).append(
    ...     torch.tensor([[[10, 12, 8]]]), torch.tensor([[1]])
    ... )
    >>> sam.decode(state, click).logits.shape
    torch.Size([1, 1, 20, 24, 16])
    """

    spec = GeneralistSpec(
        "sam-med3d",
        spatial_dims=(3,),
        prompts=frozenset({"points", "mask"}),
        mask_size=(32, 32, 32),
        input_size=(128, 128, 128),
        spacing=(1.5, 1.5, 1.5),
        licence="Apache-2.0 (its repository; data sets have terms of their own)",
        training_sets=("SA-Med3D-140K: 70 public data sets and licensed private cases",),
        paper="arXiv 2310.15161",
        packages=("torch",),
        extra="torch",
        weights=Weights(page="https://github.com/uni-medical/SAM-Med3D"),
        overlaps=_SEEN,
        training_list="published",
        asynchronous=True,
    )

    def __init__(
        self,
        checkpoint: str | os.PathLike[str] | None = None,
        *,
        network: SamMed3DNetwork | None = None,
        background: float | None = None,
        resample_mm: float | None = None,
        precision: str = "auto",
        normalize: bool = True,
    ) -> None:
        """Build the network and load the weights once."""
        who = type(self).__name__
        if (checkpoint is None) == (network is None):
            what = "both" if network is not None else "neither"
            raise ValueError(
                f"{who}(): checkpoint: expected the file with the weights of {self.spec.name} (or a network "
                f"of yours instead), got {what}"
            )
        check_precision(precision, f"{who}()")
        if resample_mm is not None and not 0 < resample_mm < float("inf"):
            raise ValueError(f"{who}(): resample_mm: expected a positive number or None, got {resample_mm}")
        self.files: tuple[Path, ...] = () if checkpoint is None else (Path(checkpoint),)
        if checkpoint is not None:
            network = SamMed3DNetwork()
            weights.load(network, Path(checkpoint), who, name="checkpoint", rest=True)
        assert network is not None
        self.network = network.eval().requires_grad_(False)
        self.background, self.resample_mm, self.precision = background, resample_mm, precision
        self.normalize = normalize
        self._hash = WeightsHash()
        a = network.architecture
        self.spec = replace(self.spec, mask_size=a.mask_size, input_size=(a.side,) * 3)

    @torch.no_grad()
    def encode(self, images: Any, *, spacing: Sequence[float] | None = None) -> CubeState:
        """Prepare images [B, channels, D, H, W] and compute their features.

        `spacing` in mm is used with `resample_mm` alone. Raises TypeError for anything but a torch tensor,
        ValueError for another number of dimensions.
        """
        who = f"{type(self).__name__}.encode()"
        if not ops.is_torch(images):
            raise TypeError(f"{who}: images: expected a torch tensor, got {type(images).__name__}")
        if images.ndim != 5 or not images.shape[1]:
            raise ValueError(
                f"{who}: images: expected [B, channels, D, H, W], got shape {tuple(images.shape)}"
            )
        shape = tuple(images.shape[2:])
        resampled = self._resampled(shape, spacing)
        # On the CPU one by one: as fast there, with less memory, and rounded alike in every batch.
        parts = images.split(1) if images.device.type == "cpu" else [images]
        features = torch.cat([self._features(part, resampled) for part in parts])
        return CubeState(features, shape, resampled)

    @torch.no_grad()
    def decode(self, state: CubeState, prompts: PromptBatch, active: Any = None) -> Decoded:
        """Segment all rows that are asked for, in one batch per number of clicks; on a GPU all rows in one.

        A row without clicks is asked by its mask prompt alone, a row without a mask prompt gets zeros, as in
        training; padding (label -1) is left out, so that a row's answer does not depend on what else is in
        the batch. `low_res` are the decoder's logits, the next round's mask prompt.

        Raises ValueError for boxes and for prompts that do not fit the images.
        """
        batch, classes, _ = prompts.labels.shape
        self._check(state, prompts, active)
        if ops.stays(state.features.device):
            return self._decode_all(state, prompts, active)
        low = torch.full((batch * classes, *self._mask_size), _UNASKED, device=state.features.device)
        rows = torch.ones(len(low), dtype=torch.bool, device=low.device)
        if active is not None:
            rows = active.reshape(-1).to(rows)
        for index, points, labels, masks in self._groups(state, prompts, rows):
            with self._at(low.device):
                made, _ = self.network.decode(state.features[index // classes], points, labels, masks)
            low[index] = made[:, 0].float()
        if bool(rows.all()):
            logits = self._to_patch(low[:, None], state)
        else:
            logits = torch.full((len(low), *state.shape), _UNASKED, device=low.device)
            logits[rows] = self._to_patch(low[rows][:, None], state)[:, 0]
        head = (batch, classes)
        return Decoded(logits.reshape(*head, *state.shape), low.reshape(*head, *self._mask_size))

    def _decode_all(self, state: CubeState, prompts: PromptBatch, active: Any) -> Decoded:
        """All rows in one batch, whatever is asked for; clicks that a row does not have are hidden."""
        batch, classes, k = prompts.labels.shape
        points, labels, masks, _ = self._sent(state, prompts)
        absent = labels < 0
        # The token that is no point goes with the clicks: without any there is none.
        hidden = torch.cat([absent, absent.all(1, keepdim=True)], 1) if k else None
        features = state.features.repeat_interleave(classes, 0)
        with self._at(features.device):
            made, _ = self.network.decode(features, points, labels, masks, hidden)
        made = made.float()
        logits = self._to_patch(made, state)
        if active is not None:
            rows = active.to(made.device).reshape(-1, 1, 1, 1, 1)
            made, logits = (torch.where(rows, x, _UNASKED) for x in (made, logits))
        head = (batch, classes)
        return Decoded(logits.reshape(*head, *state.shape), made.reshape(*head, *self._mask_size))

    def mask_prompt(self, prob: Any, state: CubeState) -> Tensor:
        """Return the mask prompt [B, F, *mask_size] of probabilities [B, F, D, H, W] on the patch's grid.

        They go where the image went, and are 0 around it; then cells are averaged (`prompts.mask_logits`).
        """
        flat = prob.float().flatten(0, 1)[:, None]
        cube = self._into_cube(_resize(flat, state.resampled), 0.0)
        made: Tensor = prompts.mask_logits(cube[:, 0], self._mask_size)
        return made.reshape(*prob.shape[:2], *self._mask_size)

    # ---- for caches

    def fingerprint(self) -> str:
        """Return what `encode` depends on besides the images, as text."""
        settings = (self.background, self.resample_mm, self.precision, self.normalize)
        return f"SamMed3D {self._hash.of(self.network)} {self.network.architecture} {settings}"

    def pack(self, state: CubeState) -> list[tuple[Tensor, ...]]:
        """Return the features of each image."""
        return [(features,) for features in torch.split(state.features, 1)]

    def unpack(
        self, samples: list[tuple[Tensor, ...]], images: Any, *, spacing: Sequence[float] | None = None
    ) -> CubeState:
        """Return the state of images from what `pack` gave of each."""
        shape = tuple(images.shape[2:])
        return CubeState(torch.cat([s[0] for s in samples]), shape, self._resampled(shape, spacing))

    # ---- patch and cube

    def _features(self, images: Tensor, resampled: tuple[int, ...]) -> Tensor:
        channels = images.float().flatten(0, 1)[:, None]
        cube = self._standardised(_resize(channels, resampled))
        if images.shape[1] > 1:
            cube = cube.reshape(*images.shape[:2], *cube.shape[1:]).mean(1)
        with self._at(images.device):
            return self.network.embed(cube)

    @property
    def _mask_size(self) -> tuple[int, int, int]:
        return self.network.architecture.mask_size

    def _resampled(self, shape: tuple[int, ...], spacing: Sequence[float] | None) -> tuple[int, ...]:
        """The patch's shape on the network's spacing."""
        if self.resample_mm is None or spacing is None:
            return shape
        sides = zip(shape, spacing, strict=True)
        return tuple(max(1, round(n * s / self.resample_mm)) for n, s in sides)

    def _into_cube(self, x: Tensor, fill: float | Tensor) -> Tensor:
        """[N, 1, *resampled] into [N, 1, side, side, side]; `fill` around it, one value or one per row."""
        side = self.network.architecture.side
        shape = tuple(x.shape[2:])
        if max(shape) > side:
            return _resize(x, (side,) * 3)
        if shape == (side,) * 3:
            return x
        cube = x.new_empty(len(x), 1, side, side, side)
        if isinstance(fill, Tensor):
            cube.copy_(fill)
        else:
            cube.fill_(fill)
        cube[_place(shape, side)] = x
        return cube

    def _standardised(self, x: Tensor) -> Tensor:
        """Rows [N, 1, *S] in the cube, with mean 0 and deviation 1 over their voxels above the background."""
        low = x.flatten(1).amin(1).reshape(-1, 1, 1, 1, 1)
        if self.background is not None:
            low = torch.full_like(low, self.background)
        cube = self._into_cube(x, low)
        if not self.normalize:
            return cube
        n, mean, squares = _moments(cube.flatten(1), low.reshape(-1, 1))
        deviation = (squares / (n - 1).clamp_min(1)).sqrt()
        deviation = torch.where(deviation > 0, deviation, 1).float().reshape(low.shape)
        mean = torch.where(n > 0, mean, low.reshape(-1).double()).float().reshape(low.shape)
        return (cube - mean).div_(deviation)

    def _to_patch(self, low: Tensor, state: CubeState) -> Tensor:
        """Logits [N, 1, *mask_size] of the cube on the patch's grid."""
        side = self.network.architecture.side
        cube = _resize(low, (side,) * 3)
        if max(state.resampled) <= side:
            cube = cube[_place(state.resampled, side)]
        return _resize(cube, state.shape)

    def _groups(self, state: CubeState, batch: PromptBatch, rows: Tensor) -> Any:
        """(row numbers, points, labels, masks) of the rows asked for, by their number of clicks."""
        points, labels, masks, clicks = self._sent(state, batch)
        for k in torch.unique(clicks[rows]).tolist():
            index = (rows & (clicks == k)).nonzero()[:, 0]
            yield index, points[index, :k], labels[index, :k], masks[index]

    def _sent(self, state: CubeState, batch: PromptBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Points and labels of all rows, clicks first, their masks, and their numbers of clicks."""
        device = state.features.device
        scale = ops.numbers(
            [m / n for m, n in zip(state.resampled, state.shape, strict=True)], torch.float32, device
        )
        at = (batch.points.to(device).double() + 0.5) * scale - 0.5
        moved = PromptBatch(state.resampled, at, batch.labels.to(device), None, batch.mask_logits)
        sent = moved.to_sam_med3d(self.network.architecture.side)
        points, labels = sent["points"], sent["labels"]
        masks = sent.get("mask_logits")
        if masks is None:
            masks = torch.zeros(len(labels), 1, *self._mask_size, device=device)
        # Clicks first, in their order, and padding behind them.
        order = (labels < 0).to(torch.uint8).argsort(dim=1, stable=True)
        labels = labels.gather(1, order)
        points = points.gather(1, order[..., None].expand_as(points))
        return points, labels, masks.to(device).float(), (labels >= 0).sum(1)

    # ---- devices and checks

    def _at(self, device: torch.device) -> Any:
        """Move the network there; the context of its precision."""
        bring(self.network, device)
        return autocast(self.precision, device)[0]

    def _check(self, state: CubeState, batch: PromptBatch, active: Any) -> None:
        who = f"{type(self).__name__}.decode(): "
        n, classes, _ = batch.labels.shape
        if batch.shape != state.shape or n != len(state.features):
            raise ValueError(
                f"{who}prompts: expected {len(state.features)} samples of the images' shape {state.shape}, "
                f"got {n} of {batch.shape}"
            )
        if batch.boxes is not None:
            raise ValueError(
                f"{who}prompts.boxes: expected None, as the network has no box prompts, got boxes"
            )
        if active is not None and tuple(active.shape) != (n, classes):
            raise ValueError(f"{who}active: expected shape {(n, classes)}, got {tuple(active.shape)}")
        drawn = batch.mask_logits
        if drawn is not None and tuple(drawn.shape[2:]) != self._mask_size:
            raise ValueError(
                f"{who}prompts.mask_logits: expected size {self._mask_size} (see mask_prompt), got "
                f"{tuple(drawn.shape[2:])}"
            )


class SamMed3DTurbo(SamMed3D):
    """SAM-Med3D-turbo: SAM-Med3D fine-tuned by its authors on more data sets; see `SamMed3D`.

    >>> from semisam.generalists.sam_med3d import SamMed3DTurbo
    >>> SamMed3DTurbo.spec.name, SamMed3DTurbo.spec.default_mode
    ('sam-med3d-turbo', 'mixed')
    """

    spec = replace(
        SamMed3D.spec,
        name="sam-med3d-turbo",
        training_sets=(*SamMed3D.spec.training_sets, "fine-tuned on 44 of them"),
        weights=Weights(
            hub="blueyo0/SAM-Med3D",
            files=("sam_med3d_turbo.pth",),
            page="https://huggingface.co/blueyo0/SAM-Med3D",
        ),
        overlaps=_SEEN | {"KiTS": "as KiTS and KiTS2021", "FLARE": "as FLARE21 and FLARE22"},
    )


class SegAnyPET(SamMed3D):
    """SegAnyPET: the same network for whole-body PET; see `SamMed3D`.

    Paper: Zhang et al., SegAnyPET (arXiv 2502.14351).

    >>> from semisam.generalists.sam_med3d import SegAnyPET
    >>> SegAnyPET.spec.name, SegAnyPET.spec.input_size
    ('segany-pet', (128, 128, 128))
    """

    spec = replace(
        SamMed3D.spec,
        name="segany-pet",
        licence="see its repository",
        training_sets=("PETS-5k (private PET scans)",),
        paper="arXiv 2502.14351",
        weights=Weights(
            hub="YichiZhang98/SegAnyPET", page="https://huggingface.co/YichiZhang98/SegAnyPET/tree/main"
        ),
        overlaps={},
        training_list="",
    )


def _resize(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(x.shape[2:]) == tuple(shape):
        return x
    if x.device.type == "cpu":  # where the memory is had matters more than the arithmetic
        made = ops.empty((*x.shape[:2], *shape), x.dtype, x.device)
        resized: Tensor = torch.ops.aten.upsample_trilinear3d.out(x, shape, False, None, None, None, out=made)
        return resized
    return F.interpolate(x, shape, mode="trilinear", align_corners=False)


def _moments(rows: Tensor, low: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Number, mean and sum of squared deviations of what is above `low` [N, 1] in `rows` [N, V], float64.

    Piece by piece: n, m and q of two pieces are, with d = m2 - m1, those of both together by

        n = n1 + n2,   m = m1 + d n2 / n,   q = q1 + q2 + d^2 n1 n2 / n
    """
    n, mean, squares = rows.new_zeros(3, len(rows), dtype=torch.float64).unbind()
    for piece in torch.split(rows, _PIECE if rows.device.type == "cpu" else rows.shape[1], 1):
        inside = piece > low
        values = piece.double()
        count = inside.sum(1)
        values.mul_(inside)
        own = values.sum(1) / count.clamp_min(1)
        values.sub_(own[:, None]).mul_(inside)
        apart, whole = own - mean, (n + count).clamp_min(1)
        squares = squares + values.square_().sum(1) + apart**2 * n * count / whole
        mean = mean + apart * count / whole
        n = n + count
    return n, mean, squares


def _place(shape: tuple[int, ...], side: int) -> tuple[slice, ...]:
    """Where a patch lies in the cube [N, 1, side, side, side] that it is padded to."""
    return (slice(None), slice(None), *tuple(slice((side - n) // 2, (side - n) // 2 + n) for n in shape))
