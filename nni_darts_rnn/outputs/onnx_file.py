"""Writes model.onnx to a trial's folder, where the Visualization of NNI's web page looks for it."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.export import Dim

from ..files import whole
from ..model import LanguageModel, evaluating

NAME = "model.onnx"


def check_onnx() -> None:
    """`ValueError` with one line if a package that writing ONNX needs is missing."""
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ValueError(f"onnx: {' and '.join(missing)} not installed; pip install 'nni-darts-rnn[export]'")


def write_onnx(folder: str | Path, model: LanguageModel) -> Path:
    """Write the language model as `folder`/model.onnx. Its inputs are tokens (T, B) and hidden (B, H), for any T and B; its outputs are those of `LMOutput`."""
    check_onnx()
    path = Path(folder) / NAME
    hidden = model.init_hidden(2)
    tokens = torch.zeros(3, 2, dtype=torch.long, device=hidden.device)
    T, B = Dim("T", min=1), Dim("B", min=1)
    with evaluating(model), warnings.catch_warnings(), whole(path) as temporary:
        warnings.simplefilter("ignore")  # torch's exporter warns about its own implementation
        torch.onnx.export(model, (tokens, hidden), str(temporary), dynamo=True, dynamic_shapes=({0: T, 1: B}, {0: B}), external_data=False,
                          verbose=False)
    return path


def write_trained_onnx(folder: str | Path) -> Path:
    """Write the trained model of a trial's folder as model.onnx beside it."""
    from ..trained import load_trained

    return write_onnx(folder, load_trained(folder)[0])
