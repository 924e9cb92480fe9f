# SPDX-License-Identifier: MIT
import math

import pytest
import torch
from PIL import Image

import gan
import metrics
import nearest

TOY = {"size": 16, "width": 4, "max_width": 8, "z_dim": 8, "batch": 8, "device": "cpu", "amp": "off", "steps": 1}


def points(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator)


def pictures(*shape):
    return (points(0, *shape) * 255).to(torch.uint8)


def test_find_nearest_agrees_with_brute_force():
    """Compares every point with both views of every image, one by one."""
    x = points(0, 7, 3)
    bank = points(1, 2, 20, 3)
    distances, numbers = nearest.find_nearest(x, bank, 3)
    for i in range(7):
        found = []
        for image in range(20):
            original, mirrored = (math.dist(x[i], view[image]) for view in bank)
            number = image + 20 if mirrored < original else image
            found.append((min(original, mirrored), number))
        found = sorted(found)[:3]
        assert distances[i].tolist() == pytest.approx([distance for distance, _ in found])
        assert numbers[i].tolist() == [number for _, number in found]


def test_find_nearest_leaves_an_image_and_its_mirror_image_out():
    """Places three points on a line, where the neighbours are seen; each view of a point lies next to the other."""
    places = torch.tensor([0.0, 1, 3])[:, None]
    bank = torch.stack([places, places + 0.1])
    distances, numbers = nearest.find_nearest(places, bank, 1, leave_out=True)
    assert numbers.flatten().tolist() == [1, 3, 4]
    assert distances.flatten().tolist() == pytest.approx([1, 0.9, 1.9])


def ratios_of(x, bank):
    distances, numbers = nearest.find_nearest(x, bank, 1)
    return nearest.find_ratios(distances[:, 0], numbers[:, 0], bank)


def test_find_ratios_divides_by_the_gap_of_the_nearest_image():
    """Places points on a line: 0.5 is half as far from 0 as 1 is, and 3.5 a quarter as far from 3 as 1 is."""
    bank = torch.tensor([[0.0, 1, 3]])[..., None]
    of_samples, _ = ratios_of(torch.tensor([[-0.5], [3.5]]), bank)
    assert of_samples.tolist() == pytest.approx([0.5, 0.25])


@pytest.mark.parametrize("views", [1, 2])
def test_find_ratios_of_an_image_are_those_of_a_sample(views):
    """Takes each image out of the bank, and gives it as a sample."""
    bank = points(0, views, 30, 2)
    _, of_real = ratios_of(points(1, 1, 2), bank)
    for i in range(30):
        others = torch.cat([bank[:, :i], bank[:, i + 1 :]], dim=1)
        left_out, _ = ratios_of(bank[0, i : i + 1], others)
        assert of_real[i].item() == pytest.approx(left_out.item(), abs=1e-4)


TWO_DISCS = 4 / 3 + math.sqrt(3) / (2 * math.pi)  # their area, over that of one


@pytest.mark.parametrize("dims, share", [(1, 2 / 3), (2, 1 / TWO_DISCS)])
def test_new_points_have_the_share_of_mutual_neighbours(dims, share):
    """By the volume of a ball over that of two balls, each of which has its centre on the surface of the other."""
    x = points(0, 3000, dims)
    bank = points(1, 1, 3000, dims)
    for some in ratios_of(x, bank):
        assert nearest.count_shares(some)["below_1"] == pytest.approx(share, abs=0.03)


def test_count_shares_counts():
    """By hand; 1 is not below 1."""
    shares = nearest.count_shares(torch.tensor([0.2, 0.7, 1.0, 3.0]))
    assert shares == {"below_1": 0.5, "below_half": 0.25}


def test_describe_averages_colours():
    """Doubles images of 16 pixels, whose means are then themselves."""
    small = pictures(2, 3, 16, 16)
    wide = small.repeat_interleave(2, dim=3)
    doubled = wide.repeat_interleave(2, dim=2)
    assert torch.allclose(nearest.describe(doubled), small.flatten(1) / 255)


def test_describe_asks_the_network(tmp_path):
    """By means of the colours, which the network computes too."""
    images = pictures(3, 3, 16, 16)
    network = metrics.Extractor(lambda x: x.mean(dim=(2, 3)), "means", "0" * 16)
    expected = images.float().mean(dim=(2, 3)) / 255
    assert torch.allclose(nearest.describe(images, network), expected)
    assert torch.allclose(nearest.describe(images, network, tmp_path), expected)


def test_pick_mirrors_the_second_view():
    """Of three images: number 4 is the mirror image of number 1."""
    images = pictures(3, 1, 2, 2)
    first, second = nearest.pick(images, torch.tensor([2, 4]))
    assert torch.equal(first, images[2])
    assert torch.equal(second, images[1].flip(2))


def test_draw_shows_the_least_ratios_first_and_then_the_samples_in_order():
    """By the ratios beside the rows; they fall from 3 to 0.1."""
    images = torch.zeros(30, 3, 16, 16, dtype=torch.uint8)
    ratios = torch.arange(30, 0, -1) / 10
    numbers = torch.zeros(30, 4, dtype=torch.int64)
    figure = nearest.draw(images, images, ratios, numbers)
    left, right = (axes.get_yticklabels() for axes in figure.axes)
    assert [label.get_text() for label in left[:3]] == ["0.10", "0.20", "0.30"]
    assert [label.get_text() for label in right[:3]] == ["3.00", "2.90", "2.80"]


# ---- The command
def train(folder, flip):
    return gan.train(gan.Config(**TOY, flip=flip, runs=str(folder)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs"), flip=True)


@pytest.mark.parametrize("flip", [True, False])
def test_main_finds_mirrored_copies_where_the_run_mirrored_images(flip, tmp_path, monkeypatch):
    """Lets the run generate mirror images of its training images."""
    run = train(tmp_path, flip)
    images, *_ = gan.load_images("synthetic", 16, 3)
    monkeypatch.setattr(gan, "generate", lambda *_: images[:40].flip(3))
    nearest.main([str(run)])
    (row,) = gan.read_rows(run / "nearest.jsonl")
    assert (row["samples"]["below_half"] == 1) == flip


def test_main_writes_a_row_and_a_picture(run, tmp_path, capsys):
    """By the flags, and the 1,360 drawn flowers."""
    out = tmp_path / "x.png"
    nearest.main([str(run), "--n", "5", "--trunc", "0.7", "--seed", "3", "--out", str(out)])
    row = gan.read_rows(run / "nearest.jsonl")[-1]
    facts = {"by": "colours", "trunc": 0.7, "n": 5, "steps": 1, "seed": 3, "n_real": 1360}
    assert facts.items() <= row.items()
    assert Image.open(out).width > 500
    share = f"{row['real images']['below_1']:.1%}"
    assert f"{share} of the real images have a ratio below 1" in capsys.readouterr().out


@pytest.mark.parametrize("flag, value", [("--out", "x.jpg"), ("--trunc", "-1"), ("--extractor", "no.pt2")])
def test_main_refuses_what_it_cannot_do(run, flag, value, refusal):
    """By the message, which names the value."""
    said = refusal(nearest.main, [str(run), flag, value])
    assert value in said


def test_main_refuses_fewer_images_than_it_draws(run, tmp_path, refusal):
    """By the message: each sample is drawn beside four others."""
    for i, image in enumerate(pictures(4, 3, 16, 16)):
        gan.write_picture(tmp_path / f"{i}.png", image)
    said = refusal(nearest.main, [str(run), "--data", str(tmp_path)])
    assert "has 4 images; give 5 or more" in said
