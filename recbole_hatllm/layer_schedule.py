"""The schedule of masks that the keys of HatLLM ask for, in HatLLM itself and as a plug-in of others."""

from recbole_hatllm.errors import ConfigError
from recbole_hatllm.masks import schedule


def hatllm_kinds(config, n_layers: int) -> tuple[str, ...]:
    """The mask kind of each layer by `n_in`, `n_cr`, `order`, `order_sizes`, `cross_mask` and `cr_query_scope`.

    Raises:
        ConfigError: they do not fit so many layers.
    """
    cross_mask = "cr_all" if config["cr_query_scope"] == "all" else config["cross_mask"]
    try:
        return schedule(n_layers, config["n_in"], config["n_cr"], config["order"], cross_mask, config["order_sizes"])
    except ValueError as error:
        raise ConfigError(str(error)) from error


def plug_in_kinds(config, n_layers: int) -> tuple[str, ...]:
    """HatLLM's schedule with `hatllm_masks`, else plain causal attention."""
    return hatllm_kinds(config, n_layers) if config["hatllm_masks"] else ("or",) * n_layers
