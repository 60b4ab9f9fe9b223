# SPDX-License-Identifier: Apache-2.0
"""One step of the optimiser, on one process or many, in any precision."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch

from semisam import ops
from semisam.engine import optimisers
from semisam.engine.config import ConfigError, TrainConfig
from semisam.methods.base import Batch, Method, random_key

__all__ = ["NotFinite", "Stepper", "fabric_for", "memory_format_of"]

PRECISIONS: dict[str, Any] = {"32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


class NotFinite(ArithmeticError):
    """A loss term or gradient that is NaN or infinite; `values` has all terms, `batches` the patches."""

    def __init__(self, names: list[str], values: dict[str, float], batches: list[Batch]) -> None:
        super().__init__(", ".join(names))
        self.names = names
        self.values = values
        self.batches = batches


def fabric_for(train: TrainConfig) -> Any:
    """Return a launched Lightning Fabric for the settings: device, precision, ranks of `torchrun`.

    Precision "auto" is bfloat16 on a GPU that has it, float16 with loss scaling on others, float32 on
    the CPU. Raises ConfigError for a device that is not there and float16 on the CPU.

    >>> from semisam.engine.config import TrainConfig
    >>> from semisam.engine.stepper import fabric_for
    >>> fabric_for(TrainConfig(device="cpu")).device.type
    'cpu'
    """
    from lightning_fabric import Fabric  # noqa: PLC0415
    from lightning_fabric.plugins.environments.lightning import LightningEnvironment  # noqa: PLC0415
    from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment  # noqa: PLC0415
    from lightning_fabric.strategies.ddp import DDPStrategy  # noqa: PLC0415

    cuda = torch.cuda.is_available()
    if train.device == "cuda" and not cuda:
        raise ConfigError(
            "train.device: expected a CUDA device, but torch finds none; 'semisam doctor' says why"
        )
    device = ("cuda" if cuda else "cpu") if train.device == "auto" else train.device
    precision = train.precision
    if precision == "auto":
        native = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "32" if device == "cpu" else "bf16" if native else "fp16"
    if precision == "fp16" and device == "cpu":
        raise ConfigError("train.precision: expected 32 or bf16 on the CPU, got fp16")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", str(world)))
    fabric = Fabric(
        accelerator=device,
        devices=local,
        num_nodes=max(world // local, 1),
        # Ranks wait for rank 0 while it saves or asks the generalists: longer than the usual half hour.
        strategy=DDPStrategy(timeout=timedelta(hours=12)) if world > 1 else "auto",
        precision=PRECISIONS[precision],
        plugins=[TorchElasticEnvironment() if world > 1 else LightningEnvironment()],
    )
    fabric.launch()
    return fabric


def memory_format_of(train: TrainConfig, device: str) -> Any:
    """Return torch's memory format of weights and images: `train.memory_format` in 2-D or 3-D.

    "auto" is channels_last for 2-D networks on the CPU (a sixth faster there) and contiguous elsewhere. In
    3-D, with bfloat16, channels_last halves the steps of narrow networks on the CPU, not those of wide ones.

    >>> from semisam.engine.config import TrainConfig
    >>> from semisam.engine.stepper import memory_format_of
    >>> memory_format_of(TrainConfig(patch_size=[32, 32, 32], memory_format="channels_last"), "cpu")
    torch.channels_last_3d
    """
    flat = len(train.patch_size) == 2
    chosen = train.memory_format
    if chosen == "auto":
        chosen = "channels_last" if flat and device == "cpu" else "contiguous"
    if chosen == "contiguous":
        return torch.contiguous_format
    return torch.channels_last if flat else torch.channels_last_3d


def _formatted(network: Any, memory_format: Any) -> None:
    """Give the weights of convolutions a memory format, in place."""
    network.to(memory_format=memory_format)  # torch's stubs do not know it


class Stepper:
    """Optimiser and network of a method, and how one step is done.

    The network is set up for the fabric's device, precision, memory format and ranks. All of torch's
    randomness in a step (dropout) is a function of (seed, step, rank), so that a resumed run continues with
    the same bits.

    >>> import torch
    >>> from semisam import methods
    >>> from semisam.engine.config import MethodConfig, TrainConfig
    >>> from semisam.engine.stepper import Stepper, fabric_for
    >>> train = TrainConfig(device="cpu")
    >>> student = torch.nn.Conv2d(1, 2, 1)
    >>> method = methods.build(MethodConfig("supervised"), student, num_classes=2, total_steps=10)
    >>> batch = methods.Batch(torch.rand(1, 1, 8, 8), torch.ones(1, 8, 8, dtype=torch.uint8), (0,))
    >>> sorted(Stepper(fabric_for(train), train, method, 10).step(0, [batch]))
    ['ce', 'dice', 'loss', 'lr']
    """

    def __init__(self, fabric: Any, train: TrainConfig, method: Method, total_steps: int) -> None:
        self.fabric = fabric
        self.train = train
        self.method = method
        self.total_steps = total_steps
        self.format = memory_format_of(train, fabric.device.type)
        _formatted(method.student, self.format)
        self.optimizer = optimisers.build(train, method.student.parameters())
        method.student.train()
        self.model = fabric.setup_module(method.student)
        method.forward = self.model
        self._optimizer = fabric.setup_optimizers(self.optimizer)
        method.to(fabric.device)
        if method.teacher is not None:
            _formatted(method.teacher, self.format)

    @property
    def scaler(self) -> dict[str, Any]:
        """State of the loss scaling of float16; empty in other precisions."""
        state: dict[str, Any] = self.fabric.strategy.precision.state_dict()
        return state

    def load_scaler(self, state: dict[str, Any]) -> None:
        """Take up what `scaler` returned."""
        if state:
            self.fabric.strategy.precision.load_state_dict(state)

    def step(self, step: int, batches: Iterable[Batch]) -> dict[str, float]:
        """Do step `step` (from 0) over `train.accumulate` batches and return loss, its terms and the rate.

        Raises NotFinite before the weights change.
        """
        train, fabric = self.train, self.fabric
        rate = optimisers.learning_rate(train, step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.method.student.train()
        self._optimizer.zero_grad()
        sums: dict[str, Any] = {}
        seen = []
        for number, given in enumerate(batches):
            batch = self._on_device(given)
            seen.append(batch)
            torch.manual_seed(random_key(train.seed, step, number, fabric.global_rank))
            early = fabric.world_size > 1 and number < train.accumulate - 1
            with fabric.no_backward_sync(self.model) if early else nullcontext():
                with fabric.autocast():
                    losses = self.method.losses(batch, step)
                    parts = {name: v.to(fabric.device) / train.accumulate for name, v in losses.items()}
                fabric.backward(torch.stack(list(parts.values())).sum())
            sums = {name: sums.get(name, 0.0) + value.detach() for name, value in parts.items()}
        clip = train.clip_gradient or float("inf")
        norm = fabric.clip_gradients(self.model, self._optimizer, max_norm=clip, error_if_nonfinite=False)
        # With loss scaling, infinite gradients are part of the plan: the scaler leaves the step out.
        self._check(sums if self.scaler else {**sums, "gradient": norm}, seen)
        self._optimizer.step()
        self.method.after_step(step)
        values = torch.stack(list(sums.values())).double()
        if fabric.world_size > 1:
            values = fabric.all_reduce(values, reduce_op="mean")
        terms = dict(zip(sums, values.tolist(), strict=True))
        ops.refuse_faults()  # the step has been waited for: labels that are no class are known by now
        return {"loss": sum(terms.values()), **terms, "lr": rate}

    def _check(self, values: dict[str, Any], batches: list[Batch]) -> None:
        numbers = torch.stack([v.to(self.fabric.device).double() for v in values.values()])
        found = dict(zip(values, numbers.tolist(), strict=True))
        names = [name for name, ok in zip(found, numbers.isfinite().tolist(), strict=True) if not ok]
        if names:
            raise NotFinite(names, found, batches)

    def _on_device(self, batch: Batch) -> Batch:
        device = self.fabric.device
        return replace(
            batch,
            image=batch.image.to(device, non_blocking=True, memory_format=self.format),
            label=batch.label.to(device, non_blocking=True),
        )
