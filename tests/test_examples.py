"""Every script in `examples/` runs as its first lines say, and pasted elsewhere. `hub.py` needs a hub: see `tests/hub`."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
ELSEWHERE = {"hub.py"}
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name not in ELSEWHERE)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")  # a Trainer's default, off where there is no GPU
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning")  # TRL uses the old name
@pytest.mark.parametrize("name", SCRIPTS)
def test_example_runs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pasted = tmp_path / "pasted.py"  # nothing of the folder `examples` is beside it
    pasted.write_bytes((EXAMPLES / name).read_bytes())
    runpy.run_path(str(pasted), run_name="__main__")
    assert capsys.readouterr().out, f"{name} prints what it shows"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_example_is_short_and_says_how_to_run_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert f"\npython examples/{path.name}" in text
    assert len(text.splitlines()) <= 42
