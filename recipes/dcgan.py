# SPDX-License-Identifier: MIT
"""DCGAN (arXiv 1511.06434): strided convolutions and batch norm in both networks, and what each setting does to digits.

    python recipes/dcgan.py train --data mnist --size 32 --steps 2000 --cond   # eval, sample: as in gan.py
    python recipes/dcgan.py study --seeds 3 --extractor digits.pt2    # digits.pt2 is made by classifier.py

The defaults are the paper's, but for batches of 64, normal z and averaged weights; nz is --z-dim. With --cond the class
is a one-hot vector beside z and one-hot planes beside the image. --size can be any power of two from 16 to 512.

The table in recipes/README.md: MNIST at 32 px, a base of ngf = ndf = 16, nz = 100 and learning rates of 2e-4, 600 steps
(0.64 epochs), three seeds. FD(digits) is of 5,000 samples against the 60,000 images; the entropy of ten digits is at
most log2(10) = 3.32 bits. All 30 runs took 24 minutes of one core of an Intel Xeon beside another training.

With ndf = 64 D's loss stays near 0. The entropy of 0 is no collapse: the shapes differ, on a gray ground, and the
classifier reads all of them as one digit. Three seeds settle neither the effect of nz nor that of torch's first
weights. At learning rates of 2e-6 G still draws noise.
Takes `Study` from digits.py.
"""

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import digits
import gan


class Generator(nn.Module):
    """Maps noise and class to images: z[N,z_dim], y[N] int64 or None -> [N,channels,size,size] float32 in [-1,1].

    The noise, joined by the class as a one-hot vector, is an image of one pixel, which grows to 4, 8, ..., size.
    """

    def __init__(self, size, channels, ngf, max_width, z_dim, num_classes=0):
        super().__init__()
        widths = gan.channel_widths(size, ngf, max_width)[:-1][::-1]  # at 4, 8, ..., size / 2 pixels
        self.z_dim = z_dim
        self.num_classes = num_classes
        layers = [nn.ConvTranspose2d(z_dim + num_classes, widths[0], 4, bias=False)]
        for c_in, c_out in itertools.pairwise([*widths, channels]):
            layers += [gan.BatchNorm(c_in), nn.ReLU(), nn.ConvTranspose2d(c_in, c_out, 4, 2, 1, bias=False)]
        self.layers = nn.Sequential(*layers)

    def forward(self, z, y=None):
        if self.num_classes:
            z = torch.cat([z, F.one_hot(y, self.num_classes)], dim=1)
        return torch.tanh(self.layers(z[:, :, None, None]).float())


class Discriminator(nn.Module):
    """Maps images and class to raw logits: x[N,channels,size,size] in [-1,1], y[N] int64 or None -> [N] float32.

    The class is a plane of ones among planes of zeros, beside the image's channels.
    """

    def __init__(self, size, channels, ndf, max_width, num_classes=0):
        super().__init__()
        widths = gan.channel_widths(size, ndf, max_width)[:-1]  # at size / 2, ..., 4 pixels
        self.num_classes = num_classes
        layers = [nn.Conv2d(channels + num_classes, widths[0], 4, 2, 1, bias=False), nn.LeakyReLU(0.2)]
        for c_in, c_out in itertools.pairwise(widths):
            layers += [nn.Conv2d(c_in, c_out, 4, 2, 1, bias=False), gan.BatchNorm(c_out), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, bias=False))

    def forward(self, x, y=None):
        if self.num_classes:
            planes = F.one_hot(y, self.num_classes)[:, :, None, None].expand(-1, -1, *x.shape[2:])
            x = torch.cat([x, planes], dim=1)
        return self.layers(x).flatten().float()


def normal_init(net):
    """Draws weights from N(0, 0.02^2), and the gains of batch norm from N(1, 0.02^2)."""
    for layer in gan.layers_of(net, nn.Conv2d, nn.ConvTranspose2d):
        nn.init.normal_(layer.weight, 0, 0.02)
    for norm in gan.layers_of(net, nn.BatchNorm2d):
        nn.init.normal_(norm.weight, 1, 0.02)


@dataclass
class Config(gan.Config):
    loss: str = gan.option("ns", "adversarial loss", gan.D_LOSSES)
    ngf: int = gan.option(64, "channels of the generator at half resolution", gan.positive)
    ndf: int = gan.option(64, "channels of the discriminator at half resolution", gan.positive)
    init: str = gan.option("normal", "first weights: of deviation 0.02, or by torch's default", ("normal", "torch"))
    z_dim: int = gan.option(100, "length of the noise vector, nz", gan.positive)
    lr_G: float = gan.option(2e-4, "Adam's learning rate of the generator", gan.positive)
    lr_D: float = gan.option(2e-4, "Adam's learning rate of the discriminator", gan.positive)
    beta1: float = gan.option(0.5, "Adam's first beta, in [0, 1)", gan.share)
    beta2: float = gan.option(0.999, "Adam's second beta, in [0, 1)", gan.share)
    augment: str = gan.option("none", "none, or some of color,translation,cutout", gan.policy)
    r1: float = gan.option(0.0, "weight of the penalty on D's slope at real images", gan.not_negative)
    center: bool = gan.option(False, "subtract the mean of all logits in the loss")

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
            normal_init(G)
            normal_init(D)
        return G, D

    def update_D(self, real, fake, y):
        """Takes one step of D as gan.GAN does, but by a pass for real and one for fake."""
        # G's step shows D a batch of fakes alone, so D has to learn from such batches: one pass over both would
        # normalise the fakes by statistics that G never meets.
        penalty = self.slope_penalty(real, y)
        with self.autocast:
            real_logits = self.D(gan.diff_augment(real, self.config.augment), y)
            fake_logits = self.D(gan.diff_augment(fake, self.config.augment), y)
        loss = self.loss_D(real_logits, fake_logits)
        self.descend(self.opt_D, loss + penalty)
        return loss.detach(), real_logits.detach(), fake_logits.detach()


# ---- The study: a small base, and one change at a time
VARIANTS = {
    "base": "ns",
    "ngf 64": "ns --ngf 64",
    "ngf 128": "ns --ngf 128",
    "ndf 64": "ns --ndf 64",
    "ndf 128": "ns --ndf 128",
    "nz 10": "ns --z-dim 10",
    "nz 1000": "ns --z-dim 1000",
    "torch's first weights": "ns --init torch",
    "4 times the steps": "ns --steps 2400",
    "5 epochs": "ns --steps 4685",
    "30 epochs": "ns --steps 28110",
    "with classes": "ns --cond",
    "with classes, 5 epochs": "ns --cond --steps 4685",
    "learning rates 0.02": "ns --lr-G 0.02 --lr-D 0.02",
    "learning rates 0.000002": "ns --lr-G 0.000002 --lr-D 0.000002",
    "learning rate 0.1 of G": "ns --lr-G 0.1",
    "learning rate 0.1 of D": "ns --lr-D 0.1",
}
STUDY = digits.Study(
    name="dcgan",
    model=DCGAN,
    data="mnist",
    steps=600,
    flags="--size 32 --ngf 16 --ndf 16",
    variants=VARIANTS,
    columns={"entropy of the digits, bits": 2},
    score=lambda logits, due: (digits.entropy(logits),),
    draw=digits.draw_strips,
)

if __name__ == "__main__":
    STUDY.run()
