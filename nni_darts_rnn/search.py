"""One whole search: corpus and recipe in, genotype out."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import pytorch_lightning as pl
import torch

from .checkpoints.search import SearchCheckpoints
from .checkpoints.stopping import Stopped, StopRequest, stop_requests
from .checkpoints.store import Checkpoints, Every
from .corpus import Corpus
from .evaluator import SupernetReport, search_evaluator
from .genotype import Genotype
from .health import name_poor, with_rollbacks
from .recipes import SearchRecipe
from .space import DartsRnnSpace
from .strategy import SecondOrderDARTS


@dataclass(frozen=True)
class SearchResult:
    """The cell; for every epoch, from 0 on, α (E, K) as lists and a dictionary of metrics; the seconds of the search."""

    genotype: Genotype
    alphas: list
    rows: list[dict]
    seconds: float


def make_space(vocab_size: int, recipe: SearchRecipe) -> DartsRnnSpace:
    """The recipe's model space for a vocabulary of V words."""
    return DartsRnnSpace(vocab_size, recipe.hidden_size, recipe.n_nodes, dropout=recipe.dropout, dropout_h=recipe.dropout_h,
                         dropout_x=recipe.dropout_x, dropout_i=recipe.dropout_i, dropout_e=recipe.dropout_e, relaxation=recipe.relaxation,
                         init_range=recipe.init_range, draws=recipe.draws)


def make_strategy(recipe: SearchRecipe, **options) -> SecondOrderDARTS:
    """The recipe's strategy. `options` of `SecondOrderDARTS` take precedence over the recipe's."""
    settings: dict = dict(arc_learning_rate=recipe.arch_lr, arc_weight_decay=recipe.arch_weight_decay,
                    arc_betas=(recipe.arch_beta1, recipe.arch_beta2), epsilon=recipe.epsilon, hvp=recipe.hvp, unrolled_lr=recipe.unrolled_lr,
                    neumann_terms=recipe.neumann_terms, warmup_epochs=recipe.warmup_epochs, gradient_clip_val=recipe.clip,
                    own_gradient=recipe.own_gradient, reproduce_original=recipe.reproduce_original, log_prob_every_n_step=0)
    return SecondOrderDARTS(**settings | options)


def search(corpus: Corpus, recipe: SearchRecipe, seed: int = 0, report=None, progress: bool = False, device: str = "auto",
           folder: Path | None = None, store: Checkpoints | None = None) -> SearchResult:
    """Searches for a cell on the corpus, as `NasExperiment` would, but `report` gets intermediate results as they come.

    `device` is Lightning's accelerator ("auto", "cpu", "gpu"). With `folder`, genotype.json, alpha.json and search.csv are there from the first
    epoch on. The same seed gives the same α, in another process too.

    With `store`, the search saves its state there and resumes from what it finds there. After SIGTERM or Ctrl-C it finishes the step and saves its
    state, then raises `Terminated` or `KeyboardInterrupt`. For numbers that go wrong see `health.with_rollbacks`.
    """
    with contextlib.ExitStack() as stack:
        if store is None:
            kept = stack.enter_context(tempfile.TemporaryDirectory())
            store = Checkpoints(kept, "search", {}, Every())
        stop = stack.enter_context(stop_requests())
        try:
            return with_rollbacks(store, "search", recipe.epochs, lambda state, factor: _search(
                corpus, replace(recipe, lr=recipe.lr * factor), seed, report, progress, device, folder, store, state, stop))
        except Stopped as stopped:
            raise stopped.leave() from None


def _search(corpus: Corpus, recipe: SearchRecipe, seed: int, report, progress: bool, device: str, folder: Path | None, store: Checkpoints,
            state: dict | None, stop: StopRequest) -> SearchResult:
    if state is not None and state["epoch"] >= recipe.epochs:
        return SearchResult(Genotype.from_json(state["genotype"]), state["alphas"], state["rows"], state["seconds"])
    for name in ("utilities.rank_zero", "trainer.connectors.signal_connector"):  # notes on devices, tips, and on signals, which we report ourselves
        logging.getLogger(f"pytorch_lightning.{name}").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        # Lightning's advice for ordinary data loaders and modules; ours are iterables, and NNI looks after α's optimizer
        for message in (".*does not have many workers.*", ".*no `val_dataloader`.*", ".*defined a `validation_step`.*", ".*`training_step` returned.*",
                        ".*GPU available.*", ".*max_size_cycle.*"):
            warnings.filterwarnings("ignore", message=message)
        pl.seed_everything(seed, workers=False, verbose=False)
        space, strategy = make_space(len(corpus.vocab), recipe), make_strategy(recipe)
        evaluator = search_evaluator(corpus, recipe, seed, report, folder, accelerator=device, devices=1, enable_progress_bar=progress)
        loaders = [evaluator.train_dataloaders, evaluator.val_dataloaders]
        with torch.random.fork_rng(devices=[]):  # so that NNI's draws for an α of its own do not change our dropout masks
            supernet = strategy.mutate_model(space)
        evaluator = strategy.mutate_evaluator(evaluator)
        reporter = next(c for c in evaluator.trainer.callbacks if isinstance(c, SupernetReport))
        keeper = SearchCheckpoints(store, reporter, loaders, state, stop)
        evaluator.trainer.callbacks.append(keeper)
        try:
            evaluator.evaluate(supernet)
        except SystemExit:
            raise KeyboardInterrupt from None  # a second Ctrl-C, which Lightning 2 turns into `sys.exit(1)`
        evaluator.module.set_model(supernet)
        genotype = Genotype.from_sample(evaluator.module.export())
    name_poor("search", reporter.rows[-1]["perplexity"], len(corpus.vocab))
    return SearchResult(genotype, reporter.alphas, reporter.rows, keeper.seconds)
