# SPDX-License-Identifier: Apache-2.0
"""V-Net as semi-supervised segmentation uses it: sums for skips, no residuals within a stage."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from semisam.specialists._base import CHANNELS, Specialist

__all__ = ["VNet"]

_NUMBERS: tuple[str, ...] = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_NUMBERS += ("ten", "eleven", "twelve", "thirteen")


class VNet(Specialist):
    """V-Net, 3-D: 9 448 866 parameters for 1 input channel and 2 classes.

        block_one 1 conv, 16 ──────────────────────────── + block_nine  1 conv, dropout ── out_conv
          block_two 2 conv, 32 ──────────────────────── + block_eight 2 conv
            block_three 3 conv, 64 ────────────────── + block_seven 3 conv
              block_four 3 conv, 128 ────────────── + block_six   3 conv
                block_five 3 conv, 256, dropout

    conv: 3x3x3 convolution with bias, batch normalization, ReLU; one level down (`<block>_dw`) the same
    with 2x2x2 and stride 2, up (`<block>_up`) with a transposed convolution. Skips are added; dropout
    zeroes whole channels, and is active in train mode only. Initialization is torch's own.

    Input [B, in_channels, D, H, W] with sides that are multiples of 16, output [B, num_classes, D, H, W]:
    logits. Other `channels` (2 to 7 widths) make other sizes; each level has 1, 2, 3, 3, ... convolutions
    and the blocks are counted on. Parameters are named `<block>.conv.<i>.{weight,bias}`, i = 0, 3, 6 for
    convolutions and 1, 4, 7 for normalizations, so that published weights load (`load_weights`).

    Raises ValueError for wrong arguments, and on call for wrong channels or sides, naming sides that fit.
    Papers: V-Net (arXiv 1606.04797); UA-MT (arXiv 1907.07034), whose variant this is.

    >>> import torch
    >>> from semisam.specialists import VNet
    >>> sum(p.numel() for p in VNet().parameters())
    9448866
    >>> VNet(num_classes=3, channels=(4, 8))(torch.zeros(2, 1, 8, 8, 6)).shape
    torch.Size([2, 3, 8, 8, 6])
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 2,
        *,
        channels: Sequence[int] = CHANNELS,
        dropout: float = 0.5,
    ) -> None:
        super().__init__(3, in_channels, num_classes, channels, most=(len(_NUMBERS) + 1) // 2)
        widths = (*channels, *channels[-2::-1])
        self.bottom = len(channels) - 1
        self.blocks = [f"block_{number}" for number in _NUMBERS[: len(widths)]]
        self.dropout = nn.Dropout3d(dropout)
        for k, (name, width) in enumerate(zip(self.blocks, widths, strict=True)):
            inputs = [width] * min(k + 1, len(widths) - k, 3)
            if k == 0:
                inputs[0] = in_channels
            self.add_module(name, _stage(*(nn.Conv3d(n, width, 3, padding=1) for n in inputs)))
            if k < self.bottom:
                self.add_module(f"{name}_dw", _stage(nn.Conv3d(width, widths[k + 1], 2, stride=2)))
            elif k + 1 < len(widths):
                self.add_module(f"{name}_up", _stage(nn.ConvTranspose3d(width, widths[k + 1], 2, stride=2)))
        self.out_conv = nn.Conv3d(channels[0], num_classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits [B, num_classes, D, H, W]."""
        self.check(x)
        skips = []
        for name in self.blocks[: self.bottom]:
            skips.append(getattr(self, name)(x))
            x = getattr(self, f"{name}_dw")(skips[-1])
        x = self.dropout(getattr(self, self.blocks[self.bottom])(x))
        for below, name in pairwise(self.blocks[self.bottom :]):
            x = getattr(self, name)(getattr(self, f"{below}_up")(x) + skips.pop())
        logits: torch.Tensor = self.out_conv(self.dropout(x))
        return logits


def _stage(*convolutions: nn.Conv3d | nn.ConvTranspose3d) -> nn.Sequential:
    layers: list[nn.Module] = []
    for convolution in convolutions:
        layers += [convolution, nn.BatchNorm3d(convolution.out_channels), nn.ReLU(inplace=True)]
    return nn.Sequential(OrderedDict(conv=nn.Sequential(*layers)))
