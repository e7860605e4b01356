"""Does the cascade keep its promises on data that it has not seen, and does its curve beat asking at random?

    python -m benchmarks.cascade --demo --work FOLDER
    python -m benchmarks.cascade --name NAME --adapter ADAPTER --data unseen.jsonl --work FOLDER

The first trains the adapter of the demo in FOLDER, unless it is there. The second takes any adapter, and rows new to
it. Both models answer all rows once, which is kept in FOLDER. Then, 20 times: the rows are divided at random into a part to
calibrate on and a part to test on; each promise is calibrated on the first, with confidence 0.95, and checked on the second.
Results: benchmarks/results/cascade-NAME.json and .png; `benchmarks.cascade_report` writes the tables of docs/cascade.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import warnings
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from shadow_peft import AutoShadowModelForCausalLM, ShadowCascade
from shadow_peft.cascade.bounds import p_value
from shadow_peft.cascade.calibration import Calibration, Promise, calibrate
from shadow_peft.cascade.curve import Curve, curve_of, draw_curves
from shadow_peft.cascade.outcomes import QUALITIES, Outcome, load_outcomes, save_outcomes, steps_of, tabulate
from shadow_peft.cascade.signals import Takeover

RESULTS = Path(__file__).parent / "results"
RESAMPLINGS, CONFIDENCE = 20, 0.95
RANDOM_ORDERS = 200
BELOW = (0.03, 0.06)
DEMO_ROWS, DEMO_TOKENS = 3000, 64


# ---------------------------------------------------------------- data


def demo_adapter(work: Path, settings: Any) -> Path:
    """The adapter of the demo's race, trained unless it is there."""
    from shadow_peft.demo.measure import in_own_process
    from shadow_peft.demo.race import race_shadow

    if not (work / "adapter").is_dir():
        in_own_process(partial(race_shadow, settings, work, partial(print, flush=True)))
    return work / "adapter"


def demo_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Robot commands of the test split, of which training saw no phrase, object or place."""
    from shadow_peft.demo.robot_commands import commands

    return [command.row() for command in commands("test", count, seed + 1)]


def measured(asked: argparse.Namespace, rows: list[dict[str, Any]], adapter: Path) -> list[Outcome]:
    """What both models answer to the rows; read from WORK if it was measured before."""
    place: Path = asked.work / f"outcomes-{asked.name}-{asked.takeover}.jsonl"
    if place.is_file():
        found = load_outcomes(place)
        if len(found) == len(rows):
            return found
    from transformers import AutoTokenizer

    model = AutoShadowModelForCausalLM.from_pretrained(adapter, dtype=torch.float32)
    cascade = ShadowCascade(
        model, AutoTokenizer.from_pretrained(adapter), max_new_tokens=asked.max_new_tokens, do_sample=False
    )
    found = []
    for start in range(0, len(rows), asked.batch):
        batch = rows[start : start + asked.batch]
        found += cascade.measure(batch, quality=QUALITIES[asked.quality], takeover=asked.takeover, batch_size=asked.batch)
        print(f"{len(found):,} of {len(rows):,} rows answered", flush=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    save_outcomes(place, found)
    return found


# ---------------------------------------------------------------- one resampling


def promises(outcomes: list[Outcome]) -> dict[str, Promise]:
    """The promises that are checked; those of a quality lie below the better of the two models by so much."""
    alone = ([outcome.shadow for outcome in outcomes], [outcome.takeovers[0] for outcome in outcomes])
    best = max(float(np.mean(qualities)) for qualities in alone)
    found = {}
    for below in BELOW:
        target = round(best - below, 3)
        found[f"quality >= {target:g}"] = Promise("quality", target, CONFIDENCE)
    for target in (0.05, 0.1):
        found[f"regret <= {target:g}"] = Promise("regret", target, CONFIDENCE)
        found[f"regret <= {target:g}, in expectation"] = Promise("regret", target, None)
    for target in (0.2, 0.5):
        found[f"escalations <= {target:g}"] = Promise("escalations", target, CONFIDENCE)
    return found


def checked(found: Calibration, test: list[Outcome]) -> dict[str, Any]:
    """What a calibration does on rows that it has not seen."""
    steps = [steps_of(outcome, found.scorer, found.takeover) for outcome in test]
    table = tabulate(test, steps, np.array([found.threshold]))
    losses = found.promise.losses(table)[:, 0]
    value = found.promise.of_risk(float(losses.mean()))
    kept = float(losses.mean()) <= found.promise.risk
    curve = curve_of(test, steps)
    return {
        "signal": found.scorer.signal, "threshold": repr(found.threshold), "bound": found.bound, "value": value,
        "kept": kept, "p_value_of_keeping": 1.0 if kept else p_value(1 - losses, 1 - found.promise.risk),
        "escalated": float(table.asked.mean()), "quality": float(table.qualities.mean()),
        "shadow_quality": float(table.shadow.mean()), "attached_quality": float(table.attached.mean()),
        "calibration_error_before": found.report["calibration_error_before"],
        "calibration_error_after": found.report["calibration_error_after"],
        "area": curve.area, "random_area": curve.random_area, "signal_areas": found.report["signal_areas"],
    }  # fmt: skip


def resampled(outcomes: list[Outcome], promise: Promise, takeover: Takeover, share: float) -> list[dict[str, Any]]:
    """One entry a resampling; {"refused": why} where the data could not carry the promise."""
    entries: list[dict[str, Any]] = []
    for draw in range(RESAMPLINGS):
        order = np.random.default_rng([2026, draw]).permutation(len(outcomes))
        count = int(share * len(outcomes))
        first, second = ([outcomes[i] for i in part] for part in (order[:count], order[count:]))
        try:
            entries.append(checked(calibrate(first, promise, takeover=takeover, seed=draw), second))
        except ValueError as error:
            entries.append({"refused": str(error)})
    return entries


def summary(promise: Promise, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The resamplings of one promise in a few figures.

    `broken_beyond_noise` counts those of which the test rows exclude at 5 % that the promise was kept.
    """
    given = [entry for entry in entries if "refused" not in entry]
    figures: dict[str, Any] = {"promised": len(given), "refused": len(entries) - len(given)}
    if given:
        worst = min if promise.kind == "quality" else max
        figures |= {
            "kept": sum(entry["kept"] for entry in given),
            "broken_beyond_noise": sum(entry["p_value_of_keeping"] < 1 - CONFIDENCE for entry in given),
            "worst_value": worst(entry["value"] for entry in given),
        }
        figures |= {f"mean_{name}": float(np.mean([e[name] for e in given])) for name in ("value", "escalated", "quality")}
    return figures


# ---------------------------------------------------------------- the curve


def random_curves(outcomes: list[Outcome]) -> dict[str, float]:
    """The areas that asking in random orders gives: mean, and the range of 95 %."""
    shadow = np.array([outcome.shadow for outcome in outcomes])
    gain = np.array([outcome.takeovers[0] for outcome in outcomes]) - shadow
    rng, areas = np.random.default_rng(0), []
    for _ in range(RANDOM_ORDERS):
        qualities = shadow.mean() + np.concatenate([[0.0], gain[rng.permutation(len(gain))].cumsum()]) / len(gain)
        areas.append(float(np.trapezoid(qualities, dx=1 / len(gain))))
    low, high = np.quantile(areas, (0.025, 0.975))
    return {"mean": float(np.mean(areas)), "low": float(low), "high": float(high)}


def curve_on_unseen(outcomes: list[Outcome], takeover: Takeover, share: float) -> tuple[Curve, dict[str, Any]]:
    """The curve of a calibrated scorer on the rows that it was not fitted to."""
    count = int(share * len(outcomes))
    order = np.random.default_rng([2026, 0]).permutation(len(outcomes))
    first, second = ([outcomes[i] for i in part] for part in (order[:count], order[count:]))
    found = calibrate(first, Promise("escalations", 0.5), takeover=takeover)
    curve = curve_of(second, [steps_of(outcome, found.scorer, takeover) for outcome in second])
    shown = {f"quality_at_{share:g}": curve.quality_at(share) for share in (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)}
    facts = {
        "signal": found.scorer.signal,
        "rows": len(second),
        "area": curve.area,
        "random": random_curves(second),
        **shown,
    }
    return curve, facts


# ---------------------------------------------------------------- the command


def run(asked: argparse.Namespace, rows: list[dict[str, Any]], adapter: Path) -> dict[str, Any]:
    started = time.perf_counter()
    outcomes = measured(asked, rows, adapter)
    curve, facts = curve_on_unseen(outcomes, asked.takeover, asked.share)
    draw_curves(RESULTS / f"cascade-{asked.name}.png", {facts["signal"]: curve})
    results = {}
    for name, promise in promises(outcomes).items():
        entries = resampled(outcomes, promise, asked.takeover, asked.share)
        results[name] = {"summary": summary(promise, entries), "resamplings": entries}
        print(name, json.dumps(results[name]["summary"]), flush=True)
    given = [entry for result in results.values() for entry in result["resamplings"] if "refused" not in entry]
    return {
        "name": asked.name, "rows": len(rows), "takeover": asked.takeover, "quality": asked.quality,
        "calibrated_on": int(asked.share * len(rows)), "confidence": CONFIDENCE, "curve": facts,
        "curves_above_random": f"{sum(e['area'] > e['random_area'] for e in given)} of {len(given)}",
        "promises": results, "seconds": round(time.perf_counter() - started, 1), "machine": machine(),
    }  # fmt: skip


def machine() -> dict[str, str]:
    packages = {name: version(name) for name in ("shadow-peft", "torch", "transformers", "scikit-learn")}
    return {"platform": platform.platform(), "python": platform.python_version(), **packages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", action="store_true", help="robot commands, on the embedded base")
    parser.add_argument("--name", default="demo")
    parser.add_argument("--adapter", type=Path, help="folder of an adapter with its tokenizer")
    parser.add_argument("--data", type=Path, nargs="+", help="rows with prompt and completion that the adapter has not seen")
    parser.add_argument("--work", type=Path, default=Path("cascade-work"), help="folder for what takes long")
    parser.add_argument("--rows", type=int, default=DEMO_ROWS, help="commands of the demo")
    parser.add_argument("--share", type=float, default=0.5, help="of the rows, to calibrate on")
    parser.add_argument("--takeover", choices=("answer", "token"), default="answer")
    parser.add_argument("--quality", choices=tuple(QUALITIES), default="exact_match")
    parser.add_argument("--max_new_tokens", type=int, default=DEMO_TOKENS)
    parser.add_argument("--batch", type=int, default=100)
    asked = parser.parse_args()
    if not asked.demo and not (asked.adapter and asked.data):
        parser.error("give --demo, or --adapter and --data")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    if asked.demo:
        from shadow_peft.demo.race import RaceSettings

        settings = RaceSettings()
        adapter, rows = demo_adapter(asked.work, settings), demo_rows(asked.rows, settings.seed)
    else:
        adapter = asked.adapter
        rows = [json.loads(line) for path in asked.data for line in path.read_text(encoding="utf-8").splitlines() if line]
    result = run(asked, rows, adapter)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"cascade-{asked.name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{path}; {result['curves_above_random']} curves above random", flush=True)


if __name__ == "__main__":
    main()
