#!/usr/bin/env python3
"""Weights between Hugging Face folders and Megatron checkpoints; the same as ``dcpo convert``. See ``--help``."""

import sys
from pathlib import Path

# A checkout runs without being installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dcpo_megatron.cli.convert import main

if __name__ == "__main__":
    sys.exit(main())
