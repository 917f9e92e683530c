"""Starts SGLang servers on this host: ``tools/serve_rollout.py MODEL --servers N`` is ``dcpo serve MODEL --servers
N``."""

import sys
from pathlib import Path

# A checkout runs without being installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dcpo_megatron.cli.serve import main

if __name__ == "__main__":
    sys.exit(main())
