"""One self-contained HTML page about an experiment: the ranking, and each trial's cell, curves, α, recipe and the commands that repeat it.

The page has no script and loads nothing from elsewhere. Its pictures are drawn anew from the trials' numbers, so no markup comes from their folders. Every
text from a file is escaped.
"""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

from .. import __version__
from ..files import write_text
from ..outputs import figures
from ..talk import duration
from .experiments import Experiment, located
from .pictures import cell_picture, picture
from .style import PAGE
from .trial_folder import Result, Trial, read_trial
from .trial_section import trial_section
from .words import anchor, big, esc, facts, moment, perplexity, short, span

COMPARED = 5  # trials in the comparison of curves; more lines are hard to tell apart


def write_report(experiment: Experiment, path: str | Path) -> Path:
    """Write the page to `path`, whole or not at all."""
    return write_text(path, render(experiment))


def write_trial_report(folder: str | Path, options, experiment: str, trial: str) -> Path:
    """Write `folder`/report.html about the one trial whose results are there.

    `experiment` and `trial` are ids, and `options` those of the trial's command, which this process runs.
    """
    options = located(options, Path.cwd())
    found = read_trial(trial, Path(folder), {}, options, alive=False)
    return write_report(Experiment(experiment, Path(folder), f"Trial {trial}", "this trial alone", None, None, options, (found,)),
                        Path(folder) / "report.html")


def render(experiment: Experiment) -> str:
    """The page as HTML."""
    ranking, unfinished = experiment.ranking(), experiment.unfinished()
    parts = [_summary(experiment, ranking)]
    if ranking:
        parts.append(_ranking(ranking))
    if len(ranking) > 1:
        parts.append(_comparison(ranking[:COMPARED]))
    parts += [trial_section(trial, place) for place, trial in enumerate(ranking, start=1)]
    if unfinished:
        parts.append(_unfinished(unfinished))
    return PAGE.format(title=esc(f"{experiment.name or 'Experiment'} ({experiment.id})"), body="\n".join(parts), foot=_foot(ranking))


def _summary(experiment: Experiment, ranking: list[Trial]) -> str:
    known = [("Experiment", f"<code>{esc(experiment.id)}</code>"), ("State", f"{esc(experiment.status)}; {esc(experiment.count())}")]
    if experiment.started:
        known.append(("Started", moment(experiment.started)))
        if experiment.ended:
            known.append(("Took", esc(duration(experiment.ended - experiment.started))))
    known.append(("Corpus", esc(experiment.options.corpus)))
    recipe = ranking[0].recipe if ranking else None
    known.append(("Recipe", esc(recipe.name if recipe else experiment.options.recipe)))
    text = f'''<header><p class="eyebrow">Search for a recurrent cell</p><h1>{esc(experiment.name or "Experiment " + experiment.id)}</h1>
{facts(known)}</header>'''
    if not ranking:
        return text + '\n<section><h2>No trial has finished yet</h2><p>Make the report again once one has.</p></section>'
    best = ranking[0]
    return text + f'''
<section class="hero" aria-labelledby="best">
<h2 id="best">Best cell</h2>
<p class="figures">{big(best.result.valid_perplexity, "validation perplexity")}{big(best.result.test_perplexity, "test perplexity")}
{big(best.result.parameters, "parameters")}</p>
{cell_picture(best, "hero")}
<p class="small">Trial <a href="#{anchor(best)}">{esc(best.id)}</a> has the lowest validation perplexity of the retrained cell. Lower is better;
the test text played no part in the choice.{_counts(best.result)}</p>
</section>'''


def _counts(result: Result) -> str:
    """What counts of words alone would give, beside which a perplexity says something."""
    if result.unigram_perplexity is None or result.bigram_perplexity is None:
        return ""
    return (f"\nCounts of single words would have a test perplexity of {perplexity(result.unigram_perplexity)}, those of pairs "
            f"{perplexity(result.bigram_perplexity)}.")


def _ranking(ranking: list[Trial]) -> str:
    opened = list(dict.fromkeys(key for trial in ranking for key in trial.parameters if key != "seed"))
    head = "".join(f'<th scope="col"{extra}>{esc(name)}</th>' for name, extra in [
        ("Rank", ' class="n"'), ("Trial", ""), ("Seed", ' class="n"'), *((key, ' class="n wide"') for key in opened), ("Validation", ' class="n"'),
        ("Test", ' class="n"'), ("Supernet", ' class="n wide"'), ("Search", ' class="n wide"'), ("Retraining", ' class="n wide"')])
    rows = []
    for place, trial in enumerate(ranking, start=1):
        r = trial.result
        cells = [f'<td class="n">{place}</td>', f'<th scope="row"><a href="#{anchor(trial)}">{esc(trial.id)}</a></th>',
                 f'<td class="n">{esc(trial.seed)}</td>',
                 *(f'<td class="n wide">{esc(short(trial.parameters.get(key, "–")))}</td>' for key in opened),
                 f'<td class="n">{perplexity(r.valid_perplexity)}</td>', f'<td class="n">{perplexity(r.test_perplexity)}</td>',
                 f'<td class="n wide">{perplexity(r.supernet_valid_perplexity)}</td>', f'<td class="n wide">{span(r.search_seconds)}</td>',
                 f'<td class="n wide">{span(r.retrain_seconds)}</td>']
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f'''<section aria-labelledby="ranking"><h2 id="ranking">Ranking</h2>
<div class="scroll" role="region" aria-labelledby="ranking" tabindex="0"><table class="ranking"><thead><tr>{head}</tr></thead>
<tbody>
{chr(10).join(rows)}
</tbody></table></div>
<p class="small">Perplexities: of the retrained cell on the validation and the test text, and of the supernet at the end of the search.</p>
</section>'''


def _comparison(ranking: list[Trial]) -> str:
    rows = []
    for trial in ranking:
        try:
            rows += [{"phase": "retraining", "epoch": row["epoch"], f"{trial.id}_perplexity": row.get("perplexity")}
                     for row in figures.read_rows(trial.folder) if row["phase"] == "retrain"]
        except ValueError:
            continue  # the trial's own section says why it has no curves
    label = f"Validation perplexity after each epoch of retraining, trials {', '.join(t.id for t in ranking)}"
    drawn = picture("curves.svg", rows, "compared", label)
    which = "each trial" if len(ranking) < COMPARED else f"the best {len(ranking)} trials"
    return f'''<section aria-labelledby="compared"><h2 id="compared">Retraining compared</h2>
{drawn}
<p class="small">Validation perplexity after each epoch, {which}.</p></section>'''


def _unfinished(trials: list[Trial]) -> str:
    items = []
    for trial in trials:
        settings = ", ".join(f"{k} = {short(v)}" for k, v in trial.parameters.items())
        lines = [f'<b>{esc(trial.id)}</b> <span class="state {esc(trial.status)}">{esc(trial.status)}</span>',
                 f'<span class="small">{esc(settings)}</span>']
        reached = _reached(trial)
        lines += [f"<br>{esc(reached)}"] * bool(reached) + [f'<br><code class="note">{esc(trial.note)}</code>'] * bool(trial.note)
        items.append(f"<li>{' '.join(lines)}</li>")
    return f'''<section aria-labelledby="unfinished"><h2 id="unfinished">Not finished</h2>
<ul class="unfinished">
{chr(10).join(items)}
</ul></section>'''


def _reached(trial: Trial) -> str:
    """How far an unfinished trial came: its last epoch and the perplexity there. Empty if that cannot be read."""
    try:
        row = figures.read_rows(trial.folder)[-1]
        phase = "search" if row["phase"] == "search" else "retraining"
        return f"reached epoch {row['epoch']} of the {phase}: validation perplexity {float(row['perplexity']):.2f}"
    except (KeyError, TypeError, ValueError):
        return ""


def _foot(ranking: list[Trial]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in ranking[0].result.versions.items()) if ranking else ""
    made = f"Made by nni-darts-rnn {__version__}, {moment(datetime.now(timezone.utc).timestamp())}."
    return f"<p>{made}{' Trials ran with ' + esc(versions) + '.' if versions else ''}</p>"
