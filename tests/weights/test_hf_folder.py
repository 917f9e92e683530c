"""A Hugging Face folder is read exactly, refused with one sentence, and written whole or not at all."""

import json

import pytest
import torch
from safetensors.torch import save_file

from dcpo_megatron.weights.hf_folder import INDEX, CheckpointError, SafetensorsFolder
from dcpo_megatron.weights.hf_writing import write_hf_folder

TENSORS = {
    "model.embed_tokens.weight": torch.arange(40, dtype=torch.float32).reshape(10, 4),
    "model.layers.0.mlp.down_proj.weight": torch.arange(40, 80, dtype=torch.bfloat16).reshape(4, 10),
    "model.norm.weight": torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float16),
    "lm_head.weight": -torch.arange(40, dtype=torch.float32).reshape(10, 4),
}


@pytest.fixture
def source(tmp_path):
    """A model folder with a configuration, a tokenizer, weights in several formats, and a folder."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    (folder / "tokenizer.json").write_text("{}")
    save_file({"old.weight": torch.zeros(2)}, folder / "model.safetensors")
    for name in ("pytorch_model.bin", "tf_model.h5", INDEX, "pytorch_model.bin.index.json"):
        (folder / name).write_text("{}")
    (folder / "original").mkdir()
    return folder


def read_all(folder):
    found = SafetensorsFolder(folder)
    return {name: found.read(name) for name in found.names()}


def assert_tensors(folder, expected=TENSORS):
    found = read_all(folder)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def refusal(function, *arguments):
    with pytest.raises(CheckpointError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


# -- round trips -----------------------------------------------------------------------------------


# 160 + 80 + 8 + 160 bytes.
@pytest.mark.parametrize(("shard_bytes", "shards"), [(10_000, 1), (408, 1), (407, 2), (168, 3), (1, 4)])
def test_tensors_come_back_bit_for_bit_from_any_number_of_shards(tmp_path, source, shard_bytes, shards):
    written = write_hf_folder(tmp_path / "out", TENSORS.items(), source, shard_bytes=shard_bytes)
    assert written == tmp_path / "out"
    assert_tensors(written)
    files = sorted(file.name for file in written.glob("*.safetensors"))
    if shards == 1:
        assert files == ["model.safetensors"] and not (written / INDEX).exists()
    else:
        assert files == [f"model-{n:05d}-of-{shards:05d}.safetensors" for n in range(1, shards + 1)]
        index = json.loads((written / INDEX).read_text())
        assert index["metadata"]["total_size"] == 408
        assert index["weight_map"].keys() == TENSORS.keys()


def test_no_shard_exceeds_the_limit_while_it_holds_more_than_one_tensor(tmp_path, source):
    tensors = {f"t{n}": torch.zeros(n) for n in (5, 30, 3, 3, 3, 40, 1)}
    write_hf_folder(tmp_path / "out", tensors.items(), source, shard_bytes=60)
    weight_map = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    for file in set(weight_map.values()):
        members = [name for name, home in weight_map.items() if home == file]
        assert len(members) == 1 or sum(4 * tensors[name].numel() for name in members) <= 60


def test_everything_but_weights_is_copied(tmp_path, source):
    write_hf_folder(tmp_path / "out", TENSORS.items(), source)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "config.json",
        "tokenizer.json",
        "model.safetensors",
    }
    assert (tmp_path / "out" / "config.json").read_text() == '{"model_type": "qwen2"}'


def test_tensors_are_cast_where_a_dtype_is_asked_for(tmp_path, source):
    write_hf_folder(tmp_path / "out", TENSORS.items(), source, dtype=torch.bfloat16)
    assert_tensors(tmp_path / "out", {name: tensor.bfloat16() for name, tensor in TENSORS.items()})


def test_views_and_shared_tensors_are_written_as_their_values(tmp_path, source):
    weight = torch.arange(12.0).reshape(3, 4)
    tensors = {"a": weight, "b": weight, "transposed": weight.t(), "half": weight[:, ::2]}
    write_hf_folder(tmp_path / "out", tensors.items(), source)
    assert_tensors(tmp_path / "out", tensors)


def test_a_tensor_reused_by_the_iterator_is_written_as_it_was_when_it_came(tmp_path, source):
    def one_buffer():
        buffer = torch.zeros(3)
        for number in (1.0, 2.0):
            yield f"t{number:.0f}", buffer.fill_(number)

    write_hf_folder(tmp_path / "out", one_buffer(), source)
    assert_tensors(tmp_path / "out", {"t1": torch.full((3,), 1.0), "t2": torch.full((3,), 2.0)})


# -- whole or not at all ---------------------------------------------------------------------------


def failing(after):
    for number, (name, tensor) in enumerate(TENSORS.items()):
        if number == after:
            raise RuntimeError("a rank died")
        yield name, tensor


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_failure_midway_leaves_the_old_folder_untouched(tmp_path, source, after):
    write_hf_folder(tmp_path / "out", TENSORS.items(), source)
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    with pytest.raises(RuntimeError, match="a rank died"):
        write_hf_folder(tmp_path / "out", failing(after), source, shard_bytes=1)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def test_a_failure_midway_leaves_no_folder_of_the_final_name_and_the_next_write_starts_clean(tmp_path, source):
    with pytest.raises(RuntimeError, match="a rank died"):
        write_hf_folder(tmp_path / "out", failing(3), source, shard_bytes=1)
    assert not (tmp_path / "out").exists()
    write_hf_folder(tmp_path / "out", TENSORS.items(), source)
    assert_tensors(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_an_existing_folder_is_replaced_as_a_whole(tmp_path, source):
    write_hf_folder(tmp_path / "out", TENSORS.items(), source, shard_bytes=1)
    (tmp_path / "out" / "stale.txt").write_text("from the run before")
    write_hf_folder(tmp_path / "out", [("only", torch.ones(2))], source)
    assert_tensors(tmp_path / "out", {"only": torch.ones(2)})
    assert not (tmp_path / "out" / "stale.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_a_folder_can_be_written_over_its_own_source(tmp_path, source):
    write_hf_folder(source, TENSORS.items(), source)
    assert_tensors(source)
    assert (source / "config.json").is_file()


# -- refusals --------------------------------------------------------------------------------------


@pytest.fixture(params=[1, 10_000], ids=["with an index", "one file"])
def checkpoint(request, tmp_path, source):
    return write_hf_folder(tmp_path / "checkpoint", TENSORS.items(), source, shard_bytes=request.param)


def test_a_tensor_that_is_not_there_is_named(checkpoint):
    assert (
        refusal(SafetensorsFolder(checkpoint).read, "model.layers.9.bias")
        == f"{checkpoint} has no tensor 'model.layers.9.bias', which its config.json calls for: is it a checkpoint of"
        " another architecture?"
    )


@pytest.mark.parametrize("keep", [0, 4, 30, -1])
def test_a_truncated_file_is_named(checkpoint, keep):
    file = max(checkpoint.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:keep])
    message = refusal(read_all, checkpoint)
    assert message.startswith(f"{file} is not a complete safetensors file (") and message.endswith("copy it again")


def test_an_index_that_names_a_missing_file_is_refused(tmp_path, source):
    folder = write_hf_folder(tmp_path / "out", TENSORS.items(), source, shard_bytes=1)
    (folder / "model-00003-of-00004.safetensors").unlink()
    assert (
        refusal(SafetensorsFolder, folder)
        == f"{folder / INDEX} names model-00003-of-00004.safetensors, which is not there: the checkpoint is incomplete,"
        " copy it again"
    )


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", "null", '{"weight_map": null}', '{"weight_map": ["model.safetensors"]}', b"\xff\xfe"]
)
def test_an_index_of_another_form_is_refused(tmp_path, text):
    (tmp_path / INDEX).write_bytes(text if isinstance(text, bytes) else text.encode())
    message = refusal(SafetensorsFolder, tmp_path)
    assert message.startswith(f"{tmp_path / INDEX} is not a safetensors index (")
    assert message.endswith("restore it from the original checkpoint")


def test_an_index_that_names_the_wrong_file_for_a_tensor_is_refused(tmp_path, source):
    folder = write_hf_folder(tmp_path / "out", TENSORS.items(), source, shard_bytes=1)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = index["weight_map"]["model.norm.weight"]
    (folder / INDEX).write_text(json.dumps(index))
    message = refusal(SafetensorsFolder(folder).read, "lm_head.weight")
    assert message.startswith(
        f"tensor 'lm_head.weight' in {folder / 'model-00003-of-00004.safetensors'} cannot be read ("
    )


def test_a_folder_without_safetensors_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert (
        refusal(SafetensorsFolder, tmp_path)
        == f"{tmp_path} has no *.safetensors file: convert the weights to safetensors first"
    )
