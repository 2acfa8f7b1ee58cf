"""Two fastai `Learner`s, one that trains a genotype as a language model and one whose `fit` is a search; and the whole retraining of a cell."""

from __future__ import annotations

import contextlib
import random
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from fastai.callback.progress import ProgressCallback  # noqa: F401 (the import adds the bar to fastai's default callbacks)
from fastai.callback.rnn import ModelResetter, RNNCallback
from fastai.callback.training import GradientClip
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper

from .callbacks import (
    NTASGD,
    ActivationRegularizer,
    AnnealLR,
    ArchParamUpdate,
    BestModel,
    EpochReport,
    FiniteNumbers,
    MetricsCSV,
    PerplexityInBar,
    ScaleLRByLength,
    weight_parameters,
)
from .checkpoints.retrain import ResumableLearner, RetrainCheckpoints
from .checkpoints.stopping import Stopped, Terminated, stop_requests
from .checkpoints.store import Checkpoints, Every
from .corpus import Corpus
from .fastai_lm import SequenceLoss, SmoothLoss, StatefulLM, TokenLoss, TokenPerplexity
from .fastai_streams import language_dls
from .files import PARTIAL
from .genotype import Genotype, load_genotype
from .health import name_poor, with_rollbacks
from .model import LanguageModel, number_of_parameters, perplexity
from .recipes import Recipe, RetrainRecipe, SearchRecipe, get_recipe
from .supernet import MixedRNN
from .weight_step import OPTIMIZERS

__all__ = ["language_dls", "lm_learner", "search_learner", "retrain"]


def _learner(dls, model: StatefulLM, recipe, path, cbs, metrics_file: str | None, **kwargs) -> Learner:
    """A Learner with what both share: optimizer, hidden state, AR/TAR, clipping, annealing, learning rate × length, a check for NaN, perplexity, CSV."""
    words, V = getattr(dls, "vocab", None), model.lm.vocab_size
    if words is not None and len(words) > V:
        raise ValueError(f"vocab_size: the model has {V} words, but the DataLoaders have {len(words)}")
    steps = getattr(dls.train, "seq_len", recipe.bptt)  # fastai's own loaders have a fixed length; that is then the usual one
    own = [ModelResetter(), RNNCallback(), ActivationRegularizer(alpha=recipe.ar, beta=recipe.tar), ScaleLRByLength(steps)]
    if recipe.clip is not None:
        own.append(GradientClip(recipe.clip))
    if recipe.anneal:
        own.append(AnnealLR(recipe.anneal))
    own.append(FiniteNumbers())
    if metrics_file is not None:
        own.append(MetricsCSV(metrics_file))
    # fused: weight decay and step in one pass. The pass runs straight through a weight's memory (torch 2.14), where a view with gaps has other tensors' numbers
    optimizer = partial(OPTIMIZERS[recipe.optimizer], fused=all(p.is_contiguous() for p in model.parameters()))
    learn = ResumableLearner(dls, model, loss_func=SequenceLoss(), opt_func=partial(OptimWrapper, opt=optimizer), lr=recipe.lr, wd=recipe.weight_decay,
                             metrics=TokenPerplexity(), path=path, cbs=[*own, *cbs], **kwargs)
    learn.recorder.loss, learn.recorder.smooth_loss = TokenLoss(), SmoothLoss()
    return learn


def _dropouts(recipe) -> dict[str, float]:
    return {name: getattr(recipe, name) for name in ("dropout", "dropout_i", "dropout_e")}


def _vocab_size(dls, vocab_size: int | None) -> int:
    if vocab_size is None:
        vocab = getattr(dls, "vocab", None)
        if vocab is None:
            raise ValueError("the DataLoaders have no vocab: give vocab_size")
        return len(vocab)
    return vocab_size


def lm_learner(dls, genotype: Genotype | str | LanguageModel, recipe: RetrainRecipe | Recipe | str = "penn", *, seed: int = 0,
               path: str | Path | None = None, cbs=(), vocab_size: int | None = None, metrics_file: str | None = "history.csv") -> Learner:
    """A Learner for the genotype's cell as an AWD language model with tied embedding and decoder. `learn.fit(recipe.epochs)` then trains it by the recipe.

    `dls` is from `language_dls`, or any fastai language-model DataLoaders. `genotype` and `recipe` may be names. A `LanguageModel` in place of a
    genotype is trained as it is, with its own size and dropout rates. After `fit` the model is the one that was best on validation (with averaged
    weights, once NT-ASGD averages). It is also saved in `path/models/best.pth`. The metrics are in `path/history.csv` (`metrics_file`; None: no file).
    torch's random state is set to `seed` before the model is made. `ValueError` where the DataLoaders have more words than the model.
    """
    recipe = recipe if isinstance(recipe, RetrainRecipe) else get_recipe(recipe).retrain
    torch.manual_seed(seed)
    lm = genotype if isinstance(genotype, LanguageModel) else LanguageModel.from_genotype(
        _vocab_size(dls, vocab_size), recipe.hidden_size, load_genotype(genotype), dropout_h=recipe.dropout_h, dropout_x=recipe.dropout_x,
        init_range=recipe.init_range, **_dropouts(recipe))
    learn = _learner(dls, StatefulLM(lm, recipe.precision), recipe, path, [BestModel(), NTASGD(recipe.nonmono), *cbs], metrics_file)
    learn.patience = recipe.patience
    return learn


def search_learner(dls, recipe: SearchRecipe | Recipe | str = "penn", *, seed: int = 0, valid_batches=None, path: str | Path | None = None, cbs=(),
                   vocab_size: int | None = None, metrics_file: str | None = "search.csv") -> Learner:
    """A Learner whose `fit(recipe.epochs)` is the search: the supernet's weights learn from the training text, and α from the validation text.

    α learns from `valid_batches`. The default is `dls.arch`; without that it is `dls.valid` in batches of the training batch size (a `StreamLoader` keeps
    its own size). `learn.genotype()` is the cell that α stands for. torch's random state is set to `seed` before the model is made.
    """
    recipe = recipe if isinstance(recipe, SearchRecipe) else get_recipe(recipe).search
    if valid_batches is None:
        valid_batches = dls.arch if "arch" in vars(dls) else dls.valid.new(bs=dls.train.bs)
    V = _vocab_size(dls, vocab_size)
    torch.manual_seed(seed)
    rnn = MixedRNN(recipe.hidden_size, recipe.hidden_size, recipe.n_nodes, dropout_x=recipe.dropout_x, dropout_h=recipe.dropout_h,
                   relaxation=recipe.relaxation, init_range=recipe.init_range, draws=recipe.draws)
    lm = LanguageModel(V, rnn, init_range=recipe.init_range, **_dropouts(recipe))
    return _learner(dls, StatefulLM(lm), recipe, path, [ArchParamUpdate.of(recipe, valid_batches), *cbs], metrics_file, splitter=weight_parameters)


def retrain(corpus: Corpus, genotype: Genotype | str | LanguageModel, recipe: RetrainRecipe, seed: int = 0, folder: str | Path = ".", report=None,
            progress: bool = False, device="auto", store: Checkpoints | None = None) -> dict:
    """Train the genotype from scratch for at most `recipe.epochs` (or a `LanguageModel`, as in `lm_learner`), and measure the best model.

    After every epoch `report` gets a dictionary (see `EpochReport`), and `folder`/retrain.csv holds one row for each. With `store` the training writes its
    checkpoints there, and resumes from the newest one. Returns valid_perplexity, test_perplexity, parameters, seconds, epochs (how many were trained), rows
    (the dictionaries), model (the best `LanguageModel`), learner and ended_by.

    `ended_by` is None, or the exception that ended the training early. The caller raises it once the best model so far is safe. It is `KeyboardInterrupt`
    after Ctrl-C (the step that ran is finished and kept), or `FloatingPointError` if the numbers went wrong again and again. Where there is no best model
    yet, these are raised here. So are `Terminated`, after SIGTERM, and the `KeyboardInterrupt` of a second Ctrl-C.
    """
    last: list[tuple[Learner, RetrainCheckpoints]] = []

    def once(state: dict | None, factor: float) -> None:
        random.seed(seed)  # `lm_learner` sets torch's generator
        np.random.seed(seed)
        reporter = EpochReport(report, "retrain", Path(folder) / "retrain.csv")
        learn = lm_learner(language_dls(corpus, recipe, seed, device, path=folder), genotype, recipe, seed=seed, metrics_file=None, cbs=[reporter])
        keeper = RetrainCheckpoints(store, state, stop, len(corpus.vocab))
        learn.add_cb(keeper)
        learn.model_dir = Path(best).name
        last[:] = [(learn, keeper)]
        with contextlib.ExitStack() as quiet:
            if progress:
                learn.add_cb(PerplexityInBar())
            else:
                quiet.enter_context(learn.no_bar())
                quiet.enter_context(learn.no_logging())
            learn.fit(recipe.epochs, lr=recipe.lr * factor)

    ended_by: BaseException | None = None
    Path(folder).mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        best = stack.enter_context(tempfile.TemporaryDirectory(prefix=PARTIAL, dir=folder))  # not fastai's folder `models`, which may hold a file of the user's
        if store is None:
            store = Checkpoints(stack.enter_context(tempfile.TemporaryDirectory()), "retrain", {}, Every())
        with stop_requests() as stop:
            try:
                with_rollbacks(store, "retrain", recipe.epochs, once)
            except Stopped as stopped:
                ended_by = stopped.leave()
            except FloatingPointError as error:
                ended_by = error
        if ended_by is not None:
            if not last or last[0][0].best_model.last_saved_path is None or isinstance(ended_by, Terminated):
                raise ended_by
            last[0][0].best_model.after_fit()  # loads the best model so far
    learn, keeper = last[0]
    learn.remove_cb(keeper)  # from here on the Learner is the caller's: its `validate` or `fit` is no part of this training
    learn.best_model.last_saved_path, learn.model_dir = None, "models"
    model, rows = learn.model.lm, learn.epoch_report.rows
    value = perplexity(model, corpus.valid, recipe.eval_batch_size, recipe.bptt)
    name_poor("retrain", value, len(corpus.vocab))
    return {"valid_perplexity": value,
            "test_perplexity": perplexity(model, corpus.test, recipe.test_batch_size, recipe.bptt),
            "parameters": number_of_parameters(model), "seconds": keeper.seconds, "epochs": len(rows), "rows": rows,
            "model": model, "learner": learn, "ended_by": ended_by}
