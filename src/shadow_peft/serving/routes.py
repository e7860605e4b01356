"""The models that a request may name, and what answers for them."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastapi import HTTPException
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cli.serving.model_manager import ModelManager

from shadow_peft.cascade.cascade import ShadowCascade
from shadow_peft.cascade.remote import RemoteModel
from shadow_peft.cascade.storage import FILE, find_calibration
from shadow_peft.multi_adapter.mixed import BASE
from shadow_peft.multi_adapter.pool import AdapterPool
from shadow_peft.tasks.base import ShadowTaskModel
from shadow_peft.tasks.causal_lm import ShadowForCausalLM

Answering = Literal["attached", "shadow", "cascade"]


@dataclass(frozen=True)
class Route:
    """What a name stands for.

    Attributes:
        name: as a request names it.
        adapter: the adapter, or "__base__".
        answering: the adapted base, the shadow alone, or the cascade of both.
    """

    name: str
    adapter: str
    answering: Answering = "attached"


class ServedModels(ModelManager):
    """One base with its adapters, as the handlers of transformers see it; it loads nothing on request.

    Args:
        model: with all adapters, or with the first one where a pool loads the others; or an exported shadow; in eval mode.
        tokenizer: with a chat template, if chats are to be answered.
        adapters: names of all adapters.
        base_name: the name of the bare base, or of the exported shadow.
        pool: loads adapters that are asked for.
        room: the most adapters of the pool in one batch; None is any number.
        cascades: adapter, or the name of an exported shadow -> its cascade.

    Raises:
        ValueError: the model is in training mode, or two routes have one name.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        adapters: Sequence[str],
        *,
        base_name: str = "base",
        pool: AdapterPool | None = None,
        room: int | None = None,
        cascades: Mapping[str, ShadowCascade] | None = None,
    ) -> None:
        super().__init__(device="cpu", dtype="auto")
        if model.training:
            raise ValueError("The model is in training mode, so dropout would change its answers; call model.eval() first.")
        if base_name in adapters:
            raise ValueError(f"{base_name!r} is the name of the base and of an adapter; give the base another.")
        self.tokenizer, self._pool, self.cascades = tokenizer, pool, dict(cascades or {})
        self.model, self.room = model, room
        self.attached, self.shadow = (_view(model, mode) for mode in ("base_shadow", "shadow_only"))
        self.created = int(time.time())
        routes = [Route(base_name, BASE)]
        if base_name in self.cascades:
            routes.append(Route(f"{base_name}:cascade", base_name, "cascade"))
        for name in adapters:
            routes += [Route(name, name), Route(f"{name}:shadow", name, "shadow")]
            if name in self.cascades:
                routes.append(Route(f"{name}:cascade", name, "cascade"))
        self.routes = {route.name: route for route in routes}
        if len(self.routes) < len(routes):
            names = [route.name for route in routes]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{twice!r} is the name of two routes; rename the adapter, or the base.")

    def route(self, name: Any) -> Route:
        """The route of a name.

        Raises:
            HTTPException: 400 for no name, 404 for an unknown one.
        """
        if not isinstance(name, str):
            raise HTTPException(400, "model must be the name of a model, see /v1/models.")
        if name not in self.routes:
            raise HTTPException(404, f"There is no model {name[:100]!r} here, see /v1/models.")
        return self.routes[name]

    def asks_remote(self, route: Route) -> bool:
        """Whether a route may ask another server."""
        return route.answering == "cascade" and self.cascades[route.adapter].remote is not None

    def takes_room(self, route: Route) -> bool:
        """Whether the adapter of a route is one that a pool loads."""
        if self._pool is None or route.answering == "cascade":
            return False
        return route.adapter not in (BASE, self.model.active_adapter)

    def use(self, adapters: Sequence[str]) -> AbstractContextManager[Any]:
        """Inside the context, these adapters are in memory."""
        return nullcontext() if self._pool is None else self._pool.use(adapters)

    # ---------------------------------------------------------------- what transformers asks

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """The name as it is: there are no revisions."""
        return model_id

    def load_model_and_processor(self, model_id_and_revision: str, *_: Any, **__: Any) -> tuple[PreTrainedModel, Any]:
        """The model and its tokenizer; nothing is loaded.

        Raises:
            HTTPException: there is no such model.
        """
        self.route(model_id_and_revision)
        return self.model, self.tokenizer

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """The entries of /v1/models."""
        return [{"id": n, "object": "model", "created": self.created, "owned_by": "shadow-peft"} for n in self.routes]


def load_served(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapters: Mapping[str, str | Path],
    *,
    base_name: str = "base",
    capacity: int | None = None,
    remote: RemoteModel | None = None,
) -> ServedModels:
    """Attach stored adapters to a base; those with a `cascade.json` get a cascade.

    Args:
        base: in eval mode.
        tokenizer: of the base.
        adapters: name -> folder or hub repository, at least one.
        base_name: the name of the bare base.
        capacity: the most adapters in memory, the first one included, which stays; None loads all. Cascades hold adapters
            of their own.
        remote: whom the cascades ask instead of their adapted base.

    Raises:
        ValueError: no adapter, an adapter that does not fit, a malformed name, or a calibration of another shadow.
    """
    if not adapters:
        raise ValueError("There is no adapter to serve.")
    first, *others = adapters
    model = ShadowForCausalLM.from_pretrained(base, adapters[first], adapter_name=first).eval()
    pool = room = None
    if capacity is not None and capacity < len(adapters):
        room = capacity - 1
        pool = AdapterPool(model, {name: adapters[name] for name in others}, room)
        for name in others:  # one that cannot be loaded is found now and not by a request
            with pool.use([name]):
                pass
    else:
        for name in others:
            model.load_adapter(adapters[name], name)
    cascades = {}
    for name, path in adapters.items():
        calibration = find_calibration(path)
        if calibration is not None:
            own = ShadowForCausalLM.from_pretrained(base, path).eval()
            cascades[name] = ShadowCascade(own, tokenizer, remote=remote, calibration=calibration)
    return ServedModels(
        model.eval(), tokenizer, list(adapters), base_name=base_name, pool=pool, room=room, cascades=cascades
    )


def load_served_shadow(
    shadow: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    remote: RemoteModel,
    *,
    name: str = "base",
) -> ServedModels:
    """An exported shadow without its base, and its cascade with a remote model.

    Args:
        shadow: in eval mode.
        tokenizer: of it.
        path: the folder or hub repository that has its `cascade.json`.
        remote: whom the cascade asks.
        name: of the shadow.

    Raises:
        ValueError: there is no calibration, or one of another shadow.
    """
    calibration = find_calibration(path)
    if calibration is None:
        raise ValueError(f"There is no {FILE} in {path}: calibrate a cascade, and write it there.")
    cascade = ShadowCascade(shadow, tokenizer, remote=remote, calibration=calibration)
    return ServedModels(shadow, tokenizer, [], base_name=name, cascades={name: cascade})


def context_of(model: PreTrainedModel) -> int:
    """The most tokens that a model reads, prompt and answer together; a number beyond all where nothing names one."""
    named = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min([named or sys.maxsize, *position_tables(model)])


def position_tables(model: PreTrainedModel) -> list[int]:
    """Sizes of the tables in which base and shadows look positions up; rotary positions can be computed anywhere."""
    parts = [model]
    if isinstance(model, ShadowTaskModel):
        adapters = model.peft_model, *list(model.peft_model.other_adapters.values())  # other threads may load and remove
        parts += [adapter.shadow_model for adapter in adapters]
    configs = [part.config.get_text_config() for part in parts]
    sizes = [getattr(config, "max_position_embeddings", None) for config in configs if not _is_rotary(config)]
    return [size for size in sizes if size]


def _is_rotary(config: Any) -> bool:
    return getattr(config, "rope_parameters", None) is not None


def _view(model: PreTrainedModel, mode: Any) -> Any:
    """A model of the same parts in a mode of its own, whose generation config says nothing: requests bring theirs."""
    view = type(model)(model.peft_model, inference_mode=mode) if isinstance(model, ShadowTaskModel) else copy.copy(model)
    view.generation_config = GenerationConfig()
    return view


def defaults_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """The generation config of a model with a token to pad with and one that ends an answer, where there is one."""
    config: GenerationConfig = copy.deepcopy(model.generation_config)
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    if config.pad_token_id is None:
        config.pad_token_id = next(filter(None.__ne__, (tokenizer.pad_token_id, tokenizer.eos_token_id)), 0)
    return config
