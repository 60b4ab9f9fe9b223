# SPDX-License-Identifier: Apache-2.0
"""The position prior of labeled scans: its formula, its invariances, and the gate that judges it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from test_offline import OFFLINE
from test_trainer import losses, settings

from semisam.engine import gate, offline, trainer
from semisam.engine.cases import find_cases
from semisam.engine.cases import split as make_split
from semisam.engine.phantom import write_phantoms
from semisam.engine.position import FLOOR, PositionPrior
from semisam.engine.preprocess import Preprocessing
from semisam.term import SemiSAMTerm


def ball(shape, centre, radius):
    grid = np.indices(shape)
    inside = ((grid - np.array(centre).reshape(-1, *(1,) * len(shape))) ** 2).sum(0) < radius**2
    return inside.astype(np.uint8)


def reference(labels, classes, strength, prob, tau=1.5):
    """The formula with SciPy's distances, for labels of one shape."""
    signed = []
    for c in range(1, classes):
        each = [
            ndimage.distance_transform_edt(m) - ndimage.distance_transform_edt(~m)
            for m in (label == c for label in labels)
        ]
        signed.append(np.mean(each, 0))
    e = np.exp(np.clip(np.stack([np.zeros(labels[0].shape), *signed]) / tau, -30, 30))
    made = np.maximum(prob, 1e-4) * np.maximum(e / e.sum(0), FLOOR) ** strength
    return made / made.sum(0)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_it_is_the_formula(rng, strength):
    shape = (12, 14, 10)
    labels = [ball(shape, (5 + k, 6, 5), 4) for k in range(3)]
    for label in labels:
        label[:, 7:] *= 2
    prob = rng.dirichlet((1, 1, 1), shape).transpose(3, 0, 1, 2).astype(np.float32)
    found = PositionPrior(labels, 3, strength=strength).sharpen(prob)
    assert np.allclose(found, reference(labels, 3, strength, prob), rtol=1e-3, atol=1e-5)
    assert np.allclose(found.sum(0), 1, atol=1e-5)


def test_scans_of_other_shapes_are_laid_over_one_another():
    """The same scene at twice the resolution has the same prior, up to interpolation at the border."""
    small, large = ball((16, 16, 16), (7.5,) * 3, 5), ball((32, 32, 32), (15.5,) * 3, 10)
    one, two = PositionPrior([small], 2), PositionPrior([small, small, large], 2)
    assert two.at((24, 20, 16)).shape == (2, 24, 20, 16)
    agree = (one.at((16,) * 3)[1] > 0.5) == (two.at((16,) * 3)[1] > 0.5)
    assert agree.mean() > 0.97
    assert ((two.at((32,) * 3)[1] > 0.5) == large).mean() > 0.97


@pytest.mark.parametrize("value", [0, 1])
def test_a_class_that_is_nowhere_or_everywhere_stays_finite(value):
    label = np.full((8, 8), value, np.uint8)
    prior = PositionPrior([label, label], 2)
    assert np.isfinite(prior.at((8, 8))).all()
    assert ((prior.at((8, 8))[1] > 0.5) == value).all()
    even = prior.sharpen(np.full((2, 8, 8), 0.5, np.float32))
    assert np.isfinite(even).all()
    sure = np.stack([np.full((8, 8), 0.001 if value == 0 else 0.999), np.full((8, 8), 0.999 - 0.998 * value)])
    assert (prior.sharpen(sure)[1 - value] > 0.05).all(), "a specialist that is sure can win"


def test_no_labels_are_refused():
    with pytest.raises(ValueError, match="labels: expected at least one"):
        PositionPrior([], 2)


# ---- the gate -----------------------------------------------------------------------------------


def held_out(good):
    """A scan whose prediction with the prior is better (or worse) than the one without."""
    truth = ball((32, 32), (16, 16), 8)
    rough = np.roll(truth, 4, 0)

    def prob(mask):
        return np.stack([1 - mask, mask]).astype(np.float32) * 0.8 + 0.1

    image = np.random.default_rng(0).random((1, 32, 32)).astype(np.float32)
    first, second = (rough, truth) if good else (truth, rough)
    return gate.HeldOut(image, prob(first), truth, None, "a", prob(second))


@pytest.mark.parametrize("good", [True, False])
def test_the_prior_is_used_where_it_is_better(good):
    term = SemiSAMTerm(total_steps=10)
    found = gate.choose(term, [held_out(good)])
    assert found["position_prior"] is good
    other = found["without_prior" if good else "with_prior"]
    assert max(found["scores"].values()) > max(other.values())
    assert term.gate.report()["scores"] == found["scores"]  # the term is in the state of what was chosen
    assert ("without the position prior" if good else "with the position prior") in gate.sentence(found)


def test_without_a_prior_nothing_is_compared():
    scan = held_out(True)
    scan.sharpened = None
    found = gate.choose(SemiSAMTerm(total_steps=10), [scan])
    assert found["position_prior"] is False
    assert "prior" not in gate.sentence(found)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantoms")
    return write_phantoms(root, labeled=4, unlabeled=3, test=0, shape=(20, 20, 20))


def test_a_fold_never_sees_its_own_label(data, monkeypatch):
    """The prior of a held-out scan is made of the others' labels alone."""
    made = settings(
        data, term__offline=True, term__offline_start=2, term__position_prior=1.0, data__labeled=3
    )
    roles = make_split(find_cases(data), made.data)
    given = []
    real = PositionPrior.__init__

    def spied(self, labels, *arguments, **options):
        given.append([label.tobytes() for label in labels])
        real(self, labels, *arguments, **options)

    monkeypatch.setattr(PositionPrior, "__init__", spied)
    from semisam.engine.stepper import fabric_for  # noqa: PLC0415

    meta = {"channels": 1, "num_classes": 2}
    scans = list(gate.held_out(made, roles, Preprocessing(), meta, fabric_for(made.train)))
    assert len(scans) == len(given) == 3
    for scan, labels in zip(scans, given, strict=True):
        assert len(labels) == 2
        assert scan.label.tobytes() not in labels
        assert scan.sharpened.shape == scan.probability.shape


@pytest.mark.parametrize("judged", [True, False])
def test_a_run_with_a_prior(data, tmp_path, judged):
    torch.set_num_threads(1)
    made = settings(data, **{**OFFLINE, "term__position_prior": 1.0, "term__gate": judged, "train__steps": 6})
    seen = []
    real = offline.label_scans

    def spied(*arguments, prior=None, **options):
        seen.append(prior)
        real(*arguments, prior=prior, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offline, "label_scans", spied)
        run = trainer.train(made, tmp_path / "r").out
    assert len(losses(run)) == 6
    import json  # noqa: PLC0415

    found = json.loads((run / "run.json").read_text())["gate"]
    assert [prior is not None for prior in seen] == [found["position_prior"] if judged else True]
