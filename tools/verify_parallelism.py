#!/usr/bin/env python3
"""Proves that every parallel layout gives the gradient of one process; the same as ``dcpo verify``. See ``--help``."""

import sys
from pathlib import Path

# A checkout runs without being installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dcpo_megatron.cli.verify import main

if __name__ == "__main__":
    sys.exit(main())
