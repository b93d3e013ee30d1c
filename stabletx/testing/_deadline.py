"""Cut off what does not come back."""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType


class Overdue(BaseException):
    """A call has not come back in time; not an Exception, so that it is not caught by the call."""


def call_within(seconds: float, function: Callable[[], None]) -> None:
    """Call a function and raise :class:`Overdue` where it takes longer than ``seconds``.

    In the main thread a timer signal interrupts Python code and sleeping system calls. Elsewhere
    the function runs in a thread of its own, which is told to stop, and left behind if it does
    not listen.
    """
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer"):
        with _alarm(seconds):
            function()
    else:
        _in_thread(seconds, function)


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Set the timer, and put back the one that was running, such as a test runner's."""

    def ring(signum: int, frame: FrameType | None) -> None:
        raise Overdue

    start = time.monotonic()
    # The interval rings again where a bare "except:" swallows the first.
    outer_left, outer_interval = signal.setitimer(signal.ITIMER_REAL, 0)
    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        if outer_left:
            left = max(0.001, outer_left - (time.monotonic() - start))
            signal.setitimer(signal.ITIMER_REAL, left, outer_interval)


def _in_thread(seconds: float, function: Callable[[], None]) -> None:
    raised: list[BaseException] = []
    context = contextvars.copy_context()

    def run() -> None:
        try:
            context.run(function)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        ident = ctypes.c_ulong(thread.ident or 0)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(Overdue))
        raise Overdue
    if raised:
        raise raised[0]
