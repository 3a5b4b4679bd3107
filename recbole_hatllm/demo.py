"""The first thing a newcomer runs: HatLLM on MovieLens-100K beside Pop and beside itself untrained."""

from __future__ import annotations

from recbole_hatllm import distributed, registry, run_folder, schema
from recbole_hatllm.config import Config
from recbole_hatllm.errors import ConfigError
from recbole_hatllm.quick_start import run
from recbole_hatllm.recommend import listing, load

UNTRAINED = {"train_steps": 0, "head_init": "random", "readout_norm": "none"}
RECIPE = schema.PROPERTIES / "recipe" / "small.yaml"


def demo(overrides: dict) -> dict[str, dict]:
    """Runs the three, prints one table of their test metrics and five recommendations for one user.

    Args:
        overrides: keys for the two HatLLM runs, over `properties/recipe/small.yaml`.

    Returns:
        the three results by name.
    """
    distributed.alone("demo")
    if "run_dir" in overrides:
        raise ConfigError(
            "demo makes three runs, each with a folder of its own: name the folder above them by runs_dir."
        )
    dataset = overrides.pop("dataset", "ml-100k")
    protocol = {key: overrides[key] for key in schema.keys_of(schema.PROPERTIES / "overall.yaml") if key in overrides}
    protocol.pop("train_steps", None)
    results = {
        "Pop": run("Pop", dataset, config_dict=protocol),
        "HatLLM, untrained": run("HatLLM", dataset, [str(RECIPE)], {**overrides, **UNTRAINED}),
        "HatLLM": run("HatLLM", dataset, [str(RECIPE)], overrides),
    }
    print("\n" + table(results) + "\n")
    trained = load(results["HatLLM"]["folder"])
    history = _last_history(trained)
    print("One user of the test set last watched:")
    for item in history:
        print(f"     {trained.items.titles[trained.find(item)]}")
    print("HatLLM recommends:")
    print(listing(trained.recommend(history, 5)))
    print(f"\nThe run is kept in {trained.folder}; ask it for more:")
    print(f'  python run_hatllm.py recommend --run={trained.folder} --history="Toy Story;Heat;GoldenEye" --k=10')
    return results


def table(results: dict[str, dict]) -> str:
    """Test metrics of several results side by side, one line each, for the terminal."""
    names = list(next(iter(results.values()))["test"])
    rows = [["test", *map(run_folder.metric_name, names)]]
    rows += [[label, *(f"{result['test'][name]:.4f}" for name in names)] for label, result in results.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    )


def _last_history(trained) -> list[str]:
    """Item ids of the first test user's history."""
    config: Config = trained.config
    test = registry.data_loaders(config, registry.create_dataset(config))[2].dataset
    row = test.inter_feat[0]
    sequence = row[config["ITEM_ID_FIELD"] + config["LIST_SUFFIX"]][: int(row[config["ITEM_LIST_LENGTH_FIELD"]])]
    return [trained.items.item_tokens[i] for i in sequence.tolist()]
