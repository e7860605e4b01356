"""What an attached adapter must do on every base, through the public API alone.

Each function of ``CHECKS`` takes a model type and raises when what it checks does not hold. A check asks first for what it
needs of the bare base (``needs``): where the base itself does not do it, the check does not apply, and the measured
fact is the reason. Tolerances are those of ``base_facts``: ``EXACT`` for one computation done twice, ``CLOSE`` where the
order of float32 sums differs (padding, caching, recomputing).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from shadow_peft import ShadowConfig, ShadowForCausalLM, ShadowForSequenceClassification, get_shadow_model
from shadow_peft.base.architectures import ARCHITECTURES, Architecture
from shadow_peft.export.head import CannotFold
from tests.conformance import base_facts as facts
from tests.conformance.base_facts import CLOSE, EXACT, SHORT, Fact, difference, left_padded, prompt, right_padded
from tests.conformance.outcomes import NotApplicable, Refused, base_fact, needs, require
from tests.conformance.tiny import HIDDEN, tiny_model
from tests.tiny_models import llama, zeros_at_the_end

VISIBLE = 1e-3
"""The least change of logits that a random adapter must make."""

MODES = ("base_shadow", "shadow_only")

NARROW = HIDDEN // 2
"""Width of a shadow of another width."""


# -------------------------------------------------------------------- the adapted models


variant = "published"
"""The mathematics that is checked; the sweep sets it."""


def settings(**changes: Any) -> ShadowConfig:
    """The adapter of the variant that is checked, smaller."""
    return ShadowConfig(**{"variant": variant, "injection_hidden_size": 8, "gate_hidden_size": 6, **changes})


@torch.no_grad()
def stir(model: nn.Module) -> None:
    """Give a fresh adapter weights that show: up maps that are not zero, an update that is not symmetric."""
    generator = torch.Generator().manual_seed(3)
    ups, updating = model.shadow_injection_model.injection_ups, model.shadow_update_model
    if updating:
        parts = [(ups, 1.0), (updating.hidden_norm.bias, 0.3)]
    else:
        parts = [(ups, 0.05), *((zero, 0.3) for zero in zeros_at_the_end(model))]
    for part, size in parts:
        part.copy_(torch.randn(part.shape, generator=generator) * size)


def adapted(model_type: str, **changes: Any) -> ShadowForCausalLM:
    """A causal language model on a tiny base, its adapter random, in eval mode."""
    torch.manual_seed(7)
    peft_model = get_shadow_model(tiny_model(model_type), settings(**changes))
    stir(peft_model)
    return ShadowForCausalLM(peft_model).eval()


@torch.no_grad()
def both(model: Any, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """The logits of adapted base and shadow."""
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids) if mask is None else mask)
    return {"logits": out.logits, "shadow_logits": out.shadow_logits}


def same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    """Raise unless all tensors of two dictionaries agree."""
    assert a.keys() == b.keys()
    for name in a:
        require(difference(a[name], b[name], tolerance) if tolerance else identical(a[name], b[name]), name)


def identical(a: Tensor, b: Tensor) -> Fact:
    """Whether two tensors are the same, bit by bit."""
    return Fact(torch.equal(a, b), "not bit-identical")


def cut(tensors: dict[str, Tensor], rows: slice, tokens: slice) -> dict[str, Tensor]:
    """The same part of several ``[B, T, V]`` tensors."""
    return {name: tensor[rows, tokens] for name, tensor in tensors.items()}


@contextmanager
def answering(model: Any, mode: str) -> Iterator[None]:
    """Let a task model answer with one of its networks for a while."""
    model.set_inference_mode(mode)
    yield
    model.set_inference_mode("base_shadow")


# -------------------------------------------------------------------- the checks


def attach(model_type: str) -> None:
    """Attaching leaves the base's class, names, state dict and configuration alone and freezes it; a forward runs."""
    for layers, chosen in ((1, "first"), (2, "first"), (2, "even")):
        base, untouched = tiny_model(model_type), tiny_model(model_type)
        config = settings(num_shadow_layers=layers, shadow_init_layers=chosen)
        model = ShadowForCausalLM(get_shadow_model(base, config)).eval()
        assert type(base) is type(untouched)
        assert [n for n, _ in base.named_modules()] == [n for n, _ in untouched.named_modules()]
        assert base.config.to_dict() == untouched.config.to_dict(), "the base's config has changed"
        same(dict(base.state_dict()), dict(untouched.state_dict()), 0.0)
        assert not any(p.requires_grad for p in base.parameters())
        logits = both(model, prompt())
        assert all(tensor.isfinite().all() for tensor in logits.values())
        assert logits["logits"].shape == logits["shadow_logits"].shape


def identity(model_type: str) -> None:
    """A fresh adapter changes nothing, whether its backbone is random or cut from the base."""
    expected = facts.logits(tiny_model(model_type), prompt())
    for init in ("random", "base"):
        model = ShadowForCausalLM(get_shadow_model(tiny_model(model_type), settings(shadow_init=init))).eval()
        require(difference(both(model, prompt())["logits"], expected, EXACT), f"shadow_init {init!r}")


def injection(model_type: str) -> None:
    """A random up projection of any ridden layer changes the logits."""
    model = adapted(model_type, shadow_init="random")  # cut from a base without a final norm, s is h at layer 1
    ups = model.peft_model.shadow_injection_model.injection_ups
    filled, plain = ups.detach().clone(), facts.logits(tiny_model(model_type), prompt())
    idle = set(facts.idle_layers(tiny_model(model_type)))
    for index in range(ups.shape[0]):
        with torch.no_grad():
            ups.zero_()[index] = filled[index]
        gap = (both(model, prompt())["logits"] - plain).abs().max().item()
        if index + 1 not in idle:
            assert gap > VISIBLE, f"the injection of layer {index + 1} changes the logits by {gap:.1e} only"


def gradients(model_type: str) -> None:
    """Every trainable part receives a gradient, nothing of the base does."""
    model = adapted(model_type).train()
    torch.manual_seed(0)
    model(input_ids=prompt(), attention_mask=torch.ones_like(prompt()), labels=prompt()).loss.backward()
    assert not any(p.grad is not None for p in model.peft_model.base_model.parameters()), "the base has gradients"
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing, f"no gradient: {', '.join(missing)}"
    peft = model.peft_model
    coupling = (peft.shadow_injection_model, peft.shadow_update_model, peft.shadow_output_model, peft.shadow_readout_model)
    zero = [n for part in filter(None, coupling) for n, p in part.named_parameters() if p.requires_grad and not p.grad.any()]
    assert not zero, f"gradient zero: {', '.join(zero)}"


def causality(model_type: str) -> None:
    """Later tokens change no earlier logits."""
    needs(facts.causal, model_type, "is not causal")
    model, ids, other = adapted(model_type), prompt(), prompt()
    other[:, SHORT:] = prompt(seed=2)[:, SHORT:]
    before = slice(None), slice(SHORT)
    same(cut(both(model, ids), *before), cut(both(model, other), *before), EXACT)


def cached(model_type: str) -> None:
    """Greedy decoding with a cache has the tokens and step logits of decoding without."""
    needs(facts.cached, model_type, "decodes otherwise with a cache")
    model, ids = adapted(model_type), prompt()
    for mode in MODES:
        with answering(model, mode):
            require(facts.same_generation(facts.greedy(model, ids), facts.greedy(model, ids, cached=False)), mode)


def left_padding(model_type: str) -> None:
    """Both rows of a left-padded batch have the logits that each has alone."""
    needs(facts.left_padding, model_type, "gives left-padded rows other logits")
    model = adapted(model_type)
    ids, mask = left_padded(prompt())
    batch, short = both(model, ids, mask), slice(-SHORT, None)
    same(cut(batch, slice(0, 1), slice(None)), both(model, ids[:1]), CLOSE)
    same(cut(batch, slice(1, 2), short), both(model, ids[1:, short]), CLOSE)


def left_padding_generate(model_type: str) -> None:
    """Both rows of a left-padded batch are continued as each is alone, with a cache."""
    needs(facts.left_padding_generate, model_type, "continues left-padded rows otherwise")
    model = adapted(model_type)
    ids, mask = left_padded(prompt())
    for mode in MODES:
        with answering(model, mode):
            batch = facts.greedy(model, ids, mask)
            require(facts.same_generation(batch, facts.greedy(model, ids[:1]), slice(0, 1)), f"{mode}, full row")
            require(facts.same_generation(batch, facts.greedy(model, ids[1:, -SHORT:]), slice(1, 2)), f"{mode}, padded row")


def save_load(model_type: str) -> None:
    """A saved adapter, loaded onto a fresh copy of the base, computes the same."""
    model = adapted(model_type)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        torch.manual_seed(11)
        loaded = ShadowForCausalLM.from_pretrained(tiny_model(model_type), directory)
    same(model.state_dict(), loaded.state_dict(), 0.0)
    same(both(model, prompt()), both(loaded, prompt()), EXACT)


def bare_base(model_type: str) -> None:
    """The base called by itself while attached is the bare base; so is the model inside ``disable_adapter``."""
    model, expected = adapted(model_type), facts.logits(tiny_model(model_type), prompt())
    both(model, prompt())
    require(identical(facts.logits(model.peft_model.base_model, prompt()), expected), "base_model")
    with model.peft_model.disable_adapter():
        require(difference(facts.logits(model, prompt()), expected, EXACT), "disable_adapter")


def unload(model_type: str) -> None:
    """Unloading gives the base back: bit-identical logits and state dict, the same trainable parameters, no hook."""
    untouched, model = tiny_model(model_type), adapted(model_type)
    both(model, prompt())
    base = model.peft_model.unload()
    require(identical(facts.logits(base, prompt()), facts.logits(untouched, prompt())), "logits")
    same(dict(base.state_dict()), dict(untouched.state_dict()), 0.0)
    trainable = [[n for n, p in m.named_parameters() if p.requires_grad] for m in (base, untouched)]
    assert trainable[0] == trainable[1]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())


def checkpointing(model_type: str, reentrant: bool) -> None:
    """Gradient checkpointing leaves the gradients as they are."""
    needs(_base_checkpointing[reentrant], model_type, "cannot checkpoint like this")
    model = adapted(model_type).train()
    plain = _gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    recomputed = _gradients(model)
    assert plain.keys() == recomputed.keys(), f"gradients differ in {sorted(plain.keys() ^ recomputed.keys())}"
    for name, gradient in plain.items():
        require(difference(recomputed[name], gradient, CLOSE * max(1.0, gradient.abs().max().item())), name)


_base_checkpointing = {reentrant: partial(facts.checkpointing, reentrant=reentrant) for reentrant in (True, False)}


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of a training step's loss by name, for one fixed draw of the dropouts."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    model(input_ids=prompt(), attention_mask=torch.ones_like(prompt()), labels=prompt()).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def classification(model_type: str) -> None:
    """A sequence's class logits do not depend on the side of its padding, nor on its neighbours."""
    needs(facts.left_padding, model_type, "gives left-padded rows other logits")
    needs(facts.right_padding, model_type, "gives right-padded rows other logits")
    torch.manual_seed(7)
    peft_model = get_shadow_model(tiny_model(model_type), settings())
    stir(peft_model)
    model = ShadowForSequenceClassification(peft_model).eval()
    left, right = (both(model, *padded(prompt())) for padded in (left_padded, right_padded))
    same(left, right, CLOSE)
    alone = both(model, prompt()[1:, -SHORT:])
    same({name: logits[1:] for name, logits in left.items()}, alone, CLOSE)


def export(model_type: str) -> None:
    """The exported shadow computes the shadow logits by itself and shares no tensor with the base."""
    model = adapted(model_type, num_shadow_layers=2)
    exported = model.export_shadow()
    require(difference(facts.logits(exported, prompt()), both(model, prompt())["shadow_logits"], EXACT), "logits")
    held = {p.data_ptr() for p in model.parameters()}
    assert not any(p.data_ptr() in held for p in exported.parameters()), "the exported model shares tensors"


def reload(model_type: str) -> None:
    """The exported shadow, saved and loaded as any model is, computes the same."""
    needs(facts.reloads, model_type, "is not the same after saving and loading")
    fewest, _ = ARCHITECTURES.get(model_type, Architecture()).min_exported_layers
    for layers in {fewest, 2}:
        exported = adapted(model_type, num_shadow_layers=layers).export_shadow()
        require(facts.reloads(exported), f"{layers} layers")


def fold(model_type: str) -> None:
    """A shadow of half the width, random and of the base's own type, is folded into a stock model, see `folds`."""
    tiny_model(model_type)  # what fails here is not the width's fault
    try:
        model = adapted(model_type, num_shadow_layers=2, shadow_init="random", shadow_hidden_size=NARROW)
        both(model, prompt())
    except Exception as error:  # some types have further widths that must go with it
        raise NotApplicable(f"hidden_size cannot be halved alone ({type(error).__name__}: {error})") from error
    folds(model, model_type)


def fold_llama(model_type: str) -> None:
    """A Llama of half the width as the shadow is folded into a stock Llama, see `folds`."""
    torch.manual_seed(7)
    base = tiny_model(model_type)
    shadow = llama(5, hidden_size=NARROW, vocab_size=base.get_input_embeddings().weight.shape[0])
    peft_model = get_shadow_model(base, settings(), shadow_model=shadow)
    stir(peft_model)
    folds(ShadowForCausalLM(peft_model).eval())


def folds(model: ShadowForCausalLM, model_type: str = "llama") -> None:
    """The folded shadow is of a stock class and computes the shadow's logits, also after saving, and with a cache."""
    expected = both(model, prompt())["shadow_logits"]
    try:
        folded = model.export_shadow(fold=True)
    except CannotFold as reason:
        raise Refused(str(reason)) from reason
    assert type(folded).__module__.startswith("transformers.")
    with tempfile.TemporaryDirectory() as directory:
        folded.save_pretrained(directory)
        loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for stock, what in ((folded, "logits"), (loaded, "logits after loading")):
        require(difference(facts.logits(stock, prompt()), expected, EXACT), what)
    if base_fact(facts.cached, model_type).holds:
        loaded.generation_config = model.generation_config
        require(facts.same_generation(facts.greedy(loaded, prompt()), facts.greedy(loaded, prompt(), cached=False)), "cache")


CHECKS: dict[str, Callable[[str], None]] = {
    "attach": attach,
    "identity": identity,
    "injection": injection,
    "gradients": gradients,
    "causality": causality,
    "cache": cached,
    "left padding": left_padding,
    "left padding, generate": left_padding_generate,
    "save and load": save_load,
    "bare base": bare_base,
    "unload": unload,
    "checkpointing": partial(checkpointing, reentrant=False),
    "checkpointing, reentrant": partial(checkpointing, reentrant=True),
    "classification": classification,
    "export": export,
    "export, reloaded": reload,
    "fold": fold,
    "fold, Llama": fold_llama,
}
