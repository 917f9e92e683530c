#!/usr/bin/env bash
# What needs a GPU, in parts: `bash tools/gpu_check.sh --list` says which. All of it is tools/gpu_check.py; PYTHON names the interpreter whose packages are used.
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_check.py" "$@"
