# SPDX-License-Identifier: Apache-2.0
"""Generalists for tests: they answer what they are told to, and remember what they were asked."""

from __future__ import annotations

from typing import Any

import torch

from semisam.generalists import Decoded, GeneralistSpec

EVERY_PROMPT = frozenset({"points", "mask", "box"})


class Fake:
    """Answers +-`sure` around `truth` [B, F, *S], after `wrong[k]` was turned around in round k."""

    def __init__(self, truth: Any, wrong: Any = (), *, sure: float = 6.0, name: str = "fake", **spec: Any):
        self.truth, self.wrong, self.sure = truth, list(wrong), sure
        options = {"spatial_dims": (2, 3), "prompts": EVERY_PROMPT, "default_mode": "mixed", **spec}
        self.spec = GeneralistSpec(name, **options)
        self.encoded: list[Any] = []
        self.asked: list[Any] = []  # (prompts, active) of every decode since the last encode

    def encode(self, images, *, spacing=None):
        self.encoded.append((images, spacing))
        self.asked = []
        return len(images)

    def decode(self, state, prompts, active=None):
        assert not torch.is_grad_enabled()
        k = len(self.asked)
        self.asked.append((prompts, active.clone()))
        mask = self.truth.clone()
        if k < len(self.wrong):
            mask = mask ^ self.wrong[k]
        logits = torch.where(mask, self.sure, -self.sure)
        logits = torch.where(active.reshape(*active.shape, *(1,) * (mask.ndim - 2)), logits, -10.0)
        size = self.spec.mask_size or mask.shape[2:]
        low = torch.full((*mask.shape[:2], *size), float(k + 1))
        return Decoded(logits, low, {"calls": 1})
