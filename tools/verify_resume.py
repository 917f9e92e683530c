#!/usr/bin/env python3
"""Proves that a run cannot be lost: kills a small run with SIGKILL again and again, or cuts the links between its
hosts, starts it anew each time by the same command, and compares it with one that nobody disturbed. See ``--help``."""

import sys
from pathlib import Path

# A checkout runs without being installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dcpo_megatron.verification.resumption import main
from tools.link_cuts import verify

if __name__ == "__main__":
    sys.exit(main(cut_links=verify))
