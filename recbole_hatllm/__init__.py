"""HatLLM and the LLM recommenders it is compared with, as RecBole models under one protocol."""

from recbole_hatllm import compat

compat.mend()

__all__ = ["load", "resume", "run"]
__version__ = "0.1.0"


def __getattr__(name):
    # torch and RecBole load when they are needed: `--help` and errors in a config come at once.
    if name in ("run", "resume"):
        from recbole_hatllm import quick_start

        return getattr(quick_start, name)
    if name == "load":
        from recbole_hatllm.recommend import load

        return load
    raise AttributeError(f"module 'recbole_hatllm' has no attribute {name!r}")
