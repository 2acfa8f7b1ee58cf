"""fastai callbacks for training and searching recurrent language models.

Batches are fastai's: tokens and targets (B, T). A model answers `(decoded (B, T, V), raw (B, T, H), dropped (B, T, H))`, as fastai's
`RNNCallback` expects. Orders: fastai's schedulers set the learning rate at 60; `ScaleLRByLength` (61) scales it; `ArchParamUpdate` (62) unrolls
the step of that very rate. `SaveModelCallback` (61) saves what was validated before `NTASGD` (62) puts the weights of the iteration back.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from fastai.callback.core import Callback
from fastai.callback.progress import CSVLogger, ProgressCallback
from fastai.callback.rnn import RNNRegularizer
from fastai.callback.schedule import ParamScheduler
from fastai.callback.tracker import SaveModelCallback, TrackerCallback
from fastai.callback.training import GradientClip
from fastai.optimizer import OptimWrapper
from fastai.torch_core import to_device
from torch import Tensor, nn

from .bilevel import EPSILON, AlphaGradient, WeightStep, architecture_gradient, original_gradient
from .files import whole, write_csv
from .health import check_finite, collapse, spread
from .model import activation_regularisation

logger = logging.getLogger(__name__)


def architecture_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """α by name, in the order of the modules: every parameter whose own name is `alpha`."""
    return {name: p for name, p in model.named_parameters() if name.rpartition(".")[2] == "alpha"}


def weight_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All trainable parameters but α: the `splitter` of a search Learner, so that its optimizer leaves α alone."""
    architecture = {id(p) for p in architecture_parameters(model).values()}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in architecture]


class _FitOnly(Callback):
    """Sits out `Learner.validate` and `get_preds`, which run `before_fit` … `after_fit` too (and hold the Learner's lock meanwhile)."""

    def before_fit(self):
        if self.learn.lock.locked():
            self.run = False  # fastai sets it back after `after_fit`
        else:
            self.start_fit()

    def start_fit(self):
        """`before_fit` of a real fit."""


class BestModel(_FitOnly, SaveModelCallback):
    """`SaveModelCallback` without its message, loading tensors only (fastai's own unpickles whatever the file holds), never a half-written
    file and never one that another fit left behind."""

    def __init__(self, monitor: str = "valid_loss", comp=None, min_delta: float = 0.0, fname: str = "best", with_opt: bool = False):
        super().__init__(monitor=monitor, comp=comp, min_delta=min_delta, fname=fname, with_opt=with_opt)

    def start_fit(self):
        self.last_saved_path, self.validated = None, False
        TrackerCallback.before_fit(self)

    def after_validate(self):
        self.validated = True

    def after_epoch(self):
        if not self.validated:  # an epoch that `fit(start_epoch=…)` skipped, or a cancelled one
            return
        self.validated = False
        TrackerCallback.after_epoch(self)
        if self.new_best:
            self._save(self.fname)

    def _save(self, name):
        written = self.learn.save(f"{name}.partial", with_opt=self.with_opt)
        self.last_saved_path = written.with_name(f"{name}.pth")
        os.replace(written, self.last_saved_path)

    def after_fit(self):
        if self.last_saved_path is not None:
            self.learn.load(self.fname, with_opt=self.with_opt, weights_only=True)

    def state_dict(self) -> dict:
        """For resuming: the best value and, once there is one, the model that had it (without its optimizer)."""
        kept = None if self.last_saved_path is None else torch.load(self.last_saved_path, map_location="cpu", weights_only=True)
        return {"best": float(self.best), "model": kept["model"] if self.with_opt and kept else kept}

    def load_state_dict(self, state: dict) -> None:
        """The inverse of `state_dict`, after `before_fit`; the file is written anew."""
        self.best = state["best"]
        if state["model"] is not None:
            path = self.learn.path / self.learn.model_dir / f"{self.fname}.pth"
            with whole(path) as temporary:
                torch.save(state["model"], temporary)
            self.last_saved_path = path


class MetricsCSV(_FitOnly, CSVLogger):
    """`CSVLogger` that `Learner.validate` does not truncate, and that makes its folder."""

    def start_fit(self):
        self.path.mkdir(parents=True, exist_ok=True)
        CSVLogger.before_fit(self)


class PerplexityInBar(Callback):
    """Perplexity beside fastai's progress bar, which shows the loss."""

    order = ProgressCallback.order + 1

    def after_batch(self):
        if self.training and hasattr(self.learn, "progress") and hasattr(self.learn.progress, "pbar"):
            self.learn.progress.pbar.comment = f"perplexity {_exp(float(self.learn.smooth_loss)):.1f}"


class ActivationRegularizer(RNNRegularizer):
    """`RNNRegularizer` (`alpha`: AR, `beta`: TAR) that counts time steps where fastai's counts the batch, so a batch of one step gives no NaN."""

    def after_loss(self):
        if self.training:
            raw, dropped = self.rnn.raw_out.transpose(0, 1), self.rnn.out.transpose(0, 1)  # (T, B, H)
            self.learn.loss_grad = self.learn.loss_grad + activation_regularisation(raw, dropped, self.alpha, self.beta)


class ScaleLRByLength(Callback):
    """A batch of T steps is trained with the learning rate × T/bptt. Schedulers and loggers see the plain rate."""

    order, run_valid = ParamScheduler.order + 1, False

    def __init__(self, bptt: int):
        self.bptt, self.plain = bptt, None

    def before_batch(self):
        self.plain = [hyper["lr"] for hyper in self.opt.hypers]
        self.opt.set_hyper("lr", [lr * self.xb[0].shape[1] / self.bptt for lr in self.plain])

    def after_step(self):
        if self.plain is not None:
            self.opt.set_hyper("lr", self.plain)
            self.plain = None

    def after_cancel_batch(self):
        self.after_step()


class NTASGD(_FitOnly):
    """SGD until `monitor` (lower is better) has not improved for `nonmono` epochs on the best before them, then averaged SGD.

    Merity et al. 2017, algorithm 1. The switch is to `torch.optim.ASGD(t0=0, lambd=0)` with the same learning rate and weight decay; from then on
    validation sees the averaged weights, and so does whatever saves the model up to `SaveModelCallback`. torch's average leaves out the
    very first step after the switch: after s ≥ 2 steps it is the mean of w_2 … w_s.
    """

    order = SaveModelCallback.order + 1

    def __init__(self, nonmono: int = 5, monitor: str = "valid_loss"):
        self.nonmono, self.monitor = nonmono, monitor
        self.logs: list[float] = []
        self.kept: list[tuple[Tensor, Tensor]] | None = None
        self.validated = False

    @property
    def averaging(self) -> bool:
        return isinstance(getattr(self.learn.opt, "opt", None), torch.optim.ASGD)

    def start_fit(self):
        self.validated = False
        self.column = list(self.recorder.metric_names[1:]).index(self.monitor)

    def before_step(self):
        if self.averaging:
            # torch computes a step's rate at the end of the step before, from that batch's learning rate; this batch has its own length
            for group in self.learn.opt.opt.param_groups:
                for p in group["params"]:
                    if "eta" in self.learn.opt.opt.state[p]:
                        self.learn.opt.opt.state[p]["eta"].fill_(group["lr"])

    @torch.no_grad()
    def before_validate(self):
        if not self.averaging or self.kept is not None:
            return
        self.kept = []
        for p, state in self.learn.opt.opt.state.items():
            if "ax" in state:
                self.kept.append((p, p.detach().clone()))
                p.copy_(state["ax"])

    def after_validate(self):
        self.validated = True

    def after_epoch(self):
        self.put_back()
        if not self.validated:
            return
        self.validated = False
        value = float(self.recorder.values[-1][self.column])
        if not self.averaging and len(self.logs) > self.nonmono and value > min(self.logs[:-self.nonmono]):
            self.start_averaging()
        self.logs.append(value)

    def after_cancel_fit(self):
        self.put_back()  # `after_epoch` does not run then

    @torch.no_grad()
    def put_back(self):
        """The weights of the iteration in place of their averages."""
        for p, weight in self.kept or ():
            p.copy_(weight)
        self.kept = None

    def start_averaging(self):
        old = self.learn.opt
        groups = [{"params": list(params), "lr": hyper["lr"], "weight_decay": hyper["wd"]} for params, hyper in zip(old.param_lists, old.hypers)]
        self.learn.opt = OptimWrapper(opt=torch.optim.ASGD(groups, t0=0, lambd=0.0))
        self.learn.opt.frozen_idx = old.frozen_idx

    def state_dict(self) -> dict:
        """For resuming: the monitored values so far and, once averaging, the averages. The weights themselves are the model's."""
        return {"logs": list(self.logs), "averages": self.learn.opt.opt.state_dict() if self.averaging else None}

    def load_state_dict(self, state: dict) -> None:
        """The inverse of `state_dict`, before `fit`."""
        self.logs = list(state["logs"])
        if state["averages"] is not None:
            if self.learn.opt is None:
                self.learn.create_opt()
            if not self.averaging:
                if self.learn.wd is not None:
                    self.learn.opt.set_hypers(wd=self.learn.wd)
                self.start_averaging()
            self.learn.opt.opt.load_state_dict(state["averages"])


class PrintGenotype(_FitOnly):
    """Prints the cell that α stands for after every `every`-th epoch; `genotypes` keeps them all. The model must have `genotype()`."""

    order = NTASGD.order + 1

    def __init__(self, every: int = 1):
        self.every, self.genotypes = every, []

    def after_epoch(self):
        cell = self.learn.model.genotype()
        self.genotypes.append(cell)
        if len(self.genotypes) % self.every == 0:
            bar = getattr(getattr(self.learn, "progress", None), "mbar", None)  # a plain print would break into the bar
            (bar.write if bar else print)(f"epoch {self.epoch + 1}: {cell}")


class FiniteNumbers(_FitOnly):
    """`NotFinite` in the step whose loss or gradient is NaN or infinite, before the weights take it."""

    order, run_valid = GradientClip.order + 1, False

    def before_step(self):
        check_finite(training_loss=self.learn.loss_grad, gradient_of_the_weights=[p.grad for p in self.model.parameters()])


class EpochReport(_FitOnly):
    """After every epoch hands `report` a dictionary: `default` and `perplexity` (validation), `phase`, `epoch` (from 1), `train_loss`
    (nats per token), `train_perplexity`, `lr`, `asgd` (whether averaged weights were validated), `tokens_per_second` (training alone),
    `seconds` (the epoch), and for a supernet `alpha_entropy` (nats, mean over edges), `none_share` and `identity_share`. `rows` keeps them;
    `table` is a CSV file that is written whole after every epoch. A search that collapses is named."""

    order = NTASGD.order + 1

    def __init__(self, report: Callable[[dict], None] | None = None, phase: str = "retrain", table: str | Path | None = None):
        self.report, self.phase, self.table, self.rows = report, phase, table, []

    def start_fit(self):
        self.row = None

    def before_train(self):
        self.began, self.tokens, self.nats = time.perf_counter(), 0, 0.0

    def in_epoch(self) -> dict:
        """What has been counted in this epoch so far, for a checkpoint."""
        return {"seconds": time.perf_counter() - self.began, "tokens": self.tokens, "nats": self.nats}

    def go_on(self, seconds: float, tokens: int, nats: Tensor | float) -> None:
        """The inverse of `in_epoch`."""
        self.began, self.tokens, self.nats = time.perf_counter() - seconds, tokens, nats

    def after_batch(self):
        if self.training:
            n = self.yb[0].numel()
            self.tokens += n
            self.nats = self.nats + self.learn.loss.detach() * n  # stays on the device

    def after_train(self):
        train_loss = float(self.nats) / max(1, self.tokens)
        self.row = {"train_loss": train_loss, "train_perplexity": _exp(train_loss),
                    "tokens_per_second": self.tokens / (time.perf_counter() - self.began), "lr": float(self.opt.hypers[-1]["lr"])}

    def after_validate(self):
        if self.row is not None:
            self.row["asgd"] = isinstance(getattr(self.opt, "opt", None), torch.optim.ASGD)

    def after_epoch(self):
        if self.row is None or "asgd" not in self.row:  # a skipped or cancelled epoch
            return
        recorder = self.learn.recorder
        perplexity = _exp(float(recorder.values[-1][list(recorder.metric_names[1:]).index("valid_loss")]))
        row = {"default": perplexity, "phase": self.phase, "epoch": self.epoch + 1, "perplexity": perplexity, **self.row,
               "seconds": time.perf_counter() - self.began}
        mixed = next((m for m in self.learn.model.modules() if hasattr(m, "probabilities")), None)
        if mixed is not None:
            shares = spread(mixed.probabilities(), mixed.primitives)
            row |= shares
            if words := collapse(shares, mixed.genotype()):
                logger.warning("%s, epoch %d: %s", self.phase, self.epoch + 1, words)
        self.rows.append(row)
        self.row = None
        if self.table is not None:
            write_csv(self.table, [{k: v for k, v in row.items() if k != "default"} for row in self.rows])
        if self.report is not None:
            self.report(row)


class NNIReporter(EpochReport):
    """`EpochReport` to NNI's web UI; reports nothing outside a trial."""

    def __init__(self, phase: str = "retrain"):
        super().__init__(report_to_nni, phase)


def report_to_nni(row: dict) -> None:
    """`row` as an intermediate result of the running NNI trial, if there is one."""
    import nni  # here: fastai users need not have it

    if nni.get_trial_id() != "STANDALONE":
        nni.report_intermediate_result(row)


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))  # a float64 ends at e^709


class ArchParamUpdate(_FitOnly):
    """Moves α before every weight step, by the gradient of the validation loss after that step (DARTS, eq. 6–8).

    `valid_batches` yields (tokens (B, T), targets (B, T)) of a text that the weights do not learn; it is read from its beginning in each
    epoch, and again as often as the training text is longer. Hidden states (buffers named in the model's `carried`) run along the
    validation stream here, apart from the training stream's. The weights' optimizer must be `OptimWrapper(opt=torch.optim.SGD)` without α
    (`splitter=weight_parameters`).
    The training loss is the weight step's: the Learner's `loss_func` plus the AR/TAR of its `RNNRegularizer`; its `GradientClip` is unrolled too.
    Other arguments: see `recipes.SearchRecipe`. Weights, buffers, hidden states and random state are left as if only the weight step had run.
    """

    order, run_valid, _stateattrs = ScaleLRByLength.order + 1, False, ("stream",)

    def __init__(self, valid_batches, arch_lr: float = 3e-3, arch_weight_decay: float = 1e-3, arch_betas: tuple[float, float] = (0.9, 0.999),
                 hvp: str = "finite_difference", epsilon: float = EPSILON, unrolled_lr: float | None = None, neumann_terms: int = 0,
                 warmup_epochs: int = 0, reproduce_original: bool = False):
        self.valid_batches, self.hvp, self.epsilon, self.unrolled_lr = valid_batches, hvp, epsilon, unrolled_lr
        self.neumann_terms, self.warmup_epochs, self.reproduce_original = neumann_terms, warmup_epochs, reproduce_original
        self.adam: dict = dict(lr=arch_lr, betas=tuple(arch_betas), weight_decay=arch_weight_decay)
        self.arch_opt: torch.optim.Adam | None = None
        self.epochs_done = 0
        self.last: AlphaGradient | None = None

    @classmethod
    def of(cls, recipe, valid_batches) -> ArchParamUpdate:
        """With a SearchRecipe's settings."""
        return cls(valid_batches, recipe.arch_lr, recipe.arch_weight_decay, (recipe.arch_beta1, recipe.arch_beta2), recipe.hvp, recipe.epsilon,
                   recipe.unrolled_lr, recipe.neumann_terms, recipe.warmup_epochs, recipe.reproduce_original)

    def start_fit(self):
        alphas = self._alphas()
        if not alphas:
            raise ValueError("the model has no parameter named alpha: nothing to search")
        moved = {id(p) for group in self._sgd().param_groups for p in group["params"]}
        if any(id(p) in moved for p in alphas):
            raise ValueError("the weights' optimizer holds α: give the Learner splitter=weight_parameters")
        self._require_grad(False)  # the weight step needs no gradient of α, and GradientClip must not count one

    def after_fit(self):
        self._require_grad(True)

    def _alphas(self) -> list[nn.Parameter]:
        return list(architecture_parameters(self.learn.model).values())

    def _require_grad(self, value: bool) -> None:
        for alpha in self._alphas():
            alpha.requires_grad_(value)

    def _sgd(self) -> torch.optim.Optimizer:
        optimizer = getattr(self.learn.opt, "opt", None)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError("ArchParamUpdate unrolls a torch optimizer: give the Learner opt_func=partial(OptimWrapper, opt=torch.optim.SGD)")
        return optimizer

    def adam_optimizer(self) -> torch.optim.Adam:
        """α's optimizer, made when first asked for."""
        if self.arch_opt is None:
            self.arch_opt = torch.optim.Adam(self._alphas(), **self.adam)
        return self.arch_opt

    def before_train(self):
        buffers = dict(self.learn.model.named_buffers())
        self.valid_state = {name: torch.zeros_like(buffers[name]) for name in getattr(self.learn.model, "carried", ())}
        self.stream = self._read_valid()

    def after_train(self):
        self.epochs_done += 1

    def _read_valid(self):
        """Batches of the validation text without end."""
        for _ in itertools.count():
            if hasattr(self.valid_batches, "set_epoch"):
                self.valid_batches.set_epoch(self.epochs_done)
            empty = True
            for batch in self.valid_batches:
                empty = False
                yield batch
            if empty:
                raise ValueError("valid_batches holds no batch: the validation text is too short for this batch size")

    def before_batch(self):
        if self.epochs_done < self.warmup_epochs:
            return
        x, y = self._plain(next(self.stream))
        self.last = self.gradient((self.learn.xb[0], self.learn.yb[0]), (x, y))
        check_finite(gradient_of_α=self.last.grads)
        optimizer = self.adam_optimizer()
        for alpha, grad in zip(self._alphas(), self.last.grads):
            alpha.grad = grad
        optimizer.step()
        optimizer.zero_grad()
        check_finite(α=self._alphas())

    def _plain(self, batch) -> tuple[Tensor, Tensor]:
        """On the model's device, as plain tensors rather than fastai's subclasses."""
        x, y = to_device(tuple(batch), next(self.learn.model.parameters()).device)
        return x.as_subclass(Tensor), y.as_subclass(Tensor)

    def gradient(self, train_batch, valid_batch) -> AlphaGradient:
        """∇α at the present weights, α and hidden states; only the validation stream's hidden state moves on."""
        model, optimizer = self.learn.model, self._sgd()
        alphas = architecture_parameters(model)
        weights = {name: p for name, p in model.named_parameters() if p.requires_grad and name not in alphas}
        regularizer, clipper = (next((cb for cb in self.learn.cbs if isinstance(cb, kind)), None) for kind in (RNNRegularizer, GradientClip))
        clip = None if clipper is None else clipper.max_norm

        def run(at_weights, at_alphas, batch, carried):
            # copies of the buffers: BatchNorm statistics and hidden states stay as they are
            state = {name: b.clone() for name, b in model.named_buffers()} | carried
            state.update(zip(weights, at_weights))
            state.update(zip(alphas, at_alphas))
            decoded, raw, dropped = torch.func.functional_call(model, state, (batch[0],))
            return self.learn.loss_func(decoded, batch[1]), raw, dropped, state

        def data_loss(at_weights, at_alphas, batch):
            return run(at_weights, at_alphas, batch, {})[0]

        def train_loss(at_weights, at_alphas, batch):
            loss, raw, dropped, _ = run(at_weights, at_alphas, batch, {})
            if regularizer is None:
                return loss
            return loss + activation_regularisation(raw.transpose(0, 1), dropped.transpose(0, 1), regularizer.alpha, regularizer.beta)

        def valid_loss(at_weights, at_alphas, batch):
            loss, _, _, state = run(at_weights, at_alphas, batch, self.valid_state)
            moved_on.update({name: state[name] for name in self.valid_state})
            return loss

        moved_on: dict[str, Tensor] = {}
        w, a = list(weights.values()), list(alphas.values())
        if self.reproduce_original and self.hvp != "first_order":
            if clip is None:
                raise ValueError("reproduce_original: the published code always clips; the Learner needs GradientClip (the paper's is 0.25)")
            first = {id(p): name for name, p in model.named_parameters()}
            tied = {first[id(p)] for name, p in model.named_parameters(remove_duplicate=False) if first[id(p)] != name}
            group = optimizer.param_groups[0]
            lr = group["lr"] if self.unrolled_lr is None else self.unrolled_lr
            result = original_gradient(data_loss, w, a, train_batch, valid_batch, lr, group["weight_decay"], clip, valid_loss=valid_loss,
                                       tied=[i for i, name in enumerate(weights) if name in tied])
        else:
            step = None if self.hvp == "first_order" else WeightStep.of(optimizer, w, clip, self.unrolled_lr)
            result = architecture_gradient(train_loss, w, a, train_batch, valid_batch, step, self.hvp, self.epsilon, self.neumann_terms, valid_loss)
        self.valid_state = moved_on
        return result

    def state_dict(self) -> dict:
        """For resuming between epochs: Adam's moments and the number of epochs. α itself is the model's."""
        return {"epochs_done": self.epochs_done, "adam": self.adam_optimizer().state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.epochs_done = state["epochs_done"]
        self.adam_optimizer().load_state_dict(state["adam"])
