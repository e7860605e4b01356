"""Tables and picture of the comparison on the real base, from the results that are there.

    python -m benchmarks.quality.real.report            writes both into docs/
    python -m benchmarks.quality.real.report --print    only prints the tables

It can be run at any time: what is missing is a dash, and each row says how many of its runs are there.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from benchmarks.pages import put_between, report_options
from benchmarks.quality.real.bootstrap import Difference
from benchmarks.quality.real.packages import ROOT
from benchmarks.quality.real.plan import (
    CHOOSING,
    CORE,
    FROZEN_PRETRAINED,
    FURTHER,
    OTHERS,
    PARTS,
    PLANNED,
    PRETRAINED,
    RESULTS,
    SEEDS,
    ZERO,
    rates,
)
from benchmarks.quality.real.results import Result, Results
from benchmarks.quality.real.tasks import CLASSIFICATION, DRAFTED
from benchmarks.quality.table import table

PAGE, PICTURE = ROOT / "docs/quality.md", ROOT / "docs/quality-smollm2.svg"
BEGIN, END = "<!-- begin: python -m benchmarks.quality.real.report -->", "<!-- end of the report -->"
REFERENCE, UPPER_REFERENCE = "lora", "lora-upper"
OURS = ("published", "readout", "readout-upper")
METHODS = ("lora", "lora-upper", *OTHERS, "published", "readout", "readout-upper", *PRETRAINED)
DECODED = tuple(task for task in PLANNED if task in DRAFTED)


def number(value: float | None, digits: int = 3, scale: float = 1.0) -> str:
    """A number, or a dash."""
    return "-" if value is None else f"{scale * value:.{digits}f}"


def signed(difference: Difference | None, digits: int = 3, scale: float = 1.0) -> str:
    """A difference and its interval, or a dash."""
    if difference is None:
        return "-"
    shown = (f"{scale * value:+.{digits}f}" for value in (difference.estimate, *difference.interval))
    return "{} [{}, {}]".format(*shown)


def score(name: str) -> Callable[[Result], float | None]:
    """Reads a score of the test split, None of a method that does not have it."""
    return lambda result: result["test"].get(name)


def forgotten(result: Result) -> float:
    """Rise of the loss on passages of Wikipedia, in nats per token."""
    return result["forgetting"]["after"] - result["forgetting"]["before"]


def drafting(name: str) -> Callable[[Result], float | None]:
    """Reads a figure of decoding, None of a method that does not draft."""
    return lambda result: result["decoding"] and result["decoding"][name]


def runs_there(results: Results, method: str, tasks: Sequence[str]) -> str:
    """How many of a row's runs are there."""
    return f"{results.count(method, tasks)} of {len(tasks) * len(SEEDS)}"


def attached(results: Results, method: str, tasks: Sequence[str], other: str) -> list[str]:
    """Loss, its difference to another method, right answers in percent, and their difference; none to itself."""
    cells = []
    for name, digits, scale in (("loss", 3, 1.0), ("exact", 1, 100.0)):
        difference = None if method == other else results.difference(method, other, tasks, name)
        mean = results.mean_over(method, tasks, score(name))
        cells += [number(mean, digits, scale), signed(difference, digits, scale)]
    return cells


def quality_table(results: Results, tasks: Sequence[str]) -> str:
    """Means over tasks, attached and detached, with differences to LoRA."""
    lines, writing = [], [task for task in tasks if task not in CLASSIFICATION]
    for method in METHODS:
        loss, right, agreement = (results.mean_over(method, tasks, score(name)) for name in SCORES[2:])
        lines.append(
            [
                method, *attached(results, method, tasks, REFERENCE), number(loss), number(right, 1, 100),
                number(agreement), *(number(results.mean(method, task, forgotten)) for task in writing),
                runs_there(results, method, PLANNED),
            ]
        )  # fmt: skip
    heads = [
        "method", "loss", "to LoRA", "right, %", "to LoRA", "detached loss", "detached right, %", "agreement",
        *(f"forgetting, {task}" for task in writing), "runs",
    ]  # fmt: skip
    return table(heads, lines)


def versus_table(results: Results, tasks: Sequence[str]) -> str:
    """Differences of both variants, and of one on the upper half of the layers, to each method that is not ours."""
    lines = []
    for other in (REFERENCE, UPPER_REFERENCE, *OTHERS):
        pairs = [[results.difference(ours, other, tasks, name) for name in ("loss", "exact")] for ours in OURS]
        lines.append([other, *(cell for loss, exact in pairs for cell in (signed(loss), signed(exact, 1, 100)))])
    return table(["less", *(f"{ours}, {measure}" for ours in OURS for measure in ("loss", "right, %"))], lines)


SCORES = ("loss", "exact", "detached_loss", "detached_exact", "agreement")
COSTS: dict[str, Callable[[Result], float]] = {
    "training time": lambda result: result["cpu_seconds"],
    "memory of a step": lambda result: result["step_bytes"],
    "bytes saved": lambda result: result["bytes_saved"],
}


def cost_table(results: Results, tasks: Sequence[str]) -> str:
    """Ratios to LoRA on the same task, and drafted decoding."""
    lines = []
    for method in METHODS:
        trained = results.mean(method, CHOOSING[0], lambda result: result["trainable"])
        ratios = [number(results.ratio(method, REFERENCE, tasks, value), 2) for value in COSTS.values()]
        drafts = [number(results.mean_over(method, DECODED, drafting(name)), 2) for name in DRAFTING]
        lines.append([method, "-" if trained is None else f"{trained:,.0f}", *ratios, *drafts])
    return table(["method", "trained", *COSTS, *DRAFTING.values()], lines)


DRAFTING = {
    "tokens_per_pass": "tokens per base pass", "acceptance": "acceptance", "drafted_time": "drafted time",
    "undrafted_time": "undrafted time",
}  # fmt: skip


def ablation_table(results: Results) -> str:
    """What the shadow's state is worth: each part of both variants beside s = 0."""
    lines = []
    for zero in ZERO:
        variant = zero.partition("-")[0]
        parts = [one for one in (*PRETRAINED, *PARTS, *FROZEN_PRETRAINED) if one.startswith(f"{variant}-")]
        for method in (zero, variant, *parts):
            lines.append([method, *attached(results, method, CHOOSING, zero), runs_there(results, method, CHOOSING)])
    return table(["method", "loss", "to s = 0", "right, %", "to s = 0", "runs"], lines)


def task_table(results: Results, task: str) -> str:
    """One task: mean ± deviation over seeds, at the chosen rate."""
    lines = []
    for method in METHODS:
        found = list(results.of(method, task).values())
        cells = [spread([value for run in found if (value := score(name)(run)) is not None]) for name in SCORES]
        rate = rates(method, results.folder)[1]
        lines.append([method, *cells, "-" if rate is None else f"{rate:g}", f"{len(found)} of {len(SEEDS)}"])
    return table(["method", *(name.replace("_", " ").replace("exact", "right") for name in SCORES), "rate", "seeds"], lines)


def further_table(results: Results) -> str:
    """The tasks for which no rate was chosen and which the main methods alone have, each by itself."""
    lines = []
    for task in FURTHER:
        for method in [one for one in METHODS if one in CORE]:
            loss, right = (results.mean(method, task, score(name)) for name in ("detached_loss", "detached_exact"))
            times = (number(results.mean(method, task, drafting(name)), 2) for name in ("drafted_time", "undrafted_time"))
            lines.append(
                [
                    task, method, *attached(results, method, [task], REFERENCE), number(loss), number(right, 1, 100),
                    *times, runs_there(results, method, [task]),
                ]
            )  # fmt: skip
    heads = [
        "task", "method", "loss", "to LoRA", "right, %", "to LoRA", "detached loss", "detached right, %",
        "drafted time", "undrafted time", "runs",
    ]  # fmt: skip
    return table(heads, lines)


def spread(values: list[float]) -> str:
    """Mean ± deviation, the mean alone of one value, a dash of none."""
    if len(values) < 2:
        return number(values[0] if values else None)
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def markdown(results: Results) -> str:
    """All tables under their headings."""
    tasks = results.common_tasks(METHODS, PLANNED)
    over, drafted = ", ".join(tasks), " and ".join(DECODED)
    parts = [
        f"### All methods, means over {over}\n\n{quality_table(results, tasks)}",
        f"### Ours less the others, means over {over}\n\n{versus_table(results, tasks)}",
        f"### Cost as a ratio to LoRA, means over {over}, and drafting on {drafted}\n\n{cost_table(results, tasks)}",
        f"### The shadow's part, mean over {' and '.join(CHOOSING)}\n\n{ablation_table(results)}",
        f"### Further tasks, at the rates chosen on {' and '.join(CHOOSING)}\n\n{further_table(results)}",
        *(f"### {task}\n\n{task_table(results, task)}" for task in PLANNED),
    ]
    return "\n\n".join(parts)


def main() -> None:
    asked = report_options(__doc__, RESULTS, PAGE, PICTURE)
    results = Results(asked.results)
    if asked.print:
        print(markdown(results))
        return
    from benchmarks.quality.real.picture import draw

    put_between(asked.page, markdown(results), BEGIN, END)
    draw(results, METHODS, results.common_tasks(METHODS, PLANNED), REFERENCE, asked.picture)


if __name__ == "__main__":
    main()
