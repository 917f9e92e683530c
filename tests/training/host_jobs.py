"""Functions that run on the ranks of a pool: GPUs compared, and host meetings beside a default group that is not
gloo's."""

import datetime

import torch
import torch.distributed as dist


def servers_gpus(servers: dict, ranks: list, shared: bool):
    """What the check says on this rank: notes, or the refusal's sentences."""
    from dcpo_megatron.config.schema import ConfigError
    from dcpo_megatron.training.shared_gpus import check_servers_gpus

    try:
        return check_servers_gpus(servers, ranks[dist.get_rank()], shared)
    except ConfigError as error:
        return str(error)


def a_batch(start: str, fake: bool):
    """A batch with SAS, a meeting about a server, a count and a checkpoint's flags. ``fake``: the default group is
    torch's fake one, which carries nothing from rank to rank (as nccl cannot carry what is on the host): only the group
    beside it can.
    """
    from dcpo_megatron.advantages import RewardHistory
    from dcpo_megatron.checkpoint.saver import CheckpointSaver
    from dcpo_megatron.distributed import all_reduce_on_host, host_group, make_host_group
    from dcpo_megatron.objectives import get_preset
    from dcpo_megatron.training.server_engine import wait_together
    from tests.training.pending_jobs import _phase, _responses, mismatch

    rank, world = dist.get_rank(), dist.get_world_size()
    if fake:
        from torch.testing._internal.distributed import fake_pg  # noqa: F401 - registers the backend

        store = dist.PrefixStore("fake", dist.distributed_c10d._get_default_store())
        dist.destroy_process_group()
        dist.init_process_group("fake", store=store, rank=rank, world_size=world)
        make_host_group(datetime.timedelta(seconds=60))
        assert dist.get_backend(host_group()) == "gloo"
    else:
        assert host_group() is dist.group.WORLD
    phase = _phase(start, beside=False)
    phase.objective, phase.history = get_preset("dcpo-paper"), RewardHistory()
    responses = [_responses(phase, step) for step in (7, 8)]
    phase.rewarder.close()
    answer = wait_together(lambda: "a server", 5.0)
    saver = CheckpointSaver(None, None, keep_last=1, keep_every=0, timeout=5.0, device=torch.device("cpu"))
    flags = saver.poll(stop_requested=rank == 1)
    count = all_reduce_on_host(torch.tensor([0.1, rank], dtype=torch.float64)).tolist()
    refusal = servers_gpus({"http://a:1": ["GPU-1"]}, ["GPU-0", "GPU-1"], False)
    return responses, answer, flags, count, mismatch(0.3, 0.0, 0.2), refusal


def servers_of_a_run(urls: list[str], seconds: float, least: int = 1, asked_to_stop: int | None = None):
    """What a run's wait for its servers comes to on this rank: addresses or the error, what was announced, and how long
    it took."""
    import time
    from types import SimpleNamespace

    from dcpo_megatron.config.schema import ServersSection
    from dcpo_megatron.training.engines import _addresses

    servers = ServersSection(urls=urls, start_timeout_seconds=seconds, min_healthy=least)
    said: list[str] = []
    began = time.monotonic()
    try:
        found = _addresses(
            SimpleNamespace(servers=servers), None, said.append, lambda: None, lambda: dist.get_rank() == asked_to_stop
        )
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    return found, said, time.monotonic() - began
