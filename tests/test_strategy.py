"""`SecondOrderDARTS` on our space, on NNI's own and on hand-made ones, with Lightning modules that know nothing of it."""

import csv
import os
import random
import socket
import subprocess
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from functools import partial

import nni
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from nni.nas.evaluator.pytorch import Classification, DataLoader, Lightning, LightningModule, Trainer
from nni.nas.experiment import NasExperiment
from nni.nas.nn.pytorch import InputChoice, LayerChoice, ModelSpace
from nni.nas.oneshot.pytorch.profiler import ExpectationProfilerPenalty
from nni.nas.profiler.pytorch.flops import NumParamsProfiler
from nni.nas.strategy import DARTS
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.plugins import MixedPrecision
from torch import nn
from torch.utils.data import TensorDataset
from torchmetrics import CatMetric

import nni_darts_rnn.strategy as strategy_module
from nni_darts_rnn import auxiliary, step_settings, strategies
from nni_darts_rnn.auxiliary import Before
from nni_darts_rnn.corpus import EOS, UNK, Corpus, Vocabulary
from nni_darts_rnn.evaluator import TRAIN, VALID, LanguageModelModule, search_evaluator
from nni_darts_rnn.genotype import PRIMITIVES, Genotype, derive
from nni_darts_rnn.recipes import get_recipe
from nni_darts_rnn.space import CellSpace, DartsRnnSpace, MixedCell, RecurrentSpace
from nni_darts_rnn.strategy import SecondOrderDARTS

pytestmark = pytest.mark.filterwarnings("ignore")  # NNI's and Lightning's advice
QUIET = dict(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)


def loader(batches):
    return DataLoader(list(batches), batch_size=None)


def search(space, training, train, valid, searcher, /, **options):
    """A whole search: (the one-shot Lightning module, the supernet). `train` and `valid` are lists of batches."""
    supernet = searcher.mutate_model(space)
    trainer = Trainer(**QUIET | dict(max_epochs=1) | options)
    evaluator = searcher.mutate_evaluator(Lightning(training, trainer, train_dataloaders=loader(train), val_dataloaders=loader(valid)))
    evaluator.evaluate(supernet)
    evaluator.module.set_model(supernet)
    return evaluator.module, supernet


def make(*, arc_learning_rate=0.1, log_prob_every_n_step=0, **kwargs) -> SecondOrderDARTS:
    return SecondOrderDARTS(arc_learning_rate=arc_learning_rate, log_prob_every_n_step=log_prob_every_n_step, **kwargs)


@pytest.fixture
def spy(monkeypatch):
    """What `bilevel.architecture_gradient` was called with and what it gave, step by step."""
    calls, real = [], step_settings.architecture_gradient

    def watched(loss, weights, alphas, train, valid, step, *args, **kwargs):
        result = real(loss, weights, alphas, train, valid, step, *args, **kwargs)
        copy = result._replace(grads=[g.clone() for g in result.grads])  # what is returned becomes `.grad`
        calls.append((step, copy, [w.detach().clone() for w in weights]))
        return result

    monkeypatch.setattr(step_settings, "architecture_gradient", watched)
    return calls


# --- a user's spaces and Lightning modules


class Regression(LightningModule):
    """Mean squared error by SGD. Counts its steps, and logs."""

    def __init__(self, lr=0.05, optimizer=torch.optim.SGD, gamma=None, **settings):
        super().__init__()
        self.make, self.gamma, self.steps = partial(optimizer, lr=lr, **settings), gamma, 0

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = (self.model(x) - y).pow(2).mean()
        self.log("train_loss", loss, on_step=True)
        self.log_dict({"double": 2 * loss}, on_step=True)
        self.steps += 1
        return loss

    def configure_optimizers(self):
        optimizer = self.make(self.parameters())
        if self.gamma is None:
            return optimizer
        schedulers = [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, self.gamma), "interval": "step"}]
        return [optimizer], schedulers


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Branches(ModelSpace):
    """y_k = a_k f_k(x_k) + b_k for two branches k, each with an f to be chosen."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(0.5 + torch.rand(2))
        candidates = {"identity": lambda z: z, "abs": torch.abs, "sin": lambda z: torch.sin(2 * z), "zero": torch.zeros_like}
        self.ops = nn.ModuleList(LayerChoice({name: Function(f) for name, f in candidates.items()}, label=f"op_{k}") for k in range(2))
        self.bias = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        return self.scale * torch.stack([op(z) for op, z in zip(self.ops, x.unbind(-1))], -1) + self.bias


def branch_batches(n, size=32, seed=0):
    """Batches of the branches (abs, sin)."""
    g = torch.Generator().manual_seed(seed)
    for _ in range(n):
        x = torch.randn(size, 3, generator=g)
        yield x, torch.stack([2 * x[:, 0].abs(), torch.sin(2 * x[:, 1]) - 1], -1)


class Nested(ModelSpace):
    """A choice inside a choice, a choice of inputs, one label used twice, BatchNorm and dropout."""

    def __init__(self, width=6, dropout=0.0):
        super().__init__()
        inner = LayerChoice({"linear": nn.Linear(width, width), "identity": nn.Identity()}, label="inner")
        self.stem = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width))
        self.outer = LayerChoice({"deep": nn.Sequential(inner, nn.Tanh()), "tanh": nn.Tanh(), "relu": nn.ReLU()}, label="outer")
        self.skip = InputChoice(n_candidates=3, n_chosen=1, label="skip")
        self.again = LayerChoice({"linear": nn.Linear(width, width), "identity": nn.Identity()}, label="inner")
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(width, 2))

    def forward(self, x):
        a = self.stem(x)
        b = self.outer(a)
        c = self.again(b)
        return self.head(self.skip([a, b, c]))


# --- on our space


def corpus(n=400, seed=0) -> Corpus:
    generator = torch.Generator().manual_seed(seed)
    vocab = Vocabulary((EOS, UNK, *"abcdefgh"))
    return Corpus("random", vocab, *(torch.randint(len(vocab), (k,), generator=generator) for k in (n, 200, 100)))


TINY = get_recipe("tiny", {"search": {"hidden_size": 6, "n_nodes": 3, "batch_size": 8, "eval_batch_size": 4, "epochs": 2}}).search


def test_experiment_on_the_recurrent_space(tmp_path):
    text = corpus()
    space = DartsRnnSpace(len(text.vocab), TINY.hidden_size, TINY.n_nodes, dropout=0.1, dropout_h=0.1, dropout_x=0.1, dropout_i=0.1)
    strategy = SecondOrderDARTS(arc_learning_rate=0.1, gradient_clip_val=0.25)
    experiment = NasExperiment(space, search_evaluator(text, TINY, accelerator="cpu", enable_progress_bar=False), strategy)
    experiment.config.experiment_working_directory = tmp_path
    experiment.run()
    sample, = experiment.export_top_models(formatter="dict")
    experiment.stop()  # it would at exit, writing to a log that pytest has closed by then
    genotype = Genotype.from_sample(sample)
    assert genotype.to_sample() == sample and genotype.n_nodes == TINY.n_nodes

    # by the paper's rule: per node the best edge by its best primitive other than none
    cell, = (m for m in strategy.supernet.modules() if isinstance(m, MixedCell))
    alpha, row = cell.alpha.detach(), 0
    assert alpha.abs().max() > 0.05  # it moved
    for node, (op, predecessor) in enumerate(genotype.recurrent, 1):
        p = torch.softmax(alpha[row:row + node], -1)[:, 1:]  # the first column is none
        assert p[predecessor, cell.primitives.index(op) - 1] == p.max()
        row += node
    assert genotype == derive(cell.probabilities().numpy(), cell.primitives)


def test_is_a_darts():
    strategy = make()
    assert isinstance(strategy, DARTS) and issubclass(strategy_module.SecondOrderDartsModule, strategy_module.DartsLightningModule)


# --- on other spaces


def digits(n):
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1) / 16  # (1797, 3, 8, 8)
    return TensorDataset(x[:n], torch.tensor(data.target[:n]))


@pytest.mark.parametrize("hvp, steps", [("finite_difference", 2), ("exact", 1)])
def test_hub_convolutional_space(hvp, steps):
    from nni.nas.hub.pytorch import DARTS as DartsSpace

    torch.manual_seed(0)
    strategy = make(hvp=hvp, gradient_clip_val=5.0)
    supernet = strategy.mutate_model(DartsSpace(width=2, num_cells=3, dataset="cifar"))
    data = digits(steps * 8)
    evaluator = Classification(num_classes=10, optimizer=torch.optim.SGD, learning_rate=0.05, train_dataloaders=DataLoader(data, batch_size=8),
                               val_dataloaders=DataLoader(data, batch_size=8), max_epochs=1, **QUIET)
    evaluator = strategy.mutate_evaluator(evaluator)
    evaluator.evaluate(supernet)
    evaluator.module.set_model(supernet)
    alphas = evaluator.module.arch_parameters()
    assert len(alphas) == 28 and all(a.detach().abs().max() > 0.05 for a in alphas)  # 14 edges of a normal and of a reduction cell; Adam moved each
    sample = evaluator.module.export()
    assert DartsSpace(width=2, num_cells=3, dataset="cifar").freeze(sample)(torch.randn(2, 3, 8, 8)).shape == (2, 10)
    # a metric in `training_step` has seen each training batch once, and no auxiliary pass
    assert int(evaluator.module.training_module.metrics["acc"]._update_count) == steps


def test_nested_choices_and_shared_labels():
    torch.manual_seed(0)
    module, supernet = search(Nested(), Regression(), branch_batches(8), branch_batches(8, seed=1), make(gradient_clip_val=1.0))
    sample = module.export()
    assert set(sample) == {"inner", "outer", "skip"} and len(sample["skip"]) == 1
    assert len(module.arch_parameters()) == 3
    assert Nested().freeze(sample)(torch.randn(4, 3)).shape == (4, 2)
    assert module.training_module.steps == 8  # one for each weight step


def test_alpha_has_the_order_of_the_modules():
    orders = []
    for _ in range(3):
        space = make().mutate_model(Nested())
        module = make().configure_oneshot_module(Regression())
        module.set_model(space)
        names = {id(p): name for name, p in space.named_parameters()}
        orders.append([names[id(p)] for p in module.arch_parameters()])
        assert [id(p) for p in module.configure_architecture_optimizers().param_groups[0]["params"]] == [id(p) for p in module.arch_parameters()]
    assert orders[0] == orders[1] == orders[2] == [n for n in names.values() if n.endswith("_arch_alpha")]


def test_what_modules_keep_in_containers_is_put_back():
    module = nn.Linear(2, 2)
    module.counts, module.last, module.named, module.nested = Counter(a=1), deque([1, torch.ones(2)], maxlen=2), defaultdict(list), {"deep": [[1], (2, {3})]}
    before, same = Before(module), module.counts
    for _ in range(2):
        with before.again():
            assert module.counts == Counter(a=1) and list(module.last)[0] == 1 and not module.named and module.nested == {"deep": [[1], (2, {3})]}
            module.counts["a"] += 1
            module.last[1].mul_(2)
            module.last.append(2)
            module.named["x"].append(1)
            module.nested["deep"][0].append(2)
            module.nested["deep"][1][1].add(4)
    assert module.counts is same and module.counts == Counter(a=1) and torch.equal(module.last[1], torch.ones(2)) and module.nested == {"deep": [[1], (2, {3})]}


def test_a_vocabulary_is_not_walked_word_by_word_and_arrays_are_put_back():
    module = nn.Linear(2, 2)
    module.words, module.seen = {f"word {i}": i for i in range(100)}, np.zeros(3)
    before, words = Before(module), module.words
    walked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auxiliary, "_copy", lambda value, copies, usual=auxiliary._copy: walked.append(value) or usual(value, copies))
        with before.again():
            module.words["new"] = 100
            module.seen += 1
    assert module.words is words and "new" not in words and not module.seen.any() and len(walked) < 20


def test_what_several_have_stays_one():
    """A list that a module, another one and a hook have, a tensor in two modules, and a container that holds itself."""
    one, other, losses, mask = nn.Linear(2, 2), nn.Linear(2, 2), [], torch.ones(2)
    one.losses, other.losses, one.mask, other.mask, one.loop = losses, losses, mask, (mask, 1), {}
    one.loop["self"] = one.loop
    whole = nn.ModuleList([one, other])
    one.register_forward_hook(lambda *_: losses.append(1.0))
    before = Before(whole)
    losses.append(5.0)
    for _ in range(2):
        with before.again():
            assert one.losses is other.losses is losses and not losses and one.mask is other.mask[0] and one.mask is not mask and one.loop["self"] is one.loop
            one(torch.ones(2))
            one.mask.mul_(2)
            assert losses == [1.0]
    assert losses == [5.0] and one.mask is mask is other.mask[0] and torch.equal(mask, torch.ones(2)) and one.loop["self"] is one.loop


def test_a_set_holds_the_tensors_that_it_held():
    module, a, b = nn.Linear(2, 2), torch.ones(2), torch.zeros(2)
    module.seen = {a, b}
    before, seen = Before(module), module.seen
    with before.again():
        assert module.seen is seen and a in seen and b in seen
        seen.remove(a)
        seen.add(torch.ones(3))
    assert len(seen) == 2 and a in seen and b in seen


@pytest.mark.parametrize("value", [1, torch.ones(2)], ids=["plain", "tensor"])
def test_a_dict_is_put_back_in_its_order(value):
    """As one has it that forgets what was not used for longest."""
    module = nn.Linear(2, 2)
    module.recent, order = OrderedDict(a=value, b=value, c=value), []
    before = Before(module)
    module.recent.move_to_end("a")
    with before.again():
        order += module.recent
        module.recent.move_to_end("b")
    assert order == ["a", "b", "c"] and list(module.recent) == ["b", "c", "a"]


def test_generators_and_empty_buffers_are_put_back():
    module = nn.Linear(2, 2)
    module.generators = [torch.Generator().manual_seed(1), random.Random(1), np.random.default_rng(1), np.random.RandomState(1)]
    module.register_buffer("state", None)

    def draw():
        a, b, c, d = module.generators
        return torch.rand((), generator=a).item(), b.random(), c.random(), d.rand()

    before = Before(module)
    first, second = draw(), draw()
    module.state = torch.ones(2)
    for _ in range(2):
        with before.again():
            assert module.state is None and draw() == first
            module.state = torch.zeros(2)
    assert torch.equal(module.state, torch.ones(2)) and draw() not in (first, second)
    module.generators[0].manual_seed(1)
    assert torch.rand((), generator=module.generators[0]).item() == first[0]


class Penalised(ModelSpace):
    """A penalty on what a choice gives; `shared`: left by a hook in a list of the whole model's."""

    def __init__(self, shared: bool):
        super().__init__()
        self.op = LayerChoice({"tanh": nn.Tanh(), "twice": Function(lambda x: 2 * x)}, label="op")
        self.out, self.weight, self.shared = Function(lambda y: y), nn.Parameter(torch.ones(())), shared
        self.losses = losses = []
        if shared:
            self.out.register_forward_hook(lambda module, inputs, y: losses.append(y.pow(2).mean()))

    def forward(self, x):
        y = self.out(self.op(self.weight * x))
        penalty = sum(self.losses) if self.shared else y.pow(2).mean()
        self.losses.clear()
        return y + 5 * penalty


@pytest.mark.parametrize("hvp", ["exact", "finite_difference", "first_order"])
def test_a_loss_that_a_hook_leaves_in_a_list_of_the_model(hvp):
    x = torch.linspace(-1, 1, 8)
    found = []
    for shared in (False, True):
        torch.manual_seed(0)
        module, space = search(Penalised(shared), Regression(lr=0.005), [(x, x.sin())] * 4, [(x, x.cos())] * 4, make(hvp=hvp))
        found.append([p.detach().clone() for p in (*module.arch_parameters(), space.weight)])
    for a, b in zip(*found):
        assert torch.equal(a, b)


def test_finds_the_known_best():
    found = 0
    for seed in range(20):
        torch.manual_seed(seed)
        module, _ = search(Branches(), Regression(lr=0.1), branch_batches(30, seed=seed), branch_batches(30, seed=100 + seed), make())
        found += module.export() == {"op_0": "abs", "op_1": "sin"}
    assert found >= 19


class Adapting(ModelSpace):
    """A weight w, and the share p of candidate "a" of a choice between 1 and 0."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.5))
        self.choice = LayerChoice({"a": Function(torch.ones_like), "b": Function(torch.zeros_like)}, label="choice")

    def forward(self):
        return self.w, self.choice(self.w)


class Follow(LightningModule):
    """Training pulls w to p; validation wants w = 1, and p small for its own sake: (w − 1)² + p/2.

    For the w of the moment less p is always better. Once w has followed p, (p − 1)² + p/2 is least at p = 3/4: "a" is right.
    """

    def training_step(self, batch, batch_idx):
        w, p = self.model()
        return (w - p) ** 2 / 2 if batch == "train" else (w - 1) ** 2 + p / 2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.9)


@pytest.mark.parametrize("options, right", [({}, True), ({"hvp": "exact"}, True), ({"hvp": "first_order"}, False), ({"unrolled_lr": 0}, False)],
                         ids=str)
def test_second_order_is_right_where_first_order_is_wrong(options, right):
    module, _ = search(Adapting(), Follow(), ["train"] * 60, ["valid"] * 60, make(arc_weight_decay=0, **options))
    assert module.export() == {"choice": "a" if right else "b"}
    share = module.export_probs()["choice"]["a"]
    # one step with ξ = 0.9 has its balance where 1/2 = 2 (1 − p) ξ
    assert abs(share - (1 - 0.25 / 0.9)) < 0.03 if right else share < 0.1


def test_nni_first_order_chooses_wrong_too():
    module, _ = search(Adapting(), Follow(), ["train"] * 60, ["valid"] * 60, DARTS(arc_learning_rate=0.1))
    assert module.export() == {"choice": "b"}


# --- what NNI's DARTS works with


def test_warmup(spy):
    alphas, required = [], []

    class Watch(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            alphas.append([a.detach().clone() for a in pl_module.arch_parameters()])
            required.append({a.requires_grad for a in pl_module.arch_parameters()})

    search(Branches(), Regression(), branch_batches(3), branch_batches(3), make(warmup_epochs=2), max_epochs=4, callbacks=[Watch()])
    assert len(spy) == 6  # 3 batches in each of the last two epochs
    assert all(torch.equal(a, b) for a, b in zip(alphas[0], alphas[1])) and not torch.equal(alphas[1][0], alphas[2][0])
    assert required == [{False}, {False}, {True}, {True}]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("hvp", ["finite_difference", "exact"])
def test_the_weights_take_the_step_that_was_unrolled_or_one_at_the_new_alpha(spy, hvp, optimizer):
    """Against the steps by hand: the same α gradient in both, and the weight step's at α before its move, or after it."""
    (x, y), valid = next(branch_batches(1)), next(branch_batches(1, seed=1))
    gradients, alphas = [], []

    class Watch(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            alphas[:] = [torch.stack([a.detach().clone() for a in pl_module.arch_parameters()])]  # (2, 4)

    for own in (False, True):
        torch.manual_seed(0)
        spy.clear()
        module, _ = search(Branches(), Regression(lr=0.1, optimizer=optimizer), [(x, y)], [valid], make(hvp=hvp, own_gradient=own, gradient_clip_val=0.5),
                           callbacks=[Watch()])
        (step, found, weights), = spy
        start, = alphas
        moved = start - 0.1 * torch.stack(found.grads).sign()  # Adam's first step
        at = moved if own else start
        leaves = [w.requires_grad_() for w in weights]  # scale (2,), bias (2,)
        candidates = torch.stack([x[:, :2], x[:, :2].abs(), torch.sin(2 * x[:, :2]), torch.zeros_like(x[:, :2])], -1)  # (B, 2, 4)
        loss = ((leaves[0] * (candidates * at.softmax(-1)).sum(-1) + leaves[1] - y) ** 2).mean()
        g = torch.autograd.grad(loss, leaves)
        expected = step.apply(weights, g, step.coefficient(g))
        named = dict(module.training_module.model.named_parameters())
        for name, value in zip(("scale", "bias"), expected):
            assert torch.allclose(named[name], value, atol=1e-6), (own, name)
        assert (moved - start).abs().min() > 0.09
        gradients.append(torch.stack(found.grads))
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-8)


def test_a_step_of_length_nought_is_first_order_to_the_last_bit():
    """Which shares no step."""
    found = []
    for options in ({"hvp": "first_order"}, {"unrolled_lr": 0}):
        torch.manual_seed(0)
        module, _ = search(Branches(), Regression(lr=0.1), branch_batches(5), branch_batches(5, seed=1), make(**options))
        found.append([p.detach() for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_weight_step_has_no_gradient_for_alpha(spy):
    module, _ = search(Branches(), Regression(), branch_batches(2), branch_batches(2), make())
    for alpha, grad in zip(module.arch_parameters(), spy[-1][1].grads):
        assert alpha.requires_grad and torch.equal(alpha.grad, grad)  # the architecture step's, and nothing added


def test_clip_and_schedulers_are_unrolled(spy):
    search(Branches(), Regression(lr=0.1, gamma=0.5, momentum=0.9), branch_batches(3), branch_batches(3), make(gradient_clip_val=0.01))
    assert [step.parts[0].rate for step, _, _ in spy] == pytest.approx([0.1, 0.05, 0.025])
    assert all(step.clip == 0.01 and result.coefficient < 1 for step, result, _ in spy)
    # the first real step is as long as the clip allows
    moved = torch.cat([(a - b).flatten() for a, b in zip(spy[1][2], spy[0][2])])
    assert float(moved.norm()) == pytest.approx(0.1 * 0.01, rel=1e-3)


class Sizes(ModelSpace):
    """A choice between a small and a large layer."""

    def __init__(self):
        super().__init__()
        self.layer = LayerChoice({"small": nn.Linear(3, 2), "large": nn.Sequential(nn.Linear(3, 30), nn.ReLU(), nn.Linear(30, 2))}, label="layer")

    def forward(self, x):
        return self.layer(x)


def test_penalty(spy, tmp_path):
    def grads(penalty):
        torch.manual_seed(0)
        space = Sizes()
        profiler = NumParamsProfiler(space, torch.randn(2, 3))
        options = {"penalty": ExpectationProfilerPenalty(profiler, 10.0, scale=2.0, nonlinear="absolute", aggregate="mul")} if penalty else {}
        search(space, Regression(), branch_batches(1), branch_batches(1), make(**options), logger=CSVLogger(tmp_path, penalty), log_every_n_steps=1)
        return spy.pop()[1]

    without, with_penalty = grads(""), grads("penalty")
    ratio = with_penalty.valid_loss / without.valid_loss
    assert ratio > 1.5
    for a, b in zip(with_penalty.grads, without.grads):
        assert not torch.allclose(a, ratio * b, rtol=0.1, atol=1e-6)  # as if it were a number
    row, = csv.DictReader((tmp_path / "penalty" / "version_0" / "metrics.csv").open())
    assert float(row["penalty/penalty"]) > 0


class Recurrent(RecurrentSpace):
    def __init__(self, relaxation):
        super().__init__()
        self.rnn = CellSpace(3, 4, 2, relaxation=relaxation)

    def forward(self, x):
        return self.rnn(x)


class Relus(ExpectationProfilerPenalty):
    """How many ReLUs the edges of a cell have together, on average."""

    def profile(self, sample):
        return sum(edge["relu"] for edge in sample.values())


@pytest.mark.parametrize("relaxation", ["edge", "node", "gumbel"])
def test_a_penalty_on_a_cell_moves_alpha_by_the_gradient_of_the_expected_cost(relaxation, spy):
    def begin():
        torch.manual_seed(0)
        return Recurrent(relaxation)

    def direct(scale):
        batches = [(torch.linspace(-1, 1, 90).view(5, 6, 3), torch.zeros(5, 6, 4))]
        search(begin(), Regression(), batches, batches, make(penalty=Relus(None, 1.0, scale=scale)))
        return spy.pop()[1].direct[0]

    alpha = make().mutate_model(begin()).rnn.alpha.detach().requires_grad_()  # (3, 5): node 1 has one edge, node 2 two
    allowed = alpha.clone()
    if relaxation == "gumbel":
        allowed[:, PRIMITIVES.index("none")] = -torch.inf
    groups = allowed if relaxation == "edge" else [allowed[:1], allowed[1:]]
    cost = sum(torch.exp(group.reshape(-1, 5)[:, PRIMITIVES.index("relu")]).sum() / torch.exp(group).sum() for group in groups)
    expected, = torch.autograd.grad(cost, alpha)
    torch.testing.assert_close(direct(2.0) - direct(0.0), 2 * expected, rtol=1e-4, atol=1e-6)


def test_several_loggers_see_the_training_alone(tmp_path):
    loggers = [CSVLogger(tmp_path, name) for name in ("one", "two")]
    strategy = make(log_prob_every_n_step=2)
    module, _ = search(Branches(), Regression(), branch_batches(5), branch_batches(5), strategy, logger=loggers, log_every_n_steps=1)
    for name in ("one", "two"):
        rows = list(csv.DictReader((tmp_path / name / "version_0" / "metrics.csv").open()))
        assert len([r for r in rows if r["train_loss"]]) == len([r for r in rows if r["double"]]) == 5
        assert any(r.get("prob/op_0/abs") for r in rows)
    assert module.training_module.steps == 5


def test_accumulation_is_refused():
    with pytest.raises(pl.utilities.exceptions.MisconfigurationException, match="gradient accumulation is not supported for manual optimization"):
        search(Branches(), Regression(), branch_batches(2), branch_batches(2), make(), accumulate_grad_batches=2)
    with pytest.raises(pl.utilities.exceptions.MisconfigurationException, match="gradient clipping is not supported for manual optimization"):
        search(Branches(), Regression(), branch_batches(2), branch_batches(2), make(), gradient_clip_val=1.0)


class ClippedItsOwnWay(Regression):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.clip_gradients(optimizer, 0.1, "value")


@pytest.mark.parametrize("training, options, words", [
    (Regression, {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))]}, "precision: a gradient scaler"),
    (Regression, {"gradient_clip_algorithm": "value"}, "gradient clipping: the step that is unrolled is clipped by its norm"),
    (ClippedItsOwnWay, {}, "gradient clipping: the step that is unrolled is clipped by its norm"),
])
def test_a_step_that_would_not_be_the_one_unrolled_is_refused(training, options, words):
    with pytest.raises(ValueError, match=words):
        search(Branches(), training(), branch_batches(2), branch_batches(2), make(gradient_clip_val=0.1), **options)


class ChangesGradients(Regression):
    def on_after_backward(self):
        for p in self.parameters():
            if p.grad is not None:
                p.grad.mul_(0.1)


@pytest.mark.parametrize("own_gradient", [False, True])
def test_gradients_that_are_changed_are_refused_but_not_in_first_order(own_gradient):
    with pytest.raises(ValueError, match="on_after_backward: it changes the gradients"):
        search(Branches(), ChangesGradients(), branch_batches(2), branch_batches(2), make(own_gradient=own_gradient))
    search(Branches(), ChangesGradients(), branch_batches(2), branch_batches(2), make(hvp="first_order"))


class SetsTheRate(Regression):
    """`before` or after the step, as Lightning's documentation warms a rate up; and once in the middle of a search."""

    def __init__(self, before: bool):
        super().__init__()
        self.before = before

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        for now in (True, False):
            if now == self.before:
                for group in optimizer.param_groups:
                    group["lr"] = 0.05 / (batch_idx + 1)
            if now:
                super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


class Scales(pl.Callback):
    """The weights' gradients, in one of the two hooks."""

    def __init__(self, hook: str):
        self.scaled = False
        setattr(self, hook, self.scale)

    def scale(self, trainer, module, optimizer=None):
        if not getattr(optimizer, "is_arch_optimizer", False):
            for p in module.training_module.parameters():
                if p.grad is not None:
                    p.grad.mul_(0.1)


@pytest.mark.parametrize("own_gradient", [False, True])
@pytest.mark.parametrize("clip", [None, 0.5, 100.0])
@pytest.mark.parametrize("training, callback, words", [
    (partial(SetsTheRate, True), None, r"lr: 0\.025 in the weights' step, but 0\.05 when that was unrolled"),
    (Regression, partial(Scales, "on_after_backward"), "on_after_backward: it changes the gradients"),
    (Regression, partial(Scales, "on_before_optimizer_step"), "the gradients are no longer those of the step that was unrolled"),
], ids=["optimizer_step", "on_after_backward", "on_before_optimizer_step"])
def test_a_step_that_changes_after_it_was_unrolled_is_refused(training, callback, words, clip, own_gradient):
    def run(**settings):
        return search(Branches(), training(), branch_batches(2), branch_batches(2), make(gradient_clip_val=clip, **settings),
                      callbacks=[callback()] if callback else [])

    with pytest.raises(ValueError, match=words):
        run(own_gradient=own_gradient)
    run(hvp="first_order")


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_rate_that_changes_between_steps_is_not_refused(optimizer, spy):
    training = SetsTheRate(False)
    training.make = partial(optimizer, lr=torch.tensor(0.05) if optimizer is torch.optim.AdamW else 0.05)
    search(Branches(), training, branch_batches(3), branch_batches(3), make(gradient_clip_val=0.1))
    assert [pytest.approx(step.parts[0].rate) for step, *_ in spy] == [0.05, 0.05, 0.025]


def test_a_rate_that_is_not_the_unrolled_steps_may_change():
    search(Branches(), SetsTheRate(True), branch_batches(2), branch_batches(2), make(unrolled_lr=0.1))


class Looks(Regression):
    """Logs the gradients' norm, and keeps things of its own in the optimizer's groups."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        optimizer.param_groups[0] |= {"scales": torch.ones(3)}
        return optimizer

    def on_before_optimizer_step(self, optimizer):
        self.seen = getattr(self, "seen", 0) + 1
        optimizer.param_groups[0]["count"] = self.seen


class LooksToo(pl.Callback):
    def on_after_backward(self, trainer, module):
        torch.nn.utils.clip_grad_norm_(module.training_module.parameters(), float("inf"))


@pytest.mark.parametrize("own_gradient", [False, True])
def test_who_only_looks_at_the_gradients_is_not_refused(own_gradient):
    module, _ = search(Branches(), Looks(), branch_batches(3), branch_batches(3), make(gradient_clip_val=0.5, own_gradient=own_gradient), callbacks=[LooksToo()])
    assert module.training_module.seen == 3


class NormaliseOnArrival(Regression):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0] / 2, batch[1]


def test_a_hook_that_nni_never_calls_is_refused():
    with pytest.raises(ValueError, match="^on_after_batch_transfer: NNI's one-shot strategies do not call it"):
        search(Branches(), NormaliseOnArrival(), branch_batches(2), branch_batches(2), make())


class KeepsAList(Regression):
    def on_fit_start(self):
        self.kept = [self.model.scale]

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + sum(p.square().sum() for p in self.kept)


class InAList(Branches):
    """A layer that is in no module."""

    def __init__(self):
        super().__init__()
        self.last = [nn.Linear(2, 2)]

    def forward(self, x):
        return self.last[0](super().forward(x))


class MovesTheList(Regression):
    def configure_optimizers(self):
        return self.make([*self.parameters(), *self.model.last[0].parameters()])


@pytest.mark.parametrize("space, training, words", [(Branches, KeepsAList, "the loss keeps weights of its own"),
                                                    (InAList, MovesTheList, "the optimizer moves 2 tensors that belong to no module")])
def test_weights_that_cannot_be_moved_by_name_are_refused(space, training, words):
    with pytest.raises(ValueError, match=words):
        search(space(), training(), branch_batches(2), branch_batches(2), make())
    for first_order in ({"hvp": "first_order"}, {"unrolled_lr": 0.0}):
        search(space(), training(), branch_batches(2), branch_batches(2), make(**first_order))


@pytest.mark.parametrize("kind", [SecondOrderDARTS, strategies.DARTS, strategies.GumbelDARTS, strategies.Proxyless])
def test_a_scheduler_that_waits_for_a_metric_is_refused(kind):
    class Plateau(Regression):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer), "monitor": "train_loss"}}

    class StepsIt(Plateau):
        def lr_scheduler_step(self, scheduler, metric):
            scheduler.step(self.trainer.callback_metrics["train_loss"])
            self.stepped = scheduler.last_epoch

    with pytest.raises(ValueError, match="^ReduceLROnPlateau: "):
        search(Branches(), Plateau(), branch_batches(2), branch_batches(2), kind())
    assert search(Branches(), StepsIt(), branch_batches(2), branch_batches(2), kind())[0].training_module.stepped == 1


class OwnStep(torch.optim.SGD):
    def step(self, closure=None):
        return super().step(closure)


def test_sgd_by_another_name():
    found = []
    for kind in (torch.optim.SGD, nni.trace(torch.optim.SGD), type("Ours", (torch.optim.SGD,), {})):
        torch.manual_seed(0)
        found.append(search(Branches(), Regression(optimizer=kind), branch_batches(2), branch_batches(2), make())[0].arch_parameters())
    assert len(found[0]) > 0 and all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    with pytest.raises(ValueError, match="OwnStep, a subclass, has a step of its own"):
        search(Branches(), Regression(optimizer=OwnStep), branch_batches(2), branch_batches(2), make())


def test_the_published_numerics_are_of_sgd():
    with pytest.raises(ValueError, match="Adam"):
        search(Branches(), Regression(optimizer=torch.optim.Adam), branch_batches(2), branch_batches(2), make(reproduce_original=True, gradient_clip_val=0.1))


def test_a_text_is_not_read_whole_by_each_of_several_processes(monkeypatch):
    words = ("<eos>", "<unk>", *"abcdefgh")
    text = Corpus("made", Vocabulary(words), *(torch.randint(10, (200,)) for _ in range(3)))
    loader = search_evaluator(text, get_recipe("tiny", {"search.batch_size": 4}).search, accelerator="cpu", devices=1).train_dataloaders
    assert next(iter(loader))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="devices: each of several processes would read the whole text"):
        next(iter(loader))


def test_other_optimizers_are_refused_by_name_but_not_in_first_order():
    with pytest.raises(ValueError, match="SGD, Adam and AdamW; not RMSprop"):
        search(Branches(), Regression(optimizer=torch.optim.RMSprop), branch_batches(2), branch_batches(2), make())
    found = []
    for options in ({"hvp": "first_order"}, {"unrolled_lr": 0}):
        torch.manual_seed(0)
        found.append(search(Branches(), Regression(optimizer=torch.optim.RMSprop), branch_batches(2), branch_batches(2), make(**options))[0].arch_parameters())
    assert all(torch.equal(a, b) for a, b in zip(*found)) and len(found[0]) > 0


def test_frozen_weights_take_no_part(spy):
    space = Branches()
    space.scale.requires_grad_(False)
    _, supernet = search(space, Regression(momentum=0.9), branch_batches(2), branch_batches(2), make())
    assert [len(weights) for _, _, weights in spy] == [1, 1]  # the bias


@pytest.mark.parametrize("options, message", [
    ({"arc_learning_rate": -1}, "arc_learning_rate: -1 must be at least 0"), ({"epsilon": 0}, "epsilon: 0 must be above 0"),
    ({"gradient_clip_val": 0}, "gradient_clip_val: 0 must be above 0"), ({"unrolled_lr": -0.1}, "unrolled_lr: -0.1 must be at least 0"),
    ({"hvp": "finite"}, "'finite' is none of.*finite_difference"), ({"reproduce_original": True}, "give gradient_clip_val"),
    ({"warmup_epochs": float("nan")}, "warmup_epochs: nan"), ({"unrolled_lr": float("inf")}, "unrolled_lr: inf must be at least 0, and finite"),
    ({"epsilon": float("inf")}, "epsilon: inf must be above 0, and finite"), ({"neumann_terms": 1.5}, "neumann_terms: 1.5 must be a whole number"),
    ({"warmup_epochs": True}, "warmup_epochs: True must be a whole number"), ({"arc_betas": (0.9, 1.5)}, "arc_betas: .0.9, 1.5. must be two numbers, each at least 0 and below 1"),
    ({"arc_betas": (0.9,)}, "arc_betas: .0.9,. must be two numbers, each at least 0 and below 1"), ({"arc_betas": 0.9}, "arc_betas: 0.9 must be two numbers"),
    ({"arc_learning_rate": "3e-3"}, "arc_learning_rate: '3e-3' must be a number"), ({"epsilon": None}, "epsilon: None must be a number"),
    ({"own_gradient": "false"}, "own_gradient: 'false' must be True or False"), ({"reproduce_original": 0}, "reproduce_original: 0 must be True or False"),
    ({"arc_learning_rate": True}, "arc_learning_rate: True must be a number"), ({"log_prob_every_n_step": 2.5}, "log_prob_every_n_step: 2.5 must be a whole number"),
    ({"neumann_terms": 2, "hvp": "first_order"}, "neumann_terms: 2 terms"), ({"neumann_terms": 2, "unrolled_lr": 0}, "neumann_terms: 2 terms"),
    ({"reproduce_original": True, "gradient_clip_val": 1, "hvp": "exact"}, "reproduce_original: the published code has a finite difference")], ids=str)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SecondOrderDARTS(**options)


def test_nothing_to_search():
    class Closed(ModelSpace):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x):
            return self.linear(x)

    with pytest.raises(ValueError, match="nothing to search"):
        search(Closed(), Regression(), branch_batches(1), branch_batches(1), make())


# --- an architecture step leaves no trace


class Noisy(Regression):
    """Draws from every generator, and moves a buffer, a metric and attributes of its own, in place too."""

    def __init__(self, momentum=0.9):
        super().__init__(momentum=momentum, weight_decay=1e-3)
        self.register_buffer("seen", torch.zeros(()))
        self.last, self.times, self.history, self.metric = None, torch.zeros(()), [], CatMetric()

    def training_step(self, batch, batch_idx):
        x, y = batch
        x = x + 0.1 * torch.randn_like(x) + 0.1 * random.random() + 0.1 * torch.as_tensor(np.random.rand(3), dtype=x.dtype)
        loss = super().training_step((x, y), batch_idx)
        self.seen += loss.detach().float()
        self.times += 1
        self.history.append(float(self.metric(loss.detach().float())))
        self.last = x
        return loss


class Losses(pl.Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].detach().clone())


def trace(build, precision, **options) -> dict:
    """All that a search of some steps leaves behind, with α's learning rate at 0."""
    pl.seed_everything(3, verbose=False)
    space, training, train, valid, clip = build()
    callback = Losses()
    strategy = make(arc_learning_rate=0, gradient_clip_val=clip, **options)
    module, _ = search(space, training, train, valid, strategy, precision=precision, callbacks=[callback])
    optimizer = module.trainer.optimizers[0]
    return {"state": module.state_dict(), "losses": callback.losses,
            "attributes": {name: getattr(training, name, None) for name in ("steps", "last", "times", "history")},
            "metric": training.metric.compute() if hasattr(training, "metric") else None,
            "optimizer": [optimizer.state[p] for g in optimizer.param_groups for p in g["params"]],
            "random": (torch.get_rng_state(), np.random.get_state()[1:], random.getstate())}


def same(a, b) -> bool:
    """Bit for bit."""
    if isinstance(a, torch.Tensor) or isinstance(a, np.ndarray):
        return a.dtype == b.dtype and bool((a == b).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def noisy():
    return Nested(dropout=0.3), Noisy(), branch_batches(4), branch_batches(4, seed=1), 0.5


def noisy_without_momentum():
    return Nested(dropout=0.3), Noisy(momentum=0.0), branch_batches(4), branch_batches(4, seed=1), 0.5


def language():
    g = torch.Generator().manual_seed(0)
    space = DartsRnnSpace(10, 6, 3, dropout=0.3, dropout_h=0.2, dropout_x=0.3, dropout_i=0.2, dropout_e=0.1)
    batches = [[(*torch.randint(10, (2, 4, 8), generator=g), stream) for _ in range(3)] for stream in (TRAIN, VALID)]
    return space, LanguageModelModule(8, 6, 4, lr=2.0, tar=1e-2), *batches, 0.25


def alpha_without_dropout():
    space, module, *rest = language()
    module.alpha_dropout = False
    return space, module, *rest


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("build", [noisy, noisy_without_momentum, language, alpha_without_dropout])
def test_leaves_no_trace(build, precision):
    plain = trace(build, precision, warmup_epochs=99)
    plain["state"].pop("training_module.hidden_valid", None)
    for options in ({}, {"hvp": "exact"}, {"hvp": "first_order"}, {"neumann_terms": 1}, {"reproduce_original": True}):
        if build is noisy and "reproduce_original" in options:
            with pytest.raises(ValueError, match="plain SGD"):
                trace(build, precision, **options)
            continue
        ours = trace(build, precision, **options)
        if build in (language, alpha_without_dropout):  # the validation text is read in architecture steps alone, so this is what they are to move on
            assert ours["state"].pop("training_module.hidden_valid").abs().sum() > 0
        for part in plain:
            assert same(ours[part], plain[part]), (options, part)


# --- two processes


class SumOverProcesses(torch.autograd.Function):
    """Differentiable, and so is its derivative."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        torch.distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return SumOverProcesses.apply(grad.contiguous())


class Normalise(nn.Module):
    """BatchNorm without memory over the batches of all processes."""

    def forward(self, x):
        total = torch.stack([x.sum(0), x.pow(2).sum(0), torch.full_like(x[0], len(x))])
        if torch.distributed.is_initialized():
            total = SumOverProcesses.apply(total)
        mean, square = total[0] / total[2], total[1] / total[2]
        return (x - mean) / (square - mean.pow(2) + 1e-3).sqrt()


class Shared(ModelSpace):
    """Smooth, so that a rounding error stays one."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(3, 8), Normalise())
        self.op = LayerChoice({"tanh": nn.Tanh(), "sigmoid": nn.Sigmoid(), "identity": nn.Identity()}, label="op")
        self.unused = LayerChoice({"a": nn.Identity(), "b": nn.Tanh()}, label="unused")
        self.bn, self.head = Normalise(), nn.Linear(8, 2)

    def forward(self, x, mask):
        return self.head(self.bn(self.op(self.stem(x))) * mask)


class Sharded(Regression):
    """Each process takes its own rows of a batch. The masks come with the batch, so that they are the same however it is shared out."""

    def __init__(self):
        super().__init__(lr=0.2, momentum=0.9, weight_decay=1e-3, gamma=0.97)
        self.register_buffer("rows", torch.zeros(()))

    def training_step(self, batch, batch_idx):
        x, y, mask = (t[self.trainer.global_rank::self.trainer.world_size] for t in batch)
        self.rows += x.sum()
        return (self.model(x, mask) - y).pow(2).mean()


def sharded_search(hvp: str, **options) -> dict:
    """20 steps in float64; warm-up in the first 5."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        def batches(seed):
            g = torch.Generator().manual_seed(seed)
            for x, y in branch_batches(5, 16, seed):
                yield x.double(), y.double(), 2.0 * torch.bernoulli(torch.full((16, 8), 0.5), generator=g)

        if os.environ.get("LOCAL_RANK", "0") == "1":
            torch.manual_seed(99)  # begins elsewhere; rank 0 has the say
        strategy = make(hvp=hvp, gradient_clip_val=0.3, warmup_epochs=1, neumann_terms=1, epsilon=1e-3)
        module, supernet = search(Shared(), Sharded(), batches(0), batches(1), strategy, max_epochs=4, use_distributed_sampler=False, **options)
        return {"state": {name: p.detach() for name, p in supernet.named_parameters()}, "rows": module.training_module.rows}
    finally:
        torch.set_default_dtype(torch.float32)


def sharded_language_model(**options) -> dict:
    """Our own space and module, each process with batches of its own; masks and BatchNorm are each process's own too."""
    torch.manual_seed(0)
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    g = torch.Generator().manual_seed(rank)
    batches = [[(*torch.randint(10, (2, 4, 8), generator=g), stream) for _ in range(5)] for stream in (TRAIN, VALID)]
    space = DartsRnnSpace(10, 6, 3, dropout=0.3, dropout_h=0.2)
    training, strategy = LanguageModelModule(8, 6, 4, lr=2.0), make(gradient_clip_val=0.25)
    module, supernet = search(space, training, *batches, strategy, use_distributed_sampler=False, **options)
    return {"state": {name: p.detach() for name, p in supernet.named_parameters()}, "hidden": module.training_module.hidden_train}


def main(folder: str) -> None:
    """One of the two processes; Lightning starts the other."""
    torch.set_num_threads(1)
    results = []
    for function in (partial(sharded_search, "finite_difference"), partial(sharded_search, "exact"), sharded_language_model):
        results.append(function(devices=2, strategy=pl.strategies.DDPStrategy(process_group_backend="gloo")))
    torch.save(results, os.path.join(folder, f"{os.environ.get('LOCAL_RANK', '0')}.pt"))


def test_two_processes(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE")}
    subprocess.run([sys.executable, "-W", "ignore", __file__, str(tmp_path)], check=True, timeout=300,
                   env=environment | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"})
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for a, b in zip(*ranks):
        assert same(a["state"], b["state"])  # α and weights
    for index, hvp in enumerate(("finite_difference", "exact")):
        alone = sharded_search(hvp)
        joined = ranks[0][index]
        for name, p in alone["state"].items():
            assert torch.allclose(joined["state"][name], p, rtol=1e-7, atol=1e-9), (hvp, name)
        assert float(alone["rows"]) == pytest.approx(float(joined["rows"] + ranks[1][index]["rows"]))
        assert alone["state"]["op._arch_alpha"].abs().max() > 0.1  # it moved
    assert not torch.equal(ranks[0][2]["hidden"], ranks[1][2]["hidden"])


if __name__ == "__main__":
    main(sys.argv[1])
