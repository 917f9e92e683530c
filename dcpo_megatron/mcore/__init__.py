"""Everything that touches Megatron-Core. Call :func:`dcpo_megatron.mcore.platform.start` (or ``prepare``) before
building anything.

The names below are the loss plugin, usable in any trainer on Megatron-Core; see :mod:`dcpo_megatron.mcore.loss` for the
ten lines that use it.
"""

_PLUGIN = {
    "make_loss": "loss",
    "response_head": "head.response_head",
    "logprobs_from_hidden": "head.response_head",
    "make_micro_batch": "batch",
    "MicroBatch": "batch",
    "TrainingSample": "batch",
    "unwrap": "model",
}

__all__ = list(_PLUGIN)


def __getattr__(name: str):
    # Late, so that importing the package does not import Megatron-Core before the platform is prepared.
    if name in _PLUGIN:
        import importlib

        return getattr(importlib.import_module(f"dcpo_megatron.mcore.{_PLUGIN[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
