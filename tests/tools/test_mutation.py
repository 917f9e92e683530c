"""The list of changes that tests must notice fits the code, and the command tells a change that is noticed from one
that is not."""

import importlib.util
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "tools" / "mutation.py"


@pytest.fixture(scope="module")
def tool():
    specification = importlib.util.spec_from_file_location("mutation_tool", FILE)
    module = sys.modules["mutation_tool"] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_every_change_of_the_list_can_be_applied_and_names_tests_there_are(tool):
    for mutation in tool.read():
        before = (tool.ROOT / mutation.file).read_text()
        compile(mutation.applied(before), mutation.file, "exec")
        for test in mutation.tests:
            file, _, name = test.partition("::")
            assert f"def {name}" in (tool.ROOT / file).read_text(), test


@pytest.mark.parametrize("new, code, verdict", [("a - b", 0, "1 of 1"), ("b + a", 1, "0 of 1")])
def test_a_change_is_noticed_or_not(tool, tmp_path, monkeypatch, capfd, new, code, verdict):
    root, copy = tmp_path / "root", tmp_path / "copy"
    root.mkdir()
    copy.mkdir()
    (root / "sums.py").write_text("def add(a, b):\n    return a + b\n")
    (root / "test_sums.py").write_text("from sums import add\n\n\ndef test_add():\n    assert add(2, 3) == 5\n")
    monkeypatch.setattr(tool, "ROOT", root)
    monkeypatch.setattr(
        tool, "copy", lambda target: [(target / f.name).write_bytes(f.read_bytes()) for f in root.iterdir()]
    )
    mutation = tool.Mutation("a sum", "sums.py", "a + b", new, ("test_sums.py",))
    assert tool.check([mutation], copy) == code
    assert verdict in capfd.readouterr().out
    assert (copy / "sums.py").read_text() == (root / "sums.py").read_text()


def test_an_entry_that_no_longer_fits_and_tests_that_fail_anyway_are_said(tool):
    entry = tool.Mutation("gone", "dcpo_megatron/__init__.py", "no such line", "", ())
    with pytest.raises(tool.ListError, match=r"there 0 times, not once: correct mutations\.toml"):
        entry.applied("some text")
