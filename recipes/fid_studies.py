# SPDX-License-Identifier: MIT
"""How far to trust an FID: its limit for infinitely many samples, its spread, its value by class, and KID's spread.

    python recipes/fid_studies.py REAL FAKE --extractor net.pt2 --studies infinity,interval,classes,kid-subsets

A FID of n samples is biased upwards by about c / n. "infinity" draws parts of the samples, fits a line in 1 / n and
reads it at 0 (arXiv 1911.07023). "interval" resamples halves. "classes" compares class by class, where the folders'
sub-folders are the classes. "kid-subsets" is KID as first published, over 100 random subsets (arXiv 1801.01401).
Takes `run_command` from report.py.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gan
import metrics
import report


def draw(x, n, generator):
    """Draws n of the samples x [m,d], or all if there are fewer, in random order without replacement."""
    return x[torch.randperm(len(x), generator=generator)[:n]]


def frechet_infinity(real, fake, sizes=15, seed=0):
    """Extrapolates the Frechet distance to infinitely many samples of the generator; it may be slightly negative.

    real [n,d], fake [m,d]: features, m >= 20. Takes the distances of random parts of fake, from half of it to all.
    """
    if len(fake) < 20:
        raise metrics.UserError(f"an extrapolation needs at least 20 samples, not {len(fake)}")
    # Smaller parts would steady the line, but it bends: at d = 200, 1,000 samples and a distance of 1.05, parts from a
    # tenth on give 0.08 and parts from a half on 0.96.
    generator = torch.Generator().manual_seed(seed)
    real = metrics.FeatureStats.from_features(real)
    numbers = torch.linspace(len(fake) / 2, len(fake), sizes).long()
    distances = [metrics.frechet_distance(real, draw(fake, n, generator)) for n in numbers]
    line = np.polynomial.Polynomial.fit(1 / numbers.double().numpy(), distances, deg=1)
    return line(0)


def frechet_interval(real, fake, level=0.95, resamples=100, seed=0):
    """Computes a bootstrap interval (low, high) of the Frechet distance at this number of generated samples, m >= 4.

    real [n,d], fake [m,d]: features; only fake is resampled.
    """
    # Halves drawn without replacement vary as much as samples of the whole size do. Copies, which resampling with
    # replacement makes, lower the rank: simulated at d = 200, it is 4.7 times too wide for 100 samples and 2.2 times
    # for 1,000; halves are 1.2 and 1.4 times too wide. Centring takes away the bias of both.
    if len(fake) < 4:
        raise metrics.UserError(f"an interval needs at least 4 samples, not {len(fake)}")
    generator = torch.Generator().manual_seed(seed)
    real = metrics.FeatureStats.from_features(real)
    distances = []
    for _ in range(resamples):
        half = draw(fake, len(fake) // 2, generator)
        distances.append(metrics.frechet_distance(real, half))
    spread = np.quantile(distances - np.mean(distances), [(1 - level) / 2, (1 + level) / 2])
    low, high = (metrics.frechet_distance(real, fake) + spread).clip(min=0).tolist()
    return low, high


def frechet_by_class(real, real_labels, fake, fake_labels):
    """Computes {class: Frechet distance within it}, in natural order; features [n,d], [m,d] with their class names."""
    distances = {}
    for name in sorted({*real_labels, *fake_labels}, key=gan.natural):
        a = real[[label == name for label in real_labels]]
        b = fake[[label == name for label in fake_labels]]
        if min(len(a), len(b)) < 2:
            raise metrics.UserError(f"class {name} has {len(a)} real and {len(b)} generated images")
        distances[name] = metrics.frechet_distance(a, b)
    return distances


def kernel_distance_subsets(x, y, subsets=100, size=1000, seed=0):
    """Computes the kernel distance of random subsets of features [n,d], [m,d], n, m >= 4: mean, standard deviation.

    size: at most half of the smaller set, or the subsets would be nearly the same.
    """
    size = min(size, len(x) // 2, len(y) // 2)
    if size < 2:
        raise metrics.UserError(f"subsets need at least 4 samples, not {min(len(x), len(y))}")
    generator = torch.Generator().manual_seed(seed)
    distances = []
    for _ in range(subsets):
        some_x = draw(x, size, generator)
        some_y = draw(y, size, generator)
        distances.append(metrics.kernel_distance(some_x, some_y))
    return np.mean(distances).item(), np.std(distances).item()


# ---- Studies of two metrics.Folders and their features, each {name in print: float}
def study_infinity(fid, kid, folders, features, seed):
    return {f"{fid} infinity": frechet_infinity(*features, seed=seed)}


def study_interval(fid, kid, folders, features, seed):
    low, high = frechet_interval(*features, seed=seed)
    return {f"{fid} low": low, f"{fid} high": high}


def study_classes(fid, kid, folders, features, seed):
    real, fake = features
    real_labels, fake_labels = map(class_labels, folders)
    distances = frechet_by_class(real, real_labels, fake, fake_labels)
    scores = {f"{fid} class mean": np.mean(list(distances.values())).item()}
    return scores | {f"{fid} of {name}": distance for name, distance in distances.items()}


def study_subsets(fid, kid, folders, features, seed):
    mean, deviation = kernel_distance_subsets(*features, seed=seed)
    return {f"{kid} of subsets": mean, "KID std": deviation}


STUDIES = {
    "infinity": study_infinity,
    "interval": study_interval,
    "kid-subsets": study_subsets,
    "classes": study_classes,
}


def class_labels(folder):
    """Lists the class of each image read from a metrics.Folder, its first sub-folder."""
    files = [file for file in folder.files if file not in folder.skipped]
    if any(len(file.parts) == 1 for file in files):
        raise metrics.UserError(f"{folder.path} has images beside its class folders")
    return [file.parts[0] for file in files]


def study(real, fake, names, extractor, seed=0):
    """Makes the named studies of two folders of images: {name in print: float}, the distance itself first."""
    for name in names:
        if name not in STUDIES:
            raise metrics.UserError(f"no study {name!r}: choose among {','.join(STUDIES)}")
    folders = [metrics.Folder(real), metrics.Folder(fake)]
    summaries = []
    for folder in folders:
        progress = metrics.Progress(f"{extractor.name} on {folder.path}")
        summaries.append(metrics.measure(extractor, folder, progress=progress))
    features = [summary.features for summary in summaries]
    fid = metrics.label("FID", extractor.made_by)
    kid = metrics.label("KID", extractor.made_by)

    scores = {fid: metrics.frechet_distance(*(summary.stats for summary in summaries))}
    for name, make in STUDIES.items():
        if name in names:
            scores |= make(fid, kid, folders, features, seed)
    return scores


def show_study(real, fake, extractor, studies, seed, device):
    """Prints the studies, a line each."""
    network = metrics.load_extractor(extractor, device)
    for name, value in study(real, fake, studies.split(","), network, seed).items():
        gan.say(f"{name:36}  {value:.6g}")


def main(argv=None):
    parser = gan.Parser(prog="fid_studies.py", description=__doc__.splitlines()[0])
    parser.add_argument("real", help="folder of real images")
    parser.add_argument("fake", help="folder of generated images")
    parser.add_argument("--extractor", default="inception", help="see metrics.py (inception)")
    parser.add_argument("--studies", default=",".join(STUDIES), help=f"with commas ({','.join(STUDIES)})")
    parser.add_argument("--seed", type=gan.whole_number, default=0, help="of the random parts (0)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    report.run_command(show_study, parser, argv)


if __name__ == "__main__":
    main()
