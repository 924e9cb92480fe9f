# SPDX-License-Identifier: MIT
"""Tests of the recipes at toy size: offline, on the CPU.    python -m pytest recipes"""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms.functional import to_pil_image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import classifier
import export
import fid_studies
import finetune
import gan
import metrics

TOY = dict(size=16, width=4, max_width=8, z_dim=8, batch=8, device="cpu", amp="off", steps=1)


def normal(n, d, seed):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_frechet_infinity_and_interval():
    """Against a normal generator's distances for infinitely many samples and over many sets of samples."""
    d, n = 8, 400
    basis = torch.linalg.qr(normal(9, 9, 0) - normal(9, 9, 0).mean(0)).Q[:, :d]
    real = (basis - basis.mean(0)) * math.sqrt(8)
    real = real @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(real.T))).T  # mean 0, covariance 1
    draw = lambda seed: 1.2 * normal(n, d, seed) + 0.05
    true = 0.05**2 * d + 0.2**2 * d
    many = [metrics.frechet_distance(real, draw(seed)) for seed in range(200)]
    bias = np.mean(many) - true
    extrapolated = [fid_studies.frechet_infinity(real, draw(seed)) for seed in range(40)]
    assert bias > 0.03 and abs(np.mean(extrapolated) - true) < bias / 3
    intervals = [fid_studies.frechet_interval(real, draw(seed), resamples=40) for seed in range(40)]
    assert 36 <= sum(low <= np.mean(many) <= high for low, high in intervals) <= 40
    width = np.mean([high - low for low, high in intervals]) / (np.quantile(many, 0.975) - np.quantile(many, 0.025))
    assert 0.8 < width < 1.6
    for study in (fid_studies.frechet_infinity, fid_studies.frechet_interval):
        assert study(real, draw(0)) == study(real, draw(0)) != study(real, draw(0), seed=1)
        with pytest.raises(metrics.UserError, match="at least"):
            study(real, draw(0)[:3])


def test_frechet_by_class():
    x, y, labels = normal(20, 3, 0), normal(12, 3, 1), ["9", "10", "10", "10"] * 3
    result = fid_studies.frechet_by_class(x, ["10"] * 10 + ["9"] * 10, y, labels)
    assert list(result) == ["9", "10"]
    assert result["10"] == metrics.frechet_distance(x[:10], y[[i for i, c in enumerate(labels) if c == "10"]])
    with pytest.raises(metrics.UserError, match="class a has 0 real and 12"):
        fid_studies.frechet_by_class(x, ["b"] * 20, y, ["a"] * 12)


def test_kernel_distance_subsets():
    x, y = normal(200, 3, 0), normal(150, 3, 1) + 0.5
    mean, std = fid_studies.kernel_distance_subsets(x, y)
    assert std > 0 and abs(mean - metrics.kernel_distance(x, y)) < 4 * std / math.sqrt(100)
    assert fid_studies.kernel_distance_subsets(x, y, size=20)[1] > std  # smaller subsets vary more
    # Subsets of half of a set of two equal halves are that half only if they are drawn without replacement.
    pairs = torch.arange(4.0)[:, None].double()
    values = {metrics.kernel_distance(pairs[[i, j]], pairs[[k, l]]) for i in range(4) for j in range(4) if i != j
              for k in range(4) for l in range(4) if k != l}  # fmt: skip
    one = fid_studies.kernel_distance_subsets(pairs, pairs, subsets=1)[0]
    assert min(abs(one - value) for value in values) < 1e-9


def test_studies_of_folders(tmp_path, capsys):
    generator = torch.Generator().manual_seed(0)
    for side in ("real", "fake"):
        for name in ("rose 9", "rose 10"):
            (tmp_path / side / name).mkdir(parents=True)
            for i in range(12):
                image = torch.randint(256, (3, 8, 8), dtype=torch.uint8, generator=generator)
                to_pil_image(image).save(tmp_path / side / name / f"{i}.png")
    (tmp_path / "fake" / "notes.txt").write_text("no image, so the classes stay")
    network = metrics.Extractor(lambda x: x.mean(dim=(2, 3)), "mean", "0" * 16)
    scores = fid_studies.study(tmp_path / "real", tmp_path / "fake", fid_studies.STUDIES, network)
    assert scores["FD(mean) low"] <= scores["FD(mean)"] <= scores["FD(mean) high"]
    assert list(scores)[-3:] == ["FD(mean) class mean", "FD(mean) of rose 9", "FD(mean) of rose 10"]
    assert scores["FD(mean) class mean"] == pytest.approx(np.mean(list(scores.values())[-2:]))
    to_pil_image(image).save(tmp_path / "fake" / "stray.png")
    with pytest.raises(metrics.UserError, match="fake has images beside"):
        fid_studies.study(tmp_path / "real", tmp_path / "fake", ["classes"], network)
    with pytest.raises(SystemExit) as stop:
        fid_studies.main([str(tmp_path / "real"), str(tmp_path / "nowhere"), "--extractor", "nowhere.pt2"])
    assert stop.value.code == 2 and "no extractor" in capsys.readouterr().err


@pytest.mark.parametrize("cond", [False, True])
def test_exported_generators_give_its_images(cond, tmp_path, monkeypatch, capsys):
    run = gan.train(gan.Config(**TOY, cond=cond, runs=str(tmp_path)))
    G, _ = gan.load_generator(run, trunc=0.7)
    for kind in export.WRITERS:
        export.main([str(run), "--trunc", "0.7", "--out", str(tmp_path / f"G{kind}")])
        x = export.inputs(G, 5, 0.7, seed=9)
        images = export.load((tmp_path / f"G{kind}").read_bytes(), kind)(*x)
        assert images.shape == (5, 3, 16, 16) and (images - G(*x)).abs().max() < 1e-5
        assert (images - gan.load_generator(run)[0](*x)).abs().max() > 1e-3  # whose statistics are others
    monkeypatch.setattr(export, "load", lambda data, kind: lambda *x: G(*x) + 0.1)
    capsys.readouterr()
    for argv in ([str(run), "--out", "G.txt"], [str(tmp_path / "x")], [str(run), "--out", str(tmp_path / "x.pt2")]):
        with pytest.raises(SystemExit) as stop:
            export.main(argv)
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "x.pt2").exists()


def test_finetuning_starts_from_the_weights_that_fit(tmp_path, capsys):
    old = gan.train(gan.Config(**TOY, cond=True, runs=str(tmp_path)))
    config = finetune.Config(**TOY | {"lr_G": 1e-9, "lr_D": 1e-9}, runs=str(tmp_path), init_from=str(old))
    images, labels, _ = gan.load_images("synthetic", 16, 3)
    for classes in (gan.read_checkpoint(old)["classes"], ["a", "b", "c"]):
        model = finetune.FineTune(gan.resolve(config), len(classes))
        model.config.augment, model.classes = "none", classes
        model.train_step(gan.batches(images, labels % 3, model.config, model.device))
        for name in ("G", "D"):
            before, after = gan.read_checkpoint(old)[name], dict(getattr(model, name).named_parameters())
            for k in after:
                kept = before[k].shape == after[k].shape and torch.allclose(before[k], after[k], atol=1e-6)
                assert kept == (len(classes) == 17 or "embed" not in k), k
    assert "100% of the weights" in capsys.readouterr().out
    with pytest.raises(gan.UserError, match="no weights"):
        model.steps = 0
        for part in (model.G, model.G_ema, model.D):
            part.load_state_dict = part.state_dict = dict
        model.train_step(None)
    flags = "--size 16 --width 4 --max-width 8 --z-dim 8 --batch 8 --steps 1".split()
    gan.main(["train", "--init-from", str(old), "--runs", str(tmp_path), *flags], finetune.FineTune)


def test_classifier_reads_what_it_has_learned_and_is_an_extractor(tmp_path):
    images, labels, _ = gan.load_images("synthetic", 32, 1)
    images, labels = images[labels < 10], labels[labels < 10]
    net = classifier.train(images[::2], labels[::2], epochs=6, batch=32)
    share = classifier.accuracy(net, images[1::2], labels[1::2])
    assert share > 0.9 and share == (net(images[1::2].float() / 255)[1].argmax(1) == labels[1::2]).float().mean()
    classifier.export(net, tmp_path / "digits.pt2")
    network = metrics.load_extractor(tmp_path / "digits.pt2")
    assert network.name == "digits"
    for size in (16, 32):
        some = gan.load_images("synthetic", size, 3)[0][:5]
        features, logits = network(some)
        expected = net(some.float() / 255)
        assert (features - expected[0]).abs().max() < 1e-4 and (logits - expected[1]).abs().max() < 1e-4
    with pytest.raises(SystemExit) as stop:
        classifier.main(["mnist", "--data-dir", str(tmp_path / "nowhere"), "--out", str(tmp_path / "x.txt")])
    assert stop.value.code == 2 and not (tmp_path / "nowhere").exists()
