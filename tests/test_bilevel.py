"""The architecture gradient against double backprop, and against closed forms, in float64."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from nni_darts_rnn.bilevel import RandomState, TrainingPass, architecture_gradient
from nni_darts_rnn.model import LanguageModel
from nni_darts_rnn.published import original_gradient
from nni_darts_rnn.supernet import MixedRNN
from nni_darts_rnn.weight_step import WeightStep, norm

SMOOTH = ("none", "tanh", "sigmoid", "identity")


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def error(ours, truth) -> float:
    """Relative error of a list of tensors, taken together."""
    return float((norm([a - b for a, b in zip(ours, truth)]) / norm(truth)).detach())


def test_a_step_that_goes_by_momentum_alone():
    """With dampening 1 the step is what momentum carries, whatever the gradient is: α's gradient is the direct one, at w′."""
    w, a = nn.Parameter(torch.tensor([1.0, -2.0])), torch.tensor([0.5, 3.0])
    optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9, dampening=1)
    w.grad = torch.tensor([3.0, -5.0])
    optimizer.step()
    moved = w.detach() - 0.1 * 0.9 * optimizer.state[w]["momentum_buffer"]
    for mode in ("exact", "finite_difference"):
        found = architecture_gradient(lambda w, a, b: (w[0] ** 2 * a[0]).sum(), [w], [a], None, None, WeightStep.of(optimizer, [w]), mode)
        assert error(found.grads, [moved ** 2]) < 1e-12


# --- against double backprop


class LossOf(nn.Module):
    def __init__(self, lm):
        super().__init__()
        self.lm = lm

    def forward(self, tokens, targets, hidden):
        return self.lm.loss(tokens, targets, hidden)[0]


class Configuration:
    """A random supernet of smooth primitives, with masks and BatchNorm, some steps into its training by a random SGD, or Adam."""

    def __init__(self, seed: int, adam: bool = False):
        draw = random.Random(seed)
        V, H, T, B = draw.randint(6, 14), draw.randint(3, 8), draw.randint(2, 5), draw.randint(5, 9)
        rate = lambda: draw.choice([0.0, 0.1, 0.3, 0.5])  # noqa: E731
        rnn = MixedRNN(H, H, draw.randint(1, 4), SMOOTH, dropout_x=rate(), dropout_h=rate())
        self.module = LossOf(LanguageModel(V, rnn, dropout=rate(), dropout_i=rate(), dropout_e=rate()))
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in self.module.parameters():
                p.uniform_(-0.4, 0.4)
        self.names = [name for name, _ in self.module.named_parameters() if name != "lm.rnn.alpha"]
        self.weights = [self.module.get_parameter(name) for name in self.names]
        self.alphas = [self.module.lm.rnn.alpha]
        self.train, self.valid = ((torch.randint(V, (T, B)), torch.randint(V, (T, B)), 0.5 * torch.randn(B, H)) for _ in range(2))

        self.optimizer = self.random_adam(draw) if adam else self.random_sgd(draw)
        for _ in range(draw.choice([0, 1, 2])):  # with none, momentum and moments are not there yet
            self.optimizer.zero_grad()
            self.loss(self.weights, self.alphas, self.train).backward()
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.alphas[0].grad = None
        grads = torch.autograd.grad(self.loss(self.weights, self.alphas, self.train), self.weights)
        self.clip = draw.choice([None, 0.3, 0.7, 5.0])  # of the gradient's norm: active, active, not
        self.grad_norm = float(norm(grads))
        self.clip = None if self.clip is None else self.clip * self.grad_norm

    def groups(self, draw, rates):
        return [{"params": part, "lr": draw.choice(rates), "weight_decay": draw.choice([0.0, 1e-3, 0.1])} for part in (self.weights[:1], self.weights[1:])]

    def random_sgd(self, draw):
        momentum = draw.choice([0.0, 0.0, 0.5, 0.9])
        nesterov = momentum > 0 and draw.random() < 0.4
        settings = dict(momentum=momentum, nesterov=nesterov, dampening=0.0 if nesterov or not momentum else draw.choice([0.0, 0.3]))
        return torch.optim.SGD(self.groups(draw, [0.05, 0.3, 1.0]), lr=1.0, **settings)

    def random_adam(self, draw):
        settings = dict(betas=draw.choice([(0.9, 0.999), (0.0, 0.9), (0.5, 0.7)]), eps=draw.choice([1e-8, 1e-3]), fused=draw.choice([True, False]))
        return draw.choice([torch.optim.Adam, torch.optim.AdamW])(self.groups(draw, [1e-3, 0.02, 0.3]), lr=1.0, **settings)

    def loss(self, weights, alphas, batch):
        state = dict(zip(self.names, weights)) | {"lm.rnn.alpha": alphas[0]}
        return torch.func.functional_call(self.module, state, batch)

    def ours(self, mode, **kwargs):
        step = WeightStep.of(self.optimizer, self.weights, self.clip)
        return architecture_gradient(self.loss, self.weights, self.alphas, self.train, self.valid, step, mode, **kwargs)

    def oracle(self) -> tuple[list, list]:
        """∇α through clip and optimizer written out after torch's documentation, with every operation differentiated; and w′."""
        weights = [w.detach().requires_grad_() for w in self.weights]
        alpha = self.alphas[0].detach().requires_grad_()
        grads = torch.autograd.grad(self.loss(weights, [alpha], self.train), weights, create_graph=True)
        if self.clip is not None:
            total = torch.cat([g.flatten() for g in grads]).norm()
            factor = torch.clamp(self.clip / (total + 1e-6), max=1.0)
            grads = [g * factor for g in grads]
        group_of = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        unrolled = []
        for parameter, w, g in zip(self.weights, weights, grads):
            moved = adam_written_out if isinstance(self.optimizer, torch.optim.Adam) else sgd_written_out
            unrolled.append(moved(w, g, group_of[id(parameter)], self.optimizer.state[parameter]))
        gradient, = torch.autograd.grad(self.loss(unrolled, [alpha], self.valid), alpha)
        return [gradient], unrolled


def sgd_written_out(w, g, group, state):
    g = g + group["weight_decay"] * w
    if group["momentum"]:
        buffer = state.get("momentum_buffer")
        buffer = g if buffer is None else group["momentum"] * buffer.clone() + (1 - group["dampening"]) * g
        g = g + group["momentum"] * buffer if group["nesterov"] else buffer
    return w - group["lr"] * g


def adam_written_out(w, g, group, state):
    (beta1, beta2), lr, decay, t = group["betas"], group["lr"], group["weight_decay"], int(state.get("step", 0)) + 1
    if group["decoupled_weight_decay"]:
        w = w - lr * decay * w
    else:
        g = g + decay * w
    m, v = (state[name].clone() if state else torch.zeros_like(w) for name in ("exp_avg", "exp_avg_sq"))
    m, v = (beta1 * m + (1 - beta1) * g) / (1 - beta1**t), (beta2 * v + (1 - beta2) * g**2) / (1 - beta2**t)
    root = torch.where(v > 0, torch.where(v > 0, v, 1.0).sqrt(), 0.0)  # with a derivative at 0
    return w - lr * m / (root + group["eps"])


@pytest.mark.parametrize("seed, adam", [(seed, adam) for adam in (False, True) for seed in range(60)])
def test_against_double_backprop(seed, adam):
    problem = Configuration(seed, adam)
    start = torch.get_rng_state()
    truth, unrolled = problem.oracle()
    torch.set_rng_state(start)
    exact = problem.ours("exact")
    assert error(exact.grads, truth) < 1e-11
    assert torch.equal(torch.get_rng_state(), start)
    assert error(problem.ours("finite_difference", epsilon=1e-4).grads, truth) < 1e-6

    # the step that was differentiated is the one the optimizer takes, masks included
    problem.loss(problem.weights, problem.alphas, problem.train).backward()
    if problem.clip is not None:
        torch.nn.utils.clip_grad_norm_(problem.weights, problem.clip)
    problem.optimizer.step()
    assert error(problem.weights, unrolled) < (1e-12 if adam else 1e-14)  # Adam divides by what may be next to nothing
    assert (exact.coefficient < 1) == (problem.clip is not None and exact.grad_norm > problem.clip)


def test_configurations_cover_the_cases():
    problems = [Configuration(seed) for seed in range(60)]
    clipped = [p.clip < p.grad_norm for p in problems if p.clip is not None]
    assert clipped.count(True) >= 10 and clipped.count(False) >= 5 and len(clipped) <= 55
    groups = [g for p in problems for g in p.optimizer.param_groups]
    assert any(g["nesterov"] for g in groups) and any(g["dampening"] for g in groups) and any(g["weight_decay"] for g in groups)
    with_buffers = [p for p in problems if any("momentum_buffer" in s for s in p.optimizer.state.values())]
    assert 5 <= len(with_buffers) <= 55
    adams = [Configuration(seed, adam=True) for seed in range(60)]
    groups = [g for p in adams for g in p.optimizer.param_groups]
    assert {(g["decoupled_weight_decay"], g["weight_decay"] > 0) for g in groups} == {(a, b) for a in (False, True) for b in (False, True)}
    assert 10 <= sum(bool(p.optimizer.state) for p in adams) <= 50 and {g["eps"] for g in groups} == {1e-8, 1e-3}
    assert {p.clip is not None and p.clip < p.grad_norm for p in adams} == {False, True}


@pytest.mark.parametrize("seed", range(8))
def test_neumann_terms_are_more_steps_of_the_same_map(seed):
    """The step as a map of (w, α), clip and decay in it, and its vector-Jacobian products by double backprop: Σ_k (∂w′/∂α)ᵀ (∂w′/∂w)ᵀᵏ v."""
    problem = Configuration(seed)
    start = torch.get_rng_state()
    weights = [w.detach().requires_grad_() for w in problem.weights]
    alpha = problem.alphas[0].detach().requires_grad_()
    step = WeightStep.of(problem.optimizer, problem.weights, problem.clip)
    g = torch.autograd.grad(problem.loss(weights, [alpha], problem.train), weights, create_graph=True)
    moved = step.apply(weights, g, step.coefficient(g))
    unrolled = [w.detach().requires_grad_() for w in moved]
    truth, *v = torch.autograd.grad(problem.loss(unrolled, [alpha], problem.valid), [alpha, *unrolled])
    for _ in range(3):
        along, *v = torch.autograd.grad(moved, [alpha, *weights], v, retain_graph=True)
        truth = truth + along
    torch.set_rng_state(start)
    assert error(problem.ours("exact", neumann_terms=2).grads, [truth]) < 1e-11
    assert error(problem.ours("finite_difference", neumann_terms=2, epsilon=1e-4).grads, [truth]) < 1e-5


def test_a_weight_of_the_training_loss_alone_takes_part_in_the_clip():
    torch.manual_seed(0)
    w, a, B = [torch.randn(4), torch.randn(3)], [torch.randn(4)], torch.randn(3, 4)

    def train(w, a, batch):
        return (w[0] - a[0]).pow(4).sum() + (w[1] - B @ a[0]).pow(2).sum() + (w[1].sum() * w[0] * a[0]).sum()

    def valid(w, a, batch):
        return (w[0] - 1).pow(2).sum()

    leaves, alpha, step = [x.clone().requires_grad_() for x in w], a[0].clone().requires_grad_(), WeightStep.sgd(2, 0.7, 0.0, clip=0.5)
    g = torch.autograd.grad(train(leaves, [alpha], None), leaves, create_graph=True)
    (truth,) = torch.autograd.grad(valid(step.apply(leaves, g, step.coefficient(g)), [alpha], None), alpha)
    for mode, tolerance in (("exact", 1e-12), ("finite_difference", 1e-6)):
        found = architecture_gradient(train, w, a, None, None, step, mode, epsilon=1e-4, valid_loss=valid)
        assert found.coefficient < 1 and error(found.grads, [truth]) < tolerance, mode


@pytest.mark.parametrize("size", [1e20, 1e-24])
def test_a_direction_whose_squares_float32_does_not_hold(size):
    w, a = [torch.tensor([0.3, -0.2]).float()], [torch.tensor([0.5, 0.1]).float()]
    args = (lambda w, a, batch: (w[0] * a[0]).pow(2).sum(), w, a, None, None, WeightStep.sgd(1, 0.1))
    exact, ours = (architecture_gradient(*args, mode, valid_loss=lambda w, a, batch: size * w[0].sum()) for mode in ("exact", "finite_difference"))
    assert exact.implicit[0].abs().max() > 0.01 * size and error([ours.implicit[0].double() / size], [exact.implicit[0].double() / size]) < 0.02


def test_a_loss_without_alpha_and_one_without_weights():
    w, a, step = [torch.randn(3)], [torch.randn(3)], WeightStep.sgd(1, 0.1)
    for mode in ("exact", "finite_difference"):
        found = architecture_gradient(lambda w, a, batch: w[0].pow(2).sum(), w, a, None, None, step, mode, valid_loss=lambda w, a, batch: (w[0] * a[0]).sum())
        assert torch.equal(found.implicit[0], torch.zeros(3)) and torch.allclose(found.grads[0], 0.8 * w[0])
        found = architecture_gradient(lambda w, a, batch: (w[0] * a[0]).pow(2).sum(), w, a, None, None, step, mode, valid_loss=lambda w, a, batch: a[0].pow(2).sum())
        assert torch.equal(found.implicit[0], torch.zeros(3)) and torch.allclose(found.grads[0], 2 * a[0])


# --- against closed forms


class Quadratic:
    """L_train = ½(w − Aα)ᵀH(w − Aα), L_val = ½‖w − t‖² + wᵀMα + ½γ‖α‖²; w in two tensors of 4 and 3, α (2,)."""

    gamma = 0.3

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        root = torch.randn(7, 7)
        self.H = root @ root.T / 7 + torch.eye(7)
        self.A, self.M, self.t = torch.randn(7, 2), torch.randn(7, 2), torch.randn(7)
        self.w, self.alpha = torch.randn(7), torch.randn(2)

    def train(self, weights, alphas, batch):
        d = torch.cat(list(weights)) - self.A @ alphas[0]
        return d @ self.H @ d / 2

    def valid(self, weights, alphas, batch):
        w, alpha = torch.cat(list(weights)), alphas[0]
        return (w - self.t) @ (w - self.t) / 2 + w @ self.M @ alpha + self.gamma / 2 * alpha @ alpha

    def ours(self, step, mode, **kwargs):
        return architecture_gradient(self.train, list(self.w.split([4, 3])), [self.alpha], None, None, step, mode, valid_loss=self.valid, **kwargs)

    def closed_form(self, lr, weight_decay=0.0, clip=None, neumann_terms=0):
        g = self.H @ (self.w - self.A @ self.alpha)
        jacobian, c = torch.eye(7), 1.0  # of c·g in g
        if clip is not None and clip < g.norm() + 1e-6:
            c = clip / (g.norm() + 1e-6)
            jacobian = c * (torch.eye(7) - torch.outer(g, g) / (g.norm() * (g.norm() + 1e-6)))
        w = self.w - lr * (c * g + weight_decay * self.w)
        v = w - self.t + self.M @ self.alpha
        onward = (1 - lr * weight_decay) * torch.eye(7) - lr * self.H @ jacobian.T  # of one more step, transposed
        series = sum(torch.linalg.matrix_power(onward, k) for k in range(neumann_terms + 1))
        return [self.gamma * self.alpha + self.M.T @ w + self.A.T @ self.H @ (lr * jacobian.T @ series @ v)]


@pytest.mark.parametrize("mode, kwargs", [("exact", {}), ("finite_difference", {"epsilon": 1.0}), ("finite_difference", {"epsilon": 1e-2})])
@pytest.mark.parametrize("case", [dict(lr=0.1), dict(lr=0.1, weight_decay=0.2), dict(lr=0.5, clip=0.5), dict(lr=0.5, clip=1e3),
                                  dict(lr=0.1, neumann_terms=3), dict(lr=0.1, neumann_terms=1, weight_decay=0.2),
                                  dict(lr=0.5, neumann_terms=3, clip=0.5)], ids=str)
def test_quadratic_closed_form(mode, kwargs, case):
    for seed in range(3):
        problem = Quadratic(seed)
        step = WeightStep.sgd(2, case["lr"], case.get("weight_decay", 0.0), case.get("clip"))
        result = problem.ours(step, mode, neumann_terms=case.get("neumann_terms", 0), **kwargs)
        assert error(result.grads, problem.closed_form(**case)) < 1e-10


def test_many_neumann_terms_give_the_gradient_of_the_solved_problem():
    # at the solution w = Aα the series is H⁻¹/lr, so ∇α = γα + Mᵀw + Aᵀv: the derivative along α ↦ Aα
    problem = Quadratic()
    problem.w = problem.A @ problem.alpha
    v = problem.w - problem.t + problem.M @ problem.alpha
    truth = [problem.gamma * problem.alpha + problem.M.T @ problem.w + problem.A.T @ v]
    for mode in ("exact", "finite_difference"):
        assert error(problem.ours(WeightStep.sgd(2, 0.2), mode, neumann_terms=150, epsilon=1.0).grads, truth) < 1e-9


def test_first_order_is_the_gradient_where_the_weights_are():
    problem = Quadratic()
    truth = [problem.gamma * problem.alpha + problem.M.T @ problem.w]
    assert error(problem.ours(None, "first_order").grads, truth) < 1e-14
    assert error(problem.ours(WeightStep.sgd(2, 0.0), "finite_difference").grads, truth) < 1e-14


def test_parts_and_losses():
    problem, step = Quadratic(), WeightStep.sgd(2, 0.1)
    result = problem.ours(step, "exact")
    assert error(result.grads, [result.direct[0] - result.implicit[0]]) < 1e-15
    g = problem.H @ (problem.w - problem.A @ problem.alpha)
    assert float(result.train_loss) == pytest.approx(float(problem.train([problem.w], [problem.alpha], None)))
    assert float(result.valid_loss) == pytest.approx(float(problem.valid([problem.w - 0.1 * g], [problem.alpha], None)))
    assert result.grad_norm == pytest.approx(float(g.norm())) and result.coefficient == 1


def test_mean_over_processes():
    # two threads stand for two processes, with losses of their own
    a, b, both = Quadratic(1), Quadratic(1), Quadratic(1)
    b.t, b.M = a.t + 1, -2 * a.M
    shift = torch.randn(7)
    b.train = lambda w, al, _: Quadratic.train(b, w, al, _) + (shift @ torch.cat(list(w))) ** 2 + torch.cat(list(w)) @ a.M @ al[0]
    both.train = lambda w, al, _: (a.train(w, al, _) + b.train(w, al, _)) / 2
    both.valid = lambda w, al, _: (a.valid(w, al, _) + b.valid(w, al, _)) / 2
    step = WeightStep.sgd(2, 0.1, 0.1, clip=0.5)
    meet, said = threading.Barrier(2, timeout=60), [None, None]

    def process(rank, problem, **kwargs):
        def reduce(tensors):
            said[rank] = list(tensors)
            meet.wait()
            mean = [None if x is None else (x + y) / 2 for x, y in zip(*said)]
            meet.wait()  # both have read
            return mean

        return problem.ours(step, reduce=reduce, **kwargs)

    for mode, terms in (("exact", 0), ("exact", 2), ("finite_difference", 0), ("finite_difference", 2), ("first_order", 0)):
        settings = dict(mode=mode, neumann_terms=terms, epsilon=1e-2)
        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(lambda rank: process(rank, (a, b)[rank], **settings), range(2)))
        truth = both.ours(step, **settings).grads
        assert all(error(result.grads, truth) < 1e-9 for result in results)


def test_adams_slope_is_0_where_a_gradient_is_0_or_too_small_for_its_square():
    w, rate, d, eps = torch.zeros(3, dtype=torch.float32), 0.1, 1e-3, 1e-8
    slope = WeightStep.of(torch.optim.Adam([w], lr=rate), [w]).parts[0].slope(w, torch.tensor([0.0, 1e-25, d], dtype=torch.float32))
    assert slope[:2].tolist() == [0, 0]
    assert float(slope[2]) == pytest.approx(rate * eps / (d + eps) ** 2, rel=0.2)  # of the first step, d/(|d| + ε), to the few digits that float32 leaves it


def test_norms_of_float16_have_room():
    for value, n in ((300.0, 4), (1e-4, 100_000)):
        grads = [torch.full((n,), value, dtype=torch.float16)]
        assert float(norm(grads)) == pytest.approx(float(torch.nn.utils.get_total_norm([g.double() for g in grads])), rel=1e-3)


@pytest.mark.parametrize("mode", ["exact", "finite_difference"])
def test_a_training_gradient_that_is_0_and_one_that_depends_on_nothing(mode):
    w, a = torch.ones(3), torch.full((3,), 0.5)

    def valid(w, a, b):
        return ((w[0] - a[0]) ** 2).sum()

    flat = architecture_gradient(lambda w, a, b: (w[0] * 0).sum() + 0 * a[0].sum(), [w], [a], None, None, WeightStep.sgd(1, 1.0, clip=1e-7), mode, valid_loss=valid)
    assert torch.equal(flat.grads[0], -2 * (w - a))
    even = architecture_gradient(lambda w, a, b: w[0].sum(), [w], [a], None, None, WeightStep.sgd(1, 0.1), mode, neumann_terms=1, valid_loss=valid)
    assert error(even.grads, [-2 * (w - 0.1 - a)]) < 1e-12


# --- what is refused


def test_a_finite_difference_of_weights_without_the_digits_for_it_is_refused():
    w, a = torch.ones(3, dtype=torch.bfloat16), torch.ones(3, dtype=torch.bfloat16)

    def gradient(mode):
        return architecture_gradient(lambda w, a, b: (w[0] ** 2 * a[0]).sum(), [w], [a], None, None, WeightStep.sgd(1, 0.1), mode)

    with pytest.raises(ValueError, match="weights of torch.bfloat16: the finite difference moves them by less.*use hvp='exact'"):
        gradient("finite_difference")
    assert gradient("exact").grads[0].isfinite().all()


@pytest.mark.parametrize("optimizer", [torch.optim.RMSprop, torch.optim.ASGD, torch.optim.NAdam, torch.optim.Adamax])
def test_other_optimizers_are_refused_by_name(optimizer):
    weights = [nn.Parameter(torch.randn(3))]
    with pytest.raises(ValueError, match=f"unrolls torch.optim.SGD, Adam and AdamW; not {optimizer.__name__}: use one of these"):
        WeightStep.of(optimizer(weights, lr=0.1), weights)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_a_subclass_is_unrolled_where_its_step_is_inherited(kind):
    class Renamed(kind):
        pass

    class Own(kind):
        def step(self, closure=None):
            return super().step(closure)

    weights = [nn.Parameter(torch.randn(3))]
    assert WeightStep.of(Renamed(weights, lr=0.1), weights) == WeightStep.of(kind(weights, lr=0.1), weights)
    with pytest.raises(ValueError, match="Own, a subclass, has a step of its own"):
        WeightStep.of(Own(weights, lr=0.1), weights)


def test_what_of_adam_is_refused():
    w = nn.Parameter(torch.randn(3))
    with pytest.raises(ValueError, match="amsgrad"):
        WeightStep.of(torch.optim.Adam([w], amsgrad=True), [w])
    with pytest.raises(ValueError, match="neumann_terms: 2"):
        architecture_gradient(lambda w, a, b: (w[0] * a[0]).sum(), [w], [torch.ones(3)], None, None, WeightStep.of(torch.optim.Adam([w]), [w]), neumann_terms=2)


def test_maximize_and_strangers_are_refused():
    w, stranger = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2, 5))
    with pytest.raises(ValueError, match="maximize"):
        WeightStep.of(torch.optim.SGD([w], lr=0.1, maximize=True), [w])
    with pytest.raises(ValueError, match=r"shape \(2, 5\).*no group"):
        WeightStep.of(torch.optim.SGD([w], lr=0.1), [w, stranger])


def test_bad_settings_are_refused():
    problem, step = Quadratic(), WeightStep.sgd(2, 0.1)
    with pytest.raises(ValueError, match="'second_order' is none of finite_difference, exact, first_order"):
        problem.ours(step, "second_order")
    for epsilon in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="epsilon"):
            problem.ours(step, "finite_difference", epsilon=epsilon)


# --- purity


def test_inputs_are_only_read():
    for mode in ("finite_difference", "exact", "first_order"):
        problem = Configuration(7)
        tensors = [*problem.weights, *problem.alphas]
        before = [t.detach().clone() for t in tensors]
        states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        problem.ours(mode)
        assert all(torch.equal(a, b) and t.grad is None and t.requires_grad for t, a, b in zip(tensors, tensors, before))
        assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all() and random.getstate() == states[2]


class Masks:
    """A loss that draws from torch, numpy and random, and keeps what it drew in each pass."""

    def __init__(self):
        self.train, self.valid = [], []

    def loss(self, weights, alphas, batch):
        mask = torch.bernoulli(torch.full((50,), 0.5)), np.random.rand(3).tolist(), random.random()
        getattr(self, batch).append((mask[0].tolist(), *mask[1:]))
        return ((weights[0] * alphas[0] * mask[0]).sum() - mask[2]) ** 2 + mask[1][0] * weights[0].pow(2).sum()

    def run(self, **kwargs):
        w, alpha = torch.randn(50), torch.randn(50)
        return architecture_gradient(self.loss, [w], [alpha], "train", "valid", WeightStep.sgd(1, 0.1), **kwargs)


@pytest.mark.parametrize("kwargs, passes", [({}, 3), ({"neumann_terms": 2}, 7), ({"mode": "exact"}, 1)])
def test_same_masks_in_all_passes(kwargs, passes):
    masks = Masks()
    masks.run(**kwargs)
    assert len(masks.train) == passes and all(m == masks.train[0] for m in masks.train)
    assert len(masks.valid) == 1 and masks.valid[0] != masks.train[0]
    # the weight step that follows draws them once more
    masks.loss([torch.ones(50)], [torch.ones(50)], "train")
    assert masks.train[-1] == masks.train[0]


@pytest.mark.parametrize("kwargs, passes", [({}, 2), ({"neumann_terms": 2}, 6), ({"mode": "exact"}, 1), ({"mode": "first_order"}, 0)])
def test_a_training_pass_that_was_run_is_not_run_again(kwargs, passes):
    """The same gradient with a pass of the training batch less; exact mode alone needs it again, for its graph."""
    alone, given = Masks(), Masks()
    torch.manual_seed(0)
    w, alpha = torch.randn(50), torch.randn(50)

    def gradient(masks, **more):
        return architecture_gradient(masks.loss, [w], [alpha], "train", "valid", WeightStep.sgd(1, 0.1, 1e-2, clip=0.1), **kwargs, **more)

    start = RandomState()
    expected = gradient(alone)
    leaf = w.clone().requires_grad_()
    loss = given.loss([leaf], [alpha], "train")
    ran = TrainingPass(torch.autograd.grad(loss, [leaf]), loss.detach(), start)
    after = RandomState()
    found = gradient(given, ran=ran)
    assert len(given.train) == 1 + passes and all(m == given.train[0] for m in given.train)
    if kwargs.get("mode") != "first_order":  # which has the next masks, whichever these are
        assert torch.equal(found.grads[0], expected.grads[0]) and given.train[0] == alone.train[0] and given.valid == alone.valid
        assert found.train_loss == expected.train_loss and found.grad_norm == expected.grad_norm
    # the generators stand where the training pass left them
    assert torch.equal(torch.get_rng_state(), after.cpu) and random.getstate() == after.python
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), after.numpy))


def test_new_masks_where_asked():
    masks = Masks()
    masks.run(same_masks=False)
    assert len({str(m) for m in masks.train}) == 3
    masks = Masks()
    original_gradient(masks.loss, [torch.randn(50)], [torch.randn(50)], "train", "valid", 0.1, 0.0, 0.25)
    assert len({str(m) for m in masks.train}) == 3


def test_tensors_that_take_no_part():
    def loss(weights, alphas, batch):
        return (weights[0] * alphas[0]).sum() ** 2

    weights, alphas = [torch.randn(3), torch.randn(2)], [torch.randn(3), torch.randn(4)]
    step = WeightStep.sgd(2, 0.1, 0.1, clip=0.1)
    for kwargs in ({"mode": "exact"}, {}, {"neumann_terms": 1}, {"mode": "exact", "neumann_terms": 1}):
        result = architecture_gradient(loss, weights, alphas, None, None, step, **kwargs)
        assert result.grads[0].abs().sum() > 0 and torch.equal(result.grads[1], torch.zeros(4))


def test_no_weight_matters_to_validation():
    # v = 0: nothing to difference along
    result = architecture_gradient(lambda w, a, b: (w[0] * a[0]).sum(), [torch.randn(3)], [torch.randn(3)], None, None, WeightStep.sgd(1, 0.1),
                                   valid_loss=lambda w, a, b: a[0].pow(2).sum() + 0 * w[0].sum())
    assert torch.equal(result.implicit[0], torch.zeros(3)) and torch.isfinite(result.grads[0]).all()
