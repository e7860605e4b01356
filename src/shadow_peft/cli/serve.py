"""`shadow-peft serve`: an OpenAI-compatible server of one base with many adapters."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from shadow_peft.cascade.storage import FILE
from shadow_peft.cli.errors import UserError, one_line
from shadow_peft.cli.loading import check_place, check_quantization, load_base, load_tokenizer, named_base
from shadow_peft.cli.options import OPTIONS, QuantizationOptions
from shadow_peft.cli.parsing import VerbParser, parse
from shadow_peft.cli.quiet import quiet_libraries
from shadow_peft.cli.remote import remote_model
from shadow_peft.cli.serve_options import ANY_PAGE, ServeOptions
from shadow_peft.serving.app import build_app, serve
from shadow_peft.serving.limits import Limits
from shadow_peft.serving.routes import ServedModels, load_served, load_served_shadow

DESCRIPTION = """Serves one base with many adapters to clients of OpenAI's API: completions, chat completions and responses.

The model of a request is the base, an adapter, the shadow of one alone (NAME:shadow), or its cascade (NAME:cascade) where
the adapter has been calibrated. Requests for different adapters share batches."""
EXAMPLES = """examples:
  shadow-peft serve --adapter robot=out --check
  shadow-peft serve --adapter robot=out --model Qwen/Qwen3-0.6B --port 8080 --draft
"""

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def run(arguments: list[str]) -> None:
    """Parse the options, load the models and serve until SIGTERM or SIGINT."""
    parser = VerbParser("serve", OPTIONS["serve"], DESCRIPTION, EXAMPLES)
    options, quantization, _ = parse(parser, arguments)
    check_quantization(quantization)
    keys = read_keys(options.api_key_file)
    limits = Limits(
        prompt_tokens=options.max_prompt_tokens,
        new_tokens=options.max_new_tokens,
        queue=options.max_queue,
        timeout=options.timeout,
        batch=options.max_batch,
        window=options.window / 1000,
    )
    with quiet_libraries():
        served = load(options, quantization)
        if options.check:
            print("\n".join(served.routes))
            return
        if not keys and options.host not in LOOPBACK:
            print(f"anybody who reaches {options.host} may use this server: there is no --api_key_file", file=sys.stderr)
        if not keys and set(options.allowed_origins) & set(ANY_PAGE):
            print(
                "any web page may use this server from this machine's browser: there is no --api_key_file", file=sys.stderr
            )
        app = build_app(served, limits, draft=options.draft, keys=keys, allowed_origins=options.allowed_origins)
        print(f"serving {', '.join(served.routes)} on http://{options.host}:{options.port}/v1", flush=True)
        serve(app, options.host, options.port, limits)


def load(options: ServeOptions, quantization: QuantizationOptions) -> ServedModels:
    """The base with its adapters, or an exported shadow, on the device.

    Raises:
        UserError: one of them cannot be loaded, they do not fit, or nobody would ask the remote model.
    """
    adapters = options.named_adapters()
    first = next(iter(adapters.values()), None)
    name = options.model or named_base(str(first))
    remote = remote_model(options.remote_url, options.remote_model, options.remote_timeout)
    check_place(name)
    tokenizer = load_tokenizer(first, name)
    if not tokenizer.is_fast:
        raise UserError(f"serving needs a fast tokenizer, and that of {name!r} is a {type(tokenizer).__name__}")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    quantized = quantization.load_in_4bit or quantization.load_in_8bit
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: {one_line(error)}") from error
    base = load_base(name, quantization, dtype=options.dtype, **({"device_map": device} if quantized else {})).eval()
    if not quantized:
        base.to(device)
    try:
        if remote is not None and not adapters:
            return load_served_shadow(base, tokenizer, name, remote, name=options.base_name)
        served = load_served(
            base, tokenizer, adapters, base_name=options.base_name, capacity=options.adapters_in_memory, remote=remote
        )
        if remote is not None and not served.cascades:
            raise ValueError(f"no adapter has a {FILE}, so nobody would ask {remote.base_url}; calibrate one of them")
        return served
    except (ValueError, OSError) as error:
        raise UserError(one_line(error)) from error


def read_keys(path: str | None) -> list[str]:
    """The API keys of a file, one a line.

    Raises:
        UserError: the file has none, or cannot be read.
    """
    if path is None:
        return []
    try:
        keys = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"--api_key_file {path}: {one_line(error)}") from error
    if not keys:
        raise UserError(f"--api_key_file {path} has no key")
    return keys
