"""A reader of protobuf's wire format, for the few messages that are read without a generated parser.

It yields where each field's bytes lie and copies none, so a memory map of a large file is read at its headers only. What
a field number means is known to the caller.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Any

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types; BYTES has its length in front: bytes, text, a message
SIZES = {FIXED64: 8, FIXED32: 4}


def fields(data: bytes | mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Every field of the message data[at:end]: number, wire type, and from where to where its value is.

    A reader ignores a field of another wire type than it expects, as protobuf does. Raises ValueError or IndexError where
    the bytes are damaged or cut short.
    """
    while at < end:
        tag, at = (data[at], at + 1) if data[at] < 128 else varint(data, at)
        wire = tag & 7
        if wire == BYTES:
            size, at = (data[at], at + 1) if data[at] < 128 else varint(data, at)
            stop = at + size
        elif wire == VARINT:
            stop = at + 1 if data[at] < 128 else varint(data, at)[1]
        else:
            stop = at + SIZES.get(wire, end)
        if stop > end:
            raise ValueError("a protobuf field is cut short")
        yield tag >> 3, wire, at, stop
        at = stop


def varint(data: bytes | mmap.mmap, at: int) -> tuple[int, int]:
    """The base-128 number at `at`, lowest seven bits first, and where it ends. Raises ValueError beyond ten bytes."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        value, at = value | (byte & 127) << shift, at + 1
        if byte < 128:
            return value, at
    raise ValueError("a protobuf number is longer than 64 bits")


def varints(data: bytes | mmap.mmap, at: int, end: int) -> Iterator[int]:
    """The numbers that fill data[at:end]: a packed repeated field, or the value of one VARINT field."""
    while at < end:
        value, at = varint(data, at)
        yield value


def values(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of every field of a small message: an int for a VARINT, else its bytes. Raises as `fields`."""
    for number, wire, at, stop in fields(data, 0, len(data)):
        yield number, varint(data, at)[0] if wire == VARINT else data[at:stop]
