"""`nni-darts-rnn init DIR`: write the example experiments and their search spaces into a folder of the user's."""

from __future__ import annotations

import sysconfig
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from ..files import write_text

FOLDERS = ("examples", "search_spaces")
SUFFIXES = (".yml", ".json")
CONFIG = Path("examples") / "darts_rnn.yml"  # the argument for `nnictl create --config`


def example_files() -> dict[Path, Path]:
    """Path in the user's folder -> file of this installation: in the checkout if the package runs from one, otherwise in share/nni_darts_rnn."""
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "setup.cfg").is_file() and (checkout / CONFIG).is_file():
        return _in(checkout)
    found = {}
    try:
        for path in files("nni-darts-rnn") or ():
            if path.suffix in SUFFIXES and path.parts[-4:-2] == ("share", "nni_darts_rnn") and path.parts[-2] in FOLDERS:
                found[Path(*path.parts[-2:])] = Path(path.locate()).resolve()
    except PackageNotFoundError:
        pass
    found = {name: path for name, path in found.items() if path.is_file()}
    for root in (checkout, Path(sysconfig.get_path("data"))):  # first beside the package, where `pip install --target` puts them
        found = found or _in(root / "share" / "nni_darts_rnn")
    if CONFIG not in found:
        raise ValueError(f"{CONFIG} is not part of this installation; install nni-darts-rnn from a wheel or a checkout")
    return found


def _in(root: Path) -> dict[Path, Path]:
    return {path.relative_to(root): path for folder in FOLDERS for path in sorted((root / folder).glob("*")) if path.suffix in SUFFIXES}


def write_examples(folder: Path, force: bool = False) -> list[Path]:
    """Write the example files below `folder`, each completely or not at all. `ValueError`, before anything is written, if one of their folders exists as a
    file, or (without `force`) if a file of the same name but other content exists."""
    texts = {folder / name: source.read_text(encoding="utf-8") for name, source in example_files().items()}
    for parent in dict.fromkeys(path.parent for path in texts):
        if parent.exists() and not parent.is_dir():
            raise ValueError(f"{parent} is a file, but a folder of that name is needed; give another place")
    taken = [path for path, text in texts.items() if (path.exists() or path.is_symlink()) and not _holds(path, text)]
    if taken and not force:
        raise ValueError(f"{taken[0]} exists{f', and {len(taken) - 1} more of these files' if taken[1:] else ''}; --force replaces what is there")
    return [write_text(path, text) for path, text in texts.items()]


def _holds(path: Path, text: str) -> bool:
    return path.is_file() and path.read_bytes() == text.encode("utf-8")
