"""Corpora by name or folder: vocabulary, token streams, and batches of consecutive text for truncated back-propagation.

Axes: T time steps of a batch, B streams read side by side, S tokens of a stream, V words of the vocabulary.
"""

from __future__ import annotations

import json
import math
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import download
from .genotype import did_you_mean

SPLITS = download.SPLITS
EOS, UNK = "<eos>", "<unk>"

PUBLISHED_COUNTS = {  # tokens of train, valid, test with one <eos> a line; words
    "penn": (929_589, 73_760, 82_430, 10_000),
    "wikitext-2": (2_088_628, 217_646, 245_569, 33_278),
    "wikitext-103": (103_227_021, 217_646, 245_569, 267_735),
}
NAMES = ("pydoc", *PUBLISHED_COUNTS)

_BLOCK = 1 << 20  # bytes read at once, and the longest word allowed
_ON_DISK = 64 << 20  # bytes of training text from which token ids are kept in the cache folder and mapped, not read, into memory
_SAME = 12  # words from which a paragraph of two topics counts as one repeated, not as a phrase such as "see also"
_MOST_WORDS = 4_000_000  # distinct; a softmax over more fits no machine


@dataclass(frozen=True)
class Vocabulary:
    """V distinct words; the id of a word is its position. `<eos>` and `<unk>` are among them. `ValueError` otherwise."""

    words: tuple[str, ...]
    index: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        words = tuple(self.words)
        index = {word: i for i, word in enumerate(words)}
        if len(index) < len(words):
            raise ValueError(f"vocabulary: {Counter(words).most_common(1)[0][0]!r} stands in it twice")
        if bad := [word for word in words if word.split() != [word]]:
            raise ValueError(f"vocabulary: {bad[0]!r} is no word; words are not empty and hold no white space")
        if EOS not in index or UNK not in index:
            raise ValueError(f"vocabulary: {EOS} and {UNK} must be among the words")
        object.__setattr__(self, "words", words)
        object.__setattr__(self, "index", _Known(index))

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> Tensor:
        """Ids (tokens,) of a text: words between white space, `<eos>` after each line, `<unk>` for words not in the vocabulary."""
        words = _split(text if text.endswith("\n") or not text else text + "\n")
        return torch.tensor([self.index[word] for word in words], dtype=torch.long)

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """The text of ids, with a line break for each `<eos>`. `ValueError` for a number that is no id."""
        ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        bad = [i for i in ids if not 0 <= i < len(self)]
        if bad:
            raise ValueError(f"vocabulary: {bad[0]} is no id; ids are 0 to {len(self) - 1}")
        return "".join("\n" if self.words[i] == EOS else self.words[i] + " " for i in ids).replace(" \n", "\n").rstrip(" ")

    def to_json(self) -> str:
        """A JSON list of the words in the order of their ids."""
        return json.dumps(self.words, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Vocabulary:
        """The inverse of `to_json`; `ValueError` for text that is no vocabulary."""
        try:
            words = json.loads(text)
        except ValueError as error:
            raise ValueError(f"vocabulary: not JSON ({error})") from None
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError("vocabulary: expected a JSON list of words")
        return cls(tuple(words))


class _Known(dict):
    """Word -> id, where words not in it have the id of `<unk>`; they are not added."""

    def __missing__(self, word: str) -> int:
        return self[UNK]


@dataclass
class Corpus:
    """Three token streams (tokens,) of dtype int64 and their vocabulary. `alpha`: the stream for the architecture; None: `valid`."""

    name: str
    vocab: Vocabulary
    train: Tensor
    valid: Tensor
    test: Tensor
    alpha: Tensor | None = None

    def describe(self) -> str:
        """One line: tokens of each split, words of the vocabulary."""
        splits = {"training": self.train, "α": self.alpha, "validation": self.valid, "test": self.test}
        return (f"{self.name}: " + ", ".join(f"{len(t):,} {name}" for name, t in splits.items() if t is not None)
                + f" tokens; {len(self.vocab):,} words")


def load_corpus(name_or_folder: str | Path, *, folder: str | Path | None = None, mirror: str | None = None,
                alpha_fraction: float = 0.0) -> Corpus:
    """A corpus by name (`NAMES`), or a folder with train.txt, valid.txt and test.txt (a `Path`, or "./penn", for one called as a name is).

    `pydoc` is the text of the running Python's own language reference. The others are read from `folder`, or downloaded once from
    the URL `mirror` (of a folder with the published files, or of an archive) into `download.cache_folder()`; they must be the
    published texts. `alpha_fraction` > 0 splits that last part of the training text off for the architecture parameters.
    Raises `ValueError` with one line that says what is wrong where, and what is allowed.
    """
    if isinstance(alpha_fraction, bool) or not isinstance(alpha_fraction, (int, float)) or not 0 <= alpha_fraction < 1:
        raise ValueError(f"alpha_fraction: {alpha_fraction!r} must be a number of at least 0 and below 1")
    if not isinstance(name_or_folder, (str, Path)) or not str(name_or_folder):
        raise ValueError(f"corpus {name_or_folder!r} must be a folder or one of {', '.join(NAMES)}")
    name = name_or_folder if isinstance(name_or_folder, str) else f"{name_or_folder}{os.sep}"
    path = Path(name).expanduser()
    if name not in PUBLISHED_COUNTS and (folder is not None or mirror is not None):
        raise ValueError(f"corpus {name!r}: folder and mirror are for {', '.join(PUBLISHED_COUNTS)}"
                         + did_you_mean(name, PUBLISHED_COUNTS))
    if name == "pydoc":
        corpus = _pydoc()
    elif name in PUBLISHED_COUNTS:
        corpus = _published(name, folder, mirror)
    elif os.path.isdir(path):
        corpus = _from_folder(path.resolve().name, path)
    elif os.path.exists(path):
        raise ValueError(f"corpus {name!r} is a file; give the folder that holds {', '.join(s + '.txt' for s in SPLITS)}")
    else:
        raise ValueError(f"corpus {name!r} is neither a folder nor one of {', '.join(NAMES)}" + did_you_mean(name, NAMES))
    if alpha_fraction:
        whole = corpus.train
        kept = len(whole) - round(len(whole) * alpha_fraction)
        if not 2 <= kept <= len(whole) - 2:
            raise ValueError(f"alpha_fraction: {alpha_fraction!r} of {len(whole)} training tokens leaves a part of fewer than two")
        corpus.train, corpus.alpha = whole[:kept], whole[kept:]
    return corpus


def _published(name: str, folder: str | Path | None, mirror: str | None) -> Corpus:
    cached = download.cache_folder() / name
    if folder is None and mirror is None and not cached.is_dir():
        raise ValueError(f"corpus {name!r} is not on this machine: give folder=, where its texts lie, or mirror=, a URL to download them from")
    if folder is not None:
        path = Path(folder).expanduser()
    else:
        path = cached if cached.is_dir() else download.fetch(name, str(mirror))
    corpus = _from_folder(name, path, published=True)
    found = (len(corpus.train), len(corpus.valid), len(corpus.test), len(corpus.vocab))
    for what, here, there in zip((*(f"{s} tokens" for s in SPLITS), "words"), found, PUBLISHED_COUNTS[name]):
        if here != there:
            raise ValueError(f"{path}: {here:,} {what}, but the published {name} has {there:,}; for a text of your own give its folder as the corpus")
    return corpus


def _from_folder(name: str, folder: Path, published: bool = False) -> Corpus:
    if not os.path.isdir(folder):
        raise ValueError(f"{folder}: {'a file, not a folder' if os.path.exists(folder) else 'no such folder'}; expected one that holds train.txt, "
                         "valid.txt and test.txt")
    try:
        paths = {split: download.find_text(folder, split) for split in SPLITS}
        for split, path in paths.items():
            if path is None:
                raise ValueError(f"{folder}: {split}.txt is missing; train.txt, valid.txt and test.txt are needed")
            if not path.is_file():
                raise ValueError(f"{path}: not a file; a text is expected")
        if published:
            download.check_texts(name, folder)
        if paths["train"].stat().st_size >= _ON_DISK:
            return _mapped(name, paths)
        return _encode(name, {split: _pieces(path) for split, path in paths.items()})
    except OSError as error:
        raise ValueError(f"{error.filename or folder}: cannot be read ({error.strerror or error})") from None


def _split(text: str) -> list[str]:
    return text.replace("\n", f" {EOS} ").split()


def _pieces(path: Path) -> Iterator[list[str]]:
    """The words of a UTF-8 file, about a megabyte of text at a time, with `<eos>` after each line, the last one included."""
    rest, done, last, some = b"", 0, b"\n", False

    def words(raw: bytes) -> list[str]:
        nonlocal some
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: byte {done + error.start} is not UTF-8 ({error.reason}); texts must be UTF-8") from None
        some = some or not text.isspace()
        return _split(text)

    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            last, block = block[-1:], rest + block
            cut = 1 + max(block.rfind(space) for space in (b" ", b"\n", b"\t"))  # 0 where there is none; never inside a character
            if len(block) - cut > _BLOCK:
                raise ValueError(f"{path}: a word of more than {_BLOCK:,} bytes at byte {done + cut}; is this text?")
            if cut:
                yield words(block[:cut])
            done, rest = done + cut, block[cut:]
    if last != b"\n":
        yield words(rest + b"\n")
    if not some:
        raise ValueError(f"{path}: no words in it; a text is expected")


class _Growing(dict):
    """Word -> id, where a new word gets the next id: ids are in the order of first appearance, whatever the hash seed."""

    def __missing__(self, word: str) -> int:
        self[word] = new = len(self)
        return new


def _ids(pieces: Iterable[list[str]], index: dict[str, int]) -> Iterator[array]:
    """The ids of each piece as 8-byte integers, so that no Python object is kept for a token."""
    for words in pieces:
        yield array("q", map(index.__getitem__, words))
        if len(index) > _MOST_WORDS:
            raise ValueError(f"the training text has more than {_MOST_WORDS:,} distinct words; put {UNK} for the rare ones first")


def _vocabulary(index: dict[str, int]) -> Vocabulary:
    return Vocabulary((*index, *(word for word in (EOS, UNK) if word not in index)))


def _encode(name: str, pieces: dict[str, Iterable[list[str]]]) -> Corpus:
    """The corpus of three texts, in memory. The vocabulary is the training text's."""
    index: dict[str, int] = _Growing()
    streams_, vocab = {}, None
    for split in SPLITS:
        ids = array("q")
        for piece in _ids(pieces[split], vocab.index if vocab else index):
            ids.extend(piece)
        streams_[split] = torch.from_numpy(np.frombuffer(ids, dtype=np.int64))
        vocab = vocab or _vocabulary(index)
    return Corpus(name, vocab, **streams_)


def _mapped(name: str, paths: dict[str, Path]) -> Corpus:
    """The corpus of three large texts as ids in files of the cache folder, mapped into memory: pages are read when they are used."""
    key = "-".join(download.digest(path)[:20] for path in paths.values())
    folder = download.cache_folder() / f"encoded-{key}"
    with download.made_once(folder) as new:
        if new:
            index: dict[str, int] = _Growing()
            vocab = None
            for split in SPLITS:
                with open(new / f"{split}.int64", "wb") as file:
                    for piece in _ids(_pieces(paths[split]), vocab.index if vocab else index):
                        piece.tofile(file)
                vocab = vocab or _vocabulary(index)
            (new / "words.json").write_text(vocab.to_json(), encoding="utf-8")
    vocab = Vocabulary.from_json((folder / "words.json").read_text(encoding="utf-8"))
    # Mode "c" (copy on write): torch wants memory it could write to, and the file stays as it is.
    return Corpus(name, vocab, *(torch.from_numpy(np.memmap(folder / f"{split}.int64", dtype=np.int64, mode="c")) for split in SPLITS))


def _pydoc() -> Corpus:
    """The language reference of the running Python: its version decides the text, and nothing else does. A paragraph is a line.

    Topics repeat each other's paragraphs. Those that share one go to training, so that no validation or test paragraph of more than a few
    words stands in the training text; of the others, taken by name, each split gets its share. Words seen once in training become `<unk>`.
    """
    from pydoc_data.topics import topics

    texts = {topic: [words for p in re.split(r"\n\s*\n", topics[topic]) if (words := _tokenise(p))] for topic in sorted(topics)}
    seen = Counter(p for paragraphs in texts.values() for p in {tuple(words) for words in paragraphs if len(words) >= _SAME})
    size = {topic: sum(len(words) + 1 for words in paragraphs) for topic, paragraphs in texts.items()}
    alone = [topic for topic in texts if all(seen[tuple(words)] < 2 for words in texts[topic])]

    part, free = 0.1 * sum(size.values()), sum(size[topic] for topic in alone)
    shares = {"train": 1 - 2 * part / free, "valid": part / free, "test": part / free}
    split_of, got, total = dict.fromkeys(texts, "train"), dict.fromkeys(SPLITS, 0), 0
    for topic in alone:
        total += size[topic]
        split = max(SPLITS, key=lambda s: shares[s] * total - got[s])  # the one that lags behind most: all reach over the alphabet
        got[split] += size[topic]
        split_of[topic] = split

    counts = Counter(word for topic in texts if split_of[topic] == "train" for words in texts[topic] for word in words)
    return _encode("pydoc", {split: [[word if counts[word] > 1 else UNK for word in words] + [EOS]
                                     for topic in texts if split_of[topic] == split for words in texts[topic]] for split in SPLITS})


def _tokenise(paragraph: str) -> list[str]:
    """Lower-case words (with inner hyphens and apostrophes), numbers as `N`, operators and other punctuation as tokens of their own."""
    text = re.sub(r"([^\w\s])\1{3,}", " ", paragraph.lower())  # lines under titles, frames of tables
    tokens = re.findall(r"[^\W\d](?:\w|[-'](?=[^\W\d]))*|\d(?:[\w.]*\w)?|::=|[.]{3}|->|\*\*|//|<<|>>|[=!<>:+*/%&|^-]=|\S", text)
    return ["N" if token[0].isdigit() else token for token in tokens]


def streams(tokens: Tensor, batch_size: int) -> Tensor:
    """(tokens,) as B = `batch_size` streams (S, B): column b is the b-th of B equal consecutive parts; what is over at the end is cut off.

    A view, not a copy. `ValueError` for a text of less than two tokens a stream.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size: {batch_size!r} must be a whole number of at least 1")
    if len(tokens) < 2 * batch_size:
        raise ValueError(f"batch_size: {batch_size} streams need a text of at least {2 * batch_size} tokens, this one has {len(tokens)}; "
                         "take fewer streams or more text")
    length = len(tokens) // batch_size
    return tokens[:length * batch_size].view(batch_size, length).t()


@dataclass(frozen=True)
class LengthRule:
    """How many time steps the next batch has: the whole part of N(`bptt`, `std`), of N(`bptt`/2, `std`) with `short_probability`,
    kept between `minimum` and `maximum`. `ValueError` for values that make no length."""

    bptt: int
    short_probability: float = 0.0
    std: float = 0.0
    minimum: int = 1
    maximum: float = math.inf

    def __post_init__(self):
        if not (math.isfinite(self.bptt) and self.bptt >= 1):
            raise ValueError(f"bptt: {self.bptt!r} must be at least 1")
        if not 0 <= self.short_probability <= 1:
            raise ValueError(f"short_probability: {self.short_probability!r} must be from 0 to 1")
        if not (math.isfinite(self.std) and self.std >= 0):
            raise ValueError(f"std: {self.std!r} must be at least 0")
        if not 1 <= self.minimum <= self.maximum:
            raise ValueError(f"minimum: {self.minimum!r} must be from 1 to the maximum, {self.maximum!r}")

    def draw(self, generator: np.random.Generator) -> int:
        mean = self.bptt / 2 if generator.random() < self.short_probability else self.bptt
        return int(min(max(int(generator.normal(mean, self.std)), self.minimum), self.maximum))


def fixed_length(bptt: int) -> LengthRule:
    """Always `bptt`."""
    return LengthRule(bptt)


def search_lengths(bptt: int, short_probability: float = 0.05) -> LengthRule:
    """`bptt`, or half of it with `short_probability` (quark0/darts `rnn/train_search.py`)."""
    return LengthRule(bptt, short_probability)


def retrain_lengths(bptt: int, short_probability: float = 0.05, std: float = 5.0, minimum: int = 5, maximum: float = math.inf) -> LengthRule:
    """N(`bptt`, `std`), or N(`bptt`/2, `std`) with `short_probability`, from `minimum` to `maximum` (quark0/darts `rnn/train.py`)."""
    return LengthRule(bptt, short_probability, std, minimum, maximum)


class Batch(NamedTuple):
    """Views on a stream, (T, B) each: `targets` are the tokens one step later."""

    tokens: Tensor
    targets: Tensor


class BpttBatches:
    """The batches of streams (S, B) for one epoch: consecutive, and each of the (S-1)·B targets in exactly one.

    The lengths of epoch e (`set_epoch`) come from a generator seeded with (`seed`, e) alone, so a resumed run has the same ones, and
    nothing else that draws random numbers changes them. Batches can also be taken by number, so a run can go on in the middle of an epoch.
    """

    def __init__(self, stream: Tensor, lengths: LengthRule, seed: int = 0, device: torch.device | str | None = None):
        if stream.dim() != 2 or len(stream) < 2 or not stream.shape[1]:
            raise ValueError(f"streams of shape {tuple(stream.shape)} hold no target; expected (S, B) with S of at least 2")
        self.stream = stream if device is None else stream.to(device)
        self.rule, self.seed = lengths, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the lengths of this epoch. An iterator already begun keeps its own."""
        generator = np.random.default_rng((self.seed, epoch))
        starts, targets = [0], len(self.stream) - 1
        while starts[-1] < targets:
            starts.append(min(starts[-1] + self.rule.draw(generator), targets))
        self.epoch, self._starts = epoch, starts

    @property
    def lengths(self) -> list[int]:
        """T of each batch of this epoch; they sum to S-1."""
        return [end - start for start, end in zip(self._starts, self._starts[1:])]

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, number: int) -> Batch:
        if not 0 <= number < len(self):
            raise IndexError(f"batch {number} of {len(self)}")
        return self._batch(self._starts, number)

    def _batch(self, starts: list[int], number: int) -> Batch:
        start, end = starts[number:number + 2]
        return Batch(self.stream[start:end], self.stream[start + 1:end + 1])

    def __iter__(self) -> Iterator[Batch]:
        starts = self._starts
        return (self._batch(starts, number) for number in range(len(starts) - 1))

    def to(self, device: torch.device | str) -> BpttBatches:
        """The same batches on another device; returns itself."""
        self.stream = self.stream.to(device)
        return self
