"""What the page of `shadow-peft export --to html` says, offers, and asks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from shadow_peft.cascade.answers import Policy
from shadow_peft.cascade.calibration import Calibration
from shadow_peft.cascade.cascade import require_same_shadow
from shadow_peft.cascade.scorer import Scorer
from shadow_peft.cascade.storage import FILE, find_calibration
from shadow_peft.cli.errors import UserError, one_line
from shadow_peft.cli.export_options import ExportOptions
from shadow_peft.export import hf
from shadow_peft.export.runtimes import Ask, Page

EXAMPLES = 6
"""Prompts of `--check` that a page offers."""


def page_of(model: PreTrainedModel, origin: hf.Origin, options: ExportOptions) -> Page:
    """What the page says and offers.

    Raises:
        UserError: it is to ask an endpoint, and nothing says when.
    """
    base = None if origin.base is None else Path(origin.base).name
    facts = {"shadow": f"{type(model).__name__}, {model.num_parameters():,} parameters"}
    if origin.base_parameters is not None:
        share = model.num_parameters() / origin.base_parameters
        facts["its base"] = f"{base}, {origin.base_parameters:,} parameters; the shadow has {share:.0%} of them"
    if origin.variant is not None:
        facts["variant"] = origin.variant
    prompt = options.page_prompt.replace("\\n", "\n")
    ask, tokens = ask_of(model, origin.adapter, options)
    if ask is not None:
        facts["asks where it is unsure"] = f"{ask.model} at {ask.origin}, {_when(ask.threshold, tokens)}"
    return Page(
        title=options.page_title or f"Shadow of {base or Path(origin.adapter).name}",
        about=options.page_about,
        facts=facts,
        prompt=prompt,
        examples=_examples(options.check, prompt),
        max_tokens=tokens,
        ask=ask,
    )


def _examples(check: str | None, prompt: str) -> tuple[str, ...]:
    """The first prompts of a file that begin and end as the page's prompt does, without what it puts around."""
    before, _, after = prompt.partition("{}")
    found: list[str] = []
    for line in Path(check).read_text(encoding="utf-8").splitlines() if check is not None else ():
        if len(found) == EXAMPLES:
            break
        text = _text_of(line)
        if text.startswith(before) and text.endswith(after):
            found.append(text[len(before) : len(text) - len(after)])
    return tuple(found)


def _text_of(line: str) -> str:
    """The prompt of a row; nothing where it has none, which is no matter here: an example is left out."""
    try:
        row = json.loads(line)
    except ValueError:
        return ""
    text = row.get("prompt", row.get("text")) if isinstance(row, dict) else None
    return text if isinstance(text, str) else ""


def ask_of(model: PreTrainedModel, adapter: str, options: ExportOptions) -> tuple[Ask | None, int]:
    """Whom the page asks, and the most tokens of its answers.

    With a calibration, an answer is as long as it was then: its threshold belongs to such answers.

    Args:
        model: the exported shadow.
        adapter: where it comes from; a `cascade.json` there says when to ask.
        options: of the command.

    Raises:
        UserError: there is neither a calibration nor a threshold, or the calibration does not fit.
    """
    if options.remote_url is None or options.remote_model is None:
        return None, options.check_tokens
    try:
        found = find_calibration(adapter)
        policy = _policy(found, model, options.threshold)
    except ValueError as error:
        raise UserError(one_line(error)) from error
    ask = Ask(
        url=options.remote_url,
        model=options.remote_model,
        scorer=policy.scorer.to_dict(),
        threshold=policy.threshold,
        takeover=policy.takeover,
        timeout=options.timeout,
    )
    generation = _generation(found)
    return ask, int(generation.get("max_new_tokens", options.check_tokens))


def _policy(found: Calibration | None, model: PreTrainedModel, threshold: float | None) -> Policy:
    """When the page asks.

    Raises:
        ValueError: nothing says so, or the calibration is of another shadow or of sampled answers.
    """
    if found is None:
        if threshold is None:
            raise ValueError(f"the page asks below a confidence: the adapter has no {FILE}, so give --threshold")
        return Policy(Scorer(), threshold)
    require_same_shadow(found, model)
    if _generation(found).get("do_sample"):
        raise ValueError(f"{FILE} was made for sampled answers, and a page writes the likeliest tokens; calibrate again")
    return Policy(found.scorer, found.threshold if threshold is None else threshold, found.takeover)


def _generation(found: Calibration | None) -> dict[str, Any]:
    """The settings of the answers that a calibration was made for."""
    return dict((found.provenance if found else {}).get("generation") or {})


def _when(threshold: float, tokens: int) -> str:
    return f"where the confidence in an answer of up to {tokens} tokens is below {threshold:.3g}"
