"""The parallel layout of a run and its process groups.

``world = tensor x pipeline x context x data``; experts take their ranks from the same world.
:meth:`ParallelLayout.problems` knows everything that can be wrong before a process group exists; :func:`make_groups`
then asks Megatron-Core for the groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.distributed as dist

from dcpo_megatron.mcore.hf_config import ModelShape


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes of each parallel dimension, in ranks. ``virtual_pipeline`` is the number of model chunks a pipeline rank
    holds (None: one).

    ``first_stage_layers`` and ``last_stage_layers``: layers of the first and the last pipeline stage, whose embedding
    and output layer are work too; the other stages share the rest evenly. None: as many as the others.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int | None = None
    context: int = 1
    expert: int = 1
    expert_tensor: int | None = None
    sequence_parallel: bool = False
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one copy of the model: tensor x pipeline x context."""
        return self.tensor * self.pipeline * self.context

    @property
    def interleaved(self) -> bool:
        """Whether a pipeline rank holds several model chunks (Megatron-Core's interleaved schedule)."""
        return self.virtual_pipeline not in (None, 1)

    def data_parallel(self, world_size: int) -> int:
        """Pure data-parallel size of ``world_size`` ranks (context-parallel ranks not counted)."""
        return world_size // self.model_ranks

    def stage_layers(self, layers: int) -> list[list[range]]:
        """The global layers, counted from 0, that each chunk of each pipeline rank holds:
        ``stage_layers(layers)[rank][chunk]``.

        Chunks go round the ranks, as Megatron-Core deals them; 6 layers over ``pipeline=2, virtual_pipeline=2,
        first_stage_layers=2`` give

            rank 0   chunk 0: 0      chunk 1: 3
            rank 1   chunk 0: 1, 2   chunk 1: 4, 5

        Raises:
            ValueError: the stages cannot be made of so many layers.
        """
        found = self._stage_problems(layers)
        if found:
            raise ValueError("; ".join(found))
        chunks = self.virtual_pipeline or 1
        stages: list[list[range]] = [[] for _ in range(self.pipeline)]
        start = 0
        for _ in range(chunks):
            for stage, size in zip(stages, self._stage_sizes(layers), strict=True):
                stage.append(range(start, start + size // chunks))
                start += size // chunks
        return stages

    def _given_stages(self) -> dict[str, int]:
        given = {"first_stage_layers": self.first_stage_layers, "last_stage_layers": self.last_stage_layers}
        return {name: size for name, size in given.items() if size is not None}

    def _stage_sizes(self, layers: int) -> list[int]:
        """Layers of each pipeline rank, where :meth:`_stage_problems` has none."""
        given = self._given_stages()
        middle = self.pipeline - len(given)
        sizes = [(layers - sum(given.values())) // middle if middle else 0] * self.pipeline
        if "first_stage_layers" in given:
            sizes[0] = given["first_stage_layers"]
        if "last_stage_layers" in given:
            sizes[-1] = given["last_stage_layers"]
        return sizes

    def _stage_problems(self, layers: int) -> list[str]:
        """Why ``layers`` cannot be cut into this layout's stages and chunks. Megatron-Core's own checks let negative
        remainders through."""
        given, chunks = self._given_stages(), self.virtual_pipeline or 1
        if self.pipeline == 1:
            wanted = {"virtual_pipeline": self.virtual_pipeline} if self.interleaved else {}
            return [
                f"parallel.{name}={size} needs parallel.pipeline of at least 2"
                for name, size in (wanted | given).items()
            ]
        if not given:
            if layers % (self.pipeline * chunks):
                return [
                    f"parallel.pipeline x virtual_pipeline = {self.pipeline * chunks} does not divide the model's"
                    f" {layers} layers"
                ]
            return []
        found = []
        rest, middle = layers - sum(given.values()), self.pipeline - len(given)
        said = " and ".join(f"parallel.{name}={size}" for name, size in given.items())
        if not middle and rest:
            found.append(f"{said} must add up to the model's {layers} layers: parallel.pipeline=2 has no other stages")
        elif middle and (rest < middle or rest % middle):
            found.append(
                f"{said} of the model's {layers} layers leave {rest} for the other {middle} pipeline stages: "
                "they need at least one each, and equally many"
            )
        else:
            uneven = sorted({size for size in self._stage_sizes(layers) if size % chunks})
            if uneven:
                found.append(
                    f"parallel.virtual_pipeline={chunks} does not divide the {' and the '.join(map(str, uneven))}"
                    f" layers of a pipeline stage ({said}, {layers} layers in all)"
                )
        return found

    def problems(self, shape: ModelShape, world_size: int, overlap_p2p: bool = True) -> list[str]:
        """Every reason why this layout cannot run ``shape`` on ``world_size`` ranks; an empty list when it can.

        ``overlap_p2p``: whether pipeline stages talk with overlap (``overlap_p2p_comm=True, batch_p2p_comm=False``).
        """
        found = []
        sizes = ("tensor", "pipeline", "context", "expert", "expert_tensor", "virtual_pipeline")
        for name in (*sizes, "first_stage_layers", "last_stage_layers"):
            size = getattr(self, name)
            if size is not None and size < 1:
                found.append(f"parallel.{name}={size} must be at least 1")
        if found:
            return found
        if world_size % self.model_ranks:
            found.append(
                f"world size {world_size} is not a multiple of tensor x pipeline x context = {self.tensor} x"
                f" {self.pipeline} x {self.context} = {self.model_ranks}: start a multiple of {self.model_ranks} ranks"
            )
        if shape.heads % self.tensor:
            found.append(f"parallel.tensor={self.tensor} does not divide the model's {shape.heads} attention heads")
        if shape.kv_heads % self.tensor:
            found.append(f"parallel.tensor={self.tensor} does not divide the model's {shape.kv_heads} key-value heads")
        # With experts every layer has them, and nothing has this width.
        if not shape.experts and shape.ffn % self.tensor:
            found.append(f"parallel.tensor={self.tensor} does not divide the feed-forward width {shape.ffn}")
        if self.sequence_parallel and self.tensor == 1:
            found.append("parallel.sequence_parallel=true needs parallel.tensor of at least 2")
        found += self._stage_problems(shape.layers)
        if self.interleaved and self.pipeline == 2 and not overlap_p2p:
            found.append(
                "parallel.virtual_pipeline with parallel.pipeline=2 gives silently wrong gradients in Megatron-Core"
                " without overlapped communication: set parallel.overlap_p2p=true"
            )
        if self.expert > 1 and not shape.experts:
            found.append(f"parallel.expert={self.expert}, but {shape.model_type} has no experts")
        if shape.experts and shape.experts % self.expert:
            found.append(f"parallel.expert={self.expert} does not divide the model's {shape.experts} experts")
        expert_tensor = self.expert_tensor or self.tensor
        if shape.experts and shape.expert_ffn % expert_tensor:
            found.append(
                f"parallel.expert_tensor={expert_tensor} does not divide the experts' width {shape.expert_ffn}"
            )
        if shape.experts and world_size % (self.expert * expert_tensor * self.pipeline):
            found.append(f"world size {world_size} is not a multiple of expert x expert_tensor x pipeline")
        if shape.experts and self.tensor > 1 and not self.sequence_parallel:
            found.append(
                "a model with experts and parallel.tensor above 1 needs parallel.sequence_parallel=true"
                " (Megatron-Core's rule)"
            )
        return found


def alignment(tensor_size: int, context_size: int, sequence_parallel: bool) -> int:
    """Tokens that a row must be a multiple of: 2 x cp for the zigzag order, and tp more where the row is split over
    it."""
    unit = sequence_alignment(context_size)
    return math.lcm(unit, unit * tensor_size) if sequence_parallel else unit


def sequence_alignment(context_size: int) -> int:
    """Tokens that every sequence of a packed row must be a multiple of: 2 x cp for the zigzag order."""
    return 2 * context_size if context_size > 1 else 1


def padded_vocab(vocab: int, tensor_size: int, multiple: int = 128) -> int:
    """Rows of the embedding as Megatron holds it: ``vocab`` rounded up to a multiple of ``multiple * tensor_size``."""
    unit = multiple * tensor_size
    return math.ceil(vocab / unit) * unit


def make_groups(layout: ParallelLayout, timeout_minutes: int = 10) -> None:
    """Creates Megatron-Core's process groups for ``layout`` on the running default group."""
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.interleaved else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor or (layout.tensor if layout.expert > 1 else None),
        distributed_timeout_minutes=timeout_minutes,
        # The extra gloo groups serve checkpoint formats that are not used here.
        create_gloo_process_groups=False,
    )


@dataclass(frozen=True)
class RankPosition:
    """Where this rank stands: coordinates and groups, taken once from Megatron-Core so that nothing reads globals
    later."""

    tensor_rank: int
    tensor_size: int
    tensor_group: dist.ProcessGroup
    pipeline_rank: int
    pipeline_size: int
    pipeline_group: dist.ProcessGroup
    context_rank: int
    context_size: int
    context_group: dist.ProcessGroup
    data_rank: int
    data_size: int
    data_group: dist.ProcessGroup
    expert_rank: int
    expert_size: int
    expert_group: dist.ProcessGroup
    expert_tensor_rank: int
    expert_tensor_size: int
    expert_tensor_group: dist.ProcessGroup
    expert_data_rank: int

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def owns_loss(self) -> bool:
        """True on the ranks whose loss sums must be counted once: the last pipeline stage's first tensor rank."""
        return self.is_last_stage and self.tensor_rank == 0


def rank_position() -> RankPosition:
    """Reads this rank's coordinates from Megatron-Core's groups (after :func:`make_groups`)."""
    from megatron.core import parallel_state as mpu

    def of(group):
        return dist.get_rank(group), dist.get_world_size(group), group

    return RankPosition(
        *of(mpu.get_tensor_model_parallel_group()),
        *of(mpu.get_pipeline_model_parallel_group()),
        *of(mpu.get_context_parallel_group()),
        *of(mpu.get_data_parallel_group(with_context_parallel=False)),
        *of(mpu.get_expert_model_parallel_group()),
        *of(mpu.get_expert_tensor_parallel_group()),
        dist.get_rank(mpu.get_expert_data_parallel_group()),
    )
