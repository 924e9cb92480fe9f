# SPDX-License-Identifier: MIT
"""What a training step takes on this machine, and where its time goes.

    python bench/step.py --cond --data FOLDER    # the flags of gan.py train; --json for scripts, with times in seconds

Takes half a minute on an idle machine. Other work there slows the step, as it would slow the run.
"""

import contextlib
import dataclasses
import json
import platform
import statistics
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from torch.utils.flop_counter import FlopCounterMode

import gan

METHODS = ("draw", "update_D", "update_G", "update_average")


def timed(device, work, *args):
    """Returns the seconds of work(*args), until the device has done it, and its result."""
    began = time.perf_counter()
    result = work(*args)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began, result


def time_parts(model, data):
    """Takes one step; returns the seconds of its data and of each of METHODS."""
    seconds = dict.fromkeys(("data", *METHODS), 0.0)

    def watched(name, work, *args):
        taken, result = timed(model.device, work, *args)
        seconds[name] += taken
        return result

    for name in METHODS:
        setattr(model, name, partial(watched, name, getattr(model, name)))
    model.train_step(iter(partial(watched, "data", next, data), None))
    for name in METHODS:
        delattr(model, name)
    return seconds


def measure(model, data, steps, seconds=20):
    """Measures steps of a GAN for so many seconds; returns a dict, as of a run of `steps`.

    Times are medians, so the parts need not add up to the step. matmul_flop_per_s is the speed of a product of square
    matrices in the same dtype. run_s leaves out pictures and checkpoints.
    """
    device = model.device
    for _ in range(5):
        model.train_step(data)
    flop = count_flop(model, data)  # of a plain step: the first of 16 has a gradient penalty

    # Take steps.
    whole = []
    parts = []
    block = 10 if device.type == "cuda" else 1  # a GPU's steps do not wait for one another
    began = time.monotonic()
    while len(whole) < 3 or time.monotonic() - began < seconds:
        taken, _ = timed(device, take_steps, model, data, block)
        whole.append(taken / block)
        parts.append(time_parts(model, data))

    # Put it together.
    step_s = statistics.median(whole)
    peak = peak_memory(device)  # before the large matrices
    dtype = model.autocast.fast_dtype
    return {
        "device": processor(device),
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "step_s": step_s,
        "parts_s": {name: statistics.median(part[name] for part in parts) for name in parts[0]},
        "images_per_s": model.config.batch / step_s,
        "flop_per_step": flop,
        "flop_per_s": flop / step_s,
        "matmul_flop_per_s": product_speed(device, dtype),
        "peak_bytes": peak,
        "steps": steps,
        "run_s": steps * step_s,
    }


def take_steps(model, data, n):
    for _ in range(n):
        model.train_step(data)


def count_flop(model, data):
    """Takes a step and counts its floating-point operations."""
    with FlopCounterMode(display=False) as counter, torch.compiler.set_stance("force_eager"):
        model.train_step(data)
    return counter.get_total_flops()


def product_speed(device, dtype):
    """Measures how many operations per second a product of large square matrices makes."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.rand(2, n, n, device=device, dtype=dtype)
    seconds = [timed(device, torch.mm, a, b)[0] for _ in range(9)]
    return 2 * n**3 / statistics.median(seconds)


def processor(device):
    """Names the GPU, or the CPU with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = ""
    if sys.platform == "linux":
        _, _, rest = Path("/proc/cpuinfo").read_text().partition("model name")
        name = rest.partition("\n")[0].lstrip("\t :")
    return f"{name or platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def peak_memory(device):
    """Returns the most bytes in use so far, of the device's memory or on a CPU of the process's; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":  # where getrusage begins with the peak of the process that started this one
        _, _, rest = Path("/proc/self/status").read_text().partition("VmHWM:")
        return 1024 * int(rest.split()[0])
    if sys.platform == "darwin":
        import resource  # which Windows lacks

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None


def read_config(flags):
    """Reads the flags of gan.py train; returns a Config."""
    args = vars(gan.make_parser(gan.GAN).parse_args(["train", *flags]))
    if args["resume"]:
        raise gan.UserError("--resume belongs to a run; give the flags that it was started with")
    return gan.Config(**{f.name: args[f.name] for f in dataclasses.fields(gan.Config) if f.name in args})


def show(r):
    parts = ", ".join(f"{name} {1000 * taken:.1f}" for name, taken in r["parts_s"].items())
    share = r["flop_per_s"] / r["matmul_flop_per_s"]
    memory = f"{r['peak_bytes'] / 2**20:.0f} MiB at most" if r["peak_bytes"] else "unknown here"
    print(f"{r['device']}, torch {r['torch']}, {r['dtype']}")
    print(f"step      {1000 * r['step_s']:.1f} ms ({parts}), {r['images_per_s']:.1f} images/s")
    print(f"products  {r['flop_per_step'] / 1e9:.1f} GFLOP per step, {r['flop_per_s'] / 1e9:.0f} GFLOP/s,", end=" ")
    print(f"{share:.2f} of a matrix product's {r['matmul_flop_per_s'] / 1e9:.0f}")
    print(f"memory    {memory}")
    print(f"the run   {r['steps']} steps, {r['run_s'] / 60:.1f} minutes without pictures and checkpoints")


def main():
    flags = [word for word in sys.argv[1:] if word != "--json"]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            model, data, run = gan.prepare(read_config(flags))
    except (gan.UserError, OSError) as error:
        sys.exit(f"step.py: error: {error}")
    result = measure(model, data, run.steps)
    if "--json" in sys.argv[1:]:
        print(json.dumps(result, indent=2))
    else:
        show(result)


if __name__ == "__main__":
    main()
