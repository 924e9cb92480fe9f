# SPDX-License-Identifier: MIT
"""The study of the course: trains variants of a GAN with several seeds, scores them, and answers its questions.

    python recipes/study.py                                             # synthetic flowers
    python recipes/study.py --data flowers17 --size 64 --epochs 150     # the course's own setting, on a GPU
    python recipes/study.py --data FOLDER --seeds 3 --extractor net.pt2 --variants "hinge --cond" "rpgan --cond"

A variant is a loss with flags of `gan.py train`; other flags go to every run. --out receives the runs,
study.json, report.html and report.md. Run the same command again to continue a study that was stopped, or with more
--seeds to extend it; finished runs and scores are kept.
"""

import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, fields
from datetime import timedelta
from pathlib import Path

from torchvision.datasets.utils import download_and_extract_archive

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import gan
import report

COURSE = ["ns", "hinge", "hinge --cond"]
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # Student's t for so many seeds, two-sided; from 6 on about 2.57
FLOWERS = "https://www.robots.ox.ac.uk/~vgg/data/flowers/17/17flowers.tgz", "b59a65d8d1a99cd66944d474e1289eab"
CLASSES = "daffodil,snowdrop,lily valley,bluebell,crocus,iris,tigerlily,tulip,fritillary,sunflower,daisy,coltsfoot"
CLASSES = f"{CLASSES},dandelion,cowslip,buttercup,windflower,pansy".split(",")  # 80 pictures each, in this order


def study(args, definition, configs):
    """Makes the runs and scores that are missing, then the report. configs: {variant: gan.Config}."""
    variants = {v: [args.out / f"{run_name(v)}-seed{seed}" for seed in range(args.seeds)] for v in configs}
    jobs = {run: (v, seed) for v, runs in variants.items() for seed, run in enumerate(runs)}

    def make(run):
        variant, seed = jobs[run]
        if not is_trained(run):
            own = ["--data", definition["data"], "--seed", seed, "--runs", args.out, "--name", run.name]
            new = [*definition["flags"], *to_flags(variant), *own]
            run_gan(args, "train", *(["--resume", run] if (run / "checkpoint.pt").exists() else new))
            if not is_trained(run):
                raise gan.UserError(f"{run} was stopped; run the same command to continue")
        if missing := ["none" if t is None else repr(t) for t in args.trunc if t not in scores(run)]:
            own = ["--extractor", args.extractor, "--device", configs[variant].device]
            run_gan(args, "eval", "--run", run, "--trunc", *missing, *own)

    def scores(run):
        def is_ours(row):  # of the run's last step, by this network, on these images, as the study makes them
            network = row.get("weights") == args.weights if args.weights else "FID" in row or not row["network"]
            same = row["data"] == definition["data"] and row["seed"] == 0 and row["n"] == row["n_real"]
            return network and same and row["steps"] == progress(run)[0]

        return report.read_scores(run, is_ours)

    make_all(make, list(jobs), args.jobs)
    found = [({"variant": v, "train_seed": seed}, scores(run)) for run, (v, seed) in jobs.items()]
    rows = [who | rows[trunc] for who, rows in found for trunc in args.trunc]
    if len({row.get("weights") for row in rows}) > 1:
        raise gan.UserError(
            "some runs have scores by other weights, or none: remove their eval.json to score them again"
        )
    save(args.out, definition, rows)
    title = f"A study of {Path(definition['data']).name}"
    report.write_report(args.out / "report.html", title, variants, rows, answer(configs, rows))
    gan.say(f"done: see {args.out / 'report.html'}")


# ---- The questions of the course
def answer(configs, rows):
    """Answers what the change of one flag does, and what truncation does: [(question, [sentences])]."""
    score, table, answers = report.score_columns(rows)[0], {}, {}
    for row in rows:
        table.setdefault((row["variant"], row["trunc"]), {})[row["train_seed"]] = row
    truncs = list(dict.fromkeys(row["trunc"] for row in rows))
    base, asked = None if None in truncs else truncs[0], set()
    for a, b in ((a, b) for i, b in enumerate(configs) for a in list(configs)[:i]):
        changed = [k for k, value in asdict(configs[a]).items() if value != getattr(configs[b], k)]
        if len(changed) == 1 and (b, *changed) not in asked:  # else another pair says what this flag does
            asked.add((b, *changed))
            question = {"loss": "Which loss?", "cond": "Do classes help?"}.get(*changed, f"Does {changed[0]} matter?")
            answers.setdefault(question, []).append(compare(b, a, table[b, base], table[a, base], [score]))
    names = [name for name in (score, "precision", "recall") if all(name in row for row in rows)]
    for v, trunc in ((v, trunc) for v in configs for trunc in truncs if trunc != base):
        what = f"{v}, trunc {report.show_trunc(trunc)}", report.show_trunc(base)
        said = compare(*what, table[v, trunc], table[v, base], names)
        answers.setdefault("What does truncation do?", []).append(said)
    return list(answers.items())


def compare(b, a, rows_b, rows_a, names):
    """Says in a sentence how b differs from a in the named scores, paired by seed; rows: {seed: row}."""
    n, moved, same = len(rows_b), [], []
    for name in names:
        values, short = [rows_b[seed][name] - rows_a[seed][name] for seed in rows_b], report.base_name(name)
        mean, spread = statistics.mean(values), statistics.stdev(values) if n > 1 else 0
        better = "better" if (mean < 0) == (short in report.LOWER_IS_BETTER) else "worse"
        amount = " ± ".join(f"{abs(x):.{report.SCORES[short]}f}" for x in (mean, spread)[:n])
        shown = abs(mean) > T95.get(n, 2.57) * spread / math.sqrt(n)
        said = f"{short} is {better} by {amount}" if shown else f"{short} ({amount} {better})"
        (moved if shown else same).append(said)
    moved, same = ", ".join(moved), ", ".join(same)
    said = [f"{moved} over {n} seeds" if n > 1 else f"one seed says that {moved}"] if moved else []
    said += [f"{n} seed{'s do' if n > 1 else ' does'} not settle {same}"] if same else []
    return f"{b} against {a}: {'; '.join(said)}{', which is an anecdote' if n == 1 else ''}."


# ---- Runs
def make_all(make, runs, jobs):
    """Calls make(run) for all runs, so many at a time, and prints how far the study is. After an error none begins."""
    share = lambda run: 0.9 * progress(run)[0] / progress(run)[1] + 0.1 * (run / "eval.json").exists()  # noqa: E731
    began, first, said, pool = time.monotonic(), sum(map(share, runs)), {}, ThreadPoolExecutor(jobs)
    pending = {pool.submit(make, run): run for run in runs}
    try:
        while pending:
            for future in wait(pending, 20, FIRST_COMPLETED)[0]:
                pending.pop(future)
                future.result()
            done = sum(map(share, runs))
            rate = (done - first) / (time.monotonic() - began)  # runs a second
            left = f", {timedelta(seconds=round((len(runs) - done) / rate))} left of the whole" if rate > 0 else ""
            for run in (run for future, run in pending.items() if future.running()):
                line = f"run {runs.index(run) + 1} of {len(runs)}, {run.name}: step {progress(run)[0]}"
                if said.get(run) != line:
                    gan.say(line + left)
                said[run] = line
    finally:
        if any(future.running() for future in pending):
            gan.say("waiting for the runs at work to end")
        pool.shutdown(cancel_futures=True)


def progress(run):
    """Reads the newest step in the log of a run, and how many it will have; (0, 1) before its first line."""
    if not (log := report.read_log(run) if (run / "log.jsonl").exists() else []):
        return 0, 1
    last, config = log[-1], json.loads((run / "config.json").read_text())
    return last["step"], config["steps"] or max(1, round(round(config["epochs"] * last["step"] / last["epoch"], 6)))


def is_trained(run):
    path = run / "checkpoint.pt"
    step, steps = progress(run)
    return path.exists() and step > 0 and gan.read_checkpoint(path)["steps"] >= steps


def run_gan(args, *argv):
    """Runs a command of gan.py in a process, which Ctrl-C reaches too; raises what it says where it fails."""
    command, environment = [sys.executable, gan.__file__, *map(str, argv)], os.environ.copy()
    environment.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // args.jobs)))
    lock = [args.lock.fileno()]  # held until the last process ends, even if this one is killed
    done = subprocess.run(command, env=environment, capture_output=True, text=True, pass_fds=lock, check=False)
    if done.returncode:
        *before, last = done.stderr.strip().splitlines() or [""]
        print(*before, sep="\n", end="\n" * bool(before), file=sys.stderr)
        raise gan.UserError(f"gan.py {' '.join(command[2:5])} ended with status {done.returncode}: {last}")


def save(out, definition, rows):
    with gan.whole_file(out / "study.json") as file:
        file.write(f"{json.dumps({'definition': definition, 'rows': rows}, indent=2)}\n".encode())


# ---- Command
def positive(text):
    return gan.whole_number(text, 1, 1000)


def to_flags(variant):
    return variant.split() if variant.startswith("--") else ["--loss", *variant.split()]


def run_name(variant):
    return re.sub(r"[^A-Za-z0-9._]+", "-", variant).strip("-")


def read_config(variant, flags, data):
    """Checks the flags of a variant as gan.py train does; returns its Config."""
    args = vars(gan.make_parser(gan.GAN).parse_args(["train", *flags, *to_flags(variant)]))
    if taken := [name for name in ("resume", "data", "seed", "runs", "name") if args.get(name) is not None]:
        raise gan.UserError(f"--{taken[0]} is for the study to give, not for {variant!r} or every run")
    given = {f.name: args[f.name] for f in fields(gan.Config) if f.name in args}
    return gan.resolve(gan.Config(**given | {"data": data}))


def find_data(data, data_dir):
    """Makes the path of a folder absolute, and downloads the course's flowers."""
    if data == "flowers17":
        folder, part = Path(data_dir, data).absolute(), Path(data_dir, f".{data}")
        if not folder.exists():
            download_and_extract_archive(FLOWERS[0], part, part / "all", md5=FLOWERS[1])
            arrange(part / "all" / "jpg", folder)
            shutil.rmtree(part)
        return str(folder)
    if data not in gan.DATASETS and not Path(data).expanduser().is_dir():
        raise gan.UserError(
            f"no folder {data}; --data takes a folder of images, or one of flowers17, {', '.join(gan.DATASETS)}"
        )
    return data if data in gan.DATASETS else str(Path(data).expanduser().absolute())


def arrange(pictures, folder):
    """Moves image_0001.jpg, ... into a sub-folder for each class; the folder appears when it is whole."""
    for c, name in enumerate(CLASSES):
        (pictures / "classes" / name).mkdir(parents=True, exist_ok=True)
        for file in (f"image_{80 * c + i + 1:04d}.jpg" for i in range(80)):
            os.replace(pictures / file, pictures / "classes" / name / file)
    os.replace(pictures / "classes", folder)


def open_study(out, definition):
    """Opens the folder of a study, which must be new or of this definition; returns its lock, an open file."""
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / ".lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        gan.say(f"waiting for the process that works in {out} to end")
        fcntl.flock(lock, fcntl.LOCK_EX)
    if (out / "study.json").exists():
        with gan.report_damage(out / "study.json", "file of a study"):
            known = json.loads((out / "study.json").read_text())["definition"]
        if changed := [key for key in definition if definition[key] != known.get(key)]:
            raise gan.UserError(f"{out} is a study with other {', '.join(changed)}: give another --out")
    elif any(not path.name.startswith(".") for path in out.iterdir()):
        raise gan.UserError(f"{out} is not empty and holds no study: give another --out")
    else:
        save(out, definition, [])
    return lock


def main():
    parser = gan.Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--variants", nargs="+", default=COURSE, help="losses with flags (ns hinge 'hinge --cond')")
    truncs = [None, 1.0, 0.7]
    parser.add_argument("--trunc", type=gan.truncation, nargs="+", default=truncs, help="bounds of |z| (none 1 0.7)")
    parser.add_argument("--data", default="synthetic", help="as for gan.py train, or flowers17 (synthetic)")
    parser.add_argument("--seeds", type=positive, default=1, help="number of seeds, counted from 0 (1)")
    parser.add_argument("--jobs", type=positive, default=1, help="runs at a time (1)")
    parser.add_argument("--extractor", default="inception", help="as for gan.py eval (inception)")
    parser.add_argument("--out", type=Path, help="folder of the study (runs/study-DATA)")
    args, flags = parser.parse_known_args()
    try:
        configs = {variant: read_config(variant, flags, args.data) for variant in args.variants}
        if len({run_name(variant) for variant in configs}) < len(args.variants):
            raise gan.UserError("two --variants have the same name")
        args.trunc = list(dict.fromkeys(args.trunc))
        for trunc in args.trunc:
            gan.sample_z(1, 1, trunc)  # which checks it
        args.weights = None  # as in eval.json
        if args.extractor != "inception":
            args.extractor = str(Path(args.extractor).absolute())
            args.weights = hashlib.sha256(Path(args.extractor).read_bytes()).hexdigest()[:16]
        data = find_data(args.data, next(iter(configs.values())).data_dir)
        definition = {"data": data, "variants": args.variants, "trunc": args.trunc}
        definition |= {"extractor": args.extractor, "flags": flags}
        args.out = (args.out or Path("runs", f"study-{Path(data).name}")).absolute()
        args.lock = open_study(args.out, definition)
        study(args, definition, configs)
    except KeyboardInterrupt:
        parser.exit(130, gan.say("study.py: stopped; run the same command to continue", sys.stderr))
    except (gan.UserError, OSError, RuntimeError) as error:
        parser.exit(2, gan.say(f"study.py: error: {error}", sys.stderr))


if __name__ == "__main__":
    main()
