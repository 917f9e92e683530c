"""``dcpo convert`` as a user meets it: round trips, what inspect says, and every refusal as one clear sentence with
exit code 2."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dcpo_megatron.cli.main import main
from dcpo_megatron.verification.cases import make_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Hugging Face folders of two families with a tokenizer's file beside, and a Megatron checkpoint of the first."""
    folder = tmp_path_factory.mktemp("convert")
    for kind in ("qwen2", "qwen3_moe"):
        make_model(kind, str(folder / kind))
        (folder / kind / "tokenizer.json").write_text("{}")
    assert convert("hf-to-megatron", folder / "qwen2", folder / "megatron", "--tp", 2, "--quiet") == 0
    return folder


@pytest.fixture
def hf(folders, tmp_path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(folders / "qwen2", tmp_path / "hf"))


@pytest.fixture
def megatron(folders, tmp_path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(folders / "megatron", tmp_path / "megatron"))


def convert(*words) -> int:
    return main(["convert", *map(str, words)])


def refused(capsys, *words) -> str:
    """Runs the command; returns its message."""
    capsys.readouterr()
    assert convert(*words) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert lines and all(line.startswith("dcpo: error: ") for line in lines), captured.err
    if words[0] in ("hf-to-megatron", "megatron-to-hf", "reshard"):
        destination = Path(words[2])
        assert not destination.exists() or "not empty" in captured.err or "source and destination" in captured.err
    return captured.err


def same_weights(one: Path, other: Path) -> None:
    def read(folder):
        found = {}
        for file in folder.glob("*.safetensors"):
            found |= load_file(file)
        return found

    first, second = read(one), read(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first)


# -- round trips -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "first", "then"),
    [
        ("qwen2", ["--tp", 2, "--pp", 2, "--vpp", 2], ["--pp", 2, "--first-stage-layers", 1]),
        ("qwen3_moe", ["--tp", 2, "--ep", 2, "--etp", 1], ["--pp", 4, "--ep", 4]),
    ],
)
def test_weights_come_back_bit_for_bit_through_two_layouts_with_worker_processes(
    folders, tmp_path, capsys, kind, first, then
):
    source = folders / kind
    assert convert("hf-to-megatron", source, tmp_path / "one", *first) == 0
    assert convert("reshard", tmp_path / "one", tmp_path / "two", *then) == 0
    assert convert("megatron-to-hf", tmp_path / "two", tmp_path / "back", "--shard-size", "60kB", "--workers", 2) == 0
    same_weights(source, tmp_path / "back")
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    printed = capsys.readouterr().out
    assert f"next: dcpo convert verify {tmp_path / 'one'} --against {source}" in printed
    assert f"next: dcpo convert verify {tmp_path / 'two'} --against {tmp_path / 'back'}" in printed
    assert " files, " in printed and " in " in printed and "/s)" in printed


def test_megatron_lms_own_folder_names_a_release_and_is_read_back_from_its_root(folders, tmp_path):
    assert convert("hf-to-megatron", folders / "qwen2", tmp_path / "root", "--megatron-lm", "--quiet") == 0
    assert sorted(file.name for file in (tmp_path / "root").iterdir()) == [
        "latest_checkpointed_iteration.txt",
        "release",
    ]
    assert (tmp_path / "root" / "latest_checkpointed_iteration.txt").read_text() == "release"
    assert (tmp_path / "root" / "release" / "metadata.json").is_file()
    assert convert("reshard", tmp_path / "root", tmp_path / "again", "--tp", 2, "--megatron-lm", "--quiet") == 0
    assert convert("megatron-to-hf", tmp_path / "again", tmp_path / "back", "--quiet") == 0
    same_weights(folders / "qwen2", tmp_path / "back")


def test_a_checkpoint_of_an_iteration_keeps_it_in_megatron_lms_folder(megatron, tmp_path):
    torch.save({"iteration": 42, "checkpoint_version": 3.0}, megatron / "common.pt")
    assert convert("reshard", megatron, tmp_path / "root", "--megatron-lm", "--quiet") == 0
    assert (tmp_path / "root" / "latest_checkpointed_iteration.txt").read_text() == "42"
    assert (tmp_path / "root" / "iter_0000042" / "metadata.json").is_file()


def test_a_checkpoint_without_configuration_takes_one_from_elsewhere(megatron, folders, tmp_path, capsys):
    shutil.rmtree(megatron / "huggingface")
    assert "--config-from" in refused(capsys, "megatron-to-hf", megatron, tmp_path / "back")
    words = ["--config-from", folders / "qwen2", "--quiet"]
    assert convert("megatron-to-hf", megatron, tmp_path / "back", *words) == 0
    same_weights(folders / "qwen2", tmp_path / "back")
    assert convert("reshard", megatron, tmp_path / "other", *words) == 0
    assert convert("megatron-to-hf", tmp_path / "other", tmp_path / "again", "--quiet") == 0
    same_weights(folders / "qwen2", tmp_path / "again")


def test_quiet_prints_nothing(folders, tmp_path, capsys):
    capsys.readouterr()
    assert convert("hf-to-megatron", folders / "qwen2", tmp_path / "out", "--quiet") == 0
    assert capsys.readouterr() == ("", "")


def test_an_interrupted_command_says_so_and_the_same_command_goes_on(tmp_path):
    make_model("qwen2", str(tmp_path / "deep"), num_hidden_layers=300)
    words = [
        sys.executable,
        "-m",
        "dcpo_megatron.cli",
        "convert",
        "hf-to-megatron",
        tmp_path / "deep",
        tmp_path / "out",
    ]
    for _ in range(5):
        # Tests started in the background of a shell have it ignored, and so would their children.
        heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        running = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
        deadline = time.monotonic() + 120
        # Stopped while we look: on a busy machine it would have done all parts before this process sees the first.
        while time.monotonic() < deadline and running.poll() is None:
            running.send_signal(signal.SIGSTOP)
            if (tmp_path / "out.incomplete" / "0.done.json").exists():
                break
            running.send_signal(signal.SIGCONT)
            time.sleep(0.005)
        running.send_signal(signal.SIGINT)
        running.send_signal(signal.SIGCONT)
        _, said = running.communicate(timeout=60)
        if running.returncode != 0:
            break
        shutil.rmtree(tmp_path / "out")  # it was at its end before this process had its turn
    assert running.returncode == 130, said
    assert said.strip() == "dcpo: interrupted: the same command goes on where this one stopped"
    assert not (tmp_path / "out").exists()
    again = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    done = int(again.stdout.split(" of 301 parts were done before")[0].split()[-1])
    assert 1 <= done <= 300
    assert convert("megatron-to-hf", tmp_path / "out", tmp_path / "back", "--quiet") == 0
    same_weights(tmp_path / "deep", tmp_path / "back")


# -- inspect and verify ----------------------------------------------------------------------------


def inspected(capsys, *words) -> dict:
    capsys.readouterr()
    assert convert("inspect", *words, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_inspect_tells_what_a_hugging_face_folder_holds(folders, capsys):
    found = inspected(capsys, folders / "qwen2")
    weights = load_file(folders / "qwen2" / "model.safetensors")
    assert (found["kind"], found["family"], found["layers"], found["tied"]) == ("huggingface", "qwen2", 4, False)
    assert found["parameters"] == sum(tensor.numel() for tensor in weights.values())
    assert found["numbers"] == {"float32": found["parameters"]}
    assert found["bytes"] == (folders / "qwen2" / "model.safetensors").stat().st_size
    assert "tokenizer.json" in found["companions"] and found["problem"] is None


def test_inspect_tells_how_a_megatron_checkpoint_is_cut(folders, tmp_path, capsys):
    found = inspected(capsys, folders / "megatron")
    assert (found["kind"], found["family"], found["layers"], found["dialect"]) == ("megatron", "qwen2", 4, "stacked")
    assert (found["vocabulary"], found["vocabulary_padded"]) == (101, 256)
    assert (found["tensor_parallel"], found["optimizer"], found["iteration"]) == (2, None, 0)
    assert found["companions"] == ["config.json", "generation_config.json", "tokenizer.json"]
    assert found["parameters"] == inspected(capsys, folders / "qwen2")["parameters"]
    assert convert("hf-to-megatron", folders / "qwen3_moe", tmp_path / "moe", "--tp", 2, "--etp", 1, "--quiet") == 0
    moe = inspected(capsys, tmp_path / "moe")
    assert (moe["experts"], moe["tensor_parallel"], moe["expert_tensor_parallel"]) == (4, 2, 1)


def test_inspect_says_what_it_cannot_know_without_a_configuration(megatron, folders, capsys):
    shutil.rmtree(megatron / "huggingface")
    found = inspected(capsys, megatron)
    assert (found["family"], found["vocabulary"], found["layers"], found["hidden"]) == (None, None, 4, 32)
    assert convert("inspect", megatron) == 0
    assert "--config-from" in capsys.readouterr().out
    assert inspected(capsys, megatron, "--config-from", folders / "qwen2")["family"] == "qwen2"


def test_inspect_in_words_names_the_problem_of_a_folder(hf, capsys):
    weights = load_file(hf / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, hf / "model.safetensors")
    capsys.readouterr()
    assert convert("inspect", hf) == 0
    printed = capsys.readouterr().out
    assert "Hugging Face folder" in printed and "problem" in printed and "model.norm.weight" in printed


def verified(*words) -> subprocess.CompletedProcess:
    # In a process of its own: it initialises Megatron-Core.
    return subprocess.run(
        [sys.executable, "-m", "dcpo_megatron.cli", "convert", "verify", *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_verify_passes_the_converted_checkpoint_by_its_own_export(folders):
    done = verified(folders / "megatron", "--tokens", 9)
    assert done.returncode == 0 and done.stdout.startswith("same: "), done.stderr


def test_verify_takes_a_checkpoint_without_a_configuration_with_that_of_a_folder(megatron, folders):
    shutil.rmtree(megatron / "huggingface")
    done = verified(megatron, "--config-from", folders / "qwen2", "--tokens", 5)
    assert done.returncode == 0 and done.stdout.startswith("same: "), done.stderr


def test_verify_fails_on_another_models_weights(folders, tmp_path):
    make_model("qwen2", str(tmp_path / "other"), seed=1)
    done = verified(folders / "megatron", "--against", tmp_path / "other", "--token-ids", "1,2,3")
    assert done.returncode == 1 and done.stdout.startswith("DIFFERENT: "), done.stderr


def test_verify_refuses_tokens_that_the_vocabulary_does_not_have(folders, capsys):
    message = refused(capsys, "verify", folders / "megatron", "--against", folders / "qwen2", "--token-ids", "1,101")
    assert "from 0 to 100" in message


# -- refusals --------------------------------------------------------------------------------------


def test_an_unknown_architecture_lists_the_known(hf, tmp_path, capsys):
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    for words in (("hf-to-megatron", hf, tmp_path / "out"), ("inspect", hf)):
        message = refused(capsys, *words)
        assert "'gpt2'" in message and "qwen2" in message and "llama" in message and message.count("\n") == 1


@pytest.mark.parametrize("change", ["missing", "extra", "wrong shape", "two dtypes"])
def test_weights_that_are_not_what_the_configuration_says(hf, tmp_path, capsys, change):
    weights = load_file(hf / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if change == "missing":
        weights.pop(name)
    elif change == "extra":
        name = "model.layers.1.mlp.side_proj.weight"
        weights[name] = torch.ones(3)
    elif change == "wrong shape":
        weights[name] = weights[name][:, :-1].contiguous()
    else:
        weights[name] = weights[name].bfloat16()
    save_file(weights, hf / "model.safetensors")
    message = refused(capsys, "hf-to-megatron", hf, tmp_path / "out")
    assert name in message and str(hf) in message and message.count("\n") == 1


def test_a_tensor_that_lies_in_a_file_but_not_in_the_index(hf, tmp_path, capsys):
    weights = load_file(hf / "model.safetensors")
    index = {"weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors")}
    (hf / "model.safetensors").unlink()
    save_file(weights | {"model.secret.weight": torch.ones(2)}, hf / "model-00001-of-00001.safetensors")
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refused(capsys, "hf-to-megatron", hf, tmp_path / "out")
    assert "has tensor 'model.secret.weight'" in message


def test_layers_of_different_dtypes(hf, tmp_path, capsys):
    weights = load_file(hf / "model.safetensors")
    name = "model.layers.2.input_layernorm.weight"
    save_file(weights | {name: weights[name].bfloat16()}, hf / "model.safetensors")
    message = refused(capsys, "hf-to-megatron", hf, tmp_path / "out")
    assert name in message and "one dtype" in message


def test_norms_of_another_dtype_than_the_rest_keep_it(hf, tmp_path):
    weights = load_file(hf / "model.safetensors")
    weights = {name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in weights.items()}
    save_file(weights, hf / "model.safetensors")
    assert convert("hf-to-megatron", hf, tmp_path / "out", "--tp", 2, "--quiet") == 0
    assert convert("megatron-to-hf", tmp_path / "out", tmp_path / "back", "--quiet") == 0
    same_weights(hf, tmp_path / "back")


def test_another_copy_of_the_weights_beside_them_is_left_alone(hf, tmp_path):
    save_file({"tok_embeddings.weight": torch.ones(3)}, hf / "consolidated.safetensors")
    assert convert("hf-to-megatron", hf, tmp_path / "out", "--quiet") == 0


@pytest.mark.parametrize("keep", [0, 20, 0.5, 0.999])
def test_a_truncated_safetensors_file(hf, tmp_path, capsys, keep):
    file = hf / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data)) if keep < 1 else keep])
    message = refused(capsys, "hf-to-megatron", hf, tmp_path / "out")
    assert f"{file} is not a complete safetensors file" in message and "copy it again" in message


def test_a_damaged_safetensors_index(hf, tmp_path, capsys):
    (hf / "model.safetensors").rename(hf / "model-00001-of-00001.safetensors")
    (hf / "model.safetensors.index.json").write_text('{"weight_map": ')
    assert "is not a safetensors index" in refused(capsys, "hf-to-megatron", hf, tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "flags", "words"),
    [
        ("qwen2", ["--tp", 4], "--tp 4 does not divide the model's 2 key-value heads"),
        ("qwen2", ["--pp", 3], "--pp x --vpp = 3 does not divide the model's 4 layers"),
        ("qwen2", ["--pp", 2, "--vpp", 4], "--pp x --vpp = 8 does not divide the model's 4 layers"),
        ("qwen2", ["--vpp", 2], "--vpp 2 needs --pp of at least 2"),
        ("qwen2", ["--first-stage-layers", 1], "--first-stage-layers 1 needs --pp of at least 2"),
        (
            "qwen2",
            ["--pp", 2, "--first-stage-layers", 3, "--last-stage-layers", 3],
            "--first-stage-layers 3 and --last-stage-layers 3 must add up to the model's 4 layers",
        ),
        ("qwen2", ["--ep", 2], "--ep 2, but qwen2 has no experts"),
        ("qwen3_moe", ["--ep", 3], "--ep 3 does not divide the model's 4 experts"),
        ("qwen3_moe", ["--etp", 5], "--etp 5 does not divide the experts' width"),
    ],
)
def test_a_layout_that_the_model_cannot_have_is_refused_in_the_words_of_the_command_line(
    folders, tmp_path, capsys, kind, flags, words
):
    message = refused(capsys, "hf-to-megatron", folders / kind, tmp_path / "out", *flags)
    assert words in message and "parallel." not in message
    if kind == "qwen2":
        assert words in refused(capsys, "reshard", folders / "megatron", tmp_path / "out", *flags)


def test_a_destination_that_holds_something_is_left_alone(folders, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    for command, source in (("hf-to-megatron", "qwen2"), ("megatron-to-hf", "megatron"), ("reshard", "megatron")):
        message = refused(capsys, command, folders / source, tmp_path / "out")
        assert f"{tmp_path / 'out'} is not empty" in message
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_source_and_destination_are_the_same(megatron, hf, capsys):
    before = sorted(megatron.rglob("*"))
    assert "source and destination" in refused(capsys, "reshard", megatron, f"{megatron}/../{megatron.name}/")
    assert "source and destination" in refused(capsys, "hf-to-megatron", hf, hf)
    assert sorted(megatron.rglob("*")) == before


def test_a_source_of_the_other_kind_names_the_right_command(folders, tmp_path, capsys):
    message = refused(capsys, "hf-to-megatron", folders / "megatron", tmp_path / "out")
    assert "is a Megatron checkpoint" in message and "reshard" in message
    for command in ("megatron-to-hf", "reshard"):
        message = refused(capsys, command, folders / "qwen2", tmp_path / "out")
        assert "is a Hugging Face folder" in message and "hf-to-megatron" in message


def test_a_source_of_neither_kind(tmp_path, megatron, capsys):
    (tmp_path / "empty").mkdir()
    (megatron / "metadata.json").unlink()
    for command in ("hf-to-megatron", "megatron-to-hf", "reshard"):
        assert "does not exist" in refused(capsys, command, tmp_path / "nowhere", tmp_path / "out")
        assert "is neither a Hugging Face folder" in refused(capsys, command, tmp_path / "empty", tmp_path / "out")
        assert "interrupted save" in refused(capsys, command, megatron, tmp_path / "out")
    for command in ("inspect", "verify"):
        assert "is neither a Hugging Face folder" in refused(capsys, command, tmp_path / "empty")


@pytest.mark.parametrize("damage", ["half", "empty", "pickle of a function", "noise"])
def test_a_damaged_index_of_a_checkpoint(megatron, tmp_path, capsys, damage):
    index = megatron / ".metadata"
    data = index.read_bytes()
    index.write_bytes(
        {
            "half": data[: len(data) // 2],
            "empty": b"",
            "pickle of a function": b"cos\nsystem\n(S'touch " + str(tmp_path / "run").encode() + b"'\ntR.",
            "noise": bytes(range(256)) * 4,
        }[damage]
    )
    for words in (("megatron-to-hf", megatron, tmp_path / "out"), ("inspect", megatron)):
        message = refused(capsys, *words)
        assert f"{index} cannot be read" in message and "copy the checkpoint again" in message
    assert not (tmp_path / "run").exists()


def test_a_missing_or_short_file_of_records(megatron, tmp_path, capsys):
    file = megatron / "__2_0.distcp"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    for command in ("megatron-to-hf", "reshard"):
        assert f"{file} has {len(data) // 2} bytes" in refused(capsys, command, megatron, tmp_path / "out")
    file.unlink()
    for command in ("megatron-to-hf", "reshard"):
        assert f"{file} is not there" in refused(capsys, command, megatron, tmp_path / "out")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_record_that_was_overwritten_is_found_when_it_is_read(megatron, tmp_path, capsys, workers):
    file = megatron / "__1_0.distcp"
    file.write_bytes(b"\0" * file.stat().st_size)
    message = refused(capsys, "megatron-to-hf", megatron, tmp_path / "out", "--workers", workers, "--quiet")
    assert str(file) in message and "cannot be read" in message


def test_a_checkpoint_of_another_size_than_its_configuration(megatron, tmp_path, capsys):
    config = json.loads((megatron / "huggingface" / "config.json").read_text())
    for key, value in {"num_hidden_layers": 5, "hidden_size": 64, "vocab_size": 1000}.items():
        (megatron / "huggingface" / "config.json").write_text(json.dumps(config | {key: value, "layer_types": None}))
        assert "do not belong together" in refused(capsys, "megatron-to-hf", megatron, tmp_path / f"out-{key}")


def test_a_checkpoint_of_another_format(megatron, tmp_path, capsys):
    (megatron / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    assert "--ckpt-format torch_dist" in refused(capsys, "reshard", megatron, tmp_path / "out")


def test_a_tracker_that_names_a_folder_which_is_not_there(megatron, tmp_path, capsys):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "latest_checkpointed_iteration.txt").write_text("500")
    assert "iter_0000500" in refused(capsys, "megatron-to-hf", tmp_path / "root", tmp_path / "out")


def test_a_parent_of_the_destination_that_is_a_file(folders, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    message = refused(capsys, "hf-to-megatron", folders / "qwen2", tmp_path / "file" / "out")
    assert str(tmp_path / "file") in message


@pytest.mark.parametrize("words", [["--tp", "0"], ["--workers", "x"], ["--pp", "-2"], ["--tpp", "2"]])
def test_an_option_that_cannot_be(folders, tmp_path, capsys, words):
    with pytest.raises(SystemExit) as ended:
        convert("hf-to-megatron", folders / "qwen2", tmp_path / "out", *words)
    assert ended.value.code == 2 and words[0] in capsys.readouterr().err


@pytest.mark.parametrize(("text", "count"), [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("2GiB", 2**31), ("1000", 1000)])
def test_sizes_are_read_as_people_write_them(text, count):
    from dcpo_megatron.cli.convert import _bytes

    assert _bytes(text) == count
