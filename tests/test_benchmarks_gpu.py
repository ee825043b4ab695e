"""The benchmark for GPUs runs, on any machine, at the size of a smoke test."""

import json

import pytest

from benchmarks import gpu


def test_smoke(tmp_path, capsys):
    file = tmp_path / "gpu.json"
    gpu.main(["--smoke", "--repeats", "1", "--json", str(file)])
    report = json.loads(file.read_text())
    rows = report["rows"]
    assert report["skipped"] == []
    checks = [row for row in rows if "check" in row]
    assert checks
    assert all(row["right"] for row in checks)
    for pass_name in ("forward", "dx", "dw"):
        assert any(row.get("pass") == pass_name and row["us"] > 0 for row in rows)
    assert [row["form"] for row in rows if "step" in row] == ["conv f32"]
    assert f"{len(rows)} rows, 0 wrong, 0 failed" in capsys.readouterr().out


def test_what_fails_is_a_row_and_what_does_not_fit_is_listed(tmp_path, capsys):
    report = gpu.Report(str(tmp_path / "gpu.json"), seconds=60)

    def broken():
        yield {"shape": "a", "pass": "dx", "form": "xla", "us": 1.0}
        raise RuntimeError("no kernel image\nand more")

    report.run("a", broken)
    report.deadline = 0
    report.run("b", broken)
    report.finish()
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert [row.get("error") for row in written["rows"]] == [None, "RuntimeError: no kernel image"]
    assert written["skipped"] == ["b"]
    assert "1 failed" in capsys.readouterr().out


def test_share_of_the_limit():
    words = {"device": "H100", "multiprocessors": "132 multiprocessors", "clock": "1980 MHz"}
    terms = gpu._instructions_per_second(words) / gpu.INSTRUCTIONS["float32"]
    assert terms == pytest.approx(16.7e12, 0.01)
    assert gpu._instructions_per_second({"device": "cpu"}) is None


def test_unknown_folder(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--smoke", "--json", str(tmp_path / "none" / "gpu.json")])
    assert "there is no folder" in capsys.readouterr().err
