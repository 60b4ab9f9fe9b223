# SPDX-License-Identifier: Apache-2.0
"""Any function `(images, prompts) -> logits` as a generalist."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from semisam import ops
from semisam import prompts as prompting
from semisam.generalists.protocol import Decoded, GeneralistSpec
from semisam.prompts import PromptBatch

__all__ = ["CallableGeneralist"]

_UNASKED = -10.0  # the logit of rows that were not asked for
_MODES = {"mixed": {"points", "mask"}, "mask": {"mask"}, "unc": {"points"}, "box": {"box"}}


class CallableGeneralist:
    """A function of images and prompts as a generalist; the term wraps what is handed to it by this.

    `function(images, prompts)` gets images [B, channels, *S] and a `PromptBatch` of F classes (see its
    converters for other models' coordinates), and returns logits [B, F, *S], a torch tensor or a NumPy
    array; probability = sigmoid. It is called once per round, without gradient, for all samples and classes;
    what it says to rows that were not asked for is not used.

    The rest is what `GeneralistSpec` says of it: `name` (default: the function's own), `spatial_dims`,
    `prompts`, any of "points", "mask", "box"; `mask_size`, the resolution of its mask prompt (None: that of
    the patch); `default_mode` (None: "mixed", or what its prompts allow); `max_classes`; `slice_axis`, if
    a 2-D model shall be asked about volumes slice by slice; `licence`, `training_sets`; `asynchronous`, if
    it looks at no value of its tensors.

    >>> import torch
    >>> from semisam.generalists.callable import CallableGeneralist
    >>> from semisam.prompts import PromptBatch
    >>> def bright(images, prompts):
    ...     return (8 * (images - 0.5)).expand(-1, prompts.labels.shape[1], -1, -1)
    >>> model = CallableGeneralist(bright)
    >>> state = model.encode(torch.rand(2, 1, 16, 16))
    >>> model.decode(state, PromptBatch.empty(2, 3, (16, 16), torch.empty(0))).logits.shape
    torch.Size([2, 3, 16, 16])
    """

    def __init__(
        self,
        function: Callable[[Any, PromptBatch], Any],
        *,
        name: str | None = None,
        spatial_dims: Iterable[int] = (2, 3),
        prompts: Iterable[str] = ("points", "mask", "box"),
        mask_size: Sequence[int] | None = None,
        default_mode: str | None = None,
        max_classes: int | None = None,
        slice_axis: int | None = None,
        licence: str = "",
        training_sets: Iterable[str] = (),
        asynchronous: bool = False,
    ) -> None:
        """Describe the function; ValueError for prompts that do not exist, or none."""
        taken = frozenset(prompts)
        if not taken or not taken <= {"points", "mask", "box"}:
            raise ValueError(
                f"CallableGeneralist(): prompts: expected any of points, mask, box, got {sorted(taken)}"
            )
        self.function = function
        own = getattr(function, "__name__", None) or type(function).__name__
        self.spec = GeneralistSpec(
            name or own,
            spatial_dims=tuple(spatial_dims),
            prompts=taken,
            mask_size=None if mask_size is None else tuple(mask_size),
            default_mode=default_mode or next(mode for mode, needs in _MODES.items() if needs <= taken),
            licence=licence,
            training_sets=tuple(training_sets),
            max_classes=max_classes,
            slice_axis=slice_axis,
            asynchronous=asynchronous,
        )

    def encode(self, images: Any, *, spacing: Sequence[float] | None = None) -> Any:
        """Return the images: the function sees them in every round."""
        return images

    @torch.no_grad()
    def decode(self, state: Any, prompts: PromptBatch, active: Any = None) -> Decoded:
        """Call the function. A result of another shape is returned as it is, for the caller to judge.

        Raises TypeError for a result that is no array.
        """
        made = self.function(state, prompts)
        try:
            given = made if ops.is_torch(made) else torch.as_tensor(made)
            logits = given.to(state.device).float()
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(
                f"{self.spec.name}(): expected logits, a torch tensor or NumPy array, got "
                f"{type(made).__name__}"
            ) from None
        if tuple(logits.shape) != (*prompts.labels.shape[:2], *prompts.shape):
            return Decoded(logits, logits)
        if active is not None:
            asked = active.to(logits.device).reshape(*active.shape, *(1,) * len(prompts.shape))
            logits = torch.where(asked, logits, _UNASKED)
        if self.spec.mask_size is None:
            return Decoded(logits, logits)
        prob = logits.nan_to_num(_UNASKED).sigmoid().flatten(0, 1)
        low = prompting.mask_logits(prob, self.spec.mask_size)
        return Decoded(logits, low.reshape(*logits.shape[:2], *self.spec.mask_size))
