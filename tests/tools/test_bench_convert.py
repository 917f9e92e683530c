"""The benchmark of conversions measures what it says, at a size of seconds, and its comparison sees one flipped bit."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_convert", ROOT / "tools" / "bench_convert.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_run_measures_both_directions_beside_copies_of_their_sources_and_leaves_nothing(bench, tmp_path, capsys):
    words = ["--gigabytes", "0.01", "--vocab", "1000", "--dtype", "float32", "--workdir", str(tmp_path / "work")]
    assert bench.main([*words, "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    names = [
        "nothing: imports only",
        "copy of its source, hf",
        "hf-to-megatron",
        "copy of its source, megatron",
        "megatron-to-hf",
    ]
    assert [row["what"] for row in found["rows"]] == names
    for row in found["rows"][1:]:
        assert 8e6 < row["bytes"] < 13e6 and row["seconds"] > 0
        assert row["rate"] == pytest.approx(row["bytes"] / row["seconds"])
    for copy, own in (found["rows"][1:3], found["rows"][3:5]):
        assert own["relative"] == pytest.approx(copy["seconds"] / own["seconds"]) and copy["relative"] == pytest.approx(
            1
        )
    # The process that converts holds what it imported, and more.
    assert found["rows"][2]["peak"] > found["rows"][0]["peak"] > found["rows"][1]["peak"] > 1e6
    assert found["tensors"] > 20 and found["different"] == []
    assert not (tmp_path / "work").exists()
    assert f"{found['tensors']} of {found['tensors']} tensors are the same" in capsys.readouterr().out


def test_the_comparison_sees_a_flipped_bit_a_lost_tensor_and_another_dtype(bench, tmp_path):
    bench.make_model(tmp_path / "one", 0.002, "bfloat16", vocab=300)
    (file,) = (tmp_path / "one").glob("*.safetensors")
    weights = load_file(file)
    names = sorted(weights)
    weights[names[0]].view(torch.int16)[-1, -1] ^= 1
    weights[names[1]] = weights[names[1]].float()
    lost = weights.pop(names[2])
    assert lost.numel()
    (tmp_path / "other").mkdir()
    save_file(weights, tmp_path / "other" / "model.safetensors")
    assert bench.same_tensors(tmp_path / "one", tmp_path / "one") == (len(names), [])
    count, different = bench.same_tensors(tmp_path / "one", tmp_path / "other")
    assert (count, sorted(different)) == (len(names), names[:3])


def test_a_folder_that_holds_something_is_not_worked_in(bench, tmp_path, capsys):
    (tmp_path / "hf").mkdir()
    with pytest.raises(SystemExit) as ended:
        bench.main(["--workdir", str(tmp_path)])
    assert ended.value.code == 2 and "is not empty" in capsys.readouterr().err
    assert (tmp_path / "hf").is_dir()
