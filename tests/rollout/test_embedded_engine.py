"""The embedded engine samples what transformers would, whatever else is in the batch, and never with half of an
update."""

import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from dcpo_megatron.rollout import EmbeddedEngine, GenerateRequest, RolloutError, SamplingParams
from dcpo_megatron.rollout.embedded import sample

VOCAB = 23
PROMPTS = ((3, 4), (5, 6, 7, 8, 9, 10, 11), (1,), (12, 3, 9, 4), (20, 20, 20, 20, 20))


def make_model(seed, tied=False):
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.4,  # far from uniform, far from certain
        bos_token_id=None,
        eos_token_id=None,
    )
    return Qwen2ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_model(0).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


@pytest.fixture(scope="module")
def shared_engine(folder):
    """For tests that load no weights."""
    return EmbeddedEngine(folder)


@pytest.fixture
def engine(folder):
    return EmbeddedEngine(folder)


def requests_of(prompts=PROMPTS, seeds=range(3)):
    return [GenerateRequest(prompt, seed) for prompt in prompts for seed in seeds]


def plain_logits(model, prompt, tokens):
    """``[len(tokens), V]``: the logits that predict each token, by one forward pass without a cache."""
    ids = torch.tensor([[*prompt, *tokens]])
    with torch.no_grad():
        return model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]


def picked(logits, tokens, temperature=1.0):
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()


def greedy_by_transformers(model, prompt, count, stop=None):
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=count,
            eos_token_id=stop,
            pad_token_id=0,
        )
    return out[0, len(prompt) :].tolist()


# -- what is sampled -------------------------------------------------------------------------------


def test_greedy_responses_are_those_of_transformers_own_generate(shared_engine, model):
    generations = shared_engine.generate(requests_of(seeds=[0]), SamplingParams(12, temperature=0))
    expected = [greedy_by_transformers(model, prompt, 12) for prompt in PROMPTS]
    assert [g.token_ids.tolist() for g in generations] == expected
    assert len({tuple(tokens) for tokens in expected}) > 1


def test_greedy_responses_with_a_stop_token_are_those_of_transformers_too(shared_engine, model):
    free = [greedy_by_transformers(model, prompt, 12) for prompt in PROMPTS]
    stop = free[0][2]
    generations = shared_engine.generate(requests_of(seeds=[0]), SamplingParams(12, 0, stop_token_ids=(stop,)))
    assert [g.token_ids.tolist() for g in generations] == [greedy_by_transformers(model, p, 12, stop) for p in PROMPTS]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_logprobs_are_those_of_a_plain_forward_pass_at_the_sampling_temperature(shared_engine, model, temperature):
    requests = requests_of()
    generations = shared_engine.generate(requests, SamplingParams(10, temperature, top_p=0.9, top_k=9))
    for request, generation in zip(requests, generations, strict=True):
        logits = plain_logits(model, request.prompt_token_ids, generation.token_ids.tolist())
        assert generation.logprobs.tolist() == pytest.approx(
            picked(logits, generation.token_ids.tolist(), temperature), abs=1e-5
        )


def test_greedy_logprobs_are_those_at_temperature_one(shared_engine, model):
    (generation,) = shared_engine.generate(requests_of(PROMPTS[:1], [0]), SamplingParams(6, temperature=0))
    logits = plain_logits(model, PROMPTS[0], generation.token_ids.tolist())
    assert generation.logprobs.tolist() == pytest.approx(picked(logits, generation.token_ids.tolist()), abs=1e-5)


def test_a_response_is_the_same_alone_and_in_any_company(shared_engine):
    sampling = SamplingParams(12, temperature=1.2, stop_token_ids=(2, 5, 11))
    requests = requests_of()
    together = shared_engine.generate(requests, sampling)
    assert len({len(g.token_ids) for g in together}) > 2  # rows leave the batch at different times
    turned = shared_engine.generate(requests[::-1], sampling)[::-1]
    for request, in_batch, in_turned_batch in zip(requests, together, turned, strict=True):
        (alone,) = shared_engine.generate([request], sampling)
        for other in (in_batch, in_turned_batch):
            assert alone.token_ids.tolist() == other.token_ids.tolist()
            assert alone.logprobs.tolist() == pytest.approx(other.logprobs.tolist(), abs=1e-5)
            assert alone.finish_reason == other.finish_reason


def test_other_seeds_give_other_responses_and_the_same_seed_the_same(shared_engine):
    generations = shared_engine.generate(requests_of(PROMPTS[:1], [0, 1, 2, 3, 0]), SamplingParams(12))
    tokens = [tuple(g.token_ids.tolist()) for g in generations]
    assert len(set(tokens[:4])) == 4 and tokens[4] == tokens[0]


def test_a_longer_limit_continues_the_same_response(shared_engine):
    requests = requests_of()
    short = shared_engine.generate(requests, SamplingParams(5))
    long = shared_engine.generate(requests, SamplingParams(20))
    assert [g.token_ids.tolist() for g in short] == [g.token_ids.tolist()[:5] for g in long]


def test_a_stop_token_ends_a_response_and_belongs_to_it(shared_engine):
    stops = (2, 5, 11)
    generations = shared_engine.generate(requests_of(seeds=range(8)), SamplingParams(8, stop_token_ids=stops))
    assert {g.finish_reason for g in generations} == {"stop", "length"}
    for generation in generations:
        assert not set(generation.token_ids.tolist()[:-1]) & set(stops)
        stopped = generation.token_ids.tolist()[-1] in stops
        assert generation.finish_reason == ("stop" if stopped else "length")
        assert stopped or len(generation.token_ids) == 8
        assert len(generation.token_ids) == len(generation.logprobs) == len(generation.weight_versions)


def test_a_stop_token_in_the_last_place_is_a_stop(shared_engine):
    (free,) = shared_engine.generate(requests_of(PROMPTS[:1], [0]), SamplingParams(6))
    last = free.token_ids.tolist()[-1]
    count = free.token_ids.tolist().index(last) + 1
    (generation,) = shared_engine.generate(requests_of(PROMPTS[:1], [0]), SamplingParams(count, stop_token_ids=(last,)))
    assert generation.token_ids.tolist() == free.token_ids.tolist()[:count] and generation.finish_reason == "stop"


def test_batches_of_any_size_give_the_same_responses_in_the_order_of_the_requests(shared_engine, folder):
    requests, sampling = requests_of(), SamplingParams(8, stop_token_ids=(2, 5))
    expected = shared_engine.generate(requests, sampling)
    for max_batch in (1, 4, 15):
        found = EmbeddedEngine(folder, max_batch=max_batch).generate(requests, sampling)
        assert [g.token_ids.tolist() for g in found] == [g.token_ids.tolist() for g in expected]


def test_progress_rises_to_the_number_of_requests(folder):
    calls = []
    requests = requests_of()
    EmbeddedEngine(folder, max_batch=4).generate(
        requests, SamplingParams(8, stop_token_ids=(2, 5)), lambda finished, total: calls.append((finished, total))
    )
    finished = [done for done, _ in calls]
    assert finished == sorted(finished)
    assert calls[-1] == (len(requests), len(requests)) and {total for _, total in calls} == {len(requests)}


def test_no_requests_give_no_responses(shared_engine):
    assert shared_engine.generate([], SamplingParams(4)) == []


# -- sampling of one token -------------------------------------------------------------------------


def test_top_k_of_one_is_greedy(shared_engine):
    greedy = shared_engine.generate(requests_of(), SamplingParams(10, temperature=0))
    narrow = shared_engine.generate(requests_of(), SamplingParams(10, temperature=1.0, top_k=1))
    assert [g.token_ids.tolist() for g in narrow] == [g.token_ids.tolist() for g in greedy]
    narrow = shared_engine.generate(requests_of(), SamplingParams(10, temperature=1.0, top_p=1e-6))
    assert [g.token_ids.tolist() for g in narrow] == [g.token_ids.tolist() for g in greedy]


def draws(probabilities, sampling, count=10_000):
    """Share of each token over evenly spread uniform numbers."""
    logits = torch.tensor(probabilities).log().expand(count, -1)
    uniforms = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens, logprobs = sample(logits, uniforms, sampling)
    expected = (logits / (sampling.temperature or 1)).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    assert torch.equal(logprobs, expected)  # of the whole distribution, whatever is left out
    return (tokens.bincount(minlength=len(probabilities)) / count).tolist()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3, 0.0]),
        ({"top_k": 2}, [0.0, 4 / 7, 0.0, 3 / 7, 0.0]),
        ({"top_k": 50}, [0.1, 0.4, 0.2, 0.3, 0.0]),
        ({"top_p": 0.65}, [0.0, 4 / 7, 0.0, 3 / 7, 0.0]),
        ({"top_p": 0.75}, [0.0, 4 / 9, 2 / 9, 3 / 9, 0.0]),
        ({"top_p": 0.95}, [0.1, 0.4, 0.2, 0.3, 0.0]),
        ({"top_p": 0.75, "top_k": 2}, [0.0, 4 / 7, 0.0, 3 / 7, 0.0]),
        ({"top_p": 0.3, "top_k": 3}, [0.0, 1.0, 0.0, 0.0, 0.0]),
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30, 0.0]),
        ({"temperature": 0.0}, [0.0, 1.0, 0.0, 0.0, 0.0]),
    ],
)
def test_evenly_spread_uniform_numbers_give_each_token_its_share(settings, expected):
    shares = draws([0.1, 0.4, 0.2, 0.3, 0.0], SamplingParams(1, **settings))
    assert shares == pytest.approx(expected, abs=1.1e-4)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_a_token_without_probability_is_never_drawn(uniform):
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 1.0, -math.inf]])
    tokens, logprobs = sample(logits, torch.tensor([uniform], dtype=torch.float64), SamplingParams(1))
    assert tokens.item() in (1, 3) and logprobs.isfinite().all()


def test_sampled_frequencies_match_the_models_distribution(shared_engine, model):
    count, prompt = 3000, PROMPTS[3]
    generations = shared_engine.generate(requests_of([prompt], range(count)), SamplingParams(2))
    first = torch.tensor([g.token_ids.tolist()[0] for g in generations])
    probabilities = plain_logits(model, prompt, [0]).softmax(-1)[0].double()
    chi_square = ((first.bincount(minlength=VOCAB) - count * probabilities) ** 2 / (count * probabilities)).sum()
    # Mean 22, standard deviation 6.6: the seeds are fixed, so this fails always or never.
    assert chi_square < 22 + 4 * 6.6
    # The second token is drawn independently of the first: its uniform number is another one.
    likely = int(first.mode().values)
    second = torch.tensor([g.token_ids.tolist()[1] for g in generations if g.token_ids.tolist()[0] == likely])
    probabilities = plain_logits(model, (*prompt, likely), [0]).softmax(-1)[0].double()
    shares = second.bincount(minlength=VOCAB) / len(second)
    assert (shares - probabilities).abs().max() < 4 * math.sqrt(0.25 / len(second))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 1, "temperature": -1.0}, "temperature=-1.0"),
        ({"max_new_tokens": 1, "top_p": 0.0}, "top_p=0.0"),
        ({"max_new_tokens": 1, "top_p": 1.1}, "top_p=1.1"),
        ({"max_new_tokens": 1, "top_k": -1}, "top_k=-1"),
    ],
)
def test_sampling_parameters_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**settings)


# -- weights ---------------------------------------------------------------------------------------


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


class Walk:
    """An iterator over weights that knows whether it was walked to its end, as a collective must be."""

    def __init__(self, weights):
        self.weights, self.finished = weights, False

    def __iter__(self):
        yield from self.weights.items()
        self.finished = True


def test_new_weights_are_sampled_from_and_their_version_stands_at_every_token(engine):
    other = make_model(1)
    sampling = SamplingParams(6)
    before = engine.generate(requests_of(), sampling)
    assert {v for g in before for v in g.weight_versions.tolist()} == {0}
    engine.load_weights(weights_of(other).items(), version=7)
    assert engine.version == 7
    after = engine.generate(requests_of(), sampling)
    for request, generation in zip(requests_of(), after, strict=True):
        assert generation.weight_versions.tolist() == [7] * len(generation.token_ids)
        logits = plain_logits(other, request.prompt_token_ids, generation.token_ids.tolist())
        assert generation.logprobs.tolist() == pytest.approx(picked(logits, generation.token_ids.tolist()), abs=1e-5)
    assert [g.token_ids.tolist() for g in after] != [g.token_ids.tolist() for g in before]


def spoiled(weights, problem):
    if problem == "unknown name":
        return {"model.layers.9.bias": torch.zeros(2)} | weights
    if problem == "wrong shape":
        return weights | {"model.norm.weight": torch.zeros(17)}
    return {name: tensor for name, tensor in weights.items() if name != "model.norm.weight"}


@pytest.mark.parametrize(
    ("problem", "sentence"),
    [
        ("unknown name", "weight 'model.layers.9.bias' has no place in the rollout model"),
        ("wrong shape", "weight 'model.norm.weight' has shape (17,), the rollout model has (16,)"),
        ("missing weight", "weight 'model.norm.weight' did not come (1 missing)"),
    ],
)
def test_after_a_broken_update_the_engine_refuses_to_sample_until_a_complete_one(engine, problem, sentence):
    weights = weights_of(make_model(1))
    walk = Walk(spoiled(weights, problem))
    with pytest.raises(RolloutError) as caught:
        engine.load_weights(walk, version=3)
    assert str(caught.value).startswith(sentence + ": ")
    assert walk.finished
    assert engine.version == 0
    with pytest.raises(RolloutError, match="no complete weights"):
        engine.generate(requests_of(), SamplingParams(2))
    engine.load_weights(weights.items(), version=4)
    (generation,) = engine.generate(requests_of(PROMPTS[:1], [0]), SamplingParams(2))
    assert generation.weight_versions.tolist() == [4, 4]


def test_an_update_that_dies_on_the_way_leaves_the_engine_refusing_to_sample(engine):
    def dying():
        yield from list(weights_of(make_model(1)).items())[:3]
        raise ConnectionError("a rank died")

    with pytest.raises(ConnectionError):
        engine.load_weights(dying(), version=1)
    with pytest.raises(RolloutError, match="no complete weights"):
        engine.generate(requests_of(), SamplingParams(2))


def test_an_engine_without_weights_refuses_to_sample_until_they_come(folder, shared_engine, model):
    empty = EmbeddedEngine(folder, load=False)
    with pytest.raises(RolloutError, match="no complete weights"):
        empty.generate(requests_of(), SamplingParams(2))
    empty.load_weights(weights_of(model).items(), version=0)
    sampling = SamplingParams(6)
    assert [g.token_ids.tolist() for g in empty.generate(requests_of(), sampling)] == [
        g.token_ids.tolist() for g in shared_engine.generate(requests_of(), sampling)
    ]


@pytest.mark.parametrize("with_head", [False, True])
def test_tied_embeddings_come_with_or_without_the_copy_for_the_output(tmp_path, with_head):
    make_model(0, tied=True).save_pretrained(tmp_path)
    engine, other = EmbeddedEngine(tmp_path), make_model(1, tied=True)
    weights = weights_of(other)
    assert "lm_head.weight" not in weights
    if with_head:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    engine.load_weights(weights.items(), version=1)
    (generation,) = engine.generate(requests_of(PROMPTS[:1], [0]), SamplingParams(6))
    logits = plain_logits(other, PROMPTS[0], generation.token_ids.tolist())
    assert generation.logprobs.tolist() == pytest.approx(picked(logits, generation.token_ids.tolist()), abs=1e-5)


def test_experts_come_under_the_names_that_checkpoints_give_them(tmp_path):
    def make(seed):
        torch.manual_seed(seed)
        config = Qwen3MoeConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=4,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=8,
            norm_topk_prob=True,
            initializer_range=0.4,
            bos_token_id=None,
            eos_token_id=None,
        )
        return Qwen3MoeForCausalLM(config).eval()

    make(0).save_pretrained(tmp_path / "start")
    other = make(1)
    other.save_pretrained(tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    assert "model.layers.1.mlp.experts.3.gate_proj.weight" in weights
    engine = EmbeddedEngine(tmp_path / "start")
    engine.load_weights(weights.items(), version=1)
    (generation,) = engine.generate(requests_of(PROMPTS[:1], [0]), SamplingParams(6))
    logits = plain_logits(other, PROMPTS[0], generation.token_ids.tolist())
    assert generation.logprobs.tolist() == pytest.approx(picked(logits, generation.token_ids.tolist()), abs=1e-5)
    del weights["model.layers.1.mlp.experts.3.gate_proj.weight"]
    with pytest.raises(RolloutError, match=r"experts\.3\.gate_proj\.weight' did not come"):
        engine.load_weights(weights.items(), version=2)


def test_a_closed_engine_refuses_to_sample(engine):
    engine.close()
    with pytest.raises(RolloutError, match="no complete weights"):
        engine.generate(requests_of(), SamplingParams(2))
