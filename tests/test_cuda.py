# SPDX-License-Identifier: Apache-2.0
"""The operators and what is built on them on a CUDA device; tests/gpu.py says how to rehearse this without.

python -m pytest -m cuda tests/test_cuda.py
SEMISAM_CUDA_REHEARSAL=emulated python -m pytest tests/test_cuda.py
"""

from __future__ import annotations

import pytest
import torch
from cases import CASES
from gpu import (
    BACKEND,
    DEVICE,
    REHEARSAL,
    Graph,
    Stream,
    bits,
    keep_busy,
    labels,
    little_memory,
    missing,
    move,
    no_waits,
    operators,
    random,
    tensors,
    use_emulation,
    wait,
)
from test_ops import all_cases, all_runs, check_value, make, run, tree_map
from torch import nn

import semisam
from semisam import fusion, losses, metrics, ops, prompts

WHY = missing()
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(bool(WHY), reason=WHY or "-")]
if REHEARSAL == "emulated":
    use_emulation()


def needs(*names: str) -> None:
    for op in names:
        if op not in operators():
            pytest.skip(f"{op} has no kernel on {BACKEND} yet")


def once_per_operator():
    """A case of every operator, in single precision where it has any."""
    first = {}
    for case in CASES:
        if not case.dtypes or "f32" in case.dtypes:
            first.setdefault(case.op, case)
    return pytest.mark.parametrize("case", first.values(), ids=lambda c: c.op)


def single(case) -> str:
    return "f32" if "f32" in case.dtypes else "".join(case.dtypes[:1])


# ---- every operator, over the table -------------------------------------------------------------


@all_runs
def test_value(case, dtype):
    """Within the table's bounds of the reference; whole numbers exactly; the same bits once more."""
    needs(case.op)
    inputs = make(case, dtype)
    on_device = move(inputs)
    got = run(case, on_device)
    assert all(t.device.type == DEVICE.type for t in got)
    check_value(case, inputs, [t.cpu() for t in got])
    for ours, cpu in zip(got, run(case, inputs), strict=True):
        assert ours.is_floating_point() or torch.equal(ours.cpu(), cpu), "integers must be those of the CPU"
    assert bits(run(case, on_device)) == bits(got), "a second run gave other bits"
    assert bits(on_device) == bits(inputs), "the inputs have changed"
    assert not ops.faults()


@all_runs
def test_any_strides(case, dtype):
    needs(case.op)
    inputs = move(make(case, dtype))

    def strided(t):
        wide = torch.zeros((*t.shape, 2), dtype=t.dtype, device=t.device)
        wide[..., 0] = t
        moved = wide.movedim(0, -2).contiguous().movedim(-2, 0) if t.ndim > 1 else wide
        return moved[..., 0]

    assert bits(run(case, [tree_map(strided, v) for v in inputs])) == bits(run(case, inputs))


@all_cases
def test_opcheck(case):
    needs(case.op)
    ops.register()
    op = getattr(torch.ops.semisam, case.op).default
    torch.library.opcheck(
        op, tuple(move(make(case, single(case)))), test_utils=("test_schema", "test_faketensor")
    )


@all_cases
def test_on_the_current_stream(case):
    """Inputs that appear late on another stream: who does not run there reads the zeros before them."""
    needs(case.op)
    inputs = make(case, single(case))
    expected = bits(run(case, move(inputs)))
    late = tree_all(torch.zeros_like, move(inputs))
    source = move(inputs)
    wait()
    stream = Stream()
    with stream:
        keep_busy()
        for a, b in zip(tensors(late), tensors(source), strict=True):
            a.copy_(b)
        got = run(case, late)
    stream.join()
    assert bits(got) == expected


def tree_all(f, values):
    return [tree_map(f, v) for v in values]


@once_per_operator()
def test_two_streams_at_once(case):
    needs(case.op)
    given = [move(make(case, single(case), seed)) for seed in (7, 8)]
    expected = [bits(run(case, inputs)) for inputs in given]
    streams, got = [Stream(), Stream()], [[], []]
    wait()
    for _ in range(4):
        for stream, inputs, results in zip(streams, given, got, strict=True):
            with stream:
                results.append(run(case, inputs))
    for stream in streams:
        stream.join()
    wait()
    for results, bits_of in zip(got, expected, strict=True):
        assert [bits(r) for r in results] == [bits_of] * 4


@all_cases
def test_graph_capture_and_replay(case):
    """A graph captured on some inputs gives, replayed on others, what a call on those gives."""
    needs(case.op)
    fixed, other = (move(make(case, single(case), seed)) for seed in (7, 8))
    for mine, theirs in zip(tensors(fixed), tensors(other), strict=True):
        assert mine.shape == theirs.shape
    graph = Graph(lambda: run(case, fixed))
    for mine, theirs in zip(tensors(fixed), tensors(other), strict=True):
        mine.copy_(theirs)
    expected = bits(run(case, fixed))
    for made in tensors(graph.outputs):
        made.zero_()
    graph.replay()
    assert bits(graph.outputs) == expected
    graph.replay()
    assert bits(graph.outputs) == expected, "a second replay gave other bits"


@all_cases
def test_nothing_makes_the_host_wait(case):
    needs(case.op)
    inputs = move(make(case, single(case)))
    run(case, inputs)
    with no_waits():
        run(case, inputs)


@pytest.mark.parametrize("op", ops.SCHEMA)
def test_an_operator_without_a_kernel_says_so(op):
    if op in operators():
        pytest.skip(f"{op} has a kernel on {BACKEND}")
    case = next(c for c in CASES if c.op == op)
    inputs = move(make(case, single(case)))
    if not REHEARSAL:
        with pytest.raises(NotImplementedError, match=rf"^{op}\(\): not available on cuda$"):
            run(case, inputs)
        return
    dtypes = ops._torch_dtypes(torch)
    outputs = [torch.empty(shape, dtype=dtypes[dtype]) for shape, dtype in ops.output_specs(op, inputs)]
    with pytest.raises(NotImplementedError, match=rf"^{op}\(\): not available on cpu with .* emulated$"):
        ops._raw(op, inputs, outputs, "emulated")


def test_info_says_where_everything_runs():
    info = semisam.info()
    assert REHEARSAL or set(info["operators"]) == set(ops.SCHEMA)
    assert REHEARSAL or {op for op, where in info["operators"].items() if "cuda" in where} == operators()
    assert REHEARSAL or f"{len(operators())} of {len(ops.SCHEMA)} operators" in info["cuda backend"]


# ---- losses -------------------------------------------------------------------------------------

SPACE = (9, 10, 17)


def objective(z, y, q, w, half=2):
    return losses.ssl_objective(z, y[:half], q, w, lambda_entropy=0.1)


def objective_data(dtype=torch.float32, classes=2, seed=0):
    z = random(seed, 4, classes, *SPACE, dtype=dtype)
    y = labels(seed, classes, 4, *SPACE)
    q = random(seed + 1, 2, classes, *SPACE).softmax(1)
    w = random(seed + 2, 2, *SPACE).sigmoid()
    return z, y, q, w


def gradient_of(function, z, *rest):
    z = z.detach().requires_grad_()
    value = function(z, *rest)
    value.backward()
    return value.detach(), z.grad


def needs_losses() -> None:
    needs("voxel_loss_forward", "voxel_loss_backward")


@pytest.mark.parametrize("kind", ["ce", "dice", "mse", "kl", "entropy"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
def test_gradcheck(kind, activation):
    needs_losses()
    if kind not in losses._ALLOWED[activation]:
        pytest.skip("no such term")
    z = random(0, 2, 3, 2, 3, 4, dtype=torch.float64)
    z = (z.sigmoid() if activation == "none" else z).requires_grad_()
    target = None if kind == "entropy" else random(1, 2, 3, 2, 3, 4, dtype=torch.float64).softmax(1)
    w = random(2, 2, 2, 3, 4, dtype=torch.float64).sigmoid()
    term = losses.Term(kind, target, w)
    assert torch.autograd.gradcheck(lambda z: losses.voxel_loss(z, [term], activation=activation), (z,))


@pytest.mark.parametrize("classes", [2, 4, 14, 40])
def test_objective_is_that_of_the_cpu(classes):
    needs_losses()
    data = objective_data(classes=classes)
    value, grad = gradient_of(objective, *data)
    expected, expected_grad = gradient_of(objective, *(t.cpu() for t in data))
    torch.testing.assert_close(value.cpu(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.cpu(), expected_grad, rtol=1e-5, atol=2e-6)


def test_channels_last_is_the_same():
    needs_losses()
    data = objective_data(classes=3)
    z = data[0].to(memory_format=torch.channels_last_3d)
    assert not z.is_contiguous()
    expected, grad = gradient_of(objective, *data)
    value, got = gradient_of(objective, z, *data[1:])
    assert bits([value, got]) == bits([expected, grad])


@pytest.mark.parametrize("loss", ["dice_ce", "objective", "weighted"])
def test_compiled_in_one_graph(loss):
    needs_losses()
    functions = {
        "dice_ce": lambda z, y, q, w: losses.dice_ce_loss(z, y, to_onehot_y=True, softmax=True),
        "objective": objective,
        "weighted": lambda z, y, q, w: losses.uncertainty_weighted_loss(z[2:], q, w, loss="ce_dice"),
    }
    backend = "aot_eager" if REHEARSAL else "inductor"
    compiled = torch.compile(functions[loss], fullgraph=True, backend=backend)
    data = objective_data()
    data = (data[0], data[1][:, None], *data[2:]) if loss == "dice_ce" else data
    expected, grad = gradient_of(functions[loss], *data)
    value, got = gradient_of(compiled, *data)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(got, grad, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_mixed_precision(dtype):
    """What autocast hands over is the half precision logits; the scaler sees float32 losses."""
    needs_losses()
    torch.manual_seed(0)
    network = nn.Conv3d(1, 2, 3, padding=1).to(DEVICE)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=dtype == torch.float16 and DEVICE.type == "cuda")
    loss_of = losses.DiceCELoss(to_onehot_y=True, softmax=True)
    image, y = random(0, 2, 1, *SPACE), labels(0, 2, 2, 1, *SPACE)
    with torch.autocast(DEVICE.type, dtype):
        z = network(image)
        loss = loss_of(z, y)
    assert (z.dtype, loss.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(loss, loss_of(z.float(), y), rtol=1e-5, atol=1e-6)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(p.isfinite().all() for p in network.parameters())
    _, grad = gradient_of(loss_of, z, y)
    _, exact = gradient_of(loss_of, z.float(), y)
    assert grad.dtype == dtype
    torch.testing.assert_close(grad.float(), exact, rtol=1e-2, atol=1e-6)


def test_objective_as_a_graph():
    """Forward and backward of the whole objective, captured once, replayed on another batch."""
    needs_losses()
    fixed, other = objective_data(seed=0), objective_data(seed=10)
    z = fixed[0].requires_grad_()

    def step():
        return torch.autograd.grad(objective(z, *fixed[1:]), z)[0]

    graph = Graph(step)
    with torch.no_grad():
        for mine, theirs in zip(fixed, other, strict=True):
            mine.copy_(theirs)
    graph.replay()
    assert bits(graph.outputs) == bits(gradient_of(objective, *other)[1])


def test_losses_do_not_wait():
    needs_losses()
    data = objective_data()
    gradient_of(objective, *data)
    with no_waits():
        gradient_of(objective, *data)
        losses.dice_ce_loss(
            *(data[0], data[1][:, None]),
            to_onehot_y=True,
            softmax=True,
            weight=[0.2, 0.8],
            reduction="sum",
        )
        losses.dice_loss(data[0], data[1][:, None], to_onehot_y=True, softmax=True, reduction="none")


# ---- prompts, fusion, metrics -------------------------------------------------------------------


def rollout(prob, clicks=10):
    """Specialist's map -> click -> an answer (the target, a little moved) -> error -> click ..."""
    target, region, skip = prompts.specialist_targets(prob)
    current, found, maps = None, [], []
    for k in range(clicks):
        point, label = prompts.next_click(
            *(target, current, region),
            skip=skip,
            seed=3,
            iteration=5,
            sample_ids=range(len(prob)),
            round=k,
        )
        found += [point, label]
        current = target.roll(1 + k % 3, dims=-1)
        maps.append(current.to(prob.dtype))
    fused = fusion.fuse(maps, want=("mean", "uncertainty", "weight")) if "fuse" in operators() else None
    return [target, region, skip, *found, *([] if fused is None else [fused.mean, fused.weight])]


def test_fusion_by_tables_makes_nobody_wait():
    """Weights that are tensors of the device, that are numbers, and none: the CPU's fusion of the same."""
    needs("fuse")
    maps = [random(seed, 2, 3, 8, 9, 10).softmax(1) for seed in range(4)]
    lab = torch.tensor([[0.5, 0], [0, 0], [0.5, 0], [0, 0]], dtype=torch.float64)
    unc = torch.tensor([[0.25, 0], [0, 0], [0.25, 0], [0.5, 0]], dtype=torch.float64)
    maps[1].fill_(float("nan"))
    for p in maps:
        p[1] = float("nan")
    on_device = [lab.to(DEVICE), unc.to(DEVICE)]
    with no_waits():
        given = [fusion.fuse(maps, *on_device), fusion.fuse(maps, lab.tolist(), unc.tolist())]
        fusion.fuse(maps)
    expected = fusion.fuse([p.cpu() for p in maps], lab, unc)
    for made in given:
        for ours, cpu in zip(made, expected, strict=True):
            torch.testing.assert_close(ours.cpu(), cpu, rtol=1e-6, atol=4e-6)
    assert (expected.label[1] == 255).all()
    assert expected.mean.isfinite().all()


def probabilities(seed=0, classes=3):
    z = random(seed, 2, classes, 16, 17, 18)
    return torch.nn.functional.avg_pool3d(z, 3, 1, 1).mul(6).softmax(1)


def test_rollout_is_that_of_the_cpu():
    needs("specialist_targets", "next_click")
    prob = probabilities()
    got, expected = rollout(prob), rollout(prob.cpu())
    for ours, cpu in zip(got, expected, strict=False):
        if cpu.is_floating_point():
            torch.testing.assert_close(ours.cpu(), cpu, rtol=1e-6, atol=4e-6)
        else:
            assert torch.equal(ours.cpu(), cpu)


def test_rollout_as_a_graph():
    needs("specialist_targets", "next_click")
    prob, other = probabilities(0), probabilities(1)
    graph = Graph(lambda: rollout(prob))
    prob.copy_(other)
    graph.replay()
    assert bits(graph.outputs) == bits(rollout(other))


def test_rollout_does_not_wait():
    needs("specialist_targets", "next_click")
    prob = probabilities()
    rollout(prob)
    with no_waits():
        rollout(prob)


def test_points_and_boxes_do_not_wait():
    needs("sample_points", "boxes", "mask_logits")
    prob = probabilities()

    def all_of_them():
        batch = prompts.sample_points(prob, 3, seed=1, iteration=2, sample_ids=[4, 5])
        box, found = prompts.boxes(prob[:, 1:] > 0.5)
        low = prompts.mask_logits(prob[:, 1], (4, 4, 4))
        return [batch.points, batch.labels, box, found, low]

    expected = bits(all_of_them())
    with no_waits():
        got = all_of_them()
    assert bits(got) == expected


@pytest.mark.parametrize("definition", ["pooled", "monai", "deepmind"])
def test_metrics_are_those_of_the_cpu(definition):
    needs("overlap", "surface_metrics")
    pred, y = (labels(seed, 3, 2, 1, 9, 10, 12) for seed in (0, 1))
    got = metrics.compute_all(pred, y, 3, spacing=(1.0, 0.7, 2.0), definition=definition)
    expected = metrics.compute_all(pred.cpu(), y.cpu(), 3, spacing=(1.0, 0.7, 2.0), definition=definition)
    for name, value in got.items():
        assert value.device.type == DEVICE.type
        torch.testing.assert_close(value.cpu(), expected[name], rtol=1e-9, atol=1e-9, msg=name)


def test_term_teaches_the_same_as_on_the_cpu():
    """The whole term with a function for a generalist: clicks exactly, loss and gradient within rounding."""

    def bright(images, asked):
        size = (-1, asked.labels.shape[1], *images.shape[2:])
        return (images - 0.3).mul(8).expand(size) + 0 * asked.points.sum()

    def teach(images, z, prob):
        term = semisam.SemiSAMTerm(bright, total_steps=10, clicks=3, sample_gate=0.0)
        z = z.detach().requires_grad_()
        loss = term(images, z, teacher_probs=prob, step=9)
        loss.backward()
        return loss.detach(), z.grad, term.last.target, term.last.weight

    prob = probabilities(classes=2)
    images, z = prob[:, 1:] + 0.1 * random(1, 2, 1, 16, 17, 18), random(2, *prob.shape)
    got, expected = teach(images, z, prob), teach(images.cpu(), z.cpu(), prob.cpu())
    for ours, cpu in zip(got, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), cpu, rtol=1e-5, atol=5e-6)


# ---- what goes wrong ----------------------------------------------------------------------------


def needs_counting() -> None:
    if REHEARSAL == "cpu":
        pytest.skip("the CPU refuses such labels at once")
    ops.faults()


def test_labels_that_are_no_class_are_counted_and_told():
    needs_counting()
    needs_losses()
    z, y = random(0, 1, 3, 8, 9), labels(0, 3, 1, 8, 9)
    y[0, :2, 0] = torch.tensor([3, 200], dtype=torch.uint8, device=DEVICE)
    ignored = y.clone()
    ignored[0, :2, 0] = 255
    value, grad = gradient_of(losses.cross_entropy, z, y)
    assert bits([value, grad]) == bits(gradient_of(losses.cross_entropy, z, ignored)), "left out as ignored"
    found = ops.faults()
    assert found["voxel_loss_forward"] == 2
    assert not ops.faults(), "told once"
    losses.cross_entropy(z, y)
    with pytest.raises(
        ValueError, match=r"voxel_loss_forward\(\): 2 left out: expected labels that are classes"
    ):
        ops.refuse_faults()


def test_weights_of_a_fusion_that_are_none_are_counted_and_told():
    needs_counting()
    needs("fuse")
    maps = [random(seed, 2, 1, 8, 9).sigmoid() for seed in range(3)]
    table = torch.tensor([[0.5, 0.5], [0.25, -0.5], [0.25, 0.5]], dtype=torch.float64, device=DEVICE)
    right = table.clamp_min(0)
    expected = fusion.fuse(maps, right)
    assert not ops.faults()
    if REHEARSAL:  # the CPU's fusion looks at the weights
        return
    assert bits(list(fusion.fuse(maps, table))) == bits(list(expected)), "taken for 0"
    with pytest.raises(ValueError, match=r"fuse\(\): 1 left out: .*weights of at least 0 that sum to 1"):
        ops.refuse_faults()


@pytest.mark.parametrize("op", ["overlap", "surface_metrics"])
def test_metrics_refuse_labels_that_are_no_class(op):
    needs_counting()
    needs(op)
    function = {"overlap": metrics.dice, "surface_metrics": metrics.hd95}[op]
    y = labels(0, 2, 1, 1, 8, 9, 10)
    bad = y.clone()
    bad[..., 0] = 7

    def refused():
        function(bad, y, num_classes=2)
        if REHEARSAL:  # nobody asks for the counts of the CPU
            ops.refuse_faults()

    with pytest.raises(ValueError, match=rf"{op}\(\): \d+ left out: expected labels that are classes"):
        refused()
    assert function(y, y, num_classes=2, include_background=False).numel() == 1


def test_tensors_on_different_devices():
    elsewhere = torch.device("meta" if REHEARSAL else "cpu")
    z, y = random(0, 2, 2, 8, 9), labels(0, 2, 2, 8, 9)
    with pytest.raises(ValueError, match=rf"target: expected a tensor on {DEVICE}.*, got one on {elsewhere}"):
        losses.cross_entropy(z, y.to(elsewhere))
    with pytest.raises(ValueError, match=rf"sources\[1\]: expected a tensor on {DEVICE}.*on {elsewhere}"):
        fusion.fuse([z, z.to(elsewhere)])
    with pytest.raises(ValueError, match=rf"^overlap\(\): y: expected a tensor on {DEVICE}, got one on"):
        ops.call("overlap", y, y.to(elsewhere), 2, 0, 0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_second_device():
    needs("mask_logits")
    prob = torch.rand(2, 8, 9, 10)
    got = prompts.mask_logits(prob.to("cuda:1"), (2, 3, 4))
    assert got.device == torch.device("cuda:1")
    assert torch.equal(got.cpu(), prompts.mask_logits(prob.to("cuda:0"), (2, 3, 4)).cpu())
    with pytest.raises(ValueError, match="expected a tensor on cuda:0, where prob is, got one on cuda:1"):
        ops.one_device("f", prob=prob.to("cuda:0"), mask=prob.to("cuda:1"))


def test_out_of_memory_is_torch_s_and_the_next_call_runs():
    needs("edt")
    mask = torch.ones((1, 160, 160, 160), dtype=torch.uint8, device=DEVICE)
    mask[0, 0, 0, 0] = 0
    with little_memory(), pytest.raises(torch.OutOfMemoryError):
        ops.call("edt", mask, [], 0, 0, 0)
    assert ops.call("edt", mask[:, :8, :8, :8].contiguous(), [], 0, 0, 0)[0].isfinite().all()


@pytest.mark.skipif(bool(REHEARSAL), reason="needs some 20 GB of a device's memory")
def test_more_than_two_to_the_31_elements():
    """Zeros but for the last voxels, which only 64-bit indices reach."""
    needs_losses()
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free memory")
    side = (1032, 1024, 1024)
    z = torch.zeros((1, 2, *side), dtype=torch.float16, device=DEVICE)
    y = torch.zeros((1, *side), dtype=torch.uint8, device=DEVICE)
    z[0, 1, -1, -1, -1000:] = 8.0
    z.requires_grad_()
    loss = losses.cross_entropy(z, y)
    loss.backward()
    n, last = y.numel(), 1000 * (8.0 + torch.tensor(1 + torch.e**-8.0).log().item())
    expected = ((n - 1000) * torch.tensor(2.0).log().item() + last) / n
    assert abs(loss.item() - expected) < 1e-6
    assert (z.grad[0, 1, -1, -1, -1000:] >= z.grad[0, 1, 0, 0, :1000]).all()
