"""Imports NNI's layers for NAS in one process at a time.

The first import of `nni.nas` after an installation or a change of torch writes a Python file into NNI's own folder, in place (NNI 3.0,
nni/nas/nn/pytorch/layers.py). Another process that imports it at that moment, such as a second trial, reads half a file and ends with a
SyntaxError. This can go once NNI writes that file whole.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from .files import hold


def import_layers() -> None:
    """Imports `nni.nas.nn.pytorch`, after any other process that is doing so. Call it before anything of `nni.nas` is imported."""
    import nni
    import pytorch_lightning  # noqa: F401  # NNI's layers import it; it takes seconds, so it stays outside the lock

    with contextlib.ExitStack() as stack:
        source = Path(nni.__file__).parent / "nas" / "nn" / "pytorch" / "layers.py"
        if source.exists():
            with contextlib.suppress(OSError):  # a folder that is read-only, in which NNI writes nothing either, or a file system without locks
                stack.enter_context(hold(source))
        import nni.nas.nn.pytorch
