"""The check of requirements fails on what does not fit, and not on an index that does not answer."""

import importlib.util
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[2] / "tools" / "check_requirements.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("check_requirements", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("arguments", "resolves", "word"),
    [
        (("--no-index", "pytest"), True, ""),
        (("--no-index", "--find-links", "/nowhere", "pytest==0.0.1"), False,
         "No matching distribution found for pytest==0.0.1"),
        (("--index-url", "https://127.0.0.1:9/simple", "no-such-package"), None, ""),
    ],
    ids=["fits", "does not fit", "no index"],
)  # fmt: skip
def test_a_dry_run_tells_three_things(tool, monkeypatch, arguments, resolves, word):
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    found, reason = tool.dry_run(Path(sys.prefix), arguments)
    assert found is resolves and word in "\n".join(reason)


def test_this_python_is_found_and_one_that_nobody_has_is_not(tool):
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert tool.find_python(version) and tool.find_python("3.2") is None


def test_the_profiles_are_the_files_there_are(tool):
    folder = FILE.parents[1] / "requirements"
    used = " ".join(word for words in tool.PROFILES.values() for word in words)
    included = " ".join(file.read_text() for file in folder.glob("*.txt"))
    for file in folder.glob("*.txt"):
        if file.name == "pretrained.txt":  # put beside an environment with --no-deps: nothing is resolved
            continue
        assert f"requirements/{file.name}" in used or f"-r {file.name}" in included, file.name
