# SPDX-License-Identifier: MIT
from dataclasses import replace

import pytest
import torch

import gan
import metrics
import watch

TOY = {"size": 16, "width": 4, "max_width": 8, "z_dim": 8, "batch": 8, "device": "cpu", "amp": "off"}
EVERY_STEP = 1 / 170  # of an epoch of 1,360 images


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    monkeypatch.setattr(watch, "MOST", 40)


@pytest.fixture
def config(tmp_path):
    return watch.Config(**TOY, cond=True, steps=3, sample_every=EVERY_STEP, runs=str(tmp_path), name="run")


@pytest.fixture
def put_scores(monkeypatch):
    """Gives a function that decides the scores; nothing is drawn."""
    monkeypatch.setattr(watch, "draw", lambda *_: None)

    def put(*scores):
        remaining = iter(scores)
        monkeypatch.setattr(watch.Judge, "score", lambda self, G: next(remaining))

    return put


def train(config, resume=None):
    return gan.train(config, resume, watch.Watched)


def steps_of(run):
    return [row["step"] for row in gan.read_rows(run / "watch.jsonl")]


def test_after_save_scores_and_draws_each_checkpoint(config):
    run = train(config)
    assert steps_of(run) == [1, 2, 3]
    assert (run / "watch.png").stat().st_size > 5000


def test_after_save_keeps_the_best_generator(config, put_scores):
    put_scores(5, 3, 4)
    run = train(config)
    assert gan.read_checkpoint(run / "best.pt")["steps"] == 2


def test_score_is_that_of_samples_of_the_same_classes(config):
    run = train(config)
    images, labels, _ = gan.load_images("synthetic", 16, 3)
    index = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:40]
    G, _ = gan.load_generator(run)
    samples = gan.generate(G, 40, labels[index].tolist())
    expected = metrics.sliced_wasserstein(images[index], samples)
    assert gan.read_rows(run / "watch.jsonl")[-1]["score"] == pytest.approx(expected, abs=1e-3)


def test_score_takes_the_distance_by_an_extractor(config, put_reader):
    put_reader(lambda x: x.mean(dim=(2, 3)))
    judge = watch.Judge(gan.resolve(replace(config, watch="reader.pt2")), torch.device("cpu"))
    G, _ = gan.GAN.networks(gan.resolve(config), 17)
    samples = gan.generate(G, 40, judge.classes).float() / 255
    expected = metrics.frechet_distance(judge.images.float().mean(dim=(2, 3)) / 255, samples.mean(dim=(2, 3)))
    assert judge.name == "FD(reader)"
    assert judge.score(G) == pytest.approx(expected, rel=1e-3)


def test_patience_ends_the_run(config, put_scores, capsys):
    put_scores(5, 3, *range(10, 30))
    run = train(replace(config, steps=20, patience=4))
    assert gan.read_checkpoint(run)["steps"] == 2 + 4
    assert "stopped at step 6" in capsys.readouterr().out


def test_patience_begins_anew_when_a_run_is_resumed(config, put_scores):
    put_scores(1, *range(10, 30))
    run = train(config)
    train(replace(config, steps=20, patience=3), run)
    assert gan.read_checkpoint(run)["steps"] == 3 + 3


def test_load_goes_on_with_the_scores_so_far(config, put_scores):
    put_scores(5, 1, 6, 3, 4)
    run = train(config)
    train(replace(config, steps=5), run)
    assert [row["score"] for row in gan.read_rows(run / "watch.jsonl")] == [5, 1, 6, 3, 4]
    assert gan.read_checkpoint(run / "best.pt")["steps"] == 2


def test_train_step_scores_a_checkpoint_that_a_killed_run_did_not(config, put_scores):
    put_scores(5, 3, 1, 1, 6)
    run = train(config)
    lines = (run / "watch.jsonl").read_text().splitlines(keepends=True)
    (run / "watch.jsonl").write_text("".join(lines[:2]))
    (run / "best.pt").unlink()
    train(replace(config, steps=4), run)
    assert steps_of(run) == [1, 2, 3, 4]
    assert gan.read_checkpoint(run / "best.pt")["steps"] == 3


def test_save_writes_a_plain_gan(config, put_scores):
    put_scores(1, 2, 3)
    run = train(replace(config, patience=100))
    _, saved = gan.load_generator(run / "best.pt")
    assert type(saved) is gan.Config
    assert gan.train(replace(saved, steps=4), run) == run


def test_train_is_what_it_is_unwatched(config, put_scores):
    put_scores(1, 2, 3)
    run = train(config)
    plain = gan.train(replace(gan.read_checkpoint(run)["config"], name="plain"))
    weights, expected = (gan.read_checkpoint(folder)["G"] for folder in (run, plain))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_train_goes_on_from_the_best(config, put_scores):
    put_scores(5, 1, 6, 2, 3)
    run = train(config)
    train(replace(config, steps=4), run / "best.pt")
    assert steps_of(run) == [1, 2, 3, 4]
    assert gan.read_checkpoint(run)["steps"] == 4


def test_judge_refuses_what_is_no_extractor(refusal, tmp_path):
    flags = ["--size", "16", "--device", "cpu", "--watch", "nowhere.pt2", "--runs", str(tmp_path)]
    assert "no extractor" in refusal(gan.main, ["train", "--loss", "ns", *flags], watch.Watched)
