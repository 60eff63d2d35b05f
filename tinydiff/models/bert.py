"""BERT's encoder (Devlin et al. 2019) as sentence encoders have it, under transformers' parameter names, at any size.

`forward(input_ids (B, T) int64) -> (last_hidden_state (B, T, D), pooled (B, D))`. Every token attends to all tokens but
padding; there is one segment. Knows no files.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinydiff.models.layers import embedding
from tinydiff.networks.network import Table, pick
from tinydiff.networks.text import BertConfig


class Embeddings(nn.Module):
    """Token, position and the first segment, normalised: (B, T) -> (B, T, D)."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.word_embeddings = embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.word_embeddings(ids) + self.position_embeddings.weight[: ids.shape[1]]
        return self.LayerNorm(x + self.token_type_embeddings.weight[0])


class SelfAttention(nn.Module):
    """Multi-head attention (B, T, D) -> (B, T, D) with `bias` (B, 1, T, T) on its scores."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        self.query, self.key, self.value = (nn.Linear(config.hidden_size, config.hidden_size) for _ in range(3))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        projections = self.query, self.key, self.value
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in projections)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # (B, N, T, D/N)
        return y.transpose(1, 2).flatten(2)


class Output(nn.Module):
    """A linear layer whose output is added to what the block was given, then normalised: (B, T, I) -> (B, T, D)."""

    def __init__(self, config: BertConfig, width: int):
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + given)


class Layer(nn.Module):
    """A post-normalised transformer block: (B, T, D) -> (B, T, D)."""

    def __init__(self, config: BertConfig):
        super().__init__()
        attention = {"self": SelfAttention(config), "output": Output(config, config.hidden_size)}
        self.attention = nn.ModuleDict(attention)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.intermediate_size)})
        self.output = Output(config, config.intermediate_size)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = self.attention["output"](self.attention["self"](x, bias), x)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class Encoder(nn.Module):
    """The stack of blocks: x (B, T, D) and which keys count (B, T) -> (B, T, D)."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.layer = nn.ModuleList([Layer(config) for _ in range(config.num_hidden_layers)])

    def forward(self, x: Tensor, keys: Tensor) -> Tensor:
        lowest = x.new_tensor(torch.finfo(x.dtype).min)
        bias = torch.where(keys[:, None, None], x.new_zeros(()), lowest)  # (B, 1, 1, T)
        bias = bias.expand(-1, -1, x.shape[1], -1)  # (B, 1, T, T), as onnxruntime wants it
        for block in self.layer:
            x = block(x, bias)
        return x


class BertEncoder(nn.Module):
    """Tokens to vectors; `pooled` is the mean of all but padding, of norm 1 (Reimers & Gurevych 2019, section 3)."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config, self.pad = config, config.pad_token_id
        self.embeddings, self.encoder = Embeddings(config), Encoder(config)

    @classmethod
    def of(cls, table: Table, tensors: Mapping[str, Tensor] | None = None) -> BertEncoder:
        """The network of a `config.json`."""
        return cls(pick(BertConfig, table))

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        keys = input_ids != self.pad
        x, share = self.encoder(self.embeddings(input_ids), keys), keys[..., None].float()
        return x, F.normalize((x * share).sum(1) / share.sum(1).clamp(min=1), dim=-1)
