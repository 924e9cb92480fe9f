# SPDX-License-Identifier: MIT
"""A Wasserstein GAN under spectral norm, on USPS, and what breaks it (arXiv 1701.07875, 1802.05957).

    python recipes/wgan.py train --loss wgan --data usps --size 16 --width 16 --steps 1200
    python recipes/wgan.py study --extractor usps.pt2    # beside ns, and with one change at a time

Batch norm in the critic breaks it: it divides by the deviation of its batch, so bounded weights do not bound the slope,
and D's loss falls without end. It also normalises real and fake together in D's step but fakes alone in G's, which then
follows a critic nobody trained.

The critic's loss is linear, so its gradient stays as large when it is right. A sigmoid ends that, and reaches what ns
reaches. Augmentation harms (FD 102.2). Equal learning rates (81.2 at 0.0002, 75.7 at 0.002), two critic steps (75.3),
two power iterations (68.5), a beta2 of 0.99 (68.4) and a factor of 100 on the output (70.5) lie within twice the
deviation of seeds. What a WGAN needs is time: 2,800 steps at batch 256 reach 5.2.

The table in recipes/README.md: USPS at 16 px, 1,200 steps, one step of the critic for one of G, no augmentation; the
learning rates are 0.0016 for G and 0.0002 for the critic, beta2 is 0.9. The classifier reads 5,000 samples of each run.
Three seeds of wgan and ns, one of each change, so read only the large differences. Their runs and scores took 15 and 25
minutes of one core of an Intel Xeon beside another training.
Takes `Study` from digits.py.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from torch.nn.utils.parametrize import register_parametrization

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import digits
import gan


@dataclass
class Config(gan.Config):
    loss: str = gan.option("wgan", "adversarial loss", gan.D_LOSSES)
    lr_G: float = gan.option(1.6e-3, "Adam's learning rate of the generator", gan.positive)
    lr_D: float = gan.option(2e-4, "Adam's learning rate of the critic", gan.positive)
    beta2: float = gan.option(0.9, "Adam's second beta, in [0, 1)", gan.share)
    augment: str = gan.option("none", "none, or some of color,translation,cutout", gan.policy)
    r1: float = gan.option(0.0, "weight of the penalty on D's slope at real images", gan.not_negative)
    center: bool = gan.option(False, "subtract the mean of all logits in the loss")
    gain: float = gan.option(1.0, "factor of the critic's output", gan.positive)
    batch_norm: bool = gan.option(False, "batch norm after each block of the critic")
    sigmoid: bool = gan.option(False, "a sigmoid as the critic's last layer")
    power_iterations: int = gan.option(1, "steps per pass of the critic's spectral norm", gan.positive)


class Critic(gan.Discriminator):
    """Maps images [N,channels,size,size] in [-1,1] to gain times a spectrally normalised critic's logits [N]."""

    def __init__(self, config):
        super().__init__(config.size, config.channels, config.width, config.max_width)
        self.gain = config.gain
        self.head = nn.Sigmoid() if config.sigmoid else nn.Identity()
        if config.batch_norm:
            norms = [gan.BatchNorm(block.conv2.out_channels) for block in self.blocks]
            self.blocks = nn.ModuleList(map(nn.Sequential, self.blocks, norms))
        for layer in gan.layers_of(self, nn.Conv2d, nn.Linear):
            for _ in range(config.power_iterations - 1):
                # The weight is normalised once more, by the same u and v, so each pass makes one more iteration.
                register_parametrization(layer, "weight", layer.parametrizations.weight[0])

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


def shares(logits, due):
    """Computes what % of n samples the network reads as the rarest and as the commonest digit, from logits [n,10]."""
    counts = 100 * logits.argmax(dim=1).bincount(minlength=logits.shape[1]) / len(logits)
    return counts.min().item(), counts.max().item()


VARIANTS = {
    "wgan": "wgan",
    "ns": "ns",
    "ns, gan.py's Adam": "ns --lr-G 0.0004 --lr-D 0.0004 --beta2 0.99",
    "batch norm in the critic": "wgan --batch-norm",  # and now the suspects
    "sigmoid after the critic": "wgan --sigmoid",
    "output times 100": "wgan --gain 100",
    "augmentation": "wgan --augment translation,cutout",
    "beta2 0.99": "wgan --beta2 0.99",
    "both rates 0.0002": "wgan --lr-G 0.0002 --lr-D 0.0002",
    "both rates 0.002": "wgan --lr-G 0.002 --lr-D 0.002",
    "2 critic steps, same time": "wgan --d-steps 2 --steps 800",
    "2 power iterations": "wgan --power-iterations 2",
    "100 epochs, batches of 256": "wgan --batch 256 --steps 2800",
}
STUDY = digits.Study(
    name="wgan",
    model=WGAN,
    data="usps",
    steps=1200,
    flags="--size 16 --width 16 --sample-every 1000",
    variants=VARIANTS,
    columns={"rarest digit %": 1, "commonest digit %": 1},
    score=shares,
    draw=digits.draw_strips,
    reader="usps.pt2",
)

if __name__ == "__main__":
    STUDY.run()
