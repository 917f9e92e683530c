"""How many GPUs servers on this host may have, without a CUDA context and without torch's build mattering."""

from __future__ import annotations

import os


def visible_gpus() -> int:
    """Those of CUDA_VISIBLE_DEVICES where it is set, otherwise all that the driver knows; 0 without a driver."""
    import pynvml

    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return len([word for word in visible.split(",") if word.strip() not in ("", "-1")])
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return 0
    try:
        return pynvml.nvmlDeviceGetCount()
    finally:
        pynvml.nvmlShutdown()


def gpus_of(device: str) -> int | None:
    """The GPUs for ``device`` "auto" | "cuda" | "cpu"; None: serve on the CPU."""
    if device == "cpu":
        return None
    found = visible_gpus()
    return found if found or device == "cuda" else None
