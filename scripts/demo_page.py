"""The page of the demo: the shadow that `shadow-peft demo` trained, detached, in one file for a browser.

    python scripts/demo_page.py [shadow-demo]      or: make page

It fails where the page in Chromium answers any of 20 test commands otherwise than transformers does.
"""

import json
import sys
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from shadow_peft.cli import main
from shadow_peft.demo.embedded import BASE_PATH
from shadow_peft.demo.race import RaceSettings
from shadow_peft.demo.robot_commands import KEYS, commands

COMMANDS = 20


def build(run: Path) -> int:
    adapter, settings = run / "adapter", RaceSettings()
    if not adapter.is_dir():
        print(f"there is no {adapter}; `make demo` makes it", file=sys.stderr)
        return 1
    trained = settings.steps * settings.batch
    about = f"It was trained beside a frozen Llama on {trained:,} robot commands, and detached. It writes a command as JSON."
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()) as said:
        data = Path(folder, "commands.jsonl")
        data.write_text(
            "".join(json.dumps(command.row()) + "\n" for command in commands("test", COMMANDS)), encoding="utf-8"
        )
        options = {
            "to": "html",
            "model": str(BASE_PATH),
            "output": str(run / "page"),
            "check": str(data),
            "check_prompts": str(COMMANDS),
            "check_tokens": "64",
            "page_title": "A shadow that understands robot commands",
            "page_about": about,
            "page_prompt": f"text: {{}} keys: {', '.join(KEYS)}\\n",
        }
        pairs = [word for name, value in options.items() for word in (f"--{name}", value)]
        status = main(["export", str(adapter), *pairs, "--overwrite"])
    print(said.getvalue(), end="")
    return status or int(f"{COMMANDS} of {COMMANDS} answers are those of transformers" not in said.getvalue())


if __name__ == "__main__":
    sys.exit(build(Path((sys.argv[1:] or ["shadow-demo"])[0])))
