# SPDX-License-Identifier: MIT
"""What a training step takes on this machine, and its parts: times GAN's methods from outside.

    python bench/step.py --cond --data FOLDER        # the flags of gan.py train; --json for scripts

It takes half a minute on an idle machine. Other work there slows it, as it would the run.
"""

import itertools
import json
import statistics
import sys
import time
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gan  # before torch, for its threads' sake

import torch
from torch.utils.flop_counter import FlopCounterMode


PARTS = ("draw", "update_D", "update_G", "update_average")  # methods of GAN; "data" is the iterator


def timed(device, work, *args):
    """Returns the seconds of work(*args), with what the device has to do for it, and its result."""
    began = time.perf_counter()
    result = work(*args)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began, result


def watch(model, seconds):
    """Makes the methods of a GAN add their seconds to a dict; returns what does so for any function."""

    def watched(name, method):
        def run(*args):
            taken, result = timed(model.device, method, *args)
            seconds[name] += taken
            return result

        return run

    for name in PARTS:
        setattr(model, name, watched(name, getattr(model, name)))
    return watched


def bench(config, seconds=20):
    """Measures the training that config describes, for so many seconds after some steps to warm up: a dict.

    Times are medians in seconds. FLOP are the products and sums of convolutions and matrix products;
    matmul_flop_per_s is what a square matrix product of the same dtype reaches. peak_bytes is the device's memory, on a
    CPU the process's. run_s leaves out pictures and checkpoints.
    """
    device, config = gan.join(config.device), gan.resolve(config)
    images, labels, classes = gan.load_images(config.data, config.size, config.channels, config.data_dir)
    if config.augment == "auto":
        config.augment = "color,translation,cutout"
    model = gan.GAN(config, len(classes) if config.cond else 0, device)
    data = gan.batches(images, labels, config, device)
    for _ in range(3):
        timed(device, model.train_step, data)
    with FlopCounterMode(display=False) as counter:
        model.train_step(data)
    steps, ends = [], time.monotonic() + seconds / 2
    while len(steps) < 3 or time.monotonic() < ends:
        steps.append(timed(device, model.train_step, data)[0])
    parts, ends, taken = [], time.monotonic() + seconds / 2, {}
    data = map(watch(model, taken)("data", next), itertools.repeat(data))
    while len(parts) < 3 or time.monotonic() < ends:
        taken.update(dict.fromkeys(("data", *PARTS), 0.0))
        model.train_step(data)
        parts.append(dict(taken))
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.rand(2, n, n, device=device, dtype=model.dtype)
    product = statistics.median(timed(device, torch.mm, a, b)[0] for _ in range(9))
    step = statistics.median(steps)
    count = config.steps or max(1, round(config.epochs * (len(images) // config.batch / config.d_steps)))
    return {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{torch.get_num_threads()} CPU threads",
        "torch": torch.__version__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "step_s": step,
        "parts_s": {name: statistics.median(part[name] for part in parts) for name in parts[0]},
        "images_per_s": config.batch / step,
        "flop_per_step": counter.get_total_flops(),
        "flop_per_s": counter.get_total_flops() / step,
        "matmul_flop_per_s": 2 * n**3 / product,
        "peak_bytes": peak_memory(device),
        "steps": count,
        "run_s": count * step,
    }


def peak_memory(device):
    """Returns the most bytes in use so far: of the device's memory, or on a CPU of the process's; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":  # where getrusage begins with the peak of the process that started this one
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def main():
    as_json = "--json" in sys.argv[1:]
    flags = [word for word in sys.argv[1:] if word != "--json"]
    args = gan.make_parser(gan.GAN).parse_args(["train", *flags])
    gan.hold_memory()
    r = bench(gan.Config(**{f.name: getattr(args, f.name) for f in fields(gan.Config) if hasattr(args, f.name)}))
    if as_json:
        return print(json.dumps(r, indent=2))
    parts = ", ".join(f"{name} {1000 * taken:.1f}" for name, taken in r["parts_s"].items())
    print(f"{r['device']}, torch {r['torch']}, {r['dtype']}")
    print(f"step      {1000 * r['step_s']:.1f} ms ({parts}), {r['images_per_s']:.1f} images/s")
    print(f"products  {r['flop_per_step'] / 1e9:.1f} GFLOP a step, {r['flop_per_s'] / 1e9:.0f} GFLOP/s, "
          f"{r['flop_per_s'] / r['matmul_flop_per_s']:.2f} of a matrix product's {r['matmul_flop_per_s'] / 1e9:.0f}")  # fmt: skip
    print(f"memory    {(r['peak_bytes'] or 0) / 2**20:.0f} MiB at most")
    print(f"the run   {r['steps']} steps, {r['run_s'] / 60:.1f} minutes besides pictures and checkpoints")


if __name__ == "__main__":
    main()
