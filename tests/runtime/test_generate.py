from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_bundle import (
    CONTEXT,
    EOS,
    SLOTS,
    VOCAB,
    Reference,
    bound,
    build_graph,
    byte_ids,
    random_adapter,
    random_reference,
    scripted_reference,
    sha256,
    write_bundle,
)  # fmt: skip

from edgetune import host
from edgetune.adapter_file import write_adapter
from edgetune.bundle import load_bundle
from edgetune.errors import AdapterError, BundleError, ConfigError, ModelError
from edgetune.runtime.generate import Sampling, choose_token, generate, sampling_probabilities
from edgetune.runtime.session import CHUNK, open_session

PROMPT = "Dear diary,"


@pytest.fixture(scope="module")
def reference() -> Reference:
    return random_reference()


@pytest.fixture(scope="module")
def adapter() -> dict[str, np.ndarray]:
    return random_adapter()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, reference: Reference, adapter: dict[str, np.ndarray]) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle") / "bundle", reference, adapter)


def scripted(tmp_path: Path, text: str) -> Path:
    """A bundle that answers the prompt "Q" with this text and then stops."""
    return write_bundle(tmp_path / "scripted", scripted_reference([*byte_ids("Q" + text), EOS]))


# ---- session


def test_logits_equal_a_second_implementation_without_a_cache(
    bundle: Path, reference: Reference, adapter: dict[str, np.ndarray]
) -> None:
    ids = np.random.default_rng(3).integers(0, VOCAB, 17).tolist()
    for active, tensors in ((True, adapter), (False, None)):
        session = open_session(bundle, adapter=active)
        wanted = reference.logits(ids, tensors)
        got = [session.forward(ids[:6])] + [session.forward([token]) for token in ids[6:]]
        assert session.length == len(ids)
        np.testing.assert_allclose(got, wanted[5:], atol=2e-4)


def test_a_long_prompt_goes_through_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgetune.runtime.session.CHUNK", 5)
    reference, ids = random_reference(1), np.random.default_rng(4).integers(0, VOCAB, 13).tolist()
    session = open_session(write_bundle(tmp_path / "bundle", reference))
    pieces = list(session.logits(ids))
    assert [len(piece) for piece in pieces] == [5, 5, 3]
    np.testing.assert_allclose(np.concatenate(pieces), reference.logits(ids), atol=2e-4)
    assert CHUNK == 128


def test_the_adapter_swaps_on_one_session(bundle: Path, reference: Reference, adapter: dict[str, np.ndarray]) -> None:
    session, ids = open_session(bundle), [9, 80, 33]
    assert session.has_adapter
    tuned = session.forward(ids)
    session.use_adapter(False)
    base = session.forward(ids)
    session.use_adapter(True)
    np.testing.assert_array_equal(session.forward(ids), tuned)
    np.testing.assert_allclose(base, reference.logits(ids)[-1], atol=2e-4)
    assert np.abs(tuned - base).max() > 0.1


def test_an_adapter_of_another_rank_comes_from_a_file(bundle: Path, reference: Reference, tmp_path: Path) -> None:
    other = random_adapter(seed=8, r=7)
    write_adapter(tmp_path, "other", bound(other, sha256(bundle / "tokenizer.json")))
    session = open_session(bundle, adapter=tmp_path / "other.safetensors")
    np.testing.assert_allclose(session.forward([5, 6]), reference.logits([5, 6], other)[-1], atol=2e-4)


def test_a_wrong_adapter_is_refused_before_a_session_exists(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("onnxruntime was asked to load the graph")

    monkeypatch.setattr("onnxruntime.InferenceSession", fail)
    wrong = random_adapter()
    wrong[f"{SLOTS[1]}.lora_B"] = wrong[f"{SLOTS[1]}.lora_B"][:, :-1].copy()
    write_adapter(tmp_path, "wrong", bound(wrong, sha256(bundle / "tokenizer.json")))
    with pytest.raises(AdapterError, match=rf"{SLOTS[1]}\.lora_B: has shape"):
        open_session(bundle, adapter=tmp_path / "wrong.safetensors")


def test_a_graph_that_onnxruntime_cannot_load_is_a_bundle_error(tmp_path: Path) -> None:
    model = build_graph(random_reference())
    next(node for node in model.graph.node if node.op_type == "Softmax").op_type = "NoSuchOp"
    folder = write_bundle(tmp_path / "bundle", random_reference(), graph=model)
    with pytest.raises(BundleError, match=r"onnxruntime .* cannot load .*NoSuchOp"):
        open_session(folder)


def test_a_graph_without_an_output_is_a_bundle_error(tmp_path: Path) -> None:
    model = build_graph(random_reference())
    gone = model.graph.output.pop().name
    folder = write_bundle(tmp_path / "bundle", random_reference(), graph=model)
    with pytest.raises(BundleError, match=rf"lacks inputs \[\] and outputs \['{gone}'\]"):
        open_session(folder)


def test_a_graph_with_another_input_is_a_bundle_error(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    model = build_graph(random_reference())
    model.graph.input.append(helper.make_tensor_value_info("position_ids", TensorProto.INT64, ["batch", "sequence"]))
    folder = write_bundle(tmp_path / "bundle", random_reference(), graph=model)
    with pytest.raises(BundleError, match=r"asks for \['position_ids'\]"):
        open_session(folder)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "there is no token"),
        ([3, VOCAB], f"token id {VOCAB}"),
        ([-1], "token id -1"),
        ([3] * (CONTEXT + 2), "by 2"),
    ],
)
def test_tokens_that_cannot_run_are_refused(bundle: Path, ids: list[int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_session(bundle).forward(ids)


def test_threads_reach_onnxruntime_and_must_be_positive(bundle: Path) -> None:
    for threads, wanted in ((1, 1), (3, 3), (None, host.threads())):
        native = open_session(bundle, threads=threads)._native
        assert native.get_session_options().intra_op_num_threads == wanted
    with pytest.raises(ConfigError, match="threads is 0"):
        open_session(bundle, threads=0)


# ---- greedy


def test_greedy_tokens_equal_a_loop_without_a_cache(
    bundle: Path, reference: Reference, adapter: dict[str, np.ndarray]
) -> None:
    tuned = generate(bundle, PROMPT, max_new_tokens=20)
    base = generate(load_bundle(bundle), PROMPT, max_new_tokens=20, adapter=False)
    assert list(tuned.token_ids) == reference.greedy(byte_ids(PROMPT), 20, adapter)
    assert list(base.token_ids) == reference.greedy(byte_ids(PROMPT), 20)
    assert len(set(base.token_ids)) > 5, "a constant answer would hide errors of the cache"
    assert tuned.token_ids != base.token_ids
    assert tuned.prompt_tokens == len(byte_ids(PROMPT))
    assert tuned.time_to_first_token_ms > 0


def test_pieces_add_up_to_the_text_and_the_text_is_the_decoded_ids(bundle: Path) -> None:
    from tokenizers import Tokenizer

    pieces: list[str] = []
    answer = generate(bundle, PROMPT, max_new_tokens=25, temperature=1.0, seed=2, on_text=pieces.append)
    assert "".join(pieces) == answer.text == str(answer)
    assert answer.text == Tokenizer.from_file(str(bundle / "tokenizer.json")).decode(list(answer.token_ids))
    assert len(pieces) > 3, "nothing was streamed"


def test_a_stop_token_ends_the_answer_and_is_not_part_of_it(tmp_path: Path) -> None:
    answer = generate(scripted(tmp_path, "naïve 🙂"), "Q")
    assert (answer.text, answer.stop_reason) == ("naïve 🙂", "stop_token")
    assert list(answer.token_ids) == byte_ids("naïve 🙂")


def test_max_new_tokens_ends_the_answer(tmp_path: Path) -> None:
    answer = generate(scripted(tmp_path, "abcdef"), "Q", max_new_tokens=3)
    assert (answer.text, answer.stop_reason, len(answer.token_ids)) == ("abc", "length", 3)
    assert generate(tmp_path / "scripted", "Q", max_new_tokens=1).generation_tokens_per_second is None


def test_an_unfinished_character_at_the_end_is_marked(tmp_path: Path) -> None:
    assert generate(scripted(tmp_path, "aé"), "Q", max_new_tokens=2).text == "a\ufffd"


def test_the_context_ends_the_answer(bundle: Path, reference: Reference) -> None:
    prompt = "x" * (CONTEXT - 4)
    answer = generate(bundle, prompt, adapter=False, max_new_tokens=50)
    assert list(answer.token_ids) == reference.greedy(byte_ids(prompt), 4)
    assert answer.stop_reason == "context"
    assert generate(bundle, prompt, adapter=False, max_new_tokens=4).stop_reason == "length"
    with pytest.raises(ConfigError, match=rf"has {CONTEXT} tokens .* is {CONTEXT}: .*by at least 1"):
        generate(bundle, "x" * CONTEXT)


# ---- stop strings


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("STOP", "one ST two "),
        (["zz", "ST"], "one "),
        (["three", "two STOP"], "one ST "),
        (["nowhere"], "one ST two STOP three"),
        (["three!"], "one ST two STOP three"),
    ],
)
def test_stop_strings_are_never_shown(tmp_path: Path, stop: str | list[str], text: str) -> None:
    pieces: list[str] = []
    answer = generate(scripted(tmp_path, "one ST two STOP three"), "Q", stop=stop, on_text=pieces.append)
    assert answer.text == text
    assert "".join(pieces) == text
    wanted = "stop_token" if text.endswith("three") else "stop_string"
    assert answer.stop_reason == wanted


def test_text_is_held_back_no_longer_than_needed(tmp_path: Path) -> None:
    pieces: list[str] = []
    generate(scripted(tmp_path, "aababx"), "Q", stop=["abc"], on_text=pieces.append)
    assert pieces == ["a", "ab", "abx"]


# ---- sampling


def brute_force(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """The filters by their definition, one token at a time."""
    chances = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    ranked = sorted(range(len(logits)), key=lambda i: -chances[i])
    kept = ranked[: top_k or len(ranked)]
    total, nucleus, reached = sum(chances[i] for i in kept), [], 0.0
    for i in kept:
        if reached >= top_p:
            break
        nucleus.append(i)
        reached += chances[i] / total
    result = np.zeros(len(logits))
    result[nucleus] = chances[nucleus] / chances[nucleus].sum()
    return result


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 4, 99])
@pytest.mark.parametrize("top_p", [1e-9, 0.4, 0.9, 1.0])
def test_filters_equal_brute_force(temperature: float, top_k: int, top_p: float) -> None:
    logits = np.random.default_rng(7).standard_normal(23).astype(np.float32) * 3
    got = sampling_probabilities(logits, Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    np.testing.assert_allclose(got, brute_force(logits.astype(np.float64), temperature, top_k, top_p), atol=1e-9)


def test_draws_follow_the_softmax() -> None:
    logits = np.array([2.0, -1.0, 0.5, 1.0, 0.0], np.float32)
    sampling, rng, count = Sampling(temperature=0.7), np.random.default_rng(0), 20_000
    drawn = np.bincount([choose_token(logits, sampling, rng) for _ in range(count)], minlength=5) / count
    np.testing.assert_allclose(drawn, np.exp(logits / 0.7) / np.exp(logits / 0.7).sum(), atol=0.01)


def test_extreme_logits_stay_finite() -> None:
    chances = sampling_probabilities(np.array([1e30, -1e30, 1e30], np.float32), Sampling(temperature=1e-3))
    np.testing.assert_array_equal(chances, [0.5, 0.0, 0.5])


def test_a_seed_fixes_the_answer_and_another_changes_it(bundle: Path) -> None:
    first, again, other = (
        generate(bundle, PROMPT, max_new_tokens=12, temperature=1.5, seed=seed).token_ids for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"stop": ["a", ""]}, r"stop is \('a', ''\)"),
        ({"system": "be brief"}, "system is set and chat is not"),
    ],
)
def test_settings_out_of_range_are_refused(bundle: Path, setting: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generate(bundle, PROMPT, **setting)  # type: ignore[arg-type]


# ---- chat


def test_chat_goes_through_the_template(bundle: Path, reference: Reference) -> None:
    answer = generate(bundle, "hi", chat=True, system="S", adapter=False, max_new_tokens=6)
    text = "<|system|>S</s><|user|>hi</s><|assistant|>"
    ids = [i for part in text.split("</s>") for i in [*byte_ids(part), EOS]][:-1]
    assert list(answer.token_ids) == reference.greedy(ids, 6)
    assert answer.prompt_tokens == len(ids)


def test_the_first_token_is_added_to_a_prompt_and_not_to_a_template(tmp_path: Path, reference: Reference) -> None:
    folder = write_bundle(tmp_path / "bundle", reference, bos=True)
    assert list(generate(folder, "hi", max_new_tokens=6).token_ids) == reference.greedy([1, *byte_ids("hi")], 6)
    templated = [*byte_ids("<|user|>hi"), EOS, *byte_ids("<|assistant|>")]
    assert list(generate(folder, "hi", chat=True, max_new_tokens=6).token_ids) == reference.greedy(templated, 6)


def test_chat_without_a_template_says_so(tmp_path: Path, reference: Reference) -> None:
    folder = write_bundle(tmp_path / "bundle", reference, chat_template=False)
    with pytest.raises(ModelError, match="no chat template"):
        generate(folder, "hi", chat=True)


# ---- what stays out


def test_running_imports_nothing_of_the_workbench(bundle: Path) -> None:
    script = (
        "import sys, json, edgetune.benchmark, edgetune.runtime.evaluate\n"
        "from edgetune.runtime.generate import generate\n"
        f"text = str(generate({str(bundle)!r}, 'hi', chat=True, max_new_tokens=3, temperature=1.0))\n"
        "banned = {'torch', 'onnx', 'onnx_ir', 'bitsandbytes', 'transformers', 'peft', 'ml_dtypes'}\n"
        "print(json.dumps([sorted(banned & set(sys.modules)), 'onnxruntime' in sys.modules]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [[], True]
