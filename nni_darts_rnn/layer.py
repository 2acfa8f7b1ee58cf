"""`DartsRNN`: a genotype's cell as a layer with the calls and results of `nn.GRU`."""

from __future__ import annotations

import contextlib
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .cell import DiscreteRNN, usual_range
from .checks import fraction, whole_number
from .genotype import Genotype, load_genotype


class DartsRNN(nn.Module):
    """A drop-in replacement for `nn.GRU`, built on a genotype's cell: `(output, h_n) = rnn(input, hx)`.

    The arguments are those of `nn.GRU`, with `genotype` (a `Genotype`, a name such as "DARTS_V2", or a file) as the third. The cell has no bias, so
    `bias=True` is refused. `dropout` acts between layers; `dropout_x` and `dropout_h` are the cell's variational rates (one mask a sequence). Weights start
    uniform in ±`init_range`, by default `cell.usual_range(hidden_size)`.
    `torch.export.export` and `torch.onnx.export(dynamo=True)` accept the layer as it is, for inference. Any axis of x may be dynamic; time becomes a scan.
    With D = 2 if bidirectional else 1 and L layers:

    input (T, B, I), or (B, T, I) with `batch_first`, or (T, I), or a `PackedSequence`; hx (L·D, B, H), or (L·D, H) for unbatched input, or None for zeros.
    output (T, B, D·H) in the form of the input; h_n (L·D, B, H), for packed sequences the state at each sequence's own end.

    Raises `ValueError` with one line for arguments or shapes that do not fit.
    """

    def __init__(self, input_size: int, hidden_size: int, genotype: Genotype | str = "DARTS_V2", num_layers: int = 1, bias: bool = False,
                 batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False, dropout_x: float = 0.0, dropout_h: float = 0.0,
                 device=None, dtype=None, init_range: float | None = None):
        super().__init__()
        if isinstance(genotype, int):
            raise ValueError(f"genotype: {genotype!r} is a number; the third argument is the cell, num_layers the one after it")
        if bias:
            raise ValueError("bias: True is not possible, the DARTS cell has no bias terms; leave it False")
        whole_number("num_layers", num_layers)
        for name, value in (("batch_first", batch_first), ("bidirectional", bidirectional)):
            if value not in (True, False):
                raise ValueError(f"{name}: {value!r} must be True or False")
        fraction("dropout", dropout, below=False)
        if dropout and num_layers == 1:  # as nn.GRU does
            warnings.warn(f"dropout: {dropout!r} acts between layers, and there is one; dropout_x and dropout_h act within it", stacklevel=2)
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.genotype, self.batch_first, self.dropout, self.bidirectional = load_genotype(genotype), batch_first, dropout, bidirectional
        self.bias = False
        self.directions = 2 if bidirectional else 1
        init_range = usual_range(hidden_size) if init_range is None else init_range
        with contextlib.nullcontext() if device is None else torch.device(device):  # made there, not on the default device first; on "meta" nothing is drawn
            self.layers = nn.ModuleList(
                DiscreteRNN(input_size if layer == 0 else self.directions * hidden_size, hidden_size, self.genotype, dropout_x, dropout_h, init_range)
                for layer in range(num_layers) for _ in range(self.directions))
        self.to(dtype=dtype)

    def extra_repr(self) -> str:
        return (f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, batch_first={self.batch_first}, "
                f"bidirectional={self.bidirectional}, genotype={self.genotype}")

    def flatten_parameters(self) -> None:
        """Do nothing: `nn.GRU` has this method for cuDNN, and code written for `nn.GRU` calls it."""

    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        for layer in self.layers:
            layer.reset_parameters()

    def forward(self, input: Tensor | PackedSequence, hx: Tensor | None = None) -> tuple[Tensor | PackedSequence, Tensor]:
        if isinstance(hx, (tuple, list)):
            raise ValueError(f"hx: a {type(hx).__name__}; this cell has one state, as nn.GRU has: a tensor (layers·directions, B, H), or None")
        if isinstance(input, PackedSequence):
            padded, lengths = pad_packed_sequence(input)  # (T, B, I), (B,)
            padded = _repeated(padded, lengths.to(padded.device))
            output, h_n = self._run_by_length(padded, hx, lengths)
            if input.sorted_indices is not None:  # back into the input's own order, which for sequences of equal length may be any
                output, lengths = output[:, input.sorted_indices], lengths[input.sorted_indices.cpu()]
            packed = pack_padded_sequence(output, lengths)
            return PackedSequence(packed.data, packed.batch_sizes, input.sorted_indices, input.unsorted_indices), h_n
        if input.dim() == 2:  # unbatched (T, I)
            expected = (self.num_layers * self.directions, self.hidden_size)
            if hx is not None and hx.shape != expected:
                raise ValueError(f"hx has shape {tuple(hx.shape)}; expected (layers·directions, H) = {expected}, as the input has no batch")
            output, h_n = self._run(input.unsqueeze(1), None if hx is None else hx.unsqueeze(1), None)
            return output.squeeze(1), h_n.squeeze(1)
        if input.dim() != 3:
            raise ValueError(f"input has shape {tuple(input.shape)}; expected 2 (unbatched) or 3 axes")
        output, h_n = self._run(input.transpose(0, 1) if self.batch_first else input, hx, None)  # (B, T, I) -> (T, B, I)
        return (output.transpose(0, 1) if self.batch_first else output), h_n

    def _run_by_length(self, x: Tensor, hx: Tensor | None, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """As `_run`, but sequences that are much shorter than others run separately, so that their padding costs nothing."""
        groups = _groups(lengths.tolist()) if x.device.type == "cpu" else []  # on a GPU a step takes as long for a few rows as for many
        if len(groups) < 2 or (hx is not None and hx.shape != (self.num_layers * self.directions, x.shape[1], self.hidden_size)):  # `_run` refuses such an hx
            return self._run(x, hx, lengths.to(x.device))
        ended = [self._run(x[:int(lengths[rows[0]]), rows], None if hx is None else hx[:, rows], lengths[rows]) for rows in groups]
        place = torch.tensor([row for rows in groups for row in rows], device=x.device).argsort()
        output = torch.cat([F.pad(output, (0, 0, 0, 0, 0, len(x) - len(output))) for output, _ in ended], 1)  # (T, B, D·H)
        return output[:, place], torch.cat([h_n for _, h_n in ended], 1)[:, place]

    def _run(self, x: Tensor, hx: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (T, B, I), lengths (B,) or None -> output (T, B, D·H), h_n (L·D, B, H)."""
        weights = self.layers[0].W0.dtype
        for name, tensor in (("input", x), ("hx", hx)):
            if tensor is not None and tensor.dtype != weights and not torch.is_autocast_enabled(x.device.type):
                raise ValueError(f"{name} is of {tensor.dtype}, the weights are of {weights}: {name}.to({weights}), or rnn.to({tensor.dtype})")
        if x.shape[-1] != self.input_size:
            raise ValueError(f"input has {x.shape[-1]} features; this layer was built for input_size {self.input_size}")
        expected = (self.num_layers * self.directions, x.shape[1], self.hidden_size)
        if hx is not None and hx.shape != expected:
            raise ValueError(f"hx has shape {tuple(hx.shape)}; expected (layers·directions, B, H) = {expected}")
        finals = []
        for layer in range(self.num_layers):
            outputs = []
            for direction in range(self.directions):
                index = layer * self.directions + direction
                backwards = direction == 1
                inputs = _reversed(x, lengths) if backwards else x
                output = self.layers[index](inputs, None if hx is None else hx[index])  # (T, B, H)
                finals.append(output[-1] if lengths is None else output[lengths - 1, torch.arange(x.shape[1], device=x.device)])
                outputs.append(_reversed(output, lengths) if backwards else output)
            x = torch.cat(outputs, -1)  # (T, B, D·H); a copy even of one: the caller must not change what the backward pass has kept
            if self.dropout and layer + 1 < self.num_layers:
                x = F.dropout(x, self.dropout, self.training)
        return x, torch.stack(finals)  # (L·D, B, H)


def _groups(lengths: list[int], step: int = 40) -> list[list[int]]:
    """The sequences, the longest first, in groups; each group is at most half as long as the one before. A new group begins only where that is less work: a
    time step itself is taken to cost as much as `step` rows of it."""
    order, groups = sorted(range(len(lengths)), key=lambda row: -lengths[row]), []
    for done, row in enumerate(order):
        if groups:
            longest, there, rest = lengths[groups[-1][0]], len(groups[-1]), len(order) - done
            apart = longest * (there + step) + lengths[row] * (rest + step)
        if not groups or (2 * lengths[row] <= longest and apart < longest * (there + rest + step)):
            groups.append([])
        groups[-1].append(row)
    return groups


def _repeated(x: Tensor, lengths: Tensor) -> Tensor:
    """x (T, B, …) with each sequence repeated where it has ended, in place of zeros. A cell that is stable on its inputs may not be stable on zeros. If steps
    beyond the end overflowed, their gradients, which are 0, would become NaN."""
    t = torch.arange(len(x), device=x.device).unsqueeze(1)  # (T, 1)
    return x.gather(0, (t % lengths).unsqueeze(-1).expand_as(x))


def _reversed(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x (T, B, …) reversed in time, each sequence within its own length."""
    if lengths is None:
        return x.flip(0)
    t = torch.arange(len(x), device=x.device).unsqueeze(1)  # (T, 1)
    index = torch.where(t < lengths, lengths - 1 - t, t)  # (T, B)
    return x.gather(0, index.unsqueeze(-1).expand_as(x))
