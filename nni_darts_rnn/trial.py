"""What nnictl runs in a trial: `python3 -m nni_darts_rnn.trial`.

The tuner's parameters are `seed` and any field of the recipe (`search.…`, `retrain.…`), and Hyperband's TRIAL_BUDGET, the number of epochs of
retraining (see `rungs.py`); anything else is refused before training begins.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from .checkpoints.stopping import Terminated, end_by, interrupts_remembered
from .checks import did_you_mean, one_line
from .own_parameters import own_parameters
from .rungs import BUDGET, configuration_folder, copy_results, recipe_fields

REFUSALS = (ValueError, OSError, FloatingPointError, MemoryError, RuntimeError)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other refusal; `--help` has the usage."""

    def parse_known_args(self, args=None, namespace=None):
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:  # said here, and not by `parse_args`, since here it is the command's own options that are known
            near = did_you_mean(unknown[0].partition("=")[0], self._option_string_actions) if unknown[0].startswith("-") else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{near}")
        return namespace, unknown

    def error(self, message: str):
        refused = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)$", message)
        near = did_you_mean(refused[1], re.findall(r"[\w-]+", refused[2])) if refused else ""
        self.exit(2, f"{self.prog}: error: {message}{near}\n")


def refusal(error: Exception) -> str:
    """What a command says of one of REFUSALS. A `RuntimeError` that tells of anything but memory is a fault of the program's own, and goes on."""
    if not isinstance(error, (MemoryError, RuntimeError)):
        return str(error)
    if isinstance(error, RuntimeError) and type(error).__name__ != "OutOfMemoryError" and not re.search("not enough memory|can't allocate memory", str(error)):
        raise error
    return f"out of memory ({one_line(error)[-120:] or type(error).__name__}); take fewer units, a smaller batch, or a shorter bptt"


def in_any_locale() -> None:
    """What is printed has letters such as α; where a locale lacks them they are escaped."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


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

    return in_trial(lambda: run(arguments, own_parameters(), nni.report_intermediate_result, final))


def in_trial(work: Callable[[], object]) -> int:
    """The exit status of a trial that does this work: 2 after one line where it was refused; stopped, it ends by the signal."""
    try:
        with interrupts_remembered():
            work()
    except REFUSALS as error:
        print(f"error: {refusal(error)}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Terminated) as stop:  # how NNI stops a trial; its checkpoint stays, and after Ctrl-C the best model so far
        print("stopped; the trial goes on from its checkpoint when it is run again", file=sys.stderr, flush=True)
        end_by(stop)
    return 0


def add_run_options(parser: argparse.ArgumentParser, learns: bool = True, searches: bool = True) -> None:
    """The options that every command with a corpus and a recipe shares; the text for α is of those that search."""
    parser.add_argument("--corpus", default="pydoc", help="pydoc (default), penn, wikitext-2, wikitext-103, or a folder with train/valid/test.txt")
    parser.add_argument("--corpus-folder", help="where the files of a named corpus are")
    parser.add_argument("--corpus-mirror", help="https URL that a named corpus is fetched from")
    if searches:
        parser.add_argument("--alpha-fraction", type=float, default=0.0, metavar="F",
                            help="part of the training text kept apart for α during the search; 0 (default): α learns from the validation text, as in the paper")
    else:
        parser.set_defaults(alpha_fraction=0.0)
    names = "drawn, tiny, penn, wikitext-2; see `nni-darts-rnn recipes`"
    if learns:
        recipes, fields = f"named hyper-parameters: small (default), {names}", f"a field, e.g. --set {'search' if searches else 'retrain'}.epochs=5"
    else:
        recipes = f"recipe by which the text is read, in place of that of the training: small, {names}"
        fields = "retrain.bptt, retrain.eval_batch_size or retrain.test_batch_size"
    parser.add_argument("--recipe", default="small", help=recipes)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=f"replace {fields}; may be repeated")
    parser.add_argument("--threads", type=int, help="CPU threads for torch; default: torch's own choice")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "gpu"), help="where to compute")


def add_keeping_options(parser: argparse.ArgumentParser) -> None:
    """The options of every command that computes for long, and can be stopped and gone on with."""
    parser.add_argument("--checkpoint-every", default="5min", metavar="WHEN",
                        help="how often the run keeps itself between the ends of epochs: 90s, 5min (default), 1h, 100steps, never")
    parser.add_argument("--resume", default="auto",
                        help="auto (default): goes on with an unfinished run in the folder of its results; must: refuses where there is none; "
                        "never: begins anew")


def add_onnx_option(parser: argparse.ArgumentParser) -> None:
    """An option of what nnictl runs in a trial."""
    parser.add_argument("--onnx", action="store_true", help="leave the trained model as model.onnx too, which the Visualization of NNI's web page opens")


def keeping(arguments: argparse.Namespace):
    from .checkpoints.store import Every, Keeping

    return Keeping(Every.parse(arguments.checkpoint_every), arguments.resume)


def run(arguments: argparse.Namespace, parameters: dict, report, final=None) -> dict:
    """Checks everything, then runs the trial in NNI's output folder. `ValueError` with one line for what is not allowed. `final` gets the result
    before the trial's checkpoints go."""
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
    """A page about this trial among its files, which NNI's server serves. One that cannot be made is no reason to fail a finished trial."""
    import nni

    from .report.page import write_trial_report

    try:
        write_trial_report(folder, arguments, nni.get_experiment_id(), nni.get_trial_id())
    except (OSError, ValueError) as error:
        print(f"report.html was not written: {error}", file=sys.stderr)


def checked_seed(value) -> int:
    try:
        seed = int(value)
        if isinstance(value, bool) or seed != float(value) or not 0 <= seed < 2**32:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"seed: {value!r} must be a whole number from 0 to {2**32 - 1}") from None
    return seed


def checked_recipe(arguments: argparse.Namespace, parameters: dict):
    """The recipe with `--set` and the tuner's parameters in place; the tuner's win."""
    from .recipes import get_recipe

    settings = {}
    for text in arguments.set:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set {text!r} must be KEY=VALUE, for example search.epochs=5")
        settings[key.strip()] = value.strip()
    return get_recipe(get_recipe(arguments.recipe, settings), parameters)


def set_keys(arguments: argparse.Namespace) -> list[str]:
    """The fields that `--set` names."""
    return [text.partition("=")[0].strip() for text in arguments.set]


def without_search(arguments: argparse.Namespace) -> str | None:
    """One line about the fields of `--set` that are of a search, for a command that has none."""
    unread = [key for key in set_keys(arguments) if key.startswith("search.")]
    return f"a retraining has no search, so {', '.join(unread)} changes nothing here" if unread else None


def open_corpus(arguments: argparse.Namespace):
    from .corpus import load_corpus

    return load_corpus(arguments.corpus, folder=arguments.corpus_folder, mirror=arguments.corpus_mirror, alpha_fraction=arguments.alpha_fraction)


def quiet_hosts() -> None:
    """Silences the hosts' warnings that mean nothing to the person who runs this; others stay."""
    import logging
    import warnings

    # NNI 3.0 lists the layers of torch as it knew them and warns of each one that came later
    warnings.filterwarnings("ignore", category=RuntimeWarning, message=".*is found to be not a nn.Module.*")
    warnings.filterwarnings("ignore", message=".*(pkg_resources is deprecated|isinstance.treespec, LeafSpec|torch.jit.script. is deprecated).*")
    warnings.filterwarnings("ignore", message=".*Running trial code without runtime.*")
    # NNI says itself that this one is safe to ignore with one-shot strategies
    logging.getLogger("nni.nas.evaluator.pytorch.lightning").addFilter(lambda record: "Validation dataloaders are missing" not in record.getMessage())


def prepare_torch(arguments: argparse.Namespace) -> None:
    """Threads and device, checked and set; large pages for large tensors; quiet hosts."""
    if arguments.threads is not None and not 1 <= arguments.threads <= 1024:
        raise ValueError(f"--threads: {arguments.threads} must be from 1 to 1024")
    quiet_hosts()
    # gradients are new memory in every step; torch asks this once, before its first tensor of 2 MiB, and Linux for pages of that size then
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    import torch

    from .model import choose_device

    choose_device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    # TF32 on a GPU, sums of two bfloat16 numbers where a CPU has tiles for them (compiled.py); where those are too few digits, bilevel.py asks for all of them
    torch.set_float32_matmul_precision("high")


if __name__ == "__main__":
    sys.exit(main())
