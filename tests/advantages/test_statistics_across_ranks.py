"""Several gloo processes against one process that sees everything. One spawn per world size runs all scenarios."""

import math
import random
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dcpo_megatron.advantages import RewardHistory, group_advantages, keep_mixed_groups
from dcpo_megatron.advantages import moments as statistics

STEPS = 6


def batches(world_size):
    """STEPS batches of (rank, prompt id, reward): split groups, ranks of their own prompts, ranks without any
    response."""
    generator = random.Random(7)
    steps = []
    for step in range(STEPS):
        batch = []
        for prompt in generator.sample(range(8), 5):
            values = [0.1, 1 / 3, -1.0, 0.7] if prompt % 2 else [0.0, 1.0]
            for _ in range(generator.choice([2, 4, 5])):
                rank = generator.randrange(world_size) if prompt < 6 else prompt % world_size
                batch.append((rank, f"prompt-{prompt}-\u00df\u6f22" + "x" * (37 * prompt), generator.choice(values)))
        if step % 3 == 1:
            batch = [(max(rank, 1), prompt_id, reward) for rank, prompt_id, reward in batch]  # rank 0 has nothing
        if step == STEPS - 1:
            batch = []  # nobody has anything
        steps.append(batch)
    return steps


def share(batch, rank):
    mine = [(prompt_id, reward) for owner, prompt_id, reward in batch if owner == rank]
    return [prompt_id for prompt_id, _ in mine], torch.tensor([reward for _, reward in mine], dtype=torch.float64)


def error_of(function):
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def worker(rank, world_size, directory):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    group = dist.group.WORLD
    result = {"advantages": [], "modes": [], "kept": []}
    reductions = []
    plain_all_reduce = dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: (reductions.append(1), plain_all_reduce(*args, **kwargs))[1]

    history = RewardHistory()
    history._warned = True
    for batch in batches(world_size):
        ids, rewards = share(batch, rank)
        result["advantages"].append(history.observe(ids, rewards, group))
    result["reductions"] = len(reductions)
    result["state"] = history.state_dict()

    for batch in batches(world_size)[:2]:
        ids, rewards = share(batch, rank)
        result["modes"].append(
            [group_advantages(ids, rewards, mode, 1, group) for mode in ("group", "mean", "leave_one_out")]
        )
        result["kept"].append(keep_mixed_groups(ids, rewards == 1.0, group))

    last = world_size - 1
    faults = {
        "nan": (["a"], torch.tensor([math.nan])),
        "missing": ([None], torch.tensor([1.0])),
        "type": ([3], torch.tensor([1.0])),
        "lengths": (["a", "b"], torch.tensor([1.0])),
        "no tensor": (["a"], [1.0]),
        "surrogate": (["\ud800"], torch.tensor([1.0])),
    }
    result["errors"] = {
        name: error_of(lambda fault=fault: history.observe(*(fault if rank == last else (["a"], torch.ones(1))), group))
        for name, fault in faults.items()
    }
    result["state after errors"] = history.state_dict()

    # Ranks of a smaller group exchange among themselves; without a group nobody waits for anybody.
    pair = dist.new_group([0, last])
    if rank in (0, last):
        result["pair"] = RewardHistory().observe(["a", "a"], torch.tensor([float(rank == 0)] * 2), pair)
    if rank == 0:
        result["alone"] = RewardHistory().observe(["a", "a"], torch.tensor([1.0, 0.0]))
    torch.save(result, f"{directory}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, args=(request.param, str(directory)), nprocs=request.param)
    return [torch.load(directory / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


def single_process(world_size):
    history = RewardHistory()
    history._warned = True
    advantages = []
    for batch in batches(world_size):
        ids, rewards = [row[1] for row in batch], torch.tensor([row[2] for row in batch], dtype=torch.float64)
        advantages.append(history.observe(ids, rewards))
    return history, advantages


def test_the_scenario_splits_groups_and_leaves_ranks_without_responses():
    for world_size in (2, 3):
        steps = batches(world_size)
        owners = {}
        for rank, prompt_id, _ in steps[0]:
            owners.setdefault(prompt_id, set()).add(rank)
        assert any(len(ranks) > 1 for ranks in owners.values())
        assert not any(rank == 0 for rank, _, _ in steps[1]) and steps[1] and not steps[-1]


def test_every_rank_holds_the_same_history_bit_for_bit(ranks):
    first = ranks[0]["state"]
    assert len(first["prompt_ids"]) == 8
    for other in ranks[1:]:
        assert other["state"]["prompt_ids"] == first["prompt_ids"]
        for name in ("visits", "counts", "means", "m2"):
            assert torch.equal(other["state"][name], first[name])


def test_the_history_equals_that_of_one_process(ranks):
    history, _ = single_process(len(ranks))
    got, expected = ranks[0]["state"], history.state_dict()
    order = [got["prompt_ids"].index(prompt_id) for prompt_id in expected["prompt_ids"]]
    for name in ("visits", "counts"):
        assert torch.equal(got[name][order], expected[name])
    for name in ("means", "m2"):
        assert torch.allclose(got[name][order], expected[name], rtol=1e-12, atol=1e-12)


def test_the_advantages_equal_those_of_one_process(ranks):
    _, expected = single_process(len(ranks))
    for step, batch in enumerate(batches(len(ranks))):
        for rank, result in enumerate(ranks):
            mine = [position for position, (owner, _, _) in enumerate(batch) if owner == rank]
            assert torch.allclose(result["advantages"][step], expected[step][mine], rtol=1e-12, atol=1e-12)


def test_group_advantages_and_dynamic_sampling_see_groups_that_are_split_over_ranks(ranks):
    for step, batch in enumerate(batches(len(ranks))[:2]):
        ids, rewards = [row[1] for row in batch], torch.tensor([row[2] for row in batch], dtype=torch.float64)
        kept = keep_mixed_groups(ids, rewards == 1.0)
        for rank, result in enumerate(ranks):
            mine = [position for position, (owner, _, _) in enumerate(batch) if owner == rank]
            assert torch.equal(result["kept"][step], kept[mine])
            for mode, got in zip(("group", "mean", "leave_one_out"), result["modes"][step], strict=True):
                assert torch.allclose(got, group_advantages(ids, rewards, mode, 1)[mine], rtol=1e-12, atol=1e-12)


def test_a_step_needs_exactly_one_reduction_and_none_where_nobody_has_responses(ranks):
    assert [result["reductions"] for result in ranks] == [STEPS - 1] * len(ranks)


@pytest.mark.parametrize("fault", ["nan", "missing", "type", "lengths", "no tensor", "surrogate"])
def test_an_error_on_one_rank_is_a_value_error_on_every_rank_that_names_it(ranks, fault):
    for result in ranks:
        assert result["errors"][fault].startswith(f"ValueError: rank {len(ranks) - 1} ")
    details = {"nan": "'a'", "missing": "no prompt id", "type": "give a str", "lengths": "2 prompt ids"}
    assert details.get(fault, "") in ranks[-1]["errors"][fault]


def test_an_error_on_one_rank_changes_no_history(ranks):
    for result in ranks:
        before, after = result["state"], result["state after errors"]
        assert before["prompt_ids"] == after["prompt_ids"] and torch.equal(before["m2"], after["m2"])


def test_a_smaller_group_exchanges_among_its_ranks_only(ranks):
    assert ranks[0]["pair"].tolist() == [1.0, 1.0] and ranks[-1]["pair"].tolist() == [-1.0, -1.0]


def test_without_a_process_group_nothing_is_exchanged(ranks):
    assert ranks[0]["alone"].tolist() == [1.0, -1.0]


def test_local_moments_do_not_depend_on_the_order_of_the_rewards():
    generator = random.Random(1)
    values = [generator.uniform(-1, 1) for _ in range(101)]
    moments = statistics.moments_of(values)
    for seed in range(20):
        random.Random(seed).shuffle(values)
        assert statistics.moments_of(values) == moments


def test_merged_moments_equal_those_of_the_union():
    generator = random.Random(2)
    values = [generator.uniform(-1, 1) for _ in range(60)]
    for cut in (1, 7, 59):
        merged = statistics.merge_moments(statistics.moments_of(values[:cut]), statistics.moments_of(values[cut:]))
        assert merged == pytest.approx(statistics.moments_of(values), rel=1e-14)
