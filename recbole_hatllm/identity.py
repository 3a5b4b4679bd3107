"""What a run is: the hash of its config, of its data's content and of the code that makes it. Equal runs are made once."""

from __future__ import annotations

import ast
import hashlib
import json
from functools import cache
from pathlib import Path

from recbole_hatllm import lineage, registry, run_folder
from recbole_hatllm.config import Config
from recbole_hatllm.data.prepare import prepare_missing
from recbole_hatllm.files import sha256
from recbole_hatllm.space import PLACE

_PACKAGE = Path(__file__).parent
_NOT_THE_RUN = {*PLACE, "run_dir", "data_path", "checkpoint_dir"}


def digest(config: Config, data: str) -> str:
    """Twelve hexadecimal digits; `data` is what `data_digest` found.

    Paths, devices and progress bars do not count. Of the code, what `quick_start` imports, the model's own file, and the
    versions of the packages that decide a result do; and so do the runs that this one needs first.
    """
    parents = lineage.parents(config)
    keys = {key: value for key, value in config.resolved().items() if key not in _NOT_THE_RUN}
    keys |= {parent.given: None for parent in parents}  # a path
    code = _code(registry.model_class(config["model"]).__module__)
    made_of = [_parent_digest(parent, config, data) for parent in parents]
    text = json.dumps([keys, data, code, made_of, run_folder.versions()], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _parent_digest(parent: lineage.Parent, config: Config, data: str) -> str:
    if parent.folder is None:
        return digest(lineage.config_of(parent, config), data)
    file = lineage.weights_file(Path(parent.folder))
    return sha256(file) if file.is_file() else str(parent.folder)


def data_digest(config: Config) -> str:
    """The SHA-256 of the names and contents of the dataset's atomic files, which are made first where they are missing.

    Raises:
        DataError: they cannot be made, or there are none.
    """
    folder, name = Path(config["data_path"]), config["dataset"]
    if not folder.is_dir():
        prepare_missing(name, folder, config["show_progress"])
    found = hashlib.sha256()
    for file in sorted(folder.glob(f"{name}.*")):
        found.update(f"{file.name} {sha256(file)}\n".encode())
    return found.hexdigest()


@cache
def _code(model: str) -> str:
    """The SHA-256 of the sources of a run; of modules outside of this package their versions stand for them."""
    todo, sources = [f"{__package__}.quick_start", f"{__package__}.data.dataset", model], {}
    while todo:
        name = todo.pop()
        file = _file(name)
        if file and name not in sources:
            sources[name] = file.read_text(encoding="utf-8")
            for node in ast.walk(ast.parse(sources[name])):
                if isinstance(node, ast.ImportFrom):
                    todo += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                elif isinstance(node, ast.Import):
                    todo += [alias.name for alias in node.names]
    return hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest()


def _file(module: str | None) -> Path | None:
    """The source of a module of this package."""
    package, *parts = (module or "").split(".")
    base = _PACKAGE.joinpath(*parts)
    found = (base / "__init__.py", base.with_suffix(".py")) if package == _PACKAGE.name else ()
    return next((file for file in found if file.is_file()), None)
