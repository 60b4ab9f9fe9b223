# SPDX-License-Identifier: Apache-2.0
"""SAM-Med3D: names and shapes, both ways of padded attention, prompts, frames, weights, and the term."""

from __future__ import annotations

import argparse
import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from semisam import SemiSAMTerm, generalists, weights
from semisam.commands import train as train_command
from semisam.engine import config
from semisam.generalists import sam_med3d
from semisam.generalists.sam_med3d import SamMed3D
from semisam.generalists.sam_med3d_network import Architecture, Attention, SamMed3DNetwork
from semisam.prompts import PromptBatch

SMALL = Architecture.small()


@pytest.fixture(scope="module")
def network():
    """Random weights that leave nothing at zero, relative positions included."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = SamMed3DNetwork(SMALL)
        for name, parameter in made.named_parameters():
            if "rel_pos" in name or name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.5)
    return made.eval()


@pytest.fixture
def sam(network):
    return SamMed3D(network=network)


def clicks(shape, points, labels, **more):
    """Points [B, F, K, 3] and labels [B, F, K] as a batch."""
    return PromptBatch(shape, torch.tensor(points), torch.tensor(labels, dtype=torch.int32), **more)


# ---- network ------------------------------------------------------------------------------------


def test_names_and_shapes_are_the_published_ones():
    lines = (Path(__file__).parent / "sam_med3d_state_dict.tsv").read_text().splitlines()
    published = dict(line.split("\t") for line in lines)
    with torch.device("meta"):
        state = SamMed3DNetwork().state_dict()
    assert {name: str(tuple(value.shape)) for name, value in state.items()} == published
    assert len(state) == 324
    assert sum(value.numel() for value in state.values()) == 100_509_616


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_padding_as_one_key_equals_the_padded_computation(network, dtype, bound):
    x = torch.randn(2, 1, 32, 32, 32, generator=torch.Generator().manual_seed(1), dtype=dtype)
    made = SamMed3DNetwork(SMALL).eval().to(dtype)
    made.load_state_dict(network.state_dict())
    with torch.no_grad():
        exact, padded = made.embed(x), made.embed(x, exact_shortcut=False)
    assert exact.shape == (2, 48, 4, 4, 4)
    assert float((exact - padded).abs().max()) < bound
    assert float(exact.std()) > 0.5


def test_padding_as_one_key_at_the_published_size():
    """One windowed layer of 512 tokens in a window of 2 744."""
    torch.manual_seed(3)
    layer = Attention(768, 12, 8, 14)
    for table in (layer.rel_pos_d, layer.rel_pos_h, layer.rel_pos_w):
        torch.nn.init.normal_(table, std=0.3)
    x = torch.randn(1, 8, 8, 8, 768)
    with torch.no_grad():
        assert float((layer(x, True) - layer(x, False)).abs().max()) < 1e-5


def test_attention_is_the_formula(rng):
    """Every score written out, padded keys one by one, with the queries of B and C at the key's index."""
    torch.manual_seed(5)
    n, window, width, heads = 2, 3, 8, 2
    layer = Attention(width, heads, n, window).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    x = torch.randn(1, n, n, n, width, dtype=torch.float64)
    padded = F.pad(x, (0, 0) + (0, window - n) * 3)
    q, k, v = layer.qkv(padded).reshape(window, window, window, 3, heads, -1).unbind(3)
    tables = (layer.rel_pos_d, layer.rel_pos_h, layer.rel_pos_w)

    def r(table, i, j):
        return tables[table][i - j + window - 1]

    cells = list(itertools.product(range(window), repeat=3))
    out = torch.zeros(n, n, n, heads, width // heads, dtype=torch.float64)
    for i, h in itertools.product(itertools.product(range(n), repeat=3), range(heads)):
        scores = []
        for j in cells:
            s = q[i][h] @ k[j][h] / math.sqrt(width // heads)
            s = s + q[i][h] @ r(0, i[0], j[2])
            s = s + q[i[0], i[1], j[0]][h] @ r(1, i[1], j[2])
            s = s + q[i[0], i[1], j[1]][h] @ r(2, j[1], j[2])
            scores.append(s)
        weight = torch.stack(scores).softmax(0)
        out[i][h] = sum(w * v[j][h] for w, j in zip(weight, cells, strict=True))
    expected = layer.proj(out.flatten(3))
    assert torch.allclose(layer(x, True)[0], expected, atol=1e-12)
    assert torch.allclose(layer(x, False)[0], expected, atol=1e-12)


def test_a_cell_has_the_code_of_a_point_with_two_axes_exchanged(network):
    cell = SMALL.side // SMALL.grid
    dense = network.prompt_encoder.positions()[0]
    for a, b, c in ((0, 1, 2), (3, 0, 1), (2, 2, 3)):
        centre = torch.tensor([[[a, b, c]]]) * cell + (cell - 1) / 2
        token = network.prompt_encoder.sparse(centre, torch.tensor([[1]]))[0, 0]
        code = token - network.prompt_encoder.point_embeddings[1].weight[0]
        assert torch.allclose(dense[:, b, a, c], code, atol=1e-4)  # angles up to 30: float32 sine


def test_tokens_of_points(network):
    encoder = network.prompt_encoder
    points = torch.tensor([[[3.0, 5.0, 7.0], [0.0, 0.0, 0.0]]])
    tokens = encoder.sparse(points, torch.tensor([[0, -1]]))
    assert tokens.shape == (1, 3, 48)
    e = (
        (2 * (points[0, 0] + 0.5) / 32 - 1)
        @ encoder.pe_layer.positional_encoding_gaussian_matrix
        * 2
        * math.pi
    )
    code = torch.cat([e.sin(), e.cos(), e.sin()])
    assert torch.allclose(tokens[0, 0], code + encoder.point_embeddings[0].weight[0], atol=1e-5)
    for i in (1, 2):  # padding, and the token that always follows
        assert torch.equal(tokens[0, i], encoder.not_a_point_embed.weight[0])
    assert encoder.sparse(points[:, :0], torch.zeros(1, 0, dtype=torch.int64)).shape == (1, 0, 48)


def test_only_mask_0_is_computed(network):
    made = SamMed3DNetwork(SMALL).eval()
    made.load_state_dict(network.state_dict())
    features = torch.randn(1, 48, 4, 4, 4)
    asked = (torch.full((1, 1, 3), 9.0), torch.ones(1, 1, dtype=torch.int64), torch.zeros(1, 1, 16, 16, 16))
    with torch.no_grad():
        before, _ = made.decode(features, *asked)
        for other in made.mask_decoder.output_hypernetworks_mlps[1:]:
            for parameter in other.parameters():
                parameter.fill_(float("nan"))
        after, quality = made.decode(features, *asked)
    assert before.shape == (1, 1, 16, 16, 16)
    assert torch.equal(before, after)
    assert quality.shape == (1,)


def test_bad_architecture():
    with pytest.raises(ValueError, match="architecture: expected channels in multiples of 48"):
        SamMed3DNetwork(replace(SMALL, channels=50))
    with pytest.raises(ValueError, match="a window of at least the grid"):
        SamMed3DNetwork(replace(SMALL, window=3))


# ---- patch and cube -----------------------------------------------------------------------------

SHAPES = [(20, 24, 16), (31, 32, 5), (32, 32, 32), (45, 32, 20), (7, 60, 33)]


def ramp(shape, axis):
    """[1, 1, *shape]: every voxel's index along an axis."""
    index = torch.arange(shape[axis], dtype=torch.float32).reshape([-1 if d == axis else 1 for d in range(3)])
    return index.expand(shape)[None, None].clone()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_images_and_points_go_to_the_same_place(sam, shape, axis):
    cube = sam._into_cube(ramp(shape, axis), -1.0)
    assert cube.shape == (1, 1, 32, 32, 32)
    middle = [n // 2 for n in shape]
    for at in range(2, shape[axis] - 2):
        middle[axis] = at
        batch = clicks(shape, [[[middle]]], [[[1]]])
        there = batch.to_sam_med3d(32)["points"][0, 0]
        lower = there.floor().long()
        share = float(there[axis] - lower[axis])
        ahead = lower.clone()
        ahead[axis] += 1
        found = (1 - share) * cube[0, 0][tuple(lower)] + share * cube[0, 0][tuple(ahead)]
        # Resizing interpolates between voxels; a ramp stays one, but for float32's rounding of the scale.
        assert abs(float(found) - at) < 1e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_answers_come_back_to_where_the_image_was(sam, shape):
    """Logits that are a ramp over the cube are the points' coordinates on the patch."""
    state = sam.encode(torch.rand(1, 1, *shape))
    for axis in range(3):
        low = ramp((16, 16, 16), axis) * 2 + 0.5  # the cube's coordinate at the centre of a low-res voxel
        patch = sam._to_patch(low, state)
        assert patch.shape == (1, 1, *shape)
        centre = [n // 2 for n in shape]
        for at in range(shape[axis] // 4, shape[axis] - shape[axis] // 4):
            centre[axis] = at
            there = clicks(shape, [[[centre]]], [[[1]]]).to_sam_med3d(32)["points"][0, 0, axis]
            assert abs(float(patch[0, 0][tuple(centre)]) - float(there)) < 1e-3


def test_images_are_padded_with_background_and_standardised(sam):
    rng = np.random.default_rng(3)
    image = 100 + rng.gamma(2.0, 30.0, (20, 24, 17)).astype(np.float32)
    cube = sam._standardised(torch.from_numpy(image)[None, None])[0, 0].numpy()
    above = image[image > image.min()].astype(np.float64)
    expected = (image - above.mean()) / above.std(ddof=1)
    inside = cube[6:26, 4:28, 7:24]
    assert np.abs(inside - expected).max() < 1e-5
    outside = cube.copy()
    outside[6:26, 4:28, 7:24] = expected.min()
    assert np.abs(outside - expected.min()).max() < 1e-5
    raw = SamMed3D(network=sam.network, background=0.0)
    zeros = np.where(image > 150, image, 0)
    cube = raw._standardised(torch.from_numpy(zeros)[None, None])[0, 0].numpy()
    mean, deviation = zeros[zeros > 0].mean(dtype=np.float64), zeros[zeros > 0].std(ddof=1, dtype=np.float64)
    assert np.abs(cube[6:26, 4:28, 7:24] - (zeros - mean) / deviation).max() < 1e-5
    assert abs(cube[0, 0, 0] + mean / deviation) < 1e-5


def test_constant_and_single_voxel_images_stay_finite(sam):
    image = torch.full((2, 1, 9, 9, 9), 7.0)
    image[1, 0, 4, 4, 4] = 9
    cube = sam._standardised(image)
    assert cube.isfinite().all()
    assert not cube[0].any()


def test_spacing_resamples_only_on_demand(sam):
    image = torch.rand(1, 1, 16, 16, 8)
    plain = sam.encode(image, spacing=(1, 1, 3))
    assert plain.resampled == (16, 16, 8)
    resampling = SamMed3D(network=sam.network, resample_mm=1.5)
    state = resampling.encode(image, spacing=(1, 1, 3))
    assert state.resampled == (11, 11, 16)
    assert state.shape == (16, 16, 8)
    assert resampling.encode(image).resampled == (16, 16, 8)
    batch = clicks((16, 16, 8), [[[[3, 12, 5]]]], [[[1]]])
    ((_, points, _, _),) = resampling._groups(state, batch, torch.ones(1, dtype=torch.bool))
    axes = zip((3, 12, 5), (11, 11, 16), (16, 16, 8), strict=True)
    expected = [(c + 0.5) * m / n - 0.5 + (32 - m) // 2 for c, m, n in axes]
    assert np.allclose(points[0, 0].tolist(), expected, atol=1e-5)
    answer = resampling.decode(state, batch)
    assert answer.logits.shape == (1, 1, 16, 16, 8)


def test_mask_prompts_go_where_the_image_goes(sam):
    prob = torch.zeros(1, 2, 20, 24, 16)
    prob[0, 0, 2:10, 4:12, 8:16] = 1  # in the cube 8..15, 8..15, 16..23: cells 4..7, 4..7, 8..11 of 16
    prompt = sam.mask_prompt(prob, sam.encode(torch.rand(1, 1, 20, 24, 16)))
    assert prompt.shape == (1, 2, 16, 16, 16)
    assert (prompt[0, 0, 4:8, 4:8, 8:12] == 10).all()
    assert int((prompt > 0).sum()) == 64
    assert (prompt[0, 1] == -10).all()


# ---- prompts ------------------------------------------------------------------------------------


def test_rows_do_not_depend_on_each_other(sam):
    """One click, two clicks with padding between, a mask alone: each as if it were asked alone."""
    shape = (20, 24, 16)
    images = torch.rand(3, 1, *shape, generator=torch.Generator().manual_seed(4))
    state = sam.encode(images)
    points = [[[[3, 4, 5], [9, 9, 9], [1, 1, 1]]], [[[5, 6, 7], [0, 0, 0], [8, 8, 8]]], [[[0, 0, 0]] * 3]]
    labels = [[[1, -1, -1]], [[1, -1, 0]], [[-1, -1, -1]]]
    masks = torch.randn(3, 1, 16, 16, 16, generator=torch.Generator().manual_seed(5))
    masks[0] = 0
    together = sam.decode(state, clicks(shape, points, labels, mask_logits=masks))
    alone = [
        ([[[[3, 4, 5]]]], [[[1]]], None),
        ([[[[5, 6, 7], [8, 8, 8]]]], [[[1, 0]]], masks[1:2]),
        ([[[]]], [[[]]], masks[2:3]),
    ]
    for i, (p, la, mask) in enumerate(alone):
        batch = PromptBatch(
            shape,
            torch.tensor(p, dtype=torch.int64).reshape(1, 1, -1, 3),
            torch.tensor(la, dtype=torch.int32).reshape(1, 1, -1),
            None,
            mask,
        )
        one = sam.decode(sam.encode(images[i : i + 1]), batch)
        assert torch.allclose(one.logits[0], together.logits[i], atol=1e-5)
        assert torch.allclose(one.low_res[0], together.low_res[i], atol=1e-5)
    assert together.logits.std(dim=(1, 2, 3, 4)).min() > 0


def test_rows_that_are_not_asked_for(sam):
    shape = (20, 24, 16)
    state = sam.encode(torch.rand(2, 1, *shape))
    batch = clicks(shape, [[[[3, 4, 5]], [[1, 2, 3]]]] * 2, [[[1], [0]]] * 2)
    everything = sam.decode(state, batch)
    some = sam.decode(state, batch, torch.tensor([[True, False], [False, True]]))
    assert (some.logits[0, 1] == -10).all()
    assert (some.low_res[1, 0] == -10).all()
    assert torch.allclose(some.logits[0, 0], everything.logits[0, 0], atol=1e-5)
    none = sam.decode(state, batch, torch.zeros(2, 2, dtype=torch.bool))
    assert (none.logits == -10).all()


def test_clicks_masks_and_images_all_matter(sam):
    shape = (20, 24, 16)
    images = torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(4))
    state = sam.encode(images)
    first = sam.decode(state, clicks(shape, [[[[3, 4, 5]]]], [[[1]]])).logits
    for batch in (
        clicks(shape, [[[[3, 4, 6]]]], [[[1]]]),
        clicks(shape, [[[[3, 4, 5]]]], [[[0]]]),
        clicks(shape, [[[[3, 4, 5]]]], [[[1]]], mask_logits=torch.ones(1, 1, 16, 16, 16)),
    ):
        assert float((sam.decode(state, batch).logits - first).abs().max()) > 1e-4
    other = sam.decode(sam.encode(images.flip(2)), clicks(shape, [[[[3, 4, 5]]]], [[[1]]])).logits
    assert float((other - first).abs().max()) > 1e-4


def test_frozen_and_without_gradient(sam):
    assert not sam.network.training
    assert not any(p.requires_grad for p in sam.network.parameters())
    images = torch.rand(1, 1, 20, 24, 16, requires_grad=True)
    state = sam.encode(images)
    answer = sam.decode(state, clicks((20, 24, 16), [[[[3, 4, 5]]]], [[[1]]]))
    assert not state.features.requires_grad
    assert not answer.logits.requires_grad


def test_half_precision_is_near(sam):
    half = SamMed3D(network=sam.network, precision="bfloat16")
    image = torch.rand(1, 1, 20, 24, 16, generator=torch.Generator().manual_seed(4))
    batch = clicks((20, 24, 16), [[[[3, 4, 5]]]], [[[1]]])
    full, near = (s.decode(s.encode(image), batch).logits for s in (sam, half))
    assert near.dtype == torch.float32
    assert 0 < float((full - near).abs().max()) < 0.1 * float(full.abs().max())


def test_several_channels_are_standardised_and_averaged(sam):
    image = torch.rand(1, 1, 20, 24, 16)
    one, three = sam.encode(image), sam.encode(torch.cat([image, 5 * image + 3, image * 100], 1))
    assert torch.allclose(one.features, three.features, atol=1e-3)


# ---- bad input ----------------------------------------------------------------------------------


def test_bad_input(sam, network):
    shape = (20, 24, 16)
    state = sam.encode(torch.rand(1, 1, *shape))
    with pytest.raises(TypeError, match="images: expected a torch tensor, got ndarray"):
        sam.encode(np.zeros((1, 1, 8, 8, 8)))
    with pytest.raises(ValueError, match=r"images: expected \[B, channels, D, H, W\], got shape \(1, 1"):
        sam.encode(torch.zeros(1, 1, 8, 8))
    batch = clicks(shape, [[[[3, 4, 5]]]], [[[1]]])
    with pytest.raises(ValueError, match="prompts: expected 1 samples of the images' shape"):
        sam.decode(state, clicks((20, 24, 17), [[[[3, 4, 5]]]], [[[1]]]))
    with pytest.raises(ValueError, match=r"prompts.boxes: expected None"):
        sam.decode(state, replace(batch, boxes=torch.zeros(1, 1, 6)))
    with pytest.raises(ValueError, match=r"mask_logits: expected size \(16, 16, 16\)"):
        sam.decode(state, replace(batch, mask_logits=torch.zeros(1, 1, 8, 8, 8)))
    with pytest.raises(ValueError, match=r"active: expected shape \(1, 1\), got \(1,\)"):
        sam.decode(state, batch, torch.ones(1, dtype=torch.bool))
    with pytest.raises(ValueError, match="checkpoint: expected the file with the weights of sam-med3d-turbo"):
        generalists.build("sam-med3d-turbo")
    with pytest.raises(ValueError, match="got both"):
        SamMed3D("file.pth", network=network)
    with pytest.raises(ValueError, match="precision: expected auto, float32"):
        SamMed3D(network=network, precision="fp8")
    with pytest.raises(ValueError, match="resample_mm: expected a positive number"):
        SamMed3D(network=network, resample_mm=0)
    with pytest.raises(FileNotFoundError):
        SamMed3D("nowhere.pth")


class Poison:
    def __reduce__(self):
        return (print, ("run",))


@pytest.fixture
def small_network(monkeypatch):
    """SamMed3D builds the small network where it would build the published one."""
    monkeypatch.setattr(sam_med3d, "SamMed3DNetwork", lambda: SamMed3DNetwork(SMALL))


def test_checkpoints_load_as_published(network, tmp_path, small_network):
    """The tensors lie under model_state_dict, beside what else a training keeps."""
    extra = {
        "epoch": 7,
        "args": argparse.Namespace(lr=1e-4),
        "losses": [0.3],
        "optimizer_state_dict": {"a": 1},
    }
    torch.save({"model_state_dict": network.state_dict(), **extra}, tmp_path / "turbo.pth")
    made = generalists.build("sam-med3d-turbo", checkpoint=tmp_path / "turbo.pth")
    assert all(
        torch.equal(a, b) for a, b in zip(made.network.parameters(), network.parameters(), strict=True)
    )
    from safetensors.torch import save_file  # noqa: PLC0415

    save_file(network.state_dict(), tmp_path / "w.safetensors")
    assert (
        generalists.build("segany-pet", checkpoint=str(tmp_path / "w.safetensors")).spec.name == "segany-pet"
    )


def test_wrong_checkpoints_are_refused_with_what_differs(network, tmp_path, small_network, capsys):
    state = network.state_dict()
    missing = dict(list(state.items())[1:])
    reshaped = {**state, "prompt_encoder.no_mask_embed.weight": torch.zeros(1, 7)}
    for content, text in (
        (missing, "missing: image_encoder.pos_embed"),
        ({**state, "other": torch.zeros(1)}, "unexpected: other"),
        (reshaped, r"of another shape: prompt_encoder.no_mask_embed.weight \(1, 7\), expected \(1, 48\)"),
        ({**state, "evil": Poison()}, "the Python object"),
        ({"model_state_dict": {}}, "expected tensors by name"),
    ):
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(ValueError, match=f"SamMed3D.*checkpoint: .*{text}"):
            SamMed3D(tmp_path / "w.pth")
    torch.save(state, tmp_path / "w.pth")
    whole = (tmp_path / "w.pth").read_bytes()
    (tmp_path / "w.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damage or in another format"):
        SamMed3D(tmp_path / "w.pth")
    assert "run" not in capsys.readouterr().out
    torch.save({"a": torch.zeros(1), "args": argparse.Namespace()}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="Namespace"):  # only for those who say that there is a rest
        weights.read(tmp_path / "w.pth")


# ---- in the term and from the command line ------------------------------------------------------


@pytest.mark.parametrize("mode", ["point", "unc", "mask", "mixed"])
def test_the_term_with_it(sam, mode):
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(2, 1, 20, 24, 16, generator=generator)
    logits = torch.randn(2, 3, 20, 24, 16, generator=generator)
    logits[:, 1, 4:12, 4:12, 4:12] += 6
    logits[:, 2, 12:18, 4:12, 4:12] += 6
    logits.requires_grad_()
    term = SemiSAMTerm(sam, total_steps=100, mode=mode, clicks=3, sample_gate=0.0, warmup=0.0)
    loss = term(images, logits, step=10)
    loss.backward()
    assert float(loss.detach()) > 0
    assert logits.grad.isfinite().all()
    assert bool(logits.grad.any())
    assert term.diagnostics["skipped"] == 0
    again = SemiSAMTerm(sam, total_steps=100, mode=mode, clicks=3, sample_gate=0.0, warmup=0.0)
    assert float(again(images, logits, step=10).detach()) == float(loss.detach())


def test_checkpoint_on_the_command_line():
    parser = argparse.ArgumentParser()
    train_command.configure(parser)

    def made(*words):
        return train_command._config(parser.parse_args(["data", "--out", "run", *words])).term

    one = made("--generalist", "sam-med3d-turbo", "--checkpoint", "a=b.pth")
    assert one.generalist_options == {"sam-med3d-turbo": {"checkpoint": "a=b.pth"}}
    two = made(
        "--generalist",
        "sam-med3d",
        "segany-pet",
        "random-walker",
        "--checkpoint",
        "segany-pet=p",
        "sam-med3d=q",
    )
    assert two.generalist_options == {"segany-pet": {"checkpoint": "p"}, "sam-med3d": {"checkpoint": "q"}}
    for words in (["--checkpoint", "f"], ["--generalist", "sam-med3d", "segany-pet", "--checkpoint", "f"]):
        with pytest.raises(config.ConfigError, match="--checkpoint f: expected NAME=FILE"):
            made(*words)
    with pytest.raises(config.ConfigError, match="is a class of yours"):
        made("--generalist", "my.Model", "--checkpoint", "f")
