"""What gets its final name is on the disk by then, file by file, and old things go only afterwards: read off the order
of the system calls."""

import json
from pathlib import Path

import pytest
import torch

from dcpo_megatron.checkpoint import folder as folders
from dcpo_megatron.checkpoint.saver import CheckpointSaver
from dcpo_megatron.checkpoint.snapshot import Snapshot, SnapshotTensor
from dcpo_megatron.mcore.layout import ParallelLayout
from dcpo_megatron.training.pending import PendingBatch
from dcpo_megatron.weights.conversion_jobs import run_job
from dcpo_megatron.weights.hf_writing import write_hf_folder
from dcpo_megatron.weights.publish.buckets import Bucket
from dcpo_megatron.weights.publish.disk import DiskTransport
from dcpo_megatron.weights.to_hf import MegatronToHf
from dcpo_megatron.weights.to_megatron import HfToMegatron
from tests.system_calls import calls  # noqa: F401


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def hf(tmp_path) -> Path:
    (tmp_path / "hf" / "additional_chat_templates").mkdir(parents=True)
    (tmp_path / "hf" / "config.json").write_text("{}")
    (tmp_path / "hf" / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    return tmp_path / "hf"


def test_a_checkpoint_gets_its_name_when_all_of_it_is_on_the_disk(tmp_path, hf, alone, calls):  # noqa: F811
    root = tmp_path / "checkpoints"
    saver = CheckpointSaver(root, hf, keep_last=1, keep_every=0, timeout=60, device=torch.device("cpu"))

    def extras(folder: Path) -> None:
        PendingBatch(1, [], [], {}, [], [], None).write([], folder, 0)
        folders.write_text(folder / "run.json", "{}")

    for step in (1, 2):
        tensors = [SnapshotTensor("weight", (2, 2), (0, 0), torch.full((2, 2), float(step)))]
        saver.start(step, Snapshot(tensors, [], {"iteration": step}), extras, beside_training=False)
        (report,) = saver.finish()
        assert report.problem is None and report.warnings == ()
    target = root / "step-000002"
    work = root / "step-000002.incomplete"
    files = files_of(target)
    assert {"__0_0.distcp", ".metadata", "common.pt", "pending-00000.responses", "huggingface/config.json"} <= files
    calls.assert_durable(work, target, files)
    # The name of the newest, and the end of the oldest, come when the new one has its name.
    named = calls.index(("sync", root), calls.at("rename", work, target))
    latest = ("rename", root / "latest.part", root / "latest")
    assert named < max(n for n, call in enumerate(calls) if call == latest)
    assert named < calls.at("rename", root / "step-000001", root / "step-000001.removing")
    assert ("sync", root / "latest.part") in calls[named:]


def test_a_copy_of_the_model_replaces_the_last_one_when_it_is_on_the_disk(tmp_path, hf, calls):  # noqa: F811
    target, work = tmp_path / "model", tmp_path / "model.incomplete"
    tensors = {"a": torch.ones(4), "b": torch.ones(4)}
    write_hf_folder(target, tensors.items(), hf, shard_bytes=1)
    calls.clear()
    write_hf_folder(target, tensors.items(), hf, shard_bytes=1)
    calls.assert_durable(work, target, files_of(target))
    assert calls.at("rename", target, tmp_path / "model.removing") > calls.at("sync", work)


def test_a_conversion_gets_its_name_when_all_of_it_is_on_the_disk(tmp_path, demo_start, calls):  # noqa: F811
    run_job(HfToMegatron(str(demo_start), ParallelLayout()), tmp_path / "megatron")
    calls.assert_durable(tmp_path / "megatron.incomplete", tmp_path / "megatron", files_of(tmp_path / "megatron"))
    run_job(MegatronToHf(str(tmp_path / "megatron"), shard_bytes=20_000), tmp_path / "back")
    calls.assert_durable(tmp_path / "back.incomplete", tmp_path / "back", files_of(tmp_path / "back"))


def test_a_published_version_gets_its_name_when_all_of_it_is_on_the_disk(tmp_path, calls):  # noqa: F811
    transport = DiskTransport(tmp_path)
    for version in (1, 2):
        transport.begin(version)
        for name in "ab":
            transport.write(Bucket([(name, torch.ones(3))]))
        transport.seal()
        if version == 2:
            calls.assert_durable(tmp_path / ".incomplete-2", tmp_path / "version-2", files_of(tmp_path / "version-2"))
            assert json.loads((tmp_path / "version-2" / "model.safetensors.index.json").read_text())["weight_map"]
            assert (tmp_path / "version-1").exists()
        transport.committed()
    assert not (tmp_path / "version-1").exists()
