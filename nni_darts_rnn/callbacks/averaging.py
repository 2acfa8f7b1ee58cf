"""NT-ASGD: averaged SGD from the epoch on in which validation no longer improves."""

from __future__ import annotations

import torch
from fastai.callback.tracker import SaveModelCallback
from fastai.optimizer import OptimWrapper
from torch import Tensor

from ..checks import one_of, whole_number
from .fit_only import ValidatedEpochs


class AveragedSGD(OptimWrapper):
    """torch's ASGD for fastai. It has no momentum, so the momentum that a schedule such as `fit_one_cycle` sets after the switch has no effect."""

    @property
    def hypers(self):
        return [{"mom": 0.0} | hyper for hyper in super().hypers]

    def _set_hyper(self, name, values):
        if name != "mom":
            super()._set_hyper(name, values)


class NTASGD(ValidatedEpochs):
    """Switches from SGD to averaged SGD once `monitor` (lower is better) is worse than its best of more than `nonmono` epochs ago; with `nonmono` None, never.

    This is algorithm 1 of Merity et al. 2017. The switch is to `torch.optim.ASGD(t0=0, lambd=0)` with the same learning rate and weight decay. From then on
    validation sees the averaged weights, and so do callbacks that save the model, up to the order of `SaveModelCallback`. torch's average leaves out the very
    first step after the switch: after s ≥ 2 steps it is the mean of w_2 … w_s. Each averaged step here has the learning rate of its own batch. torch, and so
    the published trainings, take that of the batch before. `ValueError` for a `nonmono` below 1, and at the beginning of a fit for a `monitor` that is not
    recorded.
    """

    order = SaveModelCallback.order + 1

    def __init__(self, nonmono: int | None = 5, monitor: str = "valid_loss"):
        self.nonmono, self.monitor = nonmono if nonmono is None else whole_number("nonmono", nonmono), monitor
        self.logs: list[float] = []
        self.kept: list[tuple[Tensor, Tensor]] | None = None
        self.before = 0  # how many epochs earlier fits validated

    @property
    def averaging(self) -> bool:
        return isinstance(getattr(self.learn.opt, "opt", None), torch.optim.ASGD)

    def start_fit(self):
        self.put_back()  # a fit that was interrupted while it validated left the averages in place
        self.before = len(self.logs)
        names = list(self.recorder.metric_names[1:])
        self.column = names.index(one_of("monitor", self.monitor, names))

    def before_step(self):
        if self.averaging:
            # torch computes a step's rate at the end of the step before, from the learning rate of that step's batch; this batch has its own
            for group in self.learn.opt.opt.param_groups:
                for p in group["params"]:
                    if "eta" in self.learn.opt.opt.state[p]:
                        self.learn.opt.opt.state[p]["eta"].fill_(group["lr"])

    @torch.no_grad()
    def before_validate(self):
        if not self.averaging or self.kept is not None or self.learn.lock.locked():  # locked: `get_preds(inner=True)`, which no `after_epoch` need follow
            return
        self.kept = []
        for p, state in self.learn.opt.opt.state.items():
            if "ax" in state:
                self.kept.append((p, p.detach().clone()))
                p.copy_(state["ax"])

    def after_epoch(self):
        self.put_back()
        if not self.newly_validated():
            return
        value = float(self.recorder.values[-1][self.column])
        if self.nonmono is not None and not self.averaging and len(self.logs) > self.nonmono and value > min(self.logs[:-self.nonmono]):
            self.start_averaging()
        self.logs.append(value)

    def after_cancel_fit(self):
        self.put_back()  # `after_epoch` does not run then

    @torch.no_grad()
    def put_back(self):
        """Put the weights of the iteration back in place of their averages."""
        for p, weight in self.kept or ():
            p.copy_(weight)
        self.kept = None

    def start_averaging(self):
        old = self.learn.opt
        groups = [{"params": list(params), "lr": hyper["lr"], "weight_decay": hyper["wd"]} for params, hyper in zip(old.param_lists, old.hypers)]
        self.learn.opt = AveragedSGD(opt=torch.optim.ASGD(groups, t0=0, lambd=0.0))
        self.learn.opt.frozen_idx = old.frozen_idx

    def since_best(self) -> int:
        """How many epochs this fit has validated after the best one so far; all of them, if an earlier fit had the best one."""
        return len(self.logs) - max(self.before, self.logs.index(min(self.logs)) + 1) if self.logs else 0

    def state_dict(self) -> dict:
        """The state for resuming: the monitored values so far and, once averaging, the averages. The weights themselves are in the model's state."""
        return {"logs": list(self.logs), "averages": self.learn.opt.opt.state_dict() if self.averaging else None}

    def load_state_dict(self, state: dict) -> None:
        """The inverse of `state_dict`. After this callback's `before_fit` it continues the same fit. Before `fit`, the epochs so far are an earlier fit's for
        `since_best`."""
        self.logs, self.before = list(state["logs"]), 0  # the same fit, which goes on
        if state["averages"] is not None:
            if self.learn.opt is None:
                self.learn.create_opt()
            if not self.averaging:
                if self.learn.wd is not None:
                    self.learn.opt.set_hypers(wd=self.learn.wd)
                self.start_averaging()
            self.learn.opt.opt.load_state_dict(state["averages"])
