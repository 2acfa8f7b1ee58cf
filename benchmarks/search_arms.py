"""The arms of `search_quality.py`: what each does with its budget to come by a cell.

`second-order`, the package's own; `original`, with quark0/darts' numerics; `first-order`; `shared`, random search with weight sharing (Li and
Talwalkar 2019: weights of all cells trained on a random one each step, then the best of random cells on validation text); `random`, random search
(each cell trained for the short retraining, the best on validation text is kept); `one`, a random cell as it comes; a named cell, such as `DARTS_V2`.

The budget is arithmetic: that of the recipe's second-order search in the published order. A step is 13 forward passes of the mixed cell (`step_size.py`
has the formula), 5 in first order (α: forward and backward to the data; weights: 3), 3 while α waits, and 3 of the discrete cell in
training. The other arms get as many epochs, or cells, as come nearest; α's warm-up of 4 epochs and one with α cost 25 passes in place of 26. With
`search.relaxation=gumbel` the passes that α learns nothing from are of the discrete cell, at 1/2.09 of a mixed one at this size: 4 epochs in which α waits and
2 in which it learns cost 25.5 in second order, 3 and 6 24.9 in first order. (The fast path has since become cheaper than this counts: it runs the edges that
were not drawn forward only, which makes 21.3 of the 25.5, and with a shared step 18.4.)
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

from step_size import Size

from nni_darts_rnn.genotype import NAMED, PRIMITIVES

ARMS = ("second-order", "original", "first-order", "shared", "random", "one")
SHORT = 1  # epochs of the short retraining


def beginning(corpus, share: float):
    """The corpus with that share of its training text."""
    return replace(corpus, train=corpus.train[:int(len(corpus.train) * share)], alpha=None)


def random_cell(generator: random.Random, n_nodes: int):
    from nni_darts_rnn.genotype import Genotype

    ops = [name for name in PRIMITIVES if name != "none"]
    return Genotype(tuple((generator.choice(ops), generator.randrange(node)) for node in range(1, n_nodes + 1)))


def budget(recipe, words: int, hidden_size: int) -> float:
    """How many times the arithmetic of a training step of one cell with `hidden_size` units a search step on as many tokens is."""
    N = recipe.n_nodes
    mixed = Size(1, 1, recipe.hidden_size, words, N).flops()  # 13 passes
    decoder = 2 * hidden_size * words
    discrete = 3 * (4 * hidden_size**2 * (N + 2) + decoder)  # one edge a node, and both halves of W0
    return mixed / discrete


def find_cell(arm: str, corpus, share: float, recipe, seed: int, folder: Path):
    """The cell that an arm chooses, of searches on that share of the training text."""
    from nni_darts_rnn.health import ROLLBACKS, SHRINK, NotFinite
    from nni_darts_rnn.learner import retrain
    from nni_darts_rnn.pipeline import search_phase

    quick, generator, part = recipe.search, random.Random(seed), beginning(corpus, share)

    def epochs(hidden_size: int) -> float:
        """As many of training one cell on that share of the text."""
        return budget(quick, len(corpus.vocab), hidden_size) * quick.epochs

    if arm in ("second-order", "original", "first-order"):
        if arm == "original":
            quick = replace(quick, reproduce_original=True, init_range=0.04)
        if arm == "first-order":
            quick = replace(quick, hvp="first_order", epochs=round(quick.epochs * 13 / 5))
        return search_phase(part, quick, seed, folder)["genotype"]
    if arm == "one":
        return random_cell(generator, quick.n_nodes)
    if arm in NAMED:
        return NAMED[arm]
    if arm == "random":
        found = []
        for k in range(round(epochs(recipe.retrain.hidden_size) * share / SHORT)):
            cell = random_cell(generator, quick.n_nodes)
            ended = retrain(corpus, cell, replace(recipe.retrain, epochs=SHORT), 1000 * seed + k, folder / f"cell{k}")
            found.append((ended["valid_perplexity"], k, cell))
        return min(found)[2]
    quick = replace(quick, epochs=round(epochs(quick.hidden_size)) - 1)
    for again in range(ROLLBACKS + 1):
        try:
            return shared(part, replace(quick, lr=quick.lr * SHRINK**again), random.Random(seed), seed)
        except NotFinite as error:  # as in a search: again, with a smaller learning rate, so many times
            gone = error
    raise FloatingPointError(f"{arm}: {gone.what}")


def shared(corpus, recipe, generator: random.Random, seed: int):
    """Weight-sharing random search; the last of its epochs' worth is for judging cells on the validation text, a forward pass each."""
    import pytorch_lightning as pl

    from nni_darts_rnn.evaluator import search_evaluator
    from nni_darts_rnn.model import perplexity
    from nni_darts_rnn.search import make_space
    from nni_darts_rnn.strategies import RandomOneShot

    pl.seed_everything(seed, verbose=False)
    space, strategy = make_space(len(corpus.vocab), recipe), RandomOneShot()
    evaluator = search_evaluator(corpus, recipe, seed, gradient_clip_val=recipe.clip, accelerator="cpu", devices=1, enable_progress_bar=False)
    supernet, evaluator = strategy.mutate_model(space), strategy.mutate_evaluator(evaluator)
    evaluator.evaluate(supernet)
    trained = space.lm.state_dict()
    found = []
    for k in range(round(3 * len(corpus.train) / len(corpus.valid))):
        cell = random_cell(generator, recipe.n_nodes)
        model = make_space(len(corpus.vocab), recipe).freeze(cell.to_sample())
        model.lm.load_state_dict(trained, strict=False)
        found.append((perplexity(model, corpus.valid, recipe.eval_batch_size, recipe.bptt), k, cell))
    return min(found)[2]
