"""The recurrent cell and the language model around it as an NNI model space."""

from __future__ import annotations

import torch
from nni.mutable.utils import label_scope
from nni.nas.nn.pytorch import LayerChoice, ModelSpace, MutableModule
from nni.nas.oneshot.pytorch.supermodule.base import BaseSuperNetModule
from nni.nas.oneshot.pytorch.supermodule.differentiable import DifferentiableMixedLayer
from nni.nas.space import model_context
from torch import Tensor, nn

from .cell import ACTIVATIONS, INIT_RANGE, RecurrentWeights, checked_primitives
from .checks import one_of
from .genotype import PRIMITIVES, RELAXATIONS, Genotype, edges
from .model import LanguageModel, LMOutput
from .supernet import MixedRNN, checked_draws


class Read(nn.Module):
    """A candidate of `cell/node_<i>/input`: reads one of the earlier states."""

    def __init__(self, predecessor: int):
        super().__init__()
        self.predecessor = predecessor

    def forward(self, states: Tensor) -> Tensor:
        return states[self.predecessor]  # (i, B, H) -> (B, H); states are one tensor: NNI's choices take one argument, and Proxyless no list

    def extra_repr(self) -> str:
        return str(self.predecessor)


class Apply(nn.Module):
    """A candidate of `cell/node_<i>/op`: one nonlinearity."""

    def __init__(self, op: str):
        super().__init__()
        self.op = op

    def forward(self, z: Tensor) -> Tensor:
        return ACTIVATIONS[self.op](z)

    def extra_repr(self) -> str:
        return self.op


def _chosen(choice: nn.Module):
    """What a choice that is frozen, or sampled by a one-shot strategy, stands for. None while it is open, mixed, or learns an α of its own."""
    if isinstance(choice, Read):
        return choice.predecessor
    if isinstance(choice, Apply):
        return choice.op
    if hasattr(choice, "_arch_alpha"):  # NNI's Proxyless samples a path too, but its α gets its gradient through the choice, which therefore has to run
        return None
    sampled = getattr(choice, "_sampled", None)  # NNI's PathSamplingLayer
    return sampled if isinstance(sampled, str) else None


class CellSpace(RecurrentWeights, MutableModule):
    """One recurrent layer with an open cell: x (T, B, I), h0 (B, H) or None -> outputs (T, B, H).

    Each node has two `LayerChoice`s: `cell/node_<i>/input` (candidates "0" … "i-1") and `cell/node_<i>/op` (the primitives without `none`).
    Once every choice is decided (frozen, or one path sampled), the layer runs as the discrete cell that they describe. `relaxation` and `draws`
    concern strategies that mix the choices (see `supernet`).
    """

    def __init__(self, input_size: int, hidden_size: int, n_nodes: int = 8, primitives=PRIMITIVES, dropout_x: float = 0.0, dropout_h: float = 0.0,
                 relaxation: str = "edge", init_range: float = INIT_RANGE, draws: int = 1):
        super().__init__(input_size, hidden_size, n_nodes, dropout_x, dropout_h, init_range)
        self.primitives, self.relaxation = checked_primitives(primitives), one_of("relaxation", relaxation, RELAXATIONS)
        self.draws = checked_draws(draws, relaxation)
        ops = [name for name in self.primitives if name != "none"]
        self.inputs, self.ops = nn.ModuleList(), nn.ModuleList()
        with label_scope("cell"):
            for node in range(1, n_nodes + 1):
                with label_scope(f"node_{node}"):
                    self.inputs.append(LayerChoice({str(j): Read(j) for j in range(node)}, label="input"))
                    self.ops.append(LayerChoice({op: Apply(op) for op in ops}, label="op"))

    def genotype(self) -> Genotype | None:
        """The cell that the choices describe, or None while one of them is open."""
        pairs = [(_chosen(op), _chosen(read)) for op, read in zip(self.ops, self.inputs)]
        return None if any(x is None for pair in pairs for x in pair) else Genotype(tuple(pairs))

    def fixed_genotype(self) -> Genotype | None:
        frozen = all(isinstance(choice, (Read, Apply)) for choice in [*self.inputs, *self.ops])  # not where a one-shot strategy has only sampled a path
        return self.genotype() if frozen else None

    def forward(self, x: Tensor, h0: Tensor | None = None) -> Tensor:
        genotype = self.genotype()
        if genotype is not None:
            return self.run_cell(x, h0, genotype)
        if (self.relaxation, self.draws) != ("edge", 1) and type(self.ops[0]) is DifferentiableMixedLayer:  # not Proxyless's, a subclass: it mixes nothing
            raise ValueError(f"relaxation: {self.relaxation!r} has no effect here, as the strategy has mixed each choice by itself; derive the model from RecurrentSpace, "
                             "or give the strategy mutation_hooks=[MixedCell.mutate]")
        x_proj, h0, W0_h, mask = self.project(x, h0)
        Ws, h, outputs = self.Ws.unbind(0), h0, []  # once per sequence: each indexing would be a node of the autograd graph
        masked = (lambda s: s) if mask is None else (lambda s: s * mask)
        for x_t in x_proj.unbind(0):
            c, z = (x_t + masked(h) @ W0_h).chunk(2, -1)  # (B, H) each
            states = (h + torch.sigmoid(c) * (torch.tanh(z) - h)).unsqueeze(0)  # (1, B, H)
            for W, read, op in zip(Ws, self.inputs, self.ops):
                s = read(states)
                c, z = (masked(s) @ W).chunk(2, -1)  # (B, H) each
                s = s + torch.sigmoid(c) * (op(z) - s)
                states = torch.cat([states, s.unsqueeze(0)])  # (i+1, B, H)
            h = states[1:].mean(0)  # (N, B, H) -> (B, H)
            outputs.append(h)
        return torch.stack(outputs)  # (T, B, H)


class MixedCell(MixedRNN, BaseSuperNetModule):
    """The mixed cell that replaces a `CellSpace` in differentiable strategies. It exports the cell by the paper's rule."""

    @classmethod
    def mutate(cls, module: nn.Module, name: str, memo: dict, mutate_kwargs: dict):
        """NNI's mutation hook: replaces a `CellSpace` but keeps its weights; the softmax over α is the strategy's own."""
        if type(module) is not CellSpace:
            return None
        mixed = cls(module.input_size, module.hidden_size, module.n_nodes, module.primitives, module.dropout_x, module.dropout_h,
                    softmax=mutate_kwargs.get("softmax"), relaxation=module.relaxation, init_range=module.init_range, draws=module.draws)
        mixed.W0, mixed.Ws = module.W0, module.Ws
        mixed.scope = module.inputs[0].label.removesuffix("cell/node_1/input")  # the `label_scope`s of NNI around it
        first = memo.setdefault(f"{mixed.scope}cell", mixed)  # layers whose choices have the same labels are one cell and share one α
        for what in ("n_nodes", "relaxation", "draws"):  # where candidates differ, NNI raises by itself
            if getattr(first, what) != getattr(mixed, what):
                raise ValueError(f"{what}: {getattr(mixed, what)!r} of one CellSpace, {getattr(first, what)!r} of another; all of a space are one cell, so give them the same")
        mixed.alpha = first.alpha
        for choice in [*module.inputs, *module.ops]:
            mixed.add_mutable(choice.choice)  # the labels stay in the space's description
        return mixed

    def freeze(self, sample: dict) -> CellSpace:
        """The discrete cell of a sample, with these weights. NNI's `ModelSpace.freeze` and `export_top_models(formatter="instance")` call it."""
        with torch.device("meta"), model_context({label.removeprefix(self.scope): sample[label] for label in self.simplify()}):
            cell = CellSpace(self.input_size, self.hidden_size, self.n_nodes, self.primitives, self.dropout_x, self.dropout_h, self.relaxation,
                             self.init_range, self.draws)
        cell.W0, cell.Ws = self.W0, self.Ws
        return cell.train(self.training)

    def resample(self, memo: dict) -> dict:
        return {}

    def export(self, memo: dict) -> dict:
        sample = {self.scope + label: value for label, value in self.genotype().to_sample().items()}
        return {label: value for label, value in sample.items() if label not in memo}

    def export_probs(self, memo: dict) -> dict:
        """softmax(α) by edge: {"cell/node_<i>/from_<j>": {primitive: probability}}."""
        shares = self.edge_shares(self.alpha.detach().float().cpu())
        return {label: dict(zip(self.primitives, row.tolist())) for label, row in shares.items()}

    def edge_shares(self, alpha: Tensor) -> dict[str, Tensor]:
        """softmax(α) without noise, (K,) for each edge by its label, at an α (E, K)."""
        rows = self.relaxed(nn.Softmax(-1), alpha)  # (E, K)
        return {f"{self.scope}cell/node_{i}/from_{j}": row for (i, j), row in zip(edges(self.n_nodes), rows)}

    def arch_parameters(self):
        yield self.alpha


class RecurrentSpace(ModelSpace):
    """Base class of a model space with one or more `CellSpace` layers, anywhere in it. All of them are one cell. Every NNI strategy runs on it."""

    def extra_oneshot_hooks(self, strategy) -> list:
        """For differentiable strategies the mixed cell, with α for each edge; strategies that sample paths use the choices as they are."""
        from nni.nas.strategy import DARTS, Proxyless

        return [MixedCell.mutate] if isinstance(strategy, DARTS) and not isinstance(strategy, Proxyless) else []

    def genotype(self) -> Genotype | None:
        """The cell of a frozen or sampled model, or of a supernet, by its α; None while choices are open, and where the cell itself was not chosen."""
        cell = next((m for m in self.modules() if isinstance(m, (CellSpace, MixedCell))), None)
        return None if cell is None else cell.genotype()


class DartsRnnSpace(RecurrentSpace):
    """AWD-LSTM's language model with an open DARTS cell: tokens (T, B), hidden (B, H) -> `LMOutput`.

    Every sample is one `Genotype`; every label is a plain categorical choice. `vocab_size` is V, `hidden_size` H (that of the embedding too),
    `n_nodes` N. Dropout rates and `init_range` are those of `LanguageModel` and `RecurrentWeights`, `relaxation` and `draws` those of `MixedRNN`.
    """

    def __init__(self, vocab_size: int, hidden_size: int = 300, n_nodes: int = 8, primitives=PRIMITIVES, dropout: float = 0.0,
                 dropout_h: float = 0.0, dropout_x: float = 0.0, dropout_i: float = 0.0, dropout_e: float = 0.0, relaxation: str = "edge",
                 init_range: float = INIT_RANGE, draws: int = 1):
        super().__init__()
        rnn = CellSpace(hidden_size, hidden_size, n_nodes, primitives, dropout_x, dropout_h, relaxation, init_range, draws)
        self.lm = LanguageModel(vocab_size, rnn, dropout, dropout_i, dropout_e, init_range)

    def forward(self, tokens: Tensor, hidden: Tensor) -> LMOutput:
        return self.lm(tokens, hidden)

    def loss(self, tokens: Tensor, targets: Tensor, hidden: Tensor):
        return self.lm.loss(tokens, targets, hidden)

    def init_hidden(self, batch_size: int) -> Tensor:
        return self.lm.init_hidden(batch_size)
