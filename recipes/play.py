# SPDX-License-Identifier: MIT
"""Writes a run as one page that draws its samples in any browser, without a server.

    npm install onnxruntime-web                        # once: what runs the network in the page
    python recipes/play.py RUN --out play.html         # or --cdn: a page smaller by 5 MB, which needs the internet

The page holds G as ONNX, with weights in half precision that are computed in float32, and batch-norm statistics for
each bound of --trunc. It needs a browser of 2023 or later, in which onnxruntime-web (1.30, MIT licence) runs the
network by WebAssembly on one thread. The page's address holds the seeds, so a link shows the same picture. A --cdn page
loads the package from jsdelivr.net; it was tried only with the package's own files served under that address.

Of 68 samples of a 32 px run, drawn in Chromium at four bounds of z, the largest difference from gan.py is 1 of 255
levels, in 1.3% of the values. docs/play.html is the run of docs/experiments.md that did not see a fifth of the flowers.

play.html beside this file is the template. Takes `write_onnx`, `load_onnx` and `check_onnx` from export.py and
`run_command` from report.py.
"""

import base64
import copy
import gzip
import html
import json
import logging
import math
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import export
import gan
import report

TEMPLATE = Path(__file__).with_suffix(".html")
LOADER = "ort.wasm.bundle.min.mjs"  # onnxruntime-web for WebAssembly alone
WASM = "ort-wasm-simd-threaded.wasm"
CDN = f"https://cdn.jsdelivr.net/npm/onnxruntime-web@1.30.0/dist/{LOADER}"


# ---- The network
class Player(nn.Module):
    """G with all that the page moves as inputs: z[N,z_dim], shares of the classes y[N,K] or None, statistics[S]."""

    def __init__(self, G):
        super().__init__()
        self.G = copy.deepcopy(G)
        if G.num_classes:
            self.G.embed = Mixture(G.embed.weight)

    def forward(self, z, y, statistics):
        known = norm_buffers(self.G)
        parts = statistics.split([buffer.numel() for buffer in known.values()])
        return torch.func.functional_call(self.G, dict(zip(known, parts)), (z, y))


class Mixture(nn.Module):
    """Mixes the embeddings of classes: shares y[N,K] -> [N,z_dim]."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, y):
        return y @ self.weight


def norm_buffers(G):
    """Finds the means and variances of all batch norms: {name: [C]}."""
    return {name: buffer for name, buffer in G.named_buffers() if buffer.is_floating_point()}


def statistics(G):
    """Joins the means and variances of all batch norms in the order that Player takes: [S]."""
    return torch.cat(list(norm_buffers(G).values()))


def inputs(G, n, seed=0):
    """Draws what Player takes for G's bound: n samples of random classes."""
    z = gan.sample_z(n, G.z_dim, G.trunc, torch.Generator().manual_seed(seed))
    y = torch.eye(G.num_classes)[gan.choose_classes(G, n, seed=seed)] if G.num_classes else None
    return z, y, statistics(G)


def write_program(G):
    """Writes Player as an ONNX program, bytes, with its weights in half precision."""
    example = inputs(G, 2)
    dims = [{0: torch.export.Dim("n")}, {0: torch.export.Dim("n")}, None]
    if not G.num_classes:
        dims[1] = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecations inside torch
        return halve(export.write_onnx(Player(G).eval(), example, tuple(dims)))


def halve(program):
    """Stores the weights of an ONNX program in half precision, and adds casts back to float32, done once at loading."""
    import onnx

    model = onnx.load_from_string(program)
    casts = []
    for weight in model.graph.initializer:
        if weight.data_type == onnx.TensorProto.FLOAT:
            name = weight.name
            half = onnx.numpy_helper.to_array(weight).astype(np.float16)
            weight.CopyFrom(onnx.numpy_helper.from_array(half, f"{name}.half"))
            casts.append(onnx.helper.make_node("Cast", [f"{name}.half"], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model.SerializeToString()


@torch.no_grad()
def check_program(program, G):
    """Refuses a program whose pictures are not those of a standing generator G, to 2 of 255 levels."""
    z, y, moments = inputs(G, 16, seed=1)
    ours = export.load_onnx(program)(z, *([] if y is None else [y]), moments)
    theirs = G(z, None if y is None else y.argmax(dim=1))
    error = (gan.to_uint8(ours).int() - gan.to_uint8(theirs).int()).abs().max().item()
    if error > 2:
        raise gan.UserError(f"in half precision the pictures differ by {error} of 255 levels")
    return error


# ---- The page
def pack(data):
    """Packs bytes for the page: base64 of gzip."""
    return base64.b64encode(gzip.compress(data, mtime=0)).decode()


def bound_name(trunc):
    return "none" if trunc is None else f"{trunc:g}"


def describe(G, config, truncs, cdn):
    """Describes a generator to the page, as JSON that is safe inside a script element."""
    bounds = [{"name": bound_name(t), "low": math.erfc(t / math.sqrt(2)) / 2 if t else 0} for t in truncs]
    facts = {
        "size": config.size,
        "channels": config.channels,
        "z_dim": G.z_dim,
        "classes": G.classes,
        "bounds": bounds,
        "weights": f"{sum(p.numel() for p in G.parameters()):,}",
        "cdn": CDN if cdn else "",
    }
    return json.dumps(facts).replace("<", "\\u003c")


def read_runtime(folder):
    """Reads the two files of onnxruntime-web that the page needs: (loader, wasm), bytes."""
    try:
        return [(folder / "dist" / name).read_bytes() for name in (LOADER, WASM)]
    except FileNotFoundError:
        raise gan.UserError(f"{folder} is not onnxruntime-web: `npm install onnxruntime-web`, then --ort, or use --cdn")


def fill(template, parts):
    """Puts the parts {name: text} in the places {{name}} of a template."""
    return re.sub(r"{{(\w+)}}", lambda place: parts[place[1]], template)


def make_page(run, trunc, title, ort, cdn, out):
    """Writes the page `out` of a run."""
    if out.suffix != ".html":
        raise gan.UserError(f"--out {out}: give a name that ends in .html")
    export.check_onnx()
    loader, wasm = (b"", b"") if cdn else read_runtime(ort)
    truncs = sorted(set(trunc), key=lambda t: -math.inf if t is None else -t)
    G, config = gan.load_generator(gan.find_run(run))
    logging.disable()  # torch's exporter tells of its steps

    standing = [gan.standing_generator(G, t) for t in truncs]
    program = write_program(G)
    error = max(check_program(program, G) for G in standing)
    moments = torch.stack([statistics(G) for G in standing])
    parts = {
        "title": html.escape(title or Path(config.data).name),
        "model": describe(G, config, truncs, cdn),
        "program": pack(program),
        "statistics": pack(moments.numpy().tobytes()),
        "loader": pack(loader),
        "wasm": pack(wasm),
    }
    text = fill(TEMPLATE.read_text(encoding="utf-8"), parts)
    gan.write_text(out, text)
    gan.say(f"wrote {out}, {len(text) / 1000:,.0f} kB: its pictures are G's to {error} of 255 levels")


def main(argv=None):
    parser = gan.Parser(prog="play.py", description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", help="run, by name or path, or checkpoint file (the newest run)")
    bounds = [None, 1.5, 1.0, 0.7]
    parser.add_argument(
        "--trunc", type=gan.truncation, nargs="+", default=bounds, help="bounds of |z|, or none (none 1.5 1 0.7)"
    )
    parser.add_argument("--title", help="heading of the page (the name of the data)")
    folder = Path("node_modules", "onnxruntime-web")
    parser.add_argument("--ort", type=Path, default=folder, help=f"folder of onnxruntime-web ({folder})")
    parser.add_argument("--cdn", action="store_true", help="load onnxruntime-web from jsdelivr.net instead")
    parser.add_argument("--out", type=Path, default=Path("play.html"), help="page to write (play.html)")
    report.run_command(make_page, parser, argv)


if __name__ == "__main__":
    main()
