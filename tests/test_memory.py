"""Memory stays where it is: over thousands of steps, and however large the text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

STEPS = 2000

SLOPE = """
import json, sys, warnings
warnings.filterwarnings("ignore")
import numpy as np, torch
torch.set_num_threads(1)
from pathlib import Path
from nni_darts_rnn.checkpoints.store import Checkpoints, Every
from nni_darts_rnn.corpus import EOS, UNK, Corpus, Vocabulary
from nni_darts_rnn.recipes import get_recipe

phase, folder, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
sizes = {f"{phase}.{k}": v for k, v in dict(hidden_size=3, batch_size=2, eval_batch_size=2, bptt=3, lr=1.0, epochs=4, short_bptt_probability=0.0).items()}
recipe = get_recipe("tiny", sizes | {"search.n_nodes": 1, "retrain.test_batch_size": 2, "retrain.bptt_std": 0.0})
tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 10, 2 * 3 * (steps // 4) + 300))
corpus = Corpus("noise", Vocabulary((EOS, UNK, *"abcdefgh")), tokens[:-300], tokens[-300:-150], tokens[-150:])
seen = []

class Watched(Checkpoints):
    def due(self):
        seen.append(int(open("/proc/self/statm").read().split()[1]) * 4096)
        return super().due()

store = Watched(folder, phase, {}, Every(steps=100))
if phase == "search":
    from nni_darts_rnn.search import search
    search(corpus, recipe.search, 0, device="cpu", store=store, folder=folder)
else:
    from nni_darts_rnn.learner import retrain
    retrain(corpus, "DARTS_V1", recipe.retrain, 0, folder, device="cpu", store=store)
late = np.array(seen[len(seen) // 2:])  # caches are warm by then; 8,000 steps were seen to level off to about 100 bytes a step
print(json.dumps({"steps": len(seen), "slope": float(np.polyfit(np.arange(len(late)), late, 1)[0]), "peak": max(seen)}))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="resident memory is read from /proc")
@pytest.mark.parametrize("phase", ["search", "retrain"])
def test_memory_is_flat_over_two_thousand_steps(tmp_path, phase):
    """In bytes a step: less than 500, so less than 1 MB in 2,000 steps. A tensor kept for each step would be more."""
    done = subprocess.run([sys.executable, "-c", SLOPE, phase, tmp_path, str(STEPS)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["steps"] >= STEPS - 8, found
    assert found["slope"] < 500, found


LOAD = """
import json, resource, sys
import nni_darts_rnn.corpus as corpus
from nni_darts_rnn.checkpoints.store import run_identity
from nni_darts_rnn.recipes import get_recipe
corpus._ON_DISK = 1 << 20
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
text = corpus.load_corpus(sys.argv[1])
loaded = peak()
run_identity(text, get_recipe("tiny").search, 0)
print(json.dumps({"tokens": len(text.train), "words": len(text.vocab), "load": loaded - before, "identity": peak() - loaded, "peak": peak()}))
"""


def write_text(path: Path, megabytes: int) -> None:
    """Lines of random words out of 10,000."""
    draw = np.random.default_rng(0)
    words = np.array([f"w{i}" for i in range(10_000)])
    line = " ".join(words[draw.integers(0, len(words), 170_000)])
    with path.open("w") as file:
        for _ in range(megabytes):
            file.write(line + "\n")


def load(folder: Path, cache: Path) -> dict:
    done = subprocess.run([sys.executable, "-c", LOAD, folder], capture_output=True, text=True, timeout=600, env=os.environ | {"XDG_CACHE_HOME": str(cache)})
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_a_large_text_streams_from_disk(tmp_path):
    """24 MB of text are 4 million tokens: 32 MB as the numbers that they become, more than 200 MB as Python's words."""
    for split, megabytes in (("train", 24), ("valid", 1), ("test", 1)):
        write_text(tmp_path / f"{split}.txt", megabytes)
    first = load(tmp_path, tmp_path / "cache")  # reads and encodes the text
    second = load(tmp_path, tmp_path / "cache")  # maps what the first one wrote
    assert first["tokens"] == second["tokens"] > 4_000_000
    assert first["load"] < 40 << 20 and second["load"] < 25 << 20, (first, second)  # a megabyte of words at a time, and the vocabulary
    assert first["identity"] < 8 << 20


if __name__ == "__main__":  # python tests/test_memory.py FOLDER: the same with 1 GB
    place = Path(sys.argv[1])
    for split, megabytes in (("train", 1024), ("valid", 4), ("test", 4)):
        write_text(place / f"{split}.txt", megabytes)
    print(load(place, place / "cache"))
    print(load(place, place / "cache"))
