# SPDX-License-Identifier: MIT
"""What a training step takes on this machine, and where its time goes.

    python bench/step.py --cond --data FOLDER    # the flags of gan.py train; --json for scripts, with times in seconds

Takes half a minute on an idle machine. Other work there slows the step, as it would slow the run.
"""

import contextlib
import json
import platform
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gan  # isort: skip, before torch, since it sets how torch's threads wait
import torch
from torch.utils.flop_counter import FlopCounterMode

METHODS = ("draw", "update_D", "update_G", "update_average")


class Ready(Exception):
    """Carries a GAN and its data out of gan.train."""


class Probe(gan.GAN):
    def train_step(self, data):  # leaves gan.train where the first step would begin
        raise Ready(self, data)


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


def measure(model, data, seconds=20):
    """Measures steps for so many seconds; returns a dict. Times are medians, so the parts need not add up to the step;
    matmul_flop_per_s is a square matrix product's speed in the same dtype; run_s leaves out pictures and checkpoints.
    """
    c, device, whole, parts = model.config, model.device, [], []
    with FlopCounterMode(display=False) as counter, torch.compiler.set_stance("force_eager"):
        model.train_step(data)
    for _ in range(5):
        model.train_step(data)
    block, began = 10 if device.type == "cuda" else 1, time.monotonic()  # a GPU's steps do not wait for one another
    while len(whole) < 3 or time.monotonic() - began < seconds:
        whole.append(timed(device, lambda: [model.train_step(data) for _ in range(block)])[0] / block)
        parts.append(time_parts(model, data))
    step_s, peak = statistics.median(whole), peak_memory(device)  # the peak before the large matrices
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.rand(2, n, n, device=device, dtype=model.dtype)
    product_s = statistics.median(timed(device, torch.mm, a, b)[0] for _ in range(9))
    n_images = len(gan.load_images(c.data, c.size, c.channels, c.data_dir)[0])
    steps = c.steps or max(1, round(c.epochs * (n_images // c.batch / c.d_steps)))
    flop, parts_s = counter.get_total_flops(), {name: statistics.median(p[name] for p in parts) for name in parts[0]}
    result = {"device": processor(device), "torch": torch.__version__, "dtype": str(model.dtype).removeprefix("torch.")}
    result |= {"step_s": step_s, "parts_s": parts_s, "images_per_s": c.batch / step_s, "flop_per_step": flop}
    result |= {"flop_per_s": flop / step_s, "matmul_flop_per_s": 2 * n**3 / product_s, "peak_bytes": peak}
    return result | {"steps": steps, "run_s": steps * step_s}


def processor(device):
    """Names the GPU, or the CPU with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    name = cpuinfo.partition("model name")[2].partition("\n")[0].lstrip("\t :") or platform.processor()
    return f"{name or platform.machine()}, {torch.get_num_threads()} threads"


def peak_memory(device):
    """Returns the most bytes in use so far: of the device's memory, or on a CPU of the process's, if it tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":  # where getrusage begins with the peak of the process that started this one
        return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    if sys.platform == "darwin":
        return __import__("resource").getrusage(0).ru_maxrss


def main():
    flags = [word for word in sys.argv[1:] if word != "--json"]
    if any(word.split("=")[0] == "--resume" for word in flags):
        sys.exit("step.py: error: --resume belongs to a run; give the flags that it was started with")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        try:
            gan.main(["train", *flags, "--runs", folder], model=Probe)
        except Ready as ready:
            model, data = ready.args
    model.__class__ = gan.GAN
    r = measure(model, data)
    if "--json" in sys.argv[1:]:
        return print(json.dumps(r, indent=2))
    parts = ", ".join(f"{name} {1000 * taken:.1f}" for name, taken in r["parts_s"].items())
    print(f"{r['device']}, torch {r['torch']}, {r['dtype']}")
    print(f"step      {1000 * r['step_s']:.1f} ms ({parts}), {r['images_per_s']:.1f} images/s")
    print(f"products  {r['flop_per_step'] / 1e9:.1f} GFLOP a step, {r['flop_per_s'] / 1e9:.0f} GFLOP/s, "
          f"{r['flop_per_s'] / r['matmul_flop_per_s']:.2f} of a matrix product's {r['matmul_flop_per_s'] / 1e9:.0f}")  # fmt: skip
    print(f"memory    {r['peak_bytes'] / 2**20:.0f} MiB at most" if r["peak_bytes"] else "memory    unknown here")
    print(f"the run   {r['steps']} steps, {r['run_s'] / 60:.1f} minutes without pictures and checkpoints")


if __name__ == "__main__":
    main()
