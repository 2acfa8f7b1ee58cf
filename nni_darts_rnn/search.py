"""One whole search: corpus and recipe in, genotype out."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl
import torch

from .corpus import Corpus
from .evaluator import SupernetReport, search_evaluator
from .genotype import Genotype
from .recipes import SearchRecipe
from .space import DartsRnnSpace
from .strategy import SecondOrderDARTS


@dataclass(frozen=True)
class SearchResult:
    """genotype; α after every epoch, epoch 0 first, each (E, K) as lists; a dictionary of metrics for each of those; seconds."""

    genotype: Genotype
    alphas: list
    rows: list[dict]
    seconds: float


def make_space(vocab_size: int, recipe: SearchRecipe) -> DartsRnnSpace:
    """The recipe's model space for a vocabulary of V words."""
    return DartsRnnSpace(vocab_size, recipe.hidden_size, recipe.n_nodes, dropout=recipe.dropout, dropout_h=recipe.dropout_h,
                         dropout_x=recipe.dropout_x, dropout_i=recipe.dropout_i, dropout_e=recipe.dropout_e)


def make_strategy(recipe: SearchRecipe, **options) -> SecondOrderDARTS:
    """The recipe's strategy; `options` go to `SecondOrderDARTS` on top."""
    settings: dict = dict(arc_learning_rate=recipe.arch_lr, arc_weight_decay=recipe.arch_weight_decay,
                    arc_betas=(recipe.arch_beta1, recipe.arch_beta2), epsilon=recipe.epsilon, hvp=recipe.hvp, unrolled_lr=recipe.unrolled_lr,
                    neumann_terms=recipe.neumann_terms, warmup_epochs=recipe.warmup_epochs, gradient_clip_val=recipe.clip,
                    reproduce_original=recipe.reproduce_original, log_prob_every_n_step=0)
    return SecondOrderDARTS(**settings | options)


def search(corpus: Corpus, recipe: SearchRecipe, seed: int = 0, report=None, progress: bool = False, device: str = "auto",
           folder: Path | None = None) -> SearchResult:
    """Search for a cell on the corpus, as `NasExperiment` would, but so that intermediate results reach `report` as they come.

    `device` is Lightning's accelerator ("auto", "cpu", "gpu"). With `folder`, genotype.json, alpha.json and search.csv are kept there from the
    first epoch on. The same seed gives the same α, in another process too. Ctrl-C ends it with `KeyboardInterrupt`.
    """
    began = time.perf_counter()
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)  # its notes on devices and tips
    with warnings.catch_warnings():
        # Lightning's advice for ordinary data loaders and modules; ours are iterables, and α's optimizer is NNI's affair
        for message in (".*does not have many workers.*", ".*no `val_dataloader`.*", ".*defined a `validation_step`.*", ".*`training_step` returned.*",
                        ".*GPU available.*", ".*max_size_cycle.*"):
            warnings.filterwarnings("ignore", message=message)
        pl.seed_everything(seed, workers=False, verbose=False)
        space, strategy = make_space(len(corpus.vocab), recipe), make_strategy(recipe)
        evaluator = search_evaluator(corpus, recipe, seed, report, folder, accelerator=device, devices=1, enable_progress_bar=progress)
        with torch.random.fork_rng(devices=[]):  # what NNI draws for α of its own does not move the masks
            supernet = strategy.mutate_model(space)
        evaluator = strategy.mutate_evaluator(evaluator)
        with _interruptible():
            evaluator.evaluate(supernet)
        evaluator.module.set_model(supernet)
        genotype = Genotype.from_sample(evaluator.module.export())
    reporter = next(c for c in evaluator.trainer.callbacks if isinstance(c, SupernetReport))
    return SearchResult(genotype, reporter.alphas, reporter.rows, time.perf_counter() - began)


@contextlib.contextmanager
def _interruptible():
    """Lightning 2 turns Ctrl-C into `sys.exit(1)` and leaves the signal ignored; here it stays a `KeyboardInterrupt`."""
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if main:
            signal.signal(signal.SIGINT, handler)
