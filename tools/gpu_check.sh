#!/usr/bin/env bash
# What needs a GPU, in one command: the tests that run on one, the certificate with nccl, and the benchmarks whose figures belong in docs/measurements.md.
#   bash tools/gpu_check.sh [FOLDER]        results go to FOLDER (default: runs/gpu-check); exit code 1 where any part failed
# PYTHON names the interpreter of an environment made by requirements/gpu.txt. Parts go on after a failure, so that one run tells everything.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
out=${1:-runs/gpu-check}
mkdir -p "$out"

if ! gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())') || [ "$gpus" -eq 0 ]; then
  echo "tools/gpu_check.sh: no GPU is visible to $python: nothing was run" >&2
  exit 2
fi

failed=0
part() { # NAME COMMAND...
  local name=$1
  shift
  echo "== $name: $*"
  "$@" 2>&1 | tee "$out/$name.log"
  local code=${PIPESTATUS[0]}
  [ "$code" -eq 0 ] || { echo "== $name failed with exit code $code"; failed=1; }
}

part environment "$python" -m dcpo_megatron.cli doctor
part tests "$python" -m pytest -rs tests/mcore tests/objectives
part certificate "$python" tools/verify_parallelism.py --device cuda --max-ranks "$gpus" --json "$out/certificate.json" --markdown "$out/certificate.md"
part logprobs-3584 "$python" tools/bench_logprobs.py --device cuda --dtype bfloat16 --tokens 32768 --hidden 3584 --vocab 152064 --json "$out/logprobs-3584.json"
part logprobs-1536 "$python" tools/bench_logprobs.py --device cuda --dtype bfloat16 --tokens 32768 --hidden 1536 --vocab 152064 --json "$out/logprobs-1536.json"
part step "$python" tools/bench_step.py --ranks "$gpus" --json "$out/step.json" training.platform=cuda model.dtype=bfloat16
exit "$failed"
