# SPDX-License-Identifier: Apache-2.0
"""The plug-and-play term: promptable generalists teach a specialist on unlabeled images.

One call of `SemiSAMTerm` is, for the unlabeled samples of one training step,

    teacher's probability -> prompts -> generalists' answers -> fused pseudo-label, weights -> loss

where only the loss has a gradient, and only to the student's logits. No label of an unlabeled image has a
way in; labels enter `calibrate` and `score` alone, which judge and never teach.
"""

from __future__ import annotations

import difflib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from semisam import _fusing, fusion, generalists, metrics, ops, prompts, schedules
from semisam._dialogue import MODES, Answers, Request, Slot, joined, largest
from semisam.gate import LARGEST, MASK, Gate, doubt_of, largest_components, sets_of
from semisam.losses import uncertainty_weighted_loss

__all__ = ["MODES", "PRESETS", "Diagnostics", "LastCall", "SemiSAMTerm"]

PRESETS: dict[str, dict[str, Any]] = {
    "ref": {
        "mode": "point",
        "lam_sam": None,  # 0.1 for the modes with an uncertainty map, else 0.5
        "clicks": 10,
        "tau_p": 1.0,
        "target": "hard",
        "label_rounds": "last",
        "doubt_rounds": "all",
        "weight": None,  # exp for the modes with an uncertainty map, else none
        "kappa": 1.0,
        "teacher_share": 0.0,
        "tau_c": 0.0,
        "tau_u": 1.0,
        "reliability": False,
        "sample_gate": 0.0,
        "warmup": 0.0,
        "ramp": "falling",
    },
    "plus": {
        "mode": None,  # each generalist's own
        "lam_sam": 0.5,
        "clicks": 6,
        "tau_p": 0.5,
        "target": "soft",
        "label_rounds": "late",
        "doubt_rounds": "late",
        "weight": "exp",
        "kappa": 4.0,
        "teacher_share": 0.5,
        "tau_c": 0.7,
        "tau_u": 0.5,
        "reliability": True,
        "sample_gate": 0.1,
        "warmup": 0.05,
        "ramp": "falling",
    },
}
"""What None stands for in the arguments of `SemiSAMTerm`."""

_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("tau_p", "threshold", "p_min", "teacher_share", "tau_c", "tau_u"), (0, 1)),
    **dict.fromkeys(("sample_gate", "warmup", "min_weight"), (0, 1)),
    **dict.fromkeys(("lam_sam", "w0", "kappa", "box_margin"), (0, 1e6)),
    "clicks": (1, 64),
    "sam_every": (1, 2**32 - 1),
    "total_steps": (1, 2**32 - 1),
}
_WHOLE = ("clicks", "sam_every")
_CHOICES: dict[str, tuple[str, ...]] = {
    "click_memory": ("last", "all"),
    "target": ("soft", "hard"),
    "label_rounds": ("late", "last", "all"),
    "doubt_rounds": ("late", "last", "all"),
    "unc": ("var", "mi", "ent"),
    "weight": ("exp", "linear", "gate", "conf", "none"),
    "loss": ("mse", "ce", "ce_dice"),
    "ramp": schedules.SAM_RAMPS,
}

# Operators without which a device's tensors go to the CPU.
_OPERATORS = (
    *("specialist_targets", "answer_mask", "mask_logits", "next_click", "boxes", "keep_components"),
    *("fuse", "voxel_loss_forward", "voxel_loss_backward"),
)


class _Judged(NamedTuple):
    """What the candidates made of one labeled volume."""

    dice: dict[str, Any]  # by candidate: per foreground class
    means: list[Any]  # by generalist: mean of its rounds [1, C, *S], None without an answer
    label: Any  # [1, *S]

    def on_cpu(self) -> _Judged:
        """The same where there is room for what many volumes leave."""
        dice = {name: torch.as_tensor(values).cpu() for name, values in self.dice.items()}
        means = [None if mean is None else mean.cpu() for mean in self.means]
        return _Judged(dice, means, self.label.cpu())


class LastCall(NamedTuple):
    """What the last call made, for pictures; voxels of samples that were left out have weight 0."""

    image: Any  # [B, channels, *S]
    prob: Any  # [B, C, *S], what the prompts came from
    prompt_target: Any  # [B, F, *S], bool: what the generalists were asked for (None: labels from before)
    clicks: dict[str, prompts.PromptBatch]  # by source: all clicks of all rounds
    answers: dict[str, Any]  # by source: logits of its last round [B, F, *S]
    target: Any  # the pseudo-label: soft [B, C, *S] or hard [B, *S] (255: too uncertain)
    label: Any  # [B, *S], uint8
    weight: Any  # [B, *S], 0..1
    uncertainty: Any  # [B, *S], 0..1

    def picture(self, sample: int = 0) -> dict[str, Any]:
        """Return one sample as NumPy arrays: what a report shows.

        "image" [channels, *S], "prediction" and "target" [C, *S] (a hard target as its one-hot form),
        "weight" and "uncertainty" [*S], all float32; "clicks" [n, ndim + 1] int32, indices and 1 or 0.
        """
        target, classes = self.target[sample], self.prob.shape[1]
        if target.ndim == self.prob.ndim - 2:
            target = torch.stack([target == c for c in range(classes)])
        made = {"image": self.image, "prediction": self.prob, "weight": self.weight}
        made["uncertainty"] = self.uncertainty
        arrays = {name: array[sample] for name, array in made.items()} | {"target": target}
        rows = [
            torch.cat([batch.points[sample], batch.labels[sample, ..., None]], -1).flatten(0, 1)
            for batch in self.clicks.values()
        ]
        clicks = torch.cat(rows) if rows else torch.zeros(0, self.prob.ndim - 1)
        return {
            **{name: array.detach().float().cpu().numpy() for name, array in arrays.items()},
            "clicks": clicks[clicks[:, -1] >= 0].int().cpu().numpy(),
        }


class Diagnostics(Mapping[str, Any]):
    """Numbers of a call that nobody has waited for: plain Python values as they are read, which waits.

    After a replay of a captured CUDA graph they are those of the replay.

    >>> import torch
    >>> from semisam.term import Diagnostics
    >>> found = Diagnostics({"loss": torch.tensor(0.5), "rounds": {"g": torch.tensor([1, 2])}})
    >>> dict(found)
    {'loss': 0.5, 'rounds': {'g': [1, 2]}}
    """

    def __init__(self, values: dict[str, Any], check: Callable[[], None] = lambda: None) -> None:
        """Keep tensors and functions for later; `check` is called before any is read."""
        self._values, self._check = values, check

    def __getitem__(self, name: str) -> Any:
        """Return one value, None for a mean over nothing."""
        self._check()
        return _plain(self._values[name])

    def __setitem__(self, name: str, value: Any) -> None:
        """Note one more value."""
        self._values[name] = value

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._values)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._values)


def _plain(value: Any) -> Any:
    if callable(value):
        return value()
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    value = value.tolist() if ops.is_torch(value) else value
    return None if isinstance(value, float) and math.isnan(value) else value


class SemiSAMTerm:
    """L_sam: what promptable generalists say about unlabeled images, as a loss for the specialist.

        L = lam_sam w_sam(step) min(1, step / (warmup total_steps)) L_sam(student's logits; q, w)

    `generalist`: a name of `semisam.generalists`, a dotted path, a `Generalist`, a function `(images,
    prompts) -> logits` (`semisam.generalists.callable`), or a list of them; every one has its own clicks.
    `total_steps` is the length of the training. None stands for the value of the `preset`: "plus" (default)
    or "ref", which is the papers' intent without their defects.

    Prompts, from the teacher's probability of each foreground class (`semisam.prompts`): `mode` "point"
    (`clicks` rounds, last answer used), "unc" (all late answers used), "mask" (one round, mask prompt),
    "mixed" ("unc" with the mask prompt as round 0) or "box", for all or one per generalist; `rule` "ritm" or
    "random" (None: RITM in rounds 0 and 1, then random); `click_memory` "last" or "all" (always so where a
    generalist takes no mask prompt); `tau_p`, `threshold`, `p_min`, `prompt_lcc`: `specialist_targets`;
    `box`: give the target's box, too, enlarged by `box_margin`, to generalists that take one; `seed` with
    (step, sample id, class, round) decides every click.

    Pseudo-label (`semisam.fusion`): `target` "soft" or "hard", `label_rounds` and `doubt_rounds` "late",
    "last", "all"; `unc`, `weight`, `kappa`; `tau_c`, `tau_u` for hard targets (and `weight="gate"`);
    `teacher_share` of the doubt; `reliability`: weigh generalists by their scores, drop those below 0.1;
    `sample_gate`: a sample whose label agrees less with the prompt (Dice) counts nothing.

    Loss: `loss` "mse", "ce", "ce_dice"; `min_weight`; `lam_sam`; `w0`, `ramp` "falling" (published),
    "rising" or "flat", `ramp_length` (blocks of 150 steps): `schedules.sam_weight`; `warmup`, a share of
    the training; `sam_every`: other steps give exactly 0. A generalist that takes more than `budget` seconds
    in a step (None: any time) is told of, and listed in `diagnostics["slow"]`.

    `cache`: an `EncoderCache` (`semisam.generalists.cache`) for images that come again, such as whole scans
    in several rounds; `diagnostics` then counts "cache_hits" and "cache_misses" of images.

    An answer that is not finite, of another shape, or the same number in every voxel says nothing: that
    source is left out for these samples, with a RuntimeWarning (at the 1st, 10th, 100th, ... time). The
    rows are counted in `diagnostics["failed_rows"]`; a source without any usable answer is in "dropped" with
    the reason, and "drops" counts these steps since the term was made.

    Every number is per sample and class: nothing passes from one sample to another, except that the loss
    is the mean over samples. Nothing is drawn from torch's random numbers. On devices without kernels of
    this library, all but the generalist is computed on the CPU; only the scalar and its gradient travel.

    On a GPU a call never makes the host wait if all generalists promise to be asynchronous
    (`GeneralistSpec`), are not asked slice by slice and have no cache: `diagnostics["asynchronous"]` says
    so. All rounds are asked for then, `diagnostics` is a mapping that waits when it is read, and with it
    come the warnings; times are the host's own. `last` is there even if nothing came of it, with weights of
    0. A teacher that is no distribution makes the result NaN, and ValueError is raised where `diagnostics`
    are read. Such a call can be captured in a CUDA graph, after one that was not; `step` and `sample_ids`
    may be tensors there (int64; 0-d and [B]) whose values change between replays.

    Raises ValueError for unknown names (with the nearest known one), numbers out of range and a mode whose
    prompts a generalist does not take. Papers: SemiSAM (arXiv 2312.06316), SemiSAM+ (arXiv 2502.20749).

    >>> import torch
    >>> from semisam.term import SemiSAMTerm
    >>> term = SemiSAMTerm("random-walker", total_steps=100)
    >>> image = torch.zeros(1, 1, 24, 24)
    >>> image[..., 6:18, 6:18] = 1
    >>> logits = 4 * torch.stack([0.5 - image[:, 0], image[:, 0] - 0.5], 1).roll(1, 3)
    >>> loss = term(image, logits.requires_grad_(), step=50)
    >>> loss.backward()
    >>> bool(loss > 0), bool(logits.grad.any()), term.diagnostics["skipped"]
    (True, True, 0)
    """

    def __init__(
        self,
        generalist: Any = "random-walker",
        *,
        total_steps: int,
        preset: str = "plus",
        mode: str | Sequence[str] | None = None,
        clicks: int | None = None,
        rule: str | None = None,
        click_memory: str = "last",
        tau_p: float | None = None,
        threshold: float = 0.5,
        p_min: float = 0.2,
        prompt_lcc: bool = False,
        box: bool = True,
        box_margin: float = 0.05,
        target: str | None = None,
        label_rounds: str | None = None,
        doubt_rounds: str | None = None,
        unc: str = "var",
        weight: str | None = None,
        kappa: float | None = None,
        tau_c: float | None = None,
        tau_u: float | None = None,
        teacher_share: float | None = None,
        reliability: bool | None = None,
        sample_gate: float | None = None,
        loss: str = "mse",
        min_weight: float = 1e-3,
        lam_sam: float | None = None,
        w0: float = 0.1,
        ramp: str | None = None,
        ramp_length: float | None = None,
        warmup: float | None = None,
        sam_every: int = 1,
        budget: float | None = None,
        seed: int = 0,
        cache: Any = None,
    ) -> None:
        """Build the generalists and settle every number; `settings` has the result."""
        apart = ("self", "generalist", "mode", "cache")
        given = {name: value for name, value in locals().items() if name not in apart}
        _choice("preset", preset, tuple(PRESETS))
        self.settings: dict[str, Any] = {
            name: PRESETS[preset].get(name) if value is None else value for name, value in given.items()
        }
        self.cache = cache
        self._slots = _slots(generalist, mode or PRESETS[preset]["mode"], cache)
        mapped = any(slot.mode in ("unc", "mixed") for slot in self._slots)
        if self.settings["lam_sam"] is None:
            self.settings["lam_sam"] = 0.1 if mapped else 0.5
        if self.settings["weight"] is None:
            self.settings["weight"] = "exp" if mapped else "none"
        self.settings["mode"] = [slot.mode for slot in self._slots]
        _check_settings(self.settings)
        self.gate = Gate([slot.name for slot in self._slots])
        self.drops = dict.fromkeys(self.gate.names, 0)
        self._told: dict[tuple[str, str], int] = {}
        self._dropped: dict[str, Any] = {}  # of `drops`, what was counted on a device
        self.diagnostics: Any = _blank(self.gate, self.drops)
        self.last: LastCall | None = None

    @property
    def generalists(self) -> dict[str, Any]:
        """The generalists by name."""
        return {slot.name: slot.generalist for slot in self._slots}

    def check(self, spatial_dims: int, classes: int) -> None:
        """Raise ValueError if a generalist cannot take images of so many axes, or so many foreground classes.

        A call checks this, too; here it can be known before a long preparation.

        >>> from semisam.term import SemiSAMTerm
        >>> SemiSAMTerm("random-walker", total_steps=100).check(spatial_dims=3, classes=13)
        """
        for slot in self._slots:
            slot.check((1,) * spatial_dims, classes)

    def factor(self, step: Any) -> Any:
        """Return what L_sam is multiplied with at `step`: lam_sam w_sam(step) warm-up(step).

        Of a step that is a tensor, a float64 tensor where it is.

        >>> from semisam.term import SemiSAMTerm
        >>> round(SemiSAMTerm(total_steps=6000, lam_sam=1.0).factor(3000), 6)
        0.02865
        """
        s = self.settings
        course = {"weight": s["w0"], "length": s["ramp_length"], "ramp": s["ramp"]}
        weight = schedules.sam_weight(step, s["total_steps"], **course)
        found = s["lam_sam"] * weight * schedules.warmup(step, s["total_steps"], s["warmup"])
        return found if ops.is_torch(step) else float(found)

    def due(self, step: Any) -> bool:
        """Tell whether step `step` has a term; in others a call gives 0 and looks at nothing.

        What a loop computes for `teacher_probs` alone need not be computed then. Of a step that is a tensor
        the host does not know it: True.

        >>> from semisam.term import SemiSAMTerm
        >>> term = SemiSAMTerm(total_steps=100, sam_every=5, warmup=0.0)
        >>> term.due(10), term.due(11)
        (True, False)
        """
        return ops.is_torch(step) or (self.factor(step) != 0 and step % self.settings["sam_every"] == 0)

    def __call__(
        self,
        images_u: Any,
        logits_u: Any,
        teacher_probs: Any = None,
        *,
        step: Any,
        sample_ids: Any = None,
        spacing: Sequence[float] | None = None,
    ) -> Any:
        """Return the term of one step, a scalar with gradient to `logits_u` alone.

        `images_u` [B, channels, *S] and `logits_u` [B, C, *S], C >= 2, background first, of the unlabeled
        samples (B may be 0); `teacher_probs` [B, C, *S], what the prompts come from (None: the student's own
        softmax, detached, and then the teacher is no source of doubt); `step` from 0; `sample_ids`, unique
        within the step over all processes (default 0..B-1); `spacing` in mm.

        `diagnostics` then has numbers for the log, `last` tensors for pictures. A step without anything to
        learn from (see `sam_every`, no confident class, generalist failed or out of favour) gives exactly 0.
        Logits that are not finite make the result NaN. Raises ValueError for shapes that do not fit and for a
        teacher whose values are no probabilities.
        """
        _check_batch("SemiSAMTerm", ("images_u", "logits_u"), images_u, logits_u)
        if teacher_probs is not None and tuple(teacher_probs.shape) != tuple(logits_u.shape):
            raise ValueError(
                f"SemiSAMTerm(): teacher_probs: expected the shape of logits_u {tuple(logits_u.shape)}, "
                f"got {tuple(teacher_probs.shape)}"
            )
        home = _home(logits_u.device)
        quiet = self._is_quiet(home, logits_u.ndim - 2)
        step = _step("SemiSAMTerm", step, quiet)
        ids = _ids("SemiSAMTerm", sample_ids, len(logits_u), home if quiet else None)
        self.last = None
        self.diagnostics = _blank(self.gate, self.drops)
        self.diagnostics["weight"] = self.factor(step)
        if self.settings["lam_sam"] == 0:
            return torch.zeros((), device=logits_u.device)
        if not self.due(step) or not len(logits_u):
            if self._dropped:
                self.diagnostics = Diagnostics(self.diagnostics | {"drops": self._all_drops})
            return _nothing(logits_u)
        if quiet:
            return self._quietly(images_u, logits_u, teacher_probs, step, ids, spacing)
        with torch.no_grad():
            prob = (logits_u.float().softmax(1) if teacher_probs is None else teacher_probs.float()).to(home)
            request = self._request(images_u, prob, step, ids, spacing)
            right = bool(_is_distribution(request.spread))
            if teacher_probs is not None and not right:
                _refuse_no_distribution("SemiSAMTerm", "teacher_probs", prob)
            if right:
                self.last = self._teach(request, teacher=teacher_probs is not None)
        if not right:
            return logits_u.sum().float() * float("nan")
        if self.last is None:
            return _nothing(logits_u)
        return self._weighted(logits_u, step)

    def _weighted(self, logits: Any, step: Any) -> Any:
        """factor(step) L_sam, where the logits are; exactly 0 in a step without a term."""
        home = _home(logits.device)
        value = self._loss(logits.to(home))
        if ops.stays(home):
            self.diagnostics["loss"] = value.detach()
        else:
            self.diagnostics["loss"] = float(value.detach())
        factor = self.factor(step)
        if not ops.is_torch(step):
            return (value * factor).to(logits.device)
        on = (step % self.settings["sam_every"] == 0) & (factor != 0)
        return torch.where(on, value * factor.to(value.dtype), 0.0)

    # ---- without a look at a value

    def _is_quiet(self, home: Any, dims: int) -> bool:
        """Tell whether a call on tensors that are computed with at `home` looks at no value."""
        asked = [slot for slot in self._slots if self.gate.choice[slot.name] == slot.name]
        return ops.stays(home) and not any(slot.waits(dims) for slot in asked)

    def _quietly(self, images: Any, logits: Any, teacher: Any, step: Any, ids: Any, spacing: Any) -> Any:
        """A call whose every decision is a mask: the same value, and exactly 0 where the host would stop."""
        with torch.no_grad():
            prob = logits.float().softmax(1) if teacher is None else teacher.float()
            request = self._request(images, prob, step, ids, spacing, quiet=True)
            right = _is_distribution(request.spread)
            self.last = self._teach(request, teacher=teacher is not None)
        checked = None if teacher is None else (prob, right)
        self.diagnostics = Diagnostics(self.diagnostics, lambda: _refuse_unless(checked))
        value = self._weighted(logits, step) if self.last is not None else _nothing(logits)
        return value * torch.where(right, 1.0, float("nan"))

    # ---- teaching in two moves: label whole scans now and then, learn from the labels in every step

    def teach(
        self,
        images_u: Any,
        teacher_probs: Any,
        *,
        step: int,
        sample_ids: Sequence[int] | None = None,
        spacing: Sequence[float] | None = None,
    ) -> LastCall | None:
        """Return what the generalists make of unlabeled images, without a loss; None if nothing comes of it.

        Arguments are those of a call of the term. Meant for whole scans, of which `from_labels` then takes
        patches: a generalist that sees the organ whole, and is asked once in many steps, not in each.
        Raises what a call raises.

        >>> import torch
        >>> from semisam.term import SemiSAMTerm
        >>> term = SemiSAMTerm("random-walker", total_steps=100)
        >>> image = torch.zeros(1, 1, 24, 24)
        >>> image[..., 6:18, 6:18] = 1
        >>> prob = torch.stack([1 - image[:, 0], image[:, 0]], 1).roll(1, 3) * 0.9 + 0.05
        >>> made = term.teach(image, prob, step=0)
        >>> logits = prob.log().requires_grad_()
        >>> loss = term.from_labels(image, logits, made.target, made.weight, step=50)
        >>> loss.backward()
        >>> bool(loss > 0), bool(logits.grad.any())
        (True, True)
        """
        _check_batch("SemiSAMTerm.teach", ("images_u", "teacher_probs"), images_u, teacher_probs)
        ids = _ids("SemiSAMTerm.teach", sample_ids, len(images_u), None)
        self.diagnostics = _blank(self.gate, self.drops)
        step = _step("SemiSAMTerm.teach", step, False)
        prob = teacher_probs.float().to(_home(teacher_probs.device))
        with torch.no_grad():
            request = self._request(images_u, prob, step, ids, spacing)
            if not bool(_is_distribution(request.spread)):
                _refuse_no_distribution("SemiSAMTerm.teach", "teacher_probs", prob)
            return self._teach(request, teacher=True)

    def from_labels(
        self, images_u: Any, logits_u: Any, target: Any, weight: Any, *, step: Any, uncertainty: Any = None
    ) -> Any:
        """Return the term of one step for pseudo-labels that `teach` made before; see there.

        `images_u` and `logits_u` are those of a call; `target` is soft [B, C, *S] or hard [B, *S] (255:
        ignored), as the setting says, `weight` [B, *S] in 0..1 (0: nothing is known there), `uncertainty`
        [B, *S] for pictures alone (default 1 - weight). Raises ValueError for shapes that do not fit.
        """
        _check_batch("SemiSAMTerm.from_labels", ("images_u", "logits_u"), images_u, logits_u)
        self.last = None
        home = _home(logits_u.device)
        quiet = ops.stays(home)
        step = _step("SemiSAMTerm.from_labels", step, quiet)
        d = _blank(self.gate, self.drops)
        if quiet:
            d["drops"] = self._all_drops
        self.diagnostics = Diagnostics(d) if quiet else d
        d["weight"] = self.factor(step)
        d["asynchronous"] = quiet
        if self.settings["lam_sam"] == 0:
            return torch.zeros((), device=logits_u.device)
        if not self.due(step) or not len(logits_u):
            return _nothing(logits_u)
        target, weight = target.to(home), weight.to(home)
        share = weight.flatten(1).mean(1, dtype=torch.float64)
        kept = share >= self.settings["min_weight"]
        doubt = 1 - weight if uncertainty is None else uncertainty.to(home)
        d["weight_share"] = share if quiet else share.tolist()
        d["skipped"] = (~kept).sum() if quiet else int((~kept).sum())
        if quiet:
            d["mean_u"] = _fusing.masked_mean(doubt.flatten(1).mean(1, dtype=torch.float64), kept)
        elif d["skipped"] == len(share):
            return _nothing(logits_u)
        else:
            d["mean_u"] = float(doubt[kept].mean(dtype=torch.float64))
        label = target.argmax(1).byte() if target.ndim == logits_u.ndim else target
        with torch.no_grad():
            prob = logits_u.float().softmax(1).to(home)
        self.last = LastCall(images_u, prob, None, {}, {}, target, label, weight, doubt)
        return self._weighted(logits_u, step)

    # ---- teaching

    def _teach(self, request: Request, *, teacher: bool) -> LastCall | None:
        """Prompts, answers and fusion; None where nothing came of it."""
        began, quiet = request.began, request.quiet
        before = (0, 0) if self.cache is None else (self.cache.hits, self.cache.misses)
        answers = self._answers(request)
        made = self._fuse(request, answers, teacher=teacher)
        seconds = sum(a.seconds for a in answers.values())
        d = self.diagnostics
        d["called"] = True
        if self.cache is not None:
            d["cache_hits"], d["cache_misses"] = self.cache.hits - before[0], self.cache.misses - before[1]
        if quiet:
            self._note_quietly(request, answers)
        else:
            d["skipped_rows"] = int(request.targets.skip.sum())
            d["failed_rows"] = sum(n for a in answers.values() for n in a.failed.values())
            for name, a in answers.items():
                self._note(name, a, request.step)
            d["drops"] = self._all_drops()
            d["clicks"] = sum(int((a.clicks.labels >= 0).sum()) for a in answers.values())
            d["rounds"] = {name: list(a.done) for name, a in answers.items()}
        solver = {name: dict(a.info) for name, a in answers.items() if a.info}
        d["solver"] = solver if quiet else _plain(solver)
        d["ms_generalist"] = 1e3 * seconds
        d["ms_rest"] = 1e3 * (time.perf_counter() - began - seconds)
        return made

    def _request(
        self, images: Any, prob: Any, step: Any, ids: Any, spacing: Any, *, quiet: bool = False
    ) -> Request:
        began, s = time.perf_counter(), self.settings
        targets, spread = prompts.targets_and_spread(
            prob,
            threshold=s["threshold"],
            p_min=s["p_min"],
            tau_p=s["tau_p"],
            largest_component=s["prompt_lcc"],
        )
        return Request(images, prob, targets, step, ids, spacing, quiet, spread, began)

    def _answers(self, request: Request) -> dict[str, Answers]:
        """What every source that the gate lets through has to say, by name."""
        found: dict[str, Answers] = {}
        scores = self.gate.reliability.scores if self.settings["reliability"] else [1.0] * len(self._slots)
        for slot, score in zip(self._slots, scores, strict=True):
            choice = self.gate.choice[slot.name]
            if choice == MASK or score < 0.1 or choice in found:
                continue
            made = largest(request) if choice == LARGEST else slot.ask(request, self.settings)
            made.score = float(score)
            found[choice] = made
        return found

    def _note(self, name: str, answers: Answers, step: int) -> None:
        """Count and tell what was wrong with a source."""
        why = _why_dropped(answers)
        if why:
            self.diagnostics["dropped"][name] = why
            self.drops[name] = self.drops.get(name, 0) + 1
        self._tell_failed(name, answers, step)
        self._note_slow(name, answers, f" at step {step}")

    def _tell_failed(self, name: str, answers: Answers, step: int) -> None:
        for what, rows in answers.failed.items():
            self._tell(
                (name, what.partition(",")[0]),
                f"{rows} answers {what} at step {step}; a sample without an earlier answer is left out",
            )

    def _note_slow(self, name: str, answers: Answers, when: str) -> None:
        budget = self.settings["budget"]
        if budget is not None and answers.seconds > budget:
            self.diagnostics["slow"][name] = answers.seconds
            self._tell((name, "slow"), f"took {answers.seconds:.3g} s{when}, budget {budget:g} s")

    def _note_quietly(self, request: Request, answers: dict[str, Answers]) -> None:
        """What is to be counted and told, as tensors and as functions of them: for whoever reads it."""
        d, step = self.diagnostics, request.step
        d["asynchronous"] = True
        d["skipped_rows"] = request.targets.skip.sum()
        d["clicks"] = sum((a.clicks.labels >= 0).sum() for a in answers.values())
        d["rounds"] = {name: a.done for name, a in answers.items()}
        for name, a in answers.items():
            self._note_slow(name, a, "" if ops.is_torch(step) else f" at step {step}")  # the host's own time
            if a.failed:
                nothing = sum(a.failed.values()) > 0
                counter = self._dropped.get(name)
                if counter is None:
                    counter = self._dropped[name] = torch.zeros_like(a.done[0])
                counter += nothing & (a.done == 0).all()

        def failed_rows() -> int:
            for name, a in answers.items():
                self._tell_failed(name, _read(a), int(step))
            return sum(n for a in answers.values() for n in _read(a).failed.values())

        def dropped() -> dict[str, str]:
            return {name: why for name, a in answers.items() if (why := _why_dropped(_read(a)))}

        d["failed_rows"], d["dropped"], d["drops"] = failed_rows, dropped, self._all_drops

    def _all_drops(self) -> dict[str, int]:
        """Steps without a usable answer, by source; waits for those that were counted on a device."""
        names = {**dict.fromkeys(self._dropped, 0), **self.drops}
        return {name: n + int(self._dropped.get(name, 0)) for name, n in names.items()}

    def _tell(self, about: tuple[str, str], text: str) -> None:
        """Warn at the 1st, 10th, 100th, ... time."""
        count = self._told[about] = self._told.get(about, 0) + 1
        if str(count).rstrip("0") == "1":
            times = f" ({count} times so far)" if count > 1 else ""
            warnings.warn(f"SemiSAMTerm(): {about[0]}: {text}{times}", RuntimeWarning, stacklevel=2)

    def _fuse(self, request: Request, answers: dict[str, Answers], *, teacher: bool) -> LastCall | None:
        s, d, quiet = self.settings, self.diagnostics, request.quiet
        if not any(a.rounds if quiet else any(a.done) for a in answers.values()):
            return None
        sources, r_lab, r_unc = self._sources(request, answers, teacher and s["teacher_share"] > 0)
        soft = s["target"] == "soft"
        fused = fusion.fuse(
            sources,
            r_lab,
            r_unc,
            unc=s["unc"],
            weight=s["weight"],
            kappa=s["kappa"],
            tau_c=None if soft else s["tau_c"],
            tau_u=s["tau_u"] if s["weight"] == "gate" or not soft else None,
            logits=True,
            two_channels=soft and request.prob.shape[1] == 2,
            want=("label", "uncertainty", "weight", *(("mean",) if soft else ())),
        )
        taught = r_lab.sum(0) > 0
        if not quiet:
            taught = torch.from_numpy(taught).to(request.prob.device)
        agreement = fusion.agreement(fused.label, request.targets.target, request.prob.shape[1])
        kept = taught & (agreement >= s["sample_gate"])
        weight = fused.weight  # ours alone, so samples may be taken out in place
        if quiet:
            weight.masked_fill_(~kept.reshape(-1, *(1,) * (weight.ndim - 1)), 0)
        else:
            for n in (~kept).nonzero()[:, 0].tolist():
                weight[n].zero_()
        share = _means(weight)
        if quiet:
            d["weight_share"], d["skipped"] = share, (share < s["min_weight"]).sum()
            d["agreement"] = _fusing.masked_mean(agreement, taught)
            d["mean_u"] = _fusing.masked_mean(_means(fused.uncertainty), taught)
        else:
            count = int(taught.sum())
            d["weight_share"] = share.tolist()
            d["skipped"] = int((share < s["min_weight"]).sum())
            d["agreement"] = float(agreement[taught].mean()) if count else None
            d["mean_u"] = float(_means(fused.uncertainty)[taught].mean()) if count else None
        return LastCall(
            request.images,
            request.prob,
            request.targets.target,
            {name: a.clicks for name, a in answers.items()},
            {name: a.rounds[-1] for name, a in answers.items() if a.rounds},
            fused.mean if soft else fused.label,
            fused.label,
            weight,
            fused.uncertainty,
        )

    def _sources(self, request: Request, answers: dict[str, Answers], teacher: bool) -> tuple[Any, Any, Any]:
        """What is fused, as logits, and its weights [S, B] for label and doubt; `teacher`: doubts, too."""
        s, said = self.settings, answers.values()
        rounds = [r for a in said for r in a.rounds]
        scores, done = [a.score for a in said], [a.done for a in said]
        which: dict[str, Any] = {"label": s["label_rounds"], "doubt": s["doubt_rounds"]}
        if request.quiet:
            places = [len(a.rounds) for a in said]
            weights = _fusing.source_table(scores, done, places, teacher, s["teacher_share"], **which)
            own = [_teacher_logits(request.prob)] if teacher else []
            return [*map(joined, rounds), *own], *weights
        r_lab, r_unc = fusion.source_weights(scores, done, teacher, s["teacher_share"], **which)
        counts = [i for i in range(len(r_lab)) if r_lab[i].any() or r_unc[i].any()]
        used = [joined(rounds[i]) if i < len(rounds) else _teacher_logits(request.prob) for i in counts]
        return used, r_lab[counts], r_unc[counts]

    def _loss(self, logits: Any) -> Any:
        """The student's distance to what `last` holds."""
        assert self.last is not None
        return uncertainty_weighted_loss(
            logits,
            self.last.target,
            self.last.weight,
            loss=self.settings["loss"],
            min_weight=self.settings["min_weight"],
        )

    # ---- the gate

    def calibrate(
        self, images: Any, probs: Any, labels: Any, spacing: Any = None, *, device: Any = None
    ) -> dict[str, Any]:
        """Decide from held-out predictions what each generalist contributes, before the training starts.

        Sequences of N labeled volumes (their shapes may differ) or arrays with a leading N: `images`
        [channels, *S], `probs` [C, *S] of a specialist that did not train on that volume, `labels` [*S]
        (255: ignored); `spacing` for all or a list, in mm. Candidates are the prompt mask (argmax of
        `probs`), its largest component per class, each generalist in the term's own mode, and sets of them,
        fused as the term would; the score is the Dice of whole volumes, mean over them and the foreground
        classes. See `semisam.gate.Gate`. Each volume is judged on `device` (default: where it is), one at a
        time; what is kept of it until all are judged goes to the CPU.

        Returns a dictionary of plain values: "scores" (candidate: mean Dice), "per_class" (candidate:
        list), "best" (candidate), "choice" (generalist: candidate), "reliability" (generalist: score),
        "switched" (generalists whose choice is another one than before), "volumes", "held_out". Raises
        ValueError for shapes that do not fit.

        >>> import torch
        >>> from semisam.term import SemiSAMTerm
        >>> image = torch.zeros(1, 1, 40, 40)
        >>> image[..., 10:30, 10:30] = 1
        >>> prob = torch.stack([1 - image[:, 0], image[:, 0]], 1).roll((2, -1), (2, 3)) * 0.8 + 0.1
        >>> found = SemiSAMTerm(total_steps=100).calibrate(image, prob, image[:, 0].byte())
        >>> {name: round(v, 2) for name, v in found["scores"].items()}
        {'mask': 0.85, 'largest_component': 0.85, 'random-walker': 0.9}
        >>> found["choice"]
        {'random-walker': 'random-walker'}
        """
        return self._judge(images, probs, labels, spacing, held_out=True, fresh=True, device=device)

    def score(
        self, images: Any, probs: Any, labels: Any, spacing: Any = None, *, held_out: bool = False
    ) -> dict[str, Any]:
        """Repeat the comparison during training, and let its result in with a momentum of 0.9.

        Arguments and result are those of `calibrate`. Predictions on scans that the specialist trains on
        (`held_out=False`) are better than any on unlabeled ones, so that the prompt mask would win for the
        wrong reason: they change the generalists' reliabilities, of which only ratios count, and never a
        choice. Held-out ones change both.
        """
        return self._judge(images, probs, labels, spacing, held_out=held_out, fresh=False)

    def _judge(
        self,
        images: Any,
        probs: Any,
        labels: Any,
        spacing: Any,
        *,
        held_out: bool,
        fresh: bool,
        device: Any = None,
    ) -> dict[str, Any]:
        n = len(probs)
        if not n or len(images) != n or len(labels) != n:
            raise ValueError(
                f"calibrate(): images, probs, labels: expected equally many volumes, at least one, got "
                f"{len(images)}, {n}, {len(labels)}"
            )
        several = isinstance(spacing, (list, tuple)) and len(spacing) == n
        each = several and all(v is None or hasattr(v, "__len__") for v in spacing)

        def there(array: Any) -> Any:
            tensor = torch.as_tensor(array)
            return tensor if device is None else tensor.to(device)

        with torch.no_grad():
            judged = []
            for i in range(n):
                where = spacing[i] if each else spacing
                one = self._compare(there(images[i]), there(probs[i]), there(labels[i]), where, i)
                judged.append(one.on_cpu() if held_out else one)
                del one  # nothing is left on the device when the next one comes
            per_class = _mean_of([one.dice for one in judged])
            doubt: dict[str, float] = {}
            if held_out:
                together, doubt = self._together(judged, per_class)
                per_class |= together
        before = dict(self.gate.choice)
        if fresh:
            self.gate.start(per_class, doubt)
        else:
            self.gate.update(per_class, held_out=held_out, doubt=doubt)
        return {
            **self.gate.report(),
            "scores": {name: sum(values) / len(values) for name, values in per_class.items()},
            "per_class": per_class,
            "switched": [name for name, choice in self.gate.choice.items() if choice != before[name]],
            "volumes": n,
            "held_out": held_out,
        }

    def _together(
        self, judged: list[_Judged], per_class: dict[str, list[float]]
    ) -> tuple[dict[str, list[float]], dict[str, float]]:
        """Dice per foreground class of the sets of generalists, weighted as they would be in the term.

        The second result is the doubt about what each set gains over its best member.
        """
        worth = [sum(per_class[slot.name]) / len(per_class[slot.name]) for slot in self._slots]
        found: dict[str, list[float]] = {}
        doubt: dict[str, float] = {}
        for name, members in sets_of(self.gate.names).items():
            rows = [{name: self._fused_dice(one, members, worth)} for one in judged]
            found |= _mean_of(rows)
            best = self._slots[max(members, key=lambda g: worth[g])].name
            pairs = zip(rows, judged, strict=True)
            gain = [float(row[name].mean()) - float(one.dice[best].mean()) for row, one in pairs]
            doubt[name] = doubt_of(gain)
        return found, doubt

    def _fused_dice(self, one: _Judged, members: Sequence[int], worth: Sequence[float]) -> Any:
        here = [g for g in members if one.means[g] is not None]
        scores = [worth[g] if self.settings["reliability"] else 1.0 for g in here]
        r_lab, _ = fusion.source_weights(scores or [0.0], [1] * max(len(here), 1), False)
        label = torch.zeros_like(one.label)
        if r_lab.any():
            label = fusion.fuse([one.means[g] for g in here], r_lab, want=("label",)).label
        return _dice(label, one.label, len(one.dice[MASK]) + 1)

    def _compare(self, image: Any, prob: Any, label: Any, spacing: Any, number: int) -> _Judged:
        """All candidates but sets of generalists on one volume."""
        image, prob, label = (torch.as_tensor(a)[None] for a in (image, prob, label))
        _check_batch("calibrate", ("images", "probs"), image, prob)
        if tuple(label.shape[1:]) != tuple(prob.shape[2:]):
            raise ValueError(
                f"calibrate(): labels: expected shape {tuple(prob.shape[2:])} for volume {number}, "
                f"got {tuple(label.shape[1:])}"
            )
        home, classes = _home(prob.device), prob.shape[1]
        prob, label = prob.float().to(home), label.to(home)
        request = self._request(image, prob, 0, [number], spacing)
        if not bool(_is_distribution(request.spread)):
            _refuse_no_distribution("calibrate", "probs", prob)
        mask = prob.argmax(1).byte()
        found = {MASK: mask, LARGEST: largest_components(mask, classes)}
        means: list[Any] = [None] * len(self._slots)
        want = ("label", "mean") if len(self._slots) > 1 else ("label",)
        for g, slot in enumerate(self._slots):
            answers = slot.ask(request, self.settings, whole=False)
            self._note(slot.name, answers, 0)
            found[slot.name] = torch.zeros_like(mask)
            if any(answers.done):
                r_lab, _ = fusion.source_weights(
                    [1.0], [answers.done], False, label=self.settings["label_rounds"]
                )
                rounds = [joined(r) for r in answers.rounds]
                made = fusion.fuse(rounds, r_lab, logits=True, two_channels=classes == 2, want=want)
                found[slot.name], means[g] = made.label, made.mean
        return _Judged({name: _dice(one, label, classes) for name, one in found.items()}, means, label)

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Return what changes during training (the gate), as plain Python values."""
        return {"format": 1, "gate": self.gate.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`; ValueError for one of other generalists."""
        self.gate.load_state_dict(state["gate"])


def _dice(made: Any, label: Any, classes: int) -> Any:
    return metrics.dice(made, label, include_background=False, num_classes=classes, ignore_index=255)[0]


def _mean_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Dice per class of every candidate, mean over volumes."""
    return {
        name: torch.stack([torch.as_tensor(row[name]) for row in rows]).double().mean(0).tolist()
        for name in rows[0]
    }


# ---- arguments ----------------------------------------------------------------------------------


def _slots(given: Any, mode: str | Sequence[str] | None, cache: Any) -> list[Slot]:
    items = list(given) if isinstance(given, (list, tuple)) else [given]
    if not items:
        raise ValueError("SemiSAMTerm(): generalist: expected at least one, got none")
    modes = [mode] * len(items) if mode is None or isinstance(mode, str) else list(mode)
    if len(modes) != len(items):
        raise ValueError(
            f"SemiSAMTerm(): mode: expected one, or one per generalist ({len(items)}), got {mode}"
        )
    slots: list[Slot] = []
    for item, wanted in zip(items, modes, strict=True):
        try:
            made = generalists.build(item) if isinstance(item, str) else generalists.as_generalist(item)
        except TypeError:
            if isinstance(item, str):
                raise
            raise TypeError(
                f"SemiSAMTerm(): generalist: expected a name, something with spec, encode and decode, or a "
                f"function (images, prompts) -> logits, got {type(item).__name__}"
            ) from None
        chosen = wanted or made.spec.default_mode
        _choice("mode", chosen, tuple(MODES))
        if not MODES[chosen] <= made.spec.prompts:
            possible = " or ".join(m for m, needs in MODES.items() if needs <= made.spec.prompts)
            raise ValueError(
                f"SemiSAMTerm(): mode: expected {possible or 'none'} for {made.spec.name}, which "
                f"takes {', '.join(sorted(made.spec.prompts))}, got {chosen!r}"
            )
        name = made.spec.name
        taken = [slot.name for slot in slots] + [MASK, LARGEST]
        while name in taken:
            name = f"{made.spec.name}-{len(slots) + 1}" if name == made.spec.name else f"{name}'"
        slots.append(Slot(name, made, chosen, len(slots), cache))
    return slots


def _choice(argument: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, 1)
        raise ValueError(
            f"SemiSAMTerm(): {argument}: expected one of {', '.join(choices)}, got {value!r}"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )


def _check_settings(settings: Mapping[str, Any]) -> None:
    for name, choices in _CHOICES.items():
        _choice(name, settings[name], choices)
    if settings["rule"] is not None:
        _choice("rule", settings["rule"], ("ritm", "random"))
    for name, (low, high) in _RANGES.items():
        value = settings[name]
        if not isinstance(value, (int, float)) or not low <= value <= high:
            raise ValueError(
                f"SemiSAMTerm(): {name}: expected a number from {low} to {high:g}, got {value!r}"
            )
        if name in _WHOLE and value != int(value):
            raise ValueError(f"SemiSAMTerm(): {name}: expected a whole number, got {value!r}")
    budget = settings["budget"]
    if budget is not None and not (isinstance(budget, (int, float)) and budget > 0):
        raise ValueError(f"SemiSAMTerm(): budget: expected a positive number of seconds, got {budget!r}")
    length = settings["ramp_length"]
    if length is not None and not 0 <= length < float("inf"):
        raise ValueError(f"SemiSAMTerm(): ramp_length: expected 0 or a positive number, got {length!r}")


def _check_batch(who: str, names: tuple[str, str], images: Any, probs: Any) -> None:
    for name, array in zip(names, (images, probs), strict=True):
        if not ops.is_torch(array):
            raise TypeError(f"{who}(): {name}: expected a torch tensor, got {type(array).__name__}")
    shape = tuple(probs.shape)
    if len(shape) not in (4, 5) or shape[1] < 2 or min(shape[2:]) < 1:
        raise ValueError(
            f"{who}(): {names[1]}: expected [B, C, H, W] or [B, C, D, H, W] with at least 2 classes "
            f"(background first), got shape {shape}"
        )
    got = tuple(images.shape)
    if len(got) != len(shape) or got[0] != shape[0] or got[2:] != shape[2:]:
        raise ValueError(
            f"{who}(): {names[0]}: expected ({shape[0]}, channels, {', '.join(map(str, shape[2:]))}), as "
            f"{names[1]} has it, got {got}"
        )


def _step(who: str, step: Any, quiet: bool) -> Any:
    """The step as a number, or as a tensor that may stay one."""
    if quiet and ops.is_torch(step) and ops.stays(step.device):
        return step
    if not 0 <= int(step) < 2**32:
        raise ValueError(f"{who}(): step: expected 0 or more, got {step}")
    return int(step) if ops.is_torch(step) else step


def _ids(who: str, given: Any, samples: int, device: Any) -> Any:
    """One number per sample: a list, or a tensor on `device`."""
    found: Any = range(samples) if given is None else given
    if len(found) != samples:
        raise ValueError(f"{who}(): sample_ids: expected one per sample ({samples}), got {len(found)}")
    if device is not None:
        kept = ops.is_torch(found)
        return found if kept else ops.numbers([int(i) for i in found], torch.int64, device)
    return found.tolist() if ops.is_torch(found) else [int(i) for i in found]


def _is_distribution(spread: Any) -> Any:
    """Whether all samples are distributions, up to the rounding of half precision; a tensor."""
    return (spread <= 0.02).all()  # NaN is not


def _refuse_no_distribution(who: str, name: str, prob: Any) -> None:
    """Raise ValueError that says how far `prob` is from what it should be."""
    off, low = float((prob.sum(1) - 1).abs().amax()), float(prob.amin())
    raise ValueError(
        f"{who}(): {name}: expected probabilities that sum to 1 over the classes (a softmax, not "
        f"logits), got a minimum of {low:.3g} and sums that are off by {off:.3g}"
    )


def _refuse_unless(checked: Any) -> None:
    """Raise ValueError for probabilities that are none, after a call that did not look at them."""
    if checked is not None and not bool(checked[1]):
        _refuse_no_distribution("SemiSAMTerm", "teacher_probs", checked[0])


def _why_dropped(answers: Answers) -> str:
    """What was wrong with a source that has nothing usable to say."""
    failed = answers.failed
    return max(failed, key=lambda what: failed[what]) if failed and not any(answers.done) else ""


def _read(answers: Answers) -> Answers:
    """What a quiet request's answers count, as numbers; this waits."""
    failed = {what: n for what, rows in answers.failed.items() if (n := int(rows))}
    return replace(answers, done=answers.done.tolist(), failed=failed)


def _teacher_logits(prob: Any) -> Any:
    """Probabilities [B, C, *S] as logits for `fuse`; for two classes the foreground's alone, [B, 1, *S].

    The cut at 1e-7 is that of a float32 softmax's own rounding.
    """
    if prob.shape[1] > 2:
        return prob.clamp_min(1e-12).log()
    foreground = prob[:, 1:]
    made = ops.empty(foreground.shape, foreground.dtype, foreground.device)
    return torch.logit(foreground, 1e-7, out=made)


def _means(maps: Any) -> Any:
    """Mean of each sample [B, *S], float64: lines in float32 (some 1e-7), without a copy of the map."""
    return maps.mean(-1).double().flatten(1).mean(1)


def _home(device: Any) -> Any:
    """Where this library's operators run for tensors of a device."""
    return device if not ops.lacks(device, _OPERATORS) else torch.device("cpu")


def _nothing(logits: Any) -> Any:
    """Exactly 0, with a gradient of exactly 0, whatever the logits hold."""
    return logits.reshape(-1)[:0].sum(dtype=torch.float32)


def _blank(gate: Gate, drops: dict[str, int]) -> dict[str, Any]:
    """The diagnostics of a step in which nothing was asked; None: not measured."""
    return {
        "called": False,
        "asynchronous": False,
        "weight": 0.0,
        "loss": 0.0,
        "weight_share": [],
        "skipped": 0,
        "skipped_rows": 0,
        "failed_rows": 0,
        "dropped": {},
        "drops": dict(drops),
        "slow": {},
        "clicks": 0,
        "rounds": {},
        "agreement": None,
        "mean_u": None,
        "reliability": dict(zip(gate.names, gate.reliability.scores.tolist(), strict=True)),
        "choice": dict(gate.choice),
        "solver": {},
        "cache_hits": 0,
        "cache_misses": 0,
        "ms_generalist": 0.0,
        "ms_rest": 0.0,
    }
