"""What ranks tell one another before a run is built: whose version, configuration or data is another."""

import copy

import pytest

from dcpo_megatron.training.first_meeting import _runs, difference

CARD = {
    "host": "a", "runs": {"sources of dcpo_megatron": "12", "torch": "2.13.0"}, "prompts": "x",
    "config": {"training": {"seed": 0}, "model": {"path": "/m"}, "objective": {"preset": "grpo"}},
}  # fmt: skip


def cards(*changes: tuple[int, str, object]) -> list[dict]:
    made = [copy.deepcopy(CARD) | {"host": "ab"[rank // 2]} for rank in range(4)]
    for rank, where, value in changes:
        *path, name = where.split("/")
        place = made[rank]
        for key in path:
            place = place[key]
        place[name] = value
    return made


def test_ranks_that_are_alike_have_nothing_to_say():
    assert difference(cards()) is None
    # Copies of the model on each host's own disk are no other configuration.
    assert difference(cards((2, "config/model/path", "/local/m"), (3, "config/model/path", "/local/m"))) is None


@pytest.mark.parametrize(("changes", "said"), [
    ([(2, "config/training/seed", 1), (3, "config/training/seed", 1)],
     "ranks 2, 3 on host b has another configuration than rank 0 on host a: training.seed is 1, on rank 0 0: "
     "give every rank the same command"),
    ([(1, "config/objective/preset", "gspo"), (3, "config/objective/preset", "gspo")],
     "rank 1 on host a (and 1 more) has another configuration than rank 0 on host a: "
     "objective.preset is 'gspo', on rank 0 'grpo': "),
    ([(3, "runs/torch", "2.12.0"), (3, "config/training/seed", 1)],
     "rank 3 on host b runs another version than rank 0 on host a: torch is '2.12.0', on rank 0 '2.13.0': "
     "install the same on every host"),
    ([(3, "prompts", "y")],
     "rank 3 on host b has other prompts than rank 0 on host a: data.files hold other prompts there"),
])  # fmt: skip
def test_the_first_that_is_otherwise_is_named_with_both_values(changes, said):
    assert difference(cards(*changes)).startswith(said)


def test_the_projects_own_version_is_that_of_its_sources():
    assert len(_runs()["sources of dcpo_megatron"]) == 12 and _runs() == _runs()
