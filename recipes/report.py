# SPDX-License-Identifier: MIT
"""Writes a page about runs: their scores, samples and training curves.

    python recipes/report.py RUN...    # folders of runs of gan.py; `gan.py eval` gives them scores

Runs that differ in nothing but the seed share a row of the table. Each network that has scored them, and each size of
images, has a table of its own. The page is complete in itself.
"""

import base64
import html
import io
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gan
import metrics
from study import plain, run_name, score_names, show_trunc, table

SPREAD = "Mean ± standard deviation over seeds."
TESTED = "Differences are paired by seed. Student's t at 95% decides what they settle, and errs once in twenty times."
NOISE = "At one trunc all variants get the same noise; with classes, each row is a class, each column one z."
BY_NETWORK = "{n} samples against {n_real} images, by {network} (weights {weights:.8}, resize {resize}, {dtype})."
VARIETY = "Variety: the variance of the samples' features within a class over that of the real images."
ALONE = "{n} samples against {n_real} images. SWD is the sliced Wasserstein distance of patches, without a network."
CURVES = {"loss_D": "loss of D", "loss_G": "loss of G", "real_logit": "logit of real", "fake_logit": "logit of fake"}
STYLE = {
    "font.size": 10,
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "svg.hashsalt": "gan",
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


# ---- The page
def write_report(out, title, variants, rows, sentences=()):
    """Writes the page `out`, an .html.

    variants: {name: folders of its runs, one per seed}; the pictures show the first. rows: plain rows (see study.py)
    with their "variant". sentences: [(question, [answers])].
    """
    sections = [
        section("What one learns", html_answers(sentences)) if sentences else "",
        section("Scores", html_scores(rows, [SPREAD, TESTED] if sentences else [SPREAD])),
        section("Samples", paragraph(NOISE) + "".join(html_pictures(*item, rows) for item in variants.items())),
        section("Losses, and D's mean logits", html_figure(draw_curves(variants), "curves")),
    ]
    for network, some in by_network(rows).items():
        sections.append(section(f"Fidelity against variety, by {network}", draw_truncation(network, some)))
    gan.write_text(out, PAGE.replace("TITLE", html.escape(title)).replace("BODY", "\n".join(filter(None, sections))))


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>TITLE</title><style>
body {max-width: 60rem; margin: auto; padding: 0 1rem 3rem; font: 1rem/1.5 system-ui, sans-serif; color: #222}
h1, h2 {line-height: 1.2} h2 {margin-top: 2.5rem}
.wide {overflow-x: auto} table {border-collapse: collapse; white-space: nowrap; font-variant-numeric: tabular-nums}
th, td {padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #ddd} tr > :first-child {text-align: left}
p, figcaption {color: #444; font-size: .9rem; overflow-wrap: anywhere} dt {font-weight: 600} dd {margin: 0 0 .6rem}
.pictures {display: grid; grid-template-columns: repeat(auto-fit, minmax(7rem, 1fr)); gap: 1rem; margin-bottom: 1rem}
figure {margin: 0; max-width: 19rem; break-inside: avoid} img {width: 100%}
svg {max-width: 100%; height: auto; min-width: 30rem}
@media print {h2 {break-after: avoid} svg {min-width: 0} .wide {overflow: visible} table {font-size: 8pt}
td:first-child {white-space: normal}}
</style></head><body>
<h1>TITLE</h1>
BODY</body></html>
"""


def section(head, content):
    return f"<section><h2>{html.escape(head)}</h2>{content}</section>" if content else ""


def paragraph(text):
    return f"<p>{html.escape(text)}</p>"


def html_answers(sentences):
    parts = []
    for question, answers in sentences:
        parts.append(f"<dt>{html.escape(question)}</dt>")
        parts += [f"<dd>{html.escape(answer)}</dd>" for answer in answers]
    return f"<dl>{''.join(parts)}</dl>"


def html_scores(rows, remarks):
    """Lays out a table for each network, with its name above and how its scores were made below."""
    if not rows:
        return paragraph("No scores: gan.py eval makes them.")
    parts = []
    for network, some in by_network(rows).items():
        parts.append(paragraph(network))
        parts.append(html_table(table(some)))
        made = dict.fromkeys((BY_NETWORK if row["network"] else ALONE).format(**row) for row in some)
        notes = dict.fromkeys(note for row in some for note in row["notes"])
        parts += map(paragraph, [*made, *notes])
        if "variety" in score_names(some):
            parts.append(paragraph(VARIETY))
    return "".join([*parts, *map(paragraph, remarks)])


def html_table(lines):
    body = ""
    for line in lines:
        tag = "th" if line is lines[0] else "td"
        body += f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in line)}</tr>"
    return f'<div class="wide"><table>{body}</table></div>'


def html_pictures(name, runs, rows):
    """Lays out the grids of a variant's first run beside each other, as many in a row as fit."""
    shown = ""
    for title, path in find_grids(runs[0], [row["trunc"] for row in rows if row["variant"] == name]).items():
        caption = html.escape(f"{name}, {title}")
        file = io.BytesIO()
        left_part(path).save(file, "webp", quality=82)
        data = base64.b64encode(file.getvalue()).decode()
        image = f'<img src="data:image/webp;base64,{data}" alt="Samples: {caption}">'
        shown += f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
    return f'<div class="pictures">{shown}</div>'


def find_grids(run, truncs):
    """Finds the grids that eval drew at each trunc; of a run without scores, the newest that training drew."""
    if truncs:
        found = {f"trunc {show_trunc(trunc)}": run.glob(f"eval-trunc-{trunc}.[a-z]*".lower()) for trunc in truncs}
    else:
        found = {"trunc none": sorted(run.glob("samples/*.png"))[-1:]}
    return {title: path for title, paths in found.items() for path in paths}


def left_part(path):
    """Opens a grid, of ten columns, and keeps the six on the left, so that one sees them at the width of a figure."""
    with Image.open(path) as grid:
        part = grid.convert("RGB").crop((0, 0, grid.width * 6 // 10 + 1, grid.height))
    part.thumbnail((420, 4000))  # so that a page stays below a few megabytes
    return part


def html_figure(figure, name):
    """Makes a figure a part of the page, an SVG whose ids are unique there."""
    file = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(file, format="svg")
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)  # the date
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)  # a page knows these
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    label = f'<svg role="img" aria-label="{html.escape(name)}"'
    return f'<div class="wide">{svg.replace("<svg", label, 1)}</div>'


# ---- Figures
def draw_curves(variants):
    """Draws both losses and D's mean logits of all variants in the same axes; further seeds are pale."""
    with matplotlib.rc_context(STYLE):
        figure = Figure((8, 6), layout="constrained")
        panels = figure.subplots(2, 2, sharex=True)
        panels[1, 1].sharey(panels[1, 0])
        for i, (name, runs) in enumerate(variants.items()):
            for seed, run in enumerate(runs):
                style = {"alpha": 0.3, "linewidth": 0.8, "zorder": 1} if seed else {"label": name}
                draw_log(panels.flat, read_log(run), color=f"C{i % 10}", **style)
        for axes, title in zip(panels.flat, CURVES.values()):
            axes.set_title(title, fontsize=10)
        figure.supxlabel("step", fontsize=10)
        add_legend(figure, panels[0, 0])
    return figure


def draw_log(panels, log, **style):
    """Draws each of CURVES in its axes, as a running mean over a fortieth of the log."""
    n = len(log) // 40 + 1
    window = np.ones(n) / n
    for axes, key in zip(panels, CURVES):
        steps = np.convolve([row["step"] for row in log], window, "valid")
        axes.plot(steps, np.convolve([row[key] for row in log], window, "valid"), **style)


def draw_truncation(network, rows):
    """Draws the main score against IS, and precision against recall, over truncs; "" without such scores."""
    names = score_names(rows)
    pairs = [(x, y) for x, y in (("IS", names[0]), ("recall", "precision")) if x in names and y in names]
    if not pairs:
        return ""
    with matplotlib.rc_context(STYLE):
        figure = Figure((8, 4), layout="constrained")
        panels = figure.subplots(1, len(pairs), squeeze=False)[0]
        for axes, (x, y) in zip(panels, pairs):
            axes.set(xlabel=x, ylabel=y)
            for variant in dict.fromkeys(row["variant"] for row in rows):
                draw_path(axes, [row for row in rows if row["variant"] == variant], x, y, variant)
        add_legend(figure, panels[0])
    return html_figure(figure, f"truncation-{run_name(network)}")


def draw_path(axes, rows, x, y, label):
    """Draws the mean over seeds of scores x and y, from the smallest trunc to none."""
    points = {}
    for row in rows:
        if x in row and y in row:
            points.setdefault(row["trunc"] or math.inf, []).append((row[x], row[y]))
    truncs = sorted(points)
    means = np.array([np.mean(points[trunc], axis=0) for trunc in truncs]).reshape(-1, 2)
    axes.plot(means[:, 0], means[:, 1], marker="o", markersize=4, label=label)
    for trunc, mean in zip(truncs, means):
        shown = show_trunc(None if trunc == math.inf else trunc)
        axes.annotate(shown, mean, (4, 4), textcoords="offset points", fontsize=8)


def add_legend(figure, axes):
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=3, frameon=False)


# ---- Runs
def read_log(run):
    """Reads the records of a run's log.jsonl."""
    return gan.read_rows(Path(run) / "log.jsonl")


def read_scores(run, steps):
    """Reads the scores of a run at this step, plain rows: the last of each network and trunc."""
    rows = {}
    for row in gan.read_rows(run / "eval.jsonl"):
        if row["steps"] == steps:
            rows[row.get("weights"), row["trunc"]] = plain(row)
    return list(rows.values())


def by_network(rows):
    """Groups rows by the network that made them, its weights and the images' size: {a name: rows}."""
    groups = {}
    for row in rows:
        what = (row["network"] or "no network", row.get("weights"), row.get("size"))
        groups.setdefault(what, []).append(row)
    names = [name for name, *_ in groups]
    return {what[0] if names.count(what[0]) == 1 else full_name(*what): some for what, some in groups.items()}


def full_name(network, weights, size):
    """Names a network with what tells its scores from others of that name, as far as it is known."""
    parts = [network, weights and weights[:8], size and f"{size} px"]
    return ", ".join(filter(None, parts))


def group_runs(runs):
    """Groups folders of runs that differ in nothing but the seed; returns variants and rows for write_report."""
    variants = {}
    rows = []
    names = {}
    for run in runs:
        if not (run / "checkpoint.pt").is_file():
            raise gan.UserError(f"{run} is no run of gan.py: it has no checkpoint.pt")
        content = gan.read_checkpoint(run)
        key = repr(replace(content["config"], seed=0, device="", runs="", name=None))
        name = re.sub(r"-seed\d+$", "", run.resolve().name)
        variant = names.setdefault(key, str(run) if name in names.values() else name)
        variants.setdefault(variant, []).append(run)
        who = {"variant": variant, "size": content["config"].size}
        rows += [who | row for row in read_scores(run, content["steps"])]
    return variants, rows


# ---- What other recipes take
def sampling_parser(prog, doc):
    """Makes the parser of a recipe that draws samples of a run: run, --runs, --trunc and --seed."""
    parser = gan.Parser(prog=prog, description=doc.splitlines()[0])
    parser.add_argument("run", nargs="?", help="run, by name or path, or checkpoint file (the newest run)")
    parser.add_argument("--runs", default="runs", help="folder that holds the runs (runs)")
    parser.add_argument("--trunc", type=gan.truncation, help="bound of |z| (none)")
    parser.add_argument("--seed", type=gan.whole_number, default=0, help="seed of the noise (0)")
    return parser


def run_command(function, parser, argv=None):
    """Calls a function with the flags of a command line; what the user did wrong ends in one line and exit status 2."""
    args = parser.parse_args(argv)
    name = parser.prog.split()[0]
    try:
        function(**vars(args))
    except KeyboardInterrupt:
        gan.say(f"{name}: stopped", sys.stderr)
        sys.exit(130)
    except (gan.UserError, metrics.UserError, OSError) as error:
        gan.say(f"{name}: error: {error}", sys.stderr)
        sys.exit(2)


def save_figure(figure, path):
    with gan.atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=80)


# ---- Command
def page(runs, out):
    """Writes the page `out` about folders of runs."""
    if out.suffix != ".html":
        raise gan.UserError(f"--out {out}: give a name that ends in .html")
    write_report(out, "Runs of gan.py", *group_runs(runs))
    gan.say(f"wrote {out}")


def main():
    parser = gan.Parser(prog="report.py", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="page to write (report.html)")
    run_command(page, parser)


if __name__ == "__main__":
    main()
