# SPDX-License-Identifier: MIT
"""Scores of generated images: FID, Inception Score, KID, precision and recall, density and coverage, SWD.

    python metrics.py REAL FAKE                            # two folders of images, or .npz or .npy of uint8 images
    python metrics.py REAL --out real.npz                  # REAL's statistics, which stand for it in later calls
    python metrics.py REAL FAKE --extractor net.pt2 --metrics fid,is,kid,prdc,swd --json

Each score is reported with its network, weights, resize mode, dtype and numbers of images. A Frechet distance is called
FID only if the features come from Inception v3 with published weights.
"""

import os
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C during the slow imports; main takes over

import argparse
import contextlib
import hashlib
import io
import itertools
import json
import logging
import math
import re
import secrets
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torch.export.passes import move_to_device_pass
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models import Inception_V3_Weights, inception_v3
from torchvision.models.inception import BasicConv2d
from torchvision.transforms.functional import pil_to_tensor

INCEPTION = {  # the first digits of the SHA-256 of published Inception v3 weights
    "0cc3c7bd": "Inception v3 (torchvision)",
    "6726825d": "Inception v3 (TensorFlow)",  # of the original FID, as pytorch-fid and torch-fidelity distribute them
}
RESIZES = ("bilinear", "clean", "tf1")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SCORES = ("fid", "is", "kid", "prdc", "swd")
NEIGHBOUR = 5  # its distance is the radius of a ball in precision and recall


class UserError(ValueError):
    """A request that cannot be carried out; the message says what to do instead."""


class WeightsMissing(UserError):
    """Inception's weights are not on the disk and cannot be downloaded."""


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def frechet_distance(a, b):
    """Frechet distance of two normal distributions (FID for Inception's features; arXiv 1706.08500), a float >= 0.

    a, b: FeatureStats, or features [n,d], n >= 2. |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)), in float64.
    """
    # With A = X^T X and B = Y^T Y, tr (A B)^(1/2) is the sum of the singular values of X Y^T: real, and exact for
    # singular A and B. Eigenvalues of A B, of X B X^T or of a Gram matrix are the squares of those values. They are
    # faster (0.24 s against 0.85 s at d = 2048), but rounding hides all values below 1e-8 of the largest.
    a, b = (x if isinstance(x, FeatureStats) else FeatureStats(rows(x).shape[1]).update(x) for x in (a, b))
    check_comparable(a, b)
    X, Y = a.factor, b.factor
    spread = X.square().sum() + Y.square().sum()
    distance = spread - 2 * torch.linalg.svdvals(X @ Y.T).sum()
    if distance < 1e-5 * spread:
        # The difference loses digits if A and B nearly agree. It equals a sum of squares: the least |Q X - Y|^2 over
        # all orthogonal Q.
        X, Y = (F.pad(z, (0, 0, 0, max(len(X), len(Y)) - len(z))) for z in (X, Y))
        U, _, Vh = torch.linalg.svd(X @ Y.T)
        distance = (U.T @ X - Vh @ Y).square().sum()
    return (distance + (a.mean - b.mean).square().sum()).item()


def inception_score(logits, splits=10, seed=0):
    """exp of the mean KL(p(y|x) || p(y)) (arXiv 1606.03498) -> (mean, standard deviation) over the splits, mean >= 1.

    logits [n,k], assigned to the splits at random by the seed; each is a split of its own if there are fewer.
    """
    logits = rows(logits)
    return PredictionStats(logits.shape[1], splits, seed).update(logits).score()


def kernel_distance(x, y, block=512):
    """Unbiased squared MMD of features x[n,d], y[m,d] under (x.y / d + 1)^3 (KID; arXiv 1801.01401), a float.

    Takes all pairs, so nothing is random; may be slightly negative. n, m >= 2.
    """
    x, y = same_width(x, y)

    def kernel_sum(a, b):
        return sum((part @ b.T / a.shape[1] + 1).pow(3).sum() for part in a.split(block))

    def within(a):  # all pairs but those of a sample with itself
        diagonal = (a.square().sum(dim=1) / a.shape[1] + 1).pow(3).sum()
        return (kernel_sum(a, a) - diagonal) / (len(a) * (len(a) - 1))

    return (within(x) + within(y) - 2 * kernel_sum(x, y) / (len(x) * len(y))).item()


def precision_recall(real, fake, k=NEIGHBOUR, block=512):
    """Improved precision and recall (arXiv 1904.06991), density and coverage (2002.09797) of features [n,d], [m,d].

    Each sample's ball reaches to its k-th neighbour, 1 <= k < n, m. As in the published code, precision and recall
    count samples on its surface, density and coverage do not. Returns {"precision", "recall", "density", "coverage"};
    all but density lie in [0,1].
    """
    real, fake = same_width(real, fake)
    if not 1 <= k < min(len(real), len(fake)):
        raise UserError(f"k must be from 1 to {min(len(real), len(fake)) - 1}, not {k}")
    center = real.mean(dim=0)
    real, fake = real - center, fake - center  # near zero the products below keep their digits

    def distances(a, b):  # squared, [n,m]; rounding leaves a trace between equal points, which is set to 0
        scale = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)
        d = scale - 2 * a @ b.T
        return torch.where(d > 1e-12 * scale, d, 0)

    def radii(x):  # squared, [n]; each point is its own nearest neighbour, so k + 1
        return torch.cat([distances(part, x).kthvalue(k + 1, dim=1).values for part in x.split(block)])

    closed, opened = 1 + 1e-9, 1 - 1e-9  # a copy of the k-th neighbour lies on the surface, whatever its rounding
    real_radii, fake_radii = radii(real), radii(fake)
    precise, balls = torch.zeros(len(fake), dtype=torch.bool), torch.zeros(len(fake), dtype=torch.int64)
    recalled, covered = [], []
    for part, radius in zip(real.split(block), real_radii.split(block)):
        distance, radius = distances(part, fake), radius[:, None]  # [block,m], [block,1]
        inside = distance < radius * opened
        precise |= (distance <= radius * closed).any(dim=0)
        balls += inside.sum(dim=0)  # the number of open balls that each fake lies in
        covered.append(inside.any(dim=1))
        recalled.append((distance <= fake_radii * closed).any(dim=1))
    means = [x.double().mean().item() for x in (precise, torch.cat(recalled), balls, torch.cat(covered))]
    return {"precision": means[0], "recall": means[1], "density": means[2] / k, "coverage": means[3]}


def sliced_wasserstein(real, fake, seed=0):
    """Sliced Wasserstein distance of image patches (arXiv 1710.10196), times 1000, a float; no network is needed.

    real, fake: uint8 images [n,C,H,W], [m,C,H,W], tensors, arrays or Folders, of one size from 16 pixels. Takes 7 x 7
    patches of each level of the Laplacian pyramid down to 16 pixels, 128 of an image but about 2^17 in all at most,
    normalises them by channel and compares them along 512 random directions. Returns the mean over the levels.
    """
    real, fake = (laplacian_patches(images, torch.Generator().manual_seed(seed)) for images in (real, fake))
    if real.keys() != fake.keys() or not real:
        raise UserError("SWD needs images of one size and kind on both sides")
    generator = torch.Generator().manual_seed(seed)
    return float(np.mean([slice_distance(real[level], fake[level], generator) for level in real]))


def laplacian_patches(images, generator, size=7, per_image=128, most=2**17):
    """{(C, H, W) of a level: patches [P,C,size,size]} from random places in images [n,C,H,W]."""
    per_image, levels, shape = max(1, min(per_image, most // max(1, len(images)))), {}, None
    for batch in batches(images, 64):
        if shape not in (None, batch.shape[1:]) or min(batch.shape[2:]) < 16:
            raise UserError("SWD needs images of one size, at least 16 x 16")
        shape = batch.shape[1:]
        for level in laplacian_pyramid(batch.cpu().float()):
            windows = level.unfold(2, size, 1).unfold(3, size, 1)  # a view [n,C,H-6,W-6,size,size]
            i = torch.arange(len(batch)).repeat_interleave(per_image)
            y, x = (torch.randint(side, i.shape, generator=generator) for side in windows.shape[2:4])
            levels.setdefault(level.shape[1:], []).append(windows[i, :, y, x])
    return {shape: torch.cat(parts) for shape, parts in levels.items()}


def laplacian_pyramid(x):
    """x [n,C,H,W] as bands, finest first: what each halving down to 16 pixels loses, then the rest."""
    kernel = torch.tensor([1.0, 4, 6, 4, 1]) / 16
    kernel = torch.outer(kernel, kernel).expand(x.shape[1], 1, 5, 5)

    def blur(x):
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, groups=x.shape[1])

    bands = []
    while min(x.shape[2:]) >= 32:
        small = blur(x)[:, :, ::2, ::2]
        large = torch.zeros_like(x)
        large[:, :, ::2, ::2] = 4 * small
        bands.append(x - blur(large))
        x = small
    return bands + [x]


def slice_distance(a, b, generator, directions=512, at_once=128):
    """1000 times the mean optimal-transport distance of patches a, b [P,C,h,w] along random directions, normalised."""

    def normalise(x):
        mean, std = x.mean(dim=(0, 2, 3), keepdim=True), x.std(dim=(0, 2, 3), keepdim=True)
        return (x - mean) / std.clamp(min=1e-8)

    n = min(len(a), len(b))
    a, b = (normalise(x[torch.randperm(len(x), generator=generator)[:n]]) for x in (a, b))
    distances = []
    for _ in range(directions // at_once):
        lines = F.normalize(torch.randn(a[0].numel(), at_once, generator=generator), dim=0)
        # NumPy sorts these several times faster than torch.
        sorted_a, sorted_b = (np.sort((x.flatten(1) @ lines).T.contiguous().numpy(), axis=1) for x in (a, b))
        distances.append(np.abs(sorted_a - sorted_b).mean(dtype=np.float64))
    return 1000 * float(np.mean(distances))


def compare(real, fake, names=None):
    """The scores of a Summary of generated images against one of real images, {name in print: float}.

    names: among fid, is, kid and prdc; by default all that can be had. Precision, recall, density and coverage take the
    5th neighbour, or the last of fewer images.
    """
    check_comparable(real.stats, fake.stats)
    possible = ["fid"] + ["is"] * (fake.predictions is not None)
    possible += ["kid", "prdc"] * (real.features is not None and fake.features is not None)
    names = possible if names is None else names
    if missing := [name for name in names if name not in possible]:
        raise UserError(f"{missing[0]} is not to be had: kid and prdc need the features of both sides, is needs logits")
    made_by, scores = real.stats.made_by or fake.stats.made_by, {}
    if "fid" in names:
        scores[label("FID", made_by)] = frechet_distance(real.stats, fake.stats)
    if "is" in names:
        scores[label("IS", made_by)], scores["IS std"] = fake.predictions.score()
    if "kid" in names:
        scores[label("KID", made_by)] = kernel_distance(real.features, fake.features)
    if "prdc" in names:
        scores |= precision_recall(real.features, fake.features, min(NEIGHBOUR, real.n - 1, fake.n - 1))
    return scores


def notes(real, fake):
    """Lines that a reader of the scores of two Summaries should know."""
    lines, few = [], min(real.n or 2048, fake.n or 2048)
    if few < 2048:
        singular = ", and a covariance of so few is singular" if few <= real.stats.dim else ""
        lines.append(
            f"{few} images bias a Frechet distance upwards{singular}: compare it only at the same numbers of images "
            f"(arXiv 1801.01401, 1911.07023)"
        )
    if few <= NEIGHBOUR:
        lines.append(f"precision, recall, density and coverage take neighbour {few - 1}, not {NEIGHBOUR}")
    if real.size and fake.size and real.size != fake.size:
        lines.append(f"the first images are {real.size} and {fake.size} pixels: part of a distance may be the size")
    if not (real.stats.made_by and fake.stats.made_by):
        lines.append("some statistics do not say what made them: check that it was the same network and resize mode")
    return lines


def label(score, made_by):
    """The score's name in print: FID, KID and IS are Inception's; scores by another network carry its name."""
    if made_by.get("weights", "")[:8] in INCEPTION:
        return score
    score = score.replace("FID", "FD", 1)
    return f"{score}({made_by['network']})" if made_by else score


# ---------------------------------------------------------------------------------------------------------------------
# Statistics and measuring


def rows(x):
    """A float64 copy on the CPU of x, a finite array or tensor [n,d]."""
    x = torch.as_tensor(x).detach().to("cpu", torch.float64, copy=True)
    if x.ndim != 2:
        raise UserError(f"features must be of shape [n,d], not {list(x.shape)}")
    if not x.sum().isfinite():
        raise UserError("features must be finite; some are nan or infinite")
    return x


def same_width(x, y):
    x, y = rows(x), rows(y)
    if x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise UserError(f"features [n,d], [m,d] with n, m >= 2 are needed, not {list(x.shape)} and {list(y.shape)}")
    return x, y


class FeatureStats:
    """Mean and covariance of features [n,dim], added in parts of any size, in float64 and in constant memory.

    n: samples, or None if a file does not say. mean [dim]. cov [dim,dim], divided by n - 1. factor [r,dim], r <= dim:
    factor^T factor = cov. made_by: see Extractor; empty if unknown.
    """

    # Keeps a factor R of the scatter matrix: R^T R = sum of (x - mean)(x - mean)^T. Up to dim samples, R is just the
    # centred samples; beyond, a QR decomposition shrinks it. Unlike a sum of squares, it keeps the digits of the small
    # directions and needs no rule for singular matrices, in the same time: 0.45 s for 5,000 x 2,048.

    def __init__(self, dim, made_by=None):
        self.dim, self.made_by = dim, made_by or {}
        self._n, self._mean = 0, torch.zeros(dim, dtype=torch.float64)
        self._scatter_factor = torch.zeros(0, dim, dtype=torch.float64)
        self._pending = []  # features not yet in the factor

    def update(self, features):
        """Adds features [n,dim]; returns self."""
        x = rows(features)
        if x.shape[1] != self.dim:
            raise UserError(f"features of {x.shape[1]} dimensions do not go with {self.dim}")
        self._pending.append(x)
        if sum(map(len, self._pending)) >= max(self.dim, 1024):  # a decomposition for each sample would be slow
            self._fold()
        return self

    def merge(self, other):
        """Adds another FeatureStats by the same extractor; returns self."""
        check_comparable(self, other)
        self.made_by = self.made_by or (other.made_by if self.n == 0 else {})
        self._add(other.n, other.mean, other._scatter_factor)
        return self

    def _fold(self):
        if sum(map(len, self._pending)):
            x = self._pending[0] if len(self._pending) == 1 else torch.cat(self._pending)
            mean = x.mean(dim=0)
            self._add(len(x), mean, x.sub_(mean))
        self._pending = []

    def _add(self, n, mean, factor):
        """The pairwise update of Chan, Golub and LeVeque (1979); the step between the means is one more row."""
        if None in (n, self._n):
            raise UserError("statistics without their number of samples cannot be merged")
        if n == 0:
            return
        total, step = self._n + n, mean - self._mean
        if self._n:
            factor = torch.cat([self._scatter_factor, factor, step[None] * math.sqrt(self._n * n / total)])
        self._scatter_factor = torch.linalg.qr(factor, mode="r").R if len(factor) > self.dim else factor
        self._mean = self._mean + step * (n / total)
        self._n = total

    @property
    def n(self):
        self._fold()
        return self._n

    @property
    def mean(self):
        self._fold()
        return self._mean

    @property
    def factor(self):
        if self.n is None:
            return self._scatter_factor
        if self.n < 2:
            raise UserError(f"a covariance needs at least 2 samples, not {self.n}")
        return self._scatter_factor / math.sqrt(self.n - 1)

    @property
    def cov(self):
        return self.factor.T @ self.factor

    @classmethod
    def from_moments(cls, mean, cov, n=None, made_by=None):
        """Statistics of a given mean [dim] and covariance [dim,dim]."""
        mean, cov = rows(torch.as_tensor(mean)[None])[0], rows(cov)
        if cov.shape != (len(mean), len(mean)):
            raise UserError(f"a mean of {len(mean)} and a covariance of {list(cov.shape)} do not go together")
        values, vectors = torch.linalg.eigh((cov + cov.T) / 2)
        # Rounding turns zero eigenvalues into values of this size and either sign, whose roots would count.
        rounding = values.abs().max() * len(mean) * torch.finfo(torch.float64).eps
        if values.min() < -max(1e-6 * values.max(), rounding):
            raise UserError("a covariance has no negative eigenvalues")
        kept = values > rounding
        stats = cls(len(mean), made_by)
        stats._n, stats._mean = n, mean
        stats._scatter_factor = (vectors[:, kept] * (values[kept] * (1 if n is None else n - 1)).sqrt()).T
        return stats

    def save(self, npz):
        """Writes mu and sigma under pytorch-fid's names, n, and made_by."""
        save_npz(npz, {"mu": self.mean, "sigma": self.cov, **self.made_by} | ({"n": self.n} if self.n else {}))

    @classmethod
    def load(cls, npz):
        """Reads what `save` wrote, or another tool's mu and sigma."""
        keys = ("network", "weights", "resize", "dtype")
        file = read_arrays(npz, ("mu", "sigma", "n", *keys))
        with one_sentence(f"{npz} holds no feature statistics"):
            made_by = {key: str(file[key]) for key in keys} if file.keys() >= set(keys) else None
            return cls.from_moments(file["mu"], file["sigma"], int(file["n"]) if "n" in file else None, made_by)


def check_comparable(a, b):
    """Raises UserError unless a and b (FeatureStats or Extractors) share network and resize mode, as far as known."""
    if a.made_by and b.made_by and a.made_by | {"network": None} != b.made_by | {"network": None}:  # weights decide
        made = ["{network}, weights {weights:.8}, resize {resize}, {dtype}".format(**x.made_by) for x in (a, b)]
        raise UserError(f"features by {made[0]} and by {made[1]} cannot be compared")
    if len({x.dim for x in (a, b) if isinstance(x, FeatureStats)}) > 1:
        raise UserError(f"features of {a.dim} and {b.dim} dimensions cannot be compared")


class PredictionStats:
    """The sums that the Inception Score needs of predictions over k classes, in constant memory.

    Of each `splits` successive samples, every split gets one, chosen at random by the seed. So the number of samples
    need not be known beforehand, and sets sorted by class spread over all splits.
    """

    def __init__(self, k, splits=10, seed=0):
        self.generator, self.next_splits = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.int64)
        self.sums = torch.zeros(splits, k + 2, dtype=torch.float64)  # predictions, their entropy, number of samples

    def update(self, logits):
        """Adds logits [b,k]; returns self."""
        log_p = rows(logits).log_softmax(dim=1)
        more = range(len(self.next_splits), len(log_p), len(self.sums))
        blocks = [torch.randperm(len(self.sums), generator=self.generator) for _ in more]
        split, self.next_splits = torch.cat([self.next_splits, *blocks]).tensor_split([len(log_p)])
        entropy = -(log_p.exp() * log_p).sum(dim=1, keepdim=True)
        self.sums.index_add_(0, split, torch.cat([log_p.exp(), entropy, torch.ones_like(entropy)], dim=1))
        return self

    def score(self):
        """exp(entropy of the mean prediction - mean entropy of predictions): mean and deviation over the splits."""
        sums = self.sums[self.sums[:, -1] > 0]
        if not len(sums):
            raise UserError("the Inception Score needs at least 1 sample and 1 split")
        means = sums[:, :-1] / sums[:, -1:]
        scores = (torch.special.entr(means[:, :-1]).sum(dim=1) - means[:, -1]).exp()
        return scores.mean().item(), scores.std(correction=0).item()


class Summary:
    """What the scores need of n images. predictions: None without logits. features [n,d] float32, None if not kept.
    size: "width x height" of the first image, None if unknown."""

    def __init__(self, stats, predictions=None, features=None, size=None):
        self.stats, self.predictions, self.features, self.size, self.n = stats, predictions, features, size, stats.n


def measure(extractor, images, keep=True, progress=None):
    """The Summary of uint8 images: a tensor or array [N,C,H,W], a Folder, or an iterable of batches [b,C,H,W].

    keep: keep the features, 4 d bytes an image, which KID, precision and recall need; without them memory is constant.
    progress(done, total) is called after each batch; total is None for an iterable until its end.
    """
    stats, predictions, kept, done = None, None, [], 0
    sized = isinstance(images, (torch.Tensor, np.ndarray, Folder))
    for batch in batches(images, extractor.batch):
        features, logits = (x if x is None else x.cpu() for x in extractor(batch))
        if stats is None:
            stats, size = FeatureStats(features.shape[1], extractor.made_by), "{3} x {2}".format(*batch.shape)
            predictions = None if logits is None else PredictionStats(logits.shape[1])
        stats.update(features)
        if predictions:
            predictions.update(logits)
        kept += [features] * keep
        done += len(batch)
        if progress:
            progress(done, len(images) if sized else None)
    if stats is None:
        raise UserError("no image could be read")
    if progress and not sized:
        progress(done, done)
    return Summary(stats, predictions, torch.cat(kept) if keep else None, size)


def batches(images, size):
    """Yields batches [b,C,H,W], b <= size, of a tensor or array [N,C,H,W], a Folder or an iterable of batches."""
    if isinstance(images, Folder):
        yield from images.read(size)
    else:
        for part in [images] if isinstance(images, (torch.Tensor, np.ndarray)) else images:
            yield from (batch for batch in as_images(part).split(size) if len(batch))


def as_images(x, name="images"):
    """A tensor or an array of uint8 images as a tensor [N,C,H,W]; channels may come last."""
    if isinstance(x, np.ndarray) and x.dtype == np.uint8:
        x = torch.from_numpy(np.require(x, requirements="CW"))  # torch wants writable memory
    dtype, shape = getattr(x, "dtype", type(x).__name__), list(getattr(x, "shape", []))
    if dtype != torch.uint8 or len(shape) != 4 or not {1, 3} & {shape[1], shape[3]}:
        raise UserError(f"{name} must be uint8 [N,C,H,W] or [N,H,W,C] with C = 1 or 3, not {dtype} {shape}")
    return x if shape[1] in (1, 3) else x.permute(0, 3, 1, 2)


def measure_cached(extractor, images, folder, progress=None):
    """The Summary of uint8 images [N,C,H,W], without predictions; keeps features in the folder under a hash of both."""
    images = as_images(images)
    content, size = hashlib.sha256(images.contiguous().numpy()).hexdigest(), "{3} x {2}".format(*images.shape)
    key = hashlib.sha256(os.fsencode(f"{list(images.shape)} {content} {extractor.made_by}")).hexdigest()[:32]
    file = Path(folder) / f"features-{key}.npz"
    with contextlib.suppress(UserError), one_sentence("no cache"):
        features = torch.from_numpy(read_arrays(file, ["features"])["features"])
        if len(features) == len(images):
            return Summary(FeatureStats(features.shape[1], extractor.made_by).update(features), None, features, size)
    summary = measure(extractor, images, progress=progress)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, not the result
        file.parent.mkdir(parents=True, exist_ok=True)
        save_npz(file, {"features": summary.features})
    return Summary(summary.stats, None, summary.features, size)


# ---------------------------------------------------------------------------------------------------------------------
# Feature extractors


def load_extractor(spec, device="cpu", resize=None, dtype="float32"):
    """The Extractor that spec names.

    "inception": Inception v3 with torchvision's ImageNet weights, from its cache or downloaded. A .pt2 file: a
    torch.export program, images [N,3,H,W] in [0,1] and in their own size -> features or (features, logits), exported in
    eval mode. Another path: a state_dict of Inception v3, torchvision's (fc.weight of 1,000 rows) or the TensorFlow
    network's (1,008 rows); a name like net-0cc3c7bd.pth promises its SHA-256. resize: of RESIZES, by default tf1 for
    the TensorFlow network, else bilinear. dtype: float32 or bfloat16, which moves Inception's features by about 0.4%.
    Raises WeightsMissing if "inception" cannot be had.
    """
    if resize not in (None, *RESIZES) or dtype not in DTYPES:
        raise UserError(f"resize must be one of {', '.join(RESIZES)} and dtype one of {', '.join(DTYPES)}")
    path, kind = Path(spec), UserError
    if spec == "inception":
        url, kind = Inception_V3_Weights.IMAGENET1K_V1.url, WeightsMissing
        path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
        hint = f"put {path.name} into {path.parent} or give --extractor"
        with one_sentence(f"no Inception weights ({hint})", kind):
            if str(path).startswith("~"):
                raise OSError("no home directory: set TORCH_HOME")
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_file():
                torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rsplit("-", 1)[1], progress=False)
    if not path.is_file():
        raise UserError(f"no extractor {spec}: give inception, a weights file or a .pt2 program")
    data = path.read_bytes()
    checksum = hashlib.sha256(data).hexdigest()
    promised = re.search(r"-([0-9a-f]{8,64})\.pth?$", path.name)
    if promised and not checksum.startswith(promised[1]):
        raise kind(f"{path} is damaged: its SHA-256 begins with {checksum[:8]}, not as its name says; get it again")
    if path.suffix == ".pt2":
        if resize or dtype != "float32":
            raise UserError(f"{spec} fixes its own input size and dtype: leave out --resize and --dtype")
        with one_sentence(f"{spec} is no .pt2 program that torch {torch.__version__} can load safely"):
            return Extractor(load_program(data, device), path.stem, checksum, device)
    with one_sentence(f"{spec} holds no weights of Inception v3", kind):
        state_dict = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        resize = resize or ("tf1" if len(state_dict["fc.weight"]) == 1008 else "bilinear")
        network = Inception(state_dict, resize, DTYPES[dtype]).to(device).eval()
        return Extractor(network, INCEPTION.get(checksum[:8], path.stem), checksum, device, resize, dtype)


def load_program(data, device):
    """The module of a torch.export program, given as bytes, without unpickling objects or loading compiled libraries.

    The program still decides what is computed, and torch evaluates its expressions: it has to be trusted.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"its part {damaged} is damaged")
        if code := re.search("custom_obj_|opaque_obj_|aotinductor", "\n".join(archive.namelist()).lower()):
            raise ValueError(f"a part of it, {code[0]}, may run code")
    # Without these, torch.export.load falls back to plain pickle and logs tracebacks of its failures.
    quiet = mock.patch.object(logging.getLogger("torch.export"), "disabled", True)
    with quiet, mock.patch.dict(os.environ, TORCH_FORCE_WEIGHTS_ONLY_LOAD="1"):
        return move_to_device_pass(torch.export.load(io.BytesIO(data)), str(device)).module()


class Extractor:
    """Computes features of images: extractor(images) -> (features [N,d], logits [N,k] or None), float32.

    images: uint8 [N,1 or 3,H,W]; gray is repeated. made_by: {"network", "weights", "resize", "dtype"}, which comparable
    scores share; weights are the first 16 digits of a SHA-256. batch: the fastest number of images at a time.
    """

    def __init__(self, network, name, weights, device="cpu", resize="native", dtype="float32"):
        self.network, self.name, self.device = network, name, torch.device(device)
        self.made_by = {"network": name, "weights": weights[:16], "resize": resize, "dtype": dtype}
        self.batch = 8 if self.device.type == "cpu" else 64  # 8 images' activations fit a CPU's caches

    @torch.no_grad()
    def __call__(self, images):
        images = as_images(images).to(self.device)
        with one_sentence(
            f"{self.name} computes no features [N,d] or (features, logits [N,k]) of {list(images.shape)}"
        ):
            with torch.autocast(self.device.type, enabled=False), without_tf32():
                outputs = self.network(images.expand(-1, 3, -1, -1).float() / 255)
            features, logits = (outputs, None) if isinstance(outputs, torch.Tensor) else outputs
            for x in (features,) if logits is None else (features, logits):
                if x.ndim != 2 or len(x) != len(images):
                    raise ValueError(f"it gives {list(x.shape)}")
        return features.float(), None if logits is None else logits.float()


@contextlib.contextmanager
def without_tf32():
    """Computes float32 as float32: by default cuDNN takes TF32, whose 10 bits move features by about 1e-3."""
    new = hasattr(torch.backends.cudnn, "conv")  # torch 2.9 and later, where the old names must not be mixed in
    backends = torch.backends.cudnn.conv if new else torch.backends.cudnn, torch.backends.cuda.matmul
    name, off = ("fp32_precision", "ieee") if new else ("allow_tf32", False)
    before = [getattr(backend, name) for backend in backends]
    try:
        for backend in backends:
            setattr(backend, name, off)
        yield
    finally:
        for backend, value in zip(backends, before):
            setattr(backend, name, value)


class Inception(nn.Module):
    """Inception v3 for scores: images [N,3,H,W] in [0,1] -> (pooled features [N,2048], logits), both float32.

    state_dict: torchvision's, with 1,000 classes, or the TensorFlow network's with 1,008 under the same names. The
    latter pools differently: average pools leave the padding out, and the last block takes the maximum. Its logits have
    no bias, as in the published Inception Score.
    """

    def __init__(self, state_dict, resize, dtype):
        super().__init__()
        self.resize, self.dtype = resize, dtype
        classes = len(state_dict["fc.weight"])
        net = inception_v3(weights=None, init_weights=False, aux_logits=False, num_classes=classes).eval()
        net.load_state_dict({k: v for k, v in state_dict.items() if not k.startswith("AuxLogits.")})
        for m in list(net.modules()):
            if isinstance(m, BasicConv2d):
                m.conv, m.bn = fuse_conv_bn_eval(m.conv, m.bn), nn.Identity()
        blocks = {k: m for k, m in net.named_children() if k not in ("AuxLogits", "avgpool", "dropout", "fc")}
        if classes == 1008:
            for k in ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7b"):
                blocks[k] = PooledBlock(blocks[k], nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False))
            blocks["Mixed_7c"] = PooledBlock(blocks["Mixed_7c"], nn.MaxPool2d(3, stride=1, padding=1))
        self.trunk = nn.Sequential(*blocks.values()).to(dtype).to(memory_format=torch.channels_last)
        self.weight, self.bias = net.fc.weight, None if classes == 1008 else net.fc.bias

    def forward(self, images):
        x = for_inception(images * 255, self.resize).to(self.dtype, memory_format=torch.channels_last)
        features = self.trunk(x).float().mean(dim=(2, 3))
        return features, F.linear(features, self.weight, self.bias)


class PooledBlock(nn.Module):
    """A block of torchvision's Inception v3 with another pooling in its pooled branch."""

    def __init__(self, block, pool):
        super().__init__()
        self.block, self.pool, self.branch_pool = block, pool, block.branch_pool
        block.branch_pool = nn.Identity()

    def forward(self, x):
        *branches, _ = self.block._forward(x)
        return torch.cat([*branches, self.branch_pool(self.pool(x))], dim=1)


def for_inception(images, resize):
    """images [N,3,H,W] in [0,255] as Inception takes them, [N,3,299,299] in about [-1,1].

    bilinear: as pytorch-fid does it, with pixel centres aligned and no antialiasing. clean: as clean-fid does it,
    antialiased bicubic (arXiv 2104.11222). tf1: as the TensorFlow code of the first FID did it, bilinear with the
    corners of the first pixels aligned.
    """
    if resize == "bilinear":
        return F.interpolate(images, size=(299, 299), mode="bilinear", align_corners=False) / 127.5 - 1
    if resize == "clean":
        x = F.interpolate(images, size=(299, 299), mode="bicubic", align_corners=False, antialias=True).clamp(0, 255)
    else:
        x = stretch_rows(stretch_rows(images).mT).mT
    return x / 128 - 1


def stretch_rows(x, size=299):
    """x [...,H,W] -> [...,size,W]: row i lies at i * H / size between the rows of x."""
    height = x.shape[-2]
    place = torch.arange(size, device=x.device) * (height / size)
    low = place.floor().long()
    return torch.lerp(x[..., low, :], x[..., (low + 1).clamp(max=height - 1), :], (place - low).to(x.dtype)[:, None])


# ---------------------------------------------------------------------------------------------------------------------
# Images and files

# The same rules in gan.py and metrics.py, since each works alone when copied. (Both files hold this text verbatim.)

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # for some others Pillow starts a program


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


class Folder:
    """The images below a folder, read when needed. Of those read so far: skipped is {file: reason} of undecodable ones,
    not in len(); brightest is the largest value."""

    def __init__(self, path):
        self.path, self.skipped, self.brightest = Path(path), {}, 0
        self.files = list_files(self.path)

    def __len__(self):
        return len(self.files) - len(self.skipped)

    def read(self, size):
        """Yields batches [b,3,H,W], b <= size, in order, a new one at each change of size; threads read ahead."""

        def decode(file):
            try:
                return read_image(self.path / file).expand(3, -1, -1)
            except ValueError as error:  # no image
                self.skipped[file] = str(error)

        at_once = max(size, 32)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            ahead = pool.map(decode, self.files[:at_once])
            for start in range(at_once, len(self.files) + at_once, at_once):
                images = [image for image in ahead if image is not None]
                self.brightest = max([self.brightest, *(int(image.max()) for image in images)])
                ahead = pool.map(decode, self.files[start : start + at_once])
                for _, group in itertools.groupby(images, key=lambda image: image.shape):
                    yield from torch.stack(list(group)).split(size)


def open_set(path, prefer_images=False):
    """FeatureStats, a Folder or uint8 images [N,C,H,W], N >= 2. Of a file with both, the statistics unless told so."""
    path = Path(path)
    if path.is_dir():
        images = Folder(path)
    elif path.is_file():
        stats = read_arrays(path, ["mu"])
        arrays = {} if stats and not prefer_images else read_arrays(path, ["images", "arr_0"])
        if stats and not arrays:
            return FeatureStats.load(path)
        if not arrays:
            raise UserError(f"{path} holds neither statistics (mu, sigma) nor images (images or arr_0)")
        images = arrays.get("images", arrays.get("arr_0"))
        images = as_images(images[:, None] if images.ndim == 3 else images, path).expand(-1, 3, -1, -1)
    else:
        raise UserError(f"{path} is neither a folder of images nor an .npz or .npy of images or statistics")
    if len(images) < 2:
        raise UserError(f"{path} holds {len(images)} images; at least 2 are needed")
    return images


def read_arrays(path, names):
    """{name: array} for the names that an .npz holds; the array of an .npy is called arr_0."""
    with one_sentence(f"{path} cannot be read"):
        content = np.load(path, mmap_mode="c", allow_pickle=False)
        if isinstance(content, np.ndarray):
            content = contextlib.nullcontext({"arr_0": content})
        with content as arrays:
            return {name: arrays[name] for name in names if name in arrays}


def save_npz(path, arrays):
    """Writes an .npz atomically."""
    temporary = Path(path).with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)  # not the temporary name; and a full disk gives none
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def one_sentence(start, kind=UserError):
    """Turns any failure into one UserError: `start: the first sentence of the failure`."""
    try:
        yield
    except Exception as error:  # the readers of NumPy and torch raise errors of every kind
        name = "" if isinstance(error, (UserError, OSError)) else f"{type(error).__name__}: "
        cause = (str(error).splitlines() or [""])[0].partition(". ")[0]  # what follows is advice, such as to unpickle
        raise kind(f"{start}: {name}{cause}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Command line


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def make_parser():
    parser = Parser(prog="metrics.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("real", help="folder of real images, .npz or .npy of uint8 images, or saved statistics")
    add("fake", nargs="?", help="the same of generated images; optional with --out")
    add(
        "--extractor",
        default="inception",
        help="inception, a weights file or a .pt2: a program, to be trusted like one",
    )
    add("--resize", choices=RESIZES, help="to Inception's 299 pixels (tf1 for weights of 1,008 classes, else bilinear)")
    add("--dtype", choices=DTYPES, default="float32", help="of Inception (float32)")
    scores = "fid, is, kid, prdc (precision, recall, density, coverage), swd (sliced Wasserstein, without a network)"
    add("--metrics", help=f"with commas: {scores} (all but swd that can be had)")
    add("--json", action="store_true", help="print one JSON object")
    add("--out", help="write REAL's statistics to this .npz")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda if there is one, else cpu")

    return parser


def show_progress(name):
    """A function of (done, total or None) that reports on stderr, twice a second or, off a terminal, twice a minute."""
    name, started = printable(name), time.monotonic()
    shown, terminal = started, getattr(sys.stderr, "isatty", lambda: False)()

    def progress(done, total):
        nonlocal shown
        now = time.monotonic()
        if now - shown < (0.5 if terminal else 30) and not (terminal and done == total):
            return
        shown, left = now, round((now - started) * ((total or done) - done) / done)
        of_total, time_left = (f" of {total}", f", {left // 60}:{left % 60:02d} left") if total else ("", "")
        line = f"{name}: {done}{of_total} images{time_left}"
        if terminal:
            line = f"\r\x1b[K{line}" + "\n" * (done == total)
        print(line, end="" if terminal else "\n", file=sys.stderr, flush=True)

    return progress


def printable(text, most=None):
    """The text on one line: control characters and undecodable bytes as escapes, the middle cut out beyond `most`."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return text if most is None or len(text) <= most else f"{text[: most // 2 - 3]}...{text[-(most // 2) :]}"


def run(args):
    """The result of a command line: made_by, notes and scores in a dict. Writes --out."""
    names = SCORES[:-1] if args.metrics is None else args.metrics.split(",")
    if unknown := [name for name in names if name not in SCORES]:
        raise UserError(f"no score {unknown[0]!r}: choose among {','.join(SCORES)}")
    if not args.fake and (args.metrics is not None or not args.out):
        raise UserError("give FAKE too, or --out alone to save the statistics of REAL")
    if args.out and not (Path(args.out).suffix == ".npz" and Path(args.out).absolute().parent.is_dir()):
        raise UserError(f"--out {args.out}: give an .npz in a folder that exists")
    if args.out and Path(args.out).exists():
        FeatureStats.load(args.out)  # raises UserError rather than overwrite anything else
    paths = {"real": args.real, "fake": args.fake} if args.fake else {"real": args.real}
    sets = {}
    for side, path in paths.items():
        of_images = [name for name in names if name in ("kid", "prdc", "swd") or (name, side) == ("is", "fake")]
        sets[side] = open_set(path, prefer_images=bool(of_images))
        if args.metrics and of_images and isinstance(sets[side], FeatureStats):
            raise UserError(f"{path} holds statistics, but {of_images[0]} needs images")
    summaries = {side: Summary(images) for side, images in sets.items() if isinstance(images, FeatureStats)}
    to_measure = [side for side in paths if side not in summaries]
    if to_measure and (args.out or set(names) != {"swd"}):
        extractor = load_extractor(args.extractor, args.device, args.resize, args.dtype)
        for summary in summaries.values():  # before the long work
            check_comparable(summary.stats, extractor)
        keep = len(to_measure) == 2 and not {"kid", "prdc"}.isdisjoint(names)
        for side in to_measure:
            summaries[side] = measure(extractor, sets[side], keep, show_progress(f"{extractor.name} on {paths[side]}"))
    if args.out:
        summaries["real"].stats.save(args.out)
    scores, lines, result, made_by = {}, [], {}, {}
    if args.fake and summaries:
        chosen = None if args.metrics is None else [name for name in names if name != "swd"]
        scores, lines = compare(**summaries, names=chosen), notes(**summaries)
        absent = [name for name, score in (("kid, prdc", "recall"), ("is", "IS std")) if score not in scores]
        if args.metrics is None and absent:
            lines.append(f"left out: {', '.join(absent)} (they need images on both sides, and is needs logits)")
    if "swd" in names:
        scores["SWD"] = sliced_wasserstein(**sets)

    for side, path in paths.items():
        images, summary = sets[side], summaries.get(side)
        if skipped := sorted(getattr(images, "skipped", {}).items()):
            some = ", ".join(f"{file} ({why})" for file, why in skipped[:3]) + ", ..." * bool(skipped[3:])
            lines.append(f"{path}: skipped {len(skipped)} files that are no images: {some}")
        if isinstance(images, Folder) and images.brightest < 64:
            lines.append(f"{path}: the images are dark, from 0 to {images.brightest} of 255: 12-bit data in 16 bits?")
        result |= {side: path, f"n_{side}": summary.n if summary else len(images)}
        made_by |= summary.stats.made_by if summary else {}
    return result | made_by | {"notes": lines, "scores": scores, "saved": args.out}


def show_result(result):
    scores, lines = result.pop("scores"), result.pop("notes")
    facts = [f"{key}: {value}" for key, value in result.items() if value is not None]
    scores = [f"{name:20}  {value:.6g}" for name, value in scores.items()]
    print("\n".join(map(printable, [*facts, *(f"note: {line}" for line in lines), *scores])))


def main(argv=None):
    """Runs a command line. Returns 0; 2 after one line on stderr that says what was wrong; or 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names in a terminal of another encoding
    try:
        args = make_parser().parse_args(argv)
        with one_sentence(f"no device {args.device!r} here"):
            torch.zeros(1, device=args.device)
        result = run(args)
        print(json.dumps(result, indent=2)) if args.json else show_result(result)
        return 0
    except KeyboardInterrupt:
        return 130
    except (UserError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        print(f"metrics.py: error: {printable(str(error) or 'out of memory', 180)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
