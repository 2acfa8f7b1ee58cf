"""What the commands print: messages on standard error, the result on standard output. With `--json` it is JSON, and of the messages only warnings remain."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path


class Talk:
    """Prints messages on standard error, so that standard output has only the result. With --json it prints none. `epochs`: how many the phase has."""

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
    """Print `text` on standard error. If it cannot be written, say to a log on a full disk, it is lost and the run goes on."""
    try:
        print(text, file=sys.stderr, flush=True)
    except BrokenPipeError:  # nobody reads any more
        raise
    except OSError:
        pass


def duration(seconds: float) -> str:
    """A duration in words, such as `45 s`, `12 min` or `3 h 20 min`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def many(count: int, noun: str) -> str:
    """Such as `1 epoch`, `3 epochs`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


class _Lines(logging.StreamHandler):
    """Writes each record as a line to what `sys.stderr` is at that moment. If a line cannot be written, it is lost and the run goes on."""

    def __init__(self):
        logging.Handler.__init__(self)

    @property
    def stream(self):
        return sys.stderr


def _tell(level: int) -> None:
    """Show what the package logs at `level` and above; by default Python shows warnings only. (In a trial, NNI writes the log into trial.log.)"""
    ours = logging.getLogger(__package__)
    ours.setLevel(level)
    if not any(isinstance(handler, _Lines) for handler in ours.handlers):
        ours.addHandler(_Lines())


def named(path: str | Path) -> str:
    """A path as a word of a command. If it begins with "-", "./" goes before it, so that it is not taken for an option."""
    return f"./{path}" if str(path).startswith("-") else str(path)


def answer(arguments, data: dict, words: str, then: Sequence[object] = ()) -> None:
    """Print the result: `data` with --json, otherwise `words`. `then` is the command that a person is likely to want next, word by word."""
    command = shlex.join([named(word) if isinstance(word, Path) else str(word) for word in then])
    if arguments.json:
        print(json.dumps(data | ({"next": command} if command else {})))
        return
    print(words, flush=True)
    if command:
        say(f"next: {command}")
