"""The other side of `benchmarks.training`: LoRA by PEFT on torch, a step for every line on standard input.

Run by path, in an interpreter with torch, transformers and peft: peft_peer.py DIRECTORY SETTINGS_JSON.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from safetensors.numpy import load_file


def main() -> None:
    """Reads numbers of steps, and prints loss and seconds of each."""
    directory, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    tokens = np.load(directory / "tokens.npy").astype(np.int64)
    base = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    config = peft.LoraConfig(
        r=settings["rank"], lora_alpha=settings["alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, config).train()
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, values in load_file(directory / "factors.safetensors").items():
            own[f"base_model.model.{name}.lora_A.default.weight"].copy_(torch.tensor(values))
    chosen = [values for values in model.parameters() if values.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=settings["learning_rate"], weight_decay=0)
    print(json.dumps({"version": f"peft {peft.__version__}"}), flush=True)
    for line in sys.stdin:
        ids = torch.tensor(tokens[int(line)])
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(chosen, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - start
        print(json.dumps({"loss": float(loss.detach()), "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
