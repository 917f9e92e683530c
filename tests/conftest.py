"""Shared by all tests: one thread a process (ranks share the cores), small models, the folder with real data."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)

# Files that take twelve seconds or more, the longest first (measured, with the fixtures that they are the first to ask
# for): `make test` runs files side by side (pytest-xdist) and begins with these, `make test-fast` leaves them out.
SLOW = (
    "transformer_engine/test_on_a_cpu", "training/test_resume", "training/test_runs_on_servers",
    "mcore/test_training_state", "weights/test_publish", "verification/test_certificate", "rollout/test_serving",
    "weights/test_stock_checkpoints", "slurm/test_jobs", "cli/test_convert", "rollout/test_server_client_real",
    "training/test_faults", "cli/test_launch_cluster", "comparison/test_small_comparison", "tools/test_bench_publish",
    "training/test_run_end_to_end", "mcore/test_cpu_standins", "slurm/test_training_and_servers",
    "cli/test_demo_pretrained", "cli/test_bad_input", "tools/test_bench_rollout", "hosts/test_starts",
    "hosts/test_link_faults", "training/test_layouts_train_alike", "hosts/test_exact", "hosts/test_doctor_peers",
    "mcore/test_own_logprobs", "training/test_old_logprobs",
    "training/test_start_weights", "rewards/test_math_forms", "rewards/test_reward_deadline",
    "tools/test_bench_convert", "tools/test_bench_logprobs", "weights/test_transfer", "hosts/test_late_hosts",
    "cli/test_verify", "weights/test_conversion_jobs", "hosts/test_meeting_faults", "tools/test_bench_step",
    "mcore/test_head_on_ranks", "advantages/test_statistics_across_ranks", "training/test_memory_plan",
    "training/test_eval", "rewards/test_near_misses", "mcore/test_rotary", "training/test_pending_and_mismatch",
    "training/test_host_meetings", "weights/test_families", "tools/test_gpu_check", "cli/test_doctor",
    "mcore/test_step", "hosts/test_interfaces", "rollout/test_server_client", "rewards/test_user_functions",
    "rewards/test_math_equality",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="leave out the files that take long (tests/conftest.py)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    order = {f"tests/{name}.py": place for place, name in enumerate(SLOW)}
    if config.getoption("--fast"):
        slow = [item for item in items if item.location[0] in order]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item.location[0] not in order]
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
