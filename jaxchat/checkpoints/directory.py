"""All that is at a path: a model's configuration, plan, tokenizer, template, sampling advice and parameters.

A `ModelDirectory` reads each of its small files once, when it is first asked for something in it; hand it on,
and nobody opens them again. A format of files is a subclass here, in `FORMATS`, and a `Source` beside. Needs
no JAX: what does (the parameters) is imported when it is asked for.
"""

import dataclasses
import functools
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from jaxchat import demo
from jaxchat.checkpoints import gguf_config, gguf_storage, hub
from jaxchat.checkpoints.foreign import (
    advice_on,
    fail_quantized,
    found_in,
    quantization_section,
    without_quantization,
)
from jaxchat.checkpoints.gguf_file import GgufFile
from jaxchat.checkpoints.hf_quant import methods
from jaxchat.checkpoints.llama_files import LlamaFiles, open_files
from jaxchat.checkpoints.manifest import MANIFEST, WEIGHT_DTYPES, Keep, Manifest, config_of, recorded_plan
from jaxchat.config import ModelConfig
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.families import parameter_table, read_config
from jaxchat.families.gguf import architecture_of
from jaxchat.families.hf_config import HfConfig
from jaxchat.files import read_json, read_optional_json
from jaxchat.layer_plan import LayerPlan
from jaxchat.options import SAMPLING_RANGES
from jaxchat.values import check_number

if TYPE_CHECKING:
    from jaxchat.checkpoints.source import Source, Wanted
    from jaxchat.text.chat_template import ChatTemplate
    from jaxchat.text.tokenizer import Tokenizer
    from jaxchat.text.tokenizer_config import Config

logger = logging.getLogger(__name__)

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
_RECOMMENDABLE = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def _on_the_hub(path: str | Path) -> Path | None:
    """The directory of a model that is called as on the Hub, unless there is a path of that name."""
    if not isinstance(path, str) or os.path.lexists(path):
        return None
    if path == hub.ASSISTANT:
        return hub.assistant() or demo.path()
    name = hub.HubName.parse(path)
    return None if name is None or os.path.lexists(path.split("/")[0]) else hub.fetch(name)


@dataclasses.dataclass(frozen=True)
class ModelDirectory:
    """A model directory in Hugging Face's layout; other formats say what differs.

    Two are equal if their paths are. Every answer raises `JaxchatError` where its file is missing or broken.
    """

    path: Path

    @staticmethod
    def at(path: "str | Path | ModelDirectory") -> "ModelDirectory":
        """What is at a path, in whatever format; `box` is the model in the box if no folder is called so.

        A path is that of a folder, or of a GGUF file, of several parts the first.

        What is no path and reads like `org/name`, `org/name@revision` or, of GGUF files, `org/name:Q4_K_M` is
        fetched from the Hugging Face Hub; `assistant` is a small one that chats, see `hub.assistant`.

        Raises:
          UsageError: there is no such directory or file, or a folder holds several models in GGUF.
          JaxchatError: there is no such model on the Hub, or it cannot be reached.
        """
        if isinstance(path, ModelDirectory):
            return path
        path = _on_the_hub(path) or demo.place(path)
        if not path.exists():
            raise UsageError(f"{path}: no such model directory; give {_GIVE}")
        for format in FORMATS:
            if (found := format.recognized(path)) is not None:
                return found
        raise UsageError(f"{path}: {advice_on(path) or f'not a directory; give {_GIVE}'}")

    @classmethod
    def recognized(cls, path: Path) -> Self | None:
        """What is at an existing path, if it is of this format."""
        return cls(path) if path.is_dir() else None

    def __str__(self) -> str:
        return str(self.path)

    @property
    def read_from(self) -> tuple[Path, ...]:
        """The places of all that it is made of, which nothing may be written over."""
        return (self.path,)

    @property
    def name(self) -> str:
        """What people call it."""
        return hub.name_in_cache(self.path) or self.path.resolve().name

    @property
    def config_place(self) -> str:
        """What says the configuration, for messages."""
        return str(self.path / CONFIG)

    @property
    def _generation_place(self) -> str:
        return str(self.path / GENERATION_CONFIG)

    @functools.cached_property
    def _stored_values(self) -> Mapping[str, Any]:
        """`config.json` as it is."""
        path = self.path / CONFIG
        if not path.exists() and (found := found_in(self.path)) is not None:
            raise JaxchatError(f"{path}: no such file; {found}")
        return read_json(path)

    @functools.cached_property
    def config_values(self) -> Mapping[str, Any]:
        """`config.json` without what it says of a quantization, which is undone or ours when it is read."""
        return without_quantization(self._stored_values)

    @functools.cached_property
    def quantization(self) -> "methods.Stated | None":
        """How another program has quantized the weights, as the small files say it; None of a plain model.

        Raises:
          JaxchatError: in a way that is not read; names the method, the key and what to do.
        """
        where, section = self.config_place, quantization_section(self._stored_values)
        if section is None:
            own = next((name for name in methods.OWN_FILES if (self.path / name).is_file()), None)
            if own is None:
                return None
            where, section = str(self.path / own), (methods.OWN_FILES[own], "", read_json(self.path / own))
        method, key, values = section
        stated = None
        if isinstance(values, Mapping):
            stated = methods.stated(method, values, f"{where}: {key}" if key else where)
        return fail_quantized(where, f"{method} (key {key!r})") if stated is None else stated

    @functools.cached_property
    def _generation_values(self) -> Mapping[str, Any]:
        return read_optional_json(self.path / GENERATION_CONFIG)

    @functools.cached_property
    def stated_config(self) -> ModelConfig:
        """What `config.json` says, and `generation_config.json` of the tokens that end a text."""
        _ = self.quantization  # refused before anything that is wrong besides
        config = read_config(self.config_values, source=self.config_place)
        generation = HfConfig(self._generation_values, self._generation_place)
        eos = dict.fromkeys((*config.eos_ids, *generation.ids("eos_token_id")))
        return dataclasses.replace(config, eos_ids=tuple(eos))

    @property
    def config(self) -> ModelConfig:
        """The configuration of what is stored, as far as small files know it; `source` may know better."""
        return self.stated_config

    @functools.cached_property
    def manifest(self) -> Manifest | None:
        """What the stored weights are once they are loaded, if the small files alone do not say it.

        It is what a conversion of ours wrote of its result, or of other quantized weights what their files
        say; None of plain ones, and where weights are missing: who opens the source is told which.
        """
        if self.quantization is None:
            return None
        from jaxchat.checkpoints.hf import HfSource

        try:
            source = HfSource(self.path, self.stated_config, stated=self.quantization)
        except JaxchatError:
            return None
        return source.manifest if source.manifest.quantization is not None else None

    @property
    def plan(self) -> LayerPlan:
        """The layer plan over the stacked layers that makes them the model: every layer once, in order."""
        return LayerPlan.identity(self.config.num_layers)

    @property
    def is_plain(self) -> bool:
        """Whether the stacked layers are simply those of `config.json` in order."""
        return True

    @functools.cached_property
    def stored_dtype(self) -> str | None:
        """The weights' dtype or quantization format, as far as the small files say it."""
        if self.manifest is not None and self.manifest.quantization is not None:
            return self.manifest.quantization.format
        text = self.config_values.get("text_config")
        for values in (self.config_values, text if isinstance(text, dict) else {}):
            for key in ("dtype", "torch_dtype"):
                if values.get(key) in WEIGHT_DTYPES:
                    return str(values[key])
        return None

    @functools.cached_property
    def _text_config(self) -> "Config":
        from jaxchat.text.tokenizer_config import read_config

        return read_config(self.path)

    @functools.cached_property
    def tokenizer(self) -> "Tokenizer | None":
        """Its tokenizer; None where there is none."""
        from jaxchat.text.tokenizer_files import has_tokenizer, load_tokenizer

        return load_tokenizer(self.path, self._text_config) if has_tokenizer(self.path) else None

    @functools.cached_property
    def template(self) -> "ChatTemplate | None":
        """Its chat template; None where there is none, or no tokenizer."""
        from jaxchat.text.chat_template import ChatTemplate

        return (
            None
            if self.tokenizer is None
            else ChatTemplate.load(self.path, self.tokenizer, self._text_config)
        )

    @functools.cached_property
    def recommended_sampling(self) -> Mapping[str, float]:
        """The sampling options that `generation_config.json` recommends, by name.

        Nothing is recommended where the file does not say `do_sample` (transformers' GenerationConfig). A
        number that is no value of an option is read as off where that is what people mean by it, and else
        left out with a warning: a recommendation is no reason not to run.
        """
        where = self._generation_place
        values = HfConfig(self._generation_values, where)
        if values.values.get("do_sample") is not True:
            return {}
        found = {}
        for name in _RECOMMENDABLE:
            if values.values.get(name) is None:
                continue
            value = _meant(name, values.number(name, 0.0))
            try:
                check_number(name, value, SAMPLING_RANGES[name])
            except UsageError as error:
                logger.warning("%s: ignored: %s", where, error)
            else:
                found[name] = SAMPLING_RANGES[name].type(value)
        return found

    def source(self, wanted: "Wanted | None" = None, keep: "Keep" = "small") -> "Source":
        """The parameters, opened and verified; no tensor data is read.

        Args:
          wanted: all that will be read; where tensors are files of their own, nothing else needs to be there.
          keep: what becomes of quantized weights that no format here holds as they are: `small` quantizes
            them again, `exact` keeps the numbers they stand for.
        """
        from jaxchat.checkpoints.hf import HfSource

        source = HfSource(self.path, self.stated_config, wanted, stated=self.quantization, keep=keep)
        for remark in source.remarks:
            logger.warning("%s", remark)
        return source

    def gguf_words(self, vocab_size: int) -> dict[str, Any]:
        """Tokenizer and chat templates as the keys of a GGUF file, for an embedding of so many rows.

        Raises:
          JaxchatError: GGUF knows no such tokenizer.
        """
        from jaxchat.text.tokenizer import TextTokenizer
        from jaxchat.text.tokenizer_to_gguf import metadata_of

        if self.tokenizer is None:
            return {}
        assert isinstance(self.tokenizer, TextTokenizer)
        words = metadata_of(self.path, self.tokenizer, self._text_config, vocab_size)
        sources = {} if self.template is None else self.template.sources
        keys = {name: f"tokenizer.chat_template{'' if name == 'default' else f'.{name}'}" for name in sources}
        return words | {keys[name]: text for name, text in sources.items()}

    def write_config(self, directory: Path) -> None:
        """Writes `config.json` into another directory, byte for byte if it is a file and of plain weights."""
        if self.config_values == self._stored_values:
            shutil.copyfile(self.path / CONFIG, directory / CONFIG)
        else:
            write_json(directory / CONFIG, self.config_values)

    def write_words(self, directory: Path) -> None:
        """Writes the files of the tokenizer, the chat templates and the sampling advice into a directory."""
        from jaxchat.text.tokenizer_files import text_files

        for path in (self.path / GENERATION_CONFIG, *text_files(self.path)):
            if path.is_file():
                copy = directory / path.relative_to(self.path)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, copy)


def _meant(name: str, value: float) -> float:
    """A recommended number as those mean it who write -1 for "all tokens", or a bound that excludes none."""
    if name == "top_k" and value.is_integer():
        return max(int(value), 0)
    if name == "top_p" and value > 1:
        return 1.0
    return 0.0 if name == "min_p" and value < 0 else value


class ConvertedDirectory(ModelDirectory):
    """A directory that `write.convert` wrote: `jaxchat.json`, and the stacks in a native file or in Orbax."""

    @classmethod
    def recognized(cls, path: Path) -> Self | None:
        """See `ModelDirectory`."""
        return cls(path) if (path / MANIFEST).exists() else None

    @functools.cached_property
    def manifest(self) -> Manifest:
        """`jaxchat.json`."""
        return Manifest.read(self.path)

    @functools.cached_property
    def config(self) -> ModelConfig:
        """With what the checkpoint decides: its stack, and whether the head is the embedding."""
        return config_of(self.manifest, self.stated_config)

    @functools.cached_property
    def plan(self) -> LayerPlan:
        """The recorded plan, or every layer once."""
        return recorded_plan(self.manifest, self.config) or LayerPlan.identity(self.config.num_layers)

    @property
    def is_plain(self) -> bool:
        """See `ModelDirectory`."""
        return self.manifest.plan is None and self.manifest.stack is None

    @functools.cached_property
    def stored_dtype(self) -> str | None:
        """See `ModelDirectory`; None of several."""
        if self.manifest.quantization is not None:
            return self.manifest.quantization.format
        found = set(self.manifest.dtypes.values())
        return found.pop() if len(found) == 1 else None

    def source(self, wanted: "Wanted | None" = None, keep: "Keep" = "small") -> "Source":
        """See `ModelDirectory`; all of it is there, and is kept as it is."""
        if self.manifest.format == "orbax":
            from jaxchat.checkpoints.orbax import OrbaxSource  # half a second of imports

            return OrbaxSource(self.path, self.stated_config, self.manifest)
        from jaxchat.checkpoints.native import NativeSource

        return NativeSource(self.path, self.stated_config, self.manifest)


class GgufDirectory(ModelDirectory):
    """A model in GGUF; `path` is its file, of several the first part. All that is known is in there."""

    @classmethod
    def recognized(cls, path: Path) -> Self | None:
        """See `ModelDirectory`; in a folder, the only model, if there is none in Hugging Face's layout."""
        if not path.is_dir():
            return cls(path) if gguf_config.is_gguf(path) else None
        if os.path.lexists(path / CONFIG):
            return None
        model = gguf_config.only_model_in(path)
        return None if model is None else cls(model)

    @functools.cached_property
    def _file(self) -> GgufFile:
        return GgufFile(self.path)

    @property
    def name(self) -> str:
        """See `ModelDirectory`."""
        return gguf_config.name_of(self._file)

    @property
    def config_place(self) -> str:
        """See `ModelDirectory`."""
        return str(self.path)

    @property
    def _generation_place(self) -> str:
        return f"{self.path}: general.sampling"

    @functools.cached_property
    def config_values(self) -> Mapping[str, Any]:
        """What would be in `config.json`."""
        return gguf_config.config_values(self._file)

    @property
    def quantization(self) -> None:
        """See `ModelDirectory`; types of tensors are no method."""

    @functools.cached_property
    def _generation_values(self) -> Mapping[str, Any]:
        return gguf_config.generation_values(self._file)

    @functools.cached_property
    def manifest(self) -> Manifest | None:
        """See `ModelDirectory`; what the file is once it is loaded. None of one that lacks weights."""
        table, model = parameter_table(self.config), gguf_config.model_of(self._file)
        try:
            return gguf_storage.described(self._file, self.config, table, architecture_of(model), "small")
        except KeyError:  # whoever opens the source is told which tensor is missing
            return None

    @functools.cached_property
    def stored_dtype(self) -> str | None:
        """See `ModelDirectory`."""
        if self.manifest is not None and self.manifest.quantization is not None:
            return self.manifest.quantization.format
        return gguf_config.stored_dtype(self._file)

    @functools.cached_property
    def tokenizer(self) -> "Tokenizer | None":
        """See `ModelDirectory`."""
        from jaxchat.text.tokenizer_gguf import tokenizer_of

        return tokenizer_of(self._file.metadata, str(self.path))

    @functools.cached_property
    def template(self) -> "ChatTemplate | None":
        """See `ModelDirectory`."""
        from jaxchat.text.chat_template import ChatTemplate
        from jaxchat.text.template_process import start

        sources, tokenizer = gguf_config.chat_templates(self._file), self.tokenizer
        if tokenizer is None or not sources:
            return None
        start()  # what renders it is ready when the weights are
        by_id = {number: text for text, number in tokenizer.special_tokens.items()}
        ids = {"bos_token": tokenizer.bos_id, "eos_token": next(iter(tokenizer.eos_ids), None)}
        known = {name: by_id[number] for name, number in ids.items() if number in by_id}
        variables = known | gguf_config.template_variables(self._file.metadata)
        return ChatTemplate(sources, path=self.path, variables=variables)

    def source(self, wanted: "Wanted | None" = None, keep: "Keep" = "small") -> "Source":
        """See `ModelDirectory`; all of it is there."""
        from jaxchat.checkpoints.gguf import GgufSource

        return GgufSource(self._file, self.stated_config, keep)

    def gguf_words(self, vocab_size: int) -> dict[str, Any]:
        """See `ModelDirectory`: those of the file."""
        return {key: value for key, value in self._file.metadata.items() if key.startswith("tokenizer.")}

    def write_config(self, directory: Path) -> None:
        """See `ModelDirectory`."""
        write_json(directory / CONFIG, self.config_values)

    def write_words(self, directory: Path) -> None:
        """See `ModelDirectory`."""
        from jaxchat.text.tokenizer_gguf import hugging_face_files

        if self._generation_values:
            write_json(directory / GENERATION_CONFIG, self._generation_values)
        for name, contents in hugging_face_files(self._file.metadata, str(self.path)).items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(contents)


class LlamaDirectory(ModelDirectory):
    """Llama in its makers' own files: a folder of Meta's, or a file of llama2.c's."""

    @classmethod
    def recognized(cls, path: Path) -> Self | None:
        """See `ModelDirectory`."""
        if path.is_dir() and os.path.lexists(path / CONFIG):
            return None
        return None if open_files(path) is None else cls(path)

    @functools.cached_property
    def _files(self) -> LlamaFiles:
        files = open_files(self.path)
        assert files is not None
        return files

    @property
    def _folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def config_place(self) -> str:
        """See `ModelDirectory`."""
        return self._files.where

    @property
    def quantization(self) -> None:
        """See `ModelDirectory`: nobody quantizes these."""

    @functools.cached_property
    def config_values(self) -> Mapping[str, Any]:
        """What would be in `config.json`; the ids of special tokens are the tokenizer's."""
        values = self._files.config
        if self.tokenizer is not None:
            ends = self.tokenizer.eos_ids
            ids = {
                "bos_token_id": self.tokenizer.bos_id,
                "eos_token_id": list(ends) if len(ends) > 1 else None,
            }
            values |= {**ids, "eos_token_id": ends[0]} if len(ends) == 1 else ids
        return values

    @functools.cached_property
    def _text_config(self) -> "Config":
        from jaxchat.text.tokenizer_config import read_config

        return read_config(self._folder)

    @functools.cached_property
    def tokenizer(self) -> "Tokenizer | None":
        """See `ModelDirectory`: that of the files beside the weights."""
        from jaxchat.text.tokenizer_files import has_tokenizer, load_tokenizer

        return load_tokenizer(self._folder, self._text_config) if has_tokenizer(self._folder) else None

    @property
    def template(self) -> None:
        """See `ModelDirectory`: there is none."""

    @functools.cached_property
    def stored_dtype(self) -> str | None:
        """See `ModelDirectory`."""
        found = {self._files.dtype(name).name for name in self._files.shapes}
        return found.pop() if len(found) == 1 and found <= WEIGHT_DTYPES.keys() else None

    def source(self, wanted: "Wanted | None" = None, keep: "Keep" = "small") -> "Source":
        """See `ModelDirectory`; all of it is there."""
        from jaxchat.checkpoints.llama_source import LlamaSource

        return LlamaSource(self._files, self.stated_config)

    def write_config(self, directory: Path) -> None:
        """See `ModelDirectory`."""
        write_json(directory / CONFIG, self.config_values)

    def write_words(self, directory: Path) -> None:
        """See `ModelDirectory`."""
        ModelDirectory(self._folder).write_words(directory)


def write_json(path: Path, value: object) -> None:
    """Writes a small file as Hugging Face's look."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


FORMATS: tuple[type[ModelDirectory], ...] = (
    ConvertedDirectory,
    GgufDirectory,
    LlamaDirectory,
    ModelDirectory,
)
"""The formats of models, in the order in which they are tried; the last takes every other directory."""

_GIVE = f"the folder that holds {CONFIG}, or a GGUF file"
