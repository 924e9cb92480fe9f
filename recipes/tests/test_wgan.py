# SPDX-License-Identifier: MIT
"""Tests of wgan.py at toy size: offline, on the CPU.    python -m pytest recipes/test_wgan.py"""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import gan
import metrics
import wgan

TOY = dict(size=16, width=4, max_width=8, z_dim=8, batch=8, device="cpu", amp="off")


def critic(**change):
    torch.manual_seed(0)
    return wgan.Critic(gan.resolve(wgan.Config(**TOY, channels=1, **change)))


def slopes(D, generator):
    """D's slopes between random images of all sizes and distances, [N]."""
    x = torch.rand(256, 1, 16, 16, generator=generator) * 2 - 1
    y = x + torch.randn(x.shape, generator=generator) * torch.logspace(-2, 0, 256)[:, None, None, None]
    return (D(x) - D(y)).abs() / (x - y).flatten(1).norm(dim=1)


@torch.no_grad()
def test_spectral_norm_bounds_the_slope_of_the_critic_and_batch_norm_lifts_the_bound():
    # A kernel of 3x3 whose matrix has norm 1 stretches an image by 3 at most; a mean over 2x2 pixels halves it, the sum
    # over 4x4 stretches by 4. A block is a mean of (3 * 3 of its convs + 1 of its skip).
    bound = 3 * ((3 * 3 + 1) / 2) ** 2 * 4
    for gain in (1.0, 0.05):
        D = critic(gain=gain).eval()
        for layer in (m for m in D.modules() if isinstance(m, (nn.Conv2d, nn.Linear))):
            assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2) < 1.02
        before = slopes(D, torch.Generator().manual_seed(1))
        for p in (p for p in D.parameters() if p.ndim > 1):
            p *= 100  # which an optimizer may do
        after = slopes(D, torch.Generator().manual_seed(1))
        assert torch.allclose(before, after, rtol=1e-3) and 0 < after.max() < 1.1 * gain * bound
    D = critic(batch_norm=True)
    x = 1e-3 * torch.rand(64, 1, 16, 16)  # in training, batch norm blows up whatever differs within a batch
    assert (D(x)[1:] - D(x)[:-1]).abs().max() / (x[1:] - x[:-1]).flatten(1).norm(dim=1).max() > bound


def test_each_change_is_what_it_says():
    x = torch.randn(6, 1, 16, 16)
    plain = critic().eval()(x)
    assert torch.allclose(critic(gain=100).eval()(x), 100 * plain, rtol=1e-4)
    assert torch.allclose(critic(sigmoid=True).eval()(x), plain.sigmoid(), rtol=1e-4)
    count = lambda D: sum(isinstance(m, nn.BatchNorm2d) for m in D.modules())
    assert count(critic(batch_norm=True)) == 2 and count(critic()) == 0
    configs = {name: replace(wgan.STUDY.setting, **change) for name, change in wgan.VARIANTS.items()}
    assert len(set(map(repr, configs.values()))) == len(configs) and configs["wgan"].loss == "wgan"


def test_adam_cancels_a_gain_only_in_a_linear_loss():
    images, labels, _ = gan.load_images("synthetic", 16, 1)

    def weights(**change):
        config = gan.resolve(wgan.Config(**TOY, channels=1, augment="none", **change))
        model = wgan.WGAN(config)
        data = gan.batches(images, labels, config, model.device)
        for _ in range(3):
            model.train_step(data)
        return torch.cat([p.detach().flatten() for p in model.G.parameters()])

    moved = {loss: (weights(loss=loss, gain=64.0) - weights(loss=loss)).norm() for loss in ("wgan", "ns")}
    assert moved["wgan"] < moved["ns"] / 3, moved


def test_shares_count_the_digits():
    read = torch.eye(10)[torch.tensor([3] * 12 + [5] * 6 + [0, 1])]
    assert wgan.shares(read, None) == pytest.approx((0, 60))
    assert wgan.shares(torch.eye(10).repeat(20, 1), None) == pytest.approx((10, 10))


def test_study_draws_and_scores_each_variant(tmp_path, monkeypatch, capsys):
    setting = replace(wgan.STUDY.setting, data="synthetic", channels=1, steps=1, **TOY)
    variants = {name: wgan.VARIANTS[name] for name in ("wgan", "batch norm in the critic")}
    monkeypatch.setattr(gan, "cache_folder", lambda: tmp_path / "cache")
    # Reads every image as a 3.
    reader = metrics.Extractor(lambda x: (x.mean(dim=(2, 3)), torch.eye(10)[3].expand(len(x), 10)), "reader", "0" * 16)
    monkeypatch.setattr(metrics, "load_extractor", lambda path: reader)
    study = replace(wgan.STUDY, setting=setting, variants=variants | {"ns": dict(loss="ns")}, n=34)
    study.main(["--out", str(tmp_path), "--variants", *variants])
    assert (tmp_path / "study.md").read_text().count("| 0.0 | 100.0 |") == 3  # the real images too
    assert Image.open(tmp_path / "study.png").width == 960
    runs = {p.parent.name: gan.read_checkpoint(p, wgan.WGAN)["config"] for p in tmp_path.glob("*/checkpoint.pt")}
    assert {n: c.batch_norm for n, c in runs.items()} == {"wgan-seed0": False, "batch-norm-in-the-critic-seed0": True}
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        gan.main(["train", "--cond", "--data", "synthetic", "--runs", str(tmp_path)], wgan.WGAN)
    assert stop.value.code == 2 and "this critic sees no classes" in capsys.readouterr().err
