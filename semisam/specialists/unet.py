# SPDX-License-Identifier: Apache-2.0
"""U-Nets in 3-D and 2-D: two convolutions a level, skips are concatenated."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from semisam.specialists._base import CHANNELS, Specialist

__all__ = ["UNet2d", "UNet3d"]


class UNet3d(Specialist):
    """3-D U-Net: 5 884 050 parameters for 1 input channel and 2 classes.

        conv1  16 ──────────────────────── concat, up_concat1, dropout ── final
          conv2  32 ──────────────────── concat, up_concat2
            conv3  64 ──────────────── concat, up_concat3
              conv4 128 ──────────── concat, up_concat4
                center 256, dropout

    Each is twice (3x3x3 convolution, instance normalization without parameters, ReLU). Down: largest
    of 2x2x2; up: trilinear, twice the size. Dropout (0.3) zeroes single values, in train mode only.
    Weights start Kaiming-normal (fan_in), biases as torch's own.

    Input [B, in_channels, D, H, W] with sides that are multiples of 16, and one of at least 32: one voxel
    at the center cannot be normalized. Output [B, num_classes, D, H, W]: logits. Other `channels` (2 or
    more widths, the last is the center's) make other sizes. Parameters are named as in SSL4MIS
    (`unet_3D`): `<block>.conv1.0.weight`, `<block>.conv2.0.weight`, `up_concat4.conv.conv1.0.weight`.

    Raises ValueError for wrong arguments, and on call for wrong channels or sides, naming sides that fit.
    Papers: 3-D U-Net (arXiv 1606.06650); SemiSAM+ (arXiv 2502.20749), whose specialist this is.

    >>> import torch
    >>> from semisam.specialists import UNet3d
    >>> sum(p.numel() for p in UNet3d().parameters())
    5884050
    >>> UNet3d(num_classes=3, channels=(4, 8))(torch.zeros(2, 1, 8, 8, 6)).shape
    torch.Size([2, 3, 8, 8, 6])
    """

    instance_norm = True

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 2,
        *,
        channels: Sequence[int] = CHANNELS,
        dropout: float = 0.3,
    ) -> None:
        super().__init__(3, in_channels, num_classes, channels)
        *widths, center = channels
        self.steps = len(widths)
        self.pool = nn.MaxPool3d(2)
        self.up = nn.Upsample(scale_factor=2, mode="trilinear")
        self.dropout = nn.Dropout(dropout)
        for k, (inputs, width) in enumerate(pairwise([in_channels, *widths]), 1):
            self.add_module(f"conv{k}", _double_conv(inputs, width))
        self.center = _double_conv(widths[-1], center)
        for k in range(self.steps, 0, -1):
            width = widths[k - 1]
            joined = _double_conv(width + channels[k], width)
            self.add_module(f"up_concat{k}", nn.Sequential(OrderedDict(conv=joined)))
        self.final = nn.Conv3d(widths[0], num_classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits [B, num_classes, D, H, W]."""
        self.check(x)
        skips = []
        for k in range(1, self.steps + 1):
            skips.append(getattr(self, f"conv{k}")(x))
            x = self.pool(skips[-1])
        x = self.dropout(self.center(x))
        for k in range(self.steps, 0, -1):
            x = getattr(self, f"up_concat{k}")(torch.cat([skips.pop(), self.up(x)], 1))
        logits: torch.Tensor = self.final(self.dropout(x))
        return logits


def _double_conv(inputs: int, width: int) -> nn.Sequential:
    def unit(n: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv3d(n, width, 3, padding=1), nn.InstanceNorm3d(width), nn.ReLU(inplace=True)
        )

    return nn.Sequential(OrderedDict(conv1=unit(inputs), conv2=unit(width)))


class UNet2d(Specialist):
    """2-D U-Net: 1 813 474 parameters for 1 input channel and 2 classes; 1 944 322 for 3, transposed.

        encoder.in_conv 16, 0.05 ─────────────────────── concat, decoder.up4 ── decoder.out_conv
          encoder.down1 32, 0.1 ─────────────────────── concat, decoder.up3
            encoder.down2 64, 0.2 ─────────────────── concat, decoder.up2
              encoder.down3 128, 0.3 ─────────────── concat, decoder.up1
                encoder.down4 256, 0.5

    Each is 3x3 convolution, batch normalization, leaky ReLU (0.01), dropout, and again without dropout.
    Down: largest of 2x2. Up: `up="bilinear"`, a 1x1 convolution to the skip's channels, then twice the
    size with aligned corners (SSL4MIS); or `up="transpose"`, a transposed 2x2 convolution (SC-SAM).
    `dropout` is the encoder's, level by level (the first ones, if there are fewer levels); it zeroes
    single values, in train mode only. Initialization is torch's own.

    Input [B, in_channels, H, W] with sides that are multiples of 16, output [B, num_classes, H, W]:
    logits. Other `channels` (2 or more widths) make other sizes. Parameters are named as in SSL4MIS:
    `encoder.down1.maxpool_conv.1.conv_conv.0.weight`, `decoder.up1.conv1x1.weight`.

    Raises ValueError for wrong arguments, and on call for wrong channels or sides, naming sides that fit.
    Papers: U-Net (arXiv 1505.04597); SC-SAM (arXiv 2601.17934) for the transposed variant.

    >>> import torch
    >>> from semisam.specialists import UNet2d
    >>> sum(p.numel() for p in UNet2d().parameters())
    1813474
    >>> sum(p.numel() for p in UNet2d(in_channels=3, up="transpose").parameters())
    1944322
    >>> UNet2d(num_classes=4, channels=(4, 8))(torch.zeros(2, 1, 8, 6)).shape
    torch.Size([2, 4, 8, 6])
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 2,
        *,
        channels: Sequence[int] = CHANNELS,
        dropout: Sequence[float] = (0.05, 0.1, 0.2, 0.3, 0.5),
        up: str = "bilinear",
    ) -> None:
        super().__init__(2, in_channels, num_classes, channels)
        if up not in ("bilinear", "transpose"):
            raise ValueError(f"UNet2d(): up: expected bilinear or transpose, got {up!r}")
        if len(dropout) < len(channels):
            raise ValueError(
                f"UNet2d(): dropout: expected a probability for each of {len(channels)} levels, "
                f"got {tuple(dropout)}"
            )
        self.encoder = nn.ModuleDict({"in_conv": _block(in_channels, channels[0], dropout[0])})
        for k, (above, width) in enumerate(pairwise(channels), 1):
            down = nn.Sequential(nn.MaxPool2d(2), _block(above, width, dropout[k]))
            self.encoder[f"down{k}"] = nn.Sequential(OrderedDict(maxpool_conv=down))
        self.decoder = nn.ModuleDict(
            {f"up{k}": _Up(below, skip, up) for k, (below, skip) in enumerate(pairwise(channels[::-1]), 1)}
        )
        self.decoder["out_conv"] = nn.Conv2d(channels[0], num_classes, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits [B, num_classes, H, W]."""
        self.check(x)
        skips = []
        for level in self.encoder.values():
            x = level(x)
            skips.append(x)
        x = skips.pop()
        *ups, out = self.decoder.values()
        for up in ups:
            x = up(x, skips.pop())
        logits: torch.Tensor = out(x)
        return logits


def _block(inputs: int, width: int, dropout: float) -> nn.Sequential:
    def unit(n: int) -> list[nn.Module]:
        return [nn.Conv2d(n, width, 3, padding=1), nn.BatchNorm2d(width), nn.LeakyReLU(0.01, inplace=True)]

    layers = nn.Sequential(*unit(inputs), nn.Dropout(dropout), *unit(width))
    return nn.Sequential(OrderedDict(conv_conv=layers))


class _Up(nn.Module):
    def __init__(self, below: int, skip: int, up: str) -> None:
        super().__init__()
        if up == "transpose":
            self.conv1x1: nn.Module = nn.Identity()
            self.up: nn.Module = nn.ConvTranspose2d(below, skip, 2, stride=2)
        else:
            self.conv1x1 = nn.Conv2d(below, skip, 1)
            self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.conv = _block(2 * skip, skip, 0.0)

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        joined: torch.Tensor = self.conv(torch.cat([skip, self.up(self.conv1x1(x))], 1))
        return joined
