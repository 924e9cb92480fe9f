# SPDX-License-Identifier: MIT
"""How good a configuration is: trains it over several seeds, scores each, and prints a table.

    python bench/quality.py --data flowers-17 --extractor mobilenet_v2_imagenet.pt2
    python bench/quality.py --data flowers-17 --extractor mobilenet_v2_imagenet.pt2 --seeds 3 --jobs 2 -- --lr-G 1e-4

What stands behind -- are flags of gan.py train, which come after those of the protocol: 32 px, hinge, --cond, batch 64,
3,150 steps, bfloat16. Each run has one thread, so two jobs fill two cores. A run in --runs that is complete is scored
without training it again, and one that was stopped goes on.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

GAN = Path(__file__).resolve().parent.parent / "gan.py"
PROTOCOL = "--size 32 --loss hinge --cond --batch 64 --steps 3150 --amp bf16".split()
SCORES = ("FD", "KID", "IS", "precision", "recall", "coverage")


def gan(*argv):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, GAN, *map(str, argv)], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr.strip())


def measure(args, flags, seed):
    """Trains and scores one seed; returns the scores at each trunc and the seconds of a step."""
    key = hashlib.sha256(repr((Path(args.data).resolve(), flags)).encode()).hexdigest()[:8]
    run = Path(args.runs) / f"quality-{key}-{seed}"
    if not (run / "eval.json").exists():
        if (run / "checkpoint.pt").exists():
            if json.loads((run / "log.jsonl").read_text().splitlines()[-1])["step"] < steps_of(flags):
                gan("train", "--resume", run)
        else:
            name = ("--runs", args.runs, "--name", run.name)
            gan("train", "--data", args.data, *flags, "--seed", seed, *name)
        gan("eval", "--run", run, "--trunc", "none", "0.7", "--extractor", args.extractor)
    plain, truncated = json.loads((run / "eval.json").read_text())["scores"]
    last = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    row = {name: next(v for k, v in plain.items() if k.split("(")[0] == name) for name in SCORES}
    row |= {"FD at 0.7": next(v for k, v in truncated.items() if k.split("(")[0] == "FD")}
    row |= {"precision at 0.7": truncated["precision"], "s a step": 64 / last["images_per_s"]}
    print(f"seed {seed}: FD {row['FD']:.1f}", file=sys.stderr, flush=True)
    return row


def steps_of(flags):
    return int(flags[len(flags) - 1 - flags[::-1].index("--steps") + 1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of images")
    parser.add_argument("--extractor", required=True, help="network to score with; see metrics.py --help")
    parser.add_argument("--seeds", type=int, default=3, help="0, 1, ... (3)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (2)")
    parser.add_argument("--runs", default="runs", help="folder that holds the runs (runs)")
    parser.add_argument("flags", nargs="*", help="flags of gan.py train, behind --")
    args = parser.parse_args()
    with ThreadPoolExecutor(args.jobs) as jobs:
        rows = list(jobs.map(lambda seed: measure(args, [*PROTOCOL, *args.flags], seed), range(args.seeds)))
    print(f"`{' '.join([*PROTOCOL, *args.flags])}`\n")
    print(f"| seed | {' | '.join(rows[0])} |\n| --- |{' ---: |' * len(rows[0])}")
    for seed, row in enumerate(rows):
        print(f"| {seed} | {' | '.join(f'{value:.3f}' for value in row.values())} |")
    if len(rows) > 1:
        columns = [[row[name] for row in rows] for name in rows[0]]
        spread = " | ".join(f"{statistics.mean(c):.3f} +- {statistics.stdev(c):.3f}" for c in columns)
        print(f"| mean +- deviation | {spread} |")


if __name__ == "__main__":
    main()
