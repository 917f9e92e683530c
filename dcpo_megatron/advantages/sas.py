"""Smooth advantage standardisation (SAS): advantages from this visit's rewards and from all rewards seen so far.

For the i-th visit of a prompt, with "new" = the rewards of this visit and "tot" = those of all visits, this one
included (DCPO, arXiv 2509.02333, section "Smooth Advantage Standardization"):

    A_new = (R - mu_new)/sigma_new        SA_new = ((i-1) A_new + A_tot)/i
    A_tot = (R - mu_tot)/sigma_tot        SA_tot = (A_new + (i-1) A_tot)/i
    A     = SA_new if |SA_new| < |SA_tot| else SA_tot        (a tie, within 1e-12 relative, takes SA_tot)

Rewards that differ by rounding only count as equal, in a visit as in the history (`moments.sigma_of`).
A group whose rewards are all equal has A_new = 0, yet still learns from A_tot/i. Per prompt the history keeps the
number of visits and (count, mean, M2); merging by counts is the paper's recursion where all groups have one size, and
stays right where they differ. `i` counts the visits of THAT prompt which reached an update: show the history only what
is trained on, and take back (`RewardHistory.take_back`) what an update left out.

The statistics of all prompts are four flat arrays, one row a prompt in the order of first sight, and a dictionary from
id to row: 32 bytes a prompt and the id, written to a file and read from it as they lie (`sas_file`).
"""

import array
import math
import warnings
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dcpo_megatron.advantages.moments import Moments, exchange_moments, merge_mean_m2, sigma_of

_VERSION = 1
# |SA_new| and |SA_tot| that differ by rounding only are a tie.
_TIE = 1e-12

# What is kept of a prompt, by the key of the state; "q" is int64, "d" is float64.
_COLUMNS = {"visits": "q", "counts": "q", "means": "d", "m2": "d"}
_DTYPES = {"q": torch.int64, "d": torch.float64}


class _Record(NamedTuple):
    visits: int
    count: int  # type: ignore[assignment]  # tuple has a method of this name
    mean: float
    m2: float

    @property
    def sigma(self) -> float:
        # Where sigma is that small, every reward is the mean but for rounding: it stands for the largest one.
        return sigma_of(self.m2 / self.count, abs(self.mean))


class PromptStatistics(NamedTuple):
    """What a history knows about a prompt: visits, rewards seen, their mean and standard deviation."""

    visits: int
    count: int  # type: ignore[assignment]  # tuple has a method of this name
    mean: float
    std: float


class RewardHistory:
    """The rewards of every prompt so far, as statistics; gives SAS advantages and travels inside the checkpoint.

    Args:
        std_ddof: 0, the paper: population variance. 1, the official code: each visit contributes its sample variance
            (count * sample variance in the place of M2), merged by the population formula.

    Raises:
        ValueError: std_ddof is neither 0 nor 1.
    """

    def __init__(self, std_ddof: Literal[0, 1] = 0) -> None:
        if std_ddof not in (0, 1) or isinstance(std_ddof, bool):
            raise ValueError(f"std_ddof = {std_ddof!r} is not possible; allowed: 0 (population), 1 (sample)")
        self.std_ddof = std_ddof
        self._rows: dict[str, int] = {}
        self._columns: dict[str, array.array[Any]] = {name: array.array(code) for name, code in _COLUMNS.items()}
        self._before: dict[str, _Record | None] = {}  # of the prompts of the last visit, what was known before it
        self._warned = False

    def __len__(self) -> int:
        """Number of prompts seen."""
        return len(self._rows)

    def visits(self, prompt_id: str) -> int:
        """How many visits of this prompt the history has seen; 0 for an unknown prompt."""
        row = self._rows.get(prompt_id)
        return 0 if row is None else self._columns["visits"][row]

    def statistics(self, prompt_id: str) -> PromptStatistics:
        """Statistics over all visits of this prompt.

        Raises:
            KeyError: the prompt was never observed.
        """
        record = self._record(prompt_id)
        if record is None:
            raise KeyError(f"prompt {prompt_id!r} was never observed")
        return PromptStatistics(record.visits, record.count, record.mean, math.sqrt(record.m2 / record.count))

    def observe(self, prompt_ids: list[str], rewards: Tensor, process_group: dist.ProcessGroup | None = None) -> Tensor:
        """Take one batch into the history and return the SAS advantage of each of its responses.

        All responses of a prompt in one batch, over all ranks, are one visit. If this raises, nothing has changed.

        Args:
            prompt_ids: `[n]`, a stable id of each response's prompt.
            rewards: `[n]`, one finite reward per response, any real dtype.
            process_group: collective over its ranks, each with its own responses, possibly none; a group may be split
                over ranks. Afterwards all ranks hold the same history, bit for bit, if they did before. None = this
                process only, even if torch.distributed is initialised.

        Returns:
            float64 `[n]`, on the device of `rewards`: one number for every token of the response.

        Raises:
            ValueError: a missing id (None or ""), a reward that is not finite, lengths that differ; with a process
                group on every rank, naming the rank at fault.
            TypeError: an id that is not a str (a ValueError with a process group).
        """
        visit_moments, values = exchange_moments(prompt_ids, rewards, process_group)
        updated = self._merged(visit_moments)
        advantages = self._advantages(prompt_ids, values, visit_moments, updated).to(rewards.device)
        alone = any(moments.count == 1 and updated[i].visits == 1 for i, moments in visit_moments.items())
        if alone and not self._warned:
            warnings.warn(
                "a prompt's first visit has a single response: nothing to compare with, its advantage is 0",
                stacklevel=2,
            )
            self._warned = True
        before = {prompt_id: self._record(prompt_id) for prompt_id in updated}
        self._keep(updated)  # last, so that a failure above leaves the history as it was
        self._before = before
        return advantages

    def take_back(self, prompt_ids: Iterable[str]) -> None:
        """Undo the last visit of these prompts, whose update was left out (its gradient was not finite).

        Local: every rank calls it with the same ids, in any order. A prompt seen for the first time is forgotten.

        Args:
            prompt_ids: ids of the last `observe`; repeated ids count once.

        Raises:
            KeyError: an id that the last `observe` did not bring, or that was taken back already.
        """
        asked = set(prompt_ids)
        if unknown := asked - self._before.keys():
            raise KeyError(f"the last visit has no prompt {min(unknown)!r}: only what was observed last is taken back")
        records = {prompt_id: self._before.pop(prompt_id) for prompt_id in list(self._before) if prompt_id in asked}
        self._keep({prompt_id: record for prompt_id, record in records.items() if record is not None})
        gone = {self._rows.pop(prompt_id) for prompt_id, record in records.items() if record is None}
        if gone:
            for name, column in self._columns.items():
                kept = (value for row, value in enumerate(column) if row not in gone)
                self._columns[name] = array.array(column.typecode, kept)
            self._rows = {prompt_id: row for row, prompt_id in enumerate(self._rows)}

    def _record(self, prompt_id: str) -> _Record | None:
        row = self._rows.get(prompt_id)
        if row is None:
            return None
        visits, counts, means, m2 = self._columns.values()
        return _Record(visits[row], counts[row], means[row], m2[row])

    def _merged(self, visits: dict[str, Moments]) -> dict[str, _Record]:
        """The records of these prompts with this visit added."""
        updated = {}
        for prompt_id, visit in visits.items():
            visit_m2 = visit.count * visit.variance(self.std_ddof)
            old = self._record(prompt_id)
            if old is None:
                updated[prompt_id] = _Record(1, visit.count, visit.mean, visit_m2)
            else:
                total = merge_mean_m2(old.count, old.mean, old.m2, visit.count, visit.mean, visit_m2)
                updated[prompt_id] = _Record(old.visits + 1, *total)
        return updated

    def _keep(self, updated: dict[str, _Record]) -> None:
        visits, counts, means, m2 = self._columns.values()
        for prompt_id, record in updated.items():
            row = self._rows.get(prompt_id)
            if row is None:
                row = len(visits)
                for column in (visits, counts, means, m2):
                    column.append(0)
            visits[row], counts[row], means[row], m2[row] = record
            self._rows[prompt_id] = row

    def _advantages(
        self, prompt_ids: list[str], values: list[float], visits: dict[str, Moments], totals: dict[str, _Record]
    ) -> Tensor:
        """float64 `[n]`: the formula of the module for all responses at once, in the order of operations written
        there."""
        place = {prompt_id: number for number, prompt_id in enumerate(dict.fromkeys(prompt_ids))}
        table = array.array("d")
        for prompt_id in place:
            visit, total = visits[prompt_id], totals[prompt_id]
            table.extend((visit.mean, visit.sigma(self.std_ddof), total.mean, total.sigma, total.visits))
        places = array.array("q", map(place.__getitem__, prompt_ids))
        of_responses = _tensor(table).view(-1, 5)[_tensor(places)]
        mean_new, sigma_new, mean_tot, sigma_tot, i = of_responses.unbind(1)
        rewards = _tensor(array.array("d", values))
        new, tot = _standardise(rewards, mean_new, sigma_new), _standardise(rewards, mean_tot, sigma_tot)
        smooth_new = ((i - 1) * new + tot) / i
        smooth_tot = (new + (i - 1) * tot) / i
        return torch.where(smooth_new.abs() < smooth_tot.abs() * (1 - _TIE), smooth_new, smooth_tot)

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything, in plain types and CPU tensors: loads with `torch.load(weights_only=True)`.

        Keys: version, std_ddof (int), prompt_ids (list of str); visits, counts (int64 `[n]`); means, m2 (float64 `[n]`)
        """
        return {
            "version": _VERSION,
            "std_ddof": self.std_ddof,
            "prompt_ids": list(self._rows),
            **{name: _tensor(column) for name, column in self._columns.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace this history by a saved one, bit for bit. If this raises, nothing has changed.

        Raises:
            ValueError: another version or std_ddof, missing or unknown keys, impossible shapes, dtypes or values.
        """
        expected = {"version", "std_ddof", "prompt_ids", "visits", "counts", "means", "m2"}
        if not isinstance(state, dict) or state.get("version") != _VERSION:
            found = state.get("version") if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"reward history of version {found!r} cannot be read; this code reads version {_VERSION}")
        if set(state) != expected:
            raise ValueError(f"reward history has the keys {sorted(map(str, state))}, expected {sorted(expected)}")
        if state["std_ddof"] != self.std_ddof:
            raise ValueError(
                f"reward history was kept with std_ddof = {state['std_ddof']!r}, this one has {self.std_ddof}; they "
                "cannot be mixed: continue with the objective that the checkpoint was made with"
            )
        ids = state["prompt_ids"]
        rows: dict[str, int] = {}
        if isinstance(ids, list) and all(issubclass(kind, str) for kind in set(map(type, ids))):
            rows = dict(zip(ids, range(len(ids)), strict=True))
        if not isinstance(ids, list) or len(rows) != len(ids) or "" in rows:
            raise ValueError("reward history: prompt_ids must be a list of distinct, non-empty str")
        for name, code in _COLUMNS.items():
            tensor, dtype = state[name], _DTYPES[code]
            if not isinstance(tensor, Tensor) or tensor.dtype != dtype or tensor.shape != (len(ids),):
                raise ValueError(f"reward history: {name} must be a {dtype} tensor of shape ({len(ids)},)")
        visits, counts, means, m2 = (state[name] for name in _COLUMNS)
        possible = (visits >= 1) & (counts >= visits) & means.isfinite() & m2.isfinite() & (m2 >= 0)
        if not bool(possible.all()):
            raise ValueError(f"reward history: impossible record for prompt {ids[int((~possible).nonzero()[0])]!r}")
        self._columns = {name: _array(state[name], code) for name, code in _COLUMNS.items()}
        self._rows = rows
        self._before = {}


def _standardise(rewards: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
    """(rewards - mean)/sigma, 0 where sigma is 0."""
    varies = sigma > 0
    return torch.where(varies, (rewards - mean) / torch.where(varies, sigma, 1.0), 0.0)


def _tensor(column: array.array) -> Tensor:
    """A copy: the array can go on growing."""
    dtype = _DTYPES[column.typecode]
    return torch.frombuffer(column, dtype=dtype).clone() if column else torch.zeros(0, dtype=dtype)


def _array(tensor: Tensor, code: str) -> array.array:
    return array.array(code, tensor.detach().cpu().contiguous().numpy().tobytes())
