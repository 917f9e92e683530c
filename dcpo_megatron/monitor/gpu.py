"""GPU use of rank 0's device by NVML (nvidia-ml-py); says nothing where there is no GPU."""

from __future__ import annotations

from dcpo_megatron.mcore.platform import Platform


def device_memory(platform: Platform) -> int | None:
    """Bytes of this rank's GPU; None on the CPU platform."""
    if platform.is_cpu:
        return None
    import torch

    return torch.cuda.get_device_properties(platform.device).total_memory


class GpuMonitor:
    """Reads utilisation and memory of this rank's GPU. Inert on the CPU platform or without a driver."""

    def __init__(self, platform: Platform):
        self._handle = None
        if platform.is_cpu:
            return
        import pynvml
        import torch

        try:
            pynvml.nvmlInit()
            uuid = torch.cuda.get_device_properties(platform.device).uuid
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except pynvml.NVMLError:
            self._handle = None

    def read(self) -> dict[str, float]:
        """``gpu_utilization`` in 0..1 and ``gpu_memory_bytes``, or nothing."""
        if self._handle is None:
            return {}
        import pynvml

        try:
            return {
                "gpu_utilization": pynvml.nvmlDeviceGetUtilizationRates(self._handle).gpu / 100.0,
                "gpu_memory_bytes": float(pynvml.nvmlDeviceGetMemoryInfo(self._handle).used),
            }
        except pynvml.NVMLError:
            return {}

    def close(self) -> None:
        if self._handle is not None:
            import pynvml

            pynvml.nvmlShutdown()
            self._handle = None
