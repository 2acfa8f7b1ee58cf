"""Perplexities of models that count words. A language model has to beat them to have learned more than how often words and pairs of words occur.

Notation: V words in the vocabulary, N training tokens, n(w) the number of times w occurs among them, n(v, w) the number of times w follows v, and
n(v ·) = Σ_w n(v, w). Both perplexities are exp of the mean nats over the targets, which are all test tokens but the first, as for a neural model.
The training tokens are `corpus.train` alone, also as for a neural model.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ..corpus import Corpus

_ROUNDS = 30  # bisections: λ to 1e-9


def counted(corpus: Corpus) -> dict[str, float]:
    """`unigram_perplexity` and `bigram_perplexity`, by these names."""
    return {"unigram_perplexity": unigram_perplexity(corpus), "bigram_perplexity": bigram_perplexity(corpus)}


def unigram_perplexity(corpus: Corpus) -> float:
    """Test perplexity of p(w) = (n(w) + 1) / (N + V)."""
    p = _unigram(_ids(corpus.train), len(corpus.vocab))
    return _perplexity(p[_ids(corpus.test)[1:]])


def bigram_perplexity(corpus: Corpus) -> float:
    """Test perplexity of p(w | v) = λ_b n(v, w) / n(v ·) + (1 - λ_b) p(w), with p(w) as in `unigram_perplexity` (Jelinek and Mercer 1980).

    All v with n(v ·) in [2^(b-1), 2^b) share one weight λ_b. It is 0 for v that no training token follows. Otherwise it is the value from 0 to 0.999 that
    maximises the likelihood of the validation text, whose logarithm is concave in it; without a validation pair in the bucket b it is 1/2.
    Peak memory is about 25 bytes a training token. `ValueError` if the training or the test text has fewer than two tokens.
    """
    train, n_words = _ids(corpus.train), len(corpus.vocab)
    if len(train) < 2:
        raise ValueError("perplexity: the training text has fewer than two tokens")
    unigram = _unigram(train, n_words)
    pairs, counts = np.unique(train[:-1] * n_words + train[1:], return_counts=True)
    followers = np.bincount(train[:-1], minlength=n_words)  # n(v ·), (V,)
    bucket = np.frexp(followers)[1]  # b of each word, (V,): 0 for n(v ·) = 0, 1 for 1, 2 for 2 and 3, 3 for 4 to 7, …

    def parts(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """n(v, w) / n(v ·), p(w) and b for each target of the text, (tokens - 1,) each."""
        first, second = tokens[:-1], tokens[1:]
        key = first * n_words + second
        place = np.minimum(np.searchsorted(pairs, key), len(pairs) - 1)
        together = np.where(pairs[place] == key, counts[place], 0)
        return together / np.maximum(followers[first], 1), unigram[second], bucket[first]

    relative, single, b = parts(_ids(corpus.valid))
    n_buckets = bucket.max() + 1
    low, high = np.zeros(n_buckets), np.full(n_buckets, 0.999)
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        slope = np.bincount(b, (relative - single) / (middle[b] * relative + (1 - middle[b]) * single), n_buckets)  # derivative of the log likelihood
        low, high = np.where(slope > 0, middle, low), np.where(slope > 0, high, middle)
    weight = np.where(np.bincount(b, minlength=n_buckets) > 0, (low + high) / 2, 0.5)
    weight[0] = 0.0

    relative, single, b = parts(_ids(corpus.test))
    return _perplexity(weight[b] * relative + (1 - weight[b]) * single)


def _ids(tokens: Tensor) -> np.ndarray:
    return tokens.cpu().numpy()


def _unigram(train: np.ndarray, n_words: int) -> np.ndarray:
    """p(w) of each word (V,)."""
    return (np.bincount(train, minlength=n_words) + 1) / (len(train) + n_words)


def _perplexity(p: np.ndarray) -> float:
    """exp(-mean log p), where `p` are the probabilities of the targets."""
    if not len(p):
        raise ValueError("perplexity: the test text has fewer than two tokens")
    return float(np.exp(-np.log(p).mean()))
