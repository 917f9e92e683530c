"""Functions that run on the ranks of a pool: gradients and updates whose old log-probs come from a pass before, or from
their own forward pass."""


def pass_and_own(name: str, folder: str, items: list, objectives: dict, dtype: str = "float32", **options) -> dict:
    """Each objective in the layout ``name``, fused and not, both ways: ``{(objective, setting): [(numbers, gradients),
    (numbers, gradients)]}``; then ``update``: ``[(result, weights)] * 2`` of an update under the first one; ``plain``:
    how many log-probs differ where the pass is not told of the fused head."""
    from dcpo_megatron.mcore.head import chunks
    from dcpo_megatron.mcore.hf_config import read_shape
    from dcpo_megatron.mcore.layout import ParallelLayout, make_groups, rank_position
    from dcpo_megatron.mcore.model import ModelOptions, OptimizerOptions
    from dcpo_megatron.mcore.platform import select_platform
    from dcpo_megatron.mcore.step import PolicyModel
    from dcpo_megatron.verification.cases import TEMPERATURE
    from dcpo_megatron.verification.layouts import parse_layout
    from dcpo_megatron.verification.measure import _micro_batches, split_items
    from dcpo_megatron.weights.transfer import load_hf_weights

    layout = parse_layout(name)
    parallel = ParallelLayout(**layout.parallel)
    make_groups(parallel)

    def policy(setting: str) -> PolicyModel:
        model = PolicyModel.create(
            read_shape(folder), parallel, ModelOptions(dtype=dtype, **options), select_platform("cpu"), rank_position(),
            temperature=TEMPERATURE, packed=layout.packed, head_chunk_tokens=16, fused_head_loss=setting,
        )  # fmt: skip
        load_hf_weights(model, folder)
        model.make_trainable(OptimizerOptions(lr=1e-2))
        return model

    def batches(model: PolicyModel, objective, own: bool):
        made = _micro_batches(split_items(items, layout, model.position), items, objective)
        old = {} if own else model.logprobs(made, objective=objective)
        for sequence in (sequence for micro_batch in made for sequence in micro_batch):
            sequence.old_logprobs = old.get(sequence.number)
        return made

    found: dict = {}
    usual = chunks.BLOCK_BYTES["cpu"]
    chunks.BLOCK_BYTES["cpu"] = 1  # the smallest chunk of the vocabulary: a few of them for the recomputing head
    try:
        for setting in ("on", "off"):
            model = policy(setting)
            for key, objective in objectives.items():
                ways = found[key, setting] = []
                for own in (False, True):
                    sums, maxima = model.gradients(batches(model, objective, own), objective, only=own)
                    gradients = [p.main_grad.clone() for module in model.modules for p in module.parameters()]
                    ways.append((sums | maxima, gradients))
            first = next(iter(objectives.values()))
            if setting == "on":
                made = batches(model, first, own=True)
                told, plain = (model.logprobs(made, objective=objective) for objective in (first, None))
                found["plain"] = sum(int((told[n] != plain[n]).sum() - told[n].isnan().sum()) for n in told)
        ways = found["update"] = []
        for own in (False, True):
            model = policy("on")
            result = model.update(batches(model, first, own), first, 1e-2, only=own)
            ways.append((result, [p.detach().clone() for module in model.modules for p in module.parameters()]))
    finally:
        chunks.BLOCK_BYTES["cpu"] = usual
    return found
