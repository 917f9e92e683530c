"""Starts a run on several hosts by ssh, for clusters without Slurm: ``tools/launch_cluster.py --hosts A,B
--nproc-per-node 8 -- --config RECIPE ...``."""

import sys
from pathlib import Path

# A checkout runs without being installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dcpo_megatron.launch.ssh import main

if __name__ == "__main__":
    sys.exit(main())
