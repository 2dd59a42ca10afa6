"""The same model shape in torch, for `benchmarks.gpu`: transformers compiled, and a plain compiled loop.

Run by path, in an interpreter with torch (and transformers): torch_peer.py CONFIG_JSON PROMPT NEW PREFILL.
Weights are random bfloat16 (float32 on a CPU). Each half that fails is reported as such; one JSON line.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

REPEATS = 5


def median_seconds(run: Callable[[], Any], synchronize: Callable[[], None]) -> float:
    times = []
    for _ in range(REPEATS):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def plain_loop(torch: Any, config: dict[str, Any], prompt: int, new: int, prefill: int) -> dict[str, float]:
    """A decoder with a static cache, its step compiled with CUDA graphs; greedy, a host loop over tokens."""
    device, functional = ("cuda" if torch.cuda.is_available() else "cpu"), torch.nn.functional
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    width, inner = config["hidden_size"], config["intermediate_size"]
    size = width // heads
    rows = max(prompt + new, prefill) + 8

    def matrix(out: int, columns: int) -> Any:
        return torch.randn(out, columns, device=device, dtype=dtype) / columns**0.5

    layers = [
        {
            "qkv": matrix((heads + 2 * groups) * size, width),
            "o": matrix(width, heads * size),
            "up": matrix(2 * inner, width),
            "down": matrix(width, inner),
            "k": torch.zeros(1, groups, rows, size, device=device, dtype=dtype),
            "v": torch.zeros(1, groups, rows, size, device=device, dtype=dtype),
        }
        for _ in range(config["num_hidden_layers"])
    ]
    embedding, head = matrix(config["vocab_size"], width), matrix(config["vocab_size"], width)
    base = torch.arange(0, size, 2, device=device) / size
    angles = torch.outer(torch.arange(rows, device=device), config["rope_theta"] ** -base)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def norm(x: Any) -> Any:
        return functional.rms_norm(x, (width,))

    def rotate(x: Any, at: Any) -> Any:
        first, second = x.chunk(2, -1)
        c, s = cos[at], sin[at]
        return torch.cat((first * c - second * s, second * c + first * s), -1)

    def step(tokens: Any, at: Any) -> Any:
        """tokens [1, T] at positions `at` [T] -> the next token [1, 1]."""
        x = embedding[tokens]
        mask = torch.arange(rows, device=device)[None, :] <= at[:, None]
        for layer in layers:
            qkv = (
                functional.linear(norm(x), layer["qkv"]).view(1, -1, heads + 2 * groups, size).transpose(1, 2)
            )
            q, k, v = qkv.split((heads, groups, groups), 1)
            layer["k"][:, :, at], layer["v"][:, :, at] = rotate(k, at), v
            mixed = functional.scaled_dot_product_attention(
                rotate(q, at), layer["k"], layer["v"], attn_mask=mask, enable_gqa=True
            )
            x = x + functional.linear(mixed.transpose(1, 2).reshape(1, -1, heads * size), layer["o"])
            gate, up = functional.linear(norm(x), layer["up"]).chunk(2, -1)
            x = x + functional.linear(functional.silu(gate) * up, layer["down"])
        return functional.linear(norm(x[:, -1:]), head).argmax(-1)

    mode = "reduce-overhead" if device == "cuda" else "default"
    decode = torch.compile(step, mode=mode, fullgraph=True)
    synchronize = torch.cuda.synchronize if device == "cuda" else (lambda: None)

    def run() -> None:
        token = torch.zeros(1, 1, dtype=torch.long, device=device)
        for position in range(prompt, prompt + new):
            token = decode(token, torch.tensor([position], device=device)).clone()
            token.item()

    with torch.no_grad():
        long = torch.zeros(1, prefill, dtype=torch.long, device=device)
        positions = torch.arange(prefill, device=device)
        step(long, positions)
        prefill_s = median_seconds(lambda: step(long, positions), synchronize)
        run()
        decode_s = median_seconds(run, synchronize) / new
    return {"decode_tok_s": 1 / decode_s, "prefill_tok_s": prefill / prefill_s}


def transformers_generate(
    torch: Any, config: dict[str, Any], prompt: int, new: int, _: int
) -> dict[str, float]:
    """`generate` of transformers with a static cache, which compiles the decoding step."""
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    settings = transformers.AutoConfig.for_model(**config)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(settings, dtype=dtype).eval()
    ids = torch.ones(1, prompt, dtype=torch.long, device=device)
    synchronize = torch.cuda.synchronize if device == "cuda" else (lambda: None)

    def run(count: int) -> None:
        with torch.no_grad():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count,
                do_sample=False, cache_implementation="static", pad_token_id=0,
            )  # fmt: skip

    for count in (1, new, new):
        run(count)
    first = median_seconds(lambda: run(1), synchronize)
    return {"decode_tok_s": (new - 1) / (median_seconds(lambda: run(new), synchronize) - first)}


def main() -> int:
    config, prompt, new, prefill = json.loads(sys.argv[1]), *map(int, sys.argv[2:5])
    result: dict[str, Any] = {}
    for part in (plain_loop, transformers_generate):
        try:
            import torch

            result["torch"] = torch.__version__
            result[part.__name__] = part(torch, config, prompt, new, prefill)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        except Exception as error:  # torch or transformers missing, out of memory, not compilable
            result[part.__name__] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
