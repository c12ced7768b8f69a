"""Make the packaged sample: tokenizer, base model and data files, from nothing but a seed.

    python -m sample.make_sample --out edgetune/sample

The base is a Llama of two million parameters, pre-trained on requests drawn from `sample.text` with the loss on the
action alone. `transformers` supplies the model, because edgetune's own decoder keeps the base frozen, and because a
folder written by another library is what users bring. Rows are sorted by length in large draws, so a batch has next
to no padding. No row of the held-out file is ever drawn. Prints one JSON object with the figures of the run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from sample.datasets import data_files, pretraining_rows, write_data
from sample.text import Row

SEED = 1
VOCAB_SIZE = 1536
MODEL = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 192, "intermediate_size": 448, "num_hidden_layers": 5,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SPECIALS = ("<pad>", "<s>", "</s>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}</s>"
    "{% else %}<s>{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# JSON keys with their punctuation, then words, single digits, single spaces, other signs. A space is a piece of its
# own, so a name has the same pieces in the request and in the action, and copying it is copying.
PIECES = r""""?[}\],\[{]*"[a-z_]+":["\[{]*|\p{L}+(?:'\p{L}+)?|\p{N}|\s|[^\s\p{L}\p{N}]+"""


Batch = tuple[torch.Tensor, torch.Tensor]


def train_tokenizer(rows: list[Row]) -> Tokenizer:
    """A byte-level BPE tokenizer; nothing is added around a text, the chat template does that."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PIECES), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        (text for row in rows for text in (row.request, row.action)),
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIALS],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>",
        "model_max_length": MODEL["max_position_embeddings"], "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def encode(tokenizer: Tokenizer, row: Row) -> tuple[list[int], int]:
    """Token ids of a chat row as the template writes them, and how many of them are the prompt."""
    prompt = [1, *tokenizer.encode(row.request).ids, 3]
    return [*prompt, *tokenizer.encode(row.action).ids, 2], len(prompt)


def batches(tokenizer: Tokenizer, rows: Iterator[Row], size: int, seed: int) -> Iterator[Batch]:
    """Endless (input_ids, labels), each [size, longest row of the batch]; prompt and padding have label -100."""
    rng = np.random.default_rng(seed)
    while True:
        drawn = sorted((encode(tokenizer, row) for row in islice(rows, 64 * size)), key=lambda pair: len(pair[0]))
        for start in rng.permutation(64) * size:
            group = drawn[start : start + size]
            ids = np.zeros((size, len(group[-1][0])), np.int64)
            labels = np.full_like(ids, -100)
            for i, (tokens, prompt) in enumerate(group):
                ids[i, : len(tokens)] = tokens
                labels[i, prompt : len(tokens)] = tokens[prompt:]
            yield torch.from_numpy(ids), torch.from_numpy(labels)


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the labelled tokens; only their logits are computed."""
    hidden = model.model(ids[:, :-1]).last_hidden_state
    targets = labels[:, 1:]
    wanted = targets >= 0
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[wanted]), targets[wanted])


def say(line: str) -> None:
    sys.stderr.write(line + "\n")


def pretrain(model: LlamaForCausalLM, data: Iterator[Batch], args: argparse.Namespace) -> None:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.learning_rate, betas=(0.9, 0.98),
    )  # fmt: skip
    warmup = 200
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
    )
    start = time.perf_counter()
    running = 0.0
    for step, (ids, labels) in enumerate(islice(data, args.steps), start=1):
        loss = loss_of(model, ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        running += loss.item()
        if step % 100 == 0:
            seconds = time.perf_counter() - start
            say(f"step {step}/{args.steps}  loss {running / 100:.4f}  {seconds:.0f} s")
            running = 0.0


@torch.no_grad()
def exact_matches(
    model: LlamaForCausalLM, tokenizer: Tokenizer, rows: Sequence[Row], log: list[str] | None = None
) -> int:
    """How many actions are generated to the letter, greedily, in batches of prompts of one length."""
    by_length: dict[int, list[Row]] = {}
    for row in rows:
        by_length.setdefault(encode(tokenizer, row)[1], []).append(row)
    right = 0
    for length, group in by_length.items():
        ids = torch.tensor([encode(tokenizer, row)[0][:length] for row in group])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=96, do_sample=False)
        for row, tokens in zip(group, out[:, length:].tolist(), strict=True):
            answer = tokenizer.decode(tokens)
            right += answer == row.action
            if log is not None and answer != row.action:
                log.append(f"{row.request}\n  wanted {row.action}\n  got    {answer}")
    return right


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    return parser.parse_args()


def main() -> None:
    args = parse()
    start = time.perf_counter()
    torch.manual_seed(SEED)
    base = args.out / "base"
    base.mkdir(parents=True, exist_ok=True)
    write_data(args.out)
    own_eval = data_files()["own_intents_eval.jsonl"]
    rows = pretraining_rows()
    tokenizer = train_tokenizer(list(islice(rows, 40_000)))
    save_tokenizer(tokenizer, base)
    model = LlamaForCausalLM(LlamaConfig(**MODEL))
    pretrain(model, batches(tokenizer, rows, args.batch_size, SEED), args)
    model.to(torch.bfloat16).save_pretrained(base)
    wrong: list[str] = []
    right = exact_matches(model.float().eval(), tokenizer, own_eval, wrong)
    say("\n".join(wrong[:20]))
    figures = {
        "parameters": model.num_parameters(), "steps": args.steps, "batch_size": args.batch_size,
        "seconds": round(time.perf_counter() - start, 1), "cpu_seconds": round(time.process_time(), 1),
        "own_exact": right, "own_rows": len(own_eval),
        "cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", "numpy")},
    }  # fmt: skip
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
