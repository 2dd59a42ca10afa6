"""GGUF files that are written, live in llama.cpp: greedy tokens are those of the model itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import jaxchat
from jaxchat.checkpoints.directory import ModelDirectory
from jaxchat.checkpoints.write import to_gguf
from tests.support.adapters import lora_tensors, projections
from tests.support.gguf_models import write_gguf_adapter

pytestmark = pytest.mark.parity

PEER = """
import json, sys
import xllamacpp
path, ids, count, adapter = json.load(sys.stdin)
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup = path, 256, 1, False
params.cpuparams.n_threads = 2
if adapter is not None:
    used = xllamacpp.CommonAdapterLoraInfo()
    used.path, used.scale = adapter
    params.lora_adapters = [used]
request = {
    "prompt": ids, "n_predict": count, "temperature": 0, "n_probs": 1, "ignore_eos": True,
    "cache_prompt": False,
}
answer = xllamacpp.Server(params).handle_completions(request)
answer = json.loads(answer) if isinstance(answer, str) else answer
print("\\n" + json.dumps([step["id"] for step in answer["choices"][0]["logprobs"]["content"]]))
"""


def in_llama_cpp(
    path: Path, ids: list[int], count: int, adapter: tuple[Path, float] | None = None
) -> list[int]:
    """Greedy tokens of llama.cpp, in a process of its own: it prints much, and may abort."""
    used = None if adapter is None else (str(adapter[0]), adapter[1])
    job = json.dumps([str(path), ids, count, used])
    done = subprocess.run(
        [sys.executable, "-c", PEER], input=job, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def greedy(model: jaxchat.Model, ids: list[int], count: int) -> list[int]:
    (found,) = model.generate(token_ids=[ids], max_new_tokens=count, temperature=0, ignore_eos=True)
    return found.token_ids


@pytest.mark.parametrize("quant", ["f32", "bf16", "q8_0", "q4_0", "q4_k_m", "q6_k"])
def test_llama_cpp_continues_greedily_like_the_file(shared_data: Path, quant: str, tmp_path: Path):
    source = shared_data / "models/TinyStories-656K/bf16"
    to_gguf(source, tmp_path / "m.gguf", quant=quant)
    model = jaxchat.load(tmp_path / "m.gguf", kernels="reference")
    ids = model.tokenizer.encode("Once upon a time there was a little")
    assert ids == jaxchat.load(source).tokenizer.encode("Once upon a time there was a little")
    found = in_llama_cpp(tmp_path / "m.gguf", ids, 16)
    assert found == greedy(model, ids, 16)
    if quant in ("f32", "bf16"):
        assert found == greedy(jaxchat.load(source, kernels="reference"), ids, 16)


def test_a_baked_plan_is_the_plan_in_llama_cpp(shared_data: Path, tmp_path: Path):
    source = shared_data / "models/stories260K-hf"
    to_gguf(source, tmp_path / "m.gguf", layer_spec="0:3,2:", quant="f32")
    model = jaxchat.load(source, plan="0:3,2:", kernels="reference")
    ids = model.tokenizer.encode("Once upon a time, Tom")
    assert in_llama_cpp(tmp_path / "m.gguf", ids, 16) == greedy(model, ids, 16)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_an_adapter_in_gguf_is_what_it_is_in_llama_cpp(shared_data: Path, strength: float, tmp_path: Path):
    source = shared_data / "models/TinyStories-656K/bf16"
    to_gguf(source, tmp_path / "m.gguf", quant="f32")
    directory = ModelDirectory.at(source)
    tensors = lora_tensors(projections(directory.config))
    adapter = write_gguf_adapter(tmp_path / "a.gguf", dict(directory.config_values), tensors)
    model = jaxchat.load(tmp_path / "m.gguf", adapter=f"{adapter}={strength}", kernels="reference")
    ids = model.tokenizer.encode("Once upon a time there was a little")
    found = in_llama_cpp(tmp_path / "m.gguf", ids, 16, (adapter, strength))
    assert found == greedy(model, ids, 16)
    assert found != greedy(model.with_adapters([]), ids, 16)
