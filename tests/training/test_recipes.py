"""Recipes have names."""

from pathlib import Path

import pytest

from dcpo_megatron.config.loading import load_config
from dcpo_megatron.config.recipes import FOLDER, find_recipe
from dcpo_megatron.config.schema import ConfigError

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "configs"
GIVEN = ["model.path=model", "data.files=[train.jsonl]"]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_yaml_of_the_package_has_a_name_and_is_an_example():
    files = sorted(FOLDER.rglob("*.yaml"))
    assert len(files) > 10
    for file in files:
        name = file.relative_to(FOLDER)
        assert find_recipe(name.with_suffix("")) == find_recipe(file.stem) == find_recipe(name) == file
        assert (EXAMPLES / name).samefile(file)


def test_names_and_paths_lie_over_one_another():
    config = load_config(["demo", "presets/grpo"], GIVEN)
    assert config == load_config([EXAMPLES / "demo.yaml", EXAMPLES / "presets" / "grpo.yaml"], GIVEN)
    assert config == load_config(["demo", "grpo"], GIVEN)


def test_a_file_that_exists_wins_and_a_folder_does_not(empty_folder):
    (empty_folder / "demo").mkdir()
    assert load_config(["demo"], GIVEN).training.steps == 160
    (empty_folder / "demo").rmdir()
    (empty_folder / "demo").write_text("training: {steps: 3}")
    assert load_config(["demo"], GIVEN).training.steps == 3


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("dmeo", "demo"),
        ("presets/grop", "presets/grpo"),
        ("drgrpo", "presets/dr-grpo"),
        ("examples/configs/demo.yml", "demo"),
    ],
)
def test_an_unknown_name_names_the_nearest_and_all(name, nearest):
    with pytest.raises(ConfigError) as caught:
        load_config([name], GIVEN)
    assert f"configuration file {name} does not exist, and no recipe has that name: did you mean '{nearest}'?" in str(
        caught.value
    )
    assert all(word in str(caught.value) for word in ("demo", "qwen2.5-math-7b", "presets/dcpo-paper"))
