"""One run of `jaxchat train`, from the request to what is written: joins data, setup and trainer."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxchat import memory
from jaxchat.checkpoints.adapter_write import Strength
from jaxchat.checkpoints.assembly import Assembly
from jaxchat.checkpoints.directory import ModelDirectory
from jaxchat.checkpoints.load import Progress, load_params
from jaxchat.checkpoints.quantized import Quant
from jaxchat.cli.chosen_model import ChosenModel
from jaxchat.cli.command_line import Ended, complain
from jaxchat.cli.progress_bar import counting_bar, training_bar
from jaxchat.cli.train_request import TrainRequest
from jaxchat.engine.compile_cache import enable_compilation_cache
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.layer_plan import LayerPlan
from jaxchat.layers.chimera import ChimeraConfig
from jaxchat.pallas import backends
from jaxchat.quant import QuantFormat
from jaxchat.text.named_templates import chosen_template
from jaxchat.training.batches import Batches
from jaxchat.training.data import Dataset, Encoder
from jaxchat.training.journal import SINKS, sink
from jaxchat.training.setups import SETUPS, Base, Choices, Setup
from jaxchat.training.trainer import LOSS, Settings, Trainer


def trained(request: TrainRequest, chosen: ChosenModel, progress: Progress | None) -> int:
    """Trains, writes what came of it, and returns the exit code."""
    backends.use_32_bits()
    enable_compilation_cache(None)
    directory, plan = _location(chosen)
    encoder = _encoder(request, directory)
    mesh = _mesh()
    data, held_out = _batches(request, encoder, mesh)
    sinks = [sink(_known_sink(name), Path(request.output_dir)) for name in request.report_to]
    out = _made(Path(request.output_dir))
    base = _base(request, chosen, directory, plan, mesh, progress)
    setup = SETUPS[request.task](base, _choices(request))
    settings = _settings(request)
    memory.require(
        3 * sum(leaf.nbytes for leaf in jax.tree.leaves(setup.initial)),
        backends.devices(),
        what="the gradients and AdamW's moments of what is trained",
        advice="train less: --task lora, a smaller --lora_rank, fewer new layers",
    )
    trainer = Trainer(
        setup.task,
        frozen=setup.frozen,
        initial=setup.initial,
        decayed=setup.decayed,
        data=data,
        held_out=held_out,
        settings=settings,
        directory=out,
        identity=_identity(request, base, data),
        resume=request.resume or request.eval_only,
        sinks=sinks,
        mesh=mesh,
    )
    try:
        return _evaluated(trainer) if request.eval_only else _run(request, trainer, setup, data)
    finally:
        trainer.close()


def _run(request: TrainRequest, trainer: Trainer, setup: Setup, data: Batches) -> int:
    if trainer.step:
        complain(f"goes on after step {trainer.step}, {trainer.done:.1%} of the run")
    before = trainer.begin()
    try:
        with training_bar(every=request.logging_steps) as report:
            outcome = trainer.run(report)
    except (KeyboardInterrupt, Ended):
        complain(
            f"interrupted after step {trainer.step}, which is saved in {request.output_dir}; the same "
            "command with --resume goes on"
        )
        raise
    dataset = data.dataset
    for count, what in (
        (dataset.skipped, "broken records were left out"),
        (dataset.empty, "records had no reply within --model_max_length to learn"),
        (dataset.unlearnt, "replies were not learnt: the chat template rewrites those that others follow"),
    ):
        if count:
            complain(f"{count} {what}")
    place = setup.export(outcome.state.trained, Path(request.output_dir))
    loss = f"loss {outcome.loss:.4f}"
    if outcome.best_loss is not None:
        loss = f"held-out loss {outcome.best_loss:.4f}"
        loss += f" (before: {before[LOSS]:.4f})" if before else ""
    early = ", ended early" if outcome.stopped_early else ""
    print(f"{place}: {loss} after {outcome.step} steps{early}; use it with\n  {setup.use(place)}")
    return 0


def _evaluated(trainer: Trainer) -> int:
    step = trainer.take_best()
    figures = trainer.evaluate()
    width = max(map(len, figures))
    print(f"after {step} steps")
    for name, value in figures.items():
        print(f"{name:<{width}}  {value:.4f}")
    return 0


# --- what a trainer takes


def _location(chosen: ChosenModel) -> tuple[ModelDirectory, LayerPlan]:
    """The one model that is trained on, and the plan over its layers."""
    source = chosen.source
    if not isinstance(source, Assembly):
        if not source.is_plain:
            raise UsageError(
                f"{source}: is stored with a layer plan or a recipe's layers; convert it with --to_hf first"
            )
        return source, chosen.plan
    if len(source.models) != 1 or any(layer.scales for layer in source.layers):
        raise UsageError(
            f"{chosen.recipe}: takes layers of {len(source.models)} models, or scales single tensors; what "
            "is trained has one model's layers: convert the recipe with --to_hf first, and train on that"
        )
    (model,) = source.models
    slots = tuple(dataclasses.replace(slot, layer=source.layers[slot.layer].layer) for slot in chosen.plan)
    return model, LayerPlan(slots, model.config.num_layers)


def _encoder(request: TrainRequest, directory: ModelDirectory) -> Encoder:
    tokenizer = directory.tokenizer
    if tokenizer is None:
        raise UsageError(f"{directory}: has no tokenizer, so texts cannot be made tokens; add its files")
    template = directory.template
    if request.chat_template is not None:
        template = chosen_template(request.chat_template, tokenizer, template)
    most = directory.config.max_position_embeddings
    return Encoder(
        tokenizer, template, max_length=min(request.model_max_length, most), train_on=request.train_on
    )


def _mesh() -> Mesh | None:
    """All devices along the data axis; None of one."""
    devices = backends.devices()
    return None if len(devices) == 1 else Mesh(np.array(devices).reshape(-1, 1), ("data", "model"))


def _batches(request: TrainRequest, encoder: Encoder, mesh: Mesh | None) -> tuple[Batches, Batches | None]:
    devices = 1 if mesh is None else mesh.shape["data"]
    size = request.per_device_train_batch_size * devices
    held = (request.per_device_eval_batch_size or request.per_device_train_batch_size) * devices
    options: dict[str, Any] = {"max_length": encoder.max_length, "seed": request.seed}

    def dataset(paths: Sequence[str]) -> Dataset:
        with counting_bar("reading", "records") as report:
            return Dataset(
                paths,
                encoder,
                skip_bad_lines=request.skip_bad_lines,
                lazy=request.lazy_preprocess,
                progress=report,
            )

    data = Batches(dataset(request.data_path), batch_size=size, packing=request.packing, **options)
    if not request.eval_data_path or (request.evaluation_strategy == "no" and not request.eval_only):
        return data, None
    return data, Batches(dataset(request.eval_data_path), batch_size=held, shuffle=False, **options)


def _base(
    request: TrainRequest,
    chosen: ChosenModel,
    directory: ModelDirectory,
    plan: LayerPlan,
    mesh: Mesh | None,
    progress: Progress | None,
) -> Base:
    on_cpu = backends.devices()[0].platform == "cpu"
    dtype = request.dtype or ("float32" if on_cpu else "bfloat16")
    quant: Quant = "auto" if request.frozen_quant is None else QuantFormat.parse(request.frozen_quant)
    config, params = load_params(directory, quant=quant, mesh=mesh, progress=progress)
    name = request.model or chosen.name
    return Base(
        directory=directory, name=name, config=config, params=params, plan=plan, dtype=jnp.dtype(dtype)
    )


def _choices(request: TrainRequest) -> Choices:
    checkpointing = request.gradient_checkpointing or request.task == "full"
    return Choices(
        strength=Strength(request.lora_rank, request.lora_alpha, request.use_rslora),
        dropout=request.lora_dropout,
        targets=request.lora_targets,
        heal_with=request.heal_with,
        temperature=request.temperature,
        label_weight=request.label_weight,
        kept="inputs" if checkpointing else "products",
        chimera=ChimeraConfig(
            kind=request.chimera_head, heads=request.chimera_num_heads, rank=request.chimera_rank
        ),
        chimera_losses=request.chimera_losses,
        seed=request.seed,
    )


_NEVER = sys.maxsize
_RATES = {"full": 2e-5}


def _settings(request: TrainRequest) -> Settings:
    def every(strategy: str | None, steps: int | None) -> int:
        """Steps between two, 0 for an epoch."""
        if strategy == "no":
            return _NEVER
        if strategy == "steps" or (strategy is None and steps is not None):
            return steps or 500  # transformers' default
        return 0

    return Settings(
        epochs=request.num_train_epochs,
        max_steps=request.max_steps,
        max_minutes=request.max_minutes,
        learning_rate=request.learning_rate or _RATES.get(request.task, 2e-4),
        schedule=request.lr_scheduler_type,
        warmup_ratio=request.warmup_ratio,
        weight_decay=request.weight_decay,
        max_grad_norm=request.max_grad_norm,
        accumulation=request.gradient_accumulation_steps,
        logging_steps=request.logging_steps,
        eval_steps=every(request.evaluation_strategy, request.eval_steps),
        save_steps=every(request.save_strategy, request.save_steps),
        evaluates=bool(request.eval_data_path) and request.evaluation_strategy != "no",
        keep=request.save_total_limit,
        patience=request.early_stopping_patience,
        seed=request.seed,
    )


_IDENTITY = (
    "task", "num_train_epochs", "max_steps", "max_minutes", "per_device_train_batch_size",
    "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "warmup_ratio", "weight_decay",
    "max_grad_norm", "seed", "model_max_length", "train_on", "packing", "lazy_preprocess", "chat_template",
    "lora_rank", "lora_alpha", "use_rslora", "lora_targets", "lora_dropout", "heal_with", "temperature",
    "label_weight", "chimera_num_heads", "chimera_head", "chimera_rank", "chimera_losses",
)  # fmt: skip
"""What must not change while a run is gone on with."""


def _identity(request: TrainRequest, base: Base, data: Batches) -> dict[str, Any]:
    found = {name: getattr(request, name) for name in _IDENTITY}
    found |= {"model": base.name, "plan": str(base.plan), "quant": request.frozen_quant}
    return found | {"dtype": base.dtype.name, "data": data.dataset.digest}


def _made(directory: Path) -> Path:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JaxchatError(
            f"{directory}: cannot be made ({error.strerror}); give another --output_dir"
        ) from None
    return directory


def _known_sink(name: str) -> str:
    if name not in SINKS:
        raise UsageError(f"--report_to {name}: expected {' or '.join(SINKS)}")
    return name
