"""The rollout engine that the configuration names, with the weights of the run's start in it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch.distributed as dist

from dcpo_megatron import network
from dcpo_megatron.config.schema import Config, ConfigError, ServersSection
from dcpo_megatron.data import PromptSet
from dcpo_megatron.distributed import all_gather_on_host
from dcpo_megatron.mcore.model import DTYPES
from dcpo_megatron.mcore.step import PolicyModel
from dcpo_megatron.monitor.heartbeat import health_folder
from dcpo_megatron.monitor.server_health import ServerHealth
from dcpo_megatron.rollout import EmbeddedEngine, RolloutEngine, RolloutError
from dcpo_megatron.rollout.addresses import LOOPBACK, bare
from dcpo_megatron.rollout.fleet import Fleet
from dcpo_megatron.rollout.server import Server, ServerError, check_url
from dcpo_megatron.rollout.server_client import ServerClient
from dcpo_megatron.rollout.serving.api_key import read_api_key
from dcpo_megatron.training.checks import CheckedRun
from dcpo_megatron.training.publish_probe import TrainingProbe
from dcpo_megatron.training.server_engine import ServerEngine, look_at, say_refusals, wait_together
from dcpo_megatron.training.shared_gpus import SharedGpu, check_servers_gpus, gpu_of
from dcpo_megatron.weights.publish import PublishOptions, WeightPublisher, nccl
from dcpo_megatron.weights.publish.weight_checks import TOLERANCES
from dcpo_megatron.weights.transfer import WeightGatherer

# For one server to answer, at a start at which many ask.
_LOOK_SECONDS = 10.0


def make_engine(
    run_: CheckedRun,
    policy: PolicyModel,
    gatherer: WeightGatherer,
    prompts: PromptSet,
    *,
    step: int,
    restored: bool,
    announce: Callable[[str], None],
    tick: Callable[[], None],
    stop: Callable[[], bool] = lambda: False,
) -> RolloutEngine:
    """Collective over all ranks; the engine samples with the weights of ``policy``, as version ``step``.

    Args:
        restored: ``policy`` does not hold the weights of ``run_.hf_folder``.
        announce: says things on the rank that writes.
        tick: called while waiting for servers.
        stop: whether this rank has been asked to stop; looked at while waiting for servers.

    Raises:
        RolloutError: servers that do not answer, refuse, or do not take the weights.
        Stopped: asked to stop while it waited.
        ConfigError: an address or key that cannot be used.
    """
    if run_.config.rollout.engine == "sglang":
        served = _server_engine(run_, policy, gatherer, prompts, announce, tick, stop)
        served.load_weights(gatherer, version=step)
        return served
    engine = EmbeddedEngine(
        run_.hf_folder,
        device=run_.platform.device,
        dtype=DTYPES[run_.config.model.dtype],
        max_batch=run_.config.rollout.batch_size,
        load=not restored,
    )
    if restored:
        engine.load_weights(gatherer, version=step)
    return engine


def _server_engine(run_: CheckedRun, policy, gatherer, prompts: PromptSet, announce, tick, stop) -> ServerEngine:
    config, device, rank = run_.config, run_.platform.device, dist.get_rank()
    try:
        key = read_api_key(config.servers.api_key_file)
    except ValueError as error:
        raise ConfigError(f"servers.api_key_file: {error}") from None
    addresses = _addresses(config, key, announce, tick, stop)
    _look_from_every_host(list(addresses), config.servers.router, key, announce)
    for note in check_servers_gpus(addresses, gpu_of(run_.platform), shared=config.publish.mode == "ipc"):
        announce(note)
    servers = [Server(url, api_key=key, timeout=config.publish.timeout_seconds) for url in addresses]
    # A run that is started again has the same version numbers, and not always the same weights.
    run_id, *_ = all_gather_on_host(f"dcpo-{secrets.token_hex(6)}".encode())
    shared = SharedGpu(policy) if config.publish.colocated else None
    fleet = Fleet(servers, run_id.decode())
    client = ServerClient(
        fleet,
        rank=rank,
        world=dist.get_world_size(),
        request_timeout=config.servers.request_timeout_seconds,
        router=config.servers.router,
    )
    publisher = WeightPublisher(
        fleet,
        publish_options(config, run_.platform.is_cpu),
        device=device,
        probe=TrainingProbe(policy, prompts.prompts) if config.publish.verify else None,
        **({"make_room": shared.make_room} if shared else {}),
    )
    health = ServerHealth(health_folder(Path(config.output)), fleet) if rank == 0 else None
    return ServerEngine(
        client,
        publisher,
        fleet,
        gatherer,
        start_timeout=config.servers.start_timeout_seconds,
        announce=announce,
        tick=tick,
        stop=stop,
        health=health,
        shared=shared,
    )


def settle_nccl(config: Config, is_cpu: bool) -> str | None:
    """Where weights will go to servers over NCCL: what must be the same there, set before NCCL's first call. A warning,
    or None."""
    by_nccl = config.rollout.engine == "sglang" and config.publish.mode == "distributed" and not is_cpu
    return nccl.settle_cumem() if by_nccl else None


def settle_interface(config: Config, is_cpu: bool) -> None:
    """Where weights will go to servers over NCCL, and no interface is named yet, as for ranks of one host: the one that
    leads to the first server elsewhere that is known by now. After the ranks' first meeting, and before NCCL's first
    call: it asks once."""
    if (
        is_cpu
        or config.rollout.engine != "sglang"
        or config.publish.mode != "distributed"
        or network.NCCL in os.environ
    ):
        return
    for host in filter(None, (urlsplit(url).hostname for url in _configured(config.servers))):
        with contextlib.suppress(OSError, UnicodeError):
            if not network.is_here(host):
                network.use_interface(network.interface_towards(host), gloo=False)
                return


def publish_options(config: Config, is_cpu: bool) -> PublishOptions:
    """How the configuration wants weights to be published."""
    publish = config.publish
    return PublishOptions(
        mode=publish.mode,
        backend="gloo" if is_cpu else "nccl",
        bucket_bytes=publish.bucket_bytes,
        timeout=publish.timeout_seconds,
        bucket_timeout=publish.bucket_timeout_seconds,
        address=publish.address,
        folder=(publish.folder or Path(config.output) / "published") if publish.mode == "disk" else None,
        verify=publish.verify,
        tolerance=publish.tolerance or TOLERANCES[config.model.dtype],
        min_servers=config.servers.min_healthy,
        # A batch that is sampled beside training goes on under the new weights, with its cache computed anew.
        pause="retract" if config.rollout.max_staleness else "abort",
    )


def _configured(servers: ServersSection) -> dict[str, list[str] | None]:
    """Of the servers that ``servers.urls`` or ``servers.file`` names now: the address, and its GPUs as far as known."""
    if servers.urls or not servers.file:
        return dict.fromkeys(servers.urls)
    return listed_servers(Path(servers.file))


def listed_servers(file: Path) -> dict[str, list[str] | None]:
    """The servers in a file of ``dcpo serve`` (a JSON list), or in all ``*.json`` of a folder, in the order of their
    names; none while there are none.

    An entry is an address, or ``{"url": address, "gpus": [uuid, ...]}``: address -> uuids of its GPUs, None where the
    file does not tell.
    """
    found: dict[str, list[str] | None] = {}
    for part in sorted(file.glob("*.json")) if file.is_dir() else [file]:
        try:
            read = json.loads(part.read_text(encoding="utf-8"))
            entries: list[Any] = read if isinstance(read, list) else [None]
            for entry in entries:
                url, gpus = (entry, None) if isinstance(entry, str) else (entry["url"], list(entry["gpus"]))
                found.setdefault(url, gpus)
        except FileNotFoundError:
            continue
        except (ValueError, TypeError, KeyError):
            raise ConfigError(
                f"servers.file: {part} is not a JSON list of addresses: give the file that `dcpo serve` writes"
            ) from None
    try:
        for url in found:
            check_url(url)
    except ValueError as error:
        raise ConfigError(f"servers.file: {file}: {error}") from None
    return found


def _addresses(config: Config, key: str | None, announce, tick, stop) -> dict[str, list[str] | None]:
    """The servers of the run, the same on every rank, as soon as enough of them answer: address -> uuids of its GPUs
    where they are known.

    One that refuses is named at once and not waited for; where not enough can be left, the run ends.
    """
    servers = config.servers
    wanted = servers.count or servers.min_healthy if servers.file else len(servers.urls)
    seconds = servers.start_timeout_seconds
    asked: dict[str, Server] = {}
    answers: dict[str, ServerError | None] = {}
    listed: dict[str, list[str] | None] = {}
    said: set[str] = set()

    def refuses(url: str) -> bool:
        error = answers[url]
        # 502: what stands between has no server behind it.
        return error is not None and (error.final or error.status == 502)

    def look() -> str | None:
        try:
            now = _configured(servers)
        except ConfigError as error:
            return f"!{error}"
        listed.clear()
        listed.update(now)
        for url in listed:
            if url not in asked:
                asked[url] = stack.enter_context(contextlib.closing(Server(url, api_key=key)))
        found = look_at([asked[url] for url in listed if url not in answers or answers[url] is not None], 2.0)
        answers.update(found)
        say_refusals(found, said, announce)
        refusals = [url for url in listed if refuses(url)]
        if max(wanted, len(listed)) - len(refusals) < servers.min_healthy:
            return f"?{'; '.join(str(answers[url]) for url in refusals)}"
        able = len(listed) >= wanted and all(answers[url] is None or refuses(url) for url in listed)
        return json.dumps(listed) if able and len(listed) - len(refusals) >= servers.min_healthy else None

    announce(f"waiting for {wanted} rollout servers, at most {seconds:.0f} s")
    with contextlib.ExitStack() as stack:
        found = wait_together(look, seconds, tick, stop)
    if found is None:
        # Those that answer will do, where they are enough.
        mine = [_briefly(url, error) for url in listed if (error := answers[url]) is not None]
        agreed = wait_together(lambda: json.dumps([mine, listed]), 1.0, tick, stop)
        assert agreed is not None  # there is nothing to wait for
        missing, listed = json.loads(agreed)
        if len(listed) - len(missing) < servers.min_healthy:
            what = f"{', '.join(missing)} did not answer" if missing else f"{servers.file} lists {len(listed)} servers"
            raise RolloutError(
                f"{what} within servers.start_timeout_seconds={seconds:g}, and {servers.min_healthy} healthy ones are"
                f" needed: start them (dcpo serve), or correct servers.urls or servers.file{_about_loopback(missing)}"
            )
        announce(f"going on with {len(listed) - len(missing)} of {max(wanted, len(listed))} rollout servers")
        return listed
    if found.startswith("!"):
        raise ConfigError(found[1:])
    if found.startswith("?"):
        raise RolloutError(found[1:])
    return json.loads(found)


def _look_from_every_host(urls: list[str], router: str | None, key: str | None, announce) -> None:
    """Collective: the first rank of each host asks the servers, or the router, once. What rank 0 reaches, another host
    may not: by its names, routes and firewalls.

    Raises:
        RolloutError: a host reaches none of those that rank 0 reaches; the same on every rank.
    """
    mine: dict[str, str] = {}
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        asked = [Server(url, api_key=key) for url in ([router] if router else urls)]
        ask = (lambda server: server.get("/health", timeout=_LOOK_SECONDS)) if router else None
        mine = {url: str(error) for url, error in look_at(asked, _LOOK_SECONDS, ask).items() if error is not None}
        for server in asked:
            server.close()
    hosts = [json.loads(part) for part in all_gather_on_host(json.dumps([socket.gethostname(), mine]).encode())]
    reached = [url for url in ([router] if router else urls) if url not in hosts[0][1]]
    for rank, (host, failed) in enumerate(hosts):
        lacking = [url for url in reached if url in failed]
        if not lacking:
            continue
        what = f"host {host} (rank {rank}) does not reach {', '.join(lacking)}, which rank 0 on {hosts[0][0]} does"
        if len(lacking) == len(reached):
            raise RolloutError(f"{what}: {failed[lacking[0]]}{_about_loopback(lacking)}")
        announce(f"{what}: it samples on the others. {failed[lacking[0]]}")


def _about_loopback(urls: list[str]) -> str:
    if not any(bare(urlsplit(url.split()[0]).hostname or "") in LOOPBACK for url in urls):
        return ""
    own = " and ".join(LOOPBACK)
    return f"; {own} are each host itself: servers for other hosts need `dcpo serve --host 0.0.0.0` and a key"


def _briefly(url: str, error: ServerError) -> str:
    return url if error.status is None else f"{url} (status {error.status})"
