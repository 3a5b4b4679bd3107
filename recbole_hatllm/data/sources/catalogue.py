"""The datasets that are known by name: where their raw files are, in which format, and what the paper says of them.

amazon-<category>-<year>   every category of the releases of 2014, 2018 and 2023
amazon-<category>          the release that the paper uses, or the first one that has the category
ml-1m, ml-100k             MovieLens; RecBole brings ml-100k along
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from recbole_hatllm.errors import ConfigError, nearest

BUNDLED = "ml-100k"  # its atomic files are in RecBole's wheel


@dataclass(frozen=True)
class File:
    """One raw file: its addresses in the order in which they are tried; bytes and sha256 where they are published."""

    urls: tuple[str, ...]
    size: int | None = None
    sha256: str | None = None

    @property
    def name(self) -> str:
        """What the file is called on disk and on a mirror."""
        return self.urls[0].rsplit("/", 1)[1]


@dataclass(frozen=True)
class Source:
    """One place that has a dataset.

    Args:
        name: what `--source=` takes. format: a key of `readers.READERS`. files: by role: `inter`, `items`, or
        `archive` for a zip with both. licence: what its publisher says of its use.
    """

    name: str
    format: str
    files: dict[str, File]
    licence: str


@dataclass(frozen=True)
class Dataset:
    """A dataset and its sources, the first of which is tried first.

    Args:
        year: of the release. k_core: users and items with fewer interactions are dropped. paper: the row of the
        paper's Table 2: users, items, interactions, density (share, not per cent). note: what to know before use.
    """

    name: str
    year: int
    sources: tuple[Source, ...]
    k_core: int = 5
    paper: dict[str, float] | None = None
    note: str = ""

    def source(self, name: str) -> Source:
        """The source of that name.

        Raises:
            ConfigError: there is none.
        """
        for source in self.sources:
            if source.name == name:
                return source
        known = ", ".join(source.name for source in self.sources)
        raise ConfigError(f"{self.name} has no source {name!r}: choose one of {known}.")

    def on_mirror(self, base: str) -> Dataset:
        """The same dataset with its files at `base`/<file name> and nowhere else."""
        sources = []
        for source in self.sources:
            files = {
                role: replace(file, urls=(f"{base.rstrip('/')}/{file.name}",)) for role, file in source.files.items()
            }
            sources.append(replace(source, files=files))
        return replace(self, sources=tuple(sources))


def find(name: str) -> Dataset:
    """The dataset of that name.

    Raises:
        ConfigError: the name is unknown (the nearest ones are named).
    """
    if name not in _all():
        raise ConfigError(
            f"There is no dataset {name!r} to prepare{nearest(name, _all())} `prepare --list` shows all, and data of "
            "your own is prepared with --inter=FILE and --items=FILE."
        )
    return _all()[name]


def names() -> list[str]:
    """The names of all datasets; the paper's three first."""
    return list(_all())


def stem(name: str) -> str:
    """The name without the year of its release: what `properties/dataset/` has one file for."""
    head, _, year = name.rpartition("-")
    return head if head and len(year) == 4 and year.isdigit() else name


@cache
def _all() -> dict[str, Dataset]:
    amazon = {dataset.name: dataset for dataset in _amazon_releases()}
    plain: dict[str, Dataset] = {}
    for dataset in amazon.values():
        plain.setdefault(stem(dataset.name), dataset)
    plain["amazon-games"] = amazon["amazon-games-2018"]
    plain = {name: replace(dataset, name=name, paper=PAPER.get(name)) for name, dataset in plain.items()}
    first = {name: plain[name] for name in PAPER}
    return {**first, BUNDLED: _ml_100k(), "ml-1m": _ml_1m(), **plain, **amazon}


# --- Table 2 of the paper (arXiv 2510.10955)

PAPER = {
    "amazon-games": {"users": 54_955, "items": 17_250, "interactions": 416_813, "density": 0.000440},
    "amazon-beauty": {"users": 22_332, "items": 12_086, "interactions": 198_215, "density": 0.000734},
    "amazon-clothing": {"users": 39_230, "items": 22_948, "interactions": 277_534, "density": 0.000308},
}

# --- Amazon

# What a category is called here, and in the file names of each release that has it.
CATEGORIES: dict[str, dict[int, str]] = {
    "all-beauty": {2018: "All_Beauty", 2023: "All_Beauty"},
    "appliances": {2018: "Appliances", 2023: "Appliances"},
    "apps": {2014: "Apps_for_Android"},
    "arts": {2018: "Arts_Crafts_and_Sewing", 2023: "Arts_Crafts_and_Sewing"},
    "automotive": dict.fromkeys((2014, 2018, 2023), "Automotive"),
    "baby": {2014: "Baby", 2023: "Baby_Products"},
    "beauty": {2014: "Beauty", 2023: "Beauty_and_Personal_Care"},
    "books": dict.fromkeys((2014, 2018, 2023), "Books"),
    "boxes": {2023: "Subscription_Boxes"},
    "cds": dict.fromkeys((2014, 2018, 2023), "CDs_and_Vinyl"),
    "clothing": dict.fromkeys((2014, 2018, 2023), "Clothing_Shoes_and_Jewelry"),
    "electronics": dict.fromkeys((2014, 2018, 2023), "Electronics"),
    "fashion": {2018: "AMAZON_FASHION", 2023: "Amazon_Fashion"},
    "games": dict.fromkeys((2014, 2018, 2023), "Video_Games"),
    "garden": dict.fromkeys((2014, 2018, 2023), "Patio_Lawn_and_Garden"),
    "gift-cards": {2018: "Gift_Cards", 2023: "Gift_Cards"},
    "grocery": dict.fromkeys((2014, 2018, 2023), "Grocery_and_Gourmet_Food"),
    "handmade": {2023: "Handmade_Products"},
    "health": {2014: "Health_and_Personal_Care", 2023: "Health_and_Personal_Care"},
    "home": dict.fromkeys((2014, 2018, 2023), "Home_and_Kitchen"),
    "household": {2023: "Health_and_Household"},
    "instruments": dict.fromkeys((2014, 2018, 2023), "Musical_Instruments"),
    "kindle": dict.fromkeys((2014, 2018, 2023), "Kindle_Store"),
    "luxury-beauty": {2018: "Luxury_Beauty"},
    "magazines": {2018: "Magazine_Subscriptions", 2023: "Magazine_Subscriptions"},
    "movies": dict.fromkeys((2014, 2018, 2023), "Movies_and_TV"),
    "music": dict.fromkeys((2014, 2018, 2023), "Digital_Music"),
    "office": dict.fromkeys((2014, 2018, 2023), "Office_Products"),
    "pantry": {2018: "Prime_Pantry"},
    "pets": dict.fromkeys((2014, 2018, 2023), "Pet_Supplies"),
    "phones": dict.fromkeys((2014, 2018, 2023), "Cell_Phones_and_Accessories"),
    "scientific": {2018: "Industrial_and_Scientific", 2023: "Industrial_and_Scientific"},
    "software": {2018: "Software", 2023: "Software"},
    "sports": dict.fromkeys((2014, 2018, 2023), "Sports_and_Outdoors"),
    "tools": dict.fromkeys((2014, 2018, 2023), "Tools_and_Home_Improvement"),
    "toys": dict.fromkeys((2014, 2018, 2023), "Toys_and_Games"),
    "video": {2014: "Amazon_Instant_Video"},
}

_LAB = "https://mcauleylab.ucsd.edu/public_datasets/data"
_MCAULEY = "McAuley Lab, UC San Diego: no licence is stated; for research, cite the papers its page names"
_NOTES = {
    "amazon-games-2014": "its meta file has no titles: an LLM recommender needs amazon-games-2018 instead",
    "amazon-clothing-2018": "many titles hold pieces of web pages and are very long",
}

# All addresses stand in public documentation or code that uses them: the pages of the McAuley Lab and their mirrors,
# RecBole's own properties/dataset/url.yaml, and the file list of SeqRecBenchmark-Datasets.


def _amazon_releases() -> Iterator[Dataset]:
    for year, sources in ((2014, _amazon_2014), (2018, _amazon_2018), (2023, _amazon_2023)):
        for slug, files in CATEGORIES.items():
            if year in files:
                name = f"amazon-{slug}-{year}"
                yield Dataset(name, year, sources(files[year]), note=_NOTES.get(name, ""))


def _amazon_2014(category: str) -> tuple[Source, ...]:
    def file(name: str) -> File:
        return File((
            f"{_LAB}/amazon/categoryFiles/{name}",
            f"https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/{name}",
        ))  # fmt: skip

    meta = file(f"meta_{category}.json.gz")
    raw = Source("mcauley", "amazon2014", {"inter": file(f"reviews_{category}_5.json.gz"), "items": meta}, _MCAULEY)
    ratings = Source("ratings", "amazon-ratings", {"inter": file(f"ratings_{category}.csv"), "items": meta}, _MCAULEY)
    benchmark = _benchmark(2014, category)
    return (*benchmark, raw, ratings, _recbole(f"Amazon_ratings/Amazon_{category.removeprefix('Amazon_')}.zip"))


def _amazon_2018(category: str) -> tuple[Source, ...]:
    def file(name: str) -> File:
        return File((
            f"{_LAB}/amazon_v2/{name}",
            f"https://jmcauley.ucsd.edu/data/amazon_v2/{name}",
            f"https://datarepo.eng.ucsd.edu/mcauley_group/data/amazon_v2/{name}",
        ))  # fmt: skip

    files = {
        "inter": file(f"categoryFilesSmall/{category}_5.json.gz"),
        "items": file(f"metaFiles2/meta_{category}.json.gz"),
    }
    zipped = "Amazon_Fashion" if category == "AMAZON_FASHION" else f"Amazon_{category}"
    return (
        Source("mcauley", "amazon2018", files, _MCAULEY),
        *_benchmark(2018, category),
        _recbole(f"Amazon_ratings/Amazon2018/{zipped}.zip"),
    )


def _amazon_2023(category: str) -> tuple[Source, ...]:
    def files(base: str, ending: str) -> dict[str, File]:
        return {
            "inter": File((f"{base}/raw/review_categories/{category}{ending}",)),
            "items": File((f"{base}/raw/meta_categories/meta_{category}{ending}",)),
        }

    hub = "https://huggingface.co/datasets/McAuley-Lab/Amazon-Reviews-2023/resolve/main"
    zipped = category if category.startswith("Amazon_") else f"Amazon_{category}"
    return (
        Source("mcauley", "amazon2023", files(f"{_LAB}/amazon_2023", ".jsonl.gz"), _MCAULEY),
        Source("huggingface", "amazon2023", files(hub, ".jsonl"), _MCAULEY),
        _recbole(f"Amazon2023/{zipped}.zip"),
    )


_BENCHMARK = {
    (2014, "Beauty"): "amazon2014-beauty",
    (2014, "Clothing_Shoes_and_Jewelry"): "amazon2014-clothing",
    (2014, "Health_and_Personal_Care"): "amazon2014-health",
    (2014, "Toys_and_Games"): "amazon2014-toy",
    (2018, "Video_Games"): "amazon2018-game",
}


def _benchmark(year: int, category: str) -> tuple[Source, ...]:
    """SeqRecBenchmark-Datasets: 5-core already, a few MB; its Beauty and Clothing are the paper's to the digit."""
    if (year, category) not in _BENCHMARK:
        return ()
    raw = "https://raw.githubusercontent.com/Tiny-Snow/SeqRecBenchmark-Datasets"
    path = f"data/{_BENCHMARK[year, category]}/proc.zip"
    urls = (
        f"{raw}/323a11e8e90f26d2984b42bf51271601240d88ba/{path}",
        f"{raw}/main/{path}",
        f"https://media.githubusercontent.com/media/Tiny-Snow/SeqRecBenchmark-Datasets/main/{path}",
    )
    return (Source("benchmark", "seqrec", {"archive": File(urls)}, "MIT (the repository); reviews: McAuley Lab"),)


def _recbole(path: str) -> Source:
    url = f"https://recbole.s3-accelerate.amazonaws.com/ProcessedDatasets/{path}"
    return Source("recbole", "recbole", {"archive": File((url,))}, "as the data it was made from")


# --- MovieLens

_GROUPLENS = "GroupLens: research use; no redistribution and no commercial use without permission"


def _ml_1m() -> Dataset:
    archive = File(
        ("https://files.grouplens.org/datasets/movielens/ml-1m.zip",),
        size=5_917_549,
        sha256="a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",
    )
    sources = (
        Source("grouplens", "movielens", {"archive": archive}, _GROUPLENS),
        _recbole("MovieLens/ml-1m.zip"),
    )
    return Dataset("ml-1m", 2003, sources)


def _ml_100k() -> Dataset:
    return Dataset(BUNDLED, 1998, (), note="RecBole brings it along: nothing to prepare")
