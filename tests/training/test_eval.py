"""dcpo eval: the numbers against their definitions, real files with copies, a kill in the middle, refusals."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dcpo_megatron.cli import eval as command
from dcpo_megatron.evaluation.estimates import Answers, average, estimate, measures, pass_at
from dcpo_megatron.evaluation.store import EvaluationError, ResponseStore


@pytest.mark.parametrize(("samples", "right", "m"), [(6, 0, 2), (6, 1, 3), (6, 2, 2), (6, 5, 2), (6, 6, 4), (1, 1, 1)])
def test_pass_at_m_is_the_share_of_all_choices_of_m_samples_with_a_right_one(samples, right, m):
    outcomes = [True] * right + [False] * (samples - right)
    choices = list(itertools.combinations(outcomes, m))
    assert pass_at(right, samples, m) == pytest.approx(sum(any(choice) for choice in choices) / len(choices))


def test_measures_hold_to_their_definitions():
    problems = [
        Answers(True, (True, False, False, False)),
        Answers(False, (True, True, True, True)),
        Answers(False, (False,) * 4),
    ]
    found = {name: sum(values) / 3 for name, values in measures(problems).items()}
    assert found == pytest.approx({"avg@1": 1 / 3, "avg@4": 5 / 12, "pass@2": 0.5, "pass@4": 2 / 3})
    with pytest.raises(ValueError, match="different numbers"):
        measures([*problems, Answers(True, (True,))])


def test_intervals_are_those_of_problems_and_the_average_weighs_sets_alike():
    half = [0.0, 1.0] * 50
    one = estimate(half, "a")
    assert one == estimate(half, "a") and one.value == 0.5
    # 1.96 sqrt(p (1 - p) / n)
    assert 0.5 - one.low == pytest.approx(0.098, abs=0.012) and one.high - 0.5 == pytest.approx(0.098, abs=0.012)
    both = average([half, [1.0] * 7], ["a", "b"])
    assert both.value == 0.75 and both.high - both.low == pytest.approx((one.high - one.low) / 2, abs=0.012)
    assert estimate([1.0], "a").low is None


@pytest.fixture(scope="module")
def byte_model(tmp_path_factory) -> Path:
    """A Qwen2 with random weights that reads any text, byte by byte."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    vocab = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | {
        "<end>": 256
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("bytes")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    config = Qwen2Config(
        vocab_size=264, max_position_embeddings=8192, eos_token_id=256, tie_word_embeddings=True, **sizes
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def responses(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "responses.jsonl").read_text(encoding="utf-8").splitlines()]


def test_files_with_thirty_two_copies_of_a_problem_are_the_problems_they_are(real_data, byte_model, tmp_path):
    files = [
        str(real_data / name)
        for name in ("aime_2024.parquet", "amc2023.parquet", "math500.parquet", "gsm8k_test.jsonl")
    ]
    words = ["--samples", "2", "--max-response-tokens", "2", "--template", "qwen-math", "--quiet", "--device", "cpu"]
    assert command.main([str(byte_model), *files[:2], "--output", str(tmp_path / "all"), *words]) == 0
    found = json.loads((tmp_path / "all" / "result.json").read_text())["sets"]
    assert {name: (s["problems"], s["rows"], s["copies"]) for name, s in found.items()} == {
        "aime_2024": (30, 960, 930),
        "amc2023": (40, 1280, 1240),
    }
    rows = responses(tmp_path / "all")
    assert len(rows) == len({(r["set"], r["id"], r["sample"]) for r in rows}) == 70 * 3
    assert sum(row["sample"] == -1 for row in rows) == 70
    assert found["aime_2024"]["sampled_tokens"] == {"mean": 2, "median": 2, "p95": 2, "longest": 2, "truncated": 1.0}
    # The other two formats.
    assert command.main([str(byte_model), *files[2:], "--limit", "3", "--output", str(tmp_path / "some"), *words]) == 0
    assert [row["ground_truth"] for row in responses(tmp_path / "some") if row["sample"] == -1][3:] == [
        "18",
        "3",
        "70000",
    ]


@pytest.fixture
def problems(tmp_path) -> Path:
    file = tmp_path / "sums.jsonl"
    rows = [{"id": str(n), "prompt": f"{n}+{n}=", "answer": str(2 * n)} for n in range(10, 20)]
    copies = [{**row, "id": "copy of " + row["id"]} for row in rows[:3]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows + copies))
    return file


def words(model, problems, output, **more) -> list[str]:
    settings = {"samples": 3, "max-response-tokens": 6, "template": "plain", "batch-size": 4, "device": "cpu"} | more
    return [
        str(model),
        str(problems),
        "--output",
        str(output),
        *[w for k, v in settings.items() for w in (f"--{k}", str(v))],
    ]


def test_killed_and_started_again_it_ends_as_if_it_had_not_been(byte_model, problems, tmp_path, capsys):
    assert command.main(words(byte_model, problems, tmp_path / "whole")) == 0
    whole = responses(tmp_path / "whole")
    assert len(whole) == 10 * 4  # the copies under other ids are copies
    process = subprocess.Popen(
        [sys.executable, "-m", "dcpo_megatron.cli", "eval", *words(byte_model, problems, tmp_path / "cut")]
    )
    kept = tmp_path / "cut" / "responses.jsonl"
    deadline = time.monotonic() + 120
    while (
        not (kept.is_file() and kept.stat().st_size > 1500) and time.monotonic() < deadline and process.poll() is None
    ):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait(20)
    before = kept.read_bytes()
    assert 0 < before.count(b"\n") < len(whole)
    with kept.open("ab") as file:
        file.write(b'{"set": "sums", "id"')
    assert command.main(words(byte_model, problems, tmp_path / "cut")) == 0
    assert "finished before" in capsys.readouterr().err
    assert kept.read_bytes().startswith(before) and responses(tmp_path / "cut") == whole
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "cut")]
    assert results[0]["sets"] == results[1]["sets"]
    # More samples go on from what is there.
    assert command.main(words(byte_model, problems, tmp_path / "cut", samples=4)) == 0
    assert len(responses(tmp_path / "cut")) == 10 * 5


def test_tokens_may_be_named_that_end_a_response(byte_model, problems, tmp_path, capsys):
    arguments = [*words(byte_model, problems, tmp_path / "out", samples=1), "--stop-token-ids", *map(str, range(263))]
    assert command.main(arguments) == 0
    assert {(row["tokens"], row["finish_reason"]) for row in responses(tmp_path / "out")} == {(1, "stop")}
    said = capsys.readouterr().err
    assert "first prompt, sums/10, 6 tokens:\n  | 10+10=\n" in said and "<end> (256)" in said
    assert command.main(words(byte_model, problems, tmp_path / "out", samples=1)) == 2
    assert "another stop_token_ids" in capsys.readouterr().err
    assert command.main([*arguments, "264"]) == 2
    assert "--stop-token-ids 264" in capsys.readouterr().err


def test_a_deadline_stops_between_batches_and_says_so(byte_model, problems, tmp_path, capsys):
    assert command.main(words(byte_model, problems, tmp_path / "out", deadline=0)) == 75
    assert "the same command goes on" in capsys.readouterr().err
    assert command.main(words(byte_model, problems, tmp_path / "out")) == 0


def test_other_settings_another_model_or_a_second_process_are_refused(
    byte_model, demo_start, problems, tmp_path, capsys
):
    out = tmp_path / "out"
    assert command.main(words(byte_model, problems, out, samples=1)) == 0

    def refusal(*arguments, **more) -> str:
        capsys.readouterr()
        assert command.main(words(*arguments, **more)) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("dcpo: error: ")
        return error

    assert "another temperature (temperature: 1.0 then, 0.5 now)" in refusal(byte_model, problems, out, temperature=0.5)
    assert "another model" in refusal(demo_start, problems, out)
    problems.write_text(problems.read_text().replace('"answer": "20"', '"answer": "21"'))
    assert "another files" in refusal(byte_model, problems, out)
    store = ResponseStore(tmp_path / "held", {})
    with pytest.raises(EvaluationError, match="another process"):
        ResponseStore(tmp_path / "held", {})
    store.close()
    (tmp_path / "file").write_text("")
    assert "cannot be used" in refusal(byte_model, problems, tmp_path / "file")
    assert "holds something else" in refusal(byte_model, problems, byte_model)
    assert "does not exist" in refusal(tmp_path / "nowhere", problems, tmp_path / "new")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / ".metadata").touch()
    assert "dcpo convert megatron-to-hf" in refusal(tmp_path / "checkpoint", problems, tmp_path / "new")
    assert "the model computes 8192" in refusal(byte_model, problems, tmp_path / "new", **{"max-response-tokens": 9000})
    assert "127.0.0.1:9" in refusal(byte_model, problems, tmp_path / "new", servers="http://127.0.0.1:9")
    assert not (tmp_path / "new").exists()


def test_the_model_is_known_by_its_content(byte_model, tmp_path):
    from dcpo_megatron.evaluation.offline import model_fingerprint

    copy = tmp_path / "copy"
    shutil.copytree(byte_model, copy)
    assert model_fingerprint(copy) == model_fingerprint(byte_model)
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    assert model_fingerprint(copy) != model_fingerprint(byte_model)


@pytest.mark.sglang
def test_servers_answer_as_the_model_in_this_process_does(demo_start, sglang_server, problems, tmp_path):
    settings = {"samples": 2, "max-response-tokens": 5}
    assert command.main(words(demo_start, problems, tmp_path / "here", **settings)) == 0
    assert (
        command.main([*words(demo_start, problems, tmp_path / "served", **settings), "--servers", sglang_server]) == 0
    )
    here, served = responses(tmp_path / "here"), responses(tmp_path / "served")
    assert [row["id"] for row in served] == [row["id"] for row in here]
    greedy = [row for row in here if row["sample"] == -1]
    assert len(greedy) == 10 and [row["response"] for row in served if row["sample"] == -1] == [
        row["response"] for row in greedy
    ]


@pytest.mark.sglang
def test_servers_that_hold_other_weights_than_the_folders_are_refused(
    demo_start, sglang_server, problems, tmp_path, capsys
):
    import torch
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(demo_start, other)
    tensors = load_file(other / "model.safetensors")
    torch.manual_seed(1)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name] + torch.randn_like(tensors[name])
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    settings = {"samples": 1, "max-response-tokens": 2}
    assert command.main([*words(other, problems, tmp_path / "out", **settings), "--servers", sglang_server]) == 2
    said = capsys.readouterr().err
    assert (
        "of servers started from" in said and f"differ from those of {other}" in said and f"dcpo serve {other}" in said
    )
    assert not (tmp_path / "out").exists()
    # A copy of the weights in other files is the same model: it is computed, and said.
    copy = tmp_path / "copy"
    shutil.copytree(demo_start, copy)
    (copy / "model.safetensors").rename(copy / "weights.safetensors")
    index = dict.fromkeys(tensors, "weights.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert command.main([*words(copy, problems, tmp_path / "out", **settings), "--servers", sglang_server]) == 0
    assert "taken for the same weights" in capsys.readouterr().err
