"""What is known by name, without asking any server."""

import re
from collections import Counter
from urllib.parse import urlsplit

import pytest
import yaml

from recbole_hatllm import schema
from recbole_hatllm.config import Config
from recbole_hatllm.data.sources import catalogue
from recbole_hatllm.data.sources.readers import READERS
from recbole_hatllm.errors import ConfigError

NAMES = catalogue.names()


def test_the_papers_three_and_every_category_of_three_releases():
    assert NAMES[:4] == ["amazon-games", "amazon-beauty", "amazon-clothing", "ml-100k"]
    assert Counter(name[-4:] for name in NAMES if re.fullmatch(r"amazon-.*-\d{4}", name)) == {
        "2014": 24, "2018": 29, "2023": 33,
    }  # fmt: skip
    years = {name: catalogue.find(name).year for name in ("amazon-games", "amazon-beauty", "amazon-clothing")}
    assert years == {"amazon-games": 2018, "amazon-beauty": 2014, "amazon-clothing": 2014}
    assert [catalogue.find(f"amazon-{n}").year for n in ("toys", "books", "software", "boxes")] == [
        2014,
        2014,
        2018,
        2023,
    ]


def test_names_without_a_year_are_a_release():
    for name in NAMES:
        dataset = catalogue.find(name)
        if name.startswith("amazon-") and not name.endswith(str(dataset.year)):
            assert catalogue.find(f"{name}-{dataset.year}").sources == dataset.sources


@pytest.mark.parametrize("name", [name for name in NAMES if name != catalogue.BUNDLED])
def test_sources_name_readers_and_files(name):
    dataset = catalogue.find(name)
    assert dataset.name == name and len({source.name for source in dataset.sources}) == len(dataset.sources) >= 2
    for source in dataset.sources:
        assert source.format in READERS and source.licence
        assert set(source.files) in ({"archive"}, {"inter", "items"})
    for file in (file for source in dataset.sources for file in source.files.values()):
        assert all(urlsplit(url).scheme == "https" and url.endswith("/" + file.name) for url in file.urls)


def test_the_addresses_that_documentation_gives():
    def urls(name, source):
        return [url for file in catalogue.find(name).source(source).files.values() for url in file.urls]

    assert {
        "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/reviews_Beauty_5.json.gz",
        "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/meta_Beauty.json.gz",
    } <= {*urls("amazon-beauty", "mcauley")}
    assert {
        "https://jmcauley.ucsd.edu/data/amazon_v2/categoryFilesSmall/Video_Games_5.json.gz",
        "https://jmcauley.ucsd.edu/data/amazon_v2/metaFiles2/meta_Video_Games.json.gz",
    } <= {*urls("amazon-games", "mcauley")}
    lab = "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_2023/raw"
    assert urls("amazon-games-2023", "mcauley") == [
        f"{lab}/review_categories/Video_Games.jsonl.gz", f"{lab}/meta_categories/meta_Video_Games.jsonl.gz",
    ]  # fmt: skip
    assert (
        catalogue.find("amazon-beauty").sources[0].name
        == catalogue.find("amazon-clothing").sources[0].name
        == "benchmark"
    )


def test_recboles_zips_are_the_ones_that_recbole_knows():
    from importlib.util import find_spec
    from pathlib import Path

    file = Path(find_spec("recbole").origin).parent / "properties" / "dataset" / "url.yaml"
    known = set(yaml.safe_load(file.read_text()).values())
    ours = {
        catalogue.find(name).source("recbole").files["archive"].urls[0] for name in NAMES if name != catalogue.BUNDLED
    }
    assert len(ours) == 24 + 29 + 33 + 1 and ours <= known, ours - known


def test_a_mirror_replaces_all_addresses():
    mirrored = catalogue.find("amazon-games").on_mirror("http://here/data/")
    files = [file for source in mirrored.sources for file in source.files.values()]
    assert [file.urls for file in files][:2] == [
        ("http://here/data/Video_Games_5.json.gz",), ("http://here/data/meta_Video_Games.json.gz",),
    ]  # fmt: skip


def test_unknown_names_and_sources_name_the_nearest():
    with pytest.raises(ConfigError, match=r"'amazon-game'.*did you mean amazon-games.*--list.*--inter=FILE"):
        catalogue.find("amazon-game")
    with pytest.raises(ConfigError, match=r"no source 'snap': choose one of benchmark, mcauley, ratings, recbole\."):
        catalogue.find("amazon-beauty").source("snap")
    with pytest.raises(ConfigError, match=r"'amazon-game' in .*did you mean amazon-games"):
        Config("BPR", "amazon-game")


def test_the_papers_density_is_that_of_its_counts():
    for row in catalogue.PAPER.values():
        assert row["interactions"] / (row["users"] * row["items"]) == pytest.approx(row["density"], abs=6e-7)


@pytest.mark.parametrize("name", NAMES)
def test_every_dataset_has_words_for_the_prompt(name):
    words = yaml.safe_load((schema.PROPERTIES / "dataset" / f"{catalogue.stem(name)}.yaml").read_text())
    assert {"prompt_nouns", "prompt_noun", "prompt_verb"} <= words.keys()


def test_releases_share_the_words():
    for name in ("amazon-games", "amazon-games-2014", "amazon-games-2023"):
        config = Config("HatLLM", name)
        assert (config["prompt_nouns"], config["prompt_verb"]) == ("video games", "played")
    assert [catalogue.stem(name) for name in ("ml-1m", "amazon-gift-cards-2018", "2018", "x-20180")] == [
        "ml-1m", "amazon-gift-cards", "2018", "x-20180",
    ]  # fmt: skip
