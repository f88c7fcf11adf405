"""The hub's HTTP interface, as far as a pull uses it, served here on the loopback."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from services.cli import model
from services.common import base_model
from services.common.model_config import parse_config
from tests.unit.model.tensor_files import file_bytes, tensors_of

COMMIT = "0" * 40
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 172,
    "max_position_embeddings": 512,
    "num_attention_heads": 8,
    "num_hidden_layers": 5,
    "rms_norm_eps": 1e-05,
    "vocab_size": 512,
}
FILES = {
    "config.json": json.dumps(CONFIG).encode(),
    "model.safetensors": file_bytes(tensors_of(parse_config(CONFIG, {}))),
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "pytorch_model.bin": b"a pickle",
    "original/params.json": b"{}",
}


class Hub(BaseHTTPRequestHandler):
    files = FILES
    given: ClassVar[set[str]] = set()  # names of files whose bytes were asked for

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- as it is overridden
        pass

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        name = path.partition(f"/resolve/{COMMIT}/")[2]
        if path.startswith("/api/models/some/model/tree/"):
            body = json.dumps(self._tree()).encode()
        elif path.startswith("/api/models/some/model"):
            body = json.dumps(self._listing()).encode()
        elif name in self.files:
            body = self.files[name]
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{len(body):040}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if with_body:
            self.given.add(name)
            self.wfile.write(body)

    def _listing(self) -> dict[str, object]:
        siblings = [{"rfilename": name, "size": len(body)} for name, body in self.files.items()]
        return {"id": "some/model", "sha": COMMIT, "siblings": siblings}

    def _tree(self) -> list[dict[str, object]]:
        return [
            {"type": "file", "path": name, "size": len(body), "oid": f"{len(body):040}"}
            for name, body in self.files.items()
        ]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    Hub.given.clear()
    yield Hub
    server.shutdown()
    thread.join()
    server.server_close()


def ignore(stage: str, done: int, total: int) -> None:
    pass


@pytest.mark.usefixtures("hub")
def test_a_pull_takes_what_is_needed_and_nothing_else(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []

    def record(stage: str, done: int, total: int) -> None:
        seen.append((stage, done, total))

    folder = model.pull("some/model", home=tmp_path, progress=record)

    assert folder == tmp_path / "models" / "some--model"
    kept = {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert {file.name for file in folder.iterdir()} == kept | {"calumma.json"}
    size_bytes = sum(len(FILES[name]) for name in kept)
    assert seen[0] == ("downloading", 0, size_bytes)
    assert seen[-1] == ("downloading", size_bytes, size_bytes)
    assert list(folder.parent.iterdir()) == [folder]
    written = json.loads((folder / "calumma.json").read_text())
    assert (written["name"], written["source"]) == ("some/model", "hub:some/model")
    assert written["digest"] == base_model.folder_digest(folder)


def test_a_model_of_an_unsupported_kind_does_not_reach_the_cache(
    tmp_path: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.dumps(CONFIG | {"architectures": ["GPT2LMHeadModel"]}).encode()
    monkeypatch.setattr(hub, "files", FILES | {"config.json": config})

    with pytest.raises(base_model.UnsupportedModelError, match="GPT2LMHeadModel"):
        model.pull("some/model", home=tmp_path, progress=ignore)

    assert list((tmp_path / "models").iterdir()) == []
    assert "config.json" in hub.given
    assert "model.safetensors" not in hub.given


def test_weights_of_another_shape_do_not_reach_the_cache(
    tmp_path: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.dumps(CONFIG | {"vocab_size": 513}).encode()
    monkeypatch.setattr(hub, "files", FILES | {"config.json": config})

    with pytest.raises(base_model.ModelIncompleteError, match="embed_tokens"):
        model.pull("some/model", home=tmp_path, progress=ignore)

    assert list((tmp_path / "models").iterdir()) == []


@pytest.mark.usefixtures("hub")
def test_a_model_that_the_hub_does_not_have_is_named(tmp_path: Path) -> None:
    with pytest.raises(model.PullError, match="some/other"):
        model.pull("some/other", home=tmp_path, progress=ignore)
