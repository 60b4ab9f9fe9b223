# SPDX-License-Identifier: Apache-2.0
"""The leaky reference: no defect is the term itself, and every defect does what it says, alone."""

from __future__ import annotations

import warnings
from dataclasses import fields

import pytest
import torch

from semisam.published import BUNDLES, Defects, PublishedDefects, PublishedTerm
from semisam.term import SemiSAMTerm

pytestmark = pytest.mark.usefixtures("one_thread")

TOTAL, STEP, IDS = 100, 50, [7, 8, 9]
NAMES = [f.name for f in fields(Defects)]


def scene(classes=2, side=16, dims=3):
    """Images with a bright block, a student that has most of it, and where the block is."""
    generator = torch.Generator().manual_seed(3)
    label = torch.zeros(3, *(side,) * dims, dtype=torch.uint8)
    for n in range(3):
        label[(n, *(slice(3 + n, 11 + n),) * dims)] = 1
        if classes > 2:
            label[(n, *(slice(3 + n, 7 + n),) * dims)] = 2
    image = label[:, None].float() + 0.1 * torch.randn(3, 1, *(side,) * dims, generator=generator)
    hot = torch.stack([label == c for c in range(classes)], 1).float()
    logits = 3 * hot.roll(2, 2) + 0.5 * torch.randn(hot.shape, generator=generator)
    return image, logits, label


def made(*defects, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PublishedDefects)
        return PublishedTerm(total_steps=TOTAL, defects=defects, clicks=3, **options)


def run(term, scene=None, labels=None):
    image, logits, label = scene or SCENE
    if isinstance(term, PublishedTerm):
        term.open_labels(lambda ids: (label if labels is None else labels)[[IDS.index(i) for i in ids]])
    logits = logits.clone().requires_grad_()
    loss = term(image, logits, step=STEP, sample_ids=IDS)
    loss.backward()
    return loss.detach(), logits.grad


SCENE = scene()


@pytest.mark.parametrize("mode", ["point", "unc", "mask", "mixed"])
@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize(("classes", "dims"), [(2, 3), (3, 3), (2, 2)])
def test_without_defects_it_is_the_reference_preset(mode, one_by_one, classes, dims, monkeypatch):
    """And the dialogue of its own, one sample after the other, is the batch's."""
    given = scene(classes, dims=dims)
    term = made(mode=mode)
    if one_by_one:
        monkeypatch.setattr(term, "_answers", lambda r: {s.name: term._one_by_one(s, r) for s in term._slots})
    plain = SemiSAMTerm(total_steps=TOTAL, preset="ref", clicks=3, mode=mode, box=False)
    (a, ga), (b, gb) = run(term, given), run(plain, given)
    assert a > 0
    assert torch.equal(a, b)
    assert torch.equal(ga, gb)
    for name, batch in plain.last.clicks.items():
        assert torch.equal(term.last.clicks[name].points, batch.points)
    assert term.diagnostics["rounds"] == plain.diagnostics["rounds"]


# What cannot show with the random walker on scans of equal spacing.
SILENT = {"reloading", "raw_input"}


@pytest.mark.parametrize("name", [n for n in NAMES if n not in SILENT])
def test_every_defect_alone_changes_the_gradient(name):
    _, before = run(made())
    _, after = run(made(name))
    assert not torch.equal(before, after)
    assert after.isfinite().all()


def test_only_labels_make_a_difference_with_d01():
    other = SCENE[2].roll(5, 1)
    for name in NAMES:
        same = torch.equal(run(made(name))[1], run(made(name), labels=other)[1])
        assert same == (name != "label_clicks"), name
    term = made("D-01")
    with pytest.raises(ValueError, match="open_labels"):
        term(SCENE[0], SCENE[1], step=STEP)


def test_d02_asks_for_the_background():
    term = made("D-02")
    run(term)
    background = SCENE[1].softmax(1)[:, :1]
    assert torch.equal(term.last.prompt_target, background >= 0.5)


def test_d02b_is_everywhere():
    term = made("D-02b")
    run(term)
    assert term.last.prompt_target.all()
    labels = term.last.clicks["random-walker"].labels
    assert (labels == 1).any()
    assert not (labels == 0).any()  # there is nothing false to take away


def test_d03_reads_the_sign_elsewhere():
    right, wrong = made(), made("D-03")
    run(right)
    run(wrong)
    a, b = (t.last.clicks["random-walker"] for t in (right, wrong))
    assert torch.equal(a.points[:, :, 0], b.points[:, :, 0])  # the same place
    assert (a.labels[:, :, 0] == 1).all()
    n0, n1, _ = a.points[0, 0, 0].tolist()
    expected = bool(right.last.prompt_target[0, 0, 0, n0, n1])
    assert b.labels[0, 0, 0].item() == int(expected) == 0


def test_d04_is_one_number():
    term = made("D-04")
    run(term)
    assert len(term.last.uncertainty.unique()) == 1
    assert term.last.uncertainty.unique() > 0


def test_d05_begins_with_the_mask_of_the_sample_before():
    """Alone a sample is what it is in any batch, but for this defect."""
    image, logits, label = SCENE

    def of_second(term, first):
        term.open_labels(lambda ids: label[[IDS.index(i) for i in ids]])
        keep = [0, 1] if first else [1]
        term(image[keep], logits[keep], step=STEP, sample_ids=[IDS[k] for k in keep])
        return term.last.clicks["random-walker"].points[-1]

    assert torch.equal(of_second(made(), True), of_second(made(), False))
    assert not torch.equal(of_second(made("D-05"), True), of_second(made("D-05"), False))
    assert torch.equal(of_second(made("D-05"), False), of_second(made(), False))


def test_d06_makes_masks_smaller_and_mask_prompts_wrong():
    right, wrong = made(), made("D-06")
    run(right)
    run(wrong)
    assert 0 < (wrong.last.label > 0).sum() < (right.last.label > 0).sum()
    term = made("D-06", mode="mask")
    request = term._request(SCENE[0], SCENE[1].softmax(1), 0, IDS, None)
    sent = term._mask_prompt(term._slots[0], request, None)
    assert 0 <= sent.min() < sent.max() <= 1


def test_d07_builds_in_every_step():
    built = []

    def make():
        built.append(1)
        return plain.generalists["random-walker"]

    plain = SemiSAMTerm(total_steps=TOTAL)
    term = made("D-07", generalist=plain.generalists["random-walker"], makers=[make])
    a = run(term)[1]
    b = run(term)[1]
    assert len(built) == 2
    assert torch.equal(a, b)
    assert torch.equal(a, run(made())[1])
    with pytest.raises(ValueError, match="makers"):
        made("D-07", generalist=plain.generalists["random-walker"])


def test_d08_leaves_normalisation_and_spacing_out():
    class Keeps:
        def __init__(self, inner):
            self.inner, self.spec, self.normalize, self.seen = inner, inner.spec, True, []

        def encode(self, images, *, spacing=None):
            self.seen.append((self.normalize, spacing))
            return self.inner.encode(images, spacing=spacing)

        def decode(self, *arguments):
            return self.inner.decode(*arguments)

    for defects, expected in (((), (True, (1.0, 1.0, 3.0))), (("D-08",), (False, None))):
        keeps = Keeps(SemiSAMTerm(total_steps=TOTAL).generalists["random-walker"])
        term = made(*defects, generalist=keeps)
        term(SCENE[0], SCENE[1], step=STEP, sample_ids=IDS, spacing=(1.0, 1.0, 3.0))
        assert keeps.seen == [expected]
        assert keeps.normalize is True  # another's object is not touched


def test_d09_favours_what_is_uncertain():
    right, wrong = made(), made("D-09")
    run(right)
    run(wrong)
    u = right.last.uncertainty
    assert u.max() > 0.1
    assert torch.allclose(right.last.weight, (-u).exp())
    assert torch.equal(wrong.last.weight, u)


def test_d10_has_no_gradient():
    loss, gradient = run(made("D-10"))
    assert loss > 0
    assert not gradient.any()
    for bundle in ("semisam+", "all"):
        assert not run(made(bundle))[1].any()
    assert run(made("semisam", mode="point"))[1].any()


def test_d11_trains_the_student_through_its_uncertainty():
    term = made("D-11")
    _, gradient = run(term)
    # In double precision by hand, with the weights in the graph.
    z = SCENE[1].double().requires_grad_()
    p = z.softmax(1)
    rounds = torch.stack(term._answered["random-walker"].rounds)[:, :, 0].double()
    u = torch.cat([p[None, :, 0], rounds]).var(0)
    w = (-u).exp().flatten(1)
    q = torch.stack([term.last.target == c for c in (0, 1)], 1).double()
    d = (p - q).square().mean(1).flatten(1)
    ((w * d).mean(1) / (w.mean(1) + 1e-8)).mean().mul(term.factor(STEP)).backward()
    assert gradient.any()
    assert torch.allclose(gradient.double(), z.grad, rtol=1e-3, atol=1e-9)


def test_d12_gives_all_the_last_one():
    right, wrong = made(), made("D-12")
    run(right)
    run(wrong)
    for n in range(3):
        assert torch.equal(wrong.last.uncertainty[n], right.last.uncertainty[-1])


def test_names_numbers_and_bundles():
    assert Defects.of("all").names == tuple(NAMES)
    assert Defects().names == Defects.of("none").names == Defects.of([]).names == ()
    assert Defects.of("D-02b") == Defects.of(["soft_target"]) == Defects(soft_target=True)
    assert set(BUNDLES["semisam"]) | set(BUNDLES["semisam+"]) == set(NAMES)
    assert Defects.of("all").numbers == (
        *("D-01", "D-02", "D-02b", "D-03", "D-04", "D-05", "D-06"),
        *("D-07", "D-08", "D-09", "D-10", "D-11", "D-12"),
    )
    with pytest.raises(
        ValueError, match=r"defects: expected some of none.*D-01 \(label_clicks\).*got 'D-99'"
    ):
        Defects.of("D-99")


def test_it_says_so_loudly_and_has_no_gate():
    with pytest.warns(
        PublishedDefects, match="on purpose: D-01 clicks and their targets come from the labels"
    ):
        PublishedTerm(total_steps=TOTAL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        term = PublishedTerm(total_steps=TOTAL, defects="none")
    with pytest.raises(ValueError, match="no gate"):
        term.calibrate(SCENE[0], SCENE[1].softmax(1), SCENE[2])
    with pytest.raises(TypeError, match="preset"):
        PublishedTerm(total_steps=TOTAL, preset="plus")
    with pytest.raises(ValueError, match="weight: expected exp or none"):
        made("D-09", weight="linear")


def test_nothing_to_see_is_no_error():
    """No foreground anywhere: exactly 0, whatever is on, but for those that make up a target."""
    image, logits, label = SCENE
    none = torch.stack([torch.full_like(logits[:, 0], 9.0), torch.full_like(logits[:, 0], -9.0)], 1)
    for name in ("click_sign", "carried_state", "divided_by_itself", "mixed_sources", "label_clicks"):
        loss, gradient = run(made(name), (image, none, torch.zeros_like(label)))
        assert loss == 0, name
        assert not gradient.any()
    assert run(made("all"), (image, none, label))[0].isfinite()
