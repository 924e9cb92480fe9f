# SPDX-License-Identifier: MIT
"""Tests of autoencoder.py at toy size: offline, on the CPU."""

import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import autoencoder
import gan


def test_moment_loss_against_closed_forms():
    root = math.sqrt(3)
    exact = torch.tensor([root, -root, 0, 0, 0, 0])  # mean 0, variance 1, kurtosis 9 / 3
    assert autoencoder.moment_loss(exact[:, None]) < 1e-10
    assert autoencoder.moment_loss(exact[:, None] + 2).item() == pytest.approx(4, abs=1e-5)  # the mean alone
    assert autoencoder.moment_loss(exact[:, None] * 2).item() == pytest.approx(9, abs=1e-5)  # a variance of 4
    coin, uniform = torch.tensor([1.0, -1.0] * 50), torch.linspace(-1, 1, 100_001, dtype=torch.float64) * root
    assert autoencoder.moment_loss(coin[:, None]).item() == pytest.approx((1 - 3) ** 2, abs=1e-5)
    assert autoencoder.moment_loss(uniform[:, None]).item() == pytest.approx((9 / 5 - 3) ** 2, abs=1e-3)
    both = torch.stack([coin, torch.zeros(100).index_fill(0, torch.tensor([0, 1]), 0) + coin * 3], dim=1)
    assert autoencoder.moment_loss(both).item() == pytest.approx((4 + 4 + 64) / 2, abs=1e-4)  # the mean over latents


def test_descent_on_the_moment_loss_makes_a_normal():
    torch.manual_seed(0)
    z = (3 + 5 * torch.rand(2000, 3)).requires_grad_()
    before, optimizer = autoencoder.kolmogorov_distance(z.detach()), torch.optim.Adam([z], 0.05)
    for _ in range(300):
        optimizer.zero_grad()
        autoencoder.moment_loss(z).backward()
        optimizer.step()
    assert autoencoder.moment_loss(z) < 1e-3 and (autoencoder.kolmogorov_distance(z.detach()) < before / 5).all()


def test_kolmogorov_distance_against_closed_forms():
    n = 1000
    middle = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)  # as close as n numbers come
    columns = torch.stack([middle, middle + 1, torch.zeros(n), torch.full((n,), 9.0)], dim=1)
    shifted = 2 * torch.special.ndtr(torch.tensor(0.5)).item() - 1  # of two normals one apart, halfway
    distances = autoencoder.kolmogorov_distance(columns[torch.randperm(n)])
    assert distances.tolist() == pytest.approx([0.5 / n, shifted, 0.5, 1], abs=1.5 / n)


def test_training_rebuilds_and_shapes(tmp_path):
    images = gan.load_images("synthetic", 32, 1)[0][:256]
    nets = {m: autoencoder.train(images, images[:64], epochs=8, moments=m, batch=32) for m in (False, True)}
    net, history = nets[False]
    assert history.shape == (8, 64, 100) and torch.equal(history[-1], net.encode(gan.to_float(images[:64])))
    x = gan.to_float(images)
    assert F.mse_loss(net.decode(history[-1]), x[:64]) < 0.6 * F.mse_loss(x.mean(dim=0).expand(64, -1, -1, -1), x[:64])
    distances = {m: autoencoder.kolmogorov_distance(history[-1]).median() for m, (_, history) in nets.items()}
    assert distances[True] < 0.7 * distances[False]
    first = autoencoder.train(images, images[:64], epochs=1, batch=32)[1]
    assert torch.equal(first, autoencoder.train(images, images[:64], epochs=1, batch=32)[1])
    autoencoder.draw_figure(tmp_path / "x.png", history, {"samples": images[:18]})
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_walks_are_straight():
    ends = torch.tensor([[0.0, 1.0], [8.0, 5.0], [9.0, 9.0], [9.0, 1.0]])
    assert autoencoder.walk(ends).tolist() == [[i, 1 + i / 2] for i in range(9)] + [[9, 9 - i] for i in range(9)]


def test_the_gan_is_inverted(tmp_path):
    shape = dict(size=32, channels=1, width=4, max_width=8, z_dim=4, batch=8, steps=8, device="cpu", amp="off")
    G, _ = gan.load_generator(gan.train(gan.Config(**shape, runs=str(tmp_path))))
    samples = gan.to_uint8(G(gan.sample_z(2, 4, generator=torch.Generator().manual_seed(3))))
    found = gan.to_uint8(G(autoencoder.invert(G, samples, starts=8, steps=60)))
    assert F.mse_loss(found.float(), samples.float()) < F.mse_loss(samples[:1].float(), samples[1:].float()) / 4


def test_bad_input_ends_with_one_line(tmp_path, capsys):
    for argv in (["--extractor", "no.pt2"], ["--gan", str(tmp_path / "no")], ["--epochs", "2"]):
        with pytest.raises(SystemExit) as stop:
            autoencoder.main(argv)
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
