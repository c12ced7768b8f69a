"""What a decoder makes of rows, by the engine's own forward pass: packed windows, logits in tiles, never whole.

Greedy decoding says a completion, and ends there, exactly where each of its tokens has the largest logit after the
tokens before it. So one pass under teacher forcing tells whether it would, and nothing is generated. Which of some
labels a decoder would choose needs a pass for each token where they part: decoding along their tree, greedily.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from edgetune.data import IGNORED, Row, pack, stack
from edgetune.models.decoder import Decoder
from edgetune.objectives.sft import TILE_TOKENS
from edgetune.training.forward import last_hidden

Ids = tuple[int, ...]


class Scorer:
    """A decoder, with its adapter or without, that looks at so many positions at once."""

    def __init__(self, decoder: Decoder, positions: int) -> None:
        self.decoder, self.positions = decoder, positions

    @torch.no_grad()
    def states(self, rows: Sequence[Row]) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
        """In turn the indices of some rows, their hidden states [M, H] where they are supervised, and the targets [M].

        The rows are side by side, each with its `num_supervised`.
        """
        where = {id(row): index for index, row in enumerate(rows)}
        virtual = self.decoder.virtual_tokens
        longest = max(map(len, rows), default=0) + virtual
        windows = pack(rows, max(min(self.positions, 4 * longest), longest), 1, virtual)
        at_once = max(1, self.positions // windows[0].length) if windows else 1
        for start in range(0, len(windows), at_once):
            some = windows[start : start + at_once]
            batch = stack(some)
            hidden = last_hidden(self.decoder, batch, lambda: None)
            targets = torch.from_numpy(batch["labels"]).reshape(-1)
            kept = (targets != IGNORED).nonzero()[:, 0]
            yield [where[id(row)] for window in some for row in window.rows], hidden[kept], targets[kept]

    def tokens(self, rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
        """Of each row the loss in nats, summed over its supervised tokens, and whether each has the largest logit."""
        nll, exact = np.zeros(len(rows)), np.zeros(len(rows), bool)
        for indices, hidden, targets in self.states(rows):
            losses, right = self._token_losses(hidden, targets)
            ends = np.cumsum([rows[index].num_supervised for index in indices])
            for index, loss, good in zip(indices, np.split(losses, ends[:-1]), np.split(right, ends[:-1]), strict=True):
                nll[index], exact[index] = loss.sum(dtype=np.float64), good.all()
        return nll, exact

    def _token_losses(self, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The cross-entropy of each target [M], and whether its logit is the largest, one tile of logits at a time."""
        size, head = len(hidden), self.decoder.lm_head
        highest, total, of_target = torch.full((size,), -torch.inf), torch.zeros(size), torch.zeros(size)
        for rows, weight in head.tiles():
            for start in range(0, size, TILE_TOKENS):
                at = slice(start, start + TILE_TOKENS)
                logits = hidden[at] @ weight.T
                here = ((targets[at] >= rows.start) & (targets[at] < rows.stop)).nonzero()[:, 0]
                of_target[at][here] = logits[here, targets[at][here] - rows.start]
                raised = torch.maximum(highest[at], logits.amax(1))
                total[at] = total[at] * (highest[at] - raised).exp() + (logits - raised[:, None]).exp().sum(1)
                highest[at] = raised
        return (highest + total.log() - of_target).numpy(), (of_target == highest).numpy()

    def choose(self, prompts: Sequence[np.ndarray], labels: Sequence[Ids]) -> np.ndarray:
        """Of each prompt the index of the label that greedy steps along the tree of all labels lead to."""
        tree = _Tree(labels)
        found = np.full(len(prompts), -1)
        said: dict[int, Ids] = dict.fromkeys(range(len(prompts)), ())
        while said:
            for index, so_far in list(said.items()):
                said[index] = so_far = tree.forced(so_far)
                if so_far in tree.ends:
                    found[index] = tree.ends[so_far]
                    del said[index]
            options = {index: tree.follows[so_far] for index, so_far in said.items()}
            for index, token in self._best(prompts, said, options).items():
                said[index] += (token,)
        return found

    def _best(
        self, prompts: Sequence[np.ndarray], said: dict[int, Ids], options: dict[int, list[int]]
    ) -> dict[int, int]:
        """The token among the options of each row that has the largest logit after its prompt and what was said."""
        indices = list(options)
        allowed = sorted({token for tokens in options.values() for token in tokens})
        rows = [
            _asking(np.append(prompts[index], said[index]).astype(np.int32), prompt_length=len(prompts[index]))
            for index in indices
        ]
        found: dict[int, int] = {}
        if not rows:
            return found
        weight = self.decoder.lm_head.lookup(torch.tensor(allowed))
        place = {token: i for i, token in enumerate(allowed)}
        for some, hidden, _ in self.states(rows):
            logits = hidden @ weight.T
            for row, scores in zip(some, logits, strict=True):
                index = indices[row]
                tokens = options[index]
                found[index] = tokens[int(scores[[place[token] for token in tokens]].argmax())]
        return found

    def features(self, prompts: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """What the head gets of each prompt, float32 [n, H]: the `mean` over its tokens, and the `last` one's."""
        width = self.decoder.config.hidden_size
        made = {name: np.empty((len(prompts), width), np.float32) for name in ("mean", "last")}
        rows = [_asking(ids, all_of_it=True, prompt_length=len(ids)) for ids in prompts]
        for indices, hidden, _ in self.states(rows):
            parts = torch.split(hidden, [len(prompts[index]) for index in indices])
            for index, part in zip(indices, parts, strict=True):
                made["mean"][index], made["last"][index] = part.mean(0).numpy(), part[-1].numpy()
        return made


def _asking(ids: np.ndarray, *, all_of_it: bool = False, prompt_length: int | None = None) -> Row:
    """A row whose supervised positions are the last of `ids`, or all of them. What follows is asked for, not read."""
    labels = np.zeros(len(ids) + 1, np.int32)
    if not all_of_it:
        labels[:-1] = IGNORED
    return Row(np.append(ids, np.int32(0)), labels, 0, prompt_length=prompt_length)


class _Tree:
    """Labels by what they begin with. One that another begins with is chosen where it ends."""

    def __init__(self, labels: Sequence[Ids]) -> None:
        self.ends = {label: index for index, label in enumerate(labels)}
        self.follows: dict[Ids, list[int]] = {}
        for label in labels:
            for size in range(len(label)):
                follows = self.follows.setdefault(label[:size], [])
                if label[size] not in follows:
                    follows.append(label[size])

    def forced(self, so_far: Ids) -> Ids:
        """What was said, gone on with as long as there is no choice."""
        while so_far not in self.ends and len(self.follows[so_far]) == 1:
            so_far += (self.follows[so_far][0],)
        return so_far
