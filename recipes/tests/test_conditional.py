# SPDX-License-Identifier: MIT
"""Tests of conditional.py at toy size: offline, on the CPU.    python -m pytest recipes/test_conditional.py"""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import InterpolationMode, resize

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import conditional
import gan
import metrics

TOY = dict(size=16, width=4, max_width=8, z_dim=8, batch=8, device="cpu", amp="off")


def test_only_the_plain_d_ignores_the_class():
    x, y = torch.randn(6, 3, 16, 16), torch.arange(6)
    for plain_d in (False, True):
        G, D = conditional.Conditional.networks(gan.resolve(conditional.Config(**TOY, plain_d=plain_d)), 6)
        D.eval()
        assert torch.equal(D(x, y), D(x, y.flip(0))) == plain_d
        z = torch.randn(1, 8).repeat(2, 1)
        first, second = G.eval()(z, torch.tensor([0, 1]))
        assert not torch.equal(first, second)  # G sees the class either way


def test_confusion_counts_what_was_read_where_what_was_due():
    due, read = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2]), torch.tensor([0, 0, 0, 2, 2, 2, 0, 1])
    shares = conditional.confusion(torch.nn.functional.one_hot(read, 3).float(), due)
    assert torch.allclose(shares, torch.tensor([[0.75, 0, 0.25], [0, 0, 1], [0.5, 0.5, 0]]))


def test_study_trains_what_is_missing_and_measures_the_class(tmp_path, monkeypatch, capsys):
    """With a network in place of the digit reader that takes ten pixels as logits."""
    images = torch.randint(256, (128, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = images, torch.arange(128) % 10, list("0123456789")
    monkeypatch.setattr(gan, "load_images", lambda *args: data)
    monkeypatch.setattr(gan, "cache_folder", lambda: tmp_path / "cache")
    reader = metrics.Extractor(lambda x: (255 * x.mean(dim=(2, 3)), x.flatten(1)[:, :10]), "reader", "0" * 16)
    monkeypatch.setattr(metrics, "load_extractor", lambda path: reader)
    variants = {name: conditional.VARIANTS[name] for name in ("ns, plain D", "ns, conditional D")}
    setting, out = replace(conditional.STUDY.setting, **TOY), tmp_path / "study"
    study = replace(conditional.STUDY, setting=setting, variants=variants, n=40)
    argv = ["--out", str(out), "--seeds", "2", "--steps"]
    study.main([*argv, "1"])
    assert Image.open(out / "study.png").width > 800
    table, stamps = (out / "study.md").read_text(), {p: p.stat().st_mtime_ns for p in out.glob("*/checkpoint.pt")}
    assert len(stamps) == 4 and table.count("\n") == 5 and table.count(" ± ") == 6
    for run in (path.parent for path in stamps):  # each is what its name says
        content = gan.read_checkpoint(run, conditional.Conditional)
        assert any("embed" in key for key in content["D"]) == ("plain" not in run.name)
        assert content["config"].seed == int(run.name[-1]) and content["steps"] == 1
    # The first row, by itself.
    seen = resize(images, [32, 32], InterpolationMode.BICUBIC, antialias=True).double() / 255
    features, read = (
        (255 * seen.mean(dim=(2, 3))).expand(-1, 3),
        seen[:40].expand(-1, 3, -1, -1).flatten(1)[:, :10].argmax(dim=1),
    )
    distance = metrics.frechet_distance(features, features[:40])
    assert distance > 1
    right = 100 * (read == data[1][:40]).double().mean()
    assert f"| real images | 1 | {distance:.1f} | {right:.1f} |" in table
    study.main([*argv, "1"])  # nothing is left to train
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps and (out / "study.md").read_text() == table
    argv[3] = "1"
    study.main([*argv, "2"])  # goes on
    run = out / "ns-plain-D-seed0"
    assert gan.read_checkpoint(run, conditional.Conditional)["steps"] == 2
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        study.main([*argv, "1"])
    assert stop.value.code == 2 and "is at step 2, beyond 1" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        replace(study, setting=replace(setting, lr_D=1e-3)).main([*argv, "2"])
    assert stop.value.code == 2 and "trained with another lr_D: give another --out" in capsys.readouterr().err
    assert (out / "study.md").read_text().count("\n") == 5  # what was refused leaves the table as it was


def test_bad_input_ends_in_a_line(tmp_path, monkeypatch, capsys):
    study, nowhere = conditional.STUDY.main, str(tmp_path / "nowhere.pt2")
    train = lambda argv: gan.main(["train", *argv], conditional.Conditional)
    flags = ["--plain-d", "--data", "synthetic", "--runs", str(tmp_path)]
    cases = (study, ["--extractor", nowhere], "no extractor"), (train, flags, "--plain-d needs --cond")
    for command, argv, said in (*cases, (study, ["--seeds", "0"], "--seeds")):
        with pytest.raises(SystemExit) as stop:
            command(argv)
        assert stop.value.code == 2 and said in (err := capsys.readouterr().err) and err.count("\n") == 1
    blind = metrics.Extractor(lambda x: x.mean(dim=(2, 3)), "blind", "0" * 16)
    monkeypatch.setattr(metrics, "load_extractor", lambda path: blind)
    images = torch.zeros(2, 1, 16, 16, dtype=torch.uint8)
    monkeypatch.setattr(gan, "load_images", lambda *args: (images, torch.arange(2), ["0", "1"]))
    with pytest.raises(SystemExit):
        study(["--extractor", "blind.pt2", "--out", str(tmp_path)])
    assert "blind.pt2 does not tell 10 digits apart" in capsys.readouterr().err
