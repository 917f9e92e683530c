"""Everything that can be known wrong before the first GPU second: the configuration against the model, the machine and
the number of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dcpo_megatron.config.schema import Config, ConfigError
from dcpo_megatron.data.errors import is_unicode
from dcpo_megatron.mcore.fast_paths import choose_model_paths, choose_overlap, dispatcher_problems
from dcpo_megatron.mcore.head.backend import missing_for_triton
from dcpo_megatron.mcore.hf_config import ModelShape, read_shape
from dcpo_megatron.mcore.layout import ParallelLayout, alignment
from dcpo_megatron.mcore.platform import Platform, find_apex, select_platform, use_transformer_engine
from dcpo_megatron.objectives import Objective
from dcpo_megatron.rollout.server import check_url
from dcpo_megatron.training.tokenizer import has_tokenizer
from dcpo_megatron.weights.conversion import hf_folder_of
from dcpo_megatron.weights.folder_check import check_folder
from dcpo_megatron.weights.hf_folder import SafetensorsFolder
from dcpo_megatron.weights.megatron_names import MegatronTensors
from dcpo_megatron.weights.torch_dist import TorchDistFolder, find_checkpoint


@dataclass(frozen=True)
class CheckedRun:
    """What the checks have read: the run can be built from these. ``hf_folder``: configuration and tokenizer;
    ``weights``: a checkpoint of either kind."""

    config: Config
    objective: Objective
    shape: ModelShape
    layout: ParallelLayout
    platform: Platform
    world_size: int
    hf_folder: Path
    weights: Path

    @property
    def data_parallel(self) -> int:
        return self.layout.data_parallel(self.world_size)

    @property
    def not_seen(self) -> list[str]:
        """What a run will need and is not there yet: a folder with config.json alone can be checked."""
        found = []
        if not self._has_weights:
            found.append(f"weights: {self.weights} has none (*.safetensors)")
        if not has_tokenizer(self.hf_folder):
            found.append(f"tokenizer: {self.hf_folder} has none (tokenizer.json)")
        return found

    @property
    def _has_weights(self) -> bool:
        return find_checkpoint(self.weights) is not None or any(self.weights.glob("*.safetensors"))

    def check_weights(self) -> None:
        """Holds the files of a Hugging Face folder's weights, where there are any, against config.json, as every rank
        does when it loads them. Raises CheckpointError."""
        if self._has_weights and find_checkpoint(self.weights) is None:
            check_folder(SafetensorsFolder(self.weights), self.shape)


def check_run(config: Config, world_size: int) -> CheckedRun:
    """Holds ``config`` against the model's ``config.json``, the packages and ``world_size`` ranks.

    Raises:
        ConfigError: one line a reason, all of them at once.
        ModelConfigError: the model folder cannot be used at all.
        CheckpointError: a Megatron checkpoint that cannot be read or is of another model.
    """
    objective = config.make_objective()
    try:
        platform = select_platform(config.training.platform)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    hf_folder, weights = _model_folders(config)
    shape = read_shape(hf_folder)
    if find_checkpoint(weights) is not None:
        MegatronTensors(TorchDistFolder(weights), shape)
    layout = ParallelLayout(**config.parallel.layout())
    found = layout.problems(shape, world_size, config.parallel.overlap_p2p)
    found += _package_problems(config, platform)
    found += _fast_path_problems(config, platform, shape, layout)
    if not found:
        found += _batch_problems(config, objective, layout, world_size)
    found += _length_problems(config, shape, layout)
    found += [
        f"rollout.stop_token_ids: the model's vocabulary has {shape.vocab} tokens, and none is {token}"
        for token in config.rollout.stop_token_ids
        if token >= shape.vocab
    ]
    found += _text_problems(config)
    found += _server_problems(config)
    if found:
        raise ConfigError("\n".join(found))
    return CheckedRun(config, objective, shape, layout, platform, world_size, hf_folder, weights)


def _model_folders(config: Config) -> tuple[Path, Path]:
    """The folder with config.json and tokenizer, and the checkpoint with the weights."""
    path, weights = Path(config.model.path), Path(config.model.weights or config.model.path)
    if config.model.weights and not weights.is_dir():
        raise ConfigError(
            f"model.weights={weights} does not exist: give a Hugging Face folder or a Megatron checkpoint"
        )
    return (path if find_checkpoint(path) is None else hf_folder_of(path)), weights


def _package_problems(config: Config, platform: Platform) -> list[str]:
    found = []
    if find_apex() == "impostor":
        found.append(
            "the installed package `apex` is not NVIDIA Apex (it has no amp_C), and Megatron-Core would import it: run"
            " `pip uninstall apex`"
        )
    if config.model.transformer_engine == "on":
        try:
            use_transformer_engine("on", config.model.dtype, platform)
        except ValueError as error:
            found.append(str(error))
    if config.model.head == "triton":
        missing = missing_for_triton("cpu" if platform.is_cpu else "cuda")
        if missing:
            found.append(f"model.head=triton, but {missing}: set model.head=auto")
    if config.logging.wandb:
        import importlib.util

        if importlib.util.find_spec("wandb") is None:
            found.append("logging.wandb=true, but wandb is not installed: pip install wandb")
    return found


def _fast_path_problems(config: Config, platform: Platform, shape: ModelShape, layout: ParallelLayout) -> list[str]:
    try:
        engine = use_transformer_engine(config.model.transformer_engine, config.model.dtype, platform)
    except ValueError:
        engine = False  # said already
    _, found = choose_model_paths(config.model, platform, engine, shape.experts)
    found += dispatcher_problems(config.parallel.token_dispatcher, layout, shape.experts, platform)
    sharded = config.optimizer.name == "adam"
    overlap = config.parallel.overlap_grad_reduce, config.parallel.overlap_param_gather
    return found + choose_overlap(*overlap, sharded, platform)[2]


def _batch_problems(config: Config, objective: Objective, layout: ParallelLayout, world_size: int) -> list[str]:
    rollout, training, found = config.rollout, config.training, []
    if rollout.prompts_per_step % training.minibatch_prompts:
        found.append(
            f"global batch not divisible: rollout.prompts_per_step={rollout.prompts_per_step} is not a multiple of "
            f"training.minibatch_prompts={training.minibatch_prompts}"
        )
    ranks = layout.data_parallel(world_size)
    responses = training.minibatch_prompts * rollout.group_size
    if responses % ranks:
        found.append(
            f"global batch not divisible: a minibatch of {training.minibatch_prompts} prompts x {rollout.group_size}"
            f" responses = {responses} cannot be dealt evenly to {ranks} data-parallel ranks"
        )
    if rollout.group_size == 1 and objective.advantage != "sas":
        found.append(
            f"rollout.group_size=1 gives every response the advantage 0 with objective.advantage={objective.advantage}:"
            " use at least 2"
        )
    return found


def _length_problems(config: Config, shape: ModelShape, layout: ParallelLayout) -> list[str]:
    found = []
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    if longest > shape.max_positions:
        found.append(
            f"data.max_prompt_tokens + rollout.max_response_tokens = {longest} is beyond the model's"
            f" {shape.max_positions} positions"
        )
    unit = alignment(layout.tensor, layout.context, layout.sequence_parallel)
    padded = -(-longest // unit) * unit
    if config.training.micro_batch_tokens < padded:
        found.append(
            f"training.micro_batch_tokens={config.training.micro_batch_tokens} cannot hold one longest response "
            f"(data.max_prompt_tokens + rollout.max_response_tokens = {padded} tokens): raise it to at least that"
        )
    return found


def _text_problems(config: Config) -> list[str]:
    """Keys with a text that cannot be written: a file name of other bytes than UTF-8, half of a surrogate pair."""
    found = []
    for name, section in config.model_dump().items():
        for key, value in section.items() if isinstance(section, dict) else [("", section)]:
            if any(
                isinstance(text, str) and not is_unicode(text)
                for text in (value if isinstance(value, list) else [value])
            ):
                found.append(f"{f'{name}.{key}'.rstrip('.')}={value!r} is not valid Unicode: rename it")
    return found


def _server_problems(config: Config) -> list[str]:
    servers, publish, found = config.servers, config.publish, []
    if config.rollout.engine != "sglang":
        if config.rollout.max_staleness:
            found.append(
                "rollout.max_staleness=1 samples beside training, which the embedded engine cannot: set"
                " rollout.engine=sglang, or rollout.max_staleness=0"
            )
        if publish.colocated:
            found.append(
                "publish.colocated=true frees the memory of servers on the ranks' GPUs, and rollout.engine=embedded has"
                " no servers: set rollout.engine=sglang publish.mode=ipc, or publish.colocated=false"
            )
        if servers.urls or servers.file:
            found.append("servers are given, but rollout.engine=embedded does not use them: set rollout.engine=sglang")
        return found
    if bool(servers.urls) == bool(servers.file):
        found.append(
            "rollout.engine=sglang needs the servers' addresses: give servers.urls=[http://HOST:PORT,...], or"
            " servers.file, which `dcpo serve` writes" + (" (one of them, not both)" if servers.urls else "")
        )
    for key, urls in (("servers.urls", servers.urls), ("servers.router", filter(None, [servers.router]))):
        for url in urls:
            try:
                check_url(url)
            except ValueError as error:
                found.append(f"{key}: {error}")
    if servers.urls and len(servers.urls) < servers.min_healthy:
        found.append(
            f"servers.min_healthy={servers.min_healthy}, but servers.urls lists {len(servers.urls)}: lower it or list"
            " more"
        )
    if servers.api_key_file and not Path(servers.api_key_file).is_file():
        found.append(f"servers.api_key_file={servers.api_key_file} does not exist")
    if publish.colocated and publish.mode != "ipc":
        found.append(
            f"publish.colocated=true needs publish.mode=ipc, not {publish.mode}: the servers are on the same GPUs"
        )
    if publish.colocated and config.rollout.max_staleness:
        found.append(
            "publish.colocated=true frees the servers' memory while training goes on: it needs rollout.max_staleness=0"
        )
    return found
