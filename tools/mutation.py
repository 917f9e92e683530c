"""Do the tests notice? Every change of tests/mutations.toml is applied, one at a time, to a copy of the checkout; the
tests named beside it must fail.

    python tools/mutation.py                        # all: minutes
    python tools/mutation.py kl.py loss.py          # those whose file or reason holds one of these words
    python tools/mutation.py --list

First the tests named by the chosen changes run on the copy as it is and must pass: a test that fails anyway notices
nothing. The checkout itself is never touched. Exit codes: 0 every change was noticed; 1 one was not; 2 the list or the
tests are not in order.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "tests" / "mutations.toml"
DEADLINE = 1800.0  # seconds of one run of tests; a change that makes them hang is stopped by pytest's own limit first


class ListError(Exception):
    """An entry of the list that cannot be applied; says which."""


@dataclass(frozen=True)
class Mutation:
    """One change: ``old``, found once in ``file``, becomes ``new``; ``tests`` (pytest's arguments) notice ``what``."""

    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def applied(self, text: str) -> str:
        """``text`` with the change.

        Raises:
            ListError: the place is not there, or there more than once.
        """
        if text.count(self.old) != 1 or self.old == self.new:
            raise ListError(
                f"{self.file}: {self.old!r} is there {text.count(self.old)} times, not once: correct {LIST.name}"
            )
        return text.replace(self.old, self.new)


def read(file: Path = LIST) -> list[Mutation]:
    """The list.

    Raises:
        ListError: an entry without one of its keys, or with another.
    """
    found = []
    for number, entry in enumerate(tomllib.loads(file.read_text())["mutation"], 1):
        try:
            found.append(Mutation(**entry | {"tests": tuple(entry["tests"])}))
        except (TypeError, KeyError) as error:
            raise ListError(f"{file.name}, entry {number}: {error}") from None
    return found


def copy(target: Path) -> None:
    """What git knows, as it is in the working tree, uncommitted changes included; what was unpacked beside the
    environment is linked."""
    listed = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True)
    if listed.returncode:
        raise ListError(f"git ls-files fails in {ROOT}: {listed.stderr.decode().strip()}")
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    for environment in ROOT.glob(".venv*"):
        (target / environment.name).symlink_to(environment)


def run_tests(checkout: Path, tests: list[str], first: bool) -> tuple[int, str, float]:
    """pytest's exit code (None of pytest's: 124, past the deadline), what it printed, and seconds."""
    command = [sys.executable, "-m", "pytest", *(["-x"] if first else []), *tests]
    # The copy stands before the installed checkout on the import path, in the ranks that the tests start as well.
    path = os.pathsep.join([str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    begin = time.monotonic()
    try:
        ran = subprocess.run(
            command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=DEADLINE, errors="replace"
        )
    except subprocess.TimeoutExpired as late:
        return 124, str(late), DEADLINE
    return ran.returncode, ran.stdout + ran.stderr, time.monotonic() - begin


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="WORD", help="only changes whose file or description holds it")
    parser.add_argument("--list", action="store_true", help="print the changes and stop")
    options = parser.parse_args()
    try:
        chosen = [m for m in read() if not options.words or any(w in f"{m.file} {m.what}" for w in options.words)]
        if not chosen:
            raise ListError(f"no change of {LIST} holds {' or '.join(options.words)}")
        if options.list:
            print("\n".join(f"{m.file}: {m.what}" for m in chosen))
            return 0
        with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
            return check(chosen, Path(folder))
    except ListError as error:
        print(f"mutation: {error}", file=sys.stderr)
        return 2


def check(chosen: list[Mutation], checkout: Path) -> int:
    """Applies each; prints a line each. See the module for the exit code."""
    copy(checkout)
    changed = {mutation: mutation.applied((checkout / mutation.file).read_text()) for mutation in chosen}
    tests = list(dict.fromkeys(test for mutation in chosen for test in mutation.tests))
    code, output, seconds = run_tests(checkout, tests, first=False)
    if code:
        print(output[-4000:])
        raise ListError(f"the tests fail without any change (pytest's exit code {code}): see above")
    print(f"{len(tests)} selections of tests pass without a change ({seconds:.0f} s)", flush=True)
    missed = 0
    for mutation, text in changed.items():
        file = checkout / mutation.file
        before = file.read_text()
        file.write_text(text)
        code, output, seconds = run_tests(checkout, list(mutation.tests), first=True)
        file.write_text(before)
        verdict = {0: "NOT NOTICED", 1: "noticed"}.get(code)
        if verdict is None:
            print(output[-4000:])
            raise ListError(f"{mutation.file}, {mutation.what}: pytest ends with {code}: see above")
        missed += code == 0
        print(f"{verdict:<12} {seconds:5.0f} s  {mutation.file}: {mutation.what}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} changes were noticed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
