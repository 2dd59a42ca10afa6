"""`jaxchat train`: LoRA, new blocks, healing of a shortened model, and whole models, on data files.

What can be asked for is in `cli/train_request.py`, what the tasks are in `training/setups.py`.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from jaxchat.cli.command_line import Command, Conflict, catch_interrupts
from jaxchat.cli.model_flags import BASE_NEEDS, MODEL_PATH_NEEDS
from jaxchat.cli.train_request import TrainRequest
from jaxchat.errors import JaxchatError, UsageError

_USAGE = """\
usage: {program} --task TASK -m DIR --data_path FILE --output_dir DIR [...]

Trains a part of a model on conversations or texts: low-rank adapters (lora),
new layers (blocks), the layers that a plan leaves (heal), or all of it (full);
or heads that draft for it (chimera).

  {program} --task lora -m box --data_path chats.jsonl --output_dir poet
  {program} --task blocks -m box --data_path tales.jsonl \\
      --output_dir longer --layer_spec 0:8,7,7
  {program} --task heal -m box --data_path tales.jsonl \\
      --output_dir shorter --layer_spec 0:4,5:
  {program} --task chimera -m box --data_path chats.jsonl --output_dir heads
  {program} --task lora -m box --data_path chats.jsonl --output_dir poet \\
      --resume

Data: JSON lines, or a JSON list, of {"text": ...}, {"messages": [...]}
(OpenAI), {"conversations": [...]} (ShareGPT) or {"instruction": ...,
"output": ...} (Alpaca); or a .txt file. Of conversations, what the assistant
says is learnt.
"""
_ONLY: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("lora_rank", "lora_alpha", "use_rslora", "lora_targets"), ("lora", "heal")),
    "lora_dropout": ("lora", "heal", "full"),
    **dict.fromkeys(
        ("chimera_num_heads", "chimera_num_layers", "chimera_head", "chimera_rank", "chimera_losses"),
        ("chimera",),
    ),
    **dict.fromkeys(("heal_with", "temperature", "label_weight"), ("heal",)),
}
"""Flag -> the tasks that heed it."""


def _run(request: TrainRequest, given: frozenset[str]) -> int:
    _refuse(request, given)
    _require_packages()
    chosen = request.or_boxed().chosen()
    catch_interrupts()
    # Imports JAX, which --help and usage errors need not wait for.
    from jaxchat.cli.progress_bar import loading_bar
    from jaxchat.cli.training import trained

    with loading_bar() as progress:
        return trained(request, chosen, progress)


def _refuse(request: TrainRequest, given: frozenset[str]) -> None:
    for name, tasks in _ONLY.items():
        if name in given and request.task not in tasks:
            raise UsageError(f"--{name} is for --task {' or '.join(tasks)}; this is --task {request.task}")
    if not request.data_path:
        raise UsageError("--data_path must be given; --help shows examples")
    if request.early_stopping_patience and not request.eval_data_path:
        raise UsageError("--early_stopping_patience needs --eval_data_path: data to evaluate on")
    if request.chimera_num_layers != 1:
        raise UsageError(
            f"--chimera_num_layers is {request.chimera_num_layers}; a Chimera has one layer: leave it out"
        )
    if request.eval_only and not request.eval_data_path:
        raise UsageError("--eval_only needs --eval_data_path: data to evaluate on")
    if request.eval_only and not Path(request.output_dir, "run.json").exists():
        raise UsageError(f"--eval_only: {request.output_dir} holds no run; train one there first")
    if request.task == "full" and request.frozen_quant:
        raise UsageError("--task full trains every weight; quantized ones cannot be: leave --quant out")


def _require_packages() -> None:
    for name in ("optax", "orbax", "matplotlib"):
        if importlib.util.find_spec(name) is None:
            raise JaxchatError(f"training needs {name}; pip install 'jaxchat[train]'")


COMMAND = Command(
    usage=_USAGE,
    request=TrainRequest,
    run=_run,
    stray="give data as --data_path FILE, the model as -m DIR",
    conflicts=(
        Conflict("max_steps", "max_minutes", "give one"),
        Conflict("load_in_8bit", "load_in_4bit", "give one"),
        Conflict("load_in_8bit", "quant", "they say the same, give one"),
        Conflict("load_in_4bit", "quant", "they say the same, give one"),
    ),
    needs=(BASE_NEEDS, MODEL_PATH_NEEDS),
)
