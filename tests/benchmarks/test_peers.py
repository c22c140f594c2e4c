"""Models for the peers, read back from the files; and where peers are installed and prepared."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.peers import catalog, compressed_tensors, environments
from kserve_llm.errors import BenchmarkError

QUANTIZED = "model.layers.1.mlp.down_proj.weight"


def test_compressed_tensors_checkpoint_keeps_weights_within_half_a_step(tiny_model: Path, tmp_path: Path) -> None:
    target = tmp_path / "int8"
    compressed_tensors.write(tiny_model, target)
    before, after = compressed_tensors.read(tiny_model), compressed_tensors.read(target)
    linear = {name for name in before if name.endswith("_proj.weight")}
    assert len(linear) == 2 * 7
    assert after.keys() == before.keys() | {f"{name}_scale" for name in linear}
    for name, weight in before.items():
        if name not in linear:
            assert torch.equal(after[name], weight)
            continue
        scale = after[f"{name}_scale"]
        assert (after[name].dtype, scale.shape) == (torch.int8, (len(weight), 1))
        assert after[name].abs().amax(dim=1).eq(127).all(), "every channel uses the whole range"
        error = (after[name] * scale - weight.float()).abs()
        assert (error <= scale / 2 * 1.01).all()


def test_compressed_tensors_config_declares_channel_scales_and_token_activations(
    tiny_model: Path, tmp_path: Path
) -> None:
    compressed_tensors.write(tiny_model, tmp_path / "int8")
    config = json.loads((tmp_path / "int8" / "config.json").read_text())
    assert config["hidden_size"] == 64
    quantization = config["quantization_config"]
    assert (quantization["quant_method"], quantization["format"]) == ("compressed-tensors", "int-quantized")
    group = quantization["config_groups"]["group_0"]
    assert (group["weights"]["strategy"], group["weights"]["num_bits"]) == ("channel", 8)
    assert (group["input_activations"]["strategy"], group["input_activations"]["dynamic"]) == ("token", True)
    assert (tmp_path / "int8" / "tokenizer.json").read_bytes() == (tiny_model / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(("file_type", "types", "steps"), [("q8_0", {"Q8_0"}, 127), ("q4_0", {"Q8_0", "Q4_0"}, 7)])
def test_gguf_file_has_the_weights_and_the_vocabulary(
    tiny_model: Path, tmp_path: Path, file_type: str, types: set[str], steps: int
) -> None:
    gguf: Any = pytest.importorskip("gguf")
    from benchmarks.peers import gguf_file

    target = tmp_path / "model.gguf"
    gguf_file.write(tiny_model, target, file_type)
    reader = gguf.GGUFReader(target)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    weights = compressed_tensors.read(tiny_model)
    assert len(tensors) == len(weights)
    assert {tensor.tensor_type.name for tensor in reader.tensors} == types | {"F32"}
    assert tensors["token_embd.weight"].tensor_type.name == "Q8_0"

    down = weights[QUANTIZED].float().numpy()
    stored = gguf.dequantize(tensors["blk.1.ffn_down.weight"].data, tensors["blk.1.ffn_down.weight"].tensor_type)
    assert abs(stored - down).max() <= abs(down).max() / steps

    fields = {name: reader.fields[f"llama.{name}"].contents() for name in ("block_count", "attention.head_count_kv")}
    assert fields == {"block_count": 2, "attention.head_count_kv": 2}
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert (len(tokens), tokens[7]) == (2256, "\u0120w7")


def test_gguf_file_pairs_rows_that_are_rotated_together(tiny_model: Path, tmp_path: Path) -> None:
    """Rows i and i + head_dim / 2 of a head become neighbors; values keep their rows."""
    gguf: Any = pytest.importorskip("gguf")
    from benchmarks.peers import gguf_file

    gguf_file.write(tiny_model, tmp_path / "model.gguf", "q8_0")
    [stored] = [
        gguf.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors
        if tensor.name == "blk.0.attn_q.weight"
    ]
    query = compressed_tensors.read(tiny_model)["model.layers.0.self_attn.q_proj.weight"].float().numpy()
    tolerance = abs(query).max() / 127
    for row, source in ((0, 0), (1, 8), (2, 1), (15, 15), (16, 16), (17, 24)):
        assert abs(stored[row] - query[source]).max() <= tolerance


def test_gguf_file_of_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from benchmarks.peers import gguf_file

    (tmp_path / "config.json").write_text('{"model_type": "gemma3"}')
    with pytest.raises(BenchmarkError, match=r"gemma3.*--peers"):
        gguf_file.write(tmp_path, tmp_path / "model.gguf", "q8_0")


def test_environment_leaves_out_extras_and_image_packages() -> None:
    requirements = [
        "torch==2.13.0",
        "torchvision",
        'torchaudio; platform_machine != "s390x"',
        'x; extra == "dev"',
        "six>=1",
    ]
    assert environments.needed([*requirements, "torchcodec>=0.14"]) == ["torch==2.13.0", "six>=1"]


def test_peer_that_is_not_installed_is_named_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"benchmarks\.peers install vllm --peers_dir") as caught:
        catalog.prepared("vllm-bf16", tmp_path, tmp_path / "peers")
    assert "--peers" in str(caught.value)


def install(peers_dir: Path, name: str) -> None:
    """Create what an installed environment is recognized by."""
    interpreter = peers_dir / name / "bin" / "python"
    interpreter.parent.mkdir(parents=True)
    interpreter.touch()


def test_catalog_prepares_each_model_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []

    def prepare(model_dir: Path, peers_dir: Path, target: Path) -> None:
        assert (model_dir, peers_dir) == (model, tmp_path)
        written.append(target)
        target.touch()

    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    install(tmp_path, "vllm")
    monkeypatch.setitem(catalog.PEERS, "vllm-int8", catalog.Peer("vllm", prepare, lambda *_: []))
    first = catalog.prepared("vllm-int8", model, tmp_path)
    assert catalog.prepared("vllm-int8", model, tmp_path) == first
    assert (first.exists(), len(written)) == (True, 1)
    (model / "config.json").write_text('{"hidden_size": 1}')
    assert catalog.prepared("vllm-int8", model, tmp_path) != first
    assert len(written) == 2


def test_catalog_commands_use_all_cores_and_the_same_number_of_sequences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {2, 5, 7})
    for environment in environments.INSTALL:
        install(tmp_path, environment)
    commands = {name: peer.command(tmp_path, Path("/model"), 8123) for name, peer in catalog.PEERS.items()}
    options = {
        "vllm-bf16": ("--max-num-seqs", "32", None),
        "llamacpp-q8_0": ("--parallel", "32", ("--threads", "3")),
        "openvino-int4": ("--max_num_seqs", "32", None),
    }
    for name, (option, value, threads) in options.items():
        command = commands[name]
        assert command[command.index(option) + 1] == value
        assert command[command.index("--port") + 1] == "8123"
        if threads:
            assert command[command.index(threads[0]) + 1] == threads[1]
    assert catalog.environment(tmp_path, "vllm")["VLLM_CPU_OMP_THREADS_BIND"] == "2,5,7"


SERVER = """#!{python}
import http.server, json, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({{"data": [{{"id": "model"}}]}}).encode())

    def do_POST(self):
        if {crashes}:
            self.server.socket.close()
            import os; os._exit(139)
        self.do_GET()

port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.mark.parametrize(("crashes", "said", "build"), [(True, "off: ", "build-no-amx"), (False, "used", "build")])
def test_llamacpp_uses_amx_only_if_it_completes_a_prompt(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crashes: bool, said: str, build: str
) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setattr(environments, "has_amx", lambda: True)
    install(tmp_path, "llamacpp")
    program = environments.llama_server(tmp_path, amx=True)
    program.parent.mkdir(parents=True)
    program.write_text(SERVER.format(python=sys.executable, crashes=crashes))
    program.chmod(0o755)
    model = catalog.prepared("llamacpp-q8_0", tiny_model, tmp_path)
    assert catalog.amx_of_llamacpp(tmp_path).startswith(said)
    command = catalog.PEERS["llamacpp-q8_0"].command(tmp_path, model, 8123)
    assert command[0] == str(tmp_path / "llamacpp" / build / "bin" / "llama-server")
