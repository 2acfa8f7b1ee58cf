"""After SIGTERM or Ctrl-C the current step is finished; then the run writes a checkpoint and ends."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator


class Stopped(BaseException):
    """Raised between two steps, once a checkpoint is written. It is a `BaseException`, so that no host takes it for an error, or for a Ctrl-C of its own."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    def leave(self) -> BaseException:
        """The exception that ends the program: `KeyboardInterrupt` after Ctrl-C, `Terminated` after SIGTERM."""
        return KeyboardInterrupt() if self.signum == signal.SIGINT else Terminated()


class Terminated(SystemExit):
    """SIGTERM has come. A program that does not catch this ends with status 143, as a shell expects."""

    def __init__(self):
        super().__init__(128 + signal.SIGTERM)


def end_by(stop: BaseException) -> None:
    """End this process by the signal that asked for it: SIGTERM for `Terminated`, otherwise SIGINT. NNI (3.0) then says that the trial was stopped; an
    exit status would count as a failure."""
    signum = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)


class StopRequest:
    """A signal handler that notes, in `signum`, the signal that asks the run to stop. None: no signal has come."""

    def __init__(self):
        self.signum: int | None = None

    def __call__(self, signum: int, frame) -> None:
        if self.signum is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt  # a Ctrl-C after an earlier signal: at once
        self.signum = signum

    def obey(self) -> None:
        """Raise `Stopped` if a signal has come."""
        if self.signum is not None:
            raise Stopped(self.signum)


class _Interrupt:
    """A SIGINT handler that raises `KeyboardInterrupt` like Python's own, and notes in `came` that it did."""

    def __init__(self):
        self.came = False

    def __call__(self, signum: int, frame) -> None:
        self.came = True
        raise KeyboardInterrupt


@contextlib.contextmanager
def interrupts_remembered() -> Iterator[None]:
    """Remember a Ctrl-C that is lost inside the block, say in a bare `except:` of a package that is being imported. `stop_requests` then stops the run that
    follows."""
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
    """Inside the block SIGINT and SIGTERM are noted in the yielded `StopRequest` and do not end the program. Only the main thread can handle signals; in
    another one nothing is noted."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    if getattr(before[signal.SIGINT], "came", False):
        request.signum = signal.SIGINT
    for signum, handler in before.items():
        if handler is not signal.SIG_IGN:  # an ignored signal stays ignored, as in a shell's background job
            signal.signal(signum, request)
    try:
        yield request
    finally:
        for signum, handler in before.items():
            if handler is not None:
                signal.signal(signum, handler)
