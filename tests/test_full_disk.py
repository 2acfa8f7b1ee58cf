"""A full disk: a checkpoint that does not fit is said and costs nothing else; a model that does not fit ends the run with one line."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from crashes import phase

from nni_darts_rnn import files

pytestmark = pytest.mark.filterwarnings("ignore")


def full(monkeypatch, suffix: str) -> None:
    """A disk that takes no file with this suffix: the write fails as the system makes it fail."""
    original = files._to_disk

    def to_disk(path):
        if str(path).endswith(suffix):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        original(path)

    monkeypatch.setattr(files, "_to_disk", to_disk)


def test_no_room_for_checkpoints(tmp_path, monkeypatch, caplog):
    full(monkeypatch, ".safetensors")
    with pytest.raises(OSError, match="No space left on device"):  # of the model, at the end
        phase("retrain", tmp_path, every=5)
    assert "no checkpoint was written (No space left on device); there is none yet" in caplog.text
    monkeypatch.undo()
    phase("retrain", tmp_path, every=5)
    assert (tmp_path / "model.safetensors").exists()


def test_no_room_for_the_best_model(tmp_path, monkeypatch):
    save = torch.save

    def no_room(state, path, **kwargs):
        raise RuntimeError("basic_ios::clear: iostream error")  # as seen on a tmpfs without room

    monkeypatch.setattr(torch, "save", no_room)
    with pytest.raises(OSError, match=r"the best model cannot be written \(basic_ios::clear: iostream error\): '.*best.pth'") as caught:
        phase("retrain", tmp_path, every=5)
    assert "\n" not in str(caught.value) and not list(tmp_path.glob(".nni-darts-rnn-*"))
    monkeypatch.setattr(torch, "save", save)
    phase("retrain", tmp_path)
    assert not list(tmp_path.glob(".nni-darts-rnn-*"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a file that is always full is Linux's")
def test_what_could_not_be_written_is_named(tmp_path, monkeypatch):
    """The system itself names no file where a write fails, or where a file system has no locks."""
    with pytest.raises(OSError, match=r"No space left on device: '.*table.csv'"), files.whole(tmp_path / "table.csv"), open("/dev/full", "w") as full:
        full.write("x")
        full.flush()
    if files.fcntl:
        def no_locks(*_):
            raise OSError(errno.ENOSYS, "Function not implemented")

        monkeypatch.setattr(files.fcntl, "flock", no_locks)
        with pytest.raises(OSError, match=r"Function not implemented: '.*lock'"):
            files.hold(tmp_path / "lock")
