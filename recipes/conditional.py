# SPDX-License-Identifier: MIT
"""A conditional GAN needs a D that sees the class; otherwise y is to G little more than extra noise (arXiv 1411.1784).

    python recipes/conditional.py train --loss ns --cond --plain-d --data mnist --size 16 --steps 1000    # no y in D
    python recipes/conditional.py study --extractor digits.pt2    # D with and without y, two losses: table and picture

A D that judges the image alone gives it the same logit under every label. G's loss is then blind to which digit stands
for which class, and nothing asks for the right one. A D that sees the pair (x, y) calls a flawless 3 fake where a 5
was due, so G has to match p(x|y) for each y, no longer only their mixture p(x).

The commonest digit of a class tells whether G keeps the classes apart under wrong names: its share would be high where
that of the right digit is not. It is low, and in the grids of the plain D z decides the digit. D's loss does not show
the mistake: in all runs it settles between 1.379 and 1.386, just below 2 log 2, the loss of a D that cannot tell real
from fake. The plain D's share of right digits is chance (10%) in all six runs.

The table in recipes/README.md: MNIST at 16 px, 1,000 steps, three seeds. 10,000 samples of each run, as many of each
class, are enlarged to 32 px for the classifier, and as many real images alike. The twelve runs and their scores took 18
minutes of one core of an Intel Xeon with bfloat16, beside another training, torch 2.14.1.
Takes `Study` from digits.py and `read_log` from report.py.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import digits
import gan
import report


@dataclass
class Config(gan.Config):
    plain_d: bool = gan.option(False, "let D judge the image alone, without its class")


class Conditional(gan.GAN):
    Config = Config

    @staticmethod
    def networks(config, num_classes):
        if config.plain_d and not num_classes:
            raise gan.UserError("--plain-d needs --cond: without classes, no D sees one")
        G, D = gan.GAN.networks(config, num_classes)
        if config.plain_d:
            _, D = gan.GAN.networks(config, num_classes=0)
        return G, D


# ---- The study: either D, under either loss
def shown(logits, due):
    """Computes what % of samples is read as the class due [n], and as the commonest of its class, from logits [n,K]."""
    shares = 100 * confusion(logits, due)
    return shares.diag().mean().item(), shares.amax(dim=1).mean().item()


def confusion(logits, due):
    """Tabulates what is read where what was due: logits [n,K], due [n] -> [K due,K read], whose rows sum to 1."""
    k = logits.shape[1]
    counts = torch.bincount(due * k + logits.argmax(dim=1), minlength=k * k).view(k, k)
    return counts / counts.sum(dim=1, keepdim=True)


def draw(model, runs):
    """Draws each variant's first G, a row for each class and one z down each column, above D's losses in all runs."""
    figure = Figure((12, 6), layout="constrained")
    axes = figure.subplot_mosaic([[*runs], ["loss" for _ in runs]], height_ratios=(5, 3))
    for i, (title, folders) in enumerate(runs.items()):
        G, _ = gan.load_generator(folders[0], model=model)
        axes[title].imshow(gan.sample_grid(G).permute(1, 2, 0).numpy())
        axes[title].set(title=title, xticks=[], yticks=[], ylabel="" if i else "class", xlabel="z")
        for seed, run in enumerate(folders):
            log = report.read_log(run)
            steps = [record["step"] for record in log]
            losses = [record["loss_D"] for record in log]
            axes["loss"].plot(steps, losses, f"C{i}", linewidth=1, label=None if seed else title)
    axes["loss"].set(xlabel="step", ylabel="loss of D")
    axes["loss"].legend()
    return figure


VARIANTS = {
    "minimax, plain D": "minimax --plain-d",
    "ns, plain D": "ns --plain-d",
    "minimax, conditional D": "minimax",
    "ns, conditional D": "ns",
}
STUDY = digits.Study(
    name="conditional",
    model=Conditional,
    data="mnist",
    steps=1000,
    flags="--cond --no-center --size 16 --width 16 --sample-every 1000",
    variants=VARIANTS,
    columns={"right digit %": 1, "commonest digit %": 1},
    score=shown,
    draw=draw,
    n=10_000,
)

if __name__ == "__main__":
    STUDY.run()
