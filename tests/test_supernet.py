"""The mixed cell against a loop over every edge and primitive, and with one-hot probabilities against a single path."""

import contextlib
import copy

import pytest
import torch
from nni.nas.oneshot.pytorch.supermodule.differentiable import GumbelSoftmax

from nni_darts_rnn.cell import DiscreteRNN
from nni_darts_rnn.genotype import PRIMITIVES, Genotype, edges
from nni_darts_rnn.supernet import ALPHA_SCALE, MixedRNN, mixed_cell, one_hot_genotype

F = {"tanh": torch.tanh, "relu": lambda z: z.clamp(min=0), "sigmoid": lambda z: 1 / (1 + torch.exp(-z)), "identity": lambda z: z}
T, B, H = 2, 5, 3


def inputs(N, masked, seed=0, K=5):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape, scale=0.6: torch.randn(*shape, generator=generator, dtype=torch.float64) * scale  # noqa: E731
    E = N * (N + 1) // 2
    x_proj, h0, W0_h, Ws = draw(T, B, 2 * H), draw(B, H), draw(H, 2 * H), draw(N, H, 2 * H)
    p = torch.softmax(draw(E, K, scale=1.5), -1)
    mask = (torch.rand(B, H, generator=generator, dtype=torch.float64) < 0.7).double() / 0.7 if masked else None
    return x_proj, h0, W0_h, Ws, p, mask


def normed(s):
    mean = s.mean(0)
    return (s - mean) / ((s - mean) ** 2).mean(0).add(1e-5).sqrt()


def every_edge_and_primitive(x_proj, h0, W0_h, Ws, p, mask=None, primitives=PRIMITIVES):
    """Eq. 2 of the paper as it is written: for each node, edge and primitive p·(s_j + σ(c)∘(f(z) − s_j)), nothing for `none`."""
    mask = torch.ones_like(h0) if mask is None else mask
    h, outputs = h0, []
    for x in x_proj:
        pre = x + (h * mask) @ W0_h
        states = [normed(h + torch.sigmoid(pre[:, :H]) * (torch.tanh(pre[:, H:]) - h))]
        row = 0
        for W in Ws:
            total = torch.zeros_like(h)
            for s in states:
                pre = (s * mask) @ W
                for k, name in enumerate(primitives):
                    if name != "none":
                        total = total + p[row, k] * (s + torch.sigmoid(pre[:, :H]) * (F[name](pre[:, H:]) - s))
                row += 1
            states.append(normed(total))
        h = sum(states[1:]) / len(Ws)
        outputs.append(h)
    return torch.stack(outputs)


def one_path(x_proj, h0, W0_h, Ws, genotype, mask=None):
    """The genotype's discrete cell with a BatchNorm after every state."""
    mask = torch.ones_like(h0) if mask is None else mask
    h, outputs = h0, []
    for x in x_proj:
        pre = x + (h * mask) @ W0_h
        states = [normed(h + torch.sigmoid(pre[:, :H]) * (torch.tanh(pre[:, H:]) - h))]
        for W, (op, j) in zip(Ws, genotype.recurrent):
            pre = (states[j] * mask) @ W
            states.append(normed(states[j] + torch.sigmoid(pre[:, :H]) * (F[op](pre[:, H:]) - states[j])))
        h = torch.stack(states[1:]).mean(0)
        outputs.append(h)
    return torch.stack(outputs)


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("N", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients_against_every_edge_and_primitive(N, masked):
    *tensors, mask = inputs(N, masked, seed=N)
    tensors = [t.requires_grad_() for t in tensors]
    ours, slow = mixed_cell(*tensors, mask), every_edge_and_primitive(*tensors, mask)
    same(ours, slow)
    weights = torch.randn(T, B, H, dtype=torch.float64)
    for mine, theirs in zip(torch.autograd.grad((ours * weights).sum(), tensors), torch.autograd.grad((slow * weights).sum(), tensors)):
        assert theirs.abs().max() > 1e-3 or theirs.shape == (1, 5)  # one node's BatchNorm takes the scale of its only edge away
        same(mine, theirs)


@pytest.mark.parametrize("primitives", [("tanh", "relu"), ("identity", "none", "sigmoid"), ("relu",)])
def test_other_primitives_in_other_orders(primitives):
    *tensors, mask = inputs(3, True, K=len(primitives))
    assert tensors[4].shape == (6, len(primitives))
    same(mixed_cell(*tensors, mask, primitives), every_edge_and_primitive(*tensors, mask, primitives))


@pytest.mark.parametrize("masked", [False, True])
def test_one_hot_probabilities_are_a_single_path(masked):
    N = 4
    for seed in range(12):
        x_proj, h0, W0_h, Ws, _, mask = inputs(N, masked, seed)
        draw = torch.Generator().manual_seed(seed)
        pairs = tuple((PRIMITIVES[1 + int(torch.randint(4, (), generator=draw))], int(torch.randint(i, (), generator=draw))) for i in range(1, N + 1))
        genotype = Genotype(pairs)
        p = torch.zeros(len(edges(N)), 5, dtype=torch.float64)
        for row, (node, j) in enumerate(edges(N)):
            op, chosen = genotype.recurrent[node - 1]
            p[row, PRIMITIVES.index(op) if j == chosen else 0] = 1
        same(mixed_cell(x_proj, h0, W0_h, Ws, p, mask), one_path(x_proj, h0, W0_h, Ws, genotype, mask))


@pytest.mark.parametrize("training", [True, False])
def test_a_supernet_whose_alpha_is_one_hot_is_a_single_path(training):
    genotype = Genotype((("relu", 0), ("sigmoid", 0), ("tanh", 2)))
    torch.manual_seed(0)
    rnn = MixedRNN(2, H, 3).double().train(training)  # evaluation normalises by the batch too
    with torch.no_grad():
        rnn.W0.normal_(0, 0.6)
        rnn.Ws.normal_(0, 0.6)
        rnn.alpha.fill_(-40.0)
        for row, (node, j) in enumerate(edges(3)):
            op, chosen = genotype.recurrent[node - 1]
            rnn.alpha[row, PRIMITIVES.index(op) if j == chosen else 0] = 40.0
    x, h0 = torch.randn(T, B, 2, dtype=torch.float64), torch.randn(B, H, dtype=torch.float64)
    same(rnn(x, h0), one_path(x @ rnn.W0[:2], h0, rnn.W0[2:], rnn.Ws, genotype))
    assert rnn.genotype() == genotype


@pytest.mark.parametrize("training", [True, False])
def test_one_softmax_a_node_is_a_convex_combination_and_one_hot_the_discrete_cell(training):
    genotype = Genotype((("relu", 0), ("sigmoid", 0), ("tanh", 2)))
    torch.manual_seed(0)
    rnn = MixedRNN(2, H, 3, dropout_x=0.3, dropout_h=0.3, relaxation="node").double().train(training)
    with torch.no_grad():
        rnn.W0.normal_(0, 0.6)
        rnn.Ws.normal_(0, 0.6)
        rnn.alpha.normal_()
    p = rnn.probabilities()
    torch.testing.assert_close(torch.stack([block.sum() for block in p.split([1, 2, 3])]), torch.ones(3))
    with torch.no_grad():
        rnn.alpha.fill_(-40.0)
        for row, (node, j) in enumerate(edges(3)):
            if genotype.recurrent[node - 1][1] == j:
                rnn.alpha[row, PRIMITIVES.index(genotype.recurrent[node - 1][0])] = 40.0
    assert rnn.genotype() == genotype
    discrete = DiscreteRNN(2, H, genotype, dropout_x=0.3, dropout_h=0.3).double().train(training)
    discrete.W0, discrete.Ws = rnn.W0, rnn.Ws
    for batch in (B, 1):  # no statistics of a batch
        x, h0 = torch.randn(T, batch, 2, dtype=torch.float64), torch.randn(batch, H, dtype=torch.float64)
        results = []
        for layer in (rnn, discrete):
            torch.manual_seed(1)  # the same masks
            results.append(layer(x, h0))
        same(*results)


def test_gumbel_runs_a_drawn_cell_and_in_evaluation_the_derived_one():
    torch.manual_seed(0)
    rnn = MixedRNN(2, H, 3, relaxation="gumbel").double()
    with torch.no_grad():
        rnn.W0.normal_(0, 0.6)
        rnn.Ws.normal_(0, 0.6)
        rnn.alpha.normal_()
        rnn.alpha[:, PRIMITIVES.index("none")] = 9.0  # counts for nothing
    x, h0 = torch.randn(T, 1, 2, dtype=torch.float64), torch.randn(1, H, dtype=torch.float64)

    def runs(genotype):
        discrete = DiscreteRNN(2, H, genotype).double()
        discrete.W0, discrete.Ws = rnn.W0, rnn.Ws
        return discrete(x, h0)

    count = torch.zeros(len(rnn.alpha), 5, dtype=torch.float64)
    for seed in range(2000):
        torch.manual_seed(seed)
        p = rnn.mixture()
        count += p.detach()
        if seed < 20:
            pairs = tuple((PRIMITIVES[k], j) for (node, j), row in zip(edges(3), p) for k in row.nonzero().flatten().tolist())
            torch.manual_seed(seed)
            same(rnn(x, h0), runs(Genotype(pairs)))
    torch.testing.assert_close(count / 2000, rnn.probabilities().double(), atol=0.05, rtol=0)  # 0.5/√2000 is 0.011
    assert not count[:, PRIMITIVES.index("none")].any()
    same(rnn.eval()(x, h0), runs(rnn.genotype()))


@pytest.mark.parametrize("primitives", [PRIMITIVES, ("sigmoid", "none", "tanh"), ("identity", "relu")])
def test_gumbel_with_and_without_a_gradient_for_alpha(primitives):
    torch.manual_seed(0)
    rnn, x = MixedRNN(2, H, 4, primitives, relaxation="gumbel", dropout_h=0.4).double(), torch.randn(T, B, 2, dtype=torch.float64)
    results = []
    for learns in (True, False):
        rnn.alpha.requires_grad_(learns)
        torch.manual_seed(1)
        outputs = rnn(x)
        results.append([outputs, *torch.autograd.grad(outputs.pow(2).sum(), [rnn.W0, rnn.Ws])])
    for a, b in zip(*results):
        same(a, b)


@pytest.mark.parametrize("draws, sizes", [(2, (3, 2)), (3, (2, 2, 1)), (9, (1,) * 5)])
def test_several_draws_of_a_batch_are_parts_with_a_cell_each(draws, sizes, monkeypatch):
    """Outputs, and the gradient of everything, against the parts run one by one as batches of their own, with the masks and the noise that they had."""
    torch.manual_seed(0)
    rnn, x, h0 = (MixedRNN(2, H, 4, relaxation="gumbel", dropout_h=0.4, draws=draws).double(), torch.randn(T, B, 2, dtype=torch.float64),
                  torch.randn(B, H, dtype=torch.float64))
    with torch.no_grad():
        for w in (rnn.W0, rnn.Ws, rnn.alpha):
            w.normal_(0, 0.6)
    weights, seen = [rnn.W0, rnn.Ws, rnn.alpha], []
    monkeypatch.setattr(rnn, "mixture", lambda: seen.append(MixedRNN.mixture(rnn)) or seen[-1])
    torch.manual_seed(1)
    outputs = rnn(x, h0)
    cells = [p.detach() for p in seen]
    assert outputs.shape == (T, B, H) and len(cells) == len(sizes) and len({tuple(p.flatten().tolist()) for p in cells}) > 1
    found = torch.autograd.grad(outputs.pow(2).sum(), weights)
    torch.manual_seed(1)
    x_proj, h0, W0_h, mask = rnn.project(x, h0)
    parts = [torch.stack([x_proj[:, b] for b in rows], 1) for rows in torch.arange(B).split(sizes)]
    alone = [mixed_cell(x_part, h0[rows], W0_h, rnn.Ws, MixedRNN.mixture(rnn), mask[rows], normalise=False) for x_part, rows in zip(parts, torch.arange(B).split(sizes))]
    same(outputs, torch.cat(alone, 1))
    for a, b in zip(found, torch.autograd.grad(torch.cat(alone, 1).pow(2).sum(), weights)):
        same(a, b)
    seen.clear()
    rnn.eval()
    discrete = DiscreteRNN(2, H, rnn.genotype()).double()
    discrete.W0, discrete.Ws = rnn.W0, rnn.Ws
    same(rnn(x, h0), discrete(x, h0))
    assert len(seen) == 1


@pytest.mark.parametrize("draws", [1, 3])
def test_a_batch_of_no_sequences_is_run_by_drawn_cells(draws):
    rnn = MixedRNN(2, H, 2, relaxation="gumbel", dropout_h=0.4, draws=draws)
    assert rnn(torch.zeros(T, 0, 2)).shape == rnn.eval()(torch.zeros(T, 0, 2)).shape == (T, 0, H)


def test_in_evaluation_two_choices_that_are_equal_as_probabilities_give_the_derived_cell():
    """α that differ by less than softmax's rounding: the larger one is not the first."""
    rnn = MixedRNN(3, 3, 3, relaxation="gumbel").eval()
    with torch.no_grad():
        rnn.alpha.zero_()
        for row in (1, 3):  # of node 2 and of node 3
            rnn.alpha[row, 1], rnn.alpha[row + 1, 4] = 0.001, torch.nextafter(torch.tensor(0.001), torch.tensor(1.0))
        assert rnn.alpha[2, 4] > rnn.alpha[1, 1] and rnn.probabilities()[2, 4] == rnn.probabilities()[1, 1]
        assert one_hot_genotype(rnn.mixture()) == rnn.genotype()


def test_gumbels_gradient_is_the_soft_samples():
    """By hand: y = softmax((α + g) without `none`), g from the same noise, and ∂L/∂α = y∘(∂L/∂p − Σ y ∂L/∂p) node by node, with ∂L/∂p at the drawn cell."""
    torch.manual_seed(0)
    rnn, x = MixedRNN(2, H, 2, relaxation="gumbel").double(), torch.randn(T, B, 2, dtype=torch.float64)
    with torch.no_grad():
        for w in (rnn.W0, rnn.Ws, rnn.alpha):
            w.normal_(0, 0.6)
    torch.manual_seed(3)
    rnn(x).pow(2).sum().backward()
    torch.manual_seed(3)
    noise = [-torch.empty(1, 5 * i, dtype=torch.float64).exponential_().log() for i in (1, 2)]
    keep = torch.tensor([name != "none" for name in PRIMITIVES]).repeat(2)
    soft = [torch.zeros(5 * i, dtype=torch.float64) for i in (1, 2)]
    for y, block, g in zip(soft, rnn.alpha.detach().split([1, 2]), noise):
        y[keep[:len(y)]] = torch.softmax((block.flatten() + g[0])[keep[:len(y)]], 0)
    p = torch.cat([torch.nn.functional.one_hot(y.argmax(), len(y)).double().view(-1, 5) for y in soft]).requires_grad_()
    mixed_cell(x @ rnn.W0[:2], torch.zeros(B, H, dtype=torch.float64), rnn.W0[2:], rnn.Ws, p, normalise=False).pow(2).sum().backward()
    by_hand = [y * (d.flatten() - (y * d.flatten()).sum()) for y, d in zip(soft, p.grad.split([1, 2]))]
    same(rnn.alpha.grad, torch.cat([d.view(-1, 5) for d in by_hand]))


def test_masks_of_the_layer_against_the_loop():
    torch.manual_seed(0)
    rnn = MixedRNN(2, H, 3, dropout_x=0.5, dropout_h=0.5).double()
    x, h0 = torch.randn(T, B, 2, dtype=torch.float64), torch.randn(B, H, dtype=torch.float64)
    torch.manual_seed(1)
    x_proj, _, _, mask = rnn.project(x, h0)
    assert set(mask.unique().tolist()) == {0.0, 2.0}
    torch.manual_seed(1)
    same(rnn(x, h0), every_edge_and_primitive(x_proj, h0, rnn.W0[2:], rnn.Ws, torch.softmax(rnn.alpha, -1), mask))
    assert torch.equal(rnn.eval()(x, h0), rnn(x, h0))


def test_second_derivatives():
    x_proj, h0, W0_h, Ws, p, mask = inputs(2, True, K=3)
    leaves = [t.requires_grad_() for t in (W0_h, Ws, p)]
    run = lambda W0_h, Ws, p: mixed_cell(x_proj[:1], h0, W0_h, Ws, p, mask, ("none", "tanh", "sigmoid"))[..., 0].pow(2)  # noqa: E731
    assert torch.autograd.gradgradcheck(run, leaves)


def test_alpha_starts_small_and_names_every_edge():
    torch.manual_seed(0)
    rnn = MixedRNN(4, 4, 40)
    assert rnn.alpha.shape == (820, 5)
    assert rnn.alpha.std().item() == pytest.approx(ALPHA_SCALE, rel=0.05) and abs(rnn.alpha.mean()) < 1e-4
    assert {name: tuple(p.shape) for name, p in MixedRNN(3, 4, 2).named_parameters()} == {"W0": (7, 8), "Ws": (2, 4, 8), "alpha": (3, 5)}


def test_a_softmax_of_ones_own_is_drawn_once_a_sequence():
    class Counted(torch.nn.Softmax):
        calls = 0

        def forward(self, a):
            Counted.calls += 1
            return super().forward(a * 3)

    rnn = MixedRNN(2, H, 2, softmax=Counted(-1)).double()
    x, h0 = torch.randn(T, B, 2, dtype=torch.float64), torch.randn(B, H, dtype=torch.float64)
    output = rnn(x, h0)
    assert Counted.calls == 1
    same(output, every_edge_and_primitive(x @ rnn.W0[:2], h0, rnn.W0[2:], rnn.Ws, torch.softmax(3 * rnn.alpha, -1)))
    torch.testing.assert_close(rnn.probabilities().double(), torch.softmax(rnn.alpha.detach(), -1), rtol=1e-6, atol=0)


def test_states_of_any_text_stay_in_range():
    """The mean of normalised states: its mean square over the batch is at most one, however long the text."""
    rnn = MixedRNN(4, 8, 3).double().eval()
    with torch.no_grad():
        for p in rnn.parameters():
            p.normal_(0, 2)
    assert rnn(100 * torch.randn(200, B, 4, dtype=torch.float64)).pow(2).mean(1).max() <= 1 + 1e-9


@pytest.mark.parametrize("make, words", [
    (lambda: MixedRNN(2, 3, 2)(torch.zeros(4, 1, 2)), "at least 2"),
    (lambda: MixedRNN(2, 3, 2).eval()(torch.zeros(4, 1, 2)), "at least 2"),
    (lambda: MixedRNN(2, 3, 2)(torch.zeros(4, 2, 3)), "expected (T, B, 2)"),
    (lambda: MixedRNN(2, 3, 2)(torch.zeros(4, 2, 2), torch.zeros(3, 3)), "expected (B, H) = (2, 3)"),
    (lambda: MixedRNN(2, 3, 0), "n_nodes: 0"),
    (lambda: MixedRNN(2, 3, 2, relaxation="nodes"), "relaxation: 'nodes' is none of edge, node, gumbel; did you mean 'node'?"),
    (lambda: MixedRNN(2, 3, 2, softmax=GumbelSoftmax(), relaxation="gumbel"), "'gumbel' draws by itself"),
    (lambda: MixedRNN(2, 3, 2, draws=4), "draws: 4 cells are drawn with relaxation 'gumbel' alone; with 'edge' give 1"),
    (lambda: MixedRNN(2, 3, 2, relaxation="gumbel", draws=1.5), "draws: 1.5 must be a whole number of at least 1"),
    (lambda: MixedRNN(2, 3, 2, ("tanh", "swish")), "each must be 'none' or one of tanh"),
    (lambda: MixedRNN(2, 3, 2, ("tanh", "tanh")), "named once"),
    (lambda: MixedRNN(2, 3, 2, ("none",)), "one not 'none'"),
    (lambda: MixedRNN(2, 3, 2, ()), "one not 'none'"),
])
def test_refusals(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_diverged_alpha_is_refused_when_the_cell_is_asked_for():
    rnn = MixedRNN(2, 3, 2)
    with torch.no_grad():
        rnn.alpha[1, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        rnn.genotype()


@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
def test_sixteen_bit_floats(how):
    """bfloat16 has 8 bits of mantissa: outputs and gradients within a few percent."""
    torch.manual_seed(0)
    full = MixedRNN(8, 8, 4, dropout_h=0.2)
    x, towards = torch.randn(2, 5, 4, 8)

    def run(layer, x, context):
        torch.manual_seed(1)
        with context:
            out = layer(x)
        (out.float() * towards).sum().backward()
        return out.float().detach(), layer.alpha.grad.float()

    expected = run(full, x, contextlib.nullcontext())
    half = copy.deepcopy(full)
    half.zero_grad()
    got = run(half, x, torch.autocast("cpu", torch.bfloat16)) if how == "autocast" else run(half.bfloat16(), x.bfloat16(), contextlib.nullcontext())
    for a, b in zip(got, expected):
        assert (a - b).norm() < 0.12 * b.norm()


@pytest.mark.parametrize("relaxation", ["edge", "node", "gumbel"])
def test_a_packed_sequence_is_refused_in_words(relaxation):
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(3, 3), torch.randn(2, 3)])
    with pytest.raises(ValueError, match="PackedSequence"):
        MixedRNN(3, 4, 2, relaxation=relaxation)(packed)
