"""The reader of protobuf against the definition and against onnx's own parser."""

from __future__ import annotations

import contextlib
import struct

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinydiff.protobuf import BYTES, FIXED32, FIXED64, VARINT, fields, values, varint, varints

INT64 = st.integers(-(2**63), 2**63 - 1)


def encoded(value: int) -> bytes:
    """Groups of seven bits, the lowest first; all but the last have the high bit."""
    groups = [value >> shift & 127 for shift in range(0, max(1, value.bit_length()), 7)]
    return bytes([group | 128 for group in groups[:-1]] + groups[-1:])


def signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


@given(st.integers(0, 2**64 - 1))
def test_varints_against_the_definition(value: int) -> None:
    data = encoded(value)
    assert varint(data + b"\x99", 0) == (value, len(data))
    assert list(fields(b"\x08" + data, 0, len(data) + 1)) == [(1, VARINT, 1, len(data) + 1)]


@given(st.lists(INT64), st.text(), st.binary(), st.floats(width=32, allow_nan=False), INT64)
def test_fields_are_those_that_onnx_writes(dims: list[int], name: str, raw: bytes, f: float, i: int) -> None:
    tensor = onnx.TensorProto(dims=dims, data_type=1, name=name, raw_data=raw)
    data = tensor.SerializeToString()
    known = {number: value for number, value in values(data) if number != 1}
    assert known == {2: 1, 8: name.encode(), 9: raw}
    found = [n for number, _, at, stop in fields(data, 0, len(data)) if number == 1 for n in varints(data, at, stop)]
    assert list(map(signed, found)) == dims
    attribute = dict(values(onnx.AttributeProto(f=f, i=i, t=tensor).SerializeToString()))
    assert (struct.unpack("<f", attribute[2])[0], signed(attribute[3]), attribute[5]) == (f, i, data)


def test_values_of_fixed_size_are_their_bytes() -> None:
    data = bytes([9 << 3 | FIXED64]) + b"12345678" + bytes([1 << 3 | FIXED32]) + b"abcd"
    assert list(values(data)) == [(9, b"12345678"), (1, b"abcd")]
    assert [field[:2] for field in fields(data, 0, len(data))] == [(9, FIXED64), (1, FIXED32)]


@pytest.mark.parametrize(
    "data",
    [
        bytes([1 << 3 | BYTES, 5]) + b"four",
        bytes([1 << 3 | BYTES]) + b"\xff" * 9 + b"\x01",
        bytes([1 << 3 | BYTES]),
        b"\x08",
        b"\x08\xff",
        b"\xff" * 99,
        bytes([1 << 3 | FIXED64]) + b"1234567",
        bytes([1 << 3 | FIXED32]) + b"123",
        b"\x0b\x0c",  # a group, which proto3 does not have
        b"\x0e\x0f",
    ],
)
def test_damaged_bytes_are_refused(data: bytes) -> None:
    with pytest.raises((ValueError, IndexError)):
        list(fields(data, 0, len(data)))


def test_a_field_may_not_leave_its_message() -> None:
    inner = bytes([1 << 3 | BYTES, 3]) + b"abc"
    with pytest.raises(ValueError, match="cut short"):
        list(fields(inner, 0, len(inner) - 1))
    with pytest.raises(ValueError, match="cut short"):
        list(fields(b"\x08\x80\x01", 0, 2))


@given(st.binary(max_size=80))
def test_any_bytes_end_in_fields_that_lie_in_them(data: bytes) -> None:
    with contextlib.suppress(ValueError, IndexError):
        last = 0
        for _, _, at, stop in fields(data, 0, len(data)):
            assert last < at <= stop <= len(data)
            last = stop
