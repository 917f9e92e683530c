"""Functions that run on the ranks of a pool (they must be importable by name there)."""


def train(overrides: list[str]) -> list[dict]:
    """A whole training run on the ranks of this job; every rank returns its steps' metrics."""
    import torch.distributed as dist

    from dcpo_megatron.config.schema import load_config
    from dcpo_megatron.mcore.platform import select_platform
    from dcpo_megatron.training.build import build_trainer
    from dcpo_megatron.training.checks import check_run

    assert select_platform("cpu").is_cpu
    trainer = build_trainer(check_run(load_config([], overrides), dist.get_world_size()))
    try:
        trainer.run()
        return trainer.progress.metrics
    finally:
        trainer.phase.rewarder.close()
        trainer.monitors.sinks.close()
