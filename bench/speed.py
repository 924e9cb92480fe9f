# SPDX-License-Identifier: MIT
"""gan.py's training step and sampling beside a textbook loop of the very same networks.

    python bench/speed.py                     # all that this machine can do, some fifteen minutes on two cores
    python bench/speed.py train64 memory      # some of it
    python bench/speed.py profile             # where the time of a step goes

The textbook: nearest upsampling, then a convolution; a convolution, then average pooling; NCHW; D looks at real and
fake in two passes, and takes gradients of its own in G's step; samples of its own for each network; Adam as it comes,
averaged weights in a Python loop; .item() at every step; float32.

The loops take turns, step by step, and times are medians: in one process, where both profit from the memory that
gan.py's commands hold, and "as started", each in a process of its own, gan.py's as the train command runs it and the
textbook's as a script would.
"""

import argparse
import collections
import copy
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gan  # noqa: E402, before torch, for its threads' sake
import step as step_bench  # noqa: E402, step.py beside this file

import torch
import torch.nn.functional as F
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode


# ---------------------------------------------------------------------------------------------------------------------
# The textbook networks: gan.py's modules, run as the papers draw them


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
        e = torch.cat([z, self.embed(y)], dim=1) if self.num_classes else z
        h = self.linear(e).view(len(z), -1, 4, 4)
        for block in self.blocks:
            h = block(h, e)
        return torch.tanh(self.conv(F.relu(self.norm(h))))


class TextbookDiscriminator(gan.Discriminator):
    def forward(self, x, y=None):
        h = self.conv(x)
        for block in self.blocks:
            h = block(h)
        phi = F.relu(h).sum(dim=(2, 3))
        logits = self.linear(phi).squeeze(1)
        return logits + (phi * self.embed(y)).sum(dim=1) if self.num_classes else logits


class TextbookSpectralNorm(gan.SpectralNorm):
    @staticmethod
    def matrix(weight):
        return weight.flatten(1)


TEXTBOOK = {
    gan.SpectralNorm: TextbookSpectralNorm,
    gan.Generator: TextbookGenerator,
    gan.Discriminator: TextbookDiscriminator,
    gan.GeneratorBlock: TextbookGeneratorBlock,
    gan.DiscriminatorBlock: TextbookDiscriminatorBlock,
    gan.AdaptiveBatchNorm: TextbookNorm,
}


def textbook(net):
    """A copy of G or D with the same weights and statistics, in the textbook's form and NCHW."""
    net = copy.deepcopy(net)
    for m in net.modules():
        if isinstance(m, torch.nn.Conv2d) and parametrize.is_parametrized(m):
            norm = m.parametrizations.weight[0]
            norm.v = norm.v.view(*m.kernel_size, -1).movedim(2, 0).flatten()  # from channels_last
    for m in net.modules():
        m.__class__ = TEXTBOOK.get(type(m), type(m))
    return net.to(memory_format=torch.contiguous_format)


def textbook_of(model):
    """A copy of a GAN in textbook form: its networks, and Adam as a loop over parameters."""
    other = copy.copy(model)
    other.G, other.D, other.G_ema = (textbook(net) for net in (model.G, model.D, model.G_ema))
    for name, net in (("opt_G", other.G), ("opt_D", other.D)):
        group = getattr(model, name).param_groups[0]
        setattr(other, name, torch.optim.Adam(net.parameters(), lr=group["lr"], betas=group["betas"]))
    return other


def textbook_step(model, data):
    """One iteration as it is usually written. Returns the two losses as numbers."""
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

    model.steps += 1
    with torch.no_grad():
        for average, p in zip(model.G_ema.parameters(), G.parameters()):
            average.mul_(0.999).add_(p, alpha=0.001)
        for average, b in zip(model.G_ema.buffers(), G.buffers()):
            average.copy_(b)
    return loss_D.item(), loss_G.item()


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def make_gan(size, batch, amp="off"):
    """(a GAN of the default width, a stream of data for it): conditional, hinge, on the GPU if there is one."""
    config = gan.Config(loss="hinge", cond=True, size=size, batch=batch, amp=amp, augment="color,translation,cutout")
    device, config = gan.join(config.device), gan.resolve(config)
    images, labels, classes = gan.load_images("synthetic", config.size, config.channels)
    return gan.GAN(config, len(classes), device), gan.batches(images, labels, config, device)


def in_turns(turns, works, warm_up=5):
    """The median seconds of each work; they take turns."""
    seconds = [[] for _ in works]
    for turn in range(warm_up + turns):
        for work, taken in zip(works, seconds):
            started = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warm_up:
                taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in seconds]


def row(work, ours, textbook, ratio):
    print(f"| {work} | {ours} | {textbook} | {ratio} |", flush=True)


def training(size, batch, amp="off", turns=9):
    work = f"training, {size} px, batch {batch}, {'bfloat16 against float32' if amp == 'bf16' else 'float32'}"
    model, data = make_gan(size, batch, amp)
    other = textbook_of(model)
    slow, fast = in_turns(turns, [lambda: textbook_step(other, data), lambda: model.train_step(data)])
    row(f"{work}, one process", f"{batch / fast:.1f} images/s", f"{batch / slow:.1f} images/s", f"{slow / fast:.2f}x")
    loops = [Loop("textbook", size, batch), Loop("gan.py train", size, batch, amp)]
    slow, fast = in_turns(turns, [loop.step for loop in loops])
    for loop in loops:
        loop.end()
    row(f"{work}, as started", f"{batch / fast:.1f} images/s", f"{batch / slow:.1f} images/s", f"{slow / fast:.2f}x")


class Loop:
    """A training loop in a process of its own, which goes on by a step when asked to."""

    def __init__(self, which, size, batch, amp="off", age=0):
        argv = [sys.executable, __file__, "--loop", which, str(size), str(batch), amp, str(age)]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def step(self):
        print(file=self.process.stdin, flush=True)
        self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit("a loop has ended early")
        return line

    def end(self):
        """Ends the process; returns the MiB that its steps added to its largest use, or on a GPU to the device's."""
        self.process.stdin.close()
        mib = int(self.answer())
        self.process.wait()
        return mib


def loop(which, size, batch, amp, age):
    """What a Loop's process does: age steps, then one for each line on stdin."""
    if which == "gan.py train":
        gan.hold_memory()
    model, data = make_gan(int(size), int(batch), amp)
    if which == "textbook":
        model = textbook_of(model)
    before = step_bench.peak_memory(model.device)

    def step():
        textbook_step(model, data) if which == "textbook" else model.train_step(data).tolist()

    for _ in range(int(age)):
        step()
    for _ in sys.stdin:
        step()
        print("done", flush=True)
    print((step_bench.peak_memory(model.device) - before) // 2**20)


def sampling(n=640):
    G = make_gan(64, 64)[0].G_ema
    other = textbook(G)
    works = [lambda: gan.generate(other, n), lambda: gan.generate(G, n)]
    slow, fast = in_turns(3, works, warm_up=1)
    row(
        f"gan.generate, {n} samples, 64 px, batch 64",
        f"{n / fast:.1f} images/s",
        f"{n / slow:.1f} images/s",
        f"{slow / fast:.2f}x",
    )


def memory(size=64, batch=32):
    """gan.py's loop as the train command runs it, and as a program does that has only copied it."""
    loops = {which: Loop(which, size, batch, age=8) for which in ("gan.py train", "gan.py", "textbook")}
    peaks = {which: loop.end() for which, loop in loops.items()}
    theirs = peaks.pop("textbook")
    for which, ours in peaks.items():
        work = f"memory that steps take, {size} px, batch {batch}, {which}"
        row(work, f"{ours} MiB", f"{theirs} MiB", f"{theirs / ours:.2f}x")


def aging(young=200, old=2000):
    loops = [Loop("gan.py train", 32, 16, age=age) for age in (young, old)]
    for loop in loops:
        loop.step()  # it has reached its age
    first, second = (1000 * seconds for seconds in in_turns(100, [loop.step for loop in loops]))
    for loop in loops:
        loop.end()
    print(
        f"a step, 32 px, batch 16: {second:.1f} ms after {old:,}, {first:.1f} after {young}: {second / first:.3f}",
        flush=True,
    )


class Stopwatch(TorchDispatchMode):
    """Sums the seconds of each operator, by its name."""

    def __init__(self):
        super().__init__()
        self.seconds = collections.Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        started = time.perf_counter()
        result = operator(*args, **(kwargs or {}))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[operator.name().removeprefix("aten::")] += time.perf_counter() - started
        return result


def profile(size=64, batch=32, steps=5):
    """The largest costs of a step, of both loops."""
    model, data = make_gan(size, batch)
    other = textbook_of(model)
    for name, work in (
        ("textbook", lambda: textbook_step(other, data)),
        ("gan.py", lambda: model.train_step(data)),
    ):
        in_turns(1, [work])
        with Stopwatch() as watch:
            for _ in range(steps):
                work()
        total = sum(watch.seconds.values())
        costs = ", ".join(f"{operator} {taken / total:.0%}" for operator, taken in watch.seconds.most_common(6))
        print(f"{name}: {total / steps:.2f} s a step; {costs}", flush=True)


def compiling():
    batch = 64 if torch.cuda.is_available() else 32
    model, data = make_gan(64, batch, "bf16")
    fast, _ = make_gan(64, batch, "bf16")
    fast.G.compile(), fast.D.compile()
    eager, quick = in_turns(9, [lambda: model.train_step(data), lambda: fast.train_step(data)])
    work, times = f"a step, 64 px, batch {batch}, bfloat16", f"{1000 * quick:.1f} ms, {1000 * eager:.1f} without"
    print(f"{work}, with --compile: {times}: {eager / quick:.2f}x", flush=True)


WORKS = {
    "train64": lambda: training(64, 32),
    "train64-bf16": lambda: training(64, 32, "bf16"),
    "train32": lambda: training(32, 64, turns=25),
    "train32-bf16": lambda: training(32, 64, "bf16", turns=25),
    "cuda": lambda: training(64, 64, "bf16", turns=50),
    "sampling": sampling,
    "memory": memory,
    "aging": aging,
    "compile": compiling,
    "profile": profile,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("works", nargs="*", default="all", choices=["all", *WORKS], help="what to measure (all)")
    parser.add_argument("--loop", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.loop:
        return loop(*args.loop)
    gan.hold_memory()  # as the train command does; it serves both
    if "cuda" in args.works and not torch.cuda.is_available():
        parser.error("no GPU here")
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else None
    print(f"{model[1] if model else platform.processor()}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
          f"{torch.cuda.device_count()} GPUs\n")  # fmt: skip
    print("| work | gan.py | textbook | ratio |\n| --- | ---: | ---: | ---: |")
    here = [name for name in WORKS if name != "cuda" or torch.cuda.is_available()]
    for name in here if "all" in args.works else args.works:
        WORKS[name]()


if __name__ == "__main__":
    main()
