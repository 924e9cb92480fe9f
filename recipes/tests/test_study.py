# SPDX-License-Identifier: MIT
"""Tests of the study and its report at toy size: offline, on the CPU.    python -m pytest recipes/test_study.py"""

import hashlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import gan
import report
import study

TOY = "--size 16 --width 4 --batch 8 --steps 16 --log-every 1 --sample-every 1.6".split()


class Tiny(torch.nn.Linear):
    def forward(self, x):
        features = torch.nn.functional.interpolate(x, size=(4, 4), mode="bilinear").flatten(1)
        return features, super().forward(features)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data, 40 random images in two classes, and tiny.pt2, an extractor."""
    place, rng = tmp_path_factory.mktemp("study"), np.random.default_rng(0)
    for i in range(40):
        (place / "data" / f"class {i % 2}").mkdir(parents=True, exist_ok=True)
        picture = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(5, 0).repeat(5, 1)
        Image.fromarray(picture).save(place / "data" / f"class {i % 2}" / f"{i}.png")
    torch.manual_seed(0)
    tiny, n = Tiny(48, 5).requires_grad_(False), torch.export.Dim("n")
    program = torch.export.export(tiny, (torch.rand(3, 3, 16, 16),), dynamic_shapes=({0: n},))
    torch.export.save(program, place / "tiny.pt2")
    return place


def command(place, *flags):
    own = ["--variants", "ns", "hinge --cond", *"--trunc none 0.7 --seeds 2 --jobs 2 --data".split(), place / "data"]
    own += ["--extractor", place / "tiny.pt2", "--out", place / "out"]
    return [*map(str, [sys.executable, HERE / "study.py", *own, *TOY, *flags])]


def run(*argv):
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    return subprocess.run([*map(str, argv)], capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture(scope="module")
def finished(place):
    """A study that is killed once a run has its first checkpoint, and then goes on to its end."""
    env = {"OMP_NUM_THREADS": "1"} | os.environ
    killed = subprocess.Popen(command(place), stdout=subprocess.DEVNULL, env=env, start_new_session=True)
    while not list(place.glob("out/*/checkpoint.pt")):
        assert killed.poll() is None
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)  # with the runs at work
    killed.wait()
    assert not any(study.is_trained(path.parent) for path in place.glob("out/*/checkpoint.pt"))
    ended = run(*command(place))
    assert ended.returncode == 0, ended.stderr
    assert "run 4 of 4, hinge-cond-seed1" in ended.stdout and "left of the whole" in ended.stdout
    return place / "out"


def test_a_killed_study_goes_on_and_is_not_made_again(place, finished):
    files = sorted(finished.glob("*/checkpoint.pt")) + sorted(finished.glob("*/eval.json"))
    assert len(files) == 8 and all(study.is_trained(file.parent) for file in files)
    before = [file.stat().st_mtime_ns for file in files]
    logs = [[json.loads(line)["step"] for line in (f.parent / "log.jsonl").read_text().splitlines()] for f in files[:4]]
    assert logs == [list(range(1, 17))] * 4
    assert run(*command(place)).returncode == 0
    assert before == [file.stat().st_mtime_ns for file in files]


def test_the_table_is_eval_json(finished):
    page, text = (finished / "report.html").read_text(), (finished / "report.md").read_text()
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line[:1] == "|"]
    assert lines[0][:4] == ["variant", "trunc", "seeds", "FD ↓"] and len(lines) == 6
    keys = {"FD(tiny)": 1, "KID(tiny)": 4, "IS(tiny)": 2, "precision": 3, "recall": 3}
    for variant, trunc, seeds, *cells in lines[2:]:
        runs = [finished / f"{variant.replace(' --', '-')}-seed{seed}" for seed in range(int(seeds))]
        rows = [row for path in runs for row in json.loads((path / "eval.json").read_text())["scores"]]
        for cell, key in zip(cells, keys, strict=True):
            values = [row[key] for row in rows if row["trunc"] == gan.truncation(trunc)]
            assert len(values) == 2 and f"<td>{cell}</td>" in page
            assert cell == " ± ".join(f"{f(values):.{keys[key]}f}" for f in (statistics.mean, statistics.stdev))


def test_the_page_is_complete_in_itself(finished):
    page = (finished / "report.html").read_text()
    assert not re.search(r"<(script|link|iframe)|@import|https?://|url\((?!#)|src=\"(?!data:)", page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)) and set(re.findall(r'(?:url\(|href=")#([^")]+)', page)) <= set(ids)
    assert page.count("<svg") == 2 and page.count("<img") >= 4 + 2 * 2 and page.count("alt=") == page.count("<img")
    for file in re.findall(r"\]\((.+?)\)", (finished / "report.md").read_text()):
        assert (finished / file).is_file()


@pytest.mark.parametrize("width", [500, 1200])
def test_the_page_in_chromium(finished, tmp_path, width):
    if not (chromium := shutil.which("chromium")):
        pytest.skip("there is no chromium here")
    flags = f"--headless --no-sandbox --disable-gpu --hide-scrollbars --window-size={width},1500".split()
    run(chromium, *flags, f"--screenshot={tmp_path / 'page.png'}", (finished / "report.html").as_uri())
    shot = np.asarray(Image.open(tmp_path / "page.png").convert("L"))
    assert shot.shape == (1500, width)
    assert all((part < 128).any() and (part == 255).mean() > 0.2 for part in np.split(shot, 3))  # text on white


def fails(monkeypatch, capsys, module, *argv):
    """The line with which a command ends, with status 2."""
    monkeypatch.setattr(sys, "argv", [*map(str, argv)])
    try:
        pytest.fail(f"no error: {module.main()}")
    except SystemExit as error:  # not pytest.raises, which would keep the lock of the study open
        assert error.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line


def test_report_of_any_runs(finished, tmp_path, monkeypatch, capsys):
    runs = map(str, sorted(finished.glob("*-seed?")))
    monkeypatch.setattr(sys, "argv", ["report.py", *runs, "--out", str(tmp_path / "x.html")])
    report.main()
    mine, theirs = (
        {line.replace("-", " ").replace("   ", " ") for line in path.read_text().splitlines() if line[:1] == "|"}
        for path in (tmp_path / "x.md", finished / "report.md")
    )
    assert mine == theirs
    old = Path(shutil.copytree(finished / "ns-seed0", tmp_path / "old"))
    assert len(report.group_runs([old])[1]) == 2
    (old / "eval.json").write_text((old / "eval.json").read_text().replace('"steps": 16', '"steps": 15'))
    assert not report.group_runs([old])[1]  # scores of another checkpoint than the one whose samples are shown
    assert "is no run" in fails(monkeypatch, capsys, report, "report.py", tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(b"x")
    assert "damaged" in fails(monkeypatch, capsys, report, "report.py", tmp_path)


def rows_of(variant, trunc, scores):
    names = "FD(net)", "precision", "recall"
    return [{"variant": variant, "trunc": trunc, "train_seed": s, **dict(zip(names, r))} for s, r in enumerate(scores)]


def test_sentences():
    configs = {v: study.read_config(v, [], "synthetic") for v in ("ns", "hinge", "hinge --cond", "ns --g-steps 2")}
    rows = rows_of("ns", None, [(20, 0.5, 0.5), (22, 0.5, 0.5), (24, 0.5, 0.5)])
    rows += rows_of("hinge", None, [(10, 0.5, 0.5), (12, 0.5, 0.5), (11, 0.5, 0.5)])  # -10, -10, -13
    rows += rows_of("hinge --cond", None, [(9, 0.5, 0.5), (14, 0.5, 0.5), (11, 0.5, 0.5)])  # -1, 2, 0
    rows += rows_of("ns --g-steps 2", None, [(21, 0.5, 0.5), (23, 0.5, 0.5), (25, 0.5, 0.5)])
    rows += rows_of("hinge --cond", 0.7, [(19, 0.6, 0.3), (24, 0.6, 0.3), (21, 0.6, 0.6)])
    configs, truncated = dict(configs), {"hinge --cond": configs["hinge --cond"]}
    answers = dict(study.answer(configs, [row for row in rows if row["trunc"] is None]))
    assert answers == {
        "Which loss?": ["hinge against ns: FD is better by 11.0 ± 1.7 over 3 seeds."],
        "Do classes help?": ["hinge --cond against hinge: 3 seeds do not settle FD (0.3 ± 1.5 worse)."],
        "Does g_steps matter?": ["ns --g-steps 2 against ns: FD is worse by 1.0 ± 0.0 over 3 seeds."],
    }
    ((question, said),) = study.answer(truncated, [row for row in rows if row["variant"] == "hinge --cond"])
    assert question == "What does truncation do?" and said == [
        "hinge --cond, trunc 0.7 against none: FD is worse by 10.0 ± 0.0, precision is better by 0.100 ± 0.000 over 3 "
        "seeds; 3 seeds do not settle recall (0.100 ± 0.173 worse)."
    ]
    one = study.answer(configs, [row for row in rows if row["trunc"] is None and row["train_seed"] == 0])
    assert one[0][1] == ["hinge against ns: one seed says that FD is better by 10.0, which is an anecdote."]


BAD = dict(line.split(" | ") for line in """--steps 17 | other flags
--trunc none | other trunc
--variants ns ns | same name
--variants nonesuch | invalid choice
--nonesuch | nonesuch
--trunc x | --trunc
--trunc -1 | positive
--seed 1 | --seed
--extractor missing.pt2 | missing.pt2
--data missing | no folder
--out . | no study
--batch 1 | batch""".splitlines())  # fmt: skip


@pytest.mark.parametrize("flags", BAD)
def test_bad_input(place, finished, monkeypatch, capsys, flags):
    monkeypatch.chdir(place)
    assert BAD[flags] in fails(monkeypatch, capsys, study, *command(place, *flags.split())[1:])


def test_flowers17_are_arranged(tmp_path, monkeypatch):
    archive = tmp_path / ".flowers17" / "17flowers.tgz"  # as if the download had ended
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as file:
        for i in range(1, 1361):
            file.addfile(tarfile.TarInfo(f"jpg/image_{i:04d}.jpg"))
    monkeypatch.setattr(study, "FLOWERS", (study.FLOWERS[0], hashlib.md5(archive.read_bytes()).hexdigest()))
    for _ in range(2):  # the second time there is nothing to do
        folder = Path(study.find_data("flowers17", tmp_path))
        assert sorted(path.name for path in folder.iterdir()) == sorted(study.CLASSES)
        assert all(len(list((folder / name).iterdir())) == 80 for name in study.CLASSES)
        assert (folder / "snowdrop" / "image_0081.jpg").exists() and (folder / "pansy" / "image_1360.jpg").exists()
        assert list(tmp_path.iterdir()) == [folder]
