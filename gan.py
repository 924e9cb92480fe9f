# SPDX-License-Identifier: MIT
"""A class-conditional GAN for your own images, in one file that reads downwards.

    python gan.py train                                       # needs no data: learns flowers drawn by code
    python gan.py train --data FOLDER --cond                  # your images, a sub-folder for each class
    python gan.py eval --trunc 0.7                            # scores and pictures of the newest run
    python gan.py sample --interpolate --out walk.png

A residual generator with adaptive batch norm meets a projection discriminator (arXiv 1802.05637) with spectral norm
(1802.05957), under differentiable augmentation (2006.10738). Samples come from a generator with averaged weights.
"""

import argparse
import contextlib
import copy
import ctypes
import errno
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
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import nn
from torch.nn.utils.parametrize import register_parametrization
from torch.utils._pytree import tree_leaves
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize, rgb_to_grayscale, to_pil_image
from torchvision.utils import make_grid

__version__ = "1.2"
FORMAT = 5  # of checkpoints; it changes with the networks and with what a checkpoint holds


# ---- Networks
class Generator(nn.Module):
    """Maps noise and class to images: z[N,z_dim], y[N] int64 or None -> [N,channels,size,size] float32 in [-1,1].

    e joins the noise and the class embedding (without classes it is the noise). It feeds the first layer and every
    adaptive norm.
    """

    def __init__(self, size=64, channels=3, width=32, max_width=512, z_dim=128, num_classes=0):
        super().__init__()
        self.z_dim = z_dim
        self.num_classes = num_classes
        self.trunc = None  # the bound of |z_i|, which standing_generator sets and sampling reads; None is no bound

        widths = channel_widths(size, width, max_width)[::-1]
        e_dim = 2 * z_dim if num_classes else z_dim
        self.embed = nn.Embedding(num_classes, z_dim) if num_classes else None
        self.linear = nn.Linear(e_dim, widths[0] * 4 * 4)
        self.blocks = nn.ModuleList(GeneratorBlock(a, b, e_dim) for a, b in itertools.pairwise(widths))
        self.norm = BatchNorm(widths[-1])
        self.conv = nn.Conv2d(widths[-1], channels, 3, padding=1)

        orthogonal_init(self)
        # Adam's steps do not depend on the scale of the weights, so small weights change faster in proportion.
        # Norms undo the scale itself, but only the branches hold norms: at first they outweigh the 1x1 skips.
        for layer in (self.linear, *layers_of(self.blocks, nn.Conv2d)):
            layer.weight.data *= 0.1

    def forward(self, z, y=None):
        e = torch.cat([z, self.embed(y)], dim=1) if self.num_classes else z
        h = self.linear(e).unflatten(1, (-1, 4, 4)).contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            h = block(h, e)
        return torch.tanh(self.conv(F.relu(self.norm(h))).float())


class GeneratorBlock(nn.Module):
    """A pre-activation residual block that doubles the resolution: x[N,c_in,H,W], e[N,e_dim] -> [N,c_out,2H,2W]."""

    def __init__(self, c_in, c_out, e_dim):
        super().__init__()
        self.norm1 = AdaptiveBatchNorm(c_in, e_dim)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = AdaptiveBatchNorm(c_out, e_dim)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, e):
        h = upsample_conv(self.conv1, F.relu(self.norm1(x, e), inplace=True))  # a quicker conv1(upsample(...))
        h = self.conv2(F.relu(self.norm2(h, e), inplace=True))
        return h.add_(upsample(self.skip(x)))  # upsampled last: the 1x1 skip is then cheaper


class AdaptiveBatchNorm(nn.Module):
    """Batch norm whose gain and bias are linear in an embedding: h[N,C,H,W], e[N,e_dim] -> [N,C,H,W]."""

    def __init__(self, channels, e_dim):
        super().__init__()
        self.norm = BatchNorm(channels, affine=False)
        self.gain_bias = nn.Linear(e_dim, 2 * channels)

    def forward(self, h, e):
        gain, bias = self.gain_bias(e)[:, :, None, None].chunk(2, dim=1)
        return torch.addcmul(bias, self.norm(h), 1 + gain)


class Discriminator(nn.Module):
    """Maps images and class to raw logits: x[N,channels,size,size] in [-1,1], y[N] int64 or None -> [N] float32.

    With classes the logit is linear(phi(x)) + <phi(x), embed(y)> (arXiv 1802.05637). Every layer has spectral norm.
    """

    def __init__(self, size=64, channels=3, width=32, max_width=512, num_classes=0):
        super().__init__()
        self.num_classes = num_classes

        widths = channel_widths(size, width, max_width)
        self.conv = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(DiscriminatorBlock(a, b) for a, b in itertools.pairwise(widths))
        self.linear = nn.Linear(widths[-1], 1)
        self.embed = nn.Embedding(num_classes, widths[-1]) if num_classes else None

        orthogonal_init(self)
        for layer in layers_of(self, nn.Conv2d, nn.Linear, nn.Embedding):
            layer.weight.data *= 0.3  # spectral norm cancels the scale, so small weights change faster, as in G
            # Each 3x3 convolution makes up for a ReLU, which halves the mean square (1502.01852); 1x1 skips have none.
            gain = 2**0.5 if layer.weight.shape[2:] == (3, 3) else 1
            register_parametrization(layer, "weight", SpectralNorm(layer.weight, gain))

    def features(self, x):
        """Computes phi(x): images [N,channels,size,size] -> [N,C], at least float32."""
        h = self.conv(x.contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            h = block(h)
        return F.relu(at_least_float32(h)).sum(dim=(2, 3))  # bfloat16 would round phi to 8 bits

    def forward(self, x, y=None):
        phi = self.features(x)
        with torch.autocast(x.device.type, enabled=False):
            logits = self.linear(phi).squeeze(1)
            return logits + (phi * self.embed(y)).sum(dim=1) if self.num_classes else logits


class DiscriminatorBlock(nn.Module):
    """A pre-activation residual block that halves the resolution: [N,c_in,H,W] -> [N,c_out,H/2,W/2]."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.relu(x))
        return conv_pool(self.conv2, F.relu(h, inplace=True)).add_(self.skip(pool(x)))  # a quicker pool(conv2(...))


# ---- Losses that D and G minimise, functions of the logits real[N] and fake[N]; softplus(-x) is -log sigmoid(x)
D_LOSSES = {
    "ns": lambda real, fake: F.softplus(-real).mean() + F.softplus(fake).mean(),  # arXiv 1406.2661
    "hinge": lambda real, fake: F.relu(1 - real).mean() + F.relu(1 + fake).mean(),  # 1705.02894
    "rpgan": lambda real, fake: F.softplus(fake - real).mean(),  # real[i] and fake[i] share a class; 1807.00734
    "lsgan": lambda real, fake: ((real - 1).square().mean() + fake.square().mean()) / 2,  # 1611.04076
    "wgan": lambda real, fake: fake.mean() - real.mean(),  # 1701.07875
}
D_LOSSES["minimax"] = D_LOSSES["ns"]
G_LOSSES = {
    "ns": lambda real, fake: F.softplus(-fake).mean(),
    "hinge": lambda real, fake: -fake.mean(),
    "rpgan": lambda real, fake: F.softplus(real - fake).mean(),
    "minimax": lambda real, fake: -F.softplus(fake).mean(),  # log(1 - sigmoid(fake)), which saturates
    "lsgan": lambda real, fake: (fake - 1).square().mean() / 2,
    "wgan": lambda real, fake: -fake.mean(),
}


# ---- The training step
class GAN:
    """Both networks, the averaged generator, the optimizers, and the step that trains them.

    For another GAN, override `networks`, `loss_D`, `loss_G`, `update_D`, `update_G` or `train_step`. `networks` returns
    G and D, called as G(z, y) and D(x, y); G has z_dim and num_classes. The fields of the attribute `Config` are flags.
    main(model=YourGAN) runs it.
    """

    PARTS = ("G", "D", "G_ema", "opt_G", "opt_D", "scaler")  # a checkpoint holds the state_dict of each

    def __init__(self, config, num_classes=0, device="cpu"):
        torch.manual_seed(config.seed)
        self.config = config
        self.device = torch.device(device)
        self.steps = 0
        self.classes = []  # names
        self.images = None  # a hash of the images; prepare sets both

        G, D = self.networks(config, num_classes)
        self.G = G.to(self.device, memory_format=torch.channels_last)
        self.D = D.to(self.device, memory_format=torch.channels_last)
        self.G_ema = copy.deepcopy(self.G).eval().requires_grad_(False)
        for norm in layers_of(self.G, BatchNorm) + layers_of(self.D, BatchNorm):
            norm.synced = n_ranks() > 1

        betas = (config.beta1, config.beta2)
        fused = self.device.type in ("cpu", "cuda")
        self.opt_G = torch.optim.Adam(self.G.parameters(), config.lr_G, betas, fused=fused)
        self.opt_D = torch.optim.Adam(self.D.parameters(), config.lr_D, betas, fused=fused)

        dtype = pick_dtype(config.amp, self.device)
        self.autocast = torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        if config.compile:
            self.G.compile()
            self.D.compile()

    @staticmethod
    def networks(config, num_classes):
        """Builds (G, D) from a config; num_classes is 0 without classes."""
        shape = (config.size, config.channels, config.width, config.max_width)
        return Generator(*shape, config.z_dim, num_classes), Discriminator(*shape, num_classes)

    def train_step(self, data):
        """Runs d_steps updates of D, each on a new batch of data (an iterator such as `batches`), then g_steps of G.

        Returns float32 [4] on the device, without waiting for it: both losses, then D's mean logits of real and fake.
        """
        c = self.config
        torch.manual_seed(c.seed * 1_000_003 + self.steps)  # noise that follows from the step, so that runs can resume
        for _ in range(c.d_steps):
            real, y = next(data)
            fake = self.draw(y)
            loss_D, real_logits, fake_logits = self.update_D(real, fake.detach(), y)

        # G has not changed since it drew fake, so its first update takes these samples. rpgan's G and the mean of
        # centred losses read the real logits, from D before its last update.
        loss_G = self.update_G(real, fake, y, real_logits)
        for _ in range(c.g_steps - 1):
            loss_G = self.update_G(real, self.draw(y), y, real_logits)

        self.steps += 1
        self.update_average()
        return torch.stack([loss_D, loss_G, real_logits.mean(), fake_logits.mean()])

    def draw(self, y):
        """Draws samples [B,C,H,W], with gradients to G, of the classes y[B], which a G without classes ignores."""
        # Every process draws the noise of the whole batch and keeps its rows, so one seed serves all.
        z = own_rows(sample_z(len(y) * n_ranks(), self.G.z_dim, device=y.device))
        with self.autocast:
            return self.G(z, y)

    def update_D(self, real, fake, y):
        """Takes one step of D on real, fake [B,C,H,W] of the classes y[B]; returns its loss and both logits [B]."""
        penalty = self.slope_penalty(real, y)  # first: no other pass may split a compiled D's forward and backward
        both = torch.cat([diff_augment(real, self.config.augment), diff_augment(fake, self.config.augment)])
        with self.autocast:  # one pass over both: fewer, larger products
            real_logits, fake_logits = self.D(both, y.repeat(2)).chunk(2)
        loss = self.loss_D(real_logits, fake_logits)
        self.descend(self.opt_D, loss + penalty)
        return loss.detach(), real_logits.detach(), fake_logits.detach()

    def slope_penalty(self, real, y):
        """Penalises D's slope at real images: r1 / 2 times the mean of |dD/dx|^2 (arXiv 1801.04406).

        A second derivative is slow, so it is taken only on every 16th step, at a quarter of the augmented images of
        real[B,C,H,W], and weighted by 16.
        """
        if self.config.r1 == 0 or self.steps % 16:
            return 0
        x = diff_augment(real[::4], self.config.augment).requires_grad_()
        with self.autocast:
            logits = self.D.forward(x, y[::4])  # D(x, y) may be compiled, which allows no second derivative
        (slopes,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        return 16 * self.config.r1 / 2 * slopes.square().sum(dim=(1, 2, 3)).mean()

    def update_G(self, real, fake, y, real_logits):
        """Takes one step of G on its samples fake [B,C,H,W] of the classes y[B]; returns its loss, a scalar.

        real [B,C,H,W] is there for overrides; real_logits [B] are D's logits of real.
        """
        self.D.requires_grad_(False)  # the gradient passes through D, which needs none of its own
        augmented = diff_augment(fake, self.config.augment)
        with self.autocast:
            fake_logits = self.D(augmented, y)
        loss = self.loss_G(real_logits, fake_logits)
        self.descend(self.opt_G, loss)
        self.D.requires_grad_(True)
        return loss.detach()

    def loss_D(self, real_logits, fake_logits):
        """Computes D's loss of its logits [B], a scalar."""
        mean = self.mean_logit(real_logits, fake_logits)  # with its gradient, or else all logits could run away
        return D_LOSSES[self.config.loss](real_logits - mean, fake_logits - mean)

    def loss_G(self, real_logits, fake_logits):
        """Computes G's loss of D's logits [B], a scalar."""
        mean = self.mean_logit(real_logits, fake_logits.detach())
        return G_LOSSES[self.config.loss](real_logits - mean, fake_logits - mean)

    def mean_logit(self, real_logits, fake_logits):
        """Returns the mean of all logits, over all processes, or 0 without config.center.

        Adam shifts all logits together by more than it moves real from fake, and a shift teaches nothing.
        """
        if not self.config.center:
            return 0
        mean = torch.cat([real_logits, fake_logits]).mean()
        return SumOverRanks.apply(mean) / n_ranks() if n_ranks() > 1 else mean

    def descend(self, optimizer, loss):
        """Takes one step of the optimizer down the gradient of the loss."""
        optimizer.zero_grad()  # an override's step may have left gradients
        self.scaler.scale(loss).backward()
        trained = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        average_over_ranks([p.grad for p in trained])
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad()  # now, so that gradients take no memory in the other network's step

    @torch.no_grad()
    def update_average(self):
        """Moves G_ema towards G. The half-life, in images, is a twentieth of those seen, up to config.ema_images."""
        half_life = min(self.config.ema_images, self.steps * self.config.batch / 20)
        weight = 1 - 0.5 ** (self.config.batch / half_life)
        torch._foreach_lerp_(list(self.G_ema.parameters()), list(self.G.parameters()), weight)
        self.G_ema.load_state_dict(dict(self.G.named_buffers()), strict=False)  # running averages of batch norm

    def after_log(self, run, record):
        """For overrides: the first process calls it with the run's folder and each record of the log, a dict."""

    def after_save(self, run):
        """For overrides: the first process calls it after each checkpoint; True ends the run."""

    def save(self, path):
        """Writes a checkpoint; the old file survives until the new one is complete. Refuses what is not finite."""
        content = {name: getattr(self, name).state_dict() for name in self.PARTS}
        if not all(t.isfinite().all() for t in tree_leaves(content) if torch.is_tensor(t)):
            raise UserError(f"the state at step {self.steps} is not finite: try lower --lr-G and --lr-D, or --amp off")
        content |= {"format": FORMAT, "version": __version__, "model": type(self).__name__}
        content |= {"config": asdict(self.config), "steps": self.steps}
        content |= {"classes": self.classes, "images": self.images}
        buffer = io.BytesIO()  # torch.save straight into a file would hide that the disk is full
        torch.save(content, buffer)
        with atomic_write(path) as file:
            file.write(buffer.getbuffer())

    def load(self, path):
        """Restores what `save` wrote, but keeps the options of this run, such as lr_G.

        Refuses other images, and options that differ and must not.
        """
        content = read_checkpoint(path, type(self))
        check_resumable(self.config, content["config"])
        if (self.classes, self.images) != (content["classes"], content["images"]):
            raise UserError(
                f"{path} was not trained on the images in {self.config.data}; recipes/finetune.py takes others"
            )
        with reading(path, "checkpoint to resume from"):
            for name in self.PARTS:
                if name != "scaler" or content[name]:  # without float16 the scaler has no state
                    getattr(self, name).load_state_dict(content[name])
            # Adam loads moments of any shape; () is its step count.
            for p, state in [*self.opt_G.state.items(), *self.opt_D.state.items()]:
                if any(t.shape not in (p.shape, ()) for t in state.values() if torch.is_tensor(t)):
                    raise UserError("the optimizers fit other networks")
        model = type(self).__name__
        before = content.get("model", model)
        if before != model:  # which may have had another loss or step
            say(f"{path} is of {before}, and goes on as {model}")
        self.steps = content["steps"]
        self.opt_G.param_groups[0]["lr"] = self.config.lr_G  # loading restored the old ones
        self.opt_D.param_groups[0]["lr"] = self.config.lr_D


# ---- Parts of the networks
def channel_widths(size, width, max_width):
    """Lists the channels at size, size/2, ..., 4 pixels: doubled at every halving, up to max_width."""
    if size not in SIZES:
        raise UserError(f"size must be one of {', '.join(map(str, SIZES))}, not {size}")
    return [min(max_width, width * 2**i) for i in range(int(math.log2(size)) - 1)]


def layers_of(net, *kinds):
    """Lists the layers of a network that are of these kinds."""
    return [layer for layer in net.modules() if isinstance(layer, kinds)]


def orthogonal_init(net):
    """Gives each convolution, linear layer and embedding orthogonal weights and zero biases."""
    for layer in layers_of(net, nn.Conv2d, nn.Linear, nn.Embedding):
        nn.init.orthogonal_(layer.weight)
        if getattr(layer, "bias", None) is not None:
            nn.init.zeros_(layer.bias)


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


class BatchNorm(nn.BatchNorm2d):
    """Normalises by the batches of all processes where it is synced; nn.SyncBatchNorm does not run on a CPU."""

    synced = False  # GAN turns it on in the networks that all processes train

    def forward(self, h):
        if not (self.synced and self.training):
            return super().forward(h)

        var, mean = torch.var_mean(at_least_float32(h), dim=(0, 2, 3), correction=0)
        common = SumOverRanks.apply(mean) / n_ranks()  # [C]
        var = SumOverRanks.apply(var + (mean - common) ** 2) / n_ranks()  # within the batches, and between them

        n = n_ranks() * h.numel() / h.shape[1]
        self.running_mean.lerp_(common.detach(), self.momentum)
        self.running_var.lerp_(var.detach() * n / (n - 1), self.momentum)

        out = (h - common[:, None, None]) * (var + self.eps).rsqrt()[:, None, None]
        if self.affine:
            out = out * self.weight[:, None, None] + self.bias[:, None, None]
        return out.to(h.dtype)


class SpectralNorm(nn.Module):
    """Scales a weight so that its largest singular value is `gain`; unlike torch's, in float32 even under autocast.

    Each forward pass in training runs one power iteration on the weight, reshaped to [shape[0], rest].
    """

    def __init__(self, weight, gain=1):
        super().__init__()
        self.gain = gain
        self.register_buffer("u", F.normalize(torch.randn(weight.shape[0]), dim=0))
        self.register_buffer("v", F.normalize(torch.randn(weight[0].numel()), dim=0))
        for _ in range(15):
            self(weight.detach())

    def forward(self, weight):
        with torch.autocast(weight.device.type, enabled=False):
            matrix = weight.movedim(1, -1).flatten(1)  # the order of channels_last, so that nothing is copied
            if self.training:
                with torch.no_grad():
                    self.v.copy_(F.normalize(matrix.T.mv(self.u), dim=0))
                    self.u.copy_(F.normalize(matrix.mv(self.v), dim=0))
            # Clones, since a second forward pass may move u and v before the backward pass of the first.
            return weight * (self.gain / self.u.clone().dot(matrix.mv(self.v.clone())))


def box(x, divisor, padding):
    """Sums every 2x2 window and divides by divisor: [N,C,H,W] -> [N,C,H',W'] with H' = H - 1 + 2 * padding."""
    if x.requires_grad and torch.is_grad_enabled():
        return Box.apply(x, divisor, padding)  # only where it is trained: torch.export takes plain operators alone
    if x.is_cuda:
        return F.avg_pool2d(x, 2, stride=1, padding=padding, divisor_override=divisor)
    # On the CPU a depthwise convolution is faster, in bfloat16 five times.
    kernel = x.new_full((x.shape[1], 1, 2, 2), 1 / divisor)
    return F.conv2d(x, kernel, padding=padding, groups=x.shape[1])


class Box(torch.autograd.Function):
    """Computes box. Its gradient is a box with the padding 1 - padding, for which no input has to be kept."""

    @staticmethod
    def forward(ctx, x, divisor, padding):
        ctx.divisor = divisor
        ctx.padding = padding
        return box(x, divisor, padding)

    @staticmethod
    def backward(ctx, gradient):
        return box(gradient, ctx.divisor, 1 - ctx.padding), None, None


def conv_pool(conv, x):
    """Computes avg_pool2d(conv(x), 2) with a quarter of the multiplications: [N,C,H,W] -> [N,K,H/2,W/2].

    The mean of 2x2 results of a 3x3 conv is its result for the means; stride 2 computes only those that are kept.
    """
    return F.conv2d(box(x, divisor=4, padding=1), conv.weight, conv.bias, stride=2)


def upsample_conv(conv, x):
    """Computes conv(upsample(x)) with a quarter of the multiplications: [N,C,H,W] -> [N,K,2H,2W].

    Upsampling puts zeros between the pixels and sums 2x2 windows. The sums may as well follow the 3x3 conv, whose bias
    they add four times.
    """
    weight = conv.weight.transpose(0, 1).flip(2, 3)
    return box(F.conv_transpose2d(x, weight, conv.bias / 4, stride=2), divisor=1, padding=0)


def pool(x):
    """Computes avg_pool2d(x, 2); on the CPU this form is faster and keeps nothing for the backward pass."""
    return F.avg_pool2d(x, 2) if x.is_cuda else F.interpolate(x, scale_factor=0.5, mode="bilinear")


def upsample(x):
    """Repeats each pixel 2x2 times."""
    with torch.autocast(x.device.type, enabled=False):  # which on CUDA would make it float32
        return F.interpolate(x, scale_factor=2)


# ---- Differentiable augmentation (arXiv 2006.10738) of both real and fake, so that D cannot memorise the data
def augment_color(x):
    """Adds up to +-0.5 to all of an image in [-1,1], scales its saturation by [0, 2] and its contrast by [0.5, 1.5]."""
    brightness, saturation, contrast = uniform(x, 3, 1, 1, 1).unbind(dim=1)  # [N,1,1,1] each
    x = x + (brightness - 0.5)

    gray = x.mean(dim=1, keepdim=True)
    x = gray + (x - gray) * (2 * saturation)

    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (x - mean) * (contrast + 0.5)


def augment_translation(x):
    """Moves each image of x[N,C,S,S] by up to an eighth of its sides, padded with zeros."""
    pixels = torch.arange(x.shape[2], device=x.device)
    most = x.shape[2] // 8
    moves = (uniform(x, 2, 1, 1) * (2 * most + 1)).floor() - most
    down, right = moves.unbind(dim=1)  # [N,1,1] each
    # A move is a product with a shifted identity on either side: dense, differentiable and fast at these sizes.
    shift_rows = pixels[:, None] - down == pixels  # [N,S,S]: row i of the result is row i - down of the image
    shift_columns = pixels - right == pixels[:, None]
    return shift_rows.to(x.dtype)[:, None] @ x @ shift_columns.to(x.dtype)[:, None]


def augment_cutout(x):
    """Zeroes a square of half the side, centred anywhere in the image, in each of x[N,C,S,S]."""
    pixels = torch.arange(x.shape[2], device=x.device)
    quarter = x.shape[2] // 4
    distance = pixels - (uniform(x, 2, 1) * x.shape[2]).floor()
    rows, columns = ((distance >= -quarter) & (distance < quarter)).unbind(dim=1)  # [N,S] each
    return x.masked_fill(rows[:, None, :, None] & columns[:, None, None, :], 0)


def uniform(x, *shape):
    """Draws numbers in [0,1) for each of x[N,...]: [N,*shape]."""
    return own_rows(torch.rand(len(x) * n_ranks(), *shape, device=x.device, dtype=x.dtype))


AUGMENTATIONS = {"color": augment_color, "translation": augment_translation, "cutout": augment_cutout}


def diff_augment(x, policy):
    """Augments images x[N,C,S,S] in [-1,1], each at random, differentiably; policy is "none" or as "color,cutout"."""
    if policy != "none":
        for name in policy.split(","):
            x = AUGMENTATIONS[name](x)
    return x


# ---- Sampling
def sample_z(n, z_dim, trunc=None, generator=None, device=None):
    """Draws noise [n,z_dim] float32: standard normal, or with trunc exactly the normal restricted to |z_i| <= trunc."""
    if trunc is None:
        return torch.randn(n, z_dim, generator=generator, device=device)
    if not 0 < trunc < math.inf:
        raise UserError(f"trunc must be positive, not {trunc}")
    return nn.init.trunc_normal_(torch.empty(n, z_dim, device=device), 0, 1, -trunc, trunc, generator)


def choose_classes(G, n, classes=None, seed=0):
    """Returns n class numbers, int64 [n]: `classes`, names or numbers, in turn; None draws at random from all."""
    if classes is None:
        return torch.randint(max(1, G.num_classes), (n,), generator=torch.Generator().manual_seed(seed))
    if len(classes) == 0:
        raise UserError("no classes were named")
    indices = torch.tensor([class_index(G, which) for which in classes])
    return indices[torch.arange(n) % len(indices)]


def class_index(G, which):
    """Finds the number of a class by its name or number; text is a number only where no class name is one."""
    names = getattr(G, "classes", [])
    if which in names:
        return names.index(which)
    by_number = not isinstance(which, str) or (which.isdecimal() and not any(name.isdecimal() for name in names))
    if not by_number or not 0 <= int(which) < G.num_classes:
        known = ", ".join(names) or f"{G.num_classes or 'no'} classes"
        raise UserError(f"no class {which}: the generator has {known}")
    return int(which)


@torch.no_grad()
def standing_generator(G, trunc=None, n_batches=20, batch=64):
    """Copies G in eval mode, with batch-norm statistics measured on z of this bound (arXiv 1809.11096).

    The statistics of other z, or of the weights before averaging, would shift every layer.
    """
    standing = copy.deepcopy(G).eval()
    standing.trunc = trunc
    for norm in layers_of(standing, nn.BatchNorm2d):
        norm.train().reset_running_stats()
        norm.momentum = None  # the plain mean over batches

    device = next(G.parameters()).device
    generator = torch.Generator().manual_seed(0)
    for i in range(n_batches):
        CORES.adapt()  # leaves cores to other programs
        z = sample_z(batch, G.z_dim, trunc, generator)
        y = choose_classes(G, batch, seed=i)
        standing(z.to(device), y.to(device))
    return standing.eval()


def to_float(images):
    """Maps 0..255 to [-1,1]."""
    return images.float() / 127.5 - 1


def to_uint8(x):
    """Maps [-1,1] to 0..255."""
    return ((x + 1) * 127.5).round().to(torch.uint8)


@torch.no_grad()
def render(G, z, y, batch=64):
    """Yields the samples of z[n,z_dim] and y[n]: uint8 [<=batch,C,H,W] on the CPU."""
    device = next(G.parameters()).device
    for some_z, some_y in zip(z.split(batch), y.split(batch)):
        CORES.adapt()
        yield to_uint8(G(some_z.to(device), some_y.to(device))).cpu()


def generate_batches(G, n, classes=None, seed=0):
    """Yields the samples that `generate` returns, in batches."""
    generator = torch.Generator().manual_seed(seed)
    z = [sample_z(1, G.z_dim, G.trunc, generator) for _ in range(n)]  # one by one, or else the last would depend on n
    return render(G, torch.cat(z), choose_classes(G, n, classes, seed))


def generate(G, n, classes=None, seed=0):
    """Draws n samples of a generator of `load_generator` or `standing_generator`, with its bound: uint8 [n,C,H,W].

    Sample i of a seed is the same for every n and device. classes: names or numbers to go through in turn; None draws
    from all at random.
    """
    return torch.cat(list(generate_batches(G, n, classes, seed)))


def sample_grid(G, columns=10, seed=0, classes=None):
    """Draws a picture [3,H,W]: a row for each of the classes, by default the first 50; without classes, 8 rows.

    With classes each column shows the same z.
    """
    generator = torch.Generator().manual_seed(seed)
    if classes is None and G.num_classes:
        classes = range(min(G.num_classes, 50))
    if classes is None:
        y = choose_classes(G, 8 * columns)
        z = sample_z(8 * columns, G.z_dim, G.trunc, generator)
    else:
        y = choose_classes(G, len(classes), classes).repeat_interleave(columns)
        z = sample_z(columns, G.z_dim, G.trunc, generator).repeat(len(classes), 1)
    return tile(torch.cat(list(render(G, z, y))), columns)


def interpolate(G, classes=None, rows=8, columns=10, seed=0):
    """Walks from one random z to another in each row, whose class is the next of `classes`: [rows,columns,C,H,W]."""
    generator = torch.Generator().manual_seed(seed)
    a, b = sample_z(2 * rows, G.z_dim, G.trunc, generator).chunk(2)  # [rows,z_dim] each
    z = arc(a, b, columns).flatten(0, 1)
    y = choose_classes(G, rows, classes, seed).repeat_interleave(columns)
    return torch.cat(list(render(G, z, y))).unflatten(0, (rows, columns))


def arc(a, b, n):
    """Walks from a[N,d] to b[N,d] in n points [N,n,d], on an arc, since on a line they would be shorter than G's z."""
    cosine = F.cosine_similarity(a, b).clamp(-1, 1)
    angle = torch.arccos(cosine)[:, None, None]
    t = torch.linspace(0, 1, n)[:, None]
    mixed = torch.sin((1 - t) * angle) * a[:, None] + torch.sin(t * angle) * b[:, None]
    return mixed / torch.sin(angle)


def tile(images, columns=10):
    """Arranges uint8 images [n,C,H,W] in one picture [3,H,W] with this many columns."""
    return make_grid(images, nrow=columns, pad_value=255)


# ---- Files and messages
SHEET = "gan.py, a sheet"  # the text in a PNG that shows samples and should not be learned from


class UserError(ValueError):
    """A request that cannot be carried out; the message says what to do instead."""


@contextlib.contextmanager
def atomic_write(path):
    """Opens a binary file that appears under its name when it is whole and on the disk; makes its folder."""
    part = Path(path).with_name(f".{os.urandom(8).hex()}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, "xb") as file:  # x: follows no link
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno:
            error.filename = str(path)  # a full disk does not say which file
        raise


@contextlib.contextmanager
def reading(path, what):
    """Turns a failure to make sense of a file into one UserError: that it is not a readable `what`, and why."""
    try:
        yield
    except Exception as error:  # readers of damaged files raise errors of all kinds
        if isinstance(error, ImportError) or lacks_memory(error):
            raise
        raise UserError(f"{path} is not a readable {what}: {cause(error)}") from error


def lacks_memory(error):
    """Tells whether an error reports a lack of memory; of the CPU's, torch says so only in words."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)


def cause(error):
    """Returns the kind and the first sentence of an error; what follows is advice, such as to unpickle."""
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    sentence = str(getattr(error, "strerror", None) or error).partition("\n")[0].partition(". ")[0].rstrip(":")
    return f"{kind}{sentence:.150}"


def printable(text):
    """Returns the text on one line: control characters and undecodable bytes become escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def clear_leftovers(folder):
    """Removes files that killed processes left half-written. Files of the last day may still be in use."""
    for part in Path(folder).glob(f".{'[0-9a-f]' * 16}.part"):
        with contextlib.suppress(OSError):  # another process was faster, or the disk is read-only
            if time.time() - part.stat().st_mtime > 86_400:
                part.unlink()


def write_picture(path, picture, software="gan.py"):
    """Writes a picture uint8 [3,H,W] in the format that the path ends in; software=SHEET says: not to learn from."""
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    if kind not in Image.SAVE:
        raise UserError(f"{path}: pictures end in .png, .jpg, .webp or the like")
    info = PngInfo()
    info.add_text("Software", software)
    with atomic_write(path) as file:
        to_pil_image(picture).save(file, kind, pnginfo=info)


def at_home(path):
    """Returns the Path, with the user's folder for a ~ at its start."""
    return Path(os.path.expanduser(path))


def write_text(path, text):
    with atomic_write(path) as file:
        file.write(text.encode())


def append_row(path, row):
    """Appends a row to a .jsonl file, on a new line even where the last one is incomplete."""
    with open(path, "ab+") as file:
        file.seek(max(0, file.tell() - 1))
        start = "" if file.read() in (b"", b"\n") else "\n"
        file.write(f"{start}{json.dumps(row)}\n".encode())


def read_rows(path):
    """Reads the rows of a .jsonl file, each a dict; skips other lines, such as one that was cut off."""
    rows = []
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def say(line, file=None):
    """Prints a line from the first process; escapes what cannot stand on one line."""
    if rank() == 0:
        shout(line, file)


def shout(line, file=None):
    """Prints a line from this process, whichever it is."""
    put(f"{printable(line)}\n", file)


def put(text, file=None):
    """Writes text at once, so that the lines of several processes stay whole."""
    with contextlib.suppress(OSError, ValueError):  # a reader that has gone away is no reason to stop
        print(text, end="", file=file, flush=True)


class Progress:
    """Shows how far some work is, when called as progress(done, total); total is None if unknown.

    Writes to stderr: in a terminal a line that renews itself, elsewhere a line every half minute.
    """

    def __init__(self, name):
        self.name = printable(name)
        self.terminal = hasattr(sys.stderr, "isatty") and sys.stderr.isatty()
        self.pause = 0.5 if self.terminal else 30
        self.started = time.monotonic()
        self.due = self.started + self.pause

    def __call__(self, done, total):
        now = time.monotonic()
        last = self.terminal and done == total
        if now < self.due and not last:
            return
        self.due = now + self.pause

        line = f"{self.name}: {done}"
        if total and done:
            left = round((now - self.started) * (total / done - 1))
            line += f" of {total}, {left // 60}:{left % 60:02d} left"
        if self.terminal:
            line = f"\r\x1b[K{line}"
        end = "" if self.terminal and not last else "\n"
        put(f"{line}{end}", sys.stderr)


class Cores:
    """Leaves cores to other programs: threads that share one spend far more time in waiting than in work.

    `adapt`, called between pieces of work, drops one of torch's threads for each core they waited for, and adds one
    when a core has been free for a while. Only Linux says how long threads wait; elsewhere this does nothing.
    """

    def __init__(self):
        self.active = False  # a program that imports this file keeps its threads
        self.free = 0  # how often in a row a core was free

    def activate(self):
        """Turns it on, for a command, unless the user has chosen a number of threads."""
        self.active = "OMP_NUM_THREADS" not in os.environ
        self.most = torch.get_num_threads()
        self.start()

    def start(self):
        self.began = time.monotonic()
        self.waited = seconds_waited()

    def adapt(self):
        if not self.active or time.monotonic() < self.began + 2:
            return
        elapsed = time.monotonic() - self.began
        threads = torch.get_num_threads()
        missing = (seconds_waited() - self.waited) / elapsed  # cores
        if missing > 0.25 and threads > 1:
            self.use(max(1, threads - math.ceil(missing)))
        elif threads < self.most:
            self.free = self.free + 1 if threads + threads_ready() < os.cpu_count() else 0
            if self.free == 3:
                self.use(threads + 1)
        self.start()

    def use(self, threads):
        torch.set_num_threads(threads)
        self.free = 0
        put(f"using {threads} of {self.most} threads, by the load of other programs\n", sys.stderr)


def seconds_waited():
    """Returns how long the threads of this process have been ready to run without a core, in seconds."""
    waited = 0
    for file in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # a thread that has just ended
            waited += int(file.read_text().split()[1])
    return waited / 1e9


def threads_ready():
    """Returns how many threads of other programs run or are ready to."""
    time.sleep(0.005)  # until the other threads of this process sleep
    return int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0]) - 1


CORES = Cores()


# ---- Data
SIZES = (16, 32, 64, 128, 256, 512)  # what the networks can draw
GRAY = ("mnist", "fashion", "usps")  # one channel, and not mirrored unless asked for
TORCHVISION = {"mnist": "MNIST", "fashion": "FashionMNIST", "usps": "USPS", "cifar10": "CIFAR10"}
DATASETS = ("synthetic", "flowers17", *TORCHVISION)
FLOWERS = "https://www.robots.ox.ac.uk/~vgg/data/flowers/17/17flowers.tgz"
FLOWERS_MD5 = "b59a65d8d1a99cd66944d474e1289eab"
FLOWERS_CLASSES = (  # 80 pictures each, in this order
    "daffodil, snowdrop, lily valley, bluebell, crocus, iris, tigerlily, tulip, fritillary, "
    "sunflower, daisy, coltsfoot, dandelion, cowslip, buttercup, windflower, pansy"
).split(", ")
DECODER = 3  # a number in the cache's key, which changes with what decoding gives
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # for some others Pillow starts a program


def load_images(data, size, channels, data_dir="data"):
    """Loads a folder or a named data set: uint8 images [N,channels,size,size], int64 labels [N] and the class names."""
    if data == "synthetic":
        return draw_flowers(size, channels)
    if data in TORCHVISION:
        return load_torchvision(data, size, channels, data_dir)
    if data == "flowers17":
        data = fetch_flowers(Path(data_dir).absolute() / data)
    return load_folder(at_home(data).absolute(), size, channels)


def fetch_flowers(folder):
    """Downloads the 17-category flowers of Nilsback and Zisserman into a folder for each class, unless it is there."""
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=".flowers17-", dir=folder.parent) as part,
        reading(FLOWERS, "archive of flowers"),
    ):
        download_and_extract_archive(FLOWERS, part, md5=FLOWERS_MD5)
        classes = Path(part, "classes")
        for i in range(1360):
            name = f"image_{i + 1:04d}.jpg"
            os.renames(Path(part, "jpg", name), classes / FLOWERS_CLASSES[i // 80] / name)  # makes the class's folder
        if not folder.exists():  # unless another process was faster
            os.replace(classes, folder)
    return folder


def load_torchvision(data, size, channels, data_dir):
    """Loads a data set of torchvision, as `load_images` does; its class names are numbers, or CIFAR's words."""
    with reading(data_dir, f"folder of {data}, nor can it be downloaded"):
        dataset = getattr(torchvision.datasets, TORCHVISION[data])(data_dir, download=True)
        images = torch.as_tensor(dataset.data)
        labels = torch.as_tensor(dataset.targets)
    images = images.permute(0, 3, 1, 2) if images.ndim == 4 else images[:, None]
    images = torch.cat([fit(part, size, channels) for part in images.split(1000)]).contiguous()
    classes = dataset.classes if data == "cifar10" else list("0123456789")
    return images, labels, classes


def load_folder(folder, size, channels):
    """Loads a folder of images, searched recursively, as `load_images` does.

    Its sub-folders are the classes if every image lies in one. Images are cropped to their centre square, resized and
    kept in ~/.cache/gan.py. Files that are not images are skipped and named.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; --data takes a folder of images or one of {', '.join(DATASETS)}")
    files, runs = list_files(folder)
    if Path() in runs:
        raise UserError(f"{folder} is a run of gan.py: its pictures are not training data")
    if runs:
        say(f"left out the runs {', '.join(map(str, runs[:10]))}")
    images, kept, remarks = decode_cached(folder, files, size, channels)

    for remark in remarks:
        say(remark)
    brightest = images.amax(dim=(1, 2, 3)).median()  # of a typical image
    if brightest < 64:
        say(f"the images are dark, from 0 to {brightest} of 255: 12-bit camera data in 16 bits, or label masks?")
    labels, classes = classes_of([files[i] for i in kept])
    return images, labels, classes


def classes_of(files):
    """Takes the first sub-folder of each file as its class: labels int64 [N] and class names.

    Where a file lies in no sub-folder, there are no classes: the labels are zeros, and there are no names.
    """
    beside = [file for file in files if len(file.parts) == 1]
    if beside:
        if len(beside) < len(files):
            say(f"no classes, since {beside[0]} lies beside the sub-folders")
        return torch.zeros(len(files), dtype=torch.int64), []
    names = [file.parts[0] for file in files]
    classes = sorted(set(names), key=natural)
    return torch.tensor([classes.index(name) for name in names]), classes


def decode_cached(folder, files, size, channels):
    """Returns what `decode` does, from the cache if it holds that."""
    facts = [DECODER, size, channels, folder]
    for file in files:
        stat = (folder / file).stat()
        facts += [file, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    key = hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
    cache = cache_folder() / f"{key}.pt"
    with contextlib.suppress(Exception):  # not there, or damaged
        images, kept, remarks = torch.load(cache, mmap=True, weights_only=True)
        if images.shape == (len(kept), channels, size, size):
            return images, kept, remarks

    content = decode(folder, files, size, channels)
    clear_leftovers(cache.parent)
    with contextlib.suppress(OSError, RuntimeError), atomic_write(cache) as file:  # a full disk costs only time
        torch.save(content, file)
    return content


def decode(folder, files, size, channels):
    """Decodes files below a folder: (images uint8 [N,channels,size,size], the N files' indices, remarks to print)."""

    def decode_one(file):
        try:
            image, pages = read_image(folder / file, 2 * size)
        except ValueError as error:
            return f"{file} ({error})"
        return fit(center_crop(image, min(image.shape[1:])), size, channels), pages

    images = torch.empty(len(files), channels, size, size, dtype=torch.uint8)
    kept = []
    skipped = []
    pages_left_out = 0
    progress = Progress(f"decoding {folder}")
    with ThreadPoolExecutor() as threads:  # decoding and resizing release Python's lock
        for i, result in enumerate(threads.map(decode_one, files)):
            progress(i + 1, len(files))
            if isinstance(result, str):
                skipped.append(result)
                continue
            images[len(kept)], pages = result
            pages_left_out += pages - 1
            kept.append(i)

    if not kept:
        formats = ", ".join(FORMATS)
        raise UserError("; ".join([f"no images of {formats} among {len(files)} files", *skipped[:2]]))
    remarks = []
    if skipped:
        images = images[: len(kept)].clone()  # a cache of a view would hold the empty rest too
        remarks.append(f"skipped {len(skipped)} of {len(files)} files, such as {', '.join(skipped[:10])}")
    if pages_left_out:
        remarks.append(f"left out {pages_left_out} pages: only the first of each file is used")
    return images, kept, remarks


def fit(images, size, channels):
    """Resizes uint8 images [...,C,H,W] and makes them gray or coloured: [...,channels,size,size]."""
    images = resize(images, [size, size], antialias=True)
    if channels == 1:
        images = rgb_to_grayscale(images.float()).round().to(torch.uint8)
    return images.expand(*images.shape[:-3], channels, size, size)


def hash_of(images):
    """Returns the SHA-256 of uint8 images, in hexadecimal digits."""
    return hashlib.sha256(images.numpy()).hexdigest()


def natural(name):
    """Makes a sort key that puts 9 before 10."""
    return [int(part) if part.isdecimal() else part.lower() for part in re.split(r"(\d+)", name)], name


def list_files(folder):
    """Lists the visible files below a folder, relative to it, and apart from them the folders of gan.py's runs.

    Follows links, but enters each real folder once, and no run's: its pictures are not data.
    """
    files = []
    runs = []
    entered = set()
    waiting = [Path(folder)]
    while waiting:
        parent = waiting.pop(0)  # the nearest first, so that a link inside one class does not claim another's folder
        if parent.resolve() in entered:
            continue
        entered.add(parent.resolve())
        visible = [path for path in parent.iterdir() if not path.name.startswith(".")]
        if {"config.json", "checkpoint.pt"} <= {path.name for path in visible}:
            runs.append(parent.relative_to(folder))
            continue
        waiting += sorted(path for path in visible if path.is_dir())
        files += [path.relative_to(folder) for path in visible if path.is_file()]
    return sorted(files, key=str), runs


def read_image(path, least=None):
    """Reads the first page of an image file: (uint8 [1 or 3,H,W], the number of its pages).

    EXIF rotation is applied, transparency put on white, 16 bits scaled to 8. A JPEG is decoded at a reduced scale where
    its sides keep `least` pixels. Raises ValueError for bytes of another kind; errors of the disk pass through.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:  # reads only the head, as a file of another kind may be large
            if image.info.get("Software") == SHEET:
                raise ValueError("a picture of samples by gan.py")
            if least:
                image.draft(None, (least, least))
            return pixels_of(ImageOps.exif_transpose(image)), pages_of(image)
    except Exception as error:  # Pillow's decoders raise errors of many kinds, but only the system's have a number
        if isinstance(error, MemoryError) or getattr(error, "errno", None) not in (None, errno.EINVAL):
            raise
        reason = re.sub(" ['<].*", "", str(error))  # without the path or the object that Pillow adds
        raise ValueError(reason or type(error).__name__) from error


def pages_of(image):
    """Returns the number of pages of an open image; 1 for a photo with a preview, and where the others are damaged."""
    if image.format == "MPO":
        return 1
    try:
        return image.n_frames
    except Exception:  # of many kinds
        return 1


def pixels_of(image):
    """Returns the pixels of an image of Pillow, uint8 [1 or 3,H,W]."""
    if image.mode.startswith("F"):
        raise ValueError("floating-point pixels have no agreed range")
    if image.mode.startswith("I"):
        return torch.from_numpy((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))[None]
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return pil_to_tensor(image.convert("RGB"))


def cache_folder():
    """Returns the Path where decoded images and their features are kept."""
    home = os.path.expanduser("~")
    if home == "~":  # the user has no home
        home = tempfile.gettempdir()
    return Path(os.environ.get("XDG_CACHE_HOME") or f"{home}/.cache", "gan.py")


def batches(images, labels, config, device, start=0):
    """Yields (x[B,C,H,W] in [-1,1], y[B]) on the device, from batch number `start` on, without end.

    The last, incomplete batch of an epoch is dropped; each process takes its share of each batch.
    """
    per_epoch = len(images) // config.batch
    if device.type != "cuda" or images.numel() < torch.cuda.mem_get_info(device)[0] / 2:
        images = images.to(device)
    labels = labels.to(images.device)

    for epoch in itertools.count(start // per_epoch):
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)  # its own, so that runs can resume
        order = torch.randperm(len(images), generator=generator).to(images.device)
        for batch in order.split(config.batch)[start % per_epoch : per_epoch]:
            index = own_rows(batch)
            x = to_float(images[index].to(device, non_blocking=True))
            if config.flip:
                x = torch.where(uniform(x, 1, 1, 1) < 0.5, x.flip(3), x)
            yield x, labels[index].to(device, non_blocking=True)
        start = 0  # the next epochs are whole


# ---- Config: every hyper-parameter once; the flags of `train`, their help and config.json are made from it
def option(default, help, valid=None):
    """Declares a field of a config; valid holds the choices, or is a function of the value."""
    return field(default=default, metadata={"help": help, "valid": valid})


def positive(value):
    return 0 < value < 1e9


def not_negative(value):
    return 0 <= value < 1e9


def share(value):
    return 0 <= value < 1


def policy(value):
    return value == "none" or not set(value.split(",")) - set(AUGMENTATIONS)


def file_name(value):
    return Path(value).name == value != ".." and "\0" not in value


def layer_size(value):
    return 0 < value <= 2**14


@dataclass
class Config:
    """Holds all hyper-parameters of a run. None stands for the default in parentheses.

    `planned_steps` fills in the length, `new_folder` the name, and `resolve` all others.
    """

    loss: str = option("rpgan", "adversarial loss", D_LOSSES)
    center: bool | None = option(None, "subtract the mean of all logits in the loss (for ns, minimax and hinge)")
    cond: bool = option(False, "condition on the class; needs data with classes")
    data: str = option("synthetic", f"a folder of images or of class folders, or one of {', '.join(DATASETS)}", bool)
    data_dir: str = option("data", "where the named data sets lie or are downloaded to")
    size: int | None = option(None, "height and width in pixels (64; synthetic 32)", SIZES)
    channels: int | None = option(None, "1 for gray, 3 for colour (1 for mnist, fashion and usps, else 3)", (1, 3))
    flip: bool | None = option(None, "mirror half of the images at random (on, but off for mnist, fashion and usps)")
    augment: str = option("color,translation,cutout", "none, or some of color,translation,cutout", policy)
    width: int | None = option(None, "channels at full resolution (size / 2)", layer_size)
    max_width: int = option(512, "most channels of any layer", layer_size)
    z_dim: int = option(128, "length of the noise vector", layer_size)
    epochs: float | None = option(None, "passes over the data (150, but at least 3,000 steps; synthetic 75)", positive)
    steps: int | None = option(None, "training steps, instead of epochs", positive)
    batch: int = option(64, "images per step, over all processes; at least 2", lambda n: 2 <= n < 1e9)
    lr_G: float | None = option(None, "learning rate of the generator (4e-4, less above 128 channels)", positive)
    lr_D: float | None = option(None, "learning rate of the discriminator (the same)", positive)
    r1: float = option(0.05, "weight of the penalty on D's slope at real images", not_negative)
    beta1: float = option(0.0, "Adam's first beta, in [0, 1)", share)
    beta2: float = option(0.99, "Adam's second beta, in [0, 1)", share)
    d_steps: int = option(1, "discriminator updates per step", positive)
    g_steps: int = option(1, "generator updates per step", positive)
    ema_images: float = option(20_000, "half-life of the averaged weights in images", positive)
    seed: int = option(0, "seed of weights, noise and data order, under 2^32", lambda seed: 0 <= seed < 2**32)
    device: str = option("auto", "auto (cuda if there is one), cpu, cuda, cuda:1, ...")
    amp: str = option("auto", "autocast; auto: bf16 where fast, else fp16 on cuda", ("auto", "bf16", "fp16", "off"))
    compile: bool = option(False, "torch.compile the networks, which takes minutes before the first step")
    runs: str = option("runs", "folder that holds the runs")
    name: str | None = option(None, "name of the run's folder (a number and what it is)", file_name)
    log_every: int = option(20, "steps between two lines of log.jsonl", positive)
    sample_every: float = option(10, "epochs between two sample grids; a checkpoint goes with each", positive)
    save_minutes: float = option(5, "write the checkpoint at least this often", positive)


GAN.Config = Config  # here, since the class GAN stands above
# What may change when a run is resumed. LOCAL may too, and may differ between the hosts that train it together.
RESUMABLE = ("epochs", "steps", "lr_G", "lr_D", "amp", "compile", "log_every", "sample_every", "save_minutes")
LOCAL = ("data", "data_dir", "device", "runs", "name")


def resolve(config):
    """Copies config, with its values checked and most of its defaults filled in."""
    values = {f.name: checked(f, getattr(config, f.name)) for f in fields(config)}
    data = values["data"]
    if data not in DATASETS:
        values["data"] = str(at_home(data).absolute())
    values["data_dir"] = str(at_home(values["data_dir"]).absolute())
    values["runs"] = str(at_home(values["runs"]))
    size = values["size"] or (32 if data == "synthetic" else 64)
    width = values["width"] or size // 2
    # Adam moves every weight by about the rate, so a sum over n channels moves by n times as much (arXiv 2203.03466).
    rate = 4e-4 * min(1, 128 / channel_widths(size, width, values["max_width"])[-1])
    defaults = {
        # A shift of all logits is nothing to rpgan and wgan, and lsgan has fixed targets.
        "center": values["loss"] in ("ns", "minimax", "hinge"),
        "size": size,
        "width": width,
        "channels": 1 if data in GRAY else 3,
        "flip": data not in GRAY,
        "lr_G": rate,
        "lr_D": rate,
    }
    missing = {name: value for name, value in defaults.items() if values[name] is None}
    return replace(config, **values | missing)


def check_resumable(config, before):
    """Refuses a config that changes what must stay the same on resume."""
    may_change = RESUMABLE + LOCAL
    for name, value in asdict(config).items():
        if value != getattr(before, name) and name not in may_change:
            raise UserError(f"{name} cannot change on resume; these can: {', '.join(may_change)}")


def kind_of(field):
    """Returns the type of a config's field: int of int | None."""
    return (get_args(field.type) or (field.type,))[0]


def checked(field, value):
    """Returns the value of a field in its own type, so that a checkpoint can hold it; refuses what is not valid."""
    if value is None and type(None) in get_args(field.type):
        return None
    kind = kind_of(field)
    valid = field.metadata.get("valid")
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        converted = kind(value)
        same = kind is str or converted == value
        if same and (valid is None or (valid(converted) if callable(valid) else converted in valid)):
            return converted
    meaning = field.metadata.get("help", kind.__name__)
    if valid and not callable(valid):
        meaning += f"; one of {', '.join(map(str, valid))}"
    raise UserError(f"{field.name} cannot be {value!r}: {meaning}")


# ---- Runs: a folder with config.json, checkpoint.pt, log.jsonl, real.png and samples/
@dataclass
class Run:
    """A run: its plan, its clock, and its folder, which open_run makes in the first process."""

    folder: Path | None
    first: int  # step
    steps: int  # in all
    per_epoch: float  # steps
    sample_every: int  # steps
    real: torch.Tensor  # a picture of images as D sees them, uint8 [3,H,W]
    began: float = field(default_factory=time.monotonic)
    warm: float = 0.0  # when the first, slow steps were over, by the same clock
    saved: float = field(default_factory=time.monotonic)  # when the last checkpoint was written; -inf asks for one


def find_run(name=None, runs="runs"):
    """Finds a run by its path, or its name in the folder runs; None stands for the newest there."""
    runs = at_home(runs)
    if name is None:
        found = list(runs.glob("*/checkpoint.pt"))
        if not found:
            raise UserError(f"no runs in {runs}: train one, or see --runs")
        return max(found, key=os.path.getmtime).parent
    for path in (at_home(name), runs / name):
        if checkpoint_of(path).is_file():
            return path
    if (runs / name / "config.json").exists():
        raise UserError(f"{runs / name} has no checkpoint: train it again")
    raise UserError(f"no run {name!r}, neither here nor in {runs}; see --runs")


def checkpoint_of(run):
    """Returns the checkpoint file of a run's folder, or the file itself."""
    return Path(run) / "checkpoint.pt" if Path(run).is_dir() else Path(run)


def read_checkpoint(path, model=GAN):
    """Reads a run's or file's checkpoint: "config" (a Config), "classes", "images", "steps", each part's state_dict."""
    path = checkpoint_of(path)
    data = path.read_bytes()
    with reading(path, "checkpoint of gan.py"):
        flipped = zipfile.ZipFile(io.BytesIO(data)).testzip()
        if flipped:
            raise UserError(f"{flipped} fails its checksum")
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if content.get("format") != FORMAT:
            raise UserError(f"it is of another format, by gan.py {content.get('version', 'before 0.9')}")
        unknown = sorted(content["config"].keys() - {f.name for f in fields(model.Config)})
        if unknown:
            raise UserError(f"it needs the program that trained it: {model.__name__} has no {', '.join(unknown)}")
        content["config"].setdefault("center", False)  # as before version 1.2
        try:
            content["config"] = resolve(model.Config(**content["config"]))
        except UserError as error:
            raise UserError(f"it needs the program that trained it: {error}")
        steps = content["steps"]
        names = content["classes"]
        content["images"]  # or a KeyError
        if type(steps) is not int or steps < 0 or not all(map(file_name, names)):
            raise UserError("steps or classes have impossible values")
    return content


def load_generator(run, device="cpu", trunc=None, model=GAN):
    """Loads the averaged generator of a run for z with this bound: (G, Config); G has classes, steps and images."""
    content = read_checkpoint(run, model)
    with reading(run, "checkpoint of this version of gan.py"):
        G, _ = model.networks(content["config"], len(content["classes"]))
        G.requires_grad_(False).load_state_dict(content["G_ema"])
    G.classes = content["classes"]
    G.steps = content["steps"]
    G.images = content["images"]
    return standing_generator(G.to(device, memory_format=torch.channels_last), trunc), content["config"]


@contextlib.contextmanager
def open_run(gan, run):
    """Locks a run's folder, writes its config and cuts its log back to the checkpoint; unlocks it at the end."""
    if rank() > 0:  # the first process writes
        yield
        return
    run.folder = run.folder or new_folder(gan.config)
    with open(run.folder / ".lock", "a") as lock:
        lock_file(lock, run.folder)
        clear_leftovers(run.folder)
        clear_leftovers(run.folder / "samples")
        cut_log(run.folder / "log.jsonl", gan.steps)
        write_config(gan, run)
        write_picture(run.folder / "real.png", run.real, SHEET)
        yield


def write_config(gan, run):
    write_text(run.folder / "config.json", json.dumps(asdict(gan.config), indent=2))


def cut_log(path, steps):
    """Removes the rows of a log after this step. Where lines are not rows, a copy of the log is kept beside it."""
    rows = [row for row in read_rows(path) if isinstance(row.get("step"), int)]
    if path.exists() and len(rows) < len(path.read_bytes().splitlines()):
        odd = path.with_name(f"log-odd-{time.time_ns()}.jsonl")
        shutil.copyfile(path, odd)
        say(f"{path} has lines that are not rows: {odd} keeps them")
    write_text(path, "".join(f"{json.dumps(row)}\n" for row in rows if row["step"] <= steps))


def new_folder(config):
    """Makes a folder for a run: the name that was given, or the next number and what the run is."""
    runs = Path(config.runs)
    runs.mkdir(parents=True, exist_ok=True)
    if config.name:
        check_name(config)  # again, since decoding may have taken minutes
        folder = runs / config.name
        folder.mkdir(exist_ok=True)  # a run that was killed before its first checkpoint leaves its name
        return folder

    data = re.sub(r"[^\w.-]+", "-", Path(config.data).name)[:50]
    what = f"{config.loss}{'-cond' if config.cond else ''}-{data}-{config.size}"
    for number in itertools.count():
        folder = runs / f"{number:04d}-{what}"
        if not any(runs.glob(f"{number:04d}-*")):
            with contextlib.suppress(FileExistsError):  # another process was faster
                folder.mkdir()
                return folder


def lock_file(file, folder):
    """Locks an open file until it is closed, so that one process at a time trains a run."""
    try:
        os.lockf(file.fileno(), os.F_TLOCK, 0)
    except (BlockingIOError, PermissionError):
        raise UserError(f"{folder} is being trained by another process")
    except (AttributeError, OSError):  # a system or a disk without locks
        pass


# ---- Training
def prepare(config, resume=None, model=GAN):
    """Loads the images and builds a GAN, or restores it from a run's folder or a checkpoint: (gan, batches, Run)."""
    # Load the images.
    device = join(config.device)  # first, since it joins the other processes
    config = resolve(config)
    if config.name and not resume and rank() == 0:
        check_name(config)
    images, labels, classes = load_images(config.data, config.size, config.channels, config.data_dir)
    check_batches(config, images, classes)

    # Build the GAN.
    gan = model(config, len(classes) if config.cond else 0, device)
    gan.classes = classes if config.cond else []
    gan.images = hash_of(images)
    if config.compile:
        CORES.active = False  # another number of threads would compile again
    folder = None
    if resume:
        gan.load(resume)
        folder = checkpoint_of(resume).parent
    check_processes(gan)

    # Plan the run.
    per_epoch = len(images) // config.batch / config.d_steps
    steps = planned_steps(config, per_epoch)
    if gan.steps >= steps:
        raise UserError(f"{folder} has trained its {gan.steps} steps; --steps or --epochs can ask for more")
    x, _ = next(batches(images, labels, config, torch.device("cpu")))
    seen = diff_augment(x[:80], config.augment).clamp(-1, 1)
    sample_every = max(1, round(config.sample_every * per_epoch))
    run = Run(folder, gan.steps, steps, per_epoch, sample_every, tile(to_uint8(seen)))

    # Report the sizes.
    known = f"{len(classes)} classes: {describe(classes, labels)}" if classes else "no classes"
    say(f"{len(images)} images, {known}")
    if len(classes) > 1 and not config.cond:
        say(f"the {len(classes)} classes are not used: --cond conditions on them")
    say(f"G {millions(gan.G):.2f} M, D {millions(gan.D):.2f} M parameters")
    say(f"{n_ranks()} x {device}, {gan.autocast.fast_dtype}")
    say(f"steps {gan.steps} to {steps}, {per_epoch:g} per epoch")
    return gan, batches(images, labels, config, device, start=gan.steps * config.d_steps), run


def planned_steps(config, per_epoch):
    """Returns the steps of a whole run, by default of 150 epochs, but at least 3,000 (synthetic data: 75 epochs)."""
    if config.steps:
        return config.steps
    default = 75 if config.data == "synthetic" else max(150, 3000 / per_epoch)
    return max(1, round((config.epochs or default) * per_epoch))


def describe(classes, labels):
    """Lists the first classes, with the numbers of their images where these differ."""
    counts = labels.bincount(minlength=len(classes)).tolist()
    if len(set(counts)) > 1:
        classes = [f"{name} {count}" for name, count in zip(classes, counts)]
    return ", ".join(classes[:20])


def millions(net):
    return sum(p.numel() for p in net.parameters()) / 1e6


def check_name(config):
    """Refuses the name of a run that exists, or of a folder of anything else."""
    folder = Path(config.runs, config.name)
    if (folder / "checkpoint.pt").exists():
        raise UserError(f"{folder} exists: choose another --name, or --resume it")
    if folder.exists() and not (folder / ".lock").exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not the folder of a run: choose another --name")


def check_batches(config, images, classes):
    """Refuses a batch or classes that the images cannot give."""
    if len(images) < config.batch:
        raise UserError(f"--batch {config.batch} is more than the {len(images)} images of {config.data}")
    if config.batch % n_ranks():
        raise UserError(f"--batch must be a multiple of {n_ranks()}, the number of processes")
    if config.cond and len(classes) < 2:
        raise UserError(f"--cond needs two sub-folders of images, and no images beside them, in {config.data}")


def check_processes(gan):
    """Refuses processes that would train different GANs."""
    if n_ranks() > 1:
        shared = replace(gan.config, **dict.fromkeys(LOCAL))
        facts = [None for _ in range(n_ranks())]
        dist.all_gather_object(facts, repr((shared, gan.images, gan.steps, gan.device.type, gan.autocast.fast_dtype)))
        if len(set(facts)) > 1:
            raise UserError("the processes differ; all hosts need the same flags, images, checkpoint and devices")


def train(config, resume=None, model=GAN):
    """Trains a GAN and returns its run's folder, a Path. Ctrl-C, SIGTERM and a closed terminal end the step and save.

    resume: a run's folder or a checkpoint to go on from, until config.epochs or config.steps. On a CPU with a
    fixed number of threads the outcome is that of a run without the break, bit for bit.
    """
    gan, data, run = prepare(config, resume, model)
    losses = []
    stopped = False
    with open_run(gan, run), stop_on_signal() as stop:
        while gan.steps < run.steps and not stopped:
            # Take a step.
            losses.append(gan.train_step(data))
            CORES.adapt()
            forecast(gan, run)
            stopped = any_rank(stop)
            draws = gan.steps == run.steps or gan.steps % run.sample_every == 0
            # All processes know draws and stopped alike, so that all ask any_rank or none.
            saves = draws or stopped or any_rank(time.monotonic() > run.saved + 60 * gan.config.save_minutes)

            # Log the losses.
            if saves or gan.steps % gan.config.log_every == 0:
                log(gan, run, torch.stack(losses))
                losses = []

            # Draw and save.
            if saves:
                stopped |= save(gan, run, draws)
    if gan.steps < run.steps:
        say(f"stopped at step {gan.steps}: continue with --resume {run.folder}")
    else:
        say(f"done at step {gan.steps}: see {run.folder}")
    return run.folder


def forecast(gan, run):
    """Prints how long a run will take, by the last 10 of its first 15 steps, and how a very long one gets shorter."""
    left = run.steps - gan.steps
    if gan.steps == run.first + 5:
        run.warm = time.monotonic()
    if gan.steps == run.first + 15:
        hours = left / 10 * (time.monotonic() - run.warm) / 3600
        if hours > 1:
            say(f"this will take {hours:.1f} hours")
        if hours > 12:
            say(f"--steps {gan.steps + left * 12 / hours:.0f} would take 12, and --resume can go on from there")


def log(gan, run, losses):
    """Logs the means of losses [steps,4] over the steps since the last line."""
    average_over_ranks([losses])
    if not losses.isfinite().all():  # only here does a plain step wait for the GPU
        raise UserError(f"the losses are not finite by step {gan.steps}: try lower --lr-G and --lr-D, or --amp off")
    if rank() == 0:
        seconds = (time.monotonic() - run.began) / (gan.steps - run.first)  # per step
        means = dict(zip(("loss_D", "loss_G", "real_logit", "fake_logit"), losses.mean(dim=0).tolist()))
        speed = gan.config.batch / seconds
        record = {"step": gan.steps, "epoch": gan.steps / run.per_epoch, "images_per_s": speed, **means}
        if not run.folder.is_dir():
            say(f"{run.folder} is gone: it is made again, with a checkpoint after the next step")
            write_config(gan, run)
            run.saved = -math.inf
        append_row(run.folder / "log.jsonl", record)
        left = timedelta(seconds=round((run.steps - gan.steps) * seconds))
        shown = "  ".join(f"{name} {mean:.3f}" for name, mean in means.items())
        say(f"step {gan.steps}/{run.steps}  {speed:.0f} images/s  {left} left  {shown}")
        gan.after_log(run.folder, record)


def save(gan, run, draws):
    """Draws samples if it is time, then writes the checkpoint; tells all processes alike whether the run should end."""
    ended = False
    if rank() == 0:
        if draws:
            picture = sample_grid(standing_generator(gan.G_ema))
            write_picture(run.folder / "samples" / f"{gan.steps:07d}.png", picture, SHEET)
        gan.save(run.folder / "checkpoint.pt")
        ended = gan.after_save(run.folder)
    run.saved = time.monotonic()
    return any_rank(ended)


@contextlib.contextmanager
def stop_on_signal():
    """Yields a list that Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 fill; a second one interrupts at once."""
    stop = []

    def handle(*args):
        if stop:
            signal.default_int_handler(*args)
        stop.append(True)

    with contextlib.ExitStack() as after:
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
                number = getattr(signal, name, None)  # Windows lacks some
                if number and signal.getsignal(number) != signal.SIG_IGN:  # as nohup asks
                    before = signal.signal(number, handle) or signal.SIG_DFL  # None: it was not set by Python
                    after.callback(signal.signal, number, before)
        yield stop


def pick_dtype(amp, device):
    """Returns the dtype to autocast to; float32 stands for none."""
    if amp == "fp16" and device.type != "cuda":
        raise UserError("--amp fp16 needs a CUDA device; bf16 works on the CPU too")
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    if amp == "auto" and device.type == "cpu":
        known = torch.cpu.get_capabilities()
        amp = "bf16" if known.get("avx512_bf16") or known.get("amx_bf16") else "off"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp, torch.float32)


# ---- Several processes, started by torchrun: each draws the noise of the whole batch and takes its rows of everything
def n_ranks():
    """Returns the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    """Returns the number of this process, from 0."""
    return dist.get_rank() if n_ranks() > 1 else 0


def join(name):
    """Returns the torch.device of a name; under torchrun, joins the other processes, by nccl on GPUs, else by gloo."""
    launched = dist.is_available() and dist.is_torchelastic_launched()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    own = f"cuda:{os.environ['LOCAL_RANK']}" if launched and name == "cuda" else name
    try:
        device = torch.device(own)
        torch.zeros(1, device=device).item()
    except Exception as error:  # of many kinds, by what torch was built with
        raise UserError(f"no device {name!r} here ({cause(error)}); --device cpu --amp auto would work")
    if device.type == "cuda":
        if device.index is not None:  # set_device refuses a plain "cuda", which is the current device already
            torch.cuda.set_device(device)
        # The shapes stay the same, so that the search for fast kernels pays; it may find others each time.
        torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    if launched and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if name == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=6))  # one may decode longer than another
    return device


def own_rows(x):
    """Returns this process's rows of x, which holds those of all processes."""
    return x.chunk(n_ranks())[rank()]


class SumOverRanks(torch.autograd.Function):
    """Sums a tensor over the processes, and its gradient too."""

    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return SumOverRanks.forward(ctx, gradient)


def any_rank(answer):
    """Returns whether the answer is true in any process, so that all act alike."""
    mean = torch.tensor(float(bool(answer)))
    average_over_ranks([mean])
    return mean.item() > 0


@torch.no_grad()
def average_over_ranks(tensors):
    """Replaces each tensor by its mean over the processes, by one flat all-reduce."""
    if n_ranks() > 1:
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        for t, total in zip(tensors, flat.split([t.numel() for t in tensors])):
            t.copy_(total.view(t.shape) / n_ranks())


# ---- Evaluation
def evaluate(run, truncs=(None,), n=None, extractor="inception", device="auto", seed=0, data=None, model=GAN):
    """Scores the averaged generator of a run at each bound of z, and draws its grid; returns a row for each bound.

    The rows are appended to eval.jsonl in the run's folder. n: samples, by default as many as training images, of the
    same classes. extractor: see metrics.load_extractor; without Inception's weights, only SWD is measured. data: where
    the images lie now.
    """
    # Load both sides.
    device = join(device)
    G, config = load_generator(run, device, model=model)
    data = data or config.data
    images, labels, names = load_images(data, config.size, config.channels, config.data_dir)
    classes = classes_like(G, labels, names, seed)
    facts = {"n": n or len(images), "steps": G.steps, "seed": seed, "data": data, "n_real": len(images)}
    notes = []
    if G.num_classes and not classes:
        notes.append("these images have no classes: the samples are drawn evenly from all classes of the run")
    if hash_of(images) != G.images:
        notes.append(f"these are not the images that the run was trained on, which lay in {config.data}")

    # Draw the grids, first, so that an unwritable disk shows before the long work.
    folder = checkpoint_of(run).parent
    generators = {trunc: G if trunc is None else standing_generator(G, trunc) for trunc in truncs}
    for trunc, standing in generators.items():
        write_picture(folder / f"eval-trunc-{trunc}.png".lower(), sample_grid(standing, seed=seed), SHEET)

    # Score the samples.
    score = scorer(images, extractor, device)
    rows = []
    for trunc, standing in generators.items():
        scores, made_by, own_notes = score(generate_batches(standing, facts["n"], classes, seed))
        # made_by stands behind the facts, since SWD takes fewer samples and has an n of its own.
        row = {"trunc": trunc, "version": __version__, **facts, **made_by, "notes": notes + own_notes, **scores}
        append_row(folder / "eval.jsonl", row)
        rows.append(row)
        shown = "  ".join(f"{name} {value:.3f}" for name, value in scores.items())
        say(f"trunc {trunc or 'none'}  n {row['n']}  {shown}")
    say_notes(rows)
    return rows


def say_notes(rows):
    """Prints each note of some rows once."""
    for note in dict.fromkeys(note for row in rows for note in row["notes"]):
        say(note, sys.stderr)


def scorer(images, extractor, device):
    """Returns a function that compares batches of samples with the images: (scores, what made them, notes)."""
    import metrics

    metrics.CORES = CORES  # one for both files
    try:
        network = metrics.load_extractor(extractor, device)
    except metrics.WeightsMissing as error:
        missing = f"{error}; only SWD is measured"

        def score_patches(samples):
            some = torch.cat(list(itertools.islice(samples, 128)))  # batches of 64
            return {"SWD": metrics.sliced_wasserstein(images, some)}, {"network": None, "n": len(some)}, [missing]

        return score_patches
    real = metrics.measure_cached(network, images, cache_folder(), Progress(f"{network.name}, images"))

    def score(samples):
        fake = metrics.measure(network, samples, progress=Progress(f"{network.name}, samples"))
        return metrics.compare(real, fake), network.made_by, metrics.notes(real, fake)

    return score


def classes_like(G, labels, names, seed):
    """Lists the numbers of G's classes that the images have, one for each image in random order; None without."""
    if not (G.num_classes and names):
        return None
    unknown = [name for name in names if name not in G.classes]
    if unknown:
        raise UserError(f"the run has no class {unknown[0]}: there are {', '.join(G.classes)}")
    indices = torch.tensor([G.classes.index(name) for name in names])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return indices[labels[order]].tolist()


# ---- Commands
def train_command(args, model):
    # Keep freed memory in this process, on Linux: handing pages back and forth costs a seventh of a step on the CPU.
    with contextlib.suppress(OSError, AttributeError):  # another system, or a C library other than GNU's
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no mapping for a large block
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep all
    given = vars(args)  # the fields of a config only where they were given
    del given["command"]
    resume = given.pop("resume")
    if resume is None:
        train(model.Config(**given), model=model)
        return
    if "name" in given:
        raise UserError("--name is for a new run; --resume keeps the folder of its run")
    run = find_run(resume, given.get("runs", "runs"))
    before = read_checkpoint(run, model)["config"]
    if "epochs" in given:
        given.setdefault("steps", None)  # steps outrank epochs
    config = replace(before, **given)
    check_resumable(config, before)  # before the images are decoded
    train(config, run, model)


def eval_command(args, model):
    run = find_run(args.run, args.runs)
    say(f"the run {run}")
    evaluate(run, args.trunc, args.n, args.extractor, args.device, args.seed, args.data, model)
    say(f"see eval.jsonl and eval-trunc-*.png in {checkpoint_of(run).parent}")


def sample_command(args, model):
    out = at_home(args.out)
    kind = out.suffix
    if kind not in (".png", ".npz", "") or (args.interpolate and kind != ".png"):
        raise UserError(f"--out {out}: give a .png, an .npz or a new folder; with --interpolate a .png")
    if kind == "" and out.exists():
        raise UserError(f"--out {out} exists: give a new folder")
    run = find_run(args.run, args.runs)
    G, _ = load_generator(run, join(args.device), args.trunc, model)
    if kind == ".png":
        write_picture(out, picture_of(G, args), SHEET)
    else:
        classes = args.classes or range(G.num_classes)
        write_samples(out, G, args.n or 10 * (len(classes) or 8), classes or None, args.seed)
    say(f"wrote {out}, of the run {run}")


def picture_of(G, args):
    """Draws what `sample` writes as a picture, uint8 [3,H,W]: walks, n samples of the classes in turn, or a grid."""
    if args.interpolate:
        return tile(interpolate(G, args.classes, rows=args.n or 8, seed=args.seed).flatten(0, 1))
    if args.n:
        return tile(generate(G, args.n, args.classes, args.seed))
    return sample_grid(G, seed=args.seed, classes=args.classes)


def write_samples(out, G, n, classes, seed):
    """Writes n samples of the classes in turn as an .npz, or as a new folder with a sub-folder for each class."""
    images = generate(G, n, classes, seed)
    labels = choose_classes(G, n, classes)
    if out.suffix == ".npz":
        pixels = images.permute(0, 2, 3, 1).numpy()  # uint8 [n,H,W,C]
        arrays = {"images": pixels, "arr_0": pixels}  # arr_0 for ADM's evaluator
        if G.num_classes:
            arrays["labels"] = labels.numpy()  # int64 [n]
        with atomic_write(out) as file:
            np.savez(file, **arrays)
        return
    for i, (image, label) in enumerate(zip(images, labels)):
        folder = out / G.classes[label] if G.num_classes else out
        write_picture(folder / f"{i:05d}.png", image)


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line."""

    def error(self, message):
        shout(f"{self.prog.split()[0]}: error: {message} (--help lists the flags)", sys.stderr)
        self.exit(2)


def whole_number(text, low=0, high=2**32 - 1):
    """Reads a whole number in a range, for argparse."""
    if not (text.isdecimal() and low <= int(text) <= high):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from {low} to {high}")
    return int(text)


def truncation(text):
    """Reads a bound of |z|, for argparse: a number, or None for "none"."""
    return None if text == "none" else float(text)


def make_parser(model):
    parser = Parser(prog=Path(sys.argv[0]).name, description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", metavar="train | eval | sample", required=True)

    p = commands.add_parser("train", help="train on a folder of images or a named data set", allow_abbrev=False)
    p.add_argument("--resume", metavar="RUN", help="go on with a run")
    for f in fields(model.Config):
        add_option(p, f)

    common = Parser(add_help=False)
    common.add_argument("--run", help="run, by name or path, or checkpoint file (the newest run)")
    common.add_argument("--runs", default="runs", help="folder that holds the runs (runs)")
    common.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (auto)")
    common.add_argument("--seed", type=whole_number, default=0, help="seed of the noise (0)")

    p = commands.add_parser("eval", help="score a run", parents=[common], allow_abbrev=False)
    p.add_argument("--n", type=lambda n: whole_number(n, 2, 10**7), help="samples (as many as images)")
    p.add_argument("--trunc", type=truncation, nargs="+", default=[None], help="bounds of |z|, or none (none)")
    p.add_argument("--data", help="where the training images lie now (where they lay at training)")
    p.add_argument(
        "--extractor",
        type=os.path.expanduser,
        default="inception",
        help="inception, a weights file or a .pt2 program (inception)",
    )

    p = commands.add_parser("sample", help="write samples of a run", parents=[common], allow_abbrev=False)
    p.add_argument("--n", type=lambda n: whole_number(n, 1, 10**7), help="samples (10 per class, or 80), or walks (8)")
    p.add_argument("--trunc", type=truncation, help="bound of |z| (none)")
    p.add_argument("--classes", nargs="+", help="names or numbers: a row each, or in turn with --n (all; in a grid 50)")
    p.add_argument("--interpolate", action="store_true", help="rows that walk between random pairs of z")
    p.add_argument("--out", default="samples.png", help=".png, .npz or a new folder (samples.png)")
    return parser


def add_option(parser, field):
    """Adds the flag of a config's field, absent unless given, so that --resume can tell what was asked for."""
    flag = f"--{field.name.replace('_', '-')}"
    help = field.metadata.get("help", "")  # a subclass may declare a field without option
    if field.default is not None:
        help += f" ({field.default})"
    common = {"dest": field.name, "default": argparse.SUPPRESS, "help": help}
    valid = field.metadata.get("valid")
    if kind_of(field) is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
    else:
        parser.add_argument(flag, type=kind_of(field), choices=None if callable(valid) else valid, **common)


def main(argv=None, model=GAN):
    """Runs a command line. Bad input ends with one line and status 2, Ctrl-C with 130."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names in a terminal of another encoding
    warnings.simplefilter("ignore")  # of Pillow, NumPy and torch: advice to programmers
    args = make_parser(model).parse_args(argv)
    CORES.activate()
    commands = {"train": train_command, "eval": eval_command, "sample": sample_command}
    status = 0
    try:
        commands[args.command](args, model)
    except KeyboardInterrupt:
        status = 130
        message = "interrupted"
    except Exception as error:
        status = 2
        message = explain(error)
        if not message:
            raise
    if status:
        where = f" in process {rank()}" if n_ranks() > 1 else ""
        shout(f"{Path(sys.argv[0]).name}: error{where}: {message}", sys.stderr)
    if n_ranks() > 1:  # gloo can hang where it is taken down, and abort where it is not
        os._exit(status)
    if status:
        sys.exit(status)


def explain(error):
    """Returns the line that reports an error of the user's or of the machine; None for a fault of this program."""
    message = str(error).replace("\n", " ")
    kinds = [kind.__name__ for kind in type(error).__mro__]
    if lacks_memory(error):
        return "out of memory; try a smaller --batch, --width, --size or --n"
    if "start new thread" in message:
        return "the system allows no more threads; set OMP_NUM_THREADS=1, or end other programs"
    if n_ranks() > 1 and (isinstance(error, dist.DistError) or "gloo/" in message):
        return "another process has stopped"
    if isinstance(error, (OSError, ImportError)) or "UserError" in kinds:  # ours or metrics'
        return message or kinds[0]
    return None


# ---- Appendix: flowers drawn by code, so that `python gan.py train` needs no data
def draw_flowers(size, channels, per_class=80, classes=17):
    """Returns what load_images does, of flowers: petals, colours and ground differ by class, place and shade within."""
    images = torch.cat([draw_class(c, per_class, size) for c in range(classes)])
    labels = torch.arange(classes).repeat_interleave(per_class)
    return fit(images, size, channels), labels, [f"flower {c}" for c in range(classes)]


def draw_class(c, n, size):
    """Draws n flowers of class c, uint8 [n,3,size,size]. Coordinates run from -1 to 1, y downwards."""
    generator = torch.Generator().manual_seed(c)
    grid = torch.linspace(-1, 1, size)

    def vary(low, high):
        return low + (high - low) * torch.rand(n, 1, 1, generator=generator)

    # Paints where inside, the signed distance from an edge, is positive. The colour is HSV; pale is 1 - saturation.
    # Edges are two pixels wide: sharper ones tell D too much, and samples turn dull and torn.
    def paint(inside, hue, pale, value):
        waves = [torch.cos(2 * math.pi * (hue - turn)) for turn in (0, 1 / 3, 2 / 3)]
        wheel = torch.stack(waves, dim=1) / 2 + 0.5
        color = (pale + (1 - pale) * wheel) * value[:, None]
        cover = (inside * size / 4 + 0.5).clamp(0, 1)[:, None]
        canvas.lerp_(color, cover)

    # Place the flower: x and y broadcast to [n,size,size].
    x = grid - vary(-0.12, 0.12)
    y = grid[:, None] + vary(0, 0.25)
    radius = torch.hypot(x, y) / vary(0.6, 0.8)
    angle = torch.atan2(y, x) + vary(-0.25, 0.25)
    bend = vary(-0.3, 0.3)

    # Choose what makes the class: hues go from blue through red to yellow, never leaf green.
    petals = 3 + c % 6
    hue = 0.55 + 0.62 * (c * 0.618 % 1)
    ground = (0.58, 0.3, 0.12, 0.7)[c % 4]
    light = (0.95, 0.35, 0.9, 0.25)[c % 4]

    # Paint the ground, the stem, the petals and the heart.
    canvas = torch.zeros(n, 3, size, size)  # zeros: lerp would keep a NaN of unset memory
    paint(torch.ones(n, size, size), ground + vary(-0.03, 0.03), 0.6, light * (1 - 0.2 * y))
    stem = 0.07 - (x - bend * y.square()).abs()
    paint(torch.minimum(stem, y), vary(0.3, 0.35), 0.2, vary(0.4, 0.5))
    reach = 0.3 + 0.7 * (petals * angle / 2).sin().abs()
    paint(reach - radius, hue + vary(-0.03, 0.03), 0.15, 0.65 + 0.35 * radius)
    paint(0.3 - radius, vary(0.08, 0.14), 0.1, vary(0.7, 1))
    return (canvas.clamp(0, 1) * 255).round().to(torch.uint8)


if __name__ == "__main__":
    main()
