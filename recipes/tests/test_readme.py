# SPDX-License-Identifier: MIT
"""Runs the two programs that the README shows, and reads its commands."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import classifier
import gan

README = Path(gan.__file__).with_name("README.md").read_text()
SMOOTH, EXAMPLE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
TOY = "--width 4 --max-width 8 --batch 8 --steps 1 --device cpu --amp off".split()


@pytest.mark.parametrize("flags", re.findall(r"gan\.py ((?:train|eval|sample)\b.*)", README))
def test_commands_have_flags_that_exist(flags):
    gan.make_parser(gan.GAN).parse_args(shlex.split(flags.partition("`")[0], comments=True))


def test_smooth_is_cross_entropy_with_a_label_of_nine_tenths():
    program = {"__name__": "smooth"}
    exec(SMOOTH, program)
    real, fake = torch.randn(2, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    of_real = F.binary_cross_entropy_with_logits(real, torch.full_like(real, 0.9))
    of_fake = F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake))
    assert abs(program["smooth"](real, fake) - of_real - of_fake) < 1e-12


def test_smooth_trains(monkeypatch, tmp_path):
    for losses in (gan.D_LOSSES, gan.G_LOSSES):
        monkeypatch.setitem(losses, "smooth", None)  # so that it leaves with the test
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["smooth.py", *"train --loss smooth --center --size 16".split(), *TOY])
    exec(SMOOTH, {"__name__": "__main__"})
    config = gan.read_checkpoint(gan.find_run())["config"]
    assert (config.loss, config.center) == ("smooth", True)


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Puts a FOLDER of two classes and net.pt2, a network, where the program looks for them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gan, "cache_folder", lambda: tmp_path / "cache")
    images, _, _ = gan.load_images("synthetic", 64, 3)
    for i, name in enumerate(5 * ["rose", "daisy"]):
        gan.write_picture(tmp_path / "FOLDER" / name / f"{i}.png", images[i])
    classifier.export(classifier.Classifier().eval(), tmp_path / "net.pt2")


def test_example_compares_samples_of_a_run_with_its_images(folder, capsys):
    gan.main(["train", "--data", "FOLDER", "--cond", *TOY])
    capsys.readouterr()
    program = {}
    exec(EXAMPLE, program)
    assert program["samples"].shape == (1000, 3, 64, 64)
    assert program["samples"].dtype == torch.uint8
    assert capsys.readouterr().out.startswith("{'FD(net)': ")
