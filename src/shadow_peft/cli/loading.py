"""Loads models and tokenizers by name, for the verbs."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file

from shadow_peft.backbone.explicit import prepare_shadow_model
from shadow_peft.backbone.projected_lm import AutoModelForCausalLMWithHiddenProjection
from shadow_peft.backbone.projection import carried_projection
from shadow_peft.checkpoint import peft
from shadow_peft.cli.errors import UserError, one_line
from shadow_peft.cli.folders import TOKENIZER_FILES
from shadow_peft.cli.options import QuantizationOptions
from shadow_peft.cli.quiet import no_reports
from shadow_peft.config import CONFIG_FILE
from shadow_peft.storage.files import read_json
from shadow_peft.storage.hub import local_directory
from shadow_peft.tasks.causal_lm import ShadowForCausalLM


def load_model(name: str, auto_class: Any = AutoModelForCausalLM, **kwargs: Any) -> PreTrainedModel:
    """Load a model, by default a causal language model, from a folder or the hub; `kwargs` go to `from_pretrained`.

    Raises:
        UserError: there is no such model, or it is of another kind.
    """
    check_place(name)
    try:
        model: PreTrainedModel = auto_class.from_pretrained(name, **kwargs)
    except Exception as error:  # of a damaged folder it may be of any type
        kind = "classifier" if auto_class is AutoModelForSequenceClassification else "causal language model"
        raise UserError(f"cannot load a {kind} from {name!r}: {one_line(error)}") from error
    return model


def check_place(name: str) -> None:
    """Refuse what is no model at a glance; transformers says it in many words, and looks for it on the hub first.

    Raises:
        UserError: a path that is not there, a file, or a folder without a model or a LoRA adapter.
    """
    path = Path(name)
    if path.is_dir():
        if (path / "config.json").is_file() or (path / peft.CONFIG_FILE).is_file():
            return
        if (path / CONFIG_FILE).is_file():
            raise UserError(f"{name} is a shadow adapter and no model; generate and eval take it as --adapter")
        why = "it has no config.json"
    elif path.exists():
        why = "it is a file; give the folder"
    elif looks_local(name):
        why = "there is no such folder"
    else:
        return
    raise UserError(f"cannot load a causal language model from {name!r}: {why}")


def looks_local(name: str) -> bool:
    """Whether a name can be a path alone: hub ids are `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def load_answering(
    model: str | None,
    adapter: str | None,
    device: str | None = None,
    quantization: QuantizationOptions | None = None,
    **kwargs: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """What answers, and its tokenizer: a model, or a base with an adapter attached.

    Args:
        model: folder or hub id; None means the base that the adapter names.
        adapter: folder or hub id of a shadow adapter.
        device: where to; None leaves it where it was loaded.
        quantization: options that `check_quantization` has let pass; None quantizes nothing.
        kwargs: go to `from_pretrained` of the model.

    Raises:
        UserError: one of them cannot be loaded, or they do not fit.
    """
    name = named_base(str(adapter)) if model is None else model
    quantization = quantization or QuantizationOptions()
    try:
        check_place(name)
        tokenizer = load_tokenizer(adapter, name)
        if device is not None and (quantization.load_in_4bit or quantization.load_in_8bit):
            kwargs["device_map"] = device  # weights are quantized where they are to stay
        base = load_base(name, quantization, **kwargs).eval()
    except UserError as error:
        if model is not None:
            raise
        raise UserError(f"{error}; the adapter names it as its base, --model gives another place") from error
    if device is not None:
        base.to(device)
    return (base if adapter is None else load_adapted(base, adapter)), tokenizer


def named_base(adapter: str) -> str:
    """The base that an adapter says it was made for: a folder that is there, or a hub id.

    Raises:
        UserError: it is no shadow adapter, it names none, or it names a folder that is not there.
    """
    try:
        directory = local_directory(adapter)
        native = (directory / CONFIG_FILE).is_file()
        if not native and not (directory / peft.CONFIG_FILE).is_file():
            raise ValueError(f"it has neither {CONFIG_FILE} nor {peft.CONFIG_FILE}")
        stored = read_json(directory / (CONFIG_FILE if native else peft.CONFIG_FILE))
    except (OSError, ValueError) as error:
        raise UserError(f"{adapter!r} is no shadow adapter: {one_line(error)}") from error
    origin = stored.get("provenance") if native else stored
    base = origin.get("base_model_name_or_path") if isinstance(origin, dict) else None
    if not isinstance(base, str) or not base:
        raise UserError(f"the adapter {adapter!r} does not say which base it was made for; give it as --model")
    if Path(base).is_dir():
        return base
    if looks_local(base):
        raise UserError(
            f"the adapter {adapter!r} was made for {base!r}, and no such folder is here; give its base as --model"
        )
    return base


def check_quantization(options: Any) -> None:
    """Refuse options of the quantization that contradict each other, or do nothing.

    Args:
        options: `QuantizationOptions`, or TRL's `ModelConfig`.

    Raises:
        UserError: saying what, and what to do.
    """
    if options.load_in_4bit and options.load_in_8bit:
        raise UserError("--load_in_4bit and --load_in_8bit exclude each other; drop one of them")
    if options.bnb_4bit_quant_type not in ("nf4", "fp4"):
        raise UserError(f"--bnb_4bit_quant_type is nf4 or fp4, got {options.bnb_4bit_quant_type!r}")
    defaults = {"bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": False, "bnb_4bit_quant_storage": None}
    given = [name for name, default in defaults.items() if getattr(options, name, default) != default]
    if given and not options.load_in_4bit:
        raise UserError(f"--{given[0]} says how 4 bit weights are stored; add --load_in_4bit, or drop it")
    if (options.load_in_4bit or options.load_in_8bit) and find_spec("bitsandbytes") is None:
        bits = 4 if options.load_in_4bit else 8
        raise UserError(f"--load_in_{bits}bit needs bitsandbytes: pip install 'shadow-peft[quantized]'")


def quantization_flags(options: Any) -> str:
    """The options that quantize a base as TRL's `ModelConfig` says, as the verbs that answer take them; empty if none do."""
    flags = [f"--{name}" for name in ("load_in_4bit", "load_in_8bit", "use_bnb_nested_quant") if getattr(options, name)]
    if options.load_in_4bit and options.bnb_4bit_quant_type != "nf4":
        flags.append(f"--bnb_4bit_quant_type {options.bnb_4bit_quant_type}")
    return " ".join(flags)


def load_base(name: str, options: Any, auto_class: Any = AutoModelForCausalLM, **kwargs: Any) -> PreTrainedModel:
    """Load a model, by default a causal language model, quantized by bitsandbytes if the options say so.

    Args:
        name: folder or hub id.
        options: `QuantizationOptions`, or TRL's `ModelConfig`, which `check_quantization` has let pass.
        auto_class: class of transformers that loads it.
        kwargs: go to `from_pretrained`, `dtype` among them. 4 bit weights compute in it; "auto" is the checkpoint's.

    Raises:
        UserError: there is no such model, or it is of another kind.
    """
    check_place(name)
    if options.load_in_8bit:
        kwargs["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif options.load_in_4bit:
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=_compute_dtype(name, kwargs.get("dtype"), kwargs.get("revision")),
            bnb_4bit_quant_type=options.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=options.use_bnb_nested_quant,
            bnb_4bit_quant_storage=getattr(options, "bnb_4bit_quant_storage", None),
        )
    return load_model(name, auto_class, **kwargs)


def _compute_dtype(name: str, dtype: str | None, revision: str | None) -> torch.dtype:
    """The dtype that a model is loaded in, where "auto" leaves it to the checkpoint; of a LoRA adapter, to its base's."""
    if dtype not in (None, "auto"):
        named: torch.dtype = getattr(torch, dtype)
        return named
    try:
        lora = find_adapter_config_file(name, revision=revision)
        if lora is not None:
            name, revision = read_json(Path(lora))["base_model_name_or_path"], None
        stored: Any = AutoConfig.from_pretrained(name, revision=revision or "main").dtype
    except Exception as error:  # of a damaged folder it may be of any type
        raise UserError(f"cannot read the dtype of {name!r}: {one_line(error)}") from error
    return torch.float32 if stored is None else stored


def load_complete(name: str, may_lack_embeddings: bool, **kwargs: Any) -> PreTrainedModel:
    """Load a causal language model all of whose weights are there.

    Args:
        name: folder or hub id.
        may_lack_embeddings: whether its embeddings, and what is tied to them, may be missing.
        kwargs: passed to `from_pretrained`.

    Raises:
        UserError: there is no such model, it is no causal language model, or weights are missing.
    """
    with no_reports():
        loaded: Any = load_model(name, output_loading_info=True, **kwargs)
    model, info = loaded
    missing = set(info["missing_keys"])
    table, head = _names_of(model, model.get_input_embeddings()), _names_of(model, model.get_output_embeddings())
    if missing & table and missing <= table | head and not may_lack_embeddings:
        raise UserError(f"{name} was saved without embeddings; it is a shadow for its base: add --share_embeddings")
    lacking = missing - table - head if may_lack_embeddings else missing
    if lacking:
        raise UserError(f"{name} lacks weights of its model: {', '.join(sorted(lacking))}")
    return cast(PreTrainedModel, model)


def _names_of(model: PreTrainedModel, part: Any) -> set[str]:
    """The names that the weight of a part has in a model; two where it is tied."""
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is part.weight}


def load_shadow(name: str, base: PreTrainedModel, tokens: int, share_embeddings: bool, **kwargs: Any) -> PreTrainedModel:
    """Load a model from a folder or the hub as the shadow of a base; with the base's head it starts as the model itself.

    Args:
        name: folder or hub id.
        base: the base; a shadow of another width gets a projection that fits the two heads by least squares.
        tokens: number of tokens of the base's tokenizer.
        share_embeddings: remove its embedding table, so that it is fed the base's embeddings; it may lack one.
        kwargs: passed to `from_pretrained`.

    Raises:
        UserError: there is no such model, it is no causal language model, weights are missing, or its vocabulary is smaller.
    """
    shadow = load_complete(name, may_lack_embeddings=share_embeddings, **kwargs)
    known = shadow.get_input_embeddings().weight.shape[0]
    if known < tokens:
        raise UserError(
            f"cannot use {name!r} as the shadow: its vocabulary has {known} tokens, the base's tokenizer has {tokens}"
        )
    if share_embeddings or carried_projection(shadow) is not None:
        return prepare_shadow_model(shadow, remove_embed_tokens=share_embeddings)
    own, head = shadow.get_output_embeddings(), base.get_output_embeddings()
    if own.weight.shape[1] == head.weight.shape[1]:
        return prepare_shadow_model(shadow)
    projection = nn.Linear(own.weight.shape[1], head.weight.shape[1], bias=False)
    return AutoModelForCausalLMWithHiddenProjection.wrap(
        shadow_model=shadow, shadow_hidden_projection=projection, lm_head=head, reference_lm_head=own
    )


def load_tokenizer(*places: str | None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the first folder or hub repository that has one, else that of the last place.

    Raises:
        UserError: none has one.
    """
    named = [place for place in places if place]
    for place in named[:-1]:
        try:
            directory = local_directory(place, TOKENIZER_FILES)
        except (OSError, ValueError):  # what it is needed for besides will say so
            continue
        if (directory / "tokenizer_config.json").is_file():
            return _tokenizer(str(directory))
    return _tokenizer(named[-1])


def load_adapted(base: PreTrainedModel, adapter: str) -> ShadowForCausalLM:
    """The base with a saved adapter attached, in eval mode.

    Raises:
        UserError: the adapter does not fit the base or is no adapter.
    """
    try:
        model: ShadowForCausalLM = ShadowForCausalLM.from_pretrained(base, adapter)
    except Exception as error:  # of a damaged folder it may be of any type
        raise UserError(f"cannot attach the adapter {adapter!r}: {one_line(error)}") from error
    return model


def _tokenizer(place: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place)
    except Exception as error:  # of a damaged folder it may be of any type
        raise UserError(f"cannot load a tokenizer from {place!r}: {one_line(error)}") from error
    return tokenizer


def use_chat_template(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Give a tokenizer the chat template of a .jinja file, or of another tokenizer with its end of a turn.

    TRL's `clone_chat_template` adds the tokens that are missing and resizes the model. A frozen base cannot learn tokens,
    and an adapter belongs to a base of one size, so a template with tokens that the base does not know is refused.

    Args:
        tokenizer: the base's; changed in place.
        source: a file that ends in .jinja or .j2, or a folder or hub id with a tokenizer.

    Raises:
        UserError: there is no such file or template, or it needs other tokens.
    """
    if source.endswith((".jinja", ".j2")):
        try:
            tokenizer.chat_template = Path(source).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"--chat_template_path {source}: {one_line(error)}") from error
        return
    other = load_tokenizer(source)
    if other.chat_template is None:
        raise UserError(f"--chat_template_path {source}: that tokenizer has no chat template")
    template = other.get_chat_template()
    tokens = {token.content for token in other.added_tokens_decoder.values()}
    used = {token for token in tokens if token in template} | {str(other.eos_token)}
    missing = sorted(used - set(tokenizer.get_vocab()))
    if missing:
        raise UserError(
            f"--chat_template_path {source}: its template needs the tokens {', '.join(missing)}, which the base does not "
            "know and, being frozen, cannot learn; give the template as a .jinja file to write them as plain text"
        )
    tokenizer.chat_template = template
    tokenizer.eos_token = other.eos_token
