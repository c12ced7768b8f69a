"""Losses of sequences: closed-form numbers, and gradients against autograd over logits that exist whole."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from edgetune.linear import Workspace
from edgetune.objectives import OBJECTIVES, check_kind, has_head, objective_of
from edgetune.objectives.base import SequenceObjective, Sequences, read_sequences
from edgetune.planner import TrainConfig
from edgetune.planner.costs import SEQUENCE_BYTES
from tests.objectives.test_sft import Matrix

Batch = dict[str, np.ndarray]
NONE = np.full(6, np.nan)


def batch_of(lengths: list[list[int]], vocabulary: int, *, seed: int = 0) -> Batch:
    """Windows of segments of these lengths and some padding; the first tokens of each are a prompt."""
    rng = np.random.default_rng(seed)
    length = max(map(sum, lengths)) + 3
    made = {key: np.zeros((len(lengths), length), np.int64) for key in ("input_ids", "position_ids")}
    made |= {key: np.full((len(lengths), length), value) for key, value in (("labels", -100), ("segment_ids", -1))}
    for window, parts in enumerate(lengths):
        at = 0
        for segment, count in enumerate(parts):
            ids = rng.integers(0, vocabulary, count)
            made["input_ids"][window, at : at + count] = ids
            made["labels"][window, at + 1 : at + count - 1] = ids[2:]
            made["position_ids"][window, at : at + count] = np.arange(count)
            made["segment_ids"][window, at : at + count] = segment
            at += count
    most = max(map(len, lengths))
    made["reference"] = rng.normal(-12, 3, (len(lengths), most))
    made["desirable"] = rng.integers(0, 2, (len(lengths), most)).astype(float)
    return made


def logps_of(hidden: torch.Tensor, weight: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probability of every sequence, window by window, and how many tokens are learned of it."""
    labels, segments = (torch.from_numpy(batch[key]) for key in ("labels", "segment_ids"))
    logps = torch.log_softmax(hidden @ weight.T, -1).view(*labels.shape, -1)
    of_label = logps.gather(2, labels.clamp(min=0)[..., None])[..., 0]
    found, counts = [], []
    for window in range(len(labels)):
        for segment in range(int(segments[window].max()) + 1):
            mine = (segments[window] == segment) & (labels[window] != -100)
            found.append(of_label[window][mine].sum())
            counts.append(mine.sum())
    return torch.stack(found), torch.stack(counts)


def known(batch: Batch, key: str) -> torch.Tensor:
    """Those of the sequences that exist."""
    last = batch["segment_ids"].max(axis=1)
    return torch.from_numpy(np.concatenate([row[: count + 1] for row, count in zip(batch[key], last, strict=True)]))


def dpo(logps: torch.Tensor, counts: torch.Tensor, batch: Batch, beta: float, label_smoothing: float) -> torch.Tensor:
    ratios = logps - known(batch, "reference")
    margin = beta * (ratios[0::2] - ratios[1::2])
    logsigmoid = torch.nn.functional.logsigmoid
    return -((1 - label_smoothing) * logsigmoid(margin) + label_smoothing * logsigmoid(-margin)).sum()


def orpo(logps: torch.Tensor, counts: torch.Tensor, batch: Batch, beta: float) -> torch.Tensor:
    likely = (logps / counts).exp()
    odds = likely / (1 - likely)
    return (-torch.log(likely[0::2]) - beta * torch.log(torch.sigmoid(torch.log(odds[0::2] / odds[1::2])))).sum()


def kto(logps: torch.Tensor, counts: torch.Tensor, batch: Batch, beta: float) -> torch.Tensor:
    ratios = logps - known(batch, "reference")
    distance = ratios[1::2].mean().clamp(min=0).detach()
    wanted = known(batch, "desirable")[0::2] == 1
    gains = beta * (ratios[0::2] - distance)
    return (1 - torch.sigmoid(torch.where(wanted, gains, -gains))).sum()


CASES: list[tuple[str, dict[str, float], Callable[..., torch.Tensor]]] = [
    ("dpo", {"beta": 0.3}, dpo),
    ("dpo", {"beta": 0.1, "label_smoothing": 0.2}, dpo),
    ("orpo", {"beta": 0.4}, orpo),
    ("kto", {"beta": 0.2}, kto),
]


@pytest.mark.parametrize("lengths", [[[5, 9]], [[7, 4, 11, 3], [6, 5]], [[30, 41], [3, 3], [12, 9]]])
@pytest.mark.parametrize(("name", "settings", "reference"), CASES)
def test_equals_autograd(
    name: str, settings: dict[str, float], reference: Callable[..., torch.Tensor], lengths: list[list[int]]
) -> None:
    vocabulary, width = 131, 17
    batch = batch_of(lengths, vocabulary)
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(batch["labels"].size, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator)
    config = TrainConfig(objective=name, **settings).checked()
    objective = objective_of(_planned(config))

    leaf = hidden.double().requires_grad_()
    expected = reference(*logps_of(leaf, weight.double(), batch), batch, **_given(config))
    expected.backward()
    assert leaf.grad is not None
    for row_step in (1, 32):
        gradient, head = hidden.clone(), Matrix(weight, 50)
        measured = objective.loss_and_gradient(gradient, batch, head, Workspace(), row_step)
        assert measured.loss == pytest.approx(expected.item(), rel=1e-5)
        scale = leaf.grad.abs().max().item()
        torch.testing.assert_close(gradient, leaf.grad.float(), rtol=1e-4, atol=1e-5 * scale)
        assert head.rows_read == vocabulary, "one pass over the head"
    again = objective.loss(hidden, batch, Matrix(weight, 50), Workspace())
    assert again.loss == pytest.approx(measured.loss, rel=1e-6)
    assert again.figures == pytest.approx(measured.figures, rel=1e-4)


def _planned(config: TrainConfig) -> Any:
    class Planned:
        objective = config.objective

    for name, value in config.objective_settings.items():
        setattr(Planned, name, value)
    return Planned


def _given(config: TrainConfig) -> dict[str, float]:
    return {name: value for name, value in config.objective_settings.items() if value is not None}


def test_the_golden_numbers_of_dpo() -> None:
    """Three pairs of torchtune's test suite; beta 0.1, no label smoothing."""
    policy = np.array([-0.5, -0.1, -10.0, -30.0, -1.0, -21.0])
    reference = np.array([-0.5, -0.1, -10.1, -20.1, -0.1, -0.1])
    objective = OBJECTIVES["dpo"].Objective(beta=0.1, label_smoothing=0.0)
    losses, slopes, figures = objective.measure(Sequences(policy, np.ones(6), reference, NONE))
    assert losses == pytest.approx([0.693147, 0.313262, 0.126928], abs=1e-6)
    assert figures["reward_margin"] == pytest.approx([0.0, 1.0, 2.0])
    assert figures["reward_accuracy"].tolist() == [0, 1, 1]
    assert slopes == pytest.approx(_differences(objective, policy, np.ones(6), reference, NONE), rel=1e-5)


def _differences(
    objective: SequenceObjective, policy: np.ndarray, lengths: np.ndarray, reference: np.ndarray, desirable: np.ndarray
) -> list[float]:
    """The derivative of the summed loss by each log-probability, from two values of it."""

    def loss(at: int, by: float) -> float:
        moved = policy.copy()
        moved[at] += by
        return float(objective.measure(Sequences(moved, lengths, reference, desirable))[0].sum())

    return [(loss(at, 1e-5) - loss(at, -1e-5)) / 2e-5 for at in range(len(policy))]


@pytest.mark.parametrize(
    "name", [name for name, module in OBJECTIVES.items() if "preference" in module.KINDS and not has_head(name)]
)
def test_swapped_answers_are_another_loss(name: str) -> None:
    objective = OBJECTIVES[name].Objective(**OBJECTIVES[name].SETTINGS)
    policy, lengths = np.array([-4.0, -9.0]), np.array([5.0, 7.0])
    values = [
        objective.measure(Sequences(policy[order], lengths[order], np.array([-5.0, -5.5])[order], NONE[:2]))[0][0]
        for order in ([0, 1], [1, 0])
    ]
    assert values[0] < values[1] - 0.1


def test_orpo_by_hand() -> None:
    """Probabilities per token of 0.5 and 0.25: odds of 1 and 1/3."""
    policy, lengths = np.array([3 * np.log(0.5), 2 * np.log(0.25)]), np.array([3.0, 2.0])
    objective = OBJECTIVES["orpo"].Objective(beta=0.1)
    losses, slopes, figures = objective.measure(Sequences(policy, lengths, NONE[:2], NONE[:2]))
    assert losses == pytest.approx([np.log(2) - 0.1 * np.log(3 / 4)])
    assert slopes == pytest.approx(_differences(objective, policy, lengths, NONE[:2], NONE[:2]), rel=1e-5)
    assert figures["reward_margin"] == pytest.approx([0.1 * np.log(2)])
    certain = objective.measure(Sequences(np.zeros(2), lengths, NONE[:2], NONE[:2]))
    assert np.isfinite(certain[0]).all() and np.isfinite(certain[1]).all()


def test_kto_by_hand() -> None:
    """A wanted and an unwanted answer; the mismatched ones rose by 1 and by 3 nats, so z = 2."""
    policy = np.array([-3.0, -4.0, -5.0, -2.0])
    reference = policy - [4.0, 1.0, -2.0, 3.0]
    desirable, lengths = np.array([1, np.nan, 0, np.nan]), np.ones(4)
    objective = OBJECTIVES["kto"].Objective(beta=0.5)
    losses, slopes, figures = objective.measure(Sequences(policy, lengths, reference, desirable))
    gains = np.array([0.5 * (4 - 2), 0.5 * (2 + 2)])
    assert losses == pytest.approx(1 / (1 + np.exp(gains)))
    assert slopes[1] == slopes[3] == 0 and slopes[0] < 0 < slopes[2]
    assert figures["reference_kl"].tolist() == [2, 2] and figures["reward_margin"] == pytest.approx(gains)
    below = objective.measure(Sequences(policy, lengths, reference + 9, desirable))[2]
    assert below["reference_kl"].tolist() == [0, 0]


def test_extreme_margins_do_not_overflow() -> None:
    objective = OBJECTIVES["dpo"].Objective(beta=1.0, label_smoothing=0.0)
    losses, slopes, _ = objective.measure(Sequences(np.array([-5000.0, 0, 0, -5000]), np.ones(4), np.zeros(4), NONE))
    assert losses.tolist() == [5000.0, 0.0] and slopes.tolist() == [-1.0, 1.0, 0.0, 0.0]


def test_what_is_made_beside_the_buffers_is_counted() -> None:
    batch = batch_of([[200, 301], [90, 44, 170, 130]], 50)
    losses = np.ones(int((batch["labels"] != -100).sum()), np.float32)
    objective = OBJECTIVES["dpo"].Objective(beta=0.1, label_smoothing=0.0)
    objective._weigh(losses, batch)
    tracemalloc.start()
    objective._weigh(losses, batch)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    counted = SEQUENCE_BYTES * (batch["labels"].size + 2 * len(losses))
    assert 0.5 * counted < peak < counted + 4000  # a few hundred bytes for each sequence


def test_rows_of_another_objective_are_refused() -> None:
    from edgetune.errors import DataError

    with pytest.raises(
        DataError, match=r"a\.jsonl has preference rows; --objective sft learns from text, .*it is .*dpo"
    ):
        check_kind("sft", "preference", "a.jsonl")
    with pytest.raises(
        DataError, match=r"has text rows; --objective dpo learns from preference rows\. .*--objective sft"
    ):
        check_kind("dpo", "text", "a.jsonl")


def test_sequences_of_a_batch() -> None:
    batch = batch_of([[4, 6], [5, 3, 7, 4]], 50)
    losses = np.arange(int((batch["labels"] != -100).sum()), dtype=np.float32)
    found = read_sequences(batch, losses)
    assert found.lengths.tolist() == [2, 4, 3, 1, 5, 2]
    assert found.logps.tolist() == [-1, -14, -21, -9, -60, -31]
    assert found.reference.tolist() == known(batch, "reference").tolist()
