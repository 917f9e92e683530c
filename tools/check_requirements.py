"""Do the pinned requirements resolve? pip's dry run of every profile, in a fresh environment of each Python that this
machine has.

    python tools/check_requirements.py                            # every profile, Python 3.11, 3.12 and 3.13
    python tools/check_requirements.py cpu gpu --python 3.12      # some

Nothing is installed. From wheels pip reads the metadata only (range requests, where the index has no metadata of its
own). A Python that is not here is said and skipped; so is everything where no index can be reached. Exit codes: 0 all
that could be tried resolves; 1 something does not, with pip's reason.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
# wandb.txt goes on top of cpu.txt: what resolves with it resolves without. gpu.txt comes after a torch: each that the
# project claims.
PROFILES = {
    "cpu": ("-r", "requirements/cpu.txt", "-r", "requirements/wandb.txt"),
    "gpu, torch 2.9.1": ("torch==2.9.1", "-r", "requirements/gpu.txt"),
    "gpu, torch 2.11.0": ("torch==2.11.0", "-r", "requirements/gpu.txt"),
    "gpu, torch 2.13.0": ("torch==2.13.0", "-r", "requirements/gpu.txt"),
    "sglang-cpu": ("-r", "requirements/sglang-cpu.txt"),
    "sglang": ("-r", "requirements/sglang.txt"),
}
# "urlopen error": a package that fetches its wheel itself, from NVIDIA's index.
UNREACHABLE = (
    "NewConnectionError",
    "NameResolutionError",
    "TimeoutError",
    "ProxyError",
    "Max retries",
    "urlopen error",
)
DEADLINE = 900.0  # seconds of one dry run, on an index that serves whole wheels only


def find_python(version: str) -> str | None:
    """An interpreter of ``version`` that runs: this one, one on the PATH, or one of pyenv's (whose command on the PATH
    may refuse)."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    names = [sys._base_executable, f"python{version}", *sorted(map(str, pyenv.glob(f"{version}.*/bin/python")))]
    ask = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
    for name in filter(shutil.which, names):
        if subprocess.run([name, "-c", ask], capture_output=True, text=True).stdout.strip() == version:
            return name
    return None


def dry_run(environment: Path, arguments: tuple[str, ...]) -> tuple[bool | None, list[str]]:
    """Whether pip finds a set of versions (None: an index does not answer), and pip's last lines where not."""
    command = [
        environment / "bin" / "python",
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--quiet",
        "--use-feature=fast-deps",
    ]
    command += ["--disable-pip-version-check", "--no-input", "--retries", "2", "--timeout", "60", *arguments]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE)
    except subprocess.TimeoutExpired:
        return False, [f"pip did not finish in {DEADLINE:.0f} s"]
    if done.returncode == 0:
        return True, []
    if any(word in done.stderr for word in UNREACHABLE) and "ResolutionImpossible" not in done.stderr:
        return None, []
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line and not line.startswith("WARNING")]
    return False, lines[-12:]


def check(version: str, profiles: list[str], folder: Path) -> list[bool | None]:
    """Every profile with one Python, a line each. Whether each resolves; None: not tried."""
    python = find_python(version)
    if python is None:
        print(f"requirements: Python {version} is not on this machine: SKIPPED", flush=True)
        return []
    environment, results = folder / version, []
    subprocess.run([python, "-m", "venv", environment], check=True)
    for profile in profiles:
        started = time.monotonic()
        resolves, reason = dry_run(environment, PROFILES[profile])
        word = {True: "resolves", False: "does NOT RESOLVE", None: "an index cannot be reached: SKIPPED"}[resolves]
        took = f"({time.monotonic() - started:.0f} s)"
        print(f"requirements: Python {version}, {profile}: {word} {took}", *reason, sep="\n  ", flush=True)
        results.append(resolves)
        if results == [None]:
            print(f"requirements: Python {version}: SKIPPED altogether", flush=True)
            break
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("profiles", nargs="*", metavar="PROFILE", help="default: all")
    parser.add_argument("--python", action="append", choices=PYTHONS, help="default: all; may be given again")
    parser.add_argument("--stamp", type=Path, help="a file to touch when nothing failed and something could be tried")
    args = parser.parse_args()
    chosen = [name for name in PROFILES if not args.profiles or name.partition(",")[0] in args.profiles]
    if not chosen:
        parser.error(f"no profile {args.profiles[0]!r}: there are cpu (with wandb), gpu, sglang-cpu, sglang")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(PYTHONS)) as pool:
        done = pool.map(lambda version: check(version, chosen, Path(folder)), args.python or PYTHONS)
        results = [result for of_one in done for result in of_one]
    if args.stamp and False not in results and True in results:
        args.stamp.touch()
    return 1 if False in results else 0


if __name__ == "__main__":
    sys.exit(main())
