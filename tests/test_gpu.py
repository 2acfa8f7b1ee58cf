"""The GPU's kernels against the readable cells: interpreted by Triton on a CPU, in a process of their own, since that is chosen when Triton is imported;
and as they are where there is a GPU."""

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

COMPARE = """
import torch
from nni_darts_rnn import cell, fused, supernet
from nni_darts_rnn.genotype import DARTS_V1, DARTS_V2, Genotype
from nni_darts_rnn.gpu import plan, sequence

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
sequence.CHUNK = 3
cuts = [plan.pieces(*sizes) for sizes in ((256, 4800, 300), (256, 600, 300), (256, 300, 600), (64, 1700, 850), (4096, 4800, 300), (1, 1700, 850))]
assert cuts == [8, 3, 1, 5, 1, 1], cuts
plan.pieces = lambda rows, inner, columns: 4 if rows == 5 else 1  # at these sizes none is cut
passes = []
load = plan.Plan.load_weights
plan.Plan.load_weights = lambda self, *rest: (passes.append(self), load(self, *rest))[1]


def inputs(T, B, H, N, dtype, masked):
    def draw(*shape):
        return torch.randn(*shape, dtype=dtype, device=device) / 3
    mask = torch.bernoulli(torch.full((B, H), 0.7, dtype=dtype, device=device)) / 0.7 if masked else None
    return [draw(T, B, 2 * H), draw(B, H), draw(H, 2 * H), draw(N, H, 2 * H), torch.softmax(3 * draw(N * (N + 1) // 2, 5), -1), mask]


def gradients(function, tensors):
    leaves = [t.clone().requires_grad_() for t in tensors[:5]]
    outputs = function(*leaves, tensors[5])
    weights = torch.linspace(-1, 1, outputs.numel(), dtype=outputs.dtype, device=device).view_as(outputs)
    grads = torch.autograd.grad((outputs * weights).sum(), leaves, allow_unused=True)
    return [outputs.detach(), *(g for g in grads if g is not None)]


def check(fast, readable, tensors, tolerance):
    before = len(passes)
    for cut in (len(tensors[0]), 2):  # a shorter sequence is served by the longer one's memory
        part = [tensors[0][:cut], *tensors[1:]]
        for got, wanted in zip(gradients(fast, part), gradients(readable, part), strict=True):
            assert float((got - wanted).norm()) <= tolerance * float(wanted.norm()), (got, wanted)
    long = tensors[0].repeat(2, 1, 1)  # without gradients, in more than one part
    with torch.no_grad():
        got, wanted = fast(long, *tensors[1:]), readable(long, *tensors[1:])
    assert float((got - wanted).norm()) <= tolerance * float(wanted.norm())
    assert len(passes) == before + 3 and passes[before] is passes[before + 1]
    assert all(min(cuts) > 1 for cuts in passes[before].pieces)  # forward and backward


for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
    for N, masked, normalise in ((1, True, True), (2, True, True), (3, False, False)):
        def fast(*tensors):
            return fused.mixed_cell(*tensors, normalise=normalise)
        def readable(*tensors):
            return supernet.mixed_cell(*tensors, normalise=normalise)
        check(fast, readable, inputs(4, 5, 6, N, dtype, masked), tolerance)
    star = Genotype([("tanh", 0), ("relu", 0), ("identity", 2), ("sigmoid", 0)], [1, 3, 4])  # levels of one node, of three, and of one
    flat = Genotype([("sigmoid", 0), ("relu", 0)], [2])  # the last level has both, and the output one of them
    large = (DARTS_V1, DARTS_V2)
    if device == "cpu":  # interpreted, which takes half a minute: one in each precision
        large = large[:1] if dtype == torch.float64 else large[1:]
    for genotype in (star, flat, *large):
        def fast(x, h, W, Ws, p, mask):
            return fused.discrete_cell(x, h, W, Ws, genotype, mask)
        def readable(x, h, W, Ws, p, mask):
            return cell.discrete_cell(x, h, W, Ws, genotype, mask)
        check(fast, readable, inputs(3, 5, 6, genotype.n_nodes, dtype, True), tolerance)

x, h, W, Ws, p, mask = [None if t is None else t.clone().requires_grad_() for t in inputs(3, 4, 5, 2, torch.float64, False)]
first, second = fused.mixed_cell(x, h, W, Ws, p), fused.mixed_cell(x, h, W, Ws, p)  # two passes alive at once
grads = [torch.autograd.grad(o.sum(), Ws, retain_graph=o is first)[0] for o in (second, first)]
again = torch.autograd.grad(first.sum(), Ws)[0]
assert torch.equal(grads[0], grads[1]) and torch.equal(again, grads[1])
x.data[0, 0, 7] = float("nan")
assert fused.mixed_cell(x, h, W, Ws, p).isnan().any()
with torch.no_grad():
    fused.mixed_cell(x, h, W, Ws, p)  # in memory that the next pass has too
x.data[0, 0, 7] = 0.0
assert torch.autograd.grad(fused.mixed_cell(x, h, W, Ws, p).sum(), Ws)[0].isfinite().all()  # no NaN was left there
single, genotype, before = inputs(3, 4, 16, 2, torch.float32, True), Genotype([("tanh", 0), ("relu", 1)]), len(passes)
projected = single[0].bfloat16()  # as autocast leaves it; the kernels keep all digits of float32 from there on
with torch.autocast(device, torch.bfloat16):
    half = fused.discrete_cell(projected, *single[1:4], genotype, single[5])
assert half.dtype == torch.float32 and len(passes) == before + 1
assert torch.allclose(half, cell.discrete_cell(projected.float(), *single[1:4], genotype, single[5]), atol=1e-5)
before = len(passes)
for _ in range(2):
    for rows in (4, 3):  # of two kinds, of each more passes alive at once than kinds are kept
        alive = [fused.mixed_cell(x[:, :rows], h[:rows], W, Ws, p) for _ in range(sequence.SPARE + 2)]
        torch.autograd.grad(sum(o.sum() for o in alive), Ws)
assert len(set(map(id, passes[before:]))) == 2 * (sequence.SPARE + 2)
sequence.Spare.plans.clear()
before = len(passes)
for _ in range(4):
    outputs = fused.mixed_cell(x, h, W, Ws, p)  # with a graph, and no backward pass: the one before is alive until this is done
assert len(set(map(id, passes[before:]))) == 2
fused.enable(False)
before = len(passes)
fused.mixed_cell(x, h, W, Ws, p)
assert len(passes) == before
print("equal")
"""


def run(**environment) -> str:
    done = subprocess.run([sys.executable, "-c", COMPARE], capture_output=True, text=True, timeout=300, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kernels_equal_the_readable_cells_when_interpreted():
    assert run(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="").split() == ["equal"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_kernels_equal_the_readable_cells_on_a_gpu():
    assert run().split() == ["equal"]


def test_no_kernels_within_somebodys_recording(monkeypatch):
    from nni_darts_rnn import extension

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for recording in (True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda recording=recording: recording)
        assert extension.gpu_ready(SimpleNamespace(is_cuda=True, device="cuda")) is not recording
