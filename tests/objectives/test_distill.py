"""Distillation against autograd over whole logits, and the record of a teacher with everything that can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from edgetune.data import pack, read_rows, split_eval, stack
from edgetune.data.teacher import teacher_path, with_teacher
from edgetune.errors import DataError
from edgetune.linear import Workspace
from edgetune.objectives import OBJECTIVES
from edgetune.tokenizer import load_tokenizer
from edgetune.training.loop import train
from tests.objectives.test_preferences import Batch, batch_of
from tests.objectives.test_sft import Matrix
from tests.training.conftest import make_base, make_plan


class Head(Matrix):
    def lookup(self, ids: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return out.copy_(self.weight[ids])


def taught(batch: Batch, vocabulary: int, k: int, *, seed: int = 4) -> Batch:
    """The batch with the k most likely tokens of a random teacher."""
    count = int((batch["labels"] != -100).sum())
    logits = torch.randn(count, vocabulary, generator=torch.Generator().manual_seed(seed)) * 2
    logps, ids = torch.log_softmax(logits, -1).topk(k)
    return batch | {"teacher_ids": ids.numpy(), "teacher_logps": logps.numpy()}


def reference(
    hidden: torch.Tensor, weight: torch.Tensor, batch: Batch, temperature: float, share: float
) -> torch.Tensor:
    labels = torch.from_numpy(batch["labels"]).flatten()
    logps = torch.log_softmax(hidden[labels != -100] @ weight.T, -1)
    ids, teacher = (torch.from_numpy(batch[f"teacher_{name}"]) for name in ("ids", "logps"))
    named = torch.zeros(logps.shape, dtype=torch.bool).scatter_(1, ids, True)
    rest = logps.masked_fill(named, -torch.inf).logsumexp(1, keepdim=True)
    ours = torch.cat([logps.gather(1, ids), rest], 1)
    theirs = torch.cat([teacher.double(), torch.log1p(-teacher.double().exp().sum(1, keepdim=True))], 1)
    divergence = torch.nn.functional.kl_div(
        torch.log_softmax(ours / temperature, 1), torch.log_softmax(theirs / temperature, 1),
        log_target=True, reduction="sum",
    )  # fmt: skip
    nll = -logps.gather(1, labels[labels != -100][:, None]).sum()
    return (1 - share) * nll + share * temperature**2 * divergence


@pytest.mark.parametrize("lengths", [[[9]], [[7, 4, 11, 3], [6, 5]], [[40, 31], [3]]])
@pytest.mark.parametrize(("temperature", "share", "k"), [(1.0, 1.0, 5), (2.5, 0.3, 1), (0.7, 0.6, 32)])
def test_equals_autograd(lengths: list[list[int]], temperature: float, share: float, k: int) -> None:
    vocabulary, width = 131, 17
    batch = taught(batch_of(lengths, vocabulary), vocabulary, k)
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(batch["labels"].size, width, generator=generator) / 2
    weight = torch.randn(vocabulary, width, generator=generator)
    leaf = hidden.double().requires_grad_()
    expected = reference(leaf, weight.double(), batch, temperature, share)
    expected.backward()
    assert leaf.grad is not None
    objective = OBJECTIVES["distill"].Objective(temperature=temperature, distill_weight=share)
    for row_step in (1, 32):
        gradient, head = hidden.clone(), Head(weight, 50)
        measured = objective.loss_and_gradient(gradient, batch, head, Workspace(), row_step)
        assert measured.loss == pytest.approx(expected.item(), rel=1e-5)
        torch.testing.assert_close(gradient, leaf.grad.float(), rtol=1e-3, atol=1e-5 * leaf.grad.abs().max().item())
        assert head.rows_read == vocabulary, "one pass over the head"
    again = objective.loss(hidden, batch, Head(weight, 50), Workspace())
    assert again.loss == pytest.approx(measured.loss, rel=1e-6)


def test_a_teacher_that_agrees_costs_nothing() -> None:
    batch, weight = batch_of([[12, 8]], 31), torch.randn(31, 7, generator=torch.Generator().manual_seed(1))
    hidden = torch.randn(batch["labels"].size, 7, generator=torch.Generator().manual_seed(2))
    logps = torch.log_softmax(hidden @ weight.T, -1)[torch.from_numpy(batch["labels"]).flatten() != -100]
    values, ids = logps.topk(6)
    batch |= {"teacher_ids": ids.numpy(), "teacher_logps": values.numpy()}
    objective = OBJECTIVES["distill"].Objective(temperature=2.0, distill_weight=1.0)
    measured = objective.loss_and_gradient(hidden, batch, Head(weight, 10), Workspace())
    assert measured.loss == pytest.approx(0, abs=1e-4) and hidden.abs().max() < 1e-3


def test_a_student_that_is_certain_stays_finite() -> None:
    """All probability lies in the recorded tokens: nothing that float32 can tell is left for the rest."""
    batch, weight = taught(batch_of([[6]], 31), 31, 3), torch.zeros(31, 2)
    weight[torch.from_numpy(batch["teacher_ids"][0])] = 200.0
    hidden = torch.ones(batch["labels"].size, 2)
    objective = OBJECTIVES["distill"].Objective(temperature=1.0, distill_weight=1.0)
    measured = objective.loss_and_gradient(hidden, batch, Head(weight, 10), Workspace())
    assert np.isfinite(measured.loss) and hidden.isfinite().all()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("distill"), num_hidden_layers=2)


def write(folder: Path, base: Path) -> tuple[Path, dict[str, np.ndarray], dict[str, str]]:
    """Rows, and what a teacher that always answers with one token would record of them."""
    path = folder / "rows.jsonl"
    rows = [{"prompt": "ab", "completion": "c" * (i % 4 + 1)} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    read = read_rows(path, load_tokenizer(base), 48)
    ids = np.tile(np.array([[7, 3]], np.int32), (read.num_supervised, 1))
    values = np.tile(np.log(np.array([[0.9, 0.05]], np.float32)), (read.num_supervised, 1))
    return path, {"indices": ids, "values": values}, {"data_sha256": read.sha256}


def test_a_run_learns_what_the_teacher_says(base: Path, tmp_path: Path) -> None:
    path, tensors, metadata = write(tmp_path, base)
    save_file(tensors, teacher_path(path), metadata)
    settings = {"objective": "distill", "temperature": 1.5, "distill_weight": 1.0, "learning_rate": 2e-2}
    run = train(make_plan(base, **settings), base, data=path, out=tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] / 2
    assert run.summary["eval_teacher_kl"] < lines[1]["teacher_kl"]
    assert len(run.summary["teacher_sha256"]) == 64


def test_every_position_gets_what_was_recorded_for_it(base: Path, tmp_path: Path) -> None:
    path, tensors, metadata = write(tmp_path, base)
    tensors["indices"] = np.arange(2 * len(tensors["indices"]), dtype=np.int32).reshape(-1, 2)
    save_file(tensors, teacher_path(path), metadata)
    rows = with_teacher(read_rows(path, load_tokenizer(base), 48), path, 301)
    first_of, at = {}, 0
    for row in rows:
        first_of[id(row)] = at
        at += row.num_supervised
    learned, _ = split_eval(rows, 0.2, 3)
    windows = pack(learned, 48)
    batch = stack(windows)
    expected = [first_of[id(row)] + i for w in windows for row in w.rows for i in range(row.num_supervised)]
    assert batch["teacher_ids"][:, 0].tolist() == [2 * at for at in expected]
    assert len(expected) == (batch["labels"] != -100).sum()


WRONG: list[tuple[Callable[[dict[str, Any], dict[str, str]], object], str]] = [
    (lambda t, m: m.update(data_sha256="0"), "was recorded for other rows"),
    (lambda t, m: t.pop("values"), "is no record of a teacher"),
    (lambda t, m: t.update(indices=t["indices"][:-1]), r"indices int32 \[\d+, 2\] .* one line for each learned token"),
    (lambda t, m: t.update(indices=t["indices"].astype(np.int64)), "indices int64"),
    (lambda t, m: t.update(indices=t["indices"] + 300), "indices from 303 to 307; the base has 301 tokens"),
    (lambda t, m: t.update(indices=t["indices"] * 0), "names a token twice"),
    (lambda t, m: t.update(values=t["values"] + 4), "probabilities sum to 51.9: log-probabilities were expected"),
    (lambda t, m: t.update(values=t["values"] * np.float32(np.nan)), "log-probabilities were expected"),
]


@pytest.mark.parametrize(("change", "said"), WRONG, ids=range(len(WRONG)))
def test_a_record_that_is_wrong(
    base: Path, tmp_path: Path, change: Callable[[dict[str, Any], dict[str, str]], object], said: str
) -> None:
    path, tensors, metadata = write(tmp_path, base)
    rows = read_rows(path, load_tokenizer(base), 48)
    with pytest.raises(DataError, match=r"rows\.jsonl has no record of a teacher\. Write .*rows\.teacher\.safetensors"):
        with_teacher(rows, path, 301)
    change(tensors, metadata)
    save_file(tensors, teacher_path(path), metadata)
    with pytest.raises(DataError, match=said):
        with_teacher(rows, path, 301)
