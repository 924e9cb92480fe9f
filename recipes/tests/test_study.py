# SPDX-License-Identifier: MIT
"""Tests of the study at toy size: offline, on the CPU.    python -m pytest recipes/tests/test_study.py"""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

RECIPES = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(RECIPES))
sys.path.insert(0, str(RECIPES.parent))
sys.path.insert(0, str(RECIPES.parent / "bench"))
import gan
import quality
import report
import study

TOY = "--size 16 --width 4 --batch 8 --steps 16 --log-every 1 --sample-every 1.6".split()
ENVIRONMENT = {"OMP_NUM_THREADS": "1"} | os.environ


# ---- A study that was killed and went on
class Tiny(torch.nn.Linear):
    def forward(self, x):
        features = torch.nn.functional.interpolate(x, size=(4, 4), mode="bilinear").flatten(1)
        return features, super().forward(features)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data, 40 random images in two classes, and tiny.pt2, an extractor."""
    place = tmp_path_factory.mktemp("study")
    rng = np.random.default_rng(0)
    for i in range(40):
        folder = place / "data" / f"class {i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels.repeat(5, 0).repeat(5, 1)).save(folder / f"{i}.png")
    torch.manual_seed(0)
    tiny = Tiny(48, 5).requires_grad_(False)
    shapes = ({0: torch.export.Dim("n")},)
    program = torch.export.export(tiny, (torch.rand(3, 3, 16, 16),), dynamic_shapes=shapes)
    torch.export.save(program, place / "tiny.pt2")
    return place


def command(place, *flags):
    own = ["--variants", "ns", "hinge --cond", *"--trunc none 0.7 --seeds 2 1 --jobs 2".split()]
    own += ["--data", place / "data", "--extractor", place / "tiny.pt2", "--out", place / "out"]
    return [*map(str, [sys.executable, RECIPES / "study.py", *own, *TOY, *flags])]


def run(argv):
    return subprocess.run(argv, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)


@pytest.fixture(scope="module")
def ended(place):
    """A study that is killed once a run has its first checkpoint, and then goes on to its end."""
    killed = subprocess.Popen(command(place), stdout=subprocess.DEVNULL, env=ENVIRONMENT, start_new_session=True)
    while not list(place.glob("out/*/checkpoint.pt")):
        assert killed.poll() is None
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)  # with the runs at work
    killed.wait()
    ended = run(command(place))
    assert ended.returncode == 0, ended.stderr
    return ended


@pytest.fixture
def runs(place, ended):
    return [place / "out" / name for name in ("ns-seed0", "ns-seed1", "hinge-cond-seed0")]


def test_a_killed_study_takes_each_step_once(runs):
    for folder in runs:
        assert [row["step"] for row in gan.read_rows(folder / "log.jsonl")] == list(range(1, 17))


def test_each_variant_has_its_own_number_of_seeds(place, runs):
    assert sorted(path.parent for path in place.glob("out/*/checkpoint.pt")) == sorted(runs)


def test_a_finished_study_is_not_made_again(place, runs):
    files = [folder / name for folder in runs for name in ("checkpoint.pt", "eval.jsonl")]
    before = [file.stat().st_mtime_ns for file in files]
    assert run(command(place)).returncode == 0
    assert before == [file.stat().st_mtime_ns for file in files]


def test_a_finished_study_moves_without_its_checkpoints(place, runs, tmp_path, monkeypatch):
    moved = shutil.copytree(place / "out", tmp_path / "out", ignore=shutil.ignore_patterns("*.pt", "*.html", "samples"))
    monkeypatch.setattr(sys, "argv", command(place, "--out", str(moved))[1:])
    study.main()
    assert (moved / "report.html").read_bytes() == (place / "out" / "report.html").read_bytes()


def test_a_run_without_its_checkpoint_keeps_its_log(place, runs, tmp_path):
    """By definition: another bound cannot be scored, and a new run would cut the log."""
    moved = shutil.copytree(runs[0], tmp_path / "run", ignore=shutil.ignore_patterns("*.pt"))
    data, extractor = str(place / "data"), str(place / "tiny.pt2")
    job = study.Job("ns", 0, moved, ["--data", data, *TOY], [None, 0.7, 1], data, extractor)
    with pytest.raises(gan.UserError, match=r"run has no checkpoint\.pt"):
        job.make()
    assert (moved / "log.jsonl").read_bytes() == (runs[0] / "log.jsonl").read_bytes()


def test_progress_names_the_run(ended):
    assert "of 3, hinge-cond-seed0: step " in ended.stdout


def test_the_page_says_the_means_and_deviations_of_eval_jsonl(place, runs):
    page = (place / "out" / "report.html").read_text()
    rows = [row for folder in runs[:2] for row in gan.read_rows(folder / "eval.jsonl")]
    for key, decimals in {"FD(tiny)": 1, "KID(tiny)": 4, "IS(tiny)": 2, "recall": 3}.items():
        values = [row[key] for row in rows if row["trunc"] == 0.7]
        mean = f"{statistics.mean(values):.{decimals}f}"
        assert f"<td>{mean} ± {statistics.stdev(values):.{decimals}f}</td>" in page


# ---- Variety within a class
def job_of(place, run):
    data = gan.read_rows(run / "eval.jsonl")[0]["data"]
    return study.Job("hinge --cond", 0, run, [], [None, 0.7], data, str(place / "tiny.pt2"))


def test_runs_with_classes_have_a_variety(place, runs):
    """By definition: without classes nothing varies within one."""
    found = [["variety" in row for row in job_of(place, run).scores().values()] for run in runs]
    assert found == [[False, False], [False, False], [True, True]]


def test_variety_of_the_images_themselves_is_one(place, runs, tmp_path, monkeypatch):
    """By definition, with the images of the classes due in place of samples."""
    images, labels, _ = gan.load_images(str(place / "data"), 16, 3)

    def generate_images(G, n, classes, seed):
        samples = torch.empty_like(images)
        samples[torch.tensor(classes).argsort()] = images[labels.argsort()]
        return [samples]

    (row, *_) = gan.read_rows(runs[2] / "eval.jsonl")
    shutil.copytree(runs[2], tmp_path / "run")
    gan.write_text(tmp_path / "run" / "eval.jsonl", f"{json.dumps(row)}\n")
    job = job_of(place, tmp_path / "run")
    monkeypatch.setattr(gan, "generate_batches", generate_images)
    study.add_variety(job)
    assert job.scores()[None]["variety"] == pytest.approx(1, abs=1e-6)


def test_variance_within_averages_the_classes():
    """By hand: 2 + 0.5 of the first class, nothing of the second."""
    features = torch.tensor([[0.0, 1], [2, 2], [9, 9], [9, 9]])
    assert study.variance_within(features, torch.tensor([0, 0, 1, 1])) == (2 + 0.5) / 2


def test_variance_within_leaves_out_classes_of_one():
    """By definition: one image has no variance."""
    features = torch.tensor([[0.0, 1], [2, 2], [9, 9]])
    assert study.variance_within(features, torch.tensor([0, 0, 1])) == 2 + 0.5
    assert study.variance_within(features, torch.arange(3)) == 0


def test_the_page_says_the_variety_of_runs_with_classes(place, runs):
    row = gan.read_rows(runs[2] / "eval.jsonl")[-1]
    page = (place / "out" / "report.html").read_text()
    assert f"<td>{row['variety']:.2f}</td></tr>" in page
    assert "Variety: the variance of" in page


def test_scores_of_another_step_images_or_network_do_not_count(place, runs, tmp_path):
    row = gan.read_rows(runs[0] / "eval.jsonl")[0]
    job = study.Job("ns", 0, runs[0], [], [None], row["data"], str(place / "tiny.pt2"))
    assert job.is_asked_for(row)
    for change in ({"steps": 15}, {"steps": 17}, {"data": "elsewhere"}, {"weights": "0" * 16}, {"n": 7}, {"seed": 1}):
        assert not job.is_asked_for(row | change)


BAD = {
    "--steps 17": "different flags",
    "--trunc none": "different trunc",
    "--variants ns ns": "same name",
    "--variants nonesuch": "invalid choice",
    "--seeds 1 2 3": "one for each",
    "--nonesuch": "nonesuch",
    "--trunc x": "--trunc",
    "--trunc -1": "positive",
    "--seed 1": "--seed",
    "--extractor missing.pt2": "missing.pt2",
    "--data missing": "no folder",
    "--out .": "no study",
    "--batch 1": "batch",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_ends_in_one_line(place, ended, monkeypatch, capsys, flags):
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", command(place, *flags.split())[1:])
    with pytest.raises(SystemExit) as stop:
        study.main()
    line = capsys.readouterr().err
    assert stop.value.code == 2
    assert BAD[flags] in line
    assert line.count("\n") == 1


def test_a_study_of_another_version_is_refused(place, ended, monkeypatch, capsys):
    monkeypatch.setattr(study.gan, "__version__", "0.0")
    monkeypatch.setattr(sys, "argv", command(place)[1:])
    with pytest.raises(SystemExit):
        study.main()
    assert "a study with different version: give another --out" in capsys.readouterr().err


# ---- The report of these runs
def test_report_groups_runs_that_differ_in_the_seed(runs):
    variants, rows = report.group_runs(runs)
    assert variants == {"ns": runs[:2], "hinge-cond": runs[2:]}
    assert len(rows) == 6  # at two bounds each


def test_report_leaves_out_scores_of_another_checkpoint(runs):
    assert len(report.read_scores(runs[0], 16)) == 2
    assert report.read_scores(runs[0], 15) == []


def test_report_has_a_table_for_each_network(runs):
    _, rows = report.group_runs(runs[:2])  # without classes, and so without a variety
    others = [row | {"network": "other", "weights": "0" * 16, "FD": 4321.0} for row in rows]
    page = report.html_scores(rows + others, [])
    ours, theirs = page.split("<table>")[1:]
    assert "4321.0" in theirs
    assert "4321.0" not in ours
    assert "–" not in page


MADE = {"network": "net", "weights": "0123456789", "resize": "no", "dtype": "float32", "n": 9, "n_real": 9, "notes": []}
SIZES = [MADE | {"variant": "ns", "trunc": None, "FD": 1.0, "size": size} for size in (16, 32)]


def test_report_has_a_table_for_each_size():
    """By definition: the distance of a network changes with the size of its images."""
    small, large = SIZES
    assert report.by_network([small, small, large]) == {
        "net, 01234567, 16 px": [small, small],
        "net, 01234567, 32 px": [large],
    }
    assert report.by_network([small]) == {"net": [small]}


def test_report_names_scores_without_a_network_by_their_size():
    """By hand."""
    rows = [{"network": None, "SWD": 1.0, "size": size} for size in (16, 32)]
    assert list(report.by_network(rows)) == ["no network, 16 px", "no network, 32 px"]


def test_report_says_above_a_table_whose_scores_it_holds():
    """By hand."""
    first, *tables = report.html_scores(SIZES, []).split('<div class="wide">')
    assert first == "<p>net, 01234567, 16 px</p>"
    assert len(tables) == 2
    assert tables[0].endswith("<p>net, 01234567, 32 px</p>")


def test_the_page_is_complete_in_itself(place, ended):
    page = (place / "out" / "report.html").read_text()
    for outside in ("<script", "<link", "<iframe", "@import", "http://", "https://"):
        assert outside not in page
    assert page.count('src="') == page.count('src="data:')


def test_ids_of_the_page_are_unique(place, ended):
    page = (place / "out" / "report.html").read_text()
    ids = [part.partition('"')[0] for part in page.split(' id="')[1:]]
    assert len(ids) == len(set(ids)) > 0
    assert {part.partition(")")[0] for part in page.split("url(#")[1:]} <= set(ids)


def test_left_part_has_six_of_ten_columns(tmp_path):
    images = torch.randint(256, (20, 3, 16, 16), dtype=torch.uint8)
    gan.write_picture(tmp_path / "grid.png", gan.tile(images))
    part = np.asarray(report.left_part(tmp_path / "grid.png"))
    expected = gan.tile(torch.cat([images[:6], images[10:16]]), columns=6)
    assert np.array_equal(part, expected.permute(1, 2, 0))


def test_report_shows_the_newest_samples_of_a_run_without_scores(runs):
    """By the steps in the names."""
    assert report.find_grids(runs[0], []) == {"trunc none": runs[0] / "samples" / "0000016.png"}
    assert report.find_grids(runs[0], [0.7]) == {"trunc 0.7": runs[0] / "eval-trunc-0.7.png"}


def test_report_refuses_a_folder_without_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        report.main()
    assert stop.value.code == 2
    assert "is no run" in capsys.readouterr().err


def test_curves_show_the_log(runs):
    figure = report.draw_curves({"ns": runs[:1]})
    (line,) = figure.axes[0].lines
    log = gan.read_rows(runs[0] / "log.jsonl")
    assert list(line.get_xdata()) == [row["step"] for row in log]
    assert np.allclose(line.get_ydata(), [row["loss_D"] for row in log])


# ---- The sentences, by hand
def rows_of(variant, trunc, *scores):
    names = ("FD", "precision", "recall")
    facts = {"variant": variant, "trunc": trunc}
    return [facts | {"train_seed": seed} | dict(zip(names, some)) for seed, some in enumerate(scores)]


def test_answer_compares_variants_that_differ_in_one_flag():
    variants = ["ns", "hinge", "hinge --cond", "ns --g-steps 2", "rpgan --cond", "ns --width 32"]
    configs = study.read_configs(variants, [], "synthetic")
    rows = rows_of("ns", None, [20], [22], [24])
    rows += rows_of("hinge", None, [10], [12], [11])  # -10, -10, -13
    rows += rows_of("hinge --cond", None, [9], [14], [11])  # -1, 2, 0
    rows += rows_of("ns --g-steps 2", None, [21], [23], [25])
    rows += rows_of("rpgan --cond", None, [7], [12], [9])
    rows += rows_of("ns --width 32", None, [19], [21], [23])  # whose default learning rates are lower
    assert dict(study.answer(configs, rows)) == {
        "Which loss?": [
            "hinge against ns: FD is better by 11.0 ± 1.7 over 3 seeds.",
            "rpgan --cond against hinge --cond: FD is better by 2.0 ± 0.0 over 3 seeds.",
        ],
        "Do classes help?": ["hinge --cond against hinge: 3 seeds do not settle FD (0.3 ± 1.5 worse)."],
        "Does g_steps matter?": ["ns --g-steps 2 against ns: FD is worse by 1.0 ± 0.0 over 3 seeds."],
        "Does width matter?": ["ns --width 32 against ns: FD is better by 1.0 ± 0.0 over 3 seeds."],
    }


def test_answer_says_what_truncation_does():
    configs = study.read_configs(["ns"], [], "synthetic")
    rows = rows_of("ns", None, (9, 0.5, 0.5), (14, 0.5, 0.5), (11, 0.5, 0.5))
    rows += rows_of("ns", 0.7, (19, 0.6, 0.3), (24, 0.6, 0.3), (21, 0.6, 0.6))
    said = (
        "ns, trunc 0.7 against none: FD is worse by 10.0 ± 0.0, precision is better by 0.100 ± 0.000 over 3 seeds; "
        "3 seeds do not settle recall (0.100 ± 0.173 worse)."
    )
    assert study.answer(configs, rows) == [("What does truncation do?", [said])]


def test_one_seed_is_an_anecdote():
    configs = study.read_configs(["ns", "hinge"], [], "synthetic")
    rows = rows_of("ns", None, [20]) + rows_of("hinge", None, [10])
    said = "hinge against ns: one seed says that FD is better by 10.0, which is an anecdote."
    assert study.answer(configs, rows) == [("Which loss?", [said])]


def test_variants_are_compared_by_the_seeds_of_both():
    configs = study.read_configs(["ns", "hinge"], [], "synthetic")
    rows = rows_of("ns", None, [20], [22], [99]) + rows_of("hinge", None, [10], [12])
    said = "hinge against ns: FD is better by 10.0 ± 0.0 over 2 seeds."
    assert study.answer(configs, rows) == [("Which loss?", [said])]


# ---- Data, and the named settings of bench/quality.py
@pytest.fixture(scope="module")
def rows_file(place):
    """The file of rows of bench/quality.py after two steps on the toy's images, with the command line that made it."""
    own = [
        "--extractor",
        place / "tiny.pt2",
        "--data-root",
        place,
        "--runs",
        place / "runs",
        "--out",
        place / "q.jsonl",
    ]
    argv = ["quality.py", "toy", "--seeds", "7", *map(str, own), "--", "--steps", "2", "--amp", "off"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(quality.SETTINGS, "toy", quality.Setting("data", "--cond --size 16 --width 4 --batch 8"))
        patch.setattr(sys, "argv", argv)
        quality.main()
        yield place / "q.jsonl"


def test_quality_keeps_a_row_of_each_finished_run(rows_file):
    (row,) = gan.read_rows(rows_file)
    assert row["setting"] == "toy"
    assert row["seed"] == 7
    assert row["flags"][-4:] == ["--steps", "2", "--amp", "off"]
    assert [score["trunc"] for score in row["scores"]] == [None, 1.5, 1, 0.7]


def test_quality_makes_no_row_twice(rows_file, monkeypatch, capsys):
    monkeypatch.setattr(study, "run_gan", None)  # which would fail
    quality.main()
    assert len(gan.read_rows(rows_file)) == 1
    assert "| toy | none | 1 |" in capsys.readouterr().out
