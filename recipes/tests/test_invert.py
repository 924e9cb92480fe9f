# SPDX-License-Identifier: MIT
import math

import pytest
import torch

import gan
import invert

TOY = {"size": 16, "channels": 1, "width": 4, "max_width": 8, "z_dim": 4, "batch": 8, "device": "cpu", "amp": "off"}


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "cond"])
def run(request, tmp_path_factory):
    return gan.train(gan.Config(**TOY, steps=8, cond=request.param, runs=str(tmp_path_factory.mktemp("runs"))))


@pytest.fixture
def G(run):
    return gan.load_generator(run)[0]


def draw(G, y, seed):
    """Draws samples of the classes y[N], and a mask of all their pixels."""
    y = torch.tensor(y) % max(1, G.num_classes)
    x = G(gan.sample_z(len(y), G.z_dim, generator=torch.Generator().manual_seed(seed)), y)
    return x, torch.ones(len(x), 1, 16, 16, dtype=torch.bool)


# ---- Fitting
def test_invert_finds_the_samples_of_its_own_generator(G):
    x, everything = draw(G, [3, 0, 16], seed=5)
    z, y, losses = invert.invert(G, x, everything, starts=34, steps=80, rate=0.2, noise=0)
    assert losses.shape == (80, 3, 34)
    assert invert.psnr(G(z, y), x, everything) > 30


def test_invert_returns_the_best_start(G):
    x, everything = draw(G, [3, 0, 16], seed=5)
    z, y, losses = invert.invert(G, x, everything, starts=17, steps=80, noise=0)
    error = (G(z, y) - x).square().sum(dim=(1, 2, 3))
    assert torch.allclose(error, losses[-1].min(dim=1).values, rtol=0.1, atol=0.01)


@pytest.fixture
def half_seen(G):
    x, _ = draw(G, [0, 0], seed=6)
    return x, invert.visible_pixels("pepper", 2, 16, torch.Generator().manual_seed(0))


def test_invert_ignores_hidden_pixels(G, half_seen):
    x, visible = half_seen
    z, y, _ = invert.invert(G, x, visible, starts=8, steps=20)
    other = torch.where(visible, x, torch.rand(x.shape))
    other_z, other_y, _ = invert.invert(G, other, visible, starts=8, steps=20)
    assert torch.equal(z, other_z)
    assert torch.equal(y, other_y)


def test_invert_heeds_pixels_that_are_not_hidden(G, half_seen):
    x, visible = half_seen
    z, _, _ = invert.invert(G, x, visible, starts=8, steps=20)
    masked = torch.where(visible, x, -1)
    other, _, _ = invert.invert(G, masked, torch.ones_like(visible), starts=8, steps=20)
    assert not torch.equal(z, other)


def test_invert_fits_each_picture_as_if_it_were_alone(G, half_seen):
    x, visible = half_seen
    z, y, _ = invert.invert(G, x, visible, starts=8, steps=20)
    alone, alone_y, _ = invert.invert(G, x[:1], visible[:1], starts=8, steps=20)
    assert (z[:1] - alone).abs().max() < 1e-3
    assert torch.equal(y[:1], alone_y)


class Linear(torch.nn.Module):
    """Maps z[N,4] to images [N,1,8,8] by a product that autocast does not round."""

    z_dim = 4
    num_classes = 0
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))

    def forward(self, z, y):
        return (z[:, :, None] * self.weight).sum(dim=1).view(-1, 1, 8, 8)


@pytest.mark.parametrize("noise", [0, 3, 10])
def test_invert_of_a_linear_generator_is_a_ridge_regression(noise):
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    everything = torch.ones_like(x, dtype=torch.bool)
    z, _, _ = invert.invert(Linear(), x, everything, starts=2, steps=300, noise=noise)
    gram = Linear.weight @ Linear.weight.T + noise**2 * torch.eye(4)
    expected = torch.linalg.solve(gram, Linear.weight @ x.flatten(1).T).T
    assert (z - expected).abs().max() < 1e-3


# ---- Masks and measures
def visible(mask):
    return invert.visible_pixels(mask, 20, 28, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mask", invert.MASKS)
def test_visible_pixels_have_the_shape_of_the_images(mask):
    assert visible(mask).shape == (20, 1, 28, 28)
    assert visible(mask).dtype == torch.bool


def test_visible_pixels_under_pepper_are_70_percent():
    assert abs(visible("pepper").float().mean() - 0.7) < 0.02
    assert not torch.equal(visible("pepper")[0], visible("pepper")[1])


def test_visible_pixels_under_rows_are_every_second_row():
    assert visible("rows")[3, 0, :, 5].tolist() == [True, False] * 14


def test_visible_pixels_under_the_square_leave_out_8_by_8():
    """By definition: 8 rows and 8 columns of 28."""
    for hidden in ~visible("square")[:, 0]:
        assert hidden.sum() == 8 * 8
        assert hidden.any(dim=0).sum() == hidden.any(dim=1).sum() == 8


def test_visible_pixels_under_the_square_lie_at_random_about_the_middle():
    """By definition: the middle lies from 7 to 21, and so the first of 8 rows or columns from 3 to 17."""
    hidden = ~visible("square")[:, 0]
    for side in (1, 2):
        first = hidden.any(dim=side).float().argmax(dim=1)
        assert 3 <= first.min() < 7
        assert 13 < first.max() <= 17


def test_copy_nearest_agrees_with_brute_force():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 9, 9, generator=generator)
    shown = torch.rand(2, 1, 9, 9, generator=generator) > 0.6
    filled = invert.copy_nearest(x, shown)
    for i, row, column in torch.cartesian_prod(torch.arange(2), torch.arange(9), torch.arange(9)):
        seen = shown[i, 0].nonzero()
        distances = (seen - torch.stack([row, column])).square().sum(dim=1)
        nearest = seen[distances == distances.min()]
        assert any(torch.equal(filled[i, :, row, column], x[i, :, r, c]) for r, c in nearest)


def test_psnr_weighs_all_pixels_alike():
    """By hand: one picture of two is off by 0.2 of a range of 2, the other right."""
    x = torch.zeros(2, 1, 9, 9)
    restored = x.clone()
    restored[0] = 0.2
    assert invert.psnr(restored, x, x == 0) == pytest.approx(20 + 10 * math.log10(2), abs=1e-3)


def test_psnr_looks_where_it_is_told():
    x = torch.rand(2, 3, 9, 9)
    shown = torch.rand(2, 1, 9, 9) > 0.6
    noisy = x + torch.where(shown, 0.2, 5)
    assert invert.psnr(noisy, x, shown) == pytest.approx(20, abs=1e-3)  # an error of a tenth of the range


# ---- Walks
def ends(G):
    z = gan.sample_z(2, G.z_dim, generator=torch.Generator().manual_seed(1))
    return z, torch.tensor([0, 2]) % max(1, G.num_classes)


def test_walk_goes_from_one_sample_to_the_other(G):
    z, y = ends(G)
    steps = invert.walk(G, z, y)
    assert torch.allclose(steps[[0, -1]], G(z, y), atol=1e-4)


def test_walk_takes_small_steps(G):
    steps = invert.walk(G, *ends(G), columns=100)
    largest = (steps[1:] - steps[:-1]).abs().max()
    assert largest < (steps[0] - steps[-1]).abs().max() / 4


# ---- The command
@pytest.fixture
def flags(run, tmp_path):
    for i, image in enumerate(gan.generate(gan.load_generator(run)[0], 5)):
        gan.write_picture(tmp_path / "some" / f"{i}.png", image.expand(3, -1, -1))
    return ["--run", str(run), "--data", str(tmp_path / "some"), "--n", "3", "--steps", "3", "--starts", "17"]


def test_main_reports_each_mask_and_draws(flags, tmp_path, capsys):
    capsys.readouterr()
    invert.main([*flags, "--out", str(tmp_path / "out.png")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["pepper", "rows", "square", "nothing hidden"]
    assert (tmp_path / "out.png").stat().st_size > 10_000


def test_draw_walks_names_the_digits(G):
    z, y = ends(G)
    arc, line = invert.draw_walks(G, z, y, lambda x: (None, torch.eye(10)[torch.arange(len(x))]))
    assert arc[0] == "arc 0 1 2 3 4 5 6 7 8"
    assert torch.equal(arc[1], invert.walk(G, z, y))
    assert torch.equal(line[1], invert.walk(G, z, y, invert.line))


def test_line_goes_straight_from_one_to_the_other():
    """By hand, along two lines at once."""
    starts = torch.tensor([[0.0, 1.0], [9.0, 9.0]])
    ends = torch.tensor([[8.0, 5.0], [9.0, 1.0]])
    first = [[i, 1 + i / 2] for i in range(9)]
    second = [[9, 9 - i] for i in range(9)]
    assert invert.line(starts, ends, 9).tolist() == [first, second]


@pytest.mark.parametrize(
    "change", ["--run nowhere", "--data nowhere", "--n 0", "--extractor nowhere.pt2", "--starts x"]
)
def test_main_refuses_bad_flags(flags, change, refusal):
    assert change.split()[1] in refusal(invert.main, [*flags, *change.split()])


def test_main_refuses_a_run_of_drawn_flowers_without_pictures(flags, refusal):
    assert "--data: name a folder" in refusal(invert.main, [*flags[:2], "--starts", "17"])
