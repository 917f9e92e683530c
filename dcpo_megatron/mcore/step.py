"""Forward passes and updates through Megatron-Core's own schedule.

:class:`PolicyModel` holds the chunks, the optimizer and the layout of one rank; :meth:`PolicyModel.logprobs` is the
forward-only pass (old and reference log-probs), :meth:`PolicyModel.update` one optimizer step over a minibatch. Both
take lists of lists of :class:`~dcpo_megatron.mcore.batch.TrainingSample`: the micro-batches of THIS data-parallel
rank, the same number on every rank. All tensor-, pipeline- and context-parallel ranks of a data-parallel rank get the
same lists.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from dcpo_megatron.mcore.batch import MicroBatch, TrainingSample, make_micro_batch
from dcpo_megatron.mcore.fast_paths import finish_gathering
from dcpo_megatron.mcore.head.backend import head_blocks, takes_fused_head
from dcpo_megatron.mcore.head.response_head import response_head
from dcpo_megatron.mcore.hf_config import ModelShape
from dcpo_megatron.mcore.layout import ParallelLayout, RankPosition, alignment, padded_vocab, sequence_alignment
from dcpo_megatron.mcore.loss import MAX_NAMES, SUM_NAMES, make_loss
from dcpo_megatron.mcore.model import (
    ModelOptions,
    OptimizerOptions,
    build_model,
    build_trainable,
    model_paths,
    unwrap,
    uses_transformer_engine,
)
from dcpo_megatron.mcore.platform import Platform
from dcpo_megatron.objectives import Objective


@dataclass
class UpdateResult:
    """One optimizer step. ``sums`` and ``maxima`` are over ALL ranks and equal on each (see ``SUM_NAMES``,
    ``MAX_NAMES``)."""

    sums: dict[str, float]
    maxima: dict[str, float]
    gradient_norm: float
    stepped: bool
    lr: float


@dataclass
class PolicyModel:
    """The trained policy on this rank. Build with :meth:`create`, load weights into ``chunks``, then call
    :meth:`make_trainable`."""

    shape: ModelShape
    layout: ParallelLayout
    options: ModelOptions
    platform: Platform
    position: RankPosition
    temperature: float = 1.0
    packed: bool = True
    head_chunk_tokens: int = 1024
    head: str = "auto"  # auto | torch | triton
    fused_head_loss: str = (
        "auto"  # auto: where the objective allows it and its memory is small; on: wherever the objective allows it; off
    )
    chunks: list = field(default_factory=list)
    optimizer: object | None = None
    # Named spans of time: packing (tensors of micro-batches), forward_backward, optimizer.
    span: Callable[[str], AbstractContextManager] = nullcontext

    @classmethod
    def create(cls, shape, layout, options, platform, position, *, seed: int = 0, **settings) -> PolicyModel:
        """Builds the chunks of this rank with uninitialised weights. Raises ValueError for a head that is not known or
        cannot be had here."""
        model = cls(shape, layout, options, platform, position, **settings)
        head_blocks(model.head, platform.device.type)
        if model.fused_head_loss not in ("auto", "on", "off"):
            raise ValueError(f"model.fused_head_loss={model.fused_head_loss!r} is not known: use auto, on or off")
        model.chunks = build_model(shape, layout, options, platform, position, seed)
        return model

    def make_trainable(self, options: OptimizerOptions) -> None:
        """Adds DistributedDataParallel and the optimizer, after the weights are in place."""
        _, paths = model_paths(self.shape, self.layout, self.options, self.platform)
        self.chunks, self.optimizer = build_trainable(
            self.chunks, options, self.platform, paths.gradient_accumulation_fusion
        )

    def finish_gathering(self) -> None:
        """To be called before weights are read otherwise than by a forward pass; collective.

        See :func:`~dcpo_megatron.mcore.fast_paths.finish_gathering`.
        """
        finish_gathering(self.chunks)

    @property
    def modules(self) -> list:
        """The bare GPTModel chunks."""
        return [unwrap(chunk) for chunk in self.chunks]

    # -- batches -----------------------------------------------------------------------------------

    def _batch(self, sequences: Sequence[TrainingSample]) -> MicroBatch:
        return make_micro_batch(
            sequences,
            self.platform.device,
            packed=self.packed,
            align=sequence_alignment(self.layout.context),
            row_align=self._align,
            context_size=self.position.context_size,
            context_rank=self.position.context_rank,
            by_position=self._by_position,
        )

    @cached_property
    def _by_position(self) -> bool:
        return not uses_transformer_engine(self.options, self.platform)

    @property
    def _align(self) -> int:
        return alignment(self.layout.tensor, self.layout.context, self.layout.sequence_parallel)

    def _run(
        self, micro_batches: Sequence[Sequence[TrainingSample]], loss_of, *, forward_only: bool, fused: bool = False
    ):
        """Runs the schedule; returns the list of what the loss functions gave (on the last pipeline stage; empty
        elsewhere). ``fused``: with the fused head, or with its blocks where ``forward_only``.

        Tensors of a micro-batch are made when its turn comes, and kept only until every model chunk of this rank has
        had it.
        """
        made: dict[int, tuple[MicroBatch, int]] = {}

        def batches() -> Iterator[MicroBatch]:
            for number, sequences in enumerate(micro_batches):
                batch, uses = made.pop(number, (None, 0))
                if batch is None:
                    with self.span("packing"):
                        batch = self._batch(sequences)
                if uses + 1 < len(self.chunks):
                    made[number] = (batch, uses + 1)
                yield batch

        def forward_step(iterator: Iterator[MicroBatch], chunk):
            batch = next(iterator)
            loss = loss_of(batch)
            head = response_head(
                unwrap(chunk),
                batch.positions,
                batch.targets,
                vocab=self.shape.vocab,
                temperature=self.temperature,
                chunk_tokens=self.head_chunk_tokens,
                head=self.head,
                fused_loss=loss if fused and not forward_only else None,
                blocks_of_fused=fused,
            )
            with head as extra:
                output = chunk(
                    input_ids=batch.input_ids,
                    position_ids=batch.position_ids,
                    attention_mask=None,
                    packed_seq_params=batch.packed,
                    **extra,
                )
            return output, loss

        iterators = [batches() for _ in self.chunks]
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=len(micro_batches),
            # Not read: without pipeline stages nothing is sent, with them shapes travel with the tensors.
            seq_length=self._align,
            micro_batch_size=1,
            forward_only=forward_only,
        )

    # -- forward only ------------------------------------------------------------------------------

    @torch.no_grad()
    def logprobs(
        self,
        micro_batches: Sequence[Sequence[TrainingSample]],
        *,
        entropy: bool = False,
        objective: Objective | None = None,
    ) -> dict[int, torch.Tensor]:
        """Log-probs (or, with ``entropy``, entropies) of every response token under the current weights, no gradient
        state.

        With ``objective`` they are, to the bit, those that the forward pass of :meth:`update` would find now with it
        and the same micro-batches.

        Returns:
            on the last pipeline stage ``{sequence.number: [len(response_ids)] fp32}`` on the CPU; with context
            parallelism places held by other
            ranks are NaN: a later update must use the same micro-batches, so that this rank holds the same places
                again. Empty on earlier stages.
        """
        lengths = {s.number: len(s.response_ids) for batch in micro_batches for s in batch}
        found: dict[int, torch.Tensor] = {}

        def loss_of(batch: MicroBatch):
            def collect(output):
                values, response, token = output[:, int(entropy)].float().cpu(), batch.response.cpu(), batch.token.cpu()
                # Tokens lie response by response.
                counts = response.bincount(minlength=len(batch.numbers)).tolist()
                for number, places, mine in zip(batch.numbers, token.split(counts), values.split(counts), strict=True):
                    row = found.setdefault(number, torch.full((lengths[number],), math.nan))
                    row[places] = mine
                return output.new_zeros(()), {}

            return collect

        with self._evaluating():
            fused = objective is not None and self._fuses(objective)
            self._run(micro_batches, loss_of, forward_only=True, fused=fused)
        return found

    @contextmanager
    def _evaluating(self):
        for chunk in self.chunks:
            chunk.eval()
        try:
            yield
        finally:
            for chunk in self.chunks:
                chunk.train()

    # -- update ------------------------------------------------------------------------------------

    def _fuses(self, objective: Objective) -> bool:
        """Whether the head forms the objective's gradients in its forward pass; the same on every rank."""
        rows = padded_vocab(self.shape.vocab, self.layout.tensor, self.options.vocab_multiple) // self.layout.tensor
        return takes_fused_head(
            self.fused_head_loss, objective.ratio_level, rows, self.shape.hidden, self.options.dtype
        )

    def gradients(
        self, micro_batches: Sequence[Sequence[TrainingSample]], objective: Objective, *, only: bool = False
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Forward and backward over a minibatch; gradients stay in the buffers. Returns the all-reduced ``(sums,
        maxima)``. ``only``: as :meth:`update`."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        fused = self._fuses(objective)

        def loss_of(batch: MicroBatch):
            return make_loss(
                batch,
                objective,
                num_microbatches=len(micro_batches),
                data_parallel_size=self.position.data_size,
                context_group=self.position.context_group,
                fused=fused,
                own_old_logprobs=only,
            )

        for chunk in self.chunks:
            chunk.train()
        results = self._run(
            micro_batches,
            loss_of if self.position.is_last_stage else lambda batch: None,
            forward_only=False,
            fused=fused,
        )
        return self._reduce(results)

    def update(
        self, micro_batches: Sequence[Sequence[TrainingSample]], objective: Objective, lr: float, *, only: bool = False
    ) -> UpdateResult:
        """One optimizer step on one minibatch with learning rate ``lr``. A step whose gradient is not finite is left
        out and says so.

        ``only``: it is the only update of its rollout batch, so sequences without old log-probs get them from this
        forward pass. Raises ValueError for such sequences otherwise."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with self.span("forward_backward"):
            sums, maxima = self.gradients(micro_batches, objective, only=only)
        with self.span("optimizer"):
            if not self._gradients_are_finite():
                return UpdateResult(sums, maxima, math.nan, False, lr)
            stepped, norm, _ = self.optimizer.step()
        return UpdateResult(sums, maxima, float(norm if norm is not None else math.nan), bool(stepped), lr)

    def _gradients_are_finite(self) -> bool:
        """The same answer on every rank. Megatron-Core itself looks for NaN only where it scales the loss (fp16), and
        would step into it."""
        buffers = [b for chunk in self.chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        finite = torch.ones(1, device=self.platform.device)
        for buffer in buffers:
            # A sum is not finite where a term is not; large finite gradients would overflow it only near the end of
            # fp32's range.
            finite = finite * torch.isfinite(buffer.grad_data.sum(dtype=torch.float32))
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        return bool(finite.item())

    def _reduce(self, results: list[dict[str, torch.Tensor]]) -> tuple[dict[str, float], dict[str, float]]:
        """Sums over micro-batches and every rank that owns tokens; the same numbers end up on every rank."""
        device = self.platform.device
        sums = torch.zeros(len(SUM_NAMES), dtype=torch.float64, device=device)
        maxima = torch.zeros(len(MAX_NAMES), dtype=torch.float64, device=device)
        if self.position.owns_loss:
            for result in results:
                sums += result["sums"]
                maxima = torch.maximum(maxima, result["maxima"])
        dist.all_reduce(sums)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
        return dict(zip(SUM_NAMES, sums.tolist(), strict=True)), dict(zip(MAX_NAMES, maxima.tolist(), strict=True))
