"""`cascade.json`: a calibration beside the shadow that it belongs to."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from shadow_peft.cascade.calibration import Calibration, Promise
from shadow_peft.cascade.scorer import Scorer
from shadow_peft.cascade.signals import signals_for
from shadow_peft.storage.atomic import all_or_none, visible_files
from shadow_peft.storage.files import read_json, write_json
from shadow_peft.storage.hub import local_directory

FILE = "cascade.json"
FORMAT = 1


def save_calibration(calibration: Calibration, directory: str | Path) -> Path:
    """Write `cascade.json` into a folder; an earlier one is replaced at once.

    Returns:
        The path of the file.
    """
    stored = {
        "format": FORMAT,
        "scorer": calibration.scorer.to_dict(),
        "threshold": repr(float(calibration.threshold)),
        "takeover": calibration.takeover,
        "promise": asdict(calibration.promise),
        "bound": calibration.bound,
        "report": calibration.report,
        "provenance": calibration.provenance,
    }
    with all_or_none(directory) as staging:
        write_json(stored, staging / FILE)
    return Path(directory, FILE)


def find_calibration(place: str | Path) -> Calibration | None:
    """The calibration in a folder, a hub repository or a folder of one; None where there is none.

    Raises:
        ValueError: there is no such place, or the calibration is malformed.
    """
    directory = local_directory(place)
    return load_calibration(directory) if FILE in visible_files(directory) else None


def load_calibration(directory: str | Path) -> Calibration:
    """Read the `cascade.json` of a folder.

    Raises:
        ValueError: there is none, or it is malformed.
    """
    path = visible_files(Path(directory)).get(FILE, Path(directory, FILE))
    data = read_json(path)
    try:
        return _parsed(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is no calibration of a cascade: {reason}") from error


def _parsed(data: dict[str, Any]) -> Calibration:
    if data["format"] != FORMAT:
        raise ValueError(f"its format is {data['format']!r}, this version reads {FORMAT}")
    scorer, takeover, promise = Scorer.from_dict(data["scorer"]), data["takeover"], Promise(**data["promise"])
    if scorer.signal not in signals_for(takeover):
        raise ValueError(f"the signal {scorer.signal!r} cannot decide a takeover per {takeover}")
    threshold, bound = float(data["threshold"]), float(data["bound"])
    if threshold != threshold:
        raise ValueError("its threshold is not a number")
    return Calibration(scorer, threshold, takeover, promise, bound, dict(data["report"]), None, dict(data["provenance"]))
