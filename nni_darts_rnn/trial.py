"""The program that nnictl runs in a trial: `python3 -m nni_darts_rnn.trial`.

The tuner may draw `seed`, any field of the recipe (`search.…`, `retrain.…`), and Hyperband's TRIAL_BUDGET, which is the number of epochs of the retraining
(see `rungs.py`). Any other parameter is refused before training begins.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from .checkpoints.stopping import Terminated, end_by, interrupts_remembered
from .options import (
    REFUSALS,
    Parser,
    add_keeping_options,
    add_onnx_option,
    add_run_options,
    checked_recipe,
    checked_seed,
    in_any_locale,
    keeping,
    open_corpus,
    prepare_torch,
    quiet_hosts,
    refusal,
)
from .own_parameters import own_parameters
from .rungs import BUDGET, configuration_folder, copy_results, recipe_fields


def make_parser() -> Parser:
    """The trial command's options."""
    parser = Parser(prog="python3 -m nni_darts_rnn.trial", description="One trial of an NNI experiment: search, retrain, test.")
    add_run_options(parser)
    add_keeping_options(parser)
    add_onnx_option(parser)
    parser.add_argument("--rungs", metavar="FOLDER", help="with Hyperband: where a configuration's search and training are kept for its next trial; "
                        "default: in the experiment's folder")
    return parser


def main(argv: list[str] | None = None) -> int:
    in_any_locale()
    arguments = make_parser().parse_args(argv)

    quiet_hosts()
    import nni

    def final(result: dict) -> None:
        nni.report_final_result({"default": result["valid_perplexity"]}
                                | {k: result[k] for k in ("test_perplexity", "parameters", "seconds", "supernet_valid_perplexity")})

    def report(row: dict) -> None:
        if row["epoch"]:  # without the untrained supernet: beside its perplexity, about the number of words, the rest of the curve would be flat on NNI's page
            nni.report_intermediate_result(row)

    return in_trial(lambda: run(arguments, own_parameters(), report, final))


def in_trial(work: Callable[[], object]) -> int:
    """Run a trial's `work` and return the exit status: 0, or 2 after one line of error if it was refused. If it is stopped, the process ends by that signal."""
    try:
        with interrupts_remembered():
            work()
    except REFUSALS as error:
        print(f"error: {refusal(error)}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Terminated) as stop:  # how NNI stops a trial; its checkpoint stays, and after Ctrl-C the best model too
        print("stopped; the trial goes on from its checkpoint when it is run again", file=sys.stderr, flush=True)
        end_by(stop)
    return 0


def run(arguments: argparse.Namespace, parameters: dict, report, final=None) -> dict:
    """Check everything, then run the trial in NNI's output folder. With Hyperband it runs in its configuration's folder (`rungs.py`), and the results are
    copied. `final` gets the result before the checkpoints are removed. `ValueError` with one line for options and parameters that are not allowed."""
    keep, rung = keeping(arguments), BUDGET in parameters
    if arguments.rungs and not rung:
        raise ValueError(f"--rungs {arguments.rungs}: the tuner gave no {BUDGET}; only Hyperband does")
    seed = checked_seed(parameters.get("seed", 0))
    recipe = checked_recipe(arguments, recipe_fields(parameters))
    prepare_torch(arguments)
    from .pipeline import check_fits, whole_run

    if arguments.onnx:
        from .outputs.onnx_file import check_onnx, write_trained_onnx

        check_onnx()
    corpus = open_corpus(arguments)
    check_fits(corpus, recipe.search, recipe.retrain)
    folder = Path(os.environ.get("NNI_OUTPUT_DIR", "."))
    print(f"corpus {corpus.describe()}; recipe {recipe.name}; seed {seed}", flush=True)
    where = configuration_folder(parameters, folder, arguments.rungs) if rung else folder

    def done(result: dict) -> None:
        if rung:
            copy_results(where, folder)
        if arguments.onnx:
            write_trained_onnx(folder)
        _leave_report(folder, arguments)
        if final is not None:
            final(result)

    return whole_run(corpus, recipe, seed, where, report, device=arguments.device, keeping=keep, final=done, more=rung)


def _leave_report(folder: Path, arguments: argparse.Namespace) -> None:
    """Write a page about this trial among its files, which NNI's server serves. If it cannot be written, the finished trial does not fail."""
    import nni

    from .report.page import write_trial_report

    try:
        write_trial_report(folder, arguments, nni.get_experiment_id(), nni.get_trial_id())
    except (OSError, ValueError) as error:
        print(f"report.html was not written: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
