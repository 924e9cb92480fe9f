# SPDX-License-Identifier: MIT
"""Writes a film of a run, a .gif or .webp: walks between samples, or how the samples came to be.

    python recipes/film.py RUN --trunc 0.7 --out walk.webp         # eight walks between random z, there and back
    python recipes/film.py RUN --training --out training.gif    # the grids of the run's folder samples in turn

Takes `sampling_parser` and `run_command` from report.py.
"""

import sys
from pathlib import Path

from PIL import Image
from torchvision.transforms.functional import to_pil_image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gan
import report


def walk(G, classes=None, seed=0, points=32):
    """Draws a film of eight walks from one z to another and back, in `classes` in turn: PIL images."""
    walks = gan.interpolate(G, classes, columns=points, seed=seed)  # [8,points,C,H,W]
    there = [to_pil_image(gan.tile(samples, 4)) for samples in walks.unbind(dim=1)]
    return there + there[-2:0:-1]


def training(run):
    """Reads the sample grids of a run's folder, the earliest first: PIL images."""
    files = sorted((run / "samples").glob("*.png"))
    if not files:
        raise gan.UserError(f"no pictures in {run / 'samples'}")
    return [Image.open(file).convert("RGB") for file in files]


def write_film(path, pictures, milliseconds=80):
    """Writes PIL images of one size as a film that repeats, in the format that the path ends in."""
    first, *others = pictures
    film = {"save_all": True, "append_images": others, "duration": milliseconds, "loop": 0}
    with gan.atomic_write(path) as file:
        first.save(file, path.suffix[1:], **film)


def make_film(run, runs, trunc, classes, seed, training_film, out):
    """Writes the film `out` of a run, by name or path; None stands for the newest."""
    if out.suffix not in (".gif", ".webp"):
        raise gan.UserError(f"--out {out}: give a name that ends in .gif or .webp")
    run = gan.find_run(run, runs)
    if training_film:
        pictures = training(run)
    else:
        G, _ = gan.load_generator(run, trunc=trunc)
        pictures = walk(G, classes, seed)
    write_film(out, pictures)
    gan.say(f"wrote {out}, {len(pictures)} pictures of the run {run}")


def main(argv=None):
    parser = report.sampling_parser("film.py", __doc__)
    parser.add_argument("--classes", nargs="+", help="names or numbers, to go through in turn (random)")
    parser.add_argument("--training", action="store_true", dest="training_film", help="show the run's own grids")
    parser.add_argument("--out", type=Path, default=Path("film.webp"), help=".gif or .webp (film.webp)")
    report.run_command(make_film, parser, argv)


if __name__ == "__main__":
    main()
