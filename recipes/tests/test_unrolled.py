# SPDX-License-Identifier: MIT
"""Tests of unrolled.py at toy size: offline, on the CPU.    python -m pytest recipes/test_unrolled.py"""

import copy
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import gan
import metrics
import unrolled

TOY = dict(size=16, width=4, max_width=8, z_dim=8, batch=8, device="cpu", amp="off", steps=1)


def unrolled_toy(**options):
    """A GAN of images after one step, and a batch: (model, real, y)."""
    model = unrolled.Unrolled(gan.resolve(unrolled.Config(**TOY, **options)), num_classes=3)
    generator = torch.Generator().manual_seed(1)
    real, y = torch.rand(8, 3, 16, 16, generator=generator) * 2 - 1, torch.arange(8) % 3
    model.train_step(iter([(real, y)]))
    return model, real, y


@pytest.mark.parametrize("loss", ["minimax", "rpgan"])
def test_unroll_0_is_the_plain_gan(loss):
    config = dict(TOY, loss=loss, augment="color,cutout")
    images, labels, _ = gan.load_images("synthetic", 16, 3)
    outcomes = []
    for model in (
        gan.GAN(gan.resolve(gan.Config(**config))),
        *(unrolled.Unrolled(gan.resolve(unrolled.Config(**config, unroll=k))) for k in (0, 1)),
    ):
        data = gan.batches(images, labels, model.config, model.device)
        losses = [model.train_step(data) for _ in range(2)]
        outcomes.append([*losses, *model.G.state_dict().values(), *model.D.state_dict().values()])
    assert all(map(torch.equal, outcomes[0], outcomes[1]))
    assert not all(map(torch.equal, outcomes[0], outcomes[2]))


HINGE = lambda real, fake: (1 - real).relu().mean() + (1 + fake).relu().mean()
RPGAN = lambda real, fake: torch.nn.functional.softplus(10 * (fake - real)).mean()  # with classes


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("name, d_loss", [("hinge", HINGE), ("rpgan", RPGAN)])
def test_look_ahead_takes_the_steps_of_plain_gradient_descent(second_order, name, d_loss):
    model, real, y = unrolled_toy(loss=name, augment="none", unroll=3, second_order=second_order)
    before, fake = copy.deepcopy(model.D.state_dict()), model.draw(y)
    later = model.look_ahead(real, fake, y)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.D.state_dict().items())
    assert all(p.grad is None for p in (*model.G.parameters(), *model.D.parameters()))
    assert later["linear.bias"].requires_grad == second_order  # of a state that G's gradient flows through
    D = copy.deepcopy(model.D)
    groups = []
    for p, q in zip(model.D.parameters(), D.parameters()):
        squares = model.opt_D.state[p]["exp_avg_sq"] / (1 - 0.99)  # after one step, g^2
        groups.append({"params": [q], "lr": 4e-4 / (squares.mean().sqrt().item() + 1e-8)})
    optimizer = torch.optim.SGD(groups)
    for _ in range(3):
        optimizer.zero_grad()
        logits = D(torch.cat([real, fake.detach()]), torch.cat([y, y]))
        d_loss(*logits.chunk(2)).backward()
        optimizer.step()
    assert later.keys() == D.state_dict().keys()
    for name, tensor in D.state_dict().items():
        assert (later[name] - tensor).abs().max() < 1e-5
    moved = max((later[name] - before[name]).abs().max() for name in before)
    assert moved > 1e-3


def test_gradient_of_G_flows_through_the_steps_of_D():
    """Against finite differences of the paper's objective, minus the loss of D after k steps, in float64."""
    options = unrolled.PLAIN | dict(data="ring", loss="minimax", width=8, z_dim=4, lr_D=0.02, batch=16, unroll=3)
    model, gradients = unrolled.Plain(unrolled.Config(**options)), {}
    real, y = next(unrolled.points(model.config))
    model.train_step(iter([(real, y)]))
    model.G.double(), model.D.double()
    real, z, parameters = real.double(), torch.randn(16, 4, dtype=torch.float64), list(model.G.parameters())
    for model.config.second_order in (True, False):
        model.descend = lambda _, loss: gradients.update({len(gradients): torch.autograd.grad(loss, parameters)})
        model.update_G(real, model.G(z), y)
    rates = [model.rate(p).item() for p in model.D.parameters()]

    def objective():
        D, fake = copy.deepcopy(model.D), model.G(z).detach()
        loss = lambda: -(D(real).sigmoid().log().mean() + (1 - D(fake).sigmoid()).log().mean())
        for _ in range(3):
            steps = torch.autograd.grad(loss(), list(D.parameters()))
            for p, rate, step in zip(D.parameters(), rates, steps):
                p.data -= rate * step
        return -loss().item()

    direction = [torch.randn_like(p) for p in parameters]
    values = []
    for sign in (1, -2):
        for p, d in zip(parameters, direction):
            p.data += sign * 1e-6 * d
        values.append(objective())
    difference = (values[0] - values[1]) / 2e-6
    full, first_order = (sum((g * d).sum().item() for g, d in zip(gradients[i], direction)) for i in range(2))
    assert full == pytest.approx(difference, rel=1e-5)
    assert abs(first_order - difference) > 0.05 * abs(difference)


def test_score_counts_modes():
    centres = unrolled.CENTRES
    assert centres.norm(dim=1).tolist() == pytest.approx([2] * 8) and len(centres) == 8
    assert unrolled.count_modes(centres.repeat(100, 1)) == (8, 1)
    assert unrolled.count_modes(centres[:1].repeat(100, 1)) == (1, 1)
    outward = centres / 2 * unrolled.SIGMA  # one sigma
    assert unrolled.count_modes(centres + 2.9 * outward) == (8, 1)
    assert unrolled.count_modes(centres + 3.1 * outward) == (0, 0)
    mixed = torch.cat([centres[:1].repeat(50, 1), centres[1:2], torch.zeros(149, 2)])  # 25%, 0.5%, nowhere
    assert unrolled.count_modes(mixed) == (1, pytest.approx(51 / 200))
    real = next(unrolled.points(unrolled.Config(batch=10_000)))[0]
    modes, near = unrolled.count_modes(real)
    assert modes == 8 and near == pytest.approx(1 - math.exp(-9 / 2), abs=0.003)  # two-dimensional


def test_unrolled_trains_on_images(tmp_path):
    """Also through bfloat16, augmentation and the command line."""
    flags = "--size 16 --width 4 --max-width 8 --batch 8 --steps 2 --amp bf16 --cond --device cpu --unroll 2".split()
    gan.main(["train", *flags, "--runs", str(tmp_path)], model=unrolled.Unrolled)
    run = gan.find_run(None, tmp_path)
    assert gan.read_checkpoint(run, unrolled.Unrolled)["config"].unroll == 2
    with pytest.raises(gan.UserError, match="--no-second-order"):
        unrolled.Config(compile=True)


def test_ring_command(tmp_path, capsys):
    out = tmp_path / "ring.png"
    unrolled.ring_command(["--seeds", "2", "--steps", "6", "--out", str(out)])
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 6 and table[2] == "| 0 | 0, 0 | 0% (0% to 0%) |" and table[5].startswith("| 10 | 0, 0 |")
    picture = gan.pil_to_tensor(gan.Image.open(out))
    assert picture.shape[1:] == (4 * 102 + 2, 7 * 102 + 2)
    real = unrolled.draw(next(unrolled.points(unrolled.Config(batch=10_000)))[0])
    assert torch.equal(picture[:1, 2:102, -102:-2], real)
    point = unrolled.draw(torch.tensor([[2.01, -1.01]]))  # x to the right, y upwards, from -3 to 3 in 100 pixels
    assert point.nonzero().tolist() == [[0, 66, 83]]
    for argv in (["--seeds", "0"], ["--steps", "0"], ["--out", str(tmp_path / "x.txt")]):
        with pytest.raises(SystemExit) as stop:
            unrolled.ring_command(argv)
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_study_draws_by_the_last_generator(tmp_path, monkeypatch):
    """The average of the weights has a half-life of one image, so that it is G itself."""
    monkeypatch.setattr(gan, "cache_folder", lambda: tmp_path / "cache")
    reader = lambda x: (x.mean(dim=(2, 3)), torch.eye(10)[torch.arange(len(x)) % 4])  # reads 0, 1, 2, 3, 0, ...
    reader = metrics.Extractor(reader, "reader", "0" * 16)
    monkeypatch.setattr(metrics, "load_extractor", lambda path: reader)
    setting = replace(unrolled.STUDY.setting, data="synthetic", channels=1, width=8)
    replace(unrolled.STUDY, setting=setting, n=40).main(["--steps", "3", "--out", str(tmp_path)])
    table = (tmp_path / "study.md").read_text().splitlines()
    assert len(table) == 5 and all(line.endswith("| 2.00 |") for line in table[2:])  # bits
    for k in (0, 4):
        content = gan.read_checkpoint(tmp_path / f"k-{k}-seed0", unrolled.Plain)
        assert all((content["G_ema"][name] - w).abs().max() < 1e-6 for name, w in content["G"].items())
        assert content["config"].unroll == k and content["steps"] == 3
    G, _ = gan.load_generator(tmp_path / "k-4-seed0", model=unrolled.Plain)
    for p in G.parameters():
        p *= 30  # beyond the range of an image, where uint8 would wrap around
    assert G(z := torch.randn(8, 64)).abs().max() == 1 < G.train()(z).abs().max()
