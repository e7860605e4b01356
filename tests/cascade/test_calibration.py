"""Promises: bounds against known values, validity by simulation, refusals, and the file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from shadow_peft import ShadowCascade
from shadow_peft.cascade.bounds import conformal_choice, fixed_sequence_choice, p_value, upper_bound
from shadow_peft.cascade.calibration import Calibration, Promise, calibrate
from shadow_peft.cascade.curve import all_thresholds, curve_of, draw_curves
from shadow_peft.cascade.outcomes import (
    Outcome,
    exact_match,
    json_fields,
    load_outcomes,
    record_lows,
    save_outcomes,
    steps_of,
    tabulate,
    word_overlap,
)
from shadow_peft.cascade.scorer import Scorer, calibration_error, fit_scorer
from shadow_peft.cascade.signals import signals_for
from shadow_peft.cascade.storage import FILE, load_calibration, save_calibration
from shadow_peft.cascade.trace import Trace
from tests.cascade.worlds import PROMPTS, simulated, tokenizer
from tests.tiny_models import causal_lm, classifier, llama, llama_classifier

INFINITY = float("inf")


def losses(wrong: int, n: int) -> np.ndarray:
    return np.repeat([1.0, 0.0], [wrong, n - wrong])


def trace(*p: float) -> Trace:
    return Trace(tuple(np.log(p)), p, p, p)


# ---------------------------------------------------------------- bounds


@pytest.mark.parametrize(("wrong", "n"), [(0, 50), (3, 50), (17, 40), (50, 50)])
def test_the_bound_of_errors_is_clopper_pearsons(wrong: int, n: int) -> None:
    expected = binomtest(wrong, n).proportion_ci(0.90, method="exact").high  # two-sided 90 %: one-sided 95 %
    assert upper_bound(losses(wrong, n), 0.05) == pytest.approx(expected, abs=1e-9)


def test_the_bound_of_graded_losses_is_never_below_the_mean_and_tightens() -> None:
    rng = np.random.default_rng(0)
    bounds = [upper_bound(rng.uniform(0, 0.4, n), 0.05) for n in (50, 500, 5000)]
    assert bounds[0] > bounds[1] > bounds[2] > 0.2
    assert bounds[2] < 0.23


def test_p_values_of_impossible_risks() -> None:
    assert p_value(losses(1, 10), 0.0) == 1.0
    assert p_value(losses(1, 10), 1.0) == 0.0


def test_a_sequence_ends_at_the_first_that_is_not_proven() -> None:
    table = np.stack([losses(1, 100), losses(2, 100), losses(40, 100), losses(0, 100)], axis=1)
    assert fixed_sequence_choice(table, 0.1, 0.05) == 1
    assert fixed_sequence_choice(table[:, 2:], 0.1, 0.05) is None


def test_conformal_choice_counts_the_next_example_as_lost() -> None:
    table = np.stack([losses(0, 19), losses(1, 19), losses(2, 19)], axis=1)
    assert conformal_choice(table, 0.1) == 1  # (1 + 1) / 20
    assert conformal_choice(table, 0.04) is None  # (0 + 1) / 20 is more


def test_bounds_hold_for_graded_losses_in_simulation() -> None:
    rng, broken = np.random.default_rng(1), 0
    for _ in range(400):
        broken += upper_bound(rng.beta(0.3, 1.2, 60), 0.1) < 0.2  # the mean of this distribution
    assert broken <= 40 + 2 * 6  # 10 % of 400, and two standard deviations


# ---------------------------------------------------------------- signals, scorers, tables


def test_record_lows() -> None:
    assert record_lows([0.5, 0.7, 0.5, 0.2, 0.3, 0.1]) == [0, 3, 5]


def test_a_table_says_what_each_threshold_does() -> None:
    outcome = Outcome(trace(0.8, 0.9, 0.4), 0.25, {0: 1.0, 2: 0.5})
    scorer = Scorer("min_probability")
    steps = [steps_of(outcome, scorer, "token")]
    table = tabulate([outcome], steps, np.array([-INFINITY, 0.4, 0.41, 0.8, 0.81, INFINITY]))
    assert table.qualities.tolist() == [[0.25, 0.25, 0.5, 0.5, 1.0, 1.0]]
    assert table.asked.tolist() == [[0, 0, 1, 1, 1, 1]]
    whole = tabulate([outcome], [steps_of(outcome, scorer, "answer")], np.array([0.4, 0.41]))
    assert whole.qualities.tolist() == [[0.25, 1.0]]


def test_a_scorer_is_calibrated_and_never_ties() -> None:
    outcomes = simulated(3000, np.random.default_rng(2))
    traces, right = [o.trace for o in outcomes], np.array([o.shadow for o in outcomes])
    fresh = simulated(3000, np.random.default_rng(3))
    truth = np.array([o.shadow for o in fresh])
    for signal in signals_for("answer"):
        scorer = fit_scorer(signal, traces, right).scorer
        assert all(a < b for a, b in zip(scorer.levels, scorer.levels[1:], strict=False))
        raw, score = (np.array([f(o.trace) for o in fresh]) for f in (scorer.raw, scorer))
        assert calibration_error(score, truth) < 0.06
        if signal in ("mean_probability", "certainty"):  # far from probabilities of being right
            assert calibration_error(score, truth) < 0.5 * calibration_error(raw, truth)
        assert len(np.unique(score)) == len(np.unique(raw))


def test_a_scorer_of_equal_qualities_still_rises() -> None:
    traces = [trace(p) for p in np.linspace(0.01, 0.99, 50)]
    for quality in (0.0, 1.0):
        for signal in ("min_probability", "head"):
            scorer = fit_scorer(signal, traces, np.full(50, quality)).scorer
            assert scorer(traces[-1]) >= scorer(traces[0])
            assert abs(scorer(traces[25]) - quality) < 0.05


def test_the_head_learns_what_single_signals_miss() -> None:
    rng = np.random.default_rng(4)
    outcomes = []
    for _ in range(1500):  # right depends on the length, which no other signal sees
        n = int(rng.integers(1, 12))
        outcomes.append(Outcome(trace(*rng.uniform(0.7, 0.9, n)), float(rng.random() < 1 / n), {0: 1.0}))
    found = calibrate(outcomes, Promise("regret", 0.3))
    areas = found.report["signal_areas"]
    assert found.scorer.signal == "head"
    assert areas["head"] > areas["min_margin"] + 0.01 or areas["head"] == max(areas.values())


def test_a_scorer_refuses_what_it_cannot_be() -> None:
    with pytest.raises(ValueError, match="signal is one of"):
        Scorer("luck")
    with pytest.raises(ValueError, match="weights of a head"):
        Scorer("head")
    with pytest.raises(ValueError, match="rise strictly"):
        Scorer(knots=(0, 0.5, 1), levels=(0, 0.5, 0.5))
    with pytest.raises(ValueError, match="needs the whole answer"):
        Scorer("mean_margin").of_tokens(trace(0.5))


def test_measures_of_quality() -> None:
    assert (exact_match(" a b\n", "a b"), exact_match("a", "b")) == (1.0, 0.0)
    assert word_overlap("The red cup", "a red cup") == pytest.approx(2 / 3)
    assert (word_overlap("", ""), word_overlap("", "a")) == (1.0, 0.0)
    reference = '{"a": 1, "b": null}'
    answers = ['{"b": null, "a": 1, "c": 2}', '{"a": 2, "b": null}', '{"a": 1}', "[1]", "{", '{"a": 2}']
    assert [json_fields(answer, reference) for answer in answers] == [1.0, 0.5, 0.5, 0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="compares JSON objects"):
        json_fields("{}", "[1]")


# ---------------------------------------------------------------- promises


def true_value(found: Calibration, outcomes: list[Outcome]) -> dict[str, float]:
    """What a calibration does on many outcomes that it has not seen."""
    steps = [steps_of(o, found.scorer, found.takeover) for o in outcomes]
    table = tabulate(outcomes, steps, np.array([found.threshold]))
    regret = np.maximum(0, table.attached - table.qualities[:, 0]).mean()
    return {"quality": table.qualities.mean(), "escalations": table.asked.mean(), "regret": regret}


@pytest.fixture(scope="module")
def population() -> list[Outcome]:
    return simulated(20000, np.random.default_rng(10))


@pytest.mark.parametrize(
    ("kind", "target", "signal"),
    [("quality", 0.78, "min_margin"), ("escalations", 0.3, "min_margin"), ("regret", 0.1, "certainty")],
)
def test_a_promise_is_broken_by_at_most_its_error(kind: str, target: float, signal: str, population: list[Outcome]) -> None:
    """200 calibrations of 240 examples each; at 95 % at most 10 may break it, and two standard deviations of that are 6."""
    broken, kept_closely = 0, 0
    table = _Fast(population, signal)
    for draw in range(200):
        rng = np.random.default_rng([7, draw])
        outcomes = [population[i] for i in rng.integers(0, len(population), 240)]
        try:
            found = calibrate(outcomes, Promise(kind, target), signals=[signal], seed=draw)  # type: ignore[arg-type]
        except ValueError:
            continue  # nothing was promised
        value = table.value(found, kind)
        broken += value < target if kind == "quality" else value > target
        kept_closely += abs(value - target) < 0.12
    assert broken <= 16
    assert kept_closely > 150, "a promise that asks always would be kept, too"


class _Fast:
    """Values on a large population, by sorting it once."""

    def __init__(self, outcomes: list[Outcome], signal: str) -> None:
        raw = np.array([Scorer(signal).raw(o.trace) for o in outcomes])
        order = np.argsort(raw)
        self.raw = raw[order]
        shadow, attached = (np.array(v)[order] for v in zip(*[(o.shadow, o.takeovers[0]) for o in outcomes], strict=True))
        zero = np.zeros(1)
        self.n = len(raw)
        self.asked_quality = np.concatenate([zero, attached.cumsum()])
        self.shadow_quality = np.concatenate([zero, shadow.cumsum()])
        self.lost = np.concatenate([zero, np.maximum(0, attached - shadow).cumsum()])

    def value(self, found: Calibration, kind: str) -> float:
        asked = int((found.scorer.level(self.raw) < found.threshold).sum())
        if kind == "escalations":
            return asked / self.n
        if kind == "regret":
            return float(self.lost[-1] - self.lost[asked]) / self.n
        return float(self.asked_quality[asked] + self.shadow_quality[-1] - self.shadow_quality[asked]) / self.n


def test_graded_qualities_carry_promises_too() -> None:
    outcomes = simulated(2000, np.random.default_rng(11), graded=True)
    found = calibrate(outcomes, Promise("quality", 0.62), signals=["min_margin"])
    assert true_value(found, simulated(20000, np.random.default_rng(12), graded=True))["quality"] >= 0.62
    assert 0 < found.report["escalated"] < 1


def test_in_expectation_less_is_asked_than_with_confidence(population: list[Outcome]) -> None:
    shares = {}
    for confidence in (None, 0.95, 0.999):
        found = calibrate(population[:800], Promise("regret", 0.1, confidence), signals=["min_margin"])
        shares[confidence] = found.report["escalated"]
    assert shares[None] < shares[0.95] < shares[0.999]
    regrets = []
    for draw in range(60):
        outcomes = [population[i] for i in np.random.default_rng([8, draw]).integers(0, len(population), 200)]
        found = calibrate(outcomes, Promise("regret", 0.1, None), signals=["min_margin"], seed=draw)
        regrets.append(_Fast(population, "min_margin").value(found, "regret") if draw < 20 else np.nan)
    assert np.nanmean(regrets) < 0.11


def test_the_report_says_what_was_measured(population: list[Outcome]) -> None:
    found = calibrate(population[:1000], Promise("quality", 0.8))
    report = found.report
    assert report["examples"] == {"first_part": 500, "second_part": 500}
    assert report["shadow_quality"] < found.promise.target <= found.bound < report["quality"] < report["attached_quality"]
    assert report["area"] > report["random_area"]
    assert report["calibration_error_after"] < 0.1
    assert set(report["signal_areas"]) == set(signals_for("answer"))
    assert found.curve is not None
    assert found.curve.quality_at(report["escalated"]) == pytest.approx(report["quality"])


def test_a_promise_that_the_data_cannot_carry_is_refused_with_the_best(population: list[Outcome]) -> None:
    outcomes = population[:400]
    with pytest.raises(
        ValueError, match=r"cannot carry quality 0.97 with confidence 0.95: the best .* is 0\.\d+"
    ) as refused:
        calibrate(outcomes, Promise("quality", 0.97))
    best = float(str(refused.value).split("promised is ")[1].split(",")[0])
    assert calibrate(outcomes, Promise("quality", best)).bound >= best
    with pytest.raises(ValueError, match="cannot carry"):
        calibrate(outcomes, Promise("quality", best + 1e-3))
    with pytest.raises(ValueError, match=r"cannot carry escalations 0.001 .* is 0\.0149"):
        calibrate(outcomes, Promise("escalations", 0.001))
    with pytest.raises(ValueError, match=r"cannot carry regret 0.001 in expectation: .* is 0\.005"):
        calibrate(outcomes, Promise("regret", 0.001, None))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("luck", 0.5), "promise is one of"),
        (("quality", 1.0), "between 0 and 1, got 1.0"),
        (("quality", 0.5, 1.0), "confidence must lie between"),
        (("quality", 0.5, None), "with a confidence alone"),
    ],
)
def test_a_promise_that_means_nothing_is_refused(settings: tuple[object, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Promise(*settings)  # type: ignore[arg-type]


def test_too_little_is_refused(population: list[Outcome]) -> None:
    with pytest.raises(ValueError, match="needs 40 examples or more, got 39"):
        calibrate(population[:39], Promise("quality", 0.5))
    with pytest.raises(ValueError, match="No signal mean_margin for takeover='token'"):
        calibrate(population[:50], Promise("quality", 0.5), takeover="token", signals=["mean_margin"])
    with pytest.raises(ValueError, match="takeovers\\[0\\]"):
        Outcome(trace(0.5), 1.0, {1: 1.0})
    with pytest.raises(ValueError, match="between 0 and 1, got 2"):
        Outcome(trace(0.5), 2.0, {0: 1.0})


# ---------------------------------------------------------------- curves


def test_areas_of_a_perfect_and_a_useless_signal() -> None:
    rng = np.random.default_rng(5)
    right = rng.random(2000) < 0.5
    perfect = [Outcome(trace(0.9 - 0.5 * (not r) + rng.uniform(0, 0.05)), float(r), {0: 1.0}) for r in right]
    useless = [Outcome(trace(rng.uniform(0.1, 0.9)), float(r), {0: 1.0}) for r in right]
    for outcomes, area in ((perfect, 0.875), (useless, 0.75)):
        curve = curve_of(outcomes, [steps_of(o, Scorer("min_probability"), "answer") for o in outcomes])
        assert curve.area == pytest.approx(area, abs=0.02)
        assert curve.random_area == pytest.approx(0.75, abs=0.02)
        assert (curve.shares[0], curve.shares[-1], curve.qualities[-1]) == (0.0, 1.0, 1.0)


def test_ties_are_asked_for_together() -> None:
    outcomes = [Outcome(trace(p), q, {0: 1.0}) for p, q in ((0.5, 0.0), (0.5, 1.0), (0.9, 1.0))]
    steps = [steps_of(o, Scorer("min_probability"), "answer") for o in outcomes]
    assert all_thresholds(steps).tolist() == [-INFINITY, 0.9, INFINITY]
    assert curve_of(outcomes, steps).shares == pytest.approx((0.0, 2 / 3, 1.0))


def test_a_curve_is_drawn(tmp_path: Path, population: list[Outcome]) -> None:
    found = calibrate(population[:200], Promise("quality", 0.7))
    assert found.curve is not None
    draw_curves(tmp_path / "curve.png", {found.scorer.signal: found.curve}, (0.3, 0.8))
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("signal", ["min_margin", "head"])
def test_a_calibration_is_saved_and_loaded(signal: str, tmp_path: Path, population: list[Outcome]) -> None:
    found = calibrate(population[:300], Promise("quality", 0.75), signals=[signal])
    save_calibration(found, tmp_path)
    loaded = load_calibration(tmp_path)
    assert loaded.threshold == found.threshold
    assert [loaded.scorer(o.trace) for o in population[:50]] == [found.scorer(o.trace) for o in population[:50]]
    assert (loaded.promise, loaded.takeover, loaded.bound) == (found.promise, found.takeover, found.bound)
    assert loaded.report == json.loads(json.dumps(found.report))


def test_endless_thresholds_are_valid_json(tmp_path: Path) -> None:
    outcomes = [Outcome(trace(0.5), 0.0, {0: 1.0})] * 60
    found = calibrate(outcomes, Promise("regret", 0.2))
    assert found.threshold == INFINITY
    save_calibration(found, tmp_path)
    json.loads((tmp_path / FILE).read_text(), parse_constant=lambda name: pytest.fail(name))
    assert load_calibration(tmp_path).threshold == INFINITY


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 2}, "its format is 2"),
        ({"threshold": "nan"}, "not a number"),
        ({"threshold": "high"}, "could not convert"),
        ({"takeover": "word"}, "takeover is 'answer' or 'token'"),
        ({"takeover": "token", "scorer": None}, "is no calibration"),
        ({"scorer": {"signal": "luck", "knots": [0, 1], "levels": [0, 1], "head": None}}, "signal is one of"),
        ({"promise": {"kind": "quality", "target": 3}}, "target must lie"),
        ({"report": 3}, "is no calibration"),
    ],
)
def test_a_damaged_file_is_named(change: dict[str, object], said: str, tmp_path: Path, population: list[Outcome]) -> None:
    save_calibration(calibrate(population[:100], Promise("regret", 0.3), signals=["mean_margin"]), tmp_path)
    data = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps({**data, **change}))
    with pytest.raises(ValueError, match=said) as refused:
        load_calibration(tmp_path)
    assert str(tmp_path / FILE) in str(refused.value)
    del data["bound"]
    (tmp_path / FILE).write_text(json.dumps(data))
    with pytest.raises(ValueError, match="it has no 'bound'"):
        load_calibration(tmp_path)


def test_outcomes_are_saved_and_loaded(tmp_path: Path, population: list[Outcome]) -> None:
    save_outcomes(tmp_path / "outcomes.jsonl", population[:20])
    assert load_outcomes(tmp_path / "outcomes.jsonl") == population[:20]


# ---------------------------------------------------------------- with models


def rows(model: object, count: int, half: bool = True) -> list[dict[str, str]]:
    """Prompts whose references are what the attached model answers, every third time with something else."""
    prompts = [f"{PROMPTS[i % 4]} {i}" for i in range(count)]
    texts = [a.text for a in ShadowCascade(model, tokenizer(), threshold=INFINITY, **_short(model)).answers(prompts)]  # type: ignore[arg-type]
    return [
        {"prompt": p, "completion": "?" if i % 3 == 0 else t} for i, (p, t) in enumerate(zip(prompts, texts, strict=True))
    ]


def _short(model: object) -> dict[str, object]:
    return {"max_new_tokens": 6, "do_sample": False} if hasattr(model, "lm_head") else {}


def told_apart(answer: str) -> float:
    """A quality that differs between almost all answers."""
    return sum(place * ord(character) for place, character in enumerate(answer, start=1)) % 97 / 97


@pytest.mark.parametrize("takeover", ["answer", "token"])
def test_what_is_measured_is_what_happens(takeover: str) -> None:
    """The table of outcomes says for each threshold what the cascade then answers."""
    model = causal_lm(llama())
    data = rows(model, 6)
    made = ShadowCascade(model, tokenizer(), takeover=takeover, **_short(model))  # type: ignore[arg-type]
    outcomes = made.measure(data, quality=lambda a, _: told_apart(a))
    thresholds = [-INFINITY, *sorted({c for o in outcomes for c in Scorer().of_tokens(o.trace)})[::5], INFINITY]
    steps = [steps_of(o, Scorer(), takeover) for o in outcomes]  # type: ignore[arg-type]
    table = tabulate(outcomes, steps, np.array(thresholds))
    for column, threshold in enumerate(thresholds):
        real = ShadowCascade(model, tokenizer(), threshold=threshold, takeover=takeover, **_short(model))  # type: ignore[arg-type]
        answers = real.answers([row["prompt"] for row in data])
        assert [told_apart(a.text) for a in answers] == pytest.approx(table.qualities[:, column].tolist())
        assert [float(a.answered_by != "shadow") for a in answers] == table.asked[:, column].tolist()


def test_a_calibrated_cascade_is_saved_beside_its_shadow(tmp_path: Path) -> None:
    model = causal_lm(llama())
    made = ShadowCascade(model, tokenizer(), **_short(model))  # type: ignore[arg-type]
    data = rows(model, 60)
    found = made.calibrate(data, 0.3, promise="regret")
    assert made.policy.threshold == found.threshold
    assert found.provenance["versions"]["shadow-peft"]
    assert found.provenance["generation"]["max_new_tokens"] == 6
    made.save_calibration(tmp_path)
    loaded = load_calibration(tmp_path)
    again = ShadowCascade(model, tokenizer(), calibration=loaded, **_short(model))  # type: ignore[arg-type]
    prompts = [row["prompt"] for row in data]
    assert again.answers(prompts) == made.answers(prompts)
    with pytest.raises(ValueError, match="made for another shadow"):
        ShadowCascade(causal_lm(llama(9)), tokenizer(), calibration=loaded)
    exported = model.export_shadow()
    from shadow_peft import RemoteModel

    ShadowCascade(exported, tokenizer(), calibration=loaded, remote=RemoteModel("m", "http://127.0.0.1:1/v1"))


def test_a_refused_calibration_leaves_the_cascade_as_it_was() -> None:
    model = causal_lm(llama())
    made = ShadowCascade(model, tokenizer(), threshold=0.4, **_short(model))  # type: ignore[arg-type]
    outcomes = simulated(100, np.random.default_rng(0))
    with pytest.raises(ValueError, match="cannot carry"):
        made.calibrate(outcomes, 0.999)
    assert (made.policy.threshold, made.calibration) == (0.4, None)
    with pytest.raises(ValueError, match="no calibration to save"):
        made.save_calibration("nowhere")
    with pytest.raises(ValueError, match="Row 2 has no 'prompt'"):
        made.measure([{"prompt": "a", "completion": "b"}, {"text": "c"}])


def test_classes_are_calibrated() -> None:
    model = classifier(llama_classifier())
    made = ShadowCascade(model, tokenizer())
    found = made.calibrate(rows(model, 60), 0.3, promise="escalations")
    assert found.report["attached_quality"] > found.report["shadow_quality"]
    assert found.report["escalated"] < 0.3
