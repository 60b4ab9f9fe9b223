# SPDX-License-Identifier: Apache-2.0
"""What a promptable model must offer to teach a specialist: encode once, decode for many prompts.

A generalist is any object with `spec`, `encode` and `decode`; it needs no base class. Everything it
returns is without gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

from semisam.fetch import Weights
from semisam.prompts import PromptBatch

__all__ = ["Decoded", "Generalist", "GeneralistSpec"]


@dataclass(frozen=True)
class GeneralistSpec:
    """What a generalist is, takes and may be used for.

    `prompts` is a subset of "points", "mask", "box". `mask_size` is the resolution of its mask prompt,
    None for that of the patch; `input_size` the size that images are brought to, None for any; `spacing`
    (mm) what it was trained on, None for any. `default_mode` is the term's prompt mode for it.
    `max_classes` is how many foreground classes it can be asked for at once, None for any. A 2-D model with a
    `slice_axis` is asked about volumes, too, slice by slice along that axis.

    `packages` are the modules that it imports when it is built, `extra` the pip extra of semisam that brings
    them; `weights` where its weights are published, None if it has none. `training_sets` is for people;
    `overlaps` says of names of `semisam.generalists.benchmarks.BENCHMARKS` how they were part of its training
    ("related: ..." of scans of another name that may be in part the same), and `training_list` what is known
    of the others: "none" (it was not trained), "published" (there is a list without them), "" (not stated).

    `asynchronous` is a promise about images on a GPU: `encode`, `mask_prompt`, and `decode` of prompts that
    are `unpadded`, look at no value of a tensor and copy nothing from the host, so that the host need not
    wait. The term then asks for every round without knowing what came of the last one: `active` may have no
    row at all. The host waits nevertheless for slices of volumes, as it has to know which of them show a
    class, for each costs a pass of the encoder, and with a cache of states, which knows images by their
    values.

    >>> from semisam.generalists.protocol import GeneralistSpec
    >>> GeneralistSpec("mine", spatial_dims=(3,), prompts=frozenset({"points"})).mask_size is None
    True
    """

    name: str
    spatial_dims: tuple[int, ...]
    prompts: frozenset[str]
    mask_size: tuple[int, ...] | None = None
    input_size: tuple[int, ...] | None = None
    spacing: tuple[float, ...] | None = None
    default_mode: str = "mixed"
    licence: str = ""
    training_sets: tuple[str, ...] = ()
    paper: str = ""
    max_classes: int | None = None
    slice_axis: int | None = None
    packages: tuple[str, ...] = ()
    extra: str = ""
    weights: Weights | None = None
    overlaps: Mapping[str, str] = field(default_factory=dict, hash=False)
    training_list: str = ""
    asynchronous: bool = False


class Decoded(NamedTuple):
    """A generalist's answer to one round of prompts; rows that were not asked for hold -10."""

    logits: Any  # [B, F, *S] float32, the patch's grid; probability = sigmoid
    low_res: Any  # [B, F, *mask_size] float32: the mask prompt of the next round
    info: Any = None  # numbers for the log, {name: number}; the term adds those of one call up


@runtime_checkable
class Generalist(Protocol):
    """A promptable segmentation model.

    A model whose mask input does not lie in the patch's frame (padded, cropped or turned) has one method
    more, `mask_prompt(prob, state)`: probabilities [B, F, *S] to logits [B, F, *mask_size] of that input, for
    the images of `state`. Without it they are `semisam.prompts.mask_logits` of that size.

    A model whose states can be kept for images that come again (`semisam.generalists.cache`) has three
    methods more; one without them encodes every time:

    - `fingerprint()`: text that changes with whatever decides what `encode` makes of given images: the
      weights (`WeightsHash`) and settings;
    - `pack(state)`: a list with the tensors of each sample of a state, as a tuple;
    - `unpack(samples, images, *, spacing)`: the state of `images` from such tuples, one for each of them, on
      the images' device. Nothing is written to these tensors, neither here nor in `decode`.
    """

    spec: GeneralistSpec

    def encode(self, images: Any, *, spacing: Sequence[float] | None = None) -> Any:
        """Return the state of images [B, channels, *S] that any number of `decode` calls reuse.

        `spacing` in mm where it is known.
        """
        ...

    def decode(self, state: Any, prompts: PromptBatch, active: Any = None) -> Decoded:
        """Segment B samples x F classes, one-vs-rest, in one batch.

        `active` [B, F] (bool; default all) says which rows are asked for. A row without points
        (labels all -1, or K = 0) is asked by its mask prompt alone. NaN in a row's answer, or
        the same number in every voxel of it, says that the model has none: the term leaves that sample out.
        """
        ...
