"""The program that nnictl runs in a trial of a search over cells: `python3 -m nni_darts_rnn.cell_trial`. The tuner draws the cell, and the trial trains it.

The tuner draws the cell, flat (`cell/node_1/op`, `cell/node_1/input`, … as in `DartsRnnSpace`) or nested (`cell/node_1`, with the op as its `_name` and an
`input` inside). It may also draw `seed`, any field `retrain.…` of the recipe, and Hyperband's TRIAL_BUDGET, which is the number of epochs.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

from .genotype import Genotype
from .options import (
    Parser,
    add_onnx_option,
    add_run_options,
    checked_recipe,
    checked_seed,
    in_any_locale,
    open_corpus,
    prepare_torch,
    quiet_hosts,
    without_search,
)
from .own_parameters import own_parameters
from .rungs import recipe_fields
from .trial import in_trial


def main(argv: list[str] | None = None) -> int:
    in_any_locale()
    parser = Parser(prog="python3 -m nni_darts_rnn.cell_trial", description="One trial of an NNI experiment over cells: train and test the tuner's.")
    add_run_options(parser, searches=False)
    parser.add_argument("--maximize", action="store_true", help="report 1/perplexity, the geometric mean of the words' probabilities, in place of the "
                        "perplexity: for what takes the largest result for the best, such as the Curvefitting assessor")
    add_onnx_option(parser)
    arguments = parser.parse_args(argv)

    quiet_hosts()
    import nni

    def metrics(perplexity: float, row: dict) -> dict:
        return row | {"default": 1 / perplexity if arguments.maximize else perplexity}

    def final(result: dict) -> None:
        nni.report_final_result(metrics(result["valid_perplexity"], {k: result[k] for k in ("valid_perplexity", "test_perplexity", "parameters", "seconds")}))

    return in_trial(lambda: run(arguments, own_parameters(), lambda row: nni.report_intermediate_result(metrics(row["perplexity"], row)), final))


def read_parameters(parameters: dict) -> tuple[Genotype, int, dict]:
    """The cell, the seed and the remaining parameters of a tuner's draw. `ValueError` with one line if there is no cell, or for a label of a node that the cell
    does not have, a field of the search, or a bad seed. The rest, by name, is left to `checked_recipe`, which refuses what is no field of the recipe."""
    settings: dict = {}
    sample: dict = {}
    seed = checked_seed(parameters.get("seed", 0))
    for key, value in recipe_fields(parameters).items():
        if re.fullmatch(r"cell/node_\d+", key) and isinstance(value, dict):
            for other in value.keys() - {"_name", "input"}:
                raise ValueError(f"setting {other!r}: the nested choice {key} may hold only its input; settings such as retrain.lr belong to the top level of the search space")
            sample |= {f"{key}/{label}": value[name] for label, name in (("op", "_name"), ("input", "input")) if name in value}
        elif re.fullmatch(r"cell/node_\d+/(op|input)", key):
            sample[key] = value
        elif key == "search" or key.startswith("search."):
            raise ValueError(f"setting {key!r}: a trial of a cell has no search; use retrain.<field>")
        else:
            settings[key] = value
    if not sample:
        raise ValueError("the tuner drew no cell: the search space needs cell/node_<i>/op and cell/node_<i>/input, as in search_spaces/darts_rnn_cell.json")
    genotype = Genotype.from_sample(sample)
    unread = sample.keys() - genotype.to_sample().keys()
    if unread:
        raise ValueError(f"sample: {sorted(unread)[0]} belongs to no node of the cell, which has nodes 1 to {genotype.n_nodes}")
    return genotype, seed, settings


def run(arguments: argparse.Namespace, parameters: dict, report, final=None) -> dict:
    """Check everything, then train and test the cell in NNI's output folder. `final` gets the result before the trial's checkpoints are removed. `ValueError`
    with one line for options and parameters that are not allowed."""
    genotype, seed, settings = read_parameters(parameters)
    recipe = checked_recipe(arguments, settings)
    prepare_torch(arguments)
    from .files import write_json
    from .outputs.versions import package_versions
    from .pipeline import check_fits, retrain_phase

    if arguments.onnx:
        from .outputs.onnx_file import check_onnx, write_trained_onnx

        check_onnx()
    corpus = open_corpus(arguments)
    check_fits(corpus, recipe.retrain)
    folder = Path(os.environ.get("NNI_OUTPUT_DIR", "."))
    print(f"corpus {corpus.describe()}; recipe {recipe.name}; seed {seed}; cell {genotype}", flush=True)
    if (unread := without_search(arguments)) is not None:
        print(unread, flush=True)
    result: dict = {"seed": seed, "corpus": corpus.name, "recipe": recipe.to_dict(), "genotype": genotype.to_json()}

    def done(trained: dict) -> None:
        if arguments.onnx:
            write_trained_onnx(folder)
        result.update({k: trained[k] for k in ("valid_perplexity", "test_perplexity", "unigram_perplexity", "bigram_perplexity", "parameters", "retrain_seconds")})
        result.update(seconds=trained["retrain_seconds"], versions=package_versions())
        write_json(folder / "result.json", result)
        if final is not None:
            final(result)

    retrain_phase(corpus, genotype, recipe.retrain, seed, folder, report, device=arguments.device, final=done)
    return result


if __name__ == "__main__":
    sys.exit(main())
