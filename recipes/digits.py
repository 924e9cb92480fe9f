# SPDX-License-Identifier: MIT
"""The command `NAME.py study` of wgan.py, conditional.py, dcgan.py, losses.py and unrolled.py: variants on digits.

A network that reads digits, by classifier.py, judges the samples of each run. Takes the runner from study.py, and
`read_log`, `run_command` and `save_figure` from report.py.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torchvision.transforms.functional import InterpolationMode, resize

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gan
import metrics
import report
import study


@dataclass
class Study:
    """A recipe's program, whose command `study` trains variants of its model and reads their samples.

    It writes study.md, with scores of the real images and of each variant, and study.png. The same command goes on with
    a study that was stopped.
    """

    name: str  # of the recipe
    model: type  # a kind of gan.GAN, which the recipe trains when it is run
    data: str  # a named set of digits
    steps: int  # of a run, unless a variant says another number
    flags: str  # of all runs
    variants: dict  # {title: a loss with flags}, as in study.py
    columns: dict  # {head: decimals} of the numbers that score returns; the table has FD before them
    score: Callable  # (logits[n,10], due[n]) -> numbers, for n samples of the classes due, or of no class
    draw: Callable  # (model, {title: folders of runs}) -> figure
    reader: str = "digits.pt2"  # of classifier.py
    n: int = 5000  # samples of each run, and real images

    def run(self):
        """Runs the recipe as a program: `study`, or a command of gan.py for its model."""
        if sys.argv[1:2] == ["study"]:
            self.main(sys.argv[2:])
        else:
            gan.main(model=self.model)

    def main(self, argv):
        """Runs the command `study`, with these flags."""
        report.run_command(self.compare, self.make_parser(), argv)

    def make_parser(self):
        parser = gan.Parser(prog=f"{self.name}.py study", description="Trains variants, scores and draws them.")
        add = parser.add_argument
        out = Path("runs", self.name)
        quoted = ", ".join(f'"{title}"' for title in self.variants).replace("%", "%%")
        titles = {"nargs": "+", "choices": self.variants, "default": list(self.variants), "metavar": "TITLE"}
        add("--variants", help=f"what the table and the picture compare (all: {quoted})", **titles)
        add("--seeds", type=study.positive, default=1, help="runs of each variant (1)")
        scaled = "variants of more or less are scaled"
        add("--steps", type=count, default=self.steps, help=f"of a run ({self.steps}); {scaled}")
        add("--jobs", type=study.positive, default=1, help="runs at a time (1)")
        add("--data-dir", default="data", help=f"where {self.data} lies or is downloaded to (data)")
        add("--extractor", default=self.reader, help=f"program of classifier.py ({self.reader})")
        add("--out", type=Path, default=out, help=f"folder of runs and results ({out})")
        return parser

    def compare(self, variants, seeds, steps, jobs, data_dir, extractor, out):
        """Makes the runs that the folder `out` lacks, then the table and the picture."""
        network = metrics.load_extractor(extractor)
        definition = {"version": gan.__version__, "data": self.data, "steps": steps}
        definition |= {"flags": self.flags, "variants": self.variants}
        with study.open_study(out, definition):
            config = self.config(variants[0])
            images, labels, _ = gan.load_images(self.data, config.size, config.channels, data_dir)
            check_reader(network, extractor, enlarge(images[:1]))
            planned = []
            for title in dict.fromkeys(variants):
                planned += self.plan(title, seeds, steps, data_dir, study.threads_of(jobs), out)
            study.make_all(planned, jobs)
            self.show(network, images, labels, planned, out)

    def config(self, title):
        flags = ["--steps", str(self.steps), *self.flags.split()]
        return gan.resolve(study.read_config(self.variants[title], flags, self.data, self.model))

    def plan(self, title, seeds, steps, data_dir, threads, out):
        """Lists the jobs of a variant, one for each of so many seeds."""
        scaled = max(1, self.config(title).steps * steps // self.steps)
        where = ["--data", self.data, "--data-dir", data_dir]
        flags = [*self.flags.split(), *study.to_flags(self.variants[title]), "--steps", scaled, *where]
        jobs = []
        for seed in range(seeds):
            run = out / f"{study.run_name(title)}-seed{seed}"
            jobs.append(study.Job(title, seed, run, flags, threads=threads, model=self.model))
        return jobs

    def show(self, network, images, labels, jobs, out):
        """Scores real images [N,C,S,S] with their labels [N] and the runs of jobs; writes the table and the picture."""
        runs = {}
        for job in jobs:
            runs.setdefault(job.variant, []).append(job.run)
        real = metrics.measure_cached(network, enlarge(images), gan.cache_folder()).stats
        lines = [["", "runs", f"FD({network.name})", *self.columns]]
        scores = [self.measure(network, real, images[: self.n], labels[: self.n])]
        lines.append(self.line("real images", scores))
        for title, folders in runs.items():
            scores = [self.measure(network, real, *self.samples(run)) for run in folders]
            lines.append(self.line(title, scores))
        gan.write_text(out / "study.md", f"{study.markdown(lines)}\n")
        report.save_figure(self.draw(self.model, runs), out / "study.png")

    def samples(self, run):
        """Draws from a run's G: images [n,C,S,S], and the classes [n] they are to show, each in turn."""
        G, _ = gan.load_generator(run, model=self.model)
        classes = range(G.num_classes) or None
        return gan.generate(G, self.n, classes), gan.choose_classes(G, self.n, classes)

    def measure(self, network, real, images, due):
        """Scores images [n,C,S,S] of the classes due [n]: the distance to statistics real, then `score`."""
        summary = metrics.measure(network, enlarge(images))
        return [metrics.frechet_distance(real, summary.stats), *self.score(summary.logits, due)]

    def line(self, title, scores):
        """Makes and prints a line of the table of scores [[FD, ...]], one per run."""
        cells = map(study.mean_and_spread, zip(*scores, strict=True), (1, *self.columns.values()))
        line = [title, str(len(scores)), *cells]
        gan.say(f"| {' | '.join(line)} |")
        return line


def count(text):
    return gan.whole_number(text, 1)


def enlarge(images):
    """Enlarges uint8 images [n,C,S,S] to the 32 pixels at which the network learned to read."""
    return resize(images, [32, 32], InterpolationMode.BICUBIC, antialias=True)


def check_reader(network, path, images):
    """Refuses an extractor that does not give ten logits for uint8 images [N,C,S,S]; path names it in the message."""
    _, logits = network(images[:1])
    if logits is None or logits.shape[1] != 10:
        raise gan.UserError(f"{path} does not tell 10 digits apart: make one with classifier.py")


def entropy(logits):
    """Computes the entropy in bits of what logits [n,K] say is in n images: 0 if always the same, log2 K at most."""
    shares = logits.argmax(dim=1).bincount() / len(logits)
    return torch.special.entr(shares).sum().item() / math.log(2)


def draw_strips(model, runs):
    """Draws a strip of samples of each variant of {title: runs}, beside its losses of D; returns the figure."""
    strips = {title: draw_strip(model, folders) for title, folders in runs.items()}
    heights = [0.4 + 7.3 * strip.shape[1] / strip.shape[2] for strip in strips.values()]  # inches
    figure = Figure((12, sum(heights)), layout="constrained")
    panels = figure.subplots(len(runs), 2, squeeze=False, width_ratios=(5, 2), height_ratios=heights)
    for (pictures, curves), (title, folders) in zip(panels, runs.items()):
        for run in folders:
            log = report.read_log(run)
            curves.plot([record["step"] for record in log], [record["loss_D"] for record in log], linewidth=0.7)
        pictures.imshow(strips[title].permute(1, 2, 0).numpy())
        pictures.set(xticks=[], yticks=[])
        pictures.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9)
        curves.tick_params(labelsize=7)
    panels[0, 1].set_title("loss of D", fontsize=9)
    return figure


def draw_strip(model, folders, columns=16):
    """Draws a row for each run, uint8 [3,H,W]; with classes, the first run's grid of class by z."""
    rows = []
    for folder in folders:
        G, _ = gan.load_generator(folder, model=model)
        if G.num_classes:
            return gan.sample_grid(G, columns)
        rows.append(gan.generate(G, columns))
    return gan.tile(torch.cat(rows), columns)
