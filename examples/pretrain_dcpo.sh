#!/usr/bin/env bash
""":"
# Trains with DCPO. The same job, started any of these ways:
#
#   bash examples/pretrain_dcpo.sh --config demo model.path=... data.files=[...]
#   torchrun --nproc-per-node 2 examples/pretrain_dcpo.sh --config ...
#   torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 --rdzv-id JOB examples/pretrain_dcpo.sh --config ...
#
# This file is bash and Python at once: to bash, what follows is a script and the Python below a here-document; to
# Python (torchrun hands it the file) the script is a string.
#
# Started by bash it takes from the environment: NPROC_PER_NODE (default: the visible GPUs of this host, or 1), and for several nodes NNODES, NODE_RANK,
# MASTER_ADDR, MASTER_PORT; PYTHON names the interpreter (default: the project's .venv, else python3).
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ -x "$here/../.venv/bin/python" ] && [ -z "${VIRTUAL_ENV:-}" ] && PYTHON="$here/../.venv/bin/python"
fi
if [ -z "${NPROC_PER_NODE:-}" ]; then
  # Those that CUDA_VISIBLE_DEVICES leaves: servers may have the others.
  NPROC_PER_NODE="$(PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}" "$PYTHON" -m dcpo_megatron.gpus)"
  [ "$NPROC_PER_NODE" -gt 0 ] || NPROC_PER_NODE=1
fi
if [ "${NNODES:-1}" = 1 ]; then
  exec "$PYTHON" "$here/pretrain_dcpo.sh" --ranks "$NPROC_PER_NODE" "$@"
fi
exec "$PYTHON" "$here/pretrain_dcpo.sh" --ranks "$NPROC_PER_NODE" --nodes "$NNODES" --node-rank "${NODE_RANK:?set NODE_RANK to 0..NNODES-1}" \
  --master-addr "${MASTER_ADDR:?set MASTER_ADDR to the first host}" --master-port "${MASTER_PORT:-29500}" "$@"
: <<'pass' # what follows is Python, down to the line "pass"
":"""

import sys
from pathlib import Path

# A checkout runs without being installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dcpo_megatron.cli.train import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
pass
