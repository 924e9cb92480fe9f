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
    configs = {name: replace(wgan.SETTING, **change) for name, change in (wgan.COMPARED | wgan.CHANGES).items()}
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


def test_study_trains_what_is_missing_and_counts_the_digits(tmp_path, monkeypatch, capsys):
    setting = replace(wgan.SETTING, data="synthetic", channels=1, **TOY)
    monkeypatch.setattr(wgan, "SETTING", setting)
    monkeypatch.setattr(wgan, "COMPARED", {"wgan": {}})
    monkeypatch.setattr(wgan, "CHANGES", {"batch norm": dict(batch_norm=True)})
    monkeypatch.setattr(gan, "cache_folder", lambda: tmp_path / "cache")
    # Reads every image as a 3.
    reader = metrics.Extractor(lambda x: (x.mean(dim=(2, 3)), torch.eye(10)[3].expand(len(x), 10)), "reader", "0" * 16)
    monkeypatch.setattr(metrics, "load_extractor", lambda path: reader)
    monkeypatch.setattr(wgan.measure, "__defaults__", (34,))
    argv = ["study", "--out", str(tmp_path / "study"), "--steps", "1"]
    wgan.main(argv)
    table = (tmp_path / "study" / "study.md").read_text()
    assert table.count("| 0.0 | 100.0 |") == 2 and Image.open(tmp_path / "study" / "study.png").width == 800
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "study").glob("*/checkpoint.pt")}
    names = {p.parent.name: gan.read_checkpoint(p, wgan.WGAN)["config"].batch_norm for p in stamps}
    assert names == {"wgan-seed0": False, "batch-norm-seed0": True}
    wgan.main(argv)
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps and (
        tmp_path / "study" / "study.md"
    ).read_text() == table
    capsys.readouterr()
    for argv in (["study", "--seeds", "0"], ["train", "--cond", "--data", "synthetic", "--runs", str(tmp_path)]):
        with pytest.raises(SystemExit) as stop:
            wgan.main(argv)
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
