"""Functions that run on the ranks of a pool (they must be importable by name there)."""


def train(overrides: list[str]) -> list[dict]:
    """A whole training run on the ranks of this job; every rank returns its steps' metrics."""
    return _run(overrides)


def _run(overrides: list[str], stop_after: int | None = None) -> list[dict]:
    import torch.distributed as dist

    from dcpo_megatron.config.loading import load_config
    from dcpo_megatron.mcore.platform import select_platform
    from dcpo_megatron.training.build import build_trainer
    from dcpo_megatron.training.checks import check_run

    assert select_platform("cpu").is_cpu
    trainer = build_trainer(check_run(load_config([], overrides), dist.get_world_size()))
    try:
        trainer.run(lambda: len(trainer.progress.metrics) == stop_after)
        return trainer.progress.metrics
    finally:
        trainer.phase.rewarder.close()
        trainer.monitors.sinks.close()


def train_and_count(overrides: list[str], stop_after: int | None = None) -> tuple[list[dict], int]:
    """The same, up to a stop after ``stop_after`` steps where it is given; and how many passes for old log-probs there
    were."""
    from dcpo_megatron.mcore.step import PolicyModel

    passes = []
    real = PolicyModel.logprobs

    def logprobs(self, micro_batches, **settings):
        if settings.get("objective") is not None:
            passes.append(len(micro_batches))
        return real(self, micro_batches, **settings)

    PolicyModel.logprobs = logprobs
    try:
        return _run(overrides, stop_after), len(passes)
    finally:
        PolicyModel.logprobs = real
