# SPDX-License-Identifier: MIT
"""Watches a run for collapse: scores each checkpoint, keeps the best generator, and stops when it gets no better.

    python recipes/watch.py train --loss hinge --cond --data FOLDER --patience 1500
    python recipes/watch.py train --loss hinge --cond --data FOLDER --watch net.pt2    # by FD(net) in place of SWD
    python gan.py eval --run runs/0000-hinge-cond-FOLDER-64/best.pt

GANs that train for long can collapse, large ones suddenly (arXiv 1809.11096), small ones on few images as D memorises
them. The run's folder also receives best.pt, a checkpoint like any other, watch.jsonl and watch.png. To resume a run,
give --watch and --patience again: they are no part of the GAN.

The run in recipes/README.md is made to collapse: 80 photos of daisies, without augmentation. Each checkpoint's FD is
that of 80 samples against the 80 photos. `--patience 1000` would have ended the run soon after step 2,280. One run,
five minutes of one core of an Intel Xeon with bfloat16, beside other work, torch 2.14.1.
"""

import json
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gan
import metrics

MOST = 2048  # images that the samples are compared with, and as many samples


@dataclass
class Config(gan.Config):
    watch: str = gan.option("swd", "score to watch: swd, or the distance by an extractor as for eval")
    patience: int | None = gan.option(None, "steps without a better score that end the run (none)", gan.positive)


class Watched(gan.GAN):
    """Scores the averaged generator with each checkpoint; what is saved is a plain GAN, for eval, sample and others."""

    Config = Config

    def __init__(self, config, num_classes=0, device="cpu"):
        super().__init__(config, num_classes, device)
        self.config = gan.Config(**{f.name: getattr(config, f.name) for f in fields(gan.Config)})
        self.judge = Judge(config, self.device)
        self.patience = config.patience
        self.since = 0
        self.resumed = None  # a folder, until the first step

    def load(self, path):
        """Restores what `save` wrote; the patience begins anew."""
        super().load(path)
        self.since = self.steps
        self.resumed = gan.checkpoint_of(path).parent

    def train_step(self, data):
        """Takes a step. Before the first of a resumed run, scores its checkpoint if a killed process did not."""
        if self.resumed and gan.rank() == 0:
            scored = [row["step"] for row in gan.read_rows(self.resumed / "watch.jsonl")]
            if self.steps not in scored:
                self.after_save(self.resumed)
        self.resumed = None
        return super().train_step(data)

    def after_save(self, run):
        """Scores the checkpoint, writes best.pt if it is the best so far, and returns whether the patience is over."""
        rows = [row for row in gan.read_rows(run / "watch.jsonl") if row["step"] < self.steps]
        score = self.judge.score(gan.standing_generator(self.G_ema))
        rows.append({"step": self.steps, "score": score})
        best = min(rows, key=lambda row: row["score"])
        if best is rows[-1]:
            self.save(run / "best.pt")

        gan.write_text(run / "watch.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))
        draw(rows, best, self.judge.name, run / "watch.png")
        gan.say(f"{self.judge.name} {score:.2f}, best {best['score']:.2f} at step {best['step']}")
        waited = self.steps - max(best["step"], self.since)
        return self.patience is not None and waited >= self.patience


class Judge:
    """Scores a generator against a fixed choice of the images, with the same z each time; lower is better."""

    def __init__(self, config, device):
        images, labels, _ = gan.load_images(config.data, config.size, config.channels, config.data_dir)
        index = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:MOST]
        self.images = images[index]
        self.classes = labels[index].tolist() if config.cond else None
        self.network = None
        self.name = "SWD"
        if config.watch != "swd":
            self.network = metrics.load_extractor(config.watch, device)
            self.name = metrics.label("FID", self.network.made_by)
            self.real = metrics.measure(self.network, self.images).stats

    def score(self, G):
        """Scores as many samples as images, of the same classes."""
        samples = gan.generate(G, len(self.images), self.classes)
        if self.network is None:
            return metrics.sliced_wasserstein(self.images, samples)
        return metrics.frechet_distance(self.real, metrics.measure(self.network, samples).stats)


def draw(rows, best, name, path):
    """Draws the scores over the steps and marks the best."""
    figure = Figure((8, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["step"] for row in rows], [row["score"] for row in rows], marker=".")
    axes.plot(best["step"], best["score"], "o", label=f"best: {best['score']:.1f} at step {best['step']}")
    axes.set(xlabel="step", ylabel=name)
    axes.legend()
    with gan.atomic_write(path) as file:
        figure.savefig(file)


if __name__ == "__main__":
    gan.main(model=Watched)
