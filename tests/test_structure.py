"""Who may import whom, read from the source; and that importing the package is light."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nni_darts_rnn

PACKAGE = Path(nni_darts_rnn.__file__).parent
TREES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts).replace(".__init__", ""): ast.parse(path.read_text(encoding="utf-8"))
         for path in sorted(PACKAGE.rglob("*.py"))}
FOLDERS = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
OURS = set(TREES) - {"__init__"}

NNI = {"space", "strategy", "evaluator", "search", "trial", "cli", "callbacks", "report.experiments", "strategies", "fastai_evaluator", "cell_trial", "hyperband",
       "nas_in_trial", "nas_layers", "nas_view", "own_parameters"}
FASTAI = {"callbacks", "fastai_lm", "fastai_streams", "learner", "evaluator", "fastai_text", "fastai_evaluator", "checkpoints.retrain"}
LIGHTNING = {"evaluator", "search", "checkpoints.search", "strategy", "nas_layers"}
# a module -> those of ours that it may import; what is not listed may import any that does not import it
LEAVES = {"checks": set(), "genotype": {"checks"}, "files": set(), "weight_step": set(), "bilevel": {"weight_step"}, "talk": set(), "checkpoints.stopping": set(), "checkpoints.file": {"checks", "files"},
          "recipes": {"checks", "genotype"}, "text.download": {"files"}, "text.vocabulary": set(), "text.batches": {"checks"}, "text.pydoc_text": {"text.vocabulary"},
          "corpus": {"checks", "files", "text.batches", "text.download", "text.pydoc_text", "text.vocabulary"},
          "cell": {"checks", "genotype", "fused"}, "layer": {"cell", "checks", "genotype"}, "supernet": {"cell", "checks", "genotype", "fused"}}


def imports(tree: ast.AST, within: str = ""):
    """(module, whether at import time) of every import; "." before those of the package itself. `within`: the folder that the module is in."""
    inner = {id(node) for function in ast.walk(tree) if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
             for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            dots = "." * min(node.level, 1) + (within + "." if within and node.level == 1 else "")
            modules = [alias.name for alias in node.names if f"{node.module}.{alias.name}" in OURS] if node.level else []  # from .folder import module
            names = [f"{dots}{node.module}.{module}" for module in modules] or [dots + node.module] if node.module else [dots + alias.name for alias in node.names]
        else:
            continue
        for name in names:
            yield name, id(node) not in inner


IMPORTS = {name: set(imports(tree, name if name in FOLDERS else name.rpartition(".")[0])) for name, tree in TREES.items()}


def roots(name: str, at_import_time: bool | None = None) -> set[str]:
    return {module.split(".")[0] for module, first in IMPORTS[name] if not module.startswith(".") and at_import_time in (None, first)}


def ours(name: str, at_import_time: bool | None = None) -> set[str]:
    return {module[1:] for module, first in IMPORTS[name] if module.startswith(".") and at_import_time in (None, first)} & OURS


def test_the_reader_of_imports_reads():
    tree = ast.parse("import a.b\nfrom .c import d\nfrom . import e\ndef f():\n    from g.h import i\n    import j")
    assert set(imports(tree)) == {("a.b", True), (".c", True), (".e", True), ("g.h", False), ("j", False)}
    assert "outputs.figures" in ours("report.page") and "files" in ours("report.page")
    assert "torch" in roots("cell") and "genotype" in ours("cell") and "nni" in roots("space")


def test_hosts_are_imported_where_the_map_says():
    for host, modules in (("nni", NNI), ("fastai", FASTAI)):
        assert not {name for name in TREES if host in roots(name) and not {name, name.split(".")[0]} & modules}
    assert {name for name in TREES if roots(name) & {"pytorch_lightning", "lightning"}} <= LIGHTNING
    for name in ("callbacks.reports", "cli", "trial"):  # NNI only when it is used
        assert "nni" not in roots(name, at_import_time=True)
    assert "matplotlib" not in {root for name in TREES for root in roots(name, at_import_time=True)}


def test_command_line_starts_without_torch():
    for name in ("cli", "options", "trial", "recipes", "genotype", "files", "__init__"):
        assert not roots(name, at_import_time=True) & {"torch", "nni", "fastai", "pytorch_lightning"}


@pytest.mark.parametrize("name", LEAVES)
def test_leaves(name):
    assert ours(name) <= LEAVES[name]
    if name in ("genotype", "recipes", "files"):
        assert "torch" not in roots(name)
    if name in ("bilevel", "weight_step"):
        assert roots(name) <= {"torch", "numpy", *sys.stdlib_module_names}


def test_no_circle_at_import_time():
    done = set()

    def reach(name, path=()):
        assert name not in path, f"circle: {' -> '.join((*path, name))}"
        if name not in done:
            for other in ours(name, at_import_time=True):
                reach(other, (*path, name))
            done.add(name)

    for name in OURS:
        reach(name)


def test_every_relative_import_is_a_module_of_the_package():
    for name, found in IMPORTS.items():
        for module, _ in found:
            assert not module.startswith(".") or module[1:] in OURS | {"__version__"}, (name, module)


def test_the_readme_says_where_everything_is():
    told = (PACKAGE.parent / "README.md").read_text(encoding="utf-8").partition("## Where things are")[2]
    there = {f"{name}/" for name in FOLDERS} | {name for name in OURS - FOLDERS if "." not in name}
    assert there | {"csrc/"} | {"nni_darts_rnn/"} == {name for name in re.findall(r"`([a-z_]+/?)`", told)} - {"tests/", "search_spaces/", "examples/", "benchmarks/"}


@pytest.mark.parametrize("name", TREES)
def test_habits(name):
    tree = TREES[name]
    assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        assert not (isinstance(node, ast.ImportFrom) and node.names[0].name == "*"), "import *"
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"bare except in line {node.lineno}"
        if isinstance(node, ast.FunctionDef) and node.name == "__init__" or (name == "__init__" and node is tree):
            calls = [n.func.id for n in ast.walk(node) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
            assert "print" not in calls
    assert name not in ("utils", "misc", "helpers", "common")


def test_importing_the_package_is_light():
    heavy = {"torch", "nni", "fastai", "pytorch_lightning", "numpy", "matplotlib"}
    code = "import sys, nni_darts_rnn; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    loaded = set(done.stdout.split())
    assert "nni_darts_rnn" in loaded and not loaded & heavy and not done.stderr


def test_every_public_name_is_in_its_module():
    for name, module in nni_darts_rnn._HOME.items():
        tree = TREES[module]
        defined = {n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        defined |= {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
        defined |= {n.target.id for n in tree.body if isinstance(n, ast.AnnAssign)}
        assert name in defined, f"{module}.py does not define {name}"
    assert set(nni_darts_rnn.__all__) == set(nni_darts_rnn._HOME) <= set(dir(nni_darts_rnn))
    for name in ("Genotype", "DARTS_V2", "derive", "RECIPES"):  # light ones; the others are imported by their own tests
        assert getattr(nni_darts_rnn, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Gentype'"):
        nni_darts_rnn.Gentype
