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
    """V distinct words without white space, among them `<eos>` and `<unk>`. The id of a word is its position. `ValueError` for other words."""

    words: tuple[str, ...]
    index: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        words = tuple(self.words)
        index = {word: i for i, word in enumerate(words)}
        if len(index) < len(words):
            raise ValueError(f"vocabulary: {Counter(words).most_common(1)[0][0]!r} occurs more than once")
        if bad := [word for word in words if word.split() != [word]]:
            raise ValueError(f"vocabulary: {bad[0]!r} is not a word; words are not empty and hold no white space")
        if EOS not in index or UNK not in index:
            raise ValueError(f"vocabulary: {EOS} and {UNK} must be among the words")
        object.__setattr__(self, "words", words)
        object.__setattr__(self, "index", _Known(index))

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> Tensor:
        """The ids (tokens,) of a text. Words are separated by white space; `<eos>` follows each line, and a word not in the vocabulary becomes `<unk>`."""
        words = split_words(text if text.endswith("\n") or not text else text + "\n")
        return torch.tensor([self.index[word] for word in words], dtype=torch.long)

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """The text of ids, with a line break for each `<eos>`. `ValueError` for a number that is not an id."""
        ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        bad = [i for i in ids if not 0 <= i < len(self)]
        if bad:
            raise ValueError(f"vocabulary: {bad[0]} is no id; ids are 0 to {len(self) - 1}")
        return "".join("\n" if self.words[i] == EOS else self.words[i] + " " for i in ids).replace(" \n", "\n").rstrip(" ")

    def to_json(self) -> str:
        """The words as a JSON list, in the order of their ids."""
        return json.dumps(self.words, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Vocabulary:
        """The inverse of `to_json`. `ValueError` for a text that is not a vocabulary."""
        try:
            words = json.loads(text)
        except ValueError as error:
            raise ValueError(f"vocabulary: not JSON ({error})") from None
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError("vocabulary: expected a JSON list of words")
        return cls(tuple(words))


class _Known(dict):
    """Word -> id. A word that is missing has the id of `<unk>`; it is not added."""

    def __missing__(self, word: str) -> int:
        return self[UNK]


def split_words(text: str) -> list[str]:
    """The words of a text, separated by white space, with `<eos>` for each line break."""
    return text.replace("\n", f" {EOS} ").split()
