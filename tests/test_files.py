"""Folders that several processes ask for at once."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from recbole_hatllm.errors import DataError
from recbole_hatllm.files import claim


def test_no_two_get_the_same_folder(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: claim(tmp_path / "runs" / "HatLLM-ml-100k"), range(32)))
    assert {folder.name for folder in folders} == {"HatLLM-ml-100k", *(f"HatLLM-ml-100k-{n}" for n in range(1, 32))}
    assert all(folder.is_dir() for folder in folders)


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(DataError, match=r"runs/SASRec could not be written.*name another folder"):
        claim(tmp_path / "runs" / "SASRec")
