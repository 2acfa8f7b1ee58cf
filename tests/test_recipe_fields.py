"""Every field of a recipe reaches the place where it acts, through NNI's route and through fastai's; the named cells train and evaluate."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from nni_darts_rnn.corpus import Corpus, Vocabulary
from nni_darts_rnn.genotype import NAMED
from nni_darts_rnn.recipes import RetrainRecipe, SearchRecipe, get_recipe, override

SEARCH = dict(hidden_size=6, n_nodes=2, batch_size=4, eval_batch_size=3, bptt=7, short_bptt_probability=0.4, lr=3.0, weight_decay=1e-3, clip=0.7,
              dropout=0.11, dropout_h=0.12, dropout_x=0.13, dropout_i=0.14, dropout_e=0.15, init_range=0.5, ar=0.2, tar=0.3, anneal=0.8, epochs=9, arch_lr=0.02,
              arch_weight_decay=0.03, arch_beta1=0.4, arch_beta2=0.5, relaxation="node", hvp="exact", epsilon=0.06, unrolled_lr=0.07, neumann_terms=2, warmup_epochs=3,
              alpha_dropout=False, own_gradient=True, reproduce_original=False, optimizer="sgd", draws=1)
WITH_ADAM = SEARCH | dict(optimizer="adam", lr=0.03, neumann_terms=0)
DRAWN = SEARCH | dict(relaxation="gumbel", draws=3)  # which goes with no other relaxation
ORIGINAL = SEARCH | dict(hvp="finite_difference", neumann_terms=0, reproduce_original=True)  # which goes with no other gradient
RETRAIN = dict(hidden_size=6, batch_size=4, eval_batch_size=3, test_batch_size=2, bptt=7, short_bptt_probability=0.4, bptt_std=1.5, min_bptt=3,
               max_bptt_above=2, lr=3.0, weight_decay=1e-3, clip=0.7, dropout=0.11, dropout_h=0.12, dropout_x=0.13, dropout_i=0.14, dropout_e=0.15,
               init_range=0.5, ar=0.2, tar=0.3, anneal=0.6, nonmono=4, epochs=1, patience=None, precision="bfloat16", optimizer="sgd")
ADAM = RETRAIN | dict(optimizer="adam", lr=0.03, nonmono=None)


def corpus(n: int = 200) -> Corpus:
    words = ("<eos>", "<unk>", *(f"w{i}" for i in range(8)))
    generator = torch.Generator().manual_seed(0)
    return Corpus("made", Vocabulary(words), *(torch.randint(0, len(words), (k,), generator=generator) for k in (n, n // 2, n // 2)))


def lm_fields(lm) -> dict:
    """What a language model says of the fields that shape it."""
    return {"hidden_size": lm.hidden_size, "dropout": lm.dropout, "dropout_i": lm.dropout_i, "dropout_e": lm.dropout_e,
            "dropout_h": lm.rnn.dropout_h, "dropout_x": lm.rnn.dropout_x, "init_range": first_weights(lm)}


def first_weights(lm) -> float:
    """The range that all the weights of a new model lie in, found from the weights themselves; at 6 units each matrix comes within 10 % of it."""
    largest = [float(w.detach().abs().max()) for w in (lm.encoder.weight, lm.rnn.W0, lm.rnn.Ws)]
    rounded = {round(value, 1) for value in largest}
    assert len(rounded) == 1 and max(largest) <= lm.rnn.init_range, largest
    return rounded.pop()


def test_the_tables_name_every_field():
    assert set(SEARCH) == {f.name for f in dataclasses.fields(SearchRecipe)} and set(RETRAIN) == {f.name for f in dataclasses.fields(RetrainRecipe)}
    paper = get_recipe("penn")
    search = SEARCH | {"optimizer": WITH_ADAM["optimizer"], "draws": DRAWN["draws"]}
    assert all(search[k] != getattr(paper.search, k) for k in search if k != "reproduce_original") and ORIGINAL["reproduce_original"]
    retrain = RETRAIN | {"optimizer": ADAM["optimizer"]}
    assert all(retrain[k] != getattr(paper.retrain, k) for k in retrain if k != "patience")  # which goes without `anneal`: see below


@pytest.mark.parametrize("settings", [SEARCH, WITH_ADAM, DRAWN, ORIGINAL], ids=["search", "adam", "drawn", "original"])
def test_search_through_nni(settings):
    from nni_darts_rnn.evaluator import AnnealLR, SupernetReport, search_evaluator
    from nni_darts_rnn.search import make_space, make_strategy

    recipe = override(SearchRecipe(), settings)
    space, strategy = make_space(10, recipe), make_strategy(recipe)
    evaluator = search_evaluator(corpus(), recipe, accelerator="cpu")
    step = strategy.configure_oneshot_module(evaluator.module)
    strategy.mutate_model(space)
    step.set_model(space)
    reporter, annealing = (next(c for c in evaluator.trainer.callbacks if isinstance(c, kind)) for kind in (SupernetReport, AnnealLR))
    of_weights = evaluator.module.configure_optimizers()
    adam, weights = step.configure_architecture_optimizers().defaults, of_weights.defaults
    train, valid = evaluator.train_dataloaders.batches, evaluator.val_dataloaders.batches
    found = lm_fields(space.lm) | {
        "n_nodes": space.lm.rnn.n_nodes, "relaxation": space.lm.rnn.relaxation, "draws": space.lm.rnn.draws, "batch_size": train.stream.shape[1], "eval_batch_size": reporter.recipe.eval_batch_size,
        "bptt": train.rule.bptt, "short_bptt_probability": train.rule.short_probability, "lr": weights["lr"], "weight_decay": weights["weight_decay"],
        "clip": step.gradient_clip_val, "ar": evaluator.module.ar, "tar": evaluator.module.tar, "anneal": annealing.share, "epochs": evaluator.trainer.max_epochs,
        "arch_lr": adam["lr"], "arch_weight_decay": adam["weight_decay"], "arch_beta1": adam["betas"][0], "arch_beta2": adam["betas"][1],
        "hvp": step.hvp, "epsilon": step.epsilon, "unrolled_lr": step.unrolled_lr, "neumann_terms": step.neumann_terms,
        "warmup_epochs": step.warmup_epochs, "alpha_dropout": evaluator.module.alpha_dropout, "own_gradient": step.own_gradient,
        "reproduce_original": step.reproduce_original, "optimizer": type(of_weights).__name__.lower()}
    assert found == settings
    assert valid.rule == train.rule and valid.stream.shape[1] == 4 and evaluator.module.bptt == 7
    assert evaluator.module.hidden_train.shape == evaluator.module.hidden_valid.shape == (4, 6)


@pytest.mark.parametrize("settings", [SEARCH, WITH_ADAM, DRAWN, ORIGINAL], ids=["search", "adam", "drawn", "original"])
def test_search_through_fastai(tmp_path, settings):
    from fastai.callback.training import GradientClip

    from nni_darts_rnn.callbacks import ActivationRegularizer, AnnealLR, ArchParamUpdate, ScaleLRByLength
    from nni_darts_rnn.learner import language_dls, search_learner

    recipe = override(SearchRecipe(), settings)
    (tmp_path / "texts").mkdir()
    learn = search_learner(language_dls(corpus(), recipe, 0, "cpu", tmp_path / "texts"), recipe, path=tmp_path)
    of = {kind: next(cb for cb in learn.cbs if isinstance(cb, kind)) for kind in (GradientClip, ActivationRegularizer, AnnealLR, ArchParamUpdate, ScaleLRByLength)}
    learn.create_opt()
    rule, step, rnn = learn.dls.train.dataset.rule, of[ArchParamUpdate], learn.model.lm.rnn
    found = lm_fields(learn.model.lm) | {
        "n_nodes": rnn.n_nodes, "relaxation": rnn.relaxation, "draws": rnn.draws, "batch_size": learn.dls.train.dataset.stream.shape[1],
        "eval_batch_size": learn.dls.valid.dataset.stream.shape[1], "bptt": rule.bptt, "short_bptt_probability": rule.short_probability, "lr": learn.lr,
        "weight_decay": learn.wd, "clip": of[GradientClip].max_norm, "ar": of[ActivationRegularizer].alpha, "tar": of[ActivationRegularizer].beta,
        "anneal": of[AnnealLR].share, "arch_lr": step.adam["lr"], "arch_weight_decay": step.adam["weight_decay"], "arch_beta1": step.adam["betas"][0],
        "arch_beta2": step.adam["betas"][1], "hvp": step.hvp, "epsilon": step.epsilon, "unrolled_lr": step.unrolled_lr, "neumann_terms": step.neumann_terms,
        "warmup_epochs": step.warmup_epochs, "alpha_dropout": step.alpha_dropout, "own_gradient": step.own_gradient,
        "reproduce_original": step.reproduce_original, "optimizer": type(learn.opt.opt).__name__.lower()}
    assert found == {k: v for k, v in settings.items() if k != "epochs"}
    assert of[ScaleLRByLength].bptt == 7 and step.valid_batches.dataset.stream.shape[1] == 4 and learn.path == tmp_path


@pytest.mark.parametrize("settings", [RETRAIN, ADAM], ids=["sgd", "adam"])
def test_retraining_through_fastai(tmp_path, settings):
    from fastai.callback.training import GradientClip

    from nni_darts_rnn.callbacks import NTASGD, ActivationRegularizer, AnnealLR, ScaleLRByLength
    from nni_darts_rnn.learner import language_dls, lm_learner, retrain

    recipe = override(RetrainRecipe(), settings)
    learn = lm_learner(language_dls(corpus(), recipe, 0, "cpu", tmp_path), "DARTS_V1", recipe, path=tmp_path)
    of = {kind: next(cb for cb in learn.cbs if isinstance(cb, kind)) for kind in (GradientClip, NTASGD, ActivationRegularizer, AnnealLR, ScaleLRByLength)}
    learn.create_opt()
    rule, valid = learn.dls.train.dataset.rule, learn.dls.valid.dataset
    found = lm_fields(learn.model.lm) | {
        "batch_size": learn.dls.train.dataset.stream.shape[1], "eval_batch_size": valid.stream.shape[1], "bptt": rule.bptt,
        "short_bptt_probability": rule.short_probability, "bptt_std": rule.std, "min_bptt": rule.minimum, "max_bptt_above": rule.maximum - rule.bptt,
        "lr": learn.lr, "weight_decay": learn.wd, "clip": of[GradientClip].max_norm, "ar": of[ActivationRegularizer].alpha,
        "tar": of[ActivationRegularizer].beta, "nonmono": of[NTASGD].nonmono, "anneal": of[AnnealLR].share, "precision": learn.model.precision,
        "optimizer": type(learn.opt.opt).__name__.lower()}
    assert found == {k: v for k, v in settings.items() if k not in ("test_batch_size", "epochs", "patience")}
    assert of[ScaleLRByLength].bptt == 7 and valid.rule.bptt == 7 and valid.rule.std == 0
    patient = lm_learner(language_dls(corpus(), recipe, 0, "cpu", tmp_path), "DARTS_V1", override(recipe, {"anneal": 0, "patience": 6}), path=tmp_path)
    assert not hasattr(patient, "anneal_lr")
    for after, said in ((5, False), (6, True)):
        patient.ntasgd.logs = [3.0, 1.0] + [2.0] * after
        assert patient.converged() == said
    # the two that only `retrain` sees: the test text in so many streams, for so many epochs
    done = retrain(corpus(), "DARTS_V1", recipe, 0, tmp_path / "a")
    assert done["epochs"] == 1
    more = retrain(corpus(), "DARTS_V1", override(recipe, {"test_batch_size": 5}), 0, tmp_path / "b")
    assert more["valid_perplexity"] == done["valid_perplexity"] and more["test_perplexity"] != done["test_perplexity"]


@pytest.mark.parametrize("name", NAMED)
def test_named_cells_train_and_evaluate(name, tmp_path):
    from nni_darts_rnn.learner import retrain

    recipe = get_recipe("tiny", {"retrain.epochs": 2, "retrain.lr": 2.0, "retrain.eval_batch_size": 4, "retrain.test_batch_size": 2,
                                 "retrain.batch_size": 4}).retrain
    rows = []
    done = retrain(corpus(400), name, recipe, 0, tmp_path, rows.append)
    assert done["model"].rnn.genotype == NAMED[name] and len(rows) == 2
    assert 1 < done["test_perplexity"] < 20  # ten words at random
