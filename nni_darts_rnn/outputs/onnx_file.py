"""model.onnx in a trial's folder, where the Visualization of NNI's web page looks for it."""

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
    """`ValueError` with one line where what writes ONNX is not installed."""
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ValueError(f"onnx: {' and '.join(missing)} not installed; pip install 'nni-darts-rnn[export]'")


def write_onnx(folder: str | Path, model: LanguageModel) -> Path:
    """Writes the language model as `folder`/model.onnx: tokens (T, B) and hidden (B, H) to logits, outputs and hidden; T and B are free."""
    check_onnx()
    path = Path(folder) / NAME
    hidden = model.init_hidden(2)
    tokens = torch.zeros(3, 2, dtype=torch.long, device=hidden.device)
    T, B = Dim("T", min=1), Dim("B", min=1)
    with evaluating(model), warnings.catch_warnings(), whole(path) as temporary:
        warnings.simplefilter("ignore")  # torch's exporter speaks of its own insides
        torch.onnx.export(model, (tokens, hidden), str(temporary), dynamo=True, dynamic_shapes=({0: T, 1: B}, {0: B}), external_data=False,
                          verbose=False)
    return path


def write_trained_onnx(folder: str | Path) -> Path:
    """The trained model of a trial's folder as model.onnx beside it."""
    from ..trained import load_trained

    return write_onnx(folder, load_trained(folder)[0])
