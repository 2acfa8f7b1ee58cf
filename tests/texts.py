"""A corpus written out as a folder of texts, for the tests whose commands read one."""

from __future__ import annotations

from pathlib import Path


def write_texts(folder: Path, corpus, **lengths: int) -> Path:
    """train.txt, valid.txt and test.txt: all tokens of each split, or as many as `lengths` has for it."""
    for split in ("train", "valid", "test"):
        words = " ".join(corpus.vocab.words[i] for i in getattr(corpus, split)[:lengths.get(split)].tolist())
        (folder / f"{split}.txt").write_text(words.replace(" <eos> ", "\n") + "\n", encoding="utf-8")
    return folder
