"""One self-contained HTML page about an experiment: ranking, and for each trial its cell, curves, α, recipe and how to do it again.

No script and nothing loaded from elsewhere. Pictures are drawn anew from the trials' numbers, so no markup comes from their folders;
every text from a file is escaped.
"""

from __future__ import annotations

import dataclasses
import html
import re
import shlex
import tempfile
from datetime import datetime, timezone
from pathlib import Path

from . import __version__, figures
from .experiments import Experiment
from .files import write_text
from .report_style import PAGE
from .talk import duration
from .trial_folder import Trial, differences, read_trial

COMPARED = 5  # trials whose curves the comparison shows; more lines than that are not told apart


def write_report(experiment: Experiment, path: str | Path) -> Path:
    """Writes the page, whole or not at all."""
    return write_text(path, render(experiment))


def write_trial_report(folder: str | Path, options, experiment: str, trial: str) -> Path:
    """`folder`/report.html about the one trial that has left its results there, of these ids. `options` are the trial command's."""
    found = read_trial(trial, Path(folder), {}, options, alive=False)
    return write_report(Experiment(experiment, Path(folder), f"Trial {trial}", "this trial alone", None, None, options, (found,)),
                        Path(folder) / "report.html")


def render(experiment: Experiment) -> str:
    """The page as a text."""
    ranking, unfinished = experiment.ranking(), experiment.unfinished()
    parts = [_summary(experiment, ranking)]
    if ranking:
        parts.append(_ranking(ranking))
    if len(ranking) > 1:
        parts.append(_comparison(ranking[:COMPARED]))
    parts += [_trial(trial, place) for place, trial in enumerate(ranking, start=1)]
    if unfinished:
        parts.append(_unfinished(unfinished))
    return PAGE.format(title=_e(f"{experiment.name or 'Experiment'} ({experiment.id})"), body="\n".join(parts), foot=_foot(ranking))


def _e(text) -> str:
    return html.escape(str(text))


# -------------------------------------------------------------------------------------------------------------- pieces

def _summary(experiment: Experiment, ranking: list[Trial]) -> str:
    facts = [("Experiment", f"<code>{_e(experiment.id)}</code>"), ("State", f"{_e(experiment.status)}; {_e(experiment.count())}")]
    if experiment.started:
        facts.append(("Started", _time(experiment.started)))
        if experiment.ended:
            facts.append(("Took", _e(duration(experiment.ended - experiment.started))))
    facts.append(("Corpus", _e(experiment.options.corpus)))
    recipe = ranking[0].recipe if ranking else None
    facts.append(("Recipe", _e(recipe.name if recipe else experiment.options.recipe)))
    text = f'''<header><p class="eyebrow">Search for a recurrent cell</p><h1>{_e(experiment.name or "Experiment " + experiment.id)}</h1>
{_facts(facts)}</header>'''
    if not ranking:
        return text + '\n<section><h2>No trial has finished yet</h2><p>Make the report again once one has.</p></section>'
    best = ranking[0]
    return text + f'''
<section class="hero" aria-labelledby="best">
<h2 id="best">Best cell</h2>
<p class="figures">{_big(best.result.valid_perplexity, "validation perplexity")}{_big(best.result.test_perplexity, "test perplexity")}
{_big(best.result.parameters, "parameters")}</p>
{_cell(best, "hero")}
<p class="small">Trial <a href="#{_anchor(best)}">{_e(best.id)}</a> has the lowest validation perplexity of the retrained cell. Lower is better;
the test text played no part in the choice.</p>
</section>'''


def _ranking(ranking: list[Trial]) -> str:
    opened = list(dict.fromkeys(key for trial in ranking for key in trial.parameters if key != "seed"))
    head = "".join(f'<th scope="col"{extra}>{_e(name)}</th>' for name, extra in [
        ("Rank", ' class="n"'), ("Trial", ""), ("Seed", ' class="n"'), *((key, ' class="n wide"') for key in opened), ("Validation", ' class="n"'),
        ("Test", ' class="n"'), ("Supernet", ' class="n wide"'), ("Search", ' class="n wide"'), ("Retraining", ' class="n wide"')])
    rows = []
    for place, trial in enumerate(ranking, start=1):
        r = trial.result
        cells = [f'<td class="n">{place}</td>', f'<th scope="row"><a href="#{_anchor(trial)}">{_e(trial.id)}</a></th>',
                 f'<td class="n">{_e("–" if trial.seed is None else trial.seed)}</td>',
                 *(f'<td class="n wide">{_e(_short(trial.parameters.get(key, "–")))}</td>' for key in opened),
                 f'<td class="n">{_ppl(r.valid_perplexity)}</td>', f'<td class="n">{_ppl(r.test_perplexity)}</td>',
                 f'<td class="n wide">{_ppl(r.supernet_valid_perplexity)}</td>', f'<td class="n wide">{_span(r.search_seconds)}</td>',
                 f'<td class="n wide">{_span(r.retrain_seconds)}</td>']
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
    picture = _picture("curves.svg", rows, "compared", label)
    which = "each trial" if len(ranking) < COMPARED else f"the best {len(ranking)} trials"
    return f'''<section aria-labelledby="compared"><h2 id="compared">Retraining compared</h2>
{picture}
<p class="small">Validation perplexity after each epoch, {which}.</p></section>'''


def _trial(trial: Trial, place: int) -> str:
    r, key = trial.result, _anchor(trial)
    facts = [("Validation", _ppl(r.valid_perplexity)), ("Test", _ppl(r.test_perplexity)),
             ("Seed", _e("–" if trial.seed is None else trial.seed)), ("Search", _span(r.search_seconds)), ("Retraining", _span(r.retrain_seconds)),
             ("Parameters", "–" if r.parameters is None else f"{r.parameters:,}")]
    cell = "" if place == 1 else _cell(trial, key)  # the first one's is at the top of the page
    return f'''<section class="trial" id="{key}" aria-labelledby="{key}-h">
<h2 id="{key}-h"><span class="rank">{place}</span> Trial {_e(trial.id)}</h2>
{_facts(facts)}
{cell}
<p class="genotype"><code>{_e(r.genotype)}</code></p>
<details{" open" if place == 1 else ""}><summary>Learning curves and α</summary>
<h3>Learning curves</h3>
{_from_folder(trial, "curves.svg", "Perplexity after each epoch of the search and of the retraining")}
<h3>Architecture parameters</h3>
{_from_folder(trial, "alpha.svg", "Heat map: probability of each operation on each edge, epoch by epoch of the search")}
</details>
<details><summary>Recipe</summary>
{_recipe(trial)}</details>
<details{" open" if place == 1 else ""}><summary>Do it again</summary>
{_commands(trial)}</details>
</section>'''


def _unfinished(trials: list[Trial]) -> str:
    items = []
    for trial in trials:
        settings = ", ".join(f"{k} = {_short(v)}" for k, v in trial.parameters.items())
        lines = [f'<b>{_e(trial.id)}</b> <span class="state {_e(trial.status)}">{_e(trial.status)}</span>',
                 f'<span class="small">{_e(settings)}</span>']
        reached = _reached(trial)
        lines += [f"<br>{_e(reached)}"] * bool(reached) + [f'<br><code class="note">{_e(trial.note)}</code>'] * bool(trial.note)
        items.append(f"<li>{' '.join(lines)}</li>")
    return f'''<section aria-labelledby="unfinished"><h2 id="unfinished">Not finished</h2>
<ul class="unfinished">
{chr(10).join(items)}
</ul></section>'''


def _reached(trial: Trial) -> str:
    """How far a trial came that has no result."""
    try:
        row = figures.read_rows(trial.folder)[-1]
        phase = "search" if row["phase"] == "search" else "retraining"
        return f"reached epoch {row['epoch']} of the {phase}: validation perplexity {float(row['perplexity']):.2f}"
    except (KeyError, TypeError, ValueError):
        return ""


def _recipe(trial: Trial) -> str:
    if trial.recipe is None:
        return "<p>Its settings are not those of a recipe of this version.</p>"
    changed = differences(trial.recipe)
    if changed:
        items = "".join(f'<li><code>{_e(key)}</code> {_e(now)} <span class="small">instead of {_e(was)}</span></li>'
                        for key, (was, now) in changed.items())
        text = f"<p>Recipe <b>{_e(trial.recipe.name)}</b>, but for:</p><ul>{items}</ul>"
    else:
        text = f"<p>Recipe <b>{_e(trial.recipe.name)}</b>, as it is.</p>"
    for part, title in (("search", "Search"), ("retrain", "Retraining")):
        values = getattr(trial.recipe, part)
        rows = "".join(f'<tr{" class=changed" if f"{part}.{f.name}" in changed else ""}><th scope="row"><code>{_e(f.name)}</code></th>'
                       f'<td class="n">{_e(getattr(values, f.name))}</td><td class="wide">{_e(f.metadata["help"])}</td></tr>'
                       for f in dataclasses.fields(values))
        text += f'''<h3>{title}</h3>
<div class="scroll" role="region" aria-label="{title}: settings" tabindex="0"><table class="recipe"><tbody>{rows}</tbody></table></div>'''
    return text


def _commands(trial: Trial) -> str:
    commands = trial.commands()
    if not commands:
        return "<p>Its settings are not known, so neither is the command.</p>"
    lines = _e("\n".join(map(_folded, commands)))
    return f'''<pre role="region" aria-label="Commands" tabindex="0"><code>{lines}</code></pre>
<p class="small">The same packages on the same kind of machine give the same numbers.</p>'''


def _folded(command: str, width: int = 100) -> str:
    """A long command over several lines, as a shell reads them: broken before options, not within a word."""
    lines = [""]
    for word in map(shlex.quote, shlex.split(command)):
        if word.startswith("--") and len(lines[-1]) > width - 30:
            lines[-1] += " \\"
            lines.append("   ")
        lines[-1] += (" " if lines[-1] else "") + word
    return "\n".join(lines)


def _foot(ranking: list[Trial]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in ranking[0].result.versions.items()) if ranking else ""
    made = f"Made by nni-darts-rnn {__version__}, {_time(datetime.now(timezone.utc).timestamp())}."
    return f"<p>{made}{' Trials ran with ' + _e(versions) + '.' if versions else ''}</p>"


# ------------------------------------------------------------------------------------------------------------ pictures

def _cell(trial: Trial, key: str) -> str:
    cell = trial.result.genotype
    said = "; ".join(f"node {i} reads {'the input' if j == 0 else f'node {j}'} through {op}" for i, (op, j) in enumerate(cell.recurrent, start=1))
    return _picture("cell.svg", cell, key + "-cell", f"Cell of trial {trial.id}: {said}")


def _from_folder(trial: Trial, name: str, label: str) -> str:
    try:
        found = figures.READERS[name](trial.folder)
    except ValueError as error:
        return f'<p class="missing">Not drawn: {_e(error)}.</p>'
    return _picture(name, found, f"{_anchor(trial)}-{name[:-4]}", f"{label}, trial {trial.id}")


def _picture(name: str, data, key: str, label: str) -> str:
    """The figure of one kind of picture, as inline SVG with ids of its own."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            figures.draw_one(name, data, path)
            svg = path.read_text(encoding="utf-8")
    except ValueError as error:
        return f'<p class="missing">Not drawn: {_e(error)}.</p>'
    what, svg = name[:-4], inline_svg(svg, re.sub("[^A-Za-z0-9-]", "-", key), label)
    return f'<figure class="{what}" tabindex="0" role="group" aria-label="{what}">{svg}</figure>'


def inline_svg(svg: str, key: str, label: str) -> str:
    """matplotlib's SVG as a part of a page: no XML head, ids that no other picture has, its width as a limit, a name for screen readers."""
    svg = svg[svg.index("<svg"):]
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", svg, flags=re.S)
    svg = re.sub(r'\bid="([^"]*)"', rf'id="{key}-\1"', svg)
    svg = re.sub(r'href="#([^"]*)"', rf'href="#{key}-\1"', svg)
    svg = re.sub(r'url\(#([^)]*)\)', rf'url(#{key}-\1)', svg)
    width, height = (float(re.search(rf'<svg[^>]*\b{side}="([\d.]+)pt"', svg).group(1)) for side in ("width", "height"))
    head = f'role="img" aria-label="{_e(label)}" style="--w:{width * 4 / 3:.0f}px;aspect-ratio:{width:g}/{height:g}"'
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', lambda found: f"{found.group(1)} {head}", svg, count=1)
    # the sheet of paper under the drawing is the page itself
    return re.sub(r'(<g id="[^"]*patch_1">\s*<path[^>]*style="fill: )#ffffff', r"\1none", svg, count=1).strip()


# --------------------------------------------------------------------------------------------------------------- words

def _facts(pairs) -> str:
    return '<dl class="facts">' + "".join(f"<div><dt>{_e(name)}</dt><dd>{value}</dd></div>" for name, value in pairs) + "</dl>"


def _big(value, words: str) -> str:
    if value is None:
        return ""
    return f'<span><b>{value:,}</b> {_e(words)}</span>' if isinstance(value, int) else f"<span><b>{_ppl(value)}</b> {_e(words)}</span>"


def _ppl(value: float | None) -> str:
    return "–" if value is None else f"{value:,.2f}"


def _span(seconds: float | None) -> str:
    return "–" if seconds is None else duration(seconds)


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _time(seconds: float) -> str:
    when = datetime.fromtimestamp(seconds, timezone.utc)
    return f'<time datetime="{when.isoformat(timespec="seconds")}">{when:%Y-%m-%d %H:%M} UTC</time>'


def _anchor(trial: Trial) -> str:
    return "trial-" + re.sub("[^A-Za-z0-9-]", "-", trial.id)
