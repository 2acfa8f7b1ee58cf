"""The Lightning evaluator with which NNI's one-shot strategies train the supernet of the language model."""

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

TRAIN, VALID = 0, 1  # the stream that a batch comes from; each stream has a hidden state of its own


class TaggedBatches:
    """Batches with the stream that they come from: (tokens (T, B), targets (T, B), stream).

    `epoch()` is the epoch whose lengths are drawn. It is asked for every length and every iteration, so that a resumed trainer gets the right ones.
    `no_longer_than`: other batches, beside which these are read; an epoch has at most as many of these.
    `start` (epoch, batch): where a resumed run goes on. That epoch begins with that batch, and is as long as that of `no_longer_than`.
    """

    def __init__(self, batches: BpttBatches, stream: int, epoch=lambda: 0, no_longer_than: TaggedBatches | None = None):
        self.batches, self.stream, self.epoch, self.no_longer_than = batches, stream, epoch, no_longer_than
        self.start = (-1, 0)

    def _range(self) -> range:
        """Numbers of the batches to come. Beyond the last batch they begin with the first one again."""
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
    """The tokens (T, B) of a batch that the weights learn from, for any of NNI's one-shot strategies; None for a batch of α alone."""
    if isinstance(batch, dict):  # the DARTS family: both streams at once
        return batch["train"][0]
    if len(batch) == 2:  # ENAS: one stream, with its name
        return batch[0][0] if batch[1] == "train" else None
    return batch[0]


@nni.trace
class LanguageModelModule(LightningModule):
    """Trains a `DartsRnnSpace` or its supernet: by SGD or Adam (`optimizer`), with the learning rate × length/bptt, AR/TAR, and hidden states carried on.

    A batch is (tokens (T, B), targets (T, B), stream), the stream `TRAIN` or `VALID`. The hidden states of both streams are buffers, so Lightning's
    checkpoints have them. `training_step` returns "loss" (nats per token, for the training stream plus AR/TAR) and "data_loss" (without these).
    `alpha_dropout`: whether dropout acts in the loss of the VALID stream, from which α learns. `annealed`: a factor of the learning rate, which
    `AnnealLR` sets.
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
        """Logs "default", the reward of a strategy that samples cells (ENAS): minus the nats per token, without dropout."""
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
        # here, before the architecture step, which unrolls a step with this rate
        tokens = training_tokens(batch)
        if tokens is None:
            return
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.lr * self.annealed * len(tokens) / self.bptt


class AnnealLR(pl.Callback):
    """Over the last `share` of the epochs the learning rate falls to 0 along a cosine, as with `callbacks.AnnealLR`.

    `batches`: those of the training stream; in a resumed run they know how many of this epoch an earlier process has trained.
    """

    def __init__(self, share: float, batches: TaggedBatches):
        self.share, self.batches = share, batches

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        epoch, skipped = self.batches.start
        skipped = skipped if trainer.current_epoch == epoch else 0
        done = (trainer.current_epoch + (skipped + batch_idx) / (skipped + trainer.num_training_batches)) / trainer.max_epochs
        getattr(pl_module, "training_module", pl_module).annealed = annealed(done, self.share)


class SupernetReport(pl.Callback):
    """After every epoch, a dictionary for `report`: validation perplexity of the supernet, entropy of α, speed.

    `rows` keeps these dictionaries, and `alphas` α (E, K) of every epoch as lists of numbers; epoch 0 is the untrained supernet. `genotype` is
    the cell of the last α. With `folder`, search.csv, alpha.json and genotype.json there are written anew after each epoch.
    Raises `NotFinite` after a hopeless epoch, and warns of a search that collapses (see `health`).
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
        self.end = end = max(trainer.max_epochs, now + 1)  # Lightning says -1 for no end (also with `max_steps`): then only this epoch is known
        self.worth = self.recipe.passes_of(now, end, words) / self.recipe.passes(now, words)  # the work to come, in epochs like this one: epochs that move α take longer

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        tokens = training_tokens(batch)
        if tokens is None:
            return
        left = self.worth * trainer.num_training_batches - batch_idx - 1  # in batches of this epoch
        self.counts.add(tokens.numel(), outputs["data_loss"], self.end, left)
        if trainer.progress_bar_callback is not None and batch_idx % 10 == 0:
            pl_module.log("perplexity", torch.exp(self.counts.nats / self.counts.tokens), prog_bar=True, logger=False)

    def on_train_epoch_end(self, trainer, pl_module):
        seconds, trained = self.counts.seconds, perplexity_of(self.counts.loss)
        check_epoch(trained, len(self.corpus.vocab), "training")
        self._finish(trainer, pl_module, trainer.current_epoch + 1,
                     {"train_perplexity": trained, "tokens_per_second": self.counts.tokens / seconds, "seconds": seconds})

    def _finish(self, trainer, pl_module, epoch, trained):
        model = pl_module.training_module.model
        pl_module.resample()  # a strategy that samples cells has no cell before the first batch; others do nothing here
        value = perplexity(model, self.corpus.valid, self.recipe.eval_batch_size, self.recipe.bptt)
        check_epoch(value, len(self.corpus.vocab), "validation" if trained else "untrained supernet's validation")
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
            # last, so that an epoch whose metrics are on disk has its α and its cell there too, whenever Ctrl-C comes
            write_csv(self.folder / "search.csv", [{k: v for k, v in row.items() if k != "default"} for row in self.rows])
        self.report(self.rows[-1])


def search_evaluator(corpus: Corpus, recipe: SearchRecipe, seed: int = 0, report=None, folder: Path | None = None, callbacks=(),
                     **trainer_options) -> Lightning:
    """The evaluator of a search: `NasExperiment(DartsRnnSpace(…), search_evaluator(corpus, recipe), SecondOrderDARTS(…))`.

    α learns from `corpus.alpha`, or from the validation text where the corpus sets no text aside for α. After every epoch `report` gets a dictionary
    and `folder` the files (see `SupernetReport`). `trainer_options` go to Lightning's `Trainer`.
    """
    module = LanguageModelModule(recipe.batch_size, recipe.hidden_size, recipe.bptt, recipe.lr, recipe.weight_decay, recipe.ar, recipe.tar,
                                 recipe.alpha_dropout, recipe.optimizer)
    # epochs differ in their number of batches, so Lightning has to count them before each
    options = dict(max_epochs=recipe.epochs, logger=False, enable_checkpointing=False, enable_model_summary=False, num_sanity_val_steps=0,
                   limit_val_batches=0, reload_dataloaders_every_n_epochs=1) | trainer_options
    trainer = Trainer(callbacks=[SupernetReport(corpus, recipe, report, folder), *callbacks], **options)
    lengths = LengthRule(recipe.bptt, recipe.short_bptt_probability)
    train = TaggedBatches(BpttBatches(streams(corpus.train, recipe.batch_size), lengths, seed), TRAIN, lambda: trainer.current_epoch)
    valid = TaggedBatches(BpttBatches(streams(corpus.for_alpha, recipe.batch_size), lengths, seed + 1), VALID, lambda: trainer.current_epoch, train)
    if recipe.anneal:
        if options["max_epochs"] in (None, -1):
            raise ValueError(f"search.anneal: the learning rate falls over the last {recipe.anneal} of all epochs, whose number is not known; give max_epochs, or a recipe with search.anneal=0")
        trainer.callbacks.append(AnnealLR(recipe.anneal, train))
    return Lightning(module, trainer, train_dataloaders=train, val_dataloaders=valid)
