# SPDX-License-Identifier: MIT
"""Unrolled GAN (arXiv 1611.02163): G is trained against the D that k more steps would make. It then gains nothing by
moving all samples to where the present D is wrong, and keeps all modes.

    python recipes/unrolled.py ring                             # 8 Gaussians: which k finds them all?
    python recipes/unrolled.py study --seeds 3                  # MNIST: which digits? classifier.py's network says
    python recipes/unrolled.py train --data FOLDER --unroll 2   # your images, with gan.py's networks

Of the 8 Gaussians five seeds find 0.6 on average with k = 0, 7.8 with k = 1, and all with k = 5 and k = 10 (4,000
steps; 9.6 minutes of one of 2 cores of an Intel Xeon, torch 2.14.1). On MNIST three seeds end in noise of one kind with
k = 0, and draw many digits, though noisy ones, with k = 4 (2,000 steps; 1.9 minutes of an AMD EPYC).
"""

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.func import functional_call

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import gan
import report


@dataclass
class Config(gan.Config):
    unroll: int = gan.option(5, "steps of D that G looks ahead; 0: a plain GAN", lambda k: 0 <= k < 1e9)
    second_order: bool = gan.option(True, "let G's gradient flow through these steps, as in the paper")

    def __post_init__(self):
        if self.compile and self.unroll and self.second_order:
            raise gan.UserError("--compile gives no second derivatives: add --no-second-order")


class Unrolled(gan.GAN):
    Config = Config

    def update_G(self, real, fake, y):
        """Takes one step of G as GAN.update_G does, but against the D of k steps later."""
        if self.config.unroll == 0 or not self.opt_D.state:  # fp16 may skip D's first step
            return super().update_G(real, fake, y)
        d_loss, g_loss = gan.LOSSES[self.config.loss]
        real, fake = (gan.diff_augment(x, self.config.augment) for x in (real, fake))
        real_logits, fake_logits = self.logits(self.look_ahead(real, fake, y), real, fake, y)
        loss = g_loss(fake_logits - real_logits.detach() if self.config.loss == "rpgan" else fake_logits)
        # The later D depends on G, and so do its logits of real images: G raises D's loss on these too.
        self.descend(self.opt_G, loss - d_loss(real_logits, fake_logits.detach()))
        return loss.detach()

    def look_ahead(self, real, fake, y):
        """Takes k steps of a copy of D, all on this batch; returns the state of the copy, {name: tensor}."""
        second_order, d_loss = self.config.second_order, gan.LOSSES[self.config.loss][0]
        fake = fake if second_order else fake.detach()
        weights = {name: w.detach().requires_grad_() for name, w in self.D.named_parameters()}
        buffers = {name: buffer.clone() for name, buffer in self.D.named_buffers()}  # spectral norm changes its own
        rates = [self.rate(w) for w in self.D.parameters()]
        for _ in range(self.config.unroll):
            loss = d_loss(*self.logits(weights | buffers, real, fake, y))
            gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=second_order)
            weights = {name: w - rate * g for (name, w), rate, g in zip(weights.items(), rates, gradients)}
        return (weights if second_order else {name: w.detach() for name, w in weights.items()}) | buffers

    def rate(self, weight):
        """Computes the rate at which plain gradient descent moves a weight tensor of D about as far as Adam does.
        Adam's rate of a single element is vast where its gradient was zero so far, as behind a dead ReLU."""
        state, group = self.opt_D.state[weight], self.opt_D.param_groups[0]
        mean_square = state["exp_avg_sq"].mean() / (1 - group["betas"][1] ** state["step"].item())
        return group["lr"] / (mean_square.sqrt() + group["eps"])

    def logits(self, state, real, fake, y):
        """Computes the logits [B] of real and of fake by D in another state, as the losses take them."""
        with self.autocast:
            return (self.logit_scale * functional_call(self.D, state, (torch.cat([real, fake]), y.repeat(2)))).chunk(2)


# ---- Small plain networks, in which a collapse is easy to see
class Perceptron(nn.Sequential):
    """Maps [N,...] of n_in numbers each to [N,*shape] by two hidden layers without norms."""

    def __init__(self, n_in, width, *shape):
        hidden = nn.Linear(n_in, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        super().__init__(nn.Flatten(), *hidden, nn.Linear(width, math.prod(shape)))
        self.shape, self.z_dim, self.num_classes = shape, n_in, 0
        for layer in gan.orthogonal_init(self):
            layer.weight.data *= 0.8  # as in the paper

    def forward(self, x, y=None):
        x = super().forward(x).reshape(len(x), *self.shape)
        return x if self.training else x.clamp(-1, 1)  # to be shown; with a tanh, k = 4 drew one image for all z


class Plain(Unrolled):
    @staticmethod
    def networks(config, num_classes):
        shape = (2,) if config.data == "ring" else (config.channels, config.size, config.size)
        return Perceptron(config.z_dim, config.width, *shape), Perceptron(math.prod(shape), config.width)


# D learns more slowly than G, so that without a look-ahead G outruns it. A half-life of one image makes the averaged G
# the present one; an average would blend the modes that G visits in turn.
PLAIN = dict(lr_G=1e-3, lr_D=3e-4, beta1=0.5, beta2=0.999, augment="none", amp="off", device="cpu", ema_images=1)

# ---- The ring: 8 Gaussians of deviation 0.02 on a circle of radius 2
RING = Config(**PLAIN, data="ring", loss="ns", width=64, z_dim=16, steps=4000)
SIGMA, ANGLES = 0.02, torch.arange(8) * (2 * math.pi / 8)
CENTRES = 2 * torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)  # [8,2]


def points(config):
    """Yields batches (points [B,2] of the ring, classes [B], all zero) without end."""
    n, generator = config.batch, torch.Generator().manual_seed(config.seed)
    while True:
        centres = CENTRES[torch.randint(8, (n,), generator=generator)]
        yield centres + SIGMA * torch.randn(n, 2, generator=generator), torch.zeros(n, dtype=torch.int64)


def train_on_ring(config, n=10_000, moments=6):
    """Trains a GAN on the ring; returns n samples of G after each sixth of the steps, [moments,n,2]."""
    model, batches, samples = Plain(config), points(config), []
    z = torch.randn(n, config.z_dim, generator=torch.Generator().manual_seed(0))
    for step in range(1, config.steps + 1):
        model.train_step(batches)
        if step * moments // config.steps > (step - 1) * moments // config.steps:
            samples.append(model.G(z).detach())
    return torch.stack(samples)


def count_modes(x):
    """Counts the modes that at least 1% of x[N,2] lie within 3 sigma of; returns it and the share of x near one."""
    distance, nearest = torch.cdist(x, CENTRES).min(dim=1)
    near = distance < 3 * SIGMA
    counts = nearest[near].bincount(minlength=8)
    return int((counts >= len(x) / 100).sum()), near.float().mean().item()


def draw(x, pixels=100):
    """Draws the density of points x[N,2] in [-3,3], white from a share of 1/400 a pixel: uint8 [1,pixels,pixels]."""
    density = torch.histogramdd(x, pixels, range=[-3.0, 3.0] * 2).hist.T.flip(0) / len(x)
    return (255 * (400 * density).clamp(max=1)).to(torch.uint8)[None]


def ring(seeds, steps, out):
    """Prints a row for each k, and draws one: the first seed's samples over time, then the ring itself."""
    if out.suffix != ".png":
        raise gan.UserError(f"--out {out}: give a name that ends in .png")
    gan.say("| k | modes found, by seed | samples within 3 sigma |")
    gan.say("| ---: | --- | ---: |")
    pictures, real = [], draw(next(points(replace(RING, batch=10_000)))[0])
    for k in (0, 1, 5, 10):
        samples = [train_on_ring(replace(RING, unroll=k, seed=seed, steps=steps)) for seed in range(seeds)]
        modes, near = zip(*(count_modes(moments[-1]) for moments in samples))
        shares = f"{sum(near) / len(near):.0%} ({min(near):.0%} to {max(near):.0%})"
        gan.say(f"| {k} | {', '.join(map(str, modes))} | {shares} |")
        pictures += [*map(draw, samples[0]), real]
    gan.write_picture(out, gan.tile(torch.stack(pictures), columns=7))


def ring_command(argv):
    parser = gan.Parser(prog="unrolled.py ring", description="Looks for all 8 Gaussians with k = 0, 1, 5 and 10.")
    parser.add_argument("--seeds", type=lambda n: gan.whole_number(n, 1), default=5, help="runs of each k (5)")
    parser.add_argument("--steps", type=lambda n: gan.whole_number(n, 6), default=RING.steps, help="of a run (4000)")
    parser.add_argument("--out", type=Path, default=Path("unrolled.png"), help="picture to write (unrolled.png)")
    report.run_command(ring, parser, argv)


# ---- MNIST
DIGITS = dict(data="mnist", size=16, loss="minimax", width=128, z_dim=64, steps=2000, sample_every=1000)
STUDY = report.Study(
    name="unrolled",
    model=Plain,
    setting=Config(**PLAIN | DIGITS | dict(beta1=0.0)),  # with momentum one seed of three collapsed
    variants={"k = 0": dict(unroll=0), "k = 4": dict(unroll=4)},
    columns={"entropy of the digits, bits": 2},
    score=lambda logits, due: (report.entropy(logits),),
    draw=report.draw_strips,
)

if __name__ == "__main__":
    command = {"ring": ring_command, "study": STUDY.main}.get(sys.argv[1]) if sys.argv[1:] else None
    command(sys.argv[2:]) if command else gan.main(model=Unrolled)
