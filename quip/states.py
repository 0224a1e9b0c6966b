"""The hidden states of the calibration set between two blocks, in memory or in a file."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, MutableSequence
from pathlib import Path

import numpy as np
import torch

from quip.errors import QuipError


@contextlib.contextmanager
def hidden_states(offload: str | Path | None = None) -> Iterator[MutableSequence[torch.Tensor]]:
    """An empty sequence for the hidden states: a list, or, if `offload` names a folder, a file in it."""
    if offload is None:
        yield []
        return
    states = OffloadedStates(offload)
    try:
        yield states
    finally:
        states.file.close()


class OffloadedStates(MutableSequence):
    """Tensors of one shape and dtype, in a file; each is mapped while it is read or written, and only then in memory.

    The file has no name, so that the system deletes it when the process ends, however it ends. Raises `QuipError` if
    the folder cannot be written to.
    """

    def __init__(self, folder: str | Path):
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (open as long as this lives)
        except OSError as e:
            raise QuipError(f"cannot keep activations in {folder}: {e.strerror}") from None
        self.count, self.like = 0, None

    def map(self, i: int) -> np.memmap:
        """The bytes of tensor i; those beyond the end of the file are added to it."""
        if not 0 <= i < self.count:
            raise IndexError(i)
        size = self.like.numel() * self.like.element_size()
        try:
            return np.memmap(self.file, np.uint8, "r+", offset=i * size, shape=(size,))
        except OSError as e:
            raise QuipError(f"cannot keep activations in a file: {e.strerror}") from None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> torch.Tensor:
        stored = torch.from_numpy(np.array(self.map(i)))
        return stored.view(self.like.dtype).view(self.like.shape).to(self.device)

    def __setitem__(self, i: int, x: torch.Tensor) -> None:
        self.map(i)[:] = x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()

    def insert(self, i: int, x: torch.Tensor) -> None:
        """Only at the end."""
        if i != self.count:
            raise IndexError(i)
        if self.like is None:
            self.like, self.device = torch.empty_like(x, device="meta"), x.device
        self.count += 1
        self[i] = x

    def __delitem__(self, i: int) -> None:
        raise TypeError("hidden states are not deleted one by one")
