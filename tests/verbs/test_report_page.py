"""The page of a run and of a comparison: what it says, what it must never run or load, and the table of doubts."""

from __future__ import annotations

import base64
import csv
import hashlib
import html
import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

import tes
from tes.doubts import doubts
from tes.mistakes import confusions, mistakes, worth_showing
from tes.predictions import Predictions

NAMES = {
    "red_square": "<script>alert(1)</script>",
    "green_square": "\"grün' & <b>co</b>",
    "blue_square": "\u202eכחול 🟦",
}


class Page(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside: list[str] = []
        self.content: dict[str, str] = {"script": "", "style": ""}
        self.feed(self.html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._inside = [tag] if tag in self.content else []

    def handle_endtag(self, tag):
        self._inside = []

    def handle_data(self, data):
        if self._inside:
            self.content[self._inside[0]] += data
        else:
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def section(self, name):
        """Return the text of a section."""
        found = re.search(rf'<section id="{name}".*?</section>', self.html, re.DOTALL)
        return html.unescape(re.sub(r"<[^>]+>", "", found.group())) if found else ""


@pytest.fixture(scope="session")
def labels_csv(photos, tmp_path_factory) -> Path:
    """The photos of `photos` in a table, some with a wrong label; a page must not believe the names in it."""
    folder = tmp_path_factory.mktemp("hostile")
    rows = []
    for number, file in enumerate(sorted(photos.rglob("*.png"))):
        name = f"<img src=x onerror=alert(2)>{number}.png"
        shutil.copy(file, folder / name)
        right = list(NAMES.values()).index(NAMES[file.parent.name])
        rows.append([name, list(NAMES.values())[(right + (number % 4 == 0)) % 3], f"box {number}"])
    with (folder / "labels.csv").open("w", encoding="utf-8", newline="") as out:
        csv.writer(out).writerows([["path", "label", "group"], *rows])
    return folder / "labels.csv"


@pytest.fixture(scope="session")
def hostile_rows(tmp_path_factory, with_prior) -> Path:
    """Text rows for those classes, and for the source classes of `with_prior`."""
    path = tmp_path_factory.mktemp("rows") / "rows.npz"
    source = Path(with_prior["backbone.source_classes"]).read_text().split("\n")
    rows = np.random.default_rng(1).normal(size=(13, 6)).astype("float32")
    np.savez(path, names=np.array([*NAMES.values(), *source]), embeddings=rows)
    return path


@pytest.fixture(scope="session")
def finished(labels_csv, hostile_rows, resnet, tmp_path_factory) -> Path:
    """A run on those. Read-only: copy it to change it."""
    flags = {"data.source": str(labels_csv), "data.shots": 4, "text.encoder": f"file:{hostile_rows}", **resnet}
    out = tmp_path_factory.mktemp("runs") / "run"
    tes.train(tes.load_config(flags={**flags, "train": "head", "out": str(out)}))
    return out


@pytest.fixture(scope="session")
def compared(labels_csv, hostile_rows, with_prior, tmp_path_factory) -> Path:
    """A comparison on those, at two numbers of shots from two seeds. Read-only."""
    flags = {"data.source": str(labels_csv), **with_prior, "text.encoder": f"file:{hostile_rows}"}
    out = str(tmp_path_factory.mktemp("runs") / "comparison")
    arms = ("ce", "tes", "ce+probe+prior")
    return tes.compare(flags, arms, shots=("1", "2"), num_seeds=2, controls=False, out=out).path


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(params=["finished", "compared"])
def page(request, tmp_path) -> Page:
    return Page(tes.report(request.getfixturevalue(request.param), out=tmp_path / "page.html"))


def test_a_page_runs_its_own_script_alone_and_loads_nothing(page):
    assert len(page.all("script")) == 1 and "src" not in page.all("script")[0]
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(page.content["script"].encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; img-src data:;") and f"script-src 'sha256-{digest}'" in policy
    assert not page.all("link") and not page.all("iframe") and "url(" not in page.content["style"]
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name in ("src", "href", "xlink:href", "action", "data"):
            assert attributes.get(name, "#").startswith(("#", "data:image/jpeg;base64,")), (tag, attributes)


def test_a_page_can_be_found_ones_way_about_in(page):
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert max(Counter(ids).values()) == 1
    assert all(attributes["href"][1:] in ids for attributes in page.all("a"))
    assert [tag for tag, _ in page.tags if tag == "h1"] == ["h1"]
    assert len(page.all("main")) == 1 and page.all("html")[0]["lang"] == "en"
    assert len(page.all("caption")) == len(page.all("table")) > 0
    assert all(attributes["alt"] for attributes in page.all("img")) and page.all("img")
    named = [attributes for attributes in page.all("svg") if attributes.get("aria-hidden") != "true"]
    assert named and all(set(svg["aria-labelledby"].split()) <= set(ids) for svg in named)


def test_names_that_a_stranger_chose_come_out_as_text(finished, tmp_path):
    page = Page(tes.report(finished, out=tmp_path / "page.html"))
    for name in NAMES.values():
        readable = name.strip("\u202e")  # which turns all that follows round
        assert readable in page.section("classes") and readable in page.section("text")
    assert "<script>alert" not in page.html and "<b>co" not in page.html and "<img src=x" not in page.html
    assert any("onerror=alert(2)" in image["alt"] for image in page.all("img"))


def test_a_run_says_its_headline_first_and_every_figure_of_every_head(finished, tmp_path):
    path = tes.report(finished, out=tmp_path / "page.html")
    page, metrics = Page(path), tes.Run.open(finished).metrics
    shown = f"{100 * metrics['test']['vision']['mean_per_class']:.1f}\u00a0%"
    assert shown in page.text[: page.text.index("Classes taken for one another")]
    assert "Against plain fine-tuning on" in page.text
    figures = page.section("figures")
    for heads in metrics.values():
        for scores in heads.values():
            assert f"{scores['nll']:.3f}" in figures and f"{100 * scores['top1']:.1f}\u00a0%" in figures
    for name in ("figures", "classes", "calibration", "text", "doubts", "reproduce"):
        assert page.section(name) and 'class="missing"' not in page.section(name)
    assert f"{metrics['test']['vision']['ece']:.3f}" in page.section("calibration")
    assert path.read_bytes() == tes.report(finished, out=tmp_path / "again.html").read_bytes()


def test_by_default_the_page_lies_in_the_folder_which_stays_a_run_that_can_be_replaced(run, cli, labels_csv, resnet):
    code, out, err = cli("report", run)
    assert code == 0 and str(run / "report.html") in out, err
    assert (run / "report.html").is_file() and (run / "doubts.csv").is_file()
    assert {file.name for file in run.iterdir()} <= tes.run.CONTENTS


def test_the_doubt_is_one_minus_the_probability_of_the_label():
    draw = np.random.default_rng(3)
    logits_NC = draw.normal(size=(20, 4)).astype("float32") * 3
    labels = draw.integers(0, 4, size=20)
    found = doubts(Predictions([f"{n:02}" for n in range(20)], labels, {"vision": logits_NC}))
    for doubt in found:
        row = logits_NC[int(doubt.path)].astype(float)
        p = [float(np.exp(one) / sum(np.exp(other) for other in row)) for one in row]
        assert doubt.doubt == pytest.approx(1 - p[doubt.label]) and doubt.label == labels[int(doubt.path)]
        assert doubt.suggested == (None if row.argmax() == doubt.label else row.argmax())
    assert [one.doubt for one in found] == sorted((one.doubt for one in found), reverse=True)


def test_the_mistakes_are_the_frequent_pairs_and_the_sure_errors():
    sure, unsure, right = [0.0, 9.0, 0.0], [1.0, 2.0, 0.0], [5.0, 0.0, 0.0]
    said = Predictions(list("abcde"), [0, 0, 0, 2, 1], {"vision": np.float32([unsure, sure, right, sure, sure])})
    (first, second) = confusions(said, "vision")
    assert (first.label, first.predicted, first.paths, first.num_samples) == (0, 1, ["b", "a"], 3)
    assert (second.label, second.predicted, second.paths, second.num_samples) == (2, 1, ["d"], 1)
    assert [mistake.path for mistake in mistakes(said, "vision")] == ["b", "d", "a"]
    train = Predictions(["t", "u"], [0, 0], {"vision": np.float32([right, sure])})
    assert worth_showing({"test": said, "train": train}, "vision") == ["b", "a", "d", "u", "t"]


def test_the_kept_pictures_are_those_that_the_page_asks_for_first(photos, tmp_path, monkeypatch):
    from tes import data, run_writer
    from tes.config import DataConfig

    monkeypatch.setattr(run_writer, "MAX_THUMBNAILS", 5)
    dataset = data.load(DataConfig(source=str(photos)))
    wanted = [dataset.paths[index] for index in (20, 3)]
    for _ in range(2):  # a comparison that grows writes them anew
        run_writer.write_thumbnails(tmp_path / "thumbnails", dataset, wanted)
    kept = {file.stem for file in (tmp_path / "thumbnails").iterdir()}
    assert len(kept) == 5 and {dataset.sha1s[20], dataset.sha1s[3]} < kept
    others = [dataset.labels[dataset.sha1s.index(sha1)] for sha1 in kept - {dataset.sha1s[20], dataset.sha1s[3]}]
    assert sorted(others) == [0, 1, 2]


def test_doubts_csv_holds_every_image_and_can_be_corrected_and_trained_on(run, cli, resnet, hostile_rows, tmp_path):
    tes.report(run)
    with (run / "splits.csv").open(encoding="utf-8", newline="") as file:
        images = {row["path"]: row for row in csv.DictReader(file)}
    with (run / "doubts.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "label", "split", "group", "suggested", "doubt"]
    assert {Path(row["path"]).name for row in rows} == images.keys() and len(rows) == len(images)
    trained = [row for row in rows if row["doubt"]]
    assert {Path(row["path"]).name for row in trained} == {p for p, r in images.items() if r["split"] == "train"}
    assert rows[: len(trained)] == trained
    assert [float(row["doubt"]) for row in trained] == sorted((float(row["doubt"]) for row in trained), reverse=True)
    assert all(row["suggested"] != row["label"] for row in rows)

    other = next(name for name in NAMES.values() if name != rows[0]["label"])
    rows[0]["label"] = other
    with (tmp_path / "elsewhere.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    settings = [f"--set={key}={value}" for key, value in resnet.items() if not isinstance(value, dict)]
    settings.append(f"--set=backbone.kwargs={json.dumps(resnet['backbone.kwargs'])}")
    code, _, err = cli(
        "train", tmp_path / "elsewhere.csv", "--text", f"file:{hostile_rows}", "--train", "head", *settings,
        "--out", tmp_path / "second",
    )  # fmt: skip
    assert code == 0, err
    with (tmp_path / "second" / "splits.csv").open(encoding="utf-8", newline="") as file:
        again = {Path(row["path"]).name: row for row in csv.DictReader(file)}
    changed = {name for name in images if again[name]["label"] != images[name]["label"]}
    assert changed == {Path(rows[0]["path"]).name} and again[changed.pop()]["label"] == other
    assert all((again[name]["split"] == "test") == (images[name]["split"] == "test") for name in images)
    assert all(again[name]["group"] == images[name]["group"] for name in images)


def test_corrections_in_doubts_csv_are_never_overwritten(run, cli):
    tes.report(run)
    edited = (run / "doubts.csv").read_text(encoding="utf-8").replace("train", "val", 1)
    (run / "doubts.csv").write_text(edited, encoding="utf-8")
    code, _, err = cli("report", run)
    assert code == 0 and "is kept" in err and (run / "doubts.csv").read_text(encoding="utf-8") == edited


def test_photos_that_the_user_points_to_fill_in_for_pictures_but_only_the_very_same(run, labels_csv, tmp_path):
    for thumbnail in (run / "thumbnails").iterdir():
        thumbnail.unlink()
    assert not Page(tes.report(run)).all("img")
    pictures = Page(tes.report(run, data=str(labels_csv))).all("img")
    assert pictures
    moved = shutil.copytree(labels_csv.parent, tmp_path / "moved")
    for photo in moved.glob("*.png"):
        photo.write_bytes(photo.read_bytes() + b"changed")
    assert not Page(tes.report(run, data=str(moved / "labels.csv"))).all("img")


def test_with_one_image_a_class_no_label_is_doubted(labels_csv, resnet, tmp_path):
    flags = {"data.source": str(labels_csv), "data.shots": 1, "objective": "ce", "train": "head", **resnet}
    run = tes.train(tes.load_config(flags={**flags, "out": str(tmp_path / "run")}))
    assert not (run.path / "predictions" / "train.npz").exists()
    page = Page(tes.report(run))
    assert "No label could be doubted" in page.section("doubts") and not (run.path / "doubts.csv").exists()


@pytest.mark.parametrize(
    ("name", "how", "section"),
    [
        ("predictions/test.npz", "cut", "classes"),
        ("predictions/test.npz", "gone", "calibration"),
        ("predictions/train.npz", "garbled", "doubts"),
        ("text_head.safetensors", "cut", "text"),
        ("text_head.safetensors", "gone", "text"),
        ("env.json", "garbled", "reproduce"),
        ("config.yaml", "gone", "reproduce"),
        ("metrics.jsonl", "cut", "training"),
    ],
)
def test_what_is_damaged_leaves_its_section_out_with_a_sentence(run, cli, name, how, section):
    file = run / name
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(b"\x00nonsense" if how == "garbled" else file.read_bytes()[: file.stat().st_size // 2])
    code, _, err = cli("report", run)
    assert code == 0, err
    page = Page(run / "report.html")
    left_out = {
        found.group(1) for found in re.finditer(r'<section id="(\w+)"[^>]*>\s*<h2.*\s*<p class="missing">', page.html)
    }
    assert section in left_out and "figures" not in left_out and page.section(section).strip().endswith(".")


@pytest.mark.parametrize(
    ("name", "where", "value"),
    [
        ("run.json", ("arm",), 7),
        ("run.json", ("backbone",), "x"),
        ("run.json", ("metrics", "test", "vision", "mean_per_class"), "x"),
        ("run.json", ("against",), {"difference": None}),
        ("classes.json", ("classes", 0, "prompts"), 3),
        ("config.yaml", ("data",), "x"),
        ("config.yaml", ("data", "fraction"), []),
    ],
)
def test_a_value_of_another_kind_is_named_with_its_file(run, cli, name, where, value):
    content = yaml.safe_load((run / name).read_text())
    *outer, last = where
    inner = content
    for key in outer:
        inner = inner[key]
    inner[last] = value
    (run / name).write_text(json.dumps(content))  # which is YAML as well
    code, out, err = cli("diagnose", run)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"{name}` is damaged: `{'.'.join(map(str, where))}" in err
    code, _, err = cli("report", run)  # all but run.json can be done without
    assert code == (2 if name == "run.json" else 0) or f"{name}` is damaged" in err


def test_a_run_that_does_not_say_its_arm_is_diagnosed_as_any_other(run, cli):
    summary = json.loads((run / "run.json").read_text())
    del summary["arm"], summary["start"]
    (run / "run.json").write_text(json.dumps(summary))
    code, out, err = cli("diagnose", run)
    assert code == 0 and "run" in out, err


def test_damaged_pictures_and_a_lost_list_of_images_are_done_without(run, cli):
    first, *_ = sorted((run / "thumbnails").iterdir())
    first.write_bytes(b"\xff\xd8 no picture")
    assert cli("report", run)[0] == 0
    encoded = base64.b64encode(first.read_bytes()).decode()
    page = Page(run / "report.html")
    assert page.all("img") and encoded not in page.html
    (run / "doubts.csv").unlink()
    (run / "splits.csv").unlink()
    assert cli("report", run)[0] == 0
    assert not Page(run / "report.html").all("img") and not (run / "doubts.csv").exists()


def test_a_folder_that_is_no_run_and_an_unfinished_comparison_get_a_sentence(cli, tmp_path, compared):
    (tmp_path / "photos").mkdir()
    code, _, err = cli("report", tmp_path / "photos")
    assert code == 2 and "neither a run nor a comparison" in err
    code, _, err = cli("report", tmp_path / "nothing")
    assert code == 2 and "no run folder" in err
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(compared / "compare.json", begun)
    code, _, err = cli("report", begun)
    assert code == 2 and "is not finished" in err
    code, _, err = cli("calibrate", compared)  # it is of runs
    assert code == 2 and "is a comparison" in err and "cells/" in err


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("compare.json", {"seeds": []}),
        ("compare.json", {"arms": ["ce", 7]}),
        ("compare.json", {"protocol": []}),
        ("compare.json", {"arms": ["ce", "unheard"]}),
        ("summary.json", {"sentences": 3}),
        ("summary.json", {"dataset": None, "arms": {}}),
    ],
)
def test_a_damaged_comparison_gets_a_sentence_and_no_page(compared, cli, tmp_path, name, change):
    for file in ("compare.json", "summary.json"):
        content = json.loads((compared / file).read_text())
        (tmp_path / file).write_text(json.dumps(content | (change if file == name else {})))
    (tmp_path / "cells").symlink_to(compared / "cells")
    code, out, err = cli("report", tmp_path, "--out", tmp_path / "page.html")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert name in err and not (tmp_path / "page.html").exists()


def test_a_comparison_says_its_sentences_first_and_every_arm_against_ce(compared, cli, tmp_path):
    code, out, err = cli("report", compared)
    assert code == 0 and str(compared / "report.html") in out, err
    page = Page(compared / "report.html")
    summary = json.loads((compared / "summary.json").read_text())
    where = [page.text.find(sentence.replace("`", "")[1:]) for sentence in summary["sentences"]]
    assert all(0 < place < page.text.index("Accuracy over shots") for place in where)
    figures = page.section("figures")
    for arm, entry in summary["arms"].items():
        assert arm in figures
        for shots in summary["shots"]:
            assert f"{100 * entry['figures'][shots]['mean_per_class']['mean']:.1f}" in figures
    for name in ("curves", "credit", "classes", "confused", "calibration", "reproduce"):
        assert page.section(name)
    assert "the text prior" in page.section("credit")
    (compared / "report.html").unlink()


def test_gains_of_classes_are_differences_of_their_accuracies(compared, tmp_path):
    page = Page(tes.report(compared, out=tmp_path / "page.html"))
    accuracy = {}
    for arm in ("ce", "tes"):
        for shots in "12":
            right = Counter()
            for seed in "01":
                with (compared / f"cells/{shots}-s{seed}" / arm / "per_class_test.csv").open() as file:
                    for row in csv.DictReader(file):
                        right[row["name"]] += float(row["accuracy"]) / 2
            accuracy[arm, shots] = right
    rows = re.search(r"<caption>Every class: accuracy.*?</table>", page.html, re.DOTALL).group()
    keys = {
        name: [float(key) for key in re.findall(r'data-key="([^"]+)"', row)]
        for name, row in re.findall(r"<tr><th[^>]*><bdi>([^<]+)</bdi>(.*?)</tr>", rows, re.DOTALL)
    }
    assert len(keys) == 3
    for escaped, (share, gain, *_) in keys.items():
        name = html.unescape(escaped)
        means = {arm: (accuracy[arm, "1"][name] + accuracy[arm, "2"][name]) / 2 for arm in ("ce", "tes")}
        assert share == pytest.approx(means["ce"]) and gain == pytest.approx(means["tes"] - means["ce"])


def test_a_cell_of_a_comparison_has_a_page_with_the_pictures_that_all_cells_share(compared, tmp_path):
    page = Page(tes.report(compared / "cells/2-s0/tes", out=tmp_path / "page.html"))
    assert page.section("text") and 'class="missing"' in page.html
    kept = {base64.b64encode(file.read_bytes()).decode() for file in (compared / "shared/thumbnails").iterdir()}
    shown = {image["src"].removeprefix("data:image/jpeg;base64,") for image in page.all("img")}
    assert shown and shown <= kept


@pytest.fixture(scope="module")
def chromium():
    """The system's chromium; none is downloaded."""
    sync = pytest.importorskip("playwright.sync_api", reason="needs `uv run --group browser`")
    where = next((found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None)
    if where is None:
        pytest.skip("needs `chromium`, which is not installed (`apt-get install chromium`)")
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=where, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.browser
@pytest.mark.parametrize("folder", ["finished", "compared"])
@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_a_browser_has_nothing_to_complain_of(chromium, request, tmp_path, folder, colours, width):
    import axe_playwright_python

    file = tes.report(request.getfixturevalue(folder), out=tmp_path / "page.html")
    context = chromium.new_context(viewport={"width": width, "height": 800}, color_scheme=colours)
    page = context.new_page()
    requests, complaints = [], []
    page.on("request", lambda sent: requests.append(sent.url))
    page.on("pageerror", lambda problem: complaints.append(str(problem)))
    page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    page.goto(file.as_uri())
    assert [url for url in requests if not url.startswith("data:")] == [file.as_uri()]
    assert page.evaluate("[...document.images].every(one => one.alt && one.naturalWidth > 0)")
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    for fold in page.locator("details").all():
        fold.evaluate("fold => fold.open = true")
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    page.evaluate((Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8"))
    found = page.evaluate("axe.run()")["violations"]
    assert [(rule["id"], rule["nodes"][0]["html"]) for rule in found] == [] and complaints == []
    context.close()


@pytest.mark.browser
def test_the_keyboard_reaches_the_content_and_sorts_a_table(chromium, finished, tmp_path):
    page = chromium.new_page()
    page.goto(tes.report(finished, out=tmp_path / "page.html").as_uri())
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    heading = page.locator("#classes th").nth(1)
    heading.locator("button").focus()

    def keys():
        return [float(cell.get_attribute("data-key")) for cell in page.locator("#classes tbody td:nth-child(2)").all()]

    page.keyboard.press("Enter")
    assert heading.get_attribute("aria-sort") == "descending" and keys() == sorted(keys(), reverse=True)
    page.keyboard.press("Enter")
    assert heading.get_attribute("aria-sort") == "ascending" and keys() == sorted(keys())
    page.close()


@pytest.mark.browser
def test_without_scripts_everything_is_still_there(chromium, finished, tmp_path):
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(tes.report(finished, out=tmp_path / "page.html").as_uri())
    assert page.locator("#classes tbody tr").count() == 3 and page.locator("#classes button").count() == 0
    context.close()
