"""The command line: `nni-darts-rnn search | retrain | evaluate | recipes`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from . import __version__
from .trial import add_run_options, checked_recipe, checked_seed, open_corpus, prepare_torch


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nni-darts-rnn", description="Finds recurrent cells by second-order DARTS, trains and tests them.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    search = commands.add_parser("search", help="search for a cell on a corpus", description="Searches for a cell and leaves genotype.json in --out.")
    search.set_defaults(action=_search)
    retrain = commands.add_parser("retrain", help="train a cell from scratch and test it",
                                  description="Trains a genotype from scratch on a corpus, keeps the best on validation in --out, and tests it.")
    retrain.set_defaults(action=_retrain)
    retrain.add_argument("--genotype", required=True, help="DARTS_V1, DARTS_V2, ENAS, a genotype.json, or a folder with one")
    evaluate = commands.add_parser("evaluate", help="perplexity of a trained cell", description="Prints validation and test perplexity of a trained model.")
    evaluate.set_defaults(action=_evaluate)
    evaluate.add_argument("model", help="folder with model.safetensors and model.json")
    recipes = commands.add_parser("recipes", help="the named recipes and every field", description="Prints every recipe's fields with what they mean.")
    recipes.set_defaults(action=_recipes)
    recipes.add_argument("--json", action="store_true", help="for machines: one JSON document")

    for command in (search, retrain, evaluate):
        add_run_options(command)
        command.add_argument("--seed", default=0, help="of everything random; default 0")
        command.add_argument("--json", action="store_true", help="for machines: only the result, as JSON, on standard output")
        if command is not evaluate:
            command.add_argument("--out", type=Path, help=f"folder for the results; default runs/{command.prog.split()[-1]}-CORPUS-SEED")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        arguments.action(arguments)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"nni-darts-rnn: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("nni-darts-rnn: interrupted; what was finished is kept", file=sys.stderr)
        return 130
    return 0


class _Talk:
    """Words for people on standard error, so that standard output holds the result alone; nothing with --json."""

    def __init__(self, arguments):
        self.silent = arguments.json
        self.progress = not arguments.json and sys.stderr.isatty()

    def __call__(self, text: str) -> None:
        if not self.silent:
            print(text, file=sys.stderr, flush=True)

    def epoch(self, row: dict) -> None:
        rate = f", {row['tokens_per_second']:,.0f} tokens/s" if row.get("tokens_per_second") else ""
        self(f"{row['phase']} epoch {row['epoch']}: validation perplexity {row['default']:.2f}{rate}")


def _start(arguments):
    """Checks every setting, then opens the corpus: (recipe, seed, corpus, talk)."""
    seed, recipe = checked_seed(arguments.seed), checked_recipe(arguments, {})
    if getattr(arguments, "genotype", None):
        from .genotype import load_genotype

        arguments.genotype = load_genotype(arguments.genotype)
    prepare_torch(arguments)
    talk, corpus = _Talk(arguments), open_corpus(arguments)
    talk(f"corpus {corpus.describe()}")
    return recipe, seed, corpus, talk


def _out(arguments, corpus, seed: int) -> Path:
    folder = arguments.out or Path("runs") / f"{arguments.command}-{Path(corpus.name).name}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _search(arguments) -> None:
    from .pipeline import search_phase

    recipe, seed, corpus, talk = _start(arguments)
    folder = _out(arguments, corpus, seed)
    s = recipe.search
    talk(f"searching {s.n_nodes} nodes of {s.hidden_size} units for {s.epochs} epochs, recipe {recipe.name}, seed {seed}; results in {folder}")
    found = search_phase(corpus, s, seed, folder, talk.epoch, talk.progress, arguments.device)
    talk(f"found {found['genotype']} in {found['search_seconds']:.0f} s")
    talk(f"next: nni-darts-rnn retrain --corpus {arguments.corpus} --recipe {arguments.recipe} --genotype {folder / 'genotype.json'}")
    _answer(arguments, {"genotype": json.loads(found["genotype"].to_json()), "supernet_valid_perplexity": found["supernet_valid_perplexity"],
                        "seconds": found["search_seconds"], "folder": str(folder)}, found["genotype"].to_json())


def _retrain(arguments) -> None:
    from .baselines import bigram_perplexity, unigram_perplexity
    from .pipeline import retrain_phase

    recipe, seed, corpus, talk = _start(arguments)
    folder = _out(arguments, corpus, seed)
    r = recipe.retrain
    talk(f"training {arguments.genotype} with {r.hidden_size} units for up to {r.epochs} epochs, recipe {recipe.name}, seed {seed}; results in {folder}")
    done = retrain_phase(corpus, arguments.genotype, r, seed, folder, talk.epoch, talk.progress, arguments.device)
    done.pop("rows")
    done |= {"unigram_perplexity": unigram_perplexity(corpus), "bigram_perplexity": bigram_perplexity(corpus), "folder": str(folder)}
    talk(f"next: nni-darts-rnn evaluate {folder} --corpus {arguments.corpus}")
    _answer(arguments, done, f"test perplexity {done['test_perplexity']:.2f} (validation {done['valid_perplexity']:.2f}), {done['parameters']:,} parameters; "
            f"of the same test text: unigram {done['unigram_perplexity']:.2f}, interpolated bigram {done['bigram_perplexity']:.2f}")


def _evaluate(arguments) -> None:
    from .baselines import bigram_perplexity, unigram_perplexity
    from .model import choose_device, perplexity
    from .trained import load_trained

    recipe, _, corpus, _ = _start(arguments)
    model, words = load_trained(arguments.model)
    if tuple(words) != tuple(corpus.vocab.words):
        raise ValueError(f"{arguments.model} was trained on another vocabulary ({len(words)} words) than that of {corpus.name} ({len(corpus.vocab)})")
    model.to(choose_device(arguments.device))
    r = recipe.retrain
    found = {"valid_perplexity": perplexity(model, corpus.valid, r.eval_batch_size, r.bptt),
             "test_perplexity": perplexity(model, corpus.test, r.test_batch_size, r.bptt),
             "unigram_perplexity": unigram_perplexity(corpus), "bigram_perplexity": bigram_perplexity(corpus)}
    _answer(arguments, found, f"test perplexity {found['test_perplexity']:.2f}, validation {found['valid_perplexity']:.2f}; "
            f"of the same test text: unigram {found['unigram_perplexity']:.2f}, interpolated bigram {found['bigram_perplexity']:.2f}")


def _recipes(arguments) -> None:
    from .recipes import RECIPES

    if arguments.json:
        print(json.dumps({name: recipe.to_dict() for name, recipe in RECIPES.items()}, indent=2))
        return
    for part in ("search", "retrain"):
        print(f"{part + '.*':32}" + "".join(f"{name:>14}" for name in RECIPES))
        for field in dataclasses.fields(getattr(RECIPES["penn"], part)):
            values = "".join(f"{str(getattr(getattr(recipe, part), field.name)):>14.13}" for recipe in RECIPES.values())
            print(f"{part + '.' + field.name:32}{values}   {field.metadata['help']}")
        print()


def _answer(arguments, data: dict, words: str) -> None:
    print(json.dumps(data) if arguments.json else words)


if __name__ == "__main__":
    sys.exit(main())
