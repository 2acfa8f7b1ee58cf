"""What the compiled extension exports, as Python sees it: the structs that its functions take, and the functions."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch


class _Struct(ctypes.Structure):
    def hold(self, tensors: dict[str, torch.Tensor | None]):
        """Set the struct's addresses to those of the tensors, and keep the tensors: under torch.compile nothing else need hold them until the call."""
        self.tensors = tensors
        for name, tensor in tensors.items():
            if tensor is not None:
                setattr(self, name, tensor.data_ptr())
        return self


class CellStruct(_Struct):
    """struct Cell of cell.h, which gives the shapes."""

    _fields_ = ([(name, ctypes.c_int64) for name in ("steps", "batch", "hidden", "nodes", "edges", "threads", "normalise", "keep", "by_units", "parts")]
                + [("eps", ctypes.c_double)]
                + [(name, ctypes.c_void_p) for name in (
                    "incoming", "source", "op",
                    "x_proj", "h0", "W0_h", "Ws", "mask", "p", "present", "average",
                    "pre0", "pre", "states", "masked", "previous", "outputs", "scale", "packed", "packed_back",
                    "d_outputs", "d_states", "d_masked", "carry", "d_h", "d_h0", "d_W0_h", "d_Ws", "d_p")])


class CrossEntropyStruct(_Struct):
    """struct LinearCrossEntropy of cross_entropy.cpp, which gives the shapes."""

    _fields_ = ([(name, ctypes.c_int64) for name in ("rows", "hidden", "words", "threads", "parts")]
                + [("scale", ctypes.c_double)]
                + [(name, ctypes.c_void_p) for name in ("x", "w", "b", "targets", "nll", "d_x", "d_w", "d_b", "logits", "packed", "packed_back", "d_w_transposed")])


class Library:
    """The loaded extension. `forward[dtype]`, `backward[dtype]` and `cross_entropy[dtype]` are its functions. `block` is the number of rows of logits that
    `cross_entropy` needs. `rounds`: whether this processor has tiles, whose products of bfloat16 are faster than those of float32."""

    def __init__(self, path: Path):
        library = ctypes.CDLL(str(path))
        for size, struct in (("cell_struct_size", CellStruct), ("cross_entropy_struct_size", CrossEntropyStruct)):
            getattr(library, size).restype = ctypes.c_int64
            if getattr(library, size)() != ctypes.sizeof(struct):
                raise OSError(f"{path.name} does not fit this version of exports.py")
        library.cross_entropy_block.restype = library.cell_rounds.restype = ctypes.c_int64
        self.rounds = bool(library.cell_rounds())
        self.block = library.cross_entropy_block()
        self.forward, self.backward, self.cross_entropy = {}, {}, {}
        for dtype, name in ((torch.float32, "float"), (torch.float64, "double")):
            for table, function, struct, result in ((self.forward, "cell_forward_", CellStruct, None), (self.backward, "cell_backward_", CellStruct, None),
                                                    (self.cross_entropy, "cross_entropy_", CrossEntropyStruct, ctypes.c_int64)):
                table[dtype] = getattr(library, function + name)
                table[dtype].argtypes, table[dtype].restype = [ctypes.POINTER(struct)], result
