"""The API reference from the docstrings, by pdoc: `python docs/build_api.py FOLDER`, then open FOLDER/index.html.

A warning of pdoc's (a name that cannot be imported, an annotation that cannot be read) makes it end with an error.
"""

import importlib
import pkgutil
import re
import sys
import warnings
from pathlib import Path

import pdoc

import nni_darts_rnn
from nni_darts_rnn.options import quiet_hosts

# annotations that pdoc cannot read: NNI's that need an optional package, and those of code that `NamedTuple` generates, which lacks its module's names
THEIRS = re.compile(r"annotation .*\bfor (nni\.|nni_darts_rnn\.\S+\.__init__\. Import of (Tensor|Graph|Lease|Level|Edge))")


def main(folder: Path) -> None:
    quiet_hosts()
    found = [m for m in pkgutil.walk_packages(nni_darts_rnn.__path__, "nni_darts_rnn.") if not m.name.rpartition(".")[2].startswith("_")]
    # pdoc documents a package's modules along with it, unless the package has `__all__`
    whole = {m.name for m in found if m.ispkg and not hasattr(importlib.import_module(m.name), "__all__")}
    modules = [m.name for m in found if m.name.rpartition(".")[0] not in whole]
    pdoc.render.configure(docformat="markdown", math=True, footer_text=f"nni_darts_rnn {nni_darts_rnn.__version__}")
    with warnings.catch_warnings(record=True) as warned:
        quiet_hosts()
        pdoc.pdoc("nni_darts_rnn", *modules, output_directory=folder)
    ours = [str(w.message) for w in warned if not issubclass(w.category, (DeprecationWarning, FutureWarning)) and not THEIRS.search(str(w.message))]
    if ours:
        sys.exit("\n".join(ours))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__.splitlines()[0])
    main(Path(sys.argv[1]))
