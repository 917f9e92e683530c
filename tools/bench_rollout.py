#!/usr/bin/env python3
"""What the client of rollout servers costs: its tokens/s beside the same requests posted straight to the same servers,
in one run.

    python tools/bench_rollout.py                                          # a small model on one server on a CPU:
                                                                           # 32 prompts x 8 responses of 64 tokens
    python tools/bench_rollout.py --model FOLDER --url http://host:30000 --prompts 128 --tokens 1024

    client      ServerClient.generate, as a run samples: spread over servers, each answer read and checked token by
                token, with its weight version
    straight    httpx alone: the same bodies posted to the same servers, the answers' bytes counted and thrown away

Both take turns, each first every other time; medians of ``--repeats`` are shown after one turn that is left out. All
responses have ``--tokens`` tokens, so both have sampled the same number; the seeds are the same in every turn, so both
have sampled the same tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

# A checkout runs without being installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

KINDS = ("straight", "client")
REQUEST_SECONDS = 600.0


def make_model(folder: Path) -> None:
    """Writes the demo's model, untrained, for longer sequences."""
    from dcpo_megatron.toys.warm_up import make_model, make_tokenizer, save

    tokenizer = make_tokenizer()
    save(make_model(len(tokenizer), seed=0, layers=2, hidden=64, positions=4096), tokenizer, folder)


def make_requests(args: argparse.Namespace) -> list:
    """``--prompts`` different prompts of ``--prompt-tokens`` tokens, ``--samples`` requests each."""
    import random

    from dcpo_megatron.rollout import GenerateRequest

    # Low ids, which every vocabulary has and which are seldom special ones.
    draw = random.Random(0)
    prompts = [tuple(draw.randrange(3, 13) for _ in range(args.prompt_tokens)) for _ in range(args.prompts)]
    return [
        GenerateRequest(prompt, 1000 * number + sample)
        for number, prompt in enumerate(prompts)
        for sample in range(args.samples)
    ]


def bodies(requests: list, sampling) -> list[dict]:
    """What the client posts for ``requests``, in its order."""
    from dcpo_megatron.rollout.server_answers import batches_of, body

    return [
        body(batch, requests, sampling, {}, [uuid.uuid4().hex for _ in batch.places]) for batch in batches_of(requests)
    ]


async def post_straight(urls: list[str], posted: list[dict], headers: dict[str, str]) -> int:
    """Posts all bodies at once, in turn to each server; returns the number of bytes that came back."""
    import httpx

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(limits=limits, timeout=REQUEST_SECONDS, trust_env=False, headers=headers) as http:

        async def one(number: int, body: dict) -> int:
            size = 0
            async with http.stream("POST", f"{urls[number % len(urls)]}/generate", json=body) as answer:
                answer.raise_for_status()
                async for part in answer.aiter_raw():
                    size += len(part)
            return size

        return sum(await asyncio.gather(*(one(number, body) for number, body in enumerate(posted))))


def measure(args: argparse.Namespace, urls: list[str]) -> dict:
    """Seconds of each turn by kind, and how many tokens a turn sampled. Raises RolloutError, or httpx's errors."""
    from dcpo_megatron.rollout import RolloutError, SamplingParams
    from dcpo_megatron.rollout.fleet import Fleet
    from dcpo_megatron.rollout.server import Server, headers
    from dcpo_megatron.rollout.server_client import ServerClient
    from dcpo_megatron.rollout.serving.api_key import read_api_key

    key = read_api_key(None)
    fleet = Fleet([Server(url, api_key=key) for url in urls], f"bench-{uuid.uuid4().hex[:8]}")
    for server in fleet.servers:  # their own weights, under a tag that the client takes
        server.post("/update_weight_version", {"new_version": fleet.tag(0), "abort_all_requests": True})
        fleet.admit(server, 0)
    client = ServerClient(fleet, request_timeout=REQUEST_SECONDS)
    requests, sampling = make_requests(args), SamplingParams(args.tokens, temperature=1.0)
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    total = args.tokens * len(requests)
    for turn in range(args.repeats + 1):
        for kind in KINDS if turn % 2 else KINDS[::-1]:
            posted = bodies(requests, sampling)
            for server in fleet.servers:
                server.post("/flush_cache?timeout=10")
            began = time.perf_counter()
            if kind == "client":
                generations = client.generate(requests, sampling)
            else:
                asyncio.run(post_straight(urls, posted, headers(key)))
            if turn:
                seconds[kind].append(time.perf_counter() - began)
            if kind == "client" and sum(len(found.token_ids) for found in generations) != total:
                raise RolloutError(
                    f"not every response has {args.tokens} tokens: the comparison would be of different work"
                )
    return {"requests": len(requests), "tokens": total, "servers": len(urls), "seconds": seconds}


def summary(found: dict) -> dict:
    """``{kind: tokens/s}`` by the median, and ``ratio``: the median of the turns' ratios, client by straight."""
    rates = {kind: found["tokens"] / statistics.median(found["seconds"][kind]) for kind in KINDS}
    ratios = [straight / client for straight, client in zip(*(found["seconds"][kind] for kind in KINDS), strict=True)]
    return rates | {"ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def show(found: dict) -> None:
    """Prints the table."""
    from rich.console import Console
    from rich.table import Table

    numbers = summary(found)
    table = Table(
        title=(
            f"{found['requests']} responses, {found['tokens']:,} tokens, {found['servers']} server(s), medians of"
            f" {len(found['seconds']['client'])}"
        )
    )
    for name in ("what", "seconds (least to most)", "tokens/s", "client / straight (least to most)"):
        table.add_column(name, justify="left" if name == "what" else "right")
    for kind in KINDS:
        taken = found["seconds"][kind]
        ratio = f"{numbers['ratio']:.3f} ({numbers['least']:.3f} to {numbers['most']:.3f})" if kind == "client" else ""
        spread = f"{statistics.median(taken):.2f} ({min(taken):.2f} to {max(taken):.2f})"
        table.add_row(kind, spread, f"{numbers[kind]:,.0f}", ratio)
    console = Console()
    console.width = max(console.width, 110)
    console.print(table)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--prompts", type=int, default=32)
    made.add_argument("--samples", type=int, default=8, help="responses to a prompt (default 8)")
    made.add_argument("--prompt-tokens", type=int, default=32)
    made.add_argument("--tokens", type=int, default=64, help="of a response (default 64)")
    made.add_argument("--repeats", type=int, default=8)
    made.add_argument("--servers", type=int, default=1, help="servers to start (default 1)")
    made.add_argument(
        "--model", metavar="FOLDER", help="serve this Hugging Face folder (default: a small random model)"
    )
    made.add_argument(
        "--url", action="append", default=[], help="a running server; may be repeated. Its weights' tag is replaced"
    )
    made.add_argument("--python", metavar="PATH", help="the server environment's interpreter, as for dcpo serve")
    made.add_argument("--python-path", metavar="FOLDER", help="goes before the servers' import path")
    made.add_argument("--json", type=Path, metavar="FILE", help="also write every number to this file")
    return made


def main(arguments: list[str] | None = None) -> int:
    made = parser()
    args = made.parse_args(arguments)
    for name in ("prompts", "samples", "prompt_tokens", "tokens", "repeats", "servers"):
        if getattr(args, name) < 1:
            made.error(f"--{name.replace('_', '-')} must be at least 1")
    from contextlib import nullcontext

    import httpx

    from dcpo_megatron.console.quiet import quiet_libraries
    from dcpo_megatron.rollout import RolloutError
    from dcpo_megatron.rollout.serving import start_servers

    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        try:
            servers = nullcontext(SimpleNamespace(urls=args.url))
            if not args.url:
                model = Path(args.model or folder)
                if not args.model:
                    make_model(model)
                command = [args.python] if args.python else None
                servers = start_servers(
                    model, args.servers, command=command, arguments=_ARGUMENTS, python_path=args.python_path
                )
            with servers as running:
                found = measure(args, running.urls)
        except (RolloutError, httpx.HTTPError) as error:
            print(f"bench_rollout: error: {error}", file=sys.stderr)
            return 1
    show(found)
    if args.json:
        args.json.write_text(json.dumps(found | summary(found), indent=1) + "\n", encoding="utf-8")
    return 0


# Room for many small requests at a time.
_ARGUMENTS = ("--max-total-tokens", "65536", "--max-running-requests", "256")

if __name__ == "__main__":
    sys.exit(main())
