# SPDX-License-Identifier: Apache-2.0
"""The protocol of generalists, their registry, and the embedded one: the random walker."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from generalist_fakes import Fake

from semisam import generalists, prompts, random_walk
from semisam.generalists import Decoded, Generalist, GeneralistSpec, build
from semisam.generalists.random_walker import RandomWalker
from semisam.generalists.sam_med3d_network import Architecture, SamMed3DNetwork
from semisam.prompts import PromptBatch


def scene(dims: int, rng: np.random.Generator, batch: int = 2):
    """Noisy images [B, 1, *S], their object [B, 1, *S] and a rough mask of it, two voxels off."""
    space = (28, 32, 24)[:dims]
    grid = np.stack(np.indices(space)) - np.array(space).reshape(-1, *(1,) * dims) / 2
    truth = np.stack([(grid**2).sum(0) < (9 - b) ** 2 for b in range(batch)])[:, None]
    image = (truth + 0.2 * rng.standard_normal(truth.shape)).astype(np.float32)
    return image, truth, np.roll(truth, 2, axis=-1)


def asks(mask, **more):
    """A batch with the mask prompt of a boolean mask [B, F, *S]."""
    logits = np.where(mask, 3, -3).astype(np.float32)
    if isinstance(mask, torch.Tensor):
        logits = torch.from_numpy(logits)
    empty = PromptBatch.empty(*mask.shape[:2], mask.shape[2:], mask)
    return replace(empty, mask_logits=logits, **more)


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


# ---- registry -----------------------------------------------------------------------------------


def test_every_registered_generalist_keeps_the_protocol():
    for name, path in generalists.GENERALISTS.items():
        if "sam_med3d" in path:
            made = build(name, network=SamMed3DNetwork(Architecture.small()))
        else:  # the others are made in tests of their own: their models come from other libraries
            made = build(name) if name == "random-walker" else generalists.class_of(name)
        assert made.spec.name == name
        assert isinstance(made, Generalist)
        assert isinstance(made.spec, GeneralistSpec)
        assert made.spec.licence
        assert made.spec.prompts <= {"points", "mask", "box"}


def test_build_takes_names_paths_and_options():
    assert build("random-walker", gamma=0.2).gamma == 0.2
    for path in ("semisam.generalists.random_walker.RandomWalker", "generalist_fakes:Fake"):
        made = build(path, **({"truth": None} if "Fake" in path else {}))
        assert isinstance(made, Generalist)


def bright(images, prompts):
    """A function of this module as a generalist."""
    return (8 * (images - 0.5)).expand(-1, prompts.labels.shape[1], *images.shape[2:])


def make_bright(name="made"):
    """A function of this module that makes one."""
    return generalists.as_generalist(bright, name=name)


def test_build_takes_functions_and_makers():
    made = build("test_generalists.bright", spatial_dims=[2], licence="mine")
    assert (made.spec.name, made.spec.spatial_dims, made.spec.licence) == ("bright", (2,), "mine")
    assert build("test_generalists:make_bright", name="other").spec.name == "other"
    assert build("test_generalists.make_bright").spec.name == "made"
    with pytest.raises(ValueError, match=r"prompts: expected any of points, mask, box, got \['clicks'\]"):
        build("test_generalists.bright", prompts=["clicks"])
    with pytest.raises(TypeError, match="unexpected keyword argument 'gamma'"):
        build("test_generalists.bright", gamma=1)


@pytest.mark.parametrize(
    ("taken", "mode"),
    [
        (("points", "mask", "box"), "mixed"),
        (("mask",), "mask"),
        (("points", "box"), "unc"),
        (("box",), "box"),
    ],
)
def test_a_function_has_the_mode_that_its_prompts_allow(taken, mode):
    assert generalists.as_generalist(bright, prompts=taken).spec.default_mode == mode


def test_what_is_no_generalist():
    known = RandomWalker()
    assert generalists.as_generalist(known) is known
    with pytest.raises(TypeError, match=r"options: expected none for a generalist, got \['name'\]"):
        generalists.as_generalist(known, name="other")
    for thing in (RandomWalker, "random-walker", 3, lambda images: images, lambda *, a, b: a):
        with pytest.raises(TypeError, match=r"thing: expected a generalist or a function"):
            generalists.as_generalist(thing)

    class Model:
        def __call__(self, images, prompts, *, scale=2):
            return images

    assert generalists.as_generalist(Model()).spec.name == "Model"


def test_rows_not_asked_for_and_mask_size_of_a_function():
    made = generalists.as_generalist(bright, mask_size=(4, 4))
    images = torch.rand(2, 1, 16, 16)
    images[1, 0, 0, 0] = float("nan")
    active = torch.tensor([[True, False], [True, True]])
    answer = made.decode(made.encode(images), PromptBatch.empty(2, 2, (16, 16), images), active)
    assert torch.equal(answer.logits[0, 0], 8 * (images[0, 0] - 0.5))
    assert (answer.logits[0, 1] == -10).all()
    assert answer.logits[1].isnan().any()
    assert answer.low_res.shape == (2, 2, 4, 4)
    expected = prompts.mask_logits(answer.logits[:1, 0].sigmoid(), (4, 4))
    assert torch.equal(answer.low_res[:1, 0], expected)
    as_numpy = generalists.as_generalist(lambda images, batch: images.numpy() * 3.0)
    assert torch.equal(
        as_numpy.decode(images, PromptBatch.empty(2, 1, (16, 16), images)).logits[0], images[0] * 3
    )
    silent = generalists.as_generalist(lambda images, batch: None, name="silent")
    with pytest.raises(TypeError, match=r"silent\(\): expected logits, .* got NoneType"):
        silent.decode(images, PromptBatch.empty(2, 1, (16, 16), images))


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        ("random-waker", ValueError, "did you mean 'random-walker'"),
        ("walker", ValueError, "expected one of random-walker.* or a dotted path"),
        ("semisam.generalists.nothing.Thing", ValueError, "expected an importable path"),
        ("semisam.generalists.random_walker.Walker", ValueError, "has no 'Walker'"),
        ("builtins.dict", TypeError, "spec, encode and decode .* got dict"),
    ],
)
def test_build_says_what_is_wrong(name, error, text):
    with pytest.raises(error, match=text):
        build(name)


def test_build_lets_options_and_broken_modules_speak_for_themselves(tmp_path, monkeypatch):
    with pytest.raises(TypeError, match="gama"):
        build("random-walker", gama=0.2)
    (tmp_path / "needs_more.py").write_text("import a_package_that_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_package_that_nobody_has"):
        build("needs_more.Model")


# ---- random walker ------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [2, 3])
def test_mask_prompt_is_that_of_random_walk(dims, rng):
    image, truth, rough = scene(dims, rng)
    walker = RandomWalker()
    answer = walker.decode(walker.encode(image), asks(rough))
    expected = random_walk.mask_prompt(image[:, 0], rough, spatial_dims=dims)
    prob = 1 / (1 + np.exp(-answer.logits))
    assert answer.logits.dtype == np.float32
    assert np.abs(prob - np.clip(expected, prob.min(), prob.max())).max() < 1e-5
    assert np.abs(answer.logits).max() == 10
    assert dice(prob > 0.5, truth) > dice(rough, truth) + 0.03
    assert np.array_equal(answer.low_res, answer.logits)
    weak = replace(asks(rough), mask_logits=np.where(rough, 0.1, -0.1).astype(np.float32))
    assert np.array_equal(walker.decode(walker.encode(image), weak).logits, answer.logits)
    assert answer.info["solves"] == 2
    assert answer.info["unconverged"] == 0
    assert answer.info["iterations"] > 10


@pytest.mark.parametrize("dims", [2, 3])
def test_clicks_are_those_of_random_walk(dims, rng):
    image, truth, _ = scene(dims, rng)
    centre = [n // 2 for n in truth.shape[2:]]
    points = np.array([[[centre, [1] * dims]]] * 2)
    labels = np.array([[[1, 0]]] * 2, np.int32)
    box, _ = prompts.boxes(truth)
    walker = RandomWalker()
    batch = PromptBatch(truth.shape[2:], points, labels, box)
    answer = walker.decode(walker.encode(image), batch)
    expected = random_walk.click_prompt(
        image[:, 0], points, labels, box=box.reshape(2, 1, 2, dims), spatial_dims=dims
    )
    assert np.array_equal(answer.logits > 0, expected > 0.5)
    assert dice(answer.logits > 0, truth) > 0.9


def test_clicks_win_over_the_mask(rng):
    image, _, rough = scene(3, rng)
    inside = np.argwhere(rough[0, 0])[len(np.argwhere(rough[0, 0])) // 2]
    points = np.tile(inside, (2, 1, 1, 1))
    walker = RandomWalker()
    state = walker.encode(image)
    batch = replace(asks(rough), points=points, labels=np.zeros((2, 1, 1), np.int32))
    before, after = walker.decode(state, asks(rough)).logits, walker.decode(state, batch).logits
    assert before[0, 0][tuple(inside)] > 0
    assert after[0, 0][tuple(inside)] == -10
    assert dice(after > 0, before > 0) > 0.9  # the rest is still the mask's


def test_rows_of_all_kinds_in_one_call(rng):
    """Mask, clicks and box beside each other give what each gives alone; rows not asked for hold -10."""
    image, truth, rough = scene(2, rng, 4)
    logits = np.where(rough, 3, -3).astype(np.float32)
    logits[1:] = 0  # nothing drawn
    points = np.full((4, 1, 1, 2), 14)
    labels = np.array([-1, 1, -1, 1], np.int32).reshape(4, 1, 1)
    box, _ = prompts.boxes(truth)
    active = np.array([[True], [True], [True], [False]])
    walker = RandomWalker()
    batch = PromptBatch(truth.shape[2:], points, labels, box, logits)
    answer = walker.decode(walker.encode(image), batch, active)
    assert answer.info["solves"] == 3
    assert (answer.logits[3] == -10).all()
    for i in range(3):
        one = PromptBatch(batch.shape, *(a[i : i + 1] for a in (points, labels, box, logits)))
        alone = walker.decode(walker.encode(image[i : i + 1]), one)
        assert np.array_equal(alone.logits[0], answer.logits[i])
        assert dice(answer.logits[i] > 0, truth[i]) > 0.85


def test_results_do_not_depend_on_the_place_in_the_batch(rng):
    image, _, rough = scene(3, rng)
    walker = RandomWalker()
    forward = walker.decode(walker.encode(image), asks(rough)).logits
    backward = walker.decode(walker.encode(image[::-1]), asks(rough[::-1])).logits
    again = walker.decode(walker.encode(image), asks(rough)).logits
    assert np.array_equal(forward, again)
    assert np.array_equal(forward, backward[::-1])


def test_torch_in_torch_out(rng):
    image, _, rough = scene(3, rng)
    walker = RandomWalker()
    expected = walker.decode(walker.encode(image), asks(rough)).logits
    images = torch.from_numpy(image).requires_grad_()
    answer = walker.decode(walker.encode(images), asks(torch.from_numpy(rough)))
    assert isinstance(answer.logits, torch.Tensor)
    assert not answer.logits.requires_grad
    assert np.array_equal(answer.logits.numpy(), expected)
    half = walker.decode(walker.encode(images.detach().bfloat16()), asks(torch.from_numpy(rough)))
    assert half.logits.dtype == torch.float32


def test_channels_are_standardised_and_averaged(rng):
    image, _, rough = scene(2, rng)
    walker = RandomWalker()
    one = walker.encode(image)
    three = walker.encode(np.concatenate([image, 100 * image + 5, image - 7], 1))
    assert np.abs(one.image - three.image).max() < 1e-4
    assert np.abs(walker.encode(np.concatenate([image, -image], 1)).image).max() < 1e-4
    assert walker.decode(three, asks(rough)).logits.shape == rough.shape


def test_spacing_reaches_the_solve(rng):
    image, _, rough = scene(3, rng)
    walker = RandomWalker()
    plain, long = (
        walker.decode(walker.encode(image, spacing=s), asks(rough)).logits for s in (None, (1, 1, 6))
    )
    same = walker.decode(walker.encode(image, spacing=(2, 2, 2)), asks(rough)).logits
    assert np.array_equal(plain, same)
    assert not np.array_equal(plain, long)


def test_largest_component_option(rng):
    image, truth, rough = scene(3, rng, 1)
    rough = rough.copy()
    rough[..., :6, :6, :6] = True
    found = {
        keep: walker.decode(walker.encode(image), asks(rough)).logits > 0
        for keep in (False, True)
        for walker in [RandomWalker(largest_component=keep)]
    }
    assert found[False][..., :4, :4, :4].all()
    assert not found[True][..., :6, :6, :6].any()
    assert dice(found[True], truth) > dice(found[False], truth)


def test_empty_mask_gives_background(rng):
    image, _, rough = scene(3, rng)
    answer = RandomWalker().decode(RandomWalker().encode(image), asks(np.zeros_like(rough)))
    assert (answer.logits == -10).all()


def test_a_solve_that_does_not_converge_is_said(rng):
    image, _, rough = scene(3, rng)
    walker = RandomWalker(max_iter=2)
    with pytest.warns(RuntimeWarning, match="2 of 2 problems did not converge"):
        answer = walker.decode(walker.encode(image), asks(rough))
    assert answer.info == {"solves": 2, "iterations": 4, "unconverged": 2}
    assert np.isfinite(answer.logits).all()


def test_nan_in_an_image_stays_in_its_row(rng):
    image, _, rough = scene(2, rng)
    image[0, 0, 3, 3] = np.nan
    walker = RandomWalker()
    with pytest.warns(RuntimeWarning, match="1 of 2 problems did not converge"):
        answer = walker.decode(walker.encode(image), asks(rough))
    assert np.isnan(answer.logits[0]).any()
    assert np.isfinite(answer.logits[1]).all()
    assert answer.info["unconverged"] == 1


def test_constant_image(rng):
    _, _, rough = scene(3, rng)
    walker = RandomWalker()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answer = walker.decode(walker.encode(np.ones(rough.shape, np.float32)), asks(rough))
    assert dice(answer.logits > 0, rough) > 0.9


def test_no_active_row(rng):
    image, _, rough = scene(2, rng)
    answer = RandomWalker().decode(RandomWalker().encode(image), asks(rough), np.zeros((2, 1), bool))
    assert isinstance(answer, Decoded)
    assert (answer.logits == -10).all()
    assert answer.info["solves"] == 0


def test_bad_input(rng):
    image, _, rough = scene(2, rng)
    walker = RandomWalker()
    state = walker.encode(image)
    with pytest.raises(ValueError, match=r"device: expected 'cpu'.* got 'cuda'"):
        RandomWalker(device="cuda")
    for name, value in (("gamma", -1), ("sigma", float("nan")), ("max_iter", 0)):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            RandomWalker(**{name: value})
    with pytest.raises(ValueError, match=r"images: expected \[B, channels, H, W\] .* got shape \(2, 1, 9\)"):
        walker.encode(np.zeros((2, 1, 9)))
    with pytest.raises(ValueError, match=r"prompts: expected 2 samples .* got 1 of"):
        walker.decode(state, asks(rough[:1]))
    with pytest.raises(ValueError, match=r"active: expected shape \(2, 1\), got \(2,\)"):
        walker.decode(state, asks(rough), np.ones(2, bool))
    small = replace(asks(rough), mask_logits=np.zeros((2, 1, 8, 8), np.float32))
    with pytest.raises(ValueError, match=r"mask_logits: expected the images' shape \(28, 32\), got \(8, 8\)"):
        walker.decode(state, small)
    silent = asks(rough)
    silent.mask_logits[1] = 0
    with pytest.raises(ValueError, match="got none for sample 1, class 1"):
        walker.decode(state, silent)


def test_fakes_keep_the_protocol():
    assert isinstance(Fake(torch.ones(1, 1, 4, 4, dtype=torch.bool)), Generalist)
