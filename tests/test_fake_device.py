# SPDX-License-Identifier: Apache-2.0
"""The term, the losses and the methods on a device that is not the CPU, by torch's fake tensors.

A fake tensor has a shape, a dtype and a device, and no values: tensors of two devices in one operation are an
error, and so is a look at a value. What passes here would mix nothing up on a GPU, nor wait for it. "meta"
stands for the GPU, because torch without CUDA cannot index tensors that are said to be there.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch._functorch import config as functorch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from semisam import losses, methods, ops, prompts
from semisam.engine.config import MethodConfig
from semisam.generalists.callable import CallableGeneralist
from semisam.generalists.random_walker import RandomWalker
from semisam.generalists.sam_med3d import SamMed3D
from semisam.generalists.sam_med3d_network import Architecture, SamMed3DNetwork
from semisam.methods import base
from semisam.specialists import UNet2d, UNet3d
from semisam.term import SemiSAMTerm

GPU = torch.device("meta")
FULL = torch.version.cuda is None  # a backward pass in torch with CUDA asks the driver


@pytest.fixture(autouse=True)
def fake_gpu(monkeypatch):
    """A device with all kernels, on which no value is looked at."""
    # Or torch with CUDA starts threads for a GPU that is not there, and forked children have no gradients.
    torch.zeros(1, requires_grad=True).sum().backward()
    ops.register()
    monkeypatch.setattr(ops, "stays", lambda device: device.type == GPU.type)
    monkeypatch.setattr(ops, "lacks", lambda device, wanted: [])
    monkeypatch.setattr(base, "_devices", lambda: frozenset({"cpu", GPU.type}))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda tensor, **_: tensor)
    monkeypatch.setattr(torch.nn.Module, "to", stay)
    with (
        functorch.patch(fake_tensor_allow_meta=True),
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.random.fork_rng(),
    ):
        yield


def stay(module, *where, **_):
    """`Module.to` for modules that are there already: fake parameters cannot be moved."""
    devices = [torch.device(d) for d in where if isinstance(d, (str, torch.device))]
    for tensor in (*module.parameters(), *module.buffers()):
        assert all(tensor.device.type == d.type for d in devices), f"{type(module).__name__} would be moved"
    return module


def scene(shape, classes=2, batch=2):
    """Images, a student's logits and a teacher's probabilities."""
    images = torch.randn(batch, 1, *shape, device=GPU)
    logits = torch.randn(batch, classes, *shape, device=GPU, requires_grad=True)
    return images, logits, torch.randn(batch, classes, *shape, device=GPU).softmax(1)


def walker():
    return RandomWalker(largest_component=True, gamma=0.05)


def bright(images, prompts):
    return 8 * images.expand(-1, prompts.labels.shape[1], *images.shape[2:])


def bright_one():
    return CallableGeneralist(bright, asynchronous=True)


def sam_med3d():
    with GPU:
        return SamMed3D(network=SamMed3DNetwork(Architecture.small()))


def check(logits, value):
    """A scalar there, with a gradient there."""
    assert value.device == logits.device
    assert value.shape == ()
    if FULL:
        value.backward()
        assert logits.grad.device == logits.device
        assert logits.grad.shape == logits.shape


def test_the_fake_gpu_is_strict():
    image = torch.zeros(3, device=GPU)
    assert image[:2].sum().device == GPU
    with pytest.raises(RuntimeError, match=r"(?i)device"):
        image + torch.zeros(3)
    with pytest.raises(DataDependentOutputException):
        bool(image.sum() > 0)


# ---- losses and prompts ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, p, y, w: losses.DiceCELoss(to_onehot_y=True, softmax=True)(z, y[:, None]),
        lambda z, p, y, w: losses.DiceLoss(softmax=True)(z, p, voxel_weight=w),
        lambda z, p, y, w: losses.CrossEntropyLoss()(z, y),
        lambda z, p, y, w: losses.SoftmaxMSELoss()(z, p, voxel_weight=w),
        lambda z, p, y, w: losses.SoftmaxKLLoss()(z, p),
        lambda z, p, y, w: losses.EntropyLoss()(z),
        lambda z, p, y, w: losses.UncertaintyWeightedLoss()(z, p, w),
        lambda z, p, y, w: losses.CrossPseudoLabelLoss()(z, y, w),
    ],
)
@pytest.mark.parametrize("shape", [(16, 20), (8, 12, 10)])
def test_losses(loss, shape):
    _, logits, prob = scene(shape, classes=3)
    check(logits, loss(logits, prob, prob.argmax(1), torch.rand(2, *shape, device=GPU)))


def test_a_dialogue():
    prob = scene((8, 12, 10), classes=3)[2]
    target, region, skip = prompts.specialist_targets(prob, largest_component=True)
    point, label = prompts.next_click(
        target, None, region, seed=1, iteration=2, sample_ids=[0, 1], round=0, skip=skip
    )
    boxes, found = prompts.boxes(target, 0.05)
    assert {a.device for a in (point, label, boxes, found)} == {GPU}


# ---- the term -------------------------------------------------------------------------------------

GENERALISTS = {
    "walker-2d": ([walker], (24, 20)),
    "walker": ([walker], (12, 16, 10)),
    "function-2d": ([bright_one], (24, 20)),
    "sam-med3d": ([sam_med3d], (32, 24, 32)),
    "three": ([sam_med3d, walker, bright_one], (32, 24, 32)),
}


@pytest.mark.parametrize("mode", ["mask", "mixed", "unc", "point"])
@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("who", GENERALISTS)
def test_term(who, classes, mode):
    makers, shape = GENERALISTS[who]
    term = SemiSAMTerm([make() for make in makers], total_steps=100, mode=mode, clicks=3)
    images, logits, prob = scene(shape, classes)
    check(logits, term(images, logits, teacher_probs=prob, step=50))
    check(logits, term(images, logits, step=50, sample_ids=[7, 8]))
    step, ids = (torch.zeros(n, dtype=torch.int64, device=GPU) for n in ((), (2,)))
    check(logits, term(images, logits, teacher_probs=prob, step=step, sample_ids=ids))


@pytest.mark.parametrize(
    "options",
    [
        *(
            {"loss": loss, "target": target}
            for loss in ("mse", "ce", "ce_dice")
            for target in ("soft", "hard")
        ),
        *({"unc": unc} for unc in ("var", "ent", "mi")),
        *({"weight": weight} for weight in ("exp", "linear", "gate", "conf", "none")),
        *({"ramp": ramp} for ramp in ("rising", "falling", "flat")),
        *({"preset": preset} for preset in ("ref", "plus")),
        *({"rule": rule} for rule in ("ritm", "random")),
        *({"sample_gate": gate} for gate in (0.0, 0.5)),
        {"prompt_lcc": True},
        {"click_memory": "all"},
        {"teacher_share": 0.3},
    ],
    ids=str,
)
def test_settings_of_the_term(options):
    term = SemiSAMTerm([walker(), bright_one()], total_steps=100, **options)
    images, logits, prob = scene((8, 12, 10))
    check(logits, term(images, logits, teacher_probs=prob, step=50))


@pytest.mark.parametrize("target", ["soft", "hard"])
def test_labels_from_before(target):
    term = SemiSAMTerm([walker()], total_steps=100, target=target, loss="ce_dice")
    images, logits, prob = scene((8, 12, 10), classes=3)
    weight = torch.rand(2, 8, 12, 10, device=GPU)
    made = prob if target == "soft" else prob.argmax(1).to(torch.uint8)
    check(logits, term.from_labels(images, logits, made, weight, step=50, uncertainty=weight))


# ---- methods --------------------------------------------------------------------------------------


NAMES = [*methods.METHODS, *(f"semisam-{m}" for m in methods.METHODS if m != "supervised")]


@pytest.mark.parametrize("name", dict.fromkeys(map(methods.canonical_name, NAMES)))
@pytest.mark.parametrize("dims", [2, 3])
def test_a_step_of_every_method(name, dims, monkeypatch):
    def network(_=None):
        with GPU:
            return (UNet2d if dims == 2 else UNet3d)(channels=(4, 8))

    drawn = torch.Tensor.normal_
    monkeypatch.setattr(torch, "Generator", Numbers)
    monkeypatch.setattr(torch.Tensor, "normal_", without(drawn))
    monkeypatch.setattr(base, "deepcopy", network)  # fake parameters are not copied
    term = SemiSAMTerm([walker()], total_steps=100) if methods.needs_term(name) else None
    with GPU:
        method = methods.build(
            *(MethodConfig(name=name, discriminator_channels=[4, 8]), network()),
            num_classes=2,
            total_steps=100,
            seed=1,
            term=term,
            channels=1,
            spatial_dims=dims,
        )
    shape = (16,) * dims
    labels = torch.zeros(2, *shape, dtype=torch.uint8, device=GPU)
    batch = base.Batch(torch.randn(4, 1, *shape, device=GPU), labels, (0, 1, 2, 3))
    total = sum(method.losses(batch, 50).values())
    assert total.device == GPU
    if FULL:
        total.backward()
        for parameter in method.student.parameters():
            assert parameter.grad.device == GPU
    if method.teacher is not None:
        method.after_step(50)


def without(draw):
    """The draw without its generator."""

    def drawn(tensor, *moments, generator=None):
        return draw(tensor, *moments)

    return drawn


class Numbers:
    """A generator of nothing: torch has none for GPU."""

    def __init__(self, device=None):
        assert torch.device(device) == GPU

    def manual_seed(self, seed):
        return self
