"""A reward function of the user's: found by name, and its failures cost one response each."""

import os
import resource
import textwrap
import time
from pathlib import Path

import pytest

from dcpo_megatron.rewards import Rewarder, RewardError, load_reward_function, score

MODULE = """
    import os, subprocess, sys, time

    CONSTANT = 3

    def same(response, ground_truth):
        print("noise on standard output")
        return float(response == ground_truth)

    def moody(response, ground_truth):
        if response == "hang":
            time.sleep(600)
        if response == "raise":
            raise KeyError("broken")
        if response == "exit":
            sys.exit(3)
        if response == "crash":
            os._exit(4)
        if response == "ask":
            return float(len(input()))
        return {"nan": float("nan"), "inf": float("inf"), "text": "1.0", "none": None, "true": True, "list": []}.get(
            response, 0.5
        )

    def needs_three(response, ground_truth, extra):
        return 0.0

    def has_torch(response, ground_truth):
        return float("torch" in sys.modules)

    def hungry(response, ground_truth):
        return float(len(bytearray(int(response))) > 0)

    def starts_a_program(response, ground_truth):
        program = subprocess.Popen(["sleep", "600"])
        with open(ground_truth, "w") as file:
            file.write(str(program.pid))
        program.wait()

    class Scorer:
        @staticmethod
        def length(response, ground_truth):
            return len(response)
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(textwrap.dedent(MODULE))
    (tmp_path / "needs_missing.py").write_text("import a_package_that_is_missing\n")
    (tmp_path / "broken.py").write_text("1/0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / "my_rewards.py"


def test_a_function_is_found_by_colon_by_dot_and_by_file(module):
    for name in ("my_rewards:same", "my_rewards.same", f"{module}:same"):
        assert load_reward_function(name)("a", "a") == 1.0
    assert load_reward_function("my_rewards:Scorer.length")("abc", "") == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("same", "names no module"),
        ("my_rewards:nothing", r"my_rewards has no 'nothing'; it defines same, moody"),
        ("my_rewards.nothing", r"my_rewards has no 'nothing'"),
        ("my_rewards:CONSTANT", "is a int, not a function"),
        ("my_rewards:needs_three", r"cannot be called as f\(response, ground_truth\)"),
        ("not_there:f", "there is no module 'not_there'"),
        ("not_there.deeper:f", "there is no module 'not_there.deeper'"),
        ("needs_missing:f", "cannot be imported: No module named 'a_package_that_is_missing'"),
        ("broken:f", "cannot be imported: ZeroDivisionError"),
        ("/not/there.py:f", "there is no file '/not/there.py'"),
    ],
)
def test_a_function_that_cannot_be_used_is_refused_in_one_sentence(name, message):
    with pytest.raises(RewardError, match=message):
        load_reward_function(name)


def test_a_rewarder_refuses_a_missing_function_at_once():
    with pytest.raises(RewardError, match="my_rewards has no 'nothing'"):
        Rewarder("my_rewards:nothing")


def test_each_failure_costs_its_own_response_and_is_counted():
    texts = ["ok", "hang", "raise", "exit", "crash", "nan", "inf", "text", "none", "list", "ask", "true", "ok"]
    with Rewarder("my_rewards:moody", timeout_seconds=1.0, failure_reward=-2.0) as rewarder:
        rewards = rewarder.score(texts, ["x"] * len(texts))
    assert rewards == [0.5] + [-2.0] * 10 + [1.0, 0.5]
    assert rewarder.failures == {"timeout": 1, "exception": 3, "died": 1, "not finite": 2, "not a number": 3}


def test_memory_is_bounded_and_costs_only_that_response():
    with Rewarder("my_rewards:hungry", memory_bytes=1 << 30) as rewarder:
        assert rewarder.score(["1", str(2 << 30), "1"], [""] * 3) == [1.0, 0.0, 1.0]
        assert rewarder.failures == {"memory": 1}


def test_a_program_that_the_function_started_is_killed_with_it(tmp_path):
    with Rewarder("my_rewards:starts_a_program", timeout_seconds=2.0) as rewarder:
        rewarder.score([""], [str(tmp_path / "pid")])
        assert rewarder.failures == {"timeout": 1}
    pid = (tmp_path / "pid").read_text()
    stat = Path(f"/proc/{pid}/stat")
    deadline = time.monotonic() + 5
    while stat.exists() and stat.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not stat.exists() or stat.read_text().split()[2] == "Z"


def test_several_workers_give_the_same_rewards_in_order_and_faster():
    texts = ["hang", "ok", "hang", "ok"]
    with Rewarder("my_rewards:moody", timeout_seconds=2.0, workers=2) as rewarder:
        start = time.monotonic()
        assert rewarder.score(texts, [""] * 4) == [0.0, 0.5, 0.0, 0.5]
        assert time.monotonic() - start < 4.0


def test_output_of_the_function_does_not_disturb_the_rewards():
    assert [s.reward for s in score("my_rewards:same", ["a", "b", "ü\ud800\n" * 100_000], ["a", "a", "x"])] == [
        1.0,
        0.0,
        0.0,
    ]


def test_a_one_off_score_tells_the_reason_of_each_failure(module):
    scored = score(f"{module}:moody", ["ok", "raise"], ["", ""], timeout_seconds=5.0, failure_reward=-1.0)
    assert scored[0] == (0.5, None, "")
    assert (scored[1].reward, scored[1].failure, scored[1].detail) == (-1.0, "exception", "KeyError: 'broken'")


def test_a_file_is_found_by_a_relative_path_from_the_current_folder(module, monkeypatch):
    monkeypatch.chdir(module.parent)
    with Rewarder("my_rewards.py:same") as rewarder:
        monkeypatch.chdir("/")
        rewarder.close()
        assert rewarder.score(["a"], ["a"]) == [1.0]


def test_the_math_rewarder_counts_timeouts_and_gives_the_three_levels():
    with Rewarder("math", timeout_seconds=2.0) as rewarder:
        texts = [r"\boxed{5}", r"\boxed{6}", "5", r"\boxed{9^{9^{9^9}}}", r"\boxed{2+x}"]
        assert rewarder.score(texts, ["5", "5", "5", "5", "x+2"]) == [1.0, 0.0, -1.0, 0.0, 1.0]
        assert rewarder.failures == {"timeout": 1}


def test_the_worker_does_not_load_torch():
    with Rewarder("my_rewards:has_torch") as rewarder:
        assert rewarder.score([""], [""]) == [0.0]


def test_a_trainer_with_more_files_open_than_select_knows_gets_its_rewards():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    held = [os.dup(0) for _ in range(1100)]
    try:
        with Rewarder("my_rewards:same") as rewarder:
            assert rewarder.score(["5"], ["5"]) == [1.0]
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_batch_of_unequal_lengths_is_refused():
    with (
        Rewarder("my_rewards:same") as rewarder,
        pytest.raises(ValueError, match="1 responses came with 2 ground truths"),
    ):
        rewarder.score(["a"], ["a", "b"])


@pytest.mark.parametrize("settings", [{"timeout_seconds": 0.0}, {"timeout_seconds": float("nan")}, {"workers": 0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=r"at least 1|above 0"):
        Rewarder("my_rewards:same", **settings)
