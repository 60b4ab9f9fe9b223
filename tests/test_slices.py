# SPDX-License-Identifier: Apache-2.0
"""2-D generalists about volumes: which slices are asked, with what, and where the answers go."""

from __future__ import annotations

import pytest
import torch
from generalist_fakes import EVERY_PROMPT, Fake

from semisam import SemiSAMTerm, prompts
from semisam._dialogue import Request, Slot
from semisam.generalists import Decoded, GeneralistSpec

SHAPE = (6, 7, 8)
SETTINGS = SemiSAMTerm(total_steps=10, clicks=3).settings


class Slices:
    """Answers with the images themselves, +-6 around 0.5, after `wrong` pixels were turned in round 0."""

    def __init__(self, axis, *, bad=None, wrong=0.0):
        takes = {"prompts": EVERY_PROMPT, "default_mode": "point", "slice_axis": axis}
        self.spec = GeneralistSpec("slices", spatial_dims=(2,), **takes)
        self.bad, self.wrong = bad, wrong
        self.images, self.asked, self.spacing = None, [], None

    def encode(self, images, *, spacing=None):
        self.images, self.asked, self.spacing = images, [], spacing
        return images

    def decode(self, state, batch, active=None):
        self.asked.append((batch, active.clone()))
        inside = state > 0.5
        if len(self.asked) == 1:
            turned = torch.rand(state.shape, generator=torch.Generator().manual_seed(1)) < self.wrong
            inside = inside ^ turned
        logits = torch.where(inside, 6.0, -6.0).expand(-1, batch.labels.shape[1], -1, -1).clone()
        if self.bad is not None:
            logits[(state == self.bad).flatten(1).any(1)] = float("nan")
        return Decoded(logits, torch.zeros_like(logits))


def boxes():
    """Targets [B, F, *SHAPE]: boxes of different extents, and images that show class 1 of each."""
    target = torch.zeros(2, 2, *SHAPE, dtype=torch.bool)
    target[0, 0, 1:4, 2:5, 3:6] = True
    target[0, 1, 2:5, 5:7, 0:3] = True
    target[1, 0, 4:6, 1:3, 6:8] = True
    return target, target[:, :1].float()


def ask(generalist, mode, target, images, *, spacing=None, skip=None):
    skip = ~target.flatten(2).any(2) if skip is None else skip
    prob = torch.where(target, 0.8, 0.1)
    prob = torch.cat([1 - prob.sum(1, keepdim=True).clamp_max(0.99), prob], 1)
    targets = prompts.SpecialistTargets(target, torch.ones_like(target), skip)
    request = Request(images, prob, targets, 5, list(range(len(target))), spacing)
    return Slot("slices", generalist, mode, 0).ask(request, SETTINGS)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("mode", ["point", "unc", "mask", "mixed", "box"])
def test_slices_that_show_a_class_are_asked_and_put_back(axis, mode):
    target, images = boxes()
    model = Slices(axis)
    made = ask(model, mode, target, images, spacing=(1.0, 2.0, 3.0))
    shown = target.any(1).movedim(1 + axis, 1).flatten(2).any(2)
    assert torch.equal(model.images[:, 0], images[:, 0].movedim(1 + axis, 1)[shown])
    assert model.spacing == tuple(s for i, s in enumerate((1.0, 2.0, 3.0)) if i != axis)
    answer = made.rounds[-1]
    expected = torch.where(images > 0.5, 6.0, -6.0).expand_as(target)
    each = target.movedim(2 + axis, 2).flatten(3).any(3)  # [B, F, slices]
    there = each.reshape(*each.shape, 1, 1).movedim(2, 2 + axis)
    assert torch.equal(answer, torch.where(there, expected, -10.0))
    assert made.done[1] >= 1
    assert answer.is_contiguous()


def test_every_slice_has_its_own_prompts():
    target, images = (a[:1, :1] for a in boxes())
    model = Slices(0)
    ask(model, "mixed", target, images)
    batch, active = model.asked[0]
    assert batch.shape == SHAPE[1:]
    assert batch.boxes.shape == (3, 1, 4)  # slices 1, 2, 3
    assert torch.equal(batch.boxes, prompts.boxes(target[0, :, 1:4].transpose(0, 1))[0])
    prob = torch.where(target, 0.8, 0.1)[0, 0, 1:4]
    assert torch.equal(batch.mask_logits[:, 0], prompts.mask_logits(prob, SHAPE[1:]))
    assert active.all()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_clicks_lie_in_their_slices_of_the_volume(axis):
    target, images = boxes()
    model = Slices(axis, wrong=0.3)
    made = ask(model, "unc", target, images)
    points, labels = made.clicks.points, made.clicks.labels
    assert made.clicks.shape == SHAPE
    assert points.shape[:2] == (2, 2)
    first = 0
    for b in range(2):
        for c in range(2):
            for point, label in zip(points[b, c], labels[b, c], strict=True):
                if label >= 0:
                    first += 1
                    assert target[b, c].movedim(axis, 0)[point[axis]].any()
    sent = sum(int((batch.labels[active] >= 0).sum()) for batch, active in model.asked)
    assert first == sent > 8
    # The first click of a slice is inside its target.
    batch, active = model.asked[0]
    inside = target.movedim(2 + axis, 1).flatten(0, 1)
    kept = inside[inside.flatten(1).any(1)]
    for row, c in active.nonzero().tolist():
        assert kept[row, c][tuple(batch.points[row, c, 0].tolist())]


def test_clicks_differ_between_slices_and_not_by_the_batch():
    target = torch.ones(2, 1, 4, 9, 9, dtype=torch.bool)
    model = Slices(0)
    shown = torch.rand(2, 1, 4, 9, 9, generator=torch.Generator().manual_seed(0))
    both = ask(model, "point", target, shown)
    first = model.asked[0][0].points[:, 0, 0]
    assert len({tuple(p) for p in first.tolist()}) > 4
    alone = ask(model, "point", target[:1], shown[:1])
    assert torch.equal(model.asked[0][0].points[:, 0, 0], first[:4])
    assert torch.equal(both.rounds[0][:1], alone.rounds[0])


def test_a_slice_without_an_answer_takes_its_volume_out():
    target, images = boxes()
    images[1, 0, 5, 0, 0] = 77.0
    made = ask(Slices(0, bad=77.0), "unc", target, images)
    assert made.failed == {"are not finite": 1}
    assert made.done[0] > 0
    assert made.done[1] == 0
    assert made.rounds[-1].isfinite().all()


def test_a_constant_slice_is_an_answer_and_a_constant_volume_is_none():
    target, images = boxes()
    images[1] = 0
    made = ask(Slices(0), "mask", target[:, :1], images)
    assert made.done == [1, 0]
    assert made.failed == {"are the same in every voxel": 1}
    assert len(made.rounds) == 1
    assert ask(Slices(0), "mask", target[1:, :1], images[1:]).rounds == []
    images[0, 0, 2] = 0
    assert ask(Slices(0), "mask", target[:, :1], images).done == [1, 0]


def test_a_volume_has_the_rounds_of_its_slice_with_the_most():
    target, images = boxes()
    one = ask(Slices(0), "unc", target[:, :1], images)
    assert one.done == [1, 1]  # right at once: converged
    two = ask(Slices(0, wrong=0.3), "unc", target[:, :1], images)
    assert two.done == [2, 2]
    assert len(two.rounds) == 2


def test_nothing_to_ask():
    target, images = boxes()
    model = Slices(0)
    made = ask(model, "unc", torch.zeros_like(target), images)
    assert made.rounds == []
    assert made.done == [0, 0]
    assert made.clicks.points.shape == (2, 2, 0, 3)
    assert model.images is None
    some = ask(model, "unc", target, images, skip=torch.tensor([[True, True], [False, True]]))
    assert some.done[0] == 0
    assert some.done[1] > 0
    assert len(model.images) == 2


def test_the_term_fuses_slices_with_other_generalists():
    target, images = boxes()
    prob = torch.where(target, 0.45, 0.02)
    prob = torch.cat([1 - prob.sum(1, keepdim=True), prob], 1)
    prob[:, 1:][target] = 0.9
    prob = prob / prob.sum(1, keepdim=True)
    images = target.any(1, keepdim=True).float()
    truth = images.bool().expand_as(target)
    term = SemiSAMTerm(
        [Slices(1), Fake(truth)], total_steps=10, mode=["unc", "mask"], sample_gate=0.0, warmup=0.0
    )
    logits = prob.log().requires_grad_()
    loss = term(images, logits, step=2)
    loss.backward()
    assert float(loss.detach()) > 0
    assert bool(logits.grad.any())
    assert term.last.answers["slices"].shape == target.shape
    assert term.diagnostics["dropped"] == {}
    picture = term.last.picture(0)
    assert picture["clicks"].shape[1] == 4
    assert term.diagnostics["clicks"] == len(picture["clicks"]) + len(term.last.picture(1)["clicks"])


def test_dimensions_that_do_not_fit_are_refused():
    volume, flat = torch.zeros(1, 1, 4, 6, 6), torch.zeros(1, 1, 6, 6)
    logits = {x: torch.cat([-x, x + 1], 1).requires_grad_() for x in (volume, flat)}
    only_2d = Fake(volume.bool(), spatial_dims=(2,))
    with pytest.raises(ValueError, match=r"fake takes 2-D images, got 3-D ones of shape \(4, 6, 6\)"):
        SemiSAMTerm(only_2d, total_steps=10)(volume, logits[volume], step=5)
    only_3d = Fake(flat.bool(), spatial_dims=(3,))
    with pytest.raises(ValueError, match=r"fake takes 3-D images, got 2-D ones of shape \(6, 6\)"):
        SemiSAMTerm(only_3d, total_steps=10)(flat, logits[flat], step=5)
