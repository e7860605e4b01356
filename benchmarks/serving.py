"""`shadow-peft serve` under load on loopback: requests a second, faults, and whether every answer is the right one.

    OMP_NUM_THREADS=1 python -m benchmarks.serving [--output benchmarks/results/serving.json]

A random base with a token for each character, in float32 ("tiny" for the faults, "small" for the speed); four
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
import statistics
import subprocess
import tempfile
from collections import Counter
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx2
import torch
from transformers import logging

from benchmarks.serving_world import (
    OneAtATime,
    World,
    body,
    free_port,
    load,
    make_world,
    ours,
    post,
    raw,
    server,
    stream_text,
    theirs,
)

CLIENTS = (1, 8, 32)
QUEUE, WINDOWS = 200, (0, 5, 20, 50)
COUNTED = tuple(
    f"shadow_peft_{name}"
    for name in ("hang_ups_total", "overloads_total", "waiting", "running", "batch_rows_sum", "batch_rows_count")
)


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
                    found[f"shadow-peft serve, {kind}, {counted(clients)}"] = rate
                    wrong.update({end: n for end, n in ends.items() if end != "right"})
            for label, other in (("transformers serve", theirs_port), ("transformers serve, paged", paged_port)):
                few = kinds["base"][: count if "paged" in label else max(8, count // 4)]
                rate, ends = asyncio.run(load(other, world, few, CLIENTS[-1], str(world.base)))
                found[f"{label}, base, {counted(CLIENTS[-1])}"] = rate
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


def counted(clients: int) -> str:
    """So many clients, in words."""
    return f"{clients} client" if clients == 1 else f"{clients} clients"


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
                found[f"{window} ms, {counted(clients)}"] = round(statistics.median(values), 1)
    return found


# ---------------------------------------------------------------- faults


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
