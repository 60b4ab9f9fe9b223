# SPDX-License-Identifier: Apache-2.0
"""SAM, SAM 2, the tracker of SAM 3 and MedSAM as generalists, through Hugging Face transformers."""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from semisam import ops, prompts, weights
from semisam.fetch import Weights
from semisam.generalists import sam_names
from semisam.generalists._ranks import at_shares
from semisam.generalists.cache import WeightsHash
from semisam.generalists.precision import autocast, bring, check_precision
from semisam.generalists.protocol import Decoded, GeneralistSpec
from semisam.prompts import PromptBatch

__all__ = ["MedSam", "Sam", "Sam2", "Sam3", "SquareState"]

_UNASKED = -10.0  # the logit of rows that were not asked for
_DARK, _BRIGHT = 0.005, 0.995  # shares of an image's values that become black and white
_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")
_READ = r"^config\.json$|\.safetensors$|^pytorch_model.*\.bin$"
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class SquareState:
    """What `Sam.encode` keeps of a batch of images: feature maps, coarsest last, and the images' shape."""

    features: tuple[Tensor, ...]  # [B, channels, h, w] each; one map for SAM, three for SAM 2 and 3
    shape: tuple[int, int]


class Sam:
    """SAM (Segment Anything): clicks, boxes and mask prompts on 2-D images, volumes slice by slice.

    `checkpoint` is a folder with config.json and safetensors as transformers saves them, or the name of a
    hub repository such as "facebook/sam-vit-base" (with `revision`) that is in the local cache already;
    nothing is downloaded unless `download`. It may also be SAM's own file (such as sam_vit_b_01ec64.pth), or
    for `MedSam` medsam_vit_b.pth. Nothing in these files is run. `model` is a transformers model
    of yours instead, such as a fine-tuned or a small one.

    Images: what lies in `window` (low, high) goes to black .. white and the rest is clipped; None: from the
    0.5th to the 99.5th percentile of each image. Three channels are red, green and blue, one is repeated, any
    other number is scaled channel by channel and averaged. Then the longest side is resized to the model's
    (1024), the pixels get the mean and deviation the model was trained with, and zeros fill the square.

    A volume is asked slice by slice along axis `slice_axis` (`SemiSAMTerm` does that): every slice in which
    the specialist sees a class is one image with prompts of its own. That costs one pass of the encoder per
    such slice, of 1024 x 1024 pixels for SAM whatever the patch, and one of the decoder per slice, class and
    round; a slice's features take 4 MiB (SAM 2: 16 MiB, SAM 3: 20 MiB) in float32 and half of that in half
    precision, until the step is over.

    `multimask`: of the three masks for ambiguous prompts take the one that the model rates best; by default
    its one mask for prompts that are clear. `precision` "float32", "bfloat16", "float16" or "auto"
    (`semisam.generalists.precision`) is that of the encoder and of the features; the decoder, which handles
    coordinates, runs in float32. `encode_batch` images and `decode_batch` rows are computed at once. The
    model follows the images' device. It is frozen: in evaluation mode, without gradient.

    On a GPU the term's questions about images make nobody wait: all rows are decoded, and those that were not
    asked for are covered. Questions about volumes do: the host has to know which slices show a class, for
    asking all of them would cost a pass of the encoder each, and in each round which rows are asked for, as
    most classes are in few slices. So do prompts of other callers, unless they are `unpadded`: the model
    cannot hide a row's padding, and rows are decoded by their number of clicks.

    Raises ValueError for files that do not fit (with what differs) and settings out of range, OSError for
    weights that are not there, ImportError without transformers (`pip install 'semisam[hf]'`). Paper:
    Kirillov et al., Segment Anything (arXiv 2304.02643).

    >>> from semisam.generalists.hf_sam import Sam
    >>> Sam.spec.name, sorted(Sam.spec.prompts), Sam.spec.spatial_dims
    ('sam', ['box', 'mask', 'points'], (2,))
    >>> from semisam import SemiSAMTerm
    >>> term = SemiSAMTerm(Sam("facebook/sam-vit-base"), total_steps=6000)  # doctest: +SKIP
    """

    spec = GeneralistSpec(
        "sam",
        spatial_dims=(2,),
        prompts=frozenset({"points", "mask", "box"}),
        mask_size=(256, 256),
        input_size=(1024, 1024),
        licence="Apache-2.0",
        training_sets=("SA-1B (natural images)",),
        paper="arXiv 2304.02643",
        slice_axis=0,
        packages=("torch", "transformers"),
        extra="hf",
        weights=Weights(
            "facebook/sam-vit-base", snapshot=True, page="https://huggingface.co/facebook/sam-vit-base"
        ),
        training_list="published",
        asynchronous=True,
    )
    model_class: ClassVar[str] = "SamModel"
    model_types: ClassVar[tuple[str, ...]] = ("sam",)
    repository: ClassVar[str] = "facebook/sam-vit-base"
    keep_aspect: ClassVar[bool] = True
    resampling: ClassVar[str] = "bilinear"
    normalisation: ClassVar[tuple[tuple[float, ...], tuple[float, ...]]] = _IMAGENET
    largest_logit: ClassVar[float] = float("inf")  # of the mask prompts of later rounds

    def __init__(
        self,
        checkpoint: str | os.PathLike[str] | None = None,
        *,
        model: Any = None,
        window: Sequence[float] | None = None,
        slice_axis: int = 0,
        multimask: bool = False,
        precision: str = "auto",
        encode_batch: int = 4,
        decode_batch: int = 16,
        download: bool = False,
        revision: str | None = None,
    ) -> None:
        """Load the weights once."""
        who = type(self).__name__
        if (checkpoint is None) == (model is None):
            what = "both" if model is not None else "neither"
            raise ValueError(
                f"{who}(): checkpoint: expected a folder or a hub repository such as {self.repository!r} (or "
                f"a model of yours instead), got {what}"
            )
        check_precision(precision, f"{who}()")
        if slice_axis not in (0, 1, 2):
            raise ValueError(f"{who}(): slice_axis: expected 0, 1 or 2, got {slice_axis!r}")
        for name, count in (("encode_batch", encode_batch), ("decode_batch", decode_batch)):
            if count < 1:
                raise ValueError(f"{who}(): {name}: expected at least 1, got {count}")
        if window is not None and (len(window) != 2 or not window[0] < window[1]):
            raise ValueError(f"{who}(): window: expected (low, high) with low < high, got {window}")
        self.files: tuple[Path, ...] = ()  # what the weights came from
        if checkpoint is not None:
            library = _transformers(self.model_class, who)
            if self.model_class == "SamModel" and Path(checkpoint).is_file():
                self.files = (Path(checkpoint),)
                model = _load_own(library, Path(checkpoint), who)
            else:
                folder = _folder(checkpoint, who, self.repository, download=download, revision=revision)
                model = _load(library, self.model_class, self.model_types, folder, who)
                self.files = tuple(sorted(f for f in folder.iterdir() if re.search(_READ, f.name)))
        found = type(model).__name__
        if found != self.model_class:
            raise ValueError(f"{who}(): model: expected a {self.model_class} of transformers, got {found}")
        self.model = model.eval().requires_grad_(False)
        self.window = None if window is None else (float(window[0]), float(window[1]))
        self.multimask, self.precision = multimask, precision
        self.encode_batch, self.decode_batch = encode_batch, decode_batch
        self._hash = WeightsHash()
        encoder = self.model.config.prompt_encoder_config
        self.side = _one_side(encoder.image_size)
        self.mask_side = 4 * (self.side // _one_side(encoder.patch_size))
        self.spec = replace(
            self.spec,
            mask_size=(self.mask_side,) * 2,
            input_size=(self.side,) * 2,
            slice_axis=slice_axis,
        )

    @torch.no_grad()
    def encode(self, images: Any, *, spacing: Sequence[float] | None = None) -> SquareState:
        """Prepare images [B, channels, H, W] and compute their features; `spacing` is not used.

        Raises TypeError for anything but a torch tensor, ValueError for another number of dimensions.
        """
        who = f"{type(self).__name__}.encode()"
        if not ops.is_torch(images):
            raise TypeError(f"{who}: images: expected a torch tensor, got {type(images).__name__}")
        if images.ndim != 4 or not images.shape[1]:
            raise ValueError(
                f"{who}: images: expected [B, channels, H, W], got shape {tuple(images.shape)}; volumes go "
                "slice by slice, as SemiSAMTerm does it"
            )
        if not len(images):
            raise ValueError(f"{who}: images: expected at least one, got none")
        bring(self.model, images.device)
        context, kind = autocast(self.precision, images.device)
        shape = (int(images.shape[2]), int(images.shape[3]))
        parts = []
        # On the CPU one by one, which is as fast there and rounds alike in every batch.
        for part in images.split(1 if images.device.type == "cpu" else self.encode_batch):
            pixels = self._pixels(part)
            with context, _at(images.device):
                maps = self.model.get_image_embeddings(pixels)
            parts.append([m.to(kind) for m in (maps if isinstance(maps, (list, tuple)) else [maps])])
        return SquareState(tuple(torch.cat(maps) for maps in zip(*parts, strict=True)), shape)

    @torch.no_grad()
    def decode(self, state: SquareState, prompts: PromptBatch, active: Any = None) -> Decoded:
        """Segment all rows that are asked for, in one batch per kind of prompts (up to `decode_batch` rows).

        A row's padding (label -1) is left out and a mask prompt of nothing but zeros says nothing, so that a
        row's answer does not depend on what else is in the batch. `low_res` are the decoder's logits, the
        next round's mask prompt.

        Raises ValueError for prompts that do not fit the images and for a row without any prompt; on a GPU,
        where prompts are `unpadded`, such a row's answer is NaN.
        """
        batch, classes, _ = prompts.labels.shape
        self._check(state, prompts, active)
        device, side = state.features[0].device, self.mask_side
        rows = torch.ones(batch * classes, dtype=torch.bool, device=device)
        if active is not None:
            rows = active.reshape(-1).to(rows)
        bring(self.model, device)
        down, across = self._to_patch(state.shape, device)
        if prompts.unpadded and ops.stays(device):
            low = self._all_rows(state, prompts)
            asked = rows[:, None, None]
            low, logits = (torch.where(asked, x, _UNASKED) for x in (low, down @ low @ across.T))
        else:
            low = torch.full((len(rows), side, side), _UNASKED, device=device)
            for index, sent in self._groups(prompts, rows, device):
                maps = [m[index // classes].float() for m in state.features]
                low[index] = self._answer(maps, sent)
            logits = torch.full((len(low), *state.shape), _UNASKED, device=device)
            logits[rows] = down @ low[rows] @ across.T
        low = low.clamp(-self.largest_logit, self.largest_logit)
        head = (batch, classes)
        return Decoded(logits.reshape(*head, *state.shape), low.reshape(*head, side, side))

    def mask_prompt(self, prob: Any, state: SquareState) -> Tensor:
        """Return the mask prompt [B, F, *mask_size] of probabilities [B, F, H, W] on the images' grid.

        They go where the image went, and are 0 around it; then cells are averaged (`prompts.mask_logits`).
        """
        side = (self.mask_side,) * 2
        down, across = self._to_prompt(state.shape, prob.device)
        square = down @ prob.float().flatten(0, 1) @ across.T
        made: Tensor = prompts.mask_logits(square, side)
        return made.reshape(*prob.shape[:2], *side)

    # ---- for caches

    def fingerprint(self) -> str:
        """Return what `encode` depends on besides the images, as text."""
        about = (
            self.side,
            self.window,
            self.precision,
            self.keep_aspect,
            self.resampling,
            self.normalisation,
        )
        config = self.model.config.to_json_string()
        version = importlib.import_module("transformers").__version__
        return f"{type(self).__qualname__} {self._hash.of(self.model)} {about} {config} {version}"

    def pack(self, state: SquareState) -> list[tuple[Tensor, ...]]:
        """Return the feature maps of each image."""
        return list(zip(*(torch.split(maps, 1) for maps in state.features), strict=True))

    def unpack(
        self, samples: list[tuple[Tensor, ...]], images: Any, *, spacing: Sequence[float] | None = None
    ) -> SquareState:
        """Return the state of images from what `pack` gave of each."""
        shape = (int(images.shape[2]), int(images.shape[3]))
        return SquareState(tuple(torch.cat(maps) for maps in zip(*samples, strict=True)), shape)

    # ---- images and the square

    def _resized(self, shape: Sequence[int]) -> tuple[int, int]:
        """What an image's shape becomes in the model's square."""
        if not self.keep_aspect:
            return self.side, self.side
        scale = self.side / max(shape)
        height, width = (max(1, int(n * scale + 0.5)) for n in shape)
        return height, width

    def _pixels(self, images: Tensor) -> Tensor:
        """Images [n, channels, H, W] as the model's input [n, 3, side, side]."""
        shown = _displayed(images.float(), self.window)
        size = self._resized(shown.shape[2:])
        if tuple(shown.shape[2:]) != size:
            shown = F.interpolate(shown, size, mode=self.resampling, align_corners=False, antialias=True)
        pixels = self._normalised(shown)
        return F.pad(pixels, (0, self.side - size[1], 0, self.side - size[0]))

    def _normalised(self, shown: Tensor) -> Tensor:
        numbers = [ops.numbers(v, torch.float32, shown.device)[:, None, None] for v in self.normalisation]
        normalised: Tensor = (shown - numbers[0]) / numbers[1]
        return normalised

    def _to_patch(self, shape: Sequence[int], device: torch.device) -> list[Tensor]:
        """Per axis, the matrix from the decoder's logits to the patch's.

        Up to the square, without its padding, to the patch's size, each time linearly between neighbours:
        every axis by itself, so that [n, mask_side] matrices do all of it and the square is never made.
        """
        cells = torch.eye(self.mask_side, device=device)[None]
        sizes = zip(shape, self._resized(shape), strict=True)
        return [_linear(_linear(cells, self.side)[..., :m], n)[0].T for n, m in sizes]

    def _to_prompt(self, shape: Sequence[int], device: torch.device) -> list[Tensor]:
        """Per axis, the matrix from the patch's probabilities to averages over the mask prompt's cells."""
        made = []
        for n, m in zip(shape, self._resized(shape), strict=True):
            square = F.pad(_linear(torch.eye(n, device=device)[None], m), (0, self.side - m))
            made.append(F.adaptive_avg_pool1d(square, self.mask_side)[0].T)
        return made

    # ---- prompts

    def _groups(
        self, batch: PromptBatch, rows: Tensor, device: torch.device
    ) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """(row numbers, keyword arguments of the model) of the rows asked for, by their kinds of prompts."""
        folded = batch.fold_classes()
        labels, masks = folded.labels[:, 0].to(device), folded.mask_logits
        # Clicks first, in their order, and padding behind them.
        order = (labels < 0).to(torch.uint8).argsort(dim=1, stable=True)
        labels = labels.gather(1, order)
        points = folded.points[:, 0].to(device)
        points = points.gather(1, order[..., None].expand_as(points))
        clicks = (labels >= 0).sum(1)
        drawn = torch.zeros_like(rows) if masks is None else (masks != 0).flatten(1).any(1).to(device)
        kinds = 2 * clicks + drawn
        for kind in torch.unique(kinds[rows]).tolist():
            k, with_mask = divmod(kind, 2)
            if not kind and folded.boxes is None:
                row = int((rows & (kinds == 0)).nonzero()[0])
                classes = batch.labels.shape[1]
                raise self._no_prompt(f"none for sample {row // classes}, class {row % classes + 1}")
            for index in (rows & (kinds == kind)).nonzero()[:, 0].split(self.decode_batch):
                own = PromptBatch(
                    batch.shape,
                    points[index, None, :k],
                    labels[index, None, :k],
                    None if folded.boxes is None else folded.boxes[index.to(folded.boxes.device)].to(device),
                    masks[index.to(masks.device)].to(device).float() if with_mask else None,
                )
                yield index, own.to_hf(self.side, keep_aspect=self.keep_aspect)

    def _no_prompt(self, got: str) -> ValueError:
        return ValueError(
            f"{type(self).__name__}.decode(): prompts: expected a click, a mask prompt or a box for "
            f"every row asked for, got {got}"
        )

    def _all_rows(self, state: SquareState, batch: PromptBatch) -> Tensor:
        """Logits [B * F, mask_side, mask_side] of all rows, whatever is asked for: no value is looked at."""
        device, classes = state.features[0].device, batch.labels.shape[1]
        folded = batch.fold_classes()
        masks = None if folded.mask_logits is None else folded.mask_logits.to(device).float()
        drawn = None if masks is None else (masks != 0).flatten(1).any(1)
        alone = not folded.labels.shape[2] and folded.boxes is None
        if alone and drawn is None:
            raise self._no_prompt("none at all")
        made = []
        for first in range(0, len(folded.labels), self.decode_batch):
            part = slice(first, first + self.decode_batch)
            own = PromptBatch(
                batch.shape,
                folded.points[part].to(device),
                folded.labels[part].to(device),
                None if folded.boxes is None else folded.boxes[part].to(device),
                None if masks is None else masks[part],
            )
            index = torch.arange(first, first + len(own.labels), device=device) // classes
            maps = [m[index].float() for m in state.features]
            sent = own.to_hf(self.side, keep_aspect=self.keep_aspect)
            made.append(self._answer(maps, sent, None if drawn is None else drawn[part]))
        low = torch.cat(made)
        return torch.where(drawn[:, None, None], low, torch.nan) if alone and drawn is not None else low

    def _answer(self, maps: list[Tensor], sent: dict[str, Any], drawn: Tensor | None = None) -> Tensor:
        """Logits [n, mask_side, mask_side] of n rows, one mask each; `drawn` [n]: has a mask prompt."""
        embeddings = maps if len(maps) > 1 else maps[0]
        with ExitStack() as stack:
            if ops.stays(maps[0].device):
                stack.enter_context(self._places_without_sums())
                stack.enter_context(_at(maps[0].device))
            if drawn is not None:
                stack.enter_context(_mask_prompts_of(self.model.prompt_encoder, drawn))
            out = self.model(image_embeddings=embeddings, multimask_output=self.multimask, **sent)
        masks: Tensor = out.pred_masks[:, 0].float()
        if masks.shape[1] == 1:
            return masks[:, 0]
        best = out.iou_scores[:, 0].argmax(1)
        return masks[torch.arange(len(masks), device=best.device), best]

    @contextmanager
    def _places_without_sums(self) -> Iterator[None]:
        """The codes of the image's places from numbers, not from sums over ones (`cumsum`).

        The same values; sums are refused on a GPU where torch is to be deterministic.
        """
        size = self.model.prompt_encoder.image_embedding_size
        code = self.model.shared_image_embedding
        like = code.positional_embedding
        down, across = ((torch.arange(n, device=like.device, dtype=like.dtype) + 0.5) / n for n in size)
        grid = torch.stack([across.expand(*size), down[:, None].expand(*size)], -1)
        places = code(grid).permute(2, 0, 1)[None]
        self.model.get_image_wide_positional_embeddings = lambda: places
        try:
            yield
        finally:
            del self.model.get_image_wide_positional_embeddings

    def _check(self, state: SquareState, batch: PromptBatch, active: Any) -> None:
        who = f"{type(self).__name__}.decode(): "
        n, classes, _ = batch.labels.shape
        if batch.shape != state.shape or n != len(state.features[0]):
            raise ValueError(
                f"{who}prompts: expected {len(state.features[0])} samples of the images' shape "
                f"{state.shape}, got {n} of {batch.shape}"
            )
        if active is not None and tuple(active.shape) != (n, classes):
            raise ValueError(f"{who}active: expected shape {(n, classes)}, got {tuple(active.shape)}")
        drawn, size = batch.mask_logits, (self.mask_side,) * 2
        if drawn is not None and tuple(drawn.shape[2:]) != size:
            raise ValueError(
                f"{who}prompts.mask_logits: expected size {size} (see mask_prompt), got "
                f"{tuple(drawn.shape[2:])}"
            )


class Sam2(Sam):
    """SAM 2 and 2.1 on single images; see `Sam`, whose settings it shares.

    Images are resized to the square without keeping their aspect. Where its one mask is unstable, the model
    itself takes the best of its other three.

    Paper: Ravi et al., SAM 2 (arXiv 2408.00714).

    >>> from semisam.generalists.hf_sam import Sam2
    >>> Sam2.spec.name, Sam2.repository
    ('sam2', 'facebook/sam2.1-hiera-tiny')
    """

    spec = replace(
        Sam.spec,
        name="sam2",
        training_sets=("SA-1B (natural images)", "SA-V (videos)"),
        paper="arXiv 2408.00714",
        weights=Weights(
            hub="facebook/sam2.1-hiera-tiny", page="https://huggingface.co/facebook/sam2.1-hiera-tiny"
        ),
    )
    model_class = "Sam2Model"
    model_types = ("sam2", "sam2_video")
    repository = "facebook/sam2.1-hiera-tiny"
    keep_aspect = False
    largest_logit = 32.0


class Sam3(Sam):
    """SAM 3's tracker, the part that takes clicks, on single images; see `Sam`, whose settings it shares.

    Images are resized to a square of 1008 pixels without keeping their aspect. The weights are those of the
    whole of SAM 3; its part that takes texts is left out.

    Paper: SAM 3: Segment Anything with Concepts (arXiv 2511.16719).

    >>> from semisam.generalists.hf_sam import Sam3
    >>> Sam3.spec.name, Sam3.spec.input_size
    ('sam3', (1008, 1008))
    """

    spec = replace(
        Sam.spec,
        name="sam3",
        mask_size=(288, 288),
        input_size=(1008, 1008),
        licence="SAM License (see its repository, which asks for consent)",
        training_sets=("SA-1B (natural images)", "SA-V (videos)", "SA-Co"),
        paper="arXiv 2511.16719",
        weights=Weights("facebook/sam3", snapshot=True, page="https://huggingface.co/facebook/sam3"),
    )
    model_class = "Sam3TrackerModel"
    model_types = ("sam3_tracker", "sam3_tracker_video", "sam3_video")
    repository = "facebook/sam3"
    keep_aspect = False
    normalisation = ((0.5,) * 3, (0.5,) * 3)
    largest_logit = 32.0


class MedSam(Sam):
    """MedSAM: SAM fine-tuned on medical images, which takes boxes alone; see `Sam`, whose settings it shares.

    Images are resized to the square without keeping their aspect (bicubic), then each image's minimum and
    maximum go to 0 and 1: no mean and deviation.

    Paper: Ma et al., Segment Anything in Medical Images (arXiv 2304.12306).

    >>> from semisam.generalists.hf_sam import MedSam
    >>> MedSam.spec.name, MedSam.spec.default_mode, sorted(MedSam.spec.prompts)
    ('medsam', 'box', ['box'])
    """

    spec = replace(
        Sam.spec,
        name="medsam",
        prompts=frozenset({"box"}),
        default_mode="box",
        training_sets=("1.57 million image-mask pairs of public medical data sets",),
        paper="arXiv 2304.12306",
        weights=Weights(
            "wanglab/medsam-vit-base", snapshot=True, page="https://huggingface.co/wanglab/medsam-vit-base"
        ),
        training_list="",
    )
    repository = "wanglab/medsam-vit-base"
    keep_aspect = False
    resampling = "bicubic"

    def _normalised(self, shown: Tensor) -> Tensor:
        low, high = shown.flatten(1).aminmax(dim=1)
        extent = (high - low).clamp_min(1e-8)  # a constant image becomes 0
        return (shown - low[:, None, None, None]) / extent[:, None, None, None]

    def _check(self, state: SquareState, batch: PromptBatch, active: Any) -> None:
        super()._check(state, batch, active)
        clicks = batch.labels.shape[2] > 0 and (batch.unpadded or bool((batch.labels >= 0).any()))
        for name, given in (("points", clicks), ("mask_logits", batch.mask_logits is not None)):
            if given:
                raise ValueError(
                    f"MedSam.decode(): prompts.{name}: expected none, as MedSAM knows boxes alone, got some"
                )


# ---- images -------------------------------------------------------------------------------------


def _displayed(images: Tensor, window: tuple[float, float] | None) -> Tensor:
    """Images [n, channels, H, W] of any intensities as [n, 3, H, W] from 0 (black) to 1 (white)."""
    n, channels = images.shape[:2]
    if window is None:
        rows = images.reshape(n, -1) if channels == 3 else images.flatten(2).flatten(0, 1)
        low, high = at_shares(rows, (_DARK, _BRIGHT))
        flat = low == high  # few voxels differ from the rest: they matter
        least, most = rows.aminmax(dim=1)
        low, high = torch.where(flat, least, low), torch.where(flat, most, high)
        low, high = (v.reshape(n, -1, 1, 1) for v in (low, high))
    else:
        low, high = (torch.full((1, 1, 1, 1), v, device=images.device) for v in window)
    extent = torch.where(high > low, high - low, 1)
    shown = ((images - low) / extent).clamp(0, 1)
    if channels == 3:
        return shown
    return shown.mean(1, keepdim=True).expand(-1, 3, -1, -1)


def _at(device: torch.device) -> Any:
    """Where values stay: what a model makes without saying where, such as tables of places, is made there."""
    return device if ops.stays(device) else nullcontext()


@contextmanager
def _mask_prompts_of(encoder: Any, drawn: Tensor) -> Iterator[None]:
    """Rows [n] that are not `drawn` have no mask prompt for a model that knows all or none."""

    def hook(module: Any, _: Any, made: Any) -> Any:
        sparse, dense = made
        nothing = module.no_mask_embed.weight.reshape(1, -1, 1, 1)
        return sparse, torch.where(drawn.reshape(-1, 1, 1, 1), dense, nothing)

    handle = encoder.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _linear(signals: Tensor, size: int) -> Tensor:
    """Signals [1, n, length] resampled to [1, n, size], linearly between neighbours."""
    return F.interpolate(signals, size, mode="linear", align_corners=False)


def _one_side(size: Any) -> int:
    return int(size[0] if isinstance(size, (list, tuple)) else size)


# ---- weights ------------------------------------------------------------------------------------


def _transformers(model_class: str, who: str) -> Any:
    """The library, with the class in it: ImportError says what to install."""
    try:
        library = importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError(f"{who}() needs transformers: pip install 'semisam[hf]'") from None
    if not hasattr(library, model_class):
        raise ImportError(
            f"{who}() needs {model_class} of transformers, which version {library.__version__} does not "
            "have: pip install -U 'semisam[hf]'"
        )
    return library


def _folder(
    checkpoint: str | os.PathLike[str], who: str, example: str, *, download: bool, revision: str | None
) -> Path:
    """The local folder of a checkpoint: itself, or that of a hub repository in the cache."""
    path = Path(checkpoint)
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(
            f"{who}(): checkpoint: expected a folder with config.json and safetensors (or a hub repository "
            f"such as {example!r}), got the file {path}"
        )
    name = os.fspath(checkpoint)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise FileNotFoundError(f"{who}(): checkpoint: no folder {name}")
    hub = importlib.import_module("huggingface_hub")
    try:
        found = hub.snapshot_download(
            name, revision=revision, allow_patterns=list(_FILES), local_files_only=not download
        )
    except Exception as error:  # of many kinds: offline, unknown, gated, interrupted
        why = f"the download failed: {error}" if download else "and nothing is downloaded unasked"
        raise FileNotFoundError(
            f"{who}(): checkpoint: there is neither a folder {name} nor a repository of that name in the "
            f"local cache, {why}; `hf download {name}` fetches it, and so does download=True"
        ) from None
    return Path(found)


def _load(library: Any, model_class: str, model_types: tuple[str, ...], folder: Path, who: str) -> Any:
    """The model of a folder, in float32; ValueError says what of it does not fit."""
    _check_config(folder, model_types, who)
    safe = any(folder.glob("*.safetensors"))
    if not safe and not any(folder.glob("pytorch_model*.bin")):
        raise FileNotFoundError(f"{who}(): checkpoint: expected model.safetensors in {folder}, got none")
    try:
        with _quiet():
            model, info = getattr(library, model_class).from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=safe,
                weights_only=True,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except MemoryError:
        raise
    except Exception as error:  # damaged files fail in many ways
        raise ValueError(
            f"{who}(): checkpoint: expected the tensors of a {model_class}, got {folder} with damage or in "
            f"another format ({type(error).__name__})"
        ) from None
    _check_names(
        f"{who}(): checkpoint: expected the weights of a {model_class} as config.json describes it, got "
        f"{folder}",
        info["missing_keys"],
        info["unexpected_keys"],
        info["mismatched_keys"],
    )
    return model


def _load_own(library: Any, path: Path, who: str) -> Any:
    """The model of a file as SAM's authors publish it."""
    state = weights.read(path, who, name="checkpoint", rest=True)
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    expected = f"{who}(): checkpoint: expected a folder, or a file as SAM's authors publish it, got {path}"
    try:
        parts = sam_names.architecture(state)
    except KeyError as error:
        raise ValueError(f"{expected} without {error.args[0]}") from None
    model = library.SamModel(library.SamConfig(**parts))
    own, state = model.state_dict(), sam_names.renamed(state)
    differ = [(n, v.shape, own[n].shape) for n, v in state.items() if n in own and v.shape != own[n].shape]
    _check_names(expected, own.keys() - state.keys(), state.keys() - own.keys(), differ)
    model.load_state_dict(state)
    return model


def _check_names(expected: str, missing: Any, unexpected: Any, differ: Any) -> None:
    """Raise ValueError if there are any such names; `differ` has (name, shape, expected shape)."""
    shapes = [f"{n} {tuple(found)}, expected {tuple(wanted)}" for n, found, wanted in sorted(differ)]
    kinds = {"missing": sorted(missing), "unexpected": sorted(unexpected), "of another shape": shapes}
    if any(kinds.values()):
        what = "; ".join(f"{kind}: {_first(names)}" for kind, names in kinds.items() if names)
        raise ValueError(f"{expected}: {what}")


def _check_config(folder: Path, model_types: tuple[str, ...], who: str) -> None:
    path = folder / "config.json"
    wanted = " or ".join(model_types)
    if not path.exists():
        raise FileNotFoundError(
            f"{who}(): checkpoint: expected config.json (model_type {wanted}) in {folder}, got none"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{who}(): checkpoint: expected JSON in {path}, got {error}") from None
    found = config.get("model_type") if isinstance(config, dict) else None
    if found not in model_types:
        raise ValueError(f"{who}(): checkpoint: expected model_type {wanted} in {path}, got {found!r}")


def _first(names: list[str], count: int = 4) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's reports and progress bars: what is wrong is said here."""
    logging = importlib.import_module("transformers.utils.logging")
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
