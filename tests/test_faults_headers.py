"""Safetensors headers that are wrong on purpose: refused at once, without the memory they claim."""

from __future__ import annotations

import gc
import json
import re
import struct
import time
import tracemalloc

import pytest

from tinydiff.checkpoints import weights
from tinydiff.checkpoints.header import MAX_COMMAS, MAX_HEADER, header
from tinydiff.errors import ModelError


def safetensors(table: object, data: bytes = b"", size: int | None = None) -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def entry(start: int, end: int, shape: list | None = None, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


HOSTILE = {
    "claims 2^63": lambda: safetensors({}, size=2**63),
    "claims 2^64 - 1": lambda: safetensors({}, size=2**64 - 1),
    "claims more than there is": lambda: safetensors({}, size=3),
    "100,000 tensors": lambda: safetensors({f"t{i}": entry(4 * i, 4 * i + 4) for i in range(100_000)}, bytes(400_000)),
    "overlap": lambda: safetensors({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
    "the same bytes twice": lambda: safetensors({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8)),
    "a hole": lambda: safetensors({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)),
    "a hole before": lambda: safetensors({"a": entry(4, 8)}, bytes(8)),
    "bytes behind": lambda: safetensors({"a": entry(0, 8)}, bytes(9)),
    "too few bytes": lambda: safetensors({"a": entry(0, 8)}, bytes(7)),
    "a name twice": lambda: safetensors(b'{"a":%s,"a":%s}' % ((json.dumps(entry(0, 8)).encode(),) * 2), bytes(8)),
    "a key twice": lambda: safetensors(b'{"a":{"dtype":"F32","shape":[2],"shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "negative offset": lambda: safetensors({"a": entry(-4, 4)}, bytes(4)),
    "negative shape": lambda: safetensors({"a": entry(0, 8, [-1, -2])}, bytes(8)),
    "negative size": lambda: safetensors({"a": entry(0, 8), "b": entry(8, 4, [0], "U8")}, bytes(8)),
    "huge shape": lambda: safetensors({"a": entry(0, 0, [2**62] * 60)}),
    "many axes": lambda: safetensors({"a": entry(0, 4, [1] * 100_000)}, bytes(4)),
    "shape beyond 64 bits": lambda: safetensors({"a": entry(0, 4, [2**70])}, bytes(4)),
    "shape of another size": lambda: safetensors({"a": entry(0, 8, [3])}, bytes(8)),
    "fractions": lambda: safetensors({"a": entry(0, 4, [1.0])}, bytes(4)),
    "truth for a number": lambda: safetensors({"a": entry(0, 4, [True])}, bytes(4)),
    "no table": lambda: safetensors([1]),
    "no entry": lambda: safetensors({"a": None}),
    "metadata that are none": lambda: safetensors({"__metadata__": [1]}),
    "deep": lambda: safetensors(b'{"a":' + b"[" * (MAX_HEADER - 100)),
    "wide": lambda: safetensors(b'{"a":[' + b"{}," * (MAX_HEADER // 3 - 10) + b"{}]}"),
    "many tables": lambda: safetensors(
        b'{"a":{' + b",".join(b'"%d":{"a":[]}' % i for i in range(MAX_COMMAS - 10)) + b"}}"
    ),
    "too large": lambda: safetensors(b'{"a":"' + b"a" * MAX_HEADER + b'"}'),
    "no text": lambda: safetensors(b'{"\xff":1}'),
    "empty": lambda: b"",
    "seven bytes": lambda: bytes(7),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_headers_are_refused_quickly_and_in_little_memory(tmp_path, kind):
    path = tmp_path / "model.safetensors"
    path.write_bytes(HOSTILE[kind]())
    gc.collect()
    gc.freeze()  # what else the tests hold is not to be gone through while the clock runs
    for read in (header, lambda path: weights.tensors([path])):
        start = time.process_time()
        with pytest.raises(ModelError, match=re.escape(f"{path}: ")) as caught:
            read(path)
        assert time.process_time() - start < 1 and caught.value.code == 4 and "\n" not in str(caught.value)
    gc.unfreeze()
    tracemalloc.start()
    with pytest.raises(ModelError):
        header(path)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 100e6


def test_the_largest_header_that_is_read_takes_little_memory(tmp_path):
    count = 28_000
    table = {f"t{i}": entry(4 * i, 4 * i + 4) for i in range(count)}
    (tmp_path / "x.safetensors").write_bytes(safetensors(table, bytes(4 * count)))
    tracemalloc.start()
    assert len(header(tmp_path / "x.safetensors").tensors) == count
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 100e6
