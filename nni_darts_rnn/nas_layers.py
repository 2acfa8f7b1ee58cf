"""NNI's layers for NAS, imported by one process at a time.

The first import of `nni.nas` after an installation, and after each change of torch, writes a Python file into NNI's own folder, in place: a
process that imports it at that moment, such as the second of two trials at once, reads half of it and ends with a SyntaxError (NNI 3.0,
nni/nas/nn/pytorch/layers.py). This can go once NNI writes that file whole.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from .files import hold


def import_layers() -> None:
    """Imports `nni.nas.nn.pytorch`; waits for another process that is at it. To be called before anything of `nni.nas` is imported."""
    import nni
    import pytorch_lightning  # noqa: F401  # which NNI's imports; it takes seconds, for which nobody need wait

    with contextlib.ExitStack() as stack:
        source = Path(nni.__file__).parent / "nas" / "nn" / "pytorch" / "layers.py"
        if source.exists():
            with contextlib.suppress(OSError):  # a folder that is not ours to write in, where NNI writes nothing; a file system without locks
                stack.enter_context(hold(source))
        import nni.nas.nn.pytorch
