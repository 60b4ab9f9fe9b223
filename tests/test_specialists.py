# SPDX-License-Identifier: Apache-2.0
"""The networks against their description, written out a second time: names, shapes, arithmetic, dropout."""

from __future__ import annotations

import copy
import math
import os
import pickle
import re
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import semisam
from semisam.specialists import UNet2d, UNet3d, VNet, build, divisor, load_weights

NAMES = ("vnet", "unet3d", "unet2d", "unet2d-transpose")
SMALL = {"in_channels": 2, "num_classes": 3, "channels": (4, 8, 16)}


def small(name, **options):
    torch.manual_seed(0)
    return build(name, **{**SMALL, **options})


def image(network, *, side=8, batch=2, dtype=torch.float32):
    """Sides that differ, so that a network which exchanges axes cannot hide."""
    space = (2 * side, side, 3 * side)[: network.dimensions]
    g = torch.Generator().manual_seed(1)
    return torch.randn((batch, network.in_channels, *space), generator=g, dtype=dtype)


def scrambled(network):
    """The network in float64 and eval mode with every parameter and statistic away from its default."""
    g = torch.Generator().manual_seed(2)
    state = network.double().eval().state_dict()
    for name, value in state.items():
        if "running_var" in name:
            value.copy_(torch.rand(value.shape, generator=g, dtype=value.dtype) + 0.5)
        elif value.is_floating_point():
            scale = math.sqrt(2 / value[0].numel()) if value.ndim > 1 else 0.2
            center = float(value.ndim == 1 and name.endswith(".weight"))
            value.copy_(center + scale * torch.randn(value.shape, generator=g, dtype=value.dtype))
    return network


# ---- parameters ---------------------------------------------------------------------------------


def count(network):
    return sum(p.numel() for p in network.parameters())


def test_published_parameter_counts():
    assert count(VNet(1, 2)) == 9_448_866
    assert count(UNet3d(1, 2)) == 5_884_050
    assert count(UNet2d(1, 2)) == 1_813_474
    assert count(UNet2d(3, 2, up="transpose")) == 1_944_322


# Block, convolutions in it, shape of the first one's weight; the others are [out, out, ...].
VNET = [
    ("block_one", 1, (16, 1, 3, 3, 3)),
    ("block_one_dw", 1, (32, 16, 2, 2, 2)),
    ("block_two", 2, (32, 32, 3, 3, 3)),
    ("block_two_dw", 1, (64, 32, 2, 2, 2)),
    ("block_three", 3, (64, 64, 3, 3, 3)),
    ("block_three_dw", 1, (128, 64, 2, 2, 2)),
    ("block_four", 3, (128, 128, 3, 3, 3)),
    ("block_four_dw", 1, (256, 128, 2, 2, 2)),
    ("block_five", 3, (256, 256, 3, 3, 3)),
    ("block_five_up", 1, (256, 128, 2, 2, 2)),
    ("block_six", 3, (128, 128, 3, 3, 3)),
    ("block_six_up", 1, (128, 64, 2, 2, 2)),
    ("block_seven", 3, (64, 64, 3, 3, 3)),
    ("block_seven_up", 1, (64, 32, 2, 2, 2)),
    ("block_eight", 2, (32, 32, 3, 3, 3)),
    ("block_eight_up", 1, (32, 16, 2, 2, 2)),
    ("block_nine", 1, (16, 16, 3, 3, 3)),
]


def batch_norm_shapes(name, width):
    shapes = {f"{name}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")}
    return {**shapes, f"{name}.num_batches_tracked": ()}


def vnet_shapes():
    shapes = {"out_conv.weight": (2, 16, 1, 1, 1), "out_conv.bias": (2,)}
    for block, convolutions, weight in VNET:
        width = weight[1] if block.endswith("_up") else weight[0]
        for i in (0, 3, 6)[:convolutions]:
            shapes[f"{block}.conv.{i}.weight"] = weight
            shapes[f"{block}.conv.{i}.bias"] = (width,)
            shapes |= batch_norm_shapes(f"{block}.conv.{i + 1}", width)
    return shapes


UNET3D = [
    ("conv1", 1, 16),
    ("conv2", 16, 32),
    ("conv3", 32, 64),
    ("conv4", 64, 128),
    ("center", 128, 256),
    ("up_concat4.conv", 256 + 128, 128),
    ("up_concat3.conv", 128 + 64, 64),
    ("up_concat2.conv", 64 + 32, 32),
    ("up_concat1.conv", 32 + 16, 16),
]


def unet3d_shapes():
    shapes = {"final.weight": (2, 16, 1, 1, 1), "final.bias": (2,)}
    for block, inputs, width in UNET3D:
        for conv, n in (("conv1", inputs), ("conv2", width)):
            shapes[f"{block}.{conv}.0.weight"] = (width, n, 3, 3, 3)
            shapes[f"{block}.{conv}.0.bias"] = (width,)
    return shapes


UNET2D = [
    ("encoder.in_conv.conv_conv", 1, 16),
    ("encoder.down1.maxpool_conv.1.conv_conv", 16, 32),
    ("encoder.down2.maxpool_conv.1.conv_conv", 32, 64),
    ("encoder.down3.maxpool_conv.1.conv_conv", 64, 128),
    ("encoder.down4.maxpool_conv.1.conv_conv", 128, 256),
    ("decoder.up1.conv.conv_conv", 256, 128),
    ("decoder.up2.conv.conv_conv", 128, 64),
    ("decoder.up3.conv.conv_conv", 64, 32),
    ("decoder.up4.conv.conv_conv", 32, 16),
]


def unet2d_shapes(up):
    shapes = {"decoder.out_conv.weight": (2, 16, 3, 3), "decoder.out_conv.bias": (2,)}
    for block, inputs, width in UNET2D:
        for i, n in ((0, inputs), (4, width)):
            shapes[f"{block}.{i}.weight"] = (width, n, 3, 3)
            shapes[f"{block}.{i}.bias"] = (width,)
            shapes |= batch_norm_shapes(f"{block}.{i + 1}", width)
    for k, below, skip in ((1, 256, 128), (2, 128, 64), (3, 64, 32), (4, 32, 16)):
        name = f"decoder.up{k}.{'up' if up == 'transpose' else 'conv1x1'}"
        weight = (below, skip, 2, 2) if up == "transpose" else (skip, below, 1, 1)
        shapes |= {f"{name}.weight": weight, f"{name}.bias": (skip,)}
    return shapes


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("vnet", vnet_shapes()),
        ("unet3d", unet3d_shapes()),
        ("unet2d", unet2d_shapes("bilinear")),
        ("unet2d-transpose", unet2d_shapes("transpose")),
    ],
)
def test_published_names_and_shapes(name, shapes):
    network = build(name, in_channels=1, num_classes=2)
    assert {n: tuple(v.shape) for n, v in network.state_dict().items()} == shapes
    published = {n: torch.full(shape, 0.25) for n, shape in shapes.items()}
    network.load_state_dict(published, strict=True)
    assert all(torch.all(p == 0.25) for p in network.parameters())


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        (
            "vnet",
            "block_one block_one_dw block_two block_two_dw block_three block_three_up block_four "
            "block_four_up block_five out_conv",
        ),
        ("unet3d", "conv1 conv2 center up_concat2 up_concat1 final"),
        ("unet2d", "encoder.in_conv encoder.down1 encoder.down2 decoder.up1 decoder.up2 decoder.out_conv"),
    ],
)
def test_fewer_levels_are_named_alike(name, blocks):
    pattern = r"((?:(?:en|de)coder\.)?[a-z_]+\d?)\."
    found = [re.match(pattern, n)[1] for n in small(name).state_dict()]
    assert list(dict.fromkeys(found)) == blocks.split()


def test_initialization():
    torch.manual_seed(0)
    network = UNet3d(1, 2)
    weight, bias = network.center.conv2[0].weight, network.center.conv2[0].bias
    fan_in = 256 * 27
    assert weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.01)
    assert weight.abs().max() > 4 * weight.std()  # normal, not uniform
    assert bias.abs().max() <= 1 / math.sqrt(fan_in)
    assert bias.abs().max() > 0.9 / math.sqrt(fan_in)
    for torchs_own in (VNet(1, 2).block_five.conv[3], UNet2d(1, 2).encoder["down4"][0][1][0][4]):
        bound = 1 / math.sqrt(torchs_own.weight[0].numel())
        assert 0.99 * bound < torchs_own.weight.abs().max() <= bound


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_decides_everything(name):
    def run():
        network = small(name)
        return network.state_dict(), network(image(network))

    (state, logits), (again, same) = run(), run()
    assert all(torch.equal(value, again[n]) for n, value in state.items())
    assert torch.equal(logits, same)


# ---- forward ------------------------------------------------------------------------------------


def normalized(s, x, name):
    statistics = s[f"{name}.running_mean"], s[f"{name}.running_var"]
    return F.batch_norm(x, *statistics, s[f"{name}.weight"], s[f"{name}.bias"])


def vnet(s, x):
    """V-Net's arithmetic in eval mode from its state, block by block."""

    def unit(x, name, i, operation, **options):
        x = operation(x, s[f"{name}.conv.{i}.weight"], s[f"{name}.conv.{i}.bias"], **options)
        return F.relu(normalized(s, x, f"{name}.conv.{i + 1}"))

    def block(x, name, convolutions):
        for i in range(convolutions):
            x = unit(x, f"block_{name}", 3 * i, F.conv3d, padding=1)
        return x

    def down(x, name):
        return unit(x, f"block_{name}_dw", 0, F.conv3d, stride=2)

    def up(x, name):
        return unit(x, f"block_{name}_up", 0, F.conv_transpose3d, stride=2)

    one = block(x, "one", 1)
    two = block(down(one, "one"), "two", 2)
    three = block(down(two, "two"), "three", 3)
    four = block(down(three, "three"), "four", 3)
    five = block(down(four, "four"), "five", 3)
    six = block(up(five, "five") + four, "six", 3)
    seven = block(up(six, "six") + three, "seven", 3)
    eight = block(up(seven, "seven") + two, "eight", 2)
    nine = block(up(eight, "eight") + one, "nine", 1)
    return F.conv3d(nine, s["out_conv.weight"], s["out_conv.bias"])


def unet3d(s, x):
    def block(x, name):
        for conv in ("conv1", "conv2"):
            x = F.conv3d(x, s[f"{name}.{conv}.0.weight"], s[f"{name}.{conv}.0.bias"], padding=1)
            mean = x.mean((2, 3, 4), keepdim=True)
            x = F.relu((x - mean) / (x.var((2, 3, 4), correction=0, keepdim=True) + 1e-5).sqrt())
        return x

    def up(x, skip, name):
        x = F.interpolate(x, scale_factor=2, mode="trilinear", align_corners=False)
        return block(torch.cat([skip, x], 1), name)

    one = block(x, "conv1")
    two = block(F.max_pool3d(one, 2), "conv2")
    three = block(F.max_pool3d(two, 2), "conv3")
    four = block(F.max_pool3d(three, 2), "conv4")
    x = block(F.max_pool3d(four, 2), "center")
    for skip, name in ((four, "up_concat4"), (three, "up_concat3"), (two, "up_concat2"), (one, "up_concat1")):
        x = up(x, skip, f"{name}.conv")
    return F.conv3d(x, s["final.weight"], s["final.bias"])


def unet2d(s, x):
    def block(x, name):
        for i in (0, 4):
            x = F.conv2d(x, s[f"{name}.{i}.weight"], s[f"{name}.{i}.bias"], padding=1)
            x = F.leaky_relu(normalized(s, x, f"{name}.{i + 1}"), 0.01)
        return x

    def up(x, skip, name):
        if f"{name}.up.weight" in s:
            x = F.conv_transpose2d(x, s[f"{name}.up.weight"], s[f"{name}.up.bias"], stride=2)
        else:
            x = F.conv2d(x, s[f"{name}.conv1x1.weight"], s[f"{name}.conv1x1.bias"])
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        return block(torch.cat([skip, x], 1), f"{name}.conv.conv_conv")

    features = [block(x, "encoder.in_conv.conv_conv")]
    for k in (1, 2, 3, 4):
        name = f"encoder.down{k}.maxpool_conv.1.conv_conv"
        features.append(block(F.max_pool2d(features[-1], 2), name))
    x = features[4]
    for k, skip in ((1, features[3]), (2, features[2]), (3, features[1]), (4, features[0])):
        x = up(x, skip, f"decoder.up{k}")
    return F.conv2d(x, s["decoder.out_conv.weight"], s["decoder.out_conv.bias"], padding=1)


@pytest.mark.parametrize(
    ("name", "by_hand"),
    [("vnet", vnet), ("unet3d", unet3d), ("unet2d", unet2d), ("unet2d-transpose", unet2d)],
)
def test_forward_is_the_written_out_one(name, by_hand):
    torch.manual_seed(0)
    options = {} if name == "vnet" else {"channels": (4, 6, 8, 10, 12)}
    network = scrambled(build(name, in_channels=1, num_classes=3, **options))
    x = image(network, side=16, batch=1, dtype=torch.float64)
    with torch.no_grad():
        expected = by_hand(network.state_dict(), x)
        assert expected.std() > 1e-3
        torch.testing.assert_close(network(x), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("channels", [(4, 8), (4, 8, 16), (4, 4, 4, 4)])
@pytest.mark.parametrize("name", NAMES)
def test_shapes_at_any_depth(name, channels):
    network = small(name, channels=channels)
    side = 2 ** (len(channels) - 1)
    assert divisor(network) == network.divisor == side
    x = image(network, side=side)
    assert network(x).shape == (2, 3, *x.shape[2:])
    assert network.eval()(x[:1]).shape == (1, 3, *x.shape[2:])


@pytest.mark.parametrize("name", NAMES)
def test_gradient_reaches_all_parameters(name):
    # In train mode a bias before a normalization has no effect: eval mode, where batch norm has constants.
    network = scrambled(small(name))
    network(image(network, dtype=torch.float64)).square().sum().backward()
    for parameter_name, p in network.named_parameters():
        assert p.grad is not None, parameter_name
        cancels = name == "unet3d" and re.search(r"conv\d\.0\.bias", parameter_name)
        assert cancels or p.grad.abs().max() > 1e-6, parameter_name


@pytest.mark.parametrize("name", NAMES)
def test_the_deepest_level_and_every_skip_count(name):
    """Noise behind any single block changes the logits: nothing is computed in vain."""
    network = scrambled(small(name))
    x = image(network, dtype=torch.float64)
    reference = network(x)
    blocks = [
        (n, m)
        for n, m in network.named_modules()
        if isinstance(m, (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    ]
    assert len(blocks) >= 11
    for n, module in blocks:
        handle = module.register_forward_hook(lambda _m, _x, y: y * torch.linspace(1, 2, y.shape[-1]))
        assert (network(x) - reference).abs().max() > 1e-6, n
        handle.remove()


# ---- dropout ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "before", "behind", "keep"),
    [
        ("vnet", "block_three", "block_three_up", 0.5),
        ("vnet", "block_five", "out_conv", 0.5),
        ("unet3d", "center", "up", 0.7),
        ("unet3d", "up_concat1", "final", 0.7),
    ],
)
def test_where_and_how_much_is_dropped(name, before, behind, keep):
    network = small(name, channels=(16, 16, 32))
    seen = {before: [], behind: []}
    network.get_submodule(before).register_forward_hook(lambda _m, _x, y: seen[before].append(y.clone()))
    network.get_submodule(behind).register_forward_hook(lambda _m, x, _y: seen[behind].append(x[0].clone()))
    with torch.no_grad():
        network(image(network, batch=8))
    source, result = seen[before][0], seen[behind][0]
    alive = source > 0
    kept = alive & torch.isclose(result * keep, source)
    assert torch.all(kept | (result == 0))
    share = kept.flatten(2).sum(2) / alive.flatten(2).sum(2)
    assert share.nanmean() == pytest.approx(keep, abs=0.12)
    whole = (share == 0) | (share == 1) | share.isnan()
    assert whole.all() == (name == "vnet")  # whole channels there, single values here


def test_unet2d_drops_more_the_deeper():
    network = UNet2d(1, 2)
    found = {n: m.p for n, m in network.named_modules() if isinstance(m, nn.Dropout)}
    blocks = ["encoder.in_conv", *(f"encoder.down{k}.maxpool_conv.1" for k in (1, 2, 3, 4))]
    expected = dict(zip((f"{b}.conv_conv.3" for b in blocks), (0.05, 0.1, 0.2, 0.3, 0.5), strict=True))
    expected |= {f"decoder.up{k}.conv.conv_conv.3": 0 for k in (1, 2, 3, 4)}
    assert found == expected


@pytest.mark.parametrize("name", NAMES)
def test_dropout_is_active_in_train_mode_alone(name):
    network = small(name)
    x = image(network)
    with torch.no_grad():
        torch.manual_seed(5)
        first, second = network(x), network(x)
        torch.manual_seed(5)
        assert torch.equal(network(x), first)
        assert not torch.equal(first, second)
        network.eval()
        assert torch.equal(network(x), network(x))
        still = small(name, dropout=(0, 0, 0) if "2d" in name else 0)
        assert torch.equal(still(x), still(x))


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sides", "words"),
    [
        ("vnet", (112, 100, 7), r"multiples of 16, got \(112, 100, 7\); these fit: \(112, 96 or 112, 16\)"),
        ("unet3d", (32, 32, 0), r"these fit: \(32, 32, 16\)"),
        ("unet2d", (250, 256), r"UNet2d\(\): x: .* these fit: \(240 or 256, 256\)"),
    ],
)
def test_sides_that_do_not_fit(name, sides, words):
    network = build(name, in_channels=1, num_classes=2)
    assert divisor(network) == 16
    with pytest.raises(ValueError, match=words):
        network(torch.zeros(1, 1, *sides))


@pytest.mark.parametrize("name", NAMES)
def test_inputs_of_a_wrong_shape(name):
    network = small(name)
    x = image(network)
    for wrong in (x[:, :1], x[0], x[..., None], x.movedim(1, -1)):
        with pytest.raises(ValueError, match=r"x: expected shape \[B, 2, (D, )?H, W\], got \("):
            network(wrong)


@pytest.mark.parametrize("name", NAMES)
def test_a_single_voxel_cannot_be_normalized(name):
    network = small(name)
    x = torch.zeros(1, 2, *(4,) * network.dimensions)
    with pytest.raises(ValueError, match="one side of 8 or more"):
        network(x)
    if name == "unet3d":
        with pytest.raises(ValueError, match="one side of 8 or more, got"):
            network.eval()(x.expand(2, -1, -1, -1, -1))
    else:
        network(x.expand(2, *x.shape[1:]))
        network.eval()(x)


@pytest.mark.parametrize(
    ("network", "arguments", "words"),
    [
        (VNet, {"in_channels": 0}, "in_channels: expected at least 1, got 0"),
        (UNet3d, {"num_classes": 0}, "num_classes: expected at least 1, got 0"),
        (UNet2d, {"channels": (8,)}, r"channels: expected 2 to 16 widths of at least 1, got \(8,\)"),
        (UNet3d, {"channels": (8, 0)}, r"channels: expected 2 to 16 .* got \(8, 0\)"),
        (VNet, {"channels": (1,) * 8}, "channels: expected 2 to 7 widths"),
        (VNet, {"dropout": 1.5}, "dropout"),
        (UNet2d, {"dropout": (0.1, 0.2)}, r"dropout: expected a probability for each of 5 .* \(0.1, 0.2\)"),
        (UNet2d, {"up": "nearest"}, "up: expected bilinear or transpose, got 'nearest'"),
    ],
)
def test_wrong_arguments(network, arguments, words):
    with pytest.raises(ValueError, match=words):
        network(**arguments)


# ---- build --------------------------------------------------------------------------------------


def test_build_makes_the_networks_of_the_papers():
    assert semisam.specialists.build is build
    kinds = [type(small(name)) for name in NAMES]
    assert kinds == [VNet, UNet3d, UNet2d, UNet2d]
    assert isinstance(small("unet2d").decoder["up1"].up, nn.Upsample)
    assert isinstance(small("unet2d-transpose").decoder["up1"].up, nn.ConvTranspose2d)
    assert small("vnet", dropout=0.1).dropout.p == 0.1
    assert divisor(nn.DataParallel(VNet(channels=(1, 2)))) == 2


def test_build_imports_networks_of_monai():
    unet = build(
        "monai.networks.nets.UNet",
        in_channels=2,
        num_classes=3,
        spatial_dims=2,
        channels=(4, 8),
        strides=(2,),
    )
    assert unet(torch.zeros(1, 2, 8, 6)).shape == (1, 3, 8, 6)
    basic = build("monai.networks.nets.BasicUNet", in_channels=2, num_classes=3, features=(4, 4, 8, 8, 8, 4))
    assert basic(torch.zeros(1, 2, 32, 32, 32)).shape == (1, 3, 32, 32, 32)
    assert divisor(unet) == divisor(basic) == 1


class Pointwise(nn.Module):
    def __init__(self, n_channels, *, n_classes, bias=True):
        super().__init__()
        self.conv = nn.Conv2d(n_channels, n_classes, 1, bias=bias)


class Broken(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        raise ValueError("its own reason")


@pytest.fixture
def zoo(monkeypatch):
    module = types.ModuleType("zoo")
    module.Pointwise, module.Broken, module.number = Pointwise, Broken, 3
    monkeypatch.setitem(sys.modules, "zoo", module)


@pytest.mark.usefixtures("zoo")
def test_build_passes_numbers_as_the_class_calls_them():
    network = build("zoo.Pointwise", in_channels=3, num_classes=5, bias=False)
    assert network.conv.weight.shape == (5, 3, 1, 1)
    assert network.conv.bias is None


@pytest.mark.usefixtures("zoo")
@pytest.mark.parametrize(
    ("name", "options", "error", "words"),
    [
        ("unet", {}, ValueError, "expected vnet, unet3d, .* got 'unet'; did you mean 'unet3d'?"),
        ("V-Net", {}, ValueError, "did you mean 'vnet'?"),
        ("unet2d_transpose", {}, ValueError, "did you mean 'unet2d-transpose'?"),
        ("", {}, ValueError, "or a dotted package.module.Class, got ''"),
        (".UNet", {}, ValueError, "dotted package.module.Class"),
        ("monai..UNet", {}, ValueError, "dotted package.module.Class"),
        ("no_such_package.UNet", {}, ValueError, "that can be imported, got 'no_such_package.UNet'"),
        ("monai.no_such_module.UNet", {}, ValueError, "No module named 'monai.no_such_module'"),
        ("zoo.UNet", {}, ValueError, "a class of zoo, which has no 'UNet'"),
        ("zoo.number", {}, TypeError, "a subclass of torch.nn.Module, got 'zoo.number': 3"),
        ("builtins.dict", {}, TypeError, "a subclass of torch.nn.Module"),
        ("torch.nn.Linear", {}, TypeError, "in_channels: expected torch.nn.Linear to take one of"),
        ("zoo.Pointwise", {"n_classes": 2}, TypeError, "n_classes: expected num_classes instead, got both"),
        ("zoo.Pointwise", {"depth": 2}, TypeError, r"those of Pointwise\(n_channels, n_classes, bias\)"),
        ("monai.networks.nets.UNet", {}, TypeError, "missing a required argument: 'spatial_dims'"),
        ("zoo.Broken", {}, ValueError, "its own reason"),
        ("vnet", {"depth": 3}, TypeError, r"got \['depth'\]: got an unexpected keyword argument 'depth'"),
    ],
)
def test_build_says_what_is_wrong(name, options, error, words):
    with pytest.raises(error, match=words):
        build(name, in_channels=1, num_classes=2, **options)


def test_build_lets_the_errors_of_a_module_through(monkeypatch, tmp_path):
    (tmp_path / "needs_more.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        build("needs_more.UNet", in_channels=1, num_classes=2)


# ---- teachers and weights -----------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_deep_copy_is_a_teacher(name):
    student = small(name)
    teacher = copy.deepcopy(student).requires_grad_(False)
    x = image(student)
    assert torch.equal(teacher.eval()(x), student.eval()(x))
    before = [p.clone() for p in teacher.parameters()]
    student.train()
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    student(x).square().mean().backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))
    assert not torch.equal(next(student.parameters()), before[0])
    assert divisor(teacher) == divisor(student)


def same_state(a, b):
    return all(torch.equal(value, b.state_dict()[n]) for n, value in a.state_dict().items())


def pair():
    """Two V-Nets that differ, the first with statistics of a batch."""
    first, second = small("vnet"), build("vnet", **SMALL)
    first(image(first))
    assert not same_state(first, second)
    return first, second


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("key", [None, "state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_load_weights_from_torch_files(tmp_path, key, prefix, legacy):
    source, network = pair()
    state = {prefix + n: value for n, value in source.state_dict().items()}
    content = {key: state, "epoch": 7} if key else state
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    assert load_weights(network, str(tmp_path / "w.pth")) is None
    assert same_state(source, network)


def test_load_weights_from_safetensors(tmp_path):
    source, network = pair()
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    load_weights(network, tmp_path / "w.safetensors")
    assert same_state(source, network)


def test_load_weights_says_that_safetensors_is_missing(tmp_path, monkeypatch):
    network = small("vnet")
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        load_weights(network, tmp_path / "w.safetensors")


def test_load_weights_does_without_batch_counters(tmp_path):
    source, network = pair()
    state = {n: v for n, v in source.state_dict().items() if "num_batches" not in n}
    torch.save(state, tmp_path / "w.pth")
    load_weights(network, tmp_path / "w.pth")
    assert torch.equal(network.eval()(image(network)), source.eval()(image(source)))


def test_load_weights_keeps_a_real_module_called_module(tmp_path):
    source, network = (nn.DataParallel(n) for n in pair())
    torch.save(source.state_dict(), tmp_path / "w.pth")
    load_weights(network, tmp_path / "w.pth")
    assert same_state(source, network)


def test_load_weights_names_what_does_not_fit(tmp_path):
    source, network = pair()
    before = copy.deepcopy(network)
    state = source.state_dict()
    state["head.weight"] = state.pop("out_conv.weight")
    state["block_one.conv.0.weight"] = torch.zeros(4, 1, 3, 3, 3)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="expected the weights of VNet") as caught:
        load_weights(network, tmp_path / "w.pth")
    for words in (
        "missing: out_conv.weight",
        "unexpected: head.weight",
        "of another shape: block_one.conv.0.weight (4, 1, 3, 3, 3), expected (4, 2, 3, 3, 3)",
        "w.pth",
    ):
        assert words in str(caught.value)
    assert same_state(before, network)
    torch.save(small("unet3d").state_dict(), tmp_path / "other.pth")
    with pytest.raises(
        ValueError, match=r"missing: block_one.conv.0.weight, .* and 76 more; unexpected: "
    ) as e:
        load_weights(network, tmp_path / "other.pth")
    assert len(str(e.value)) < 800


class Hostile:
    """Creates a file when unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("how", ["torch", "legacy", "pickle"])
def test_load_weights_runs_no_code(tmp_path, how):
    path, marker = tmp_path / "w.pth", tmp_path / "marker"
    content = {"extra": Hostile(marker), "state_dict": small("vnet").state_dict()}
    if how == "pickle":
        path.write_bytes(pickle.dumps(content, 2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(ValueError, match=r"alone, got .*w\.pth with the Python object \w+\.mkdir") as caught:
        load_weights(small("vnet"), path)
    assert not marker.exists()
    assert "weights_only" not in str(caught.value)
    assert caught.value.__cause__ is None  # it would advise to load the file all the same
    pickle.loads(pickle.dumps(content))  # it would have
    assert marker.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"no weights", b"PK\x03\x04" + bytes(40), b"\x80\x02}", b"\xff" * 99]
)
def test_load_weights_refuses_damaged_files(tmp_path, suffix, content):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"of tensors alone, got .* with damage or in another format"):
        load_weights(small("vnet"), path)


@pytest.mark.parametrize("part", [0.3, 0.9, 0.999])
def test_load_weights_refuses_truncated_files(tmp_path, part):
    network = small("vnet")
    torch.save(network.state_dict(), tmp_path / "w.pth")
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    for path in (tmp_path / "w.pth", tmp_path / "w.safetensors"):
        path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
        with pytest.raises(ValueError, match="file of tensors alone"):
            load_weights(network, path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.zeros(1)], "tensors by name, got list in"),
        (torch.zeros(3), "tensors by name, got Tensor in"),
        ({}, "tensors by name, got dict in"),
        ({"state_dict": {}}, "tensors by name, got dict in"),
        ({"weights": {"a": torch.zeros(1)}}, "tensors by name, got dict under 'weights' in"),
        ({3: torch.zeros(1)}, "tensors by name, got Tensor under 3 in"),
    ],
)
def test_load_weights_refuses_other_contents(tmp_path, content, words):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=words):
        load_weights(small("vnet"), tmp_path / "w.pth")


def test_load_weights_refuses_a_whole_pickled_network(tmp_path):
    torch.save(small("vnet"), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"with the Python object semisam\..*VNet"):
        load_weights(small("vnet"), tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["absent.pth", "absent.safetensors"])
def test_load_weights_of_a_file_that_is_not_there(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="absent"):
        load_weights(small("vnet"), tmp_path / name)
