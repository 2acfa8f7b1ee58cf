"""The discrete recurrent cell, and the weights that a layer of it owns.

Cell (DARTS, section 3.2 and appendix A.1.2; quark0/darts `rnn/model.py`), for one time step with input x and previous output h:

    c0, z0 = [x∘m_x, h∘m_h] W0                 s_0 = h   + σ(c0)∘(tanh(z0) − h)
    c,  z  = (s_j∘m_h) W_i                     s_i = s_j + σ(c)∘(f(z) − s_j)          node i reads s_j through f
    output = mean of s_i over the genotype's `concat`
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import fraction, whole_number
from .genotype import Genotype, load_genotype, register_op

ACTIVATIONS = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "identity": lambda z: z,
}
"""How each primitive other than `none` is computed, element by element."""

INIT_RANGE = 0.04
"""By default weights start uniform in ± this (quark0/darts `rnn/model.py`, at every size: 300 units in its search, 850 and 700 in its retrainings)."""


def usual_range(hidden_size: int) -> float:
    """The range of initial weights: ±INIT_RANGE at the 850 units that the paper trains, and wider for fewer units. A product with such a matrix then keeps
    the same share of its input's spread at every size. With ±0.04 a small layer would be almost silent at first."""
    return INIT_RANGE * math.sqrt(850 / whole_number("hidden_size", hidden_size))


def register_primitive(name: str, function) -> None:
    """Add a nonlinearity: genotypes may then name it, and spaces, supernets and layers that have it in `primitives` compute it.

    `function` maps a tensor to one of the same shape, element by element, and must be differentiable. It is called once here, on a small tensor. `ValueError`
    with one line where it returns anything else, changes its argument, or is a module with trainable parameters: they would belong to no layer and never be trained.
    """
    if not isinstance(name, str) or not name.isidentifier() or name == "none":
        raise ValueError(f"primitive name {name!r} must be an identifier other than 'none'")
    if not callable(function):
        raise ValueError(f"primitive {name!r}: {function!r} must be a function of a tensor")
    if isinstance(function, nn.Module) and any(p.requires_grad for p in function.parameters()):
        raise ValueError(f"primitive {name!r}: a module with trainable parameters; a primitive belongs to no layer, so nothing would train them; freeze them, or give a function")
    before = torch.linspace(-2, 2, 6, device="cpu").view(2, 3)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        found = function(z := before.clone())
    if not isinstance(found, Tensor) or found.shape != z.shape or not torch.equal(z, before):
        what = "changes its argument" if not torch.equal(z, before) else f"makes a {type(found).__name__}" + (f" of shape {tuple(found.shape)}" if isinstance(found, Tensor) else "")
        raise ValueError(f"primitive {name!r}: must map a tensor to another of the same shape, element by element; of one of shape (2, 3) it {what}")
    ACTIVATIONS[name] = function
    register_op(name)


def checked_primitives(primitives) -> tuple[str, ...]:
    """The primitives of an edge as a tuple; `ValueError` unless each is known and named once, and at least one is not `none`."""
    names = tuple(primitives)
    if any(name != "none" and name not in ACTIVATIONS for name in names) or len(set(names)) != len(names) or set(names) <= {"none"}:
        raise ValueError(f"primitives {names}: each must be 'none' or one of {', '.join(ACTIVATIONS)}, named once, one not 'none'")
    return names


def cell_step(x: Tensor, h: Tensor, W0_h: Tensor, Ws: Sequence[Tensor], genotype: Genotype, mask: Tensor | None = None) -> Tensor:
    """One time step: x (B, 2H), the input's share of [x∘m_x, h∘m_h] W0; h (B, H), the previous output; Ws: N matrices (H, 2H) -> (B, H)."""
    masked = (lambda s: s) if mask is None else (lambda s: s * mask)
    c, z = (x + masked(h) @ W0_h).chunk(2, -1)  # (B, H) each
    states = [h + torch.sigmoid(c) * (torch.tanh(z) - h)]
    for W, (op, j) in zip(Ws, genotype.recurrent):
        s = states[j]
        c, z = (masked(s) @ W).chunk(2, -1)  # (B, H) each
        states.append(s + torch.sigmoid(c) * (ACTIVATIONS[op](z) - s))
    return torch.stack([states[i] for i in genotype.concat]).mean(0)  # (len(concat), B, H) -> (B, H)


def discrete_cell(x_proj: Tensor, h0: Tensor, W0_h: Tensor, Ws: Tensor, genotype: Genotype, mask: Tensor | None = None) -> Tensor:
    """Run the cell over a sequence. This is the readable form, for any device, any dtype and derivatives of any order.

    x_proj (T, B, 2H): the input's share of [x∘m_x, h∘m_h] W0, for all time steps. h0 (B, H). W0_h (H, 2H): the rows of W0
    for h. Ws (N, H, 2H). mask (B, H): m_h, or None. Returns the outputs (T, B, H); the last is the next hidden state.
    """
    h, outputs, matrices = h0, [], Ws.unbind(0)  # once: every split has its own step in the backward pass
    for x in x_proj.unbind(0):
        h = cell_step(x, h, W0_h, matrices, genotype, mask)
        outputs.append(h)
    return torch.stack(outputs)  # (T, B, H)


def scanned_cell(x_proj: Tensor, h0: Tensor, W0_h: Tensor, Ws: Tensor, genotype: Genotype, mask: Tensor | None = None) -> Tensor:
    """`discrete_cell` as one scan over time, without gradients. `torch.export` and ONNX keep the scan as a loop, so T may differ from call to call."""
    from torch._higher_order_ops.scan import scan  # a prototype in torch 2.14, not yet under a public name

    # torch 2.14's ONNX exporter fails on a scan of tensors that need a gradient, and its torch.export on a scan of detached views
    x_proj, h0, W0_h, Ws = (t.detach().clone() for t in (x_proj, h0, W0_h, Ws))

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = cell_step(x, h, W0_h, Ws.unbind(0), genotype, mask)
        return h, h.clone()  # a scan's two results may not be the same tensor

    return scan(step, h0, x_proj)[1]


def variational_mask(like: Tensor, p: float, training: bool) -> Tensor | None:
    """A dropout mask (B, H) shaped like `like`, drawn once per sequence and scaled by 1/(1−p) (Gal & Ghahramani 2016); None if inactive."""
    if not training or p == 0:
        return None
    return F.dropout(torch.ones_like(like), p)  # works under torch.vmap, where the in-place bernoulli_ does not


def check_rates(**rates: float) -> None:
    """`ValueError` with one line unless every rate is a valid dropout rate."""
    for name, rate in rates.items():
        fraction(name, rate)


class RecurrentWeights(nn.Module):
    """What one recurrent layer of N nodes owns: W0 (I+H, 2H), Ws (N, H, 2H), uniform in ±`init_range` at first, and its two variational dropout rates."""

    def __init__(self, input_size: int, hidden_size: int, n_nodes: int, dropout_x: float = 0.0, dropout_h: float = 0.0,
                 init_range: float = INIT_RANGE):
        super().__init__()
        for name, value in (("input_size", input_size), ("hidden_size", hidden_size), ("n_nodes", n_nodes)):
            whole_number(name, value)
        check_rates(dropout_x=dropout_x, dropout_h=dropout_h)
        if not 0 < init_range < math.inf:
            raise ValueError(f"init_range: {init_range!r} must be above 0")
        self.input_size, self.hidden_size, self.n_nodes, self.init_range = input_size, hidden_size, n_nodes, init_range
        self.dropout_x, self.dropout_h = dropout_x, dropout_h
        self.W0 = nn.Parameter(torch.empty(input_size + hidden_size, 2 * hidden_size))
        self.Ws = nn.Parameter(torch.empty(n_nodes, hidden_size, 2 * hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.W0, -self.init_range, self.init_range)
        nn.init.uniform_(self.Ws, -self.init_range, self.init_range)

    def project(self, x: Tensor, h0: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The inputs of every kind of cell: x (T, B, I) -> x_proj (T, B, 2H), h0 (B, H), W0_h (H, 2H), mask m_h (B, H) or None."""
        if not isinstance(x, Tensor):
            raise ValueError(f"input is a {type(x).__name__}; expected a tensor (T, B, {self.input_size}): packed sequences are for DartsRNN, an open cell takes padded ones")
        if x.dim() != 3 or x.shape[-1] != self.input_size or not x.shape[0]:
            raise ValueError(f"input has shape {tuple(x.shape)}; expected (T, B, {self.input_size}) with T of at least 1")
        h0 = x.new_zeros(x.shape[1], self.hidden_size) if h0 is None else h0
        if h0.shape != (x.shape[1], self.hidden_size):
            raise ValueError(f"hidden state has shape {tuple(h0.shape)}; expected (B, H) = ({x.shape[1]}, {self.hidden_size})")
        mask_x = variational_mask(x[0], self.dropout_x, self.training)
        mask_h = variational_mask(h0, self.dropout_h, self.training)
        if mask_x is not None:
            x = x * mask_x
        W0_x, W0_h = self.W0.split((self.input_size, self.hidden_size))  # in one call: two slices would each fill a gradient of W0's size
        return x @ W0_x, h0, W0_h, mask_h  # one GEMM for all T·B rows

    def run_cell(self, x: Tensor, h0: Tensor | None, genotype: Genotype) -> Tensor:
        """The genotype's cell with these weights: x (T, B, I), h0 (B, H) or None -> outputs (T, B, H)."""
        from . import fused  # here, since it imports this module

        x_proj, h0, W0_h, mask = self.project(x, h0)
        if torch.compiler.is_exporting():
            return scanned_cell(x_proj, h0, W0_h, self.Ws, genotype, mask)
        cell = fused.discrete_cell
        if torch.compiler.is_compiling():  # a loop over time would be unrolled, and compiled again for each length; torch.compile leaves nn.GRU out too
            cell = torch.compiler.disable(cell)
        return cell(x_proj, h0, W0_h, self.Ws, genotype, mask)

    def fixed_genotype(self) -> Genotype | None:
        """The only cell that these weights are of, or None."""
        return None

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        mine = self.fixed_genotype()
        if mine is not None and hasattr(destination, "_metadata"):  # as metadata: it adds no key, and nothing to a file of tensors alone
            destination._metadata[prefix[:-1]]["genotype"] = mine.to_json()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs) -> None:
        theirs, mine = local_metadata.get("genotype"), self.fixed_genotype()  # shapes would not tell: different cells have matrices of the same shapes
        if theirs is not None and mine is not None and theirs != mine.to_json():
            error_msgs.append(f"{prefix}genotype: the weights are of {theirs}, this layer is of {mine.to_json()}; dict(state_dict) is taken unasked")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, n_nodes={self.n_nodes}, dropout_x={self.dropout_x}, dropout_h={self.dropout_h}"


class DiscreteRNN(RecurrentWeights):
    """One layer, one direction of a genotype's cell: x (T, B, I), h0 (B, H) or None -> outputs (T, B, H); the last is h_n."""

    def __init__(self, input_size: int, hidden_size: int, genotype: Genotype, dropout_x: float = 0.0, dropout_h: float = 0.0,
                 init_range: float = INIT_RANGE):
        genotype = load_genotype(genotype)
        super().__init__(input_size, hidden_size, genotype.n_nodes, dropout_x, dropout_h, init_range)
        self.genotype = genotype

    def fixed_genotype(self) -> Genotype:
        return self.genotype

    def forward(self, x: Tensor, h0: Tensor | None = None) -> Tensor:
        return self.run_cell(x, h0, self.genotype)
