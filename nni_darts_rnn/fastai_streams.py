"""A corpus as fastai `DataLoaders`: streams of text are read side by side, in batches of varying length. Batches are batch-first, (B, T)."""

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
    """`BpttBatches` as a fastai DataLoader: it yields (tokens (B, T), targets (B, T)), views on the stream, without collation or workers.

    With `advance`, a pass that reaches its end makes the next pass the next epoch, which has batch lengths of its own. A pass that is broken off, for
    example to look at one batch, has no effect on any other pass.
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
        """Make the next pass begin at batch `batch` of epoch `epoch`, both counted from 0."""
        self.dataset.set_epoch(epoch)
        self.first = batch

    @property
    def get_idxs(self):
        """`AttributeError`: without this attribute `Learner.get_preds` does not reorder what it collects, along whichever axis it puts batches together."""
        raise AttributeError("get_idxs")

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)

    def to(self, device) -> None:
        self.device = device
        self.dataset.to(device)  # moves the whole text once, rather than each batch

    def new(self, dataset=None, cls=None, **kwargs) -> StreamLoader:
        """A loader of the same text, or of the `BpttBatches` `dataset`, for another reader. It starts with epoch 0 and does not advance. The text alone decides
        the order and the batches, so other arguments have no effect."""
        source = self.dataset if dataset is None else dataset
        return StreamLoader(BpttBatches(source.stream, source.rule, source.seed), self.vocab, device=self.device)


def already_trained(loader) -> int:
    """How many batches of the current epoch an earlier process has trained: 0 for fastai's own loaders. These are not asked for an attribute `first`, because
    they look up attributes that they lack in their dataset."""
    return loader.first if isinstance(loader, StreamLoader) else 0


def language_dls(corpus: Corpus, recipe: SearchRecipe | RetrainRecipe, seed: int = 0, device="auto", path: str | Path = ".") -> DataLoaders:
    """DataLoaders of the training text, in batch lengths that are drawn by the recipe and `seed` anew in each epoch, and of the validation text, in batches of
    `recipe.bptt` steps.

    For a SearchRecipe, `dls.arch` reads the text that α learns from. For a RetrainRecipe, the training text includes any part of it that was kept for α.
    `dls.vocab` is the list of words.
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
