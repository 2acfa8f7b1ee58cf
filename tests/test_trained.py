import hashlib
import json
import pickle

import pytest
import safetensors.torch
import torch

from nni_darts_rnn import trained
from nni_darts_rnn.files import sealed
from nni_darts_rnn.genotype import DARTS_V2
from nni_darts_rnn.model import LanguageModel
from nni_darts_rnn.supernet import MixedRNN
from nni_darts_rnn.trained import load_trained, save_trained

WORDS = ["<eos>", "<unk>", "naïve", "\"quoted\\", "日本", "\ud800"]


def model(seed=0, dtype=torch.float32) -> LanguageModel:
    torch.manual_seed(seed)
    return LanguageModel.from_genotype(len(WORDS), 4, DARTS_V2, dropout=0.1, dropout_h=0.2, dropout_x=0.3, dropout_i=0.4, dropout_e=0.05).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_round_trip(tmp_path, dtype):
    before = model(dtype=dtype)
    assert save_trained(tmp_path / "new", before, WORDS, {"seed": 3, "result": [1.5, None]}) == tmp_path / "new"
    after, words = load_trained(tmp_path / "new")
    assert words == WORDS and not after.training
    for name, t in before.state_dict().items():
        assert t.dtype == after.state_dict()[name].dtype and torch.equal(t, after.state_dict()[name]), name
    assert after.decoder.weight is after.encoder.weight
    assert str(after) == str(before) and after.rnn.genotype == DARTS_V2
    for name in ("dropout", "dropout_i", "dropout_e"):
        assert getattr(after, name) == getattr(before, name)
    described = json.loads((tmp_path / "new" / "model.json").read_text())
    assert described["extra"] == {"seed": 3, "result": [1.5, None]} and described["packages"]["torch"] == torch.__version__


def test_tied_weight_is_stored_once(tmp_path):
    save_trained(tmp_path, model(), WORDS)
    from safetensors import safe_open
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["decoder.bias", "encoder.weight", "rnn.W0", "rnn.Ws"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.json", "model.safetensors"]


def refused(folder, match):
    with pytest.raises(ValueError, match=match or None) as caught:
        load_trained(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "model.json"])
def test_truncated_and_flipped_files(tmp_path, name):
    save_trained(tmp_path, model(), WORDS)
    path = tmp_path / name
    whole = path.read_bytes()
    for end in (0, 1, 7, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:end])
        refused(tmp_path, "SHA-256" if name == "model.safetensors" else "not a model's description")
    for at in range(0, len(whole), 101 if name == "model.safetensors" else 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1:])
        refused(tmp_path, "SHA-256" if name == "model.safetensors" else "")
    path.write_bytes(whole)
    load_trained(tmp_path)
    path.unlink()
    refused(tmp_path, "cannot be read")


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a file was unpickled",))


def test_foreign_files_are_refused_and_never_unpickled(tmp_path):
    save_trained(tmp_path, model(), WORDS)
    described = json.loads((tmp_path / "model.json").read_text())
    for foreign in (pickle.dumps(Bomb()), b"\x80\x04", b"PK\x03\x04", b"\xff" * 100, b"\x08" + bytes(7) + b"{}      "):
        (tmp_path / "model.safetensors").write_bytes(foreign)
        described["sha256"] = hashlib.sha256(foreign).hexdigest()  # a checksum alone would let them through
        (tmp_path / "model.json").write_text(sealed(described))
        refused(tmp_path, "")
    for foreign in (b"", b"[]", b"{}", b"null", b"\xff\xfe", b"[" * 100_000, b'{"format": "another"}', pickle.dumps(Bomb())):
        (tmp_path / "model.json").write_bytes(foreign)
        refused(tmp_path, "not a model's description")


@pytest.mark.parametrize("key, value, match", [
    ("version", 2, "version 2 of the format"), ("version", None, "version None"), ("sha256", 5, "sha256"),
    ("genotype", {"recurrent": [["relu", 7]]}, "state 7"),
    ("genotype", None, "genotype"), ("words", WORDS[:-1], "expected 6 words"), ("words", "abcdef", "expected 6 words"),
    ("words", [1] * 6, "expected 6 words"),
    ("hidden_size", 10 ** 9, "expected weights of shapes"), ("hidden_size", "4", ""), ("vocab_size", -1, "words"), ("dropouts", {}, "is missing"),
    ("dropouts", 3, ""), ("dropouts", {"dropout": 7, "dropout_i": 0, "dropout_e": 0, "dropout_x": 0, "dropout_h": 0}, "below 1"),
])
def test_changed_descriptions(tmp_path, key, value, match):
    save_trained(tmp_path, model(), WORDS)
    path = tmp_path / "model.json"
    described = json.loads(path.read_text())
    path.write_text(sealed(described | {key: value}))
    refused(tmp_path, match)
    del described[key]
    path.write_text(sealed(described))
    refused(tmp_path, "")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_numbers_in_which_no_cell_can_be_computed(tmp_path, dtype):
    save_trained(tmp_path, model(), WORDS)
    weights = tmp_path / "model.safetensors"
    try:
        weights.write_bytes(safetensors.torch.save({name: t.to(dtype) for name, t in safetensors.torch.load(weights.read_bytes()).items()}))
    except KeyError:
        pytest.skip(f"this version of safetensors has no {dtype}")
    described = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(sealed(described | {"sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}))
    refused(tmp_path, str(dtype))


def test_files_of_two_saves_are_not_mixed(tmp_path):
    save_trained(tmp_path / "a", model(1), WORDS)
    save_trained(tmp_path / "b", model(2), WORDS)
    (tmp_path / "b" / "model.safetensors").write_bytes((tmp_path / "a" / "model.safetensors").read_bytes())
    refused(tmp_path / "b", "of another save")


def test_what_cannot_be_saved_leaves_the_old_files(tmp_path, monkeypatch):
    save_trained(tmp_path, model(1), WORDS)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="5 words for a model of 6"):
        save_trained(tmp_path, model(2), WORDS[:-1])
    with pytest.raises(TypeError):
        save_trained(tmp_path, model(2), WORDS, {"extra": object()})
    with pytest.raises(ValueError, match="MixedRNN"):
        save_trained(tmp_path, LanguageModel(len(WORDS), MixedRNN(4, 4, 2)), WORDS)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trained.Path, "write_bytes", full)
    with pytest.raises(OSError):
        save_trained(tmp_path, model(2), WORDS)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
