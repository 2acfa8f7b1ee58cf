"""The faults of NNI 3.0 that are worked round: each shown on NNI's own class, and gone in ours. A test whose first half fails says that the
workaround can go."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import nni
import numpy as np
import pytest
import torch
from nni.algorithms.hpo.hyperband_advisor import Hyperband as NniHyperband
from nni.mutable import CategoricalMultiple, Numerical, ensure_frozen
from nni.nas import strategy as nni_strategy
from nni.nas.evaluator import FunctionalEvaluator
from nni.nas.evaluator.pytorch import DataLoader, Lightning, LightningModule, Trainer
from nni.nas.experiment import NasExperiment
from nni.nas.experiment.config import NasExperimentConfig
from nni.nas.nn.pytorch import InputChoice, LayerChoice, ModelSpace, MutableLinear, Repeat
from nni.nas.oneshot.pytorch.profiler import ExpectationProfilerPenalty
from nni.nas.oneshot.pytorch.supermodule.sampling import PathSamplingLayer
from nni.nas.profiler.pytorch.flops import NumParamsProfiler
from nni.nas.space import model_context
from nni.runtime.trial_command_channel import TrialCommandChannel, get_default_trial_command_channel, set_default_trial_command_channel
from nnictl import free_port
from scipy import stats
from torch import nn

from nni_darts_rnn import strategies
from nni_darts_rnn.corpus import EOS, UNK, Corpus, Vocabulary
from nni_darts_rnn.evaluator import search_evaluator
from nni_darts_rnn.hyperband import Hyperband
from nni_darts_rnn.nas_in_trial import trial_reports
from nni_darts_rnn.own_parameters import own_parameters
from nni_darts_rnn.recipes import get_recipe
from nni_darts_rnn.search import make_space

pytestmark = pytest.mark.filterwarnings("ignore")  # NNI's and Lightning's advice
RECIPE = get_recipe("tiny", {"search": {"hidden_size": 6, "n_nodes": 2, "batch_size": 8, "eval_batch_size": 4, "bptt": 6}}).search
tianshou = pytest.mark.skipif(find_spec("tianshou") is None, reason="tianshou>=0.4.8,<0.5 is not installed (the extra `rl`)")


def text() -> Corpus:
    generator = torch.Generator().manual_seed(0)
    vocab = Vocabulary((EOS, UNK, *"abcdefgh"))
    return Corpus("made", vocab, *(torch.randint(len(vocab), (k,), generator=generator) for k in (400, 200, 100)))


def one_shot(strategy, folder, report=None):
    experiment = NasExperiment(make_space(10, RECIPE), search_evaluator(text(), RECIPE, report=report, accelerator="cpu", enable_progress_bar=False),
                               strategy)
    experiment.config.experiment_working_directory = folder
    experiment.run()
    experiment.stop()
    return strategy


def multi_trial(strategy, space, folder, trials=3, judge=lambda model: nni.report_final_result(float(torch.rand(())))):
    config = NasExperimentConfig("sequential", "raw", max_trial_number=trials, experiment_working_directory=folder)
    experiment = NasExperiment(space, FunctionalEvaluator(judge), strategy, config)
    experiment.run()
    models = list(strategy.list_models())
    experiment.stop()
    return models


class Several(ModelSpace):
    """Forty choices of layers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(LayerChoice([nn.Linear(2, 2), nn.Identity()], label=f"choice_{i}") for i in range(40)))


class Inputs(ModelSpace):
    def __init__(self):
        super().__init__()
        self.one, self.two = InputChoice(3, n_chosen=1, label="one"), InputChoice(3, n_chosen=2, label="two")
        self.layer = LayerChoice([nn.Identity(), nn.ReLU()], label="layer")


def alphas_of(strategy):
    supernet = strategy.mutate_model(Several())
    module = strategy.configure_oneshot_module(nn_module := search_evaluator(text(), RECIPE, accelerator="cpu").module)
    nn_module.set_model(supernet)
    return [id(p) for p in module.arch_parameters()], [id(choice._arch_alpha) for choice in supernet.layers]


@pytest.mark.parametrize("name", ["DARTS", "GumbelDARTS", "Proxyless"])
def test_order_of_alpha(name):
    found, in_order = alphas_of(getattr(nni_strategy, name)())
    assert set(found) == set(in_order) and found != in_order  # by address: one order in 40! is the right one
    found, in_order = alphas_of(getattr(strategies, name)())
    assert found == in_order


class Sizes(ModelSpace):
    """Choices of a small and a large layer, of every kind that has an α."""

    def __init__(self):
        super().__init__()
        self.layer = LayerChoice({"small": nn.Linear(4, 4), "large": nn.Sequential(nn.Linear(4, 40), nn.Linear(40, 4))}, label="layer")
        self.repeat = Repeat(lambda i: nn.Linear(4, 4), nni.choice("depth", [1, 2, 3]))
        self.width = MutableLinear(4, nni.choice("width", [1, 4]))
        self.skip = InputChoice(2, n_chosen=1, label="skip")

    def forward(self, x):
        y = self.width(self.repeat(self.layer(x)))
        return self.skip([y.mean(-1), x.mean(-1)])


class Zero(LightningModule):
    def training_step(self, batch, batch_idx):
        return 1e-3 * self.model(batch).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


@pytest.mark.parametrize("name", ["DARTS", "GumbelDARTS", "SecondOrderDARTS"])
def test_a_penalty_makes_costly_choices_less_likely(name):
    """An added one, on the parameters. With NNI's own strategy it changes nothing."""
    def probabilities(strategy_class, scale):
        torch.manual_seed(0)
        space = Sizes()
        penalty = ExpectationProfilerPenalty(NumParamsProfiler(space, torch.ones(8, 4)), 1.0, scale=scale)
        strategy = strategy_class(penalty=penalty, arc_learning_rate=0.1)
        supernet = strategy.mutate_model(space)
        data = DataLoader(list(torch.ones(10, 8, 4)), batch_size=None)
        evaluator = strategy.mutate_evaluator(Lightning(Zero(), Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False),
                                                        train_dataloaders=data, val_dataloaders=data))
        evaluator.evaluate(supernet)
        return {label: alpha.softmax(0).tolist() for label, alpha in strategy._arch_parameters.items()}

    theirs = getattr(nni_strategy, name, nni_strategy.DARTS)
    assert probabilities(theirs, 0.0) == probabilities(theirs, 100.0)
    without, found = (probabilities(getattr(strategies, name), scale) for scale in (0.0, 100.0))
    assert found["layer"][0] > without["layer"][0] + 0.1  # small
    assert found["depth"][0] > without["depth"][0] + 0.1
    assert found["width"][0] > without["width"][0] + 0.1


class Heavy(ExpectationProfilerPenalty):
    def profile(self, sample):
        return sample["layer"]["large"]


def test_a_penalty_with_a_gradient_is_still_the_users_penalty():
    """A callback may change its scale; a copy of the module has α of its own."""
    given = Heavy(None, 1.0)
    strategy = strategies.DARTS(penalty=given)
    training = Zero()
    training.set_model(strategy.mutate_model(Sizes()))
    module = strategy.configure_oneshot_module(training)
    assert isinstance(module.penalty, Heavy) and "forward" not in vars(given)
    module.penalty.scale = 0.0
    assert module.penalty(torch.zeros(()), None)[0] == 0.0
    module.penalty.scale = 1.0
    twin = copy.deepcopy(module)
    twin.penalty(torch.zeros(()), None)[0].backward()
    assert all(alpha.grad is None for alpha in module.arch_parameters())
    assert twin.training_module.model.layer._arch_alpha.grad is not None


def test_proxyless_exports_the_strongest_paths():
    def exported(strategy):
        supernet = strategy.mutate_model(Several())
        module = strategy.configure_oneshot_module(inner := search_evaluator(text(), RECIPE, accelerator="cpu").module)
        inner.set_model(supernet)
        with torch.no_grad():
            for choice in supernet.layers:
                choice._arch_alpha.copy_(torch.tensor([0.0, 0.5]))
        return set(module.export().values())

    torch.manual_seed(0)
    assert exported(nni_strategy.Proxyless()) == {0, 1}
    assert exported(strategies.Proxyless()) == {1}


class Repeated(ModelSpace):
    """A layer 1, 2 or 4 times."""

    def __init__(self):
        super().__init__()
        self.layer = LayerChoice([nn.Linear(2, 2), nn.Identity()], label="layer")
        self.repeat = Repeat(lambda i: nn.Linear(2, 2), nni.choice("depth", [1, 2, 4]))


def test_proxyless_exports_the_likeliest_depth():
    strategy = strategies.Proxyless()
    supernet = strategy.mutate_model(Repeated())
    module = strategy.configure_oneshot_module(inner := search_evaluator(text(), RECIPE, accelerator="cpu").module)
    inner.set_model(supernet)
    blocks = [supernet.repeat.blocks[k] for k in range(1, 4)]
    for towards, depth in ((2.0, 4), (-2.0, 1), (0.4, 2)):  # at 0.4 a depth of 3 is likeliest, which is none of the choices
        with torch.no_grad():
            for block in blocks:
                block._arch_alpha.copy_(torch.tensor([0.0, towards]))
        chance = torch.softmax(torch.tensor([0.0, towards]), 0)[1]
        of_depth = {1: (1 - chance) ** 3, 2: 3 * chance * (1 - chance) ** 2, 3: 3 * chance ** 2 * (1 - chance), 4: chance ** 3}
        assert depth == max((1, 2, 4), key=of_depth.get)
        sample = {str(key): value for key, value in module.export().items()}
        assert sample["depth"] == depth and all(module.export() == module.export() for _ in range(5))
        assert [sample[block.label] for block in blocks] == ["1" if k < depth else "0" for k in (1, 2, 3)]
        assert Repeated().freeze(module.export()).repeat is not None


@pytest.mark.parametrize("kind, repeats", [(nni_strategy.RandomOneShot, False), (strategies.RandomOneShot, True)])
def test_random_paths_follow_the_seed(kind, repeats):
    def paths(seed):
        np.random.seed(seed)
        supernet = kind().mutate_model(make_space(10, RECIPE))
        layers = [m for m in supernet.modules() if isinstance(m, PathSamplingLayer)]
        assert len(layers) == 2 * RECIPE.n_nodes
        return [layer.resample({}) for _ in range(20) for layer in layers]

    assert (paths(3) == paths(3)) == repeats and paths(3) != paths(4)


def test_a_space_whose_weights_were_trained_on_random_paths_is_drawn_from_as_before():
    space = make_space(10, RECIPE)
    before = [space.random(random_state=np.random.RandomState(5)) for _ in range(2)]
    strategies.RandomOneShot().mutate_model(space)
    after = [space.random(random_state=np.random.RandomState(5)) for _ in range(2)]
    assert [model.genotype() for model in after] == [model.genotype() for model in before]


@tianshou
def test_enas_loader(tmp_path):
    with pytest.raises(Exception):
        one_shot(nni_strategy.ENAS(reward_metric_name="default"), tmp_path)
    one_shot(strategies.ENAS(), tmp_path)


@tianshou
@pytest.mark.parametrize("kind, kept", [(nni_strategy.ENAS, False), (strategies.ENAS, True)])
def test_enas_exports_from_the_controller_that_it_trained(kind, kept):
    strategy = kind(reward_metric_name="default")
    supernet = strategy.mutate_model(make_space(10, RECIPE))
    module = strategy.configure_oneshot_module(search_evaluator(text(), RECIPE, accelerator="cpu").module)
    module.set_model(supernet)
    trained = module.policy
    module.set_model(supernet)  # as `list_models` does before it exports
    assert (module.policy is trained) is kept


@pytest.mark.parametrize("name", ["ENAS", "PolicyBasedRL"])
@pytest.mark.parametrize("found, words", [(None, "needs tianshou>=0.4.8,<0.5; pip install 'nni-darts-rnn[rl]'"), ("1.1.0", "tianshou 1.1.0 is installed"),
                                          ("0.5", "tianshou 0.5 is installed")])
def test_without_a_fitting_tianshou_the_message_says_what_to_install(name, found, words, monkeypatch):
    def version(_):
        if found is None:
            raise PackageNotFoundError
        return found

    monkeypatch.setattr(strategies, "version", version)
    with pytest.raises(ImportError) as error:
        getattr(strategies, name)()
    assert words in str(error.value) and "\n" not in str(error.value)


def test_tpe_on_input_choices(tmp_path):
    with pytest.raises(NotImplementedError, match="as_legacy_dict"):
        multi_trial(nni_strategy.TPE(), Inputs(), tmp_path)
    models = multi_trial(strategies.TPE(seed=0), Inputs(), tmp_path)
    assert len(models) == 3
    for model in models:
        assert isinstance(Inputs().simplify()["two"], CategoricalMultiple)
        assert len(model.sample["one"]) == 1 and len(model.sample["two"]) == 2 and set(model.sample["two"]) < {0, 1, 2}


class Numbers(ModelSpace):
    """One of each of NNI's distributions."""

    DRAWS = {"uniform": (0.1, 0.5), "quniform": (0, 8, 2), "loguniform": (0.01, 1), "qloguniform": (1, 64, 8), "normal": (0, 1), "qnormal": (0, 4, 2)}

    def __init__(self):
        super().__init__()
        lognormal = Numerical(mu=0, sigma=1, log_distributed=True, label="lognormal")
        self.values = [ensure_frozen(self.add_mutable(one)) for one in (lognormal, *(getattr(nni, name)(name, *bounds) for name, bounds in self.DRAWS.items()))]

    def freeze(self, sample):
        with model_context(sample):
            return Numbers()


def test_tpe_on_numbers(tmp_path):
    with pytest.raises(NotImplementedError, match="as_legacy_dict"):
        multi_trial(nni_strategy.TPE(), Numbers(), tmp_path)
    models = multi_trial(strategies.TPE(seed=0), Numbers(), tmp_path)
    for model in models:
        assert sorted(Numbers().freeze(model.sample).values) == sorted(model.sample.values())
        assert set(model.sample) == {"lognormal", *Numbers.DRAWS} and model.sample["lognormal"] > 0 and model.sample["quniform"] in (0, 2, 4, 6, 8) and 0.1 <= model.sample["uniform"] <= 0.5
    assert len({model.sample["normal"] for model in models}) == len(models) == 3


@pytest.mark.parametrize("given", [{"distribution": stats.beta(2, 5), "low": 0, "high": 1}, {"mu": 0, "sigma": 1, "low": -1, "high": 1}, {"distribution": stats.norm(0, 1)}])
def test_tpe_draws_no_number_from_another_distribution_than_its_own(given, tmp_path):
    class One(ModelSpace):
        def __init__(self):
            super().__init__()
            self.add_mutable(Numerical(**given, label="one"))

    with pytest.raises(NotImplementedError, match="as_legacy_dict"):
        multi_trial(strategies.TPE(), One(), tmp_path)


def test_tpe_maximizes():
    assert nni_strategy.TPE().tuner.optimize_mode.value == "minimize" and strategies.TPE().tuner.optimize_mode.value == "maximize"


def test_grid_search_in_format_raw(tmp_path):
    from nni.mutable.exception import SampleValidationError

    with pytest.raises(SampleValidationError):
        multi_trial(nni_strategy.GridSearch(), Inputs(), tmp_path, judge=lambda model: nni.report_final_result(1.0))
    models = multi_trial(strategies.GridSearch(), Inputs(), tmp_path)
    assert len({json.dumps(model.sample) for model in models}) == 3


class Recorder(TrialCommandChannel):
    """A trial's channel that keeps what is sent."""

    def __init__(self):
        self.sent = []

    def receive_parameter(self):
        return {"parameter_id": 7, "parameters": {"seed": 1}}

    def send_metric(self, type, parameter_id, trial_job_id, sequence, value):
        self.sent.append((type, parameter_id, sequence, value["epoch"] if isinstance(value, dict) else value))


@pytest.fixture
def channel(monkeypatch):
    monkeypatch.setattr("nni.trial._intermediate_seq", 0)
    monkeypatch.setattr("nni.trial._params", None)
    usual, recorder = get_default_trial_command_channel(), Recorder()
    set_default_trial_command_channel(recorder)
    nni.get_next_parameter()
    yield recorder
    set_default_trial_command_channel(usual)


def test_results_of_a_nas_experiment_reach_the_trial_that_it_is_in(channel, tmp_path):
    with trial_reports() as report:
        one_shot(strategies.DARTS(), tmp_path, report)
    nni.report_final_result(5.0)
    assert channel.sent == [("PERIODICAL", 7, 0, 0), ("PERIODICAL", 7, 1, 1), ("FINAL", 7, 0, 5.0)]


def test_without_that_they_are_swallowed(channel, tmp_path):
    one_shot(strategies.DARTS(), tmp_path, nni.report_intermediate_result)
    nni.report_final_result(5.0)
    assert channel.sent == [("FINAL", 0, 0, 5.0)]


def test_a_trial_that_is_started_again_has_its_own_parameters(channel, tmp_path, monkeypatch):
    """NNI may hand a resumed trial those of another."""
    monkeypatch.setenv("NNI_OUTPUT_DIR", str(tmp_path))
    monkeypatch.setattr("nni.trial._trial_id", "abcde")
    assert own_parameters() == {"seed": 1}
    channel.receive_parameter = lambda: {"parameter_id": 8, "parameters": {"seed": 2}}
    assert own_parameters() == {"seed": 1} and nni.get_current_parameter() == {"seed": 1}
    nni.report_final_result(5.0)
    assert channel.sent == [("FINAL", 7, 0, 5.0)]
    monkeypatch.setenv("NNI_OUTPUT_DIR", str(tmp_path / "another"))
    assert own_parameters() == {"seed": 2}
    for damaged in ("{", "[]", "{}", "5", '{"parameters": [1], "parameter_id": 0}', '{"parameters": {}}', "[" * 100_000):
        (tmp_path / "another" / "parameters.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"parameters.json: damaged \(.*\); the trial no longer knows what the tuner drew for it"):
            own_parameters()


def test_a_trial_takes_what_nni_lists_for_it(channel, tmp_path, monkeypatch):
    """NNI hands trials that begin together each other's; its page and its export go by the list."""
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    asked = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            record = {"parameter_id": 8, "parameters": {"seed": 2}}
            body = b"{}" if len(asked) == 1 else json.dumps({"hyperParameters": [json.dumps(record)]}).encode()  # the list comes a moment later
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("NNI_OUTPUT_DIR", str(tmp_path))
        monkeypatch.setenv("NNI_PLATFORM", "local")
        monkeypatch.setenv("NNI_TRIAL_COMMAND_CHANNEL", f"ws://127.0.0.1:{server.server_port}/env/local-env/abcde")
        monkeypatch.setattr("nni.trial._trial_id", "abcde")
        assert own_parameters() == {"seed": 2} == json.loads((tmp_path / "parameters.json").read_text())["parameters"]
        server.shutdown()
    assert asked == ["/api/v1/nni/trial-jobs/abcde"] * 2
    nni.report_final_result(5.0)
    assert channel.sent == [("FINAL", 8, 0, 5.0)]  # so the tuner takes the result as of that draw
    monkeypatch.setenv("NNI_OUTPUT_DIR", str(tmp_path / "another"))
    monkeypatch.setenv("NNI_PLATFORM", "remote")  # no such server there
    assert own_parameters() == {"seed": 1}


def test_hyperband_takes_its_own_names_of_trials(monkeypatch):
    for kind, works in ((NniHyperband, False), (Hyperband, True)):
        advisor = kind.__new__(kind)
        advisor.recovered_max_param_id, advisor.brackets = -1, {"0-1": SimpleNamespace(hyper_configs=[{"0-1_0_2": {}}])}
        if works:
            assert advisor.is_created_in_previous_exp("0-1_0_2") is False and advisor.is_created_in_previous_exp(-1) is True
        else:
            with pytest.raises(TypeError):
                advisor.is_created_in_previous_exp("0-1_0_2")


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A NAS experiment of the training service that has ended without a trial, in a home of its own: (id, environment)."""
    home = tmp_path_factory.mktemp("home")
    env = os.environ | {"HOME": str(home), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    code = """
import sys
from nni.nas.evaluator import FunctionalEvaluator
from nni.nas.experiment import NasExperiment
from nni.nas.experiment.config import NasExperimentConfig
from nni.nas.strategy import Random
from nni_darts_rnn import DartsRnnSpace
config = NasExperimentConfig("ts", "simplified", "local", max_trial_number=1, trial_concurrency=1)
experiment = NasExperiment(DartsRnnSpace(9, 4, 2), FunctionalEvaluator(print), Random(), config)
experiment.strategy.run = lambda: None  # no trial; the engine is there, as NNI's manager waits for it before it takes the space
experiment.start(int(sys.argv[1]))
experiment.stop()
print("id", experiment.id)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(free_port())], env=env, cwd=home, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split("id ")[-1].strip(), env, home


def test_a_nas_experiment_that_has_ended_can_be_viewed(ended):
    experiment, env, home = ended
    port = free_port()
    nnictl = Path(sys.executable).parent / "nnictl"
    if not nnictl.exists():
        pytest.skip("nnictl is not beside this Python")
    refused = subprocess.run([nnictl, "view", experiment, "--port", str(port)], env=env, cwd=home, capture_output=True, text=True, timeout=60)
    assert refused.returncode != 0 and "can not be customized" in refused.stderr
    command = [sys.executable, "-m", "nni_darts_rnn.nas_view", experiment, "--port", str(port)]
    shown = subprocess.run(command, env=env, cwd=home, capture_output=True, text=True, timeout=60)
    try:
        assert shown.returncode == 0, shown.stdout + shown.stderr
        for _ in range(20):
            with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/nni/check-status") as answer:
                assert json.load(answer)["status"] == "VIEWED"
                break
            time.sleep(0.5)
        else:
            raise AssertionError("the page never came")
        folder = home / "nni-experiments"
        again = subprocess.run([*command, "--folder", folder], env=env, cwd=home, capture_output=True, text=True, timeout=60)
        assert again.returncode == 2 and "it still runs" in again.stderr and again.stderr.count("\n") == 1
    finally:
        subprocess.run([nnictl, "stop", experiment], env=env, cwd=home, capture_output=True, timeout=60)


def test_view_refuses_an_unknown_experiment(capsys, monkeypatch, tmp_path):
    from nni_darts_rnn.nas_view import main

    monkeypatch.setattr("nni.experiment.launcher.get_stopped_experiment_config_json", lambda *_: None)
    assert main(["nosuch"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: experiment 'nosuch'") and said.count("\n") == 1
    assert main(["nosuch", "--folder", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: experiment 'nosuch': not in the folder") and said.count("\n") == 1
