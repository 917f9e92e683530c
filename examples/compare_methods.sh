#!/usr/bin/env bash
# Compares GRPO, DAPO, GSPO, DCPO and DCPO's three components, five seeds each, on a CPU: the whole study, from nothing to the report in runs/compare/report.
#
#   bash examples/compare_methods.sh                                    # the study (docs/comparison.md)
#   bash examples/compare_methods.sh my-plan.yaml --output runs/mine    # another plan
#   bash examples/compare_methods.sh --parallel 1                       # one run at a time
#
# Stopped or killed, the same command goes on. PYTHON names the interpreter (default: the project's .venv, else python3).
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ -x "$root/.venv/bin/python" ] && [ -z "${VIRTUAL_ENV:-}" ] && PYTHON="$root/.venv/bin/python"
fi
plan="$root/examples/configs/compare.yaml"
case "${1:-}" in
  "" | -*) ;;
  *) plan="$1" && shift ;;
esac
# A checkout runs without being installed.
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$PYTHON" -m dcpo_megatron.cli compare "$plan" "$@"
