"""Functions that run on the ranks of a pool: what a rank of a small model really holds."""

import contextlib
import weakref

import torch

TOKENS, PROMPT, SEQUENCES, MICRO_BATCHES = 64, 4, 4, 4  # of a sequence; of its prompt; in a micro-batch; in a minibatch
SIZES = dict(
    vocab_size=500, hidden_size=64, intermediate_size=160, num_attention_heads=8, num_key_value_heads=4, head_dim=8,
    num_hidden_layers=4, max_position_embeddings=128,
)  # fmt: skip
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=40)


def shape(model: str):
    """qwen2, qwen3_moe, or either of them with "/tied"."""
    from dcpo_megatron.mcore.families import FAMILIES
    from dcpo_megatron.mcore.hf_config import shape_of

    family, _, tied = model.partition("/")
    extra = EXPERTS if FAMILIES[family].experts else {}
    return shape_of(FAMILIES[family].tiny_config(**SIZES, **extra, tie_word_embeddings=bool(tied)))


def measure(model: str, parallel: dict, cases: list[dict]) -> list[dict]:
    """For each case (dtype, and optionally recompute, fused_head_loss, optimizer): bytes of weights, gradients and
    optimizer after a step, and the most that was kept for the backward pass at a time. Routed tokens of this rank's
    experts over the mean, where there are experts."""
    return [_measure(model, parallel, **case) for case in cases]


def _measure(model, parallel, dtype, recompute="none", fused_head_loss="off", optimizer="adam") -> dict:
    from dcpo_megatron.mcore.layout import ParallelLayout, make_groups, rank_position
    from dcpo_megatron.mcore.model import ModelOptions, OptimizerOptions
    from dcpo_megatron.mcore.platform import select_platform
    from dcpo_megatron.mcore.step import PolicyModel
    from dcpo_megatron.objectives import get_preset

    layout = ParallelLayout(**parallel)
    make_groups(layout)
    policy = PolicyModel.create(
        shape(model), layout, ModelOptions(dtype=dtype, recompute=recompute), select_platform("cpu"), rank_position(),
        fused_head_loss=fused_head_loss,
    )  # fmt: skip
    torch.manual_seed(0)
    for module in policy.modules:
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
    policy.make_trainable(OptimizerOptions(name=optimizer))
    weights = _storages(parameter for module in policy.modules for parameter in module.parameters())
    batch, objective = _micro_batches(policy), get_preset("dcpo-paper")
    routed = []
    with _kept(weights) as peak, _routed(policy, routed):
        policy.update(batch, objective, 1e-6)
    buffers = [b for chunk in policy.chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    gradients = _storages(buffer.grad_data for buffer in buffers)
    states = _storages(_optimizer_tensors(policy.optimizer))
    return {
        "weights": sum(weights.values()),
        "gradients": sum(gradients.values()),
        "optimizer": sum(size for place, size in states.items() if place not in weights),
        "kept": max(peak),
        "routed": max(routed, default=0),
    }


def _storages(tensors) -> dict[int, int]:
    """Place -> bytes of each distinct storage."""
    found = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}


def _optimizer_tensors(optimizer):
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in part.optimizer.param_groups:
            yield from group["params"]
        for state in part.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor) and value.dim())


@contextlib.contextmanager
def _kept(weights: dict[int, int]):
    """Counts the bytes of distinct storages that autograd keeps, but for weights; yields the list of what was alive
    after each tensor that came.
    """
    alive: dict[int, list[int]] = {}
    peak = [0]

    class Holder:
        def __init__(self, tensor):
            self.tensor = tensor

    def drop(place):
        alive[place][0] -= 1
        if not alive[place][0]:
            del alive[place]

    def pack(tensor):
        storage = tensor.untyped_storage()
        place, holder = storage.data_ptr(), Holder(tensor)
        if storage.nbytes() and place not in weights:
            alive.setdefault(place, [0, storage.nbytes()])[0] += 1
            weakref.finalize(holder, drop, place)
            peak.append(sum(size for _, size in alive.values()))
        return holder

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        yield peak


@contextlib.contextmanager
def _routed(policy, counts: list[int]):
    """Notes how many tokens each call of an experts layer gets."""
    layers = [m for module in policy.modules for m in module.modules() if type(m).__name__ == "SequentialMLP"]
    hooks = [layer.register_forward_pre_hook(lambda _, inputs: counts.append(len(inputs[0]))) for layer in layers]
    yield
    for hook in hooks:
        hook.remove()


def _micro_batches(policy):
    from dcpo_megatron.mcore.batch import TrainingSample

    generator = torch.Generator().manual_seed(policy.position.data_rank)
    length, old = TOKENS - PROMPT, torch.full((TOKENS - PROMPT,), -2.0)
    tokens = torch.randint(0, 500, (MICRO_BATCHES, SEQUENCES, TOKENS), generator=generator).tolist()
    return [
        [TrainingSample(n, ids[:PROMPT], ids[PROMPT:], 1.0, 1 / length, old, old) for n, ids in enumerate(rows)]
        for rows in tokens
    ]
