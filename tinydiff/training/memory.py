"""Make the C allocator keep the memory that training frees.

By default glibc returns every large activation to the kernel, and page faults at the next step cost up to a third of a
CPU training step. This does not import torch, which reads the environment when it is loaded.
"""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h


def keep_pages() -> None:
    """Allocate large blocks on the heap, keep freed memory, ask for huge pages. Without glibc, only the last."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_TOP_PAD, 64 << 20)
