# SPDX-License-Identifier: MIT
"""A class-conditional GAN for your own images, in one file that can be read in one sitting.

    python gan.py train --loss ns                                   # no data needed: learns generated flowers
    python gan.py train --loss hinge --cond --data FOLDER --size 64 # your images, one folder per class
    python gan.py eval --trunc 0.7                                  # scores and pictures of the newest run
    python gan.py sample --interpolate --out walk.png

A residual generator with adaptive batch norm on noise and class, a projection discriminator (arXiv 1802.05637) with
spectral norm (1802.05957), differentiable augmentation (2006.10738), averaged weights and exact truncation.
"""

import argparse
import contextlib
import copy
import ctypes
import functools
import glob
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import typing
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.data import ConcatDataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets.utils import download_url, extract_archive
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize, rgb_to_grayscale, to_pil_image
from torchvision.utils import make_grid

DATASETS = ("synthetic", "flowers17", "mnist", "fashion", "usps", "cifar10", "celeba", "flowers102")
SIZES = (16, 32, 64, 128, 256)
GRAY = ("mnist", "fashion", "usps")  # one channel, and not to be mirrored: digits would change


class UserError(ValueError):
    """Something asked for cannot be done; the message says what would work. Commands print it and exit with 2."""


# ---------------------------------------------------------------------------------------------------------------------
# Config: every hyper-parameter once; the flags of `train` are made from it


def option(default, help, choices=None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Config:
    """All hyper-parameters of a run. None stands for the default that the text in parentheses tells (see `resolve`)."""

    loss: str = option("ns", "adversarial loss", ("ns", "hinge", "minimax", "lsgan", "wgan"))
    cond: bool = option(False, "condition on the class; needs data with classes")
    data: str = option("synthetic", f"a folder of images or of class folders, or one of {', '.join(DATASETS)}")
    data_dir: str = option("data", "where the named data sets lie or are downloaded to")
    size: int | None = option(None, "height and width in pixels, a power of two from 16 to 256 (64; synthetic 32)")
    channels: int | None = option(None, "1 for gray, 3 for colour (1 for mnist, fashion and usps, else 3)")
    flip: bool | None = option(None, "mirror half of the images at random (on, but off for digits)")
    augment: str = option("auto", "auto, none, or a list out of color,translation,cutout")

    width: int | None = option(None, "channels at full resolution (size / 2)")
    max_width: int = option(512, "most channels of any layer")
    z_dim: int = option(128, "length of the noise vector")

    epochs: float = option(150, "passes over the data")
    steps: int | None = option(None, "training steps, instead of epochs")
    batch: int = option(64, "images a step")
    lr_G: float = option(1e-4, "Adam's learning rate of the generator")
    lr_D: float = option(4e-4, "Adam's learning rate of the discriminator")
    beta1: float = option(0.0, "Adam's first beta, in [0, 1)")
    beta2: float = option(0.999, "Adam's second beta, in [0, 1)")
    d_steps: int = option(1, "discriminator updates a step")
    g_steps: int = option(1, "generator updates a step")
    label_smoothing: float = option(0.0, "real target 1 - this, in [0, 1); for ns, minimax and lsgan")
    ema_images: float = option(20_000, "half-life of the averaged weights in images")
    ema_ramp: float = option(0.05, "the half-life is at most this share of the images seen")

    seed: int = option(0, "seed of weights, noise and data order")
    device: str = option("auto", "auto (cuda if there is one), cpu, cuda, cuda:1, ...")
    amp: str = option("auto", "autocast; auto: bf16 or else fp16 on cuda, off on cpu", ("auto", "bf16", "fp16", "off"))
    compile: bool = option(False, "torch.compile the networks, which takes minutes before the first step")
    runs: str = option("runs", "folder that holds the runs")
    name: str | None = option(None, "name of the run's folder (the next free number and what it is)")
    log_every: int = option(20, "steps between two lines of log.jsonl")
    sample_every: float = option(10, "epochs between two sample grids; a checkpoint goes with each")
    save_minutes: float = option(5, "write the checkpoint at least this often")
    tensorboard: bool = option(False, "write TensorBoard events too; needs the package tensorboard")

    def check(self):
        """Raises UserError at the first value out of its range."""
        positive = ("max_width", "z_dim", "epochs", "lr_G", "lr_D", "d_steps", "g_steps", "ema_images", "ema_ramp",
                    "log_every", "sample_every", "save_minutes")
        rules = [(0 < getattr(self, name) < 1e9, f"--{name} must be positive") for name in positive]
        rules += [
            (self.size is None or self.size in SIZES, "--size must be 16, 32, 64, 128 or 256"),
            (self.channels in (None, 1, 3), "--channels must be 1 or 3"),
            (self.width is None or self.width > 0, "--width must be positive"),
            (self.steps is None or self.steps > 0, "--steps must be positive"),
            (self.batch > 1, "--batch must be at least 2: batch norm compares samples"),
            (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1, "--beta1 and --beta2 must be in [0, 1)"),
            (0 <= self.label_smoothing < 1, "--label-smoothing must be in [0, 1)"),
            (not self.label_smoothing or self.loss in SMOOTHABLE, f"--label-smoothing needs {', '.join(SMOOTHABLE)}"),
            (0 <= self.seed < 2**32, "--seed must be from 0 to 4294967295"),
            (self.data != "", "--data must not be empty"),
            (self.name is None or Path(self.name).name == self.name, "--name must be a plain folder name"),
        ]
        for f in fields(self):
            allowed = f.metadata["choices"]
            rules.append((not allowed or getattr(self, f.name) in allowed, f"--{f.name} must be one of {allowed}"))
        for right, message in rules:
            if not right:
                raise UserError(message.replace("_", "-"))
        parse_policy("" if self.augment == "auto" else self.augment)


def absolute(path):
    return os.path.abspath(os.path.expanduser(path))


def resolve(config):
    """A copy of config with every None that depends on the kind of data filled in, and paths of data made absolute."""
    config.check()
    named = config.data in DATASETS
    size = config.size or (32 if config.data == "synthetic" else 64)
    return replace(
        config,
        data=config.data if named else absolute(config.data),
        data_dir=absolute(config.data_dir),
        runs=str(config.runs),
        size=size,
        width=config.width or size // 2,
        channels=config.channels or (1 if config.data in GRAY else 3),
        flip=config.data not in GRAY if config.flip is None else config.flip,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Several processes, started by torchrun: each holds the whole state and takes its part of every batch. All draw the
# same random numbers for the whole batch and keep those of their part, so a job computes what one process would.


class LostProcess(UserError):
    """Another process of the job has gone, or cannot be reached."""


def launched():
    """Whether torchrun started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def joined():
    return dist.is_available() and dist.is_initialized()


def n_ranks():
    return dist.get_world_size() if joined() else 1


def rank():
    return dist.get_rank() if joined() else 0


def on_cuda(device):
    return (device == "auto" or device.startswith("cuda")) and torch.cuda.is_available()


def join(device):
    """Joins the other processes, if torchrun started this one and it has not joined yet."""
    if launched() and not joined():
        backend = "cpu:gloo,cuda:nccl" if on_cuda(device) else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=6))  # while one decodes the images, the others wait


def pick_rank_device(config):
    """The torch.device of this process. Raises UserError, in all processes, where the config does not suit them."""
    if not launched():
        return pick_device(config.device)
    if config.batch % n_ranks():
        raise UserError(f"--batch {config.batch} must give each of {n_ranks()} processes the same number")
    if config.compile and n_ranks() > 1:
        raise UserError("--compile is for a single process")
    if ":" in config.device:
        raise UserError(f"torchrun gives each process a device of its own: --device cuda, not {config.device}")
    name = f"cuda:{os.environ['LOCAL_RANK']}" if on_cuda(config.device) else config.device
    device = agreed(lambda: pick_device(name))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def part(draw, n):
    """This process's n rows of draw(m), where m is the number of rows of all processes."""
    return draw(n * n_ranks())[rank() * n : (rank() + 1) * n]


@contextlib.contextmanager
def answered():
    """Raises LostProcess where the others do not take part in what is done together."""
    try:
        yield
    except RuntimeError as error:
        raise LostProcess(f"another process of the job was lost: {str(error).splitlines()[0]}") from error


def reduce(tensor, largest=False):
    """The tensor, replaced by its sum over the processes, or by the largest of its values."""
    with answered():
        dist.all_reduce(tensor, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
    return tensor


@torch.no_grad()
def average(tensors):
    """Replaces each tensor by its mean over the processes."""
    if n_ranks() > 1:
        flat = reduce(torch.cat([t.flatten() for t in tensors])) / n_ranks()
        for t, mean in zip(tensors, flat.split([t.numel() for t in tensors])):
            t.copy_(mean.view(t.shape))


def anyone(*flags):
    """For each flag, whether it is true in any process."""
    return flags if n_ranks() == 1 else reduce(torch.tensor(flags).int(), largest=True).bool().tolist()


def gather(value):
    """The value of each process, in the order of their ranks."""
    values = [value] * n_ranks()
    if len(values) > 1:
        with answered():
            dist.all_gather_object(values, value)
    return values


def agreed(work):
    """work(); where it raises a UserError or OSError in one process, all raise the UserError. On each host the first
    process goes first, and fills the cache for the others."""
    result = error = None
    for firsts in (True, False):
        if firsts == first_here():
            try:
                result = work()
            except (UserError, OSError) as caught:
                error = UserError(str(caught))
        for caught in gather(error):
            if caught:
                raise caught
    return result


class SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over all processes; the gradient is summed likewise."""

    @staticmethod
    def forward(ctx, x):
        return reduce(x.clone())

    @staticmethod
    def backward(ctx, gradient):
        return reduce(gradient.clone())


class SyncedBatchNorm(nn.BatchNorm2d):
    """nn.BatchNorm2d whose statistics in training are those of all processes' batches, which must be of one size.

    nn.SyncBatchNorm does this on CUDA alone.
    """

    def forward(self, h):
        if not self.training:
            return super().forward(h)
        var, mean = torch.var_mean(h.float(), dim=(0, 2, 3), correction=0)  # [C] each
        whole = SumOverRanks.apply(mean) / n_ranks()
        var = SumOverRanks.apply(var + (mean - whole) ** 2) / n_ranks()
        with torch.no_grad():
            n = n_ranks() * h.numel() / h.shape[1]
            self.running_mean.lerp_(whole, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        out = (h - whole[:, None, None]) * (var + self.eps).rsqrt()[:, None, None]
        if self.affine:
            out = torch.addcmul(self.bias[:, None, None], out, self.weight[:, None, None])
        return out.to(h.dtype)


def synchronize_norms(net):
    for m in net.modules():
        if type(m) is nn.BatchNorm2d:
            m.__class__ = SyncedBatchNorm


# ---------------------------------------------------------------------------------------------------------------------
# Networks


def channel_widths(size, width, max_width):
    """Channels at size, size/2, ..., 4 pixels: doubled at every halving, up to max_width."""
    if size not in SIZES:
        raise UserError(f"size must be 16, 32, 64, 128 or 256, not {size}")
    return [min(max_width, width * 2**i) for i in range(int(math.log2(size)) - 1)]


class SpectralNorm(nn.Module):
    """Parametrization weight -> weight / its largest singular value (arXiv 1802.05957), in float32 even under autocast,
    which torch's own spectral_norm is not on CUDA.

    One power iteration in every training forward, on the weight as a matrix [shape[0], rest].
    """

    def __init__(self, weight):
        super().__init__()
        self.register_buffer("u", F.normalize(torch.randn(weight.shape[0]), dim=0))
        self.register_buffer("v", F.normalize(torch.randn(weight[0].numel()), dim=0))
        for _ in range(15):
            self.iterate(self.matrix(weight.detach()))

    @staticmethod
    def matrix(weight):
        return weight.movedim(1, -1).flatten(1)  # the order of channels_last: nothing is copied

    @torch.no_grad()
    def iterate(self, matrix):
        self.v.copy_(F.normalize(matrix.T.mv(self.u), dim=0))
        self.u.copy_(F.normalize(matrix.mv(self.v), dim=0))

    def forward(self, weight):
        with torch.autocast(weight.device.type, enabled=False):
            matrix = self.matrix(weight)
            if self.training:
                self.iterate(matrix)
            # Clones, since a second forward may move u and v before the first one's backward.
            sigma = self.u.clone().dot(matrix.mv(self.v.clone()))
            return weight / sigma


def orthogonal_init(net):
    """Orthogonal weights and zero biases for every convolution, linear layer and embedding of net; returns these."""
    layers = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.Embedding))]
    for layer in layers:
        nn.init.orthogonal_(layer.weight)
        if not isinstance(layer, nn.Embedding):
            nn.init.zeros_(layer.bias)
    return layers


class Box(torch.autograd.Function):
    """Sums of 2x2 pixels over divisor, at every pixel. [N,C,H,W] -> [N,C,H-1+2 padding,W-1+2 padding]

    The gradient is the same with the other padding, so nothing is kept for it.
    """

    @staticmethod
    def forward(ctx, x, divisor, padding):
        ctx.divisor, ctx.padding = divisor, padding
        if x.is_cuda:
            return F.avg_pool2d(x, 2, stride=1, padding=padding, divisor_override=divisor)
        # On the CPU a depthwise convolution is the faster of the two, in bfloat16 five times.
        return F.conv2d(x, x.new_full((x.shape[1], 1, 2, 2), 1 / divisor), padding=padding, groups=x.shape[1])

    @staticmethod
    def backward(ctx, gradient):
        return Box.apply(gradient, ctx.divisor, 1 - ctx.padding), None, None


box = Box.apply


def pool(x):
    """avg_pool2d(x, 2). [N,C,H,W] -> [N,C,H/2,W/2]"""
    if x.is_cuda:
        return F.avg_pool2d(x, 2)
    # On the CPU the same is faster this way, and x need not be kept for the backward pass.
    return F.interpolate(x, scale_factor=0.5, mode="bilinear")


def upsample(x):
    """Repeats each pixel 2x2 times. [N,C,H,W] -> [N,C,2H,2W]"""
    with torch.autocast(x.device.type, enabled=False):  # which on CUDA would make it float32
        return F.interpolate(x, scale_factor=2)


def conv_pool(conv, x):
    """avg_pool2d(conv(x), 2) for a 3x3 conv, with a quarter of its products. [N,C,H,W] -> [N,K,H/2,W/2]"""
    # Means taken before the convolution instead of after it; then every second result is enough.
    return F.conv2d(box(x, 4, 1), conv.weight, conv.bias, stride=2)


def upsample_conv(conv, x):
    """conv(nearest upsampling of x) for a 3x3 conv, with a quarter of its products. [N,C,H,W] -> [N,K,2H,2W]"""
    # Upsampling puts zeros between the pixels and sums each 2x2 of them; the sums can wait until after the convolution.
    return box(F.conv_transpose2d(x, conv.weight.transpose(0, 1).flip(2, 3), conv.bias / 4, stride=2), 1, 0)


class AdaptiveBatchNorm(nn.Module):
    """Batch norm with gain 1 + linear(e) and bias linear(e) of an embedding. h[N,C,H,W], e[N,E] -> [N,C,H,W]"""

    def __init__(self, channels, embedding):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.gain_bias = nn.Linear(embedding, 2 * channels)

    def forward(self, h, e):
        gain, bias = self.gain_bias(e)[:, :, None, None].chunk(2, dim=1)
        return torch.addcmul(bias, self.norm(h), 1 + gain)


class GeneratorBlock(nn.Module):
    """Pre-activation residual block that doubles the resolution. Norm, ReLU and the 1x1 skip commute with nearest
    upsampling, so they run before it."""

    def __init__(self, c_in, c_out, embedding):
        super().__init__()
        self.norm1 = AdaptiveBatchNorm(c_in, embedding)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = AdaptiveBatchNorm(c_out, embedding)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, e):
        h = upsample_conv(self.conv1, F.relu(self.norm1(x, e), inplace=True))
        h = self.conv2(F.relu(self.norm2(h, e), inplace=True))
        return h.add_(upsample(self.skip(x)))


class Generator(nn.Module):
    """Noise and class to images: z[N,z_dim], y[N] int64 or None -> [N,channels,size,size] float32 in [-1,1].

    The class embedding has z's length and is concatenated to z; both feed the first layer and every adaptive norm.
    num_classes=0 is unconditional. Raises UserError for a size that is no power of two from 16 to 256.
    """

    def __init__(self, size=64, channels=3, width=32, max_width=512, z_dim=128, num_classes=0):
        super().__init__()
        widths = channel_widths(size, width, max_width)[::-1]
        self.size, self.channels, self.z_dim, self.num_classes = size, channels, z_dim, num_classes
        self.embed = nn.Embedding(num_classes, z_dim) if num_classes else None
        embedding = 2 * z_dim if num_classes else z_dim
        self.linear = nn.Linear(embedding, widths[0] * 4 * 4)
        self.blocks = nn.ModuleList(GeneratorBlock(a, b, embedding) for a, b in itertools.pairwise(widths))
        self.norm = nn.BatchNorm2d(widths[-1])
        self.conv = nn.Conv2d(widths[-1], channels, 3, padding=1)
        orthogonal_init(self)
        # All but the last layer start at a tenth. Batch norm takes the scale of what is in front of it out again, but
        # Adam's steps have a fixed size, so small weights learn faster; and the gains start near 1, or else each z would
        # have a network of its own.
        for layer in (self.linear, *(m for m in self.blocks.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))):
            layer.weight.data *= 0.1

    def forward(self, z, y=None):
        e = torch.cat([z, self.embed(y)], dim=1) if self.num_classes else z
        h = self.linear(e).view(len(z), -1, 4, 4).contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            h = block(h, e)
        return torch.tanh(self.conv(F.relu(self.norm(h))).float())


class DiscriminatorBlock(nn.Module):
    """Pre-activation residual block that halves the resolution; the 1x1 skip is pooled first, which is the same."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.relu(x))
        return conv_pool(self.conv2, F.relu(h, inplace=True)).add_(self.skip(pool(x)))


class Discriminator(nn.Module):
    """Images and class to raw logits: x[N,channels,size,size] in [-1,1], y[N] int64 or None -> [N] float32.

    Spectral norm on every layer; with num_classes > 0 the logit is psi(phi(x)) + <phi(x), embed(y)> (arXiv 1802.05637).
    Raises UserError for a size that is no power of two from 16 to 256.
    """

    def __init__(self, size=64, channels=3, width=32, max_width=512, num_classes=0):
        super().__init__()
        widths = channel_widths(size, width, max_width)
        self.num_classes = num_classes
        self.conv = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(DiscriminatorBlock(a, b) for a, b in itertools.pairwise(widths))
        self.linear = nn.Linear(widths[-1], 1)
        self.embed = nn.Embedding(num_classes, widths[-1]) if num_classes else None
        for layer in orthogonal_init(self):
            parametrize.register_parametrization(layer, "weight", SpectralNorm(layer.weight))

    def forward(self, x, y=None):
        h = self.conv(x.contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            h = block(h)
        with torch.autocast(x.device.type, enabled=False):
            phi = F.relu(h.float()).sum(dim=(2, 3))  # [N,C]
            logits = self.linear(phi).squeeze(1)
            if self.num_classes:
                logits = logits + (phi * self.embed(y)).sum(dim=1)
        return logits


# ---------------------------------------------------------------------------------------------------------------------
# Losses: d_loss(real_logits[N], fake_logits[N]) and g_loss(fake_logits[N]), each a scalar to minimise


def d_bce(real_logits, fake_logits, smoothing=0.0):
    real = (1 - smoothing) * F.softplus(-real_logits) + smoothing * F.softplus(real_logits)
    return real.mean() + F.softplus(fake_logits).mean()  # -log sigmoid(real) - log(1 - sigmoid(fake))


def g_ns(fake_logits):
    return F.softplus(-fake_logits).mean()  # -log sigmoid(fake)


def g_minimax(fake_logits):
    return -F.softplus(fake_logits).mean()  # log(1 - sigmoid(fake)), which saturates


def d_hinge(real_logits, fake_logits):
    return F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()


def g_linear(fake_logits):
    return -fake_logits.mean()


def d_lsgan(real_logits, fake_logits, smoothing=0.0):
    return ((real_logits - 1 + smoothing) ** 2).mean() / 2 + (fake_logits**2).mean() / 2


def g_lsgan(fake_logits):
    return ((fake_logits - 1) ** 2).mean() / 2


def d_wgan(real_logits, fake_logits):
    return fake_logits.mean() - real_logits.mean()  # the Lipschitz bound is the spectral norm's work


LOSSES = {
    "ns": (d_bce, g_ns),  # arXiv 1406.2661, section 3's non-saturating form
    "hinge": (d_hinge, g_linear),  # arXiv 1705.02894
    "minimax": (d_bce, g_minimax),  # arXiv 1406.2661
    "lsgan": (d_lsgan, g_lsgan),  # arXiv 1611.04076, a = 0, b = c = 1
    "wgan": (d_wgan, g_linear),  # arXiv 1701.07875
}
SMOOTHABLE = ("ns", "minimax", "lsgan")


# ---------------------------------------------------------------------------------------------------------------------
# Differentiable augmentation (arXiv 2006.10738): the same on real and fake, so the discriminator cannot learn the data
# by heart and the generator does not learn the augmentation


def augment_color(x):
    """Brightness by up to +-0.5 (the range is 2), saturation times [0, 2], contrast times [0.5, 1.5]."""
    draws = part(lambda n: torch.rand(n, 3, 1, 1, 1, device=x.device, dtype=x.dtype), len(x))
    brightness, saturation, contrast = draws.unbind(dim=1)  # [N,1,1,1] each
    x = x + (brightness - 0.5)
    gray = x.mean(dim=1, keepdim=True)
    x = gray + (x - gray) * (2 * saturation)
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (x - mean) * (contrast + 0.5)


def draw_int(low, high, x):
    """A random whole number from low to high - 1 for each image of x, [N,1]."""
    return part(lambda n: torch.randint(low, high, (n, 1), device=x.device), len(x))


def augment_translation(x):
    """Moves each image by up to an eighth of its sides; zeros come in."""
    h, w = x.shape[2:]
    # A move is a product with a shifted identity on either side: dense, differentiable and quick at these sizes.
    rows = torch.arange(h, device=x.device) - draw_int(-h // 8, h // 8 + 1, x)  # [N,H]
    cols = torch.arange(w, device=x.device) - draw_int(-w // 8, w // 8 + 1, x)  # [N,W]
    move_rows = (rows[:, :, None] == torch.arange(h, device=x.device)).to(x.dtype)  # [N,H,H]
    move_cols = (cols[:, None, :] == torch.arange(w, device=x.device)[:, None]).to(x.dtype)  # [N,W,W]
    return move_rows[:, None] @ x @ move_cols[:, None]


def augment_cutout(x):
    """Zeroes a square of half the side, centred anywhere in the image."""
    h, w = x.shape[2:]
    rows = torch.arange(h, device=x.device) - draw_int(0, h, x)  # [N,H], 0 at the centre
    cols = torch.arange(w, device=x.device) - draw_int(0, w, x)  # [N,W]
    in_rows = (rows >= -(h // 4)) & (rows < h // 4)
    in_cols = (cols >= -(w // 4)) & (cols < w // 4)
    return x.masked_fill((in_rows[:, :, None] & in_cols[:, None, :])[:, None], 0)


AUGMENTATIONS = {"color": augment_color, "translation": augment_translation, "cutout": augment_cutout}


def parse_policy(policy):
    """The augmentations that a policy names. Raises UserError for an unknown one."""
    names = [] if policy in ("", "none") else policy.split(",")
    for name in names:
        if name not in AUGMENTATIONS:
            raise UserError(f"unknown augmentation {name!r}; there are {', '.join(AUGMENTATIONS)}, auto and none")
    return [AUGMENTATIONS[name] for name in names]


def diff_augment(x, policy):
    """Augments each image of x[N,C,H,W] in [-1,1] at random; gradients flow through (arXiv 2006.10738).

    policy lists color, translation and cutout, as in "color,translation"; "" and "none" leave x as it is.
    Raises UserError for an unknown name.
    """
    for augmentation in parse_policy(policy):
        x = augmentation(x)
    return x


def auto_policy(n):
    """The augmentation that n training images call for."""
    policies = ((5_000, "color,translation,cutout"), (20_000, "translation,cutout"), (50_000, "cutout"))
    return next((policy for limit, policy in policies if n < limit), "none")


# ---------------------------------------------------------------------------------------------------------------------
# Data


class Source(typing.NamedTuple):
    """Where images come from: read(i) -> (uint8 [C,H,W] of any size, class name or None) for the item names[i]."""

    names: list[str]
    read: typing.Callable
    files: list[Path]  # what the images are made of; their names, sizes and times are the cache's key


def load_images(data, size, channels, data_dir="data"):
    """All images of a folder or of a named data set, centre-cropped and resized; decoded once, then kept in a cache.

    data: a folder, searched recursively (JPEG, PNG, WebP, GIF, BMP, TIFF); its sub-folders are the classes if every
    image lies in one. Or a name in DATASETS, which lie in data_dir or are downloaded to it. Transparency turns white.
    Returns uint8 images [N,channels,size,size], where possible a memory map of the cache; int64 labels [N]; the class
    names, an empty list without classes. Raises UserError when there is no usable image.
    """
    if data == "synthetic":
        return synthetic_flowers(size, channels)
    named = data in DATASETS
    source = open_dataset(data, Path(data_dir)) if named else open_folder(Path(absolute(data)))
    folder = cache_folder() / f"images-{fingerprint(source, data if named else 'folder', size, channels)}"
    cached = read_cache(folder, size, channels)
    if cached is None:
        try:
            write_cache(folder, decoded(source, size, channels))
            cached = read_cache(folder, size, channels)
        except OSError as error:
            say(f"the images stay in memory, since they cannot be cached: {error}")
    if cached is None:
        images, class_of = zip(*decoded(source, size, channels))
        cached = torch.stack(images), class_of
    images, class_of = cached
    classes = [] if None in class_of else sorted(set(class_of), key=natural)
    index = {name: i for i, name in enumerate(classes)}
    return images, torch.tensor([index.get(name, 0) for name in class_of]), classes


def natural(name):
    """Sort key that puts 9 before 10."""
    return [int(part) if part.isdecimal() else part.lower() for part in re.split(r"(\d+)", name)], name


def open_folder(folder, class_of=None):
    """The Source of a folder. class_of(relative path) -> class name or None; by default the first sub-folder's name."""
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; --data takes a folder of images or one of {', '.join(DATASETS)}")
    # glob passes over hidden files and folders, and follows links.
    found = sorted(glob.glob("**", root_dir=folder, recursive=True))
    names = [Path(name) for name in found if (folder / name).is_file()]
    files = [folder / name for name in names]
    class_of = class_of or (lambda name: name.parts[0] if len(name.parts) > 1 else None)
    return Source([str(name) for name in names], lambda i: (decode(files[i]), class_of(names[i])), files)


def decode(path):
    """The image of a file, upright, on white where it is transparent, as uint8 [1 or 3,H,W]. Raises if it is none."""
    # torchvision's own image library, since the decoders in torchvision.io are deprecated.
    from PIL import Image, ImageOps

    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I"):  # 16 bits a pixel
        return torch.from_numpy((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))[None]
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return pil_to_tensor(image.convert("RGB"))


def fit(image, size, channels):
    """uint8 [1 or 3,H,W] -> uint8 [channels,size,size]: the centre square, resized with antialiasing."""
    image = resize(center_crop(image, min(image.shape[1:])), [size, size], antialias=True)
    return gray(image) if channels < len(image) else image.expand(channels, -1, -1)


def gray(images):
    """uint8 [...,3,H,W] -> uint8 [...,1,H,W]"""
    return rgb_to_grayscale(images.float()).round().to(torch.uint8)


TORCHVISION = {  # name: (class in torchvision.datasets, the arguments of each part, its files below data_dir)
    "mnist": ("MNIST", [{}], "MNIST/raw/*"),
    "fashion": ("FashionMNIST", [{}], "FashionMNIST/raw/*"),
    "usps": ("USPS", [{}], "usps*.bz2"),
    "cifar10": ("CIFAR10", [{}], "cifar-10-batches-py/*"),
    "celeba": ("CelebA", [{"split": "train"}], "celeba/*"),
    "flowers102": ("Flowers102", [{"split": s} for s in ("train", "val", "test")], "flowers-102/**/*"),
}
FLOWERS17_URL = "https://www.robots.ox.ac.uk/~vgg/data/flowers/17/17flowers.tgz"
FLOWERS17_MD5 = "b59a65d8d1a99cd66944d474e1289eab"


def open_dataset(name, root):
    """The Source of a named data set, downloaded to the folder root if it is not there."""
    try:
        if name == "flowers17":
            return open_flowers17(root)
        kind, parts, pattern = TORCHVISION[name]
        make = getattr(torchvision.datasets, kind)
        dataset = ConcatDataset([make(str(root), download=True, **part) for part in parts])
    except ImportError as error:
        raise UserError(f"{name} needs a package: pip install {error.name}")
    except Exception as error:  # torchvision's readers raise errors of many kinds for files that are cut off
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{name} is not in {root} (see --data-dir), or damaged, and cannot be downloaded: {reason}")

    def read(i):
        image, label = dataset[i]
        return pil_to_tensor(image), str(label) if isinstance(label, int) else None  # CelebA's are attributes

    return Source([f"{name} {i}" for i in range(len(dataset))], read, sorted(root.glob(pattern)))


def open_flowers17(root):
    """The Oxford 17-category flowers: jpg/image_0001.jpg to image_1360.jpg, 80 of a class in order."""
    folder = root / "flowers17"
    if not folder.is_dir():
        download_url(FLOWERS17_URL, str(root), "17flowers.tgz", FLOWERS17_MD5)
        with tempfile.TemporaryDirectory(dir=root) as unpacked:
            extract_archive(str(root / "17flowers.tgz"), unpacked)
            os.replace(Path(unpacked) / "jpg", folder)
    return open_folder(folder, lambda name: str((int(name.stem[-4:]) - 1) // 80))


def decoded(source, size, channels):
    """Yields (uint8 [channels,size,size], class name or None) of every readable image; names and counts the others."""

    def item(i):
        try:
            image, class_name = source.read(i)
            return fit(image, size, channels), class_name
        except Exception as error:  # decoders raise errors of every kind for files that are damaged or no images
            return f"{source.names[i]} ({type(error).__name__})"

    skipped, shown = [], time.monotonic()
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # threads do: decoding and resizing release Python's lock
        for i, result in enumerate(pool.map(item, range(len(source.names)))):
            if isinstance(result, str):
                skipped.append(result)
            else:
                yield result
            if time.monotonic() - shown > 2:
                shown = time.monotonic()
                show(f"decoded {i + 1} of {len(source.names)} files")
    if skipped:
        more = f" and {len(skipped) - 10} more" if len(skipped) > 10 else ""
        say(f"skipped {len(skipped)} of {len(source.names)} files, no readable images: {', '.join(skipped[:10])}{more}")
    if len(skipped) == len(source.names):
        raise UserError("no usable image: give a folder that holds pictures (JPEG, PNG, WebP, GIF, BMP, TIFF)")


def cache_folder():
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gan.py"


def fingerprint(source, *asked):
    """A key that changes with what is asked for and with any file's name, size or time."""
    key = hashlib.sha256(repr((1, asked, source.names)).encode())
    for path in source.files:
        stat = path.stat()
        key.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return key.hexdigest()[:32]


def write_cache(folder, items):
    """Writes the items of `decoded` as they come; the folder appears under its name only when it is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for old in folder.parent.glob("unfinished-*"):
        if time.time() - old.stat().st_mtime > 24 * 3600:  # of a process that was killed
            shutil.rmtree(old, ignore_errors=True)
    unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=folder.parent))
    try:
        class_of = []
        with open(unfinished / "images.u8", "wb") as file:
            for image, class_name in items:
                file.write(image.numpy().tobytes())
                class_of.append(class_name)
        (unfinished / "classes.json").write_text(json.dumps(class_of))
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def read_cache(folder, size, channels):
    """(images [N,channels,size,size], a memory map; N class names or None), or None if there is no intact cache."""
    try:
        class_of = json.loads((folder / "classes.json").read_text())
        shape = (len(class_of), channels, size, size)
        if (folder / "images.u8").stat().st_size != math.prod(shape):
            return None
        # Mode c: writable for torch's sake, though what is written would stay in memory.
        return torch.from_numpy(np.memmap(folder / "images.u8", np.uint8, "c", shape=shape)), class_of
    except (OSError, ValueError):
        return None


def synthetic_flowers(size, channels, per_class=80, classes=17):
    """Flowers drawn by code: petals, colours, centre and ground differ by class; place, size, angle and shade within.

    Returns what load_images returns. The same images at every call.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        images = torch.cat(list(pool.map(lambda c: draw_flowers(c, per_class, size), range(classes))))
    images = gray(images) if channels == 1 else images
    return images, torch.arange(classes).repeat_interleave(per_class), [f"flower {c}" for c in range(classes)]


def draw_flowers(c, n, size):
    """n flowers of class c, as uint8 [n,3,size,size]. Coordinates run from -1 to 1, y downwards."""
    rng = np.random.default_rng([17, c])
    grid = np.linspace(-1 + 1 / size, 1 - 1 / size, size, dtype=np.float32)
    x, y = grid[None, None, :], grid[None, :, None]  # [1,1,W], [1,H,1]

    def vary(low, high):
        return rng.uniform(low, high, (n, 1, 1)).astype(np.float32)

    def rgb(hue, saturation, value):  # [n,1,1] each -> [n,1,1,3]
        k = (6 * hue[..., None] + np.array([5, 3, 1], np.float32)) % 6
        return value[..., None] * (1 - saturation * np.clip(np.minimum(k, 4 - k), 0, 1))

    def paint(colour, light, inside):  # inside: signed distance to the edge, one pixel of which is blended
        mask = np.clip(inside * size / 2 + 0.5, 0, 1)[..., None]
        canvas[:] += (colour * light[..., None] - canvas) * mask

    # What makes the class. Hues go round from blue over red to yellow and leave out the leaves' green.
    petals, hue = (5, 6, 4, 8, 3)[c % 5], (0.52 + 0.66 * (c * 0.618 % 1)) % 1
    vivid, bright = ((0.9, 1.0), (0.4, 1.0), (0.85, 0.7))[c // 2 % 3]
    petal_width, heart, pointed = (1.1, 0.9, 1.3)[c % 3] * 2.2 / petals, (0.2, 0.3, 0.15, 0.25)[c % 4], c % 2
    ground = ((0.58, 0.4, 0.9), (0.3, 0.6, 0.4), (0.12, 0.25, 0.95), (0.7, 0.3, 0.2))[c % 4]  # hue, saturation, value

    # What varies within it.
    cx, cy, radius, turn = vary(-0.1, 0.1), vary(-0.2, 0.0), vary(0.65, 0.85), vary(-0.2, 0.2) - np.pi / 2
    bend, shade = vary(-0.2, 0.2), vary(0.8, 1.1)
    petal_colour = rgb(hue + vary(-0.025, 0.025), vivid, bright * shade)
    canvas = rgb(ground[0] + vary(-0.03, 0.03), ground[1], ground[2] * vary(0.85, 1.05)) * (1 - 0.2 * y[..., None])
    canvas = np.repeat(canvas, size, axis=2)

    stem = np.minimum(0.06 - np.abs(x - cx - bend * (y - cy) ** 2), y - cy)
    paint(rgb(vary(0.3, 0.33), 0.7, vary(0.4, 0.5)), np.ones_like(stem), stem)
    for angle in (turn + 2 * np.pi * k / petals for k in range(petals)):
        along = ((x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)) / radius  # 0 at the heart, 1 at the petal's tip
        across = np.abs((y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)) / radius
        t = np.clip(along, 0, 1)
        half = petal_width * (2 * t * (1 - t) if pointed else np.sqrt(t * (1 - t)) * (0.4 + 0.8 * t)) - (t != along)
        light = (0.6 + 0.4 * t) * (1 - 0.4 * np.clip(across / (half.clip(0) + 0.01), 0, 1) ** 2)
        paint(petal_colour, light, (half - across) * radius)
    from_heart = np.hypot(x - cx, y - cy) / radius
    if c % 3:
        heart_colour = rgb(vary(0.12, 0.14), 0.85, vary(0.9, 1.0))
    else:
        heart_colour = rgb(vary(0.06, 0.08), 0.8, vary(0.35, 0.45))
    paint(heart_colour, 1 - 0.3 * from_heart / heart, (heart - from_heart) * radius)
    pixels = (np.clip(canvas, 0, 1) * 255).round().astype(np.uint8)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def place(images, device):
    """images on the device if they take less than half of its free memory, else as they are, on the CPU."""
    fits = device.type != "cuda" or images.numel() < torch.cuda.mem_get_info(device)[0] / 2
    return images.to(device) if fits else images


def batches(images, labels, config, device, start=0):
    """Endless (x[B,C,H,W] float in [-1,1], y[B]) on the device, from the batch number `start` on.

    Each epoch's order comes from the seed and the epoch alone, so a resumed run goes on with the very next batch; what
    does not fill a batch is left out of an epoch. Of several processes each gets its part.
    """
    per_epoch = len(images) // config.batch
    labels, order = labels.to(images.device), None
    for epoch, i in (divmod(k, per_epoch) for k in itertools.count(start)):
        if order is None or i == 0:
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
            order = torch.randperm(len(images), generator=generator).to(images.device)
        index = order[i * config.batch : (i + 1) * config.batch].chunk(n_ranks())[rank()]
        x = images[index].to(device, non_blocking=True).float() / 127.5 - 1
        if config.flip:
            draws = part(lambda n: torch.rand(n, 1, 1, 1, device=device), len(x))
            x = torch.where(draws < 0.5, x.flip(3), x)
        yield x, labels[index].to(device, non_blocking=True)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def sample_z(n, z_dim, trunc=None, generator=None, device=None):
    """Noise [n,z_dim], float32: standard normal, or with trunc restricted to |z_i| <= trunc.

    The restriction is exact, by the inverse of the normal's distribution function: no value is clamped or redrawn.
    Drawn where the generator lives (without one: on the device), then moved to the device. Raises UserError unless
    trunc > 0.
    """
    at = generator.device if generator is not None else device
    if trunc is None:
        return torch.randn(n, z_dim, generator=generator, device=at).to(device)
    if not trunc > 0:
        raise UserError(f"trunc must be positive, not {trunc}")
    u = 2 * torch.rand(n, z_dim, generator=generator, device=at, dtype=torch.float64) - 1
    # P(|z| <= trunc) = erf(trunc / sqrt 2)
    return (math.sqrt(2) * torch.erfinv(u * math.erf(trunc / math.sqrt(2)))).float().to(device)


def sample_y(n, num_classes, generator):
    """Classes drawn evenly, int64 [n]; zeros for an unconditional network, which ignores them."""
    return torch.randint(max(1, num_classes), (n,), generator=generator)


def device_of(net):
    return next(net.parameters()).device


def count_parameters(net):
    return sum(p.numel() for p in net.parameters())


@torch.no_grad()
def with_standing_statistics(G, trunc=None, n_batches=20, batch=64):
    """A copy of G, in eval mode, whose batch norms hold the statistics of z drawn with this trunc and of all classes.

    The statistics of other z shift every layer: samples at trunc 0.7 with those of untruncated z are far worse.
    """
    G = copy.deepcopy(G).eval()
    for norm in (m for m in G.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.train().reset_running_stats()
        norm.momentum = None  # the plain mean over batches
    generator = torch.Generator().manual_seed(0)
    for _ in range(n_batches):
        z = sample_z(batch, G.z_dim, trunc, generator, device_of(G))
        G(z, sample_y(batch, G.num_classes, generator).to(z.device))
    return G.eval()


@torch.no_grad()
def render(G, z, y, batch=64):
    """Yields uint8 images [<=batch,C,H,W] on the CPU of z[n,z_dim] and y[n], with G as it is."""
    for z_part, y_part in zip(z.split(batch), y.to(z.device).split(batch)):
        yield ((G(z_part, y_part) + 1) * 127.5).round().to(torch.uint8).cpu()


def stream(G, n, trunc=None, classes=None, seed=0):
    """Yields what `generate` returns in batches, so that not all samples need be held."""
    generator = torch.Generator().manual_seed(seed)
    z = sample_z(n, G.z_dim, trunc, generator, device_of(G))
    y = take_classes(G, n, classes, generator)
    yield from render(with_standing_statistics(G, trunc), z, y)


def generate(G, n, trunc=None, classes=None, seed=0):
    """n samples of G as uint8 [n,C,H,W]; the same seed gives the same noise on every device. G stays as it is.

    trunc: bound of |z_i|, None for no bound; the batch norms get statistics of their own for it. classes: indices to
    go through in turn; None draws them evenly. Raises UserError for a class or trunc out of range.
    """
    return torch.cat(list(stream(G, n, trunc, classes, seed)))


def take_classes(G, n, classes, generator=None):
    """int64 [n]: the classes in turn, or drawn evenly if they are None. Raises UserError where G has no such class."""
    if classes is None:
        return sample_y(n, G.num_classes, generator)
    if not G.num_classes:
        raise UserError("this generator is unconditional and takes no classes; train one with --cond")
    classes = torch.as_tensor(classes, dtype=torch.int64)
    if not len(classes) or classes.min() < 0 or classes.max() >= G.num_classes:
        raise UserError(f"classes must be from 0 to {G.num_classes - 1}, not {classes.tolist()}")
    return classes.repeat(-(-n // len(classes)))[:n]


def sample_grid(G, trunc=None, columns=10, seed=0):
    """A picture [3,H,W] of samples: a row for each class, the same z down each column; 8 rows of z without classes."""
    rows = G.num_classes or 8
    distinct = columns if G.num_classes else rows * columns
    z = sample_z(distinct, G.z_dim, trunc, torch.Generator().manual_seed(seed), device_of(G))
    y = torch.arange(rows).repeat_interleave(columns)
    return tile(render(with_standing_statistics(G, trunc), z.repeat(rows * columns // distinct, 1), y), columns)


def interpolate(G, trunc=None, classes=None, rows=8, columns=10, seed=0):
    """A picture [3,H,W] whose rows walk from one random z to another; each row holds a class, of `classes` in turn."""
    generator = torch.Generator().manual_seed(seed)
    a, b = sample_z(2 * rows, G.z_dim, trunc, generator, device_of(G)).chunk(2)  # [rows,z_dim] each
    y = take_classes(G, rows, classes, generator)
    t = torch.linspace(0, 1, columns, device=a.device)[:, None]
    # On the arc between a and b, since points on the chord are shorter than any z that G has seen.
    angle = torch.arccos(F.cosine_similarity(a, b).clamp(-1, 1))[:, None, None]
    z = (torch.sin((1 - t) * angle) * a[:, None] + torch.sin(t * angle) * b[:, None]) / torch.sin(angle)
    return tile(render(with_standing_statistics(G, trunc), z.flatten(0, 1), y.repeat_interleave(columns)), columns)


def tile(batches, columns):
    """Batches of images [n,C,H,W] -> a picture [3,H,W] with so many of them in a row."""
    return make_grid(torch.cat(list(batches)), nrow=columns, padding=2, pad_value=255)


# ---------------------------------------------------------------------------------------------------------------------
# The state of a run: averaged weights, checkpoints


@dataclass
class State:
    """What it takes to go on with a run: `new_state` makes it, `train_step` moves it on, `save_checkpoint` keeps it."""

    config: Config  # resolved
    classes: list[str]  # class names; empty for an unconditional run
    G: Generator
    D: Discriminator
    G_ema: Generator
    opt_G: torch.optim.Optimizer
    opt_D: torch.optim.Optimizer
    amp_dtype: torch.dtype | None  # of autocast; None for float32
    scaler: torch.amp.GradScaler  # does nothing unless amp_dtype is float16
    step: int = 0


def new_state(config, classes, device):
    """The State before the first step, on the device. Seeds torch with config.seed; config must be resolved."""
    torch.manual_seed(config.seed)
    num_classes = len(classes) if config.cond else 0
    amp_dtype = pick_amp_dtype(config.amp, device)
    G = new_generator(config, num_classes).to(device)
    D = Discriminator(config.size, config.channels, config.width, config.max_width, num_classes)
    D = D.to(device, memory_format=torch.channels_last)
    adam = functools.partial(torch.optim.Adam, betas=(config.beta1, config.beta2), fused=device.type in ("cpu", "cuda"))
    state = State(
        config,
        classes if config.cond else [],
        G,
        D,
        G_ema=copy.deepcopy(G).eval().requires_grad_(False),
        opt_G=adam(G.parameters(), lr=config.lr_G),
        opt_D=adam(D.parameters(), lr=config.lr_D),
        amp_dtype=amp_dtype,
        scaler=torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16),
    )
    if n_ranks() > 1:
        synchronize_norms(state.G)
    return state


def new_generator(config, num_classes):
    G = Generator(config.size, config.channels, config.width, config.max_width, config.z_dim, num_classes)
    return G.to(memory_format=torch.channels_last)


@torch.no_grad()
def ema_update(G_ema, G, beta):
    """Averaged weights: G_ema = beta * G_ema + (1 - beta) * G; the buffers are copied."""
    torch._foreach_lerp_(list(G_ema.parameters()), list(G.parameters()), 1 - beta)
    torch._foreach_copy_(list(G_ema.buffers()), list(G.buffers()))


def ema_beta(config, step):
    """Weight of the past after `step` steps: the half-life grows with the images seen up to config.ema_images."""
    half_life = min(config.ema_images, config.ema_ramp * step * config.batch)
    return 0.5 ** (config.batch / half_life)


MODULES = ("G", "D", "G_ema", "opt_G", "opt_D", "scaler")  # the fields of State that have a state_dict


def save_checkpoint(path, state):
    """Writes the whole state; a checkpoint that is there already stays whole until the new one is."""
    content = {name: getattr(state, name).state_dict() for name in MODULES}
    content |= {"config": asdict(state.config), "classes": state.classes, "step": state.step}
    content["rng"] = torch.get_rng_state()
    device = device_of(state.G)
    content["rng_cuda"] = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    buffer = io.BytesIO()  # torch.save into a file reports a full disk as a RuntimeError without a reason
    torch.save(content, buffer)
    write_whole(path, buffer.getbuffer())


def write_whole(path, data):
    """Writes a file that is there under its name only when it is complete and on the disk."""
    unfinished = path.with_suffix(".unfinished")
    with open(unfinished, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def read_checkpoint(path):
    """The content of a checkpoint file, on the CPU. Raises UserError if it is none."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        content["config"] = Config(**content["config"])
        missing = {*MODULES, "classes", "step", "rng", "rng_cuda"} - content.keys()
    except FileNotFoundError:
        raise UserError(f"no checkpoint {path}")
    except OSError:
        raise
    except Exception as error:  # torch's unpickler fails in many ways on bytes of another kind
        raise UserError(f"{path} is damaged or no checkpoint of gan.py ({type(error).__name__})")
    if missing:
        raise UserError(f"{path} is damaged or no checkpoint of gan.py: it lacks {', '.join(sorted(missing))}")
    return content


def load_into(module, state_dict):
    """module.load_state_dict. Raises UserError where the two do not fit."""
    try:
        module.load_state_dict(state_dict)
    except (RuntimeError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"the checkpoint does not fit its own config: {str(error).splitlines()[0]}")


def load_state(state, content):
    """Puts the networks, the optimizers and the step of a checkpoint's content into state."""
    for name in MODULES:
        if content[name]:  # a scaler that did nothing has no state
            load_into(getattr(state, name), content[name])
    state.step = content["step"]


def restore(content, config, device):
    """The State of a checkpoint's content, and torch's random state with it; config may ask for more steps, say."""
    state = new_state(config, content["classes"], device)
    load_state(state, content)
    torch.set_rng_state(content["rng"])
    if content["rng_cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(content["rng_cuda"], device)
    return state


def checkpoint_of(run_or_checkpoint):
    path = Path(run_or_checkpoint)
    return path / "checkpoint.pt" if path.is_dir() else path


def load_generator(run_or_checkpoint, device="cpu"):
    """The averaged generator of a run's folder or of a checkpoint file -> (G in eval mode on the device, Config).

    Raises UserError if there is no such checkpoint or it is damaged.
    """
    content = read_checkpoint(checkpoint_of(run_or_checkpoint))
    G = new_generator(content["config"], len(content["classes"]))
    load_into(G, content["G_ema"])
    return G.to(device).eval().requires_grad_(False), content["config"]


# ---------------------------------------------------------------------------------------------------------------------
# A run's folder, and what is said while it runs


def create_run(config):
    """A new folder for the run: --name, which must not exist, or the next free number and what the run is."""
    runs = Path(config.runs)
    try:
        runs.mkdir(parents=True, exist_ok=True)
        numbers = [int(run.name[:4]) for run in runs.iterdir() if re.match(r"\d{4}-", run.name)]
        data = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(config.data).name)
        number = f"{max(numbers, default=-1) + 1:04d}"
        run = runs / (config.name or f"{number}-{config.loss}{'-cond' * config.cond}-{data}-{config.size}")
        run.mkdir()
    except FileExistsError:
        raise UserError(f"{run if runs.is_dir() else runs} exists: choose another --name or --runs, or --resume it")
    except OSError as error:
        raise UserError(f"no run can be made in {runs}: {error.strerror}; choose another --runs")
    return run


def open_log(path, step):
    """The log, open at its end; what a killed run logged after its last checkpoint is cut off."""

    def logged_step(line):
        try:
            return json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):  # half a line
            return math.inf

    if path.exists():
        lines = path.read_text(errors="replace").splitlines(keepends=True)
        write_whole(path, "".join(line for line in lines if logged_step(line) <= step).encode())
    return open(path, "a")


def summary_writer():
    """TensorBoard's class. Raises UserError where the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs a package: pip install tensorboard")
    return SummaryWriter


def write_picture(path, picture):
    path.parent.mkdir(parents=True, exist_ok=True)
    to_pil_image(picture).save(path)


def say(line):
    """Prints a line; on a terminal in the place of the line of progress. Of several processes the first one speaks."""
    if rank() == 0:
        print(f"\r\x1b[K{line}" if sys.stdout.isatty() else line, flush=True)


def show(line):
    """Prints a line of progress, which the next line replaces on a terminal."""
    if rank() > 0 or not sys.stdout.isatty():
        return say(line)
    print(f"\r\x1b[K{line[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)


def status_line(record, steps, rate):
    minutes, seconds = divmod(round((steps - record["step"]) / rate), 60)
    return (f"step {record['step']}/{steps}  epoch {record['epoch']:.1f}  {record['images_per_s']:.0f} images/s  "
            f"{minutes}:{seconds:02d} left  loss D {record['loss_D']:.3f} G {record['loss_G']:.3f}  "
            f"D right on real {record['right_real']:.0%} fake {record['right_fake']:.0%}")


@contextlib.contextmanager
def stop_on_signal():
    """Yields an Event that Ctrl-C and SIGTERM set; a second one interrupts at once."""
    stop, before = threading.Event(), {}

    def handler(number, frame):
        stop.set()
        signal.signal(number, before[number])

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, old in before.items():
            signal.signal(number, old)


# ---------------------------------------------------------------------------------------------------------------------
# Training


def pick_device(name):
    """torch.device of a name; auto is cuda if there is one. Raises UserError for one that is not here."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.zeros(1, device=device).item()
        return device
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch built without CUDA
        raise UserError(f"no device {name!r} here: {str(error).splitlines()[0]}")


def pick_amp_dtype(amp, device):
    """The dtype of autocast, or None for float32. Raises UserError where the device cannot do what amp asks for."""
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    if amp == "fp16" and device.type != "cuda":
        raise UserError("--amp fp16 needs a CUDA device; bf16 works on the CPU too")
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)


def autocast(state):
    enabled = state.amp_dtype is not None
    return torch.autocast(device_of(state.G).type, state.amp_dtype if enabled else torch.bfloat16, enabled)


def descend(state, optimizer, loss):
    """One step of the optimizer down the gradient of the loss."""
    state.scaler.scale(loss).backward()
    average([p.grad for group in optimizer.param_groups for p in group["params"]])
    state.scaler.step(optimizer)
    state.scaler.update()
    optimizer.zero_grad()  # now, not before the next step, so that they take no memory in the other network's step


def draw_fake(state, y):
    """Samples [B,C,H,W] of the classes y[B], through which gradients reach G."""
    z = part(lambda n: sample_z(n, state.config.z_dim, device=y.device), len(y))
    with autocast(state):
        return state.G(z, y)


def update_discriminator(state, real, fake, y):
    """One step of D on real and fake [B,C,H,W] in [-1,1], both of the classes y[B].

    Returns float32 [3] on the device: loss, and the shares of real and of fake that D judged rightly.
    """
    c = state.config
    d_loss = LOSSES[c.loss][0]
    if c.label_smoothing:
        d_loss = functools.partial(d_loss, smoothing=c.label_smoothing)
    both = torch.cat([diff_augment(x, c.augment) for x in (real, fake.detach())])
    with autocast(state):  # one pass over both: fewer, larger products
        real_logits, fake_logits = state.D(both, y.repeat(2)).chunk(2)
    loss_D = d_loss(real_logits, fake_logits)
    descend(state, state.opt_D, loss_D)
    border = 0.5 if c.loss == "lsgan" else 0.0  # halfway between what the loss pulls real and fake to
    right = (real_logits > border).float().mean(), (fake_logits < border).float().mean()
    return torch.stack([loss_D.detach(), *right])


def update_generator(state, fake, y):
    """One step of G on its samples fake[B,C,H,W] of the classes y[B]. Returns the loss, a scalar on the device."""
    c = state.config
    state.D.requires_grad_(False)  # the gradient passes through D, but D needs none of its own
    augmented = diff_augment(fake, c.augment)
    with autocast(state):
        fake_logits = state.D(augmented, y)
    loss_G = LOSSES[c.loss][1](fake_logits)
    descend(state, state.opt_G, loss_G)
    state.D.requires_grad_(True)
    return loss_G.detach()


def train_step(state, data):
    """One iteration: config.d_steps updates of D, config.g_steps of G, one of the averaged weights.

    data: an iterator such as `batches` makes. Returns float32 [4] on the device, without waiting for it: loss_D,
    loss_G, and the shares of real and of fake that D judged rightly.
    """
    for left in reversed(range(state.config.d_steps)):
        real, y = next(data)
        with torch.set_grad_enabled(left == 0):
            fake = draw_fake(state, y)
        loss_D, right_real, right_fake = update_discriminator(state, real, fake, y)
    for i in range(state.config.g_steps):
        # G has not moved since D's last step, so its first step takes the samples that are there.
        loss_G = update_generator(state, draw_fake(state, y) if i else fake, y)
    state.step += 1
    ema_update(state.G_ema, state.G, ema_beta(state.config, state.step))
    return torch.stack([loss_D, loss_G, right_real, right_fake])


def compiled(state):
    """A State whose networks torch.compile runs, D on CUDA as CUDA graphs; where it cannot, state, and a line says why.

    It fails in many ways and not before it runs, so three steps are tried on a copy.
    """
    c, device = state.config, device_of(state.G)
    fast = copy.deepcopy(state)
    batch = torch.zeros(c.batch, c.channels, c.size, c.size, device=device), torch.zeros(c.batch, device=device).long()
    say("compiling")
    try:
        # G not as CUDA graphs: D's graphs, which run before G's backward pass, would overwrite what that needs.
        fast.G.compile(dynamic=False)
        fast.D.compile(dynamic=False, mode="reduce-overhead" if device.type == "cuda" else None)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for _ in range(3):  # CUDA graphs are recorded at the second
                train_step(fast, itertools.repeat(batch))
    except Exception as error:  # no C++ compiler, no Triton, an operation it does not know
        torch._dynamo.reset()
        reason = next(iter(str(error).strip().splitlines()), "")
        say(f"--compile does not work here, going on without: {type(error).__name__}: {reason}")
        return state
    load_state(fast, {name: getattr(state, name).state_dict() for name in MODULES} | {"step": state.step})
    return fast


def open_run(config, resume):
    """(content of the checkpoint or None, images, labels, class names). Raises UserError for what cannot be had."""
    content = read_checkpoint(Path(resume) / "checkpoint.pt") if resume else None
    return content, *training_images(config, content)


def train(config, resume=None):
    """Trains a GAN and returns its run's folder, a Path: config.json, checkpoint.pt, log.jsonl and samples/.

    resume: a run's folder, to go on from its checkpoint until config.epochs or config.steps; on a CPU the outcome is
    that of a run without the break, bit for bit. Ctrl-C and SIGTERM end the step, save and return. Under torchrun each
    process takes its part of the batch, and the first one writes. Raises UserError for what cannot be done, and if a
    loss is no longer finite; the checkpoint then stays as it was last saved.
    """
    config = resolve(config)
    join(config.device)
    device = pick_rank_device(config)
    content, images, labels, classes = agreed(lambda: open_run(config, resume))
    own = dict.fromkeys(("data", "data_dir", "runs", "name", "device"))  # may differ between hosts
    seen = replace(config, **own), len(images), classes, content and content["step"]
    if len({repr(each) for each in gather(seen)}) > 1:
        raise UserError("the processes differ; all hosts need the same flags, images and checkpoint")
    if config.augment == "auto":
        config = replace(config, augment=auto_policy(len(images)))
    steps_per_epoch, steps = length(config, len(images))
    sample_every = max(1, round(config.sample_every * steps_per_epoch))
    if content and content["step"] >= steps:
        raise UserError(f"{resume} has trained its {content['step']} steps; --steps or --epochs can ask for more")

    state = restore(content, config, device) if content else new_state(config, classes, device)
    new_writer = agreed(lambda: summary_writer() if config.tensorboard and rank() == 0 else None)
    run = gather(agreed(lambda: Path(resume) if resume else create_run(config) if rank() == 0 else None))[0]
    if rank() == 0:
        write_whole(run / "config.json", (json.dumps(asdict(config), indent=2) + "\n").encode())
    writer = new_writer(run) if new_writer else None
    del content  # as large as the state
    on = f"{n_ranks()} processes on {device.type}" if n_ranks() > 1 else device
    say(f"{run}: {len(images)} images, {len(classes)} classes, {steps} steps on {on}, augment {config.augment}, G "
        f"{count_parameters(state.G) / 1e6:.2f} M and D {count_parameters(state.D) / 1e6:.2f} M parameters")
    if config.compile:
        state = compiled(state)

    data = batches(place(images, device), labels, config, device, start=state.step * config.d_steps)
    stats, first, began, saved = [], state.step, time.monotonic(), time.monotonic()
    log = open_log(run / "log.jsonl", state.step) if rank() == 0 else contextlib.nullcontext()
    with log, stop_on_signal() as stop, saved_if_lost(state, run):
        done = False
        while not done:
            stats.append(train_step(state, data))

            # Read once: a signal that comes later waits for the next step.
            stopped, late = anyone(stop.is_set(), time.monotonic() - saved > 60 * config.save_minutes)
            done = state.step == steps or stopped
            sample = done or state.step % sample_every == 0
            save = sample or late
            if not save and state.step % config.log_every:
                continue

            history = torch.stack(stats)  # [steps,4]
            average([history])
            history = history.cpu()  # here alone the CPU waits for the device
            check_finite(state, history, run)
            stats.clear()
            saved = time.monotonic() if save else saved
            if rank() > 0:
                continue  # the first process writes
            rate = (state.step - first) / (time.monotonic() - began)  # steps a second since this call began
            record = {"step": state.step, "epoch": state.step / steps_per_epoch, "images_per_s": rate * config.batch}
            record |= zip(("loss_D", "loss_G", "right_real", "right_fake"), history.mean(dim=0).tolist())
            log.write(json.dumps(record) + "\n")
            log.flush()
            show(status_line(record, steps, rate))
            if save:  # before the picture, which takes a while
                save_checkpoint(run / "checkpoint.pt", state)
            if sample:
                picture = sample_grid(state.G_ema)
                write_picture(run / "samples" / f"{state.step:07d}.png", picture)
            if writer:
                for name in record.keys() - {"step"}:
                    writer.add_scalar(name, record[name], state.step)
                if sample:
                    writer.add_image("samples", picture, state.step)
                writer.flush()
    if state.step < steps:
        say(f"stopped and saved at step {state.step}; go on with: python gan.py train --resume {run}")
    else:
        say(f"{state.step} steps done: see {run / 'samples'}; score it with: python gan.py eval --run {run}")
    return run


def length(config, n_images):
    """(steps an epoch, steps of the whole run)"""
    steps_per_epoch = n_images // config.batch / config.d_steps
    return steps_per_epoch, config.steps or max(1, round(config.epochs * steps_per_epoch))


@contextlib.contextmanager
def saved_if_lost(state, run):
    """Saves the state, maybe with the next step half done, where another process is lost, and says how to go on.

    On CUDA the state is out of reach: what computes it waits for the lost process. The last checkpoint has to do.
    """
    try:
        yield
    except LostProcess as error:
        if rank() == 0 and device_of(state.G).type == "cpu":
            check_finite(state, torch.zeros(0, 4), run)
            save_checkpoint(run / "checkpoint.pt", state)
        there = (run / "checkpoint.pt").exists()
        hint = f"go on with: python gan.py train --resume {run}" if there else "nothing was saved yet"
        raise LostProcess(f"after step {state.step}, {error}; {hint}")


def training_images(config, content=None):
    """What load_images returns. Raises UserError if it does not fit the config or the checkpoint's content."""
    images, labels, classes = load_images(config.data, config.size, config.channels, config.data_dir)
    if len(images) < config.batch:
        raise UserError(f"--batch {config.batch} is more than the {len(images)} images of {config.data}")
    if config.cond and len(classes) < 2:
        raise UserError(f"--cond needs two classes or more, a sub-folder each, and {config.data} has {len(classes)}")
    if content and config.cond and classes != content["classes"]:
        raise UserError(f"the classes of {config.data} are not those that the run began with")
    return images, labels, classes


def check_finite(state, stats, run):
    """Raises UserError, naming the step, if a loss in stats[steps,4] or a weight is not finite."""
    first = state.step - len(stats) + 1
    bad = [first + i for i, row in enumerate(stats.isfinite().all(dim=1).tolist()) if not row]
    sums = torch.stack([p.detach().sum() for p in itertools.chain(state.G.parameters(), state.D.parameters())])
    if bad or not sums.isfinite().all():
        kept = f"{run / 'checkpoint.pt'} is as it was" if (run / "checkpoint.pt").exists() else "nothing was saved yet"
        what, step = ("losses", bad[0]) if bad else ("weights", state.step)
        raise UserError(f"the {what} are not finite at step {step}: try lower --lr-G and --lr-D, or --amp off; {kept}")


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def evaluate(
    run_or_checkpoint, truncs=(None,), n=None, extractor="inception", device="auto", seed=0, data=None, data_dir=None
):
    """Scores the averaged generator against its training images at each trunc; returns what it writes to eval.json.

    n: samples, by default as many as there are training images; of a conditional generator, with their classes.
    extractor: see metrics.load_extractor. data, data_dir: where the images lie now, if not where they lay at training.
    Beside the checkpoint come eval.json and a grid eval-trunc-T.png for each trunc. Without Inception's weights FID and
    IS are None and "note" says what would help. Raises UserError.
    """
    try:
        import metrics
    except ImportError:
        raise UserError("eval needs the file metrics.py beside gan.py")

    device = pick_device(device)
    path = checkpoint_of(run_or_checkpoint)
    G, config = load_generator(path, device)
    config = resolve(replace(config, data=data or config.data, data_dir=data_dir or config.data_dir))
    images, labels, _ = load_images(config.data, config.size, config.channels, config.data_dir)
    n = n or len(images)
    # Shuffled, since each split of the Inception Score needs all classes.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    classes = labels[order] if G.num_classes else None
    result = {"checkpoint": str(path), "data": config.data, "n_real": len(images), "seed": seed}
    result |= {"network": None, "scores": []}
    try:
        network = metrics.load_extractor(extractor, device)
        result |= network.made_by
        progress = metrics.show_progress(f"{network.name} on the training images")
        real = metrics.measure_cached(network, images, cache_folder(), progress)
        for trunc in truncs:
            progress = metrics.show_progress(f"{network.name} on samples at trunc {trunc_name(trunc)}")
            fake = metrics.measure(network, generate(G, n, trunc, classes, seed), progress=progress)
            result["scores"].append({"trunc": trunc, "n": n, **metrics.compare(real, fake)})
        result["note"] = "; ".join(metrics.remarks(real, fake))
    except metrics.WeightsMissing as error:
        result["note"] = str(error)
        result["scores"] = [{"trunc": trunc, "n": n, "FID": None, "IS": None, "IS std": None} for trunc in truncs]
    except metrics.UserError as error:
        raise UserError(str(error))
    for trunc in truncs:
        write_picture(path.parent / f"eval-trunc-{trunc_name(trunc)}.png", sample_grid(G, trunc, seed=seed))
    write_whole(path.parent / "eval.json", (json.dumps(result, indent=2) + "\n").encode())
    return result


def trunc_name(trunc):
    return "none" if trunc is None else f"{trunc:g}"


# ---------------------------------------------------------------------------------------------------------------------
# How fast it is here


def bench(config, seconds=20):
    """Measures for so many seconds, after some steps to warm up, the training that config describes.

    Returns a dict with times in seconds, medians: step_s of a whole step, on CUDA of ten in a row, and parts_s of its
    parts, which wait for the device. FLOP are the products and sums of convolutions and matrix products;
    matmul_flop_per_s is what a square matrix product of the same dtype reaches. peak_bytes is the device's memory, on a
    CPU the process's. run_s leaves out the pictures and checkpoints. Raises UserError.
    """
    config = resolve(config)
    device = pick_device(config.device)
    images, labels, classes = training_images(config)
    if config.augment == "auto":
        config = replace(config, augment=auto_policy(len(images)))
    state = new_state(config, classes, device)
    data = batches(place(images, device), labels, config, device)
    with FlopCounterMode(display=False) as counter:
        train_step(state, data)
    if config.compile:
        state = compiled(state)
    for _ in range(5):
        train_step(state, data)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    whole, parts = [], []
    block = 10 if device.type == "cuda" else 1  # steps that follow each other without waiting for the device
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        whole.append(timed(device, lambda: [train_step(state, data) for _ in range(block)])[0] / block)
        parts.append(timed_parts(state, data, device))
    step_s, dtype = float(np.median(whole)), state.amp_dtype or torch.float32
    steps = length(config, len(images))[1]
    cpu = f"cpu, {torch.get_num_threads()} threads"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "step_s": step_s,
        "parts_s": {name: float(np.median([seconds[name] for seconds in parts])) for name in parts[0]},
        "images_per_s": config.batch / step_s,
        "flop_per_step": counter.get_total_flops(),
        "flop_per_s": counter.get_total_flops() / step_s,
        "peak_bytes": peak_memory(device),  # before the large matrices
        "matmul_flop_per_s": matmul_speed(device, dtype),
        "steps": steps,
        "run_s": steps * step_s,
    }


def matmul_speed(device, dtype):
    """FLOP/s of a square matrix product that is large enough to be fast."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.rand(2, n, n, device=device, dtype=dtype)
    return 2 * n**3 / float(np.median([timed(device, torch.mm, a, b)[0] for _ in range(9)]))


def timed(device, work, *args):
    """(seconds, what work(*args) returns), with what the device has to do for it."""
    began = time.perf_counter()
    result = work(*args)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began, result


def timed_parts(state, data, device):
    """`train_step`, which returns the seconds that each part took."""
    seconds = dict.fromkeys(("data", "samples", "D step", "G step", "EMA"), 0.0)

    def run(part, work, *args):
        taken, result = timed(device, work, *args)
        seconds[part] += taken
        return result

    for left in reversed(range(state.config.d_steps)):
        real, y = run("data", next, data)
        with torch.set_grad_enabled(left == 0):
            fake = run("samples", draw_fake, state, y)
        run("D step", update_discriminator, state, real, fake, y)
    for i in range(state.config.g_steps):
        run("G step", update_generator, state, run("samples", draw_fake, state, y) if i else fake, y)
    state.step += 1
    run("EMA", ema_update, state.G_ema, state.G, ema_beta(state.config, state.step))
    return seconds


def peak_memory(device):
    """The most bytes in use so far: of the device's memory, or on a CPU of the process's; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":  # where getrusage's begins with that of the process that started this one
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


# ---------------------------------------------------------------------------------------------------------------------
# Commands


# What may change when a run is resumed.
RESUMABLE = "epochs steps data data_dir device amp compile log_every sample_every save_minutes tensorboard".split()


def hold_memory():
    """Keeps freed memory in this process, on Linux.

    A training step on the CPU frees and takes some gigabytes, and handing their pages back and forth costs the kernel a
    tenth to a fifth of the step.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # a C library other than GNU's
            mallopt = ctypes.CDLL("libc.so.6").mallopt
            mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large block
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: do not shrink the heap


def train_command(args):
    hold_memory()
    given = given_flags(args)
    join(given.get("device", "auto"))
    if args.resume:
        run, config = agreed(lambda: open_resumed(args.resume, given))
        return train(config, resume=run)
    return train(Config(**given))


def open_resumed(name, given):
    """(a run's folder, its config with the flags given now). Raises UserError for flags that cannot change."""
    given = dict(given)
    run = find_run(name, given.pop("runs", "runs"))
    if run.is_file():
        raise UserError(f"--resume takes a run's folder, such as {run.parent}, not a file")
    config = read_checkpoint(run / "checkpoint.pt")["config"]
    if given.get("augment") == "auto":
        del given["augment"]  # the run holds what auto came to
    for name in given:
        if name not in RESUMABLE and given[name] != getattr(config, name):
            raise UserError(f"--{name.replace('_', '-')} cannot change on --resume; these can: {', '.join(RESUMABLE)}")
    if "epochs" in given:
        given.setdefault("steps", None)
    return run, replace(config, **given)


def given_flags(args):
    """The flags of Config that were given."""
    return {f.name: getattr(args, f.name) for f in fields(Config) if hasattr(args, f.name)}


def bench_command(args):
    hold_memory()
    with contextlib.redirect_stdout(sys.stderr):
        r = bench(Config(**given_flags(args)))
    if args.json:
        return print(json.dumps(r, indent=2))
    split = ", ".join(f"{name} {1000 * taken:.1f}" for name, taken in r["parts_s"].items())
    minutes, seconds = divmod(round(r["run_s"]), 60)
    print(f"{r['device']}, torch {r['torch']}, {r['dtype']}")
    print(f"step      {1000 * r['step_s']:.1f} ms ({split}), {r['images_per_s']:.1f} images/s")
    print(f"products  {r['flop_per_step'] / 1e9:.1f} GFLOP a step, {r['flop_per_s'] / 1e9:.0f} GFLOP/s, "
          f"{r['flop_per_s'] / r['matmul_flop_per_s']:.2f} of a matrix product's {r['matmul_flop_per_s'] / 1e9:.0f}")
    print(f"memory    {r['peak_bytes'] / 2**20:.0f} MiB at the most" if r["peak_bytes"] else "memory    unknown here")
    print(f"the run   {r['steps']} steps, {minutes}:{seconds:02d} minutes besides pictures and checkpoints")


def eval_command(args):
    run = find_run(args.run, args.runs)
    result = evaluate(run, args.trunc, args.n, args.extractor, args.device, args.seed, args.data, args.data_dir)
    say(f"{run}: {result['network'] or 'no network'}, against the {result['n_real']} images of {result['data']}")
    print_table([{**row, "trunc": trunc_name(row["trunc"])} for row in result["scores"]])
    if result.get("note"):
        print(result["note"], file=sys.stderr)


def print_table(rows):
    """Rows, dicts of the same keys, below a line of these; None is shown as a dash."""

    def text(value):
        return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)

    for line in [list(rows[0]), *([text(value) for value in row.values()] for row in rows)]:
        print("  ".join(f"{cell:>{max(8, len(name))}}" for cell, name in zip(line, rows[0])))


def sample_command(args):
    G, _ = load_generator(find_run(args.run, args.runs), pick_device(args.device))
    out, kind = Path(args.out), Path(args.out).suffix
    if kind not in (".png", ".npz", "") or (args.interpolate and kind != ".png"):
        raise UserError(f"--out {out}: give a .png, or for single samples a .npz or a folder")
    if kind == "" and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} is not empty: samples of two calls would mix; name a new folder")
    if args.interpolate:
        write_picture(out, interpolate(G, args.trunc, args.classes, seed=args.seed))
        return print(f"wrote {out}")
    classes = args.classes or list(range(G.num_classes)) or None
    n = args.n or (10 * len(classes) if classes else 80)
    y = take_classes(G, n, [c for c in classes for _ in range(-(-n // len(classes)))]) if classes else None  # in rows
    write_samples(out, stream(G, n, args.trunc, y, args.seed), (n, G.size, G.size, G.channels), y)
    print(f"wrote {n} samples to {out}")


def write_samples(out, batches, shape, y):
    """Batches of images [n,C,H,W], as they come, as a grid .png, as .npz or as numbered .png in a folder.

    The .npz holds images, uint8 of the shape [n,H,W,C], and unless y[n] is None, labels.
    """
    if out.suffix == ".png":
        return write_picture(out, tile(batches, 10))
    if out.suffix != ".npz":
        for i, image in enumerate(itertools.chain.from_iterable(batches)):
            write_picture(out / f"{i:05d}.png", image)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_suffix(".unfinished")
    with zipfile.ZipFile(unfinished, "w") as archive:
        with archive.open("images.npy", "w", force_zip64=True) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for images in batches:
                file.write(images.permute(0, 2, 3, 1).numpy().tobytes())
        if y is not None:
            with archive.open("labels.npy", "w") as file:
                np.lib.format.write_array(file, y.numpy())
    os.replace(unfinished, out)


def find_run(name, runs):
    """The path of a checkpoint or of a run: the newest in the folder runs if name is None, else a path, or a name in
    runs, or a unique start of one. Raises UserError if there is none."""
    if name is None:
        checkpoints = sorted(Path(runs).glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime)
        if not checkpoints:
            raise UserError(f"no run in {runs}: train one first, or say where it is with --run or --runs")
        return checkpoints[-1].parent
    for path in (Path(name), Path(runs) / name):
        if path.exists():
            return path
    found = [run for run in Path(runs).glob("*") if run.name.startswith(name)]
    if len(found) != 1:
        raise UserError(f"{'no run' if not found else 'more than one run'} {name} in {runs}")
    return found[0]


def first_here():
    """Whether this is the only process, or the first that torchrun started on this host."""
    return not launched() or os.environ["LOCAL_RANK"] == "0"


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"gan.py: error: {message} (--help lists the flags)\n" if first_here() else None)


def between(least, most=2**32 - 1):
    def whole_number(text):
        if not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"must be from {least} to {most}, not {text}")
        return int(text)

    return whole_number


def truncation(text):
    if text == "none":
        return None
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be positive or none, not {text}")
    return value


def class_list(text):
    return [int(part) for part in text.split(",")]


def make_parser():
    parser = Parser(prog="gan.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(metavar="train | eval | sample | bench", required=True, parser_class=Parser)

    p = commands.add_parser("train", help="train on a folder of images or a named data set", allow_abbrev=False)
    p.set_defaults(command=train_command)
    p.add_argument("--resume", metavar="RUN", help="go on with a run")
    add_config(p)

    p = commands.add_parser("eval", help="score a run", allow_abbrev=False)
    p.set_defaults(command=eval_command)
    p.add_argument("--trunc", type=truncation, nargs="+", default=[None], help="bounds of |z|, or none (none)")
    p.add_argument("--n", type=between(2), help="samples (as many as training images)")
    p.add_argument("--data", help="where the training images lie now (where they lay at training)")
    p.add_argument("--data-dir", help="where the named data sets lie now (where they lay at training)")
    p.add_argument("--extractor", default="inception", help="inception, a weights file or a .pt2 program (inception)")
    add_common(p)

    p = commands.add_parser("sample", help="write samples of a run", allow_abbrev=False)
    p.set_defaults(command=sample_command)
    p.add_argument("--trunc", type=truncation, help="bound of |z| (none)")
    p.add_argument("--n", type=between(1), help="samples (10 of a class, or 80)")
    p.add_argument("--classes", type=class_list, help="class indices, as in 3,5 (all)")
    p.add_argument("--interpolate", action="store_true", help="rows that walk between random pairs of z")
    p.add_argument("--out", default="samples.png", help=".png for a grid, .npz, or a new folder (samples.png)")
    add_common(p)

    p = commands.add_parser("bench", help="time the training of a config on this machine", allow_abbrev=False)
    p.set_defaults(command=bench_command)
    p.add_argument("--json", action="store_true", help="print JSON, with times in seconds")
    add_config(p)
    return parser


def add_config(p):
    """A flag for each field of Config, absent unless given, so that --resume can tell what was asked for."""
    for f in fields(Config):
        about = f.metadata["help"] if f.default is None else f"{f.metadata['help']} ({f.default})"
        kind = (typing.get_args(f.type) or (f.type,))[0]  # int | None -> int
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif f.metadata["choices"]:
            how = {"choices": f.metadata["choices"]}
        else:
            how = {"type": kind, "metavar": kind.__name__.upper()}
        p.add_argument(f"--{f.name.replace('_', '-')}", dest=f.name, default=argparse.SUPPRESS, help=about, **how)


def add_common(p):
    p.add_argument("--run", help="run, by name or path, or checkpoint file (the newest run)")
    p.add_argument("--runs", default="runs", help="folder that holds the runs (runs)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (auto)")
    p.add_argument("--seed", type=between(0), default=0, help="seed of the noise (0)")


def main(argv=None):
    """Runs a command line; returns its exit status: 0, or 2 after one line on stderr about what cannot be done."""
    args = make_parser().parse_args(argv)
    tells = True
    try:
        if args.command is not train_command and launched():
            raise UserError("torchrun is for train; start this command with python")
        args.command(args)
        return 0
    except (UserError, OSError) as error:
        message = str(error)
        tells = first_here() or not isinstance(error, UserError) or isinstance(error, LostProcess)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        message = "out of memory; try a smaller --batch, --width, --size or --n"
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    if tells:
        if sys.stdout.isatty():
            print()  # below the line of progress
        print(f"gan.py: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    try:
        status = main()
    except Exception:
        if not joined():
            raise
        traceback.print_exc()
        status = 1
    if joined():  # gloo can hang where it is taken down (torch 2.6) and abort where it is not (2.15)
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
