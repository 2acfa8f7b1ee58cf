"""The report: what is on the page, that nothing in a trial's files gets into its markup, and that a real browser shows it without complaint."""

import html
import json
import re
import shlex
from html.parser import HTMLParser
from urllib.parse import quote

import pytest

pytest.importorskip("matplotlib")

from test_experiments import home, run, trial_folder, write_experiment, write_mixed, write_trial  # noqa: F401 (home is a fixture)

from nni_darts_rnn.files import write_csv, write_text
from nni_darts_rnn.options import Parser, add_run_options
from nni_darts_rnn.report.experiments import load_experiment
from nni_darts_rnn.report.page import render, write_report, write_trial_report
from nni_darts_rnn.report.pictures import inline_svg
from nni_darts_rnn.report.trial_section import folded

NASTY = "<script>alert('x')</script>\"'&<img src=https://example.org/x.png>"
VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Tags with their attributes, text, and what is wrong with the nesting."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text, self.open, self.wrong = [], "", [], []
        self.feed(text)
        assert not self.open and not self.wrong, (self.open, self.wrong)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        self.text += data

    def named(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The page about an experiment with trials of every kind."""
    folder = tmp_path_factory.mktemp("mixed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        patch.chdir(folder)
        write_mixed(folder)
        assert run("report", "abcd1234") == 0
    return folder / "report.html"  # where it is written unless told otherwise


@pytest.fixture
def source(written):
    return written.read_text(encoding="utf-8")


def test_the_page(source):
    page = Page(source)
    assert page.text.index("Trial bbbbb") < page.text.index("Trial aaaaa")  # the better one first
    for words in ("70.00", "68.00", "163,190", "search.arch_lr", "--set search.arch_lr=0.02", "running; 2 succeeded, 1 running, 1 waiting, 1 failed",
                  "reached epoch 0 of the search: validation perplexity 2000.00", "setting 'search.arch_lrr' is no field", "eeeee",
                  "2023-11-14 22:13 UTC", "Took5 min", "Recipe small, but for:search.arch_lr 0.02 instead of 0.003retrain.clip None instead of 0.25Search",
                  "1bbbbb20.0270.0068.00300.0061 s30 s", "2aaaaa1–80.0078.00300.0061 s30 s", "after each epoch, each trial.",
                  "Counts of single words would have a test perplexity of 512.00, those of pairs 204.50.",
                  "Trials ran with python 3.11.7, torch 2.14.1."):
        assert words in page.text, words
    labels = [attrs["aria-label"] for attrs in page.named("svg")]
    assert len(labels) == 2 * 3 + 1 and all(labels)  # cell, curves and α of each, and the comparison
    assert sum("Cell of trial bbbbb: node 1 reads the input through relu; node 2 reads node 1 through relu" in label for label in labels) == 1
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1 and levels[0] == 1 and all(b - a <= 1 for a, b in zip(levels, levels[1:]))
    assert page.named("html")[0]["lang"] == "en" and page.named("meta")[1]["name"] == "viewport"


def test_ids_are_unique_and_links_lead_somewhere(source):
    page = Page(source)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(set(ids)) == len(ids)
    for _, attrs in page.tags:
        for name, value in attrs.items():
            if name in ("href", "xlink:href") and value.startswith("#"):
                assert value[1:] in ids
            if name in ("clip-path", "style"):
                assert all(found in ids for found in re.findall(r"url\(#([^)]*)\)", value or ""))
            if name == "aria-labelledby":
                assert value in ids


def test_nothing_is_loaded_from_elsewhere_and_no_script(source):
    page = Page(source)
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "object", "embed"}
    for tag, attrs in page.tags:
        assert not any(name.startswith("on") for name in attrs)
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            assert name not in attrs or attrs[name].startswith(("#", "data:")), (tag, attrs)
    assert page.named("link") == [{"rel": "icon", "href": "data:,"}]


def test_whatever_files_say_is_escaped(home):  # noqa: F811
    folder = write_experiment(home, {"aaaaa": ("SUCCEEDED", {"seed": 1, NASTY: NASTY}), "b<i>": ("FAILED", {"seed": 2, NASTY: NASTY}),
                                     "c": ("SUCCEEDED", {})}, f"--corpus {quote(NASTY)} --corpus-mirror {NASTY.split()[0]}", name=NASTY)
    write_trial(trial_folder(folder, "aaaaa"), 80.0)
    result = trial_folder(folder, "aaaaa") / "result.json"
    result.write_text(result.read_text().replace('"python"', '"</footer><script>"').replace("2.14.1", "<b onclick=x>"))
    (trial_folder(folder, "aaaaa") / "cell.svg").write_text(f"<svg onload='x'>{NASTY}</svg>")  # never read
    write_csv(trial_folder(folder, "aaaaa") / "retrain.csv", [{"phase": NASTY, "epoch": 1, "perplexity": 9, NASTY + "_perplexity": 3}])
    write_text(trial_folder(folder, "b<i>") / "trial.stderr", NASTY)
    write_text(trial_folder(folder, "c") / "result.json", NASTY)
    source = render(load_experiment("abcd1234"))
    page = Page(source)
    assert "<script" not in source and "<img" not in source and not page.named("img") and not page.named("i")
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert NASTY in page.text  # all of it, as text
    bad = [attrs for _, attrs in page.tags if "class" in attrs and attrs["class"] == "state failed"]
    assert len(bad) == 2


def test_half_a_character_costs_no_page(home):  # noqa: F811
    folder = write_experiment(home, {"aaaaa": ("SUCCEEDED", {"seed": 1, "\ud800": "\udfff"})})
    write_trial(trial_folder(folder, "aaaaa"), 80.0)
    result = trial_folder(folder, "aaaaa") / "result.json"
    result.write_text(result.read_text().replace("2.14.1", "\\ud801"))
    source = write_report(load_experiment("abcd1234"), home / "report.html").read_text(encoding="utf-8")
    assert r"\ud800" in source and r"\udfff" in source and r"torch \ud801" in source


def test_missing_and_damaged_sources_are_said(home):  # noqa: F811
    folder = write_experiment(home, {"aaaaa": ("SUCCEEDED", {"seed": 1}), "bbbbb": ("SUCCEEDED", {"seed": 2})})
    for trial in ("aaaaa", "bbbbb"):
        write_trial(trial_folder(folder, trial), 80.0)
    (trial_folder(folder, "aaaaa") / "alpha.json").unlink()
    (trial_folder(folder, "aaaaa") / "retrain.csv").write_text("phase,epoch,perplexity\nretrain,1,-4\n")
    (trial_folder(folder, "bbbbb") / "search.csv").unlink()
    (trial_folder(folder, "bbbbb") / "retrain.csv").unlink()
    text = Page(render(load_experiment("abcd1234"))).text
    assert "Not finished" not in text and "Recipe small, as it is." in text
    assert "there is no alpha.json" in text and "a perplexity of -4 is not possible" in text and "there is no search.csv, retrain.csv" in text


def test_no_trial_has_finished(home, capsys):  # noqa: F811
    write_experiment(home, {"aaaaa": ("RUNNING", {"seed": 1})}, status="RUNNING")
    assert run("report", "abcd1234", "--out", "sub/page.html", "--json") == 0
    text = capsys.readouterr()
    assert not text.err and json.loads(text.out)["finished"] == 0
    assert "No trial has finished yet" in Page((home / "sub" / "page.html").read_text()).text
    for out, why in ((home, "is a folder; give a file"), ("", "it is empty; give a file"), ("page.html/x", "page.html is a file; give a folder")):
        (home / "page.html").touch()
        assert run("report", "abcd1234", "--out", out) == 2
        text = capsys.readouterr().err
        assert why in text and len(text.splitlines()) == 1


def test_how_far_those_came_that_have_no_result(home):  # noqa: F811
    folder = write_experiment(home, {"aaaaa": ("RUNNING", {"seed": 1}), "bbbbb": ("RUNNING", {"seed": 2})}, status="NO_MORE_TRIAL")  # the last of them have begun
    assert load_experiment("abcd1234").status == "running"
    for trial, phases in (("aaaaa", ["search"]), ("bbbbb", ["search", "retrain"])):
        for phase in phases:
            write_csv(trial_folder(folder, trial) / f"{phase}.csv", [{"phase": phase, "epoch": epoch, "perplexity": 90.0 - epoch} for epoch in (1, 2)])
    page = Page(render(load_experiment("abcd1234"))).text
    assert "reached epoch 2 of the search: validation perplexity 88.00" in page and "reached epoch 2 of the retraining: validation perplexity 88.00" in page


def test_what_the_command_says(home, capsys):  # noqa: F811
    write_trial(trial_folder(write_experiment(home, {"aaaaa": ("SUCCEEDED", {})}), "aaaaa"), 80.0)
    assert run("report", "abcd1234") == 0
    text = capsys.readouterr()
    assert text.out == "report.html\n"
    assert text.err.splitlines() == ["experiment abcd1234 done: 1 succeeded; drawing", "next: nni-darts-rnn best abcd1234"]


def test_a_trials_own_page_has_commands_for_any_folder(home):  # noqa: F811
    folder, options = home / "trial", Parser()
    add_run_options(options)
    write_trial(folder, 80.0)
    (home / "texts").mkdir()
    page = write_trial_report(folder, options.parse_args(["--corpus", "texts", "--recipe", "small"]), "abcd1234", "aaaaa").read_text()
    commands = html.unescape(page).replace("\\\n", " ")
    assert f"--corpus {home / 'texts'} " in commands and "nni-darts-rnn search" in commands and "nni-darts-rnn retrain" in commands


def test_folded_commands_are_the_same_commands():
    command = shlex.join(["nni-darts-rnn", "search", "--corpus", "a folder's -- name", *[w for k in range(9) for w in ("--set", f"search.x{k}=1")]])
    lines = folded(command)
    assert len(lines.splitlines()) > 1 and max(map(len, lines.splitlines())) < 110
    assert shlex.split(lines.replace("\\\n", "")) == shlex.split(command)
    assert all(line.startswith("    --set ") for line in lines.splitlines()[1:])
    words = "w " * 100
    assert folded(words) == words.strip() and folded(f"{words} --last") == f"{words}\\\n    --last"


def test_ids_of_inline_pictures_do_not_meet():
    svg = '<?xml version="1.0"?><svg width="72pt" height="36pt"><metadata>x</metadata><g id="a"/><use xlink:href="#a" clip-path="url(#a)"/></svg>'
    assert inline_svg(svg, "k", 'a "b"') == ('<svg role="img" aria-label="a &quot;b&quot;" style="--w:96px;aspect-ratio:72/36"><g id="k-a"/>'
                                             '<use xlink:href="#k-a" clip-path="url(#k-a)"/></svg>')


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_in_a_browser(browser, written, width, scheme):
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    browser.get("about:blank")  # the page before, NNI's, goes on loading
    for log in ("browser", "performance"):
        browser.get_log(log)  # what the browser did before
    browser.get(written.as_uri())
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert written.as_uri() in asked and all(url == written.as_uri() or url.startswith("data:") for url in asked)
    wide, inner = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert wide <= inner == width  # wide pictures and tables scroll in their own boxes
    shown = browser.execute_script("return [...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect())")
    assert len(shown) == 7 and all(box["width"] > 100 and box["height"] > 50 for box in shown)
    page, ink = browser.execute_script("const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]")
    bright = [sum(map(int, re.findall(r"\d+", colour)[:3])) / 3 for colour in (page, ink)]
    assert (bright[0] > 200 and bright[1] < 60) if scheme == "light" else (bright[0] < 60 and bright[1] > 200)


def sections(source: str) -> list[str]:
    return source.split('<section class="trial"')[1:]


def test_a_section_is_of_its_trial_and_the_first_lies_open(source):
    first, second = sections(source)
    assert [s.count("<details open>") for s in (first, second)] == [2, 0] and [s.count("<details>") for s in (first, second)] == [1, 3]
    assert ["Cell of trial" in s for s in (first, second)] == [False, True]  # the best one's is at the top of the page
    changed = [re.findall(r'<tr class=changed><th scope="row"><code>(\w+)<', s) for s in (first, second)]
    assert changed == [["arch_lr", "clip"], []]
    assert "<dt>Seed</dt><dd>2</dd>" in first and "<dt>Parameters</dt><dd>163,190</dd>" in first and "<dt>Seed</dt><dd>1</dd>" in second


def test_what_a_result_does_not_say_is_a_dash(home):  # noqa: F811
    path = write_trial(trial_folder(write_experiment(home, {"aaaaa": ("SUCCEEDED", {"seed": 1})}), "aaaaa"), 80.0) / "result.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | dict.fromkeys(("test_perplexity", "bigram_perplexity", "parameters", "search_seconds", "recipe"))))
    page = render(load_experiment("abcd1234"))
    section, = sections(page)
    assert "Counts of" not in page
    for name, value in (("Validation", "80.00"), ("Test", "–"), ("Seed", "1"), ("Search", "–"), ("Retraining", "30 s"), ("Parameters", "–")):
        assert f"<dt>{name}</dt><dd>{value}</dd>" in section, name
