# SPDX-License-Identifier: MIT
"""How good a way of training is: trains it with several seeds, scores each run, prints a table.

    python bench/quality.py --data flowers-17 --extractor mobilenet_v2_imagenet.pt2 --jobs 2 -- --lr-G 2e-4

The protocol: 32 px, --cond, hinge, batch 64, width 16, 3,150 steps, bfloat16, and as many samples as images at each trunc.
Flags of gan.py train behind -- come after these and win. Every run has one thread, so two jobs fill two cores.

The file of --out gets a line for each run, and the runs lie beside it. A line of the same data, extractor, flags and
seed is not made again, and a run that was stopped goes on. After a change of gan.py, give another --out.
"""

import argparse
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

GAN = Path(__file__).resolve().parent.parent / "gan.py"
CODE = hashlib.sha256(GAN.read_bytes()).hexdigest()[:12]
PROTOCOL = ["--size", "32", "--cond", "--loss", "hinge", "--batch", "64", "--width", "16", "--amp", "bf16"]
COLUMNS = [(None, "FD", 1), (None, "KID", 4), (None, "IS", 2), (None, "precision", 3), (None, "recall", 3)]
COLUMNS += [(None, "coverage", 3), (0.7, "precision", 3), (0.7, "FD", 1), (None, "s a step", 3)]


def gan(*argv):
    """Runs a command of gan.py with one thread; where that fails, ends with its message."""
    command, environment = [sys.executable, GAN, *map(str, argv)], os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr.strip() or f"gan.py {argv[0]} ended with status {done.returncode}")


def is_done(run):
    return last_line(run)["step"] >= json.loads((run / "config.json").read_text())["steps"]


def last_line(run):
    return json.loads((run / "log.jsonl").read_text().splitlines()[-1])


def train_and_score(key, seed, out):
    """Trains and scores one seed; returns its line of the results, a dict: key and more."""
    run = out.parent / f"quality-{hashlib.sha256(repr((key, CODE)).encode()).hexdigest()[:8]}-{seed}"
    print(f"seed {seed}: see {run / 'log.jsonl'}", file=sys.stderr)
    if not (run / "checkpoint.pt").exists():
        gan("train", *key["flags"], "--data", key["data"], "--seed", seed, "--runs", run.parent, "--name", run.name)
    elif not is_done(run):
        gan("train", "--resume", run)
    if not is_done(run):
        sys.exit(f"{run} was stopped; the same command goes on with it")
    gan("eval", "--run", run, "--trunc", "none", "0.7", "--extractor", key["extractor"])
    evaluation, config = (json.loads((run / name).read_text()) for name in ("eval.json", "config.json"))
    if "precision" not in evaluation["scores"][0]:  # for want of weights
        sys.exit("; ".join(evaluation["scores"][0]["notes"]))
    result = key | {"seed": seed, "code": CODE, "scores": evaluation["scores"]}
    return result | {"step_s": config["batch"] / last_line(run)["images_per_s"]}


def numbers(result):  # a row of the table; COLUMNS holds (trunc, score, decimals)
    scores = {(s["trunc"], key.partition("(")[0].replace("FID", "FD")): s[key] for s in result["scores"] for key in s}
    scores[None, "s a step"] = result["step_s"]
    return [scores.get((trunc, score), math.nan) for trunc, score, _ in COLUMNS]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of images")
    parser.add_argument("--extractor", required=True, help="network to score with, as for gan.py eval")
    parser.add_argument("--seeds", type=int, default=3, help="how many: 0, 1, ... (3)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (2)")
    parser.add_argument("--steps", type=int, default=3150, help="training steps (3150)")
    parser.add_argument("--out", type=Path, default=Path("runs/quality.jsonl"), help="results (runs/quality.jsonl)")
    parser.add_argument("flags", nargs="*", help="flags of gan.py train, behind --")
    args = parser.parse_args()
    data, extractor = (str(Path(s).resolve()) if Path(s).exists() else s for s in (args.data, args.extractor))
    key = {"data": data, "extractor": extractor, "flags": [*PROTOCOL, "--steps", str(args.steps), *args.flags]}
    lines = map(json.loads, args.out.read_text().splitlines() if args.out.exists() else ())
    done = {result["seed"]: result for result in lines if key.items() <= result.items()}
    if any(result["code"] != CODE for result in done.values()):
        print(f"some results in {args.out} were made by another version of gan.py", file=sys.stderr)

    def once(seed):
        if seed not in done:
            done[seed] = train_and_score(key, seed, args.out)
            with open(args.out, "a") as file:
                file.write(json.dumps(done[seed]) + "\n")
            print(f"seed {seed}: FD {numbers(done[seed])[0]:.1f}", file=sys.stderr, flush=True)
        return numbers(done[seed])

    try:
        with ThreadPoolExecutor(args.jobs) as jobs:
            rows = list(jobs.map(once, range(args.seeds)))
    except SystemExit as error:  # of a run, with its message
        parser.exit(2, f"{error.code}\n")
    heads = [score if trunc is None else f"{score} at {trunc}" for trunc, score, _ in COLUMNS]
    print(f"`{' '.join(key['flags'])}`, scores by {Path(args.extractor).stem}\n")
    print(f"| seed | {' | '.join(heads)} |\n|{' ---: |' * (len(heads) + 1)}")
    for seed, row in enumerate(rows):
        print(f"| {seed} | {' | '.join(f'{value:.{d}f}' for value, (*_, d) in zip(row, COLUMNS))} |")
    if len(rows) > 1:
        columns = zip(zip(*rows), COLUMNS)
        spread = (f"{statistics.mean(c):.{d}f} ± {statistics.stdev(c):.{d}f}" for c, (*_, d) in columns)
        print(f"| mean ± deviation | {' | '.join(spread)} |")


if __name__ == "__main__":
    main()
