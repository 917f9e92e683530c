"""The ``dcpo`` command."""

import os

if os.environ.get("DCPO_VERBOSE") != "1":  # as quiet.py; torch reads it when it is imported
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
