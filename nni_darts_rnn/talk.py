"""What the commands say: words for people on standard error, the result on standard output, nothing but JSON with `--json`."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path


class Talk:
    """Words on standard error, so that standard output holds the result alone; nothing with --json. `epochs`: how many there will be."""

    def __init__(self, arguments):
        self.silent = arguments.json
        self.progress = not arguments.json and sys.stderr.isatty()
        self.epochs, self.about = 0, "about"
        _tell(logging.WARNING if self.silent else logging.INFO)

    def __call__(self, text: str) -> None:
        if not self.silent:
            say(text)

    def epoch(self, row: dict) -> None:
        rate = f", {row['tokens_per_second']:,.0f} tokens/s" if row.get("tokens_per_second") else ""
        left = (self.epochs - row["epoch"]) * (row.get("seconds") or 0)
        remaining = f", {self.about} {duration(left)} left" if left else ""
        self(f"{row['phase']} epoch {row['epoch']}: validation perplexity {row['default']:.2f}{rate}{remaining}")


def say(text: str) -> None:
    """On standard error. A line for which a log has no room costs nothing but itself."""
    try:
        print(text, file=sys.stderr, flush=True)
    except BrokenPipeError:  # nobody reads on
        raise
    except OSError:
        pass


def duration(seconds: float) -> str:
    """Such as `45 s`, `12 min`, `3 h 20 min`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def many(count: int, noun: str) -> str:
    """Such as `1 epoch`, `3 epochs`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


class _Lines(logging.StreamHandler):
    """A line on standard error, as that is when the line is written. One that cannot be written costs nothing but itself."""

    def __init__(self):
        logging.Handler.__init__(self)

    @property
    def stream(self):
        return sys.stderr


def _tell(level: int) -> None:
    """Shows what the package logs, from a level on; Python by itself shows warnings alone. (In a trial NNI writes notes into trial.log.)"""
    ours = logging.getLogger(__package__)
    ours.setLevel(level)
    if not any(isinstance(handler, _Lines) for handler in ours.handlers):
        ours.addHandler(_Lines())


def named(path: str | Path) -> str:
    """A path as a word of a command, which is not to take it for an option."""
    return f"./{path}" if str(path).startswith("-") else str(path)


def answer(arguments, data: dict, words: str, then: Sequence[object] = ()) -> None:
    """The result, and the command that a person is likely to want next: `then`, its words."""
    command = shlex.join([named(word) if isinstance(word, Path) else str(word) for word in then])
    if arguments.json:
        print(json.dumps(data | ({"next": command} if command else {})))
        return
    print(words, flush=True)
    if command:
        say(f"next: {command}")
