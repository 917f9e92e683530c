"""Lets stock Megatron-Core run on a machine without a GPU.

Megatron-Core names CUDA in a few fixed ways: ``torch.cuda.current_device()`` as the device of a factory call,
``device="cuda"``, ``Tensor.cuda()``, ``Tensor.type()`` compared with ``"torch.cuda.FloatTensor"``, CUDA streams and
CUDA random generators. Each of them is answered here with its CPU meaning, from outside the package; nothing in
Megatron-Core is copied or changed on disk. This is the only module of the project that knows of it: everything else
asks :mod:`dcpo_megatron.mcore.platform` and writes device-neutral code.

Only attributes are replaced (no ``TorchFunctionMode``), so an ordinary operator costs what it costs without this
module.
"""

from __future__ import annotations

import contextlib
import functools

import torch

_FACTORIES = (
    "tensor", "as_tensor", "empty", "zeros", "ones", "full", "rand", "randn", "randint", "randperm", "arange",
    "linspace", "eye",
    "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like",
)  # fmt: skip

_installed = False


def _is_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.split(":")[0] == "cuda"


class InertStream:
    """Stands for a CUDA stream or event where there is one queue only: every call returns at once."""

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        return False

    def wait_stream(self, other):
        pass

    wait_event = wait_stream

    def record(self, stream=None):
        return self

    record_event = record

    def wait(self, stream=None):
        pass

    def synchronize(self):
        pass

    def query(self):
        return True


def _on_cpu(factory):
    @functools.wraps(factory)
    def call(*args, **kwargs):
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = torch.device("cpu")
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return call


def _all_gather_of_any_sizes(all_gather):
    """nccl gathers tensors of different sizes (experts that got different numbers of tokens); gloo refuses them."""

    @functools.wraps(all_gather)
    def call(tensor_list, tensor, group=None, async_op=False):
        if async_op or all(part.shape == tensor_list[0].shape for part in tensor_list):
            return all_gather(tensor_list, tensor, group=group, async_op=async_op)
        rank = torch.distributed.get_rank(group)
        for source, part in enumerate(tensor_list):
            if source == rank:
                part.copy_(tensor)
            _from_each(torch.distributed.broadcast, part, source, group)
        return None

    return call


def _reduce_scatter_of_any_sizes(reduce_scatter):
    @functools.wraps(reduce_scatter)
    def call(output, input_list, op=torch.distributed.ReduceOp.SUM, group=None, async_op=False):
        if async_op or all(part.shape == input_list[0].shape for part in input_list):
            return reduce_scatter(output, input_list, op=op, group=group, async_op=async_op)
        rank = torch.distributed.get_rank(group)
        for target, part in enumerate(input_list):
            part = part.clone(memory_format=torch.contiguous_format)
            _from_each(functools.partial(torch.distributed.reduce, op=op), part, target, group)
            if target == rank:
                output.copy_(part)
        return None

    return call


def _from_each(collective, part: torch.Tensor, rank: int, group) -> None:
    """Runs a rooted collective on ``part`` with ``rank`` of ``group`` as its root; a view that is not contiguous
    travels as a copy."""
    if part.numel() == 0:
        return
    root = rank if group is None else torch.distributed.get_global_rank(group, rank)
    whole = part.contiguous()
    collective(whole, root, group=group)
    if whole is not part:
        part.copy_(whole)


@contextlib.contextmanager
def _uncompiled():
    """Megatron-Core compiles its small functions (``jit_fuser``: torch.compile, taken as it is imported), for the
    memory traffic of a GPU.

    On a CPU that is a C++ compiler at work in every rank, and seconds of imports before that: they run as they are
    written.
    """
    compile_ = torch.compile
    torch.compile = lambda function=None, **options: function if function else lambda function: function
    try:
        yield
    finally:
        torch.compile = compile_


def _no_gpu(device=None):
    raise RuntimeError("there is no GPU on the CPU platform")


def install() -> None:
    """Redirects CUDA requests of this process to the CPU; from then on there is no GPU for it. Calling it again does
    nothing.

    Raises:
        RuntimeError: a CUDA device is in use already; redirecting it would silently move work off the GPU.
    """
    global _installed
    if _installed:
        return
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        raise RuntimeError(
            "the CPU platform was asked for after CUDA was initialised in this process: "
            "start a fresh process with CUDA_VISIBLE_DEVICES= (empty) or set platform=cuda"
        )
    _installed = True
    _replace_factories_and_moves()
    _replace_cuda()
    torch.distributed.all_to_all_single = _with_sizes_as_lists(torch.distributed.all_to_all_single)
    torch.distributed.all_gather = _all_gather_of_any_sizes(torch.distributed.all_gather)
    torch.distributed.reduce_scatter = _reduce_scatter_of_any_sizes(torch.distributed.reduce_scatter)
    _replace_in_megatron()


def _replace_factories_and_moves() -> None:
    # torch.device(...) as a context (transformers builds models under "meta" with it) knows the factories by identity,
    # from a set that is made at its first use: it must hold the originals, which the stand-ins call.
    from torch.utils._device import _device_constructors

    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))

    tensor_type = torch.Tensor.type

    def type_(self, dtype=None, *args, **kwargs):
        if dtype is None and not args and not kwargs:
            return tensor_type(self).replace("torch.", "torch.cuda.", 1)
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.", 1)
        return tensor_type(self, dtype, *args, **kwargs)

    tensor_to = torch.Tensor.to

    def to(self, *args, **kwargs):
        if args and _is_cuda(args[0]):
            args = (torch.device("cpu"), *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = torch.device("cpu")
        return tensor_to(self, *args, **kwargs)

    torch.Tensor.type = type_
    torch.Tensor.to = to
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self


def _replace_cuda() -> None:
    cuda = torch.cuda
    # On a host with a GPU too: torch.compile, for one, asks the driver about every device that there is, in code that
    # never leaves the CPU.
    cuda.is_available = lambda: False
    cuda.device_count = lambda: 0
    cuda.get_device_properties = _no_gpu
    cuda.current_device = lambda: torch.device("cpu")
    cuda.set_device = lambda device: None
    cuda.synchronize = lambda device=None: None
    cuda.empty_cache = lambda: None
    cuda.Stream = cuda.Event = InertStream
    cuda.current_stream = cuda.default_stream = lambda device=None: InertStream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.device = lambda device: contextlib.nullcontext()
    cuda._lazy_call = lambda callback, **kwargs: callback()
    cuda._lazy_init = lambda: None
    # torch.manual_seed calls cuda.manual_seed_all, so that one must not call back.
    cuda.manual_seed = cuda.random.manual_seed = torch.default_generator.manual_seed
    cuda.manual_seed_all = cuda.random.manual_seed_all = lambda seed: None

    def get_rng_state(device="cpu"):
        return torch.get_rng_state()

    def set_rng_state(state, device="cpu"):
        torch.set_rng_state(state)

    for module in (cuda, cuda.random):
        module.get_rng_state = get_rng_state
        module.set_rng_state = set_rng_state


def _with_sizes_as_lists(all_to_all_single):
    """Megatron-Core moves the split sizes of an all-to-all to the host as lists only where they are CUDA tensors."""

    def call(output, input, output_split_sizes=None, input_split_sizes=None, *args, **kwargs):
        sizes = [s.tolist() if hasattr(s, "tolist") else s for s in (output_split_sizes, input_split_sizes)]
        return all_to_all_single(output, input, *sizes, *args, **kwargs)

    return call


def _replace_in_megatron() -> None:
    # Megatron-Core binds these at import, so they are replaced there and not in torch.cuda only.
    with _uncompiled():
        from megatron.core.tensor_parallel import random as mcore_random

    mcore_random._lazy_call = lambda callback, **kwargs: callback()
    mcore_random._lazy_init = lambda: None
    mcore_random.device_ctx_manager = lambda device: contextlib.nullcontext()
    mcore_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    mcore_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
