"""Corpora, batches and downloads. No network but a server on 127.0.0.1."""

import hashlib
import io
import json
import os
import random
import re
import struct
import subprocess
import sys
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from nni_darts_rnn import corpus as corpus_module
from nni_darts_rnn.corpus import BpttBatches, Corpus, LengthRule, Vocabulary, load_corpus, streams
from nni_darts_rnn.text import download

ROOT = Path(__file__).parents[1]
PENN = Path(__file__).parents[2] / "shared" / "data" / "penn"
needs_penn = pytest.mark.skipif(not PENN.is_dir(), reason="the Penn Treebank is not in ../shared/data/penn")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "nni_darts_rnn" / "corpora"


def write(folder: Path, **texts) -> Path:
    folder.mkdir(exist_ok=True)
    for split, text in texts.items():
        (folder / f"{split}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


@pytest.fixture
def small(tmp_path):
    return write(tmp_path / "small", train="the cat sat\nthe dog ran\n", valid="the cat ran\n", test="the bird sat\n")


def one_line(call, *args, **settings) -> str:
    with pytest.raises(ValueError) as caught:
        call(*args, **settings)
    message = str(caught.value)
    assert message and "\n" not in message and len(message) < 400
    return message


# ---- vocabulary

def test_vocabulary_round_trip():
    vocab = Vocabulary(("b", "a", "<eos>", "<unk>"))
    ids = vocab.encode("a b\nnew a")
    assert ids.dtype == torch.long and ids.tolist() == [1, 0, 2, 3, 1, 2]
    assert vocab.decode(ids) == "a b\n<unk> a\n" and torch.equal(vocab.encode(vocab.decode(ids)), ids)
    assert vocab.encode("").tolist() == [] and vocab.encode("\n\n").tolist() == [2, 2]
    assert Vocabulary.from_json(vocab.to_json()) == vocab and json.loads(vocab.to_json()) == ["b", "a", "<eos>", "<unk>"]
    assert vocab.index["a"] == 1 and "new" not in vocab.index and len(vocab) == 4  # looking a word up adds nothing


@pytest.mark.parametrize("text", ["", "{}", "[1]", '["a"]', '["<eos>", "<unk>", "a", "a"]', '["<eos>", "<unk>", "a b"]', '["<eos>", "<unk>", ""]'])
def test_bad_vocabulary(text):
    assert "vocabulary" in one_line(Vocabulary.from_json, text)


def test_decode_refuses_what_is_no_id():
    vocab = Vocabulary(("<eos>", "<unk>"))
    assert "2 is no id" in one_line(vocab.decode, [0, 2])
    assert "-1 is no id" in one_line(vocab.decode, torch.tensor([-1]))


# ---- corpora

def test_folder(small):
    c = load_corpus(small)
    assert c.vocab.words == ("the", "cat", "sat", "<eos>", "dog", "ran", "<unk>")  # by first appearance, of the training text alone
    assert c.train.tolist() == [0, 1, 2, 3, 0, 4, 5, 3] and c.test.tolist() == [0, 6, 2, 3]
    assert c.train.dtype == torch.long and c.alpha is None
    assert c.describe() == "small: 8 training, 4 validation, 4 test tokens; 7 words"


def test_names_of_texts(small, tmp_path):
    for style in ("wiki.{}.tokens", "ptb.{}.txt"):
        other = tmp_path / style
        other.mkdir()
        for split in ("train", "valid", "test"):
            (other / style.format(split)).write_bytes((small / f"{split}.txt").read_bytes())
        assert torch.equal(load_corpus(str(other)).train, load_corpus(small).train)


def test_alpha_fraction_takes_the_end_of_the_training_text(small):
    whole, c = load_corpus(small), load_corpus(small, alpha_fraction=0.25)
    assert torch.equal(torch.cat([c.train, c.alpha]), whole.train) and len(c.alpha) == 2
    assert c.vocab == whole.vocab and torch.equal(c.valid, whole.valid)
    assert "6 training, 2 α, 4 validation" in c.describe()
    assert torch.equal(c.without_alpha().train, whole.train) and c.without_alpha().alpha is None and "8 training, 4 validation" in c.without_alpha().describe()
    assert whole.without_alpha() is whole


def test_a_byte_order_mark_is_no_part_of_a_word(tmp_path):
    folder = write(tmp_path / "marked", train="\ufeffthe cat\nthe dog\n", valid="\ufeff", test="the\ufeff cat\n")
    (folder / "valid.txt").write_bytes(b"\xef\xbb\xbfthe \xff")
    with pytest.raises(ValueError, match="byte 7 is not UTF-8"):
        load_corpus(folder)
    (folder / "valid.txt").write_text("\ufeffdog\n", encoding="utf-8")
    c = load_corpus(folder)
    assert c.vocab.words == ("the", "cat", "<eos>", "dog", "<unk>")
    assert [c.vocab.words[i] for i in c.valid] == ["dog", "<eos>"] and [c.vocab.words[i] for i in c.test] == ["<unk>", "cat", "<eos>"]
    (folder / "valid.txt").write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(ValueError, match="no words in it"):
        load_corpus(folder)


def test_reading_in_pieces_gives_the_same_tokens(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    words = [str(w) for w in rng.choice(["ä", "été", "word", "longerword", "\n", "\n\n", "\t", "\r\n", "x"], 3000)]
    for end in ("", "\n", " ", "\r\n"):
        text = " ".join(words) + end
        folder = write(tmp_path / "pieces", train=text, valid=text, test=text)
        # As files are read line by line elsewhere: <eos> after each line, the last one too.
        expected = [w for line in io.StringIO(text, newline="\n") for w in [*line.split(), "<eos>"]]
        for block in (16, 17, 64, 1 << 20):
            monkeypatch.setattr(corpus_module, "_BLOCK", block)
            c = load_corpus(folder)
            assert [c.vocab.words[i] for i in c.train] == expected, (end, block)
            assert torch.equal(c.valid, c.train)


def test_large_texts_are_mapped_from_disk(small, cache, monkeypatch):
    plain = load_corpus(small)
    monkeypatch.setattr(corpus_module, "_ON_DISK", 1)
    for _ in range(2):
        c = load_corpus(small)
        assert c.vocab == plain.vocab and all(torch.equal(getattr(c, s), getattr(plain, s)) for s in ("train", "valid", "test"))
        c.train[0] = 5  # a private copy of the page: the file stays
        monkeypatch.setattr(corpus_module, "_pieces", None)  # the second time nothing is encoded
    assert sorted(p.suffix for p in cache.iterdir()) == ["", ".lock"]


def test_a_text_refused_leaves_nothing_in_the_cache(small, cache, monkeypatch):
    monkeypatch.setattr(corpus_module, "_ON_DISK", 1)
    write(small, test=b"ok\xff\n")
    assert "byte 2 " in one_line(load_corpus, small)
    assert [p.suffix for p in cache.iterdir()] == [".lock"]


def test_pydoc():
    c = load_corpus("pydoc")
    tokens = len(c.train) + len(c.valid) + len(c.test)
    assert 90_000 < tokens < 150_000 and 2_000 < len(c.vocab) < 4_000
    assert 0.75 < len(c.train) / tokens < 0.85 and min(len(c.valid), len(c.test)) > 0.07 * tokens
    for ids, most in ((c.train, 0.02), (c.valid, 0.1), (c.test, 0.1)):
        assert (ids == c.vocab.index["<unk>"]).double().mean() < most
    lines = {split: {line for line in c.vocab.decode(getattr(c, split)).splitlines() if len(line.split()) >= 12} for split in download.SPLITS}
    for a, b in (("train", "valid"), ("train", "test"), ("valid", "test")):
        assert lines[a] and not lines[a] & lines[b], (a, b)  # no paragraph on both sides
    assert {"the", "statement", "__init__", "N", "("} <= set(c.vocab.words) and not any(w != w.lower() for w in c.vocab.words if w != "N")


@needs_penn
def test_penn_has_the_published_counts():
    c = load_corpus("penn", folder=PENN)
    assert (len(c.train), len(c.valid), len(c.test), len(c.vocab)) == (929_589, 73_760, 82_430, 10_000)
    assert c.describe() == "penn: 929,589 training, 73,760 validation, 82,430 test tokens; 10,000 words"
    # the first line of the test text, by its digest: none of the Penn Treebank's own words stand here
    first = hashlib.sha256(c.vocab.decode(c.test[:7]).encode()).hexdigest()
    assert first == "55cecb385bd0130462bd5e678a739643f767c039945c3351fbf144475fd2535a"
    assert torch.equal(load_corpus(PENN).train, c.train)  # as any folder


PRINT = """
import hashlib, sys
from nni_darts_rnn.corpus import *
c = load_corpus("pydoc", alpha_fraction=0.1)
b = BpttBatches(streams(c.train, 8), LengthRule(20, 0.3, 4.0, 3, 30), seed=3)
b.set_epoch(2)
print(hashlib.sha256(repr((c.vocab.words, c.train.tolist(), c.valid.tolist(), c.alpha.tolist(), b.lengths)).encode()).hexdigest())
"""


def test_same_in_a_process_with_another_hash_seed(capsys):
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    other = subprocess.run([sys.executable, "-c", PRINT], env={**os.environ, "PYTHONHASHSEED": seed}, cwd=ROOT, capture_output=True, text=True,
                           timeout=120)
    exec(PRINT, {})
    assert other.stdout == capsys.readouterr().out and len(other.stdout) == 65


# ---- bad input

@pytest.mark.parametrize("texts, says", [
    (dict(train=b"a b\n", valid=b"a\n"), "test.txt is missing"),
    (dict(train=b"", valid=b"a\n", test=b"a\n"), "train.txt: no words"),
    (dict(train=b"a\n", valid=b" \n\n\t", test=b"a\n"), "valid.txt: no words"),
    (dict(train=b"a\n", valid=b"a\n", test=b"abc \xe9 d\n"), r"test.txt: byte 4 is not UTF-8"),
    (dict(train=b"a\n" * 700_000 + b"\xff\n", valid=b"a\n", test=b"a\n"), r"train.txt: byte 1400000 is not UTF-8"),
    (dict(train=b"ab\xe2\x82", valid=b"a\n", test=b"a\n"), r"train.txt: byte 2 is not UTF-8"),
    (dict(train=b"a " * 600_000 + b"x" * 2_200_000, valid=b"a\n", test=b"a\n"), r"train.txt: a word of more than 1,048,576 bytes at byte 1200000"),
])
def test_bad_texts(tmp_path, texts, says):
    assert re.search(says, one_line(load_corpus, write(tmp_path / "bad", **texts)))


@pytest.mark.parametrize("call, says", [
    (lambda p: load_corpus("pen"), "'pen' is neither a folder nor one of pydoc, penn, wikitext-2, wikitext-103; did you mean 'penn'"),
    (lambda p: load_corpus("wikitext2"), "did you mean 'wikitext-2'"),
    (lambda p: load_corpus("no/such/folder"), "neither a folder nor one of"),
    (lambda p: load_corpus("no/such/folder"), f"; looked for in {os.getcwd()}"),
    (lambda p: load_corpus("penn", folder=p), r"train.txt \(or ptb.train.txt or wiki.train.tokens\) is missing"),
    (lambda p: load_corpus("x" * 300 + "\0"), "neither a folder"),
    (lambda p: load_corpus(""), "must be a folder or one of"),
    (lambda p: load_corpus(None), "must be a folder or one of"),
    (lambda p: load_corpus(p / "small" / "train.txt"), "is a file; give the folder"),
    (lambda p: load_corpus("penn"), "give folder=.* or mirror="),
    (lambda p: load_corpus("penn", folder=p / "nowhere"), "nowhere: no such folder"),
    (lambda p: load_corpus("penn", folder=p / "small" / "train.txt"), "a file, not a folder"),
    (lambda p: load_corpus("penn", folder=p / "small"), "not the published train text of penn"),
    (lambda p: load_corpus("wikitext-2", folder=p / "small"), "8 train tokens, but the published wikitext-2 has 2,088,628"),
    (lambda p: load_corpus("pydoc", folder=p), "folder and mirror are for penn"),
    (lambda p: load_corpus(p / "small", mirror="https://example.org"), "folder and mirror are for penn"),
    (lambda p: load_corpus(p / "small", alpha_fraction=1.0), "alpha_fraction: 1.0 must be a number of at least 0 and below 1"),
    (lambda p: load_corpus(p / "small", alpha_fraction=float("nan")), "alpha_fraction: nan must be"),
    (lambda p: load_corpus(p / "small", alpha_fraction="half"), "alpha_fraction: 'half' must be"),
    (lambda p: load_corpus(p / "small", alpha_fraction=True), "alpha_fraction: True must be"),
    (lambda p: load_corpus(p / "small", alpha_fraction=0.01), "alpha_fraction: 0.01 of 8 training tokens"),
    (lambda p: load_corpus("penn", mirror="http://example.org/x"), "allowed are https"),
    (lambda p: load_corpus("penn", mirror="http://127.0.0.1.example.org/x"), "allowed are https"),
    (lambda p: load_corpus("penn", mirror="ftp://127.0.0.1/x"), "allowed are https"),
    (lambda p: load_corpus("penn", mirror="https:///x"), "allowed are https"),
    (lambda p: load_corpus("penn", mirror="https://[::1"), "allowed are https"),
    (lambda p: load_corpus("penn", mirror="/some/path"), "allowed are https"),
    (lambda p: load_corpus("penn", mirror="file:///no/such/folder"), "ptb.train.txt: .*No such file"),
    (lambda p: load_corpus("wikitext-2", mirror="https://example.org/other.zip"), "give the URL of wikitext-2-v1.zip"),
    (lambda p: streams(torch.arange(9), 5), "5 streams need a text of at least 10 tokens, this one has 9"),
    (lambda p: streams(torch.arange(9), 0), "batch_size: 0 must be a whole number"),
    (lambda p: streams(torch.arange(9), 1.5), "batch_size: 1.5 must be a whole number"),
    (lambda p: BpttBatches(torch.zeros(1, 4, dtype=torch.long), LengthRule(5)), r"shape \(1, 4\) hold no target"),
    (lambda p: LengthRule(0), "bptt: 0 must be at least 1"),
    (lambda p: LengthRule(float("nan")), "bptt: nan must"),
    (lambda p: LengthRule(float("inf")), "bptt: inf must"),
    (lambda p: LengthRule(35, 1.5), "short_probability: 1.5"),
    (lambda p: LengthRule(35, 0.05, -1.0, 5, 55), "std: -1.0"),
    (lambda p: LengthRule(35, 0.05, 5.0, 60, 55), "minimum: 60 must be from 1 to the maximum, 55"),
])
def test_bad_settings(small, tmp_path, call, says):
    assert re.search(says, one_line(call, tmp_path))


def test_missing_split_that_is_a_folder(small):
    (small / "test.txt").unlink()
    (small / "test.txt").mkdir()
    assert "test.txt: not a file" in one_line(load_corpus, small)


def test_a_folder_called_as_a_corpus_is(small, tmp_path, monkeypatch):
    small.rename(tmp_path / "penn")
    monkeypatch.chdir(tmp_path)
    assert len(load_corpus("./penn").train) == len(load_corpus(Path("penn")).train) == 8


def test_too_many_distinct_words(small, monkeypatch):
    monkeypatch.setattr(corpus_module, "_MOST_WORDS", 3)
    assert "more than 3 distinct words" in one_line(load_corpus, small)


def test_cache_that_cannot_be_written(small, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "_ON_DISK", 1)
    (tmp_path / "cache").write_text("in the way")
    assert "XDG_CACHE_HOME" in one_line(load_corpus, small)


# ---- streams and batches

def test_streams_are_consecutive_parts():
    s = streams(torch.arange(23), 4)
    assert s.tolist() == [[0, 5, 10, 15], [1, 6, 11, 16], [2, 7, 12, 17], [3, 8, 13, 18], [4, 9, 14, 19]]
    assert s._base is not None  # a view


@pytest.mark.parametrize("rule", [LengthRule(7), LengthRule(1), LengthRule(500), LengthRule(9, 0.5), LengthRule(9, 0.3, 3.0, 2, 14)])
@pytest.mark.parametrize("n", [6, 7, 41, 1000])
def test_every_target_once_and_no_copies(rule, n):
    stream = streams(torch.arange(n), 3)
    batches = BpttBatches(stream, rule, seed=1)
    for epoch in range(3):
        batches.set_epoch(epoch)
        items = list(batches)
        assert len(items) == len(batches) == len(batches.lengths)
        assert torch.equal(torch.cat([b.targets for b in items]), stream[1:]) and torch.equal(torch.cat([b.tokens for b in items]), stream[:-1])
        assert [len(b.tokens) for b in items] == batches.lengths and sum(batches.lengths) == len(stream) - 1
        assert all(b.tokens.shape == b.targets.shape and b.tokens.untyped_storage().data_ptr() == stream.untyped_storage().data_ptr() for b in items)
        assert torch.equal(batches[len(batches) - 1].targets, items[-1].targets)
    with pytest.raises(IndexError):
        batches[len(batches)]


@pytest.mark.parametrize("bptt", [1, 7])
def test_a_bptt_alone_is_every_length(bptt):
    batches = BpttBatches(streams(torch.arange(300), 3), LengthRule(bptt))
    assert set(batches.lengths[:-1]) == {bptt} and batches.epoch == 0


def test_lengths_of_the_search():
    batches = BpttBatches(torch.zeros(700_000, 1, dtype=torch.long), LengthRule(35, 0.05))
    lengths = np.array(batches.lengths[:-1])
    assert set(lengths) == {17, 35}
    assert abs((lengths == 17).mean() - 0.05) < 4 * np.sqrt(0.05 * 0.95 / len(lengths))


def test_lengths_of_the_retraining():
    batches = BpttBatches(torch.zeros(1_000_000, 1, dtype=torch.long), LengthRule(35, 0.05, 5.0, 5, 55))
    lengths = np.array(batches.lengths[:-1])
    assert lengths.min() >= 5 and lengths.max() <= 55
    # The whole part of a normal lies half a step below its mean.
    mean = 0.95 * 34.5 + 0.05 * 17
    assert abs(lengths.mean() - mean) < 4 * lengths.std() / np.sqrt(len(lengths))
    assert 0.03 < (lengths < 22).mean() < 0.06
    long = BpttBatches(torch.zeros(1_000_000, 1, dtype=torch.long), LengthRule(35, 0.0, 5.0, 5, 55)).lengths
    assert abs(np.std(long[:-1]) - 5.0) < 0.1 and abs(np.mean(long[:-1]) - 34.5) < 0.15
    clipped = BpttBatches(torch.zeros(20_000, 1, dtype=torch.long), LengthRule(10, 0.0, 5.0, 8, 12)).lengths
    assert set(clipped[:-1]) == {8, 9, 10, 11, 12}


def test_lengths_depend_on_seed_and_epoch_alone():
    stream, rule = torch.zeros(2000, 2, dtype=torch.long), LengthRule(20, 0.1, 5.0, 5)
    one, other = BpttBatches(stream, rule, seed=4), BpttBatches(stream, rule, seed=4)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    seen = []
    for epoch in range(3):
        one.set_epoch(epoch)
        seen.append(one.lengths)
    assert torch.equal(torch.get_rng_state(), state[0]) and np.array_equal(np.random.get_state()[1], state[1])
    assert other.lengths == seen[0]  # the first epoch's, until another is set
    other.set_epoch(2)  # straight to it, as a resumed run does
    assert other.lengths == seen[2] and other.epoch == 2 and seen[0] != seen[1] != seen[2]
    assert BpttBatches(stream, rule, seed=5).lengths != seen[0]
    begun = iter(one)
    first = next(begun)
    one.set_epoch(0)
    assert [len(first.tokens)] + [len(b.tokens) for b in begun] == seen[2]  # an iterator keeps its epoch


def test_device():
    stream = streams(torch.arange(20), 2)
    assert BpttBatches(stream, LengthRule(5), device="meta")[0].tokens.device.type == "meta"
    assert BpttBatches(stream, LengthRule(5)).to("meta").stream.device.type == "meta"


# ---- downloads

class Mirror:
    """A server on 127.0.0.1. `files` maps paths to bytes; `cut[path]` lists after how many bytes the next answers break off."""

    def __init__(self, ranges=True):
        self.files, self.cut, self.redirects, self.requests = {}, {}, {}, []
        self.ranges, self.shift = ranges, 0  # `shift`: of what is sent, against what was asked for
        self.busy: list[int] = []  # codes of the next answers, which have nothing
        self.unasked = 0  # where an answer begins that was asked for from the beginning
        mirror = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                wanted = self.headers.get("Range")
                mirror.requests.append((self.path, wanted))
                if mirror.busy:
                    return self.send_error(mirror.busy.pop(0))
                if self.path in mirror.redirects:
                    self.send_response(302)
                    self.send_header("Location", mirror.redirects[self.path])
                    return self.end_headers()
                if self.path not in mirror.files:
                    return self.send_error(404)
                body, start = mirror.files[self.path], 0
                if wanted and ranges:
                    start = int(wanted[len("bytes="):-1]) + mirror.shift
                    if start >= len(body):
                        return self.send_error(416)
                start = start or mirror.unasked
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
                self.send_header("Content-Length", str(len(body) - start))
                self.end_headers()
                cuts = mirror.cut.get(self.path)
                self.wfile.write(body[start:start + cuts.pop(0)] if cuts else body[start:])

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(params=[True, False], ids=["ranges", "no ranges"])
def any_mirror(request):
    mirror = Mirror(ranges=request.param)
    yield mirror
    mirror.close()


@pytest.fixture
def mirror():
    mirror = Mirror()
    yield mirror
    mirror.close()


BODY = np.random.default_rng(0).bytes(300_000)


@pytest.fixture
def sha(tmp_path):
    (tmp_path / "body").write_bytes(BODY)
    return download.digest(tmp_path / "body")


def test_a_broken_download_goes_on_within_a_call(any_mirror, tmp_path, sha):
    any_mirror.files["/f"], any_mirror.cut["/f"] = BODY, [100_000, 50_000]
    download.download(any_mirror.url + "/f", tmp_path / "part", sha)
    assert (tmp_path / "part").read_bytes() == BODY
    third = 150_000 if any_mirror.ranges else 50_000  # without ranges the second answer began anew
    assert [r for _, r in any_mirror.requests] == [None, "bytes=100000-", f"bytes={third}-"]


def test_a_broken_download_goes_on_in_the_next_call(mirror, tmp_path, sha):
    mirror.files["/f"], mirror.cut["/f"] = BODY, [10_000] * 4
    message = one_line(download.download, mirror.url + "/f", tmp_path / "part", sha)
    assert "40,000 bytes are kept" in message and (tmp_path / "part").stat().st_size == 40_000
    download.download(mirror.url + "/f", tmp_path / "part", sha)
    assert (tmp_path / "part").read_bytes() == BODY and mirror.requests[-1][1] == "bytes=40000-"
    download.download(mirror.url + "/f", tmp_path / "part", sha)  # whole already: nothing is asked for
    assert len(mirror.requests) == 5


def test_what_was_kept_of_another_file_is_thrown_away(mirror, tmp_path, sha):
    mirror.files["/f"] = BODY
    for wrong in (b"x" * 1000, b"x" * 300_000, b"x" * 400_000):
        (tmp_path / "part").write_bytes(wrong)
        download.download(mirror.url + "/f", tmp_path / "part", sha)
        assert (tmp_path / "part").read_bytes() == BODY


def test_a_server_that_answers_with_another_range_is_asked_for_the_whole(mirror, tmp_path):
    mirror.files["/f"], mirror.shift = BODY, 1
    (tmp_path / "part").write_bytes(BODY[:1000])
    download.download(mirror.url + "/f", tmp_path / "part", None)
    assert (tmp_path / "part").read_bytes() == BODY and [r for _, r in mirror.requests] == ["bytes=1000-", None]


def test_a_part_that_nobody_asked_for_is_not_taken_for_the_whole(mirror, tmp_path):
    mirror.files["/f"], mirror.unasked = BODY, 7
    assert "where none was asked for" in one_line(download.download, mirror.url + "/f", tmp_path / "part", None)
    assert not (tmp_path / "part").exists()


def test_wrong_checksum_leaves_nothing(mirror, tmp_path, sha):
    mirror.files["/f"] = BODY[:-1] + b"!"
    assert "wrong checksum" in one_line(download.download, mirror.url + "/f", tmp_path / "part", sha)
    assert not (tmp_path / "part").exists()


def test_not_found_and_refused_connections(mirror, tmp_path, sha):
    assert "404" in one_line(download.download, mirror.url + "/f", tmp_path / "part", sha)
    assert len(mirror.requests) == 1  # no use to ask again
    url = mirror.url
    mirror.close()
    assert "efused" in one_line(download.download, url + "/f", tmp_path / "part", sha)
    mirror.server.server_close = mirror.server.shutdown = lambda: None


def test_a_busy_server_is_asked_again(mirror, tmp_path, sha):
    mirror.files["/f"], mirror.busy = BODY, [500, 503]
    download.download(mirror.url + "/f", tmp_path / "part", sha)
    assert (tmp_path / "part").read_bytes() == BODY
    mirror.busy = [503] * 9
    assert "503" in one_line(download.download, mirror.url + "/f", tmp_path / "other", sha) and len(mirror.busy) == 5


def test_redirects_are_checked(mirror, tmp_path, sha):
    mirror.files["/f"] = BODY
    mirror.redirects = {"/here": "/f", "/away": "http://example.org/f", "/file": (tmp_path / "body").as_uri()}
    download.download(mirror.url + "/here", tmp_path / "part", sha)
    (tmp_path / "part").unlink()
    assert "allowed are" in one_line(download.download, mirror.url + "/away", tmp_path / "part", sha)
    with pytest.raises(ValueError):
        download.download(mirror.url + "/file", tmp_path / "part", sha)
    assert not (tmp_path / "part").exists()


def test_size_limit(mirror, tmp_path, sha, monkeypatch):
    monkeypatch.setattr(download, "_LARGEST", 200_000)
    mirror.files["/f"] = BODY
    assert "more than 200,000 bytes" in one_line(download.download, mirror.url + "/f", tmp_path / "part", sha)
    assert not (tmp_path / "part").exists()


def packed(names: dict, kind: str) -> bytes:
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in names.items():
                archive.writestr(name, data)
    else:
        with tarfile.open(fileobj=file, mode="w:gz", compresslevel=1) as archive:
            for name, data in names.items():
                info = tarfile.TarInfo(name)
                if data is None:
                    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
                elif name.endswith("/"):
                    info.type = tarfile.DIRTYPE
                info.size = len(data or b"")
                archive.addfile(info, io.BytesIO(data or b""))
    return file.getvalue()


GOOD = {"wikitext/wiki.train.tokens": b"a b\n", "wikitext/wiki.valid.tokens": b"a\n", "wikitext/wiki.test.tokens": b"b\n", "wikitext/README": b"hi"}


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize("extra, says", [
    ({}, None), ({"train.txt/": b""}, None), ({"../evil/": b""}, "path outside"),
    ({"../evil.txt": b"x"}, "path outside"), ({"a/../../evil.txt": b"x"}, "path outside"), ({"/tmp/evil.txt": b"x"}, "path outside"),
    ({"C:/evil.txt": b"x"}, "path outside"), ({"..\\evil.txt": b"x"}, "path outside"), ({"other/train.txt": b"x"}, "several files"),
])
def test_archives(tmp_path, kind, extra, says):
    (tmp_path / "archive").write_bytes(packed({**GOOD, **extra}, kind))
    out = tmp_path / "out"
    out.mkdir()
    if says is None:
        download.unpack(tmp_path / "archive", out)
        assert {p.name: p.read_bytes() for p in out.iterdir()} == {"train.txt": b"a b\n", "valid.txt": b"a\n", "test.txt": b"b\n"}
    else:
        assert says in one_line(download.unpack, tmp_path / "archive", out)
        assert not list(tmp_path.rglob("evil*"))


def test_bad_archives(tmp_path, monkeypatch):
    path, good = tmp_path / "archive", packed(GOOD, "zip")
    for data in (b"", b"no archive", good[:len(good) // 2], packed(GOOD, "tar")[:60], packed({"link": None, **GOOD}, "tar"),
                 packed({k: v for k, v in GOOD.items() if "test" not in k}, "zip")):
        path.write_bytes(data)
        assert "archive" in one_line(download.unpack, path, tmp_path)
    flipped = bytearray(good)
    flipped[good.index(b"wiki.train.tokens") + 18] ^= 0xFF  # in the compressed data
    path.write_bytes(flipped)
    one_line(download.unpack, path, tmp_path)
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:xz") as archive:
        info = tarfile.TarInfo("train.txt")
        info.size = 300_000
        archive.addfile(info, io.BytesIO(random.Random(0).randbytes(info.size)))
    broken = bytearray(raw.getvalue())
    broken[-100_000] ^= 0xFF  # past what is read to see which kind of archive it is
    path.write_bytes(broken)
    assert "no archive that can be read" in one_line(download.unpack, path, tmp_path)
    monkeypatch.setattr(download, "_LARGEST", 10_000)
    path.write_bytes(packed({**GOOD, "wikitext/wiki.train.tokens": b"a " * 50_000}, "zip"))  # 100 kB in a few bytes
    assert "more than" in one_line(download.unpack, path, tmp_path)


def test_archives_that_lie_about_themselves(tmp_path):
    path = tmp_path / "archive"
    cut = bytearray(packed({name: data * 20 for name, data in GOOD.items()}, "zip"))
    at = cut.index(b"PK\1\2")
    cut[at + 10:at + 12], cut[at + 20:at + 28] = bytes(2), struct.pack("<II", 10**5, 10**5)  # stored, and longer than the archive
    cut[8:10] = bytes(2)
    path.write_bytes(cut)
    # Python 3.13 sees it before it reads
    assert re.search(r"no archive that can be read \((EOFError\)|Overlapped entries)", one_line(download.unpack, path, tmp_path))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        for name, data in GOOD.items():
            archive.writestr(name, data)
    flipped = bytearray(path.read_bytes())
    flipped[flipped.index(b"wiki.train.tokens") + 17] ^= 0xFF
    path.write_bytes(flipped)
    assert "no archive that can be read (Invalid data stream)" in one_line(download.unpack, path, tmp_path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_text_that_an_archive_has_twice(tmp_path):
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        for name in [*GOOD, *GOOD]:
            archive.writestr(name, GOOD[name])
    with tarfile.open(tmp_path / "tar", "w") as archive:
        for name in [*GOOD, *GOOD]:
            info = tarfile.TarInfo(name)
            info.size = len(GOOD[name])
            archive.addfile(info, io.BytesIO(GOOD[name]))
    for kind in ("zip", "tar"):
        assert "several files called" in one_line(download.unpack, tmp_path / kind, tmp_path)


@pytest.fixture
def tiny_wikitext(mirror, tmp_path, monkeypatch):
    """A corpus of four tokens in the place of WikiText-2, on the mirror."""
    data = packed(GOOD, "zip")
    (tmp_path / "archive").write_bytes(data)
    monkeypatch.setitem(download.SOURCES, "wikitext-2", download.Source({"wikitext-2-v1.zip": download.digest(tmp_path / "archive")}, {}))
    monkeypatch.setitem(corpus_module.PUBLISHED_COUNTS, "wikitext-2", (3, 2, 2, 4))
    mirror.files["/data/wikitext-2-v1.zip"] = data
    return mirror


def test_published_archive_from_a_mirror(tiny_wikitext, cache):
    for mirror in (tiny_wikitext.url + "/data", tiny_wikitext.url + "/data/", tiny_wikitext.url + "/data/wikitext-2-v1.zip"):
        c = load_corpus("wikitext-2", mirror=mirror)
        assert isinstance(c, Corpus) and c.vocab.words == ("a", "b", "<eos>", "<unk>") and c.test.tolist() == [1, 2]
    assert len(tiny_wikitext.requests) == 1  # once
    assert torch.equal(load_corpus("wikitext-2").train, c.train)  # from the cache
    assert sorted(p.name for p in cache.iterdir()) == ["wikitext-2", "wikitext-2.lock"]


def test_published_texts_from_a_mirror_one_by_one(tmp_path, cache, monkeypatch):
    there = tmp_path / "mirror"
    there.mkdir()
    for split, text in (("train", "a b\n"), ("valid", "a\n"), ("test", "b\n")):
        (there / f"ptb.{split}.txt").write_text(text)
    texts = {split: download.digest(there / f"ptb.{split}.txt") for split in ("test", "valid", "train")}
    monkeypatch.setitem(download.SOURCES, "penn", download.Source({f"ptb.{split}.txt": sha for split, sha in texts.items()}, texts))
    monkeypatch.setitem(corpus_module.PUBLISHED_COUNTS, "penn", (3, 2, 2, 4))
    c = load_corpus("penn", mirror=there.as_uri())
    assert (c.train.tolist(), c.valid.tolist(), c.test.tolist()) == ([0, 1, 2], [0, 2], [1, 2])
    assert sorted(path.name for path in cache.rglob("*")) == ["penn", "penn.lock", "test.txt", "train.txt", "valid.txt"]


def test_what_is_in_the_cache_is_neither_fetched_nor_locked(tiny_wikitext, cache):
    target = download.fetch("wikitext-2", tiny_wikitext.url + "/data")
    tiny_wikitext.files.clear()
    (cache / "wikitext-2.lock").unlink()
    assert download.fetch("wikitext-2", tiny_wikitext.url + "/data") == target == cache / "wikitext-2"
    assert [path.name for path in cache.iterdir()] == ["wikitext-2"]  # so a cache that cannot be written does, too


def test_nothing_half_written(tiny_wikitext, cache):
    path = "/data/wikitext-2-v1.zip"
    good = tiny_wikitext.files[path]
    tiny_wikitext.files[path] = good + b"more"
    assert "wrong checksum" in one_line(load_corpus, "wikitext-2", mirror=tiny_wikitext.url + "/data")
    assert [p.name for p in cache.iterdir()] == ["wikitext-2.lock"]
    tiny_wikitext.files[path], tiny_wikitext.cut[path] = good, [50] * 4
    assert "200 bytes are kept" in one_line(load_corpus, "wikitext-2", mirror=tiny_wikitext.url + "/data")
    assert sorted(p.name for p in cache.iterdir()) == ["wikitext-2-wikitext-2-v1.zip.part", "wikitext-2.lock"]
    assert "mirror=" in one_line(load_corpus, "wikitext-2")  # what is there is not taken for the corpus
    (cache / "wikitext-2.new").mkdir()  # as left by a process that was killed
    (cache / "wikitext-2.new" / "train.txt").write_text("half")
    load_corpus("wikitext-2", mirror=tiny_wikitext.url + "/data")
    assert tiny_wikitext.requests[-1][1] == "bytes=200-"
    assert sorted(p.name for p in cache.iterdir()) == ["wikitext-2", "wikitext-2.lock"]


@needs_penn
def test_penn_from_a_mirror_by_two_processes_at_once(mirror, cache):
    for split in ("train", "valid", "test"):
        mirror.files[f"/ptb.{split}.txt"] = (PENN / f"{split}.txt").read_bytes()
    code = f"""
from nni_darts_rnn.corpus import load_corpus
print("ready", flush=True)
input()
print(load_corpus('penn', mirror={mirror.url!r}).describe())"""
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "ready\n"  # so that both begin at once
    other.stdin.write("go\n")
    other.stdin.flush()
    expected = "penn: 929,589 training, 73,760 validation, 82,430 test tokens; 10,000 words"
    assert load_corpus("penn", mirror=mirror.url).describe() == expected
    assert other.communicate(timeout=120)[0] == expected + "\n"
    assert len(mirror.requests) == 3  # one of them downloaded, the other waited
    assert sorted(p.name for p in cache.iterdir()) == ["penn", "penn.lock"]
    (cache / "penn" / "valid.txt").write_text("spoilt\n")
    assert "not the published valid text" in one_line(load_corpus, "penn")


@needs_penn
def test_penn_out_of_an_archive_is_known_by_its_texts(tmp_path, cache):
    texts = {f"simple-examples/data/ptb.{s}.txt": (PENN / f"{s}.txt").read_bytes() for s in ("train", "valid", "test")}
    for name, data in (("bad", {**texts, "simple-examples/data/ptb.test.txt": b"other\n"}), ("good", texts)):
        (tmp_path / f"{name}.tgz").write_bytes(packed(data, "tar"))
    assert "not the published test text" in one_line(load_corpus, "penn", mirror=(tmp_path / "bad.tgz").as_uri())
    assert [p.name for p in cache.iterdir()] == ["penn.lock"]
    assert len(load_corpus("penn", mirror=(tmp_path / "good.tgz").as_uri()).vocab) == 10_000


@pytest.mark.skipif(sys.platform == "darwin", reason="its file system knows UTF-8 alone")
def test_a_folder_whose_name_is_no_utf_8_has_one_that_can_be_written(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/c\xff"))
    folder.mkdir()
    for split in ("train", "valid", "test"):
        (folder / f"{split}.txt").write_text("a word and another\n" * 3)
    assert load_corpus(folder).name.encode("utf-8", "replace") == rb"c\xff"
