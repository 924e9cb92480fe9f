# SPDX-License-Identifier: MIT
import pytest
import torch
from PIL import Image, ImageSequence
from torchvision.transforms.functional import pil_to_tensor

import film
import gan

TOY = {"size": 16, "width": 4, "max_width": 8, "z_dim": 8, "batch": 8, "device": "cpu", "amp": "off", "steps": 3}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    return gan.train(gan.Config(**TOY, sample_every=1 / 170, runs=str(runs)))


def test_walk_goes_there_and_back(run):
    G, _ = gan.load_generator(run)
    pictures = film.walk(G, points=5)
    assert len(pictures) == 8
    assert pictures[1] == pictures[7]
    assert pictures[0] != pictures[4]


def test_walk_starts_at_the_samples_that_interpolate_starts_at(run):
    G, _ = gan.load_generator(run, trunc=0.7)
    first = gan.interpolate(G, seed=3)[:, 0]
    shown = pil_to_tensor(film.walk(G, seed=3)[0])
    assert torch.equal(shown, gan.tile(first, 4))


def test_training_shows_the_grids_in_turn(run):
    shown = [pil_to_tensor(picture) for picture in film.training(run)]
    files = [run / "samples" / f"{step:07d}.png" for step in (1, 2, 3)]
    assert all(torch.equal(a, pil_to_tensor(Image.open(b))) for a, b in zip(shown, files, strict=True))


@pytest.mark.parametrize("kind", ["gif", "webp"])
@pytest.mark.parametrize("flags, pictures", [(["--trunc", "0.7"], 62), (["--training"], 3)])
def test_main_writes_a_film(run, tmp_path, kind, flags, pictures):
    out = tmp_path / f"film.{kind}"
    film.main([str(run), *flags, "--out", str(out)])
    with Image.open(out) as image:
        assert len(list(ImageSequence.Iterator(image))) == pictures
        assert image.info["loop"] == 0


def test_main_refuses_other_formats(run, tmp_path, refusal):
    assert "--out x.png" in refusal(film.main, [str(run), "--out", "x.png"])


def test_training_refuses_a_run_without_pictures(run, tmp_path):
    with pytest.raises(gan.UserError, match="no pictures in"):
        film.training(tmp_path)
