"""The wheel is whole: what `dcpo` needs is in it, and nothing of a checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """The wheel of a copy of the checkout (a build leaves its traces where it is made), unpacked."""
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(
        ROOT / "dcpo_megatron", source / "dcpo_megatron", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
    )
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = (source / "dist").glob("*.whl")
    folder = tmp_path_factory.mktemp("wheel")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def test_every_file_of_the_package_is_in_the_wheel(unpacked):
    def files(root: Path) -> set[str]:
        found = (file.relative_to(root) for file in (root / "dcpo_megatron").rglob("*") if file.is_file())
        return {str(file) for file in found if "__pycache__" not in file.parts}

    assert files(unpacked) == files(ROOT)
    assert {"dcpo_megatron/py.typed", "dcpo_megatron/config/recipes/demo.yaml"} <= files(unpacked)


def test_recipes_are_found_by_name_in_an_empty_folder(unpacked, demo_start, tmp_path):
    code = (
        "import sys; from dcpo_megatron.cli import main; print(main.__file__); sys.exit(main.main(sys.argv[1:]))",
        *("train", "--check", "--config", "demo", "--config", "presets/grpo"),
        *(f"model.path={demo_start}", "data.files=[train.jsonl]"),
    )
    (tmp_path / "train.jsonl").write_text('{"id": "1", "prompt": "1+1=", "answer": "2"}\n')
    environment = os.environ | {"PYTHONPATH": str(unpacked)}
    done = subprocess.run([sys.executable, "-c", *code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(unpacked)) and "the configuration fits" in done.stdout
