"""What ranks conclude from one another's cards; that it is true of real hosts is tests/hosts' part."""

import pytest

from dcpo_megatron.mcore.meeting_facts import choose_interface, named, present, ranks_text, settle


def card(host: str, address: str | None, **more) -> dict:
    return {"host": host, "stack": host, "address": address, "interface": f"of-{host}", "wrong": []} | more


def test_a_thousand_ranks_are_named_in_a_line(monkeypatch):
    assert [ranks_text(ranks) for ranks in ([3], [0, 1, 2, 9], [5, 4])] == ["rank 3", "ranks 0-2, 9", "ranks 4-5"]
    assert named(range(8, 16), 1000, 8) == "ranks 8-15 of 1000 (node 1)"
    assert named([1, 9, 800], 1000, 8) == "ranks 1, 9, 800 of 1000 (nodes 0-1, 100)"
    assert named([1], 2, 2) == "rank 1 of 2"  # all of one host
    assert len(named(range(1, 1000, 2), 1000, 8)) < 200
    monkeypatch.setenv("DCPO_HOSTS", ",".join(f"n{node}" for node in range(125)))
    assert named(range(8, 24), 1000, 8) == "ranks 8-23 of 1000 (node 1: n1, 2: n2)"
    assert len(named(range(1, 1000, 2), 1000, 8)) < 250
    assert named([3], 4, 2) == "rank 3 of 4 (node 1)"  # names of other hosts than these
    assert present({rank: card(f"n{rank // 8}", None) for rank in range(1000)}).endswith(
        "ranks 56-63 on n7 and 117 more hosts"
    )


def test_the_verdict_tells_the_stores_host_another_address_and_one_rank_of_each_host_to_knock():
    cards = [card("h1", "127.0.0.1"), card("h1", "127.0.0.1"), card("h2", "10.0.0.2"), card("h2", "10.0.0.2")]
    assert settle(cards) == {"failed": None, "alone": False, "leaders": [0, 2], "peer": "10.0.0.2"}
    assert settle(cards[:2]) == {"failed": None, "alone": True, "leaders": [0], "peer": None}
    assert choose_interface(settle(cards), cards[2]) == "of-h2"
    wrong = settle([*cards, card("h3", "10.0.0.3", wrong=["GLOO_SOCKET_IFNAME=x, but h3 ..."])])["failed"]
    assert wrong.startswith("the run has not started: GLOO_SOCKET_IFNAME=x, but h3 ...: correct it")


@pytest.mark.parametrize("address", [None, "127.0.0.1"])
def test_without_a_way_to_another_host_no_interface_is_named(address):
    lost = [card("h1", address), card("h2", None)]
    assert choose_interface(settle(lost), lost[0]) is None
