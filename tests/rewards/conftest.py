"""Where the real answers lie: DCPO_TEST_DATA, by default beside the repository. Tests that need them skip without them."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    default = Path(__file__).resolve().parents[2].parent / "shared" / "data"
    folder = Path(os.environ.get("DCPO_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}: set DCPO_TEST_DATA to the folder with math500.parquet and the others")
    return folder
