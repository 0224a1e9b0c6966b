"""Packed weights in huge pages: a processor reads memory faster if it has to look up where it lies less often."""

from __future__ import annotations

import mmap
from functools import cache
from pathlib import Path

import torch

LINUX = Path("/sys/kernel/mm/transparent_hugepage")


@cache
def page_size() -> int:
    """Bytes of a huge page, if this system gives them to whoever asks; else 0."""
    try:
        asked = hasattr(mmap, "MADV_HUGEPAGE") and "[never]" not in (LINUX / "enabled").read_text()
        return int((LINUX / "hpage_pmd_size").read_text()) if asked else 0
    except (OSError, ValueError):
        return 0


def in_huge_pages(t: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor on the CPU, itself or a copy of it in huge pages, as far as it fills any; :ref:`ch-kernels`.

    What processes share stays where it is, and everything does where the system gives no more memory. The storage of a
    copy is just as large as the tensor.
    """
    size = page_size()
    if not size or t.nbytes < size or t.data_ptr() % size == 0 or t.is_shared():
        return t
    with torch.inference_mode(False):  # the copy is to be an ordinary tensor, whoever asks
        try:
            room = mmap.mmap(-1, t.nbytes + size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            start = -torch.frombuffer(room, dtype=torch.uint8, count=1).data_ptr() % size
            room.madvise(mmap.MADV_HUGEPAGE, start, t.nbytes // size * size)
        except OSError:
            return t
        copy = torch.frombuffer(room, dtype=t.dtype, count=t.numel(), offset=start)
        return copy.view(t.shape).copy_(t)
