"""CUDA requests land on the CPU, and nothing else changes: also not what transformers builds and loads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dcpo_megatron.mcore import cpu_standins

# What a process without any test's imports does, with the stand-ins put in before transformers comes, or without them.
PROGRAM = """
import json, sys

import torch

torch.set_num_threads(1)
if sys.argv[2] == "with":
    from dcpo_megatron.mcore import cpu_standins

    cpu_standins.install()
    assert "transformers" not in sys.modules

from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

torch.manual_seed(3)
config = Qwen2Config(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
                     initializer_range=0.5)
made = Qwen2ForCausalLM(config).eval()
made.save_pretrained(sys.argv[1])
loaded = AutoModelForCausalLM.from_pretrained(sys.argv[1], local_files_only=True).eval()
ids = torch.tensor([[1, 7, 30, 49, 2]])
with torch.no_grad():
    logits = {"made": made(ids).logits.tolist(), "loaded": loaded(ids).logits.tolist()}
with torch.device("meta"):
    meta = [torch.empty(2).is_meta, torch.arange(3).is_meta, torch.tensor([1.0]).is_meta,
            torch.nn.Linear(2, 2).weight.is_meta]
torch.manual_seed(5)
print(json.dumps({"logits": logits, "meta": meta, "drawn": torch.rand(3).tolist()}))
"""


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What the program prints in a process without the stand-ins, and in one that installs them first."""
    folder = tmp_path_factory.mktemp("standins")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")])),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    started = {
        word: subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", PROGRAM, folder / word, word],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for word in ("without", "with")
    }
    results = {}
    for word, process in started.items():
        output, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
        results[word] = json.loads(output.splitlines()[-1])
    return results


def test_a_transformers_model_saved_and_loaded_under_the_standins_gives_the_logits_it_gives_without_them(processes):
    plain = processes["without"]["logits"]
    assert plain["made"] == plain["loaded"]
    assert max(abs(value) for row in plain["made"][0] for value in row) > 0.1
    assert processes["with"]["logits"] == plain


def test_a_device_context_still_reaches_the_replaced_factories(processes):
    assert processes["without"]["meta"] == processes["with"]["meta"] == [True] * 4


def test_the_same_seed_draws_the_same_numbers_as_without_the_standins(processes):
    assert processes["with"]["drawn"] == processes["without"]["drawn"]


ON_A_GPU_HOST = """
import torch

torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 2  # as torch tells it where there are two
from dcpo_megatron.mcore.platform import prepare, select_platform

built_for, torch.version.cuda = torch.version.cuda, "13.0"
assert select_platform().name == "cuda"  # seen, as long as nobody has asked for the CPU
torch.version.cuda = built_for
prepare(select_platform("cpu"))
assert not torch.cuda.is_available() and torch.cuda.device_count() == 0
from megatron.core.jit import jit_fuser

written = lambda x: x
assert jit_fuser(written) is written  # no C++ compiler in every rank
router = torch.compile(lambda scores, bias: scores if bias is None else scores + bias)  # as a mixture's router does it
scores = torch.ones(2, requires_grad=True)
router(scores, None).sum().backward()
compiled = torch.compile(lambda x: torch.nn.functional.silu(x) * 2, backend="aot_eager")
assert compiled(torch.zeros(2)).tolist() == [0.0, 0.0]
try:
    select_platform("cuda")
except ValueError as error:
    print(error)
"""


def test_on_a_host_with_gpus_the_cpu_platform_has_none_and_compiled_functions_run():
    found = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": found, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ON_A_GPU_HOST],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "torch sees no CUDA device" in done.stdout


# The tests below run in this process, where conftest has installed the stand-ins.

CALLS = {
    "tensor": ([1.0],), "as_tensor": ([1.0],), "empty": (2,), "zeros": (2,), "ones": (2,), "full": ((2,), 1.0),
    "rand": (2,), "randn": (2,),
    "randint": (9, (2,)), "randperm": (3,), "arange": (3,), "linspace": (0.0, 1.0, 3), "eye": (2,),
    "full_like": (torch.ones(2), 3.0),
    **{f"{name}_like": (torch.ones(2),) for name in ("empty", "zeros", "ones", "rand", "randn")},
}  # fmt: skip


def test_there_is_a_call_for_every_replaced_factory():
    assert set(CALLS) == set(cpu_standins._FACTORIES)


@pytest.mark.parametrize("device", ["cuda", "cuda:3", torch.device("cuda", 1), torch.cuda.current_device()], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_a_factory_asked_for_a_gpu_gives_a_cpu_tensor(name, device):
    assert getattr(torch, name)(*CALLS[name], device=device).device.type == "cpu"


def test_other_devices_stay_what_they_are():
    assert torch.zeros(2, device="meta").is_meta
    assert torch.zeros(2).device.type == "cpu"
    assert torch.ones(2).to("meta").is_meta


def test_a_pinned_tensor_is_an_ordinary_one():
    assert not torch.zeros(2, pin_memory=True).is_pinned()


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.float32, "torch.cuda.FloatTensor"),
        (torch.bfloat16, "torch.cuda.BFloat16Tensor"),
        (torch.float16, "torch.cuda.HalfTensor"),
    ],
)
def test_types_are_named_as_on_a_gpu_and_names_of_gpu_types_convert(dtype, name):
    tensor = torch.zeros(2, device="cuda", dtype=dtype)
    assert tensor.type() == name
    assert torch.ones(2, dtype=torch.float64).type(name).dtype == dtype
    assert torch.ones(2).type(torch.int32).dtype == torch.int32


def test_moving_to_a_gpu_is_no_move():
    tensor = torch.arange(3.0)
    assert tensor.cuda() is tensor
    assert tensor.to("cuda:0") is tensor
    assert tensor.to(device="cuda", dtype=torch.float64).dtype == torch.float64
    assert tensor.to(torch.device("cuda"), torch.int64).tolist() == [0, 1, 2]
    assert tensor.to(torch.float16).dtype == torch.float16
    module = torch.nn.Linear(2, 2)
    assert module.cuda() is module and module.weight.device.type == "cpu"


def test_seeding_does_not_recurse_and_seeds_the_cpu_generator():
    torch.manual_seed(11)
    first = torch.rand(4)
    torch.cuda.manual_seed(11)
    assert torch.equal(torch.rand(4), first)
    torch.manual_seed(11)
    torch.cuda.manual_seed_all(12)
    assert torch.equal(torch.rand(4), first)


def test_the_gpus_random_state_is_the_cpu_generators():
    torch.manual_seed(11)
    state = torch.cuda.get_rng_state()
    first = torch.rand(4)
    torch.cuda.set_rng_state(state, "cuda")
    assert torch.equal(torch.rand(4), first)


def test_streams_and_events_return_at_once():
    stream, event = torch.cuda.Stream(), torch.cuda.Event()
    with torch.cuda.stream(stream), torch.cuda.device(0), stream:
        stream.wait_stream(torch.cuda.current_stream())
        event.record(stream)
        stream.wait_event(event)
    assert event.query()
    torch.cuda.synchronize()


def test_installing_twice_wraps_nothing_twice():
    before = [getattr(torch, name) for name in cpu_standins._FACTORIES] + [torch.Tensor.to, torch.Tensor.type]
    cpu_standins.install()
    after = [getattr(torch, name) for name in cpu_standins._FACTORIES] + [torch.Tensor.to, torch.Tensor.type]
    assert all(one is other for one, other in zip(before, after, strict=True))


def test_a_gpu_already_in_use_is_not_redirected(monkeypatch):
    monkeypatch.setattr(cpu_standins, "_installed", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    zeros = torch.zeros
    with pytest.raises(RuntimeError, match="after CUDA was initialised in this process"):
        cpu_standins.install()
    assert torch.zeros is zeros


@pytest.fixture(scope="module")
def pool():
    from dcpo_megatron.verification.ranks import RankPool

    with RankPool(3) as pool:
        yield pool


@pytest.mark.parametrize("noncontiguous", [False, True])
def test_parts_of_different_sizes_are_gathered_as_nccl_does(pool, noncontiguous):
    wanted = torch.tensor([[0.0], [1], [2], [20], [21], [22], [23], [24]]).expand(-1, 2)
    for whole in pool.run("tests.mcore.jobs:gather_parts_of_different_sizes", 3, noncontiguous):
        assert torch.equal(whole, wanted)


def test_parts_of_different_sizes_are_reduced_and_scattered_as_nccl_does(pool):
    found = pool.run("tests.mcore.jobs:reduce_scatter_parts_of_different_sizes", 3)
    wanted = torch.arange(8.0)[:, None].expand(-1, 2) * 3 + 3
    assert torch.equal(torch.cat([mine for mine, _ in found]), wanted)
    assert all(unchanged for _, unchanged in found)
