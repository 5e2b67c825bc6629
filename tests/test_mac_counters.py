"""Tests of benchmarks/mac_counters.py: its arithmetic, what its rows hold, the --smoke run."""

import json
import sys

import pytest

from benchmarks import mac_counters


def test_arithmetic_of_the_cases_agrees_with_both_counters_that_are_always_there():
    names = [name for name, case in mac_counters.cases().items() if case[3] == "arithmetic"]
    chosen = {"mac_hooks": mac_counters.mac_hooks}
    chosen["FlopCounterMode"] = mac_counters.flop_counter_mode
    rows = mac_counters.figures(names, chosen)
    ours = [row for row in rows if row["counter"] == "mac_hooks"]
    assert len(ours) >= 6
    assert {row["macs"] - row["macs_expected"] for row in ours} == {0}
    convolution = rows[names.index("transposed convolution 64->32, 4x4, stride 2") + 1]
    assert (convolution["counter"], convolution["difference_percent"]) == ("FlopCounterMode", 0)


def test_a_counter_that_fails_or_errs_is_recorded_not_raised():
    def fails(model, size):
        raise KeyError("no such layer")

    def doubles(model, size):
        return 2 * mac_counters.mac_hooks(model, size)

    name = "GRU 128->256, 50 steps"
    failed, wrong = mac_counters.figures([name], {"fails": fails, "doubles": doubles})
    assert (failed["macs"], failed["error"]) == (None, "KeyError: 'no such layer'")
    assert (wrong["error"], wrong["difference_percent"]) == (None, pytest.approx(100))


def test_smoke_run_writes_times_and_figures(workdir, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mac_counters.py", "--smoke"])
    monkeypatch.setattr(mac_counters, "PEERS", ())
    mac_counters.main()
    result = json.loads((workdir / "results/smoke/mac_counters.json").read_text())
    rows = {(row["device"], row["counter"]): row for row in result["speed"]}
    for device in ("cpu", "meta"):
        assert rows[device, "FlopCounterMode"]["ratio_to_flop_counter_mode"] == 1
        assert rows[device, "mac_hooks"]["cpu_ms"] > 0
    assert all(row["macs"] is not None or row["error"] for row in result["figures"])
    assert "wrote" in capsys.readouterr().out
