"""The counting models against slow ones written from the formulas with dictionaries."""

import math
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from nni_darts_rnn.corpus import Corpus, Vocabulary, load_corpus
from nni_darts_rnn.text.baselines import bigram_perplexity, unigram_perplexity

PENN = Path(__file__).parents[2] / "shared" / "data" / "penn"


def corpus(train, valid, test, n_words=7) -> Corpus:
    vocab = Vocabulary(("<eos>", "<unk>", *(f"w{i}" for i in range(n_words - 2))))
    return Corpus("made", vocab, *(torch.tensor(t) for t in (train, valid, test)))


def random_corpus(seed: int) -> Corpus:
    rng = np.random.default_rng(seed)
    draw = lambda n: np.minimum(np.cumsum(rng.integers(0, 3, n)) % 7, rng.integers(1, 7, n)).tolist()  # noqa: E731 (some order in it)
    return corpus(draw(120), draw(40), draw(50))


def slow_unigram(c):
    train, n_words = c.train.tolist(), len(c.vocab)
    return lambda w: (train.count(w) + 1) / (len(train) + n_words)


def slow_bigram(c):
    """p(w | v) with one weight for each size of n(v ·), each the best of a thousand on the validation text."""
    train, valid, p = c.train.tolist(), c.valid.tolist(), slow_unigram(c)
    pairs, followers = Counter(zip(train, train[1:])), Counter(train[:-1])
    relative = lambda v, w: pairs[v, w] / followers[v]  # noqa: E731
    size = lambda v: followers[v].bit_length()  # noqa: E731
    weights = {0: 0.0}
    for b in {size(v) for v in followers}:
        terms = [(relative(v, w), p(w)) for v, w in zip(valid, valid[1:]) if size(v) == b]
        weights[b] = max((k / 1000 for k in range(1000)), key=lambda x: sum(math.log(x * r + (1 - x) * u) for r, u in terms)) if terms else 0.5

    def probability(v, w):
        weight = weights[size(v)]
        return (weight * relative(v, w) if weight else 0.0) + (1 - weight) * p(w)

    return probability


@pytest.mark.parametrize("seed", range(8))
def test_against_slow_models(seed):
    c = random_corpus(seed)
    test, p, pair = c.test.tolist(), slow_unigram(c), slow_bigram(c)
    for v in range(len(c.vocab)):
        assert sum(pair(v, w) for w in range(len(c.vocab))) == pytest.approx(1)
    assert unigram_perplexity(c) == pytest.approx(math.exp(-sum(math.log(p(w)) for w in test[1:]) / (len(test) - 1)), rel=1e-12)
    expected = math.exp(-sum(math.log(pair(v, w)) for v, w in zip(test, test[1:])) / (len(test) - 1))
    assert bigram_perplexity(c) == pytest.approx(expected, rel=1e-3)  # the grid's step


def test_by_hand():
    c = corpus([2, 3] * 8, [2, 3], [2, 3, 4], n_words=5)  # N = 16, V = 5
    assert unigram_perplexity(c) == pytest.approx(((9 / 21) * (1 / 21)) ** -0.5)
    # 3 always follows 2, so the weight of 2 goes to its bound; 3 is seen 7 times before a word, in a class no validation pair has: 1/2.
    assert bigram_perplexity(c) == pytest.approx(((0.999 + 0.001 * 9 / 21) * (0.5 * 1 / 21)) ** -0.5, rel=1e-3)


def test_words_never_seen():
    c = corpus([2, 3, 2, 3, 2], [2, 3, 2], [4, 5, 6, 2, 6])
    p = [1 / 12, 1 / 12, 4 / 12, 1 / 12]  # of 5, 6, 2, 6; N = 5, V = 7
    assert unigram_perplexity(c) == pytest.approx(math.prod(p) ** -0.25)
    assert bigram_perplexity(c) == pytest.approx((math.prod(p) * 0.001) ** -0.25)  # 2 is always followed by 3; after 4, 5 and 6 the words by themselves


@pytest.mark.parametrize("train, test", [([2], [2, 3]), ([2, 3], [2])])
def test_too_short(train, test):
    with pytest.raises(ValueError, match="fewer than two tokens"):
        bigram_perplexity(corpus(train, [2, 3], test))


def test_pydoc():
    c = load_corpus("pydoc")
    assert 50 < bigram_perplexity(c) < unigram_perplexity(c) / 2 < 250


@pytest.mark.skipif(not PENN.is_dir(), reason="the Penn Treebank is not in ../shared/data/penn")
def test_penn():
    c = load_corpus("penn", folder=PENN)
    start = time.perf_counter()
    assert unigram_perplexity(c) == pytest.approx(639.8, abs=0.1)
    assert bigram_perplexity(c) == pytest.approx(200.1, abs=0.1)
    assert time.perf_counter() - start < 2
