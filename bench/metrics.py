# SPDX-License-Identifier: MIT
"""metrics.py beside pytorch-fid, torch-fidelity, torchmetrics and clean-fid: time, memory and digits.

    pip install -r requirements.txt -r bench/requirements.txt && python bench/metrics.py

Takes about six minutes on two cores. Networks have random weights, since only time and agreement are measured.
Competitors take turns in one process; a time is the median of its turns.
"""

import contextlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

import mpmath
import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # before this folder, whose file has the same name
import metrics  # noqa: E402

DIM = 2048


def main():
    if sys.argv[1:2] == ["peak"]:
        return print(peak_memory(int(sys.argv[2])))
    warnings.filterwarnings("ignore")
    import torchmetrics
    import torchvision

    print(f"{processor()}, {torch.get_num_threads()} threads, {platform.system()}, Python {platform.python_version()}")
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, numpy {np.__version__}, ", end="")
    print(f"scipy {__import__('scipy').__version__}, torchmetrics {torchmetrics.__version__}\n")
    print("| work | metrics.py | other | ratio |\n| --- | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        distances()
        extraction(Path(folder))
        agreement(Path(folder))
    memory()
    print("\n| relative error of the Frechet distance | metrics.py | pytorch-fid | torchmetrics |")
    print("| --- | ---: | ---: | ---: |")
    digits()


def processor():
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    return platform.processor()


def in_turns(turns, *works):
    """The median seconds of each work, and what it returned."""
    seconds, results = [[] for _ in works], [None] * len(works)
    for _ in range(turns):
        for i, work in enumerate(works):
            started = time.perf_counter()
            results[i] = work()
            seconds[i].append(time.perf_counter() - started)
    return [statistics.median(s) for s in seconds], results


def row(work, ours, other, ratio):
    print(f"| {work} | {ours} | {other} | {ratio} |", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Time


def features_like(n, seed):
    """float32 features [n,DIM] with a spectrum that falls by a factor of 3,000, as Inception's roughly does."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(np.random.default_rng(99).standard_normal((DIM, DIM)))[0]
    scale = np.exp(-np.linspace(0, 4, DIM))
    return ((rng.standard_normal((n, DIM)) * scale) @ turn + 0.4 + 0.01 * seed).astype(np.float32)


def pytorch_fid_distance(a, b):
    from pytorch_fid.fid_score import calculate_frechet_distance

    moments = [m for x in (a, b) for m in (x.mean(axis=0), np.cov(x, rowvar=False))]
    with contextlib.redirect_stdout(sys.stderr):
        return float(calculate_frechet_distance(*moments))


def distances():
    for n, turns in ((1360, 3), (5000, 3)):
        a, b = features_like(n, 0), features_like(n, 1)
        (ours, theirs), (d, e) = in_turns(
            turns, partial(metrics.frechet_distance, a, b), partial(pytorch_fid_distance, a, b)
        )
        work = f"FID from features, n = {n:,} both"
        row(work, f"{ours:.2f} s", f"pytorch-fid {theirs:.2f} s", f"{theirs / ours:.1f}x")
        row("its value", f"{d:.6f}", f"pytorch-fid {e:.6f}", f"{abs(e / d - 1):.0e} apart")


def random_inception(folder):
    """A file of random weights of the TensorFlow network, scaled so that features neither vanish nor grow."""
    torch.manual_seed(0)
    net = metrics.inception_v3(weights=None, init_weights=False, aux_logits=False, num_classes=1008)
    for m in net.modules():
        if isinstance(m, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(m.weight)
        elif isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
    torch.save(net.state_dict(), folder / "random.pth")
    return folder / "random.pth"


def pytorch_fid_inception(file):
    import pytorch_fid.inception

    pytorch_fid.inception.load_state_dict_from_url = lambda *args, **kwargs: torch.load(file)
    return pytorch_fid.inception.InceptionV3([3]).eval()


def extraction(folder):
    file = random_inception(folder)
    images = torch.randint(256, (96, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    theirs = pytorch_fid_inception(file)
    full, half = (metrics.load_extractor(file, resize="bilinear", dtype=dtype) for dtype in metrics.DTYPES)

    @torch.no_grad()
    def reference():  # at pytorch-fid's own batch size
        return torch.cat([theirs(x.float() / 255)[0].flatten(1) for x in images.split(50)])

    seconds, features = in_turns(
        3, reference, lambda: metrics.measure(full, images).features, lambda: metrics.measure(half, images).features
    )
    for name, second, x in zip(("float32", "bfloat16"), seconds[1:], features[1:]):
        rate = f"{len(images) / second:.1f} images/s"
        other = f"pytorch-fid, float32 {len(images) / seconds[0]:.1f} images/s"
        row(f"extraction, 64 px, {name}", rate, other, f"{seconds[0] / second:.1f}x")
        apart = ((x - features[0]).norm() / features[0].norm()).item()
        row("its features", "", "pytorch-fid's", f"{apart:.0e} apart")


# ---------------------------------------------------------------------------------------------------------------------
# Agreement


def agreement(folder):
    """Features and scores of the same images with the same random weights."""
    from cleanfid.resize import build_resizer
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric

    file = folder / "random.pth"
    images = torch.randint(256, (24, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    theirs = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(file))
    with torch.no_grad():
        features, logits = theirs(images)
    ours, said = metrics.load_extractor(file)(images)
    row("features, tf1", "", "torch-fidelity's", f"{((ours - features).norm() / features.norm()).item():.0e} apart")
    mine, _ = metrics.inception_score(said, splits=1)  # metrics.py draws its splits otherwise
    other = isc_features_to_metric(logits, splits=1, shuffle=False)["inception_score_mean"]
    row("IS, 1 split", f"{mine:.6f}", f"torch-fidelity {other:.6f}", f"{abs(other / mine - 1):.0e} apart")
    x, y = ours[:12], ours[12:]
    subsets = {"kid_subsets": 1, "kid_subset_size": len(x), "verbose": False}  # one subset that is the whole
    mine = metrics.kernel_distance(x, y)
    other = kid_features_to_metric(x.double(), y.double(), **subsets)["kernel_inception_distance_mean"]
    row("KID", f"{mine:.6f}", f"torch-fidelity {other:.6f}", f"{abs(other / mine - 1):.0e} apart")
    resize = build_resizer("clean")
    theirs = np.stack([resize(x.permute(1, 2, 0).numpy()) for x in images]).transpose(0, 3, 1, 2)
    apart = np.abs(metrics.for_inception(images.float(), "clean").numpy() * 128 + 128 - theirs).max()
    row("resize clean, of 255 levels", "", "clean-fid's", f"{apart:.0e} apart")


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def noise(n):
    """Yields n uint8 images [3,16,16] in batches, as a generator of samples does."""
    generator = torch.Generator().manual_seed(0)
    for start in range(0, n, 50):
        yield torch.randint(256, (min(50, n - start), 3, 16, 16), dtype=torch.uint8, generator=generator)


def peak_memory(n):
    """Peak MB of this process while it takes FID and IS of n images: DIM features and 1,000 logits each."""
    weight = torch.randn(768, DIM + 1000, generator=torch.Generator().manual_seed(0))
    extractor = metrics.Extractor(lambda x: (x.flatten(1) @ weight).split([DIM, 1000], dim=1), "noise", "0" * 16)
    summary = metrics.measure(extractor, noise(n))
    other = metrics.FeatureStats.from_moments(torch.zeros(DIM), torch.eye(DIM))
    assert metrics.frechet_distance(summary.stats, other) > 0 and metrics.inception_score(summary.logits)[0] >= 1
    status = Path("/proc/self/status").read_text()  # Linux; a child's ru_maxrss would begin with its parent's
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def memory():
    few, many = (
        float(subprocess.run([sys.executable, __file__, "peak", str(n)], capture_output=True, check=True).stdout)
        for n in (5000, 20000)
    )
    row("peak memory of FID and IS, n = 5,000 and 20,000", f"{few:.0f} and {many:.0f} MB", "", f"+{many - few:.0f} MB")


# ---------------------------------------------------------------------------------------------------------------------
# Digits


def features_of(n, mean, values, basis, seed):
    """Features [n,d] of exactly this mean and the covariance basis^T diag(values) basis."""
    x = torch.randn(n, len(values), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x = torch.linalg.qr(x - x.mean(0)).Q
    return (mean + x * (values * (n - 1)).sqrt() @ basis).numpy()


def high_precision(x, y, digits=60):
    """The Frechet distance of x [n,d], y [m,d] in that many digits; a minute at d = 64."""
    mp = mpmath.mp.clone()
    mp.dps = digits

    def moments(x):
        rows, cols = x.shape
        x = mp.matrix(x.tolist())
        mean = [mp.fsum(x[:, j]) / rows for j in range(cols)]
        x = mp.matrix([[x[i, j] - mean[j] for j in range(cols)] for i in range(rows)])
        return mean, x.T * x / (rows - 1)

    (mu, A), (nu, B) = moments(x), moments(y)
    values, vectors = mp.eigsy(A)
    root = vectors * mp.diag([mp.sqrt(max(v, 0)) for v in values]) * vectors.T
    cross = mp.fsum(mp.sqrt(max(v, 0)) for v in mp.eigsy(root * B * root, eigvals_only=True))
    shift = mp.fsum((a - b) ** 2 for a, b in zip(mu, nu))
    return float(shift + mp.fsum(A[i, i] + B[i, i] for i in range(A.rows)) - 2 * cross)


def torchmetrics_distance(x, y):
    """From the sums that torchmetrics keeps: of x and of x x^T, uncentred, in float64."""
    from torchmetrics.image.fid import _compute_fid

    moments = []
    for z in (torch.from_numpy(x), torch.from_numpy(y)):
        total, square, n = z.sum(0), z.T @ z, len(z)
        mean = total / n
        moments += [mean, (square - n * mean[:, None] @ mean[None]) / (n - 1)]
    return _compute_fid(*moments).item()


def digits():
    d = 512
    normal = lambda n, d, seed: np.random.default_rng(seed).standard_normal((n, d))  # noqa: E731
    basis = torch.linalg.qr(torch.from_numpy(normal(d, d, 0))).Q
    a, b = torch.logspace(0, -4, d, dtype=torch.float64), torch.logspace(-1, -2, d, dtype=torch.float64)
    mean, zero = torch.full((d,), 0.01, dtype=torch.float64), torch.zeros(d, dtype=torch.float64)
    gone, apart = (torch.arange(d) < k for k in (200, 300))

    def commuting(n, a, b, far=0.0):
        x, y = features_of(n, mean + far, a, basis, 1), features_of(n, zero + far, b, basis, 2)
        return x, y, ((mean**2).sum() + ((a.sqrt() - b.sqrt()) ** 2).sum()).item()

    x = features_of(2000, zero, a, basis, 3)
    small, other = normal(90, 32, 4) * np.logspace(0, -3, 32), normal(120, 32, 5) @ normal(32, 32, 6)
    few, fewer = normal(20, 32, 7) + 1, normal(12, 32, 8)
    cases = {
        "commuting, full rank": commuting(2000, a, b),
        "commuting, rank 200 in both": commuting(2000, a * gone, b * gone),
        "commuting, ranks 200 and 300": commuting(2000, a * gone, b * apart),
        "commuting, disjoint ranks": commuting(2000, a * gone, b * ~apart),
        "commuting, n = d + 1": commuting(513, a, b),
        "commuting, mean 1,000": commuting(2000, a, b, 1000.0),
        "random, full rank, d = 32": (small, other, high_precision(small, other)),
        "random, n of 20 and 12, d = 32": (few, fewer, high_precision(few, fewer)),
        "near-duplicates, apart by 2^-10": (x, x * (1 + 2.0**-10), 2.0**-20 * a.sum().item()),
        "near-duplicates, apart by 2^-17": (x, x * (1 + 2.0**-17), 2.0**-34 * a.sum().item()),
    }
    for name, (x, y, true) in cases.items():
        errors = [
            abs(distance(x, y) / true - 1)
            for distance in (metrics.frechet_distance, pytorch_fid_distance, torchmetrics_distance)
        ]
        print(f"| {name} | {' | '.join(f'{error:.0e}' for error in errors)} |", flush=True)
    values = [f(x, x) for f in (metrics.frechet_distance, pytorch_fid_distance, torchmetrics_distance)]
    print(f"| identical sets: the value itself | {' | '.join(f'{value:.0e}' for value in values)} |")


if __name__ == "__main__":
    main()
