"""A search and a retraining, each one `Learner.fit`, with no NNI in sight.

    python examples/fastai_search.py [--recipe small] [--corpus pydoc] [--folder runs/fastai]
"""

import argparse
from pathlib import Path

from nni_darts_rnn import PrintGenotype, get_recipe, lm_learner, load_corpus, search_learner
from nni_darts_rnn.learner import language_dls
from nni_darts_rnn.plot import plot_cell


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("--recipe", "small"), ("--corpus", "pydoc"), ("--folder", "runs/fastai")):
        parser.add_argument(name, default=default)
    arguments = parser.parse_args(argv)
    corpus, recipe, folder = load_corpus(arguments.corpus), get_recipe(arguments.recipe), Path(arguments.folder)

    # ArchParamUpdate, hidden-state reset, AR/TAR, clipping and the learning rate by length are among the learner's callbacks
    search = search_learner(language_dls(corpus, recipe.search), recipe, seed=1, path=folder, cbs=[PrintGenotype()])
    search.fit(recipe.search.epochs)
    cell = search.model.genotype()
    plot_cell(cell, folder / "cell.svg")

    learn = lm_learner(language_dls(corpus, recipe.retrain), cell, recipe, seed=1, path=folder)  # NT-ASGD, the best epoch saved
    learn.fit(recipe.retrain.epochs)
    print(f"{cell}: validation perplexity {learn.validate()[1]:.2f}")
    return cell
