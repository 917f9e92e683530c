"""Keeps the notes of libraries that a user can do nothing about out of the console; DCPO_VERBOSE=1 shows them."""

from __future__ import annotations

import logging
import os
import sys
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


def write_any_letter() -> None:
    """A letter that the console's encoding lacks is printed as its escape: nothing ends for a prompt in another
    script."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")
