"""The command line: `nni-darts-rnn search | retrain | evaluate | plot | best | report | init | recipes`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from . import __version__
from .checkpoints.stopping import Terminated, interrupts_remembered
from .commands import afterwards, compute
from .files import at_home
from .options import REFUSALS, Parser, add_keeping_options, add_run_options, in_any_locale, refusal

EXPERIMENT = "id of an NNI experiment on this machine (running, stopped or finished), or its folder"


def new_folder(text: str) -> Path:
    """The path of a folder that exists or can be made, for argparse. `argparse.ArgumentTypeError` otherwise."""
    try:
        path = at_home(text, "the path")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    there = next((place for place in (path, *path.parents) if os.path.lexists(place)), path)  # lexists is False for a place that may not be read
    if not text or not os.path.isdir(there):
        what = "it is empty" if not text else f"{there} is a {'file' if os.path.exists(there) else 'link to nothing'}"
        raise argparse.ArgumentTypeError(f"{text!r} is not possible: {what}; give a folder")
    return path


def new_file(text: str) -> Path:
    """The path of a file that exists or can be made, for argparse. `argparse.ArgumentTypeError` otherwise."""
    path = new_folder(str(Path(text).parent)) / Path(text).name
    if text and os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):  # a file written there would replace, say, /dev/null
        raise argparse.ArgumentTypeError(f"{text!r} is not possible: {path} is a device or a pipe; give a file")
    if not text or os.path.isdir(path):
        raise argparse.ArgumentTypeError(f"{text!r} is not possible: {f'{path} is a folder' if text else 'it is empty'}; give a file")
    return path


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="nni-darts-rnn", description="Finds recurrent cells by second-order DARTS, trains and tests them.",
                    epilog="`nni-darts-rnn COMMAND --help` says more about one command.")
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, action, help: str, description: str, epilog: str | None = None) -> argparse.ArgumentParser:
        command = subparsers.add_parser(name, help=help, description=description, epilog=epilog)
        command.set_defaults(action=action)
        return command

    search = add("search", compute.search, "search for a cell on a corpus",
                 "Searches for a cell; leaves genotype.json, alpha.json, search.csv and pictures in --out.",
                 "Example: nni-darts-rnn search --corpus pydoc --seed 1 --out found")
    retrain = add("retrain", compute.retrain, "train a cell from scratch and test it",
                  "Trains a cell from scratch on a corpus, keeps the best on validation in --out, and tests it. With --from it is the cell of an "
                  "experiment's best trial, trained until validation no longer improves; corpus and recipe are then that trial's where no other is given.",
                  "Examples: nni-darts-rnn retrain --genotype DARTS_V2; nni-darts-rnn retrain --from k3v8x2ab --set retrain.epochs=40")
    cell = retrain.add_mutually_exclusive_group()
    cell.add_argument("--genotype", help="DARTS_V1, DARTS_V2, ENAS, DRAWN_V1, a genotype.json, or a folder with one")
    cell.add_argument("--from", dest="experiment", metavar="EXPERIMENT", help=EXPERIMENT + "; the cell of its best trial is trained")
    evaluate = add("evaluate", compute.evaluate, "perplexity of a trained cell", "Prints validation and test perplexity of a trained model, "
                   "read as after its training where no --recipe is given. A text that has a name is that of its training where no --corpus is given.",
                   "Example: nni-darts-rnn evaluate trained")
    evaluate.add_argument("model", help="folder with model.safetensors and model.json")
    for command in (search, retrain, evaluate):
        add_run_options(command, learns=command is not evaluate, searches=command is search)
        if command is not evaluate:
            command.add_argument("--seed", default=0, help="of everything random; default 0")
            add_keeping_options(command)
            command.add_argument("--out", type=new_folder, help=f"folder for the results; default runs/{command.prog.split()[-1]}-CORPUS-SEED"
                                 + (", with --from runs/retrain-EXPERIMENT-TRIAL-SEED" if command is retrain else ""))
    retrain.set_defaults(corpus=None, recipe=None)  # with --from the trial's, otherwise the usual ones
    evaluate.set_defaults(corpus=None, recipe=None)

    plot = add("plot", afterwards.plot, "pictures from a folder of results",
               "Draws the cell, the heat map and animation of α, and the learning curves from the folder of a trial, a search or a retraining.",
               "Example: nni-darts-rnn plot found")
    plot.add_argument("folder", type=Path, help="where genotype.json, alpha.json, search.csv, retrain.csv are; those that are there are drawn")
    plot.add_argument("--out", type=new_folder, help="folder for the pictures; default: the same")
    best = add("best", afterwards.best, "the best trial of an NNI experiment",
               "Names the trial whose retrained cell has the lowest validation perplexity: folder, cell, pictures.",
               "Example: nni-darts-rnn best k3v8x2ab")
    best.add_argument("experiment", metavar="EXPERIMENT", help=EXPERIMENT)
    report = add("report", afterwards.report, "one HTML page about an NNI experiment",
                 "Writes one self-contained HTML page: ranking of the trials, each trial's cell, curves, α, recipe, and the commands "
                 "that do it again.",
                 "Example: nni-darts-rnn report k3v8x2ab --out report.html")
    report.add_argument("experiment", metavar="EXPERIMENT", help=EXPERIMENT)
    report.add_argument("--out", type=new_file, default=Path("report.html"), help="the page; default report.html; an older one is replaced")
    init = add("init", afterwards.init, "write the example experiments into a folder",
               "Writes the examples' YAML files and search spaces into a folder, for nnictl to run and for you to change.",
               "Example: nni-darts-rnn init mine && nnictl create --config mine/examples/darts_rnn.yml")
    init.add_argument("folder", type=new_folder, metavar="DIR", help="made where it does not exist")
    init.add_argument("--force", action="store_true", help="replace files of the same name")
    recipes = add("recipes", compute.recipes, "the named recipes and every field", "Prints every recipe's fields with what they mean.")

    for command in (search, retrain, evaluate, plot, best, report, init, recipes):
        command.add_argument("--json", action="store_true", help="for machines: only the result, as JSON, on standard output")
    return parser


def main(argv: list[str] | None = None) -> int:
    in_any_locale()
    arguments = build_parser().parse_args(argv)
    try:
        with interrupts_remembered():
            arguments.action(arguments)
        if sys.stdout is not None:  # None if whoever started the program closed it
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has stopped reading
        if sys.stdout is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # the status of a program that SIGPIPE ends
    except REFUSALS as error:
        print(f"nni-darts-rnn: error: {refusal(error)}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Terminated) as stop:
        kept = "; what was finished is kept, and the same command goes on from there" if "resume" in arguments else ""
        print(f"nni-darts-rnn: interrupted{kept}", file=sys.stderr)
        return getattr(stop, "code", 130)  # 143 after SIGTERM
    return 0


if __name__ == "__main__":
    sys.exit(main())
