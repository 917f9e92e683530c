"""A run starts from a Hugging Face folder or from a Megatron checkpoint, and says at once where that cannot be."""

import json
import sys

import pytest

from dcpo_megatron.config.loading import load_config
from dcpo_megatron.config.schema import ConfigError
from dcpo_megatron.mcore.layout import ParallelLayout
from dcpo_megatron.training.checks import check_run
from dcpo_megatron.verification.cases import make_model
from dcpo_megatron.weights.conversion_jobs import run_job
from dcpo_megatron.weights.hf_folder import CheckpointError
from dcpo_megatron.weights.to_megatron import HfToMegatron
from tests.training.test_run_end_to_end import check_run_folder, folder, launch, settings  # noqa: F401


@pytest.fixture(scope="module")
def megatron_start(demo_start, tmp_path_factory):
    target = tmp_path_factory.mktemp("megatron") / "start"
    run_job(HfToMegatron(str(demo_start), ParallelLayout(tensor=2)), target)
    return target


def rewards(run) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["reward"] for row in rows if "reward" in row]


def test_a_megatron_checkpoint_starts_the_same_run_as_its_hugging_face_folder(folder, demo_start, megatron_start):  # noqa: F811
    found = []
    for name, start, more in (
        ("hf", demo_start, []),
        ("megatron", megatron_start, []),
        ("both", demo_start, [f"model.weights={megatron_start}"]),
    ):
        command = [sys.executable, "-m", "dcpo_megatron.cli", "train", *settings(folder, start, *more)]
        done = launch([word if not word.startswith("output=") else f"output={folder / name}" for word in command])
        assert done.returncode == 0, done.stdout + done.stderr
        check_run_folder(folder / name, demo_start)
        found.append(rewards(folder / name))
    assert found[0] == found[1] == found[2]


def config(path, *more):
    return load_config([], [f"model.path={path}", "data.files=[x.jsonl]", "training.platform=cpu", *more])


def test_weights_of_another_model_are_refused_before_the_start(tmp_path, demo_start):
    make_model("qwen2", str(tmp_path / "other"))
    run_job(HfToMegatron(str(tmp_path / "other"), ParallelLayout()), tmp_path / "other-megatron")
    with pytest.raises(CheckpointError, match=r"4 layers, config.json says num_hidden_layers 2"):
        check_run(config(demo_start, f"model.weights={tmp_path / 'other-megatron'}"), 1)


def test_weights_that_are_not_there_are_refused(tmp_path, demo_start):
    with pytest.raises(ConfigError, match=r"model.weights=.*does not exist"):
        check_run(config(demo_start, f"model.weights={tmp_path / 'no'}"), 1)


def test_a_checkpoint_without_a_configuration_asks_for_one(tmp_path, demo_start, megatron_start):
    import shutil

    shutil.copytree(megatron_start, tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare" / "huggingface")
    with pytest.raises(CheckpointError, match=r"carries no huggingface/config.json"):
        check_run(config(tmp_path / "bare"), 1)
