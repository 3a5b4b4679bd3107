"""The five analyses by name, and which options each takes."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from recbole_hatllm import distributed
from recbole_hatllm.errors import ConfigError, nearest


def analyze(names: Sequence[str], keys: dict[str, Any]) -> str:
    """Makes one analysis, and returns what the terminal is to show.

    Args:
        names: the words of the command line, of which there must be one: prompt, heatmap, attention, errors or
            sensitivity.
        keys: its options; `prompt` takes the keys of a run as well, and `sensitivity` those of a comparison.

    Raises:
        ConfigError: no such analysis, an option that it does not take, or one that is missing.
    """
    # matplotlib is loaded only where a figure is asked for
    from recbole_hatllm.analysis import attention, errors, heatmap, prompt, sensitivity

    modules = (prompt, heatmap, attention, errors, sensitivity)
    known = {module.__name__.rpartition(".")[2]: module.run for module in modules}
    if len(names) != 1 or names[0] not in known:
        given = " ".join(names) or "nothing"
        raise ConfigError(f"analyze takes one of {', '.join(known)}, and {given} is given: see run_hatllm.py --help.")
    distributed.alone("analyze")
    (name,) = names
    options = inspect.signature(known[name]).parameters
    if "keys" in options:
        own = {key: value for key, value in keys.items() if key in options}
        own["keys"] = {key: value for key, value in keys.items() if key not in options}
    else:
        own = keys
        if unknown := next((key for key in keys if key not in options), None):
            raise ConfigError(f"analyze {name} does not take {unknown}{nearest(unknown, options)}")
    for option, about in options.items():
        if about.default is about.empty and own.get(option) in (None, ""):
            raise ConfigError(f"--{option}=... is missing: see run_hatllm.py --help.")
    return known[name](**own)
