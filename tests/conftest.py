"""Shared by all tests: one thread a process (ranks share the cores), small models, the folder with real data."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)

# `make test` runs files side by side (pytest-xdist): these begin, being the longest. A minute or more each.
LONGEST = (
    "tests/training/test_resume.py", "tests/verification/test_certificate.py",
    "tests/comparison/test_small_comparison.py",
    "tests/slurm/test_jobs.py", "tests/weights/test_stock_checkpoints.py", "tests/transformer_engine/test_on_a_cpu.py",
    "tests/mcore/test_training_state.py", "tests/rollout/test_serving.py", "tests/training/test_faults.py",
    "tests/training/test_runs_on_servers.py", "tests/weights/test_publish.py",
    "tests/rollout/test_server_client_real.py",
    "tests/training/test_layouts_train_alike.py", "tests/cli/test_convert.py", "tests/cli/test_launch_cluster.py",
    "tests/hosts/test_exact.py", "tests/hosts/test_late_hosts.py", "tests/hosts/test_link_faults.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.location[0], len(order)))


@pytest.fixture(scope="session")
def demo_start(tmp_path_factory) -> Path:
    """A folder with a small model (random weights) and its tokenizer, as the demo makes them before the warm-up."""
    from dcpo_megatron.toys.warm_up import make_model, make_tokenizer, save

    folder = tmp_path_factory.mktemp("start")
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer), seed=0, layers=2, hidden=32)
    save(model, tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def sglang_server(demo_start, tmp_path_factory) -> Iterator[str]:
    """The address of a real SGLang server of the model in ``demo_start``, shared by all tests: whoever pauses it or
    changes its weights puts it right again."""
    from tests.sglang_servers import serve

    with serve(demo_start, logs=tmp_path_factory.mktemp("servers")) as running:
        yield running.urls[0]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with real data sets, which are not part of the project: DCPO_TEST_DATA, else one beside the checkout
    that holds them."""
    beside = Path(__file__).resolve().parents[2]
    found = [Path(os.environ["DCPO_TEST_DATA"])] if "DCPO_TEST_DATA" in os.environ else []
    found += [file.parent for file in sorted(beside.glob("*/data/math500.parquet"))]
    if not found or not (found[0] / "math500.parquet").is_file():
        pytest.skip(
            "no real data sets: set DCPO_TEST_DATA to a folder with math500.parquet, gsm8k_train.jsonl and the others"
        )
    return found[0]
