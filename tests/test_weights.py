"""Weights of encoders: what a file that does not fit says, the digest, and the hub, served here by a local server."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import huggingface_hub.constants
import pytest
import safetensors.torch
import timm
import torch

from mclstexp.errors import ConfigError, ModelError
from mclstexp.model.encoders import PooledEncoder, build_encoder
from mclstexp.model.frozen import FrozenEncoder, frozen_encoder
from mclstexp.model.hub import download
from mclstexp.model.presets import PRESETS, Preset
from mclstexp.model.weights import fitting_state, load_state, load_weights, require_encoder, weights_digest
from mclstexp.settings import ModelConfig

COMMIT, NEWEST = "a" * 40, "b" * 40


def test_a_file_that_does_not_fit_names_tensors_of_each_kind_and_the_preset_that_it_fits() -> None:
    with torch.device("meta"):
        optimus = build_encoder("h-optimus-0", 224).network.state_dict()
        gigapath = build_encoder("gigapath", 224)
    with pytest.raises(ModelError) as error:
        load_state(gigapath, optimus, "file.bin")
    message = str(error.value)
    assert message.startswith("the weights file.bin do not fit the encoder: tensors are 1 left over: reg_token; ")
    assert "pos_embed (1, 256, 1536) instead of (1, 197, 1536)" in message
    assert message.endswith("; they fit model.image_encoder=h-optimus-0 or h-optimus-1")
    del optimus["blocks.3.ls1.gamma"]
    with pytest.raises(ModelError, match=r"tensors are 1 missing: blocks\.3\.ls1\.gamma; 1 left over") as error:
        load_state(gigapath, optimus, "file.bin")
    assert "they fit" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"damaged", r"is damaged or holds more than tensors; save the network's state dict alone, with safetensors"),
        (b"", "cannot be read as weights: EOFError"),
        ({"state_dict": {}, "epoch": 3}, "contains no state dict of tensors but state_dict, epoch; save"),
        ({"x": object}, "is damaged or holds more than tensors"),
        (None, "no such file; give a file, hub, imagenet or random"),
    ],
)
def test_a_file_that_holds_no_weights_says_what_to_save(tmp_path: Path, content: object, fault: str) -> None:
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    for read in (lambda config: load_weights(build_encoder("small_cnn", 32), config), _frozen):
        with pytest.raises(ModelError, match=fault) as error:
            read(ModelConfig(image_encoder="small_cnn", image_weights=str(path)))
        assert "\n" not in str(error.value)
        assert "weights_only" not in str(error.value)


def _frozen(config: ModelConfig) -> FrozenEncoder:
    return frozen_encoder(config, 32, 0)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda value: value.fill_(float("nan")), r"are damaged: 0\.weight is not finite; fetch the file again"),
        (lambda value: value.long(), r"1 of another kind: 0\.weight torch\.int64 instead of torch\.float32"),
    ],
)
def test_numbers_that_no_encoder_has_are_refused(tmp_path: Path, change, fault: str) -> None:
    state = build_encoder("small_cnn", 32).network.state_dict()
    state["0.weight"] = change(state["0.weight"])
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ModelError, match=fault):
        _frozen(ModelConfig(image_encoder="small_cnn", image_weights=str(tmp_path / "weights.pth")))


def test_names_that_an_encoder_knows_are_not_modernised() -> None:
    encoder = build_encoder("timm/volo_d1_224", 224)
    own = encoder.network.state_dict()
    assert any(".conv.1." in name for name in own)
    assert fitting_state(encoder, own, "file.bin").keys() == encoder.state_dict().keys()


def test_weights_for_tiles_of_another_size_say_so() -> None:
    small, large = (build_encoder("timm/vit_tiny_patch16_224", size) for size in (32, 64))
    with pytest.raises(
        ModelError, match=r"1 of another shape: pos_embed .*; .* tiles\.size_px must be that of"
    ) as error:
        load_state(small, large.network.state_dict(), "file.bin")
    assert "they fit" not in str(error.value)


def _digest(encoder: PooledEncoder) -> str:
    return weights_digest(encoder.state_dict())


def test_a_digest_depends_on_names_shapes_types_and_numbers_but_not_on_the_layout() -> None:
    torch.manual_seed(0)
    encoder, same, other = (build_encoder("small_cnn", 32) for _ in range(3))
    same.load_state_dict({f"features.{name}": value for name, value in encoder.network.state_dict().items()})
    assert _digest(encoder) == _digest(same) != _digest(other)
    with torch.no_grad():
        same.network.get_parameter("0.weight")[0, 0, 0, 0] += 1e-6
    assert _digest(encoder) != _digest(same)
    assert _digest(encoder) != _digest(encoder.half())


class _Hub(BaseHTTPRequestHandler):
    """Answers as the hub does, for files as (repository, file)."""

    files: ClassVar[dict[tuple[str, str], bytes]] = {}
    gated: tuple[str, ...] = ()
    tokens: ClassVar[list[str | None]] = []

    def _answer(self) -> None:
        owner, name, _, revision, file = self.path.strip("/").split("/")
        repository = f"{owner}/{name}"
        self.tokens.append(self.headers.get("Authorization"))
        content = self.files.get((repository, file))
        problem = "GatedRepo" if repository in self.gated else None if content is not None else "EntryNotFound"
        self.send_response(403 if problem == "GatedRepo" else 404 if problem else 200)
        if problem:
            self.send_header("X-Error-Code", problem)
        content = content or b""
        self.send_header("X-Repo-Commit", NEWEST if revision == "main" else revision)
        self.send_header("ETag", f'"{len(content)}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_GET = do_HEAD = _answer

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Hub]]:
    """A hub with one encoder, its weights in the second of the names that are tried."""
    torch.manual_seed(5)
    source = timm.create_model("resnet10t", num_classes=0)
    torch.save(source.state_dict(), tmp_path / "file")
    monkeypatch.setattr(_Hub, "files", {("lab/Net", "pytorch_model.bin"): (tmp_path / "file").read_bytes()})
    monkeypatch.setattr(_Hub, "tokens", [])
    monkeypatch.setitem(PRESETS, "net", Preset("timm/resnet10t", hub="lab/Net"))
    monkeypatch.setitem(PRESETS, "pinned", Preset("timm/resnet10t", hub="lab/Net", commit=COMMIT))
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"  # HF_ENDPOINT counts only when the library is imported
    template = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE
    template = template.replace(huggingface_hub.constants.ENDPOINT, endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    download.cache_clear()
    yield _Hub
    download.cache_clear()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("name", "commit"), [("net", NEWEST), ("pinned", COMMIT)])
def test_weights_come_from_the_hub_with_their_commit(hub: type[_Hub], name: str, commit: str) -> None:
    config = ModelConfig(image_encoder=name, image_weights="hub")
    encoder = build_encoder(name, 32)
    load_weights(encoder, config)
    torch.manual_seed(5)
    expected = timm.create_model("resnet10t", num_classes=0).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in encoder.network.state_dict().items())

    asked = len(hub.tokens)
    record = frozen_encoder(config, 32, seed=0).record
    assert len(hub.tokens) == asked, "the hub is asked once"
    assert (record.hub, record.commit, record.uri) == ("lab/Net", commit, "hub")
    assert record.digest == _digest(encoder)
    assert set(hub.tokens) == {"Bearer hf_secret"}
    assert "hf_secret" not in record.model_dump_json() + config.model_dump_json()


def test_safetensors_come_before_pickles(hub: type[_Hub]) -> None:
    torch.manual_seed(6)
    other = timm.create_model("resnet10t", num_classes=0).state_dict()
    hub.files["lab/Net", "model.safetensors"] = safetensors.torch.save(other)
    encoder = build_encoder("net", 32)
    load_weights(encoder, ModelConfig(image_encoder="net", image_weights="hub"))
    assert torch.equal(encoder.network.get_parameter("conv1.0.weight"), other["conv1.0.weight"])


def test_a_gated_repository_says_how_to_get_in_and_shows_no_token(
    hub: type[_Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "gated", ("lab/Net",))
    with pytest.raises(ModelError, match=r"lab/Net cannot be read from the hub .*log in with `hf auth login`") as error:
        require_encoder("net", "hub")
    assert "hf_secret" not in str(error.value)


def test_a_repository_without_weights_and_an_encoder_without_repository_are_refused(hub: type[_Hub]) -> None:
    hub.files.clear()
    with pytest.raises(ModelError, match=r"lab/Net has none of model\.safetensors, pytorch_model\.bin, Net\.pth"):
        require_encoder("net", "hub")
    with pytest.raises(ConfigError, match="small_cnn is not on the hub; use random or a file"):
        require_encoder("small_cnn", "hub")


def test_what_the_hub_gave_once_is_found_without_it(hub: type[_Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the file has the second of the names that are tried."""
    first = download("lab/Net", COMMIT)
    download.cache_clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert download("lab/Net", COMMIT) == first


def test_a_hub_out_of_reach_names_the_file_setting(hub: type[_Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"give a file with --model\.image_weights FILE"):
        require_encoder("net", "hub")
