"""A run that is killed at any moment and gone on with ends bit for bit as one that is not."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from crashes import CELL, RECIPE, corpus, phase
from fastai.callback.core import Callback

from nni_darts_rnn import cell_trial, learner, pipeline, trial
from nni_darts_rnn.checkpoints.file import read_about, read_state
from nni_darts_rnn.checkpoints.stopping import Stopped, Terminated, stop_requests
from nni_darts_rnn.checkpoints.store import Checkpoints, Every, Keeping, alone_in, run_identity
from nni_darts_rnn.cli import main
from nni_darts_rnn.files import digest
from nni_darts_rnn.genotype import DARTS_V2
from nni_darts_rnn.recipes import get_recipe

TIMES = {"seconds", "tokens_per_second"}


def rows(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


def timeless(state):
    """A checkpoint's state without what a clock has measured; tensors as their bytes."""
    if isinstance(state, dict):
        return {k: timeless(v) for k, v in state.items() if k not in TIMES}
    if isinstance(state, (list, tuple)):
        return [timeless(v) for v in state]
    return (str(state.dtype), tuple(state.shape), state.numpy().tobytes()) if isinstance(state, torch.Tensor) else state


def check_same(one: Path, other: Path, name: str) -> dict:
    """Everything that two runs of the phase left is the same. Returns the last checkpoint's state."""
    files = {path.name for path in one.iterdir()}
    assert {path.name for path in other.iterdir()} == files and not any(file.startswith(".") for file in files)
    assert rows(one / f"{name}.csv") == rows(other / f"{name}.csv")
    for file in files & {"genotype.json", "alpha.json", "model.safetensors"}:
        assert digest(one / file) == digest(other / file), file
    if "model.json" in files:
        models = [json.loads((folder / "model.json").read_text()) for folder in (one, other)]
        for model in models:
            del model["extra"]["result"]["retrain_seconds"], model["checksum"]
        assert models[0] == models[1]
    kept = sorted(path.name for path in (one / "checkpoint").iterdir())
    assert sorted(path.name for path in (other / "checkpoint").iterdir()) == kept
    for file in (file for file in kept if file.endswith(".json")):
        states = [read_state(path, read_about(path)) for path in (folder / "checkpoint" / file for folder in (one, other))]
        assert timeless(states[0]) == timeless(states[1]), file
    return states[0]


@pytest.fixture(scope="module")
def crashed(tmp_path_factory) -> dict[str, tuple[Path, dict]]:
    """What each series of kills left, and what is told of it. All by one process, whose imports take as long as the rest."""
    folder = tmp_path_factory.mktemp("crashes")
    runs = ["search:1:20:anywhere", "retrain:1:20:anywhere", "search:2:12:in-write", "retrain:2:12:in-write"]
    done = subprocess.run([sys.executable, Path(__file__).with_name("crashes.py"), folder, *runs], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    told = [line for line in done.stdout.splitlines() if line.startswith("{")]  # among what Lightning says
    names = [f"{name}-{how}" for name, _, _, how in (run.split(":") for run in runs)]
    return {name: (folder / name, json.loads(line)) for name, line in zip(names, told, strict=True)}


@pytest.mark.parametrize("name", ["search", "retrain"])
def test_killed_at_twenty_random_moments(crashed, name):
    folder, done = crashed[f"{name}-anywhere"]
    assert done["killed"] >= 20, done
    state = check_same(folder / "whole", folder / "killed", name)
    assert len(rows(folder / "whole" / f"{name}.csv")) == (RECIPE.search.epochs + 1 if name == "search" else RECIPE.retrain.epochs)
    if name == "search":  # Adam's moments are there, and α has moved
        assert state["optimizers"][1]["state"][0]["exp_avg"].abs().max() > 0
        assert state["alphas"][-1] != state["alphas"][0]
    else:  # NT-ASGD has begun to average, and there is a best model
        assert state["averaging"]["averages"]["state"][0]["ax"].abs().max() > 0
        assert state["best"]["model"] is not None


@pytest.mark.parametrize("name", ["search", "retrain"])
def test_killed_while_it_writes(crashed, name):
    folder, done = crashed[f"{name}-in-write"]
    assert done["killed"] >= 12 and done["torn"] >= 3, done  # kills between the two files of a checkpoint, or in the middle of one
    check_same(folder / "whole", folder / "killed", name)


def stopped_after(saves: int, signum: int, monkeypatch) -> None:
    """A signal in the middle of the step after so many checkpoints."""
    left, save = [saves], Checkpoints.save

    def counted(self, *args):
        done = save(self, *args)
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signum)
        return done

    monkeypatch.setattr(Checkpoints, "save", counted)


@pytest.fixture
def terminal():
    """Ctrl-C as in a terminal: what a shell starts in the background ignores it, and that is kept."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("terminal")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name, signum, error", [("search", signal.SIGTERM, Terminated), ("search", signal.SIGINT, KeyboardInterrupt),
                                                 ("retrain", signal.SIGTERM, Terminated), ("retrain", signal.SIGINT, KeyboardInterrupt)])
def test_signals_finish_the_step_keep_the_run_and_end_it(tmp_path, monkeypatch, name, signum, error):
    monkeypatch.setattr(pipeline, "_draw", lambda *args: None)
    phase(name, tmp_path / "whole")
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        stopped_after(4, signum, patch)
        with pytest.raises(error):
            phase(name, tmp_path / "killed", every=5)
    assert list(tmp_path.glob(f"killed/checkpoint/{name}-000001-00000005.json"))  # in the middle of the second epoch, where all there is to keep has begun
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    phase(name, tmp_path / "killed")
    check_same(tmp_path / "whole", tmp_path / "killed", name)


@pytest.mark.filterwarnings("ignore")
def test_adam_goes_on_with_its_moments(tmp_path, monkeypatch):
    adam = {"retrain.optimizer": "adam", "retrain.lr": 0.02, "retrain.nonmono": None}
    monkeypatch.setattr("crashes.RECIPE", get_recipe(RECIPE, adam))
    monkeypatch.setattr(pipeline, "_draw", lambda *args: None)
    phase("retrain", tmp_path / "whole")
    with monkeypatch.context() as patch:
        stopped_after(4, signal.SIGTERM, patch)
        with pytest.raises(Terminated):
            phase("retrain", tmp_path / "killed", every=5)
    phase("retrain", tmp_path / "killed")
    state = check_same(tmp_path / "whole", tmp_path / "killed", "retrain")
    assert state["optimizer"]["state"][0]["exp_avg"].abs().max() > 0 and state["averaging"]["averages"] is None


@pytest.mark.usefixtures("terminal")
@pytest.mark.filterwarnings("ignore")
def test_a_second_ctrl_c_ends_a_retraining_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "_draw", lambda *args: None)
    tested = []
    monkeypatch.setattr(learner, "perplexity", lambda *args: tested.append(args))

    class Twice(Callback):
        def before_validate(self):
            if self.epoch == 1:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)

    make = learner.lm_learner
    monkeypatch.setattr(learner, "lm_learner", lambda *args, cbs, **kwargs: make(*args, cbs=[*cbs, Twice()], **kwargs))
    with pytest.raises(KeyboardInterrupt):
        phase("retrain", tmp_path / "run")
    assert not tested and not (tmp_path / "run" / "model.safetensors").exists()
    assert list(tmp_path.glob("run/checkpoint/retrain-*.json"))  # and goes on from there


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["search", "retrain"])
def test_what_else_lies_there_stays(tmp_path, name):
    """Somebody's own files, called as a model's, a checkpoint's or a draft's are elsewhere."""
    mine = [tmp_path / "whole" / path for path in ("checkpoint/llama.safetensors", "models/best.pth", ".partial-thesis.tex", "checkpoint/.partial-x.json")]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    phase(name, tmp_path / "whole")
    assert [path.read_text() for path in mine] == ["mine"] * 4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["search", "retrain"])
def test_what_had_ended_when_it_was_killed_is_not_done_again(tmp_path, name):
    """Killed after the last epoch and before its results were written: they are written from the checkpoint, without a step more."""
    phase(name, tmp_path / "whole")
    files = {path: path.read_bytes() for path in (tmp_path / "whole").iterdir() if path.is_file() and path.suffix in (".csv", ".safetensors")}
    assert files
    for path in files:
        if path.suffix == ".safetensors":
            path.unlink()
    phase(name, tmp_path / "whole")
    assert {path: path.read_bytes() for path in files} == files


@pytest.mark.usefixtures("terminal")
def test_requests_to_stop():
    with stop_requests() as stop:
        stop.obey()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Stopped, match="SIGINT"):
            stop.obey()
        with pytest.raises(KeyboardInterrupt):  # the second one does not wait for the step
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    with stop_requests() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)  # of which the second one waits too
        with pytest.raises(Stopped, match="SIGTERM"):
            stop.obey()
    assert Terminated().code == 143 and isinstance(Stopped(signal.SIGTERM).leave(), Terminated)


@pytest.mark.filterwarnings("ignore")
def test_a_whole_run_goes_on_where_it_was_and_clears_up(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "_draw", lambda *args: None)
    calls, finals = [], []
    for folder in ("whole", "killed"):
        if folder == "killed":
            with monkeypatch.context() as patch:
                stopped_after(RECIPE.search.epochs + 3, signal.SIGTERM, patch)  # the search's, and two of the retraining
                with pytest.raises(Terminated):
                    pipeline.whole_run(corpus(), RECIPE, 3, tmp_path / folder, calls.append, device="cpu", keeping=Keeping(Every()))
            said = len(calls)
            assert not (tmp_path / folder / "result.json").exists() and (tmp_path / folder / "genotype.json").exists()
        result = pipeline.whole_run(corpus(), RECIPE, 3, tmp_path / folder, calls.append, device="cpu", keeping=Keeping(Every()), final=finals.append)
        assert finals[-1] == result and not (tmp_path / folder / "checkpoint").exists() and not list((tmp_path / folder).glob(".nni-darts-rnn-*"))
    assert {(row["phase"], row["epoch"]) for row in calls[-said:]} and len(calls) == 2 * (RECIPE.search.epochs + 1 + RECIPE.retrain.epochs)
    assert {k: v for k, v in finals[0].items() if "seconds" not in k} == {k: v for k, v in finals[1].items() if "seconds" not in k}


@pytest.mark.filterwarnings("ignore")
def test_a_retraining_is_refused_the_folder_of_an_unfinished_search(tmp_path, monkeypatch, capsys):
    """Its cell may still change, and with a model there the search could not be gone on with."""
    with monkeypatch.context() as patch:
        stopped_after(2, signal.SIGTERM, patch)
        with pytest.raises(Terminated):
            pipeline.search_phase(corpus(), RECIPE.search, 3, tmp_path, device="cpu", keeping=Keeping(Every()))
    before = {path.name for path in tmp_path.iterdir()}
    for named in (tmp_path, tmp_path / "genotype.json"):
        capsys.readouterr()
        assert main(["retrain", "--corpus", "pydoc", "--recipe", "tiny", "--genotype", str(named), "--out", str(tmp_path / "other")]) == 2
        assert f"--genotype {named}: {tmp_path} holds an unfinished search, whose cell may still change; let it end first" in capsys.readouterr().err
        assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match="holds an unfinished search, whose cell may still change"):
        pipeline.retrain_phase(corpus(), tmp_path, RECIPE.retrain, 3, tmp_path, device="cpu")
    assert {path.name for path in tmp_path.iterdir()} == before
    found = pipeline.search_phase(corpus(), RECIPE.search, 3, tmp_path, device="cpu", keeping=Keeping(resume="must"))
    assert pipeline.retrain_phase(corpus(), found["genotype"], RECIPE.retrain, 3, tmp_path, device="cpu")["epochs"] == RECIPE.retrain.epochs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_new_search_is_refused_the_folder_of_an_unfinished_retraining(tmp_path, monkeypatch, resume):
    """It would replace the cell, with which alone the retraining can be gone on with."""
    monkeypatch.setattr(pipeline, "_draw", lambda *args: None)
    with monkeypatch.context() as patch:
        stopped_after(2, signal.SIGTERM, patch)
        with pytest.raises(Terminated):
            pipeline.retrain_phase(corpus(), CELL, RECIPE.retrain, 3, tmp_path, device="cpu", keeping=Keeping(Every()))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="holds an unfinished retraining, whose cell a search would replace; let it end first"):
        pipeline.search_phase(corpus(), RECIPE.search, 3, tmp_path, device="cpu", keeping=Keeping(resume=resume))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert pipeline.retrain_phase(corpus(), tmp_path, RECIPE.retrain, 3, tmp_path, device="cpu", keeping=Keeping(resume="must"))["epochs"] == RECIPE.retrain.epochs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("module", [trial, cell_trial])
def test_a_trial_killed_in_its_last_moment_trains_nothing_again(tmp_path, monkeypatch, module):
    """Between its final result and its end."""
    text = " ".join("abcdefgh"[token - 2] for token in corpus().train.tolist() if token > 1)
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text((text + "\n") * (5 if split == "train" else 1))
    monkeypatch.setenv("NNI_OUTPUT_DIR", str(tmp_path / "trial"))
    options = ["--corpus", str(tmp_path), "--recipe", "tiny"]
    arguments = trial.make_parser().parse_args(options)
    parameters = {"seed": 1} | ({f"cell/node_1/{what}": value for what, value in (("op", "tanh"), ("input", "0"))} if module is cell_trial else {})

    def killed(result):
        raise Terminated

    with pytest.raises(Terminated):
        module.run(arguments, dict(parameters), lambda row: None, killed)
    assert (tmp_path / "trial" / "result.json").exists()
    rows, finals = [], []
    result = module.run(arguments, dict(parameters), rows.append, finals.append)
    assert rows == [] and finals == [result] and not (tmp_path / "trial" / "checkpoint").exists()


def test_whose_checkpoint_it_is(tmp_path):
    mine = run_identity(corpus(), RECIPE.search, 3)
    Checkpoints(tmp_path, "search", mine).save(0, 1, {"rollbacks": 0, "weight": torch.zeros(1)})
    found = Checkpoints(tmp_path, "search", mine).load()
    assert (found["rollbacks"], found["epoch"], found["batch"]) == (0, 0, 1)
    assert Checkpoints(tmp_path, "retrain", mine).load() is None
    other_seed, other_text = run_identity(corpus(), RECIPE.search, 4), corpus()
    other_text.train[5] = (other_text.train[5] + 1) % 10
    with pytest.raises(ValueError, match=r"seed: 3 there, 4 here\); give those to go on, another folder, or --resume never"):
        Checkpoints(tmp_path, "search", other_seed).load()
    with pytest.raises(ValueError, match="corpus.sha256"):
        Checkpoints(tmp_path, "search", run_identity(other_text, RECIPE.search, 3)).load()


def test_a_text_is_told_from_another_all_over_it():
    for length, places in ((65535, (0, 65534)), (200_000, (0, 63 * 3125, 63 * 3125 + 1023))):
        text = replace(corpus(), train=torch.arange(length) % 7)
        mine = run_identity(text, RECIPE.search, 3)
        assert run_identity(replace(text, train=text.train.clone()), RECIPE.search, 3) == mine
        for place in places:
            other = text.train.clone()
            other[place] += 1
            assert run_identity(replace(text, train=other), RECIPE.search, 3)["corpus"]["sha256"] != mine["corpus"]["sha256"]
    assert Keeping().every == Every(seconds=300)


@pytest.mark.filterwarnings("ignore")
def test_begin_anew_or_must_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "_draw", lambda *args: None)
    with pytest.raises(ValueError, match="--resume must: .* holds no checkpoint of a search"):
        pipeline.search_phase(corpus(), RECIPE.search, 3, tmp_path / "new", device="cpu", keeping=Keeping(resume="must"))
    assert not list((tmp_path / "new").iterdir())
    with monkeypatch.context() as patch, pytest.raises(Terminated):
        stopped_after(3, signal.SIGTERM, patch)
        phase("search", tmp_path / "run")
    with pytest.raises(ValueError, match="seed: 3 there, 4 here"):
        pipeline.search_phase(corpus(), RECIPE.search, 4, tmp_path / "run", device="cpu")
    found = pipeline.search_phase(corpus(), RECIPE.search, 4, tmp_path / "run", device="cpu", keeping=Keeping(resume="never"))
    assert found["rows"][-1]["epoch"] == RECIPE.search.epochs
    with monkeypatch.context() as patch, pytest.raises(Terminated):
        stopped_after(3, signal.SIGTERM, patch)
        phase("retrain", tmp_path / "cell")
    kept = sorted((tmp_path / "cell" / "checkpoint").iterdir())
    with pytest.raises(ValueError, match="holds another cell than the one to train"):
        pipeline.retrain_phase(corpus(), "ENAS", RECIPE.retrain, 3, tmp_path / "cell", device="cpu", keeping=Keeping(resume="never"))
    assert kept and sorted((tmp_path / "cell" / "checkpoint").iterdir()) == kept  # what was refused has begun nothing anew
    with pytest.raises(ValueError, match="--resume: 'mst' is none of auto, must, never"):
        Keeping(resume="mst")


def test_how_often():
    assert Every.parse("90s") == Every(seconds=90) and Every.parse("5min") == Every(seconds=300) and Every.parse("1h") == Every(seconds=3600)
    assert Every.parse("100steps") == Every(steps=100) and Every.parse("1step") == Every(steps=1) and Every.parse("never") == Every()
    for bad in ("", "5", "0s", "-1s", "1.5h", "steps", "nan s", "10 000 steps", None):
        with pytest.raises(ValueError, match="--checkpoint-every: .* must be like 90s"):
            Every.parse(bad)
    store = Checkpoints("nowhere", "search", {}, Every(steps=3))
    assert [store.due() for _ in range(3)] == [False, False, True]
    assert not Checkpoints("nowhere", "search", {}, Every()).due()
    assert Checkpoints("nowhere", "search", {}, Every(seconds=0)).due()


def test_the_first_setting_that_differs_is_named(tmp_path):
    Checkpoints(tmp_path, "search", {"seed": 1, "recipe": {"lr": 1.0, "epochs": 2, "clip": 0.5}}).save(0, 0, {})
    with pytest.raises(ValueError, match=r"holds an unfinished search with other settings \(recipe.epochs: 2 there, 3 here\)"):
        Checkpoints(tmp_path, "search", {"seed": 1, "recipe": {"lr": 1.0, "epochs": 3, "clip": 0.1}}).load()


def test_two_processes_do_not_work_in_one_folder(tmp_path):
    code = f"from nni_darts_rnn.checkpoints.store import alone_in\nwith alone_in({str(tmp_path)!r}): pass"
    with alone_in(tmp_path) as kept:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert done.returncode == 1 and "another process is at work in this folder" in done.stderr
        (kept / ".nni-darts-rnn-partial-search-abc.json").write_text("{")
        (kept / "search-000000-00000001.safetensors").write_bytes(b"torn")
        (tmp_path / ".nni-darts-rnn-partial-retrain-abc.csv").write_text("")
        (kept / "search-000000-00000000.json").write_text("{}")
    with alone_in(tmp_path) as kept:  # what a process that was killed left half written is gone, and the lock is free again
        assert sorted(path.name for path in kept.iterdir()) == ["lock", "search-000000-00000000.json"]
        (kept / "search-000000-00000000.json").unlink()
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore")
def test_through_the_command_line(tmp_path, monkeypatch):
    """SIGTERM ends `nni-darts-rnn search` with status 143; the same command goes on, says so, and ends as a search that was never stopped."""
    text = " ".join("abcdefgh"[token - 2] for token in corpus().train.tolist() if token > 1)
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text((text + "\n") * (5 if split == "train" else 1))
    settings = {"search.batch_size": 4, "search.eval_batch_size": 4, "search.epochs": 4}
    command = [sys.executable, "-m", "nni_darts_rnn.cli", "search", "--recipe", "tiny", "--threads", "1", "--corpus", str(tmp_path), "--json",
               "--checkpoint-every", "1step", *(word for key, value in settings.items() for word in ("--set", f"{key}={value}"))]
    command += ["--out", str(tmp_path / "killed")]
    env = os.environ | {"PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None and not list(tmp_path.glob("killed/checkpoint/search-000001-*[2-9].json")):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in err and "the same command goes on from there" in err and not out, err
    done = subprocess.run([*command, "--resume", "must"], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0 and "search: goes on from epoch " in done.stderr, done.stderr
    assert not (tmp_path / "killed" / "checkpoint").exists()
    from nni_darts_rnn.corpus import load_corpus

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pipeline.search_phase(load_corpus(tmp_path), get_recipe("tiny", settings).search, 0, tmp_path / "whole")
    torch.set_num_threads(threads)
    assert rows(tmp_path / "killed" / "search.csv") == rows(tmp_path / "whole" / "search.csv")
    assert digest(tmp_path / "killed" / "alpha.json") == digest(tmp_path / "whole" / "alpha.json")


def test_a_trial_with_text_apart_for_alpha_goes_on_by_the_command_that_has_no_such_text(tmp_path):
    """A retraining reads all of the training text, whatever part of it the search kept apart."""
    whole = corpus()
    apart = replace(whole, train=whole.train[:-200], alpha=whole.train[-200:], undivided=whole.train)
    identity = pipeline._retrain_identity(apart, DARTS_V2, RECIPE.retrain, 0)
    assert torch.equal(apart.without_alpha().train, whole.train)
    assert identity == pipeline._retrain_identity(whole, DARTS_V2, RECIPE.retrain, 0) != pipeline._retrain_identity(whole, DARTS_V2, RECIPE.retrain, 1)
