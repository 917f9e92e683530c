"""The GPUs of this host that a process started now would see, without a CUDA context and whatever torch was built for.

    driver (nvidia-smi's order)   GPU-a0  GPU-a1  GPU-a2  GPU-a3  GPU-a4 ...
    CUDA_VISIBLE_DEVICES=2,3,4            visible:  0        1       2        each with its uuid
    --gpus 1-2                                               chosen  chosen

One function counts them for everybody: the servers' launcher, the start scripts (``python -m dcpo_megatron.gpus``
prints the number), ``dcpo doctor``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class VisibleGpu:
    """``name``: what CUDA_VISIBLE_DEVICES calls it; ``uuid``: as nvidia-smi and torch tell it, None where no driver
    answers."""

    name: str
    uuid: str | None


def driver_uuids() -> list[str] | None:
    """The uuids of the driver's GPUs in the order of nvidia-smi; None without a driver that answers."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        found = [pynvml.nvmlDeviceGetUUID(handle) for handle in handles]
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()
    # Old releases of the bindings answer bytes.
    return [uuid.decode() if isinstance(uuid, bytes) else uuid for uuid in found]


def visible_gpus(environment: Mapping[str, str] = os.environ) -> list[VisibleGpu]:
    """Those that CUDA_VISIBLE_DEVICES names where it is set, otherwise all that the driver knows; none without a
    driver."""
    return select(environment.get(VISIBLE), driver_uuids())


def select(visible: str | None, uuids: Sequence[str] | None) -> list[VisibleGpu]:
    """``uuids``: the driver's, None where nobody knows. As CUDA does it, the first name that is none (``-1``, empty, a
    number too large) hides all after it."""
    if visible is None:
        return [VisibleGpu(str(number), uuid) for number, uuid in enumerate(uuids or ())]
    found = []
    for name in (word.strip() for word in visible.split(",")):
        if name in ("", "-1"):
            break
        uuid = None
        if uuids is not None and not name.startswith("MIG-"):  # a slice of a GPU is not in the driver's list
            known = [uuid for number, uuid in enumerate(uuids) if name == str(number) or _abbreviates(name, uuid)]
            if len(known) != 1:
                break
            (uuid,) = known
        found.append(VisibleGpu(name, uuid))
    return found


def choose(wanted: str, gpus: Sequence[VisibleGpu]) -> list[VisibleGpu]:
    """The GPUs that ``wanted`` names: ``4-7``, ``4,5,6,7`` (numbers among ``gpus``, from 0), uuids or their beginnings.

    Raises:
        ValueError: a word that is neither, a GPU that is not among ``gpus``, or one twice.
    """
    found: list[VisibleGpu] = []
    for word in (word.strip() for word in wanted.split(",")):
        first, dash, last = word.partition("-")
        if word.isdecimal() or (dash and first.isdecimal() and last.isdecimal()):
            numbers = range(int(first), int(last or first) + 1)
            if not numbers or numbers[-1] >= len(gpus):
                raise ValueError(f"{word} is not among the {len(gpus)} GPUs that are visible here, numbered from 0")
            found += [gpus[number] for number in numbers]
        else:
            named = [gpu for gpu in gpus if word in (gpu.name, gpu.uuid) or _abbreviates(word, gpu.uuid or "")]
            if len(named) != 1:
                raise ValueError(f"{word!r} names {len(named)} of the {len(gpus)} GPUs that are visible here")
            found += named
    for gpu in found:
        if found.count(gpu) > 1:
            raise ValueError(f"GPU {gpu.name} is named twice")
    return found


def _abbreviates(name: str, uuid: str) -> bool:
    return len(name) > len("GPU-") and name.startswith("GPU-") and uuid.startswith(name)


if __name__ == "__main__":
    print(len(visible_gpus()))
