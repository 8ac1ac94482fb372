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
from test_benchmarks import SCRIPT, git, make_repository, run

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


def test_over_estimation_is_shown_and_its_runs_are_not_shown_twice(repository):
    records = repository / "benchmarks" / "records"
    again, alone = records / "again", records / "alone"
    for copy in (again, alone):
        shutil.copytree(records / "curves", copy)
        (copy / "values.csv").write_text("step,predicted,true\n")
        (copy / "README.md").write_text("# Over-estimation\n\n| bias |\n|---:|\n| 5.39 |\n")
        (copy / "curve.svg").unlink(missing_ok=True)
        (copy / "curve.png").write_bytes(PNG)
    page = make(repository, records / "curves", again)
    (group,) = data_of(page).values()
    assert [(c["name"], c["record"]) for c in group] == [("one", "curves"), ("two", "curves")]
    section = page.split("Over-estimation</h2>")[1].split("<h2")[0]
    assert base64.b64encode(PNG).decode() in section and "<td>5.39</td>" in section
    assert page.count("benchmarks/records/again") == 1
    (group,) = data_of(make(repository, alone)).values()
    assert [c["record"] for c in group] == ["alone", "alone"], "no other record has them"


def test_a_long_table_opens_on_a_click(repository):
    record = repository / "benchmarks" / "records" / "speed" / "README.md"
    record.write_text("# Speed\n\n| side |\n|---|\n" + "| A |\n" * 15)
    assert "<details>" not in make(repository)
    record.write_text(record.read_text() + "| A |\n")
    assert "<details><summary>16 rows</summary>" in make(repository)


def test_the_page_of_this_repository_has_values_and_films(tmp_path):
    done = run(ROOT, "benchmarks/report.py", "--output", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.html").read_text()
    parts = dict(re.findall(r'<h2 id="(\w+)">[^<]*</h2>(.*?)(?=<h2|<script)', page, re.S))
    assert "DQN - Double DQN" in parts["values"] and "<img" in parts["values"]
    assert "data:image/gif" in parts["films"]


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


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
def test_a_record_has_pictures_of_the_page(repository):
    """The phone's figure is narrower, so the two pictures differ in more than their margins."""
    git(repository, "add", "-A")
    git(repository, "commit", "-q", "-m", "records")
    words = ["--output", repository.parent / "report.html", "--record", "pictures"]
    done = run(repository, "benchmarks/report.py", *words)
    assert done.returncode == 0, done.stderr
    sizes = {}
    for name in ("desktop", "phone"):
        png = (repository / "pictures" / f"{name}.png").read_bytes()
        assert png[:8] == PNG[:8]
        sizes[name] = int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")
    assert sizes == {"desktop": (1280, 2600), "phone": (390, 2600)}
    text = (repository / "pictures" / "README.md").read_text()
    assert "![phone](phone.png)" in text and "- commit: " in text
    assert json.loads((repository / "pictures" / "results.json").read_text())["records"] == [
        *("curves", "later", "speed")
    ]


def test_without_a_browser_a_record_is_refused(repository, tmp_path):
    git(repository, "add", "-A")
    git(repository, "commit", "-q", "-m", "records")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "git").symlink_to(shutil.which("git"))
    words = ["--output", tmp_path / "report.html", "--record", tmp_path / "pictures"]
    done = run(repository, "benchmarks/report.py", *words, PATH=str(tmp_path / "bin"))
    assert done.returncode == 1
    assert done.stderr == "error: --record needs Chromium: apt install chromium.\n"
    assert not (tmp_path / "pictures").exists()
