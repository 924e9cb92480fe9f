# SPDX-License-Identifier: MIT
import copy
import io
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import dcgan
import digits
import gan

TOY = {"size": 16, "ngf": 4, "ndf": 4, "z_dim": 8, "batch": 8, "device": "cpu", "amp": "off"}
NORMS = 2 * (64 + 128 + 256 + 512)  # a gain and a bias for each channel


def networks(num_classes=0, **options):
    torch.manual_seed(0)
    return dcgan.DCGAN.networks(gan.resolve(dcgan.Config(**options)), num_classes)


def build(num_classes=0, **change):
    return dcgan.DCGAN(gan.resolve(dcgan.Config(**TOY | change)), num_classes)


def count(net):
    return sum(p.numel() for p in net.parameters())


def test_generator_has_the_published_size():
    G, _ = networks(size=64)
    weights = 16 * (100 * 512 + 512 * 256 + 256 * 128 + 128 * 64 + 64 * 3)
    assert count(G) == weights + NORMS == 3_576_704


def test_discriminator_has_the_published_size():
    _, D = networks(size=64)
    weights = 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512)
    assert count(D) == weights + NORMS - 2 * 64 == 2_765_568  # without a norm after the first layer


@pytest.mark.parametrize("size", [16, 32, 128])
def test_networks_have_the_shapes_of_their_size(size):
    G, D = networks(3, **TOY | {"size": size})
    y = torch.tensor([0, 2])
    x = G(torch.randn(2, 8), y)
    assert x.shape == (2, 3, size, size)
    assert x.abs().max() <= 1
    assert D(x, y).shape == (2,)


def test_networks_share_their_norms_between_processes():
    for net in networks(**TOY):
        norms = gan.layers_of(net, torch.nn.BatchNorm2d)
        assert norms == gan.layers_of(net, gan.BatchNorm)
        assert len(norms) >= 1


def convolutions(net):
    return [p for p in net.parameters() if p.ndim == 4]


def test_normal_init_draws_weights_of_deviation_a_fiftieth():
    for net in networks(size=32):
        for weight in convolutions(net):
            assert abs(weight.std() - 0.02) < 0.001
            assert abs(weight.mean()) < 0.002


def test_normal_init_draws_gains_about_one():
    norms = [norm for net in networks(size=32) for norm in gan.layers_of(net, gan.BatchNorm)]
    gains = torch.cat([norm.weight for norm in norms])
    assert abs(gains.mean() - 1) < 0.005
    assert abs(gains.std() - 0.02) < 0.003


def test_init_torch_keeps_the_default_of_torch():
    _, D = networks(size=32, init="torch")
    assert convolutions(D)[0].std().item() == pytest.approx(1 / 12, abs=0.003)  # uniform within 1 / sqrt(3 * 16)


def test_networks_with_classes_see_the_class():
    G, D = networks(3, **TOY)
    y = torch.tensor([0, 1, 2] * 2)
    for net, given in ((G.eval(), torch.randn(6, 8)), (D.eval(), torch.randn(6, 3, 16, 16))):
        changes = net(given, y) - net(given, (y + 1) % 3)
        assert (changes.reshape(6, -1).abs().amax(dim=1) > 1e-6).all()


def test_discriminator_without_classes_ignores_the_class():
    _, D = networks(**TOY)
    x = torch.randn(6, 3, 16, 16)
    assert D.eval()(x, torch.arange(6)).equal(D(x))


REAL = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
Y = torch.zeros(8, dtype=torch.int64)


@pytest.mark.parametrize("scale", [0.1, 3])
def test_update_D_normalises_real_and_fake_apart(scale):
    fake = scale * torch.randn(8, 3, 16, 16) + scale
    model = build(3, loss="rpgan")
    D = copy.deepcopy(model.D)
    loss, real_logits, fake_logits = model.update_D(REAL, fake, Y)
    assert real_logits.equal(D(REAL, Y))  # whatever the fakes are
    assert fake_logits.equal(D(fake, Y))
    assert abs(loss - F.softplus(fake_logits - real_logits).mean()) < 1e-5


def test_update_D_learns_from_the_fakes():
    weights = []
    for scale in (0.1, 3):
        model = build(3, loss="rpgan")
        model.update_D(REAL, scale * torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(2)), Y)
        weights.append(convolutions(model.D))
    assert not any(map(torch.equal, *weights))


def test_train_step_moves_both_networks():
    model = build(3, loss="rpgan")
    before = [p.clone() for p in (*convolutions(model.G), *convolutions(model.D))]
    losses = model.train_step(iter([(REAL, Y)]))
    after = [*convolutions(model.G), *convolutions(model.D)]
    assert losses.shape == (4,)
    assert not any(map(torch.equal, before, after))


@pytest.mark.parametrize("kinds, bits", [(1, 0), (2, 1), (4, 2)])
def test_entropy_counts_the_bits_of_what_is_read(kinds, bits):
    logits = F.one_hot(torch.arange(200) % kinds, 10).float()
    assert digits.entropy(logits) == pytest.approx(bits, abs=1e-6)


@pytest.mark.parametrize("num_classes, rows", [(0, 2), (3, 3)])
def test_draw_strip_has_a_row_for_each_run_or_class(num_classes, rows, monkeypatch):
    """By hand: 18 pixels for an image and its margin."""
    G, _ = networks(num_classes, **TOY)
    G.trunc = None
    monkeypatch.setattr(gan, "load_generator", lambda run, model: (G.eval(), None))
    strip = digits.draw_strip(dcgan.DCGAN, ["one", "two"])
    assert strip.shape == (3, 2 + 18 * rows, 2 + 18 * 16)


class Pixels(torch.nn.Module):
    """Takes some pixels as features and as logits."""

    def forward(self, images):
        x = images[:, 0, 4:8, 4:8].flatten(1)
        return x, x[:, :10]


@pytest.fixture(scope="module")
def extractor(tmp_path_factory):
    dims = {0: torch.export.Dim("n"), 2: torch.export.Dim("h", min=8), 3: torch.export.Dim("w", min=8)}
    program = torch.export.export(Pixels(), (torch.rand(2, 3, 16, 24),), dynamic_shapes=(dims,))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    path = tmp_path_factory.mktemp("extractor") / "pixels.pt2"
    path.write_bytes(buffer.getvalue())
    return str(path)


def test_main_trains_scores_and_samples(tmp_path, extractor):
    runs = ["--runs", str(tmp_path / "runs"), "--device", "cpu"]
    flags = "--loss ns --cond --size 16 --ngf 4 --ndf 4 --z-dim 8 --batch 8 --steps 2 --amp off"
    gan.main(["train", *flags.split(), *runs], dcgan.DCGAN)
    gan.main(["eval", "--n", "20", "--extractor", extractor, *runs], dcgan.DCGAN)
    gan.main(["sample", "--interpolate", "--out", str(tmp_path / "walk.png"), *runs], dcgan.DCGAN)
    (row,) = gan.read_rows(gan.find_run(None, tmp_path / "runs") / "eval.jsonl")
    assert row["FD(pixels)"] > 0
    assert Image.open(tmp_path / "walk.png").width == 10 * 18 + 2


@pytest.fixture
def study(tmp_path, monkeypatch, in_process):
    monkeypatch.setattr(gan, "cache_folder", lambda: tmp_path / "cache")
    flags = "--size 16 --ngf 4 --ndf 4 --z-dim 8 --batch 8 --device cpu --amp off"
    variants = {"base": "ns", "ngf 8": "ns --ngf 8 --cond --steps 4"}
    return replace(dcgan.STUDY, data="synthetic", steps=2, flags=flags, variants=variants, n=100)


def test_study_makes_a_row_for_each_variant(tmp_path, study, extractor):
    study.main(["--seeds", "2", "--steps", "1", "--out", str(tmp_path), "--extractor", extractor])
    lines = (tmp_path / "study.md").read_text().splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| real images", "| base", "| ngf 8"]
    assert all(line.count(" \u00b1 ") == 2 for line in lines[1:])
    assert (tmp_path / "study.png").exists()


def test_study_scales_the_steps_of_a_variant(tmp_path, study, extractor):
    study.main(["--steps", "1", "--out", str(tmp_path), "--extractor", extractor, "--variants", "ngf 8"])
    config = gan.read_checkpoint(tmp_path / "ngf-8-seed0", dcgan.DCGAN)["config"]
    assert (config.ngf, config.ndf, config.cond, config.steps) == (8, 4, True, 2)


def test_variants_all_differ():
    """By the configs that their flags make."""
    configs = map(dcgan.STUDY.config, dcgan.VARIANTS)
    assert len(set(map(repr, configs))) == len(dcgan.VARIANTS)


@pytest.mark.parametrize("flags, message", [(["--width", "8"], "no --width"), (["--init", "zero"], "--init")])
def test_main_refuses_what_it_cannot_do(flags, message, refusal):
    assert message in refusal(gan.main, ["train", "--loss", "ns", *flags], dcgan.DCGAN)
