# SPDX-License-Identifier: MIT
"""Watches a run for collapse: scores each checkpoint, keeps the best generator, and stops when it gets no better.

    python recipes/watch.py train --loss hinge --cond --data FOLDER --patience 1500
    python recipes/watch.py train --loss hinge --cond --data FOLDER --watch net.pt2    # by FD(net) in place of SWD
    python recipes/watch.py eval --run runs/0000-hinge-cond-FOLDER-64/best.pt

GANs that train for long can collapse, large ones suddenly (arXiv 1809.11096), small ones on few images as D memorises
them. The run's folder also receives best.pt, a checkpoint like any other, watch.jsonl and watch.png.

On 80 photos of daisies (16 px, hinge, no augmentation) FD(MobileNetV2) falls to 191 by step 1,440 and rises to 224 by
step 4,000, as D memorises the photos (one run; 4 minutes of one core of an Intel Xeon, torch 2.14.1).
"""

import json
import signal
import sys
from dataclasses import dataclass
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
    patience: int | None = gan.option(None, "steps without a better score that end the run (none)", lambda n: n > 0)


class Watched(gan.GAN):
    Config = Config

    def __init__(self, config, num_classes=0, device="cpu"):
        super().__init__(config, num_classes, device)
        self.judge, self.since, self.ending = Judge(config, self.device), 0, False

    def load(self, path, new_images=False):
        super().load(path, new_images)
        self.since = self.steps  # a run that patience has ended may go on

    def save(self, path):
        """Writes the checkpoint; then scores it, and if it is the best so far, writes best.pt beside it."""
        super().save(path)
        run = Path(path).parent
        records = [r for r in read_records(run) if r["step"] < self.steps]  # a resumed run goes back a little
        records.append({"step": self.steps, "score": self.judge.score(self.G_ema)})
        best = min(records, key=lambda r: r["score"])
        if best is records[-1]:
            super().save(run / "best.pt")
        with gan.whole_file(run / "watch.jsonl") as file:
            file.write("".join(json.dumps(r) + "\n" for r in records).encode())
        draw(records, best, self.judge.name, run / "watch.png")
        gan.say(f"{self.judge.name} {records[-1]['score']:.2f}, best {best['score']:.2f} at step {best['step']}")
        if (
            self.config.patience
            and self.steps - max(best["step"], self.since) >= self.config.patience
            and not self.ending
        ):
            self.ending = True  # a second signal would end the run at once
            signal.raise_signal(signal.SIGINT)  # as Ctrl-C does: gan.train ends with a checkpoint and a grid


class Judge:
    """Scores a generator against a fixed sample of the images, with the same z each time; lower is better."""

    def __init__(self, config, device):
        images, labels, _ = gan.load_images(config.data, config.size, config.channels, config.data_dir)
        index = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:MOST]
        self.images, self.classes = images[index], labels[index].tolist() if config.cond else None
        self.network, self.name = None, "SWD"
        if config.watch != "swd":
            try:
                self.network = metrics.load_extractor(config.watch, device)
            except metrics.UserError as error:
                raise gan.UserError(str(error))
            self.name, self.real = metrics.label("FID", self.network.made_by), self.stats(self.images)

    def score(self, G):
        samples = gan.generate(G, len(self.images), classes=self.classes)
        if self.network:
            return metrics.frechet_distance(self.real, self.stats(samples))
        return metrics.sliced_wasserstein(self.images, samples)

    def stats(self, images):
        return metrics.measure(self.network, images).stats


def read_records(run):
    """Reads the scores of a run's checkpoints, [{"step", "score"}]."""
    path = run / "watch.jsonl"
    with gan.report_damage(path, "watch.jsonl of this recipe"):
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def draw(records, best, name, path):
    axes = (figure := Figure((8, 4), layout="constrained")).subplots()
    axes.plot([r["step"] for r in records], [r["score"] for r in records], marker=".")
    axes.plot(best["step"], best["score"], "o", label=f"best: {best['score']:.1f} at step {best['step']}")
    axes.set(xlabel="step", ylabel=name)
    axes.legend()
    with gan.whole_file(path) as file:
        figure.savefig(file)


if __name__ == "__main__":
    gan.main(model=Watched)
