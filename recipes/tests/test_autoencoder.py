# SPDX-License-Identifier: MIT
import math

import pytest
import torch
import torch.nn.functional as F

import autoencoder
import gan

ROOT = math.sqrt(3)
EXACT = torch.tensor([ROOT, -ROOT, 0, 0, 0, 0])  # mean 0, variance 1, kurtosis 9 / 3
COIN = torch.tensor([1.0, -1.0] * 50)  # kurtosis 1
UNIFORM = torch.linspace(-ROOT, ROOT, 100_001, dtype=torch.float64)  # kurtosis 9 / 5


@pytest.mark.parametrize(
    "z, loss",
    [
        (EXACT, 0),
        (EXACT + 2, 2**2),  # of the mean alone
        (EXACT * 2, (4 - 1) ** 2),  # of a variance of 4
        (COIN, (1 - 3) ** 2),
        (UNIFORM, (9 / 5 - 3) ** 2),
    ],
)
def test_moment_loss_agrees_with_closed_forms(z, loss):
    assert autoencoder.moment_loss(z[:, None]).item() == pytest.approx(loss, abs=1e-3)


def test_moment_loss_averages_the_latents():
    both = torch.stack([COIN, 3 * COIN], dim=1)
    expected = (2**2 + 2**2 + (9 - 1) ** 2) / 2  # both kurtoses, and the variance of the second
    assert autoencoder.moment_loss(both).item() == pytest.approx(expected, abs=1e-4)


def test_moment_loss_makes_a_normal_by_descent():
    torch.manual_seed(0)
    z = (3 + 5 * torch.rand(2000, 3)).requires_grad_()
    before = autoencoder.kolmogorov_distance(z.detach())
    optimizer = torch.optim.Adam([z], 0.05)
    for _ in range(300):
        optimizer.zero_grad()
        autoencoder.moment_loss(z).backward()
        optimizer.step()
    assert autoencoder.moment_loss(z) < 1e-3
    assert (autoencoder.kolmogorov_distance(z.detach()) < before / 5).all()


def test_kolmogorov_distance_agrees_with_closed_forms():
    n = 1000
    middle = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)  # as close as n numbers come
    columns = [middle, middle + 1, torch.zeros(n), torch.full((n,), 9.0)]
    shuffled = torch.stack(columns, dim=1)[torch.randperm(n)]
    halfway = torch.special.ndtr(torch.tensor([-0.5, 0.5]))
    shifted = (halfway[1] - halfway[0]).item()  # of two normals one apart
    expected = [0.5 / n, shifted, 0.5, 1]
    assert autoencoder.kolmogorov_distance(shuffled).tolist() == pytest.approx(expected, abs=1.5 / n)


# ---- Training
@pytest.fixture(scope="module")
def images():
    return gan.load_images("synthetic", 32, 1)[0][:256]


@pytest.fixture(scope="module")
def plain(images):
    return autoencoder.train(images, images[:64], epochs=8, factor=0, batch=32)


def test_train_returns_the_latents_of_each_epoch(images, plain):
    net, history = plain
    assert history.shape == (8, 64, 100)
    assert torch.equal(history[-1], net.encode(gan.to_float(images[:64])))


def test_train_rebuilds_the_images(images, plain):
    net, history = plain
    x = gan.to_float(images)
    mean = x.mean(dim=0).expand(64, -1, -1, -1)
    assert F.mse_loss(net.decode(history[-1]), x[:64]) < 0.6 * F.mse_loss(mean, x[:64])


def test_train_with_the_moment_loss_makes_latents_more_normal(images, plain):
    _, shaped = autoencoder.train(images, images[:64], epochs=8, factor=2, batch=32)
    before, after = (autoencoder.kolmogorov_distance(z[-1]).median() for z in (plain[1], shaped))
    assert after < 0.7 * before


def test_train_follows_from_the_seed(images):
    _, first = autoencoder.train(images, images[:64], epochs=1, factor=2, batch=32)
    _, second = autoencoder.train(images, images[:64], epochs=1, factor=2, batch=32)
    assert torch.equal(first, second)


def test_draw_figure_writes_a_picture(images, plain, tmp_path):
    autoencoder.draw_figure(tmp_path / "x.png", plain[1], {"samples": images[:18]})
    assert (tmp_path / "x.png").stat().st_size > 10_000


# ---- The mixture
def test_fit_mixture_of_one_normal_has_its_moments():
    """By the definitions of mean and covariance, which a single normal takes from the data."""
    torch.manual_seed(0)
    z = torch.randn(500, 3) @ torch.randn(3, 3) + torch.arange(3)
    fitted = autoencoder.fit_mixture(z, k=1).component_distribution
    assert torch.allclose(fitted.mean[0], z.mean(dim=0), atol=1e-4)
    assert torch.allclose(fitted.covariance_matrix[0], torch.cov(z.T, correction=0), atol=2e-3)


def test_fit_mixture_finds_the_normals_that_made_the_points():
    """By construction: three times as many points about 8, of a tenth of the deviation."""
    torch.manual_seed(0)
    z = torch.cat([torch.randn(1000, 2), 8 + 0.1 * torch.randn(3000, 2)])
    mixture = autoencoder.fit_mixture(z, k=2)
    wide, narrow = mixture.component_distribution.stddev.mean(dim=1).sort(descending=True).values
    shares = mixture.mixture_distribution.probs.sort().values
    assert shares.tolist() == pytest.approx([0.25, 0.75], abs=0.01)
    assert wide == pytest.approx(1, abs=0.05)
    assert narrow == pytest.approx(0.1, abs=0.02)


# ---- The command
@pytest.fixture
def small_mnist(images, monkeypatch, put_reader):
    """Puts drawn flowers in the place of MNIST, and the means of quarters in the place of its reader."""
    put_reader(lambda x: F.adaptive_avg_pool2d(x[:, :1], 2).flatten(1))
    monkeypatch.setattr(gan, "load_images", lambda *_: (images, torch.zeros(256, dtype=torch.int64), []))
    monkeypatch.setattr(autoencoder.classifier, "load_test_set", lambda *_: (images[:64], None))


def train_gan(tmp_path, size):
    shape = {"size": size, "channels": 1, "width": 4, "max_width": 8, "z_dim": 4, "batch": 8, "amp": "off"}
    return str(gan.train(gan.Config(**shape, steps=2, device="cpu", runs=str(tmp_path))))


def test_main_compares_each_factor_and_the_gan(tmp_path, small_mnist, monkeypatch, capsys):
    """By the lines it prints: three kinds of noise for each factor."""
    monkeypatch.setattr(autoencoder, "FACTORS", (0, 2))
    argv = ["--gan", train_gan(tmp_path, 32), "--epochs", "3", "--out", str(tmp_path / "x.png")]
    capsys.readouterr()
    autoencoder.main(argv)
    lines = [line for line in capsys.readouterr().out.splitlines() if "FD(digits)" in line]
    assert [line.partition(":")[0] for line in lines] == ["factor 0"] * 3 + ["factor 2"] * 3 + ["GAN"]
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_main_refuses_a_gan_of_another_size(tmp_path, refusal):
    assert "gray images of 32 pixels" in refusal(autoencoder.main, ["--gan", train_gan(tmp_path, 16)])


@pytest.mark.parametrize("flag, value", [("--extractor", "no.pt2"), ("--gan", "no"), ("--epochs", "2")])
def test_main_refuses_bad_flags(flag, value, refusal):
    assert value in refusal(autoencoder.main, [flag, value])
