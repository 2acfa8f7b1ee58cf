"""A search and a retraining with fastai alone, each one `Learner.fit`: python examples/fastai_search.py [RECIPE]. Run again, a stopped search goes on."""

import sys
from pathlib import Path

import torch
from fastai.callback.core import Callback

from nni_darts_rnn import PrintGenotype, get_recipe, lm_learner, load_corpus, search_learner
from nni_darts_rnn.learner import language_dls


class Keep(Callback):  # saves after each epoch what a search needs to go on: weights, α, α's Adam and the state of the random numbers
    def after_validate(self):  # not in an epoch that `start_epoch` skips
        state = {"epoch": self.epoch + 1, "model": self.model.state_dict(), "adam": self.learn.arch_param_update.state_dict()}
        torch.save(state | {"random": torch.get_rng_state()}, self.path / "search.partial")
        (self.path / "search.partial").replace(self.path / "search.pt")


def search(corpus, recipe, folder, first=0):  # the learner's callbacks: ArchParamUpdate, hidden-state reset, AR/TAR, clipping, lr by length, …
    learn = search_learner(language_dls(corpus, recipe.search, seed=1), recipe, seed=1, path=folder, cbs=[PrintGenotype(), Keep()])
    if (folder / "search.pt").is_file():
        kept = torch.load(folder / "search.pt", weights_only=True)
        learn.model.load_state_dict(kept["model"])
        learn.arch_param_update.load_state_dict(kept["adam"])
        learn.dls.train.set_epoch(first := kept["epoch"])
        torch.set_rng_state(kept["random"])
    learn.fit(recipe.search.epochs, start_epoch=first)
    return learn.model.genotype()


if __name__ == "__main__":
    try:
        corpus, recipe = load_corpus("pydoc"), get_recipe(*sys.argv[1:2] or ["small"])
    except ValueError as wrong:
        sys.exit(str(wrong))
    folder = Path("runs", "fastai", recipe.name)
    learn = lm_learner(language_dls(corpus, recipe.retrain, seed=1), search(corpus, recipe, folder), recipe, seed=1, path=folder)  # with NT-ASGD
    learn.fit(recipe.retrain.epochs)
