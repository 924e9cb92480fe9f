# SPDX-License-Identifier: MIT
import copy
import math
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

import gan
import unrolled

TOY = {"size": 16, "width": 4, "max_width": 8, "z_dim": 8, "batch": 8, "device": "cpu", "amp": "off", "steps": 1}


# ---- The look-ahead
def after_two_steps(model):
    """Returns losses and weights of a GAN after two steps on the drawn flowers."""
    images, labels, _ = gan.load_images("synthetic", 16, 3)
    data = gan.batches(images, labels, model.config, model.device)
    losses = [model.train_step(data) for _ in range(2)]
    return [*losses, *model.G.state_dict().values(), *model.D.state_dict().values()]


@pytest.mark.parametrize("loss", ["minimax", "rpgan"])
@pytest.mark.parametrize("k", [0, 1])
def test_update_G_without_steps_ahead_is_the_plain_one(loss, k):
    config = TOY | {"loss": loss, "augment": "color,cutout"}
    plain = gan.GAN(gan.resolve(gan.Config(**config, center=False)))
    ahead = unrolled.Unrolled(gan.resolve(unrolled.Config(**config, unroll=k)))
    same = all(map(torch.equal, after_two_steps(plain), after_two_steps(ahead)))
    assert same == (k == 0)


def make_model(**options):
    """Builds a GAN of images and trains it for a step: (model, real, fake, y)."""
    config = gan.resolve(unrolled.Config(**TOY, augment="none", unroll=3, **options))
    model = unrolled.Unrolled(config, num_classes=3)
    generator = torch.Generator().manual_seed(1)
    real = torch.rand(8, 3, 16, 16, generator=generator) * 2 - 1
    y = torch.arange(8) % 3
    model.train_step(iter([(real, y)]))
    return model, real, model.draw(y), y


@pytest.mark.parametrize("second_order", [True, False])
def test_look_ahead_leaves_the_networks_alone(second_order):
    model, *batch = make_model(loss="hinge", second_order=second_order)
    before = copy.deepcopy(model.D.state_dict())
    model.look_ahead(*batch)
    after = model.D.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None for p in (*model.G.parameters(), *model.D.parameters()))


@pytest.mark.parametrize("second_order", [True, False])
def test_look_ahead_lets_gradients_through_if_it_shall(second_order):
    model, *batch = make_model(loss="hinge", second_order=second_order)
    later = model.look_ahead(*batch)
    assert later["linear.bias"].requires_grad == second_order


def rate_by_hand(model, weight):
    squares = model.opt_D.state[weight]["exp_avg_sq"] / (1 - 0.99)  # after one step, g^2
    return 4e-4 / (squares.mean().sqrt().item() + 1e-8)


def hinge(real, fake):
    return (1 - real).relu().mean() + (1 + fake).relu().mean()


def rpgan(real, fake):
    return torch.nn.functional.softplus(fake - real).mean()


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("loss", [hinge, rpgan])
def test_look_ahead_takes_the_steps_of_plain_gradient_descent(loss, second_order):
    model, real, fake, y = make_model(loss=loss.__name__, second_order=second_order)
    D = copy.deepcopy(model.D)
    rates = [rate_by_hand(model, p) for p in model.D.parameters()]
    groups = [{"params": [p], "lr": rate} for p, rate in zip(D.parameters(), rates)]
    optimizer = torch.optim.SGD(groups)
    for _ in range(3):
        optimizer.zero_grad()
        logits = D(torch.cat([real, fake.detach()]), y.repeat(2))
        loss(*logits.chunk(2)).backward()
        optimizer.step()
    later = model.look_ahead(real, fake, y)
    assert later.keys() == D.state_dict().keys()
    for name, tensor in D.state_dict().items():
        assert (later[name] - tensor).abs().max() < 1e-5


def test_look_ahead_moves_D():
    model, *batch = make_model(loss="hinge")
    later = model.look_ahead(*batch)
    moved = max((later[name] - tensor).abs().max() for name, tensor in model.D.state_dict().items())
    assert moved > 1e-3


@pytest.fixture
def ring_model():
    """A GAN of perceptrons in float64 after a step, real points and z."""
    options = unrolled.PLAIN | {"data": "ring", "loss": "minimax", "width": 8, "z_dim": 4, "lr_D": 0.02}
    model = unrolled.Unrolled(unrolled.Config(**options, batch=16, unroll=3))
    real, y = next(unrolled.points(model.config))
    model.train_step(iter([(real, y)]))
    model.G.double()
    model.D.double()
    return model, real.double(), torch.randn(16, 4, dtype=torch.float64)


def gradient(model, real, z, second_order):
    """Computes the gradient that update_G gives the weights of G."""
    gradients = []
    model.config.second_order = second_order
    model.descend = lambda _, loss: gradients.extend(torch.autograd.grad(loss, list(model.G.parameters())))
    model.update_G(real, model.G(z), torch.zeros(16, dtype=torch.int64), None)
    return gradients


def objective(model, real, z):
    """Computes the paper's objective for G, minus the minimax loss of D after three steps, by hand."""
    D = copy.deepcopy(model.D)
    fake = model.G(z).detach()
    rates = [model.rate(p).item() for p in model.D.parameters()]

    def loss():
        return -(D(real).sigmoid().log().mean() + (1 - D(fake).sigmoid()).log().mean())

    for _ in range(3):
        steps = torch.autograd.grad(loss(), list(D.parameters()))
        for p, rate, step in zip(D.parameters(), rates, steps):
            p.data -= rate * step
    return -loss().item()


def slope(model, real, z, direction, size=1e-6):
    """Computes the slope of the objective along a direction of G's weights, by finite differences."""
    values = []
    for sign in (1, -2):
        for p, d in zip(model.G.parameters(), direction):
            p.data += sign * size * d
        values.append(objective(model, real, z))
    return (values[0] - values[1]) / (2 * size)


@pytest.mark.parametrize("second_order", [True, False])
def test_update_G_descends_the_objective_of_the_paper(ring_model, second_order):
    direction = [torch.randn_like(p) for p in ring_model[0].G.parameters()]
    gradients = gradient(*ring_model, second_order)
    along = sum((g * d).sum().item() for g, d in zip(gradients, direction))
    expected = slope(*ring_model, direction)
    if second_order:
        assert along == pytest.approx(expected, rel=1e-5)
    else:
        assert abs(along - expected) > 0.05 * abs(expected)


@pytest.mark.parametrize("k", [0, 2])
def test_main_trains_on_images(tmp_path, k):
    """Also in bfloat16, with augmentation."""
    flags = f"--loss rpgan --size 16 --width 4 --max-width 8 --batch 8 --steps 2 --amp bf16 --cond --unroll {k}"
    gan.main(["train", *flags.split(), "--device", "cpu", "--runs", str(tmp_path)], model=unrolled.Unrolled)
    content = gan.read_checkpoint(gan.find_run(None, tmp_path), unrolled.Unrolled)
    assert (content["config"].unroll, content["steps"]) == (k, 2)


def test_networks_refuse_perceptrons_of_classes(tmp_path, refusal):
    """By the message: a perceptron sees no class."""
    argv = ["train", "--plain", "--cond", "--runs", str(tmp_path)]
    assert "leave out --cond" in refusal(gan.main, argv, unrolled.Unrolled)


def test_config_refuses_second_derivatives_of_compiled_networks():
    with pytest.raises(gan.UserError, match="--no-second-order"):
        unrolled.Config(compile=True)


# ---- The ring
CENTRES = unrolled.CENTRES
OUTWARD = CENTRES / 2 * unrolled.SIGMA  # one sigma


def test_centres_lie_on_a_circle_of_radius_2():
    assert CENTRES.norm(dim=1).tolist() == pytest.approx([2] * 8)


@pytest.mark.parametrize(
    "x, modes, share",
    [
        (CENTRES.repeat(100, 1), 8, 1),
        (CENTRES[:1].repeat(100, 1), 1, 1),
        (CENTRES + 2.9 * OUTWARD, 8, 1),
        (CENTRES + 3.1 * OUTWARD, 0, 0),
        (torch.cat([CENTRES[:1].repeat(50, 1), CENTRES[1:2], torch.zeros(149, 2)]), 1, 51 / 200),  # 25%, 0.5%, nowhere
    ],
)
def test_count_modes_counts_those_with_a_percent_of_the_points(x, modes, share):
    assert unrolled.count_modes(x) == (modes, pytest.approx(share))


def test_points_lie_within_3_sigma_as_often_as_a_normal():
    real, _ = next(unrolled.points(unrolled.Config(batch=10_000)))
    modes, near = unrolled.count_modes(real)
    assert modes == 8
    assert near == pytest.approx(1 - math.exp(-9 / 2), abs=0.003)  # in two dimensions


def test_draw_has_x_to_the_right_and_y_upwards():
    picture = unrolled.draw(torch.tensor([[2.01, -1.01]]))  # from -3 to 3 in 100 pixels
    assert picture.nonzero().tolist() == [[0, 66, 83]]


def test_train_on_ring_shows_six_moments():
    config = replace(unrolled.RING, steps=7)
    samples = unrolled.train_on_ring(config, n=20)
    assert samples.shape == (6, 20, 2)
    assert not any(map(torch.equal, samples[1:], samples[:-1]))


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    out = tmp_path_factory.mktemp("ring") / "ring.png"
    unrolled.ring_command(["--seeds", "1", "--steps", "6", "--out", str(out)])
    return pil_to_tensor(Image.open(out))


def test_ring_prints_a_row_for_each_k(tmp_path, capsys):
    unrolled.ring_command(["--seeds", "2", "--steps", "6", "--out", str(tmp_path / "ring.png")])
    rows = capsys.readouterr().out.splitlines()[2:]
    assert rows == [f"| {k} | 0, 0 | 0% (0% to 0%) |" for k in (0, 1, 5, 10)]


def test_ring_draws_six_moments_and_the_ring(picture):
    real, _ = next(unrolled.points(unrolled.Config(batch=10_000)))
    assert picture.shape[1:] == (4 * 102 + 2, 7 * 102 + 2)
    assert torch.equal(picture[:1, 2:102, -102:-2], unrolled.draw(real))


@pytest.mark.parametrize("flag, value", [("--seeds", "0"), ("--steps", "0"), ("--out", "x.txt")])
def test_ring_refuses_what_it_cannot_do(flag, value, refusal):
    assert flag in refusal(unrolled.ring_command, [flag, value])


# ---- MNIST
@pytest.fixture
def study(put_reader, tmp_path, in_process):
    """Makes the study of a reader that reads 0, 1, 2, 3, 0, ...; returns its folder."""
    put_reader(lambda x: (x.mean(dim=(2, 3)), torch.eye(10)[torch.arange(len(x)) % 4]))
    flags = f"{unrolled.STUDY.flags} --channels 1 --width 8"
    small = replace(unrolled.STUDY, data="synthetic", flags=flags, n=40)
    small.main(["--steps", "3", "--out", str(tmp_path)])
    return tmp_path


def test_study_measures_the_entropy(study):
    table = (study / "study.md").read_text().splitlines()
    assert len(table) == 7
    assert all(line.endswith("| 2.00 |") for line in table[2:])  # bits


def test_study_draws_by_the_last_generator(study):
    """The average of the weights has a half-life of one image, so that it is G itself."""
    for k in (0, 4):
        content = gan.read_checkpoint(study / f"k-{k}-seed0", unrolled.Unrolled)
        assert (content["config"].unroll, content["steps"]) == (k, 3)
        for name, weight in content["G"].items():
            assert (content["G_ema"][name] - weight).abs().max() < 1e-6


def test_variants_all_differ():
    """By the configs that their flags make."""
    configs = map(unrolled.STUDY.config, unrolled.VARIANTS)
    assert len(set(map(repr, configs))) == len(unrolled.VARIANTS)


def test_perceptron_stays_in_range_when_it_is_shown():
    G = unrolled.Perceptron(64, 8, 1, 16, 16)
    with torch.no_grad():
        for p in G.parameters():
            p *= 30  # beyond the range of an image, where uint8 would wrap around
    z = torch.randn(8, 64)
    assert G.train()(z).abs().max() > 1
    assert G.eval()(z).abs().max() == 1
