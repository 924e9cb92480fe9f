# SPDX-License-Identifier: MIT
"""What the recipes' tests share: they run at toy size, offline, on the CPU.    python -m pytest recipes"""

import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(RECIPES), str(RECIPES.parent)]
import gan
import metrics
import study


@pytest.fixture
def refusal(capsys):
    """Gives a function that runs a command which must end with one line and status 2; it returns the line."""

    def run(command, *args):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            command(*args)
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run


@pytest.fixture
def put_reader(monkeypatch, tmp_path):
    """Gives a function that puts a network of images [N,3,H,W] in [0,1] where studies load their reader of digits."""

    def put(network):
        reader = metrics.Extractor(network, "reader", "0" * 16)
        monkeypatch.setattr(metrics, "load_extractor", lambda *_: reader)
        monkeypatch.setattr(gan, "cache_folder", lambda: tmp_path / "cache")

    return put


@pytest.fixture
def in_process(monkeypatch):
    """Lets the runner of studies train in this process, in place of starting a program for each run."""

    def run_gan(threads, *argv, model):
        gan.main([*map(str, argv)], model)

    monkeypatch.setattr(study, "run_gan", run_gan)
