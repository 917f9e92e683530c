#!/usr/bin/env python3
"""What it costs to publish weights to SGLang servers: seconds and bytes/s of each mode beside a raw broadcast of the
same tensors, in one run.

    python tools/bench_publish.py                                          # a random model of 220 M parameters, one
                                                                           # server, on a CPU: about three minutes
    python tools/bench_publish.py --millions 50 --servers 2 --modes distributed
    python tools/bench_publish.py --model FOLDER --url http://host:30000   # servers that run already, and serve FOLDER

    training ranks (Megatron model, --tp)  -- publish, as a run does -->  stock servers
    rank 0                                 -- broadcast -->               as many plain processes
                                                                          "raw": nothing but torch.distributed

Kinds take turns, so that noise meets all alike; medians of ``--repeats`` are shown. **stream** is the phase in which
the weights go over and are loaded, **rate** the bytes that one server gets by its seconds, **of raw** the raw
broadcast's seconds by those. The raw broadcast is measured three times: into tensors that are there, which is the least
that can be (existing); into tensors made for it (new); and into tensors made for it and then copied into those that are
there, as every stock server does with what it receives (loaded). **whole** is the transaction with all of its phases,
log-probs compared at the end. The first publication of a mode also connects, and the very first scrubs; it is shown,
and not in the medians. **peak** is how far rank 0's resident memory (VmHWM; on a GPU: allocated memory) rose above what
it was before the publication: the model is there already.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

# A checkout runs without being installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

MODES = ("distributed", "disk", "ipc")
PHASES = ("answer", "quiesce", "stream", "verify", "commit", "resume")
VOCABULARY = 32_768
# Raw broadcasts, and what the receivers are told.
RAW = {"existing": 1.0, "new": 2.0, "loaded": 3.0}
RAW_SECONDS = 600


def model_config(millions: float):
    """A Qwen2 configuration of about ``millions`` million parameters, tied embeddings."""
    from transformers import Qwen2Config

    wanted = millions * 1e6
    # The embedding is a quarter at most.
    vocab, hidden = next(
        (vocab, hidden)
        for hidden, vocab in ((1024, VOCABULARY), (512, VOCABULARY), (256, 8192), (128, 512))
        if 4 * vocab * hidden <= wanted or hidden == 128
    )
    heads, kv_heads = hidden // 64, max(1, hidden // 256)
    layers = max(2, round((wanted - vocab * hidden) / ((14 + 2 * kv_heads / heads) * hidden**2)))
    return Qwen2Config(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip


def make_model(folder: Path, millions: float, dtype: str = "float32") -> None:
    """Writes a Hugging Face folder of random weights."""
    import torch
    from transformers import Qwen2ForCausalLM

    torch.manual_seed(0)
    Qwen2ForCausalLM(model_config(millions)).to(getattr(torch, dtype)).save_pretrained(folder)


# -- a training rank -------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> None:
    """One training rank: publishes in turns; rank 0 also broadcasts, and leaves ``result.json``."""
    import torch.distributed as dist

    from dcpo_megatron.console.quiet import quiet_libraries

    quiet_libraries()
    from dcpo_megatron.mcore import platform as platforms
    from dcpo_megatron.mcore.hf_config import read_shape
    from dcpo_megatron.mcore.layout import ParallelLayout, make_groups, rank_position
    from dcpo_megatron.mcore.model import ModelOptions
    from dcpo_megatron.mcore.step import PolicyModel
    from dcpo_megatron.rollout.fleet import Fleet
    from dcpo_megatron.rollout.server import Server
    from dcpo_megatron.rollout.serving.api_key import read_api_key
    from dcpo_megatron.training.publish_probe import TrainingProbe
    from dcpo_megatron.weights.publish import PublishOptions, WeightPublisher
    from dcpo_megatron.weights.publish.weight_checks import TOLERANCES
    from dcpo_megatron.weights.transfer import WeightGatherer, load_weights

    platform = platforms.select_platform("auto")
    platforms.start(platform, RAW_SECONDS)
    layout = ParallelLayout(tensor=args.tp)
    make_groups(layout)
    shape = read_shape(args.model)
    policy = PolicyModel.create(shape, layout, ModelOptions(dtype=args.dtype), platform, rank_position())
    load_weights(policy, args.model)
    gatherer, folder = WeightGatherer(policy), Path(args.measure)
    prompts = [SimpleNamespace(token_ids=tuple((7 * n + 3 * t) % shape.vocab for t in range(32))) for n in range(2)]
    # A run of its own, so that nothing from before passes for ours.
    fleet = Fleet([Server(url, api_key=read_api_key(None)) for url in args.url], f"bench-{os.getppid()}")
    publishers = {
        mode: WeightPublisher(
            fleet,
            PublishOptions(
                mode,
                platform.backend,
                args.bucket_mib * 2**20,
                folder=folder / "published",
                min_servers=len(args.url),
                tolerance=TOLERANCES[args.dtype],
            ),
            device=platform.device,
            probe=TrainingProbe(policy, prompts),
        )
        for mode in args.modes
    }
    raw, sizes = None, [tensor.numel() for _, tensor in gatherer.tensors()]
    if dist.get_rank() == 0 and not args.no_raw:
        raw = RawBroadcast([tensor.clone() for _, tensor in gatherer.tensors()], len(args.url), platform, folder)
    elif not args.no_raw:
        for _ in gatherer.tensors():
            pass
    found: dict = {mode: {"first": None, "whole": [], "phases": [], "peak": 0} for mode in args.modes}
    raws: dict[str, list[float]] = {kind: [] for kind in RAW}
    version = 0
    for turn in range(args.repeats + 1):
        dist.barrier()
        if raw is not None:
            for kind, taken in raws.items():
                taken.append(raw.seconds(kind))
        for mode, publisher in publishers.items():
            version += 1
            dist.barrier()
            before = _memory_before(platform)
            began = time.perf_counter()
            report = publisher.publish(gatherer.tensors(), version)
            whole = time.perf_counter() - began
            row = found[mode]
            row["peak"] = max(row["peak"], _memory_peak(platform) - before)
            row |= {"bytes": report.bytes, "buckets": report.buckets, "difference": report.difference}
            if turn == 0:
                row["first"] = whole
            else:
                row["whole"].append(whole)
                row["phases"].append(report.seconds)
    for publisher in publishers.values():
        publisher.close()
    if raw is not None:
        raw.close()
    if dist.get_rank() == 0:
        # The first fills the receivers' pages.
        raws = {} if raw is None else {kind: taken[1:] for kind, taken in raws.items()}
        (folder / "result.json").write_text(
            json.dumps({"parameters": sum(sizes), "tensors": len(sizes), "raw": raws, "modes": found})
        )
    platforms.stop()


def _memory_before(platform) -> int:
    """Bytes in use now; the peak is counted from here on."""
    import torch

    if not platform.is_cpu:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes VmRSS
    return _status_bytes("VmRSS")


def _memory_peak(platform) -> int:
    import torch

    return _status_bytes("VmHWM") if platform.is_cpu else torch.cuda.max_memory_allocated()


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


# -- the raw broadcast -----------------------------------------------------------------------------


class RawBroadcast:
    """Broadcasts ``tensors`` to ``receivers`` plain processes that hold tensors of the same shapes."""

    def __init__(self, tensors: list, receivers: int, platform, folder: Path):
        from datetime import timedelta

        import torch
        import torch.distributed as dist

        self.tensors = tensors
        plan = [[list(tensor.shape), str(tensor.dtype).removeprefix("torch.")] for tensor in tensors]
        (folder / "raw.json").write_text(json.dumps(plan))
        limit = timedelta(seconds=RAW_SECONDS)
        store = dist.TCPStore("127.0.0.1", 0, 1 + receivers, is_master=True, wait_for_workers=False, timeout=limit)
        env = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        self.processes = [
            subprocess.Popen(
                [sys.executable, __file__, "--receive", str(folder), str(store.port), str(rank), str(1 + receivers)],
                env=env,
                stdin=subprocess.PIPE,
            )
            for rank in range(1, 1 + receivers)
        ]  # fmt: skip
        self.group = _raw_group(store, 0, 1 + receivers, platform.backend)
        self.go = torch.ones(1, device=platform.device)

    def seconds(self, kind: str) -> float:
        """Broadcasts once, until every receiver has everything; ``kind``: of ``RAW``."""
        self._say(RAW[kind])
        began = time.perf_counter()
        works = [self.group.broadcast(tensor, 0) for tensor in self.tensors]
        for work in works:
            work.wait()
        self.group.allreduce(self.go).wait()
        self.go.cpu()
        return time.perf_counter() - began

    def close(self) -> None:
        """Ends the receivers."""
        self._say(0.0)
        for process in self.processes:
            process.wait(60)

    def _say(self, what: float) -> None:
        self.go.fill_(what)
        self.group.broadcast(self.go, 0).wait()


def receive(folder: str, port: str, rank: str, world: str) -> None:
    """A receiver of :class:`RawBroadcast`. Ends when the sender does: gloo would wait for ever."""
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(rank)) if cuda else torch.device("cpu")
    limit = timedelta(seconds=RAW_SECONDS)
    store = dist.TCPStore("127.0.0.1", int(port), int(world), is_master=False, timeout=limit)
    group = _raw_group(store, int(rank), int(world), "nccl" if cuda else "gloo")
    plan = json.loads((Path(folder) / "raw.json").read_text())
    tensors = [torch.empty(shape, dtype=getattr(torch, dtype), device=device) for shape, dtype in plan]
    go = torch.ones(1, device=device)
    while True:
        group.broadcast(go, 0).wait()
        if not go.item():
            return
        into = tensors if go.item() == RAW["existing"] else [torch.empty_like(tensor) for tensor in tensors]
        works = [group.broadcast(tensor, 0) for tensor in into]
        for work in works:
            work.wait()
        if go.item() == RAW["loaded"]:
            for tensor, received in zip(tensors, into, strict=True):
                tensor.copy_(received)
        group.allreduce(go).wait()
        del into, works


def _raw_group(store, rank: int, world: int, backend: str):
    from datetime import timedelta

    import torch.distributed as dist

    if backend == "gloo":
        return dist.ProcessGroupGloo(store, rank, world, timedelta(seconds=RAW_SECONDS))
    return dist.ProcessGroupNCCL(store, rank, world)


# -- all of it -------------------------------------------------------------------------------------


def summary(found: dict) -> dict[str, dict]:
    """By mode: medians of ``stream`` and ``whole`` seconds and of the phases, ``rate`` in bytes/s, ``of_raw`` by kind
    (1: as fast as that raw broadcast), ``peak`` bytes."""
    raw = {kind: statistics.median(taken) for kind, taken in found["raw"].items()}
    rows = {}
    for mode, row in found["modes"].items():
        phases = {name: statistics.median(turn[name] for turn in row["phases"]) for name in PHASES}
        rows[mode] = {
            "stream": phases["stream"],
            "rate": row["bytes"] / phases["stream"],
            "of_raw": {kind: seconds / phases["stream"] for kind, seconds in raw.items()},
            "whole": statistics.median(row["whole"]),
            "first": row["first"],
            "phases": phases,
            "peak": row["peak"],
        }
    return rows


def show(found: dict, servers: int) -> None:
    """Prints the table of one model."""
    from rich.console import Console
    from rich.table import Table

    size = next(iter(found["modes"].values()))["bytes"]
    raw = {kind: statistics.median(taken) for kind, taken in found["raw"].items()}
    table = Table(
        title=(
            f"{found['parameters'] / 1e6:.3g} M parameters, {found['tensors']} tensors, {size / 1e6:.3g} MB, {servers}"
            f" server(s), medians of {len(next(iter(found['modes'].values()))['whole'])}"
        )
    )
    for name in ("mode", "stream", "rate", "of raw", "whole", "its other phases", "first", "peak"):
        table.add_column(name, justify="left" if name in ("mode", "its other phases") else "right")
    for kind, seconds in raw.items():
        table.add_row(f"raw, {kind}", f"{seconds:.3f} s", f"{size / seconds / 1e6:.0f} MB/s")
    for mode, row in summary(found).items():
        others = ", ".join(f"{name} {row['phases'][name]:.2f}" for name in PHASES if name != "stream")
        of_raw = "\n".join(f"{kind} {ratio:.2f}" for kind, ratio in row["of_raw"].items())
        table.add_row(
            mode, f"{row['stream']:.3f} s", f"{row['rate'] / 1e6:.0f} MB/s", of_raw, f"{row['whole']:.2f} s", others,
            f"{row['first']:.2f} s",
            f"{row['peak'] / 1e6:.0f} MB",
        )  # fmt: skip
    console = Console()
    console.width = max(console.width, 140)
    console.print(table)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--millions", default="220", help="sizes of the random models, million parameters (default 220)")
    made.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32",
        help="of the weights on both sides (default float32; a server on a GPU computes in 16 bits: bfloat16)",
    )  # fmt: skip
    made.add_argument("--modes", default=",".join(MODES), help=f"default {','.join(MODES)}")
    made.add_argument("--servers", type=int, default=1, help="servers to start (default 1)")
    made.add_argument("--tp", type=int, default=1, help="tensor-parallel training ranks (default 1)")
    made.add_argument(
        "--bucket-mib", type=int, default=512, help="MiB of a bucket (default 512, as publish.bucket_bytes)"
    )
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument(
        "--no-raw", action="store_true", help="no raw broadcast: over nccl its receivers need GPUs of their own"
    )
    made.add_argument("--model", metavar="FOLDER", help="publish this Hugging Face folder's weights")
    made.add_argument("--url", action="append", default=[], help="a running server of --model; may be repeated")
    made.add_argument("--python", metavar="PATH", help="the server environment's interpreter, as for dcpo serve")
    made.add_argument("--python-path", metavar="FOLDER", help="goes before the servers' import path")
    made.add_argument("--folder", metavar="DIR", help="where models and published files lie (default: temporary files)")
    made.add_argument("--json", type=Path, metavar="FILE", help="also write every number to this file")
    made.add_argument("--measure", metavar="FOLDER", help=argparse.SUPPRESS)
    made.add_argument("--receive", nargs=4, help=argparse.SUPPRESS)
    return made


def main(arguments: list[str] | None = None) -> int:
    made = parser()
    args = made.parse_args(arguments)
    if args.receive:
        receive(*args.receive)
        return 0
    args.modes = args.modes.split(",")
    if unknown := set(args.modes) - set(MODES):
        made.error(f"--modes {','.join(unknown)}: the modes are {', '.join(MODES)}")
    if args.measure:
        measure(args)
        return 0
    try:
        sizes = [float(word) for word in args.millions.split(",")]
    except ValueError:
        made.error(f"--millions {args.millions}: give numbers, separated by commas")
    if min(args.servers, args.tp, args.bucket_mib, args.repeats, *sizes) <= 0:
        made.error("--millions, --servers, --tp, --bucket-mib and --repeats must be above 0")
    if args.url and not args.model:
        made.error("--url needs --model: the folder that the servers serve")
    from dcpo_megatron.console.quiet import quiet_libraries
    from dcpo_megatron.rollout.serving import ServingError

    quiet_libraries()
    results = []
    for size in [None] if args.model else sizes:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            try:
                found = _one_model(args, Path(folder), size)
            except ServingError as error:
                print(f"bench_publish: error: {error}", file=sys.stderr)
                return 2
        if found is None:
            return 1
        show(found, len(args.url) or args.servers)
        results.append(found | {"summary": summary(found)})
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


def _one_model(args: argparse.Namespace, folder: Path, millions: float | None) -> dict | None:
    """Starts what is needed and measures one model; None where a rank failed, which has said why."""
    from contextlib import nullcontext

    from dcpo_megatron.launch.local import run_ranks
    from dcpo_megatron.rollout.serving import start_servers

    model = Path(args.model or folder / "model").absolute()
    if millions is not None:
        make_model(model, millions, args.dtype)
    servers = nullcontext(SimpleNamespace(urls=args.url))
    if not args.url:
        servers = start_servers(
            model, args.servers, command=[args.python] if args.python else None, python_path=args.python_path
        )
    with servers as running:
        words = ["--model", model, "--dtype", args.dtype, "--tp", args.tp]
        words += ["--bucket-mib", args.bucket_mib, "--repeats", args.repeats]
        words += ["--no-raw"] if args.no_raw else []
        words += ["--modes", ",".join(args.modes), *(word for url in running.urls for word in ("--url", url))]
        if run_ranks(args.tp, [__file__, "--measure", str(folder), *map(str, words)]):
            return None
    return json.loads((folder / "result.json").read_text())


if __name__ == "__main__":
    sys.exit(main())
