"""What may block in C++, and is then left behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future


def beside(call: Callable[[], object], name: str) -> Future:
    """``call`` in a thread of that name which nobody joins, not at the interpreter's end either; its answer or its
    error, whatever it is, is the future's."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
