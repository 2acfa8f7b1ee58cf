"""One of NNI's multi-trial strategies samples cells, and a fastai Learner trains each: `python examples/multi_trial.py RegularizedEvolution`.

With `--engine ts` every cell is a trial of NNI's local training service, several at a time, with NNI's web page at `--port`.
With `--shared`, RandomOneShot first trains weights that all cells share, on randomly sampled ones. RegularizedEvolution then judges each cell with these
weights as they are. Random search with such weights (Li and Talwalkar 2019) is a strong baseline on this space.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import pytorch_lightning as pl
from nni.nas.experiment import NasExperiment
from nni.nas.experiment.config import NasExperimentConfig

from nni_darts_rnn import FastaiEvaluator, Genotype, get_recipe, load_corpus, strategies
from nni_darts_rnn.search import make_space

NAMES = ("Random", "GridSearch", "RegularizedEvolution", "TPE", "PolicyBasedRL")


def make_strategy(name: str, trials: int, seed: int = 0):
    options = {"RegularizedEvolution": dict(population_size=max(2, trials // 3), sample_size=max(1, trials // 6), mutation_prob=0.2, seed=seed),
               "PolicyBasedRL": dict(samples_per_update=max(1, trials // 5))}
    return getattr(strategies, name)(**options.get(name, {"seed": seed}))


def run(space, evaluator, strategy, trials: int, engine: str = "sequential", port: int = 8080, concurrency: int = 2,
        folder: str | Path | None = None) -> list[tuple[Genotype, float, list[float]]]:
    """Run the experiment: each cell that was trained, its result, and the result of every epoch. Best first.

    The engine "sequential" runs in this process, "ts" in the local training service. In the sequential engine the space keeps its weights (format "raw"). A
    trial of the training service makes the space anew from its arguments.
    """
    config = NasExperimentConfig("sequential", "raw") if engine == "sequential" else NasExperimentConfig("ts", "simplified", "local")
    config.max_trial_number = trials
    config.experiment_working_directory = folder or tempfile.mkdtemp()
    if engine == "ts":
        config.trial_concurrency = concurrency
    experiment = NasExperiment(space, evaluator, strategy, config)
    experiment.run(port)
    found = [(Genotype.from_sample(model.sample), model.metric, list(model.metrics.intermediates)) for model in strategy.list_models()]
    experiment.stop()
    return found


def shared_weights(corpus, recipe, trials: int, folder: str | Path | None = None, **trainer_options) -> list:
    """What `run` returns, of regularized evolution that judges each cell with the weights that RandomOneShot has trained."""
    import one_shot

    _, space, _ = one_shot.search("RandomOneShot", corpus, recipe.search, folder=folder, **trainer_options)
    return run(space, FastaiEvaluator(corpus, recipe, epochs=0), make_strategy("RegularizedEvolution", trials), trials, folder=folder)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("strategy", choices=NAMES)
    parser.add_argument("--corpus", default="pydoc", help="pydoc (default), penn, wikitext-2, wikitext-103, or a folder with train/valid/test.txt")
    parser.add_argument("--recipe", default="small", help="named hyper-parameters; default small; see `nni-darts-rnn recipes`")
    parser.add_argument("--trials", type=int, default=10, help="cells to try; default 10")
    parser.add_argument("--engine", choices=("sequential", "ts"), default="sequential",
                        help="sequential (default): one cell after another in this process; ts: each a trial of NNI's training service")
    parser.add_argument("--port", type=int, default=8080, help="of NNI's web page, with `--engine ts`; default 8080")
    parser.add_argument("--shared", action="store_true", help="judge cells with weights trained once on random cells; with RegularizedEvolution")
    arguments = parser.parse_args(argv)
    if arguments.shared and arguments.strategy != "RegularizedEvolution":
        parser.error(f"--shared works only with RegularizedEvolution, not with {arguments.strategy}")
    if arguments.shared and arguments.engine != "sequential":
        parser.error(f"--shared works only with --engine sequential, not with {arguments.engine}: its models share weights in one process")
    try:
        corpus, recipe = load_corpus(arguments.corpus), get_recipe(arguments.recipe)
    except ValueError as wrong:
        parser.error(str(wrong))
    pl.seed_everything(0, verbose=False)  # for the space's initial weights, from which every cell starts with the format "raw"
    if arguments.shared:
        found = shared_weights(corpus, recipe, arguments.trials)
    else:
        evaluator = FastaiEvaluator(arguments.corpus, arguments.recipe)
        found = run(make_space(len(corpus.vocab), recipe.search), evaluator, make_strategy(arguments.strategy, arguments.trials), arguments.trials,
                    arguments.engine, arguments.port)
    for genotype, result, _ in found:
        print(f"{result:.4f} {genotype}")


if __name__ == "__main__":
    main()
