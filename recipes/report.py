# SPDX-License-Identifier: MIT
"""Writes a page about runs: their scores, samples, training curves and a time-lapse.

    python recipes/report.py RUN...    # folders of runs that `gan.py eval` has scored

Runs that differ in nothing but the seed share a row of the table. Writes report.html, which is complete in itself, and
report.md with its pictures report-samples.png, report-curves.svg and report-truncation.svg beside it.

`Study` is the command that wgan.py, conditional.py, dcgan.py and unrolled.py share.
"""

import base64
import html
import io
import json
import math
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torchvision.transforms.functional import InterpolationMode, resize

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gan
import metrics

SCORES = {"FID": 1, "FD": 1, "SWD": 1, "KID": 4, "IS": 2, "precision": 3, "recall": 3}  # name: decimals
TESTED = "Differences are paired by seed. Student's t at 95% decides what they settle, and errs once in twenty times."
LOWER_IS_BETTER = ("FID", "FD", "SWD", "KID")
STYLE = {"font.size": 10, "font.family": "sans-serif", "svg.fonttype": "none", "svg.hashsalt": "gan", "axes.grid": True}
STYLE |= {"grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False}


def write_report(out, title, variants, rows, sentences=()):
    """Writes the page `out`, an .html, and its .md and pictures beside it.

    variants: {name: folders of its runs, one a seed}; the pictures show the first. rows: a dict for each run and trunc,
    with its "variant" and what eval.jsonl says. sentences: [(question, [answers])].
    """
    text, lines, remarks = html.escape, table(rows), describe_scores(rows) + [TESTED] * bool(sentences)
    samples = draw_samples(variants, list(dict.fromkeys(row["trunc"] for row in rows)) or [None])
    figures = {"curves": ("Losses, and D's mean logits", draw_curves(variants))}
    if plot := draw_truncation(rows):
        figures["truncation"] = ("Fidelity against variety", plot)

    # The page.
    said = "".join(f"<dt>{text(q)}</dt>" + "".join(f"<dd>{text(a)}</dd>" for a in answers) for q, answers in sentences)
    parts = [("What one learns", f"<dl>{said}</dl>")] if said else []
    parts += [("Scores", html_table(lines) + "".join(f"<p>{text(remark)}</p>" for remark in remarks))]
    note = (
        "At one trunc, all variants get the same random numbers; with classes, each row is a class, each column one z."
    )
    parts += [("Samples", f"<p>{note}</p>" + "".join(map(html_pictures, samples)))]
    parts += [(head, html_figure(name, svg, head)) for name, (head, svg) in figures.items()]
    moments = (f"<h3>{text(name)}</h3>{html_pictures(time_lapse(runs[0]))}" for name, runs in variants.items())
    parts += [("Time-lapse", "".join(moments))]
    body = "".join(f"<section><h2>{text(head)}</h2>{content}</section>\n" for head, content in parts)
    files = {out.name: re.sub("TITLE|BODY", lambda m: {"TITLE": text(title), "BODY": body}[m[0]], PAGE)}

    # The text and its pictures.
    files |= {f"{out.stem}-samples.png": contact_sheet(samples)}
    files |= {f"{out.stem}-{name}.svg": svg for name, (_, svg) in figures.items()}
    parts = [f"# {title}", *("\n".join([f"{q}\n", *(f"- {a}" for a in answers)]) for q, answers in sentences)]
    grid = [lines[0], ["---"] + ["---:"] * (len(lines[0]) - 1), *lines[1:]]
    parts += ["\n".join(f"| {' | '.join(line)} |" for line in grid), *remarks]
    parts += [f"![{name}]({name})" for name in list(files)[1:]]
    files[f"{out.stem}.md"] = "\n\n".join(parts) + "\n"
    for name, content in files.items():
        with gan.atomic_write(out.with_name(name)) as file:
            file.write(content if isinstance(content, bytes) else content.encode())


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>TITLE</title><style>
body {max-width: 60rem; margin: auto; padding: 0 1rem 3rem; font: 1rem/1.5 system-ui, sans-serif; color: #222}
h1, h2, h3 {line-height: 1.2} h2 {margin-top: 2.5rem} h3 {font-size: 1rem}
.wide {overflow-x: auto} table {border-collapse: collapse; white-space: nowrap; font-variant-numeric: tabular-nums}
th, td {padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #ddd} tr > :first-child {text-align: left}
p, figcaption {color: #444; font-size: .9rem; overflow-wrap: anywhere} dt {font-weight: 600} dd {margin: 0 0 .6rem}
.pictures {display: grid; grid-template-columns: repeat(auto-fit, minmax(7rem, 1fr)); gap: 1rem; margin-bottom: 1rem}
figure {margin: 0; max-width: 19rem; break-inside: avoid} img {width: 100%}
svg {max-width: 100%; height: auto; min-width: 30rem}
@media print {h2, h3 {break-after: avoid} svg {min-width: 0} .wide {overflow: visible} table {font-size: 8pt}
td:first-child {white-space: normal}}
</style></head><body>
<h1>TITLE</h1>
BODY</body></html>
"""


def html_table(lines):
    cells = [("th", line) if line is lines[0] else ("td", line) for line in lines]
    body = ("".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line) for tag, line in cells)
    return f'<div class="wide"><table><tr>{"</tr><tr>".join(body)}</tr></table></div>'


def html_pictures(pictures):
    """Lays out [(caption, PIL image)], as many in a row as fit."""
    shown = []
    for caption, picture in pictures:
        picture = picture.copy()
        picture.thumbnail((420, 4000))  # so that the page stays below a megabyte
        picture.save(file := io.BytesIO(), "webp", quality=82)
        data = f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
        image = f'<img src="{data}" alt="{html.escape(f"Samples: {caption}")}">'
        shown.append(f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>")
    return f'<div class="pictures">{"".join(shown)}</div>'


def html_figure(name, svg, alt):
    """Makes an SVG file a part of the page, whose ids are unique there."""
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg[svg.index("<svg") :])
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)  # a page knows these
    return f'<div class="wide">{svg.replace("<svg", f"""<svg role="img" aria-label="{html.escape(alt)}" """, 1)}</div>'


# ---- The table
def table(rows):
    """Lists lines of cells, the heads first: variant, trunc, number of seeds, mean ± deviation of each score."""
    columns, groups = score_columns(rows), {}
    for row in rows:
        groups.setdefault((row["variant"], show_trunc(row["trunc"])), []).append(row)
    names = list(map(base_name, columns))
    shown = names if len(set(names)) == len(names) else columns  # a line below the table names the network
    heads = (f"{c} {'↓' if base_name(c) in LOWER_IS_BETTER else '↑'}" for c in shown)
    lines = [["variant", "trunc", "seeds", *heads]]
    for key, group in groups.items():
        scores = (mean_and_spread([row[c] for row in group if c in row], SCORES[base_name(c)]) for c in columns)
        lines.append([*key, str(len(group)), *scores])
    return lines


def mean_and_spread(values, decimals=1):
    spread = f" ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{decimals}f}{spread}" if values else "–"


def base_name(score):
    return score.partition("(")[0]  # FD(net) -> FD


def show_trunc(trunc):
    return "none" if trunc in (None, math.inf) else f"{trunc:g}"


def score_columns(rows):
    """Lists the scores that rows have, the main one first: FID or FD, or SWD if not all rows have the same."""
    keys = {key: sum(key in row for row in rows) for row in rows for key in row if base_name(key) in SCORES}
    if any(base_name(key) in ("FID", "FD") and number == len(rows) for key, number in keys.items()):
        keys.pop("SWD", None)
    return sorted(keys, key=lambda key: (keys[key] < len(rows), list(SCORES).index(base_name(key)), key))


def describe_scores(rows):
    """Says in sentences how the scores were made, with eval's notes."""
    how = "{n} samples against {n_real} images, by {network} (weights {weights:.8}, resize {resize}, {dtype})."
    alone = "{n} samples against {n_real} images. SWD is the sliced Wasserstein distance of patches, without a network."
    made = dict.fromkeys((how if row["network"] else alone).format(**row) for row in rows)
    notes = dict.fromkeys(note for row in rows for note in row.get("notes", ()))
    return ["Mean ± standard deviation over seeds.", *made, *notes] if made else ["No scores: gan.py eval makes them."]


# ---- Pictures
def draw_samples(variants, truncs):
    """Draws each variant's first run at each trunc, from the same noise: a list [(caption, PIL image)] a variant."""
    pictures = []
    for name, (run, *_) in variants.items():
        generators = [gan.load_generator(run, trunc=trunc)[0] for trunc in truncs]
        grids = [gan.sample_grid(G, columns=6).permute(1, 2, 0).contiguous().numpy() for G in generators]
        pictures.append([(f"{name}, trunc {show_trunc(t)}", Image.fromarray(grid)) for t, grid in zip(truncs, grids)])
    return pictures


def time_lapse(run, moments=6, rows=3, columns=5):
    """Cuts a corner from up to so many of a run's grids, the first and the last among them: [(caption, PIL image)]."""
    files = sorted((run / "samples").glob("[0-9]*[0-9].png"))
    chosen = dict.fromkeys(files[round(i)] for i in np.linspace(0, len(files) - 1, moments) if files)
    cell = json.loads((run / "config.json").read_text())["size"] + 2  # with the white line
    box = (0, 0, columns * cell + 2, rows * cell + 2)
    return [(f"step {int(file.stem)}", Image.open(file).convert("RGB").crop(box)) for file in chosen]


def contact_sheet(lines):
    """Puts lines [(caption, PIL image)] on one sheet, as the bytes of a PNG."""
    heights = [picture.height / picture.width + 0.13 for (_, picture), *_ in lines]
    figure = Figure((3 * len(lines[0]), 3 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(lines), len(lines[0]), squeeze=False, height_ratios=heights)
    for axes, (caption, picture) in zip(panels.flat, sum(lines, [])):
        axes.imshow(picture)
        axes.axis("off")
        axes.set_title(caption, fontsize=9)
    figure.savefig(file := io.BytesIO(), format="png", dpi=90)
    return file.getvalue()


def draw_curves(variants):
    """Draws both losses and D's mean logits of all variants in the same axes, an SVG; further seeds are pale."""
    keys = {"loss_D": "loss of D", "loss_G": "loss of G", "real_logit": "logit of real", "fake_logit": "logit of fake"}
    with matplotlib.rc_context(STYLE):
        panels = (figure := Figure((8, 6), layout="constrained")).subplots(2, 2, sharex=True)
        panels[1, 1].sharey(panels[1, 0])
        for i, seed, name, run in ((i, s, v, r) for i, v in enumerate(variants) for s, r in enumerate(variants[v])):
            log = read_log(run)
            window = np.ones(len(log) // 40 + 1) / (len(log) // 40 + 1)
            style = {"alpha": 0.3, "linewidth": 0.8, "zorder": 1} if seed else {"label": name}
            for axes, key in zip(panels.flat, keys):
                x, y = (np.convolve([line[k] for line in log], window, "valid") for k in ("step", key))
                axes.plot(x, y, color=f"C{i % 10}", **style)
                axes.set_title(keys[key], fontsize=10)
        figure.supxlabel("step", fontsize=10)
        return save_svg(figure, panels[0, 0])


def draw_truncation(rows):
    """Draws FID against IS and precision against recall over truncs; "" where no network made scores."""
    names = {base_name(column): column for column in score_columns(rows)}
    main = "FID" if "FID" in names else "FD"
    pairs = [(names[x], names[y]) for x, y in (("IS", main), ("recall", "precision")) if x in names and y in names]
    if not pairs:
        return ""
    with matplotlib.rc_context(STYLE):
        panels = (figure := Figure((8, 4), layout="constrained")).subplots(1, len(pairs), squeeze=False)[0]
        for axes, (x, y) in zip(panels, pairs):
            for variant in dict.fromkeys(row["variant"] for row in rows):
                points = {}
                for row in (row for row in rows if row["variant"] == variant and x in row and y in row):
                    points.setdefault(row["trunc"] or math.inf, []).append((row[x], row[y]))
                means = [np.mean(points[trunc], axis=0) for trunc in sorted(points)]
                axes.plot(*np.reshape(means, (-1, 2)).T, marker="o", markersize=4, label=variant)
                for trunc, mean in zip(sorted(points), means):
                    axes.annotate(show_trunc(trunc), mean, (4, 4), textcoords="offset points", fontsize=8)
            axes.set(xlabel=x, ylabel=y)
        return save_svg(figure, panels[0])


def save_svg(figure, axes):
    """Adds the legend of the axes and returns the text of the figure as an SVG, without the date."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=3, frameon=False)
    figure.savefig(file := io.StringIO(), format="svg")
    return re.sub(r"\s*<metadata>.*?</metadata>", "", file.getvalue(), flags=re.DOTALL)


# ---- Runs
def read_log(run):
    """Reads the records of a run's log.jsonl, without a half-written last line."""
    with gan.reading(run / "log.jsonl", "log of gan.py"):
        return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines() if line.endswith("}")]


def read_scores(run, wanted=None):
    """Reads {trunc: row} of a run's newest step from eval.jsonl: rows for which wanted(row), or of the last network."""
    rows = gan.read_rows(run / "eval.jsonl")
    if not rows:
        return {}
    with gan.reading(run / "eval.jsonl", "eval.jsonl of gan.py"):
        newest, network = max(row["steps"] for row in rows), rows[-1]["network"]
        wanted = wanted or (lambda row: row["network"] == network)
        return {row["trunc"]: row for row in rows if row["steps"] == newest and wanted(row)}


def group_runs(runs):
    """Groups folders of runs that differ in nothing but the seed; returns variants and rows for write_report."""
    variants, rows, names = {}, [], {}
    for run in runs:
        if not (run / "checkpoint.pt").is_file():
            raise gan.UserError(f"{run} is no run of gan.py: it has no checkpoint.pt")
        content = gan.read_checkpoint(run)
        key = tuple((k, v) for k, v in asdict(content["config"]).items() if k not in ("seed", "device", "runs", "name"))
        name = re.sub(r"-seed\d+$", "", run.resolve().name)
        variant = names.setdefault(key, str(run) if name in names.values() else name)
        variants.setdefault(variant, []).append(run)
        rows += [{"variant": variant, **row} for row in read_scores(run).values() if row["steps"] == content["steps"]]
    return variants, rows


# ---- Studies of other recipes: variants of a model, judged by a network that reads digits
@dataclass
class Study:
    """The command `NAME.py study`: trains variants of a model from several seeds and has a network read their samples.
    Writes study.md, with scores of the real images and of each variant, and study.png."""

    name: str  # of the recipe
    model: type  # a kind of gan.GAN
    setting: gan.Config  # of all runs, unless a variant changes it
    variants: dict  # {title: changes of the setting}
    columns: dict  # {head: decimals} of the numbers that score returns; the table has FD before them
    score: Callable  # (logits[n,10], due[n]) -> numbers, for n samples of the classes due, or of no class
    draw: Callable  # (model, {title: folders of runs}) -> figure
    reader: str = "digits.pt2"  # of classifier.py
    n: int = 5000  # samples of each run, and real images

    def main(self, argv):
        """Runs the command, with these flags."""
        count, out = (lambda text: gan.whole_number(text, 1)), Path("runs", self.name)
        parser = gan.Parser(prog=f"{self.name}.py study", description="Trains variants, scores and draws them.")
        add, steps = parser.add_argument, self.setting.steps
        add("--seeds", type=count, default=1, help="runs of each variant (1)")
        add("--steps", type=count, default=steps, help=f"of a run ({steps}); variants of more or less are scaled")
        add("--data-dir", default="data", help=f"where {self.setting.data} lies or is downloaded to (data)")
        add("--extractor", default=self.reader, help=f"program of classifier.py ({self.reader})")
        quoted = ", ".join(f'"{title}"' for title in self.variants).replace("%", "%%")
        titles = dict(nargs="+", choices=self.variants, default=self.variants, metavar="TITLE")
        add("--variants", **titles, help=f"what the table and the picture compare (all: {quoted})")
        add("--out", type=Path, default=out, help=f"folder of runs and results ({out})")
        run_command(self.compare, parser, argv)

    def compare(self, seeds, steps, data_dir, extractor, variants, out):
        """Trains the runs that the folder `out` lacks, and makes the table and the picture."""
        network = metrics.load_extractor(extractor)
        setting = replace(gan.resolve(self.setting), steps=steps, data_dir=data_dir)
        images, labels, _ = gan.load_images(setting.data, setting.size, setting.channels, data_dir)
        check_reader(network, extractor, enlarge(images[:1]))
        real = metrics.measure_cached(network, enlarge(images), gan.cache_folder()).stats
        heads, lines, runs = [f"FD({network.name})", *self.columns], [], {}
        lines += [f"| | runs | {' | '.join(heads)} |", f"| --- | ---: |{' ---: |' * len(heads)}"]

        def add_row(title, scores):
            cells = map(mean_and_spread, zip(*scores, strict=True), (1, *self.columns.values()))
            lines.append(f"| {title} | {len(scores)} | {' | '.join(cells)} |")
            gan.say(lines[-1])

        add_row("real images", [self.measure(network, real, images[: self.n], labels[: self.n])])
        try:
            for title in dict.fromkeys(variants):
                change = {"steps": self.setting.steps} | self.variants[title]
                change["steps"] = max(1, change["steps"] * steps // self.setting.steps)
                made = [out / f"{re.sub('[^A-Za-z0-9.]+', '-', title)}-seed{seed}" for seed in range(seeds)]
                for seed, run in enumerate(made):
                    finish_run(run, replace(setting, **change, seed=seed), self.model)
                add_row(title, [self.measure(network, real, *self.samples(run)) for run in made])
                runs[title] = made
                with gan.atomic_write(out / "study.md") as file:
                    file.write("\n".join([*lines, ""]).encode())
        finally:  # so that a study that is stopped shows what it has
            if runs:
                with gan.atomic_write(out / "study.png") as file:
                    self.draw(self.model, runs).savefig(file, format="png", dpi=80)

    def samples(self, run):
        """Draws from a run's G: images [n,C,S,S], and the classes [n] they are to show, each in turn."""
        G, _ = gan.load_generator(run, model=self.model)
        classes = range(G.num_classes) or None
        return gan.generate(G, self.n, classes=classes), gan.choose_classes(G, self.n, classes)

    def measure(self, network, real, images, due):
        """Scores images [n,C,S,S] of the classes due [n]: the distance to statistics real, then `score`."""
        features, logits = map(torch.cat, zip(*map(network, enlarge(images).split(network.batch))))
        return metrics.frechet_distance(real, features), *self.score(logits, due)


def enlarge(images):
    """Enlarges uint8 images [n,C,S,S] to the 32 pixels at which the network learned to read."""
    return resize(images, [32, 32], InterpolationMode.BICUBIC, antialias=True)


def check_reader(network, path, images):
    """Refuses an extractor that does not give ten logits for uint8 images [N,C,S,S]; path names it in the message."""
    logits = network(images[:1])[1]
    if logits is None or logits.shape[1] != 10:
        raise gan.UserError(f"{path} does not tell 10 digits apart: make one with classifier.py")


def run_command(function, parser, argv=None):
    """Calls a function with the flags of a command line; what the user did wrong ends in one line and exit status 2."""
    args, name = parser.parse_args(argv), parser.prog.split()[0]
    try:
        function(**vars(args))
    except KeyboardInterrupt:
        parser.exit(130, gan.say(f"{name}: stopped", sys.stderr))
    except (gan.UserError, metrics.UserError, OSError) as error:
        parser.exit(2, gan.say(f"{name}: error: {error}", sys.stderr))


def finish_run(run, config, model):
    """Trains a model in the folder run until config.steps, or goes on with a run that was stopped. Refuses one that was
    trained in another way than the resolved config says."""
    read = lambda: gan.read_checkpoint(run, model)  # noqa: E731
    known, may_differ = None, {*gan.RESUMABLE, *gan.LOCAL} - {"lr_G", "lr_D"}
    if (run / "checkpoint.pt").exists():
        known = read()
        for name in (f.name for f in fields(config) if f.name not in may_differ):
            if getattr(config, name) not in ("auto", getattr(known["config"], name)):
                raise gan.UserError(f"{run} was trained with another {name}: give another --out")
    if not known or known["steps"] < config.steps:
        gan.train(replace(config, runs=str(run.parent), name=run.name), run if known else None, model)
        known = read()
    if (steps := known["steps"]) < config.steps:
        raise gan.UserError(f"{run} was stopped at step {steps}: the same command goes on with it")
    if steps > config.steps:
        raise gan.UserError(f"{run} is at step {steps}, beyond {config.steps}: give another --steps or another --out")


def entropy(logits):
    """Computes the entropy in bits of what logits [n,K] say is in n images: 0 if always the same, log2 K at most."""
    return torch.special.entr(logits.argmax(dim=1).bincount() / len(logits)).sum().item() / math.log(2)


def draw_strips(model, runs, columns=16):
    """Draws a row of samples for each run of the variants {title: runs}, beside its loss of D; returns the figure."""
    figure = Figure((12, len(runs) * (0.5 + 0.55 * max(map(len, runs.values())))), layout="constrained")
    panels = figure.subplots(len(runs), 2, squeeze=False, sharex="col", width_ratios=(5, 2))
    for (strip, curves), (title, folders) in zip(panels, runs.items()):
        nets = [gan.load_generator(run, model=model)[0] for run in folders]
        rows = [gan.generate(G, columns, classes=range(G.num_classes) or None) for G in nets]
        strip.imshow(gan.tile(torch.cat(rows), columns).permute(1, 2, 0).numpy())
        strip.set(xticks=[], yticks=[])
        strip.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9)
        for log in map(read_log, folders):
            curves.plot([record["step"] for record in log], [record["loss_D"] for record in log], linewidth=0.7)
        curves.tick_params(labelsize=7)
    panels[0, 1].set_title("loss of D", fontsize=9)
    return figure


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
