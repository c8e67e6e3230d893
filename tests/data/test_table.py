"""CSV and TSV files."""

from __future__ import annotations

import pytest

from tes.data import open_source
from tes.data.table import TableSource
from tes.errors import DataError


@pytest.fixture
def table(tmp_path):
    """Writes a table and opens it."""

    def write(text, name="labels.csv", encoding="utf-8"):
        (tmp_path / name).write_bytes(text.encode(encoding))
        return open_source(str(tmp_path / name))

    return write


def listed(source):
    return [(sample.path, sample.label, sample.split, sample.group) for sample in source.samples]


def test_a_table_gives_path_label_split_and_group(table, tmp_path):
    source = table("path,label,split,group\nb.png,dog,test,x\na.png,cat,train,\n")
    assert isinstance(source, TableSource)
    assert listed(source) == [("a.png", "cat", "train", None), ("b.png", "dog", "test", "x")]
    assert source.name == "labels"
    assert source.locate(source.samples[0]) == tmp_path / "a.png"


def test_split_and_group_may_be_left_out_and_columns_come_in_any_order(table):
    assert listed(table("Label, PATH\ncat,a.png\n")) == [("a.png", "cat", None, None)]


def test_a_tsv_is_separated_by_tabs(table):
    source = table("path\tlabel\na.png\tFord F-150, 2012\n", name="labels.tsv")
    assert listed(source) == [("a.png", "Ford F-150, 2012", None, None)]


def test_a_byte_order_mark_blank_lines_and_windows_line_ends_do_no_harm(table):
    source = table("path,label\r\n\r\na.png,cat\r\n,\r\nb.png,dog\r\n", encoding="utf-8-sig")
    assert [sample.path for sample in source.samples] == ["a.png", "b.png"]


def test_paths_are_relative_to_the_table_and_written_with_slashes(table, tmp_path):
    inside, outside = tmp_path / "deep/c.png", tmp_path.parent / "d.png"
    source = table(f"path,label\nsub\\a.png,x\n./b.png,x\n{inside},x\n{outside},x\n")
    assert {sample.path for sample in source.samples} == {"sub/a.png", "b.png", "deep/c.png", str(outside)}
    assert {str(source.locate(sample)) for sample in source.samples} >= {str(inside), str(outside)}


@pytest.mark.parametrize(
    ("word", "split"),
    [("train", "train"), ("val", "val"), ("Validation", "val"), ("valid", "val"), ("TEST", "test")],
)
def test_a_split_is_understood_in_every_spelling(table, word, split):
    source = table(f"path,label,split\na.png,cat,train\nb.png,cat,{word}\n")
    assert source.samples[1].split == split


def test_further_columns_are_ignored_and_named(table):
    assert table("path,label,photographer\na.png,cat,Ann\n").notes == [
        "Ignored these columns of `labels.csv`: photographer."
    ]


def test_a_row_that_repeats_another_counts_once_and_is_noted(table):
    source = table("path,label\na.png,cat\n./a.png,cat\n")
    assert len(source.samples) == 1
    assert source.notes == ["Ignored 1 repeated row of `labels.csv`."]


def test_a_quoted_comma_is_part_of_the_label(table):
    assert table('path,label\na.png,"Ford F-150, 2012"\nb.png,"Audi A4, 2011"\n').samples[0].label == "Ford F-150, 2012"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,class\na.png,cat\n", r"no column `label`\..* it reads: path, class"),
        ("paths,label\na.png,cat\n", r"no column `path`\. Did you mean `paths`\?"),
        ("", r"no column `path`\..* it reads: nothing"),
        ("path,label\n", "lists no images"),
        ("path,label,label\na.png,cat,dog\n", "2 columns called `label`"),
        ("path,label\na.png,cat\nb.png,\n", "line 3: the cell `label` is empty"),
        ("path,label\n,cat\n", "line 2: the cell `path` is empty"),
        ("path,label\na.png,Ford F-150, 2012\n", "line 2, has 3 cells where the first line has 2; put a cell"),
        ("path,label\na.png\n", "line 2, has 1 cell where"),
        ("a.png,cat\nb.png,dog\n", "it reads: a.png, cat"),
        ("path,label,split\na.png,cat,trian\n", "line 2: `trian` is no split; write train, val"),
        ("path,label,split\na.png,cat,train\nb.png,cat,\n", "line 3: the cell `split` is empty"),
        ("path,label,split\na.png,cat,test\n", "rows for test but none for train"),
        ("path,label\na.png,cat\na.png,dog\n", "line 3: `a.png` is listed twice, with the label `cat` and with `dog`"),
        ("path,label,split\na.png,cat,train\nx/../a.png,cat,test\n", "with the split `train` and with `test`"),
        ('path,label\na.png,"cat\n', "not valid CSV"),
    ],
)
def test_a_table_that_is_at_fault_is_refused_with_the_place(table, text, message):
    with pytest.raises(DataError, match=message) as caught:
        table(text)
    assert "labels.csv" in str(caught.value)


@pytest.mark.parametrize(
    "cell", ["cat;dog", "cat|dog", '"cat,dog"', '"cat, dog"', '"cat,bird"', "\"['cat', 'dog']\"", "cat; bird"]
)
def test_a_cell_that_lists_several_labels_is_refused_with_its_line(table, cell):
    with pytest.raises(DataError, match=r"line 4: the label `.*` looks like several labels, and each image must have"):
        table(f"path,label\na.png,cat\nb.png,dog\nc.png,{cell}\n")


@pytest.mark.parametrize("label", ["Ford F-150, 2012", "cat, wild", "salt & pepper", "A/C", "it;"])
def test_a_mark_in_a_name_alone_does_not_make_it_several_labels(table, label):
    assert table(f'path,label\na.png,cat\nb.png,"{label}"\n').samples[1].label == label


def test_a_table_in_another_encoding_is_refused(table):
    with pytest.raises(DataError, match="not UTF-8 text; save it again as CSV with the encoding UTF-8"):
        table("path,label\na.png,café\n", encoding="latin-1")


def test_a_missing_table_is_refused_with_the_nearest_name(tmp_path):
    (tmp_path / "labels.csv").write_text("path,label\n")
    with pytest.raises(DataError, match=r"Did you mean `labels.csv`\?"):
        open_source(str(tmp_path / "label.csv"))


def test_several_labels_are_refused_where_no_row_has_one_alone(table):
    with pytest.raises(DataError, match=r"line 2: the label `cat\|dog` looks like several labels"):
        table("path,label\na.png,cat|dog\nb.png,dog|bird\n")


def test_labels_that_disagree_with_class_folders_are_noted_and_count(table):
    rows = [f"{label}/{number}.jpg,{label}" for label in ("cat", "Golden-Retriever") for number in range(3)]
    source = table("\n".join(["path,label", *rows, "photos/cat/9.jpg,golden_retriever", "x/1.jpg,cat"]))
    assert next(sample.label for sample in source.samples if sample.path.endswith("9.jpg")) == "golden_retriever"
    (note,) = source.notes
    assert note.startswith("1 label of") and "photos/cat/9.jpg is `golden_retriever`" in note
    other = [f"{folder}/{number}.jpg,{label}" for folder, label in (("a", "b"), ("b", "a")) for number in range(3)]
    assert table("\n".join(["path,label", *other])).notes == []  # folders that are no classes


def test_a_table_with_semicolons_is_read_as_excel_writes_it_where_the_comma_is_the_decimal_sign(table):
    assert listed(table("path;label\na.png;cat, small\nb.png;dog\n")) == [
        ("a.png", "cat, small", None, None),
        ("b.png", "dog", None, None),
    ]


def test_columns_by_their_usual_other_names_are_pointed_at(table):
    with pytest.raises(DataError, match=r"no column `path`. Is it `image`. Rename that"):
        table("image,label\na.png,cat\n")
    with pytest.raises(DataError, match=r"no column `label`. Is it `species`. Rename that"):
        table("path,species\na.png,cat\n")
