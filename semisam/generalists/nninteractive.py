# SPDX-License-Identifier: Apache-2.0
"""nnInteractive, the open-set segmenter of 3-D scans, as a generalist through its own package."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from semisam import ops
from semisam.fetch import Weights
from semisam.generalists import licences
from semisam.generalists.protocol import Decoded, GeneralistSpec
from semisam.prompts import PromptBatch

__all__ = ["NnInteractive", "ScanState"]

_UNASKED = -10.0  # the logit of rows that were not asked for
_FOLDER = "nnInteractive_v1.0"


@dataclass(frozen=True)
class ScanState:
    """What `NnInteractive.encode` keeps of a batch of images: itself, as the package wants it."""

    images: list[np.ndarray[Any, Any]]  # [1, *S] float32
    device: torch.device  # where the answers go


class NnInteractive:
    """nnInteractive on volumes: the mask prompt as its initial segmentation, clicks as its points.

    `checkpoint` is the folder of a trained model, as published (nnInteractive_v1.0); the package reads it
    itself, so give only files that you trust. `session` is an `nnInteractiveInferenceSession` of yours with
    a model instead. `device` "auto", "cpu" or "cuda" is where it runs; `autozoom` lets it look at larger
    surroundings of large objects.

    It answers with masks: logits of +-`sure`. It takes one image and one object at a time: a round costs one
    prediction per sample and class. Several channels are averaged. Its boxes are those of single slices,
    so that the box of a volume has no use here.

    Written for the interface that its documentation shows (versions 1 and 2), and tested with a stand-in of
    that interface: the package itself was not run here. Its code is Apache-2.0, its published weights are
    for non-commercial use (CC BY-NC-SA 4.0), which is said once on standard error.

    Raises ImportError without the package (`pip install nninteractive`), ValueError for a folder that is
    none. Paper: Isensee, Rokuss, Krämer et al., nnInteractive (arXiv 2503.08373).

    >>> from semisam.generalists.nninteractive import NnInteractive
    >>> NnInteractive.spec.name, sorted(NnInteractive.spec.prompts)
    ('nninteractive', ['mask', 'points'])
    """

    spec = GeneralistSpec(
        "nninteractive",
        spatial_dims=(3,),
        prompts=frozenset({"points", "mask"}),
        licence="CC BY-NC-SA 4.0: not for commercial use (weights); Apache-2.0 (code)",
        training_sets=("more than 120 volumetric data sets (CT, MRI, PET, 3-D microscopy)",),
        paper="arXiv 2503.08373",
        packages=("torch", "nnInteractive"),
        weights=Weights(
            hub="nnInteractive/nnInteractive",
            files=(
                f"{_FOLDER}/dataset.json",
                f"{_FOLDER}/plans.json",
                f"{_FOLDER}/inference_session_class.json",
                f"{_FOLDER}/fold_0/checkpoint_final.pth",
            ),
            load=_FOLDER,
            page="https://huggingface.co/nnInteractive/nnInteractive",
        ),
    )

    def __init__(
        self,
        checkpoint: str | os.PathLike[str] | None = None,
        *,
        session: Any = None,
        device: str = "auto",
        autozoom: bool = True,
        sure: float = 4.0,
    ) -> None:
        """Load the model once."""
        who = "NnInteractive()"
        if (checkpoint is None) == (session is None):
            what = "both" if session is not None else "neither"
            raise ValueError(
                f"{who}: checkpoint: expected the folder of a trained model of nninteractive (or a session "
                f"of yours instead), got {what}"
            )
        if not 0 < sure < float("inf"):
            raise ValueError(f"{who}: sure: expected a positive number, got {sure}")
        self.files: tuple[Path, ...] = ()
        if checkpoint is not None:
            folder = Path(checkpoint)
            if not (folder / "dataset.json").is_file():
                raise ValueError(
                    f"{who}: checkpoint: expected the folder of a trained model, with dataset.json in it, "
                    f"got {folder}"
                )
            self.files = tuple(sorted(p for p in folder.rglob("*") if p.is_file()))
            session = _session(device, autozoom)
            session.initialize_from_trained_model_folder(str(folder))
            licences.tell(self.spec)
        self.session, self.sure = session, float(sure)

    @torch.no_grad()
    def encode(self, images: Any, *, spacing: Sequence[float] | None = None) -> ScanState:
        """Keep images [B, channels, D, H, W]: the package prepares each when it comes to it, spacing unused.

        Raises TypeError for anything but a torch tensor, ValueError for another number of dimensions.
        """
        who = "NnInteractive.encode()"
        if not ops.is_torch(images):
            raise TypeError(f"{who}: images: expected a torch tensor, got {type(images).__name__}")
        if images.ndim != 5 or not images.shape[1]:
            raise ValueError(
                f"{who}: images: expected [B, channels, D, H, W], got shape {tuple(images.shape)}"
            )
        grey = images.float().mean(1, keepdim=True).cpu().numpy()
        return ScanState([np.ascontiguousarray(one) for one in grey], images.device)

    @torch.no_grad()
    def decode(self, state: ScanState, prompts: PromptBatch, active: Any = None) -> Decoded:
        """Segment all rows asked for, one after the other; a mask prompt is where its logits are above 0.

        Raises ValueError for prompts that do not fit the images and for a row without any prompt.
        """
        self._check(state, prompts, active)
        batch, f, _ = prompts.labels.shape
        asked = torch.ones(batch, f, dtype=torch.bool) if active is None else active.cpu()
        points, labels = prompts.points.cpu().tolist(), prompts.labels.cpu().tolist()
        masks = None if prompts.mask_logits is None else (prompts.mask_logits > 0).cpu().numpy()
        logits = torch.full((batch, f, *prompts.shape), _UNASKED)
        for b in asked.any(1).nonzero()[:, 0].tolist():
            self.session.set_image(state.images[b])
            for c in asked[b].nonzero()[:, 0].tolist():
                clicks = [
                    (tuple(int(i) for i in point), label == 1)
                    for point, label in zip(points[b][c], labels[b][c], strict=True)
                    if label >= 0
                ]
                mask = None if masks is None or not masks[b, c].any() else masks[b, c].astype(np.uint8)
                if not clicks and mask is None:
                    raise ValueError(
                        "NnInteractive.decode(): prompts: expected a click or a mask for every row, got none "
                        f"for sample {b}, class {c + 1}"
                    )
                logits[b, c] = torch.where(self._segment(mask, clicks, prompts.shape), self.sure, -self.sure)
        answer = logits.to(state.device)
        return Decoded(answer, answer)

    def _segment(
        self, mask: Any, clicks: list[tuple[tuple[int, ...], bool]], shape: tuple[int, ...]
    ) -> Tensor:
        """One object of the image that the session has; only the last of its prompts is predicted from."""
        found = torch.zeros(shape, dtype=torch.uint8)
        self.session.set_target_buffer(found)
        self.session.reset_interactions()
        if mask is not None:
            self.session.add_initial_seg_interaction(mask, run_prediction=not clicks)
        for i, (point, positive) in enumerate(clicks, 1):
            self.session.add_point_interaction(
                point, include_interaction=positive, run_prediction=i == len(clicks)
            )
        return found > 0

    def _check(self, state: ScanState, batch: PromptBatch, active: Any) -> None:
        who = "NnInteractive.decode(): "
        n, f, _ = batch.labels.shape
        shape = tuple(state.images[0].shape[1:]) if state.images else batch.shape
        if batch.shape != shape or n != len(state.images):
            raise ValueError(
                f"{who}prompts: expected {len(state.images)} samples of the images' shape {shape}, got {n} "
                f"of {batch.shape}"
            )
        if batch.boxes is not None:
            raise ValueError(
                f"{who}prompts.boxes: expected None, as its boxes are of single slices, got boxes"
            )
        drawn = batch.mask_logits
        if drawn is not None and tuple(drawn.shape[2:]) != shape:
            raise ValueError(
                f"{who}prompts.mask_logits: expected the images' shape {shape}, got {tuple(drawn.shape[2:])}"
            )
        if active is not None and tuple(active.shape) != (n, f):
            raise ValueError(f"{who}active: expected shape {(n, f)}, got {tuple(active.shape)}")


def _session(device: str, autozoom: bool) -> Any:
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"NnInteractive(): device: expected auto, cpu, cuda, got {device!r}")
    try:
        module = importlib.import_module("nnInteractive.inference.inference_session")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "nnInteractive":
            raise
        raise ImportError(
            "NnInteractive(): needs the package nnInteractive, which is not installed: pip install "
            "nninteractive"
        ) from None
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    # Keywords that versions 1 and 2 share; the number of torch's threads stays what it is.
    return module.nnInteractiveInferenceSession(
        device=torch.device(device),
        use_torch_compile=False,
        verbose=False,
        torch_n_threads=torch.get_num_threads(),
        do_autozoom=autozoom,
    )
