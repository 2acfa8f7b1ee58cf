"""Named sets of hyper-parameters, and the one place where a hyper-parameter is checked.

The values of `penn`, and those of `wikitext-2`'s retraining, are from the DARTS paper (appendix A.1.2, A.2.2, A.3) and from quark0/darts
(`rnn/train_search.py`, and `rnn/train.py`, whose default is 8,000 epochs). For WikiText-2 the paper trains the cell that it found on Penn. The search of
`wikitext-2` is therefore that of `penn`, with the `dropout_h` of the retraining.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

from .checks import did_you_mean, one_of
from .genotype import RELAXATIONS

ADAMS_LR = 0.1  # the largest rate for Adam: it moves every weight by about its rate in each step, and no weights are so large that they can learn by more
MOST = 1e30  # the limit of a number that has none of its own: its products must fit into float32 too


def _field(default, low=None, high=MOST, *, below=False, choices=None, optional=False, help=""):
    """A recipe's field: a number from `low` to `high` (with `below`, less than `high`), or one of `choices`. `optional` allows None too."""
    return field(default=default, metadata=dict(low=low, high=high, below=below, choices=choices, optional=optional, help=help))


def _rate(default, help):
    return _field(default, 0, 1, below=True, help=help)


def _check_rate(part: str, optimizer: str, lr: float, usual: float) -> None:
    if optimizer == "adam" and lr > ADAMS_LR:
        raise ValueError(f"{part}.lr: {lr:g} is a rate for SGD; {part}.optimizer = adam takes at most {ADAMS_LR}, and {usual} is usual")


def annealed(done: float, share: float) -> float:
    """The factor on the learning rate when the share `done` of a phase is over. It is 1 at first; over the last `share` it falls to 0 along a cosine."""
    return (1 + math.cos(math.pi * max(0.0, (done - (1 - share)) / share))) / 2


@dataclass(frozen=True)
class SearchRecipe:
    """How the supernet is trained and α is moved."""

    hidden_size: int = _field(300, 1, help="units of the embedding and of each state, H")
    n_nodes: int = _field(8, 1, 64, help="nodes of the cell, N")
    batch_size: int = _field(256, 2, help="streams read side by side in the training and validation text, B")
    eval_batch_size: int = _field(10, 2, help="streams read side by side when perplexity is measured")
    bptt: int = _field(35, 1, help="usual length of a batch in time steps, T")
    short_bptt_probability: float = _field(0.05, 0, 1, help="probability of a batch of half that length")
    optimizer: str = _field("sgd", choices=("sgd", "adam"), help="of the weights; the step of either is unrolled; adam wants an `lr` near 0.003")
    lr: float = _field(20.0, 0, help="the optimizer's learning rate for a batch of `bptt` steps; scaled by length/bptt")
    weight_decay: float = _field(5e-7, 0, help="the optimizer's weight decay")
    clip: float = _field(0.25, 1e-12, optional=True, help="largest norm of the weights' gradient; none: no clipping")
    dropout: float = _rate(0.75, "dropout of the outputs")
    dropout_h: float = _rate(0.25, "dropout of the states before each node's matrix")
    dropout_x: float = _rate(0.75, "dropout of the cell's input")
    dropout_i: float = _rate(0.2, "dropout of the embedded words")
    dropout_e: float = _rate(0.0, "dropout of whole words")
    init_range: float = _field(0.04, 1e-12, 1e3, help="weights start uniform in ± this")
    ar: float = _field(0.0, 0, help="activation regularisation")
    tar: float = _field(1e-3, 0, help="temporal activation regularisation")
    anneal: float = _field(0.0, 0, 1, help="the share of the epochs, at the end, over which the weights' learning rate falls to 0 along a cosine")
    epochs: int = _field(50, 1, help="passes over the training text")
    relaxation: str = _field("edge", choices=RELAXATIONS,
                             help="edge: one softmax of α for each edge, and BatchNorm; node: one for all edges into a node, no BatchNorm; gumbel: as node, but one edge and primitive drawn a node")
    draws: int = _field(1, 1, help="cells drawn for a batch, with gumbel: each for an equal part of its streams")
    arch_lr: float = _field(3e-3, 0, help="Adam's learning rate for α")
    arch_weight_decay: float = _field(1e-3, 0, help="Adam's weight decay for α")
    arch_beta1: float = _rate(0.9, "Adam's first coefficient for α")
    arch_beta2: float = _rate(0.999, "Adam's second coefficient for α")
    hvp: str = _field("finite_difference", choices=("finite_difference", "exact", "first_order"), help="how the second-order term is computed")
    epsilon: float = _field(3e-2, 1e-12, help="r: how far the finite difference moves the weights in all")
    unrolled_lr: float = _field(None, 0, optional=True, help="ξ, the unrolled step's learning rate; none: the weights' own; 0: first order")
    neumann_terms: int = _field(0, 0, help="terms of iDARTS's Neumann series (arXiv 2106.10784); 0: the one unrolled step")
    own_gradient: bool = _field(False, help="whether the weight step has a gradient of its own, at the α that has just moved, as in the paper's Algorithm 1; false: the "
                                            "one that α's step unrolled, of α before its move, which saves 3 of 13 passes")
    warmup_epochs: int = _field(0, 0, help="epochs before α moves; fewer than `epochs`")
    alpha_dropout: bool = _field(True, help="whether the loss that α learns from has the training's dropout, as in the published code; false: none, as in perplexity")
    reproduce_original: bool = _field(False, help="the published code's numerics, for reproduction")

    def __post_init__(self):
        if self.reproduce_original and self.clip is None:
            raise ValueError("search.reproduce_original: the published code always clips; give search.clip (the paper's is 0.25)")
        if self.reproduce_original and (self.hvp == "exact" or self.neumann_terms):
            raise ValueError(f"search.reproduce_original: the published code has a finite difference and no series; hvp = {self.hvp} and neumann_terms = "
                             f"{self.neumann_terms} would change nothing; give finite_difference or first_order, and 0")
        if self.optimizer == "adam" and (self.reproduce_original or self.neumann_terms):
            raise ValueError(f"search.optimizer: the published code has SGD, and the series is of its steps; adam goes with neither reproduce_original = "
                             f"{self.reproduce_original} nor neumann_terms = {self.neumann_terms}; give sgd, or false and 0")
        if self.draws > 1 and self.relaxation != "gumbel":
            raise ValueError(f"search.draws: {self.draws} cells are drawn with search.relaxation = gumbel alone; with {self.relaxation} give 1")
        if self.draws > self.batch_size:
            raise ValueError(f"search.draws: {self.draws} cells have at least a stream each; give at most search.batch_size = {self.batch_size}")
        _check_rate("search", self.optimizer, self.lr, 0.003)
        if self.optimizer == "adam" and self.unrolled_lr is not None and self.unrolled_lr > ADAMS_LR:
            raise ValueError(f"search.unrolled_lr: {self.unrolled_lr:g} is too large for search.optimizer = adam, which moves each weight by about that much; give at most "
                             f"{ADAMS_LR}, or none: search.lr")
        if self.neumann_terms and self.first_order:
            raise ValueError(f"search.neumann_terms: {self.neumann_terms} terms belong to the second-order gradient, and hvp = {self.hvp} with unrolled_lr = "
                             f"{self.unrolled_lr} is first order; give 0")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"search.warmup_epochs: {self.warmup_epochs} must be below search.epochs = {self.epochs}: α would never move")

    @property
    def first_order(self) -> bool:
        """Whether α's gradient is the first-order one, which unrolls no step."""
        return self.hvp == "first_order" or self.unrolled_lr == 0

    def passes(self, epoch: int, words: int) -> float:
        """The arithmetic of one step in epoch `epoch` (from 0), in forward passes of the mixed cell and of a decoder of `words` words (`docs/scale.md`).

        The weights' gradient counts 3 passes. A second-order step of α adds 3 for the gradient at w′, 2 each for those at w + r and w − r, and 6 for each term
        of the Neumann series; if the weight step has a gradient of its own, that adds 3. A first-order step of α adds 2.
        """
        edges = self.n_nodes * (self.n_nodes + 1) // 2

        def forward(edges: int) -> float:  # in products with a matrix (H, 2H); the decoder counts as V/2H of them
            return edges + 2 + words / (2 * self.hidden_size)

        run = forward(self.n_nodes if self.relaxation == "gumbel" else edges)
        passes, mixed = 3, 0  # `mixed`: in how many passes the edges that were not drawn run forward too, which α's gradient needs
        if epoch >= self.warmup_epochs:
            passes += 2 if self.first_order else 7 + 6 * self.neumann_terms + 3 * (self.own_gradient or self.reproduce_original)
            mixed = 1 if self.first_order else 3
        return (passes * run + mixed * (forward(edges) - run)) / forward(edges)

    def passes_of(self, first: int, end: int, words: int) -> float:
        """The sum of `passes` over the epochs from `first` up to, and without, `end`."""
        warm = max(0, min(end, self.warmup_epochs) - first)
        return warm * self.passes(0, words) + (end - first - warm) * self.passes(self.warmup_epochs, words)


@dataclass(frozen=True)
class RetrainRecipe:
    """How a genotype is trained from scratch."""

    hidden_size: int = _field(850, 1, help="units of the embedding and of each state, H")
    batch_size: int = _field(64, 1, help="streams read side by side in the training text, B")
    eval_batch_size: int = _field(10, 1, help="streams read side by side in the validation text")
    test_batch_size: int = _field(1, 1, help="streams read side by side in the test text")
    bptt: int = _field(35, 1, help="mean length of a batch in time steps, T")
    short_bptt_probability: float = _field(0.05, 0, 1, help="probability that the mean is half of that")
    bptt_std: float = _field(5.0, 0, 1e6, help="standard deviation of the length")
    min_bptt: int = _field(5, 1, help="shortest length")
    max_bptt_above: int = _field(20, 0, help="the longest length is `bptt` plus this")
    optimizer: str = _field("sgd", choices=("sgd", "adam"),
                            help="of the weights; adam, with `lr` near 0.005 and `nonmono` none, is ahead where millions of weights are trained for a few epochs")
    lr: float = _field(20.0, 0, help="the optimizer's learning rate for a batch of `bptt` steps; scaled by length/bptt")
    weight_decay: float = _field(8e-7, 0, help="the optimizer's weight decay")
    clip: float = _field(0.25, 1e-12, optional=True, help="largest norm of the gradient; none: no clipping")
    dropout: float = _rate(0.75, "dropout of the outputs")
    dropout_h: float = _rate(0.25, "dropout of the states before each node's matrix")
    dropout_x: float = _rate(0.75, "dropout of the cell's input")
    dropout_i: float = _rate(0.2, "dropout of the embedded words")
    dropout_e: float = _rate(0.1, "dropout of whole words")
    init_range: float = _field(0.04, 1e-12, 1e3, help="weights start uniform in ± this")
    ar: float = _field(0.0, 0, help="activation regularisation")
    tar: float = _field(1e-3, 0, help="temporal activation regularisation")
    anneal: float = _field(0.0, 0, 1, help="the share of the epochs, at the end, over which the learning rate falls to 0 along a cosine")
    precision: str = _field("float32", choices=("float32", "bfloat16"),
                            help="of a training step's matrix products; bfloat16 rounds their operands, which is several times as fast at large sizes on a CPU with AMX")
    nonmono: int = _field(5, 1, optional=True, help="averaging (ASGD) begins after an epoch worse than the best of more than so many epochs ago; none: never")
    epochs: int = _field(3600, 1, help="passes over the training text, at most")
    patience: int = _field(None, 1, optional=True, help="epochs without a new best validation perplexity that end the training; none: all epochs are run")

    def __post_init__(self):
        if self.optimizer == "adam" and self.nonmono is not None:
            raise ValueError(f"retrain.nonmono: {self.nonmono} turns averaging on, which needs retrain.optimizer = sgd; with adam give none")
        _check_rate("retrain", self.optimizer, self.lr, 0.005)
        if self.patience is not None and self.nonmono is not None and self.patience < self.nonmono + 2:
            raise ValueError(f"retrain.patience: {self.patience} must be at least retrain.nonmono + 2 = {self.nonmono + 2}: averaging, which begins after {self.nonmono + 1} epochs "
                             "without improvement, would never be tried")
        if self.patience is not None and self.anneal:
            raise ValueError(f"retrain.anneal: {self.anneal} needs a fixed number of epochs, but retrain.patience = {self.patience} may end the training "
                             "early; give 0, or patience none")
        if self.min_bptt > self.bptt + self.max_bptt_above:
            raise ValueError(f"retrain.min_bptt: {self.min_bptt} must be at most bptt + max_bptt_above = {self.bptt + self.max_bptt_above}")


@dataclass(frozen=True)
class Recipe:
    """A whole run: one search and one retraining."""

    name: str
    search: SearchRecipe
    retrain: RetrainRecipe

    def to_dict(self) -> dict:
        return {"name": self.name, "search": dataclasses.asdict(self.search), "retrain": dataclasses.asdict(self.retrain)}


RECIPES = {
    "penn": Recipe("penn", SearchRecipe(), RetrainRecipe()),
    "wikitext-2": Recipe("wikitext-2", SearchRecipe(dropout_h=0.15),
                         RetrainRecipe(hidden_size=700, dropout_h=0.15, weight_decay=5e-7)),
    # For two cores and a text of a million words, such as the Penn Treebank. The search is the one whose cells were better than random ones at 64 units and
    # 2,000 words with SGD, with as many steps; at 128 units and all words with Adam its cells were no better (docs/results.md). Weights start in a range that
    # is ±0.04 at 850 units and grows with the root of 850 / units. Adam and little dropout, since ten epochs are few (docs/method.md, Retraining).
    "drawn": Recipe("drawn",
                    SearchRecipe(hidden_size=64, batch_size=64, eval_batch_size=64, clip=0.1, dropout=0.4, dropout_h=0.2, dropout_x=0.4, dropout_i=0.2,
                                 init_range=0.15, epochs=3, warmup_epochs=2, relaxation="gumbel", unrolled_lr=2.0),
                    RetrainRecipe(hidden_size=128, eval_batch_size=64, test_batch_size=10, optimizer="adam", lr=0.006, nonmono=None, dropout=0.15,
                                  dropout_h=0.075, dropout_x=0.15, dropout_i=0.075, dropout_e=0.0, init_range=0.1, epochs=10, anneal=0.34)),
    # For two cores and a text of a hundred thousand words: search and retraining take about two minutes together. Of the searches compared on the example's
    # text (docs/results.md), it is one of the four whose cells were best; they differ by no more than chance. The one of them with eight draws takes longer.
    "small": Recipe("small",
                    SearchRecipe(hidden_size=64, batch_size=16, bptt=20, lr=20.0, clip=0.1, dropout=0.3, dropout_h=0.1, dropout_x=0.3, dropout_i=0.1,
                                 init_range=0.12, anneal=0.5, epochs=6, warmup_epochs=4, relaxation="gumbel", unrolled_lr=2.0, alpha_dropout=False,
                                 eval_batch_size=16),
                    RetrainRecipe(hidden_size=96, batch_size=16, bptt=20, bptt_std=2.0, max_bptt_above=10, dropout=0.3, dropout_h=0.1,
                                  dropout_x=0.3, dropout_i=0.1, dropout_e=0.05, init_range=0.12, epochs=5, anneal=0.5, nonmono=2, test_batch_size=4)),
    # The smallest run that goes through every part. Its perplexities mean nothing.
    "tiny": Recipe("tiny",
                   SearchRecipe(hidden_size=8, n_nodes=3, batch_size=32, bptt=8, lr=5.0, dropout=0.1, dropout_h=0.1, dropout_x=0.1, dropout_i=0.1,
                                epochs=1, eval_batch_size=32),
                   RetrainRecipe(hidden_size=8, batch_size=32, bptt=8, bptt_std=1.0, min_bptt=3, max_bptt_above=4, lr=5.0, dropout=0.1,
                                 dropout_h=0.1, dropout_x=0.1, dropout_i=0.1, dropout_e=0.1, epochs=2, nonmono=1, eval_batch_size=32,
                                 test_batch_size=32)),
}


def get_recipe(name: str | Recipe, overrides: dict | None = None) -> Recipe:
    """The named recipe, with some of its fields replaced.

    `overrides` maps `"search.<field>"` and `"retrain.<field>"` to values, or `"search"` and `"retrain"` to dictionaries of them. Texts are read as the
    field's type ("3e-3", "none"). `ValueError` with one line for an unknown name or key (it suggests the nearest), or for a value that is not allowed.
    """
    if isinstance(name, Recipe):
        chosen = name
    elif name in RECIPES:
        chosen = RECIPES[name]
    else:
        raise ValueError(f"recipe {name!r} is none of {', '.join(RECIPES)}" + did_you_mean(name, RECIPES))
    parts = {"search": {}, "retrain": {}}
    for key, value in flatten(overrides or {}).items():
        part, _, field_name = str(key).partition(".")
        if part not in parts or not field_name:
            every = [f"{p}.{f.name}" for p in parts for f in dataclasses.fields(getattr(chosen, p))]
            raise ValueError(f"setting {key!r} is no field of a recipe: use search.<field> or retrain.<field>" + did_you_mean(key, every))
        parts[part][field_name] = value
    return Recipe(chosen.name, *(override(getattr(chosen, part), values, part + ".") for part, values in parts.items()))


def override(recipe, values: dict, prefix: str = ""):
    """A copy of a SearchRecipe or RetrainRecipe in which `values` replace fields. Each is checked; messages put `prefix` before a field's name."""
    fields = {f.name: f for f in dataclasses.fields(recipe)}
    checked = {}
    for name, value in values.items():
        if name not in fields:
            raise ValueError(f"setting {prefix + name!r} is no field of a recipe; {prefix}* are {', '.join(fields)}"
                             + did_you_mean(prefix + name, [prefix + f for f in fields]))
        checked[name] = _check(prefix + name, value, fields[name])
    return dataclasses.replace(recipe, **checked)


def flatten(mapping: dict) -> dict:
    """Flatten nested dictionaries, as a tuner draws them, into one with dotted keys."""
    flat = {}
    for key, value in mapping.items():
        if key == "_name":
            continue  # NNI's key for the chosen branch of a nested choice
        flat.update({f"{key}.{inner}": v for inner, v in flatten(value).items()} if isinstance(value, dict) else {key: value})
    return flat


def _check(name: str, value, spec: dataclasses.Field):
    """`value` converted to the field's type, or `ValueError` that says what is allowed."""
    kind, meta = spec.type, spec.metadata
    if meta["choices"]:
        return one_of(name, value, meta["choices"])
    if meta["optional"] and (value is None or str(value).lower() in ("none", "null")):
        return None
    if kind == "bool":
        text = str(value).lower()
        if text not in ("true", "false"):
            raise ValueError(f"{name}: {value!r} must be true or false")
        return text == "true"
    low, high = meta["low"], meta["high"]
    allowed = f"a {'whole ' if kind == 'int' else ''}number of at least {low}"
    allowed += "" if high == MOST else f" and {'below' if meta['below'] else 'at most'} {high}"
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(value)
        if kind == "int" and number != int(number):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name}: {value!r} must be {allowed}") from None
    if not math.isfinite(number) or number < low or number > high or (meta["below"] and number >= high):
        raise ValueError(f"{name}: {value!r} must be {allowed}" + (f", and at most {MOST:g}" if number > high == MOST else ""))
    return int(number) if kind == "int" else number
