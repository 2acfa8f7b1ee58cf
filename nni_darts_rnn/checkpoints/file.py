"""One checkpoint on disk: a safetensors file for tensors, a JSON file for the rest, each with a checksum.

The tensors are written first. The JSON file, which holds their SHA-256, is written last, so a checkpoint exists whole or not at all.
Reading the files executes nothing in them.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..checks import one_line
from ..files import check_seal, digest, sealed, whole, write_text

FORMAT, FORMAT_VERSION = "nni_darts_rnn checkpoint", 1
TENSORS, DESCRIPTION = ".safetensors", ".json"


def write_checkpoint(path: Path, state: dict, about: dict) -> None:
    """Writes `path` + ".safetensors" and ".json". `state` may nest dictionaries, lists and tuples of tensors, numbers, texts and None; `about` is
    anything that JSON can hold. `OSError` where the disk refuses it; a file of the same name then stays as it was."""
    skeleton, tensors = flatten(state)
    with whole(path.with_suffix(TENSORS)) as temporary:
        try:
            safetensors.torch.save_file(tensors, temporary, metadata={"format": FORMAT})
        except safetensors.SafetensorError as error:  # its text says what the system said
            raise OSError(one_line(error)) from None
        sha256 = digest(temporary)
    write_text(path.with_suffix(DESCRIPTION),
               sealed({"format": FORMAT, "version": FORMAT_VERSION, **about, "sha256": sha256, "state": skeleton}))


def read_about(path: Path) -> dict:
    """The content of a checkpoint's JSON file. `ValueError` with one line where its checksum, format or version is not right."""
    file = path.with_suffix(DESCRIPTION)
    try:
        text = file.read_bytes().decode("utf-8")
        about = json.loads(text)
        if not isinstance(about, dict) or about.get("format") != FORMAT:
            raise ValueError(f"no {FORMAT}")
        if about.get("version") != FORMAT_VERSION:
            raise ValueError(f"version {about.get('version')!r} of the format; this package reads version {FORMAT_VERSION}")
        check_seal(text)
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: {one_line(error)}") from None
    return about


def read_state(path: Path, about: dict) -> dict:
    """The state of a checkpoint; `about` is from `read_about`. `ValueError` with one line where the tensors are damaged or belong to another checkpoint."""
    file = path.with_suffix(TENSORS)
    try:
        if digest(file) != about["sha256"]:
            raise ValueError("its SHA-256 is not the one in its JSON file, so it is damaged or of another checkpoint")
        state = rebuild(about["state"], safetensors.torch.load_file(file))
        if not isinstance(state, dict) or not state:
            raise ValueError("its JSON file holds no state")
        return state
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror or error})") from None
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, safetensors.SafetensorError) as error:
        raise ValueError(f"{file}: {one_line(error)}") from None


def flatten(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """(what JSON can hold, tensors by name). A tensor that occurs several times (tied weights) is stored once.

    `TypeError` for what is neither a container, a tensor, a number, a text nor None.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[tuple, str] = {}

    def flat(value, where: str):
        if isinstance(value, Tensor):
            value = value.detach()
            key = (value.data_ptr(), value.shape, value.stride(), value.dtype)
            if key not in names:
                names[key] = where
                tensors[where] = value.cpu().contiguous()
            return {"$tensor": names[key]}
        if value is None or isinstance(value, (bool, str)):
            return value
        if isinstance(value, (int, np.integer)):
            return int(value)
        if isinstance(value, (float, np.floating)):
            return float(value) if math.isfinite(value) else {"$float": str(float(value))}
        if isinstance(value, dict):
            if all(isinstance(key, str) and not key.startswith("$") for key in value):
                return {key: flat(item, f"{where}/{key}") for key, item in value.items()}
            return {"$dict": [[flat(key, where), flat(item, f"{where}/{key}")] for key, item in value.items()]}
        if isinstance(value, (list, tuple)):
            items = [flat(item, f"{where}/{i}") for i, item in enumerate(value)]
            return items if isinstance(value, list) else {"$tuple": items}
        raise TypeError(f"{where}: a {type(value).__name__} cannot be kept in a checkpoint")

    return flat(state, "state"), tensors


def rebuild(skeleton: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `flatten`. `KeyError` or `ValueError` for what `flatten` would not have written."""
    if isinstance(skeleton, list):
        return [rebuild(item, tensors) for item in skeleton]
    if not isinstance(skeleton, dict):
        return skeleton
    mark = next((key for key in skeleton if key.startswith("$")), None)
    if mark is None:
        return {key: rebuild(item, tensors) for key, item in skeleton.items()}
    if mark == "$tensor":
        return tensors[skeleton[mark]]
    if mark == "$float":
        return float(skeleton[mark])
    if mark == "$tuple":
        return tuple(rebuild(item, tensors) for item in skeleton[mark])
    if mark == "$dict":
        return {rebuild(key, tensors): rebuild(item, tensors) for key, item in skeleton[mark]}
    raise ValueError(f"{mark!r} is nothing that a checkpoint holds")


def random_state() -> dict:
    """The state of every global random generator: Python's, numpy's, torch's on the CPU and on every CUDA device in use."""
    numpy: Any = np.random.get_state()  # a tuple; numpy's type hints before 2.5 allow a dictionary too
    kind, keys, *rest = numpy
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return {"python": random.getstate(), "numpy": (kind, keys.tolist(), *rest), "torch": torch.get_rng_state(), "cuda": cuda}


def restore_random_state(state: dict) -> None:
    """Restores what `random_state` returned; CUDA's generators only where there are as many devices as then."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
