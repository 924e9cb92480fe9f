# SPDX-License-Identifier: MIT
"""How good a way of training is: trains named settings with several seeds, scores each run, prints a table.

    python bench/quality.py flowers-cond emoji mnist --seeds 10 11 12 --jobs 2 --extractor net.pt2 --digits mnist.pt2 \\
        --data-root DATA -- --loss hinge

A setting has 32 px, width 16, batch 64 and bfloat16, unless its name says otherwise; flags of gan.py train behind --
come after its own and win. --data-root holds flowers-17, emoji, mnist and usps. Every run has one thread, so two jobs
fill two cores. The programs that read digits are made by recipes/classifier.py.

Each finished run is a row of --out, with the hash of gan.py; a row of the same setting, flags, seed, scoring network
and version of gan.py is not made again. The runs with their grids lie in --runs; one that was stopped goes on.
"""

import hashlib
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "recipes"))
sys.path.insert(0, str(ROOT))
import gan
import study

COMMON = "--size 32 --width 16 --batch 64 --amp bf16"
TRUNCS = [None, 1.5, 1.0, 0.7]
NAMES = ["FD", "KID", "precision", "recall", "coverage"]
KEPT = ["trunc", "network", "n", "n_real", *NAMES, "density", "IS"]  # IS needs logits
CODE = hashlib.sha256((ROOT / "gan.py").read_bytes()).hexdigest()[:12]


# ---- Settings
@dataclass
class Setting:
    """A data set with flags of gan.py train."""

    data: str  # in --data-root, or made by `cut`, or synthetic
    flags: str
    digits: str | None = None  # whose classifier scores the samples
    n: int | None = None  # samples; as many as images
    against: str | None = None  # the images to compare with, where they are others


SETTINGS = {
    "flowers-cond": Setting("flowers-17", "--cond --steps 3150"),
    "flowers-cond-long": Setting("flowers-17", "--cond --steps 6300"),
    "flowers": Setting("flowers-17", "--steps 3150"),
    "flowers-64": Setting("flowers-17", "--cond --size 64 --width 32 --steps 1575"),
    "four-flowers": Setting("four-flowers", "--cond --steps 3150"),
    "emoji-cond": Setting("emoji", "--cond --steps 3150"),
    "emoji": Setting("emoji", "--steps 3150"),
    "gray-emoji": Setting("emoji", "--channels 1 --steps 3150"),
    "mnist": Setting("mnist", "--steps 2000", "mnist", 10_000, "mnist-10000"),
    "mnist-1360": Setting("mnist-1360", "--channels 1 --no-flip --steps 2000", "mnist", 10_000, "mnist-10000"),
    "usps-cond": Setting("usps", "--cond --size 16 --steps 1200", "usps", 5_000),
    "synthetic": Setting("synthetic", "--steps 1575"),
}


def find_data(data, args):
    """Returns what --data is given for the data of a setting; cuts what is a part of another set."""
    if data in gan.DATASETS:
        return data
    if not data.startswith(("four-", "mnist-")):
        return str(args.data_root / data)
    folder = args.runs / "data" / data
    if not folder.exists():
        part = folder.with_name(f".{data}-{os.getpid()}")
        cut(data, args.data_root, part)
        os.replace(part, folder)
    return str(folder)


def cut(data, root, folder):
    """Makes a folder of the first digits of MNIST, as many as its name says, or of four of the flowers."""
    if data.startswith("mnist-"):
        images, *_ = gan.load_images("mnist", 32, 1, root / "mnist")
        for i, image in enumerate(images[: int(data.removeprefix("mnist-"))]):
            gan.write_picture(folder / f"{i:05d}.png", image)
    else:
        classes = sorted(path for path in (root / "flowers-17").iterdir() if path.is_dir())
        for source in classes[:4]:
            shutil.copytree(source, folder / source.name)


# ---- Rows
def job_of(name, seed, args):
    """Plans the run of a setting's seed."""
    setting = SETTINGS[name]
    data = find_data(setting.data, args)
    where = ["--data", data, "--data-dir", args.data_root / (setting.digits or "")]
    flags = [*COMMON.split(), *setting.flags.split(), *args.flags]
    key = hashlib.sha256(repr((flags, CODE)).encode()).hexdigest()[:8]
    return study.Job(
        variant=name,
        seed=seed,
        run=args.runs / f"{name}-{key}-seed{seed}",
        flags=[*where, *flags],
        truncs=TRUNCS,
        data=find_data(setting.against or setting.data, args),
        extractor=str(args.extractors[setting.digits].absolute()),
        n=setting.n,
    )


def facts_of(job):
    """Returns what a row is known by: two of equal facts are of one run."""
    return {
        "setting": job.variant,
        "seed": job.seed,
        "flags": job.flags[4:],  # without where the data lie
        "weights": study.weights_of(job.extractor),
        "version": gan.__version__,
    }


def row_of(job):
    """Makes the row of a finished run."""
    rate = gan.read_rows(job.run / "log.jsonl")[-1]["images_per_s"]
    batch = study.config_of(job.run).batch
    scores = [study.plain(job.scores()[trunc]) for trunc in TRUNCS]
    scores = [{name: row[name] for name in KEPT if name in row} for row in scores]
    return facts_of(job) | {"code": CODE, "run": job.run.name, "step_s": batch / rate, "scores": scores}


def make_rows(jobs, out, at_once):
    """Makes the runs that have no row in the file out, and their rows; returns the rows of all jobs."""
    known = gan.read_rows(out)

    def find(job):
        rows = [row for row in known if facts_of(job).items() <= row.items()]
        return rows[-1] if rows else None

    def add(job):
        row = row_of(job)
        gan.append_row(out, row)
        known.append(row)
        gan.say(f"{job.variant}, seed {job.seed}: FD {row['scores'][0]['FD']:.1f}")

    out.parent.mkdir(parents=True, exist_ok=True)
    study.make_all([job for job in jobs if not find(job)], at_once, add)
    return [find(job) for job in jobs]


def show(rows):
    """Prints the table, and below it how its rows were made."""
    scores = [{"variant": row["setting"], **score} for row in rows for score in row["scores"]]
    gan.say(f"`gan.py train {COMMON}`, with each setting's flags")
    print(f"\n{study.markdown(study.table(scores, NAMES))}\n")
    print(study.markdown([["setting", "flags", "scored by", "FD of each seed", "s per step"], *map_settings(rows)]))
    codes = sorted({row["code"] for row in rows})
    print(f"\nMean ± deviation over seeds. gan.py {gan.__version__}, code {', '.join(codes)}; now it is {CODE}.")


def map_settings(rows):
    """Lists a line of cells for each setting: what it is, and its seeds one by one."""
    groups = {}
    for row in rows:
        groups.setdefault(row["setting"], []).append(row)
    for name, group in groups.items():
        first = group[0]["scores"][0]
        flags = " ".join(group[0]["flags"]).removeprefix(COMMON).strip()
        by = f"{first['network']}, {first['n']} samples against {first['n_real']} images"
        each = ", ".join(f"{row['scores'][0]['FD']:.1f} ({row['seed']})" for row in group)
        yield [name, f"`{flags}`", by, each, study.mean_and_spread([row["step_s"] for row in group], 3)]


# ---- Command
def read_arguments():
    parser = gan.Parser(prog="quality.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    choices = {"choices": SETTINGS, "metavar": "SETTING"}
    parser.add_argument("settings", nargs="+", help=f"some of {', '.join(SETTINGS)}", **choices)
    parser.add_argument("--seeds", type=gan.whole_number, nargs="+", default=[0, 1], help="seeds (0 1)")
    parser.add_argument("--jobs", type=lambda n: gan.whole_number(n, 1), default=2, help="runs at a time (2)")
    parser.add_argument("--extractor", type=Path, help="network to score with, as for gan.py eval")
    parser.add_argument("--digits", type=Path, help="classifier of MNIST")
    parser.add_argument("--usps", type=Path, help="classifier of USPS (that of --digits)")
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="folder of the data sets (data)")
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"), help="folder of the runs (runs/quality)")
    out = ROOT / "bench" / "quality.jsonl"
    parser.add_argument("--out", type=Path, default=out, help="file of the rows (bench/quality.jsonl)")
    words = [*sys.argv[1:], "--"]
    args = parser.parse_args(words[: words.index("--")])
    args.flags = words[words.index("--") + 1 : -1]
    args.data_root = args.data_root.absolute()
    args.runs = args.runs.absolute()
    args.extractors = {None: args.extractor, "mnist": args.digits, "usps": args.usps or args.digits}
    for name in args.settings:
        if not args.extractors[SETTINGS[name].digits]:
            raise gan.UserError(f"{name} needs {'--digits' if SETTINGS[name].digits else '--extractor'}")
    return args


def main():
    try:
        args = read_arguments()
        jobs = [job_of(name, seed, args) for name in args.settings for seed in args.seeds]
        show(make_rows(jobs, args.out, args.jobs))
    except KeyboardInterrupt:
        gan.say("quality.py: stopped; run the same command to continue", sys.stderr)
        sys.exit(130)
    except (gan.UserError, OSError) as error:
        gan.say(f"quality.py: error: {error}", sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
