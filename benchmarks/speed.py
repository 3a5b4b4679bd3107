"""Items taught and users ranked in a second, against the straightforward way; the table of docs/performance.md.

    python benchmarks/speed.py [--dataset=ml-100k] [--data_path=dataset/] [--layers=6] [--rows=16] [--rounds=5] [--threads=1]

The straightforward way is what the papers' repositories do: transformers' own causal attention over padded rows in random
order, one item taught a row, strings through the tokenizer in each batch, LoRA as PEFT makes it. It has no special masks;
ours has HatLLM's. Ways take turns, step by step, in one process. With one thread the process's own time is counted, so that
other work on the machine does not matter.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoTokenizer

from recbole_hatllm import registry
from recbole_hatllm.config import Config
from recbole_hatllm.files import cache_folder
from recbole_hatllm.model.llm import torch_dtype
from recbole_hatllm.pretrained import locate


class Straightforward:
    """A HF decoder with LoRA that reads prompts as strings and scores all items by a linear head."""

    def __init__(self, config, titles: list[str], text: tuple[str, str]):
        self.device, self.titles, self.text = config["device"], titles, text
        dtype = torch_dtype(config["dtype"], self.device)
        folder, _ = locate(config["backbone"], dtype, cache_folder())
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        cut = AutoConfig.from_pretrained(folder)
        cut.num_hidden_layers = config["backbone_layers"]
        model = AutoModel.from_pretrained(folder, config=cut, dtype=dtype)
        rank, alpha, dropout = (config[f"lora_{name}"] for name in ("r", "alpha", "dropout"))
        lora = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=["q_proj", "v_proj"])
        self.model = get_peft_model(model, lora).to(self.device)
        self.head = torch.nn.Linear(model.config.hidden_size, len(titles)).to(self.device)

    def read(self, rows) -> torch.Tensor:
        """[B, d], hidden states at the last token of each prompt."""
        prompts = [
            f'{self.text[0]} "' + '", "'.join(self.titles[item] for item in items[:length]) + f'"{self.text[1]}'
            for items, length in zip(rows["item_id_list"].tolist(), rows["item_length"].tolist())
        ]
        batch = self.tokenizer(prompts, return_tensors="pt", padding=True).to(self.device)
        return self.model(**batch).last_hidden_state[:, -1].float()

    def calculate_loss(self, rows) -> torch.Tensor:
        """Scalar."""
        return F.cross_entropy(self.head(self.read(rows)), rows["item_id"].to(self.device))

    def full_sort_predict(self, rows) -> torch.Tensor:
        """[B, n_items]."""
        return self.head(self.read(rows))

    def train(self, mode: bool = True) -> None:
        self.model.train(mode)

    def zero_grad(self, set_to_none: bool) -> None:
        for part in (self.model, self.head):
            part.zero_grad(set_to_none=set_to_none)


def main() -> None:
    """Measures and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="ml-100k")
    parser.add_argument("--data_path", default="dataset/")
    for name, default in (("layers", 6), ("rows", 16), ("rounds", 5), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 and not torch.cuda.is_available() else time.perf_counter

    models, data = {}, {}
    for targets in ("last", "all"):
        keys = {
            "data_path": options.data_path,
            "backbone_layers": options.layers,
            "n_in": 2,
            "n_cr": 1,
            "targets": targets,
        }
        config = Config("HatLLM", options.dataset, config_dict=keys)
        train, _, test = registry.data_loaders(config, dataset := registry.create_dataset(config))
        data[targets], held_out = train.dataset.inter_feat, test.dataset.inter_feat
        models[targets] = registry.model_class("HatLLM")(config, train.dataset).to(config["device"])
    plain = Straightforward(config, dataset.titles, models["last"].prompts.text)

    draw = torch.Generator().manual_seed(0)
    batches = {
        targets: [rows[torch.randperm(len(rows), generator=draw)[: options.rows]] for _ in range(options.rounds + 1)]
        for targets, rows in data.items()
    }
    ranked = [
        held_out[torch.randperm(len(held_out), generator=draw)[: 8 * options.rows]] for _ in range(options.rounds + 1)
    ]

    def seconds_of(call, *arguments) -> float:
        began = clock()
        call(*arguments)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return clock() - began

    def step(model, rows):
        model.train(True)
        model.calculate_loss(rows).backward()
        model.zero_grad(set_to_none=True)

    def rank(model, parts):
        model.train(False)
        with torch.no_grad():
            for part in parts:
                model.full_sort_predict(part)

    layouts = {"padded rows": False, "token pool": True}
    taught: dict[str, list[float]] = {}
    users: dict[str, list[float]] = {}
    for turn in range(options.rounds + 1):
        rows, many = batches["last"][turn], ranked[turn]
        parts = [many[start : start + options.rows] for start in range(0, len(many), options.rows)]
        rates = {"straightforward": len(rows) / seconds_of(step, plain, rows)}
        speeds = {"straightforward": len(many) / seconds_of(rank, plain, parts)}
        for targets, model in models.items():
            rows = batches[targets][turn].to(config["device"])
            for layout, pool in layouts.items():
                model.config["token_pool"], model.config["micro_batch_size"] = pool, options.rows
                name = f"{'one item' if targets == 'last' else 'all items'} of a row, {layout}"
                rates[name] = model.targets_in(rows) / seconds_of(step, model, rows)
                if targets == "last":
                    speeds[f"sorted by length, {layout}"] = len(many) / seconds_of(
                        rank, model, [many.to(config["device"])]
                    )
        if turn:  # the first one warms up
            for found, kept in ((rates, taught), (speeds, users)):
                for name, value in found.items():
                    kept.setdefault(name, []).append(value)

    what = f"{config['backbone']}, {options.layers} layers, {plain.model.dtype}, {config['device']}, {options.threads} threads"
    print(f"{options.dataset}, {what}, {options.rows} rows a step, torch {torch.__version__}\n")
    for title, found in (("training: items taught/s", taught), ("full ranking: users/s", users)):
        print(f"| {title} | | times the straightforward way |\n|---|---|---|")
        for name, values in found.items():
            faster = statistics.median(a / b for a, b in zip(values, found["straightforward"]))
            print(f"| {name} | {statistics.median(values):.2f} | {faster:.2f} |")
        print()


if __name__ == "__main__":
    main()
