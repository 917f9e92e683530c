"""``dcpo train``: one rank of a training run. Start several with torchrun, or ``--ranks N`` for N ranks on this
machine.

Exit codes: 0 done; 2 the configuration, the data or the model cannot be used (one clear sentence on standard error); 75
asked to stop: the run is saved, start it again to go on; 70 this rank or another stood still for too long; 130
interrupted; 1 anything else.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from dcpo_megatron.console.quiet import quiet_libraries, write_any_letter
from dcpo_megatron.launch.local import Place, run_ranks
from dcpo_megatron.launch.signals import BAD_INPUT, START_AGAIN, STOOD_STILL, Stopped, StopRequest

# A rank that has said why it ends has so long to close what it holds.
CLOSING_SECONDS = 20.0
_OF_LAUNCHER = ("--ranks", "--nodes", "--node-rank", "--master-addr", "--master-port", "--grace")
_NOT_WRITABLE = errno.ENOSPC, errno.EDQUOT, errno.EROFS


def parser() -> argparse.ArgumentParser:
    """The command line of a run; also that of ``examples/pretrain_dcpo.sh``."""
    result = argparse.ArgumentParser(
        prog="dcpo train",
        # A shortened --ranks would be passed on to the ranks themselves.
        allow_abbrev=False,
        description="Train with DCPO or one of its baselines.",
        epilog="Overrides are key.sub=value; --keys lists the keys.",
    )
    result.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="NAME",
        help="YAML file, or the name of a recipe, such as demo or presets/grpo; may be given again, later ones win",
    )
    result.add_argument(
        "--ranks", type=int, default=None, metavar="N", help="start N ranks on this machine (without torchrun)"
    )
    several = result.add_argument_group("with --ranks, on each of several hosts (or torchrun, Slurm)")
    several.add_argument("--nodes", type=int, default=1, metavar="M", help="so many hosts, each with N ranks")
    several.add_argument("--node-rank", type=int, default=0, metavar="K", help="this host: 0 to M-1")
    several.add_argument("--master-addr", metavar="HOST", help="host 0, as the others reach it")
    several.add_argument("--master-port", type=int, default=29500, metavar="PORT", help="default: %(default)s")
    result.add_argument(
        "--grace",
        type=_seconds,
        default=None,
        metavar="SECONDS",
        help=(
            "with --ranks: time for the ranks to save and end after SIGTERM or SIGUSR1 (default: DCPO_GRACE_SECONDS,"
            " else 600)"
        ),
    )
    result.add_argument("--keys", action="store_true", help="list every key with its default, and stop")
    result.add_argument(
        "--check",
        action="store_true",
        help="check configuration, model folder and layout for the ranks of --ranks, say what they need, and stop",
    )
    result.add_argument(
        "--gpu-memory",
        type=_seconds,
        default=None,
        metavar="GB",
        help=(
            "with --check: refuse what does not fit into so many GB (10^9 bytes) a GPU (default: this machine's GPU,"
            " where there is one)"
        ),
    )
    result.add_argument(
        "--server-gpus",
        type=int,
        default=None,
        metavar="N",
        help="with --check: GPUs of all servers together, for the estimate (default: one a server)",
    )
    result.add_argument("overrides", nargs="*", metavar="key.sub=value")
    return result


def main(argv: list[str] | None = None) -> int:
    """Runs one rank (or ``--ranks`` of them); returns the exit code."""
    args = parser().parse_intermixed_args(argv)
    if args.keys:
        print_keys()
        return 0
    if args.ranks is not None and not args.check:
        rest = _without(_OF_LAUNCHER, sys.argv[1:] if argv is None else argv)
        try:
            return start_ranks(args.ranks, rest, args.grace, _place(args))
        except ValueError as error:
            return refuse(error)
    quiet_libraries()
    write_any_letter()
    try:
        return _train(args)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        if explains_itself(error):
            return refuse(error, 1)
        if isinstance(error, OSError) and error.errno in _NOT_WRITABLE:
            where = f"{error.filename}: " if error.filename else ""
            return refuse(OSError(f"{where}{error.strerror}: free space, or name another output"), 1)
        if not is_bad_input(error):
            raise
        return refuse(error)


def _train(args) -> int:
    from dcpo_megatron.config.loading import load_config
    from dcpo_megatron.config.schema import ConfigError
    from dcpo_megatron.training.checks import check_run

    if not args.check and (args.gpu_memory is not None or args.server_gpus is not None):
        raise ConfigError("--gpu-memory and --server-gpus belong to --check: add it, or leave them out")
    if args.nodes != 1 and args.ranks is None:
        raise ConfigError(f"--nodes {args.nodes} belongs to --ranks: say how many ranks each host has")
    config = load_config(args.config, args.overrides)
    world = int(os.environ.get("WORLD_SIZE", "1")) if args.ranks is None else args.ranks * args.nodes
    if world < 1:
        raise ConfigError(f"--ranks {world} must be at least 1: say how many ranks the run will have")
    run = check_run(config, world)
    if args.check:
        if _rank() == 0:
            run.check_weights()
            _say_plan(run, args.gpu_memory, args.server_gpus)
        return 0
    import torch

    if run.platform.is_cpu and "OMP_NUM_THREADS" not in os.environ:
        # Ranks share the cores; more threads than cores make every operator wait.
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
    from dcpo_megatron.mcore.platform import prepare

    prepare(run.platform)  # before anything imports Megatron-Core
    from dcpo_megatron.monitor.watchdog import Watchdog
    from dcpo_megatron.training.build import build_trainer

    watchdog = Watchdog(Path(config.output), _rank(), world, config.training.timeout_seconds)
    trainer = None
    with StopRequest(announce=_rank() == 0) as stop:

        def asked() -> bool:
            return stop.requested is not None

        try:
            trainer = build_trainer(run, asked, watchdog)
            summary = trainer.run(asked)
        except Stopped:  # before it had begun: what is on the disk is where it stands
            return START_AGAIN
        except BaseException as error:
            code = _told(error, watchdog, trainer)
            if code is None:
                raise
            return code
        trainer.close()
    return START_AGAIN if summary is None else 0


def _told(error: BaseException, watchdog, trainer) -> int | None:
    """Ends what ``error`` left of a run. Where another rank or the disk is the cause: says so, in a sentence with the
    traceback in a file, and returns the exit code. None: the error itself is to be shown."""
    from dcpo_megatron.checkpoint.saver import StuckSaveError
    from dcpo_megatron.monitor.watchdog import TIMED_OUT

    watchdog.close()
    stuck = isinstance(error, StuckSaveError)
    reason = str(error) if stuck else "" if explains_itself(error) else watchdog.explain(error)
    code = STOOD_STILL if reason and not stuck and TIMED_OUT.search(str(error)) else 1
    if reason:
        # Said first, and ended in any case: what is still to be closed may wait for what is missing.
        kept = watchdog.keep(error)
        where = f" (traceback: {kept})" if kept else ""
        print(f"dcpo: error: {reason}{where}", file=sys.stderr, flush=True)
        if not kept:
            traceback.print_exception(error)
        guard = threading.Timer(CLOSING_SECONDS, os._exit, [code])
        guard.daemon = True
        guard.start()
    if trainer is not None:
        # Not the process groups: another rank may be in a collective that this one will not join.
        trainer.close(groups=False)
    return code if reason else None


def _place(args) -> Place:
    if args.nodes == 1:
        return Place()
    if args.nodes < 1 or not args.master_addr or not 0 <= args.node_rank < args.nodes:
        raise ValueError(
            f"--nodes {args.nodes} needs --master-addr, and --node-rank {args.node_rank} must be 0 to {args.nodes - 1}"
        )
    return Place(args.nodes, args.node_rank, args.master_addr, args.master_port)


def _say_plan(run, gpu_memory: float | None, server_gpus: int | None) -> None:
    """Prints what the run needs. Raises ConfigError where that does not fit into ``gpu_memory`` GB, or into this
    machine's GPU."""
    from dcpo_megatron.config.schema import ConfigError
    from dcpo_megatron.memory.plan import GB, memory_problems, memory_text, plan_memory
    from dcpo_megatron.memory.step_estimate import estimate_step, estimate_text
    from dcpo_megatron.monitor.gpu import device_memory

    limit = device_memory(run.platform) if gpu_memory is None else int(gpu_memory * GB)
    print(memory_text(run, plan_memory(run, limit or 80 * GB)))
    if run.config.training.platform != "cpu":
        print(estimate_text(run, estimate_step(run, server_gpus)))
    problems = memory_problems(run, limit) if limit else []
    if problems:
        raise ConfigError("\n".join(problems))
    fits = f"the configuration fits: {run.world_size} ranks, data parallel {run.data_parallel}, {run.platform.name}"
    print(fits + (f", {limit / GB:.0f} GB a GPU" if limit else ""))
    for missing in run.not_seen:
        print(f"not looked at: {missing}")


def is_bad_input(error: Exception) -> bool:
    """Whether ``error`` is about what the user gave (its message is the sentence to show) and not a fault of the
    program."""
    from dcpo_megatron.config.schema import ConfigError
    from dcpo_megatron.data import DataError
    from dcpo_megatron.mcore.hf_config import ModelConfigError
    from dcpo_megatron.rewards import RewardError
    from dcpo_megatron.weights.hf_folder import CheckpointError

    return isinstance(error, (ConfigError, DataError, ModelConfigError, RewardError, CheckpointError))


def explains_itself(error: BaseException) -> bool:
    """Whether ``error`` ends a run that had begun, or whose ranks did not meet, with a message that is the sentence to
    show."""
    from dcpo_megatron.checkpoint.model_copy import UnsavedModelError
    from dcpo_megatron.mcore.meeting import MeetingError
    from dcpo_megatron.monitor.bad_steps import BadStepsError
    from dcpo_megatron.monitor.mismatch import MismatchError
    from dcpo_megatron.rollout import RolloutError

    return isinstance(error, (BadStepsError, MeetingError, MismatchError, RolloutError, UnsavedModelError))


def refuse(error: Exception, code: int = BAD_INPUT) -> int:
    """Says what is wrong and gives back the exit code: the first local rank at once, the others after a moment, if they
    are still there."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank:
        # Where all ranks fail alike, the launcher ends this one while it waits, and the sentence is said once.
        time.sleep(5.0)
    name = f"rank {_rank()}: " if local_rank else ""
    for line in str(error).splitlines():
        print(f"dcpo: error: {name}{line}", file=sys.stderr, flush=True)
    return code


def start_ranks(count: int, argv: list[str], grace_seconds: float | None = None, place: Place | None = None) -> int:
    """Starts ``count`` ranks of ``dcpo train argv`` on this machine (of ``place``, where there are several) and waits
    for them; returns the exit code of the first that failed."""
    if count < 1:
        print(f"dcpo: error: --ranks {count} must be at least 1", file=sys.stderr)
        return BAD_INPUT
    if "RANK" in os.environ:
        print(
            "dcpo: error: --ranks starts ranks, and this is one already (RANK is set): leave it out under torchrun",
            file=sys.stderr,
        )
        return BAD_INPUT
    return run_ranks(count, ["-m", "dcpo_megatron.cli", "train", *argv], grace_seconds=grace_seconds, place=place)


def print_keys() -> None:
    """Every configuration key with its default and meaning."""
    import dataclasses

    from dcpo_megatron.config.loading import known_keys
    from dcpo_megatron.config.schema import Config
    from dcpo_megatron.objectives import Objective

    fields = {}
    for name, field in Config.model_fields.items():
        for key, inner in getattr(field.annotation, "model_fields", {}).items():
            fields[f"{name}.{key}"] = inner
    defaults = {f"objective.{field.name}": field.default for field in dataclasses.fields(Objective)}
    for key in known_keys():
        if key in fields:
            inner = fields[key]
            default = "required" if inner.is_required() else repr(inner.get_default(call_default_factory=True))
            print(f"{key} = {default}" + (f"    {inner.description}" if inner.description else ""))
        elif key in defaults:
            print(f"{key} = {defaults[key]!r}    (the preset's value where it has another)")
        else:
            print(key)


def _without(options: tuple[str, ...], argv: list[str]) -> list[str]:
    rest, skip = [], False
    for word in argv:
        if skip:
            skip = False
        elif word in options:
            skip = True
        elif not word.startswith(tuple(f"{option}=" for option in options)):
            rest.append(word)
    return rest


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e9:
        raise ValueError
    return value


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))
