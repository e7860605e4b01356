"""This library beside the published packages: files both ways, and how each behaves.

    python -m tests.compat.run                    makes an environment of the peers in a temporary folder (some minutes)
    python -m tests.compat.run --peer PYTHON      uses the interpreter of an environment that is there already

1. Each side loads what the other saved (`side.py`); a table shows the largest differences of logits, shadow logits, loss.
2. All answer the same questions (`behaviour.py`), as the README shows them.
3. The tests that 0.1.0 and 0.1.1 were published with run against this library (`published_tests.py`).
4. So does the code on the package page of 0.1.1 (`page.py`).

Exits with 1 when a difference exceeds 1e-5, an answer of this library is no, a published test does not end as expected, or
the page says something that is not so. The published packages are only used, through their public names.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.compat import page, published_tests
from tests.compat.sdists import unpack_sdists

SIDE, BEHAVIOUR = (Path(__file__).with_name(name) for name in ("side.py", "behaviour.py"))
TORCH = "torch==2.13.0"
PEERS = ("shadow-peft==0.1.1", "transformers==5.23.0", "peft==0.21.2")
TOLERANCE = 1e-5

Results = dict[str, dict[str, float] | str]


def make_environment(folder: Path) -> str:
    """A fresh environment with the published packages; its interpreter. torch comes first: nobody else chooses it."""
    print(f"making an environment with {TORCH}, {', '.join(PEERS)}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    for packages in ((TORCH,), (TORCH, *PEERS)):
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages], check=True)
    return python


def side(python: str, verb: str, who: str, folder: Path) -> str:
    """Run one side; what it printed last."""
    command = [python, str(SIDE), verb, who, str(folder)]
    run = subprocess.run(command, env=environment_of(python), stdout=subprocess.PIPE, text=True, check=True)
    return run.stdout.strip().rpartition("\n")[2]


def environment_of(python: str) -> dict[str, str]:
    """The variables for an interpreter; a path to this library is not for the peers'."""
    return dict(os.environ) if python == sys.executable else page.without_our_path(dict(os.environ))


def exchange(peer: str, root: Path) -> dict[str, Results]:
    """Direction -> results."""
    pythons = {"ours": sys.executable, "peer": peer}
    results = {}
    for saver, loader in (("ours", "peer"), ("peer", "ours")):
        folder = root / f"saved-by-{saver}"
        side(pythons[saver], "save", saver, folder)
        results[f"{saver} -> {loader}"] = json.loads(side(pythons[loader], "load", loader, folder))
    return results


def behaviours(peer: str) -> dict[str, dict[str, bool | str]]:
    """Implementation -> question -> answer."""
    answers = {}
    for name, python, library in (
        ("here", sys.executable, "shadow_peft"),
        ("shadow-peft 0.1.1", peer, "shadow_peft"),
        ("peft 0.21.2", peer, "peft"),
    ):
        command = [python, str(BEHAVIOUR), library]
        run = subprocess.run(command, env=environment_of(python), capture_output=True, text=True, check=True)
        answers[name] = json.loads(run.stdout.strip().rpartition("\n")[2])
    return answers


def behaviour_table(answers: dict[str, dict[str, bool | str]]) -> str:
    """The answers as a table in Markdown, errors below it."""
    lines = ["| | " + " | ".join(answers) + " |", "|---|" + "---|" * len(answers)]
    for question in answers["here"]:
        marks = [{True: "yes", False: "no"}.get(given[question], "error") for given in answers.values()]
        lines.append(f"| {question} | {' | '.join(marks)} |")
    errors = [f"{name}: {q}: {a}" for name, given in answers.items() for q, a in given.items() if isinstance(a, str)]
    return "\n".join([*lines, "", *errors])


def is_same(differences: dict[str, float] | str) -> bool:
    """Whether a case loaded and every output agrees."""
    return not isinstance(differences, str) and all(value <= TOLERANCE for value in differences.values())


def row(case: str, differences: Any) -> str:
    """One line of the table."""
    if isinstance(differences, str):
        return f"{case:<30} {differences}"
    shown = "   ".join(f"{name} {value:.0e}" for name, value in differences.items())
    return f"{case:<30} {shown}   {'same' if is_same(differences) else 'DIFFERENT'}"


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="interpreter of an environment with the published packages")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        peer = options.peer or make_environment(Path(folder, "venv"))
        agree = show_exchange(exchange(peer, Path(folder)))
        answers = behaviours(peer)
        print(f"\n{behaviour_table(answers)}\n", flush=True)
        well_behaved = all(answer is True for answer in answers["here"].values())
        sdists = unpack_sdists(Path(folder))
        tests_pass = all([published_tests.check_version(version, sdist) for version, sdist in sdists.items()])
        print(flush=True)
        page_works = page.run_all(sdists[page.VERSION] / "README.md", peer)
    return 0 if agree and well_behaved and tests_pass and page_works else 1


def show_exchange(results: dict[str, Results]) -> bool:
    """Print the table; whether all is the same."""
    for direction, cases in results.items():
        print(f"\n{direction}")
        for case, differences in cases.items():
            print("  " + row(case, differences))
    outcomes = [is_same(d) for cases in results.values() for d in cases.values()]
    print(f"\n{sum(outcomes)} of {len(outcomes)} exchanges are the same to {TOLERANCE:.0e}", flush=True)
    return all(outcomes)


if __name__ == "__main__":
    sys.exit(main())
