"""Conversion of BLIP's caption lists to TSV: bytes of 2023, columns, malformed records, memory, complete files."""

import csv
import json
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest

from minigpt4.common.lock import locked
from minigpt4.datasets.convert import convert, main, written_whole
from tests.golden import GOLDEN

ROOT = Path(__file__).resolve().parents[2]
SETS = {
    "convert_laion": "laion_synthetic_filtered_large",
    "convert_cc_sbu": "ccs_synthetic_filtered_large",
}
# records whose keys are in another order than those of the first one
SWAPPED = {"convert_laion": [5], "convert_cc_sbu": [3, 4]}


def write_json(path, records):
    path.write_text(records if isinstance(records, str) else json.dumps(records), encoding="utf-8")
    return path


def entries(number):
    return [{"url": f"http://a.example/{i}.jpg", "caption": f"caption {i}"} for i in range(number)]


def read_tsv(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file, delimiter="\t"))


def run_main(folder, *arguments):
    return main("list", ["--input", str(folder / "list.json"), *arguments])


@pytest.mark.parametrize("script", SETS)
@pytest.mark.parametrize("folder", [".", "dataset"])
def test_the_scripts_write_the_bytes_of_2023(script, folder, tmp_path):
    """Run without arguments, on files of the default names; records that 2023 wrote with swapped columns are left out."""
    source = GOLDEN / "g_text" / script / f"{SETS[script]}.json"
    expected = source.with_suffix(".tsv").read_bytes()
    records = json.loads(source.read_text(encoding="utf-8"))
    regular = [record for number, record in enumerate(records) if number not in SWAPPED[script]]
    program = "dataset/" * (folder == ".") + f"{script}.py"
    write_json(tmp_path / source.name, json.dumps(regular, ensure_ascii=False))
    command = [sys.executable, str((ROOT / folder / program).resolve())]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"{len(regular)} rows" in result.stdout
    lines = expected.decode().split("\r\n")
    assert (
        len(lines) == len(records) + 2
    )  # the header, and the empty text after the last line's end
    lines = [line for number, line in enumerate(lines, start=-1) if number not in SWAPPED[script]]
    assert (tmp_path / f"{SETS[script]}.tsv").read_bytes() == "\r\n".join(lines).encode()


@pytest.mark.parametrize("script", SETS)
def test_columns_are_aligned_by_name(script, tmp_path):
    source = GOLDEN / "g_text" / script / f"{SETS[script]}.json"
    convert(source, tmp_path / "out.tsv")
    header, *rows = read_tsv(tmp_path / "out.tsv")
    for record, row in zip(json.loads(source.read_text(encoding="utf-8")), rows, strict=True):
        assert dict(zip(header, row, strict=True)) == {name: record[name] or "" for name in header}


def test_values_that_are_not_text_are_written_as_in_2023(tmp_path):
    record = {
        "url": "u",
        "caption": "c",
        "big": 2**70,
        "half": 0.50,
        "large": 1e30,
        "yes": True,
        "none": None,
    }
    convert(write_json(tmp_path / "list.json", [record]), tmp_path / "out.tsv")
    with open(tmp_path / "2023.tsv", "w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows(
            [record, json.loads(json.dumps(record)).values()]
        )
    assert (tmp_path / "out.tsv").read_bytes() == (tmp_path / "2023.tsv").read_bytes()


def test_malformed_records_are_left_out_counted_and_reported(tmp_path, capsys):
    bad = [
        7,
        ["u", "c"],
        {"caption": "c"},
        {"url": "u"},
        {"url": "  ", "caption": "c"},
        {"url": 3, "caption": "c"},
    ]
    bad += [{"url": "u", "caption": 5}, {"url": "u", "caption": "c", "size": [1, 2]}]
    odd = [
        {"url": "v", "caption": None},
        {"url": "w", "caption": "c", "id": 1},
        {"url": "x", "caption": "a\nb"},
    ]
    write_json(tmp_path / "list.json", [*bad, *entries(400), *odd])
    assert run_main(tmp_path) == 0
    report = capsys.readouterr().out
    assert (
        "list.tsv: 403 rows of url, caption; 411 records read" in report
        and "left out: 8 records" in report
    )
    for line in (
        "1  not an object but int (first: record 1)",
        "1  not an object but list (first: record 2)",
        "1  no 'url' (first: record 3)",
        "1  no 'caption' (first: record 4)",
        "2  'url' is empty or no text (first: record 5)",
        "1  'caption' is no text (first: record 7)",
        "1  'size' is a list or an object (first: record 8)",
        "1  empty caption (first: record 409)",
        "1  'id' is no column of the first record: left out (first: record 410)",
        "1  line break in a value (first: record 411)",
    ):
        assert line in report
    assert read_tsv(tmp_path / "list.tsv")[-1] == ["x", "a\nb"]
    assert run_main(tmp_path, "--one-line") == 0
    assert read_tsv(tmp_path / "list.tsv")[-1] == ["x", "a b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            entries(3)[:2] * 40 + [{}] * 20,
            "20.0% of 100 records cannot be used (limit 5.0%, --max-bad-fraction)",
        ),
        ([{"url": "u"}], "none of 1 records can be used"),
        ([], "none of 0 records can be used"),
        ('{"annotations": []}', "begins with b'{'; expected '['"),
        ("", "begins with b''; expected '['"),
        (json.dumps(entries(30))[:-9], "is no valid JSON behind record 29"),
        (json.dumps(entries(30)) + "]", "is no valid JSON behind record 30"),
    ],
    ids=[
        "too many bad",
        "none usable",
        "empty list",
        "object",
        "empty file",
        "cut off",
        "trailing text",
    ],
)
def test_an_unusable_list_leaves_the_existing_output_unchanged(content, message, tmp_path, capsys):
    write_json(tmp_path / "list.json", content)
    (tmp_path / "list.tsv").write_text("from before")
    assert run_main(tmp_path) == 1
    assert message in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"list.json", "list.tsv"}
    assert (tmp_path / "list.tsv").read_text() == "from before"


def test_a_byte_order_mark_is_skipped(tmp_path):
    (tmp_path / "list.json").write_text(json.dumps(entries(3)), encoding="utf-8-sig")
    assert run_main(tmp_path) == 0
    assert len(read_tsv(tmp_path / "list.tsv")) == 4


def test_an_interrupted_file_is_removed(tmp_path):
    with pytest.raises(KeyboardInterrupt), written_whole(tmp_path / "list.tsv") as file:
        file.write("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_second_converter_on_the_same_output_is_rejected(tmp_path, capsys):
    write_json(tmp_path / "list.json", entries(3))
    with locked(tmp_path / "list.tsv"):
        assert run_main(tmp_path) == 1
    assert f"error: '{tmp_path}/list.tsv' is being written by process " in capsys.readouterr().err
    assert run_main(tmp_path) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["list.json", "list.tsv"]


def test_limit_takes_the_first_records_or_with_a_seed_a_random_sample(tmp_path):
    source, out = write_json(tmp_path / "list.json", entries(1000)), tmp_path / "out.tsv"
    drawn = {}
    for seed in (None, 1, 1, 2):
        assert convert(source, out, limit=200, sample_seed=seed).written == 200
        numbers = [int(caption.split()[1]) for _, caption in read_tsv(out)[1:]]
        assert numbers == sorted(set(numbers)) and drawn.get(seed, numbers) == numbers
        drawn[seed] = numbers
    assert drawn[None] == list(range(200)) and drawn[1] != drawn[2]
    # of each hundred, 20 of the 200 are expected, with a standard deviation of 3.8 (no replacement); 19 is five of them
    for seed in (1, 2):
        parts = Counter(number // 100 for number in drawn[seed])
        assert all(abs(parts[part] - 20) < 19 for part in range(10))
    assert convert(source, out, limit=2000, sample_seed=1).written == 1000


@pytest.mark.parametrize(
    "arguments",
    [["--sample-seed", "1"], ["--limit", "0"], ["--limit", "few"]],
    ids=lambda arguments: " ".join(arguments),
)
def test_invalid_arguments_are_rejected(arguments, tmp_path):
    write_json(tmp_path / "list.json", entries(3))
    with pytest.raises(SystemExit) as stopped:
        run_main(tmp_path, *arguments)
    assert stopped.value.code == 2


def test_the_input_is_never_overwritten_and_must_exist(tmp_path, capsys):
    source = write_json(tmp_path / "list.json", entries(3))
    assert run_main(tmp_path, "--output", str(source)) == 1
    assert "is the input itself" in capsys.readouterr().err and json.loads(
        source.read_text()
    ) == entries(3)
    assert main("list", ["--input", str(tmp_path / "no.json")]) == 1
    assert "no file at" in capsys.readouterr().err


@pytest.mark.parametrize("sampling", [{}, {"limit": 500, "sample_seed": 1}], ids=["all", "sample"])
def test_memory_does_not_grow_with_the_list(sampling, tmp_path):
    """The peak of Python's allocations does not depend on the number of records. Measured: 0.68 MB for both."""
    peaks = []
    for number in (1000, 2000, 20000):  # the first run also allocates what is kept afterwards
        source = write_json(tmp_path / "list.json", entries(number))
        tracemalloc.start()
        convert(source, tmp_path / "out.tsv", **sampling)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.2 * peaks[1]
