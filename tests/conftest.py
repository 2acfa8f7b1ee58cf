"""What several test modules share: an experiment of nnictl, run to its end once, and a browser; and how they are shared out by `pytest -n 2`."""

import os
import shutil
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: threads that wait for each other by spinning are slow beside other processes
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from nni_darts_rnn.nas_layers import import_layers

    import_layers()  # in a new environment each of them would write NNI's file, and read what the other has written so far

from nnictl import Experiment

ROOT = Path(__file__).parents[1]
TINY = "--recipe tiny --set search.bptt=64 --set search.batch_size=64 --set retrain.epochs=1"


def pytest_addoption(parser):
    parser.addoption("--golden", action="append", default=[], metavar="FILE",
                     help="check this file of reference figures in place of those in tests/golden (may be given several times)")
    parser.addoption("--long", action="store_true", help="with the tests that run whole experiments and thousands of steps (about ten minutes more)")


LONG = ("test_remote.py", "test_tuners.py", "test_nni_faults.py", "test_multi_trial.py", "test_memory.py", "test_many.py", "test_browser.py",
        "test_the_wheel_runs_the_main_job", "test_the_example_by_nnictl", "test_through_the_command_line", "test_nas_layers.py",
        "test_two_trials_of_a_seed_at_once", "test_all_words_keeps", "test_other_compilers", "test_two_layers_both_ways_of_any_length",
        "test_a_library_that_cannot_be_loaded", "test_a_backward_pass_that_alone_is_compiled[compiled]", "its_cell_retrains[Proxyless]",
        "test_fastai_search_names_a_misspelt_recipe", "test_eleven_nodes_straight_to_onnx", "test_ctrl_c[command1",
        "test_hub_convolutional_space[finite_difference-2]")
"""Files and tests that `pytest` leaves out and `pytest --long` runs."""


def pytest_collection_modifyitems(config, items):
    kept, left_out = [], []
    for item in items:
        (left_out if any(name in item.nodeid for name in LONG) and not config.getoption("--long") else kept).append(item)
    config.hook.pytest_deselected(items=left_out)
    if "PYTEST_XDIST_WORKER" in os.environ:
        kept.sort(key=lambda item: item.path.name not in FIRST)
    items[:] = kept


FIRST = ("test_experiment.py", "test_resume.py", "test_docs.py", "test_rungs.py", "test_fused.py", "test_strategy.py", "test_learner.py", "test_words.py")
"""Files of few and long tests, which several processes had better not be left with at the end."""


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config, log):
    """Whole files, in order: what a module's tests share is made once."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


@pytest.fixture(scope="module", autouse=True)
def built_in_primitives():
    """What a module registers stays its own: the messages of others name every primitive there is."""
    from nni_darts_rnn import cell, genotype

    activations, known = dict(cell.ACTIVATIONS), set(genotype._known_ops)
    yield
    for registry, before in ((cell.ACTIVATIONS, activations), (genotype._known_ops, known)):
        registry.clear()
        registry.update(before)


@pytest.fixture(autouse=True)
def digits_of_products():
    """What a command allows torch is not for the tests after it."""
    import torch

    backends = [getattr(library, kind) for library in (torch.backends.cudnn, torch.backends.mkldnn) for kind in ("conv", "rnn")]
    backends += [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    before = [backend.fp32_precision for backend in backends]
    yield
    for backend, was in zip(backends, before):
        backend.fp32_precision = was


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The example with the tiny recipe and the first lines of its text, typed inside examples/, run to its end."""
    from texts import write_texts

    from nni_darts_rnn.corpus import load_corpus

    folder = tmp_path_factory.mktemp("nni")
    for name in ("examples", "search_spaces"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "short").mkdir()
    write_texts(folder / "short", load_corpus("pydoc"), train=10000, valid=3000, test=3000)
    config = folder / "examples" / "darts_rnn.yml"
    text = config.read_text()
    assert "--corpus pydoc --recipe small" in text
    config.write_text(text.replace("--corpus pydoc --recipe small", f"--corpus {folder / 'short'} {TINY}"))
    experiment = Experiment(Path("darts_rnn.yml"), folder, config.parent)
    try:
        yield experiment, experiment.wait(300), folder
    finally:
        experiment.stop()


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Headless Chromium, or a skip that says what is missing. Whatever a test changes it has to set itself."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("chromium or its chromedriver is not on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
                     "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield driver
    driver.quit()
