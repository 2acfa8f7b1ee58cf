"""Pictures: what they hold, that nothing in them overlaps, and that they are written whole or not at all."""

import csv
import re
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
from PIL import Image

from nni_darts_rnn.genotype import DARTS_V1, DARTS_V2, ENAS, Genotype, derive
from nni_darts_rnn.plot import OP_COLOURS, animate_cell, layout, plot_alpha, plot_cell, plot_curves
from nni_darts_rnn.plot.alpha import probabilities
from nni_darts_rnn.supernet import MixedRNN

OPS = ("tanh", "relu", "sigmoid", "identity")


def random_cell(rng, n, part=False):
    pairs = tuple((OPS[rng.integers(4)], int(rng.integers(i))) for i in range(1, n + 1))
    return Genotype(pairs, tuple(rng.permutation(np.arange(1, n + 1))[:max(1, n // 2)].tolist()) if part else ())


_rng = np.random.default_rng(0)
CELLS = {"v1": DARTS_V1, "v2": DARTS_V2, "enas": ENAS, "one": Genotype((("tanh", 0),)),
         "chain": Genotype(tuple((OPS[i % 4], i) for i in range(8))), "star": Genotype(tuple((OPS[i % 4], 0) for i in range(8))),
         "not all used": Genotype((("tanh", 0), ("relu", 1), ("tanh", 1), ("relu", 0)), (2,)),
         **{f"random {n} {k}": random_cell(_rng, n, k % 2 == 1) for n in (2, 5, 8, 11, 20) for k in range(6)}}


def overlap(a, b, gap=0.0):
    return abs(a.x - b.x) < (a.w + b.w) / 2 + gap and abs(a.y - b.y) < (a.h + b.h) / 2 + gap


def points(edge, n: int = 40) -> np.ndarray:
    """Points along the line, (3n, 2)."""
    start, *bezier = (np.array(point) for point in edge.bend())
    t = np.linspace(0, 1, n)[:, None]
    curve = sum(c * (1 - t) ** (3 - k) * t ** k * q for k, (c, q) in enumerate(zip((1, 3, 3, 1), bezier)))
    return np.concatenate([start + (bezier[0] - start) * t, curve, bezier[-1] + (np.array([edge.x2, edge.y1]) - bezier[-1]) * t])


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_layout_is_free_of_collisions(cell):
    place = layout(cell)
    assert set(place.boxes) == {"x", "h", "mean", "out", *map(str, range(cell.n_nodes + 1))}
    assert set(place.labels) == set(map(str, range(1, cell.n_nodes + 1)))
    everything = [*place.boxes.values(), *place.labels.values()]
    for k, a in enumerate(everything):
        assert a.w / 2 < a.x < place.width - a.w / 2 and a.h / 2 < a.y < place.height - a.h / 2
        assert not any(overlap(a, b, 0.04) for b in everything[k + 1:])
    expected = [("x", "0"), ("h", "0"), *((str(j), str(i)) for i, (_, j) in enumerate(cell.recurrent, start=1)),
                *((str(i), "mean") for i in cell.concat), ("mean", "out")]
    assert sorted((e.source, e.target) for e in place.edges) == sorted(expected)
    for e in place.edges:
        if e.op:  # the label sits on the straight part and leaves the arrow's head free
            label = place.labels[e.target]
            assert e.x1 + 0.03 < label.x - label.w / 2 and label.x + label.w / 2 < e.x2 - 0.13 and label.y == e.y1
        for x, y in points(e):
            for name, b in place.boxes.items():
                if name not in (e.source, e.target):
                    assert not (abs(x - b.x) <= b.w / 2 + 0.02 and abs(y - b.y) <= b.h / 2 + 0.02), (e, name)
            for name, b in place.labels.items():
                if name != e.target:
                    assert not (abs(x - b.x) <= b.w / 2 and abs(y - b.y) <= b.h / 2), (e, "label", name)


@pytest.mark.parametrize("cell", [c for name, c in CELLS.items() if "random" not in name or name.endswith("0")])
def test_lines_do_not_cross(cell):
    def segments(e):
        along = points(e, 12)
        return along[:-1], along[1:]

    def side(o, a, b):
        return (a[..., 0] - o[..., 0]) * (b[..., 1] - o[..., 1]) - (a[..., 1] - o[..., 1]) * (b[..., 0] - o[..., 0])

    lines = [(e, *segments(e)) for e in layout(cell).edges]
    for k, (e, a, b) in enumerate(lines):
        for other, c, d in lines[k + 1:]:
            if (e.x0, e.y0) == (other.x0, other.y0):
                continue  # S-bends from one point to different heights stay apart
            p, q, r, s = a[:, None], b[:, None], c[None], d[None]
            crossing = (side(p, q, r) * side(p, q, s) < -1e-12) & (side(r, s, p) * side(r, s, q) < -1e-12)
            assert not crossing.any(), (e, other)


def svg_words(path):
    root = ET.parse(path).getroot()
    assert root.tag.endswith("svg")
    return ["".join(t.itertext()).strip() for t in root.iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("name", ["v2", "enas", "not all used"])
def test_cell(tmp_path, name):
    cell = CELLS[name]
    svg = plot_cell(cell, tmp_path / "cell.svg", title="a <b> & $c$")
    words = svg_words(svg)
    for i in range(cell.n_nodes + 1):
        assert words.count(str(i)) == 1
    for op in OPS:
        assert words.count(op) == sum(o == op for o, _ in cell.recurrent)
    assert "mean" in words and "a <b> & $c$" in words
    text = svg.read_text(encoding="utf-8")
    assert "dc:date" not in text and len(text) < 60_000
    assert all(OP_COLOURS[op].lower() in text for op, _ in cell.recurrent)
    png = plot_cell(cell, str(tmp_path / "cell.PNG"))
    assert png == tmp_path / "cell.PNG" and png.stat().st_size < 60_000
    with Image.open(png) as image:
        image.load()
        assert image.format == "PNG" and image.width > 500
    assert plot_cell(cell, tmp_path / "again.svg", title="a <b> & $c$").read_bytes() == svg.read_bytes()
    assert plot_cell(cell, tmp_path / "again.png").read_bytes() == png.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.png", "again.svg", "cell.PNG", "cell.svg"]


def test_other_ops_and_settings_of_the_caller(tmp_path):
    """A registered op gets a colour and enough room; rcParams neither reach the picture nor are changed; pyplot stays out of it."""
    import matplotlib

    from nni_darts_rnn import genotype

    known = set(genotype._known_ops)
    try:
        genotype.register_op("my_rather_long_activation")
        cell = Genotype((("my_rather_long_activation", 0), ("tanh", 1)))
        test_layout_is_free_of_collisions(cell)
        first = plot_cell(cell, tmp_path / "a.svg").read_bytes()
        with matplotlib.rc_context({"svg.fonttype": "path", "font.size": 30, "axes.facecolor": "black", "savefig.facecolor": "black"}):
            before = dict(matplotlib.rcParams)
            assert plot_cell(cell, tmp_path / "b.svg").read_bytes() == first
            assert dict(matplotlib.rcParams) == before
        assert b"my_rather_long_activation" in first
    finally:
        genotype._known_ops.clear()
        genotype._known_ops.update(known)
    if "matplotlib.pyplot" in sys.modules:
        assert not sys.modules["matplotlib.pyplot"].get_fignums()


def alpha(epochs=6, n=4, k=5, seed=1):
    return np.cumsum(np.random.default_rng(seed).normal(0, 0.3, (epochs, n * (n + 1) // 2, k)), axis=0)


def test_alpha(tmp_path):
    a = alpha()
    svg = plot_alpha(a, tmp_path / "alpha.svg")
    words = svg_words(svg)
    assert {"none", *OPS} <= set(words) and [w for w in words if w.startswith("node")] == [f"node {i}" for i in range(1, 5)]
    p = np.exp(a) / np.exp(a).sum(-1, keepdims=True)
    assert plot_alpha(p, tmp_path / "p.svg").read_bytes() == svg.read_bytes()  # α is shown through softmax
    assert plot_alpha(a + 3.0, tmp_path / "p.svg").read_bytes() == svg.read_bytes()
    with Image.open(plot_alpha(np.zeros((1, 3, 2)), tmp_path / "alpha.png", ("tanh", "relu"))) as image:  # nothing moved, one epoch
        image.load()


@pytest.mark.parametrize("relaxation", ["edge", "node", "gumbel"])
def test_alpha_is_shown_as_the_supernet_reads_it(relaxation, tmp_path):
    supernet = MixedRNN(2, 2, 4, relaxation=relaxation)
    history = []
    for seed in range(3):
        torch.manual_seed(seed)
        torch.nn.init.normal_(supernet.alpha)
        history.append(supernet.alpha.tolist())
    shown = probabilities(history, supernet.primitives, relaxation)
    assert np.allclose(shown[-1], supernet.probabilities().numpy(), rtol=1e-5)
    assert derive(shown[-1], supernet.primitives) == supernet.genotype()
    assert np.array_equal(probabilities(shown, supernet.primitives, relaxation), shown)
    assert (plot_alpha(history, tmp_path / "a.svg", relaxation=relaxation).read_bytes() == plot_alpha(history, tmp_path / "b.svg").read_bytes()) == (relaxation == "edge")


def test_the_epoch_before_a_search_is_number_nought(tmp_path):
    a = alpha(3)
    for epochs, ticks in ((None, {"1", "2", "3"}), ([0, 1, 2], {"0", "1", "2"})):
        words = svg_words(plot_alpha(a, tmp_path / "a.svg", epochs=epochs))
        below = words[words.index("tanh") + 1:words.index("relu")]
        assert {w for w in below if w.isdigit()} == ticks
    assert animate_cell(a, tmp_path / "a.gif", epochs=[0, 1, 2]).read_bytes() != animate_cell(a, tmp_path / "b.gif").read_bytes()
    for epochs in ([0, 1], [0, 2, 3], []):
        with pytest.raises(ValueError, match="epochs: "):
            plot_alpha(a, tmp_path / "c.svg", epochs=epochs)


def test_animation(tmp_path):
    a = alpha(4)
    gif = animate_cell(a, tmp_path / "cell.gif")
    with Image.open(gif) as image:
        assert image.format == "GIF" and image.n_frames == 4
        lasting = []
        for k in range(4):
            image.seek(k)
            lasting.append(image.info["duration"])
        assert lasting == [250, 250, 250, 2250] and image.info["loop"] == 0
    assert animate_cell(a, tmp_path / "again.gif").read_bytes() == gif.read_bytes()
    with Image.open(animate_cell(alpha(9, 1), tmp_path / "few.gif", max_frames=3)) as image:
        assert image.n_frames == 3


def test_a_picture_in_two_formats_is_what_each_is_alone(tmp_path):
    for plot, what in ((plot_cell, DARTS_V2), (plot_alpha, alpha(4)), (plot_curves, ROWS)):
        assert plot(what, [tmp_path / "both.svg", tmp_path / "both.png"]) == tmp_path / "both.svg"
        for suffix in (".svg", ".png"):
            assert plot(what, tmp_path / f"alone{suffix}").read_bytes() == (tmp_path / f"both{suffix}").read_bytes(), (plot, suffix)
    with pytest.raises(ValueError, match="not .gif"):
        plot_cell(DARTS_V2, [tmp_path / "new.svg", tmp_path / "new.gif"])
    assert not (tmp_path / "new.svg").exists()


ROWS = ([{"phase": "search", "epoch": e, "perplexity": 900 / e} for e in range(1, 8)]
        + [{"phase": "retrain", "epoch": e, "perplexity": 300 / e, "train_perplexity": 200 / e} for e in range(1, 5)])


def test_curves(tmp_path):
    svg = plot_curves(ROWS, tmp_path / "curves.svg")
    words = svg_words(svg)
    assert {"search", "retrain", "100", "perplexity (lowest 128.6, epoch 7)", "train perplexity (lowest 50, epoch 4)"} <= set(words)
    with open(tmp_path / "log.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["phase", "epoch", "perplexity", "train_perplexity"])
        writer.writeheader()
        writer.writerows(ROWS)
    assert plot_curves(tmp_path / "log.csv", tmp_path / "again.svg").read_bytes() == svg.read_bytes()
    diverged = [*ROWS, {"phase": "retrain", "epoch": 5, "perplexity": float("nan")}, {"phase": "retrain", "epoch": 6, "perplexity": float("inf")}]
    assert plot_curves(diverged, tmp_path / "again.svg").read_bytes() == svg.read_bytes()
    with Image.open(plot_curves(ROWS[:1], tmp_path / "one.png")) as image:
        image.load()
    for low, high in ((60, 61), (60.001, 60.002), (5, 5e6), (1, 1)):
        plot_curves([{"phase": "search", "epoch": e, "perplexity": v} for e, v in enumerate((high, low))], tmp_path / "again.svg")
        numbers = [float(w) for w in svg_words(tmp_path / "again.svg") if re.fullmatch(r"[\d.]+(e\+\d+)?", w)]
        assert any(low / 1.1 <= v <= high * 1.1 for v in numbers)


@pytest.mark.parametrize("call, words", [
    (lambda d: plot_cell(DARTS_V2, d / "cell.pdf"), "not .pdf"),
    (lambda d: plot_cell(DARTS_V2, d / "cell"), "without a suffix"),
    (lambda d: plot_alpha(alpha(), d / "a.jpg"), "not .jpg"),
    (lambda d: plot_alpha(alpha()[0], d / "a.svg"), "shape"),
    (lambda d: plot_alpha(alpha(k=4), d / "a.svg"), "shape"),
    (lambda d: plot_alpha(alpha()[:0], d / "a.svg"), "shape"),
    (lambda d: plot_alpha(alpha()[:, :4], d / "a.svg"), "fit no number of nodes"),
    (lambda d: plot_alpha(alpha() * np.nan, d / "a.svg"), "diverged"),
    (lambda d: plot_alpha([[1, 2], [3]], d / "a.svg"), "array of numbers"),
    (lambda d: animate_cell(alpha(), d / "a.svg"), "not .svg"),
    (lambda d: animate_cell(alpha(k=3), d / "a.gif"), "shape"),
    (lambda d: plot_curves(ROWS, d / "c.gif"), "not .gif"),
    (lambda d: plot_curves([], d / "c.svg"), "no row"),
    (lambda d: plot_curves([{"phase": "search", "epoch": 1}], d / "c.svg"), "no row"),
    (lambda d: plot_curves([{"phase": "search", "perplexity": 3}], d / "c.svg"), "epoch"),
    (lambda d: plot_curves([{"phase": "search", "epoch": 1, "perplexity": "x"}], d / "c.svg"), "row 1"),
    (lambda d: plot_curves([{"phase": "search", "epoch": 1, "perplexity": 0}], d / "c.svg"), "not possible"),
])
def test_bad_input_is_refused_and_nothing_is_written(tmp_path, call, words):
    with pytest.raises(ValueError, match=words) as caught:
        call(tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_failure_half_way_leaves_the_old_file(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def fail(self, target, *args, **kw):
        with open(target, "wb") as file:
            file.write(b"half")
        raise OSError("disk full")

    old = tmp_path / "cell.svg"
    old.write_text("old")
    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        plot_cell(DARTS_V2, old)
    monkeypatch.undo()
    save = Image.Image.save  # matplotlib's way to PNG too
    monkeypatch.setattr(Image.Image, "save", lambda self, target, *args, **kw: (fail if hasattr(target, "suffix") else save)(self, target, *args, **kw))
    with pytest.raises(OSError, match="disk full"):
        animate_cell(alpha(1, 1), tmp_path / "cell.gif")
    assert [p.name for p in tmp_path.iterdir()] == ["cell.svg"] and old.read_text() == "old"
