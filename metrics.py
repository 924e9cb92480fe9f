# SPDX-License-Identifier: MIT
"""Scores of generated images: FID, Inception Score, KID, precision and recall, density and coverage.

    python metrics.py REAL_FOLDER FAKE_FOLDER                       # Inception v3, torchvision's ImageNet weights
    python metrics.py REAL_FOLDER FAKE_FOLDER --extractor net.pt2   # any network, as a torch.export program

Statistics are float64 and streaming. A Frechet distance is called FID only where Inception v3 made the features.
"""

import argparse
import contextlib
import hashlib
import os
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.export.passes import move_to_device_pass
from torchvision.datasets.folder import IMG_EXTENSIONS, pil_loader
from torchvision.models import Inception_V3_Weights, inception_v3
from torchvision.transforms.functional import pil_to_tensor

# ---------------------------------------------------------------------------------------------------------------------
# Feature extractors


class UserError(ValueError):
    """Something asked for cannot be done; the message says what would work."""


class WeightsMissing(UserError):
    """Inception's weights are neither here nor to be downloaded."""


class Extractor:
    """A network that looks at images: extractor(images) -> (features [N,d], logits [N,k]), float32 on its device.

    images: [N,1 or 3,H,W], uint8 or float in [0,1]; gray is repeated. name says which network it is, key which weights
    (for caches); fid is True for Inception v3 with torchvision's weights alone.
    """

    def __init__(self, network, name, key, device, fid):
        self.network, self.name, self.key, self.device, self.fid = network, name, key, torch.device(device), fid

    @torch.no_grad()
    def __call__(self, images):
        images = images.to(self.device)
        images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        try:
            features, logits = self.network(images.expand(-1, 3, -1, -1))
            if features.ndim != 2 or logits.ndim != 2 or not len(features) == len(logits) == len(images):
                raise ValueError(f"it gives {list(features.shape)} and {list(logits.shape)}")
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a program fails in its own ways on what it was not made for
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{self.name} makes no (features [N,d], logits [N,k]) of {list(images.shape)}: {reason}")
        return features.float(), logits.float()

    def label(self, score):
        """The score's name in print: FID, KID and IS are those of Inception; of another network it is named."""
        return score if self.fid else f"{score.replace('FID', 'FD')}({self.name})"


class Inception(nn.Module):
    """torchvision's Inception v3: images [N,3,H,W] in [0,1] -> (pooled features [N,2048], logits [N,1000])."""

    def __init__(self, state_dict):
        super().__init__()
        self.net = inception_v3(weights=None, init_weights=False, aux_logits=False, transform_input=False)
        self.net.load_state_dict({k: v for k, v in state_dict.items() if not k.startswith("AuxLogits.")})
        self.head, self.net.fc = self.net.fc, nn.Identity()

    def forward(self, images):
        x = F.interpolate(images, size=(299, 299), mode="bilinear", align_corners=False, antialias=True)
        features = self.net(2 * x - 1)
        return features, self.head(features)


def load_extractor(spec, device="cpu"):
    """The Extractor that spec names.

    "inception": Inception v3 with torchvision's ImageNet weights, found where torchvision keeps them or downloaded.
    A path to a .pt2 file: a torch.export program, images [N,3,H,W] in [0,1] -> (features, logits). Another path: a
    state_dict of torchvision's Inception v3, which makes FID only if its checksum is that of torchvision's weights.
    Raises WeightsMissing if "inception" cannot be had, UserError for a file that does not fit.
    """
    weights = Inception_V3_Weights.IMAGENET1K_V1
    checksum = weights.url.removesuffix(".pth").rsplit("-", 1)[1]  # the first digits of its SHA-256
    if spec == "inception":
        file = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[1]
        try:
            network = Inception(weights.get_state_dict(progress=False, check_hash=True))
        except Exception as error:  # no network, a file cut off or of another kind, a full disk
            raise WeightsMissing(
                f"no Inception weights ({str(error) or type(error).__name__}): put {file.name} into "
                f"{file.parent}, or name a weights file or a .pt2 program with --extractor"
            )
        return Extractor(network.to(device).eval(), "Inception v3", str(weights), device, fid=True)
    path = Path(spec)
    if not path.is_file():
        raise UserError(f"no extractor {spec}: give inception, a weights file or a .pt2 program")
    key = hashlib.sha256(path.read_bytes()).hexdigest()
    try:
        if path.suffix == ".pt2":
            if not zipfile.is_zipfile(path):  # torch.export would log a traceback
                raise ValueError("it is not whole")
            program = move_to_device_pass(torch.export.load(path), str(device))
            return Extractor(program.module(), path.stem, key, device, fid=False)
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
        network, known = Inception(state_dict).to(device).eval(), key.startswith(checksum)
        return Extractor(network, "Inception v3" if known else path.stem, key, device, known)
    except Exception as error:  # torch raises of every kind for files of another kind
        reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise UserError(
            f"{spec} is neither a .pt2 program that torch {torch.__version__} can read nor weights of "
            f"torchvision's Inception v3: {reason}"
        )


def extract(extractor, images, batch=64):
    """Features [N,d] and logits [N,k], float32 on the CPU, of images [N,C,H,W], uint8 or float in [0,1]."""
    pairs = [extractor(part) for part in images.split(batch)]
    return tuple(torch.cat([part.cpu() for part in parts]) for parts in zip(*pairs))


def extract_cached(extractor, images, folder, batch=64):
    """`extract` of uint8 images, kept in the folder under a key of the images' content and the network's weights."""
    content = hashlib.sha256(np.ascontiguousarray(images.numpy())).hexdigest()
    key = hashlib.sha256(f"{list(images.shape)} {content} {extractor.key}".encode()).hexdigest()[:32]
    file = Path(folder) / f"features-{key}.npz"
    try:
        with np.load(file) as cached:
            return torch.from_numpy(cached["features"]), torch.from_numpy(cached["logits"])
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):  # not there, or not whole
        features, logits = extract(extractor, images, batch)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, not the result
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as unfinished:
            np.savez(unfinished, features=features.numpy(), logits=logits.numpy())
        os.replace(unfinished.name, file)
    return features, logits


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


def rows(x):
    """x, an array or a tensor [n,d], as a float64 tensor. Raises UserError if it is not of two axes or not finite."""
    x = torch.as_tensor(x).double()
    if x.ndim != 2 or not torch.isfinite(x).all():
        raise UserError(f"features must be finite and of shape [n,d], not {list(x.shape)}")
    return x


class FeatureStats:
    """Mean and covariance of features [n,dim], float64, gathered part by part; the order and the parts do not matter.

    n, mean[dim], cov[dim,dim] (divided by n - 1; needs n > 1).
    """

    def __init__(self, dim):
        self.n = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64)  # sum of (x - mean)(x - mean)^T

    @property
    def cov(self):
        if self.n < 2:
            raise UserError(f"a covariance needs at least 2 samples, not {self.n}")
        return self.scatter / (self.n - 1)

    def update(self, features):
        """Adds features [n,dim]; returns self."""
        x = rows(features).to(self.mean.device)
        part = FeatureStats(x.shape[1])
        if len(x):
            part.n, part.mean = len(x), x.mean(dim=0)
            part.scatter = (x - part.mean).T @ (x - part.mean)
        return self.merge(part)

    def merge(self, other):
        """Adds what another FeatureStats has gathered (the pairwise update of Chan et al., 1979); returns self."""
        if len(other.mean) != len(self.mean):
            raise UserError(f"features of {len(other.mean)} dimensions do not go with {len(self.mean)}")
        if other.n:
            n, delta = self.n + other.n, other.mean - self.mean
            self.scatter = self.scatter + other.scatter + torch.outer(delta, delta) * (self.n * other.n / n)
            self.mean = self.mean + delta * (other.n / n)
            self.n = n
        return self

    def save(self, npz):
        """Writes n, mu and sigma; the last two are named as pytorch-fid names them."""
        np.savez(npz, n=self.n, mu=self.mean.numpy(), sigma=self.cov.numpy())

    @classmethod
    def load(cls, npz):
        """What `save` wrote. Raises UserError for another file."""
        try:
            with np.load(npz) as file:
                n, mean, cov = int(file["n"]), torch.from_numpy(file["mu"]), torch.from_numpy(file["sigma"])
        except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(f"{npz} holds no feature statistics: {error}")
        stats = cls(len(mean))
        stats.n, stats.mean, stats.scatter = n, mean.double(), cov.double() * (n - 1)
        return stats


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def frechet_distance(a, b):
    """Frechet distance of two normal distributions (FID for Inception's features; arXiv 1706.08500), a float >= 0.

    a, b: FeatureStats, or features [n,d]. |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)), in float64. Raises UserError
    for fewer than 2 samples or for different d.
    """
    a, b = (x if isinstance(x, FeatureStats) else FeatureStats(rows(x).shape[1]).update(x) for x in (a, b))
    if len(a.mean) != len(b.mean):
        raise UserError(f"features of {len(a.mean)} and {len(b.mean)} dimensions have no distance")
    # (A B)^(1/2) has the trace of (A^(1/2) B A^(1/2))^(1/2), which is symmetric: no complex roots can arise.
    values, vectors = torch.linalg.eigh(a.cov)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    trace = torch.linalg.eigvalsh(root @ b.cov @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * trace
    return max(0.0, distance.item())  # rounding can reach below zero


def inception_score(logits, splits=10):
    """exp of the mean KL(p(y|x) || p(y)) (arXiv 1606.03498) -> (mean, standard deviation) over the splits, >= 1.

    logits [n,k] in random order, cut into `splits` parts. Raises UserError for fewer than `splits` samples.
    """
    logits = rows(logits)
    if not 1 <= splits <= len(logits):
        raise UserError(f"{len(logits)} samples cannot be cut into {splits} splits")
    scores = []
    for part in logits.tensor_split(splits):
        log_p = part.log_softmax(dim=1)
        log_mean = log_p.logsumexp(dim=0) - np.log(len(part))  # log p(y)
        scores.append((log_p.exp() * (log_p - log_mean)).sum(dim=1).mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


def kernel_distance(x, y, block=2048):
    """Unbiased squared MMD of features x[n,d], y[m,d] under (x.y / d + 1)^3 (KID; arXiv 1801.01401), a float.

    Over the full sample, so it has no random part; it may be slightly negative. Raises UserError for fewer than 2
    samples or for different d.
    """
    x, y = same_width(x, y)

    def kernel_sum(a, b):
        return sum((part @ b.T / a.shape[1] + 1).pow(3).sum() for part in a.split(block))

    def mean_without_diagonal(a):
        diagonal = (a.square().sum(dim=1) / a.shape[1] + 1).pow(3).sum()
        return (kernel_sum(a, a) - diagonal) / (len(a) * (len(a) - 1))

    return (mean_without_diagonal(x) + mean_without_diagonal(y) - 2 * kernel_sum(x, y) / (len(x) * len(y))).item()


def precision_recall(real, fake, k=5, block=2048):
    """Improved precision and recall (arXiv 1904.06991), density and coverage (2002.09797) of features [n,d], [m,d].

    k: the neighbour that sets each ball's radius. Returns {"precision", "recall", "density", "coverage"}; all but
    density lie in [0,1]. Raises UserError unless there are more than k samples of each, of one d.
    """
    real, fake = same_width(real, fake)
    if not 1 <= k < min(len(real), len(fake)):
        raise UserError(f"k must be from 1 to {min(len(real), len(fake)) - 1}, not {k}")

    def radii(x):  # distance to the k-th neighbour; the point itself is the nearest of all
        return torch.cat([torch.cdist(part, x).kthvalue(k + 1, dim=1).values for part in x.split(block)])

    real_radii, fake_radii = radii(real), radii(fake)
    in_real, recalled, covered = [], [], []
    for part, part_radii in zip(real.split(block), real_radii.split(block)):
        distance = torch.cdist(part, fake)  # [block,m]
        inside = distance <= part_radii[:, None]
        in_real.append(inside.sum(dim=0))
        covered.append(inside.any(dim=1))
        recalled.append((distance <= fake_radii).any(dim=1))
    in_real = torch.stack(in_real).sum(dim=0)  # in how many balls of real samples each fake lies, [m]
    return {
        "precision": (in_real > 0).double().mean().item(),
        "recall": torch.cat(recalled).double().mean().item(),
        "density": in_real.double().mean().item() / k,
        "coverage": torch.cat(covered).double().mean().item(),
    }


def same_width(x, y):
    x, y = rows(x), rows(y)
    if x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise UserError(f"at least 2 samples each, of one length, are needed, not {list(x.shape)} and {list(y.shape)}")
    return x, y


def score(extractor, real, fake):
    """All scores of fake against real, each (features [n,d], logits [n,k]), under the names to print, as a dict.

    IS takes 10 splits, or as many as there are samples; precision and the like the 5th neighbour, or the last there is.
    """
    mean, std = inception_score(fake[1], min(10, len(fake[1])))
    scores = {
        extractor.label("FID"): frechet_distance(real[0], fake[0]),
        extractor.label("IS"): mean,
        "IS std": std,
        extractor.label("KID"): kernel_distance(real[0], fake[0]),
    }
    return scores | precision_recall(real[0], fake[0], min(5, len(real[0]) - 1, len(fake[0]) - 1))


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def extract_folder(extractor, folder, batch=64):
    """Features and logits of all images in a folder, searched recursively; images of one size share a batch."""
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
    if len(files) < 2:
        raise UserError(f"{folder} holds {len(files)} images; at least 2 are needed")
    parts, pending = [], []
    for path in files + [None]:
        image = pil_to_tensor(pil_loader(path)) if path else None
        if pending and (image is None or len(pending) == batch or image.shape != pending[0].shape):
            parts.append(extract(extractor, torch.stack(pending), batch))
            pending = []
        pending.append(image)
    return tuple(torch.cat(part) for part in zip(*parts))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("real", help="folder of real images")
    parser.add_argument("fake", help="folder of generated images")
    parser.add_argument("--extractor", default="inception", help="inception, a weights file or a .pt2 program")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    try:
        try:
            torch.zeros(1, device=args.device)
        except (RuntimeError, AssertionError) as error:  # AssertionError: torch built without CUDA
            raise UserError(f"no device {args.device!r} here: {str(error).splitlines()[0]}")
        extractor = load_extractor(args.extractor, args.device)
        real, fake = (extract_folder(extractor, folder) for folder in (args.real, args.fake))
        # Files are often sorted by class, and each split of the Inception Score needs all classes.
        order = torch.randperm(len(fake[0]), generator=torch.Generator().manual_seed(0))
        print(f"{extractor.name}: {len(fake[0])} images of {args.fake} against {len(real[0])} of {args.real}")
        for name, value in score(extractor, real, tuple(part[order] for part in fake)).items():
            print(f"{name:24} {value:.4f}")
    except (UserError, OSError) as error:
        print(f"metrics.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
