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
from importlib.metadata import version
from pathlib import Path

import mpmath
import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # before this folder, whose file has the same name
import metrics

PACKAGES = ("torch", "torchvision", "numpy", "scipy", "torchmetrics", "pytorch-fid", "torch-fidelity", "clean-fid")
DIM = 2048  # Inception's features
SMALL_DIM = 512  # where digits are compared
TURNS = 3


def row(*cells):
    print(f"| {' | '.join(cells)} |", flush=True)


def value_row(work, ours, tool, theirs):
    row(work, f"{ours:.6f}", f"{tool} {theirs:.6f}", f"{abs(theirs / ours - 1):.0e} apart")


def features_row(work, ours, tool, theirs):
    apart = (ours - theirs).norm() / theirs.norm()
    row(work, "", f"{tool}'s", f"{apart:.0e} apart")


def random_images(n, size, generator):
    return torch.randint(256, (n, 3, size, size), dtype=torch.uint8, generator=generator)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# ---- Other tools
def pytorch_fid_distance(x, y):
    """Measures the Frechet distance of features x [n,d], y [m,d]."""
    from pytorch_fid.fid_score import calculate_frechet_distance

    moments = []
    for features in (x, y):
        moments.append(features.mean(axis=0))
        moments.append(np.cov(features, rowvar=False))
    with contextlib.redirect_stdout(sys.stderr):
        return float(calculate_frechet_distance(*moments))


def torchmetrics_distance(x, y):
    """Measures it from the sums that torchmetrics keeps: of x and of x x^T, uncentred, in float64."""
    from torchmetrics.image.fid import _compute_fid

    moments = []
    for features in (torch.from_numpy(x), torch.from_numpy(y)):
        n = len(features)
        mean = features.sum(0) / n
        square = features.T @ features
        moments.append(mean)
        moments.append((square - n * mean[:, None] @ mean[None]) / (n - 1))
    return _compute_fid(*moments).item()


def pytorch_fid_inception(file):
    """Builds pytorch-fid's network with the weights of a file."""
    import pytorch_fid.inception

    pytorch_fid.inception.load_state_dict_from_url = lambda *args, **kwargs: torch.load(file)
    return pytorch_fid.inception.InceptionV3([3]).eval()


# ---- Time
def features_like(n, seed):
    """Draws float32 features [n,DIM] whose spectrum falls by a factor of 3,000, as Inception's roughly does."""
    square = np.random.default_rng(99).standard_normal((DIM, DIM))
    turn = np.linalg.qr(square)[0]
    scale = np.exp(-np.linspace(0, 4, DIM))
    x = np.random.default_rng(seed).standard_normal((n, DIM))
    x = (x * scale) @ turn + 0.4 + 0.01 * seed
    return x.astype(np.float32)


def in_turns(*works):
    """Calls works in turns; returns the median seconds of each, and the last result of each."""
    seconds = [[] for _ in works]
    for _ in range(TURNS):
        results = []
        for work, taken in zip(works, seconds):
            began = time.perf_counter()
            results.append(work())
            taken.append(time.perf_counter() - began)
    medians = [statistics.median(taken) for taken in seconds]
    return medians, results


def time_distances():
    """Prints the time of the Frechet distance."""
    for n in (1360, 5000):
        a = features_like(n, seed=0)
        b = features_like(n, seed=1)
        seconds, values = in_turns(
            partial(metrics.frechet_distance, a, b),
            partial(pytorch_fid_distance, a, b),
        )
        ours, theirs = seconds
        row(
            f"FID from features, n = {n:,} both",
            f"{ours:.2f} s",
            f"pytorch-fid {theirs:.2f} s",
            f"{theirs / ours:.1f}x",
        )
        ours, theirs = values
        value_row("its value", ours, "pytorch-fid", theirs)


def random_inception(folder):
    """Saves random weights of the TensorFlow network, scaled so that features neither vanish nor grow."""
    torch.manual_seed(0)
    net = metrics.inception_v3(weights=None, init_weights=False, aux_logits=False, num_classes=1008)
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    file = folder / "random.pth"
    torch.save(net.state_dict(), file)
    return file


def time_extraction(file):
    """Prints the time of features of images, in each dtype, and their distance from pytorch-fid's in float32."""
    images = random_images(96, 64, seeded(0))
    theirs = pytorch_fid_inception(file)

    @torch.no_grad()
    def reference():
        parts = images.split(50)  # pytorch-fid's own batch size
        return torch.cat([theirs(part.float() / 255)[0].flatten(1) for part in parts])

    def ours(extractor):
        return metrics.measure(extractor, images).features

    extractors = [metrics.load_extractor(file, resize="bilinear", dtype=dtype) for dtype in metrics.DTYPES]
    works = [partial(ours, extractor) for extractor in extractors]
    seconds, features = in_turns(reference, *works)
    rates = [len(images) / taken for taken in seconds]
    for dtype, rate, x in zip(metrics.DTYPES, rates[1:], features[1:]):
        row(
            f"extraction, 64 px, {dtype}",
            f"{rate:.1f} images/s",
            f"pytorch-fid, float32 {rates[0]:.1f} images/s",
            f"{rate / rates[0]:.1f}x",
        )
        features_row("its features", x, "pytorch-fid", features[0])


# ---- Agreement
def compare_scores(file):
    """Prints features and scores of the same images with the same random weights, beside torch-fidelity's."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric

    images = random_images(24, 64, seeded(1))
    network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(file))
    with torch.no_grad():
        their_features, their_logits = network(images)
    features, logits = metrics.load_extractor(file)(images)
    features_row("features, tf1", features, "torch-fidelity", their_features)

    # One split and one subset are everything: metrics.py draws its splits otherwise, and takes no subsets.
    ours, _ = metrics.inception_score(logits, splits=1)
    theirs = isc_features_to_metric(their_logits, splits=1, shuffle=False)
    value_row("IS, 1 split", ours, "torch-fidelity", theirs["inception_score_mean"])

    x, y = features.chunk(2)
    ours = metrics.kernel_distance(x, y)
    theirs = kid_features_to_metric(x.double(), y.double(), kid_subsets=1, kid_subset_size=len(x), verbose=False)
    value_row("KID", ours, "torch-fidelity", theirs["kernel_inception_distance_mean"])


def compare_resize():
    """Prints how far the clean resize is from clean-fid's at most."""
    from cleanfid.resize import build_resizer

    resize = build_resizer("clean")
    images = random_images(24, 64, seeded(1))
    theirs = np.stack([resize(image.permute(1, 2, 0).numpy()) for image in images])
    ours = metrics.for_inception(images.float(), "clean") * 128 + 128
    apart = np.abs(ours.permute(0, 2, 3, 1).numpy() - theirs).max()
    row("resize clean, of 255 levels", "", "clean-fid's", f"{apart:.0e} apart")


# ---- Memory
def noise(n):
    """Yields n uint8 images [3,16,16] in batches, as a generator of samples does."""
    generator = seeded(0)
    for start in range(0, n, 50):
        yield random_images(min(50, n - start), 16, generator)


def peak_memory(n):
    """Returns the peak MB of this process while it takes FID and IS of n images by DIM features and 1,000 logits."""
    weight = torch.randn(768, DIM + 1000, generator=seeded(0))

    def network(x):
        return (x.flatten(1) @ weight).split([DIM, 1000], dim=1)

    summary = metrics.measure(metrics.Extractor(network, "noise", "0" * 16), noise(n))
    other = metrics.FeatureStats.from_moments(torch.zeros(DIM), torch.eye(DIM))
    metrics.frechet_distance(summary.stats, other)
    metrics.inception_score(summary.logits)
    status = Path("/proc/self/status").read_text()  # Linux; a child's ru_maxrss would begin with its parent's
    _, _, peak = status.partition("VmHWM:")
    return int(peak.split()[0]) / 1024


def peak_memory_alone(n):
    """Returns peak_memory of a process of its own."""
    command = [sys.executable, __file__, "peak", str(n)]
    return float(subprocess.run(command, capture_output=True, check=True).stdout)


def compare_memory():
    """Prints how the peak grows with the number of images."""
    few = peak_memory_alone(5000)
    many = peak_memory_alone(20000)
    row(
        "peak memory of FID and IS, n = 5,000 and 20,000",
        f"{few:.0f} and {many:.0f} MB",
        "",
        f"+{many - few:.0f} MB",
    )


# ---- Digits
def normal(n, d, seed):
    return np.random.default_rng(seed).standard_normal((n, d))


def features_of(n, mean, values, seed):
    """Draws features [n,d] of exactly this mean [d] and a covariance of these eigenvalues [d].

    Its eigenvectors depend on d alone.
    """
    d = len(values)
    basis = torch.linalg.qr(torch.from_numpy(normal(d, d, 0))).Q
    x = torch.randn(n, d, dtype=torch.float64, generator=seeded(seed))
    x = torch.linalg.qr(x - x.mean(0)).Q
    x = x * (values * (n - 1)).sqrt() @ basis
    return (mean + x).numpy()


def spectrum(first, last):
    """Returns eigenvalues [SMALL_DIM] from 10^first to 10^last."""
    return torch.logspace(first, last, SMALL_DIM, dtype=torch.float64)


def commuting(a, b, n=2000, far=0.0):
    """Draws (x, y, their distance) of eigenvalues a and b; common eigenvectors make the distance a sum of squares."""
    shift = torch.full((SMALL_DIM,), 0.01, dtype=torch.float64)
    x = features_of(n, shift + far, a, seed=1)
    y = features_of(n, torch.zeros_like(shift) + far, b, seed=2)
    distance = (shift**2).sum() + ((a.sqrt() - b.sqrt()) ** 2).sum()
    return x, y, distance.item()


def commuting_cases():
    """Yields cases: (name, x, y, their distance)."""
    a = spectrum(0, -4)
    b = spectrum(-1, -2)
    low = torch.arange(SMALL_DIM) < 200
    more = torch.arange(SMALL_DIM) < 300
    yield "commuting, full rank", *commuting(a, b)
    yield "commuting, rank 200 in both", *commuting(a * low, b * low)
    yield "commuting, ranks 200 and 300", *commuting(a * low, b * more)
    yield "commuting, disjoint ranks", *commuting(a * low, b * ~more)
    yield "commuting, n = d + 1", *commuting(a, b, n=SMALL_DIM + 1)
    yield "commuting, mean 1,000", *commuting(a, b, far=1000.0)


def random_cases():
    """Yields cases whose distance takes many digits."""
    x = normal(90, 32, seed=4) * np.logspace(0, -3, 32)
    y = normal(120, 32, seed=5) @ normal(32, 32, seed=6)
    yield "random, full rank, d = 32", x, y, high_precision(x, y)
    x = normal(20, 32, seed=7) + 1
    y = normal(12, 32, seed=8)
    yield "random, n of 20 and 12, d = 32", x, y, high_precision(x, y)


@mpmath.workdps(60)
def high_precision(x, y):
    """Measures the Frechet distance of x [n,d], y [m,d] in 60 digits; a minute at d = 64."""
    mu, A = precise_moments(x)
    nu, B = precise_moments(y)
    values, vectors = mpmath.eigsy(A)
    root = vectors * mpmath.diag(precise_roots(values)) * vectors.T
    values = mpmath.eigsy(root * B * root, eigvals_only=True)
    both = A + B
    trace = mpmath.fsum(both[i, i] for i in range(both.rows))
    return float(mpmath.norm(mu - nu) ** 2 + trace - 2 * mpmath.fsum(precise_roots(values)))


def precise_moments(x):
    """Returns the mean [1,d] and covariance [d,d] of x [n,d]."""
    n = len(x)
    x = mpmath.matrix(x.tolist())
    mean = mpmath.ones(1, n) * x / n
    x -= mpmath.ones(n, 1) * mean
    return mean, x.T * x / (n - 1)


def precise_roots(values):
    return [mpmath.sqrt(max(value, 0)) for value in values]


def compare_digits():
    """Prints the relative errors of each tool, by case."""
    distances = (metrics.frechet_distance, pytorch_fid_distance, torchmetrics_distance)

    def errors_row(name, errors):
        row(name, *(f"{error:.0e}" for error in errors))

    def case_row(name, x, y, true):
        errors_row(name, [abs(distance(x, y) / true - 1) for distance in distances])

    for case in commuting_cases():
        case_row(*case)
    for case in random_cases():
        case_row(*case)

    values = spectrum(0, -4)
    x = features_of(2000, torch.zeros_like(values), values, seed=3)
    for power in (10, 17):
        step = 2.0**-power
        case_row(f"near-duplicates, apart by 2^-{power}", x, x * (1 + step), step**2 * values.sum().item())
    errors_row("identical sets: the value itself", [distance(x, x) for distance in distances])


# ---- Command
def processor():
    """Names the CPU."""
    name = ""
    if sys.platform == "linux":
        _, _, rest = Path("/proc/cpuinfo").read_text().partition("model name")
        name = rest.partition("\n")[0].lstrip("\t :")
    return name or platform.processor()


def main():
    if sys.argv[1:2] == ["peak"]:
        print(peak_memory(int(sys.argv[2])))
        return

    warnings.filterwarnings("ignore")
    print(f"{processor()}, {torch.get_num_threads()} threads, {platform.system()}, Python {platform.python_version()}")
    print(", ".join(f"{name} {version(name)}" for name in PACKAGES))
    print("\n| work | metrics.py | other | ratio |\n| --- | ---: | ---: | ---: |")
    time_distances()
    with tempfile.TemporaryDirectory() as folder:
        file = random_inception(Path(folder))
        time_extraction(file)
        compare_scores(file)
    compare_resize()
    compare_memory()
    print("\n| relative error of the Frechet distance | metrics.py | pytorch-fid | torchmetrics |")
    print("| --- | ---: | ---: | ---: |")
    compare_digits()


if __name__ == "__main__":
    main()
