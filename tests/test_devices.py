# SPDX-License-Identifier: Apache-2.0
"""Tensors that are not all on one device, and what a device reports later than the CPU does."""

from __future__ import annotations

import contextlib

import pytest
import torch
from exchange_api import Exchange

from semisam import fusion, losses, metrics, ops, prompts, random_walk


def _elsewhere(*shape, dtype=torch.float32):
    """A tensor on a device that every torch has besides the CPU."""
    return torch.empty(shape, dtype=dtype, device="meta")


_LOGITS, _LABELS, _MASK = torch.zeros(1, 2, 4, 4), torch.ones(1, 4, 4).byte(), torch.ones(1, 1, 4, 4).bool()
_CLICK = {"seed": 0, "iteration": 0, "sample_ids": [0], "round": 0}


def _fuse(weights, uncertainty_weights):
    return ops.call(
        *("fuse", [_LOGITS] * 2, weights, uncertainty_weights),
        *(0, 0, 0, 4.0, 0.0, 1.0, 0.0, 255, 2, 1, 0, 0, 0, 0),
    )


@pytest.mark.parametrize(
    ("argument", "function"),
    [
        ("y", lambda: ops.call("overlap", _LABELS, _elsewhere(1, 4, 4, dtype=torch.uint8), 2, 0, 0)),
        (
            "target",
            lambda: losses.dice_ce_loss(_LOGITS, _elsewhere(1, 1, 4, 4), to_onehot_y=True, softmax=True),
        ),
        ("target", lambda: losses.cross_entropy(_LOGITS, _elsewhere(1, 4, 4, dtype=torch.uint8))),
        ("voxel_weight", lambda: losses.entropy_loss(_LOGITS, voxel_weight=_elsewhere(1, 4, 4))),
        ("pseudo", lambda: losses.ssl_objective(_LOGITS.repeat(2, 1, 1, 1), _LABELS, _elsewhere(1, 2, 4, 4))),
        (
            r"terms\[1\].weight",
            lambda: losses.voxel_loss(
                _LOGITS, [losses.Term("ce", _LABELS), losses.Term("entropy", weight=_elsewhere(1, 4, 4))]
            ),
        ),
        (
            "region",
            lambda: prompts.next_click(_MASK, None, _elsewhere(1, 1, 4, 4, dtype=torch.bool), **_CLICK),
        ),
        ("labels", lambda: prompts.PromptBatch((4, 4), torch.zeros(1, 1, 1, 2), _elsewhere(1, 1, 1))),
        (
            "points",
            lambda: prompts.PromptBatch.empty(1, 1, (4, 4), _LOGITS).append(
                _elsewhere(1, 1, 2), torch.ones(1, 1)
            ),
        ),
        (r"sources\[1\]", lambda: fusion.fuse([_LOGITS, _elsewhere(1, 2, 4, 4)])),
        ("weights", lambda: _fuse(_elsewhere(2, 1, dtype=torch.float64), None)),
        ("uncertainty_weights", lambda: _fuse(None, _elsewhere(2, 1, dtype=torch.float64))),
        (r"passes\[1\]", lambda: fusion.mc_uncertainty([_LOGITS, _elsewhere(1, 2, 4, 4)])),
        (r"logits\[1\]", lambda: fusion.join_classes([_LOGITS[:, :1], _elsewhere(1, 1, 4, 4)])),
        ("target", lambda: fusion.agreement(_LABELS, _elsewhere(1, 4, 4), 2)),
        ("y", lambda: metrics.dice(_LABELS, _elsewhere(1, 4, 4, dtype=torch.uint8), num_classes=2)),
        (
            "prior",
            lambda: random_walk.random_walker(_LOGITS[0], _LABELS.repeat(2, 1, 1), _elsewhere(2, 4, 4)),
        ),
        ("mask", lambda: random_walk.geodesic(_LOGITS[0, 0], _elsewhere(4, 4, dtype=torch.bool))),
    ],
)
def test_a_tensor_on_another_device_is_named_with_both_devices(argument, function):
    with pytest.raises(
        ValueError, match=rf"^\w+\(\): {argument}: expected a tensor on cpu.* got one on meta$"
    ):
        function()


def test_counted_faults_are_a_sentence(monkeypatch):
    counters = torch.zeros(len(ops.SCHEMA), dtype=torch.int64)
    monkeypatch.setitem(ops._faults, 0, counters)
    ops.refuse_faults()
    counters[list(ops.SCHEMA).index("voxel_loss_forward")] = 3
    with pytest.raises(ValueError, match=r"^voxel_loss_forward\(\): 3 left out: expected labels that are"):
        ops.refuse_faults()
    ops.refuse_faults()  # told once


def test_faults_wait_for_every_stream_of_the_device(monkeypatch):
    seen = []

    class Counters:
        is_cuda, device = True, "cuda:0"

        def __init__(self):
            self.values = [0] * len(ops.SCHEMA)

        def tolist(self):
            seen.append("read")
            return list(self.values)

        def zero_(self):
            seen.append("zero")
            self.values = [0] * len(ops.SCHEMA)

    counters = Counters()
    monkeypatch.setattr(ops, "_faults", {0: counters})
    monkeypatch.setattr(torch.cuda, "synchronize", seen.append)
    assert ops.faults() == {}
    assert seen == ["cuda:0", "read"]
    seen.clear()
    counters.values[list(ops.SCHEMA).index("overlap")] = 2
    assert ops.faults() == {"overlap": 2}
    assert seen == ["cuda:0", "read", "zero", "cuda:0"]
    assert ops.faults() == {}


class Recorder:
    """Stands for torch.cuda and the core: notes who waits for whom, and when the operator runs."""

    def __init__(self, monkeypatch, exchange):
        self.seen = []
        stream = type(
            "Stream", (), {"wait_stream": lambda one, other: self.seen.append((one.name, other.name))}
        )
        current, default = stream(), stream()
        current.name, default.name = "current", "default"
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
        monkeypatch.setattr(torch.cuda, "default_stream", lambda device: default)
        monkeypatch.setattr(ops, "load_cuda", lambda: "")
        monkeypatch.setattr(ops, "_faults_on", lambda device: None)
        monkeypatch.setattr(ops._core, "boxes", lambda *args: self.seen.append("run"))
        if exchange is None:
            monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__", raising=False)
        else:
            made = exchange.capsule()
            monkeypatch.setattr(torch.Tensor, "__dlpack_c_exchange_api__", made, raising=False)


@pytest.mark.parametrize("exchange", [Exchange(1), Exchange(2, Exchange(1)), Exchange(2), None])
def test_on_an_unknown_torch_the_default_stream_waits_and_is_waited_for(exchange, monkeypatch):
    """Before torch 2.10 there is no exchange API; one of another major version may mean anything."""
    recorder = Recorder(monkeypatch, exchange)
    ops._raw_cuda("boxes", [], torch.device("cuda", 0))
    known = exchange is not None and 1 in (exchange.major, exchange.previous and exchange.previous.major)
    around = ([], []) if known else ([("default", "current")], [("current", "default")])
    assert recorder.seen == [*around[0], "run", *around[1]]
