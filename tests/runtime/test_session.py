"""The session's cache and its binding, against one plain run of the graph over the whole sequence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_config, write_model

from edgetune.bundle import SHARE_BUFFER
from edgetune.errors import ConfigError
from edgetune.exporter import export
from edgetune.memory import MIB
from edgetune.runtime.session import CHUNK, Session, open_session

IDS = np.random.default_rng(0).integers(0, 301, 3 * CHUNK + 5)
# A head size of 16 takes the attention that writes the cache in place, 8 the standard one.
SHAPES = {"in place": ("llama", 16), "growing": ("llama", 8), "in place, sliding": ("gemma3_text", 16)}


@pytest.fixture(scope="module", params=SHAPES)
def session(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Session:
    family, head_dim = SHAPES[request.param]
    folder = tmp_path_factory.mktemp("model")
    config = tiny_config(family, head_dim=head_dim, max_position_embeddings=512)
    bundle = export(write_model(folder / "model", config, tokenizer=False), out=folder / "bundle")
    session = open_session(bundle)
    marks = session._native.get_modelmeta().custom_metadata_map
    assert (SHARE_BUFFER in marks) == (head_dim == 16)
    return session


def whole(session: Session, ids: np.ndarray) -> np.ndarray:
    """Logits [n, vocab] of a sequence, from onnxruntime's own `run`, without a past."""
    model = session.bundle.model
    empty = np.zeros((1, model.num_key_value_heads, 0, model.head_dim), np.float32)
    feeds = {"input_ids": ids[None], "attention_mask": np.ones((1, len(ids)), np.int64)}
    feeds |= {f"past_key_values.{i}.{kind}": empty for i in range(model.num_hidden_layers) for kind in ("key", "value")}
    logits: np.ndarray = session._native.run(["logits"], feeds)[0][0]
    return logits


def test_a_sequence_in_any_pieces(session: Session) -> None:
    expected = whole(session, IDS)
    session.reset()
    at = 0
    for count in (1, 7, 1, 1, CHUNK + 3, 2, CHUNK, 64):
        logits = session.forward(IDS[at : at + count])
        at += count
        assert logits.shape == (301,) and session.length == at
        np.testing.assert_allclose(logits, expected[at - 1], atol=1e-4, rtol=0)
    rest = np.concatenate(list(session.logits(IDS[at:])))
    np.testing.assert_allclose(rest, expected[at:], atol=1e-4, rtol=0)


def test_a_prompt_is_read_in_pieces_of_which_each_gives_one_row_of_logits(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, shapes = Session._run, list[tuple[int, ...]]()

    def run(self: Session, tokens: np.ndarray, logits_to_keep: int) -> np.ndarray:
        logits = real(self, tokens, logits_to_keep)
        shapes.append((tokens.shape[1], *logits.shape))
        return logits

    monkeypatch.setattr(Session, "_run", run)
    session.reset()
    session.forward(IDS[: CHUNK + 3])
    assert shapes == [(CHUNK, 1, 301), (3, 1, 301)]


def test_nothing_of_a_sequence_is_left_after_a_reset(session: Session) -> None:
    session.reset()
    session.forward(IDS)
    session.reset()
    assert session.length == 0
    again = [session.forward(IDS[100:109]), session.forward(IDS[109:110])]
    fresh = open_session(session.bundle)
    for before, after in zip(again, (fresh.forward(IDS[100:109]), fresh.forward(IDS[109:110])), strict=True):
        np.testing.assert_array_equal(before, after)


def test_a_context_is_filled_to_its_last_token_and_no_further(session: Session) -> None:
    ids = np.resize(IDS, session.context_length)
    session.reset()
    session.forward(ids[:-1])
    np.testing.assert_allclose(session.forward(ids[-1:]), whole(session, ids)[-1], atol=1e-4, rtol=0)
    with pytest.raises(ConfigError, match=r"513 tokens do not fit the context of 512 tokens .* by 1$"):
        session.forward(ids[:1])


def test_logits_of_a_piece_do_not_change_later(session: Session) -> None:
    session.reset()
    first = next(iter(session.logits(IDS[:9])))
    kept = first.copy()
    list(session.logits(IDS[9:18]))
    np.testing.assert_array_equal(first, kept)


_USED = """
import sys
import numpy as np
from edgetune.memory import anonymous_bytes
from edgetune.runtime.session import CHUNK, open_session
session = open_session(sys.argv[1])
size = sum(4 * np.prod(value.shape()) for value in session._cache.values())
session.reset()
session.forward([1, 2, 3])
before = anonymous_bytes()
for _ in range(4):
    session.reset()
    session.forward([1, 2, 3])
again = anonymous_bytes()
for _ in range(8):
    session.forward(np.arange(3, 3 + CHUNK))
print(size, again - before, anonymous_bytes() - again)
"""


def test_a_cache_takes_memory_as_it_is_written(tmp_path: Path) -> None:
    config = tiny_config("llama", head_dim=16, max_position_embeddings=8192, num_key_value_heads=9)
    bundle = export(write_model(tmp_path / "model", config, tokenizer=False), out=tmp_path / "bundle")
    done = subprocess.run(  # in a process whose allocator is as it comes
        [sys.executable, "-c", _USED, str(bundle.folder)], check=True, capture_output=True, text=True
    )
    size, by_resets, by_tokens = map(int, done.stdout.split())
    assert size == 2 * 2 * 9 * 8192 * 16 * 4
    assert by_resets < MIB
    assert 0.5 * size * 1024 / 8192 < by_tokens < 0.5 * size, "1,024 of 8,192 positions were written"


_AGAIN = """
import numpy as np
from edgetune.memory import anonymous_bytes
from edgetune.runtime.session import _zeros
np.ones(3_500_000)  # glibc keeps blocks of this size from now on, and clears them before they are used again
before = anonymous_bytes()
for _ in range(3):
    caches = [_zeros((1, 9, 8192, 16)) for _ in range(4)]
    assert all(cache.dtype == np.float32 and not cache[:, :, ::999].any() for cache in caches)
    caches[0][0, 0] = 1
    del caches
print(anonymous_bytes() - before)
"""


def test_a_cache_that_follows_another_is_not_cleared_by_hand() -> None:
    done = subprocess.run([sys.executable, "-c", _AGAIN], check=True, capture_output=True, text=True)
    assert int(done.stdout) < MIB
