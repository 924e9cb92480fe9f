# SPDX-License-Identifier: MIT
"""Scores of generated images: FID, Inception Score, KID, precision and recall, density and coverage, SWD.

    python metrics.py REAL FAKE                            # two folders of images, or .npz or .npy of uint8 images
    python metrics.py REAL --out real.npz                  # REAL's statistics, which stand for it in later calls
    python metrics.py REAL FAKE --extractor net.pt2 --metrics fid,is,kid,prdc,swd --json

Every score comes with what made it: network, weights, resize mode, precision and the numbers of images. A Frechet
distance is called FID only where Inception v3 with published weights made the features. Under torchrun, each process
looks at its share of the images.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.export.passes import move_to_device_pass
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.models import Inception_V3_Weights, inception_v3
from torchvision.models.inception import BasicConv2d
from torchvision.transforms.functional import pil_to_tensor

INCEPTION = {  # the first digits of the SHA-256 of published Inception v3 weights
    "0cc3c7bd": "Inception v3 (torchvision)",
    "6726825d": "Inception v3 (TensorFlow)",  # of the original FID, as pytorch-fid and torch-fidelity distribute them
}
RESIZES = ("bilinear", "clean", "tf1")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NEIGHBOUR = 5  # the one that sets a ball's radius in precision and recall
SUBSET = 1000  # images in a subset of KID


class UserError(ValueError):
    """Something asked for cannot be done; the message says what would work."""


class WeightsMissing(UserError):
    """Inception's weights are neither here nor to be downloaded."""


# ---------------------------------------------------------------------------------------------------------------------
# Feature extractors


class Extractor:
    """A network that looks at images: extractor(images) -> (features [N,d], logits [N,k] or None), float32.

    images: [N,1 or 3,H,W], uint8, or float in [0,1], which is rounded to the 256 levels a file has; gray is repeated.
    made_by: {"network", "weights", "resize", "precision"}, what a score must name to be compared; weights are the first
    16 digits of a SHA-256. batch: how many images at a time are fastest.
    """

    def __init__(self, network, name, weights, device="cpu", resize="native", precision="float32"):
        self.network, self.device = network, torch.device(device)
        self.made_by = {"network": name, "weights": weights[:16], "resize": resize, "precision": precision}
        self.batch = 8 if self.device.type == "cpu" else 64  # on a CPU, what stays in its caches

    @property
    def name(self):
        return self.made_by["network"]

    @torch.no_grad()
    def __call__(self, images):
        images = images.to(self.device)
        if images.is_floating_point():
            if not (images.min() >= 0 and images.max() <= 1):
                raise UserError("float images must lie in [0,1]")
            images = (images * 255).round()
        elif images.dtype != torch.uint8:
            raise UserError(f"images must be uint8, or float in [0,1], not {images.dtype}")
        try:
            with torch.autocast(self.device.type, enabled=False), without_tf32():
                outputs = self.network(images.expand(-1, 3, -1, -1).float() / 255)
            features, logits = (outputs, None) if isinstance(outputs, torch.Tensor) else outputs
            for x in (features,) if logits is None else (features, logits):
                if x.ndim != 2 or len(x) != len(images):
                    raise ValueError(f"it gives {list(x.shape)}")
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a program fails in its own ways on what it was not made for
            raise UserError(
                f"{self.name} makes no features [N,d], or (features, logits [N,k]), of {list(images.shape)}: "
                f"{reason(error)}"
            )
        return features.float(), None if logits is None else logits.float()


@contextlib.contextmanager
def without_tf32():
    """float32 means float32: by default, cuDNN takes TF32 for it, whose 10 bits move features by about 1e-3."""
    if hasattr(torch.backends.cudnn, "conv"):  # torch 2.9 and later, which refuse to have the old names mixed in
        places, name, off = (torch.backends.cudnn.conv, torch.backends.cuda.matmul), "fp32_precision", "ieee"
    else:
        places, name, off = (torch.backends.cudnn, torch.backends.cuda.matmul), "allow_tf32", False
    before = [getattr(place, name) for place in places]
    try:
        for place in places:
            setattr(place, name, off)
        yield
    finally:
        for place, value in zip(places, before):
            setattr(place, name, value)


def label(score, made_by):
    """The score's name in print: FID, KID and IS are those of Inception; of another network it is named."""
    if made_by.get("weights", "")[:8] in INCEPTION:
        return score
    score = score.replace("FID", "FD", 1)
    return f"{score}({made_by['network']})" if made_by else score


def reason(error):
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


class Inception(nn.Module):
    """Inception v3 for scores: images [N,3,H,W] in [0,1] -> (pooled features [N,2048], logits), both float32.

    state_dict: torchvision's, with 1,000 classes, or the TensorFlow network's with 1,008 under the same names. The
    latter pools differently (average pools leave the padding out, the last block takes the maximum), and its Inception
    Score has always been computed from logits without their bias, so these are its logits.
    """

    def __init__(self, state_dict, resize, dtype):
        super().__init__()
        self.resize, self.dtype = resize, dtype
        classes = len(state_dict["fc.weight"])
        net = inception_v3(weights=None, init_weights=False, aux_logits=False, num_classes=classes)
        net.load_state_dict({k: v for k, v in state_dict.items() if not k.startswith("AuxLogits.")})
        net.eval()
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
    """A block of torchvision's Inception v3 with another pooling in its last branch."""

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


def load_extractor(spec, device="cpu", resize=None, precision="float32"):
    """The Extractor that spec names.

    "inception": Inception v3 with torchvision's ImageNet weights, found where torchvision keeps them or downloaded.
    A path to a .pt2 file: a torch.export program, images [N,3,H,W] in [0,1] -> features or (features, logits), which
    sees images in their own size; it must have been exported in eval mode. Another path: a state_dict of Inception v3,
    torchvision's (fc.weight of 1,000 rows) or the TensorFlow network's (1,008 rows).
    resize: one of RESIZES, by default tf1 for the TensorFlow network and bilinear for torchvision's. precision: float32
    or bfloat16, which is faster and moves Inception's features by about 0.4%.
    Raises WeightsMissing if "inception" cannot be had, UserError for a file that does not fit.
    """
    if resize not in (None, *RESIZES) or precision not in PRECISIONS:
        raise UserError(f"resize must be one of {', '.join(RESIZES)} and precision one of {', '.join(PRECISIONS)}")
    path, state_dict = Path(spec), None
    if spec == "inception":
        weights = Inception_V3_Weights.IMAGENET1K_V1
        path = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[1]
        try:
            state_dict = weights.get_state_dict(progress=False, check_hash=True)  # downloaded if it is not there
        except Exception as error:  # no network, a file cut off or of another kind, a full disk
            raise WeightsMissing(
                f"no Inception weights ({reason(error)}): put {path.name} into {path.parent}, or name a weights file "
                f"or a .pt2 program with --extractor"
            )
    if not path.is_file():
        raise UserError(f"no extractor {spec}: give inception, a weights file or a .pt2 program")
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    try:
        if path.suffix == ".pt2":
            if resize or precision != "float32":
                raise UserError(f"{spec} fixes its own input size and precision: leave out --resize and --precision")
            if not zipfile.is_zipfile(path):  # torch.export would log a traceback
                raise ValueError("it is not whole")
            program = move_to_device_pass(torch.export.load(path), str(device))
            return Extractor(program.module(), path.stem, checksum, device)
        state_dict = state_dict or torch.load(path, map_location="cpu", weights_only=True)
        resize = resize or ("tf1" if len(state_dict["fc.weight"]) == 1008 else "bilinear")
        network = Inception(state_dict, resize, PRECISIONS[precision]).to(device).eval()
        return Extractor(network, INCEPTION.get(checksum[:8], path.stem), checksum, device, resize, precision)
    except UserError:
        raise
    except Exception as error:  # torch raises of every kind for files of another kind
        raise UserError(
            f"{spec} is neither a .pt2 program that torch {torch.__version__} can read nor weights of "
            f"Inception v3: {reason(error)}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Images


class Folder:
    """The images below a folder, as a sequence of uint8 [3,H,W]; None stands for one that cannot be read.

    Hidden files are left out, and links to folders are not followed. labels: the index of each image's class among
    `classes`, the folder's sub-folders in natural order (2 before 10); both None if an image lies beside them. skipped:
    the files that were found unreadable so far, with the reasons. Raises UserError if there is no such folder.
    """

    def __init__(self, path):
        self.path, self.skipped = Path(path), []
        if not self.path.is_dir():
            raise UserError(f"{path} is no folder")
        self.files = sorted(
            file.relative_to(path)
            for file in self.path.rglob("[!.]*")
            if file.suffix.lower() in IMG_EXTENSIONS and file.is_file()
        )
        self.classes = self.labels = None
        if all(len(file.parts) > 1 for file in self.files):
            self.classes = sorted({file.parts[0] for file in self.files}, key=natural_order)
            self.labels = torch.tensor([self.classes.index(file.parts[0]) for file in self.files])

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        from PIL import Image  # torchvision's own image library, since its decoders in torchvision.io are deprecated

        try:
            with Image.open(self.path / self.files[i]) as file:
                if file.mode.startswith(("I", "F")):  # its conversion to RGB would cut off all above 255
                    raise ValueError("more than 8 bits a channel")
                return pil_to_tensor(file.convert("RGB"))
        except Exception as error:  # decoders raise errors of every kind for files that are damaged or no images
            self.skipped.append(f"{self.files[i]} ({reason(error)})")


def natural_order(name):
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


class Arrays:
    """uint8 images of an .npy or .npz file, [N,H,W], [N,H,W,1 or 3] or [N,1 or 3,H,W], as a sequence of [3,H,W].

    In an .npz they are called images or arr_0; labels [N], if there are any, are classes' indices or names.
    """

    def __init__(self, path):
        self.classes, self.labels, self.skipped = None, None, []
        try:
            content = np.load(path, mmap_mode="r")
            if isinstance(content, np.ndarray):
                self.images = content
            else:
                self.images = content["images" if "images" in content else "arr_0"]
                self.labels = content["labels"] if "labels" in content else None
        except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{path} holds neither statistics (mu, sigma) nor images (images or arr_0): {reason(error)}"
            )
        shape = self.images.shape
        self.channels_last = len(shape) == 4 and shape[3] in (1, 3)
        channels = 1 if len(shape) == 3 else shape[3 if self.channels_last else 1] if len(shape) == 4 else None
        if self.images.dtype != np.uint8 or channels not in (1, 3):
            raise UserError(
                f"{path} holds {self.images.dtype} {list(shape)}; images are uint8 of [N,H,W], [N,H,W,C] or [N,C,H,W], "
                f"C = 1 or 3"
            )
        if self.labels is not None:
            if self.labels.shape != shape[:1] or self.labels.dtype.kind not in "iuU":
                kind = f"{self.labels.dtype} {list(self.labels.shape)}"
                raise UserError(f"{path} holds {shape[0]} images, but labels {kind}; give one number or name each")
            if self.labels.dtype.kind == "U":
                self.classes = sorted(set(self.labels.tolist()), key=natural_order)
                self.labels = np.array([self.classes.index(name) for name in self.labels.tolist()])
            self.labels = torch.from_numpy(self.labels.astype(np.int64))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image = torch.from_numpy(np.array(self.images[i]))
        image = image.permute(2, 0, 1) if self.channels_last else image[None] if image.ndim == 2 else image
        return image.expand(3, -1, -1)


def open_set(path):
    """What a path holds: FeatureStats, Folder or Arrays. Raises UserError for others and for less than 2 images."""
    path = Path(path)
    if path.suffix in (".npz", ".npy") and path.is_file():
        if path.suffix == ".npz":
            with contextlib.suppress(OSError, ValueError, zipfile.BadZipFile), np.load(path) as content:
                if "mu" in content:
                    return FeatureStats.load(path)
        images = Arrays(path)
    elif path.is_dir():
        images = Folder(path)
    else:
        raise UserError(f"{path} is neither a folder of images nor an .npz or .npy of images or statistics")
    if len(images) < 2:
        raise UserError(f"{path} holds {len(images)} images ({', '.join(IMG_EXTENSIONS)}); at least 2 are needed")
    return images


def batches(images, size, indices):
    """Yields (indices, uint8 images [b,C,H,W]), b <= size, of one shape each; read by threads, a chunk ahead.

    images: a tensor [N,C,H,W], a Folder or Arrays. Images that cannot be read are left out.
    """
    at_once = max(size, 32)  # images of all shapes
    chunks = [indices[i : i + at_once] for i in range(0, len(indices), at_once)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        ahead = pool.map(images.__getitem__, chunks[0]) if chunks else ()
        for k, chunk in enumerate(chunks):
            items = list(ahead)
            ahead = pool.map(images.__getitem__, chunks[k + 1]) if k + 1 < len(chunks) else ()
            of_shape = {}
            for i, image in zip(chunk, items):
                if image is not None:
                    of_shape.setdefault(image.shape, []).append((i, image))
            for group in of_shape.values():
                for j in range(0, len(group), size):
                    index, part = zip(*group[j : j + size])
                    yield list(index), torch.stack(part)


def observe(extractor, images, progress=None):
    """Yields (indices, features, logits or None) on the CPU, for this process's share of the images."""
    done = 0
    for index, batch in batches(images, extractor.batch, range(rank(), len(images), world_size())):
        features, logits = extractor(batch)
        done += len(index) * world_size()
        if progress:
            progress(min(done, len(images)), len(images))
        yield index, features.cpu(), None if logits is None else logits.cpu()


def world_size():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    return dist.get_rank() if world_size() > 1 else 0


def gather(work):
    """What work() returns in each process, in the order of their ranks; a UserError in one of them is raised in all."""
    try:
        part = work()
    except UserError as error:
        part = error
    parts = [part] * world_size()
    if len(parts) > 1:
        dist.all_gather_object(parts, part)
    if errors := [part for part in parts if isinstance(part, UserError)]:
        raise errors[0]
    return parts


def extract(extractor, images, progress=None):
    """Features [N,d] and logits [N,k] (or None), float32 on the CPU, of images [N,C,H,W], uint8 or float in [0,1].

    Images that cannot be read are left out. Under torch.distributed each process looks at its share and all get all.
    """
    seen = list(itertools.chain(*gather(lambda: list(observe(extractor, images, progress)))))
    if not seen:
        raise UserError("no readable image")
    index, features, logits = zip(*seen)
    order = torch.tensor(list(itertools.chain(*index))).argsort()
    return torch.cat(features)[order], None if logits[0] is None else torch.cat(logits)[order]


def save_npz(path, **arrays):
    """Writes an .npz that appears only when it is whole."""
    unfinished = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "wb") as file:
            np.savez(file, **arrays)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


def rows(x):
    """A float64 copy of x, an array or a tensor [n,d], on the CPU. Raises UserError for another shape, nan and inf."""
    x = torch.as_tensor(x).detach().to("cpu", torch.float64, copy=True)
    if x.ndim != 2:
        raise UserError(f"features must be of shape [n,d], not {list(x.shape)}")
    if not x.sum().isfinite():
        raise UserError("features must be finite; some are nan or infinite")
    return x


class FeatureStats:
    """Mean and covariance of features [n,dim] gathered part by part, in float64 and in constant memory.

    n: samples, or None where a file does not tell. mean [dim]. cov [dim,dim], divided by n - 1. factor [r,dim],
    r <= dim: factor^T factor = cov. made_by: see Extractor; empty where unknown. The order and the parts do not matter.
    """

    # What is kept is a factor R of the scatter matrix: R^T R = sum of (x - mean)(x - mean)^T. Up to dim samples, R is
    # just the centred samples; beyond, a QR decomposition shrinks it. Unlike a sum of squares, it keeps the digits of
    # the small directions, needs no rule for singular matrices, and takes as long: 5,000 x 2,048 in 0.45 s against
    # 0.37 s for the matrix product and 0.06 s for the Cholesky factor which would have to follow.

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
        if sum(map(len, self._pending)) >= max(self.dim, 1024):  # decompositions of single samples would take long
            self._fold()
        return self

    def merge(self, other):
        """Adds what another FeatureStats has gathered; returns self. Raises UserError unless both were made alike."""
        check_same(self, other)
        if self.n == 0:
            self.made_by = self.made_by or other.made_by
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
            raise UserError("statistics that do not tell their number of samples cannot be added to")
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
        """Statistics of a given mean [dim] and covariance [dim,dim]. Raises UserError if they are none."""
        mean, cov = rows(torch.as_tensor(mean)[None])[0], rows(cov)
        if cov.shape != (len(mean), len(mean)):
            raise UserError(f"a mean of {len(mean)} and a covariance of {list(cov.shape)} do not go together")
        values, vectors = torch.linalg.eigh((cov + cov.T) / 2)
        # Rounding leaves eigenvalues of this size, of either sign, where there should be none. Their roots would count.
        rounding = values.abs().max() * len(mean) * torch.finfo(torch.float64).eps
        if values.min() < -max(1e-6 * values.max(), rounding):
            raise UserError("a covariance has no negative eigenvalues")
        kept = values > rounding
        stats = cls(len(mean), made_by)
        stats._n, stats._mean = n, mean
        stats._scatter_factor = (vectors[:, kept] * (values[kept] * (1 if n is None else n - 1)).sqrt()).T
        return stats

    def save(self, npz):
        """Writes mu and sigma, named as pytorch-fid names them, n, and what made them."""
        save_npz(npz, mu=self.mean, sigma=self.cov, **({} if self.n is None else {"n": self.n}), **self.made_by)

    @classmethod
    def load(cls, npz):
        """What `save` wrote, or another tool's mu and sigma. Raises UserError for another file."""
        try:
            with np.load(npz) as file:
                told = [k for k in ("network", "weights", "resize", "precision") if k in file]
                made_by = {k: str(file[k]) for k in told} if len(told) == 4 else None
                n = int(file["n"]) if "n" in file else None
                return cls.from_moments(file["mu"], file["sigma"], n, made_by)
        except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(f"{npz} holds no feature statistics: {reason(error)}")


def check_same(a, b):
    """Raises UserError unless two FeatureStats come from one network and resize mode, as far as they tell."""
    check_alike(a.made_by, b.made_by)
    if a.dim != b.dim:
        raise UserError(f"features of {a.dim} and {b.dim} dimensions cannot be compared")


def check_alike(a, b):
    if a and b and a | {"network": None} != b | {"network": None}:  # the weights tell more than a file's name
        raise UserError(f"statistics by {describe(a)} and features by {describe(b)} cannot be compared")


def describe(made_by):
    return "{network}, weights {weights:.8}, resize {resize}, {precision}".format(**made_by)


class PredictionStats:
    """What the Inception Score of n images needs of their predictions over k classes, in constant memory.

    The n places are cut into `splits` parts, or n if those are fewer; a seed shuffles them first.
    """

    def __init__(self, n, k, splits=10, seed=None):
        if n < 1 or splits < 1:
            raise UserError(f"the Inception Score needs images and splits, not {n} and {splits}")
        splits = min(splits, n)
        order = torch.arange(n) if seed is None else torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        self.split_of = torch.empty(n, dtype=torch.int64)
        self.split_of[order] = ((torch.arange(n) + 1) * splits - 1) // n  # cut as torch-fidelity cuts them
        self.count = torch.zeros(splits, dtype=torch.float64)
        self.entropy = torch.zeros(splits, dtype=torch.float64)  # summed over images
        self.sum_p = torch.zeros(splits, k, dtype=torch.float64)  # [splits,k]

    def update(self, logits, index):
        """Adds logits [b,k] of the images at the places index[b]; returns self."""
        log_p, split = rows(logits).log_softmax(dim=1), self.split_of[torch.as_tensor(index)]
        p = log_p.exp()
        self.count.index_add_(0, split, torch.ones_like(split, dtype=torch.float64))
        self.entropy.index_add_(0, split, -(p * log_p).sum(dim=1))
        self.sum_p.index_add_(0, split, p)
        return self

    def merge(self, other):
        """Adds the sums of another process for other places among the same n; returns self."""
        self.count += other.count
        self.entropy += other.entropy
        self.sum_p += other.sum_p
        return self

    def score(self):
        """exp of (entropy of the mean prediction - mean entropy of predictions): mean and deviation over the splits."""
        nonempty = self.count > 0  # a split may have lost all of its images as unreadable
        count, entropy, sum_p = self.count[nonempty], self.entropy[nonempty], self.sum_p[nonempty]
        scores = (torch.special.entr(sum_p / count[:, None]).sum(dim=1) - entropy / count).exp()
        return scores.mean().item(), scores.std(correction=0).item()


class Summary:
    """What the scores need to know of a set of images that an extractor looked at.

    n; stats, a FeatureStats; predictions, a PredictionStats, None without logits; if kept, features [n,d], float32, and
    index [n], the images' places in the set, ascending.
    """

    def __init__(self, stats, predictions=None):
        self.stats, self.predictions, self.parts = stats, predictions, []

    @classmethod
    def of(cls, extractor, features):
        """The Summary of features [n,d] that the extractor made of n images."""
        return cls(FeatureStats(features.shape[1], extractor.made_by)).update(range(len(features)), features)

    def update(self, index, features, logits=None, keep=True):
        self.stats.update(features)
        if logits is not None:
            self.predictions.update(logits, index)
        if keep:
            self.parts.append((torch.as_tensor(index), features))
        return self

    @property
    def n(self):
        return self.stats.n

    @property
    def index(self):
        return torch.cat([index for index, _ in self.parts]).sort().values

    @property
    def features(self):
        if not self.parts:
            raise UserError("the features were not kept: measure with keep=True")
        index, features = (torch.cat(x) for x in zip(*self.parts))
        return features[index.argsort()]

    def merge(self, other):
        self.stats.merge(other.stats)
        if self.predictions:
            self.predictions.merge(other.predictions)
        self.parts += other.parts
        return self


def measure(extractor, images, keep=True, splits=10, seed=0, progress=None):
    """The Summary of images: a tensor [N,C,H,W], uint8 or float in [0,1], a Folder or Arrays.

    keep: whether to keep features, 4 d bytes an image; without them, the Frechet distance and IS can still be had.
    splits, seed: of the Inception Score. Under torch.distributed each process looks at its share and all get the whole.
    """

    def look():
        summary = None
        for index, features, logits in observe(extractor, images, progress):
            if summary is None:
                stats = FeatureStats(features.shape[1], extractor.made_by)
                sums = None if logits is None else PredictionStats(len(images), logits.shape[1], splits, seed)
                summary = Summary(stats, sums)
            summary.update(index, features, logits, keep)
        return summary

    whole, *others = [part for part in gather(look) if part] or [None]
    if whole is None:
        raise UserError("no readable image")
    for other in others:
        whole.merge(other)
    return whole


def measure_cached(extractor, images, folder, progress=None):
    """The Summary of uint8 images [N,C,H,W], without predictions; the features are kept in the folder.

    Their file's name is a key of the images' content and of what looked at them.
    """
    content = hashlib.sha256(np.ascontiguousarray(images.numpy())).hexdigest()
    key = hashlib.sha256(f"{list(images.shape)} {content} {extractor.made_by}".encode()).hexdigest()[:32]
    file = Path(folder) / f"features-{key}.npz"
    try:
        with np.load(file) as cached:
            return Summary.of(extractor, torch.from_numpy(cached["features"]))
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):  # not there, or not whole
        features = measure(extractor, images, progress=progress).features
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, not the result
        file.parent.mkdir(parents=True, exist_ok=True)
        save_npz(file, features=features)
    return Summary.of(extractor, features)


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def as_stats(x):
    if isinstance(x, FeatureStats):
        return x
    x = rows(x)
    return FeatureStats(x.shape[1]).update(x)


def frechet_distance(a, b):
    """Frechet distance of two normal distributions (FID for Inception's features; arXiv 1706.08500), a float >= 0.

    a, b: FeatureStats, or features [n,d]. |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)), in float64. Raises UserError
    for fewer than 2 samples, different d, or statistics made by different networks.
    """
    # tr (A B)^(1/2) is the sum of the singular values of X Y^T, where A = X^T X and B = Y^T Y: real, and exact where A
    # and B are singular. Eigenvalues of A B, of X B X^T or of a Gram matrix are the squares of those values: faster
    # (0.24 s against 0.85 s at d = 2048), but rounding hides values below 1e-8 of the largest, and they add up.
    a, b = as_stats(a), as_stats(b)
    check_same(a, b)
    X, Y = a.factor, b.factor
    spread = X.square().sum() + Y.square().sum()
    distance = spread - 2 * torch.linalg.svdvals(X @ Y.T).sum()
    if distance < 1e-5 * spread:
        # The difference loses digits where A and B nearly agree. The same as a sum of squares: |Q X - Y|^2 for the
        # orthogonal Q that makes it least.
        X, Y = (F.pad(z, (0, 0, 0, max(len(X), len(Y)) - len(z))) for z in (X, Y))
        U, _, Vh = torch.linalg.svd(X @ Y.T)
        distance = (U.T @ X - Vh @ Y).square().sum()
    return (distance + (a.mean - b.mean).square().sum()).item()


def draw(x, n, generator):
    """n samples of x [m,...], or all if those are fewer, in random order without replacement."""
    return x[torch.randperm(len(x), generator=generator)[:n]]


def frechet_infinity(real, fake, sizes=15, seed=0):
    """The Frechet distance for infinitely many samples of the generator, a float (arXiv 1911.07023).

    real: FeatureStats or features [n,d]; fake: features [m,d], m >= 20. Distances of random parts of fake, from half
    of it to all, are extrapolated along a line in 1 / size. It may be slightly negative.
    """
    real, fake = as_stats(real), rows(fake)
    if len(fake) < 20:
        raise UserError(f"an extrapolation needs at least 20 samples, not {len(fake)}")
    # Smaller parts would steady the line, but it bends: at d = 200, 1,000 samples and a distance of 1.05, parts from a
    # tenth on give 0.08 and parts from a half on 0.96.
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.linspace(len(fake) / 2, len(fake), sizes).long()
    distances = [frechet_distance(real, draw(fake, n, generator)) for n in numbers]
    line = torch.stack([torch.ones(sizes, dtype=torch.float64), 1 / numbers.double()], dim=1)
    return torch.linalg.lstsq(line, torch.tensor(distances, dtype=torch.float64)[:, None]).solution[0].item()


def frechet_interval(real, fake, level=0.95, resamples=100, seed=0):
    """A bootstrap interval (low, high) for the Frechet distance of this many samples of the generator, at that level.

    real: FeatureStats or features [n,d], taken as they are; fake: features [m,d], m >= 4, resampled.
    """
    # Halves drawn without replacement vary as much as samples of the whole size do. Copies, which a resample with
    # replacement holds, lower the rank: simulated at d = 200, it is 4.7 times too wide for 100 samples and 2.2 times
    # for 1,000; halves are 1.2 and 1.4 times too wide. The bias of both is taken away by centring.
    real, fake = as_stats(real), rows(fake)
    if len(fake) < 4 or resamples < 2 or not 0 < level < 1:
        raise UserError(f"no interval of level {level} from {len(fake)} samples (at least 4) and {resamples} resamples")
    generator = torch.Generator().manual_seed(seed)
    halves = (draw(fake, len(fake) // 2, generator) for _ in range(resamples))
    distances = np.array([frechet_distance(real, half) for half in halves])
    spread = np.quantile(distances - distances.mean(), [(1 - level) / 2, (1 + level) / 2])
    return tuple((frechet_distance(real, fake) + spread).clip(min=0).tolist())


def frechet_by_class(real, real_labels, fake, fake_labels):
    """The Frechet distance within each class, {label: (distance, number of real, number of fake)}.

    real [n,d], fake [m,d]: features; labels [n], [m]: numbers or names. Raises UserError where a class has fewer than 2
    samples on a side.
    """
    real, fake, real_labels, fake_labels = rows(real), rows(fake), np.asarray(real_labels), np.asarray(fake_labels)
    if (len(real), len(fake)) != (len(real_labels), len(fake_labels)):
        raise UserError(f"{len(real_labels)} and {len(fake_labels)} labels for {len(real)} and {len(fake)} samples")
    result = {}
    for c in np.union1d(real_labels, fake_labels).tolist():
        in_real, in_fake = real[real_labels == c], fake[fake_labels == c]
        if min(len(in_real), len(in_fake)) < 2:
            raise UserError(f"class {c} has {len(in_real)} real and {len(in_fake)} generated images, not 2 of each")
        result[c] = (frechet_distance(in_real, in_fake), len(in_real), len(in_fake))
    return result


def inception_score(logits, splits=10, seed=None):
    """exp of the mean KL(p(y|x) || p(y)) (arXiv 1606.03498) -> (mean, standard deviation) over the splits, >= 1.

    logits [n,k] are cut into `splits` parts, or n if those are fewer. They should be in random order; a seed shuffles
    them. The deviation is that of the splits themselves (divided by their number).
    """
    logits = rows(logits)
    return PredictionStats(*logits.shape, splits, seed).update(logits, range(len(logits))).score()


def kernel_distance(x, y, block=512):
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


def kernel_distance_subsets(x, y, subsets=100, size=SUBSET, seed=0):
    """`kernel_distance` of random subsets -> (mean, standard deviation), the usual protocol of KID.

    size: at most half of the smaller set, or the subsets would be nearly the same. Raises UserError below 4 samples.
    """
    x, y = same_width(x, y)
    size = min(size, len(x) // 2, len(y) // 2)
    if size < 2 or subsets < 1:
        raise UserError(f"no {subsets} subsets of 2 or more in half of {min(len(x), len(y))} samples")
    generator = torch.Generator().manual_seed(seed)
    distances = [kernel_distance(draw(x, size, generator), draw(y, size, generator)) for _ in range(subsets)]
    return float(np.mean(distances)), float(np.std(distances))


def precision_recall(real, fake, k=NEIGHBOUR, block=512):
    """Improved precision and recall (arXiv 1904.06991), density and coverage (2002.09797) of features [n,d], [m,d].

    k: the neighbour that sets each closed ball's radius. Returns {"precision", "recall", "density", "coverage"}; all
    but density lie in [0,1]. Raises UserError unless there are more than k samples of each, of one d.
    """
    real, fake = same_width(real, fake)
    if not 1 <= k < min(len(real), len(fake)):
        raise UserError(f"k must be from 1 to {min(len(real), len(fake)) - 1}, not {k}")
    center = real.mean(dim=0)
    real, fake = real - center, fake - center  # near zero the products below keep their digits

    def distances(a, b):  # squared, [n,m]; what rounding leaves of a distance between equal points is none
        scale = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)
        d = scale - 2 * a @ b.T
        return torch.where(d > 1e-12 * scale, d, 0)

    def radii(x):  # distance to the k-th neighbour; the point itself is the nearest of all
        radius = torch.cat([distances(part, x).kthvalue(k + 1, dim=1).values for part in x.split(block)])
        return radius * (1 + 1e-9)  # a copy of that neighbour on the other side lies in the ball, however it is rounded

    real_radii, fake_radii = radii(real), radii(fake)
    in_real, recalled, covered = 0, [], []
    for part, part_radii in zip(real.split(block), real_radii.split(block)):
        distance = distances(part, fake)  # [block,m]
        inside = distance <= part_radii[:, None]
        in_real = in_real + inside.sum(dim=0)  # in how many balls of real samples each fake lies, [m]
        covered.append(inside.any(dim=1))
        recalled.append((distance <= fake_radii).any(dim=1))
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


def sliced_wasserstein(real, fake, seed=0):
    """Sliced Wasserstein distances of patches (arXiv 1710.10196), times 1000: {"SWD": mean, "SWD 32": ...}.

    No network is needed. real, fake: uint8 images [n,C,H,W], [m,C,H,W] of one size from 16 pixels, tensors, Folder or
    Arrays. At each level of the Laplacian pyramid down to 16 pixels, patches of 7 x 7, 128 of an image but at most
    2^17 in all, are normalised by channel and compared along 512 random directions.
    """
    real, fake = (laplacian_patches(images, torch.Generator().manual_seed(seed)) for images in (real, fake))
    if [(size, x.shape[1]) for size, x in real.items()] != [(size, x.shape[1]) for size, x in fake.items()]:
        raise UserError("SWD needs images of one size and kind on both sides")
    generator = torch.Generator().manual_seed(seed)
    levels = {f"SWD {size}": slice_distance(real[size], fake[size], generator) for size in real}
    return {"SWD": sum(levels.values()) / len(levels)} | levels


def laplacian_patches(images, generator, size=7, per_image=128, most=2**17):
    """{level's height, or HxW: patches [P,C,size,size]} from random places in images [n,C,H,W]."""
    per_image = max(1, min(per_image, most // max(1, len(images))))
    levels, shape, count = {}, None, 0
    for _, batch in batches(images, 64, torch.randperm(len(images), generator=generator)[:most].tolist()):
        if shape not in (None, batch.shape[1:]) or min(batch.shape[2:]) < 16:
            raise UserError("SWD needs images of one size, at least 16 x 16")
        shape, count = batch.shape[1:], count + len(batch)
        for level in laplacian_pyramid(batch.cpu().float()):
            n, _, height, width = level.shape
            y, x = (
                torch.randint(side - size + 1, (n, per_image, 1), generator=generator) + torch.arange(size)
                for side in (height, width)
            )
            cut = level.permute(0, 2, 3, 1)[torch.arange(n)[:, None, None, None], y[..., None], x[:, :, None]]
            name = str(height) if height == width else f"{height}x{width}"
            levels.setdefault(name, []).append(cut.flatten(0, 1).permute(0, 3, 1, 2))  # of [n,per_image,size,size,C]
    if count < 2:
        raise UserError(f"SWD needs at least 2 readable images, not {count}")
    return {name: torch.cat(parts) for name, parts in levels.items()}


def laplacian_pyramid(x):
    """x [n,C,H,W] as its bands, finest first: what each halving down to 16 pixels loses, and what remains."""
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
    a, b = normalise(draw(a, n, generator)), normalise(draw(b, n, generator))
    total = 0.0
    for _ in range(directions // at_once):
        lines = F.normalize(torch.randn(a[0].numel(), at_once, generator=generator), dim=0)
        # NumPy sorts several times faster here.
        sorted_a, sorted_b = (np.sort((x.flatten(1) @ lines).T.contiguous().numpy(), axis=1) for x in (a, b))
        total += np.abs(sorted_a - sorted_b).mean(dtype=np.float64).item() * at_once
    return 1000 * total / directions


SCORES = {  # name: (what it is, what it needs of the real side, of the fake side)
    "fid": ("Frechet distance", "stats", "stats"),
    "is": ("Inception Score", None, "predictions"),
    "kid": ("kernel distance of all images", "features", "features"),
    "prdc": ("precision, recall, density, coverage", "features", "features"),
    "swd": ("sliced Wasserstein distance of patches, without a network", "images", "images"),
    "kid-subsets": ("kernel distance as mean and deviation over 100 subsets", "features", "features"),
    "fid-infinity": ("Frechet distance extrapolated to infinitely many samples", "stats", "features"),
    "fid-interval": ("95% bootstrap interval of fid, at this number of images", "stats", "features"),
    "fid-classes": ("Frechet distance within each class (sub-folder, or labels in an .npz)", "labels", "labels"),
}
DEFAULT = ("fid", "is", "kid", "prdc")


def compare(real, fake, names=None, seed=0, labels=None):
    """The named scores of a Summary of generated images against one of real images, under the names to print.

    names: of SCORES, but swd, which is of images; by default all of DEFAULT, IS only if there are logits. labels: (of
    real [n], of fake [m]), for fid-classes. Precision and the like take the 5th neighbour, or the last there is. Raises
    UserError if the two were not made alike or a score cannot be had.
    """
    names = names or [name for name in DEFAULT if name != "is" or fake.predictions]
    if unknown := [name for name in names if name not in SCORES or name == "swd"]:
        raise UserError(f"no score {unknown[0]!r} of two summaries")
    check_same(real.stats, fake.stats)
    made_by = real.stats.made_by or fake.stats.made_by
    fid, kid = label("FID", made_by), label("KID", made_by)
    scores = {}
    if "fid" in names:
        scores[fid] = frechet_distance(real.stats, fake.stats)
    if "fid-infinity" in names:
        scores[f"{fid} infinity"] = frechet_infinity(real.stats, fake.features, seed=seed)
    if "fid-interval" in names:
        low, high = frechet_interval(real.stats, fake.features, seed=seed)
        scores |= {f"{fid} low": low, f"{fid} high": high}
    if "is" in names:
        if fake.predictions is None:
            raise UserError("the Inception Score needs an extractor that gives logits too")
        mean, std = fake.predictions.score()
        scores |= {label("IS", made_by): mean, "IS std": std}
    if "kid" in names:
        scores[kid] = kernel_distance(real.features, fake.features)
    if "kid-subsets" in names:
        mean, std = kernel_distance_subsets(real.features, fake.features, seed=seed)
        scores |= {f"{kid} of subsets": mean, "KID std": std}
    if "prdc" in names:
        scores |= precision_recall(real.features, fake.features, min(NEIGHBOUR, real.n - 1, fake.n - 1))
    if "fid-classes" in names:
        if labels is None:
            raise UserError("fid-classes needs labels of both sides")
        by_class = frechet_by_class(real.features, labels[0], fake.features, labels[1])
        scores[f"{fid} class mean"] = float(np.mean([distance for distance, _, _ in by_class.values()]))
        for c, (distance, n_real, n_fake) in by_class.items():
            scores[f"{fid} of {c} ({n_real} and {n_fake} images)"] = distance
    return scores


def remarks(real, fake, names=DEFAULT):
    """What a reader of the scores of two Summaries must know to compare them, as lines."""
    lines, few = [], min(real.n or 2048, fake.n or 2048)
    if few < 2048 and any(name.startswith("fid") for name in names):
        singular = ", and a covariance of so few is singular" if few <= real.stats.dim else ""
        lines.append(
            f"{few} images bias a Frechet distance upwards{singular}: compare it only at the same numbers of images "
            f"(arXiv 1801.01401, 1911.07023)"
        )
    if "fid-classes" in names:
        lines.append("the distances within classes rest on fewer images each and are biased further")
    if "prdc" in names and few <= NEIGHBOUR:
        lines.append(f"precision, recall, density and coverage take neighbour {few - 1}, not {NEIGHBOUR}")
    if "kid-subsets" in names and few < 2 * SUBSET:
        lines.append(f"the subsets of KID are of {few // 2} images, not {SUBSET:,}")
    if not (real.stats.made_by and fake.stats.made_by):
        lines.append("some statistics do not say what made them: check that it was the same network and resize mode")
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# Command line


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def number_from(least):
    def number(text):
        if not text.isdecimal() or not least <= int(text) < 2**32:
            raise argparse.ArgumentTypeError(f"must be a number from {least} to {2**32 - 1}, not {text}")
        return int(text)

    return number


def make_parser():
    parser = Parser(
        prog="metrics.py",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="scores:\n" + "\n".join(f"  {name:14}{about}" for name, (about, _, _) in SCORES.items()),
        allow_abbrev=False,
    )
    parser.add_argument("real", help="folder of real images, .npz or .npy of uint8 images, or saved statistics")
    parser.add_argument("fake", nargs="?", help="the same of generated images; may be missing with --out")
    parser.add_argument(
        "--extractor", default="inception", help="inception, a weights file or a .pt2 program (inception)"
    )
    parser.add_argument(
        "--resize", choices=RESIZES, help="to Inception's 299 pixels (tf1 for weights of 1,008 classes, else bilinear)"
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="of Inception (float32)")
    parser.add_argument("--metrics", help=f"scores, with commas ({','.join(DEFAULT)}, as far as they can be had)")
    parser.add_argument("--splits", type=number_from(1), default=10, help="of the Inception Score (10)")
    parser.add_argument("--seed", type=number_from(0), default=0, help="of everything random (0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", help="write REAL's statistics to this .npz")
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1, ... (cuda if there is one)",
    )
    return parser


def show_progress(name):
    """A function of (done, total) that tells on stderr, at most twice a second or, off a terminal, every 30 seconds."""
    started = shown = time.monotonic()
    terminal = sys.stderr.isatty()

    def progress(done, total):
        nonlocal shown
        now = time.monotonic()
        if now - shown < (0.5 if terminal else 30) and not (terminal and done == total):
            return
        shown, left = now, round((now - started) * (total - done) / done)
        line = f"{name}: {done} of {total} images, {left // 60}:{left % 60:02d} left"
        if terminal:
            line = f"\r\x1b[K{line}" + "\n" * (done == total)
        print(line, end="" if terminal else "\n", file=sys.stderr, flush=True)

    return progress


def choose_scores(asked, paths, contents):
    """The names of the scores asked for, or of all default ones that can be had. Raises UserError for what cannot."""
    names = [name.strip() for name in asked.split(",")] if asked is not None else DEFAULT
    possible = []
    for name in names:
        if name not in SCORES:
            raise UserError(f"no score {name!r}: choose among {','.join(SCORES)}")
        lacking = [
            f"{name} needs {need}, which {path} does not hold"
            for need, path, content in zip(SCORES[name][1:], paths, contents)
            if need and need not in provided(content)
        ]
        if lacking and asked:
            raise UserError(
                lacking[0] + (": each image must lie in a class's sub-folder" if "labels" in lacking[0] else "")
            )
        possible += [] if lacking else [name]
    return possible


def provided(content):
    """What a set provides, in the words of SCORES."""
    if isinstance(content, FeatureStats):
        return {"stats"}
    return {"stats", "features", "predictions", "images"} | ({"labels"} if content.labels is not None else set())


def summarize(args, paths, contents, keep):
    """A Summary of each set; the network is loaded if any set holds images."""
    saved = [content for content in contents if isinstance(content, FeatureStats)]
    if len(saved) < len(contents):
        try:
            extractor = load_extractor(args.extractor, args.device, args.resize, args.precision)
        except WeightsMissing as error:
            known = [f"; the saved statistics are by {describe(stats.made_by)}" for stats in saved if stats.made_by]
            raise UserError(f"{error}, or take --metrics swd, which needs no network{''.join(known)}")
        for stats in saved:  # before the long work
            check_alike(stats.made_by, extractor.made_by)

    def summary(path, content):
        if isinstance(content, FeatureStats):
            return Summary(content)
        progress = show_progress(f"{extractor.name} on {path}") if rank() == 0 else None
        result = measure(extractor, content, keep, args.splits, args.seed, progress)
        if result.n < 2:
            raise UserError(f"{path} holds {result.n} readable images; at least 2 are needed")
        return result

    return [summary(path, content) for path, content in zip(paths, contents)]


def image_size(content):
    """Width x height of the first image of a set that can be read, as text; None for statistics."""
    if not isinstance(content, FeatureStats):
        images = (content[i] for i in range(len(content)))
        return next((f"{image.shape[2]} x {image.shape[1]}" for image in images if image is not None), None)


def class_names(contents, summaries):
    """Each side's images' classes by name; where a side has no names, its indices count the other side's in order."""
    names = contents[0].classes or contents[1].classes
    sides = []
    for content, summary in zip(contents, summaries):
        own, labels = content.classes or names, content.labels[summary.index].tolist()
        if own and not 0 <= min(labels) <= max(labels) < len(own):
            raise UserError(f"labels from {min(labels)} to {max(labels)} do not go with {len(own)} classes")
        sides.append([own[i] if own else i for i in labels])
    return sides


def run(args):
    """What the command line asks for, as a dict: what made the scores, remarks, and the scores. Writes --out."""
    if not args.fake and not args.out:
        raise UserError("give FAKE too, or --out to save the statistics of REAL")
    if args.metrics is not None and not args.fake:
        raise UserError("--metrics needs FAKE")
    if args.out and not (Path(args.out).suffix == ".npz" and Path(args.out).absolute().parent.is_dir()):
        raise UserError(f"--out {args.out}: give an .npz in a folder that exists")
    if args.out and Path(args.out).exists():
        FeatureStats.load(args.out)  # raises UserError if it is anything else, which is not to be overwritten
    paths = [path for path in (args.real, args.fake) if path]
    contents = [open_set(path) for path in paths]
    names = choose_scores(args.metrics, paths, contents) if args.fake else []
    keep = any(need in ("features", "labels") for name in names for need in SCORES[name][1:])
    summaries = summarize(args, paths, contents, keep) if args.out or set(names) != {"swd"} else []
    if "is" in names and args.metrics is None and summaries[1].predictions is None:
        names.remove("is")
    if args.out and rank() == 0:
        summaries[0].stats.save(args.out)

    scores, lines = {}, []
    if of_network := [name for name in names if name != "swd"]:
        labels = class_names(contents, summaries) if "fid-classes" in names else None
        scores |= compare(*summaries, of_network, args.seed, labels)
        lines = remarks(*summaries, of_network)
    if "swd" in names:
        scores |= sliced_wasserstein(*contents, args.seed)
    if args.fake and args.metrics is None and (omitted := [name for name in DEFAULT if name not in names]):
        lines.append(f"left out: {', '.join(omitted)} (they take images on both sides, and is takes logits)")
    sizes = [size for size in map(image_size, contents) if size]
    if len(set(sizes)) > 1:
        lines.append(f"the first images are of {sizes[0]} and {sizes[1]} pixels: part of a distance may be the size")
    result = {}
    for side, path, content, summary in zip(("real", "fake"), paths, contents, summaries or contents):
        skipped = sorted(set(itertools.chain(*gather(lambda: getattr(content, "skipped", [])))))
        if skipped:
            some = ", ".join(skipped[:10]) + (f" and {len(skipped) - 10} more" if len(skipped) > 10 else "")
            lines.append(f"{path}: {len(skipped)} files could not be read as images and were left out: {some}")
        result |= {side: path, f"n_{side}": summary.n if summaries else len(content) - len(skipped)}
    made_by = next((summary.stats.made_by for summary in summaries if summary.stats.made_by), {})
    return result | made_by | {"notes": lines, "scores": scores, "saved": args.out}


def show_result(result):
    for side in ("real", "fake"):
        if side in result:
            n = "an unknown number of" if result[f"n_{side}"] is None else result[f"n_{side}"]
            print(f"{side}: {result[side]}, {n} images")
    if "network" in result:
        print(describe(result))
    for line in result["notes"]:
        print(f"note: {line}")
    width = max(map(len, result["scores"]), default=0)
    for name, value in result["scores"].items():
        print(f"{name:{width}}  {value:.6g}")
    if result["saved"]:
        print(f"statistics of {result['real']}: {result['saved']}")


def main(argv=None):
    """Runs a command line; returns its exit status: 0, or 2 after one line on stderr about what cannot be done."""
    try:
        args = make_parser().parse_args(argv)
        if dist.is_available() and dist.is_torchelastic_launched():  # by torchrun
            dist.init_process_group("gloo")
            args.device = f"cuda:{os.environ['LOCAL_RANK']}" if args.device == "cuda" else args.device
        try:
            torch.zeros(1, device=args.device)
        except (RuntimeError, AssertionError) as error:  # AssertionError: torch built without CUDA
            raise UserError(f"no device {args.device!r} here: {reason(error)}")
        result = run(args)
        if rank() == 0:
            print(json.dumps(result, indent=2)) if args.json else show_result(result)
        return 0
    except torch.OutOfMemoryError:
        message = "out of memory: the images may be too large for this device"
    except (UserError, OSError) as error:
        message = str(error)
    if os.environ.get("RANK", "0") == "0":
        print(f"metrics.py: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    status = main()
    if world_size() > 1:  # gloo can hang where it is taken down (torch 2.6) and abort where it is not (2.15)
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
