# SPDX-License-Identifier: MIT
"""Scores of generated images: FID, Inception Score, KID, precision and recall, density and coverage, SWD.

    python metrics.py REAL FAKE                            # two folders of images, or .npz or .npy of uint8 images
    python metrics.py REAL --out real.npz                  # REAL's statistics, which stand for it in later calls
    python metrics.py REAL FAKE --extractor net.pt2 --metrics fid,is,kid,prdc,swd --json

Each score is reported with its network, weights, resize mode, dtype and numbers of images. A Frechet distance is called
FID only if the features come from Inception v3 with published weights.
"""

import argparse
import contextlib
import errno
import hashlib
import io
import itertools
import json
import logging
import math
import os
import re
import sys
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
from torchvision.models.inception import BasicConv2d, InceptionA, InceptionC, InceptionE
from torchvision.transforms.functional import pil_to_tensor

__version__ = "1.0"

INCEPTION = {  # the first digits of the SHA-256 of published Inception v3 weights
    "0cc3c7bd": "Inception v3 (torchvision)",
    "6726825d": "Inception v3 (TensorFlow)",  # of the original FID, as pytorch-fid and torch-fidelity distribute them
}
RESIZES = ("bilinear", "clean", "tf1")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BOTH = ("real", "fake")
SCORES = {"fid": (), "is": ("fake",), "kid": BOTH, "prdc": BOTH, "swd": BOTH}  # the sides that must be images
NEIGHBOUR = 5  # its distance is the radius of a ball in precision and recall
ENOUGH_TO_SPLIT = 5000  # images: fewer have too few in each of ten splits to reach a high Inception Score


class UserError(ValueError):
    """A request that cannot be carried out; the message says what to do instead."""


class WeightsMissing(UserError):
    """Inception's weights are not on the disk and cannot be downloaded."""


# ---- Scores
def frechet_distance(a, b):
    """Measures the Frechet distance of two normal distributions (FID for Inception's features; arXiv 1706.08500).

    a, b: FeatureStats, or features [n,d], n >= 2. Returns |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)), a float >= 0,
    computed in float64.
    """
    # With A = X^T X and B = Y^T Y, tr (A B)^(1/2) is the sum of the singular values of X Y^T: real, and exact for
    # singular A and B. Eigenvalues of A B, of X B X^T or of a Gram matrix are the squares of those values. They are
    # faster (0.24 s against 0.85 s at d = 2048), but rounding hides all values below 1e-8 of the largest.
    a, b = (x if isinstance(x, FeatureStats) else FeatureStats.from_features(x) for x in (a, b))
    check_made_by(a.made_by, b.made_by)
    if a.mean.shape != b.mean.shape:
        raise UserError(f"features of {len(a.mean)} and {len(b.mean)} dimensions cannot be compared")

    X = a.factor  # [r,d]
    Y = b.factor  # [s,d]
    spread = X.square().sum() + Y.square().sum()
    distance = spread - 2 * torch.linalg.svdvals(X @ Y.T).sum()
    if distance < 1e-5 * spread:
        # The difference loses digits if A and B nearly agree. It equals a sum of squares: the least |Q X - Y|^2 over
        # all orthogonal Q.
        X, Y = nn.utils.rnn.pad_sequence([X, Y], batch_first=True)  # zero rows make them equally high
        U, _, Vh = torch.linalg.svd(X @ Y.T)
        distance = (U.T @ X - Vh @ Y).square().sum()
    return (distance + (a.mean - b.mean).square().sum()).item()


def inception_score(logits, splits=None, seed=0):
    """Measures the Inception Score, exp of the mean KL(p(y|x) || p(y)) (arXiv 1606.03498).

    logits [n,k], n >= 1. The seed deals them into splits: by default ten as published, or one for fewer than 5,000,
    since a split of m samples cannot score more than m. Returns (mean >= 1, standard deviation) over the splits.
    """
    logits = rows(logits)
    n = len(logits)
    if n < 1:
        raise UserError("the Inception Score needs at least 1 sample")
    if splits is None:
        splits = 1 if n < ENOUGH_TO_SPLIT else 10
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))

    scores = []
    for part in order.tensor_split(min(splits, n)):
        log_p = logits[part].log_softmax(dim=1)
        p = log_p.exp()
        entropy = torch.special.entr(p.mean(dim=0)).sum()  # of the mean prediction
        scores.append((entropy + (p * log_p).sum(dim=1).mean()).exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(x, y, block=512):
    """Estimates the squared MMD of features x[n,d], y[m,d] under the kernel (x.y / d + 1)^3 (KID; arXiv 1801.01401).

    n, m >= 2. Takes all pairs, so nothing is random. Returns an unbiased estimate, which may be slightly negative.
    """
    x, y = same_width(x, y)
    d = x.shape[1]

    def kernel_sum(a, b):
        return sum((part @ b.T / d + 1).pow(3).sum() for part in a.split(block))

    def within(a):  # the mean over all pairs but those of a sample with itself
        diagonal = (a.square().sum(dim=1) / d + 1).pow(3).sum()
        return (kernel_sum(a, a) - diagonal) / (len(a) * (len(a) - 1))

    between = kernel_sum(x, y) / (len(x) * len(y))
    return (within(x) + within(y) - 2 * between).item()


def precision_recall(real, fake, k=NEIGHBOUR, block=512):
    """Measures improved precision and recall (arXiv 1904.06991), density and coverage (arXiv 2002.09797).

    real [n,d], fake [m,d]: features. Each sample's ball reaches to its k-th neighbour, 1 <= k < n, m. As in the
    published code, precision and recall count samples on its surface, density and coverage do not. Returns
    {"precision", "recall", "density", "coverage"}; all but density lie in [0,1].
    """
    real, fake = same_width(real, fake)
    most = min(len(real), len(fake)) - 1
    if not 1 <= k <= most:
        raise UserError(f"k must be from 1 to {most}, not {k}")
    center = real.mean(dim=0)
    real -= center  # near zero the products of squared_distances keep their digits
    fake -= center

    closed = 1 + 1e-9  # a copy of the k-th neighbour lies on the surface, whatever its rounding
    opened = 1 - 1e-9
    real_radii = neighbour_distances(real, k, block)[:, None]  # [n,1]
    fake_radii = neighbour_distances(fake, k, block)  # [m]

    precise = torch.zeros(len(fake), dtype=torch.bool)
    recalled = 0
    covered = 0
    balls = 0  # the number of open balls that each fake lies in, summed over all
    for part, radius in zip(real.split(block), real_radii.split(block)):
        distance = squared_distances(part, fake)  # [block,m]
        inside = distance < radius * opened
        balls += inside.sum().item()
        covered += inside.any(dim=1).sum().item()
        precise |= (distance <= radius * closed).any(dim=0)
        recalled += (distance <= fake_radii * closed).any(dim=1).sum().item()

    return {
        "precision": precise.sum().item() / len(fake),
        "recall": recalled / len(real),
        "density": balls / (k * len(fake)),
        "coverage": covered / len(real),
    }


def squared_distances(a, b):
    """Returns the squared distances [n,m] of the rows of a [n,d] and b [m,d], exactly 0 for equal rows near zero."""
    scale = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)
    distance = scale - 2 * a @ b.T
    return torch.where(distance > 1e-12 * scale, distance, 0)  # rounding leaves a trace between equal points


def neighbour_distances(x, k, block):
    """Returns the squared distances [n] of the rows of x [n,d] to their k-th neighbours."""
    # Each row is its own nearest neighbour, so k + 1.
    parts = [squared_distances(part, x).kthvalue(k + 1, dim=1).values for part in x.split(block)]
    return torch.cat(parts)


def sliced_wasserstein(real, fake, seed=0):
    """Measures the sliced Wasserstein distance of image patches (arXiv 1710.10196), times 1000; needs no network.

    real, fake: uint8 images [n,C,H,W], [m,C,H,W], tensors, arrays or Folders, of one size from 16 pixels. Takes 7 x 7
    patches of each level of the Laplacian pyramid down to 16 pixels, 128 per image but about 2^17 in all at most,
    normalises them by channel and compares them along 512 random directions. Returns the mean over the levels.
    """
    real = laplacian_patches(real, seed)
    fake = laplacian_patches(fake, seed)
    if not real or real.keys() != fake.keys():
        shapes = f"{[*max(real, default=[])]} and {[*max(fake, default=[])]}"
        raise UserError(f"SWD needs images of one size and kind on both sides, not {shapes}")
    generator = torch.Generator().manual_seed(seed)
    return float(np.mean([slice_distance(real[level], fake[level], generator) for level in real]))


def laplacian_patches(images, seed, size=7, per_image=128, most=2**17):
    """Cuts patches at random places of images [n,C,H,W]: {(C, H, W) of a level: patches [P,C,size,size]}."""
    generator = torch.Generator().manual_seed(seed)
    per_image = max(1, min(per_image, most // max(1, len(images))))
    levels = {}
    shape = None
    for batch in batches(images, 64):
        shape = shape or batch.shape[1:]
        if batch.shape[1:] != shape or min(batch.shape[2:]) < 16:
            raise UserError("SWD needs images of one size, at least 16 x 16")
        which = torch.arange(len(batch)).repeat_interleave(per_image)
        for level in laplacian_pyramid(batch.cpu().float()):
            windows = level.unfold(2, size, 1).unfold(3, size, 1)  # a view [n,C,H-6,W-6,size,size]
            y, x = (torch.randint(side, which.shape, generator=generator) for side in windows.shape[2:4])
            levels.setdefault(level.shape[1:], []).append(windows[which, :, y, x])
    return {level: torch.cat(parts) for level, parts in levels.items()}


def laplacian_pyramid(x):
    """Splits images x [n,C,H,W] into bands, finest first: what each halving down to 16 pixels loses, then the rest."""
    kernel = torch.tensor([1.0, 4, 6, 4, 1]) / 16
    kernel = torch.outer(kernel, kernel).expand(x.shape[1], 1, 5, 5)

    def blur(x):
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, groups=x.shape[1])

    bands = []
    while min(x.shape[2:]) >= 32:
        small = blur(x)[..., ::2, ::2]
        large = torch.zeros_like(x)
        large[..., ::2, ::2] = 4 * small
        bands.append(x - blur(large))
        x = small
    return bands + [x]


def slice_distance(a, b, generator):
    """Measures 1000 times the mean optimal-transport distance of normalised patches along 512 random directions.

    a, b: patches [P,C,h,w], [Q,C,h,w], of which as many are drawn as the smaller set has.
    """
    n = min(len(a), len(b))
    a = normalised(a[torch.randperm(len(a), generator=generator)[:n]])
    b = normalised(b[torch.randperm(len(b), generator=generator)[:n]])
    distances = []
    for _ in range(4):  # times 128 directions, which bounds the memory
        lines = F.normalize(torch.randn(a[0].numel(), 128, generator=generator), dim=0)
        distances.append(np.abs(sorted_along(lines, a) - sorted_along(lines, b)).mean(dtype=np.float64))
    return 1000 * float(np.mean(distances))


def normalised(patches):
    """Gives each channel of patches [P,C,h,w] a mean of 0 and a standard deviation of 1."""
    mean = patches.mean(dim=(0, 2, 3), keepdim=True)
    std = patches.std(dim=(0, 2, 3), keepdim=True)
    return (patches - mean) / std.clamp(min=1e-8)


def sorted_along(lines, patches):
    """Projects patches [P,C,h,w] on lines [C*h*w,L] and sorts each line's P values: an array [L,P]."""
    places = (patches.flatten(1) @ lines).T.contiguous()
    return np.sort(places.numpy(), axis=1)  # several times faster than torch


# ---- All scores of two sets
def compare(real, fake, names=None):
    """Scores a Summary of generated images against one of real images: {name in print: float}.

    names: among fid, is, kid and prdc, by default all that are available. Precision, recall, density and coverage take
    the 5th neighbour, or the last of fewer images.
    """
    check_made_by(real.stats.made_by, fake.stats.made_by)
    available = available_scores(real, fake)
    if names is None:
        names = available
    for name in names:
        if name not in available:
            raise UserError(f"{name} is not available: kid and prdc need the features of both sides, is needs logits")

    made_by = real.stats.made_by or fake.stats.made_by
    scores = {}
    if "fid" in names:
        scores[label("FID", made_by)] = frechet_distance(real.stats, fake.stats)
    if "is" in names:
        scores[label("IS", made_by)], scores["IS std"] = inception_score(fake.logits)
    if "kid" in names:
        scores[label("KID", made_by)] = kernel_distance(real.features, fake.features)
    if "prdc" in names:
        scores |= precision_recall(real.features, fake.features, min(NEIGHBOUR, real.n - 1, fake.n - 1))
    return scores


def available_scores(real, fake):
    """Lists the names of the scores that two Summaries allow."""
    names = ["fid"]
    if fake.logits is not None:
        names.append("is")
    if real.features is not None and fake.features is not None:
        names += ["kid", "prdc"]
    return names


def notes(real, fake):
    """Lists what a reader of the scores of two Summaries should know, a line each."""
    lines = []
    few = min(real.n or 2048, fake.n or 2048)
    if few < 2048:
        lines.append(
            f"{few} images bias a Frechet distance upwards: compare it only at the same numbers of images "
            "(arXiv 1801.01401, 1911.07023)"
        )
    if fake.logits is not None and fake.n < ENOUGH_TO_SPLIT:
        lines.append(f"IS takes one split, without a deviation: {fake.n} images are fewer than {ENOUGH_TO_SPLIT}")
    if few <= NEIGHBOUR:
        lines.append(f"precision, recall, density and coverage take neighbour {few - 1}, not {NEIGHBOUR}")
    if real.size and fake.size and real.size != fake.size:
        lines.append(f"the first images are {real.size} and {fake.size} pixels: part of a distance may be the size")
    if {} in (real.stats.made_by, fake.stats.made_by):
        lines.append("some statistics do not say what made them: check that it was the same network and resize mode")
    return lines


def label(score, made_by):
    """Names a score in print: FID, KID and IS are Inception's; scores by another network carry its name."""
    if made_by.get("weights", "")[:8] in INCEPTION:
        return score
    score = score.replace("FID", "FD")
    return f"{score}({made_by['network']})" if made_by else score


def check_made_by(a, b):
    """Raises UserError unless two made_by (see Extractor) agree in all but the network's name, as far as known."""
    if a and b and {**a, "network": None} != {**b, "network": None}:  # the weights decide
        made = ["{network}, weights {weights:.8}, resize {resize}, {dtype}".format(**made_by) for made_by in (a, b)]
        raise UserError(f"features by {made[0]} and by {made[1]} cannot be compared")


# ---- Statistics and measuring
def rows(x):
    """Copies x, a finite array or tensor [n,d], to float64 on the CPU."""
    x = torch.as_tensor(x).detach().to("cpu", torch.float64, copy=True)
    if x.ndim != 2:
        raise UserError(f"features must be of shape [n,d], not {list(x.shape)}")
    if not x.sum().isfinite():
        raise UserError("features must be finite; some are nan or infinite")
    return x


def same_width(x, y):
    """Copies features x [n,d] and y [m,d], n, m >= 2, to float64."""
    x = rows(x)
    y = rows(y)
    if x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise UserError(f"features [n,d], [m,d] with n, m >= 2 are needed, not {list(x.shape)} and {list(y.shape)}")
    return x, y


class FeatureStats:
    """Holds the mean and covariance of features, in float64.

    n: number of samples, None if a file does not say. mean [d]. factor [r,d], r <= d: factor^T factor is the
    covariance, divided by n - 1. made_by: see Extractor; empty if unknown.
    """

    # A factor keeps the digits of the small directions, which a covariance's rounding hides, and needs no rule for
    # singular matrices.

    def __init__(self, n, mean, factor, made_by=None):
        self.n = n
        self.mean = mean
        self.factor = factor
        self.made_by = made_by or {}

    @classmethod
    def from_features(cls, features, made_by=None):
        """Takes the statistics of features [n,d], n >= 2."""
        x = rows(features)
        n, d = x.shape
        if n < 2:
            raise UserError(f"a covariance needs at least 2 samples, not {n}")
        mean = x.mean(dim=0)
        x -= mean
        if n > d:
            x = torch.linalg.qr(x, mode="r").R  # [d,d]; R^T R = x^T x
        return cls(n, mean, x / math.sqrt(n - 1), made_by)

    @classmethod
    def from_moments(cls, mean, cov, n=None, made_by=None):
        """Takes a given mean [d] and covariance [d,d]."""
        mean = rows(mean[None])[0]
        cov = rows(cov)
        d = len(mean)
        if cov.shape != (d, d):
            raise UserError(f"a mean of {d} and a covariance of {list(cov.shape)} do not go together")
        values, vectors = torch.linalg.eigh(cov)
        largest = values.abs().max()
        if values.min() < -1e-6 * largest:
            raise UserError("a covariance has no negative eigenvalues")
        # Rounding turns zero eigenvalues into values of either sign, up to this size, whose roots would count.
        kept = values > largest * d * sys.float_info.epsilon
        factor = (vectors[:, kept] * values[kept].sqrt()).T
        return cls(n, mean, factor, made_by)

    @classmethod
    def load(cls, npz):
        """Reads what `save` wrote, or another tool's mu and sigma."""
        keys = ("network", "weights", "resize", "dtype")
        file = read_arrays(npz, ("mu", "sigma", "n", *keys))
        with reading(npz, "file of feature statistics"):
            n = int(file.get("n", 0)) or None  # 0 if unknown
            made_by = {key: str(file[key]) for key in keys} if file.keys() >= set(keys) else None
            return cls.from_moments(file["mu"], file["sigma"], n, made_by)

    def save(self, npz):
        """Writes mu and sigma under pytorch-fid's names, n, and made_by."""
        with atomic_write(npz) as file:
            np.savez(file, mu=self.mean, sigma=self.cov, n=self.n or 0, **self.made_by)

    @property
    def cov(self):
        return self.factor.T @ self.factor


@dataclass
class Summary:
    """Holds what the scores need of a set of images.

    features [n,d] and logits [n,k]: float32, None if unknown. size: "width x height" of the first image, or None.
    """

    stats: FeatureStats
    features: torch.Tensor = None
    logits: torch.Tensor = None
    size: str = None

    @property
    def n(self):
        return self.stats.n


def measure(extractor, images, progress=None):
    """Computes the Summary of uint8 images: a tensor or array [N,C,H,W], a Folder, or an iterable of [b,C,H,W].

    progress(done, total) is called before each batch and at the end; total is None for an iterable until its end.
    """
    features = []
    logits = []
    done = 0
    size = None
    total = len(images) if isinstance(images, (torch.Tensor, np.ndarray, Folder)) else None
    progress = progress or (lambda done, total: None)
    for batch in batches(images, extractor.batch):
        progress(done, total)
        CORES.adapt()
        size = size or size_of(batch)
        batch_features, batch_logits = extractor(batch)
        features.append(batch_features.cpu())
        if batch_logits is not None:
            logits.append(batch_logits.cpu())
        done += len(batch)
    if not features:
        raise UserError("no image could be read")
    progress(done, done)
    features = torch.cat(features)
    stats = FeatureStats.from_features(features, extractor.made_by)
    return Summary(stats, features, torch.cat(logits) if logits else None, size)


def measure_cached(extractor, images, folder, progress=None):
    """Computes the Summary of uint8 images [N,C,H,W] without logits; keeps features in the folder by a hash of both."""
    images = as_images(images)
    key = hashlib.sha256(images.contiguous().numpy())
    key.update(f"{list(images.shape)} {extractor.made_by}".encode())
    file = Path(folder) / f"features-{key.hexdigest()[:32]}.npz"
    with contextlib.suppress(UserError, KeyError):  # none yet, or damaged: it is made again
        features = torch.from_numpy(read_arrays(file, ["features"])["features"])
        if len(features) == len(images):
            stats = FeatureStats.from_features(features, extractor.made_by)
            return Summary(stats, features, size=size_of(images))

    summary = measure(extractor, images, progress)
    summary.logits = None
    with contextlib.suppress(OSError), atomic_write(file) as target:  # an unwritable cache costs time, not the result
        np.savez(target, features=summary.features)
    return summary


def batches(images, size):
    """Yields batches [b,C,H,W], b <= size, of a tensor or array [N,C,H,W], a Folder or an iterable of batches."""
    if isinstance(images, Folder):
        yield from images.read(size)
        return
    if isinstance(images, (torch.Tensor, np.ndarray)):
        images = [images]
    for part in images:
        part = as_images(part)
        if len(part):
            yield from part.split(size)


def as_images(x, name="images"):
    """Views a tensor or an array of uint8 images as a tensor [N,C,H,W]; channels may come last."""
    if isinstance(x, np.ndarray) and x.dtype == np.uint8:
        x = torch.from_numpy(np.require(x, requirements="CW"))  # torch wants writable memory
    if getattr(x, "dtype", None) == torch.uint8 and x.ndim == 4:
        if x.shape[1] in (1, 3):
            return x
        if x.shape[3] in (1, 3):
            return x.permute(0, 3, 1, 2)
    found = f"{x.dtype} {list(x.shape)}" if hasattr(x, "shape") else type(x).__name__
    raise UserError(f"{name} must be uint8 [N,C,H,W] or [N,H,W,C] with C = 1 or 3, not {found}")


def size_of(images):
    """Describes the size of images [N,C,H,W]."""
    height, width = images.shape[2:]
    return f"{width} x {height}"


# ---- Feature extractors
def load_extractor(spec, device="cpu", resize=None, dtype="float32"):
    """Loads the Extractor that spec names.

    "inception": Inception v3 with torchvision's ImageNet weights, from torch's cache or downloaded. A .pt2 file: a
    torch.export program, images [N,3,H,W] in [0,1] and in their own size -> features or (features, logits), exported in
    eval mode. Another path: a state_dict of Inception v3, torchvision's (fc.weight of 1,000 rows) or the TensorFlow
    network's (1,008 rows); a name like net-0cc3c7bd.pth promises its SHA-256. resize: of RESIZES, by default tf1 for
    the TensorFlow network, else bilinear. dtype: float32 or bfloat16, which moves Inception's features by about 0.4%.
    Raises WeightsMissing if "inception" is not available.
    """
    if resize not in (None, *RESIZES) or dtype not in DTYPES:
        raise UserError(f"resize must be one of {', '.join(RESIZES)} and dtype one of {', '.join(DTYPES)}")
    path = published_weights() if spec == "inception" else Path(spec)
    if not path.is_file():
        raise UserError(f"no extractor {spec}: give inception, a weights file or a .pt2 program")

    data, checksum = read_checked(path)
    if path.suffix == ".pt2":
        if resize or dtype != "float32":
            raise UserError(f"{spec} fixes its own input size and dtype: leave out --resize and --dtype")
        with reading(path, f".pt2 program for torch {torch.__version__}"):
            return Extractor(load_program(data, device), path.stem, checksum, device)

    with reading(path, "weights file of Inception v3"):
        state_dict = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if resize is None:
            resize = "tf1" if len(state_dict["fc.weight"]) == 1008 else "bilinear"
        network = Inception(state_dict, resize, DTYPES[dtype]).to(device).eval()
    return Extractor(network, INCEPTION.get(checksum[:8], path.stem), checksum, device, resize, dtype)


def published_weights():
    """Returns the file of torchvision's Inception weights in torch's cache; downloads it if it is not there."""
    url = Inception_V3_Weights.IMAGENET1K_V1.url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    try:
        if str(path).startswith("~"):
            raise OSError("no home directory: set TORCH_HOME")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            torch.hub.download_url_to_file(url, str(path), hash_prefix="0cc3c7bd", progress=False)
        read_checked(path)
    except Exception as error:  # of the disk, the network or the file
        hint = f"put {path.name} into {path.parent} or give --extractor"
        raise WeightsMissing(f"no Inception weights ({hint}): {cause(error)}") from error
    return path


def read_checked(path):
    """Reads a file's bytes and their SHA-256, which must begin as a name like net-0cc3c7bd.pth promises."""
    data = path.read_bytes()
    checksum = hashlib.sha256(data).hexdigest()
    promised = re.search(r"-([0-9a-f]{8,64})\.pth?$", path.name)
    if promised and not checksum.startswith(promised[1]):
        raise UserError(
            f"{path} is damaged: its SHA-256 begins with {checksum[:8]}, not as its name says; get it again"
        )
    return data, checksum


def load_program(data, device):
    """Loads a torch.export program from bytes, without unpickling objects or loading compiled libraries.

    The program still decides what is computed, and torch evaluates its expressions: it has to be trusted.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        damaged = archive.testzip()
        if damaged:
            raise ValueError(f"its part {damaged} is damaged")
        code = re.search("custom_obj_|opaque_obj_|aotinductor", "\n".join(archive.namelist()).lower())
        if code:
            raise ValueError(f"a part of it, {code[0]}, may run code")
    # Without these, torch.export.load falls back to plain pickle and logs tracebacks of its failures.
    quiet = mock.patch.object(logging.getLogger("torch.export"), "disabled", True)
    with quiet, mock.patch.dict(os.environ, TORCH_FORCE_WEIGHTS_ONLY_LOAD="1"):
        program = torch.export.load(io.BytesIO(data))
    return move_to_device_pass(program, str(device)).module()


class Extractor:
    """Computes features of images: extractor(images) -> (features [N,d], logits [N,k] or None), float32.

    images: uint8 [N,1 or 3,H,W]; gray is repeated. made_by: {"network", "weights", "resize", "dtype"}, which comparable
    scores share; weights are the first 16 digits of a SHA-256. batch: the fastest number of images at a time.
    """

    def __init__(self, network, name, weights, device="cpu", resize="native", dtype="float32"):
        self.network = network
        self.name = name
        self.device = torch.device(device)
        self.made_by = {"network": name, "weights": weights[:16], "resize": resize, "dtype": dtype}
        self.batch = 8 if self.device.type == "cpu" else 64  # 8 images' activations fit a CPU's caches

    @torch.no_grad()
    def __call__(self, images):
        images = as_images(images)
        what = f"network that gives features [N,d] or (features, logits [N,k]) of {list(images.shape)}"
        with reading(self.name, what):
            colours = images.to(self.device).expand(-1, 3, -1, -1).float() / 255
            with torch.autocast(self.device.type, enabled=False), without_tf32():
                outputs = self.network(colours)
            features, logits = (outputs, None) if isinstance(outputs, torch.Tensor) else outputs
            for x in (features, logits):
                if x is not None and (x.ndim != 2 or len(x) != len(images)):
                    raise UserError(f"it gives {list(x.shape)}")
        return features.float(), None if logits is None else logits.float()


@contextlib.contextmanager
def without_tf32():
    """Computes float32 as float32: by default cuDNN takes TF32, whose 10 bits move features by about 1e-3."""
    convolutions = torch.backends.cudnn.conv
    products = torch.backends.cuda.matmul
    before = convolutions.fp32_precision, products.fp32_precision
    convolutions.fp32_precision = "ieee"
    products.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision, products.fp32_precision = before


class Inception(nn.Module):
    """Computes Inception v3 for scores: images [N,3,H,W] in [0,1] -> (pooled features [N,2048], logits), float32.

    state_dict: torchvision's, with 1,000 classes, or the TensorFlow network's with 1,008 under the same names. The
    latter pools differently: average pools leave the padding out, and the last block takes the maximum. Its logits have
    no bias, as in the published Inception Score.
    """

    def __init__(self, state_dict, resize, dtype):
        super().__init__()
        self.resize = resize
        self.dtype = dtype
        classes = len(state_dict["fc.weight"])
        net = inception_v3(weights=None, init_weights=False, aux_logits=False, num_classes=classes).eval()
        net.load_state_dict({name: x for name, x in state_dict.items() if not name.startswith("AuxLogits.")})
        for module in list(net.modules()):
            if isinstance(module, BasicConv2d):
                module.conv = fuse_conv_bn_eval(module.conv, module.bn)
                module.bn = nn.Identity()

        blocks = list(net.children())[:-3]  # all but the pooling, dropout and fc
        self.fc = net.fc
        if classes == 1008:
            self.fc.bias = None
            average = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
            pooling = (InceptionA, InceptionC, InceptionE)
            blocks = [PooledBlock(block, average) if isinstance(block, pooling) else block for block in blocks]
            blocks[-1].pool = nn.MaxPool2d(3, stride=1, padding=1)
        self.trunk = nn.Sequential(*blocks).to(dtype=dtype, memory_format=torch.channels_last)

    def forward(self, images):
        x = for_inception(images * 255, self.resize).to(self.dtype, memory_format=torch.channels_last)
        features = self.trunk(x).float().mean(dim=(2, 3))
        return features, self.fc(features)


class PooledBlock(nn.Module):
    """Computes a block of torchvision's Inception v3 with another pooling in its pooled branch."""

    def __init__(self, block, pool):
        super().__init__()
        self.block = block
        self.pool = pool
        self.branch_pool = block.branch_pool
        block.branch_pool = nn.Identity()

    def forward(self, x):
        *branches, _ = self.block._forward(x)
        return torch.cat([*branches, self.branch_pool(self.pool(x))], dim=1)


def for_inception(images, resize):
    """Scales images [N,3,H,W] in [0,255] for Inception: [N,3,299,299] in about [-1,1].

    bilinear: as pytorch-fid does it, with pixel centres aligned and no antialiasing. clean: as clean-fid does it,
    antialiased bicubic (arXiv 2104.11222). tf1: as the TensorFlow code of the first FID did it, bilinear with the
    corners of the first pixels aligned.
    """
    if resize == "bilinear":
        return F.interpolate(images, 299, mode="bilinear", align_corners=False) / 127.5 - 1
    if resize == "clean":
        x = F.interpolate(images, 299, mode="bicubic", align_corners=False, antialias=True).clamp(0, 255)
    else:
        x = stretch_rows(stretch_rows(images).mT).mT
    return x / 128 - 1


def stretch_rows(x, size=299):
    """Resizes x [...,H,W] to [...,size,W]: row i lies at i * H / size between the rows of x."""
    height = x.shape[-2]
    place = torch.arange(size, device=x.device) * (height / size)
    low = place.floor().long()
    high = (low + 1).clamp(max=height - 1)
    return torch.lerp(x[..., low, :], x[..., high, :], (place - low).to(x.dtype)[:, None])


# ---- Images and files
# gan.py and metrics.py each work alone when copied. From here to Cores, both hold the same text.

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # for some others Pillow starts a program
SHEET = "gan.py, a sheet"  # the text in a PNG that shows samples and should not be learned from


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


# ---- Sets of images
class Folder:
    """Reads the images below a folder when they are needed.

    Of those read so far: skipped is {file: reason} of undecodable ones, not in len(); pages is {file: pages
    after the first}; brightest holds the largest value of each image. runs lists gan.py's runs, left out.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.files, self.runs = list_files(self.path)
        self.skipped = {}
        self.pages = {}
        self.brightest = []

    def __len__(self):
        return len(self.files) - len(self.skipped)

    def read(self, size):
        """Yields batches [b,3,H,W], b <= size, in order, a new one at each change of size; threads read ahead."""
        at_once = max(size, 32)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            ahead = pool.map(self.decode, self.files[:at_once])
            for start in range(at_once, len(self.files) + at_once, at_once):
                images = [image for image in ahead if image is not None]
                ahead = pool.map(self.decode, self.files[start : start + at_once])
                for _, group in itertools.groupby(images, key=lambda image: image.shape):
                    yield from torch.stack(list(group)).split(size)

    def decode(self, file):
        """Reads an image [3,H,W], or notes why it cannot and returns None."""
        try:
            image, pages = read_image(self.path / file)
        except ValueError as error:
            self.skipped[file] = str(error)
            return None
        self.pages[file] = pages - 1
        self.brightest.append(int(image.max()))
        return image.expand(3, -1, -1)


def open_set(path):
    """Opens at least 2 images, a Folder or uint8 [N,3,H,W], or FeatureStats; of a file with both, the images."""
    path = Path(path)
    if path.is_dir():
        images = Folder(path)
    elif path.is_file() and path.suffix.lower() in (".npz", ".npy", ""):
        arrays = read_arrays(path, ["images", "arr_0", "mu"])
        if not arrays:
            raise UserError(f"{path} holds neither statistics (mu, sigma) nor images (images or arr_0)")
        if arrays.keys() == {"mu"}:
            return FeatureStats.load(path)
        images = arrays.get("images", arrays.get("arr_0"))
        if images.ndim == 3:
            images = images[:, None]
        images = as_images(images, path).expand(-1, 3, -1, -1)
    else:
        raise UserError(f"{path} is neither a folder of images nor an .npz or .npy of images or statistics")
    if len(images) < 2:
        raise UserError(f"{path} holds {len(images)} images; at least 2 are needed")
    return images


def read_arrays(path, names):
    """Reads {name: array} for the names that an .npz holds; the array of an .npy is called arr_0."""
    with reading(path, ".npz or .npy file"):
        content = np.load(path, mmap_mode="c", allow_pickle=False)
        if isinstance(content, np.ndarray):
            return {"arr_0": content}
        with content:
            return {name: content[name] for name in names if name in content}


# ---- Command line
class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def make_parser():
    parser = Parser(prog="metrics.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add(
        "real", type=os.path.expanduser, help="folder of real images, .npz or .npy of uint8 images, or saved statistics"
    )
    add("fake", nargs="?", type=os.path.expanduser, help="the same of generated images; optional with --out")
    add(
        "--extractor",
        type=os.path.expanduser,
        default="inception",
        help="inception, a weights file or a .pt2 program that you trust",
    )
    add("--resize", choices=RESIZES, help="to Inception's 299 pixels (tf1 for weights of 1,008 classes, else bilinear)")
    add("--dtype", choices=DTYPES, default="float32", help="of Inception (float32)")
    add(
        "--metrics",
        type=score_names,
        default=[],
        help="with commas: fid, is, kid, prdc (precision, recall, density, coverage), "
        "swd (sliced Wasserstein, without a network); all available but swd by default",
    )
    add("--json", action="store_true", help="print one JSON object")
    add("--out", type=os.path.expanduser, help="write REAL's statistics to this .npz")
    add(
        "--device",
        type=usable_device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cuda if there is one, else cpu",
    )
    return parser


def score_names(text):
    """Splits names of scores at commas, for argparse."""
    names = text.split(",")
    for name in names:
        if name not in SCORES:
            raise argparse.ArgumentTypeError(f"no score {name!r}: choose among {','.join(SCORES)}")
    return list(dict.fromkeys(names))


def usable_device(name):
    """Returns the name of a device of this machine, for argparse."""
    try:
        torch.zeros(1, device=name)
    except Exception as error:  # each backend raises its own
        raise argparse.ArgumentTypeError(f"no device {name!r} here: {cause(error)}") from error
    return name


def run(args):
    """Carries out a request: summarizes both sides, compares them and returns facts, notes and scores. Writes --out."""
    check_request(args)
    paths = {"real": args.real, "fake": args.fake} if args.fake else {"real": args.real}
    sets = {side: open_set(path) for side, path in paths.items()}
    check_sets(args.metrics, paths, sets)

    swd = {}
    if "swd" in args.metrics:
        swd["SWD"] = sliced_wasserstein(**sets)  # before the long work, since it refuses images of mixed sizes
    summaries = {}
    if args.metrics != ["swd"]:
        summaries = summarize(args, paths, sets)
    elif args.out:
        summaries = summarize(args, paths, {"real": sets["real"]})
    if args.out:
        summaries["real"].stats.save(args.out)

    scores = {}
    lines = []
    if "fake" in summaries:
        scores, lines = compare_sides(args.metrics, **summaries)
    for images in sets.values():
        if isinstance(images, Folder):
            lines += folder_notes(images)
    return facts(paths, sets, summaries) | {"notes": lines, "scores": scores | swd, "saved": args.out}


def check_request(args):
    """Refuses a request without FAKE that needs one, and an --out that cannot be written or holds anything else."""
    if not args.fake and (args.metrics or not args.out):
        raise UserError("give FAKE too, or --out alone to save the statistics of REAL")
    if args.out:
        out = Path(args.out)
        if out.suffix != ".npz" or not out.absolute().parent.is_dir():
            raise UserError(f"--out {out}: give an .npz in a folder that exists")
        if out.exists():
            FeatureStats.load(out)


def check_sets(names, paths, sets):
    """Refuses a score that needs images where there are statistics."""
    for name in names:
        for side in SCORES[name]:
            if isinstance(sets[side], FeatureStats):
                raise UserError(f"{paths[side]} holds statistics, but {name} needs images")


def summarize(args, paths, sets):
    """Computes the Summary of each side; loads no network where there are only statistics."""
    summaries = {side: Summary(stats) for side, stats in sets.items() if isinstance(stats, FeatureStats)}
    if len(summaries) < len(sets):
        extractor = load_extractor(args.extractor, args.device, args.resize, args.dtype)
        for summary in summaries.values():
            check_made_by(summary.stats.made_by, extractor.made_by)  # before the long work
        for side, images in sets.items():
            if side not in summaries:
                progress = Progress(f"{extractor.name} on {paths[side]}")
                summaries[side] = measure(extractor, images, progress)
    return summaries


def compare_sides(names, real, fake):
    """Returns the scores of two Summaries and what to know of them; no names stand for all scores available."""
    lines = notes(real, fake)
    if not names:
        names = available_scores(real, fake)
        left_out = sorted(SCORES.keys() - {"swd", *names})
        if left_out:
            lines.append(f"left out: {', '.join(left_out)} (they need images on both sides, and is needs logits)")
    return compare(real, fake, [name for name in names if name != "swd"]), lines


def facts(paths, sets, summaries):
    """Returns what was scored, {"real", "n_real", "fake", "n_fake"}, and what is known of the network."""
    result = {}
    for side, images in sets.items():
        result[side] = paths[side]
        result[f"n_{side}"] = images.n if isinstance(images, FeatureStats) else len(images)
    for summary in summaries.values():
        result |= summary.stats.made_by
    return result


def folder_notes(folder):
    """Lists what a reader should know of the files below a Folder."""
    lines = []
    if folder.skipped:
        some = ", ".join(f"{file} ({reason})" for file, reason in sorted(folder.skipped.items())[:3])
        lines.append(f"skipped {len(folder.skipped)} files that are not images, such as {some}")
    pages = sum(folder.pages.values())
    if pages:
        lines.append(f"left out {pages} pages: only the first of each file is used")
    if folder.runs:
        lines.append(f"left out the runs {', '.join(map(str, folder.runs[:3]))}")
    typical = sorted(folder.brightest)[len(folder.brightest) // 2]
    if typical < 64:
        lines.append(f"dark images, most from 0 to {typical} of 255: 12-bit data in 16 bits?")
    return [f"{folder.path}: {line}" for line in lines]


def show(result):
    """Prints the facts, the notes and the scores, a line each."""
    scores = result.pop("scores")
    notes = result.pop("notes")
    lines = [f"{key}: {value}" for key, value in result.items() if value is not None]
    lines += [f"note: {note}" for note in notes]
    lines += [f"{name:20}  {value:.6g}" for name, value in scores.items()]
    for line in lines:
        print(printable(line))


def main(argv=None):
    """Runs a command line. Returns 0; 2 after one line on stderr that says what was wrong; or 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names in a terminal of another encoding
    warnings.simplefilter("ignore")  # of Pillow, NumPy and torch: advice to programmers
    try:
        args = make_parser().parse_args(argv)
        CORES.activate()
        result = run(args)
        if args.json:
            print(json.dumps(result, indent=2))
        else:
            show(result)
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if not (isinstance(error, (UserError, OSError)) or lacks_memory(error) or "start new thread" in str(error)):
            raise
        print(f"metrics.py: error: {printable(str(error) or 'out of memory'):.300}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
