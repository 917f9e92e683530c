"""Hosts as a fixture: skipped with the reason where this machine cannot have them, a failure where
DCPO_TEST_HOSTS=required (`make test-hosts`)."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.hosts.machines import Hosts, Unavailable, install


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `thorough` are for `make test-hosts`."""
    if os.environ.get("DCPO_TEST_HOSTS") == "required":
        return
    left_out = [item for item in items if item.get_closest_marker("thorough")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def namespaces() -> None:
    """That hosts can be had."""
    refuse = pytest.fail if os.environ.get("DCPO_TEST_HOSTS") == "required" else pytest.skip
    try:
        install()
    except Unavailable as error:
        refuse(f"no hosts on this machine: {error}")


@pytest.fixture
def make_hosts(namespaces) -> Iterator[Callable[..., Hosts]]:
    """``make_hosts(2, names="loopback")``: running :class:`~tests.hosts.machines.Hosts`, taken down after the test
    whatever happens."""
    with ExitStack() as stack:

        def make(count: int, **options) -> Hosts:
            # Not pytest's folder: a host's sockets need short names.
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="hosts-", dir="/tmp"))
            return stack.enter_context(Hosts(count, Path(folder), **options))

        yield make
