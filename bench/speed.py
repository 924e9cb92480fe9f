# SPDX-License-Identifier: MIT
"""gan.py's training step and sampling beside a textbook loop of the very same networks.

    python bench/speed.py                     # all that this machine can do, some twenty minutes on two cores
    python bench/speed.py train64 memory      # some of it
    python bench/speed.py profile             # where the time of a step goes

The textbook: nearest upsampling, then a convolution; a convolution, then average pooling; NCHW; D looks at real and
fake in two passes, and takes gradients of its own in G's step; new samples for each network; Adam as it comes;
averaged weights in a Python loop; .item() at every step; float32; no gradient penalty.

The loops take turns, step by step, and times are medians: in one process, where both profit from the memory that
gan.py's commands hold, and "as started", each in a process of its own, gan.py's as the train command runs it and the
textbook's as a script would.
"""

import argparse
import contextlib
import copy
import ctypes
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils import parametrize

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gan
from step import peak_memory, processor, timed  # step.py beside this file

DEVICE = gan.join("auto")
DTYPES = {torch.bfloat16: "bf16", torch.float32: "off"}


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
        e = torch.cat([z, self.embed(y)], dim=1) if self.num_classes else z
        h = self.linear(e).view(len(z), -1, 4, 4)
        for block in self.blocks:
            h = block(h, e)
        return torch.tanh(self.conv(F.relu(self.norm(h))))


class TextbookDiscriminator(gan.Discriminator):
    def features(self, x):
        h = self.conv(x)
        for block in self.blocks:
            h = block(h)
        return F.relu(h).sum(dim=(2, 3))


class TextbookSpectralNorm(gan.SpectralNorm):
    def forward(self, weight):
        matrix = weight.flatten(1)
        if self.training:
            with torch.no_grad():
                self.v.copy_(F.normalize(matrix.T @ self.u, dim=0))
                self.u.copy_(F.normalize(matrix @ self.v, dim=0))
        return self.gain * weight / (self.u.clone() @ matrix @ self.v.clone())


TEXTBOOK = {
    gan.SpectralNorm: TextbookSpectralNorm,
    gan.Generator: TextbookGenerator,
    gan.Discriminator: TextbookDiscriminator,
    gan.GeneratorBlock: TextbookGeneratorBlock,
    gan.DiscriminatorBlock: TextbookDiscriminatorBlock,
    gan.AdaptiveBatchNorm: TextbookNorm,
}


def textbook(net):
    """Copies G or D, with its weights and statistics, in the textbook's form and NCHW."""
    net = copy.deepcopy(net)
    for layer in net.modules():
        if isinstance(layer, torch.nn.Conv2d) and parametrize.is_parametrized(layer):
            norm = layer.parametrizations.weight[0]
            v = norm.v.view(*layer.kernel_size, -1)  # in the order of channels_last
            norm.v = v.movedim(2, 0).flatten()
        layer.__class__ = TEXTBOOK.get(type(layer), type(layer))
    return net.to(memory_format=torch.contiguous_format)


def textbook_of(model):
    """Copies a GAN in textbook form: its networks, and Adam as a loop over parameters."""
    c = model.config
    other = copy.copy(model)
    other.G = textbook(model.G)
    other.D = textbook(model.D)
    other.G_ema = textbook(model.G_ema)
    other.opt_G = torch.optim.Adam(other.G.parameters(), c.lr_G, (c.beta1, c.beta2))
    other.opt_D = torch.optim.Adam(other.D.parameters(), c.lr_D, (c.beta1, c.beta2))
    return other


def textbook_step(model, data):
    """Takes one step as it is usually written. Returns both losses as numbers."""
    c = model.config
    real, y = next(data)

    fake = model.G(torch.randn(c.batch, c.z_dim, device=real.device), y).detach()
    real_logits = model.D(gan.diff_augment(real, c.augment), y)
    loss_D = gan.D_LOSSES[c.loss](real_logits, model.D(gan.diff_augment(fake, c.augment), y))
    model.opt_D.zero_grad()
    loss_D.backward()
    model.opt_D.step()

    fake = model.G(torch.randn(c.batch, c.z_dim, device=real.device), y)
    loss_G = gan.G_LOSSES[c.loss](real_logits.detach(), model.D(gan.diff_augment(fake, c.augment), y))
    model.opt_G.zero_grad()
    loss_G.backward()
    model.opt_G.step()

    with torch.no_grad():
        for average, p in zip(model.G_ema.parameters(), model.G.parameters()):
            average.mul_(0.999).add_(p, alpha=0.001)
        for average, b in zip(model.G_ema.buffers(), model.G.buffers()):
            average.copy_(b)
    return loss_D.item(), loss_G.item()


# ---- Measuring
def make_gan(size, batch, amp="off", compile=False):
    """Makes a conditional GAN of the default width, on the GPU if there is one, and data for it."""
    config = gan.resolve(gan.Config(cond=True, size=size, batch=batch, amp=amp, compile=compile))
    device = gan.join(config.device)
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

    # In one process.
    _, data = make_gan(size, batch)
    models = {amp: make_gan(size, batch, amp)[0] for amp in names}
    works = {"textbook": partial(textbook_step, textbook_of(models["off"]), data)}
    for amp, model in models.items():
        works[f"{names[amp]}, one process"] = partial(model.train_step, data)
    rate_rows(work, batch, in_turns(turns, works))

    # As started.
    loops = {"textbook": Loop("textbook", size, batch)}
    default = DTYPES.get(gan.pick_dtype("auto", DEVICE))
    for amp, name in names.items():
        if amp == default:
            loops[f"{name}, as started: gan.py train as it comes"] = Loop("gan.py train", size, batch, "auto")
        else:
            loops[f"{name}, as started: gan.py train --amp {amp}"] = Loop("gan.py train", size, batch, amp)
    rate_rows(work, batch, in_turns(turns, {name: loop.step for name, loop in loops.items()}))
    for loop in loops.values():
        loop.end()


class Loop:
    """A training loop in a process of its own, which takes a step when it is told to."""

    def __init__(self, which, size, batch, amp="off", age=0):
        argv = [sys.executable, __file__, "--loop", which, str(size), str(batch), amp, str(age)]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

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
    grown = (peak_memory(DEVICE) or 0) - before
    print(max(1, grown // 2**20))


def sampling(n=640):
    model, _ = make_gan(64, 64)
    works = {
        "textbook": partial(gan.generate, textbook(model.G_ema), n),
        "64 px, batch 64": partial(gan.generate, model.G_ema, n),
    }
    rate_rows(f"gan.generate, {n} samples", n, in_turns(3, works, warm_up=1))


def memory(size=64, batch=32):
    """Compares gan.py's loop as the train command runs it, and in a program that holds no memory, with the textbook."""
    theirs = Loop("textbook", size, batch, age=8).end()
    for name, amp in (("gan.py train", "off"), ("gan.py train", "auto"), ("gan.py imported", "off")):
        ours = Loop(name, size, batch, amp, age=8).end()
        how = "as it comes" if amp == "auto" else "float32"
        row(f"memory that steps take, {size} px, batch {batch}, {name}, {how}", ours, theirs, "MiB", theirs / ours)


def profile(size=64, batch=32, steps=5):
    """Prints the largest costs of a step, of both loops, by operator."""
    model, data = make_gan(size, batch)
    loops = {"textbook": partial(textbook_step, textbook_of(model), data), "gan.py": partial(model.train_step, data)}
    kind = f"self_{'device' if DEVICE.type == 'cuda' else 'cpu'}_time_total"
    for name, step in loops.items():
        step()
        with torch.profiler.profile() as profiler:
            for _ in range(steps):
                timed(DEVICE, step)
        costs = {event.key: getattr(event, kind) for event in profiler.key_averages()}
        total = sum(costs.values())  # microseconds
        largest = sorted(costs, key=costs.get, reverse=True)[:6]
        shares = ", ".join(f"{key.removeprefix('aten::')} {costs[key] / total:.0%}" for key in largest)
        print(f"{name}: {total / steps / 1e6:.2f} s per step; {shares}", flush=True)


def compiling():
    """Compares a step with --compile and without."""
    batch = 64 if DEVICE.type == "cuda" else 32
    steps = {}
    for compile in (False, True):
        model, data = make_gan(64, batch, "bf16", compile)
        steps[compile] = partial(model.train_step, data)
    seconds = in_turns(9, steps)
    ratio = seconds[False] / seconds[True]
    print(f"| a step, 64 px, batch {batch}, bfloat16, --compile |", end=" ")
    print(f"{1000 * seconds[True]:.1f} ms | {1000 * seconds[False]:.1f} ms without | {ratio:.2f}x |", flush=True)


WORKS = {
    "train64": partial(training, 64, 64, turns=50) if DEVICE.type == "cuda" else partial(training, 64, 32),
    "train32": partial(training, 32, 64, turns=25),
    "sampling": sampling,
    "memory": memory,
    "compile": compiling,
    "profile": profile,
}


def hold_memory():
    """Keeps freed memory in this process, as the train command does."""
    with contextlib.suppress(OSError, AttributeError):  # another system, or a C library other than GNU's
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)
        mallopt(-1, 2**31 - 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("works", nargs="*", default="all", choices=["all", *WORKS], help="what to measure (all)")
    parser.add_argument("--loop", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.loop:
        loop(*args.loop)
        return
    hold_memory()  # it serves both
    print(f"{processor(DEVICE)}, torch {torch.__version__}")
    print("\n| work | gan.py | textbook | ratio |")
    print("| --- | ---: | ---: | ---: |", flush=True)
    for name in WORKS if "all" in args.works else args.works:
        WORKS[name]()


if __name__ == "__main__":
    main()
