# SPDX-License-Identifier: MIT
"""Unrolled GAN (arXiv 1611.02163): G is trained against the D that k more steps would make, so it cannot win by
moving all samples to where the present D is wrong, and keeps all modes.

    python recipes/unrolled.py ring                                        # 8 Gaussians: which k finds them all?
    python recipes/unrolled.py train --data mnist --loss minimax --unroll 4

RESULT
"""

import argparse
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.func import functional_call

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gan


@dataclass
class Config(gan.Config):
    unroll: int = gan.option(5, "steps of D that G looks ahead", lambda k: k >= 0)
    second_order: bool = gan.option(True, "let G's gradient flow through these steps, as in the paper")


class Unrolled(gan.GAN):
    Config = Config

    def update_G(self, real, fake, y):
        ahead = self.look_ahead(real, fake if self.config.second_order else fake.detach(), y)
        with self.autocast:
            logits = functional_call(self.D, ahead, (gan.diff_augment(fake, self.config.augment), y))
        if self.config.loss == "rpgan":
            logits = logits - self.real_logits
        loss = gan.LOSSES[self.config.loss][1](logits)
        self.descend(self.opt_G, loss)
        return loss.detach()

    def look_ahead(self, real, fake, y):
        """Takes k steps of D on one batch without moving D; returns {name: parameter} of where it would be."""
        c, ahead = self.config, dict(self.D.named_parameters())
        # Adam's division is that of D's last step: its own gradient explodes where a gradient of D is zero.
        scales = [self.adam_scale(p) for p in ahead.values()]
        for _ in range(c.unroll):
            both = torch.cat([gan.diff_augment(x, c.augment) for x in (real, fake)])
            with self.autocast:
                real_logits, fake_logits = functional_call(self.D, ahead, (both, y.repeat(2))).chunk(2)
            loss = gan.LOSSES[c.loss][0](real_logits, fake_logits)
            steps = torch.autograd.grad(loss, list(ahead.values()), create_graph=c.second_order)
            ahead = {k: p - s * step for (k, p), s, step in zip(ahead.items(), scales, steps)}
        return ahead if c.second_order else {k: p.detach() for k, p in ahead.items()}

    def adam_scale(self, p):
        """Returns what Adam multiplies the gradient of p by, without momentum."""
        state, group = self.opt_D.state[p], self.opt_D.param_groups[0]
        corrected = state["exp_avg_sq"] / (1 - group["betas"][1] ** state["step"].item())
        return group["lr"] / (corrected.sqrt() + group["eps"])


# ---- The ring: 8 Gaussians of deviation 0.02 on a circle of radius 2
RADIUS, SIGMA, MODES = 2.0, 0.02, 8


class Points(nn.Module):
    """A network on points: [N,z_dim] -> [N,2] as G, or [N,2] -> [N] as D."""

    def __init__(self, n_in, n_out, width=128):
        super().__init__()
        self.z_dim, self.num_classes = n_in, 0
        self.layers = nn.Sequential(nn.Linear(n_in, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.last = nn.Linear(width, n_out)
        gan.orthogonal_init(self)

    def forward(self, x, y=None):
        return self.last(self.layers(x)).squeeze(1)


class Ring(Unrolled):
    @staticmethod
    def networks(config, num_classes):
        return Points(config.z_dim, 2), Points(2, 1)


def ring(n, generator):
    """Draws points [n,2] of the ring."""
    angle = torch.randint(MODES, (n,), generator=generator) * (2 * math.pi / MODES)
    centre = RADIUS * torch.stack([angle.cos(), angle.sin()], dim=1)
    return centre + SIGMA * torch.randn(n, 2, generator=generator)


def score(points):
    """Counts the modes with at least 1% of the points within 3 sigma; returns it and the share of such points."""
    angle = torch.arange(MODES) * (2 * math.pi / MODES)
    centres = RADIUS * torch.stack([angle.cos(), angle.sin()], dim=1)
    distance, nearest = torch.cdist(points, centres).min(dim=1)
    near = distance < 3 * SIGMA
    counts = nearest[near].bincount(minlength=MODES)
    return int((counts >= len(points) / 100).sum()), near.float().mean().item()


def train_ring(k, seed, steps):
    """Trains on the ring; returns the modes found and the share of samples within 3 sigma."""
    config = Config(loss="ns", batch=512, z_dim=256, lr_G=1e-3, lr_D=1e-4, beta1=0.5, beta2=0.999, augment="none",
                    amp="off", seed=seed, unroll=k)  # fmt: skip
    model, generator = Ring(config), torch.Generator().manual_seed(seed)
    data = ((ring(config.batch, generator), torch.zeros(config.batch, dtype=torch.int64)) for _ in iter(int, 1))
    for _ in range(steps):
        model.train_step(data)
    with torch.no_grad():
        return score(model.G(gan.sample_z(10_000, config.z_dim, generator=generator)))


def ring_command(argv):
    parser = argparse.ArgumentParser(prog="unrolled.py ring", description="Trains on 8 Gaussians for each k and seed.")
    parser.add_argument("--unroll", type=int, nargs="+", default=[0, 1, 5, 10], help="steps to look ahead (0 1 5 10)")
    parser.add_argument("--seeds", type=int, default=5, help="how many (5)")
    parser.add_argument("--steps", type=int, default=3000, help="of training (3000)")
    args = parser.parse_args(argv)
    print("| k | modes found, by seed | samples within 3 sigma |\n| ---: | --- | ---: |")
    for k in args.unroll:
        modes, near = zip(*(train_ring(k, seed, args.steps) for seed in range(args.seeds)))
        print(f"| {k} | {', '.join(map(str, modes))} | {statistics.mean(near):.0%} |", flush=True)


if __name__ == "__main__":
    ring_command(sys.argv[2:]) if sys.argv[1:2] == ["ring"] else gan.main(model=Unrolled)
