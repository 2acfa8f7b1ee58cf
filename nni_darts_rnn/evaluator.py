"""The Lightning evaluator that NNI's one-shot strategies train the language model's supernet with."""

from __future__ import annotations

import contextlib
from pathlib import Path

import nni
import pytorch_lightning as pl
import torch
from nni.nas.evaluator.pytorch import Lightning, LightningModule, Trainer

from .checks import one_of
from .corpus import BpttBatches, Corpus, LengthRule, streams
from .epoch_counts import EpochCounts, perplexity_of
from .files import write_csv, write_json, write_text
from .genotype import Genotype
from .health import check_epoch, watched_spread
from .model import activation_regularisation, evaluating, perplexity, without_dropout
from .recipes import SearchRecipe, annealed
from .weight_step import OPTIMIZERS

TRAIN, VALID = 0, 1  # which stream a batch comes from; its own hidden state goes with it


class TaggedBatches:
    """Batches that say which stream they come from: (tokens (T, B), targets (T, B), stream).

    `epoch()` says which epoch's lengths to draw; asked anew for every length and iteration, so a resumed trainer gets the right ones.
    `no_longer_than`: batches that these are read beside; an epoch has no more than they have.
    `start` (epoch, batch): where a run goes on. That epoch begins with that batch, and these are read as often as what they are read beside.
    """

    def __init__(self, batches: BpttBatches, stream: int, epoch=lambda: 0, no_longer_than: TaggedBatches | None = None):
        self.batches, self.stream, self.epoch, self.no_longer_than = batches, stream, epoch, no_longer_than
        self.start = (-1, 0)

    def _range(self) -> range:
        """The batches to come, numbered as if the text went on from its end with its beginning."""
        epoch = self.epoch()
        self.batches.set_epoch(epoch)
        length = len(self.batches)
        if epoch == self.start[0]:
            return range(self.start[1], length if self.no_longer_than is None else self.no_longer_than._range().stop)
        return range(length if self.no_longer_than is None else min(length, len(self.no_longer_than)))

    def __len__(self) -> int:
        return len(self._range())

    def __iter__(self):
        if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise ValueError("devices: each of several processes would read the whole text; use devices=1, or loaders that give each its part of the streams")
        for number in self._range():
            batch = self.batches[number % len(self.batches)]
            yield batch.tokens, batch.targets, self.stream


def training_tokens(batch) -> torch.Tensor | None:
    """The tokens (T, B) that the weights learn in a batch of any of NNI's one-shot strategies, or None where they learn nothing."""
    if isinstance(batch, dict):  # the DARTS family: both streams at once
        return batch["train"][0]
    if len(batch) == 2:  # ENAS: one of them, with its name
        return batch[0][0] if batch[1] == "train" else None
    return batch[0]


@nni.trace
class LanguageModelModule(LightningModule):
    """Trains a `DartsRnnSpace` or its supernet: SGD or Adam (`optimizer`), learning rate × length/bptt, AR/TAR, hidden states carried from batch to batch.

    A batch is (tokens (T, B), targets (T, B), stream): `TRAIN` or `VALID`. The hidden states of both streams are buffers, so they are in
    Lightning's checkpoints. `training_step` returns "loss" (nats per token, plus AR/TAR for the training stream) and "data_loss" (without).
    `alpha_dropout`: whether the loss of the VALID stream, which α learns from, has the training's dropout. `annealed`: what the learning rate is
    multiplied by, 1 where no `AnnealLR` moves it.
    """

    validation_buffers = ("hidden_valid",)

    def __init__(self, batch_size: int, hidden_size: int, bptt: int = 35, lr: float = 20.0, weight_decay: float = 5e-7, ar: float = 0.0,
                 tar: float = 1e-3, alpha_dropout: bool = True, optimizer: str = "sgd"):
        super().__init__()
        self.optimizer_class = OPTIMIZERS[one_of("optimizer", optimizer, OPTIMIZERS)]
        self.bptt, self.lr, self.weight_decay, self.ar, self.tar, self.alpha_dropout = bptt, lr, weight_decay, ar, tar, alpha_dropout
        self.annealed = 1.0
        self.register_buffer("hidden_train", torch.zeros(batch_size, hidden_size))
        self.register_buffer("hidden_valid", torch.zeros(batch_size, hidden_size))

    def training_step(self, batch, batch_idx: int) -> dict:
        tokens, targets, stream = batch
        hidden = self.hidden_train if stream == TRAIN else self.hidden_valid
        with contextlib.nullcontext() if stream == TRAIN or self.alpha_dropout else without_dropout(self.model):
            nll, raw, dropped, after = self.model.loss(tokens, targets, hidden.clone())
        hidden.copy_(after.detach())
        if stream == VALID:
            return {"loss": nll, "data_loss": nll}
        return {"loss": nll + activation_regularisation(raw, dropped, self.ar, self.tar), "data_loss": nll}

    @torch.no_grad()
    def validation_step(self, batch, batch_idx: int) -> dict:
        """Logs "default": minus the nats per token without dropout, the reward of a strategy that samples cells (ENAS)."""
        tokens, targets, _ = batch
        with evaluating(self.model):
            nll, _, _, after = self.model.loss(tokens, targets, self.hidden_valid.clone())
        self.hidden_valid.copy_(after)
        self.log("default", -nll)
        return {"loss": nll, "data_loss": nll}

    def configure_optimizers(self):
        return self.optimizer_class(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)

    def on_train_epoch_start(self) -> None:
        self.hidden_train.zero_()  # the training text begins again
        self.hidden_valid.zero_()

    def on_train_batch_start(self, batch, batch_idx: int) -> None:
        # before the architecture step too, which unrolls the step of this very length
        tokens = training_tokens(batch)
        if tokens is None:
            return
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.lr * self.annealed * len(tokens) / self.bptt


class AnnealLR(pl.Callback):
    """Over the last `share` of the epochs the learning rate falls to 0 along a cosine, as with `callbacks.AnnealLR`.

    `batches`: those of the training, which know how many of this epoch's an earlier process trained.
    """

    def __init__(self, share: float, batches: TaggedBatches):
        self.share, self.batches = share, batches

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        epoch, skipped = self.batches.start
        skipped = skipped if trainer.current_epoch == epoch else 0
        done = (trainer.current_epoch + (skipped + batch_idx) / (skipped + trainer.num_training_batches)) / trainer.max_epochs
        getattr(pl_module, "training_module", pl_module).annealed = annealed(done, self.share)


class SupernetReport(pl.Callback):
    """After every epoch: validation perplexity of the supernet, α's entropy, speed; handed to `report` as a dictionary.

    `rows` keeps the dictionaries, `alphas` α (E, K) as lists of numbers, one for each epoch; epoch 0 is the untrained supernet. `genotype` is
    the cell that the last α stands for.
    With `folder`, search.csv, alpha.json and genotype.json there are brought up to date after each epoch.
    Raises `NotFinite` after an epoch that is hopeless (see `health`), and names a search that collapses.
    """

    def __init__(self, corpus: Corpus, recipe: SearchRecipe, report=None, folder: Path | None = None):
        self.corpus, self.recipe, self.report, self.folder = corpus, recipe, report or (lambda row: None), folder
        self.rows, self.alphas, self.counts = [], [], EpochCounts("search")
        self.genotype: Genotype | None = None

    def on_train_start(self, trainer, pl_module):
        if not self.rows:
            self._finish(trainer, pl_module, trainer.current_epoch, {})

    def on_train_epoch_start(self, trainer, pl_module):
        self.counts.begin()
        now, words = trainer.current_epoch, len(self.corpus.vocab)
        end = max(trainer.max_epochs, now + 1)  # -1, Lightning's word for no end, as with `max_steps`: this epoch is all that is known of
        self.worth = self.recipe.passes_of(now, end, words) / self.recipe.passes(now, words)  # of all that is to come, in epochs such as this: those with α take longer

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        tokens = training_tokens(batch)
        if tokens is None:
            return
        left = self.worth * trainer.num_training_batches - batch_idx - 1  # in batches of this epoch
        self.counts.add(tokens.numel(), outputs["data_loss"], trainer.max_epochs, left)
        if trainer.progress_bar_callback is not None and batch_idx % 10 == 0:
            pl_module.log("perplexity", torch.exp(self.counts.nats / self.counts.tokens), prog_bar=True, logger=False)

    def on_train_epoch_end(self, trainer, pl_module):
        seconds, trained = self.counts.seconds, perplexity_of(self.counts.loss)
        check_epoch(trained, len(self.corpus.vocab), "training")
        self._finish(trainer, pl_module, trainer.current_epoch + 1,
                     {"train_perplexity": trained, "tokens_per_second": self.counts.tokens / seconds, "seconds": seconds})

    def _finish(self, trainer, pl_module, epoch, trained):
        model = pl_module.training_module.model
        pl_module.resample()  # a strategy that samples cells has none yet before the first batch; the others do nothing
        value = perplexity(model, self.corpus.valid, self.recipe.eval_batch_size, self.recipe.bptt)
        check_epoch(value, len(self.corpus.vocab), "validation")
        row = {"default": value, "phase": "search", "epoch": epoch, "perplexity": value}
        mixed = [m for m in model.modules() if hasattr(m, "probabilities")]
        if mixed:
            self.genotype = mixed[0].genotype()
            self.alphas.append(mixed[0].alpha.detach().cpu().tolist())
            row |= watched_spread(mixed[0], "search", epoch)
        self.rows.append(row | trained)
        if self.folder is not None and mixed:
            write_json(self.folder / "alpha.json", {"primitives": list(mixed[0].primitives), "relaxation": mixed[0].relaxation,
                                                    "epochs": [r["epoch"] for r in self.rows], "alpha": self.alphas})
            write_text(self.folder / "genotype.json", self.genotype.to_json() + "\n")
            # last: an epoch whose metrics are there has its α and its cell there too, wherever Ctrl-C falls
            write_csv(self.folder / "search.csv", [{k: v for k, v in row.items() if k != "default"} for row in self.rows])
        self.report(self.rows[-1])


def search_evaluator(corpus: Corpus, recipe: SearchRecipe, seed: int = 0, report=None, folder: Path | None = None, callbacks=(),
                     **trainer_options) -> Lightning:
    """The evaluator of a search: `NasExperiment(DartsRnnSpace(…), search_evaluator(corpus, recipe), SecondOrderDARTS(…))`.

    α learns from `corpus.alpha`, or from the validation text where the corpus keeps no text apart for it. `report` gets a dictionary after
    every epoch and `folder` the files (see `SupernetReport`); `trainer_options` go to Lightning's `Trainer`.
    """
    module = LanguageModelModule(recipe.batch_size, recipe.hidden_size, recipe.bptt, recipe.lr, recipe.weight_decay, recipe.ar, recipe.tar,
                                 recipe.alpha_dropout, recipe.optimizer)
    # the number of batches differs from epoch to epoch, so Lightning has to count them again before each
    options = dict(max_epochs=recipe.epochs, logger=False, enable_checkpointing=False, enable_model_summary=False, num_sanity_val_steps=0,
                   limit_val_batches=0, reload_dataloaders_every_n_epochs=1) | trainer_options
    trainer = Trainer(callbacks=[SupernetReport(corpus, recipe, report, folder), *callbacks], **options)
    lengths = LengthRule(recipe.bptt, recipe.short_bptt_probability)
    train = TaggedBatches(BpttBatches(streams(corpus.train, recipe.batch_size), lengths, seed), TRAIN, lambda: trainer.current_epoch)
    valid = TaggedBatches(BpttBatches(streams(corpus.for_alpha, recipe.batch_size), lengths, seed + 1), VALID, lambda: trainer.current_epoch, train)
    if recipe.anneal:
        if options["max_epochs"] in (None, -1):
            raise ValueError(f"search.anneal: {recipe.anneal} of the epochs needs their number; give max_epochs, or a recipe with search.anneal=0")
        trainer.callbacks.append(AnnealLR(recipe.anneal, train))
    return Lightning(module, trainer, train_dataloaders=train, val_dataloaders=valid)
