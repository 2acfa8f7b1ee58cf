"""Load a corpus by name or from a folder. Texts are read and encoded; large ones are mapped into memory. Vocabulary and batches are re-exported here."""

from __future__ import annotations

import codecs
import os
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .checks import did_you_mean, fraction
from .files import at_home, cache_folder
from .text import download
from .text.batches import Batch, BpttBatches, LengthRule, streams
from .text.pydoc_text import pydoc_splits
from .text.vocabulary import EOS, UNK, Vocabulary, split_words

__all__ = ["EOS", "NAMES", "UNK", "Batch", "BpttBatches", "Corpus", "LengthRule", "Vocabulary", "load_corpus", "streams"]

SPLITS = download.SPLITS

PUBLISHED_COUNTS = {  # tokens of train, valid and test, with one <eos> a line; words of the vocabulary
    "penn": (929_589, 73_760, 82_430, 10_000),
    "wikitext-2": (2_088_628, 217_646, 245_569, 33_278),
    "wikitext-103": (103_227_021, 217_646, 245_569, 267_735),
}
NAMES = ("pydoc", *PUBLISHED_COUNTS)

_BLOCK = 1 << 20  # bytes: how many are read at once, and the longest word allowed
_ON_DISK = 64 << 20  # bytes: from this size of the training text on, token ids are files in the cache folder, mapped into memory instead of read
_MOST_WORDS = 4_000_000  # distinct words; no machine has memory for a softmax over more


@dataclass
class Corpus:
    """Three token streams (tokens,) of dtype int64, and their vocabulary. `alpha` is the stream that the architecture learns from; if it is None, `valid` is.
    `undivided` is the whole training text, where `train` and `alpha` are its two parts."""

    name: str
    vocab: Vocabulary
    train: Tensor
    valid: Tensor
    test: Tensor
    alpha: Tensor | None = None
    undivided: Tensor | None = None

    @property
    def for_alpha(self) -> Tensor:
        """The stream that the architecture learns from: `alpha`, or `valid` if `alpha` is None."""
        return self.valid if self.alpha is None else self.alpha

    def without_alpha(self) -> Corpus:
        """The corpus with its whole training text, for phases that have no α, such as retraining."""
        return self if self.undivided is None else replace(self, train=self.undivided, alpha=None, undivided=None)

    def describe(self) -> str:
        """One line with the number of tokens of each split and of words in the vocabulary."""
        splits = {"training": self.train, "α": self.alpha, "validation": self.valid, "test": self.test}
        return (f"{self.name}: " + ", ".join(f"{len(t):,} {name}" for name, t in splits.items() if t is not None)
                + f" tokens; {len(self.vocab):,} words")


def load_corpus(name_or_folder: str | Path, *, folder: str | Path | None = None, mirror: str | None = None,
                alpha_fraction: float = 0.0) -> Corpus:
    """Load a corpus by its name (one of `NAMES`), or from a folder that holds train.txt, valid.txt and test.txt.

    A folder that has the name of a corpus is given as a `Path`, or as "./penn". `pydoc` is the text of the running Python's own language reference. The
    other named corpora must be the published texts. They are read from `folder`, or downloaded once into `files.cache_folder("corpora")` from the URL
    `mirror`, which is a folder of the published files or an archive. `alpha_fraction` > 0 sets that last part of the training text aside for the
    architecture parameters; a retraining still gets the whole text.
    Raises `ValueError` with one line that says what is wrong, where, and what is allowed.
    """
    fraction("alpha_fraction", alpha_fraction)
    if not isinstance(name_or_folder, (str, Path)) or not str(name_or_folder):
        raise ValueError(f"corpus {name_or_folder!r} must be a folder or one of {', '.join(NAMES)}")
    name = name_or_folder if isinstance(name_or_folder, str) else f"{name_or_folder}{os.sep}"
    path = at_home(name, "corpus")
    if name not in PUBLISHED_COUNTS and (folder is not None or mirror is not None):
        raise ValueError(f"corpus {name!r}: folder and mirror are for {', '.join(PUBLISHED_COUNTS)}"
                         + did_you_mean(name, PUBLISHED_COUNTS))
    if name == "pydoc":
        corpus = _encode("pydoc", pydoc_splits())
    elif name in PUBLISHED_COUNTS:
        corpus = _published(name, folder, mirror)
    elif os.path.isdir(path):
        corpus = _from_folder(os.fsencode(path.resolve().name).decode("utf-8", "backslashreplace"), path)  # a name that can be printed, also if it is not UTF-8
    elif os.path.exists(path):
        raise ValueError(f"corpus {name!r} is a file; give the folder that holds {', '.join(s + '.txt' for s in SPLITS)}")
    else:
        hint = did_you_mean(name, NAMES) or (f"; looked for in {os.getcwd()}" if len(name) < 256 else "")
        raise ValueError(f"corpus {name!r} is neither a folder nor one of {', '.join(NAMES)}{hint}")
    if alpha_fraction:
        whole = corpus.train
        kept = len(whole) - round(len(whole) * alpha_fraction)
        if not 2 <= kept <= len(whole) - 2:
            raise ValueError(f"alpha_fraction: {alpha_fraction!r} of {len(whole)} training tokens leaves a part of fewer than two")
        corpus.train, corpus.alpha, corpus.undivided = whole[:kept], whole[kept:], whole
    return corpus


def _published(name: str, folder: str | Path | None, mirror: str | None) -> Corpus:
    cached = cache_folder("corpora") / name
    if folder is None and mirror is None and not cached.is_dir():
        raise ValueError(f"corpus {name!r} is not on this machine: give folder= (--corpus-folder), where its texts lie, or mirror= (--corpus-mirror), a URL to download them from")
    if folder is not None:
        path = at_home(folder, "folder (--corpus-folder)")
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
                also = f" (or {' or '.join(download.names(split)[1:])})" if published else ""
                raise ValueError(f"{folder}: {split}.txt{also} is missing; train.txt, valid.txt and test.txt are needed")
            if not path.is_file():
                raise ValueError(f"{path}: not a file; a text is expected")
        if published:
            download.check_texts(name, folder)
        if paths["train"].stat().st_size >= _ON_DISK:
            return _mapped(name, paths)
        return _encode(name, {split: _pieces(path) for split, path in paths.items()})
    except OSError as error:
        raise ValueError(f"{error.filename or folder}: cannot be read ({error.strerror or error})") from None


def _pieces(path: Path) -> Iterator[list[str]]:
    """The words of a UTF-8 file, in pieces of about a megabyte of text, with `<eos>` after each line, also after a last line without a line break."""
    rest, done, last, some = b"", 0, b"\n", False

    def words(raw: bytes) -> list[str]:
        nonlocal some
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: byte {done + error.start} is not UTF-8 ({error.reason}); texts must be UTF-8") from None
        some = some or not text.isspace()
        return split_words(text)

    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            last, block = block[-1:], rest + block
            if not done and block.startswith(codecs.BOM_UTF8):  # the three bytes that some editors begin a file with; no part of a word
                done, block = len(codecs.BOM_UTF8), block[len(codecs.BOM_UTF8):]
            cut = 1 + max(block.rfind(space) for space in (b" ", b"\n", b"\t"))  # 0 if there is no white space; a cut never splits a character
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
    """Word -> id. A new word gets the next id, so ids are in the order of first appearance, whatever the hash seed."""

    def __missing__(self, word: str) -> int:
        self[word] = new = len(self)
        return new


def _ids(pieces: Iterable[list[str]], index: dict[str, int]) -> Iterator[array]:
    """The ids of each piece, as 8-byte integers in an `array`: a Python object for each token would take too much memory."""
    for words in pieces:
        yield array("q", map(index.__getitem__, words))
        if len(index) > _MOST_WORDS:
            raise ValueError(f"the training text has more than {_MOST_WORDS:,} distinct words; put {UNK} for the rare ones first")


def _vocabulary(index: dict[str, int]) -> Vocabulary:
    return Vocabulary((*index, *(word for word in (EOS, UNK) if word not in index)))


def _encode(name: str, pieces: dict[str, Iterable[list[str]]]) -> Corpus:
    """The corpus of three texts, held in memory. Its vocabulary is that of the training text, with `<eos>` and `<unk>`."""
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
    """The corpus of three large texts. Their ids are files in the cache folder, mapped into memory: a page is read from disk when it is first used."""
    key = "-".join(download.digest(path)[:20] for path in paths.values())
    folder = cache_folder("corpora") / f"encoded-2-{key}"  # 2: the version of the rules that cut texts into words
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
    # Mode "c" (copy on write): torch wants writable memory, and the file must not change.
    return Corpus(name, vocab, *(torch.from_numpy(np.memmap(folder / f"{split}.int64", dtype=np.int64, mode="c")) for split in SPLITS))
