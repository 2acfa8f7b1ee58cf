"""The language model: tied weights, sizes, dropouts, regularisation and perplexity against slow ones."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nni_darts_rnn.cell import DiscreteRNN
from nni_darts_rnn.genotype import DARTS_V1, DARTS_V2, Genotype
from nni_darts_rnn.layer import DartsRNN
from nni_darts_rnn.model import LanguageModel, activation_regularisation, choose_device, number_of_parameters, perplexity, without_dropout
from nni_darts_rnn.supernet import MixedRNN

SMALL = Genotype((("tanh", 0), ("relu", 1), ("identity", 1)))
V, H, T, B = 11, 6, 5, 4


def made(genotype=SMALL, seed=0, scale=0.5, **dropouts):
    torch.manual_seed(seed)
    model = LanguageModel.from_genotype(V, H, genotype, **dropouts).double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, scale)
    return model


def text(*shape, seed=1):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def test_embedding_and_decoder_are_one_tensor():
    model = made()
    assert model.decoder.weight is model.encoder.weight
    assert [name for name, _ in model.named_parameters()] == ["encoder.weight", "rnn.W0", "rnn.Ws", "decoder.bias"]
    assert number_of_parameters(model) == V * H + V + 4 * H * H + 3 * H * 2 * H
    tokens, hidden = text(T, B), model.init_hidden(B)
    model(tokens, hidden).decoded.sum().backward()
    both = model.encoder.weight.grad
    with_own = made()
    with_own.decoder.weight = nn.Parameter(with_own.encoder.weight.detach().clone())
    with_own(tokens, hidden).decoded.sum().backward()
    torch.testing.assert_close(both, with_own.encoder.weight.grad + with_own.decoder.weight.grad, rtol=0, atol=1e-11)
    model.double().to("cpu")
    assert model.decoder.weight is model.encoder.weight  # still, after a move


@pytest.mark.parametrize("words, hidden, millions", [(10_000, 850, 23), (33_278, 700, 33)])
def test_published_sizes(words, hidden, millions):
    with torch.device("meta"):  # no memory is needed to count
        model = LanguageModel.from_genotype(words, hidden, DARTS_V2)
    assert round(number_of_parameters(model) / 1e6) == millions
    assert number_of_parameters(model) == words * (hidden + 1) + 4 * hidden ** 2 + 8 * 2 * hidden ** 2


@pytest.mark.parametrize("given, limit", [({}, 0.04), ({"init_range": 0.3}, 0.3)], ids=["default", "given"])
def test_weights_start_in_range_and_the_bias_at_zero(given, limit):
    model = LanguageModel.from_genotype(500, 50, DARTS_V1, **given)
    assert all(w.abs().max() <= limit < w.abs().max() * 1.01 for w in (model.encoder.weight, model.rnn.W0, model.rnn.Ws))
    assert (model.decoder.bias == 0).all()


@pytest.mark.parametrize("kind", ["discrete", "supernet"])
def test_answers_against_the_parts(kind):
    torch.manual_seed(0)
    rnn = DiscreteRNN(H, H, SMALL) if kind == "discrete" else MixedRNN(H, H, 3)
    model = LanguageModel(V, rnn).double()
    tokens, hidden = text(T, B), torch.randn(B, H, dtype=torch.float64)
    out = model(tokens, hidden)
    raw = model.rnn(model.encoder.weight[tokens], hidden)
    assert torch.equal(out.raw, raw) and torch.equal(out.dropped, raw) and torch.equal(out.hidden, raw[-1])
    torch.testing.assert_close(out.decoded, raw @ model.encoder.weight.T + model.decoder.bias, rtol=0, atol=1e-12)
    assert out.decoded.shape == (T, B, V) and out._fields == ("decoded", "raw", "dropped", "hidden")


def test_loss_is_nats_per_token_of_the_same_pass():
    model, tokens, targets = made(dropout=0.5, dropout_h=0.3, dropout_i=0.4, dropout_e=0.2), text(T, B), text(T, B, seed=2)
    hidden = torch.randn(B, H, dtype=torch.float64)
    torch.manual_seed(5)
    nll, raw, dropped, after = model.loss(tokens, targets, hidden)
    torch.manual_seed(5)
    out = model(tokens, hidden)
    p = torch.softmax(out.decoded.detach(), -1)
    slow = -sum(math.log(p[t, b, targets[t, b]]) for t in range(T) for b in range(B)) / (T * B)
    assert nll.item() == pytest.approx(slow, rel=1e-12)
    assert torch.equal(raw, out.raw) and torch.equal(dropped, out.dropped) and torch.equal(after, out.raw[-1])
    assert torch.equal(out.hidden, out.raw[-1]) and not torch.equal(out.raw[-1], out.dropped[-1])  # what is carried is not dropped out


def test_hidden_state_goes_in_and_comes_out():
    model, tokens = made(), text(7, B)
    whole = model(tokens, model.init_hidden(B))
    first = model(tokens[:3], model.init_hidden(B))
    second = model(tokens[3:], first.hidden)
    torch.testing.assert_close(torch.cat([first.decoded, second.decoded]), whole.decoded, rtol=0, atol=1e-12)
    torch.testing.assert_close(second.hidden, whole.hidden, rtol=0, atol=1e-12)
    assert torch.equal(model(tokens, model.init_hidden(B)).decoded, whole.decoded)  # the model keeps nothing
    assert model.init_hidden(3).shape == (3, H) and model.init_hidden(3).dtype == torch.float64 and not model.init_hidden(3).any()


@pytest.mark.parametrize("rate", ["dropout", "dropout_h", "dropout_x", "dropout_i", "dropout_e"])
def test_each_dropout_is_active_in_training_alone(rate):
    model, tokens = made(**{rate: 0.5}), text(T, B)
    hidden = torch.ones(B, H, dtype=torch.float64)
    assert not torch.equal(model(tokens, hidden).decoded, model(tokens, hidden).decoded)
    model.eval()
    assert torch.equal(model(tokens, hidden).decoded, made()(tokens, hidden).decoded)


def test_without_dropout_all_else_is_as_in_training():
    every = dict(dropout=0.5, dropout_h=0.5, dropout_x=0.5, dropout_i=0.5, dropout_e=0.5)
    model, tokens, hidden = made(**every), text(T, B), torch.ones(B, H, dtype=torch.float64)
    modes = [m.training for m in model.modules()]
    with pytest.raises(KeyError), without_dropout(model):
        assert torch.equal(model(tokens, hidden).decoded, made()(tokens, hidden).decoded)
        raise KeyError
    assert [m.training for m in model.modules()] == modes and all(modes)
    # a supernet goes on drawing cells, each of which has no dropout
    rnn = MixedRNN(H, H, 2, dropout_x=0.5, dropout_h=0.5, relaxation="gumbel")
    model = LanguageModel(V, rnn, dropout=0.5, dropout_i=0.5, dropout_e=0.5).double()
    drawn = set()
    with without_dropout(model):
        for seed in range(20):
            torch.manual_seed(seed)
            once = model(tokens, hidden).decoded
            torch.manual_seed(seed)
            assert torch.equal(once, model(tokens, hidden).decoded)
            drawn.add(once.detach().numpy().tobytes())
    assert len(drawn) > 10
    settled = model.eval()(tokens, hidden).decoded
    with without_dropout(model):  # of a model that has none: nothing changes, and it does not come back in training
        assert torch.equal(model(tokens, hidden).decoded, settled)
    assert not any(m.training for m in model.modules())
    others = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(H), nn.Dropout2d(0.9), DartsRNN(3, H, num_layers=2, dropout=0.9))
    with without_dropout(others):
        assert [m.training for m in others] == [False, True, False, False] and all(m.training for m in others[3].layers[0].children())
    assert all(m.training for m in others)


def test_output_dropout_is_one_mask_a_sequence():
    out = made(dropout=0.4)(text(T, B), torch.ones(B, H, dtype=torch.float64))
    mask = out.dropped / out.raw  # (T, B, H)
    torch.testing.assert_close(mask, mask[:1].expand_as(mask), rtol=1e-12, atol=0)
    assert {round(m, 9) for m in mask.flatten().tolist()} == {0.0, round(1 / 0.6, 9)}
    assert len({tuple(row) for row in mask[0].round(decimals=9).tolist()}) > 1  # one for each of the batch


def test_input_dropout_is_one_mask_a_sequence():
    model, tokens = made(dropout_i=0.4), text(T, B)
    mask = model.embed(tokens) / model.encoder.weight[tokens]
    torch.testing.assert_close(mask, mask[:1].expand_as(mask), rtol=1e-12, atol=0)
    assert {round(m, 9) for m in mask.flatten().tolist()} == {0.0, round(1 / 0.6, 9)}
    assert len({tuple(row) for row in mask[0].round(decimals=9).tolist()}) > 1


def test_embedding_dropout_drops_whole_words_everywhere():
    model, tokens = made(dropout_e=0.5), text(40, B)
    scale = model.embed(tokens) / model.encoder.weight[tokens]  # (T, B, H)
    by_word = {}
    for t in range(40):
        for b in range(B):
            assert len(set(scale[t, b].round(decimals=9).tolist())) == 1
            by_word.setdefault(int(tokens[t, b]), set()).add(round(scale[t, b, 0].item(), 9))
    assert all(len(seen) == 1 for seen in by_word.values()) and set().union(*by_word.values()) == {0.0, 2.0}


def test_embedding_dropout_keeps_the_mean_over_draws():
    model, tokens = made(dropout_e=0.3), text(3, 2)
    torch.manual_seed(0)
    mean = torch.stack([model.embed(tokens) for _ in range(3000)]).mean(0) / model.encoder.weight[tokens]
    assert mean.min() > 0.93 and mean.max() < 1.07  # six standard errors


@pytest.mark.parametrize("ar, tar", [(0, 0), (2.0, 0), (0, 1e-3), (2.0, 1.0)])
def test_regularisation_against_the_formula(ar, tar):
    raw, dropped = torch.randn(T, B, H, dtype=torch.float64), torch.randn(T, B, H, dtype=torch.float64)
    activation = sum(v * v for v in dropped.flatten().tolist()) / dropped.numel()
    r = raw.tolist()
    changes = [(r[t + 1][b][k] - r[t][b][k]) ** 2 for t in range(T - 1) for b in range(B) for k in range(H)]
    assert float(activation_regularisation(raw, dropped, ar, tar)) == pytest.approx(ar * activation + tar * sum(changes) / len(changes), rel=1e-12)
    assert float(activation_regularisation(raw[:1], dropped[:1], 0, tar)) == 0  # one step has no change


@pytest.mark.parametrize("streams, bptt", [(1, 3), (1, 100), (3, 4), (4, 1), (5, 7)])
def test_perplexity_against_one_token_at_a_time(streams, bptt):
    model, tokens = made(dropout=0.5, dropout_i=0.5, dropout_e=0.3, dropout_h=0.2), text(53)
    found = perplexity(model, tokens, streams, bptt)
    assert model.training  # as it was
    slow = made().eval()
    n, nats, count = 53 // streams, 0.0, 0
    with torch.no_grad():
        for b in range(streams):
            hidden, column = slow.init_hidden(1), tokens[b * n:(b + 1) * n]
            for now, then in zip(column[:-1], column[1:]):
                out = slow(now.view(1, 1), hidden)
                hidden = out.hidden
                nats -= F.log_softmax(out.decoded[0, 0], -1)[then].item()
                count += 1
    assert found == pytest.approx(math.exp(nats / count), rel=1e-11)
    assert count == streams * (n - 1)


def test_perplexity_of_a_uniform_model_is_the_number_of_words():
    model = made(scale=0.0)
    assert perplexity(model, text(40), 2, 5) == pytest.approx(V, rel=1e-12)
    model.eval()
    perplexity(model, text(40), 2, 5)
    assert not model.training


def test_perplexity_leaves_each_module_in_its_own_mode():
    model = made(dropout=0.5)
    model.train()
    model.rnn.eval()
    perplexity(model, text(40), 2, 5)
    assert model.training and model.encoder.training and not model.rnn.training


def test_perplexity_leaves_no_trace():
    model = made(dropout=0.5)
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    perplexity(model, text(40), 2, 5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("make, words", [
    (lambda: LanguageModel.from_genotype(0, H, SMALL), "vocab_size: 0"),
    (lambda: LanguageModel.from_genotype(5.0, H, SMALL), "vocab_size: 5.0"),
    (lambda: LanguageModel.from_genotype(True, H, SMALL), "vocab_size: True"),
    (lambda: LanguageModel.from_genotype(V, 0, SMALL), "input_size: 0"),
    (lambda: LanguageModel.from_genotype(V, H, SMALL, dropout=1), "dropout: 1"),
    (lambda: LanguageModel.from_genotype(V, H, SMALL, dropout_i=-0.1), "dropout_i: -0.1"),
    (lambda: LanguageModel.from_genotype(V, H, SMALL, dropout_e=math.nan), "dropout_e: nan"),
    (lambda: LanguageModel.from_genotype(V, H, SMALL, dropout_x=2), "dropout_x: 2"),
    (lambda: LanguageModel.from_genotype(V, H, SMALL, init_range=0.0), "init_range: 0.0 must be above 0"),
    (lambda: LanguageModel.from_genotype(V, H, "DARTS_V4"), "did you mean 'DARTS_V"),
    (lambda: LanguageModel(V, DiscreteRNN(H, H + 1, SMALL)), "input_size 6 and hidden_size 7"),
    (lambda: made()(text(T, B), torch.zeros(B + 1, H).double()), "expected (B, H) = (4, 6)"),
    (lambda: perplexity(made(), text(3), 2, 5), "at least 4 tokens, this one has 3"),
    (lambda: perplexity(made(), text(30), 0, 5), "batch_size: 0"),
    (lambda: perplexity(made(), text(30), 2, 0), "bptt: 0"),
    (lambda: choose_device("cdua"), "device: 'cdua' is none of auto, cpu, gpu"),
])
def test_refusals(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_device():
    assert choose_device("cpu") == choose_device(torch.device("cpu")) == torch.device("cpu")
    assert choose_device(None) == choose_device("auto")
    if torch.cuda.is_available():
        assert choose_device("gpu").type == choose_device("auto").type == "cuda"
    else:
        assert choose_device("auto").type == "cpu"
        for name in ("gpu", "cuda", torch.device("cuda:1")):
            with pytest.raises(ValueError, match=f"device: {name} was asked for, but torch finds no CUDA device"):
                choose_device(name)
