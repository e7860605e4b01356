"""The models, servers and clients of `benchmarks.serving`."""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from shadow_peft import ShadowConfig, ShadowForCausalLM, get_shadow_model

SIZES = {
    "tiny": {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64},
    "small": {"num_hidden_layers": 8, "hidden_size": 256, "intermediate_size": 768},
}
ADAPTERS, NEW_TOKENS = ("a", "b", "c", "d"), 16
PROMPTS = ["go", "put the red box on the table", "open the door", "what is this?", "stop now", "to the left and then right",
           "again", "x = 1", "the robot kept the house", "once upon a time", "no", "yes, please", "turn it off",
           "a longer prompt with more of the words", "12345", "end"]  # fmt: skip


@dataclass(frozen=True)
class World:
    """Folders, and what each model answers each prompt by itself."""

    base: Path
    adapters: dict[str, Path]
    expected: dict[tuple[str, str], str]

    @property
    def models(self) -> list[str]:
        return ["base", *ADAPTERS, *(f"{name}:shadow" for name in ADAPTERS)]

    def requests(self, count: int, names: Sequence[str] | None = None, seed: int = 0) -> list[tuple[str, str]]:
        """Models and prompts, in a random order in which all come equally often."""
        pairs = [(name, prompt) for name in names or self.models for prompt in PROMPTS]
        order = random.Random(seed)
        found: list[tuple[str, str]] = []
        while len(found) < count:
            found += order.sample(pairs, len(pairs))
        return found[:count]


# ---------------------------------------------------------------- models


def tokenizer() -> PreTrainedTokenizerFast:
    names = ["<pad>", "<bos>", "<eos>", *map(chr, range(32, 125))]
    characters = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=" "))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def make_world(size: str, folder: Path) -> World:
    """Write base and adapters, and answer each prompt with each model."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES[size], num_attention_heads=4, num_key_value_heads=4, vocab_size=96, pad_token_id=0,
                         bos_token_id=None, eos_token_id=2, max_position_embeddings=256)  # fmt: skip
    base = LlamaForCausalLM(config).eval()
    base.save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    expected = answers("base", base)
    for name in ADAPTERS:
        model = ShadowForCausalLM(get_shadow_model(base, ShadowConfig(variant="readout", shadow_init="random"))).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:  # the adapter's own
                    parameter.add_(torch.randn(parameter.shape) * 0.05)
        model.save_pretrained(folder / name)
        expected |= answers(name, model)
        model.set_inference_mode("shadow_only")
        expected |= answers(f"{name}:shadow", model)
        model.unload()
    for prompt in PROMPTS:
        told = Counter(text for (_, asked), text in expected.items() if asked == prompt)
        assert max(told.values()) == 1, f"two models answer {prompt!r} alike"
    return World(folder / "base", {name: folder / name for name in ADAPTERS}, expected)


@torch.no_grad()
def answers(name: str, model: Any) -> dict[tuple[str, str], str]:
    return {(name, prompt): answer_alone(model, prompt) for prompt in PROMPTS}


def answer_alone(model: Any, prompt: str, known: PreTrainedTokenizerFast | None = None) -> str:
    known = known or tokenizer()
    ids = known(prompt, return_tensors="pt")["input_ids"]
    written = model.generate(ids, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0)
    return str(known.decode(written[0, ids.shape[1] :], skip_special_tokens=True))


class OneAtATime:
    """The same requests through `generate`, one after the other, in this process."""

    def __init__(self, world: World) -> None:
        def base() -> LlamaForCausalLM:  # each adapter has one of its own, so that no hook of another slows it down
            return LlamaForCausalLM.from_pretrained(world.base).eval()

        self._models: dict[str, Any] = {"base": base()}
        for name, path in world.adapters.items():
            self._models[name] = ShadowForCausalLM.from_pretrained(base(), path).eval()
        self._tokenizer = tokenizer()

    @torch.no_grad()
    def rate(self, requests: Sequence[tuple[str, str]]) -> float:
        started = time.perf_counter()
        for name, prompt in requests:
            adapter, _, shadow = name.partition(":")
            model = self._models[adapter]
            if adapter != "base":
                model.set_inference_mode("shadow_only" if shadow else "base_shadow")
            answer_alone(model, prompt, self._tokenizer)
        return len(requests) / (time.perf_counter() - started)


# ---------------------------------------------------------------- servers


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def server(command: Sequence[str], port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process that serves on a port, once it answers."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([*command, "--port", str(port)], env=environment, stdout=log, stderr=log)
        try:
            for _ in range(1200):
                if process.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(log.read().decode()[-3000:])
                with suppress(httpx2.HTTPError):
                    if httpx2.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                        break
                time.sleep(0.1)
            yield process
        finally:
            process.kill()
            process.wait()


def ours(world: World, *more: str) -> list[str]:
    adapters = [f"{name}={path}" for name, path in world.adapters.items()]
    return [sys.executable, "-m", "shadow_peft.cli", "serve", "--model", str(world.base), "--adapter", *adapters, *more]


def theirs(world: World, *more: str) -> list[str]:
    code = "from transformers.cli.transformers import main; main()"
    return [sys.executable, "-c", code, "serve", str(world.base), "--device", "cpu", "--host", "127.0.0.1", *more]


# ---------------------------------------------------------------- clients


def body(name: str, prompt: str, **more: Any) -> dict[str, Any]:
    return {"model": name, "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, **more}


async def load(port: int, world: World, requests: Sequence[tuple[str, str]], clients: int, served_as: str = "") -> Any:
    """Send requests from so many clients; requests a second, and how each ended."""
    ends: Counter[str] = Counter()
    waiting = list(reversed(requests))

    async def one(http: httpx2.AsyncClient) -> None:
        while waiting:
            name, prompt = waiting.pop()
            response = await http.post("/v1/completions", json=body(served_as or name, prompt))
            ends[ending(response, world.expected[name, prompt])] += 1

    limits = httpx2.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=120, limits=limits) as http:
        started = time.perf_counter()
        await asyncio.gather(*(one(http) for _ in range(clients)))
        return len(requests) / (time.perf_counter() - started), dict(ends)


def ending(response: httpx2.Response, expected: str) -> str:
    if response.status_code != 200:
        return str(response.status_code)
    return "right" if response.json()["choices"][0]["text"] == expected else "WRONG"


async def raw(port: int, data: bytes, read: int | None, pause: float) -> bytes:
    """Send bytes, read up to so many with pauses (None: to the end), hang up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    got = b""
    with suppress(ConnectionError):
        writer.write(data)
        await writer.drain()
        while read is None or len(got) < read:
            await asyncio.sleep(pause)
            piece = await reader.read(64)
            if not piece:
                break
            got += piece
    writer.close()
    return got


def post(payload: bytes, **headers: str) -> bytes:
    lines = ["POST /v1/completions HTTP/1.1", "Host: x", "Connection: close", "Content-Type: application/json"]
    lines += [f"{name}: {value}" for name, value in {"Content-Length": str(len(payload)), **headers}.items()]
    return "\r\n".join([*lines, "", ""]).encode() + payload


def stream_text(got: bytes) -> tuple[str, bool]:
    """The text of a streamed answer, and whether it says that it is complete."""
    lines = [line.strip() for line in got.decode(errors="replace").splitlines()]
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {") and line.endswith("}")]
    choices = [chunk["choices"][0] for chunk in chunks if "choices" in chunk]
    return "".join(c["text"] for c in choices), any(c.get("finish_reason") for c in choices)
