"""SIGTERM and Ctrl-C: the current step finishes, then the run saves its state and ends."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator


class Stopped(BaseException):
    """Raised between two steps, once everything is saved. A `BaseException`, so that no host takes it for an error, nor for a Ctrl-C."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    def leave(self) -> BaseException:
        """The exception with which the program ends: `KeyboardInterrupt` after Ctrl-C, `Terminated` after SIGTERM."""
        return KeyboardInterrupt() if self.signum == signal.SIGINT else Terminated()


class Terminated(SystemExit):
    """Raised for SIGTERM. A program that does not catch it ends with status 143, as a shell expects."""

    def __init__(self):
        super().__init__(128 + signal.SIGTERM)


def end_by(stop: BaseException) -> None:
    """Ends this process by the signal behind `KeyboardInterrupt` or `Terminated`. NNI (3.0) then shows the trial as stopped; after an exit status it would
    show it as failed."""
    signum = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)


class StopRequest:
    """A signal handler that notes the signal that asks the run to stop: `signum`, or None."""

    def __init__(self):
        self.signum: int | None = None

    def __call__(self, signum: int, frame) -> None:
        if self.signum is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C: at once
        self.signum = signum

    def obey(self) -> None:
        """Raises `Stopped` if a signal has come."""
        if self.signum is not None:
            raise Stopped(self.signum)


class _Interrupt:
    """Python's own handler of Ctrl-C, which also notes that one came."""

    def __init__(self):
        self.came = False

    def __call__(self, signum: int, frame) -> None:
        self.came = True
        raise KeyboardInterrupt


@contextlib.contextmanager
def interrupts_remembered() -> Iterator[None]:
    """A context in which no Ctrl-C gets lost: if a package that is being imported swallows it in a bare `except:`, the run that follows stops."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _Interrupt())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """A context in which SIGINT and SIGTERM are noted and do not end the program. In threads other than the main one it changes nothing."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    if getattr(before[signal.SIGINT], "came", False):
        request.signum = signal.SIGINT
    for signum, handler in before.items():
        if handler is not signal.SIG_IGN:  # ignored, as in a background job of a shell
            signal.signal(signum, request)
    try:
        yield request
    finally:
        for signum, handler in before.items():
            if handler is not None:
                signal.signal(signum, handler)
