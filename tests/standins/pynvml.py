"""Stands for NVIDIA's driver: a host of DCPO_TEST_GPUS GPUs (8). On the import path it hides nvidia-ml-py."""

import os


class NVMLError(Exception):
    pass


def nvmlInit():
    pass


def nvmlShutdown():
    pass


def nvmlDeviceGetCount() -> int:
    return int(os.environ.get("DCPO_TEST_GPUS", "8"))


def nvmlDeviceGetHandleByIndex(index: int) -> int:
    return index


def nvmlDeviceGetUUID(index: int) -> str:
    return uuid(index)


def uuid(index: int) -> str:
    return f"GPU-a{index}000000-0000-0000-0000-000000000000"
