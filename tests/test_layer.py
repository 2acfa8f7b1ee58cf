"""`DartsRNN` beside `nn.GRU`: the same calls, the same shapes; the same numbers as its cells run one by one."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

from nni_darts_rnn import layer as layer_module
from nni_darts_rnn.cell import DiscreteRNN, usual_range
from nni_darts_rnn.genotype import DARTS_V1, DARTS_V2, Genotype
from nni_darts_rnn.layer import DartsRNN

SMALL = Genotype((("tanh", 0), ("relu", 1), ("sigmoid", 0)), (1, 3))
I, H, T, B = 3, 4, 6, 5
SHAPES = list(itertools.product((1, 2, 3), (False, True), (False, True)))  # num_layers, bidirectional, batch_first


def pair(num_layers=1, bidirectional=False, batch_first=False, genotype=SMALL, **more):
    torch.manual_seed(0)
    ours = DartsRNN(I, H, genotype, num_layers, batch_first=batch_first, bidirectional=bidirectional, dtype=torch.float64, **more)
    with torch.no_grad():
        for p in ours.parameters():
            p.normal_(0, 0.5)
    return ours, nn.GRU(I, H, num_layers, batch_first=batch_first, bidirectional=bidirectional, dtype=torch.float64)


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def assert_called_alike(ours, gru, x, *h_0):
    output, h_n = ours(x, *h_0)
    expected, h_expected = gru(x, *h_0)
    assert type(output) is type(expected) and h_n.shape == h_expected.shape and h_n.dtype == h_expected.dtype
    if isinstance(output, PackedSequence):
        assert output.data.shape == expected.data.shape and torch.equal(output.batch_sizes, expected.batch_sizes)
        for a, b in ((output.sorted_indices, expected.sorted_indices), (output.unsorted_indices, expected.unsorted_indices)):
            assert (a is None and b is None) or torch.equal(a, b)
    else:
        assert output.shape == expected.shape and output.dtype == expected.dtype
    return output, h_n


@pytest.mark.parametrize("num_layers, bidirectional, batch_first", SHAPES)
@pytest.mark.parametrize("with_h_0", [False, True])
def test_shapes_of_gru(num_layers, bidirectional, batch_first, with_h_0):
    ours, gru = pair(num_layers, bidirectional, batch_first)
    layers = num_layers * (2 if bidirectional else 1)
    h_0 = (draw(layers, B, H),) if with_h_0 else ()
    assert_called_alike(ours, gru, draw(B, T, I) if batch_first else draw(T, B, I), *h_0)
    assert_called_alike(ours, gru, draw(T, I), *(h[:, 0] for h in h_0))  # unbatched
    lengths = torch.tensor([3, 6, 1, 4, 4])
    for sort in (False, True):
        x = pack_padded_sequence(draw(T, B, I), lengths.sort(descending=True).values if sort else lengths, enforce_sorted=sort)
        assert_called_alike(ours, gru, x, *h_0)


def test_called_by_the_names_of_grus_arguments():
    ours, gru = pair()
    for rnn in (ours, gru):
        output, h_n = rnn(input=draw(T, B, I), hx=draw(1, B, H))
        assert output.shape == (T, B, H) and h_n.shape == (1, B, H)
    before = [p.clone() for p in ours.parameters()]
    ours.reset_parameters()
    assert all(not torch.equal(p, was) and 0.9 * usual_range(H) < p.abs().max() <= usual_range(H) for p, was in zip(ours.parameters(), before))


def test_a_small_layer_is_not_silent_at_first():
    """±0.04 is for the published 850 units; of as few as 16 such a layer hardly tells one sequence from another."""
    assert usual_range(850) == 0.04
    torch.manual_seed(0)
    x = draw(20, 32, I)
    told = {start: float(DartsRNN(I, 16, num_layers=2, dtype=torch.float64, init_range=start)(x)[1][1].std(0).mean()) for start in (None, 0.04)}
    assert told[0.04] < 1e-4 and told[None] > 1e-3


@pytest.mark.parametrize("form", ["batch", "batch_first", "unbatched", "bidirectional"])
@pytest.mark.parametrize("compiled", ["0", "1"])
def test_the_output_is_the_callers_to_change(form, compiled, monkeypatch):
    monkeypatch.setenv("NNI_DARTS_RNN_FUSED", compiled)
    ours, _ = pair(**{form: True} if form.startswith("b") and form != "batch" else {})
    x, found = draw(*([T, I] if form == "unbatched" else [T, B, I])), []
    for change in (lambda output: output + 1, lambda output: output.add_(1)):
        output = change(ours(x)[0])
        found.append(torch.autograd.grad(output.square().sum(), list(ours.parameters())))
    for a, b in zip(*found):
        assert torch.equal(a, b)


def test_an_ensemble_with_dropout():
    torch.manual_seed(0)
    members = [DartsRNN(I, H, SMALL, dropout_x=0.5, dropout_h=0.5) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(members)
    x = torch.randn(T, B, I)
    run = torch.func.vmap(lambda p, b: torch.func.functional_call(members[0], (p, b), (x,))[0], randomness="different")
    outputs = run(parameters, buffers)  # (3, T, B, H)
    assert outputs.shape == (3, T, B, H) and not torch.equal(outputs, run(parameters, buffers))
    expected = torch.stack([member.eval()(x)[0] for member in members])
    torch.testing.assert_close(run(parameters, buffers), expected)


def test_a_packed_sequence_keeps_its_own_order_of_sequences_of_one_length():
    ours, gru = pair()
    packed = pack_padded_sequence(draw(T, B, I), torch.tensor([4, 6, 4, 1, 4]), enforce_sorted=False)
    order = torch.tensor([1, 4, 0, 2, 3])  # any of the three of length 4 may come first
    places = torch.argsort(order)
    padded = pad_packed_sequence(packed)[0]
    data = pack_padded_sequence(padded[:, order], torch.tensor([6, 4, 4, 4, 1])).data
    x = PackedSequence(data, packed.batch_sizes, order, places)
    output, _ = assert_called_alike(ours, gru, x)
    assert torch.allclose(pad_packed_sequence(output)[0], pad_packed_sequence(ours(packed)[0])[0], rtol=1e-12)
    assert torch.allclose(output.data[:B], ours(data[:B][None])[0][0], rtol=1e-12)  # the first step of each, in the order of the data


@pytest.mark.parametrize("num_layers, bidirectional, batch_first", SHAPES)
def test_against_its_cells_one_by_one(num_layers, bidirectional, batch_first):
    ours, _ = pair(num_layers, bidirectional, batch_first)
    D, x = (2 if bidirectional else 1), draw(T, B, I)
    h_0 = draw(num_layers * D, B, H)
    level, finals = x, []
    for layer in range(num_layers):
        outputs = []
        for direction in range(D):
            cell = ours.layers[layer * D + direction]
            steps, h = [], h_0[layer * D + direction]
            for t in (range(T - 1, -1, -1) if direction else range(T)):
                h = cell(level[t:t + 1], h)[0]  # one step at a time
                steps.append(h)
            finals.append(h)
            outputs.append(torch.stack(steps[::-1] if direction else steps))
        level = torch.cat(outputs, -1)
    output, h_n = ours(x.transpose(0, 1) if batch_first else x, h_0)
    torch.testing.assert_close(output.transpose(0, 1) if batch_first else output, level, rtol=0, atol=1e-12)
    torch.testing.assert_close(h_n, torch.stack(finals), rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_layers, bidirectional", [(1, False), (1, True), (2, False), (2, True), (3, True)])
@pytest.mark.parametrize("is_sorted", [False, True])
@pytest.mark.parametrize("with_h_0", [False, True])
def test_packed_equals_each_sequence_alone(num_layers, bidirectional, is_sorted, with_h_0):
    ours, _ = pair(num_layers, bidirectional)
    lengths = [6, 4, 4, 3, 1] if is_sorted else [3, 6, 1, 4, 4]
    sequences = [draw(n, I) for n in lengths]
    h_0 = draw(num_layers * (2 if bidirectional else 1), B, H) if with_h_0 else None
    packed, h_n = ours(pack_sequence(sequences, enforce_sorted=is_sorted), h_0)
    output, out_lengths = pad_packed_sequence(packed)
    assert out_lengths.tolist() == lengths
    for b, x in enumerate(sequences):
        alone, final = ours(x, None if h_0 is None else h_0[:, b])
        torch.testing.assert_close(output[:lengths[b], b], alone, rtol=0, atol=1e-12)
        torch.testing.assert_close(h_n[:, b], final, rtol=0, atol=1e-12)
        assert (output[lengths[b]:, b] == 0).all()


def test_gradients_of_a_packed_sequence_equal_those_of_each_alone():
    ours, _ = pair(2, True)
    lengths = [3, 6, 1, 4, 4]
    sequences = [draw(n, I).requires_grad_() for n in lengths]
    packed, h_n = ours(pack_sequence(sequences, enforce_sorted=False))
    together = torch.autograd.grad(packed.data.pow(2).sum() + h_n.sum(), [*sequences, *ours.parameters()])
    loss = 0
    for x in sequences:
        output, final = ours(x)
        loss = loss + output.pow(2).sum() + final.sum()
    for a, b in zip(together, torch.autograd.grad(loss, [*sequences, *ours.parameters()])):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("compiled", ["0", "1"])
def test_what_comes_after_a_sequences_end_is_no_affair_of_its_gradients(compiled, monkeypatch):
    """A cell that is stable on its inputs may grow without bound on zeros."""
    monkeypatch.setenv("NNI_DARTS_RNN_FUSED", compiled)
    ours = DartsRNN(1, 1, Genotype((("relu", 0),)))
    with torch.no_grad():
        ours.layers[0].W0.copy_(torch.tensor([[2.0, 0.05], [0.0, 0.1]]))
        ours.layers[0].Ws.copy_(torch.tensor([[[2.0, 4.0]]]))
    x, lengths = torch.full((320, 2, 1), 20.0), [320, 165]
    output = pad_packed_sequence(ours(pack_padded_sequence(x, torch.tensor(lengths)))[0])[0]
    alone = sum(ours(x[:n, :1])[0].sum() for n in lengths)
    for a, b in zip(torch.autograd.grad(output.sum(), list(ours.parameters())), torch.autograd.grad(alone, list(ours.parameters()))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=0)


def test_h_0_carries_a_sequence_on():
    ours, _ = pair(2)
    x = draw(T, B, I)
    whole, h_whole = ours(x)
    first, h = ours(x[:2])
    second, h = ours(x[2:], h)
    torch.testing.assert_close(torch.cat([first, second]), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(h, h_whole, rtol=0, atol=1e-12)


def test_h_n_is_where_gru_puts_it():
    ours, _ = pair(2, True)
    output, h_n = ours(draw(T, B, I))
    torch.testing.assert_close(h_n[2], output[-1, :, :H], rtol=0, atol=0)  # last layer forwards ends at the end
    torch.testing.assert_close(h_n[3], output[0, :, H:], rtol=0, atol=0)  # backwards at the beginning


def test_dropout_between_layers_in_training_alone():
    ours, x = pair(2, dropout=0.5)[0], draw(T, B, I)
    assert not torch.equal(ours(x)[0], ours(x)[0])
    plain, _ = pair(2)
    assert torch.equal(ours.eval()(x)[0], plain(x)[0])
    with pytest.warns(UserWarning, match="between layers"):  # nn.GRU warns too
        one, _ = pair(1, dropout=0.5)  # nothing is after the last layer
    assert torch.equal(one(x)[0], one(x)[0])


def test_all_may_be_dropped_between_layers():
    """As nn.GRU has it: the second layer then hears nothing."""
    ours, _ = pair(2, dropout=1.0)
    one, other = draw(T, B, I), draw(T, B, I) + 1
    assert torch.equal(ours(one)[0], ours(other)[0])
    ours.eval()
    assert not torch.equal(ours(one)[0], ours(other)[0])


@pytest.mark.parametrize("rate", ["dropout_x", "dropout_h"])
def test_variational_rates_reach_every_cell(rate):
    ours, _ = pair(2, True, **{rate: 0.5})
    assert [getattr(cell, rate) for cell in ours.layers] == [0.5] * 4
    x = draw(T, B, I)
    assert not torch.equal(ours(x)[0], ours(x)[0]) and torch.equal(ours.eval()(x)[0], ours(x)[0])


@pytest.mark.parametrize("genotype", ["DARTS_V1", DARTS_V1, DARTS_V1.to_json()], ids=["name", "genotype", "json"])
def test_genotype_by_name_value_or_text(genotype):
    assert DartsRNN(I, H, genotype).genotype == DARTS_V1
    assert DartsRNN(I, H).genotype == DARTS_V2


def test_state_dict_round_trip(tmp_path):
    ours, _ = pair(2, True)
    torch.save(ours.state_dict(), tmp_path / "weights.pt")
    other = DartsRNN(I, H, SMALL, 2, bidirectional=True, dtype=torch.float64)
    x = draw(T, B, I)
    assert not torch.equal(other(x)[0], ours(x)[0])
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(other(x)[0], ours(x)[0]) and torch.equal(copy.deepcopy(ours)(x)[1], ours(x)[1])
    assert [tuple(p.shape) for p in other.parameters()] == [(I + H, 2 * H), (3, H, 2 * H)] * 2 + [(3 * H, 2 * H), (3, H, 2 * H)] * 2


def test_weights_of_another_cell_are_refused(tmp_path):
    """Whose matrices have the same shapes."""
    model, other = (nn.ModuleDict({"rnn": DartsRNN(I, H, cell)}) for cell in ("DARTS_V1", "DARTS_V2"))
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(RuntimeError, match=r"rnn\.layers\.0\.genotype: the weights are of .*, this layer is of "):
        other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    weights._metadata["rnn.layers.0"]["genotype"] = DARTS_V1.to_json().replace("relu", "swish")  # a primitive that only there is registered
    with pytest.raises(RuntimeError, match="rnn.layers.0.genotype: .*swish"):
        other.load_state_dict(weights)
    nn.ModuleDict({"rnn": DartsRNN(I, H, "DARTS_V1")}).load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    other.load_state_dict(dict(model.state_dict()))  # tensors alone, as safetensors keeps them


def test_the_device_that_is_asked_for_is_where_it_is_made():
    with torch.device("meta"):
        assert DartsRNN(I, H, SMALL, device="cpu").layers[0].W0.abs().max() > 0
    before = torch.get_rng_state()
    assert all(p.is_meta for p in DartsRNN(I, H, SMALL, device="meta").parameters())
    assert torch.equal(torch.get_rng_state(), before)


def test_dtype_and_device_reach_every_weight():
    rnn = DartsRNN(I, H, num_layers=2, dtype=torch.float64, device="meta")
    assert {(p.dtype, p.device.type) for p in rnn.parameters()} == {(torch.float64, "meta")}


def test_repr_names_what_it_was_built_with():
    assert "3, 4, num_layers=2, batch_first=True, bidirectional=False" in repr(DartsRNN(I, H, SMALL, 2, batch_first=True))


@pytest.mark.parametrize("make, words", [
    (lambda: DartsRNN(I, H, bias=True), "bias: True"),
    (lambda: DartsRNN(I, H, 2), "genotype: 2 is a number; the third argument is the cell"),
    (lambda: DartsRNN(I, H, num_layers=0), "num_layers: 0"),
    (lambda: DartsRNN(I, H, num_layers=1.0), "num_layers: 1.0"),
    (lambda: DartsRNN(I, H, num_layers=True), "num_layers: True"),
    (lambda: DartsRNN(I, H, dropout=1.1), "dropout: 1.1"),
    (lambda: DartsRNN(I, H, dropout=True), "dropout: True"),
    (lambda: DartsRNN(I, H, dropout=math.nan), "dropout: nan"),
    (lambda: DartsRNN(I, H, dropout="0.1"), "dropout: '0.1' must be a number"),
    (lambda: DartsRNN(I, H, batch_first="False"), "batch_first: 'False' must be True or False"),
    (lambda: DartsRNN(I, H, bidirectional=2), "bidirectional: 2 must be True or False"),
    (lambda: DartsRNN(I, H)(torch.zeros(T, B, I), (torch.zeros(1, B, H), torch.zeros(1, B, H))), "hx: a tuple; this cell has one state"),
    (lambda: DartsRNN(I, H)(torch.zeros(T, B, I).double()), "input is of torch.float64, the weights are of torch.float32: input.to(torch.float32), or rnn.to(torch.float64)"),
    (lambda: DartsRNN(I, H)(torch.zeros(T, B, I), torch.zeros(1, B, H).double()), "hx is of torch.float64"),
    (lambda: DartsRNN(I, H, dropout_h=-1), "dropout_h: -1"),
    (lambda: DartsRNN(I, H, dropout_x=None), "dropout_x: None must be a number"),
    (lambda: DartsRNN(0, H), "input_size: 0"),
    (lambda: DartsRNN(I, 0), "hidden_size: 0"),
    (lambda: DartsRNN(I, H, "DARTS-V2"), "did you mean 'DARTS_V2'"),
    (lambda: DartsRNN(I, H)(torch.zeros(T, B, I + 1)), "4 features; this layer was built for input_size 3"),
    (lambda: DartsRNN(I, H)(torch.zeros(I)), "shape (3,); expected 2 (unbatched) or 3 axes"),
    (lambda: DartsRNN(I, H)(torch.zeros(1, T, B, I)), "expected 2 (unbatched) or 3 axes"),
    (lambda: DartsRNN(I, H)(torch.zeros(T, B, I), torch.zeros(1, B, H + 1)), "shape (1, 5, 5); expected (layers·directions, B, H) = (1, 5, 4)"),
    (lambda: DartsRNN(I, H, num_layers=2)(torch.zeros(T, B, I), torch.zeros(1, B, H)), "expected (layers·directions, B, H) = (2, 5, 4)"),
    (lambda: DartsRNN(I, H, batch_first=True)(torch.zeros(T, B, I), torch.zeros(1, B, H)), "= (1, 6, 4)"),
    (lambda: DartsRNN(I, H)(torch.zeros(T, I), torch.zeros(1, B, H)), "hx has shape"),
    (lambda: DartsRNN(I, H)(torch.zeros(T, B, I), torch.zeros(B, H)), "hx has shape"),
    (lambda: DartsRNN(I, H)(torch.zeros(0, B, I)), "shape (0, 5, 3); expected (T, B, 3) with T of at least 1"),
    (lambda: DartsRNN(I, H)(pack_sequence([torch.zeros(2, I + 1)])), "4 features"),
])
def test_refusals(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(H,), (1, 1, H), (2, H), (1, H + 1)])
def test_a_wrong_state_of_an_unbatched_input_is_named_as_it_came(shape):
    with pytest.raises(ValueError) as error:
        pair()[0](draw(T, I), draw(*shape))
    assert str(error.value) == f"hx has shape {shape}; expected (layers·directions, H) = (1, {H}), as the input has no batch"


def test_torch_compile_leaves_the_loop_over_time_alone():
    """It would unroll it, and again for each length."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    layer = pair(2, True)[0]
    compiled = torch.compile(layer, backend=backend)
    for length in (20, 30, 41):
        x = draw(length, B, I).requires_grad_()
        output, h_n = compiled(x)
        expected, h_expected = layer(x)
        assert torch.equal(output, expected) and torch.equal(h_n, h_expected)
        assert torch.equal(torch.autograd.grad(output.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0])
    assert graphs and sum(len(graph.graph.nodes) for graph in graphs) < 400  # unrolled: some 20 nodes for each of the 91 time steps


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_sequences_of_very_different_lengths_are_run_apart(bidirectional, given, monkeypatch):
    """The same outputs, last states and gradients as of each sequence alone, in fewer steps × rows."""
    lengths = [3, 40, 2, 19, 4, 1, 9, 38, 3, 2, *[5] * 30, *[2] * 60]
    ours = DartsRNN(I, H, SMALL, 2, bidirectional=bidirectional, dtype=torch.float64)
    x, cells = draw(40, len(lengths), I).requires_grad_(), []
    hx = draw(ours.num_layers * ours.directions, len(lengths), H).requires_grad_() if given else None
    monkeypatch.setattr(DiscreteRNN, "forward", lambda self, x, *rest, usual=DiscreteRNN.forward: cells.append(x.shape[:2].numel()) or usual(self, x, *rest))
    output, h_n = ours(pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False), hx)
    assert sum(cells) < 0.35 * 40 * len(lengths) * len(ours.layers)
    output, ended = pad_packed_sequence(output)
    alone = [ours(x[:n, b], None if hx is None else hx[:, b]) for b, n in enumerate(lengths)]
    assert ended.tolist() == lengths
    torch.testing.assert_close(h_n, torch.stack([h for _, h in alone], 1), rtol=0, atol=1e-12)
    for b, n in enumerate(lengths):
        torch.testing.assert_close(output[:n, b], alone[b][0], rtol=0, atol=1e-12)
    inputs = [x, *ours.parameters(), *([] if hx is None else [hx])]
    ones = torch.autograd.grad(output.square().sum() + h_n.sum(), inputs), torch.autograd.grad(sum(o.square().sum() + h.sum() for o, h in alone), inputs)
    for a, b in zip(*ones, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_sequences_that_are_run_apart_with_another_default_device_or_a_wrong_state():
    lengths = torch.tensor([40] + [2] * 79)
    ours, packed = DartsRNN(I, H, SMALL), pack_padded_sequence(torch.randn(40, 80, I), lengths)
    expected = ours(packed)[1]
    torch.set_default_device("meta")
    try:
        found = ours(packed)[1]
    finally:
        torch.set_default_device(None)
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match=r"^hx has shape \(2, 80, 4\); expected .*\(1, 80, 4\)"):
        ours(packed, torch.zeros(2, 80, H))


def test_sequences_of_like_lengths_are_run_together():
    assert layer_module._groups([5, 9, 7, 10]) == [[3, 1, 2, 0]]
    assert layer_module._groups([100] * 100 + [51] * 100) == [list(range(200))]
    assert layer_module._groups([100] * 100 + [50] * 100) == [list(range(100)), list(range(100, 200))]
    assert layer_module._groups([100] * 3 + [50] * 3) == [[0, 1, 2, 3, 4, 5]]  # of few rows a step takes as long as of many
