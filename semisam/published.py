# SPDX-License-Identifier: Apache-2.0
"""The leaky reference: SemiSAM's term with the defects of the published scripts, each by its name.

For studies of what a defect does, never for results: one of the defects takes its clicks from the labels of
scans that count as unlabeled. Nothing else in this package may open those labels.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F

from semisam import generalists, prompts
from semisam._dialogue import MODES, Answers, Request, Slot, usable
from semisam.term import LastCall, SemiSAMTerm

__all__ = ["BUNDLES", "Defects", "PublishedDefects", "PublishedTerm"]

_SURE = 10.0


class PublishedDefects(UserWarning):
    """A term that does wrong on purpose; the text says in what."""


def _defect(number: str, what: str) -> Any:
    return field(default=False, metadata={"number": number, "what": what})


@dataclass(frozen=True)
class Defects:
    """Which defects of the published scripts are switched on; none by default.

    >>> from semisam.published import Defects
    >>> Defects.of(["D-01", "click_sign"]).numbers
    ('D-01', 'D-03')
    >>> Defects.of("semisam").names
    ('label_clicks', 'click_sign', 'carried_state', 'logits_as_probabilities', 'raw_input')
    """

    label_clicks: bool = _defect("D-01", "clicks and their targets come from the labels of unlabeled scans")
    background_prompts: bool = _defect("D-02", "prompts ask for the background's probability")
    soft_target: bool = _defect("D-02b", "the click target is 'probability > 0', which is everywhere")
    click_sign: bool = _defect("D-03", "a RITM click's sign is read at (0, i0, i1), not at (i0, i1, i2)")
    scalar_variance: bool = _defect("D-04", "one variance of the whole batch in the place of a map")
    carried_state: bool = _defect("D-05", "mask and click rule pass from one sample to the next")
    logits_as_probabilities: bool = _defect("D-06", "logits are cut at 0.5; probabilities are sent as logits")
    reloading: bool = _defect("D-07", "the generalist is built and loaded anew in every step")
    raw_input: bool = _defect("D-08", "the generalist gets raw intensities and no spacing")
    weight_is_uncertainty: bool = _defect("D-09", "the more uncertain a voxel, the larger its weight")
    divided_by_itself: bool = _defect("D-10", "the loss is divided by itself: 1, with gradient 0")
    mixed_sources: bool = _defect(
        "D-11", "uncertainty is the variance of a background probability and logits"
    )
    last_uncertainty: bool = _defect("D-12", "all samples get the last one's uncertainty")

    @classmethod
    def of(cls, given: Defects | str | Sequence[str]) -> Defects:
        """Return the defects that names, numbers (D-01) or names of `BUNDLES` mean; ValueError for others."""
        if isinstance(given, Defects):
            return given
        names: list[str] = []
        for one in [given] if isinstance(given, str) else given:
            by_number = [f.name for f in fields(cls) if one in (f.name, f.metadata["number"])]
            if one not in BUNDLES and not by_number:
                known = [*BUNDLES, *(f"{f.metadata['number']} ({f.name})" for f in fields(cls))]
                raise ValueError(f"Defects: defects: expected some of {', '.join(known)}, got {one!r}")
            names += BUNDLES.get(one, by_number)
        return cls(**dict.fromkeys(names, True))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of those that are on."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name))

    @property
    def numbers(self) -> tuple[str, ...]:
        """Numbers of those that are on."""
        return tuple(f.metadata["number"] for f in fields(self) if getattr(self, f.name))

    @property
    def sentences(self) -> tuple[str, ...]:
        """What those that are on do."""
        return tuple(
            f"{f.metadata['number']} {f.metadata['what']}" for f in fields(self) if getattr(self, f.name)
        )


_BOTH = ["click_sign", "carried_state", "logits_as_probabilities", "raw_input"]
_PLUS = ["background_prompts", "soft_target", "scalar_variance", "reloading", "weight_is_uncertainty"]
_PLUS += ["divided_by_itself", "mixed_sources", "last_uncertainty"]
BUNDLES: dict[str, list[str]] = {
    "none": [],
    "semisam": ["label_clicks", *_BOTH],
    "semisam+": [*_PLUS, *_BOTH],
    "all": [f.name for f in fields(Defects)],
}
"""The defects of each published script, and of all."""


class PublishedTerm(SemiSAMTerm):
    """`SemiSAMTerm` with preset "ref", and the defects that are asked for (default: all of them).

    Without defects it is that term, bit for bit. `defects`: a `Defects`, or names, numbers or a name of
    `BUNDLES`. Other arguments are those of `SemiSAMTerm`; `mode` is "unc" by default, as in SemiSAM+, and no
    box is sent. What to know of single defects:

    - D-01: `open_labels` must be called before the first step; D-02 and D-02b then change mask prompts alone.
    - D-04, D-09, D-11, D-12 say nothing where `weight` is "none", as in mode "point". Elsewhere the loss is
      normalised as published with them, by mean(w) + 1e-8; D-09 adds mean(U).
    - D-07 needs generalists by name, or `makers`: functions without arguments that build them.
    - D-08 leaves out the z-score of generalists that have a switch `normalize` (SAM-Med3D) and the spacing of
      all. The random walker's result does not depend on the intensities' scale: with equal spacing D-08
      changes nothing there.
    - D-10 leaves a loss of exactly 0 alone: 0 / 0 would end the training.

    There is no gate: `calibrate` and `score` raise ValueError.

    Issues a `PublishedDefects` warning that names every defect. Papers: SemiSAM (arXiv 2312.06316), SemiSAM+
    (arXiv 2502.20749).

    >>> import torch, warnings
    >>> from semisam.published import PublishedTerm
    >>> image = torch.zeros(1, 1, 24, 24)
    >>> image[..., 6:18, 6:18] = 1
    >>> logits = 4 * torch.stack([-image[:, 0], image[:, 0]], 1).roll(1, 3)
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")
    ...     term = PublishedTerm(total_steps=100, defects=["D-10"])
    >>> loss = term(image, logits.requires_grad_(), step=50)
    >>> loss.backward()
    >>> bool(loss > 0), bool(logits.grad.any())
    (True, False)
    """

    def __init__(
        self,
        generalist: Any = "random-walker",
        *,
        total_steps: int,
        defects: Defects | str | Sequence[str] = "all",
        makers: Sequence[Callable[[], Any]] | None = None,
        **options: Any,
    ) -> None:
        """Build the term; ValueError for unknown defects and options that a defect cannot do."""
        self.defects = d = Defects.of(defects)
        if "preset" in options:
            raise TypeError("PublishedTerm(): preset: expected none, as it is 'ref' with defects")
        super().__init__(
            generalist,
            total_steps=total_steps,
            preset="ref",
            **{"mode": "unc", "box": False, **options},
        )
        mapped = d.scalar_variance or d.weight_is_uncertainty or d.mixed_sources or d.last_uncertainty
        for name, possible in (("weight", ("exp", "none")), ("loss", ("mse",))):
            if mapped and self.settings[name] not in possible:
                raise ValueError(
                    f"PublishedTerm(): {name}: expected {' or '.join(possible)} with {', '.join(d.numbers)}, "
                    f"got {self.settings[name]!r}"
                )
        self._makers = makers or _makers(generalist)
        if d.reloading and len(self._makers) != len(self._slots):
            raise ValueError(
                "PublishedTerm(): makers: expected one for each generalist, as D-07 builds them in every step"
            )
        if d.raw_input:
            self._slots = [replace(slot, generalist=_raw(slot.generalist)) for slot in self._slots]
        self._labels: Callable[[Sequence[int]], Any] | None = None
        self._answered: dict[str, Answers] = {}
        if d.names:
            text = "; ".join(d.sentences)
            warnings.warn(
                f"this term has defects of the published scripts, on purpose: {text}", PublishedDefects, 2
            )

    def open_labels(self, labels: Callable[[Sequence[int]], Any]) -> None:
        """Let D-01 see labels: `labels(sample_ids)` gives those of unlabeled samples, [B, *S] integers."""
        self._labels = labels

    # ---- prompts

    def _is_quiet(self, home: Any, dims: int) -> bool:
        return False

    def _request(
        self, images: Any, prob: Any, step: Any, ids: Any, spacing: Any, *, quiet: bool = False
    ) -> Request:
        d, given = self.defects, prob
        if d.background_prompts:  # as the probability of every foreground class
            prob = torch.cat([1 - prob[:, :1], prob[:, :1].expand_as(prob[:, 1:])], 1).contiguous()
        spacing = None if d.raw_input else spacing
        made = super()._request(images, prob, step, ids, spacing, quiet=quiet)
        if d.background_prompts:  # what was given has to be a distribution, not what became of it
            made = replace(made, spread=super()._request(images, given, step, ids, spacing).spread)
        if d.label_clicks:
            if self._labels is None:
                raise ValueError("PublishedTerm(): D-01: expected open_labels() before the first step")
            label = torch.as_tensor(self._labels(ids)).to(prob.device)
            target = torch.stack([label == c for c in range(1, prob.shape[1])], 1)
        elif d.soft_target:
            target = prob[:, 1:] > 0
        else:
            return made
        skip = ~target.flatten(2).any(2)
        return replace(made, targets=prompts.SpecialistTargets(target, torch.ones_like(target), skip))

    def _answers(self, request: Request) -> dict[str, Answers]:
        d = self.defects
        if d.reloading:
            built = [make() for make in self._makers]
            built = [_raw(g) for g in built] if d.raw_input else built
            self._slots = [replace(s, generalist=g) for s, g in zip(self._slots, built, strict=True)]
        if d.click_sign or d.carried_state or d.logits_as_probabilities:
            self._answered = {slot.name: self._one_by_one(slot, request) for slot in self._slots}
        else:
            self._answered = super()._answers(request)
        return self._answered

    def _one_by_one(self, slot: Slot, request: Request) -> Answers:
        """The dialogue of the published scripts: one sample after the other, each for itself.

        Unless the state is carried (D-05), and without D-03 and D-06, it is `Slot.ask`.
        """
        made: list[Answers] = []
        left: tuple[Any, Any] | None = None  # mask and mask prompt that the sample before has left
        for n in range(len(request.ids)):
            answers, left = self._dialogue(slot, _only(request, n), left)
            made.append(answers)
            left = left if self.defects.carried_state else None
        return _joined(made, request)

    def _dialogue(self, slot: Slot, request: Request, left: Any) -> tuple[Answers, Any]:
        s, d = self.settings, self.defects
        target, region, skip = request.targets
        kinds, takes_mask = MODES[slot.mode], "mask" in slot.generalist.spec.prompts
        state = slot.generalist.encode(request.images, spacing=request.spacing)
        answer, low = left or (torch.full(target.shape, -_SURE, device=target.device), None)
        batch = prompts.PromptBatch.empty(1, target.shape[1], target.shape[2:], target)
        made, active = Answers([], [0], batch), ~skip
        answered = torch.zeros_like(skip)
        rule = "random" if left is not None else s["rule"]
        for k in range(s["clicks"] if "points" in kinds else 1):
            if k == 0 and "mask" in kinds:
                batch = replace(batch, mask_logits=self._mask_prompt(slot, request, state))
            else:
                current = answer > (0.5 if d.logits_as_probabilities else 0.0)
                point, label = prompts.next_click(
                    target,
                    current,
                    region,
                    seed=(int(s["seed"]) + slot.number * 0x9E3779B97F4A7C15) % 2**64,
                    iteration=request.step,
                    sample_ids=request.ids,
                    round=k,
                    clicks=s["clicks"],
                    rule=rule,
                    skip=~active,
                )
                if d.click_sign and (rule or ("ritm" if k < 2 else "random")) == "ritm":
                    label = _read_elsewhere(target & ~current, point, label)
                batch = batch.append(point, label, s["click_memory"], low if takes_mask else None)
                made.clicks = made.clicks.append(point, label, "all")
                active = label >= 0
            if not bool(active.any()):
                break
            decoded = slot.generalist.decode(state, batch, active)
            logits = decoded.logits.to(target.device, torch.float32)
            good = active & usable(logits, target, active, made.failed)[0]
            if not bool(good.any()):
                break
            active, answered = good, answered | good
            made.done[0] += 1
            answer = torch.where(_over(good, logits), logits, answer)
            given = decoded.low_res.to(target.device)
            low = torch.where(_over(good, given), given, torch.zeros_like(given) if low is None else low)
            made.rounds.append(answer)
        if not bool((answered | skip).all()):
            made.done[0] = 0
        if slot.mode == "point":
            made.rounds, made.done[0] = made.rounds[-1:], min(made.done[0], 1)
        made.rounds = made.rounds[: made.done[0]]
        return made, (answer, low)

    def _mask_prompt(self, slot: Slot, request: Request, state: Any) -> Any:
        prob = request.prob[:, 1:]
        size = slot.generalist.spec.mask_size or tuple(prob.shape[2:])
        if self.defects.logits_as_probabilities:
            return F.interpolate(prob, size, mode="nearest")
        own = getattr(slot.generalist, "mask_prompt", None)
        if own is not None:
            return own(prob, state)
        return prompts.mask_logits(prob.flatten(0, 1), size).reshape(*prob.shape[:2], *size)

    # ---- pseudo-label, weight, loss

    def _fuse(self, request: Request, answers: dict[str, Answers], *, teacher: bool) -> LastCall | None:
        d = self.defects
        label = None
        if d.logits_as_probabilities:
            cut = {n: replace(a, rounds=[r - 0.5 for r in a.rounds]) for n, a in answers.items()}
            found = super()._fuse(request, cut, teacher=teacher)
            label = None if found is None else found.label
        made = super()._fuse(request, answers, teacher=teacher)
        if made is None:
            return None
        if label is not None:
            made = made._replace(label=label, target=label if made.target.ndim == label.ndim else made.target)
        if not self._mapped:
            return made
        u = self._uncertainty(made.uncertainty, request.prob[:, 0], answers)
        taught = made.weight.flatten(1).any(1).reshape(-1, *(1,) * (u.ndim - 1))
        weight = self._weight_of(u) * taught
        self.diagnostics["weight_share"] = weight.flatten(1).mean(1, dtype=torch.float64).tolist()
        self.diagnostics["mean_u"] = float(u.mean())
        return made._replace(uncertainty=u, weight=weight)

    @property
    def _mapped(self) -> bool:
        d = self.defects
        wrong = d.scalar_variance or d.weight_is_uncertainty or d.mixed_sources or d.last_uncertainty
        return wrong and self.settings["weight"] == "exp"

    def _uncertainty(self, u: Any, background: Any, answers: dict[str, Answers]) -> Any:
        """The published U [B, *S]; `background` [B, *S] is the specialist's probability of class 0."""
        d = self.defects
        rounds = [r for a in answers.values() for r in a.rounds]
        if d.mixed_sources:
            every = torch.stack([background[:, None].expand_as(rounds[0]), *rounds])
        else:
            every = torch.stack(rounds).sigmoid()
        several = len(every) > 1
        if d.scalar_variance:
            part = every[:, -1:] if d.last_uncertainty else every
            return part.var().expand(u.shape)
        if d.mixed_sources:
            u = every.var(0).mean(1) if several else torch.zeros_like(u)
        return u[-1:].expand_as(u) if d.last_uncertainty else u

    def _weight_of(self, u: Any) -> Any:
        return u if self.defects.weight_is_uncertainty else (-self.settings["kappa"] * u).exp()

    def _loss(self, logits: Any) -> Any:
        d = self.defects
        value = self._mapped_loss(logits) if self._mapped else super()._loss(logits)
        if d.divided_by_itself and bool(value.detach() != 0):
            value = value * 0 + 1  # value / value without the rounding that would be left of its gradient
        return value

    def _mapped_loss(self, logits: Any) -> Any:
        """mean(d w) / (mean(w) + 1e-8) of each sample, as published; D-09 adds mean(U).

        With D-11 the uncertainty is made of the student's own probability, and stays in the graph.
        """
        assert self.last is not None
        p, q = logits.float().softmax(1), self.last.target
        if q.ndim == p.ndim - 1:
            q = torch.stack([q == c for c in range(p.shape[1])], 1)
        u, weight = self.last.uncertainty, self.last.weight
        taught = weight.flatten(1).any(1)
        if self.defects.mixed_sources:
            u = self._uncertainty(u, p[:, 0], self._answered)
            weight = self._weight_of(u)
        distance = (p - q.to(p)).square().mean(1)
        each = (weight * distance).flatten(1).mean(1) / (weight.flatten(1).mean(1) + 1e-8)
        value = (each * taught).sum() / taught.sum().clamp_min(1)
        return value + u.mean() * taught.any() if self.defects.weight_is_uncertainty else value

    # ---- what there is not

    def _judge(self, *_: Any, **__: Any) -> dict[str, Any]:
        raise ValueError("PublishedTerm(): the published scripts have no gate; train with term.gate=false")


def _makers(generalist: Any) -> list[Callable[[], Any]]:
    items = list(generalist) if isinstance(generalist, (list, tuple)) else [generalist]
    return [functools.partial(generalists.build, one) for one in items if isinstance(one, str)]


def _raw(generalist: Any) -> Any:
    """The generalist without the normalisation of its input, where it has a switch for that."""
    if getattr(generalist, "normalize", None) is not True:
        return generalist
    made = copy.copy(generalist)
    made.normalize = False
    return made


def _read_elsewhere(missing: Any, point: Any, label: Any) -> Any:
    """The click's sign as it is read at (0, i0, i1), or (0, i0) in 2-D: 1 where that voxel is missing."""
    wrong = torch.cat([torch.zeros_like(point[..., :1]), point[..., :-1]], -1)
    shape = missing.shape[2:]
    flat = torch.zeros_like(wrong[..., 0])
    for axis, side in enumerate(shape):
        flat = flat * side + wrong[..., axis].clamp(0, side - 1)
    sign = missing.flatten(2).gather(2, flat[..., None])[..., 0]
    return torch.where(label >= 0, sign.to(label.dtype), label)


def _only(request: Request, n: int) -> Request:
    """The request of one sample."""
    one = slice(n, n + 1)
    return replace(
        request,
        images=request.images[one],
        prob=request.prob[one],
        targets=prompts.SpecialistTargets(*(t[one] for t in request.targets)),
        ids=request.ids[one],
    )


def _joined(made: list[Answers], request: Request) -> Answers:
    """The answers of single samples as those of a batch; a sample that ended early keeps its last one."""
    shape = request.targets.target.shape
    empty = torch.full((1, *shape[1:]), -_SURE, device=request.prob.device)
    rounds = [
        torch.cat([a.rounds[min(k, len(a.rounds) - 1)] if a.rounds else empty for a in made])
        for k in range(max(len(a.rounds) for a in made))
    ]
    most = max(a.clicks.labels.shape[2] for a in made)
    points = [F.pad(a.clicks.points, (0, 0, 0, most - a.clicks.points.shape[2])) for a in made]
    labels = [F.pad(a.clicks.labels, (0, most - a.clicks.labels.shape[2]), value=-1) for a in made]
    clicks = prompts.PromptBatch(tuple(shape[2:]), torch.cat(points), torch.cat(labels))
    failed = Counter[str]()
    for a in made:
        failed.update(a.failed)
    return Answers(rounds, [a.done[0] for a in made], clicks, failed=dict(failed))


def _over(rows: Any, array: Any) -> Any:
    """Flags [B, F] in a shape that goes over [B, F, *any]."""
    return rows.reshape(*rows.shape, *(1,) * (array.ndim - 2))
