"""Where the fast cells and the blockwise loss must stand back or stand up: shapes that do not fit, modes of torch, unusual tensors, builds that cannot be."""

from __future__ import annotations

import importlib.util
import itertools
import platform
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from nni_darts_rnn import bilevel, build, cell, extension, fused, supernet, workspace
from nni_darts_rnn.corpus import Corpus, Vocabulary
from nni_darts_rnn.cross_entropy import linear_cross_entropy
from nni_darts_rnn.genotype import DARTS_V2, PRIMITIVES, Genotype
from nni_darts_rnn.layer import DartsRNN
from nni_darts_rnn.pipeline import take_fast_path
from nni_darts_rnn.recipes import get_recipe

import test_fused  # isort: skip
from test_fused import TOLERANCE, assert_close, both_mixed, each_engine, ends, engine, needs_extension, process, quick_compiler, switch, tensors  # isort: skip # noqa: F401 (fixtures)

V = 40


def loss_inputs(rows=256, H=16, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return (*(torch.randn(shape, generator=g, dtype=dtype) for shape in ((rows, H), (V, H), (V,))), torch.randint(V, (rows,), generator=g))


def readable(dropped, weight, bias, targets):
    return F.cross_entropy(F.linear(dropped, weight, bias), targets)


@each_engine
@pytest.mark.parametrize("change", [
    lambda d, w, b, y: (d, w[:, :8], b, y), lambda d, w, b, y: (d, torch.cat([w, w], 1), b, y), lambda d, w, b, y: (d, w, b[:20], y),
    lambda d, w, b, y: (d, w, b, y[:200]), lambda d, w, b, y: (d, w, b, torch.cat([y, y])), lambda d, w, b, y: (d, w, b, y[:1]),
    lambda d, w, b, y: (d, w.float(), b, y), lambda d, w, b, y: (d, w, b.long(), y), lambda d, w, b, y: (d, w, b, y.int()),
    lambda d, w, b, y: (d, w, b, y.to("meta")), lambda d, w, b, y: (d, w.to_sparse(), b, y)])
def test_a_loss_of_tensors_that_do_not_fit_is_refused_as_torch_does(change):
    inputs = change(*loss_inputs())
    with pytest.raises((RuntimeError, ValueError)) as expected:
        readable(*inputs)
    with pytest.raises(type(expected.value)) as found:
        linear_cross_entropy(*inputs)
    assert str(found.value) == str(expected.value)


@each_engine
def test_a_loss_with_one_bias_for_all_words_or_without_numbers():
    d, w, b, y = loss_inputs()
    assert torch.allclose(linear_cross_entropy(d, w, b[:1], y), readable(d, w, b[:1], y), rtol=1e-12)
    assert linear_cross_entropy(*(t.to("meta") for t in (d, w, b, y))).shape == ()
    assert linear_cross_entropy(d, w.to("meta"), b, y).shape == ()  # torch sees no mistake here; a weight on a GPU must not be read from the CPU either
    assert torch.equal(linear_cross_entropy(d, w, b, y.byte()), readable(d, w, b, y.byte()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear_cross_entropy(d, w, b, y), readable(d, w, b, y))  # all digits of float64


@each_engine
@pytest.mark.parametrize("then", [torch.no_grad, torch.enable_grad])
def test_after_inference_mode_come_other_passes(then):
    rnn, x = supernet.MixedRNN(16, 16, 3), torch.randn(5, 8, 16)
    with torch.inference_mode():
        rnn(x)
    with then():
        out = rnn(x)
    if out.requires_grad:
        out.sum().backward()
        assert rnn.Ws.grad.abs().max() > 0


@each_engine
def test_tensors_that_are_not_plain_take_the_readable_form():
    *inputs, _ = tensors(4, 3, 8, 3)
    expected = supernet.mixed_cell(*inputs)
    with FakeTensorMode() as mode:
        fake = fused.mixed_cell(*(mode.from_tensor(t) for t in inputs))
    assert fake.shape == expected.shape and type(fake) is not torch.Tensor
    x, h, W0, Ws, p = inputs
    both = fused.mixed_cell(x, h, W0, TwoTensor(Ws, 2 * Ws), p)
    assert torch.equal(both.a, supernet.mixed_cell(x, h, W0, Ws, p)) and torch.equal(both.b, supernet.mixed_cell(x, h, W0, 2 * Ws, p))


@each_engine
@pytest.mark.filterwarnings("ignore")
def test_a_trace_is_of_the_readable_form():
    torch.manual_seed(0)
    rnn, (x, other) = DartsRNN(8, 16, DARTS_V2).eval(), torch.randn(2, 5, 3, 8)
    with torch.no_grad():
        traced = torch.jit.trace(rnn, (x,))
        assert torch.allclose(traced(other)[0], rnn(other)[0], atol=1e-6)


@each_engine
def test_forward_mode():
    *inputs, _ = tensors(4, 3, 8, 3)
    along = torch.randn_like(inputs[0])
    cases = [(lambda x, call: call(x, *inputs[1:]), fused.mixed_cell, supernet.mixed_cell, inputs[0], along)]
    d, w, b, y = loss_inputs()
    cases.append((lambda x, call: call(x, w, b, y), linear_cross_entropy, readable, d, torch.randn_like(d)))
    for run, fast, slow, primal, tangent in cases:
        with forward_ad.dual_level():
            got, expected = (forward_ad.unpack_dual(run(forward_ad.make_dual(primal, tangent), call)).tangent for call in (fast, slow))
        assert got is not None and torch.allclose(got, expected, rtol=1e-10)


@each_engine
def test_many_gradients_at_once():
    *inputs, _ = tensors(4, 3, 8, 3)
    p = inputs[4].requires_grad_()
    along = torch.randn(5, 4, 3, 8, dtype=torch.float64)
    got = torch.autograd.grad(fused.mixed_cell(*inputs), p, along, is_grads_batched=True)[0]
    for one, each in zip(along, got):
        assert torch.allclose(each, torch.autograd.grad(supernet.mixed_cell(*inputs), p, one)[0], rtol=1e-9, atol=1e-12)
    d, w, b, y = loss_inputs()
    w.requires_grad_()
    scales = torch.tensor([1.0, -2.0], dtype=torch.float64)
    got = torch.autograd.grad(linear_cross_entropy(d, w, b, y), w, scales, is_grads_batched=True)[0]
    expected = torch.autograd.grad(readable(d, w, b, y), w)[0]
    assert torch.allclose(got, scales[:, None, None] * expected, rtol=1e-10)


def three():
    """(fast, readable, inputs) of the mixed cell, the discrete cell and the loss."""
    *inputs, _ = tensors(4, 3, 8, 3)
    *four, y = loss_inputs()
    genotype = Genotype((("tanh", 0), ("relu", 1), ("sigmoid", 0)))

    def leaves(tensors):
        return [t.detach().requires_grad_() for t in tensors]

    return [(fused.mixed_cell, supernet.mixed_cell, leaves(inputs)),
            (lambda *i: fused.discrete_cell(*i, genotype), lambda *i: cell.discrete_cell(*i, genotype), leaves(inputs[:4])),
            (lambda *i: linear_cross_entropy(*i, y), lambda *i: readable(*i, y), leaves(four))]


@each_engine
def test_a_backward_pass_that_alone_is_transformed():
    for fast, slow, leaves in three():
        results = []
        for call in (fast, slow):
            out = call(*leaves)
            torch.manual_seed(0)
            along, tangent = torch.randn(2, *out.shape, dtype=out.dtype), torch.ones_like(out)
            many = torch.vmap(lambda v: torch.autograd.grad(out, leaves, v, retain_graph=True))(along)
            with forward_ad.dual_level():
                duals = torch.autograd.grad(out, leaves, forward_ad.make_dual(tangent.clone(), along[0]))
                results.append([*many, *(forward_ad.unpack_dual(d).tangent for d in duals)])
        for got, expected in zip(*results):
            assert torch.allclose(got, expected, rtol=1e-9, atol=1e-12)


@each_engine
@pytest.mark.filterwarnings("ignore")
def test_a_backward_pass_that_alone_is_compiled():
    """Addresses that are handed to C++ are of memory that is still there."""
    for fast, slow, leaves in three():
        for call in (fast, slow):
            torch.compile(lambda loss: loss.backward(), backend="eager")(call(*leaves).square().sum())
            found, leaves = [t.grad for t in leaves], [t.detach().requires_grad_() for t in leaves]
            if call is fast:
                kept = found
        for got, expected in zip(kept, found):
            assert torch.allclose(got, expected, rtol=1e-9, atol=1e-12)


@each_engine
def test_a_loss_under_autocast_differentiates_twice():
    d, w, b, y = loss_inputs(dtype=torch.float32)
    w, b = w.requires_grad_(), b.requires_grad_()
    results = []
    for call in (linear_cross_entropy, readable):
        with torch.autocast("cpu", torch.bfloat16):
            loss = call(d.bfloat16(), w, b, y)
        first = torch.autograd.grad(loss, w, create_graph=True)[0]
        results.append([first.detach(), torch.autograd.grad(first.square().sum(), b)[0]])
    for got, expected in zip(*results):
        assert torch.allclose(got, expected, rtol=2e-2, atol=1e-4)


@each_engine
def test_layers_without_numbers():
    x = torch.randn(3, 2, 5, device="meta")
    assert DartsRNN(5, 8, DARTS_V2, device="meta")(x)[0].shape == (3, 2, 8)
    assert supernet.MixedRNN(5, 8, 3).to("meta")(x).shape == (3, 2, 8)


@each_engine
def test_numbers_that_lie_in_memory_with_the_other_sign():
    for fast, slow, leaves in three():
        turned = [torch._neg_view(leaves[0].detach()), *leaves[1:]]
        assert torch.allclose(fast(*turned), slow(*turned), rtol=1e-9, atol=1e-12)
        results = [torch.autograd.grad(call(*leaves), leaves, torch._neg_view(torch.ones_like(call(*leaves)))) for call in (fast, slow)]
        for got, expected in zip(*results):
            assert torch.allclose(got, expected, rtol=1e-9, atol=1e-12)


@each_engine
def test_a_batch_of_one_cannot_be_normalised():
    *inputs, _ = tensors(4, 1, 8, 3)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        fused.mixed_cell(*inputs)
    assert torch.allclose(fused.mixed_cell(*inputs, normalise=False), supernet.mixed_cell(*inputs, normalise=False), rtol=1e-10)


def test_all_digits_whichever_way_the_precision_was_set():
    backends = [torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn]  # cuDNN's have TF32 by default
    for backend in backends:
        backend.fp32_precision = "tf32"  # torch.get_float32_matmul_precision raises from here on
    with bilevel.all_digits():
        assert all(backend.fp32_precision == "ieee" for backend in backends)
    assert all(backend.fp32_precision == "tf32" for backend in backends)


def test_all_digits_under_autocast():
    one = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        with bilevel.all_digits():
            assert (one @ one).dtype == torch.float32
        assert (one @ one).dtype == torch.bfloat16


@pytest.mark.parametrize("lacks, says", [("compiler", "install g++"), ("tiles", "gain nothing here"), ("nothing", None)])
def test_what_would_make_a_long_run_faster_is_said_once(lacks, says, monkeypatch, tmp_path, caplog):
    if lacks != "compiler" and not extension.available():
        pytest.skip(f"no extension here: {extension.why_not()}")
    for name, value in (("on", None), ("told", set()), *((("loaded", None), ("problem", None)) if lacks == "compiler" else ())):
        monkeypatch.setattr(extension.State, name, value)
    if lacks == "compiler":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
    else:
        monkeypatch.setattr(extension.State.loaded, "rounds", lacks == "nothing")
    monkeypatch.setattr(extension, "processor", lambda: "flags : fpu avx2" if lacks == "tiles" else "flags : fpu amx_bf16")
    words, lines = Vocabulary(("<eos>", "<unk>", "a")), []
    text = Corpus("made", words, *(torch.zeros(100_000, dtype=torch.int64) for _ in range(3)))
    for epochs in (1, 40, 40):
        recipe = get_recipe("small", {"retrain.epochs": epochs, "retrain.precision": "bfloat16", "retrain.hidden_size": 16 if epochs == 1 else 96}).retrain
        with caplog.at_level("INFO", logger="nni_darts_rnn"):
            take_fast_path(text, recipe, "cpu", 8)
        lines.append([record.getMessage() for record in caplog.records])
        caplog.clear()
    first = 0 if lacks == "tiles" else 1  # a compiler would make the long run faster, and tiles the short one too
    assert lines[1 - first] == lines[2] == []  # the second time, or where nothing would
    assert lines[first] == [] if says is None else len(lines[first]) == 1 and says in lines[first][0] and "\n" not in lines[first][0]


def test_a_compiler_that_is_no_command_is_one_line(tmp_path):
    out, err = ends(process(XDG_CACHE_HOME=str(tmp_path), CXX="g++ '"))
    assert out.startswith("False") and "CXX: \"g++ '\" is no command" in err


def test_openmp_in_a_path_with_a_space(monkeypatch):
    maps = b"7f00-7f01 r-xp 00000000 fe:00 123   /opt/my env/torch/lib/libgomp.so.1\n7f02-7f03 rw-p 00000000 00:00 0 \n"
    monkeypatch.setattr(build.Path, "read_bytes", lambda self: maps)
    assert build._openmp() == ["/opt/my env/torch/lib/libgomp.so.1"]
    maps = b"7f00-7f01 r-xp 00000000 fe:00 122   /lib/libgomp.so.1\n" + maps  # somebody else's too
    assert build._openmp() == ["/opt/my env/torch/lib/libgomp.so.1"]
    maps = maps.replace(b"torch", b"other")
    assert build._openmp() == ["/lib/libgomp.so.1"]


def test_a_cached_library_that_cannot_be_read_goes(tmp_path):
    (tmp_path / "cells-0-1.so").symlink_to(tmp_path / "nowhere")
    assert build._cached(tmp_path, "cells-0") is None and not list(tmp_path.iterdir())


@needs_extension
def test_a_library_that_cannot_be_loaded_is_not_kept(tmp_path):
    """As clang's, which asks for functions that torch's OpenMP library lacks; the next compiler starts afresh."""
    other = quick_compiler(tmp_path, 'echo "extern \\"C\\" int __kmpc_not_there(); int use() { return __kmpc_not_there(); }" > "$0.cpp"\n'
                                     'case "$*" in *-shared*) exec g++ -fPIC "$0.cpp" "$@";; *) exec g++ "$@";; esac\n')
    out, err = ends(process(XDG_CACHE_HOME=str(tmp_path), CXX=other))
    assert out.startswith("False") and "cannot be loaded" in err and "__kmpc_not_there" in err and not list(tmp_path.glob("*/*.so"))
    assert ends(process(XDG_CACHE_HOME=str(tmp_path), CXX=quick_compiler(tmp_path)))[0].startswith("True")


def test_nobody_shares_a_workspace(monkeypatch):
    monkeypatch.setattr(workspace.Spare, "workspaces", {})
    first, _ = workspace.take("cell", {"pre": 5}, torch.float32)
    workspace.give("cell", first)
    taken = [workspace.take(owner, {"pre": 5}, torch.float32) for owner in ("loss", "cell", "cell")]
    assert taken[1][0] is first and len({pieces["pre"].data_ptr() for _, pieces in taken}) == 3 and all(len(pieces["pre"]) == 5 for _, pieces in taken)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_two_threads_take_two_plans(monkeypatch):
    from nni_darts_rnn.gpu import sequence

    class Slow:
        def __eq__(self, other):
            time.sleep(0.1)  # the other thread's chance
            return True

    monkeypatch.setattr(sequence.Spare, "plans", [SimpleNamespace(key=Slow(), T=8)])
    monkeypatch.setattr(sequence, "Plan", lambda key, T: "new")
    with ThreadPoolExecutor(2) as pool:
        taken = list(pool.map(lambda _: sequence._take(Slow(), 8), range(2)))
    assert taken.count("new") == 1 and len(set(map(id, taken))) == 2


@pytest.mark.parametrize("value", ["off", "true", "2"])
def test_a_switch_is_on_or_off(monkeypatch, value):
    monkeypatch.setenv(extension.SWITCH, value)
    for asked in (fused.enabled, fused.available, fused.why_not):
        with pytest.raises(ValueError, match=f"^NNI_DARTS_RNN_FUSED: '{value}' must be 0 .off. or 1 .on.$"):
            asked()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_keeps_nothing_of_the_cell(monkeypatch, reentrant):
    kept, run = [], fused._run
    monkeypatch.setattr(fused, "_run", lambda *a: kept.append(a[5]) or run(*a))
    torch.manual_seed(0)
    layer, x = DartsRNN(6, 8), torch.randn(5, 3, 6, requires_grad=True)
    expected = torch.autograd.grad(layer(x)[0].sum(), [x, *layer.parameters()])
    kept.clear()
    out = checkpoint(lambda x: layer(x)[0], x, use_reentrant=reentrant)
    assert kept == [False]
    found = torch.autograd.grad(out.sum(), [x, *layer.parameters()]) if not reentrant else (out.sum().backward(), x.grad, *(p.grad for p in layer.parameters()))[1:]
    assert all(torch.equal(a, b) for a, b in zip(found, expected)) and kept.count(True) == 1


@each_engine
def test_a_drawn_cell_of_probabilities_that_are_not_one_hot():
    """As those of an α that is NaN: of more nodes than there are matrices."""
    *inputs, p, mask = tensors(3, 4, 8, 2)
    for share, needs in itertools.product((0.25, torch.nan), (True, False)):
        given = torch.full_like(p[:, 1:], share).requires_grad_(needs)
        found, expected = (cell(*inputs, given, mask, PRIMITIVES[1:], *rest) for cell, rest in ((fused.drawn_cell, ()), (supernet.mixed_cell, (False,))))
        assert torch.allclose(found, expected, rtol=1e-10, equal_nan=True)


def test_a_second_thread_waits_until_the_library_is_checked(monkeypatch):
    if not extension.available():
        pytest.skip(f"no extension here: {extension.why_not()}")
    library, order, begun = extension.State.loaded, [], threading.Event()

    def load():
        extension.State.loaded = library  # as `_checked` has it for its own calls
        begun.set()
        time.sleep(0.2)
        extension.State.loaded = None
        order.append("checked")
        return library

    monkeypatch.setattr(extension.State, "loaded", None)
    monkeypatch.setattr(extension, "load", load)
    first = threading.Thread(target=extension.available)
    first.start()
    begun.wait()
    order.append(extension.available())
    first.join()
    assert order == ["checked", True]


@each_engine
def test_a_saved_tensor_of_another_dtype_is_refused():
    H = 64
    inputs = torch.randn(1, 1, 2 * H), torch.randn(1, H), torch.randn(H, 2 * H, requires_grad=True), torch.randn(2, H, 2 * H, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.half() if t.numel() > 1000 else t, lambda t: t):
        outputs = fused.discrete_cell(*inputs, Genotype((("tanh", 0), ("relu", 1))))
    with pytest.raises(RuntimeError, match="came back from its hook in another dtype|same dtype|expected m1 and m2"):
        outputs.sum().backward()


@needs_extension
@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have no such flags")
@pytest.mark.parametrize("compiler, processor", [("g++", "x86-64"), ("clang++", "native"), ("clang++", "x86-64")])
def test_other_compilers_and_processors_compute_the_same(compiler, processor, tmp_path, monkeypatch):
    """Without AVX a tile is another one; clang calls OpenMP by other names than the library that torch brings has."""
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    flags = [flag.replace("-march=native", f"-march={processor}") for flag in build.flags()]
    monkeypatch.setattr(build, "flags", lambda: flags)
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(extension.State, "loaded", build._compile(tmp_path, "cells-0"))
    monkeypatch.setattr(extension.State, "on", True)
    threads, cell3 = torch.get_num_threads(), Genotype((("tanh", 0), ("sigmoid", 1), ("relu", 1)))
    try:
        torch.set_num_threads(2)
        for dtype in (torch.float64, torch.float32):
            *inputs, mask = tensors(3, 19, 37, 3, dtype)
            assert_close(*both_mixed(inputs, (True,) * 5, mask), TOLERANCE[dtype])
            assert_close(*(test_fused.run(lambda x, h, W0, Ws, m, of=of: of(x, h, W0, Ws, cell3, m), inputs[:4], (True,) * 4, mask) for of in (fused.discrete_cell, cell.discrete_cell)),
                         TOLERANCE[dtype])
            *losses, targets = loss_inputs(dtype=dtype)
            assert_close(*(test_fused.run(lambda d, w, b, _, of=of: of(d, w, b, targets), losses, (True,) * 3, None) for of in (linear_cross_entropy, readable)), TOLERANCE[dtype])
    finally:
        torch.set_num_threads(threads)
