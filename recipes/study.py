# SPDX-License-Identifier: MIT
"""Trains variants of a GAN with several seeds, scores them, and answers the questions of the course.

    python recipes/study.py                                             # synthetic flowers
    python recipes/study.py --data flowers17 --size 64 --epochs 150     # the course's own setting, on a GPU
    python recipes/study.py --data FOLDER --seeds 3 --extractor net.pt2 --variants "hinge --cond" "rpgan --cond"

A variant is a loss with flags of `gan.py train`; other flags go to every run. --out receives the runs, study.json
and report.html. Run the same command again, by the same version of gan.py, to continue a study that was stopped, or
with more --seeds or other --variants to extend it; finished runs and scores are kept. A finished run needs its
checkpoint no more: its JSON files and grids suffice, so that a study can go on on another machine.

The table in recipes/README.md: the 17-category flowers, seed 0 of each variant, 3,150 steps a run, 1,360 samples
against the 1,360 training images by a MobileNetV2 with ImageNet weights. A run and its scores took 2.2 hours of one
core of an Intel Xeon with bfloat16, beside another run (torch 2.14.1, torchvision 0.29.1). The reports, with one
seed each, found ns better once and hinge better once, and truncation helping once and harming once.

The runner, `make_all`, also serves digits.py and bench/quality.py, and the table report.py.
"""

import functools
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gan
import metrics

SCORES = {  # name: decimals
    "FID": 1,
    "FD": 1,
    "SWD": 1,
    "KID": 4,
    "IS": 2,
    "precision": 3,
    "recall": 3,
    "coverage": 3,
    "variety": 2,
}
LOWER_IS_BETTER = ("FID", "FD", "SWD", "KID")


# ---- Runs
@dataclass
class Job:
    """A run of a study, made by commands of its model's program, and what it is scored against."""

    variant: str
    seed: int
    run: Path  # its folder
    flags: list  # of train, but for the seed and the folder
    truncs: list | tuple = ()  # to score; none: the caller scores the run
    data: str | None = None  # the images to compare with
    extractor: str = "inception"  # as for eval
    n: int | None = None  # samples; as many as images
    device: str = "auto"
    threads: int = 1
    model: type = gan.GAN  # whose file trains it

    def make(self):
        """Trains and scores what is missing. A run with all its scores needs no checkpoint."""
        missing = self.missing()
        if self.truncs and not missing:
            return
        if not self.is_trained():
            self.train()
        if missing:
            flags = ["--data", self.data, "--extractor", self.extractor, "--device", self.device]
            if self.n:
                flags += ["--n", self.n]
            self.call("eval", "--run", self.run, *flags, "--trunc", *map(show_trunc, missing))

    def train(self):
        flags = ["--resume", self.run]
        if not (self.run / "checkpoint.pt").exists():
            if self.scores():  # a new run would take the place of the one that these are of
                raise gan.UserError(f"{self.run} has no checkpoint.pt to make its other scores from")
            flags = [*self.flags, "--seed", self.seed, "--runs", self.run.parent, "--name", self.run.name]
        self.call("train", *flags)
        if not self.is_trained():
            raise gan.UserError(f"{self.run} was stopped; run the same command to continue")

    def call(self, *argv):
        run_gan(self.threads, *argv, model=self.model)

    def is_trained(self):
        path = self.run / "checkpoint.pt"
        step, steps = progress(self.run)
        return path.exists() and step > 0 and gan.read_checkpoint(path, self.model)["steps"] >= steps

    def missing(self):
        """Lists the bounds that have no scores yet."""
        scores = self.scores()
        return [trunc for trunc in self.truncs if trunc not in scores]

    def scores(self):
        """Reads the scores that the run has, as `make` makes them: {trunc: row}."""
        rows = gan.read_rows(self.run / "eval.jsonl")
        return {row["trunc"]: row for row in rows if self.is_asked_for(row)}

    def is_asked_for(self, row):
        """Tells whether a row is of the end of the run, these images and this network."""
        step, steps = progress(self.run)
        at_end = row["steps"] == step >= steps
        samples = row["seed"] == 0 and row["n"] == (self.n or row["n_real"])
        same_images = row["data"] == self.data
        return at_end and samples and same_images and is_scored_by(row, self.extractor)


def is_scored_by(row, extractor):
    """Tells whether a row of eval.jsonl is by this extractor; without Inception's weights it has no network."""
    if extractor == "inception":
        return "FID" in row or row["network"] is None
    return row.get("weights") == weights_of(extractor)


@functools.cache
def weights_of(extractor):
    """Returns the hash by which eval.jsonl knows a weights file or program."""
    return hashlib.sha256(Path(extractor).read_bytes()).hexdigest()[:16]


def make_all(jobs, at_once, finished=None):
    """Makes all jobs, so many at a time, and prints how far they are. After an error none begins.

    finished: called with each job when it is made.
    """
    began = time.monotonic()
    first = sum(map(share_done, jobs))
    said = {}
    pool = ThreadPoolExecutor(at_once)
    pending = {pool.submit(job.make): job for job in jobs}
    try:
        while pending:
            done, _ = wait(pending, 20, FIRST_COMPLETED)
            for future in done:
                job = pending.pop(future)
                future.result()
                if finished:
                    finished(job)

            share = sum(map(share_done, jobs))
            rate = (share - first) / (time.monotonic() - began)  # jobs per second
            left = f", {timedelta(seconds=round((len(jobs) - share) / rate))} left of the whole" if rate > 0 else ""
            for future, job in pending.items():
                line = f"run {jobs.index(job) + 1} of {len(jobs)}, {job.run.name}: step {progress(job.run)[0]}"
                if future.running() and said.get(job.run) != line:
                    gan.say(line + left)
                    said[job.run] = line
    finally:
        if any(future.running() for future in pending):
            gan.say("waiting for the runs at work to end")
        pool.shutdown(cancel_futures=True)


def share_done(job):
    step, steps = progress(job.run)
    return 0.9 * step / steps + 0.1 * (job.run / "eval.jsonl").exists()


def progress(run):
    """Reads the newest step in the log of a run, and how many it will have; (0, 1) before its first line."""
    log = gan.read_rows(run / "log.jsonl")
    if not log:
        return 0, 1
    last = log[-1]
    config = config_of(run)
    batches = round(last["step"] / last["epoch"] * config.d_steps)  # per epoch
    return last["step"], gan.planned_steps(config, batches / config.d_steps)


def config_of(run):
    """Reads the config of a run, of whichever model."""
    return SimpleNamespace(**json.loads((run / "config.json").read_text()))


def threads_of(at_once):
    """Returns the threads of each of so many runs at a time."""
    return int(os.environ.get("OMP_NUM_THREADS", max(1, os.cpu_count() // at_once)))


def run_gan(threads, *argv, model=gan.GAN):
    """Runs a command of a model's file in a process, which Ctrl-C reaches too; raises what it says where it fails."""
    program = inspect.getfile(model)
    command = [sys.executable, program, *map(str, argv)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        *before, last = done.stderr.strip().splitlines() or [""]
        for line in before:
            gan.say(line, sys.stderr)
        what = f"{Path(program).name} {' '.join(command[2:5])}"
        raise gan.UserError(f"{what} ended with status {done.returncode}: {last}")


def add_variety(job):
    """Appends the scores of a run with classes once more, each with its variety.

    Variety is the variance of the features within a class, over that of the real images: 1 is as varied as real, 0 is
    one picture for each class. Without a class of two real images there is none.
    """
    rows = [row for row in job.scores().values() if row["network"] and "variety" not in row]
    config = config_of(job.run)
    if not (rows and config.cond):
        return
    device = gan.join(job.device)
    network = metrics.load_extractor(job.extractor, device)
    images, labels, names = gan.load_images(job.data, config.size, config.channels, config.data_dir)
    real = metrics.measure_cached(network, images, gan.cache_folder())
    of_real = variance_within(real.features, labels)
    if not of_real:
        return
    for row in rows:
        G, _ = gan.load_generator(job.run, device, row["trunc"], model=job.model)
        classes = gan.classes_like(G, labels, names, row["seed"])  # as eval does
        due = gan.choose_classes(G, row["n"], classes)
        fake = metrics.measure(network, gan.generate_batches(G, row["n"], classes, row["seed"]))
        of_fake = variance_within(fake.features, due)
        gan.append_row(job.run / "eval.jsonl", row | {"variety": of_fake / of_real})


def variance_within(features, labels):
    """Sums the variances of features [n,d] within a class, by labels [n], and averages the classes of two or more."""
    classes = [features[labels == c] for c in labels.unique()]
    variances = [some.var(dim=0).sum().item() for some in classes if len(some) > 1]
    return statistics.mean(variances) if variances else 0


# ---- The table
def plain(row):
    """Renames FD(net) to FD, and so on; the row's "network" says which."""
    return {name.partition("(")[0]: value for name, value in row.items()}


def table(rows, names=None):
    """Lists lines of cells, the heads first: variant, trunc, number of seeds, mean ± deviation of each score.

    rows: plain rows of one network, with their "variant". names: some of SCORES, by default all that the rows have.
    """
    names = names or score_names(rows)
    groups = {}
    for row in rows:
        groups.setdefault((row["variant"], show_trunc(row["trunc"])), []).append(row)
    lines = [["variant", "trunc", "seeds", *map(with_arrow, names)]]
    for key, group in groups.items():
        cells = [mean_and_spread([row[name] for row in group if name in row], SCORES[name]) for name in names]
        lines.append([*key, str(len(group)), *cells])
    return lines


def score_names(rows):
    """Lists the scores that rows have, the main one first."""
    return [name for name in SCORES if any(name in row for row in rows)]


def with_arrow(name):
    if name == "variety":
        return name  # 1 is best
    return f"{name} {'↓' if name in LOWER_IS_BETTER else '↑'}"


def mean_and_spread(values, decimals=1):
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{decimals}f}{spread}"


def show_trunc(trunc):
    return "none" if trunc is None else f"{trunc:.12g}"


def markdown(lines):
    """Writes lines of cells, the heads first, as a table."""
    rule = ["---", *("---:" for _ in lines[0][1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


# ---- The questions of the course
COURSE = ["ns", "hinge", "hinge --cond"]
QUESTIONS = {"loss": "Which loss?", "cond": "Do classes help?"}
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # Student's t for so many seeds, two-sided; from 6 on about 2.57


def answer(configs, rows):
    """Answers what the change of one flag does, and what truncation does: [(question, [sentences])].

    configs: {variant: gan.Config}. rows: plain rows with their "variant" and "train_seed".
    """
    groups = {}
    for row in rows:
        groups.setdefault((row["variant"], row["trunc"]), {})[row["train_seed"]] = row
    truncs = list(dict.fromkeys(row["trunc"] for row in rows))
    base = None if None in truncs else truncs[0]
    main = score_names(rows)[0]

    answers = {}
    for a, b, flag in single_changes(configs):
        question = QUESTIONS.get(flag, f"Does {flag} matter?")
        answers.setdefault(question, []).append(compare(b, a, groups[b, base], groups[a, base], [main]))
    names = [name for name in (main, "precision", "recall") if all(name in row for row in rows)]
    for variant, trunc in itertools.product(configs, truncs):
        if trunc != base:
            truncated = f"{variant}, trunc {show_trunc(trunc)}"
            said = compare(truncated, show_trunc(base), groups[variant, trunc], groups[variant, base], names)
            answers.setdefault("What does truncation do?", []).append(said)
    return list(answers.items())


def single_changes(configs):
    """Lists pairs of variants that differ in one flag, (a, b, flag), for each b and flag with the first such a."""
    found = {}
    for a, b in itertools.combinations(configs, 2):
        theirs = asdict(configs[b])
        changed = [name for name, value in asdict(configs[a]).items() if value != theirs[name]]
        if len(changed) == 1:
            found.setdefault((b, changed[0]), a)
    return sorted(((a, b, flag) for (b, flag), a in found.items()), key=lambda pair: list(configs).index(pair[1]))


def compare(b, a, rows_b, rows_a, names):
    """Says in a sentence how b differs from a in the named scores, paired by seed; rows: {seed: row}."""
    seeds = [seed for seed in rows_b if seed in rows_a]
    n = len(seeds)
    moved = []
    same = []
    for name in names:
        differences = [rows_b[seed][name] - rows_a[seed][name] for seed in seeds]
        mean = statistics.mean(differences)
        better = "better" if (mean < 0) == (name in LOWER_IS_BETTER) else "worse"
        amount = mean_and_spread([math.copysign(1, mean) * difference for difference in differences], SCORES[name])
        if is_settled(differences):
            moved.append(f"{name} is {better} by {amount}")
        else:
            same.append(f"{name} ({amount} {better})")

    if n == 1:
        anecdote = ", ".join(moved + same)
        return f"{b} against {a}: one seed says that {anecdote}, which is an anecdote."
    said = []
    if moved:
        said.append(f"{', '.join(moved)} over {n} seeds")
    if same:
        said.append(f"{n} seeds do not settle {', '.join(same)}")
    return f"{b} against {a}: {'; '.join(said)}."


def is_settled(differences):
    """Tells whether the mean is not zero, by Student's t at 95%; a single number says what it says."""
    n = len(differences)
    spread = statistics.stdev(differences) if n > 1 else 0
    return abs(statistics.mean(differences)) > T95.get(n, 2.57) * spread / math.sqrt(n)


# ---- Command
def check_data(data):
    if data not in gan.DATASETS and not gan.at_home(data).is_dir():
        raise gan.UserError(f"no folder {data}; --data takes a folder of images, or one of {', '.join(gan.DATASETS)}")


def study(args, definition, configs):
    """Makes the runs and scores that are missing, then the report. configs: {variant: gan.Config}."""
    import report  # here, since it takes the table from this file

    jobs = plan(args, definition, configs)
    make_all(jobs, args.jobs)
    for job in jobs:
        add_variety(job)

    rows = []
    variants = {}
    for job in jobs:
        variants.setdefault(job.variant, []).append(job.run)
        scores = job.scores()
        who = {"variant": job.variant, "train_seed": job.seed}
        rows += [who | plain(scores[trunc]) for trunc in args.trunc]
    if len({row.get("weights") for row in rows}) > 1:
        raise gan.UserError("some runs have scores without a network: remove their eval.jsonl to score them again")
    save(args.out, definition, rows)
    title = f"A study of {Path(definition['data']).name}"
    report.write_report(args.out / "report.html", title, variants, rows, answer(configs, rows))
    gan.say(f"done: see {args.out / 'report.html'}")


def plan(args, definition, configs):
    """Lists the jobs of a study, variant by variant."""
    counts = args.seeds * len(configs) if len(args.seeds) == 1 else args.seeds
    data = definition["data"]
    return [
        Job(
            variant=variant,
            seed=seed,
            run=args.out / f"{run_name(variant)}-seed{seed}",
            flags=[*definition["flags"], *to_flags(variant), "--data", data],
            truncs=args.trunc,
            data=data,
            extractor=args.extractor,
            device=configs[variant].device,
            threads=threads_of(args.jobs),
        )
        for variant, count in zip(configs, counts)
        for seed in range(count)
    ]


def to_flags(variant):
    return variant.split() if variant.startswith("--") else ["--loss", *variant.split()]


def run_name(variant):
    return re.sub(r"[^A-Za-z0-9._]+", "-", variant).strip("-")


def read_configs(variants, flags, data):
    """Checks the flags of all variants as gan.py train does: {variant: gan.Config}, with None for what follows."""
    configs = {variant: read_config(variant, flags, data) for variant in variants}
    if len(set(map(run_name, configs))) < len(variants):
        raise gan.UserError("two --variants have the same name")
    return configs


def read_config(variant, flags, data, model=gan.GAN):
    args = vars(gan.make_parser(model).parse_args(["train", *flags, *to_flags(variant)]))
    for name in ("resume", "data", "seed", "runs", "name"):
        if args.get(name) is not None:
            raise gan.UserError(f"--{name} is for the study to give, not for {variant!r} or every run")
    given = {f.name: args[f.name] for f in fields(model.Config) if f.name in args}
    config = model.Config(**given | {"data": data})
    gan.resolve(config)  # which checks it
    return config


def open_study(out, definition):
    """Opens the folder of a study, which must be new or of this definition; returns its lock, an open file."""
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / ".lock", "a")
    gan.lock_file(lock, out)
    path = out / "study.json"
    if path.exists():
        with gan.reading(path, "file of a study"):
            known = json.loads(path.read_text())["definition"]
        changed = [name for name in definition if definition[name] != known.get(name)]
        if changed:
            raise gan.UserError(f"{out} is a study with different {', '.join(changed)}: give another --out")
    elif any(not path.name.startswith(".") for path in out.iterdir()):
        raise gan.UserError(f"{out} is not empty and holds no study: give another --out")
    else:
        save(out, definition, [])
    return lock


def save(out, definition, rows):
    gan.write_text(out / "study.json", f"{json.dumps({'definition': definition, 'rows': rows}, indent=2)}\n")


def positive(text):
    return gan.whole_number(text, 1, 1000)


def make_parser():
    parser = gan.Parser(prog="study.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--variants", nargs="+", default=COURSE, help="losses with flags (ns hinge 'hinge --cond')")
    truncs = [None, 1.0, 0.7]
    parser.add_argument("--trunc", type=gan.truncation, nargs="+", default=truncs, help="bounds of |z| (none 1 0.7)")
    parser.add_argument("--data", default="synthetic", help="as for gan.py train (synthetic)")
    counts = "number of seeds, counted from 0, of all variants or of each (1)"
    parser.add_argument("--seeds", type=positive, nargs="+", default=[1], help=counts)
    parser.add_argument("--jobs", type=positive, default=1, help="runs at a time (1)")
    parser.add_argument("--extractor", default="inception", help="as for gan.py eval (inception)")
    parser.add_argument("--out", type=Path, help="folder of the study (runs/study-DATA)")
    return parser


def prepare(args, flags):
    """Checks a command line and opens its study: (definition, configs, lock)."""
    configs = read_configs(args.variants, flags, args.data)
    if len(args.seeds) not in (1, len(configs)):
        raise gan.UserError("--seeds takes a number for all variants or one for each")
    args.trunc = list(dict.fromkeys(args.trunc))
    for trunc in args.trunc:
        gan.sample_z(1, 1, trunc)  # which checks it
    if args.extractor != "inception":
        weights_of(args.extractor)
    check_data(args.data)
    definition = {
        "version": gan.__version__,  # others have other networks or defaults
        "data": args.data,
        "trunc": args.trunc,
        "extractor": args.extractor,
        "flags": flags,
    }
    args.out = (args.out or Path("runs", f"study-{Path(definition['data']).name}")).absolute()
    return definition, configs, open_study(args.out, definition)


def main():
    parser = make_parser()
    args, flags = parser.parse_known_args()
    try:
        definition, configs, lock = prepare(args, flags)
        with lock:
            study(args, definition, configs)
    except KeyboardInterrupt:
        gan.say("study.py: stopped; run the same command to continue", sys.stderr)
        sys.exit(130)
    except (gan.UserError, OSError, RuntimeError) as error:
        gan.say(f"study.py: error: {error}", sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
