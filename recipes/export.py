# SPDX-License-Identifier: MIT
"""Writes the generator of a run as a program that needs neither gan.py nor, as ONNX, torch.

    python recipes/export.py RUN --trunc 0.7 --out G.onnx    # or G.pt2 for torch.export, G.pt for TorchScript

The program maps z [N,z_dim] and, with classes, y [N] int64 to images [N,C,H,W] in [-1,1], for any N. The statistics of
the truncation lie inside: draw z with the same bound. The file is checked against the generator before it appears.
Takes `run_command` from report.py.
"""

import importlib
import io
import logging
import sys
import warnings
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gan
import report


def write_program(G, example, dims):
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(G, example, dynamic_shapes=dims), buffer)
    return buffer.getvalue()


def write_onnx(G, example, dims):
    program = torch.onnx.export(
        G,
        example,
        dynamo=True,
        dynamic_shapes=dims,
        verbose=False,
        output_names=["images"],
    )
    return program.model_proto.SerializeToString()


def write_script(G, example, dims):
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(G, example), buffer)
    return buffer.getvalue()


def load_program(data):
    return torch.export.load(io.BytesIO(data)).module()


def load_onnx(data):
    import onnxruntime

    session = onnxruntime.InferenceSession(data)

    def run(*inputs):
        names = [given.name for given in session.get_inputs()]
        arrays = dict(zip(names, map(np.asarray, inputs), strict=True))
        return torch.from_numpy(session.run(None, arrays)[0])

    return run


def load_script(data):
    return torch.jit.load(io.BytesIO(data))


# Each kind's writer of G, (G, example, dims) -> bytes, and reader, bytes -> function of z and y.
KINDS = {
    ".pt2": (write_program, load_program),
    ".onnx": (write_onnx, load_onnx),
    ".pt": (write_script, load_script),
}


def inputs(G, n, seed=0):
    """Draws what G takes, with its bound: (z [n,z_dim],) or (z, y [n])."""
    z = gan.sample_z(n, G.z_dim, G.trunc, torch.Generator().manual_seed(seed))
    return (z, gan.choose_classes(G, n, seed=seed)) if G.num_classes else (z,)


@torch.no_grad()
def export(G, path):
    """Writes a generator of `load_generator` to a .pt2, .onnx or .pt file; returns the largest error of its images."""
    write, load = KINDS[path.suffix]
    example = inputs(G, 2)
    dims = tuple({0: torch.export.Dim("n")} for _ in example)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecations inside torch
        data = write(G, example, dims)
        program = load(data)
        drawn = [inputs(G, n, seed=n) for n in (1, 2, 7)]
        error = max((program(*x) - G(*x)).abs().max().item() for x in drawn)
    if error > 1e-3:
        raise gan.UserError(f"{path.suffix} gives other images than the generator, by {error:.2g} of 2")
    with gan.atomic_write(path) as file:
        file.write(data)
    return error


def export_run(run, trunc, out):
    """Writes the averaged generator of a run."""
    if out.suffix not in KINDS:
        raise gan.UserError(f"--out {out}: give a file that ends in {', '.join(KINDS)}")
    if out.suffix == ".onnx":
        check_onnx()
    G, _ = gan.load_generator(gan.find_run(run), trunc=trunc)
    logging.disable()  # torch's exporter tells of its steps
    error = export(G, out)
    gan.say(f"wrote {out}: {error:.1g} from the generator's images at most")


def check_onnx():
    """Refuses to begin where the packages for ONNX are not installed."""
    for name in ("onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise gan.UserError(f"ONNX needs the packages in recipes/requirements.txt: {error}")


def main(argv=None):
    parser = gan.Parser(prog="export.py", description=__doc__.splitlines()[0])
    parser.add_argument("run", help="folder of a run, or a checkpoint")
    parser.add_argument("--trunc", type=gan.truncation, help="bound of |z| (none)")
    parser.add_argument("--out", type=Path, default=Path("G.onnx"), help=f"a file, {', '.join(KINDS)} (G.onnx)")
    report.run_command(export_run, parser, argv)


if __name__ == "__main__":
    main()
