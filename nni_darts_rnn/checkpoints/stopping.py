"""SIGTERM and Ctrl-C let the step that runs finish; then the run keeps itself and ends."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator


class Stopped(BaseException):
    """Raised between two steps, once everything is kept. `BaseException`, so that no host takes it for an error or for a Ctrl-C of its own."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    def leave(self) -> BaseException:
        """What ends the program: `KeyboardInterrupt` after Ctrl-C, `Terminated` after SIGTERM."""
        return KeyboardInterrupt() if self.signum == signal.SIGINT else Terminated()


class Terminated(SystemExit):
    """SIGTERM; a program that does not catch it ends with the status that a shell expects, 143."""

    def __init__(self):
        super().__init__(128 + signal.SIGTERM)


def end_by(stop: BaseException) -> None:
    """Ends this process by the signal that asked for it, `KeyboardInterrupt` or `Terminated`, so that NNI (3.0) says that the trial was stopped; an exit
    status of its own would be a failure."""
    signum = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)


class StopRequest:
    """`signum` of the signal that asks the run to stop, or None."""

    def __init__(self):
        self.signum: int | None = None

    def __call__(self, signum: int, frame) -> None:
        if self.signum is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C: at once
        self.signum = signum

    def obey(self) -> None:
        """Raises `Stopped` if there was a signal."""
        if self.signum is not None:
            raise Stopped(self.signum)


class _Interrupt:
    """Ctrl-C as Python answers it, and whether there was one."""

    def __init__(self):
        self.came = False

    def __call__(self, signum: int, frame) -> None:
        self.came = True
        raise KeyboardInterrupt


@contextlib.contextmanager
def interrupts_remembered() -> Iterator[None]:
    """A Ctrl-C in the meantime that is lost, in a bare `except:` of a package that is being imported, stops the run that follows."""
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
    """Notes SIGINT and SIGTERM in the meantime rather than ending the program. In threads other than the main one signals are not ours."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    if getattr(before[signal.SIGINT], "came", False):
        request.signum = signal.SIGINT
    for signum, handler in before.items():
        if handler is not signal.SIG_IGN:  # as in a shell's background job
            signal.signal(signum, request)
    try:
        yield request
    finally:
        for signum, handler in before.items():
            if handler is not None:
                signal.signal(signum, handler)
