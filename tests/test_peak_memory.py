"""Peak memory: what is taken is seen, and what a run before took in the same process is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from recbole_hatllm import measurement, peak_memory, run
from recbole_hatllm.peak_memory import PeakMemory

CPU = torch.device("cpu")
MB = 10**6

pytestmark = pytest.mark.skipif(
    PeakMemory(CPU).note() is None, reason="the kernel does not let a process reset its peak"
)


def hog(megabytes: int) -> None:
    torch.ones(megabytes * MB // 4).sum()


def test_a_peak_is_seen_after_it_is_gone_and_not_by_the_next():
    first = PeakMemory(CPU)
    start = first.note()
    hog(400)
    assert 380 * MB < first.note() - start < 460 * MB
    second = PeakMemory(CPU)
    assert abs(second.note() - start) < 60 * MB
    hog(100)
    assert 80 * MB < second.note() - start < 160 * MB


def test_what_comes_between_note_and_begin_is_left_out():
    peak = PeakMemory(CPU)
    hog(100)
    before = peak.note()
    hog(500)
    peak.begin()
    assert peak.note() == before


def test_two_runs_in_one_process(tiny, tmp_path, monkeypatch):
    """The first takes 600 MB more, in its test; the second stands in `result.json` with what it would take alone."""
    measured, sizes = measurement.measure, iter([0, 600, 0])

    def measure(*arguments):
        hog(next(sizes))
        return measured(*arguments)

    monkeypatch.setattr(measurement, "measure", measure)
    keys = {"data_path": tiny["data_path"], "show_progress": False}
    results = [run("Pop", "tiny", config_dict={**keys, "run_dir": str(tmp_path / str(n))}) for n in range(3)]
    quiet, loud, after = (result["peak_memory"] for result in results)
    assert loud - quiet > 500 * MB and abs(after - quiet) < 100 * MB
    assert json.loads((Path(results[1]["folder"]) / "result.json").read_text())["peak_memory"] == loud
    assert f"peak memory {loud / 1e9:.1f} GB" in (tmp_path / "1" / "README.md").read_text() or loud < 1e9


def test_a_parent_counts_for_itself(tiny, tmp_path, monkeypatch):
    measured, sizes = measurement.measure, iter([600, 0])

    def measure(*arguments):
        hog(next(sizes))
        return measured(*arguments)

    monkeypatch.setattr(measurement, "measure", measure)
    keys = {key: tiny[key] for key in tiny if key not in ("n_in", "n_cr")}
    child = run("E4SRec", "tiny", config_dict={**keys, "sasrec_keys": {"epochs": 1}})
    parent = json.loads((Path(child["parents"][0]["folder"]) / "result.json").read_text())
    assert parent["peak_memory"] - child["peak_memory"] > 400 * MB


def test_where_the_kernel_does_not_tell_nothing_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(peak_memory, "_PROCESS", tmp_path / "none")
    peak = PeakMemory(CPU)
    peak.begin()
    assert peak.note() is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_it_is_what_tensors_took():
    device = torch.device("cuda")
    held = torch.ones(10 * MB, device=device)
    peak = PeakMemory(device)
    torch.ones(25 * MB, device=device).sum()
    assert 140 * MB <= peak.note() < 160 * MB and len(held)
    assert PeakMemory(device).note() < 60 * MB
