"""What TensorBoard is told, read back from its own files; and that a run without it is the same run."""

import pytest

from nni_darts_rnn.files import write_csv
from nni_darts_rnn.genotype import DARTS_V2
from nni_darts_rnn.outputs.tensorboard import watched
from nni_darts_rnn.plot import plot_cell


def rows(first, last):
    return [{"default": 50.0 - e, "phase": "search", "epoch": e, "perplexity": 50.0 - e, "asgd": False, "lr": 0.5} for e in range(first, last)]


def read(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed")
    found = accumulator.EventAccumulator(str(folder / "tensorboard" / "search"), {"images": 0})
    return found.Reload()


def test_rows_and_pictures_reach_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    plot_cell(DARTS_V2, tmp_path / "cell.png")
    heard = []
    with watched(tmp_path, "search", heard.append) as report:
        for row in rows(0, 3):
            report(row)
            assert read(tmp_path).Scalars("perplexity")[-1].value == row["perplexity"]  # while the run goes on
    found = read(tmp_path)
    assert heard == rows(0, 3) and found.Tags()["scalars"] == ["perplexity", "lr"] and found.Tags()["images"] == ["cell"]
    assert [(e.step, e.value) for e in found.Scalars("perplexity")] == [(0, 50.0), (1, 49.0), (2, 48.0)]
    assert found.Images("cell")[0].width > 500 and found.Images("cell")[0].step == 2


def test_a_run_that_goes_on_shows_each_epoch_once(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    for first, last in ((0, 4), (2, 5)):  # cut off after epoch 3, gone on with after epoch 1
        with pytest.raises(KeyboardInterrupt), watched(tmp_path, "search", None) as report:
            for row in rows(first, last):
                report(row)
            raise KeyboardInterrupt
    assert [e.step for e in read(tmp_path).Scalars("perplexity")] == [0, 1, 2, 3, 4]


def test_a_phase_that_had_ended_keeps_its_curves_and_gets_its_pictures(tmp_path):
    """As in a run that was stopped in its second phase, whose first phase then has no row to report."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    with pytest.raises(KeyboardInterrupt), watched(tmp_path, "search", None) as report:
        for row in rows(0, 3):
            report(row)
        raise KeyboardInterrupt
    plot_cell(DARTS_V2, tmp_path / "cell.png")
    write_csv(tmp_path / "search.csv", rows(0, 3))
    with watched(tmp_path, "search", None):
        pass
    found = read(tmp_path)
    assert [e.step for e in found.Scalars("perplexity")] == [0, 1, 2] and [image.step for image in found.Images("cell")] == [2]


def test_without_tensorboard_nothing_is_written(tmp_path, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    heard = []
    with watched(tmp_path, "search", heard.append) as report:
        report(rows(0, 1)[0])
    assert heard == rows(0, 1) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["taken", "\udcff"], ids=["a file is there", "a name that is not UTF-8"])
def test_what_cannot_be_written_costs_a_warning(tmp_path, name):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    folder, heard = tmp_path / name, []
    folder.mkdir()
    if name == "taken":
        (folder / "tensorboard").touch()
    plot_cell(DARTS_V2, folder / "cell.png")
    with pytest.warns(UserWarning, match="nothing more is written for TensorBoard: ") as told, watched(folder, "search", heard.append) as report:
        for row in rows(0, 3):
            report(row)
    assert heard == rows(0, 3) and len(told) == 1
