"""fastai `Learner`s: one that trains a genotype as a language model, one whose `fit` is a search; and the whole retraining of a cell."""

from __future__ import annotations

import contextlib
import random
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from fastai.callback.progress import ProgressCallback  # noqa: F401 (importing it puts the bar among fastai's default callbacks)
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
    """What both learners share: the optimizer, hidden state, AR/TAR, clipping, learning rate × length, perplexity, CSV."""
    words, V = getattr(dls, "vocab", None), model.lm.vocab_size
    if words is not None and len(words) > V:
        raise ValueError(f"vocab_size: the model has {V} words, but the DataLoaders have {len(words)}")
    steps = getattr(dls.train, "seq_len", recipe.bptt)  # fastai's own loaders have a fixed length, which then is the usual one
    own = [ModelResetter(), RNNCallback(), ActivationRegularizer(alpha=recipe.ar, beta=recipe.tar), ScaleLRByLength(steps)]
    if recipe.clip is not None:
        own.append(GradientClip(recipe.clip))
    if recipe.anneal:
        own.append(AnnealLR(recipe.anneal))
    own.append(FiniteNumbers())
    if metrics_file is not None:
        own.append(MetricsCSV(metrics_file))
    # weight decay and step in one pass over the weights; that goes along their memory, which in a view of something larger (torch 2.14) is not theirs alone
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
    """A Learner that trains the genotype's cell as a tied AWD language model by the recipe, up to `learn.fit(recipe.epochs)`.

    `dls`: from `language_dls`, or any fastai language-model DataLoaders. `genotype` and `recipe` may be names; a `LanguageModel` in the place
    of a genotype is trained as it is, with its own size and dropout rates. After `fit` the model is the best one on validation (averaged
    weights, once NT-ASGD averages); it is also in `path/models/best.pth`, metrics in `path/history.csv`.
    torch's random state is set to `seed` before the model is made.
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
    """A Learner whose `fit(recipe.epochs)` is the search: the supernet's weights learn the training text, α the validation text.

    `valid_batches` are what α learns from: by default `dls.arch`, or the validation text in batches of the training batch size.
    `learn.genotype()` is the cell that α stands for. torch's random state is set to `seed` before the model is made.
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
    """Trains the genotype from scratch for `recipe.epochs`, or a `LanguageModel` as `lm_learner` does, and measures the best model.

    `report` gets a dictionary after every epoch (see `EpochReport`), and `folder`/retrain.csv all of them. With `store` the training keeps itself
    there and goes on from what is there. Returns valid_perplexity, test_perplexity, parameters, seconds, epochs (trained), model (the best
    `LanguageModel`), learner, and `ended_by`: None, or what ended it early and is for the caller to raise once the best model so far is safe:
    `KeyboardInterrupt` after Ctrl-C (the step that ran is finished and kept), `FloatingPointError` where the numbers went wrong again and again.
    Where there is no best model yet these are raised here; so are `Terminated`, after SIGTERM, and the `KeyboardInterrupt` of a second Ctrl-C.
    """
    last: list[tuple[Learner, RetrainCheckpoints]] = []

    def once(state: dict | None, factor: float) -> None:
        random.seed(seed)  # torch's generator is `lm_learner`'s affair
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
        best = stack.enter_context(tempfile.TemporaryDirectory(prefix=PARTIAL, dir=folder))  # not fastai's own `models`, where somebody's may lie
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
            last[0][0].best_model.after_fit()  # the best so far
    learn, keeper = last[0]
    learn.remove_cb(keeper)  # from here on the Learner is the caller's: `validate` or `fit` is no part of this training
    learn.best_model.last_saved_path, learn.model_dir = None, "models"
    model, rows = learn.model.lm, learn.epoch_report.rows
    value = perplexity(model, corpus.valid, recipe.eval_batch_size, recipe.bptt)
    name_poor("retrain", value, len(corpus.vocab))
    return {"valid_perplexity": value,
            "test_perplexity": perplexity(model, corpus.test, recipe.test_batch_size, recipe.bptt),
            "parameters": number_of_parameters(model), "seconds": keeper.seconds, "epochs": len(rows), "rows": rows,
            "model": model, "learner": learn, "ended_by": ended_by}
