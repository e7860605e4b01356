"""Every command of the README, the documentation, the helps and the recipes runs, as it is written, on tiny stand-ins.

A document is a session: its commands run in their order in one folder, where folders stand for the models and datasets of
the hub under the same names. What is added to a command makes it small: few steps, few tokens, few examples.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from shadow_peft.cli.dispatch import VERBS
from shadow_peft.cli.parsing import parse
from shadow_peft.cli.playground import make_playground_parser
from shadow_peft.demo.robot_commands import commands
from tests.cli.conftest import TEMPLATE, tiny_tokenizer, write_lines
from tests.cli.stand_ins import STAND_INS, stand_in
from tests.quantized_bases import need
from tests.runtimes.needs import cannot_use
from tests.tiny_models import llama

ROOT = Path(__file__).parents[2]
PAGES = tuple(
    str(path.relative_to(ROOT))
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "recipes" / "README.md")
    if "```bash" in path.read_text(encoding="utf-8")
)
RECIPES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "recipes").rglob("*.yaml"))
HELPS = tuple(f"{verb} --help" for verb in VERBS)

SMALL = {
    "train": ["--max_steps", "2", "--save_steps", "1", "--eval_steps", "1", "--per_device_train_batch_size", "2",
              "--gradient_accumulation_steps", "1", "--per_device_eval_batch_size", "4", "--use_cpu", "--bf16", "False",
              "--dtype", "float32"],
    "generate": ["--max_new_tokens", "2"],
    "eval": ["--limit", "1", "--device", "cpu"],
    "pretrain": ["--max_steps", "2", "--save_steps", "1", "--eval_steps", "1", "--context", "16", "--held_out", "2",
                 "--per_device_train_batch_size", "2", "--warmup_steps", "1", "--use_cpu"],
    "classify": [],
    "export": [],
    "convert": [],
    "cascade": ["--max_new_tokens", "2"],
    "serve": ["--check"],
}  # fmt: skip
MAILS = [{"text": f"mail {i}", "label": i % 2} for i in range(20)]
TALK = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello to you"}]}

#: Help -> options of the training whose output it takes for granted: a classifier, a shadow that is narrower than its base.
BEFORE = {
    "classify --help": "--task classification --model Qwen/Qwen3-0.6B --data mails.jsonl",
    "export --help": "--model Qwen/Qwen3-8B --shadow_model Qwen/Qwen3-0.6B --data commands.jsonl",
}

#: What stands beside our commands -> why it is not run here as it is written.
OTHERS = {
    "make": "its targets are looked up in the Makefile; CI runs `make test`, of which this test is a part",
    "pip": "the environment of the tests is what it makes",
    "git": "packs an archive of the clone, which a clean clone alone has",
    ".venv/bin/python": "modules of the benchmarks, which have tests of their own",
    "python": "makes the environment of another engine",
    "vllm/bin/pip": "fills it, with 3.5 GB",
    "vllm/bin/python": "runs in it; its results are committed",
    "accelerate": "what it launches runs here in one process, and once by accelerate; tests/distributed launches two",
}


# ---------------------------------------------------------------- what the documents say


def written_in(document: str) -> list[list[str]]:
    """The commands of a document, as words, in their order."""
    if document.endswith("--help"):
        module = __import__(f"shadow_peft.cli.{document.split()[0]}", fromlist=["EXAMPLES"])
        lines = [line.split("   ")[0] for line in re.sub(r"\\\n *", "", module.EXAMPLES).splitlines()[1:]]
    elif document.endswith(".yaml"):
        head = re.match(r"(?:# .*\n)*", (ROOT / document).read_text(encoding="utf-8"))
        assert head is not None
        lines = re.sub(r"\\\n *", "", re.sub(r"^# ", "", head[0], flags=re.MULTILINE)).splitlines()
        lines = [line for line in lines if line.startswith(("shadow-peft ", "accelerate "))]
    else:
        blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / document).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
        lines = "".join(blocks).replace("\\\n", "").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def ours(document: str) -> list[list[str]]:
    """Arguments of the `shadow-peft` commands of a document, launched ones included."""
    found = []
    for words in written_in(document):
        if words[0] == "shadow-peft":
            found.append(words[1:])
        elif words[0] == "accelerate":
            assert (ROOT / words[words.index("--config_file") + 1]).is_file()
            found.append(words[words.index("shadow_peft.cli") + 1 :])
    return found


def test_nothing_else_is_written_in_bash_blocks() -> None:
    programs = {words[0] for document in (*PAGES, *RECIPES, *HELPS) for words in written_in(document)}
    assert programs == {"shadow-peft", *OTHERS}
    targets = set(re.findall(r"^([a-z0-9]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    made = {
        next(word for word in words[1:] if "=" not in word)
        for document in PAGES
        for words in written_in(document)
        if words[0] == "make"
    }
    assert made <= targets
    assert {"demo", "test"} <= made


def test_modules_and_targets_named_in_sentences_are_there() -> None:
    """They measure for minutes or hours; each has tests of its own."""
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in documents)
    modules = set(re.findall(r"`python -m ([\w.]+)", text))
    assert {"benchmarks.quality.sweep", "tests.conformance.sweep"} <= modules
    assert {name for name in modules if find_spec(name) is None} == set()
    targets = re.findall(r"^([a-z0-9]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"`make (?:\S+=\S+ )?([a-z]+)`", text)) <= set(targets)


def test_every_verb_and_every_recipe_is_among_them() -> None:
    assert {arguments[0] for document in (*PAGES, *RECIPES, *HELPS) for arguments in ours(document)} == set(VERBS)
    assert all(ours(recipe) for recipe in RECIPES)


# ---------------------------------------------------------------- stand-ins


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the documents name and do not make themselves."""
    world = tmp_path_factory.mktemp("world")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 4}  # as many as the recipes prune
    for name, sizes in (
        ("Qwen/Qwen3-0.6B", {"intermediate_size": 1024}),
        ("Qwen/Qwen3-4B", heads),
        ("Qwen/Qwen3-8B", {"hidden_size": 64, "intermediate_size": 128, **heads}),
        ("base", {}),
    ):
        llama(vocab_size=300, eos_token_id=1, bos_token_id=None, **sizes).save_pretrained(world / name)
        tokenizer.save_pretrained(world / name)
    for repository in STAND_INS:
        made = stand_in(repository, world / "datasets", rows=100 if "no_robots" in repository else 12)
        (world / repository).parent.mkdir(exist_ok=True)
        (world / repository).symlink_to(made)
    rows: list[object] = [c.row() for c in commands("train", 12)]
    files = {
        "commands": rows,
        "data": rows,
        "unseen": [c.row() for c in commands("test", 100)],
        "texts": [{"text": "once upon a time"}] * 8,
    }
    files |= {
        "a": [{"text": "once upon a time " * 20}] * 8,
        "mails": MAILS,
        "unseen_mails": [{"text": f"unseen {i}", "label": i % 2} for i in range(100)],
    }
    files |= dict.fromkeys(("chat", "held-out"), [TALK] * 8) | {"my_conversations": [TALK] * 100}
    for name, lines in files.items():
        write_lines(world / f"{name}.jsonl", lines)
    (world / "recipes").symlink_to(ROOT / "recipes")
    (world / "corpus").mkdir()
    for place in ("corpus/c.txt", "b.txt"):
        (world / place).write_text("there was a robot that kept the house\n\n" * 60, encoding="utf-8")
    (world / "tasks").mkdir()
    for task in ("gsm8k", "mmlu", "squadv2"):
        (world / "tasks" / f"{task}.yaml").write_text(yaml.safe_dump(tiny_task(task, world / "commands.jsonl")))
    return world


def tiny_task(name: str, data: Path) -> dict[str, object]:
    """A task of the harness under a name that it knows."""
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": ["red", "green"],
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}],
    }


Run = Callable[[Path, list[str]], None]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs the arguments of a command in a folder, in a process of its own, and expects success."""
    command = [sys.executable, "-m", "tests.cli.forkserver"]
    server = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment())
    log = tmp_path_factory.mktemp("log") / "log.txt"

    def run(folder: Path, arguments: list[str]) -> None:
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps({"folder": str(folder), "arguments": arguments, "log": str(log)}) + "\n")
        server.stdin.flush()
        status = server.stdout.readline().strip()
        said = log.read_text(errors="replace")
        assert status == "0", f"{shlex.join(arguments)}\n{said[-3000:]}"
        assert not re.search(r"Traceback|fatal:|Failed to load", said), said

    yield run
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.close()
    server.wait(timeout=60)
    server.stdout.close()


def environment() -> dict[str, str]:
    """Of a process that finds this tree, and that asks nothing of the hub."""
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "100"}


@pytest.fixture
def session(world: Path, tmp_path: Path) -> Path:
    """A fresh folder in which all of that can be named."""
    for entry in world.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    return tmp_path


@pytest.fixture(scope="module")
def trained(world: Path, run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What documents that do not train take for granted: an adapter in `out`, exported; LoRA, and an adapter on 4 bits."""
    out = tmp_path_factory.mktemp("trained") / "out"
    train = ["train", "--model", "Qwen/Qwen3-0.6B", "--data", "commands.jsonl", *SMALL["train"]]
    run(world, [*train, "--output", str(out), "--export"])
    run(world, [*train, "--output", str(out / "gsm8k-lora"), "--use_peft"])
    if find_spec("bitsandbytes") is not None:
        four_bits = ["--model", "Qwen/Qwen3-8B", "--load_in_4bit", "--use_bnb_nested_quant"]  # as wide as a block of them
        run(world, [*train, "--output", str(out / "gsm8k-4bit"), *four_bits])
    return out


def small(arguments: list[str]) -> list[str]:
    """A command with what makes it small; placeholders are filled in."""
    verb = arguments[0]
    fill = {"--model": "Qwen/Qwen3-0.6B", "--adapter": "out"}
    arguments = [fill[before] if word == "..." else word for before, word in zip(["", *arguments], arguments, strict=False)]
    tasks = ["--include_path", "tasks"] if verb == "eval" and "--include_path" not in arguments else []
    classes = verb == "cascade" and "out/mails" in arguments  # they have no length
    return [*arguments, *tasks, *([] if classes else SMALL[verb])]


@pytest.mark.parametrize("document", [*PAGES[1:], *RECIPES, *HELPS[1:]])
def test_commands_run_as_they_are_written(document: str, session: Path, trained: Path, run: Run) -> None:
    if any(arguments[0] == "eval" for arguments in ours(document)):
        pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    if any("--load_in_4bit" in arguments for arguments in ours(document)) or "4bit" in document:
        need("bitsandbytes 4")
    if document in BEFORE:
        run(session, ["train", *shlex.split(BEFORE[document]), "--output", "out", "--export", *SMALL["train"]])
    elif not any(arguments[0] == "train" for arguments in ours(document)):
        shutil.copytree(trained, session / "out")
    unusable = set()
    for arguments in ours(document):
        is_runtime = arguments[0] == "export" and "--to" in arguments
        reason = cannot_use(arguments[arguments.index("--to") + 1]) if is_runtime else None
        if reason is not None:
            unusable.add(reason)
        elif arguments[0] not in ("demo", "playground"):
            run(session, small(arguments))
    if unusable:
        pytest.skip(f"all but exports to a runtime that cannot be used here: {'; '.join(sorted(unusable))}")


def test_demo_is_run_elsewhere() -> None:
    """By tests/demo/test_race.py, in a process of its own; the commands differ in the folder and the length alone."""
    for document in (*PAGES, *RECIPES, *HELPS):
        for arguments in ours(document):
            assert arguments[0] != "demo" or set(arguments) <= {"demo", "--smoke", "--output", "/tmp/race"}


def test_the_playground_is_driven_elsewhere() -> None:
    """By tests/playground/test_page.py, since it serves until it is interrupted; here its options are read."""
    written = [arguments for document in (*PAGES, *HELPS) for arguments in ours(document) if arguments[0] == "playground"]
    assert len(written) >= 5
    for _, *options in written:
        assert parse(make_playground_parser(), options)[0].adapter == "out"


def test_the_commands_of_the_readme_run_by_the_installed_program(session: Path) -> None:
    program = f"{sysconfig.get_path('scripts')}/shadow-peft"
    for arguments in ours("README.md"):
        command = [program, *small(arguments)]
        done = subprocess.run(command, cwd=session, env=environment(), capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), f"{shlex.join(command)}\n{done.stderr[-3000:]}"


def test_the_launched_command_runs(session: Path) -> None:
    """With one process, for which accelerate takes no FSDP on a CPU; `tests/distributed` has two and FSDP."""
    (words,) = [words for words in written_in("train --help") if words[0] == "accelerate"]
    at = words.index("-m")
    launch = [f"{sysconfig.get_path('scripts')}/accelerate", *words[1:at], "--num_processes", "1", "--cpu", *words[at:]]
    command = [*launch, *SMALL["train"]]
    done = subprocess.run(command, cwd=session, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr[-3000:]}"
    assert (session / "out" / "fsdp" / "shadow_adapter_readout.safetensors").is_file()
