# SPDX-License-Identifier: MIT
"""All tests of gan.py and metrics.py, in the order of their functions: offline, on the CPU.    python -m pytest

test_<function>_<claim>: the first line below says where the truth comes from.
"""

import contextlib
import copy
import errno
import functools
import hashlib
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
import tarfile
import time
import urllib.error
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: a fixed number, for which resuming is exact
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which makes products on CUDA deterministic

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch._subclasses import FakeTensorMode
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

import gan
import metrics

HERE = Path(__file__).resolve().parent
CPU = torch.device("cpu")
TOY = dict(size=16, width=4, max_width=8, z_dim=8, batch=8, device="cpu", amp="off")
TOY_FLAGS = "--size 16 --width 4 --max-width 8 --z-dim 8 --batch 8 --device cpu --amp off".split()
NAMES = ["rose 1", "rose 9", "rose 10"]


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory):
    """Leaves the user's caches untouched."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Makes 3 classes of 8 pictures, 20 x 18 pixels; their order shows whether 10 is sorted behind 9."""
    root = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for c, name in enumerate(NAMES):
        (root / name).mkdir()
        for i in range(8):
            noise = torch.randint(0, 40, (3, 20, 18), generator=generator)
            picture = (noise + 70 * c).to(torch.uint8)
            to_pil_image(picture).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def run(tmp_path_factory, folder):
    """Trains a conditional toy run of 6 steps."""
    runs = tmp_path_factory.mktemp("runs")
    return gan.train(gan.Config(**TOY, data=str(folder), cond=True, steps=6, runs=str(runs)))


@pytest.fixture
def own_run(run, tmp_path):
    """Copies the toy run for a test that changes it."""
    return Path(shutil.copytree(run, tmp_path / "own" / "run"))


@pytest.fixture
def config(folder, tmp_path):
    """Describes a conditional toy run of 4 steps; an epoch has 3."""
    return gan.Config(**TOY, data=str(folder), cond=True, steps=4, runs=str(tmp_path / "runs"))


@pytest.fixture(scope="session")
def extractor_file(tmp_path_factory):
    """Writes a .pt2 program: 4 x 4 pixels as features, fixed projections of them as logits."""

    class Tiny(torch.nn.Linear):
        def forward(self, x):
            features = F.interpolate(x, size=(4, 4), mode="bilinear", antialias=False).flatten(1)
            return features, super().forward(features)

    torch.manual_seed(0)
    tiny = Tiny(48, 5, bias=False).requires_grad_(False)
    torch.nn.init.normal_(tiny.weight)

    dims = {0: torch.export.Dim("n"), 2: torch.export.Dim("h", min=4), 3: torch.export.Dim("w", min=4)}
    program = torch.export.export(tiny, (torch.rand(3, 3, 16, 24),), dynamic_shapes=(dims,))
    path = tmp_path_factory.mktemp("extractor") / "tiny.pt2"
    torch.export.save(program, path)
    return path


def logged(run):
    """Reads the rows of a run's log."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def losses_of(run):
    return torch.tensor([[row["loss_D"], row["loss_G"]] for row in logged(run)])


def toy(num_classes=3, **changes):
    """Builds a toy GAN without augmentation."""
    values = TOY | {"augment": "none", "cond": num_classes > 0} | changes
    return gan.GAN(gan.resolve(gan.Config(**values)), num_classes)


def random_batches(config, n=16):
    """Yields batches of noise pictures in three classes."""
    images = torch.randint(256, (n, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return gan.batches(images, torch.arange(n) % 3, config, CPU)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def gap(a, b):
    """Returns the largest absolute difference."""
    return (torch.as_tensor(a).double() - torch.as_tensor(b).double()).abs().max().item()


def raising(error):
    """Returns a function that raises the error, whatever it is called with."""

    def fail(*args, **options):
        raise error

    return fail


def fails(capsys, *argv, model=gan.GAN):
    """Runs a command that must end with one short line and status 2; returns the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        gan.main([str(word) for word in argv], model)
    err = capsys.readouterr().err
    assert exit.value.code == 2
    assert err.count("\n") == 1, err
    assert ": error: " in err
    return err


def cases(text):
    """Lists the (argv, hint) of "argv | hint", split by lines and semicolons."""
    parts = text.strip().replace("\n", ";").split(";")
    return [tuple(part.strip().split(" | ")) for part in parts]


def command(*argv, cwd, **options):
    """Runs a Python file as a process of its own."""
    argv = [sys.executable, *map(str, argv)]
    return subprocess.run(argv, cwd=cwd, capture_output=True, text=True, timeout=120, **options)


def same_state(run, other, model=gan.GAN):
    """Asserts that two runs have equal checkpoints, bit for bit."""
    ours = gan.read_checkpoint(run, model)
    theirs = gan.read_checkpoint(other, model)
    assert ours["steps"] == theirs["steps"]
    for name in gan.GAN.PARTS:
        assert_equal(ours[name], theirs[name])


def assert_equal(tree, other):
    for a, b in zip(leaves(tree), leaves(other), strict=True):
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b


def leaves(tree):
    return torch.utils._pytree.tree_leaves(tree)


# ---- gan.py: the public names
GAN_NAMES = """
    Config Generator Discriminator D_LOSSES G_LOSSES GAN main train prepare evaluate load_generator standing_generator
    generate sample_z diff_augment to_float to_uint8 tile write_picture sample_grid load_images batches option resolve
    find_run read_checkpoint UserError atomic_write reading Parser whole_number SHEET
"""
METHODS = """
    G D G_ema opt_G opt_D steps Config networks train_step update_D update_G loss_D loss_G after_log after_save save
    load
"""
METRICS_NAMES = """
    load_extractor measure compare notes Folder FeatureStats frechet_distance inception_score kernel_distance
    precision_recall sliced_wasserstein
"""
PARAMETERS = {
    "Generator": "size channels width max_width z_dim num_classes",
    "Discriminator": "size channels width max_width num_classes",
    "GAN": "config num_classes device",
    "main": "argv model",
    "train": "config resume model",
    "prepare": "config resume model",
    "load_generator": "run device trunc model",
    "standing_generator": "G trunc",
    "generate": "G n classes seed",
    "sample_z": "n z_dim trunc",
    "diff_augment": "x policy",
    "GAN.networks": "config num_classes",
    "GAN.train_step": "self data",
    "GAN.update_D": "self real fake y",
    "GAN.update_G": "self real fake y real_logits",
    "GAN.after_log": "self run record",
    "GAN.after_save": "self run",
}


@pytest.mark.parametrize("place, names", [(gan, GAN_NAMES), (toy(), METHODS), (metrics, METRICS_NAMES)])
def test_public_names_exist(place, names):
    """By the list that recipes and other projects rely on."""
    assert [name for name in names.split() if not hasattr(place, name)] == []


@pytest.mark.parametrize("name, parameters", PARAMETERS.items())
def test_public_functions_take_their_parameters_in_this_order(name, parameters):
    """By the same list."""
    function = functools.reduce(getattr, name.split("."), gan)
    expected = parameters.split()
    assert list(inspect.signature(function).parameters)[: len(expected)] == expected


SHARED = "SHEET FORMATS list_files read_image pixels_of atomic_write reading cause printable put Progress Cores".split()


@pytest.mark.parametrize("name", SHARED)
def test_shared_names_are_equal_text(name):
    """By their sources: the two files share no code, and say the same where they do the same."""
    one = getattr(gan, name)
    other = getattr(metrics, name)
    if callable(one):
        one = inspect.getsource(one)
        other = inspect.getsource(other)
    assert one == other


ALONE = """
import sys, gan
gan.main(["train", "--steps", "2", *sys.argv[1:]])
gan.main(["sample", "--n", "3"])
gan.main(["eval"])
"""


def test_gan_works_alone(tmp_path, folder):
    """A copy of gan.py in an empty folder; eval needs metrics.py, and says so in a line."""
    shutil.copy(HERE / "gan.py", tmp_path)
    done = command("-c", ALONE, "--data", folder, *TOY_FLAGS, cwd=tmp_path)
    assert (tmp_path / "samples.png").exists()
    assert done.returncode == 2
    assert "No module named 'metrics'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_metrics_works_alone(tmp_path, folder, extractor_file):
    """A copy of metrics.py in an empty folder."""
    shutil.copy(HERE / "metrics.py", tmp_path)
    done = command("metrics.py", folder, folder, "--extractor", extractor_file, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


# ---- gan.py: networks
@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_generator_draws_float32_images_in_range(size, channels, num_classes):
    """The definition: [N,z_dim] -> [N,channels,size,size] in [-1,1]."""
    G = gan.Generator(size, channels, 4, 16, 8, num_classes)
    x = G(torch.randn(2, 8), torch.tensor([0, 2]) if num_classes else None)
    assert x.shape == (2, channels, size, size)
    assert x.dtype == torch.float32
    assert x.abs().max() <= 1


@pytest.mark.parametrize("num_classes", [0, 3])
def test_generator_begins_with_orthonormal_gains_and_biases(num_classes):
    """The definition of an orthogonal matrix, in e."""
    G = gan.Generator(32, 3, 4, 16, 64, num_classes)
    for norm in gan.layers_of(G, gan.AdaptiveBatchNorm):
        weight = norm.gain_bias.weight.detach()
        assert gap(weight @ weight.T, torch.eye(len(weight))) < 1e-6


@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_discriminator_gives_a_float32_logit_per_image(size, channels, num_classes):
    """The definition: [N,channels,size,size] -> [N]."""
    D = gan.Discriminator(size, channels, 4, 16, num_classes)
    logits = D(torch.rand(2, channels, size, size), torch.tensor([0, 2]) if num_classes else None)
    assert logits.shape == (2,)
    assert logits.dtype == torch.float32


def true_weight(layer):
    """Returns the weight of a layer; if parametrized, of exact spectral norm 1, or the root of 2 for a 3x3 kernel."""
    if not hasattr(layer, "parametrizations"):
        return layer.weight
    weight = layer.parametrizations.weight.original
    norm = math.sqrt(2) if weight.shape[2:] == (3, 3) else 1
    return norm * weight / torch.linalg.matrix_norm(weight.flatten(1), 2)


def convolve(layer, x):
    return F.conv2d(x, true_weight(layer), layer.bias, padding=layer.kernel_size[0] // 2)


def skip(block, x):
    return x if isinstance(block.skip, torch.nn.Identity) else convolve(block.skip, x)


def repeat_pixels(x):
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


class TextbookGenerator:
    """Computes G's forward pass as it is usually written: upsample first, then norm, ReLU and convolution.

    statistics lists each batch norm with the mean and the variance of its input.
    """

    def __init__(self, G):
        self.G = G
        self.statistics = []

    def __call__(self, z, y):
        G = self.G
        e = torch.cat([z, G.embed.weight[y]], dim=1) if G.num_classes else z
        h = (e @ G.linear.weight.T + G.linear.bias).reshape(len(z), -1, 4, 4)
        for block in G.blocks:
            x = repeat_pixels(h)
            r = convolve(block.conv1, F.relu(self.adaptive_norm(block.norm1, x, e)))
            r = convolve(block.conv2, F.relu(self.adaptive_norm(block.norm2, r, e)))
            h = r + skip(block, x)
        gain = G.norm.weight[:, None, None]
        bias = G.norm.bias[:, None, None]
        h = self.standardize(G.norm, h) * gain + bias
        return torch.tanh(convolve(G.conv, F.relu(h)))

    def adaptive_norm(self, layer, h, e):
        gain, bias = (e @ layer.gain_bias.weight.T + layer.gain_bias.bias).chunk(2, dim=1)
        return self.standardize(layer.norm, h) * (1 + gain)[:, :, None, None] + bias[:, :, None, None]

    def standardize(self, layer, h):
        mean = h.mean((0, 2, 3), keepdim=True)
        var = h.var((0, 2, 3), keepdim=True, correction=0)
        self.statistics.append((layer, mean.detach().flatten(), var.detach().flatten()))
        return (h - mean) / (var + 1e-5).sqrt()


def textbook_discriminator(D, x, y):
    """Computes D's forward pass as it is usually written: convolve first, then pool."""
    h = convolve(D.conv, x)
    for block in D.blocks:
        r = convolve(block.conv2, F.relu(convolve(block.conv1, F.relu(h))))
        h = F.avg_pool2d(r + skip(block, h), 2)
    phi = F.relu(h).sum((2, 3))
    logits = (phi @ true_weight(D.linear).T + D.linear.bias)[:, 0]
    return logits + (phi * true_weight(D.embed)[y]).sum(1) if D.num_classes else logits


@dataclass
class Forms:
    """Holds a network, its input, its output and its textbook form's, and the statistics of textbook batch norms."""

    net: torch.nn.Module
    given: torch.Tensor
    ours: torch.Tensor
    theirs: torch.Tensor
    statistics: tuple = ()


def shaken(net):
    """Moves all parameters, so that biases and gains are not zero."""
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return net


LABELS = torch.tensor([0, 1, 2, 1])


@functools.cache
def generator_forms(size, num_classes):
    """Runs a toy generator and its textbook form."""
    torch.manual_seed(0)
    G = shaken(gan.Generator(size, 3, 4, 8, 8, num_classes))
    z = torch.randn(4, 8, requires_grad=True)
    textbook = TextbookGenerator(G)
    return Forms(G, z, G(z, LABELS), textbook(z, LABELS), textbook.statistics)


@functools.cache
def discriminator_forms(size, num_classes):
    """Runs a toy discriminator and its textbook form, once the power iterations have found the spectral norms."""
    torch.manual_seed(0)
    D = shaken(gan.Discriminator(size, 3, 4, 8, num_classes))
    for layer in gan.layers_of(D, torch.nn.Conv2d, torch.nn.Linear, torch.nn.Embedding):
        weight = layer.parametrizations.weight
        for _ in range(1000):
            weight[0](weight.original.detach())
    D.eval()
    x = (torch.rand(4, 3, size, size) * 2 - 1).requires_grad_()
    return Forms(D, x, D(x, LABELS), textbook_discriminator(D, x, LABELS))


def gradients(forms, out):
    """Returns the gradients of a random sum of outputs, by all parameters and the input."""
    weights = torch.randn(out.shape, generator=seeded(1))
    wanted = [*forms.net.parameters(), forms.given]
    return torch.autograd.grad((out * weights).sum(), wanted, retain_graph=True)


def gradient_gap(forms):
    """Returns the largest difference of gradients, as a share of the largest gradient."""
    theirs = gradients(forms, forms.theirs)
    largest = max(g.abs().max() for g in theirs)
    pairs = zip(gradients(forms, forms.ours), theirs, strict=True)
    return max(gap(a / largest, b / largest) for a, b in pairs)


SHAPES = [(16, 0), (16, 3), (32, 3)]


@pytest.mark.parametrize("size, num_classes", SHAPES)
def test_generator_equals_its_textbook_form(size, num_classes):
    """Layers in their usual order."""
    forms = generator_forms(size, num_classes)
    assert gap(forms.ours.detach(), forms.theirs.detach()) < 1e-5


@pytest.mark.parametrize("size, num_classes", SHAPES)
def test_generator_has_the_gradients_of_its_textbook_form(size, num_classes):
    """Layers in their usual order, differentiated by autograd."""
    assert gradient_gap(generator_forms(size, num_classes)) < 1e-5


@pytest.mark.parametrize("size, num_classes", SHAPES)
def test_generator_has_the_statistics_of_its_textbook_form(size, num_classes):
    """Layers in their usual order; torch's batch norm moves its statistics by a tenth, with the sample's variance."""
    forms = generator_forms(size, num_classes)
    G = forms.net
    sides = {G.norm: size}
    for i, block in enumerate(G.blocks):
        sides[block.norm1.norm] = 4 * 2**i  # it sees each pixel once, the textbook's four times
        sides[block.norm2.norm] = 8 * 2**i

    assert {norm for norm, _, _ in forms.statistics} == set(gan.layers_of(G, gan.BatchNorm))
    for norm, mean, var in forms.statistics:
        n = 4 * sides[norm] ** 2
        assert gap(norm.running_mean, 0.1 * mean) < 1e-5
        assert gap(norm.running_var, 0.9 + 0.1 * var * n / (n - 1)) < 1e-5


@pytest.mark.parametrize("size, num_classes", SHAPES)
def test_discriminator_equals_its_textbook_form(size, num_classes):
    """Layers in their usual order, with exact spectral norms."""
    forms = discriminator_forms(size, num_classes)
    assert gap(forms.ours.detach(), forms.theirs.detach()) < 1e-5


@pytest.mark.parametrize("size, num_classes", SHAPES)
def test_discriminator_has_the_gradients_of_its_textbook_form(size, num_classes):
    """Layers in their usual order, with exact spectral norms, differentiated by autograd."""
    assert gradient_gap(discriminator_forms(size, num_classes)) < 1e-5


def test_discriminator_judges_each_image_alone():
    """The definition: a logit does not depend on the other images of its batch."""
    forms = discriminator_forms(16, 3)
    alone = [forms.net(forms.given[i : i + 1], LABELS[i : i + 1]) for i in range(4)]
    assert gap(torch.cat(alone).detach(), forms.ours.detach()) < 1e-5


# ---- gan.py: losses
REAL = torch.tensor([2.0, -1.0])
FAKE = torch.tensor([2.1, -3.0])


def log_sigmoid(x):
    return -math.log(1 + math.exp(-x))


D_CROSS_ENTROPY = -(log_sigmoid(2) + log_sigmoid(-1)) / 2 - (log_sigmoid(-2.1) + log_sigmoid(3)) / 2
D_BY_HAND = {
    "ns": D_CROSS_ENTROPY,
    "minimax": D_CROSS_ENTROPY,
    "hinge": (0 + 2) / 2 + (3.1 + 0) / 2,
    "rpgan": -(log_sigmoid(-0.1) + log_sigmoid(2)) / 2,
    "lsgan": (1 + 4) / 4 + (4.41 + 9) / 4,
    "wgan": (2.1 - 3) / 2 - (2 - 1) / 2,
}
G_BY_HAND = {
    "ns": -(log_sigmoid(2.1) + log_sigmoid(-3)) / 2,
    "minimax": (log_sigmoid(-2.1) + log_sigmoid(3)) / 2,
    "hinge": -(2.1 - 3) / 2,
    "rpgan": -(log_sigmoid(0.1) + log_sigmoid(-2)) / 2,
    "lsgan": (1.21 + 16) / 4,
    "wgan": -(2.1 - 3) / 2,
}
LOSSES = sorted(D_BY_HAND)


@pytest.mark.parametrize("name", gan.D_LOSSES)
def test_d_losses_of_two_logits(name):
    """By hand, from each paper's formula."""
    assert gap(gan.D_LOSSES[name](REAL, FAKE), D_BY_HAND[name]) < 1e-6


@pytest.mark.parametrize("name", gan.G_LOSSES)
def test_g_losses_of_two_logits(name):
    """By hand, from each paper's formula."""
    assert gap(gan.G_LOSSES[name](REAL, FAKE), G_BY_HAND[name]) < 1e-6


@pytest.mark.parametrize("table", [gan.D_LOSSES, gan.G_LOSSES])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("at", [-200.0, 200.0])
def test_losses_have_finite_gradients_where_exp_overflows(table, name, at):
    """By the formulas: none grows faster than a square."""
    real = torch.tensor([at], requires_grad=True)
    fake = torch.tensor([-at], requires_grad=True)
    table[name](real, fake).backward()
    for logit in (real, fake):
        if logit.grad is not None:
            assert logit.grad.abs() <= 1000


# ---- gan.py: the training step
def copies(model):
    """Copies the parameters of the networks: {"G": [...], "D": [...], "G_ema": [...]}."""
    return {name: [p.clone() for p in getattr(model, name).parameters()] for name in ("G", "D", "G_ema")}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["G", "D", "G_ema"])
def test_train_step_moves_each_network_with_every_loss(loss, name):
    """The definition of a step."""
    model = toy(loss=loss)
    before = copies(model)[name]
    assert torch.isfinite(model.train_step(random_batches(model.config))).all()
    after = copies(model)[name]
    assert any(not torch.equal(p, q) for p, q in zip(before, after, strict=True))


def test_train_step_counts_its_updates():
    """The definition: d_steps of D, each on a batch of its own, then g_steps of G, make one step."""
    model = toy(d_steps=2, g_steps=3)
    calls = []
    update_D = model.update_D
    update_G = model.update_G
    model.update_D = lambda *args: calls.append("D") or update_D(*args)
    model.update_G = lambda *args: calls.append("G") or update_G(*args)
    data = iter([next(random_batches(model.config))] * 2)
    model.train_step(data)
    assert calls == ["D", "D", "G", "G", "G"]
    assert list(data) == []
    assert model.steps == 1


def test_train_step_in_bf16_stays_near_float32():
    """The same step in float32."""
    losses = []
    for amp in ("off", "bf16"):
        model = toy(amp=amp)
        losses.append(model.train_step(random_batches(model.config))[:2])
    assert gap(*losses) < 0.05


@pytest.mark.parametrize("amp, dtype", [("off", torch.float32), ("bf16", torch.bfloat16)])
def test_gan_autocasts_layers_but_not_logits(amp, dtype):
    """The definition of --amp."""
    model = toy(amp=amp)
    x = torch.zeros(1, 3, 16, 16)
    with model.autocast:
        assert model.D.conv(x).dtype == dtype
        assert model.D(x, torch.tensor([0])).dtype == torch.float32


def resting(loss):
    """Builds a toy GAN whose networks stay as they are."""
    model = toy(loss=loss)
    model.D.eval()
    model.descend = lambda optimizer, loss: None
    return model


@pytest.mark.parametrize("loss", LOSSES)
def test_update_d_returns_its_loss_and_both_logits(loss):
    """The table of losses, of D's logits of the real and of the fake images."""
    model = resting(loss)
    real, y = next(random_batches(model.config))
    fake = torch.rand(real.shape, generator=seeded(1))
    loss_D, real_logits, fake_logits = model.update_D(real, fake, y)
    assert gap(real_logits, model.D(real, y).detach()) < 1e-5
    assert gap(fake_logits, model.D(fake, y).detach()) < 1e-5
    mean = (real_logits.mean() + fake_logits.mean()) / 2 if model.config.center else 0
    assert gap(loss_D, gan.D_LOSSES[loss](real_logits - mean, fake_logits - mean)) < 1e-6


@pytest.mark.parametrize("steps, share", [(0, 1), (1, 0), (15, 0), (16, 1)])
def test_slope_penalty_of_a_linear_d(steps, share):
    """By hand: the slope is the class's weights; half of 16 times r1 times their square on every 16th step."""
    model = toy(r1=0.3)
    model.steps = steps
    real, y = next(random_batches(model.config))
    weights = torch.randn(3, *real.shape[1:], generator=seeded(2))
    model.D.forward = lambda x, y: (x * weights[y]).sum(dim=(1, 2, 3))
    squares = weights.square().sum(dim=(1, 2, 3))[y]
    assert model.slope_penalty(real, y) == pytest.approx(share * 2.4 * (squares[0] + squares[4]).item() / 2, rel=1e-5)


def test_convolutions_have_second_derivatives():
    """torch.autograd.gradgradcheck: numerical derivatives of the gradients that the slope penalty takes."""
    model = toy()
    D = model.D.double().eval()  # which keeps the vectors of spectral norm
    real, y = next(random_batches(model.config))
    name = "blocks.0.conv2.parametrizations.weight.original"
    weight = D.get_parameter(name).detach().requires_grad_()
    x = real[:2].double().requires_grad_()

    def logits(x, weight):
        return torch.func.functional_call(D, {name: weight}, (x, y[:2]))

    assert torch.autograd.gradgradcheck(logits, (x, weight), fast_mode=True)


def test_update_d_descends_the_slope_penalty():
    """The definition: the loss of D's step is the table's and the penalty."""
    model = resting("ns")
    descended = []
    model.descend = lambda optimizer, loss: descended.append(loss.item())
    model.slope_penalty = lambda real, y: 7
    loss, _, _ = model.update_D(*[next(random_batches(model.config))[0]] * 2, torch.zeros(8, dtype=torch.int64))
    assert descended[0] == pytest.approx(loss.item() + 7, abs=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_update_g_returns_its_loss(loss):
    """The table of losses, of the given real logits and D's logits of the samples."""
    model = resting(loss)
    real, y = next(random_batches(model.config))
    fake = model.draw(y)
    real_logits = torch.randn(8, generator=seeded(1))
    loss_G = model.update_G(real, fake, y, real_logits)
    fake_logits = model.D(fake, y).detach()
    mean = (real_logits.mean() + fake_logits.mean()) / 2 if model.config.center else 0
    assert gap(loss_G, gan.G_LOSSES[loss](real_logits - mean, fake_logits - mean)) < 1e-6


@pytest.mark.parametrize("loss", ["hinge", "minimax", "ns"])
def test_loss_g_takes_the_mean_logit_for_a_constant(loss):
    """The table of losses, of logits less a number."""
    real, fake = torch.randn(2, 8, generator=seeded(1), dtype=torch.float64) + 5
    fake.requires_grad_()
    mean = torch.cat([real, fake]).mean().item()
    expected = torch.autograd.grad(gan.G_LOSSES[loss](real - mean, fake - mean), fake)
    assert gap(torch.autograd.grad(toy(loss=loss).loss_G(real, fake), fake)[0], expected[0]) < 1e-12


SHIFTLESS = ["hinge", "minimax", "ns", "rpgan", "wgan"]


@pytest.mark.parametrize("loss", SHIFTLESS)
@pytest.mark.parametrize("name", ["loss_D", "loss_G"])
def test_losses_do_not_feel_a_shift_of_all_logits(name, loss):
    """By hand: centred losses lose the shift; rpgan has differences alone. wgan's G feels it, but not its gradient."""
    model = toy(loss=loss)
    fake = torch.randn(8, generator=seeded(1), dtype=torch.float64).requires_grad_()
    real = torch.randn(8, generator=seeded(2), dtype=torch.float64)
    slopes = []
    for shift in (0, 40):
        value = getattr(model, name)(real + shift, fake + shift)
        slopes.append(torch.autograd.grad(value, fake)[0])
    assert gap(*slopes) < 1e-12


@pytest.mark.parametrize("loss", SHIFTLESS)
def test_loss_d_does_not_push_all_logits_one_way(loss):
    """By hand: the gradients of a function of differences add up to 0."""
    real, fake = 3 * torch.randn(2, 8, generator=seeded(1), dtype=torch.float64) + 5
    logits = [real.requires_grad_(), fake.requires_grad_()]
    slopes = torch.autograd.grad(toy(loss=loss).loss_D(*logits), logits)
    assert torch.cat(slopes).abs().max() > 0.01
    assert abs(torch.cat(slopes).sum()) < 1e-12


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_without_center_are_those_of_the_tables(loss):
    """The tables of losses."""
    model = toy(loss=loss, center=False)
    assert torch.equal(model.loss_D(REAL, FAKE), gan.D_LOSSES[loss](REAL, FAKE))
    assert torch.equal(model.loss_G(REAL, FAKE), gan.G_LOSSES[loss](REAL, FAKE))


def test_update_g_leaves_d_as_it_was():
    """The definition: G's step moves G alone, and D's next step finds its gradients on."""
    model = toy()
    real, y = next(random_batches(model.config))
    before = copies(model)
    model.update_G(real, model.draw(y), y, torch.zeros(8))
    assert_equal(copies(model)["D"], before["D"])
    assert all(p.requires_grad and p.grad is None for p in model.D.parameters())


def test_descend_scales_gradients_and_not_steps():
    """The same step without a scaler of the loss."""
    model = toy(d_steps=2, g_steps=2)
    twin = toy(d_steps=2, g_steps=2)
    model.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=True)
    model.train_step(random_batches(model.config))
    twin.train_step(random_batches(twin.config))
    for p, q in zip(model.G.parameters(), twin.G.parameters()):
        assert gap(p.detach(), q.detach()) < 1e-5


def test_descend_leaves_frozen_weights_out_of_the_average(monkeypatch):
    """By hand: a weight without a gradient has nothing to average over the processes."""
    averaged = []
    monkeypatch.setattr(gan, "average_over_ranks", averaged.extend)
    model = toy()
    model.G.embed.requires_grad_(False)
    model.train_step(random_batches(model.config))
    assert len(averaged) == len([*model.G.parameters(), *model.D.parameters()]) - 1
    assert all(torch.is_tensor(gradient) for gradient in averaged)


@pytest.mark.parametrize("steps, half_life", [(1_000_000, 20_000), (400, 400 * 50 / 20)])
def test_update_average_has_a_half_life_in_images(steps, half_life):
    """By hand: half of the old weights are left after 20,000 images, early on after a twentieth of those seen."""
    model = toy(batch=50)
    before = copies(model)["G_ema"]
    torch.nn.init.normal_(model.G.linear.weight)
    model.steps = steps
    model.update_average()
    left = 0.5 ** (50 / half_life)
    for old, now, p in zip(before, model.G_ema.parameters(), model.G.parameters()):
        assert gap(now, left * old + (1 - left) * p.detach()) < 1e-6


def test_update_average_copies_buffers():
    """The definition: statistics are those of G."""
    model = toy()
    torch.nn.init.normal_(model.G.norm.running_mean)
    model.steps = 1
    model.update_average()
    assert torch.equal(model.G_ema.norm.running_mean, model.G.norm.running_mean)


class Watched(gan.GAN):
    """Keeps what its seams are called with, and ends its run after so many checkpoints."""

    saves_left = math.inf

    def after_log(self, run, record):
        self.records.append((run, record))

    def after_save(self, run):
        self.saved.append((run, self.steps))
        return len(self.saved) >= self.saves_left


@pytest.fixture
def watched(monkeypatch):
    monkeypatch.setattr(Watched, "records", [], raising=False)
    monkeypatch.setattr(Watched, "saved", [], raising=False)
    return Watched


def test_after_log_sees_each_line_of_the_log(config, watched):
    """The file log.jsonl."""
    run = gan.train(replace(config, log_every=1), model=watched)
    assert watched.records == [(run, row) for row in logged(run)]
    assert len(watched.records) == 4


def test_after_save_follows_each_checkpoint(config, watched):
    """By hand: with a grid every second step there are checkpoints at steps 2 and 4."""
    run = gan.train(replace(config, sample_every=2 / 3), model=watched)
    assert watched.saved == [(run, 2), (run, 4)]


def test_after_save_ends_the_run_by_true(config, watched, monkeypatch, capsys):
    """The definition."""
    monkeypatch.setattr(watched, "saves_left", 1)
    run = gan.train(replace(config, sample_every=2 / 3), model=watched)
    assert gan.read_checkpoint(run)["steps"] == 2
    assert "stopped at step 2" in capsys.readouterr().out


PLACES = {
    "statistics": lambda model: model.G.norm.running_var,
    "power iteration": lambda model: model.D.linear.parametrizations.weight[0].u,
    "moments": lambda model: next(iter(model.opt_G.state.values()))["exp_avg"],
    "average": lambda model: model.G_ema.linear.weight.data,
}


@pytest.mark.parametrize("place", PLACES)
def test_save_refuses_what_is_not_finite(place, tmp_path):
    """The definition: the last good checkpoint stays."""
    model = toy()
    model.train_step(random_batches(model.config))
    model.save(tmp_path / "good.pt")
    before = (tmp_path / "good.pt").read_bytes()
    PLACES[place](model).view(-1)[0] = math.inf
    with pytest.raises(gan.UserError, match="step 1 is not finite"):
        model.save(tmp_path / "good.pt")
    assert (tmp_path / "good.pt").read_bytes() == before


def test_load_restores_what_save_wrote(tmp_path):
    """The GAN that was saved."""
    model = toy()
    model.train_step(random_batches(model.config))
    model.save(tmp_path / "x.pt")
    other = toy()
    other.load(tmp_path / "x.pt")
    assert other.steps == 1
    for name in gan.GAN.PARTS:
        assert_equal(getattr(other, name).state_dict(), getattr(model, name).state_dict())


def test_load_takes_new_learning_rates(run, config):
    """The definition: they are among what may change."""
    changed = gan.train(replace(config, lr_G=1e-6, lr_D=1e-5, steps=7), resume=run_copy(run, config))
    content = gan.read_checkpoint(changed)
    assert content["opt_G"]["param_groups"][0]["lr"] == 1e-6
    assert content["opt_D"]["param_groups"][0]["lr"] == 1e-5
    assert json.loads((changed / "config.json").read_text())["lr_G"] == 1e-6


def run_copy(run, config):
    return Path(shutil.copytree(run, Path(config.runs) / "copy"))


def test_load_refuses_another_loss(run, capsys):
    """The definition: what made the weights cannot change."""
    assert "loss cannot change" in fails(capsys, "train", "--resume", run, "--loss", "wgan", "--steps", "9")


def test_load_takes_images_that_moved(own_run, folder, tmp_path):
    """The definition: images are known by their pixels."""
    shutil.copytree(folder, tmp_path / "moved")
    gan.main(["train", "--resume", str(own_run), "--steps", "7", "--data", str(tmp_path / "moved")])
    assert gan.read_checkpoint(own_run)["steps"] == 7


@pytest.mark.parametrize("change", ["a new picture", "a new name"])
def test_load_refuses_other_images(change, own_run, folder, tmp_path, capsys):
    """The definition: images are known by their pixels, classes by their names."""
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    if change == "a new name":
        (other / "rose 1").rename(other / "tulip")
    else:
        to_pil_image(torch.zeros(3, 16, 16, dtype=torch.uint8)).save(other / "rose 1" / "new.png")
    err = fails(capsys, "train", "--resume", own_run, "--steps", "9", "--data", other)
    assert "trained on" in err
    assert "recipes/finetune.py" in err


# ---- gan.py: parts of the networks
def test_channel_widths_double_up_to_the_most():
    """By hand: 64, 32, 16, 8 and 4 pixels."""
    assert gan.channel_widths(64, 32, 200) == [32, 64, 128, 200, 200]


@pytest.mark.parametrize("network", [gan.Generator, gan.Discriminator])
@pytest.mark.parametrize("size", [8, 24, 48, 1024])
def test_channel_widths_refuse_other_sizes(network, size):
    """The definition: powers of two from 16 to 512."""
    with pytest.raises(gan.UserError, match="size must be one of 16, 32"):
        network(size=size)


def test_orthogonal_init_makes_rows_orthonormal_and_biases_zero():
    """The definition: W W^T = I."""
    net = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3), torch.nn.Linear(9, 5))
    gan.orthogonal_init(net)
    for layer in net:
        rows = layer.weight.detach().flatten(1)
        assert gap(rows @ rows.T, torch.eye(len(rows))) < 1e-5
        assert not layer.bias.any()


def spectral_layer(gain=1):
    """Returns a linear layer with spectral norm, the norm, and the weight in float64."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 64)
    norm = gan.SpectralNorm(layer.weight, gain)
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", norm)
    return layer, norm, layer.parametrizations.weight.original.detach().double()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gain", [1, 2])
def test_spectral_norm_divides_in_float32_under_autocast(training, gain):
    """numpy's u W v in float64, of the norm's own u and v."""
    layer, norm, W = spectral_layer(gain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weight = layer.train(training).weight
    assert weight.dtype == torch.float32
    sigma = norm.u.double() @ W @ norm.v.double()
    assert gap(weight.detach(), gain * W / sigma) < 1e-6


def test_spectral_norm_iterates_in_training():
    """The power iteration's definition, in float64: v = W^T u and u = W v, at length 1."""
    layer, norm, W = spectral_layer()
    v = F.normalize(W.T @ norm.u.double(), dim=0)
    u = F.normalize(W @ v, dim=0)
    layer.train()
    layer(torch.ones(1, 64))
    assert gap(norm.u, u) < 1e-6
    assert gap(norm.v, v) < 1e-6


def test_spectral_norm_rests_in_eval_mode():
    """The definition."""
    layer, norm, _ = spectral_layer()
    before = norm.u.clone()
    layer.eval()
    layer(torch.ones(1, 64))
    assert torch.equal(norm.u, before)


def test_spectral_norm_starts_near_the_largest_singular_value():
    """torch.linalg.matrix_norm."""
    layer, _, _ = spectral_layer()
    assert abs(torch.linalg.matrix_norm(layer.weight.detach(), 2) - 1) < 0.05


def test_spectral_norm_allows_a_second_pass_before_the_first_goes_back():
    """The same gradient without the second pass."""
    gradients = []
    for passes in (1, 2):
        layer, _, _ = spectral_layer()
        weights = [layer.weight for _ in range(passes)]
        weights[0].square().sum().backward()
        gradients.append(layer.parametrizations.weight.original.grad)
    assert gap(*gradients) < 1e-6


def upsample_in_torch(x):
    return F.interpolate(x, scale_factor=2, mode="nearest")


CONV = torch.nn.Conv2d(3, 5, 3, padding=1).double()
QUICK = {  # name: (ours, torch's)
    "conv_pool": (lambda x: gan.conv_pool(CONV, x), lambda x: F.avg_pool2d(CONV(x), 2)),
    "upsample_conv": (lambda x: gan.upsample_conv(CONV, x), lambda x: CONV(upsample_in_torch(x))),
    "pool": (gan.pool, lambda x: F.avg_pool2d(x, 2)),
    "upsample": (gan.upsample, upsample_in_torch),
    "box": (lambda x: gan.box(x, 4, 0), lambda x: F.avg_pool2d(x, 2, stride=1)),
}


@pytest.mark.parametrize("name", QUICK)
def test_quick_forms_equal_torch(name):
    """torch's own pooling, interpolation and convolution, in float64."""
    ours, theirs = QUICK[name]
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=seeded(0))
    assert gap(ours(x).detach(), theirs(x).detach()) < 1e-12


@pytest.mark.parametrize("name", QUICK)
def test_quick_forms_equal_torch_in_gradients(name):
    """torch's own pooling, interpolation and convolution, in float64."""
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=seeded(0)).requires_grad_()
    gradients = [torch.autograd.grad(form(x).square().sum(), x)[0] for form in QUICK[name]]
    assert gap(*gradients) < 1e-11


# ---- gan.py: augmentation
def test_augment_color_equals_its_formula(monkeypatch):
    """By numpy: brightness by u - 1/2, saturation by 2 u about the gray, contrast by u + 1/2 about the mean."""
    x = torch.rand(2, 3, 4, 4, generator=seeded(0)) * 2 - 1
    draws = torch.rand(2, 3, generator=seeded(1))
    monkeypatch.setattr(gan, "uniform", lambda x, *shape: draws.view(2, *shape))
    for image, out, (a, b, c) in zip(x.numpy(), gan.augment_color(x).numpy(), draws.numpy()):
        image = image + (a - 0.5)
        gray = image.mean(axis=0)
        image = gray + (image - gray) * 2 * b
        image = image.mean() + (image - image.mean()) * (c + 0.5)
        assert np.abs(out - image).max() < 1e-6


def test_augment_color_draws_for_each_image():
    """The definition: three numbers for each image, each over its whole range."""
    torch.manual_seed(0)
    x = torch.zeros(1000, 3, 4, 4)
    x[:, 0, :2] = 1
    moved = gan.augment_color(x)
    brightness = moved.mean((1, 2, 3)) - 1 / 6
    assert gap(brightness.min(), -0.5) < 0.01
    assert gap(brightness.max(), 0.5) < 0.01
    assert len(brightness.unique()) > 900


def moves_of(moved, x):
    """Lists the moves by up to 2 pixels, padded with zeros, that make moved [C,16,16] of x."""
    padded = F.pad(x, (2, 2, 2, 2))
    found = []
    for i in range(5):
        for j in range(5):
            if torch.equal(moved, padded[:, i : i + 16, j : j + 16]):
                found.append((i, j))
    return found


def test_augment_translation_moves_by_whole_pixels():
    """Slices of the padded image: each image is one of the 25, and each of the 25 occurs."""
    torch.manual_seed(0)
    x = torch.rand(200, 2, 16, 16) + 1
    found = [moves_of(*pair) for pair in zip(gan.augment_translation(x), x)]
    assert all(len(moves) == 1 for moves in found)
    assert len({moves[0] for moves in found}) == 25


def holes(n=100):
    """Returns images without a zero, and what cutout makes of them."""
    torch.manual_seed(0)
    x = torch.rand(n, 2, 16, 16) + 1
    return x, gan.augment_cutout(x)


def test_augment_cutout_changes_nothing_outside():
    """The definition."""
    x, out = holes()
    assert torch.equal(out[out != 0], x[out != 0])


def test_augment_cutout_zeroes_one_square_of_half_the_side():
    """By hand: 8 x 8 pixels in all channels, of which the edge cuts off half at most."""
    _, out = holes()
    hole = out == 0
    assert torch.equal(hole[:, 0], hole[:, 1])
    height = hole[:, 0].any(2).sum(1)
    width = hole[:, 0].any(1).sum(1)
    assert torch.equal(hole[:, 0].sum((1, 2)), height * width)  # a full rectangle
    for side in (height, width):
        assert side.max() == 8
        assert side.min() >= 4


@pytest.mark.parametrize("policy", ["color", "translation", "cutout", "color,translation,cutout"])
def test_diff_augment_is_differentiable(policy):
    """torch.autograd.gradcheck: numerical derivatives."""

    def augment(x):
        torch.manual_seed(0)
        return gan.diff_augment(x, policy)

    x = torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=seeded(0), requires_grad=True)
    assert torch.autograd.gradcheck(augment, x, fast_mode=True)


def test_diff_augment_applies_the_names_in_turn():
    """The functions themselves, by hand."""
    x = torch.rand(4, 3, 16, 16, generator=seeded(0))
    torch.manual_seed(0)
    ours = gan.diff_augment(x, "cutout,color")
    torch.manual_seed(0)
    assert torch.equal(ours, gan.augment_color(gan.augment_cutout(x)))
    assert gan.diff_augment(x, "none") is x


# ---- gan.py: sampling
BOUNDS = [0.1, 0.7, 2.0, 6.0, None]


def many_z(trunc):
    return gan.sample_z(2000, 100, trunc, seeded(0)).flatten().double()


def mass_within(bound):
    """Returns the probability that |z| is at most the bound."""
    return math.erf((bound or math.inf) / math.sqrt(2))


def cdf_gap(z, bound):
    """Returns the Kolmogorov-Smirnov distance of z from the normal restricted to |z| <= bound."""
    cdf = (torch.erf(z.sort().values / math.sqrt(2)) / mass_within(bound) + 1) / 2
    return gap(cdf, torch.linspace(0, 1, len(z), dtype=torch.float64))


@pytest.mark.parametrize("trunc", BOUNDS)
def test_sample_z_has_the_moments_of_the_truncated_normal(trunc):
    """The closed form: the variance is 1 - 2 b p(b) / P(|z| <= b)."""
    z = many_z(trunc)
    bound = trunc or 30
    density = math.exp(-(bound**2) / 2) / math.sqrt(2 * math.pi)
    assert z.abs().max() <= bound
    assert abs(z.mean()) < 0.01
    assert abs(z.var() - (1 - 2 * bound * density / mass_within(bound))) < 0.01


@pytest.mark.parametrize("trunc", BOUNDS)
def test_sample_z_has_the_distribution_of_the_truncated_normal(trunc):
    """The closed form of the distribution, bounds included: a pile-up anywhere would be a jump."""
    assert cdf_gap(many_z(trunc), trunc) < 0.005


@pytest.mark.parametrize("trunc", [0, -1.0, math.inf, math.nan])
def test_sample_z_refuses_bounds_that_are_none(trunc):
    """The definition: a positive number."""
    with pytest.raises(gan.UserError, match="trunc must be positive"):
        gan.sample_z(1, 8, trunc)


def named(*classes):
    """Makes a toy generator of classes with these names."""
    torch.manual_seed(0)
    G = gan.Generator(16, 3, 4, 8, 8, len(classes)).eval()
    G.classes = list(classes)
    return G


def test_choose_classes_goes_through_them_in_turn():
    """By hand."""
    G = named(*NAMES)
    assert gan.choose_classes(G, 5, ["rose 10", 0]).tolist() == [2, 0, 2, 0, 2]


def test_choose_classes_draws_evenly():
    """The definition: each of three classes has a third, up to chance."""
    drawn = gan.choose_classes(named(*NAMES), 3000, seed=1)
    assert all(abs(count - 1000) < 100 for count in drawn.bincount())
    assert torch.equal(drawn, gan.choose_classes(named(*NAMES), 3000, seed=1))


@pytest.mark.parametrize("which", ["tulip", "3", 3, -1, "-1", "1.0", ""])
def test_class_index_refuses_unknown_classes(which):
    """The definition: a name, or a number from 0 to 2."""
    with pytest.raises(gan.UserError, match="no class"):
        gan.class_index(named(*NAMES), which)


@pytest.mark.parametrize("which, index", [("rose 9", 1), ("1", 1), (1, 1), (np.int64(1), 1), (torch.tensor(1), 1)])
def test_class_index_takes_names_and_numbers(which, index):
    """By hand."""
    assert gan.class_index(named(*NAMES), which) == index


def test_class_index_of_names_that_are_numbers():
    """The definition: text is a name, and a number counts from 0."""
    G = named("1", "2", "3")
    assert gan.class_index(G, "1") == 0
    assert gan.class_index(G, 1) == 1
    with pytest.raises(gan.UserError, match="no class 0"):
        gan.class_index(G, "0")


@pytest.mark.parametrize("trunc", [None, 0.7])
def test_standing_generator_has_the_statistics_of_its_bound(trunc):
    """20,000 other z of the same bound."""
    torch.manual_seed(0)
    G = gan.Generator(16, 3, 4, 8, 8).eval()
    norm = gan.standing_generator(G, trunc).blocks[0].norm1.norm
    h = G.linear(gan.sample_z(20_000, 8, trunc)).detach().view(-1, 8, 4, 4)
    assert gap(norm.running_mean, h.mean((0, 2, 3))) < 0.02
    assert gap(norm.running_var, h.var((0, 2, 3))) < 0.03


def test_standing_generator_is_a_copy():
    """The generator as it was."""
    G = named(*NAMES)
    before = copy.deepcopy(G.state_dict())
    standing = gan.standing_generator(G, 0.7)
    torch.nn.init.ones_(standing.linear.weight)
    assert_equal(G.state_dict(), before)
    assert G.trunc is None
    assert standing.trunc == 0.7


def test_to_uint8_is_the_inverse_of_to_float():
    """By hand, for all 256 values."""
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(gan.to_uint8(gan.to_float(pixels)), pixels)
    assert gan.to_float(pixels).aminmax() == (-1, 1)


@pytest.mark.parametrize("trunc", [None, 0.7])
@pytest.mark.parametrize("z_dim", [5, 8])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_generate_is_the_same_for_every_n(trunc, z_dim, num_classes):
    """A longer call; sums in another order may round another way."""
    torch.manual_seed(0)
    G = gan.standing_generator(gan.Generator(16, 1, 4, 8, z_dim, num_classes), trunc)
    three = gan.generate(G, 3, seed=1)
    seven = gan.generate(G, 7, seed=1)
    assert three.shape == (3, 1, 16, 16)
    assert three.dtype == torch.uint8
    assert gap(three, seven[:3]) <= 1


def test_generate_depends_on_seed_and_classes(run):
    """The same call again, and others."""
    G, _ = gan.load_generator(run)
    images = gan.generate(G, 5, [2, 1], seed=3)
    assert torch.equal(images, gan.generate(G, 5, [2, 1, 2, 1, 2], seed=3))
    assert not torch.equal(images, gan.generate(G, 5, [0, 1], seed=3))
    assert not torch.equal(images, gan.generate(G, 5, [2, 1], seed=4))


def test_generate_takes_names(run):
    """The same classes by number."""
    G, _ = gan.load_generator(run)
    assert torch.equal(gan.generate(G, 4, ["rose 10", "rose 1"]), gan.generate(G, 4, [2, 0]))


@pytest.mark.parametrize("classes", [[3], [-1], [], ["tulip"]])
def test_generate_refuses_unknown_classes(run, classes):
    """The definition: names or numbers of the run's classes."""
    G, _ = gan.load_generator(run)
    with pytest.raises(gan.UserError, match="class"):
        gan.generate(G, 1, classes)


def test_generate_calls_the_generator_as_it_is(run):
    """A call of G itself: a loaded generator is ready to be called."""
    G, _ = gan.load_generator(run)
    z = gan.sample_z(1, 8, None, seeded(1))
    y = gan.choose_classes(G, 1, seed=1)
    assert torch.equal(gan.to_uint8(G(z, y)), gan.generate(G, 1, seed=1))


def recorded(G):
    """Returns a list to which G, and any copy of it, appends each (z, y) that it is called with."""
    calls = []
    G.register_forward_pre_hook(lambda net, inputs: calls.append(inputs))
    return calls


def test_sample_grid_has_a_row_per_class():
    """By hand: the same z down each column."""
    G = named(*NAMES)
    calls = recorded(G)
    grid = gan.sample_grid(G, columns=4)
    [(z, y)] = calls
    assert grid.shape == (3, 3 * 18 + 2, 4 * 18 + 2)
    assert y.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert torch.equal(z, z[:4].repeat(3, 1))
    assert len(z[:4].unique(dim=0)) == 4


def test_sample_grid_takes_named_classes():
    """By hand: a row each, in their order, with the z of the whole grid."""
    G = named(*NAMES)
    calls = recorded(G)
    gan.sample_grid(G, columns=4, classes=[NAMES[2], 0])
    gan.sample_grid(G, columns=4)
    [(z, y), (all_z, _)] = calls
    assert y.tolist() == [2] * 4 + [0] * 4
    assert torch.equal(z, all_z[:8])


def test_sample_grid_refuses_no_classes():
    """The definition, as generate does."""
    with pytest.raises(gan.UserError, match="no classes were named"):
        gan.sample_grid(named(*NAMES), classes=[])


def test_sample_grid_without_classes_has_eight_rows():
    """By hand: all z differ."""
    G = gan.Generator(16, 3, 4, 8, 8).eval()
    calls = recorded(G)
    gan.sample_grid(G, columns=4)
    [(z, _)] = calls
    assert len(z.unique(dim=0)) == 32


def walk(classes=None):
    """Returns z and y of a walk of 3 rows and 5 columns, and the ends of its rows."""
    G = named(*NAMES)
    calls = recorded(G)
    walked = gan.interpolate(G, classes, rows=3, columns=5, seed=4)
    [(z, y)] = calls
    assert walked.shape == (3, 5, 3, 16, 16)
    return z, y, gan.sample_z(6, 8, generator=seeded(4))


def test_interpolate_goes_from_one_z_to_another():
    """The noise of its seed: a row's ends are random z, and its steps are as long as they."""
    z, _, ends = walk()
    assert gap(z[0::5], ends[:3]) < 1e-5
    assert gap(z[4::5], ends[3:]) < 1e-5
    lengths = z[:5].norm(dim=1)
    first, last = ends[0].norm(), ends[3].norm()
    assert min(first, last) * 0.95 < lengths.min()
    assert lengths.max() < max(first, last) * 1.25


def test_interpolate_stays_in_a_class_per_row():
    """By hand: the classes in turn."""
    _, y, _ = walk(["rose 10", 0])
    assert y.tolist() == [2] * 5 + [0] * 5 + [2] * 5


def test_arc_of_a_quarter_turn():
    """By hand: 0, 30, 60 and 90 degrees."""
    points = gan.arc(*torch.eye(2).split(1), 4)[0]
    root = math.sqrt(3) / 2
    assert gap(points, [[1, 0], [root, 0.5], [0.5, root], [0, 1]]) < 1e-6


def test_tile_places_images_in_rows():
    """By hand: two white pixels between and around them."""
    images = torch.arange(3, dtype=torch.uint8)[:, None, None, None].expand(3, 1, 4, 4)
    picture = gan.tile(images, columns=2)
    expected = torch.full((14, 14), 255, dtype=torch.uint8)
    expected[2:6, 2:6] = 0
    expected[2:6, 8:12] = 1
    expected[8:12, 2:6] = 2
    expected[8:12, 8:12] = picture[0, 8, 8]  # what stands in for no image
    assert torch.equal(picture, expected.expand(3, 14, 14))


# ---- gan.py: files and messages
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("place", ["write", "os.replace"])
def test_atomic_write_keeps_the_old_file_until_the_new_one_is_whole(error, place, tmp_path, monkeypatch):
    """The definition: a failure leaves the old file, and nothing beside it."""
    path = tmp_path / "x"
    path.write_text("old")
    if place == "os.replace":
        monkeypatch.setattr(os, "replace", raising(error))
    with pytest.raises(type(error)), gan.atomic_write(path) as file:
        file.write(b"new")
        if place == "write":
            raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]
    if isinstance(error, OSError):
        assert error.filename == str(path)


def test_atomic_write_makes_folders(tmp_path):
    """The definition."""
    with gan.atomic_write(tmp_path / "a" / "b" / "x") as file:
        file.write(b"new")
    assert (tmp_path / "a" / "b" / "x").read_bytes() == b"new"


def test_reading_reports_any_error_in_a_sentence():
    """The definition; torch's advice to unpickle a file is left out."""
    with pytest.raises(gan.UserError) as caught, gan.reading("x.pt", "checkpoint"):
        raise RuntimeError("bad magic number. If you trust the file, unpickle it")
    assert str(caught.value) == "x.pt is not a readable checkpoint: RuntimeError: bad magic number"


@pytest.mark.parametrize("error", [MemoryError(), ImportError("no torch"), RuntimeError("can't allocate memory")])
def test_reading_passes_errors_that_are_not_of_the_file(error):
    """The definition."""
    with pytest.raises(type(error)) as caught, gan.reading("x.pt", "checkpoint"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("suffix", ["png", "bmp", "PNG"])
def test_write_picture_in_the_format_of_its_name(suffix, tmp_path):
    """Pillow's reader."""
    path = tmp_path / f"x.{suffix}"
    gan.write_picture(path, color_picture())
    image = Image.open(path)
    assert image.format == suffix.upper()
    assert torch.equal(pil_to_tensor(image), color_picture())


def test_read_rows_skips_half_a_line(tmp_path):
    """By hand: what a killed process leaves."""
    path = tmp_path / "x.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert gan.read_rows(path) == [{"step": 1}]
    assert gan.read_rows(tmp_path / "nowhere.jsonl") == []


def test_read_rows_skips_what_is_no_row(tmp_path):
    """By hand: binary, text, null and a number of more digits than Python reads."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xff\xfe\nwords\nnull\n" + 5000 * b"9" + b'\n{"step": 1}\n')
    assert gan.read_rows(path) == [{"step": 1}]


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "webp", "tif", "gif"])
def test_write_picture_takes_any_of_pillows_formats(suffix, tmp_path):
    """Pillow, which reads the format from the bytes; JPEG and GIF may lose some of a gray picture."""
    gan.write_picture(tmp_path / f"x.{suffix}", torch.full((3, 8, 8), 130, dtype=torch.uint8))
    with Image.open(tmp_path / f"x.{suffix}") as image:
        assert image.format == Image.registered_extensions()[f".{suffix.lower()}"]
        assert gap(pil_to_tensor(image.convert("L")).float(), torch.full((1, 8, 8), 130.0)) <= 2


def test_write_picture_keeps_the_reason_of_pillow(tmp_path):
    """By hand: XBM holds black and white only."""
    with pytest.raises(OSError, match="XBM"):
        gan.write_picture(tmp_path / "x.xbm", torch.zeros(3, 8, 8, dtype=torch.uint8))


def test_write_picture_refuses_other_names(tmp_path):
    """The definition."""
    with pytest.raises(gan.UserError, match="pictures end in"):
        gan.write_picture(tmp_path / "x.txt", torch.zeros(3, 8, 8, dtype=torch.uint8))
    assert list(tmp_path.iterdir()) == []


def test_append_row_stands_alone_behind_half_a_line(tmp_path):
    """By hand: what a killed process leaves."""
    path = tmp_path / "x.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    gan.append_row(path, {"step": 3})
    gan.append_row(path, {"step": 4})
    assert gan.read_rows(path) == [{"step": 1}, {"step": 3}, {"step": 4}]


def test_append_row_loses_nothing_of_several_at_once(tmp_path):
    """By hand: 400 rows by eight writers, each with a file of its own."""
    path = tmp_path / "x.jsonl"
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda i: gan.append_row(path, {"row": i, "text": "x" * 500}), range(400)))
    assert sorted(row["row"] for row in gan.read_rows(path)) == list(range(400))


def test_say_escapes_what_is_no_text(capsys):
    """By hand: one line stays one, and a file's bytes stay visible."""
    gan.say("two\nlines and latin1-" + os.fsdecode(b"\xe9") + " and 玫瑰")
    assert capsys.readouterr().out == "two\\nlines and latin1-\\udce9 and 玫瑰\n"


def test_main_escapes_what_a_terminal_cannot_show(tmp_path):
    """By hand: a class in Chinese, in a terminal of the code page 1252."""
    for name in ("\u82b1", "b"):
        bmp_folder(tmp_path / name, 99)
    argv = ["train", "--data", str(tmp_path), *TOY_FLAGS, "--steps", "1"]
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    done = command(HERE / "gan.py", *argv, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "\\u82b1" in done.stdout and "done at step 1" in done.stdout


@pytest.mark.parametrize("error", [BrokenPipeError(), ValueError("I/O operation on closed file")])
def test_say_does_without_a_reader(error, monkeypatch):
    """The definition."""
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=raising(error)))
    gan.say("a line")


@pytest.fixture
def cores(monkeypatch):
    """Gives Cores of 4 threads and a function that lets 2 seconds pass, in which threads waited for so many cores."""
    machine = SimpleNamespace(now=0.0, waited=0.0, threads=4, ready=0)
    monkeypatch.setattr(time, "monotonic", lambda: machine.now)
    monkeypatch.setattr(gan, "seconds_waited", lambda: machine.waited)
    monkeypatch.setattr(gan, "threads_ready", lambda: machine.ready)
    monkeypatch.setattr(torch, "get_num_threads", lambda: machine.threads)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: setattr(machine, "threads", n))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = gan.Cores()
    cores.activate()

    def after(waiting, ready=0):
        machine.now += 2
        machine.waited += 2 * waiting
        machine.ready = ready
        cores.adapt()
        return machine.threads

    return cores, after


@pytest.mark.parametrize("waiting, threads", [(0, 4), (0.2, 4), (0.3, 3), (1, 3), (1.4, 2), (3, 1), (40, 1)])
def test_cores_drop_the_threads_that_wait(waiting, threads, cores):
    """By hand: one thread less for each core that was missing."""
    _, after = cores
    assert after(waiting) == threads


def test_cores_take_threads_back_one_by_one(cores, capsys):
    """By hand: one for each three times that a core was free; another program's thread takes a core."""
    _, after = cores
    after(3)
    assert [after(0) for _ in range(6)] == [1, 1, 2, 2, 2, 3]
    assert [after(0, ready=1) for _ in range(4)] == [3] * 4
    assert [after(0) for _ in range(4)] == [3, 3, 4, 4]
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == [f"using {n} of 4 threads, by the load of other programs" for n in (1, 2)]


def test_cores_do_not_flap_beside_another_program(cores):
    """By hand: two threads wait for each other beside one busy program on four cores, of which two are lent to us."""
    _, after = cores
    assert after(2) == 2
    assert {after(0.1, ready=2) for _ in range(20)} == {2}


def test_cores_keep_the_threads_of_a_program_that_imports_the_file(cores):
    """The definition: only the commands turn it on."""
    ours, after = cores
    ours.active = False
    assert after(3) == 4


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("program", [gan, metrics])
def test_main_keeps_a_number_of_threads_that_was_given(program, given, monkeypatch, capsys):
    """The definition: OMP_NUM_THREADS is the user's word."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(program, "CORES", program.Cores())
    with contextlib.suppress(SystemExit):
        program.main(["sample", "--run", "nowhere"] if program is gan else ["nowhere", "nowhere"])
    assert program.CORES.active is not given


WAITING = f"""
import os, subprocess, sys, time
sys.path.insert(0, {str(HERE)!r})
import gan
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
    before = gan.seconds_waited()
    began = time.monotonic()
    while time.monotonic() < began + 2:
        pass
    print(gan.seconds_waited() - before, gan.threads_ready())
    other.kill()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone says how long threads wait")
@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone says how long threads wait")
def test_seconds_waited_skips_threads_that_have_ended(monkeypatch):
    """By hand: one of two files cannot be read any more."""
    files = [Path("/proc/self/schedstat"), Path("/proc/self/task/0/schedstat")]
    monkeypatch.setattr(Path, "glob", lambda self, pattern: files)
    assert gan.seconds_waited() >= 0


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone says how long threads wait")
def test_seconds_waited_beside_a_busy_process_on_the_same_core(tmp_path):
    """By hand: the core is shared for 2 seconds, so each waits for about one; the other is ready to run."""
    (tmp_path / "waiting.py").write_text(WAITING)
    waited, ready = map(float, command("waiting.py", cwd=tmp_path).stdout.split())
    assert 0.5 < waited < 2
    assert ready >= 1


# ---- gan.py: data
def number(n):
    return n.to_bytes(4, "big")


def write_mnist(root):
    """Writes MNIST's format by its description: three gray digits, 7, 0 and 2."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.repeat(np.array([10, 20, 30], np.uint8), 28 * 28).tobytes()
    header = b"".join(map(number, (2051, 3, 28, 28)))
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pixels)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(number(2049) + number(3) + b"\x07\x00\x02")


def test_load_torchvision_reads_mnist(tmp_path):
    """MNIST's own description of its files, by hand."""
    write_mnist(tmp_path)
    images, labels, classes = gan.load_images("mnist", 32, 1, str(tmp_path))
    assert images.shape == (3, 1, 32, 32)
    assert images.float().mean((1, 2, 3)).tolist() == [10, 20, 30]
    assert [classes[y] for y in labels] == ["7", "0", "2"]


def test_load_torchvision_reads_colours(monkeypatch):
    """torchvision's CIFAR10, whose data is an array [N,32,32,3], targets a list and classes words."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3)).astype(np.uint8)
    dataset = SimpleNamespace(data=pixels, targets=[1, 0, 1, 1], classes=["airplane", "automobile"])
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", lambda root, download: dataset)
    images, labels, classes = gan.load_images("cifar10", 32, 3)
    assert np.array_equal(images.permute(0, 2, 3, 1), pixels)
    assert labels.tolist() == [1, 0, 1, 1]
    assert classes == ["airplane", "automobile"]
    assert gan.hash_of(images) == hashlib.sha256(pixels.transpose(0, 3, 1, 2).tobytes()).hexdigest()


def test_load_torchvision_says_that_a_download_failed(monkeypatch, tmp_path):
    """torchvision's own message of several lines, of which the first ends with a colon."""
    failure = RuntimeError("Error downloading train-images-idx3-ubyte.gz:\nTried https://mirror, got: offline")
    monkeypatch.setattr(torchvision.datasets, "MNIST", raising(failure))
    with pytest.raises(gan.UserError, match="nor can it be downloaded.*train-images-idx3-ubyte.gz$"):
        gan.load_images("mnist", 32, 1, str(tmp_path))


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """Lets the download give an archive of 1,360 pictures, each of its class's shade; returns a folder for data."""
    path = tmp_path / "17flowers.tgz"
    with tarfile.open(path, "w:gz") as file:
        for i in range(1360):
            picture = io.BytesIO()
            Image.new("L", (16, 16), i // 80).save(picture, "png")
            entry = tarfile.TarInfo(f"jpg/image_{i + 1:04d}.jpg")
            entry.size = len(picture.getvalue())
            file.addfile(entry, io.BytesIO(picture.getvalue()))
    monkeypatch.setattr(gan, "FLOWERS_MD5", hashlib.md5(path.read_bytes()).hexdigest())
    utils = torchvision.datasets.utils
    monkeypatch.setattr(utils, "_get_redirect_url", lambda url, **options: url)
    monkeypatch.setattr(utils, "_urlretrieve", lambda url, file, **options: shutil.copyfile(path, file))
    return tmp_path / "data"


def test_load_images_arranges_the_flowers_by_class(archive):
    """The order of the archive: 80 pictures of each class; nothing is left beside the folder."""
    images, labels, classes = gan.load_images("flowers17", 16, 3, archive)
    assert sorted(classes) == sorted(gan.FLOWERS_CLASSES)
    assert labels.bincount().tolist() == [80] * 17
    shades = torch.tensor([gan.FLOWERS_CLASSES.index(classes[label]) for label in labels])
    assert torch.equal(images[:, 0, 0, 0], shades.to(torch.uint8))
    assert [path.name for path in archive.iterdir()] == ["flowers17"]


def test_load_images_fetches_the_flowers_once(archive, monkeypatch):
    """The definition."""
    first, _, _ = gan.load_images("flowers17", 16, 3, archive)
    monkeypatch.setattr(gan, "download_and_extract_archive", raising(KeyError()))
    assert torch.equal(gan.load_images("flowers17", 16, 3, archive)[0], first)


def test_load_images_refuses_a_damaged_archive_of_the_flowers(archive, monkeypatch):
    """Its MD5, which is not that of the archive; nothing is left behind."""
    monkeypatch.setattr(gan, "FLOWERS_MD5", "0" * 32)
    with pytest.raises(gan.UserError, match="not a readable archive of flowers"):
        gan.load_images("flowers17", 16, 3, archive)
    assert list(archive.iterdir()) == []


def test_fetch_flowers_takes_the_folder_of_a_faster_process(archive, monkeypatch):
    """The definition: the folder that appeared meanwhile stays, and nothing is left beside it."""
    download = gan.download_and_extract_archive

    def slow(*args, **options):
        download(*args, **options)
        (archive / "flowers17").mkdir()

    monkeypatch.setattr(gan, "download_and_extract_archive", slow)
    assert gan.fetch_flowers(archive / "flowers17") == archive / "flowers17"
    assert [path.name for path in archive.iterdir()] == ["flowers17"]


@pytest.fixture
def messy(folder, tmp_path):
    """Copies the folder of pictures, and adds links, rings of links, a hidden folder and three files that are junk."""
    data = tmp_path / "data"
    linked = tmp_path / "linked"
    shutil.copytree(folder, data)

    whole = (folder / "rose 9" / "1.png").read_bytes()
    (data / "rose 9" / "broken.png").write_bytes(whole[:60])
    (data / "rose 9" / "program.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(data / "float.tif")
    bmp_folder(data / ".hidden", 9)

    (data / "rose 1").rename(linked)
    (data / "rose 1").symlink_to(linked)
    (linked / "up").symlink_to(data)
    (linked / "beside").symlink_to(data / "rose 9")  # whose pictures stay in their own class
    (data / "rose 10" / "up").symlink_to(linked)
    (data / "gone").symlink_to(tmp_path / "nowhere")
    return data


def bmp_folder(path, value):
    """Writes four pictures of one value whose sizes and times do not depend on it."""
    path.mkdir()
    for i in range(4):
        to_pil_image(torch.full((3, 16, 16), value, dtype=torch.uint8)).save(path / f"{i}.bmp")
        os.utime(path / f"{i}.bmp", (1, 1))
    return str(path)


def test_load_folder_finds_each_picture_once(messy):
    """By hand: 8 pictures a class, through links too."""
    images, labels, classes = gan.load_images(str(messy), 16, 3)
    assert images.shape == (24, 3, 16, 16)
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert labels.bincount().tolist() == [8, 8, 8]
    assert classes == NAMES


def test_load_folder_keeps_pictures_and_labels_together(messy):
    """By hand: the mean shade of each class."""
    images, labels, _ = gan.load_images(str(messy), 16, 3)
    means = torch.stack([images[labels == c].float().mean() for c in range(3)])
    assert gap(means, [19.5, 89.5, 159.5]) < 3


def test_load_folder_names_what_it_skips_each_time(messy, capsys):
    """By hand: three of 27 files; the second time from the cache."""
    for _ in range(2):
        gan.load_images(str(messy), 16, 3)
        out = capsys.readouterr().out
        assert "skipped 3 of 27" in out
        assert "float.tif (floating-point" in out
        assert "program.png" in out
        assert "broken.png" in out


def test_load_folder_has_no_classes_beside_a_stray_picture(messy, capsys):
    """The definition: every image must lie in a sub-folder."""
    to_pil_image(torch.zeros(3, 16, 16, dtype=torch.uint8)).save(messy / "stray.png")
    images, labels, classes = gan.load_images(str(messy), 16, 1)
    assert images.shape == (25, 1, 16, 16)
    assert labels.tolist() == [0] * 25
    assert classes == []
    assert "stray.png lies beside" in capsys.readouterr().out


def test_load_folder_leaves_runs_out_and_says_so(run, tmp_path, capsys):
    """The definition: a run's own pictures are no data."""
    shutil.copytree(run, tmp_path / "runs" / "0000")
    bmp_folder(tmp_path / "pictures", 200)
    assert len(gan.load_images(str(tmp_path), 16, 3)[0]) == 4
    assert "left out the runs runs/0000" in capsys.readouterr().out


def test_load_folder_refuses_a_run(run):
    """The definition: its pictures are no data."""
    with pytest.raises(gan.UserError, match="is a run of gan.py"):
        gan.load_images(str(run), 16, 3)


@pytest.mark.parametrize("stray", ["log.jsonl", "checkpoint.pt", "config.json"])
def test_load_folder_takes_pictures_beside_a_stray_file(stray, tmp_path):
    """The definition: config.json and checkpoint.pt together make a run, nothing else does."""
    data = Path(bmp_folder(tmp_path / "data", 200))
    (data / stray).write_text("{}")
    assert len(gan.load_images(str(data), 16, 3)[0]) == 4


def test_load_folder_skips_the_sheets_of_samples_and_takes_samples(run, tmp_path):
    """The definition: a sheet is known by the text in it, whatever its name."""
    gan.main(["sample", "--run", str(run), "--n", "3", "--out", str(tmp_path / "data")])
    gan.main(["sample", "--run", str(run), "--n", "3", "--out", str(tmp_path / "sheet.png")])
    [folder] = {path.parent for path in (tmp_path / "data").rglob("00000.png")}
    shutil.move(tmp_path / "sheet.png", folder / "a photo.png")
    images, _, _ = gan.load_images(str(tmp_path / "data"), 16, 3)
    assert len(images) == 3


@pytest.mark.parametrize("suffix", ["gif", "tif", "png", "webp"])
def test_load_folder_says_how_many_pages_are_left_out(suffix, tmp_path, capsys):
    """By hand: five pages, of which the first is white."""
    pages = [Image.new("RGB", (16, 16), (shade, shade, shade)) for shade in (255, 9, 80, 120, 200)]
    pages[0].save(tmp_path / f"x.{suffix}", save_all=True, append_images=pages[1:])
    images, _, _ = gan.load_images(str(tmp_path), 16, 3)
    assert len(images) == 1
    assert images.min() > 250
    assert "left out 4 pages" in capsys.readouterr().out


@pytest.mark.parametrize("value, dark", [(10, True), (200, False)])
def test_load_folder_says_when_images_are_dark(value, dark, tmp_path, capsys):
    """By hand."""
    gan.load_images(bmp_folder(tmp_path / "data", value), 16, 3)
    assert ("dark, from 0 to 10 of 255" in capsys.readouterr().out) == dark


def test_load_folder_says_that_images_are_dark_beside_a_bright_one(tmp_path, capsys):
    """By hand: one bright picture among five changes nothing for the others."""
    data = Path(bmp_folder(tmp_path / "data", 10))
    to_pil_image(torch.full((3, 16, 16), 255, dtype=torch.uint8)).save(data / "bright.png")
    gan.load_images(str(data), 16, 3)
    assert "dark, from 0 to 10 of 255" in capsys.readouterr().out


def test_load_folder_takes_names_that_are_no_text(tmp_path, capsys, monkeypatch):
    """By hand: bytes that are no UTF-8, and a newline, in the names of classes and files."""
    root = os.fsencode(tmp_path)
    for name in (b"latin1-\xe9", b"two\nlines"):
        bmp_folder(Path(os.fsdecode(root + b"/" + name)), 9)
    Path(os.fsdecode(root + b"/two\nlines/broken\xff.png")).write_text("no image")
    run = gan.train(gan.Config(**TOY, data=str(tmp_path), cond=True, steps=1, runs=str(tmp_path / "runs")))
    out = capsys.readouterr().out
    assert len(gan.load_generator(run)[0].classes) == 2
    assert "two\\nlines/broken" in out
    assert "\ufffd" not in out


@pytest.fixture
def counted(folder, tmp_path, monkeypatch):
    """Gives a folder of 8 pictures with a cache of its own, and a loader: (images, how many files were decoded)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = Path(shutil.copytree(folder / "rose 1", tmp_path / "data"))
    calls = []
    read_image = gan.read_image
    monkeypatch.setattr(gan, "read_image", lambda path, least: calls.append(path) or read_image(path, least))

    def load(size=16, channels=3):
        calls.clear()
        images, _, _ = gan.load_images(str(data), size, channels)
        return images.clone(), len(calls)

    return data, load


def test_decode_cached_decodes_once(counted):
    """The images as they were decoded."""
    _, load = counted
    first, decoded = load()
    again, decoded_again = load()
    assert decoded == 8
    assert decoded_again == 0
    assert torch.equal(first, again)


def test_decode_cached_knows_sizes_and_channels(counted):
    """The definition: each shape has a cache of its own."""
    _, load = counted
    assert load()[1] == 8
    assert load(size=32)[1] == 8
    assert load(channels=1)[1] == 8
    assert load()[1] == 0


def test_decode_cached_sees_a_changed_picture(counted):
    """By hand: a white picture."""
    data, load = counted
    load()
    to_pil_image(torch.full((3, 20, 18), 255, dtype=torch.uint8)).save(data / "3.png")
    images, decoded = load()
    assert decoded == 8
    assert (images[3] == 255).all()


def test_decode_cached_sees_a_changed_time_and_a_lost_picture(counted):
    """The definition."""
    data, load = counted
    load()
    os.utime(data / "3.png", (1, 1))
    assert load()[1] == 8
    (data / "3.png").unlink()
    assert len(load()[0]) == 7


def test_decode_cached_makes_a_damaged_cache_anew(counted, tmp_path):
    """The definition: half a file is none, and nothing is left beside it."""
    _, load = counted
    load()
    [cache] = (tmp_path / "cache").rglob("*.pt")
    cache.write_bytes(cache.read_bytes()[:-1])
    assert load()[1] == 8
    assert load()[1] == 0
    assert list((tmp_path / "cache").rglob("*.part")) == []


@pytest.mark.parametrize("content", [{}, 7, "images alone", [1, 2, 3]])
def test_decode_cached_makes_a_cache_of_another_form_anew(content, counted, tmp_path):
    """The definition."""
    _, load = counted
    images, _ = load()
    [cache] = (tmp_path / "cache").rglob("*.pt")
    torch.save(images if content == "images alone" else content, cache)
    assert load()[1] == 8
    assert load()[1] == 0


def test_decode_cached_removes_what_killed_processes_left(counted, tmp_path):
    """By hand: a part of two days ago goes, one of now and another program's stay."""
    _, load = counted
    folder = tmp_path / "cache" / "gan.py"
    folder.mkdir(parents=True)
    names = [".0123456789abcdef.part", ".fedcba9876543210.part", ".other.part"]
    for name in names:
        (folder / name).write_text("half")
    for name in (names[0], names[2]):
        os.utime(folder / name, (time.time() - 172_800,) * 2)
    load()
    assert sorted(path.name for path in folder.glob(".*.part")) == sorted(names[1:])


def test_decode_cached_knows_folders_of_equal_sizes_and_times(tmp_path):
    """By hand: the shade of each."""
    for name, value in (("A", 10), ("B", 200)):
        images, _, _ = gan.load_images(bmp_folder(tmp_path / name, value), 16, 3)
        assert images.float().mean() == value


def test_decode_cached_does_without_a_place_for_the_cache(counted, monkeypatch):
    """The definition: it costs time alone."""
    _, load = counted
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert len(load()[0]) == 8
    assert load()[1] == 8


PASSING = [MemoryError(), OSError(errno.EIO, "I/O error"), PermissionError(13, "no")]


@pytest.mark.parametrize("error", PASSING)
def test_decode_passes_errors_that_are_not_of_a_file(error, folder, tmp_path, monkeypatch):
    """The definition: they end the call, and no cache holds what was not read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", raising(error))
        with pytest.raises(type(error)):
            gan.load_images(str(folder), 16, 3)
    assert len(gan.load_images(str(folder), 16, 3)[0]) == 24


def test_decode_crops_to_the_centre_square(tmp_path):
    """By hand: of 12 x 8 pixels, rows 2 to 9."""
    to_pil_image(color_picture()).save(tmp_path / "x.png")
    images, _, _ = gan.decode(tmp_path, [Path("x.png")], 8, 3)
    assert torch.equal(images[0], color_picture()[:, 2:10])


def test_fit_makes_gray_and_colour():
    """ITU-R 601's luma: 0.299 R + 0.587 G + 0.114 B."""
    gray = gan.fit(color_picture()[:, :8], 8, 1)
    red, green, blue = color_picture()[:, :8].double()
    assert gap(gray[0], 0.299 * red + 0.587 * green + 0.114 * blue) <= 0.51
    assert torch.equal(gan.fit(gray, 8, 3), gray.expand(3, 8, 8))


def test_natural_puts_9_before_10():
    """By hand."""
    assert sorted(["b10", "b9", "B1", "a"], key=gan.natural) == ["a", "B1", "b9", "b10"]


def test_list_files_enters_each_folder_once(messy):
    """By hand: 24 pictures and three other files; nothing hidden, nothing by two ways."""
    files, runs = gan.list_files(messy)
    assert runs == []
    assert len(files) == len(set(files)) == 27
    assert len({(messy / file).resolve() for file in files}) == 27
    assert {file.parts[0] for file in files} == {*NAMES, "float.tif"}


def color_picture():
    """Draws [3,12,8]: red above, blue below, a green column on the left."""
    image = torch.zeros(3, 12, 8, dtype=torch.uint8)
    image[0, :6] = 200
    image[2, 6:] = 100
    image[:, :, :2] = torch.tensor([0, 250, 0], dtype=torch.uint8)[:, None, None]
    return image


@pytest.mark.parametrize("kind", "RGB.png L.png 1.png P.png P.gif RGBA.png LA.png RGB.bmp CMYK.tif".split())
def test_read_image_decodes_each_lossless_mode_exactly(kind, tmp_path):
    """Pillow's own conversion, before the file was written."""
    mode, suffix = kind.split(".")
    image = to_pil_image(color_picture()).convert(mode)
    image.save(tmp_path / f"x.{suffix}")
    pixels, pages = gan.read_image(tmp_path / f"x.{suffix}")
    decoded = pixels.expand(3, -1, -1)
    assert pages == 1
    assert decoded.dtype == torch.uint8
    assert torch.equal(decoded, pil_to_tensor(image.convert("RGB")))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_read_image_scales_16_bits_to_8(suffix, tmp_path):
    """By hand: 257 n stands for n."""
    gray = color_picture()[:1]
    Image.fromarray(gray[0].numpy().astype(np.uint16) * 257).save(tmp_path / f"x.{suffix}")
    assert torch.equal(gan.read_image(tmp_path / f"x.{suffix}")[0], gray)


def save_jpeg(image, path, **options):
    image.save(path, quality=100, subsampling=0, **options)
    return gan.read_image(path)[0].float()


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_read_image_decodes_jpegs(mode, tmp_path):
    """Pillow's own conversion, up to the loss of the format."""
    image = to_pil_image(color_picture()).convert(mode)
    expected = pil_to_tensor(image.convert("RGB"))
    decoded = save_jpeg(image, tmp_path / "x.jpg")
    assert (decoded - expected).abs().mean() < 4


def test_read_image_turns_what_the_camera_turned(tmp_path):
    """EXIF's definition: a viewer shows orientation 6 turned by 90 degrees to the right."""
    image = to_pil_image(color_picture())
    exif = image.getexif()
    exif[274] = 6
    decoded = save_jpeg(image, tmp_path / "x.jpg", exif=exif)
    assert (decoded - color_picture().rot90(-1, (1, 2)).float()).abs().mean() < 4


def test_read_image_puts_transparency_on_white(tmp_path):
    """By hand: a fifth of (0, 0, 100) and four fifths of white."""
    rgba = torch.cat([color_picture(), torch.zeros(1, 12, 8, dtype=torch.uint8)])
    rgba[3, 6:] = 51
    to_pil_image(rgba).save(tmp_path / "x.png")
    decoded, _ = gan.read_image(tmp_path / "x.png")
    assert (decoded[:, :6] == 255).all()
    assert decoded[:, 11, 7].tolist() == [204, 204, 224]


def test_read_image_takes_the_first_page_before_damaged_ones(tmp_path):
    """TIFF's definition: a head leads to the tags of the first page, these to those of the second, which are zeroed."""
    pages = [Image.new("L", (16, 16), shade) for shade in (9, 80)]
    pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:])
    content = bytearray((tmp_path / "x.tif").read_bytes())
    first = int.from_bytes(content[4:8], "little")
    after = first + 2 + 12 * int.from_bytes(content[first : first + 2], "little")
    second = int.from_bytes(content[after : after + 4], "little")
    content[second + 2 :] = bytes(len(content) - second - 2)
    (tmp_path / "x.tif").write_bytes(content)
    pixels, pages = gan.read_image(tmp_path / "x.tif")
    assert (pixels == 9).all()
    assert pages == 1


def test_read_image_raises_a_value_error_for_an_impossible_offset(tmp_path):
    """BigTIFF's definition: the offset of the first page, here 2^62, which no file can be read at."""
    (tmp_path / "x.tif").write_bytes(b"II+\0\x08\0\0\0" + (2**62).to_bytes(8, "little") + bytes(64))
    with pytest.raises(ValueError):
        gan.read_image(tmp_path / "x.tif")


def test_read_image_reduces_large_jpegs_alone(tmp_path):
    """JPEG's definition: its blocks can be decoded at an eighth; Pillow keeps both sides at least as asked."""
    image = to_pil_image(color_picture()).resize((320, 480))
    image.save(tmp_path / "x.jpg", quality=95)
    image.save(tmp_path / "x.png")
    assert gan.read_image(tmp_path / "x.jpg", 64)[0].shape == (3, 120, 80)
    assert gan.read_image(tmp_path / "x.jpg")[0].shape == (3, 480, 320)
    assert gan.read_image(tmp_path / "x.png", 64)[0].shape == (3, 480, 320)


def test_read_image_does_not_read_what_is_no_image(tmp_path):
    """By hand: a file of 20 GB, which takes no room on the disk and would not fit in memory."""
    with open(tmp_path / "x.png", "wb") as file:
        file.truncate(20 * 2**30)
    with pytest.raises(ValueError):
        gan.read_image(tmp_path / "x.png")


@pytest.mark.parametrize("content", [b"", b"no image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"])
def test_read_image_raises_value_errors_for_other_bytes(content, tmp_path):
    """The definition: the caller then skips the file."""
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ValueError):
        gan.read_image(tmp_path / "x.png")


def taken(count, start=0):
    """Takes so many batches of 3 of 10 images, each of which holds its number."""
    images = torch.arange(10, dtype=torch.uint8)[:, None, None, None]
    stream = gan.batches(images, torch.arange(10), gan.Config(batch=3, flip=False), CPU, start)
    return [next(stream) for _ in range(count)]


def test_batches_cover_each_epoch_in_another_order():
    """By hand: three whole batches an epoch, without repetition."""
    epochs = torch.stack([y for _, y in taken(9)]).reshape(3, 9)
    assert all(len(ys.unique()) == 9 for ys in epochs)
    assert not torch.equal(epochs[0], epochs[1])


def test_batches_keep_images_and_labels_together():
    """By hand: image y holds y."""
    for x, y in taken(9):
        assert gap(x.flatten(), y / 127.5 - 1) < 1e-6


def test_batches_can_start_anywhere():
    """The same stream from its beginning."""
    for (_, ours), (_, theirs) in zip(taken(4, start=5), taken(9)[5:], strict=True):
        assert torch.equal(ours, theirs)


def test_batches_mirror_half_of_the_images():
    """By hand: of 1,000 images, black on the left and white on the right, half are the other way round."""
    torch.manual_seed(0)
    images = torch.tensor([0, 255], dtype=torch.uint8).expand(1000, 1, 1, 2)
    x, _ = next(gan.batches(images, torch.zeros(1000), gan.Config(batch=1000, flip=True), CPU))
    assert abs((x[:, 0, 0, 0] == 1).float().mean() - 0.5) < 0.06
    assert (x.sum(3) == 0).all()


def test_loss_may_be_one_that_a_program_added(monkeypatch):
    """By hand: what a program puts into D_LOSSES after the import is a loss of the config and of the flag."""
    monkeypatch.setitem(gan.D_LOSSES, "mine", gan.D_LOSSES["ns"])
    assert gan.resolve(gan.Config(loss="mine")).loss == "mine"
    assert gan.make_parser(gan.GAN).parse_args(["train", "--loss", "mine"]).loss == "mine"


# ---- gan.py: config
@pytest.mark.parametrize(
    "data, expected",
    [
        ("synthetic", dict(size=32, width=16, channels=3, flip=True)),
        ("mnist", dict(size=64, width=32, channels=1, flip=False)),
        ("cifar10", dict(size=64, width=32, channels=3, flip=True)),
    ],
)
def test_resolve_fills_in_what_depends_on_the_data(data, expected):
    """The help of each flag, by hand."""
    config = gan.resolve(gan.Config(data=data))
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    "shape, rate",
    [
        (dict(size=16), 4e-4),  # 32 channels
        (dict(size=32), 4e-4),  # 128
        (dict(size=32, width=32), 2e-4),  # 256
        (dict(size=64), 1e-4),  # 512
        (dict(size=64, max_width=64), 4e-4),
        (dict(size=128), 1e-4),
    ],
)
def test_resolve_takes_the_learning_rates_from_the_widest_layer(shape, rate):
    """By hand: 4e-4 up to 128 channels, and inversely proportional beyond."""
    config = gan.resolve(gan.Config(**shape))
    assert (config.lr_G, config.lr_D) == (rate, rate)


@pytest.mark.parametrize("loss", LOSSES)
def test_resolve_centres_the_losses_that_are_symmetric(loss):
    """The help of --center."""
    assert gan.resolve(gan.Config(loss=loss)).center == (loss in ("ns", "minimax", "hinge"))
    assert gan.resolve(gan.Config(loss=loss, center=loss == "wgan")).center == (loss == "wgan")


def test_resolve_keeps_what_was_given(tmp_path, monkeypatch):
    """The definition; a folder's path becomes absolute."""
    monkeypatch.chdir(tmp_path)
    config = gan.resolve(gan.Config(data="pictures", size=16, width=5, flip=False, lr_D=1e-3))
    assert (config.size, config.width, config.flip, config.lr_D) == (16, 5, False, 1e-3)
    assert config.data == str(tmp_path / "pictures")


def test_resolve_knows_the_home_of_the_user(tmp_path, monkeypatch):
    """The shell's convention, which it does not apply behind an equals sign."""
    monkeypatch.setenv("HOME", str(tmp_path))
    config = gan.resolve(gan.Config(data="~/pictures", data_dir="~/data", runs="~/runs"))
    assert config.data == str(tmp_path / "pictures")
    assert config.data_dir == str(tmp_path / "data")
    assert config.runs == str(tmp_path / "runs")


def test_resolve_finds_data_from_any_folder():
    """By hand: a run may be scored from another folder than that of its training."""
    config = gan.resolve(gan.Config(data="pictures"))
    assert config.data == str(Path.cwd() / "pictures")
    assert config.data_dir == str(Path.cwd() / "data")


FOREIGN = dict(
    lr_G=np.float64(1e-4),
    lr_D=np.float32(0.5),
    batch=np.int64(4),
    size=np.int32(16),
    steps=torch.tensor(2),
    cond=np.bool_(True),
    flip=np.bool_(False),
    loss=np.str_("ns"),
    epochs=3,
)


def test_resolve_makes_each_value_one_of_its_field(folder):
    """By hand: Python's own types, which a checkpoint can hold."""
    config = asdict(gan.resolve(gan.Config(data=folder, **FOREIGN)))
    for name, value in FOREIGN.items():
        assert config[name] == value
    kinds = {name: type(config[name]).__name__ for name in [*FOREIGN, "data"]}
    expected = dict(lr_G="float", lr_D="float", batch="int", size="int", steps="int", cond="bool", flip="bool")
    assert kinds == expected | dict(loss="str", epochs="float", data="str")


@pytest.mark.parametrize(
    "name, value",
    [("batch", 4.5), ("batch", "x"), ("batch", None), ("flip", "yes"), ("lr_G", math.nan), ("lr_G", [1]), ("size", 17)],
)
def test_resolve_refuses_values_of_no_use(name, value):
    """The definition: one line that says what the field takes."""
    with pytest.raises(gan.UserError, match=f"{name} cannot be"):
        gan.resolve(gan.Config(**{name: value}))


# ---- gan.py: runs
@pytest.fixture
def two_runs(tmp_path):
    """Makes two runs, the first of which has the newer checkpoint."""
    runs = tmp_path / "runs"
    for name, when in (("first", 2), ("second", 1)):
        (runs / name).mkdir(parents=True)
        (runs / name / "checkpoint.pt").touch()
        os.utime(runs / name / "checkpoint.pt", (when, when))
    return runs


def test_find_run_takes_the_newest(two_runs):
    """By hand."""
    assert gan.find_run(None, two_runs) == two_runs / "first"


def test_find_run_takes_names_folders_and_files(two_runs):
    """By hand."""
    second = two_runs / "second"
    assert gan.find_run("second", two_runs) == second
    assert gan.find_run(str(second), "nowhere") == second
    assert gan.find_run(second / "checkpoint.pt", "nowhere") == second / "checkpoint.pt"


@pytest.mark.parametrize("name", ["", "sec", "nowhere"])
def test_find_run_takes_whole_names_alone(two_runs, name):
    """The definition."""
    with pytest.raises(gan.UserError, match=f"no run {name!r}"):
        gan.find_run(name, two_runs)


def test_find_run_says_that_a_run_has_no_checkpoint(tmp_path):
    """By hand: a run that was killed before its first."""
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "config.json").touch()
    with pytest.raises(gan.UserError, match="killed has no checkpoint"):
        gan.find_run("killed", tmp_path)


def test_find_run_passes_by_a_folder_of_something_else(two_runs, tmp_path, monkeypatch):
    """By hand: other programs write a config.json too."""
    (tmp_path / "here" / "second").mkdir(parents=True)
    (tmp_path / "here" / "second" / "config.json").touch()
    monkeypatch.chdir(tmp_path / "here")
    assert gan.find_run("second", two_runs) == two_runs / "second"


def test_find_run_says_that_there_are_none(tmp_path):
    """The definition."""
    with pytest.raises(gan.UserError, match="train one"):
        gan.find_run(None, tmp_path)


@pytest.fixture(scope="session")
def content(run):
    """Reads the toy run's checkpoint as it is."""
    return torch.load(run / "checkpoint.pt")


def sample_fails(capsys, path):
    return fails(capsys, "sample", "--run", path, "--out", path.with_name("x.png"))


def parts_of(path):
    """Lists where the contents of a zip file's longer parts begin."""
    whole = path.read_bytes()
    for info in zipfile.ZipFile(path).infolist():
        if info.file_size > 60:
            header = info.header_offset
            name, extra = np.frombuffer(whole[header + 26 : header + 30], "<u2").tolist()
            yield header + 30 + name + extra


def test_read_checkpoint_finds_any_flipped_bit(run, tmp_path):
    """The zip format's checksums: one bit in each of 40 parts."""
    whole = (run / "checkpoint.pt").read_bytes()
    places = [start + i for i, start in enumerate(parts_of(run / "checkpoint.pt"))]
    assert len(places) >= 40
    for at in places[:40]:
        damaged = bytearray(whole)
        damaged[at] ^= 4
        (tmp_path / "x.pt").write_bytes(damaged)
        with pytest.raises(gan.UserError, match="not a readable"):
            gan.read_checkpoint(tmp_path / "x.pt")


IMPOSSIBLE = [
    ("steps", "x"),
    ("steps", -1),
    ("steps", 1.5),
    ("classes", None),
    ("classes", ["../x", "a", "b"]),
    ("classes", ["..", "a", "b"]),
    ("classes", ["a\0", "a", "b"]),
    ("config", {"size": 17}),
    ("config", None),
    ("config", Path()),
    ("G_ema", {"a": 1}),
    ("G_ema", None),
]


@pytest.mark.parametrize("name, value", IMPOSSIBLE)
def test_read_checkpoint_reports_impossible_values(name, value, content, tmp_path, capsys):
    """The definition: one line, without torch's advice to trust and unpickle the file."""
    path = tmp_path / "x.pt"
    torch.save(content | {name: value}, path)
    err = sample_fails(capsys, path)
    assert "not a readable" in err or "cannot be" in err
    assert "trust" not in err


@pytest.mark.parametrize("value", [{}, None])
def test_read_checkpoint_for_resume_reports_a_damaged_optimizer(value, content, own_run, capsys):
    """The definition."""
    torch.save(content | {"opt_G": value}, own_run / "checkpoint.pt")
    assert "not a readable" in fails(capsys, "train", "--resume", own_run, "--steps", "9")


def test_load_takes_an_optimizer_of_another_kind(config):
    """The definition: a subclass chooses its optimizers, whose state has names of its own."""

    class Other(gan.GAN):
        def __init__(self, *args):
            super().__init__(*args)
            self.opt_G = torch.optim.RMSprop(self.G.parameters(), 1e-4)
            self.opt_D = torch.optim.SGD(self.D.parameters(), 1e-4, momentum=0.9)

    run = gan.train(config, model=Other)
    gan.train(replace(config, steps=5), run, Other)
    assert gan.read_checkpoint(run)["steps"] == 5


def test_load_reports_an_optimizer_of_other_networks(content, own_run, capsys):
    """The definition: Adam's moments have the shapes of the weights."""
    state = copy.deepcopy(content["opt_G"])
    state["state"][3]["exp_avg"] = torch.zeros(5)
    torch.save(content | {"opt_G": state}, own_run / "checkpoint.pt")
    assert "fit other networks" in fails(capsys, "train", "--resume", own_run, "--steps", "9")


def test_read_checkpoint_reports_that_the_images_are_missing(content, tmp_path, capsys):
    """The definition."""
    torch.save({name: value for name, value in content.items() if name != "images"}, tmp_path / "x.pt")
    assert "not a readable" in sample_fails(capsys, tmp_path / "x.pt")


@pytest.mark.parametrize("number", [1, None])
def test_read_checkpoint_refuses_other_formats(number, content, tmp_path, capsys):
    """The definition: one line with the version that wrote it; None stands for those that had no number."""
    torch.save(content | {"format": number, "version": "0.8"}, tmp_path / "x.pt")
    assert "is of another format, by gan.py 0.8" in sample_fails(capsys, tmp_path / "x.pt")


def test_read_checkpoint_refuses_fields_of_another_program(content, tmp_path, capsys):
    """The definition: a checkpoint of a subclass needs the subclass."""
    torch.save(content | {"config": content["config"] | {"patience": 3}}, tmp_path / "x.pt")
    assert "GAN has no patience" in sample_fails(capsys, tmp_path / "x.pt")


def test_read_checkpoint_of_before_version_1_2_has_uncentred_losses(content, tmp_path):
    """The definition: a run goes on by the losses that it began with."""
    config = {name: value for name, value in content["config"].items() if name != "center"}
    torch.save(content | {"config": config | {"loss": "ns"}}, tmp_path / "x.pt")
    assert gan.read_checkpoint(tmp_path / "x.pt")["config"].center is False


def test_load_generator_is_ready_to_draw(run):
    """The run's config, its classes and steps."""
    G, config = gan.load_generator(run, trunc=0.7)
    assert not G.training
    assert not any(p.requires_grad for p in G.parameters())
    assert G.classes == NAMES
    assert (G.steps, G.trunc) == (6, 0.7)
    assert isinstance(config, gan.Config)
    assert config.steps == 6


def test_load_generator_holds_the_averaged_weights(run, content):
    """The checkpoint's G_ema."""
    G, _ = gan.load_generator(run)
    for name, p in G.named_parameters():
        assert torch.equal(p, content["G_ema"][name])


def test_open_run_writes_the_config(run):
    """The config, by hand."""
    written = json.loads((run / "config.json").read_text())
    assert written == asdict(gan.read_checkpoint(run)["config"])
    assert written["augment"] == "color,translation,cutout"


def test_open_run_cuts_the_log_behind_the_checkpoint(own_run):
    """By hand: what was logged after the checkpoint, by a killed process, will be logged again."""
    with open(own_run / "log.jsonl", "a") as log:
        log.write('{"loss_D": 9}\n{"step": 7, "loss_D": 9}\n{"step": 8, "lo')
    gan.main(["train", "--resume", str(own_run), "--steps", "8"])
    assert [row["step"] for row in logged(own_run)] == [6, 8]


ODD_LINES = [b"\xff\x00\xfe", b"some text", b"null", b"7", b"9" * 5000, b"[1]", b'{"step": "x"}', b'{"step": 3, "lo']


@pytest.mark.parametrize("line", ODD_LINES)
def test_cut_log_keeps_odd_lines_aside(line, tmp_path, capsys):
    """By hand: two rows, one of which lies behind the checkpoint, around the odd line."""
    log = tmp_path / "log.jsonl"
    before = b'{"step": 1}\n' + line + b'\n{"step": 5}\n'
    log.write_bytes(before)
    gan.cut_log(log, 4)
    assert log.read_text() == '{"step": 1}\n'
    [odd] = tmp_path.glob("log-odd-*.jsonl")
    assert odd.read_bytes() == before
    assert f"{odd} keeps them" in capsys.readouterr().out


def test_cut_log_says_nothing_of_a_log_of_rows(tmp_path, capsys):
    """By hand."""
    gan.cut_log(tmp_path / "log.jsonl", 4)
    gan.append_row(tmp_path / "log.jsonl", {"step": 1})
    gan.cut_log(tmp_path / "log.jsonl", 4)
    assert gan.read_rows(tmp_path / "log.jsonl") == [{"step": 1}]
    assert capsys.readouterr().out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_open_run_draws_the_images_as_d_sees_them(run):
    """By hand: the first batch of 8 in a row."""
    assert Image.open(run / "real.png").size == (8 * 18 + 2, 18 + 2)


def test_open_run_removes_what_a_killed_process_left(own_run):
    """By hand: two days old, in both folders that a run writes to."""
    for folder in (own_run, own_run / "samples"):
        part = folder / ".0123456789abcdef.part"
        part.write_text("half")
        os.utime(part, (time.time() - 172_800,) * 2)
    gan.main(["train", "--resume", str(own_run), "--steps", "7"])
    assert list(own_run.rglob(".*.part")) == []


def test_open_run_leaves_nothing_else(run):
    """By hand."""
    names = {path.name for path in run.iterdir()}
    assert names == {".lock", "config.json", "checkpoint.pt", "log.jsonl", "real.png", "samples"}


def test_new_folder_numbers_runs(tmp_path):
    """By hand."""
    config = gan.resolve(gan.Config(runs=str(tmp_path), cond=True, data="/my/pictures", size=16))
    assert gan.new_folder(config).name == "0000-rpgan-cond-pictures-16"
    assert gan.new_folder(replace(config, cond=False, data="synthetic")).name == "0001-rpgan-synthetic-16"


def test_new_folder_steps_over_a_number_that_is_taken_meanwhile(tmp_path, monkeypatch):
    """By hand: another process makes 0000 a moment before."""
    mkdir = Path.mkdir
    made = []

    def taken(path, *args, **options):
        if path.name.startswith("0000-") and not made:
            made.append(mkdir(path))
        return mkdir(path, *args, **options)

    monkeypatch.setattr(Path, "mkdir", taken)
    assert gan.new_folder(gan.Config(runs=str(tmp_path))).name.startswith("0001-")


def test_new_folder_goes_past_four_digits(tmp_path):
    """By hand."""
    for number in range(9990, 10_000):
        (tmp_path / f"{number}-x").mkdir()
    counts = gan.itertools.count
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gan.itertools, "count", lambda: counts(9990))
        assert gan.new_folder(gan.Config(runs=str(tmp_path))).name.startswith("10000-")
        assert gan.new_folder(gan.Config(runs=str(tmp_path))).name.startswith("10001-")


def test_new_folder_shortens_long_names(tmp_path):
    """By hand."""
    assert len(gan.new_folder(gan.Config(runs=str(tmp_path), data="/" + "x" * 250)).name) < 80


def test_new_folder_keeps_the_letters_of_other_languages(tmp_path):
    """By hand."""
    config = gan.Config(loss="ns", size=16, runs=str(tmp_path), data="/My Flöwers\udcff花")
    assert gan.new_folder(config).name == "0000-ns-My-Flöwers-花-16"


def test_new_folder_takes_the_name_of_a_run_without_a_checkpoint(tmp_path):
    """The definition: it was killed before its first."""
    (tmp_path / "killed").mkdir()
    assert gan.new_folder(gan.Config(runs=str(tmp_path), name="killed")) == tmp_path / "killed"


def test_new_folder_takes_the_name_of_a_run_that_has_begun(tmp_path):
    """By hand: each run's folder has a .lock."""
    for name in (".lock", "config.json"):
        (tmp_path / name).touch()
    assert gan.new_folder(gan.Config(runs=str(tmp_path.parent), name=tmp_path.name)) == tmp_path


def test_new_folder_refuses_a_folder_of_something_else(tmp_path):
    """By hand: its config.json would be lost."""
    (tmp_path / "config.json").touch()
    with pytest.raises(gan.UserError, match="not the folder of a run"):
        gan.new_folder(gan.Config(runs=str(tmp_path.parent), name=tmp_path.name))


def test_new_folder_refuses_the_name_of_a_run(run):
    """The definition."""
    with pytest.raises(gan.UserError, match="exists"):
        gan.new_folder(gan.Config(runs=str(run.parent), name=run.name))


def test_new_folder_reports_a_file_in_its_place(tmp_path, capsys):
    """The definition: one line with the path."""
    (tmp_path / "taken").touch()
    err = fails(capsys, "train", *TOY_FLAGS, "--steps", "1", "--runs", tmp_path, "--name", "taken")
    assert str(tmp_path / "taken") in err


HOLD = """
import os, sys
file = open(sys.argv[1], "a")
os.lockf(file.fileno(), os.F_LOCK, 0)
print(1, flush=True)
input()
"""


def test_lock_file_refuses_a_run_in_training(own_run, capsys):
    """Another process that holds the lock."""
    argv = [sys.executable, "-c", HOLD, own_run / ".lock"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        err = fails(capsys, "train", "--resume", own_run, "--steps", "7")
        other.communicate(b"\n")
    assert "is being trained by another process" in err
    gan.main(["train", "--resume", str(own_run), "--steps", "7"])


# ---- gan.py: training
def test_prepare_gives_what_train_uses(config):
    """A run by train: the same steps by hand end in the same state, bit for bit."""
    trained = gan.train(config)
    model, data, plan = gan.prepare(config)
    for _ in range(plan.steps):
        model.train_step(data)
    content = gan.read_checkpoint(trained)
    for name in gan.GAN.PARTS:
        assert_equal(getattr(model, name).state_dict(), content[name])


def test_prepare_plans_the_run(config):
    """By hand: 24 images in batches of 8, of which each step takes two."""
    _, _, plan = gan.prepare(replace(config, steps=None, epochs=4, d_steps=2, sample_every=2))
    assert plan.per_epoch == 1.5
    assert (plan.first, plan.steps, plan.sample_every) == (0, 6, 3)
    assert plan.folder is None


@pytest.mark.parametrize(
    "given, per_epoch, expected",
    [
        (dict(data="x"), 100, 15_000),
        (dict(data="x"), 1, 3_000),
        (dict(data="synthetic"), 21, 1_575),
        (dict(data="x", epochs=2.5), 10, 25),
        (dict(data="x", epochs=0.001), 10, 1),
        (dict(data="x", epochs=9, steps=7), 10, 7),
    ],
)
def test_planned_steps_are_what_the_help_says(given, per_epoch, expected):
    """By hand: 150 epochs but at least 3,000 steps, the drawn flowers 75 epochs; --steps wins over --epochs."""
    assert gan.planned_steps(gan.Config(**given), per_epoch) == expected


def test_describe_counts_the_images_of_unequal_classes():
    """By hand."""
    labels = torch.tensor([0, 0, 1, 1])
    assert gan.describe(["a", "b"], labels) == "a, b"
    assert gan.describe(["a", "b"], labels[1:]) == "a 1, b 2"
    assert gan.describe([], labels * 0) == ""


@pytest.mark.parametrize(
    "seconds, expected",
    [
        (1, []),
        (3, ["this will take 3.0 hours"]),
        (24, ["this will take 24.0 hours", "--steps 1825 would take 12, and"]),
    ],
)
def test_forecast_says_how_long_a_run_takes(seconds, expected, monkeypatch, capsys):
    """By hand: 3,600 steps are left after step 25, each of so many seconds; only the first ones are slow."""
    plan = SimpleNamespace(first=10, steps=3625)
    for step, now in ((11, 90), (15, 100), (16, 100 + seconds), (25, 100 + 10 * seconds), (26, 999)):
        monkeypatch.setattr(time, "monotonic", lambda now=now: now)
        gan.forecast(SimpleNamespace(steps=step), plan)
    lines = capsys.readouterr().out.splitlines()
    assert [line[: len(start)] for line, start in zip(lines, expected, strict=True)] == expected


def test_prepare_writes_nothing(config):
    """The definition: the folder is made when the run is opened."""
    gan.prepare(config)
    assert not Path(config.runs).exists()


def test_prepare_goes_on_from_a_run(run, config):
    """The run's checkpoint."""
    model, _, plan = gan.prepare(replace(config, steps=9), resume=run)
    assert (model.steps, plan.first, plan.steps) == (6, 6, 9)
    assert plan.folder == run


def test_prepare_says_that_classes_are_not_used(config, capsys):
    """By hand: one line."""
    gan.prepare(replace(config, cond=False))
    out = capsys.readouterr().out
    assert out.count("the 3 classes are not used: --cond conditions on them\n") == 1
    gan.prepare(config)
    assert "not used" not in capsys.readouterr().out


def test_prepare_keeps_the_threads_of_a_compiled_run(config, monkeypatch):
    """The definition: another number of threads would compile anew."""
    monkeypatch.setattr(gan, "CORES", gan.Cores())
    gan.CORES.active = True
    gan.prepare(replace(config, compile=True))
    assert not gan.CORES.active


def test_prepare_refuses_a_run_that_is_complete(run, capsys):
    """The definition: nothing is left to do."""
    assert "has trained its 6 steps" in fails(capsys, "train", "--resume", run)


def test_check_batches_refuses_what_the_images_cannot_give(monkeypatch):
    """By hand: 8 images in two processes."""
    images = torch.zeros(8, 3, 16, 16)
    with pytest.raises(gan.UserError, match="--batch 16 is more than the 8 images"):
        gan.check_batches(gan.Config(batch=16), images, [])
    with pytest.raises(gan.UserError, match="--cond needs two sub-folders"):
        gan.check_batches(gan.Config(batch=4, cond=True), images, ["one"])
    monkeypatch.setattr(gan, "n_ranks", lambda: 2)
    with pytest.raises(gan.UserError, match="multiple of 2"):
        gan.check_batches(gan.Config(batch=7), images, [])


def test_train_writes_grids(run):
    """By hand: a row for each class, ten columns, two pixels between."""
    assert Image.open(run / "samples" / "0000006.png").size == (10 * 18 + 2, 3 * 18 + 2)


def test_train_resumed_is_the_uninterrupted_run(config):
    """The uninterrupted run, bit for bit."""
    config = replace(config, d_steps=2, steps=8)
    whole = gan.train(replace(config, name="whole"))
    part = gan.train(replace(config, name="part", steps=4))
    gan.main(["train", "--resume", str(part), "--steps", "8"])
    same_state(whole, part)
    for name in ("samples/0000008.png", "real.png"):
        assert (whole / name).read_bytes() == (part / name).read_bytes()
    assert [row["step"] for row in logged(part)] == [4, 8]


def test_train_resumes_from_the_file_that_is_named(own_run, capsys):
    """By hand: a checkpoint of step 6 beside one of step 8."""
    shutil.copy(own_run / "checkpoint.pt", own_run / "other.pt")
    gan.main(["train", "--resume", str(own_run), "--steps", "8"])
    capsys.readouterr()
    gan.main(["train", "--resume", str(own_run / "other.pt"), "--steps", "7"])
    assert "steps 6 to 7" in capsys.readouterr().out
    assert gan.read_checkpoint(own_run)["steps"] == 7
    assert [row["step"] for row in logged(own_run)] == [6, 7]


def grids(run):
    return {path.name: path.read_bytes() for path in (run / "samples").iterdir()}


def failing(function, k, error):
    """Returns the function with an error in place of its call number k."""
    calls = []

    def call(*args):
        calls.append(args)
        if len(calls) == k:
            raise error
        return function(*args)

    return call


WRITES = [(os, "replace", k) for k in range(1, 8)] + [(gan, "append_row", k) for k in range(1, 3)]


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    """Trains the run that the next tests disturb: a grid and a checkpoint at steps 2 and 4."""
    runs = tmp_path_factory.mktemp("undisturbed")
    config = gan.Config(**TOY, data=str(folder), cond=True, steps=4, sample_every=2 / 3, runs=str(runs))
    return gan.train(config), config


@pytest.mark.parametrize("place, name, k", WRITES)
def test_train_loses_nothing_by_a_failure_at_any_write(place, name, k, undisturbed, tmp_path, monkeypatch):
    """The run without the failure: what --resume makes is the same."""
    reference, config = undisturbed
    config = replace(config, runs=str(tmp_path), name="run")
    error = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(place, name, failing(getattr(place, name), k, error))
        with pytest.raises(OSError, match="No space left"):
            gan.train(config)

    run = tmp_path / "run"
    resumable = (run / "checkpoint.pt").exists()
    gan.train(config, resume=run if resumable else None)
    same_state(reference, run)
    assert grids(run) == grids(reference)
    assert list(run.rglob("*.part")) == []


def test_train_writes_as_often_as_the_last_test_fails(undisturbed, tmp_path, monkeypatch):
    """By hand: config, log and picture; then twice a grid and a checkpoint; and two lines of the log."""
    _, config = undisturbed
    calls = []
    for place, name in ((os, "replace"), (gan, "append_row")):
        function = getattr(place, name)

        def counted(*args, name=name, function=function):
            calls.append(name)
            return function(*args)

        monkeypatch.setattr(place, name, counted)
    gan.train(replace(config, runs=str(tmp_path)))
    assert sorted(calls) == sorted(name for _, name, _ in WRITES)


def test_train_makes_a_folder_that_vanished_anew(config, capsys):
    """The definition: config.json, the log from there on, and a checkpoint that can be resumed; a line says so."""

    class Vandal(gan.GAN):
        def after_log(self, run, record):
            if self.steps == 2:
                shutil.rmtree(run)

    run = gan.train(replace(config, log_every=1, steps=6, sample_every=100), model=Vandal)
    assert "is gone: it is made again" in capsys.readouterr().out
    assert [row["step"] for row in gan.read_rows(run / "log.jsonl")] == [3, 4, 5, 6]
    assert gan.find_run(run) == run
    assert json.loads((run / "config.json").read_text())["steps"] == 6
    gan.train(replace(config, steps=7), run)


def test_train_writes_values_of_foreign_types(folder, tmp_path):
    """The definition: the checkpoint loads, by a reader of weights alone."""
    small = TOY | FOREIGN
    run = gan.train(gan.Config(**small, data=folder, runs=tmp_path))
    config = gan.read_checkpoint(run)["config"]
    assert config.lr_G == 1e-4
    assert config.cond is True


def test_train_saves_every_save_minutes(config, watched):
    """By hand: after no time at all, at each step."""
    gan.train(replace(config, save_minutes=1e-9), model=watched)
    assert [steps for _, steps in watched.saved] == [1, 2, 3, 4]


def test_train_learns_the_classes_of_flowers(tmp_path):
    """The nearest class mean, of which chance is right 1 in 17, and the Frechet distance of 4 x 4 pixels."""
    config = gan.Config(cond=True, size=16, width=16, steps=300, batch=32, runs=str(tmp_path), device="cpu", amp="off")
    config = replace(config, lr_G=1e-3, lr_D=1e-3, augment="none")
    images, labels, _ = gan.load_images("synthetic", 16, 3)
    features = shrink(images)
    means = torch.stack([features[labels == c].mean(0) for c in range(17)])

    def score(G):
        samples = shrink(gan.generate(G, 340, range(17)))
        right = torch.cdist(samples, means).argmin(1) == torch.arange(340) % 17
        return right.float().mean(), metrics.frechet_distance(features, samples)

    share_before, distance_before = score(gan.GAN(gan.resolve(config), 17).G_ema)
    share, distance = score(gan.load_generator(gan.train(config))[0])
    assert share_before < 0.12
    assert share > 0.45  # seeds 0, 1 and 2: 0.69, 0.60 and 0.66
    assert distance < distance_before / 4


def shrink(images):
    """Takes images to features: the means of 4 x 4 places, [N,48]."""
    return F.avg_pool2d(images.float() / 255, 4).flatten(1)


def test_log_holds_means_over_steps(config):
    """A run that logs each step."""
    means = losses_of(gan.train(replace(config, log_every=2)))
    singles = losses_of(gan.train(replace(config, log_every=1)))
    assert gap(means, singles.unflatten(0, (2, 2)).mean(1)) < 1e-6


def test_log_rows_say_what_they_mean(run):
    """By hand: six steps of two epochs."""
    [row] = logged(run)
    assert row["step"] == 6
    assert row["epoch"] == 2
    assert row.keys() == {"step", "epoch", "images_per_s", "loss_D", "loss_G", "real_logit", "fake_logit"}


def test_log_stops_a_run_that_is_not_finite(own_run, content, capsys):
    """The definition: no checkpoint follows."""
    content = copy.deepcopy(content)
    content["D"]["linear.bias"] += math.nan
    torch.save(content, own_run / "checkpoint.pt")
    before = (own_run / "checkpoint.pt").read_bytes()
    err = fails(capsys, "train", "--resume", own_run, "--steps", "50", "--log-every", "5")
    assert "losses are not finite by step 10" in err
    assert "--lr-D" in err
    assert (own_run / "checkpoint.pt").read_bytes() == before


class Signalled(gan.GAN):
    """Sends its own process a signal after the second step."""

    number = signal.SIGTERM

    def after_log(self, run, record):
        if record["step"] == 2:
            signal.raise_signal(self.number)


@pytest.fixture
def handlers():
    """Puts the handlers of signals back."""
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_stop_on_signal_finishes_the_step_and_saves(number, config, handlers, monkeypatch, capsys):
    """By hand: a signal after step 2 ends the run behind the next step."""
    signal.signal(number, signal.default_int_handler)
    monkeypatch.setattr(Signalled, "number", number)
    run = gan.train(replace(config, steps=50, log_every=1), model=Signalled)
    assert gan.read_checkpoint(run)["steps"] == 3
    assert "stopped at step 3" in capsys.readouterr().out
    assert signal.getsignal(number) == signal.default_int_handler


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_stop_on_signal_leaves_ignored_signals_ignored(number, config, handlers, monkeypatch):
    """The definition of nohup, and of a shell's background jobs."""
    signal.signal(number, signal.SIG_IGN)
    monkeypatch.setattr(Signalled, "number", number)
    run = gan.train(replace(config, log_every=1), model=Signalled)
    assert gan.read_checkpoint(run)["steps"] == 4
    assert signal.getsignal(number) == signal.SIG_IGN


def test_stop_on_signal_interrupts_by_the_second(handlers):
    """Python's own handler of Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt), gan.stop_on_signal() as stop:
        signal.raise_signal(signal.SIGINT)
        assert len(stop) == 1
        signal.raise_signal(signal.SIGTERM)


def test_stop_on_signal_restores_handlers_where_some_signals_are_unknown(handlers, monkeypatch):
    """The handlers as they were; Windows has neither SIGHUP nor SIGUSR1."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.delattr(signal, "SIGHUP")
    monkeypatch.delattr(signal, "SIGUSR1")
    with gan.stop_on_signal():
        pass
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


@pytest.mark.parametrize("known", ["avx512_bf16", "amx_bf16", None])
def test_pick_dtype_takes_bf16_where_the_processor_has_it(known, monkeypatch):
    """The definition of --amp auto."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {known: True})
    assert gan.pick_dtype("auto", CPU) == (torch.bfloat16 if known else torch.float32)
    assert gan.pick_dtype("bf16", CPU) == torch.bfloat16
    assert gan.pick_dtype("off", CPU) == torch.float32


@pytest.mark.parametrize(
    "capability, dtype", [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_pick_dtype_of_gpus(capability, dtype, monkeypatch):
    """The definition of --amp auto: bf16 from compute capability 8.0 on."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert gan.pick_dtype("auto", torch.device("cuda")) == dtype


# Adam's first steps have the size of the learning rate whatever the gradient is, so where a gradient is zero but for
# rounding, two float32 runs part: within a few steps at the usual rates, and not within 20 at these.
SLOW = ["--lr-G", "1e-6", "--lr-D", "4e-6", "--log-every", "1"]


needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler"
)


@needs_compiler
def test_train_compiled_is_eager_training(tmp_path):
    """The same run without --compile."""
    for name, flags in (("eager", []), ("compiled", ["--compile"])):
        gan.main(["train", *TOY_FLAGS, *SLOW, "--steps", "5", "--runs", str(tmp_path), "--name", name, *flags])
    assert gap(losses_of(tmp_path / "eager"), losses_of(tmp_path / "compiled")) < 1e-4


# ---- gan.py: several processes
def torchrun(*argv, cwd=None, processes=2):
    """Runs a file in several processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = [f"--nproc-per-node={processes}", "--master-addr=127.0.0.1", f"--master-port={port}"]
    return command("-m", "torch.distributed.run", *where, *argv, cwd=cwd)


SCRIPT = f"""
import os, sys, torch
sys.path.insert(0, {str(HERE)!r})
import gan
gan.join("cpu")
said = [gan.any_rank(False), gan.any_rank(gan.rank() == gan.n_ranks() - 1)]

torch.manual_seed(0)
h = gan.own_rows(torch.randn(8, 5, 4, 4) + 30).to(torch.bfloat16)
norm = gan.BatchNorm(5)
norm.synced = gan.n_ranks() > 1
normed = norm(h.float()).detach()
statistics = [norm.running_mean.clone(), norm.running_var.clone()]
normed_bf16 = norm(h).detach()

torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double
images, labels, classes = gan.load_images("synthetic", 16, 3)
trained = {{}}
for loss in ("rpgan", "ns"):
    toy = dict(size=16, width=4, max_width=8, z_dim=8, batch=8, amp="off", device="cpu")
    model = gan.GAN(gan.resolve(gan.Config(loss=loss, cond=True, **toy)), len(classes))
    data = gan.batches(images, labels, model.config, model.device)
    losses = torch.stack([model.train_step(data) for _ in range(20)])
    gan.average_over_ranks([losses])
    trained[loss] = {{"losses": losses, "G": model.G.state_dict(), "D": model.D.state_dict()}}
noise = gan.own_rows(gan.sample_z(8, 8))
names = "said normed statistics normed_bf16 noise trained".split()
result = {{name: globals()[name] for name in names}}
torch.save(result, f"{{sys.argv[1]}}-{{gan.rank()}}")
sys.stdout.flush()
os._exit(0)  # see the end of gan.main
"""


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Runs the script in one process and in two; returns the three results."""
    place = tmp_path_factory.mktemp("ranks")
    (place / "ranks.py").write_text(SCRIPT)
    one = command("ranks.py", "one", cwd=place)
    two = torchrun("ranks.py", "two", cwd=place)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    return [torch.load(place / name) for name in ("one-0", "two-0", "two-1")]


def test_batch_norm_of_two_processes_is_that_of_one(ranks):
    """nn.BatchNorm2d in one process, of a mean far from zero."""
    one, first, second = ranks
    assert gap(torch.cat([first["normed"], second["normed"]]), one["normed"]) < 1e-5
    for ours, others, whole in zip(first["statistics"], second["statistics"], one["statistics"]):
        assert torch.equal(ours, others)
        assert gap(ours, whole) < 1e-3


def test_batch_norm_of_two_processes_keeps_bf16(ranks):
    """nn.BatchNorm2d in one process, in float32."""
    one, first, second = ranks
    ours = torch.cat([first["normed_bf16"], second["normed_bf16"]])
    assert ours.dtype == torch.bfloat16
    assert gap(ours, one["normed"]) < 2e-2


def test_any_rank_hears_each_process(ranks):
    """By hand: the last one alone said yes."""
    assert [result["said"] for result in ranks] == [[False, True]] * 3


def test_own_rows_give_each_process_noise_of_its_own(ranks):
    """By hand: no number is drawn twice; both together are those of one process."""
    _, first, second = ranks
    assert first["noise"].shape == second["noise"].shape == (4, 8)
    assert (first["noise"] - second["noise"]).abs().min() > 1e-6


@pytest.mark.parametrize("part", ["G", "D"])
@pytest.mark.parametrize("loss", ["rpgan", "ns"])
def test_train_step_of_two_processes_is_that_of_one(loss, part, ranks):
    """One process, after 20 steps in float64 at the usual rates."""
    one, *both = [result["trained"][loss] for result in ranks]
    for result in both:
        assert gap(result["losses"], one["losses"]) < 1e-9
        for name, tensor in result[part].items():
            if "num_batches" not in name:  # which nothing reads
                assert gap(tensor, one[part][name]) < 1e-7, name


def test_train_in_two_processes_is_the_run_of_one(tmp_path, folder):
    """One process, in float32 at small rates."""
    flags = [*TOY_FLAGS, *SLOW, "--data", folder, "--cond", "--steps", "20", "--runs", tmp_path]
    gan.main(["train", *map(str, flags), "--name", "one"])
    done = torchrun(HERE / "gan.py", "train", *flags, "--name", "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done at step 20") == 1  # one of them speaks
    one = losses_of(tmp_path / "one")
    two = losses_of(tmp_path / "two")
    assert len(one) == len(two) == 20
    assert gap(one, two) < 1e-4


def test_check_processes_refuses_other_dtypes(monkeypatch):
    """By hand: a second process has another kind of GPU."""
    facts_of_both = []

    def gather(facts, own):
        facts_of_both.append(own)
        facts[:] = facts_of_both

    monkeypatch.setattr(gan, "n_ranks", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    model = toy()
    gan.check_processes(model)
    model.autocast = SimpleNamespace(fast_dtype=torch.bfloat16)
    with pytest.raises(gan.UserError, match="devices"):
        gan.check_processes(model)


MISTAKES = f"""
import contextlib, os, sys
sys.path.insert(0, {str(HERE)!r})
import gan
for mistake in (["--lossy"], ["--resume", "nowhere"]):  # before the processes join
    with contextlib.suppress(SystemExit):
        gan.main(["train", *mistake])
gan.main(["train", "--device", "cpu", "--size", "16", "--seed", os.environ["RANK"]])
"""


@pytest.mark.parametrize(
    "argv, hints",
    [
        ("mistakes.py", ["--lossy", "no run 'nowhere'", "need the same flags"]),
        ("gan.py train --data nowhere --device cpu", ["no folder"]),
    ],
)
def test_main_reports_each_process_under_torchrun(argv, hints, tmp_path):
    """The definition: one line from each process for each mistake, and nothing is written."""
    (tmp_path / "mistakes.py").write_text(MISTAKES)
    shutil.copy(HERE / "gan.py", tmp_path)
    # torchrun ends the other process once it sees that one has failed, so it should not look too soon.
    done = torchrun("--monitor-interval", "3", *argv.split(), cwd=tmp_path)
    errors = [line for line in done.stderr.splitlines() if ".py: error" in line]
    assert done.returncode != 0
    for hint in hints:
        assert sum(hint in error for error in errors) == 2, done.stderr
    assert len(errors) == 2 * len(hints)
    assert not (tmp_path / "runs").exists()


ALONE_IN_ERROR = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import gan

class Failing(gan.GAN):
    def update_G(self, *args):
        if self.steps == 2 and gan.rank() == 1:
            raise gan.UserError("a fault of one")
        return super().update_G(*args)

gan.main(model=Failing)
"""


def test_main_reports_an_error_of_one_process_alone(tmp_path, folder):
    """The definition: its own line, and one of the process that waits for it, without tracebacks of ours."""
    (tmp_path / "one.py").write_text(ALONE_IN_ERROR)
    done = torchrun("one.py", "train", *TOY_FLAGS, "--data", folder, "--steps", "9", cwd=tmp_path)
    errors = [line for line in done.stderr.splitlines() if "one.py: error" in line]
    assert done.returncode != 0
    assert "one.py: error in process 1: a fault of one" in errors
    assert set(errors) <= {errors[0], errors[-1], "one.py: error in process 0: another process has stopped"}
    assert len(errors) <= 2
    assert 'gan.py", line' not in done.stderr


# ---- gan.py: on a GPU
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DTYPES = ["off", "bf16", "fp16"]


@pytest.mark.parametrize("amp", DTYPES)
def test_networks_run_on_fake_cuda_tensors(amp, monkeypatch):
    """torch's fake tensors, which have a device and no data: a tensor of another device would raise."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    dtype = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    with FakeTensorMode(), torch.device("cuda"), torch.autocast("cuda", dtype, enabled=amp != "off"):
        G = gan.Generator(32, 3, 8, 64, 16, 5)
        D = gan.Discriminator(32, 3, 8, 64, 5)
        y = torch.zeros(4, dtype=torch.int64)
        images = G(gan.sample_z(4, 16, device=y.device), y)
        logits = D(gan.diff_augment(images, "color,translation,cutout"), y)
    assert images.shape == (4, 3, 32, 32)
    assert logits.shape == (4,)
    for x in (images, logits):
        assert (x.device.type, x.dtype) == ("cuda", torch.float32)


@pytest.mark.parametrize("name, chosen", [("cuda", None), ("cuda:1", 1)])
def test_join_keeps_the_current_device_for_a_plain_name(name, chosen, monkeypatch):
    """torch.cuda.set_device, which refuses a device without a number before it looks for CUDA."""
    devices = []
    monkeypatch.setattr(torch, "zeros", lambda n, device: torch.ones(n))
    monkeypatch.setattr(torch._C, "_cuda_setDevice", devices.append, raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    assert gan.join(name) == torch.device(name)
    assert devices == ([] if chosen is None else [chosen])
    assert torch.backends.cudnn.benchmark


def gan_on(device, amp="off", **options):
    """Builds a toy GAN of 3 classes on a device."""
    config = replace(gan.Config(**TOY), amp=amp, augment="none", cond=True, **options)
    return gan.GAN(gan.resolve(config), 3, device)


def losses_on(device, amp, images, z):
    """Computes the losses of one step on a device, of the same weights, images and noise."""
    model = gan_on(device, amp)
    model.scaler = torch.amp.GradScaler(device, init_scale=256, enabled=amp == "fp16")  # at 65,536 it skips first steps
    real = gan.to_float(images).to(device)
    y = torch.arange(8, device=device) % 3
    with model.autocast:
        fake = model.G(z.to(device), y)
    loss_D, real_logits, _ = model.update_D(real, fake.detach(), y)
    return torch.stack([loss_D, model.update_G(real, fake, y, real_logits)]).cpu()


@cuda
@pytest.mark.parametrize("amp, most", [("off", 2e-2), ("bf16", 5e-2), ("fp16", 2e-2)])
def test_updates_on_cuda_are_those_of_the_cpu(amp, most):
    """The CPU in float32, up to the rounding of the dtype and of TF32 in convolutions."""
    images = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8)
    z = torch.randn(8, 8)
    ours = losses_on("cuda", amp, images, z)
    assert gap(ours, losses_on("cpu", "off", images, z)) < most


def train_on(device, tmp_path, name, *flags):
    where = ["--runs", str(tmp_path), "--name", name, "--device", device]
    gan.main(["train", *TOY_FLAGS[:-4], *SLOW, "--cond", *where, *flags])
    return tmp_path / name


@cuda
@pytest.mark.parametrize("amp", DTYPES)
def test_train_on_cuda_writes_finite_losses(amp, tmp_path):
    """The definition: fp16's scaler may skip its first steps, and nothing that is not finite is written."""
    run = train_on("cuda", tmp_path, "run", "--amp", amp, "--steps", "30")
    assert all(map(math.isfinite, losses_of(run).flatten().tolist()))
    assert gan.read_checkpoint(run)["steps"] == 30


@cuda
def test_train_on_cuda_resumes_exactly_with_deterministic_kernels(tmp_path, monkeypatch):
    """The run without the break, bit for bit; torch refuses an operator that has no deterministic kernel."""
    torch.use_deterministic_algorithms(True)
    try:
        whole = train_on("cuda", tmp_path, "whole", "--amp", "off", "--steps", "8")
        part = train_on("cuda", tmp_path, "part", "--amp", "off", "--steps", "4")
        gan.main(["train", "--resume", str(part), "--steps", "8"])
    finally:
        torch.use_deterministic_algorithms(False)
    for name in ("G", "D", "opt_G"):
        assert_equal(gan.read_checkpoint(part)[name], gan.read_checkpoint(whole)[name])


@cuda
def test_checkpoints_go_from_the_cpu_to_cuda_and_back(tmp_path):
    """The definition: --device may change on resume."""
    run = train_on("cpu", tmp_path, "run", "--amp", "off", "--steps", "3")
    for device, steps in (("cuda", "6"), ("cpu", "9")):
        gan.main(["train", "--resume", str(run), "--device", device, "--steps", steps])
    assert [row["step"] for row in gan.read_rows(run / "log.jsonl")][-1] == 9


@cuda
@needs_compiler
def test_train_compiled_on_cuda_is_eager_training(tmp_path):
    """The same run without --compile, up to other kernels."""
    eager = train_on("cuda", tmp_path, "eager", "--amp", "off", "--steps", "5")
    compiled = train_on("cuda", tmp_path, "compiled", "--amp", "off", "--steps", "5", "--compile")
    assert gap(losses_of(eager), losses_of(compiled)) < 1e-2


@cuda
def test_generate_on_cuda_draws_what_the_cpu_draws(run):
    """The CPU, within 3 of 255 levels: sample i of a seed is the same on each device."""
    on = {device: gan.load_generator(run, device, trunc=0.7)[0] for device in ("cpu", "cuda")}
    ours = gan.generate(on["cuda"], 20, seed=5).int()
    assert (ours - gan.generate(on["cpu"], 20, seed=5).int()).abs().max() <= 3


@cuda
def test_evaluate_on_cuda_moves_a_program_to_the_device(own_run, extractor_file):
    """The CPU's scores of the same samples, within a hundredth."""
    rows = [gan.evaluate(own_run, n=30, extractor=str(extractor_file), device=d)[0] for d in ("cpu", "cuda")]
    name = next(key for key in rows[0] if key.startswith("FD"))
    assert rows[1][name] == pytest.approx(rows[0][name], rel=1e-2)


@cuda
@pytest.mark.parametrize("room", [0, 2**40])
def test_batches_on_cuda_are_those_of_the_cpu(room, config, monkeypatch):
    """The CPU's, whether the images lie on the device or are streamed to it."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (room, room))
    config = gan.resolve(config)
    images, labels, _ = gan.load_images(config.data, config.size, config.channels)
    config = replace(config, flip=False)
    on = [gan.batches(images, labels, config, torch.device(name)) for name in ("cpu", "cuda")]
    for _ in range(7):
        (x, y), (x_cuda, y_cuda) = map(next, on)
        assert gap(x, x_cuda.cpu()) < 1e-6
        assert torch.equal(y, y_cuda.cpu())


@cuda
def test_train_with_nccl_in_one_process(tmp_path, folder):
    """The definition: torchrun with one process on one GPU trains to the end."""
    flags = [*TOY_FLAGS[:-4], "--data", folder, "--steps", "5", "--device", "cuda", "--runs", tmp_path]
    done = torchrun(HERE / "gan.py", "train", *flags, processes=1)
    assert done.returncode == 0, done.stderr
    assert "done at step 5" in done.stdout


# ---- gan.py: evaluation
def test_evaluate_returns_a_row_for_each_bound(own_run, folder, extractor_file):
    """By hand, of what was asked for."""
    rows = gan.evaluate(own_run, [0.5, None], 30, str(extractor_file), "cpu")
    assert [(row["trunc"], row["n"]) for row in rows] == [(0.5, 30), (None, 30)]
    for row in rows:
        assert (row["n_real"], row["steps"], row["seed"]) == (24, 6, 0)
        assert row["data"] == str(folder)
        assert row["version"] == gan.__version__


def test_evaluate_says_what_made_a_score(own_run, extractor_file, capsys):
    """The extractor's file, and the few images."""
    [row] = gan.evaluate(own_run, n=30, extractor=str(extractor_file), device="cpu")
    checksum = hashlib.sha256(extractor_file.read_bytes()).hexdigest()[:16]
    assert (row["network"], row["weights"], row["dtype"]) == ("tiny", checksum, "float32")
    assert row["notes"]
    out, err = capsys.readouterr()
    assert "FD(tiny)" in out
    assert all(note in err for note in row["notes"])


def test_evaluate_scores_what_generate_draws(own_run, folder, extractor_file):
    """metrics, by hand: samples of the images' classes in random order."""
    [row] = gan.evaluate(own_run, [0.5], 30, str(extractor_file), "cpu")
    images, labels, _ = gan.load_images(str(folder), 16, 3)
    order = torch.randperm(24, generator=seeded(0))
    G, _ = gan.load_generator(own_run, trunc=0.5)
    samples = gan.generate(G, 30, labels[order].tolist())
    network = metrics.load_extractor(extractor_file)
    expected = metrics.frechet_distance(network(images)[0], network(samples)[0])
    assert abs(row["FD(tiny)"] - expected) < 1e-6


def test_evaluate_appends_its_rows(own_run, extractor_file):
    """By hand: each call's rows, behind half a line of a killed process too."""
    first = gan.evaluate(own_run, n=20, extractor=str(extractor_file), device="cpu")
    with open(own_run / "eval.jsonl", "a") as file:
        file.write('{"trunc": 0.5, "ve')
    second = gan.evaluate(own_run, n=30, extractor=str(extractor_file), device="cpu")
    assert gan.read_rows(own_run / "eval.jsonl") == first + second


def test_evaluate_says_when_the_images_are_others(own_run, folder, tmp_path, extractor_file):
    """By hand: one image more than at training."""
    [row] = gan.evaluate(own_run, n=20, extractor=str(extractor_file), device="cpu")
    assert not any("trained on" in note for note in row["notes"])
    grown = shutil.copytree(folder, tmp_path / "grown")
    shutil.copy(next(Path(grown).rglob("*.png")), Path(grown) / "rose 1" / "more.png")
    [row] = gan.evaluate(own_run, n=20, extractor=str(extractor_file), device="cpu", data=str(grown))
    assert any("not the images that the run was trained on" in note for note in row["notes"])


def test_evaluate_draws_a_grid_for_each_bound(own_run, extractor_file):
    """The grids of generators with these bounds."""
    gan.evaluate(own_run, [0.5, None], 20, str(extractor_file), "cpu")
    for name, trunc in (("0.5", 0.5), ("none", None)):
        G, _ = gan.load_generator(own_run, trunc=trunc)
        drawn = pil_to_tensor(Image.open(own_run / f"eval-trunc-{name}.png"))
        assert torch.equal(drawn, gan.sample_grid(G))


def test_evaluate_without_weights_measures_swd_alone(own_run, folder, tmp_path, monkeypatch, capsys):
    """metrics.sliced_wasserstein, by hand; a line says how to get the weights, and what is measured without them."""
    monkeypatch.setattr(torch.hub, "download_url_to_file", raising(urllib.error.URLError("offline")))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    [row] = gan.evaluate(own_run, [0.5], 30, device="cpu")
    images, labels, _ = gan.load_images(str(folder), 16, 3)
    order = torch.randperm(24, generator=seeded(0))
    samples = gan.generate(gan.load_generator(own_run, trunc=0.5)[0], 30, labels[order].tolist())
    assert row["SWD"] == metrics.sliced_wasserstein(images, samples)
    assert row["network"] is None
    err = capsys.readouterr().err
    assert "--extractor" in err
    assert "only SWD" in err


def test_eval_command_knows_the_home_of_the_user(own_run, tmp_path, monkeypatch, capsys):
    """The shell's convention, which it does not apply behind an equals sign."""
    monkeypatch.setenv("HOME", str(tmp_path))
    err = fails(capsys, "eval", "--run", own_run, "--extractor=~/net.pt2", "--device", "cpu")
    assert f"no extractor {tmp_path / 'net.pt2'}" in err


def test_evaluate_reports_its_failures_before_the_long_work(own_run, monkeypatch, capsys):
    """The definition: the grids are written first."""
    monkeypatch.setattr(metrics, "load_extractor", raising(AssertionError("too late")))
    monkeypatch.setattr(os, "replace", raising(OSError(errno.EROFS, "Read-only file system")))
    assert "Read-only" in fails(capsys, "eval", "--run", own_run, "--device", "cpu")


def classes_drawn(G, data):
    _, labels, names = gan.load_images(str(data), 16, 3)
    return gan.classes_like(G, labels, names, seed=0)


def test_classes_like_matches_by_name(run, folder, tmp_path):
    """By hand: images of two of the three classes, whose numbers there are others."""
    for name in ("rose 10", "rose 9"):
        shutil.copytree(folder / name, tmp_path / name)
    G, _ = gan.load_generator(run)
    drawn = classes_drawn(G, tmp_path)
    assert sorted(drawn) == [1] * 8 + [2] * 8
    assert drawn != sorted(drawn)


def test_classes_like_of_images_without_classes(own_run, folder, extractor_file):
    """The definition: all classes evenly, which a note says."""
    assert classes_drawn(gan.load_generator(own_run)[0], folder / "rose 9") is None
    data = str(folder / "rose 9")
    [row] = gan.evaluate(own_run, n=20, extractor=str(extractor_file), device="cpu", data=data)
    assert "drawn evenly" in row["notes"][0]
    assert row["n_real"] == 8


def test_classes_like_refuses_unknown_classes(run, folder, tmp_path):
    """The definition."""
    shutil.copytree(folder / "rose 9", tmp_path / "tulip")
    with pytest.raises(gan.UserError, match="no class tulip"):
        classes_drawn(gan.load_generator(run)[0], tmp_path)


# ---- gan.py: commands
def test_train_command_goes_on_by_epochs(own_run):
    """By hand: 3 epochs of 3 steps, in place of the run's --steps 6."""
    gan.main(["train", "--resume", str(own_run), "--epochs", "3"])
    assert gan.read_checkpoint(own_run)["steps"] == 9


def test_train_command_refuses_a_name_with_resume(own_run, capsys):
    """The definition: a run keeps its folder."""
    assert "--name is for a new run" in fails(capsys, "train", "--resume", own_run, "--name", "other", "--steps", "9")


def sample(run, *argv):
    gan.main(["sample", "--run", str(run), "--device", "cpu", *map(str, argv)])


def test_sample_command_writes_arrays(run, tmp_path):
    """generate, by hand: the classes in turn."""
    sample(run, "--n", "7", "--out", tmp_path / "deep" / "s.npz")
    arrays = np.load(tmp_path / "deep" / "s.npz")
    expected = gan.generate(gan.load_generator(run)[0], 7, range(3))
    assert arrays["images"].dtype == np.uint8
    assert np.array_equal(arrays["images"], expected.permute(0, 2, 3, 1))
    assert np.array_equal(arrays["arr_0"], arrays["images"])
    assert arrays["labels"].tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_sample_command_writes_folders(run, tmp_path):
    """generate, by hand: a sub-folder for each class."""
    sample(run, "--n", "7", "--out", tmp_path / "out")
    expected = gan.generate(gan.load_generator(run)[0], 7, range(3))
    for i, image in enumerate(expected):
        path = tmp_path / "out" / NAMES[i % 3] / f"{i:05d}.png"
        assert torch.equal(pil_to_tensor(Image.open(path)), image)


def test_sample_command_draws_each_class_by_default(run, tmp_path):
    """By hand: the grid of 3 classes in 10 columns, or 10 samples per class."""
    sample(run, "--out", tmp_path / "s.png")
    assert Image.open(tmp_path / "s.png").size == (10 * 18 + 2, 3 * 18 + 2)
    sample(run, "--out", tmp_path / "s.npz")
    assert len(np.load(tmp_path / "s.npz")["labels"]) == 30


def test_sample_command_draws_so_many_in_a_picture(run, tmp_path):
    """generate and tile, by hand."""
    sample(run, "--n", "4", "--classes", "rose 9", "--out", tmp_path / "s.png")
    images = gan.generate(gan.load_generator(run)[0], 4, ["rose 9"])
    assert torch.equal(pil_to_tensor(Image.open(tmp_path / "s.png")), gan.tile(images))


def test_sample_command_takes_several_classes(run, tmp_path):
    """By hand: names and numbers."""
    sample(run, "--classes", "rose 10", "0", "0", "--n", "4", "--out", tmp_path / "s.npz")
    assert np.load(tmp_path / "s.npz")["labels"].tolist() == [2, 0, 0, 2]


def test_sample_command_draws_ten_of_each_named_class(run, tmp_path):
    """By hand."""
    sample(run, "--classes", "rose 9", "rose 1", "--out", tmp_path / "s.npz")
    assert len(np.load(tmp_path / "s.npz")["labels"]) == 20


def test_sample_command_draws_a_row_for_each_named_class(run, tmp_path):
    """sample_grid."""
    sample(run, "--classes", "rose 10", "rose 1", "--out", tmp_path / "s.png")
    grid = gan.sample_grid(gan.load_generator(run)[0], classes=["rose 10", "rose 1"])
    assert torch.equal(pil_to_tensor(Image.open(tmp_path / "s.png")), grid)


def test_sample_command_walks_so_often(run, tmp_path):
    """By hand: a row of ten for each walk."""
    sample(run, "--interpolate", "--n", "3", "--out", tmp_path / "w.png")
    assert Image.open(tmp_path / "w.png").size == (10 * 18 + 2, 3 * 18 + 2)


def test_sample_command_walks(run, tmp_path):
    """interpolate, by hand: 8 rows of 10 columns, in the named class."""
    sample(run, "--interpolate", "--classes", "rose 9", "--seed", "3", "--out", tmp_path / "w.png")
    walked = gan.interpolate(gan.load_generator(run)[0], ["rose 9"], seed=3)
    assert torch.equal(pil_to_tensor(Image.open(tmp_path / "w.png")), gan.tile(walked.flatten(0, 1)))


def traced(inputs):
    """Makes a GAN that appends to the list what reaches G's first layer."""

    class Traced(gan.GAN):
        @staticmethod
        def networks(config, num_classes):
            G, D = gan.GAN.networks(config, num_classes)
            G.linear.register_forward_pre_hook(lambda layer, given: inputs.append(given[0]))
            return G, D

    return Traced


def test_sample_command_feeds_g_the_truncated_normal(run, tmp_path):
    """The closed form of the distribution, at G's first layer, for the statistics and for the samples."""
    inputs = []
    argv = ["--run", str(run), "--trunc", "0.7", "--n", "2000", "--device", "cpu", "--out", str(tmp_path / "s.npz")]
    gan.main(["sample", *argv], model=traced(inputs))
    z = torch.cat(inputs)[:, :8].double()
    assert len(z) == 20 * 64 + 2000
    assert z.abs().max() <= 0.7
    for some in (z[: 20 * 64], z[20 * 64 :]):
        assert cdf_gap(some.flatten(), 0.7) < 0.02


BAD_INPUT = """
    train --size 48 | 48
    train --steps 0 | steps
    train --batch 1 | batch
    train --lr-G -1 | lr_G
    train --beta1 1 | beta1
    train --augment color,blur | augment
    train --name a/b | name
    train --name .. | name
    train --name . | name
    train --seed -1 | seed
    train --epochs x | --epochs
    train --batch 4000 | 4000
    train --amp fp16 --device cpu | fp16
    train --device privateuseone | device
    train --device mps | device
    train --data nowhere | nowhere
    train --data mnist --data-dir nowhere | mnist
    train --z-dim 999999999 --device cpu | z_dim
    train --width 999999999 --device cpu | width
    train --data ~no-such-user/x --device cpu | ~no-such-user/x
    sample --run ~no-such-user/x | ~no-such-user/x
    train --runs /dev/null/x | /dev/null/x
    train --los ns | --los
    train --resume nowhere | no run 'nowhere'
    sample --run nowhere | nowhere
    sample --n 4294967295 | 4294967295
    sample --n 0 | 0 is not
    sample --seed 99999999999999999999 | seed
    sample --trunc 0 | trunc
    sample --trunc x | trunc
    sample --trunc nan | trunc
    sample --trunc inf | trunc
    sample --classes 9223372036854775808 | 9223372036854775808
    sample --classes tulip | the generator has rose
    sample --out x.jpg | x.jpg
    sample --out x.npz --interpolate | a .png
    sample --out . | new folder
    eval --trunc 0.7 -1 | trunc
    eval --n 1 | 1 is not
    eval --extractor nowhere | nowhere
    eval --data nowhere | nowhere
    launch | launch
"""


@pytest.mark.parametrize("argv, hint", cases(BAD_INPUT))
def test_main_reports_bad_input_in_a_line(argv, hint, run, tmp_path, capsys, monkeypatch):
    """The definition: status 2, one short line with a hint, and nothing is written."""
    if torch.backends.mps.is_available() and "mps" in argv:
        pytest.skip("MPS works here")
    monkeypatch.chdir(tmp_path)
    where = [] if argv.startswith(("train", "launch")) else ["--runs", run.parent]
    err = fails(capsys, *argv.split(), *where)
    assert hint in err
    assert len(err) <= 250
    assert not (tmp_path / "runs").exists()


def test_main_reports_that_there_are_no_threads_left(monkeypatch, capsys):
    """Python's own message, which threading raises where the system refuses."""
    monkeypatch.setattr(gan, "train", raising(RuntimeError("can't start new thread")))
    assert "OMP_NUM_THREADS=1" in fails(capsys, "train")


def test_main_keeps_warnings_from_the_terminal(run, tmp_path):
    """The definition: advice to programmers, such as Pillow's on a large picture."""
    Image.new("L", (10_000, 9_000)).save(tmp_path / "large.png")
    flags = ["--runs", tmp_path / "runs", "--data", tmp_path, *TOY_FLAGS, "--batch", "2"]
    done = command(HERE / "gan.py", "train", *flags, cwd=tmp_path)
    assert done.stderr.count("\n") == 1
    assert "--batch 2 is more than the 1 images" in done.stderr


def test_main_ends_with_130_when_interrupted(monkeypatch, capsys):
    """The shell's convention: 128 and the number of SIGINT."""
    monkeypatch.setattr(gan, "train", raising(KeyboardInterrupt()))
    with pytest.raises(SystemExit) as exit:
        gan.main(["train"])
    assert exit.value.code == 130
    assert capsys.readouterr().err.endswith("error: interrupted\n")


def test_main_shows_faults_of_the_program(monkeypatch):
    """The definition: they are no input's fault, so their traceback is needed."""
    monkeypatch.setattr(gan, "train", raising(KeyError("a fault")))
    with pytest.raises(KeyError):
        gan.main(["train"])


@contextlib.contextmanager
def training(folder, cwd, steps):
    """Starts `gan.py train` as a process, and waits until it has logged step 3."""
    argv = [HERE / "gan.py", "train", "--data", folder, *TOY_FLAGS, "--steps", steps, "--log-every", "1"]
    options = dict(cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, *map(str, argv)], **options) as process:
        for line in process.stdout:
            if line.startswith("step 3/"):
                break
        yield process


def steps_of_only_run(cwd):
    [checkpoint] = (cwd / "runs").glob("*/checkpoint.pt")
    return gan.read_checkpoint(checkpoint)["steps"]


def test_main_saves_when_it_is_terminated(folder, tmp_path):
    """The definition: SIGTERM from outside, as a cluster sends it; status 0."""
    with training(folder, tmp_path, 100_000) as process:
        process.terminate()
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert err == ""
    steps = steps_of_only_run(tmp_path)
    assert 3 <= steps < 100_000
    assert f"stopped at step {steps}" in out


def test_main_trains_on_without_a_reader(folder, tmp_path):
    """The definition: a closed pipe changes nothing."""
    with training(folder, tmp_path, 30) as process:
        process.stdout.close()
        process.wait(timeout=60)
    assert steps_of_only_run(tmp_path) == 30


class Layers(torch.nn.Sequential):
    def forward(self, x, y=None):
        return super().forward(x)


@dataclass
class MyConfig(gan.Config):
    pull: float = gan.option(0.5, "weight of the squared logits in G's loss")
    push: float = 0.0  # a plain field


class Mine(gan.GAN):
    """Has other networks, a rule of its own and an option of its own."""

    Config = MyConfig

    @staticmethod
    def networks(c, num_classes):
        linear = torch.nn.Linear(c.z_dim, 3 * c.size**2)
        G = Layers(linear, torch.nn.Unflatten(1, (3, c.size, c.size)), torch.nn.BatchNorm2d(3), torch.nn.Tanh())
        G.z_dim = c.z_dim
        G.num_classes = num_classes
        conv = torch.nn.Conv2d(3, c.width, c.size)
        D = Layers(conv, torch.nn.ReLU(), torch.nn.Conv2d(c.width, 1, 1), torch.nn.Flatten(0))
        return G, D

    def update_G(self, real, fake, y, real_logits):
        logits = self.D(fake, y)
        loss = self.config.pull * (logits - 1).square().mean()
        self.descend(self.opt_G, loss)
        return loss.detach()


OWN_FLAGS = ["--pull", "0.25", "--push", "2"]


@pytest.fixture
def mine(tmp_path):
    """Trains a subclass for 3 steps by its command line."""
    argv = ["train", *TOY_FLAGS, *OWN_FLAGS, "--steps", "3", "--runs", str(tmp_path), "--name", "mine"]
    gan.main(argv, Mine)
    return tmp_path / "mine"


def test_main_of_a_subclass_resumes(mine, tmp_path):
    """The uninterrupted run, bit for bit."""
    argv = ["train", *TOY_FLAGS, *OWN_FLAGS, "--steps", "5", "--runs", str(tmp_path), "--name", "whole"]
    gan.main(argv, Mine)
    gan.main(["train", "--resume", str(mine), "--steps", "5"], Mine)
    same_state(tmp_path / "whole", mine, Mine)


def test_main_of_a_subclass_keeps_its_option(mine, capsys):
    """The definition: it is stored, and cannot change."""
    assert gan.read_checkpoint(mine, Mine)["config"].pull == 0.25
    assert "pull cannot change" in fails(capsys, "train", "--resume", mine, "--pull", "1", model=Mine)


def test_main_of_a_subclass_has_flags_for_plain_fields(mine, capsys):
    """The definition."""
    assert gan.read_checkpoint(mine, Mine)["config"].push == 2.0
    assert "push cannot change" in fails(capsys, "train", "--resume", mine, "--push", "1", model=Mine)
    with pytest.raises(gan.UserError, match="push cannot be 'x': float"):
        gan.resolve(MyConfig(push="x"))


def test_resolve_names_the_choices():
    """The definition."""
    with pytest.raises(gan.UserError, match="amp cannot be 'x': .*; one of auto, bf16, fp16, off"):
        gan.resolve(gan.Config(amp="x"))


class Other(Mine):
    """Has the networks and options of Mine, but could have any step."""


def test_train_says_that_another_program_goes_on(mine, capsys):
    """The definition: a checkpoint does not hold the step."""
    gan.main(["train", "--resume", str(mine), "--steps", "4"], Mine)
    assert "goes on as" not in capsys.readouterr().out
    gan.main(["train", "--resume", str(mine), "--steps", "5"], Other)
    assert "is of Mine, and goes on as Other" in capsys.readouterr().out


def test_train_resume_checks_the_flags_before_it_reads_the_images(mine, capsys):
    """The definition: of two mistakes it names the one that needs no images."""
    said = fails(capsys, "train", "--resume", mine, "--batch", "3", "--data", "nowhere", model=Mine)
    assert "batch cannot change" in said


def test_read_checkpoint_names_the_loss_of_another_program(mine, monkeypatch):
    """The definition."""
    monkeypatch.delitem(gan.D_LOSSES, "rpgan")
    with pytest.raises(gan.UserError, match="needs the program that trained it: loss cannot be 'rpgan'"):
        gan.read_checkpoint(mine, Mine)


def test_prepare_refuses_a_taken_name_before_it_reads_the_images(mine, tmp_path, capsys):
    """The definition."""
    argv = ["train", "--name", "mine", "--runs", tmp_path, "--data", "nowhere"]
    assert "choose another --name" in fails(capsys, *argv, model=Mine)


def test_class_index_of_a_generator_without_classes(mine):
    """The definition."""
    G, _ = gan.load_generator(mine, model=Mine)
    with pytest.raises(gan.UserError, match="no class rose: the generator has no classes"):
        gan.choose_classes(G, 1, ["rose"])


def test_main_of_a_subclass_scores_and_samples(mine, tmp_path, extractor_file):
    """By hand, of what was asked for."""
    argv = ["--run", str(mine), "--device", "cpu"]
    gan.main(["eval", *argv, "--n", "20", "--extractor", str(extractor_file), "--trunc", "0.7"], Mine)
    gan.main(["sample", *argv, "--n", "6", "--out", str(tmp_path / "x.npz")], Mine)
    [row] = gan.read_rows(mine / "eval.jsonl")
    assert (row["trunc"], row["n"]) == (0.7, 20)
    assert np.load(tmp_path / "x.npz")["images"].shape == (6, 16, 16, 3)


@pytest.mark.parametrize("argv", ["sample --run", "train --resume"])
def test_main_needs_the_program_that_trained_a_run(argv, mine, capsys):
    """The definition: one line that names the unknown option."""
    assert "GAN has no pull" in fails(capsys, *argv.split(), mine)


# ---- gan.py: flowers
@pytest.fixture(scope="session")
def flowers():
    return gan.draw_flowers(32, 3)


def test_draw_flowers_gives_17_classes_of_80(flowers):
    """The definition."""
    images, labels, classes = flowers
    assert images.shape == (1360, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert labels.bincount().tolist() == [80] * 17
    assert len(set(classes)) == 17


def test_draw_flowers_gives_the_same_each_time(flowers):
    """Another call, from another state of torch's generator."""
    torch.manual_seed(5)
    assert torch.equal(flowers[0], gan.draw_flowers(32, 3)[0])


def test_draw_flowers_in_gray():
    """The definition."""
    images, _, _ = gan.draw_flowers(16, 1, per_class=2)
    assert images.shape == (34, 1, 16, 16)


def test_draw_flowers_makes_classes_that_differ(flowers):
    """The nearest class mean, by numpy."""
    images, labels, _ = flowers
    x = images.flatten(1).numpy() / 255
    means = [x[labels == c].mean(0) for c in range(17)]
    distances = np.stack([np.linalg.norm(x - mean, axis=1) for mean in means])
    assert (distances.argmin(0) == labels.numpy()).mean() > 0.9


def test_draw_flowers_varies_within_a_class(flowers):
    """The standard deviation of each pixel, by numpy."""
    images, labels, _ = flowers
    for c in range(17):
        assert (images[labels == c].numpy() / 255).std(0).mean() > 0.04


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

    def kernel(a, b):
        return ((a @ b.T / 3 + 1) ** 3).numpy()

    within = [(kernel(z, z).sum() - np.trace(kernel(z, z))) / (len(z) * (len(z) - 1)) for z in (x, y)]
    expected = sum(within) - 2 * kernel(x, y).mean()
    assert abs(metrics.kernel_distance(x, y, block) - expected) < 1e-9


@pytest.mark.parametrize("shift, block", [(0, 512), (0, 7), (1e3, 512)])
def test_precision_recall_equal_their_definitions(shift, block):
    """By the definitions, point by point."""
    real = normal(40, 2, 0)
    fake = normal(30, 2, 1) * 0.7 + 0.5
    k = 3

    def distance(a, b):
        return math.dist(a.tolist(), b.tolist())

    def radius(x, i):
        return sorted(distance(x[i], other) for other in x)[k]

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
    patches = metrics.laplacian_patches(flat, seed=0)[(1, 16, 16)]
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
        (
            metrics.sliced_wasserstein,
            (pixels(2, 3, 32, 32), pixels(2, 1, 32, 32)),
            r"one size .* not \[3, 32, 32\] and \[1, 32, 32\]",
        ),
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
    with pytest.raises(metrics.UserError, match=r"net is not a .* network that gives features \[N,d\] .*: [^\n]*$"):
        network(pixels(2, 3, 8, 8))


def test_extractor_does_not_blame_the_network_for_a_lack_of_memory():
    """By its docstring: main says what helps."""

    def network(x):
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        metrics.Extractor(network, "net", "0" * 16)(pixels(2, 3, 8, 8))


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
    with pytest.raises(type(failure)) as caught:
        yield
    assert getattr(caught.value, "filename", str(path)) == str(path)
    assert list(path.parent.iterdir()) == [path] and path.read_bytes() == b"before"


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
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


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
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


@pytest.mark.parametrize("error", [ImportError("no module"), MemoryError(), RuntimeError("can't allocate memory")])
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
    singles = [tiny(metrics.read_image(tmp_path / file)[0][None])[0] for file in files]
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


def test_run_of_swd_measures_only_what_it_saves(score, sets, folder, tmp_path, monkeypatch):
    """By hand: --out keeps the statistics of REAL; SWD takes no others."""
    measured = []
    summary = metrics.Summary(metrics.FeatureStats.from_features(normal(9, 3, 0)))
    monkeypatch.setattr(metrics, "measure", lambda network, images, progress: measured.append(images) or summary)
    result = score(folder, tmp_path / "hwc.npy", "--metrics", "swd,swd", "--out", tmp_path / "real.npz")
    assert list(result["scores"]) == ["SWD"]
    assert len(measured) == 1


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
    assert "dark images, most from 0 to 10" in score(dark, dark)["notes"][-1]


def test_run_notes_the_pages_and_runs_that_are_left_out(score, tmp_path):
    """By hand: three pages behind a first one, and a run with a picture."""
    picture_folder(tmp_path / "a")
    pages = [Image.new("L", (16, 16), shade) for shade in (9, 80, 120, 200)]
    pages[0].save(tmp_path / "a" / "stack.tif", save_all=True, append_images=pages[1:])
    bmp_folder(tmp_path / "run", 200)
    for name in ("config.json", "checkpoint.pt"):
        (tmp_path / "run" / name).write_text("{}")
    notes = score(tmp_path, tmp_path)["notes"]
    assert f"{tmp_path}: left out 3 pages: only the first of each file is used" in notes
    assert f"{tmp_path}: left out the runs run" in notes


def test_folder_counts_pages_once(tmp_path):
    """By hand: several scores read a folder several times."""
    pages = [Image.new("L", (16, 16), shade) for shade in (9, 80, 120, 200)]
    pages[0].save(tmp_path / "stack.tif", save_all=True, append_images=pages[1:])
    folder = metrics.Folder(tmp_path)
    for _ in range(2):
        assert len(list(folder.read(8))) == 1
    assert folder.pages == {Path("stack.tif"): 3}


def test_main_of_metrics_reports_a_lack_of_memory_in_one_line(monkeypatch, capsys):
    """By hand: what torch says of the CPU's memory is no fault of the program, other errors are."""
    monkeypatch.setattr(metrics, "run", raising(RuntimeError("[..] can't allocate memory: you tried to")))
    assert metrics.main(["a", "b"]) == 2
    assert capsys.readouterr().err == "metrics.py: error: [..] can't allocate memory: you tried to\n"
    monkeypatch.setattr(metrics, "run", raising(RuntimeError("a fault")))
    with pytest.raises(RuntimeError, match="a fault"):
        metrics.main(["a", "b"])


def test_main_knows_the_home_of_the_user(tmp_path, monkeypatch, capsys):
    """The shell's convention, which it does not apply behind an equals sign."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert metrics.main(["~/real", "~/fake"]) == 2
    assert f"{tmp_path}/real is neither" in capsys.readouterr().err


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
