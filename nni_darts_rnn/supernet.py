"""The mixed cell: every edge a softmax-weighted sum of all primitives (DARTS, eq. 2).

With p = softmax(α[edge]) and the edge's c, z = (s_j∘m_h) W_i, primitive k contributes p_k (s_j + σ(c)∘(f_k(z) − s_j)) and
`none` contributes zero. With P = Σ_k≠none p_k and m = Σ_k p_k f_k(z) the edge's sum is P s_j + σ(c)∘(m − P s_j).

There are three relaxations. "edge", the paper's: one softmax for each edge. Node i then adds i sums, and every state is batch-normalised to hold it in range.
The derived cell has neither the sums nor the BatchNorm. "node": one softmax over all primitives of all edges into a node, and no BatchNorm. The state is a
convex combination. With all of α's weight on one primitive of one edge of each node, the mixed cell is the discrete cell. "gumbel": each sequence draws one
primitive of one edge into each node, in proportion to that softmax without `none`, and runs that discrete cell. α gets the gradient of the Gumbel softmax
(Jang, Gu, Poole 2017, "straight-through"; drawn like this by Dong and Yang 2019, GDAS). With `draws` > 1 a batch is run in that many parts, whose sizes
differ by one at most, and each part's sequences draw a cell of their own. In evaluation the derived cell runs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cell import ACTIVATIONS, INIT_RANGE, RecurrentWeights, checked_primitives
from .checks import one_of, whole_number
from .genotype import PRIMITIVES, RELAXATIONS, Genotype, derive, edges, number_of_nodes

BATCHNORM_EPS = 1e-5
ALPHA_SCALE = 1e-3
"""α starts at 1e-3·N(0, 1) (quark0/darts `rnn/model_search.py`)."""


def drawn(logits: Tensor) -> Tensor:
    """A one-hot draw along the last axis, in proportion to softmax(logits), with the gradient of the Gumbel softmax at temperature 1."""
    return F.gumbel_softmax(logits, hard=True)


def strongest(logits: Tensor) -> Tensor:
    """One-hot along the last axis, at the largest of softmax(logits) as `MixedRNN.probabilities` computes it; among equal ones, at the first."""
    probabilities = logits.float().softmax(-1)
    largest = probabilities == probabilities.amax(-1, keepdim=True)
    return (largest & (largest.cumsum(-1) == 1)).to(logits.dtype)


def one_hot_genotype(probabilities: Tensor, primitives=PRIMITIVES) -> Genotype:
    """The cell that probabilities (E, K) stand for, which must be one-hot in each node's rows."""
    entries = [divmod(place, len(primitives)) for place in probabilities.flatten().nonzero().flatten().tolist()]  # node by node
    every = edges(number_of_nodes(len(probabilities)))
    return Genotype(tuple((primitives[k], every[row][1]) for row, k in entries))


def checked_draws(draws: int, relaxation: str) -> int:
    """`draws` itself; `ValueError` with one line unless it is a whole number that `relaxation` can use."""
    if whole_number("draws", draws) > 1 and relaxation != "gumbel":
        raise ValueError(f"draws: {draws} cells are drawn with relaxation 'gumbel' alone; with {relaxation!r} give 1")
    return draws


def mixed_cell(x_proj: Tensor, h0: Tensor, W0_h: Tensor, Ws: Tensor, probabilities: Tensor, mask: Tensor | None = None,
               primitives=PRIMITIVES, normalise: bool = True) -> Tensor:
    """Run the mixed cell over a sequence. This is the readable form, for any device, any dtype and derivatives of any order.

    x_proj (T, B, 2H), h0 (B, H), W0_h (H, 2H), Ws (N, H, 2H) and mask (B, H) are as in `cell.discrete_cell`. probabilities (E, K) has its rows
    node by node, predecessor by predecessor. With `normalise` every state passes a BatchNorm without affine parameters, which uses the batch's own
    mean and biased variance at each time step. Returns the outputs (T, B, H).
    """
    N = Ws.shape[0]
    columns = [(k, ACTIVATIONS[name]) for k, name in enumerate(primitives) if name != "none"]
    nodes = []  # split before the loop over time, as every split has its own step in the backward pass
    for W, rows in zip(Ws.unbind(0), probabilities[:, :, None, None].split(list(range(1, N + 1)))):  # (H, 2H), (i, K, 1, 1)
        p = [rows[:, k] for k, _ in columns]  # (i, 1, 1) each
        nodes.append((W, p, sum(p)))  # P = 1 − p_none is the sum of the rest

    def finish(s: Tensor) -> Tensor:  # (B, H)
        return F.batch_norm(s, None, None, training=True, eps=BATCHNORM_EPS) if normalise else s

    h, outputs = h0, []
    for x in x_proj.unbind(0):
        c, z = (x + (h if mask is None else h * mask) @ W0_h).chunk(2, -1)  # (B, H) each
        states = finish(h + torch.sigmoid(c) * (torch.tanh(z) - h)).unsqueeze(0)  # (1, B, H)
        for W, p, present in nodes:
            c, z = ((states if mask is None else states * mask) @ W).chunk(2, -1)  # (i, B, H) each
            m = sum(p_k * f(z) for p_k, (_, f) in zip(p, columns))  # (i, B, H)
            carried = present * states
            s = (carried + torch.sigmoid(c) * (m - carried)).sum(0)  # (i, B, H) -> (B, H)
            states = torch.cat([states, finish(s).unsqueeze(0)])  # (i+1, B, H)
        h = states[1:].mean(0)  # (B, H)
        outputs.append(h)
    return torch.stack(outputs)  # (T, B, H)


class MixedRNN(RecurrentWeights):
    """The supernet's recurrent layer: x (T, B, I), h0 (B, H) or None -> outputs (T, B, H); the last is the next hidden state.

    `alpha` (E, K) holds the architecture parameters; `softmax` turns it into probabilities once per sequence
    (so a Gumbel softmax draws its noise once per sequence). With `relaxation="edge"` states are normalised with their batch's own statistics, in
    evaluation too. Running averages would no longer hold the recurrence in range: with them perplexity was measured to explode (39,000 where the
    text's training perplexity was 317). So B must be at least 2 with this relaxation.
    """

    def __init__(self, input_size: int, hidden_size: int, n_nodes: int = 8, primitives=PRIMITIVES, dropout_x: float = 0.0,
                 dropout_h: float = 0.0, softmax: nn.Module | None = None, relaxation: str = "edge",
                 init_range: float = INIT_RANGE, draws: int = 1):
        super().__init__(input_size, hidden_size, n_nodes, dropout_x, dropout_h, init_range)
        self.primitives = checked_primitives(primitives)
        self.relaxation, self.draws = one_of("relaxation", relaxation, RELAXATIONS), checked_draws(draws, relaxation)
        self.softmax = nn.Softmax(-1) if softmax is None else softmax
        if relaxation == "gumbel" and type(self.softmax) is not nn.Softmax:
            raise ValueError(f"relaxation: 'gumbel' draws by itself, which goes with DARTS and SecondOrderDARTS alone; the strategy gave {self.softmax}")
        # from a generator of its own, so that a seed gives the same α however many other numbers were drawn before, in NNI or in fastai
        noise = torch.randn(n_nodes * (n_nodes + 1) // 2, len(self.primitives), generator=torch.Generator().manual_seed(torch.initial_seed()), device="cpu")
        self.alpha = nn.Parameter(ALPHA_SCALE * noise.to(self.W0.device))

    def probabilities(self) -> Tensor:
        """softmax(α), (E, K), without noise."""
        return self.relaxed(nn.Softmax(-1), self.alpha.detach().float())

    def relaxed(self, softmax, alpha: Tensor) -> Tensor:
        """`softmax` of α (E, K), over the primitives of each edge, or over those of all edges into a node."""
        if self.relaxation == "edge":
            return softmax(alpha)
        if self.relaxation == "gumbel":
            alpha = alpha.masked_fill(torch.tensor([name == "none" for name in self.primitives], device=alpha.device), -torch.inf)
        blocks = alpha.split(list(range(1, len(self.Ws) + 1)))  # (i, K) each
        return torch.cat([softmax(block.reshape(1, -1)).view_as(block) for block in blocks])

    def mixture(self) -> Tensor:
        """The shares of the primitives in each edge, (E, K), for one sequence."""
        if self.relaxation != "gumbel":
            return self.relaxed(self.softmax, self.alpha)
        # the mode of the softmax decides, not this module's: `model.without_dropout` changes only the latter
        return self.relaxed(drawn if self.softmax.training else strongest, self.alpha)

    def genotype(self) -> Genotype:
        """The cell that the present α leads to."""
        return derive(self.probabilities().cpu().numpy(), self.primitives)

    def forward(self, x: Tensor, h0: Tensor | None = None) -> Tensor:
        normalise = self.relaxation == "edge"
        if normalise and isinstance(x, Tensor) and x.dim() == 3 and x.shape[1] < 2:
            raise ValueError(f"a batch of {x.shape[1]}: the supernet normalises over the batch, so every batch needs at least 2 sequences (search.batch_size, search.eval_batch_size)")
        from . import fused  # here, since it imports this module

        x_proj, h0, W0_h, mask = self.project(x, h0)
        if self.relaxation != "gumbel":
            return fused.mixed_cell(x_proj, h0, W0_h, self.Ws, self.mixture(), mask, self.primitives, normalise)
        parts = max(1, min(self.draws, len(h0))) if self.softmax.training else 1
        masks = [None] * parts if mask is None else mask.tensor_split(parts)  # (B/parts, H) each
        outputs = [fused.drawn_cell(x_part, h_part, W0_h, self.Ws, self.mixture(), mask_part, self.primitives)  # (T, B/parts, H)
                   for x_part, h_part, mask_part in zip(x_proj.tensor_split(parts, 1), h0.tensor_split(parts), masks)]
        return torch.cat(outputs, 1) if parts > 1 else outputs[0]  # (T, B, H)
