"""The versions of packages that a result was made with."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch


def package_versions() -> dict[str, str]:
    """The versions of Python and of every package that a result depends on."""
    found = {"python": platform.python_version(), "torch": torch.__version__}  # its version also names the build
    for name in ("nni-darts-rnn", "nni", "pytorch-lightning", "fastai", "numpy", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
