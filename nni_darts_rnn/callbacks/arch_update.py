"""The architecture step as a fastai callback."""

from __future__ import annotations

import logging

import torch
from fastai.callback.mixup import MixHandler
from fastai.callback.training import GradientAccumulation, GradientClip
from torch import Tensor, nn

from ..auxiliary import Before
from ..bilevel import EPSILON, AlphaGradient, RandomState, TrainingPass, is_first_order
from ..health import check_finite
from ..published import plain_sgd
from ..step_settings import check_step, gradient_by
from ..taken_step import ALMOST, UnrolledStep
from ..weight_step import norm
from .arch_passes import Passes, architecture_parameters, weight_parameters
from .fit_only import FitOnly
from .step import ScaleLRByLength
from .valid_stream import ValidStream

logger = logging.getLogger(__name__)


class ArchParamUpdate(FitOnly):
    """Moves α with every weight step, by the gradient of the validation loss after that step (DARTS, eq. 6–8).

    α's gradient is computed after the training batch's backward pass, whose gradient the unrolled step uses. α moves just before the weights take their step,
    and stays where it is if that step is cancelled. With `own_gradient`, both come before the forward pass, as in the paper's Algorithm 1, and a step takes 13
    passes instead of 10. First order and `reproduce_original` always use this order.

    `valid_batches` yields (tokens (B, T), targets (B, T)) of a text that the weights do not learn, or any inputs and targets like the Learner's own. Each epoch
    reads it from its beginning, and again whenever it ends before the training text. Other callbacks do not see these batches. Hidden states (buffers that
    the model's `carried` names) are carried along the validation stream here, apart from those of the training stream.

    The weights' optimizer must be `OptimWrapper(opt=torch.optim.SGD)`, or the same with `Adam` or `AdamW` (in first order with any optimizer of torch), and
    must not hold α (`splitter=weight_parameters`). The training loss is the weight step's: the Learner's `loss_func` plus the AR/TAR of its `RNNRegularizer`
    (without them under `reproduce_original`). Its `GradientClip` is part of the unrolled step. For the other arguments see `recipes.SearchRecipe`. Weights,
    buffers, hidden states and random state are left as if only the weight step had run.

    `ValueError` with one line for arguments that are not allowed. In second order without `reproduce_original` the weights must take the step that was
    unrolled. So there is a `ValueError` too in the first step of a fit that moves α, if the weights' gradients are not those of `loss_func` of the model on
    the batch (not checked under fastai's `MixedPrecision`), and in any step whose gradients or settings a callback changes after the unrolling.
    """

    order, run_valid, _stateattrs = ScaleLRByLength.order + 1, False, ("stream", "valid_batches")
    valid_batches = None

    def __init__(self, valid_batches, arch_lr: float = 3e-3, arch_weight_decay: float = 1e-3, arch_betas: tuple[float, float] = (0.9, 0.999),
                 hvp: str = "finite_difference", epsilon: float = EPSILON, unrolled_lr: float | None = None, neumann_terms: int = 0,
                 warmup_epochs: int = 0, alpha_dropout: bool = True, own_gradient: bool = False, reproduce_original: bool = False):
        check_step(hvp=hvp, unrolled_lr=unrolled_lr, neumann_terms=neumann_terms, reproduce_original=reproduce_original, arch_lr=arch_lr,
                   arch_weight_decay=arch_weight_decay, arch_betas=arch_betas, epsilon=epsilon, own_gradient=own_gradient, warmup_epochs=warmup_epochs,
                   alpha_dropout=alpha_dropout)
        self.valid_batches, self.hvp, self.epsilon, self.unrolled_lr = valid_batches, hvp, epsilon, unrolled_lr
        self.neumann_terms, self.warmup_epochs, self.alpha_dropout, self.reproduce_original = neumann_terms, warmup_epochs, alpha_dropout, reproduce_original
        self.own_gradient = own_gradient or reproduce_original or is_first_order(hvp, unrolled_lr)  # the last two unroll no step that the weights could take
        self.adam: dict = dict(lr=arch_lr, betas=tuple(arch_betas), weight_decay=arch_weight_decay)
        self.arch_opt: torch.optim.Adam | None = None
        self.held: list[nn.Parameter] = []  # the α that move, during a fit; still there after a fit that was interrupted
        self.epochs_done = 0
        self.last: AlphaGradient | None = None
        self.before: Before | None = None  # the model before this batch, if α is to move with it
        self.waiting: list[Tensor] | None = None  # α's gradient, until α moves
        self.unrolled: UnrolledStep | None = None  # the step that the weights are to take
        self.hook = None  # on the weights' optimizer

    @classmethod
    def of(cls, recipe, valid_batches) -> ArchParamUpdate:
        """The callback with a SearchRecipe's settings."""
        return cls(valid_batches, recipe.arch_lr, recipe.arch_weight_decay, (recipe.arch_beta1, recipe.arch_beta2), recipe.hvp, recipe.epsilon,
                   recipe.unrolled_lr, recipe.neumann_terms, recipe.warmup_epochs, recipe.alpha_dropout, recipe.own_gradient,
                   recipe.reproduce_original)

    def start_fit(self):
        if self.learn.opt is None:  # not a fit, but `with learn:`, as in `Learner.summary`
            self.run = False
            return
        if self.valid_batches is None:
            raise ValueError("valid_batches: a copy of a Learner, or one from load_learner, comes without them; set them in its ArchParamUpdate")
        if sum(isinstance(cb, ArchParamUpdate) for cb in self.learn.cbs) > 1:
            raise ValueError("the Learner has more than one ArchParamUpdate, and each would move α; keep one (search_learner adds one itself)")
        alphas = self._alphas()
        if not alphas:
            named = architecture_parameters(self.learn.model)
            raise ValueError("every alpha of the model is frozen: nothing to search" if named else "the model has no parameter named alpha: nothing to search")
        if isinstance(self.learn.model, nn.parallel.DistributedDataParallel):
            raise ValueError("ArchParamUpdate searches in one process: those of a DistributedTrainer would each move an α of its own; use NNI's SecondOrderDARTS with devices=2")
        moved = {id(p) for group in self._optimizer().param_groups for p in group["params"]}
        if any(id(p) in moved for p in alphas):
            raise ValueError("the weights' optimizer holds α: give the Learner splitter=weight_parameters")
        if any(isinstance(cb, GradientAccumulation) or (isinstance(cb, GradientClip) and cb.norm_type != 2) for cb in self.learn.cbs):
            raise ValueError("ArchParamUpdate unrolls one weight step for each batch, clipped by the Euclidean norm: remove GradientAccumulation, and use GradientClip with norm_type=2")
        if self.own_gradient and not is_first_order(self.hvp, self.unrolled_lr) and any(isinstance(cb, MixHandler) for cb in self.learn.cbs):
            raise ValueError("own_gradient: MixUp and similar callbacks change the batch after α's gradient has been computed from it; leave it False")
        if self.reproduce_original:
            plain_sgd(self._optimizer())
        if self.arch_opt is not None:
            known = {id(p) for p in self.arch_opt.param_groups[0]["params"]}
            if known.isdisjoint(id(p) for p in architecture_parameters(self.learn.model).values()):
                self.arch_opt, self.epochs_done = None, 0  # they were another model's
            else:  # an α that was frozen until now joins the others
                self.arch_opt.param_groups[0]["params"] += [p for p in alphas if id(p) not in known]
        self._optimizer().zero_grad()  # gradients that a fit left when it was interrupted within a step
        self.only_looking = hasattr(self.learn, "lr_finder")  # `lr_find`, which must leave α's optimizer and the warm-up as they are
        self.stepped, self.first, self.waiting, self.unrolled = True, True, None, None
        self._unhook()  # the hook of a fit that was interrupted
        self.hook = self._optimizer().register_step_pre_hook(self._before_the_weights_move)
        self.held = alphas
        for alpha in alphas:
            alpha.requires_grad_(False)  # the weight step needs no gradient of α, and GradientClip must not count one

    def _unhook(self) -> None:
        if self.hook is not None:
            self.hook.remove()
            self.hook = None

    def after_fit(self):
        self._unhook()
        for alpha in self.held:
            alpha.requires_grad_(True)
        self.held, self.stream, self.batch = [], None, None  # with the stream go the workers that read it
        self.before = self.waiting = self.unrolled = None
        if self.last is None and self.warmup_epochs and not self.only_looking:
            logger.warning("search: α has not moved yet; it waits for warmup_epochs=%d epochs; %d have been trained", self.warmup_epochs, self.epochs_done)

    def _alphas(self) -> list[nn.Parameter]:
        """The α that move: all but those that the user froze."""
        held = {id(p) for p in self.held}
        return [p for p in architecture_parameters(self.learn.model).values() if p.requires_grad or id(p) in held]

    def _optimizer(self) -> torch.optim.Optimizer:
        optimizer = getattr(self.learn.opt, "opt", None)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError("ArchParamUpdate unrolls a torch optimizer: give the Learner opt_func=partial(OptimWrapper, opt=torch.optim.SGD), or with Adam or AdamW")
        return optimizer

    def adam_optimizer(self) -> torch.optim.Adam:
        """α's optimizer, which is made at the first call."""
        if self.arch_opt is None:
            self.arch_opt = torch.optim.Adam(self._alphas(), **self.adam)
        return self.arch_opt

    def before_train(self):
        buffers = dict(self.learn.model.named_buffers())
        self.valid_state = {name: torch.zeros_like(buffers[name]) for name in getattr(self.learn.model, "carried", ())}
        self.stream = ValidStream(self.valid_batches, self.epochs_done, self._alphas())

    def after_train(self):
        self.epochs_done += not self.only_looking

    def before_batch(self):
        self.before = self.waiting = self.unrolled = None
        if self.only_looking or self.epochs_done < self.warmup_epochs:
            return
        if not self.stepped and any(w.grad is not None for w in weight_parameters(self.learn.model)):
            raise ValueError("a batch was cancelled after its backward pass and left its gradients, which the next weight step would take and α's gradient would not: cancel with "
                             "CancelStepException, which removes them, or call opt.zero_grad()")
        self.stepped = False
        self.before = Before(self.learn.model)
        if self.own_gradient:
            self.batch = tuple(self.learn.xb), tuple(self.learn.yb)
            self._unroll(None)
            self._move_alpha()

    def after_backward(self):
        if self.before is None:
            return
        scaler = getattr(self.learn, "scaler", None)  # it is there with fastai's `MixedPrecision`
        scale = 1.0 if scaler is None else scaler.get_scale()
        gradients = [w.grad if w.grad is None or scale == 1 else w.grad / scale for w in weight_parameters(self.learn.model)]
        if scale != 1 and not all(bool(g.isfinite().all()) for g in gradients if g is not None):
            return  # beyond float16's range: the scaler skips this step
        ran = TrainingPass(gradients, self.learn.loss_grad.detach() / scale, self.before.generators)
        if not self.own_gradient:
            self.batch = tuple(self.learn.xb), tuple(self.learn.yb)
            check_finite(training_loss=ran.loss, gradient_of_the_weights=gradients)
        # under autocast the training pass has other gradients than α's passes: by 1 % on text, by 70 % in a deep model with BatchNorm and relu
        if self.first and scaler is None and self._has_to_be_taken():
            self._check_pass(ran)
        if not self.own_gradient:
            self._unroll(ran)
        if self.unrolled is not None:
            self.unrolled.clipped_to(self._clip(), float(norm(gradients)))
        self.first, self.before = False, None

    def _check_pass(self, ran: TrainingPass) -> None:
        """`ValueError` if α's passes do not repeat the training pass, that is if their gradient at w differs from the training pass's by more than ALMOST."""
        passes = self._passes()
        state = RandomState(self._alphas())
        ran.start.restore()
        leaves = [w.detach().requires_grad_() for w in passes.weights.values()]
        with torch.enable_grad():
            grads = torch.autograd.grad(passes.train_loss(leaves, [a.detach() for a in passes.alphas.values()], self.batch), leaves, allow_unused=True)
        state.restore()
        apart = [a if b is None else -b if a is None else a - b for a, b in zip(grads, ran.grads)]
        if float(norm(apart)) > ALMOST * float(norm(ran.grads)) + 1e-12:
            raise ValueError("loss_func of the model on this batch, run again, has other gradients than the training pass: a callback or a hook changes the loss or the gradients, or the model or "
                             "loss_func keeps a state or changes its input; move such a change into the model or loss_func, or use hvp='first_order'")

    def _unroll(self, ran: TrainingPass | None) -> None:
        """Compute α's gradient for the step that the weights are about to take, and note that step if the weights have to take it."""
        valid = self.stream.next(len(self.learn.xb), next(self.learn.model.parameters()).device)
        self.last = self.gradient(self.batch, valid, ran)
        check_finite(gradient_of_α=self.last.grads)
        self.waiting = self.last.grads
        if self._has_to_be_taken():
            self.unrolled = UnrolledStep(self._optimizer(), self.unrolled_lr)

    def _has_to_be_taken(self) -> bool:
        """Whether α's gradient unrolls the very step that the weights have to take. First order unrolls none, and the published code another than theirs."""
        return not (self.reproduce_original or is_first_order(self.hvp, self.unrolled_lr))

    def _before_the_weights_move(self, *_) -> None:
        """The optimizer's hook, which runs after every callback's `before_step`. If one of these cancels the step, it does not run, and α stays where it is."""
        unrolled, self.unrolled, self.stepped = self.unrolled, None, True
        if unrolled is not None:
            unrolled.check()
        self._move_alpha()

    def _move_alpha(self) -> None:
        if self.waiting is None:
            return
        optimizer, held = self.adam_optimizer(), {id(p) for p in self.held}
        for alpha, grad in zip(architecture_parameters(self.learn.model).values(), self.waiting):
            alpha.grad = grad if id(alpha) in held else None
        self.waiting = None
        optimizer.step()
        optimizer.zero_grad()
        check_finite(α=self._alphas())

    def _clip(self) -> float | None:
        return min((cb.max_norm for cb in self.learn.cbs if isinstance(cb, GradientClip)), default=None)  # of several clips the smallest counts

    def gradient(self, train_batch, valid_batch, ran: TrainingPass | None = None) -> AlphaGradient:
        """∇α at the present weights and α, with the hidden states from before this batch. Of all state, only the validation stream's hidden states move on.

        `ran`: the training pass of this batch, if it has been run already.
        """
        passes = self._passes()
        if self.reproduce_original and self.hvp != "first_order" and self._clip() is None:
            raise ValueError("reproduce_original: the published code always clips; the Learner needs GradientClip (the paper's is 0.25)")
        result = gradient_by(self, self.learn.model, passes.weights, list(passes.alphas.values()), train_batch, valid_batch, passes.train_loss, passes.valid_loss,
                             self._optimizer(), self._clip(), first=self.first, ran=ran)
        self.valid_state = passes.moved_on
        return result

    def _passes(self) -> Passes:
        return Passes.of(self.learn, self.before or Before(self.learn.model), self.valid_state, self.alpha_dropout, regularised=not self.reproduce_original)

    def state_dict(self) -> dict:
        """The state for resuming between epochs: Adam's moments and the number of epochs done. α itself is in the model's state."""
        return {"epochs_done": self.epochs_done, "adam": self.adam_optimizer().state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.epochs_done = state["epochs_done"]
        self.adam_optimizer().load_state_dict(state["adam"])
