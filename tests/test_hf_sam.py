# SPDX-License-Identifier: Apache-2.0
"""SAM, SAM 2, SAM 3 and MedSAM: against transformers itself, frames, prompts, weights, and the term."""

from __future__ import annotations

import json
import re
import shutil
import socket
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from semisam import SemiSAMTerm, generalists, prompts
from semisam.engine import config, record, trainer
from semisam.engine.phantom import write_phantoms
from semisam.engine.setup import build_term
from semisam.generalists import sam_names
from semisam.generalists.hf_sam import MedSam, Sam, Sam2, Sam3
from semisam.prompts import PromptBatch

transformers = pytest.importorskip("transformers")

from hf_models import randomised, sam2_parts, small  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = {"sam": Sam, "sam2": Sam2, "sam3": Sam3, "medsam": MedSam}
CLICKED = ("sam", "sam2", "sam3")
every_family = pytest.mark.parametrize("name", FAMILIES)
SHAPES = [(64, 48), (40, 64), (30, 51), (150, 97)]  # as large as SAM's square, smaller and larger ones


def generalist(name, **options):
    return FAMILIES[name](model=small(name), **options)


def picture(shape, batch=1, channels=3, seed=0):
    """Grey values 0..255 [B, channels, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, channels, *shape), generator=generator).float()


def asked(shape, points=None, labels=None, **more):
    """Points [B, F, K, 2] and labels [B, F, K]; or box and mask prompt alone."""
    if points is None:
        first = next(iter(more.values()))
        empty = PromptBatch.empty(*first.shape[:2], shape, torch.empty(0))
        return replace(empty, **more)
    return PromptBatch(shape, torch.tensor(points), torch.tensor(labels, dtype=torch.int32), **more)


def prompted(name, shape, batch=1, classes=1, seed=3):
    """Any prompts that the family takes, all different."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.stack([torch.randint(0, n // 2, (batch, classes), generator=generator) for n in shape], -1)
    high = torch.stack([torch.randint(n // 2, n, (batch, classes), generator=generator) for n in shape], -1)
    boxes = torch.cat([low, high], -1).float()
    if name == "medsam":
        return asked(shape, boxes=boxes)
    points = torch.stack([low, high], 2).tolist()
    return asked(shape, points, [[[1, 0]] * classes] * batch)


# ---- against transformers -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["points", "box", "points and box", "mask", "points and mask"])
@pytest.mark.parametrize("shape", [(64, 48), (40, 64)])
def test_sam_is_that_of_transformers_with_its_processor(shape, kind):
    """Images of the square's size go in unchanged, so that the whole way can be compared."""
    module = pytest.importorskip("transformers.models.sam.image_processing_pil_sam")
    square, cells = {"height": 64, "width": 64}, {"height": 32, "width": 32}
    sizes = {"size": {"longest_edge": 64}, "mask_size": {"longest_edge": 32}}
    processor = transformers.SamProcessor(
        module.SamImageProcessorPil(pad_size=square, mask_pad_size=cells, **sizes)
    )
    image = picture(shape)
    rows, columns = shape
    batch = asked(shape, [[[[5, 9], [30, 21]]]], [[[1, 0]]])
    sent = {"input_points": [[[[9, 5], [21, 30]]]], "input_labels": [[[1, 0]]]}
    if "box" in kind:
        batch = replace(batch, boxes=torch.tensor([[[3.0, 6.0, rows - 5.0, columns - 2.0]]]))
        sent["input_boxes"] = [[[6, 3, columns - 2, rows - 5]]]
    if "points" not in kind:
        batch = replace(batch, points=batch.points[:, :, :0], labels=batch.labels[:, :, :0])
        sent = {k: v for k, v in sent.items() if k == "input_boxes"}
    inputs = processor(
        images=image[0].permute(1, 2, 0).byte().numpy(), return_tensors="pt", do_resize=True, **sent
    )
    original, resized = inputs.pop("original_sizes"), inputs.pop("reshaped_input_sizes")
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    if "mask" in kind:
        drawn = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(1))
        batch, inputs["input_masks"] = replace(batch, mask_logits=drawn), drawn
    sam = generalist("sam", window=(0, 255))
    assert torch.allclose(sam._pixels(image), inputs["pixel_values"], atol=1e-6)
    with torch.no_grad():
        out = small("sam")(**inputs, multimask_output=False)
    (expected,) = processor.post_process_masks(out.pred_masks, original, resized, binarize=False)
    answer = sam.decode(sam.encode(image), batch)
    # Sums of 32 x 32 products in another order: some thousand roundings of 6e-8 of numbers near 1.
    assert torch.allclose(answer.low_res[0], out.pred_masks[0, :, 0], atol=1e-4)
    assert torch.allclose(answer.logits[0, 0], expected[0, 0], atol=1e-4)
    assert float(answer.logits.std()) > 0.02


@pytest.mark.parametrize("shape", [(30, 51), (150, 97)])
def test_sam_resizes_as_its_processor_but_for_rounding(shape):
    """PIL rounds to whole grey values after each axis: one of 255 apart at most, and rarely."""
    module = pytest.importorskip("transformers.models.sam.image_processing_pil_sam")
    processor = module.SamImageProcessorPil(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64})
    image = picture(shape)
    expected = processor(image[0].permute(1, 2, 0).byte().numpy(), return_tensors="pt")["pixel_values"]
    made = generalist("sam", window=(0, 255))._pixels(image)
    step = 1 / 255 / min(Sam.normalisation[1])
    assert float((made - expected).abs().max()) < 1.01 * step
    assert float((made - expected).abs().mean()) < 0.3 * step


@pytest.mark.parametrize("name", ["sam2", "sam3"])
@pytest.mark.parametrize("shape", [(30, 51), (150, 97)])
def test_sam_2_and_3_have_the_pixels_of_their_processor(name, shape):
    """These processors need torchvision, and round to whole grey values, too."""
    pytest.importorskip("torchvision")
    square = {"height": generalist(name).side, "width": generalist(name).side}
    processor = getattr(transformers, {"sam2": "Sam2ImageProcessor", "sam3": "Sam3ImageProcessor"}[name])
    image = picture(shape)
    expected = processor(size=square)(image.byte(), return_tensors="pt")["pixel_values"]
    made = generalist(name, window=(0, 255))._pixels(image)
    assert float((made - expected).abs().max()) < 1.01 / 255 / min(FAMILIES[name].normalisation[1])


def directly(name, image, batch, mask=None):
    """(pixels, low-resolution logits, logits) of one image by transformers' model alone."""
    model, shape = small(name), tuple(image.shape[2:])
    side = model.config.prompt_encoder_config.image_size
    shown = image / 255
    if name == "sam":
        scale = side / max(shape)
        size = [int(n * scale + 0.5) for n in shape]
    else:
        size = [side, side]
    mode = "bicubic" if name == "medsam" else "bilinear"
    pixels = F.interpolate(shown, size, mode=mode, align_corners=False, antialias=True)
    if name == "medsam":
        pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min())
    else:
        mean, std = ((0.5,) * 3, (0.5,) * 3) if name == "sam3" else Sam.normalisation
        pixels = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    padded = torch.zeros(1, 3, side, side)
    padded[..., : size[0], : size[1]] = pixels
    factor = torch.tensor([size[1] / shape[1], size[0] / shape[0]])
    sent = {}
    if batch.labels.shape[2]:
        sent["input_points"] = batch.points.flip(-1) * factor
        sent["input_labels"] = batch.labels.long()
    if batch.boxes is not None:
        corners = batch.boxes.unflatten(-1, (2, 2)).flip(-1) * factor
        sent["input_boxes"] = corners.flatten(-2)
    if mask is not None:
        sent["input_masks"] = mask
    with torch.no_grad():
        out = model(pixel_values=padded, multimask_output=False, **sent)
    low = out.pred_masks[:, :, 0]
    whole = F.interpolate(low, (side, side), mode="bilinear", align_corners=False)
    cropped = whole[..., : size[0], : size[1]]
    return padded, low, F.interpolate(cropped, shape, mode="bilinear", align_corners=False)


@every_family
@pytest.mark.parametrize("shape", SHAPES)
def test_the_whole_way_is_that_of_the_model(name, shape):
    image, batch = picture(shape), prompted(name, shape)
    made = generalist(name, window=(0, 255))
    mask = None
    if name != "medsam":
        mask = torch.randn(1, 1, *made.spec.mask_size, generator=torch.Generator().manual_seed(1))
        batch = replace(batch, mask_logits=mask)
    pixels, low, logits = directly(name, image, batch, mask)
    assert torch.allclose(made._pixels(image), pixels, atol=1e-5)
    answer = made.decode(made.encode(image), batch)
    # Logits up to 15 here; float32 through two transformers: 6e-8 of that, a few hundred times.
    assert torch.allclose(answer.low_res, low, atol=3e-4)
    assert torch.allclose(answer.logits, logits, atol=3e-4)
    assert answer.logits.shape == (1, 1, *shape)
    assert float(answer.logits.std()) > 0.02


def test_the_next_rounds_mask_prompt_is_bounded_where_the_model_was_trained_so():
    assert (Sam.largest_logit, Sam2.largest_logit, Sam3.largest_logit) == (float("inf"), 32, 32)
    made = generalist("sam2")
    state, batch = made.encode(picture((40, 64))), prompted("sam2", (40, 64))
    before = made.decode(state, batch)
    made.largest_logit = 1.0
    after = made.decode(state, batch)
    assert torch.equal(after.low_res, before.low_res.clamp(-1, 1))
    assert torch.equal(after.logits, before.logits)


def test_sizes_are_those_of_the_model():
    for name, (side, cells) in {"sam": (64, 32), "sam2": (64, 16), "sam3": (56, 16)}.items():
        assert generalist(name).spec.input_size == (side, side)
        assert generalist(name).spec.mask_size == (cells, cells)
    assert Sam.spec.mask_size == Sam2.spec.mask_size == (256, 256)
    assert Sam3.spec.mask_size == (288, 288)


@pytest.mark.parametrize("name", CLICKED)
def test_multimask_takes_the_mask_that_the_model_rates_best(name):
    shape = (40, 64)
    image, batch = picture(shape, 3), prompted(name, shape, 3)
    made = generalist(name, multimask=True)
    state = made.encode(image)
    sent = batch.to_hf(made.side, keep_aspect=made.keep_aspect)
    maps = list(state.features)
    with torch.no_grad():
        out = small(name)(image_embeddings=maps if len(maps) > 1 else maps[0], multimask_output=True, **sent)
    best = out.iou_scores[:, 0].argmax(1)
    expected = out.pred_masks[:, 0][torch.arange(3), best]
    low = made.decode(state, batch).low_res[:, 0]
    assert torch.allclose(low, expected.clamp(-made.largest_logit, made.largest_logit), atol=1e-3)
    if name == "sam":  # SAM 2 and 3 take that one anyway where the other is unstable, as it is here
        single = generalist(name).decode(state, batch).low_res[:, 0]
        assert not torch.allclose(low, single, atol=1e-2)


# ---- frames -------------------------------------------------------------------------------------


def ramp(shape, axis):
    """[1, *shape]: every pixel's index along an axis."""
    index = torch.arange(shape[axis], dtype=torch.float32)
    return index.reshape(-1, 1).expand(shape)[None] if axis == 0 else index.expand(shape)[None]


@every_family
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("axis", [0, 1])
def test_images_points_and_answers_lie_in_one_frame(name, shape, axis):
    """Points lie where the image's pixels lie, but for SAM's half pixel, and answers come back to there."""
    made = generalist(name)
    n, m, side, cells = shape[axis], made._resized(shape)[axis], made.side, made.mask_side
    resized = F.interpolate(ramp(shape, axis)[:, None], made._resized(shape), mode="bilinear")[0, 0]
    column = resized.movedim(axis, 0)[:, 0].tolist()
    # Logits that are a ramp over the square: the coordinate in it of what an answer's voxel is made of.
    low = (ramp((cells, cells), axis) + 0.5) * side / cells - 0.5
    down, across = made._to_patch(shape, torch.device("cpu"))
    back = (down @ low @ across.T)[0]
    middle = [k // 2 for k in shape]
    for at in range(n // 4, n - n // 4):
        middle[axis] = at
        sent = asked(shape, [[[middle]]], [[[1]]]).to_hf(side, keep_aspect=made.keep_aspect)
        there = float(sent["input_points"][0, 0, 0, 1 - axis])  # SAM scales the index, not the centre
        below = int(there)
        seen = column[below] + (there - below) * (column[below + 1] - column[below])
        assert abs(seen - at - 0.5 * (n / m - 1)) < 2e-3
        assert abs(float(back[tuple(middle)]) - there - 0.5 * (m / n - 1)) < 2e-3


@every_family
@pytest.mark.parametrize("shape", SHAPES)
def test_mask_prompts_are_cell_averages_in_the_square(name, shape):
    made = generalist(name)
    state = SimpleNamespace(shape=shape)
    prob = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(2))
    prompt = made.mask_prompt(prob, state)
    rows, columns = made._resized(shape)
    square = torch.zeros(6, 1, made.side, made.side)
    square[..., :rows, :columns] = F.interpolate(
        prob.reshape(6, 1, *shape), (rows, columns), mode="bilinear", align_corners=False
    )
    mean = F.adaptive_avg_pool2d(square, made.mask_side)
    expected = torch.logit(mean.double()).clamp(-10, 10).float().reshape(prompt.shape)
    assert prompt.shape == (2, 3, *made.spec.mask_size)
    assert torch.allclose(prompt, expected, atol=1e-4)


def test_mask_prompts_go_where_the_image_goes():
    """A rectangle of a 32 x 64 patch, which SAM's square of 64 holds as it is, in cells of 2."""
    prob = torch.zeros(1, 1, 32, 64)
    prob[..., 8:16, 20:40] = 1
    prompt = generalist("sam").mask_prompt(prob, SimpleNamespace(shape=(32, 64)))[0, 0]
    assert (prompt[4:8, 10:20] == 10).all()
    assert int((prompt > -10).sum()) == 40


# ---- images -------------------------------------------------------------------------------------


def test_intensities_of_any_scale_show_the_same():
    made = generalist("sam")
    image = torch.randn(2, 1, 40, 64, generator=torch.Generator().manual_seed(4))
    image[0, 0, 3, 3] = 1e4  # an outlier: black and white are percentiles
    expected = made._pixels(image)
    assert torch.allclose(made._pixels(image * 300 - 1000), expected, atol=1e-3)
    values = image[0].flatten().sort().values
    low, high = values[round(0.005 * (len(values) - 1))], values[round(0.995 * (len(values) - 1))]
    shown = ((image[:1] - low) / (high - low)).clamp(0, 1)
    mean, std = (torch.tensor(v)[:, None, None] for v in Sam.normalisation)
    assert torch.allclose(expected[0, :, :40], ((shown - mean) / std)[0], atol=1e-5)
    assert (expected[:, :, 40:] == 0).all()  # padding after normalisation


def test_few_bright_pixels_and_constant_images_stay_finite():
    image = torch.zeros(2, 1, 40, 64)
    image[1, 0, 20, 30] = 0.05
    white = (1 - torch.tensor(Sam.normalisation[0])) / torch.tensor(Sam.normalisation[1])
    assert torch.allclose(generalist("sam")._pixels(image)[1, :, 20, 30], white)
    for name in FAMILIES:
        pixels = generalist(name)._pixels(image)
        assert pixels.isfinite().all()
        assert float(pixels[1].std()) > float(pixels[0, :, :20].std())


def test_channels():
    made = generalist("sam", window=(0, 255))
    grey = picture((40, 64), channels=1)
    assert torch.equal(made._pixels(grey), made._pixels(grey.expand(-1, 3, -1, -1)))
    two = torch.cat([grey, 255 - grey], 1)
    assert torch.allclose(made._pixels(two), made._pixels(torch.full_like(grey, 127.5)), atol=1e-5)
    own = generalist("sam")
    assert torch.allclose(own._pixels(torch.cat([grey, 7 * grey + 3], 1)), own._pixels(grey), atol=1e-4)


# ---- prompts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLICKED)
def test_rows_do_not_depend_on_each_other(name):
    """One click, two with padding between, a mask, a mask that says nothing: each as if asked alone."""
    shape = (40, 64)
    made = generalist(name, decode_batch=2)
    images = picture(shape, 4)
    points = [
        [[[3, 4], [0, 0], [1, 1]]],
        [[[5, 6], [9, 9], [8, 60]]],
        [[[0, 0]] * 3],
        [[[7, 8], [2, 2], [0, 0]]],
    ]
    labels = [[[1, -1, -1]], [[1, -1, 0]], [[-1, -1, -1]], [[0, 1, -1]]]
    masks = torch.randn(4, 1, *made.spec.mask_size, generator=torch.Generator().manual_seed(5))
    masks[0] = 0
    together = made.decode(made.encode(images), asked(shape, points, labels, mask_logits=masks))
    alone = [
        asked(shape, [[[[3, 4]]]], [[[1]]]),
        asked(shape, [[[[5, 6], [8, 60]]]], [[[1, 0]]], mask_logits=masks[1:2]),
        asked(shape, mask_logits=masks[2:3]),
        asked(shape, [[[[7, 8], [2, 2]]]], [[[0, 1]]], mask_logits=masks[3:4]),
    ]
    for i, batch in enumerate(alone):
        one = made.decode(made.encode(images[i : i + 1]), batch)
        assert torch.allclose(one.logits[0], together.logits[i], atol=3e-4)
        assert torch.allclose(one.low_res[0], together.low_res[i], atol=3e-4)
    assert float(together.logits.std(dim=(1, 2, 3)).min()) > 0.02


@every_family
def test_classes_and_samples_keep_their_places(name):
    """Three samples of two classes, encoded two at a time: each row as if asked alone."""
    shape = (40, 64)
    made = generalist(name, encode_batch=2, decode_batch=4)
    images, batch = picture(shape, 3), prompted(name, shape, 3, 2)
    together = made.decode(made.encode(images), batch).logits
    for i in range(3):
        for c in range(2):
            row = PromptBatch(
                shape,
                batch.points[i : i + 1, c : c + 1],
                batch.labels[i : i + 1, c : c + 1],
                None if batch.boxes is None else batch.boxes[i : i + 1, c : c + 1],
            )
            alone = made.decode(made.encode(images[i : i + 1]), row).logits
            assert torch.allclose(alone[0, 0], together[i, c], atol=3e-4)


@every_family
def test_rows_that_are_not_asked_for(name):
    shape = (40, 64)
    made = generalist(name)
    state, batch = made.encode(picture(shape, 2)), prompted(name, shape, 2, 2)
    everything = made.decode(state, batch)
    some = made.decode(state, batch, torch.tensor([[True, False], [False, True]]))
    assert (some.logits[0, 1] == -10).all()
    assert (some.low_res[1, 0] == -10).all()
    assert torch.allclose(some.logits[0, 0], everything.logits[0, 0], atol=3e-4)
    none = made.decode(state, batch, torch.zeros(2, 2, dtype=torch.bool))
    assert (none.logits == -10).all()


def test_nan_in_an_image_stays_in_its_row():
    for name in FAMILIES:
        made = generalist(name)
        images = picture((40, 64), 2)
        images[0, 0, 3, 3] = float("nan")
        answer = made.decode(made.encode(images), prompted(name, (40, 64), 2)).logits
        assert answer[0].isnan().any()
        assert answer[1].isfinite().all()


@every_family
def test_frozen_and_without_gradient(name):
    made = generalist(name)
    assert not made.model.training
    assert not any(p.requires_grad for p in made.model.parameters())
    state = made.encode(picture((40, 64)).requires_grad_())
    answer = made.decode(state, prompted(name, (40, 64)))
    assert not any(m.requires_grad for m in state.features)
    assert not answer.logits.requires_grad
    assert answer.logits.dtype == answer.low_res.dtype == torch.float32


@every_family
def test_half_precision_is_near(name):
    """Features within some roundings of 2^-9, a few layers long; SAM 2 and 3 may choose another mask then."""
    image, batch = picture((40, 64)), prompted(name, (40, 64))
    half, full = generalist(name, precision="bfloat16"), generalist(name)
    near, exact = half.encode(image), full.encode(image)
    for a, b in zip(near.features, exact.features, strict=True):
        assert a.dtype == torch.bfloat16
        assert 0 < float((a.float() - b).square().mean().sqrt()) < 0.05 * float(b.std())
    answer = half.decode(near, batch).logits
    assert answer.dtype == torch.float32
    assert answer.isfinite().all()
    if name in ("sam", "medsam"):
        expected = full.decode(exact, batch).logits
        assert float((answer - expected).abs().mean()) < 0.1 * float(expected.abs().max())


# ---- bad input ----------------------------------------------------------------------------------


def test_bad_input():
    shape = (40, 64)
    sam = generalist("sam")
    state, batch = sam.encode(picture(shape)), prompted("sam", shape)
    with pytest.raises(TypeError, match=r"Sam.encode\(\): images: expected a torch tensor, got ndarray"):
        sam.encode(np.zeros((1, 1, 8, 8)))
    with pytest.raises(ValueError, match=r"expected \[B, channels, H, W\], .* volumes go slice by slice"):
        sam.encode(torch.zeros(1, 1, 8, 8, 8))
    with pytest.raises(ValueError, match="images: expected at least one, got none"):
        sam.encode(torch.zeros(0, 1, 8, 8))
    with pytest.raises(ValueError, match="prompts: expected 1 samples of the images' shape"):
        sam.decode(state, prompted("sam", (40, 63)))
    with pytest.raises(ValueError, match=r"mask_logits: expected size \(32, 32\)"):
        sam.decode(state, replace(batch, mask_logits=torch.zeros(1, 1, 8, 8)))
    with pytest.raises(ValueError, match=r"active: expected shape \(1, 1\), got \(1,\)"):
        sam.decode(state, batch, torch.ones(1, dtype=torch.bool))
    with pytest.raises(ValueError, match="got none for sample 0, class 1"):
        sam.decode(state, PromptBatch.empty(1, 1, shape, torch.empty(0)))
    medsam = generalist("medsam")
    with pytest.raises(ValueError, match=r"prompts.points: expected none, as MedSAM knows boxes alone"):
        medsam.decode(medsam.encode(picture(shape)), batch)
    boxed = replace(prompted("medsam", shape), mask_logits=torch.zeros(1, 1, 32, 32))
    with pytest.raises(ValueError, match=r"prompts.mask_logits: expected none, as MedSAM knows boxes alone"):
        medsam.decode(medsam.encode(picture(shape)), boxed)


def test_bad_settings():
    model = small("sam")
    with pytest.raises(
        ValueError, match=r"checkpoint: .* hub repository such as 'wanglab/medsam.*, got neither"
    ):
        generalists.build("medsam")
    with pytest.raises(ValueError, match="got both"):
        Sam("folder", model=model)
    with pytest.raises(
        ValueError, match=r"Sam2\(\): model: expected a Sam2Model of transformers, got SamModel"
    ):
        Sam2(model=model)
    for options, text in (
        ({"precision": "fp8"}, "precision: expected auto, float32"),
        ({"slice_axis": 3}, "slice_axis: expected 0, 1 or 2, got 3"),
        ({"decode_batch": 0}, "decode_batch: expected at least 1, got 0"),
        ({"window": (1, 1)}, r"window: expected \(low, high\)"),
    ):
        with pytest.raises(ValueError, match=text):
            Sam(model=model, **options)


# ---- weights ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Every family as transformers saves it."""
    root = tmp_path_factory.mktemp("models")
    for name in FAMILIES:
        small(name).save_pretrained(root / name)
    return root


@pytest.fixture
def offline(monkeypatch):
    """No way out of this machine."""

    def refuse(*args, **kwargs):
        raise AssertionError("a test tried to reach the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@every_family
def test_folders_load_offline_with_the_same_answers(name, folders, offline):
    made = generalists.build(name, checkpoint=str(folders / name))
    assert made.spec.name == name
    assert type(made) is FAMILIES[name]
    batch, image = prompted(name, (40, 64)), picture((40, 64))
    own = generalist(name)
    for tensor, saved in zip(own.model.parameters(), made.model.parameters(), strict=True):
        assert torch.equal(tensor, saved)
    # Tensors that lie in a file's memory are not aligned alike: other sums, the same to rounding.
    assert torch.allclose(
        made.decode(made.encode(image), batch).logits, own.decode(own.encode(image), batch).logits, atol=1e-3
    )


def changed(folders, tmp_path, name, change):
    """A copy of a folder whose tensors went through `change`."""
    from safetensors.torch import load_file, save_file  # noqa: PLC0415

    folder = tmp_path / "changed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(folders / name, folder)
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("name", CLICKED)
def test_weights_that_do_not_fit_are_refused_with_what_differs(name, folders, tmp_path):
    token = "tracker_model." * (name == "sam3") + "mask_decoder.iou_token.weight"  # as the file calls it

    def without(state):
        return {k: v for k, v in state.items() if k != token}

    for change, text in (
        (without, r"missing: mask_decoder\.iou_token\.weight$"),
        (lambda state: state | {"other.weight": torch.zeros(1)}, r"unexpected: other\.weight$"),
        (
            lambda state: state | {token: torch.zeros(1, 7)},
            r"of another shape: mask_decoder\.iou_token\.weight \(1, 7\), expected \(1, 32\)$",
        ),
    ):
        with pytest.raises(ValueError, match=rf"checkpoint: expected the weights of a Sam\w+ .*{text}"):
            FAMILIES[name](changed(folders, tmp_path, name, change))


def test_other_folders_and_files_are_refused(folders, tmp_path, capfd):
    with pytest.raises(ValueError, match=r"Sam\(\): checkpoint: expected model_type sam in .*, got 'sam2'"):
        Sam(folders / "sam2")
    with pytest.raises(ValueError, match=r"expected model_type sam2 or sam2_video in .*, got 'sam'"):
        Sam2(folders / "sam")
    with pytest.raises(
        ValueError, match=r"expected a folder with config.json .*, got the file .*model.safetensors"
    ):
        Sam2(folders / "sam2" / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"as SAM's authors publish it, got .*safetensors without image_encoder"
    ):
        Sam(folders / "sam" / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no folder ./nowhere"):
        Sam("./nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"expected config.json \(model_type sam\) in .*empty, got none"
    ):
        Sam(tmp_path / "empty")
    shutil.copy(folders / "sam" / "config.json", tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"expected model.safetensors in .*empty, got none"):
        Sam(tmp_path / "empty")
    whole = (folders / "sam" / "model.safetensors").read_bytes()
    (tmp_path / "empty" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"expected the tensors of a SamModel, got .*empty with damage"):
        Sam(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="expected JSON in"):
        Sam(tmp_path / "empty")
    assert capfd.readouterr() == ("", "")


class Poison:
    def __reduce__(self):
        return (print, ("run",))


def test_nothing_in_a_torch_file_is_run(folders, tmp_path, capfd):
    shutil.copy(folders / "sam" / "config.json", tmp_path)
    state = small("sam").state_dict()
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert Sam(tmp_path).spec.name == "sam"
    torch.save({**state, "evil": Poison()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"expected the tensors of a SamModel, got .* with damage or in another"
    ):
        Sam(tmp_path)
    assert "run" not in capfd.readouterr().out


def own_names(state):
    """SAM's own names of transformers' tensors: the rules read backwards, as the original code has them."""
    made = {}
    for name, value in state.items():
        if name.startswith("prompt_encoder.shared_embedding"):
            continue
        new = name.replace(
            "shared_image_embedding.positional_embedding",
            "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
        )
        for theirs, ours in (
            ("vision_encoder.layers.", "image_encoder.blocks."),
            ("vision_encoder.", "image_encoder."),
            ("patch_embed.projection", "patch_embed.proj"),
            ("layer_norm_final_attn", "norm_final_attn"),
            ("neck.conv1", "neck.0"),
            ("neck.layer_norm1", "neck.1"),
            ("neck.conv2", "neck.2"),
            ("neck.layer_norm2", "neck.3"),
            ("mask_embed.conv1", "mask_downscaling.0"),
            ("mask_embed.layer_norm1", "mask_downscaling.1"),
            ("mask_embed.conv2", "mask_downscaling.3"),
            ("mask_embed.layer_norm2", "mask_downscaling.4"),
            ("mask_embed.conv3", "mask_downscaling.6"),
            ("upscale_conv1", "output_upscaling.0"),
            ("upscale_layer_norm", "output_upscaling.1"),
            ("upscale_conv2", "output_upscaling.3"),
            ("prompt_encoder.point_embed.", "prompt_encoder.point_embeddings."),
            ("layer_norm", "norm"),
        ):
            new = new.replace(theirs, ours)
        if "iou_prediction_head" in new or "hypernetworks" in new:
            new = (
                new.replace("layers.0", "layers.1")
                .replace("proj_in", "layers.0")
                .replace("proj_out", "layers.2")
            )
        made[new] = value.clone()
    return made


@pytest.mark.parametrize("name", ["sam", "medsam"])
def test_files_as_the_authors_publish_them(name, tmp_path):
    state = own_names(small(name).state_dict())
    # Names of these parts are those of SAM-Med3D, whose list is at hand.
    lines = (Path(__file__).parent / "sam_med3d_state_dict.tsv").read_text().splitlines()
    listed = {re.sub(r"\d+", "#", line.split("\t")[0]) for line in lines}
    assert {re.sub(r"\d+", "#", n) for n in state} <= listed
    torch.save(state, tmp_path / "own.pth")
    assert same_answers(name, tmp_path / "own.pth")
    made = FAMILIES[name](tmp_path / "own.pth")
    assert made.files == (tmp_path / "own.pth",)
    wanted, found = small(name).config.to_dict(), made.model.config.to_dict()
    for part in ("vision_config", "prompt_encoder_config", "mask_decoder_config"):
        differ = {k: (v, found[part][k]) for k, v in wanted[part].items() if found[part][k] != v}
        assert not differ.keys() - {"mlp_ratio"}
    torch.save({"model": {f"module.{n}": v for n, v in state.items()}}, tmp_path / "own.pth")
    assert same_answers(name, tmp_path / "own.pth")
    for change, text in (
        ({"mask_decoder.iou_token.weight": None}, r"missing: mask_decoder\.iou_token\.weight$"),
        ({"other": torch.zeros(1)}, "unexpected: other$"),
        (
            {"mask_decoder.iou_token.weight": torch.zeros(1, 7)},
            r"of another shape: .* \(1, 7\), expected \(1, 32\)$",
        ),
        ({"image_encoder.pos_embed": None}, "without image_encoder.pos_embed$"),
    ):
        torch.save({k: v for k, v in (state | change).items() if v is not None}, tmp_path / "own.pth")
        with pytest.raises(
            ValueError, match=f"checkpoint: expected a folder, or a file as SAM's authors .*{text}"
        ):
            FAMILIES[name](tmp_path / "own.pth")
    torch.save({**state, "evil": Poison()}, tmp_path / "own.pth")
    with pytest.raises(ValueError, match="the Python object"):
        FAMILIES[name](tmp_path / "own.pth")


@pytest.mark.parametrize(("width", "layers", "heads"), [(768, 12, 12), (1280, 32, 16)])
def test_architectures_of_the_published_files(width, layers, heads):
    """ViT-B and ViT-H, by the shapes of their tensors."""
    seen = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    seen["global_attn_indexes"] = [layers // 4 * (i + 1) - 1 for i in range(4)]
    wanted = transformers.SamConfig(vision_config={**seen, "mlp_dim": 4 * width})
    with torch.device("meta"):
        state = own_names(transformers.SamModel(wanted).state_dict())
    for part, values in sam_names.architecture(state).items():
        assert {k: getattr(getattr(wanted, part), k) for k in values} == values


def same_answers(name, folder):
    batch, image = prompted(name, (40, 64)), picture((40, 64))
    made, own = FAMILIES[name](folder), generalist(name)
    answers = [g.decode(g.encode(image), batch).logits for g in (made, own)]
    return torch.allclose(*answers, atol=1e-3)


def test_the_published_files_of_sam_2_load(folders, tmp_path):
    """Its repositories hold the model for videos: that config, and tensors of the memory, too."""
    memory = {"memory_attention.layers.0.linear1.weight": torch.zeros(3), "no_object_pointer": torch.zeros(2)}
    folder = changed(folders, tmp_path, "sam2", lambda state: state | memory)
    written = transformers.Sam2VideoConfig(**sam2_parts()).to_dict()
    assert written["model_type"] == "sam2_video"
    (folder / "config.json").write_text(json.dumps(written))
    assert same_answers("sam2", folder)


def test_the_published_files_of_sam_3_load(folders, tmp_path):
    """Its repository holds detector and tracker in one: a config with both, tensors under other names."""

    def published(state):
        names = {n: n.removeprefix("tracker_model.") for n in state}
        names = {
            n: new if new.startswith(("detector_model", "tracker_neck")) else n for n, new in names.items()
        }
        extra = {"detector_model.geometry_encoder.a.weight": torch.zeros(2)}
        extra |= {"tracker_model.memory_encoder.b.weight": torch.zeros(2)}
        return {names[n]: value for n, value in state.items()} | extra

    folder = changed(folders, tmp_path, "sam3", published)
    tracker = json.loads((folder / "config.json").read_text())
    written = {
        "model_type": "sam3_video",
        "tracker_config": tracker,
        "detector_config": {"model_type": "sam3"},
    }
    (folder / "config.json").write_text(json.dumps(written))
    assert same_answers("sam3", folder)


def test_hub_repositories_come_from_the_cache_alone(folders, tmp_path, offline, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    unknown = (
        r"neither a folder me/small-sam nor a repository of that name in the local cache, and nothing is"
    )
    with pytest.raises(FileNotFoundError, match=rf"{unknown} downloaded unasked; `hf download me/small-sam`"):
        Sam("me/small-sam")
    snapshot = tmp_path / "models--me--small-sam" / "snapshots" / "abc"
    shutil.copytree(folders / "sam", snapshot)
    (tmp_path / "models--me--small-sam" / "refs").mkdir()
    (tmp_path / "models--me--small-sam" / "refs" / "main").write_text("abc")
    assert Sam("me/small-sam").spec.name == "sam"
    assert Sam("me/small-sam", revision="main").side == 64
    with pytest.raises(FileNotFoundError, match="hf download me/small-sam"):
        Sam("me/small-sam", revision="other")


def test_downloads_that_fail_say_so(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="the download failed: "):
        Sam("me/small-sam", download=True)


def test_without_transformers(monkeypatch, folders):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"Sam\(\) needs transformers: pip install 'semisam\[hf\]'"):
        Sam(folders / "sam")
    settings = [("term.generalists", ["sam"]), ("term.generalist_options.sam.checkpoint", "nowhere")]
    with pytest.raises(config.ConfigError, match=r"term.generalists: Sam\(\) needs transformers"):
        build_term(config.load(settings=settings))
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(__version__="4.40.0"))
    with pytest.raises(
        ImportError, match=r"needs Sam3TrackerModel of transformers, which version 4.40.0 does"
    ):
        Sam3(folders / "sam3")


def test_importing_loads_neither_transformers_nor_weights():
    import subprocess  # noqa: PLC0415

    code = "import sys, semisam.generalists.hf_sam; print('transformers' in sys.modules)"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# ---- in the term --------------------------------------------------------------------------------


def scene(shape, seed=2):
    """Images [2, 1, *shape] and a specialist's logits [2, 3, *shape] with two objects each."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(2, 1, *shape, generator=generator)
    logits = torch.randn(2, 3, *shape, generator=generator)
    for c, start in ((1, 2), (2, 12)):
        logits[:, c, ..., 4:12, start : start + 8] += 6
    return images, logits


@pytest.mark.parametrize(
    ("name", "mode"),
    [*[(n, m) for n in CLICKED for m in ("point", "unc", "mask", "mixed", "box")], ("medsam", "box")],
)
def test_one_step_of_the_term(name, mode):
    images, logits = scene((20, 24))
    images.requires_grad_()
    made = generalist(name)
    term = SemiSAMTerm(made, total_steps=100, mode=mode, clicks=3, sample_gate=0.0, warmup=0.0)
    losses = []
    for _ in range(2):
        student = logits.clone().requires_grad_()
        loss = term(images, student, step=10)
        loss.backward()
        losses.append(float(loss.detach()))
        assert student.grad.isfinite().all()
        assert bool(student.grad.any())
    assert losses[0] == losses[1] > 0
    assert images.grad is None
    assert all(p.grad is None for p in made.model.parameters())
    assert term.diagnostics["skipped"] == 0
    assert term.diagnostics["failed_rows"] == 0
    assert (term.diagnostics["clicks"] > 0) == (mode in ("point", "unc", "mixed"))


@pytest.mark.parametrize(
    ("name", "mode"),
    [("sam", m) for m in ("point", "unc", "mask", "mixed", "box")]
    + [("sam2", "mixed"), ("sam3", "mixed"), ("medsam", "box")],
)
def test_one_step_of_the_term_on_volumes(name, mode):
    images, logits = scene((5, 20, 24))
    logits[:, 1:, 0] -= 20  # nothing in the first slice
    logits.requires_grad_()
    term = SemiSAMTerm(generalist(name), total_steps=100, mode=mode, clicks=2, sample_gate=0.0, warmup=0.0)
    loss = term(images, logits, step=10)
    loss.backward()
    assert float(loss.detach()) > 0
    assert logits.grad.isfinite().all()
    assert bool(logits.grad.any())
    answer = term.last.answers[name]
    assert answer.shape == (2, 2, 5, 20, 24)
    assert (answer[:, :, 0] == -10).all()
    assert float(answer[:, :, 1:].std(dim=(2, 3, 4)).min()) > 0.02


def test_volumes_along_another_axis_are_turned_volumes():
    images, logits = scene((5, 20, 24))
    options = {"total_steps": 100, "mode": "mixed", "clicks": 2, "sample_gate": 0.0, "warmup": 0.0}
    first = SemiSAMTerm(generalist("sam", slice_axis=0), **options)
    last = SemiSAMTerm(generalist("sam", slice_axis=2), **options)
    one = first(images, logits, step=10)
    other = last(images.movedim(2, 4), logits.movedim(2, 4), step=10)
    assert float(one) == pytest.approx(float(other), rel=1e-5)
    assert torch.allclose(first.last.answers["sam"].movedim(2, 4), last.last.answers["sam"], atol=1e-3)


def test_the_command_line_takes_a_folder(folders):
    settings = [("term.generalists", ["sam2"])]
    settings.append(("term.generalist_options.sam2.checkpoint", str(folders / "sam2")))
    settings.append(("term.generalist_options.sam2.slice_axis", 2))
    term = build_term(config.load(settings=settings))
    assert term.generalists["sam2"].spec.slice_axis == 2
    wrong = [*settings[:1], ("term.generalist_options.sam2.checkpoint", str(folders / "sam"))]
    with pytest.raises(
        config.ConfigError, match=r"term.generalists: Sam2\(\): checkpoint: expected model_type"
    ):
        build_term(config.load(settings=wrong))


def test_a_training_from_files(folders, tmp_path):
    """A whole run on volumes, slice by slice: gate, teaching, and the folder's files in the record."""
    data = write_phantoms(tmp_path / "data", labeled=3, unlabeled=2, test=0, shape=(20, 20, 20))
    sizes = {"train.patch_size": [16, 16, 16], "train.steps": 2, "term.gate_steps": 1, "term.gate_every": 2}
    settings = {"data.root": str(data), "data.labeled": 2, "data.validation": 1, **sizes}
    settings |= {"specialist.options": {"channels": [4, 8]}, "train.device": "cpu", "train.log_every": 1}
    settings |= {"term.generalists": ["sam"], "term.options.clicks": 2, "term.options.warmup": 0.0}
    settings["term.generalist_options.sam.checkpoint"] = str(folders / "sam")
    trainer.train(config.load(settings=list(settings.items())), tmp_path / "run")
    written = json.loads((tmp_path / "run" / "run.json").read_text())["generalist_weights"]["sam"]
    assert written["path"] == str(folders / "sam")
    assert sorted(written["sha256"]) == ["config.json", "model.safetensors"]
    assert written["sha256"]["config.json"] == record.sha256(folders / "sam" / "config.json")
    assert ",sam," in (tmp_path / "run" / "gate.csv").read_text()


def test_the_mask_prompt_of_the_term_is_the_specialists(monkeypatch):
    """In mode mask the model sees the specialist's probability where the image lies, and nothing else."""
    images, logits = scene((32, 64))
    made, seen = generalist("sam"), []
    decode = made.decode
    monkeypatch.setattr(
        made, "decode", lambda s, batch, active=None: (seen.append(batch), decode(s, batch, active))[1]
    )
    SemiSAMTerm(made, total_steps=100, mode="mask", box=False)(images, logits, step=50)
    (batch,) = seen
    assert batch.labels.shape[2] == 0
    assert batch.boxes is None
    prob = logits.softmax(1)[:, 1:]
    expected = prompts.mask_logits(F.avg_pool2d(prob, 2).flatten(0, 1), (16, 32))
    assert torch.allclose(batch.mask_logits[:, :, :16].flatten(0, 1), expected, atol=1e-4)
    assert (batch.mask_logits[:, :, 16:] == -10).all()


def test_a_changed_model_changes_answers():
    """Weights of every part reach the answer."""
    image, batch = picture((40, 64)), prompted("sam", (40, 64))
    first = generalist("sam").decode(generalist("sam").encode(image), batch).logits
    model = randomised(transformers.SamModel(small("sam").config), seed=9)
    other = Sam(model=model)
    assert float((other.decode(other.encode(image), batch).logits - first).abs().max()) > 0.1
