# SPDX-License-Identifier: Apache-2.0
"""What the networks share: how many times they halve the image, and the check of their input."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

CHANNELS = (16, 32, 64, 128, 256)


class Specialist(nn.Module):
    """An encoder-decoder whose input must halve evenly down to the lowest level."""

    instance_norm = False  # normalizes over the voxels of a sample, not over those of the batch

    def __init__(
        self, dimensions: int, in_channels: int, num_classes: int, channels: Sequence[int], most: int = 16
    ) -> None:
        super().__init__()
        name = type(self).__name__
        for argument, value in (("in_channels", in_channels), ("num_classes", num_classes)):
            if value < 1:
                raise ValueError(f"{name}(): {argument}: expected at least 1, got {value}")
        if not 2 <= len(channels) <= most or any(width < 1 for width in channels):
            raise ValueError(
                f"{name}(): channels: expected 2 to {most} widths of at least 1, got {tuple(channels)}"
            )
        self.dimensions = dimensions
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.divisor: int = 2 ** (len(channels) - 1)

    def check(self, x: torch.Tensor) -> None:
        """Raise ValueError for an image that a layer deep inside would fail on."""
        name, shape = type(self).__name__, tuple(x.shape)
        if len(shape) != self.dimensions + 2 or shape[1] != self.in_channels:
            axes = "D, H, W" if self.dimensions == 3 else "H, W"
            raise ValueError(f"{name}(): x: expected shape [B, {self.in_channels}, {axes}], got {shape}")
        if any(side % self.divisor or not side for side in shape[2:]):
            fits = ", ".join(self._fitting(side) for side in shape[2:])
            raise ValueError(
                f"{name}(): x: expected sides that are multiples of {self.divisor}, got {shape[2:]}; "
                f"these fit: ({fits})"
            )
        values = math.prod(side // self.divisor for side in shape[2:])
        values *= 1 if self.instance_norm else shape[0]
        if values == 1 and (self.training or self.instance_norm):
            batch = "" if self.instance_norm else ", or a batch of 2"
            raise ValueError(
                f"{name}(): x: expected more than one voxel to normalize at the lowest level, that is one "
                f"side of {2 * self.divisor} or more{batch}, got {shape}"
            )

    def _fitting(self, side: int) -> str:
        below = side // self.divisor * self.divisor
        if below == side and side:
            return str(side)
        above = below + self.divisor
        return f"{below} or {above}" if below else str(above)
