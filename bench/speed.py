# SPDX-License-Identifier: MIT
"""gan.py's training step and sampling beside a textbook loop of the very same networks.

    python bench/speed.py                     # all that this machine can do, some twenty minutes on two cores
    python bench/speed.py train64 memory      # some of it
    python bench/speed.py profile             # where the time of a step goes

The textbook: nearest upsampling, then a convolution; a convolution, then average pooling; NCHW; D looks at real and
fake in two passes, and takes gradients of its own in G's step; new samples for each network; Adam as it comes;
averaged weights in a Python loop; .item() at every step; float32.

The loops take turns, step by step, and times are medians: in one process, where both profit from the memory that
gan.py's commands hold, and "as started", each in a process of its own, gan.py's as the train command runs it and the
textbook's as a script would.
"""

import argparse
import contextlib
import copy
import ctypes
import os
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils import parametrize

ENVIRONMENT = dict(os.environ)  # a script's; importing gan adds how threads wait, of use to processes started later
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from step import peak_memory, processor, timed  # step.py beside this file

import gan

DEVICE = gan.join("auto")


# ---- The textbook networks: gan.py's modules, run as the papers draw them
class TextbookNorm(gan.AdaptiveBatchNorm):
    def forward(self, h, e):
        gain, bias = self.gain_bias(e).chunk(2, dim=1)
        return (1 + gain)[:, :, None, None] * self.norm(h) + bias[:, :, None, None]


class TextbookGeneratorBlock(gan.GeneratorBlock):
    def forward(self, x, e):
        h = F.relu(self.norm1(x, e))
        h = self.conv1(F.interpolate(h, scale_factor=2))
        h = self.conv2(F.relu(self.norm2(h, e)))
        return h + self.skip(F.interpolate(x, scale_factor=2))


class TextbookDiscriminatorBlock(gan.DiscriminatorBlock):
    def forward(self, x):
        h = self.conv2(F.relu(self.conv1(F.relu(x))))
        return F.avg_pool2d(h + self.skip(x), 2)


class TextbookGenerator(gan.Generator):
    def forward(self, z, y=None):
        z = z * (z.square().mean(dim=1, keepdim=True) + 1e-8) ** -0.3
        e = torch.cat([z, self.embed(y)], dim=1) if self.num_classes else z
        h = self.linear(e).view(len(z), -1, 4, 4)
        for block in self.blocks:
            h = block(h, e)
            h = self.attention(h) if h.shape[2] == 16 else h
        return torch.tanh(self.conv(F.relu(self.norm(h))))


class TextbookDiscriminator(gan.Discriminator):
    def features(self, x):
        h = self.conv(x)
        for block in self.blocks:
            h = block(h)
        return F.relu(h).sum(dim=(2, 3))


class TextbookAttention(gan.Attention):
    def forward(self, x):
        query, key, value = (F.conv2d(x, layer.weight[:, :, None, None]) for layer in self.children())
        key, value = (F.avg_pool2d(h, 2).flatten(2) for h in (key, value))
        shares = torch.softmax(query.flatten(2).transpose(1, 2) @ key, dim=2)
        return x + self.gain * (value @ shares.transpose(1, 2)).view(x.shape)


class TextbookSpectralNorm(gan.SpectralNorm):
    def forward(self, weight):
        matrix = weight.flatten(1)
        if self.training:
            with torch.no_grad():
                self.v.copy_(F.normalize(matrix.T @ self.u, dim=0))
                self.u.copy_(F.normalize(matrix @ self.v, dim=0))
        return weight / (self.u.clone() @ matrix @ self.v.clone())


TEXTBOOK = {
    gan.SpectralNorm: TextbookSpectralNorm,
    gan.Generator: TextbookGenerator,
    gan.Discriminator: TextbookDiscriminator,
    gan.GeneratorBlock: TextbookGeneratorBlock,
    gan.DiscriminatorBlock: TextbookDiscriminatorBlock,
    gan.AdaptiveBatchNorm: TextbookNorm,
    gan.Attention: TextbookAttention,
}


def textbook(net):
    """Copies G or D, with its weights and statistics, in the textbook's form and NCHW."""
    net = copy.deepcopy(net)
    for m in net.modules():
        if isinstance(m, torch.nn.Conv2d) and parametrize.is_parametrized(m):
            norm = m.parametrizations.weight[0]
            norm.v = norm.v.view(*m.kernel_size, -1).movedim(2, 0).flatten()  # from the order of channels_last
        m.__class__ = TEXTBOOK.get(type(m), type(m))
    return net.to(memory_format=torch.contiguous_format)


def textbook_of(model):
    """Copies a GAN in textbook form: its networks, and Adam as a loop over parameters."""
    other = copy.copy(model)
    other.G, other.D, other.G_ema = (textbook(net) for net in (model.G, model.D, model.G_ema))
    for name, net in (("opt_G", other.G), ("opt_D", other.D)):
        group = getattr(model, name).param_groups[0]
        setattr(other, name, torch.optim.Adam(net.parameters(), lr=group["lr"], betas=group["betas"]))
    return other


def textbook_step(model, data):
    """Takes one step as it is usually written. Returns both losses as numbers."""
    c, G, D = model.config, model.G, model.D
    d_loss, g_loss = gan.LOSSES[c.loss]
    real, y = next(data)

    fake = G(torch.randn(c.batch, c.z_dim, device=real.device), y).detach()
    loss_D = d_loss(D(gan.diff_augment(real, c.augment), y), D(gan.diff_augment(fake, c.augment), y))
    model.opt_D.zero_grad()
    loss_D.backward()
    model.opt_D.step()

    fake = G(torch.randn(c.batch, c.z_dim, device=real.device), y)
    loss_G = g_loss(D(gan.diff_augment(fake, c.augment), y))
    model.opt_G.zero_grad()
    loss_G.backward()
    model.opt_G.step()

    with torch.no_grad():
        for average, p in zip(model.G_ema.parameters(), G.parameters()):
            average.mul_(0.999).add_(p, alpha=0.001)
        for average, b in zip(model.G_ema.buffers(), G.buffers()):
            average.copy_(b)
    return loss_D.item(), loss_G.item()


# ---- Measuring
def make_gan(size, batch, amp="off", compile=False):
    """Makes a conditional hinge GAN of the default width, on the GPU if there is one, and data for it."""
    config = gan.Config(loss="hinge", cond=True, size=size, batch=batch, amp=amp, compile=compile,
                        augment="color,translation,cutout")  # fmt: skip
    device, config = gan.join(config.device), gan.resolve(config)
    images, labels, classes = gan.load_images("synthetic", config.size, config.channels)
    return gan.GAN(config, len(classes), device), gan.batches(images, labels, config, device)


def in_turns(turns, works, warm_up=5):
    """Returns the median seconds of each work, a dict as works; they take turns."""
    seconds = {name: [] for name in works}
    for _ in range(warm_up + turns):
        for name, work in works.items():
            seconds[name].append(timed(DEVICE, work)[0])
    return {name: statistics.median(taken[warm_up:]) for name, taken in seconds.items()}


def row(work, ours, textbook, unit, ratio):
    print(f"| {work} | {ours:.1f} {unit} | {textbook:.1f} {unit} | {ratio:.2f}x |", flush=True)


def rate_rows(work, images, seconds):
    """Prints a row for each loop in seconds, a dict, beside that of the textbook."""
    slow = seconds.pop("textbook")
    for name, fast in seconds.items():
        row(f"{work}, {name}", images / fast, images / slow, "images/s", slow / fast)


def training(size, batch, turns=9):
    """Compares float32 and bfloat16 with the textbook in float32, in one process and as started."""
    work = f"training, {size} px, batch {batch}"
    names = {"off": "float32", "bf16": "bfloat16 against float32"}
    models = {amp: make_gan(size, batch, amp)[0] for amp in names}
    other, data = textbook_of(models["off"]), make_gan(size, batch)[1]
    steps = {f"{names[amp]}, one process": partial(model.train_step, data) for amp, model in models.items()}
    rate_rows(work, batch, in_turns(turns, {"textbook": partial(textbook_step, other, data), **steps}))

    loops = {"textbook": Loop("textbook", size, batch)}
    default = {torch.bfloat16: "bf16", torch.float32: "off"}.get(gan.pick_dtype("auto", DEVICE))
    for amp, name in names.items():
        how = "gan.py train as it comes" if amp == default else f"gan.py train --amp {amp}"
        loops[f"{name}, as started: {how}"] = Loop("gan.py train", size, batch, "auto" if amp == default else amp)
    rate_rows(work, batch, in_turns(turns, {name: loop.step for name, loop in loops.items()}))
    for loop in loops.values():
        loop.end()


class Loop:
    """A training loop in a process of its own, which takes a step when it is told to."""

    def __init__(self, which, size, batch, amp="off", age=0):
        argv = [sys.executable, __file__, "--loop", which, str(size), str(batch), amp, str(age)]
        environment = ENVIRONMENT if which == "textbook" else None
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def step(self):
        print(file=self.process.stdin, flush=True)
        self.answer()

    def answer(self):
        return self.process.stdout.readline() or sys.exit("a loop has ended early")

    def end(self):
        """Ends the process; returns the MiB that its steps added to its largest use, or on a GPU to the device's."""
        self.process.stdin.close()
        mib = int(self.answer())
        self.process.wait()
        return mib


def loop(which, size, batch, amp, age):
    """Does what a Loop's process does: age steps, then one for each line on stdin."""
    if which == "gan.py train":
        hold_memory()
    model, data = make_gan(int(size), int(batch), amp)
    step = partial(textbook_step, textbook_of(model)) if which == "textbook" else model.train_step
    before = peak_memory(DEVICE) or 0
    for _ in range(int(age)):
        step(data)
    for _ in sys.stdin:
        timed(DEVICE, step, data)
        print("done", flush=True)
    print(max(1, ((peak_memory(DEVICE) or 0) - before) // 2**20))


def sampling(n=640):
    G = make_gan(64, 64)[0].G_ema
    works = {"textbook": partial(gan.generate, textbook(G), n), "64 px, batch 64": partial(gan.generate, G, n)}
    rate_rows(f"gan.generate, {n} samples", n, in_turns(3, works, warm_up=1))


def memory(size=64, batch=32):
    """Compares gan.py's loop as the train command runs it, and in a program that holds no memory, with the textbook."""
    theirs = Loop("textbook", size, batch, age=8).end()
    for name, amp in (("gan.py train", "off"), ("gan.py train", "auto"), ("gan.py imported", "off")):
        ours, how = Loop(name, size, batch, amp, age=8).end(), "as it comes" if amp == "auto" else "float32"
        row(f"memory that steps take, {size} px, batch {batch}, {name}, {how}", ours, theirs, "MiB", theirs / ours)


def aging(young=200, old=2000):
    loops = {age: Loop("gan.py train", 32, 16, age=age) for age in (young, old)}
    s = in_turns(100, {age: loop.step for age, loop in loops.items()})  # the first, to warm up, waits for their age
    for loop in loops.values():
        loop.end()
    print(f"a step, 32 px, batch 16: {1000 * s[old]:.1f} ms after {old:,}, {1000 * s[young]:.1f} after "
          f"{young}: {s[old] / s[young]:.3f}", flush=True)  # fmt: skip


def profile(size=64, batch=32, steps=5):
    """Prints the largest costs of a step, of both loops, by operator."""
    model, data = make_gan(size, batch)
    loops = {"textbook": partial(textbook_step, textbook_of(model), data), "gan.py": partial(model.train_step, data)}
    for name, step in loops.items():
        step()
        with torch.profiler.profile() as profiler:
            for _ in range(steps):
                timed(DEVICE, step)
        kind = f"self_{'device' if DEVICE.type == 'cuda' else 'cpu'}_time_total"
        costs = sorted(((getattr(event, kind), event.key) for event in profiler.key_averages()), reverse=True)
        total = sum(microseconds for microseconds, _ in costs)
        shares = ", ".join(f"{key.removeprefix('aten::')} {us / total:.0%}" for us, key in costs[:6])
        print(f"{name}: {total / steps / 1e6:.2f} s a step; {shares}", flush=True)


def compiling():
    batch = 64 if DEVICE.type == "cuda" else 32
    models = {compile: make_gan(64, batch, "bf16", compile) for compile in (False, True)}
    s = in_turns(9, {compile: partial(model.train_step, data) for compile, (model, data) in models.items()})
    print(f"a step, 64 px, batch {batch}, bfloat16, with --compile: {1000 * s[True]:.1f} ms, "
          f"{1000 * s[False]:.1f} without: {s[False] / s[True]:.2f}x", flush=True)  # fmt: skip


WORKS = {
    "train64": partial(training, 64, 64, turns=50) if DEVICE.type == "cuda" else partial(training, 64, 32),
    "train32": partial(training, 32, 64, turns=25),
    "sampling": sampling,
    "memory": memory,
    "aging": aging,
    "compile": compiling,
    "profile": profile,
}


def hold_memory():
    """Keeps freed memory in this process, as the train command does."""
    with contextlib.suppress(OSError, AttributeError):  # another system, or a C library other than GNU's
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0), mallopt(-1, 2**31 - 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("works", nargs="*", default="all", choices=["all", *WORKS], help="what to measure (all)")
    parser.add_argument("--loop", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.loop:
        return loop(*args.loop)
    hold_memory()  # it serves both
    print(f"{processor(DEVICE)}, torch {torch.__version__}\n\n| work | gan.py | textbook | ratio |")
    print("| --- | ---: | ---: | ---: |", flush=True)
    for name in WORKS if "all" in args.works else args.works:
        WORKS[name]()


if __name__ == "__main__":
    main()
