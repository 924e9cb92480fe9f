# SPDX-License-Identifier: MIT
"""DCGAN (arXiv 1511.06434): strided convolutions and batch norm in both networks, and what each setting does to digits.

    python recipes/dcgan.py train --data mnist --size 32 --steps 2000 --cond    # eval and sample: as with gan.py
    python recipes/dcgan.py study --seeds 3 --extractor digits.pt2              # digits.pt2 is made by classifier.py

The defaults are the paper's, but for batches of 64, normal z and averaged weights; nz is --z-dim. With --cond the class
is a one-hot vector beside z and one-hot planes beside the image. --size can be any power of two from 16 to 512.
MNIST, 600 steps, ngf = ndf = 16, 3 seeds: FD(digits) is 338 ± 66; 1063 ± 132 with ndf = 64, whose D wins; 179 ± 11 with
ngf = 64; 66 ± 16 at learning rates of 2e-2. The study of ten settings takes 6 minutes a seed of one core of an Intel
Xeon (torch 2.14.1).
"""

import itertools
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import gan
import metrics
import report


class Generator(nn.Module):
    """Maps noise and class to images: z[N,z_dim], y[N] int64 or None -> [N,channels,size,size] float32 in [-1,1].
    The noise, joined by the class as a one-hot vector, is an image of one pixel, which grows to 4, 8, ..., size."""

    def __init__(self, size, channels, ngf, max_width, z_dim, num_classes=0):
        super().__init__()
        widths = gan.channel_widths(size, ngf, max_width)[:-1][::-1]  # at 4, 8, ..., size / 2 pixels
        self.z_dim, self.num_classes = z_dim, num_classes
        layers = [nn.ConvTranspose2d(z_dim + num_classes, widths[0], 4, bias=False)]
        for c_in, c_out in itertools.pairwise([*widths, channels]):
            layers += [nn.BatchNorm2d(c_in), nn.ReLU(), nn.ConvTranspose2d(c_in, c_out, 4, 2, 1, bias=False)]
        self.layers = nn.Sequential(*layers)

    def forward(self, z, y=None):
        if self.num_classes:
            z = torch.cat([z, F.one_hot(y, self.num_classes)], dim=1)
        return torch.tanh(self.layers(z[:, :, None, None]).float())


class Discriminator(nn.Module):
    """Maps images and class to raw logits: x[N,channels,size,size] in [-1,1], y[N] int64 or None -> [N] float32.
    The class is a plane of ones among planes of zeros, beside the image's channels."""

    def __init__(self, size, channels, ndf, max_width, num_classes=0):
        super().__init__()
        widths = gan.channel_widths(size, ndf, max_width)[:-1]  # at size / 2, ..., 4 pixels
        self.num_classes = num_classes
        layers = [nn.Conv2d(channels + num_classes, widths[0], 4, 2, 1, bias=False), nn.LeakyReLU(0.2)]
        for c_in, c_out in itertools.pairwise(widths):
            layers += [nn.Conv2d(c_in, c_out, 4, 2, 1, bias=False), nn.BatchNorm2d(c_out), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, bias=False))

    def forward(self, x, y=None):
        if self.num_classes:
            planes = F.one_hot(y, self.num_classes)[:, :, None, None].expand(-1, -1, *x.shape[2:])
            x = torch.cat([x, planes], dim=1)
        return self.layers(x).flatten().float()


def normal_init(net):
    """Draws weights from N(0, 0.02^2), and the gains of batch norm from N(1, 0.02^2)."""
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)):
            nn.init.normal_(module.weight, float(isinstance(module, nn.BatchNorm2d)), 0.02)


@dataclass
class Config(gan.Config):
    ngf: int = gan.option(64, "channels of the generator at half resolution", gan.Config.positive)
    ndf: int = gan.option(64, "channels of the discriminator at half resolution", gan.Config.positive)
    init: str = gan.option("normal", "first weights: of deviation 0.02, or by torch's default", ("normal", "torch"))
    z_dim: int = gan.option(100, "length of the noise vector, nz", gan.Config.positive)
    lr_G: float = gan.option(2e-4, "Adam's learning rate of the generator", gan.Config.positive)
    lr_D: float = gan.option(2e-4, "Adam's learning rate of the discriminator", gan.Config.positive)
    beta1: float = gan.option(0.5, "Adam's first beta, in [0, 1)", gan.Config.share)
    beta2: float = gan.option(0.999, "Adam's second beta, in [0, 1)", gan.Config.share)
    augment: str = gan.option("none", "none, or some of color,translation,cutout", gan.Config.policy)

    def __post_init__(self):
        if self.width not in (None, self.ngf):
            raise gan.UserError("a DCGAN has no --width: give --ngf and --ndf")
        self.width = self.ngf


class DCGAN(gan.GAN):
    Config = Config

    @staticmethod
    def networks(config, num_classes):
        c = config
        G = Generator(c.size, c.channels, c.ngf, c.max_width, c.z_dim, num_classes)
        D = Discriminator(c.size, c.channels, c.ndf, c.max_width, num_classes)
        if c.init == "normal":
            normal_init(G), normal_init(D)
        return G, D

    def update_D(self, real, fake, y):
        """Takes one step of D, as gan.GAN does, but by a pass for real and one for fake."""
        # G's step shows D a batch of fakes alone, so D has to learn from such batches: one pass over both would
        # normalise the fakes by statistics that G never meets.
        with self.autocast:
            real_logits, fake_logits = (self.D(gan.diff_augment(x, self.config.augment), y) for x in (real, fake))
        loss = gan.LOSSES[self.config.loss][0](real_logits, fake_logits)
        self.descend(self.opt_D, loss)
        self.real_logits = real_logits.detach()
        return loss.detach(), self.real_logits.mean(), fake_logits.detach().mean()


# ---- The study: a small base, and flags of `train` that change one setting each
BASE = "--data mnist --size 32 --ngf 16 --ndf 16 --steps 600"
VARIANTS = ["", "--ngf 64", "--ndf 64", "--z-dim 10", "--z-dim 1000", "--init torch", "--steps 2400", "--cond"]
VARIANTS += [f"--lr-G {rate} --lr-D {rate}" for rate in ("2e-2", "2e-6")]


def study(args):
    """Trains every variant with every seed and scores its runs; args.out receives the runs, the table and a picture."""
    network = metrics.load_extractor(args.extractor)  # first, so that a wrong path shows before the long work
    runs = {variant: [train_once(variant, seed, args) for seed in range(args.seeds)] for variant in VARIANTS}
    config = gan.read_checkpoint(runs[""][0], DCGAN)["config"]
    images, _, _ = gan.load_images(config.data, config.size, config.channels, config.data_dir)
    report.check_reader(network, args.extractor, images)
    real = metrics.measure_cached(network, images, gan.cache_folder()).features
    lines = [f"| flags | FD({network.name}) ↓ | entropy of the digits, bits |", "| --- | ---: | ---: |"]
    for variant in VARIANTS:
        distances, bits = zip(*(score(run, network, real) for run in runs[variant]))
        lines.append(
            f"| {variant or 'base'} | {report.mean_and_spread(distances, 1)} | {report.mean_and_spread(bits, 2)} |"
        )
        gan.say(lines[-1])
    with gan.whole_file(args.out / "study.md") as file:
        file.write("\n".join([*lines, ""]).encode())
    draw(runs, args.out / "study.png")


def train_once(variant, seed, args):
    """Trains a run of BASE with the flags of a variant, unless it is there; returns its folder."""
    run = args.out / f"{re.sub('[^A-Za-z0-9.]+', '-', variant).strip('-') or 'base'}-seed{seed}"
    if not (run / "checkpoint.pt").exists():
        where = ["--data-dir", args.data_dir, "--runs", str(args.out), "--name", run.name, "--seed", str(seed)]
        gan.main(["train", *BASE.split(), *variant.split(), *where], DCGAN)
    content = gan.read_checkpoint(run, DCGAN)
    if content["steps"] < content["config"].steps:
        raise gan.UserError(f"{run} was stopped: finish it by `dcgan.py train --resume {run}`, then continue the study")
    return run


def score(run, network, real, n=5000):
    """Scores n samples: their Frechet distance to the features real[N,d], and the entropy of their digits in bits."""
    G, _ = gan.load_generator(run, model=DCGAN)
    features, logits = map(torch.cat, zip(*map(network, gan.generate(G, n).split(100))))
    shares = logits.argmax(dim=1).bincount() / n
    return metrics.frechet_distance(real, features), torch.special.entr(shares).sum().item() / math.log(2)


def draw(runs, path, columns=16):
    """Draws, for each variant, samples of its first seed and the loss of D of every seed."""
    figure = Figure((10, 0.62 * len(runs)), layout="constrained")
    panels = figure.subplots(len(runs), 2, sharex="col", sharey="col", width_ratios=(5, 2))
    for (strip, curves), (variant, seeds) in zip(panels, runs.items()):
        G, _ = gan.load_generator(seeds[0], model=DCGAN)
        samples = gan.generate(G, columns, classes=range(G.num_classes) or None)
        strip.imshow(gan.tile(samples, columns).permute(1, 2, 0).numpy())
        strip.set(xticks=[], yticks=[])
        strip.set_ylabel(variant.replace(" --", "\n--") or "base", rotation=0, ha="right", va="center", fontsize=8)
        for log in map(report.read_log, seeds):
            curves.plot([record["step"] for record in log], [record["loss_D"] for record in log], linewidth=0.7)
        curves.tick_params(labelsize=7)
    panels[0, 1].set_title("loss of D", fontsize=8)
    with gan.whole_file(path) as file:
        figure.savefig(file, dpi=90)


def study_command(argv):
    parser = gan.Parser(prog="dcgan.py study", description="changes one setting of a DCGAN at a time")
    parser.add_argument("--seeds", type=lambda n: gan.whole_number(n, 1, 100), default=1, help="runs of a variant (1)")
    parser.add_argument("--extractor", default="digits.pt2", help="made by classifier.py (digits.pt2)")
    parser.add_argument("--data-dir", default="data", help="where MNIST lies or is downloaded to (data)")
    parser.add_argument("--out", type=Path, default=Path("runs/dcgan"), help="folder of the study (runs/dcgan)")
    args = parser.parse_args(argv)
    try:
        study(args)
    except (gan.UserError, metrics.UserError, OSError) as error:
        parser.exit(2, gan.say(f"dcgan.py: error: {error}", sys.stderr))


if __name__ == "__main__":
    study_command(sys.argv[2:]) if sys.argv[1:2] == ["study"] else gan.main(model=DCGAN)
