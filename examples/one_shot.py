"""A search by one of NNI's one-shot strategies, then a retraining of the found cell: `python examples/one_shot.py GumbelDARTS --corpus pydoc`."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import pytorch_lightning as pl
from nni.nas.experiment import NasExperiment

from nni_darts_rnn import Genotype, get_recipe, load_corpus, search_evaluator, strategies
from nni_darts_rnn.learner import retrain
from nni_darts_rnn.search import make_space
from nni_darts_rnn.search import make_strategy as make_second_order

NAMES = ("SecondOrderDARTS", "DARTS", "GumbelDARTS", "Proxyless", "RandomOneShot", "ENAS")


def make_strategy(name: str, recipe):
    """The strategy with those settings of the recipe that it has, and the options that Lightning's Trainer needs for it."""
    if name == "RandomOneShot":
        return strategies.RandomOneShot(), {"gradient_clip_val": recipe.clip}
    if name == "ENAS":
        return strategies.ENAS(gradient_clip_val=recipe.clip, batches_per_update=10), {}
    if name == "SecondOrderDARTS":
        return make_second_order(recipe), {}
    return getattr(strategies, name)(arc_learning_rate=recipe.arch_lr, gradient_clip_val=recipe.clip, warmup_epochs=recipe.warmup_epochs), {}


def search(name: str, corpus, recipe, seed: int = 0, folder: str | Path | None = None, **trainer_options):
    """Search, and return the genotype, the space whose weights the search has trained, and the strategy. NNI keeps its log and checkpoint in `folder`."""
    pl.seed_everything(seed, verbose=False)
    strategy, options = make_strategy(name, recipe)
    space = make_space(len(corpus.vocab), replace(recipe, relaxation="edge"))  # a choice among the primitives of each edge, which every strategy can make
    evaluator = search_evaluator(corpus, recipe, seed, print, **options | trainer_options)
    experiment = NasExperiment(space, evaluator, strategy)
    experiment.config.experiment_working_directory = folder or tempfile.mkdtemp()
    experiment.run()
    sample, = experiment.export_top_models(formatter="dict")
    experiment.stop()
    return Genotype.from_sample(sample), space, strategy


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("strategy", choices=NAMES)
    parser.add_argument("--corpus", default="pydoc", help="pydoc (default), penn, wikitext-2, wikitext-103, or a folder with train/valid/test.txt")
    parser.add_argument("--recipe", default="small", help="named hyper-parameters; default small; see `nni-darts-rnn recipes`")
    arguments = parser.parse_args(argv)
    try:
        corpus, recipe = load_corpus(arguments.corpus), get_recipe(arguments.recipe)
    except ValueError as wrong:
        parser.error(str(wrong))
    genotype, _, _ = search(arguments.strategy, corpus, recipe.search)
    print(genotype)
    trained = retrain(corpus, genotype, recipe.retrain, folder=tempfile.mkdtemp(), report=print)
    print(f"test perplexity {trained['test_perplexity']:.1f}")


if __name__ == "__main__":
    main()
