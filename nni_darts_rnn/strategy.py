"""`SecondOrderDARTS`: NNI's DARTS with the second-order architecture gradient, for any NNI space and any Lightning module."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial

import pytorch_lightning as pl
import torch
import torch.distributed
from nni.nas.oneshot.pytorch.differentiable import DartsLightningModule
from nni.nas.strategy import DARTS
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .auxiliary import Before
from .bilevel import EPSILON, TrainingPass, is_first_order
from .health import check_finite
from .penalty import differentiable_probs
from .published import plain_sgd
from .step_settings import check_step, gradient_by
from .taken_step import ALMOST, UnrolledStep, gradient_length

NEVER_CALLED = ("backward", "on_before_zero_grad", "on_before_batch_transfer", "on_after_batch_transfer", "transfer_batch_to_device")
"""Hooks of a Lightning module that change what is learnt, and that NNI's one-shot strategies (3.0) never call."""


class _TrainingStep(nn.Module):
    """Gives a Lightning module's `training_step` the name `forward`, which `torch.func.functional_call` needs. The step logs nothing there."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, batch, batch_idx: int):
        self.module.log = self.module.log_dict = lambda *args, **kwargs: None  # until `Before.again` puts back what they were
        return self.module.training_step(batch, batch_idx)


def _loss_of(output, name: str = "loss") -> Tensor:
    """The loss `name` in what a `training_step` returned, or its "loss" where there is no such entry."""
    return output.get(name, output["loss"]) if isinstance(output, dict) else output


@contextlib.contextmanager
def _fixed(parameters: list[nn.Parameter]):
    """A context in which these require no gradient. Each is then as it was before, which need not be True: NNI's warm-up switches them too."""
    required = [p.requires_grad for p in parameters]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p, require in zip(parameters, required):
            p.requires_grad_(require)


def _mean_over_processes(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The mean of each tensor over all processes, computed by one collective call."""
    present = [t for t in tensors if t is not None]
    if not present:
        return list(tensors)
    flat = torch.cat([t.reshape(-1) for t in present])
    torch.distributed.all_reduce(flat)
    parts = iter((flat / torch.distributed.get_world_size()).split([t.numel() for t in present]))
    return [None if t is None else next(parts).view_as(t).to(t.dtype) for t in tensors]


def alpha_in_order(module: DartsLightningModule) -> list[nn.Parameter]:
    """α in the order of the modules. NNI 3.0 returns `list(set(…))`, whose order depends on addresses: a resumed Adam gives its moments to other α."""
    found = [p for m in module.supernet_modules() if hasattr(m, "arch_parameters") for p in m.arch_parameters()]
    return list(dict.fromkeys(found))


def check_schedulers(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """`ValueError` for a scheduler that is stepped by a metric. NNI 3.0 intends to skip it with a warning, but does not recognise it under Lightning 2 and steps it without a metric."""
    waits = any(isinstance(config.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) for config in trainer.lr_scheduler_configs)
    if waits and type(module).lr_scheduler_step is pl.LightningModule.lr_scheduler_step:
        raise ValueError("ReduceLROnPlateau: NNI's one-shot strategies have no metric to step it by; use another scheduler, or step it in the module's lr_scheduler_step")


class SecondOrderDartsModule(DartsLightningModule):
    """The search step of `SecondOrderDARTS`. See there.

    The user's module needs no change. It may have two things that this step knows:

    - "data_loss" beside "loss" in what `training_step` returns: the loss without regularisation, which `reproduce_original` unrolls;
    - `validation_buffers`: names of buffers that a validation batch updates, such as a recurrent hidden state. An architecture step changes no other.
    """

    def __init__(self, training_module, *, arc_weight_decay: float, arc_betas: tuple[float, float], epsilon: float, hvp: str,
                 unrolled_lr: float | None, neumann_terms: int, own_gradient: bool, reproduce_original: bool, **kwargs):
        super().__init__(training_module, **kwargs)
        self.arc_weight_decay, self.arc_betas = arc_weight_decay, arc_betas
        self.epsilon, self.hvp, self.unrolled_lr = epsilon, hvp, unrolled_lr
        self.neumann_terms, self.reproduce_original = neumann_terms, reproduce_original
        self._first_order = is_first_order(hvp, unrolled_lr)
        self.own_gradient = own_gradient or reproduce_original or self._first_order  # then the two steps share no gradient
        self._unrolled: UnrolledStep | None = None
        self._first = True  # no gradient of α has been asked for yet
        self._move_alpha: Callable[[Tensor], None] | None = None  # called after the weights' backward pass, with the training loss
        self._step_module = (_TrainingStep(training_module),)  # in a tuple: not a submodule, or every weight would have two names

    def arch_parameters(self) -> list[nn.Parameter]:
        return alpha_in_order(self)

    def configure_architecture_optimizers(self):
        alphas = self.arch_parameters()
        if not alphas:
            raise ValueError("the space has no open choice: nothing to search")
        return torch.optim.Adam(alphas, self.arc_learning_rate, betas=self.arc_betas, weight_decay=self.arc_weight_decay)

    def setup(self, stage: str | None = None):
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            raise ValueError("precision: a gradient scaler ('16-mixed') hides the gradients that the weight step is unrolled from; use '32-true' or 'bf16-mixed'")
        if str(self.trainer.gradient_clip_algorithm or "norm").lower().endswith("value") or \
                type(self.training_module).configure_gradient_clipping is not pl.LightningModule.configure_gradient_clipping:
            raise ValueError("gradient clipping: the step that is unrolled is clipped by its norm, by gradient_clip_val of the strategy; no other way is possible")
        for name in NEVER_CALLED:
            if getattr(type(self.training_module), name) is not getattr(pl.LightningModule, name):
                raise ValueError(f"{name}: NNI's one-shot strategies do not call it; do its work in training_step, in the loaders or in a callback")
        if self.trainer.world_size > 1:
            if self.reproduce_original:
                raise ValueError("reproduce_original: the published code runs in one process; use devices=1")
            # DistributedDataParallel would wait for a gradient of α, which the weight step does not make, so it is told to ignore α. Each process
            # keeps its own buffers (hidden states, BatchNorm statistics): under Lightning's manual optimization they are not shared.
            alphas = self.arch_parameters()
            for alpha in alphas:
                torch.distributed.broadcast(alpha.data, 0)
            architecture = {id(alpha) for alpha in alphas}
            names = [name for name, p in self.named_parameters() if id(p) in architecture]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, names)
        return super().setup(stage)

    def on_train_start(self):
        check_schedulers(self.trainer, self.training_module)
        return super().on_train_start()

    def training_step(self, batch, batch_idx: int):
        move_alpha = self._unrolled = None
        if self.warmup_epochs == 0 or self.trainer.current_epoch >= self.warmup_epochs:
            self.resample()
            move_alpha = partial(self._architecture_step, batch["train"], batch["val"], batch_idx, Before(self._step_module[0]))
            if self.own_gradient:
                move_alpha()

        # the weight step, as NNI's DARTS takes it
        if move_alpha is None or self.own_gradient:
            self.resample()
        with _fixed(self.arch_parameters()):
            output = self.training_module.training_step(batch["train"], 2 * batch_idx + 1)
            self._loss, self._move_alpha = _loss_of(output).detach(), None if self.own_gradient else move_alpha
            self.advance_optimization(_loss_of(output), batch_idx, self.gradient_clip_val)
        self._move_alpha = None
        check_finite(α=self.arch_parameters())
        self.advance_lr_schedulers(batch_idx)
        if self.log_prob_every_n_step and batch_idx % self.log_prob_every_n_step == 0:
            self.log_probs(self.export_probs())
        return output

    def backward(self, loss: Tensor, *args, **kwargs):
        super().backward(loss, *args, **kwargs)
        self._left = self._gradients()
        self._length = None if self._first_order else gradient_length(self._weight_optimizer())

    def on_after_backward(self):
        """Takes α's step where it shares the weights' gradient: that gradient is here, not yet clipped, and the weights have not moved."""
        super().on_after_backward()
        if not self._first_order and self._gradients() != self._left:  # a callback may have only touched them, to log their norm
            if not torch.isclose(gradient_length(self._weight_optimizer()), self._length, ALMOST, 0.0, equal_nan=True):
                raise ValueError("on_after_backward: it changes the gradients, of which the step that is unrolled knows nothing; change the loss or the learning rate instead, "
                                 "or use hvp='first_order'")
        check_finite(training_loss=self._loss, gradient_of_the_weights=[p.grad for p in self.training_module.parameters() if p.requires_grad])
        if self._move_alpha is not None:
            self._move_alpha(self._loss)
        if self._unrolled is not None:
            self._unrolled.clipped_to(self.gradient_clip_val, float(self._length))

    def on_before_optimizer_step(self, optimizer):
        """The last hook before the step, after those of the callbacks."""
        if not getattr(optimizer, "is_arch_optimizer", False):
            self.training_module.on_before_optimizer_step(optimizer)
            if self._unrolled is not None:
                self._unrolled.check()

    def _gradients(self) -> list[tuple[int, int]]:
        """The identity of each gradient and how often it was changed in place: unequal after somebody else changed one."""
        return [(id(p.grad), p.grad._version) for p in self.training_module.parameters() if p.grad is not None]

    def _weight_optimizer(self) -> torch.optim.Optimizer:
        return next(o for o in self.trainer.optimizers if not getattr(o, "is_arch_optimizer", False))

    def _architecture_step(self, train_batch, valid_batch, batch_idx: int, before: Before, ran: Tensor | None = None) -> None:
        gradient = self.architecture_gradient(train_batch, valid_batch, batch_idx, before, ran)
        check_finite(gradient_of_α=gradient)
        arc_optim = self.architecture_optimizers()
        arc_optim.zero_grad()
        for alpha, grad in zip(self.arch_parameters(), gradient):
            alpha.grad = grad
        arc_optim.step()

    def architecture_gradient(self, train_batch, valid_batch, batch_idx: int, before: Before, ran: Tensor | None = None) -> list[Tensor]:
        """∇α of the validation loss after the weight step that is about to be taken; one tensor for each of `arch_parameters()`.

        `before`: the modules as they were before that step. `ran`: the loss of its training pass, where that pass has been run already and the weights
        have its gradients. With several processes each has its own part of the batch, as in Lightning's DDP, and the gradient is that of the mean loss.
        """
        optimizer = self._weight_optimizer()
        moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
        architecture = {id(p) for p in self.arch_parameters()}
        step_module = self._step_module[0]
        names = {id(p): name for name, p in step_module.named_parameters()}
        alphas = self.arch_parameters()
        # a frozen weight takes no step, even if the optimizer has it in a group
        weights = {name: p for name, p in step_module.named_parameters()
                   if id(p) in moved and id(p) not in architecture and p.requires_grad}
        alpha_names = [names[id(p)] for p in alphas]
        if self.reproduce_original:
            plain_sgd(optimizer)
        elif not self._first_order:
            self._unrolled = UnrolledStep(optimizer, self.unrolled_lr)

        def run(at_weights, at_alphas, data, index):
            output, state = before.call(step_module, dict(zip(weights, at_weights)) | dict(zip(alpha_names, at_alphas)), data, index)
            return _loss_of(output, "data_loss" if self.reproduce_original else "loss"), state

        def train_loss(at_weights, at_alphas, data):
            return run(at_weights, at_alphas, data, 2 * batch_idx + 1)[0]

        def valid_loss(at_weights, at_alphas, data):
            loss, state = run(at_weights, at_alphas, data, 2 * batch_idx)
            if self.penalty is not None:
                loss, details = self.penalty(loss, differentiable_probs(self, dict(zip(map(id, alphas), at_alphas))))
                self.log_dict({f"penalty/{k}": v for k, v in details.items()})
            moved_on.update((name, state["module." + name]) for name in getattr(self.training_module, "validation_buffers", ()))
            return loss

        moved_on: dict[str, Tensor] = {}
        result = gradient_by(self, step_module, weights, alphas, train_batch, valid_batch, train_loss, valid_loss, optimizer, self.gradient_clip_val, first=self._first,
                             reduce=_mean_over_processes if self.trainer.world_size > 1 else list,
                             ran=None if ran is None else TrainingPass([p.grad for p in weights.values()], ran, before.generators))
        self._first = False
        for name, value in moved_on.items():
            self.training_module.get_buffer(name).copy_(value)
        return result.grads


class SecondOrderDARTS(DARTS):
    """Second-order DARTS (Liu et al. 2019, eq. 7) as an NNI one-shot strategy; a drop-in for `nni.nas.strategy.DARTS`.

    Parameters (NNI's own names where NNI has one)
    ----------
    arc_learning_rate, arc_weight_decay, arc_betas
        Adam's settings for α.
    epsilon
        r of eq. 8: how far the finite difference moves the weights in all.
    hvp
        How the second-order term is computed: "finite_difference", "exact" (double backprop: more memory, no error of a difference) or "first_order"
        (not at all).
    unrolled_lr
        ξ, the learning rate of the unrolled step. None: the weight optimizer's current one; 0: first order.
    neumann_terms
        Number of terms of iDARTS's series (arXiv 2106.10784); 0: eq. 7. SGD only.
    own_gradient
        False: the weights then take the very step that was unrolled, with the gradient at the α before its move. One search step costs 10 forward
        passes. True: their gradient is computed anew at the moved α, as in the paper's Algorithm 1, and the cost is 13. First order always does so.
    warmup_epochs
        Number of epochs before α begins to move.
    gradient_clip_val
        Largest norm of the weights' gradient, in the weight step and in the unrolled one. NNI's one-shot strategies cannot use Lightning's own
        `Trainer(gradient_clip_val=…)` and `accumulate_grad_batches`; Lightning refuses them.
    reproduce_original
        The published code's numerics: new dropout masks in every pass, the direction clipped, the factor not capped, r = 1e-2 whatever `epsilon`
        is, and a tied embedding that the unrolled step leaves behind. One process only.
    log_prob_every_n_step, penalty, mutation_hooks
        As in NNI's `DARTS`; `log_prob_every_n_step=0` turns that log off.

    Raises `ValueError` with one line for a value that is not allowed; in the first step for a weight optimizer other than SGD, Adam and AdamW, and
    for weights in bfloat16 or float16 with a finite difference. Raises `FloatingPointError` in the step in which the loss, a gradient or α stops
    being finite.
    """

    def __init__(self, *, arc_learning_rate: float = 3e-3, arc_weight_decay: float = 1e-3, arc_betas: tuple[float, float] = (0.9, 0.999),
                 epsilon: float = EPSILON, hvp: str = "finite_difference", unrolled_lr: float | None = None, neumann_terms: int = 0, own_gradient: bool = False,
                 warmup_epochs: int = 0, gradient_clip_val: float | None = None, reproduce_original: bool = False,
                 log_prob_every_n_step: int = 10, **kwargs):
        check_step(hvp=hvp, unrolled_lr=unrolled_lr, neumann_terms=neumann_terms, reproduce_original=reproduce_original, arc_learning_rate=arc_learning_rate,
                   arc_weight_decay=arc_weight_decay, arc_betas=arc_betas, epsilon=epsilon, own_gradient=own_gradient, warmup_epochs=warmup_epochs,
                   gradient_clip_val=gradient_clip_val, log_prob_every_n_step=log_prob_every_n_step)
        if reproduce_original and gradient_clip_val is None:
            raise ValueError("reproduce_original: the published code always clips; give gradient_clip_val (the paper's is 0.25)")
        super().__init__(arc_learning_rate=arc_learning_rate, gradient_clip_val=gradient_clip_val,
                         log_prob_every_n_step=log_prob_every_n_step, warmup_epochs=warmup_epochs, **kwargs)
        self.second_order: dict = dict(arc_weight_decay=arc_weight_decay, arc_betas=tuple(arc_betas), epsilon=epsilon, hvp=hvp,
                                       unrolled_lr=unrolled_lr, neumann_terms=neumann_terms, own_gradient=own_gradient,
                                       reproduce_original=reproduce_original)

    def configure_oneshot_module(self, training_module) -> SecondOrderDartsModule:
        return SecondOrderDartsModule(training_module, arc_learning_rate=self.arc_learning_rate, gradient_clip_val=self.gradient_clip_val,
                                      log_prob_every_n_step=self.log_prob_every_n_step, warmup_epochs=self.warmup_epochs,
                                      penalty=self.penalty, **self.second_order)
