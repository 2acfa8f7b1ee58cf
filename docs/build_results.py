"""Makes docs/results.md from what the benchmarks have stored: `python docs/build_results.py`. No measured figure on that page is typed by hand.

The published figures for comparison are quoted in this file, each with its source.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean, stdev

STORED = Path(__file__).parents[1] / "benchmarks" / "results"
PAGE = Path(__file__).with_name("results.md")

PUBLISHED = (  # cell or model, corpus, test perplexity, source
    ("DARTS, second order", "Penn Treebank", "55.7", "Liu, Simonyan and Yang 2019"),
    ("DARTS, first order", "Penn Treebank", "57.6", "the same"),
    ("random search with weight sharing", "Penn Treebank", "55.5", "Li and Talwalkar 2019"),
    ("ENAS", "Penn Treebank", "55.8; 58.6 as trained by the DARTS authors", "Pham et al. 2018; Liu et al. 2019"),
    ("DARTS, second order, transferred", "WikiText-2", "69.6", "Liu et al. 2019"),
    ("AWD-LSTM", "WikiText-2", "66.0", "as listed in Liu et al. 2019"),
)

HEAD = """# Results

Made by `python docs/build_results.py` from `benchmarks/results/`; every section has its command and, where that is stored, when and where it ran.
Perplexities are per word; lower is better. Small sizes, and what did not work stays in: nothing here is the paper's 850 units trained for thousands
of epochs, for which these machines are too slow.
"""


def page() -> str:
    parts = [HEAD, *(section() for section in (quality, example, many_words, shared_weights, shared_weights_all_words, all_words, long_training, lstm, gradient, draws, steps, layers, few_rows)), published()]
    return "\n".join(part for part in parts if part)


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [list(map(str, row)) for row in (head, *rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def stored(name: str):
    """A file's JSON, or None where it has not been measured yet."""
    path = STORED / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def made(found: dict) -> str:
    """A line that says by which command, when and where something was measured."""
    machine = found["machine"]
    where = machine if isinstance(machine, str) else f"{machine['cores']} cores of {machine['cpu']}, Python {machine['python']}, torch {machine['torch']}"
    return f"`{found['command']}`, {found['date']}; {where}.\n"


def spread(mean: float, sd: float | None) -> str:
    return f"{mean:.2f}" + ("" if sd is None else f" ± {sd:.2f}")


def mean_sd(values: list[float]) -> tuple[float, float | None]:
    return fmean(values), stdev(values) if len(values) > 1 else None


def quality() -> str:
    return arms("Does the search beat chance?", "search_quality", lambda settings: (
        f"Penn Treebank with its {settings['words']:,} most frequent words, searches on the first half of the training text, retrainings on all of it, {settings['search.hidden_size']} units, batches of "
        f"{settings['search.batch_size']} streams, the paper's learning rate (20), in the search a clip of {settings['search.clip']} where nothing else is said. Weights start in ±{settings['search.init_range']} in the searches whose cells were "
        f"retrained from ±{settings['retrain.init_range']}, but for `original` (±0.04). Arms have one budget of arithmetic, within 5 %, or 12 to 29 % less where the step is shared (*one*: a random cell as it comes; *random*: the best of several random cells after a short training; *shared*: of random cells under shared weights; *original*: the published "
        "code's numerics; the head of `benchmarks/search_arms.py` says "
        "which arm does what), and the published order of their two steps, but for those that are called *shared step*, the default now. Every cell is retrained from scratch from each of the retraining seeds; a cell's figure is their "
        "mean, ± the standard deviation over search seeds. Differences are paired by seed, and p is the exact two-sided sign-flip test's, of each pair of arms by itself (0.008 is the least that eight seeds can have, 0.125 four, 0.5 two). Every choice was made on the validation text, "
        "so that of differences those on the test text are the fairer. Seconds are of two searches at a time on two cores, of one machine or another, that "
        "other work often shared, so they do not compare arms; the budget does. *Supernet*: the median of its validation perplexities at the end. *Agreement*: the share of nodes, function and predecessor, "
        "that the cells of two seeds have in common, mean over pairs. *Temperature to 0.1*: what α is divided by before its softmax is taken falls from 1 to 0.1, geometrically, while α moves; "
        "in the Gumbel softmax, α with its noise. It made no difference beyond chance, and is no setting of a recipe. *8 draws*: a batch is run as eight parts with a cell each "
        "(`search.draws=8`); *α's rate 0.03 without decay*: `search.arch_lr=0.03`, `search.arch_weight_decay=0`.\n"))


def example() -> str:
    return arms("The same on the example's text", "search_quality_example", lambda settings: (
        f"Python's documentation (80 thousand words) and the retraining of the recipe `{settings['recipe']}`, as `examples/darts_rnn.yml` has them. Searches on all of the training text; "
        f"where nothing else is said with a clip of {settings['search.clip']} and weights from ±{settings['search.init_range']}. The rest is as above.\n"))


def many_words() -> str:
    return arms("The same with all words", "search_quality_all_words", lambda settings: (
        f"Penn Treebank with all of its 10,000 words, and the recipe `{settings['recipe']}`: *drawn* is its search, with {settings['retrain.epochs']} epochs of its retraining and a dropout of "
        f"{settings['retrain.dropout']} for ten and 0.15. *Drawn with 2,000 words*: a cell of the first section's *shared step*, trained with all words. The rest is as above. The search leaves relu out, which every random "
        "cell here has; its weights are trained with SGD, with which relu starts slowly, and the cells with Adam, which may be why it is not ahead here. *Random* is the best of three cells, with 15.2 passes of arithmetic where "
        "the search has 12.9. Searches have 64 units, and cells 128. The two cells with the largest "
        "perplexity after one epoch were apart from all others then (in one of them the text that was learned had half of it: the carried state had gone where a state of zeros does not lead), "
        "and only partly made up for it.\n"))


def shared_weights() -> str:
    return judged("## What a search's shared weights say of a cell\n", "shared_weights.json", lambda cells: (
        f"On the example's text, with drawn cells. The {cells} different cells that the searches of its section above in the published order found, each judged by its validation perplexity with the weights that a search ends "
        "with. *Agreement*: the rank correlation of that with the perplexity after a training of its own, mean ± standard deviation over searches. Each way of searching "
        "has what the one above it has; the last is the recipe `small`.\n"))


def shared_weights_all_words() -> str:
    return judged("### With all words\n", "shared_weights_all_words.json", lambda cells: (
        f"The same with all words of the Penn Treebank and the recipe `drawn`, over the {cells} cells of the study above, each trained once by Adam. In the second row Adam trains the search's weights too (rate 0.003, clip 0.25, no "
        "ξ of its own), with as little dropout as the cells have.\n"))


def judged(title: str, name: str, about: Callable[[int], str]) -> str:
    """The section about one study of `shared_weights.py`. `about` gives its introduction from the number of cells that were judged."""
    found = stored(name)
    if found is None:
        return ""
    own: dict[str, Counter] = {way: Counter() for way in found["ways"]}
    for row in found["rows"]:
        own[row["way"]].update(op for op, _ in json.loads(row["genotype"])["recurrent"])
    rows = [(way, r["seeds"], spread(r["rank_correlation"], r["rank_correlation_sd"]), *(f"{r[k]:,.1f}" for k in ("best", "median", "worst", "perplexity")), f"{r['depth']:.2f}",
             ", ".join(f"{op} {count / own[way].total():.0%}" for op, count in own[way].most_common()))
            for way, r in found["ways"].items()]
    parts = [title, about(found["rows"][-1]["cells"]),
             table(("search", "searches", "agreement", "best of the cells", "median", "worst", "α's own cell", "its depth", "its functions"), rows)]
    for way, r in found["ways"].items():
        if low := r.get("lower"):
            parts.append(f"*{way}*, {low['seeds']} searches: going down from α's cell node by node for as long as the shared weights find a better one leads to a mean of "
                         f"{low['perplexity']:.1f} with the shared weights and a depth of {low['depth']:.2f}. Retrained, those cells have {spread(low['retrained'], low.get('retrained_sd'))}, α's own "
                         f"{spread(low['retrained_alpha'], low.get('retrained_alpha_sd'))}" + (f" (p = {low['p']:.3f}, paired).\n" if "p" in low else ".\n"))
    return "\n".join([*parts, made(found)])


def all_words() -> str:
    found = stored("drawn_penn.json")
    if found is None:
        return ""
    pairs = {}
    for r in found["retrained"]:
        pairs.setdefault((r["cell"], r["seed"]), {})[r["optimizer"]] = f"{r['valid_perplexity']:.2f}, {r['test_perplexity']:.2f}, {r['retrain_seconds']:.0f}"
    return "\n".join([
        "## The recipe `drawn` with all words\n",
        f"Penn Treebank with all of its 10,000 words: one search, and retrainings of its cell and of named ones, with Adam, which the recipe has, and in one case with SGD in its place "
        f"(rate 20, averaging after 5 epochs without improvement), {found['threads']} thread{'s' * (found['threads'] > 1)}. The search took {found['search']['seconds']:.0f} s, and its supernet ended at a validation perplexity of "
        f"{found['search']['supernet_valid_perplexity']:.0f}: far less trained than with 2,000 words. "
        f"Its cell: `{found['search']['genotype']}`.\n",
        table(("cell", "seed", "Adam: validation, test, s", "SGD"), [(cell, seed, of["adam"], of.get("sgd", "")) for (cell, seed), of in pairs.items()]),
        *([found["note"] + "\n"] if "note" in found else []), made(found)])


def arms(title: str, stem: str, about: Callable[[dict], str]) -> str:
    """The section about one study of `search_quality.py`. `about` gives its introduction from the settings that were compared."""
    found = stored(f"{stem}.json")
    if found is None:
        return ""
    parts = [f"## {title}\n", about(found["settings"])]
    for way, figures in found["retrained"].items():
        parts += retrained(way, figures, found["settings"]["short_epochs"])
    parts += [f"Over the {pair['cells']} cells that were retrained both ways ({pair['ways'][0]}; {pair['ways'][1]}), the rank correlation of the two perplexities is "
              f"{pair['rank_correlation']:.2f}.\n" for pair in found["ways"]]
    return "\n".join([*parts, f"![Every retrained cell as a point, by arm, with the arm's mean](../benchmarks/results/{stem}.svg)\n", made(found)])


def retrained(way: str, found: dict, short: int) -> list[str]:
    """The parts of that section about the arms' cells after one way of retraining."""
    arms, rows = found["arms"], []
    for name, arm in arms.items():
        against = [f"{arm[f'minus_{other}']:+.2f} to {other}, p = {arm[f'p_{other}']:.3f}" for other in arms if f"p_{other}" in arm]
        on_test = f"{arm['minus_random_test']:+.2f}, p = {arm['p_random_test']:.3f}" if "p_random_test" in arm else ""
        rows.append((name, f"{arm['seeds']} × {arm['retrainings']}", spread(arm["valid_mean"], arm["valid_sd"]), spread(arm["test_mean"], arm["test_sd"]),
                     f"{arm['best_valid']:.2f} / {arm['best_test']:.2f}", "" if arm["supernet_valid"] is None else f"{arm['supernet_valid']:,.0f}",
                     "" if arm["agreement"] is None else f"{arm['agreement']:.2f}", f"{arm['search_seconds']:.0f}", "; ".join(against), on_test))
    best = min(arms.values(), key=lambda arm: arm["best_valid"])
    noise = "" if "sd_of_retrainings" not in found else (
        f" Retrainings of one cell have a standard deviation of {found['sd_of_retrainings']:.2f} ({found['cells_retrained_often']} cells with {found['most_retrainings']} each)" + (
            "." if found["cells_retrained_often"] < 8 else f", of which {found['sd_beside_retraining_seed']:.2f} is left when what the retraining seed does to all cells is taken out."))
    ops = sorted({op for arm in arms.values() for op in arm["ops"]})
    kinds = [(name, f"{arm['depth']:.2f}", *(f"{arm['ops'].get(op, 0):.0%}" for op in ops)) for name, arm in arms.items()]
    traits = found["traits"]

    def goes(of: dict) -> str:
        return ", ".join(f"{name} {r['rank_correlation']:+.2f} (p = {r['p']:.2g})" for name, r in of["with"].items())

    alone = found.get("traits_of_random")
    blindly = "" if alone is None else f" Among the {alone['cells']} random ones alone: {goes(alone)}."
    return [f"### Retrained for {way}\n",
            table(("arm", "seeds × retrainings", "validation", "test", "best cell, validation / test", "supernet", "agreement", "search, s", "difference in validation", "on the test text, to random"), rows),
            f"The rank correlation between {short} epoch of retraining and all of it is {found['short_long_rank_correlation']:.2f} over all cells.{noise} By chance the agreement "
            f"would be {found['agreement_by_chance']:.2f}. The best cell:\n\n```json\n{best['best_genotype']}\n```\n",
            f"What the perplexity of the {traits['cells']} different cells goes with, as rank correlations, above 0 for worse: {goes(traits)}; p takes the cells for independent, "
            f"which those of one arm are not.{blindly} *Depth*: functions between state 0 and a node, mean over nodes; the others count the nodes that have the function. What the arms chose:\n",
            table(("arm", "depth", *ops), kinds)]


def long_training() -> str:
    found = stored("long_training.json")
    if found is None:
        return ""
    rows = [(one["cell"], one["units"], f"{one['parameters']:,}", one["optimizer"], one["precision"], one["dropout"], f"{one['epochs']}, {one['anneal']:.0%}", f"{one['valid_perplexity']:.2f}", f"{one['test_perplexity']:.2f}",
             f"{one['tokens_per_second']:,.0f}", f"{one['retrain_seconds'] / 60:.0f}") for one in found.values()]
    marks = sorted({k for one in found.values() for k in (1, 2, 4, 8, 12, 16, 24, one["epochs"]) if k <= one["epochs"]})
    curves = [(f"{one['cell']}, {one['epochs']} epochs, {one['optimizer']}", *(f"{one['curve'][k - 1]:.1f}" if k <= one["epochs"] else "" for k in marks)) for one in found.values()]
    return "\n".join([
        "## Long trainings with all words\n",
        "Penn Treebank with all of its 10,000 words, one training each; those of 17 epochs ran side by side. Published cells of 850 units have validation perplexities of 63.4 to "
        "67.3 after 300 epochs (Li and Talwalkar 2019, table 3).\n",
        table(("cell", "units", "parameters", "optimizer", "products", "dropout", "epochs, share of falling rate", "validation", "test", "tokens/s", "minutes"), rows),
        "Validation perplexity after so many epochs:\n",
        table(("cell", *marks), curves), "![Validation perplexity of every epoch](../benchmarks/results/long_training.svg)\n",
        *(made(one) + (f"{one['note']}\n" if "note" in one else "") for one in found.values())])


def lstm() -> str:
    parts = ["## A cell beside nn.LSTM and nn.GRU\n", "Penn Treebank with all of its words; the same tokens, optimizer, dropout and schedule, as many parameters in all. The settings are those "
             "that were chosen for cells; torch's layers may have been given several learning rates.\n"]
    for stem in ("against_lstm", "against_lstm_mixture"):
        if (found := stored(f"{stem}.json")) is None:
            continue
        recipe = found["recipe"]
        parts.append(f"The cell `{found['genotype']}`, {recipe['hidden_size']} units, {recipe['epochs']} epochs of {'Adam' if recipe.get('optimizer') == 'adam' else 'SGD'}:\n")
        rows = []
        for model, lr in dict.fromkeys((row["model"], row["lr"]) for row in found["trained"]):
            runs = [row for row in found["trained"] if (row["model"], row["lr"]) == (model, lr)]
            valid, test = (spread(*mean_sd([row[f"{text}_perplexity"] for row in runs])) for text in ("valid", "test"))
            rows.append((model if model == "cell" else f"nn.{model.upper()}", f"{lr:g}", runs[0]["hidden_size"], f"{runs[0]['parameters']:,}", len(runs), valid, test,
                         f"{fmean(row['seconds'] for row in runs) / 60:.0f}"))
        parts += [table(("", "learning rate", "units", "parameters", "seeds", "validation", "test", "minutes"), rows),
                  f"Unigram perplexity of the test text {found['unigram_perplexity']:.1f}, interpolated bigram {found['bigram_perplexity']:.1f}.\n",
                  *([found["note"] + "\n"] if "note" in found else []), made(found)]
    return "\n".join(parts)


def gradient() -> str:
    found = stored("gradient_quality.json")
    settings, rows = found["settings"], found["rows"]
    xi = settings["lr"]
    moments = [(H, steps) for H in settings["sizes"] for steps in settings["moments"]]
    names = list(dict.fromkeys(row["estimator"] for row in rows if row["xi"] == xi))

    def cell(name, H, steps):
        row = next(r for r in rows if (r["estimator"], r["hidden_size"], r["steps"], r["xi"]) == (name, H, steps, xi))
        return f"{row['cosine']:.2f} / {row['relative_error']:.2g}"

    return "\n".join([
        "## The architecture gradient\n",
        f"Cosine to double backprop through the step / relative error, at ξ = {xi:g}; {settings['corpus']}, batch {settings['batch_size']}, {settings['length']} time "
        f"steps, medians of {settings['draws']} draws, float64, torch {settings['torch']}.\n",
        table(("estimator", *(f"H {H}, {steps} steps" for H, steps in moments)), [(name, *(cell(name, *m) for m in moments)) for name in names]),
        "`python benchmarks/gradient_quality.py --corpus FOLDER`.\n"])


def draws() -> str:
    found = stored("draws.json")
    if found is None:
        return ""
    return "\n".join([
        "### Of drawn cells\n",
        f"At the size of the first section's study, ξ = {found['settings']['search.unrolled_lr']}, α's rate {found['settings']['search.arch_lr']:g}, the first {found['steps']} steps after {found['settings']['search.warmup_epochs']} epochs "
        "without α. *Signal*: the cosine between the mean gradient of even steps and that of odd ones, each step's scaled to length 1. *Spread*: α's standard deviation after the last of "
        "these steps. With eight draws and without decay α comes to where its gradient has no one direction any more.\n",
        table(("cells drawn for a batch", "α's weight decay", "searches", "signal", "spread", "the first search's cell"),
              [(r["search.draws"], f"{r['search.arch_weight_decay']:g}", r["seeds"], f"{r['signal']:.2f}", f"{r['spread']:.2f}",
                f"`{', '.join(f'{op}←{j}' for op, j in json.loads(row['genotype'])['recurrent'])}`")
               for r in found["ways"] if (row := next(row for row in found["rows"] if all(row[k] == r[k] for k in ("search.draws", "search.arch_weight_decay"))))]),
        made(found)])


def steps() -> str:
    return "\n".join([
        "## Speed of a search step\n",
        "The share of the peak counts each version's own arithmetic: of 13 forward passes in the published order of the two steps (`original`, `own-gradient`), 6 in NNI's first-order "
        "step, 10 in the others, and two thirds of that where a cell is drawn (`search.relaxation=gumbel`). *fused* is ours, *eager* the same without a compiler, *readable* the form that both "
        "are tested against, *no-tiles* is ours without AMX, *fewer-digits* ours as commands run it, *products* as much arithmetic in multiplications alone.\n",
        step("search_step.json"), "### The same with AVX-512\n", step("search_step_avx512.json"), "### The same with AMX\n", step("search_step_amx.json")])


def step(file: str) -> str:
    found = stored(file)
    sizes = [(name, made_) for name, made_ in found.items() if isinstance(made_, dict) and "versions" in made_]
    rows = []
    for name, at in sizes:
        for version, r in at["versions"].items():
            rows.append((name, version, f"{r['ms']:,.0f}", f"{r['ratio']:.2f} ×", f"{r['share_of_peak']:.0%}", f"{r['peak_gb']:.2f}"))
    grown = found["growth"]
    axes = [axis for axis, r in grown.items() if isinstance(r, dict) and "flops_ratio" in r]
    return "\n".join([
        "; ".join(f"{name}: " + ", ".join(f"{k} {v:,}" for k, v in at["size"].items()) for name, at in sizes) + f". {sizes[0][1]['threads']} threads.\n",
        table(("size", "version", "ms", "ratio", "share of the peak", "peak GB"), rows),
        "Growth of the fused step when one of them is doubled:\n",
        table(("", *axes), [("time", *(f"{grown[a]['ratio']:.2f} ×" for a in axes)), ("arithmetic", *(f"{grown[a]['flops_ratio']:.2f} ×" for a in axes))]),
        *dict.fromkeys(made(at) for _, at in sizes)])


def layers() -> str:
    return "\n".join(["## Speed of the recurrent layer in training\n", layer("retrain_step.json"), "### The same with AVX-512\n", layer("retrain_step_avx512.json"), "### The same with AMX\n", layer("retrain_step_amx.json")])


def layer(file: str) -> str:
    found = stored(file)
    rows = [(name, f"H {at['size']['H']}, B {at['size']['B']}", version, f"{r['tokens_per_second']:,.0f}", f"{r['ratio']:.2f} ×")
            for name, at in found["sizes"].items() for version, r in at["layer"].items()]
    return "\n".join([table(("size", "", "version", "tokens/s", "ratio"), rows), made(found)])


def few_rows() -> str:
    found = stored("few_rows.json")
    names = list(next(iter(found["tokens_per_second"].values())))
    rows = [(size, *(f"{at[name]:,.0f}" for name in names)) for size, at in found["tokens_per_second"].items()]
    return "\n".join([
        "## Speed of the recurrent layer over few rows\n",
        "Tokens a second, forward, without gradients: the published loop (`original`), ours with threads that share the rows or, as it chooses for so few of them, the units, and LSTM and GRU with as many recurrent parameters.\n",
        table(("", *names), rows), made(found)])


def published() -> str:
    return "## Published, for comparison\n\n" + table(("cell or model", "corpus", "test perplexity", "source"), PUBLISHED)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
