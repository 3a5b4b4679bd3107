"""The command line: `python run_hatllm.py` and `recbole-hatllm` are this.

run_hatllm.py --model=HatLLM --dataset=ml-100k [--key=value ...] [--config_files=a.yaml,b.yaml]
run_hatllm.py --resume=FOLDER
run_hatllm.py recommend --run=FOLDER --history="Toy Story;Heat" [--k=10] [--items=FILE.item]
run_hatllm.py evaluate --run=FOLDER [--mask_history=true] [--key=value ...]
run_hatllm.py search --model=SASRec --dataset=ml-100k [--space=FILE] [--trials=N] [--key=value ...]
run_hatllm.py compare --models=HatLLM,SASRec --dataset=ml-100k --seeds=0,1,2 [--key=value ...]
run_hatllm.py compare --suite=FILE_OR_NAME [--key=value ...]
run_hatllm.py prepare NAME [--from=DIR_OR_FILES]
run_hatllm.py memory --model=HatLLM --dataset=ml-100k [--items=N --tokens=N] [--key=value ...]
run_hatllm.py analyze prompt|heatmap|attention|errors [--run=FOLDER] [--against=FOLDER] [--user=ID] [--key=value ...]
run_hatllm.py analyze sensitivity --suite=NAME [--metric=NAME] [--key=value ...]
run_hatllm.py demo
run_hatllm.py doctor
"""

from __future__ import annotations

import sys

from recbole_hatllm import schema
from recbole_hatllm.errors import ConfigError, HatError

USAGE = """\
recbole_hatllm: LLM-based sequential recommenders as RecBole models

usage:
  run_hatllm.py --model=NAME --dataset=NAME [--key=value ...]   train, evaluate, leave a run folder
  run_hatllm.py --resume=FOLDER                                 go on with a run that was stopped
  run_hatllm.py recommend --run=FOLDER --history="TITLE;TITLE"  titles (or ids) in, titles out [--k=10]
      [--items=FILE.item]                                        out of these items alone, which training need not have seen
  run_hatllm.py evaluate --run=FOLDER                           a finished run measured again: [--mask_history=true] [--topk=5,10]
      [--eval_sample=N] [--metrics=...] [--folder=FOLDER]        all, warm, cold and same-day targets; nothing is trained
  run_hatllm.py search --model=NAME --dataset=NAME              the best keys on validation; stopped, it goes on by itself
      [--space=FILE.yaml or .hyper] [--trials=N] [--sampler=grid|random|tpe] [--pruner=none|median|halving]
      [--study=FOLDER] [--storage=URL or FILE] [--key=value ...]   its figures: which keys matter, and where they are good
  run_hatllm.py compare --models=NAME,NAME --dataset=NAME --seeds=0,1,2    one table with intervals and tests, floors below;
      or --suite=FILE or NAME                                   stopped, it goes on by itself; leaves a page with figures
      [--method=NAME] [--floors=false] [--folder=FOLDER] [--key=value ...]
  run_hatllm.py prepare NAME [--key=value ...]                  makes dataset/NAME from raw files; --list shows all names
  run_hatllm.py memory --model=NAME --dataset=NAME              the memory that this run would need, before anything is downloaded
      [--items=N] [--tokens=N] [--key=value ...]                 items and tokens a prompt, where the dataset is not here
  run_hatllm.py analyze prompt --dataset=NAME --user=ID         what an LLM reads of a user, token by token, and its masks
      [--model=NAME] [--key=value ...]                           [--folder=FOLDER]: where any analysis leaves figures and numbers
  run_hatllm.py analyze heatmap --run=FOLDER --user=ID          masks and attention weights of one prompt
      [--layer=N,N or all] [--head=N]
  run_hatllm.py analyze attention --run=FOLDER                  attention within items and across, before and after fine-tuning
      [--against=FOLDER] [--rows=N]
  run_hatllm.py analyze errors --run=FOLDER --against=FOLDER    where two runs disagree, by group and row by row
      [--top=N] [--metric=NAME]
  run_hatllm.py analyze sensitivity --suite=FILE or NAME        a metric over the keys in which the runs of a suite differ, such as
      [--metric=NAME] [--key=value ...]                          figure5; the keys that it was compared with
  run_hatllm.py demo [--key=value ...]                          HatLLM beside what counting reaches, on MovieLens-100K
  run_hatllm.py doctor                                          versions, machine, known defects and their mending

  --config_files=a.yaml,b.yaml   YAML files with keys, before the keys of the command line
  -h, --help                     this text; with a command, the same

prepare takes --from=FOLDER or FILE,FILE (files that are here already), --source=NAME, --mirror=URL (an address that has
the files), --k_core=5, --data_path=dataset/, --force=true (replace the folder); for tables of your own --inter=FILE,
--items=FILE and --columns="user=...,item=...,time=...,title=..." with the names of their columns.

Models of this package: {models}. RecBole's own sequential and general models run beside them: SASRec, GRU4Rec,
BERT4Rec, BPR, NeuMF, Pop, ... RecBole's own keys are taken too.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 2 for bad input (one sentence on stderr), 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or {"-h", "--help"} & set(argv):
        print(help_text())
        return 0
    name = argv[0] if not argv[0].startswith("-") else "run"
    try:
        if name not in COMMANDS:
            raise ConfigError(f"There is no command {name!r}: the commands are {', '.join(COMMANDS)}.")
        return COMMANDS[name](argv[argv[0] == name :]) or 0
    except HatError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def help_text() -> str:
    """Usage, and every key of properties/ with its meaning, type, default and range."""
    from recbole_hatllm.registry import own_models

    files = [schema.PROPERTIES / "overall.yaml", schema.PROPERTIES / "llm.yaml"]
    files += sorted((schema.PROPERTIES / "model").glob("*.yaml"))
    return USAGE.format(models=", ".join(own_models())) + "\n" + schema.help_text(schema.keys_of(*files))


def _run(argv: list[str]) -> None:
    from recbole_hatllm.config import parse_overrides

    keys = parse_overrides(argv)
    if "resume" in keys:
        from recbole_hatllm.quick_start import resume
        from recbole_hatllm.run_folder import metric_row, read_result

        folder = str(_take(keys, "resume", required=True))
        _nothing_left(keys, "resume")
        if finished := read_result(folder):
            print(f"{folder} is finished; test: {metric_row(finished['test'])}")
        else:
            resume(folder)
        return
    from recbole_hatllm.quick_start import run

    files = [file for file in str(_take(keys, "config_files", default="")).split(",") if file]
    run(_take(keys, "model", required=True), _take(keys, "dataset", required=True), files, keys)


def _recommend(argv: list[str]) -> None:
    from recbole_hatllm.config import parse_overrides

    keys = parse_overrides(argv)
    folder, history = _take(keys, "run", required=True), str(_take(keys, "history", required=True))
    k, items = _take(keys, "k", default=10), _take(keys, "items")
    _nothing_left(keys, "recommend")
    if not isinstance(k, int):
        raise ConfigError(f"k is {k!r}, and must be a whole number.")
    from recbole_hatllm.recommend import listing, load

    trained = load(folder)
    if items is not None:
        trained.offer(str(items))
    print(listing(trained.recommend([item for item in history.split(";") if item.strip()], k)))


def _evaluate(argv: list[str]) -> None:
    from recbole_hatllm.config import parse_overrides
    from recbole_hatllm.measurement import evaluate, summary

    keys = parse_overrides(argv)
    folder, out = _take(keys, "run", required=True), _take(keys, "folder")
    result = evaluate(str(folder), keys, out)
    print(f"{summary(result)}\nfigures and ranks: {result['folder']}")


def _search(argv: list[str]) -> None:
    from recbole_hatllm.config import parse_overrides
    from recbole_hatllm.search import search

    keys = parse_overrides(argv)
    model, dataset = _take(keys, "model", required=True), _take(keys, "dataset", required=True)
    files = [file for file in str(_take(keys, "config_files", default="")).split(",") if file]
    options = {name: _take(keys, name) for name in ("space", "trials", "sampler", "study", "storage", "pruner")}
    search(model, dataset, config_file_list=files, config_dict=keys, **options)


def _compare(argv: list[str]) -> None:
    from recbole_hatllm.compare import compare
    from recbole_hatllm.config import parse_overrides
    from recbole_hatllm.suite import arguments

    compare(**arguments(parse_overrides(argv)))


def _prepare(argv: list[str]) -> None:
    from recbole_hatllm.config import parse_overrides
    from recbole_hatllm.prepare import listing, run

    names = [argument for argument in argv if not argument.startswith("-")]
    keys = parse_overrides(argument for argument in argv if argument.startswith("-") and argument != "--list")
    root = str(_take(keys, "data_path", default="dataset"))
    if "--list" in argv:
        _nothing_left({**keys, **dict.fromkeys(names)}, "prepare --list")
        print(listing(root))
        return
    if len(names) != 1:
        raise ConfigError(f"prepare takes the name of one dataset, and {len(names)} are given: see prepare --list.")
    run(names[0], root, keys)


def _memory(argv: list[str]) -> None:
    from recbole_hatllm.config import parse_overrides
    from recbole_hatllm.memory_report import report

    keys = parse_overrides(argv)
    model, dataset = _take(keys, "model", required=True), _take(keys, "dataset", required=True)
    files = [file for file in str(_take(keys, "config_files", default="")).split(",") if file]
    print(report(model, dataset, files, keys, _take(keys, "items"), _take(keys, "tokens")))


def _analyze(argv: list[str]) -> None:
    from recbole_hatllm.analysis.command import analyze
    from recbole_hatllm.config import parse_overrides

    names = [argument for argument in argv if not argument.startswith("-")]
    print(analyze(names, parse_overrides(argument for argument in argv if argument.startswith("-"))))


def _demo(argv: list[str]) -> None:
    from recbole_hatllm.config import parse_overrides
    from recbole_hatllm.demo import demo

    demo(parse_overrides(argv))


def _doctor(argv: list[str]) -> None:
    _nothing_left(dict.fromkeys(argv), "doctor")
    from recbole_hatllm.doctor import report

    print(report())


def _take(keys: dict, name: str, default=None, required: bool = False):
    if required and keys.get(name) in (None, ""):
        raise ConfigError(f"--{name}=... is missing: see run_hatllm.py --help.")
    return keys.pop(name, default)


def _nothing_left(keys: dict, command: str) -> None:
    if keys:
        raise ConfigError(f"{command} does not take {', '.join(map(str, keys))}: see run_hatllm.py --help.")


COMMANDS = {
    "run": _run,
    "recommend": _recommend,
    "prepare": _prepare,
    "evaluate": _evaluate,
    "search": _search,
    "compare": _compare,
    "memory": _memory,
    "analyze": _analyze,
    "demo": _demo,
    "doctor": _doctor,
}
