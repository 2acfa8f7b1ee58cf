"""The recipe `drawn` on a text with all of its words: one search, then retrainings of its cell and of named cells.

One named cell is retrained twice: with Adam, as the recipe says, and with SGD.

    python benchmarks/all_words.py FOLDER --work DIR --save

The result of each command is kept in DIR. A command whose result is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

from hardware import keep, made

from nni_darts_rnn.files import write_text
from nni_darts_rnn.genotype import Genotype

RESULTS = Path(__file__).parent / "results" / "drawn_penn.json"
SGD = ["--set", "retrain.optimizer=sgd", "--set", "retrain.lr=20", "--set", "retrain.nonmono=5"]
FOUND = "of this search"
TRAINED = ((FOUND, 1, "adam"), ("DRAWN_V1", 2, "adam"), ("DRAWN_V1", 2, "sgd"), ("DARTS_V2", 1, "adam"))


def result(options, name: str, command: str, *more: str) -> dict:
    """The JSON that `nni-darts-rnn COMMAND` prints: from `name`.json where an earlier run left it, else of a new run, whose files go to the folder `name`."""
    answer = options.work / f"{name}.json"
    if not answer.exists():
        options.work.mkdir(parents=True, exist_ok=True)
        words = [command, "--corpus", str(options.corpus), "--recipe", "drawn", "--threads", str(options.threads), *more, "--out", str(options.work / name), "--json"]
        print("nni-darts-rnn", shlex.join(words), flush=True)
        write_text(answer, subprocess.run([sys.executable, "-m", "nni_darts_rnn.cli", *words], check=True, stdout=subprocess.PIPE, text=True).stdout)
    return json.loads(answer.read_text(encoding="utf-8"))


def retrained(options, cell: str, seed: int, optimizer: str) -> dict:
    name = f"{'found' if cell == FOUND else cell}-{seed}-{optimizer}"
    genotype = str(options.work / "found") if cell == FOUND else cell
    done = result(options, name, "retrain", "--seed", str(seed), "--genotype", genotype, *(SGD if optimizer == "sgd" else []))
    return {"cell": cell, "seed": seed, "optimizer": optimizer} | {key: done[key] for key in ("valid_perplexity", "test_perplexity", "epochs", "parameters", "retrain_seconds")}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path, help="folder with the text")
    parser.add_argument("--work", type=Path, required=True, help="folder for the results of the commands")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", nargs="?", type=Path, const=RESULTS, help=f"write the figures to this file; default {RESULTS.name}")
    parser.add_argument("--note", help="a sentence on how it ran, for the results page")
    options = parser.parse_args(arguments)
    found = result(options, "found", "search", "--seed", "1")
    rows = [retrained(options, *which) for which in TRAINED]
    for row in rows:
        print(f"{row['cell']:16} {row['seed']} {row['optimizer']:5} validation {row['valid_perplexity']:.2f}, test {row['test_perplexity']:.2f}")
    search = {"genotype": str(Genotype.from_dict(found["genotype"])), "supernet_valid_perplexity": found["supernet_valid_perplexity"],
              "seconds": found["seconds"]}
    keep(options.save, {"search": search, "retrained": rows} | ({"note": options.note} if options.note else {}) | made(__file__, ["FOLDER", "--work", "DIR", "--threads", str(options.threads)], threads=options.threads))


if __name__ == "__main__":
    main()
