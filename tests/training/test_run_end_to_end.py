"""Whole runs through the command line, on two real ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dcpo_megatron.files import write_jsonl
from dcpo_megatron.toys.arithmetic import make_arithmetic

ROOT = Path(__file__).resolve().parents[2]


def launch(command: list[str], timeout: float = 240, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    env.pop("RANK", None)
    env.pop("WORLD_SIZE", None)
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)


def settings(folder: Path, start: Path, *more: str) -> list[str]:
    return [
        f"model.path={start}", "model.dtype=float32", f"data.files=[{folder / 'train.jsonl'}]", "data.template=plain",
        "data.max_prompt_tokens=8", f"evaluation.files=[{folder / 'held_out.jsonl'}]", "evaluation.samples=2",
        "rollout.prompts_per_step=4", "rollout.group_size=4", "rollout.max_response_tokens=6",
        "training.minibatch_prompts=2",
        "training.micro_batch_tokens=64", "training.steps=2", "training.platform=cpu",
        "reward.function=tests.training.rewards:digits",
        "reward.correct_at=0.5", f"output={folder / 'run'}", *more,
    ]  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> Path:
    write_jsonl(make_arithmetic(16, 0, 9), tmp_path / "train.jsonl")
    write_jsonl(make_arithmetic(4, 0, 9, split="held_out"), tmp_path / "held_out.jsonl")
    return tmp_path


def check_run_folder(run: Path, start: Path) -> dict:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    summary = json.loads((run / "summary.json").read_text())
    for key in (
        "accuracy_before", "accuracy_after", "greedy_before", "greedy_after", "steps", "train_seconds",
        "response_utilization_ratio", "token_clipping_ratio", "seed", "preset",
    ):  # fmt: skip
        assert key in summary, key
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps if "reward" in row] == [1, 2]
    assert (run / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert list((run / "tensorboard").iterdir())
    model = AutoModelForCausalLM.from_pretrained(run / "model", local_files_only=True)
    assert model.dtype == torch.float32
    before = AutoModelForCausalLM.from_pretrained(start, local_files_only=True)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters()))
    assert len(AutoTokenizer.from_pretrained(run / "model", local_files_only=True)) == 15
    return summary


def test_bash_starts_the_job(folder, demo_start):
    done = launch(
        ["bash", "examples/pretrain_dcpo.sh", *settings(folder, demo_start, f"rollout.stop_token_ids={[*range(15)]}")],
        PYTHON=sys.executable,
        NPROC_PER_NODE="2",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert check_run_folder(folder / "run", demo_start)["ranks"] == 2
    assert "step    2/2" in done.stdout
    # Every token of the vocabulary was said to end a response, and did, in training and evaluation.
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {(row["response_length"], row["truncated"]) for row in rows if "reward" in row} == {(1.0, 0.0)}
    assert {row["eval_response_length"] for row in rows if "eval_accuracy" in row} == {1.0}
    assert "first prompt, train/" in done.stdout and done.stdout.count("a response ends with") == 1


def test_torchrun_starts_the_same_job(folder, demo_start):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "examples/pretrain_dcpo.sh"]
    done = launch([*torchrun, *settings(folder, demo_start, "objective.preset=dapo", "objective.overlong_buffer=2")])
    assert done.returncode == 0, done.stdout + done.stderr
    assert check_run_folder(folder / "run", demo_start)["preset"] == "dapo"


def test_two_nodes_meet_by_torchruns_rendezvous(folder, demo_start):
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    node = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "job", "examples/pretrain_dcpo.sh",
        *settings(folder, demo_start, "parallel.pipeline=2", "objective.preset=grpo", "objective.kl_coef=0.01"),
    ]  # fmt: skip
    nodes = [
        subprocess.Popen(node, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in nodes]
    finally:
        for process in nodes:
            process.kill()
    assert [process.returncode for process in nodes] == [0, 0], "\n".join(outputs)
    assert check_run_folder(folder / "run", demo_start)["ranks"] == 2


def test_real_files_go_through_the_whole_job_without_an_edit(real_data, tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from tests.data.conftest import CHAT_TEMPLATE, make_tokenizer

    start = tmp_path / "start"
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    torch.manual_seed(0)
    Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=512,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    ).save_pretrained(start)
    tokenizer.save_pretrained(start)
    files = [real_data / "gsm8k_train.jsonl", real_data / "math500.parquet"]
    done = launch(
        [
            sys.executable,
            "-m",
            "dcpo_megatron.cli",
            "train",
            f"model.path={start}",
            "model.dtype=float32",
            f"data.files=[{','.join(map(str, files))}]",
            "data.max_prompt_tokens=1024",
            "data.on_bad_row=skip",
            f"evaluation.files=[{real_data / 'amc2023.parquet'}]",
            "evaluation.limit=4",
            "evaluation.samples=1",
            "rollout.prompts_per_step=8",
            "rollout.group_size=2",
            "rollout.max_response_tokens=16",
            "training.minibatch_prompts=4",
            "training.micro_batch_tokens=4096",
            "training.steps=2",
            "training.platform=cpu",
            f"output={tmp_path / 'run'}",
        ]
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "7,9" in done.stdout and "from 7,973 rows of 2 files" in done.stdout  # counted aloud
    assert "  | <|im_start|>user\n" in done.stdout and "a response ends with <|im_end|> (258)\n" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["reward"] for row in rows if "reward" in row] == [-1.0, -1.0]
