# SPDX-License-Identifier: MIT
"""Tests of recipes/dcgan.py at toy size: offline, on the CPU."""

import copy
import io
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import dcgan
import gan
import report

FLAGS = "--size 16 --ngf 4 --ndf 4 --z-dim 8 --batch 8 --device cpu --amp off"
TOY = dict(size=16, ngf=4, ndf=4, z_dim=8, batch=8, device="cpu", amp="off")


def build(num_classes=0, **changes):
    return dcgan.DCGAN(gan.resolve(dcgan.Config(**TOY | changes)), num_classes)


def test_dcgan_has_the_shapes_and_parameters_of_the_published_networks():
    G, D = dcgan.DCGAN.networks(gan.resolve(dcgan.Config(size=64)), 0)
    count = lambda net: sum(p.numel() for p in net.parameters())
    norms = 2 * (64 + 128 + 256 + 512)  # a gain and a bias for each channel
    assert count(G) == 16 * (100 * 512 + 512 * 256 + 256 * 128 + 128 * 64 + 64 * 3) + norms == 3_576_704
    assert count(D) == 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512) + norms - 2 * 64 == 2_765_568
    for size in (16, 32, 128):
        G, D = dcgan.DCGAN.networks(gan.resolve(dcgan.Config(**TOY | {"size": size})), 3)
        y = torch.tensor([0, 2])
        x = G(torch.randn(2, 8), y)
        assert x.shape == (2, 3, size, size) and x.abs().max() <= 1 and D(x, y).shape == (2,)


def test_dcgan_draws_its_first_weights_from_a_normal():
    convolutions = lambda net: [p for p in net.parameters() if p.ndim == 4]
    G, D = dcgan.DCGAN.networks(gan.resolve(dcgan.Config(size=32)), 0)
    for weight in convolutions(G) + convolutions(D):
        assert abs(weight.std() - 0.02) < 0.001 and abs(weight.mean()) < 0.002
    gains = torch.cat([m.weight for m in (*G.modules(), *D.modules()) if isinstance(m, torch.nn.BatchNorm2d)])
    assert abs(gains.mean() - 1) < 0.005 and abs(gains.std() - 0.02) < 0.003
    _, D = dcgan.DCGAN.networks(gan.resolve(dcgan.Config(size=32, init="torch")), 0)
    assert convolutions(D)[0].std().item() == pytest.approx(1 / 12, abs=0.003)  # uniform within 1 / sqrt(3 * 16)


def test_dcgan_with_classes_sees_the_class_in_both_networks():
    model = build(3)
    z, x = torch.randn(6, 8), torch.randn(6, 3, 16, 16)
    y = torch.tensor([0, 1, 2] * 2)
    for net, given in ((model.G.eval(), z), (model.D.eval(), x)):
        assert ((net(given, y) - net(given, (y + 1) % 3)).reshape(6, -1).abs().amax(dim=1) > 1e-6).all()
    model = build()
    assert model.D.eval()(x, y).equal(model.D(x))


def test_dcgan_normalises_real_and_fake_apart():
    real, y = torch.randn(8, 3, 16, 16), torch.zeros(8, dtype=torch.long)
    logits, models = [], []
    for scale in (0.1, 3):  # the fakes do not touch what D says of the real images, in either model's first step
        models.append(build(3, loss="rpgan"))
        D, fake = build(3).D, scale * torch.randn(8, 3, 16, 16) + scale
        loss, *_ = models[-1].update_D(real, fake, y)
        assert abs(loss - F.softplus(10 * (D(fake, y) - D(real, y))).mean()) < 1e-5
        logits.append(models[-1].real_logits)
    assert logits[0].equal(logits[1]) and logits[0].equal(build(3).D(real, y))
    assert not any(a.equal(b) for a, b in zip(*(m.D.parameters() for m in models)) if a.ndim == 4)
    before = copy.deepcopy(models[0].G.state_dict())
    models[0].update_G(real, models[0].draw(y), y)  # compares with the logits of the real images
    assert not before["layers.0.weight"].equal(models[0].G.layers[0].weight)


def test_entropy_of_what_is_read():
    for digits, bits in ((1, 0), (2, 1), (4, 2)):
        logits = F.one_hot(torch.arange(200) % digits, 10).float()
        assert report.entropy(logits) == pytest.approx(bits, abs=1e-6)


def test_dcgan_by_command_line(tmp_path, capsys, monkeypatch):
    class Pixels(torch.nn.Module):
        """Takes some pixels as features and as logits."""

        def forward(self, images):
            x = images[:, 0, 4:8, 4:8].flatten(1)
            return x, x[:, :10]

    dims = {0: torch.export.Dim("n"), 2: torch.export.Dim("h", min=8), 3: torch.export.Dim("w", min=8)}
    program = torch.export.export(Pixels(), (torch.rand(2, 3, 16, 24),), dynamic_shapes=(dims,))
    torch.export.save(program, file := io.BytesIO())
    (tmp_path / "pixels.pt2").write_bytes(file.getvalue())
    runs, extractor = ["--runs", str(tmp_path / "runs")], ["--extractor", str(tmp_path / "pixels.pt2")]
    gan.main(["train", *FLAGS.split(), "--steps", "2", "--cond", *runs], dcgan.DCGAN)
    gan.main(["eval", "--n", "20", *extractor, *runs], dcgan.DCGAN)
    gan.main(["sample", "--interpolate", "--out", str(tmp_path / "walk.png"), *runs], dcgan.DCGAN)
    assert "FD(pixels)" in capsys.readouterr().out and (tmp_path / "walk.png").exists()

    monkeypatch.setattr(gan, "cache_folder", lambda: tmp_path / "cache")
    setting = dcgan.Config(**TOY, data="synthetic", steps=2)
    variants = {"base": {}, "ngf 8": dict(ngf=8, width=8, cond=True, steps=4)}
    study = replace(dcgan.STUDY, setting=setting, variants=variants, n=100)
    study.main(["--seeds", "2", "--steps", "1", "--out", str(tmp_path), *extractor])
    lines = (tmp_path / "study.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| real images", "| base", "| ngf 8"]
    assert all(line.count(" \u00b1 ") == 2 for line in lines[3:]) and (tmp_path / "study.png").exists()
    config = gan.read_checkpoint(tmp_path / "ngf-8-seed1", dcgan.DCGAN)["config"]
    assert (config.ngf, config.ndf, config.cond, config.seed, config.steps) == (8, 4, True, 1, 2)  # scaled
    for change in dcgan.VARIANTS.values():
        gan.resolve(replace(gan.resolve(dcgan.STUDY.setting), **change))


def test_dcgan_refuses_what_it_cannot_do(capsys):
    for argv in (["--width", "8"], ["--init", "zero"]):
        with pytest.raises(SystemExit) as stop:
            gan.main(["train", *argv], dcgan.DCGAN)
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
