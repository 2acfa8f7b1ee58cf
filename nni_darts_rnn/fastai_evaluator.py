"""`FastaiEvaluator`, with which NNI's multi-trial strategies train and judge a sampled model."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nni
import torch
from fastai.callback.core import Callback
from fastai.callback.tracker import TerminateOnNaNCallback
from fastai.learner import Learner
from nni.nas.evaluator import Evaluator

from .checkpoints.file import random_state, restore_random_state
from .checks import whole_number
from .corpus import Corpus, load_corpus
from .files import write_text
from .health import NotFinite
from .learner import language_dls, lm_learner
from .outputs.onnx_file import check_onnx, write_onnx
from .pipeline import check_fits, take_fast_path
from .recipes import Recipe, get_recipe
from .space import RecurrentSpace

OF_THE_SPACE = ("hidden_size", "dropout", "dropout_h", "dropout_x", "dropout_i", "dropout_e", "init_range")  # a model of NNI's has its own


class _Report(Callback):
    """Reports an intermediate result after every epoch with a finite validation loss: `default` (minus that loss, so that more is better), `epoch` from 1,
    and the Learner's losses and metrics under their names."""

    order = 90  # after the Recorder and whatever changes the weights for validation

    def after_epoch(self):
        row = dict(zip(self.recorder.metric_names[1:], map(float, self.recorder.values[-1])))  # without the epoch; the time, which may follow, is no value
        if math.isfinite(row.get("valid_loss", math.nan)):
            nni.report_intermediate_result({"default": -row["valid_loss"], "epoch": self.epoch + 1, **row})


@contextlib.contextmanager
def _others_draws_untouched():
    """Put the process's random generators back afterwards. Every model's training starts from the same seed, so the next draw of a strategy in this process
    (of its policy, say) would otherwise be the same after every model."""
    before = random_state()
    try:
        yield
    finally:
        restore_random_state(before)


@nni.trace
class FastaiEvaluator(Evaluator):
    """Trains each model that a strategy samples, in a fastai `Learner`. The result is minus the validation loss (for a language model the log likelihood in
    nats per token), because NNI's strategies look for the largest result.

    By default the model is one of a `DartsRnnSpace`. It is trained as a language model on a corpus:

    corpus, corpus_folder, corpus_mirror
        As in `load_corpus`; the default is "pydoc". Each process loads the corpus for itself. A `Corpus` object works in the sequential engine alone.
    recipe, settings
        A recipe, by name or itself (default: "small"), of which the `retrain` part is used, and fields to replace in it: `settings={"lr": 5.0, "epochs": 2}`.
        The model's size, its dropout rates and its first weights are the space's.
    epochs
        Passes over the text. None: the recipe's number. 0: the weights are judged as they are, for a space that a one-shot strategy has trained.
    seed
        Seed of dropout, of batches, and of the weights if NNI makes the model anew (format "simplified"; in format "raw" they are the space's own).
    device
        Where to compute: "auto", "cpu" or "gpu".
    learner
        For any other space: a function `learner(model) -> Learner` of an importable module. Give `epochs` with it, but no corpus, recipe, settings or device.

    onnx
        Whether to leave the trained language model in the trial's folder as model.onnx, which the Visualization of NNI's web page opens. It takes some seconds
        a trial.

    Raises `ValueError` with one line for arguments that are not allowed. Raises `FloatingPointError` where the final validation loss is not finite, and for a
    language model already in the step whose loss or gradient is not finite.
    """

    def __init__(self, corpus: str | Corpus | None = None, recipe: str | Recipe | None = None, settings: dict | None = None, *, epochs: int | None = None, seed: int = 0,
                 corpus_folder: str | None = None, corpus_mirror: str | None = None, device: str = "auto",
                 learner: Callable[..., Learner] | None = None, onnx: bool = False):
        if epochs is not None:
            whole_number("epochs", epochs, 0)
        settings = dict(settings or {})
        for name in OF_THE_SPACE:
            if name in settings:
                raise ValueError(f"settings: {name} is the model space's; give it there")
        if learner is not None and (epochs is None or settings or device != "auto" or any(v is not None for v in (corpus, recipe, corpus_folder, corpus_mirror))):
            raise ValueError("learner: with a learner of your own give epochs, but no corpus, recipe, settings or device, which the learner has itself")
        if onnx:
            if learner is not None:
                raise ValueError("onnx: only the language model is written; leave it out with a learner of your own")
            check_onnx()
        self.recipe = get_recipe("small" if recipe is None else recipe, {f"retrain.{name}": value for name, value in settings.items()}).retrain
        self.epochs = self.recipe.epochs if epochs is None else epochs
        self.corpus, self.corpus_folder, self.corpus_mirror = "pydoc" if corpus is None else corpus, corpus_folder, corpus_mirror
        self.seed, self.device, self.learner, self.onnx = seed, device, learner, onnx

    def _execute(self, model):
        with _others_draws_untouched():
            torch.manual_seed(self.seed)  # before the model is made
            return super()._execute(model)

    def evaluate(self, model) -> float:
        """Train `model`, report to NNI, and return the final result. Afterwards the process's random generators are as they were before."""
        with _others_draws_untouched():
            return self._evaluate(model)

    def _evaluate(self, model) -> float:
        output = os.environ.get("NNI_OUTPUT_DIR")
        genotype = model.genotype() if isinstance(model, RecurrentSpace) else None
        if output is not None and genotype is not None:
            write_text(Path(output) / "genotype.json", genotype.to_json() + "\n")
        with tempfile.TemporaryDirectory() as folder:
            learn = self._language_learner(model, folder) if self.learner is None else self.learner(model)
            torch.manual_seed(self.seed)
            with learn.no_bar(), learn.no_logging():
                if self.epochs:
                    try:
                        learn.fit(self.epochs, cbs=[_Report(), TerminateOnNaNCallback()])
                    except NotFinite as error:  # whose text fastai has put words of its own before
                        raise FloatingPointError(f"{error.what}; lower the learning rate or the clipping norm") from None
                loss = float(learn.validate()[0])
            if self.onnx and output is not None:
                write_onnx(output, model.lm)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the validation loss is {loss}; lower the learning rate or the clipping norm")
        nni.report_final_result({"default": -loss, "valid_loss": loss})
        return -loss

    def _language_learner(self, model, folder: str) -> Learner:
        if not isinstance(self.corpus, Corpus):
            self.corpus = load_corpus(self.corpus, folder=self.corpus_folder, mirror=self.corpus_mirror)
        corpus, lm = self.corpus, model.lm
        if lm.vocab_size != len(corpus.vocab):
            raise ValueError(f"the model space has vocab_size {lm.vocab_size}, the corpus {corpus.name} has {len(corpus.vocab)} words")
        trained = replace(self.recipe, hidden_size=lm.hidden_size, epochs=max(1, self.epochs), test_batch_size=1)  # the size is the space's; no test text is read
        check_fits(corpus, trained)
        take_fast_path(corpus, trained, self.device, model.genotype().n_nodes)
        return lm_learner(language_dls(corpus, self.recipe, self.seed, self.device, path=folder), lm, self.recipe, seed=self.seed, path=folder,
                          metrics_file=None)
