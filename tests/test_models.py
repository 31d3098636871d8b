"""Opening models: hostile folders are refused, hub ids work against a server, names translate."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from qft import models
from qft.errors import ModelError, RecipeError
from qft.models import ModelSpec, Trust


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}), encoding="utf-8")


def test_missing_folder_names_what_is_there(tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match="does not exist") as caught:
        models.resolve_folder(f"{tiny_llama}/../no/such/")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("config", "task"),
    [
        ({"model_type": "bert", "architectures": ["BertModel"]}, "classify"),
        ({"model_type": "modernbert", "architectures": ["ModernBertForMaskedLM"]}, "classify"),
        ({"model_type": "bert", "architectures": ["BertLMHeadModel"], "is_decoder": True}, "text"),
        ({"model_type": "llama", "architectures": ["LlamaModel"]}, "text"),
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "text"),
        ({"model_type": "bart", "architectures": ["BartModel"], "is_encoder_decoder": True},
         "seq2seq"),
        ({"model_type": "bert", "architectures": ["BertForTokenClassification"]}, "token"),
        ({"model_type": "bert", models.TASK_KEY: "text"}, "text"),
    ],
)  # fmt: skip
def test_what_a_model_is_likely_trained_for(config: dict[str, object], task: str) -> None:
    assert models.task_to_train(config) == task


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        models.check_folder(tmp_path)


def test_broken_config(copy: Path) -> None:
    (copy / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="cannot be read"):
        models.check_folder(copy)


def test_unknown_architecture(copy: Path) -> None:
    change_json(copy / "config.json", model_type="no-such-model")
    with pytest.raises(ModelError, match="does not know"):
        models.open_model(copy, ModelSpec(str(copy)))


def test_truncated_shard(copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError) as caught:
        models.open_model(copy, ModelSpec(str(copy)))
    assert "model.safetensors" in str(caught.value)
    assert "100" in str(caught.value)


def test_absurd_header(copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes((2**60).to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(ModelError):
        models.open_model(copy, ModelSpec(str(copy)))


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_index_that_points_outside(copy: Path, name: str) -> None:
    (copy / "model.safetensors").rename(copy.parent / "outside.safetensors")
    (copy / "other.safetensors").write_bytes(b"")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ModelError) as caught:
        models.open_model(copy, ModelSpec(str(copy)))
    assert name in str(caught.value)


def test_pickle_is_refused_unless_allowed(copy: Path) -> None:
    from safetensors.torch import load_file

    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="pickle") as caught:
        models.open_model(copy, ModelSpec(str(copy)))
    assert "allow_pickle: true" in str(caught.value)
    models.open_model(copy, ModelSpec(str(copy), trust=Trust(pickle=True), device="cpu"))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_remote_code_is_refused(copy: Path, name: str, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (copy / "evil.py").write_text(f"open({str(ran)!r}, 'w')", encoding="utf-8")
    key = "AutoConfig" if name == "config.json" else "AutoTokenizer"
    change_json(copy / name, auto_map={key: "evil.Evil"})
    with pytest.raises(ModelError, match="code of its own"):
        models.open_model(copy, ModelSpec(str(copy)))
    assert not ran.exists()


def test_template_that_tries_to_break_out(copy: Path) -> None:
    from qft.data.chat import mask_assistant
    from qft.errors import QftError

    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    (copy / "chat_template.jinja").write_text(template, encoding="utf-8")
    tokenizer = models.open_tokenizer(copy)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(QftError) as caught:
        mask_assistant(tokenizer, messages)
    assert "template" in str(caught.value)


def test_broken_tokenizer(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match="tokenizer"):
        models.open_tokenizer(copy)


def test_stored_quantized_in_another_way(copy: Path) -> None:
    change_json(
        copy / "config.json",
        quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True},
    )
    with pytest.raises(RecipeError, match="another way"):
        models.open_model(copy, ModelSpec(str(copy), quantize="nf4"))


def test_names_of_a_bare_encoder(tiny_bert: Path) -> None:
    spec = ModelSpec(str(tiny_bert), task="classify", labels=("a", "b"))
    skeleton = models.open_skeleton(tiny_bert, spec)
    names = models.module_names(tiny_bert, skeleton)
    assert names["embeddings.word_embeddings.weight"] == "bert.embeddings.word_embeddings.weight"
    assert set(names.values()) == {n for n in skeleton.state_dict() if n.startswith("bert.")}


def test_old_layer_norm_names(tiny_bert: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny_bert, tmp_path / "old"))
    tensors = load_file(folder / "model.safetensors")
    renamed = {
        n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): t
        for n, t in tensors.items()
    }
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    spec = ModelSpec(str(folder), task="classify", labels=("a", "b"))
    names = models.module_names(folder, models.open_skeleton(folder, spec))
    key = "encoder.layer.0.output.LayerNorm.gamma"
    assert names[key] == "bert.encoder.layer.0.output.LayerNorm.weight"


def test_fingerprint_tells_models_apart(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    before = models.fingerprint(copy)
    assert before == models.fingerprint(copy)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert models.fingerprint(copy) != before


@pytest.mark.parametrize("kind", ["none", "int8", "nf4", "fp4"])
def test_heads_and_embeddings_stay_unquantized(tiny_llama: Path, kind: str) -> None:
    import bitsandbytes as bnb

    spec = ModelSpec(str(tiny_llama), quantize=kind, dtype=torch.float32, device="cpu")
    model = models.open_model(tiny_llama, spec)
    quantized = [
        n for n, m in model.named_modules()
        if isinstance(m, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))
    ]  # fmt: skip
    assert len(quantized) == (0 if kind == "none" else 14)
    assert "lm_head" not in quantized


class Hub(BaseHTTPRequestHandler):
    """The few routes of a model hub that fetching a snapshot takes."""

    root: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(path)
        commit = "0" * 40
        if path.startswith("/api/models/some/model"):
            files = sorted(p.name for p in self.root.iterdir())
            if "/tree/" in path:
                rows = [{"type": "file", "path": f, "size": (self.root / f).stat().st_size,
                         "oid": "0" * 40} for f in files]  # fmt: skip
                return self.send(json.dumps(rows).encode(), {}, body)
            siblings = [{"rfilename": name} for name in files]
            info = {"id": "some/model", "sha": commit, "siblings": siblings}
            return self.send(json.dumps(info).encode(), {}, body)
        name = path.rpartition("/")[2]
        if not path.startswith("/some/model/resolve/") or not (self.root / name).is_file():
            self.send_error(404)
            return None
        data = (self.root / name).read_bytes()
        etag = hashlib.sha256(data).hexdigest()
        return self.send(data, {"ETag": f'"{etag}"', "X-Repo-Commit": commit}, body)

    def send(self, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(200)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        """Silence."""


@pytest.fixture
def hub(copy: Path) -> Iterator[tuple[str, type[Hub]]]:
    handler = type("Served", (Hub,), {"root": copy, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()


def fetch_in_a_process(endpoint: str, home: Path, name: str) -> tuple[int, str]:
    """The hub's client reads its endpoint when it is imported."""
    import os
    import subprocess
    import sys

    code = (
        "import sys\nfrom qft import models\nfrom qft.errors import ModelError\n"
        "try:\n    folder = models.resolve_folder(sys.argv[1]); models.check_folder(folder)\n"
        "    print(sorted(p.name for p in folder.iterdir()))\n"
        "except ModelError as error:\n    print(error); sys.exit(error.exit_code)\n"
    )
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home),
                   "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, name], env=environment, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def test_hub_id_is_fetched_without_pickles_and_code(
    hub: tuple[str, type[Hub]], copy: Path, tmp_path: Path
) -> None:
    (copy / "pytorch_model.bin").write_bytes(b"pickle")
    (copy / "modeling.py").write_text("evil", encoding="utf-8")
    endpoint, handler = hub
    code, text = fetch_in_a_process(endpoint, tmp_path / "home", "some/model")
    assert code == 0, text
    assert "model.safetensors" in text
    assert ".bin" not in text
    assert ".py" not in text
    assert not any(path.endswith((".bin", ".py")) for path in handler.asked)


def test_hub_that_does_not_have_it(hub: tuple[str, type[Hub]], tmp_path: Path) -> None:
    code, text = fetch_in_a_process(hub[0], tmp_path / "home", "other/model")
    assert code == 2, text
    assert "the hub did not give it" in text
    assert "Traceback" not in text
