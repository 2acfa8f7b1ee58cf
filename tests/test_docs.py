"""Each code block of the README and of docs/ runs: Python as it stands, commands through the command line, data read by whoever reads it.

Sizes alone are changed: the `small` recipe and Python's documentation become the `tiny` one and a text of a few hundred words.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from test_experiments import trial_folder, write_experiment, write_trial

from nni_darts_rnn import pipeline
from nni_darts_rnn.cli import main
from nni_darts_rnn.genotype import Genotype
from nni_darts_rnn.options import Parser, add_run_options, checked_recipe
from nni_darts_rnn.recipes import get_recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = ("pip ", "git ", "pytest", "nnictl", "python benchmarks/", "python examples/", "docker", "scp", "ssh")  # run by other tests, or not ours
TEXT = "my_text"


def blocks(page: Path) -> list[tuple[str, str, int]]:
    """(language, code, line) of every fenced block."""
    text = page.read_text(encoding="utf-8")
    return [(m.group(1), m.group(2), text[:m.start()].count("\n") + 1) for m in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """A folder with a text, a search's folder `found` and a model's folder `trained`."""
    folder = tmp_path_factory.mktemp("results")
    (folder / TEXT).mkdir()
    line = "the class of an object is what its name says and what the object does\nthe name is not the object but a way to it\n"
    for split, times in (("train", 30), ("valid", 8), ("test", 8)):
        (folder / TEXT / f"{split}.txt").write_text(line * times)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["search", *tiny("search"), "--out", "found"]) == 0
        assert main(["retrain", *tiny("retrain"), "--genotype", "found", "--out", "trained"]) == 0
    shutil.copy(folder / "found" / "genotype.json", folder / "trained")  # as in a trial, whose folder both phases share
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch, results):
    """A folder to work in, with what is in `results` and an experiment `EXPERIMENT`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(pipeline, "_draw", lambda *args: None)  # pictures take longer than all the rest
    shutil.copytree(results, tmp_path, dirs_exist_ok=True)
    write_trial(trial_folder(write_experiment(tmp_path, {"aaaaa": ("SUCCEEDED", {"seed": 1})}), "aaaaa"), 80.0)
    return tmp_path


def tiny(command: str) -> list[str]:
    if command == "evaluate":
        return ["--corpus", TEXT]  # read as after the training
    sizes = [f"{part}.{field}" for part in ("search", "retrain") for field in ("bptt=8", "epochs=1", "eval_batch_size=2")]
    sizes += ["search.batch_size=4", "search.warmup_epochs=0", "retrain.batch_size=4", "retrain.test_batch_size=1"]
    words = ["--corpus", TEXT, "--recipe", "tiny", *(word for size in sizes for word in ("--set", size))]
    return words if command in ("search", "retrain") else []


def smaller(code: str) -> str:
    code = code.replace('"pydoc"', f'"{TEXT}"').replace("path/to/trial", "trained")
    settings = '{"search.bptt": 8, "search.epochs": 1, "search.batch_size": 4, "search.eval_batch_size": 2, "retrain.epochs": 1, "retrain.bptt": 8, ' \
               '"retrain.batch_size": 4, "retrain.eval_batch_size": 2}'
    code = code.replace("sorted(topics)[:8]", "sorted(topics)[:2]").replace("search.fit(6)", "search.fit(1)")
    return code.replace('get_recipe("small")', f'get_recipe("tiny", {settings})').replace('"small"', '"tiny"')


def run_shell(code: str) -> None:
    for line in code.replace("\\\n", " ").splitlines():
        for command in line.partition(" #")[0].strip().split("&&"):
            command = command.strip()
            if command.startswith("nni-darts-rnn "):
                words = shlex.split(command.replace("EXPERIMENT", "abcd1234").replace("FOLDER", TEXT))[1:]
                assert main([*words, *tiny(words[0])]) == 0, command
            else:
                assert not command or command.startswith(ELSEWHERE), f"{command!r} is run by nothing"


def check_data(language: str, code: str) -> None:
    if language == "json":
        found = json.loads(code)
        if "recurrent" in found:
            Genotype.from_json(code)
        elif all(isinstance(v, dict) and "_type" in v for v in found.values()):  # a search space: every key must be a field
            values = {key: space["_value"][0] for key, space in found.items() if key != "seed"}
            get_recipe("small", values)
    else:
        command = yaml.safe_load(code).get("trialCommand", "")
        parser = Parser()
        add_run_options(parser)
        if "nni_darts_rnn.trial" in command:
            checked_recipe(parser.parse_args(shlex.split(command)[3:]), {})


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_blocks_run(page, request):
    found = blocks(page)
    ours = [block for block in found if block[0] in ("python", "sh", "json", "yaml", "yml")]
    for language, code, line in found:
        assert language in ("python", "sh", "json", "yaml", "yml", "math", "text"), f"{page.name}:{line}: say what language this block is in"
    if not ours:
        return
    if any(language in ("python", "sh") for language, _, _ in ours):
        request.getfixturevalue("place")
    names: dict = {"__name__": "page"}  # one page is one session, as a reader would type it
    for language, code, line in ours:
        if language == "python":
            missing = [package for package in ("onnxruntime", "onnxscript") if f"{package}" in code or "torch.onnx" in code]
            for package in missing:
                if not _importable(package):
                    pytest.skip(f"{page.name}:{line} needs {package} (extra: export); the blocks before it ran")
            exec(compile("\n" * line + smaller(code), str(page), "exec"), names)
            if stop := getattr(names.get("experiment"), "stop", None):  # NNI would at exit, when pytest has closed what it logs to
                stop()
        elif language == "sh":
            run_shell(code)
        else:
            check_data(language, code)


def _importable(package: str) -> bool:
    with contextlib.suppress(ImportError):
        __import__(package)
        return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)):
        if not target.startswith(("http://", "https://")):
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), f"{page.name}: {target}"
            if anchor:
                titles = [re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in re.findall(r"^#+ (.*)$", file.read_text(), re.M)]
                assert anchor in titles, f"{page.name}: {target}"


def test_pictures_are_small():
    pictures = [path for path in (ROOT / "docs" / "pictures").iterdir()]
    assert pictures and all(os.path.getsize(path) < 150_000 for path in pictures)
    assert {path.name for path in pictures} == {Path(t).name for page in PAGES for t in re.findall(r"\]\(([^)\s]*pictures/[^)\s]+)\)", page.read_text())}


def test_the_results_page_is_made_from_what_is_stored():
    import importlib.util

    spec = importlib.util.spec_from_file_location("build_results", ROOT / "docs" / "build_results.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    assert build.page() == build.PAGE.read_text(encoding="utf-8")
