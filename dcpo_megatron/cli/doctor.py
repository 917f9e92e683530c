"""`dcpo doctor`: what is installed, what fits, what will be used, and a fix for whatever does not fit.

    look(timeout) -> Facts             doctor_probes: reads the machine, judges nothing
    diagnose(Facts) -> [Finding]       doctor_checks: pure functions, one an area
    a table, or --json                 here; exit status 1 when a finding is "fail"

    --peers h1,h2,h3                   started on each of them: what a run needs between hosts (doctor_peers)

It runs where nothing is installed, torch and rich included.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dcpo_megatron.doctor.checks import diagnose
from dcpo_megatron.doctor.findings import Finding, counted
from dcpo_megatron.doctor.probes import look

TIMEOUT = 8.0  # seconds; the whole command then stays below ten


def main(argv: list[str] | None = None) -> int:
    """Runs `dcpo doctor`. Returns 1 when something fails, otherwise 0."""
    parser = argparse.ArgumentParser(prog="dcpo doctor", description="Tells what is installed, fits and will be used.")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--timeout",
        type=_timeout,
        default=TIMEOUT,
        metavar="SECONDS",
        help="limit for torch, CUDA and the driver to answer (default: %(default)s)",
    )
    between = parser.add_argument_group("between hosts", "started on each of them, by srun, ssh or hand")
    between.add_argument(
        "--peers",
        type=_peers,
        metavar="HOST,...",
        help="names or addresses, the same on all; the first is where a run's ranks would meet (MASTER_ADDR)",
    )
    between.add_argument("--port", type=_port, metavar="N", help="of the first (default: MASTER_PORT, else 29500)")
    between.add_argument("--shared", type=Path, metavar="FOLDER", help="that all should see (default: the current one)")
    between.add_argument(
        "--deadline", type=_timeout, default=60.0, metavar="SECONDS", help="for all to come (default: %(default)g)"
    )
    arguments = parser.parse_args(argv)
    if arguments.peers is None:
        findings, ready = diagnose(look(arguments.timeout)), "ready to train"
    else:
        findings, ready = _look_between(parser, arguments), "ready for a run on these hosts"
    if arguments.json:
        print(to_json(findings))
    else:
        print_table(findings, ready)
    return exit_status(findings)


def _look_between(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> list[Finding]:
    from dcpo_megatron.doctor.peers import check_peers

    port = arguments.port
    if port is None:
        try:
            port = _port(os.environ.get("MASTER_PORT") or "29500")
        except argparse.ArgumentTypeError as error:
            parser.error(f"MASTER_PORT: {error}")
    return check_peers(
        arguments.peers,
        port=port,
        seconds=arguments.deadline,
        shared=arguments.shared,
        say=lambda text: print(f"dcpo: {text}", file=sys.stderr, flush=True),
    )


def _peers(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if len(names) < 2 or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of two hosts or more, each once: h1,h2,h3")
    return names


def _port(text: str) -> int:
    if not (text.isdecimal() and 0 < int(text) < 65536):
        raise argparse.ArgumentTypeError(f"{text!r} is no port")
    return int(text)


def _timeout(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds between 0 and 3600")
    return seconds


def exit_status(findings: Sequence[Finding]) -> int:
    """1 when something fails, otherwise 0."""
    return int(any(finding.status == "fail" for finding in findings))


def summary(findings: Sequence[Finding], ready: str = "ready to train") -> str:
    """The last line of the table."""
    fails = sum(finding.status == "fail" for finding in findings)
    warnings = sum(finding.status == "warn" for finding in findings)
    verdict = f"not {ready}" if fails else ready
    return f"{counted(fails, 'failure')}, {counted(warnings, 'warning')}: {verdict}"


def to_json(findings: Sequence[Finding]) -> str:
    """``{"ready": bool, "findings": [{area, status, what, fix}]}``."""
    rows = [dataclasses.asdict(finding) for finding in findings]
    return json.dumps({"ready": exit_status(findings) == 0, "findings": rows}, indent=2)


def print_table(findings: Sequence[Finding], ready: str = "ready to train") -> None:
    """A table where rich is installed, otherwise plain lines."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        _print_plain(findings, ready)
        return
    styles = {"ok": "green", "info": "cyan", "warn": "yellow", "fail": "bold red"}
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    area = None
    for finding in findings:
        if area not in (None, finding.area):
            table.add_row()
        # Text, not markup: a fix such as transformer-engine[pytorch] has brackets.
        cell = Text(finding.what)
        if finding.fix:
            cell.append(
                f"\nfix: {finding.fix}", style="dim" if finding.status in ("ok", "info") else styles[finding.status]
            )
        label = "" if finding.area == area else finding.area
        table.add_row(Text(label, style="bold"), Text(finding.status, style=styles[finding.status]), cell)
        area = finding.area
    console = Console(highlight=False)
    console.print(table)
    console.print(Text(f"\n{summary(findings, ready)}", style="bold red" if exit_status(findings) else "bold green"))


def _print_plain(findings: Sequence[Finding], ready: str) -> None:
    for finding in findings:
        print(f"{finding.area:13} {finding.status:5} {finding.what}")
        if finding.fix:
            print(f"{'':19} fix: {finding.fix}")
    print(summary(findings, ready))
