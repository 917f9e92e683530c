"""Which files of a Hugging Face folder count, which output layer, and what is carried beside the weights: as
transformers has it, or refused with one sentence."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dcpo_megatron.cli.main import main
from dcpo_megatron.config.loading import load_config
from dcpo_megatron.mcore.hf_config import read_shape
from dcpo_megatron.mcore.layout import ParallelLayout
from dcpo_megatron.training.checks import check_run
from dcpo_megatron.verification.cases import make_model
from dcpo_megatron.weights.conversion_jobs import run_job
from dcpo_megatron.weights.folder_check import check_folder
from dcpo_megatron.weights.hf_folder import INDEX, SINGLE, CheckpointError, SafetensorsFolder, companions
from dcpo_megatron.weights.hf_writing import write_hf_folder
from dcpo_megatron.weights.megatron_names import MegatronTensors
from dcpo_megatron.weights.to_hf import MegatronToHf
from dcpo_megatron.weights.to_megatron import HfToMegatron
from dcpo_megatron.weights.torch_dist import TorchDistFolder
from dcpo_megatron.weights.torch_dist_writing import write_index, write_records

NORM, EMBEDDING, OUTPUT = "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A small model as one file (``whole``), another of the same sizes in shards (``shards``), and one that is tied."""
    folder = tmp_path_factory.mktemp("models")
    make_model("qwen2", str(folder / "whole"), seed=0)
    make_model("qwen2", str(folder / "other"), seed=1)
    make_model("tied", str(folder / "tied"))
    write_hf_folder(
        folder / "shards", load_file(folder / "other" / SINGLE).items(), folder / "other", shard_bytes=50_000
    )
    return folder


@pytest.fixture
def both(models, tmp_path) -> Path:
    """Older shards with their index, and other weights saved whole beside them."""
    shutil.copytree(models / "shards", tmp_path / "both")
    shutil.copy(models / "whole" / SINGLE, tmp_path / "both" / SINGLE)
    return tmp_path / "both"


def embedding(folder) -> torch.Tensor:
    return load_file(folder / SINGLE)[EMBEDDING]


def in_transformers(folder) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).state_dict()


def assert_as_in_transformers(folder) -> None:
    wanted, found = in_transformers(folder), SafetensorsFolder(folder)
    assert found.names() <= wanted.keys()
    assert all(torch.equal(found.read(name), wanted[name]) for name in found.names())


# -- which files count -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change", ["both", "shards gone", "index broken", "shards alone", "named shards", "named file"]
)
def test_the_file_that_transformers_loads_counts(both, models, change):
    expected = models / "whole"
    if change == "shards gone":
        for shard in both.glob("model-*"):
            shard.unlink()
    elif change == "index broken":
        (both / INDEX).write_text("{")
    elif change == "shards alone":
        (both / SINGLE).unlink()
        expected = models / "other"
    elif change == "named shards":
        name(both, INDEX)
        expected = models / "other"
    elif change == "named file":
        (both / SINGLE).rename(both / "hf.safetensors")
        name(both, "hf.safetensors")
    found = SafetensorsFolder(both)
    assert torch.equal(found.read(EMBEDDING), embedding(expected))
    assert_as_in_transformers(both)
    check_folder(found, read_shape(both))


def name(folder, file: str) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"transformers_weights": file}))


def test_a_conversion_takes_it_and_its_result_has_the_usual_names(both, models, tmp_path, capsys):
    (both / SINGLE).rename(both / "hf.safetensors")
    name(both, "hf.safetensors")
    run_job(HfToMegatron(str(both), ParallelLayout()), tmp_path / "megatron")
    run_job(MegatronToHf(str(tmp_path / "megatron")), tmp_path / "back")
    assert torch.equal(embedding(tmp_path / "back"), embedding(models / "whole"))
    assert_as_in_transformers(tmp_path / "back")
    assert main(["convert", "inspect", str(both), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["files"], facts["problem"]) == (1, None)
    assert facts["bytes"] == (both / "hf.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["model.fp16.safetensors"], "only model.fp16.safetensors, which transformers does not take either"),
        (["consolidated.safetensors", "pytorch_model.bin"], "only consolidated.safetensors, which"),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
         "00002.safetensors and 1 more, which"),
        (["pytorch_model.bin"], "has no *.safetensors file: convert the weights to safetensors first"),
    ],
)  # fmt: skip
def test_files_that_transformers_does_not_take_are_refused(models, tmp_path, files, words):
    for file in files:
        shutil.copy(models / "whole" / SINGLE, tmp_path / file)
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFolder(tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("named", "words"), [("gone.safetensors", "which is not there"), ("model.bin", "is no safetensors file")]
)
def test_a_named_file_that_cannot_be_read_is_refused(both, named, words):
    name(both, named)
    with pytest.raises(CheckpointError, match=words):
        SafetensorsFolder(both)


def test_the_check_of_a_run_looks_at_the_weights_that_count(both, capsys):
    words = [f"model.path={both}", "data.files=[x.jsonl]", "training.platform=cpu", "data.max_prompt_tokens=8",
             "rollout.max_response_tokens=8", "training.micro_batch_tokens=16"]  # fmt: skip
    run = check_run(load_config([], words), 1)
    run.check_weights()
    assert not any("weights" in missing for missing in run.not_seen)
    (both / SINGLE).unlink()
    next(both.glob("model-*")).unlink()
    with pytest.raises(CheckpointError, match=r"which is not there: the checkpoint is incomplete"):
        run.check_weights()
    assert main(["train", "--check", *words]) == 2
    assert "the checkpoint is incomplete" in capsys.readouterr().err


# -- the output layer ------------------------------------------------------------------------------


@pytest.fixture
def tied(models, tmp_path) -> Path:
    return Path(shutil.copytree(models / "tied", tmp_path / "tied"))


def with_output(folder, tensor: torch.Tensor | None) -> None:
    weights = load_file(folder / SINGLE)
    weights.pop(OUTPUT, None)
    save_file(weights if tensor is None else weights | {OUTPUT: tensor}, folder / SINGLE, {"format": "pt"})


def test_a_copy_of_the_embedding_is_no_other_output_layer(tied, tmp_path):
    table = embedding(tied)
    table[3, 1] = float("nan")
    save_file(load_file(tied / SINGLE) | {EMBEDDING: table, OUTPUT: table.clone()}, tied / SINGLE, {"format": "pt"})
    check_folder(SafetensorsFolder(tied), read_shape(tied))
    with_output(tied, embedding(tied).double())  # another dtype, the same numbers
    check_folder(SafetensorsFolder(tied), read_shape(tied))
    run_job(HfToMegatron(str(tied), ParallelLayout()), tmp_path / "megatron")


@pytest.mark.parametrize("row", [0, 57, 100])
def test_an_output_layer_that_a_tied_model_cannot_have_is_refused_by_its_name(tied, tmp_path, capsys, row):
    other = embedding(tied)
    other[row, -1] += 1e-3
    with_output(tied, other)
    with pytest.raises(CheckpointError) as caught:
        check_folder(SafetensorsFolder(tied), read_shape(tied))
    message = str(caught.value)
    assert f"{OUTPUT} differs from {EMBEDDING} in row {row}, and config.json ties them" in message
    assert "tie_word_embeddings" in message and "\n" not in message
    assert main(["convert", "hf-to-megatron", str(tied), str(tmp_path / "out")]) == 2
    assert OUTPUT in capsys.readouterr().err and not (tmp_path / "out").exists()
    # What the sentence says helps: untied, both are taken.
    content = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps(content | {"tie_word_embeddings": False}))
    run_job(HfToMegatron(str(tied), ParallelLayout()), tmp_path / "out")
    run_job(MegatronToHf(str(tmp_path / "out")), tmp_path / "back")
    assert torch.equal(load_file(tmp_path / "back" / SINGLE)[OUTPUT], other)


def test_an_output_layer_with_padded_rows_is_refused_in_a_folder(tied):
    with_output(tied, torch.cat([embedding(tied), torch.zeros(27, 32)]))
    with pytest.raises(CheckpointError, match=r"lm_head.weight is \[128, 32\]"):
        check_folder(SafetensorsFolder(tied), read_shape(tied))


def test_an_untied_model_without_an_output_layer_is_refused_by_its_name(models, tmp_path):
    folder = Path(shutil.copytree(models / "whole", tmp_path / "hf"))
    with_output(folder, None)
    with pytest.raises(CheckpointError, match=r"has no lm_head.weight, and its config.json does not tie it"):
        check_folder(SafetensorsFolder(folder), read_shape(folder))


def test_a_megatron_checkpoint_with_another_output_layer_than_its_tied_configuration_says_is_refused(tied, tmp_path):
    shape = read_shape(tied)
    rows = torch.cat([embedding(tied), torch.zeros(27, 32)])

    def checkpoint(output: torch.Tensor) -> TorchDistFolder:
        folder = tmp_path / "megatron"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        tensors = {"embedding.word_embeddings.weight": rows, "output_layer.weight": output}
        records = write_records(folder / "__0_0.distcp", [(key, (0, 0), tensor) for key, tensor in tensors.items()])
        write_index(folder, {key: (tuple(t.shape), t.dtype) for key, t in tensors.items()}, records, {})
        return TorchDistFolder(folder)

    padded = rows.clone()
    padded[101:] = 7.0  # padding may be anything
    MegatronTensors(checkpoint(padded), shape)
    padded[100, 0] = 7.0
    with pytest.raises(CheckpointError, match=r"output_layer.weight \(lm_head.weight\) differs from .* in row 100"):
        MegatronTensors(checkpoint(padded), shape)


# -- what is carried -------------------------------------------------------------------------------

CARRIED = [
    "LICENSE", "additional_chat_templates/rag.jinja", "additional_chat_templates/tool_use.jinja",
    "code/blocks/attention.py",
    "code/modeling_own.py", "config.json", "processor/preprocessor_config.json", "tokenizer.json",
]  # fmt: skip
LEFT = [
    ".cache/huggingface/download/config.json.lock", ".git/config", "code/__pycache__/modeling_own.cpython-311.pyc",
    "code/.hidden",
    "original/params.json", "original/consolidated.00.pth", "onnx/model.onnx", "onnx/config.json",
    "checkpoint-5/trainer_state.json",
    "checkpoint-5/model.safetensors", "hf_cache/models.json", "processor/vision/pytorch_model.bin",
    "model.safetensors.index.json",
    "runs/May01_host/events.out.tfevents.1700000000.host",
]  # fmt: skip


@pytest.fixture
def full(tmp_path) -> Path:
    folder = tmp_path / "full"
    for file in [*CARRIED, *LEFT]:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("{}" if file.endswith(".json") else file)
    (folder / "code" / "loop").symlink_to(folder)
    (folder / "empty").mkdir()
    return folder


def listed(folder) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_subfolders_belong_to_the_model_but_for_weights_hidden_ones_and_caches(full, tmp_path):
    assert [path.as_posix() for path in sorted(companions(full))] == CARRIED
    write_hf_folder(tmp_path / "out", [("weight", torch.ones(2))], full)
    assert listed(tmp_path / "out") == sorted([*CARRIED, SINGLE])
    for file in CARRIED:
        assert (tmp_path / "out" / file).read_bytes() == (full / file).read_bytes()


def test_a_folder_that_is_written_below_its_source_does_not_hold_itself(full):
    for _ in range(2):
        write_hf_folder(full / "mine" / "one" / "model", [("weight", torch.ones(2))], full)
        assert listed(full / "mine") == sorted(f"one/model/{file}" for file in [*CARRIED, SINGLE])


def test_named_chat_templates_go_to_megatron_and_back(demo_start, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_start)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}", "rag": "{{ documents }}"}
    source = Path(shutil.copytree(demo_start, tmp_path / "source"))
    tokenizer.save_pretrained(source)
    assert len(list((source / "additional_chat_templates").iterdir())) == 2
    run_job(HfToMegatron(str(source), ParallelLayout()), tmp_path / "megatron")
    run_job(MegatronToHf(str(tmp_path / "megatron")), tmp_path / "back")
    for folder in (tmp_path / "megatron" / "huggingface", tmp_path / "back"):
        assert AutoTokenizer.from_pretrained(folder).chat_template == tokenizer.chat_template
