# SPDX-License-Identifier: MIT
"""All tests of gan.py and metrics.py: offline, on the CPU.    python -m pytest"""

import contextlib
import errno
import hashlib
import importlib.util
import inspect
import io
import json
import math
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import weakref
import zipfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import mpmath
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

import gan
import metrics

HERE = Path(__file__).resolve().parent
CPU = torch.device("cpu")
TOY = dict(size=16, width=4, max_width=8, z_dim=8, batch=8, device="cpu", amp="off")
TOY_FLAGS = "--size 16 --width 4 --max-width 8 --z-dim 8 --batch 8 --device cpu --amp off".split()


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory):
    """The user's caches stay untouched."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """3 classes of 8 pictures, 20 x 18 pixels; the classes' order shows whether 10 is sorted behind 9."""
    root, generator = tmp_path_factory.mktemp("pictures"), torch.Generator().manual_seed(0)
    for c, name in enumerate(["rose 1", "rose 9", "rose 10"]):
        (root / name).mkdir()
        for i in range(8):
            noise = torch.randint(0, 40, (3, 20, 18), generator=generator)
            to_pil_image((noise + 70 * c).to(torch.uint8)).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def run(tmp_path_factory, folder):
    """A conditional toy run of 6 steps."""
    runs = tmp_path_factory.mktemp("runs")
    return gan.train(gan.Config(**TOY, data=str(folder), cond=True, steps=6, runs=str(runs)))


@pytest.fixture(scope="session")
def extractor_file(tmp_path_factory):
    """A .pt2 program: 4 x 4 pixels as features, fixed projections of them as logits."""

    class Tiny(torch.nn.Linear):
        def forward(self, x):
            features = F.interpolate(x, size=(4, 4), mode="bilinear", antialias=False).flatten(1)
            return features, super().forward(features)

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("extractor") / "tiny.pt2"
    dims = {0: torch.export.Dim("n"), 2: torch.export.Dim("h", min=4), 3: torch.export.Dim("w", min=4)}
    tiny = Tiny(48, 5, bias=False).requires_grad_(False)
    torch.nn.init.normal_(tiny.weight)
    torch.export.save(torch.export.export(tiny, (torch.rand(3, 3, 16, 24),), dynamic_shapes=(dims,)), path)
    return path


def logged(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def losses_of(run):
    return torch.tensor([[row["loss_D"], row["loss_G"]] for row in logged(run)])


def toy(**changes):
    """A conditional toy GAN of three classes."""
    return gan.GAN(gan.resolve(gan.Config(**{**TOY, "augment": "none", "cond": True, **changes})), 3)


def raising(error):
    """A function that raises the error, whatever it is called with."""
    return lambda *args, **options: (_ for _ in ()).throw(error)


def random_batches(config, n=16):
    images = torch.randint(256, (n, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return gan.batches(images, torch.arange(n) % 3, config, CPU)


def fails(capsys, *argv, model=gan.GAN):
    """Runs a command that must end with one short line and status 2; returns the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        gan.main([str(word) for word in argv], model)
    err = capsys.readouterr().err
    assert exit.value.code == 2 and err.count("\n") == 1 and ": error: " in err, err
    return err


# ---- Networks
@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_shapes_and_ranges(size, channels, num_classes):
    y = torch.tensor([0, 2]) if num_classes else None
    x = gan.Generator(size, channels, 4, 16, 8, num_classes)(torch.randn(2, 8), y)
    assert x.shape == (2, channels, size, size) and x.dtype == torch.float32 and x.abs().max() <= 1
    logits = gan.Discriminator(size, channels, 4, 16, num_classes)(x, y)
    assert logits.shape == (2,) and logits.dtype == torch.float32
    for network in (gan.Generator, gan.Discriminator):
        with pytest.raises(gan.UserError):
            network(size=size - 8)
    G, _ = gan.GAN.networks(gan.Config(size=size, channels=channels, width=4, z_dim=8, gain_scale=0.2), num_classes)
    scale = torch.linalg.matrix_norm(G.blocks[0].norm1.gain_bias.weight, 2)
    assert abs(scale - (1 if num_classes else 0.2)) < 1e-4


def true_weight(layer):
    """The weight of a layer, over its exact spectral norm if it is parametrized."""
    if not hasattr(layer, "parametrizations"):
        return layer.weight
    w = layer.parametrizations.weight.original
    return w / torch.linalg.matrix_norm(w.flatten(1), 2)


def convolve(layer, x):
    return F.conv2d(x, true_weight(layer), layer.bias, padding=layer.kernel_size[0] // 2)


def attend(layer, h):
    """SAGAN's self-attention without its last layer: three 1x1 convolutions, the last two pooled; only at 16 px."""
    if h.shape[2] != 16:
        return h
    query, *pooled = (torch.einsum("dc,nchw->ndhw", true_weight(f), h) for f in layer.children())
    key, value = (F.avg_pool2d(m, 2).flatten(2) for m in pooled)
    shares = torch.einsum("ndq,ndk->nqk", query.flatten(2), key).softmax(2)
    return h + layer.gain * torch.einsum("nqk,nck->ncq", shares, value).reshape(h.shape)


def textbook_generator(G, z, y, statistics=None):
    """G's forward pass as it is usually written: upsample first, then norm, ReLU and convolution. Appends to the
    list statistics each adaptive norm with the mean and the variance, over all pixels, of its input."""

    def up(h):
        return h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

    def norm(layer, h, e):
        gain, bias = (e @ true_weight(layer.gain_bias).T + layer.gain_bias.bias).chunk(2, dim=1)
        mean, var = h.mean((0, 2, 3), keepdim=True), h.var((0, 2, 3), keepdim=True, correction=0)
        if statistics is not None:
            statistics.append((layer.norm, mean.detach().flatten(), var.detach().flatten()))
        return (h - mean) / (var + 1e-5).sqrt() * (1 + gain)[:, :, None, None] + bias[:, :, None, None]

    e = torch.cat([z * (z.shape[1] ** 0.5 / z.norm(dim=1, keepdim=True)) ** 0.6, G.embed.weight[y]], 1)
    h = (e @ true_weight(G.linear).T + G.linear.bias).reshape(len(z), -1, 4, 4)
    for b in G.blocks:
        x = up(h)
        r = convolve(b.conv1, F.relu(norm(b.norm1, x, e)))
        r = convolve(b.conv2, F.relu(norm(b.norm2, r, e)))
        h = attend(G.attention, r + (x if isinstance(b.skip, torch.nn.Identity) else convolve(b.skip, x)))
    return torch.tanh(convolve(G.conv, F.relu(G.norm(h))))


def textbook_discriminator(D, x, y):
    """D's forward pass as it is usually written: convolve first, then pool."""
    h = convolve(D.conv, x)
    for b in D.blocks:
        r = convolve(b.conv2, F.relu(convolve(b.conv1, F.relu(h))))
        h = F.avg_pool2d(r + (h if isinstance(b.skip, torch.nn.Identity) else convolve(b.skip, h)), 2)
    phi = F.relu(h).sum((2, 3))
    apart = phi.unflatten(0, (-1, 2)).diff(dim=1).abs().expand(-1, 2, -1).flatten(0, 1)  # each from its neighbour
    logits = sum((v @ true_weight(f).T + f.bias)[:, 0] for v, f in ((phi, D.linear), (apart / 2, D.distance)))
    return logits + (phi * true_weight(D.embed)[y]).sum(1)


@pytest.mark.parametrize("size", [16, 32])
def test_networks_equal_their_textbook_form_in_outputs_gradients_and_statistics(size):
    torch.manual_seed(0)
    y = torch.tensor([0, 1, 2, 1])
    G, z = gan.Generator(size, 3, 4, 8, 8, 3), torch.randn(4, 8, requires_grad=True)
    D, x = gan.Discriminator(size, 3, 4, 8, 3), (torch.rand(4, 3, size, size) * 2 - 1).requires_grad_()
    for p in (*G.parameters(), *D.parameters()):  # biases and gains that are not zero
        p.data += 0.1 * torch.randn_like(p)
    for _ in range(1000):  # until the power iterations have found the norms
        D(x, y)
    D.eval()  # they rest
    assert abs(D(x, y)[2] - D(x[2:3], y[2:3])) > 1e-3 > 1e-5 > abs(D(x[:3], y[:3])[2] - D(x[2:3], y[2:3]))  # no pair
    statistics = []
    pairs = [(G, z, G(z, y), textbook_generator(G, z, y, statistics)), (D, x, D(x, y), textbook_discriminator(D, x, y))]
    for net, given, fast, textbook in pairs:
        assert torch.allclose(fast, textbook, rtol=0, atol=1e-5)
        weights, (names, parameters) = torch.randn_like(fast), zip(*net.named_parameters())
        ours, theirs = (torch.autograd.grad((out * weights).sum(), [*parameters, given]) for out in (fast, textbook))
        largest = max(g.abs().max() for g in theirs)
        for name, a, b in zip([*names, "input"], ours, theirs, strict=True):
            assert torch.allclose(a / largest, b / largest, rtol=0, atol=1e-5), name
    for block, (norm, mean, var) in zip([b for b in G.blocks for _ in range(2)], statistics):
        # The first norm of a block sees each pixel once, the textbook's four times: the same mean and variance, but the
        # running variance is that of a sample, and the samples are of different numbers.
        n = 4 * 16 * 4 ** (list(G.blocks).index(block) + (norm is block.norm2.norm))
        assert torch.allclose(norm.running_mean, 0.1 * mean, rtol=0, atol=1e-5)
        assert torch.allclose(norm.running_var, 0.9 + 0.1 * var * n / (n - 1), rtol=0, atol=1e-5)


def test_spectral_norm_is_float32_under_autocast_and_rests_in_eval_mode():
    layer = torch.nn.Linear(64, 64)
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", norm := gan.SpectralNorm(layer.weight))
    W = layer.parametrizations.weight.original.detach().double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for moves in (True, False):
            u = F.normalize(W @ F.normalize(W.T @ norm.u.double(), dim=0), dim=0) if moves else norm.u.double()
            weight = layer.train(moves).weight
            assert torch.allclose(norm.u.double(), u, rtol=0, atol=1e-6) and weight.dtype == torch.float32
            assert torch.allclose(weight.double(), W / (norm.u.double() @ W @ norm.v.double()), rtol=0, atol=1e-6)


# ---- Losses
REAL, FAKE = torch.tensor([2.0, -1.0]), torch.tensor([2.1, -3.0])
log_sigmoid = lambda x: -math.log(1 + math.exp(-x))  # noqa: E731
D_BCE = -(log_sigmoid(2) + log_sigmoid(-1)) / 2 - (log_sigmoid(-2.1) + log_sigmoid(3)) / 2
BY_HAND = {  # name: (loss of D, loss of G)
    "hinge": ((0 + 2) / 2 + (3.1 + 0) / 2, -(2.1 - 3) / 2),
    "wgan": ((2.1 - 3) / 2 - (2 - 1) / 2, -(2.1 - 3) / 2),
    "lsgan": ((1 + 4) / 4 + (4.41 + 9) / 4, (1.21 + 16) / 4),
    "ns": (D_BCE, -(log_sigmoid(2.1) + log_sigmoid(-3)) / 2),
    "minimax": (D_BCE, (log_sigmoid(-2.1) + log_sigmoid(3)) / 2),
    "rpgan": (-(log_sigmoid(-0.1) + log_sigmoid(2)) / 2, -(log_sigmoid(2.1) + log_sigmoid(-3)) / 2),
}


@pytest.mark.parametrize("name", list(gan.LOSSES))
def test_losses_by_hand(name):
    d_loss, g_loss = gan.LOSSES[name]
    assert abs(d_loss(REAL, FAKE).item() - BY_HAND[name][0]) < 1e-6
    assert abs(g_loss(FAKE).item() - BY_HAND[name][1]) < 1e-6
    for at in (-200.0, 200.0):  # where exp overflows
        logit = torch.tensor([at], requires_grad=True)
        (d_loss(logit, -logit.detach()) + d_loss(-logit.detach(), logit) + g_loss(logit)).backward()
        assert logit.grad.isfinite().all() and logit.grad.abs() <= 1000


# ---- Truncated noise
@pytest.mark.parametrize("trunc", [0.1, 0.7, 2.0, 6.0, None])
def test_noise_is_the_truncated_normal(trunc):
    z = gan.sample_z(2000, 100, trunc, torch.Generator().manual_seed(0)).flatten().double()
    trunc = trunc or 30  # of None: as good as none
    assert z.shape == (200_000,) and z.abs().max() <= trunc
    density, mass = math.exp(-(trunc**2) / 2) / math.sqrt(2 * math.pi), math.erf(trunc / math.sqrt(2))
    assert abs(z.mean()) < 0.01 and abs(z.var() - (1 - 2 * trunc * density / mass)) < 0.01
    # The whole distribution, bounds included: a pile-up anywhere would be a jump.
    cdf = (torch.erf(z.sort().values / math.sqrt(2)) / mass + 1) / 2
    assert (cdf - torch.linspace(0, 1, len(z), dtype=torch.float64)).abs().max() < 0.005


# ---- Augmentation
def test_translation_moves_by_whole_pixels_and_cutout_zeroes_one_square():
    torch.manual_seed(0)
    x = torch.rand(200, 2, 16, 16) + 1
    padded, seen = F.pad(x, (2, 2, 2, 2)), set()
    for n, moved in enumerate(gan.diff_augment(x, "translation")):
        moves = [(i, j) for i in range(5) for j in range(5) if torch.equal(moved, padded[n, :, i : i + 16, j : j + 16])]
        assert len(moves) == 1
        seen.add(moves[0])
    assert len(seen) == 25
    torch.manual_seed(0)
    x = torch.rand(100, 2, 16, 16) + 1
    hole = (out := gan.diff_augment(x, "cutout")) == 0
    assert torch.equal(out[~hole], x[~hole]) and torch.equal(hole[:, 0], hole[:, 1])
    height, width = hole[:, 0].any(2).sum(1), hole[:, 0].any(1).sum(1)
    assert torch.equal(hole[:, 0].sum((1, 2)), height * width)  # a full rectangle
    assert height.max() == 8 and width.max() == 8 and height.min() >= 4 and width.min() >= 4  # half is out at most


# ---- Data
def color_picture():
    """[3,12,8]: red above, blue below, a green column on the left."""
    image = torch.zeros(3, 12, 8, dtype=torch.uint8)
    image[0, :6], image[2, 6:] = 200, 100
    image[:, :, :2] = torch.tensor([0, 250, 0], dtype=torch.uint8)[:, None, None]
    return image


KINDS = "RGB.png L.png 1.png P.png P.gif RGBA.png LA.png RGB.bmp CMYK.tif I;16.png I;16.tif".split()


@pytest.mark.parametrize("kind", KINDS)
def test_each_lossless_mode_is_decoded_exactly(tmp_path, kind):
    picture = color_picture()
    mode, suffix = kind.split(".")
    path, pil = tmp_path / f"picture.{suffix}", to_pil_image(picture)
    if mode == "I;16":
        expected = picture[:1].expand(3, -1, -1)
        pil = Image.fromarray(picture[0].numpy().astype(np.uint16) * 257)
    else:
        pil = pil.convert(mode)
        expected = torch.from_numpy(np.array(pil.convert("RGB"))).permute(2, 0, 1)
    pil.save(path)
    decoded = gan.read_image(path).expand(3, -1, -1)
    assert decoded.dtype == torch.uint8 and torch.equal(decoded, expected)


def test_jpegs_rotation_and_transparency(tmp_path):
    pil = to_pil_image(color_picture())
    for mode in ("L", "CMYK"):
        pil.convert(mode).save(tmp_path / "x.jpg", quality=100, subsampling=0)
        expected = np.array(pil.convert(mode).convert("RGB")).transpose(2, 0, 1).astype(float)
        assert np.abs(gan.read_image(tmp_path / "x.jpg").expand(3, -1, -1).numpy() - expected).mean() < 4
    exif = pil.getexif()
    exif[274] = 6  # the camera was turned: a viewer shows the picture turned by 90 degrees to the right
    pil.save(tmp_path / "x.jpg", quality=100, subsampling=0, exif=exif)
    expected = color_picture().rot90(-1, (1, 2)).float()
    assert (gan.read_image(tmp_path / "x.jpg").float() - expected).abs().mean() < 4
    rgba = torch.cat([color_picture(), torch.zeros(1, 12, 8, dtype=torch.uint8)])
    rgba[3, 6:] = 51  # a fifth
    to_pil_image(rgba).save(tmp_path / "x.png")
    decoded = gan.read_image(tmp_path / "x.png")
    assert (decoded[:, :6] == 255).all()  # white
    assert decoded[:, 11, 7].tolist() == [204, 204, 224]  # 0.2 of (0, 0, 100) and 0.8 of white


def test_folder_with_classes_links_and_junk(folder, tmp_path, capsys):
    data, linked = tmp_path / "data", tmp_path / "linked"
    shutil.copytree(folder, data)
    (data / "rose 9" / "broken.png").write_bytes((folder / "rose 9" / "1.png").read_bytes()[:60])
    (data / "rose 9" / "program.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(data / "float.tif")
    bmp_folder(data / ".hidden", 9)
    (data / "rose 1").rename(linked)
    (data / "rose 1").symlink_to(linked)
    (linked / "up").symlink_to(data)
    (linked / "beside").symlink_to(data / "rose 9")  # whose pictures stay in their own class
    (data / "rose 10" / "up").symlink_to(linked)  # each folder is entered once
    (data / "gone").symlink_to(tmp_path / "nowhere")
    for _ in range(2):  # what is skipped is told each time
        images, labels, classes = gan.load_images(str(data), 16, 3)
        out = capsys.readouterr().out
        texts = "skipped 3 of 27", "float.tif (floating-point", "program.png", "broken.png"
        assert all(text in out for text in texts)
    assert images.shape == (24, 3, 16, 16) and images.dtype == torch.uint8
    assert classes == ["rose 1", "rose 9", "rose 10"]
    assert labels.dtype == torch.int64 and labels.bincount().tolist() == [8, 8, 8]
    means = [images[labels == c].float().mean().item() for c in range(3)]  # pictures and labels belong together
    assert all(abs(mean - expected) < 3 for mean, expected in zip(means, (19.5, 89.5, 159.5)))
    to_pil_image(torch.zeros(3, 16, 16, dtype=torch.uint8)).save(data / "stray.png")
    images, labels, classes = gan.load_images(str(data), 16, 1)
    assert images.shape == (25, 1, 16, 16) and labels.tolist() == [0] * 25 and classes == []
    assert "stray.png lies beside" in capsys.readouterr().out


def test_cache_is_used_and_never_stale(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = tmp_path / "data"
    shutil.copytree(folder / "rose 1", data)
    calls, read_image = [], gan.read_image
    monkeypatch.setattr(gan, "read_image", lambda path: calls.append(path) or read_image(path))

    def load(size=16, channels=3):
        calls.clear()
        return gan.load_images(str(data), size, channels)[0].clone(), len(calls)

    (first, decoded), (again, decoded_again) = load(), load()
    assert (decoded, decoded_again) == (8, 0) and torch.equal(first, again)
    assert load(size=32)[1] == 8 and load(channels=1)[1] == 8 and load()[1] == 0
    to_pil_image(torch.full((3, 20, 18), 255, dtype=torch.uint8)).save(data / "3.png")
    changed, count = load()
    assert count == 8 and (changed[3] == 255).all()
    os.utime(data / "3.png", (1, 1))
    assert load()[1] == 8
    (data / "3.png").unlink()
    assert len(load()[0]) == 7
    for cached in (tmp_path / "cache").rglob("*.pt"):  # half-written
        cached.write_bytes(cached.read_bytes()[:-1])
    assert load()[1] == 7 and load()[1] == 0 and not list((tmp_path / "cache").rglob("*.part"))
    for name, value in (("A", 10), ("B", 200)):  # equal names, sizes and times
        assert gan.load_images(bmp_folder(tmp_path / name, value), 16, 3)[0].float().mean() == value
        assert ("dark, from 0 to 10 of 255" in capsys.readouterr().out) == (value == 10)
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert len(load()[0]) == 7


def test_mnist_in_torchvision_layout_and_synthetic_flowers(tmp_path):
    (raw := tmp_path / "MNIST" / "raw").mkdir(parents=True)
    number = lambda n: n.to_bytes(4, "big")  # noqa: E731
    pixels = np.repeat(np.array([10, 20, 30], np.uint8), 28 * 28).tobytes()
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(b"".join(map(number, (2051, 3, 28, 28))) + pixels)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(number(2049) + number(3) + b"\x07\x00\x02")
    images, labels, classes = gan.load_images("mnist", 32, 1, str(tmp_path))
    assert images.shape == (3, 1, 32, 32) and images.float().mean((1, 2, 3)).tolist() == [10, 20, 30]
    assert [classes[y] for y in labels] == ["7", "0", "2"]
    config = gan.resolve(gan.Config(data="mnist"))
    assert (config.channels, config.flip, config.size) == (1, False, 64)
    images, labels, classes = gan.load_images("synthetic", 32, 3)
    assert images.shape == (1360, 3, 32, 32) and labels.bincount().tolist() == [80] * 17 and len(classes) == 17
    assert torch.equal(images, gan.load_images("synthetic", 32, 3)[0])
    assert gan.load_images("synthetic", 16, 1)[0].shape == (1360, 1, 16, 16)
    x = images.float().flatten(1) / 255
    means = torch.stack([x[labels == c].mean(0) for c in range(17)])
    assert ((torch.cdist(x, means).argmin(1) == labels).float().mean()) > 0.9  # classes differ ...
    assert min(x[labels == c].std(0).mean() for c in range(17)) > 0.04  # ... and vary


def test_batches_cover_each_epoch_can_start_anywhere_and_mirror_half():
    images, config = torch.arange(10, dtype=torch.uint8)[:, None, None, None], gan.Config(batch=3, flip=False)

    def take(count, start=0):
        stream = gan.batches(images, torch.arange(10), config, CPU, start)
        return [next(stream) for _ in range(count)]

    taken = take(9)
    epochs = [torch.cat([y for _, y in taken[i : i + 3]]) for i in (0, 3, 6)]
    assert all(len(ys.unique()) == 9 for ys in epochs) and not torch.equal(epochs[0], epochs[1])
    for x, y in taken:
        assert torch.allclose(x.flatten(), y / 127.5 - 1)
    for (_, a), (_, b) in zip(take(4, start=5), taken[5:]):
        assert torch.equal(a, b)
    config.cond = True
    for (x, y), (_, other) in zip(take(9), taken):
        assert torch.equal(y, other.sort().values) and torch.allclose(x.flatten(), y / 127.5 - 1)
    images = torch.tensor([0, 255], dtype=torch.uint8).expand(1000, 1, 1, 2)
    torch.manual_seed(0)
    x, _ = next(gan.batches(images, torch.zeros(1000), gan.Config(batch=1000, flip=True), CPU))
    assert abs((x[:, 0, 0, 0] == 1).float().mean() - 0.5) < 0.06 and (x.sum(3) == 0).all()


def bmp_folder(path, value):
    path.mkdir()
    for i in range(4):
        to_pil_image(torch.full((3, 16, 16), value, dtype=torch.uint8)).save(path / f"{i}.bmp")
        os.utime(path / f"{i}.bmp", (1, 1))
    return str(path)


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EIO, "I/O error"), PermissionError(13, "no")])
def test_passing_errors_end_the_call_and_leave_no_cache(error, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", raising(error))
        for load in (lambda: gan.load_images(str(folder), 16, 3), lambda: list(metrics.Folder(folder).read(8))):
            with pytest.raises(type(error)):
                load()
        assert (str(error) or "out of memory") in metrics_fail(capsys, folder, folder, "--metrics", "swd")
    assert len(gan.load_images(str(folder), 16, 3)[0]) == 24


def test_names_that_are_no_text(tmp_path, capsys):
    for name in (b"latin1-\xe9", b"two\nlines"):
        bmp_folder(Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)), 9)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/two\nlines/broken\xff.png")).write_text("no image")
    run = gan.train(gan.Config(**TOY, data=str(tmp_path), cond=True, steps=1, runs=str(tmp_path / "runs")))
    out = capsys.readouterr().out
    assert len(gan.load_generator(run)[0].classes) == 2 and "two\\nlines/broken" in out and "\ufffd" not in out


# ---- The step, checkpoints and runs
def test_average_moves_parameters_and_copies_buffers():
    model = toy(batch=50)
    for steps, half_life in ((1_000_000, 20_000), (400, 0.05 * 400 * 50)):  # images; early on 5% of those seen
        before = [p.clone() for p in model.G_ema.parameters()]
        torch.nn.init.normal_(model.G.norm.running_mean)
        torch.nn.init.normal_(model.G.linear.weight)
        model.steps, share = steps, 1 - 0.5 ** (50 / half_life)
        model.update_average()
        for old, now, p in zip(before, model.G_ema.parameters(), model.G.parameters()):
            assert torch.allclose(now, (1 - share) * old + share * p, rtol=0, atol=1e-6)
        assert torch.equal(model.G_ema.norm.running_mean, model.G.norm.running_mean)


@pytest.mark.parametrize("loss", list(gan.LOSSES))
def test_every_loss_trains_both_networks(loss):
    model = toy(loss=loss, g_steps=2, d_steps=2)
    before = {name: [p.clone() for p in getattr(model, name).parameters()] for name in ("G", "D", "G_ema")}
    assert torch.isfinite(model.train_step(random_batches(model.config))).all() and model.steps == 1
    for name, old in before.items():
        assert any(not torch.equal(p, q) for p, q in zip(getattr(model, name).parameters(), old)), name


def test_rpgan_alone_compares_ten_times_the_logits_of_classes():
    x, y = torch.ones(4, 3, 16, 16), torch.zeros(4, dtype=torch.long)  # one image, so that a mean tells each logit
    assert {name for name in gan.LOSSES if toy(loss=name).logit_scale != 1} == {"rpgan"}
    for classes, scale in ((3, 10), (0, 1)):
        model = gan.GAN(toy(loss="rpgan").config, classes)
        model.D.eval(), setattr(model, "descend", lambda *_: None)  # D stays as it is
        loss_D, real, fake = model.update_D(x, -x, y)
        assert abs(loss_D - F.softplus(scale * (fake - real))) < 1e-5
        assert abs(model.update_G(x, -x, y) - F.softplus(scale * (real - fake))) < 1e-5


def test_half_precision_stays_near_float32_and_is_taken_where_the_processor_has_it(monkeypatch):
    stats = []
    for amp, dtype in (("off", torch.float32), ("bf16", torch.bfloat16)):
        model = toy(amp=amp)
        stats.append(model.train_step(random_batches(model.config)))
        with model.autocast:
            assert model.D.conv(torch.zeros(1, 3, 16, 16)).dtype == dtype
            assert model.D(torch.zeros(1, 3, 16, 16), torch.tensor([0])).dtype == torch.float32
    assert torch.isfinite(stats[1]).all() and (stats[0] - stats[1])[:2].abs().max() < 0.05
    for known in ({"avx512_bf16": True}, {"amx_bf16": True}, {}):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
        assert gan.pick_dtype("auto", CPU) == (torch.bfloat16 if known else torch.float32)
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as in torch 2.6
    assert gan.pick_dtype("auto", CPU) == torch.float32
    model, twin = toy(d_steps=2, g_steps=2), toy(d_steps=2, g_steps=2)
    model.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=True)
    for m in (model, twin):
        m.train_step(random_batches(m.config))
    for p, q in zip(model.G.parameters(), twin.G.parameters()):  # scaled gradients, unscaled steps
        assert torch.allclose(p, q, rtol=0, atol=1e-5)


def test_run_folder_and_samples_of_it(run, folder, tmp_path):
    assert run.name == f"0000-ns-cond-{folder.name}-16"
    assert json.loads((run / "config.json").read_text())["augment"] == "color,translation,cutout"
    log = logged(run)
    assert log[-1]["step"] == 6 and {"loss_D", "loss_G", "real_logit", "fake_logit", "images_per_s"} <= log[-1].keys()
    grid = pil_to_tensor(Image.open(run / "samples" / "0000006.png"))
    assert grid.shape == (3, 3 * 18 + 2, 10 * 18 + 2)  # a row for each class, ten columns, two pixels between
    G, config = gan.load_generator(run)
    assert not G.training and isinstance(config, gan.Config) and config.steps == 6
    assert G.classes == ["rose 1", "rose 9", "rose 10"] and G.steps == 6 and not list(run.rglob("*.part"))
    assert Image.open(run / "real.png").size == (8 * 18 + 2, 18 + 2)  # the first batch
    sample = lambda *argv: gan.main(["sample", "--run", str(run), *argv])  # noqa: E731
    sample("--n", "7", "--out", str(tmp_path / "deep" / "s.npz"))
    with np.load(tmp_path / "deep" / "s.npz") as file:
        images, labels = file["images"], file["labels"]
    assert images.shape == (7, 16, 16, 3) and images.dtype == np.uint8 and labels.tolist() == [0, 0, 0, 1, 1, 2, 2]
    expected = gan.generate(gan.load_generator(run)[0], 7, classes=labels)
    assert np.array_equal(images, expected.permute(0, 2, 3, 1).numpy())
    sample("--n", "7", "--out", str(tmp_path / "folder"))
    for i, image in enumerate(expected):
        assert torch.equal(pil_to_tensor(Image.open(tmp_path / f"folder/{G.classes[labels[i]]}/{i:05d}.png")), image)
    sample("--interpolate", "--classes", "rose 9", "--out", str(tmp_path / "w.png"))
    assert Image.open(tmp_path / "w.png").size == (10 * 18 + 2, 8 * 18 + 2)
    for name in ("w.gif", "w.webp"):
        sample("--interpolate", "--out", str(tmp_path / name))
        assert (film := Image.open(tmp_path / name)).size == (4 * 18 + 2, 2 * 18 + 2) and film.n_frames > 50
    sample("--classes", "rose 10,0, 0", "--n", "4", "--out", str(tmp_path / "s.npz"))
    assert np.load(tmp_path / "s.npz")["labels"].tolist() == [2, 2, 0, 0]


def same_state(run, other, model=gan.GAN):
    a, b = (gan.read_checkpoint(r / "checkpoint.pt", model) for r in (run, other))
    for name in gan.GAN.PARTS:
        leaves = [torch.utils._pytree.tree_leaves(c[name]) for c in (a, b)]
        assert all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(*leaves, strict=True)), name
    assert a["steps"] == b["steps"]


def test_resume_is_bit_for_bit_the_uninterrupted_run(folder, tmp_path):
    config = dict(TOY, data=str(folder), cond=True, d_steps=2, runs=str(tmp_path))
    whole = gan.train(gan.Config(**config, steps=8, name="whole"))
    part = gan.train(gan.Config(**config, steps=4, name="part"))
    with open(part / "log.jsonl", "a") as log:
        log.write('{"step": 5, "loss_D": 9}\n{"step": 6, "lo')  # killed while it wrote, after its checkpoint
    gan.main(["train", "--resume", str(part), "--steps", "8"])
    same_state(whole, part)
    assert (whole / "samples/0000008.png").read_bytes() == (part / "samples/0000008.png").read_bytes()
    assert [row["step"] for row in logged(part)] == [4, 8]


def test_a_failure_at_any_write_loses_nothing(folder, tmp_path, monkeypatch):
    """Stops a run at its k-th finished file, for each k; what --resume makes of it is the run without the failure."""
    options = dict(TOY, data=str(folder), cond=True, steps=4, sample_every=2 / 3, runs=str(tmp_path))
    reference = gan.train(gan.Config(**options, name="reference"))
    grids, move = {path.name: path.read_bytes() for path in (reference / "samples").iterdir()}, os.replace
    for k in range(50):
        moves = iter(range(50))

        def failing(source, target):
            if next(moves) == k:
                raise OSError(errno.ENOSPC, "No space left on device")
            move(source, target)

        monkeypatch.setattr(os, "replace", failing)
        config = gan.Config(**options, name=f"{k}")
        try:
            gan.train(config)
            assert k == 7 + 2 * bool(importlib.util.find_spec("matplotlib"))  # curves, beside what is always written
            break
        except OSError as error:
            assert str(tmp_path / f"{k}") in str(error)
        monkeypatch.setattr(os, "replace", move)
        run = tmp_path / f"{k}"
        resumable = (run / "checkpoint.pt").exists()
        with contextlib.suppress(gan.UserError):  # complete, but for a picture
            gan.train(config, resume=run if resumable else None)
        same_state(reference, run)
        assert {path.name: path.read_bytes() for path in (run / "samples").iterdir()} == grids
        assert not list(run.rglob("*.part"))


def test_resume_may_change_some_options_and_the_place_of_the_images(folder, tmp_path, capsys):
    data, moved = Path(shutil.copytree(folder, tmp_path / "data")), tmp_path / "moved"
    config = gan.Config("rpgan", True, str(data), **TOY, steps=1, runs=str(tmp_path / "runs"))
    run = gan.train(config)
    gan.train(replace(config, lr_G=1e-6, steps=2), resume=run)
    assert gan.read_checkpoint(run / "checkpoint.pt")["opt_G"]["param_groups"][0]["lr"] == 1e-6
    expected, resume = {"lr_G": 1e-6, "augment": "translation,cutout"}, ["train", "--resume", str(run)]
    assert expected.items() <= json.loads((run / "config.json").read_text()).items()
    assert "loss cannot change" in fails(capsys, *resume, "--loss", "wgan") and "2 steps" in fails(capsys, *resume)
    assert "no runs ''" in fails(capsys, "train", "--resume", "", "--runs", tmp_path)
    data.rename(moved)
    gan.main([*resume, "--steps", "3", "--data", str(moved)])
    to_pil_image(torch.zeros(3, 16, 16, dtype=torch.uint8)).save(moved / "rose 1" / "new.png")
    assert "not trained on" in fails(capsys, *resume, "--steps", "4")
    gan.main([*resume, "--steps", "4", "--data", str(moved)])
    (moved / "rose 1").rename(moved / "tulip")
    assert "not trained on" in fails(capsys, *resume, "--steps", "5", "--data", moved)
    assert len(gan.load_images(str(tmp_path), 16, 3)[0]) == 25  # the pictures in runs/ are no data


def test_what_is_not_finite_stops_the_run_and_is_never_saved(folder, tmp_path, capsys):
    model, path = toy(), tmp_path / "good.pt"
    model.train_step(random_batches(model.config))
    model.save(path)
    before, moment = path.read_bytes(), next(iter(model.opt_G.state.values()))["exp_avg"]
    u = model.D.linear.parametrizations.weight[0].u
    for tensor in (model.G.norm.running_var, u, moment, model.G_ema.linear.weight.data):
        kept, tensor.view(-1)[0] = tensor.view(-1)[0].clone(), float("inf")
        with pytest.raises(gan.UserError, match="step 1 is not finite"):
            model.save(path)
        assert path.read_bytes() == before
        tensor.view(-1)[0] = kept
    run = gan.train(gan.Config(**TOY, data=str(folder), runs=str(tmp_path), log_every=5, steps=2))
    content = torch.load(run / "checkpoint.pt")
    content["D"]["linear.bias"] += float("nan")
    torch.save(content, run / "checkpoint.pt")
    before = (run / "checkpoint.pt").read_bytes()
    err = fails(capsys, "train", "--resume", run, "--steps", "9")
    assert "losses are not finite by step 5" in err and "--lr-D" in err
    assert (run / "checkpoint.pt").read_bytes() == before


def test_damaged_checkpoints_are_told_in_a_line(run, tmp_path, capsys):
    whole, path = (run / "checkpoint.pt").read_bytes(), tmp_path / "checkpoint.pt"
    with zipfile.ZipFile(run / "checkpoint.pt") as archive:
        parts = [info for info in archive.infolist() if info.file_size > 60]
    for i, info in enumerate(parts[:40]):
        name_and_extra = whole[info.header_offset + 26 : info.header_offset + 30]
        at = info.header_offset + 30 + sum(name_and_extra[::2]) + 256 * sum(name_and_extra[1::2]) + i
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        assert "damaged" in fails(capsys, "sample", "--run", path, "--out", tmp_path / "x.png")
    content = torch.load(run / "checkpoint.pt")
    changes = [("steps", "x"), ("steps", -1), ("steps", 1.5), ("classes", None), ("classes", ["../x", "a", "b"])]
    for name, value in [*changes, ("config", {}), ("config", None), ("config", Path()), ("G_ema", {"a": 1})]:
        torch.save({**content, name: value}, path)
        told = fails(capsys, "sample", "--run", path, "--out", tmp_path / "x.png")
        assert "damaged" in told and "trust" not in told  # as torch does, which advises to unpickle it
    for opt_G in ({}, None):
        torch.save(content | {"opt_G": opt_G}, path)
        assert "damaged" in fails(capsys, "train", "--resume", tmp_path, "--steps", "9")


def test_names_of_runs(tmp_path, monkeypatch):
    config = gan.Config(**TOY, steps=1, runs=str(tmp_path))
    first, second = gan.train(config), gan.train(config)
    assert first.name == "0000-ns-synthetic-16" and second.name == "0001-ns-synthetic-16"
    os.utime(second / "checkpoint.pt", (1, 1))
    assert gan.find_run(None, tmp_path) == first and gan.find_run("0001", tmp_path) == second
    with pytest.raises(gan.UserError):
        gan.find_run("000", tmp_path)
    (tmp_path / "killed").mkdir()  # before its first checkpoint
    assert gan.train(replace(config, name="killed")) == tmp_path / "killed"
    with pytest.raises(gan.UserError, match="exists"):
        gan.train(replace(config, name="killed"))
    made, mkdir = [], Path.mkdir

    def taken(path, *args, **options):  # by another process, a moment before
        if path.name.startswith("0002-") and not made:
            made.append(mkdir(path))
        return mkdir(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", taken)
        assert gan.train(config).name == "0003-ns-synthetic-16"
    hold = f"import os; file = open({str(tmp_path / 'killed/.lock')!r}, 'a'); os.lockf(file.fileno(), os.F_LOCK, 0); "
    with subprocess.Popen([sys.executable, "-c", hold + "print(1, flush=True); input()"], stdin=-1, stdout=-1) as other:
        other.stdout.readline()
        with pytest.raises(gan.UserError, match="by another process"):
            gan.train(replace(config, steps=2), resume=tmp_path / "killed")
        other.communicate(b"\n")
    gan.train(replace(config, steps=2), resume=tmp_path / "killed")
    assert len(gan.train(replace(config, data=bmp_folder(tmp_path / ("x" * 250), 3), batch=4)).name) < 80


def test_curves_are_drawn_and_tensorboard_gets_scalars_and_pictures(folder, tmp_path, monkeypatch, capsys):
    calls, config = [], gan.Config(**TOY, data=str(folder), steps=2, runs=str(tmp_path))

    note = lambda name, *values: calls.append(name)  # noqa: E731
    writer = SimpleNamespace(add_scalar=note, add_image=note)
    tensorboard = SimpleNamespace(SummaryWriter=lambda run: writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        run = gan.train(replace(config, tensorboard=True))
    assert {"loss_D", "fake_logit", "samples"} <= set(calls)
    assert not (run / "curves.png").exists() and "matplotlib" not in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert "tensorboard" in fails(capsys, "train", *TOY_FLAGS, "--tensorboard", "--runs", tmp_path)
    pytest.importorskip("matplotlib")
    assert Image.open(gan.train(config) / "curves.png").width > 300


def test_training_learns_the_classes(tmp_path):
    """After 300 steps on the synthetic flowers, samples lie in the class they were asked for, by nearest class mean.
    Chance is 1 in 17; an untrained generator stays under 0.12. Asked for: 0.6, and a quarter of the distance."""
    config = gan.Config(loss="hinge", cond=True, size=16, width=16, steps=300, batch=32, lr_G=1e-3, lr_D=1e-3,
                        augment="none", device="cpu", amp="off", runs=str(tmp_path))  # fmt: skip
    images, labels, _ = gan.load_images("synthetic", 16, 3)
    features = F.avg_pool2d(images.float() / 255, 4).flatten(1)  # [1360,48]
    means = torch.stack([features[labels == c].mean(0) for c in range(17)])

    def score(G):
        samples = F.avg_pool2d(gan.generate(G, 340, classes=range(17)).float() / 255, 4).flatten(1)
        right = torch.cdist(samples, means).argmin(1) == torch.arange(17).repeat(20)
        return right.float().mean().item(), metrics.frechet_distance(features, samples)

    start, start_distance = score(gan.GAN(gan.resolve(config), 17).G_ema)
    end, end_distance = score(gan.load_generator(gan.train(config))[0])
    assert start < 0.12 and end > 0.6 and end_distance < start_distance / 4


class Layers(torch.nn.Sequential):
    def forward(self, x, y=None):
        return super().forward(x)


@dataclass
class MyConfig(gan.Config):
    pull: float = gan.option(0.5, "weight of the squared logits in G's loss")


class Mine(gan.GAN):
    """Other networks, a rule of its own and an option of its own."""

    Config = MyConfig

    @staticmethod
    def networks(c, num_classes):
        first, shape = torch.nn.Linear(c.z_dim, 3 * c.size**2), torch.nn.Unflatten(1, (3, c.size, c.size))
        G = Layers(first, shape, torch.nn.BatchNorm2d(3), torch.nn.Tanh())
        G.z_dim, G.num_classes, G.size, G.channels = c.z_dim, num_classes, c.size, 3
        D = torch.nn.Conv2d(3, c.width, c.size), torch.nn.ReLU(), torch.nn.Conv2d(c.width, 1, 1)
        return G, Layers(*D, torch.nn.Flatten(0))

    def update_G(self, real, fake, y):
        logits = self.D(fake, y)
        loss = self.config.pull * (logits - 1).square().mean()
        self.descend(self.opt_G, loss)
        return loss.detach()


def test_a_subclass_has_the_whole_command_line(tmp_path, capsys, extractor_file):
    runs = ["--runs", str(tmp_path)]
    gan.main(["train", *TOY_FLAGS, "--pull", "0.25", "--steps", "3", *runs], Mine)
    gan.main(["train", *TOY_FLAGS, "--pull", "0.25", "--steps", "5", *runs, "--name", "whole"], Mine)
    gan.main(["train", "--resume", "0000", "--steps", "5", *runs], Mine)
    same_state(tmp_path / "whole", gan.find_run("0000", tmp_path), Mine)
    assert gan.read_checkpoint(tmp_path / "whole" / "checkpoint.pt", Mine)["config"].pull == 0.25
    gan.main(["eval", *runs, "--n", "20", "--extractor", str(extractor_file), "--trunc", "0.7"], Mine)
    gan.main(["sample", *runs, "--n", "6", "--out", str(tmp_path / "x.npz")], Mine)
    assert np.load(tmp_path / "x.npz")["images"].shape == (6, 16, 16, 3)
    assert "pull" in fails(capsys, "sample", *runs) and "pull" in fails(capsys, "train", "--resume", "whole", *runs)
    assert "pull cannot change" in fails(capsys, "train", "--resume", "whole", "--pull", "1", *runs, model=Mine)


# ---- Several processes


# Adam's first steps have the size of the learning rate whatever the gradient is, so where a gradient is zero but for
# rounding, two float32 runs part: within a few steps at the usual rates, and not within 20 at these.
SLOW = ["--lr-G", "1e-6", "--lr-D", "4e-6", "--log-every", "1"]


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_compiled_training_is_eager_training(tmp_path):
    for name, flags in (("eager", []), ("compiled", ["--compile"])):
        gan.main(["train", *TOY_FLAGS, *SLOW, "--steps", "5", "--runs", str(tmp_path), "--name", name, *flags])
    assert (losses_of(tmp_path / "eager") - losses_of(tmp_path / "compiled")).abs().max() < 1e-4


def torchrun(*argv, cwd=None):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ["--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={port}"]
    argv = [sys.executable, "-m", "torch.distributed.run", *where, *map(str, argv)]
    return subprocess.run(argv, cwd=cwd, capture_output=True, text=True, timeout=120)


SCRIPT = f"""
import os, sys, torch
sys.path.insert(0, {str(HERE)!r})
import gan
gan.join("cpu")
torch.manual_seed(0)
h = (torch.randn(8, 5, 4, 4) + 30).to(torch.bfloat16).float()
norm, whole = gan.SyncedBatchNorm(5), torch.nn.BatchNorm2d(5)
if gan.n_ranks() > 1:
    for dtype, error in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        ours, theirs = norm(h.to(dtype).chunk(2)[gan.rank()]), whole(h).chunk(2)[gan.rank()]
        assert ours.dtype == dtype and (ours - theirs).abs().max() < error
    assert (norm.running_mean - whole.running_mean).abs().max() < 1e-3
    assert (norm.running_var - whole.running_var).abs().max() < 1e-3
torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double
config = gan.resolve(gan.Config(loss="hinge", cond=True, size=16, width=4, max_width=8, z_dim=8, batch=8, amp="off",
                                device="cpu", augment="color,translation,cutout"))
images, labels, classes = gan.load_images("synthetic", 16, 3)
model = gan.GAN(config, len(classes))
model.dtype = torch.float32  # no autocast
data = gan.batches(images, labels, config, model.device)
losses = torch.stack([model.train_step(data) for _ in range(20)])
gan.average_over_ranks([losses])
z = gan.local_rows(lambda n: gan.sample_z(n, 8), 4)
torch.save([model.G.state_dict(), model.D.state_dict(), dict(losses=losses), z], f"{{sys.argv[1]}}-{{gan.rank()}}")
sys.stdout.flush()
os._exit(0)  # see the end of gan.main
"""


def test_two_processes_train_as_one(tmp_path, folder):
    flags = [*TOY_FLAGS, *SLOW, "--data", folder, "--cond", "--steps", "20", "--runs", tmp_path]
    gan.main(["train", *map(str, flags), "--name", "one"])
    done = torchrun(HERE / "gan.py", "train", *flags, "--name", "two")
    assert done.returncode == 0, done.stderr
    one, two = losses_of(tmp_path / "one"), losses_of(tmp_path / "two")
    assert len(one) == len(two) == 20 and (one - two).abs().max() < 1e-4
    assert done.stdout.count("done at step 20") == 1  # one of them speaks
    # At the usual rates, in float64: the networks' weights and statistics too.
    (tmp_path / "ranks.py").write_text(SCRIPT)
    subprocess.run([sys.executable, tmp_path / "ranks.py", tmp_path / "one"], check=True, timeout=120)
    done = torchrun(tmp_path / "ranks.py", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    one, first, second = (torch.load(tmp_path / name) for name in ("one-0", "two-0", "two-1"))
    for a, b, c in zip(one[:3], first[:3], second[:3]):
        for name in (name for name in a if "num_batches" not in name):  # which nothing reads
            error = 1e-9 if name == "losses" else 1e-7
            assert (a[name] - b[name]).abs().max() < error and (a[name] - c[name]).abs().max() < error, name
    assert (first[3] - second[3]).abs().min() > 1e-6  # each has noise of its own


DIFFER = f"""
import os, sys
sys.path.insert(0, {str(HERE)!r})
import gan
gan.main(["train", "--device", "cpu", "--size", "16", "--seed", os.environ["RANK"]])
"""


@pytest.mark.parametrize(
    "argv, hint",
    [("--batch 7", "multiple of 2"), ("--data nowhere", "no folder"), ("--resume nowhere", "no runs 'nowhere'"),
     ("--lossy", "--lossy"), (None, "need the same flags")],
)  # fmt: skip
def test_errors_under_torchrun_are_told_once(argv, hint, tmp_path):
    (tmp_path / "differ.py").write_text(DIFFER)
    command = [HERE / "gan.py", "train", *argv.split(), "--device", "cpu"] if argv else [tmp_path / "differ.py"]
    done = torchrun(*command, cwd=tmp_path)
    errors = [line for line in done.stderr.splitlines() if ".py: error: " in line]
    assert done.returncode != 0 and len(errors) == 1 and hint in errors[0], done.stderr
    assert not (tmp_path / "runs").exists()


# ---- Sampling and commands
def command(*argv, cwd, **options):
    argv = [sys.executable, *map(str, argv)]
    return subprocess.run(argv, cwd=cwd, capture_output=True, text=True, timeout=120, **options)


def test_each_file_works_alone_and_both_read_images_by_one_text(tmp_path, folder, extractor_file):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    shutil.copy(HERE / "gan.py", tmp_path / "a")
    shutil.copy(HERE / "metrics.py", tmp_path / "b")
    assert command("gan.py", "train", "--data", folder, *TOY_FLAGS, "--steps", "2", cwd=tmp_path / "a").returncode == 0
    assert command("gan.py", "sample", "--n", "3", cwd=tmp_path / "a").returncode == 0
    done = command("gan.py", "eval", cwd=tmp_path / "a")
    assert done.returncode == 2 and "metrics" in done.stderr and done.stderr.count("\n") == 1
    done = command("metrics.py", folder, folder, "--extractor", extractor_file, cwd=tmp_path / "b")
    assert done.returncode == 0, done.stderr
    for name in ("natural", "list_files", "read_image"):
        assert inspect.getsource(getattr(gan, name)) == inspect.getsource(getattr(metrics, name))
    assert gan.FORMATS == metrics.FORMATS


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, None])
def test_signals_finish_the_step_and_save_and_a_lost_reader_changes_nothing(number, tmp_path, folder):
    flags = ["--data", folder, *TOY_FLAGS, "--steps", "100000" if number else "30", "--log-every", "1"]
    argv = [sys.executable, HERE / "gan.py", "train", *flags]
    with subprocess.Popen(argv, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not (line := process.stdout.readline()).startswith("step 3/"):
            assert line, process.stderr.read()
        if number:
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
            assert process.returncode == 0 and err == "", err
        else:
            process.stdout.close()
            process.wait(timeout=60)
    steps = gan.read_checkpoint(next((tmp_path / "runs").iterdir()) / "checkpoint.pt")["steps"]
    assert steps >= 3 and f"stopped at step {steps}" in out if number else steps == 30


BAD_INPUT = """
train --size 48 | 48;  train --steps 0 | steps;  train --batch 1 | batch;  train --batch 5 --cond | multiple of 2
train --lr-G -1 | lr_G;  train --beta1 1 | beta1;  train --augment color,blur | augment;  train --name a/b | name
train --seed -1 | seed;  train --epochs x | --epochs;  train --batch 4000 | 4000;  train --amp fp16 --device cpu | fp16
train --device privateuseone | device;  train --device mps | device;  train --data nowhere | nowhere
train --data mnist --data-dir nowhere | mnist;  train --z-dim 999999999 --device cpu | memory
train --runs /dev/null/x | /dev/null/x;  sample --run nowhere | nowhere;  sample --n 4294967295 | 4294967295
sample --seed 99999999999999999999 | seed;  sample --trunc 0 | trunc;  sample --trunc x | trunc
sample --trunc nan | trunc;  sample --trunc inf | trunc;  eval --trunc 0.7 -1 | trunc;  train --los ns | --los
sample --classes 9223372036854775808 | 9223372036854775808;  sample --classes tulip | there are ['rose
sample --out x.jpg | x.jpg;  eval --extractor nowhere | nowhere;  eval --data nowhere | nowhere;  launch | launch
"""


def cases(text):
    """[(argv, hint)] of "argv | hint", split by lines and semicolons."""
    return [tuple(case.strip().split(" | ")) for line in text.strip().splitlines() for case in line.split(";")]


@pytest.mark.parametrize("argv, hint", cases(BAD_INPUT))
def test_bad_input_gets_one_line(argv, hint, run, tmp_path, capsys, monkeypatch):
    if torch.backends.mps.is_available() and "mps" in argv:
        pytest.skip("MPS works here")
    monkeypatch.chdir(tmp_path)
    where = [] if argv.startswith(("train", "launch")) else ["--runs", run.parent]
    err = fails(capsys, *argv.split(), *where)
    assert hint in err and len(err) <= 250 and not (tmp_path / "runs").exists()


def test_generate_is_the_same_for_every_n_and_call(run):
    G, _ = gan.load_generator(run)
    for trunc in (None, 0.7):
        five, eight = (gan.generate(G, n, trunc, seed=1) for n in (5, 8))
        assert (five.int() - eight[:5].int()).abs().max() <= 1
    images = gan.generate(G, 5, 0.7, [2, 1], seed=3)
    assert images.shape == (5, 3, 16, 16) and images.dtype == torch.uint8
    assert torch.equal(images, gan.generate(G, 5, 0.7, [2, 1, 2, 1, 2], 3))
    for classes, seed in (([0, 1], 3), ([2, 1], 4)):
        assert not torch.equal(images, gan.generate(G, 5, 0.7, classes, seed))
    for classes in ([3], [-1], []):
        with pytest.raises(gan.UserError):
            gan.generate(G, 1, classes=classes)
    odd = gan.Generator(16, 1, 4, 8, 5)
    assert (gan.generate(odd, 3).int() - gan.generate(odd, 7)[:3].int()).abs().max() <= 1
    z, y = gan.sample_z(1, 8, None, torch.Generator().manual_seed(1)), gan.choose_classes(G, 1, seed=1)
    with torch.no_grad():  # a loaded generator is ready to be called
        assert torch.equal(gan.to_uint8(G(z, y)), gan.generate(G, 1, seed=1))


class Recorder(gan.Generator):
    """A generator that keeps what it was called with; it is copied before, so the class holds the list."""

    calls = []

    def forward(self, z, y=None):
        self.calls.append((z, y))
        return super().forward(z, y)


def rendered(skip=20):
    """All z and y that a Recorder was called with behind the 20 batches of statistics; the list is empty then."""
    z, y = (torch.cat(parts) for parts in zip(*Recorder.calls[skip:]))
    Recorder.calls.clear()
    return z, y


def test_statistics_are_of_the_trunc_and_what_is_drawn_for_pictures():
    torch.manual_seed(0)
    G = Recorder(16, 3, 4, 8, 8).eval()
    before = {k: v.clone() for k, v in G.state_dict().items()}
    for trunc, drawn in ((None, 1281), (None, 1), (0.7, 1281), (0.7, 1), (None, 1)):  # the first time, 20 batches of 64
        gan.generate(G, 1, trunc)
        assert len(rendered(skip=0)[0]) == drawn
        norm, z = gan.with_standing_statistics(G, trunc).blocks[0].norm1.norm, gan.sample_z(20_000, 8, trunc)
        h = G.linear(z * (8**0.5 / z.norm(dim=1, keepdim=True)) ** 0.6).view(-1, 8, 4, 4)
        assert torch.allclose(norm.running_mean, h.mean((0, 2, 3)), atol=0.02)
        assert torch.allclose(norm.running_var, h.var((0, 2, 3)), atol=0.03)
    assert all(torch.equal(v, before[k]) for k, v in G.state_dict().items())  # G itself stays as it was
    gan.generate(gan.copy.deepcopy(G), 1)  # whose weights may come to differ
    assert len(rendered(skip=0)[0]) == 1281
    torch.nn.init.ones_(G.linear.weight)
    gan.generate(gan.with_standing_statistics(G), 1)
    assert len(rendered(skip=0)[0]) == 1281
    gan.interpolate(Recorder(16, 3, 4, 8, 8, 3), classes=[2, 0], rows=3, columns=5, seed=4)
    z, y = rendered()
    ends = gan.sample_z(6, 8, generator=torch.Generator().manual_seed(4))
    assert y.tolist() == [2] * 5 + [0] * 5 + [2] * 5
    assert torch.allclose(z[0::5], ends[:3], atol=1e-5) and torch.allclose(z[4::5], ends[3:], atol=1e-5)
    a, b = ends[0].norm().item(), ends[3].norm().item()
    assert all(min(a, b) * 0.95 < n < max(a, b) * 1.25 for n in z[:5].norm(dim=1).tolist())
    quarter = gan.arc(*torch.eye(2).split(1), 4)[0]
    assert torch.allclose(quarter, torch.tensor([[1, 0], [3**0.5 / 2, 0.5], [0.5, 3**0.5 / 2], [0, 1]]), atol=1e-6)
    gan.sample_grid(Recorder(16, 3, 4, 8, 8, 3), columns=4)
    z, y = rendered()
    assert y.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert torch.equal(z[:4], z[4:8]) and torch.equal(z[:4], z[8:]) and len(z[:4].unique(dim=0)) == 4
    gan.sample_grid(Recorder(16, 3, 4, 8, 8), columns=4)
    assert len(rendered()[0].unique(dim=0)) == 32


def test_eval(run, folder, extractor_file, tmp_path, capsys, monkeypatch):
    """It writes scores and grids beside earlier ones, matches classes by name, does without Inception's weights."""
    argv = ["eval", "--run", str(run), "--extractor", str(extractor_file)]
    gan.main([*argv, "--trunc", "0.5", "none", "--n", "30"])
    out, rows = capsys.readouterr().out, json.loads((run / "eval.json").read_text())["scores"]
    assert [(row["trunc"], row["n"]) for row in rows] == [(0.5, 30), (None, 30)]
    row, _ = rows
    assert row["network"] == "tiny" and row["dtype"] == "float32" and len(row["weights"]) == 16 and "FD(tiny)" in out
    assert (row["n_real"], row["steps"], row["seed"], row["data"]) == (24, 6, 0, str(folder)) and row["notes"]
    assert Image.open(run / "eval-trunc-0.5.png").size == Image.open(run / "eval-trunc-none.png").size
    # The same by hand.
    network = metrics.load_extractor(extractor_file)
    images, labels, _ = gan.load_images(str(folder), 16, 3)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    samples = gan.generate(gan.load_generator(run)[0], 30, 0.5, labels[order].tolist())
    assert abs(row["FD(tiny)"] - metrics.frechet_distance(network(images)[0], network(samples)[0])) < 1e-6
    # Other samples, other images, another network: each has rows of its own, and the same again replaces its row.
    gan.main([*argv, "--trunc", "0.5", "--n", "20"])
    gan.main([*argv, "--trunc", "0.5", "--n", "30"])
    monkeypatch.setattr(torch.hub, "download_url_to_file", raising(urllib.error.URLError("offline")))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    capsys.readouterr()
    gan.main(["eval", "--run", str(run), "--trunc", "0.5", "--n", "30"])
    (out, err), after = capsys.readouterr(), json.loads((run / "eval.json").read_text())["scores"]
    assert err.count("\n") == 1 and "checkpoints" in err and "--extractor" in err
    assert [(row["network"], row["n"]) for row in after] == [("tiny", 30), ("tiny", 20), ("tiny", 30), (None, 30)]
    assert after[0] == rows[1] and after[2] == rows[0] and "FID -" in out
    assert after[3]["SWD"] == metrics.sliced_wasserstein(images, samples)
    # Images with fewer classes, none, and unknown ones.
    drawn, generate_batches = [], gan.generate_batches
    monkeypatch.setattr(gan, "generate_batches", lambda *args: drawn.append(args[3]) or generate_batches(*args))
    for name in ("rose 10", "rose 9"):
        shutil.copytree(folder / name, tmp_path / "some" / name)
    gan.main([*argv, "--data", str(tmp_path / "some")])
    gan.main([*argv, "--data", str(folder / "rose 9")])
    assert sorted(drawn[0]) == [1] * 8 + [2] * 8 and drawn[1] is None and "drawn evenly" in capsys.readouterr().err
    (tmp_path / "some" / "rose 9").rename(tmp_path / "some" / "tulip")
    assert "no class tulip" in fails(capsys, *argv, "--data", tmp_path / "some")
    # What cannot be written or read is known before the long work.
    monkeypatch.setattr(metrics, "load_extractor", raising(AssertionError("too late")))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", raising(OSError(errno.EROFS, "Read-only file system")))
        assert "Read-only" in fails(capsys, *argv)
    (run / "eval.json").write_text('{"scores": [1]}')
    assert "damaged" in fails(capsys, *argv)
    (run / "eval.json").unlink()


# ---- metrics: statistics and the Frechet distance
MADE_BY = {"network": "n", "weights": "w", "resize": "tf1", "dtype": "float32"}


def normal(n, d, seed):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def features_of(n, mean, values, basis, seed):
    """Features [n,d] of mean [d] and covariance basis^T diag(values) basis, up to rounding."""
    x = normal(n, len(values), seed)
    scores = torch.linalg.qr(x - x.mean(0)).Q  # centred, uncorrelated
    return mean + scores * (values * (n - 1)).sqrt() @ basis


def test_stats_equal_numpy_in_any_parts_and_files_are_those_of_pytorch_fid(tmp_path):
    x = normal(3000, 7, 0) @ normal(7, 7, 1) + 1000  # far from zero: sums of squares would lose digits
    mean, cov = x.numpy().mean(0), np.cov(x.numpy(), rowvar=False)
    stats = metrics.FeatureStats(7)
    for part in x.split([1, 99, 0, 400, 2500]):
        stats.update(part)
    one, other = metrics.FeatureStats(7).update(x[:1]), metrics.FeatureStats(7).update(x[1:])
    x += 1  # the statistics keep what they were given
    merged = metrics.FeatureStats(7).merge(one).merge(other.merge(metrics.FeatureStats(7)))
    stats.save(tmp_path / "stats.npz")
    for s in (stats, merged, metrics.FeatureStats.load(tmp_path / "stats.npz")):
        assert s.n == 3000 and np.abs(s.mean.numpy() - mean).max() < 1e-9 and np.abs(s.cov.numpy() - cov).max() < 1e-9
    assert sum(map(len, stats._pending)) + len(stats.factor) <= 1024 + 7  # nothing that grows with n
    x, y = normal(30, 4, 0), normal(9, 4, 1)
    mu, sigma = x.numpy().mean(0), np.cov(x.numpy(), rowvar=False)
    np.savez(tmp_path / "theirs.npz", mu=mu, sigma=sigma, weights="w")  # half a made_by is none
    theirs = metrics.FeatureStats.load(tmp_path / "theirs.npz")
    assert abs(metrics.frechet_distance(theirs, y) - metrics.frechet_distance(x, y)) < 1e-9
    assert theirs.n is None and theirs.made_by == {}
    with pytest.raises(metrics.UserError, match="number of samples"):
        metrics.FeatureStats(4).update(y).merge(theirs)
    metrics.FeatureStats(4, MADE_BY).update(x).save(tmp_path / "ours.npz")
    with np.load(tmp_path / "ours.npz") as ours:  # allow_pickle=False, as pytorch-fid reads it
        assert np.abs(ours["mu"] - mu).max() < 1e-12 and np.abs(ours["sigma"] - sigma).max() < 1e-12
    ours = metrics.FeatureStats.load(tmp_path / "ours.npz")
    assert ours.n == 30 and ours.made_by == MADE_BY


# (kept by both, by the first alone, by the second alone) of 24 directions
RANKS = {"full": (24, 0, 0), "overlapping": (6, 5, 9), "disjoint": (0, 7, 8), "nested": (3, 0, 12), "one": (1, 0, 0)}


@pytest.mark.parametrize("far", [0, 1000])
@pytest.mark.parametrize("n", [(25, 25), (26, 4000), (300, 500)])
@pytest.mark.parametrize("ranks", RANKS)
def test_frechet_distance_of_commuting_covariances(ranks, n, far):
    both, first, second = RANKS[ranks]
    basis = torch.linalg.qr(normal(24, 24, 0)).Q
    a, b = (torch.logspace(0, -2, 24, dtype=torch.float64) ** power for power in (1, 0.5))
    a[both + first :], b[:both], b[both : both + first] = 0, b[:both], 0
    b[both + first + second :] = 0
    mean = normal(2, 24, 1) * 0.1 + far
    expected = ((mean[0] - mean[1]) ** 2).sum() + ((a.sqrt() - b.sqrt()) ** 2).sum()
    x, y = features_of(n[0], mean[0], a, basis, 2), features_of(n[1], mean[1], b, basis, 3)
    assert abs(metrics.frechet_distance(x, y) - expected) < 1e-9
    # The order of samples and a rotation change nothing.
    turn, generator = torch.linalg.qr(normal(24, 24, 4)).Q, torch.Generator().manual_seed(0)
    order = torch.randperm(len(x), generator=generator)
    assert abs(metrics.frechet_distance(x[order] @ turn, y @ turn) - expected) < 1e-9
    # From moments, as close as sigma's own rounding allows.
    moments = (metrics.FeatureStats.from_moments(m, basis.T @ torch.diag(v) @ basis) for m, v in zip(mean, (a, b)))
    assert abs(metrics.frechet_distance(*moments) - expected) < 1e-9


@pytest.mark.parametrize("n", [(2, 2), (2, 50), (12, 11), (40, 8), (60, 70)])
def test_frechet_distance_against_high_precision(n):
    """Covariances that do not commute, regular and singular, in 60 digits by the eigenvalues of their product."""
    mp = mpmath.mp.clone()
    mp.dps = 60
    x = normal(n[0], 10, 0) * torch.logspace(0, -3, 10, dtype=torch.float64) + 3
    y = normal(n[1], 10, 1) @ normal(10, 10, 2)

    def moments(x):
        x = mp.matrix(x.tolist())
        mean = [mp.fsum(x[:, j]) / x.rows for j in range(x.cols)]
        centred = mp.matrix([[x[i, j] - mean[j] for j in range(x.cols)] for i in range(x.rows)])
        return mp.matrix(mean), centred.T * centred / (x.rows - 1)

    (mu, A), (nu, B) = moments(x), moments(y)
    values, vectors = mp.eigsy(A)
    root = vectors * mp.diag([mp.sqrt(max(v, 0)) for v in values]) * vectors.T
    cross = mp.fsum(mp.sqrt(max(v, 0)) for v in mp.eigsy(root * B * root, eigvals_only=True))
    trace = mp.fsum(A[i, i] + B[i, i] for i in range(10))
    expected = mp.fsum((mu[i] - nu[i]) ** 2 for i in range(10)) + trace - 2 * cross
    assert abs(metrics.frechet_distance(x, y) - float(expected)) < 1e-9 * float(expected)


def test_frechet_distance_of_equal_and_nearly_equal_sets():
    for n, d in ((2, 1), (2, 30), (10, 50), (200, 40), (3000, 1)):
        x = normal(n, d, 0) * 10 + 1000
        for y in (x, x.flip(0), metrics.FeatureStats(d).update(x[:1]).update(x[1:])):
            assert 0 <= metrics.frechet_distance(x, y) < 1e-9
        assert abs(metrics.frechet_distance(x, x + 2) - 4 * d) < 1e-9
    x = normal(300, 40, 1)
    x -= x.mean(0)
    for power in (1, 3, 7, 11, 15, 19):  # y = (1 + e) x is e^2 tr A away; the traces would cancel
        scale = 1 + 2.0**-power  # exact in binary
        expected = (scale - 1) ** 2 * x.square().sum().item() / 299
        assert abs(metrics.frechet_distance(x, scale * x) / expected - 1) < 1e-9


# ---- metrics: the other scores
def test_inception_score_closed_forms():
    logits = normal(64, 4, 0)
    p = logits.exp().numpy() / logits.exp().numpy().sum(1, keepdims=True)
    score = lambda q: np.exp((q * (np.log(q) - np.log(q.mean(0)))).sum(1).mean())
    generator = torch.Generator().manual_seed(5)  # of three successive samples, each split gets one
    split = np.concatenate([torch.randperm(3, generator=generator).numpy() for _ in range(22)])[:64]
    expected = [score(p[split == i]) for i in range(3)]
    mean, std = metrics.inception_score(logits, splits=3, seed=5)
    assert abs(mean - np.mean(expected)) < 1e-9 and abs(std - np.std(expected)) < 1e-9
    one_hot = torch.eye(5).repeat_interleave(40, dim=0) * 1000  # sorted by class
    for x, splits, true in ((logits, 1, score(p)), (one_hot, 5, 5), (torch.zeros(30, 5), 10, 1), (logits[:4], 10, 1)):
        mean, std = metrics.inception_score(x, splits)
        assert abs(mean - true) < 1e-9 and std < 1e-9
    in_turn = torch.eye(5).repeat(40, 1) * 1000  # five splits by place would hold one class each
    assert 4 < metrics.inception_score(in_turn, splits=5)[0] < 5


def test_kernel_distance_precision_and_recall_equal_their_definitions_ties_included():
    x, y = normal(7, 3, 0), normal(5, 3, 1) + 1
    k = lambda a, b: (float(a @ b) / 3 + 1) ** 3
    pairs = [[k(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j] for z in (x, y)]
    expected = np.mean(pairs[0]) + np.mean(pairs[1]) - 2 * np.mean([k(a, b) for a in x for b in y])
    for block in (512, 2):
        assert abs(metrics.kernel_distance(x, y, block) - expected) < 1e-9
    real, fake, k = normal(40, 2, 0), normal(30, 2, 1) * 0.7 + 0.5, 3
    distance = lambda a, b: math.dist(a.tolist(), b.tolist())
    radius = lambda x, i: sorted(distance(x[i], other) for other in x)[k]
    in_real = np.array([[distance(f, r) < radius(real, i) for i, r in enumerate(real)] for f in fake])
    in_fake = np.array([[distance(f, r) < radius(fake, i) for i, f in enumerate(fake)] for r in real])
    expected = {"precision": in_real.any(1).mean(), "recall": in_fake.any(1).mean()}
    expected |= {"density": in_real.sum(1).mean() / k, "coverage": in_real.any(0).mean()}
    for shift, block in ((0, 512), (0, 7), (1e3, 512)):
        scores = metrics.precision_recall(real + shift, fake + shift, k, block)
        assert scores.keys() == expected.keys() and all(abs(scores[name] - expected[name]) < 1e-9 for name in scores)
    assert set(metrics.precision_recall(real, fake + 100, k).values()) == {0}
    point = lambda *x: torch.tensor(x, dtype=torch.float64)[:, None] + 1000.1
    # Balls of k = 1 around 0, 1, 3, 10: [-1,1], [0,2], [1,5], [3,17]; around 0.5, 4, 30: [-3,4], [0.5,7.5], [4,56].
    scores = metrics.precision_recall(point(0, 1, 3, 10), point(0.5, 4, 30), k=1)
    assert scores == {"precision": 2 / 3, "recall": 1, "density": 4 / 3, "coverage": 1}
    # 2 and 4 lie on the surfaces of [0,2] and [1,4]: precision and recall count them, density and coverage do not.
    scores = metrics.precision_recall(point(0, 1, 2.5), point(2, 4), k=1)
    assert scores == {"precision": 1, "recall": 1, "density": 0.5, "coverage": 1 / 3}
    # Identical sets: each sample's k nearest, itself among them, lie within its ball, wherever they stand in the set.
    x = normal(300, 200, 0) + 3
    assert metrics.precision_recall(x, x.flip(0)) == {"precision": 1, "recall": 1, "density": 1, "coverage": 1}
    twins = point(0.3, 0.3, 0.3, 5.7)  # the ball of a point with copies is that point alone
    scores = metrics.precision_recall(twins, point(0.3, 0.3, 90), k=1)
    assert scores == {"precision": 2 / 3, "recall": 1, "density": 0, "coverage": 0}


def test_sliced_wasserstein_of_a_laplacian_pyramid():
    noise, more = pixels(40, 3, 32, 32), pixels(30, 3, 32, 32, seed=1)
    smooth = F.avg_pool2d(more.float(), 3, 1, 1).round().to(torch.uint8)
    near = metrics.sliced_wasserstein(noise, more)
    assert 0 < near * 1.3 < metrics.sliced_wasserstein(noise, smooth)
    assert metrics.sliced_wasserstein(noise, noise) < 1e-2
    assert metrics.sliced_wasserstein(noise.numpy(), more) == near != metrics.sliced_wasserstein(noise, more, seed=1)
    flat = torch.zeros(8, 1, 16, 16, dtype=torch.uint8)
    flat[:, :, -1, -1] = 200  # one of the 100 places of a patch reaches this corner
    patches = metrics.laplacian_patches(flat, torch.Generator().manual_seed(0))[(1, 16, 16)]
    assert patches.shape == (8 * 128, 1, 7, 7) and patches[:, :, :-1].max() == 0
    assert 0 < (patches.amax(dim=(1, 2, 3)) == 200).double().mean() < 0.02
    # Patches of one value: all directions are its own, up to its sign, and sorting matches the samples.
    a, b = normal(50, 1, 0).float()[..., None, None], normal(50, 1, 1).float()[..., None, None].exp()
    line = [np.sort(((x - x.mean()) / x.std()).flatten().numpy()) for x in (a, b)]
    distance = metrics.slice_distance(a, b, torch.Generator().manual_seed(0))
    assert abs(distance - 1000 * np.abs(line[0] - line[1]).mean()) < 1e-2
    x = torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    fine, rest = metrics.laplacian_pyramid(x)
    taps = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256

    def blurred(image):  # the edge itself is not repeated
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(image, 2, "reflect"), (5, 5))
        return np.einsum("hwij,ij->hw", windows, taps)

    small, spread = blurred(x[1, 2].double().numpy())[::2, ::2], np.zeros((64, 48))
    spread[::2, ::2] = 4 * small
    assert fine.shape == (2, 3, 64, 48) and np.abs(rest[1, 2].numpy() - small).max() < 1e-5
    assert np.abs(fine[1, 2].numpy() - (x[1, 2].double().numpy() - blurred(spread))).max() < 1e-5


# ---- metrics: measuring and extractors
def pixels(*shape, seed=0):
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_measure_takes_tensors_arrays_and_batches_and_caches_features(tmp_path, extractor_file, monkeypatch):
    network, images = metrics.load_extractor(extractor_file), pixels(50, 3, 8, 12)
    features, logits = network(images)
    plain = F.interpolate(images.float() / 255, size=(4, 4), mode="bilinear").flatten(1)
    assert (features - plain).abs().max() < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(images)[1], logits)
    array = images.numpy()
    frozen = array.copy()
    frozen.flags.writeable = False
    batches = [array[:1], array[1:1], images[1:20], array[20:].transpose(0, 2, 3, 1)]
    for given in (images, array, frozen, array[::-1][::-1], array.transpose(0, 2, 3, 1), batches, iter(batches)):
        summary = metrics.measure(network, given)
        assert summary.n == 50 and (summary.features - features).abs().max() < 1e-6
        assert np.abs(np.subtract(summary.predictions.score(), metrics.inception_score(logits))).max() < 1e-6
    for wrong in (images / 255, images.int(), array / 255, images[0], images[:, :2], ["no"], [images[0]], []):
        with pytest.raises(metrics.UserError, match="uint8|no image"):
            metrics.measure(network, wrong)
    network, images, looks, measure = metrics.load_extractor(extractor_file), pixels(20, 3, 8, 8), [], metrics.measure
    monkeypatch.setattr(metrics, "measure", lambda *x, **options: looks.append(1) or measure(*x, **options))
    cached = lambda: metrics.measure_cached(network, images, tmp_path / "cache")
    features = cached().features
    assert torch.equal(cached().features, features) and len(looks) == 1 and cached().predictions is None
    (file,) = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    for content in (b"", whole[:200], b"PK" + whole[2:900], npz(features=features[:7]), pickle.dumps([1])):
        file.write_bytes(content)
        looks.clear()
        assert torch.equal(cached().features, features) and torch.equal(cached().features, features)
        assert len(looks) == 1 and file.read_bytes() == whole
    images[3, 0, 0, 0] += 1
    cached()
    network.made_by["weights"] = "other"
    cached()
    assert len(looks) == 3 and len(list((tmp_path / "cache").iterdir())) == 3
    assert metrics.measure_cached(network, images, file / "no folder").n == 20


def test_measure_streams_in_constant_memory(extractor_file):
    network, whole, before, done = metrics.load_extractor(extractor_file), pixels(80, 3, 8, 8), [], []
    program = network.network

    def watched(x):
        features, logits = program(x)
        before.append(weakref.ref(features))
        return features, logits

    def samples():
        for i in range(10):
            assert all(tensor() is None for tensor in before[:-2])  # only the last batch and its features live
            batch = whole[8 * i : 8 * i + 8].clone()
            before.append(weakref.ref(batch))
            yield batch

    network.network = watched
    streamed = metrics.measure(network, samples(), keep=False, progress=lambda *x: done.append(x))
    assert len(before) == 20 and streamed.n == 80 and streamed.features is None
    assert (16, None) in done and done[-1] == (80, 80)
    kept = metrics.measure(network, whole, progress=lambda *x: done.append(x))
    assert done[-1] == (80, 80) and metrics.frechet_distance(streamed.stats, kept.features) < 1e-12
    assert np.abs(np.subtract(streamed.predictions.score(), kept.predictions.score())).max() < 1e-12
    names = ["FD(tiny)", "IS(tiny)", "IS std", "KID(tiny)", "precision", "recall", "density", "coverage"]
    assert list(metrics.compare(kept, streamed)) == names[:3] and list(metrics.compare(kept, kept)) == names
    alone = metrics.measure(metrics.Extractor(lambda x: x.mean(dim=(2, 3)), "net", "0" * 16), whole)
    assert list(metrics.compare(alone, alone)) == ["FD(net)", "KID(net)", *names[4:]]
    for fake, name in ((streamed, "kid"), (streamed, "prdc"), (kept, "swd"), (alone, "is")):
        with pytest.raises(metrics.UserError, match=f"{name} is not"):
            metrics.compare(alone if fake is alone else kept, fake, [name])
    same_size, other = (str(metrics.notes(kept, metrics.measure(network, whole[:4, :, :h]))) for h in (8, 6))
    assert "neighbour 3, not 5" in same_size and "pixels" not in same_size and "8 x 8 and 8 x 6 pixels" in other


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """{1000: file, 1008: file} with random weights of Inception v3; the scores that come of them are nobody's."""
    folder, files = tmp_path_factory.mktemp("inception"), {}
    for classes in (1000, 1008):
        torch.manual_seed(classes)
        net = metrics.inception_v3(weights=None, init_weights=False, aux_logits=classes == 1000, num_classes=classes)
        for m in net.modules():
            if isinstance(m, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(m.weight)
            elif isinstance(m, torch.nn.BatchNorm2d):
                m.running_mean.normal_(0, 0.1), m.bias.data.normal_(0, 0.1)
                m.running_var.uniform_(0.5, 1.5), m.weight.data.uniform_(0.5, 1.5)
        files[classes] = folder / f"random-{classes}.pth"
        torch.save(net.state_dict(), files[classes])
    return files


def reference_inception(file, classes, x, monkeypatch):
    """Features and logits of x [N,3,299,299] by torchvision's forward pass, with TensorFlow's pools for 1,008."""
    net = metrics.inception_v3(weights=None, init_weights=False, aux_logits=classes == 1000, num_classes=classes).eval()
    net.load_state_dict(torch.load(file))
    pooled = []
    net.avgpool.register_forward_hook(lambda module, args, output: pooled.append(output.flatten(1)))
    with monkeypatch.context() as patch, torch.no_grad():
        if classes == 1008:
            average, last = F.avg_pool2d, []
            net.Mixed_7c.register_forward_pre_hook(lambda module, args: last.append(True))

            def pool(x, kernel_size, stride, padding):
                if last:
                    return F.max_pool2d(x, kernel_size, stride, padding)
                return average(x, kernel_size, stride, padding, count_include_pad=False)

            patch.setattr(F, "avg_pool2d", pool)
        logits = net(x)
    return pooled[0], logits - net.fc.bias if classes == 1008 else logits


@pytest.mark.parametrize("classes", [1000, 1008])
def test_inception_is_torchvisions_and_tensorflows(classes, inception_weights, monkeypatch):
    file, resize = inception_weights[classes], "tf1" if classes == 1008 else "bilinear"
    network, images = metrics.load_extractor(file), pixels(2, 3, 40, 32)
    x = metrics.for_inception(images.float(), resize)
    features, logits = reference_inception(file, classes, x, monkeypatch)
    seen, said = network(images)
    assert seen.shape == (2, 2048) and said.shape == (2, classes) and features.abs().mean() > 0.1
    assert (seen - features).norm() < 1e-5 * features.norm() and (said - logits).norm() < 1e-5 * logits.norm()
    weights = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    expected = {"network": f"random-{classes}", "weights": weights, "resize": resize, "dtype": "float32"}
    assert network.made_by == expected and metrics.label("FID", expected) == f"FD(random-{classes})"
    for published in ("0cc3c7bd00000000", "6726825d00000000"):  # only published weights make FID
        assert metrics.label("FID", {**MADE_BY, "weights": published}) == "FID"
    half = metrics.load_extractor(file, dtype="bfloat16")
    short = half(images)[0]
    assert short.dtype == torch.float32 and half.made_by == {**expected, "dtype": "bfloat16"}
    assert 1e-4 < (short - features).norm() / features.norm() < 0.02


@pytest.mark.parametrize("height,width", [(32, 48), (299, 299), (500, 301)])
def test_resize_modes(height, width):
    image = torch.randint(256, (3, height, width), generator=torch.Generator().manual_seed(0)).float()
    resized = {mode: metrics.for_inception(image[None], mode)[0] for mode in metrics.RESIZES}
    # clean-fid: Pillow's bicubic on floats, not rounded.
    clean = [np.asarray(Image.fromarray(c.numpy()).resize((299, 299), Image.BICUBIC)).clip(0, 255) for c in image]
    assert np.abs(resized["clean"].numpy() * 128 + 128 - np.stack(clean)).max() < 0.02

    def matrix(n, mode):  # [299,n], from the definitions: the weights of a row's two neighbours
        at = (np.arange(299) + 0.5) * n / 299 - 0.5 if mode == "bilinear" else np.arange(299) * n / 299
        return np.maximum(0, 1 - np.abs(at.clip(0, n - 1)[:, None] - np.arange(n)))

    for mode, scale, shift in (("bilinear", 127.5, 127.5), ("tf1", 128, 128)):
        expected = matrix(height, mode) @ image.double().numpy() @ matrix(width, mode).T
        assert np.abs(resized[mode].numpy() * scale + shift - expected).max() < 0.01


class Payload(str):
    """A path where a file is created when this is unpickled."""

    def __reduce__(self):
        return open, (str(self), "w")


def test_weights_files_are_checked_and_never_unpickled(tmp_path, inception_weights, monkeypatch):
    torch.save({"fc.weight": torch.zeros(1000, 3), "x": Payload(tmp_path / "ran")}, tmp_path / "bad.pth")
    (tmp_path / "cut.pth").write_bytes(inception_weights[1000].read_bytes()[:1000])
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    digits = hashlib.sha256(inception_weights[1000].read_bytes()).hexdigest()[:8]
    for name in (f"net-{digits}.pth", "net-0cc3c7bd.pth", "net-12.pth"):
        (tmp_path / name).symlink_to(inception_weights[1000])
    none, renamed = "no weights of Inception", f"SHA-256 begins with {digits}"
    refused = [("bad.pth", f"{none}.* failed$"), ("cut.pth", none), ("other.pth", none), ("net-0cc3c7bd.pth", renamed)]
    for name, hint in refused:
        with pytest.raises(metrics.UserError, match=hint):
            metrics.load_extractor(tmp_path / name)
    for name in (f"net-{digits}.pth", "net-12.pth"):
        assert metrics.load_extractor(tmp_path / name).made_by["weights"].startswith(digits)

    # "inception" is checked too; whatever keeps it from being had is one kind of error.
    def offline(url, path, hash_prefix, progress):
        assert path.endswith("hub/checkpoints/inception_v3_google-0cc3c7bd.pth") and hash_prefix == "0cc3c7bd"
        raise OSError("no network\nat all")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    for home, hint in ((tmp_path / "hub", "no network$"), (tmp_path / "hub", "SHA-256"), ("~/hub", "TORCH_HOME")):
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(home))  # "~" where there is no home
        with pytest.raises(metrics.WeightsMissing, match=hint):
            metrics.load_extractor("inception")
        torch.save({"x": Payload(tmp_path / "ran")}, tmp_path / "hub/checkpoints/inception_v3_google-0cc3c7bd.pth")
    assert not (tmp_path / "ran").exists()


def archive_with(extractor_file, path, end, content, beside=None):
    """The program with the parts whose paths have this end replaced, or with another part beside them."""
    with zipfile.ZipFile(extractor_file) as source, zipfile.ZipFile(path, "w") as target:
        for part in source.namelist():
            target.writestr(part, content if part.endswith(end) else source.read(part))
            if beside and part.endswith(end):
                target.writestr(part.rsplit("/", 1)[0] + "/" + beside[0], beside[1])


def test_programs_never_unpickle(tmp_path, extractor_file, caplog, capfd):
    payload, pickled = Payload(tmp_path / "ran"), io.BytesIO()
    torch.save(((payload,), {}), pickled)
    entry = {"is_param": False, "use_pickle": True, "tensor_meta": None}
    config = lambda name: json.dumps({"config": {"weight": {"path_name": name, **entry}}})
    torn = bytearray(extractor_file.read_bytes())
    torn[torn.index(b"models/model.json") + 200] ^= 1
    changes = [
        (".pt", pickled.getvalue()),  # sample inputs
        ("weights_config.json", config("weight_9"), ("weight_9", pickled.getvalue())),
        ("constants_config.json", config("opaque_obj_0"), ("opaque_obj_0", pickle.dumps(payload))),
        ("archive_version", b"0", ("data/aotinductor/model/m.so", b"a library")),
    ]
    for i, change in enumerate([*changes, extractor_file.read_bytes()[:1000], torn]):
        file = tmp_path / f"{i}.pt2"
        archive_with(extractor_file, file, *change) if isinstance(change, tuple) else file.write_bytes(change)
        with pytest.raises(metrics.UserError, match=f"{i}.pt2 is no .pt2 program.*safely: [^\n]*$"):
            metrics.load_extractor(file)
    assert not (tmp_path / "ran").exists() and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    assert not caplog.records and capfd.readouterr().err == ""  # torch.export would log tracebacks
    archive_with(extractor_file, tmp_path / "same.pt2", "nothing", b"")
    assert metrics.load_extractor(tmp_path / "same.pt2")(pixels(2, 3, 8, 8))[0].shape == (2, 48)


# ---- metrics: files
def npz(place=None, change=b"", **arrays):
    """The bytes of an .npz with a change at a place, counted from the first entry of its directory if negative."""
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    data = bytearray(file.getvalue())
    if place is not None:
        place = place if place > 0 else data.index(b"PK\x01\x02") - place
        data[place : place + len(change)] = change
    return bytes(data)


def npy(header):
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


ZEROS = {"mu": np.zeros(2), "sigma": np.eye(2)}
DAMAGED = {  # NumPy raises an error of another kind for each of the first seven
    "empty": b"",
    "cut": npz(**ZEROS)[:-30],
    "deflate": npz(56, b"\xff" * 9, mu=np.arange(999.0)),
    "method": npz(-10, b"\x63", **ZEROS),
    "encrypted": npz(-8, b"\x01", **ZEROS),
    "giant": npy(b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000000,)}\n"),
    "infinite n": npz(**ZEROS, n=np.inf),
    "negative": npz(mu=np.zeros(2), sigma=-np.eye(2)),
    "nan": npz(mu=np.zeros(2), sigma=np.eye(2) * np.nan),
    "an .npy": npy(b"{'descr': '|u1', 'fortran_order': False, 'shape': (1,)}\n") + b"1",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_arrays_are_one_sentence(name, tmp_path, folder, capsys):
    (file := tmp_path / "file.npz").write_bytes(DAMAGED[name])
    with pytest.raises(metrics.UserError, match="file.npz [^\n]*$"):
        metrics.FeatureStats.load(file)
    assert "file.npz" in metrics_fail(capsys, folder, file, "--extractor", "nowhere")


@pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt])
def test_files_are_written_atomically(failure, tmp_path, monkeypatch):
    stats, file, names = metrics.FeatureStats(3, MADE_BY).update(normal(9, 3, 0)), tmp_path / "stats.npz", set()
    stats.save(file)
    before = file.read_bytes()

    def fail(target, **arrays):
        names.add(Path(target.name).parent)
        target.write(b"half")
        raise failure

    with monkeypatch.context() as patch, pytest.raises(failure) as caught:
        patch.setattr(np, "savez", fail)
        stats.save(file)
    assert getattr(caught.value, "filename", str(file)) == str(file)
    assert names == {tmp_path} and list(tmp_path.iterdir()) == [file] and file.read_bytes() == before


def test_folder_reads_every_image_and_names_the_rest(tmp_path, extractor_file, capsys):
    (folder := tmp_path / "a").mkdir()
    for name, kind in (("1.png", "PNG"), ("2.gif", "GIF"), ("3.jfif", "JPEG"), ("4", "WEBP")):
        to_pil_image(pixels(3, 9, 8)).save(folder / name, kind)
    to_pil_image(pixels(3, 30, 9)).save(folder / "6.png")
    Image.fromarray(np.full((9, 9), 0.5, np.float32)).save(folder / "float.tiff")
    (folder / "notes.txt").write_text("no picture")
    images, network = metrics.Folder(tmp_path), metrics.load_extractor(extractor_file)
    read = list(metrics.batches(images, 4))
    assert sum(map(len, read)) == len(images) == 5 and max(map(len, read)) <= 4
    files = [file for file in images.files if file not in images.skipped]  # features come in their order
    singles = torch.cat([network(metrics.read_image(tmp_path / file)[None])[0] for file in files])
    assert (metrics.measure(network, images).features - singles).abs().max() < 1e-6
    note = scores_of(capsys, tmp_path, tmp_path, "--extractor", extractor_file)["notes"][-1]
    assert f"{tmp_path}: skipped 2 files" in note and "a/float.tiff (floating-point" in note and "a/notes.txt (" in note
    dark = bmp_folder(tmp_path / "dark", 10)
    assert "dark, from 0 to 10" in scores_of(capsys, dark, dark, "--extractor", extractor_file)["notes"][-1]


# ---- metrics: the command
def metrics_fail(capsys, *argv):
    """The one line that a command ends with; asserts exit status 2."""
    capsys.readouterr()
    assert metrics.main([str(word) for word in argv]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("metrics.py: error: "), captured.err
    assert captured.out == "" and len(captured.err) <= 201
    return captured.err


def scores_of(capsys, *argv):
    capsys.readouterr()
    assert metrics.main([*(str(word) for word in argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_command_reads_folders_arrays_and_statistics(tmp_path, folder, extractor_file, capsys):
    images = torch.stack([pil_to_tensor(Image.open(file)) for file in sorted(folder.rglob("*.png"))])
    hwc, use = images.permute(0, 2, 3, 1).numpy(), ["--extractor", extractor_file]
    np.savez(tmp_path / "chw.npz", images=images.numpy())
    np.savez(tmp_path / "other.npz", images=hwc // 2)
    for name, array in {
        "hwc": hwc,
        "gray": hwc[..., 0],
        "spread": hwc[..., [0] * 3],
        "small": hwc[:, ::2, ::2],
    }.items():
        np.save(tmp_path / f"{name}.npy", array)
    score = lambda real, fake, *more: scores_of(capsys, tmp_path / real, tmp_path / fake, *use, *more)
    whole = score(folder, "other.npz")
    expected, checksum = whole.pop("scores"), hashlib.sha256(extractor_file.read_bytes()).hexdigest()[:16]
    assert "24 images bias" in whole.pop("notes")[0] and whole == {
        "real": str(folder), "n_real": 24, "fake": str(tmp_path / "other.npz"), "n_fake": 24, "saved": None,
        "network": "tiny", "weights": checksum, "resize": "native", "dtype": "float32",
    }  # fmt: skip
    for side in ("hwc.npy", "chw.npz"):
        assert score(side, "other.npz")["scores"] == pytest.approx(expected, abs=1e-9)
    assert "18 x 20 and 9 x 10" in str(score(folder, "small.npy")["notes"])
    assert score("gray.npy", "spread.npy")["scores"]["FD(tiny)"] < 1e-9
    assert scores_of(capsys, folder, "--out", tmp_path / "real.npz", *use)["scores"] == {}
    (tmp_path / "renamed.pt2").symlink_to(extractor_file)  # the weights count, not the file's name
    saved = score("real.npz", "other.npz", "--extractor", tmp_path / "renamed.pt2")
    assert "left out: kid, prdc (" in saved["notes"][-1]
    saved = saved["scores"]
    assert list(saved) == ["FD(tiny)", "IS(tiny)", "IS std"] and abs(saved["FD(tiny)"] - expected["FD(tiny)"]) < 1e-9
    assert scores_of(capsys, *[tmp_path / "real.npz"] * 2)["scores"]["FD(tiny)"] < 1e-9  # no network is loaded
    np.savez(tmp_path / "both.npz", arr_0=hwc, mu=np.zeros(48), sigma=np.eye(48))  # another tool's; images count first
    assert score("both.npz", "other.npz")["scores"] == pytest.approx(expected, abs=1e-9)
    assert "do not say" in str(score("both.npz", "other.npz", "--metrics", "fid")["notes"])
    swd = scores_of(capsys, folder, tmp_path / "other.npz", "--metrics", "swd", "--extractor", "nowhere")
    assert list(swd["scores"]) == ["SWD"] and "network" not in swd and swd["n_fake"] == 24


COMMAND_ERRORS = """
{folder} | --out;  {folder} --out {tmp}/stats.txt | an .npz;  {folder} --out {tmp}/stats.npz --metrics fid | FAKE
{folder} --out {tmp}/keys.npz | no feature statistics;  {folder} {tmp}/nowhere | neither a folder
{folder} {tmp}/empty | 0 images;  {folder} {tmp}/text --extractor {tiny} | no image;  {folder} {tmp}/floats.npy | uint8
{folder} {tmp}/keys.npz | holds neither;  {folder} {tmp}/wide.npz --extractor {tiny} --metrics fid | dimensions
{tmp}/clean.npz {folder} --extractor {tiny} | resize clean;  {folder} {folder} --metrics fid,foo | no score 'foo'
{tmp}/clean.npz {folder} --metrics kid --extractor {tiny} | kid needs images;  {folder} {folder} --device tpu | device
{folder} {folder} --resize nearest | --resize;  {folder} {folder} --resize clean --extractor {tiny} | fixes its own
"""


@pytest.mark.parametrize(
    "argv,hint", [*cases(COMMAND_ERRORS), ("{folder} {folder} --extractor {tmp}/" + "long/" * 90, "no extractor")]
)
def test_command_errors(argv, hint, tmp_path, folder, extractor_file, capsys):
    (tmp_path / "empty").mkdir(), (tmp_path / "text").mkdir()
    (tmp_path / "text/0.png").write_text("no picture"), (tmp_path / "text/1.png").write_text("no picture")
    np.save(tmp_path / "floats.npy", np.zeros((4, 8, 8, 3)))
    np.savez(tmp_path / "keys.npz", pictures=np.zeros((4, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "wide.npz", mu=np.zeros(5), sigma=np.eye(5))
    metrics.FeatureStats(48, {**MADE_BY, "resize": "clean"}).update(normal(60, 48, 0)).save(tmp_path / "clean.npz")
    before = sorted(tmp_path.rglob("*"))
    words = [word.format(folder=folder, tmp=tmp_path, tiny=extractor_file) for word in argv.split()]
    assert hint in metrics_fail(capsys, *words) and sorted(tmp_path.rglob("*")) == before


def test_refusals():
    x = normal(5, 3, 0)
    for call, hint in (
        (lambda: metrics.frechet_distance(x[:1], x), "at least 2"),
        (lambda: metrics.frechet_distance(x.abs() / 0, x), "finite"),
        (lambda: metrics.inception_score(x[:0]), "at least 1"),
        (lambda: metrics.kernel_distance(x[:1], x), ">= 2"),
        (lambda: metrics.precision_recall(x, x, k=5), "from 1 to 4"),
        (lambda: metrics.sliced_wasserstein(pixels(2, 3, 32, 32), pixels(2, 1, 32, 32)), "one size"),
        (lambda: metrics.sliced_wasserstein(pixels(2, 3, 8, 32), pixels(2, 3, 8, 32)), "16 x 16"),
    ):
        with pytest.raises(metrics.UserError, match=hint):
            call()


def test_names_that_no_terminal_can_show(tmp_path, extractor_file, monkeypatch):
    (root := tmp_path / os.fsdecode(b"latin1-\xe9 \xe2\x82\xac\nline")).mkdir()
    network, out, err = root / os.fsdecode(b"net\xe9.pt2"), *(io.TextIOWrapper(io.BytesIO(), "ascii") for _ in range(2))
    network.write_bytes(extractor_file.read_bytes())
    for i in range(3):
        to_pil_image(pixels(3, 8, 8, seed=i)).save(root / f"{i}.png")
    monkeypatch.setattr(sys, "stdout", out), monkeypatch.setattr(sys, "stderr", err)
    argv = [str(root), str(root), "--extractor", str(network)]
    assert metrics.main(argv) == 0 and metrics.main([*argv, "--out", str(root / "s.npz"), "--json"]) == 0
    assert metrics.main([str(root), str(root / "nowhere"), *argv[2:]]) == 2
    cached = metrics.measure_cached(metrics.load_extractor(network), pixels(3, 3, 8, 8), root / "cache")
    assert metrics.FeatureStats.load(root / "s.npz").made_by == cached.stats.made_by
    out.flush(), err.flush()
    lines = out.buffer.getvalue().decode("ascii").splitlines()
    assert lines[0] == f"real: {tmp_path}/latin1-\\udce9 \\u20ac\\nline" and err.buffer.getvalue().count(b"\n") == 1
    assert any(line.startswith("FD(net\\udce9)") for line in lines) and "net\\udce9.pt2 (" in "\n".join(lines)


@pytest.mark.parametrize("terminal,total", [(False, 100), (True, 100), (True, None), (None, 100)])
def test_progress_on_any_stream(terminal, total, monkeypatch):
    now, text = [0.0], io.StringIO()
    stream = SimpleNamespace(write=text.write, flush=text.flush)  # a notebook's or a logger's, without isatty
    if terminal is not None:
        stream.isatty = lambda: terminal
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(sys, "stdout", stream)
    progress = metrics.show_progress("net")
    for now[0], done, of in ((0.1, 1, total), (40, 40, total), (41, 41, total), (100, 100, 100)):
        progress(done, of)
    first = "net: 40 of 100 images, 1:00 left" if total else "net: 40 images"
    start, lines = (f"\r\x1b[K{first}\r\x1b[K", 1) if terminal else (f"{first}\n", 2)
    shown = text.getvalue()
    assert shown.startswith(start) and shown.endswith("0:00 left\n") and shown.count("\n") == lines
    assert metrics.main(["nowhere"]) == 2 and "error: give FAKE" in text.getvalue()


def test_interrupts_are_quiet(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "run", raising(KeyboardInterrupt))
    assert metrics.main(["a", "b"]) == 130 and capsys.readouterr() == ("", "")
    kill = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)"
    (tmp_path / "torch.py").write_text(kill)  # Ctrl-C while torch is imported
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # in the background it may be ignored
    for name in ("metrics.py", "gan.py"):
        shutil.copy(HERE / name, tmp_path)
        done = command(name, "a", "b", cwd=tmp_path, preexec_fn=heard)
        assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
