"""The cluster as a fixture: started once for the tests of this folder, stopped whatever happens."""

import os
import tempfile
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, Unavailable, install


@pytest.fixture(scope="session")
def cluster():
    """A running :class:`Cluster`. Where this machine cannot have one: skips with the reason, or fails where
    DCPO_TEST_SLURM=required (`make test-slurm`)."""
    refuse = pytest.fail if os.environ.get("DCPO_TEST_SLURM") == "required" else pytest.skip
    # Not pytest's folder: Slurm's sockets need short names, and munge wants to know who may enter.
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        running = Cluster(folder)
        try:
            try:
                install()
                running.start()
            except Unavailable as error:
                refuse(f"no Slurm on this machine: {error}")
            yield running
        finally:
            running.stop()
