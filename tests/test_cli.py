"""The command line and the trial: help, the table of recipes, and for every bad input one line, status 2 and nothing written."""

import json
import os
import shlex
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import nni
import numpy as np
import pytest
import torch

from nni_darts_rnn import __version__, cli, trial
from nni_darts_rnn.corpus import load_corpus
from nni_darts_rnn.genotype import derive, load_genotype
from nni_darts_rnn.options import Parser, add_run_options, checked_recipe, checked_seed
from nni_darts_rnn.outputs import figures
from nni_darts_rnn.plot.alpha import probabilities
from nni_darts_rnn.recipes import RECIPES, flatten, get_recipe
from nni_darts_rnn.text.baselines import counted
from nni_darts_rnn.trained import load_trained, save_trained

TEXT = "the cat sat on the mat\nthe dog sat on the cat\n"
# the smallest whole run; one thread would stay set for the tests that follow, so none is asked for
SMALL = ["--recipe", "tiny", "--device", "cpu", "--set", "search.batch_size=4", "--set", "search.eval_batch_size=4", "--set", "search.n_nodes=2",
         "--set", "retrain.epochs=1", "--set", "retrain.batch_size=4", "--set", "retrain.eval_batch_size=4", "--set", "retrain.test_batch_size=4"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working folder, which is a trial's output folder too; a corpus elsewhere."""
    corpus, here = tmp_path / "corpus", tmp_path / "here"
    corpus.mkdir()
    here.mkdir()
    for split, times in (("train", 20), ("valid", 8), ("test", 8)):
        (corpus / f"{split}.txt").write_text(TEXT * times, encoding="utf-8")
    monkeypatch.chdir(here)
    monkeypatch.setenv("NNI_OUTPUT_DIR", str(here))
    return here


def status(main, *argv) -> int:
    try:
        return main([str(a) for a in argv])
    except SystemExit as leaving:  # argparse's way
        return leaving.code


def test_help_names_every_command_and_option(capsys):
    assert status(cli.main, "--help") == 0
    text = capsys.readouterr().out
    assert all(command in text for command in ("search", "retrain", "evaluate", "recipes"))
    for command, options in (("search", "--out --seed --corpus --recipe --set --device --threads --json --alpha-fraction"),
                             ("retrain", "--genotype --out"), ("evaluate", "model --corpus-folder --corpus-mirror"), ("recipes", "--json")):
        assert status(cli.main, command, "--help") == 0
        text = capsys.readouterr()
        assert not text.err and all(f"  {option} " in text.out for option in options.split())  # each on a line of its own, not in an example
    assert status(trial.main, "--help") == 0 and "--recipe" in capsys.readouterr().out
    assert status(cli.main, "--version") == 0 and capsys.readouterr().out.strip() == __version__


def test_table_of_recipes(capsys):
    assert status(cli.main, "recipes") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["search.*", *RECIPES]
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.startswith(("search.", "retrain."))}
    assert rows["search.hidden_size"][:5] == ["300", "300", "64", "64", "8"]
    assert rows["retrain.weight_decay"][:5] == ["8e-07", "5e-07", "8e-07", "8e-07", "8e-07"]
    for part in ("search", "retrain"):
        for field in vars(getattr(RECIPES["penn"], part)):
            shown = rows[f"{part}.{field}"][:len(RECIPES)]
            for text, recipe in zip(shown, RECIPES.values()):
                value = getattr(getattr(recipe, part), field)
                assert str(value) == text
            assert len(rows[f"{part}.{field}"]) > len(RECIPES)  # and its meaning


def test_recipes_for_machines(capsys):
    assert status(cli.main, "recipes", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {name: recipe.to_dict() for name, recipe in RECIPES.items()}


def test_as_a_program():
    command = [sys.executable, "-m", "nni_darts_rnn.cli"]
    done = subprocess.run([*command, "recipes", "--json"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr and set(json.loads(done.stdout)) == set(RECIPES)
    done = subprocess.run([*command, "search", "--set", "search.n_nodes=0"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and not done.stdout and len(done.stderr.splitlines()) == 1 and "search.n_nodes" in done.stderr
    (script,) = entry_points(group="console_scripts", name="nni-darts-rnn")
    assert script.load() is cli.main


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_letters_that_a_locale_lacks_are_escaped(encoding):
    done = subprocess.run([sys.executable, "-m", "nni_darts_rnn.cli", "recipes"], capture_output=True, timeout=60, env={**os.environ, "PYTHONIOENCODING": encoding})
    assert done.returncode == 0 and not done.stderr and b"\\u03b1" in done.stdout


def test_a_reader_that_has_had_enough():
    program = subprocess.Popen([sys.executable, "-m", "nni_darts_rnn.cli", "recipes"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    program.stdout.close()
    assert program.stderr.read() == b"" and program.wait(timeout=60) == 128 + 13


def test_what_does_not_fit_in_memory_is_one_line(place, capsys, monkeypatch):
    def too_large(*arguments):
        return torch.empty(10**15)

    monkeypatch.setattr("nni_darts_rnn.pipeline.search_phase", too_large)
    arguments = ["search", "--corpus", place.parent / "corpus", *SMALL]
    assert status(cli.main, *arguments) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("nni-darts-rnn: error: out of memory (") and last.endswith("; take fewer units, a smaller batch, or a shorter bptt")
    monkeypatch.setattr("nni_darts_rnn.pipeline.search_phase", lambda *arguments: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):  # a fault, and no refusal
        cli.main(list(map(str, arguments)))


RUN_OPTIONS = {  # options that `search`, `retrain`, `evaluate` and the trial share
    "unknown recipe": (["--recipe", "pen"], "recipe 'pen' is none of penn, wikitext-2, drawn, small, tiny; did you mean 'penn'?"),
    "unknown key": (["--set", "search.epoch=3"], "did you mean 'search.epochs'?"),
    "key without part": (["--set", "epochs=3"], "use search.<field> or retrain.<field>"),
    "no value": (["--set", "search.epochs"], "must be KEY=VALUE"),
    "no key": (["--set", "=3"], "setting '' is no field"),
    "empty value": (["--set", "search.epochs="], "search.epochs: '' must be a whole number"),
    "no nodes": (["--set", "search.n_nodes=0"], "search.n_nodes: '0' must be a whole number of at least 1"),
    "too many nodes": (["--set", "search.n_nodes=1000"], "at most 64"),
    "too large for float32": (["--set", "search.arch_lr=1e39"], "search.arch_lr: '1e39' must be a number of at least 0, and at most 1e+30"),
    "NaN": (["--set", "search.lr=nan"], "search.lr: 'nan' must be a number of at least 0"),
    "infinite": (["--set", "search.lr=inf"], "search.lr: 'inf'"),
    "negative": (["--set", "retrain.lr=-1"], "retrain.lr: '-1'"),
    "no number": (["--set", "retrain.dropout=half"], "retrain.dropout: 'half' must be a number of at least 0 and below 1"),
    "fraction of an epoch": (["--set", "retrain.epochs=1.5"], "a whole number"),
    "supernet of one stream": (["--set", "search.batch_size=1"], "at least 2"),
    "unknown hvp": (["--set", "search.hvp=exat"], "did you mean 'exact'?"),
    "clip at zero": (["--set", "search.clip=0"], "search.clip: '0'"),
    "lengths that cannot be": (["--set", "retrain.min_bptt=500"], "retrain.min_bptt: 500 must be at most bptt + max_bptt_above"),
    "unknown corpus": (["--corpus", "pen"], "neither a folder nor one of pydoc, penn, wikitext-2, wikitext-103; did you mean 'penn'?"),
    "corpus not here": (["--corpus", "wikitext-103", "--corpus-folder", "nowhere"], "nowhere: no such folder"),
    "corpus without texts": (["--corpus", "."], "train.txt is missing"),
    "folder of no named corpus": (["--corpus-folder", "."], "folder and mirror are for penn"),
    "α's part": (["--alpha-fraction", "1"], "alpha_fraction: 1.0"),
    "α's part no number": (["--alpha-fraction", "some"], "argument --alpha-fraction: invalid float value: 'some'"),
    "α's part NaN": (["--alpha-fraction", "nan"], "alpha_fraction: nan"),
    "unknown device": (["--device", "cuda"], "argument --device: invalid choice: 'cuda'"),
    "no threads": (["--threads", "0"], "--threads: 0 must be from 1 to 1024"),
    "too many threads": (["--threads", "99999999999999"], "--threads: 99999999999999 must be from 1 to 1024"),
    "threads no number": (["--threads", "two"], "argument --threads: invalid int value: 'two'"),
    "unknown option": (["--speed", "9"], "unrecognized arguments: --speed 9"),
}


def refused(capsys, place, code: int, words: str) -> None:
    text = capsys.readouterr()
    assert code == 2
    assert len(text.err.splitlines()) == 1 and words in text.err and "error: " in text.err, text.err
    assert not text.out and list(place.iterdir()) == []


@pytest.mark.parametrize("options, words", RUN_OPTIONS.values(), ids=RUN_OPTIONS)
@pytest.mark.parametrize("command", [["search"], ["retrain", "--genotype", "ENAS"]], ids=lambda c: c[0])
def test_search_and_retrain_refuse(command, options, words, place, capsys):
    corpus = [] if any(o.startswith("--corpus") for o in options) else ["--corpus", place.parent / "corpus"]
    if options[0] == "--alpha-fraction" and command[0] == "retrain":  # which has no α
        words = "unrecognized arguments: --alpha-fraction"
    refused(capsys, place, status(cli.main, *command, *corpus, "--out", place / "out", *options), words)


@pytest.mark.parametrize("argv, words", [
    ([], "the following arguments are required: COMMAND"),
    (["serch"], "invalid choice: 'serch'"),
    (["serch"], "; did you mean 'search'?"),
    (["retrain"], "the following arguments are required: --genotype"),
    (["retrain", "--genotype", "DARTS_V3"], "did you mean 'DARTS_V"),
    (["retrain", "--genotype", "nowhere.json"], "neither a file nor one of"),
    (["retrain", "--genotype", ""], "genotype '' is neither a file nor one of"),
    (["retrain", "--from", ""], "experiment '' is neither an id nor a folder"),
    (["retrain", "--genotype", '{"recurrent": [["tnah", 0]]}'], "did you mean 'tanh'?"),
    (["retrain", "--genotype", "{"], "genotype: not JSON"),
    (["search", "--seed", "-1"], "seed: '-1' must be a whole number from 0"),
    (["search", "--seed", "1.5"], "seed: '1.5'"),
    (["search", "--seed", "nan"], "seed: 'nan'"),
    (["search", "--seed", "4294967296"], "seed: '4294967296'"),
    (["search", "--set", "search.batch_size=50000", "--out", "out"], "search.batch_size: 50000 streams need a text of at least 100000 tokens"),
    (["search", "--set", "search.eval_batch_size=70", "--out", "out"], "search.eval_batch_size: 70 streams"),
    (["retrain", "--genotype", "ENAS", "--set", "retrain.batch_size=50000", "--out", "out"], "retrain.batch_size: 50000 streams"),
    (["retrain", "--genotype", "ENAS", "--set", "retrain.test_batch_size=70", "--out", "out"], "retrain.test_batch_size: 70 streams"),
    (["search", "--out", ""], "argument --out: '' is not possible: it is empty; give a folder"),
    (["search", "--resume", "must", "--out", "new"], "--resume must: there is no new to go on in"),
    (["search", "--resume", "must"], "--resume must: there is no runs/search-corpus-0 to go on in"),
    (["evaluate"], "the following arguments are required: model"),
    (["evaluate", "nowhere", "--seed", "1"], "unrecognized arguments: --seed 1"),
    (["evaluate", "nowhere", "--set", "retrain.hidden_size=500"], "--set retrain.hidden_size: evaluating uses only these fields of a recipe: retrain.bptt, "),
    (["evaluate", "nowhere", "--set", "retrain.test_batch_sise=2"], "did you mean 'retrain.test_batch_size'?"),
    (["evaluate", "nowhere"], "model.json: cannot be read"),
    (["recipes", "penn"], "unrecognized arguments: penn"),
    (["search", "--recipee", "tiny"], "search: error: unrecognized arguments: --recipee tiny; did you mean '--recipe'?"),
    (["plot", "found", "--otu=pictures"], "plot: error: unrecognized arguments: --otu=pictures; did you mean '--out'?"),
])
def test_what_each_command_refuses(argv, words, place, capsys):
    corpus = ["--corpus", place.parent / "corpus"] if argv and argv[0] in ("search", "retrain", "evaluate") else []
    refused(capsys, place, status(cli.main, *argv, *corpus), words)


def test_a_folder_where_nothing_waits_is_none_to_go_on_in(place, capsys):
    assert status(cli.main, "search", "--corpus", place.parent / "corpus", *SMALL, "--resume", "must", "--out", ".") == 2
    assert "error: --resume must: checkpoint holds no checkpoint of a search" in capsys.readouterr().err and list(place.iterdir()) == []


def test_a_standard_output_that_is_closed(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    assert status(cli.main, "recipes") == 0

    def told_nobody(arguments):
        raise BrokenPipeError  # of standard error, whose reader has gone

    monkeypatch.setattr(cli.compute, "recipes", told_nobody)
    assert status(cli.main, "recipes") == 141


def test_a_standard_error_that_is_closed_or_full(place, capsys, monkeypatch):
    (place / "genotype.json").write_text(load_genotype("ENAS").to_json())
    monkeypatch.setattr("sys.stderr", None)
    assert status(cli.main, "plot", place, "--out", place.parent / "pictures") == 0
    assert all(Path(line).is_file() for line in capsys.readouterr().out.splitlines())  # and no word that was for standard error
    sys.stderr.close()
    if os.path.exists("/dev/full"):
        done = subprocess.run([sys.executable, "-m", "nni_darts_rnn.cli", "plot", str(place)], stdout=subprocess.PIPE, stderr=open("/dev/full", "w"), timeout=60)
        assert done.returncode in (0, 120) and len(done.stdout.splitlines()) == 2  # 120: Python's own, of what it could not flush


def test_an_out_that_is_a_file_is_refused(place, capsys):
    out = place.parent / "file"
    out.write_text("mine")
    for path in (out, out / "below"):
        refused(capsys, place, status(cli.main, "search", "--corpus", place.parent / "corpus", *SMALL, "--out", path), "file is a file; give a folder")
    assert out.read_text() == "mine"


def test_a_page_takes_the_place_of_no_device_and_no_pipe(place, capsys):
    pipe, page = place.parent / "pipe", "is a device or a pipe; give a file"
    os.mkfifo(pipe)
    (place.parent / "link").symlink_to(os.devnull)
    for out in (pipe, place.parent / "link"):
        refused(capsys, place, status(cli.main, "report", "abcd1234", "--out", out), page)
    assert pipe.is_fifo() and (place.parent / "link").is_symlink()


def test_a_page_in_a_place_that_the_system_does_not_look_at(place, capsys):
    refused(capsys, place, status(cli.main, "report", "abcd1234", "--out", "y" * 300), "abcd1234")  # as in a folder of somebody else's


def test_a_path_with_a_line_break_is_refused_in_one_line(place, capsys):
    for argv in (["plot", "a\nb"], ["evaluate", "a\nb", "--corpus", place.parent / "corpus"], ["retrain", "--genotype", "ENAS", "--corpus", "penn", "--corpus-folder", "a\nb"]):
        refused(capsys, place, status(cli.main, *argv), "a b")


def test_a_home_that_is_not_known_and_a_link_to_nothing(place, capsys):
    corpus, nobody = place.parent / "corpus", "~nobody-of-this-name/x"
    for argv in (["search", "--corpus", nobody], ["search", "--corpus", corpus, "--out", nobody], ["search", "--corpus", "penn", "--corpus-folder", nobody],
                 ["init", nobody], ["report", "a", "--out", nobody + ".html"]):
        refused(capsys, place, status(cli.main, *argv), "begins with a home folder that this machine does not know")
    (place.parent / "link").symlink_to("nothing")
    for path in ("link", "link/below"):
        refused(capsys, place, status(cli.main, "search", "--corpus", corpus, "--out", place.parent / path), "link is a link to nothing; give a folder")


@pytest.mark.parametrize("options, words", RUN_OPTIONS.values(), ids=RUN_OPTIONS)
def test_the_trial_refuses_options(options, words, place, capsys):
    corpus = [] if any(o.startswith("--corpus") for o in options) else ["--corpus", place.parent / "corpus"]
    refused(capsys, place, status(trial.main, *corpus, *options), words)


@pytest.mark.parametrize("parameters, words", [
    ({"lr": 1}, "setting 'lr' is no field of a recipe"),
    ({"search.arch_lrr": 0.1}, "did you mean 'search.arch_lr'?"),
    ({"seed": -1}, "seed: -1"),
    ({"seed": 0.5}, "seed: 0.5"),
    ({"seed": True}, "seed: True"),
    ({"seed": "one"}, "seed: 'one'"),
    ({"seed": None}, "seed: None"),
    ({"seed": float("inf")}, "seed: inf"),
    ({"seed": float("nan")}, "seed: nan"),
    ({"search.n_nodes": 0}, "search.n_nodes: 0"),
    ({"search": {"_name": "a", "dropout": 2}}, "search.dropout: 2"),
    ({"retrain.test_batch_size": 70}, "retrain.test_batch_size: 70 streams need"),  # before the search, not after the retraining
])
def test_the_trial_refuses_parameters(parameters, words, place, capsys, monkeypatch):
    # stands for the tuner alone, which standalone mode does not have
    monkeypatch.setattr(nni, "get_next_parameter", lambda: parameters)
    code = status(trial.main, "--corpus", place.parent / "corpus", *SMALL)
    text = capsys.readouterr()
    assert code == 2 and text.err.splitlines()[-1].startswith("error: ") and words in text.err
    assert len(text.err.splitlines()) == 1 and list(place.iterdir()) == []


def test_the_tuners_parameters_win_over_set():
    arguments = trial_arguments("--recipe", "tiny", "--set", "search.lr=2", "--set", " search.epochs = 3 ", "--set", "search.lr=4")
    recipe = checked_recipe(arguments, {"search": {"epochs": np.int64(9)}})
    assert recipe.search.lr == 4 and recipe.search.epochs == 9  # the last of two `--set` counts
    assert checked_recipe(arguments, {}).search.epochs == 3


@pytest.mark.parametrize("given, drawn", [
    (("search.warmup_epochs=6",), {"search.epochs": 8}),  # `small` has 6 epochs
    (("search.warmup_epochs=6",), {"search": {"_name": "long", "epochs": 8}}),
    (("retrain.optimizer=adam", "retrain.lr=0.005"), {"retrain.nonmono": "none"}),
])
def test_set_and_the_tuners_parameters_are_checked_together(given, drawn):
    """Each alone is not allowed."""
    arguments = trial_arguments(*(word for setting in given for word in ("--set", setting)))
    recipe = checked_recipe(arguments, drawn)
    assert recipe == get_recipe("small", dict(setting.split("=") for setting in given) | flatten(drawn))
    with pytest.raises(ValueError, match="must be below search.epochs|turns averaging on"):
        checked_recipe(arguments, {})


def test_a_retraining_leaves_a_finished_trial_as_it_is(place, capsys, monkeypatch):
    """`best` and `report` read the trial's result.json, which says nothing of a model that took its model's place."""
    monkeypatch.setattr(nni, "get_next_parameter", lambda: {"seed": 1})
    common = ["--corpus", place.parent / "corpus", *SMALL]
    assert status(trial.main, *common) == 0
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    assert status(cli.main, "retrain", *common, "--genotype", place, "--out", place, "--seed", "2") == 2
    assert f"{place} holds the result of a trial, whose model would be replaced; give another folder" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


def trial_arguments(*argv):
    parser = Parser()
    add_run_options(parser)
    return parser.parse_args(argv)


@pytest.mark.parametrize("value, seed", [(0, 0), ("7", 7), (7.0, 7), (np.int64(7), 7), (2**32 - 1, 2**32 - 1)])
def test_seeds(value, seed):
    assert checked_seed(value) == seed and type(checked_seed(value)) is int


def test_a_trial_without_a_tuner(place, capsys, caplog, monkeypatch):
    """NNI's standalone mode: no parameters come, reports go to its log."""
    monkeypatch.setattr("nni_darts_rnn.epoch_counts.LOOK", float("inf"))  # a busy machine would be told how long it takes
    assert status(trial.main, "--corpus", place.parent / "corpus", *SMALL) == 0
    result = json.loads((place / "result.json").read_text(encoding="utf-8"))
    assert result["recipe"]["search"]["n_nodes"] == 2 and result["seed"] == 0
    assert {name: result[name] for name in ("unigram_perplexity", "bigram_perplexity")} == counted(load_corpus(place.parent / "corpus"))
    assert {"genotype.json", "model.safetensors", "model.json", "search.csv", "retrain.csv", "alpha.json", "cell.svg"} <= set(os.listdir(place))
    reports = [record.getMessage() for record in caplog.records if record.name == "nni"]
    assert f"Final result: {{'default': {result['valid_perplexity']}," in reports[-1]
    phases = [phase for r in reports[:-1] for phase in ("search", "retrain") if f"'phase': '{phase}'" in r]
    assert phases == ["search", "retrain"]  # one epoch of each
    assert not capsys.readouterr().err


@pytest.mark.parametrize("relaxation", ["edge", "node", "gumbel"])
def test_the_pictures_of_a_search_are_of_the_cell_that_it_found(relaxation, place, monkeypatch):
    assert status(cli.main, "search", "--corpus", place.parent / "corpus", *SMALL, "--set", f"search.relaxation={relaxation}", "--set", "search.arch_lr=1",
                  "--set", "search.n_nodes=5", "--out", "found") == 0
    told = figures.read_alpha(place / "found")
    assert derive(probabilities(told["history"], told["primitives"], told["relaxation"])[-1], told["primitives"]) == load_genotype(place / "found")
    assert told["epochs"] == [0, 1] and len(told["history"]) == 2
    drawn = []
    monkeypatch.setitem(figures.PICTURES, "alpha.svg", (figures.read_alpha, lambda path, **how: drawn.append(how)))
    figures.draw(place / "found", ["alpha.svg"])
    assert drawn == [told]


def test_search_retrain_evaluate(place, capsys):
    """Each leaves what the next one takes; standard output is the result alone."""
    common = ["--corpus", place.parent / "corpus", *SMALL, "--json"]
    assert status(cli.main, "search", *common, "--out", place / "a") == 0
    found = json.loads(capsys.readouterr().out)
    assert json.loads((place / "a" / "genotype.json").read_text(encoding="utf-8")) == found["genotype"] and len(found["genotype"]["recurrent"]) == 2
    assert status(cli.main, "retrain", *common, "--genotype", place / "a", "--out", place / "b") == 0
    trained = json.loads(capsys.readouterr().out)
    reading = common[:2] + ["--recipe", "tiny", "--json", "--set", "retrain.eval_batch_size=4", "--set", "retrain.test_batch_size=4"]
    assert status(cli.main, "evaluate", place / "b", *reading) == 0
    tested = json.loads(capsys.readouterr().out)
    for name in ("valid_perplexity", "test_perplexity", "unigram_perplexity", "bigram_perplexity"):
        assert tested[name] == pytest.approx(trained[name], rel=1e-6)
    # read in as many streams as after the training, of which the corpus and the recipe `small` have other numbers
    assert status(cli.main, "evaluate", place / "b", *common[:2], "--json") == 0
    assert json.loads(capsys.readouterr().out) == tested
    assert sorted(os.listdir(place)) == ["a", "b"]
    # of a text that is a folder, the model knows only the name
    assert status(cli.main, "evaluate", place / "b") == 2
    assert f"--corpus: give the text that {place / 'b'} was trained on, corpus" in capsys.readouterr().err
    # or in the package's own numbers, where what is kept beside the weights says nothing of a recipe
    model, words = load_trained(place / "b")
    save_trained(place.parent / "noted", model, words, {"corpus": "penn"})
    assert status(cli.main, "evaluate", place.parent / "noted", "--corpus-folder", place) == 2
    assert "ptb.train.txt" in capsys.readouterr().err  # the file of a text that has a name
    for extra in (["my notes"], {"recipe": ["bptt"]}, "a word", None):
        save_trained(place.parent / "noted", model, words, extra)
        assert status(cli.main, "evaluate", place.parent / "noted", *reading[:2], *reading[4:]) == 0
        assert json.loads(capsys.readouterr().out)["test_perplexity"] == pytest.approx(tested["test_perplexity"], rel=0.05)
    # what was trained carries its cell, and is not trained or searched over with another one
    assert status(cli.main, "retrain", *common, "--genotype", place / "b", "--out", place / "c") == 0
    assert json.loads(capsys.readouterr().out)["test_perplexity"] == trained["test_perplexity"]
    before = {path: path.read_bytes() for path in (place / "c").rglob("*") if path.is_file()}
    assert status(cli.main, "retrain", *common, "--genotype", "ENAS", "--out", place / "c") == 2
    assert "genotype.json holds another cell than the one to train" in capsys.readouterr().err
    assert status(cli.main, "search", *common, "--out", place / "c") == 2
    assert "c holds a trained model; a search there would leave the cell of another beside it" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (place / "c").rglob("*") if path.is_file()} == before
    (place.parent / "corpus" / "test.txt").write_text("the cat\n")
    assert status(cli.main, "evaluate", place / "b", *common[:2]) == 2
    assert "retrain.test_batch_size: 4 streams need a text of at least 8 tokens" in capsys.readouterr().err
    (place.parent / "corpus" / "test.txt").write_text(TEXT * 8, encoding="utf-8")
    (place.parent / "corpus" / "train.txt").write_text(TEXT * 20 + "a new word\n", encoding="utf-8")
    assert status(cli.main, "evaluate", place / "b", *common[:2]) == 2
    text = capsys.readouterr()
    assert "another vocabulary" in text.err and "the text of its training, corpus, as --corpus" in text.err and len(text.err.splitlines()) == 1 and not text.out
    assert status(cli.main, "evaluate", place.parent / "noted", *reading[:2], *reading[4:]) == 2  # which tells of no text
    assert "another vocabulary" in (said := capsys.readouterr().err) and "the text of its training as --corpus" in said


def test_names_that_begin_with_a_dash_or_a_tilde(place, capsys, monkeypatch):
    """The command that is printed at the end is one that works."""
    monkeypatch.setenv("HOME", str(place))
    os.rename(place.parent / "corpus", place / "-texts")
    assert status(cli.main, "search", "--corpus=-texts", *SMALL, "--out=-found") == 0
    then = shlex.split(capsys.readouterr().err.splitlines()[-1])
    assert then[:2] == ["next:", "nni-darts-rnn"] and "./-texts" in then and "./-found/genotype.json" in then
    assert status(cli.main, *then[2:], *SMALL[2:], "--out", "~/trained") == 0 and (place / "trained" / "model.json").exists()
    text = capsys.readouterr()
    assert status(cli.main, *shlex.split(text.err.splitlines()[-1])[2:]) == 0
