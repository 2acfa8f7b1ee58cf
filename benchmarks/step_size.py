"""The sizes of a search step, its arithmetic, and the paper's settings for it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

RATE, DECAY, CLIP, TAR, EPSILON = 20.0, 5e-7, 0.25, 1e-3, 1e-2
DROPOUT = {"dropout": 0.75, "dropout_h": 0.25, "dropout_x": 0.75, "dropout_i": 0.2}


class Size(NamedTuple):
    """T time steps, B streams, H units, V words, N nodes. Arithmetic counts a multiplication and an addition as two operations."""

    T: int
    B: int
    H: int
    V: int
    N: int = 8

    def flops(self) -> int:
        """The arithmetic of one second-order search step of the paper's Algorithm 1.

        A forward pass is 4·T·B·H²·(E + 2) for the cell (E edges, and the two halves of W0) and 2·T·B·H·V for the decoder. A backward pass costs as much for
        the gradients of data, and as much again for those of weights. A step is then 3 + 3 + 2 + 2 + 3 = 13 forward passes.
        """
        return 13 * self.forward(self.N * (self.N + 1) // 2)

    def shared_flops(self) -> int:
        """The arithmetic of a step that reuses the unrolled step's gradient for the weights: 3 + 3 + 2 + 2 = 10 forward passes."""
        return self.flops() // 13 * 10

    def first_order_flops(self) -> int:
        """The arithmetic of a first-order step with autograd: 3 passes for α, since gradients of the weights are made there too, and 3 for the weights."""
        return self.flops() // 13 * 6

    def drawn_flops(self) -> int:
        """The arithmetic of a `shared_flops` step with one drawn cell: 10 passes with its N edges; the other edges run forward in the 3 that α learns from."""
        return 10 * self.forward(self.N) + 3 * (self.forward(self.N * (self.N + 1) // 2) - self.forward(self.N))

    def forward(self, edges: int) -> int:
        """The arithmetic of a forward pass of a cell with `edges` edges and of the decoder."""
        return 4 * self.T * self.B * self.H**2 * (edges + 2) + 2 * self.T * self.B * self.H * self.V

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """A random batch: tokens (T, B), targets (T, B), hidden (B, H)."""
        return (*torch.randint(self.V, (2, self.T, self.B)).unbind(0), torch.zeros(self.B, self.H))


SIZES = {"small": Size(35, 32, 64, 2000), "medium": Size(35, 64, 128, 5000), "paper": Size(35, 256, 300, 10000)}
