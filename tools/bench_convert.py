#!/usr/bin/env python3
"""What a conversion costs: bytes per second beside a plain copy of the same files, and peak memory, in one run.

    python tools/bench_convert.py                                     # a quarter of a gigabyte, on any machine
    python tools/bench_convert.py --gigabytes 4 --dtype float32       # needs three times as much disk

A Qwen2-shaped model with random weights is written as a Hugging Face folder (a tensor at a time), converted to a
Megatron checkpoint, and back. Each step runs in a process of its own. **peak memory** is the largest resident size of
that process (VmHWM) or of the largest of its workers (ru_maxrss); the size that the process has before it opens a file
of weights is in it, and shown as "nothing: imports only"; the seconds of those imports are not. **copy** is
shutil.copyfile and fsync of the same source files, by one process, just before each conversion; the rate beside it is
that of the conversion's source bytes. Everything was read once before, so all rows read from the page cache where
memory allows it. The round trip is compared bit for bit at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# A checkout runs without being installed.
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

VOCABULARY = 151_936
SHARD_BYTES = 1_000_000_000
PIECE_ROWS = 4096


def make_model(folder: Path, gigabytes: float, dtype: str, vocab: int = VOCABULARY) -> None:
    """Writes a Qwen2-shaped Hugging Face folder of about ``gigabytes`` (its embedding alone may be more)."""
    import torch

    from dcpo_megatron.mcore.hf_config import read_shape
    from dcpo_megatron.weights.hf_writing import shard_name, write_safetensors, write_weight_index
    from dcpo_megatron.weights.mapping import hf_shapes, parameter_names, rule_for

    wanted = gigabytes * 1e9 / getattr(torch, dtype).itemsize
    # Embedding and output layer are at most two thirds, as in small models of the family; in the smallest they are one.
    tied = gigabytes < 1
    outer = vocab * (1 if tied else 2)
    head = 64

    def layer(width: int) -> int:
        return 2 * width * width + 2 * width * 2 * head + 3 * width * 5 * width

    sizes = (3584, 2048, 1536, 896, 512, 256)
    hidden = next((h for h in sizes if outer * h <= wanted * 2 / 3 and outer * h + 4 * layer(h) <= wanted), 128)
    layers = max(2, round((wanted - outer * hidden) / layer(hidden)))
    folder.mkdir(parents=True)
    config = dict(
        architectures=["Qwen2ForCausalLM"], model_type="qwen2", hidden_size=hidden, intermediate_size=5 * hidden,
        num_hidden_layers=layers, vocab_size=vocab,
        num_attention_heads=hidden // head, num_key_value_heads=2, max_position_embeddings=4096, rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
        rope_theta=1e6, hidden_act="silu", torch_dtype=dtype,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    shape = read_shape(folder)
    entries = []
    for name in parameter_names(shape):
        rule = rule_for(name, shape)
        entries += [(hf, getattr(torch, dtype), sizes) for hf, sizes in zip(rule.hf_names, hf_shapes(rule, shape))]
    shards, size = [[]], 0
    for entry in entries:
        count = torch.Size(entry[2]).numel() * entry[1].itemsize
        if shards[-1] and size + count > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += count
    generator = torch.Generator().manual_seed(0)

    def pieces(members):
        for name, kind, sizes in members:
            for first in range(0, sizes[0], PIECE_ROWS):
                rows = min(PIECE_ROWS, sizes[0] - first)
                noise = torch.randn(rows, *sizes[1:], generator=generator).mul_(0.02)
                yield name, noise.add_(1.0 if "norm" in name else 0.0).to(kind)

    for number, members in enumerate(shards):
        write_safetensors(folder / shard_name(number, len(shards)), members, pieces(members))
    names = [[entry[0] for entry in members] for members in shards]
    write_weight_index(folder, names, sum(file.stat().st_size for file in folder.glob("*.safetensors")))


def same_tensors(one: Path, other: Path) -> tuple[int, list[str]]:
    """(number of tensors, names of those that differ), a stretch of rows in memory at a time."""
    import torch

    from dcpo_megatron.weights.hf_folder import SafetensorsFolder

    first, second = SafetensorsFolder(one), SafetensorsFolder(other)
    different = sorted(first.names() ^ second.names())
    for name in sorted(first.names() & second.names()):
        sizes = first.shape(name)
        if sizes != second.shape(name) or first.dtype(name) != second.dtype(name):
            different.append(name)
            continue
        for row in range(0, sizes[0], PIECE_ROWS):
            span = (row, min(row + PIECE_ROWS, sizes[0]))
            if not torch.equal(_bits(first.read(name, span)), _bits(second.read(name, span))):
                different.append(name)
                break
    return len(first.names() | second.names()), different


def _bits(tensor):
    import torch

    return tensor.contiguous().view(torch.int16 if tensor.itemsize == 2 else torch.int32)


# -- one measurement, in a process of its own ------------------------------------------------------


def step(name: str, args: argparse.Namespace) -> dict:
    """Runs one step here; returns seconds and peak memory of this process and of its largest child, in bytes."""
    folder = Path(args.workdir)
    source, megatron, back = folder / "hf", folder / "megatron", folder / "back"
    started = time.perf_counter()
    if name == "make":
        make_model(source, args.gigabytes, args.dtype, args.vocab)
    elif name.startswith("copy"):
        destination = folder / "copy"
        destination.mkdir()
        for file in sorted((source if name == "copy hf" else megatron).iterdir()):
            if file.is_file():
                shutil.copyfile(file, destination / file.name)
                with open(destination / file.name, "rb+") as copied:
                    os.fsync(copied.fileno())
    elif name == "compare":
        tensors, different = same_tensors(source, back)
        return {"tensors": tensors, "different": different}
    else:
        from dcpo_megatron.mcore.hf_config import read_shape
        from dcpo_megatron.mcore.layout import ParallelLayout
        from dcpo_megatron.weights.conversion_jobs import run_job
        from dcpo_megatron.weights.to_hf import MegatronToHf
        from dcpo_megatron.weights.to_megatron import HfToMegatron

        read_shape(source)
        started = time.perf_counter()  # a copy imports nothing
        if name == "hf-to-megatron":
            run_job(HfToMegatron(str(source), ParallelLayout(tensor=args.tp)), megatron, workers=args.workers)
        elif name == "megatron-to-hf":
            run_job(MegatronToHf(str(megatron), shard_bytes=SHARD_BYTES), back, workers=args.workers)
    seconds = time.perf_counter() - started
    # Not ru_maxrss, in which the size of the process that started this one is left.
    own = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {"seconds": seconds, "peak": max(own, workers), "parent_peak": own, "worker_peak": workers}


def in_child(name: str, args: argparse.Namespace) -> dict:
    """:func:`step` in a fresh process."""
    words = ["--workdir", args.workdir, "--gigabytes", args.gigabytes, "--dtype", args.dtype, "--tp", args.tp]
    words += ["--workers", args.workers, "--vocab", args.vocab, "--step", name]
    done = subprocess.run(
        [sys.executable, __file__, *map(str, words)], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"bench_convert: {name} failed, see above")
    return json.loads(done.stdout.splitlines()[-1])


def measure(args: argparse.Namespace) -> dict:
    folder = Path(args.workdir)
    in_child("make", args)
    rows = [{"what": "nothing: imports only", **in_child("imports", args)}]
    for name, source in (("hf-to-megatron", folder / "hf"), ("megatron-to-hf", folder / "megatron")):
        count = sum(file.stat().st_size for file in source.iterdir() if file.is_file())
        copy = in_child("copy hf" if source.name == "hf" else "copy megatron", args)
        shutil.rmtree(folder / "copy")
        own = in_child(name, args)
        for what, found in ((f"copy of its source, {source.name}", copy), (name, own)):
            rate = count / found["seconds"]
            rows.append(
                {"what": what, "bytes": count, **found, "rate": rate, "relative": rate * copy["seconds"] / count}
            )
    compared = in_child("compare", args)
    return {
        "model": json.loads((folder / "hf" / "config.json").read_text()),
        "workers": args.workers,
        "tensor_parallel": args.tp,
        "rows": rows,
        **compared,
    }


def table(found: dict) -> str:
    """The result as text."""
    model = found["model"]
    lines = [
        (
            f"qwen2, {model['num_hidden_layers']} layers, hidden size {model['hidden_size']}, vocabulary"
            f" {model['vocab_size']}, {model['torch_dtype']}; --tp {found['tensor_parallel']}, --workers"
            f" {found['workers']}"
        ),
        f"{'':<32}{'bytes':>16}{'seconds':>10}{'MB/s':>8}{'of copy':>9}{'peak memory, MB':>17}",
    ]
    for row in found["rows"]:
        if "bytes" in row:
            numbers = f"{row['bytes']:>16,}{row['seconds']:>10.2f}{row['rate'] / 1e6:>8.0f}{row['relative']:>9.2f}"
        else:
            numbers = " " * 43
        lines.append(f"{row['what']:<32}{numbers}{row['peak'] / 1e6:>17.0f}")
    same = found["tensors"] - len(found["different"])
    lines.append(f"round trip: {same} of {found['tensors']} tensors are the same, bit for bit")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Exit code 1: the round trip changed a tensor."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--gigabytes", type=float, default=0.25, help="size of the model (0.25)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--tp", type=int, default=2, help="tensor-parallel size of the checkpoint (2)")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--vocab", type=int, default=VOCABULARY, help=f"vocabulary ({VOCABULARY})")
    parser.add_argument(
        "--workdir", default=None, metavar="DIR", help="new folder for the files; default: a temporary one"
    )
    parser.add_argument("--keep", action="store_true", help="leave the files there")
    parser.add_argument("--json", default=None, metavar="FILE", help="write the numbers there")
    parser.add_argument("--step", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.step:
        print(json.dumps(step(args.step, args)))
        return 0
    if args.workdir and Path(args.workdir).exists() and any(Path(args.workdir).iterdir()):
        parser.error(f"--workdir {args.workdir} is not empty: give a new folder")
    args.workdir = args.workdir or tempfile.mkdtemp(prefix="bench-convert-")
    Path(args.workdir).mkdir(parents=True, exist_ok=True)
    try:
        found = measure(args)
    finally:
        if not args.keep:
            for name in ("hf", "megatron", "back", "copy", "megatron.incomplete", "back.incomplete"):
                shutil.rmtree(Path(args.workdir) / name, ignore_errors=True)
            if not any(Path(args.workdir).iterdir()):
                os.rmdir(args.workdir)
    print(table(found))
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=2))
    return 1 if found["different"] else 0


if __name__ == "__main__":
    sys.exit(main())
