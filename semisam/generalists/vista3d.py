# SPDX-License-Identifier: Apache-2.0
"""VISTA3D, MONAI's network for organs and tumours in CT, as a generalist that takes clicks."""

from __future__ import annotations

import importlib
import os
import sys
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
from semisam.generalists._ranks import at_shares
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

    On a GPU the host waits once in each round: to know which rows are asked for, and how many clicks they
    have. With `asynchronous` the term waits for nothing (`GeneralistSpec`): every class of every patch goes
    through the head then, whether the specialist sees it there or not. One row of 128^3 voxels costs there
    more than a wait does, so that it pays where nearly all are asked for, as with a single class.

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
        asynchronous: bool = False,
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
        monai = sys.modules.get("monai.networks.nets.vista3d")  # who has such a network has loaded it
        self._knows_head = type(self.network.point_head) is getattr(monai, "PointMappingSAM", None)
        if asynchronous and not self._knows_head:
            found = type(self.network.point_head).__name__
            raise ValueError(
                f"{who}: asynchronous: expected a network with MONAI's PointMappingSAM, got {found}"
            )
        most = None if self.classes is None else len(self.classes)
        self.spec = replace(self.spec, max_classes=most, asynchronous=bool(asynchronous))

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
        batch, f, k = prompts.labels.shape
        self._check(state, prompts, active)
        device = state.features[0].device
        logits = torch.full((batch, f, *state.shape), _UNASKED, device=device)
        numbers = self.classes[:f] if self.classes else (_UNNAMED,) * f
        quiet = self.spec.asynchronous and prompts.unpadded and ops.stays(device)
        clicks = [[k] * f] * batch if quiet else self._clicks(prompts, active)
        scale = ops.numbers(
            [m / n for m, n in zip(state.resampled, state.shape, strict=True)], torch.float32, device
        )
        at = (prompts.points.to(device).double() + 0.5) * scale - 0.5
        moved = PromptBatch(state.resampled, at, prompts.labels.to(device))
        for b, sample in enumerate(moved.to_vista3d(numbers, self.special)):
            points, labels = _clicks_first(sample)
            for rows, count in _by_clicks(clicks[b]):
                own = [torch.stack([array[row, :count] for row in rows]) for array in (points, labels)]
                made = self._head(state.features[b].float(), own[0], own[1], [numbers[r] for r in rows])
                d, h, w = state.resampled
                answers = _resize(made[:, :, :d, :h, :w].float(), state.shape)
                for row, answer in zip(rows, answers, strict=True):
                    logits[b, row] = answer[0]
        if quiet and active is not None:
            logits = torch.where(active.to(device)[:, :, None, None, None], logits, _UNASKED)
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
            low, high = (torch.full((len(grey),), v, device=grey.device) for v in self.window)
        else:
            low, high = at_shares(grey.flatten(1), (0.01, 0.99))
        extent = (high - low).clamp_min(1e-8)  # a constant image becomes 0
        return ((grey - low[:, None, None, None, None]) / extent[:, None, None, None, None]).clamp(0, 1)

    def _check(self, state: FeatureState, batch: PromptBatch, active: Any) -> None:
        who = "Vista3D.decode(): "
        n, f, k = batch.labels.shape
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
        if active is not None and tuple(active.shape) != (n, f):
            raise ValueError(f"{who}active: expected shape {(n, f)}, got {tuple(active.shape)}")
        if not k:
            raise ValueError(f"{who}prompts: expected a click for every row, got none at all")

    def _clicks(self, batch: PromptBatch, active: Any) -> list[list[int]]:
        """How many clicks every row has, -1 if it is not asked for: what a round looks at, all at once."""
        clicks = (batch.labels >= 0).sum(2)
        if active is not None:
            clicks = torch.where(active.to(clicks.device), clicks, -1)
        found: list[list[int]] = clicks.tolist()
        for b, counts in enumerate(found):
            if 0 in counts:
                raise ValueError(
                    f"Vista3D.decode(): prompts: expected a click for every row, got none for sample {b}, "
                    f"class {counts.index(0) + 1}"
                )
        return found

    def _head(self, features: Tensor, points: Tensor, labels: Tensor, numbers: Sequence[int]) -> Tensor:
        """Logits [n, 1, *padded] of rows with clicks [n, k] on one image."""
        head = self.network.point_head
        if ops.stays(features.device) and self._knows_head:
            return _logits(head, features, points, labels, numbers)
        vector = torch.tensor(numbers)[:, None]  # the head only compares them one by one
        made: Tensor = head(features, points, labels, class_vector=vector)
        return made


def _by_clicks(counts: Sequence[int]) -> Iterator[tuple[list[int], int]]:
    """(rows, number of clicks) of the rows asked for."""
    for k in sorted(set(counts) - {-1}):
        yield [row for row, count in enumerate(counts) if count == k], k


def _clicks_first(sample: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Points and labels of all rows, clicks in their order, and padding behind them."""
    labels, points = sample["point_labels"], sample["point_coords"]
    order = (labels < 0).to(torch.uint8).argsort(dim=1, stable=True)
    return points.gather(1, order[..., None].expand_as(points)), labels.gather(1, order)


def _logits(head: Any, features: Tensor, points: Tensor, labels: Tensor, numbers: Sequence[int]) -> Tensor:
    """What MONAI's `PointMappingSAM` answers, by masks and without sums (`cumsum`).

    It picks the clicks of each label out, compares class numbers one by one and gives torch's spare memory
    back to the GPU: for each the host waits, and for the memory torch asks anew. Deterministic torch refuses
    its sums over ones, from which it makes the places of voxels.
    """
    low = head.feat_downsample(features)
    code = head.pe_layer.forward_with_coords
    negative, positive = (embedding.weight for embedding in head.point_embeddings)
    special = head.special_class_embed.weight
    kinds = torch.cat([negative, positive, negative + special, positive + special])  # labels 0, 1, 2, 3
    clicks = code(points + 0.5, tuple(features.shape[2:])) + kinds[labels.clamp_min(0)]
    clicks = torch.where(labels[..., None] < 0, head.not_a_point_embed.weight, clicks)
    named = [head.zeroshot_embed if n > head.last_supported else head.supported_embed for n in numbers]
    output = head.mask_tokens.weight.expand(len(points), 1, -1)
    tokens = torch.cat([output, clicks, torch.stack([embedding.weight for embedding in named])], 1)
    size = tuple(low.shape[2:])
    axes = [torch.arange(n, device=low.device) + 0.5 for n in size]
    places = code(torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(1, -1, 3), size)
    places = places.mT.reshape(1, -1, *size)
    made = []
    for part in torch.split(tokens, head.max_prompt):
        shown, where = (x.expand(len(part), *x.shape[1:]) for x in (low, places))
        answers, shown = head.transformer(shown, where, part)
        factors = head.output_hypernetworks_mlps(answers[:, :1])
        fine = head.output_upscaling(shown.mT.reshape(len(part), -1, *size))
        made.append((factors @ fine.flatten(2)).reshape(len(part), 1, *fine.shape[2:]))
    return torch.cat(made)


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
