"""Words and their ids."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

EOS, UNK = "<eos>", "<unk>"


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
        words = split_words(text if text.endswith("\n") or not text else text + "\n")
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


def split_words(text: str) -> list[str]:
    """Words between white space, `<eos>` for each line break."""
    return text.replace("\n", f" {EOS} ").split()
