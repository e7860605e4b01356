"""How long drafts are, in simulated time: a fake clock, shadows that are right by decree, no networks."""

from __future__ import annotations

import gc
import weakref
from itertools import cycle

import pytest
import torch

from shadow_peft import ShadowConfig
from shadow_peft.generation.acceptance import AcceptanceEstimate
from shadow_peft.generation.draft_length import DraftLength
from shadow_peft.generation.pass_times import KEPT_BATCHES, Costs, PassTimes, pass_times
from tests.draft_simulation import Clock, Oracle, World, adaptive, best_fixed, decode, known_times
from tests.tiny_models import causal_lm, llama

COSTS = {
    1: {"verify": 0.03, "draft": 0.25},
    2: {"verify": 0.3, "draft": 0.15},
    8: {"verify": 0.5, "draft": 0.15},
    32: {"verify": 0.05, "draft": 0.1},
}
"""Rows and what a drafted token costs them: a half precision base on a CPU, two more, an accelerator."""
TOKENS = 64


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def constant(rows: int, right: bool, sure: float, world: World, clock: Clock) -> Oracle:
    shape = (rows, TOKENS + 32)
    return Oracle(torch.full(shape, right), torch.full(shape, sure), world, clock)


@pytest.mark.parametrize("sure", [0.1, 0.5, 0.98])
@pytest.mark.parametrize("rows", COSTS)
def test_a_shadow_that_is_never_right_costs_a_twentieth_at_most(rows: int, sure: float, clock: Clock) -> None:
    world = World(**COSTS[rows])
    seconds = decode(constant(rows, False, sure, world, clock), adaptive(world), TOKENS)
    assert TOKENS < seconds <= 1.05 * TOKENS


@pytest.mark.parametrize("sure", [0.1, 0.5, 0.98])
@pytest.mark.parametrize("rows", COSTS)
def test_a_shadow_that_is_always_right_drafts_as_well_as_the_best_length(rows: int, sure: float, clock: Clock) -> None:
    world = World(**COSTS[rows])
    seconds = decode(constant(rows, True, sure, world, clock), adaptive(world), TOKENS)
    assert seconds <= 1.1 * best_fixed(lambda: constant(rows, True, sure, world, clock), TOKENS)


@pytest.mark.parametrize(("rate", "sure"), [(0.5, 0.95), (0.7, 0.3), (0.85, 0.85)])
def test_a_shadow_that_is_often_right_drafts_nearly_as_well_as_the_best_length(
    rate: float, sure: float, clock: Clock
) -> None:
    world, tokens, seeds = World(**COSTS[1]), 128, range(8)

    def oracle(seed: int) -> Oracle:
        right = torch.rand(1, 160, generator=torch.Generator().manual_seed(seed)) < rate
        return Oracle(right, torch.full(right.shape, sure), world, clock)

    seconds = sum(decode(oracle(seed), adaptive(world), tokens) for seed in seeds)
    fixed = [sum(decode(oracle(seed), DraftLength(None), tokens, most) for seed in seeds) for most in range(9)]
    assert seconds <= 1.1 * min(fixed)


def test_confidence_that_tells_right_from_wrong_beats_every_fixed_length(clock: Clock) -> None:
    world, seeds = World(**COSTS[1]), range(8)

    def oracle(seed: int) -> Oracle:
        chance = torch.rand(1, 160, generator=torch.Generator().manual_seed(seed))
        hard = torch.rand(1, 160, generator=torch.Generator().manual_seed(100 + seed)) < 0.3
        return Oracle(torch.where(hard, chance < 0.1, chance < 0.98), torch.where(hard, 0.7, 0.9), world, clock)

    seconds = sum(decode(oracle(seed), adaptive(world), 128) for seed in seeds)
    fixed = [sum(decode(oracle(seed), DraftLength(None), 128, most) for seed in seeds) for most in range(9)]
    assert seconds < min(fixed)


def test_a_shadow_that_goes_wrong_is_given_up_and_one_that_comes_right_is_found(clock: Clock) -> None:
    world, length = World(**COSTS[1]), adaptive(World(**COSTS[1]))
    assert decode(constant(1, False, 0.9, world, clock), length, 200) <= 1.03 * 200
    assert decode(constant(1, True, 0.9, world, clock), length, 60) <= 0.7 * 60
    assert decode(constant(1, False, 0.9, world, clock), length, 60) <= 1.2 * 60  # two long drafts are lost


@pytest.mark.parametrize("rows", COSTS)
def test_later_generations_know_that_drafts_did_not_pay(rows: int, clock: Clock) -> None:
    world = World(**COSTS[rows])
    times = known_times(world)
    first, *later = (decode(constant(rows, False, 0.9, world, clock), DraftLength(times), 12) for _ in range(6))
    assert 12 < first <= 12 + 2
    assert all(seconds <= 1.06 * 12 for seconds in later)


@pytest.mark.parametrize("rows", COSTS)
def test_what_was_learned_is_learned_anew(rows: int, clock: Clock) -> None:
    """After a generation that drafts did not help, one that they do; and the other way round, whatever was won before."""
    world = World(**COSTS[rows])
    times = known_times(world)
    decode(constant(rows, False, 0.9, world, clock), DraftLength(times), TOKENS)
    right = decode(constant(rows, True, 0.9, world, clock), DraftLength(times), TOKENS)
    assert right <= 1.25 * best_fixed(lambda: constant(rows, True, 0.9, world, clock), TOKENS)
    wrong = decode(constant(rows, False, 0.9, world, clock), DraftLength(times), TOKENS)
    assert wrong <= 1.05 * TOKENS


def test_drafts_follow_what_is_measured_where_the_formula_was_wrong(clock: Clock) -> None:
    """Believed free, verifying costs two thirds of a pass; and believed dear, it is nearly free."""
    dear = World(verify=0.65, draft=0.2, prior=Costs(0.1, 0.01))
    length = DraftLength(PassTimes(dear.believed()))
    decode(constant(1, True, 0.9, dear, clock), length, 400)
    half = torch.arange(400)[None] % 2 == 0
    again = Oracle(half, torch.full((1, 400), 0.9), dear, clock)
    assert decode(again, length, 128) <= 1.12 * 128
    cheap = World(verify=0.01, draft=0.1, prior=Costs(0.3, 0.4))
    assert decode(constant(1, True, 0.9, cheap, clock), DraftLength(PassTimes(cheap.believed())), 200) <= 0.3 * 200


def test_times_are_fitted_through_noise() -> None:
    times, noise = PassTimes(Costs(0.5, 0.5)), cycle([1.0, 1.02, 7.0, 0.99, 1.01, 1.0, 3.0])
    for _ in range(9):
        for drafted in (0, 2, 5):
            times.add_pass(drafted, next(noise) * 0.03 * (1 + 0.1 * drafted))
        times.add_draft(3, next(noise) * 3 * 0.006)
    assert times.costs().verify == pytest.approx(0.1, abs=0.03)
    assert times.costs().draft == pytest.approx(0.26, abs=0.03)  # an eighth of the weight is the prior's


def test_one_measurement_changes_nothing_and_the_scale_is_learned_from_any_length() -> None:
    times, prior = PassTimes(Costs(0.3, 0.1)), Costs(0.3, 0.1)
    assert times.costs() == prior
    times.add_pass(4, 99.0)
    assert times.costs() == prior
    times.add_pass(4, 1.4)  # of two the smaller: a first pass at a new shape pays for setting something up
    assert times.costs().verify == pytest.approx(prior.verify)
    for _ in range(8):
        times.add_draft(1, 0.6)
    assert times.costs().draft == pytest.approx((7 * 0.6 + 2 * 0.3) / 9)


def test_an_estimate_calibrates_every_confidence() -> None:
    estimate = AcceptanceEstimate()
    assert estimate.rate == pytest.approx(0.9)
    for _ in range(30):
        estimate.update([[0.1], [0.9]], [1, 0])
    low, high = estimate.chances(torch.tensor([0.1, 0.9])).tolist()
    assert low > 0.85
    assert high < 0.15
    assert estimate.rate == pytest.approx(0.5, abs=0.03)


def test_tokens_behind_a_rejection_are_not_judged() -> None:
    one, other = AcceptanceEstimate(), AcceptanceEstimate()
    one.update([[0.9, 0.5, 0.3, 0.3]], [1])
    other.update([[0.9, 0.5]], [1])
    assert vars(one) == vars(other)


@pytest.mark.parametrize(("chance", "cost"), [(0.5, 0.2), (0.8, 0.16), (0.9, 0.05), (0.3, 0.4)])
def test_a_draft_ends_where_its_rate_is_best(chance: float, cost: float) -> None:
    """Against every length: tokens won per base pass, counted out."""
    rates = [sum(chance**i for i in range(n + 1)) / (1 + n * cost) for n in range(60)]
    length, grown = DraftLength(PassTimes(Costs(cost, 0.0), measures=False)), 0
    for _ in range(200):  # half a dozen drafts of known result each, so that nothing but this chance is believed
        length.update([[chance]] * 100, [1] * round(100 * chance) + [0] * round(100 - 100 * chance))
    length._account, length._saved = 1000.0, 0.0  # any length may be risked, and no token is a try
    length.begin()
    while length.drafts() and length.verifies(torch.tensor([chance])):
        grown += 1
    assert rates[grown] == pytest.approx(max(rates), rel=2e-3)


def test_times_belong_to_a_model_and_go_with_it() -> None:
    model = causal_lm(llama()).peft_model
    times = pass_times(model, rows=2)
    assert pass_times(model, rows=2) is times
    assert pass_times(model, rows=3) is not times
    assert not any(isinstance(value, PassTimes) for module in model.modules() for value in vars(module).values())
    gone = weakref.ref(times)
    del model, times
    gc.collect()
    assert gone() is None


def test_batches_of_one_shape_share_their_times_and_each_has_its_drafts() -> None:
    """What was measured holds for any adapters of the same size; how often drafts are right does not."""
    model = causal_lm(llama())
    small = model.peft_model
    for name, layers in (("same", 1), ("other", 3)):
        small.add_adapter(name, ShadowConfig(num_shadow_layers=layers))
    one, same, other = (small.adapter(name) for name in ("default", "same", "other"))
    first = pass_times(small, 4, {"default": (one, 2), "same": (same, 2)})
    for _ in range(4):
        first.add_pass(0, 1.0)
        first.add_pass(1, 1.5)
    assert pass_times(small, 4, {"same": (same, 2), "default": (one, 2)}) is first  # in any order of the rows
    split = pass_times(small, 4, {"default": (one, 3), "same": (same, 1)})
    assert split is not first
    assert split.knows_base
    assert split.costs() == pytest.approx(first.costs())
    assert not pass_times(small, 4, {"default": (one, 2), "other": (other, 2)}).knows_base
    assert not pass_times(small, 5, {"default": (one, 2), "same": (same, 2)}).knows_base


def test_the_batches_that_were_asked_for_last_are_remembered() -> None:
    model = causal_lm(llama()).peft_model
    times = [pass_times(model, rows) for rows in range(1, KEPT_BATCHES + 1)]
    assert pass_times(model, 1) is times[0]
    pass_times(model, KEPT_BATCHES + 1)
    assert pass_times(model, 1) is times[0]
    assert pass_times(model, 2) is not times[1]  # it made room
    gone = weakref.ref(times[2])
    del times
    for rows in range(100, 100 + KEPT_BATCHES):
        pass_times(model, rows)
    assert gone() is None


def test_several_processes_do_not_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks must draft the same number of tokens."""
    for name, result in (("is_initialized", True), ("get_world_size", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda result=result: result)
    times = pass_times(causal_lm(llama()).peft_model, rows=1)
    known = times.costs()
    for _ in range(5):
        times.add_pass(0, 1.0)
        times.add_draft(1, 5.0)
    assert times.costs() == known
