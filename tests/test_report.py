"""benchmarks/report.py: one HTML page with what the records hold, and nothing from elsewhere."""

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from test_benchmarks import SCRIPT, make_repository, run

ROOT = Path(__file__).resolve().parent.parent
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
README = """# A project

## The algorithms

| file | algorithm | lines | changed | result |
|---|---|---:|---|---|
| [`one.py`](algos/one.py) | One | 1 | - | [2 of 2](benchmarks/records/curves) |
| [`two.py`](algos/two.py) | Two & more | 1 | - | [2 of 2](benchmarks/records/later) |

Speed: [record](benchmarks/records/speed).
"""
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A repository with two records of curves, one of something else, and a README."""
    folder = make_repository(tmp_path_factory, {"one": SCRIPT, "two": SCRIPT})
    (folder / "README.md").write_text(README)
    for name, scripts in (("curves", ["one", "two"]), ("later", ["two"])):
        words = ["benchmarks/train.py", "--scripts", *scripts, "--seeds", 1, 2, 3]
        done = run(folder, *words, "--record", f"benchmarks/records/{name}")
        assert done.returncode == 0, done.stderr
    speed = folder / "benchmarks" / "records" / "speed"
    speed.mkdir()
    (speed / "README.md").write_text("# Speed <fast>\n\n| side | rate |\n|---|---:|\n| A | 12 |\n")
    (speed / "rates.png").write_bytes(PNG)
    (speed / "film.mp4").write_bytes(b"film")
    return folder


def make(repository, *words):
    done = run(repository, "benchmarks/report.py", *words)
    assert done.returncode == 0, done.stderr
    return (repository / "report.html").read_text()


def data_of(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])


def test_the_page_holds_the_curves_of_the_linked_records(repository):
    (group,) = (data := data_of(make(repository))).values()
    assert [*data] == ["CartPole-v1"]
    assert [(c["name"], c["record"], c["seeds"]) for c in group] == [
        ("one", "curves", 3),
        ("two", "later", 3),
    ], "README's row decides which record shows a file"
    curve = group[0]
    assert curve["x"] == [100, 200, 300]
    np.testing.assert_allclose(curve["y"], [12.0, 22.0, 32.0])
    for low, middle, high in zip(curve["low"], curve["y"], curve["high"]):
        assert low < middle < high


def test_given_records_are_all_shown_and_told_apart(repository):
    folders = [repository / "benchmarks" / "records" / name for name in ("curves", "later")]
    (group,) = data_of(make(repository, *folders)).values()
    assert [c["name"] for c in group] == ["one", "two (curves)", "two (later)"]


class Tags(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_the_page_needs_nothing_else(repository):
    page = make(repository)
    for tag, attributes in Tags(page).found:
        for name in ("src", "href", "poster", "data"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest", page)


def test_other_records_show_their_table_figures_and_films(repository):
    page = make(repository)
    found = Tags(page).found
    (image,) = [a["src"] for tag, a in found if tag == "img"]
    (film,) = [a["src"] for tag, a in found if tag == "video"]
    assert image == "data:image/png;base64," + base64.b64encode(PNG).decode()
    assert film == "data:video/mp4;base64," + base64.b64encode(b"film").decode()
    assert "<h3>Speed &lt;fast&gt;</h3>" in page and "<td>12</td>" in page
    assert "Two &amp; more" in page and "<code>two.py</code>" in page
    assert "Over-estimation</h2>" not in page, "a heading without anything below it"


@pytest.mark.parametrize(
    "words, message",
    [
        (["nowhere"], "nowhere is not a folder; give folders of records."),
        (["algos"], "algos is no record: it has no README.md."),
        (["--output", "no/such/folder.html"], "cannot write no/such/folder.html"),
    ],
)
def test_bad_arguments(repository, words, message):
    done = run(repository, "benchmarks/report.py", *words)
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
def test_a_browser_draws_the_curves(repository):
    """Its script runs without an error, and the list shows the last values."""
    make(repository)
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000"]
    command = [BROWSER, *words, "--dump-dom", (repository / "report.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert dom.count("<polyline") == 2 and dom.count("<polygon") == 1
    assert re.findall(r"<span>(\w+)</span><b>([\d.]+)</b>", dom) == [
        ("one", "32.0"),
        ("two", "32.0"),
    ]
    assert "NaN" not in dom
