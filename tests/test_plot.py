"""Pictures: what they hold, that nothing in them overlaps, and that they are written whole or not at all."""

import csv
import re
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
from matplotlib.colors import to_hex
from matplotlib.patches import FancyBboxPatch, PathPatch, Polygon, Rectangle
from PIL import Image

from nni_darts_rnn.genotype import DARTS_V1, DARTS_V2, ENAS, Genotype, derive
from nni_darts_rnn.plot import OP_COLOURS, animate_cell, layout, plot_alpha, plot_cell, plot_curves
from nni_darts_rnn.plot import alpha as alpha_module
from nni_darts_rnn.plot import cell as cell_module
from nni_darts_rnn.plot import curves as curves_module
from nni_darts_rnn.plot.alpha import probabilities
from nni_darts_rnn.plot.canvas import new_figure, style
from nni_darts_rnn.plot.cell import draw_cell, inches_axes
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


def test_choices_of_one_softmax_are_shown_beside_an_even_draw_of_their_node(tmp_path):
    """Of a late node's 32 choices each has a small probability, which says nothing against it; only an edge's softmax is the same everywhere."""
    with Image.open(plot_alpha(np.zeros((2, 36, 5)), tmp_path / "even.png", relaxation="node")) as image:
        pixels = image.convert("RGB")
        large = [colour for count, colour in pixels.getcolors(1 << 24) if count > 0.03 * pixels.width * pixels.height]
    assert len(large) == 2 and (255, 255, 255) in large  # the background, with the choices that are never drawn; and every other choice


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
    (lambda d: animate_cell(alpha(), [d / "a.gif", d / "b.gif"]), "b.gif: an animation is written to one file"),
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


def drawn(cell, changed=()):
    """The layout of a cell, its axes, and a function from one of its words to (left, bottom, right, top) in inches."""
    place = layout(cell)
    figure = new_figure(place.width, place.height)
    axes = inches_axes(figure, place.width, place.height)
    with style():
        draw_cell(axes, cell, place, changed)
    figure.draw_without_rendering()
    return place, axes, lambda text: text.get_window_extent().extents / figure.dpi


@pytest.mark.parametrize("name", ["v2", "chain", "star", "not all used", "random 11 1"])
def test_what_is_drawn_is_where_the_layout_says(name):
    place, axes, extent = drawn(CELLS[name])
    boxes = [*place.labels.values(), *place.boxes.values()]
    shapes = [patch for patch in axes.patches if isinstance(patch, FancyBboxPatch)]
    assert sorted((p.get_x(), p.get_y(), p.get_width(), p.get_height()) for p in shapes) == sorted((b.x - b.w / 2, b.y - b.h / 2, b.w, b.h) for b in boxes)
    for shape in shapes:
        corners = shape.get_path().get_extents()
        assert np.allclose(corners.bounds, (shape.get_x(), shape.get_y(), shape.get_width(), shape.get_height()))
        assert shape.get_boxstyle().rounding_size <= min(shape.get_width(), shape.get_height()) / 2
    for text in axes.texts:
        at, = [b for b in boxes if abs(text.get_position()[0] - b.x) + abs(text.get_position()[1] - b.y) < 0.02]
        left, bottom, right, top = extent(text)
        assert at.x - at.w / 2 < left and right < at.x + at.w / 2 and at.y - at.h / 2 < bottom and top < at.y + at.h / 2, text
        assert abs((left + right) / 2 - at.x) < 0.03
    heads, lines = ([patch for patch in axes.patches if type(patch) is kind] for kind in (Polygon, PathPatch))
    assert len(heads) == len(lines) == len(place.edges)
    for edge, head, line in zip(place.edges, heads, lines):
        back, tip, other = head.get_xy()[:3]
        assert tuple(tip) == (edge.x2, edge.y1) and back[0] == other[0] < edge.x2 and back[1] - edge.y1 == pytest.approx(edge.y1 - other[1])
        start, *_, end = line.get_path().vertices
        assert tuple(start) == (edge.x0, edge.y0) and back[0] < end[0] < edge.x2 and end[1] == edge.y1
        assert to_hex(head.get_facecolor()) == to_hex(line.get_edgecolor()) and line.get_facecolor()[3] == 0


def test_what_the_output_does_not_depend_on_is_dashed_and_what_has_changed_has_a_ring():
    cell = CELLS["not all used"]  # of its nodes the first and the second count
    place, axes, _ = drawn(cell, changed=(2, 3))
    shapes = [patch for patch in axes.patches if isinstance(patch, FancyBboxPatch)]

    def around(box):
        return [p for p in shapes if p.get_x() + p.get_width() / 2 == pytest.approx(box.x) and p.get_y() + p.get_height() / 2 == pytest.approx(box.y)]

    for i, (op, _) in enumerate(cell.recurrent, start=1):
        *ring, node = around(place.boxes[str(i)])
        assert node.get_linestyle() == ("-" if i < 3 else "--")
        assert to_hex(node.get_facecolor()) == (OP_COLOURS[op].lower() if i < 3 else "#ffffff")
        assert len(ring) == (i in (2, 3)) and all(r.get_width() > node.get_width() and r.get_facecolor()[3] == 0 for r in ring)
    lines = [patch for patch in axes.patches if type(patch) is PathPatch]
    assert {e.target for e, line in zip(place.edges, lines) if line.get_linestyle() == "--"} == {"3", "4"}
    for edge, line in zip(place.edges, lines):
        assert edge.op is None or to_hex(line.get_edgecolor()) == OP_COLOURS[edge.op].lower()


def figure_of(monkeypatch, module, plot):
    """The figure that `plot` has saved."""
    kept, save = [], module.save
    monkeypatch.setattr(module, "save", lambda figure, *args, **kwargs: kept.append(figure) or save(figure, *args, **kwargs))
    plot()
    monkeypatch.undo()
    kept[0].draw_without_rendering()
    return kept[0]


def test_a_title_is_above_the_cell(tmp_path, monkeypatch):
    figure = figure_of(monkeypatch, cell_module, lambda: plot_cell(DARTS_V2, tmp_path / "cell.png", title="the published cell"))
    place, title = layout(DARTS_V2), figure.axes[0].texts[0]
    left, bottom, right, top = title.get_window_extent().extents / figure.dpi
    assert title.get_text() == "the published cell" and 0 < left and right < place.width
    assert max(b.y + b.h / 2 for b in place.boxes.values()) < bottom and top < figure.get_figheight()
    assert figure_of(monkeypatch, cell_module, lambda: plot_cell(DARTS_V2, tmp_path / "cell.png")).get_figheight() == place.height


def apart(a, b):
    """Whether two areas have no point in common."""
    return a.x1 <= b.x0 or b.x1 <= a.x0 or a.y1 <= b.y0 or b.y1 <= a.y0


@pytest.mark.parametrize("columns", [1, 2, 4])
def test_panels_of_curves_have_room_for_their_words(tmp_path, monkeypatch, columns):
    names = ["perplexity", "train_perplexity", "valid_perplexity", "another_perplexity"][:columns]
    rows = ROWS[:7] + [{"phase": "retrain", "epoch": e} | {name: (300 + 100 * k) / e for k, name in enumerate(names)} for e in range(1, 31)]
    figure = figure_of(monkeypatch, curves_module, lambda: plot_curves(rows, tmp_path / "curves.svg"))
    page, (first, second) = figure.bbox, figure.axes
    assert apart(first.get_tightbbox(), second.get_tightbbox())
    for axes in figure.axes:
        inside, legend, axis = axes.get_tightbbox(), axes.get_legend().get_window_extent().padded(-1), axes.xaxis.get_tightbbox()
        assert page.x0 <= inside.x0 and inside.x1 <= page.x1 and page.y0 <= inside.y0 and inside.y1 <= page.y1
        assert axes.bbox.width > 4 * figure.dpi and axes.bbox.height > 2.5 * figure.dpi
        assert apart(legend, axis) and (legend.y1 < axis.y0 if columns > 2 else legend.y0 > axes.bbox.y0)
        assert all(tick == int(tick) for tick in axes.get_xticks()) and not len(axes.yaxis.get_minorticklocs())
    assert first.get_ylabel() == "perplexity" and second.get_ylabel() == ""
    assert first.yaxis.get_ticklabels() and not second.yaxis.get_ticklabels()
    drawn, marks = second.lines[::2], second.lines[1::2]
    for k, (line, mark) in enumerate(zip(drawn, marks, strict=True)):
        assert list(line.get_xdata()) == list(range(1, 31)) and list(line.get_ydata()) == [(300 + 100 * k) / e for e in range(1, 31)]
        assert (mark.get_xdata()[0], mark.get_ydata()[0]) == (30, (300 + 100 * k) / 30) and mark.get_color() == line.get_color()
        assert line.get_marker() == "None"  # so many epochs
    assert [line.get_marker() for line in first.lines] == ["o", "o"] and len({line.get_color() for line in drawn}) == columns
    assert first.get_ylim() == second.get_ylim() and first.get_ylim()[0] < 10 and first.get_ylim()[1] > 900


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_lines_begin_and_end_at_their_boxes(cell):
    place = layout(cell)
    for edge in place.edges:
        source, target = place.boxes[edge.source], place.boxes[edge.target]
        assert edge.x2 == pytest.approx(target.x - target.w / 2) and target.y - target.h / 2 < edge.y1 < target.y + target.h / 2
        start, straight, leaves, arrives, bent = edge.bend()
        if edge.x0 == edge.x1:  # a lane from the upper or lower side of its node
            assert edge.x0 == source.x and abs(edge.y0 - source.y) == pytest.approx(source.h / 2) and (edge.y0 > source.y) == (edge.y1 > source.y)
            assert start[0] == straight[0] == leaves[0] == edge.x0 and min(edge.y0, edge.y1) <= straight[1] <= max(edge.y0, edge.y1)
            assert bent[0] > edge.x0
        else:
            assert edge.x0 == pytest.approx(source.x + source.w / 2) and edge.x0 < edge.x1 and source.y - source.h / 2 < edge.y0 < source.y + source.h / 2
            assert start == straight == (edge.x0, edge.y0) and leaves[1] == edge.y0 and bent == (edge.x1, edge.y1)
        assert arrives[1] == bent[1] == edge.y1 and bent[0] < edge.x2
    assert place.boxes["mean"].h < 0.65 + max(e.y1 for e in place.edges if e.target == "mean") - min(e.y1 for e in place.edges if e.target == "mean")


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_rows_and_lanes_are_as_close_as_they_may_be(cell):
    place, parents = layout(cell), {j for _, j in cell.recurrent}
    rows = [(place.boxes[str(i)].y, 1) for i in range(1, cell.n_nodes + 1) if i not in parents]
    lanes = [(e.y1, 0) for e in place.edges if e.target == "mean" and int(e.source) in parents]
    lines = sorted(rows + lanes)
    for (low, row), (high, other) in zip(lines, lines[1:]):
        assert high - low == pytest.approx({2: 0.56, 1: 0.36, 0: 0.19}[row + other])
    for i, (_, j) in enumerate(cell.recurrent, start=1):
        assert place.boxes[str(i)].x > place.boxes[str(j)].x


def test_nodes_stand_in_the_order_of_their_numbers_and_the_deepest_level_with_its_parent():
    star = layout(CELLS["star"]).boxes
    assert [star[str(i)].y for i in range(1, 9)] == sorted((star[str(i)].y for i in range(1, 9)), reverse=True)
    assert star["0"].y == pytest.approx((star["1"].y + star["8"].y) / 2) == pytest.approx(star["out"].y)
    chain = layout(CELLS["chain"]).boxes
    assert len({round(chain[str(i)].y, 6) for i in range(9)}) == 1
    deep = layout(Genotype((("tanh", 0), ("relu", 0), ("tanh", 2), ("relu", 3), ("relu", 0)))).boxes
    assert deep["0"].y == deep["2"].y == deep["3"].y == deep["4"].y and deep["5"].y != deep["0"].y != deep["1"].y


def test_the_map_of_alpha_shows_its_numbers_and_frames_what_is_taken(tmp_path, monkeypatch):
    a, ops = alpha(6), ("none", *OPS)
    p, final = probabilities(a, ops), derive(probabilities(a, ops)[-1], ops)
    figure = figure_of(monkeypatch, alpha_module, lambda: plot_alpha(a, tmp_path / "alpha.svg", ops, epochs=range(3, 9)))
    *maps, bar = figure.axes
    first = {1: 0, 2: 2, 3: 5, 4: 9}  # a node's first row; a row is left free between two nodes
    framed = []
    for k, (op, axes) in enumerate(zip(ops, maps, strict=True)):
        image, = axes.images
        shown = np.ma.filled(image.get_array().astype(float), np.nan)  # (rows, epochs)
        for node, row in first.items():
            edges = node * (node - 1) // 2
            assert np.array_equal(shown[row:row + node], p[:, edges:edges + node, k].T)
        assert len(shown) == 13 and np.isnan(shown[[1, 4, 8]]).all()
        assert image.get_extent() == [2.5, 8.5, 12.5, -0.5] and image.get_clim() == (p.min(), p.max()) and image.get_interpolation() == "none"
        assert axes.get_title() == op and axes.get_xlabel() == ("epoch" if k == 2 else "")
        assert all(tick == int(tick) for tick in axes.get_xticks()) and len(axes.get_xticks()) <= 6
        boxes = [(r.get_y(), r.get_height(), to_hex(r.get_edgecolor())) for r in axes.patches if isinstance(r, Rectangle)]
        assert [(y, h) for y, h, colour in boxes if colour == "#c9ced6"] == [(row - 0.5, node) for node, row in first.items()]
        assert all(r.get_x() == 2.5 and r.get_width() == 6 and not r.get_fill() for r in axes.patches)
        framed += [(y, h, op) for y, h, colour in boxes if colour != "#c9ced6"]
        assert [label.get_text() for label in axes.get_yticklabels()] == ([str(j) for node in first for j in range(node)] if k == 0 else [])
    assert set(framed) == {(first[node] + j - 0.5, 1, op) for node, (op, j) in enumerate(final.recurrent, start=1)} and len(framed) == 4
    page, areas = figure.bbox, [axes.get_tightbbox() for axes in figure.axes] + [text.get_window_extent() for text in figure.texts]
    for k, area in enumerate(areas):
        assert page.x0 <= area.x0 and area.x1 <= page.x1 and page.y0 <= area.y0 and area.y1 <= page.y1
        assert all(apart(area, other) for other in areas[k + 1:])
    assert bar.get_ylim() == (p.min(), p.max())
    names = [text for text in maps[0].texts if text.get_text().startswith("node")]
    assert [text.xy[1] for text in names] == [first[node] + (node - 1) / 2 for node in first]
    labels = maps[0].yaxis.get_tightbbox()
    assert all(text.get_window_extent().x1 <= labels.x0 for text in names)


@pytest.mark.parametrize("spread, width", [(0.0, 0.02), (0.019, 0.02), (0.021, 0.021)])
def test_the_colours_of_what_has_hardly_moved_are_not_spread_out(tmp_path, monkeypatch, spread, width):
    p = np.full((1, 1, 2), 0.5) + np.array([-spread, spread]) / 2
    figure = figure_of(monkeypatch, alpha_module, lambda: plot_alpha(p, tmp_path / "alpha.svg", ("tanh", "relu")))
    low, high = figure.axes[0].images[0].get_clim()
    assert high - low == pytest.approx(width) and (low + high) / 2 == pytest.approx(0.5)


@pytest.mark.parametrize("low, high, ticks", [
    (10, 10000, [10, 100, 1000, 10000]), (1, 1000, [1, 10, 100, 1000]), (20, 100, [20, 50, 100]), (94, 212, [100, 150, 200]), (10, 12.1, [10, 11, 12]),
    (247.5, 253.5, [248, 249, 250, 251, 252, 253]), (1.001, 1.0211, [1.001])])
def test_marks_on_the_axis_of_perplexities(low, high, ticks):
    assert curves_module._log_ticks(low, high) == ticks


def test_every_mark_is_on_the_axis_and_none_close_to_another(tmp_path, monkeypatch):
    for low, high in ((100, 200), (60, 61), (1, 1), (60, 900), (5, 5e6), (250, 251)):
        rows = [{"phase": "search", "epoch": e, "perplexity": v} for e, v in enumerate((high, low))]
        axes, = figure_of(monkeypatch, curves_module, lambda: plot_curves(rows, tmp_path / "curves.svg")).axes
        marks, (bottom, top) = axes.get_yticks(), axes.get_ylim()
        assert bottom <= marks[0] and marks[-1] <= top and len(marks) >= 3
        assert min(np.diff(np.log(marks))) >= np.log(top / bottom) / 10 * (1 - 1e-6)
