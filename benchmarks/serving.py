"""`shadow-peft serve` under load on loopback: requests a second, faults, and whether every answer is the right one.

    OMP_NUM_THREADS=1 python benchmarks/serving.py [--output benchmarks/results/serving.json]

A random base with a token for each character, in float32 (`SIZES`: "tiny" for the faults, "small" for the speed); four
adapters whose shadows are unlike each other, so that base, adapters and shadows all answer each prompt differently. Every
answer is compared with that of one `generate` for this request alone. Server and client are processes of one machine, on
one thread of torch.

    speed     requests with 16 prompts and 16 new tokens, from 1, 8 and 32 clients at once, against one-at-a-time
              `generate` in one process; ways take turns, medians. "mixed" asks all models, "base" the bare base alone.
              The same requests to `transformers serve` with the bare base, with and without its continuous batching
    windows   requests a second of mixed requests where they wait 0, 5, 20 or 50 ms for each other
    faults    good requests beside clients that hang up, read slowly, send bodies that are none, or half a request
    overload  more requests at once than the queue holds: 429 or the right answer
    SIGTERM   while requests run and wait: all that were taken are answered, later ones find nobody
    SIGKILL   no answer that was cut off looks complete; a new server on the same port answers
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx2
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, logging

from shadow_peft import ShadowConfig, ShadowForCausalLM, get_shadow_model

SIZES = {
    "tiny": {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64},
    "small": {"num_hidden_layers": 8, "hidden_size": 256, "intermediate_size": 768},
}
ADAPTERS, NEW_TOKENS, CLIENTS = ("a", "b", "c", "d"), 16, (1, 8, 32)
QUEUE, WINDOWS = 200, (0, 5, 20, 50)
COUNTED = tuple(
    f"shadow_peft_{name}"
    for name in ("hang_ups_total", "overloads_total", "waiting", "running", "batch_rows_sum", "batch_rows_count")
)
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


# ---------------------------------------------------------------- speed


def measure_speed(world: World, count: int, repeats: int) -> dict[str, Any]:
    """Requests a second of every way, medians of rounds in which the ways take turns."""
    alone = OneAtATime(world)
    kinds = {"mixed": world.requests(count), "base": world.requests(count, ["base"])}
    rates: dict[str, list[float]] = {}
    wrong: Counter[str] = Counter()
    port, theirs_port, paged_port = free_port(), free_port(), free_port()
    paged = ("--continuous-batching", "--cb-num-blocks", "256", "--cb-block-size", "32")
    with (
        server(ours(world), port),
        server(theirs(world), theirs_port),
        server(theirs(world, *paged), paged_port),
    ):
        for round_ in range(repeats + 1):
            found: dict[str, float] = {}
            for kind, requests in kinds.items():
                found[f"one at a time, {kind}"] = alone.rate(requests[: max(8, count // 8)])
                for clients in CLIENTS:
                    some = requests[: count if clients > 1 else max(8, count // 8)]
                    rate, ends = asyncio.run(load(port, world, some, clients))
                    found[f"shadow-peft serve, {kind}, {clients} clients"] = rate
                    wrong.update({end: n for end, n in ends.items() if end != "right"})
            for label, other in (("transformers serve", theirs_port), ("transformers serve, paged", paged_port)):
                few = kinds["base"][: count if "paged" in label else max(8, count // 4)]
                rate, ends = asyncio.run(load(other, world, few, CLIENTS[-1], str(world.base)))
                found[f"{label}, base, {CLIENTS[-1]} clients"] = rate
                wrong.update({f"{label}: {end}": n for end, n in ends.items() if end != "right"})
            for way, rate in found.items():
                if round_:  # the first one warms up
                    rates.setdefault(way, []).append(rate)
    medians = {way: round(statistics.median(values), 2) for way, values in rates.items()}
    ratios = {}
    for way, values in rates.items():
        same_work = rates[f"one at a time, {'mixed' if 'mixed' in way else 'base'}"]
        ratios[way] = round(statistics.median(a / b for a, b in zip(values, same_work, strict=True)), 2)
    return {"requests a second": medians, "to one at a time": ratios, "not right": dict(wrong), "requests": count}


def measure_windows(world: World, count: int, repeats: int) -> dict[str, Any]:
    """Requests a second of mixed requests with other windows, medians of rounds in which the windows take turns."""
    requests, found = world.requests(count), {}
    with ExitStack() as stack:
        ports = {window: free_port() for window in WINDOWS}
        for window, port in ports.items():
            stack.enter_context(server(ours(world, "--window", str(window)), port))
        for clients in (1, CLIENTS[-1]):
            rates: dict[int, list[float]] = {window: [] for window in WINDOWS}
            for round_ in range(repeats + 1):
                for window, port in ports.items():
                    some = requests[: count if clients > 1 else max(8, count // 8)]
                    rate = asyncio.run(load(port, world, some, clients))[0]
                    if round_:
                        rates[window].append(rate)
            for window, values in rates.items():
                found[f"{window} ms, {clients} clients"] = round(statistics.median(values), 1)
    return found


# ---------------------------------------------------------------- faults


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


async def faults(port: int, world: World, count: int) -> dict[str, Any]:
    """Good requests beside five kinds of bad clients."""
    ends: Counter[str] = Counter()
    order = random.Random(1)
    slots = asyncio.Semaphore(48)

    async def bad(kind: str, name: str, prompt: str) -> None:
        whole = json.dumps(body(name, prompt, stream=kind in ("hangs up in a stream", "reads slowly"))).encode()
        async with slots:
            if kind == "hangs up":
                await raw(port, post(whole), 0, 0)
            elif kind == "hangs up in a stream":
                await raw(port, post(whole), 200, 0)
            elif kind == "half a request":
                await raw(port, post(whole)[: order.randrange(1, len(post(whole)))], 0, 0)
            elif kind == "no JSON":
                got = await raw(port, post(whole[: len(whole) // 2]), None, 0)
                ends[f"{kind}: {got[9:12].decode()}"] += 1
                return
            else:
                text, complete = stream_text(await raw(port, post(whole), None, 0.002))
                right = complete and text == world.expected[name, prompt]
                ends[f"{kind}: {'right' if right else 'WRONG'}"] += 1
                return
            ends[kind] += 1

    kinds = ["hangs up", "hangs up in a stream", "half a request", "no JSON", "reads slowly"]
    each = count // 20
    bads = [bad(kind, *pair) for kind in kinds for pair in world.requests(each, seed=kinds.index(kind) + 2)]
    order.shuffle(bads)
    (rate, good), *_ = await asyncio.gather(load(port, world, world.requests(count, seed=1), 32), *bads)
    ends.update({f"good: {end}": n for end, n in good.items()})
    return {"ends": dict(sorted(ends.items())), "good requests a second": round(rate, 1)}


async def overload(port: int, world: World, count: int) -> dict[str, Any]:
    """All requests at once, from a client each."""
    _, ends = await load(port, world, world.requests(count), count)
    return {"requests at once": count, "ends": ends}


async def end_by(process: subprocess.Popen[bytes], sign: int, port: int, world: World, count: int) -> dict[str, Any]:
    """Send a signal while requests run and wait; streams, so that it shows how far each answer came."""
    ends: Counter[str] = Counter()
    taken = count

    async def one(name: str, prompt: str, late: bool) -> None:
        data = post(json.dumps(body(name, prompt, stream=True)).encode())
        try:
            got = await raw(port, data, None, 0)
        except OSError:
            ends["late: refused" if late else "LOST: refused"] += 1
            return
        text, complete = stream_text(got)
        told = "right" if complete and text == world.expected[name, prompt] else "COMPLETE AND WRONG"
        ends[("late: " if late else "") + (told if complete else "cut off, and looks so")] += 1

    tasks = [asyncio.ensure_future(one(*pair, late=False)) for pair in world.requests(taken)]
    await asyncio.sleep(0.5)  # all of them are taken
    done_before = sum(task.done() for task in tasks)
    process.send_signal(sign)
    await asyncio.sleep(0.2)
    tasks += [asyncio.ensure_future(one(*pair, late=True)) for pair in world.requests(20, seed=9)]
    await asyncio.gather(*tasks)
    status = await asyncio.to_thread(process.wait, 60)
    return {"taken": taken, "answered before the signal": done_before, "ends": dict(sorted(ends.items())), "status": status}


def measure_faults(world: World, count: int) -> dict[str, Any]:
    port = free_port()
    found: dict[str, Any] = {}
    with server(ours(world, "--max_queue", str(QUEUE)), port) as process:
        found["faults"] = asyncio.run(faults(port, world, count))
        found["overload"] = asyncio.run(overload(port, world, 400))
        found["metrics"] = {
            line.split()[0]: float(line.split()[1])
            for line in httpx2.get(f"http://127.0.0.1:{port}/metrics").text.splitlines()
            if line.startswith(COUNTED)
        }
        found["SIGTERM"] = asyncio.run(end_by(process, signal.SIGTERM, port, world, 200))
    with server(ours(world), port) as process:
        found["SIGKILL"] = asyncio.run(end_by(process, signal.SIGKILL, port, world, 200))
    with server(ours(world), port):
        found["after SIGKILL"] = asyncio.run(load(port, world, world.requests(50), 8))[1]
    return found


# ---------------------------------------------------------------- the page


def page_tables(results: dict[str, Any]) -> list[str]:
    """The tables of docs/serving.md: speed, windows, and how requests ended."""
    speed, faults = results["speed"], results["faults"]
    fast = ["| | requests a second | to one at a time |", "|---|---:|---:|"]
    fast += [
        f"| {way} | {rate:.1f} | {speed['to one at a time'][way]:.2f} |" for way, rate in speed["requests a second"].items()
    ]
    windows = ["| | requests a second |", "|---|---:|"]
    windows += [f"| {window} | {rate:.1f} |" for window, rate in results["windows"].items()]
    ends = {
        "beside bad clients": faults["faults"]["ends"],
        f"{faults['overload']['requests at once']} at once, a queue of {QUEUE}": faults["overload"]["ends"],
        f"SIGTERM, {faults['SIGTERM']['taken']} taken": faults["SIGTERM"]["ends"],
        f"SIGKILL, {faults['SIGKILL']['taken']} taken": faults["SIGKILL"]["ends"],
        "a new server on the same port": faults["after SIGKILL"],
    }
    ended = ["| | how requests ended |", "|---|---|"]
    ended += [
        f"| {case} | {', '.join(f'{end} {n:,}' for end, n in sorted(found.items()))} |" for case, found in ends.items()
    ]
    return ["\n".join(fast), "\n".join(windows), "\n".join(ended)]


def main(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    results: dict[str, Any] = {
        "versions": {name: version(name) for name in ("torch", "transformers", "uvicorn", "fastapi")},
        "python": platform.python_version(),
        "machine": f"{os.cpu_count()} CPU cores, shared; one thread of torch each for server and client",
    }
    for size, measured in (("tiny", "faults"), ("small", "speed"), ("small", "windows")):
        if measured in options.only:
            with tempfile.TemporaryDirectory() as folder:
                world = make_world(size, Path(folder))
                if measured == "faults":
                    results["faults"] = measure_faults(world, options.faults)
                elif measured == "windows":
                    results["windows"] = measure_windows(world, options.requests, options.repeats)
                else:
                    results["speed"] = measure_speed(world, options.requests, options.repeats)
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=192, help="requests of one measurement of speed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--faults", type=int, default=3000, help="good requests beside the bad ones")
    parser.add_argument("--only", nargs="+", default=["faults", "speed", "windows"])
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    text = json.dumps(main(given), indent=2)
    print(text)
    if given.output is not None:
        given.output.write_text(text + "\n", encoding="utf-8")
