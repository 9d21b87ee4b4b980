"""A function to run in a forked child, which may die there -> how it ended. Nothing hangs: whoever takes too long is killed."""

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

KILLED = -signal.SIGKILL


def in_child(act: Callable[[], Any], seconds: float = 60.0) -> int:
    """Exit status of a child that runs `act`: 0, 1 after an exception, -9 when it killed itself.

    Raises:
        TimeoutError: it was still running after so many seconds, and has been killed.
    """
    child = os.fork()
    if child == 0:
        _act_and_exit(act)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise TimeoutError(f"the child was still running after {seconds} s")


def _act_and_exit(act: Callable[[], Any]) -> None:
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
