"""Random bases in the shapes of Qwen3 0.6B, 4B and 8B, and the sizes at which every contender trains as much beside them.

What is trained is what `readout` has with one layer whose MLP is a sixth of the base's, and ranks of 64 and 32: 2.2 % of the
smallest base, 0.6 % of the largest one. Every other size follows from that count, to within one rank;
0.1.1 has one update more, which it does not use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

INJECTION, OUTPUT, GATE, READOUT_GATE, READOUT = 64, 32, 16, 16, 32


@dataclass(frozen=True)
class Shape:
    """A decoder of the Qwen3 family."""

    layers: int
    width: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int = 128
    vocabulary: int = 151_936
    tied: bool = True

    @property
    def attention(self) -> int:
        """Weights of one layer's attention."""
        return self.width * self.head_dim * 2 * (self.heads + self.kv_heads)

    @property
    def backbone(self) -> dict[str, int]:
        """The shadow's one layer."""
        return {"shadow_intermediate_size": self.mlp // 6}

    @property
    def budget(self) -> int:
        """What `readout` trains."""
        low_rank = 2 * self.width * (self.layers - 1) * (INJECTION + OUTPUT)
        return self._backbone_size + low_rank + self.width * (2 * READOUT_GATE + 2 * READOUT)

    @property
    def _backbone_size(self) -> int:
        return self.attention + 3 * self.width * (self.mlp // 6)

    def readout(self) -> dict[str, Any]:
        """Options of our variant `readout`."""
        return {**self.backbone, "variant": "readout", "injection_hidden_size": INJECTION, "output_hidden_size": OUTPUT}

    def published(self) -> dict[str, Any]:
        """Options of 0.1.1, and of our variant `published`."""
        left = self.budget - self._backbone_size - GATE * 4 * self.width * (self.layers - 2)
        rank = round(left / (2 * self.width * (self.layers - 1)))
        return {**self.backbone, "injection_hidden_size": rank, "gate_hidden_size": GATE, "dropout": 0.0}

    def tuner(self) -> dict[str, Any]:
        """Options of peft's Shadow."""
        left = self.budget - self._backbone_size - GATE * 4 * self.width * self.layers
        rank = round(left / (2 * self.width * self.layers))
        return {"r": rank, "update_hidden_size": GATE, "shadow_num_hidden_layers": 1, "shadow_dropout": 0.0, **self.backbone}

    def lora(self, dora: bool = False) -> dict[str, Any]:
        """Options of LoRA or DoRA on every linear layer but the head."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        outputs = queries + 2 * keys + self.width + 2 * self.mlp + self.width
        inputs = 3 * self.width + queries + 2 * self.width + self.mlp
        magnitudes = self.layers * outputs if dora else 0
        rank = round((self.budget - magnitudes) / (self.layers * (inputs + outputs)))
        return {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear", "use_dora": dora}

    def random_base(self, device: str, dtype: str) -> Any:
        """A base with random weights that never ends a text, made on its device."""
        from transformers import Qwen3Config, Qwen3ForCausalLM

        config = Qwen3Config(
            vocab_size=self.vocabulary, hidden_size=self.width, intermediate_size=self.mlp, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.kv_heads, head_dim=self.head_dim,
            tie_word_embeddings=self.tied, eos_token_id=None, bos_token_id=None, pad_token_id=0,
            max_position_embeddings=4096, use_cache=True,
        )  # fmt: skip
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, dtype))
        try:
            with torch.device(device):
                return Qwen3ForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(before)


SHAPES = {
    "qwen3-0.6b": Shape(28, 1024, 3072, 16, 8),
    "qwen3-4b": Shape(36, 2560, 9728, 32, 8),
    "qwen3-8b": Shape(36, 4096, 12288, 32, 8, tied=False),
    "toy": Shape(4, 64, 192, 4, 2, head_dim=16, vocabulary=512),
}
