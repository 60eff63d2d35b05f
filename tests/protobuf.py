"""Protobuf messages written by hand: what no library would write can be given to a reader."""

from __future__ import annotations

import struct


def varint(value: int) -> bytes:
    return bytes([value & 127 | 128]) + varint(value >> 7) if value > 127 else bytes([value])


def field(number: int, value: int | float | bytes) -> bytes:
    if isinstance(value, bytes):
        return varint(number * 8 + 2) + varint(len(value)) + value
    return (
        varint(number * 8 + 5) + struct.pack("<f", value)
        if isinstance(value, float)
        else varint(number * 8) + varint(value)
    )
