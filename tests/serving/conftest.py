"""A tiny base with three adapters that answer differently, served on loopback."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from shadow_peft import ShadowForCausalLM
from tests.cli.conftest import TEMPLATE
from tests.tiny_models import causal_lm, llama

ADAPTERS = {"one": "published", "two": "readout", "three": "published"}


def base() -> LlamaForCausalLM:
    """The base of all adapters."""
    return llama(eos_token_id=2)


def adapted(name: str) -> ShadowForCausalLM:
    """The base with one of the adapters, whose shadow is unlike that of the others."""
    seed = list(ADAPTERS).index(name)
    model = causal_lm(base(), seed=seed, variant=ADAPTERS[name])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.peft_model.shadow_model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.05)
    return model


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each printable character, with a chat template."""
    names = ["<pad>", "<bos>", "<eos>", *map(chr, range(32, 125))]
    characters = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=" "))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>", chat_template=TEMPLATE, padding_side="left"
    )


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three stored adapters."""
    folder = tmp_path_factory.mktemp("served")
    for name in ADAPTERS:
        adapted(name).save_pretrained(folder / name)
    return {name: folder / name for name in ADAPTERS}


@contextmanager
def running(app: Any, port: int = 0) -> Iterator[str]:
    """The address of an application that is served in a thread, on a free port unless one is given."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        eventually(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def eventually(holds: Callable[[], Any], seconds: float = 30) -> Any:
    """Wait until something holds, and return it."""
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)
    return found


def client(url: str, key: str = "none") -> openai.OpenAI:
    """The official client, without retries."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
