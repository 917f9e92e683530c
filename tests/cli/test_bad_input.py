"""What a user can give wrong: one clear sentence on standard error, exit code 2, on every rank, within seconds."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dcpo_megatron.cli import train
from dcpo_megatron.files import write_jsonl
from dcpo_megatron.toys.arithmetic import make_arithmetic

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def good(demo_start, tmp_path) -> dict[str, str]:
    write_jsonl(make_arithmetic(8, 0, 9), tmp_path / "train.jsonl")
    return {
        "model.path": str(demo_start),
        "model.dtype": "float32",
        "data.files": f"[{tmp_path / 'train.jsonl'}]",
        "data.template": "plain",
        "data.max_prompt_tokens": "8",
        "rollout.prompts_per_step": "4",
        "rollout.group_size": "2",
        "rollout.max_response_tokens": "6",
        "training.minibatch_prompts": "4",
        "training.micro_batch_tokens": "64",
        "training.steps": "1",
        "training.platform": "cpu",
        "output": str(tmp_path / "run"),
    }


def arguments(settings: dict[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in settings.items()]


def refused(settings: dict[str, str], capsys) -> str:
    """Runs in this process; returns the message. The refusal comes before any process group exists."""
    code = train.main(arguments(settings))
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert not torch.distributed.is_initialized()
    lines = captured.err.strip().splitlines()
    assert lines and all(line.startswith("dcpo: error: ") for line in lines), captured.err
    return captured.err


def test_a_missing_data_file(good, capsys):
    message = refused(good | {"data.files": "[nowhere/train.jsonl]"}, capsys)
    assert "nowhere/train.jsonl" in message and message.count("\n") == 1


def test_a_broken_parquet(good, capsys, tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 this is no parquet file")
    message = refused(good | {"data.files": f"[{tmp_path / 'broken.parquet'}]"}, capsys)
    assert "broken.parquet" in message and message.count("\n") == 1


def test_a_row_that_cannot_be_read_or_written(good, capsys, tmp_path):
    row = '{"id": "1", "prompt": "1+1=", "answer": "2"}\n'
    file = tmp_path / "odd.jsonl"
    file.write_text(row + row.replace('"2"', "9" * 5000))
    message = refused(good | {"data.files": f"[{file}]"}, capsys)
    assert f"line 2 of {file} cannot be read" in message and message.count("\n") == 1
    file.write_text(row.replace('"1"', '"cut \\ud835"'))
    message = refused(good | {"data.files": f"[{file}]"}, capsys)
    assert "left out 1: 1 broken text" in message and message.count("\n") == 1


def test_a_name_of_other_bytes(good, capsys, tmp_path):
    message = refused(good | {"output": str(tmp_path / "caf\udce9")}, capsys)
    assert "output=" in message and "Unicode" in message and message.count("\n") == 1
    assert not (tmp_path / "caf\udce9").exists()


def test_an_absent_prompt_column(good, capsys):
    message = refused(good | {"data.prompt_key": "qestion"}, capsys)
    assert "qestion" in message and "prompt" in message and message.count("\n") == 1


def test_a_duplicate_id(good, capsys, tmp_path):
    rows = [{"id": "1", "prompt": "1+1=", "answer": "2"}, {"id": "1", "prompt": "1+2=", "answer": "3"}]
    write_jsonl(rows, tmp_path / "twice.jsonl")
    message = refused(good | {"data.files": f"[{tmp_path / 'twice.jsonl'}]"}, capsys)
    assert "same id" in message and message.count("\n") == 1


def test_a_misspelt_key_names_the_nearest(good, capsys):
    message = refused(good | {"optimizer.learning_rte": "1e-6"}, capsys)
    assert "optimizer.learning_rte" in message
    assert "did you mean 'rollout.group_size'" in refused(good | {"rollout.group_sise": "8"}, capsys)


def test_a_model_of_an_unknown_architecture(good, capsys, tmp_path):
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    message = refused(good | {"model.path": str(tmp_path / "gpt2")}, capsys)
    assert "gpt2" in message and "qwen2" in message and message.count("\n") == 1


def test_a_model_folder_that_does_not_exist(good, capsys):
    assert "no-such-folder" in refused(good | {"model.path": "no-such-folder"}, capsys)


def test_more_prompts_a_step_than_there_are(good, capsys):
    message = refused(good | {"rollout.prompts_per_step": "16"}, capsys)
    assert "rollout.prompts_per_step=16" in message and "8 usable prompts" in message


def test_a_reward_function_that_is_not_there(good, capsys):
    message = refused(good | {"reward.function": "no_such_package:reward"}, capsys)
    assert "no_such_package" in message and message.count("\n") == 1


def test_weights_of_another_architecture_end_every_rank_within_seconds(good, tmp_path):
    """config.json says Qwen2, the weights are a Qwen3's: seen only when they are read, by two ranks under torchrun."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path / "mixed"
    shutil.copytree(good["model.path"], folder)
    shape = json.loads((folder / "config.json").read_text())
    wrong = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=shape["vocab_size"],
            hidden_size=shape["hidden_size"],
            intermediate_size=shape["intermediate_size"],
            num_hidden_layers=shape["num_hidden_layers"],
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            tie_word_embeddings=True,
        )
    )
    wrong.save_pretrained(tmp_path / "qwen3")
    shutil.copy(tmp_path / "qwen3" / "model.safetensors", folder / "model.safetensors")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "examples/pretrain_dcpo.sh"]
    started = time.monotonic()
    done = subprocess.run(
        [*command, *arguments(good | {"model.path": str(folder)})],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert "dcpo: error:" in done.stderr and "another architecture" in done.stderr
    assert "Error" not in done.stderr.split("dcpo: error:")[0]  # no traceback of ours before the sentence
    assert time.monotonic() - started < 100  # most of it imports on a busy machine; far below any collective's deadline


def test_the_exit_code_travels_through_our_own_launcher(good):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        "-m",
        "dcpo_megatron.cli",
        "train",
        "--ranks",
        "2",
        *arguments(good | {"model.path": "nowhere"}),
    ]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.count("dcpo: error:") == 1 and "Traceback" not in done.stderr


def test_options_and_overrides_may_come_in_any_order(tmp_path):
    (tmp_path / "a.yaml").write_text("training: {steps: 3}\n")
    args = train.parser().parse_intermixed_args(["x=1", "--config", str(tmp_path / "a.yaml"), "y=2"])
    assert args.overrides == ["x=1", "y=2"] and len(args.config) == 1


def test_a_rank_that_alone_meets_an_error_says_so_by_name(good, capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setattr(train.time, "sleep", lambda seconds: None)
    assert "rank 5: " in refused(good | {"model.path": "no-such-folder"}, capsys)


def test_an_output_that_is_a_file(good, capsys, tmp_path):
    (tmp_path / "taken").write_text("")
    message = refused(good | {"output": str(tmp_path / "taken")}, capsys)
    assert "output=" in message and "taken" in message and message.count("\n") == 1


def test_a_model_folder_without_a_tokenizer(good, capsys, tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(good["model.path"], folder, ignore=shutil.ignore_patterns("tokenizer*", "vocab*", "merges*"))
    message = refused(good | {"model.path": str(folder)}, capsys)
    assert "no tokenizer" in message and message.count("\n") == 1


def test_a_broken_generation_config(good, capsys, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(good["model.path"], folder)
    (folder / "generation_config.json").write_text("{")
    assert "generation_config.json" in refused(good | {"model.path": str(folder)}, capsys)


def test_a_missing_evaluation_file_is_named_as_such(good, capsys):
    assert "evaluation.files" in refused(good | {"evaluation.files": "[nowhere.jsonl]"}, capsys)


@pytest.mark.parametrize(
    "setting",
    [
        "optimizer.betas=[0.9,1.5]",
        "rollout.temperature=.inf",
        "reward.correct_at=.nan",
        "data.files=[]",
        "data.format=xx",
        "rollout.stop_token_ids=[-1]",
        "rollout.stop_token_ids=7",
        "rollout.stop_token_ids=[1000]",
    ],
)
def test_a_value_that_cannot_be_meant(good, capsys, setting):
    key, _, value = setting.partition("=")
    assert key in refused(good | {key: value}, capsys)


def test_options_are_not_guessed_from_their_beginning(capsys):
    # A shortened --ranks would be handed on to the ranks, which would start ranks.
    with pytest.raises(SystemExit):
        train.main(["--rank", "2"])
    assert "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--node-rank", "2", "--master-addr", "h1"], ["--node-rank", "1"]])
def test_several_hosts_need_their_numbers_and_where_they_meet(capsys, words):
    assert train.main(["--ranks", "2", "--nodes", "2", *words]) == 2
    assert "--nodes 2 needs --master-addr, and --node-rank" in capsys.readouterr().err
    assert train.main(["--nodes", "2"]) == 2
    assert "--nodes 2 belongs to --ranks" in capsys.readouterr().err


def test_ranks_do_not_start_ranks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert train.main(["--ranks", "2"]) == 2
    assert "torchrun" in capsys.readouterr().err


def test_the_demo_replaces_a_demos_folder_only(capsys, tmp_path):
    from dcpo_megatron.cli import demo

    (tmp_path / "start").mkdir()
    assert demo.main(["--output", str(tmp_path)]) == 2
    assert (tmp_path / "start").is_dir() and "no demo's folder" in capsys.readouterr().err
    assert demo.main(["--output", str(tmp_path / "new"), "--ranks", "0"]) == 2
    assert demo.main(["--output", str(tmp_path / "new"), "output=elsewhere"]) == 2
    assert not (tmp_path / "new").exists()


def test_terminating_the_launcher_ends_its_ranks(tmp_path):
    """The ranks write their process ids and sleep; nobody is left after a SIGTERM to the command that started them."""
    import signal

    script = tmp_path / "sleeper.py"
    script.write_text(
        f"import os, time, pathlib\npathlib.Path({str(tmp_path)!r},"
        " f'pid-{os.environ[\"RANK\"]}').write_text(str(os.getpid()))\ntime.sleep(600)\n"
    )
    code = f"import sys; from dcpo_megatron.launch.local import run_ranks; sys.exit(run_ranks(2, [{str(script)!r}]))"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, "-c", code], env=env, cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 90
    while not all((tmp_path / f"pid-{rank}").is_file() and (tmp_path / f"pid-{rank}").read_text() for rank in (0, 1)):
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.2)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(60) != 0
    for rank in (0, 1):
        pid = int((tmp_path / f"pid-{rank}").read_text())
        while Path(f"/proc/{pid}").exists() and "zombie" not in Path(f"/proc/{pid}/status").read_text():
            assert time.monotonic() < deadline + 60
            time.sleep(0.2)
