"""fastai `Learner`s: one that trains a genotype as a language model, one whose `fit` is a search.

Batches are batch-first as fastai's are: tokens and targets (B, T); logits (B, T, V); activations (B, T, H). Losses are nats per token.
"""

from __future__ import annotations

import contextlib
import random
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from fastai.callback.progress import ProgressCallback  # noqa: F401 (importing it puts the bar among fastai's default callbacks)
from fastai.callback.rnn import ModelResetter, RNNCallback
from fastai.callback.training import GradientClip
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import AvgLoss, AvgSmoothLoss, Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import Perplexity
from fastai.optimizer import OptimWrapper
from torch import Tensor, nn

from .callbacks import (
    NTASGD,
    ActivationRegularizer,
    ArchParamUpdate,
    BestModel,
    EpochReport,
    FiniteNumbers,
    MetricsCSV,
    PerplexityInBar,
    ScaleLRByLength,
    weight_parameters,
)
from .checkpoint import Checkpoints, Every
from .corpus import BpttBatches, Corpus, fixed_length, retrain_lengths, search_lengths, streams
from .cross_entropy import linear_cross_entropy
from .files import remove_partial
from .genotype import Genotype, load_genotype
from .health import name_poor, with_rollbacks
from .model import LanguageModel, choose_device, number_of_parameters, perplexity
from .recipes import Recipe, RetrainRecipe, SearchRecipe, get_recipe
from .retrain_checkpoints import ResumableLearner, RetrainCheckpoints
from .stopping import Stopped, Terminated, stop_requests
from .supernet import MixedRNN

__all__ = ["StatefulLM", "StreamLoader", "language_dls", "lm_learner", "search_learner", "retrain", "perplexity"]


class DeferredLogits:
    """In training, what logits are made of: dropped (T, B, H), and the decoder's weight (V, H) and bias (V).

    The loss takes them in row chunks, so the (T·B, V) logits, the largest tensor of a training step, are never kept.
    """

    def __init__(self, dropped: Tensor, weight: Tensor, bias: Tensor):
        self.dropped, self.weight, self.bias = dropped, weight, bias


class StatefulLM(nn.Module):
    """A `LanguageModel` (`lm`) as fastai wants it: tokens (B, T) -> decoded (B, T, V), raw and dropped (B, T, H), all views of time-major memory.

    In training `decoded` is `DeferredLogits`, which `SequenceLoss` knows.

    The hidden state (B, H) is a buffer outside the state dict, carried from batch to batch without its history; `reset()` makes it
    zero, and a batch of another B starts from zeros. `carried` names the buffers that belong to a stream of text and not to the model.
    """

    carried = ("hidden",)

    def __init__(self, lm: LanguageModel):
        super().__init__()
        self.lm = lm
        self.register_buffer("hidden", lm.init_hidden(1), persistent=False)

    def reset(self) -> None:
        self.hidden = torch.zeros_like(self.hidden)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.hidden if len(self.hidden) == len(tokens) else self.lm.init_hidden(len(tokens))
        raw, dropped = self.lm.encode(tokens.t(), hidden)  # (T, B, H) each
        self.hidden = raw[-1].detach().clone()  # a new tensor: the old one may be in a graph, and a view would keep all of `raw`
        decoder = self.lm.decoder
        decoded = DeferredLogits(dropped, decoder.weight, decoder.bias) if self.training else decoder(dropped).transpose(0, 1)
        return decoded, raw.transpose(0, 1), dropped.transpose(0, 1)

    def genotype(self) -> Genotype:
        """The cell: the genotype itself, or the one that a supernet's α stands for."""
        cell = self.lm.rnn.genotype
        return cell() if callable(cell) else cell


class SequenceLoss(CrossEntropyLossFlat):
    """fastai's cross-entropy, flattened time first: `StatefulLM`'s logits are then not copied, and sums run as in `LanguageModel.loss`."""

    def __call__(self, decoded: Tensor | DeferredLogits, targets: Tensor, **kwargs) -> Tensor:
        if isinstance(decoded, DeferredLogits):
            return linear_cross_entropy(decoded.dropped.flatten(0, 1), decoded.weight, decoded.bias, targets.t().flatten())  # (T·B, H), (T·B)
        if self.reduction != "mean":
            return super().__call__(decoded, targets, **kwargs)  # somebody wants the losses one by one, batch first
        return F.cross_entropy(decoded.transpose(0, 1).flatten(0, 1), targets.t().flatten())


class TokenLoss(AvgLoss):
    """Mean loss over tokens. fastai's `AvgLoss` takes the mean over batches, however short the last one is. Sums are kept in float64."""

    def accumulate(self, learn):
        n = learn.yb[0].numel()
        self.total += float(learn.loss.detach().mean()) * n
        self.count += n


class SmoothLoss(AvgSmoothLoss):
    """fastai's smoothed loss as a plain number. fastai keeps a tensor for every step, between which the heap cannot be given back: memory was
    measured to grow by 0.3 MB a step."""

    def reset(self):
        self.count, self.val = 0, 0.0

    def accumulate(self, learn):
        self.count += 1
        self.val = (1 - self.beta) * float(learn.loss.detach().mean()) + self.beta * self.val

    @property
    def value(self):
        return np.float64(self.val / (1 - self.beta**self.count))  # with the `item()` that fastai's progress bar asks for


class TokenPerplexity(Perplexity):
    """fastai's `Perplexity` over tokens: exp(nats per predicted token)."""

    def accumulate(self, learn):
        TokenLoss.accumulate(self, learn)

    @property
    def value(self):
        return float(torch.exp(torch.tensor(self.total / self.count, dtype=torch.float64))) if self.count else None


class StreamLoader(DataLoader):
    """`BpttBatches` as a fastai DataLoader: (tokens (B, T), targets (B, T)), views on the stream, no collation and no workers.

    With `advance`, every pass is the next epoch, with its own batch lengths.
    """

    def __init__(self, batches: BpttBatches, vocab=(), advance: bool = False, device=None):
        super().__init__(batches, bs=None, device=device)
        self.vocab, self.advance, self.first = list(vocab), advance, 0

    def __iter__(self):
        try:
            for number in range(self.first, len(self.dataset)):
                tokens, targets = self.dataset[number]
                yield tokens.t(), targets.t()
        finally:
            self.first = 0
            if self.advance:
                self.dataset.set_epoch(self.dataset.epoch + 1)

    def __len__(self) -> int:
        return len(self.dataset) - self.first

    def go_on(self, epoch: int, batch: int) -> None:
        """The next pass is that epoch's, from that batch on; both are counted from 0."""
        self.dataset.set_epoch(epoch)
        self.first = batch

    def get_idxs(self) -> list[int]:
        """The order of `Learner.get_preds(concat_dim=1)`, whose first axis is B: streams keep theirs."""
        return list(range(self.dataset.stream.shape[1]))

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)

    def to(self, device) -> None:
        self.device = device
        self.dataset.to(device)  # the whole text once, rather than each batch

    def new(self, dataset=None, cls=None, **kwargs) -> StreamLoader:
        """The same text again, for one more reader; order and batches are the text's, so other arguments change nothing."""
        source = self.dataset
        return StreamLoader(BpttBatches(source.stream, source.rule, source.seed), self.vocab, device=self.device)


def torch_device(name: str | torch.device | None = "auto") -> torch.device:
    """"auto" or None: CUDA where torch finds it, else the CPU; "gpu" is "cuda"."""
    if name in (None, "auto", "gpu"):
        return choose_device(name or "auto")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {name} was asked for, but torch finds no CUDA device; use auto or cpu")
    return device


def language_dls(corpus: Corpus, recipe: SearchRecipe | RetrainRecipe, seed: int = 0, device="auto", path: str | Path = ".") -> DataLoaders:
    """Training text with the recipe's batch lengths, drawn from `seed` anew in each epoch, and validation text with its fixed length.

    For a SearchRecipe, `dls.arch` reads the text that α learns from. `dls.vocab` is the list of words.
    """
    device = torch_device(device)
    words = corpus.vocab.words

    def loader(tokens: Tensor, batch_size: int, lengths, seed: int = 0, advance: bool = False) -> StreamLoader:
        return StreamLoader(BpttBatches(streams(tokens, batch_size), lengths, seed, device), words, advance, device)

    if isinstance(recipe, SearchRecipe):
        lengths = search_lengths(recipe.bptt, recipe.short_bptt_probability)
    else:
        lengths = retrain_lengths(recipe.bptt, recipe.short_bptt_probability, recipe.bptt_std, recipe.min_bptt, recipe.bptt + recipe.max_bptt_above)
    dls = DataLoaders(loader(corpus.train, recipe.batch_size, lengths, seed, advance=True),
                      loader(corpus.valid, recipe.eval_batch_size, fixed_length(recipe.bptt)), path=path, device=device)
    if isinstance(recipe, SearchRecipe):
        held_out = corpus.valid if corpus.alpha is None else corpus.alpha
        dls.arch = loader(held_out, recipe.batch_size, lengths, seed + 1)
    return dls


def _learner(dls, lm: LanguageModel, recipe, path, cbs, metrics_file: str | None, **kwargs) -> Learner:
    """What both learners share: SGD, hidden state, AR/TAR, clipping, learning rate × length, perplexity, CSV."""
    steps = getattr(dls.train, "seq_len", recipe.bptt)  # fastai's own loaders have a fixed length, which then is the usual one
    own = [ModelResetter(), RNNCallback(), ActivationRegularizer(alpha=recipe.ar, beta=recipe.tar), ScaleLRByLength(steps)]
    if recipe.clip is not None:
        own.append(GradientClip(recipe.clip))
    own.append(FiniteNumbers())
    if metrics_file is not None:
        own.append(MetricsCSV(metrics_file))
    learn = ResumableLearner(dls, StatefulLM(lm), loss_func=SequenceLoss(), opt_func=partial(OptimWrapper, opt=torch.optim.SGD), lr=recipe.lr,
                             wd=recipe.weight_decay, metrics=TokenPerplexity(), path=path, cbs=[*own, *cbs], **kwargs)
    learn.recorder.loss, learn.recorder.smooth_loss = TokenLoss(), SmoothLoss()
    return learn


def _dropouts(recipe) -> dict[str, float]:
    return {name: getattr(recipe, name) for name in ("dropout", "dropout_i", "dropout_e")}


def _vocab_size(dls, vocab_size: int | None) -> int:
    if vocab_size is None:
        vocab = getattr(dls, "vocab", None)
        if vocab is None:
            raise ValueError("the DataLoaders have no vocab: give vocab_size")
        return len(vocab)
    return vocab_size


def lm_learner(dls, genotype: Genotype | str | LanguageModel, recipe: RetrainRecipe | Recipe | str = "penn", *, seed: int = 0,
               path: str | Path | None = None, cbs=(), vocab_size: int | None = None, metrics_file: str | None = "history.csv") -> Learner:
    """A Learner that trains the genotype's cell as a tied AWD language model by the recipe, up to `learn.fit(recipe.epochs)`.

    `dls`: from `language_dls`, or any fastai language-model DataLoaders. `genotype` and `recipe` may be names; a `LanguageModel` in the place
    of a genotype is trained as it is, with its own size and dropout rates. After `fit` the model is the best one on validation (averaged
    weights, once NT-ASGD averages); it is also in `path/models/best.pth`, metrics in `path/history.csv`.
    torch's random state is set to `seed` before the model is made.
    """
    recipe = recipe if isinstance(recipe, RetrainRecipe) else get_recipe(recipe).retrain
    if not isinstance(genotype, LanguageModel):
        genotype, V = load_genotype(genotype), _vocab_size(dls, vocab_size)
    torch.manual_seed(seed)
    lm = genotype if isinstance(genotype, LanguageModel) else LanguageModel.from_genotype(
        V, recipe.hidden_size, genotype, dropout_h=recipe.dropout_h, dropout_x=recipe.dropout_x, **_dropouts(recipe))
    averaging = NTASGD(recipe.nonmono)
    learn = _learner(dls, lm, recipe, path, [BestModel(), averaging, *cbs], metrics_file)
    if recipe.patience is not None:
        learn.converged = lambda: averaging.since_best() >= recipe.patience
    return learn


def search_learner(dls, recipe: SearchRecipe | Recipe | str = "penn", *, seed: int = 0, valid_batches=None, path: str | Path | None = None, cbs=(),
                   vocab_size: int | None = None, metrics_file: str | None = "search.csv") -> Learner:
    """A Learner whose `fit(recipe.epochs)` is the search: the supernet's weights learn the training text, α the validation text.

    `valid_batches` are what α learns from: by default `dls.arch`, or the validation text in batches of the training batch size.
    `learn.genotype()` is the cell that α stands for. torch's random state is set to `seed` before the model is made.
    """
    recipe = recipe if isinstance(recipe, SearchRecipe) else get_recipe(recipe).search
    if valid_batches is None:
        valid_batches = dls.arch if "arch" in vars(dls) else dls.valid.new(bs=dls.train.bs)
    V = _vocab_size(dls, vocab_size)
    torch.manual_seed(seed)
    rnn = MixedRNN(recipe.hidden_size, recipe.hidden_size, recipe.n_nodes, dropout_x=recipe.dropout_x, dropout_h=recipe.dropout_h,
                   relaxation=recipe.relaxation)
    lm = LanguageModel(V, rnn, **_dropouts(recipe))
    return _learner(dls, lm, recipe, path, [ArchParamUpdate.of(recipe, valid_batches), *cbs], metrics_file, splitter=weight_parameters)


def retrain(corpus: Corpus, genotype: Genotype | str, recipe: RetrainRecipe, seed: int = 0, folder: str | Path = ".", report=None,
            progress: bool = False, device="auto", store: Checkpoints | None = None) -> dict:
    """Trains the genotype from scratch for `recipe.epochs` and measures the best model.

    `report` gets a dictionary after every epoch (see `EpochReport`), and `folder`/retrain.csv all of them. With `store` the training keeps itself
    there and goes on from what is there. Returns valid_perplexity, test_perplexity, parameters, seconds, epochs (trained), model (the best
    `LanguageModel`), learner, and `ended_by`: None, or what ended it early and is for the caller to raise once the best model so far is safe:
    `KeyboardInterrupt` after Ctrl-C (the step that ran is finished and kept), `FloatingPointError` where the numbers went wrong again and again.
    Where there is no best model yet these are raised here; so is `Terminated`, after SIGTERM.
    """
    last: list[tuple[Learner, RetrainCheckpoints]] = []

    def once(state: dict | None, factor: float) -> None:
        random.seed(seed)  # torch's generator is `lm_learner`'s affair
        np.random.seed(seed)
        reporter = EpochReport(report, "retrain", Path(folder) / "retrain.csv")
        learn = lm_learner(language_dls(corpus, recipe, seed, device, path=folder), genotype, recipe, seed=seed, metrics_file=None, cbs=[reporter])
        keeper = RetrainCheckpoints(store, state, stop, len(corpus.vocab))
        learn.add_cb(keeper)
        last[:] = [(learn, keeper)]
        with contextlib.ExitStack() as quiet:
            if progress:
                learn.add_cb(PerplexityInBar())
            else:
                quiet.enter_context(learn.no_bar())
                quiet.enter_context(learn.no_logging())
            learn.fit(recipe.epochs, lr=recipe.lr * factor)

    ended_by: BaseException | None = None
    with contextlib.ExitStack() as stack:
        if store is None:
            store = Checkpoints(stack.enter_context(tempfile.TemporaryDirectory()), "retrain", {}, Every())
        stop = stack.enter_context(stop_requests())
        try:
            with_rollbacks(store, "retrain", recipe.epochs, once)
        except Stopped as stopped:
            ended_by = stopped.leave()
        except (KeyboardInterrupt, FloatingPointError) as error:
            ended_by = error
        if ended_by is not None and (not last or last[0][0].best_model.last_saved_path is None or isinstance(ended_by, Terminated)):
            raise ended_by
    learn, keeper = last[0]
    if ended_by is not None:
        learn.best_model.after_fit()  # the best so far
    best = learn.best_model.last_saved_path
    best.unlink()  # it has been loaded; the caller keeps the model in a form of its own
    remove_partial(best.parent)
    with contextlib.suppress(OSError):  # something else of the caller's lies there
        best.parent.rmdir()
    model, rows = learn.model.lm, learn.epoch_report.rows
    value = perplexity(model, corpus.valid, recipe.eval_batch_size, recipe.bptt)
    name_poor("retrain", value, len(corpus.vocab))
    return {"valid_perplexity": value,
            "test_perplexity": perplexity(model, corpus.test, recipe.test_batch_size, recipe.bptt),
            "parameters": number_of_parameters(model), "seconds": keeper.seconds, "epochs": len(rows), "rows": rows,
            "model": model, "learner": learn, "ended_by": ended_by}
