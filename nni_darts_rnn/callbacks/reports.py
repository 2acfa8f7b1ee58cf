"""Callbacks that report on a fit: to a function, to NNI, in a table, on the console and beside the progress bar."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from fastai.callback.core import Callback
from fastai.callback.progress import CSVLogger, ProgressCallback

from ..checks import whole_number
from ..epoch_counts import EpochCounts, perplexity_of
from ..fastai_streams import already_trained
from ..files import write_csv
from ..health import watched_spread
from .averaging import NTASGD
from .fit_only import FitOnly, ValidatedEpochs


class MetricsCSV(ValidatedEpochs, CSVLogger):
    """`CSVLogger` that makes the Learner's folder, whose file `Learner.validate` does not truncate, and whose open file does not stop `Learner.export`.
    The table has a row for every epoch that was trained and validated. Epochs that `fit(start_epoch=…)` skips keep the rows that they have."""

    # after the bar, which calls no other logger, and which is the last of its order once `no_bar` has put it back (fastai 2.8)
    order, _stateattrs = ProgressCallback.order + 1, ("file", "old_logger")

    def start_fit(self):
        if self.learn.logger == self._write_line:  # since a fit that was interrupted
            CSVLogger.after_fit(self)
        self.path.mkdir(parents=True, exist_ok=True)
        first, kept = getattr(getattr(self.learn, "skip_to_epoch", None), "_skip_to", 0), []
        if first and (self.path / self.fname).is_file() and not self.append:
            kept = [row for row in (self.path / self.fname).read_text().splitlines(True) if (epoch := row.partition(",")[0]).isdigit() and int(epoch) < first]
        CSVLogger.before_fit(self)
        self.file.writelines(kept)

    def _write_line(self, log):
        if self.newly_validated():
            super()._write_line(log)
        else:
            self.old_logger(log)


class PerplexityInBar(Callback):
    """Shows the perplexity beside fastai's progress bar, in place of the loss."""

    order = ProgressCallback.order + 1

    def after_batch(self):
        if self.training and hasattr(self.learn, "progress") and hasattr(self.learn.progress, "pbar"):
            self.learn.progress.pbar.comment = f"perplexity {perplexity_of(float(self.learn.smooth_loss)):.1f}"


class PrintGenotype(ValidatedEpochs):
    """Prints the cell that α stands for after every `every`-th validated epoch. `genotypes` keeps the cell of each. The model must have `genotype()`."""

    order = NTASGD.order + 1

    def __init__(self, every: int = 1):
        self.every, self.genotypes = whole_number("every", every), []

    def after_epoch(self):
        if not self.newly_validated():
            return
        cell = self.learn.model.genotype()
        self.genotypes.append(cell)
        if len(self.genotypes) % self.every == 0:
            bar = getattr(getattr(self.learn, "progress", None), "mbar", None)  # a plain print would break into the bar
            (bar.write if bar else print)(f"epoch {self.epoch + 1}: {cell}")


class EpochReport(FitOnly):
    """Gives `report` a dictionary after every epoch that was trained and validated: `default` and `perplexity` (both of validation), `phase`, `epoch` (from 1),
    `train_loss` (nats per token), `train_perplexity`, `lr`, `asgd` (whether averaged weights were validated), `tokens_per_second` (in training alone),
    `seconds` (of the epoch), and for a supernet `alpha_entropy` (nats, mean over edges), `none_share` and `identity_share`. `rows` keeps the dictionaries.
    `table` is a CSV file that is written anew after every such epoch, without `default`. If a search collapses, a warning says so."""

    order = NTASGD.order + 1

    def __init__(self, report: Callable[[dict], None] | None = None, phase: str = "retrain", table: str | Path | None = None):
        self.report, self.phase, self.table, self.rows, self.counts = report, phase, table, [], EpochCounts(phase)

    def start_fit(self):
        self.row = None

    def before_train(self):
        self.counts.begin()

    def after_batch(self):
        if self.training:
            whole = already_trained(self.dls.train) + self.n_iter  # batches of a whole epoch
            self.counts.add(self.yb[0].numel(), self.learn.loss, self.n_epoch, (self.n_epoch - self.epoch - 1) * whole + self.n_iter - self.iter - 1)

    def after_train(self):
        train_loss = self.counts.loss
        self.row = {"train_loss": train_loss, "train_perplexity": perplexity_of(train_loss),
                    "tokens_per_second": self.counts.tokens / self.counts.seconds, "lr": float(self.opt.hypers[-1]["lr"])}

    def after_validate(self):
        if self.row is not None:
            self.row["asgd"] = isinstance(getattr(self.opt, "opt", None), torch.optim.ASGD)

    def after_epoch(self):
        if self.row is None or "asgd" not in self.row:  # a skipped or cancelled epoch
            return
        recorder = self.learn.recorder
        perplexity = perplexity_of(float(recorder.values[-1][list(recorder.metric_names[1:]).index("valid_loss")]))
        row = {"default": perplexity, "phase": self.phase, "epoch": self.epoch + 1, "perplexity": perplexity, **self.row,
               "seconds": self.counts.seconds}
        mixed = next((m for m in self.learn.model.modules() if hasattr(m, "probabilities")), None)
        if mixed is not None:
            row |= watched_spread(mixed, self.phase, self.epoch + 1)
        self.rows.append(row)
        self.row = None
        if self.table is not None:
            write_csv(self.table, [{k: v for k, v in row.items() if k != "default"} for row in self.rows])
        if self.report is not None:
            self.report(row)


class NNIReporter(EpochReport):
    """`EpochReport` to NNI's web page. Outside a trial it reports nothing."""

    def __init__(self, phase: str = "retrain"):
        super().__init__(report_to_nni, phase)


def report_to_nni(row: dict) -> None:
    """Report `row` as an intermediate result of the running NNI trial, if there is one."""
    import nni  # here, since users of fastai alone need not import it

    if nni.get_trial_id() != "STANDALONE":
        nni.report_intermediate_result(row)
