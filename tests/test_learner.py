import hashlib
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.text.data import LMDataLoader

from nni_darts_rnn import extension, fused
from nni_darts_rnn.checkpoints.store import Checkpoints, Every
from nni_darts_rnn.corpus import EOS, UNK, Corpus, LengthRule, Vocabulary
from nni_darts_rnn.fastai_lm import StatefulLM
from nni_darts_rnn.fastai_streams import StreamLoader, already_trained
from nni_darts_rnn.genotype import Genotype
from nni_darts_rnn.learner import language_dls, lm_learner, retrain, search_learner
from nni_darts_rnn.model import LanguageModel, perplexity
from nni_darts_rnn.recipes import get_recipe

CELL = Genotype((("tanh", 0), ("relu", 1), ("sigmoid", 0)))
TINY = get_recipe("tiny", {"retrain.hidden_size": 6, "retrain.batch_size": 4, "retrain.eval_batch_size": 3, "retrain.test_batch_size": 1,
                           "search.hidden_size": 6, "search.n_nodes": 2, "search.batch_size": 4, "search.eval_batch_size": 2})


def corpus(n=200, seed=0) -> Corpus:
    """A text with something to learn: each word mostly follows the one before it in the alphabet."""
    draw = np.random.default_rng(seed)
    tokens = (np.cumsum(draw.choice(3, n + 150, p=(0.1, 0.8, 0.1))) % 10).astype(np.int64)
    return Corpus("letters", Vocabulary((EOS, UNK, *"abcdefgh")), *torch.from_numpy(tokens).split((n, 80, 70)))


def quiet_fit(learn, epochs=1, **kwargs):
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs, **kwargs)
    return learn


def language_model(**dropouts) -> LanguageModel:
    torch.manual_seed(1)
    lm = LanguageModel.from_genotype(10, 6, CELL, **dropouts).double()
    for p in lm.parameters():
        torch.nn.init.normal_(p, std=0.7)
    return lm


def test_hidden_state_is_carried_from_batch_to_batch():
    lm = language_model()
    tokens = torch.randint(10, (9, 3))  # (T, B)
    decoded, raw, dropped, _ = lm(tokens, lm.init_hidden(3))
    model = StatefulLM(lm).eval()
    for piece, a, b, c in zip(tokens.split((4, 1, 4)), decoded.split((4, 1, 4)), raw.split((4, 1, 4)), dropped.split((4, 1, 4))):
        for got, expected in zip(model(piece.t()), (a, b, c)):
            assert torch.allclose(got, expected.transpose(0, 1), rtol=1e-12)
    assert not model.hidden.requires_grad
    model.reset()
    assert torch.allclose(model(tokens[:4].t())[0], decoded[:4].transpose(0, 1), rtol=1e-12)
    other = torch.randint(10, (4, 2))  # another number of streams starts from zeros
    assert torch.allclose(model(other.t())[0], lm(other, lm.init_hidden(2)).decoded.transpose(0, 1), rtol=1e-12)
    assert "hidden" not in model.state_dict()


class HiddenBefore(Callback):
    """Sum of |hidden| before every batch, per phase of every epoch."""

    def __init__(self):
        self.phases = []

    def before_train(self):
        self.phases.append([])

    def before_validate(self):
        self.phases.append([])

    def before_batch(self):
        same_size = len(self.learn.model.hidden) == len(self.xb[0])
        self.phases[-1].append(float(self.learn.model.hidden.abs().sum()) if same_size else 0.0)


def test_hidden_state_is_zero_at_the_start_of_each_pass_and_only_there(tmp_path):
    recipe = get_recipe(TINY, {"retrain.eval_batch_size": 4}).retrain  # one size for both, or a change of size would hide a missing reset
    learn = quiet_fit(lm_learner(language_dls(corpus(), recipe, 0, "cpu", tmp_path), CELL, recipe, cbs=[watch := HiddenBefore()]), 2)
    assert len(watch.phases) == 4
    for first, *others in watch.phases:
        assert first == 0 and others and all(others)
    assert float(learn.model.hidden.abs().sum()) == 0


def test_loss_is_the_language_models(tmp_path):
    recipe = TINY.retrain
    learn = lm_learner(language_dls(corpus(), recipe, 0, "cpu", tmp_path), CELL, recipe)
    x, y = next(iter(learn.dls.train))
    torch.manual_seed(0)
    loss = learn.loss_func(learn.model(x)[0], y)
    torch.manual_seed(0)
    assert torch.allclose(loss, learn.model.lm.loss(x.t(), y.t(), learn.model.lm.init_hidden(len(x)))[0], rtol=1e-6)
    learn.loss_func.reduction = "none"
    learn.model.eval()
    assert learn.loss_func(learn.model(x)[0], y).shape == (y.numel(),)


def test_train_batches_are_views_whose_lengths_change_each_epoch(tmp_path):
    recipe = TINY.retrain
    dls = language_dls(corpus(), recipe, 0, "cpu", tmp_path)
    assert list(dls.vocab) == [EOS, UNK, *"abcdefgh"]
    epochs = [list(dls.train) for _ in range(3)]
    for batches in epochs:
        text = torch.cat([x for x, _ in batches], 1)  # (B, S-1)
        assert torch.equal(text, corpus().train.view(recipe.batch_size, -1)[:, :-1])
        assert torch.equal(torch.cat([y for _, y in batches], 1), corpus().train.view(recipe.batch_size, -1)[:, 1:])
    lengths = [[x.shape[1] for x, _ in batches] for batches in epochs]
    assert lengths[0] != lengths[1] != lengths[2]
    assert {x.untyped_storage().data_ptr() for x, _ in epochs[0]} == {dls.train.dataset.stream.untyped_storage().data_ptr()}
    again = language_dls(corpus(), recipe, 0, "cpu", tmp_path)
    again.train.set_epoch(2)
    assert [x.shape[1] for x, _ in again.train] == lengths[2]
    assert [x.shape[1] for x, _ in dls.valid] == [x.shape[1] for x, _ in dls.valid] == [8, 8, 8, 1]
    assert isinstance(dls.valid.new(shuffle=False, drop_last=False), StreamLoader)


def test_loaders_read_what_the_recipe_says(tmp_path):
    recipe = TINY.retrain
    dls = language_dls(corpus(), recipe, 5, "cpu", tmp_path)
    assert dls.path == tmp_path and not hasattr(dls, "arch")
    assert dls.train.dataset.rule == LengthRule(recipe.bptt, recipe.short_bptt_probability, recipe.bptt_std, recipe.min_bptt, recipe.bptt + recipe.max_bptt_above)
    assert dls.train.dataset.seed == 5 and dls.valid.dataset.rule == LengthRule(recipe.bptt)
    search = language_dls(corpus(), TINY.search, 5, "cpu", tmp_path)
    assert search.train.dataset.rule == search.arch.dataset.rule == LengthRule(TINY.search.bptt, TINY.search.short_bptt_probability)
    assert search.arch.dataset.seed != search.train.dataset.seed


def test_a_loader_goes_on_in_the_middle_of_an_epoch(tmp_path):
    whole, loader = (language_dls(corpus(), TINY.retrain, 0, "cpu", tmp_path).train for _ in range(2))
    epochs = [[x for x, _ in whole] for _ in range(3)]
    loader.go_on(1, 3)
    assert len(loader) == len(epochs[1]) - 3 and already_trained(loader) == 3 and already_trained(DataLoader(range(4))) == 0
    for expected in (epochs[1][3:], epochs[2]):
        assert all(map(torch.equal, [x for x, _ in loader], expected))
        assert already_trained(loader) == 0
    assert len(loader) == len(loader.dataset)


def test_validation_loss_and_perplexity_are_those_of_a_slow_reading(tmp_path):
    recipe = TINY.retrain
    learn = quiet_fit(lm_learner(language_dls(corpus(), recipe, 0, "cpu", tmp_path), CELL, recipe), 2)
    lm = learn.model.lm.eval()
    text = corpus().valid[:26 * 3].view(3, 26)
    nats = []
    with torch.no_grad():
        for stream in text:  # one stream, one word at a time
            hidden = lm.init_hidden(1)
            for word, following in zip(stream, stream[1:]):
                decoded, *_, hidden = lm(word.view(1, 1), hidden)
                nats.append(-torch.log_softmax(decoded[0, 0].double(), -1)[following])
    expected = torch.stack(nats).mean().exp().item()
    assert perplexity(lm, corpus().valid, 3, 8) == pytest.approx(expected, rel=1e-6)
    valid_loss, metric = learn.validate()
    assert metric == pytest.approx(expected, rel=1e-6) and np.exp(valid_loss) == pytest.approx(expected, rel=1e-6)


def fingerprint(folder) -> list[str]:
    """A retraining with averaging and a search: their weights' hash and the test perplexity."""
    recipe = get_recipe(TINY, {"retrain.nonmono": 1, "retrain.lr": 40.0, "retrain.epochs": 4}).retrain
    fused.enable(False)  # which an earlier test may have turned on in this process alone
    torch.seed()  # the state before does not matter
    outcome = retrain(corpus(), CELL, recipe, 5, folder)
    torch.seed()
    found = quiet_fit(search_learner(language_dls(corpus(), TINY.search, 5, "cpu", folder), TINY, seed=5))
    tensors = [*outcome["model"].state_dict().values(), *found.model.state_dict().values()]
    digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()
    return [digest, str(outcome["test_perplexity"]), str(outcome["learner"].ntasgd.averaging)]


def test_the_same_seed_gives_the_same_bits_in_another_process_and_nni_is_not_imported(tmp_path):
    here = Path(__file__).parent
    program = (f"import sys; sys.path.insert(0, {str(here)!r}); import torch; torch.set_num_threads({torch.get_num_threads()})\n"
               f"from test_learner import fingerprint; print(*fingerprint({str(tmp_path / 'other')!r}), 'nni' in sys.modules)")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=120, cwd=here.parent)
    assert done.returncode == 0, done.stderr
    random.seed(99)  # nothing depends on Python's own generator
    assert done.stdout.split()[-4:] == [*fingerprint(tmp_path / "here"), "False"]


def test_another_seed_gives_other_weights(tmp_path):
    recipe = TINY.retrain
    a, b, c = (quiet_fit(lm_learner(language_dls(corpus(), recipe, seed, "cpu", tmp_path), CELL, recipe, seed=seed)).model.lm for seed in (1, 1, 2))
    assert torch.equal(a.encoder.weight, b.encoder.weight) and torch.equal(a.rnn.Ws, b.rnn.Ws)
    assert not torch.equal(a.rnn.Ws, c.rnn.Ws)


def test_retrain_learns_keeps_the_best_model_and_tests_it(tmp_path):
    rows = []
    recipe = get_recipe(TINY, {"retrain.epochs": 6, "retrain.lr": 10.0, "retrain.hidden_size": 12}).retrain
    outcome = retrain(corpus(1500), CELL, recipe, 0, tmp_path / "new", rows.append)
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5, 6] and outcome["epochs"] == 6
    assert outcome["valid_perplexity"] == pytest.approx(min(row["default"] for row in rows), rel=1e-6)
    assert outcome["valid_perplexity"] < 5 and outcome["test_perplexity"] < 5  # 10 words; the text's own is exp(0.64) = 1.9
    assert outcome["test_perplexity"] == perplexity(outcome["model"], corpus(1500).test, 1, recipe.bptt)
    assert outcome["parameters"] == 10 * 12 + 10 + 24 * 24 + 3 * 12 * 24
    assert outcome["model"] is outcome["learner"].model.lm
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["retrain.csv"]
    lines = (tmp_path / "new" / "retrain.csv").read_text().splitlines()
    assert lines[0].startswith("phase,epoch,perplexity,train_loss,") and [line.split(",")[1] for line in lines[1:]] == list("123456")


def test_the_learner_of_a_retraining_is_the_callers(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "temporary").mkdir()
    outcome = retrain(corpus(), CELL, TINY.retrain, 0, tmp_path / "new")
    learn = outcome["learner"]
    with learn.no_bar(), learn.no_logging():
        assert math.exp(learn.validate()[0]) == pytest.approx(outcome["valid_perplexity"], rel=1e-5)
        learn.fit(1)
    assert not list((tmp_path / "temporary").iterdir())


def test_training_ends_once_validation_no_longer_improves(tmp_path):
    recipe = get_recipe(TINY, {"retrain.epochs": 300, "retrain.lr": 10.0, "retrain.nonmono": 1, "retrain.patience": 3}).retrain
    store = Checkpoints(tmp_path / "kept", "retrain", {}, Every())
    ended = retrain(corpus(400), CELL, recipe, 0, tmp_path, store=store)
    values = [row["perplexity"] for row in ended["rows"]]
    assert 4 < len(values) < 300 and values.index(min(values)) == len(values) - 1 - 3
    assert ended["valid_perplexity"] == pytest.approx(min(values), rel=1e-6)
    # one that was cut off after its last epoch does not train any more
    again = retrain(corpus(400), CELL, recipe, 0, tmp_path, store=store)
    assert [row["perplexity"] for row in again["rows"]] == values
    assert all(torch.equal(a, b) for a, b in zip(ended["model"].parameters(), again["model"].parameters()))


def test_a_diverged_retraining_says_so(tmp_path):
    recipe = get_recipe(TINY, {"retrain.lr": 1e30, "retrain.clip": None}).retrain
    with pytest.raises(FloatingPointError, match="lower retrain.lr"):
        retrain(corpus(), CELL, recipe, 0, tmp_path)


def test_no_clipping(tmp_path):
    recipe = get_recipe(TINY, {"retrain.clip": None, "retrain.lr": 0.1}).retrain
    learn = lm_learner(language_dls(corpus(), recipe, 0, "cpu", tmp_path), "DARTS_V1", recipe)
    assert not hasattr(learn, "gradient_clip")
    quiet_fit(learn)


def test_weights_that_are_part_of_something_larger(tmp_path):
    """Such as the first columns of ready-made vectors: they learn as others do, and what lies between them stays."""
    ends = []
    for whole in (True, False):
        torch.manual_seed(0)
        model, vectors = language_model().float(), torch.randn(10, 12) / 20
        before, part = vectors.clone(), vectors[:, :6]
        model.encoder.weight = model.decoder.weight = torch.nn.Parameter(part.contiguous() if whole else part)
        learn = lm_learner(language_dls(corpus(), TINY.retrain, 0, "cpu"), model, TINY.retrain, path=tmp_path)
        quiet_fit(learn)
        assert torch.equal(vectors[:, 6:], before[:, 6:])
        ends.append(model.encoder.weight.detach().clone())
    assert torch.equal(*ends) and not torch.equal(ends[0], before[:, :6])


def test_a_retraining_has_the_text_that_alpha_learnt_from(tmp_path):
    split, whole = corpus(), corpus()
    split.train, split.alpha, split.undivided = whole.train[:120], whole.train[120:], whole.train
    rows, ends = [], []
    for text in (split, whole):
        done = retrain(text, CELL, TINY.retrain, 1, tmp_path, device="cpu")
        rows.append([row["train_loss"] for row in done["rows"]])
        ends.append(done["test_perplexity"])
    assert rows[0] == rows[1] and ends[0] == ends[1]
    text = [language_dls(split, recipe).train.stream.numel() for recipe in (TINY.search, TINY.retrain)]
    assert text == [120, 200]


def fastai_dls(batch_size=4) -> DataLoaders:
    """fastai's own language-model loaders over numericalised documents."""
    texts = [list(corpus(300).train.split(50)), list(corpus().valid.split(40))]
    return DataLoaders(*(LMDataLoader(t, bs=batch_size, seq_len=11) for t in texts), device=torch.device("cpu"))


def test_any_fastai_language_model_loaders_do(tmp_path):
    dls = fastai_dls()
    with pytest.raises(ValueError, match="vocab_size"):
        lm_learner(dls, CELL, TINY)
    dls.vocab = [str(i) for i in range(10)]
    learn = quiet_fit(lm_learner(dls, CELL, TINY, path=tmp_path), 2)
    assert learn.scale_lr_by_length.bptt == 11
    first, last = (values[1] for values in learn.recorder.values)
    assert np.isfinite(first) and last < first
    found = search_learner(dls, TINY, path=tmp_path)
    start = found.model.lm.rnn.alpha.detach().clone()
    quiet_fit(found)
    assert not torch.equal(found.model.lm.rnn.alpha, start) and found.genotype().n_nodes == 2


@pytest.mark.filterwarnings("ignore")
def test_a_search_is_nnis_search(tmp_path):
    """From the same weights, α and random state, one `Learner.fit` and NNI's route take the same steps; in float64, as sums run differently."""
    pytest.importorskip("nni")
    from nni_darts_rnn.evaluator import search_evaluator
    from nni_darts_rnn.search import make_space, make_strategy

    recipe = get_recipe(TINY, {"search.ar": 0.1, "search.short_bptt_probability": 0.3, "search.epochs": 2, "search.warmup_epochs": 1}).search
    strategy = make_strategy(recipe)
    supernet = strategy.mutate_model(make_space(10, recipe))
    evaluator = search_evaluator(corpus(), recipe, 3, max_epochs=2, precision="64-true", accelerator="cpu", devices=1,
                                 enable_progress_bar=False)
    evaluator = strategy.mutate_evaluator(evaluator)
    learn = search_learner(language_dls(corpus(), recipe, 3, "cpu", tmp_path), recipe)
    learn.model.load_state_dict(supernet.state_dict())
    learn.model.double()
    learn.remove_cbs([learn.recorder, learn.metrics_csv])  # fastai's smoothed loss is float32 only
    start = learn.model.lm.rnn.alpha.detach().clone()
    torch.manual_seed(7)
    evaluator.evaluate(supernet)
    torch.manual_seed(7)
    quiet_fit(learn, 2)
    assert (learn.model.lm.rnn.alpha - start).abs().max() > recipe.arch_lr
    for name, theirs in supernet.state_dict().items():
        assert theirs.dtype == torch.float64 and torch.allclose(learn.model.state_dict()[name], theirs, rtol=0, atol=1e-8), name


@pytest.mark.filterwarnings("ignore")
def test_a_search_of_so_many_steps(tmp_path):
    """-1 epochs are Lightning's word for no end."""
    pytest.importorskip("nni")
    from nni_darts_rnn.evaluator import search_evaluator
    from nni_darts_rnn.search import make_space, make_strategy

    def evaluator(**settings):
        recipe = get_recipe(TINY, {f"search.{name}": value for name, value in settings.items()}).search
        return recipe, search_evaluator(corpus(), recipe, 3, max_epochs=-1, max_steps=3, accelerator="cpu", devices=1, enable_progress_bar=False)

    recipe, made = evaluator()
    strategy = make_strategy(recipe)
    supernet = strategy.mutate_model(make_space(10, recipe))
    made = strategy.mutate_evaluator(made)
    made.evaluate(supernet)
    assert made.trainer.global_step in (3, 4)  # the steps of both optimizers count
    with pytest.raises(ValueError, match="search.anneal: the learning rate falls over the last 0.5 of all epochs, whose number is not known; give max_epochs"):
        evaluator(anneal=0.5)


@pytest.mark.parametrize("fast, tiles", [(False, True), (False, False), (True, True), (True, False)])
def test_a_training_in_bfloat16_keeps_weights_and_measures_perplexity_in_float32(fast, tiles, tmp_path, monkeypatch):
    """Without tiles the products are float32's throughout: in bfloat16 torch's own would take longer, and the compiled ones are none."""
    losses, was = [], fused.enabled()
    fused.enable(fast)
    if fast and not fused.available():
        pytest.skip("no compiler here")
    if fast and tiles and not extension.State.loaded.rounds:
        pytest.skip("this processor or this compiler has no AMX")
    if fast:
        monkeypatch.setattr(extension.State.loaded, "rounds", tiles)
    else:
        monkeypatch.setattr(extension, "processor", lambda: "flags : fpu amx_bf16 amx_tile" if tiles else "flags : fpu avx2")
    try:
        for precision in ("float32", "bfloat16"):
            recipe = get_recipe(TINY, {"retrain.precision": precision, "retrain.hidden_size": 32}).retrain
            learn = quiet_fit(lm_learner(language_dls(corpus(2000), recipe), CELL, recipe, seed=1, path=tmp_path))
            assert {p.dtype for p in learn.model.parameters()} == {torch.float32} and not torch.is_autocast_enabled("cpu")
            decoded, _, dropped = learn.model.eval()(learn.dls.valid.one_batch()[0])
            assert decoded.dtype == torch.float32 and torch.allclose(decoded, learn.model.lm.decoder(dropped), rtol=0, atol=1e-5)
            losses.append([float(loss) for loss in learn.recorder.losses])
    finally:
        fused.enable(was)
    assert (losses[0] == losses[1]) == (not tiles) and np.allclose(*losses, rtol=1e-2)
