"""The report comes out on any machine and tells found from mended."""

import re

import pytest
import torch

from recbole_hatllm import compat, doctor


def test_the_report_names_versions_machine_and_every_defect():
    text = doctor.report()
    for name in ("python", "torch", "numpy", "pandas", "recbole", "transformers", "peft", "accelerate", "scipy"):
        assert re.search(rf"^  {name} +\S", text, flags=re.MULTILINE), name
    assert f"{torch.__version__}" in text and re.search(r"memory +\d+\.\d GiB", text) and re.search(r"cores +\d", text)
    for defect in compat.DEFECTS:
        assert re.search(rf"^  {re.escape(defect.name)} +found: (yes|no) +mended: yes", text, flags=re.MULTILINE), (
            defect.name
        )
    assert "unknown" not in text


@pytest.mark.parametrize(
    "installed, found",
    [
        ("4.52.4", {"one way of masks"}),
        ("4.53.0", {"Gemma-2 soft cap"}),
        ("5.17.1", {"Gemma-2 soft cap"}),
        ("5.18.0", set()),
        ("5.23.0.dev0", set()),
        ("not installed", set()),
    ],
)
def test_defects_of_transformers_by_version(installed, found, monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda package: installed)
    monkeypatch.setattr(doctor, "_file", lambda quantizer: False)
    text = doctor.report().split("Known defects of transformers")[1]
    assert {known.name for known in doctor.TRANSFORMERS if re.search(f"{known.name} +found: yes", text)} == found


def test_a_broken_installation_still_gets_a_report(monkeypatch):
    def fail():
        raise ImportError("no such file")

    broken = compat.Defect("something", "what it does", fail, fail)
    monkeypatch.setattr(compat, "DEFECTS", (broken,))
    monkeypatch.setattr(doctor, "version", lambda package: (_ for _ in ()).throw(doctor.PackageNotFoundError(package)))
    text = doctor.report()
    assert "unknown (ImportError: no such file)" in text and "not installed" in text


def test_gpus_are_listed(monkeypatch):
    class Gpu:
        name, total_memory, major = "Some GPU", 24 * 2**30, 8

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Gpu)
    assert re.search(r"GPU 1 +Some GPU, 24 GiB, bf16 yes", doctor.report())
