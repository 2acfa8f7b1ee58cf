"""Products of bfloat16 numbers, of the cells and of the loss: rounded operands against readable forms whose operands are rounded one by one, operands that are sums of two or
three such numbers against readable forms in float64."""

import argparse

import pytest
import torch
import torch.nn.functional as F
from test_fused import needs_extension, switch  # noqa: F401 (switch is a fixture)
from torch.overrides import TorchFunctionMode

from nni_darts_rnn import bilevel, cell, compiled, extension, fused, supernet
from nni_darts_rnn.cross_entropy import linear_cross_entropy
from nni_darts_rnn.genotype import DARTS_V1, DARTS_V2, Genotype
from nni_darts_rnn.options import prepare_torch

needs_tiles = pytest.mark.skipif(not fused.available() or not extension.State.loaded.rounds, reason="this processor or this compiler has no AMX")


class RoundedProduct(torch.autograd.Function):
    """a (m,k) b (k,n) and its gradients, every operand rounded to bfloat16 and every sum exact to the digits of float64."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return rounded(a) @ rounded(b)

    @staticmethod
    def backward(ctx, g):
        a, b = map(rounded, ctx.saved_tensors)
        return rounded(g) @ b.t(), a.t() @ rounded(g)


def rounded(t):
    return t.float().bfloat16().to(t.dtype)


class Rounding(TorchFunctionMode):
    """Inside, the readable forms multiply as `RoundedProduct` does."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.__matmul__, torch.Tensor.matmul):
            return RoundedProduct.apply(*args)
        if function is F.linear:
            x, w, b = args
            return RoundedProduct.apply(x, w.t()) + b
        return function(*args, **(kwargs or {}))


def ends(function, inputs, dtype, context):
    """The result of `function(*inputs)` and the gradients of a fixed linear function of it."""
    leaves = [t.to(dtype).requires_grad_() for t in inputs]
    with context:
        out = function(*leaves)
    towards = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype) if out.dim() else torch.ones_like(out)
    with context if isinstance(context, Rounding) else torch.enable_grad():
        return [out.detach(), *torch.autograd.grad(out, leaves, towards)]


def compare(ours, readable, inputs, scaled=()):
    """What `ours` does under autocast is far nearer to the readable form with rounded operands than that is to the exact one; of the `scaled` results, whose
    operands are multiplied by a number only after they were rounded, as near to the exact one."""
    autocast = torch.autocast("cpu", torch.bfloat16)
    got, oracle, exact = ends(ours, inputs, torch.float32, autocast), ends(readable, inputs, torch.float64, Rounding()), ends(readable, inputs, torch.float64, torch.enable_grad())
    for k, (a, b, c) in enumerate(zip(got, oracle, exact)):
        assert a.dtype == torch.float32 and a.shape == b.shape
        off, rounding = (a - (c if k in scaled else b)).norm() / c.norm(), (b - c).norm() / c.norm()
        assert off < (1.3 if k in scaled else 0.2) * rounding + 1e-6 and rounding < 0.05


def cell_inputs(T, B, H, N, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, h, W0, Ws = (torch.randn(shape, generator=g) for shape in ((T, B, 2 * H), (B, H), (H, 2 * H), (N, H, 2 * H)))
    return [x, 0.5 * h, W0 / H**0.5, Ws / H**0.5], torch.bernoulli(torch.full((B, H), 0.75), generator=g) / 0.75


@needs_tiles
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("T, B, H", [(1, 1, 16), (2, 5, 40), (1, 33, 66), (3, 70, 31), (2, 300, 64)])  # rows and columns that fill tiles, and that do not
def test_a_cell_of_rounded_operands(T, B, H, masked):
    for genotype in (Genotype((("tanh", 0), ("identity", 0), ("sigmoid", 1))), Genotype((("identity", 0),))):
        inputs, mask = cell_inputs(T, B, H, genotype.n_nodes)

        def run(function, *a):
            return function(*a, genotype, mask.to(a[0].dtype) if masked else None)

        compare(lambda *a: run(fused.discrete_cell, *a), lambda *a: run(cell.discrete_cell, *a), inputs)


@needs_tiles
@pytest.mark.parametrize("R, H, V", [(128, 16, 16), (150, 31, 77), (600, 66, 530), (601, 40, 301)])
def test_a_loss_of_rounded_operands(R, H, V):
    g = torch.Generator().manual_seed(3)
    inputs = [torch.randn(shape, generator=g) for shape in ((R, H), (V, H), (V,))]
    y = torch.randint(V, (R,), generator=g)
    compare(lambda *a: linear_cross_entropy(*a, y), lambda x, w, b: F.cross_entropy(F.linear(x, w, b), y), [inputs[0], inputs[1] / H**0.5, inputs[2]], scaled=[1])


@needs_extension
@pytest.mark.parametrize("genotype", [DARTS_V1, DARTS_V2], ids=["DARTS_V1", "DARTS_V2"])
def test_published_cells_within_the_digits_of_bfloat16(genotype):
    """Eight of relu's kinks after the other: 2^-8 in an operand is a few hundredths in a gradient, as under torch's own autocast."""
    (inputs, mask), autocast = cell_inputs(4, 33, 100, 8), torch.autocast("cpu", torch.bfloat16)
    exact = ends(lambda *a: cell.discrete_cell(*a, genotype, mask.double()), inputs, torch.float64, torch.enable_grad())
    ours = ends(lambda *a: fused.discrete_cell(*a, genotype, mask), inputs, torch.float32, autocast)
    torchs = ends(lambda *a: cell.discrete_cell(*a, genotype, mask), inputs, torch.float32, autocast)
    for a, b, c in zip(ours, torchs, exact):
        assert (a - c).norm() < 0.06 * c.norm() and (a - c).norm() < 1.5 * (b - c).norm()


@needs_extension
@pytest.mark.parametrize("why", ["too small", "float16", "no tiles"])
def test_where_nothing_is_gained_all_digits_stay(why, monkeypatch):
    inputs, mask = cell_inputs(3, 5, 15 if why == "too small" else 32, 2)
    genotype = Genotype((("tanh", 0), ("relu", 1)))
    if why == "no tiles":
        monkeypatch.setattr(extension.State.loaded, "rounds", False)
    results = [ends(lambda *a: fused.discrete_cell(*a, genotype, mask), inputs, torch.float32, context)
               for context in (torch.autocast("cpu", torch.float16 if why == "float16" else torch.bfloat16), torch.enable_grad())]
    assert all(map(torch.equal, *results))
    if why == "no tiles":
        x, w, b, y = torch.randn(150, 32), torch.randn(40, 32), torch.randn(40), torch.randint(40, (150,))
        with torch.autocast("cpu", torch.bfloat16):
            half = linear_cross_entropy(x, w, b, y)
        assert torch.equal(half, linear_cross_entropy(x, w, b, y))


@needs_extension
def test_a_projection_in_bfloat16_and_states_in_float32():
    """What `x @ W0` is under autocast; a state that is carried on keeps its digits, and one in bfloat16 is taken too."""
    inputs, _ = cell_inputs(3, 5, 32, 8)
    x = inputs[0].bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [fused.discrete_cell(x, h, *inputs[2:], DARTS_V2) for h in (inputs[1], inputs[1].bfloat16())]
    assert [out.dtype for out in outputs] == [torch.float32] * 2 and 0 < (outputs[0] - outputs[1]).abs().max() < 1e-2
    outputs[0].sum().backward()
    assert x.grad.dtype == torch.bfloat16 and x.grad.abs().sum() > 0


@needs_tiles
def test_rounded_results_repeat_whatever_the_threads_and_between_other_products_of_tiles():
    inputs, mask = cell_inputs(3, 70, 40, 8)
    a, threads, results, others = torch.randn(64, 96).bfloat16(), torch.get_num_threads(), [], []
    try:
        for n in (1, 2, 3, 1):
            torch.set_num_threads(n)
            results.append(ends(lambda *b: fused.discrete_cell(*b, DARTS_V2, mask), inputs, torch.float32, torch.autocast("cpu", torch.bfloat16)))
            others.append(a @ a.t())  # oneDNN's, which has shapes of tiles of its own
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(other, results[0]))
    assert all(torch.allclose(other.double(), a.double() @ a.double().t(), rtol=1e-2, atol=1e-1) for other in others)


@needs_tiles
@pytest.mark.parametrize("allowed", ["bfloat16", "highest", "high"])
@pytest.mark.parametrize("B", [1, 70])
def test_tiles_of_shared_units(B, allowed, monkeypatch):
    """Every number is what it is where threads share the rows."""
    inputs, mask = cell_inputs(3, B, 140, 8)
    if allowed != "bfloat16":
        torch.set_float32_matmul_precision(allowed)
    results, threads = [], torch.get_num_threads()
    try:
        for shared, n in ((False, 1), (True, 2), (True, 3)):
            torch.set_num_threads(n)
            monkeypatch.setattr(compiled, "by_units", lambda *_: shared)
            with torch.autocast("cpu", torch.bfloat16, enabled=allowed == "bfloat16"):
                results.append(ends(lambda *b: fused.discrete_cell(*b, DARTS_V2, mask), inputs, torch.float32, torch.enable_grad()))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(other, results[0]))


@needs_tiles
def test_a_graph_of_rounded_products_twice_and_its_second_derivative():
    inputs, _ = cell_inputs(2, 5, 32, 8)
    leaves = [t.requires_grad_() for t in inputs]
    with torch.autocast("cpu", torch.bfloat16):
        out = fused.discrete_cell(*leaves, DARTS_V2)
    first, second = (torch.autograd.grad(out.sum(), leaves, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    (grad,) = torch.autograd.grad(out.sum(), leaves[:1], create_graph=True)  # the readable form's, with all digits
    assert torch.autograd.grad(grad.pow(2).sum(), leaves[1])[0].abs().sum() > 0


FEWER, ALL = ("high", 2, 2e-5), ("highest", 3, 1e-6)  # what torch allows, the numbers an operand is taken as, and how far off that may be
DIGITS = pytest.mark.parametrize("allowed, parts, off", [FEWER, ALL], ids=["two numbers", "three numbers"])


def near(ours, readable, inputs, off):
    """Results and gradients by `ours` in float32 against those by the readable form in float64."""
    results = [ends(ours, inputs, torch.float32, torch.enable_grad()), ends(readable, inputs, torch.float64, torch.enable_grad())]
    for a, b in zip(*results):
        assert a.dtype == torch.float32 and (a - b).norm() < off * b.norm()


@needs_tiles
@DIGITS
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("T, B, H", [(1, 33, 64), (3, 70, 44), (2, 300, 96)])
def test_cells_of_sums(T, B, H, masked, allowed, parts, off):
    torch.set_float32_matmul_precision(allowed)
    assert compiled.parts(torch.float32, False, H, B // torch.get_num_threads()) == parts
    for N in (1, 3):
        inputs, mask = cell_inputs(T, B, H, N)
        inputs.append(torch.randn(N * (N + 1) // 2, 5, generator=torch.Generator().manual_seed(1)).softmax(1))
        smooth = Genotype((("tanh", 0), ("identity", 0), ("sigmoid", 1))[:N])  # a kink of relu's has no nearest gradient
        inputs[-1][:, 2] = 0

        def discrete(function, *a):
            return function(*a, smooth, mask.to(a[0].dtype) if masked else None)

        def mixed(function, *a):
            return function(*a, mask.to(a[0].dtype) if masked else None)

        near(lambda *a: discrete(fused.discrete_cell, *a), lambda *a: discrete(cell.discrete_cell, *a), inputs[:-1], off)
        near(lambda *a: mixed(fused.mixed_cell, *a), lambda *a: mixed(supernet.mixed_cell, *a), inputs, 5 * off)  # statistics of the batch magnify


@needs_tiles
@DIGITS
@pytest.mark.parametrize("R, H, V", [(128, 32, 44), (150, 44, 77), (600, 66, 530), (601, 96, 1000)])  # one block of words, and several
def test_a_loss_of_sums(R, H, V, allowed, parts, off):
    torch.set_float32_matmul_precision(allowed)
    g = torch.Generator().manual_seed(3)
    inputs = [torch.randn(shape, generator=g) for shape in ((R, H), (V, H), (V,))]
    y = torch.randint(V, (R,), generator=g)
    near(lambda *a: linear_cross_entropy(*a, y), lambda x, w, b: F.cross_entropy(F.linear(x, w, b), y), [inputs[0], inputs[1] / H**0.5, inputs[2]], off)


@needs_tiles
@pytest.mark.parametrize("T, B, H", [(1, 33, 64), (3, 70, 44)])
def test_three_numbers_are_no_worse_than_whole_ones(T, B, H, monkeypatch):
    inputs, _ = cell_inputs(T, B, H, 8)
    inputs.append(torch.randn(36, 5, generator=torch.Generator().manual_seed(1)).softmax(1))
    exact = ends(supernet.mixed_cell, inputs, torch.float64, torch.enable_grad())

    def worst():
        return max(float((a - b).norm() / b.norm()) for a, b in zip(ends(fused.mixed_cell, inputs, torch.float32, torch.enable_grad()), exact))

    of_three = worst()
    monkeypatch.setattr(extension.State.loaded, "rounds", False)
    assert 0 < of_three < 2 * worst()


@needs_extension
def test_what_operands_are_taken_as(monkeypatch):
    monkeypatch.setattr(extension.State.loaded, "rounds", True)
    assert compiled.parts(torch.float64, False, 300, 128) == compiled.parts(torch.float64, True, 300, 128) == 0
    assert [compiled.parts(torch.float32, True, H, 1) for H in (15, 16)] == [0, 1]
    assert [compiled.parts(torch.float32, False, H, 16) for H in (21, 22, 33, 42, 43, 64, 65, 300)] == [0, 3, 0, 0, 3, 3, 3, 3]  # tiles at least two thirds full
    assert [compiled.parts(torch.float32, False, 64, rows) for rows in (1, 15, 16)] == [0, 0, 3]
    for allowed, expected in (("high", 2), ("medium", 2), ("highest", 3)):
        torch.set_float32_matmul_precision(allowed)
        assert compiled.parts(torch.float32, False, 64, 16) == expected
        with bilevel.all_digits():  # for a difference of gradients
            assert compiled.parts(torch.float32, False, 64, 16) == 3
    monkeypatch.setattr(extension.State.loaded, "rounds", False)
    assert compiled.parts(torch.float32, False, 64, 16) == compiled.parts(torch.float32, True, 64, 16) == 0


def test_commands_allow_fewer_digits_outside_differences():
    prepare_torch(argparse.Namespace(threads=None, device="cpu"))
    for matmul in (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul):
        assert matmul.fp32_precision == "tf32"
        with bilevel.all_digits():
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
