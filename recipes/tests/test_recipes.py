# SPDX-License-Identifier: MIT
"""Tests of fid_studies.py, export.py, finetune.py and classifier.py."""

import itertools
import math
import sys

import numpy as np
import pytest
import torch
from torchvision.transforms.functional import to_pil_image

import classifier
import export
import fid_studies
import finetune
import gan
import metrics

TOY = {"size": 16, "width": 4, "max_width": 8, "z_dim": 8, "batch": 8, "device": "cpu", "amp": "off", "steps": 1}


def normal(n, d, seed):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- fid_studies.py
@pytest.fixture(scope="module")
def real():
    """Nine points [9,8] of mean 0 and covariance 1."""
    x = normal(9, 9, 0)
    basis = torch.linalg.qr(x - x.mean(dim=0)).Q[:, :8]
    basis = (basis - basis.mean(dim=0)) * math.sqrt(8)
    return basis @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(basis.T))).T


def draw(seed, n=400):
    """Draws from a normal generator whose distance to `real` is known: of mean 0.05 and deviation 1.2."""
    return 1.2 * normal(n, 8, seed) + 0.05


TRUE = 8 * (0.05**2 + 0.2**2)  # by the definition


@pytest.fixture(scope="module")
def distances(real):
    return [metrics.frechet_distance(real, draw(seed)) for seed in range(200)]


def test_frechet_infinity_removes_most_of_the_bias(real, distances):
    bias = np.mean(distances) - TRUE
    extrapolated = [fid_studies.frechet_infinity(real, draw(seed)) for seed in range(40)]
    assert bias > 0.03
    assert abs(np.mean(extrapolated) - TRUE) < bias / 3


def test_frechet_interval_holds_the_mean_over_many_sets_of_samples(real, distances):
    mean = np.mean(distances)
    intervals = [fid_studies.frechet_interval(real, draw(seed), resamples=40) for seed in range(40)]
    held = sum(low <= mean <= high for low, high in intervals)
    assert 36 <= held <= 40


def test_frechet_interval_is_as_wide_as_the_spread(real, distances):
    spread = np.quantile(distances, 0.975) - np.quantile(distances, 0.025)
    intervals = [fid_studies.frechet_interval(real, draw(seed), resamples=40) for seed in range(40)]
    width = np.mean([high - low for low, high in intervals])
    assert 0.8 < width / spread < 1.6


@pytest.mark.parametrize("study", [fid_studies.frechet_infinity, fid_studies.frechet_interval])
def test_frechet_studies_follow_from_the_seed(real, study):
    fake = draw(0)
    assert study(real, fake) == study(real, fake)
    assert study(real, fake) != study(real, fake, seed=1)


@pytest.mark.parametrize("study", [fid_studies.frechet_infinity, fid_studies.frechet_interval])
def test_frechet_studies_refuse_few_samples(real, study):
    with pytest.raises(metrics.UserError, match="at least"):
        study(real, draw(0, n=3))


def test_frechet_by_class_compares_the_samples_of_each_class():
    x = normal(20, 3, 0)
    y = normal(12, 3, 1)
    result = fid_studies.frechet_by_class(x, ["10"] * 10 + ["9"] * 10, y, ["9"] * 4 + ["10"] * 8)
    assert list(result) == ["9", "10"]
    assert result["10"] == metrics.frechet_distance(x[:10], y[4:])


def test_frechet_by_class_refuses_a_class_of_one_side():
    with pytest.raises(metrics.UserError, match="class a has 0 real and 12"):
        fid_studies.frechet_by_class(normal(20, 3, 0), ["b"] * 20, normal(12, 3, 1), ["a"] * 12)


def test_kernel_distance_subsets_agree_with_the_whole():
    x = normal(200, 3, 0)
    y = normal(150, 3, 1) + 0.5
    mean, deviation = fid_studies.kernel_distance_subsets(x, y)
    assert deviation > 0
    assert abs(mean - metrics.kernel_distance(x, y)) < 4 * deviation / math.sqrt(100)


def test_kernel_distance_subsets_vary_more_if_smaller():
    x = normal(200, 3, 0)
    y = normal(150, 3, 1) + 0.5
    _, deviation = fid_studies.kernel_distance_subsets(x, y)
    assert fid_studies.kernel_distance_subsets(x, y, size=20)[1] > deviation


def test_kernel_distance_subsets_are_drawn_without_replacement():
    x = torch.arange(4.0)[:, None].double()
    pairs = [list(pair) for pair in itertools.permutations(range(4), 2)]
    possible = {metrics.kernel_distance(x[a], x[b]) for a in pairs for b in pairs}
    distance, _ = fid_studies.kernel_distance_subsets(x, x, subsets=1)
    assert min(abs(distance - value) for value in possible) < 1e-9


@pytest.fixture
def folders(tmp_path):
    """Two folders of two classes, 12 random images in each."""
    generator = torch.Generator().manual_seed(0)
    for side, name, i in itertools.product(("real", "fake"), ("rose 9", "rose 10"), range(12)):
        image = torch.randint(256, (3, 8, 8), dtype=torch.uint8, generator=generator)
        gan.write_picture(tmp_path / side / name / f"{i}.png", image)
    return tmp_path / "real", tmp_path / "fake"


MEAN = metrics.Extractor(lambda x: x.mean(dim=(2, 3)), "mean", "0" * 16)


def test_study_makes_all_studies_of_two_folders(folders):
    scores = fid_studies.study(*folders, fid_studies.STUDIES, MEAN)
    names = ["", " infinity", " low", " high", " class mean", " of rose 9", " of rose 10"]
    assert {f"FD(mean){name}" for name in names} | {"KID(mean) of subsets", "KID std"} == scores.keys()
    assert scores["FD(mean) low"] <= scores["FD(mean)"] <= scores["FD(mean) high"]


def test_study_averages_the_classes(folders):
    (folders[1] / "notes.txt").write_text("no image, so the classes stay")
    scores = fid_studies.study(*folders, ["classes"], MEAN)
    mean = (scores["FD(mean) of rose 9"] + scores["FD(mean) of rose 10"]) / 2
    assert list(scores)[1:] == ["FD(mean) class mean", "FD(mean) of rose 9", "FD(mean) of rose 10"]
    assert scores["FD(mean) class mean"] == pytest.approx(mean)


def test_study_refuses_images_beside_the_classes(folders):
    to_pil_image(torch.zeros(3, 8, 8)).save(folders[1] / "stray.png")
    with pytest.raises(metrics.UserError, match="fake has images beside"):
        fid_studies.study(*folders, ["classes"], MEAN)


def test_study_refuses_an_unknown_name(folders):
    with pytest.raises(metrics.UserError, match="no study 'x'"):
        fid_studies.study(*folders, ["interval", "x"], MEAN)


def test_fid_studies_refuses_what_is_no_extractor(folders, refusal):
    argv = [*map(str, folders), "--extractor", "nowhere.pt2"]
    assert "no extractor" in refusal(fid_studies.main, argv)


# ---- export.py
@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return gan.train(gan.Config(**TOY, cond=True, runs=str(tmp_path_factory.mktemp("runs"))))


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "cond"])
def run(request, tmp_path_factory):
    return gan.train(gan.Config(**TOY, cond=request.param, runs=str(tmp_path_factory.mktemp("runs"))))


@pytest.mark.parametrize("kind", export.KINDS)
def test_export_gives_the_images_of_the_generator(run, kind, tmp_path):
    out = tmp_path / f"G{kind}"
    export.main([str(run), "--trunc", "0.7", "--out", str(out)])
    _, load = export.KINDS[kind]
    G, _ = gan.load_generator(run, trunc=0.7)
    x = export.inputs(G, 5, seed=9)
    images = load(out.read_bytes())(*x)
    assert images.shape == (5, 3, 16, 16)
    assert (images - G(*x)).abs().max() < 1e-5


def test_export_keeps_the_statistics_of_the_bound(source, tmp_path):
    export.main([str(source), "--trunc", "0.7", "--out", str(tmp_path / "G.pt")])
    G, _ = gan.load_generator(source)
    x = export.inputs(G, 5)
    images = export.load_script((tmp_path / "G.pt").read_bytes())(*x)
    assert (images - G(*x)).abs().max() > 1e-3


def test_export_refuses_a_file_that_draws_other_images(source, tmp_path, refusal, monkeypatch):
    G, _ = gan.load_generator(source)
    monkeypatch.setitem(export.KINDS, ".pt", (export.write_script, lambda data: lambda *x: G(*x) + 0.1))
    out = tmp_path / "G.pt"
    assert "gives other images" in refusal(export.main, [str(source), "--out", str(out)])
    assert not out.exists()


@pytest.mark.parametrize("package", ["onnxscript", "onnxruntime"])
def test_export_refuses_onnx_where_it_is_not_installed(package, source, refusal, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    assert "ONNX needs the packages" in refusal(export.main, [str(source), "--out", "G.onnx"])


def test_export_refuses_other_files_and_runs(source, tmp_path, refusal):
    assert "--out G.txt" in refusal(export.main, [str(source), "--out", "G.txt"])
    assert "no run" in refusal(export.main, [str(tmp_path / "x")])


# ---- finetune.py
def start(source, classes, **change):
    """Takes a step so small that it shows nothing, from the weights of a run."""
    options = TOY | {"lr_G": 1e-9, "lr_D": 1e-9, "augment": "none"} | change
    config = gan.resolve(finetune.Config(**options, init_from=str(source)))
    model = finetune.FineTune(config, len(classes))
    model.classes = classes
    images, labels, _ = gan.load_images("synthetic", 16, 3)
    model.train_step(gan.batches(images, labels % len(classes), config, model.device))
    return model


def kept(model, source):
    """Tells of each parameter of G and D whether it is the source's: {name: bool}."""
    result = {}
    for part in ("G", "D"):
        old = gan.read_checkpoint(source)[part]
        for name, new in getattr(model, part).named_parameters():
            same = old[name].shape == new.shape and torch.allclose(old[name], new, atol=1e-6)
            result[f"{part}.{name}"] = same
    return result


def test_take_over_takes_all_weights_for_the_same_classes(source, capsys):
    model = start(source, gan.read_checkpoint(source)["classes"])
    assert all(kept(model, source).values())
    assert "100% of the weights" in capsys.readouterr().out


@pytest.mark.parametrize("classes", [list("abc"), [f"class {i}" for i in range(17)]])
def test_take_over_leaves_embeddings_of_other_classes(source, classes):
    for name, same in kept(start(source, classes), source).items():
        assert same == ("embed" not in name), name


def test_take_over_refuses_a_source_of_other_sizes(source):
    with pytest.raises(gan.UserError, match="no weights"):
        start(source, list("abc"), width=6, max_width=12, z_dim=5)


def test_finetune_saves_a_plain_gan(source, tmp_path):
    flags = [
        "--loss",
        "rpgan",
        "--size",
        "16",
        "--width",
        "4",
        "--max-width",
        "8",
        "--z-dim",
        "8",
        "--batch",
        "8",
        "--steps",
        "1",
        "--device",
        "cpu",
    ]
    gan.main(["train", "--init-from", str(source), "--runs", str(tmp_path), *flags], finetune.FineTune)
    _, config = gan.load_generator(gan.find_run(None, tmp_path))
    assert type(config) is gan.Config


@pytest.mark.parametrize(
    "name, message", [("", "no run ''"), ("nowhere", "no run 'nowhere'"), ("x.pt", "not a readable")]
)
def test_finetune_refuses_a_bad_source_before_it_loads_images(name, message, tmp_path, monkeypatch, refusal):
    (tmp_path / "x.pt").write_bytes(b"no checkpoint")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gan, "load_images", lambda *_: pytest.fail("images are loaded"))
    argv = ["train", "--loss", "ns", "--init-from", name]
    assert message in refusal(gan.main, argv, finetune.FineTune)


def test_finetune_refuses_an_empty_name_in_a_folder_of_a_run(source, monkeypatch, refusal):
    monkeypatch.chdir(source)
    argv = ["train", "--loss", "ns", "--device", "cpu", "--init-from", ""]
    assert "init_from cannot be ''" in refusal(gan.main, argv, finetune.FineTune)


# ---- classifier.py
@pytest.fixture(scope="module")
def digits():
    """Ten of the drawn flowers in place of ten digits: every second image to learn from, the others to test with."""
    images, labels, _ = gan.load_images("synthetic", 32, 1)
    images = images[labels < 10]
    labels = labels[labels < 10]
    return classifier.train(images[::2], labels[::2], epochs=6, batch=32), images[1::2], labels[1::2]


def test_train_reads_most_of_what_it_has_not_seen(digits):
    assert classifier.accuracy(*digits) > 0.7


def test_accuracy_is_the_share_read_right(digits):
    net, images, labels = digits
    _, logits = net(images.float() / 255)
    expected = (logits.argmax(dim=1) == labels).float().mean()
    assert classifier.accuracy(*digits) == expected


@pytest.mark.parametrize("size", [16, 32])
def test_export_makes_an_extractor(digits, size, tmp_path):
    net, _, _ = digits
    classifier.export(net, tmp_path / "digits.pt2")
    network = metrics.load_extractor(tmp_path / "digits.pt2")
    some = gan.load_images("synthetic", size, 3)[0][:5]
    assert network.name == "digits"
    for ours, expected in zip(network(some), net(some.float() / 255)):
        assert (ours - expected).abs().max() < 1e-4


def test_load_test_set_reads_mnist(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = torch.arange(2 * 28 * 28).remainder(256).to(torch.uint8)
    for name, n in (("train", 1), ("t10k", 2)):
        header = b"\0\0\x08\x03" + b"".join(size.to_bytes(4, "big") for size in (n, 28, 28))
        (raw / f"{name}-images-idx3-ubyte").write_bytes(header + images[: n * 784].numpy().tobytes())
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + n.to_bytes(4, "big") + bytes([7, 4][:n]))
    loaded, labels = classifier.load_test_set("mnist", 32, 3, tmp_path)
    assert labels.tolist() == [7, 4]
    assert torch.equal(loaded, gan.fit(images.view(2, 1, 28, 28), 32, 3))


def test_make_reader_refuses_other_files_before_the_work(tmp_path, refusal):
    argv = ["mnist", "--data-dir", str(tmp_path / "nowhere"), "--out", "x.txt"]
    assert "--out x.txt" in refusal(classifier.main, argv)
    assert not (tmp_path / "nowhere").exists()
