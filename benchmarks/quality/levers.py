"""Experiments: one shadow whose every part can be swapped, to learn what moves the quality. Not the library's code.

    python -m benchmarks.quality.levers --task robot --lr 5e-3 --name gate readout=tanh rank=64

The name is free; options are those of `Options`. Writes to benchmarks/results/quality-levers/ and skips what is there.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from benchmarks.quality.methods import Contender
from benchmarks.quality.run import ROOT, quiet, run
from benchmarks.quality.tasks import TASKS
from benchmarks.quality.training import IGNORE, Settings
from shadow_peft import ShadowConfig, get_shadow_model
from shadow_peft.backbone import implicit

RESULTS = ROOT / "benchmarks/results/quality-levers"


@dataclass(frozen=True)
class Options:
    """What is swapped; the defaults are the published mathematics, started from the base's first layer, dropout 0."""

    layers: int = 1
    mlp: int = 0  # 0: the base's
    cut: str = "first"  # first, even, last, random, or layer indices "0-3"
    rank: int = 16
    gate: int = 10
    alpha: float = 0.1
    learn_alpha: bool = False
    start: int = 1
    dropout: float = 0.0
    readout: str = "none"  # none, tanh, sigmoid, vector
    readout_rank: int = 16
    readout_input: str = "h"  # h, hs
    readout_state: str = "s0"  # s0, last
    update: str = "published"  # published, none, residual
    gate_bias: float = 0.0
    inject: str = "tied"  # tied, untied, norm, silu, glu
    normed: bool = False
    final_rank: int = 0
    share: bool = False  # one D for all layers
    weight: float = 0.05
    distill: float = 0.0
    backbone_rate: float = 1.0
    lora: int = 0
    down_std: float = 0.02
    transient: float = 0.0  # share of the injection that is taken back after the layer
    learn_transient: str = "none"  # none, scalar, vector
    lora_targets: str = "all-linear"
    out_rank: int = 0  # a low-rank change of what a layer adds to the stream
    out_alpha: float = 1.0
    stop: bool = False  # the base's loss does not reach the backbone
    heads: int = 0  # attention heads and KV heads of the backbone; 0: the base's
    kv: int = 0
    final_std: float = 1.0  # of the down map of the linear read-out, times 1 / sqrt(d)


class Low(nn.Module):
    """A low-rank map, zero at the start."""

    def __init__(self, d_in: int, d_out: int, rank: int, bias: float | None = None) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(d_in, rank).normal_(std=d_in**-0.5))
        self.up = nn.Parameter(torch.zeros(rank, d_out))
        self.bias = None if bias is None else nn.Parameter(torch.full((d_out,), bias))

    def forward(self, x: Tensor) -> Tensor:
        """x @ down @ up + bias."""
        y = x @ self.down @ self.up
        return y if self.bias is None else y + self.bias


class Update(nn.Module):
    """The published update of one layer, with a bias in the gate."""

    def __init__(self, d: int, k: int, kind: str, bias: float) -> None:
        super().__init__()
        self.kind = kind
        self.down = nn.Linear(d, k if kind == "residual" else 2 * k, bias=False)
        self.transform = nn.Linear(k, d, bias=False)
        if kind == "residual":
            nn.init.zeros_(self.transform.weight)
        else:
            self.gate = nn.Linear(k, d, bias=bool(bias))
            if bias:
                nn.init.constant_(self.gate.bias, bias)

    def forward(self, n: Tensor, s: Tensor) -> Tensor:
        """The next state."""
        if self.kind == "residual":
            return s + self.transform(F.silu(self.down(n)))
        g, t = F.silu(self.down(n)).chunk(2, -1)
        return torch.lerp(s, self.transform(t), torch.sigmoid(self.gate(g)))


class Shadowed(nn.Module):
    """A base with an experimental shadow."""

    def __init__(self, base: PreTrainedModel, o: Options) -> None:
        super().__init__()
        self.o, d = o, base.config.hidden_size
        self.backbone = make_backbone(base, o)
        if o.lora:
            from peft import LoraConfig, inject_adapter_in_model

            targets = "all-linear" if o.lora_targets == "all-linear" else o.lora_targets.split(",")
            base = inject_adapter_in_model(
                LoraConfig(r=o.lora, lora_alpha=2 * o.lora, target_modules=targets, task_type="CAUSAL_LM"), base
            )
        self.base = base
        layers = base.model.layers[o.start :]
        n, inputs = len(layers), 2 if o.inject in ("untied", "glu") else 1
        count = 1 if o.share else n
        self.downs = nn.ParameterList(
            [nn.Parameter(torch.empty(inputs * d, o.rank).normal_(std=o.down_std)) for _ in range(count)]
        )
        wide = o.rank // 2 if o.inject == "glu" else o.rank
        self.ups = nn.ParameterList([nn.Parameter(torch.zeros(wide, d)) for _ in range(n)])
        self.alphas = nn.Parameter(torch.full((n,), o.alpha), requires_grad=o.learn_alpha)
        if o.learn_transient != "none":
            self.taken = nn.Parameter(torch.full((n, d if o.learn_transient == "vector" else 1), o.transient))
        self.norm = nn.LayerNorm(d) if o.update != "none" else None
        self.h_norm = nn.ModuleList([nn.RMSNorm(d) for _ in range(n)]) if o.inject in ("norm", "silu") or o.normed else None
        self.updates = nn.ModuleList(
            [Update(d, o.gate, o.update, o.gate_bias) for _ in range(n - 1)] if o.update != "none" else []
        )
        if o.readout == "vector":
            self.readout_gate: Any = nn.Parameter(torch.zeros(d))
        elif o.readout != "none":
            bias = -1.0 if o.readout == "sigmoid" else 0.0
            self.readout_gate = Low(d * len(o.readout_input), d, o.readout_rank, bias)
        if o.final_rank:
            self.final = Low(d, d, o.final_rank)
            self.final.down.data.mul_(o.final_std)
        if o.out_rank:
            self.outs = nn.ModuleList([Low(d, d, o.out_rank) for _ in range(n)])
        if o.readout_state == "last":
            self.out_norm = nn.LayerNorm(d)
        for i, layer in enumerate(layers):
            layer.register_forward_pre_hook(lambda m, a, k, i=i: self.before(i, a, k), with_kwargs=True)
            if i < n - 1 or o.transient or o.out_rank:
                layer.register_forward_hook(lambda m, a, out, i=i: self.after(i, out))

    def before(self, i: int, args: Any, kwargs: Any) -> Any:
        """Inject."""
        return (self.inject(i, args[0], self.s), *args[1:]), kwargs

    def inject(self, i: int, h: Tensor, s: Tensor) -> Tensor:
        """h corrected."""
        o, down = self.o, self.downs[0 if self.o.share else i]
        if o.inject == "tied":
            z = (h - s) @ down
        elif o.inject == "untied":
            d_h, d_s = down.chunk(2, 0)
            z = (self.h_norm[i](h) if self.h_norm else h) @ d_h + s @ d_s
        elif o.inject == "honly":
            z = h @ down
        elif o.inject == "norm":
            z = (self.h_norm[i](h) - s) @ down
        elif o.inject == "silu":
            z = F.silu((self.h_norm[i](h) - s) @ down)
        elif o.inject == "siluraw":
            z = F.silu((h - s) @ down)
        elif o.inject == "glu":
            d_h, d_s = down.chunk(2, 0)
            a, b = (h @ d_h + s @ d_s).chunk(2, -1)
            z = F.silu(a) * b
        else:
            raise ValueError(o.inject)
        z = F.dropout(z, o.dropout, self.training)
        self.delta = self.alphas[i] * (z @ self.ups[i])
        self.read = h + self.delta
        return self.read

    def after(self, i: int, out: Tensor) -> Tensor:
        """Take back, update."""
        if self.o.out_rank:
            out = out + self.o.out_alpha * self.outs[i](out - self.read)
        if self.o.transient:
            out = out - (self.o.transient if self.o.learn_transient == "none" else self.taken[i]) * self.delta
        if self.o.update != "none" and i < len(self.updates):
            self.s = self.updates[i](self.norm(out), self.s)
        return out

    def states(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Final states of base and shadow, before the head."""
        o = self.o
        s0 = self.backbone(inputs_embeds=self.base.model.embed_tokens(input_ids), attention_mask=attention_mask)[0]
        own = s0
        s0 = s0.detach() if o.stop else s0
        self.s = s0
        h = self.base.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]
        if o.readout == "none":
            return h, own
        ride = s0 if o.readout_state == "s0" else self.out_norm(self.s)
        if o.readout == "vector":
            g = torch.tanh(self.readout_gate)
        else:
            z = self.readout_gate(
                torch.cat([h, s0], -1) if o.readout_input == "hs" else (s0 if o.readout_input == "s" else h)
            )
            g = torch.tanh(z) if o.readout == "tanh" else torch.sigmoid(z)
        out = torch.lerp(h, ride, g)
        return (out + self.final(h - s0) if o.final_rank else out), own

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> CausalLMOutput:
        """Loss over the labels at hand, or all logits."""
        h, s0 = self.states(input_ids, attention_mask)
        head = self.base.lm_head
        if labels is None:
            return CausalLMOutput(logits=(head(h), head(s0)))
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
        here = targets.ne(IGNORE)
        logits, shadow_logits, targets = head(h[here]), head(s0[here]), targets[here]
        loss = F.cross_entropy(logits, targets) + self.o.weight * F.cross_entropy(shadow_logits, targets)
        if self.o.distill:
            teacher = logits.detach().log_softmax(-1)
            loss = loss + self.o.distill * F.kl_div(
                shadow_logits.log_softmax(-1), teacher, log_target=True, reduction="batchmean"
            )
        return CausalLMOutput(loss=loss)


def make_backbone(base: PreTrainedModel, o: Options) -> nn.Module:
    """The implicit shadow, from the layers that are told."""
    depth = base.config.num_hidden_layers
    ids = {"first": range(o.layers), "last": range(depth - o.layers, depth)}.get(o.cut)
    if o.cut == "even":
        ids = [round(i * (depth - 1) / max(1, o.layers - 1)) for i in range(o.layers)]
    if ids is None and o.cut != "random":
        ids = [int(i) for i in o.cut.split("-")]
    config = ShadowConfig(
        num_shadow_layers=o.layers,
        shadow_intermediate_size=o.mlp or None,
        shadow_num_attention_heads=o.heads or None,
        shadow_num_key_value_heads=o.kv or None,
        shadow_init="random" if o.cut == "random" else "base",
    )
    with mock.patch.object(implicit, "selected_layers", return_value=list(ids or [])):
        return get_shadow_model(base, config).shadow_model


def contender(base: PreTrainedModel, o: Options, seed: int) -> Contender:
    """The experiment as a contender."""
    torch.manual_seed(seed)
    model = Shadowed(base, o)
    return Contender(model, lambda inputs: model(**inputs).logits, model.backbone, o.backbone_rate)


def parsed(words: list[str]) -> Options:
    """Options from words like rank=64."""
    kinds = {f.name: f.type for f in fields(Options)}
    made: dict[str, Any] = {}
    for word in words:
        name, _, value = word.partition("=")
        made[name] = {"int": int, "float": float, "str": str, "bool": lambda v: v == "1"}[str(kinds[name])](value)
    return Options(**made)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", required=True)
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--full", action="store_true", help="Score test and forgetting too.")
    parser.add_argument("options", nargs="*")
    asked = parser.parse_args()
    path = asked.out / f"{asked.name}--{asked.task}--s{asked.seed}--lr{asked.lr:g}.json"
    if path.exists():
        return
    quiet()
    o = parsed(asked.options)
    make = lambda b: contender(b, o, asked.seed)  # noqa: E731
    result = run(asked.task, asked.seed, asked.lr, make, Settings(steps=asked.steps), dev_only=not asked.full)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"name": asked.name, "options": asdict(o), **result}, indent=1) + "\n", encoding="utf-8")
    show = {k: round(v, 3) for k, v in (result["dev"] | {f"test_{k}": v for k, v in result.get("test", {}).items()}).items()}
    print("RESULT", path.stem, json.dumps(show), f"{result['trainable']:,} {result['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
