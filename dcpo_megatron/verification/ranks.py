"""A pool of processes that take part in one distributed job after another.

    pool -- spawn --> mother: imports once --> rank 0, 1, ...   copies of it (CPU: fork)
    pool <== a pipe each ==> ranks       pool <== a pipe ==> mother: exit codes; its end is theirs

Imports cost seconds, a new process group a fraction of one: they are done once, and each :meth:`RankPool.run` makes a
fresh default group. Every run has a deadline; a rank that raises, dies or hangs ends the pool, with the rank's name and
its traceback. Ranks on GPUs import for themselves: CUDA does not outlive a fork.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import time
import traceback
from collections.abc import Sequence

from dcpo_megatron.network import free_port

# Under "spawn" a child imports this module first: nothing heavy at its top.


class RankFailure(RuntimeError):
    """A rank raised, died or did not answer; the message names it and says where it stood."""


class RankPool:
    """``size`` processes on this machine; use as a context manager.

    Args:
        device: "cpu" (gloo) or "cuda" (nccl, one GPU a rank).
        python_path: folders put before the children's import path (another Megatron-Core, say).

    ``runs`` counts the jobs so far.
    """

    def __init__(self, size: int, *, device: str = "cpu", python_path: Sequence[str] = (), threads: int = 1):
        self.size = size
        self.runs = 0
        context = multiprocessing.get_context("spawn")
        saved = {name: os.environ.get(name) for name in ("PYTHONPATH", "OMP_NUM_THREADS")}
        os.environ["PYTHONPATH"] = os.pathsep.join([*python_path, *filter(None, [saved["PYTHONPATH"]])])
        os.environ["OMP_NUM_THREADS"] = str(threads)
        self._pipes, self._processes, self._codes = [], [], []
        try:
            # A mother for all ranks, or one each.
            for ranks in [range(size)] if device == "cpu" else [[rank] for rank in range(size)]:
                pipes = [context.Pipe() for _ in ranks]
                codes, its_codes = context.Pipe()
                theirs = {rank: pipe for rank, (_, pipe) in zip(ranks, pipes)}
                process = context.Process(
                    target=_bear, args=(theirs, device, list(python_path), its_codes), daemon=True
                )
                process.start()
                for pipe in (*theirs.values(), its_codes):
                    pipe.close()
                self._pipes += [pipe for pipe, _ in pipes]
                self._processes.append(process)
                self._codes.append(codes)
        finally:
            for name, value in saved.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value

    def run(self, function: str, world: int, *args, timeout: float = 120.0, **kwargs) -> list:
        """Calls ``package.module:function(*args, **kwargs)`` on ranks 0..world-1 of a fresh process group; returns what
        each gave.

        Raises:
            RankFailure: a rank raised, died, or gave nothing within ``timeout`` seconds. The pool is closed then.
            ValueError: ``world`` is more than the pool has.
        """
        if not 1 <= world <= self.size:
            raise ValueError(f"{world} ranks were asked for, the pool has {self.size}")
        self.runs += 1
        port = free_port()
        for rank in range(world):
            self._pipes[rank].send((function, rank, world, port, timeout, args, kwargs))
        results: list = [None] * world
        waiting = set(range(world))
        deadline = time.monotonic() + timeout
        while waiting:
            ready = multiprocessing.connection.wait(
                [self._pipes[rank] for rank in waiting], max(0.0, deadline - time.monotonic())
            )
            if not ready:
                ranks = ", ".join(map(str, sorted(waiting)))
                self.close()
                raise RankFailure(f"{function}: rank {ranks} of {world} gave no answer within {timeout:.0f} s")
            for pipe in ready:
                rank = self._pipes.index(pipe)
                try:
                    kind, value = pipe.recv()
                except EOFError:
                    code = self._exit_code(rank)
                    self.close()
                    raise RankFailure(f"{function}: rank {rank} of {world} died (exit code {code})") from None
                if kind == "error":
                    self.close()
                    raise RankFailure(f"{function}: rank {rank} of {world} raised\n{value}")
                results[rank] = value
                waiting.discard(rank)
        return results

    def _exit_code(self, rank: int) -> int | None:
        """Of a rank whose pipe has ended: minus a signal's number where one ended it; None where nobody knows."""
        codes = self._codes[min(rank, len(self._codes) - 1)]
        try:
            while codes.poll(5):
                which, code = codes.recv()
                if which == rank:
                    return code
        except (EOFError, OSError):
            pass  # the mother is gone too
        return None

    def close(self) -> None:
        """Ends the processes; safe to call twice."""
        for pipe in (*self._pipes, *self._codes):
            pipe.close()
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join(5)
        self._pipes, self._processes, self._codes, self.size = [], [], [], 0

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _bear(pipes: dict, device: str, python_path: list[str], codes) -> None:
    """The mother: forks a rank for each of ``pipes``, and sends (rank, exit code) as they end. Where the pool is gone,
    it kills them."""
    import logging
    import sys
    import warnings

    for folder in reversed(python_path):
        if folder not in sys.path[:1]:
            sys.path.insert(0, folder)
    warnings.simplefilter("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if device == "cpu":
        from dcpo_megatron.mcore import platform

        platform.prepare(platform.select_platform(device))
    ranks = {}
    for rank in list(pipes):
        pid = os.fork()
        if pid == 0:
            codes.close()
            pipe = pipes.pop(rank)
            for other in pipes.values():
                other.close()
            _serve(rank, device, pipe)
            sys.stdout.flush()
            os._exit(0)
        ranks[pid] = rank
        pipes.pop(rank).close()
    while ranks:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            with contextlib.suppress(OSError):
                codes.send((ranks.pop(pid), os.waitstatus_to_exitcode(status)))
        elif codes.poll(0.1):  # nothing is sent to it: its end
            for pid in ranks:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            return


def _serve(number: int, device: str, pipe) -> None:
    os.environ["LOCAL_RANK"] = str(number)
    while True:
        try:
            function, rank, world, port, timeout, args, kwargs = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            from dcpo_megatron.mcore import platform

            os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            platform.start(platform.select_platform(device), timeout)
            module, _, name = function.partition(":")
            value = getattr(importlib.import_module(module), name)(*args, **kwargs)
            platform.stop()
            # Models hold their process groups in reference cycles, and each group holds threads and sockets.
            gc.collect()
            pipe.send(("ok", value))
        except BaseException:
            try:
                pipe.send(("error", traceback.format_exc()))
            except OSError:  # another rank failed first and the pool is gone
                traceback.print_exc()
            return
