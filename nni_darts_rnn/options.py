"""The options of commands and trials: declare them, check them, apply them, and write them as the words of a command again."""

from __future__ import annotations

import argparse
import dataclasses
import io
import os
import re
import sys

from .checks import did_you_mean, one_line
from .recipes import RECIPES, Recipe, flatten, get_recipe
from .talk import named

REFUSALS = (ValueError, OSError, FloatingPointError, MemoryError, RuntimeError)


class Parser(argparse.ArgumentParser):
    """Reports an error in one line, as all other refusals are reported. The usage is shown by `--help` only."""

    def parse_known_args(self, args=None, namespace=None):
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:  # reported here rather than in `parse_args`: only here are the subcommand's own options known
            near = did_you_mean(unknown[0].partition("=")[0], self._option_string_actions) if unknown[0].startswith("-") else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{near}")
        return namespace, unknown

    def error(self, message: str):
        refused = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)$", message)
        near = did_you_mean(refused[1], re.findall(r"[\w-]+", refused[2])) if refused else ""
        self.exit(2, f"{self.prog}: error: {message}{near}\n")


def refusal(error: Exception) -> str:
    """The one line that a command prints for an error of REFUSALS. A `RuntimeError` about anything but memory is a fault of the program; it is raised again."""
    if not isinstance(error, (MemoryError, RuntimeError)):
        return " ".join(str(error).splitlines())  # a path may contain a line break
    if isinstance(error, RuntimeError) and type(error).__name__ != "OutOfMemoryError" and not re.search("not enough memory|can't allocate memory", str(error)):
        raise error
    return f"out of memory ({one_line(error)[-120:] or type(error).__name__}); take fewer units, a smaller batch, or a shorter bptt"


def in_any_locale() -> None:
    """Let output work in any environment. Letters such as α are escaped where the locale lacks them. Without a standard error, messages are dropped."""
    if sys.stderr is None:  # whoever started the program closed it; `print` would use standard output
        sys.stderr = open(os.devnull, "w", encoding="utf-8")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def add_run_options(parser: argparse.ArgumentParser, learns: bool = True, searches: bool = True) -> None:
    """Add the options that all commands with a corpus and a recipe share. Only those that search have `--alpha-fraction`."""
    parser.add_argument("--corpus", default="pydoc", help="pydoc (default), penn, wikitext-2, wikitext-103, or a folder with train/valid/test.txt")
    parser.add_argument("--corpus-folder", help="where the files of a named corpus are")
    parser.add_argument("--corpus-mirror", help="https URL that a named corpus is fetched from")
    if searches:
        parser.add_argument("--alpha-fraction", type=float, default=0.0, metavar="F",
                            help="part of the training text kept apart for α during the search; 0 (default): α learns from the validation text, as in the paper")
    else:
        parser.set_defaults(alpha_fraction=0.0)
    names = f"{', '.join(name for name in RECIPES if name != 'small')}; see `nni-darts-rnn recipes`"
    if learns:
        recipes, fields = f"named hyper-parameters: small (default), {names}", f"a field, e.g. --set {'search' if searches else 'retrain'}.epochs=5"
    else:
        recipes = f"recipe by which the text is read, in place of that of the training: small, {names}"
        fields = "retrain.bptt, retrain.eval_batch_size or retrain.test_batch_size"
    parser.add_argument("--recipe", default="small", help=recipes)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=f"replace {fields}; may be repeated")
    parser.add_argument("--threads", type=int, help="CPU threads for torch; default: torch's own choice")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "gpu"), help="where to compute; auto (default): a GPU where torch finds one")


def add_keeping_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of every command that runs long, and can be stopped and resumed."""
    parser.add_argument("--checkpoint-every", default="5min", metavar="WHEN",
                        help="how often a checkpoint is written within an epoch, besides the one at its end: 90s, 5min (default), 1h, 100steps, never")
    parser.add_argument("--resume", default="auto",
                        help="auto (default): goes on with an unfinished run in the folder of its results; must: refuses where there is none; "
                        "never: begins anew")


def add_onnx_option(parser: argparse.ArgumentParser) -> None:
    """Add `--onnx`, an option of the programs that nnictl runs as trials."""
    parser.add_argument("--onnx", action="store_true", help="leave the trained model as model.onnx too, which the Visualization of NNI's web page opens")


def keeping(arguments: argparse.Namespace):
    from .checkpoints.store import Every, Keeping

    return Keeping(Every.parse(arguments.checkpoint_every), arguments.resume)


def checked_seed(value) -> int:
    try:
        seed = int(value)
        if isinstance(value, bool) or seed != float(value) or not 0 <= seed < 2**32:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"seed: {value!r} must be a whole number from 0 to {2**32 - 1}") from None
    return seed


def settings(arguments: argparse.Namespace) -> dict[str, str]:
    """The values that `--set` gives: field -> text."""
    found = {}
    for text in arguments.set:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set {text!r} must be KEY=VALUE, for example search.epochs=5")
        found[key.strip()] = value.strip()
    return found


def checked_recipe(arguments: argparse.Namespace, parameters: dict):
    """The recipe, with `--set` and the tuner's `parameters` in place. Where both set a field, the tuner's value counts."""
    # in one step: fields are checked against each other, and where both set some of these, only all of them together make sense
    return get_recipe(arguments.recipe, settings(arguments) | flatten(parameters))


def without_search(arguments: argparse.Namespace) -> str | None:
    """One line that names the fields of `--set` that belong to a search, for a command that has none; None if there are no such fields."""
    unread = [key for key in settings(arguments) if key.startswith("search.")]
    return f"a retraining has no search: without effect here: {', '.join(unread)}" if unread else None


def open_corpus(arguments: argparse.Namespace):
    from .corpus import load_corpus

    return load_corpus(arguments.corpus, folder=arguments.corpus_folder, mirror=arguments.corpus_mirror, alpha_fraction=arguments.alpha_fraction)


def quiet_hosts() -> None:
    """Silence those warnings of NNI, Lightning and torch that mean nothing to the person who runs this. All others stay."""
    import logging
    import warnings

    # NNI 3.0 has a fixed list of torch's layers, and warns of each layer that is not in it because torch added it later
    warnings.filterwarnings("ignore", category=RuntimeWarning, message=".*is found to be not a nn.Module.*")
    warnings.filterwarnings("ignore", message=".*(pkg_resources is deprecated|isinstance.treespec, LeafSpec|torch.jit.script. is deprecated).*")
    warnings.filterwarnings("ignore", message=".*Running trial code without runtime.*")
    # NNI's own text says that this one is safe to ignore with one-shot strategies
    logging.getLogger("nni.nas.evaluator.pytorch.lightning").addFilter(lambda record: "Validation dataloaders are missing" not in record.getMessage())


def prepare_torch(arguments: argparse.Namespace) -> None:
    """Check and set the threads, check the device, ask for large pages for large tensors, and quiet the hosts."""
    if arguments.threads is not None and not 1 <= arguments.threads <= 1024:
        raise ValueError(f"--threads: {arguments.threads} must be from 1 to 1024")
    quiet_hosts()
    # Gradients are new memory in every step, and large pages make it cheaper. torch reads this variable once, before its first tensor of 2 MiB; it then asks
    # Linux for pages of that size.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    import torch

    from .model import choose_device

    choose_device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    # "high" is TF32 on a GPU, and sums of two bfloat16 numbers where a CPU has tiles for them (compiled.py). Where that has too few digits, bilevel.py asks
    # for full precision.
    torch.set_float32_matmul_precision("high")


def corpus_words(options, searches: bool = False) -> list[str]:
    """The options that name the corpus, as the words of a command. `--alpha-fraction` is among them only if the command searches."""
    words = ["--corpus", named(options.corpus)]
    for name in ("corpus_folder", "corpus_mirror"):
        if getattr(options, name):
            words += ["--" + name.replace("_", "-"), str(getattr(options, name))]
    return words + (["--alpha-fraction", str(options.alpha_fraction)] if searches and options.alpha_fraction else [])


def set_words(recipe: Recipe, part: str) -> list[str]:
    """A `--set` for every field of `part` that differs from the named recipe, as the words of a command."""
    return [word for key, (_, value) in differences(recipe).items() if key.startswith(part + ".")
            for word in ("--set", f"{key}={str(value).lower() if value is None or isinstance(value, bool) else value}")]


def differences(recipe: Recipe) -> dict[str, tuple]:
    """Field -> (its value in the named recipe, its value in this one), for the fields that differ."""
    named, found = RECIPES[recipe.name], {}
    for part in ("search", "retrain"):
        there, here = getattr(named, part), getattr(recipe, part)
        for f in dataclasses.fields(here):
            if getattr(there, f.name) != getattr(here, f.name):
                found[f"{part}.{f.name}"] = getattr(there, f.name), getattr(here, f.name)
    return found
