"""What a bare base can do by itself, measured without our library.

A check that the base itself fails (a model that is not causal, a cache that changes its tokens) does not apply to the
attached model; ``base_facts`` is how the suite knows, and why nothing is skipped silently. Run as a module it writes
the facts of all types (or of those named) as JSON::

    python -m tests.conformance.base_facts [--output base_facts.json] [type ...]
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.conformance.tiny import BOS, FIRST_WORD, VOCAB, applicable_types, tiny_model

PROMPT = 14  # longer than every window of the tiny models
SHORT = 9  # the length of the shorter row of a padded batch
NEW = 6
EXACT = 1e-5
CLOSE = 1e-4
CACHES = ("past_key_values", "cache_params", "state", "mems", "past_buckets_states")


@dataclass
class Fact:
    """Whether something holds of a base, and what was seen."""

    holds: bool
    detail: str = ""


@dataclass
class LayerCall:
    """One call of one decoder layer during a forward."""

    index: int
    source: str  # where the hidden state came in: "0" for the first positional argument, else a keyword
    entered: Tensor
    positional: list[str]
    keywords: list[str]
    returned: str
    left: Tensor | None


@dataclass
class Decoder:
    """The decoder layer list of a base and how its layers are called."""

    path: str
    length: int
    owner: str
    owner_path: str
    classes: list[str]
    calls: int
    skipped: list[int]
    order: list[int]
    source: list[str]
    positional: list[str]
    keywords: list[str]
    returned: list[str]
    entered_shape: list[int]
    left_shape: list[int]
    chained: bool
    first_is_embedding: bool
    others: list[str] = field(default_factory=list)


@dataclass
class BaseFacts:
    """All facts of one base."""

    model_type: str
    model_class: str
    causal: Fact
    cached: Fact
    left_padding: Fact
    left_padding_generate: Fact
    checkpointing: Fact
    checkpointing_reentrant: Fact
    inputs_embeds: Fact
    deterministic: Fact
    cache: str
    plain_head: Fact
    config_layers: str
    hidden_size: int
    decoder: Decoder | None


def prompt(length: int = PROMPT, rows: int = 2, seed: int = 1) -> Tensor:
    """Random token ids ``[rows, length]`` without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_WORD, VOCAB, (rows, length), generator=generator)


def left_padded(ids: Tensor, length: int = SHORT, pad: int = BOS) -> tuple[Tensor, Tensor]:
    """``ids`` with row 1 cut to its last ``length`` tokens and padded on the left, and the attention mask."""
    mask = torch.ones_like(ids)
    mask[1, : ids.shape[1] - length] = 0
    return ids.masked_fill(mask == 0, pad), mask


def right_padded(ids: Tensor, length: int = SHORT, pad: int = BOS) -> tuple[Tensor, Tensor]:
    """The rows of ``left_padded`` with the padding on the right."""
    mask = torch.ones_like(ids)
    mask[1, length:] = 0
    kept = torch.cat((ids[1, -length:], ids[1, :-length]))
    return torch.stack((ids[0], kept)).masked_fill(mask == 0, pad), mask


def positions(model: PreTrainedModel, mask: Tensor) -> dict[str, Tensor]:
    """``position_ids`` from the mask as ``generate`` derives them, for a forward that takes them."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return {}
    return {"position_ids": (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)}


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """The logits of one plain forward; with a mask, positions are counted by it."""
    if mask is None:
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return model(input_ids=ids, attention_mask=mask, **positions(model, mask)).logits


@torch.no_grad()
def greedy(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None, cached: bool = True) -> Any:
    """A greedy continuation by ``NEW`` tokens with the raw logits of every step."""
    return model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        max_new_tokens=NEW,
        do_sample=False,
        use_cache=cached,
        output_logits=True,
        return_dict_in_generate=True,
    )


def difference(a: Tensor, b: Tensor, tolerance: float) -> Fact:
    """Whether two tensors agree, and by how much they do not."""
    if a.shape != b.shape:
        return Fact(False, f"shapes {tuple(a.shape)} and {tuple(b.shape)}")
    gap = (a - b).abs().max().item()
    return Fact(gap <= tolerance, f"max difference {gap:.1e}")


def same_generation(a: Any, b: Any, rows: slice = slice(None)) -> Fact:
    """Whether two continuations have the same tokens and step logits; ``rows`` selects from the first."""
    if not torch.equal(a.sequences[rows, -NEW:], b.sequences[:, -NEW:]):
        return Fact(False, "tokens differ")
    return difference(torch.stack(a.logits)[:, rows], torch.stack(b.logits), CLOSE)


def causal(model: PreTrainedModel) -> Fact:
    """Changing later tokens leaves earlier logits unchanged."""
    ids = prompt()
    other = ids.clone()
    other[:, SHORT:] = prompt(seed=2)[:, SHORT:]
    return difference(logits(model, ids)[:, :SHORT], logits(model, other)[:, :SHORT], EXACT)


def cached(model: PreTrainedModel) -> Fact:
    """Greedy decoding with a cache equals greedy decoding without."""
    ids = prompt()
    return same_generation(greedy(model, ids), greedy(model, ids, cached=False))


def left_padding(model: PreTrainedModel) -> Fact:
    """Each row of a left-padded batch has the logits it has alone."""
    ids, mask = left_padded(prompt())
    batch = logits(model, ids, mask)
    full = difference(batch[:1], logits(model, ids[:1], mask[:1]), CLOSE)
    short = difference(batch[1:, -SHORT:], logits(model, ids[1:, -SHORT:], mask[1:, -SHORT:]), CLOSE)
    return full if not full.holds else short


def right_padding(model: PreTrainedModel) -> Fact:
    """The shorter row of a right-padded batch has the logits it has alone."""
    ids, mask = right_padded(prompt())
    batch = logits(model, ids, mask)
    return difference(batch[1:, :SHORT], logits(model, ids[1:, :SHORT], mask[1:, :SHORT]), CLOSE)


def left_padding_generate(model: PreTrainedModel) -> Fact:
    """Each row of a left-padded batch continues as it does alone, cached."""
    ids, mask = left_padded(prompt())
    batch = greedy(model, ids, mask)
    full = same_generation(batch, greedy(model, ids[:1]), slice(0, 1))
    short = same_generation(batch, greedy(model, ids[1:, -SHORT:]), slice(1, 2))
    return full if not full.holds else short


def inputs_embeds(model: PreTrainedModel) -> Fact:
    """Feeding the embeddings of the tokens gives the logits of the tokens."""
    if "inputs_embeds" not in inspect.signature(model.forward).parameters:
        return Fact(False, "forward does not take inputs_embeds")
    ids = prompt()
    mask = torch.ones_like(ids)
    with torch.no_grad():
        table = model.get_input_embeddings()
        embeds = table(ids)
        given = model(inputs_embeds=embeds, attention_mask=mask, **positions(model, mask)).logits
    return difference(given, logits(model, ids, mask), EXACT)


def deterministic(model: PreTrainedModel) -> Fact:
    """Two forwards in eval mode are bit-identical."""
    return difference(logits(model, prompt()), logits(model, prompt()), 0.0)


def gradients(model: PreTrainedModel, seed: int = 0) -> dict[str, Tensor]:
    """The gradients of a training forward by parameter name, for one fixed draw of the dropouts."""
    model.zero_grad(set_to_none=True)
    ids = prompt()
    torch.manual_seed(seed)
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    out.float().logsumexp(-1).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def checkpointing(model: PreTrainedModel, reentrant: bool) -> Fact:
    """Gradient checkpointing is supported and leaves the gradients as they are."""
    if not model.supports_gradient_checkpointing:
        return Fact(False, "supports_gradient_checkpointing is False")
    model.train()
    plain = gradients(model)
    model.enable_input_require_grads()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    saved = gradients(model)
    if saved.keys() != plain.keys():
        return Fact(False, f"{len(saved)} parameters have gradients instead of {len(plain)}")
    for name, gradient in plain.items():
        fact = difference(saved[name], gradient, CLOSE * max(1.0, gradient.abs().max().item()))
        if not fact.holds:
            return Fact(False, f"{name}: {fact.detail}")
    return Fact(True)


def cache_used(model: PreTrainedModel) -> str:
    """The name and class of what a forward returns as its cache."""
    ids = prompt()
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
    found = [f"{name}: {type(out[name]).__name__}" for name in CACHES if out.get(name) is not None]
    return ", ".join(found) or "none"


def plain_head(model: PreTrainedModel) -> Fact:
    """The logits are the output embedding applied to what reaches it, with nothing after."""
    head = model.get_output_embeddings()
    if head is None:
        return Fact(False, "get_output_embeddings() is None")
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    out = logits(model, prompt())
    handle.remove()
    if not seen:
        return Fact(False, f"the output embedding ({type(head).__name__}) is not called")
    applied = nn.functional.linear(seen[-1], head.weight, getattr(head, "bias", None))
    return difference(applied, out, EXACT)


def _kind(value: Any) -> str:
    """A short name of what a layer took or returned."""
    if isinstance(value, Tensor):
        return f"tensor{list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__}({', '.join(_kind(item) for item in value)})"
    return type(value).__name__


def _first_tensor(value: Any) -> Tensor | None:
    """The hidden state in what a layer returned: itself, or the first element."""
    if isinstance(value, tuple | list):
        value = value[0] if value else None
    return value if isinstance(value, Tensor) else None


def _watch(layers: nn.ModuleList, calls: list[LayerCall]) -> list[Any]:
    """Record every call of every layer of ``layers``."""
    opened: dict[int, list[tuple[tuple[Any, ...], dict[str, Any], Tensor, str]]] = {}

    def before(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            named = {str(i): value for i, value in enumerate(args)} | kwargs
            source = next(key for key, value in named.items() if isinstance(value, Tensor) and value.is_floating_point())
            opened.setdefault(index, []).append((args, kwargs, named[source].clone(), source))

        return hook

    def after(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any) -> None:
            args, kwargs, entered, source = opened[index].pop()
            left = _first_tensor(output)
            calls.append(
                LayerCall(
                    index,
                    source,
                    entered,
                    [_kind(arg) for arg in args],
                    sorted(kwargs),
                    _kind(output),
                    None if left is None else left.clone(),
                )
            )

        return hook

    handles = []
    for index, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(before(index), with_kwargs=True))
        handles.append(layer.register_forward_hook(after(index), with_kwargs=True))
    return handles


def _called_lists(model: PreTrainedModel) -> dict[str, nn.ModuleList]:
    """The module lists by path that a text forward calls (two modules and more), outermost first.

    A text forward may leave some layers out (the cross attention layers of Mllama).
    """
    called: set[nn.Module] = set()
    handles = [m.register_forward_pre_hook(lambda m, _: called.add(m)) for m in model.modules()]
    logits(model, prompt())
    for handle in handles:
        handle.remove()
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    used = {name: modules for name, modules in lists.items() if sum(m in called for m in modules) > 1}
    outer = [name for name in used if not any(name.startswith(f"{other}.") for other in used)]
    return {name: used[name] for name in sorted(outer, key=lambda name: (name.count("."), name))}


def stack_of(model: PreTrainedModel) -> Decoder | None:
    """The decoder layer list of ``model`` and how its layers are called, or None when no list is called in full."""
    lists = _called_lists(model)
    if not lists:
        return None
    path = max(lists, key=lambda name: len(lists[name]))
    layers = lists[path]
    calls: list[LayerCall] = []
    handles = _watch(layers, calls)
    ids = prompt()
    logits(model, ids)
    for handle in handles:
        handle.remove()
    owners = [
        n for n, m in model.named_modules() if isinstance(m, PreTrainedModel) and path.startswith(f"{n}." if n else "")
    ]
    owner = max(owners, key=len)
    embedded = model.get_input_embeddings()(ids)
    first, last = calls[0], calls[-1]
    return Decoder(
        path=path,
        length=len(layers),
        owner=type(model.get_submodule(owner)).__name__,
        owner_path=owner,
        classes=sorted({type(layer).__name__ for layer in layers}),
        calls=max(Counter(call.index for call in calls).values()),
        skipped=[i for i in range(len(layers)) if all(call.index != i for call in calls)],
        order=[call.index for call in calls],
        source=sorted({call.source for call in calls}),
        positional=first.positional,
        keywords=first.keywords,
        returned=sorted({call.returned for call in calls}),
        entered_shape=list(first.entered.shape),
        left_shape=[] if last.left is None else list(last.left.shape),
        chained=all(a.left is not None and torch.equal(a.left, b.entered) for a, b in pairwise(calls)),
        first_is_embedding=torch.equal(first.entered, embedded),
        others=[f"{name}[{len(modules)}]" for name, modules in lists.items() if name != path],
    )


def reloads(model: PreTrainedModel) -> Fact:
    """Saving and loading by ``AutoModelForCausalLM`` leaves the logits as they are."""
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return difference(logits(loaded, prompt()), logits(model, prompt()), EXACT)


def idle_layers(model: PreTrainedModel) -> list[int]:
    """Indices of decoder layers that a text forward does not call."""
    decoder = stack_of(model)
    return [] if decoder is None else decoder.skipped


def measured(measure: Callable[[PreTrainedModel], Fact], model: PreTrainedModel) -> Fact:
    """A fact, or the error that its measurement raised."""
    try:
        return measure(model)
    except Exception as error:  # any error of a foreign model is the finding
        return Fact(False, f"{type(error).__name__}: {error}")


def base_facts(model_type: str) -> BaseFacts:
    """Measure all facts of a tiny base of ``model_type``."""
    model = tiny_model(model_type)
    config = model.config.get_text_config(decoder=True)
    return BaseFacts(
        model_type=model_type,
        model_class=type(model).__name__,
        causal=measured(causal, model),
        cached=measured(cached, model),
        left_padding=measured(left_padding, model),
        left_padding_generate=measured(left_padding_generate, model),
        inputs_embeds=measured(inputs_embeds, model),
        deterministic=measured(deterministic, model),
        cache=cache_used(model),
        plain_head=measured(plain_head, model),
        config_layers=f"{type(config).__name__}.num_hidden_layers={config.num_hidden_layers}",
        hidden_size=config.hidden_size,
        decoder=stack_of(model),
        checkpointing=measured(partial(checkpointing, reentrant=False), tiny_model(model_type)),
        checkpointing_reentrant=measured(partial(checkpointing, reentrant=True), tiny_model(model_type)),
    )


def main(arguments: list[str]) -> None:
    """Write the facts of the named types, or of all, as JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--output", default="base_facts.json")
    parser.add_argument("types", nargs="*")
    options = parser.parse_args(arguments)
    facts = {}
    for name in options.types or applicable_types():
        facts[name] = asdict(base_facts(name))
        print(name, file=sys.stderr, flush=True)
    with open(options.output, "w") as file:
        json.dump(facts, file, indent=1)


if __name__ == "__main__":
    main(sys.argv[1:])
