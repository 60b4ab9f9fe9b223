# SPDX-License-Identifier: Apache-2.0
"""VISTA3D, MONAI's network for organs and tumours in CT, as a generalist that takes clicks."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from semisam import ops, weights
from semisam.fetch import Weights
from semisam.generalists import licences
from semisam.generalists.cache import WeightsHash
from semisam.generalists.precision import autocast, bring, check_precision
from semisam.generalists.protocol import Decoded, GeneralistSpec
from semisam.prompts import PromptBatch

__all__ = ["FeatureState", "Vista3D"]

_UNASKED = -10.0  # the logit of rows that were not asked for
_SPECIAL = (
    23,
    24,
    25,
    26,
    27,
    57,
    128,
)  # classes whose clicks have labels 2 and 3, as MONAI's network has them
_UNNAMED = -1  # the class prompt of "some class": clicks alone say what is meant
_SEEN = {  # vista3d/data/datasets.py of the repository
    "MSD Pancreas": "as Task07",
    "MSD Spleen": "as Task09",
    "Pancreas-CT": "as Pancreas-CT",
    "BTCV": "as BTCV-Abdomen",
    "AMOS": "as AMOS22",
    "FLARE": "as FLARE22",
    "LiTS": "as Task03",
    "TotalSegmentator": "as TotalSegmentator and TotalSegmentatorV2",
}


@dataclass(frozen=True)
class FeatureState:
    """What `Vista3D.encode` keeps of a batch of images: features at full resolution, one image each."""

    features: list[Tensor]  # [1, channels, *padded]
    shape: tuple[int, ...]  # of the patch
    resampled: tuple[int, ...]  # of the patch on the network's spacing, before it is padded


class Vista3D:
    """VISTA3D on volumes: clicks per class, all clicks so far in every round.

    `checkpoint` is the published model.pt for MONAI 1.4 or newer, or any safetensors or torch file with the
    same tensors; nothing in it is run. `network` is a `monai.networks.nets.vista3d.VISTA3D` of yours instead.

    `classes` are VISTA3D's own numbers of your foreground classes, in their order: 1 to 132 for what it knows
    (its label_dict.json), above 132 for anything else (zero-shot), -1 for not saying; None: -1 for all.
    Tumours and vessels (`special`) have click labels of their own.

    Images: several channels are averaged; what lies in `window` (low, high) goes to 0 .. 1 and the rest is
    clipped. The published weights were trained on Hounsfield units in (-963.8, 1053.7); None takes the
    1st and 99th percentile of each image instead, for intensities that were normalised. `resample_mm` (such
    as 1.5, what they were trained on) first brings patches of known spacing to that voxel size. Sides are
    padded to what the network can halve. A patch of 128^3 keeps features of 400 MB in float32, half of that
    in half precision, until the step is over.

    `precision` "float32", "bfloat16", "float16" or "auto" (`semisam.generalists.precision`) is that of
    encoder and features; the head, which handles coordinates, runs in float32. The network follows the
    images' device. It is frozen: in evaluation mode, without gradient.

    Raises ImportError without MONAI, ValueError for a file that does not fit (with what differs) and settings
    out of range, OSError for one that cannot be read. The licence of the weights is said once, on standard
    error. Not run here with the published weights. Paper: He et al., VISTA3D (arXiv 2406.05285).

    >>> from semisam.generalists.vista3d import Vista3D
    >>> Vista3D.spec.prompts, Vista3D.spec.default_mode
    (frozenset({'points'}), 'unc')
    """

    spec = GeneralistSpec(
        "vista3d",
        spatial_dims=(3,),
        prompts=frozenset({"points"}),
        spacing=(1.5, 1.5, 1.5),
        default_mode="unc",
        licence="NVIDIA Open Model License or OneWay Noncommercial License: its repository names both",
        training_sets=("11454 CT volumes, in its vista3d/data/datasets.py",),
        paper="arXiv 2406.05285",
        packages=("torch", "monai"),
        extra="train",
        weights=Weights(
            hub="nvidia/NV-Segment-CT",
            files=("vista3d_pretrained_model/model.pt",),
            page="https://huggingface.co/nvidia/NV-Segment-CT",
        ),
        overlaps=_SEEN,
        training_list="published",
    )

    def __init__(
        self,
        checkpoint: str | os.PathLike[str] | None = None,
        *,
        network: Any = None,
        classes: Sequence[int] | None = None,
        special: Sequence[int] = _SPECIAL,
        window: Sequence[float] | None = None,
        resample_mm: float | None = None,
        precision: str = "auto",
    ) -> None:
        """Build the network and load the weights once."""
        who = "Vista3D()"
        if (checkpoint is None) == (network is None):
            what = "both" if network is not None else "neither"
            raise ValueError(
                f"{who}: checkpoint: expected the file with the weights of vista3d (or a network of yours "
                f"instead), got {what}"
            )
        check_precision(precision, who)
        if classes is not None and not (classes and all(c == _UNNAMED or c > 0 for c in classes)):
            raise ValueError(f"{who}: classes: expected numbers above 0, or {_UNNAMED}, got {list(classes)}")
        if window is not None and (len(window) != 2 or not window[0] < window[1]):
            raise ValueError(f"{who}: window: expected (low, high) with low < high, got {window}")
        if resample_mm is not None and not 0 < resample_mm < float("inf"):
            raise ValueError(f"{who}: resample_mm: expected a positive number or None, got {resample_mm}")
        self.files: tuple[Path, ...] = () if checkpoint is None else (Path(checkpoint),)
        if checkpoint is not None:
            network = _monai().vista3d132(in_channels=1)
            weights.load(network, Path(checkpoint), "Vista3D", name="checkpoint")
            licences.tell(self.spec)
        self.network = network.eval().requires_grad_(False)
        self._hash = WeightsHash()
        self.classes = None if classes is None else tuple(int(c) for c in classes)
        self.special, self.precision, self.resample_mm = tuple(special), precision, resample_mm
        self.window = None if window is None else (float(window[0]), float(window[1]))
        self.factor = tuple(int(n) for n in self.network.image_encoder.shape_factor())
        self.spec = replace(self.spec, max_classes=None if self.classes is None else len(self.classes))

    @torch.no_grad()
    def encode(self, images: Any, *, spacing: Sequence[float] | None = None) -> FeatureState:
        """Prepare images [B, channels, D, H, W] and compute their features.

        `spacing` in mm is used with `resample_mm` alone. Raises TypeError for anything but a torch tensor,
        ValueError for another number of dimensions.
        """
        if not ops.is_torch(images):
            raise TypeError(f"Vista3D.encode(): images: expected a torch tensor, got {type(images).__name__}")
        if images.ndim != 5 or not images.shape[1]:
            raise ValueError(
                f"Vista3D.encode(): images: expected [B, channels, D, H, W], got shape {tuple(images.shape)}"
            )
        shape = tuple(images.shape[2:])
        resampled = self._resampled(shape, spacing)
        grey = _resize(images.float().mean(1, keepdim=True), resampled)
        padding = [(-n) % f for n, f in zip(resampled, self.factor, strict=True)]
        grey = F.pad(self._scaled(grey), [n for extra in reversed(padding) for n in (0, extra)])
        bring(self.network, images.device)
        context, _ = autocast(self.precision, images.device)
        with context:
            features = [
                self.network.image_encoder(one[None], with_point=True, with_label=False)[0] for one in grey
            ]
        return FeatureState(features, shape, resampled)

    @torch.no_grad()
    def decode(self, state: FeatureState, prompts: PromptBatch, active: Any = None) -> Decoded:
        """Segment all rows asked for; each needs a click.

        Raises ValueError for prompts that do not fit the images, more classes than `classes` has numbers
        for, and a row without a click.
        """
        batch, f, _ = prompts.labels.shape
        self._check(state, prompts, active)
        device = state.features[0].device
        logits = torch.full((batch, f, *state.shape), _UNASKED, device=device)
        if active is None:
            active = torch.ones(batch, f, dtype=torch.bool)
        scale = [m / n for m, n in zip(state.resampled, state.shape, strict=True)]
        at = (prompts.points.to(device).double() + 0.5) * torch.tensor(scale, device=device) - 0.5
        moved = PromptBatch(state.resampled, at, prompts.labels.to(device))
        numbers = self.classes[:f] if self.classes else (_UNNAMED,) * f
        for b, sample in enumerate(moved.to_vista3d(numbers, self.special)):
            for rows, points, labels in _by_clicks(sample, active[b].to(device)):
                made = self.network.point_head(
                    state.features[b].float(), points, labels, class_vector=sample["prompt_class"][rows]
                )
                d, h, w = state.resampled
                inside = made[:, :, :d, :h, :w]
                logits[b, rows] = _resize(inside.float(), state.shape)[:, 0]
        return Decoded(logits, logits)

    def fingerprint(self) -> str:
        """Return what `encode` depends on besides the images, as text."""
        about = (self.window, self.resample_mm, self.precision, self.factor)
        version = importlib.import_module("monai").__version__
        return f"Vista3D {self._hash.of(self.network)} {about} {version}"

    def pack(self, state: FeatureState) -> list[tuple[Tensor, ...]]:
        """Return the features of each image."""
        return [(features,) for features in state.features]

    def unpack(
        self, samples: list[tuple[Tensor, ...]], images: Any, *, spacing: Sequence[float] | None = None
    ) -> FeatureState:
        """Return the state of images from what `pack` gave of each."""
        shape = tuple(images.shape[2:])
        return FeatureState([s[0] for s in samples], shape, self._resampled(shape, spacing))

    def _resampled(self, shape: tuple[int, ...], spacing: Sequence[float] | None) -> tuple[int, ...]:
        """The patch's shape on the network's spacing."""
        if self.resample_mm is None or spacing is None:
            return shape
        sides = zip(shape, spacing, strict=True)
        return tuple(max(1, round(n * s / self.resample_mm)) for n, s in sides)

    def _scaled(self, grey: Tensor) -> Tensor:
        """[B, 1, *S] to 0 .. 1."""
        if self.window is not None:
            low = torch.tensor(self.window[0], device=grey.device).expand(len(grey))
            high = torch.tensor(self.window[1], device=grey.device).expand(len(grey))
        else:
            flat, count = grey.flatten(1), grey[0].numel()  # torch.quantile takes 2^24 numbers at most
            low = flat.kthvalue(1 + round(0.01 * (count - 1)), dim=1).values
            high = flat.kthvalue(1 + round(0.99 * (count - 1)), dim=1).values
        extent = (high - low).clamp_min(1e-8)  # a constant image becomes 0
        return ((grey - low[:, None, None, None, None]) / extent[:, None, None, None, None]).clamp(0, 1)

    def _check(self, state: FeatureState, batch: PromptBatch, active: Any) -> None:
        who = "Vista3D.decode(): "
        n, f, _ = batch.labels.shape
        if batch.shape != state.shape or n != len(state.features):
            raise ValueError(
                f"{who}prompts: expected {len(state.features)} samples of the images' shape {state.shape}, "
                f"got {n} of {batch.shape}"
            )
        for name in ("boxes", "mask_logits"):
            if getattr(batch, name) is not None:
                raise ValueError(
                    f"{who}prompts.{name}: expected None, as VISTA3D takes clicks alone, got some"
                )
        if self.classes is not None and f > len(self.classes):
            raise ValueError(f"{who}prompts: expected {len(self.classes)} classes at most, got {f}")
        asked = torch.ones(n, f, dtype=torch.bool) if active is None else active.cpu()
        if tuple(asked.shape) != (n, f):
            raise ValueError(f"{who}active: expected shape {(n, f)}, got {tuple(asked.shape)}")
        silent = asked & ~(batch.labels.cpu() >= 0).any(2)
        if bool(silent.any()):
            b, c = silent.nonzero()[0].tolist()
            raise ValueError(
                f"{who}prompts: expected a click for every row, got none for sample {b}, class {c + 1}"
            )


def _by_clicks(sample: dict[str, Any], active: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(rows, points, labels) of the rows asked for, by their number of clicks, without padding."""
    labels, points = sample["point_labels"], sample["point_coords"]
    order = (labels < 0).to(torch.uint8).argsort(dim=1, stable=True)
    labels = labels.gather(1, order)
    points = points.gather(1, order[..., None].expand_as(points))
    clicks = (labels >= 0).sum(1)
    for k in torch.unique(clicks[active]).tolist():
        rows = (active & (clicks == k)).nonzero()[:, 0]
        yield rows, points[rows, :k], labels[rows, :k]


def _resize(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(x.shape[2:]) == tuple(shape):
        return x
    return F.interpolate(x, shape, mode="trilinear", align_corners=False)


def _monai() -> Any:
    try:
        return importlib.import_module("monai.networks.nets.vista3d")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "monai":
            raise
        raise ImportError(
            "Vista3D(): needs MONAI 1.4 or newer, which is not installed: pip install 'semisam[train]'"
        ) from None
