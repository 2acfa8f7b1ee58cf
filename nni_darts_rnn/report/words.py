"""Text of the report: escaped strings, and numbers and times in readable form."""

from __future__ import annotations

import html
import re
from datetime import datetime, timezone

from ..talk import duration
from .trial_folder import Trial


def esc(text) -> str:
    return html.escape(str(text)).encode("utf-8", "backslashreplace").decode()  # JSON may hold half of a surrogate pair, which UTF-8 cannot


def facts(pairs) -> str:
    return '<dl class="facts">' + "".join(f"<div><dt>{esc(name)}</dt><dd>{value}</dd></div>" for name, value in pairs) + "</dl>"


def big(value, words: str) -> str:
    if value is None:
        return ""
    return f'<span><b>{value:,}</b> {esc(words)}</span>' if isinstance(value, int) else f"<span><b>{perplexity(value)}</b> {esc(words)}</span>"


def perplexity(value: float | None) -> str:
    return "–" if value is None else f"{value:,.2f}"


def span(seconds: float | None) -> str:
    return "–" if seconds is None else duration(seconds)


def short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def moment(seconds: float) -> str:
    when = datetime.fromtimestamp(seconds, timezone.utc)
    return f'<time datetime="{when.isoformat(timespec="seconds")}">{when:%Y-%m-%d %H:%M} UTC</time>'


def anchor(trial: Trial) -> str:
    return "trial-" + re.sub("[^A-Za-z0-9-]", "-", trial.id)
