"""Against reference figures (tests/golden, or `--golden FILE`): what the original code computes on small fixed inputs, in float64 without dropout.

Two kinds of file, told apart by their keys: one whole search step ("alpha", "train_input", …), or named discrete cells, each with "genotype".
"""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from nni.nas.evaluator.pytorch import DataLoader, Lightning, Trainer
from test_bilevel import LossOf, double_precision  # noqa: F401 (double_precision is a fixture)

from nni_darts_rnn import bilevel
from nni_darts_rnn.evaluator import TRAIN, VALID, LanguageModelModule
from nni_darts_rnn.genotype import DARTS_V1, DARTS_V2, ENAS, Genotype, derive
from nni_darts_rnn.model import LanguageModel
from nni_darts_rnn.space import DartsRnnSpace, MixedCell
from nni_darts_rnn.strategy import SecondOrderDARTS
from nni_darts_rnn.supernet import MixedRNN
from nni_darts_rnn.trained import load_searched_model
from nni_darts_rnn.weight_step import Linear, WeightStep

FOLDER = Path(__file__).parent / "golden"
TOLERANCE = 1e-8  # relative; the files carry 12 digits, and ours differ by 1e-11 or less
NAMED = {"DARTS_V1": DARTS_V1, "DARTS_V2": DARTS_V2, "ENAS": ENAS}
WEIGHTS = ("encoder.weight", "decoder.bias", "rnn.W0", "rnn.Ws")
THROUGH_CLIP = "exact_second_order_alpha_grad_through_clip"


def pytest_generate_tests(metafunc):
    paths = [Path(p) for p in metafunc.config.getoption("--golden")] or sorted(FOLDER.glob("*.json"))
    files = {path.stem: json.loads(path.read_text()) for path in paths}
    steps = {name: d for name, d in files.items() if "train_input" in d}
    cells = {f"{name}:{cell}": (cell, d) for name, cells in files.items() if name not in steps for cell, d in cells.items()}
    for name, (_, d) in cells.items():
        if not isinstance(d, dict) or "genotype" not in d:
            raise pytest.UsageError(f"{name}: neither a search step nor discrete cells")
    kinds = {"search": steps, "cell": cells, "derived": {name: d for name, d in steps.items() if "genotype" in d},
             "original": {name: d for name, d in steps.items() if "second_order_alpha_grad" in d}}
    for kind, found in kinds.items():
        if kind in metafunc.fixturenames:
            metafunc.parametrize(kind, found.values(), ids=found.keys())


def error(ours, golden) -> float:
    """Relative error in the Euclidean norm."""
    ours, golden = torch.as_tensor(ours, dtype=torch.float64).detach(), torch.as_tensor(golden, dtype=torch.float64)
    assert ours.shape == golden.shape
    return float((ours - golden).norm() / golden.norm())


def our_weights(weights: dict) -> dict:
    """The reference's weights under our names."""
    n_nodes = sum(name.startswith("rnns.0._Ws.") for name in weights)
    t = partial(torch.tensor, dtype=torch.float64)
    return {"encoder.weight": t(weights["encoder.weight"]), "decoder.bias": t(weights["decoder.bias"]), "rnn.W0": t(weights["rnns.0._W0"]),
            "rnn.Ws": torch.stack([t(weights[f"rnns.0._Ws.{i}"]) for i in range(n_nodes)])}


def load(lm: LanguageModel, weights: dict) -> None:
    with torch.no_grad():
        for name, value in our_weights(weights).items():
            lm.get_parameter(name).copy_(value)


def batches(d: dict) -> dict:
    """{"train": (tokens (T, B), targets (T, B), hidden (B, H)), "valid": …}"""
    return {part: tuple(torch.tensor(d[f"{part}_{what}"]) for what in ("input", "target", "hidden")) for part in ("train", "valid")}


class Problem:
    """A search step of the reference as arguments of `bilevel`."""

    def __init__(self, d: dict):
        c = d["config"]
        self.module = LossOf(LanguageModel(c["vocab"], MixedRNN(c["nhid"], c["nhid"], c["steps"], tuple(d["primitives"]))))
        self.weights = [our_weights(d["weights"])[name] for name in WEIGHTS]
        self.alphas = [torch.tensor(d["alpha"])]
        self.train, self.valid = batches(d).values()
        self.step = WeightStep.sgd(len(WEIGHTS), c["lr"], c["weight_decay"], c["clip"])

    def loss(self, weights, alphas, batch):
        values = dict(zip(WEIGHTS, weights)) | {"rnn.alpha": alphas[0]}
        return torch.func.functional_call(self.module, {"lm." + name: v for name, v in values.items()}, batch)

    def gradient(self, mode, step=None, **kwargs):
        return bilevel.architecture_gradient(self.loss, self.weights, self.alphas, self.train, self.valid, step or self.step, mode, **kwargs)


# --- discrete cells


def test_discrete_cell(cell):
    name, d = cell
    genotype = Genotype(d["genotype"]["recurrent"], d["genotype"]["concat"])
    if name in NAMED:
        assert genotype == NAMED[name]
    weights = our_weights(d["weights"])
    lm = load_searched_model(genotype, *weights["encoder.weight"].shape)
    load(lm, d["weights"])
    x, y, h = (torch.tensor(d[key]) for key in ("input", "target", "hidden"))

    nll, _, _, after = lm.loss(x, y, h)
    assert error(nll, d["loss"]) < TOLERANCE
    assert error(after, d["hidden_next"]) < TOLERANCE
    assert error(torch.autograd.grad(nll, lm.rnn.W0)[0], d["grad_W0"]) < TOLERANCE
    assert error(lm(x, h).decoded[-1].log_softmax(-1), d["log_prob_last"]) < TOLERANCE


# --- the supernet


def test_supernet_losses_and_hidden_state(search):
    problem = Problem(search)
    assert error(problem.loss(problem.weights, problem.alphas, problem.train), search["train_loss"]) < TOLERANCE
    assert error(problem.loss(problem.weights, problem.alphas, problem.valid), search["valid_loss"]) < TOLERANCE
    load(problem.module.lm, search["weights"])
    problem.module.lm.rnn.alpha.data.copy_(problem.alphas[0])
    assert error(problem.module.lm(problem.train[0], problem.train[2]).hidden, search["train_hidden_next"]) < TOLERANCE


def test_derived_genotype(derived):
    probabilities = torch.softmax(torch.tensor(derived["alpha"]), -1)
    assert derive(np.asarray(probabilities), tuple(derived["primitives"])) == Genotype(derived["genotype"])


def test_first_order_gradient(search):
    result = Problem(search).gradient("first_order")
    assert error(result.grads[0], search["first_order_alpha_grad"]) < TOLERANCE


def test_exact_gradient_through_the_clip(search):
    problem = Problem(search)
    result = problem.gradient("exact")
    assert error(result.grad_norm, search["train_grad_norm"]) < TOLERANCE
    assert error(result.valid_loss, search["unrolled_valid_loss"]) < TOLERANCE
    active = problem.step.clip is not None and result.coefficient < 1
    key = THROUGH_CLIP if THROUGH_CLIP in search else "exact_second_order_alpha_grad"
    if active and key != THROUGH_CLIP:
        pytest.skip("the clip is active and the file has no gradient through it")
    assert error(result.grads[0], search[key]) < TOLERANCE


def test_exact_gradient_with_the_clip_held_constant(search):
    # with c known, the clipped step is an unclipped one whose rate is c·lr
    problem, c = Problem(search), search["config"]
    factor = problem.gradient("exact").coefficient
    n = len(WEIGHTS)
    constant = WeightStep((Linear(factor * c["lr"], c["lr"] * c["weight_decay"]),) * n)
    assert error(problem.gradient("exact", constant).grads[0], search["exact_second_order_alpha_grad"]) < TOLERANCE

    # and once more without a line of ours: double backprop through the step as it is written down
    weights = [w.requires_grad_() for w in problem.weights]
    alpha = problem.alphas[0].requires_grad_()
    g = torch.autograd.grad(problem.loss(weights, [alpha], problem.train), weights, create_graph=True)
    unrolled = [w - c["lr"] * (factor * x + c["weight_decay"] * w) for w, x in zip(weights, g)]
    oracle, = torch.autograd.grad(problem.loss(unrolled, [alpha], problem.valid), alpha)
    assert error(oracle, search["exact_second_order_alpha_grad"]) < TOLERANCE


def test_finite_difference_reaches_the_exact_gradient(search):
    # how small r has to be depends on how near the nearest kink of relu is
    problem = Problem(search)
    exact = problem.gradient("exact").grads[0]
    assert min(error(problem.gradient("finite_difference", epsilon=r).grads[0], exact) for r in (1e-4, 1e-5, 1e-6)) < 1e-6


# --- the original's numerics, through the real strategy, Lightning module and evaluator


class StartFrom(pl.Callback):
    """Puts the hidden states of both streams where the reference has them."""

    def __init__(self, train, valid):
        self.train, self.valid = train, valid

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.training_module.hidden_train.copy_(self.train)
        pl_module.training_module.hidden_valid.copy_(self.valid)


def one_step(d: dict, **options):
    """One step of a search: (Lightning module after it, α's gradient, what `training_step` returned)."""
    c = d["config"]
    train, valid = batches(d).values()
    space = DartsRnnSpace(c["vocab"], c["nhid"], c["steps"], tuple(d["primitives"]))
    load(space.lm, d["weights"])
    strategy = SecondOrderDARTS(arc_learning_rate=c["arch_lr"], arc_weight_decay=c["arch_weight_decay"], gradient_clip_val=c["clip"],
                                log_prob_every_n_step=0, **options)
    supernet = strategy.mutate_model(space)
    cell, = (m for m in supernet.modules() if isinstance(m, MixedCell))
    cell.alpha.data.copy_(torch.tensor(d["alpha"]))
    training = LanguageModelModule(c["batch"], c["nhid"], c["bptt"], c["lr"], c["weight_decay"], tar=c["beta"])
    trainer = Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                      enable_model_summary=False, callbacks=[StartFrom(train[2], valid[2])])
    evaluator = strategy.mutate_evaluator(Lightning(training, trainer, train_dataloaders=DataLoader([(*train[:2], TRAIN)], batch_size=None),
                                                    val_dataloaders=DataLoader([(*valid[:2], VALID)], batch_size=None)))
    seen = {}
    module = evaluator.module
    gradient, step = module.architecture_gradient, module.training_step

    def keep(name, function, *args):
        seen[name] = function(*args)
        return seen[name]

    module.architecture_gradient, module.training_step = partial(keep, "gradient", gradient), partial(keep, "output", step)
    evaluator.evaluate(supernet)
    return module, cell, seen["gradient"][0], seen["output"]


@pytest.mark.filterwarnings("ignore")
def test_original_numerics_through_the_strategy(original):
    module, cell, gradient, output = one_step(original, reproduce_original=True)
    assert error(gradient, original["second_order_alpha_grad"]) < TOLERANCE
    assert error(cell.alpha, original["alpha_after_adam"]) < TOLERANCE
    assert error(output["loss"], original["weight_step_loss"]) < TOLERANCE
    lm = module.training_module.model.lm
    for name, golden in our_weights(original["weights_after_sgd"]).items():
        assert error(lm.get_parameter(name), golden) < TOLERANCE, name
        # of the change too, which the size of the weights would hide
        before = our_weights(original["weights"])[name]
        assert error(lm.get_parameter(name) - before, golden - before) < 1e-7, name


@pytest.mark.filterwarnings("ignore")
def test_ours_through_the_strategy(search):
    # no AR/TAR in the reference's gradients, so none in the training loss here
    d = search | {"config": search["config"] | {"beta": 0.0}}
    key = THROUGH_CLIP if THROUGH_CLIP in d else "exact_second_order_alpha_grad"
    first = "first_order_alpha_grad"
    for options, golden in (({"hvp": "exact"}, key), ({"hvp": "first_order"}, first), ({"unrolled_lr": 0}, first)):
        assert error(one_step(d, **options)[2], d[golden]) < TOLERANCE, options
