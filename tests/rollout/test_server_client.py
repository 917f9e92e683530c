"""What the client does with answers, good and bad, and how it spreads requests. Stand-in servers; the real ones are in
test_server_client_real.py."""

import threading
import time

import pytest

from dcpo_megatron.rollout import GenerateRequest, RolloutError, SamplingParams, server_client
from dcpo_megatron.rollout.fleet import UNVERIFIED, Fleet
from dcpo_megatron.rollout.server import Server, ServerError
from dcpo_megatron.rollout.server_client import GaveUp, NoServersLeft, ServerClient
from tests.rollout.stand_in_server import StandIn, finished, ordinary

TAG = "run-3"
SAMPLING = SamplingParams(4)


@pytest.fixture
def stand_ins():
    """``stand_ins(answer, ...)``: a fleet of version 3 and its servers."""
    made: list[StandIn] = []

    def make(*answers) -> tuple[Fleet, list[StandIn]]:
        made.extend(StandIn(answer) for answer in answers)
        fleet = Fleet([one.server for one in made], "run")
        for one in made:
            fleet.admit(one.server, 3)
        return fleet, made

    yield make
    for one in made:
        one.close()


def requests(prompts: int, samples: int) -> list[GenerateRequest]:
    return [
        GenerateRequest((5, 6, prompt), 100 * prompt + sample) for prompt in range(prompts) for sample in range(samples)
    ]


def test_samples_of_a_prompt_go_to_one_server_and_prompts_are_spread(stand_ins):
    fleet, servers = stand_ins(*[ordinary(TAG)] * 3)
    generations = ServerClient(fleet).generate(requests(6, 4), SAMPLING)
    assert [g.token_ids.tolist() for g in generations] == [[1] * 4] * 24
    prompts = [{tuple(ids) for body in one.asked for ids in body["input_ids"]} for one in servers]
    assert [len(found) for found in prompts] == [2, 2, 2] and len(set.union(*prompts)) == 6
    assert [len(body["input_ids"]) for one in servers for body in one.asked] == [4] * 6


def test_ranks_begin_at_different_servers(stand_ins):
    fleet, servers = stand_ins(*[ordinary(TAG)] * 4)
    for rank in range(2):
        ServerClient(fleet, rank=rank, world=2).generate(requests(1, 1), SAMPLING)
    assert [len(one.asked) for one in servers] == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (lambda body: [finished(0, [1] * 4, "other-3")], "not this run's"),
        (lambda body: [finished(0, [1] * 4, "run-2")], "3 is the oldest allowed"),
        (lambda body: ['{"index": 0, "output_i'], "not JSON"),
        (lambda body: [finished(0, [1] * 4, TAG) | {"output_ids": [1, 1, 1, 2]}], "do not belong"),
        (lambda body: 500, "status 500"),
        (lambda body: ['{"error": {"message": "out of memory", "code": 503}}'], "out of memory"),
    ],
)
def test_a_bad_answer_is_thrown_away_its_server_evicted_and_the_rest_sampled_elsewhere(stand_ins, bad, reason):
    fleet, servers = stand_ins(bad, ordinary(TAG))
    generations = ServerClient(fleet).generate(requests(1, 3), SAMPLING)
    assert [(g.token_ids.tolist(), g.weight_versions.tolist()) for g in generations] == [([1] * 4, [3] * 4)] * 3
    assert reason in fleet.evicted()[servers[0].server.url] and fleet.serving() == [servers[1].server]


def test_what_was_finished_before_the_fault_is_kept_and_only_the_rest_is_asked_again(stand_ins):
    fleet, servers = stand_ins(
        lambda body: [finished(1, [7] * 4, TAG), finished(0, [8] * 4, TAG), "not JSON"], ordinary(TAG)
    )
    generations = ServerClient(fleet).generate(requests(1, 4), SAMPLING)
    assert [g.token_ids.tolist()[0] for g in generations] == [8, 7, 1, 1]
    assert [params["sampling_seed"] for params in servers[1].asked[0]["sampling_params"]] == [2, 3]


def test_without_servers_the_finished_responses_come_with_the_error(stand_ins):
    fleet, _ = stand_ins(lambda body: [finished(2, [9] * 4, TAG), "not JSON"])
    with pytest.raises(NoServersLeft, match="not JSON") as caught:
        ServerClient(fleet).generate(requests(1, 4), SAMPLING)
    assert {place: g.token_ids.tolist() for place, g in caught.value.finished.items()} == {2: [9] * 4}


def test_a_refusal_is_one_sentence_and_is_not_repeated(stand_ins):
    fleet, servers = stand_ins(lambda body: ['{"error": {"message": "prompt too long", "code": 400}}'], ordinary(TAG))
    with pytest.raises(ServerError, match=r"prompt too long.*3 tokens") as caught:
        ServerClient(fleet).generate(requests(1, 2), SAMPLING)
    assert caught.value.status == 400 and len(servers[0].asked) == 1 and not servers[1].asked
    assert not fleet.evicted()


def test_a_response_that_can_never_be_had_is_given_up_after_a_bounded_number_of_requests(stand_ins, monkeypatch):
    monkeypatch.setattr("dcpo_megatron.rollout.server_sampling._PAUSE_SECONDS", 0.01)
    fleet, servers = stand_ins(lambda body: [finished(0, [], TAG, "abort")])
    with pytest.raises(GaveUp, match="3 times in vain"):
        ServerClient(fleet).generate(requests(1, 1), SAMPLING)
    assert len(servers[0].asked) == 3


def test_an_aborted_response_goes_on_from_its_last_token(stand_ins):
    def interrupted(body):
        if len(servers[0].asked) == 1:
            return [finished(0, [7, 8], TAG, "abort"), finished(1, [9] * 4, TAG)]
        return ordinary("run-4")(body)

    fleet, servers = stand_ins(interrupted)
    generations = ServerClient(fleet).generate(requests(1, 2), SAMPLING)
    assert generations[0].token_ids.tolist() == [7, 8, 1, 1] and generations[0].weight_versions.tolist() == [3, 3, 4, 4]
    assert generations[0].finish_reason == "length" and len(generations[0].logprobs) == 4
    again = servers[0].asked[1]
    assert again["input_ids"] == [[5, 6, 0, 7, 8]] and again["sampling_params"][0]["max_new_tokens"] == 2


@pytest.mark.parametrize("status", [401, 403, 404, 405])
def test_a_server_that_refuses_whoever_asks_is_evicted_and_the_others_go_on(stand_ins, status):
    fleet, servers = stand_ins(lambda body: status, ordinary(TAG))
    generations = ServerClient(fleet).generate(requests(1, 3), SAMPLING)
    assert [g.token_ids.tolist() for g in generations] == [[1] * 4] * 3
    assert f"status {status}" in fleet.evicted()[servers[0].server.url] and len(servers[0].asked) == 1


def test_no_more_is_under_way_at_a_server_than_its_share_but_never_nothing(stand_ins):
    most, now, lock = [0], [0], threading.Lock()

    def slow(body):
        with lock:
            now[0] += len(body["input_ids"])
            most[0] = max(most[0], now[0])
        time.sleep(0.05)
        with lock:
            now[0] -= len(body["input_ids"])
        return ordinary(TAG)(body)

    fleet, _ = stand_ins(slow)
    for outstanding, expected in ((4, 4), (3, 2), (1, 2)):  # two samples a prompt, posted together
        most[0] = 0
        assert len(ServerClient(fleet, outstanding=outstanding).generate(requests(4, 2), SAMPLING)) == 8
        assert most[0] == expected


def test_a_sample_that_is_answered_twice_counts_once_and_one_never_asked_for_not_at_all(stand_ins):
    fleet, _ = stand_ins(
        lambda body: [
            finished(0, [7] * 4, TAG),
            finished(0, [8] * 4, TAG),
            finished(5, [9] * 4, TAG),
            finished(1, [6] * 4, TAG),
        ]
    )
    assert [g.token_ids.tolist() for g in ServerClient(fleet).generate(requests(1, 2), SAMPLING)] == [[7] * 4, [6] * 4]


def test_a_response_cut_short_ends_the_batch_and_says_what_the_server_lacks(stand_ins):
    fleet, _ = stand_ins(lambda body: [finished(0, [1] * 3, TAG, "length")])
    with pytest.raises(RolloutError, match=r"after 3 of max_new_tokens=4: .*--context-length"):
        ServerClient(fleet).generate(requests(1, 1), SAMPLING)


def test_a_response_that_ends_itself_may_be_short(stand_ins):
    fleet, _ = stand_ins(lambda body: [finished(0, [1] * 3, TAG, "stop")])
    assert ServerClient(fleet).generate(requests(1, 1), SAMPLING)[0].token_ids.tolist() == [1] * 3


def test_what_a_server_finishes_after_it_failed_at_another_prompt_counts(stand_ins):
    def answer(body):
        if body["input_ids"][0][-1] == 2:
            return 500
        time.sleep(0.4)
        return [finished(0, [7] * 4, TAG)]

    fleet, servers = stand_ins(answer, ordinary(TAG))
    generations = ServerClient(fleet).generate(requests(3, 1), SAMPLING)
    assert [g.token_ids.tolist()[0] for g in generations] == [7, 1, 1] and servers[0].server.url in fleet.evicted()


def test_tokens_as_old_as_the_caller_allows_are_taken(stand_ins):
    fleet, _ = stand_ins(lambda body: [finished(0, [1] * 4, "run-2")])
    assert ServerClient(fleet).generate(requests(1, 1), SAMPLING, oldest=2)[0].weight_versions.tolist() == [2] * 4
    assert not fleet.evicted()


@pytest.mark.parametrize("attempts", [1, 2])
def test_a_request_that_brought_a_token_is_not_one_in_vain(stand_ins, attempts):
    def interrupted(body):
        if len(servers[0].asked) <= 3:
            return [finished(0, [len(servers[0].asked)], TAG, "abort")]
        return ordinary(TAG)(body)

    fleet, servers = stand_ins(interrupted)
    (generation,) = ServerClient(fleet, attempts=attempts).generate(requests(1, 1), SAMPLING)
    assert generation.token_ids.tolist() == [1, 2, 3, 1] and len(servers[0].asked) == 4


def test_tokens_from_weights_under_check_count_once_the_check_is_over(stand_ins):
    fleet, servers = stand_ins(lambda body: [finished(0, [1] * 4, f"run-4{UNVERIFIED}")])
    pending = ServerClient(fleet).start(requests(1, 1), SAMPLING)
    threading.Event().wait(0.3)
    assert not pending.done_so_far()
    fleet.admit(servers[0].server, 4)
    assert pending.finish()[0].weight_versions.tolist() == [4] * 4


def test_tokens_from_weights_that_failed_their_check_are_thrown_away(stand_ins):
    fleet, servers = stand_ins(lambda body: [finished(0, [1] * 4, f"run-4{UNVERIFIED}")], ordinary("run-4"))
    pending = ServerClient(fleet).start(requests(1, 1), SAMPLING)
    threading.Event().wait(0.3)
    fleet.evict(servers[0].server, "its weights are wrong")
    fleet.admit(servers[1].server, 4)
    assert pending.finish()[0].weight_versions.tolist() == [4] * 4
    assert len(servers[1].asked) == 1 and fleet.evicted()[servers[0].server.url] == "its weights are wrong"


def test_a_server_that_tells_no_spans_is_not_believed_when_weights_changed_meanwhile(stand_ins, monkeypatch):
    monkeypatch.setattr("dcpo_megatron.rollout.server_sampling._PAUSE_SECONDS", 0.01)

    def old_server(body):
        event = finished(0, [1] * 4, "run-4" if changed.is_set() else TAG)
        del event["meta_info"]["weight_versions"]
        if not changed.is_set():
            fleet.admit(servers[0].server, 4)
            changed.set()
        return [event]

    changed = threading.Event()
    fleet, servers = stand_ins(old_server)
    assert ServerClient(fleet).generate(requests(1, 1), SAMPLING)[0].weight_versions.tolist() == [4] * 4
    assert len(servers[0].asked) == 2 and not fleet.evicted()


def test_the_deadline_counts_from_a_servers_last_sign_of_work_and_not_from_the_end_of_its_queue(stand_ins):
    turn = threading.Lock()

    def one_after_the_other(body):
        with turn:
            time.sleep(0.25)
            return ordinary(TAG)(body)

    fleet, (server,) = stand_ins(one_after_the_other)
    server.works = False  # what it does is enough: nobody asks
    assert len(ServerClient(fleet, request_timeout=0.6).generate(requests(5, 1), SAMPLING)) == 5
    assert len(server.asked) == 5 and not fleet.evicted()


def test_a_server_that_is_long_silent_but_samples_is_waited_for(stand_ins):
    def long_response(body):
        time.sleep(1.0)
        return ordinary(TAG)(body)

    fleet, (_, other) = stand_ins(long_response, ordinary(TAG))
    generations = ServerClient(fleet, request_timeout=0.2).generate(requests(1, 1), SAMPLING)
    assert generations[0].token_ids.tolist() == [1] * 4 and not fleet.evicted() and not other.asked


@pytest.mark.parametrize(
    ("works", "running", "reason"), [(False, 1, "it hangs"), (True, 0, "holds none of the responses")]
)
def test_a_silent_server_that_samples_for_nobody_or_lost_the_request_is_evicted(
    stand_ins, monkeypatch, works, running, reason
):
    monkeypatch.setattr("dcpo_megatron.rollout.server_silence._AGAIN_SECONDS", 0.05)

    def never(body):
        time.sleep(3.0)
        return []

    fleet, (server, other) = stand_ins(never, ordinary(TAG))
    server.works, server.running = works, running
    began = time.monotonic()
    assert len(ServerClient(fleet, request_timeout=0.3).generate(requests(1, 2), SAMPLING)) == 2
    assert time.monotonic() - began < 2.5 and len(other.asked) == 1
    why = fleet.evicted()[server.server.url]
    assert reason in why and "request_timeout=0.3" in why


def test_through_a_router_nothing_is_evicted_and_repeats_are_bounded(stand_ins, monkeypatch):
    monkeypatch.setattr("dcpo_megatron.rollout.server_sampling._PAUSE_SECONDS", 0.01)
    fleet, (server, router) = stand_ins(ordinary(TAG), lambda body: 503)
    with pytest.raises(NoServersLeft, match="router"):
        ServerClient(fleet, router=router.server.url).generate(requests(1, 2), SAMPLING)
    # Each of the two samples by itself: the router takes no list of them.
    assert not server.asked and 3 <= len(router.asked) <= 6 and not fleet.evicted()


def test_progress_is_told_in_the_callers_thread_up_to_the_total(stand_ins):
    fleet, _ = stand_ins(ordinary(TAG))
    told = []
    ServerClient(fleet).generate(
        requests(2, 3), SAMPLING, lambda *numbers: told.append((*numbers, threading.get_ident()))
    )
    assert told[-1] == (6, 6, threading.get_ident()) and told == sorted(told)


def test_whoever_waits_goes_on_when_the_last_response_is_there(stand_ins, monkeypatch):
    class Lingering(threading.Thread):
        """Is alive for a while after its work is done and told."""

        def run(self):
            super().run()
            time.sleep(0.2)

    fleet, _ = stand_ins(ordinary(TAG))
    # The waiting thread looks around now and then by itself: not within this test.
    monkeypatch.setattr(server_client, "_LOOK_SECONDS", 3600.0)
    monkeypatch.setattr(threading, "Thread", Lingering)
    for _ in range(3):
        assert len(ServerClient(fleet).generate(requests(1, 1), SAMPLING)) == 1


def test_a_tag_is_a_version_of_this_run_only():
    fleet = Fleet([Server("http://127.0.0.1:1"), Server("http://127.0.0.1:2")], "run-a")
    assert fleet.version_of(fleet.tag(12)) == 12
    assert [
        fleet.version_of(tag)
        for tag in ("run-b-12", "run-a-", "run-a-012", "run-a--1", "unpublished", "12", "run-a-1\u00b2")
    ] == [None] * 7
    assert (
        fleet.unverified_version_of(fleet.tag(12) + UNVERIFIED) == 12
        and fleet.unverified_version_of("run-a-12") is None
    )


def test_servers_with_older_weights_do_not_serve_and_ranks_share_a_view():
    first, second = servers = [Server("http://127.0.0.1:1"), Server("http://127.0.0.1:2")]
    fleet, other = Fleet(servers, "r"), Fleet(servers, "r")
    assert fleet.serving() == [] and set(fleet.evicted()) == {first.url, second.url}
    fleet.admit(first, 1), fleet.admit(second, 1)
    assert fleet.serving() == servers
    fleet.admit(first, 2)
    assert fleet.serving() == [first] and fleet.version == 2
    fleet.evict(first, "it hangs")
    other.adopt(fleet.state())
    assert other.serving() == [] and other.evicted() == {first.url: "it hangs"} and other.version == 2
    with pytest.raises(ValueError, match="do not list the same servers"):
        Fleet([first], "r").adopt(fleet.state())
    with pytest.raises(ValueError, match="listed twice"):
        Fleet([first, Server("http://127.0.0.1:1/")], "r")
