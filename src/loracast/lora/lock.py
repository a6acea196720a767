"""A reentrant lock that threads get in the order in which they ask for it."""

from __future__ import annotations

import threading
from collections import deque


class FairLock:
    """As `threading.RLock`, but first come, first served.

    A thread that runs a model step after step takes its lock again at once, and with an RLock others could wait for
    ever.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._waiting: deque[tuple[int, threading.Lock]] = deque()
        self._owner: int | None = None
        self._depth = 0

    def acquire(self) -> bool:
        """Wait for the lock and take it."""
        me = threading.get_ident()
        with self._mutex:
            if self._owner in (None, me):
                self._owner = me
                self._depth += 1
                return True
            turn = self._queue(me)
        self._wait(turn)
        return True

    def give_way(self) -> None:
        """Let the threads that wait now have the lock first, and take it again; quick where there are none.

        Raises RuntimeError for any but the owner.
        """
        with self._mutex:
            self._check_owned()
            if not self._waiting:
                return
            depth, turn = self._depth, self._queue(threading.get_ident())
            self._hand_over()
        try:
            self._wait(turn)
        except BaseException:
            self.acquire()  # the caller gives it back
            raise
        finally:
            self._depth = depth

    def release(self) -> None:
        """Give the lock back, to the thread that has waited longest. Raises RuntimeError for any but the owner."""
        with self._mutex:
            self._check_owned()
            self._depth -= 1
            if not self._depth:
                self._hand_over()

    def is_owned(self) -> bool:
        """Whether the calling thread holds the lock."""
        return self._owner == threading.get_ident()

    def _check_owned(self) -> None:
        if not self.is_owned():
            raise RuntimeError("this thread does not hold the lock")

    def _hand_over(self) -> None:
        """Give the lock to the thread that has waited longest, if any."""
        self._owner = None
        if self._waiting:
            self._owner, turn = self._waiting.popleft()
            self._depth = 1
            turn.release()

    def _queue(self, me: int) -> tuple[int, threading.Lock]:
        turn = (me, threading.Lock())
        turn[1].acquire()
        self._waiting.append(turn)
        return turn

    def _wait(self, turn: tuple[int, threading.Lock]) -> None:
        try:
            turn[1].acquire()  # until `_hand_over`
        except BaseException:  # the wait was interrupted
            with self._mutex:
                if turn in self._waiting:
                    self._waiting.remove(turn)
                    raise
            self.release()
            raise

    def __enter__(self) -> FairLock:
        self.acquire()
        return self

    def __exit__(self, *failure: object) -> None:
        self.release()
