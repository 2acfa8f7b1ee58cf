"""The text of the running Python's own language reference."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from .vocabulary import EOS, UNK

SPLITS = ("train", "valid", "test")
_SAME = 12  # words from which a paragraph of two topics counts as one repeated, not as a phrase such as "see also"


def pydoc_splits() -> dict[str, Iterable[list[str]]]:
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
    return {split: [[word if counts[word] > 1 else UNK for word in words] + [EOS] for topic in texts if split_of[topic] == split
                    for words in texts[topic]] for split in SPLITS}


def _tokenise(paragraph: str) -> list[str]:
    """Lower-case words (with inner hyphens and apostrophes), numbers as `N`, operators and other punctuation as tokens of their own."""
    text = re.sub(r"([^\w\s])\1{3,}", " ", paragraph.lower())  # lines under titles, frames of tables
    tokens = re.findall(r"[^\W\d](?:\w|[-'](?=[^\W\d]))*|\d(?:[\w.]*\w)?|::=|[.]{3}|->|\*\*|//|<<|>>|[=!<>:+*/%&|^-]=|\S", text)
    return ["N" if token[0].isdigit() else token for token in tokens]
