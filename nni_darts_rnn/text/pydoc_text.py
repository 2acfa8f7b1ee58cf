"""The text of the running Python's own language reference."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from .vocabulary import EOS, UNK

SPLITS = ("train", "valid", "test")
_SAME = 12  # words: a paragraph this long in two topics counts as repeated text; a shorter one may be a phrase such as "see also"


def pydoc_splits() -> dict[str, Iterable[list[str]]]:
    """The language reference of the running Python, as lists of words. A paragraph is a line. The text depends on Python's version and on nothing else.

    Topics repeat each other's paragraphs. A topic that shares one of at least `_SAME` words goes to training, so that no such paragraph of the validation or
    test text is in the training text. The other topics, in the order of their names, are dealt out so that each split gets its share. Words that
    occur less than twice in the training text become `<unk>` in every split.
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
        split = max(SPLITS, key=lambda s: shares[s] * total - got[s])  # the split that lags behind most, so that each spans the whole alphabet
        got[split] += size[topic]
        split_of[topic] = split

    counts = Counter(word for topic in texts if split_of[topic] == "train" for words in texts[topic] for word in words)
    return {split: [[word if counts[word] > 1 else UNK for word in words] + [EOS] for topic in texts if split_of[topic] == split
                    for words in texts[topic]] for split in SPLITS}


def _tokenise(paragraph: str) -> list[str]:
    """Lower-case words (with hyphens and apostrophes inside), `N` for each number, and one token for each operator or other punctuation mark."""
    text = re.sub(r"([^\w\s])\1{3,}", " ", paragraph.lower())  # underlines of titles, frames of tables
    tokens = re.findall(r"[^\W\d](?:\w|[-'](?=[^\W\d]))*|\d(?:[\w.]*\w)?|::=|[.]{3}|->|\*\*|//|<<|>>|[=!<>:+*/%&|^-]=|\S", text)
    return ["N" if token[0].isdigit() else token for token in tokens]
