"""Which column or suffix is trained on: by usual names, said aloud, and as asked for; and what is wrong with labels."""

import base64
import io
import json
import re
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from hostile import encode, photo
from PIL import Image
from pyarrow import parquet

from sslkit.cli import main
from sslkit.data.config import SourceConfig
from sslkit.data.formats.columns import choose_columns
from sslkit.data.sources.image_source import DataConfig, ImageSource, open_source
from sslkit.errors import UserError
from sslkit.evaluate.labelled_data import open_pair

PNGS = [encode(Image.fromarray(photo(seed)), "PNG") for seed in range(4)]
MASK = encode(Image.new("L", (9, 7)), "PNG")
IMAGE, CLASS = datasets.Image(), datasets.ClassLabel(names=["a", "b"])
TEXT, BYTES, NUMBER = datasets.Value("string"), datasets.Value("binary"), datasets.Value("int64")


@pytest.mark.parametrize(
    ("columns", "image", "label"),
    [
        ({"annotation": IMAGE, "image": IMAGE, "label": CLASS}, "image", "label"),
        ({"mask": IMAGE, "photo": IMAGE}, "photo", None),
        ({"segmentation_mask": IMAGE, "scene": IMAGE}, "scene", None),
        (
            {"depth_map": IMAGE, "image_rgb": IMAGE, "fine_label": CLASS, "coarse_label": CLASS},
            "image_rgb",
            "fine_label",
        ),
        ({"Img": IMAGE, "label_image": IMAGE}, "Img", None),
        ({"conditioning_image": IMAGE, "image": IMAGE, "text": TEXT}, "image", None),
        ({"x": IMAGE}, "x", None),
        ({"mask": IMAGE}, "mask", None),
        ({"mask": IMAGE, "image": BYTES}, "image", None),
        ({"jpg": BYTES, "cls": NUMBER}, "jpg", "cls"),
        ({"coarse_label": CLASS, "fine_label": CLASS, "img": IMAGE}, "img", "fine_label"),
        ({"image": IMAGE, "label": TEXT, "kind": CLASS}, "image", "kind"),
        ({"image": IMAGE, "labels": datasets.List(NUMBER)}, "image", "labels"),
        ({"left": IMAGE, "right": IMAGE}, UserError, None),
        ({"images": datasets.List(IMAGE)}, UserError, None),
        ({"pictures": BYTES}, UserError, None),
    ],
)
def test_columns_are_chosen_by_usual_names(columns: dict[str, Any], image: Any, label: str | None) -> None:
    features = datasets.Features(columns)
    if image is UserError:
        with pytest.raises(UserError, match=r"\[data\] image_column: .*" + next(iter(columns))):
            choose_columns(features, SourceConfig(path="x"))
        return
    chosen = choose_columns(features, SourceConfig(path="x"))
    assert (chosen.image, chosen.label) == (image, label)
    for name, feature in columns.items():
        assert (repr(name) in chosen.summary()) == (feature in (IMAGE, CLASS) or name in (image, label, "label"))


def test_several_kinds_of_classes_are_asked_for_by_evaluation_alone() -> None:
    features = datasets.Features({"image": IMAGE, "maker": CLASS, "colour": CLASS})
    chosen = choose_columns(features, SourceConfig(path="x"))
    assert chosen.label is None
    assert "--label-column maker" in chosen.unlabelled
    assert choose_columns(features, SourceConfig(path="x", label_column="colour")).label == "colour"


def write_parquet(folder: Path, columns: Mapping[str, Any], features: Mapping[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(dict(columns), features=datasets.Features(dict(features))).to_parquet(
        str(folder / "a.parquet")
    )
    return folder


def cells(pictures: list[bytes]) -> list[dict[str, Any]]:
    return [{"bytes": each, "path": None} for each in pictures]


def write_tar(file: Path, members: Mapping[str, bytes]) -> Path:
    with tarfile.open(file, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file


def stored(source: ImageSource) -> list[bytes]:
    return [source.encoded(index)[1] for index in range(len(source))]


def read(path: Path, **words: Any) -> ImageSource:
    return open_source(DataConfig(path=str(path), **words))


A, B, M = PNGS[0], PNGS[1], MASK


@pytest.mark.parametrize(
    ("members", "chosen"),
    [
        ({"0.jpg": A, "0.mask.png": M, "1.jpg": B, "1.mask.png": M}, [A, B]),
        ({"0.mask.png": M, "0.jpg": A}, [A]),
        ({"0.seg.png": M, "0.png": A}, [A]),
        ({"0.crop.png": M, "0.png": A}, [A]),
        ({"0.rgb.png": A, "0.depth.png": M}, [A]),
        ({"0.jpg": A, "1.jpg": B, "0.mask.png": M, "1.mask.png": M}, [A, B]),  # masks after all images
        ({"2024.01.02.jpg": A, "2024.01.03.jpg": B}, [A, B]),
        ({"2024.01.02.jpg": A, "2024.01.02.mask.png": M, "2024.01.03.jpg": B, "2024.01.03.mask.png": M}, [A, B]),
        ({"0.left.png": A, "0.right.png": B}, [A, B]),
        ({"0.mask.png": A, "1.mask.png": B}, [A, B]),  # there is nothing else
        ({"mask.1.png": A, "mask.2.png": B}, [A, B]),
    ],
)
def test_images_of_samples(members: dict[str, bytes], chosen: list[bytes], tmp_path: Path) -> None:
    assert stored(read(write_tar(tmp_path / "a.tar", members))) == chosen


def test_a_suffix_says_which_images_of_tar_files_are_read(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "a.tar", {"0.jpg": A, "0.png": B, "0.mask.png": M, "0.cls": b"3"})
    with pytest.raises(UserError, match=r"images of several kinds, \.jpg, \.png; name the one .*--image-column jpg"):
        read(file)
    for suffix, chosen in (("jpg", [A]), ("png", [B]), ("mask.png", [M]), (".JPG", [A])):
        assert stored(read(file, image_column=suffix)) == chosen
    assert read(file, image_column="png").labels() == ["3"]
    with pytest.raises(UserError, match=r"no file in .* ends in \.webp; there are"):
        read(file, image_column="webp")
    assert stored(read(write_tar(tmp_path / "b.tar", {"0.jpg": A}), image_column="image")) == [A]


def test_a_tar_among_images_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "sslkit.data"):
        assert len(read(write_tar(tmp_path / "a.tar", {"0.jpg": A, "1.jpg": B, "more.tar.gz": b""}))) == 2
    assert "(left out: .tar 1)" in caplog.text


def test_what_a_tar_without_images_holds_is_said_and_the_advice_works(tmp_path: Path) -> None:
    unknown = write_tar(tmp_path / "a.tar", {"0.img": A, "0.cls": b"1", "1.img": B})
    with pytest.raises(UserError, match=r'\.img 2.*looks like \.png: give image_column = "img" \(--image-column img\)'):
        read(unknown)
    assert stored(read(unknown, image_column="img")) == [A, B]
    with pytest.raises(UserError, match=r"no suffix 1; they look like \.png: pack them again with names that end in"):
        read(write_tar(tmp_path / "b.tar", {"0001": A}))
    inner = write_tar(tmp_path / "n01.tar", {"n01_1.JPEG": A})
    outer = write_tar(tmp_path / "c.tar", {"n01.tar": inner.read_bytes(), "n02.tar": inner.read_bytes()})
    with pytest.raises(
        UserError, match=r"tar file of tar files: unpack it once, by mkdir shards && tar -xf .* -C shards"
    ):
        read(outer)
    (tmp_path / "shards").mkdir()
    with tarfile.open(outer) as tar:
        tar.extractall(tmp_path / "shards", filter="data")
    assert stored(read(tmp_path / "shards")) == [A, A]
    inside = {"n01.tar": inner.read_bytes(), "n02.tgz": b"", "readme.jpg": B}
    mixed = write_tar(tmp_path / "e.tar", inside)
    with pytest.raises(UserError, match=r"2 tar files beside 1 images; it is a tar .*--image-column jpg"):
        read(mixed)
    assert stored(read(mixed, image_column="jpg")) == [B]
    (tmp_path / "shards" / "readme.jpg").write_bytes(B)  # as unpacked
    with pytest.raises(UserError, match=r"2 tar files beside 1 images; move the images elsewhere"):
        read(tmp_path / "shards")
    assert stored(read(tmp_path / "shards", split="all")) == [B]
    (tmp_path / "shards" / "readme.jpg").unlink()
    assert stored(read(tmp_path / "shards")) == [A, A]
    with pytest.raises(UserError, match=r"\.npy 1; \.npy: these are arrays"):
        read(write_tar(tmp_path / "d.tar", {"0.npy": b"\x93NUMPY"}))


@pytest.mark.parametrize(
    ("members", "labels"),
    [
        ({"2024.01.02.png": A, "2024.01.02.cls": b"1", "2024.01.03.png": B, "2024.01.03.cls": b"0"}, ["1", "0"]),
        ({"7.left.png": A, "7.cls": b"4", "7.right.png": B}, ["4", "4"]),
        ({"2024.a.png": A, "2024.x.cls": b"1", "2024.y.cls": b"0"}, "2 labels for '2024', '1' and '0'"),
        ({"0.png": A, "0.cls": b"1", "1.png": B}, "1 of 2 images .* row 1 has the label None"),
        ({"0.png": A, "0.cls": b"1" * 70_000}, "0.cls of .* is a label of 70000 bytes"),
        ({"0.png": A}, "has no labels"),
    ],
)
def test_labels_of_tar_files_stop_evaluation_only(members: dict[str, bytes], labels: Any, tmp_path: Path) -> None:
    source = read(write_tar(tmp_path / "a.tar", members))
    assert stored(source.without_labels()) == [content for name, content in members.items() if name.endswith("png")]
    if isinstance(labels, list):
        assert source.labels() == labels
    else:
        with pytest.raises(UserError, match=labels):
            source.labels()


def test_a_json_with_no_one_class_stops_evaluation_only(tmp_path: Path) -> None:
    members = {"0.png": A, "0.json": b'{"label": [1, 2]}', "1.png": B, "1.json": b'{"label": 0.5}'}
    source = read(write_tar(tmp_path / "a.tar", members), label_column="label")
    assert stored(source.without_labels()) == [A, B]
    with pytest.raises(UserError, match=r"0\.json of .* has \[1, 2\] for 'label'; evaluation needs one class"):
        source.labels()


FOLDERS: dict[
    str, tuple[dict[str, bytes], dict[str, Any]]
] = {  # in a tar file, and which images are read of each split
    "splits": ({"train/0.png": A, "val/0.png": B}, {"train": [A], "validation": [B], "all": [A, B]}),
    "classes": ({"cat/0.png": A, "dog/0.png": B}, {"train": [A, B]}),
    "deeper": ({"d/Training/cat/0.png": A, "d/Testing/cat/0.png": B}, {"train": [A], "test": [B]}),
    "masks": ({"images/0.png": A, "masks/0.png": B}, {"train": [A], "all": [A, B]}),
    "one": ({"val/cat/0.png": A, "val/dog/0.png": B}, {"train": [A, B]}),
    "some": ({"train/0.png": A, "test/0.png": A, "extra/0.png": B}, {"train": "splits and others", "all": [A, A, B]}),
    "absent": ({"dev/0.png": A, "test/0.png": B}, {"train": r"folders in it of \['dev', 'test'\], none of 'train'"}),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_held_out_folders_in_a_tar_file_are_not_read(case: str, tmp_path: Path) -> None:
    members, expected = FOLDERS[case]
    file = write_tar(tmp_path / "a.tar", members)
    for split, images in expected.items():
        if isinstance(images, str):
            with pytest.raises(UserError, match=images):
                read(file, split=split)
        else:
            assert sorted(stored(read(file, split=split))) == sorted(images), split


def test_a_broken_json_stops_evaluation_only(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "a.tar", {"0.png": A, "0.json": b'{"kind": "x"}', "1.png": B, "1.json": b"{"})
    source = read(file, label_column="kind")
    assert len(source.without_labels()) == 2
    with pytest.raises(UserError, match=r"1\.json of .* is not valid JSON"):
        source.labels()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("labels", "kind", "expected"),
    [
        (["x", "y", "x", "y"], TEXT, ["x", "y", "x", "y"]),
        ([1.0, 0.0, 1.0, 2.0], datasets.Value("float32"), ["1", "0", "1", "2"]),
        (["x", None, "x", None], TEXT, r"2 of 4 images of .* have no label; row 1 has"),
        ([0, 1, None, 0], CLASS, r"1 of 4 images .* row 2 has the label None"),
        ([0.0, float("nan"), 1.0, 1.0], datasets.Value("float64"), r"1 of 4 images .* row 1 has the label nan"),
        (["a", "", "b", " "], datasets.Value("string"), r"2 of 4 images .* row 1 has the label ''"),
        ([b"a", b"b", b"a", b"b"], datasets.Value("binary"), ["a", "b", "a", "b"]),
        ([0, 1, -1, 0], CLASS, r"row 2 has the label -1, which is of no class"),
        ([0.0, 0.37, 1.0, 1.0], datasets.Value("float64"), r"row 1 has the label 0\.37, a number with a fraction"),
        ([[1], [1, 2], [0], []], datasets.List(NUMBER), r"row 0 has the label \[1\], several classes"),
        ([None] * 4, datasets.Value("null"), r"4 of 4 images"),
        ([True, False, True, True], datasets.Value("bool"), ["True", "False", "True", "True"]),
    ],
)
def test_labels_of_tables_stop_evaluation_only(
    labels: list[Any], kind: Any, expected: Any, streaming: bool, tmp_path: Path
) -> None:
    columns = {"image": cells(PNGS), "label": labels}
    source = read(write_parquet(tmp_path, columns, {"image": IMAGE, "label": kind}), streaming=streaming)
    assert stored(source.without_labels()) == PNGS
    if isinstance(expected, list):
        assert source.labels() == expected
    else:
        with pytest.raises(UserError, match=expected):
            source.labels()


def test_base64_is_recognised_and_the_advice_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for head in ("", "data:image/png;base64,"):
        texts = [head + base64.b64encode(png).decode() for png in PNGS]
        parquet.write_table(pa.table({"image": texts, "label": list("abab")}), "x.parquet")
        with pytest.raises(UserError, match="images as base64 text; decode it once: ") as caught:
            read(Path("x.parquet"))
        program = str(caught.value).partition("decode it once: ")[2].partition("; then path")[0]
        exec(program)
        assert stored(read(Path("decoded.parquet"))) == PNGS
        assert read(Path("decoded.parquet")).labels() == list("abab")
        with pytest.raises(UserError, match="leave streaming out"):
            read(Path("x.parquet"), streaming=True)
    parquet.write_table(pa.table({"image": ["https://host/1.png"]}), "x.parquet")
    with pytest.raises(UserError, match=r"holds addresses \(https://host/1\.png\), not images; download"):
        read(Path("x.parquet"))


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda png: base64.b64encode(png), "base64 text"),
        (lambda png: base64.urlsafe_b64encode(png).decode(), "base64 text"),
        (lambda png: base64.encodebytes(png).decode(), "base64 text"),
        (lambda png: png.hex(), "hexadecimal text"),
        (lambda _: "s3://bucket/1.png", "addresses"),
        (list, "lists of numbers"),
    ],
)
def test_other_encodings_of_images_are_named(write: Callable[[bytes], Any], words: str, tmp_path: Path) -> None:
    column = [None, *map(write, PNGS)]
    parquet.write_table(pa.table({"image": column}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=f"'image' holds .*{words}") as caught:
        read(tmp_path / "x.parquet")
    if words == "base64 text":
        line = re.search(r"table\['image'\] = (\[.*\]); table", str(caught.value))
        assert line is not None
        assert eval(line[1], {"base64": base64, "table": {"image": column}}) == [None, *PNGS]


CELL = {"bytes": pa.binary_view(), "path": pa.string_view()}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_binary(), pa.binary_view(), pa.struct(list(CELL.items()))], ids=str
)
def test_every_type_of_bytes_is_read(kind: pa.DataType, streaming: bool, tmp_path: Path) -> None:
    values = cells(PNGS) if pa.types.is_struct(kind) else PNGS
    for label in (pa.string(), pa.large_string(), pa.string_view()):
        table = pa.table({"image": pa.array(values, kind), "label": pa.array(list("abab"), label)})
        parquet.write_table(table, tmp_path / "a.parquet")
        source = read(tmp_path, streaming=streaming)
        assert (stored(source), source.labels()) == (PNGS, list("abab"))


def lines_of(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, list[str]]:
    with pytest.raises(SystemExit):
        main(list(words))
    said = capsys.readouterr()
    lines = (said.err if "--json" in words else said.out).splitlines()
    return said.out, [line for line in lines if line.startswith("data: ")]


def test_commands_say_what_they_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With --json on the error stream, so that it stays JSON."""
    columns = {"annotation": cells([MASK] * 16), "photo": cells(PNGS * 4), "fine_label": [0, 1, 0, 1] * 4}
    features = {"annotation": IMAGE, "photo": IMAGE, "fine_label": CLASS, "coarse_label": CLASS}
    root = str(write_parquet(tmp_path / "set", {**columns, "coarse_label": [0, 0, 1, 1] * 4}, features))
    expected = (
        f"data: {root} [train]: 16 images, image column 'photo' (also there: 'annotation'), label column 'fine_label' "
        "(also there: 'coarse_label')"
    )
    out, lines = lines_of(capsys, "data", "check", root, "--workers", "0", "--json")
    assert json.loads(out)["images"] == 16
    assert lines == [expected]
    options = ("--image-column", "annotation", "--label-column", "coarse_label")
    out, lines = lines_of(capsys, "data", "check", root, "--workers", "0", "--json", *options)
    assert json.loads(out)["modes"] == {"L": 16}
    assert "image column 'annotation' (also there: 'photo'), label column 'coarse_label'" in lines[0]
    run = str(tmp_path / "run")
    words = ["--method", "simclr", "--backbone", "test_resnet", "--data", root, "--output", run]
    small = ["train.batch_size=8", "views.size=32", "train.max_steps=1", "data.workers=0"]
    _, lines = lines_of(capsys, "pretrain", *words, *(each for word in small for each in ("--set", word)))
    assert lines == [expected]
    out, lines = lines_of(capsys, "eval", "knn", run, "--data", root, "--k", "1", "--no-cache", "--json")
    assert json.loads(out)["scores"]
    assert lines == [expected]
    out, lines = lines_of(capsys, "eval", "diagnose", run, "--data", root, "--images", "4", "--views", "2", "--json")
    assert json.loads(out)
    assert lines == [expected]
    _, lines = lines_of(capsys, "prepare", root, str(tmp_path / "packed"), "--workers", "0")
    assert lines == [expected]
    _, lines = lines_of(capsys, "views", "quickstart", "--data", root, "--output", str(tmp_path / "views.html"))
    assert lines == [expected]


def test_a_table_with_odd_labels_is_checked_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns = {"image": cells(PNGS), "label": ["x", None, "y", "x"]}
    root = str(write_parquet(tmp_path, columns, {"image": IMAGE, "label": TEXT}))
    out, _ = lines_of(capsys, "data", "check", root, "--workers", "0", "--json")
    found = json.loads(out)
    assert (found["classes"], found["readable"]) == (None, 4)
    assert "row 1 has the label None" in found["label_problem"]
    with pytest.raises(UserError, match="row 1 has the label None"):
        open_pair(DataConfig(path=root))
