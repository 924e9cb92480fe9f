# SPDX-License-Identifier: MIT
"""How fast the four commands are while other programs use the cores.

    python bench/busy.py --extractor net.pt2       # some twelve minutes on two cores, which must be idle before

Each command runs as it comes and with OMP_NUM_THREADS=1: on the idle machine, beside one busy process, and beside one
per core. On the idle machine it also runs with a fixed thread per core. The commands in one place take turns. Each time
is the least of --turns; training counts by its step, the other commands whole.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUSY = "while True: sum(range(10**6))"


@contextlib.contextmanager
def busy(n):
    """Keeps n processes at work."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(n)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def environment(threads):
    """Returns the environment of a command, with OMP_NUM_THREADS where threads are given."""
    variables = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return variables | ({"OMP_NUM_THREADS": str(threads)} if threads else {})


def run(argv, folder, threads):
    """Runs a command of this project in a folder; returns its seconds."""
    began = time.monotonic()
    argv = [sys.executable, ROOT / argv[0], *argv[1:]]
    done = subprocess.run(argv, cwd=folder, env=environment(threads), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"busy.py: error: {done.stderr.strip()}")
    return time.monotonic() - began


def seconds_of(argv, folder, threads):
    """Returns the seconds of a command; of training those of a step, without the first third, which chooses threads."""
    seconds = run(argv, folder, threads)
    if "train" not in argv:
        return seconds
    lines = Path(folder, "runs", argv[-1], "log.jsonl").read_text().splitlines()
    rows = [json.loads(lines[i]) for i in (len(lines) // 3, -1)]
    began, ended = (row["step"] * 64 / row["images_per_s"] for row in rows)
    return (ended - began) / (rows[1]["step"] - rows[0]["step"])


def commands(extractor, steps):
    """Lists the commands by name; those behind the first need its run."""
    common = "--device cpu --log-every 1 --sample-every 1e6"
    train = f"gan.py train --data synthetic --cond --size 32 --steps {steps} {common} --name"
    train_64 = f"gan.py train --data synthetic --cond --size 64 --steps {max(6, steps // 4)} {common} --name"
    return {
        "gan.py train, 32 px": train.split(),
        "gan.py train, 64 px": train_64.split(),
        "gan.py sample --n 2000": "gan.py sample --n 2000 --out samples.npz --run base".split(),
        "gan.py eval --n 400": ["gan.py", "eval", "--n", "400", "--run", "base", "--extractor", extractor],
        "metrics.py, 400 images": ["metrics.py", "some.npz", "some.npz", "--extractor", extractor],
    }


def measure(argv, folder, turns, choices):
    """Lists the least seconds of a command for each choice of threads, in turns; None is as it comes."""
    seconds = {threads: [] for threads in choices}
    for _ in range(turns):
        for threads, taken in seconds.items():
            words = [*argv, f"{os.getpid()}-{time.monotonic_ns()}"] if argv[-1] == "--name" else argv
            taken.append(seconds_of(words, folder, threads))
    return [min(taken) for taken in seconds.values()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--extractor", required=True, type=lambda path: str(Path(path).absolute()), help="a .pt2 program"
    )
    parser.add_argument("--steps", type=int, default=60, help="training steps at 32 px; a quarter at 64 px (60)")
    parser.add_argument("--turns", type=int, default=2, help="how often each command runs in each place (2)")
    args = parser.parse_args()

    cores = os.cpu_count()
    print(f"{cores} cores; speeds are shares of those of a fixed number of threads\n")
    print("| command | busy processes | as it comes | of one thread's speed | of a thread per core's |")
    print("| --- | ---: | ---: | ---: | ---: |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        work = commands(args.extractor, args.steps)
        run([*work["gan.py train, 32 px"], "base"], folder, None)
        run("gan.py sample --n 400 --out some.npz --run base".split(), folder, None)
        run(work["gan.py eval --n 400"], folder, None)  # which keeps the features of the images
        for name, argv in work.items():
            for n in sorted({0, 1, cores}):
                choices = [None, 1] if n else [None, 1, cores]
                with busy(n):
                    ours, *fixed = measure(argv, folder, args.turns, choices)
                shares = " | ".join(f"{seconds / ours:.2f}" for seconds in fixed)
                print(f"| {name} | {n} | {ours:.2f} s | {shares} |", flush=True)


if __name__ == "__main__":
    main()
