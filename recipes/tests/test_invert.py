# SPDX-License-Identifier: MIT
"""Tests of invert.py at toy size: offline, on the CPU."""

import sys
from pathlib import Path

import pytest
import torch
from torchvision.transforms.functional import to_pil_image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import gan
import invert

TOY = dict(size=16, channels=1, width=4, max_width=8, z_dim=4, batch=8, device="cpu", amp="off", steps=8)


@pytest.fixture(scope="module", params=[False, True])
def run(request, tmp_path_factory):
    return gan.train(gan.Config(**TOY, cond=request.param, runs=str(tmp_path_factory.mktemp("runs"))))


def everything(x):
    return torch.ones(len(x), 1, *x.shape[2:], dtype=torch.bool)


def test_inversion_finds_the_samples_of_its_own_generator(run):
    G, _ = gan.load_generator(run)
    y = torch.tensor([3, 0, 16]) % max(1, G.num_classes)
    x = G(gan.sample_z(3, G.z_dim, generator=torch.Generator().manual_seed(5)), y)
    starts = 34 if G.num_classes else 8
    z, found, losses = invert.invert(G, x, everything(x), starts=starts, steps=80, rate=0.2, noise=0)
    assert losses.shape == (80, 3, starts) and invert.psnr(G(z, found), x, everything(x)) > 30
    error = (G(z, found) - x).square().sum(dim=(1, 2, 3))
    assert torch.allclose(error, losses[-1].min(dim=1).values, rtol=0.1, atol=0.01)  # the best start, not another


def test_a_start_depends_on_neither_hidden_pixels_nor_its_batch(run):
    G, _ = gan.load_generator(run)
    x = G(gan.sample_z(2, G.z_dim, generator=torch.Generator().manual_seed(6)), torch.zeros(2, dtype=torch.int64))
    visible = invert.visible_pixels("pepper", 2, 16, torch.Generator().manual_seed(0))
    z, y, _ = invert.invert(G, x, visible, starts=8, steps=20)
    other, other_y, _ = invert.invert(G, torch.where(visible, x, torch.rand(x.shape)), visible, starts=8, steps=20)
    assert torch.equal(z, other) and torch.equal(y, other_y)
    assert not torch.equal(z, invert.invert(G, torch.where(visible, x, -1), everything(x), starts=8, steps=20)[0])
    alone = invert.invert(G, x[:1], visible[:1], starts=8, steps=20)
    assert (z[:1] - alone[0]).abs().max() < 1e-3 and torch.equal(y[:1], alone[1])


def test_the_prior_makes_of_a_linear_generator_a_ridge_regression():
    class Linear(torch.nn.Module):
        z_dim, num_classes = 4, 0

        def forward(self, z, y):
            return (z[:, :, None] * self.weight).sum(dim=1).view(-1, 1, 8, 8)  # no product that autocast rounds

    generator = torch.Generator().manual_seed(0)
    G, x = Linear(), torch.rand(3, 1, 8, 8, generator=generator) * 2 - 1
    G.weight = torch.randn(4, 64, generator=generator)
    for noise in (0, 3, 10):
        z, _, _ = invert.invert(G, x, everything(x), starts=2, steps=300, noise=noise)
        gram = G.weight @ G.weight.T + noise**2 * torch.eye(4)
        assert (z - torch.linalg.solve(gram, G.weight @ x.flatten(1).T).T).abs().max() < 1e-3


def test_masks_hide_what_they_say():
    generator = torch.Generator().manual_seed(0)
    visible = {mask: invert.visible_pixels(mask, 20, 28, generator) for mask in invert.MASKS}
    assert all(v.shape == (20, 1, 28, 28) for v in visible.values())
    assert abs(visible["pepper"].float().mean() - 0.7) < 0.02 and not torch.equal(*visible["pepper"][:2])
    assert visible["rows"][3, 0, :, 5].tolist() == [True, False] * 14
    hidden = ~visible["square"]
    assert hidden[7].sum() == 8 * 8 and hidden[7, :, 10:18, 10:18].all()


def test_copy_nearest_and_psnr_against_brute_force():
    generator = torch.Generator().manual_seed(0)
    x, visible = torch.rand(2, 3, 9, 9, generator=generator), torch.rand(2, 1, 9, 9, generator=generator) > 0.6
    filled = invert.copy_nearest(x, visible)
    for i in range(2):
        seen = visible[i, 0].nonzero()
        for row in range(9):
            for column in range(9):
                distances = (seen - torch.tensor([row, column])).square().sum(dim=1)
                nearest = seen[distances == distances.min()]
                assert any(torch.equal(filled[i, :, row, column], x[i, :, r, c]) for r, c in nearest)
    noisy = x + torch.where(visible, 0.2, 5)
    assert invert.psnr(noisy, x, visible) == pytest.approx(20, abs=1e-3)  # an error of a tenth of the range


def test_walk_goes_from_one_sample_to_the_other(run):
    G, _ = gan.load_generator(run)
    z = gan.sample_z(2, G.z_dim, generator=torch.Generator().manual_seed(1))
    y = torch.tensor([0, 2]) % max(1, G.num_classes)
    steps = invert.walk(G, z, y, columns=100)
    assert torch.allclose(steps[[0, -1]], G(z, y), atol=1e-4)
    assert (steps[1:] - steps[:-1]).abs().max() < (steps[0] - steps[-1]).abs().max() / 4


def test_command_line(run, tmp_path, capsys):
    for i, image in enumerate(gan.generate(gan.load_generator(run)[0], 5)):
        (tmp_path / "some").mkdir(exist_ok=True)
        to_pil_image(image).save(tmp_path / "some" / f"{i}.png")
    argv = ["--run", str(run), "--data", str(tmp_path / "some"), "--n", "4", "--steps", "3", "--starts", "17"]
    invert.main([*argv, "--out", str(tmp_path / "out.png")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["pepper", "rows", "square", "nothing hidden"]
    assert (tmp_path / "out.png").stat().st_size > 10_000
    bad = ["--run nowhere", "--data nowhere", "--n 0", "--extractor nowhere.pt2", "--starts x"]
    for wrong in [argv[:2], *([*argv, *change.split()] for change in bad)]:  # the first lacks --data
        with pytest.raises(SystemExit) as stop:
            invert.main(wrong)
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
