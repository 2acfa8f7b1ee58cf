"""Does a search find better cells than chance at the same cost? All arms have one budget and several seeds; every cell is retrained several times.

    python benchmarks/search_quality.py run --corpus FOLDER --arm second-order original first-order shared random   # one NNI experiment an arm
    python benchmarks/search_quality.py run --corpus FOLDER --arm second-order --set search.epochs=5 --set search.warmup_epochs=4 --name "second-order, α warm-up"
    python benchmarks/search_quality.py run --corpus FOLDER --arm second-order --set search.epochs=5 --set search.warmup_epochs=4 --set search.relaxation=node --name "second-order, node, α warm-up"
    python benchmarks/search_quality.py run --corpus FOLDER --arm second-order --set search.epochs=6 --set search.warmup_epochs=4 --set search.relaxation=gumbel --name "second-order, gumbel, α warm-up"
    python benchmarks/search_quality.py run --corpus FOLDER --arm second-order --set search.hvp=first_order --set search.epochs=9 --set search.warmup_epochs=3 --set search.relaxation=gumbel --name "first-order, gumbel, α warm-up"
    python benchmarks/search_quality.py run --corpus FOLDER --arm second-order --set search.epochs=6 --set search.warmup_epochs=4 --set search.relaxation=gumbel --set search.unrolled_lr=2 --name "second-order, gumbel, α warm-up, ξ = 2"
    python benchmarks/search_quality.py run --corpus FOLDER --seeds 2 --arm second-order --set search.epochs=6 --set search.warmup_epochs=4 --set search.relaxation=gumbel --set search.unrolled_lr=2 --set search.alpha_dropout=false --name "second-order, gumbel, α warm-up, ξ = 2, no α dropout"
    python benchmarks/search_quality.py run --corpus FOLDER --arm second-order --set search.epochs=6 --set search.warmup_epochs=4 --set search.relaxation=gumbel --set search.unrolled_lr=2 --set search.draws=8 --name "second-order, gumbel, α warm-up, ξ = 2, shared step, 8 draws"
    python benchmarks/search_quality.py run --corpus FOLDER --seeds 2 --arm second-order --set search.epochs=6 --set search.warmup_epochs=4 --set search.relaxation=gumbel --set search.unrolled_lr=2 --set search.draws=8 --set search.arch_lr=0.03 --set search.arch_weight_decay=0 --name "second-order, gumbel, α warm-up, ξ = 2, shared step, 8 draws, α's rate 0.03 without decay"
    python benchmarks/search_quality.py run --corpus FOLDER --again --arm random original one --set retrain.epochs=10 --retrain-seeds 1      # the stored cells, retrained another way
    python benchmarks/search_quality.py run --corpus FOLDER --again --arm second-order --name "second-order, gumbel, α warm-up, ξ = 2" --set retrain.epochs=10 --retrain-seeds 1
    python benchmarks/search_quality.py run --corpus FOLDER --arm DRAWN_V1 DARTS_V2 --set retrain.epochs=10 --seeds 1 --retrain-seeds 3      # named cells
    python benchmarks/search_quality.py run --study example --arm second-order one random              # on the example's own text, with its own recipe
    python benchmarks/search_quality.py run --study example --arm second-order --set search.epochs=6 --set search.warmup_epochs=4 --set search.relaxation=gumbel --set search.unrolled_lr=2 --name "second-order, gumbel, α warm-up, ξ = 2"
    python benchmarks/search_quality.py run --study example --arm second-order --set search.epochs=6 --set search.warmup_epochs=4 --set search.relaxation=gumbel --set search.unrolled_lr=2 --set search.init_range=0.12 --name "second-order, gumbel, α warm-up, ξ = 2, init_range 0.12"
    python benchmarks/search_quality.py run --study example --arm second-order --set search.epochs=6 --set search.warmup_epochs=4 --set search.relaxation=gumbel --set search.unrolled_lr=2 --set search.init_range=0.12 --set search.clip=0.1 --set search.alpha_dropout=false --name "second-order, gumbel, α warm-up, ξ = 2, init_range 0.12, clip 0.1, no α dropout"
    python benchmarks/search_quality.py run --study example --arm second-order --set search.epochs=6 --set search.warmup_epochs=4 --set search.relaxation=gumbel --set search.unrolled_lr=2 --set search.init_range=0.12 --set search.clip=0.1 --set search.alpha_dropout=false --set search.anneal=0.5 --name "second-order, gumbel, α warm-up, ξ = 2, init_range 0.12, clip 0.1, no α dropout, anneal 0.5"
    python benchmarks/search_quality.py run --study example --arm second-order --set search.epochs=6 --set search.warmup_epochs=4 --set search.relaxation=gumbel --set search.unrolled_lr=2 --set search.init_range=0.12 --set search.clip=0.1 --set search.alpha_dropout=false --set search.anneal=0.5 --set search.draws=8 --set search.arch_lr=0.03 --set search.arch_weight_decay=0 --name "second-order, gumbel, α warm-up, ξ = 2, init_range 0.12, clip 0.1, no α dropout, anneal 0.5, shared step, 8 draws, α's rate 0.03 without decay"
    python benchmarks/search_quality.py table                                                          # figures, tests and picture of all stored rows
    python benchmarks/search_quality.py run --study all-words --corpus FOLDER --retrain-seeds 1 --arm random       # with all of the text's words
    python benchmarks/search_quality.py run --study all-words --corpus FOLDER --retrain-seeds 1 --seeds 7 --arm second-order --set search.epochs=3 --set search.warmup_epochs=2 --set search.relaxation=gumbel --set search.unrolled_lr=2 --name drawn
    python benchmarks/search_quality.py run --study all-words --corpus FOLDER --retrain-seeds 1 --seeds 1 --arm DRAWN_V1
    python benchmarks/search_quality.py run --study all-words --corpus FOLDER --retrain-seeds 1 --seeds 1 --cells-of penn "second-order, gumbel, α warm-up, ξ = 2, shared step" --name "drawn with 2,000 words"

To resume an interrupted `run`, give the same command again: finished trials and the checkpoints of an unfinished phase are kept in --work.

Rows whose name lacks "shared step" were made in the published order of the two steps, when there was no other. To make them now, add
`--set search.own_gradient=true` to the commands above. For the rows whose name ends in "shared step", the same commands are given without it.
Rows with "…, temperature to 0.1" have a setting that was tried and dropped: in the epochs in which α moves, the logits were divided by a temperature
0.1**(the share of those epochs that is over), in the softmax of a mixture and in the Gumbel softmax.

`search_arms.py` describes the arms and their budget.

The study `penn` searches on the first half of the training text and on the validation text, and retrains on all of the training text. `example` and
`all-words` do both on all of it. With all words the decoder is most of the arithmetic. There the search of the recipe `drawn` costs 12.9 forward passes, an
epoch in the published order 13, and random search 15.2, with three cells, the number nearest to the budget.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from hardware import made
from quality_table import RESULTS, by_retraining, picture, save, stored, summary, ways_agree
from search_arms import ARMS, SHORT, find_cell

from nni_darts_rnn.genotype import NAMED

DROPOUT = {f"{part}.{name}": value for part in ("search", "retrain")
           for name, value in (("dropout", 0.4), ("dropout_x", 0.4), ("dropout_h", 0.2), ("dropout_i", 0.2))}
# With the paper's clip, 0.25, a step at learning rate 20 can move the supernet's weights by 5, half of their initial norm at this size. Of 8 such searches, 2
# ended worse than a guess. Li and Talwalkar have 0.1, with batches of 64.
SETTINGS = DROPOUT | {"search.hidden_size": 64, "search.batch_size": 64, "search.clip": 0.1, "search.eval_batch_size": 64, "search.epochs": 2,
                      "retrain.hidden_size": 64, "retrain.eval_batch_size": 64, "retrain.test_batch_size": 64, "retrain.epochs": 3, "retrain.dropout_e": 0.0,
                      # a step at this rate moves the perplexity by several points, so the end of a training at a constant rate would be chance
                      "retrain.anneal": 0.34,
                      # a product is as large with ±0.15 at 64 units as with ±0.04 at 850; with a smaller range deep cells start to learn late
                      "search.init_range": 0.15, "retrain.init_range": 0.15}


@dataclass(frozen=True)
class Study:
    """What the arms are compared on. `stem` is the name of the study's files in `results/`."""

    stem: str
    recipe: str
    words: int | None = None  # the size of the vocabulary, with <eos> and <unk>; None: all words
    share: float = 1.0  # the part of the training text that searches have
    settings: dict = field(default_factory=dict)


# the paper's search, whose budget the other arms of the study `example` have
MIXTURE = {f"search.{name}": value for name, value in dict(clip=0.25, init_range=0.04, anneal=0, epochs=2, warmup_epochs=0, relaxation="edge", unrolled_lr="none",
                                                           alpha_dropout=True).items()}
# the retraining of the recipe `drawn`, half as long and therefore with less dropout (docs/method.md)
ALL_WORDS = {"search.epochs": 1, "search.warmup_epochs": 0, "search.relaxation": "edge", "search.unrolled_lr": "none",
             "retrain.epochs": 5, "retrain.dropout": 0.1, "retrain.dropout_x": 0.1, "retrain.dropout_h": 0.05, "retrain.dropout_i": 0.05}
STUDIES = {"penn": Study("search_quality", "penn", 2000, 0.5, SETTINGS), "example": Study("search_quality_example", "small", settings=MIXTURE),
           "all-words": Study("search_quality_all_words", "drawn", settings=ALL_WORDS)}


def frequent(corpus, words: int):
    """The corpus with a vocabulary of `words`: <eos>, <unk> and the most frequent words of its training text. All others become <unk>."""
    import torch

    from nni_darts_rnn.text.vocabulary import EOS, UNK, Vocabulary

    counts = torch.bincount(corpus.train, minlength=len(corpus.vocab))
    ids = [i for i in torch.argsort(counts, descending=True, stable=True).tolist() if corpus.vocab.words[i] not in (EOS, UNK)][:words - 2]
    vocab = Vocabulary((EOS, UNK, *(corpus.vocab.words[i] for i in ids)))
    new = torch.tensor([vocab.index[word] for word in corpus.vocab.words])  # (V,)
    return replace(corpus, vocab=vocab, train=new[corpus.train], valid=new[corpus.valid], test=new[corpus.test])


def trial(options, recipe) -> None:
    """A trial of NNI: one seed of one arm. Its rows go to --work as one file. NNI shows their mean validation perplexity."""
    import nni

    from nni_darts_rnn.files import write_json
    from nni_darts_rnn.genotype import Genotype
    from nni_darts_rnn.options import open_corpus, prepare_torch
    from nni_darts_rnn.pipeline import retrain_phase, take_fast_path

    seed = int(nni.get_next_parameter()["seed"])
    prepare_torch(options)
    study, corpus, folder = STUDIES[options.study], open_corpus(options), place(options, recipe, options.name) / str(seed)
    if study.words is not None:
        corpus = frequent(corpus, study.words)
    folder.mkdir(parents=True, exist_ok=True)
    take_fast_path(corpus, recipe.search, "cpu")
    took, before = folder / "search.json", {}
    if options.again:
        before = found_before(options, options.name)[seed]
        cell, chosen = Genotype.from_json(before["genotype"]), {"seconds": float(before["search_seconds"])}
    elif took.exists():  # left by a run that was stopped
        chosen = json.loads(took.read_text())
        cell = Genotype.from_json(chosen["genotype"])
    else:
        began = time.perf_counter()
        cell = find_cell(options.arm[0], corpus, study.share, recipe, seed, folder)
        chosen = {"genotype": cell.to_json(), "seconds": time.perf_counter() - began}
        write_json(took, chosen)
    rows = []
    for again in range(options.retrain_seeds):
        done = retrain_phase(corpus, cell, recipe.retrain, again, folder / f"retrain{again}", nni.report_intermediate_result)
        rows.append({"name": options.name, "arm": options.arm[0], "retraining": retraining(recipe), "seed": seed, "retrain_seed": again, "genotype": cell.to_json(),
                     "short_valid": done["rows"][SHORT - 1]["perplexity"], "valid": done["valid_perplexity"], "test": done["test_perplexity"],
                     "search_seconds": chosen["seconds"], "retrain_seconds": done["retrain_seconds"], "supernet_valid": before.get("supernet_valid", "")})
    write_json(folder / "rows.json", rows)
    nni.report_final_result(sum(row["valid"] for row in rows) / len(rows))


def retraining(recipe) -> str:
    """The name of a way of retraining. Rows are compared if they have the same one."""
    r = recipe.retrain
    return f"{r.epochs} epochs, anneal {r.anneal:g}, init_range {r.init_range:g}"


def place(options, recipe, name: str) -> Path:
    """The folder of an arm's trials."""
    return options.work / (f"{name}, again for {retraining(recipe)}" if options.again else name)


def found_before(options, name: str) -> dict[int, dict]:
    """seed -> the last row stored for it under `name`, or under the study and name that `--cells-of` gives."""
    study, name = options.cells_of or (options.study, name)
    return {int(row["seed"]): row | ({} if study == options.study else {"supernet_valid": ""}) for row in stored(STUDIES[study].stem) if row["name"] == name}


def run(options, recipe) -> None:
    """Run one NNI experiment for each arm, with the seeds that are not done yet, and store the rows."""
    from nni.experiment import Experiment

    from nni_darts_rnn.options import corpus_words
    from nni_darts_rnn.report.experiments import located

    for arm in options.arm:
        name = options.name or arm
        folder, wanted = place(options, recipe, name), set(range(1, options.seeds + 1))
        if options.again:
            wanted &= found_before(options, name).keys()
        missing = [seed for seed in sorted(wanted) if not (folder / str(seed) / "rows.json").exists()]
        if missing:
            command = [sys.executable, str(Path(__file__).resolve()), "trial", "--study", options.study, "--arm", arm, "--name", name, "--work", str(options.work.resolve()),
                       *corpus_words(located(options, Path.cwd()), searches=True), "--recipe", options.recipe, "--threads", str(options.threads), "--retrain-seeds", str(options.retrain_seeds), *["--again"] * options.again]
            command += ["--cells-of", *options.cells_of] if options.cells_of else []
            for setting in options.set:
                command += ["--set", setting]
            experiment = Experiment("local")
            config = experiment.config
            config.experiment_name, config.trial_command, config.trial_code_directory = f"search quality: {name}", shlex.join(command), Path(__file__).parent
            config.search_space = {"seed": {"_type": "choice", "_value": missing}}
            config.tuner.name, config.max_trial_number, config.trial_concurrency = "GridSearch", len(missing), options.concurrency
            config.experiment_working_directory = (options.work / "nni").resolve()
            experiment.run(options.port)
            experiment.stop()
        done = collect(folder)
        print(f"{name}: {len(done) // options.retrain_seeds} of {len(wanted)} seeds done", flush=True)
        save(done, STUDIES[options.study].stem)


def collect(folder: Path) -> list[dict]:
    """The rows of an arm's finished seeds. If the arm searched, they have the supernet's last validation perplexity."""
    rows = []
    for path in sorted(folder.glob("*/rows.json")):
        there, searched = json.loads(path.read_text()), path.with_name("search.csv")
        if searched.exists():
            with open(searched, encoding="utf-8") as file:
                last = list(csv.DictReader(file))[-1]["perplexity"]
            there = [row | {"supernet_valid": last} for row in there]
        rows += there
    return rows


def table() -> None:
    for study in STUDIES.values():
        rows = stored(study.stem)
        found = {"retrained": {way: summary(there) for way, there in by_retraining(rows).items()}, "ways": ways_agree(rows),
                 **made(__file__, ["table"]), "settings": {"recipe": study.recipe} | study.settings | {"words": study.words, "short_epochs": SHORT}}
        (RESULTS / f"{study.stem}.json").write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        picture(rows, RESULTS / f"{study.stem}.svg")
        for way, figures in found["retrained"].items():
            print(f"{study.stem}, retrained for {way}")
            for name, arm in figures["arms"].items():
                against = ", ".join(f"{arm[f'minus_{other}']:+.2f} to {other} (p {arm[f'p_{other}']:.3f})" for other in ("random", "original") if f"p_{other}" in arm)
                print(f"{name:>14}: {arm['seeds']} seeds, valid {arm['valid_mean']:.2f} ± {arm['valid_sd'] or 0:.2f}, test {arm['test_mean']:.2f}, "
                      f"best {arm['best_valid']:.2f} (test {arm['best_test']:.2f}), search {arm['search_seconds']:.0f} s; {against}")
        print(found["ways"])


def main() -> None:
    from nni_darts_rnn.options import add_run_options, checked_recipe

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "table", "trial"), help="trial: what NNI runs")
    add_run_options(parser)
    parser.set_defaults(recipe=None, threads=1)
    parser.add_argument("--study", choices=tuple(STUDIES), default="penn", help="penn: a small size of the Penn Treebank, all settings in this file; example: the recipe that --corpus pydoc has; all-words: the recipe drawn")
    parser.add_argument("--arm", nargs="+", choices=(*ARMS, *NAMED), default=["second-order"])
    parser.add_argument("--name", help="what the rows are called; default: the arm")
    parser.add_argument("--again", action="store_true", help="no search: the cells that were last stored under the name, retrained with these settings")
    parser.add_argument("--cells-of", nargs=2, metavar=("STUDY", "NAME"), help="no search: --again with the cells that were last stored under this name in that study")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--retrain-seeds", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("search_quality"), help="folder of finished and unfinished trials")
    parser.add_argument("--concurrency", type=int, default=2, help="trials at a time")
    parser.add_argument("--port", type=int, default=8080, help="of NNI's web page")
    options = parser.parse_args()
    if options.what == "table":
        return table()
    if options.device == "gpu":
        parser.error("--device: arms are compared on the CPU")
    study, options.again = STUDIES[options.study], options.again or options.cells_of is not None
    options.recipe = options.recipe or study.recipe
    given, options.set = options.set, [f"{key}={value}" for key, value in study.settings.items()] + options.set
    recipe = checked_recipe(options, {})
    options.set = given
    if options.what == "trial":
        return trial(options, recipe)
    return run(options, recipe)


if __name__ == "__main__":
    main()
