"""`DartsRNN` and the language model beyond eager float32: `torch.export`, ONNX in onnxruntime, other dtypes; all with the same numbers."""

import warnings

import pytest
import torch
from torch.export import Dim

from nni_darts_rnn.cell import discrete_cell, scanned_cell
from nni_darts_rnn.genotype import ENAS, Genotype
from nni_darts_rnn.layer import DartsRNN
from nni_darts_rnn.model import LanguageModel

I, H = 3, 4
SMALL = Genotype((("tanh", 0), ("relu", 1), ("sigmoid", 0), ("identity", 2)), (1, 3, 4))



def layer(num_layers=1, bidirectional=False, batch_first=False, genotype=SMALL, dtype=torch.float64):
    torch.manual_seed(0)
    rnn = DartsRNN(I, H, genotype, num_layers, bidirectional=bidirectional, batch_first=batch_first, dtype=dtype).eval()
    with torch.no_grad():
        for p in rnn.parameters():
            p.normal_(0, 0.4)
    return rnn


def inputs(rnn, T, B, with_h_0):
    dtype = rnn.layers[0].W0.dtype
    x = torch.randn((B, T, I) if rnn.batch_first else (T, B, I), dtype=dtype)
    return (x, torch.randn(len(rnn.layers), B, H, dtype=dtype)) if with_h_0 else (x,)


def session(path):
    """The file in onnxruntime, as a function of tensors."""
    ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra: export)")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda *args: [torch.from_numpy(o) for o in session.run(None, {i.name: a.numpy() for i, a in zip(session.get_inputs(), args)})]


def to_onnx(model, args, path, **dynamic):
    pytest.importorskip("onnxscript", reason="torch's ONNX exporter needs onnxscript (extra: export)")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*axis name.*")  # two inputs share an axis and its name
        torch.onnx.export(model, args, str(path), dynamo=True, verbose=False, **dynamic)
    return session(path)


def test_two_layers_both_ways_of_any_length_and_batch(tmp_path):
    rnn, T, B = layer(2, bidirectional=True, batch_first=True), Dim("T", min=1), Dim("B", min=1)
    program = torch.export.export(rnn, inputs(rnn, 5, 2, True), dynamic_shapes=({0: B, 1: T}, {1: B}))
    cases = [inputs(rnn, T, B, True) for T, B in ((5, 2), (1, 1), (11, 7))]
    torch.export.save(program, tmp_path / "rnn.pt2")
    again = torch.export.load(tmp_path / "rnn.pt2").module()
    for args in cases:
        for ours, theirs in zip(rnn(*args), again(*args), strict=True):
            torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-14)
    run = to_onnx(program, (), tmp_path / "rnn.onnx")
    for args in cases:
        for ours, theirs in zip(rnn(*args), run(*args), strict=True):
            torch.testing.assert_close(theirs, ours.detach(), rtol=0, atol=1e-13)


def test_eleven_nodes_straight_to_onnx(tmp_path):
    rnn = layer(genotype=ENAS, dtype=torch.float32)
    run = to_onnx(rnn, inputs(rnn, 5, 2, False), tmp_path / "rnn.onnx", dynamic_shapes=({0: Dim("T", min=1), 1: Dim("B", min=1)},))
    for T, B in ((1, 3), (12, 1)):
        (x,) = inputs(rnn, T, B, False)
        for ours, theirs in zip(rnn(x), run(x), strict=True):
            torch.testing.assert_close(theirs, ours.detach(), rtol=0, atol=1e-6)


def test_language_model_in_onnx(tmp_path):
    torch.manual_seed(0)
    lm, T, B = LanguageModel.from_genotype(20, H, SMALL).eval(), Dim("T", min=1), Dim("B", min=1)
    run = to_onnx(lm, (torch.zeros(5, 2, dtype=torch.long), torch.zeros(2, H)), tmp_path / "lm.onnx", dynamic_shapes=({0: T, 1: B}, {0: B}))
    args = torch.randint(20, (9, 3)), torch.randn(3, H)
    for ours, theirs in zip(lm(*args), run(*args), strict=True):
        torch.testing.assert_close(theirs, ours.detach(), rtol=0, atol=1e-6)


def test_the_scan_is_the_cell_with_a_mask_too():
    torch.manual_seed(0)
    weights = [torch.randn(*s, dtype=torch.float64) for s in ((6, 2, 2 * H), (2, H), (H, 2 * H), (4, H, 2 * H))]
    mask = torch.tensor([[0.0, 2.0, 2.0, 0.0], [2.0, 0.0, 2.0, 2.0]], dtype=torch.float64)
    torch.testing.assert_close(scanned_cell(*weights, SMALL, mask), discrete_cell(*weights, SMALL, mask), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype, atol", [(torch.float16, 5e-3), (torch.bfloat16, 4e-2), (torch.float32, 1e-6)])
def test_dtypes_compute_and_train(dtype, atol):
    exact = layer(2, True)
    x, h_0 = inputs(exact, 6, 3, True)
    rnn = layer(2, True).to(dtype)
    output, h_n = rnn(x.to(dtype), h_0.to(dtype))
    assert output.dtype == h_n.dtype == dtype
    for ours, theirs in zip(exact(x, h_0), (output, h_n)):
        torch.testing.assert_close(theirs.double(), ours, rtol=0, atol=atol)
    output.float().pow(2).mean().backward()
    assert all(p.grad is not None and p.grad.dtype == dtype and p.grad.abs().sum() > 0 for p in rnn.parameters())


def test_autocast_keeps_the_weights_as_they_are():
    rnn = layer(2, dtype=torch.float32)
    (x,) = inputs(rnn, 6, 3, False)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = rnn(x)
    torch.testing.assert_close(output.float(), rnn(x)[0], rtol=0, atol=5e-2)
    output.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in rnn.parameters())
