"""The text half of CLIP (Radford et al. 2021), under transformers' parameter names, at any width and depth.

`forward(input_ids (B, T) int64) -> (last_hidden_state (B, T, D), pooler_output (B, D))`. Causal attention, no padding
mask: tokens after the end are part of the context, as Stable Diffusion has it. `clip_skip` blocks before the last one are
left out of what each token gives, as in diffusers: the final norm follows whichever is the last. The two towers of Stable
Diffusion XL give the input of the last block instead, without the norm (Podell et al. 2023, section 2.1).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinydiff.models.layers import embedding
from tinydiff.networks.network import Table, pick
from tinydiff.networks.text import TextEncoder as Config

ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}


class Embeddings(nn.Module):
    """Token plus position: (B, T) -> (B, T, D).

    Both start as N(0, 1), the scale of what the blocks add. CLIP's 0.02 and 0.01 are drowned by the first block's output:
    a small tower then never learns the words that matter least at first, and the order of any.
    """

    def __init__(self, config: Config, vocab_size: int):
        super().__init__()
        self.token_embedding = embedding(vocab_size, config.hidden_size)
        self.position_embedding = embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class SelfAttention(nn.Module):
    """Causal multi-head self-attention: (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in projections)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, N, T, D/N)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two-layer perceptron: (B, T, D) -> (B, T, D)."""

    def __init__(self, config: Config):
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class EncoderLayer(nn.Module):
    """Pre-normalised transformer block."""

    def __init__(self, config: Config):
        super().__init__()
        self.self_attn = SelfAttention(config.hidden_size, config.num_attention_heads)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size)
        self.mlp = MLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """The stack of blocks."""

    def __init__(self, config: Config):
        super().__init__()
        self.layers = nn.ModuleList([EncoderLayer(config) for _ in range(config.num_hidden_layers)])

    def forward(self, x: Tensor) -> list[Tensor]:
        """What the first block is given, and what each one gives."""
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return states


class TextModel(nn.Module):
    """Embeddings, blocks, final norm."""

    def __init__(self, config: Config, vocab_size: int):
        super().__init__()
        self.embeddings = Embeddings(config, vocab_size)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size)

    def forward(self, ids: Tensor) -> list[Tensor]:
        """What the first block is given, and what each one gives; nothing is normalised."""
        return self.encoder(self.embeddings(ids))


class TextEncoder(nn.Module):
    """CLIP's text tower; `end` is the id whose first occurrence is pooled."""

    def __init__(self, config: Config, vocab_size: int, end: int, skip: int = 0):
        super().__init__()
        self.text_model = TextModel(config, vocab_size)
        self.end, self.skip = end, skip

    @classmethod
    def of(cls, table: Table, tensors: Mapping[str, Tensor] | None = None) -> TextEncoder:
        """The network of a `config.json`, whose `eos_token_id` must be that of the tokenizer."""
        return cls(pick(Config, table), table["vocab_size"], table["eos_token_id"], table.get("clip_skip", 0))

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        states = self.text_model(input_ids)
        last = self.text_model.final_layer_norm(states[-1])
        hidden = self.text_model.final_layer_norm(states[-1 - self.skip]) if self.skip else last
        return hidden, self.pooled(last, input_ids)

    def pooled(self, x: Tensor, ids: Tensor) -> Tensor:
        first = (ids == self.end).int().argmax(dim=-1)
        return x[torch.arange(x.shape[0], device=x.device), first]


class Tower(TextEncoder):
    """The first of Stable Diffusion XL: no vector of the whole text."""

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        return (self.text_model(input_ids)[-2 - self.skip],)


class ProjectedTower(TextEncoder):
    """The second, whose vector of the whole text is projected (Radford et al. 2021, figure 3)."""

    def __init__(self, config: Config, vocab_size: int, end: int, skip: int = 0, projection: int = 512):
        super().__init__(config, vocab_size, end, skip)
        self.text_projection = nn.Linear(config.hidden_size, projection, bias=False)

    @classmethod
    def of(cls, table: Table, tensors: Mapping[str, Tensor] | None = None) -> ProjectedTower:
        ids = table["eos_token_id"], table.get("clip_skip", 0)
        return cls(pick(Config, table), table["vocab_size"], *ids, table["projection_dim"])

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        states = self.text_model(input_ids)
        last = self.text_model.final_layer_norm(states[-1])
        return states[-2 - self.skip], self.text_projection(self.pooled(last, input_ids))
