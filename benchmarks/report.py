"""One page to look at: the algorithms, their curves, and what else the records hold.

    python benchmarks/report.py                          # the records that README.md links to
    python benchmarks/report.py benchmarks/records/* --output all.html
    python benchmarks/report.py --record benchmarks/records/2026-01-01_report   # needs Chromium

Writes one HTML file that needs nothing else: no server, no network. The curves answer to the
mouse: pointing at an algorithm, in the figure or in its list, brings it to the front, and the
values at the pointer's step are shown. Figures and films of the other records are embedded.

--record keeps pictures of the page as Chromium shows it, on a desktop and on a phone.
"""

import argparse
import base64
import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from figures import curve_of_runs
from machine import ROOT, clean_commit, write_record
from plot import read_record
from train import bootstrap_interval, interquartile_mean

FILMS = {".mp4": "video/mp4", ".webm": "video/webm", ".gif": "image/gif"}
RECORDS = "benchmarks/records/"
SCREENS = {"desktop": (1280, 2600), "phone": (390, 2600)}  # width and height, CSS pixels
LONG = 15  # rows; a longer table opens on a click


def linked_records():
    """[(record, file)] of README.md: in the table of algorithms a file's result, else no file."""
    found = []
    for line in (ROOT / "README.md").read_text().splitlines():
        file = re.match(r"\| \[`(\w+)\.py`\]", line)
        for name in re.findall(rf"\]\({RECORDS}([\w.-]+)\)", line):
            found.append((ROOT / RECORDS / name, file and file[1]))
    return found


def table_of(heading):
    """The first table below a heading of README.md, as rows of cells in Markdown."""
    text = (ROOT / "README.md").read_text()
    if heading not in text:
        sys.exit(f"error: README.md has no heading {heading!r}; run this in the repository.")
    lines = text.split(heading, 1)[1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return [rows[0], *rows[2:]]


def inline(text):
    """Markdown's code, links and line breaks in a cell, as HTML. Links lose their target."""
    text = html.escape(text)
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", text)


def html_table(rows):
    head = "".join(f"<th>{inline(cell)}</th>" for cell in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{inline(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:]
    )
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def title_of(folder):
    """The heading of a record's page."""
    return (folder / "README.md").read_text().splitlines()[0].lstrip("# ")


def curves_of(folders, files):
    """{environment: its curves}, each a dict for the page's script.

    `files`: {record: the files to show of it}; of other records all are shown. A curve's `x` and
    `y` have a value for each evaluation that all seeds have reached, `low` and `high` bound the 95%
    bootstrap interval of the interquartile mean; they are null with one seed. An algorithm that
    several records have is shown with each record's name. Records of over-estimation often hold the
    runs of another record again, so theirs are shown only where no other has any.
    """
    runs = [(folder, run) for folder in folders if has_json(folder) for run in read_record(folder)]
    groups, records = {}, {}
    for folder, run in runs:
        if "evaluation" in run.logs and run.algorithm in files.get(folder, [run.algorithm]):
            groups.setdefault((run.env_id, run.algorithm, folder), []).append(run)
    for env_id, algorithm, folder in groups:
        records.setdefault((env_id, algorithm), []).append(folder)
    for key, found in records.items():
        records[key] = [folder for folder in found if not has_values(folder)] or found
    curves = {}
    for (env_id, algorithm, folder), group in groups.items():
        if folder not in records[env_id, algorithm]:
            continue
        series = [(log.steps, log.returns) for log in (run.logs["evaluation"] for run in group)]
        curve = curve_of_runs(algorithm, series, interquartile_mean, bootstrap_interval)
        if not len(curve.x):
            continue
        several = len(records[env_id, algorithm]) > 1
        bounds = [None if y is None else rounded(y) for y in (curve.low, curve.high)]
        curves.setdefault(env_id, []).append(
            {
                "name": f"{algorithm} ({folder.name})" if several else algorithm,
                "record": folder.name,
                "seeds": len(group),
                "x": np.asarray(curve.x).tolist(),
                "y": rounded(curve.middle),
                "low": bounds[0],
                "high": bounds[1],
            }
        )
    return curves


def has_json(folder):
    return (folder / "results.json").exists()


def has_values(folder):
    """Whether it is a record of over-estimation."""
    return (folder / "values.csv").exists()


def rounded(values):
    return [round(float(value), 3) for value in values]


def embedded(file, kind):
    return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"


def pictures_of(folder):
    """The figures of a record, as HTML; of each the SVG where there is one."""
    found = []
    for png in sorted(folder.glob("*.png")):
        svg = png.with_suffix(".svg")
        file, kind = (svg, "image/svg+xml") if svg.exists() else (png, "image/png")
        alt = html.escape(f"{title_of(folder)}: {png.stem}")
        found.append(f'<img loading="lazy" alt="{alt}" src="{embedded(file, kind)}">')
    return found


def films_of(folder):
    found = []
    for file in sorted(file for file in folder.rglob("*") if file.suffix in FILMS):
        source, name = embedded(file, FILMS[file.suffix]), html.escape(file.stem)
        if file.suffix == ".gif":
            film = f'<img alt="{name}" src="{source}">'
        else:
            film = f'<video controls muted loop playsinline src="{source}"></video>'
        found.append(f"<figure>{film}<figcaption>{name}</figcaption></figure>")
    return found


def section(folder):
    """What a record shows besides learning curves: figures, films and its first table."""
    parts, text = pictures_of(folder) + films_of(folder), (folder / "README.md").read_text()
    tables = re.findall(r"(?:^\|.*\|\n)+", text, re.M)
    if tables:
        rows = [[c.strip() for c in row.strip("|").split("|")] for row in tables[0].splitlines()]
        table = html_table([rows[0], *rows[2:]])
        if len(rows) - 2 > LONG:
            table = f"<details><summary>{len(rows) - 2} rows</summary>{table}</details>"
        parts.append(table)
    name = f'<p class="note">{html.escape(RECORDS + folder.name)}</p>'
    body = "\n".join(parts)
    title = "" if has_values(folder) else f"<h3>{html.escape(title_of(folder))}</h3>"  # all alike
    return f"<section>{title}{name}{body}</section>"


def page_of(folders, files):
    """The whole page as text. `files`: see curves_of."""
    curves = curves_of(folders, files)
    shown = {curve["record"] for group in curves.values() for curve in group}
    values = [folder for folder in folders if has_values(folder)]
    others = [folder for folder in folders if folder.name not in shown and folder not in values]
    sections = [*values, *others]  # which show their own films
    films = [film for folder in folders if folder not in sections for film in films_of(folder)]
    plots = "".join(f'<div class="plot" data-env="{html.escape(env)}"></div>' for env in curves)
    data = json.dumps(curves).replace("<", "\\u003c")
    parts = {
        "ALGORITHMS": html_table(table_of("## The algorithms")),
        "PLOTS": plots or "<p>There is no record of learning curves.</p>",
        "VALUES": "".join(map(section, values)),
        "FILMS": f'<div class="films">{"".join(films)}</div>' if films else "",
        "OTHERS": "".join(map(section, others)),
        "DATA": data,
    }
    text = PAGE
    for name in ("VALUES", "FILMS", "OTHERS"):  # a heading only where there is something
        if not parts[name]:
            text = re.sub(rf"<h2[^>]*>[^<]*</h2>\n{{{{{name}}}}}\n", "", text)
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], text)


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>CleanQ: results</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #222; margin: 0 auto; max-width: 62rem;
  padding: 0 1rem 4rem; }
h1 { margin-bottom: 0; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
h3 { margin-bottom: 0; }
code { font-size: 0.9em; }
img, video { max-width: 100%; height: auto; display: block; margin: 0.5rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; }
th, td { padding: 0.2rem 0.6rem; text-align: left; border-bottom: 1px solid #eee; }
td code { white-space: nowrap; }
.note { color: #666; font-size: 14px; margin-top: 0; }
.plot { display: grid; grid-template-columns: minmax(0, 1fr) 17rem; gap: 0 1rem; margin: 1.5rem 0; }
.plot h3 { grid-column: 1 / -1; }
.plot svg { width: 100%; height: auto; touch-action: pan-y; }
.plot ul { list-style: none; margin: 0; padding: 0; font-size: 14px; }
.plot li button { all: unset; cursor: pointer; display: flex; justify-content: space-between;
  gap: 0.5rem; width: 100%; box-sizing: border-box; padding: 0.15rem 0.4rem; border-radius: 4px; }
.plot li span { overflow-wrap: anywhere; }
.plot li button:focus-visible { outline: 2px solid #0a5fc4; }
.plot li.on button { background: #0a5fc4; color: white; }
.films { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; max-width: 100%; }
figcaption { font-size: 14px; overflow-wrap: anywhere; }
section { margin-top: 2rem; }
@media (max-width: 720px) {
  .plot { grid-template-columns: minmax(0, 1fr); }
  table { min-width: 40rem; }
}
</style>
</head>
<body>
<h1>CleanQ</h1>
<p class="note">Value-based deep reinforcement learning in single files. Every number comes from a
record in the repository, with its command, commit, versions, machine, seeds and raw data.</p>
<h2 id="curves">Learning curves</h2>
<p class="note">The interquartile mean over the seeds of the evaluations; higher is better. Point
at an algorithm: its line comes to the front, with its 95% bootstrap interval. The list shows the
values at the pointer's step, or at the end.</p>
{{PLOTS}}
<h2 id="algorithms">The algorithms</h2>
{{ALGORITHMS}}
<h2 id="values">Over-estimation</h2>
{{VALUES}}
<h2 id="films">Trained agents</h2>
{{FILMS}}
<h2 id="others">Other measurements</h2>
{{OTHERS}}
<script type="application/json" id="data">{{DATA}}</script>
<script>
const data = JSON.parse(document.getElementById("data").textContent);
const PHONE = innerWidth < 720;  // a smaller figure, for labels of the same size
const W = PHONE ? 360 : 640, H = PHONE ? 270 : 380, LEFT = 52, RIGHT = 24, TOP = 10, BOTTOM = 44;
const short = x => Math.abs(x) >= 1e6 ? x / 1e6 + "M" : Math.abs(x) >= 1e3 ? x / 1e3 + "k" : "" + x;

function node(name, attributes, parent, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  if (text !== undefined) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

function ticks(low, high, most) {
  const raw = (high - low) / most, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map(x => x * power).find(x => x >= raw);
  const found = [];
  for (let x = Math.ceil(low / step) * step; x <= high + step * 1e-9; x += step)
    found.push(+x.toPrecision(12));
  return found;
}

function valueAt(curve, x) {  // of the last evaluation at x or before; none beyond the curve
  if (x > curve.x[curve.x.length - 1] * 1.02) return null;
  let i = 0;
  while (i + 1 < curve.x.length && curve.x[i + 1] <= x) i++;
  return x < curve.x[0] ? null : curve.y[i];
}

function plot(box, env, curves) {
  const all = key => curves.flatMap(c => c[key] || c.y);
  const xMax = Math.max(...curves.flatMap(c => c.x));
  let low = Math.min(...all("low")), high = Math.max(...all("high"));
  if (low === high) { low -= 1; high += 1; }
  const pad = (high - low) * 0.04;
  const sx = x => LEFT + x / xMax * (W - LEFT - RIGHT);
  const sy = y => H - BOTTOM - (y - low + pad) / (high - low + 2 * pad) * (H - TOP - BOTTOM);
  const heading = document.createElement("h3");
  heading.textContent = env;
  box.append(heading);
  const svg = node("svg", {viewBox: `0 0 ${W} ${H}`, role: "img",
    "aria-label": `learning curves on ${env}`});
  box.append(svg);
  const text = {"font-size": 13, fill: "#555", "font-family": "system-ui, sans-serif"};
  for (const y of ticks(low, high, 5)) {
    node("line", {x1: LEFT, x2: W - RIGHT, y1: sy(y), y2: sy(y), stroke: "#e8e8e8"}, svg);
    node("text", {...text, x: LEFT - 6, y: sy(y) + 4, "text-anchor": "end"}, svg, short(y));
  }
  for (const x of ticks(0, xMax, 5))
    node("text", {...text, x: sx(x), y: H - BOTTOM + 18, "text-anchor": "middle"}, svg, short(x));
  node("text", {...text, x: (LEFT + W) / 2, y: H - 6, "text-anchor": "middle"}, svg,
    "agent steps");
  const points = (c, key) => c.x.map((x, i) => `${sx(x).toFixed(1)},${sy(c[key][i]).toFixed(1)}`);
  const band = node("polygon", {fill: "#0a5fc4", "fill-opacity": 0.18}, svg);
  const cursor = node("line", {y1: TOP, y2: H - BOTTOM, stroke: "#999", visibility: "hidden"}, svg);
  const lines = curves.map(c => node("polyline", {points: points(c, "y").join(" "), fill: "none",
    "stroke-linejoin": "round"}, svg));
  const list = document.createElement("ul");
  box.append(list);
  const items = curves.map((c, i) => {
    const item = document.createElement("li"), button = document.createElement("button");
    button.append(document.createElement("span"), document.createElement("b"));
    button.firstChild.textContent = c.name + (c.seeds === 1 ? ", 1 seed" : "");
    button.addEventListener("pointerenter", () => choose(i));
    button.addEventListener("focus", () => choose(i));
    button.addEventListener("click", () => choose(i));
    item.append(button);
    list.append(item);
    return item;
  });
  function choose(chosen) {
    lines.forEach((line, i) => {
      line.setAttribute("stroke", i === chosen ? "#0a5fc4" : "#a0a0a0");
      line.setAttribute("stroke-width", i === chosen ? 3 : 1.3);
      items[i].classList.toggle("on", i === chosen);
    });
    const c = curves[chosen];
    svg.append(lines[chosen]);
    band.setAttribute("points", c.low
      ? points(c, "high").concat(points(c, "low").reverse()).join(" ") : "");
  }
  function show(x) {  // the values at x; without it, at the end of each curve
    items.forEach((item, i) => {
      const y = x === undefined ? curves[i].y[curves[i].y.length - 1] : valueAt(curves[i], x);
      item.querySelector("b").textContent = y === null ? "" : y.toFixed(Math.abs(y) < 100 ? 1 : 0);
    });
  }
  svg.addEventListener("pointermove", event => {
    const frame = svg.getBoundingClientRect();
    const px = (event.clientX - frame.left) / frame.width * W;
    const py = (event.clientY - frame.top) / frame.height * H;
    const x = Math.min(Math.max((px - LEFT) / (W - LEFT - RIGHT) * xMax, 0), xMax);
    cursor.setAttribute("visibility", "visible");
    cursor.setAttribute("x1", sx(x));
    cursor.setAttribute("x2", sx(x));
    let best = -1, nearest = 1e9;
    curves.forEach((c, i) => {
      const y = valueAt(c, x);
      if (y !== null && Math.abs(sy(y) - py) < nearest) [best, nearest] = [i, Math.abs(sy(y) - py)];
    });
    if (best >= 0) choose(best);
    show(x);
  });
  svg.addEventListener("pointerleave", () => {
    cursor.setAttribute("visibility", "hidden");
    show();
  });
  choose(0);
  show();
}

for (const box of document.querySelectorAll(".plot"))
  plot(box, box.dataset.env, data[box.dataset.env]);
</script>
</body>
</html>
"""


def take_pictures(page, folder):
    """Write the top of the page as Chromium shows it on each of SCREENS, as PNG."""
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if browser is None:
        sys.exit("error: --record needs Chromium: apt install chromium.")
    folder.mkdir(parents=True, exist_ok=True)
    for name, (width, height) in SCREENS.items():
        png = (folder / f"{name}.png").resolve()
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--window-size={width},{height}", "--virtual-time-budget=5000"]
        command += [f"--screenshot={png}", page.resolve().as_uri()]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0 or not png.exists():
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            sys.exit(f"error: Chromium took no picture ({last}).")


def report_of(sizes):
    lines = ["# The page of report.py", ""]
    lines += [
        f"{sizes['bytes'] / 1e6:.1f} MB, {len(sizes['records'])} records. Its top in Chromium:"
    ]
    for name, (width, height) in SCREENS.items():
        lines += [
            "",
            f"{name.capitalize()}, {width} x {height} pixels:",
            "",
            f"![{name}]({name}.png)",
        ]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", nargs="*", type=Path, help="default: those README.md links to")
    parser.add_argument("--output", type=Path, default=Path("report.html"))
    parser.add_argument("--record", type=Path, help="folder for pictures of the page")
    args = parser.parse_args()
    commit = clean_commit() if args.record else None
    folders, files = args.records, {}
    if not folders:
        for folder, file in linked_records():
            if file:
                files.setdefault(folder, []).append(file)
            folders.append(folder)
        folders = [*dict.fromkeys(folders)]
    for folder in folders:
        if not folder.is_dir():
            sys.exit(f"error: {folder} is not a folder; give folders of records.")
        if not (folder / "README.md").exists():
            sys.exit(f"error: {folder} is no record: it has no README.md.")
    text = page_of(folders, files)
    try:
        args.output.write_text(text)
    except OSError as e:
        sys.exit(f"error: cannot write {args.output} ({e.strerror}).")
    print(f"{args.output}: {len(text) / 1e6:.1f} MB, {len(folders)} records")
    if args.record:
        take_pictures(args.output, args.record)
        sizes = {"bytes": len(text.encode()), "records": [folder.name for folder in folders]}
        write_record(args.record, sizes, report_of(sizes), commit)


if __name__ == "__main__":
    main()
