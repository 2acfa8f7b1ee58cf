"""The benchmarks measure what they say: every version computes the same step, at a size that takes no time."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import against_lstm
import all_words
import few_rows
import hardware
import published_step
import retrain_step
import search_step
import through_nni
from step_size import Size

from nni_darts_rnn import DARTS_V2, cli, compiled, fused
from nni_darts_rnn.genotype import Genotype
from nni_darts_rnn.model import LanguageModel
from nni_darts_rnn.published import original_gradient, tied
from nni_darts_rnn.supernet import MixedRNN

SIZE = Size(T=3, B=4, H=5, V=11, N=2)
NO_DROPOUT = 1e-12  # a mask that keeps everything; 0 would be no mask at all


@pytest.fixture(autouse=True)
def as_before():
    threads, enabled, levels = torch.get_num_threads(), fused.enabled(), {name: logging.getLogger(name).level for name in through_nni.QUIET}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    torch.set_num_threads(threads)
    fused.enable(enabled)


def test_the_published_model_is_the_readable_one(monkeypatch):
    monkeypatch.setattr(published_step, "DROPOUT", dict.fromkeys(published_step.DROPOUT, NO_DROPOUT))
    torch.manual_seed(0)
    published = published_step.OriginalModel(SIZE).double()
    readable = LanguageModel(SIZE.V, MixedRNN(SIZE.H, SIZE.H, SIZE.N)).double()
    with torch.no_grad():
        published.alpha = torch.randn(3, 5, dtype=torch.float64)
        readable.rnn.alpha.copy_(published.alpha)
        readable.encoder.weight.copy_(published.encoder.weight)
        readable.decoder.bias.copy_(published.decoder.bias.uniform_())
        readable.rnn.W0.copy_(published.W0)
        readable.rnn.Ws.copy_(torch.stack(list(published.Ws)))
    tokens, targets, _ = SIZE.batch()
    hidden = torch.randn(SIZE.B, SIZE.H, dtype=torch.float64)
    assert published(tokens, targets, hidden)[0].item() == pytest.approx(readable.loss(tokens, targets, hidden)[0].item(), rel=1e-9)


@pytest.mark.parametrize("clip, decay", [(0.25, 5e-7), (1e3, 5e-7), (0.25, 1e-2)])
def test_the_published_steps_gradient_is_the_one_that_reproduce_original_takes(monkeypatch, clip, decay):
    for name, value in {"DROPOUT": dict.fromkeys(published_step.DROPOUT, NO_DROPOUT), "CLIP": clip, "DECAY": decay, "RATE": 1.0}.items():
        monkeypatch.setattr(published_step, name, value)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # of the model that is built for w′ too
    try:
        published = published_step.Original(SIZE)
        model, train, valid, found = published.model, SIZE.batch(), SIZE.batch(), []
        weights = dict(model.named_parameters())

        def loss(at, alphas, batch):
            now, model.alpha = model.alpha, alphas[0]
            try:
                return torch.func.functional_call(model, dict(zip(weights, at)), batch, tie_weights=True)[0]
            finally:
                model.alpha = now

        expected = original_gradient(loss, list(weights.values()), [model.alpha], train, valid, lr=1.0, weight_decay=decay, clip=clip, tied=tied(model, weights))
        monkeypatch.setattr(published.arch, "step", lambda: found.append(model.alpha.grad.clone()))
        published(train, valid)
    finally:
        torch.set_default_dtype(default)
    torch.testing.assert_close(found[0], expected.grads[0], rtol=1e-6, atol=1e-12)


def test_the_published_layer_is_the_readable_one(monkeypatch):
    for name in ("DROPOUT_X", "DROPOUT_H"):
        monkeypatch.setattr(retrain_step, name, NO_DROPOUT)
    torch.manual_seed(0)
    built = retrain_step.layers(SIZE, DARTS_V2)
    published, readable = built["original"], built["readable"]
    with torch.no_grad():
        readable.W0.copy_(published.W0)
        readable.Ws.copy_(torch.stack(list(published.Ws)))
    x, h = torch.randn(SIZE.T, SIZE.B, SIZE.H), torch.randn(SIZE.B, SIZE.H)
    torch.testing.assert_close(published(x, h), readable(x, h))


@pytest.mark.skipif(not fused.available(), reason=f"no extension here: {fused.why_not()}")
def test_few_rows_compares_what_it_says(tmp_path, monkeypatch):
    """Each form runs its own way: the compiled cell with what its threads are told to share, the others without it."""
    seen, real = [], compiled.run_forward
    monkeypatch.setattr(few_rows, "shortest", lambda steps, rounds: {name: step() or 0.5 for name, step in steps.items()})
    monkeypatch.setattr(compiled, "run_forward", lambda *given, **named: seen.append(real(*given, **named)) or seen[-1])
    few_rows.main(["--units", "32", "--rows", "2", "--threads", "1", "--save", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())["tokens_per_second"]
    assert found == {"32 units, 2 rows": dict.fromkeys(("original", "rows", "units", "LSTM", "GRU"), few_rows.STEPS * 2 / 0.5)}
    assert [run.by_units for run in seen] == [False, True]


def test_all_words_keeps_what_its_commands_answered_and_runs_none_twice(tmp_path, monkeypatch):
    """Real commands on a short text, run in this process: a search, and its cell with both optimizers."""
    draw = random.Random(0)
    for split, count in (("train", 700), ("valid", 300), ("test", 60)):
        (tmp_path / f"{split}.txt").write_text("\n".join(" ".join(draw.choices("a cat dog sat ran on".split(), k=6)) for _ in range(count)) + "\n")
    monkeypatch.setenv(fused.SWITCH, "0")
    monkeypatch.setattr(all_words, "TRAINED", [(all_words.FOUND, 1, optimizer) for optimizer in ("adam", "sgd")])
    arguments = [str(tmp_path), "--work", str(tmp_path / "work"), "--save", str(tmp_path / "found.json")]

    def run(command, check, **how):
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            assert command[1:3] == ["-m", "nni_darts_rnn.cli"] and check and cli.main(command[3:]) == 0
        return subprocess.CompletedProcess(command, 0, said.getvalue())

    monkeypatch.setattr(all_words.subprocess, "run", run)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # for the tests after this one
    all_words.main(arguments)
    kept = json.loads((tmp_path / "found.json").read_text())
    assert [row["optimizer"] for row in kept["retrained"]] == ["adam", "sgd"] and kept["command"] == "python benchmarks/all_words.py FOLDER --work DIR --threads 1"
    for row in kept["retrained"]:
        model = json.loads((tmp_path / "work" / f"found-1-{row['optimizer']}" / "model.json").read_text())
        trained = model["extra"]
        assert trained["recipe"]["optimizer"] == row["optimizer"] and trained["recipe"]["hidden_size"] == 128 and trained["result"]["test_perplexity"] == row["test_perplexity"]
        assert str(Genotype.from_json(json.dumps(model["genotype"]))) == kept["search"]["genotype"]
    monkeypatch.setattr(all_words.subprocess, "run", None)
    all_words.main(arguments)
    assert json.loads((tmp_path / "found.json").read_text()) == kept


def test_a_cell_and_torchs_layers_of_as_many_parameters_are_trained_alike(tmp_path, monkeypatch):
    draw = random.Random(0)
    for split, count in (("train", 300), ("valid", 40), ("test", 40)):
        (tmp_path / f"{split}.txt").write_text("\n".join(" ".join(draw.choices("a cat dog sat ran on".split(), k=6)) for _ in range(count)) + "\n")
    sizes = ["bptt=16", "max_bptt_above=8", "batch_size=16", "eval_batch_size=16", "test_batch_size=16", "hidden_size=16", "epochs=1"]
    words = ["--corpus", str(tmp_path), "--recipe", "tiny", "--device", "cpu", "--seeds", "2", "--work", str(tmp_path / "work"),
             *(word for size in sizes for word in ("--set", f"retrain.{size}"))]
    against_lstm.main([*words, "--models", "gru", "--rates", "1", "1e-6"])  # as a second process that shares the work
    trained, train = [], against_lstm.learner.retrain
    monkeypatch.setattr(against_lstm.learner, "retrain", lambda *args, **more: trained.append(args[1]) or train(*args, **more))
    against_lstm.main([*words, "--rates", "1", "1e-6", "--save", str(tmp_path / "found.json")])
    kept = json.loads((tmp_path / "found.json").read_text())
    assert len(trained) == 2 + 3  # of the cell and the LSTM: a GRU's trainings are there
    found = {(row["model"], row["seed"], row["lr"]): row for row in kept["trained"]}
    assert set(found) == {("cell", 1, 5.0), ("cell", 2, 5.0)} | {(model, *rest) for model in ("lstm", "gru") for rest in ((1, 1.0), (1, 1e-6), (2, 1.0))}
    assert len({row["test_perplexity"] for row in found.values()}) == len(found)
    for (*_, lr), row in found.items():
        assert row["parameters"] == pytest.approx(found["cell", 1, 5.0]["parameters"], rel=0.05)
        assert lr == 1e-6 or 1 < row["test_perplexity"] < 7.9  # guessing every word alike has 8


def test_torchs_layers_read_a_text_as_themselves_and_lose_no_state():
    """Without dropout a text in two parts is the text in one, and both are what torch's own layer makes of it."""
    for kind, library in against_lstm.LIBRARY.items():
        torch.manual_seed(0)
        layer, x, none = against_lstm.LibraryLayer(kind, 5, 0.0, 0.0), torch.randn(6, 2, 5), torch.zeros(2, 5)
        whole = library(5, 5)
        whole.load_state_dict(layer.layer.state_dict())
        first = layer(x[:4], none)
        torch.testing.assert_close(torch.cat([first, layer(x[4:], first[-1])]), layer(x, none))
        torch.testing.assert_close(layer(x, none), whole(x)[0])


def test_what_torch_has_no_code_for_here_is_left_out_and_said(capsys):
    def lacking():
        raise RuntimeError("could not create a primitive descriptor for the LSTM forward propagation primitive. Run workload with\nmore")

    def broken():
        raise RuntimeError("sizes do not match")

    ran = []
    assert list(retrain_step.that_run({"LSTM": lambda: ran.append(1), "LSTM, bfloat16": lacking})) == ["LSTM"] and ran == [1]
    said = capsys.readouterr().out
    assert said.startswith("LSTM, bfloat16 is left out: torch cannot run it on this machine (could not create a primitive descriptor") and said.count("\n") == 1
    with pytest.raises(RuntimeError, match="sizes"):
        retrain_step.that_run({"GRU": broken})


def test_lstm_and_gru_have_as_many_parameters():
    large = retrain_step.layers(Size(1, 1, 850, 10, 8), DARTS_V2)
    count = 20 * 850**2
    for name in ("LSTM", "GRU"):
        matrices = sum(p.numel() for p in large[name].parameters() if p.dim() == 2)
        assert matrices == pytest.approx(count, rel=2e-3)


@pytest.mark.filterwarnings("ignore")
def test_search_step_runs_every_version_and_keeps_what_stood_there(tmp_path, monkeypatch):
    monkeypatch.setitem(search_step.SIZES, "small", SIZE)
    monkeypatch.setattr(search_step, "gemm_peak", lambda: 1e9)
    monkeypatch.setattr(search_step, "peak_memory", lambda *_: 0.5)  # processes of their own, at the true size
    (tmp_path / "found.json").write_text('{"paper": 1}')
    search_step.main(["--size", "small", "--rounds", "1", "--threads", "1", "--save", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["paper"] == 1 and list(found["small"]["versions"]) == list(search_step.VERSIONS) and found["small"]["flops"] == SIZE.flops()
    T, B, H, V, N = SIZE
    decoder, edge = 2 * T * B * H * V, 4 * T * B * H * H
    for name, row in found["small"]["versions"].items():
        edges = N * (N + 1) // 2
        whole = decoder + (edges + 2) * edge
        flops = {"original": 13 * whole, "own-gradient": 13 * whole, "nni-first-order": 6 * whole,
                 "drawn": 10 * (decoder + (N + 2) * edge) + 3 * (edges - N) * edge}.get(name, 10 * whole)
        assert row["ms"] > 0 and row["share_of_peak"] == pytest.approx(flops / row["ms"] / 1e6)
    assert found["small"]["versions"]["original"]["ratio"] == 1


def test_shortest_takes_turns_and_the_best():
    order, took = [], iter([9.0, 9.0, 3.0, 5.0, 4.0, 2.0])  # a round to warm up, which does not count, and two

    def step(name):
        order.append(name)
        return next(took)

    assert hardware.shortest({"a": lambda: step("a"), "b": lambda: step("b")}, 2) == {"a": 3.0, "b": 2.0}
    assert order == ["a", "b"] * 3
    took = iter([0.04, 0.03, 0.02, 0.04])  # a turn of short steps has several
    assert hardware.shortest({"a": lambda: next(took)}, 1) == {"a": 0.02}
