"""A found cell among fastai's own: its tokenizers, its text learners, text generation, transfer, export; and a search on its DataLoaders."""

import json
from pydoc_data.topics import topics
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.learner import AvgSmoothLoss, load_learner
from fastai.losses import CrossEntropyLossFlat, FocalLossFlat, LabelSmoothingCrossEntropyFlat
from fastai.text.all import BaseTokenizer, SubwordTokenizer, TextDataLoaders, WordTokenizer, language_model_learner, set_seed, text_classifier_learner

from nni_darts_rnn.callbacks import PrintGenotype
from nni_darts_rnn.fastai_lm import DeferredLogits, SequenceLoss, SmoothLoss, TokenLoss, TokenPerplexity
from nni_darts_rnn.fastai_text import (
    AWD_DARTS,
    awd_darts_clas_config,
    awd_darts_clas_split,
    awd_darts_lm_config,
    awd_darts_lm_split,
    config_of,
    load_trained_encoder,
)
from nni_darts_rnn.genotype import ENAS, Genotype
from nni_darts_rnn.learner import lm_learner, search_learner
from nni_darts_rnn.model import LanguageModel
from nni_darts_rnn.recipes import get_recipe
from nni_darts_rnn.trained import save_trained

SMALL = Genotype((("tanh", 0), ("relu", 1), ("sigmoid", 0)), (1, 3))
SIZES = dict(emb_sz=12, n_hid=16, genotype=SMALL)


def texts():
    """Paragraphs of Python's documentation, labelled by whether they talk of classes."""
    found = [" ".join(p.split()) for name in ("assignment", "class", "import", "typesseq") for p in topics[name].split("\n\n") if len(p) > 200]
    return pd.DataFrame({"text": found, "label": ["class" if "class" in p else "other" for p in found], "is_valid": [k % 5 == 4 for k in range(len(found))]})


def language_dls(tokenizer=None, n=None):
    return TextDataLoaders.from_df(texts()[:n], text_col="text", is_lm=True, valid_col="is_valid", tok_tfm=tokenizer or BaseTokenizer(), bs=4,
                                   seq_len=12, device="cpu")


def fitted(learn, epochs=1):
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs, 1e-2)
    return learn


@pytest.fixture(scope="module")
def dls():
    return language_dls()


def text_learner(dls, folder, drop_mult=0.2, **config):
    set_seed(0)
    return language_model_learner(dls, AWD_DARTS, config=awd_darts_lm_config | SIZES | config, drop_mult=drop_mult, pretrained=False, path=folder)


def test_language_model_learner_learns_generates_and_comes_back_from_export(dls, tmp_path):
    learn = fitted(text_learner(dls, tmp_path, n_layers=2), 2)
    losses = [row[0] for row in learn.recorder.values]
    assert losses[1] < losses[0] < torch.tensor(float(len(dls.vocab))).log() * 1.3
    set_seed(1)
    with learn.no_bar():
        said = learn.predict("the class", 8, no_bar=True)
    assert said.lower().startswith("the class") and len(said.split()) > 5
    learn.export("learner.pkl")
    again = load_learner(tmp_path / "learner.pkl")
    set_seed(1)
    with again.no_bar():
        assert again.predict("the class", 8, no_bar=True) == said
    for ours, theirs in zip(learn.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert again.model[0].genotype == SMALL


def test_drop_mult_scales_every_rate_and_a_rate_of_one_is_refused(dls, tmp_path):
    def rates(learn):
        core, decoder = learn.model
        return [core.encoder_dp.embed_p, core.input_dp.p, core.hidden_dps[0].p, core.rnns[0].dropout_x, core.rnns[0].dropout_h, decoder.output_dp.p]

    assert rates(text_learner(dls, tmp_path, 1.0)) == [0.1, 0.2, 0.25, 0.75, 0.25, 0.75]
    assert rates(text_learner(dls, tmp_path, 0.5)) == [0.05, 0.1, 0.125, 0.375, 0.125, 0.375]
    with pytest.raises(ValueError, match="dropout_x: 1.5 must be a number of at least 0 and below 1"):
        text_learner(dls, tmp_path, 2.0)
    with pytest.raises(ValueError, match="hidden_p: 1.25"):
        text_learner(dls, tmp_path, 5.0, cell_input_p=0)
    with pytest.raises(ValueError, match="n_layers: 0"):
        text_learner(dls, tmp_path, n_layers=0)
    with pytest.raises(ValueError, match="did you mean 'ENAS'"):
        text_learner(dls, tmp_path, genotype="ENSA")


def test_groups_hold_each_parameter_once_and_get_rates_of_their_own(dls, tmp_path):
    learn = text_learner(dls, tmp_path, n_layers=3)
    groups = awd_darts_lm_split(learn.model)
    assert len(groups) == 4 and [p.shape[-1] for p in groups[0]] == [32, 32]
    ids = [id(p) for group in groups for p in group]
    assert sorted(ids) == sorted(id(p) for p in learn.model.parameters()) and len(set(ids)) == len(ids)
    learn.freeze()
    assert [p.requires_grad for group in groups for p in group] == [False] * 6 + [True, True]
    before = [p.detach().clone() for p in learn.model.parameters()]
    learn.unfreeze()
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, slice(1e-3, 1e-2))
    rates = [hyper["lr"] for hyper in learn.opt.hypers]
    assert rates[0] == pytest.approx(1e-3) and rates[-1] == pytest.approx(1e-2) and sorted(set(rates)) == rates
    assert all(not torch.equal(a, b) for a, b in zip(before, learn.model.parameters()))


def test_the_hidden_state_is_carried_and_follows_the_batch_size():
    torch.manual_seed(0)
    core = AWD_DARTS(20, 6, 8, 2, ENAS).eval()
    tokens = torch.randint(20, (3, 10))
    whole = core(tokens)
    core.reset()
    torch.testing.assert_close(torch.cat([core(tokens[:, :4]), core(tokens[:, 4:])], 1), whole)
    core.reset()
    core(tokens[:, :4])
    torch.testing.assert_close(core(tokens[:2, 4:]), whole[:2, 4:])  # fewer sequences: the first ones go on
    core.reset()
    core(tokens[:1, :4])
    more = core(tokens[:, 4:])  # more: the others begin
    torch.testing.assert_close(more[0], whole[0, 4:])
    core.reset()
    torch.testing.assert_close(more[1:], core(tokens[:, 4:])[1:])
    assert not any(h.requires_grad for h in core.hidden)


def classifier(dls, folder, seed=0):
    clas = TextDataLoaders.from_df(texts(), text_col="text", label_col="label", valid_col="is_valid", text_vocab=dls.vocab, tok_tfm=BaseTokenizer(),
                                   bs=8, seq_len=12, device="cpu")
    set_seed(seed)
    return text_classifier_learner(clas, AWD_DARTS, seq_len=12, config=awd_darts_clas_config | SIZES, drop_mult=0.2, pretrained=False, path=folder)


def test_a_classifier_goes_on_from_a_saved_encoder(dls, tmp_path):
    lm = fitted(text_learner(dls, tmp_path))
    lm.save_encoder("encoder")
    learn = classifier(dls, tmp_path)
    assert not torch.equal(learn.model[0].module.rnns[0].W0, lm.model[0].rnns[0].W0)
    learn.load_encoder("encoder")
    groups = awd_darts_clas_split(learn.model)
    assert len(groups) == 3 and [all(p.requires_grad for p in group) for group in groups] == [False, False, True]
    kept = learn.model[0].module.rnns[0].Ws.detach().clone()
    assert torch.equal(kept, lm.model[0].rnns[0].Ws)
    fitted(learn)  # the head alone
    assert torch.equal(learn.model[0].module.rnns[0].Ws, kept)
    learn.unfreeze()
    fitted(learn, 3)
    assert not torch.equal(learn.model[0].module.rnns[0].Ws, kept)
    assert learn.recorder.values[-1][0] < learn.recorder.values[0][0]
    said, _, probabilities = learn.predict("a class definition is an executable statement")
    assert said in ("class", "other") and float(probabilities.sum()) == pytest.approx(1, abs=1e-5)
    learn.export("clas.pkl")
    assert load_learner(tmp_path / "clas.pkl").predict("a class definition is an executable statement")[0] == said


def test_a_retrained_language_model_becomes_an_encoder(dls, tmp_path):
    torch.manual_seed(0)
    words = ["<unk>", "<eos>", "class", "the", "zzz"]
    trained = LanguageModel.from_genotype(5, 12, SMALL)
    torch.nn.init.normal_(trained.decoder.bias)
    save_trained(tmp_path / "trained", trained, words)
    learn = text_learner(dls, tmp_path, **config_of(tmp_path / "trained", {}))
    assert load_trained_encoder(learn, tmp_path / "trained") is learn
    vectors, mean = learn.model[0].encoder.weight, trained.encoder.weight.mean(0)
    for word, expected in (("class", trained.encoder.weight[2]), ("the", trained.encoder.weight[3]), ("xxunk", trained.encoder.weight[0]),
                           ("import", mean)):
        torch.testing.assert_close(vectors[dls.vocab.index(word)], expected)
    bias, there = learn.model[1].decoder.bias, trained.decoder.bias
    assert [bias[dls.vocab.index(word)].item() for word in ("class", "xxbos", "import")] == pytest.approx([there[2].item(), there[1].item(), there.mean().item()])
    assert torch.equal(learn.model[0].rnns[0].W0, trained.rnn.W0) and learn.model[1].decoder.weight is vectors
    fitted(learn)
    with pytest.raises(ValueError, match=r"has 12 units in 1 layer of .*config=config_of"):
        load_trained_encoder(text_learner(dls, tmp_path, n_layers=2), tmp_path / "trained")


@pytest.mark.parametrize("tokenizer", [BaseTokenizer, WordTokenizer, SubwordTokenizer])
def test_any_fastai_language_model_dataloaders_can_be_searched_on(tmp_path, tokenizer):
    if tokenizer is SubwordTokenizer:
        pytest.importorskip("sentencepiece", reason="fastai's subword tokenizer needs sentencepiece")
        tokenizer = lambda: SubwordTokenizer(vocab_sz=200, cache_dir=tmp_path / "pieces")  # noqa: E731
    dls = language_dls(tokenizer(), 20)
    recipe = get_recipe("tiny")
    search = search_learner(dls, recipe, seed=1, path=tmp_path, cbs=[PrintGenotype(every=9)])
    start = search.model.lm.rnn.alpha.detach().clone()
    assert search.model.lm.vocab_size == len(dls.vocab)
    with search.no_bar(), search.no_logging():
        search.fit(1)
    moved = (search.model.lm.rnn.alpha - start).abs().max()
    assert moved > recipe.search.arch_lr and search.recorder.values[0][1] < torch.tensor(float(len(dls.vocab))).log() * 1.1
    learn = lm_learner(dls, search.model.genotype(), recipe, seed=1, path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    assert learn.recorder.values[0][1] < 1.1 * torch.tensor(float(len(dls.vocab))).log()
    assert json.loads(search.model.genotype().to_json())["recurrent"]


@pytest.mark.parametrize("options", [{"ignore_index": 0}, {"label_smoothing": 0.2}, {"weight": torch.linspace(0.5, 2, 7)}], ids=lambda o: next(iter(o)))
def test_the_loss_takes_what_fastais_takes(options):
    torch.manual_seed(0)
    dropped, weight, bias, targets = torch.randn(5, 3, 4), torch.randn(7, 4), torch.randn(7), torch.randint(7, (3, 5))  # (T, B, H), (V, H), (V), (B, T)
    decoded = (dropped @ weight.t() + bias).transpose(0, 1)  # (B, T, V)
    expected = CrossEntropyLossFlat(**options)(decoded, targets)
    for given in (decoded, DeferredLogits(dropped, weight, bias)):
        assert torch.allclose(SequenceLoss(**options)(given, targets), expected, rtol=1e-6)
        assert not torch.allclose(SequenceLoss()(given, targets), expected, rtol=1e-3)
    targets[0, :2] = -100  # what torch leaves out of a loss that says nothing else
    for given in (decoded, DeferredLogits(dropped, weight, bias)):
        assert torch.allclose(SequenceLoss()(given, targets), CrossEntropyLossFlat()(decoded, targets), rtol=1e-6)


def test_the_loss_refuses_another_axis():
    with pytest.raises(ValueError, match="^axis: .*-1 is the only one, not 1$"):
        SequenceLoss(axis=1)


OTHER_LOSSES = {"label smoothing": LabelSmoothingCrossEntropyFlat(eps=0.2), "focal": FocalLossFlat(),
                "torch's": lambda decoded, targets: F.cross_entropy(decoded.transpose(1, 2), targets),
                "with operators": lambda decoded, targets: F.cross_entropy((2 * decoded / 2.0 - 0).flatten(0, 1), targets.flatten()) + 0 * len(decoded),
                "torch's, from below": lambda decoded, targets: F.nll_loss(torch.log_softmax(decoded, -1)[:, 1:].flatten(0, 1), targets[:, 1:].flatten())}


@pytest.mark.parametrize("name", OTHER_LOSSES)
def test_another_loss_finds_logits(name, tmp_path):
    loss = OTHER_LOSSES[name]
    torch.manual_seed(0)
    dropped, weight, bias, targets = torch.randn(5, 3, 4), torch.randn(7, 4), torch.randn(7), torch.randint(7, (3, 5))  # (T, B, H), (V, H), (V), (B, T)
    decoded = (dropped @ weight.t() + bias).transpose(0, 1).contiguous()  # (B, T, V)
    assert torch.allclose(loss(DeferredLogits(dropped, weight, bias), targets), loss(decoded, targets), rtol=1e-6)
    learn = lm_learner(language_dls(n=30), SMALL, get_recipe("small", {"retrain.hidden_size": 8}), path=tmp_path)
    learn.loss_func = loss
    assert 0 < fitted(learn).recorder.values[0][0] < 10


class Look(Callback):
    def after_pred(self):
        with torch.no_grad():
            self.learn.pred.argmax(-1)


class Torchs(torch.nn.CrossEntropyLoss):
    def forward(self, decoded, targets):
        return super().forward(decoded.transpose(1, 2), targets)


def test_a_loss_learns_from_logits_that_somebody_has_looked_at(tmp_path):
    found = []
    for cbs in ([], [Look()]):
        set_seed(0)  # of the order of the texts
        learn = lm_learner(language_dls(n=30), SMALL, get_recipe("small", {"retrain.hidden_size": 8}), path=tmp_path, cbs=cbs)
        learn.loss_func = SequenceLoss(label_smoothing=0.1)
        found.append(fitted(learn).recorder.values[0][0])
    assert found[0] == found[1]


def test_tokens_that_the_loss_leaves_out_are_not_counted():
    torch.manual_seed(0)
    decoded, targets = torch.randn(6, 5, 7), torch.randint(1, 7, (6, 5))  # (B, T, V), (B, T)
    targets[:2, 1:] = targets[2] = 0
    for ours, whole, loss in ((TokenLoss(), lambda loss: loss, SequenceLoss(ignore_index=0)), (TokenPerplexity(), torch.exp, SequenceLoss(ignore_index=0)),
                              (TokenLoss(), lambda loss: loss, Torchs(ignore_index=0))):
        ours.reset()
        for rows in (slice(2), slice(2, 3), slice(3, 6)):  # 2, 0 and 15 tokens that count
            given, wanted = decoded[rows], targets[rows]
            ours.accumulate(SimpleNamespace(loss_func=loss, yb=(wanted,), loss=loss(given, wanted), bs=len(wanted)))
        assert float(ours.value) == pytest.approx(float(whole(loss(decoded, targets))), rel=1e-6)


def test_the_smoothed_loss_is_fastais():
    ours, fastais = SmoothLoss(), AvgSmoothLoss()
    for _ in range(2):  # as at the beginning of each training
        for meter in (ours, fastais):
            meter.reset()
        for loss in (3.0, 5.0, 1.0):
            for meter in (ours, fastais):
                meter.accumulate(SimpleNamespace(loss=torch.tensor(loss)))
            assert float(ours.value) == pytest.approx(float(fastais.value), rel=1e-6)


def test_operators_of_fastais_mixed_precision_and_of_two_answers_find_logits():
    torch.manual_seed(0)
    one, other = (DeferredLogits(torch.rand(5, 3, 4), torch.rand(7, 4), torch.rand(7)) for _ in range(2))
    precision = MixedPrecision()
    precision.learn = SimpleNamespace(pred=one)
    precision.after_pred()
    assert precision.learn.pred is one and "logits" not in vars(one)  # not made: the loss takes its rows by parts
    for operator in ("add", "sub", "mul", "truediv", "pow", "lt", "ge"):
        function = getattr(torch.Tensor, f"__{operator}__")
        assert torch.equal(getattr(one, f"__{operator}__")(other), function(one.logits, other.logits))
        assert torch.equal(getattr(one, f"__{operator}__")(2.0), function(one.logits, 2.0))
