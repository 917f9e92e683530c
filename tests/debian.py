"""Programs that tests need from Debian's packages: installed where the tests run as root on a machine that has
apt-get."""

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path


def search_path() -> str:
    """PATH, and the folders of programs for root, which are not on everybody's."""
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def install(programs: Sequence[str], packages: Sequence[str], deadline: float = 180.0) -> str | None:
    """Why ``programs`` (looked up on :func:`search_path`) are not there; None where they are. ``deadline``: seconds for
    each of apt-get's two commands."""

    def missing() -> list[str]:
        return [name for name in programs if not shutil.which(name, path=search_path())]

    if not missing():
        return None
    names = " and ".join(packages)
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return f"{names}: not installed, and only root with apt-get can install it here"
    env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    # Tests run side by side, apt-get does not.
    with Path(tempfile.gettempdir(), "dcpo-tests-apt-get.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # its holder has a deadline
        if not missing():
            return None
        try:
            for words in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *packages]):
                done = subprocess.run(
                    ["apt-get", *words], env=env, capture_output=True, text=True, timeout=deadline,
                    stdin=subprocess.DEVNULL
                )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"{names}: apt-get took longer than {deadline:.0f} s"
    return f"{names}: apt-get could not install it: {done.stderr.strip()[-300:]}" if missing() else None
