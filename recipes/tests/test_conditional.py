# SPDX-License-Identifier: MIT
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import InterpolationMode, resize

import conditional
import gan
import metrics

TOY = {"size": 16, "width": 4, "max_width": 8, "z_dim": 8, "batch": 8, "device": "cpu", "amp": "off"}


@pytest.mark.parametrize("plain_d", [False, True])
def test_networks_hide_the_class_from_the_plain_D_alone(plain_d):
    G, D = conditional.Conditional.networks(gan.resolve(conditional.Config(**TOY, plain_d=plain_d)), 6)
    x = torch.randn(6, 3, 16, 16)
    y = torch.arange(6)
    D.eval()
    assert torch.equal(D(x, y), D(x, y.flip(0))) == plain_d
    z = torch.randn(1, 8).expand(6, -1)
    samples = G.eval()(z, y)
    assert not torch.equal(samples[0], samples[1])  # G sees the class either way


def test_confusion_counts_what_was_read_where_what_was_due():
    due = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    read = torch.tensor([0, 0, 0, 2, 2, 2, 0, 1])
    shares = conditional.confusion(torch.eye(3)[read], due)
    assert torch.equal(shares, torch.tensor([[0.75, 0, 0.25], [0, 0, 1], [0.5, 0.5, 0]]))


def test_shown_averages_the_right_and_the_commonest_over_the_classes():
    due = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    read = torch.tensor([0, 0, 0, 2, 2, 2, 0, 1])
    right, commonest = conditional.shown(torch.eye(3)[read], due)
    assert right == pytest.approx(100 * 0.75 / 3)
    assert commonest == pytest.approx(100 * (0.75 + 1 + 0.5) / 3)


# ---- The study, with a network in place of the digit reader that takes ten pixels as logits
IMAGES = torch.randint(256, (128, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(128) % 10
FLAGS = "--cond --size 16 --width 4 --max-width 8 --z-dim 8 --batch 8 --device cpu --amp off"


def read(x):
    return 255 * x.mean(dim=(2, 3)), x.flatten(1)[:, :10]


@pytest.fixture
def study(monkeypatch, put_reader, in_process):
    put_reader(read)
    monkeypatch.setattr(gan, "load_images", lambda *_: (IMAGES, LABELS, list("0123456789")))
    variants = {name: conditional.VARIANTS[name] for name in ("ns, plain D", "ns, conditional D")}
    return replace(conditional.STUDY, flags=FLAGS, variants=variants, n=40)


def run_study(study, out, *flags):
    study.main(["--out", str(out), *flags])
    return (out / "study.md").read_text()


def times(out):
    return {path: path.stat().st_mtime_ns for path in out.glob("*/checkpoint.pt")}


def test_study_trains_what_each_name_says(study, tmp_path):
    run_study(study, tmp_path, "--seeds", "2", "--steps", "1")
    runs = [path.parent for path in times(tmp_path)]
    assert len(runs) == 4
    for run in runs:
        content = gan.read_checkpoint(run, conditional.Conditional)
        sees_class = any("embed" in key for key in content["D"])
        assert sees_class == ("plain" not in run.name)
        assert (content["config"].seed, content["steps"]) == (int(run.name[-1]), 1)


def test_study_makes_a_table_and_a_picture(study, tmp_path):
    table = run_study(study, tmp_path, "--seeds", "2", "--steps", "1")
    assert table.count("\n") == 5
    assert table.count(" ± ") == 6
    assert Image.open(tmp_path / "study.png").width > 800


def test_study_scores_the_real_images_first(study, tmp_path):
    seen = resize(IMAGES, [32, 32], InterpolationMode.BICUBIC, antialias=True).double() / 255
    features, logits = read(seen.expand(-1, 3, -1, -1))
    distance = metrics.frechet_distance(features, features[:40])
    right = 100 * (logits[:40].argmax(dim=1) == LABELS[:40]).double().mean()
    table = run_study(study, tmp_path, "--steps", "1", "--variants", "ns, plain D")
    assert distance > 1
    assert f"| real images | 1 | {distance:.1f} | {right:.1f} |" in table


def test_study_trains_nothing_that_is_there(study, tmp_path):
    flags = ["--steps", "1", "--variants", "ns, plain D"]
    table = run_study(study, tmp_path, *flags)
    before = times(tmp_path)
    assert run_study(study, tmp_path, *flags) == table
    assert times(tmp_path) == before


def test_study_goes_on_with_a_run_that_was_stopped(study, tmp_path, monkeypatch, refusal):
    """By the log of two steps, after the first of which the run was stopped."""
    flags = ["--out", str(tmp_path), "--steps", "2", "--variants", "ns, plain D"]
    study = replace(study, flags=f"{FLAGS} --log-every 1 --save-minutes 1e-9")
    with monkeypatch.context() as patch:
        patch.setattr(conditional.Conditional, "after_save", lambda *_: True)  # which ends the run
        assert "was stopped" in refusal(study.main, flags)
    study.main(flags)
    rows = gan.read_rows(tmp_path / "ns-plain-D-seed0" / "log.jsonl")
    assert [row["step"] for row in rows] == [1, 2]


@pytest.mark.parametrize("change", [{"flags": f"{FLAGS} --lr-D 0.001"}, {"data": "usps"}], ids=["flags", "data"])
def test_study_refuses_what_was_begun_otherwise(study, change, tmp_path, refusal):
    """By the message, and the table that stays."""
    table = run_study(study, tmp_path, "--steps", "1", "--variants", "ns, plain D")
    changed = replace(study, **change)
    said = refusal(changed.main, ["--out", str(tmp_path), "--steps", "1"])
    assert f"is a study with different {', '.join(change)}: give another --out" in said
    assert (tmp_path / "study.md").read_text() == table


def test_study_refuses_a_network_without_digits(study, tmp_path, refusal, put_reader):
    put_reader(lambda x: x.mean(dim=(2, 3)))
    argv = ["--extractor", "blind.pt2", "--out", str(tmp_path)]
    assert "blind.pt2 does not tell 10 digits apart" in refusal(study.main, argv)


@pytest.mark.parametrize(
    "flag, value, message", [("--extractor", "x.pt2", "no extractor"), ("--seeds", "0", "--seeds")]
)
def test_study_refuses_bad_flags(flag, value, message, refusal):
    assert message in refusal(conditional.STUDY.main, [flag, value])


def test_networks_refuse_a_plain_D_without_classes(tmp_path, refusal):
    argv = ["train", "--loss", "ns", "--plain-d", "--data", "synthetic", "--runs", str(tmp_path)]
    assert "--plain-d needs --cond" in refusal(gan.main, argv, conditional.Conditional)
