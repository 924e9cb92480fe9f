# SPDX-License-Identifier: MIT
"""All tests of gan.py and metrics.py: offline, on the CPU.    python -m pytest"""

import functools
import hashlib
import json
import math
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import urllib.error
import weakref
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

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
TOY = dict(size=16, width=4, max_width=8, z_dim=8, batch=8, device="cpu")


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory):
    """The user's caches stay untouched."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """3 classes of 8 pictures, 20 x 18 pixels; the classes' order shows whether 10 is sorted behind 9."""
    root = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for c, name in enumerate(["rose 1", "rose 9", "rose 10"]):
        (root / name).mkdir()
        for i in range(8):
            noise = torch.randint(0, 40, (3, 20, 18), generator=generator)
            write_picture((noise + 70 * c).to(torch.uint8), root / name / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def run(tmp_path_factory, folder):
    """A conditional toy run of 6 steps."""
    runs = tmp_path_factory.mktemp("runs")
    return gan.train(gan.Config(**TOY, data=str(folder), cond=True, steps=6, runs=str(runs)))


@pytest.fixture(scope="session")
def extractor_file(tmp_path_factory):
    """A .pt2 program: 4 x 4 pixels as features, fixed projections of them as logits."""

    class Tiny(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("weight", torch.randn(48, 5, generator=torch.Generator().manual_seed(0)))

        def forward(self, x):
            features = F.interpolate(x, size=(4, 4), mode="bilinear", antialias=False).flatten(1)
            return features, features @ self.weight

    path = tmp_path_factory.mktemp("extractor") / "tiny.pt2"
    dims = {0: torch.export.Dim("n"), 2: torch.export.Dim("h", min=4), 3: torch.export.Dim("w", min=4)}
    torch.export.save(torch.export.export(Tiny(), (torch.rand(3, 3, 16, 24),), dynamic_shapes=(dims,)), path)
    return path


def write_picture(image, path):
    to_pil_image(image).save(path)


def toy_state(**changes):
    config = gan.resolve(gan.Config(**{**TOY, "augment": "none", "cond": True, **changes}))
    return gan.new_state(config, ["a", "b", "c"], torch.device("cpu"))


def fails(capsys, *argv):
    """The one line that a command ends with; asserts exit status 2."""
    try:
        status = gan.main([str(word) for word in argv])
    except SystemExit as exit:
        status = exit.code
    err = capsys.readouterr().err
    assert status == 2, err
    assert err.count("\n") == 1 and err.startswith("gan.py: error: "), err
    return err


# ---------------------------------------------------------------------------------------------------------------------
# Networks


@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_shapes_and_ranges(size, channels, num_classes):
    y = torch.tensor([0, 2]) if num_classes else None
    x = gan.Generator(size, channels, 4, 16, 8, num_classes)(torch.randn(2, 8), y)
    assert x.shape == (2, channels, size, size) and x.dtype == torch.float32 and x.abs().max() <= 1
    logits = gan.Discriminator(size, channels, 4, 16, num_classes)(x, y)
    assert logits.shape == (2,) and logits.dtype == torch.float32


@pytest.mark.parametrize("num_classes, G_millions, D_millions", [(0, 3.95, 4.88), (17, 5.37, 4.89)])
def test_parameter_counts(num_classes, G_millions, D_millions):
    assert round(gan.count_parameters(gan.Generator(num_classes=num_classes)) / 1e6, 2) == G_millions
    assert round(gan.count_parameters(gan.Discriminator(num_classes=num_classes)) / 1e6, 2) == D_millions


@pytest.mark.parametrize("size", [0, 8, 48, 512])
def test_impossible_sizes_are_refused(size):
    for network in (gan.Generator, gan.Discriminator):
        with pytest.raises(gan.UserError):
            network(size=size)


def test_gradients_reach_every_parameter():
    G, D = gan.Generator(16, 3, 4, 8, 8, 3), gan.Discriminator(16, 3, 4, 8, 3)
    y = torch.tensor([0, 1, 2, 0])
    D(G(torch.randn(4, 8), y), y).square().sum().backward()
    for net in (G, D):
        for name, p in net.named_parameters():
            assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_class_changes_the_output():
    torch.manual_seed(0)
    G, D = gan.Generator(16, 3, 4, 8, 8, 3).eval(), gan.Discriminator(16, 3, 4, 8, 3).eval()
    z = torch.randn(1, 8).repeat(2, 1)
    x = G(z, torch.tensor([0, 1]))
    assert (x[0] - x[1]).abs().max() > 1e-3
    logits = D(x[:1].repeat(2, 1, 1, 1), torch.tensor([0, 1]))
    assert (logits[0] - logits[1]).abs() > 1e-4


def true_weight(layer):
    """The weight of a layer, over its exact spectral norm if it is parametrized."""
    if not hasattr(layer, "parametrizations"):
        return layer.weight
    w = layer.parametrizations.weight.original
    return w / torch.linalg.matrix_norm(w.flatten(1), 2)


def convolve(layer, x):
    return F.conv2d(x, true_weight(layer), layer.bias, padding=layer.kernel_size[0] // 2)


def textbook_generator(G, z, y, statistics=None):
    """G's forward pass as it is usually written: upsample first, then norm, ReLU and convolution.

    To the list statistics it appends each adaptive norm with the mean and the variance, over all pixels, of its input.
    """

    def up(h):
        return h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

    def norm(layer, h, e):
        gain, bias = (e @ true_weight(layer.gain_bias).T + layer.gain_bias.bias).chunk(2, dim=1)
        mean, var = h.mean((0, 2, 3), keepdim=True), h.var((0, 2, 3), keepdim=True, correction=0)
        if statistics is not None:
            statistics.append((layer.norm, mean.detach().flatten(), var.detach().flatten()))
        return (h - mean) / (var + 1e-5).sqrt() * (1 + gain)[:, :, None, None] + bias[:, :, None, None]

    e = torch.cat([z, G.embed.weight[y]], 1)
    h = (e @ true_weight(G.linear).T + G.linear.bias).reshape(len(z), -1, 4, 4)
    for b in G.blocks:
        x = up(h)
        r = convolve(b.conv1, F.relu(norm(b.norm1, x, e)))
        r = convolve(b.conv2, F.relu(norm(b.norm2, r, e)))
        h = r + (x if isinstance(b.skip, torch.nn.Identity) else convolve(b.skip, x))
    return torch.tanh(convolve(G.conv, F.relu(G.norm(h))))


def textbook_discriminator(D, x, y):
    """D's forward pass as it is usually written: convolve first, then pool."""
    h = convolve(D.conv, x)
    for b in D.blocks:
        r = convolve(b.conv2, F.relu(convolve(b.conv1, F.relu(h))))
        h = F.avg_pool2d(r + (h if isinstance(b.skip, torch.nn.Identity) else convolve(b.skip, h)), 2)
    phi = F.relu(h).sum((2, 3))
    return (phi @ true_weight(D.linear).T + D.linear.bias)[:, 0] + (phi * true_weight(D.embed)[y]).sum(1)


def randomized(net):
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net


def settle(net, *inputs):
    """Forward passes until the power iterations have found the norms."""
    for _ in range(300):
        net(*inputs)


def test_networks_equal_their_textbook_form():
    torch.manual_seed(0)
    y = torch.tensor([0, 1, 2, 1])
    G, z = randomized(gan.Generator(32, 3, 4, 8, 8, 3)), torch.randn(4, 8)
    assert torch.allclose(G(z, y), textbook_generator(G, z, y), rtol=0, atol=1e-5)
    D, x = randomized(gan.Discriminator(32, 3, 4, 8, 3)), torch.rand(4, 3, 32, 32) * 2 - 1
    settle(D, x, y)
    assert torch.allclose(D(x, y), textbook_discriminator(D, x, y), rtol=0, atol=1e-5)


def gradients(net, loss):
    names, parameters = zip(*net.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, parameters, retain_graph=True)))


@pytest.mark.parametrize("size", [16, 32])
def test_networks_have_the_gradients_and_statistics_of_their_textbook_form(size):
    torch.manual_seed(0)
    y = torch.tensor([0, 1, 2, 1])
    G, z = randomized(gan.Generator(size, 3, 4, 8, 8, 3)), torch.randn(4, 8, requires_grad=True)
    D, x = randomized(gan.Discriminator(size, 3, 4, 8, 3)), (torch.rand(4, 3, size, size) * 2 - 1).requires_grad_()
    settle(D, x, y)
    D.eval()  # the power iterations rest
    statistics = []
    pairs = [
        (G, z, G(z, y), textbook_generator(G, z, y, statistics)),
        (D, x, D(x, y), textbook_discriminator(D, x, y)),
    ]
    for net, given, fast, textbook in pairs:
        weights = torch.randn_like(fast)
        ours, theirs = ((out * weights).sum() for out in (fast, textbook))
        ours, theirs = (
            gradients(net, loss) | {"input": torch.autograd.grad(loss, given)[0]} for loss in (ours, theirs)
        )
        assert ours.keys() == theirs.keys()
        largest = max(g.abs().max() for g in theirs.values())
        for name in ours:
            assert torch.allclose(ours[name] / largest, theirs[name] / largest, rtol=0, atol=1e-5), name
    for block, (norm, mean, var) in zip([b for b in G.blocks for _ in range(2)], statistics):
        # The first norm of a block sees each pixel once, the textbook's four times: the same mean and variance, but the
        # running variance is that of a sample, and the samples are of different numbers.
        n = 4 * 16 * 4 ** (list(G.blocks).index(block) + (norm is block.norm2.norm))
        assert torch.allclose(norm.running_mean, 0.1 * mean, rtol=0, atol=1e-5)
        assert torch.allclose(norm.running_var, 0.9 + 0.1 * var * n / (n - 1), rtol=0, atol=1e-5)


def test_box_and_pool_are_averages():
    """What the CPU and CUDA run."""

    def same(ours, theirs):
        weights = torch.randn_like(theirs)
        gradients = [torch.autograd.grad((out * weights).sum(), x)[0] for out in (ours, theirs)]
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-6) and torch.allclose(*gradients, rtol=0, atol=1e-6)

    x = torch.randn(2, 3, 6, 8, requires_grad=True)
    for divisor, padding in ((4, 1), (1, 0)):
        pooled = F.avg_pool2d(x, 2, stride=1, padding=padding, divisor_override=divisor)
        same(gan.box(x, divisor, padding), pooled)
    same(gan.pool(x), F.avg_pool2d(x, 2))


def test_spectral_norm_gives_unit_norm_and_holds_still_in_eval_mode():
    torch.manual_seed(0)
    D = randomized(gan.Discriminator(16, 3, 4, 8, 3))
    inputs = torch.rand(2, 3, 16, 16), torch.tensor([0, 1])
    settle(D, *inputs)
    for layer in (m for m in D.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear, torch.nn.Embedding))):
        assert abs(torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() - 1) < 1e-3
    before = {k: v.clone() for k, v in D.eval().state_dict().items()}
    D(*inputs)
    assert all(torch.equal(v, before[k]) for k, v in D.state_dict().items())


def test_spectral_norm_is_float32_under_autocast():
    seen = []

    class Watched(gan.SpectralNorm):
        def iterate(self, matrix):
            seen.append(torch.is_autocast_enabled("cpu"))
            super().iterate(matrix)

    layer = torch.nn.Linear(64, 64)
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", Watched(layer.weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.weight.dtype == torch.float32
    assert len(seen) > 15 and not any(seen)


# ---------------------------------------------------------------------------------------------------------------------
# Losses


REAL, FAKE = torch.tensor([2.0, -1.0]), torch.tensor([0.5, -3.0])


def log_sigmoid(x):
    return -math.log(1 + math.exp(-x))


@pytest.mark.parametrize(
    "name, d, g",
    [
        ("hinge", (0 + 2) / 2 + (1.5 + 0) / 2, -(0.5 - 3) / 2),
        ("wgan", (0.5 - 3) / 2 - (2 - 1) / 2, -(0.5 - 3) / 2),
        ("lsgan", (1 + 4) / 4 + (0.25 + 9) / 4, (0.25 + 16) / 4),
        ("ns", -(log_sigmoid(2) + log_sigmoid(-1)) / 2 - (log_sigmoid(-0.5) + log_sigmoid(3)) / 2,
         -(log_sigmoid(0.5) + log_sigmoid(-3)) / 2),
        ("minimax", -(log_sigmoid(2) + log_sigmoid(-1)) / 2 - (log_sigmoid(-0.5) + log_sigmoid(3)) / 2,
         (log_sigmoid(-0.5) + log_sigmoid(3)) / 2),
    ],
)  # fmt: skip
def test_losses_by_hand(name, d, g):
    d_loss, g_loss = gan.LOSSES[name]
    assert abs(d_loss(REAL, FAKE).item() - d) < 1e-6
    assert abs(g_loss(FAKE).item() - g) < 1e-6


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_ns_is_binary_cross_entropy(smoothing):
    bce = F.binary_cross_entropy_with_logits
    expected = bce(REAL, torch.full((2,), 1 - smoothing)) + bce(FAKE, torch.zeros(2))
    assert abs(gan.d_bce(REAL, FAKE, smoothing) - expected) < 1e-6
    assert abs(gan.g_ns(FAKE) - bce(FAKE, torch.ones(2))) < 1e-6


@pytest.mark.parametrize("name", list(gan.LOSSES))
def test_gradients_live_where_the_networks_are_wrong(name):
    d_loss, g_loss = gan.LOSSES[name]
    real, fake = torch.tensor([-50.0], requires_grad=True), torch.tensor([50.0], requires_grad=True)
    d_loss(real, fake).backward()
    assert real.grad <= -1 + 1e-6 and fake.grad >= 1 - 1e-6
    for at in (-50.0, 50.0):
        fake = torch.tensor([at], requires_grad=True)
        g_loss(fake).backward()
        assert torch.isfinite(fake.grad).all()
        if (name, at) not in (("minimax", -50.0), ("ns", 50.0)):  # minimax saturates where G loses, ns where it wins
            assert fake.grad.abs() >= 1 - 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# Truncated noise


@pytest.mark.parametrize("trunc", [0.1, 0.7, 2.0, 6.0])
def test_truncated_normal(trunc):
    z = gan.sample_z(2000, 100, trunc, torch.Generator().manual_seed(0)).flatten().double()
    assert z.shape == (200_000,) and z.abs().max() <= trunc
    density = math.exp(-(trunc**2) / 2) / math.sqrt(2 * math.pi)
    mass = math.erf(trunc / math.sqrt(2))
    assert abs(z.mean()) < 0.01
    assert abs(z.var() - (1 - 2 * trunc * density / mass)) < 0.01
    # The whole distribution, bounds included: a pile-up anywhere would be a jump.
    cdf = (torch.erf(z.sort().values / math.sqrt(2)) / mass + 1) / 2
    assert (cdf - torch.linspace(0, 1, len(z), dtype=torch.float64)).abs().max() < 0.005


def test_noise_without_trunc_is_normal_and_seeded():
    draw = lambda: gan.sample_z(1000, 100, generator=torch.Generator().manual_seed(1))  # noqa: E731
    assert torch.equal(draw(), draw())
    assert abs(draw().mean()) < 0.01 and abs(draw().std() - 1) < 0.01 and draw().abs().max() > 3.5


@pytest.mark.parametrize("trunc", [0, -1.0, float("nan")])
def test_impossible_trunc(trunc):
    with pytest.raises(gan.UserError):
        gan.sample_z(1, 1, trunc)


def test_sampling_takes_statistics_of_its_trunc():
    torch.manual_seed(0)
    G = gan.Generator(16, 3, 4, 8, 8).eval()
    before = {k: v.clone() for k, v in G.state_dict().items()}
    for trunc in (None, 0.5):
        norm = gan.with_standing_statistics(G, trunc).blocks[0].norm1.norm
        h = G.linear(gan.sample_z(20_000, 8, trunc)).view(-1, 8, 4, 4)
        assert torch.allclose(norm.running_mean, h.mean((0, 2, 3)), atol=0.02)
        assert torch.allclose(norm.running_var, h.var((0, 2, 3)), atol=0.03)
    assert all(torch.equal(v, before[k]) for k, v in G.state_dict().items())  # G itself stays as it was


def test_generate():
    torch.manual_seed(0)
    G = gan.Generator(16, 1, 4, 8, 8, 3).eval()
    images = gan.generate(G, 5, trunc=0.7, classes=[2, 1], seed=3)
    assert images.shape == (5, 1, 16, 16) and images.dtype == torch.uint8
    assert torch.equal(images, gan.generate(G, 5, 0.7, [2, 1, 2, 1, 2], 3))
    assert not torch.equal(images, gan.generate(G, 5, 0.7, [0, 1], 3))
    assert not torch.equal(images, gan.generate(G, 5, 0.7, [2, 1], 4))
    for classes in ([3], [-1], []):
        with pytest.raises(gan.UserError):
            gan.generate(G, 1, classes=classes)


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation


@pytest.mark.parametrize("policy", ["", "none", "color", "translation", "cutout", "color,translation,cutout"])
def test_augmentation_keeps_shape_and_passes_gradients(policy):
    torch.manual_seed(0)
    x = torch.rand(4, 3, 16, 16, requires_grad=True)
    out = gan.diff_augment(x, policy)
    assert out.shape == x.shape
    assert torch.equal(out, x) == (policy in ("", "none"))
    out.sum().backward()
    assert (x.grad.abs().sum((1, 2, 3)) > 0).all()


def test_color_equals_the_formula():
    torch.manual_seed(0)
    x = torch.rand(3, 3, 8, 8) * 2 - 1
    torch.manual_seed(1)
    out = gan.diff_augment(x, "color")
    torch.manual_seed(1)
    brightness, saturation, contrast = torch.rand(3, 3).T
    for n in range(3):
        expected = x[n].numpy() + brightness[n].item() - 0.5
        gray = expected.mean(axis=0)
        expected = np.stack([gray + 2 * saturation[n].item() * (channel - gray) for channel in expected])
        expected = expected.mean() + (0.5 + contrast[n].item()) * (expected - expected.mean())
        assert np.abs(out[n].numpy() - expected).max() < 1e-5


def test_translation_moves_by_whole_pixels_and_every_move_occurs():
    torch.manual_seed(0)
    x = torch.rand(200, 2, 16, 16) + 1
    padded = F.pad(x, (2, 2, 2, 2))
    seen = set()
    for n, moved in enumerate(gan.diff_augment(x, "translation")):
        moves = [(i, j) for i in range(5) for j in range(5) if torch.equal(moved, padded[n, :, i : i + 16, j : j + 16])]
        assert len(moves) == 1
        seen.add(moves[0])
    assert len(seen) == 25


def test_cutout_zeroes_one_square():
    torch.manual_seed(0)
    x = torch.rand(100, 2, 16, 16) + 1
    out = gan.diff_augment(x, "cutout")
    hole = out == 0
    assert torch.equal(out[~hole], x[~hole]) and torch.equal(hole[:, 0], hole[:, 1])
    height, width = hole[:, 0].any(2).sum(1), hole[:, 0].any(1).sum(1)
    assert torch.equal(hole[:, 0].sum((1, 2)), height * width)  # a full rectangle
    assert height.max() == 8 and width.max() == 8 and height.min() >= 4 and width.min() >= 4  # half is out at most


def test_policies():
    with pytest.raises(gan.UserError, match="blur"):
        gan.diff_augment(torch.zeros(1, 3, 16, 16), "color,blur")
    assert [gan.auto_policy(n) for n in (4_999, 5_000, 20_000, 50_000)] == [
        "color,translation,cutout", "translation,cutout", "cutout", "none"]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Averaged weights


def test_ema_averages_parameters_and_copies_buffers():
    torch.manual_seed(0)
    G, G_ema = gan.Generator(16, 3, 4, 8, 8), gan.Generator(16, 3, 4, 8, 8)
    G(torch.randn(8, 8))  # moves the buffers
    expected = [0.9 * a + 0.1 * b for a, b in zip(G_ema.parameters(), G.parameters())]
    gan.ema_update(G_ema, G, 0.9)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(G_ema.parameters(), expected))
    assert all(torch.equal(a, b) for a, b in zip(G_ema.buffers(), G.buffers()))


def test_ema_half_life():
    config = gan.Config(batch=50)
    assert abs(gan.ema_beta(config, 1_000_000) ** (20_000 / 50) - 0.5) < 1e-9  # 20,000 images halve a weight's share
    assert abs(gan.ema_beta(config, 400) ** (0.05 * 400) - 0.5) < 1e-9  # 5% of the images seen, early on
    assert gan.ema_beta(config, 1) < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# Data


def color_picture():
    """[3,12,8]: red above, blue below, a green column on the left."""
    image = torch.zeros(3, 12, 8, dtype=torch.uint8)
    image[0, :6], image[2, 6:] = 200, 100
    image[:, :, :2] = torch.tensor([0, 250, 0], dtype=torch.uint8)[:, None, None]
    return image


@pytest.mark.parametrize(
    "kind",
    [
        "RGB.png",
        "L.png",
        "1.png",
        "P.png",
        "P.gif",
        "RGBA.png",
        "LA.png",
        "RGB.bmp",
        "CMYK.tif",
        "I;16.png",
        "I;16.tif",
    ],
)
def test_each_lossless_mode_is_decoded_exactly(tmp_path, kind):
    picture = color_picture()
    mode, suffix = kind.split(".")
    path = tmp_path / f"picture.{suffix}"
    pil = to_pil_image(picture)
    if mode == "I;16":
        expected = picture[:1].expand(3, -1, -1)
        pil = Image.fromarray(picture[0].numpy().astype(np.uint16) * 257)
    else:
        pil = pil.convert(mode)
        expected = torch.from_numpy(np.array(pil.convert("RGB"))).permute(2, 0, 1)
    pil.save(path)
    decoded = gan.decode(path).expand(3, -1, -1)
    assert decoded.dtype == torch.uint8 and torch.equal(decoded, expected)


def test_jpegs_gray_cmyk_and_rotated(tmp_path):
    pil = to_pil_image(color_picture())
    for mode in ("L", "CMYK"):
        pil.convert(mode).save(tmp_path / "x.jpg", quality=100, subsampling=0)
        expected = np.array(pil.convert(mode).convert("RGB")).transpose(2, 0, 1).astype(float)
        assert np.abs(gan.decode(tmp_path / "x.jpg").expand(3, -1, -1).numpy() - expected).mean() < 4
    exif = pil.getexif()
    exif[274] = 6  # the camera was turned: a viewer shows the picture turned by 90 degrees to the right
    pil.save(tmp_path / "x.jpg", quality=100, subsampling=0, exif=exif)
    expected = color_picture().rot90(-1, (1, 2)).float()
    assert (gan.decode(tmp_path / "x.jpg").float() - expected).abs().mean() < 4


def test_transparency_turns_white(tmp_path):
    rgba = torch.cat([color_picture(), torch.full((1, 12, 8), 0, dtype=torch.uint8)])
    rgba[3, 6:] = 51  # a fifth
    write_picture(rgba, tmp_path / "x.png")
    decoded = gan.decode(tmp_path / "x.png")
    assert (decoded[:, :6] == 255).all()
    assert decoded[:, 11, 7].tolist() == [204, 204, 224]  # 0.2 of (0, 0, 100) and 0.8 of white


def test_fit_takes_the_centre_square_and_both_channel_counts():
    wide = torch.zeros(3, 32, 96, dtype=torch.uint8)
    wide[:, :, 32:64] = torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None]
    assert (gan.fit(wide, 16, 3) == torch.tensor([255, 0, 0])[:, None, None]).all()
    assert gan.fit(wide, 16, 1).shape == (1, 16, 16) and gan.fit(wide[:1], 64, 3).shape == (3, 64, 64)


def test_resizing_is_antialiased():
    stripes = torch.zeros(1, 64, 64, dtype=torch.uint8)
    stripes[:, :, ::2] = 255
    assert (gan.fit(stripes, 16, 1).float() - 127.5).abs().max() < 12


def test_folder_with_classes_and_junk(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "data")
    (tmp_path / "data" / "notes.txt").write_text("no image")
    (tmp_path / "data" / "rose 9" / "broken.png").write_bytes((folder / "rose 9" / "1.png").read_bytes()[:60])
    (tmp_path / "data" / ".hidden").mkdir()
    write_picture(torch.zeros(3, 8, 8, dtype=torch.uint8), tmp_path / "data" / ".hidden" / "x.png")
    (tmp_path / "data" / "rose 1").rename(tmp_path / "linked")
    (tmp_path / "data" / "rose 1").symlink_to(tmp_path / "linked")
    images, labels, classes = gan.load_images(str(tmp_path / "data"), 16, 3)
    out = capsys.readouterr().out
    assert "skipped 2 of 26 files" in out and "notes.txt" in out and "broken.png" in out
    assert images.shape == (24, 3, 16, 16) and images.dtype == torch.uint8
    assert classes == ["rose 1", "rose 9", "rose 10"]
    assert labels.dtype == torch.int64 and labels.bincount().tolist() == [8, 8, 8]
    means = [images[labels == c].float().mean().item() for c in range(3)]  # pictures and labels belong together
    assert all(abs(mean - expected) < 3 for mean, expected in zip(means, (19.5, 89.5, 159.5)))


def test_folder_without_classes(folder):
    images, labels, classes = gan.load_images(str(folder / "rose 1"), 16, 1)
    assert images.shape == (8, 1, 16, 16) and labels.tolist() == [0] * 8 and classes == []


def test_cache_is_used_and_never_stale(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = tmp_path / "data"
    shutil.copytree(folder / "rose 1", data)
    calls = []
    decode = gan.decode
    monkeypatch.setattr(gan, "decode", lambda path: calls.append(path) or decode(path))

    def load(size=16, channels=3):
        calls.clear()
        return gan.load_images(str(data), size, channels)[0].clone(), len(calls)

    first, count = load()
    assert count == 8
    again, count = load()
    assert count == 0 and torch.equal(first, again)
    assert load(size=32)[1] == 8 and load(channels=1)[1] == 8 and load()[1] == 0

    write_picture(torch.full((3, 20, 18), 255, dtype=torch.uint8), data / "3.png")
    changed, count = load()
    assert count == 8 and (changed[3] == 255).all()
    os.utime(data / "3.png", (1, 1))
    assert load()[1] == 8
    (data / "3.png").unlink()
    assert len(load()[0]) == 7

    for cached in (tmp_path / "cache").rglob("images.u8"):  # half-written
        cached.write_bytes(cached.read_bytes()[:-1])
    assert load()[1] == 7 and load()[1] == 0
    assert not list((tmp_path / "cache").rglob("unfinished-*"))


def test_images_load_where_no_cache_can_be_written(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    images, labels, classes = gan.load_images(str(folder), 16, 3)
    assert images.shape == (24, 3, 16, 16) and len(classes) == 3 and "memory" in capsys.readouterr().out


def test_interrupted_cache_leaves_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(gan, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gan.load_images(str(folder), 16, 3)
    assert list((tmp_path / "gan.py").iterdir()) == []


def test_flowers17_from_an_archive_of_its_layout(tmp_path, monkeypatch):
    archive = tmp_path / "there" / "17flowers.tgz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        for i in (1, 80, 81, 1360):
            write_picture(torch.full((3, 30, 40), min(i, 200), dtype=torch.uint8), tmp_path / "x.jpg")
            tar.add(tmp_path / "x.jpg", f"jpg/image_{i:04d}.jpg")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(archive.parent))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(gan, "FLOWERS17_URL", f"http://127.0.0.1:{server.server_port}/17flowers.tgz")

    here = str(tmp_path / "here")
    with pytest.raises(gan.UserError, match="flowers17"):  # the archive's checksum is another
        gan.load_images("flowers17", 16, 3, here)
    monkeypatch.setattr(gan, "FLOWERS17_MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    for _ in range(2):
        images, labels, classes = gan.load_images("flowers17", 16, 3, here)
        assert images.float().mean((1, 2, 3)).round().tolist() == [1, 80, 81, 200]
        assert [classes[y] for y in labels] == ["0", "0", "1", "16"]
        server.shutdown()  # the second time needs no download


def test_mnist_in_torchvision_layout(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        header = (2051).to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in (3, 28, 28))
        pixels = np.repeat(np.array([10, 20, 30], np.uint8), 28 * 28).tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pixels)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            (2049).to_bytes(4, "big") + (3).to_bytes(4, "big") + b"\x07\x00\x02"
        )
    images, labels, classes = gan.load_images("mnist", 32, 1, str(tmp_path))
    assert images.shape == (3, 1, 32, 32) and images.float().mean((1, 2, 3)).tolist() == [10, 20, 30]
    assert [classes[y] for y in labels] == ["7", "0", "2"]
    config = gan.resolve(gan.Config(data="mnist"))
    assert (config.channels, config.flip, config.size) == (1, False, 64)


def test_synthetic_flowers():
    images, labels, classes = gan.load_images("synthetic", 32, 3)
    assert images.shape == (1360, 3, 32, 32) and labels.bincount().tolist() == [80] * 17 and len(classes) == 17
    assert torch.equal(images, gan.load_images("synthetic", 32, 3)[0])
    assert gan.load_images("synthetic", 16, 1)[0].shape == (1360, 1, 16, 16)
    x = images.float().flatten(1) / 255
    means = torch.stack([x[labels == c].mean(0) for c in range(17)])
    assert ((torch.cdist(x, means).argmin(1) == labels).float().mean()) > 0.9  # classes differ ...
    assert min(x[labels == c].std(0).mean() for c in range(17)) > 0.04  # ... and vary


def test_batches_cover_each_epoch_and_can_start_anywhere():
    images = torch.arange(10, dtype=torch.uint8)[:, None, None, None].expand(10, 1, 1, 1)
    config = gan.Config(batch=3, flip=False)
    device = torch.device("cpu")

    def take(count, start=0):
        stream = gan.batches(images, torch.arange(10), config, device, start)
        return [next(stream) for _ in range(count)]

    taken = take(9)
    for epoch in range(3):
        ys = torch.cat([y for _, y in taken[3 * epoch : 3 * epoch + 3]])
        assert len(ys.unique()) == 9
    assert not torch.equal(torch.cat([y for _, y in taken[:3]]), torch.cat([y for _, y in taken[3:6]]))
    for x, y in taken:
        assert torch.allclose(x.flatten(), y / 127.5 - 1)
    for (_, a), (_, b) in zip(take(4, start=5), taken[5:]):
        assert torch.equal(a, b)


def test_flips_mirror_half_of_the_images():
    images = torch.tensor([0, 255], dtype=torch.uint8).expand(1000, 1, 1, 2)
    torch.manual_seed(0)
    x, _ = next(gan.batches(images, torch.zeros(1000), gan.Config(batch=1000, flip=True), torch.device("cpu")))
    assert abs((x[:, 0, 0, 0] == 1).float().mean() - 0.5) < 0.06
    assert (x.sum(3) == 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# Training


def test_run_folder(run, folder):
    assert run.name == f"0000-ns-cond-{folder.name}-16"
    assert json.loads((run / "config.json").read_text())["augment"] == "color,translation,cutout"
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 6 and {"loss_D", "loss_G", "right_real", "right_fake", "images_per_s"} <= log[-1].keys()
    grid = pil_to_tensor(Image.open(run / "samples" / "0000006.png"))
    assert grid.shape == (3, 3 * 18 + 2, 10 * 18 + 2)  # a row for each class, ten columns, two pixels between
    G, config = gan.load_generator(run)
    assert not G.training and isinstance(config, gan.Config) and config.steps == 6
    assert (run / "checkpoint.pt").exists() and not list(run.glob("*unfinished"))


def test_resume_is_bit_for_bit_the_uninterrupted_run(folder, tmp_path):
    toy = dict(TOY, data=str(folder), cond=True, d_steps=2, runs=str(tmp_path))
    whole = gan.train(gan.Config(**toy, steps=8, name="whole"))
    part = gan.train(gan.Config(**toy, steps=4, name="part"))
    assert gan.main(["train", "--resume", str(part), "--steps", "8"]) == 0
    a, b = (gan.read_checkpoint(r / "checkpoint.pt") for r in (whole, part))
    for name in gan.MODULES[:5]:
        flat_a, flat_b = (torch.utils._pytree.tree_leaves(c[name]) for c in (a, b))
        assert len(flat_a) == len(flat_b) > 0
        assert all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(flat_a, flat_b)), name
    assert a["step"] == b["step"] == 8 and torch.equal(a["rng"], b["rng"])
    assert (whole / "samples/0000008.png").read_bytes() == (part / "samples/0000008.png").read_bytes()
    steps = [json.loads(line)["step"] for line in (part / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == 8


def test_resume_cuts_what_was_logged_after_the_checkpoint(folder, tmp_path):
    run = gan.train(gan.Config(**TOY, data=str(folder), steps=2, log_every=1, runs=str(tmp_path)))
    with open(run / "log.jsonl", "a") as log:
        log.write('{"step": 3, "loss_D": 9}\n{"step": 4, "lo')  # killed while it wrote
    assert gan.main(["train", "--resume", str(run), "--steps", "3"]) == 0
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3] and records[-1]["loss_D"] != 9


def test_resume_takes_the_flags_of_the_run_and_moved_data(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "here")
    flags = ["--cond", "--augment", "auto", "--runs", str(tmp_path / "runs"), *TOY_FLAGS]
    assert gan.main(["train", "--data", str(tmp_path / "here"), "--steps", "1", "--name", "x", *flags]) == 0
    (tmp_path / "here").rename(tmp_path / "there")
    there = ["--data", str(tmp_path / "there")]
    assert gan.main(["train", "--resume", "x", "--steps", "2", *there, *flags]) == 0
    assert gan.main(["eval", "--runs", str(tmp_path / "runs"), "--extractor", "nowhere", *there]) == 2
    assert "nowhere" in capsys.readouterr().err  # it got as far as the extractor


def test_resume_with_a_scaler_that_was_off_before(run):
    content = gan.read_checkpoint(run / "checkpoint.pt")
    assert content["scaler"] == {}
    enabled = torch.amp.GradScaler("cpu", enabled=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.amp, "GradScaler", lambda *a, **k: enabled)
        assert gan.restore(content, content["config"], torch.device("cpu")).scaler is enabled


def test_float16_path_with_a_live_scaler():
    state = toy_state(d_steps=2, g_steps=2)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=True)
    twin = toy_state(d_steps=2, g_steps=2)
    images = torch.randint(256, (32, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for s in (state, twin):
        torch.manual_seed(1)
        gan.train_step(s, gan.batches(images, torch.arange(32) % 3, s.config, torch.device("cpu")))
    for p, q in zip(state.G.parameters(), twin.G.parameters()):  # scaled gradients, unscaled steps
        assert torch.allclose(p, q, rtol=0, atol=1e-5)


def test_checkpoint_is_written_before_the_picture(folder, tmp_path, monkeypatch):
    def broken(G):
        raise OSError("disk full")

    monkeypatch.setattr(gan, "sample_grid", broken)
    assert (
        gan.main(["train", "--data", str(folder), *TOY_FLAGS, "--steps", "2", "--runs", str(tmp_path), "--name", "x"])
        == 2
    )
    assert gan.read_checkpoint(tmp_path / "x" / "checkpoint.pt")["step"] == 2


def test_failed_save_keeps_the_last_checkpoint(run, monkeypatch):
    before = (run / "checkpoint.pt").read_bytes()
    content = gan.read_checkpoint(run / "checkpoint.pt")
    state = gan.restore(content, content["config"], torch.device("cpu"))

    def full(fd):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        gan.save_checkpoint(run / "checkpoint.pt", state)
    assert (run / "checkpoint.pt").read_bytes() == before
    (run / "checkpoint.unfinished").unlink()


def test_tensorboard_gets_scalars_and_pictures(folder, tmp_path, monkeypatch):
    calls = []

    class Writer:
        def __init__(self, run):
            self.run = run

        def __getattr__(self, name):
            return lambda *args: calls.append((name, args[0] if args else None))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", type("Module", (), {"SummaryWriter": Writer}))
    gan.train(gan.Config(**TOY, data=str(folder), steps=1, runs=str(tmp_path), tensorboard=True))
    assert {("add_scalar", "loss_D"), ("add_scalar", "loss_G"), ("add_image", "samples")} <= set(calls)


def test_images_stay_off_a_device_that_is_too_small(monkeypatch):
    images = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * images.numel(), 10**9))
    assert gan.place(images, torch.device("cuda")) is images


@pytest.mark.parametrize("loss", list(gan.LOSSES))
def test_every_loss_trains_both_networks(loss):
    state = toy_state(loss=loss, label_smoothing=0.1 if loss in gan.SMOOTHABLE else 0, g_steps=2, d_steps=2)
    before = {name: [p.clone() for p in getattr(state, name).parameters()] for name in ("G", "D", "G_ema")}
    data = gan.batches(
        torch.randint(256, (16, 3, 16, 16), dtype=torch.uint8), torch.arange(16) % 3, state.config, torch.device("cpu")
    )
    assert torch.isfinite(gan.train_step(state, data)).all() and state.step == 1
    for name, old in before.items():
        assert any(not torch.equal(p, q) for p, q in zip(getattr(state, name).parameters(), old)), name


def test_bf16_on_cpu_stays_near_float32():
    images = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    stats = []
    for amp in ("off", "bf16"):
        state = toy_state(amp=amp)
        stats.append(gan.train_step(state, gan.batches(images, torch.arange(8) % 3, state.config, torch.device("cpu"))))
        with gan.autocast(state):
            h = state.D.conv(torch.zeros(1, 3, 16, 16))
            assert h.dtype == (torch.bfloat16 if amp == "bf16" else torch.float32)
            assert state.D(torch.zeros(1, 3, 16, 16), torch.tensor([0])).dtype == torch.float32
    assert torch.isfinite(stats[1]).all() and (stats[0] - stats[1])[:2].abs().max() < 0.05


def test_non_finite_losses_stop_the_run(folder, tmp_path, capsys):
    toy = dict(TOY, data=str(folder), runs=str(tmp_path), log_every=1)
    run = gan.train(gan.Config(**toy, steps=2, name="good"))
    content = gan.read_checkpoint(run / "checkpoint.pt")
    content["D"]["linear.bias"] += float("nan")
    content["config"] = vars(content["config"])
    torch.save(content, run / "checkpoint.pt")
    before = (run / "checkpoint.pt").read_bytes()
    capsys.readouterr()
    err = fails(capsys, "train", "--resume", run, "--steps", "9")
    assert "not finite at step 3" in err and "--lr-D" in err
    assert (run / "checkpoint.pt").read_bytes() == before


def test_training_learns_the_classes(tmp_path):
    """After 150 steps on the synthetic flowers, samples lie in the class they were asked for, by nearest class mean.

    Chance is 1 in 17, and an untrained generator stays near it whatever its colours; the margin asked for is fourfold.
    """
    config = gan.Config(loss="hinge", cond=True, size=16, width=16, steps=150, batch=32, lr_G=1e-3, lr_D=1e-3, augment="none",
                        device="cpu", runs=str(tmp_path))  # fmt: skip
    images, labels, _ = gan.load_images("synthetic", 16, 3)
    features = F.avg_pool2d(images.float() / 255, 4).flatten(1)  # [1360,48]
    means = torch.stack([features[labels == c].mean(0) for c in range(17)])

    def score(G):
        samples = F.avg_pool2d(gan.generate(G, 340, classes=range(17)).float() / 255, 4).flatten(1)
        right = torch.cdist(samples, means).argmin(1) == torch.arange(17).repeat(20)
        return right.float().mean().item(), metrics.frechet_distance(features, samples)

    start, start_distance = score(
        gan.new_state(gan.resolve(config), [str(c) for c in range(17)], torch.device("cpu")).G_ema
    )
    end, end_distance = score(gan.load_generator(gan.train(config))[0])
    print(f"accuracy {start:.3f} -> {end:.3f}, distance {start_distance:.3f} -> {end_distance:.3f}")
    assert start < 0.12 and end > 0.48
    assert end_distance < start_distance / 4


def losses_of(run):
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return torch.tensor([[row["loss_D"], row["loss_G"]] for row in rows])


# Adam's first steps have the size of the learning rate whatever the gradient is, so where a gradient is zero but for
# rounding, two float32 runs part: within a few steps at the usual rates, and not within 20 at these.
SLOW = ["--lr-G", "1e-6", "--lr-D", "4e-6", "--log-every", "1"]


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_compiled_training_is_eager_training(tmp_path, capsys):
    for name, flags in (("eager", []), ("compiled", ["--compile"])):
        flags = [*TOY_FLAGS, *SLOW, "--steps", "5", "--runs", str(tmp_path), "--name", name, *flags]
        assert gan.main(["train", *flags]) == 0
    assert "does not work" not in capsys.readouterr().out
    assert (losses_of(tmp_path / "eager") - losses_of(tmp_path / "compiled")).abs().max() < 1e-4


@pytest.mark.parametrize("at_once", [True, False])
def test_compile_says_why_it_goes_on_without(at_once, tmp_path, capsys, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("no compiler here\nand more")

    def broken_later(self, **options):
        self.forward = broken

    flags = [*TOY_FLAGS, *SLOW, "--steps", "2", "--runs", str(tmp_path)]
    assert gan.main(["train", *flags, "--name", "eager"]) == 0
    monkeypatch.setattr(torch.nn.Module, "compile", broken if at_once else broken_later)
    assert gan.main(["train", *flags, "--name", "compiled", "--compile"]) == 0
    assert "going on without: RuntimeError: no compiler here\n" in capsys.readouterr().out
    assert torch.equal(losses_of(tmp_path / "eager"), losses_of(tmp_path / "compiled"))


def test_bench_counts_the_products_and_adds_up():
    config = gan.Config(**TOY, cond=True, augment="none", steps=77)
    result = gan.bench(config, seconds=1)
    # Widths 4, 8, 8 at 16, 8, 4 pixels: multiply-adds of each convolution and matrix product for one image.
    box = lambda channels, pixels: 4 * channels * pixels  # noqa: E731, 2 x 2 pixels, each channel by itself
    D_first = 3 * 4 * 9 * 16**2
    D_rest = 4 * 8 * 9 * 16**2 + 8 * 8 * 9 * 8**2 + 4 * 8 * 8**2  # a block: two convolutions and the skip
    D_rest += 8 * 8 * 9 * 8**2 + 8 * 8 * 9 * 4**2
    D_boxes = box(8, 17**2) + box(8, 9**2)
    G_linear = 16 * (8 * 4 * 4 + 2 * (8 + 8 + 8 + 4))  # the first layer and the gains and biases of four norms
    G_rest = (
        8 * 8 * 9 * 4**2 + 8 * 8 * 9 * 8**2 + 8 * 4 * 9 * 8**2 + 4 * 4 * 9 * 16**2 + 8 * 4 * 8**2 + 4 * 3 * 9 * 16**2
    )
    G_boxes = box(8, 16**2 // 4) + box(4, 16**2)
    D_last = 8
    # Forward, gradient of the weights, gradient of the input: all three, but for fixed weights and inputs.
    D_step = 2 * (2 * D_first + 3 * (D_rest + D_last) + 2 * D_boxes)
    G_step = 3 * (G_linear + G_rest) + 2 * G_boxes + 2 * (D_first + D_rest + D_last + D_boxes)
    assert abs(result["flop_per_step"] / (2 * 8 * (D_step + G_step)) - 1) < 0.02
    assert result["steps"] == 77 and abs(result["run_s"] - 77 * result["step_s"]) < 1e-9
    assert abs(result["images_per_s"] * result["step_s"] - 8) < 1e-9
    assert abs(result["flop_per_s"] * result["step_s"] / result["flop_per_step"] - 1) < 1e-9
    assert 0.5 < sum(result["parts_s"].values()) / result["step_s"] < 2
    assert result["matmul_flop_per_s"] > 1e9 and result["peak_bytes"] > 50 * 2**20


def torchrun(*argv, cwd=None):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ["--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={port}"]
    argv = [sys.executable, "-m", "torch.distributed.run", *where, *map(str, argv)]
    return subprocess.run(argv, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_two_processes_train_as_one(tmp_path, folder):
    flags = [*TOY_FLAGS, *SLOW, "--data", folder, "--cond", "--steps", "20", "--runs", tmp_path]
    assert gan.main(["train", *map(str, flags), "--name", "one"]) == 0
    done = torchrun(HERE / "gan.py", "train", *flags, "--name", "two")
    assert done.returncode == 0, done.stderr
    one, two = losses_of(tmp_path / "one"), losses_of(tmp_path / "two")
    assert len(one) == len(two) == 20 and (one - two).abs().max() < 1e-4
    assert {p.name for p in (tmp_path / "two").iterdir()} == {"config.json", "checkpoint.pt", "log.jsonl", "samples"}
    assert done.stdout.count("steps done") == 1  # one of them speaks

    # At the usual rates, in float64: the networks' weights and statistics too.
    script = tmp_path / "ranks.py"
    script.write_text(
        "import os, sys, torch\n"
        f"sys.path.insert(0, {str(HERE)!r})\n"
        "import gan\n"
        "gan.join('cpu')\n"
        "torch.manual_seed(0)\n"
        "h = (torch.randn(8, 5, 4, 4) + 30).to(torch.bfloat16).float()\n"
        "norm, whole = gan.SyncedBatchNorm(5), torch.nn.BatchNorm2d(5)\n"
        "if gan.n_ranks() > 1:\n"
        "    for dtype, error in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):\n"
        "        ours, theirs = norm(h.to(dtype).chunk(2)[gan.rank()]), whole(h).chunk(2)[gan.rank()]\n"
        "        assert ours.dtype == dtype and (ours - theirs).abs().max() < error\n"
        "    assert (norm.running_mean - whole.running_mean).abs().max() < 1e-3\n"
        "    assert (norm.running_var - whole.running_var).abs().max() < 1e-3\n"
        "torch.set_default_dtype(torch.float64)\n"
        "torch.Tensor.float = torch.Tensor.double\n"
        "config = gan.resolve(gan.Config(loss='hinge', cond=True, size=16, width=4, max_width=8, z_dim=8, batch=8))\n"
        "config = gan.replace(config, augment='color,translation,cutout')\n"
        "device = gan.pick_rank_device(config)\n"
        "images, labels, classes = gan.load_images('synthetic', 16, 3)\n"
        "state = gan.new_state(config, classes, device)\n"
        "data = gan.batches(images, labels, config, device)\n"
        "for _ in range(20):\n"
        "    gan.train_step(state, data)\n"
        "z = gan.part(lambda n: gan.sample_z(n, 8), 4)\n"
        "torch.save([state.G.state_dict(), state.D.state_dict(), z], f'{sys.argv[1]}-{gan.rank()}')\n"
        "os._exit(0)\n"  # see the end of gan.py
    )
    subprocess.run([sys.executable, script, tmp_path / "one"], check=True, timeout=120)
    done = torchrun(script, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    one, first, second = (torch.load(tmp_path / name) for name in ("one-0", "two-0", "two-1"))
    for a, b, c in zip(one[:2], first[:2], second[:2]):
        for name in a:
            assert (a[name] - b[name]).abs().max() < 1e-9 and (a[name] - c[name]).abs().max() < 1e-9, name
    assert (first[2] - second[2]).abs().min() > 1e-6  # each has noise of its own


def test_a_lost_process_ends_the_job_with_a_checkpoint(tmp_path, folder):
    # The second process kills itself in its tenth step.
    (tmp_path / "killed.py").write_text(
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(HERE)!r})\n"
        "import gan\n"
        "train_step = gan.train_step\n"
        "def killed(state, data):\n"
        "    if state.step == 9 and gan.rank() == 1:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return train_step(state, data)\n"
        "gan.train_step = killed\n"
        "os._exit(gan.main(sys.argv[1:]))\n"
    )
    flags = ["train", *TOY_FLAGS, "--data", folder, "--runs", tmp_path, "--name", "lost"]
    done = torchrun(tmp_path / "killed.py", *flags, "--steps", 1000)
    errors = [line for line in done.stderr.splitlines() if line.startswith("gan.py")]
    assert done.returncode != 0 and len(errors) == 1 and "after step 9, another process" in errors[0]
    assert gan.read_checkpoint(tmp_path / "lost" / "checkpoint.pt")["step"] == 9
    done = torchrun(HERE / "gan.py", "train", "--resume", tmp_path / "lost", "--steps", 12)
    assert done.returncode == 0 and "12 steps done" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "argv, hint",
    [
        (["train", "--batch", "7"], "same number"),
        (["train", "--data", "nowhere"], "no folder"),
        (["train", "--compile"], "single process"),
        (["train", "--resume", "nowhere"], "no run nowhere"),
        (["train", "--device", "cuda:1"], "a device of its own"),
        (["train", "--lossy"], "--lossy"),
        (["sample"], "torchrun is for train"),
    ],
)
def test_errors_under_torchrun_are_told_once(argv, hint, tmp_path):
    on_cpu = [] if argv == ["sample"] or "--device" in argv else ["--device", "cpu"]
    check_error(torchrun(HERE / "gan.py", *argv, *on_cpu, cwd=tmp_path), hint, tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_torchrun_without_a_gpu_cannot_use_one(tmp_path):
    check_error(torchrun(HERE / "gan.py", "train", "--device", "cuda", cwd=tmp_path), "no device", tmp_path)


def test_processes_with_different_flags_are_refused(tmp_path):
    code = f"import os, sys\nsys.path.insert(0, {str(HERE)!r})\nimport gan\n"
    code += "os._exit(gan.main(['train', '--device', 'cpu', '--seed', os.environ['RANK']]))\n"
    (tmp_path / "differ.py").write_text(code)
    check_error(torchrun(tmp_path / "differ.py", cwd=tmp_path), "need the same flags", tmp_path)


def check_error(done, hint, tmp_path):
    errors = [line for line in done.stderr.splitlines() if line.startswith("gan.py")]
    assert done.returncode != 0 and len(errors) == 1 and hint in errors[0], done.stderr
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Commands, as a user gives them


def command(*argv, cwd):
    return subprocess.run([sys.executable, *map(str, argv)], cwd=cwd, capture_output=True, text=True, timeout=120)


TOY_FLAGS = "--size 16 --width 4 --max-width 8 --z-dim 8 --batch 8 --device cpu".split()


def test_each_file_works_alone(tmp_path, folder, extractor_file):
    shutil.copy(HERE / "gan.py", tmp_path)
    assert command("-c", "import gan", cwd=tmp_path).stdout == ""
    done = command("gan.py", "train", "--loss", "ns", *TOY_FLAGS, "--steps", 3, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "step 3/3" in done.stdout and (tmp_path / "runs/0000-ns-synthetic-16/checkpoint.pt").exists()
    done = command("gan.py", "train", "--cond", "--data", folder, *TOY_FLAGS, "--epochs", 1, cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / f"runs/0001-ns-cond-{folder.name}-16").is_dir(), done.stderr
    done = command("gan.py", "sample", "--trunc", 0.7, "--classes", "2,0", "--out", "grid.png", cwd=tmp_path)
    assert done.returncode == 0 and Image.open(tmp_path / "grid.png").size == (10 * 18 + 2, 2 * 18 + 2), done.stderr
    done = command("gan.py", "sample", "--run", "0000", "--n", 3, "--out", "many", cwd=tmp_path)
    assert done.returncode == 0 and len(list((tmp_path / "many").glob("0000?.png"))) == 3, done.stderr

    (tmp_path / "elsewhere").mkdir()
    shutil.copy(HERE / "metrics.py", tmp_path / "elsewhere")
    done = command("metrics.py", folder, tmp_path / "many", "--extractor", extractor_file, cwd=tmp_path / "elsewhere")
    assert done.returncode == 0 and "FD(tiny)" in done.stdout and "FID" not in done.stdout, done.stderr

    shutil.copy(HERE / "metrics.py", tmp_path)
    done = command("gan.py", "eval", "--trunc", 0.7, 1.5, "--extractor", extractor_file, cwd=tmp_path)
    assert done.returncode == 0 and "FD(tiny)" in done.stdout, done.stderr
    assert (tmp_path / f"runs/0001-ns-cond-{folder.name}-16/eval-trunc-0.7.png").exists()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="for GNU's C library alone")
def test_held_memory_is_not_handed_back():
    code = (
        "import resource, gan, torch\n"
        "gan.hold_memory()\n"
        "for _ in range(10): torch.ones(2**24)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(10): torch.ones(2**24)\n"  # 64 MB each: 16,384 pages
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    assert int(command("-c", code, cwd=HERE).stdout) < 16384  # a block at most; handed back, all ten would count


def test_errors_have_no_traceback_and_status_2(tmp_path):
    for argv in (["train", "--data", "nowhere"], ["eval"], ["train", "--loss", "mse"], []):
        done = command(HERE / "gan.py", *argv, cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("gan.py: error: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "flags, hint",
    [
        ("--data {tmp}/nowhere", "nowhere"),
        ("--data {tmp}/empty", "no usable image"),
        ("--data {tmp}/junk", "no usable image"),
        ("--data mnist --data-dir {tmp}/file", "mnist"),
        ("--loss mse", "hinge"),
        ("--size 48", "16, 32, 64, 128 or 256"),
        ("--size 8", "16, 32, 64, 128 or 256"),
        ("--size big", "size"),
        ("--channels 2", "1 or 3"),
        ("--batch 25", "24 images"),
        ("--batch 1", "batch"),
        ("--cond --data {folder}/rose-1", "sub-folder"),
        ("--augment color,blur", "blur"),
        ("--epochs 0", "epochs"),
        ("--steps -1", "steps"),
        ("--lr-G 0", "lr-G"),
        ("--beta1 1", "beta1"),
        ("--label-smoothing 1", "label-smoothing"),
        ("--loss hinge --label-smoothing 0.1", "ns, minimax"),
        ("--device tpu", "tpu"),
        ("--amp fp16", "CUDA"),
        ("--name taken", "taken"),
        ("--name ../taken", "plain"),
        ("--data=", "empty"),
        ("--runs {tmp}/file", "file"),
        ("--runs {tmp}/file/below", "file"),
        ("--resume {tmp}/nowhere", "nowhere"),
        ("--resume {run}", "--steps"),
        ("--resume {run} --steps 9 --loss hinge", "loss"),
        ("--resume {run}/checkpoint.pt --steps 9", "folder"),
        ("--z-dimension 3", "--z-dimension"),
        ("--epochs 1e308", "epochs"),
        ("--seed 99999999999", "seed"),
        ("--device meta", "meta"),
        ("--tensorboard", "pip install tensorboard"),
        ("--data flowers102 --data-dir {tmp}/file", "flowers102"),
    ],
)
def test_user_errors_of_train(flags, hint, run, folder, tmp_path, capsys, monkeypatch):
    for name in ("empty", "junk", "runs", "runs/taken"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").write_text("kept")
    (tmp_path / "junk" / "a.png").write_text("no picture")
    (tmp_path / "rose-1").symlink_to(folder / "rose 1")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setattr(
        "urllib.request.urlopen", lambda *a, **k: (_ for _ in ()).throw(urllib.error.URLError("offline"))
    )
    checkpoint = (run / "checkpoint.pt").read_bytes()
    words = [w.format(tmp=tmp_path, run=run, folder=tmp_path) for w in flags.split()]
    resuming = "--resume" in words
    defaults = [] if resuming else ["--steps", "2", "--runs", str(tmp_path / "runs"), *TOY_FLAGS]
    data = [] if resuming or "--data" in flags else ["--data", str(folder)]
    assert hint in fails(capsys, "train", *defaults, *data, *words)
    assert (tmp_path / "file").read_text() == "kept" and (run / "checkpoint.pt").read_bytes() == checkpoint
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["taken"]  # no run was begun


@pytest.mark.parametrize(
    "argv, hint",
    [
        ("eval --runs {tmp}", "no run in"),
        ("eval --run nowhere", "nowhere"),
        ("eval --run {run} --trunc -1", "positive"),
        ("eval --run {run} --trunc much", "trunc"),
        ("eval --run {run} --n 1", "from 2"),
        ("eval --run {run} --extractor {tmp}/nowhere.pt2", "nowhere.pt2"),
        ("eval --run {run} --extractor {tmp}/text.pt2", "text.pt2"),
        ("eval --run {run} --extractor {tmp}/text.pt", "text.pt"),
        ("sample --run {tmp}/text.pt", "damaged"),
        ("sample --run {tmp}/half.pt", "damaged"),
        ("sample --run {tmp}/other.pt", "damaged"),
        ("sample --run {tmp}/misfit.pt", "does not fit"),
        ("sample --run {tmp}/lacking.pt", "G_ema"),
        ("sample --run {run} --seed 99999999999999999999999", "seed"),
        ("eval --run {run} --extractor {tmp}/fixed.pt2", "makes no features"),
        ("sample --run {run} --classes 3", "0 to 2"),
        ("sample --run {run} --classes -1", "0 to 2"),
        ("sample --run {run} --classes a", "classes"),
        ("sample --run {run} --trunc 0", "positive"),
        ("sample --run {run} --out {tmp}/grid.gif", ".png"),
        ("sample --run {run} --out {tmp}/text.pt/grid.png", "text.pt"),
        ("sample --run {run} --out {tmp}", "not empty"),
        ("sample --run {run} --interpolate --out {tmp}/walk", ".png"),
    ],
)
def test_user_errors_of_eval_and_sample(argv, hint, run, tmp_path, capsys):
    if "fixed" in argv:  # a program for one size and one batch, with one output
        torch.export.save(torch.export.export(torch.nn.Flatten(), (torch.rand(3, 3, 4, 4),)), tmp_path / "fixed.pt2")
    for name in ("text.pt", "text.pt2"):
        (tmp_path / name).write_text("text")
    whole = (run / "checkpoint.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pt")
    content = torch.load(run / "checkpoint.pt", weights_only=True)
    torch.save({**content, "config": {**content["config"], "width": 8}}, tmp_path / "misfit.pt")
    del content["G_ema"]
    torch.save(content, tmp_path / "lacking.pt")
    before = sorted(run.rglob("*")), sorted(tmp_path.rglob("*"))
    assert hint in fails(capsys, *(word.format(run=run, tmp=tmp_path) for word in argv.split()))
    assert (sorted(run.rglob("*")), sorted(tmp_path.rglob("*"))) == before


def test_classes_of_an_unconditional_run(folder, tmp_path, capsys):
    run = gan.train(gan.Config(**TOY, data=str(folder), steps=1, runs=str(tmp_path)))
    capsys.readouterr()
    assert "unconditional" in fails(capsys, "sample", "--run", run, "--classes", "1")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_finish_the_step_and_save(number, tmp_path, folder):
    argv = [
        sys.executable,
        HERE / "gan.py",
        "train",
        "--data",
        folder,
        *TOY_FLAGS,
        "--steps",
        "100000",
        "--log-every",
        "1",
    ]
    with subprocess.Popen(argv, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        lines = []
        while not (lines and lines[-1].startswith("step 3/")):
            lines.append(process.stdout.readline())
            assert lines[-1], process.stderr.read()
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and err == "", err
    run = next((tmp_path / "runs").iterdir())
    content = gan.read_checkpoint(run / "checkpoint.pt")
    assert content["step"] >= 3 and f"stopped and saved at step {content['step']}" in out
    assert f"python gan.py train --resume {run.relative_to(tmp_path)}" in out


def test_sample_outputs(run, tmp_path):
    assert gan.main(["sample", "--run", str(run), "--n", "7", "--out", str(tmp_path / "deep" / "s.npz")]) == 0
    with np.load(tmp_path / "deep" / "s.npz") as file:
        assert file["images"].shape == (7, 16, 16, 3) and file["images"].dtype == np.uint8
        assert file["labels"].tolist() == [0, 0, 0, 1, 1, 1, 2]
        G, _ = gan.load_generator(run)
        expected = gan.generate(G, 7, classes=file["labels"])
        assert np.array_equal(file["images"], expected.permute(0, 2, 3, 1).numpy())
    assert gan.main(["sample", "--run", str(run), "--n", "7", "--out", str(tmp_path / "folder")]) == 0
    for i, image in enumerate(expected):
        assert torch.equal(pil_to_tensor(Image.open(tmp_path / "folder" / f"{i:05d}.png")), image)
    assert (
        gan.main(["sample", "--run", str(run), "--interpolate", "--classes", "1", "--out", str(tmp_path / "w.png")])
        == 0
    )
    assert Image.open(tmp_path / "w.png").size == (10 * 18 + 2, 8 * 18 + 2)


@pytest.mark.parametrize("out", ["many.npz", "many"])
def test_samples_go_to_disk_as_they_come(out, tmp_path):
    alive = set()

    def batches():
        for i in range(5):
            images = torch.full((2, 3, 16, 16), i, dtype=torch.uint8)
            alive.add(i)
            weakref.finalize(images, alive.discard, i)
            yield images
            del images
            assert len(alive) <= 1

    y = torch.arange(10)
    gan.write_samples(tmp_path / out, batches(), (10, 16, 16, 3), y)
    if out == "many.npz":
        content = np.load(tmp_path / out)
        assert content["images"].shape == (10, 16, 16, 3) and content["images"].dtype == np.uint8
        assert (content["images"][:, 0, 0, 0] == np.arange(10) // 2).all() and (content["labels"] == y.numpy()).all()
    else:
        assert len(list((tmp_path / out).iterdir())) == 10


class Recorder(gan.Generator):
    """A generator that keeps what it was called with; with_standing_statistics copies it, so the class holds the list."""

    calls = []

    def forward(self, z, y=None):
        self.calls.append((z, y))
        return super().forward(z, y)


def rendered():
    """All z and y that a Recorder was called with behind the 20 batches of statistics; the list is empty then."""
    z, y = (torch.cat(parts) for parts in zip(*Recorder.calls[20:]))
    Recorder.calls.clear()
    return z, y


def test_interpolation_ends_at_its_noise_and_keeps_its_length():
    G = Recorder(16, 3, 4, 8, 8, 3)
    gan.interpolate(G, classes=[2, 0], rows=3, columns=5, seed=4)
    z, y = rendered()
    ends = gan.sample_z(6, 8, generator=torch.Generator().manual_seed(4))
    assert y.tolist() == [2] * 5 + [0] * 5 + [2] * 5
    assert torch.allclose(z[0::5], ends[:3], atol=1e-5) and torch.allclose(z[4::5], ends[3:], atol=1e-5)
    a, b = ends[0].norm().item(), ends[3].norm().item()
    assert all(min(a, b) * 0.95 < n < max(a, b) * 1.25 for n in z[:5].norm(dim=1).tolist())


def test_grid_has_a_class_a_row_and_a_z_a_column():
    gan.sample_grid(Recorder(16, 3, 4, 8, 8, 3), columns=4)
    z, y = rendered()
    assert y.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert torch.equal(z[:4], z[4:8]) and torch.equal(z[:4], z[8:]) and len(z[:4].unique(dim=0)) == 4
    gan.sample_grid(Recorder(16, 3, 4, 8, 8), columns=4)
    assert len(rendered()[0].unique(dim=0)) == 32


def test_newest_run_and_names(tmp_path):
    for i, name in enumerate(("0000-b", "0001-a", "0002-c")):
        (tmp_path / name).mkdir()
        if i < 2:
            (tmp_path / name / "checkpoint.pt").write_text("")
            os.utime(tmp_path / name / "checkpoint.pt", (100 - i, 100 - i))
    assert gan.find_run(None, tmp_path).name == "0000-b"  # the newest checkpoint, not the highest number
    assert gan.find_run("0001", tmp_path).name == "0001-a"
    (tmp_path / "0001").mkdir()
    assert gan.find_run("0001", tmp_path).name == "0001"  # a full name goes before a start
    with pytest.raises(gan.UserError, match="more than one"):
        gan.find_run("000", tmp_path)
    assert gan.create_run(gan.Config(runs=str(tmp_path), size=32)).name == "0003-ns-synthetic-32"


# ---------------------------------------------------------------------------------------------------------------------
# eval


def test_eval_writes_scores_and_grids(run, extractor_file, capsys, monkeypatch):
    argv = ["eval", "--run", str(run), "--trunc", "0.5", "none", "--extractor", str(extractor_file), "--n", "30"]
    assert gan.main(argv) == 0
    out = capsys.readouterr().out
    result = json.loads((run / "eval.json").read_text())
    assert result["network"] == "tiny" and result["n_real"] == 24
    assert result["resize"] == "native" and result["precision"] == "float32" and len(result["weights"]) == 16
    assert [(row["trunc"], row["n"]) for row in result["scores"]] == [(0.5, 30), (None, 30)]
    assert "FD(tiny)" in out and "FID" not in out and "0.5" in out and "30" in out
    assert Image.open(run / "eval-trunc-0.5.png").size == Image.open(run / "eval-trunc-none.png").size

    # The same by hand.
    network = metrics.load_extractor(extractor_file)
    G, _ = gan.load_generator(run)
    images, labels, _ = gan.load_images(json.loads((run / "config.json").read_text())["data"], 16, 3)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    samples = gan.generate(G, 30, 0.5, labels[order])
    real, fake = metrics.extract(network, images)[0], metrics.extract(network, samples)[0]
    assert abs(result["scores"][0]["FD(tiny)"] - metrics.frechet_distance(real, fake)) < 1e-6

    # The real images' features come from the cache.
    sizes, measure = [], metrics.measure
    monkeypatch.setattr(metrics, "measure", lambda e, x, **how: sizes.append(len(x)) or measure(e, x, **how))
    assert gan.main(argv) == 0 and sizes == [30, 30]
    assert json.loads((run / "eval.json").read_text()) == result


@pytest.mark.parametrize("failure", [urllib.error.URLError("offline"), EOFError(), RuntimeError("invalid hash")])
def test_eval_without_inception_weights(failure, run, capsys, monkeypatch):
    def offline(*args, **kwargs):
        raise failure

    monkeypatch.setattr(metrics.Inception_V3_Weights, "get_state_dict", offline)
    (run / "eval-trunc-0.7.png").unlink(missing_ok=True)
    assert gan.main(["eval", "--run", str(run), "--trunc", "0.7"]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "checkpoints" in captured.err and "--extractor" in captured.err
    row = json.loads((run / "eval.json").read_text())["scores"][0]
    assert row["FID"] is None and row["IS"] is None and row["trunc"] == 0.7
    assert (run / "eval-trunc-0.7.png").exists()


# ---------------------------------------------------------------------------------------------------------------------
# metrics: statistics and the Frechet distance


def normal(n, d, seed):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthonormal(n, d, seed):
    return torch.linalg.qr(normal(n, d, seed)).Q


def features_of(n, mean, values, basis, seed):
    """Features [n,d] whose mean is mean [d] and whose covariance is basis^T diag(values) basis, up to rounding."""
    x = normal(n, len(values), seed)
    scores = torch.linalg.qr(x - x.mean(0)).Q  # centred, uncorrelated
    return mean + scores * (values * (n - 1)).sqrt() @ basis


def test_stats_equal_numpy_in_any_parts(tmp_path):
    x = normal(3000, 7, 0) @ normal(7, 7, 1) + 1000  # far from zero: sums of squares would lose digits
    stats = metrics.FeatureStats(7)
    for part in x.split([1, 99, 0, 400, 2500]):
        stats.update(part)
    one, other = metrics.FeatureStats(7).update(x[:1]), metrics.FeatureStats(7).update(x[1:])
    merged = metrics.FeatureStats(7).merge(one).merge(other.merge(metrics.FeatureStats(7)))
    stats.save(tmp_path / "stats.npz")
    for s in (stats, merged, metrics.FeatureStats.load(tmp_path / "stats.npz")):
        assert s.n == 3000
        assert np.abs(s.mean.numpy() - x.numpy().mean(0)).max() < 1e-9
        assert np.abs(s.cov.numpy() - np.cov(x.numpy(), rowvar=False)).max() < 1e-9
    assert sum(map(len, stats._pending)) + len(stats.factor) <= 1024 + 7  # nothing that grows with n


def test_stats_keep_what_they_were_given():
    x = normal(20, 3, 0)
    copy = x.clone()
    stats = metrics.FeatureStats(3).update(x)
    x += 1
    assert torch.allclose(stats.mean, copy.mean(0)) and torch.equal(x, copy + 1)


def test_stats_files_are_those_of_pytorch_fid(tmp_path):
    x = normal(30, 4, 0)
    mu, sigma = x.numpy().mean(0), np.cov(x.numpy(), rowvar=False)
    np.savez(tmp_path / "theirs.npz", mu=mu, sigma=sigma)
    theirs = metrics.FeatureStats.load(tmp_path / "theirs.npz")
    y = normal(9, 4, 1)
    assert abs(metrics.frechet_distance(theirs, y) - metrics.frechet_distance(x, y)) < 1e-9
    assert theirs.n is None and theirs.made_by == {}
    for add in (lambda: metrics.FeatureStats(4).update(y).merge(theirs), lambda: theirs.update(y).mean):
        with pytest.raises(metrics.UserError, match="number of samples"):
            add()
    np.savez(tmp_path / "part.npz", mu=mu, sigma=sigma, weights="w")  # what does not tell all tells nothing
    assert metrics.FeatureStats.load(tmp_path / "part.npz").made_by == {}
    metrics.FeatureStats(4, {"network": "n", "weights": "w", "resize": "r", "precision": "p"}).update(x).save(
        tmp_path / "ours.npz"
    )
    with np.load(tmp_path / "ours.npz") as ours:  # allow_pickle=False, as pytorch-fid reads it
        assert np.abs(ours["mu"] - mu).max() < 1e-12 and np.abs(ours["sigma"] - sigma).max() < 1e-12
    ours = metrics.FeatureStats.load(tmp_path / "ours.npz")
    assert ours.n == 30 and ours.made_by == {"network": "n", "weights": "w", "resize": "r", "precision": "p"}


@pytest.mark.parametrize(
    "content",
    [
        "no",
        {},
        {"mu": np.zeros(3)},
        {"mu": np.zeros(3), "sigma": np.eye(2)},
        {"mu": np.zeros(2), "sigma": -np.eye(2)},
        {"mu": np.zeros(2), "sigma": np.eye(2) * np.nan},
    ],
)
def test_stats_refuse_other_files(content, tmp_path):
    file = tmp_path / "no.npz"
    file.write_text(content) if isinstance(content, str) else np.savez(file, **content)
    with pytest.raises(metrics.UserError):
        metrics.FeatureStats.load(file)


# (kept by both, by the first alone, by the second alone) of 24 directions
RANKS = {"full": (24, 0, 0), "overlapping": (6, 5, 9), "disjoint": (0, 7, 8), "nested": (3, 0, 12), "one": (1, 0, 0)}


@pytest.mark.parametrize("far", [0, 1000])
@pytest.mark.parametrize("n", [(25, 25), (26, 4000), (300, 500)])
@pytest.mark.parametrize("ranks", RANKS)
def test_frechet_distance_of_commuting_covariances(ranks, n, far, tmp_path):
    both, first, second = RANKS[ranks]
    basis = orthonormal(24, 24, 0)
    a, b = (torch.logspace(0, -2, 24, dtype=torch.float64) ** power for power in (1, 0.5))
    a[both + first :], b[:both], b[both : both + first] = 0, b[:both], 0
    b[both + first + second :] = 0
    mean = normal(2, 24, 1) * 0.1 + far
    expected = ((mean[0] - mean[1]) ** 2).sum() + ((a.sqrt() - b.sqrt()) ** 2).sum()
    x, y = features_of(n[0], mean[0], a, basis, 2), features_of(n[1], mean[1], b, basis, 3)
    assert abs(metrics.frechet_distance(x, y) - expected) < 1e-9
    # The order of samples, a rotation, parts and files change nothing.
    turn, order = orthonormal(24, 24, 4), torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    assert abs(metrics.frechet_distance(x[order] @ turn, y @ turn) - expected) < 1e-9
    stats, rest = metrics.FeatureStats(24).update(x[:3]), metrics.FeatureStats(24)
    for part in x[3:].split(7):
        rest.update(part)
    stats.merge(rest).save(tmp_path / "x.npz")
    assert abs(metrics.frechet_distance(stats, y) - expected) < 1e-9
    if not far:  # sigma alone has lost the digits that the mean's size takes
        assert abs(metrics.frechet_distance(metrics.FeatureStats.load(tmp_path / "x.npz"), y) - expected) < 1e-9
    # From moments, as close as sigma's own rounding allows.
    moments = (metrics.FeatureStats.from_moments(m, basis.T @ torch.diag(v) @ basis) for m, v in zip(mean, (a, b)))
    assert abs(metrics.frechet_distance(*moments) - expected) < 1e-9


@pytest.mark.parametrize("n", [(2, 2), (2, 50), (12, 11), (40, 8), (60, 70)])
def test_frechet_distance_against_high_precision(n):
    """Covariances that do not commute, regular and singular, in 60 digits by the eigenvalues of their product."""
    mp = mpmath.mp.clone()
    mp.dps = 60
    x, y = (
        normal(n[0], 10, 0) * torch.logspace(0, -3, 10, dtype=torch.float64) + 3,
        normal(n[1], 10, 1) @ normal(10, 10, 2),
    )

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


def test_frechet_distance_in_one_dimension():
    x, y = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [4.0], [8.0]])
    assert abs(metrics.frechet_distance(x, y) - ((2 - 4) ** 2 + (2**0.5 - 4) ** 2)) < 1e-12


def test_frechet_infinity_and_interval():
    """Against what a normal generator's distances are, for infinitely many samples and over many samples."""
    d, n = 8, 400
    real = metrics.FeatureStats.from_moments(torch.zeros(d), torch.eye(d))
    draw = lambda seed: 1.2 * normal(n, d, seed) + 0.05  # noqa: E731
    true = 0.05**2 * d + 0.2**2 * d
    many = [metrics.frechet_distance(real, draw(seed)) for seed in range(200)]
    extrapolated = [metrics.frechet_infinity(real, draw(seed)) for seed in range(40)]
    bias = np.mean(many) - true
    assert bias > 0.03 and abs(np.mean(extrapolated) - true) < bias / 3
    intervals = [metrics.frechet_interval(real, draw(seed), resamples=40) for seed in range(40)]
    assert 36 <= sum(low <= np.mean(many) <= high for low, high in intervals) <= 40
    width = np.mean([high - low for low, high in intervals]) / (np.quantile(many, 0.975) - np.quantile(many, 0.025))
    assert 0.8 < width < 1.6
    assert metrics.frechet_interval(real, draw(0)) == metrics.frechet_interval(real, draw(0))
    assert metrics.frechet_interval(real, draw(0)) != metrics.frechet_interval(real, draw(0), seed=1)
    assert metrics.frechet_infinity(real, draw(0)) != metrics.frechet_infinity(real, draw(0), seed=1)


def test_frechet_by_class():
    x, y, labels = normal(20, 3, 0), normal(12, 3, 1), [0, 1, 1, 1] * 3
    result = metrics.frechet_by_class(x, [1] * 10 + [0] * 10, y, labels)
    one = metrics.frechet_distance(x[:10], y[[i for i, c in enumerate(labels) if c == 1]])
    assert list(result) == [0, 1] and result[1] == (one, 10, 9) and result[0][1:] == (10, 3)
    with pytest.raises(metrics.UserError, match="class a has 0 real and 12"):
        metrics.frechet_by_class(x, ["b"] * 20, y, ["a"] * 12)


# ---------------------------------------------------------------------------------------------------------------------
# metrics: the other scores


def test_inception_score_closed_forms():
    one_hot = torch.eye(5).repeat(20, 1) * 1000
    mean, std = metrics.inception_score(one_hot, splits=10)
    assert abs(mean - 5) < 1e-9 and std < 1e-9
    mean, std = metrics.inception_score(torch.zeros(30, 5))
    assert abs(mean - 1) < 1e-9 and std < 1e-9
    logits = normal(60, 4, 0)
    p = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(1, keepdims=True)
    expected = [np.exp((q * (np.log(q) - np.log(q.mean(0)))).sum(1).mean()) for q in np.split(p, 3)]
    mean, std = metrics.inception_score(logits, splits=3)
    assert abs(mean - np.mean(expected)) < 1e-9 and abs(std - np.std(expected)) < 1e-9
    odd = [np.exp((q * (np.log(q) - np.log(q.mean(0)))).sum(1).mean()) for q in np.split(p, [8, 17, 25, 34, 42, 51])]
    assert abs(metrics.inception_score(logits, splits=7)[0] - np.mean(odd)) < 1e-9
    # Fewer samples than splits: one each, which tells nothing.
    assert metrics.inception_score(logits[:4]) == (pytest.approx(1, abs=1e-12), pytest.approx(0, abs=1e-12))


def test_inception_score_is_shuffled_by_its_seed_alone():
    sorted_by_class = torch.eye(5).repeat_interleave(20, dim=0) * 1000
    assert abs(metrics.inception_score(sorted_by_class, splits=5)[0] - 1) < 1e-9
    assert metrics.inception_score(sorted_by_class, splits=5, seed=0)[0] > 4
    logits = normal(50, 4, 0)
    assert metrics.inception_score(logits, seed=0) == metrics.inception_score(logits, seed=0)
    assert metrics.inception_score(logits, seed=0) != metrics.inception_score(logits, seed=1)
    one, other = (metrics.inception_score(logits, splits=1, seed=seed) for seed in (0, None))
    assert abs(one[0] - other[0]) < 1e-12 and one[1] == 0


def test_kernel_distance_equals_the_double_sum():
    x, y = normal(7, 3, 0), normal(5, 3, 1) + 1
    k = lambda a, b: (float(a @ b) / 3 + 1) ** 3  # noqa: E731

    def double_sum(x, y):
        n, m = len(x), len(y)
        return (
            sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
            + sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
            - 2 * sum(k(a, b) for a in x for b in y) / (n * m)
        )

    for n, m in ((7, 5), (2, 2), (2, 5)):
        assert abs(metrics.kernel_distance(x[:n], y[:m]) - double_sum(x[:n], y[:m])) < 1e-9
        assert abs(metrics.kernel_distance(x[:n], y[:m], block=2) - double_sum(x[:n], y[:m])) < 1e-9
    # Unbiased: over many pairs of samples of one distribution the mean is zero.
    same = [metrics.kernel_distance(normal(20, 3, 2 * s), normal(20, 3, 2 * s + 1)) for s in range(500)]
    assert abs(np.mean(same)) < 4 * np.std(same) / math.sqrt(500)


def test_kernel_distance_of_subsets():
    x, y = normal(200, 3, 0), normal(150, 3, 1) + 0.5
    mean, std = metrics.kernel_distance_subsets(x, y)
    assert std > 0 and abs(mean - metrics.kernel_distance(x, y)) < 4 * std / math.sqrt(100)
    assert metrics.kernel_distance_subsets(x, y) == (mean, std) != metrics.kernel_distance_subsets(x, y, seed=1)
    assert metrics.kernel_distance_subsets(x[:4], y[:4], subsets=3)[1] > 0
    assert metrics.kernel_distance_subsets(x, y, subsets=50, size=20)[1] > std  # smaller subsets vary more


def test_precision_recall_equal_their_definitions():
    real, fake, k = normal(40, 2, 0), normal(30, 2, 1) * 0.7 + 0.5, 3
    distance = lambda a, b: math.dist(a.tolist(), b.tolist())  # noqa: E731
    radius = lambda x, i: sorted(distance(x[i], other) for other in x)[k]  # noqa: E731
    in_real = [[distance(f, r) <= radius(real, i) for i, r in enumerate(real)] for f in fake]
    in_fake = [[distance(f, r) <= radius(fake, i) for i, f in enumerate(fake)] for r in real]
    scores = metrics.precision_recall(real, fake, k)
    assert abs(scores["precision"] - np.mean([any(row) for row in in_real])) < 1e-9
    assert abs(scores["recall"] - np.mean([any(row) for row in in_fake])) < 1e-9
    assert abs(scores["density"] - np.mean([sum(row) for row in in_real]) / k) < 1e-9
    assert abs(scores["coverage"] - np.mean(np.array(in_real).any(0))) < 1e-9
    assert metrics.precision_recall(real, fake, k, block=7) == scores
    assert metrics.precision_recall(real + 1e3, fake + 1e3, k) == scores
    apart = metrics.precision_recall(real, fake + 100, k)
    assert apart == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}


def test_precision_recall_of_points_on_a_line():
    point = lambda *x: torch.tensor(x, dtype=torch.float64)[:, None] + 1000.1  # noqa: E731
    # Balls of k = 1 around 0, 1, 3, 10: [-1,1], [0,2], [1,5], [3,17]; around 0.5, 4, 30: [-3,4], [0.5,7.5], [4,56].
    scores = metrics.precision_recall(point(0, 1, 3, 10), point(0.5, 4, 30), k=1)
    assert scores == {"precision": 2 / 3, "recall": 1, "density": 4 / 3, "coverage": 1}
    # Copies of a neighbour lie on the ball, wherever they stand in the other set.
    x = normal(300, 200, 0) + 3
    scores = metrics.precision_recall(x, x.flip(0))
    assert scores == {"precision": 1, "recall": 1, "density": 1.2, "coverage": 1}
    # Copies of a point are at no distance at all.
    twins = point(0.3, 0.3, 0.3, 5.7)
    assert metrics.precision_recall(twins, point(0.3, 0.3, 90), k=1)["precision"] == 2 / 3


def test_laplacian_pyramid():
    x = torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    fine, rest = metrics.laplacian_pyramid(x)
    assert fine.shape == (2, 3, 64, 48) and rest.shape == (2, 3, 32, 24)
    taps, weights = np.array([-2, -1, 0, 1, 2]), np.array([1, 4, 6, 4, 1]) / 16
    mirror = lambda i, n: n - 1 - abs(n - 1 - abs(i))  # noqa: E731, the edge itself is not repeated

    def blurred(image, y, x):
        height, width = image.shape
        return sum(
            weights[i] * weights[j] * image[mirror(y + taps[i], height), mirror(x + taps[j], width)]
            for i in range(5)
            for j in range(5)
        )

    image = x[1, 2].double().numpy()
    for y, z in ((0, 0), (31, 23), (5, 0), (13, 7)):
        assert abs(rest[1, 2, y, z] - blurred(image, 2 * y, 2 * z)) < 1e-5
    spread = np.zeros((64, 48))
    spread[::2, ::2] = 4 * rest[1, 2].numpy()
    for y, z in ((0, 0), (63, 47), (10, 1), (33, 40)):
        assert abs(fine[1, 2, y, z] - (image[y, z] - blurred(spread, y, z))) < 1e-5
    flat = metrics.laplacian_pyramid(torch.full((1, 1, 64, 64), 7.0))
    assert [tuple(band.shape[2:]) for band in flat] == [(64, 64), (32, 32), (16, 16)]
    assert flat[0].abs().max() < 1e-5 and (flat[2] - 7).abs().max() < 1e-5


def test_slice_distance_in_one_dimension():
    """Patches of one value: all directions are that value's, up to its sign, and sorting matches the samples."""
    a, b = normal(50, 1, 0).float()[..., None, None], normal(40, 1, 1).float()[..., None, None].exp()
    b = torch.cat([b, b[:10]])
    line = [np.sort(((x - x.mean()) / x.std()).flatten().numpy()) for x in (a, b)]
    distance = metrics.slice_distance(a, b, torch.Generator().manual_seed(0))
    assert abs(distance - 1000 * np.abs(line[0] - line[1]).mean()) < 1e-2


def test_sliced_wasserstein():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (40, 3, 32, 32), generator=generator, dtype=torch.uint8)
    more = torch.randint(256, (30, 3, 32, 32), generator=generator, dtype=torch.uint8)
    smooth = F.avg_pool2d(more.float(), 3, 1, 1).round().to(torch.uint8)
    near, far = metrics.sliced_wasserstein(noise, more), metrics.sliced_wasserstein(noise, smooth)
    assert list(near) == ["SWD", "SWD 32", "SWD 16"] and abs(near["SWD"] - (near["SWD 32"] + near["SWD 16"]) / 2) < 1e-9
    assert near["SWD 32"] * 2 < far["SWD 32"]
    assert metrics.sliced_wasserstein(noise, noise)["SWD"] < 1e-3
    assert metrics.sliced_wasserstein(noise, more) == near != metrics.sliced_wasserstein(noise, more, seed=1)
    for other in (more[:, :, :16, :16], more[:, :1], more[:, :, :, :16]):
        with pytest.raises(metrics.UserError, match="one size"):
            metrics.sliced_wasserstein(noise, other)
    with pytest.raises(metrics.UserError, match="16 x 16"):
        metrics.sliced_wasserstein(noise[:, :, :8], more[:, :, :8])


@pytest.mark.parametrize(
    "call",
    [
        lambda: metrics.frechet_distance(normal(5, 3, 0), normal(5, 4, 0)),
        lambda: metrics.frechet_distance(normal(1, 3, 0), normal(5, 3, 0)),
        lambda: metrics.frechet_distance(normal(5, 3, 0) * math.nan, normal(5, 3, 0)),
        lambda: metrics.frechet_distance(normal(5, 3, 0).abs() / 0, normal(5, 3, 0)),
        lambda: metrics.frechet_distance(metrics.FeatureStats(3), normal(5, 3, 0)),
        lambda: metrics.FeatureStats(3).update(normal(5, 4, 0)),
        lambda: metrics.FeatureStats(3, {**MADE_BY, "resize": "clean"}).merge(metrics.FeatureStats(3, MADE_BY)),
        lambda: metrics.frechet_infinity(normal(50, 3, 0), normal(19, 3, 0)),
        lambda: metrics.frechet_interval(normal(50, 3, 0), normal(3, 3, 0)),
        lambda: metrics.inception_score(normal(5, 3, 0), splits=0),
        lambda: metrics.inception_score(normal(0, 3, 0)),
        lambda: metrics.inception_score(normal(5, 3, 0) / 0),
        lambda: metrics.kernel_distance(normal(1, 3, 0), normal(5, 3, 0)),
        lambda: metrics.kernel_distance_subsets(normal(3, 3, 0), normal(5, 3, 0)),
        lambda: metrics.precision_recall(normal(5, 3, 0), normal(5, 3, 0), k=5),
        lambda: metrics.precision_recall(normal(5, 3, 0), normal(9, 3, 0), k=0),
        lambda: metrics.frechet_interval(normal(50, 3, 0), normal(9, 3, 0), level=2),
        lambda: metrics.frechet_by_class(normal(5, 3, 0), [0] * 4, normal(5, 3, 0), [0] * 5),
        lambda: metrics.kernel_distance_subsets(normal(9, 3, 0), normal(9, 3, 0), subsets=0),
        lambda: metrics.sliced_wasserstein(torch.zeros(0, 3, 16, 16), torch.zeros(4, 3, 16, 16)),
    ],
)
def test_scores_refuse_what_they_cannot_do(call):
    with pytest.raises(metrics.UserError):
        call()


# ---------------------------------------------------------------------------------------------------------------------
# metrics: extractors


MADE_BY = {"network": "n", "weights": "w", "resize": "tf1", "precision": "float32"}


def test_program_takes_gray_uint8_and_any_batch(extractor_file):
    network = metrics.load_extractor(extractor_file)
    images = torch.randint(256, (19, 1, 8, 12), dtype=torch.uint8)
    features, logits = metrics.extract(network, images)
    assert features.shape == (19, 48) and logits.shape == (19, 5)
    assert torch.allclose(features, metrics.extract(network, images.expand(-1, 3, -1, -1).float() / 255)[0], atol=1e-6)
    # Floats are rounded, not cut off, to the levels of a file: 0.999 is 255, as in a picture.
    for value, level in ((0.999, 255), (0.4 / 255, 0), (0.6 / 255, 1), (99.5001 / 255, 100)):
        assert torch.allclose(network(torch.full((1, 3, 8, 8), value))[0], torch.tensor(level / 255), atol=1e-6)
    for wrong in (images.float(), images.float() / 127.5 - 1, images.int(), images.float() * math.nan):
        with pytest.raises(metrics.UserError, match="0,1"):
            network(wrong)


def test_program_with_features_alone(tmp_path, folder, capsys):
    class Mean(torch.nn.Module):
        def forward(self, x):
            return x.mean(dim=(2, 3))

    dims = {0: torch.export.Dim("n"), 2: torch.export.Dim("h"), 3: torch.export.Dim("w")}
    program = torch.export.export(Mean(), (torch.rand(3, 3, 16, 24),), dynamic_shapes=(dims,))
    torch.export.save(program, tmp_path / "mean.pt2")
    argv = [str(folder), str(folder), "--extractor", str(tmp_path / "mean.pt2")]
    assert metrics.main(argv) == 0
    out = capsys.readouterr().out
    assert "FD(mean)" in out and "KID(mean)" in out and "IS" not in out
    assert "logits" in metrics_fail(capsys, *argv, "--metrics", "fid,is")


def test_extractor_takes_no_autocast_and_leaves_settings_alone(extractor_file):
    network = metrics.load_extractor(extractor_file)
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    plain = network(images)[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(images)[1], plain)
    settings, during = torch.backends.cudnn, []
    network.network = lambda x: during.append(tf32()) or x.flatten(1)

    def tf32():
        if hasattr(settings, "conv"):
            return settings.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
        return settings.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    before = tf32()
    network(images)
    assert tf32() == before and during in ([("ieee", "ieee")], [(False, False)]) and during != [before]


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
                m.running_mean.normal_(0, 0.1)
                m.running_var.uniform_(0.5, 1.5)
                torch.nn.init.uniform_(m.weight, 0.5, 1.5)
                torch.nn.init.normal_(m.bias, 0, 0.1)
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
    file = inception_weights[classes]
    network = metrics.load_extractor(file)
    images = torch.randint(256, (2, 3, 40, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x = metrics.for_inception(images.float(), "tf1" if classes == 1008 else "bilinear")
    features, logits = reference_inception(file, classes, x, monkeypatch)
    seen, said = network(images)
    assert seen.shape == (2, 2048) and said.shape == (2, classes) and features.abs().mean() > 0.1
    assert (seen - features).norm() < 1e-5 * features.norm() and (said - logits).norm() < 1e-5 * logits.norm()
    assert not network.network.training and all(not m.training for m in network.network.modules())
    resize = "tf1" if classes == 1008 else "bilinear"
    assert {k: network.made_by[k] for k in ("resize", "precision")} == {"resize": resize, "precision": "float32"}
    assert network.made_by["weights"] == hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    assert metrics.label("FID", network.made_by) == f"FD(random-{classes})"  # only published weights make FID
    for weights in ("0cc3c7bd00000000", "6726825d00000000"):
        assert metrics.label("FID", {**MADE_BY, "weights": weights}) == "FID"


def test_inception_in_bfloat16(inception_weights):
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    full = metrics.load_extractor(inception_weights[1000], resize="clean")
    half = metrics.load_extractor(inception_weights[1000], resize="clean", precision="bfloat16")
    features, short = full(images)[0], half(images)[0]
    assert short.dtype == torch.float32 and half.made_by == {**full.made_by, "precision": "bfloat16"}
    assert 1e-4 < (short - features).norm() / features.norm() < 0.02


@pytest.mark.parametrize("height,width", [(32, 48), (299, 299), (500, 301)])
def test_resize_modes(height, width):
    image = torch.randint(256, (3, height, width), generator=torch.Generator().manual_seed(0)).float()
    resized = {mode: metrics.for_inception(image[None], mode)[0] for mode in metrics.RESIZES}
    # clean-fid: Pillow's bicubic on floats, not rounded.
    clean = [np.asarray(Image.fromarray(c.numpy()).resize((299, 299), Image.BICUBIC)).clip(0, 255) for c in image]
    assert np.abs(resized["clean"].numpy() * 128 + 128 - np.stack(clean)).max() < 0.02
    for mode in ("bilinear", "tf1"):  # pixel by pixel, from their definitions

        def pixel(c, y, x):
            places = []
            for i, n in ((y, height), (x, width)):
                at = (i + 0.5) * n / 299 - 0.5 if mode == "bilinear" else i * n / 299
                at = min(max(at, 0), n - 1)
                places.append((int(at), min(int(at) + 1, n - 1), at - int(at)))
            (top, bottom, v), (left, right, u) = places
            rows = [image[c, i, left] * (1 - u) + image[c, i, right] * u for i in (top, bottom)]
            return rows[0] * (1 - v) + rows[1] * v

        for c, y, x in ((0, 0, 0), (1, 298, 298), (2, 150, 7), (0, 77, 280)):
            value = resized[mode][c, y, x]
            value = value * 127.5 + 127.5 if mode == "bilinear" else value * 128 + 128
            assert abs(value - pixel(c, y, x)) < 0.01


@pytest.mark.parametrize(
    "spec,options,hint",
    [
        ("tiny", {"resize": "clean"}, "fixes its own"),
        ("tiny", {"precision": "bfloat16"}, "fixes its own"),
        ("tiny", {"resize": "nearest"}, "one of bilinear"),
        ("nowhere.pth", {}, "no extractor"),
        ("cut.pt2", {}, "not whole"),
        ("cut.pth", {}, "neither a .pt2"),
        ("other.pth", {}, "neither a .pt2"),
    ],
)
def test_extractors_refuse_what_they_are_not(spec, options, hint, tmp_path, extractor_file):
    (tmp_path / "cut.pt2").write_bytes(extractor_file.read_bytes()[:1000])
    (tmp_path / "cut.pth").write_bytes(b"no")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(metrics.UserError, match=hint):
        metrics.load_extractor(extractor_file if spec == "tiny" else tmp_path / spec, **options)


def test_measure_streams(extractor_file):
    network = metrics.load_extractor(extractor_file)
    images = torch.randint(256, (50, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features, logits = metrics.extract(network, images)
    done = []
    summary = metrics.measure(network, images, keep=False, splits=3, seed=5, progress=lambda *x: done.append(x))
    assert done[-1] == (50, 50) and [n for n, _ in done] == sorted(n for n, _ in done)
    assert summary.n == 50 and summary.parts == []
    assert metrics.frechet_distance(summary.stats, features) < 1e-12
    assert np.allclose(summary.predictions.score(), metrics.inception_score(logits, 3, seed=5), atol=1e-12, rtol=0)
    for name, hint in (("kid", "keep"), ("fid-classes", "labels"), ("foo", "no score"), ("swd", "no score")):
        with pytest.raises(metrics.UserError, match=hint):
            metrics.compare(summary, summary, [name])
    kept = metrics.measure(network, images)
    assert torch.equal(kept.features, features) and kept.index.tolist() == list(range(50))


# ---------------------------------------------------------------------------------------------------------------------
# metrics: the command


def metrics_fail(capsys, *argv):
    capsys.readouterr()
    assert metrics.main([str(word) for word in argv]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("metrics.py: error: "), captured.err
    assert captured.out == ""
    return captured.err


def scores_of(capsys, *argv):
    capsys.readouterr()
    assert metrics.main([*(str(word) for word in argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_command_scores_folders_sorted_by_class(tmp_path, extractor_file, capsys):
    for i in range(20):  # in the order of their names, each split of the Inception Score would hold one kind
        write_picture(torch.full((3, 8, 8), 255 * (i // 10), dtype=torch.uint8), tmp_path / f"{i:02d}.png")
    argv = [str(tmp_path), str(tmp_path), "--extractor", str(extractor_file)]
    assert metrics.main(argv) == 0
    out = capsys.readouterr().out
    assert f"fake: {tmp_path}, 20 images" in out and "resize native, float32" in out and "20 images bias" in out
    scores = dict(line.rsplit(maxsplit=1) for line in out.splitlines())
    assert float(scores["FD(tiny)"]) < 1e-9 and float(scores["IS(tiny)"]) > 1.2 and scores["recall"] == "1"
    result = scores_of(capsys, *argv)
    checksum = hashlib.sha256(extractor_file.read_bytes()).hexdigest()[:16]
    assert {k: v for k, v in result.items() if k not in ("notes", "scores")} == {
        "real": str(tmp_path), "n_real": 20, "fake": str(tmp_path), "n_fake": 20, "saved": None,
        "network": "tiny", "weights": checksum, "resize": "native", "precision": "float32",
    }  # fmt: skip
    assert abs(result["scores"]["IS(tiny)"] - float(scores["IS(tiny)"])) < 1e-5
    one = scores_of(capsys, *argv, "--metrics", "is", "--splits", 1)["scores"]
    assert one["IS std"] == 0 and one["IS(tiny)"] > result["scores"]["IS(tiny)"]


def test_command_reads_arrays_and_saved_statistics(tmp_path, folder, extractor_file, capsys):
    pictures = [pil_to_tensor(Image.open(file)) for file in sorted(folder.rglob("*.png"))]
    images = torch.stack(pictures)
    hwc = images.permute(0, 2, 3, 1).numpy()
    np.save(tmp_path / "hwc.npy", hwc)
    np.savez(tmp_path / "chw.npz", images=images.numpy())
    np.savez(tmp_path / "first.npz", hwc)
    np.save(tmp_path / "gray.npy", hwc[..., 0])
    np.savez(tmp_path / "other.npz", images=hwc // 2)
    use = ["--extractor", extractor_file]
    real = scores_of(capsys, folder, "--out", tmp_path / "real.npz", *use)
    assert real["scores"] == {} and real["n_real"] == 24 and "fake" not in real
    expected = scores_of(capsys, folder, tmp_path / "other.npz", *use)["scores"]
    assert expected["FD(tiny)"] > 0.1
    for side in ("hwc.npy", "chw.npz", "first.npz"):
        assert scores_of(capsys, tmp_path / side, tmp_path / "other.npz", *use)["scores"] == expected
    saved = scores_of(capsys, tmp_path / "real.npz", tmp_path / "other.npz", *use)["scores"]
    assert list(saved) == ["FD(tiny)", "IS(tiny)", "IS std"]
    notes = scores_of(capsys, tmp_path / "real.npz", tmp_path / "other.npz", *use)["notes"]
    assert any("left out: kid, prdc" in line for line in notes)
    np.save(tmp_path / "small.npy", hwc[:, ::2, ::2])
    notes = scores_of(capsys, folder, tmp_path / "small.npy", *use)["notes"]
    assert any("18 x 20 and 9 x 10" in line for line in notes)
    assert abs(saved["FD(tiny)"] - expected["FD(tiny)"]) < 1e-9
    np.save(tmp_path / "spread.npy", np.repeat(hwc[..., :1], 3, axis=3))
    gray = scores_of(capsys, tmp_path / "gray.npy", tmp_path / "spread.npy", *use)["scores"]
    assert gray["FD(tiny)"] < 1e-9
    # The weights count, not the file's name.
    shutil.copy(extractor_file, tmp_path / "renamed.pt2")
    renamed = scores_of(capsys, tmp_path / "real.npz", tmp_path / "other.npz", "--extractor", tmp_path / "renamed.pt2")
    assert renamed["scores"].keys() == saved.keys()
    # Statistics alone need no network.
    assert metrics.main([str(tmp_path / "real.npz"), str(tmp_path / "real.npz")]) == 0
    with np.load(tmp_path / "real.npz") as file:
        np.savez(tmp_path / "foreign.npz", mu=file["mu"], sigma=file["sigma"])
    result = scores_of(capsys, tmp_path / "foreign.npz", tmp_path / "other.npz", *use)
    assert result["n_real"] is None and any("do not say" in line for line in result["notes"])
    assert abs(result["scores"]["FD(tiny)"] - expected["FD(tiny)"]) < 1e-9


def test_command_scores_on_request(tmp_path, folder, extractor_file, capsys):
    files = [folder / f"rose {c}" / f"{i}.png" for c in (1, 9, 10) for i in range(8)]  # natural order, as gan.py has it
    images = torch.stack([pil_to_tensor(Image.open(file)) for file in files])
    labels = torch.arange(3).repeat_interleave(8)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    np.savez(tmp_path / "fake.npz", images=images[order].numpy(), labels=labels[order].numpy())
    names = "fid,fid-infinity,fid-interval,fid-classes,kid-subsets,swd"
    use = ["--extractor", extractor_file, "--metrics", names]
    result = scores_of(capsys, folder, tmp_path / "fake.npz", *use)
    scores = result["scores"]
    of_class = {k: v for k, v in scores.items() if "(8 and 8 images)" in k}  # labels count into the sorted class names
    assert list(of_class) == [f"FD(tiny) of rose {c} (8 and 8 images)" for c in (1, 10, 9)]
    np.savez(tmp_path / "named.npz", images=images.numpy(), labels=[f"rose {c}" for c in (1, 9, 10) for _ in range(8)])
    named = scores_of(capsys, tmp_path / "fake.npz", tmp_path / "named.npz", *use[:2], "--metrics", "fid-classes")
    assert all(0 <= value < 1e-9 for value in named["scores"].values()) and len(named["scores"]) == 4
    assert all(0 <= value < 1e-9 for value in of_class.values()) and abs(scores["FD(tiny) class mean"]) < 1e-9
    assert scores["FD(tiny) low"] <= scores["FD(tiny)"] <= scores["FD(tiny) high"]
    assert {"FD(tiny) infinity", "KID(tiny) of subsets", "KID std", "SWD"} < set(scores)
    assert result == scores_of(capsys, folder, tmp_path / "fake.npz", *use)
    assert result != scores_of(capsys, folder, tmp_path / "fake.npz", *use, "--seed", 1)
    # A score that needs no network loads none.
    alone = scores_of(capsys, folder, tmp_path / "fake.npz", "--metrics", "swd", "--extractor", "nowhere")
    assert alone["scores"] == {k: v for k, v in scores.items() if k.startswith("SWD")} and "network" not in alone


def test_command_names_and_counts_unreadable_images(tmp_path, folder, extractor_file, capsys):
    shutil.copytree(folder, tmp_path / "fake")
    whole = scores_of(capsys, folder, tmp_path / "fake", "--extractor", extractor_file, "--metrics", "fid")
    file = tmp_path / "fake/rose 1/0.png"
    (tmp_path / "fake/rose 1/broken.png").write_bytes(file.read_bytes()[:100])
    (tmp_path / "fake/rose 1/none.jpg").write_text("no picture")
    Image.fromarray(np.full((9, 9), 40000, dtype=np.uint16)).save(tmp_path / "fake/rose 1/deep.png")
    (tmp_path / "fake/rose 1/.hidden.png").write_text("what a file manager leaves")
    (tmp_path / "fake/rose 1/loop").symlink_to("..")
    names = "fid,swd,fid-classes"
    result = scores_of(capsys, folder, tmp_path / "fake", "--extractor", extractor_file, "--metrics", names)
    assert result["n_fake"] == 24 and result["scores"]["FD(tiny)"] == whole["scores"]["FD(tiny)"]
    note = next(line for line in result["notes"] if "could not be read" in line)
    assert "3 files" in note and all(f"{name} (" in note for name in ("broken.png", "none.jpg", "deep.png"))


@pytest.mark.parametrize(
    "argv,hint",
    [
        ("{folder}", "--out"),
        ("{folder} --out {tmp}/stats.txt", "an .npz"),
        ("{folder} --out {tmp}/nowhere/stats.npz", "an .npz"),
        ("{folder} --out {tmp}/stats.npz --metrics fid", "FAKE"),
        ("{folder} {folder} --seed -1", "--seed"),
        ("{folder} {tmp}/torn.npz", "holds neither"),
        ("{folder} {tmp}/unreadable --metrics swd", "2 readable"),
        ("{folder} {tmp}/nowhere", "neither a folder"),
        ("{folder} {folder}/../nowhere.npz", "neither a folder"),
        ("{folder} --out {tmp}/keys.npz", "no feature statistics"),
        ("{folder} {folder} --metrics ,", "no score"),
        ("{folder} {tmp}/truth.npz", "one number or name"),
        ("{folder} {tmp}/empty", "0 images"),
        ("{folder} {tmp}/single", "1 images"),
        ("{folder} {tmp}/spoilt --extractor {tiny}", "1 readable"),
        ("{folder} {tmp}/floats.npy", "uint8"),
        ("{folder} {tmp}/two.npy", "uint8"),
        ("{folder} {tmp}/keys.npz", "holds neither"),
        ("{folder} {tmp}/text.npz", "holds neither"),
        ("{folder} {tmp}/labels.npz", "labels"),
        ("{folder} {tmp}/wide.npz --extractor {tiny}", "dimensions"),
        ("{tmp}/clean.npz {folder} --extractor {tiny}", "cannot be compared"),
        ("{tmp}/clean.npz {tmp}/tf1.npz", "resize clean"),
        ("{tmp}/clean.npz {folder} --metrics kid --extractor {tiny}", "kid needs features"),
        ("{folder} {folder} --metrics fid,foo", "no score 'foo'"),
        ("{folder} {tmp}/images.npy --metrics fid-classes --extractor {tiny}", "needs labels"),
        ("{folder} {tmp}/strange.npz --metrics fid-classes --extractor {tiny}", "classes"),
        ("{folder} {tmp}/images.npy --extractor {tmp}/division.pt2", "finite"),
        ("{folder} {folder} --device tpu", "device"),
        ("{folder} {folder} --resize nearest", "--resize"),
        ("{folder} {folder} --bogus", "--bogus"),
        ("{folder} {folder} --splits 0 --extractor {tiny}", "splits"),
    ],
)
def test_command_errors(argv, hint, tmp_path, folder, extractor_file, division_extractor, capsys):
    shutil.copy(division_extractor, tmp_path / "division.pt2")
    for name, count in (("empty", 0), ("single", 1), ("spoilt", 1)):
        (tmp_path / name).mkdir()
        for i in range(count):
            write_picture(torch.zeros(3, 8, 8, dtype=torch.uint8), tmp_path / name / f"{i}.png")
    (tmp_path / "spoilt/no.png").write_text("no picture")
    (tmp_path / "unreadable").mkdir()
    for i in range(3):
        (tmp_path / "unreadable" / f"{i}.png").write_text("no picture")
    images = np.zeros((4, 8, 8, 3), np.uint8)
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "floats.npy", images / 255)
    np.save(tmp_path / "two.npy", images[..., :2])
    np.savez(tmp_path / "keys.npz", pictures=images)
    (tmp_path / "torn.npz").write_bytes((tmp_path / "keys.npz").read_bytes()[:-30])
    (tmp_path / "text.npz").write_text("no")
    np.savez(tmp_path / "labels.npz", images=images, labels=np.zeros(3, int))
    np.savez(tmp_path / "truth.npz", images=images, labels=np.zeros(4))
    np.savez(tmp_path / "strange.npz", images=images, labels=np.array([0, 0, 7, 7]))
    np.savez(tmp_path / "wide.npz", mu=np.zeros(5), sigma=np.eye(5))
    for resize in ("clean", "tf1"):
        made_by = {**MADE_BY, "resize": resize}
        metrics.FeatureStats(48, made_by).update(normal(60, 48, 0)).save(tmp_path / f"{resize}.npz")
    before = sorted(tmp_path.rglob("*"))
    words = [word.format(folder=folder, tmp=tmp_path, tiny=extractor_file) for word in argv.split()]
    assert hint in metrics_fail(capsys, *words)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture(scope="session")
def division_extractor(tmp_path_factory):
    """Features that are not finite where an image is black."""

    class Division(torch.nn.Module):
        def forward(self, x):
            return 1 / x.mean(dim=(2, 3))

    path = tmp_path_factory.mktemp("extractor") / "division.pt2"
    dims = {0: torch.export.Dim("n"), 2: torch.export.Dim("h"), 3: torch.export.Dim("w")}
    torch.export.save(torch.export.export(Division(), (torch.rand(3, 3, 16, 24),), dynamic_shapes=(dims,)), path)
    return path


def test_command_tells_its_progress(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    for terminal, expected in ((False, "net: 40 of 100 images, 1:00 left\n"), (True, None)):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
        now[0] = 0.0
        progress = metrics.show_progress("net")
        for seconds, done in ((0.1, 1), (40, 40), (41, 41), (100, 100)):
            now[0] = seconds
            progress(done, 100)
        err = capsys.readouterr().err
        if terminal:
            assert err.startswith("\r\x1b[Knet: 40 of 100 images, 1:00 left\r\x1b[K") and err.endswith("0:00 left\n")
        else:
            assert err.startswith(expected) and err.count("\n") == 2


def test_two_processes_score_as_one(tmp_path, folder, extractor_file, division_extractor, capsys):
    script = tmp_path / "ranks.py"
    script.write_text(
        "import json, os, sys, torch, torch.distributed as dist\n"
        f"sys.path.insert(0, {str(HERE)!r})\n"
        "import metrics\n"
        "dist.init_process_group('gloo')\n"
        "network = metrics.load_extractor(sys.argv[1])\n"
        "for n in (25, 1):\n"
        "    images = torch.randint(256, (n, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))\n"
        "    whole = metrics.measure(network, images)\n"
        "    assert torch.equal(whole.features, metrics.extract(network, images)[0])\n"
        "    if n > 1:\n"
        "        scores = metrics.compare(metrics.Summary.of(network, whole.features[:12]), whole)\n"
        "        with open(f'{sys.argv[2]}/{dist.get_rank()}.json', 'w') as file:\n"
        "            json.dump(scores, file)\n"
        "os._exit(0)\n"  # see the end of metrics.py
    )

    done = torchrun(script, extractor_file, tmp_path)
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    network = metrics.load_extractor(extractor_file)
    images = torch.randint(256, (25, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = metrics.measure(network, images)
    alone = metrics.compare(metrics.Summary.of(network, whole.features[:12]), whole)
    assert alone.keys() == ranks[0].keys() and all(abs(ranks[0][k] - alone[k]) < 1e-9 for k in alone)

    shutil.copytree(folder, tmp_path / "fake")
    (tmp_path / "fake/rose 1/none.png").write_text("no picture")
    argv = [
        folder,
        tmp_path / "fake",
        "--extractor",
        extractor_file,
        "--metrics",
        "fid,is,kid,prdc,swd,fid-classes",
        "--json",
    ]
    done = torchrun(HERE / "metrics.py", *argv)
    assert done.returncode == 0, done.stderr
    both, one = json.loads(done.stdout), scores_of(capsys, *argv)
    assert scores_of(capsys, *argv) == one
    assert both["notes"] == one["notes"] and both["n_fake"] == one["n_fake"] == 24
    assert all(abs(both["scores"][k] - one["scores"][k]) < 1e-9 for k in one["scores"])
    # What stops one process is told once, and stops both.
    images = torch.full((25, 3, 8, 8), 9, dtype=torch.uint8)
    images[3] = 0
    np.save(tmp_path / "one.npy", images.numpy())
    argv = [folder, tmp_path / "one.npy", "--extractor", division_extractor]
    done = torchrun(HERE / "metrics.py", *argv)
    lines = [line for line in done.stderr.splitlines() if line.startswith("metrics.py")]
    assert done.returncode != 0 and len(lines) == 1 and "finite" in lines[0] and "[rank" not in done.stderr, done.stderr
