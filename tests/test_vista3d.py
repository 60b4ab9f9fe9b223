# SPDX-License-Identifier: Apache-2.0
"""VISTA3D as a generalist: MONAI's own classes with small random weights, on the whole path."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_term import STEP, make, scene, student
from test_term_device import TOTAL, Deterministic, both, same
from test_term_device import scene as device_scene
from watched import Waited, watched

from semisam import SemiSAMTerm, generalists, ops
from semisam.generalists import licences, vista3d
from semisam.generalists.vista3d import Vista3D
from semisam.prompts import PromptBatch

monai = pytest.importorskip("monai.networks.nets.vista3d")

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = (20, 24, 18)


def small():
    """MONAI's network, with 8 channels instead of 48."""
    from monai.networks.nets.segresnet_ds import SegResNetDS2  # noqa: PLC0415

    torch.manual_seed(0)
    encoder = SegResNetDS2(
        in_channels=1, blocks_down=(1, 1, 1), norm="instance", out_channels=8, init_filters=8, dsdepth=1
    )
    points = monai.PointMappingSAM(feature_size=8, n_classes=512, last_supported=132)
    classes = monai.ClassMappingClassify(n_classes=512, feature_size=8)
    return monai.VISTA3D(image_encoder=encoder, class_head=classes, point_head=points)


@pytest.fixture(scope="module")
def network():
    return small()


@pytest.fixture
def images(rng):
    return torch.from_numpy(rng.random((2, 1, *SHAPE), np.float32))


def clicks(labels, seed=1, shape=SHAPE):
    """Random points with these labels [B, F, K]."""
    labels = torch.tensor(labels)
    points = np.random.default_rng(seed).integers(0, shape, (*labels.shape, 3))
    return PromptBatch(shape, torch.from_numpy(points), labels)


def padded(images):
    return torch.nn.functional.pad(images, (0, 2, 0, 0, 0, 0))  # 18 -> 20: two halvings


# ---- the network --------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [None, (3, 25), (200, -1)])
def test_logits_are_those_of_the_network_itself(network, images, classes):
    """VISTA3D.forward on the padded image, one sample at a time, with labels written out by hand."""
    made = Vista3D(network=network, classes=classes, window=(0, 1))
    batch = clicks([[[1, 0], [1, 1]], [[0, 1], [1, 0]]])
    answer = made.decode(made.encode(images), batch)
    numbers = torch.tensor(classes or (-1, -1))[:, None]
    for b in range(2):
        labels = batch.labels[b].clone()
        if classes and 25 in classes:
            labels[1] += 2  # a hepatic vessel
        with torch.no_grad():
            expected = network(
                padded(images[b : b + 1]),
                point_coords=batch.points[b].float(),
                point_labels=labels,
                prompt_class=numbers,
            )
        torch.testing.assert_close(answer.logits[b], expected[:, 0, :, :, : SHAPE[2]], atol=1e-5, rtol=0)
    assert torch.equal(answer.logits, answer.low_res)
    assert not answer.logits.requires_grad


def test_class_numbers_matter(network, images):
    batch = clicks([[[1, 0]], [[1, 1]]])
    found = {
        number: made.decode(made.encode(images), batch).logits
        for number in (-1, 3, 25, 200)
        for made in [Vista3D(network=network, classes=[number])]
    }
    assert torch.equal(found[-1], found[3])  # not said which, or one that is known
    assert not torch.equal(found[3], found[25])
    assert not torch.equal(found[3], found[200])


def test_special_classes_are_those_of_monai(network):
    labels = torch.tensor([[1, 0, -1]] * 140)
    wanted = network.convert_point_label(labels.clone(), list(range(140)))
    batch = PromptBatch((8, 8, 8), torch.zeros(1, 140, 3, 3, dtype=torch.int64), labels[None])
    assert torch.equal(batch.to_vista3d(range(140), vista3d._SPECIAL)[0]["point_labels"], wanted)


def test_rows_and_padding(network, images):
    """Rows not asked for hold -10; a row's answer depends neither on padding nor on its neighbours."""
    made = Vista3D(network=network)
    batch = clicks([[[-1, 1], [1, -1]], [[1, 0], [-1, -1]]])
    active = torch.tensor([[True, True], [True, False]])
    answer = made.decode(made.encode(images), batch, active).logits
    assert (answer[1, 1] == -10).all()
    for b, f, columns in ((0, 0, [1]), (0, 1, [0]), (1, 0, [0, 1])):
        one = PromptBatch(
            SHAPE, batch.points[b, f, columns][None, None], batch.labels[b, f, columns][None, None]
        )
        alone = made.decode(made.encode(images[b : b + 1]), one).logits
        torch.testing.assert_close(answer[b, f], alone[0, 0], atol=1e-5, rtol=0)


def test_preparation(network, images):
    made = Vista3D(network=network)
    batch = clicks([[[1]], [[1]]])
    plain = made.decode(made.encode(images), batch).logits
    other = made.decode(made.encode(torch.cat([images * 700 - 300] * 2, 1)), batch).logits
    torch.testing.assert_close(
        plain, other, atol=1e-3, rtol=0
    )  # percentiles of each image, channels averaged
    low, high = np.percentile(images[0].numpy(), [1, 99], method="nearest")
    fixed = Vista3D(network=network, window=(float(low), float(high)))
    torch.testing.assert_close(
        fixed.decode(fixed.encode(images), batch).logits[0], plain[0], atol=1e-5, rtol=0
    )
    flat = made.encode(torch.full_like(images, 3.0))
    assert all(f.isfinite().all() for f in flat.features)


def test_resampling_moves_clicks_with_the_image(network, images):
    made = Vista3D(network=network, resample_mm=1.5, window=(0, 1))
    fine = images.repeat_interleave(2, 2)  # twice as many slices of half the thickness
    state = made.encode(fine, spacing=(0.75, 1.5, 1.5))
    assert state.resampled == SHAPE
    assert made.encode(fine).resampled == fine.shape[2:]
    at = torch.tensor([[[[10, 4, 5]]], [[[31, 20, 7]]]])
    seen = []
    head = network.point_head
    original = head.forward
    head.forward = lambda out, points, *a, **k: (seen.append(points), original(out, points, *a, **k))[1]
    try:
        answer = made.decode(state, PromptBatch(fine.shape[2:], at, torch.ones(2, 1, 1, dtype=torch.int64)))
    finally:
        head.forward = original
    assert answer.logits.shape == (2, 1, *fine.shape[2:])
    assert [p[0, 0].tolist() for p in seen] == [[4.75, 4, 5], [15.25, 20, 7]]


def test_half_precision(network, images):
    batch = clicks([[[1]], [[1]]])
    exact, half = (
        made.decode(made.encode(images), batch).logits
        for made in (Vista3D(network=network), Vista3D(network=network, precision="bfloat16"))
    )
    assert half.dtype == torch.float32
    assert not torch.equal(exact, half)
    assert (exact - half).abs().max() < 0.1 * exact.abs().max()


# ---- weights ------------------------------------------------------------------------------------


def test_published_files_load_and_their_licence_is_told_once(network, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(monai, "vista3d132", lambda in_channels: small())
    monkeypatch.setattr(licences, "_told", set())
    torch.save(network.state_dict(), tmp_path / "model.pt")
    made = [generalists.build("vista3d", checkpoint=tmp_path / "model.pt") for _ in range(2)]
    assert made[0].files == (tmp_path / "model.pt",)
    assert not any(p.requires_grad for p in made[0].network.parameters())
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert told[0].startswith("vista3d: licence of the weights: NVIDIA")
    state = network.state_dict()
    state.pop("point_head.mask_tokens.weight")
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(
        ValueError, match=r"Vista3D\(\): checkpoint: .* missing: point_head.mask_tokens.weight"
    ):
        Vista3D(tmp_path / "other.pt")


def test_monai_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "monai.networks.nets.vista3d", None)
    error = ModuleNotFoundError("No module named 'monai'", name="monai")

    def missing(name):
        raise error

    monkeypatch.setattr(vista3d.importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"needs MONAI 1.4 or newer, .* pip install 'semisam\[train\]'"):
        Vista3D(tmp_path / "model.pt")


# ---- in the term --------------------------------------------------------------------------------


def test_the_whole_path(network):
    images, _, prob = scene(classes=3)
    images.requires_grad_()
    logits = student(prob)
    term = make(Vista3D(network=network, classes=(3, 25)), clicks=3, sample_gate=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = term(images, logits, prob, step=STEP)
    loss.backward()
    assert loss > 0
    assert logits.grad.any()
    assert images.grad is None
    assert not any(p.grad is not None for p in network.parameters())
    assert term.settings["mode"] == ["unc"]
    assert max(term.diagnostics["rounds"]["vista3d"]) == 3
    with pytest.raises(ValueError, match="takes prompts for 2 foreground classes at most, got 3"):
        term.check(3, 3)
    with pytest.raises(ValueError, match="takes 3-D images, got 2-D"):
        term.check(2, 1)


def test_every_click_so_far_is_sent(network):
    """Without a mask prompt the clicks are its only memory, whatever click_memory says."""
    images, _, prob = scene()
    made = Vista3D(network=network)
    counts = []
    decode = made.decode
    made.decode = lambda s, p, a: (counts.append(p.points.shape[2]), decode(s, p, a))[1]
    make(made, clicks=3)(images, student(prob), prob, step=STEP)
    assert counts == [1, 2, 3]


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"network": None}, "checkpoint: expected the file with the weights of vista3d .* got neither"),
        ({"checkpoint": "a"}, "checkpoint: expected .* got both"),
        ({"classes": [0]}, r"classes: expected numbers above 0, or -1, got \[0\]"),
        ({"classes": []}, "classes: expected numbers above 0"),
        ({"window": (3, 3)}, "window: expected"),
        ({"resample_mm": 0}, "resample_mm: expected a positive number"),
        ({"precision": "fp8"}, "precision: expected auto"),
    ],
)
def test_bad_options(network, options, text):
    with pytest.raises(ValueError, match=text):
        Vista3D(**{"network": network, **options})


def test_bad_prompts(network, images):
    made = Vista3D(network=network, classes=(1, 2))
    state = made.encode(images)
    with pytest.raises(ValueError, match=r"expected \[B, channels, D, H, W\], got shape \(2, 1, 20, 24\)"):
        made.encode(images[..., 0])
    with pytest.raises(TypeError, match="expected a torch tensor, got ndarray"):
        made.encode(images.numpy())
    with pytest.raises(ValueError, match="expected 2 samples of the images' shape"):
        made.decode(state, clicks([[[1]]]))
    with pytest.raises(ValueError, match="expected 2 classes at most, got 3"):
        made.decode(state, clicks([[[1]] * 3] * 2))
    with pytest.raises(ValueError, match="expected a click for every row, got none for sample 1, class 2"):
        made.decode(state, clicks([[[1], [0]], [[1], [-1]]]))
    with pytest.raises(ValueError, match=r"active: expected shape \(2, 1\), got \(2,\)"):
        made.decode(state, clicks([[[1]]] * 2), torch.ones(2, dtype=torch.bool))
    box = PromptBatch(
        SHAPE, *(getattr(clicks([[[1]]] * 2), n) for n in ("points", "labels")), torch.zeros(2, 1, 6)
    )
    with pytest.raises(ValueError, match=r"prompts.boxes: expected None, as VISTA3D takes clicks alone"):
        made.decode(state, box)


# ---- where nobody looks at a value --------------------------------------------------------------


@pytest.fixture
def many():
    """A network whose head takes no more than 2 rows at once."""
    made = small()
    made.point_head.max_prompt = 2
    with torch.no_grad():
        for name, parameter in made.point_head.named_parameters():
            parameter.add_(
                0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
            )
    return made


@pytest.mark.parametrize("window", [None, (0.0, 1.0)])
def test_nothing_waits_and_answers_are_the_same(many, images, window, monkeypatch):
    """Known, special and zero-shot classes, in parts; `Deterministic`: as deterministic torch asks."""
    options = {"network": many, "classes": (3, 25, 200, -1), "window": window, "resample_mm": 1.1}
    made, waiting = Vista3D(**options, asynchronous=True), Vista3D(**options)
    batch = clicks([[[1, 0]] * 4, [[0, 1]] * 4])
    active = torch.tensor([[True, True, False, True], [False, False, True, False]])
    state = waiting.encode(images, spacing=(1.0, 1.2, 1.1))
    expected = waiting.decode(state, batch, active).logits
    everything = waiting.decode(state, batch).logits
    assert everything.std() > 0.1
    said = replace(batch, unpadded=True)
    with watched(monkeypatch), Deterministic():
        ours = made.encode(images, spacing=(1.0, 1.2, 1.1))
        given = made.decode(ours, said, active).logits
        whole = made.decode(ours, said).logits
        nobody = made.decode(ours, said, torch.zeros_like(active)).logits
    for a, b in ((given, expected), (whole, everything)):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)
    assert (given[~active] == -10).all()
    assert (nobody == -10).all()
    for other, prompts in ((waiting, said), (made, batch)):
        with watched(monkeypatch), pytest.raises(Waited):
            other.decode(ours, prompts, active)


def test_a_round_looks_once(many, images, monkeypatch):
    """At how many clicks each row has, if it is asked for at all; rows have different numbers."""
    made = Vista3D(network=many)
    batch = clicks([[[-1, 1], [1, 0], [-1, -1]], [[1, 0], [1, -1], [-1, -1]]])
    active = torch.tensor([[True, True, False], [True, True, False]])
    state = made.encode(images)
    expected = made.decode(state, batch, active).logits
    looks = []
    look = made._clicks

    def counted(prompts, active):
        looks.append(0)
        return table

    table = look(batch, active)
    assert table == [[1, 2, -1], [2, 1, -1]]
    monkeypatch.setattr(made, "_clicks", counted)
    with watched(monkeypatch), Deterministic():
        given = made.decode(state, batch, active).logits
    assert len(looks) == 1
    torch.testing.assert_close(given, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["unc", "point"])
def test_the_term_waits_for_nothing(many, mode, monkeypatch):
    images, _, prob = device_scene(classes=3)
    made = Vista3D(network=many, asynchronous=True)

    def term():
        return SemiSAMTerm(made, total_steps=TOTAL, mode=mode, clicks=2, sample_gate=0.0)

    same(both(monkeypatch, term, images, prob))


def test_a_head_of_ones_own_is_asked_as_it_is(many, images, monkeypatch):
    class Own(monai.PointMappingSAM):
        def forward(self, out, points, labels, class_vector=None):
            return torch.ones(len(points), 1, *out.shape[2:])

    many.point_head.__class__ = Own
    with pytest.raises(
        ValueError, match="asynchronous: expected a network with MONAI's PointMappingSAM, got Own"
    ):
        Vista3D(network=many, asynchronous=True)
    made = Vista3D(network=many)
    monkeypatch.setattr(ops, "stays", lambda device: True)
    answer = made.decode(made.encode(images), clicks([[[1]], [[1]]]))
    assert (answer.logits == 1).all()
