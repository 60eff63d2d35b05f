"""Texts that tokenizers disagree on."""

from __future__ import annotations

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
