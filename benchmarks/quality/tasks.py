"""The tasks: prompts and completions out of Python's own standard library, and the demo's robot commands.

    signature   first line of a docstring and a function's name -> its parameters, to the colon
    summary     a function's first tokens of code -> the first line of its docstring
    module      a function's first tokens of code -> the package that it comes from, one of 16
    robot       a spoken command -> one line of JSON (`shadow_peft.demo.robot_commands`)
    forgetting  documents like the pretraining's, of another seed: text alone

The standard library's files are dealt to train, dev and test whole, and an example of dev or test whose prompt or
docstring stands in train too is dropped. Everything is decided by the seed and by the Python version that is read.

    python -m benchmarks.quality.tasks      writes data/*.json, so that environments without this library read them too
"""

from __future__ import annotations

import ast
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, TypeAlias

Example: TypeAlias = dict[str, str]
Splits: TypeAlias = dict[str, list[Example]]
Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(__file__).parent / "data"
BASE = ROOT / "src/shadow_peft/demo/base"
TASKS = ("signature", "summary", "module", "robot")
SIZES = {"train": 2000, "dev": 160, "test": 240}
CODE_TOKENS, PROMPT_TOKENS, COMPLETION_TOKENS = 72, 90, 32
PACKAGES, PER_PACKAGE = 16, 400
TRIVIAL = {"self):", "):", "cls):"}


class Shortener:
    """Cuts text at a number of the base's tokens."""

    def __init__(self) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(BASE)

    def length(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.tokenizer(text)["input_ids"])

    def head(self, text: str, tokens: int) -> str:
        """The first so many tokens of a text."""
        return str(self.tokenizer.decode(self.tokenizer(text)["input_ids"][:tokens]))

    def fits(self, example: Example) -> bool:
        """Whether an example is short enough to be cheap."""
        return self.length(example["prompt"]) <= PROMPT_TOKENS and self.length(example["completion"]) <= COMPLETION_TOKENS


def functions(source: str) -> Iterator[Function]:
    """Every function of a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def first_line(node: Function) -> str:
    """The first line of a function's docstring, or nothing."""
    return (ast.get_docstring(node) or "").partition("\n")[0].strip()


def code_of(node: Function) -> str:
    """A function without its docstring, as `ast` writes it; nothing if there is no other statement."""
    body = node.body[1:] if ast.get_docstring(node) else node.body
    bare = type(node)(**{**{name: getattr(node, name, None) for name in node._fields}, "body": body, "decorator_list": []})
    return ast.unparse(ast.fix_missing_locations(ast.copy_location(bare, node))) if body else ""


def signature(node: Function, package: str, cut: Shortener) -> Example | None:
    """Docstring and name in, parameters out."""
    line, completion = first_line(node), f"{ast.unparse(node.args)}):"
    if len(line) < 15 or completion in TRIVIAL:
        return None
    return {"prompt": f'"""{line}"""\ndef {node.name}(', "completion": completion}


def summary(node: Function, package: str, cut: Shortener) -> Example | None:
    """Code in, first line of the docstring out."""
    line, code = first_line(node), code_of(node)
    return (
        {"prompt": f"{cut.head(code, CODE_TOKENS)}\n# summary: ", "completion": line} if len(line) >= 15 and code else None
    )


def module(node: Function, package: str, cut: Shortener) -> Example | None:
    """Code in, package out."""
    code = code_of(node)
    if code.count("\n") < 2 or not package:
        return None
    return {"prompt": f"{cut.head(code, CODE_TOKENS)}\n# package: ", "completion": package}


MAKERS: dict[str, Callable[[Function, str, Shortener], Example | None]] = {
    "signature": signature,
    "summary": summary,
    "module": module,
}


def dealt(files: list[Path]) -> dict[str, list[Path]]:
    """Files of each split, whole: seven tenths, one and a half, one and a half."""
    files = sorted(files)
    Random(0).shuffle(files)
    dev, test = len(files) * 15 // 100, len(files) * 3 // 10
    return {"dev": files[:dev], "test": files[dev:test], "train": files[test:]}


def package_of(path: Path, root: Path) -> str:
    """The top-level package of a file, or nothing for a module that stands alone."""
    parts = path.relative_to(root).parts
    return parts[0] if len(parts) > 1 else ""


def library_task(name: str, cut: Shortener) -> Splits:
    """One task over the standard library."""
    from registry_text import read_source, stdlib_files

    files = stdlib_files()
    root = Path(ast.__file__).parent
    packages = largest_packages(files, root) if name == "module" else set()
    splits: Splits = {}
    for split, paths in dealt(files).items():
        found: dict[str, Example] = {}
        for path in paths:
            package = package_of(path, root)
            for node in functions(read_source(path) or "") if not packages or package in packages else ():
                example = MAKERS[name](node, package, cut)
                if example and cut.fits(example):
                    found.setdefault(example["prompt"], example)
        splits[split] = list(found.values())
    return sized(without_leaks(splits, name), balanced=name == "module")


def largest_packages(files: list[Path], root: Path) -> set[str]:
    """The packages with most files, so that every split has some of each."""
    counts = Counter(package for path in files if (package := package_of(path, root)))
    return {package for package, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:PACKAGES]}


def without_leaks(splits: Splits, name: str) -> Splits:
    """Dev and test without what train has too: prompts, and completions where those are a docstring."""
    seen = {e["prompt"] for e in splits["train"]} | {
        e["prompt"].partition("\n")[0] for e in splits["train"] if name == "signature"
    }
    if name == "summary":
        seen |= {e["completion"] for e in splits["train"]}
    keys = {"signature": lambda e: e["prompt"].partition("\n")[0], "summary": lambda e: e["completion"]}
    key = keys.get(name, lambda e: e["prompt"])
    return {
        s: [e for e in es if s == "train" or (e["prompt"] not in seen and key(e) not in seen)] for s, es in splits.items()
    }


def sized(splits: Splits, balanced: bool) -> Splits:
    """As many examples as a run takes, drawn by seed; balanced keeps no more than so many of one completion."""
    result: Splits = {}
    for split, examples in splits.items():
        Random(f"sized/{split}").shuffle(examples)
        if balanced:
            counts: dict[str, int] = defaultdict(int)
            limit = PER_PACKAGE * SIZES[split] // SIZES["train"]
            examples = [
                e
                for e in examples
                if (counts.__setitem__(e["completion"], counts[e["completion"]] + 1)) or counts[e["completion"]] <= limit
            ]
        result[split] = examples[: SIZES[split]]
    return result


def robot_task() -> Splits:
    """The demo's commands."""
    from shadow_peft.demo.robot_commands import commands

    return {split: [c.row() for c in commands(split, size)] for split, size in SIZES.items()}  # type: ignore[arg-type]


def forgetting_texts() -> list[str]:
    """Documents as the pretraining invents them, of a seed that it did not use."""
    from invented_text import common_words, invented
    from registry_text import stdlib_prose

    return invented(Random("forgetting"), common_words(stdlib_prose(), 3000), 40_000)


def write(name: str, content: Any) -> None:
    """One file of the folder `data`."""
    DATA.mkdir(exist_ok=True)
    (DATA / f"{name}.json").write_text(json.dumps(content, indent=0) + "\n", encoding="utf-8")


def read(name: str) -> Any:
    """What `write` wrote."""
    return json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))


def main() -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    cut = Shortener()
    for name in TASKS:
        splits = robot_task() if name == "robot" else library_task(name, cut)
        write(name, splits)
        print(name, {split: len(examples) for split, examples in splits.items()}, splits["train"][0])
    write("forgetting", forgetting_texts())


if __name__ == "__main__":
    main()
