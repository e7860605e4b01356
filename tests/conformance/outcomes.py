"""What becomes of a check on a type, and what it asks of the bare base first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from transformers import PreTrainedModel

from tests.conformance import base_facts as facts
from tests.conformance.base_facts import Fact
from tests.conformance.tiny import tiny_model


class NotApplicable(Exception):
    """The bare base itself does not do what is checked."""


class Refused(Exception):
    """The library says that it cannot, and why."""


@dataclass(frozen=True)
class Outcome:
    """What became of one check on one type: "pass", "n/a", "refused" or "FAIL", and why."""

    verdict: str
    detail: str = ""


def outcome(check: Callable[[str], None], model_type: str) -> Outcome:
    """Run one check on one type."""
    try:
        check(model_type)
    except NotApplicable as reason:
        return Outcome("n/a", str(reason))
    except Refused as reason:
        return Outcome("refused", str(reason))
    except Exception as error:  # whatever goes wrong is the finding
        return Outcome("FAIL", f"{type(error).__name__}: {error}")
    return Outcome("pass")


@lru_cache(maxsize=64)
def base_fact(measure: Callable[[PreTrainedModel], Fact], model_type: str) -> Fact:
    """A fact of the bare base, measured on a base of its own."""
    return facts.measured(measure, tiny_model(model_type))


def needs(measure: Callable[[PreTrainedModel], Fact], model_type: str, what: str) -> None:
    """Go on only if the bare base does it."""
    fact = base_fact(measure, model_type)
    if not fact.holds:
        raise NotApplicable(f"the base itself {what} ({fact.detail})")


def require(fact: Fact, what: str) -> None:
    """Raise when a fact does not hold."""
    if not fact.holds:
        raise AssertionError(f"{what}: {fact.detail}")
