"""Keeps the notes of libraries that a user can do nothing about out of the console; DCPO_VERBOSE=1 shows them."""

from __future__ import annotations

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Call it before Megatron-Core and transformers are used; does nothing with DCPO_VERBOSE=1."""
    if os.environ.get("DCPO_VERBOSE") == "1":
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    warnings.filterwarnings("ignore", module=r"(megatron|torch|transformers)\b.*")
    warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine|is deprecated).*")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    import transformers

    transformers.utils.logging.disable_progress_bar()
