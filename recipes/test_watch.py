# SPDX-License-Identifier: MIT
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import gan
import metrics
import watch

TOY = dict(size=16, width=4, max_width=8, z_dim=8, batch=8, device="cpu", amp="off", steps=1)


def test_watch_keeps_the_best_generator_and_stops(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(watch, "MOST", 100)
    read = lambda run: [json.loads(line) for line in (run / "watch.jsonl").read_text().splitlines()]
    config = watch.Config(
        **TOY | {"steps": 5}, cond=True, patience=10, sample_every=1 / 170, runs=str(tmp_path), name="run"
    )
    run = gan.train(config, model=watch.Watched)
    records = read(run)
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5] and (run / "watch.png").exists()
    best = min(records, key=lambda r: r["score"])
    G, _ = gan.load_generator(run / "best.pt", model=watch.Watched)
    assert G.steps == best["step"]
    images, labels, _ = gan.load_images("synthetic", 16, 3)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    samples = gan.generate(G, 100, classes=labels[order[:100]].tolist())
    assert metrics.sliced_wasserstein(images[order[:100]], samples) == pytest.approx(best["score"], abs=1e-3)

    # From now on every score is worse than the last, so the run ends itself, as one that was interrupted does.
    scores = iter(range(10_000, 20_000))
    monkeypatch.setattr(watch.Judge, "score", lambda *_: next(scores))
    resumed = dataclasses.replace(config, steps=60)
    gan.train(resumed, run, watch.Watched)
    end = gan.read_checkpoint(run, watch.Watched)["steps"]
    assert 5 + 10 <= end < 20 and "stopped" in capsys.readouterr().out
    assert [r["step"] for r in read(run)] == list(range(1, end + 1)) and read(run)[:5] == records
    assert gan.read_checkpoint(run / "best.pt", watch.Watched)["steps"] == best["step"]
    with pytest.raises(gan.UserError, match="no extractor"):
        gan.train(dataclasses.replace(config, watch="nowhere.pt2", name="x"), model=watch.Watched)
