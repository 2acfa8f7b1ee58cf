"""How large a step is: its sizes, its arithmetic, and the paper's settings of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

RATE, DECAY, CLIP, TAR, EPSILON = 20.0, 5e-7, 0.25, 1e-3, 1e-2
DROPOUT = {"dropout": 0.75, "dropout_h": 0.25, "dropout_x": 0.75, "dropout_i": 0.2}


class Size(NamedTuple):
    """T steps, B streams, H units, V words, N nodes."""

    T: int
    B: int
    H: int
    V: int
    N: int = 8

    def flops(self) -> int:
        """Of one search step as the paper's Algorithm 1 has it, a multiplication and an addition counted as two.

        A forward pass is 4·T·B·H²·(E + 2) for the cell (E edges, and the two halves of W0) and 2·T·B·H·V for the decoder; a backward pass costs
        the same again for data and once more for weights. A step is then 3 + 3 + 2 + 2 + 3 = 13 forward passes.
        """
        return 13 * self.forward(self.N * (self.N + 1) // 2)

    def shared_flops(self) -> int:
        """Of a step whose weights take the step that was unrolled, with its gradient: 3 + 3 + 2 + 2 = 10 forward passes."""
        return self.flops() // 13 * 10

    def first_order_flops(self) -> int:
        """Of a first-order step with autograd: 3 passes for α, whose weight gradients are made too, and 3 for the weights."""
        return self.flops() // 13 * 6

    def drawn_flops(self) -> int:
        """Of such a step with one drawn cell: the 10 passes are those of N edges, and in the 3 that α learns from the others run forward."""
        return 10 * self.forward(self.N) + 3 * (self.forward(self.N * (self.N + 1) // 2) - self.forward(self.N))

    def forward(self, edges: int) -> int:
        """Of a forward pass of a cell with so many edges, and of the decoder."""
        return 4 * self.T * self.B * self.H**2 * (edges + 2) + 2 * self.T * self.B * self.H * self.V

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """tokens (T, B), targets (T, B), hidden (B, H)."""
        return (*torch.randint(self.V, (2, self.T, self.B)).unbind(0), torch.zeros(self.B, self.H))


SIZES = {"small": Size(35, 32, 64, 2000), "medium": Size(35, 64, 128, 5000), "paper": Size(35, 256, 300, 10000)}
