"""The measurements run, print their tables, and give what does not depend on timing."""

import json
import subprocess
import sys

import pytest

from benchmarks import harness, suites
from benchmarks.__main__ import main
from minigpt4.models.llm import backends, lean


def rows_of(path):
    """Return {name: row} of a result file."""
    return {row["name"]: row for row in json.loads(path.read_text())["rows"]}


@pytest.mark.slow
def test_load(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "load", "--size", "vit-slice", "--rounds", "1"]
    command += ["--folder", str(tmp_path), "--json", str(tmp_path / "load.json")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = json.loads((tmp_path / "load.json").read_text())
    assert "equal tensors: yes" in result.stdout
    assert set(figures["builds"]) == {"2023", "ours", "ours, every byte read"}
    memory = rows_of(tmp_path / "load.json")["ViT of 4 blocks: private memory"]
    # four blocks in float32 are 400 MiB; ours holds norms and module objects only, measured: 1.6 MiB
    assert memory["2023"][0] > 400
    assert memory["ratio"] > 50


@pytest.mark.slow
def test_chat(tmp_path, capsys):
    """At toy size: all ways give equal answers (it exits otherwise), and the table has every row."""
    assert main(["chat", "--quick", "--json", str(tmp_path / "chat.json")]) == 0
    rows, shown = rows_of(tmp_path / "chat.json"), capsys.readouterr().out
    assert "equal answers: yes" in shown
    second, fifth = (
        f"chat: first token of turn {turn}, {n} positions before"
        for turn, n in ((2, 257), (5, 773))
    )
    assert set(rows) == {second, fifth, "chat: tokens a second"} and all(
        name in shown for name in rows
    )
    assert rows["chat: tokens a second"]["stock"]
    # 23 positions against 277 and 793, attention among them: even two thin layers show it; measured 1.8 and 10
    assert rows[fifth]["ratio"] > rows[second]["ratio"] > 1


def test_serve(tmp_path):
    """At toy size: batches give the same answers as one by one (it exits otherwise); no time is judged."""
    assert main(["serve", "--quick", "--rounds", "1", "--json", str(tmp_path / "serve.json")]) == 0
    (row,) = rows_of(tmp_path / "serve.json").values()
    assert row["ours"] and row["2023"] and row["ratio"] > 0


@pytest.mark.slow
def test_train(tmp_path, capsys):
    """At toy size: parity is checked first, every way has its row."""
    words = ["train", "--size", "tiny", "--ladder", "--rounds", "1", "--device", "cpu"]
    assert main([*words, "--json", str(tmp_path / "train.json")]) == 0
    figures = json.loads((tmp_path / "train.json").read_text())
    rows = rows_of(tmp_path / "train.json")
    for stage in ("1", "2"):
        assert set(figures["errors"][stage]) == {"2023", "transformers", "padded", "packed", "lean"}
        for way in (", padded", ", packed", ""):
            row = rows.pop(f"stage {stage}: step, tiny fp32{way}")
            assert row["ours"] and row["2023"] and row["stock"] and row["limit"]
    assert not rows and capsys.readouterr().out.count("of limit") == 1


@pytest.mark.parametrize("part", ["vit", "qformer", "llm"])
def test_parts(part, tmp_path, capsys):
    path = tmp_path / "part.json"
    arguments = [
        "--size",
        "tiny",
        "--batch",
        "2",
        "--rounds",
        "1",
        "--device",
        "cpu",
        "--dtype",
        "fp32",
    ]
    assert main([part, *arguments, "--json", str(path)]) == 0
    figures = json.loads(path.read_text())
    ways = {"2023", "ours"} if part == "qformer" else {"2023", "transformers", "ours"}
    (row,) = figures["rows"]
    assert set(figures["errors"]) == ways
    assert (
        row["ours"]
        and row["2023"]
        and row["limit"]
        and bool(row["stock"]) == ("transformers" in ways)
    )
    assert all(errors["fp32"] <= 5e-6 < errors["half"] for errors in figures["errors"].values())
    assert "better than 2023" in capsys.readouterr().out


def test_no_speed_of_a_part_without_parity(capsys, monkeypatch):
    monkeypatch.setattr(
        backends,
        "PACKED",
        {**backends.PACKED, "lean": lambda *args: 1.01 * lean.label_logits(*args)},
    )
    assert main(["llm", "--size", "tiny", "--batch", "2", "--device", "cpu"]) == 1
    shown = capsys.readouterr().out
    assert "FAIL: the errors are too large" in shown and " [" not in shown


def test_no_speed_without_parity(capsys, monkeypatch):
    """One of our ways computes something else: `train` says so and shows no seconds."""
    monkeypatch.setattr(
        backends,
        "PACKED",
        {**backends.PACKED, "lean": lambda *args: 1.01 * lean.label_logits(*args)},
    )
    assert main(["train", "--size", "tiny", "--stage", "1", "--batch", "2", "--device", "cpu"]) == 1
    shown = capsys.readouterr().out
    assert "FAIL: the errors are too large" in shown and "stage 1: step" not in shown


def test_parity(capsys):
    assert main(["parity", "--size", "tiny", "--device", "cpu", "--quantised"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("lean") == 2
    errors = [float(line.split()[-2]) for line in shown.splitlines() if "int8" in line]
    # of the gradient, at both stages; measured: 0.0103 and 0.0149
    assert len(errors) == 2 and min(errors) > 0.002 and max(errors) < 0.03


def test_data(tmp_path, capsys):
    """At small size: both ways give equal tensors (it exits otherwise), and ours sends a quarter of the bytes."""
    assert main(["data", "--quick", "--json", str(tmp_path / "data.json")]) == 0
    rows, shown = rows_of(tmp_path / "data.json"), capsys.readouterr().out
    assert shown.count("equal tensors: yes") == 2 and "not judged (--quick)" in shown
    for name in (f"data: images of {size}, a core" for size in ("256x256", "500x375")):
        tensors, everything = (
            rows[f"{name}: bytes sent each, {kind}"] for kind in ("tensors", "all")
        )
        assert (tensors["2023"], tensors["ours"]) == ([4 * 3 * 224 * 224], [3 * 224 * 224])
        assert everything["ratio"] > 3.9  # texts, identities and the normalisation are sent too
        assert len(rows[name]["ours"]) == len(rows[name]["2023"]) == 2


def test_limits(tmp_path):
    """Each product has the error of its dtype, and the limits that follow for training are there."""
    path = tmp_path / "limits.json"
    assert main(["limits", "--quick", "--device", "cpu", "--rounds", "1", "--json", str(path)]) == 0
    figures = json.loads(path.read_text())
    # sums are in float32 and rounded at the end; measured: 2.1e-7, 1.7e-3, 2.1e-4
    for dtype, limit in {"fp32": 1e-6, "bf16": 4e-3, "fp16": 5e-4}.items():
        assert 0 < figures["errors"][dtype] < limit
    assert {"limit of tiny, stage 1: samples", "limit of tiny, stage 2: samples"} <= set(
        rows_of(path)
    )


def test_compare(tmp_path, capsys):
    """Ratio of medians and its standard error, against values by hand; equal counts and rows of one file are left out."""
    first = [
        harness.row("step", "s", [1.0, 2.0, 3.0]),
        harness.row("count", "", [7]),
        harness.row("old", "", [1]),
    ]
    second = [
        harness.row("step", "s", [4.0, 4.0, 4.0]),
        harness.row("count", "", [7]),
        harness.row("new", "", [1]),
    ]
    first.append(harness.row("way", "s", [5.0], [2.0]))
    second.append(harness.row("way", "s", [5.0], [3.0]))
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, rows, cores in zip(paths, (first, second), (1, 2), strict=True):
        path.write_text(json.dumps({"rows": rows, "machine": {"cores": cores}}))
    assert main(["compare", *map(str, paths), "--json", str(tmp_path / "c.json")]) == 0
    lines = json.loads((tmp_path / "c.json").read_text())["compared"]
    assert [(line["name"], line["ratio"], line["apart"]) for line in lines] == [
        ("step, ours", 2.0, False),  # 2 +- 2 * (1 / sqrt(3)) / 2 = 0.58
        ("way, 2023", 1.5, True),
    ]
    assert lines[0]["error"] == pytest.approx(3**-0.5)
    assert "another machine" in capsys.readouterr().out


def test_commands_that_have_moved_name_the_new_one(capsys):
    with pytest.raises(SystemExit) as error:
        main(["faults", "--write", "docs/reliability.md"])
    assert error.value.code == 2 and "pytest tests/survival -m survival" in capsys.readouterr().err


def test_a_row():
    ours, old = [2.0, 4.0], [6.0, 16.0]
    found = harness.row("step", "s", ours, old, at_least=3.0)
    assert (found["ratio"], found["error"], found["passed"]) == (3.5, pytest.approx(0.5), True)
    assert not harness.row("step", "s", ours, old, at_least=3.6)["passed"]
    assert harness.row("speed", "1/s", old, ours, more_is_better=True)["ratio"] == 3.5
    assert not harness.row("error", "", ours, at_most=3.9)["passed"]


def test_all(tmp_path, monkeypatch, capsys):
    """Rows and gates of all parts are put together; each part has a test of its own above."""
    small = ["--size", "tiny", "--device", "cpu"]
    startup = ["--size", "tiny", "--rounds", "1"]
    monkeypatch.setattr(suites, "PARTS", {"parity": (small, []), "startup": (startup, [])})
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # of the files that the parts write
    main(["all", "--quick", "--json", str(tmp_path / "all.json")])
    rows = rows_of(tmp_path / "all.json")
    phases = [name for name in rows if name.startswith("start, tiny: ")]
    assert len(rows) == 6 + len(phases) + 1 and len(phases) > 3
    row = rows["start to the end of the first step, tiny"]
    assert row["ours"][0] > 0 and row["ratio"] > 0
    assert "stage 2" in capsys.readouterr().out
