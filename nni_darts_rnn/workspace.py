"""The memory of a pass over a sequence, reused by the next pass: fresh pages cost as much as the arithmetic on them."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

LARGE = 2**26
"""The size in bytes from which `in_large_pages` asks for large pages. A search step was measured to gain at 770 MB, and not at 20 and 80 MB."""


class Spare:
    """The workspaces of the last finished passes, one of the cell and one of the loss, for the next passes."""

    workspaces: dict[str, Tensor] = {}


def take(owner: str, sizes: dict[str, int], dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """A workspace, and in it uninitialised buffers of `sizes` numbers, one after the other. The workspace is `owner`'s spare one if that is large enough."""
    lengths = [-(-size // 16) * 16 for size in sizes.values()]  # whole cache lines
    spare = Spare.workspaces.pop(owner, None)  # at once, since another thread may want it too
    if spare is None or spare.dtype != dtype or spare.numel() < sum(lengths):
        del spare
        with torch.inference_mode(False):  # a later pass may not be in inference mode, and could not use memory made in it
            spare = in_large_pages(torch.empty(sum(lengths), dtype=dtype, device="cpu"))
    return spare, {name: piece[:size] for (name, size), piece in zip(sizes.items(), spare[:sum(lengths)].split(lengths))}


def give(owner: str, workspace: Tensor) -> None:
    """Keep `workspace` for `owner`'s next `take`. Nobody may use its buffers any more."""
    Spare.workspaces[owner] = workspace


def in_large_pages(fresh: Tensor) -> Tensor:
    """Ask the kernel for pages of 2 MiB for the tensor's memory, if it is large and the kernel offers them. Returns the tensor. Each small page would need a
    translation of its own (at the paper's size 5 to 8 % of a search step, when a cell's rows lay whole pages apart). A refusal changes nothing."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    size = fresh.numel() * fresh.element_size()
    if advice is not None and size >= LARGE:
        start = -(-fresh.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        madvise(start, fresh.data_ptr() + size - start, advice)
    return fresh
