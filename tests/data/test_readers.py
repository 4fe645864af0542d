"""Records out of files, folders, the hub and the playground."""

import json
import sys

import pytest

from uft.data.readers import reader_of
from uft.data.sources import Place, open_place
from uft.errors import UftError

ROWS = [{"prompt": f"q{n}", "completion": f"a{n}"} for n in range(3)]


def tables(place):
    return open_place(place)[0]


def fields(found):
    return [record for table in found for _, record in table]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path, rows):
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def place(path, **more):
    return Place(str(path), key="data.sources.mine.path", **more)


def refused(path, **more):
    with pytest.raises(UftError) as error:
        fields(tables(place(path, **more)))
    return str(error.value)


def test_jsonl_passes_over_bom_blank_lines_and_crlf(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"prompt": "q", "completion": "a"}\r\n\r\n{"prompt": "\\u2028", "completion": "b"}')
    found = list(tables(place(file))[0])
    assert found == [(1, {"prompt": "q", "completion": "a"}), (3, {"prompt": "\u2028", "completion": "b"})]
    file.write_text(json.dumps({"prompt": "one\u2028two\x85three"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert fields(tables(place(file))) == [{"prompt": "one\u2028two\x85three"}], "no separator but \\n ends a line"


def test_broken_lines_are_bad_rows_with_their_place_and_the_others_are_read(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'{"a": 1}\n{"a": \n\xff\xfe\n[1]\n"x"\n{"a": 2}\n{"b": [{"a": 1, "c": 2, "a": 3}]}')
    found = list(tables(place(file))[0])
    assert [number for number, _ in found] == [1, 2, 3, 4, 5, 6, 7]
    assert found[6][1] == "names a field twice: 'a'"
    assert "broken JSON" in found[1][1]
    assert "not UTF-8: byte 0xff" in found[2][1]
    assert found[3][1] == found[4][1] == "not a JSON object"
    assert (found[0][1], found[5][1]) == ({"a": 1}, {"a": 2})


def test_json_is_an_array_or_lines(tmp_path):
    file = tmp_path / "x.json"
    for text in (json.dumps(ROWS), json.dumps(ROWS, indent=2), "\n".join(map(json.dumps, ROWS))):
        file.write_text(text)
        assert fields(tables(place(file))) == ROWS
    file.write_text('[{"a": 1},\n{"a": }]')
    ((number, _),) = tables(place(file))[0]
    assert number == 2


def test_csv_counts_lines_through_quoted_newlines(tmp_path):
    file = tmp_path / "x.csv"
    file.write_bytes(b'prompt,completion\r\n"two\nlines",a\r\nq,b\r\nq,b,c\r\n')
    table = tables(place(file))[0]
    first, second, third = table
    assert table.textual
    assert first == (2, {"prompt": "two\nlines", "completion": "a"})
    assert second[0] == 4
    assert third == (5, "has 3 cells under 2 columns")
    (tmp_path / "x.tsv").write_text("prompt\tcompletion\nq, with a comma\ta\n")
    assert fields(tables(place(tmp_path / "x.tsv"))) == [{"prompt": "q, with a comma", "completion": "a"}]


def test_parquet(tmp_path):
    nested = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]
    assert fields(tables(place(write_parquet(tmp_path / "x.parquet", nested)))) == nested
    import pyarrow

    twice = pyarrow.table([["q"], ["a"], ["b"]], names=["prompt", "completion", "completion"])
    pyarrow.parquet.write_table(twice, tmp_path / "x.parquet")
    assert fields(tables(place(tmp_path / "x.parquet"))) == ["names a column twice: 'completion'"]
    (tmp_path / "x.parquet").write_bytes(b"nothing of the kind")
    assert "cannot be read" in refused(tmp_path / "x.parquet")


def test_the_end_of_a_packed_file_s_name_has_any_case(tmp_path):
    import gzip

    for name in ("x.jsonl.gz", "X.JSONL.GZ"):
        (tmp_path / name).write_bytes(gzip.compress(b'{"prompt": "q"}\n'))
        assert fields(tables(place(tmp_path / name))) == [{"prompt": "q"}]


def test_a_folder_of_files_is_read_in_the_order_of_names(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", ROWS[1:])
    write_parquet(tmp_path / "a.parquet", ROWS[:1])
    (tmp_path / "notes.txt").write_text("not data")
    (tmp_path / "README.md").write_text("# Our rows, no card of the hub")
    assert fields(tables(place(tmp_path))) == ROWS


def test_files_named_after_splits_are_kept_apart(tmp_path):
    write_jsonl(tmp_path / "train-00.jsonl", ROWS[:2])
    write_jsonl(tmp_path / "test.jsonl", ROWS[2:])
    assert fields(tables(place(tmp_path))) == ROWS[:2]
    assert fields(tables(place(tmp_path, split="test"))) == ROWS[2:]
    assert "splits: test, train" in refused(tmp_path, split="validation")


def test_datasets_folders_on_disk(tmp_path):
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    both = datasets.DatasetDict(
        train=datasets.Dataset.from_list(ROWS[:2]), heldout=datasets.Dataset.from_list(ROWS[2:])
    )
    both.save_to_disk(tmp_path / "two")
    assert fields(tables(place(tmp_path / "one"))) == ROWS
    assert fields(tables(place(tmp_path / "two", split="heldout"))) == ROWS[2:]
    assert "splits: heldout, train" in refused(tmp_path / "two", split="test")


@pytest.fixture
def hub_layout(tmp_path, monkeypatch):
    """A folder as the hub keeps it: Parquet files under data/ and a card."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    repository = tmp_path / "repository"
    write_parquet(repository / "data" / "train-00000-of-00001.parquet", ROWS[:2])
    write_parquet(repository / "data" / "test-00000-of-00001.parquet", ROWS[2:])
    (repository / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n"
        "  - split: test\n    path: data/test-*\n---\n# Rows\n"
    )
    return repository


def test_a_hub_repository_s_layout_is_read_by_split(hub_layout):
    assert fields(tables(place(hub_layout))) == ROWS[:2]
    assert fields(tables(place(hub_layout, split="test"))) == ROWS[2:]
    assert "datasets cannot read this folder" in refused(hub_layout, split="nothing")


def test_a_hub_id_is_asked_for_with_subset_split_and_revision(monkeypatch):
    import datasets

    asked = {}

    def load_dataset(path, name, *, split, revision):
        asked.update(path=path, name=name, split=split, revision=revision)
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert fields(tables(place("org/rows-v1.5", subset="en", split="train_sft", revision="abc"))) == ROWS
    assert asked == {"path": "org/rows-v1.5", "name": "en", "split": "train_sft", "revision": "abc"}


def test_a_hub_that_cannot_be_reached_is_said_plainly(monkeypatch):
    import datasets

    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'org/rows' on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    said = refused("org/rows")
    assert "data.sources.mine.path=org/rows" in said
    assert "not from the hub: Couldn't reach 'org/rows' on the Hub" in said
    assert "more" not in said


def test_a_missing_file_never_becomes_a_hub_call(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("asked the hub"))
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    assert "did you mean  rows.jsonl ?" in refused("row.jsonl")
    assert f"did you mean  {tmp_path / 'rows.jsonl'} ?" in refused(tmp_path / "rowz.jsonl")
    assert "no such file or folder" in refused("./data")
    assert "no such file or folder" in refused("a/b/c")
    assert "does not exist either" in refused(tmp_path / "deep" / "rows.jsonl")


def test_a_file_of_a_type_that_is_not_read(tmp_path):
    (tmp_path / "x.xlsx").write_bytes(b"")
    said = refused(tmp_path / "x.xlsx")
    assert "cannot read files of type .xlsx" in said
    assert ".jsonl" in said


def test_builtin_playground_rows_have_a_train_and_a_test_side():
    train = fields(tables(place("builtin:playground/instruct")))
    test = fields(tables(place("builtin:playground/instruct", split="test")))
    assert train
    assert test
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    assert "builtin:playground/instruct" in refused("builtin:playground/nothing")
    assert "no split dev" in refused("builtin:playground/instruct", split="dev")
    assert "no such builtin data" in refused("builtin:sandbox")


def test_jsonl_and_csv_need_neither_datasets_nor_pyarrow(tmp_path):
    import subprocess

    write_jsonl(tmp_path / "x.jsonl", ROWS)
    (tmp_path / "y.csv").write_text("prompt,completion\nq,a\n")
    code = (
        "import sys; from uft.config.schema import data_settings; from uft.data.sources import load_sources; "
        f"s = {{'a': {{'path': {str(tmp_path / 'x.jsonl')!r}}}, 'b': {{'path': {str(tmp_path / 'y.csv')!r}}}}}; "
        "assert len(load_sources(data_settings({'sources': s}))) == 2; "
        "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


@pytest.mark.parametrize("packing", ["gz", "bz2", "zst"])
@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_compressed_files_are_read_as_what_they_hold(tmp_path, packing, form):
    import pyarrow

    text = {"jsonl": '{"a": "x"}\n{"a": "y"}\n', "csv": "a\nx\ny\n"}[form]
    file = tmp_path / f"rows.{form}.{packing}"
    with pyarrow.output_stream(str(file), compression="detect") as out:
        out.write(text.encode())
    assert [record for _, record in reader_of(file)(file)] == [{"a": "x"}, {"a": "y"}]


def test_a_header_among_the_rows_and_another_encoding_are_told(tmp_path):
    file = tmp_path / "x.csv"
    file.write_text("prompt,completion\nq,a\nprompt,completion\nr,b\n")
    found = list(tables(place(file))[0])
    assert [one if isinstance(one, str) else one["prompt"] for _, one in found] == ["q", "is the header once more", "r"]
    file.write_text('prompt,completion\n"a \\"b\\"",c\nq,a\n"r,b\n')
    assert list(tables(place(file))[0]) == [
        (2, "broken CSV: text follows the quotation mark that closes a cell; a mark within a cell is written twice"),
        (3, {"prompt": "q", "completion": "a"}),
        (4, "broken CSV: the quotation mark that opens a cell is never closed"),
    ]
    file.write_bytes("prompt,completion\nq,a\n".encode("utf-16"))
    assert list(tables(place(file))[0]) == [(1, "the file is UTF-16; save it as UTF-8")]


@pytest.mark.parametrize("ours", ["rows_train", "TrainingSet", "rows"])
@pytest.mark.parametrize(
    "other", ["rows_test", "rows-dev", "rows.eval", "rows_validation-0", "TestSet", "rows heldout"]
)
def test_a_split_may_be_a_word_of_a_file_s_name(tmp_path, ours, other):
    write_jsonl(tmp_path / f"{ours}.jsonl", ROWS[:1])
    write_jsonl(tmp_path / f"{other}.jsonl", ROWS[1:])
    found, left_out = open_place(place(tmp_path))
    assert (fields(found), left_out) == (ROWS[:1], [f"{other}.jsonl"])
    (tmp_path / "more").mkdir()
    write_jsonl(tmp_path / "more" / "unit_test.jsonl", ROWS)
    assert fields(tables(place(tmp_path / "more"))) == ROWS, "a name alone tells nothing apart"


def test_hidden_and_empty_files_of_a_folder_are_told(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "README.md").write_text("# Ours")
    for name in (".a.jsonl", "._a.jsonl", ".DS_Store", "b.jsonl"):
        (tmp_path / name).write_bytes(b"" if name == "b.jsonl" else b"\x00")
    found, left_out = open_place(place(tmp_path))
    assert (fields(found), left_out) == (ROWS, ["._a.jsonl", ".a.jsonl", "README.md", "b.jsonl"])
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / ".a.jsonl").write_text("{}")
    with pytest.raises(UftError, match=r"holds hidden files alone, which are not read: \.a\.jsonl"):
        open_place(place(tmp_path / "hidden"))
