"""The C allocator, told to keep what training frees.

By default glibc hands every large activation back to the kernel and faults it in again at the next step: up to a third of
a CPU training step. This imports no torch, since torch reads the environment when it is loaded.
"""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h


def keep_pages() -> None:
    """Serve large blocks from the heap, keep freed memory, ask for huge pages. Does nothing where libc is not glibc."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_TOP_PAD, 64 << 20)
