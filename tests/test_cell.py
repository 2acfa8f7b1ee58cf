"""The discrete cell against the paper's formulas on plain numbers; masks; primitives of one's own; derivatives."""

import math
import re

import numpy as np
import pytest
import torch

from nni_darts_rnn import cell as cell_module
from nni_darts_rnn import genotype as genotype_module
from nni_darts_rnn.cell import ACTIVATIONS, DiscreteRNN, RecurrentWeights, discrete_cell, register_primitive, variational_mask
from nni_darts_rnn.genotype import DARTS_V1, DARTS_V2, ENAS, Genotype

CELLS = {"one node": Genotype((("relu", 0),)), "some nodes": Genotype((("tanh", 0), ("sigmoid", 0), ("identity", 2)), (3, 1)),
         "V1": DARTS_V1, "V2": DARTS_V2, "ENAS": ENAS}


def sigmoid(a):
    return 1 / (1 + math.exp(-a))


F = {"tanh": math.tanh, "relu": lambda a: max(a, 0.0), "sigmoid": sigmoid, "identity": lambda a: a, "sine": math.sin}


def times(vector, matrix):
    return [sum(v * row[k] for v, row in zip(vector, matrix)) for k in range(len(matrix[0]))]


def by_the_formulas(x, h, W0, Ws, genotype, m_x=None, m_h=None):
    """One sequence x (T, I) from h (H,), on lists of numbers: DESIGN's three lines, element by element. Returns (T, H)."""
    H, outputs = len(h), []
    m_x, m_h = m_x or [1.0] * len(x[0]), m_h or [1.0] * H

    def gate(s, pre, f):  # s + σ(c)∘(f(z) − s)
        c, z = pre[:H], pre[H:]
        return [s_k + sigmoid(c_k) * (f(z_k) - s_k) for s_k, c_k, z_k in zip(s, c, z)]

    for x_t in x:
        both = [a * m for a, m in zip(x_t, m_x)] + [a * m for a, m in zip(h, m_h)]
        states = [gate(h, times(both, W0), math.tanh)]
        for W, (op, j) in zip(Ws, genotype.recurrent):
            states.append(gate(states[j], times([a * m for a, m in zip(states[j], m_h)], W), F[op]))
        h = [sum(states[i][k] for i in genotype.concat) / len(genotype.concat) for k in range(H)]
        outputs.append(h)
    return outputs


def made(genotype, I=3, H=4, B=2, T=3, seed=0, **rates):
    torch.manual_seed(seed)
    rnn = DiscreteRNN(I, H, genotype, **rates).double()
    with torch.no_grad():
        for p in rnn.parameters():
            p.normal_(0, 0.7)  # far from zero, so that no term is lost in the tolerance
    return rnn, torch.randn(T, B, I, dtype=torch.float64), torch.randn(B, H, dtype=torch.float64)


def oracle(rnn, x, h0, mask_x=None, mask_h=None):
    B = x.shape[1]
    columns = [by_the_formulas(x[:, b].tolist(), h0[b].tolist(), rnn.W0.tolist(), rnn.Ws.tolist(), rnn.genotype,
                               None if mask_x is None else mask_x[b].tolist(), None if mask_h is None else mask_h[b].tolist()) for b in range(B)]
    return torch.tensor(columns, dtype=torch.float64).transpose(0, 1)  # (B, T, H) -> (T, B, H)


def close(a, b, tolerance=1e-11):
    assert a.shape == b.shape
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("genotype", CELLS.values(), ids=CELLS)
@pytest.mark.parametrize("I, H, B, T", [(3, 4, 2, 3), (4, 4, 1, 2), (6, 2, 3, 1), (1, 3, 2, 4)])
def test_against_the_formulas(genotype, I, H, B, T):
    rnn, x, h0 = made(genotype, I, H, B, T)
    close(rnn(x, h0), oracle(rnn, x, h0))
    close(rnn(x), oracle(rnn, x, torch.zeros(B, H, dtype=torch.float64)))


def test_the_last_output_is_the_next_hidden_state():
    rnn, x, h0 = made(DARTS_V2, T=5)
    first = rnn(x[:2], h0)
    close(torch.cat([first, rnn(x[2:], first[-1])]), rnn(x, h0))


def test_masks_against_the_formulas():
    rnn, x, h0 = made(DARTS_V1, I=5, H=4, B=3, T=4, dropout_x=0.4, dropout_h=0.5)
    torch.manual_seed(1)
    ones = torch.ones_like(x)
    x_proj, _, _, mask_h = rnn.project(ones, h0)
    mask_x = torch.linalg.lstsq(rnn.W0[:5].T, x_proj[0].T).solution.T  # what W0's input rows were multiplied by: x was all ones
    assert set(mask_h.unique().tolist()) == {0.0, 2.0}
    assert all(min(abs(v), abs(v - 1 / 0.6)) < 1e-9 for v in mask_x.flatten().tolist()) and mask_x.abs().min() < 1e-9 < mask_x.max()
    torch.manual_seed(1)
    close(rnn(x, h0), oracle(rnn, x, h0, mask_x, mask_h), 1e-9)


def test_masks_are_drawn_once_a_sequence_for_each_of_the_batch_and_anew_for_the_next():
    rnn, _, h0 = made(DARTS_V1, I=20, H=20, B=6, dropout_x=0.5, dropout_h=0.5)
    x = torch.ones(7, 6, 20, dtype=torch.float64)
    x_proj, _, _, mask = rnn.project(x, h0.new_zeros(6, 20))
    assert (x_proj == x_proj[0]).all()  # the same at every time step
    assert len({tuple(row.tolist()) for row in x_proj[0]}) == 6 and len({tuple(row.tolist()) for row in mask}) == 6
    again, _, _, mask_again = rnn.project(x, h0.new_zeros(6, 20))
    assert not torch.equal(again, x_proj) and not torch.equal(mask_again, mask)


@pytest.mark.parametrize("p", [0.1, 0.25, 0.75])
def test_a_mask_keeps_the_mean(p):
    torch.manual_seed(0)
    mask = variational_mask(torch.empty(400, 500, dtype=torch.float64), p, True)
    assert set(mask.unique().tolist()) == {0.0, 1 / (1 - p)}
    assert mask.mean().item() == pytest.approx(1, abs=6 * math.sqrt(p / (1 - p) / mask.numel()))


def test_no_masks_in_evaluation_or_at_rate_zero():
    assert variational_mask(torch.empty(2, 2), 0.5, False) is None and variational_mask(torch.empty(2, 2), 0.0, True) is None
    rnn, x, h0 = made(DARTS_V2, dropout_x=0.5, dropout_h=0.5)
    plain, x, h0 = made(DARTS_V2)
    assert not torch.allclose(rnn(x, h0), plain(x, h0))
    close(rnn.eval()(x, h0), plain(x, h0), 0)


@pytest.mark.parametrize("given, limit", [({}, 0.04), ({"init_range": 0.3}, 0.3)], ids=["default", "given"])
def test_weights_start_uniform_within_the_range(given, limit):
    rnn = DiscreteRNN(100, 100, DARTS_V1, **given)
    for p in rnn.parameters():
        assert p.abs().max() <= limit and p.abs().max() > 0.9975 * limit and abs(p.mean()) < 0.025 * limit
        assert p.std().item() == pytest.approx(2 * limit / math.sqrt(12), rel=0.02)
    assert rnn.W0.shape == (200, 200) and rnn.Ws.shape == (8, 100, 200)


@pytest.mark.parametrize("genotype", [CELLS["one node"], CELLS["some nodes"], ENAS], ids=["one node", "some nodes", "ENAS"])
def test_first_derivatives(genotype):
    rnn, x, h0 = made(genotype, I=2, H=2, B=2, T=2, seed=3)
    x_proj = torch.randn(2, 2, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[2.0, 0.0], [2.0, 2.0]], dtype=torch.float64)
    inputs = (x_proj, h0.requires_grad_(), rnn.W0[2:].detach().requires_grad_(), rnn.Ws.detach().requires_grad_())
    assert torch.autograd.gradcheck(lambda *a: discrete_cell(*a, genotype, mask), inputs)
    assert torch.autograd.gradcheck(lambda a: rnn(a, h0), (x.requires_grad_(),))


def test_second_derivatives():
    genotype = Genotype((("tanh", 0), ("sigmoid", 1)))
    rnn, _, h0 = made(genotype, I=2, H=2, B=1, T=2)
    x_proj = torch.randn(2, 1, 4, dtype=torch.float64, requires_grad=True)
    inputs = (x_proj, h0.requires_grad_(), rnn.W0[2:].detach().requires_grad_(), rnn.Ws.detach().requires_grad_())
    assert torch.autograd.gradgradcheck(lambda *a: discrete_cell(*a, genotype), inputs)


@pytest.fixture
def sine():
    register_primitive("sine", torch.sin)
    yield "sine"
    cell_module.ACTIVATIONS.pop("sine")
    genotype_module._known_ops.discard("sine")


def test_a_primitive_of_ones_own_in_genotype_and_discrete_cell(sine):
    genotype = Genotype((("sine", 0), ("relu", 1), ("sine", 1)))
    assert Genotype.from_json(genotype.to_json()) == Genotype.from_sample(genotype.to_sample()) == genotype
    rnn, x, h0 = made(genotype)
    close(rnn(x, h0), oracle(rnn, x, h0))


def test_a_primitive_of_ones_own_in_the_supernet(sine):
    from nni_darts_rnn.supernet import MixedRNN

    rnn = MixedRNN(3, 4, 2, ("none", "sine", "tanh")).double()
    other = MixedRNN(3, 4, 2, ("none", "sigmoid", "tanh")).double()
    other.load_state_dict(rnn.state_dict())
    x = torch.randn(3, 5, 3, dtype=torch.float64)
    assert not torch.allclose(rnn(x), other(x))
    with torch.no_grad():
        rnn.alpha[:] = torch.tensor([9.0, 1.0, 0.0])
    assert rnn.genotype() == Genotype((("sine", 0), ("sine", 0)))


def test_a_primitive_of_ones_own_in_the_space(sine):
    from nni_darts_rnn.space import DartsRnnSpace

    space = DartsRnnSpace(7, 4, 2, ("none", "sine", "tanh"))
    assert [list(m.values) for label, m in space.simplify().items() if label.endswith("/op")] == [["sine", "tanh"]] * 2
    genotype = Genotype((("sine", 0), ("tanh", 1)))
    frozen = space.freeze(genotype.to_sample()).double()
    tokens, hidden = torch.randint(7, (3, 2)), torch.randn(2, 4, dtype=torch.float64)
    x = frozen.lm.encoder(tokens)
    discrete = DiscreteRNN(4, 4, genotype).double()
    discrete.load_state_dict(frozen.lm.rnn.state_dict())
    close(frozen(tokens, hidden).raw, oracle(discrete, x, hidden))


def test_the_registered_primitive_is_gone_after_its_tests():
    assert set(ACTIVATIONS) == {"tanh", "relu", "sigmoid", "identity"}
    with pytest.raises(ValueError):
        Genotype((("sine", 0),))


def test_register_primitive_refuses_what_cannot_be_called():
    with pytest.raises(ValueError, match="primitive 'three': 3 must be a function"):
        register_primitive("three", 3)
    assert "three" not in ACTIVATIONS


@pytest.mark.parametrize("name", ["none", "", "two words", "1st", None])
def test_register_primitive_refuses_names(name):
    with pytest.raises(ValueError, match="identifier other than 'none'"):
        register_primitive(name, torch.sin)
    assert set(ACTIVATIONS) == {"tanh", "relu", "sigmoid", "identity"}


@pytest.mark.parametrize("make, words", [
    (lambda: RecurrentWeights(0, 2, 2), "input_size: 0"),
    (lambda: RecurrentWeights(2, -1, 2), "hidden_size: -1"),
    (lambda: RecurrentWeights(2, 2.0, 2), "hidden_size: 2.0"),
    (lambda: RecurrentWeights(2, 2, True), "n_nodes: True"),
    (lambda: RecurrentWeights(2, 2, 2, dropout_x=1.0), "dropout_x: 1.0"),
    (lambda: RecurrentWeights(2, 2, 2, dropout_h=-0.1), "dropout_h: -0.1"),
    (lambda: RecurrentWeights(2, 2, 2, dropout_h=math.nan), "dropout_h: nan"),
    (lambda: DiscreteRNN(2, 2, "DARTS_V3"), "did you mean 'DARTS_V"),
    (lambda: DiscreteRNN(2, 3, DARTS_V1)(torch.zeros(4, 1, 3)), "shape (4, 1, 3); expected (T, B, 2)"),
    (lambda: DiscreteRNN(2, 3, DARTS_V1)(torch.zeros(4, 2)), "shape (4, 2)"),
    (lambda: DiscreteRNN(2, 3, DARTS_V1)(torch.zeros(4, 5, 2), torch.zeros(4, 3)), "expected (B, H) = (5, 3)"),
])
def test_refusals(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert words in str(error.value) and "\n" not in str(error.value)


def test_random_cells_against_the_formulas():
    rng = np.random.default_rng(0)
    for seed in range(25):
        n = int(rng.integers(1, 6))
        pairs = tuple((list(ACTIVATIONS)[rng.integers(4)], int(rng.integers(i))) for i in range(1, n + 1))
        genotype = Genotype(pairs, tuple((1 + rng.permutation(n)[:rng.integers(1, n + 1)]).tolist()))
        rnn, x, h0 = made(genotype, I=2, H=3, B=1, T=3, seed=seed)
        close(rnn(x, h0), oracle(rnn, x, h0))


@pytest.mark.parametrize("function, words", [(torch.nn.SiLU, "makes a SiLU"), (torch.mean, "of shape ()"), (torch.relu_, "changes its argument"),
                                             (torch.nn.PReLU(), "a module with trainable parameters")])
def test_what_cannot_be_a_primitive(function, words):
    from nni_darts_rnn.cell import ACTIVATIONS, register_primitive

    with pytest.raises(ValueError, match=re.escape(words)):
        register_primitive("unheard_of", function)
    assert "unheard_of" not in ACTIVATIONS
