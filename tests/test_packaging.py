"""The distribution: sdist and wheel build, the wheel alone runs the main job in an environment of its own, code is linted and typed, the reference builds.

That environment borrows the installed packages of this one through a .pth file, so that it costs seconds; the checkout is not in it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from nnictl import Experiment

import nni_darts_rnn

ROOT = Path(__file__).parents[1]


def run(*command, cwd=ROOT, **more):
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=300, check=False, **more)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def build(kind: str, source: Path, folder: Path) -> Path:
    code = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    return folder / run(sys.executable, "-c", code, folder, cwd=source).splitlines()[-1]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """sdist of the tracked files, and a wheel built from that sdist."""
    folder = tmp_path_factory.mktemp("dist")
    tracked = run("git", "ls-files", "-z").split("\0") if (ROOT / ".git").exists() else []
    if not tracked:
        pytest.skip("not a git checkout: which files belong to the distribution is not known")
    for name in filter(None, tracked):
        if (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    sdist = build("sdist", folder / "source", folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    return sdist, build("wheel", next((folder / "unpacked").iterdir()), folder)


COMPILED = {f"nni_darts_rnn/csrc/{name}" for name in ("backward.h", "bfloat.h", "cell.h", "cells.cpp", "cross_entropy.cpp", "edges.h", "elementary.h", "forward.h", "product.h", "sequence.h", "team.h")}


def test_sdist_holds_what_the_tests_and_the_documentation_need(distributions):
    with tarfile.open(distributions[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in ("README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "pyproject.toml", "setup.cfg", "docs/method.md", "docs/pictures/cell.svg",
                 "examples/darts_rnn.yml", "examples/time_series.py", "search_spaces/darts_rnn.json", "tests/test_packaging.py", "tests/conftest.py",
                 "nni_darts_rnn/py.typed", *COMPILED):
        assert name in names, name
    assert any(name.startswith("tests/golden/") for name in names) and not any(name.endswith(".pyc") for name in names)


def test_wheel_holds_the_package_and_its_data(distributions):
    with zipfile.ZipFile(distributions[1]) as wheel:
        names = set(wheel.namelist())
        metadata = wheel.read(next(name for name in names if name.endswith("METADATA"))).decode()
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "nni_darts_rnn").rglob("*.py")}
    assert expected & names >= {name for name in expected if name in run("git", "ls-files")}
    assert {"nni_darts_rnn/py.typed", *COMPILED} <= names
    assert any(name.endswith("share/nni_darts_rnn/examples/darts_rnn.yml") for name in names)
    assert not any(name.startswith(("tests/", "benchmarks/", "docs/")) for name in names)
    assert f"\nVersion: {nni_darts_rnn.__version__}\n" in metadata and "License-File: LICENSE" in metadata and "Provides-Extra: export" in metadata


@pytest.fixture(scope="module")
def installed(distributions, tmp_path_factory):
    """An environment with the wheel, outside the checkout: (its bin folder, an empty folder)."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    python = folder / "venv" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    # the lines are folders alone: .pth files in them, such as an editable install's, are not read
    (site / "borrowed.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")) + "\n")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", distributions[1], cwd=folder)
    (folder / "venv" / "bin" / "nnictl").write_text(f"#!{python}\nfrom nni.tools.nnictl.nnictl import parse_args\nparse_args()\n")
    (folder / "venv" / "bin" / "nnictl").chmod(0o755)
    (folder / "work").mkdir()
    return folder / "venv" / "bin", folder / "work"


def test_the_wheel_runs_the_main_job_outside_the_checkout(installed):
    bin_folder, work = installed
    env = os.environ | {"HOME": str(work), "PYTHONPATH": ""}
    where = run(bin_folder / "python", "-c", "import nni_darts_rnn; print(nni_darts_rnn.__file__)", cwd=work, env=env)
    assert str(ROOT) not in where and "site-packages" in where
    assert run(bin_folder / "nni-darts-rnn", "--version", cwd=work, env=env).strip() == nni_darts_rnn.__version__
    written = json.loads(run(bin_folder / "nni-darts-rnn", "init", "mine", "--json", cwd=work, env=env))
    assert written["next"] == "nnictl create --config mine/examples/darts_rnn.yml"
    config = work / "mine" / "examples" / "darts_rnn.yml"
    tiny = "--recipe tiny --set search.bptt=64 --set search.batch_size=64 --set retrain.epochs=1"
    config.write_text(config.read_text().replace("--recipe small", tiny).replace("maxTrialNumber: 2", "maxTrialNumber: 1"))
    experiment = Experiment(config, work, work, bin_folder)
    try:
        (trial,) = experiment.wait(200)
    finally:
        experiment.stop()
    assert trial["status"] == "SUCCEEDED", (Path(trial["logPath"]) / "trial.stderr").read_text()
    found = json.loads(run(bin_folder / "nni-darts-rnn", "best", experiment.id, "--json", cwd=work, env=env))
    assert found["trial"] == trial["trialJobId"] and found["valid_perplexity"] > 1 and "cell.png" in found["pictures"]


def test_version_changelog_and_citation_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == nni_darts_rnn.__version__ and citation["cff-version"] == "1.2.0" and citation["license"] == "MIT"
    assert {"message", "title", "authors"} <= set(citation)
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert versions[0] == "Unreleased" and versions[1] == nni_darts_rnn.__version__


@pytest.mark.parametrize("tool, arguments", [("ruff", ["check", "."]), ("mypy", ["--no-error-summary"])])
def test_linted_and_typed(tool, arguments, tmp_path):
    if importlib.util.find_spec(tool) is None:
        pytest.skip(f"{tool} is not installed (extra: test)")
    cache = ["--no-cache"] if tool == "ruff" else ["--cache-dir", str(tmp_path)]
    run(sys.executable, "-m", tool, *arguments, *cache)


def test_the_reference_builds_without_warnings(tmp_path):
    pytest.importorskip("pdoc", reason="pdoc is not installed (extra: docs)")
    spec = importlib.util.spec_from_file_location("build_api", ROOT / "docs" / "build_api.py")
    build_api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build_api)
    build_api.main(tmp_path / "api")  # ends with an error where there are any
    page = (tmp_path / "api" / "nni_darts_rnn" / "layer.html").read_text(encoding="utf-8")
    assert "DartsRNN" in page and "batch_first" in page and (tmp_path / "api" / "nni_darts_rnn" / "plot" / "cell.html").is_file()
