"""Names of models to folders: a local folder wins, a mistake is an error, and only a Hub id may reach the Hub."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_config, write_model

from edgetune.errors import MissingExtraError, ModelError
from edgetune.hub import model_folder
from edgetune.tokenizer import load_tokenizer

COMMIT = "a" * 40


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Fails every connection and lookup; the list holds the attempts."""
    attempts: list[object] = []

    def refuse(*args: object, **kwargs: object) -> None:
        attempts.append(args)
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return attempts


def populate_cache(cache: Path, repo_id: str) -> Path:
    """The layout that huggingface_hub gives its cache: blobs, and a snapshot of links to them."""
    repo = cache / f"models--{repo_id.replace('/', '--')}"
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    (repo / "blobs").mkdir()
    for i, file in enumerate(sorted(write_model(cache / "source", tiny_config("llama")).iterdir())):
        blob = repo / "blobs" / f"{i:064x}"
        file.rename(blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """huggingface_hub reads its environment when it is imported, so these tests need a process of their own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_local_folder_wins_and_nothing_connects(tmp_path: Path, no_network: list[object]) -> None:
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    assert model_folder(folder) == folder
    assert model_folder(str(folder)) == folder
    assert no_network == []


def test_local_folder_named_like_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: list[object]
) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert model_folder("org/name") == Path("org/name")
    assert no_network == []


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert model_folder("~/model") == tmp_path / "model"


def test_local_folder_does_not_import_the_hub_client(tmp_path: Path) -> None:
    code = (
        "import sys; from edgetune.hub import model_folder\n"
        f"model_folder({str(tmp_path)!r})\n"
        "assert not any(name.split('.')[0] in ('huggingface_hub', 'httpx', 'requests') for name in sys.modules)"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "model",
    [
        "./org/name", "../name", "~/no-such-folder", "/no/such/folder", "a/b/c", "SmolLM2-135M", "SmolLM2-135M/",
        "org/", "/org", "org/name/", "or g/name", "org/name\n", "örg/name", "-x/name", "x\0y", Path("org/name"), "https://hub/x",
    ],
)  # fmt: skip
def test_what_is_no_hub_id_never_connects(
    model: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: list[object]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelError, match="does not exist"):
        model_folder(model)
    assert no_network == []


def test_mistyped_folder_under_an_existing_one_is_not_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: list[object]
) -> None:
    (tmp_path / "models" / "SmolLM2-135M").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"Did you mean models/SmolLM2-135M\?"):
        model_folder("models/SmolLM2-153M")
    assert no_network == []


def test_near_folders_are_suggested_where_the_path_ends(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    with pytest.raises(ModelError, match=rf"{tmp_path} has no modles. Did you mean {tmp_path / 'models'}\?"):
        model_folder(tmp_path / "modles" / "deep" / "er")


@pytest.mark.parametrize("model", ["", " ", Path()])
def test_empty_path(model: str | Path) -> None:
    with pytest.raises(ModelError, match="empty path"):
        model_folder(model)


@pytest.mark.parametrize("model", ["x" * 5000, "~nobody-of-this-name/x"])
def test_what_is_no_path_at_all(model: str) -> None:
    with pytest.raises(ModelError, match="is not a path"):
        model_folder(model)


def test_file_in_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=f"is a file; .*Try {tmp_path}"):
        model_folder(tmp_path / "model.safetensors")


def test_missing_client_is_named_with_its_install_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'edgetune\[hub\]'"):
        model_folder("org/name")


def test_offline_on_a_populated_cache(tmp_path: Path) -> None:
    snapshot = populate_cache(tmp_path / "hub", "org/name")
    code = (
        "import socket\n"
        "def refuse(*a, **k): raise SystemExit('connected')\n"
        "socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse\n"
        "from edgetune.hub import model_folder; print(model_folder('org/name'))"
    )
    done = run_python(code, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == snapshot
    assert load_tokenizer(snapshot).encode("a") == [3 + ord("a") - ord("!")]


def test_offline_without_the_model_says_what_to_do(tmp_path: Path) -> None:
    code = (
        "from edgetune.hub import model_folder; from edgetune.errors import ModelError\n"
        "try: model_folder('org/other')\n"
        "except ModelError as error: print(error)"
    )
    done = run_python(code, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert done.stdout == (
        "There is no local folder org/other, and the Hub did not give a model of that name: HF_HUB_OFFLINE is set and "
        "the cache does not hold it. Unset it, or download the model elsewhere and give its folder.\n"
    ), done.stderr


def test_network_failure_says_what_to_do(tmp_path: Path) -> None:
    code = (
        "import socket\n"
        "def refuse(*a, **k): raise OSError('no network in this test')\n"
        "socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse\n"
        "from edgetune.hub import model_folder; from edgetune.errors import ModelError\n"
        "try: model_folder('org/other')\n"
        "except ModelError as error: print(error)"
    )
    done = run_python(code, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="0")
    assert done.stdout == (
        "There is no local folder org/other, and the Hub did not give a model of that name: it cannot be reached, and "
        "the cache does not hold it. Check the connection, or download the model elsewhere and give its folder.\n"
    ), done.stderr


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "GatedRepoError",
            r"name: it is gated\. Accept its terms on its page and log in with `hf auth login`, or down",
        ),
        ("RepositoryNotFoundError", r"name: there is none, or it is private\. Check the name, or log in with"),
        ("Unheard", rf"name: Unheard: {'x' * 120}\. Check the name and the connection, or download"),
    ],
)
def test_what_the_hub_refuses_is_said_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, message: str
) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    errors = pytest.importorskip("huggingface_hub.errors")
    error = getattr(errors, kind, type(kind, (Exception,), {}))

    def snapshot_download(repo_id: str, **_: object) -> str:
        raise error.__new__(error, "x" * 500 + "\nand a second line")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ModelError, match=message) as caught:
        model_folder("org/name")
    assert "\n" not in str(caught.value)


def test_only_safetensors_and_what_describes_them_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fnmatch import fnmatch

    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked: list[list[str]] = []

    def snapshot_download(repo_id: str, *, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert model_folder("org/name") == tmp_path
    wanted = [
        "config.json", "generation_config.json", "model.safetensors", "model-00001-of-00002.safetensors",
        "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
        "chat_template.jinja",
    ]  # fmt: skip
    unwanted = [
        "pytorch_model.bin", "modeling_x.py", "model.gguf", "original/consolidated.00.pth", "onnx/model.onnx",
        "adapter.pt", "README.md", "consolidated.safetensors",
    ]  # fmt: skip
    assert [name for name in wanted + unwanted if any(fnmatch(name, pattern) for pattern in asked[0])] == wanted
