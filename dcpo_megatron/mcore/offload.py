"""What training needs and sampling does not, moved to the host while servers have the GPU.

                           bytes a parameter (bf16, Adam)     while servers sample
    weights                2                                  stay: they are what is published
    gradients, fp32        4                                  freed; each update begins with zeros
    main weights, moments  4 + 8, over the ranks' shards      on the host, in memory that is kept

Megatron-Core's own ``offload_to_cpu`` takes fp32 parameters off the buffer of weights that they are views of; here they
stay.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dcpo_megatron.mcore.step import PolicyModel


class OptimizerOffload:
    """Optimizer state and gradients of ``policy``, on its device until :meth:`to_host` and again from :meth:`to_device`
    on. Both are harmless when called again.

    While they are away a checkpoint can be taken, and a forward pass be run.
    """

    def __init__(self, policy: PolicyModel):
        self.policy = policy
        self.away = False
        self._kept: list[torch.Tensor] = []

    def to_host(self) -> None:
        """Frees their memory on the device, as far as the allocator's cache: ``torch.cuda.empty_cache`` gives it to
        others."""
        if self.away:
            return
        # The shards' gradients are views of the buffers, or copies of them.
        self.policy.optimizer.zero_grad()
        for number, tensor in enumerate(self._tensors()):
            tensor.data = self._host(number, tensor).copy_(tensor)
        for chunk in self.policy.chunks:
            chunk.offload_grad_buffers(empty_cache=False)
        self.away = True

    def to_device(self) -> None:
        """Takes them back, bit for bit; gradients are zero."""
        if not self.away:
            return
        device = self.policy.platform.device
        for chunk in self.policy.chunks:
            chunk.restore_grad_buffers()
        for tensor in self._tensors():
            tensor.data = tensor.data.to(device, copy=True)
        self.away = False

    def _tensors(self) -> Iterator[torch.Tensor]:
        weights = {p.untyped_storage().data_ptr() for module in self.policy.modules for p in module.parameters()}
        for part in getattr(self.policy.optimizer, "chained_optimizers", [self.policy.optimizer]):
            inner = part.optimizer
            states = [value for state in inner.state.values() for value in state.values()]
            for tensor in [*(p for group in inner.param_groups for p in group["params"]), *states]:
                # Adam's step is one number, and on the host already.
                if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.numel():
                    if tensor.untyped_storage().data_ptr() not in weights:
                        yield tensor

    def _host(self, number: int, like: torch.Tensor) -> torch.Tensor:
        if number == len(self._kept):
            self._kept.append(torch.empty(0))
        kept = self._kept[number]
        if kept.shape != like.shape or kept.dtype != like.dtype:
            # Pinned: the way there and back goes at the bus's full speed.
            kept = torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=not self.policy.platform.is_cpu)
            self._kept[number] = kept
        return kept
