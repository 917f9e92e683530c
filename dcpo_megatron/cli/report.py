"""``dcpo report RUN``: a picture page of a run, one HTML file. It reads files only: a run under way is not disturbed.

Exit codes: 0 written; 2 there is no run in the folder, or the file cannot be written (one sentence on standard error).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Writes the page; returns the exit code."""
    parser = argparse.ArgumentParser(prog="dcpo report", description="A picture page of any run, one HTML file.")
    parser.add_argument("run", metavar="RUN", type=Path, help="the run's folder, its output=")
    parser.add_argument("--output", type=Path, default=None, metavar="FILE", help="default: RUN/report.html")
    args = parser.parse_args(argv)
    from dcpo_megatron.monitor.run_page import ReportError, make_page

    output = args.output or args.run / "report.html"
    try:
        page = make_page(args.run)
        part = output.with_name(output.name + ".part")
        part.write_text(page, encoding="utf-8")
        part.rename(output)
    except ReportError as error:
        print(f"dcpo: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"dcpo: error: {output} cannot be written ({error.strerror}): name another file with --output",
            file=sys.stderr,
        )
        return 2
    print(f"{output} ({len(page.encode()) / 1e6:.1f} MB): open it in a browser")
    return 0
