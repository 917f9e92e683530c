"""A headless Chromium for tests: Debian's package, installed where the tests run as root on a machine that has it."""

import subprocess
import tempfile
from pathlib import Path

from tests import debian

_QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def install() -> str | None:
    """Why there is no browser; None where there is one."""
    return debian.install(("chromium",), ("chromium",))


def open_page(file: Path, width: int, height: int, *, picture: Path | None = None, deadline: float = 90.0) -> str:
    """Opens a file in a window of that size, in pixels; returns the document as it is after its scripts ran, or takes a
    ``picture`` (PNG)."""
    what = f"--screenshot={picture}" if picture else "--dump-dom"
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        done = subprocess.run(
            ["chromium", "--headless", *_QUIET, "--hide-scrollbars", f"--user-data-dir={profile}",
             f"--window-size={width},{height}", what, file.resolve().as_uri()],
            capture_output=True, text=True, timeout=deadline, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"chromium ended with {done.returncode}: {done.stderr[-500:]}")
    return done.stdout
