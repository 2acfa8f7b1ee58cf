"""A corpus as fastai `DataLoaders`: streams of text side by side, read in batches of varying length. Batches are batch-first, (B, T)."""

from __future__ import annotations

import itertools
from pathlib import Path

from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from torch import Tensor

from .corpus import BpttBatches, Corpus, LengthRule, streams
from .model import choose_device
from .recipes import RetrainRecipe, SearchRecipe


class StreamLoader(DataLoader):
    """`BpttBatches` as a fastai DataLoader: (tokens (B, T), targets (B, T)), views on the stream, no collation and no workers.

    With `advance`, every pass after a whole one is the next epoch, with its own batch lengths. A pass that somebody breaks off, to look at a batch, changes
    nothing for another one, or for the next.
    """

    def __init__(self, batches: BpttBatches, vocab=(), advance: bool = False, device=None):
        super().__init__(batches, bs=None, device=device)
        self.vocab, self.advance, self.first = list(vocab), advance, 0

    def __iter__(self):
        epoch = self.dataset.epoch
        for tokens, targets in itertools.islice(self.dataset, self.first, None):
            yield tokens.t(), targets.t()
        self.first = 0
        if self.advance:
            self.dataset.set_epoch(epoch + 1)

    def __len__(self) -> int:
        return len(self.dataset) - self.first

    def go_on(self, epoch: int, batch: int) -> None:
        """The next pass is that epoch's, from that batch on; both are counted from 0."""
        self.dataset.set_epoch(epoch)
        self.first = batch

    @property
    def get_idxs(self):
        """There is none: `Learner.get_preds` is to leave streams in their order, along whichever axis it puts batches together."""
        raise AttributeError("get_idxs")

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)

    def to(self, device) -> None:
        self.device = device
        self.dataset.to(device)  # the whole text once, rather than each batch

    def new(self, dataset=None, cls=None, **kwargs) -> StreamLoader:
        """The same text again, or another `BpttBatches`, for one more reader; order and batches are the text's, so other arguments change nothing."""
        source = self.dataset if dataset is None else dataset
        return StreamLoader(BpttBatches(source.stream, source.rule, source.seed), self.vocab, device=self.device)


def already_trained(loader) -> int:
    """Batches of the epoch at hand that an earlier process trained. fastai's own loaders have none (and answer for what they lack with their text's attributes)."""
    return loader.first if isinstance(loader, StreamLoader) else 0


def language_dls(corpus: Corpus, recipe: SearchRecipe | RetrainRecipe, seed: int = 0, device="auto", path: str | Path = ".") -> DataLoaders:
    """Training text with the recipe's batch lengths, drawn from `seed` anew in each epoch, and validation text with its fixed length.

    For a SearchRecipe, `dls.arch` reads the text that α learns from. `dls.vocab` is the list of words.
    """
    device = choose_device(device)
    words = corpus.vocab.words

    def loader(tokens: Tensor, batch_size: int, lengths, seed: int = 0, advance: bool = False) -> StreamLoader:
        return StreamLoader(BpttBatches(streams(tokens, batch_size), lengths, seed, device), words, advance, device)

    if isinstance(recipe, SearchRecipe):
        lengths = LengthRule(recipe.bptt, recipe.short_bptt_probability)
    else:
        corpus = corpus.without_alpha()
        lengths = LengthRule(recipe.bptt, recipe.short_bptt_probability, recipe.bptt_std, recipe.min_bptt, recipe.bptt + recipe.max_bptt_above)
    dls = DataLoaders(loader(corpus.train, recipe.batch_size, lengths, seed, advance=True),
                      loader(corpus.valid, recipe.eval_batch_size, LengthRule(recipe.bptt)), path=path, device=device)
    if isinstance(recipe, SearchRecipe):
        dls.arch = loader(corpus.for_alpha, recipe.batch_size, lengths, seed + 1)
    return dls
