"""One checkpoint on disk: what goes in comes out, and nothing else gets in."""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from nni_darts_rnn.checkpoints import file as checkpoint_file
from nni_darts_rnn.checkpoints.file import (
    flatten,
    random_state,
    read_about,
    read_state,
    rebuild,
    restore_random_state,
    write_checkpoint,
)
from nni_darts_rnn.checkpoints.store import AnotherRun, Checkpoints, unfinished_search
from nni_darts_rnn.files import remove_partial, sealed, whole


def state(seed=0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 4, generator=generator)
    return {"model": {"encoder.weight": weight, "decoder.weight": weight, "none": None, "empty": torch.zeros(0, 2)},
            "optimizer": {"state": {0: {"step": torch.tensor(5.0), "exp_avg": weight.double().t()}}, "param_groups": [{"betas": (0.9, 0.999), "on": True}]},
            "best": math.inf, "rows": [{"perplexity": 0.1 + 0.2, "epoch": 1, "$odd": "text"}], "rollbacks": 0, "random": random_state(),
            "numpy": [np.float64(1 / 3), np.int64(7)], "half": torch.ones(2, dtype=torch.bfloat16), "flags": torch.tensor([True, False])}


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_round_trip(tmp_path):
    kept = state()
    write_checkpoint(tmp_path / "c", kept, {"phase": "search"})
    about = read_about(tmp_path / "c")
    back = read_state(tmp_path / "c", about)
    assert about["phase"] == "search" and same(kept, back)
    assert back["model"]["encoder.weight"] is back["model"]["decoder.weight"]  # kept once
    assert {path.name for path in tmp_path.iterdir()} == {"c.safetensors", "c.json"}
    assert not same(state(0), state(1))
    with pytest.raises(TypeError, match="state/a/1: a object cannot be kept"):
        flatten({"a": [1, object()]})
    with pytest.raises(ValueError, match="nothing that a checkpoint holds"):
        rebuild({"$call": "os.system"}, {})


def test_random_state_goes_on():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    np.random.normal(), torch.randn(3)  # both keep half of a pair of draws
    skeleton, tensors = flatten(random_state())
    drawn = [random.random(), np.random.normal(), torch.randn(5).tolist()]
    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    restore_random_state(rebuild(json.loads(json.dumps(skeleton)), tensors))
    assert [random.random(), np.random.normal(), torch.randn(5).tolist()] == drawn


@pytest.fixture
def two(tmp_path):
    """A store with two good checkpoints; what the older one holds."""
    store = Checkpoints(tmp_path, "search", {"seed": 1})
    old = state(1)
    store.save(0, 1, old)
    store.save(0, 2, state(2))
    return store, old


def files(folder: Path, batch: int) -> list[Path]:
    return [folder / f"search-000000-{batch:08d}{suffix}" for suffix in (".json", ".safetensors")]


def test_flipped_bits_are_noticed_and_the_one_before_is_used(two, caplog):
    store, old = two
    draw = random.Random(0)
    for path in files(store.folder, 2):
        whole = path.read_bytes()
        heads = range(40)  # every byte where the formats say what they are, and random ones after
        for at in [*heads, *(draw.randrange(len(whole)) for _ in range(110))]:
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1:])
            caplog.clear()
            found = store.load()
            assert same(found, old | {"epoch": 0, "batch": 1}), at
            said = [record.getMessage() for record in caplog.records]
            assert len(said) == 1 and str(path) in said[0] and "the one before it is used (epoch 1, batch 2)" in said[0] and "\n" not in said[0]
        path.write_bytes(whole)
    assert store.load()["batch"] == 2


def test_truncated_missing_and_foreign_files(two, tmp_path):
    store, old = two
    for path in files(tmp_path, 2):
        whole = path.read_bytes()
        foreign = [b"", b"{}", b"null", b"[1]", b"\xff\xfe", b"[" * 100_000, b"PK\x03\x04", pickle.dumps({"a": 1}), b"\x08" + bytes(7) + b"{}      ",
                   (tmp_path / path.name.replace("2", "1")).read_bytes()]
        for data in [whole[:end] for end in (1, 8, len(whole) // 2, len(whole) - 1)] + [whole + b"\n"] + foreign:
            path.write_bytes(data)
            assert same(store.load(), old | {"epoch": 0, "batch": 1})
        path.unlink()
        assert store.load()["batch"] == 1
        path.write_bytes(whole)


def test_where_none_is_whole(two, tmp_path):
    store, _ = two
    for batch in (1, 2):
        files(tmp_path, batch)[1].write_bytes(b"torn")
    with pytest.raises(ValueError, match="none of the 2 checkpoints of the search is whole; --resume never begins anew"):
        store.load()
    assert Checkpoints(tmp_path / "nowhere", "search", {}).load() is None and not Checkpoints(tmp_path, "retrain", {})


@pytest.mark.parametrize("change, match", [({"version": 2}, "version 2 of the format"), ({"format": "a"}, "no nni_darts_rnn checkpoint"),
                                           ({"phase": "retrain"}, "not the checkpoint that its name says"), ({"sha256": None}, "SHA-256"),
                                           ({"state": {"$tensor": "gone"}}, "gone"), ({"state": {"$dict": 5}}, ""), ({"state": {"$tensor": []}}, "")])
def test_descriptions_that_are_whole_and_wrong(two, tmp_path, change, match, caplog):
    store, old = two
    path = files(tmp_path, 2)[0]
    path.write_text(sealed(json.loads(path.read_text()) | change))
    assert same(store.load(), old | {"epoch": 0, "batch": 1})
    assert match in caplog.records[-1].getMessage()
    path.write_text(sealed(json.loads(path.read_text()) | {"version": 1, "format": checkpoint_file.FORMAT, "phase": "search", "identity": {"seed": 2}}))
    with pytest.raises(AnotherRun, match="seed: 2 there, 1 here"):
        store.load()


def test_which_are_kept(tmp_path):
    store = Checkpoints(tmp_path, "search", {})
    for position in ((0, 0), (0, 3), (0, 6), (0, 9), (1, 0), (1, 3), (1, 6), (1, 9)):
        store.save(*position, {"at": position, "weight": torch.zeros(1)})
    assert store._positions() == [(1, 0), (1, 6), (1, 9)]  # the newest two, and the last end of an epoch
    assert len(list(tmp_path.iterdir())) == 6
    assert store.roll_back()["at"] == (1, 0) and store._positions() == [(1, 0)]
    store.clear()
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_costs_a_checkpoint_and_not_the_run(two, caplog):
    """The system's own refusal: no file of this process may grow beyond 100 bytes in the meantime."""
    store, _ = two
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        assert store.save(0, 3, state(3)) is False
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "no checkpoint was written (" in caplog.text and "the one before stays (epoch 1, batch 3)" in caplog.text
    assert store.load()["batch"] == 2 and len(list(store.folder.iterdir())) == 4
    assert store.save(0, 3, state(3)) and store.load()["batch"] == 3


def test_tensors_whose_description_has_no_room_do_not_stay(two, monkeypatch):
    store, _ = two
    before = set(store.folder.iterdir())
    monkeypatch.setattr(checkpoint_file, "write_text", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert store.save(0, 3, state(3)) is False and set(store.folder.iterdir()) == before


def test_writing_leaves_the_old_file_or_the_new_one(two, tmp_path, monkeypatch):
    store, _ = two
    monkeypatch.setattr(safetensors.torch, "save_file", lambda *args, **kwargs: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    old = [path.read_bytes() for path in files(tmp_path, 2)]
    assert store.save(0, 2, state(3)) is False
    assert [path.read_bytes() for path in files(tmp_path, 2)] == old


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def loaders(folder: Path):
    """(what it is called, the files it reads, what reads them) of everything in the package that reads a file of somebody else's."""
    from nni_darts_rnn import fused
    from nni_darts_rnn.callbacks import BestModel
    from nni_darts_rnn.corpus import Vocabulary, load_corpus
    from nni_darts_rnn.genotype import load_genotype
    from nni_darts_rnn.outputs import figures
    from nni_darts_rnn.report import experiments
    from nni_darts_rnn.text import download
    from nni_darts_rnn.trained import load_searched_model, load_trained, read_description

    def best_model():
        import torch.nn as nn
        from fastai.data.core import DataLoaders
        from fastai.learner import Learner

        learn = Learner(DataLoaders([], []), nn.Linear(1, 1), loss_func=nn.MSELoss(), path=folder, model_dir=".", cbs=[BestModel()])
        learn.best_model.last_saved_path = folder / "best.pth"
        return learn

    def texts():
        for split in ("train", "valid", "test"):
            shutil.copy(folder / "any", folder / f"{split}.txt")
        return load_corpus(folder)

    def archive():
        (folder / "out").mkdir()
        return download.unpack(folder / "any", folder / "out")

    assert fused  # its compiled library is built from the package's own source, and read from the user's own cache
    store = Checkpoints(folder, "search", {})
    return {
        "checkpoint": (["search-000000-00000000.json", "search-000000-00000000.safetensors"], store.load),
        "load_trained": (["model.json", "model.safetensors"], lambda: load_trained(folder)),
        "load_searched_model": (["model.json", "model.safetensors"], lambda: load_searched_model(folder)),
        "read_description": (["model.json"], lambda: read_description(folder)),
        "load_genotype": (["genotype.json"], lambda: load_genotype(folder)),
        "best model of a fit": (["best.pth"], lambda: best_model().best_model.after_fit()),
        "best model for a checkpoint": (["best.pth"], lambda: best_model().best_model.state_dict()),
        "alpha": (["alpha.json"], lambda: figures.read_alpha(folder)),
        "rows": (["search.csv"], lambda: figures.read_rows(folder)),
        "experiment": (["db/nni.sqlite"], lambda: experiments.load_experiment(str(folder))),
        "texts": (["any"], texts), "archive": (["any"], archive),
        "vocabulary": (["words.json"], lambda: Vocabulary.from_json((folder / "words.json").read_text(encoding="latin-1"))),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["pickle", "torch", "sealed"])
def test_no_loader_unpickles(tmp_path, kind):
    """A malicious pickle, plain or as `torch.save` packs it, in the place of every file that the package reads."""
    for name, (names, load) in loaders(tmp_path / "none").items():
        folder, mark = tmp_path / name.replace(" ", "_"), tmp_path / "unpickled"
        names, load = loaders(folder)[name]
        for file in names:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            if kind == "torch":
                torch.save({"model": Bomb(mark)}, folder / file)
            else:
                (folder / file).write_bytes(pickle.dumps(Bomb(mark)))
        if kind == "sealed" and len(names) == 2:  # a description that vouches for the pickle
            form, version = (checkpoint_file.FORMAT, 1) if name == "checkpoint" else ("nni_darts_rnn language model", 1)
            (folder / names[0]).write_text(sealed({"format": form, "version": version, "phase": "search", "epoch": 0, "batch": 0, "identity": {}, "state": {},
                                                   "sha256": checkpoint_file.digest(folder / names[1]), "genotype": {"recurrent": [["tanh", 0]]},
                                                   "words": ["a"], "vocab_size": 1, "hidden_size": 1, "dropouts": {}}))
        with pytest.raises((ValueError, pickle.UnpicklingError)):  # the latter is torch's refusal
            load()
        assert not mark.exists(), name
    pickle.loads(pickle.dumps(Bomb(mark)))  # it would have gone off
    assert mark.exists()


def test_no_module_unpickles():
    import nni_darts_rnn

    for path in Path(nni_darts_rnn.__file__).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "import pickle" not in text and "joblib" not in text and "marshal" not in text, path
        for line in text.splitlines():
            assert "torch.load(" not in line or "weights_only=True" in line or "safetensors.torch.load(" in line, (path, line)


@pytest.mark.skipif(os.name != "posix", reason="modes and folders on the disk are not Windows's")
def test_a_file_is_on_the_disk_before_its_name_and_open_to_whom_the_user_lets_read(tmp_path, monkeypatch):
    synced, fsync, before = [], os.fsync, os.umask(0o027)
    open_before = len(os.listdir("/dev/fd"))
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append((os.fstat(handle).st_ino, (tmp_path / "best.pth").exists())), fsync(handle)))
    try:
        with whole(tmp_path / "best.pth") as temporary:
            temporary.write_text("numbers")
            temporary.chmod(0o600)  # as a library may make its files
        after = os.umask(before)
    finally:
        os.umask(before)
    path = tmp_path / "best.pth"
    assert synced == [(path.stat().st_ino, False), (tmp_path.stat().st_ino, True)]  # what it holds, then its name
    assert path.stat().st_mode & 0o777 == 0o640 and after == 0o027 and len(os.listdir("/dev/fd")) == open_before


def test_a_kill_leaves_nothing_that_the_next_run_does_not_remove(tmp_path):
    """Nor what a library writes beside the file that it was told to write, and renames: here it is killed before that."""
    code = ("import os, signal, sys; from pathlib import Path; from nni_darts_rnn.files import whole\n"
            "with whole(Path(sys.argv[1]) / 'run.safetensors') as temporary:\n"
            "    (temporary.parent / '.tmpabcdef').write_bytes(b'half')\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n")
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=120).returncode == -signal.SIGKILL
    (tmp_path / "of somebody else").write_text("")
    assert len(list(tmp_path.iterdir())) == 2
    remove_partial(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["of somebody else"]


@pytest.mark.parametrize("state", [[], {}, 5, None, "text"], ids=str)
def test_a_state_that_is_none(two, tmp_path, state):
    """Whole by its checksums, and passed over all the same."""
    store, old = two
    path = next(path for path in files(tmp_path, 2) if path.suffix == ".json")
    path.write_text(sealed(json.loads(path.read_text()) | {"state": state}))
    assert same(store.load(), old | {"epoch": 0, "batch": 1})


@pytest.mark.parametrize("identity", [{}, [], None, {"recipe": {"epochs": "many"}}], ids=str)
def test_a_search_that_is_nobodys_is_not_waited_for(tmp_path, identity):
    Checkpoints(tmp_path, "search", {"recipe": {"epochs": 3}}).save(0, 0, {"a": 1})
    assert unfinished_search(tmp_path)
    (path,) = tmp_path.glob("*.json")
    path.write_text(sealed(json.loads(path.read_text()) | {"identity": identity}))
    assert not unfinished_search(tmp_path)
