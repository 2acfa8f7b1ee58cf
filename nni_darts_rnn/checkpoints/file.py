"""One checkpoint on disk, in two files: safetensors for the tensors, JSON for the rest, each with a checksum.

The tensors are written first. The JSON file, which names their SHA-256, is written last, so without it there is no checkpoint.
Nothing in the files is executed when they are read.
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
    """Write `path` + ".safetensors" and `path` + ".json". `state` is a nest of dictionaries, lists and tuples with tensors, numbers, texts and None in it;
    `about` is a dictionary for JSON. `OSError` if the disk refuses a file; an older file of that name then stays, but older JSON does not fit new
    tensors: that checkpoint is damaged."""
    skeleton, tensors = flatten(state)
    with whole(path.with_suffix(TENSORS)) as temporary:
        try:
            safetensors.torch.save_file(tensors, temporary, metadata={"format": FORMAT})
        except safetensors.SafetensorError as error:  # its text contains the system's message
            raise OSError(one_line(error)) from None
        sha256 = digest(temporary)
    write_text(path.with_suffix(DESCRIPTION),
               sealed({"format": FORMAT, "version": FORMAT_VERSION, **about, "sha256": sha256, "state": skeleton}))


def read_about(path: Path) -> dict:
    """The content of a checkpoint's JSON file. `ValueError` with one line if it cannot be read, or if its format, version or checksum is wrong."""
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
    """The state of a checkpoint; `about` is what `read_about` returned. `ValueError` with one line if the tensors are damaged or of another checkpoint."""
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
    """Split a state into what JSON can hold, and its tensors by name. A tensor that occurs in several places (tied weights) is kept once.

    `TypeError` for anything that is not a container, a tensor, a real number, a text or None.
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
    """The inverse of `flatten`. `KeyError`, `TypeError` or `ValueError` for what `flatten` does not write."""
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
    """The state of every global random generator: Python's, numpy's, torch's on the CPU and, if CUDA has been used, on every CUDA device."""
    numpy: Any = np.random.get_state()  # always a tuple; numpy's types before 2.5 also allow a dictionary
    kind, keys, *rest = numpy
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return {"python": random.getstate(), "numpy": (kind, keys.tolist(), *rest), "torch": torch.get_rng_state(), "cuda": cuda}


def restore_random_state(state: dict) -> None:
    """Set the generators to a state of `random_state`. Those of CUDA are set only if the state has as many devices as this machine."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
