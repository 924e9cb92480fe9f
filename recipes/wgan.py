# SPDX-License-Identifier: MIT
"""A Wasserstein GAN under spectral norm, on USPS, and what breaks it (arXiv 1701.07875, 1802.05957).

    python recipes/wgan.py train --data usps --size 16 --width 16 --steps 1200
    python recipes/wgan.py study --extractor usps.pt2    # beside ns, and with one change at a time

Batch norm in the critic breaks it, and a sigmoid stops it. Batch norm divides by the deviation of its batch, so bounded
weights do not bound the slope; and it normalises real and fake together in D's step but fakes alone in G's, which then
follows a critic nobody trained. A small output is harmless: the loss is linear in it, and Adam divides a gradient by
its size. 1,200 steps, three seeds: FD(digits) 90 ± 6, of ns 56 ± 2; one seed: 1065 with batch norm, 142 with a sigmoid.
Ten runs and their scores take 13 minutes of one core of an Intel Xeon (torch 2.14.1); the default has six.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import gan
import metrics
import report


@dataclass
class Config(gan.Config):
    loss: str = gan.option("wgan", "adversarial loss", tuple(gan.LOSSES))
    gain: float = gan.option(1.0, "factor of the critic's output", gan.Config.positive)
    batch_norm: bool = gan.option(False, "batch norm after each block of the critic")
    sigmoid: bool = gan.option(False, "a sigmoid as the critic's last layer")


class Critic(gan.Discriminator):
    """Maps images [N,channels,size,size] in [-1,1] to gain times a spectrally normalised critic's logits [N]."""

    def __init__(self, config):
        super().__init__(config.size, config.channels, config.width, config.max_width)
        self.gain, self.head = config.gain, nn.Sigmoid() if config.sigmoid else nn.Identity()
        if config.batch_norm:
            norms = [nn.BatchNorm2d(block.conv2.out_channels) for block in self.blocks]
            self.blocks = nn.ModuleList(map(nn.Sequential, self.blocks, norms))

    def forward(self, x, y=None):
        return self.head(self.gain * super().forward(x))


class WGAN(gan.GAN):
    Config = Config

    @staticmethod
    def networks(config, num_classes):
        if num_classes:
            raise gan.UserError("this critic sees no classes: leave out --cond")
        G, _ = gan.GAN.networks(config, num_classes)
        return G, Critic(config)


# ---- The study: a WGAN beside ns, each from several seeds, and one change at a time, from one seed
SETTING = Config(data="usps", size=16, width=16, sample_every=1000)
COMPARED = {"wgan": {}, "ns": dict(loss="ns")}
CHANGES = {  # each a suspect
    "batch norm": dict(batch_norm=True),
    "sigmoid": dict(sigmoid=True),
    "gain 100": dict(gain=100.0),
    "learning rates 0.002": dict(lr_G=2e-3, lr_D=2e-3),
}


def study(seeds, steps, data_dir, extractor, out):
    """Trains what is missing in the folder `out`, measures every run, and writes study.md and study.png there."""
    network = metrics.load_extractor(extractor)
    images, *_ = gan.load_images(SETTING.data, SETTING.size, 1, data_dir)
    report.check_reader(network, extractor, images)
    real = metrics.measure_cached(network, images, gan.cache_folder()).stats
    runs = {}
    lines = ["| | runs | FD(digits) | rarest digit % | commonest digit % |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, change in (COMPARED | CHANGES).items():
        runs[name] = [out / f"{name.replace(' ', '-')}-seed{seed}" for seed in range(seeds if name in COMPARED else 1)]
        for seed, run in enumerate(runs[name]):
            report.finish_run(run, replace(SETTING, **change, seed=seed, steps=steps, data_dir=data_dir), WGAN)
        scores = zip(*(measure(run, network, real) for run in runs[name]))
        lines.append(f"| {name} | {len(runs[name])} | {' | '.join(map(report.mean_and_spread, scores))} |")
        gan.say(lines[-1])
        with gan.whole_file(out / "study.md") as file:  # now, so that a study that is stopped shows what it has
            file.write("\n".join([*lines, ""]).encode())
        draw(runs, out / "study.png")


def measure(run, network, real, n=5000):
    """Draws n samples; returns FD(digits) and what % of them are read as the rarest and the commonest digit."""
    G, _ = gan.load_generator(run, model=WGAN)
    samples = gan.generate_batches(G, n)
    features, logits = map(torch.cat, zip(*map(network, samples)))
    shares = 100 * logits.argmax(dim=1).bincount(minlength=logits.shape[1]) / n
    return metrics.frechet_distance(real, features), shares.min().item(), shares.max().item()


def draw(runs, path):
    """Draws the samples of each variant's first run."""
    figure = Figure((10, 6), layout="constrained")
    for i, (name, folders) in enumerate(runs.items(), start=1):
        G, _ = gan.load_generator(folders[0], model=WGAN)
        axes = figure.add_subplot(2, 3, i, title=name)
        axes.imshow(gan.sample_grid(G).permute(1, 2, 0).numpy())
        axes.axis("off")
    with gan.whole_file(path) as file:
        figure.savefig(file, format="png", dpi=80)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] != ["study"]:
        return gan.main(argv, WGAN)
    parser = gan.Parser(
        prog="wgan.py study", description="Compares a WGAN on USPS with ns, and with changes of its own."
    )
    count = lambda text: gan.whole_number(text, 1)  # noqa: E731
    parser.add_argument("--seeds", type=count, default=1, help="runs of wgan and of ns (1)")
    parser.add_argument("--steps", type=count, default=1200, help="of a run (1200)")
    parser.add_argument("--data-dir", default="data", help="where USPS lies or is downloaded to (data)")
    parser.add_argument("--extractor", default="usps.pt2", help="program of classifier.py usps (usps.pt2)")
    parser.add_argument("--out", type=Path, default=Path("runs/wgan"), help="folder (runs/wgan)")
    try:
        study(**vars(parser.parse_args(argv[1:])))
    except (gan.UserError, metrics.UserError, OSError) as error:
        parser.exit(2, gan.say(f"wgan.py: error: {error}", sys.stderr))


if __name__ == "__main__":
    main()
