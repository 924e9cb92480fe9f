# SPDX-License-Identifier: MIT
"""What there is to say about gan.py on one GPU, in ten minutes.

    python bench/gpu.py --data FOLDER --extractor net.pt2

A step at 32, 64 and 128 px by dtype and with --compile, beside a textbook loop of the same networks (speed.py), with
TF32 and cuDNN's autotuner for both; the memory of a step; 150 epochs of a folder at 64 px with classes, as `gan.py
train` makes them, and their scores; extraction. One table each, ready for the README.
"""

import argparse
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import metrics
from speed import DEVICE, in_turns, make_gan, textbook_of, textbook_step  # speed.py beside this file
from step import processor, timed

KINDS = {  # name: (--amp, --compile)
    "float32": ("off", False),
    "bfloat16": ("bf16", False),
    "float16": ("fp16", False),
    "bfloat16, --compile": ("bf16", True),
}


def table(*names):
    """Prints the head of a table: the first column is text, the others are numbers."""
    rule = ["---", *("---:" for _ in names[1:])]
    print(f"\n| {' | '.join(names)} |\n| {' | '.join(rule)} |", flush=True)


def row(*values):
    print(f"| {' | '.join(map(str, values))} |", flush=True)


def peak_mib(step):
    """Returns the largest use of the device's memory in three steps, in MiB."""
    torch.cuda.reset_peak_memory_stats(DEVICE)
    for _ in range(3):
        timed(DEVICE, step)
    return torch.cuda.max_memory_allocated(DEVICE) // 2**20


def steps(size, batch=64, turns=30):
    """Prints a row for each kind of a step: milliseconds, images per second, textbook's time over its own, memory."""
    _, data = make_gan(size, batch)
    works = {}
    for name, (amp, compile) in KINDS.items():
        model, _ = make_gan(size, batch, amp, compile)
        works[name] = partial(model.train_step, data)
    works["textbook"] = partial(textbook_step, textbook_of(make_gan(size, batch)[0]), data)

    seconds = in_turns(turns, works, warm_up=10)
    for name, taken in seconds.items():
        ratio = seconds["textbook"] / taken
        row(f"{size} px, {name}", f"{1000 * taken:.1f}", f"{batch / taken:.0f}", f"{ratio:.2f}", peak_mib(works[name]))


def whole_run(data, extractor, runs):
    """Trains 150 epochs at 64 px with classes by gan.py's own commands, and scores them."""
    program = [sys.executable, ROOT / "gan.py"]
    flags = ["--cond", "--size", "64", "--epochs", "150", "--runs", runs, "--name", f"gpu-{time.time_ns()}"]
    taken, _ = timed(DEVICE, partial(subprocess.run, [*program, "train", "--data", data, *flags], check=True))
    row("150 epochs at 64 px, with classes", f"{taken:.0f} s")

    score = [*program, "eval", "--runs", runs, "--extractor", extractor, "--trunc", "none", "1.5", "1", "0.7"]
    taken, _ = timed(DEVICE, partial(subprocess.run, score, check=True))
    row("the scores at four bounds", f"{taken:.0f} s")


def extraction(extractor, n=2000):
    """Prints how many images a network reads per second, on the GPU and on the CPU."""
    images = torch.randint(256, (n, 3, 64, 64), dtype=torch.uint8)
    for device in (DEVICE, torch.device("cpu")):
        network = metrics.load_extractor(extractor, device)
        metrics.measure(network, images[:64])
        taken, _ = timed(DEVICE, metrics.measure, network, images)
        row(f"{network.name}, {processor(device)}", f"{n / taken:.0f} images/s")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of images with classes, for a whole run")
    parser.add_argument("--extractor", required=True, help="network that scores the run, a .pt2 program")
    parser.add_argument("--runs", default="runs", help="folder that the run goes to (runs)")
    args = parser.parse_args()
    if DEVICE.type != "cuda":
        sys.exit("gpu.py: error: no CUDA device here")

    torch.backends.fp32_precision = "tf32"
    print(f"{processor(DEVICE)}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    table("a step of 64 images", "ms", "images/s", "textbook's time / its own", "MiB")
    for size in (32, 64, 128):
        steps(size)
    table("extraction", "speed")
    extraction(args.extractor)
    table("a whole run", "time")
    whole_run(args.data, args.extractor, args.runs)


if __name__ == "__main__":
    main()
