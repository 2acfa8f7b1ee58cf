"""The fast cells, in C++ and in torch operations, and the blockwise loss equal their readable forms."""

import contextlib
import ctypes
import os
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
import torch.nn.functional as F

from nni_darts_rnn import cell, compiled, cross_entropy, eager, extension, fused, supernet
from nni_darts_rnn.corpus import EOS, UNK, Corpus, Vocabulary
from nni_darts_rnn.genotype import DARTS_V1, DARTS_V2, ENAS, PRIMITIVES, Genotype
from nni_darts_rnn.graph import discrete_graph
from nni_darts_rnn.model import LanguageModel
from nni_darts_rnn.pipeline import take_fast_path
from nni_darts_rnn.recipes import get_recipe
from nni_darts_rnn.supernet import MixedRNN

needs_extension = pytest.mark.skipif(not fused.available(), reason=f"no extension here: {fused.why_not()}")
OPS = ("tanh", "relu", "sigmoid", "identity")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}
"""Largest difference, relative to the largest number of the tensor. In float32 both forms are this far from float64."""


@pytest.fixture(autouse=True)
def switch(monkeypatch):
    """Each test starts with the extension turned on, and leaves nothing behind."""
    monkeypatch.delenv(fused.SWITCH, raising=False)
    monkeypatch.setattr(extension.State, "on", True)


@pytest.fixture(params=[pytest.param("compiled", marks=needs_extension), "eager"])
def engine(request, monkeypatch):
    """Both fast forms of the CPU; of a discrete cell there is one, and without it the readable form runs."""
    monkeypatch.setattr(extension.State, "on", request.param == "compiled")
    return {"compiled": compiled, "eager": eager}[request.param]


each_engine = pytest.mark.usefixtures("engine")


def tensors(T, B, H, N, dtype=torch.float64, seed=0):
    """x_proj, h0, W0_h, Ws, probabilities, mask."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"x_proj": (T, B, 2 * H), "h0": (B, H), "W0_h": (H, 2 * H), "Ws": (N, H, 2 * H), "alpha": (N * (N + 1) // 2, 5)}
    x, h, W0, Ws, alpha = (0.5 * torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes.values())
    mask = torch.bernoulli(torch.full((B, H), 0.75, dtype=torch.float64), generator=g) / 0.75
    return [t.to(dtype) for t in (x, h, W0 / H**0.5, Ws / H**0.5, alpha.softmax(-1), mask)]


def run(function, inputs, needs, mask):
    """The outputs and the gradients of a fixed linear function of them."""
    leaves = [t.clone().requires_grad_(need) for t, need in zip(inputs, needs)]
    out = function(*leaves, mask)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, [t for t in leaves if t.requires_grad], weights)]


def assert_close(got, expected, tolerance):
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-3)


def both_mixed(inputs, needs, mask, primitives=PRIMITIVES, normalise=True):
    return [run(lambda *a: f(*a, primitives=primitives, normalise=normalise), inputs, needs, mask) for f in (fused.mixed_cell, supernet.mixed_cell)]


def both_drawn(inputs, needs, mask, primitives=PRIMITIVES, seed=0):
    """`inputs` with probabilities of a cell drawn from theirs."""
    p, g = inputs[4].clone(), torch.Generator().manual_seed(seed)
    p[:, [k for k, name in enumerate(primitives) if name == "none"]] = 0
    blocks = p.split(list(range(1, len(inputs[3]) + 1)))  # (i, K) each
    draws = [F.one_hot(torch.multinomial(block.flatten(), 1, generator=g)[0], block.numel()).view_as(block) for block in blocks]
    inputs = [*inputs[:4], torch.cat(draws).to(p.dtype)]
    return [run(lambda *a: f(*a, primitives=primitives, **more), inputs, needs, mask)
            for f, more in ((fused.drawn_cell, {}), (supernet.mixed_cell, {"normalise": False}))]


def both_discrete(inputs, genotype, needs, mask):
    return [run(lambda *a: f(*a[:4], genotype, a[4]), inputs, needs, mask) for f in (fused.discrete_cell, cell.discrete_cell)]


@each_engine
@pytest.mark.parametrize("n_nodes", range(1, 13))
@pytest.mark.parametrize("masked", [False, True])
def test_mixed_cell_equals_the_readable_one(n_nodes, masked):
    for B in (3, 33):
        *inputs, mask = tensors(3, B, 19, n_nodes, seed=n_nodes)
        for normalise in (True, False):
            assert_close(*both_mixed(inputs, [True] * 5, mask if masked else None, normalise=normalise), TOLERANCE[torch.float64])


@needs_extension
@pytest.mark.parametrize("n_nodes", range(1, 13))
@pytest.mark.parametrize("masked", [False, True])
def test_discrete_cell_equals_the_readable_one(n_nodes, masked):
    genotype = Genotype(tuple((OPS[(7 * i + n_nodes) % 4], (5 * i + n_nodes) % i) for i in range(1, n_nodes + 1)))
    for B in (1, 2, 33):
        *inputs, _, mask = tensors(3, B, 19, n_nodes, seed=n_nodes)
        assert_close(*both_discrete(inputs, genotype, [True] * 4, mask if masked else None), TOLERANCE[torch.float64])


@each_engine
@pytest.mark.parametrize("n_nodes", range(1, 13))
@pytest.mark.parametrize("masked", [False, True])
def test_drawn_cell_equals_the_mixed_one_at_its_corner(n_nodes, masked):
    for B in (1, 2, 33):
        *inputs, mask = tensors(3, B, 19, n_nodes, seed=n_nodes)
        assert_close(*both_drawn(inputs, [True] * 5, mask if masked else None, seed=B), TOLERANCE[torch.float64])


@needs_extension
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("T, B, H", [(2, 601, 64), (1, 160, 400)])
def test_a_batch_of_several_blocks_of_rows(T, B, H, masked):
    """A thread has 300 of the rows and a block 126 at most, or 80 and 78 where a matrix outgrows the second cache (csrc/sequence.h)."""
    *inputs, mask = tensors(T, B, H, 3)
    mask = mask if masked else None
    assert_close(*both_mixed(inputs, [True] * 5, mask), TOLERANCE[torch.float64])
    assert_close(*both_discrete(inputs[:4], Genotype((("relu", 0), ("sigmoid", 0), ("tanh", 1))), [True] * 4, mask), TOLERANCE[torch.float64])
    assert_close(*both_drawn(inputs, [True] * 5, mask), TOLERANCE[torch.float64])


@needs_extension
def test_a_drawn_cell_is_run_alone(monkeypatch):
    """With and without a gradient of the probabilities."""
    *inputs, p, mask = tensors(3, 4, 8, 2)
    p = torch.tensor([[0.0, 1, 0, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]], dtype=torch.float64)
    graphs, real = [], compiled.run_forward
    monkeypatch.setattr(compiled, "run_forward", lambda graph, *args, **kwargs: graphs.append(graph) or real(graph, *args, **kwargs))
    for needed in (True, False):
        assert_close([fused.drawn_cell(*inputs, p.clone().requires_grad_(needed), mask).detach()],
                     [cell.discrete_cell(*inputs, Genotype((("tanh", 0), ("sigmoid", 0))), mask)], 1e-10)
    assert [graph.n_edges for graph in graphs] == [2, 2]
    fused.enable(False)
    monkeypatch.setattr(supernet, "mixed_cell", None)  # nor without the extension
    assert torch.equal(fused.drawn_cell(*inputs, p, mask), cell.discrete_cell(*inputs, Genotype((("tanh", 0), ("sigmoid", 0))), mask))


def test_the_readable_forms_are_not_what_runs(engine, monkeypatch):
    *inputs, mask = tensors(3, 4, 8, 2)
    one_hot = torch.tensor([[0.0, 1, 0, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]], dtype=torch.float64)
    monkeypatch.setattr(supernet, "mixed_cell", None)
    passes = []
    for name in ("run_forward", "run_backward"):
        monkeypatch.setattr(engine, name, lambda *a, real=getattr(engine, name), name=name, **k: passes.append(name) or real(*a, **k))
    run(fused.mixed_cell, inputs, [True] * 5, mask)
    run(fused.drawn_cell, [*inputs[:4], one_hot], [True] * 5, mask)
    assert passes == ["run_forward", "run_backward"] * 2
    if engine is compiled:
        monkeypatch.setattr(cell, "discrete_cell", None)
        run(lambda *a: fused.discrete_cell(*a[:4], Genotype((("tanh", 0), ("sigmoid", 0))), a[4]), inputs[:4], [True] * 4, mask)
        fused.drawn_cell(*inputs[:4], one_hot, mask)
        assert passes == ["run_forward", "run_backward"] * 3 + ["run_forward"]


@needs_extension
@pytest.mark.parametrize("by_units", [False, True])
@pytest.mark.parametrize("refused", [False, True])
@pytest.mark.parametrize("threads", [2, 3, 5])
def test_threads_share_a_batch(threads, refused, by_units, monkeypatch):
    """Parts of different sizes, of the rows, whose statistics are put together, or of the units; and where OpenMP gives fewer threads than were asked for.
    T·B = 305 rows are more than a weight gradient takes at a time."""
    monkeypatch.setattr(compiled, "by_units", lambda *_: by_units)
    before, (*inputs, mask) = torch.get_num_threads(), tensors(5, 61, 70, 4)
    genotype = Genotype((("tanh", 0), ("relu", 0), ("sigmoid", 1), ("identity", 3)))
    gomp = ctypes.CDLL(None)  # the OpenMP library that torch has loaded
    levels = gomp.omp_get_max_active_levels()
    try:
        torch.set_num_threads(threads)
        if refused:
            gomp.omp_set_max_active_levels(0)  # a region then has one thread, whatever it asks for
        for masked in (None, mask):
            assert_close(*both_mixed(inputs, [True] * 5, masked), TOLERANCE[torch.float64])
            assert_close(*both_drawn(inputs, [True] * 5, masked), TOLERANCE[torch.float64])
            assert_close(*both_discrete(inputs[:4], genotype, [True] * 4, masked), TOLERANCE[torch.float64])
    finally:
        gomp.omp_set_max_active_levels(levels)
        torch.set_num_threads(before)


@needs_extension
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("B", [1, 2, 11])
def test_threads_share_the_units_of_few_rows(B, masked, monkeypatch):
    """Four matrices of 200 x 400 numbers outgrow a second cache; every number is what it is where threads share the rows."""
    before, (*inputs, mask) = torch.get_num_threads(), tensors(3, B, 200, 3)
    genotype, mask, chosen, rule = Genotype((("relu", 0), ("sigmoid", 0), ("tanh", 1))), mask if masked else None, [], compiled.by_units
    monkeypatch.setattr(compiled, "by_units", lambda *given: chosen.append(rule(*given)) or chosen[-1])
    try:
        torch.set_num_threads(2)
        assert_close(*both_drawn(inputs, [True] * 5, mask), TOLERANCE[torch.float64])
        units, readable = both_discrete(inputs[:4], genotype, [True] * 4, mask)
        assert_close(units, readable, TOLERANCE[torch.float64])
        assert chosen == [True, True]
        monkeypatch.setattr(compiled, "by_units", lambda *_: False)
        assert all(map(torch.equal, units, both_discrete(inputs[:4], genotype, [True] * 4, mask)[0]))
        with torch.no_grad():  # buffers of one time step
            assert torch.equal(fused.discrete_cell(*inputs[:4], genotype, mask), units[0])
    finally:
        torch.set_num_threads(before)


@needs_extension
def test_what_threads_share(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert compiled.by_units(1, 2**22) and compiled.by_units(11, 2**22)
    assert not compiled.by_units(12, 2**22) and not compiled.by_units(1, 2**20)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert not compiled.by_units(1, 2**22)
    monkeypatch.undo()
    extension.State.on, threads, graph = True, torch.get_num_threads(), discrete_graph(Genotype((("tanh", 0), ("relu", 1))))
    try:
        torch.set_num_threads(2)
        for dtype, least in ((torch.float32, 296), (torch.float64, 210)):  # three matrices of H x 2H numbers outgrow 2 MiB
            runs = [compiled.run_forward(graph, *tensors(1, 3, H, 2, dtype)[:4], None, None, keep=False) for H in (least - 1, least)]
            assert [run.by_units for run in runs] == [False, True]
    finally:
        torch.set_num_threads(threads)


@needs_extension
@pytest.mark.parametrize("genotype", [DARTS_V1, DARTS_V2, ENAS], ids=["DARTS_V1", "DARTS_V2", "ENAS"])
def test_published_cells(genotype):
    *inputs, _, mask = tensors(4, 5, 16, genotype.n_nodes)
    assert_close(*both_discrete(inputs, genotype, [True] * 4, mask), TOLERANCE[torch.float64])


@each_engine
@pytest.mark.parametrize("primitives", [("tanh",), ("none", "identity"), ("relu", "none", "sigmoid"), ("identity", "tanh", "relu", "sigmoid")])
def test_any_choice_and_order_of_primitives(primitives):
    *inputs, p, mask = tensors(3, 4, 8, 3)
    inputs.append(p[:, :len(primitives)].contiguous())
    assert_close(*both_mixed(inputs, [True] * 5, mask, primitives), TOLERANCE[torch.float64])
    assert_close(*both_drawn(inputs, [True] * 5, mask, primitives), TOLERANCE[torch.float64])


@each_engine
@pytest.mark.parametrize("needs", [(0, 0, 1, 1, 0), (0, 0, 0, 0, 1), (1, 0, 0, 0, 0), (0, 1, 0, 0, 0), (0, 0, 0, 1, 1), (1, 1, 1, 1, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_every_choice_of_gradients(needs, masked):
    *inputs, mask = tensors(3, 6, 8, 3)
    mask = mask if masked else None
    assert_close(*both_mixed(inputs, [bool(n) for n in needs], mask), 1e-10)
    assert_close(*both_drawn(inputs, [bool(n) for n in needs], mask), 1e-10)
    if any(needs[:4]):
        assert_close(*both_discrete(inputs[:4], Genotype((("relu", 0), ("tanh", 1), ("sigmoid", 0))), [bool(n) for n in needs[:4]], mask), 1e-10)


@each_engine
def test_float32():
    for N in (1, 8):
        *inputs, mask = tensors(5, 24, 40, N, torch.float32)
        assert_close(*both_mixed(inputs, [True] * 5, mask), TOLERANCE[torch.float32])
        assert_close(*both_drawn(inputs, [True] * 5, mask), TOLERANCE[torch.float32])
        genotype = Genotype(tuple((OPS[i % 4], i // 2) for i in range(N)))
        assert_close(*both_discrete(inputs[:4], genotype, [True] * 4, mask), TOLERANCE[torch.float32])


@needs_extension
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("H", [1, 7, 8, 9, 15, 16, 17, 23, 24, 25, 31, 32, 33, 40, 48, 52])
def test_rows_that_end_anywhere_in_a_register(H, dtype):
    """A register has 4 to 16 numbers, a panel of a packed matrix two of them."""
    *inputs, mask = tensors(3, 13, H, 3, dtype)
    assert_close(*both_mixed(inputs, [True] * 5, mask), TOLERANCE[dtype])
    assert_close(*both_drawn(inputs, [True] * 5, mask), TOLERANCE[dtype])
    for op in OPS:
        assert_close(*both_discrete(inputs[:4], Genotype(((op, 0), ("tanh", 1), (op, 1))), [True] * 4, mask), TOLERANCE[dtype])


@each_engine
@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-4])
def test_float32_keeps_its_digits_however_small_the_numbers(size):
    """An untrained cell's pre-activations are near 0, where tanh(z) taken from exp(z) has lost most of them; normalisation then shows what is left."""
    genotype = Genotype((("tanh", 0), ("sigmoid", 0), ("identity", 1), ("tanh", 2)))
    for both, inputs in ((lambda i: both_mixed(i, [True] * 5, None), slice(5)), (lambda i: both_discrete(i, genotype, [True] * 4, None), slice(4))):
        far = []  # of each seed; a single one's largest error differs by a factor of 5 with the number of threads
        for seed in range(6):
            *exact, _ = tensors(5, 24, 40, 4, seed=seed)
            exact[0], exact[1] = exact[0] * size, exact[1] * size
            rounded = [t.float() for t in exact]
            truth = both([t.double() for t in rounded][inputs])[1]
            far.append([max(float((a - t).abs().max() / t.abs().max()) for a, t in zip(found, truth)) for found in both(rounded[inputs])])
        fast, readable = (sum(errors) / len(far) for errors in zip(*far))
        assert fast < 4 * readable + 2e-6, far


@each_engine
def test_extreme_and_undefined_numbers():
    x, h, W0, Ws, p, _ = tensors(2, 4, 8, 2, torch.float32)
    for value in (30.0, 100.0, 1e4):
        big = x * value
        assert_close([fused.mixed_cell(big, h, W0, Ws, p)], [supernet.mixed_cell(big, h, W0, Ws, p)], 1e-4)
    x[0, 0, 0], x[1, 0, 1], x[1, 1, -1] = float("inf"), -float("inf"), float("inf")  # two gates, and what goes through tanh
    genotype = Genotype((("tanh", 0), ("sigmoid", 1)))
    assert_close([fused.discrete_cell(x, h, W0, Ws, genotype)], [cell.discrete_cell(x, h, W0, Ws, genotype)], TOLERANCE[torch.float32])
    x[0, 0, 0] = float("nan")
    assert fused.mixed_cell(x, h, W0, Ws, p).isnan().any()
    assert fused.discrete_cell(x, h, W0, Ws, Genotype((("relu", 0), ("relu", 1)))).isnan().any()


@each_engine
def test_without_gradients_the_same_outputs():
    *inputs, p, mask = tensors(4, 5, 8, 3)
    genotype = Genotype((("relu", 0), ("tanh", 0), ("identity", 2)))
    with torch.no_grad():
        assert_close([fused.mixed_cell(*inputs, p, mask)], [supernet.mixed_cell(*inputs, p, mask)], 1e-10)
        assert_close([fused.discrete_cell(*inputs, genotype, mask)], [cell.discrete_cell(*inputs, genotype, mask)], 1e-10)


@each_engine
def test_repeated_runs_are_bit_identical():
    *inputs, mask = tensors(4, 64, 48, 4, torch.float32)
    for both in ((run(fused.mixed_cell, inputs, [True] * 5, mask) for _ in range(2)), (both_drawn(inputs, [True] * 5, mask)[0] for _ in range(2))):
        first, second = both
        assert all(torch.equal(a, b) for a, b in zip(first, second))


@each_engine
def test_inputs_are_only_read_and_strides_do_not_matter():
    *inputs, p, mask = tensors(3, 4, 8, 2)
    before = [t.clone() for t in inputs]
    strided = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in (*inputs, p)]
    assert_close(*both_mixed(strided, [True] * 5, mask), 1e-10)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before))


@each_engine
def test_the_same_graph_twice():
    x, h, W0, Ws, p, mask = tensors(3, 4, 8, 2)
    p.requires_grad_()
    out = fused.mixed_cell(x, h, W0, Ws, p, mask).sum(-1).pow(2).sum()
    (first,), (second,) = (torch.autograd.grad(out, [p], retain_graph=True) for _ in range(2))
    assert torch.equal(first, second)


@each_engine
def test_two_sequences_alive_at_once():
    """The second sequence's buffers are not the first one's."""
    *inputs, p, mask = tensors(3, 4, 8, 2)

    def two(mixed):
        q = p.clone().requires_grad_()
        a = mixed(*inputs, q, mask)
        b = mixed(inputs[0], a[-1], *inputs[2:], q, None)
        return torch.autograd.grad((a * b).sum(), [q])

    assert_close(two(fused.mixed_cell), two(supernet.mixed_cell), 1e-10)


@each_engine
def test_second_derivatives_go_through_the_readable_form():
    *inputs, p, mask = tensors(2, 4, 6, 2)

    def mixed_derivative(mixed, W0):
        W0, q = W0.clone().requires_grad_(), p.clone().requires_grad_()
        loss = mixed(inputs[0] * W0.sum(), inputs[1], W0, inputs[3], q, mask).pow(2).sum()
        (g,) = torch.autograd.grad(loss, [W0], create_graph=True)
        return [g.detach(), *torch.autograd.grad(g.pow(2).sum(), [q, W0])]

    expected = mixed_derivative(supernet.mixed_cell, inputs[2])
    assert_close(mixed_derivative(fused.mixed_cell, inputs[2]), expected, 1e-10)
    with fused.reference():
        assert_close(mixed_derivative(fused.mixed_cell, inputs[2]), expected, 1e-10)


def test_the_readable_form_runs_inside_only():
    *inputs, p, mask = tensors(2, 4, 6, 2)

    def form():
        return fused.mixed_cell(*inputs, p.clone().requires_grad_(), mask).grad_fn.name()

    outside = form()
    with fused.reference():
        with fused.reference():
            assert form() != outside
        assert form() != outside
    assert form() == outside == "_CellFunctionBackward"


def test_what_the_extension_does_not_cover_runs_all_the_same(monkeypatch):
    *inputs, p, mask = tensors(2, 3, 4, 2, torch.bfloat16)
    assert torch.equal(fused.mixed_cell(*inputs, p, mask), supernet.mixed_cell(*inputs, p, mask))
    *inputs, p, mask = tensors(2, 3, 4, 2)
    monkeypatch.setitem(cell.ACTIVATIONS, "relu", torch.nn.functional.silu)  # registered anew under a known name
    assert torch.equal(fused.mixed_cell(*inputs, p, mask), supernet.mixed_cell(*inputs, p, mask))
    broadcast = mask[:1]
    assert torch.equal(fused.mixed_cell(*inputs, p, broadcast), supernet.mixed_cell(*inputs, p, broadcast))
    with pytest.raises(RuntimeError):
        fused.mixed_cell(inputs[0], inputs[1][:, :3], *inputs[2:], p)


def test_nothing_is_fast_before_it_was_asked_for(monkeypatch):
    monkeypatch.setattr(extension.State, "on", None)
    monkeypatch.setattr(extension.State, "gains", False)
    assert not fused.enabled()
    assert not fused.prepare(1.0)  # a second of work is not worth a build, compiled already or not
    assert fused.prepare(3600.0) == fused.available()
    assert not fused.prepare(1.0)  # nor does it take another path because a long run came before
    for said in (True, False):
        assert fused.enable(said) == fused.prepare(1.0) == fused.prepare(3600.0) == (said and fused.available())
    monkeypatch.setattr(extension.State, "on", True)
    monkeypatch.setenv(fused.SWITCH, "0")
    assert not fused.enabled() and "0" in fused.why_not()


@pytest.mark.parametrize("phase, words, gains", [("search", 60_000, True), ("search", 2_000, False), ("retrain", 400_000, True), ("retrain", 2_000, False)])
def test_a_run_of_small_cells_is_compiled_where_the_text_is_long(phase, words, gains, monkeypatch):
    """Most of what such a run takes without the extension are torch's calls, however few the units."""
    monkeypatch.setattr(extension.State, "on", None)
    monkeypatch.setattr(extension.State, "gains", None)
    recipe = getattr(get_recipe("tiny", {phase: {"epochs": 10}}), phase)
    text = torch.zeros(words, dtype=torch.long)
    take_fast_path(Corpus("zeros", Vocabulary((EOS, UNK, "a")), text, text, text), recipe, "cpu", n_nodes=8)
    assert extension.State.gains is gains


def test_a_gpu_without_triton_is_told_of_it(monkeypatch):
    monkeypatch.delenv(fused.SWITCH, raising=False)
    monkeypatch.setattr(extension, "_has_triton", lambda: True)
    assert fused.why_not("cuda") is None
    monkeypatch.setattr(extension, "_has_triton", lambda: False)
    assert "install" in fused.why_not(torch.device("cuda")) and "Triton" in fused.why_not("cuda")
    assert "Triton" not in (fused.why_not("cpu") or "")


# --- the loss ----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("needs", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("R, H, V", [(150, 7, 31), (600, 19, 301), (601, 19, 530)])
def test_linear_cross_entropy(R, H, V, compiled, needs, with_bias, monkeypatch):
    """The larger sizes are shared by threads, in more than one block of rows, and have more words than are added up at a time; the last in unequal shares."""
    monkeypatch.setattr(extension.State, "on", compiled)
    monkeypatch.setitem(cross_entropy._CHUNK, "cpu", 1)  # blocks of 64 rows
    g = torch.Generator().manual_seed(3)
    for dtype in (torch.float64, torch.float32):
        x, w, b = (torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in ((R, H), (V, H), (V,)))
        y = torch.randint(V, (R,), generator=g)
        results = []
        for function in (cross_entropy.linear_cross_entropy, lambda x, w, b, y: F.cross_entropy(F.linear(x, w, b), y)):
            leaves = [t.clone().requires_grad_(bool(n)) for t, n in zip((x, w, b), needs)]
            if not with_bias:
                leaves[2] = None
            loss = function(*leaves, y)
            wanted = [t for t in leaves if t is not None and t.requires_grad]
            results.append([loss.detach(), *(torch.autograd.grad(3 * loss, wanted) if wanted else ())])
        assert_close(*results, 1e-10 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("R, threads", [(130, 16), (2176, 16), (265, 12)])
def test_the_loss_of_so_few_rows_that_a_thread_has_none(R, threads, monkeypatch):
    """The last one's share, of rows that are rounded up for the others; of a weight that is larger than a second cache."""
    monkeypatch.setattr(extension.State, "on", True)
    g = torch.Generator().manual_seed(3)
    x, w, y = torch.randn(R, 300, generator=g), torch.randn(1100, 300, generator=g) / 17, torch.randint(1100, (R,), generator=g)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        leaves = x.requires_grad_(), w.requires_grad_()
        losses = [cross_entropy.linear_cross_entropy(*leaves, None, y), F.cross_entropy(F.linear(*leaves), y)]
        found = [[loss.detach(), *torch.autograd.grad(loss, leaves)] for loss in losses]
    finally:
        torch.set_num_threads(before)
    assert_close(*found, 1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_loss_of_logits_that_rise_from_word_to_word(dtype):
    """A few words are taken at a time (csrc/cross_entropy.cpp): by steps of 12 and of 60, from words that are ruled out, and by more than an exponential has room for."""
    g = torch.Generator().manual_seed(3)
    R, H, V = 150, 7, 1600
    x, w = torch.randn(R, H, generator=g, dtype=torch.float64), torch.randn(V, H, generator=g, dtype=torch.float64)
    y = torch.randint(1000, V, (R,), generator=g)
    steps = torch.arange(V, dtype=torch.float64).div(256, rounding_mode="floor")
    ruled_out, far = torch.where(steps < 2, -torch.inf, steps), torch.where(steps < 3, -1e30, steps)
    for b in (12 * steps, 60 * steps, -60 * steps, ruled_out, far):
        given, readable = ([t.to(kind).requires_grad_() for t in (x, w, b)] for kind in (dtype, torch.float64))
        loss, expected = cross_entropy.linear_cross_entropy(*given, y), F.cross_entropy(F.linear(*readable), y)
        pairs = [(loss, expected), *zip(torch.autograd.grad(loss, given), torch.autograd.grad(expected, readable))]
        for got, want in pairs:
            assert got.dtype == dtype and (got.double() - want).abs().max() <= TOLERANCE[dtype] * want.abs().max().clamp(min=1e-3)


def test_linear_cross_entropy_differentiates_twice_and_refuses_bad_targets():
    g = torch.Generator().manual_seed(3)
    x, w, b = (torch.randn(shape, generator=g, dtype=torch.float64, requires_grad=True) for shape in ((9, 4), (5, 4), (5,)))
    y = torch.randint(5, (9,), generator=g)
    assert torch.autograd.gradgradcheck(lambda *a: cross_entropy.linear_cross_entropy(*a, y), (x, w, b))
    with pytest.raises((IndexError, RuntimeError)):
        cross_entropy.linear_cross_entropy(x, w, b, y + 5)
    x, y = torch.randn(150, 4, generator=g, dtype=torch.float64), torch.randint(5, (150,), generator=g)  # as many rows as are computed in C++
    for bad in (5, -1):
        y[77] = bad
        with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):
            cross_entropy.linear_cross_entropy(x, w, b, y)


def test_the_loss_of_float16_under_a_gradient_scalers_factor():
    g = torch.Generator().manual_seed(3)
    x, w = torch.randn(200, 16, generator=g).half().requires_grad_(), (torch.randn(50, 16, generator=g) / 10).half().requires_grad_()
    y = torch.randint(50, (200,), generator=g)
    found = torch.autograd.grad(65536 * cross_entropy.linear_cross_entropy(x, w, None, y), (x, w))
    wide = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    assert_close([t.double() for t in found], torch.autograd.grad(65536 * F.cross_entropy(F.linear(*wide), y), wide), 5e-3)


@pytest.mark.parametrize("factor", [1.0, 3.0])
@pytest.mark.parametrize("rows", [9, 200])
@pytest.mark.parametrize("rounded", [False, True])
def test_linear_cross_entropys_graph_twice(rows, factor, rounded):
    """Its gradients belong to whoever asked for them; the second time they are made again."""
    g = torch.Generator().manual_seed(3)
    x, w, b = (torch.randn(shape, generator=g, requires_grad=True) for shape in ((rows, 20), (18, 20), (18,)))
    y = torch.randint(18, (rows,), generator=g)
    with torch.autocast("cpu", torch.bfloat16, enabled=rounded):
        loss = factor * cross_entropy.linear_cross_entropy(x, w, b, y)
    loss.backward(retain_graph=True)
    first = [t.grad.clone() for t in (x, w, b)]
    loss.backward()  # onto what is there
    assert all(torch.equal(t.grad, 2 * f) for t, f in zip((x, w, b), first))
    assert_close(first, torch.autograd.grad(factor * F.cross_entropy(F.linear(x, w, b), y), (x, w, b)), 2e-2 if rounded else 1e-5)


def test_linear_cross_entropy_under_autocast():
    g = torch.Generator().manual_seed(3)
    x, w, b = (torch.randn(shape, generator=g, requires_grad=True) for shape in ((20, 16), (11, 16), (11,)))
    y = torch.randint(11, (20,), generator=g)
    results = []
    for function in (cross_entropy.linear_cross_entropy, lambda x, w, b, y: F.cross_entropy(F.linear(x, w, b), y)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = function(x, w, b, y)
        results.append([loss.detach(), *torch.autograd.grad(loss, [x, w, b])])
    assert_close(*results, 2e-2)


# --- the whole model ---------------------------------------------------------------------------------------------------------------------------


def test_a_language_model_learns_the_same(engine):
    """Changes of the weights after a step, compared as changes, so that a missed update cannot hide in a tolerance."""
    steps = []
    for readable in (True, False):
        torch.manual_seed(0)
        model = LanguageModel(50, MixedRNN(12, 12, 3, dropout_x=0.5, dropout_h=0.25), dropout=0.5, dropout_i=0.2).double()
        before = [p.detach().clone() for p in model.parameters()]
        x, y = torch.randint(50, (2, 6, 4))
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        with fused.reference() if readable else contextlib.nullcontext():
            nll, raw, _, _ = model.loss(x, y, model.init_hidden(4))
        (nll + 1e-2 * (raw[1:] - raw[:-1]).pow(2).mean()).backward()
        optimizer.step()
        steps.append([p.detach() - q for p, q in zip(model.parameters(), before)])
    for a, b in zip(*steps):
        assert b.abs().max() > 0
        assert (a - b).abs().max() <= 1e-9 * b.abs().max()


# --- building ----------------------------------------------------------------------------------------------------------------------------------

PROGRAM = textwrap.dedent("""
    import torch
    from nni_darts_rnn import fused, supernet
    torch.manual_seed(0)
    x, h, W0, Ws = torch.randn(2, 3, 8).double(), torch.zeros(3, 4).double(), torch.randn(4, 8).double(), torch.randn(2, 4, 8).double()
    p = torch.rand(3, 5).double().softmax(-1)
    print(fused.enable(), fused.why_not())
    assert torch.allclose(fused.mixed_cell(x, h, W0, Ws, p), supernet.mixed_cell(x, h, W0, Ws, p), rtol=0, atol=1e-10)
""")


def process(**environment):
    return subprocess.Popen([sys.executable, "-c", PROGRAM], env=os.environ | environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ends(started):
    out, err = started.communicate(timeout=300)
    assert started.returncode == 0, err
    return out, err


def quick_compiler(tmp_path, then='exec g++ "$@"\n') -> str:
    """g++ without optimising, in a third of the time."""
    script = tmp_path / "quick"
    script.write_text('#!/bin/sh\nfor option; do shift; [ "$option" = -O3 ] || set -- "$@" "$option"; done\n' + then)
    script.chmod(0o755)
    return str(script)


@needs_extension
def test_two_processes_build_at_once_a_third_finds_it_and_a_damaged_one_is_built_again(tmp_path):
    compiler = quick_compiler(tmp_path)
    for started in [process(XDG_CACHE_HOME=str(tmp_path), CXX=compiler) for _ in range(2)]:
        assert ends(started)[0].startswith("True")
    folder = tmp_path / "nni_darts_rnn"
    assert len(list(folder.glob("*.so"))) == 1 and not list(folder.glob(".build*"))
    assert ends(process(XDG_CACHE_HOME=str(tmp_path), PATH="/nowhere", CXX=""))[0].startswith("True")
    (built,) = folder.glob("*.so")
    size = built.stat().st_size
    built.write_bytes(built.read_bytes()[:100_000])  # loading this would end the process
    killed = folder / f".build-{built.stem.rpartition('-')[0]}-abc"  # while it compiled
    killed.mkdir()
    (killed / "cells.o").touch()
    assert ends(process(XDG_CACHE_HOME=str(tmp_path), CXX=compiler))[0].startswith("True")
    (again,) = folder.glob("*.so")
    assert again.stat().st_size == size and not killed.exists()


def test_without_a_compiler_the_same_numbers(tmp_path):
    out, err = ends(process(XDG_CACHE_HOME=str(tmp_path), PATH="/nowhere", CXX=""))
    assert out.startswith("False") and "install g++" in out and not err


def test_a_failing_compiler_is_one_line(tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'cells.cpp:1: error: no such luck' >&2\nexit 1\n")
    broken.chmod(0o755)
    out, err = ends(process(XDG_CACHE_HOME=str(tmp_path), CXX=str(broken)))
    assert out.startswith("False") and "no such luck" in err and err.count("no such luck") == 1


@needs_extension
def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert ends(process(XDG_CACHE_HOME=str(tmp_path / "file"), CXX=quick_compiler(tmp_path)))[0].startswith("True")


def test_the_switch():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out, _ = ends(process(NNI_DARTS_RNN_FUSED="0"))
    assert out.startswith("False") and "NNI_DARTS_RNN_FUSED=0" in out


PAGES = textwrap.dedent("""
    import argparse, sys
    import torch
    from nni_darts_rnn import workspace
    from nni_darts_rnn.options import prepare_torch

    def advised(tensor):  # "hg" among the flags of the mapping that holds the tensor's middle
        middle, inside = tensor.data_ptr() + tensor.numel() * tensor.element_size() // 2, False
        with open("/proc/self/smaps") as maps:
            for line in maps:
                if line.split()[0].count("-") == 1 and not line.split()[0].endswith(":"):
                    first, last = (int(address, 16) for address in line.split()[0].split("-"))
                    inside = first <= middle < last
                elif inside and line.startswith("VmFlags:"):
                    return "hg" in line.split()
        return None

    if sys.argv[1] == "command":
        prepare_torch(argparse.Namespace(threads=None, device="cpu"))
    numbers = workspace.LARGE // 4
    tensors = torch.empty(numbers), workspace.in_large_pages(torch.empty(numbers // 2)), workspace.in_large_pages(torch.empty(numbers)), workspace.take("cell", {"pre": numbers}, torch.float32)[0]
    print(*map(advised, tensors))
""")


@pytest.mark.parametrize("who, allowed, expected", [("program", {}, "False False True True"), ("command", {}, "True True True True"),
                                                    ("command", {"THP_MEM_ALLOC_ENABLE": "0"}, "False False True True")])
def test_who_asks_for_large_pages(who, allowed, expected):
    """A large workspace does, and a command has torch do it for all large tensors; what the environment says of that stays."""
    if not os.path.exists("/sys/kernel/mm/transparent_hugepage/enabled"):
        pytest.skip("this kernel has no transparent large pages")
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"} | allowed
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", PAGES, who], env=environment, capture_output=True, text=True, timeout=300)
    assert (run.returncode, run.stdout.strip()) == (0, expected), run.stderr
