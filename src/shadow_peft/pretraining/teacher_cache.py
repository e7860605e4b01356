"""The base's most likely next tokens of every block of a corpus, computed once and kept on disk.

A folder of `teacher.json` and shards of SHARD blocks, `00000.safetensors` and so on, each with

    input_ids   [n, T]      the blocks themselves, by which a reader knows that it reads its own text
    ids         [n, T, k]   the k most likely next tokens
    log_probs   [n, T, k]   their log-probabilities, float32

Shards are written one by one, each at once: a run that is interrupted goes on behind the last one. They are memory-mapped
where they are read, and serve every run with the same base and the same stream of blocks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from shadow_peft.losses.frozen_head import TopTokens
from shadow_peft.storage.files import read_json, write_json
from shadow_peft.storage.tensors import write_tensors

SHARD = 256
"""Blocks of a shard."""

FACTS = "teacher.json"

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of a value -> integers of that size."""


@dataclass(frozen=True)
class TeacherFacts:
    """What a cache was made from.

    Attributes:
        teacher: digest of the base's weights, see `digest`.
        context: tokens of a block.
        top_k: tokens that are kept.
    """

    teacher: str
    context: int
    top_k: int


def digest(model: nn.Module) -> str:
    """A digest of names, shapes and bits of a model's weights, the same on every device and with any number of threads."""
    sums = {name: (tuple(p.shape), _sum_of_bits(p.detach())) for name, p in model.named_parameters()}
    return sha256(repr(sums).encode()).hexdigest()[:16]


def _sum_of_bits(tensor: Tensor) -> int:
    """The sum of a tensor's values read as integers of their size, which no order of adding changes."""
    return int(tensor.view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64))


class TeacherCache:
    """Reads a cache.

    Args:
        folder: where it is.
        facts: what it must have been made from.

    Raises:
        ValueError: there is none, or it was made from something else.
    """

    def __init__(self, folder: Path, facts: TeacherFacts) -> None:
        self.folder = folder
        _require_same(folder, facts)
        self._open: dict[int, Any] = {}

    def read(self, index: Tensor, input_ids: Tensor) -> TopTokens:
        """The most likely next tokens of the flattened batch.

        Args:
            index: numbers of the blocks `[B]`.
            input_ids: the blocks `[B, T]`.

        Raises:
            ValueError: a shard is missing or damaged, or it holds other text.
        """
        rows = [self._row(int(i), ids) for i, ids in zip(index, input_ids.cpu(), strict=True)]
        ids, log_probs = (torch.cat(parts).to(input_ids.device) for parts in zip(*rows, strict=True))
        return TopTokens(ids, log_probs)

    def _row(self, index: int, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        shard, place = divmod(index, SHARD)
        path = _shard(self.folder, shard)
        try:
            if shard not in self._open:
                self._open[shard] = safe_open(path, "pt").__enter__()
            known, ids, log_probs = (
                self._open[shard].get_slice(name)[place : place + 1][0] for name in ("input_ids", "ids", "log_probs")
            )
        except (SafetensorError, OSError, IndexError) as error:
            raise ValueError(f"{path} lacks block {index} or is damaged: {error}") from error
        if not torch.equal(known.long(), input_ids):
            raise ValueError(
                f"{path} holds other text in the place of block {index}: the corpus, its order or tokens changed."
            )
        return ids.long(), log_probs


def fill(
    folder: Path,
    facts: TeacherFacts,
    stream: IterableDataset,
    count: int,
    teacher: Callable[[Tensor], TopTokens],
    batch: int,
    told: Callable[[int], None] = lambda _: None,
) -> int:
    """Compute what a cache lacks of the first blocks of a stream.

    Args:
        folder: created when it is missing.
        facts: what the cache is made from.
        stream: blocks `input_ids` `[T]`, not repeated.
        count: blocks that are needed; the stream may end before.
        teacher: the most likely next tokens of a flattened batch `[B, T]`.
        batch: B.
        told: is called with the number of blocks that the cache has, behind every shard.

    Returns:
        The number of blocks computed.

    Raises:
        ValueError: the folder holds a cache that was made from something else, or other files.
    """
    if folder.exists() and any(folder.iterdir()):
        _require_same(folder, facts)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_json({**asdict(facts), "blocks": 0, "complete": False}, folder / FACTS)
    stored = read_json(folder / FACTS)
    if stored["complete"] or stored["blocks"] >= count:
        return 0
    known = stored["blocks"] // SHARD * SHARD
    done = known
    for rows in stream.skip(known).take(count - known).batch(SHARD):
        blocks = torch.tensor(rows["input_ids"])
        _write(_shard(folder, done // SHARD), blocks, list(_computed(blocks, teacher, batch)))
        done += len(blocks)
        write_json({**asdict(facts), "blocks": done, "complete": False}, folder / FACTS)
        told(done)
    write_json({**asdict(facts), "blocks": done, "complete": done < count}, folder / FACTS)
    return done - known


def _computed(blocks: Tensor, teacher: Callable[[Tensor], TopTokens], batch: int) -> Iterator[TopTokens]:
    for part in blocks.split(batch):
        top = teacher(part)
        yield TopTokens(*(values.cpu().unflatten(0, part.shape) for values in top))


def _write(path: Path, blocks: Tensor, parts: Iterable[TopTokens]) -> None:
    """Write a shard under another name, then rename it: it is whole or not there."""
    ids, log_probs = (torch.cat(values) for values in zip(*parts, strict=True))
    kind = torch.uint16 if max(int(ids.max()), int(blocks.max())) < 2**16 else torch.int32
    unfinished = path.with_suffix(".partial")
    write_tensors({"input_ids": blocks.to(kind), "ids": ids.to(kind), "log_probs": log_probs.float()}, unfinished)
    os.replace(unfinished, path)


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"


def _require_same(folder: Path, facts: TeacherFacts) -> None:
    stored = read_json(folder / FACTS)
    here = asdict(facts)
    other = [f"{name} {stored.get(name)!r} (here {here[name]!r})" for name in here if stored.get(name) != here[name]]
    if other:
        raise ValueError(f"{folder} was made with another {', '.join(other)}; give another folder.")
