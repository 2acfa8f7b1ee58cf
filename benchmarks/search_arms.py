"""The arms of `search_quality.py`: what each does with its budget to find a cell.

- `second-order`: the package's own search.
- `original`: the same with the numerics of quark0/darts, and initial weights in ±0.04.
- `first-order`: the same in first order.
- `shared`: random search with weight sharing (Li and Talwalkar 2019). Each training step moves the shared weights with one random cell. Then random cells are
  judged with these weights on the validation text, and the best one is kept.
- `random`: random search. Each random cell gets the short retraining, and the best one on the validation text is kept.
- `one`: a single random cell, without a choice.
- The name of a cell, such as `DARTS_V2`: that cell.

The budget is an amount of arithmetic: that of the recipe's second-order search in the published order of its two steps. A step of it is 13 forward passes of
the mixed cell (`step_size.py` has the formula). A step in first order is 5 (α: forward and backward to the data; weights: 3), one while α waits is 3, and a
training step is 3 of the discrete cell. The other arms get the number of epochs, or of cells, that comes nearest to the budget. Summed over its epochs, a
search whose α waits for 4 and learns in one costs 25 such passes, in place of the 26 of two epochs. With `search.relaxation=gumbel` the passes from which α
learns nothing are of the discrete cell, which costs 1/2.09 of a mixed one at this size. 4 epochs in which α waits and 2 in which it learns then cost 25.5
passes in second order; 3 and 6 such epochs cost 24.9 in first order. (The fast path has become cheaper since: it runs the edges that were not drawn forward
only. That makes 21.3 passes of the 25.5, and 18.4 with a shared step.)
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
    """The corpus with only the first `share` of its training text. α learns from the validation text."""
    return replace(corpus, train=corpus.train[:int(len(corpus.train) * share)], alpha=None)


def random_cell(generator: random.Random, n_nodes: int):
    from nni_darts_rnn.genotype import Genotype

    ops = [name for name in PRIMITIVES if name != "none"]
    return Genotype(tuple((generator.choice(ops), generator.randrange(node)) for node in range(1, n_nodes + 1)))


def budget(recipe, words: int, hidden_size: int) -> float:
    """The arithmetic of a search step, as a multiple of that of a training step of one cell with `hidden_size` units on as many tokens."""
    N = recipe.n_nodes
    mixed = Size(1, 1, recipe.hidden_size, words, N).flops()  # 13 passes
    decoder = 2 * hidden_size * words
    discrete = 3 * (4 * hidden_size**2 * (N + 2) + decoder)  # one edge a node, and both halves of W0
    return mixed / discrete


def find_cell(arm: str, corpus, share: float, recipe, seed: int, folder: Path):
    """The cell that an arm chooses. Searches have the first `share` of the training text; the trainings of `random` have all of it."""
    from nni_darts_rnn.health import ROLLBACKS, SHRINK, NotFinite
    from nni_darts_rnn.learner import retrain
    from nni_darts_rnn.pipeline import search_phase

    quick, generator, part = recipe.search, random.Random(seed), beginning(corpus, share)

    def epochs(hidden_size: int) -> float:
        """The budget in epochs of training one cell on that share of the text."""
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
        except NotFinite as error:  # as in a search: again with a smaller learning rate, up to ROLLBACKS times
            gone = error
    raise FloatingPointError(f"{arm}: {gone.what}")


def shared(corpus, recipe, generator: random.Random, seed: int):
    """The best of random cells on the validation text, with weights that RandomOneShot has trained on random cells.

    Judging costs as much as one epoch of training: a training step has 3 passes, and each cell gets one forward pass over the validation text.
    """
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
