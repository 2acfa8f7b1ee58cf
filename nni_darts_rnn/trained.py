"""A trained language model on disk, in two files: `model.safetensors` (numbers only, no pickled code) and `model.json` (what is needed to build the model)."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import safetensors
import safetensors.torch

from .cell import RecurrentWeights
from .checks import one_line
from .files import check_seal, sealed, whole, write_text
from .genotype import Genotype, load_genotype
from .model import LanguageModel
from .outputs.versions import package_versions

FORMAT, FORMAT_VERSION = "nni_darts_rnn language model", 1
WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"
TIED = "decoder.weight"  # the same tensor as encoder.weight, which alone is stored
DROPOUTS = ("dropout", "dropout_i", "dropout_e")
RNN_DROPOUTS = ("dropout_x", "dropout_h")
DTYPES = {"torch.float64", "torch.float32", "torch.float16", "torch.bfloat16"}  # a cell can be computed in these


def save_trained(folder: str | Path, model: LanguageModel, vocab_words, extra: dict | None = None) -> Path:
    """Write `model.safetensors` and `model.json` into `folder`, each completely or not at all. Returns the folder.

    `vocab_words` are the V words in the order of their ids. `extra` is anything that JSON can hold (seed, recipe, results); it is stored under "extra".
    `model.json` holds its own SHA-256 and that of the weights, so `load_trained` refuses damaged files and two files of different saves. `ValueError` if
    the number of words is not the model's V, or if the recurrent layer is not of one discrete cell: a `DiscreteRNN`, or an NNI space's layer that was frozen.
    """
    words = [str(word) for word in vocab_words]
    if len(words) != model.vocab_size:
        raise ValueError(f"vocab_words: {len(words)} words for a model of {model.vocab_size}")
    genotype = model.rnn.fixed_genotype() if isinstance(model.rnn, RecurrentWeights) else None
    if genotype is None:
        raise ValueError(f"only a language model of one discrete cell can be saved; its recurrent layer is {type(model.rnn).__name__}")
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items() if name != TIED}
    weights = safetensors.torch.save(tensors, metadata={"format": FORMAT})
    description = {
        "format": FORMAT, "version": FORMAT_VERSION, "sha256": hashlib.sha256(weights).hexdigest(),
        "genotype": json.loads(genotype.to_json()), "vocab_size": model.vocab_size, "hidden_size": model.hidden_size,
        "dropouts": {name: getattr(model, name) for name in DROPOUTS} | {name: getattr(model.rnn, name) for name in RNN_DROPOUTS},
        "packages": package_versions(), "extra": extra or {}, "words": words,
    }
    text = sealed(description)  # before anything is written: it fails if `extra` holds what JSON cannot
    folder = Path(folder)
    with whole(folder / WEIGHTS) as temporary:
        temporary.write_bytes(weights)
    write_text(folder / DESCRIPTION, text)
    return folder


def load_trained(folder: str | Path) -> tuple[LanguageModel, list[str]]:
    """The model, in evaluation mode on the CPU, and its words.

    `ValueError` with one line if a file is missing, cut short, changed, of another kind or of another version of the format. Nothing in the files is executed.
    """
    folder = Path(folder)
    described = read_description(folder)
    path = folder / WEIGHTS
    weights = _read(path)
    if hashlib.sha256(weights).hexdigest() != described["sha256"]:
        raise ValueError(f"{path}: its SHA-256 is not the one in {DESCRIPTION}: the file is damaged or of another save")
    try:
        tensors = safetensors.torch.load(weights)
        genotype = Genotype.from_dict(described["genotype"])
        words, V, H = described["words"], described["vocab_size"], described["hidden_size"]
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words) or len(words) != V:
            raise ValueError(f"expected {V} words")
        N = genotype.n_nodes
        shapes = {"encoder.weight": (V, H), "decoder.bias": (V,), "rnn.W0": (2 * H, 2 * H), "rnn.Ws": (N, H, 2 * H)}
        found = {name: tuple(t.shape) for name, t in tensors.items()}
        if kinds := {str(t.dtype) for t in tensors.values()} - DTYPES:
            raise ValueError(f"expected weights of {', '.join(sorted(DTYPES))}, found {', '.join(sorted(kinds))}")
        if found != shapes:  # checked before a model of that size is built
            raise ValueError(f"expected weights of shapes {shapes}, found {found}")
        model = LanguageModel.from_genotype(V, H, genotype, **{name: described["dropouts"][name] for name in DROPOUTS + RNN_DROPOUTS})
    except KeyError as error:
        raise ValueError(f"{folder / DESCRIPTION}: {error} is missing") from None
    except (TypeError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"{folder}: {one_line(error)}") from None
    model.to(tensors["encoder.weight"].dtype)
    model.load_state_dict(tensors | {TIED: tensors["encoder.weight"]})
    return model.eval(), words


def read_description(folder: str | Path) -> dict:
    """The content of `model.json`. `ValueError` with one line if it cannot be read, or if its format, version or checksum is wrong."""
    path = Path(folder) / DESCRIPTION
    data = _read(path)
    try:
        text = data.decode("utf-8")
        described = json.loads(text)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a model's description ({one_line(error)})") from None
    if not isinstance(described, dict) or described.get("format") != FORMAT:
        raise ValueError(f'{path}: not a model\'s description (expected "format": "{FORMAT}")')
    if described.get("version") != FORMAT_VERSION:
        raise ValueError(f"{path}: version {described.get('version')!r} of the format; this package reads version {FORMAT_VERSION}")
    try:
        check_seal(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(described.get("sha256"), str):
        raise ValueError(f"{path}: 'sha256' is missing")
    return described


def load_searched_model(source: Genotype | str | Path, vocab_size: int | None = None, hidden_size: int | None = None, **dropouts: float) -> LanguageModel:
    """The discrete language model of a genotype, which is given in any form that `load_genotype` takes: a `Genotype`, a name (`DARTS_V2`), a file, a folder.

    If `source` is a folder with a trained model, that model is loaded with its own weights, sizes and dropout rates. No other argument may be given then.
    Otherwise the weights are new. `vocab_size` is then needed, `hidden_size` is 850 by default, and `dropouts` are the rates that
    `LanguageModel.from_genotype` takes. `ValueError` with one line if the model cannot be built or loaded.
    """
    if not isinstance(source, Genotype) and os.path.isfile(Path(source) / DESCRIPTION):
        given = [name for name, value in (("vocab_size", vocab_size), ("hidden_size", hidden_size)) if value is not None] + list(dropouts)
        if given:
            raise ValueError(f"{', '.join(given)}: {source} holds a trained model, which has its own; give the folder alone")
        return load_trained(source)[0]
    genotype = load_genotype(source)
    if vocab_size is None:
        raise ValueError("vocab_size: needed to build a new model; only a folder with a trained model knows its own")
    return LanguageModel.from_genotype(vocab_size, 850 if hidden_size is None else hidden_size, genotype, **dropouts)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error}); a folder written by save_trained is expected, such as that of a retraining or a trial") from None
