"""What a person types is understood or refused with the reason, before anything starts."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml

from dcpo_megatron.config.loading import known_keys, load_config, to_yaml
from dcpo_megatron.config.schema import Config, ConfigError
from dcpo_megatron.mcore.hf_config import ModelConfigError
from dcpo_megatron.mcore.platform import find_apex
from dcpo_megatron.objectives import PRESETS, get_preset
from dcpo_megatron.training.checks import check_run

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "configs"
# compare.yaml is a plan of `dcpo compare`, not a recipe: tests/comparison/test_plan.py loads it.
RECIPES = sorted(path for path in EXAMPLES.rglob("*.yaml") if path.name != "compare.yaml")
GIVEN = ("model.path=model", "data.files=[train.jsonl]")


def write(folder, name, text):
    (folder / name).write_text(text)
    return folder / name


def refusal(files=(), overrides=(), given=GIVEN):
    with pytest.raises(ConfigError) as caught:
        load_config(files, [*given, *overrides])
    return str(caught.value)


# -- reading ---------------------------------------------------------------------------------------


def test_later_files_win_key_by_key_and_overrides_win_over_files(tmp_path):
    first = write(tmp_path, "first.yaml", "rollout: {group_size: 4, top_k: 5, temperature: 0.5}\noutput: a\n")
    second = write(tmp_path, "second.yaml", "rollout: {group_size: 6, top_k: 7}\noutput: b\n")
    config = load_config([first, second], [*GIVEN, "rollout.group_size=8"])
    assert (config.rollout.group_size, config.rollout.top_k, config.rollout.temperature) == (8, 7, 0.5)
    assert config.output == "b"
    assert config.rollout.top_p == 1.0


def test_of_two_overrides_of_one_key_the_later_wins():
    assert load_config([], [*GIVEN, "training.steps=3", "training.steps=5"]).training.steps == 5


def test_a_list_is_replaced_not_joined(tmp_path):
    file = write(tmp_path, "c.yaml", "data: {files: [a.jsonl, b.jsonl]}\n")
    assert load_config([file], ["model.path=m", "data.files=[c.jsonl]"]).data.files == ["c.jsonl"]


def test_exponents_without_a_dot_are_numbers_in_files_and_overrides(tmp_path):
    file = write(tmp_path, "c.yaml", "optimizer: {lr: 1e-6, betas: [9e-1, 0.999]}\nobjective: {kl_coef: 1E-3}\n")
    config = load_config([file], GIVEN)
    assert config.optimizer.lr == 1e-6
    assert config.optimizer.betas == (0.9, 0.999)
    assert config.make_objective().kl_coef == 1e-3
    config = load_config([file], [*GIVEN, "optimizer.lr=2e-6", "objective.kl_coef=5e-2", "training.steps=1e2"])
    assert (config.optimizer.lr, config.make_objective().kl_coef, config.training.steps) == (2e-6, 0.05, 100)


def test_override_values_are_yaml():
    config = load_config(
        [], ["model.path=a=b", "data.files=[a.jsonl, b.jsonl]", "data.prompt_key=", "logging.console=false"]
    )
    assert config.model.path == "a=b"
    assert config.data.files == ["a.jsonl", "b.jsonl"]
    assert config.data.prompt_key is None
    assert config.logging.console is False


@pytest.mark.parametrize("word", ["auto", "on", "off"])
def test_yamls_words_on_and_off_reach_transformer_engine_as_words(tmp_path, word):
    file = write(tmp_path, "c.yaml", f"model: {{transformer_engine: {word}}}\n")
    assert load_config([file], GIVEN).model.transformer_engine == word
    assert load_config([], [*GIVEN, f"model.transformer_engine={word}"]).model.transformer_engine == word


def test_an_empty_file_changes_nothing(tmp_path):
    assert load_config([write(tmp_path, "empty.yaml", "# nothing\n")], GIVEN) == load_config([], GIVEN)


def test_the_complete_yaml_reads_back_as_the_same_configuration(tmp_path):
    config = load_config(
        [],
        [
            *GIVEN,
            "optimizer.lr=1e-6",
            "parallel.virtual_pipeline=2",
            "data.system_prompt=\"Solve: 'it'\"",
            "model.transformer_engine=off",
            "objective.preset=grpo",
            "objective.kl_coef=1e-3",
        ],
    )
    file = write(tmp_path, "complete.yaml", to_yaml(config))
    assert load_config([file]) == config
    assert yaml.safe_load(file.read_text())["rollout"]["group_size"] == 16  # defaults are written too


def test_every_key_of_a_complete_configuration_is_known():
    tree = load_config([], GIVEN).model_dump()
    leaves = {f"{name}.{key}" for name, section in tree.items() if isinstance(section, dict) for key in section}
    assert leaves <= set(known_keys())


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "key", "nearest"),
    [
        ("optimizer.lrr=1e-6", "optimizer.lrr", "optimizer.lr"),
        ("rollot.group_size=8", "rollot", "rollout"),
        ("objective.eps_hihg=0.3", "objective.eps_hihg", "objective.eps_high"),
        ("group_size=8", "group_size", "rollout.group_size"),
        ("lr=1e-6", "lr", "optimizer.lr"),
        ("training.group_size=8", "training.group_size", "rollout.group_size"),
        ("output.folder=runs", "output.folder", "output"),
    ],
)
def test_an_unknown_key_is_refused_and_the_nearest_named(override, key, nearest):
    assert refusal(overrides=[override]) == f"unknown key {key!r}: did you mean {nearest!r}?"


def test_an_unknown_key_in_a_file_is_refused_like_one_on_the_command_line(tmp_path):
    file = write(tmp_path, "c.yaml", "optimizer: {lrr: 1.0e-6}\nrollot: {group_size: 8}\n")
    assert refusal([file]).splitlines() == [
        "unknown key 'optimizer.lrr': did you mean 'optimizer.lr'?",
        "unknown key 'rollot': did you mean 'rollout'?",
    ]


def test_an_unknown_key_near_nothing_points_to_the_list_of_keys():
    assert refusal(overrides=["zzz=1"]) == "unknown key 'zzz': see `dcpo train --keys`"


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("rollout.group_size=many", "rollout.group_size='many': input should be a valid integer"),
        ("rollout.group_size=2.5", "rollout.group_size=2.5: input should be a valid integer"),
        ("rollout.group_size=0", "rollout.group_size=0: input should be greater than or equal to 1"),
        ("rollout.top_p=1.5", "rollout.top_p=1.5: input should be less than or equal to 1"),
        ("optimizer.lr=0", "optimizer.lr=0: input should be greater than 0"),
        ("optimizer.betas=[0.9]", "optimizer.betas.1 is missing"),
        ("training.packing=thd", "training.packing='thd': input should be 'packed' or 'padded'"),
        ("model.dtype=float16", "model.dtype='float16': input should be 'float32' or 'bfloat16'"),
        ("data.files=train.jsonl", "data.files='train.jsonl': input should be a valid list"),
        ("logging.console=perhaps", "logging.console='perhaps': input should be a valid boolean"),
        ("model.path.name=x", "model.path={'name': 'x'}: input should be a valid string"),
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_named_with_its_key(override, reason):
    assert refusal(overrides=[override]).startswith(reason)


def test_every_wrong_value_is_reported_at_once():
    lines = refusal(overrides=["rollout.group_size=many", "optimizer.lr=-1"]).splitlines()
    assert [line.split("=")[0] for line in lines] == ["rollout.group_size", "optimizer.lr"]


def test_missing_keys_say_how_to_give_them():
    assert refusal(given=["model.dtype=float32", "data.template=plain"]).splitlines() == [
        "model.path is missing: give it in a file or as model.path=...",
        "data.files is missing: give it in a file or as data.files=...",
    ]


@pytest.mark.parametrize("override", ["rollout.group_size", "=3", ""])
def test_an_override_without_key_or_sign_is_refused(override):
    assert refusal(overrides=[override]) == f"override {override!r} is not of the form key.sub=value"


@pytest.mark.parametrize("text", ["rollout: [1, 2", "a: b: c", "\tx: 1"])
def test_a_file_that_is_not_yaml_is_named_in_one_line(tmp_path, text):
    file = write(tmp_path, "broken.yaml", text)
    message = refusal([file])
    assert message.startswith(f"configuration file {file} is not YAML: ")
    assert "\n" not in message


def test_a_file_of_other_bytes_than_text_is_not_yaml(tmp_path):
    (tmp_path / "model.yaml").write_bytes(b"\x80\xff\x00")
    assert "is not YAML" in refusal([tmp_path / "model.yaml"])


def test_a_file_that_holds_a_list_is_refused(tmp_path):
    file = write(tmp_path, "list.yaml", "- rollout\n- data\n")
    assert refusal([file]) == f"configuration file {file} must hold sections (key: value), not a list"


def test_a_missing_file_is_named(tmp_path):
    missing = tmp_path / "no.yaml"
    assert f"configuration file {missing} does not exist" in refusal([missing])


@pytest.mark.parametrize("value", ["16", "dapo", "", "[a]"])
def test_a_section_that_holds_a_plain_value_is_refused(value):
    assert refusal(overrides=[f"objective={value}"]) == "objective must hold keys of its own, such as objective.preset"


# -- objectives and recipes ------------------------------------------------------------------------


def test_without_a_word_the_objective_is_the_papers():
    assert load_config([], GIVEN).make_objective() == get_preset("dcpo-paper")


def test_fields_of_the_objective_replace_the_presets():
    config = load_config(
        [],
        [*GIVEN, "objective.preset=dapo", "objective.eps_high=0.3", "objective.cap_negative=null",
         "objective.dynamic_sampling=false", "objective.ripo_outer=[0.2, 4.0]"],
    )  # fmt: skip
    assert config.make_objective() == dataclasses.replace(
        get_preset("dapo"), eps_high=0.3, cap_negative=None, dynamic_sampling=False, ripo_outer=(0.2, 4.0)
    )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["objective.preset=dcpo-papr"], "did you mean 'dcpo-paper'?"),
        (["objective.eps_low=wide"], "eps_low"),
        (["objective.aggregation=mean"], "aggregation = 'mean' is not known"),
        (["objective.preset=gspo", "objective.bounds=dac"], "ratio_level = 'sequence' is not possible"),
        (["objective.preset=[grpo]"], "objective: "),
    ],
)
def test_an_impossible_objective_is_refused_when_the_configuration_is_read(overrides, words):
    message = refusal(overrides=overrides)
    assert message.startswith("objective: ")
    assert words in message


def test_an_overlong_penalty_over_the_whole_response_is_refused():
    assert (
        refusal(overrides=["objective.preset=dapo", "rollout.max_response_tokens=512"])
        == "objective.overlong_buffer=512 must be below rollout.max_response_tokens=512: set one of them"
    )
    load_config([], [*GIVEN, "objective.preset=dapo", "rollout.max_response_tokens=513"])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_every_recipe_loads_once_model_and_data_are_given(recipe):
    config = load_config([recipe], GIVEN)
    assert isinstance(config, Config)
    assert load_config([recipe], [*GIVEN, "output=elsewhere"]).output == "elsewhere"


@pytest.mark.parametrize("file", sorted((EXAMPLES / "presets").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_preset_file_laid_over_a_recipe_sets_the_named_objective_alone(file):
    recipe = EXAMPLES / "qwen2.5-math-7b.yaml"
    config = load_config([recipe, file], GIVEN)
    assert config.make_objective() == get_preset(file.stem)
    assert config.model_copy(update={"objective": None}) == load_config([recipe], GIVEN).model_copy(
        update={"objective": None}
    )


def test_there_are_preset_files_and_each_names_a_preset():
    names = {file.stem for file in (EXAMPLES / "presets").glob("*.yaml")}
    assert {"dcpo-paper", "grpo"} <= names <= set(PRESETS)


# -- the configuration against the model and the ranks ---------------------------------------------


@pytest.fixture
def config_of(model_folder):
    """A run that fits one rank: 24 positions needed of 64. Overrides change it."""

    def make(*overrides):
        return load_config(
            [],
            [
                f"model.path={model_folder}",
                "data.files=[train.jsonl]",
                "data.max_prompt_tokens=8",
                "rollout.max_response_tokens=16",
                "rollout.prompts_per_step=8",
                "rollout.group_size=4",
                "training.minibatch_prompts=4",
                "training.micro_batch_tokens=64",
                "training.platform=cpu",
                *overrides,
            ],
        )

    return make


def problems(config, world_size=1):
    with pytest.raises(ConfigError) as caught:
        check_run(config, world_size)
    return str(caught.value).splitlines()


def test_a_run_that_fits_gives_its_shape_layout_and_data_ranks(config_of):
    run = check_run(config_of("parallel.tensor=2", "parallel.sequence_parallel=true"), 4)
    assert (run.shape.heads, run.shape.kv_heads, run.shape.max_positions) == (4, 2, 64)
    assert (run.layout.tensor, run.data_parallel, run.platform.name) == (2, 2, "cpu")
    assert run.objective == get_preset("dcpo-paper")


@pytest.mark.parametrize(
    ("overrides", "world_size", "sentences"),
    [
        (
            ["rollout.prompts_per_step=9"],
            1,
            [
                "global batch not divisible: rollout.prompts_per_step=9 is not a multiple of "
                "training.minibatch_prompts=4"
            ],
        ),
        (
            [],
            3,
            [
                "global batch not divisible: a minibatch of 4 prompts x 4 responses = 16 cannot be dealt evenly to 3 "
                "data-parallel ranks"
            ],
        ),
        (
            ["parallel.tensor=3"],
            3,
            [
                "parallel.tensor=3 does not divide the model's 4 attention heads",
                "parallel.tensor=3 does not divide the model's 2 key-value heads",
                "parallel.tensor=3 does not divide the feed-forward width 64",
            ],
        ),
        (["parallel.tensor=4"], 4, ["parallel.tensor=4 does not divide the model's 2 key-value heads"]),
        (
            ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.overlap_p2p=false"],
            2,
            [
                "parallel.virtual_pipeline with parallel.pipeline=2 gives silently wrong gradients in Megatron-Core "
                "without overlapped communication: set parallel.overlap_p2p=true"
            ],
        ),
        (["parallel.virtual_pipeline=2"], 1, ["parallel.virtual_pipeline=2 needs parallel.pipeline of at least 2"]),
        (
            ["parallel.pipeline=3"],
            3,
            ["parallel.pipeline x virtual_pipeline = 3 does not divide the model's 4 layers"],
        ),
        (
            ["parallel.pipeline=2", "parallel.first_stage_layers=4"],
            2,
            [
                "parallel.first_stage_layers=4 of the model's 4 layers leave 0 for the other 1 pipeline stages: "
                "they need at least one each, and equally many"
            ],
        ),
        (
            ["parallel.sequence_parallel=true"],
            1,
            ["parallel.sequence_parallel=true needs parallel.tensor of at least 2"],
        ),
        (["parallel.expert=2"], 2, ["parallel.expert=2, but qwen2 has no experts"]),
        (
            ["parallel.tensor=2", "parallel.context=2"],
            6,
            [
                "world size 6 is not a multiple of tensor x pipeline x context = 2 x 1 x 2 = 4: "
                "start a multiple of 4 ranks"
            ],
        ),
        (
            ["rollout.max_response_tokens=60", "training.micro_batch_tokens=128"],
            1,
            ["data.max_prompt_tokens + rollout.max_response_tokens = 68 is beyond the model's 64 positions"],
        ),
        (
            ["training.micro_batch_tokens=23"],
            1,
            [
                "training.micro_batch_tokens=23 cannot hold one longest response (data.max_prompt_tokens + "
                "rollout.max_response_tokens = 24 tokens): raise it to at least that"
            ],
        ),
        (
            # 22 tokens are padded to the zigzag's multiple of 4.
            ["parallel.context=2", "data.max_prompt_tokens=6", "training.micro_batch_tokens=22"],
            2,
            [
                "training.micro_batch_tokens=22 cannot hold one longest response (data.max_prompt_tokens + "
                "rollout.max_response_tokens = 24 tokens): raise it to at least that"
            ],
        ),
        (
            ["objective.preset=grpo", "rollout.group_size=1"],
            1,
            [
                "rollout.group_size=1 gives every response the advantage 0 with objective.advantage=group: "
                "use at least 2"
            ],
        ),
        (
            ["model.transformer_engine=on"],
            1,
            [
                "model.transformer_engine=on, but it does not import here: install it, or set "
                "model.transformer_engine=auto"
            ],
        ),
        (
            ["model.grouped_experts=on", "model.gradient_accumulation_fusion=on", "parallel.overlap_param_gather=on"],
            1,
            [
                "model.gradient_accumulation_fusion=on, but neither Transformer Engine's layers nor Apex's "
                "fused_weight_gradient_mlp_cuda can be had: set model.gradient_accumulation_fusion=auto",
                "model.grouped_experts=on, but the model has no experts: set model.grouped_experts=auto",
                "parallel.overlap_param_gather=on, but parallel.overlap_grad_reduce is not on: set "
                "parallel.overlap_param_gather=auto",
            ],
        ),
    ],
)  # fmt: skip
def test_a_run_that_cannot_work_is_refused_with_its_reason(config_of, overrides, world_size, sentences):
    assert problems(config_of(*overrides), world_size) == sentences


def test_shared_gpus_without_servers_are_refused(config_of):
    (line,) = problems(config_of("publish.colocated=true"))
    assert "rollout.engine=embedded has no servers" in line and "publish.colocated=false" in line


def test_the_edges_of_the_limits_are_allowed(config_of):
    check_run(config_of("training.micro_batch_tokens=24", "objective.overlong_buffer=15"), 1)
    check_run(config_of("rollout.max_response_tokens=56"), 1)
    check_run(config_of("parallel.pipeline=2", "parallel.virtual_pipeline=2"), 2)
    check_run(config_of("parallel.overlap_grad_reduce=on", "parallel.overlap_param_gather=on"), 1)


def test_one_response_a_prompt_is_allowed_where_the_advantage_remembers_earlier_visits(config_of):
    check_run(config_of("rollout.group_size=1", "objective.preset=sas-only"), 1)


def test_all_problems_are_reported_at_once(config_of):
    found = problems(
        config_of(
            "parallel.tensor=3",
            "model.transformer_engine=on",
            "rollout.max_response_tokens=100",
        ),
        4,
    )
    assert [
        next((words for words in ("world size", "attention heads", "key-value heads", "feed-forward",
                                  "transformer_engine=on", "positions", "micro_batch_tokens") if words in line), line)
        for line in found
    ] == ["world size", "attention heads", "key-value heads", "feed-forward", "transformer_engine=on",
          "positions", "micro_batch_tokens"]  # fmt: skip


def test_a_package_that_only_shares_apexs_name_is_refused(config_of, tmp_path, monkeypatch):
    (tmp_path / "site" / "apex").mkdir(parents=True)
    (tmp_path / "site" / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert find_apex() == "impostor"
    (line,) = problems(config_of())
    assert "not NVIDIA Apex (it has no amp_C)" in line and "pip uninstall apex" in line
    (tmp_path / "site" / "amp_C.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path / "site")  # forgets what the finder saw
    assert find_apex() == "nvidia"
    check_run(config_of(), 1)


def test_wandb_that_is_not_installed_is_refused(config_of, monkeypatch):
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else find_spec(name, *rest)
    )
    (line,) = problems(config_of("logging.wandb=true"))
    assert "wandb is not installed" in line


def test_tokens_beyond_the_vocabulary_end_no_response(config_of):
    assert check_run(config_of("rollout.stop_token_ids=[0, 99]"), 1).config.rollout.stop_token_ids == [0, 99]
    (line,) = problems(config_of("rollout.stop_token_ids=[99, 100]"))
    assert line == "rollout.stop_token_ids: the model's vocabulary has 100 tokens, and none is 100"


@pytest.mark.parametrize("key", ["output", "data.prompt_key", "servers.file", "checkpoint.allow_changed"])
def test_a_text_that_cannot_be_written_is_refused(config_of, key):
    config = config_of()
    section, _, name = key.rpartition(".")
    value = ["a", "caf\udce9"] if key == "checkpoint.allow_changed" else "caf\udce9"
    setattr(getattr(config, section) if section else config, name, value)
    (line,) = [line for line in problems(config) if "Unicode" in line]
    assert line.startswith(f"{key}=") and "caf\\udce9" in line


def test_a_gpu_that_is_not_there_is_refused(config_of, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (line,) = problems(config_of("training.platform=cuda"))
    assert "torch sees no CUDA device" in line


def refused_model(config):
    with pytest.raises(ModelConfigError) as caught:
        check_run(config, 1)
    return str(caught.value)


def test_a_model_folder_that_does_not_exist_is_refused(config_of, tmp_path):
    assert (
        refused_model(config_of(f"model.path={tmp_path / 'no'}"))
        == f"model folder {tmp_path / 'no'} does not exist: give a local Hugging Face folder with config.json"
    )


def test_a_folder_without_config_json_is_refused(config_of, tmp_path):
    (tmp_path / "bare").mkdir()
    assert "has no config.json" in refused_model(config_of(f"model.path={tmp_path / 'bare'}"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"model_type": "gpt2"}', "model_type 'gpt2', which is not supported: the known ones are llama, mistral"),
        ("{}", "model_type None, which is not supported"),
        ('{"model_type": "qwen2"', "is not a JSON object"),
        ("[]", "is not a JSON object"),
    ],
)
def test_a_config_json_of_no_known_model_is_refused(config_of, model_folder, text, words):
    (model_folder / "config.json").write_text(text)
    assert words in refused_model(config_of())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": 0}, "config.json has num_attention_heads=0: each must be a whole number above 0"),
        ({"hidden_size": None, "num_hidden_layers": "x"}, 'has hidden_size=null, num_hidden_layers="x": each must'),
        ({"vocab_size": -1, "num_key_value_heads": True}, "has vocab_size=-1, num_key_value_heads=true: each must"),
        (
            {"num_attention_heads": 7, "num_key_value_heads": 7},
            "hidden_size=32 is no multiple of num_attention_heads=7",
        ),
        (
            {"model_type": "llama", "num_attention_heads": 7},
            "'validate_architecture': The hidden size (32) is not a multiple of the number of attention heads (7)",
        ),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is no multiple of num_key_value_heads=3"),
        (
            {"rms_norm_eps": "small"},
            "cannot be read as a qwen2 configuration: Validation error for field 'rms_norm_eps'",
        ),
    ],
)
def test_a_config_json_with_sizes_that_cannot_be_is_refused_in_one_sentence(config_of, model_folder, changes, words):
    file = model_folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    message = refused_model(config_of())
    assert words in message
    assert "\n" not in message
