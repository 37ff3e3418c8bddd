"""A page from a run: whole, every panel there, its numbers those of the logs, nothing that a user wrote run as code."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import small_recipe
from reading import Page
from scipy.special import gamma, iv

import sslkit
from sslkit.cli import main
from sslkit.engine.logging.logger import append_result
from sslkit.errors import UserError
from sslkit.files.jsonl_reader import read_lines
from sslkit.report import read_run, read_runs, summarise, write_report, write_views

PANELS = {
    "Summary",
    "Accuracy on labels",
    "Scores",
    "Loss",
    "Pretext accuracy",
    "Learning rate",
    "Momentum of the teacher",
    "Gradient norm",
    "Images per second",
    "Time waiting for data",
    "Gradients by layer",
    "Neighbours",
    "Map",
    "Views",
    "Attention",
    "Facts",
}


def diagnosis(step: int, *alarms: str) -> dict[str, object]:
    counts = {"positive_histogram": [0, 1, 3, step], "negative_histogram": [5, 3, 2, 0]}
    edges = [-1.0, -0.5, 0.0, 0.5, 1.0]
    measures = {"embedding_std": 0.1 / step, "effective_rank": 8.0 + step, "alignment": 0.5, "uniformity": -2.0}
    return {"step": step, "epoch": step / 5, **measures, **counts, "histogram_edges": edges, "alarms": list(alarms)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, class_folders: Path) -> Path:
    """A trained ViT with a monitor, gradients by layer and a diagnosis."""
    folder = tmp_path_factory.mktemp("report") / "vit"
    monitor = {"every_epochs": 1, "data": str(class_folders), "k": 3, "layer_gradients": True}
    recipe = small_recipe("moco_v3", "test_vit", monitor=monitor)
    sslkit.train(recipe, folder)
    rows = [diagnosis(2, "rank is low"), diagnosis(4), diagnosis(6, "spread is <b>nil</b>")]
    (folder / "diagnostics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    scored = {"by": "eval", "step": 6, "evaluation": "linear logistic", "data": "x", "accuracy": 0.5}
    scores = [{"encoder": "vit", "accuracy": 0.5}, {"encoder": "raw pixels", "accuracy": 0.25}]
    append_result(folder, {**scored, "interval": [0.375, 0.625], "scores": scores})
    return folder


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained ResNet without monitor, gradients by layer or diagnosis."""
    folder = tmp_path_factory.mktemp("report") / "bare"
    recipe = small_recipe("moco_v2", "test_resnet", train={"max_steps": 4}, monitor={"diagnose_every": 0})
    sslkit.train(recipe, folder)
    return folder


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    records = read_runs([run])
    write_report(records, [summarise(record) for record in records], run / "report.html")
    return Page(run / "report.html")


def written(runs: list[Path], file: Path) -> Page:
    records = read_runs(runs)
    write_report(records, [summarise(record) for record in records], file, galleries=False)
    return Page(file)


def test_the_page_asks_nothing_of_a_network(page: Page) -> None:
    assert all(address.startswith(("data:", "#")) for address in page.addresses())
    assert not any(re.search(r"url\(|@import", style) for style in page.styles)
    policy = next(attrs["content"] for tag, attrs in page.elements if tag == "meta" and "http-equiv" in attrs)
    assert policy == "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
    assert sum(len(text) > 1e6 for _, text in page.scripts) == 1  # plotly, once
    assert "showSendToCloud: false" in page.scripts[-1][1]
    assert len(page.source) < 12e6


def test_every_panel_is_there_with_its_figure(page: Page) -> None:
    shown = set(page.panels())
    assert shown >= PANELS
    assert shown >= {"Spread of the embeddings", "Effective rank", "Alignment", "Uniformity", "Similarities"}
    figures = page.figures()
    assert all(figure["data"] for figure in figures.values())
    assert {"Loss", "Accuracy on labels", "Gradients by layer", "Map", "Similarities"} <= set(figures)
    assert "LiDAR" not in shown  # not in this diagnosis


def test_curves_are_the_log(page: Page, run: Path) -> None:
    metrics, figures = read_lines(run / "metrics.jsonl"), page.figures()
    for panel, key in (("Loss", "loss"), ("Learning rate", "lr"), ("Gradient norm", "grad_norm")):
        trace = figures[panel]["data"][0]
        assert trace["y"] == [row[key] for row in metrics]
        assert trace["x"] == [row["epoch"] for row in metrics]
    monitored, evaluated, *baselines = figures["Accuracy on labels"]["data"]
    results = read_lines(run / "results.jsonl")
    measured = [row for row in results if row["by"] == "monitor"][-1]["scores"][1:]  # of kNN, not the linear probe's
    assert [trace["y"] for trace in baselines] == [[100 * each["accuracy"]] * 2 for each in measured]
    assert [trace["name"].split(",")[0] for trace in baselines][:2] == ["random init", "raw pixels"]
    assert monitored["y"] == [100 * row["accuracy"] for row in results if row["by"] == "monitor"]
    assert (evaluated["y"], evaluated["error_y"]["array"], evaluated["error_y"]["arrayminus"]) == (
        [50.0],
        [12.5],
        [12.5],
    )
    assert figures["Effective rank"]["data"][0]["y"] == [10.0, 12.0, 14.0]
    chance = figures["Loss"]["data"][1]
    # 4 T ln(1 + 31 E), E = Gamma(d/2) (2 T)^(d/2 - 1) I_(d/2 - 1)(1/T) with d = 16 and T = 0.2
    mean_exp = gamma(8) * 0.4**7 * iv(7, 5.0)
    assert chance["y"] == pytest.approx([0.8 * np.log(1 + 31 * mean_exp)] * 2, rel=1e-9)


def test_the_page_opens_with_the_verdict(page: Page, run: Path, bare: Path, tmp_path: Path) -> None:
    words, results = page.words(), read_lines(run / "results.jsonl")
    verdict = next(row["verdict"] for row in results if "verdict" in row)
    assert verdict.startswith("On 8 test images, the encoder ")
    assert f"Verdict: knn k=3 temperature=0.07: {verdict}" in words
    assert words.index("Verdict: knn") < words.index("Alarm: spread")
    unknown = written([bare], tmp_path / "page.html")
    assert "Verdict: whether it beats random init and raw pixels is not known. `sslkit eval knn RUN" in unknown.words()
    assert "Accuracy on labels" not in unknown.figures()
    lacking = shutil.copytree(run, tmp_path / "lacking")  # as of an earlier version of sslkit
    rows = [{key: row[key] for key in row.keys() - {"scores", "verdict"}} for row in results]
    (lacking / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    old = written([lacking], tmp_path / "old.html")
    assert len(old.figures()["Accuracy on labels"]["data"]) == 2
    assert "Random init and raw pixels are not drawn, because they were not measured" in old.words()


def test_summary_scores_and_alarms(page: Page, run: Path) -> None:
    words = page.words()
    assert "Alarm: spread is <b>nil</b> (epoch 1.2)" in words
    assert "Earlier alarm: rank is low (epoch 0.4)" in words
    assert words.index("Alarm: spread") < words.index("Earlier alarm")
    assert "linear logistic x 50.00% 37.50% to 62.50% raw pixels 25.00%" in words
    assert "processes 1, cpu" in words
    assert f"torch {sslkit.report.read_run(run).versions['torch']}" in words


def test_several_runs_lie_over_each_other(run: Path, bare: Path, tmp_path: Path) -> None:
    page = written([run, bare], tmp_path / "both.html")
    names = [trace["name"] for trace in page.figures()["Learning rate"]["data"]]
    assert names == ["vit", "bare"]
    colours = [trace["line"]["color"] for trace in page.figures()["Learning rate"]["data"]]
    assert colours[0] != colours[1]
    lengths = [len(trace["y"]) for trace in page.figures()["Loss"]["data"] if trace["name"].endswith("loss")]
    assert lengths == [6, 4]
    assert "Recipe of bare compared with vit" in page.words()
    assert "method.queue_size: (none) -> 96" in page.words()
    assert "Losses with different levels at chance cannot be compared." in page.words()


def test_a_run_without_monitor_says_how_to_get_one(bare: Path, tmp_path: Path) -> None:
    words = written([bare], tmp_path / "bare.html").words()
    assert "No scores yet: set [monitor] every_epochs and data" in words
    assert "Not logged: set [monitor] layer_gradients = true" in words
    assert "set [monitor] diagnose_every" in words
    assert "Omitted because of --no-gallery." in words
    # 96 keys, 32 a step
    assert "Until step 3, epoch 0.0484 (shaded), the queue still contains" in words


def test_galleries_of_a_run_whose_data_is_gone(run: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    text = (moved / "recipe.toml").read_text(encoding="utf-8")
    text = text.replace('path = "builtin:fashion_mnist"', 'path = "/no/such/folder"')
    (moved / "recipe.toml").write_text(re.sub(r'data = ".*"', 'data = "/nor/this"', text), encoding="utf-8")
    records = read_runs([moved])
    summaries = [summarise(record) for record in records]
    write_report(records, summaries, moved / "report.html")
    words = Page(moved / "report.html").words()
    assert "The data of the run cannot be read: [data] path: no folder or file '/no/such/folder'" in words
    assert "give images with --data DIR" in words
    with pytest.raises(UserError, match="/also/not"):
        write_report(records, summaries, moved / "report.html", data="/also/not")


def test_what_users_write_is_text_and_never_code(run: Path, tmp_path: Path) -> None:
    hostile = tmp_path / "<img src=x onerror=alert(1)>"
    shutil.copytree(run, hostile)
    with (hostile / "recipe.toml").open("a", encoding="utf-8") as stream:
        stream.write('source = "</script><script>alert(2)</script>"\nknn_top1 = 60.0\n')
    append_result(
        hostile, {"by": "eval", "step": 6, "evaluation": "<svg onload=alert(3)>", "data": "</td>", "accuracy": 0.1}
    )
    page, plain = written([hostile], tmp_path / "page.html"), written([run], tmp_path / "plain.html")
    assert [tag for tag, _ in page.elements if tag in ("img", "svg", "script")] == [
        tag for tag, _ in plain.elements if tag in ("img", "svg", "script")
    ]
    assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)
    assert "</script><script>alert(2)</script>" in page.words()
    both = written([hostile, run], tmp_path / "both.html")
    # plotly reads a few tags inside names: it must be given entities
    assert both.figures()["Learning rate"]["data"][0]["name"] == "&lt;img src=x onerror=alert(1)&gt;"


def test_published_figures_are_drawn_in_their_own_unit(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    with (copy / "recipe.toml").open("a", encoding="utf-8") as stream:
        stream.write(
            'linear_top1 = 70.5\nsource = "a table"\n[reference.knn_by_epoch]\n20 = 40.0\n3 = 30.5\nnote = 1.0\n'
        )
    traces = {
        trace["name"]: trace for trace in written([copy], tmp_path / "p.html").figures()["Accuracy on labels"]["data"]
    }
    assert traces["published linear, 70.5"]["y"] == [70.5, 70.5]
    assert (traces["published kNN by epoch"]["x"], traces["published kNN by epoch"]["y"]) == ([3, 20], [30.5, 40.0])


def test_runs_of_one_name_are_told_apart(run: Path, bare: Path, tmp_path: Path) -> None:
    for parent, source in (("a", run), ("b", bare)):
        shutil.copytree(source, tmp_path / parent / "same", ignore=shutil.ignore_patterns("report.html"))
    names = [record.name for record in read_runs([tmp_path / "a" / "same", tmp_path / "b" / "same"])]
    assert names == ["a/same", "b/same"]


def test_the_command_writes_page_and_pictures_and_sums_up(
    capsys: pytest.CaptureFixture[str], run: Path, bare: Path, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["report", str(run), "--no-gallery"])
    out = capsys.readouterr().out
    assert not stop.value.code
    assert (run / "report.html").is_file()
    assert (run / "pictures" / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert (run / "pictures" / "views.png").is_file()
    assert f"{read_lines(run / 'metrics.jsonl')[-1]['loss']:.4g}" in out
    assert "alarm, vit, epoch 1.2: spread is <b>nil</b>" in out
    assert "alarm, vit, epoch 0.4: rank is low" in out
    with pytest.raises(SystemExit) as stop:
        main(["report", str(run), str(bare), "--no-gallery", "--output", str(tmp_path / "two.html")])
    assert not stop.value.code
    assert (tmp_path / "two.html").is_file()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["report", "/no/run"], "/no/run: not a run folder (no recipe.toml)"),
        (
            ["report", "{run}", "{bare}"],
            "--output: needed for several runs; give the HTML file to write, such as --output report.html",
        ),
        (["report", "{run}", "{run}", "--output", "x.html"], "{run}: given twice; give each run once"),
        (
            ["report", "{run}", "--output", "/no/folder/x.html"],
            ": folder /no/folder does not exist",
        ),
        (["report", "{run}", "--output", "{bare}"], "is a folder; give a file, such as"),
        (["report", "{run}", "--data", "/no/data"], "no folder or file '/no/data'"),
        (["report", "{broken}"], "metrics.jsonl: has no valid line (line 1 has no step)"),
        (["views", "no_such_recipe"], "no_such_recipe: no such file, and no recipe of that name"),
        (["views", "quickstart", "--data", "/no/data"], "no folder or file '/no/data'"),
        (["views", "quickstart", "--set", "views.sise=3"], "[views] sise: unknown key; did you mean 'size'?"),
        (
            ["views", "quickstart", "--output", "/no/folder/x.html"],
            ": folder /no/folder does not exist",
        ),
    ],
)
def test_a_mistake_is_one_sentence(
    capsys: pytest.CaptureFixture[str], run: Path, bare: Path, tmp_path: Path, words: list[str], sentence: str
) -> None:
    places = {"run": run, "bare": bare, "broken": tmp_path / "broken"}
    shutil.copytree(bare, places["broken"])
    (places["broken"] / "metrics.jsonl").write_text('{"loss": 1.0}\n', encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        main([word.format(**places) for word in words])
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert sentence.format(**places) in err
    assert err.count("\n") == 1


def test_views_page_is_small_and_whole(capsys: pytest.CaptureFixture[str], tmp_path: Path, class_folders: Path) -> None:
    file = tmp_path / "views.html"
    with pytest.raises(SystemExit) as stop:
        main(["views", "mocov3_vits", "--data", str(class_folders), "--set", "views.size=32", "--output", str(file)])
    assert not stop.value.code
    assert capsys.readouterr().out.splitlines()[-1] == str(file)  # after the line on the data
    page = Page(file)
    assert all(address.startswith(("data:", "#")) for address in page.addresses())
    assert len(page.source) < 1e6
    assert "the images are greyscale, so saturation, hue, gray_prob cost time without effect" in page.words()
    # 8 images: each as it is, and three draws of two views
    assert sum(tag == "img" for tag, _ in page.elements) == 8 * (1 + 3 * 2)


def test_views_need_no_run(tmp_path: Path) -> None:
    recipe = small_recipe("swav", "test_resnet")
    write_views(recipe, "many & small", tmp_path / "v.html")
    words = Page(tmp_path / "v.html").words()
    assert "Views of many & small" in words
    assert "2 local views" in words


def test_a_header_of_an_older_run_is_no_obstacle(bare: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(bare, old)
    text = (old / "recipe.toml").read_text(encoding="utf-8")
    (old / "recipe.toml").write_text(text[text.index("[method]") :], encoding="utf-8")
    assert read_run(old).versions == {}
    assert "processes not recorded" in written([old], tmp_path / "old.html").words()


def test_images_that_cannot_be_read_are_left_out(class_folders: Path, tmp_path: Path) -> None:
    images = shutil.copytree(class_folders, tmp_path / "images")
    files = sorted(images.rglob("*.png"))
    for file in files[::8]:
        file.write_bytes(file.read_bytes()[:70])
    data = {"path": str(images), "split": "train", "workers": 0, "max_bad_share": 0.5}
    sslkit.train(small_recipe(data=data, train={"max_steps": 2, "batch_size": 8}), tmp_path / "run")
    records = read_runs([tmp_path / "run"])
    write_report(records, [summarise(record) for record in records], tmp_path / "page.html")
    assert {"Neighbours", "Views", "Map"} <= set(Page(tmp_path / "page.html").panels())
