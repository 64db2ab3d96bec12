"""What steps of tokens are worth against steps of samples with as many tokens, on real sentences: padding, fill, speed.

    MMD2V_SHARED=… python benchmarks/data/token_batches.py            (QQP's questions; about a minute on two cores)
    python benchmarks/data/token_batches.py --texts my.txt --tokenizer tokenizer.json      (a text a line)

Both kinds of steps come from mmd2v's own loader over the same shards. Speed is tokens that are no padding a second of
forward and backward of a student (which packs, but whose attention pads where xformers is absent), and of the forward
of a Hugging Face encoder of the same size as a teacher (which pads everything). Steps of both kinds are measured in
turn, so that other work on the machine hits both alike.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

import mmd2v
from mmd2v.config.schema import Config, TokenizerConfig
from mmd2v.data.batch import Batch
from mmd2v.data.packing import Sample, write_shards
from mmd2v.data.stream import token_loader, train_loader
from mmd2v.data.token_batches import ShardLengths, TokenOrder
from mmd2v.data.token_lengths import open_texts, write_lengths
from mmd2v.data.tokenizers import Tokenizer, load_tokenizer
from mmd2v.errors import UserError
from mmd2v.files import write_json
from mmd2v.models.packed import Layout
from mmd2v.models.student import Student, build_student
from mmd2v.report.machine import processor
from mmd2v.train.run_dir import code_version


def main() -> int:
    """Measure and print a table."""
    args = _arguments()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        texts = _texts(args)
        _pack(texts, Path(folder) / "set", args.shard_size)
        config = _config(args, str(Path(folder) / "set"))
        assert config.data.tokenizer is not None
        started = time.perf_counter()
        report = write_lengths(str(Path(folder) / "set"), config.data.tokenizer, workers=args.workers)
        counting = time.perf_counter() - started
        tokenizer = load_tokenizer(config.data.tokenizer)
        order = _order(config, tokenizer)
        samples = max(1, round(order.texts / order.epoch_steps))
        print(f"{len(texts):,} texts; {report}")
        print(f"counting took {counting:.1f} s; an epoch: {order}; as many tokens in steps of {samples} samples\n")
        loaders = {
            "samples": _sample_steps(config, tokenizer, samples),
            "tokens": _token_steps(config, tokenizer, order),
        }
        rows = {name: _padding(loaders[name], order.epoch_steps, args.tokens) for name in loaders}
        rates = _rates(config, tokenizer, loaders, args.steps)
    for name, row in rows.items():
        row |= rates[name]
    _print(rows)
    if args.json:
        conditions = {"texts": len(texts), "batch_tokens": args.tokens, "width": args.width, "layers": args.layers}
        machine = {"processor": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        versions = {"mmd2v": mmd2v.__version__, "commit": code_version()}
        write_json(args.json, {"conditions": conditions | machine | versions, **rows})
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    shared = Path(os.environ.get("MMD2V_SHARED", "MMD2V_SHARED")) / "data"
    parser.add_argument("--texts", type=Path, default=shared / "qqp" / "quora-dev.csv", help="a text a line, or QQP")
    parser.add_argument("--tokenizer", type=Path, default=shared / "teachers" / "minilm_l6_v2", help="tokenizer.json")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a step")
    parser.add_argument("--max-length", type=int, default=64, help="tokens of a text, special ones included")
    parser.add_argument("--shard-size", type=int, default=1000, help="texts of a shard")
    parser.add_argument("--window", type=int, default=16, help="data.shuffle_shards")
    parser.add_argument("--width", type=int, default=192, help="width of both models")
    parser.add_argument("--layers", type=int, default=3, help="layers of both models")
    parser.add_argument("--steps", type=int, default=8, help="steps of each kind whose speed is measured")
    parser.add_argument("--workers", type=int, default=None, help="processes that count tokens")
    parser.add_argument("--json", type=Path, default=None, help="file for the numbers")
    args = parser.parse_args()
    for path in (args.texts, args.tokenizer):
        if not path.exists():
            parser.error(f"{path} does not exist; set MMD2V_SHARED, or give --texts and --tokenizer")
    return args


def _texts(args: argparse.Namespace) -> list[str]:
    """Different texts, in the order of the file."""
    with open(args.texts, encoding="utf-8", newline="") as handle:
        if args.texts.suffix == ".csv":  # QQP: id, hash, question, question, label
            rows = csv.reader(handle, delimiter="\t")
            next(rows)
            found = [text.strip() for row in rows for text in row[2:4]]
        else:
            found = [line.strip() for line in handle]
    return list(dict.fromkeys(text for text in found if text))


def _pack(texts: Sequence[str], out: Path, shard_size: int) -> None:
    samples = (Sample(f"text-{n:07d}", None, {"captions": [text]}) for n, text in enumerate(texts))
    write_shards(samples, out, total=len(texts), shard_size=shard_size, what="packing")


def _config(args: argparse.Namespace, shards: str) -> Config:
    tokenizer = TokenizerConfig(path=str(args.tokenizer), max_length=args.max_length)
    return Config.model_validate(
        {
            "name": "token-batches",
            "run_dir": "unused",
            "epochs": 1,
            "data": {
                "train": {"shards": shards},
                "tokenizer": tokenizer.model_dump(),
                "batch_tokens": args.tokens,
                "shuffle_shards": args.window,
                "workers": 0,
            },
            "model": {
                "width": args.width,
                "heads": max(1, args.width // 32),
                "encoders": {"text": {"kind": "tokens"}},
                "layers": [{"kind": "shared", "count": args.layers}],
            },
            "teachers": {"unused": {"name": "hf:unused", "modality": "text"}},
            "objectives": [{"kind": "cls_regression", "teacher": "unused", "modalities": ["text"]}],
        }
    )


def _order(config: Config, tokenizer: Tokenizer) -> TokenOrder:
    shards, files = open_texts(config.data, tokenizer)
    lengths = ShardLengths(files, shards.counts, tokenizer.specials, tokenizer.max_length)
    assert config.data.batch_tokens is not None
    window = config.data.shuffle_shards
    return TokenOrder(lengths.totals(), lengths, budget=config.data.batch_tokens, window=window, seed=config.seed)


Steps = Callable[[], Iterator[Batch]]


def _token_steps(config: Config, tokenizer: Tokenizer, order: TokenOrder) -> Steps:
    data, seed = config.data, config.seed
    return lambda: iter(token_loader(data, seed=seed, tokenizer=tokenizer, order=order, rank=0, world_size=1))


def _sample_steps(config: Config, tokenizer: Tokenizer, samples: int) -> Steps:
    data = config.data.model_copy(update={"batch_tokens": None})
    return lambda: iter(
        train_loader(
            data,
            seed=config.seed,
            tokenizer=tokenizer,
            rank=0,
            world_size=1,
            micro_batch_size=samples,
            images=False,
        )
    )


# ----------------------------------------------------------------------------------------- measuring


def _padding(steps: Steps, count: int, budget: int) -> dict[str, float]:
    """What an epoch's steps are, were they padded to their longest text."""
    tokens, slots = [], []
    for batch in itertools.islice(steps(), count):
        lengths_N = batch.text_lengths
        tokens.append(int(lengths_N.sum()))
        slots.append(len(lengths_N) * int(lengths_N.max()))
    return {
        "padding(%)": 100 * (1 - sum(tokens) / sum(slots)),
        "fill of the budget, mean(%)": 100 * statistics.mean(tokens) / budget,
        "fill of the budget, least(%)": 100 * min(tokens) / budget,
        "fill of the budget, most(%)": 100 * max(tokens) / budget,
    }


def _rates(config: Config, tokenizer: Tokenizer, steps: dict[str, Steps], count: int) -> dict[str, dict[str, float]]:
    """Tokens a second of the student's forward and backward and of the teacher's forward, of each kind of steps."""
    student = build_student(config, tokenizer).train()
    teacher = _teacher(config, tokenizer)
    batches = {name: list(itertools.islice(start(), count + 2)) for name, start in steps.items()}
    work = {"student, forward and backward(tokens/s)": lambda batch: _train(student, batch)}
    work["padding teacher, forward(tokens/s)"] = lambda batch: _teach(teacher, batch)
    rates: dict[str, dict[str, float]] = {name: {} for name in steps}
    for what, function in work.items():
        seconds = dict.fromkeys(steps, 0.0)
        for number in range(count + 2):
            for name in steps:
                start = time.perf_counter()
                function(batches[name][number])
                # The first two steps pay for what is set up once.
                seconds[name] += time.perf_counter() - start if number >= 2 else 0.0
        for name in steps:
            tokens = sum(int(batch.text_lengths.sum()) for batch in batches[name][2:])
            rates[name][what] = tokens / seconds[name]
    return rates


def _train(student: Student, batch: Batch) -> None:
    student.zero_grad()
    student(batch).pooled["text"].square().mean().backward()


def _teacher(config: Config, tokenizer: Tokenizer) -> torch.nn.Module:
    from transformers import BertConfig, BertModel

    width = config.model.width
    return BertModel(
        BertConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=width,
            num_hidden_layers=config.model.layers[0].count,
            num_attention_heads=config.model.heads,
            intermediate_size=4 * width,
            max_position_embeddings=max(64, tokenizer.max_length),
        )
    ).eval()


@torch.no_grad()
def _teach(teacher: torch.nn.Module, batch: Batch) -> None:
    padding = Layout.build({"text": batch.text_lengths}, batch.text_ids.device).padding("text")
    ids_NT = batch.text_ids.long()[padding.row_of_slot].masked_fill(~padding.is_token, 0)
    teacher(input_ids=ids_NT, attention_mask=padding.is_token.long())


def _print(rows: dict[str, dict[str, float]]) -> None:
    names = list(rows)
    wide = max(map(len, rows[names[0]]))
    print(f"{'':{wide}}  " + "  ".join(f"steps of {name:>7}" for name in names) + "     ratio")
    for key in rows[names[0]]:
        values = [rows[name][key] for name in names]
        ratio = f"{values[1] / values[0]:9.2f}×" if key.endswith("(tokens/s)") else ""
        print(f"{key:{wide}}  " + "  ".join(f"{value:16,.1f}" for value in values) + ratio)
    print(f"\n{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
