# SPDX-License-Identifier: MIT
"""A class-conditional GAN for your own images, in one file that reads downwards.

    python gan.py train --loss ns                                    # needs no data: learns flowers drawn by code
    python gan.py train --loss hinge --cond --data FOLDER --size 64  # your images, a sub-folder for each class
    python gan.py eval --trunc 0.7                                   # scores and pictures of the newest run
    python gan.py sample --interpolate --out walk.png

A residual generator with adaptive batch norm meets a projection discriminator (arXiv 1802.05637) with spectral norm
(1802.05957), under differentiable augmentation (2006.10738); an average of the generator's weights draws the samples.
"""

import os
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C during the slow imports; main takes over
import argparse
import contextlib
import copy
import ctypes
import hashlib
import io
import itertools
import json
import math
import re
import sys
import tempfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import get_args

os.environ.setdefault("GOMP_SPINCOUNT", "100000")  # threads that wait soon sleep: 3 times as fast on a busy machine
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import nn
from torch.distributed.nn.functional import all_reduce
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize, rgb_to_grayscale, to_pil_image
from torchvision.utils import make_grid


class UserError(ValueError):
    """A request that cannot be carried out; the message says what to do instead."""


# ---- Networks
class Generator(nn.Module):
    """Maps noise and class to images: z[N,z_dim], y[N] int64 or None -> [N,channels,size,size] float32 in [-1,1].
    z (its rms taken to the power 0.4) and the class embedding feed the first layer and every adaptive norm."""

    def __init__(self, size=64, channels=3, width=32, max_width=512, z_dim=128, num_classes=0):
        super().__init__()
        widths = channel_widths(size, width, max_width)[::-1]
        self.size, self.channels, self.z_dim, self.num_classes = size, channels, z_dim, num_classes
        self.embed = nn.Embedding(num_classes, z_dim) if num_classes else None
        e_dim = 2 * z_dim if num_classes else z_dim
        self.linear = nn.Linear(e_dim, widths[0] * 4 * 4)
        self.blocks = nn.ModuleList(GeneratorBlock(a, b, e_dim) for a, b in itertools.pairwise(widths))
        self.attention = Attention(widths[2]) if num_classes else nn.Identity()  # at 16 px; untried without classes
        self.norm = nn.BatchNorm2d(widths[-1])
        self.conv = nn.Conv2d(widths[-1], channels, 3, padding=1)
        orthogonal_init(self)
        # Batch norm cancels their scale, but Adam's steps have a fixed size, so small weights learn faster.
        for layer in (self.linear, *(m for m in self.blocks.modules() if isinstance(m, nn.Conv2d))):
            layer.weight.data *= 0.1

    def forward(self, z, y=None):
        z = z * (z.square().mean(dim=1, keepdim=True) + 1e-8) ** -0.3  # truncated z, which are short, vary less
        e = torch.cat([z, self.embed(y)], dim=1) if self.num_classes else z
        h = self.linear(e).unflatten(1, (-1, 4, 4)).contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            h = block(h, e)
            h = self.attention(h) if h.shape[2] == 16 else h
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
        h = upsample_conv(self.conv1, F.relu(self.norm1(x, e), inplace=True))
        h = self.conv2(F.relu(self.norm2(h, e), inplace=True))
        return h.add_(upsample(self.skip(x)))  # upsampled last: the 1x1 skip is then cheaper


class AdaptiveBatchNorm(nn.Module):
    """Batch norm whose gain and bias are linear in an embedding: h[N,C,H,W], e[N,e_dim] -> [N,C,H,W]."""

    def __init__(self, channels, e_dim):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.gain_bias = nn.Linear(e_dim, 2 * channels)

    def forward(self, h, e):
        gain, bias = self.gain_bias(e)[:, :, None, None].chunk(2, dim=1)
        return torch.addcmul(bias, self.norm(h), 1 + gain)


class Attention(nn.Module):
    """Self-attention (arXiv 1805.08318): adds to each pixel of x[N,C,H,W] a weighted mean of values, at first zero."""

    def __init__(self, c):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(c, d, bias=False) for d in (max(1, c // 4), max(1, c // 4), c))
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        pixels, means = (h.flatten(2).mT for h in (x, pool(x)))  # [N,HW,C], [N,HW/4,C]
        shares = (self.query(pixels) @ self.key(means).mT).softmax(dim=2)  # [N,HW,HW/4]
        return x + (shares @ (self.gain * self.value(means))).mT.unflatten(2, x.shape[2:])


class Discriminator(nn.Module):
    """Maps images and class to raw logits: x[N,channels,size,size] in [-1,1], y[N] int64 or None -> [N] float32. Every
    layer has spectral norm. With classes the logit is linear(phi(x)) + <phi(x), embed(y)> (arXiv 1802.05637), plus a
    linear term of |phi(x) - phi(neighbour in the batch)|, which shows D a G that draws one image twice (1710.10196)."""

    def __init__(self, size=64, channels=3, width=32, max_width=512, num_classes=0):
        super().__init__()
        widths = channel_widths(size, width, max_width)
        self.num_classes = num_classes
        self.conv = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(DiscriminatorBlock(a, b) for a, b in itertools.pairwise(widths))
        self.linear = nn.Linear(widths[-1], 1)
        self.embed = nn.Embedding(num_classes, widths[-1]) if num_classes else None
        self.distance = nn.Linear(widths[-1], 1) if num_classes else None
        for layer in orthogonal_init(self):
            layer.weight.data *= 0.3  # spectral norm cancels the scale, so again smaller weights learn faster
            nn.utils.parametrize.register_parametrization(layer, "weight", SpectralNorm(layer.weight))

    def features(self, x):
        """Computes phi(x): images [N,channels,size,size] -> [N,C] float32."""
        h = self.conv(x.contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            h = block(h)
        return F.relu(h.to(torch.promote_types(h.dtype, torch.float32))).sum(dim=(2, 3))  # at least float32

    def forward(self, x, y=None):
        phi = self.features(x)
        with torch.autocast(x.device.type, enabled=False):
            if not self.num_classes:
                return self.linear(phi).squeeze(1)
            other = phi[(torch.arange(len(x), device=x.device) ^ 1).clamp(max=len(x) - 1)]  # 1, 0, 3, 2, ...
            logits = self.linear(phi) + self.distance((phi - other).abs() / 2)  # [N,1]; half is a pair's deviation
            return logits.squeeze(1) + (phi * self.embed(y)).sum(dim=1)


class DiscriminatorBlock(nn.Module):
    """A pre-activation residual block that halves the resolution: [N,c_in,H,W] -> [N,c_out,H/2,W/2]."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.relu(x))
        return conv_pool(self.conv2, F.relu(h, inplace=True)).add_(self.skip(pool(x)))


# ---- Losses to minimise: D's takes its logits of real[N] and fake[N], G's takes those of fake[N], rpgan's fake - real
d_bce = lambda real, fake: F.softplus(-real).mean() + F.softplus(fake).mean()  # noqa: E731
LOSSES = {  # name: (loss of D, loss of G), from arXiv 1406.2661, 1705.02894, 1611.04076, 1701.07875 and 1807.00734
    "ns": (d_bce, lambda fake: F.softplus(-fake).mean()),  # softplus(-x) is -log sigmoid(x)
    "minimax": (d_bce, lambda fake: -F.softplus(fake).mean()),  # log(1 - sigmoid(fake)), which saturates
    "hinge": (lambda real, fake: F.relu(1 - real).mean() + F.relu(1 + fake).mean(), lambda fake: -fake.mean()),
    "lsgan": (lambda real, fake: ((real - 1) ** 2 + fake**2).mean() / 2, lambda fake: ((fake - 1) ** 2).mean() / 2),
    "wgan": (lambda real, fake: fake.mean() - real.mean(), lambda fake: -fake.mean()),
    "rpgan": (lambda real, fake: F.softplus(fake - real).mean(), lambda fake: F.softplus(-fake).mean()),
}


# ---- The training step
class GAN:
    """Both networks, the averaged generator, the optimizers, and the step that trains them. For another GAN, override
    `networks` (called as G(z, y) and D(x, y); G has z_dim and num_classes), `update_D` and `update_G`, or `Config`,
    whose fields become flags; `main(model=YourGAN)` is its command line."""

    PARTS = ("G", "D", "G_ema", "opt_G", "opt_D", "scaler")  # what a checkpoint holds

    def __init__(self, config, num_classes=0, device="cpu"):
        torch.manual_seed(config.seed)
        self.config, self.device, self.steps, self.classes, self.images = config, torch.device(device), 0, [], None
        self.logit_scale = 10 if config.loss == "rpgan" and num_classes else 1  # these lie close: see bench/README.md
        nets = self.networks(config, num_classes)
        self.G, self.D = (net.to(self.device, memory_format=torch.channels_last) for net in nets)
        self.G_ema = copy.deepcopy(self.G).eval().requires_grad_(False)
        for norm in (m for net in nets for m in net.modules() if n_ranks() > 1 and type(m) is nn.BatchNorm2d):
            norm.__class__ = SyncedBatchNorm
        betas, fused = (config.beta1, config.beta2), self.device.type in ("cpu", "cuda")
        self.opt_G = torch.optim.Adam(self.G.parameters(), config.lr_G, betas, fused=fused)
        self.opt_D = torch.optim.Adam(self.D.parameters(), config.lr_D, betas, fused=fused)
        self.dtype = pick_dtype(config.amp, self.device)
        self.autocast = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        if config.compile:
            self.G.compile(), self.D.compile()

    @staticmethod
    def networks(config, num_classes):
        """Builds (G, D) from a config; num_classes is 0 without classes."""
        shape = config.size, config.channels, config.width, config.max_width
        G, D = Generator(*shape, config.z_dim, num_classes), Discriminator(*shape, num_classes)
        for norm in (m for m in G.modules() if not num_classes and isinstance(m, AdaptiveBatchNorm)):
            norm.gain_bias.weight.data *= config.gain_scale
        return G, D

    def train_step(self, data):
        """Runs config.d_steps updates of D and config.g_steps of G on data, an iterator such as `batches`. Returns
        float32 [4] on the device, without waiting for it: both losses, then D's mean logits of real and fake."""
        c = self.config
        torch.manual_seed(c.seed * 1_000_003 + self.steps)  # noise that follows from the step, so that runs can resume
        for i in range(c.d_steps):
            real, y = next(data)
            with torch.set_grad_enabled(i == c.d_steps - 1):  # only the last samples are used again, for G
                fake = self.draw(y)
            loss_D, real_logit, fake_logit = self.update_D(real, fake.detach(), y)
        loss_G = self.update_G(real, fake, y)  # G has not moved since drawing them
        for _ in range(c.g_steps - 1):
            loss_G = self.update_G(real, self.draw(y), y)
        self.steps += 1
        self.update_average()
        return torch.stack([loss_D, loss_G, real_logit, fake_logit])

    def draw(self, y):
        """Draws samples [B,C,H,W] of the classes y[B], through which gradients reach G."""
        z = local_rows(lambda n: sample_z(n, self.G.z_dim, device=y.device), len(y))
        with self.autocast:
            return self.G(z, y)

    def update_D(self, real, fake, y):
        """Takes one step of D on real, fake [B,C,H,W] of the classes y[B]; returns its loss and mean logits of both."""
        both = torch.cat([diff_augment(x, self.config.augment) for x in (real, fake)])
        with self.autocast:  # one pass over both: fewer, larger products
            real_logits, fake_logits = self.D(both, y.repeat(2)).chunk(2)
        loss = LOSSES[self.config.loss][0](self.logit_scale * real_logits, self.logit_scale * fake_logits)
        self.descend(self.opt_D, loss)
        self.real_logits = real_logits.detach()
        return loss.detach(), self.real_logits.mean(), fake_logits.detach().mean()

    def update_G(self, real, fake, y):
        """Takes one step of G on its samples fake [B,C,H,W] of the classes y[B]; returns the loss, a scalar."""
        self.D.requires_grad_(False)  # the gradient passes through D, which needs none of its own
        augmented = diff_augment(fake, self.config.augment)
        with self.autocast:
            fake_logits = self.D(augmented, y)
        paired = self.real_logits if self.config.loss == "rpgan" else 0  # each with a real image, of its class if any
        loss = LOSSES[self.config.loss][1](self.logit_scale * (fake_logits - paired))
        self.descend(self.opt_G, loss)
        self.D.requires_grad_(True)
        return loss.detach()

    def descend(self, optimizer, loss):
        """Takes one step of the optimizer down the gradient of the loss."""
        optimizer.zero_grad()  # clears what the step of an override may have left
        self.scaler.scale(loss).backward()
        average_over_ranks([p.grad for group in optimizer.param_groups for p in group["params"]])
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad()  # now, so that gradients take no memory in the other network's step

    @torch.no_grad()
    def update_average(self):
        """Moves G_ema towards G; its half-life is a twentieth of the images seen, up to config.ema_images."""
        half_life = min(self.config.ema_images, self.steps * self.config.batch / 20)
        weight = 1 - 0.5 ** (self.config.batch / half_life)
        torch._foreach_lerp_(list(self.G_ema.parameters()), list(self.G.parameters()), weight)
        self.G_ema.load_state_dict(dict(self.G.named_buffers()), strict=False)

    def save(self, path):
        """Writes a checkpoint; the old file survives until the new one is complete. Refuses what is not finite."""
        content = {name: getattr(self, name).state_dict() for name in self.PARTS}
        if not all(t.isfinite().all() for t in torch.utils._pytree.tree_leaves(content) if torch.is_tensor(t)):
            raise UserError(f"the state at step {self.steps} is not finite: try lower --lr-G and --lr-D, or --amp off")
        content |= {"config": asdict(self.config), "steps": self.steps, "classes": self.classes, "images": self.images}
        torch.save(content, buffer := io.BytesIO())  # into a file, it would report a full disk without the reason
        with whole_file(path) as file:
            file.write(buffer.getbuffer())

    def load(self, path, new_images=False):
        """Restores what `save` wrote. Refuses options that must not change and, unless new_images, other images."""
        content = read_checkpoint(path, type(self))
        for name in (f.name for f in fields(self.config) if f.name not in RESUMABLE + LOCAL):
            if getattr(self.config, name) != getattr(content["config"], name):
                raise UserError(f"{name} cannot change on resume; these can: {', '.join(RESUMABLE + LOCAL)}")
        if self.classes != content["classes"] or (not new_images and self.images != content["images"]):
            raise UserError(f"{path} was not trained on {self.config.data} as it is; --data can give other images")
        with report_damage(path, "checkpoint to go on from"):
            for name in self.PARTS:
                if name != "scaler" or content[name]:  # one that did nothing has no state
                    getattr(self, name).load_state_dict(content[name])
            self.steps = content["steps"]
        self.opt_G.param_groups[0]["lr"], self.opt_D.param_groups[0]["lr"] = self.config.lr_G, self.config.lr_D


# ---- Parts of the networks
def channel_widths(size, width, max_width):
    """Lists the channels at size, size/2, ..., 4 pixels: doubled at every halving, up to max_width."""
    if size not in SIZES:
        raise UserError(f"size must be one of {', '.join(map(str, SIZES))}, not {size}")
    return [min(max_width, width * 2**i) for i in range(int(math.log2(size)) - 1)]


def orthogonal_init(net):
    """Gives each convolution, linear layer and embedding orthogonal weights and zero biases; returns these layers."""
    layers = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.Embedding))]
    for layer in layers:
        nn.init.orthogonal_(layer.weight)
        if getattr(layer, "bias", None) is not None:
            nn.init.zeros_(layer.bias)
    return layers


class SpectralNorm(nn.Module):
    """Divides a weight by its largest singular value; unlike torch's, in float32 even under autocast. Each forward pass
    in training makes one power iteration, on the weight as a matrix [shape[0], rest]."""

    def __init__(self, weight):
        super().__init__()
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
            return weight / self.u.clone().dot(matrix.mv(self.v.clone()))


def box(x, divisor, padding):
    """Sums 2x2 pixels, over divisor, around every pixel: [N,C,H,W] -> [N,C,H-1+2 padding,W-1+2 padding]."""
    if x.requires_grad and torch.is_grad_enabled():
        return Box.apply(x, divisor, padding)  # only then: a program can be exported only from plain operators
    if x.is_cuda:
        return F.avg_pool2d(x, 2, stride=1, padding=padding, divisor_override=divisor)
    # On the CPU a depthwise convolution is faster, in bfloat16 five times.
    return F.conv2d(x, x.new_full((x.shape[1], 1, 2, 2), 1 / divisor), padding=padding, groups=x.shape[1])


class Box(torch.autograd.Function):
    """Computes box; the gradient is a box with the other padding, so nothing is kept for it."""

    @staticmethod
    def forward(ctx, x, divisor, padding):
        ctx.divisor, ctx.padding = divisor, padding
        return box(x, divisor, padding)

    @staticmethod
    def backward(ctx, gradient):
        return box(gradient, ctx.divisor, 1 - ctx.padding), None, None


def conv_pool(conv, x):
    """Computes avg_pool2d(conv(x), 2) for a 3x3 conv with a quarter of its products: [N,C,H,W] -> [N,K,H/2,W/2]."""
    return F.conv2d(box(x, 4, 1), conv.weight, conv.bias, stride=2)  # of means, every second result is enough


def upsample_conv(conv, x):
    """Computes conv(upsample(x)) for a 3x3 conv with a quarter of its products: [N,C,H,W] -> [N,K,2H,2W]."""
    weight = conv.weight.transpose(0, 1).flip(2, 3)  # of an image with zeros between its pixels; the sums come last
    return box(F.conv_transpose2d(x, weight, conv.bias / 4, stride=2), 1, 0)


def pool(x):
    """Computes avg_pool2d(x, 2); on the CPU this form is faster and keeps nothing for the backward pass."""
    return F.avg_pool2d(x, 2) if x.is_cuda else F.interpolate(x, scale_factor=0.5, mode="bilinear")


def upsample(x):
    """Repeats each pixel 2x2 times."""
    with torch.autocast(x.device.type, enabled=False):  # which on CUDA would make it float32
        return F.interpolate(x, scale_factor=2)


# ---- Differentiable augmentation (arXiv 2006.10738) of both real and fake, so that D cannot memorise the data
def augment_color(x):
    """Moves brightness by up to +-0.5 of a range of 2, scales saturation by [0, 2] and contrast by [0.5, 1.5]."""
    draws = local_rows(lambda n: torch.rand(n, 3, 1, 1, 1, device=x.device, dtype=x.dtype), len(x))
    brightness, saturation, contrast = draws.unbind(dim=1)  # [N,1,1,1] each
    x = x + (brightness - 0.5)
    gray = x.mean(dim=1, keepdim=True)
    x = gray + (x - gray) * (2 * saturation)
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (x - mean) * (contrast + 0.5)


def distances(x, low, high):
    """Draws a row and a column in [low, high) for each of x[N,C,S,S]; returns all rows' and columns' distances [N,S]"""
    pixels = torch.arange(x.shape[2], device=x.device)
    return [pixels - local_rows(lambda n: torch.randint(low, high, (n, 1), device=x.device), len(x)) for _ in range(2)]


def augment_translation(x):
    """Moves each image by up to an eighth of its sides, padded with zeros."""
    size, pixels = x.shape[2], torch.arange(x.shape[2], device=x.device)
    rows, cols = distances(x, -size // 8, size // 8 + 1)
    # A move is a product with a shifted identity on either side: dense, differentiable and fast at these sizes.
    rows, cols = rows[:, :, None] == pixels, cols[:, None, :] == pixels[:, None]  # [N,S,S]
    return rows.to(x.dtype)[:, None] @ x @ cols.to(x.dtype)[:, None]


def augment_cutout(x):
    """Zeroes a square of half the side, centred anywhere in the image."""
    quarter = x.shape[2] // 4
    rows, cols = ((d >= -quarter) & (d < quarter) for d in distances(x, 0, x.shape[2]))
    return x.masked_fill((rows[:, :, None] & cols[:, None, :])[:, None], 0)


AUGMENTATIONS = {"color": augment_color, "translation": augment_translation, "cutout": augment_cutout}


def diff_augment(x, policy):
    """Augments each image of x[N,C,S,S] in [-1,1] at random, differentiably. policy: "none", or as "color,cutout"."""
    for name in policy.split(",") if policy not in ("", "none") else ():
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
    """Lists n classes, int64 [n]: `classes` in turn, or drawn evenly if they are None (zeros if G has no classes)."""
    if classes is None:
        return torch.randint(max(1, G.num_classes), (n,), generator=torch.Generator().manual_seed(seed))
    if (wrong := set(map(str, classes)) - set(map(str, range(G.num_classes)))) or len(classes) == 0:
        raise UserError(f"no class {min(wrong, default='')}: there are {getattr(G, 'classes', 0) or G.num_classes}")
    return torch.tensor([int(classes[i % len(classes)]) for i in range(n)])


@torch.no_grad()
def with_standing_statistics(G, trunc=None, n_batches=20, batch=64):
    """Copies G, in eval mode, with batch-norm statistics of z drawn with this trunc, since those of other z shift every
    layer. They are estimated once for each trunc, until G's weights change; G and its copies share them."""
    device, key = next(G.parameters()).device, (trunc, *((id(p), p._version) for p in G.parameters()))
    known = G.__dict__.setdefault("standing", {})  # {key: all buffers}
    copied = copy.deepcopy(G, {id(kept): kept for kept in (known, *G.parameters())}).eval()
    if key not in known:
        for norm in (m for m in copied.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.train().reset_running_stats()
            norm.momentum = None  # the plain mean over batches
        generator = torch.Generator().manual_seed(0)
        for i in range(n_batches):
            z, y = sample_z(batch, G.z_dim, trunc, generator), choose_classes(G, batch, seed=i)
            copied(z.to(device), y.to(device))
        known[key] = {name: buffer.clone() for name, buffer in copied.eval().named_buffers()}
    copied.load_state_dict(known[key], strict=False)
    return copied


def to_float(images):
    """Maps 0..255 to [-1,1]."""
    return images.float() / 127.5 - 1


def to_uint8(x):
    """Maps [-1,1] to 0..255."""
    return ((x + 1) * 127.5).round().to(torch.uint8)


@torch.no_grad()
def render(G, z, y, trunc=None, batch=64):
    """Yields the samples of z[n,z_dim] and y[n] with the statistics for trunc: uint8 [<=batch,C,H,W] on the CPU."""
    G, device = with_standing_statistics(G, trunc), next(G.parameters()).device
    for some_z, some_y in zip(z.split(batch), y.split(batch)):
        yield to_uint8(G(some_z.to(device), some_y.to(device))).cpu()


def generate_batches(G, n, trunc=None, classes=None, seed=0):
    """Yields the samples that `generate` returns, in batches."""
    generator = torch.Generator().manual_seed(seed)
    z = [sample_z(1, G.z_dim, trunc, generator) for _ in range(n)]  # one by one, or else the last would depend on n
    return render(G, torch.cat(z), choose_classes(G, n, classes, seed), trunc)


def generate(G, n, trunc=None, classes=None, seed=0):
    """Draws n samples of G as uint8 [n,C,H,W]; sample i of a seed is the same for every n and device. G stays as it is.
    trunc: the bound of |z_i|, or None. classes: indices to go through in turn; None draws them evenly."""
    return torch.cat([*generate_batches(G, n, trunc, classes, seed)])


def sample_grid(G, trunc=None, columns=10, seed=0):
    """Draws a picture [3,H,W]: a row for each class, 50 at most, the same z down each column; or 8 rows of z."""
    rows = min(G.num_classes, 50) or 8
    z = sample_z(columns if G.num_classes else rows * columns, G.z_dim, trunc, torch.Generator().manual_seed(seed))
    y = torch.arange(rows).repeat_interleave(columns)
    return tile(torch.cat([*render(G, z.repeat(len(y) // len(z), 1), y, trunc)]), columns)


def interpolate(G, trunc=None, classes=None, rows=8, columns=10, seed=0):
    """Walks from one random z to another in each row, in a class, of `classes` in turn: uint8 [rows,columns,C,H,W]."""
    a, b = sample_z(2 * rows, G.z_dim, trunc, torch.Generator().manual_seed(seed)).chunk(2)  # [rows,z_dim] each
    y = choose_classes(G, rows, classes, seed).repeat_interleave(columns)
    return torch.cat([*render(G, arc(a, b, columns).flatten(0, 1), y, trunc)]).unflatten(0, (rows, columns))


def arc(a, b, n):
    """Walks from a[N,d] to b[N,d] in n points [N,n,d] on an arc; those on a line are shorter than any z G has seen."""
    t, angle = torch.linspace(0, 1, n)[:, None], torch.arccos(F.cosine_similarity(a, b).clamp(-1, 1))[:, None, None]
    return (torch.sin((1 - t) * angle) * a[:, None] + torch.sin(t * angle) * b[:, None]) / torch.sin(angle)


def tile(images, columns=10):
    """Arranges uint8 images [n,C,H,W] in one picture [3,H,W] with so many in a row."""
    return make_grid(images, nrow=columns, padding=2, pad_value=255)


# ---- Data
SIZES = (16, 32, 64, 128, 256, 512)  # what the networks can draw
GRAY = ("mnist", "fashion", "usps")  # one channel, and not to be mirrored: digits would change
TORCHVISION = {"mnist": "MNIST", "fashion": "FashionMNIST", "usps": "USPS", "cifar10": "CIFAR10"}
DATASETS = ("synthetic", *TORCHVISION)
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # for some others Pillow starts a program


def load_images(data, size, channels, data_dir="data"):
    """Loads a folder or a named data set: uint8 images [N,channels,size,size], int64 labels [N] and the class names.
    A folder is searched recursively; its sub-folders are the classes if every image lies in one. Images are cropped to
    their centre square, resized and kept in ~/.cache/gan.py. Files that are no images are skipped and named."""
    if data == "synthetic":
        return draw_flowers(size, channels)
    if data in TORCHVISION:
        with report_damage(data_dir, f"folder of {data}"):
            items, labels = zip(*getattr(torchvision.datasets, TORCHVISION[data])(data_dir, download=True))
            names = list(map(str, labels))
    else:
        items, names = open_folder(data)
    changing = lambda stat: (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)  # noqa: E731
    facts = [(os.fsencode(item), changing(item.stat())) if isinstance(item, Path) else item.tobytes() for item in items]
    cache = cache_folder() / f"{hashlib.sha256(repr((size, channels, facts)).encode()).hexdigest()[:32]}.pt"
    try:
        content = torch.load(cache, mmap=True, weights_only=True)
    except Exception:  # not there, or damaged
        content = decode(items, size, channels)
        with contextlib.suppress(OSError, RuntimeError), whole_file(cache) as file:  # a full disk costs time alone
            torch.save(content, file)
    if skipped := content["skipped"]:
        say(f"skipped {len(skipped)} of {len(items)} files: {', '.join(skipped[:10])}{', ...' * (len(skipped) > 10)}")
    if (most := content["images"].max()) < 64:
        say(f"the images are dark, from 0 to {most} of 255: 12-bit camera data in 16 bits, or numbers of classes?")
    names = [names[i] for i in content["kept"]]
    if None in names and any(names):
        say(f"no classes, since {items[content['kept'][names.index(None)]]} lies beside the sub-folders")
    classes = [] if None in names else sorted(set(names), key=natural)
    index = {name: i for i, name in enumerate(classes)}
    return content["images"], torch.tensor([index.get(name, 0) for name in names]), classes


def open_folder(folder):
    """Lists the files below a folder, and for each the name of its class: its first sub-folder, or None."""
    folder = Path(folder).expanduser().absolute()
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; --data takes a folder of images or one of {', '.join(DATASETS)}")
    files = list_files(folder)
    runs = {file.parent for file in files if file.name == "log.jsonl"}  # a run's own pictures are no data
    files = [file for file in files if not runs.intersection(file.parents)]
    return [folder / file for file in files], [file.parts[0] if len(file.parts) > 1 else None for file in files]


def decode(items, size, channels):
    """Decodes PIL images or files: {"images": uint8 [N,channels,size,size], "kept": N indices, "skipped": the rest}"""

    def crop_and_resize(item):
        try:
            image = read_image(item) if isinstance(item, Path) else pil_to_tensor(item)
        except ValueError as error:
            return f"{item} ({error})"
        image = resize(center_crop(image, min(image.shape[1:])), [size, size], antialias=True)
        image = rgb_to_grayscale(image.float()).round().to(torch.uint8) if channels < len(image) else image
        return image.expand(channels, -1, -1)

    with ThreadPoolExecutor() as threads:  # decoding and resizing release Python's lock
        results = list(threads.map(crop_and_resize, items))
    kept = [i for i, result in enumerate(results) if torch.is_tensor(result)]
    if not kept:
        raise UserError(f"no images among {len(items)} files; --data takes a folder of {', '.join(FORMATS)} images")
    skipped = [result for result in results if isinstance(result, str)]
    return {"images": torch.stack([results[i] for i in kept]), "kept": kept, "skipped": skipped}


def natural(name):
    """Makes a sort key that puts 9 before 10."""
    return [int(part) if part.isdecimal() else part.lower() for part in re.split(r"(\d+)", name)], name


def list_files(folder):
    """Lists the visible files below a folder, relative to it; follows links, but enters each real folder once."""
    files, entered, waiting = [], set(), [Path(folder)]
    while waiting:
        parent = waiting.pop(0)  # the nearest first, so that a link inside one class does not claim another's folder
        if parent.resolve() in entered:
            continue
        entered.add(parent.resolve())
        visible = [path for path in parent.iterdir() if not path.name.startswith(".")]
        waiting += sorted(path for path in visible if path.is_dir())
        files += [path.relative_to(folder) for path in visible if path.is_file()]
    return sorted(files, key=str)


def read_image(path):
    """Reads an image file: EXIF rotation applied, transparency on white, 16 bits scaled to 8: uint8 [1 or 3,H,W].
    Raises ValueError for bytes that are no such image; errors of the disk and of memory pass through."""
    data = io.BytesIO(Path(path).read_bytes())
    try:
        image = ImageOps.exif_transpose(Image.open(data, formats=FORMATS))
        if image.mode.startswith("F"):
            raise ValueError("floating-point pixels have no agreed range")
        if image.mode.startswith("I"):
            return torch.from_numpy((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))[None]
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return pil_to_tensor(image.convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise errors of many kinds
        raise ValueError(re.sub(" <.*", "", str(error)) or type(error).__name__)


def cache_folder():
    home = os.path.expanduser("~").replace("~", tempfile.gettempdir())  # some users have no home
    return Path(os.environ.get("XDG_CACHE_HOME") or f"{home}/.cache", "gan.py")


def batches(images, labels, config, device, start=0):
    """Yields (x[B,C,H,W] in [-1,1], y[B]) on the device, from batch number `start` on, without end; with config.cond,
    each sorted by class. The last, incomplete batch of an epoch is dropped; each process takes its share."""
    per_epoch, order = len(images) // config.batch, None
    if device.type != "cuda" or images.numel() < torch.cuda.mem_get_info(device)[0] / 2:
        images = images.to(device)
    labels = labels.to(images.device)
    for epoch, i in (divmod(k, per_epoch) for k in itertools.count(start)):
        if order is None or i == 0:
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)  # alone, so that runs can resume
            order = torch.randperm(len(images), generator=generator).to(images.device)
        index = order[i * config.batch : (i + 1) * config.batch]
        index = (index[labels[index].argsort(stable=True)] if config.cond else index).chunk(n_ranks())[rank()]
        x = to_float(images[index].to(device, non_blocking=True))
        if config.flip:
            draws = local_rows(lambda n: torch.rand(n, 1, 1, 1, device=device), len(x))
            x = torch.where(draws < 0.5, x.flip(3), x)
        yield x, labels[index].to(device, non_blocking=True)


# ---- Config: every hyper-parameter once; the flags of `train`, their help and config.json are made from it
def option(default, help, valid=None):
    """Declares a field of a config; valid is a tuple of choices, or a function of the value."""
    return field(default=default, metadata={"help": help, "valid": valid})


@dataclass
class Config:
    """Holds all hyper-parameters of a run. None stands for the default in parentheses, which `resolve` fills in."""

    positive, share = (lambda value: 0 < value < 1e9), (lambda value: 0 <= value < 1)
    policy = lambda value: value in ("auto", "none") or not set(value.split(",")) - set(AUGMENTATIONS)  # noqa: E731
    loss: str = option("ns", "adversarial loss", tuple(LOSSES))
    cond: bool = option(False, "condition on the class; needs data with classes")
    data: str = option("synthetic", f"a folder of images or of class folders, or one of {', '.join(DATASETS)}", bool)
    data_dir: str = option("data", "where the named data sets lie or are downloaded to")
    size: int | None = option(None, "height and width in pixels (64; synthetic 32)", SIZES)
    channels: int | None = option(None, "1 for gray, 3 for colour (1 for mnist, fashion and usps, else 3)", (1, 3))
    flip: bool | None = option(None, "mirror half of the images at random (on, but off for digits)")
    augment: str = option("auto", "auto (by loss and data), none, or some of color,translation,cutout", policy)
    width: int | None = option(None, "channels at full resolution (size / 2)", positive)
    max_width: int = option(512, "most channels of any layer", positive)
    z_dim: int = option(128, "length of the noise vector", positive)
    gain_scale: float = option(0.1, "first scale of the norms' gains without classes; 1: varied, or smears", positive)
    epochs: float | None = option(None, "passes over the data (150; synthetic 75)", positive)
    steps: int | None = option(None, "training steps, instead of epochs", positive)
    batch: int = option(64, "images a step, over all processes; at least 2; even if --cond", lambda n: 2 <= n < 1e9)
    lr_G: float = option(4e-4, "Adam's learning rate of the generator", positive)
    lr_D: float = option(4e-4, "Adam's learning rate of the discriminator", positive)
    beta1: float = option(0.0, "Adam's first beta, in [0, 1)", share)
    beta2: float = option(0.99, "Adam's second beta, in [0, 1)", share)
    d_steps: int = option(1, "discriminator updates a step", positive)
    g_steps: int = option(1, "generator updates a step", positive)
    ema_images: float = option(20_000, "half-life of the averaged weights in images", positive)
    seed: int = option(0, "seed of weights, noise and data order, under 2^32", lambda seed: 0 <= seed < 2**32)
    device: str = option("auto", "auto (cuda if there is one), cpu, cuda, cuda:1, ...")
    amp: str = option("auto", "autocast; auto: bf16 where it is fast, or fp16 on cuda", ("auto", "bf16", "fp16", "off"))
    compile: bool = option(False, "torch.compile the networks, which takes minutes before the first step")
    runs: str = option("runs", "folder that holds the runs")
    name: str | None = option(None, "name of the run's folder (a number and what it is)", lambda s: Path(s).name == s)
    log_every: int = option(20, "steps between two lines of log.jsonl", positive)
    sample_every: float = option(10, "epochs between two sample grids; a checkpoint goes with each", positive)
    save_minutes: float = option(5, "write the checkpoint at least this often", positive)
    tensorboard: bool = option(False, "write TensorBoard events too; needs the package tensorboard")


GAN.Config = Config  # here, since the class GAN stands above
# What may change when a run is resumed, and what may differ between the hosts that train it together.
RESUMABLE = "epochs steps lr_G lr_D amp compile log_every sample_every save_minutes tensorboard".split()
LOCAL = "data data_dir device runs name".split()


def resolve(config):
    """Copies config with the defaults that depend on the data filled in, and its values checked."""
    for f in fields(config):
        value, valid = getattr(config, f.name), f.metadata.get("valid")
        if value is not None and valid and not (valid(value) if callable(valid) else value in valid):
            raise UserError(f"{f.name} cannot be {value!r}: {f.metadata['help']}")
    data = config.data if config.data in DATASETS else str(Path(config.data).expanduser().absolute())
    size, epochs = (32, 75) if data == "synthetic" else (64, 150)
    filled = {"size": size, "epochs": epochs, "channels": 1 if data in GRAY else 3, "flip": data not in GRAY}
    filled |= {"width": (config.size or size) // 2}
    return replace(config, data=data, **{k: v for k, v in filled.items() if getattr(config, k) is None})


# ---- Runs: a folder with config.json, checkpoint.pt, log.jsonl and samples/
@contextlib.contextmanager
def whole_file(path):
    """Opens a file to write that appears under its name when it is whole and on the disk."""
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
        if isinstance(error, OSError):
            error.filename = str(path)  # a full disk does not say which file
        raise


def write_picture(path, *pictures):
    """Writes a picture uint8 [3,H,W], or a film of several, in the format that the path ends in."""
    first, *others = map(to_pil_image, pictures)
    film = {"save_all": True, "append_images": others, "duration": 80, "loop": 0} if others else {}  # ms a picture
    with whole_file(path) as file:
        first.save(file, Path(path).suffix[1:], **film)


@contextlib.contextmanager
def report_damage(path, what):
    """Reports a failure to make sense of a file in one sentence; readers of damaged files raise errors of all kinds."""
    try:
        yield
    except (UserError, ImportError, MemoryError):
        raise
    except Exception as error:
        raise UserError(f"{path} is damaged or no {what}: {type(error).__name__}: {str(error).partition('. ')[0]:.150}")


def read_checkpoint(path, model=GAN):
    """Reads a run's or file's checkpoint: "config" (a Config), "classes", "images", "steps", each part's state_dict."""
    path = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    data = path.read_bytes()
    with report_damage(path, "checkpoint of gan.py"):
        if flipped := zipfile.ZipFile(io.BytesIO(data)).testzip():
            raise ValueError(f"{flipped} fails its checksum")
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if unknown := content["config"].keys() - {f.name for f in fields(model.Config)}:
            raise UserError(f"{path} needs the program that trained it: {model.__name__} has no {', '.join(unknown)}")
        content["config"] = resolve(model.Config(**content["config"]))
        steps, classes = content["steps"], content["classes"]
        if type(steps) is not int or steps < 0 or not all(Path(name).name == name != ".." for name in classes):
            raise ValueError("steps or classes have impossible values")
    return content


def load_generator(run, device="cpu", trunc=None, model=GAN):
    """Loads a run's (averaged G in eval mode, with the statistics for trunc, G.classes and G.steps; Config)."""
    content = read_checkpoint(run, model)
    with report_damage(run, "checkpoint of this version of gan.py"):
        G, _ = model.networks(content["config"], len(content["classes"]))
        G.requires_grad_(False).load_state_dict(content["G_ema"])
    G.classes, G.steps = content["classes"], content["steps"]
    return with_standing_statistics(G.to(device, memory_format=torch.channels_last), trunc), content["config"]


def find_run(name, runs="runs"):
    """Finds a run by its path, its name or a unique start of that; None stands for the newest in the folder runs."""
    if name and Path(name).exists():
        return Path(name)
    found = [path.parent for path in Path(runs).glob("*/checkpoint.pt") if path.parent.name.startswith(name or "")]
    found.sort(key=lambda run: (run.name == name, (run / "checkpoint.pt").stat().st_mtime))
    if not found or name == "" or (name and len(found) > 1 and found[-1].name != name):
        raise UserError(f"{len(found) or 'no'} runs{f' {name!r}' * (name is not None)} in {runs}: name one; see --runs")
    return found[-1]


# ---- Training
def train(config, resume=None, model=GAN, new_images=False):
    """Trains a GAN and returns its run's folder, a Path. Ctrl-C, SIGTERM and a closed terminal end the step and save.
    resume: a run's folder, to go on from its checkpoint until config.epochs or config.steps; on a CPU the outcome is
    that of a run without the break, bit for bit. new_images: whether the images may differ from those it began with."""
    # Load the images.
    device, config = join(config.device), resolve(config)
    images, labels, classes = load_images(config.data, config.size, config.channels, config.data_dir)
    if len(images) < config.batch:
        raise UserError(f"--batch {config.batch} is more than the {len(images)} images of {config.data}")
    if config.batch % (parts := n_ranks() * (1 + config.cond)):
        raise UserError(f"--batch must be a multiple of {parts}, {'twice ' * config.cond}the number of processes")
    if config.cond and len(classes) < 2:
        raise UserError(f"--cond needs two sub-folders, without images beside them; {config.data} has {len(classes)}")
    if config.augment == "auto":  # rpgan with classes learns better without color: see bench/README.md
        strength = sum(len(images) < n for n in (50_000, 20_000, 5_000 * (config.loss != "rpgan" or not config.cond)))
        config = replace(config, augment=("none", "cutout", "translation,cutout", "color,translation,cutout")[strength])

    # Build or restore the GAN.
    gan = model(config, len(classes) if config.cond else 0, device)
    gan.classes, gan.images = classes if config.cond else [], hashlib.sha256(images.numpy()).hexdigest()
    if resume:
        gan.load(resume, new_images)
    if n_ranks() > 1:
        facts = [None] * n_ranks()
        dist.all_gather_object(facts, repr((replace(config, **dict.fromkeys(LOCAL)), gan.images, gan.steps)))
        if len(set(facts)) > 1:
            raise UserError("the processes differ; all hosts need the same flags, images and checkpoint")
    per_epoch = len(images) // config.batch / config.d_steps  # steps
    steps = config.steps or max(1, round(config.epochs * per_epoch))
    sample_every = max(1, round(config.sample_every * per_epoch))

    # Open the run.
    run, writer, _lock = open_run(config, resume and Path(resume), gan.steps) if rank() == 0 else [None] * 3
    G, D = (sum(p.numel() for p in net.parameters()) / 1e6 for net in (gan.G, gan.D))
    say(f"{run}: {len(images)} images, {len(classes)} classes{': ' * bool(classes)}{', '.join(classes[:20])}")
    say(f"steps {gan.steps} to {steps} on {n_ranks()} x {device}, {gan.dtype}, G {G:.2f} M, D {D:.2f} M parameters")
    if resume and rank() == 0 and (gan.steps >= steps or gan.steps % sample_every == 0):
        draw_progress(gan, run, writer)  # a killed run may not have come to it
    if gan.steps >= steps:
        raise UserError(f"{run} has trained its {gan.steps} steps; --steps or --epochs can ask for more")
    if rank() == 0:  # a picture of the images as D sees them, which shows most faults of data at once
        x, _ = next(batches(images, labels, replace(config, cond=False), torch.device("cpu")))
        write_picture(run / "real.png", tile(to_uint8(diff_augment(x[:80], config.augment).clamp(-1, 1))))
    data = batches(images, labels, config, device, start=gan.steps * config.d_steps)
    history, first, began, saved, stopped = [], gan.steps, time.monotonic(), time.monotonic(), False
    with stop_on_signal() as stop:
        while gan.steps < steps and not stopped:
            history.append(gan.train_step(data))
            flags = torch.tensor([len(stop) > 0, time.monotonic() - saved > 60 * config.save_minutes]).float()
            average_over_ranks([flags])  # what one process asks for, all do
            stopped, late = flags.bool().tolist()
            sample = stopped or gan.steps == steps or gan.steps % sample_every == 0
            if not (sample or late) and gan.steps % config.log_every:
                continue

            # Check the losses.
            losses, history = torch.stack(history), []  # [steps,4]
            average_over_ranks([losses])
            if not losses.isfinite().all():  # the only point where the CPU waits for the GPU
                raise UserError(f"the losses are not finite by step {gan.steps}: try lower --lr-G, --lr-D or --amp off")
            if rank() > 0:
                continue  # the first process writes

            # Log their means.
            means = dict(zip(("loss_D", "loss_G", "real_logit", "fake_logit"), losses.mean(dim=0).tolist()))
            rate = (gan.steps - first) / (time.monotonic() - began)  # steps a second since this call began
            record = {"step": gan.steps, "epoch": gan.steps / per_epoch, "images_per_s": rate * config.batch, **means}
            with open(run / "log.jsonl", "a") as log:
                log.write(json.dumps(record) + "\n")
            for name in record if writer else ():
                writer.add_scalar(name, record[name], gan.steps)
            left = str(timedelta(seconds=round((steps - gan.steps) / rate)))
            shown = "  ".join(f"{name} {mean:.3f}" for name, mean in means.items())
            say(f"step {gan.steps}/{steps}  {record['images_per_s']:.0f} images/s  {left} left  {shown}")

            # Save and draw.
            if sample or late:  # before the picture, which takes a while
                gan.save(run / "checkpoint.pt")
                saved = time.monotonic()
            if sample:
                draw_progress(gan, run, writer)
    say(f"{'stopped' if gan.steps < steps else 'done'} at step {gan.steps}: see {run}")
    return run


def open_run(config, run, steps):
    """Opens a run's folder, writes its config and trims its log; returns it, TensorBoard's writer and a lock."""
    if config.tensorboard:
        from torch.utils.tensorboard import SummaryWriter
    runs, data = Path(config.runs), re.sub(r"[^A-Za-z0-9._-]+", "-", Path(config.data).name)[:50]
    while run is None:
        runs.mkdir(parents=True, exist_ok=True)
        number = max([-1, *(int(path.name[:4]) for path in runs.glob("[0-9][0-9][0-9][0-9]-*"))]) + 1
        path = runs / (config.name or f"{number:04d}-{config.loss}{'-cond' * config.cond}-{data}-{config.size}")
        if (path / "checkpoint.pt").exists():
            raise UserError(f"{path} exists: choose another --name, or --resume it")
        with contextlib.suppress(FileExistsError):  # another process was faster
            path.mkdir(exist_ok=bool(config.name))  # a run that was killed before its first checkpoint leaves its name
            run = path
    lock = open(run / ".lock", "a")
    with contextlib.suppress(AttributeError, OSError):  # a system or a disk without locks
        try:
            os.lockf(lock.fileno(), os.F_TLOCK, 0)
        except (BlockingIOError, PermissionError):
            raise UserError(f"{run} is being trained by another process")
    log = (run / "log.jsonl").read_text().splitlines() if (run / "log.jsonl").exists() else []
    log = [line + "\n" for line in log if line.endswith("}") and json.loads(line)["step"] <= steps]  # not half a line
    for name, text in (("config.json", json.dumps(asdict(config), indent=2)), ("log.jsonl", "".join(log))):
        with whole_file(run / name) as file:
            file.write(text.encode())
    return run, SummaryWriter(run) if config.tensorboard else None, lock


def draw_progress(gan, run, writer=None):
    """Draws the grid of this step and, if matplotlib is there, the curves of both losses and of D's mean logits."""
    picture = sample_grid(gan.G_ema)
    write_picture(run / "samples" / f"{gan.steps:07d}.png", picture)
    if writer:
        writer.add_image("samples", picture, gan.steps)
    with contextlib.suppress(ImportError):
        from matplotlib.figure import Figure

        log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        axes = Figure(figsize=(8, 6), layout="constrained").subplots(2, sharex=True)
        for name in ("loss_D", "loss_G", "real_logit", "fake_logit"):
            axes[int("logit" in name)].plot([r["step"] for r in log], [r[name] for r in log], label=name)
        axes[0].legend(), axes[1].legend()
        with whole_file(run / "curves.png") as file:
            axes[0].figure.savefig(file)


def say(line, file=None):
    """Prints a line from the first process, errors from each host's; escapes a newline and what is no text."""
    with contextlib.suppress(OSError, ValueError):  # a reader that has gone away is no reason to stop
        if (os.environ.get("LOCAL_RANK", "0") == "0") if file else (rank() == 0):
            print("".join(c if c.isprintable() else repr(c)[1:-1] for c in line), file=file, flush=True)


@contextlib.contextmanager
def stop_on_signal():
    """Yields a list that Ctrl-C, SIGTERM and SIGHUP fill; a second one interrupts at once."""
    stop, in_main_thread = [], threading.current_thread() is threading.main_thread()
    handler = lambda *args: signal.default_int_handler(*args) if stop else stop.append(True)  # noqa: E731
    numbers = {getattr(signal, name, signal.SIGINT) for name in ("SIGINT", "SIGTERM", "SIGHUP")}
    before = {number: signal.signal(number, handler) for number in numbers if in_main_thread}
    try:
        yield stop
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def pick_dtype(amp, device):
    """Returns the dtype to autocast to; float32 stands for none."""
    if amp == "fp16" and device.type != "cuda":
        raise UserError("--amp fp16 needs a CUDA device; bf16 works on the CPU too")
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    if amp == "auto" and device.type == "cpu":
        known = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.6 does not tell
        amp = "bf16" if known.get("avx512_bf16") or known.get("amx_bf16") else "off"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp, torch.float32)


# ---- Several processes, started by torchrun: each draws the noise of the whole batch and takes its rows of everything
def n_ranks():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    return dist.get_rank() if n_ranks() > 1 else 0


def join(name):
    """Returns the torch.device of a name; under torchrun, joins the other processes, by nccl on GPUs, else by gloo."""
    launched = dist.is_available() and dist.is_torchelastic_launched()
    name = name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if launched and name == "cuda" else name)
        torch.zeros(1, device=device).item()
    except Exception as error:  # of many kinds, by what torch was built with
        raise UserError(f"no device {name!r} here: {str(error)[:100]}")
    if launched and device.type == "cuda":
        torch.cuda.set_device(device)
    if launched and not dist.is_initialized():  # hours, since the others wait while one decodes the images
        dist.init_process_group("cpu:gloo,cuda:nccl" if name == "cuda" else "gloo", timeout=timedelta(hours=6))
    return device


def local_rows(draw, n):
    """Takes this process's n rows of draw(m), where m counts the rows of all processes."""
    return draw(n * n_ranks())[rank() * n : (rank() + 1) * n]


@torch.no_grad()
def average_over_ranks(tensors):
    """Replaces each tensor by its mean over the processes, by one flat all-reduce."""
    if n_ranks() > 1:
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        for t, total in zip(tensors, flat.split([t.numel() for t in tensors])):
            t.copy_(total.view(t.shape) / n_ranks())


class SyncedBatchNorm(nn.BatchNorm2d):
    """An nn.BatchNorm2d over the batches of all processes, all of one size; nn.SyncBatchNorm is for CUDA alone."""

    def forward(self, h):
        if not self.training:
            return super().forward(h)
        var, mean = torch.var_mean(h.to(torch.promote_types(h.dtype, torch.float32)), dim=(0, 2, 3), correction=0)
        whole = all_reduce(mean) / n_ranks()  # [C]; differentiable
        var = all_reduce(var + (mean - whole) ** 2) / n_ranks()
        n = n_ranks() * h.numel() / h.shape[1]
        self.running_mean.lerp_(whole.detach(), self.momentum)
        self.running_var.lerp_(var.detach() * n / (n - 1), self.momentum)
        out = (h - whole[:, None, None]) * (var + self.eps).rsqrt()[:, None, None]
        return (out * self.weight[:, None, None] + self.bias[:, None, None] if self.affine else out).to(h.dtype)


# ---- Evaluation
def evaluate(run, truncs=(None,), n=None, extractor="inception", device="auto", seed=0, data=None, model=GAN):
    """Scores the averaged generator of a run at each trunc, with a grid; returns {"scores": a row for each trunc} and
    adds these to eval.json. n: samples, by default as many as training images, of the same classes. extractor: see
    metrics.load_extractor; without Inception's weights, SWD alone is measured. data: where the images lie now."""
    import metrics

    device = join(device)
    G, config = load_generator(run, device, model=model)
    images, labels, names = load_images(data or config.data, config.size, config.channels, config.data_dir)
    classes, notes, new = None, [], []
    if G.num_classes and names:
        if unknown := [name for name in names if name not in G.classes]:
            raise UserError(f"the run has no class {', '.join(unknown[:3])}; the images must be of its own classes")
        classes = torch.tensor([G.classes.index(name) for name in names])[labels]
        classes = classes[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))].tolist()
    elif G.num_classes:
        notes = ["these images have no classes: the samples are drawn evenly from all classes of the run"]
    file = (Path(run) if Path(run).is_dir() else Path(run).parent) / "eval.json"
    earlier = lambda: [dict(row) for row in json.loads(file.read_text())["scores"]] if file.exists() else []  # noqa: E731
    with report_damage(file, "file of scores (move it away)"):
        earlier()
    for trunc in truncs:  # first, so that an unwritable disk shows before the long work
        write_picture(file.with_name(f"eval-trunc-{trunc}.png".lower()), sample_grid(G, trunc, seed=seed))
    try:
        network = metrics.load_extractor(extractor, device)
        real = metrics.measure_cached(network, images, cache_folder(), metrics.Progress(f"{network.name}, images"))
    except metrics.WeightsMissing as error:
        network, notes = None, [*notes, str(error)]
    facts = {"n": n or len(images), "steps": G.steps, "seed": seed, "data": data or config.data, "n_real": len(images)}
    facts |= network.made_by if network else {"network": None}
    for trunc in truncs:
        samples, row = generate_batches(G, facts["n"], trunc, classes, seed), {"trunc": trunc} | facts
        if network:
            fake = metrics.measure(network, samples, progress=metrics.Progress(f"{network.name}, samples"))
            scores, row["notes"] = metrics.compare(real, fake), notes + metrics.notes(real, fake)
        else:
            some = torch.cat(list(itertools.islice(samples, 128)))
            scores, row["notes"] = {"SWD": metrics.sliced_wasserstein(images, some)}, notes
        shown = [f"{name} {value:.3f}" for name, value in scores.items()] + ["FID -  IS -"] * (network is None)
        say("  ".join([f"trunc {trunc or 'none'}  n {facts['n']}", *shown]))
        new.append(row | scores)
        kept = [other for other in earlier() if any(other.get(key) != row[key] for key in ("trunc", *facts))]
        with whole_file(file) as out:
            out.write(f"{json.dumps({'scores': [*kept, new[-1]]}, indent=2)}\n".encode())
    for note in new[-1]["notes"]:
        say(note, sys.stderr)
    return {"scores": new}


# ---- Commands
def train_command(args, model):
    # Keep freed memory in this process, on Linux: handing pages back and forth costs a tenth of a step on the CPU.
    with contextlib.suppress(OSError, AttributeError):  # another system, or a C library other than GNU's
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0), mallopt(-1, 2**31 - 1)  # M_MMAP_MAX: no mapping for a large block; M_TRIM_THRESHOLD: keep all
    given = {f.name: getattr(args, f.name) for f in fields(model.Config) if hasattr(args, f.name)}
    if args.resume is None:
        return train(model.Config(**given), model=model)
    run = find_run(args.resume, given.get("runs", "runs"))
    run = run.parent if run.is_file() else run
    given = {"steps": None} | given if "epochs" in given else given
    train(replace(read_checkpoint(run, model)["config"], **given), run, model, new_images="data" in given)


def eval_command(args, model):
    run = find_run(args.run, args.runs)
    evaluate(run, args.trunc, args.n, args.extractor, args.device, args.seed, args.data, model)


def sample_command(args, model):
    out, films = Path(args.out), [".gif", ".webp"]
    if out.suffix not in ([".png", *films] if args.interpolate else [".png", ".npz"] + [""] * (not out.exists())):
        raise UserError(f"--out {out}: give a .png, an .npz or a new folder; with --interpolate a .png, .gif or .webp")
    G, _ = load_generator(find_run(args.run, args.runs), join(args.device), args.trunc, model)
    classes = [G.classes.index(c) if c in G.classes else c for c in map(str.strip, args.classes)]
    if args.interpolate:
        walks = interpolate(G, args.trunc, classes or None, columns=32 if out.suffix in films else 10, seed=args.seed)
        there = [tile(at_once, 4) for at_once in walks.unbind(1)]  # and back
        write_picture(out, *(there + there[-2:0:-1] if out.suffix in films else [tile(walks.flatten(0, 1))]))
        return say(f"wrote {out}")
    classes = classes or list(range(min(G.num_classes, 50 if out.suffix == ".png" and not args.n else G.num_classes)))
    n = args.n or 10 * len(classes) or 80
    labels = choose_classes(G, n, [classes[i * len(classes) // n] for i in range(n)]).tolist() if classes else None
    images = generate(G, n, args.trunc, labels, args.seed)
    if out.suffix == ".png":
        write_picture(out, tile(images))
    elif out.suffix == ".npz":
        with whole_file(out) as file:  # uint8 [n,H,W,C], int64 [n]
            np.savez(file, images=images.permute(0, 2, 3, 1), **({"labels": np.array(labels)} if classes else {}))
    for i, image in enumerate(images if out.suffix == "" else ()):
        write_picture(out / (G.classes[labels[i]] if classes else "") / f"{i:05d}.png", image)
    say(f"wrote {n} samples to {out}")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, say(f"{self.prog.split()[0]}: error: {message} (--help lists the flags)", sys.stderr))


def whole_number(text, low=0, high=2**32 - 1):
    if not (text.isdecimal() and low <= int(text) <= high):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from {low} to {high}")
    return int(text)


def truncation(text):
    return None if text == "none" else float(text)


def make_parser(model):
    parser = Parser(prog=Path(sys.argv[0]).name, description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", metavar="train | eval | sample", required=True)
    p = commands.add_parser("train", help="train on a folder of images or a named data set", allow_abbrev=False)
    p.add_argument("--resume", metavar="RUN", help="go on with a run")
    for f in fields(model.Config):  # absent unless given, so that --resume can tell what was asked for
        kind = (get_args(f.type) or (f.type,))[0]  # int | None -> int
        choices = f.metadata["valid"] if isinstance(f.metadata["valid"], tuple) else None
        kwargs = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind, "choices": choices}
        help = f.metadata["help"] + ("" if f.default is None else f" ({f.default})")
        p.add_argument(f"--{f.name.replace('_', '-')}", dest=f.name, default=argparse.SUPPRESS, help=help, **kwargs)
    common = Parser(add_help=False)
    common.add_argument("--run", help="run, by name or path, or checkpoint file (the newest run)")
    common.add_argument("--runs", default="runs", help="folder that holds the runs (runs)")
    common.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (auto)")
    common.add_argument("--seed", type=whole_number, default=0, help="seed of the noise (0)")
    p = commands.add_parser("eval", help="score a run", parents=[common], allow_abbrev=False)
    p.add_argument("--n", type=lambda n: whole_number(n, 2, 10**7), help="samples (as many as images)")
    p.add_argument("--trunc", type=truncation, nargs="+", default=[None], help="bounds of |z|, or none (none)")
    p.add_argument("--data", help="where the training images lie now (where they lay at training)")
    p.add_argument("--extractor", default="inception", help="inception, a weights file or a .pt2 program (inception)")
    p = commands.add_parser("sample", help="write samples of a run", parents=[common], allow_abbrev=False)
    p.add_argument("--n", type=lambda n: whole_number(n, 1, 10**7), help="samples (10 a class; without classes 80)")
    p.add_argument("--trunc", type=truncation, help="bound of |z| (none)")
    p.add_argument("--classes", type=lambda text: text.split(","), default=[], help="names or numbers, as in 3,5 (all)")
    p.add_argument("--interpolate", action="store_true", help="rows that walk between random pairs of z")
    p.add_argument("--out", default="samples.png", help=".png, .npz or a new folder; a film: .gif, .webp (samples.png)")
    return parser


def main(argv=None, model=GAN):
    """Runs a command line. Bad input ends with one line and status 2, Ctrl-C with 130."""
    args, status, message = make_parser(model).parse_args(argv), 0, ""
    try:
        {"train": train_command, "eval": eval_command, "sample": sample_command}[args.command](args, model)
    except KeyboardInterrupt:
        status, message = 130, "interrupted"
    except (ValueError, OSError, ImportError, RuntimeError, MemoryError) as error:
        status, message = 2, str(error).replace("\n", " ")
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in message:
            message = "out of memory; try a smaller --batch, --width, --size or --n"
        elif not isinstance(error, (OSError, ImportError)) and type(error).__name__ != "UserError":  # ours or metrics'
            raise
    if message:
        say(f"{Path(sys.argv[0]).name}: error: {message}", sys.stderr)
    if n_ranks() > 1:  # gloo can hang where it is taken down (torch 2.6) and abort where it is not (2.15)
        os._exit(status)
    if status:
        sys.exit(status)


# ---- Appendix: flowers drawn by code, so that `python gan.py train` needs no data
def draw_flowers(size, channels, per_class=80, classes=17):
    """Returns what load_images does, of flowers: petals, colours and ground differ by class, place and shade within."""
    images = torch.cat([draw_class(c, per_class, size) for c in range(classes)])
    images = rgb_to_grayscale(images.float()).round().to(torch.uint8) if channels == 1 else images
    return images, torch.arange(classes).repeat_interleave(per_class), [f"flower {c}" for c in range(classes)]


def draw_class(c, n, size):
    """Draws n flowers of class c, uint8 [n,3,size,size]. Coordinates run from -1 to 1, y downwards."""
    rng = np.random.default_rng([17, c])
    grid = np.linspace(-1 + 1 / size, 1 - 1 / size, size, dtype=np.float32)
    x, y = (plane[None] for plane in np.meshgrid(grid, grid))  # [1,H,W] each
    vary = lambda low, high: rng.uniform(low, high, (n, 1, 1)).astype(np.float32)  # noqa: E731

    def rgb(hue, saturation, value):  # [n,1,1] each -> [n,1,1,3]
        k = (6 * hue[..., None] + np.array([5, 3, 1], np.float32)) % 6
        return value[..., None] * (1 - saturation * np.clip(np.minimum(k, 4 - k), 0, 1))

    def paint(colour, light, inside):  # inside: signed distance to the edge, one pixel of which is blended
        mask = np.clip(inside * size / 2 + 0.5, 0, 1)[..., None]
        canvas[:] += (colour * light[..., None] - canvas) * mask

    # What makes the class and, from cx on, what varies within. Hues go from blue over red to yellow, never leaf green.
    petals, hue = (5, 6, 4, 8, 3)[c % 5], (0.52 + 0.66 * (c * 0.618 % 1)) % 1
    vivid, bright = ((0.9, 1.0), (0.4, 1.0), (0.85, 0.7))[c // 2 % 3]
    petal_width, heart, pointed = (1.1, 0.9, 1.3)[c % 3] * 2.2 / petals, (0.2, 0.3, 0.15, 0.25)[c % 4], c % 2
    ground = ((0.58, 0.4, 0.9), (0.3, 0.6, 0.4), (0.12, 0.25, 0.95), (0.7, 0.3, 0.2))[c % 4]  # hue, saturation, value
    cx, cy, radius, turn = vary(-0.1, 0.1), vary(-0.2, 0.0), vary(0.65, 0.85), vary(-0.2, 0.2) - np.pi / 2
    bend, shade = vary(-0.2, 0.2), vary(0.8, 1.1)
    petal_colour = rgb(hue + vary(-0.025, 0.025), vivid, bright * shade)
    canvas = rgb(ground[0] + vary(-0.03, 0.03), ground[1], ground[2] * vary(0.85, 1.05)) * (1 - 0.2 * y[..., None])
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
    low, saturation, bright = (0.12, 0.85, 0.9) if c % 3 else (0.06, 0.8, 0.35)
    heart_colour = rgb(vary(low, low + 0.02), saturation, vary(bright, bright + 0.1))
    paint(heart_colour, 1 - 0.3 * from_heart / heart, (heart - from_heart) * radius)
    return torch.from_numpy((np.clip(canvas, 0, 1) * 255).round().astype(np.uint8)).permute(0, 3, 1, 2).contiguous()


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
