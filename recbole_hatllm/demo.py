"""The first thing a newcomer runs: HatLLM on MovieLens-100K beside models that only count and beside itself untrained."""

from __future__ import annotations

from recbole_hatllm import distributed, registry, run_folder, schema
from recbole_hatllm.config import Config
from recbole_hatllm.errors import ConfigError
from recbole_hatllm.quick_start import run
from recbole_hatllm.recommend import listing, load

# The weights that `search` chooses on validation on MovieLens-100K, history masked (docs/results.md).
FLOORS: dict[str, dict] = {
    "Pop": {},
    "MarkovChain": {"history_decay": 0.8, "popularity_weight": 0.0},
    "TitleTFIDF": {"history_decay": 0.9, "min_df": 1},
    "TitleMarkov": {"title_weight": 0.03, "history_decay": 0.8, "min_df": 1},
}
UNTRAINED = {"train_steps": 0, "head_init": "random", "readout_norm": "none"}
RECIPE = schema.PROPERTIES / "recipe" / "ml-100k.yaml"


def demo(overrides: dict) -> dict[str, dict]:
    """Runs them all, prints one table of their test metrics and five recommendations for one user.

    Args:
        overrides: keys for the two HatLLM runs, over `properties/recipe/ml-100k.yaml`.

    Returns:
        the results by name.
    """
    distributed.alone("demo")
    if "run_dir" in overrides:
        raise ConfigError(
            "demo makes several runs, each with a folder of its own: name the folder above them by runs_dir."
        )
    dataset = overrides.pop("dataset", "ml-100k")
    overrides = {"mask_history": True, **overrides}  # nobody rates a film twice
    protocol = {key: overrides[key] for key in schema.keys_of(schema.PROPERTIES / "overall.yaml") if key in overrides}
    protocol.pop("train_steps", None)
    results = {
        **{name: run(name, dataset, config_dict={**protocol, **keys}) for name, keys in FLOORS.items()},
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
    masked = next(iter(results.values()))["history_masked"]
    rows = [[f"test, {run_folder.history_word(masked)}", *map(run_folder.metric_name, names)]]
    rows += [[label, *(f"{result['test'][name]:.4f}" for name in names)] for label, result in results.items()]
    return run_folder.aligned(rows)


def _last_history(trained) -> list[str]:
    """Item ids of the first test user's history."""
    config: Config = trained.config
    test = registry.data_loaders(config, registry.create_dataset(config))[2].dataset
    row = test.inter_feat[0]
    sequence = row[config["ITEM_ID_FIELD"] + config["LIST_SUFFIX"]][: int(row[config["ITEM_LIST_LENGTH_FIELD"]])]
    return [trained.items.item_tokens[i] for i in sequence.tolist()]
