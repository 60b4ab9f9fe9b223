# SPDX-License-Identifier: Apache-2.0
"""Losses inside torch's machinery: workers, compile, inference mode, memory formats, shared graphs."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import semisam
from semisam import losses as L

LOSS = L.DiceCELoss(to_onehot_y=True, softmax=True, include_background=False)


def batch(seed=0, shape=(2, 3, 8, 9, 10)):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(shape, generator=g)
    y = torch.randint(0, shape[1], (shape[0], 1, *shape[2:]), generator=g, dtype=torch.uint8)
    return z, y


def step(z, y, loss=LOSS):
    z = z.clone().requires_grad_()
    value = loss(z, y)
    value.backward()
    return value.detach(), z.grad


class Losses(Dataset):
    """Items that are themselves losses and gradients, computed where the item is made."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        # Large enough for several threads, were they allowed here.
        value, gradient = step(*batch(i, (1, 2, 64, 64, 32)))
        return value, gradient.sum((0, 2, 3, 4)), torch.tensor(semisam.get_num_threads())


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_in_dataloader_workers_after_the_parent_used_threads(context):
    if context not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {context} on this platform")
    semisam.set_num_threads(4)
    try:
        here = [Losses(4)[i] for i in range(4)]
    finally:
        semisam.set_num_threads(0)
    loader = DataLoader(*(Losses(4), 1, False), num_workers=2, multiprocessing_context=context, timeout=120)
    there = list(loader)
    assert len(there) == 4
    for (value, gradient, _), (worker_value, worker_gradient, threads) in zip(here, there, strict=True):
        assert torch.equal(worker_value[0], value)
        assert torch.equal(worker_gradient[0], gradient)
        assert threads.item() == 1  # what torch tells its workers


def test_fork_without_a_dataloader():
    if not hasattr(os, "fork"):
        pytest.skip("no fork on this platform")
    z, y = batch(1, (1, 2, 64, 64, 32))
    expected, _ = step(z, y)
    child = os.fork()
    if child == 0:
        # A child must leave by _exit whatever happens, or it would run the remaining tests.
        try:
            signal.alarm(60)  # a child that hangs must not hang the test
            torch.set_num_threads(1)  # torch's own OpenMP hangs in a forked child; ours must not
            semisam.set_num_threads(3)
            os._exit(0 if torch.equal(step(z, y)[0], expected) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_inference_mode_and_no_grad():
    z, y = batch()
    expected = LOSS(z, y)
    with torch.inference_mode():
        assert torch.equal(LOSS(z, y), expected)
        inner = LOSS(z * 1.0, y)
        assert inner.is_inference()
        assert torch.equal(inner, expected)
    with torch.no_grad():
        value = LOSS(z.clone().requires_grad_(), y)
    assert not value.requires_grad
    # torch forbids to train against tensors made in inference mode, and says what to do instead.
    with torch.inference_mode():
        teacher = (z + 1).softmax(1)
    logits = z.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"Inference tensors cannot be saved"):
        L.softmax_mse_loss(logits, teacher)
    L.softmax_mse_loss(logits, teacher.clone()).backward()
    assert logits.grad.isfinite().all()


def test_two_uses_in_one_graph_add_up():
    z, y = batch()
    once = step(z, y)[1]
    logits = z.clone().requires_grad_()
    (LOSS(logits, y) + 2 * LOSS(logits, y)).backward()
    torch.testing.assert_close(logits.grad, 3 * once, atol=1e-9, rtol=1e-6)
    # The same loss node twice, and backward twice through one graph.
    logits.grad = None
    value = LOSS(logits, y)
    (value + value).backward(retain_graph=True)
    torch.testing.assert_close(logits.grad, 2 * once, atol=1e-9, rtol=1e-6)
    value.backward()
    torch.testing.assert_close(logits.grad, 3 * once, atol=1e-9, rtol=1e-6)


def test_gradient_reaches_the_network():
    torch.manual_seed(0)
    net = nn.Conv2d(1, 3, 3, padding=1)
    x, y = torch.randn(2, 1, 8, 8), torch.randint(0, 3, (2, 1, 8, 8))
    before = LOSS(net(x), y)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.5)
    for _ in range(20):
        optimiser.zero_grad()
        LOSS(net(x), y).backward()
        optimiser.step()
    assert LOSS(net(x), y) < before


@pytest.mark.parametrize("case", ["channels_last", "channels_last_3d", "transposed", "sliced", "expanded"])
def test_memory_formats(case):
    z, y = batch(shape=(2, 3, 8, 10) if case == "channels_last" else (2, 3, 8, 9, 10))
    expected, gradient = step(z, y)
    if case.startswith("channels"):
        form = getattr(torch, case)
        other, labels = z.to(memory_format=form), y.to(memory_format=form)
        assert not other.is_contiguous()
    elif case == "transposed":
        other = z.transpose(2, 4).contiguous().transpose(2, 4)
        labels = y.transpose(2, 4).contiguous().transpose(2, 4)
    elif case == "sliced":
        other = torch.stack([z, z], -1)[..., 0]
        labels = torch.stack([y, y], -1)[..., 1]
    else:
        z = z[:1].expand(2, -1, -1, -1, -1)
        expected, gradient = step(z.contiguous(), y)
        other, labels = z, y
    value, other_gradient = step(other, labels)
    assert torch.equal(value, expected)
    assert torch.equal(other_gradient, gradient)


def test_nothing_is_aliased_or_changed():
    z, y = batch()
    copies = z.clone(), y.clone()
    w = torch.rand(2, 8, 9, 10)
    w_copy = w.clone()
    logits = z.requires_grad_()
    value = LOSS(logits, y, w)
    value.backward()
    assert torch.equal(z.detach(), copies[0])
    assert torch.equal(y, copies[1])
    assert torch.equal(w, w_copy)
    assert logits.grad.data_ptr() != z.data_ptr()


def test_meta_and_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: PLC0415

    with FakeTensorMode():
        z = torch.empty(2, 3, 8, 8, requires_grad=True)
        y = torch.empty(2, 1, 8, 8, dtype=torch.uint8)
        value = LOSS(z, y)
        assert value.shape == ()
        (gradient,) = torch.autograd.grad(value, z)
        assert gradient.shape == z.shape


# ---- torch.compile ------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def _compile_caches(tmp_path_factory):
    """Keep compiled code out of the user's cache."""
    old = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("inductor"))
    yield
    if old is None:
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]
    else:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = old


def compiled(f, backend="aot_eager"):
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, backend=backend)


def test_a_training_step_compiles_in_one_graph():
    """With inductor, the default backend: network, loss and backward."""
    torch.manual_seed(0)
    net = nn.Conv2d(1, 2, 3, padding=1)
    loss = L.DiceCELoss(to_onehot_y=True, softmax=True, weight=[1.0, 2.0])
    x, y = torch.randn(2, 1, 16, 16), torch.randint(0, 2, (2, 1, 16, 16), dtype=torch.uint8)

    def training_step(x, y):
        return loss(net(x), y)

    expected = training_step(x, y)
    expected.backward()
    gradients = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    value = compiled(training_step, "inductor")(x, y)
    value.backward()
    torch.testing.assert_close(value, expected)
    for p, gradient in zip(net.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient)


MODULES = [
    L.DiceLoss(to_onehot_y=True, softmax=True, reduction="none", weight=[1, 2, 3]),
    L.DiceLoss(to_onehot_y=True, sigmoid=True, soft_label=True, ignore_index=2, batch=True),
    L.DiceLoss(other_act=torch.tanh, to_onehot_y=True, squared_pred=True),
    L.DiceCELoss(to_onehot_y=True, softmax=True, include_background=False, label_smoothing=0.1),
    L.DiceCELoss(to_onehot_y=True, sigmoid=True, jaccard=True, weight=torch.tensor([1.0, 2.0, 3.0])),
    L.CrossEntropyLoss(ignore_index=0),
    L.SoftmaxMSELoss(),
    L.SoftmaxKLLoss(reduction="sample"),
    L.UncertaintyWeightedLoss(loss="ce_dice"),
    L.CrossPseudoLabelLoss(),
]


@pytest.mark.parametrize("module", MODULES, ids=lambda m: re.sub(r" at 0x[0-9a-f]+", "", repr(m)))
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_modules_compile_in_one_graph(module, dtype):
    z, y = batch(shape=(2, 3, 6, 7))
    y = y.to(dtype)
    w = torch.rand(2, 6, 7)

    def run(z, y, w):
        return module(z, y, w).sum()

    logits = z.clone().requires_grad_()
    expected = run(logits, y, w)
    (gradient,) = torch.autograd.grad(expected, logits)
    value = compiled(run)(logits, y, w)
    (got,) = torch.autograd.grad(value, logits)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(got, gradient)


def test_an_objective_with_a_changing_weight_compiles_once():
    """The loss weight moves with the step; that must not compile the step anew every time."""
    g = torch.Generator().manual_seed(3)
    z = torch.randn(4, 2, 6, 6, generator=g)
    labels = torch.randint(0, 2, (2, 6, 6), generator=g, dtype=torch.uint8)
    pseudo, w = torch.randn(2, 2, 6, 6, generator=g).softmax(1), torch.rand(2, 6, 6, generator=g)

    def objective(z, weight):
        supervised = L.ssl_objective(z, labels, pseudo, w, lambda_pseudo=0.0)
        return supervised + weight * L.uncertainty_weighted_loss(z[2:], pseudo, w)

    from torch._dynamo.testing import CompileCounter  # noqa: PLC0415

    torch._dynamo.reset()
    counter = CompileCounter()
    run = torch.compile(objective, fullgraph=True, backend=counter)
    for t in range(0, 6000, 600):
        weight = torch.tensor(semisam.schedules.sam_weight(t, 6000))
        torch.testing.assert_close(run(z, weight), objective(z, weight))
    assert counter.frame_count == 1


def test_a_label_that_is_wrong_is_still_found_in_compiled_code():
    z, y = batch(shape=(2, 3, 6, 7))
    run = compiled(LOSS)
    run(z, y.float())
    for wrong in (y.float() + 0.5, y.float() + 7):
        with pytest.raises(ValueError, match=r"target"):
            run(z, wrong)
