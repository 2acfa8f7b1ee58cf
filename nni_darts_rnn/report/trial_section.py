"""A finished trial's section of the report: its cell, curves, α, recipe, and the commands that repeat it."""

from __future__ import annotations

import dataclasses
import shlex

from ..options import differences
from .pictures import cell_picture, folder_picture
from .trial_folder import Trial
from .words import anchor, esc, facts, perplexity, span


def trial_section(trial: Trial, place: int) -> str:
    r, key = trial.result, anchor(trial)
    known = [("Validation", perplexity(r.valid_perplexity)), ("Test", perplexity(r.test_perplexity)),
             ("Seed", esc(trial.seed)), ("Search", span(r.search_seconds)), ("Retraining", span(r.retrain_seconds)),
             ("Parameters", "–" if r.parameters is None else f"{r.parameters:,}")]
    cell = "" if place == 1 else cell_picture(trial, key)  # the best trial's cell is at the top of the page
    return f'''<section class="trial" id="{key}" aria-labelledby="{key}-h">
<h2 id="{key}-h"><span class="rank">{place}</span> Trial {esc(trial.id)}</h2>
{facts(known)}
{cell}
<p class="genotype"><code>{esc(r.genotype)}</code></p>
<details{" open" if place == 1 else ""}><summary>Learning curves and α</summary>
<h3>Learning curves</h3>
{folder_picture(trial, "curves.svg", "Perplexity after each epoch of the search and of the retraining")}
<h3>Architecture parameters</h3>
{folder_picture(trial, "alpha.svg", "Heat map: probability of each operation on each edge, epoch by epoch of the search")}
</details>
<details><summary>Recipe</summary>
{_recipe(trial)}</details>
<details{" open" if place == 1 else ""}><summary>Do it again</summary>
{_commands(trial)}</details>
</section>'''


def _recipe(trial: Trial) -> str:
    if trial.recipe is None:
        return "<p>Its settings are not those of a recipe of this version.</p>"
    changed = differences(trial.recipe)
    if changed:
        items = "".join(f'<li><code>{esc(key)}</code> {esc(now)} <span class="small">instead of {esc(was)}</span></li>'
                        for key, (was, now) in changed.items())
        text = f"<p>Recipe <b>{esc(trial.recipe.name)}</b>, but for:</p><ul>{items}</ul>"
    else:
        text = f"<p>Recipe <b>{esc(trial.recipe.name)}</b>, as it is.</p>"
    for part, title in (("search", "Search"), ("retrain", "Retraining")):
        values = getattr(trial.recipe, part)
        rows = "".join(f'<tr{" class=changed" if f"{part}.{f.name}" in changed else ""}><th scope="row"><code>{esc(f.name)}</code></th>'
                       f'<td class="n">{esc(getattr(values, f.name))}</td><td class="wide">{esc(f.metadata["help"])}</td></tr>'
                       for f in dataclasses.fields(values))
        text += f'''<h3>{title}</h3>
<div class="scroll" role="region" aria-label="{title}: settings" tabindex="0"><table class="recipe"><tbody>{rows}</tbody></table></div>'''
    return text


def _commands(trial: Trial) -> str:
    commands = trial.commands()
    if not commands:
        return "<p>Its settings are not known, so the commands cannot be given.</p>"
    lines = esc("\n".join(map(folded, commands)))
    same = ("The same packages on the same kind of machine give the same numbers." if trial.repeats() else
            "The numbers may differ: this trial may have gone on from one with fewer epochs, whose learning rate had fallen already.")
    return f'''<pre role="region" aria-label="Commands" tabindex="0"><code>{lines}</code></pre>
<p class="small">{same}</p>'''


def folded(command: str) -> str:
    """A long command on several lines that a shell reads as one. Lines break before options, not within a word."""
    lines = [""]
    for word in map(shlex.quote, shlex.split(command)):
        if word.startswith("--") and len(lines[-1]) > 70:
            lines[-1] += " \\"
            lines.append("   ")
        lines[-1] += (" " if lines[-1] else "") + word
    return "\n".join(lines)
