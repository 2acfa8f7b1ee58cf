"""NNI's web page of a real experiment in a real browser: what a user looks for is there. The report's page is in test_report."""

from __future__ import annotations

import json
import re
import time
import urllib.request

import pytest

TEXT = "return document.body.innerText"


def until(browser, what, seconds=30):
    """The first true answer of `what()`; the page draws itself bit by bit. With the page's words in the failure."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.2)
    raise AssertionError(browser.execute_script(TEXT))


def words(browser, *expected):
    return until(browser, lambda: all(word in browser.execute_script(TEXT) for word in expected))


@pytest.fixture
def page(browser, finished):
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": 1400, "height": 1200, "deviceScaleFactor": 1, "mobile": False})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    return f"http://127.0.0.1:{finished[0].port}"


def test_overview(browser, finished, page):
    experiment, trials, _ = finished
    browser.get(page + "/oview")
    words(browser, experiment.id, "recurrent cells by second-order DARTS", "DONE", "nni_darts_rnn.trial", "GridSearch", "local", "SUCCEEDED")
    values = [json.loads(json.loads(t["finalMetricData"][0]["data"]))["default"] for t in trials]
    words(browser, f"{min(values):.6f}")  # the best metric is the lowest perplexity
    chosen = until(browser, lambda: browser.execute_script("return [...document.querySelectorAll('button.active')].map(b => b.innerText.trim())"))
    assert any(text.endswith("Minimize") for text in chosen) and not any(text.endswith("Maximize") for text in chosen)


def test_trial_list_with_parameters_and_logs(browser, finished, page):
    _, trials, _ = finished
    browser.get(page + "/detail")
    words(browser, "Trial jobs", "SUCCEEDED", "(FINAL)", *(t["trialJobId"] for t in trials))
    assert len(browser.find_elements("css selector", ".ms-DetailsRow")) == len(trials)
    browser.execute_script("arguments[0].click()", browser.find_element("css selector", ".ms-DetailsRow [data-icon-name=ChevronRight]"))
    words(browser, "Parameters", "Log", "seed:")
    tab = next(t for t in browser.find_elements("css selector", "button[role=tab]") if t.text.strip().endswith("Log"))
    browser.execute_script("arguments[0].click()", tab)
    words(browser, "trials/")  # where the log is, and links to it
    with urllib.request.urlopen(f"{page}/api/v1/nni/trial-file/{trials[0]['trialJobId']}/trial.log", timeout=20) as log:
        said = log.read().decode()
    assert re.search(r"corpus short: [\d,]+ training", said) and "seed" in said


@pytest.mark.parametrize("tab, axes", [("Default metric", ["default"]), ("Hyper-parameter", ["seed", "default", "test_perplexity", "parameters"]),
                                       ("Duration", []), ("Intermediate result", ["# Intermediate result"])])
def test_diagrams(browser, page, tab, axes):
    browser.get(page + "/detail")
    words(browser, "Trial jobs", "(FINAL)")
    button = next(b for b in browser.find_elements("css selector", "button[role=tab]") if tab in b.text)
    browser.execute_script("arguments[0].click()", button)
    words(browser, *axes)
    drawn = until(browser, lambda: browser.execute_script("""return [...document.querySelectorAll('canvas')].filter(c => c.width > 400).map(c => {
        const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; const seen = {};
        for (let i = 0; i < d.length; i += 4) if (d[i + 3]) seen[[d[i], d[i + 1], d[i + 2]]] = 1;
        return Object.keys(seen).length})"""))
    assert max(drawn) > 5  # lines and points of several colours, not an empty frame


def test_a_trials_pictures_are_served(finished, page):
    _, trials, _ = finished
    for name, head in (("cell.png", b"\x89PNG"), ("cell.svg", b"<?xml"), ("cell.gif", b"GIF8"), ("curves.png", b"\x89PNG")):
        with urllib.request.urlopen(f"{page}/api/v1/nni/trial-file/{trials[0]['trialJobId']}/{name}", timeout=20) as answer:
            assert answer.read().startswith(head)
