"""A function to run in a forked child, which may die there -> how it ended; whoever takes too long is killed."""

import contextlib
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

KILLED = -signal.SIGKILL


def start(act: Callable[[], Any]) -> int:
    """Forks a child that runs `act` and exits; its process number."""
    return os.fork() or _act_and_exit(act)


def status_of(child: int, seconds: float = 300.0, *, kill_after: float = math.inf) -> int:
    """How a child ended: 0, 1 after an exception, -9 when it killed itself, or was killed here because its time was up.

    Raises:
        TimeoutError: it was still running after so many seconds, and has been killed.
    """
    started = time.monotonic()
    while (passed := time.monotonic() - started) < seconds:
        if passed > kill_after:
            os.kill(child, signal.SIGKILL)
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise TimeoutError(f"the child was still running after {seconds} s")


def in_child(act: Callable[[], Any], seconds: float = 300.0) -> int:
    """`status_of` a child that runs `act`."""
    return status_of(start(act), seconds)


def _act_and_exit(act: Callable[[], Any]) -> NoReturn:
    status = 1
    try:
        act()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
        os._exit(status)


class Bomb:
    """Kills its own process at the `nth` passing of a named point; `half` lets a write do half of its work first."""

    def __init__(self, point: str, when: str, nth: int) -> None:
        self.point, self.when, self.left = point, when, nth

    def around(self, point: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` as it is, or with the bomb in it where this is its point."""
        if point != self.point:
            return function

        def armed(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == 0 and self.when == "before":
                self.explode()
            if self.left == 0 and self.when == "half":
                descriptor, data = args
                function(descriptor, data[: len(data) // 2])
                self.explode()
            value = function(*args, **kwargs)
            if self.left == 0:
                self.explode()
            return value

        return armed

    def explode(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)
