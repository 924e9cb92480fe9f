# SPDX-License-Identifier: MIT
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import gan
import wgan

TOY = {"size": 16, "width": 4, "max_width": 8, "z_dim": 8, "batch": 8, "device": "cpu", "amp": "off"}


def critic(**change):
    torch.manual_seed(0)
    return wgan.Critic(gan.resolve(wgan.Config(**TOY, channels=1, **change)))


@torch.no_grad()
def slopes(D):
    """Measures slopes of a D in float64 between random images of all sizes and distances, [N]."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(256, 1, 16, 16, generator=generator, dtype=torch.float64) * 2 - 1
    step = torch.randn(x.shape, generator=generator) * torch.logspace(-2, 0, 256)[:, None, None, None]
    return (D(x) - D(x + step)).abs() / step.flatten(1).norm(dim=1)


def test_critic_has_weights_of_bounded_norm():
    """torch.linalg.matrix_norm: the root of 2 for kernels of 3x3, else 1."""
    for layer in gan.layers_of(critic().eval(), nn.Conv2d, nn.Linear):
        most = 2**0.5 if layer.weight.shape[2:] == (3, 3) else 1
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2) < 1.02 * most


def test_critic_keeps_its_slope_when_its_weights_grow():
    D = critic().double().eval()  # since a small step moves float32 logits by few digits
    before = slopes(D)
    with torch.no_grad():
        for p in D.parameters():
            if p.ndim > 1:
                p *= 100  # which an optimizer may do
    assert torch.allclose(before, slopes(D), rtol=1e-3)


@torch.no_grad()
def test_critic_with_batch_norm_has_no_bounded_slope():
    """By definition: batch norm blows up whatever differs within a batch, so half of the distance doubles the slope."""

    def steepest(D, scale):
        x = scale * torch.rand(64, 1, 16, 16, generator=torch.Generator().manual_seed(0))
        rise = (D(x)[1:] - D(x)[:-1]).abs().max()
        return (rise / (x[1:] - x[:-1]).flatten(1).norm(dim=1).max()).item()

    plain, normed = critic(), critic(batch_norm=True)
    assert steepest(plain, 0.01) == pytest.approx(steepest(plain, 0.02), rel=0.2)
    assert steepest(normed, 0.01) == pytest.approx(2 * steepest(normed, 0.02), rel=0.2)


def test_critic_with_batch_norm_has_one_after_each_block():
    assert len(gan.layers_of(critic(), nn.BatchNorm2d)) == 0
    assert len(gan.layers_of(critic(batch_norm=True), gan.BatchNorm)) == 2  # which torchrun's processes share


def test_critic_multiplies_by_the_gain():
    x = torch.randn(6, 1, 16, 16)
    assert torch.allclose(critic(gain=100).eval()(x), 100 * critic().eval()(x), rtol=1e-4)


def test_critic_can_end_in_a_sigmoid():
    x = torch.randn(6, 1, 16, 16)
    assert torch.allclose(critic(sigmoid=True).eval()(x), critic().eval()(x).sigmoid(), rtol=1e-4)


@torch.no_grad()
def normalise(matrix, u, iterations):
    """Divides a matrix [m,n] by its norm, as so many power iterations from u[m] find it."""
    for _ in range(iterations):
        v = F.normalize(matrix.T @ u, dim=0)
        u = F.normalize(matrix @ v, dim=0)
    return matrix / (u @ matrix @ v)


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_critic_makes_as_many_power_iterations_as_asked_for(iterations):
    """By hand, on a weight of close singular values, whose norm each iteration finds better."""
    layer = critic(power_iterations=iterations).blocks[0].skip
    matrix = torch.eye(8, 4) * torch.tensor([1, 0.9, 0.8, 0.7])
    u = F.normalize(torch.ones(8), dim=0)
    layer.parametrizations.weight.original.data = matrix[:, :, None, None]
    layer.parametrizations.weight[0].u.copy_(u)
    weight = layer.weight[:, :, 0, 0]
    assert torch.allclose(weight, normalise(matrix, u, iterations), rtol=1e-5)
    assert not torch.allclose(weight, normalise(matrix, u, iterations + 1), rtol=1e-3)


def test_variants_all_differ():
    """By the configs that their flags make."""
    configs = map(wgan.STUDY.config, wgan.VARIANTS)
    assert len(set(map(repr, configs))) == len(wgan.VARIANTS)


def weights_after_three_steps(**change):
    """Trains G against a critic; returns G's weights [n]."""
    images, labels, _ = gan.load_images("synthetic", 16, 1)
    model = wgan.WGAN(gan.resolve(wgan.Config(**TOY, channels=1, **change)))
    data = gan.batches(images, labels, model.config, model.device)
    for _ in range(3):
        model.train_step(data)
    return torch.cat([p.detach().flatten() for p in model.G.parameters()])


def test_adam_cancels_a_gain_only_in_a_linear_loss():
    moved = {}
    for loss in ("wgan", "ns"):
        plain = weights_after_three_steps(loss=loss)
        moved[loss] = (weights_after_three_steps(loss=loss, gain=64.0) - plain).norm()
    assert moved["wgan"] < moved["ns"] / 3, moved


def test_shares_find_the_rarest_and_the_commonest_digit():
    read = torch.tensor([3] * 12 + [5] * 6 + [0, 1])
    assert wgan.shares(torch.eye(10)[read], None) == pytest.approx((0, 60))
    assert wgan.shares(torch.eye(10).repeat(20, 1), None) == pytest.approx((10, 10))


def test_study_trains_by_the_program_of_the_recipe(tmp_path, put_reader):
    """Starts it, as a command line does: gan.py knows no --batch-norm."""
    put_reader(lambda x: (x.mean(dim=(2, 3)), torch.eye(10)[3].expand(len(x), 10)))  # reads every image as a 3
    flags = "--channels 1 --size 16 --width 4 --max-width 8 --z-dim 8 --batch 8 --device cpu --amp off"
    study = replace(wgan.STUDY, data="synthetic", flags=flags, n=34)
    study.main(["--out", str(tmp_path), "--steps", "1", "--variants", "batch norm in the critic"])
    assert (tmp_path / "study.md").read_text().count("| 0.0 | 100.0 |") == 2  # the real images too
    assert Image.open(tmp_path / "study.png").width == 960
    config = gan.read_checkpoint(tmp_path / "batch-norm-in-the-critic-seed0", wgan.WGAN)["config"]
    assert config.batch_norm


def test_networks_refuse_classes(tmp_path, refusal):
    argv = ["train", "--loss", "wgan", "--cond", "--data", "synthetic", "--runs", str(tmp_path)]
    assert "this critic sees no classes" in refusal(gan.main, argv, wgan.WGAN)
