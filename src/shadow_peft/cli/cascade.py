"""`shadow-peft cascade`: the shadow answers, and the attached or a remote model where the shadow is unsure.

Answering needs neither trainer nor scikit-learn, and beside a remote model no base.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from shadow_peft.cascade.answers import Answer, AnsweredBy
from shadow_peft.cascade.calibration import Calibration
from shadow_peft.cascade.cascade import ShadowCascade
from shadow_peft.cascade.curve import draw_curves
from shadow_peft.cascade.outcomes import QUALITIES
from shadow_peft.cascade.remote import Prompt, RemoteError, RemoteModel
from shadow_peft.cascade.storage import FILE, find_calibration
from shadow_peft.cli.cascade_data import read_classes, read_texts
from shadow_peft.cli.cascade_options import CascadeOptions
from shadow_peft.cli.classifiers import adapts_classifier, is_classifier, load_adapted_classifier, load_classifier
from shadow_peft.cli.errors import UserError, one_line
from shadow_peft.cli.generate import generation_config
from shadow_peft.cli.loading import check_quantization, load_answering, load_tokenizer, named_base
from shadow_peft.cli.options import OPTIONS, QuantizationOptions, SamplingOptions
from shadow_peft.cli.parsing import VerbParser, parse
from shadow_peft.cli.quiet import quiet_libraries
from shadow_peft.cli.remote import remote_model
from shadow_peft.cli.screen import Row, Screen

DESCRIPTION = """The shadow answers; where its confidence is below a threshold, the adapted base takes over, or a remote one.
An answer is a text, or a class where the adapter was trained with --task classification.

--calibrate finds the threshold that keeps a promise with the confidence that is asked for, on data that the adapter was not
trained on. It is kept in cascade.json and used from then on; --threshold sets another."""
EXAMPLES = """examples:
  shadow-peft cascade --adapter out --calibrate unseen.jsonl --promise regret --target 0.1
  shadow-peft cascade --adapter out "open the door"
  shadow-peft cascade --adapter out --threshold 0.8 "open the door" "close it"
  shadow-peft cascade --adapter out --data unseen.jsonl
  shadow-peft cascade --adapter out --calibrate unseen.jsonl --promise escalations --target 0.2 --takeover token
  shadow-peft cascade --adapter out --calibrate unseen.jsonl --promise regret --target 0.1 --output out/shadow
  shadow-peft cascade --model out/shadow --remote_url http://127.0.0.1:8000/v1 --remote_model big "open the door"
"""
CURVE, PICTURE = "cascade_curve.json", "cascade.png"


def run(arguments: list[str]) -> None:
    """Parse the options, load the models, then calibrate, score and answer, whatever is asked for."""
    parser = VerbParser("cascade", OPTIONS["cascade"], DESCRIPTION, EXAMPLES)
    parser.add_argument("text", nargs="*", help="Text to answer; the two characters \\n mean a line break")
    options, sampling, quantization, others = parse(parser, arguments)
    if not (others.text or options.calibrate or options.data):
        raise UserError("nothing to do: give a text to answer, --calibrate, or --data to score")
    check_quantization(quantization)
    place = _place(options)
    remote = remote_model(options.remote_url, options.remote_model, options.timeout)
    screen = Screen()
    with quiet_libraries():
        classes = is_classifier(str(options.model)) if options.adapter is None else adapts_classifier(options.adapter)
        if classes:
            check_classes(options, sampling)
            model, tokenizer = load_classes(options, quantization)
            rows = read_rows(options, partial(read_classes, names=list(model.config.id2label.values())))
        else:
            check_texts(options)
            rows = read_rows(options, read_texts)
            model, tokenizer = load_answering(options.model, options.adapter, None, quantization, dtype=options.dtype)
        config = None if classes else generation_config(model, tokenizer, sampling)
        made = make_cascade(model, tokenizer, options, config, remote)
        set_seed(options.seed)
        if options.calibrate:
            calibrate(made, rows["calibrate"], options, place, screen)
        if options.data:
            score(made, rows["data"], options, screen)
        for text in others.text:
            show(_answers(made, [_prompt(text, options.chat)])[0])


def check_texts(options: CascadeOptions) -> None:
    """Refuse options of classes.

    Raises:
        UserError: one of them is given.
    """
    if options.class_column is not None:
        raise UserError("--class_column belongs to classifiers, and this model writes texts")
    if (options.prompt is None) != (options.completion is None):
        raise UserError("--prompt and --completion are templates of one row: give both or neither")


def check_classes(options: CascadeOptions, sampling: SamplingOptions) -> None:
    """Refuse options of texts.

    Raises:
        UserError: one of them is given.
    """
    given = [name for name, value in vars(sampling).items() if value != getattr(SamplingOptions(), name)]
    given += [name for name in ("chat", "completion") if getattr(options, name)]
    if given:
        raise UserError(f"--{given[0]} belongs to models that write texts, and this one tells classes apart")
    if options.takeover == "token":
        raise UserError("--takeover token: a class is decided at once, so the other model takes over per answer")
    if options.quality != "exact_match":
        raise UserError(f"--quality {options.quality}: a class is right or wrong, which is exact_match")


def load_classes(
    options: CascadeOptions, quantization: QuantizationOptions
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A classifier with its adapter, or an exported one, and its tokenizer.

    Raises:
        UserError: it cannot be loaded.
    """
    if options.adapter is None:
        place = str(options.model)
        return load_classifier(place, quantization, dtype=options.dtype), load_tokenizer(place)
    tokenizer = load_tokenizer(options.adapter, options.model or named_base(options.adapter))
    return load_adapted_classifier(options.adapter, options.model, quantization, dtype=options.dtype), tokenizer


def make_cascade(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    options: CascadeOptions,
    config: GenerationConfig | None,
    remote: RemoteModel | None,
) -> ShadowCascade:
    """The cascade with the threshold that is given, or the calibration that is stored.

    Raises:
        UserError: there is neither, or they do not fit the models.
    """
    found: Calibration | None = None
    try:
        place = options.adapter or str(options.model)
        if not options.calibrate:
            found = find_calibration(place)
        if found is None and not options.calibrate and options.threshold is None:
            raise ValueError(f"there is no {FILE} in {place}; give --threshold, or --calibrate with data")
        return ShadowCascade(
            model,
            tokenizer,
            remote=remote,
            calibration=found,
            threshold=options.threshold,
            takeover=options.takeover,
            generation_config=config,
        )
    except ValueError as error:
        raise UserError(one_line(error)) from error


def calibrate(made: ShadowCascade, rows: list[dict[str, Any]], options: CascadeOptions, place: Path, screen: Screen) -> None:
    """Find the threshold, write `cascade.json`, the curve and its picture, and say what was found."""
    confidence = options.confidence if options.confidence > 0 else None
    with screen.working(f"answering {len(rows):,} rows with both models"):
        try:
            found = made.calibrate(
                rows,
                float(options.target or 0),
                promise=options.promise,
                confidence=confidence,
                quality=QUALITIES[options.quality],
                seed=options.seed,
                batch_size=options.batch_size,
            )
        except (ValueError, RemoteError) as error:
            raise UserError(one_line(error)) from error
    assert found.curve is not None
    path = made.save_calibration(place)
    report = found.report
    path.with_name(CURVE).write_text(json.dumps(found.curve.to_dict()) + "\n", encoding="utf-8")
    draw_curves(path.with_name(PICTURE), {found.scorer.signal: found.curve}, (report["escalated"], report["quality"]))
    screen.panel("calibrated", described(found, len(rows)))
    screen.line(f"{path}, {CURVE} and {PICTURE} are written")
    first = rows[0]["prompt"]
    if isinstance(first, str):
        shown = "".join(f"--{name} {shlex.quote(value)} " for name in ("model", "adapter", "remote_url", "remote_model")
                        if (value := getattr(options, name)))  # fmt: skip
        screen.command("try it", f"shadow-peft cascade {shown}{shlex.quote(first.replace(chr(10), chr(92) + 'n'))}")


def described(found: Calibration, rows: int) -> list[Row]:
    """What a calibration promises and what was measured, as rows of a panel."""
    promise, report = found.promise, found.report
    sign = ">=" if promise.kind == "quality" else "<="
    how = "in expectation" if promise.confidence is None else f"with confidence {promise.confidence:g}"
    areas = sorted(report["signal_areas"].items(), key=lambda item: -item[1])
    return [
        ("promise", f"{promise.kind} {sign} {promise.target:g} {how}; the data show {sign} {found.bound:.4f}"),
        ("threshold", f"{found.threshold:.4f} of {found.scorer.signal}, per {found.takeover}"),
        ("asked", f"{report['escalated']:.1%} of the answers"),
        ("quality", f"{report['quality']:.4f}; shadow alone {report['shadow_quality']:.4f}, "
                    f"attached alone {report['attached_quality']:.4f}"),
        ("area", f"{report['area']:.4f}; asking at random {report['random_area']:.4f}"),
        ("signals", ", ".join(f"{name} {area:.4f}" for name, area in areas)),
        ("calibration", f"error {report['calibration_error_before']:.3f} before, "
                        f"{report['calibration_error_after']:.3f} after"),
        ("data", f"{rows:,} rows: {report['examples']['first_part']:,} to fit, "
                 f"{report['examples']['second_part']:,} to test thresholds and for these figures"),
    ]  # fmt: skip


def score(made: ShadowCascade, rows: list[dict[str, Any]], options: CascadeOptions, screen: Screen) -> None:
    """Answer rows with references, and say how good the answers are and who gave them."""
    with screen.working(f"answering {len(rows):,} rows"):
        answers = _answers(made, [row["prompt"] for row in rows], options.batch_size)
    measure = QUALITIES[options.quality]
    quality = sum(measure(a.text, _reference(row)) for a, row in zip(answers, rows, strict=True)) / len(rows)
    counts = {who: sum(a.answered_by is who for a in answers) for who in AnsweredBy}
    asked = len(answers) - counts[AnsweredBy.SHADOW]
    panel = [("data", f"{options.data}: {len(rows):,} rows"), ("quality", f"{quality:.4f} ({options.quality})")]
    panel.append(("asked", f"{asked / len(answers):.1%} of the answers"))
    panel += [("" if i else "answered by", f"{who}: {n:,}") for i, (who, n) in enumerate(_nonzero(counts))]
    screen.panel("scored", panel)


def show(answer: Answer) -> None:
    """Print an answer, and who gave it on standard error."""
    print(answer.text, flush=True)
    reason = f": {answer.reason}" if answer.reason else ""
    print(f"answered by {answer.answered_by}, confidence {answer.confidence:.4f}{reason}", file=sys.stderr)


def _nonzero(counts: dict[AnsweredBy, int]) -> list[tuple[AnsweredBy, int]]:
    return [(who, n) for who, n in counts.items() if n]


def _answers(made: ShadowCascade, prompts: list[Prompt], batch_size: int = 1) -> list[Answer]:
    try:
        return made.answers(prompts, batch_size)
    except ValueError as error:
        raise UserError(one_line(error)) from error


def _place(options: CascadeOptions) -> Path:
    """The folder for `cascade.json`.

    Raises:
        UserError: the models are no folders here, and no other is given.
    """
    place = Path(options.output or options.adapter or str(options.model))
    if options.calibrate and not place.is_dir():
        raise UserError(f"{place} is no folder that {FILE} could be written into; give one as --output")
    return place


def read_rows(options: CascadeOptions, read: Callable[..., list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of `--calibrate` and `--data`, by the option that names them."""
    return {name: read(data, options) for name in ("calibrate", "data") if (data := getattr(options, name))}


def _reference(row: dict[str, Any]) -> str:
    completion = row["completion"]
    return str(completion if isinstance(completion, str) else completion[-1]["content"])


def _prompt(text: str, chat: bool) -> Prompt:
    text = text.replace("\\n", "\n")
    return [{"role": "user", "content": text}] if chat else text
