"""What `jaxchat train` can be asked for: the dataclass that its flags fill. Needs no JAX."""

import dataclasses
import functools
import sys
from typing import Annotated, Literal

from jaxchat.cli.model_flags import MODEL, QUANT, ModelFlags
from jaxchat.options import Flag
from jaxchat.values import Range

_MODEL = dataclasses.replace(MODEL, help=f"{MODEL.help}. If not given, box", aliases=("model_name_or_path",))
_data = functools.partial(Flag, group="Data")
_steps = functools.partial(Flag, group="Steps")
_lora = functools.partial(Flag, group="LoRA (--task lora, heal)")
_heal = functools.partial(Flag, group="Healing (--task heal)")
_chimera = functools.partial(Flag, group="Chimera (--task chimera)")
_saving = functools.partial(Flag, group="Evaluation and checkpoints")

_ABOVE_0 = Range(float, sys.float_info.min, words="a number above 0")
_When = Literal["no", "steps", "epoch"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainRequest(ModelFlags):
    """What to train, on what, how, and where to write it."""

    model: Annotated[str | None, _MODEL] = None
    task: Annotated[
        Literal["lora", "blocks", "heal", "full", "chimera"],
        Flag(
            help="lora: low-rank deltas of the layers, written as a PEFT adapter. blocks: the layers that "
            "--layer_spec or --recipe adds (repetitions, or layers whose o_proj and down_proj are scaled to "
            "0): they begin as copies that change nothing, and only they are trained, as in LLaMA-Pro. heal: "
            "the layers that --layer_spec leaves learn what the whole model says. full: every parameter. "
            "chimera: heads that draft what the model says, for --draft",
            example="--task lora",
            value="TASK",
        ),
    ]
    output_dir: Annotated[
        str,
        Flag(
            help="The directory to write: checkpoints, metrics.jsonl, loss.png and, in the end, adapter/ "
            "(lora, heal), hf/ (a model as on Hugging Face) or chimera/",
            example="--output_dir poet",
            value="DIR",
        ),
    ]
    resume: Annotated[
        bool,
        Flag(
            help="Go on with the run in --output_dir from its last checkpoint, with the same flags; begin it "
            "if there is none",
            example="--resume",
        ),
    ] = False
    dtype: Annotated[
        str | None,
        Flag(
            help="Compute in float32 or bfloat16; what is trained is kept in float32 always. If not given, "
            "float32 on CPU, else bfloat16",
            example="--dtype bfloat16",
            value="TYPE",
            choices=("float32", "bfloat16"),
            group="Model",
        ),
    ] = None
    quant: Annotated[str | None, dataclasses.replace(QUANT, elsewhere=())] = None
    load_in_8bit: Annotated[
        bool,
        Flag(help="The same as --quant int8: what is frozen is kept at 8 bits", example="--load_in_8bit",
             group="Model"),
    ] = False  # fmt: skip
    load_in_4bit: Annotated[
        bool,
        Flag(help="The same as --quant int4", example="--load_in_4bit", group="Model"),
    ] = False
    chat_template: Annotated[
        str | None,
        Flag(
            help="Another prompt format than the model's own: a Jinja file, or a name such as vicuna_v1.1, "
            "alpaca, chatml",
            example="--chat_template chatml",
            value="NAME",
            group="Data",
        ),
    ] = None
    data_path: Annotated[
        tuple[str, ...],
        _data(
            help="A file of training data, or a folder of such; may be given more than once",
            example="--data_path chats.jsonl",
            value="FILE",
            many=True,
        ),
    ] = ()
    eval_data_path: Annotated[
        tuple[str, ...],
        _data(
            help="The same to evaluate on: the best state is kept, and written in the end",
            example="--eval_data_path held_out.jsonl",
            value="FILE",
            many=True,
        ),
    ] = ()
    model_max_length: Annotated[
        int,
        _data(
            help="Cut what is longer than so many tokens",
            example="--model_max_length 1024",
            low=2,
            elsewhere=("max_seq_length", "cutoff_len", "max_length"),
        ),
    ] = 1024
    train_on: Annotated[
        Literal["assistant", "all"],
        _data(
            help="What is learnt of a conversation: what the assistant says, or everything",
            example="--train_on all",
            value="WHAT",
            elsewhere=("train_on_inputs",),
        ),
    ] = "assistant"
    packing: Annotated[
        bool,
        _data(
            help="Fill each row of a batch with several texts, which do not see each other: faster where "
            "texts are short",
            example="--packing",
        ),
    ] = False
    lazy_preprocess: Annotated[
        bool,
        _data(
            help="Make tokens of texts as they are needed, not all at the start; --nolazy_preprocess finds "
            "every broken line before training begins",
            example="--lazy_preprocess",
        ),
    ] = True
    skip_bad_lines: Annotated[
        bool,
        _data(help="Leave broken lines out, and count them, instead of ending", example="--skip_bad_lines"),
    ] = False
    num_train_epochs: Annotated[
        float,
        _steps(
            help="Times through the data, unless --max_steps says when to end",
            example="--num_train_epochs 2",
            limits=_ABOVE_0,
            elsewhere=("epochs", "num_epochs"),
        ),
    ] = 1.0
    max_steps: Annotated[
        int | None, _steps(help="Train for so many steps", example="--max_steps 500", low=1)
    ] = None
    max_minutes: Annotated[
        float | None,
        _steps(
            help="Train for so many minutes in all, instead of steps or epochs",
            example="--max_minutes 30",
            limits=_ABOVE_0,
        ),
    ] = None
    per_device_train_batch_size: Annotated[
        int,
        _steps(
            help="Sequences that each device takes at once",
            example="--per_device_train_batch_size 4",
            low=1,
            elsewhere=("batch_size", "micro_batch_size"),
        ),
    ] = 8
    gradient_accumulation_steps: Annotated[
        int,
        _steps(help="Batches that make one step", example="--gradient_accumulation_steps 8", low=1),
    ] = 1
    learning_rate: Annotated[
        float | None,
        _steps(
            help="The highest learning rate; if not given, 2e-4, for full 2e-5",
            example="--learning_rate 1e-4",
            limits=_ABOVE_0,
            elsewhere=("lr",),
        ),
    ] = None
    lr_scheduler_type: Annotated[
        Literal["cosine", "linear", "constant", "warmup_stable_decay"],
        _steps(
            help="How it falls after the warm-up: to 0 along a cosine or a line, not at all, or to 0 in the "
            "last 30 %",
            example="--lr_scheduler_type linear",
            value="HOW",
        ),
    ] = "cosine"
    warmup_ratio: Annotated[
        float,
        _steps(
            help="The part of all steps in which it rises from 0",
            example="--warmup_ratio 0.03",
            low=0,
            high=1,
        ),
    ] = 0.0
    weight_decay: Annotated[
        float, _steps(help="Of AdamW, for matrices only", example="--weight_decay 0.1", low=0)
    ] = 0.0
    max_grad_norm: Annotated[
        float,
        _steps(help="Shorten gradients to this length; 0 is off", example="--max_grad_norm 1", low=0),
    ] = 1.0
    gradient_checkpointing: Annotated[
        bool,
        _steps(
            help="Keep of every layer only its input, and compute the rest anew: less memory, more time",
            example="--gradient_checkpointing",
        ),
    ] = False
    seed: Annotated[
        int,
        _steps(help="Of the order of the data, of new weights and of dropout", example="--seed 1", low=0),
    ] = 0
    lora_rank: Annotated[
        int, _lora(help="The rank of the deltas", example="--lora_rank 16", low=1, high=4096,
                   elsewhere=("lora_r", "r"))
    ] = 16  # fmt: skip
    lora_alpha: Annotated[
        float,
        _lora(
            help="Deltas are multiplied with alpha / rank, or, with --use_rslora, by its square root",
            example="--lora_alpha 32",
            limits=_ABOVE_0,
        ),
    ] = 32.0
    use_rslora: Annotated[
        bool, _lora(help="See --lora_alpha (Kalajdzievski 2023)", example="--use_rslora")
    ] = False
    lora_targets: Annotated[
        str,
        _lora(
            help="What gets deltas: all, attention, mlp, or projections of q k v o gate up down",
            example="--lora_targets q,v",
            elsewhere=("lora_target_modules", "target_modules"),
            value="NAMES",
        ),
    ] = "all"
    lora_dropout: Annotated[
        float,
        _lora(
            help="Drop so much of what the deltas read while training; of full, of what layers add",
            example="--lora_dropout 0.05",
            low=0,
            high=0.99,
        ),
    ] = 0.0
    heal_with: Annotated[
        Literal["lora", "layers"],
        _heal(
            help="Train low-rank deltas of the layers that are left, or these layers whole",
            example="--heal_with layers",
            value="WHAT",
        ),
    ] = "lora"
    temperature: Annotated[
        float,
        _heal(
            help="Divide the logits of both models by this before they are compared",
            example="--temperature 2",
            limits=_ABOVE_0,
        ),
    ] = 1.0
    label_weight: Annotated[
        float,
        _heal(
            help="How much of the loss is that of the text itself, from 0 to 1",
            example="--label_weight 0.5",
            low=0,
            high=1,
        ),
    ] = 0.0
    chimera_num_heads: Annotated[
        int,
        _chimera(
            help="Tokens to guess ahead: a head for each",
            example="--chimera_num_heads 4",
            low=1,
            high=32,
        ),
    ] = 4
    chimera_num_layers: Annotated[
        int, _chimera(help="Decoder layers under the heads: there is one", example="--chimera_num_layers 1")
    ] = 1
    chimera_head: Annotated[
        Literal["shared", "full", "low_rank"],
        _chimera(
            help="shared: each head a matrix before the model's own output head; full: each an output head "
            "of its own, as published, which is large; low_rank: matrices of --chimera_rank",
            example="--chimera_head low_rank",
            value="KIND",
        ),
    ] = "shared"
    chimera_rank: Annotated[
        int, _chimera(help="Of low_rank heads", example="--chimera_rank 64", low=1, high=16384)
    ] = 64
    chimera_losses: Annotated[
        str,
        _chimera(
            help="What heads learn of the model: its most probable tokens, hidden states, logits, "
            "distributions (kl), or the text's own tokens (labels); they add up",
            example="--chimera_losses kl,hidden",
            value="NAMES",
        ),
    ] = "tokens,hidden,logits"
    eval_only: Annotated[
        bool,
        _saving(
            help="Train no further: print what the best state in --output_dir (else the last) does on "
            "--eval_data_path; of chimera, how often each head is right",
            example="--eval_only",
        ),
    ] = False
    evaluation_strategy: Annotated[
        _When | None,
        _saving(
            help="When to evaluate on --eval_data_path: no, steps (every --eval_steps) or epoch; steps if "
            "--eval_steps is given, else epoch",
            example="--evaluation_strategy steps",
            value="WHEN",
            elsewhere=("eval_strategy",),
        ),
    ] = None
    eval_steps: Annotated[
        int | None, _saving(help="Evaluate every so many steps", example="--eval_steps 50", low=1)
    ] = None
    per_device_eval_batch_size: Annotated[
        int | None,
        _saving(
            help="Sequences that each device takes at once; as in training if not given",
            example="--per_device_eval_batch_size 4",
            low=1,
        ),
    ] = None
    early_stopping_patience: Annotated[
        int,
        _saving(
            help="End after so many evaluations without a new best; 0 is never",
            example="--early_stopping_patience 3",
            low=0,
        ),
    ] = 0
    save_strategy: Annotated[
        _When | None,
        _saving(
            help="When to write checkpoints: no (only in the end, or when interrupted), steps or epoch; "
            "steps if --save_steps is given, else epoch",
            example="--save_strategy steps",
            value="WHEN",
        ),
    ] = None
    save_steps: Annotated[
        int | None, _saving(help="Write a checkpoint every so many steps", example="--save_steps 200", low=1)
    ] = None
    save_total_limit: Annotated[
        int, _saving(help="How many of the last checkpoints stay", example="--save_total_limit 2", low=1)
    ] = 2
    logging_steps: Annotated[
        int,
        _saving(help="Add a line to metrics.jsonl every so many steps", example="--logging_steps 1", low=1),
    ] = 10
    report_to: Annotated[
        tuple[str, ...],
        _saving(
            help="Tell tensorboard or wandb, too, if they are installed; may be given more than once",
            example="--report_to tensorboard",
            value="NAME",
            many=True,
        ),
    ] = ()

    @property
    def frozen_quant(self) -> str | None:
        """How what is frozen is quantized."""
        return "int8" if self.load_in_8bit else "int4" if self.load_in_4bit else self.quant
