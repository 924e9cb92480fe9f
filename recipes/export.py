# SPDX-License-Identifier: MIT
"""Writes the generator of a run as a program that needs neither gan.py nor, as ONNX, torch.

    python recipes/export.py RUN --trunc 0.7 --out G.onnx    # or G.pt2 for torch.export, G.pt for TorchScript

The program maps z [N,z_dim] and, with classes, y [N] int64 to images [N,C,H,W] in [-1,1], for any N. The statistics of
the truncation lie inside: draw z with the same bound. The file is checked against the generator before it appears.
"""

import argparse
import io
import logging
import sys
import warnings
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gan


def write_program(G, example, dims):
    torch.export.save(torch.export.export(G, example, dynamic_shapes=dims), file := io.BytesIO())
    return file.getvalue()


def write_onnx(G, example, dims):
    names = {"input_names": ["z", "y"][: len(example)], "output_names": ["images"]}
    program = torch.onnx.export(G, example, dynamo=True, dynamic_shapes=dims, verbose=False, **names)
    return program.model_proto.SerializeToString()


def write_script(G, example, dims):
    torch.jit.save(torch.jit.trace(G, example), file := io.BytesIO())
    return file.getvalue()


WRITERS = {".pt2": write_program, ".onnx": write_onnx, ".pt": write_script}


def load(data, kind):
    """Makes a function of z and y from the bytes of a file."""
    if kind == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(data)
        return lambda *inputs: torch.from_numpy(session.run(None, dict(zip("zy", map(np.asarray, inputs))))[0])
    return torch.export.load(io.BytesIO(data)).module() if kind == ".pt2" else torch.jit.load(io.BytesIO(data))


def inputs(G, n, trunc=None, seed=0):
    """Draws what G takes: (z,) or (z, y)."""
    z = gan.sample_z(n, G.z_dim, trunc, torch.Generator().manual_seed(seed))
    return (z, gan.choose_classes(G, n, seed=seed)) if G.num_classes else (z,)


@torch.no_grad()
def export(G, path, trunc=None):
    """Writes G, as load_generator returns it for trunc, to a .pt2, .onnx or .pt file; returns the largest error."""
    path, example = Path(path), inputs(G, 2, trunc)
    dims = tuple({0: torch.export.Dim("n")} for _ in example)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecations inside torch
        data = WRITERS[path.suffix](G, example, dims)
        program = load(data, path.suffix)
        errors = [(program(*x) - G(*x)).abs().max().item() for x in (inputs(G, n, trunc, n) for n in (1, 2, 7))]
    if max(errors) > 1e-3:
        raise gan.UserError(f"{path.suffix} gives other images than the generator, by {max(errors):.2g} of 2")
    with gan.whole_file(path) as file:
        file.write(data)
    return max(errors)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="folder of a run, or a checkpoint")
    parser.add_argument("--trunc", type=gan.truncation, help="bound of |z| (none)")
    parser.add_argument("--out", default="G.onnx", help=f"a file that ends in {', '.join(WRITERS)} (G.onnx)")
    args = parser.parse_args(argv)
    try:
        if Path(args.out).suffix not in WRITERS:
            raise gan.UserError(f"--out {args.out}: give a file that ends in {', '.join(WRITERS)}")
        logging.disable()  # torch's exporter tells of its steps
        G, _ = gan.load_generator(gan.find_run(args.run), trunc=args.trunc)
        error = export(G, args.out, args.trunc)
    except (gan.UserError, OSError) as error:
        parser.exit(2, gan.say(f"export.py: error: {error}", sys.stderr))
    gan.say(f"wrote {args.out}: {error:.1g} from the generator's images at most")


if __name__ == "__main__":
    main()
