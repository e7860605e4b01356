"""The tests that `shadow-peft` 0.1.x was published with, run against this library.

    python -m tests.compat.published_tests

A test that fails without being in `EXPECTED_FAILURES`, one that is there and passes, and one that is there and does not
exist are errors.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from tests.compat.sdists import unpack_sdists

SOURCE = Path(__file__).parents[2] / "src"

EXPECTED_FAILURES: dict[str, dict[str, tuple[str, str]]] = {
    "0.1.0": {},
    "0.1.1": {
        "test_cached_decode.test_backward_compat_nocache_default": (
            "should not return a cache",
            "decided otherwise: a call without use_cache follows the base's config, as every transformers model does",
        ),
    },
}
"""Version -> test -> the error it fails with, and why it is not to pass."""


def run_tests(tests: Path, folder: Path) -> dict[str, str]:
    """Run a folder of foreign tests in a process of its own, without this project's options; test -> "" or the error."""
    shutil.copytree(tests, folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))  # without the sdist's sources
    report = folder / "report.xml"
    options = ["-W", "default", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    command = [sys.executable, "-m", "pytest", "--quiet", *options, "--junitxml", str(report), "tests"]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if run.returncode not in (0, 1):  # 1: tests failed; anything else: pytest itself did
        raise RuntimeError(f"pytest ended with {run.returncode}:\n{run.stdout}{run.stderr}")
    return dict(outcome(case) for case in ElementTree.parse(report).iter("testcase"))


def outcome(case: ElementTree.Element) -> tuple[str, str]:
    """A test's name, and "" if it passed or else what was wrong; a skipped test has not passed."""
    name = f"{case.attrib['classname'].rpartition('.')[2]}.{case.attrib['name']}"
    for problem in ("failure", "error", "skipped"):
        found = case.find(problem)
        if found is not None:
            return name, found.attrib.get("message", problem).splitlines()[0]
    return name, ""


def compare(outcomes: dict[str, str], expected: dict[str, tuple[str, str]]) -> list[str]:
    """What is not as expected, a line each."""
    errors = [f"{test} fails: {error}" for test, error in outcomes.items() if error and test not in expected]
    for test, (error, _) in expected.items():
        if test not in outcomes:
            errors.append(f"{test} is expected to fail, but does not exist")
        elif not outcomes[test]:
            errors.append(f"{test} passes, but is expected to fail")
        elif error not in outcomes[test]:
            errors.append(f"{test} fails with another error than {error!r}: {outcomes[test]}")
    return errors


def check_version(version: str, sdist: Path) -> bool:
    """Run the tests of one unpacked version and print a summary; whether all is as expected."""
    with tempfile.TemporaryDirectory() as folder:
        outcomes = run_tests(sdist / "tests", Path(folder))
    expected = EXPECTED_FAILURES[version]
    errors = compare(outcomes, expected)
    passed = sum(not error for error in outcomes.values())
    failed = f", {len(expected)} expected to fail" if expected else ""
    print(f"tests of {version}: {passed} of {len(outcomes)} pass{failed}: {'NOT as expected' if errors else 'as expected'}")
    for test, (_, reason) in expected.items():
        print(f"  expected: {test}: {reason}")
    for error in errors:
        print(f"  {error}")
    return not errors


def main() -> int:
    """The command line."""
    with tempfile.TemporaryDirectory() as folder:
        sdists = unpack_sdists(Path(folder))
        return 0 if all([check_version(version, sdist) for version, sdist in sdists.items()]) else 1


if __name__ == "__main__":
    sys.exit(main())
