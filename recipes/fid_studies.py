# SPDX-License-Identifier: MIT
"""How far to trust a FID: its limit for infinitely many samples, its spread, its value in each class, and KID's spread.

    python recipes/fid_studies.py REAL FAKE --extractor net.pt2 --studies infinity,interval,classes,kid-subsets

A FID of n samples is biased upwards by about c / n. "infinity" draws parts of the samples, fits a line in 1 / n and
reads it at 0 (arXiv 1911.07023). "interval" resamples halves. "classes" compares class by class, where the folders'
sub-folders are the classes. "kid-subsets" is KID as first published, over 100 random subsets (arXiv 1801.01401).
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gan
import metrics

STUDIES = ("infinity", "interval", "classes", "kid-subsets")


def draw(x, n, generator):
    """n of the samples x [m,d], or all if there are fewer, in random order without replacement."""
    return x[torch.randperm(len(x), generator=generator)[:n]]


def frechet_infinity(real, fake, sizes=15, seed=0):
    """The Frechet distance for infinitely many samples of the generator, a float; may be slightly negative.

    real [n,d], fake [m,d]: features, m >= 20. Takes the distances of random parts of fake, from half of it to all.
    """
    if len(fake) < 20:
        raise metrics.UserError(f"an extrapolation needs at least 20 samples, not {len(fake)}")
    # Smaller parts would steady the line, but it bends: at d = 200, 1,000 samples and a distance of 1.05, parts from a
    # tenth on give 0.08 and parts from a half on 0.96.
    generator, real = torch.Generator().manual_seed(seed), metrics.FeatureStats.from_features(real)
    numbers = torch.linspace(len(fake) / 2, len(fake), sizes).long()
    distances = [metrics.frechet_distance(real, draw(fake, n, generator)) for n in numbers]
    return np.polynomial.Polynomial.fit(1 / numbers.double().numpy(), distances, deg=1)(0)


def frechet_interval(real, fake, level=0.95, resamples=100, seed=0):
    """A bootstrap interval (low, high) of the Frechet distance at this number of generated samples, m >= 4.

    real [n,d], fake [m,d]: features; only fake is resampled.
    """
    # Halves drawn without replacement vary as much as samples of the whole size do. Copies, which resampling with
    # replacement makes, lower the rank: simulated at d = 200, it is 4.7 times too wide for 100 samples and 2.2 times
    # for 1,000; halves are 1.2 and 1.4 times too wide. Centring takes away the bias of both.
    if len(fake) < 4:
        raise metrics.UserError(f"an interval needs at least 4 samples, not {len(fake)}")
    generator, real = torch.Generator().manual_seed(seed), metrics.FeatureStats.from_features(real)
    distances = [metrics.frechet_distance(real, draw(fake, len(fake) // 2, generator)) for _ in range(resamples)]
    spread = np.quantile(distances - np.mean(distances), [(1 - level) / 2, (1 + level) / 2])
    return tuple((metrics.frechet_distance(real, fake) + spread).clip(min=0).tolist())


def frechet_by_class(real, real_labels, fake, fake_labels):
    """{class: Frechet distance within it}, classes in natural order; features [n,d], [m,d] with their class names."""
    result = {}
    for name in sorted({*real_labels, *fake_labels}, key=gan.natural):
        parts = [x[[c == name for c in labels]] for x, labels in ((real, real_labels), (fake, fake_labels))]
        if min(map(len, parts)) < 2:
            raise metrics.UserError(f"class {name} has {len(parts[0])} real and {len(parts[1])} generated images")
        result[name] = metrics.frechet_distance(*parts)
    return result


def kernel_distance_subsets(x, y, subsets=100, size=1000, seed=0):
    """The kernel distance of random subsets of features [n,d], [m,d], n, m >= 4 -> (mean, standard deviation).

    size: at most half of the smaller set, or the subsets would be nearly the same.
    """
    size = min(size, len(x) // 2, len(y) // 2)
    if size < 2:
        raise metrics.UserError(f"subsets need at least 4 samples, not {min(len(x), len(y))}")
    generator = torch.Generator().manual_seed(seed)
    distances = [metrics.kernel_distance(draw(x, size, generator), draw(y, size, generator)) for _ in range(subsets)]
    return float(np.mean(distances)), float(np.std(distances))


def class_labels(folder):
    """The class of each image read from a metrics.Folder, its top folder; None if an image lies beside those."""
    files = [file for file in folder.files if file not in folder.skipped]
    return None if any(len(file.parts) == 1 for file in files) else [file.parts[0] for file in files]


def study(real, fake, names, extractor, seed=0):
    """The named studies of two folders, {name in print: float}."""
    if unknown := set(names) - set(STUDIES):
        raise metrics.UserError(f"no study {min(unknown)!r}: choose among {','.join(STUDIES)}")
    folders = [metrics.Folder(path) for path in (real, fake)]
    summaries = [
        metrics.measure(extractor, folder, metrics.Progress(f"{extractor.name} on {folder.path}")) for folder in folders
    ]
    x, y = (summary.features for summary in summaries)
    fid, kid = (metrics.label(name, extractor.made_by) for name in ("FID", "KID"))
    scores = {fid: metrics.frechet_distance(*(summary.stats for summary in summaries))}
    if "infinity" in names:
        scores[f"{fid} infinity"] = frechet_infinity(x, y, seed=seed)
    if "interval" in names:
        scores[f"{fid} low"], scores[f"{fid} high"] = frechet_interval(x, y, seed=seed)
    if "kid-subsets" in names:
        scores[f"{kid} of subsets"], scores["KID std"] = kernel_distance_subsets(x, y, seed=seed)
    if "classes" in names:
        labels = [class_labels(folder) for folder in folders]
        if None in labels:
            raise metrics.UserError(f"{folders[labels.index(None)].path} has images beside its class folders")
        by_class = frechet_by_class(x, labels[0], y, labels[1])
        scores[f"{fid} class mean"] = float(np.mean(list(by_class.values())))
        scores |= {f"{fid} of {name}": distance for name, distance in by_class.items()}
    return scores


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("real", help="folder of real images")
    parser.add_argument("fake", help="folder of generated images")
    parser.add_argument("--extractor", default="inception", help="see metrics.py (inception)")
    parser.add_argument("--studies", default=",".join(STUDIES), help=f"with commas ({','.join(STUDIES)})")
    parser.add_argument("--seed", type=int, default=0, help="of the random parts (0)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    try:
        extractor = metrics.load_extractor(args.extractor, args.device)
        scores = study(args.real, args.fake, args.studies.split(","), extractor, args.seed)
    except (metrics.UserError, OSError) as error:
        parser.exit(2, f"fid_studies.py: error: {metrics.printable(error)}\n")
    for name, value in scores.items():
        print(f"{metrics.printable(name):36}  {value:.6g}")


if __name__ == "__main__":
    main()
