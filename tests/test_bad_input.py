"""Bad input through the command line, the trial entry and Python: one line that names the place, the value and what is allowed; nothing written."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import nni
import pytest
import torch

import nni_darts_rnn as package
from nni_darts_rnn import cell_trial, cli, trial
from nni_darts_rnn.corpus import Vocabulary, load_corpus
from nni_darts_rnn.genotype import DARTS_V2, derive, load_genotype
from nni_darts_rnn.recipes import get_recipe
from nni_darts_rnn.trained import load_trained

TEXT = "the cat sat on the mat\nthe dog sat on the cat\n"
SMALL = ["--recipe", "tiny", "--device", "cpu", "--set", "search.batch_size=4", "--set", "search.eval_batch_size=4", "--set", "search.n_nodes=2",
         "--set", "retrain.epochs=1", "--set", "retrain.batch_size=4", "--set", "retrain.eval_batch_size=4", "--set", "retrain.test_batch_size=4"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working folder, a trial's output folder too; beside it a good corpus, `corpus`."""
    (tmp_path / "corpus").mkdir()
    for split, times in (("train", 20), ("valid", 8), ("test", 8)):
        (tmp_path / "corpus" / f"{split}.txt").write_text(TEXT * times, encoding="utf-8")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("NNI_OUTPUT_DIR", str(here))
    return here


def everything(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, with what a file holds."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def refused(main, argv, place: Path, capsys, *words: str) -> None:
    """`main` ends with status 2 and one line that holds `words`; no file came, went or changed."""
    before = everything(place.parent)
    try:
        code = main([str(a) for a in argv])
    except SystemExit as leaving:  # argparse's way
        code = leaving.code
    text = capsys.readouterr()
    assert code == 2, text.err
    assert len(text.err.splitlines()) == 1 and "error: " in text.err and not text.out, text.err
    for word in words:
        assert word in text.err, text.err
    assert everything(place.parent) == before


def write(split: str, data: bytes):
    return lambda corpus: (corpus / f"{split}.txt").write_bytes(data)


def folder_for(split: str):
    def make(corpus: Path) -> None:
        (corpus / f"{split}.txt").unlink()
        (corpus / f"{split}.txt").mkdir()
    return make


def remove(split: str):
    return lambda corpus: (corpus / f"{split}.txt").unlink()


TEXTS = {  # what is done to the good corpus; what the line says
    "empty training text": (write("train", b""), "train.txt: no words in it; a text is expected"),
    "empty validation text": (write("valid", b""), "valid.txt: no words in it"),
    "empty test text": (write("test", b""), "test.txt: no words in it"),
    "nothing but white space": (write("train", b" \n\t\n \n"), "train.txt: no words in it"),
    "one word": (write("train", b"word"), "streams need a text of at least"),
    "one line": (write("train", b"a line\n"), "streams need a text of at least"),
    "validation text of one line": (write("valid", b"the cat\n"), "streams need a text of at least"),
    "not UTF-8": (write("train", b"caf\xe9 au lait\n" * 50), "train.txt: byte 3 is not UTF-8"),
    "not UTF-8 far inside": (write("test", TEXT.encode() * 50_000 + b"\xff\n"), "test.txt: byte 2300000 is not UTF-8"),
    "UTF-16": (write("valid", TEXT.encode("utf-16")), "valid.txt: byte 0 is not UTF-8"),
    "one endless word": (write("train", b"x" * (3 << 20)), "a word of more than 1,048,576 bytes at byte 0; is this text?"),
    "no training text": (remove("train"), "train.txt is missing; train.txt, valid.txt and test.txt are needed"),
    "no validation text": (remove("valid"), "valid.txt is missing"),
    "no test text": (remove("test"), "test.txt is missing"),
    "a folder in the place of a text": (folder_for("test"), "test.txt: not a file; a text is expected"),
}
WAYS = {"search": (cli.main, ["search"]), "retrain": (cli.main, ["retrain", "--genotype", "ENAS"]), "trial": (trial.main, [])}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("harm, words", TEXTS.values(), ids=TEXTS)
def test_texts(way, harm, words, place, capsys):
    corpus = place.parent / "corpus"
    harm(corpus)
    main, argv = WAYS[way]
    refused(main, [*argv, "--corpus", corpus, *SMALL], place, capsys, words)


CORPORA = {
    "a name misspelt": (["--corpus", "pydok"], "corpus 'pydok' is neither a folder nor one of pydoc", "did you mean 'pydoc'?"),
    "an empty name": (["--corpus", ""], "must be a folder or one of pydoc"),
    "an empty recipe": (["--recipe", ""], "recipe '' is none of penn"),
    "a file": (["--corpus", "../corpus/train.txt"], "is a file; give the folder that holds train.txt, valid.txt, test.txt"),
    "a byte that no path has": (["--corpus", "a\0b"], "neither a folder nor one of"),
    "a published one that is not here": (["--corpus", "penn", "--corpus-folder", "nowhere"], "nowhere: no such folder"),
    "other texts under a published name": (["--corpus", "penn", "--corpus-folder", "../corpus"], "not the published train text of penn"),
    "plain http": (["--corpus", "penn", "--corpus-mirror", "http://example.org/ptb"], "allowed are https://…, file:///…"),
    "ftp": (["--corpus", "penn", "--corpus-mirror", "ftp://example.org/ptb"], "allowed are https://…"),
    "no URL": (["--corpus", "penn", "--corpus-mirror", "ptb; rm -rf /"], "mirror 'ptb; rm -rf /'", "allowed are https://…"),
    "an archive nobody knows": (["--corpus", "wikitext-2", "--corpus-mirror", "https://example.org/x.zip"], "no archive of wikitext-2 with a known checksum; give the URL of wikitext-2-v1.zip"),
    "α's part negative": (["--alpha-fraction", "-0.1"], "alpha_fraction: -0.1 must be a number of at least 0 and below 1"),
    "α's part infinite": (["--alpha-fraction", "inf"], "alpha_fraction: inf"),
    "α's part all but nothing": (["--alpha-fraction", "0.9999"], "leaves a part of fewer than two"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("row", CORPORA.values(), ids=CORPORA)
def test_corpora(way, row, place, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(place.parent / "cache"))
    options, *words = row
    main, argv = WAYS[way]
    if "--alpha-fraction" in options and not (main is trial.main or "search" in argv):  # there is no α
        words = ["unrecognized arguments: --alpha-fraction"]
    where = [] if "--corpus" in options else ["--corpus", place.parent / "corpus"]
    refused(main, [*argv, *where, *SMALL, *options], place, capsys, *words)


SETTINGS = {  # key: value, what the line says; by --set, by the tuner, and by get_recipe
    "search.n_nodes": (0, "search.n_nodes: ", "must be a whole number of at least 1 and at most 64"),
    "search.n_nodes ": (-3, "search.n_nodes: ", "at least 1"),
    "search.epochs": ("three", "search.epochs: 'three' must be a whole number of at least 1"),
    "search.epoch": (3, "'search.epoch' is no field of a recipe", "did you mean 'search.epochs'?"),
    "search.lr": (float("nan"), "search.lr: ", "must be a number of at least 0"),
    "search.arch_lr": (-0.003, "search.arch_lr: ", "must be a number of at least 0"),
    "search.relaxation": ("nodes", "search.relaxation: 'nodes' is none of edge, node, gumbel; did you mean 'node'?"),
    "search.hvp": ("second", "search.hvp: 'second' is none of finite_difference, exact, first_order"),
    "search.reproduce_original": ("maybe", "search.reproduce_original: 'maybe' must be true or false"),
    "search.dropout": (1.0, "search.dropout: ", "at least 0 and below 1"),
    "search.batch_size": (1, "search.batch_size: ", "at least 2"),
    "search.unrolled_lr": ("auto", "search.unrolled_lr: 'auto' must be a number"),
    "search.epsilon": (0, "search.epsilon: ", "must be a number of at least 1e-12"),
    "retrain.hidden_size": (7.5, "retrain.hidden_size: ", "must be a whole number"),
    "retrain.lr": (float("inf"), "retrain.lr: ", "must be a number of at least 0"),
    "retrain.weight_decay": (-1e-7, "retrain.weight_decay: ", "at least 0"),
    "retrain.clip": (0, "retrain.clip: ", "at least 1e-12"),
    "retrain.epochs": (10**400, "retrain.epochs: ", "must be a whole number"),
    "retrain.min_bptt": (99, "retrain.min_bptt: 99 must be at most bptt + max_bptt_above"),
    "retraining.lr": (1, "'retraining.lr' is no field of a recipe", "did you mean 'retrain.lr'?"),
    "lr": (1, "setting 'lr' is no field of a recipe: use search.<field> or retrain.<field>"),
}


@pytest.mark.parametrize("key, row", SETTINGS.items(), ids=SETTINGS)
def test_settings_on_the_command_line(key, row, place, capsys):
    value, *words = row
    refused(cli.main, ["search", "--corpus", place.parent / "corpus", *SMALL, "--set", f"{key}={value}"], place, capsys, *words[:1])


@pytest.mark.parametrize("key, row", SETTINGS.items(), ids=SETTINGS)
def test_settings_of_the_tuner(key, row, place, capsys, monkeypatch):
    value, *words = row
    monkeypatch.setattr(nni, "get_next_parameter", lambda: {key.strip(): value})  # stands for the tuner alone
    refused(trial.main, ["--corpus", place.parent / "corpus", *SMALL], place, capsys, *words)


@pytest.mark.parametrize("key, row", SETTINGS.items(), ids=SETTINGS)
def test_settings_in_python(key, row):
    value, *words = row
    with pytest.raises(ValueError) as refusal:
        get_recipe("tiny", {key.strip(): value})
    one_line(refusal, *words)


def one_line(refusal, *words: str) -> None:
    text = str(refusal.value)
    assert "\n" not in text and text
    for word in words:
        assert word in text, text


CELLS = {
    "a name misspelt": ("DARTS_V3", "genotype 'DARTS_V3' is neither a file nor one of DARTS_V1, DARTS_V2, ENAS, DRAWN_V1", "did you mean 'DARTS_V"),
    "no JSON": ("{", "genotype: not JSON"),
    "a list": ('{"recurrent": 5}', "expected recurrent = ((op, predecessor), …)"),
    "an empty cell": ('{"recurrent": []}', "recurrent is empty; at least one node is needed"),
    "another key": ('{"recurrent": [["tanh", 0]], "normal": []}', 'expected {"recurrent"'),
    "an unknown op": ('{"recurrent": [["tahn", 0]]}', "op 'tahn' of node 1 is none of", "did you mean 'tanh'?"),
    "none as an op": ('{"recurrent": [["none", 0]]}', "op 'none' of node 1 is none of"),
    "a later node is read": ('{"recurrent": [["tanh", 0], ["relu", 2]]}', "node 2 reads state 2; only states 0 to 1 come before it"),
    "a node before the first": ('{"recurrent": [["tanh", -1]]}', "node 1 reads state -1"),
    "a fraction of a node": ('{"recurrent": [["tanh", 0.5]]}', "0.5 is no whole number"),
    "an output that is not there": ('{"recurrent": [["tanh", 0]], "concat": [2]}', "concat (2,) must name each of the nodes 1 to 1 at most once"),
    "an output twice": ('{"recurrent": [["tanh", 0]], "concat": [1, 1]}', "at most once"),
    "too deep a nest": ('{"recurrent": ' + "[" * 100_000 + "}", "genotype: not JSON"),
    "a NaN": ('{"recurrent": [["tanh", NaN]]}', "expected recurrent"),
}


@pytest.mark.parametrize("row", CELLS.values(), ids=CELLS)
def test_cells(row, place, capsys):
    text, *words = row
    refused(cli.main, ["retrain", "--corpus", place.parent / "corpus", *SMALL, "--genotype", text], place, capsys, *words)
    with pytest.raises(ValueError) as refusal:
        load_genotype(text)
    one_line(refusal, *words)


def test_a_file_that_is_no_cell(place, capsys):
    file = place.parent / "cell.json"
    for data, words in ((b"\xff\xfe", "cell.json"), (b"", "not JSON"), (b"[1, 2]", "expected"), (b"PK\x03\x04", "not JSON")):
        file.write_bytes(data)
        refused(cli.main, ["retrain", "--corpus", place.parent / "corpus", *SMALL, "--genotype", file], place, capsys, str(file), words)


SAMPLES = {
    "an op missing": ({"cell/node_1/input": "0", "cell/node_1/op": "tanh", "cell/node_2/input": "1"}, "node_2"),
    "an input missing": ({"cell/node_1/op": "tanh"}, "sample: label 'cell/node_1/input' is missing"),
    "the first node missing": ({"cell/node_2/input": "0", "cell/node_2/op": "tanh"}, "sample: label 'cell/node_1/op' is missing"),
    "an op misspelt": ({"cell/node_1/input": "0", "cell/node_1/op": "sigmod"}, "did you mean 'sigmoid'?"),
    "a later node": ({"cell/node_1/input": "1", "cell/node_1/op": "tanh"}, "node 1 reads state 1"),
    "a label misspelt": ({"cel/node_1/input": "0"}, "the tuner drew no cell: the search space needs cell/node_<i>/op"),
    "no cell at all": ({}, "the tuner drew no cell"),
    "a search's field": ({"cell/node_1/input": "0", "cell/node_1/op": "tanh", "search.lr": 1}, "a trial of a cell has no search"),
    "a bad seed": ({"cell/node_1/input": "0", "cell/node_1/op": "tanh", "seed": -1}, "seed: -1 must be a whole number"),
    "no budget": ({"cell/node_1/input": "0", "cell/node_1/op": "tanh", "TRIAL_BUDGET": 0}, "retrain.epochs: 0 must be a whole number of at least 1"),
}


@pytest.mark.parametrize("sample, words", SAMPLES.values(), ids=SAMPLES)
def test_samples_of_a_tuner(sample, words, place, capsys, monkeypatch):
    monkeypatch.setattr(nni, "get_next_parameter", lambda: sample)  # stands for the tuner alone
    refused(cell_trial.main, ["--corpus", place.parent / "corpus", *SMALL], place, capsys, words)


def test_a_search_space_with_a_typo(place, capsys, monkeypatch):
    """As a tuner hands it over: a nested choice, with a wrong word inside."""
    monkeypatch.setattr(nni, "get_next_parameter", lambda: {"seed": 1, "search": {"_name": "paper", "archlr": 0.003}})
    refused(trial.main, ["--corpus", place.parent / "corpus", *SMALL], place, capsys, "'search.archlr' is no field", "did you mean 'search.arch_lr'?")


CALLS = {  # Python alone
    "vocabulary twice": (lambda: Vocabulary(("a", "a", "<eos>", "<unk>")), "'a' occurs more than once"),
    "vocabulary without <eos>": (lambda: Vocabulary(("a", "<unk>")), "<eos> and <unk> must be among the words"),
    "vocabulary of a number": (lambda: Vocabulary.from_json("[1]"), "expected a JSON list of words"),
    "vocabulary of no JSON": (lambda: Vocabulary.from_json("\x80\x04."), "vocabulary: not JSON"),
    "an id that is none": (lambda: Vocabulary(("<eos>", "<unk>")).decode([5]), "5 is no id; ids are 0 to 1"),
    "a corpus that is a number": (lambda: load_corpus(5), "corpus 5 must be a folder or one of pydoc"),
    "alpha_fraction True": (lambda: load_corpus("pydoc", alpha_fraction=True), "alpha_fraction: True"),
    "alpha_fraction a text": (lambda: load_corpus("pydoc", alpha_fraction="0.1"), "alpha_fraction: '0.1'"),
    "probabilities NaN": (lambda: derive([[float("nan")] * 5]), "the search has diverged"),
    "probabilities of another shape": (lambda: derive([[0.2] * 4]), "expected (E, 5)"),
    "probabilities of no cell": (lambda: derive([[0.2] * 5] * 2), "N nodes have N(N+1)/2 edges"),
    "layer of no features": (lambda: package.DartsRNN(0, 8), "input_size: 0 must be a whole number of at least 1"),
    "layer with an unknown cell": (lambda: package.DartsRNN(8, 8, "DARTS"), "neither a file nor one of"),
    "layer with the layers third": (lambda: package.DartsRNN(8, 8, 2), "genotype: 2 is a number"),
    "layer fed another size": (lambda: package.DartsRNN(8, 8)(torch.zeros(3, 2, 9)), "built for input_size 8"),
    "layer with another state": (lambda: package.DartsRNN(8, 8)(torch.zeros(3, 2, 8), torch.zeros(1, 5, 8)), "expected (layers·directions, B, H)"),
    "space of no nodes": (lambda: package.DartsRnnSpace(100, 8, n_nodes=0), "n_nodes: 0 must be a whole number of at least 1"),
    "space with a rate of 1": (lambda: package.DartsRnnSpace(100, 8, dropout=1.0), "dropout: 1.0 must be a number of at least 0 and below 1"),
    "model of no words": (lambda: package.LanguageModel.from_genotype(0, 8, DARTS_V2), "vocab_size: 0"),
    "strategy with a negative rate": (lambda: package.SecondOrderDARTS(arc_learning_rate=-1), "arc_learning_rate: -1 must be at least 0"),
    "strategy with a NaN": (lambda: package.SecondOrderDARTS(epsilon=float("nan")), "epsilon: nan must be above 0"),
    "strategy with a typo": (lambda: package.SecondOrderDARTS(hvp="exakt"), "did you mean 'exact'?"),
    "a trained model that is not there": (lambda: load_trained("nowhere"), "a folder written by save_trained is expected"),
    "a searched model without a size": (lambda: package.load_searched_model("DARTS_V2"), "vocab_size: needed to build a new model"),
    "an unknown recipe": (lambda: get_recipe("pen"), "did you mean 'penn'?"),
}


@pytest.mark.parametrize("call, words", CALLS.values(), ids=CALLS)
def test_python(call, words, place):
    with pytest.raises(ValueError) as refusal:
        call()
    one_line(refusal, words)
    assert list(place.iterdir()) == []


def test_a_number_of_words_that_memory_does_not_hold(place, capsys):
    """Refused before a tensor of that size is asked for."""
    argv = ["--corpus", place.parent / "corpus", *SMALL]
    words = ("hidden_size: ", "GB", "memory")
    refused(cli.main, ["search", *argv, "--set", "search.hidden_size=200000000"], place, capsys, "search." + words[0], *words[1:])
    refused(cli.main, ["retrain", "--genotype", "ENAS", *argv, "--set", "retrain.hidden_size=200000000"], place, capsys, "retrain." + words[0], *words[1:])
    refused(trial.main, [*argv, "--set", "retrain.hidden_size=200000000"], place, capsys, "retrain." + words[0], *words[1:])  # before the search


def test_more_distinct_words_than_any_softmax_holds(place, capsys, monkeypatch):
    from nni_darts_rnn import corpus

    monkeypatch.setattr(corpus, "_MOST_WORDS", 1000)  # four million words would take a minute to write
    (place.parent / "corpus" / "train.txt").write_text(" ".join(map(str, range(2000))), encoding="utf-8")
    refused(cli.main, ["search", "--corpus", place.parent / "corpus", *SMALL], place, capsys, "more than 1,000 distinct words; put <unk> for the rare")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("way", WAYS)
def test_no_gpu(way, place, capsys):
    main, argv = WAYS[way]
    refused(main, [*argv, "--corpus", place.parent / "corpus", *SMALL, "--device", "gpu"], place, capsys, "device: gpu was asked for", "use auto or cpu")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork, and a process cannot give up rights for a while")
@pytest.mark.parametrize("command", [["search"], ["retrain", "--genotype", "ENAS"]], ids=lambda c: c[0])
def test_a_folder_without_permission(command, place, capfd):
    """In a process of its own, which gives up what the administrator may do."""
    locked = place / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    for folder in (place, *place.parents):
        if os.stat(folder).st_uid == os.geteuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
        if folder.name.startswith("pytest-of"):
            break
    argv = [*command, "--json", "--corpus", str(place.parent / "corpus"), *SMALL, "--out", str(locked / "out")]
    child = os.fork()
    if not child:
        code = 99
        try:
            if os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            code = cli.main(argv)
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    text = capfd.readouterr()
    assert code == 2 and len(text.err.splitlines()) == 1 and "Permission denied" in text.err and "locked" in text.err, text.err
    assert list(locked.iterdir()) == []


PROCESSES = {
    "the command line": (["-m", "nni_darts_rnn.cli", "search", "--corpus", "pen"], "did you mean 'penn'?"),
    "the trial": (["-m", "nni_darts_rnn.trial", "--corpus", "pydoc", "--recipe", "tinny"], "did you mean 'tiny'?"),
    "a trial of a cell": (["-m", "nni_darts_rnn.cell_trial", "--speed", "9"], "unrecognized arguments: --speed 9"),
}


@pytest.mark.parametrize("argv, words", PROCESSES.values(), ids=PROCESSES)
def test_in_a_process_of_its_own(argv, words, place):
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, timeout=120)
    lines = [line for line in done.stderr.splitlines() if "error: " in line]
    assert done.returncode == 2 and not done.stdout and len(lines) == 1 and words in lines[0], done.stderr
    assert "Traceback" not in done.stderr and list(place.iterdir()) == []


def test_a_port_that_is_taken(tmp_path):
    """nnictl's own refusal, in front of ours: the experiment of the example is not begun."""
    shutil.copytree(Path(__file__).parents[1] / "examples", tmp_path / "examples")
    shutil.copytree(Path(__file__).parents[1] / "search_spaces", tmp_path / "search_spaces")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run([str(Path(sys.executable).parent / "nnictl"), "create", "--config", str(tmp_path / "examples" / "darts_rnn.yml"), "--port", str(port)],
                              capture_output=True, text=True, timeout=120, env=os.environ | {"HOME": str(tmp_path)})
    assert done.returncode != 0 and f"{port}" in done.stdout + done.stderr, done.stdout + done.stderr


def test_there_are_enough():
    assert sum(len(table) for table in (TEXTS, CORPORA, SETTINGS, CELLS, SAMPLES, CALLS, PROCESSES)) >= 60
