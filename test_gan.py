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
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

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


# ---- metrics.py: scores
MADE_BY = {"network": "n", "weights": "w", "resize": "tf1", "dtype": "float32"}


def normal(n, d, seed):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pixels(*shape, seed=0):
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def points(*values):
    """Features [n,1], far from zero."""
    return torch.tensor(values, dtype=torch.float64)[:, None] + 1000.1


def features_of(n, mean, values, basis, seed):
    """Features [n,d] of mean [d] and covariance basis^T diag(values) basis, up to rounding."""
    x = normal(n, len(values), seed)
    scores = torch.linalg.qr(x - x.mean(0)).Q  # centred, uncorrelated
    return mean + scores * (values * (n - 1)).sqrt() @ basis


# (kept by both, by the first alone, by the second alone) of 24 directions
RANKS = {"full": (24, 0, 0), "overlapping": (6, 5, 9), "disjoint": (0, 7, 8), "nested": (3, 0, 12), "one": (1, 0, 0)}


def commuting_moments(ranks, far=0):
    """Two means [2,24], two spectra [24], their common basis, and the Frechet distance."""
    both, first, second = RANKS[ranks]
    a = torch.logspace(0, -2, 24, dtype=torch.float64)
    b = a.sqrt()
    a[both + first :] = 0
    b[both : both + first] = 0
    b[both + first + second :] = 0
    mean = normal(2, 24, 1) * 0.1 + far
    distance = (mean[0] - mean[1]).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    return mean, (a, b), torch.linalg.qr(normal(24, 24, 0)).Q, distance.item()


@pytest.mark.parametrize("far", [0, 1000])
@pytest.mark.parametrize("n", [(25, 25), (26, 4000), (300, 500)])
@pytest.mark.parametrize("ranks", RANKS)
def test_frechet_distance_of_commuting_covariances(ranks, n, far):
    """By hand: |mu - nu|^2 plus the squared differences of the standard deviations along common axes."""
    mean, values, basis, expected = commuting_moments(ranks, far)
    x = features_of(n[0], mean[0], values[0], basis, 2)
    y = features_of(n[1], mean[1], values[1], basis, 3)
    assert abs(metrics.frechet_distance(x, y) - expected) < 1e-9


@pytest.mark.parametrize("ranks", RANKS)
def test_frechet_distance_ignores_order_and_rotation(ranks):
    """By hand: neither changes a distance of distributions."""
    mean, values, basis, expected = commuting_moments(ranks)
    x = features_of(300, mean[0], values[0], basis, 2)
    y = features_of(500, mean[1], values[1], basis, 3)
    turn = torch.linalg.qr(normal(24, 24, 4)).Q
    assert abs(metrics.frechet_distance(x.flip(0) @ turn, y @ turn) - expected) < 1e-9


@pytest.mark.parametrize("far", [0, 1000])
@pytest.mark.parametrize("ranks", RANKS)
def test_frechet_distance_of_moments(ranks, far):
    """By hand, as close as the rounding of sigma allows."""
    means, values, basis, expected = commuting_moments(ranks, far)
    covs = [basis.T @ torch.diag(v) @ basis for v in values]
    a, b = (metrics.FeatureStats.from_moments(*moments) for moments in zip(means, covs))
    assert abs(metrics.frechet_distance(a, b) - expected) < 1e-9


@pytest.mark.parametrize("n, rank", [(2, 10), (8, 10), (11, 10), (60, 10), (60, 4), (6, 4)])
def test_frechet_distance_is_the_cost_of_the_optimal_map(n, rank):
    """By Brenier's theorem: x -> P x, P symmetric with eigenvalues >= 0, is optimal; P and cov(x) do not commute."""
    x = normal(n, 10, 0) * torch.logspace(0, -3, 10, dtype=torch.float64) + 3
    root = normal(10, rank, 1)
    moved = x - x @ (root @ root.T)
    mean = moved.mean(0)
    expected = mean.square().sum() + (moved - mean).square().sum() / (n - 1)
    assert abs(metrics.frechet_distance(x, x - moved) / expected - 1) < 1e-10


@pytest.mark.parametrize("n, d", [(2, 1), (2, 30), (10, 50), (200, 40), (3000, 1)])
def test_frechet_distance_of_equal_sets_is_zero(n, d):
    """By the definition, in any order of the samples."""
    x = normal(n, d, 0) * 10 + 1000
    assert 0 <= metrics.frechet_distance(x, x) < 1e-9
    assert 0 <= metrics.frechet_distance(x, x.flip(0)) < 1e-9
    assert abs(metrics.frechet_distance(x, x + 2) - 4 * d) < 1e-9


@pytest.mark.parametrize("power", [1, 3, 7, 11, 15, 19])
def test_frechet_distance_of_nearly_equal_sets_keeps_its_digits(power):
    """By hand: y = (1 + e) x is e^2 tr A away; a difference of traces would cancel."""
    x = normal(300, 40, 1)
    x -= x.mean(0)
    scale = 1 + 2.0**-power  # exact in binary
    expected = (scale - 1) ** 2 * x.square().sum().item() / 299
    assert abs(metrics.frechet_distance(x, scale * x) / expected - 1) < 1e-9


def softmax(logits):
    p = logits.exp().numpy()
    return p / p.sum(1, keepdims=True)


def plain_inception_score(p):
    return np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean())


def test_inception_score_equals_its_definition():
    """By the definition, in NumPy, with one split and over three."""
    logits = normal(64, 4, 0)
    p = softmax(logits)
    mean, std = metrics.inception_score(logits, splits=1)
    assert abs(mean - plain_inception_score(p)) < 1e-9 and std == 0
    order = torch.randperm(64, generator=torch.Generator().manual_seed(5))
    scores = [plain_inception_score(p[part]) for part in np.array_split(order, 3)]
    mean, std = metrics.inception_score(logits, splits=3, seed=5)
    assert abs(mean - np.mean(scores)) < 1e-9 and abs(std - np.std(scores)) < 1e-9


def test_inception_score_of_known_sets():
    """By hand: k for certain predictions of k classes, 1 for uniform ones, 1 for splits of one sample."""
    certain = torch.eye(5).repeat(40, 1) * 1000
    for logits, splits, true in ((certain, 1, 5), (torch.zeros(30, 5), 10, 1), (normal(4, 4, 0), 10, 1)):
        mean, std = metrics.inception_score(logits, splits)
        assert abs(mean - true) < 1e-9 and std < 1e-9


def test_inception_score_shuffles_into_splits():
    """By hand: five splits of certain predictions hold about all classes, though by place each would hold one."""
    for logits in (torch.eye(5).repeat(40, 1), torch.eye(5).repeat_interleave(40, dim=0)):
        assert 4 < metrics.inception_score(logits * 1000, splits=5)[0] < 5


@pytest.mark.parametrize("copies", [1, 2, 10, 100, 499, 500])
def test_inception_score_of_few_images_is_not_bounded_by_their_number(copies):
    """By hand: certain predictions of ten classes score 10; of 5,000 samples on, in ten splits."""
    mean, std = metrics.inception_score(40 * torch.eye(10).repeat(copies, 1))
    assert (abs(mean - 10) < 1e-9 and std == 0) if copies < 500 else (9.7 < mean < 10 and std > 0)


@pytest.mark.parametrize("block", [512, 2])
def test_kernel_distance_equals_its_definition(block):
    """By the definition: the mean kernel of all pairs, but those of a sample with itself."""
    x = normal(7, 3, 0)
    y = normal(5, 3, 1) + 1
    kernel = lambda a, b: ((a @ b.T / 3 + 1) ** 3).numpy()
    within = [(kernel(z, z).sum() - np.trace(kernel(z, z))) / (len(z) * (len(z) - 1)) for z in (x, y)]
    expected = sum(within) - 2 * kernel(x, y).mean()
    assert abs(metrics.kernel_distance(x, y, block) - expected) < 1e-9


@pytest.mark.parametrize("shift, block", [(0, 512), (0, 7), (1e3, 512)])
def test_precision_recall_equal_their_definitions(shift, block):
    """By the definitions, point by point."""
    real = normal(40, 2, 0)
    fake = normal(30, 2, 1) * 0.7 + 0.5
    k = 3
    distance = lambda a, b: math.dist(a.tolist(), b.tolist())
    radius = lambda x, i: sorted(distance(x[i], other) for other in x)[k]
    in_real = np.array([[distance(f, r) < radius(real, i) for i, r in enumerate(real)] for f in fake])
    in_fake = np.array([[distance(f, r) < radius(fake, i) for i, f in enumerate(fake)] for r in real])
    scores = metrics.precision_recall(real + shift, fake + shift, k, block)
    assert list(scores) == ["precision", "recall", "density", "coverage"]
    expected = [in_real.any(1).mean(), in_fake.any(1).mean(), in_real.sum(1).mean() / k, in_real.any(0).mean()]
    assert list(scores.values()) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    "real, fake, expected",
    [
        # Balls of k = 1 around 0, 1, 3, 10: [-1,1], [0,2], [1,5], [3,17]; around 0.5, 4, 30: [-3,4], [0.5,7.5], [4,56].
        ((0, 1, 3, 10), (0.5, 4, 30), (2 / 3, 1, 4 / 3, 1)),
        # 2 and 4 lie on the surfaces of [0,2] and [1,4]: precision and recall count them, density and coverage do not.
        ((0, 1, 2.5), (2, 4), (1, 1, 0.5, 1 / 3)),
        # The ball of a point with copies is that point alone.
        ((0.3, 0.3, 0.3, 5.7), (0.3, 0.3, 90), (2 / 3, 1, 0, 0)),
        ((0, 1, 3), (100, 101, 103), (0, 0, 0, 0)),
    ],
)
def test_precision_recall_of_points_on_a_line(real, fake, expected):
    """By hand, ties and copies included."""
    scores = metrics.precision_recall(points(*real), points(*fake), k=1)
    assert tuple(scores.values()) == pytest.approx(expected, abs=1e-15)


def test_precision_recall_of_identical_sets_is_one():
    """By hand: each sample's k nearest, itself among them, lie within its ball, wherever they stand in the set."""
    x = normal(300, 200, 0) + 3
    assert set(metrics.precision_recall(x, x.flip(0)).values()) == {1}


def test_sliced_wasserstein_grows_with_blur():
    """By experience: noise is nearer to other noise than to blurred noise."""
    noise = pixels(40, 3, 32, 32)
    more = pixels(30, 3, 32, 32, seed=1)
    smooth = F.avg_pool2d(more.float(), 3, 1, 1).round().to(torch.uint8)
    near = metrics.sliced_wasserstein(noise, more)
    assert 0 < near * 1.3 < metrics.sliced_wasserstein(noise, smooth)
    assert metrics.sliced_wasserstein(noise, noise) < 1e-2


def test_sliced_wasserstein_depends_on_the_seed_alone():
    """By the definition; arrays are as good as tensors."""
    noise = pixels(40, 3, 32, 32)
    more = pixels(30, 3, 32, 32, seed=1)
    distance = metrics.sliced_wasserstein(noise, more)
    assert metrics.sliced_wasserstein(noise.numpy(), more) == distance
    assert metrics.sliced_wasserstein(noise, more, seed=1) != distance


def test_laplacian_patches_lie_anywhere():
    """By hand: one of the 100 places of a patch reaches the corner of an image of 16 pixels."""
    flat = torch.zeros(8, 1, 16, 16, dtype=torch.uint8)
    flat[:, :, -1, -1] = 200
    patches = metrics.laplacian_patches(flat, torch.Generator().manual_seed(0))[(1, 16, 16)]
    assert patches.shape == (8 * 128, 1, 7, 7) and patches[:, :, :-1].max() == 0
    assert 0 < (patches.amax(dim=(1, 2, 3)) == 200).double().mean() < 0.02


def test_laplacian_pyramid_equals_its_definition():
    """By the definition, in NumPy: blur, halve, and subtract what comes back."""
    x = torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    fine, rest = metrics.laplacian_pyramid(x)
    taps = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256

    def blurred(image):  # the edge itself is not repeated
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(image, 2, "reflect"), (5, 5))
        return np.einsum("hwij,ij->hw", windows, taps)

    image = x[1, 2].double().numpy()
    small = blurred(image)[::2, ::2]
    spread = np.zeros((64, 48))
    spread[::2, ::2] = 4 * small
    assert fine.shape == (2, 3, 64, 48) and np.abs(rest[1, 2].numpy() - small).max() < 1e-5
    assert np.abs(fine[1, 2].numpy() - (image - blurred(spread))).max() < 1e-5


def test_slice_distance_of_one_value_is_the_distance_of_sorted_values():
    """By hand: patches of one value have one direction, up to its sign, and sorting matches the samples."""
    a = normal(50, 1, 0).float()
    b = normal(50, 1, 1).float().exp()
    lines = [np.sort(((x - x.mean()) / x.std()).flatten().numpy()) for x in (a, b)]
    patches = [x[..., None, None] for x in (a, b)]
    distance = metrics.slice_distance(*patches, torch.Generator().manual_seed(0))
    assert abs(distance - 1000 * np.abs(lines[0] - lines[1]).mean()) < 1e-2


X = normal(5, 3, 0)


@pytest.mark.parametrize(
    "function, args, hint",
    [
        (metrics.frechet_distance, (X[:1], X), "at least 2"),
        (metrics.frechet_distance, (X.abs() / 0, X), "finite"),
        (metrics.frechet_distance, (X[0], X), r"\[n,d\]"),
        (metrics.frechet_distance, (X, X[:, :2]), "dimensions"),
        (metrics.inception_score, (X[:0],), "at least 1"),
        (metrics.kernel_distance, (X[:1], X), ">= 2"),
        (metrics.precision_recall, (X, X, 5), "from 1 to 4"),
        (metrics.sliced_wasserstein, (pixels(2, 3, 32, 32), pixels(2, 1, 32, 32)), "one size"),
        (metrics.sliced_wasserstein, (pixels(2, 3, 8, 32), pixels(2, 3, 8, 32)), "16 x 16"),
    ],
)
def test_scores_refuse_what_they_cannot_take(function, args, hint):
    """By their docstrings."""
    with pytest.raises(metrics.UserError, match=hint):
        function(*args)


# ---- metrics.py: all scores of two sets
TINY_SCORES = ["FD(tiny)", "IS(tiny)", "IS std", "KID(tiny)", "precision", "recall", "density", "coverage"]


@pytest.fixture(scope="session")
def tiny(extractor_file):
    return metrics.load_extractor(extractor_file)


@pytest.fixture(scope="session")
def blind():
    """An Extractor without logits."""
    return metrics.Extractor(lambda x: x.mean(dim=(2, 3)), "net", "0" * 16)


def test_compare_gives_the_scores_of_each_function(tiny):
    """By the functions themselves."""
    real = metrics.measure(tiny, pixels(80, 3, 8, 8))
    fake = metrics.measure(tiny, pixels(70, 3, 8, 8, seed=1))
    scores = metrics.compare(real, fake)
    assert list(scores) == TINY_SCORES
    assert scores["FD(tiny)"] == metrics.frechet_distance(real.features, fake.features)
    assert (scores["IS(tiny)"], scores["IS std"]) == metrics.inception_score(fake.logits)
    assert scores["KID(tiny)"] == metrics.kernel_distance(real.features, fake.features)
    prdc = metrics.precision_recall(real.features, fake.features)
    assert {name: scores[name] for name in prdc} == prdc


def test_compare_takes_the_scores_that_are_available(tiny, blind):
    """By hand: IS needs logits of the generated images, KID and the like the features of both sides."""
    images = pixels(8, 3, 8, 8)
    known = metrics.measure(tiny, images)
    unclassed = metrics.measure(blind, images)
    assert list(metrics.compare(metrics.Summary(known.stats), known)) == TINY_SCORES[:3]
    assert list(metrics.compare(known, metrics.Summary(known.stats))) == TINY_SCORES[:1]
    assert list(metrics.compare(unclassed, unclassed)) == ["FD(net)", "KID(net)", *TINY_SCORES[4:]]


def test_compare_refuses_the_scores_that_are_not_available(tiny, blind):
    """By hand, as above."""
    known = metrics.measure(tiny, pixels(8, 3, 8, 8))
    stats = metrics.Summary(known.stats)
    unclassed = metrics.measure(blind, pixels(8, 3, 8, 8))
    for real, fake, name in (
        (known, stats, "kid"),
        (known, stats, "prdc"),
        (known, known, "swd"),
        (unclassed, unclassed, "is"),
    ):
        with pytest.raises(metrics.UserError, match=f"{name} is not available"):
            metrics.compare(real, fake, [name])


def test_compare_refuses_features_of_two_networks(tiny, blind):
    """By hand: distances between features of two networks mean nothing."""
    real = metrics.measure(tiny, pixels(4, 3, 8, 8))
    with pytest.raises(metrics.UserError, match="tiny, weights .*, resize native, float32 and by net"):
        metrics.compare(real, metrics.measure(blind, pixels(4, 3, 8, 8)))


def test_notes_name_what_a_reader_should_know(tiny):
    """By hand: few images, one split, a nearer neighbour, other sizes."""
    real = metrics.measure(tiny, pixels(8, 3, 8, 8))
    same = str(metrics.notes(real, metrics.measure(tiny, pixels(4, 3, 8, 8))))
    other = str(metrics.notes(real, metrics.measure(tiny, pixels(8, 3, 6, 8))))
    assert "4 images bias a Frechet distance" in same and "neighbour 3, not 5" in same and "pixels" not in same
    assert "IS takes one split" in same and "4 images are fewer than 5000" in same
    assert "8 x 8 and 8 x 6 pixels" in other and "neighbour" not in other


def test_notes_of_many_images_are_none():
    """By hand: 5,000 images of one network have no note."""
    stats = metrics.FeatureStats.from_features(normal(5000, 2, 0), MADE_BY)
    summary = metrics.Summary(stats, logits=normal(5000, 3, 1))
    assert metrics.notes(summary, summary) == []


def test_label_says_fid_only_of_published_weights():
    """By the SHA-256 of the published files."""
    for published in ("0cc3c7bd00000000", "6726825d00000000"):
        assert metrics.label("FID", {**MADE_BY, "weights": published}) == "FID"
    assert metrics.label("FID", MADE_BY) == "FD(n)" and metrics.label("KID", MADE_BY) == "KID(n)"
    assert metrics.label("FID", {}) == "FD"


# ---- metrics.py: statistics and measuring
def moments_of(x):
    return x.mean(0).numpy(), np.cov(x.numpy(), rowvar=False)


def agrees(stats, x):
    """Whether statistics are those of features x by NumPy."""
    mean, cov = moments_of(x)
    return np.abs(stats.mean.numpy() - mean).max() < 1e-9 and np.abs(stats.cov.numpy() - cov).max() < 1e-9


@pytest.mark.parametrize("n", [2, 7, 8, 3000])
def test_from_features_equals_numpy(n):
    """By NumPy, far from zero, where sums of squares would lose digits; changes nothing and keeps nothing."""
    x = normal(n, 7, 0) @ normal(7, 7, 1) + 1000
    before = x.clone()
    stats = metrics.FeatureStats.from_features(x)
    assert torch.equal(x, before) and stats.n == n and len(stats.factor) <= 7
    x += 1
    assert agrees(stats, before)


def test_load_reads_what_save_wrote(tmp_path):
    """By NumPy."""
    x = normal(30, 4, 0)
    metrics.FeatureStats.from_features(x, MADE_BY).save(tmp_path / "ours.npz")
    ours = metrics.FeatureStats.load(tmp_path / "ours.npz")
    assert agrees(ours, x) and ours.n == 30 and ours.made_by == MADE_BY


def test_load_reads_files_of_pytorch_fid(tmp_path):
    """By pytorch-fid's names of arrays; half a made_by is none."""
    x = normal(30, 4, 0)
    y = normal(9, 4, 1)
    mu, sigma = moments_of(x)
    np.savez(tmp_path / "theirs.npz", mu=mu, sigma=sigma, weights="w")
    theirs = metrics.FeatureStats.load(tmp_path / "theirs.npz")
    assert abs(metrics.frechet_distance(theirs, y) - metrics.frechet_distance(x, y)) < 1e-9
    assert theirs.n is None and theirs.made_by == {}
    theirs.save(tmp_path / "again.npz")
    assert metrics.FeatureStats.load(tmp_path / "again.npz").n is None


def test_save_writes_what_pytorch_fid_reads(tmp_path):
    """By np.load, which refuses pickles, as pytorch-fid calls it."""
    x = normal(30, 4, 0)
    metrics.FeatureStats.from_features(x, MADE_BY).save(tmp_path / "ours.npz")
    mu, sigma = moments_of(x)
    with np.load(tmp_path / "ours.npz") as ours:
        assert np.abs(ours["mu"] - mu).max() < 1e-12 and np.abs(ours["sigma"] - sigma).max() < 1e-12


def given_forms(images):
    """The same images [50,3,8,12] in every form that measure takes."""
    array = images.numpy()
    frozen = array.copy()
    frozen.flags.writeable = False
    hwc = array.transpose(0, 2, 3, 1)
    batches = [array[:1], array[1:1], images[1:20], hwc[20:]]
    return images, array, frozen, array[::-1][::-1], hwc, batches, iter(batches)


@pytest.mark.parametrize("form", range(7))
def test_measure_takes_images_in_any_form(form, tiny):
    """By the extractor itself, called once on all images."""
    images = pixels(50, 3, 8, 12)
    features, logits = tiny(images)
    summary = metrics.measure(tiny, given_forms(images)[form])
    assert summary.n == 50 and summary.size == "12 x 8"
    assert (summary.features - features).abs().max() < 1e-6 and (summary.logits - logits).abs().max() < 1e-5
    assert agrees(summary.stats, summary.features.double())


def test_measure_refuses_what_are_no_images(tiny):
    """By its docstring: uint8, four dimensions, one or three channels."""
    images = pixels(50, 3, 8, 12)
    array = images.numpy()
    for wrong in (
        images / 255,
        images.int(),
        array / 255,
        images[0],
        images[:, :2],
        ["no"],
        [images[0]],
        [],
        array[:0],
    ):
        with pytest.raises(metrics.UserError, match="uint8|no image"):
            metrics.measure(tiny, wrong)


def test_measure_reports_progress(tiny):
    """By hand: batches of 8; an iterable's total is known at its end."""
    images = pixels(20, 3, 8, 8)
    calls = []
    metrics.measure(tiny, images, progress=lambda *call: calls.append(call))
    assert calls == [(0, 20), (8, 20), (16, 20), (20, 20)]
    calls.clear()
    metrics.measure(tiny, iter([images]), progress=lambda *call: calls.append(call))
    assert calls == [(0, None), (8, None), (16, None), (20, 20)]


@pytest.fixture
def cache(tmp_path, tiny, monkeypatch):
    """Measures images with a cache in the folder `cache.folder`; `cache.measured` counts the calls of measure."""
    measure = metrics.measure
    cache = SimpleNamespace(folder=tmp_path / "cache", measured=0, network=tiny, images=pixels(20, 3, 8, 8))

    def counted(*args):
        cache.measured += 1
        return measure(*args)

    monkeypatch.setattr(metrics, "measure", counted)
    cache.measure = lambda: metrics.measure_cached(cache.network, cache.images, cache.folder)
    return cache


def test_measure_cached_measures_once(cache):
    """By `measure`; without logits, which the cache does not keep."""
    first = cache.measure()
    second = cache.measure()
    assert cache.measured == 1 and first.logits is None and second.logits is None
    assert torch.equal(first.features, second.features) and torch.equal(first.features, cache.network(cache.images)[0])
    assert first.size == second.size == "8 x 8" and torch.equal(first.stats.factor, second.stats.factor)


@pytest.mark.parametrize("damage", ["empty", "cut", "torn", "short", "pickle", "other"])
def test_measure_cached_makes_a_damaged_cache_anew(damage, cache):
    """By the whole file, which comes back."""
    features = cache.measure().features
    (file,) = cache.folder.iterdir()
    whole = file.read_bytes()
    damaged = {"empty": b"", "cut": whole[:200], "torn": b"PK" + whole[2:900], "pickle": pickle.dumps([1])}
    damaged |= {"short": npz(features=features[:7]), "other": npz(pictures=features)}
    file.write_bytes(damaged[damage])
    assert torch.equal(cache.measure().features, features) and torch.equal(cache.measure().features, features)
    assert cache.measured == 2 and file.read_bytes() == whole


def test_measure_cached_knows_other_images_and_networks(cache, extractor_file):
    """By hand: one pixel, or other weights, is another file."""
    cache.measure()
    cache.images[3, 0, 0, 0] += 1
    cache.measure()
    cache.network = metrics.load_extractor(extractor_file)
    cache.network.made_by["weights"] = "other"
    cache.measure()
    assert cache.measured == 3 and len(list(cache.folder.iterdir())) == 3


def test_measure_cached_needs_no_cache(cache, tmp_path):
    """By hand: a folder that cannot be made costs time alone."""
    (tmp_path / "file").write_text("no folder")
    cache.folder = tmp_path / "file" / "cache"
    assert cache.measure().n == 20


# ---- metrics.py: feature extractors
@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """{1000: file, 1008: file} with random weights of Inception v3; the scores that come of them are nobody's."""
    folder = tmp_path_factory.mktemp("inception")
    files = {}
    for classes in (1000, 1008):
        torch.manual_seed(classes)
        net = metrics.inception_v3(weights=None, init_weights=False, aux_logits=classes == 1000, num_classes=classes)
        for module in net.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.bias.data.normal_(0, 0.1)
                module.weight.data.uniform_(0.5, 1.5)
        files[classes] = folder / f"random-{classes}.pth"
        torch.save(net.state_dict(), files[classes])
    return files


def sha256(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


class Payload(str):
    """A path where a file is created when this is unpickled."""

    def __reduce__(self):
        return open, (str(self), "w")


def test_load_extractor_says_what_made_the_features(inception_weights, extractor_file):
    """By the SHA-256 of the files; the resize mode goes by the network."""
    facts = metrics.load_extractor(extractor_file).made_by
    expected = {"network": "tiny", "weights": sha256(extractor_file)[:16], "resize": "native", "dtype": "float32"}
    assert facts == expected
    for classes, resize in ((1000, "bilinear"), (1008, "tf1")):
        file = inception_weights[classes]
        facts = metrics.load_extractor(file).made_by
        expected = {"network": f"random-{classes}", "weights": sha256(file)[:16], "resize": resize, "dtype": "float32"}
        assert facts == expected


@pytest.mark.parametrize("name", ["pickle", "cut", "other", "net-0cc3c7bd"])
def test_load_extractor_refuses_damaged_and_unsafe_weights(name, tmp_path, inception_weights):
    """By hand; a pickle's code does not run."""
    whole = inception_weights[1000].read_bytes()
    file = tmp_path / f"{name}.pth"
    if name == "pickle":
        torch.save({"fc.weight": torch.zeros(1000, 3), "x": Payload(tmp_path / "ran")}, file)
    elif name == "other":
        torch.save({"weight": torch.zeros(3)}, file)
    else:
        file.write_bytes(whole[:1000] if name == "cut" else whole)
    hint = "SHA-256 begins with" if name == "net-0cc3c7bd" else f"{name}.pth is not a readable weights file[^\n]*$"
    with pytest.raises(metrics.UserError, match=hint):
        metrics.load_extractor(file)
    assert not (tmp_path / "ran").exists()


def test_load_extractor_accepts_the_promised_checksum(tmp_path, inception_weights):
    """By the SHA-256; fewer than eight digits promise nothing."""
    digits = sha256(inception_weights[1000])
    for name in (f"net-{digits[:8]}.pth", "net-12.pth"):
        (tmp_path / name).symlink_to(inception_weights[1000])
        assert metrics.load_extractor(tmp_path / name).made_by["weights"] == digits[:16]


@pytest.mark.parametrize("home, hint", [("hub", "no network$"), ("damaged", "SHA-256"), ("~/hub", "TORCH_HOME")])
def test_load_extractor_reports_missing_weights_in_one_way(home, hint, tmp_path, monkeypatch):
    """By torch.hub's layout: whatever keeps the published weights away is one kind of error. ~: there is no home."""

    def offline(url, path, hash_prefix, progress):
        assert path.endswith("checkpoints/inception_v3_google-0cc3c7bd.pth") and hash_prefix == "0cc3c7bd"
        raise OSError("no network\nat all")

    damaged = tmp_path / "damaged/checkpoints/inception_v3_google-0cc3c7bd.pth"
    damaged.parent.mkdir(parents=True)
    torch.save({"x": Payload(tmp_path / "ran")}, damaged)
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: home if home[0] == "~" else str(tmp_path / home))
    with pytest.raises(metrics.WeightsMissing, match=hint):
        metrics.load_extractor("inception")
    assert not (tmp_path / "ran").exists()


def archive_with(extractor_file, path, end, content, beside=None):
    """The program with the parts whose paths have this end replaced, or with another part beside them."""
    with zipfile.ZipFile(extractor_file) as source, zipfile.ZipFile(path, "w") as target:
        for part in source.namelist():
            target.writestr(part, content if part.endswith(end) else source.read(part))
            if beside and part.endswith(end):
                target.writestr(part.rsplit("/", 1)[0] + "/" + beside[0], beside[1])


def pickled_config(name):
    """A program's table of weights or constants that names a pickled one."""
    entry = {"path_name": name, "is_param": False, "use_pickle": True, "tensor_meta": None}
    return json.dumps({"config": {"weight": entry}})


@pytest.mark.parametrize("kind", ["inputs", "weight", "constant", "library", "cut", "torn"])
def test_load_program_never_runs_code(kind, tmp_path, extractor_file, caplog, capfd):
    """By torch.export's own format, with a pickle or a library in each place that may hold one."""
    payload = Payload(tmp_path / "ran")
    pickled = io.BytesIO()
    torch.save(((payload,), {}), pickled)
    changes = {
        "inputs": (".pt", pickled.getvalue()),
        "weight": ("weights_config.json", pickled_config("weight_9"), ("weight_9", pickled.getvalue())),
        "constant": ("constants_config.json", pickled_config("opaque_obj_0"), ("opaque_obj_0", pickle.dumps(payload))),
        "library": ("archive_version", b"0", ("data/aotinductor/model/m.so", b"a library")),
    }
    file = tmp_path / "net.pt2"
    whole = bytearray(extractor_file.read_bytes())
    if kind in changes:
        archive_with(extractor_file, file, *changes[kind])
    else:
        whole[whole.index(b"models/model.json") + 200] ^= 1
        file.write_bytes(whole[:1000] if kind == "cut" else whole)
    with pytest.raises(metrics.UserError, match="net.pt2 is not a readable .pt2 program for torch [^\n]*$"):
        metrics.load_extractor(file)
    assert not (tmp_path / "ran").exists() and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    assert not caplog.records and capfd.readouterr().err == ""  # torch.export would log tracebacks


def test_load_program_takes_a_rewritten_archive(tmp_path, extractor_file):
    """By the archive itself: what the tests above refuse is not the rewriting."""
    archive_with(extractor_file, tmp_path / "same.pt2", "nothing", b"")
    assert metrics.load_extractor(tmp_path / "same.pt2")(pixels(2, 3, 8, 8))[0].shape == (2, 48)


def test_extractor_gives_a_programs_outputs(tiny):
    """By PyTorch: the program's features are 4 x 4 pixels of the images in [0,1]."""
    images = pixels(5, 3, 8, 12)
    features, logits = tiny(images)
    plain = F.interpolate(images.float() / 255, size=(4, 4), mode="bilinear").flatten(1)
    assert (features - plain).abs().max() < 1e-6 and logits.shape == (5, 5)


def test_extractor_ignores_autocast(tiny):
    """By hand: the program itself computes otherwise under autocast."""
    images = pixels(5, 3, 8, 12)
    _, logits = tiny(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tiny(images)[1], logits) and logits.dtype == torch.float32
        assert not torch.equal(tiny.network(images.float() / 255)[1], logits)


def test_extractor_computes_without_tf32():
    """By torch's own settings, which are as before afterwards."""
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    seen = []

    def network(x):
        seen.append((conv.fp32_precision, matmul.fp32_precision))
        return x.mean(dim=(2, 3))

    before = conv.fp32_precision, matmul.fp32_precision
    metrics.Extractor(network, "net", "0" * 16)(pixels(5, 3, 8, 12))
    assert seen == [("ieee", "ieee")] and (conv.fp32_precision, matmul.fp32_precision) == before


@pytest.mark.parametrize("outputs", [torch.zeros(2, 3, 4), (torch.zeros(2, 3), torch.zeros(1, 3)), None, "text"])
def test_extractor_refuses_other_outputs(outputs):
    """By its docstring."""
    network = metrics.Extractor(lambda x: outputs, "net", "0" * 16)
    with pytest.raises(metrics.UserError, match=r"net computes no features \[N,d\] .*: [^\n]*$"):
        network(pixels(2, 3, 8, 8))


def reference_inception(file, classes, x, monkeypatch):
    """Features and logits of x [N,3,299,299] by torchvision's forward pass, with TensorFlow's pools for 1,008."""
    net = metrics.inception_v3(weights=None, init_weights=False, aux_logits=classes == 1000, num_classes=classes).eval()
    net.load_state_dict(torch.load(file))
    pooled = []
    net.avgpool.register_forward_hook(lambda module, args, output: pooled.append(output.flatten(1)))
    if classes == 1000:
        return net(x), pooled[0]
    average = F.avg_pool2d
    last = []
    net.Mixed_7c.register_forward_pre_hook(lambda module, args: last.append(True))

    def pool(x, kernel_size, stride, padding):
        if last:
            return F.max_pool2d(x, kernel_size, stride, padding)
        return average(x, kernel_size, stride, padding, count_include_pad=False)

    with monkeypatch.context() as patch:
        patch.setattr(F, "avg_pool2d", pool)
        return net(x) - net.fc.bias, pooled[0]


@pytest.mark.parametrize("classes", [1000, 1008])
@torch.no_grad()
def test_inception_equals_torchvisions_and_tensorflows(classes, inception_weights, monkeypatch):
    """By torchvision; for the TensorFlow network by torchvision with other pools and no bias."""
    network = metrics.load_extractor(inception_weights[classes])
    images = pixels(2, 3, 40, 32)
    x = metrics.for_inception(images.float(), network.made_by["resize"])
    expected = reference_inception(inception_weights[classes], classes, x, monkeypatch)
    features, logits = network(images)
    assert features.shape == (2, 2048) and logits.shape == (2, classes) and features.abs().mean() > 0.1
    for ours, theirs in zip((logits, features), expected, strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def test_inception_in_bfloat16_is_close(inception_weights):
    """By the float32 network."""
    images = pixels(2, 3, 40, 32)
    whole, _ = metrics.load_extractor(inception_weights[1000])(images)
    half = metrics.load_extractor(inception_weights[1000], dtype="bfloat16")
    short, logits = half(images)
    assert half.made_by["dtype"] == "bfloat16" and short.dtype == logits.dtype == torch.float32
    assert 1e-4 < (short - whole).norm() / whole.norm() < 0.02


@pytest.mark.parametrize("height, width", [(32, 48), (299, 299), (500, 301)])
def test_for_inception_clean_is_pillows_bicubic(height, width):
    """By Pillow's bicubic on floats, not rounded, as clean-fid computes it."""
    image = pixels(3, height, width).float()
    channels = [Image.fromarray(channel.numpy()).resize((299, 299), Image.BICUBIC) for channel in image]
    expected = np.stack(channels).clip(0, 255)
    assert np.abs(metrics.for_inception(image[None], "clean")[0].numpy() * 128 + 128 - expected).max() < 0.02


@pytest.mark.parametrize("height, width", [(32, 48), (299, 299), (500, 301)])
@pytest.mark.parametrize("mode, scale", [("bilinear", 127.5), ("tf1", 128)])
def test_for_inception_bilinear_and_tf1_equal_their_definitions(mode, scale, height, width):
    """By the definitions: the weights [299,n] of a row's two neighbours."""

    def weights(n):
        at = (np.arange(299) + 0.5) * n / 299 - 0.5 if mode == "bilinear" else np.arange(299) * n / 299
        return np.maximum(0, 1 - np.abs(at.clip(0, n - 1)[:, None] - np.arange(n)))

    image = pixels(3, height, width)
    expected = weights(height) @ image.double().numpy() @ weights(width).T
    resized = metrics.for_inception(image[None].float(), mode)[0]
    assert np.abs(resized.numpy() * scale + scale - expected).max() < 0.01


# ---- metrics.py: images and files
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


@contextlib.contextmanager
def failing_write(path, failure):
    """Asserts that a write of the file in this block, interrupted half way, leaves the earlier content alone."""
    path.write_bytes(b"before")
    with pytest.raises(failure) as caught:
        yield
    assert getattr(caught.value, "filename", str(path)) == str(path)
    assert list(path.parent.iterdir()) == [path] and path.read_bytes() == b"before"


@pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt])
def test_atomic_write_leaves_the_old_file_whole(failure, tmp_path):
    """By hand: half a file never appears under the name, and nothing stays beside it."""
    path = tmp_path / "file"
    with failing_write(path, failure), metrics.atomic_write(path) as file:
        file.write(b"half")
        file.flush()
        (part,) = [other for other in tmp_path.iterdir() if other != path]
        assert part.name[0] == "." and part.suffix == ".part" and path.read_bytes() == b"before"
        raise failure


def test_atomic_write_makes_the_folder_and_replaces_the_file(tmp_path):
    """By hand."""
    for content in (b"first", b"second"):
        with metrics.atomic_write(tmp_path / "new" / "file") as file:
            file.write(content)
        assert [(path.name, path.read_bytes()) for path in (tmp_path / "new").iterdir()] == [("file", content)]


@pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt])
def test_save_is_atomic(failure, tmp_path, monkeypatch):
    """By `atomic_write`."""
    stats = metrics.FeatureStats.from_features(normal(9, 3, 0))

    def fail(file, **arrays):
        file.write(b"half")
        raise failure

    monkeypatch.setattr(np, "savez", fail)
    with failing_write(tmp_path / "stats.npz", failure):
        stats.save(tmp_path / "stats.npz")


@pytest.mark.parametrize(
    "error, shown",
    [
        (PermissionError(13, "Permission denied", "x"), "PermissionError: Permission denied"),
        (urllib.error.URLError("no network"), "URLError: <urlopen error no network>"),
        (KeyError("mu"), "KeyError: 'mu'"),
        (metrics.UserError("features must be finite"), "features must be finite"),
        (RuntimeError("Unreadable. Unpickle it\nand be sorry"), "RuntimeError: Unreadable"),
        (zipfile.BadZipFile("x" * 200), f"BadZipFile: {'x' * 150}"),
    ],
)
def test_reading_reports_a_failure_in_one_sentence(error, shown):
    """By hand: the file, what it should be, the kind of error and its first sentence, without advice to unpickle."""
    with pytest.raises(metrics.UserError) as caught, metrics.reading("file.npz", "file of features"):
        raise error
    assert str(caught.value) == f"file.npz is not a readable file of features: {shown}"


@pytest.mark.parametrize("error", [ImportError("no module"), MemoryError()])
def test_reading_lets_other_errors_pass(error):
    """By hand: these say nothing of the file."""
    with pytest.raises(type(error)) as caught, metrics.reading("file.npz", "file of features"):
        raise error
    assert caught.value is error


def plain_stream(monkeypatch, **more):
    """Puts a notebook's or a logger's stream, without isatty, in place of stderr and stdout; `now` is the time."""
    text = io.StringIO()
    stream = SimpleNamespace(write=text.write, flush=text.flush, text=text.getvalue, now=0.0, **more)
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: stream.now))
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(sys, "stdout", stream)
    return stream


def show_progress(stream, total):
    """Calls a Progress at four times, the last with its end."""
    progress = metrics.Progress("net")
    for stream.now, done, of in ((0.1, 1, total), (40, 40, total), (41, 41, total), (100, 100, 100)):
        progress(done, of)
    return stream.text()


@pytest.mark.parametrize("total, first", [(100, "net: 40 of 100, 1:00 left"), (None, "net: 40")])
def test_progress_renews_one_line_in_a_terminal(total, first, monkeypatch):
    """By hand: at most twice a second, and the end is always shown."""
    stream = plain_stream(monkeypatch, isatty=lambda: True)
    second = "net: 41 of 100, 0:59 left" if total else "net: 41"
    lines = [first, second, "net: 100 of 100, 0:00 left"]
    assert show_progress(stream, total) == "".join(f"\r\x1b[K{line}" for line in lines) + "\n"


@pytest.mark.parametrize("more", [{"isatty": lambda: False}, {}])
def test_progress_prints_a_line_every_half_minute_elsewhere(more, monkeypatch):
    """By hand."""
    stream = plain_stream(monkeypatch, **more)
    assert show_progress(stream, 100) == "net: 40 of 100, 1:00 left\nnet: 100 of 100, 0:00 left\n"


def test_progress_starts_at_nothing(monkeypatch):
    """By hand: before the first image is done no time is known."""
    stream = plain_stream(monkeypatch)
    progress = metrics.Progress("two\nlines")
    stream.now = 60
    progress(0, 100)
    assert stream.text() == "two\\nlines: 0\n"


def picture_folder(path):
    """Five images of four formats and two sizes, with any names, and two files that are none."""
    path.mkdir(parents=True)
    for name, kind in (("1.png", "PNG"), ("2.gif", "GIF"), ("3.jfif", "JPEG"), ("4", "WEBP")):
        to_pil_image(pixels(3, 9, 8)).save(path / name, kind)
    to_pil_image(pixels(3, 30, 9)).save(path / "6.png")
    Image.fromarray(np.full((9, 9), 0.5, np.float32)).save(path / "float.tiff")
    (path / "notes.txt").write_text("no picture")


def test_folder_reads_every_image_in_order(tmp_path, tiny):
    """By read_image, file by file."""
    picture_folder(tmp_path / "a")
    images = metrics.Folder(tmp_path)
    read = list(metrics.batches(images, 4))
    assert sum(map(len, read)) == len(images) == 5 and max(map(len, read)) <= 4
    files = [file for file in images.files if file not in images.skipped]
    singles = [tiny(metrics.read_image(tmp_path / file)[None])[0] for file in files]
    assert (metrics.measure(tiny, images).features - torch.cat(singles)).abs().max() < 1e-6


def test_folder_reads_more_than_its_threads_hold(tmp_path):
    """By hand: 70 images, each of one value, come in the order of their names and in whole batches."""
    for i in range(70):
        to_pil_image(torch.full((1, 2, 2), i, dtype=torch.uint8)).save(tmp_path / f"{i:02}.png")
    read = list(metrics.Folder(tmp_path).read(8))
    assert torch.cat(read)[:, 0, 0, 0].tolist() == list(range(70)) and {len(batch) for batch in read[:-1]} == {8}


# ---- metrics.py: the command
def metrics_fail(capsys, *argv):
    """The one line that a command ends with; asserts exit status 2."""
    capsys.readouterr()
    assert metrics.main([str(word) for word in argv]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("metrics.py: error: "), captured.err
    assert captured.out == "" and len(captured.err) <= 321
    return captured.err


def result_of(capsys, *argv):
    capsys.readouterr()
    assert metrics.main([*(str(word) for word in argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def score(tmp_path, extractor_file, capsys):
    """score(real, fake, *options): the result of a command line, by the tiny network."""
    return lambda *argv: result_of(capsys, "--extractor", extractor_file, *argv)


@pytest.fixture
def sets(folder, tmp_path):
    """The folder's images [24,H,W,3], and files of them and of half their values below tmp_path."""
    images = np.stack([np.asarray(Image.open(file)) for file in sorted(folder.rglob("*.png"))])
    np.savez(tmp_path / "chw.npz", images=images.transpose(0, 3, 1, 2))
    np.savez(tmp_path / "other.npz", images=images // 2)
    np.save(tmp_path / "hwc.npy", images)
    np.save(tmp_path / "gray.npy", images[..., 0])
    np.save(tmp_path / "spread.npy", images[..., [0] * 3])
    np.save(tmp_path / "small.npy", images[:, ::2, ::2])
    np.savez(tmp_path / "both.npz", arr_0=images, mu=np.zeros(48), sigma=np.eye(48))  # as ADM's reference batches
    return images


def test_run_says_what_was_scored(score, sets, folder, tmp_path, extractor_file):
    """By hand."""
    result = score(folder, tmp_path / "other.npz")
    assert list(result.pop("scores")) == TINY_SCORES and "24 images bias" in result.pop("notes")[0]
    facts = {"real": str(folder), "n_real": 24, "fake": str(tmp_path / "other.npz"), "n_fake": 24, "saved": None}
    made_by = {"network": "tiny", "weights": sha256(extractor_file)[:16], "resize": "native", "dtype": "float32"}
    assert result == facts | made_by


@pytest.mark.parametrize("form", ["hwc.npy", "chw.npz", "both.npz"])
def test_run_reads_images_in_any_form(form, score, sets, folder, tmp_path):
    """By the folder of the same images; of a file with images and statistics the images count."""
    expected = score(folder, tmp_path / "other.npz")["scores"]
    assert score(tmp_path / form, tmp_path / "other.npz")["scores"] == pytest.approx(expected, abs=1e-9)


def test_run_takes_gray_images_as_equal_channels(score, sets, tmp_path):
    """By hand."""
    assert score(tmp_path / "gray.npy", tmp_path / "spread.npy")["scores"]["FD(tiny)"] < 1e-9


def test_run_notes_other_sizes(score, sets, folder, tmp_path):
    """By hand."""
    assert "18 x 20 and 9 x 10" in str(score(folder, tmp_path / "small.npy")["notes"])


def test_run_saves_statistics_that_stand_for_the_images(score, sets, folder, tmp_path, extractor_file):
    """By the images themselves; the weights count, not the name of their file."""
    expected = score(folder, tmp_path / "other.npz")["scores"]
    saved = score(folder, "--out", tmp_path / "real.npz")
    assert saved["scores"] == {} and saved["saved"] == str(tmp_path / "real.npz")
    (tmp_path / "renamed.pt2").symlink_to(extractor_file)
    result = score(tmp_path / "real.npz", tmp_path / "other.npz", "--extractor", tmp_path / "renamed.pt2")
    assert list(result["scores"]) == TINY_SCORES[:3] and "left out: kid, prdc (" in result["notes"][-1]
    assert abs(result["scores"]["FD(tiny)"] - expected["FD(tiny)"]) < 1e-9


def test_run_of_two_statistics_loads_no_network(sets, tmp_path, capsys):
    """By hand: the default network is not on this disk, and nothing is downloaded."""
    metrics.FeatureStats.from_features(normal(60, 4, 0), MADE_BY).save(tmp_path / "stats.npz")
    result = result_of(capsys, tmp_path / "stats.npz", tmp_path / "stats.npz", "--extractor", "nowhere")
    assert result["scores"]["FD(n)"] < 1e-9 and result["n_real"] == 60 and result["network"] == "n"
    assert "left out: is, kid, prdc" in result["notes"][-1]


def test_run_notes_statistics_of_unknown_origin(score, sets, folder, tmp_path):
    """By hand."""
    np.savez(tmp_path / "theirs.npz", mu=np.zeros(48), sigma=np.eye(48))
    assert "do not say what made them" in str(score(tmp_path / "theirs.npz", folder)["notes"])


def test_run_of_swd_needs_no_network(sets, folder, tmp_path, capsys):
    """By sliced_wasserstein."""
    result = result_of(capsys, folder, tmp_path / "hwc.npy", "--metrics", "swd", "--extractor", "nowhere")
    other = metrics.sliced_wasserstein(metrics.Folder(folder), sets)
    assert result["scores"] == {"SWD": other} and "network" not in result and result["n_fake"] == 24


def test_run_gives_the_scores_that_were_asked_for(score, sets, folder, tmp_path):
    """By hand."""
    result = score(folder, tmp_path / "other.npz", "--metrics", "swd,fid")
    assert list(result["scores"]) == ["FD(tiny)", "SWD"] and "left out" not in str(result["notes"])


def test_run_notes_files_that_are_no_images(score, tmp_path):
    """By hand."""
    picture_folder(tmp_path / "a")
    note = score(tmp_path, tmp_path)["notes"][-1]
    assert f"{tmp_path}: skipped 2 files" in note and "a/float.tiff (floating-point" in note and "a/notes.txt (" in note


def test_run_notes_dark_images(score, tmp_path):
    """By hand."""
    dark = bmp_folder(tmp_path / "dark", 10)
    assert "dark images, from 0 to 10" in score(dark, dark)["notes"][-1]


COMMAND_ERRORS = """
{folder} | --out;  {folder} --out {tmp}/stats.txt | an .npz;  {folder} --out {tmp}/stats.npz --metrics fid | FAKE
{folder} --out {tmp}/keys.npz | not a readable file of feature statistics;  {folder} {tmp}/nowhere | neither a folder
{folder} --out {tmp}/new/stats.npz | that exists;  {folder} {tmp}/wide.npy --metrics swd --extractor no | one size
{folder} {tmp}/empty | 0 images;  {folder} {tmp}/text --extractor {tiny} | no image;  {folder} {tmp}/floats.npy | uint8
{folder} {tmp}/keys.npz | holds neither;  {folder} {tmp}/wide.npz --extractor {tiny} --metrics fid | dimensions
{tmp}/clean.npz {folder} --extractor {tiny} | resize clean;  {folder} {folder} --metrics fid,foo | no score 'foo'
{tmp}/clean.npz {folder} --metrics kid --extractor {tiny} | kid needs images;  {folder} {folder} --device tpu | device
{folder} {folder} --resize nearest | --resize;  {folder} {folder} --resize clean --extractor {tiny} | fixes its own
"""


@pytest.mark.parametrize(
    "argv, hint", [*cases(COMMAND_ERRORS), ("{folder} {folder} --extractor {tmp}/" + "long/" * 90, "no extractor")]
)
def test_main_refuses_in_one_line(argv, hint, tmp_path, folder, extractor_file, capsys):
    """By the manual; nothing is written."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    for name in ("0.png", "1.png"):
        (tmp_path / "text" / name).write_text("no picture")
    np.save(tmp_path / "floats.npy", np.zeros((4, 8, 8, 3)))
    np.save(tmp_path / "wide.npy", np.zeros((4, 16, 99, 3), np.uint8))
    np.savez(tmp_path / "keys.npz", pictures=np.zeros((4, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "wide.npz", mu=np.zeros(5), sigma=np.eye(5))
    clean = metrics.FeatureStats.from_features(normal(60, 48, 0), {**MADE_BY, "resize": "clean"})
    clean.save(tmp_path / "clean.npz")
    before = sorted(tmp_path.rglob("*"))
    words = [word.format(folder=folder, tmp=tmp_path, tiny=extractor_file) for word in argv.split()]
    assert hint in metrics_fail(capsys, *words) and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", DAMAGED)
def test_main_reports_damaged_arrays_in_one_line(name, tmp_path, folder, capsys):
    """By NumPy's format, damaged in all ways known."""
    file = tmp_path / "file.npz"
    file.write_bytes(DAMAGED[name])
    with pytest.raises(metrics.UserError, match="file.npz [^\n]*$"):
        metrics.FeatureStats.load(file)
    assert "file.npz" in metrics_fail(capsys, folder, file, "--extractor", "nowhere")


def test_main_prints_names_that_no_terminal_can_show(tmp_path, extractor_file, monkeypatch):
    """By hand: in a terminal of ASCII, control characters and bytes that are no text are escapes."""
    root = tmp_path / os.fsdecode(b"latin1-\xe9 \xe2\x82\xac\nline")
    root.mkdir()
    network = root / os.fsdecode(b"net\xe9.pt2")
    network.write_bytes(extractor_file.read_bytes())
    for i in range(3):
        to_pil_image(pixels(3, 8, 8, seed=i)).save(root / f"{i}.png")
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    err = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    argv = [str(root), str(root), "--extractor", str(network)]
    assert metrics.main(argv) == 0 and metrics.main([*argv, "--json"]) == 0
    assert metrics.main([str(root), str(root / "nowhere"), *argv[2:]]) == 2
    out.flush()
    err.flush()
    lines = out.buffer.getvalue().decode("ascii").splitlines()
    assert lines[0] == f"real: {tmp_path}/latin1-\\udce9 \\u20ac\\nline" and err.buffer.getvalue().count(b"\n") == 1
    assert any(line.startswith("FD(net\\udce9)") for line in lines) and "net\\udce9.pt2 (" in "\n".join(lines)


def test_main_keeps_names_that_are_no_text_in_files(tmp_path, extractor_file, folder, capsys):
    """By hand: statistics and the cache carry the network's name as it is."""
    file = tmp_path / os.fsdecode(b"net\xe9.pt2")
    file.write_bytes(extractor_file.read_bytes())
    assert metrics.main([str(folder), "--extractor", str(file), "--out", str(tmp_path / "s.npz")]) == 0
    network = metrics.load_extractor(file)
    for _ in range(2):
        cached = metrics.measure_cached(network, pixels(3, 3, 8, 8), tmp_path / "cache")
        assert metrics.FeatureStats.load(tmp_path / "s.npz").made_by == cached.stats.made_by


def test_main_writes_errors_to_any_stream(monkeypatch):
    """By hand: a notebook's or a logger's stream has neither isatty nor reconfigure."""
    stream = plain_stream(monkeypatch)
    assert metrics.main(["nowhere"]) == 2 and "error: give FAKE" in stream.text()


def test_main_ends_quietly_on_an_interrupt(monkeypatch, capsys):
    """By the convention of shells: 128 and the signal's number, 2."""
    monkeypatch.setattr(metrics, "run", raising(KeyboardInterrupt))
    assert metrics.main(["a", "b"]) == 130 and capsys.readouterr() == ("", "")
