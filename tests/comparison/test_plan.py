"""What a plan may say, and what it is told where it says something else."""

import pytest
import yaml

from dcpo_megatron.comparison.plan import PlanError, load_plan

TRAIN = {"rollout": {"prompts_per_step": 8, "max_response_tokens": 24}, "training": {"minibatch_prompts": 2}}
GOOD = {
    "seeds": [0, 1],
    "methods": {"grpo": None, "dapo": {"objective.overlong_buffer": 4}},
    "task": {},
    "train": TRAIN,
}


@pytest.fixture
def load(tmp_path):
    def write(content, **changes):
        file = tmp_path / "plan.yaml"
        file.write_text(content if isinstance(content, str) else yaml.safe_dump(content | changes))
        return load_plan(file, str(tmp_path / "out"))

    return write


def test_all_methods_share_everything_but_the_objective(load):
    plan = load(GOOD)
    a, b = (plan.recipe(method, 1).model_dump() for method in ("grpo", "dapo"))
    assert a["model"]["path"] == b["model"]["path"] and "seed-1" in a["model"]["path"]
    assert a["data"] == b["data"] and a["training"]["seed"] == b["training"]["seed"] == 1
    assert {key for key in a if a[key] != b[key]} == {"objective", "output"}


def test_a_method_is_a_preset_of_its_name_or_names_one(load):
    plan = load(GOOD, methods={"dcpo-paper": None, "wide": {"objective.preset": "grpo", "objective.eps_high": 0.3}})
    objectives = plan.objectives()
    assert objectives["dcpo-paper"]["bounds"] == "dac"
    assert (objectives["wide"]["bounds"], objectives["wide"]["eps_high"]) == ("fixed", 0.3)


def test_without_a_task_the_model_and_the_files_are_the_plans(load):
    train = TRAIN | {"model": {"path": "/models/a"}, "data": {"files": ["b.jsonl"]}}
    config = load(GOOD, task=None, train=train).recipe("grpo", 0)
    assert (config.model.path, config.data.files) == ("/models/a", ["b.jsonl"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": {"gpro": None}}, "method gpro: .*unknown objective 'gpro'"),
        ({"methods": {"grpo": {"optimizer.lr": 1e-4}}}, "method grpo sets 'optimizer.lr': only objective"),
        ({"methods": {"../x": {"objective.preset": "grpo"}}}, "a name has letters"),
        ({"methods": {}}, "methods: "),
        ({"seeds": [0, 0]}, "must be distinct"),
        ({"seeds": []}, "seeds: "),
        ({"sedes": [0]}, "sedes: extra inputs"),
        ({"task": {"terms": [1, 2]}}, "task: terms is 1 to 2"),
        ({"train": TRAIN | {"model": {"path": "x"}}}, "train.model.path is the comparison's own to set"),
        ({"train": {"training": {"seed": 3}}}, "train.training.seed is the comparison's own"),
        ({"train": {"objective": {"preset": "grpo"}}}, "train.objective.preset is what methods differ in"),
        ({"train": {"optimizer": {"lrr": 1}}}, "unknown key 'optimizer.lrr'"),
        ({"task": None}, "model.path|model: |data"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_reason(load, changes, message):
    with pytest.raises(PlanError, match=message):
        load(GOOD, **changes)


@pytest.mark.parametrize(("text", "message"), [("a: [", "is not YAML"), ("- 1", "must hold sections")])
def test_files_that_are_no_plan(load, text, message):
    with pytest.raises(PlanError, match=message):
        load(text)


def test_a_missing_file(tmp_path):
    with pytest.raises(PlanError, match="cannot be read"):
        load_plan(tmp_path / "none.yaml")


def test_the_study_is_a_plan():
    from pathlib import Path

    plan = load_plan(Path(__file__).resolve().parents[2] / "examples" / "configs" / "compare.yaml")
    assert len(plan.methods) == 7 and len(plan.seeds) >= 5
    config = plan.recipe("grpo", 0)
    # Every prompt comes back at least five times, and rollouts serve several updates.
    assert config.training.steps * config.rollout.prompts_per_step >= 6 * plan.task.train
    assert config.rollout.prompts_per_step >= 4 * config.training.minibatch_prompts
