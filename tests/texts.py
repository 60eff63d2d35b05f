"""Texts that tokenizers disagree on, and what padding may do to a text encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

EXAMPLES = [
    "",
    " \t\r\n\x0b\x0c\x1c\x85\u2028\u3000",
    "A  Red\u00a0CIRCLE",
    "cafe\u0301 CAFÉ \u1e9e İSTANBUL ΣΊΣΥΦΟΣ ﬁ Ⅷ ²",
    "\x00\x07\x7f\u200b\ufeff\u202e",
    "it's we'VE 'RE don'T 's's",
    "1234567 ١٢٣ 一二三",
    "👩‍👩‍👧 🏳️‍🌈 🟥",
    "a <|startoftext|> b<|endoftext|>c <|ENDOFTEXT|>",
    "red</w> (red:1.3) ![]#@",
    "x" * 5000,
    "a red circle " * 500,
]


def unpadded(model: nn.Module, ids: Tensor, pad: int) -> Tensor:
    """Padding changes nothing of ids (2, 9), and of nothing else it is finite and zero: what is pooled of the ids."""
    padded = torch.cat([ids, torch.full((2, 40), pad)], 1)
    (states, pooled), (more, again) = model(ids), model(padded)
    torch.testing.assert_close(more[:, :9], states, rtol=0, atol=1e-5)
    torch.testing.assert_close(again, pooled, rtol=0, atol=1e-5)
    nothing, zero = model(padded[:, 9:])
    assert nothing.isfinite().all() and not zero.any()
    return pooled
