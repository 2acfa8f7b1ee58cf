"""Many at once: runs side by side share no file that they should not, and caches are built once; the same command twice gives the same numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TRIALS = """
import os, sys, warnings
from pathlib import Path
warnings.filterwarnings("ignore")
sys.path.insert(0, sys.argv[1])
import crashes
import torch
from nni_darts_rnn import pipeline
torch.set_num_threads(1)
os.chdir(sys.argv[2])
pipeline._draw = lambda *args: None

def work(i):
    return lambda: pipeline.whole_run(crashes.corpus(), crashes.RECIPE, 3, Path(f"trial-{i}"), device="cpu")

failed = os.waitpid(crashes.in_child(work("alone")), 0)[1]
children = [crashes.in_child(work(i)) for i in range(8)]
sys.exit(failed + sum(os.waitpid(child, 0)[1] for child in children))
"""


def test_eight_trials_at_once(tmp_path):
    """Each leaves, in its own folder and nowhere else, what one alone leaves."""
    done = subprocess.run([sys.executable, "-c", TRIALS, str(Path(__file__).parent), tmp_path], capture_output=True, text=True, timeout=300,
                          env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    *together, alone = sorted(tmp_path.iterdir())
    assert [path.name for path in (*together, alone)] == [*(f"trial-{i}" for i in range(8)), "trial-alone"]
    for folder in together:
        assert {path.name for path in folder.iterdir()} == {path.name for path in alone.iterdir()}
        for name in ("genotype.json", "alpha.json", "model.safetensors"):
            assert (folder / name).read_bytes() == (alone / name).read_bytes()
        assert json.loads((folder / "result.json").read_text())["test_perplexity"] == json.loads((alone / "result.json").read_text())["test_perplexity"]


BUILD = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
import crashes
import nni_darts_rnn.corpus as corpus, nni_darts_rnn.text.download as download
from pathlib import Path
corpus._ON_DISK = 1
folder, what = Path(sys.argv[2]), sys.argv[3]
if what == "download":
    texts = {split: corpus.download.digest(folder / f"{split}.txt") for split in corpus.SPLITS}
    download.SOURCES["wikitext-2"] = download.Source({f"wiki.{split}.tokens": sha for split, sha in texts.items()}, {})
    corpus.PUBLISHED_COUNTS["wikitext-2"] = (6000, 6, 6, 4)
    for split in corpus.SPLITS:
        (folder / f"wiki.{split}.tokens").write_bytes((folder / f"{split}.txt").read_bytes())

def work():
    while time.time() < start:
        pass
    text = corpus.load_corpus(folder) if what == "vocabulary" else corpus.load_corpus("wikitext-2", mirror=folder.as_uri())
    assert len(text.train) == 6000 and text.vocab.words == ("a", "b", corpus.EOS, corpus.UNK), text.describe()

start = time.time() + 0.3
children = [crashes.in_child(work) for _ in range(4)]
sys.exit(sum(os.waitpid(child, 0)[1] for child in children))
"""


@pytest.mark.parametrize("what", ["vocabulary", "download"])
def test_four_processes_build_the_same_cache_at_once(tmp_path, what):
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text("a b\n" * (2000 if split == "train" else 2))
    done = subprocess.run([sys.executable, "-c", BUILD, str(Path(__file__).parent), tmp_path, what], capture_output=True, text=True, timeout=120,
                          env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")})
    assert done.returncode == 0, done.stderr[-3000:]
    cache = tmp_path / "cache" / "nni_darts_rnn" / "corpora"
    assert not [path.name for path in cache.iterdir() if path.suffix in (".new", ".part")]  # nothing half built
    assert len([path for path in cache.iterdir() if path.is_dir()]) == (1 if what == "vocabulary" else 2)  # downloaded, and encoded


TWICE = """
import sys, warnings
warnings.filterwarnings("ignore")
sys.path.insert(0, sys.argv[1])
import crashes, torch
from pathlib import Path
from nni_darts_rnn import pipeline
torch.set_num_threads(1)
pipeline._draw = lambda *args: None
pipeline.whole_run(crashes.corpus(), crashes.RECIPE, 3, Path(sys.argv[2]), device="cpu")
"""


def test_the_same_in_processes_with_different_hash_seeds(tmp_path):
    runs = [subprocess.Popen([sys.executable, "-c", TWICE, str(Path(__file__).parent), tmp_path / seed], stderr=subprocess.PIPE, text=True,
                             env=os.environ | {"PYTHONHASHSEED": seed}) for seed in ("1", "2")]
    for run in runs:
        _, err = run.communicate(timeout=200)
        assert run.returncode == 0, err[-3000:]
    from test_resume import rows

    one, two = tmp_path / "1", tmp_path / "2"
    for name in ("genotype.json", "alpha.json", "model.safetensors"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert rows(one / "search.csv") == rows(two / "search.csv") and rows(one / "retrain.csv") == rows(two / "retrain.csv")
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, two)]
    assert all(results[0][k] == results[1][k] for k in results[0] if "seconds" not in k)
