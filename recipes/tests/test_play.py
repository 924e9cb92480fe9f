# SPDX-License-Identifier: MIT
"""Tests of play.py. Those of the page itself run where Chromium and onnxruntime-web are installed:

apt-get install chromium && npm install onnxruntime-web && python -m pytest recipes/tests/test_play.py
"""

import base64
import gzip
import json
import re
import shutil
import subprocess
import threading
from urllib.parse import unquote

import pytest
import torch

import gan
import play

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
TOY = {"size": 16, "width": 4, "max_width": 8, "z_dim": 8, "batch": 8, "device": "cpu", "amp": "off", "steps": 2}
NAMES = ["<!--<script><b>", "{{wasm}}", "été & hiver"]
ORT = gan.Path("node_modules", "onnxruntime-web").absolute()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Trains two steps on synthetic flowers, and gives its classes names that a page must escape."""
    run = gan.train(gan.Config(**TOY, cond=True, runs=str(tmp_path_factory.mktemp("runs"))))
    content = torch.load(run / "checkpoint.pt", weights_only=True)
    content["classes"] = NAMES + content["classes"][3:]
    torch.save(content, run / "checkpoint.pt")
    return run


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    """Makes a folder that stands for onnxruntime-web."""
    folder = tmp_path_factory.mktemp("onnxruntime-web")
    (folder / "dist").mkdir()
    (folder / "dist" / play.LOADER).write_bytes(b"the loader")
    (folder / "dist" / play.WASM).write_bytes(b"the program")
    return folder


@pytest.fixture(scope="module")
def page(run, runtime, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "play.html"
    play.main([str(run), "--title", "1 < 2", "--ort", str(runtime), "--out", str(out)])
    return out


def part(page, name):
    """Reads a part of a page, the content of a script element."""
    return re.search(f'<script [^>]*id="{name}">(.*?)</script>', page.read_text(encoding="utf-8"), re.S)[1]


def unpack(page, name):
    return gzip.decompress(base64.b64decode(part(page, name)))


@pytest.mark.parametrize("trunc", [None, 0.7])
def test_player_with_statistics_is_the_standing_generator(run, trunc):
    G, _ = gan.load_generator(run)
    standing = gan.standing_generator(G, trunc)
    z, y, statistics = play.inputs(standing, 4)
    ours = play.Player(G).eval()(z, y, statistics)
    assert torch.allclose(ours, standing(z, y.argmax(dim=1)), atol=1e-6)


def test_mixture_mixes_embeddings():
    weight = torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    assert play.Mixture(weight)(torch.tensor([[0.75, 0.25]])).tolist() == [[0.75, 1.0]]


def test_page_holds_weights_in_half_precision(page):
    graph = onnx.load_from_string(unpack(page, "program")).graph
    kinds = {weight.data_type for weight in graph.initializer if len(weight.dims) > 1}
    assert kinds == {onnx.TensorProto.FLOAT16}
    assert onnx.TensorProto.FLOAT not in {weight.data_type for weight in graph.initializer}


def test_page_holds_the_runtime(page):
    assert unpack(page, "loader") == b"the loader"
    assert unpack(page, "wasm") == b"the program"
    assert "https://" not in page.read_text(encoding="utf-8")


def test_page_holds_statistics_of_each_bound(run, page):
    G, _ = gan.load_generator(run)
    found = torch.frombuffer(bytearray(unpack(page, "statistics")), dtype=torch.float32)
    expected = [play.statistics(gan.standing_generator(G, trunc)) for trunc in (None, 1.5, 1, 0.7)]
    assert torch.allclose(found, torch.cat(expected), rtol=1e-4)


def test_page_holds_the_bounds_from_the_widest(page):
    bounds = json.loads(part(page, "model"))["bounds"]
    assert [bound["name"] for bound in bounds] == ["none", "1.5", "1", "0.7"]
    assert bounds[0]["low"] == 0
    assert bounds[2]["low"] == pytest.approx(0.158655, abs=1e-6)


def test_page_escapes_names(page):
    text = page.read_text(encoding="utf-8")
    assert json.loads(part(page, "model"))["classes"][:3] == NAMES
    assert "<title>1 &lt; 2</title>" in text
    assert "<b>" not in text


def test_describe_cannot_end_the_script(run):
    G, config = gan.load_generator(run)
    G.classes = ["</script><b>"]
    text = play.describe(G, config, [None], cdn=False)
    assert "<" not in text
    assert json.loads(text)["classes"] == G.classes


def test_main_writes_a_page_without_classes_for_a_cdn(tmp_path):
    run = gan.train(gan.Config(**TOY, runs=str(tmp_path)))
    out = tmp_path / "play.html"
    play.main([str(run), "--cdn", "--trunc", "1", "--out", str(out)])
    model = json.loads(part(out, "model"))
    assert model["cdn"].endswith(play.LOADER)
    assert model["classes"] == []
    assert len(out.read_bytes()) < 150_000


def test_check_program_refuses_other_pictures(run, page):
    G, _ = gan.load_generator(run)
    G.conv.bias.data += 0.1
    with pytest.raises(gan.UserError, match="differ by"):
        play.check_program(unpack(page, "program"), G)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--out", "play.txt"], "--out play.txt"),
        (["--ort", "nowhere"], "npm install onnxruntime-web"),
        (["--cdn", "--trunc", "-1"], "trunc must be positive"),
        (["--trunc", "much"], "--trunc"),
    ],
)
def test_main_refuses_bad_flags(run, flags, message, refusal):
    assert message in refusal(play.main, [str(run), *flags])


def test_main_refuses_what_is_no_run(tmp_path, refusal):
    assert "no run" in refusal(play.main, [str(tmp_path / "x"), "--cdn"])


# ---- In Chromium
QUESTION = """
<script>
(async () => {
  while (!document.documentElement.dataset.ready) await new Promise(resolve => setTimeout(resolve, 20));
  const drawn = [];
  for (let i = 0; i < 8; i++) {
    const bound = i % model.bounds.length;
    const normal = latent(i, i > 4 ? [{ at: [250, 900], number: i }] : [], [100 * i, 300]);
    const [z, y] = [truncate(normal, bound), shares(i, i + 1, 10 * i)];
    const pixels = (await run(z, y, bound)).data;
    drawn.push({ normal: [...normal], z: [...z], y: [...y], bound, pixels: [...pixels] });
  }
  const answer = { drawn, state, again: fromLink(toLink(state)), names: [...$("class").options].map(o => o.text) };
  answer.picture = [...$("picture").getContext("2d").getImageData(0, 0, model.size, model.size).data];
  answer.noise = Array.from({ length: 500 }, (_, i) => [...noise(i)]).flat().map(x => Number(x.toFixed(3)));
  answer.due = [...(await run(pictureJobs()[0].z, pictureJobs()[0].y, state.bound)).data];
  console.log(`ANSWER${encodeURIComponent(JSON.stringify(answer))}ANSWER`);
})();
</script>
"""


@pytest.fixture(scope="module")
def answer(page, tmp_path_factory):
    """Opens the page from the disk at a link, with the real onnxruntime-web, and tells what it did there."""
    chromium = shutil.which("chromium")
    if not (chromium and ORT.exists()):
        pytest.skip("needs `apt-get install chromium` and `npm install onnxruntime-web`")
    folder = tmp_path_factory.mktemp("browser")
    out = folder / "play.html"
    text = page.read_text(encoding="utf-8") + QUESTION
    for name, data in zip(["loader", "wasm"], play.read_runtime(ORT)):
        text = text.replace(part(page, name), play.pack(data))
    gan.write_text(out, text)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={folder}/user"]
    link = f"{out.as_uri()}#n=7&at=250-900&kept=10-20-3_500-1000-4&class=%7B%7Bwasm%7D%7D&trunc=1&sheet=5"
    with subprocess.Popen([chromium, *flags, link], stderr=subprocess.PIPE, text=True) as browser:
        limit = threading.Timer(300, browser.kill)
        limit.start()
        said = next((line for line in browser.stderr if "ANSWER" in line), "no answer")
        limit.cancel()
        browser.terminate()
    return json.loads(unquote(said.split("ANSWER")[1]))


def column(answer, name):
    return torch.tensor([drawn[name] for drawn in answer["drawn"]])


def test_pictures_in_chromium_are_those_of_gan(answer, run):
    z, y, pixels = (column(answer, name) for name in ("z", "y", "pixels"))
    for i, trunc in enumerate([None, 1.5, 1, 0.7] * 2):
        G, _ = gan.load_generator(run, trunc=trunc)
        G.embed.weight.data = y[i : i + 1] @ G.embed.weight
        (expected,) = gan.to_uint8(G(z[i : i + 1], torch.tensor([0])))
        shown = pixels[i].view(16, 16, 4)[..., :3].permute(2, 0, 1)
        assert (shown - expected.int()).abs().max() <= 2


def test_noise_is_standard_normal(answer):
    ranks = torch.special.ndtr(torch.tensor(answer["noise"])).sort().values
    distance = (ranks - torch.linspace(0, 1, len(ranks))).abs().max()
    assert distance < 1.63 / len(ranks) ** 0.5  # Kolmogorov's, at 1%


def test_places_in_the_map_are_as_long_as_noise(answer):
    lengths = column(answer, "normal").norm(dim=1)
    assert (lengths > 1).all()
    assert (lengths < 5).all()


@pytest.mark.parametrize("bound, trunc", [(1, 1.5), (2, 1), (3, 0.7)])
def test_truncation_keeps_the_rank(answer, bound, trunc):
    normal, z = (column(answer, name)[bound].double() for name in ("normal", "z"))
    low = torch.special.ndtr(torch.tensor(-trunc, dtype=torch.float64))
    expected = torch.special.ndtri(low + torch.special.ndtr(normal) * (1 - 2 * low))
    assert torch.allclose(z, expected, atol=1e-6)


def test_link_says_what_the_page_shows(answer):
    state = answer["state"]
    assert (state["number"], state["at"], state["sheet"]) == (7, [250, 900], 5)
    assert state["kept"] == [{"at": [10, 20], "number": 3}, {"at": [500, 1000], "number": 4}]
    assert (state["class"], state["bound"]) == (1, 2)


def test_link_leads_back(answer):
    assert answer["again"] == answer["state"]


def test_picture_is_that_of_the_link(answer):
    assert answer["picture"] == answer["due"]
    assert len(set(answer["picture"])) > 10


def test_choice_shows_the_names_of_the_classes(answer):
    assert answer["names"][:3] == NAMES
