# SPDX-License-Identifier: MIT
"""Unrolled GAN (arXiv 1611.02163): G is trained against the D that k more steps would make.

    python recipes/unrolled.py ring                                          # 8 Gaussians: which k finds them all?
    python recipes/unrolled.py study --seeds 3                               # MNIST: which digits?
    python recipes/unrolled.py train --loss rpgan --data FOLDER --unroll 2   # your images, with gan.py's networks

G then gains nothing by moving all samples to where the present D is wrong, and keeps all modes. On digits the study has
small perceptrons under the minimax loss and gan.py's networks under ns, each with k = 0 and k = 4.

The ring: 4,000 steps, five seeds; the 20 runs took 13 minutes of one core of an Intel Xeon beside another training. D
must learn more slowly than G, or there is nothing to mend: with 5e-4 for D (`lr_D` of `PLAIN`), k = 0 found 7, 5, 1, 0
and 5 modes after 3,000 steps. With k = 0, G begins to spread over the circle only at the end.

Digits: MNIST at 16 px, three seeds; the twelve runs took 27 minutes of one core of an Intel Xeon beside other work, 20
of them for the convolutions with k = 4. Entropy is that of the digits (real images: FD 0.3, 3.31 bits).

                           FD(digits)     entropy, bits
    perceptrons, k = 0    778.9 ± 61.4      0.01 ± 0.02
    perceptrons, k = 4    209.6 ± 23.5      1.64 ± 0.10
    convolutions, k = 0    29.8 ± 11.0      3.09 ± 0.06
    convolutions, k = 4    43.9 ± 18.2      2.89 ± 0.27

Perceptrons take 2,000 steps without momentum. With k = 0 all seeds end in noise that is read as one digit, with k = 4
all draw many digits, though noisy ones. gan.py's networks, 1,000 steps of ns, are spread over all digits with k = 0, so
that a look-ahead has nothing to mend.
Takes `Study` from digits.py and `run_command` from report.py.
"""

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.func import functional_call

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import digits
import gan
import report


@dataclass
class Config(gan.Config):
    unroll: int = gan.option(5, "steps of D that G looks ahead; 0: a plain GAN", gan.not_negative)
    second_order: bool = gan.option(True, "let G's gradient flow through these steps, as in the paper")
    plain: bool = gan.option(False, "small perceptrons in place of convolutional networks; --width is theirs")
    center: bool = gan.option(False, "subtract the mean of all logits in the loss")

    def __post_init__(self):
        if self.compile and self.unroll and self.second_order:
            raise gan.UserError("--compile gives no second derivatives: add --no-second-order")


class Unrolled(gan.GAN):
    """Trains G against the D of some steps later."""

    Config = Config

    @staticmethod
    def networks(config, num_classes):
        if not config.plain:
            return gan.GAN.networks(config, num_classes)
        if num_classes:
            raise gan.UserError("perceptrons see no classes: leave out --cond")
        shape = (2,) if config.data == "ring" else (config.channels, config.size, config.size)
        G = Perceptron(config.z_dim, config.width, *shape)
        D = Perceptron(math.prod(shape), config.width)
        return G, D

    def update_G(self, real, fake, y, real_logits):
        """Takes one step of G as GAN.update_G does, but against the D of config.unroll steps later."""
        if self.config.unroll == 0 or not self.opt_D.state:  # fp16 may skip D's first step
            return super().update_G(real, fake, y, real_logits)
        real = gan.diff_augment(real, self.config.augment)
        fake = gan.diff_augment(fake, self.config.augment)
        later = self.look_ahead(real, fake, y)
        real_logits, fake_logits = self.logits(later, real, fake, y)
        loss = self.loss_G(real_logits.detach(), fake_logits)
        # The later D depends on G, and so do its logits of real images: G raises D's loss on these too.
        loss_D = self.loss_D(real_logits, fake_logits.detach())
        self.descend(self.opt_G, loss - loss_D)
        return loss.detach()

    def look_ahead(self, real, fake, y):
        """Takes config.unroll steps of a copy of D, all on this batch; returns the copy's state, {name: tensor}."""
        second_order = self.config.second_order
        if not second_order:
            fake = fake.detach()
        buffers = {name: buffer.clone() for name, buffer in self.D.named_buffers()}  # spectral norm changes its own
        weights = {name: w.detach().requires_grad_() for name, w in self.D.named_parameters()}
        rates = [self.rate(w) for w in self.D.parameters()]
        for _ in range(self.config.unroll):
            real_logits, fake_logits = self.logits(weights | buffers, real, fake, y)
            loss = self.loss_D(real_logits, fake_logits)
            gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=second_order)
            weights = {name: w - rate * g for (name, w), rate, g in zip(weights.items(), rates, gradients)}
        if not second_order:
            weights = {name: w.detach() for name, w in weights.items()}
        return weights | buffers

    def rate(self, weight):
        """Computes the rate at which plain gradient descent moves a weight tensor of D about as far as Adam does.

        Adam's rate of a single element is vast where its gradient was zero so far, as behind a dead ReLU.
        """
        state = self.opt_D.state[weight]
        group = self.opt_D.param_groups[0]
        mean_square = state["exp_avg_sq"].mean() / (1 - group["betas"][1] ** state["step"].item())
        return group["lr"] / (mean_square.sqrt() + group["eps"])

    def logits(self, state, real, fake, y):
        """Computes the logits [B] of real and of fake by D in another state."""
        both = torch.cat([real, fake])
        with self.autocast:
            return functional_call(self.D, state, (both, y.repeat(2))).chunk(2)


# ---- Small plain networks, in which a collapse is easy to see
class Perceptron(nn.Sequential):
    """Maps [N,...] of n_in numbers each to [N,*shape] by two hidden layers without norms."""

    def __init__(self, n_in, width, *shape):
        first = nn.Linear(n_in, width)
        second = nn.Linear(width, width)
        last = nn.Linear(width, math.prod(shape))
        super().__init__(nn.Flatten(), first, nn.ReLU(), second, nn.ReLU(), last)
        self.shape = shape
        self.z_dim = n_in
        self.num_classes = 0
        gan.orthogonal_init(self)
        for layer in gan.layers_of(self, nn.Linear):
            layer.weight.data *= 0.8  # as in the paper

    def forward(self, x, y=None):
        x = super().forward(x).reshape(len(x), *self.shape)
        return x if self.training else x.clamp(-1, 1)  # to be shown; with a tanh, k = 4 drew one image for all z


# D learns more slowly than G, so that without a look-ahead G outruns it. A half-life of one image makes the averaged G
# the present one; an average would blend the modes that G visits in turn.
PLAIN = {
    "plain": True,
    "lr_G": 1e-3,
    "lr_D": 3e-4,
    "beta1": 0.5,
    "beta2": 0.999,
    "augment": "none",
    "r1": 0,
    "amp": "off",
    "device": "cpu",
    "ema_images": 1,
}

# ---- The ring: 8 Gaussians of deviation 0.02 on a circle of radius 2
RING = Config(**PLAIN, data="ring", loss="ns", width=64, z_dim=16, steps=4000)
SIGMA = 0.02
ANGLES = torch.arange(8) * (2 * math.pi / 8)
CENTRES = 2 * torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)  # [8,2]


def points(config):
    """Yields batches (points [B,2] of the ring, classes [B], all zero) without end."""
    generator = torch.Generator().manual_seed(config.seed)
    while True:
        centres = CENTRES[torch.randint(8, (config.batch,), generator=generator)]
        noise = torch.randn(config.batch, 2, generator=generator)
        yield centres + SIGMA * noise, torch.zeros(config.batch, dtype=torch.int64)


def train_on_ring(config, n=10_000, moments=6):
    """Trains a GAN on the ring; returns n samples of G after each sixth of the steps, [moments,n,2]."""
    model = Unrolled(config)
    batches = points(config)
    z = torch.randn(n, config.z_dim, generator=torch.Generator().manual_seed(0))
    due = [config.steps * i // moments for i in range(1, moments + 1)]
    samples = []
    for step in range(1, config.steps + 1):
        model.train_step(batches)
        if step in due:
            samples.append(model.G(z).detach())
    return torch.stack(samples)


def count_modes(x):
    """Counts the modes that at least 1% of x[N,2] lie within 3 sigma of; returns it and the share of x near one."""
    distance, nearest = torch.cdist(x, CENTRES).min(dim=1)
    near = distance < 3 * SIGMA
    counts = nearest[near].bincount(minlength=8)
    found = counts >= len(x) / 100
    return found.sum().item(), near.float().mean().item()


def draw(x, pixels=100):
    """Draws the density of points x[N,2] in [-3,3], white from a share of 1/400 a pixel: uint8 [1,pixels,pixels]."""
    counts = torch.histogramdd(x, pixels, range=[-3.0, 3.0] * 2).hist  # [x,y]
    density = counts.T.flip(0) / len(x)  # y upwards
    return (255 * (400 * density).clamp(max=1)).to(torch.uint8)[None]


def ring(seeds, steps, out):
    """Prints a row for each k, and draws one: the first seed's samples over time, then the ring itself."""
    if out.suffix != ".png":
        raise gan.UserError(f"--out {out}: give a name that ends in .png")
    gan.say("| k | modes found, by seed | samples within 3 sigma |")
    gan.say("| ---: | --- | ---: |")
    real, _ = next(points(replace(RING, batch=10_000)))
    pictures = []
    for k in (0, 1, 5, 10):
        samples = [train_on_ring(replace(RING, unroll=k, seed=seed, steps=steps)) for seed in range(seeds)]
        modes, near = zip(*(count_modes(moments[-1]) for moments in samples))
        found = ", ".join(map(str, modes))
        mean = sum(near) / seeds
        gan.say(f"| {k} | {found} | {mean:.0%} ({min(near):.0%} to {max(near):.0%}) |")
        pictures += [*map(draw, samples[0]), draw(real)]
    gan.write_picture(out, gan.tile(torch.stack(pictures), columns=7), gan.SHEET)


def ring_command(argv):
    parser = gan.Parser(prog="unrolled.py ring", description="Looks for all 8 Gaussians with k = 0, 1, 5 and 10.")
    parser.add_argument("--seeds", type=lambda n: gan.whole_number(n, 1), default=5, help="runs of each k (5)")
    parser.add_argument("--steps", type=lambda n: gan.whole_number(n, 6), default=RING.steps, help="of a run (4000)")
    parser.add_argument("--out", type=Path, default=Path("unrolled.png"), help="picture to write (unrolled.png)")
    report.run_command(ring, parser, argv)


# ---- MNIST
DIGITS = (  # what PLAIN says, but without momentum, with which one seed of three collapsed
    "--plain --lr-G 0.001 --lr-D 0.0003 --beta1 0 --beta2 0.999 --augment none --r1 0 --amp off --device cpu "
    "--ema-images 1 --loss minimax --size 16 --width 128 --z-dim 64 --sample-every 1000"
)
CONVOLUTIONS = "--no-plain --loss ns --width 8 --steps 1000"  # gan.py's networks, small
VARIANTS = {
    "k = 0": "--unroll 0",
    "k = 4": "--unroll 4",
    "convolutions, k = 0": f"{CONVOLUTIONS} --unroll 0",
    "convolutions, k = 4": f"{CONVOLUTIONS} --unroll 4",
}
STUDY = digits.Study(
    name="unrolled",
    model=Unrolled,
    data="mnist",
    steps=2000,
    flags=DIGITS,
    variants=VARIANTS,
    columns={"entropy of the digits, bits": 2},
    score=lambda logits, due: (digits.entropy(logits),),
    draw=digits.draw_strips,
)

if __name__ == "__main__":
    if sys.argv[1:2] == ["ring"]:
        ring_command(sys.argv[2:])
    else:
        STUDY.run()
