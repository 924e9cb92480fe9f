# SPDX-License-Identifier: MIT
from dataclasses import replace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import gan
from tensorboard_log import Logged

TOY = {"size": 16, "width": 4, "max_width": 8, "z_dim": 8, "batch": 8, "device": "cpu", "amp": "off", "log_every": 1}


def read_events(run):
    return EventAccumulator(str(run / "tensorboard")).Reload()


def test_after_log_writes_what_the_log_says(tmp_path):
    run = gan.train(gan.Config(**TOY, steps=3, runs=str(tmp_path)), model=Logged)
    events = read_events(run).Scalars("loss_D")
    rows = gan.read_rows(run / "log.jsonl")
    assert [event.step for event in events] == [1, 2, 3]
    assert [event.value for event in events] == pytest.approx([row["loss_D"] for row in rows])


def test_after_save_writes_the_grid(tmp_path):
    run = gan.train(gan.Config(**TOY, steps=1, runs=str(tmp_path)), model=Logged)
    (event,) = read_events(run).Images("samples")
    assert (event.width, event.height) == (10 * 18 + 2, 8 * 18 + 2)


def test_open_writer_hides_what_a_resumed_run_repeats(tmp_path):
    config = gan.Config(**TOY, steps=2, runs=str(tmp_path))
    run = gan.train(config, model=Logged)
    checkpoint = (run / "checkpoint.pt").read_bytes()
    gan.train(replace(config, steps=4), run, Logged)
    (run / "checkpoint.pt").write_bytes(checkpoint)
    gan.train(replace(config, steps=3), run, Logged)
    assert [event.step for event in read_events(run).Scalars("loss_D")] == [1, 2, 3]
