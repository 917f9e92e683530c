"""Runs that are stopped, killed, damaged or moved to another layout, through the command line, on real ranks."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from dcpo_megatron.launch.signals import START_AGAIN
from dcpo_megatron.verification import resumption
from dcpo_megatron.weights.torch_dist import TorchDistFolder
from tests.unremovable import unremovable


def run(arguments: list[str], log: Path, ranks: int = 2) -> tuple[int, str]:
    log.write_text("")
    process = resumption.start(arguments, ranks, log)
    try:
        code = process.wait(400)
    finally:
        resumption.kill_all(process)
    return code, log.read_text()


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> tuple[list[str], Path]:
    """Arguments of a run, and its folder after 4 steps with a checkpoint each."""
    folder = tmp_path_factory.mktemp("task")
    arguments = [*resumption.make_task(folder, steps=4), "checkpoint.every=1", "checkpoint.keep_last=3"]
    code, said = run([*arguments, f"output={folder / 'run'}"], folder / "log")
    assert code == 0, said
    return arguments, folder / "run"


@pytest.fixture
def copy(task, tmp_path) -> tuple[list[str], Path]:
    """The same, the folder's own copy; saying ``output`` again is the caller's business no more."""
    shutil.copytree(task[1], tmp_path / "run")
    return [*task[0], f"output={tmp_path / 'run'}"], tmp_path / "run"


@pytest.mark.timeout(1200)
def test_three_kills_change_not_one_bit(tmp_path):
    said: list[str] = []
    resumption.verify(tmp_path, kills=3, ranks=2, steps=40, seed=0, say=said.append)
    assert "equal bit for bit" in said[-1]


def test_what_is_kept_and_what_a_checkpoint_holds(task):
    root = task[1] / "checkpoints"
    assert sorted(p.name for p in root.iterdir()) == ["latest", "step-000002", "step-000003", "step-000004"]
    folder = root / "step-000004"
    names = {p.name for p in folder.iterdir()}
    assert {
        "run.json", "history.safetensors", "random-00000.json", "random-00001.json", "manifest.json", "huggingface",
        ".metadata", "metadata.json", "common.pt",
    } <= names  # fmt: skip
    assert not any(p.suffix in (".pkl", ".pickle") for p in folder.rglob("*"))
    state = json.loads((folder / "run.json").read_text())
    assert state["step"] == 4 and state["versions"]["megatron-core"] and state["config"]["training"]["seed"] == 0


def test_a_damaged_checkpoint_is_set_aside_aloud_and_the_one_before_is_used(copy, task):
    arguments, folder = copy
    newest = folder / "checkpoints" / "step-000004"
    data = next(newest.glob("__1_0.distcp"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    code, said = run(arguments, folder.parent / "log")
    assert code == 0, said
    assert "step-000004 is damaged (the contents of __1_0.distcp have changed)" in said
    assert "step-000003: 3 of 4 steps are done" in said
    assert (folder / "checkpoints" / "step-000004.damaged").is_dir()
    assert "equal bit for bit" in resumption.compare(task[1], folder)


@pytest.mark.parametrize(
    ("ranks", "layout"), [(2, ["parallel.tensor=2"]), (4, ["parallel.tensor=2", "parallel.pipeline=2"]), (1, [])],
    ids=["tp2", "tp2-pp2", "one rank"],
)  # fmt: skip
def test_another_layout_goes_on_from_the_same_state(copy, task, ranks, layout):
    arguments, folder = copy
    for name in ("step-000003", "step-000004"):
        shutil.rmtree(folder / "checkpoints" / name)
    code, said = run([*arguments, *layout], folder.parent / "log", ranks)
    assert code == 0, said
    assert "the layout is another" in said and "2 of 4 steps are done" in said
    wanted, found = (TorchDistFolder(f / "checkpoints" / "step-000004") for f in (task[1], folder))
    for key in wanted.tensors:
        if key.startswith(("optimizer", "embedding")):
            continue
        a, b = wanted.read(key), found.read(key)
        assert (a - b).norm() <= 1e-3 * a.norm(), key
    assert rows(folder)[2]["reward"] == pytest.approx(
        rows(task[1])[2]["reward"], abs=1e-9
    )  # sampled by the same weights


def test_another_configuration_is_refused_with_the_names_of_the_keys(copy):
    arguments, folder = copy
    code, said = run(
        [*arguments, "optimizer.lr=0.5", "rollout.group_size=4", "logging.console=false"], folder.parent / "log"
    )
    assert code == 2
    assert "optimizer.lr: the run has 0.001, this command 0.5" in said and "rollout.group_size: the run has 8" in said
    assert "logging.console" not in said
    assert len(rows(folder)) == 4  # nothing was touched


def test_keys_that_are_allowed_to_change_may_and_a_run_can_be_made_longer_beside_old_folders_that_stay(copy):
    arguments, folder = copy
    root = folder / "checkpoints"
    (root / "step-000001.removing").mkdir()
    (root / "step-000001.removing" / "run.json").write_text("{}")
    with unremovable(
        root / "step-000001.removing" / "run.json", root / "step-000002" / "run.json", folder / "model" / "config.json"
    ):
        code, said = run(
            [*arguments, "optimizer.lr=0.002", "checkpoint.allow_changed=[optimizer.lr]", "training.steps=5"],
            folder.parent / "log"
        )  # fmt: skip
    assert code == 0, said
    for name in ("step-000001.removing", "step-000002.removing", "model.removing"):
        assert f"{name} could not be removed: Operation not permitted" in said
    assert "checkpoint of step 5 is complete" in said and "could not be written" not in said
    assert sorted(p.name for p in root.glob("step-00000?")) == ["step-000003", "step-000004", "step-000005"]
    assert [row["step"] for row in rows(folder)] == [1, 2, 3, 4, 5]
    assert rows(folder)[4]["lr"] == 0.002 * 5 / 10  # the fifth of ten steps of warm-up


def test_other_prompts_are_refused(copy, task, tmp_path):
    arguments, _ = copy
    data = next(a for a in arguments if a.startswith("data.files")).removeprefix("data.files=[").removesuffix("]")
    lines = Path(data).read_text().splitlines()
    (tmp_path / "train.jsonl").write_text(
        "\n".join([*lines[:-1], lines[-1].replace('"answer": "', '"answer": "1')]) + "\n"
    )
    code, said = run([*arguments, f"data.files=[{tmp_path / 'train.jsonl'}]"], tmp_path / "log")
    assert code == 2 and "other prompts" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_the_same_command_goes_on_bit_for_bit(task, tmp_path, number):
    folder = tmp_path / "run"
    arguments = [
        *(a for a in task[0] if not a.startswith("checkpoint.every")),
        "checkpoint.every=100",
        f"output={folder}",
    ]
    log = tmp_path / "log"
    process = resumption.start(arguments, 2, log)
    try:
        until = time.monotonic() + 120
        while resumption.steps_done(folder) < 1 and time.monotonic() < until and process.poll() is None:
            time.sleep(0.01)
        os.kill(process.pid, number)
        assert process.wait(120) == START_AGAIN, log.read_text()
    finally:
        resumption.kill_all(process)
    done = int((folder / "checkpoints" / "latest").read_text().removeprefix("step-"))
    assert 1 <= done < 4, "the run was over before it was asked to stop"
    code, said = run(arguments, log)
    assert code == 0 and f"{done} of 4 steps are done" in said
    assert resumption._rows(folder) == resumption._rows(task[1])


def test_a_full_disk_is_reported_and_training_goes_on(task, tmp_path):
    if os.geteuid() != 0:
        pytest.skip("only root can make a small disk")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=260k", "tmpfs", str(disk)]).returncode:
        pytest.skip("no small disk can be mounted here")
    try:
        # Room for one copy of the model, and for no checkpoint.
        code, said = run(
            [*task[0], f"output={disk / 'run'}", "training.save_every=1", "logging.tensorboard=true"], tmp_path / "log"
        )
        assert code == 1 and "Traceback" not in said, said
        for step in (2, 3):
            assert f"the model could not be written to {disk / 'run' / f'step-{step}'}: No space left on device" in said
        assert (
            f"all 4 steps are done, but the model could not be written to {disk / 'run' / 'model'}: No space left"
            in said
        )
        assert "there is no checkpoint either" in said
        assert sorted(p.name for p in (disk / "run").glob("*") if p.name.startswith(("step", "model"))) == ["step-1"]
        assert "checkpoint of step 1 could not be written" in said and "No space left" in said
        assert said.count("of step") >= 3 and said.count("the next one tries again") >= 3
        assert "step    4/4" in said or "4/4" in said
        assert not list((disk / "run" / "checkpoints").glob("step-*"))
        assert len(rows(disk / "run")) == 4
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_finished_run_that_is_started_again_has_nothing_left_to_do_but_its_model(copy, task):
    arguments, folder = copy
    with unremovable(folder / "model"):
        code, said = run(arguments, folder.parent / "log")
    assert code == 1 and "Traceback" not in said, said
    assert f"the model could not be written to {folder / 'model'}: Operation not permitted" in said
    assert f"{folder / 'checkpoints' / 'step-000004'} holds everything" in said
    code, said = run(arguments, folder.parent / "log")
    assert code == 0 and "4 of 4 steps are done" in said
    assert torch.equal(
        *(
            TorchDistFolder(f / "checkpoints" / "step-000004").read("decoder.final_layernorm.weight")
            for f in (task[1], folder)
        )
    )
