"""Which versions a result was made with."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch


def package_versions() -> dict[str, str]:
    """Versions of Python and of every package that a result depends on."""
    found = {"python": platform.python_version(), "torch": torch.__version__}  # which build of torch, too
    for name in ("nni-darts-rnn", "nni", "pytorch-lightning", "fastai", "numpy", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
