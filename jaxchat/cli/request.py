"""What one run of `generate` or `chat` is asked for: a value that the flags fill, checked once."""

import dataclasses
import functools
from typing import TYPE_CHECKING, Annotated

from jaxchat.adapter_use import Uses, read_uses
from jaxchat.cli.model_flags import LAYER_SPEC, MAX_LENGTH, BoxedModel, LoadFlags
from jaxchat.draft_use import ACCEPT, read_draft, read_shape
from jaxchat.options import MAX_SLOTS, Flag, Format, GenerateOptions, PrefixIn, unescape
from jaxchat.text.named_templates import NAMED
from jaxchat.text.reasoning import ThoughtTags, parse_thought_tags

if TYPE_CHECKING:
    from jaxchat.cli.chosen_model import ChosenModel

_what = functools.partial(Flag, group="What to do")
_chat = functools.partial(Flag, group="Chat")
_output = functools.partial(Flag, group="Output")


def _checked_draft(text: str) -> str:
    read_draft(text)
    return text


def _checked_shape(text: str) -> str:
    read_shape(text)
    return text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request(LoadFlags):
    """One run of the command line: the model, what to say to it, and how to go on."""

    model: BoxedModel = None
    layer_spec: Annotated[
        str | None, dataclasses.replace(LAYER_SPEC, help=f"{LAYER_SPEC.help}. Look with `jaxchat show` first")
    ] = None
    adapter: Annotated[
        Uses,
        Flag(
            help="Run with a LoRA adapter, as PEFT saves it or in GGUF, beside the weights: all of it, "
            "=STRENGTH of it, or only in @SLOT of the layer plan (the first is 0). May be given more "
            "than once",
            example="--adapter loras/poet, --adapter loras/poet=0.5 --adapter loras/critic@3",
            group="Model",
            elsewhere=("lora", "lora_path", "lora_scaled", "lora_modules", "peft"),
            value="DIR[@SLOT][=STRENGTH]",
            many=True,
            read=lambda texts: read_uses(texts, "--adapter"),
        ),
    ] = ()
    draft: Annotated[
        str | None,
        Flag(
            help="Guess tokens ahead and verify several at a time: chimera:DIR is the directory of heads "
            "that were trained for the model. The text stays the same, greedy or sampled; --verbose and "
            "/stats say how many tokens a step gave",
            example="--draft chimera:heads",
            group="Drafts",
            value="KIND:DIR",
            elsewhere=("model_draft", "md", "draft_model", "speculative_model", "spec_type"),
            read=_checked_draft,
        ),
    ] = None
    draft_tree: Annotated[
        str | None,
        Flag(
            help="What is guessed: 25, a tree of 25 tokens, as deep as the draft goes; or chain:N, N tokens "
            "one after the other. If not given, 25",
            example="--draft chimera:heads --draft_tree chain:3",
            group="Drafts",
            value="SHAPE",
            elsewhere=("draft_max", "draft_n", "num_speculative_tokens"),
            read=_checked_shape,
        ),
    ] = None
    draft_accept: Annotated[
        str,
        Flag(
            help="Which guesses are kept: lossless, those that the model itself would have drawn; or, LOSSY, "
            "which changes the text: typical, what the model finds probable enough (0.09, or less where "
            "much is possible), or top_k, what is among its 3 likeliest",
            example="--draft chimera:heads --draft_accept typical",
            group="Drafts",
            value="RULE",
            choices=ACCEPT,
        ),
    ] = "lossless"
    max_length: Annotated[int | None, MAX_LENGTH] = None
    max_slots: Annotated[
        int | None,
        Flag(
            help="Room in the KV cache for so many slots: plans of up to so many compile nothing anew. Each "
            "takes its memory whether a plan uses it or not. If not given, as many as the plan and the "
            "model's layers need; in a chat up to twice the layers, as far as those beyond take no more than "
            "256 MiB at the full context",
            example="--max_slots 64",
            group="Model",
            value="N",
            low=1,
            high=MAX_SLOTS,
        ),
    ] = None
    prompt: Annotated[
        str | None,
        _what(
            help="The prompt, - for standard input; with -i the first message. Without a prompt it is read "
            "from a pipe",
            example='-p "Hello"',
            short="p",
        ),
    ] = None
    prompt_file: Annotated[
        str | None,
        _what(
            help="Read the prompt from a UTF-8 file, - for standard input; one line break at its end is "
            "left out",
            example="--prompt_file question.txt",
            elsewhere=("f", "file"),
            value="FILE",
        ),
    ] = None
    interactive: Annotated[
        bool,
        _what(
            help="Chat, line by line. Ctrl-C stops a reply, Ctrl-D leaves, /help lists the commands",
            example="-i",
            short="i",
            elsewhere=("cnv", "conversation", "chat"),
        ),
    ] = False
    format: Annotated[
        Format | None,
        _what(
            help="chat puts the prompt into the model's chat template, completion continues it as it is; "
            "chat if the model has a template",
            example="--format completion",
            elsewhere=("no_cnv", "no_conversation", "raw", "ignore_chat_template"),
            value="HOW",
        ),
    ] = None
    special_tokens: Annotated[
        bool,
        _what(
            help="Special tokens spelled out in a text that is continued as it is (--format completion) are "
            "those: a template written by hand, or fill-in-the-middle; with --nospecial_tokens they are "
            "text, as in the messages of a chat",
            example="--format completion --nospecial_tokens -p '<s> is a tag'",
        ),
    ] = True
    chat_template: Annotated[
        str | None,
        _chat(
            help="Chat in another format than the model's own, or in one where the model comes without: a "
            f"Jinja file, or one of {', '.join(NAMED)}. What ends a reply in it ends the reply",
            example="--chat_template vicuna_v1.1, --chat_template my_format.jinja",
            elsewhere=("prompt_template", "chat_template_file", "conv_template"),
            value="NAME|FILE",
        ),
    ] = None
    system: Annotated[
        str | None,
        _chat(
            help="The system prompt of a chat",
            example='-s "Answer in verse."',
            short="s",
            elsewhere=("system_prompt", "sys"),
        ),
    ] = None
    reversed_role: Annotated[
        bool,
        _chat(
            help="The model plays the user and you the assistant; --prompt is the model's opening line",
            example='-i --reversed_role -p "Hello"',
        ),
    ] = False
    ai_prefix: Annotated[
        str,
        _chat(
            help="Begin the next reply with this text, which is part of it; C escapes such as \\n work",
            example="--ai_prefix 'Let us think step by step:\\n'",
            read=lambda text: unescape(text, "--ai_prefix"),
        ),
    ] = ""
    ai_prefix_every_turn: Annotated[
        bool,
        _chat(
            help="Begin every reply with --ai_prefix, not only the next",
            example="-i --ai_prefix 'Sure: ' --ai_prefix_every_turn",
        ),
    ] = False
    ai_prefix_in: Annotated[
        PrefixIn,
        _chat(
            help="Which part of a reply the prefix begins: content, or the reasoning of a model that thinks",
            example="--ai_prefix 'Hm, ' --ai_prefix_in reasoning",
            value="PART",
        ),
    ] = "content"
    thought_tags: Annotated[
        ThoughtTags | None,
        _chat(
            help="The two tags, with a space between them, that the model thinks between, to tell reasoning "
            "from content; as in the model's chat template if not given",
            example="--thought_tags '<think> </think>'",
            value="'OPEN CLOSE'",
            read=parse_thought_tags,
        ),
    ] = None
    load_session: Annotated[
        str | None,
        _chat(
            help="Go on with a conversation that --save_session or /save has kept, with the same model",
            example="--load_session talk -p 'And then?'",
            elsewhere=("session", "prompt_cache"),
            value="FILE",
        ),
    ] = None
    save_session: Annotated[
        str | None,
        _chat(
            help="Keep the conversation at the end, to go on another time without computing it anew: under a "
            "name, which `jaxchat sessions` lists, or, with a dot or a slash in it, in that file",
            example="-i --save_session talk, --save_session ./talk.session",
            value="FILE",
        ),
    ] = None
    options: GenerateOptions = dataclasses.field(default_factory=GenerateOptions)
    json: Annotated[
        bool,
        _output(
            help="Print one JSON object (text, token_ids, finish_reason, timings and more) and nothing else "
            "on standard output; also with --show",
            example="-p Hello --json",
        ),
    ] = False
    markdown: Annotated[
        bool,
        _output(
            help="Render the Markdown of replies: headings, lists, tables, code", example="-i --markdown"
        ),
    ] = False
    history_file: Annotated[
        str | None,
        _output(
            help="Where messages typed in a chat are kept, for the arrow keys; a file in your state "
            "directory if not given, '' for none",
            example="-i --history_file notes.txt",
            value="FILE",
            or_none=True,
        ),
    ] = None
    verbose: Annotated[
        bool,
        _output(
            help="Say at the end what it cost: token rates, compile time, memory; and the seed",
            example="-p Hello --verbose",
            elsewhere=("v", "stats", "perf", "show_timings"),
        ),
    ] = False
    quiet: Annotated[
        bool,
        _output(
            help="Say nothing but the answer and errors: no banner, no line while it loads, no notices",
            example="-p Hello --quiet",
            elsewhere=("silent", "no_display_prompt", "log_disable"),
        ),
    ] = False
    hide_banner: Annotated[
        bool,
        _output(
            help="Start without the banner, which is shown only if standard error is a terminal",
            example="-i --hide_banner",
        ),
    ] = False

    def chosen(self) -> "ChosenModel":
        """See `ModelFlags`; an adapter may repeat layers."""
        return self._chosen(self.adapter)
