"""The distance of served log-probabilities to the reference model: its statistics, and what is
proposed and judged by them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from gpu_check_contexts import context
from hypothesis import given as for_all
from hypothesis import strategies as st

from sglang_harness.errors import EngineError
from sglang_harness.gpu_check import distances
from sglang_harness.gpu_check.distances import Condition, Measured, Token, percentile
from sglang_harness.gpu_check.part import NotHere
from sglang_harness.gpu_check.parts import tolerances as part
from sglang_harness.gpu_check.parts.tolerances import Answer, Scoring
from sglang_harness.oracle import BOUNDS, TOLERANCE, Scores

HALF = Condition("large", "bfloat16", 1, False)


def tokens(*offs: float) -> list[Token]:
    return [Token(-off, 0.0, 0.0) for off in offs]


def measured(*offs: float, condition: Condition = HALF) -> Measured:
    return distances.measured(condition, tokens(*offs), 0)


# --- statistics -----------------------------------------------------------------------------------


def test_percentiles_are_values_that_were_seen():
    values = [float(n) for n in range(1, 1001)]
    assert [percentile(values, p) for p in (50, 90, 99, 99.9, 100)] == [500, 900, 990, 999, 1000]
    assert percentile([3.0], 99.9) == percentile([3.0], 0.1) == 3.0


@for_all(st.lists(st.floats(0, 1e3), min_size=1), st.floats(0.1, 100))
def test_a_percentile_has_so_many_values_at_or_below_it(values: list[float], which: float):
    found = percentile(values, which)
    assert found in values
    assert sum(value <= found for value in values) >= which / 100 * len(values) - 1e-9


def test_a_condition_is_described_by_its_distances_and_its_other_tokens():
    seen = [Token(-1.0, -1.5, 0.0), Token(-2.0, -2.25, 0.1), Token(-1.0, -1.0, 0.3)]
    row = distances.measured(HALF, seen, 12)
    assert (row.tokens, row.largest, row.percentiles["p50"]) == (3, 0.5, 0.25)
    assert (row.not_best, row.furthest_behind, row.cached_tokens) == (2, 0.3, 12)
    assert list(row.percentiles) == ["p50", "p90", "p99", "p99.9"]


def test_what_is_no_number_is_infinitely_far():
    assert measured(0.01, math.nan).largest == math.inf
    found = distances.proposals([measured(0.01, math.nan)], TOLERANCE)
    assert not found[0].covered
    assert distances.uncovered(found)


def test_no_tokens_are_no_measurement():
    row = distances.measured(HALF, [], 0)
    assert row.why_not
    assert distances.proposals([row], TOLERANCE) == []


# --- the proposal ---------------------------------------------------------------------------------


def test_a_bound_in_use_covers_the_largest_distance_of_every_condition():
    bound = TOLERANCE["bfloat16"]
    found = distances.proposals([measured(bound / 3), measured(bound)], TOLERANCE)
    assert [each.covered for each in found] == [True]
    assert distances.uncovered(found) == ""
    found = distances.proposals([measured(bound / 3), measured(bound * 1.01)], TOLERANCE)
    assert "bfloat16: expected at most 0.3 nats, measured 0.303" in distances.uncovered(found)
    assert "proposed bound 0.61" in distances.uncovered(found)


def test_a_token_that_is_no_near_tie_is_not_covered():
    """The checks let one pass within twice the bound."""
    bound = TOLERANCE["float16"]
    condition = Condition("tiny", "float16", 1, False, rounded=True)
    for behind, covered in ((2 * bound, True), (2.1 * bound, False)):
        row = distances.measured(condition, [Token(-1.0, -1.0, behind)], 0)
        assert distances.proposals([row], TOLERANCE)[0].covered is covered


def test_the_proposal_follows_the_rule_over_all_conditions_of_a_dtype():
    fine = [0.001] * 2000
    rows = [measured(*fine, 0.9), measured(*fine[:998], 0.031, 0.04)]
    assert [row.percentiles["p99.9"] for row in rows] == [0.001, 0.031]
    (found,) = distances.proposals(rows, TOLERANCE)
    assert (found.proposed, found.largest, found.tokens) == (0.062, 0.9, 3001)


@pytest.mark.parametrize(
    ("value", "up"),
    [
        (0.1234, 0.13),
        (0.12, 0.12),
        (2.5, 2.5),
        (1.8e-05, 1.8e-05),
        (1.81e-05, 1.9e-05),
        (99.1, 100),
    ],
)
def test_a_proposal_has_two_digits_and_is_never_below_what_the_rule_gives(value: float, up: float):
    assert distances.rounded_up(value) == pytest.approx(up)


def test_a_condition_says_what_was_served_and_how():
    assert str(HALF) == "large, bfloat16, batch of 1, nothing cached"
    rounded = Condition("tiny", "float16", 32, True, rounded=True)
    assert str(rounded) == "tiny, float16, weights rounded, batch of 32, prefix cached"
    prompt = Condition("large", "bfloat16", 1, False, prompt=True)
    assert str(prompt) == "large, bfloat16, prompt tokens"


# --- the bounds in use ----------------------------------------------------------------------------


def test_every_bound_says_where_it_comes_from_and_a_measured_one_covers_its_measurement():
    assert {dtype: bound.nats for dtype, bound in BOUNDS.items()} == TOLERANCE
    for bound in BOUNDS.values():
        assert bound.why
        assert (bound.largest is None) == (not bound.device)
        assert bound.largest is None or bound.largest <= bound.nats


def test_the_page_about_gpus_gives_the_bounds_that_are_in_use():
    page = Path(__file__).parents[2] / "docs" / "run-on-a-gpu-host.md"
    text = " ".join(page.read_text().split())
    assert f"bfloat16 ({TOLERANCE['bfloat16']:g} nats)" in text
    assert f"float16 ({TOLERANCE['float16']:g})" in text


# --- asking ---------------------------------------------------------------------------------------


def test_no_prompt_begins_like_another():
    found = part.prompts(part.BATCH, 6, 300)
    assert found == part.prompts(part.BATCH, 6, 300)
    assert len({prompt[0] for prompt in found}) == len(found) == part.BATCH
    assert {len(prompt) for prompt in found} <= set(range(8, 65))
    assert all(6 <= each < 300 for prompt in found for each in prompt)


class Cache:
    """A client whose server has a prefix cache."""

    def __init__(self, *, broken: bool = False) -> None:
        self.cached: set[tuple[int, ...]] = set()
        self.broken, self.batches = broken, list[int]()

    def flush_cache(self) -> None:
        if not self.broken:
            self.cached.clear()

    def generate(self, prompt: list[int], **_: Any) -> Any:
        return self.generate_batch([prompt])[0]

    def generate_batch(self, prompts: list[list[int]], **_: Any) -> list[Any]:
        self.batches.append(len(prompts))
        found = [len(p) * (tuple(p) in self.cached) for p in prompts]
        self.cached |= {tuple(p) for p in prompts}
        return [
            type("G", (), {"output_ids": (1,), "logprobs": (-0.5,), "cached_tokens": cached})
            for cached in found
        ]


ASKED = [(1, 2), (2, 3), (3, 4)]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("cached", [False, True])
def test_prompts_come_out_of_the_cache_or_do_not_as_the_condition_says(batch: int, cached: bool):
    client = Cache()
    answers = part.ask(client, ASKED, batch, cached)  # type: ignore[arg-type]
    assert [answer.prompt for answer in answers] == ASKED
    assert part.why_not_cached(answers, cached) == ""
    assert set(client.batches) == {batch}
    assert part.why_not_cached(answers, not cached)


def test_a_cache_that_is_not_emptied_is_no_measurement_without_it():
    client = Cache(broken=True)
    client.cached = set(ASKED)
    told = part.why_not_cached(part.ask(client, ASKED, 3, False), False)  # type: ignore[arg-type]
    assert told == "3 of 3 prompts were in the emptied prefix cache"


def test_tokens_are_scored_with_how_far_they_are_behind():
    answer = Answer((1,), (5, 6), (-0.5, -1.0), 0)
    scores = Scores((-0.6, -1.5), (5, 7), (-0.6, -1.2))
    found = part.tokens_of(answer, scores)
    assert [round(each.off, 6) for each in found] == [0.1, 0.5]
    assert [round(each.behind, 6) for each in found] == [0.0, 0.3]
    with pytest.raises(AssertionError, match="2 log-probabilities"):
        part.tokens_of(Answer((1,), (5, 6), (-0.5,), 0), scores)


class Reference:
    def __init__(self) -> None:
        self.scored = 0

    def prompt_logprobs(self, prompt: Any) -> list[float]:
        return [-2.0] * (len(prompt) - 1)

    def score(self, prompt: Any, ids: Any) -> Scores:
        self.scored += 1
        return Scores((-0.5,) * len(ids), tuple(ids), (-0.5,) * len(ids))


def test_an_answer_is_scored_once_and_one_at_least_whatever_the_time():
    reference = Reference()
    scoring = Scoring(reference)  # type: ignore[arg-type]
    answers = [Answer((n,), (5, 6), (-0.5, -0.5), 0) for n in range(3)]
    assert len(scoring.score(answers, within=-1.0)) == 2
    assert len(scoring.score(answers, within=30.0)) == 6
    assert len(scoring.score(answers, within=-1.0)) == 6
    assert reference.scored == scoring.passes == 3


class Prompts:
    def __init__(self, *logprobs: float | None) -> None:
        self.logprobs = logprobs

    def generate(self, prompt: Any, **_: Any) -> Any:
        return type("G", (), {"prompt_logprobs": self.logprobs})


def test_tokens_of_prompts_are_measured_but_the_first():
    def of(*logprobs: float | None) -> list[Token]:
        return part.of_prompts(Prompts(*logprobs), Reference(), ASKED, 10.0)  # type: ignore[arg-type]

    assert of(None, -2.25) == [Token(-2.25, -2.0, 0.0)] * 3
    assert of(None, None)[0].off == math.inf
    with pytest.raises(AssertionError, match="expected 1 log-probabilities of a prompt, got 2"):
        of(None, -2.0, -2.0)


# --- the part -------------------------------------------------------------------------------------


@pytest.fixture
def one_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The part with made-up measurements of each server."""

    def prepared(*rows: Any, seconds: float = 600.0):
        answers = list(rows)

        def of_one_server(_: Any, __: Any, conditions: list[Condition], ___: float):
            off = answers.pop(0)
            if isinstance(off, str):
                return [Measured(each, why_not=off, failed=True) for each in conditions]
            return [measured(off, condition=each) for each in conditions]

        monkeypatch.setattr(part, "_of_one_server", of_one_server)
        return context(tmp_path / "out", seconds=seconds)

    return prepared


def test_it_holds_where_every_judged_condition_is_within_its_bound(one_server):
    given, reports = one_server(0.1, 1e-5, 1e-4, 0.3)
    part.measure(given)
    notes = [each for each in reports if each["kind"] == "note"]
    assert len(notes) == 20 + 2
    assert all(each["what"].startswith("CPU: ") for each in notes)


def test_it_fails_with_the_figure_where_one_is_not(one_server):
    given, _ = one_server(0.1, 6e-4, 1e-4, 0.3)
    with pytest.raises(AssertionError, match=r"float32: expected at most 0\.0005 nats, measured 0"):
        part.measure(given)


def test_a_server_that_does_not_start_fails_it_and_the_others_are_measured(one_server):
    given, _ = one_server("no server: it died", 1e-5, 1e-4, 0.3)
    with pytest.raises(AssertionError, match=r"large, bfloat16, batch of 1.*no server: it died"):
        part.measure(given)


def test_conditions_without_time_are_named(one_server):
    given, _ = one_server(seconds=part.LEAST / 2)
    with pytest.raises(NotHere, match="0 of 20 conditions were measured"):
        part.measure(given)


def test_a_server_that_does_not_start_is_no_server_for_each_of_its_conditions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    given, _ = context(tmp_path)

    def none(**_: Any) -> Any:
        raise EngineError("The server ended by itself.")

    monkeypatch.setattr(given, "server", none)
    rows = part._of_one_server(given, "tiny", [HALF], 10.0)
    assert [row.why_not for row in rows] == ["no server: The server ended by itself."]
    assert rows[0].failed
