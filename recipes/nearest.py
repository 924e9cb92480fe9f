# SPDX-License-Identifier: MIT
"""Shows whether a run copies its training images, which the scores reward: samples beside the images nearest to them.

    python recipes/nearest.py RUN                        # by colours at 16 x 16; all results go to the run's folder
    python recipes/nearest.py RUN --extractor net.pt2    # by a network's features

A sample's ratio is its distance to the nearest training image over the distance from there to the next training image.
Two shares are printed: of samples with a ratio below 1 (one minus the authenticity of arXiv 2102.08921), and below 1/2.
Both are near 1 if every sample is a copy. New real images have a share below 1 of about 1/2 in theory: in many
dimensions, half of all points are the nearest neighbour of their own nearest neighbour (2/3 in one dimension). In
practice it is less, since some images are nearest to many, and so it is measured: each training image in turn is left
out and stands for a sample. A share of samples above that of real images tells of copies; one below it tells nothing
good, since noise has a share of 0. A ratio below 1/2 is seldom chance, and the picture shows what it is: a copy, or a
sample near an image that is unlike all others. Such real images are mostly pictures that the set holds twice; copies of
these are not found. Where the run mirrored its images, mirror images count as well, except that no image is compared
with its own.

The table in recipes/README.md: 1,360 samples of the run of README.md by `rpgan --cond`, 64 px. A tenth of the real
images have a ratio below 1/2, since the set holds some 70 pictures twice, some of them mirrored. Three minutes of one
core of an Intel Xeon, torch 2.14.1.
Takes `sampling_parser`, `run_command` and `save_figure` from report.py.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gan
import metrics
import report

SIDE = 16  # pixels, at which colours are compared
NEIGHBOURS = 4  # of each sample that is drawn
ROWS = 12


def describe(images, network=None, cache=None):
    """Computes features [n,d] of uint8 images [n,C,H,W]: a metrics.Extractor's, or colours in [0,1] at 16 x 16.

    cache: a folder that keeps the network's features.
    """
    if network is None:
        return torch.cat([F.adaptive_avg_pool2d(part / 255, SIDE).flatten(1) for part in images.split(1000)])
    progress = metrics.Progress(network.name)
    if cache is None:
        return metrics.measure(network, images, progress).features
    return metrics.measure_cached(network, images, cache, progress).features


def find_nearest(x, bank, k, leave_out=False):
    """Finds what is nearest to each of x [n,d], the nearest first: distances [n,k], numbers [n,k].

    bank [views,N,d]: features of N images, and perhaps of their mirror images; the nearer view counts, and view v of
    image i has the number v * N + i. leave_out: x are the images, and none is its own neighbour.
    """
    x = x.double()  # in float32, cdist gives equal features a distance
    bank = bank.double()
    distances = []
    numbers = []
    for rows in torch.arange(len(x)).split(512):
        distance, view = torch.cdist(x[rows], bank).min(dim=0)  # [rows,N]
        if leave_out:
            distance[torch.arange(len(rows)), rows] = torch.inf
        nearest = distance.topk(k, largest=False)
        distances.append(nearest.values)
        numbers.append(view.gather(1, nearest.indices) * bank.shape[1] + nearest.indices)
    return torch.cat(distances), torch.cat(numbers)


def find_ratios(distance, nearest, bank):
    """Computes the ratios of samples [n] and of the images in bank [views,N,d], each left out in turn: [n], [N].

    distance, nearest [n]: how far each sample is from the image nearest to it, and its number by `find_nearest`.
    """
    n_real = bank.shape[1]
    gaps, numbers = find_nearest(bank[0], bank, 2, leave_out=True)  # from each image to the next two
    neighbours = numbers % n_real
    of_samples = distance / gaps[nearest % n_real, 0]

    mate = neighbours[:, 0]
    is_mutual = neighbours[mate, 0] == torch.arange(n_real)
    # An image that is left out is no neighbour of its mate either, which then has the second one.
    gap_of_mate = torch.where(is_mutual, gaps[mate, 1], gaps[mate, 0])
    return of_samples, gaps[:, 0] / gap_of_mate


def count_shares(ratios):
    """Computes the shares of ratios [n] below 1 and below 1/2, in [0,1]."""
    return {
        "below_1": (ratios < 1).double().mean().item(),
        "below_half": (ratios < 0.5).double().mean().item(),
    }


# ---- The picture
def draw(samples, images, ratios, numbers):
    """Draws samples [n,C,S,S] beside the images [N,C,S,S] nearest to them: those of the least ratios, then the first.

    ratios [n]; numbers [n,k] of the images. Returns the figure.
    """
    figure = Figure((8, 8.5), layout="constrained")
    titles = {
        "the samples of least ratio": ratios.argsort()[:ROWS],
        "samples at random": torch.arange(len(ratios))[:ROWS],
    }
    for axes, (title, rows) in zip(figure.subplots(1, 2), titles.items()):
        pictures = torch.cat([samples[rows, None], pick(images, numbers[rows])], dim=1)
        draw_rows(axes, ratios[rows], pictures)
        axes.set_title(title)
    return figure


def pick(images, numbers):
    """Takes the images of these numbers, as `find_nearest` gives them, from uint8 [N,C,S,S]: [*numbers.shape,C,S,S]."""
    chosen = images[numbers % len(images)]
    is_mirrored = (numbers >= len(images))[..., None, None, None]
    return torch.where(is_mirrored, chosen.flip(-1), chosen)


def draw_rows(axes, ratios, pictures):
    """Draws rows of pictures [n,columns,C,S,S], a sample and what is nearest to it, and writes each ratio beside."""
    rows, columns, _, _, size = pictures.shape
    pitch = size + 2
    axes.imshow(gan.tile(pictures.flatten(0, 1), columns).permute(1, 2, 0).numpy())
    middles = (torch.arange(rows) + 0.5) * pitch
    axes.set_yticks(middles.tolist(), [f"{ratio:.2f}" for ratio in ratios.tolist()])
    axes.set_xticks([pitch * 0.5, pitch * (columns + 1) / 2], ["sample", "nearest training images"])
    axes.tick_params(length=0)


# ---- Command
def show_nearest(run, runs, trunc, n, extractor, data, seed, device, out):
    """Draws samples beside the images nearest to them, prints the shares and appends them to nearest.jsonl."""
    # Load both sides.
    run = gan.find_run(run, runs)
    folder = gan.checkpoint_of(run).parent
    out = out or folder / "nearest.png"
    if out.suffix != ".png":
        raise gan.UserError(f"--out {out}: give a name that ends in .png")
    device = gan.join(device)
    network = metrics.load_extractor(extractor, device) if extractor else None
    G, config = gan.load_generator(run, device, trunc)
    data = data or config.data
    images, labels, names = gan.load_images(data, config.size, config.channels, config.data_dir)
    if len(images) <= NEIGHBOURS:
        raise gan.UserError(f"{data} has {len(images)} images; give {NEIGHBOURS + 1} or more")
    samples = gan.generate(G, n or len(images), gan.classes_like(G, labels, names, seed), seed)

    # Compare them.
    views = [images, images.flip(3)] if config.flip else [images]
    bank = torch.stack([describe(view, network, gan.cache_folder()) for view in views])
    distances, numbers = find_nearest(describe(samples, network), bank, NEIGHBOURS)
    of_samples, of_real = find_ratios(distances[:, 0], numbers[:, 0], bank)
    shares = {"samples": count_shares(of_samples), "real images": count_shares(of_real)}

    # Show what was found.
    report.save_figure(draw(samples, images, of_samples, numbers), out)
    facts = {
        "by": network.name if network else "colours",
        "trunc": trunc,
        "n": len(samples),
        "steps": G.steps,
        "seed": seed,
        "data": data,
        "n_real": len(images),
        "mirrored": config.flip,
    }
    gan.append_row(folder / "nearest.jsonl", facts | shares)
    for name, share in shares.items():
        gan.say(f"{share['below_1']:.1%} of the {name} have a ratio below 1, {share['below_half']:.1%} below 1/2")
    gan.say(f"wrote {out}, of the run {run}")


def main(argv=None):
    parser = report.sampling_parser("nearest.py", __doc__)
    parser.add_argument("--n", type=lambda n: gan.whole_number(n, 1, 10**7), help="samples (as many as images)")
    parser.add_argument("--extractor", help="a network to compare by, as for gan.py eval (colours at 16 x 16)")
    parser.add_argument("--data", help="where the training images lie now (where they lay at training)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (auto)")
    parser.add_argument("--out", type=Path, help="picture to write, a .png (nearest.png in the run's folder)")
    report.run_command(show_nearest, parser, argv)


if __name__ == "__main__":
    main()
