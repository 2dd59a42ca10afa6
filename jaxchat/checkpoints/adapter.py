"""LoRA adapters as PEFT writes them: a directory's tensors, checked, as deltas of a model's parameters.

What a file says of its modules becomes what the parameter table calls them, and nothing of it is skipped.
How deltas are added while a model runs is in `layers/adapters.py`, how they are merged in `merged.py`.
Source: peft/utils/save_and_load.py and peft/tuners/lora/layer.py of PEFT 0.21, and of 0.2 for `enable_lora`.
"""

import dataclasses
import hashlib
import logging
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxchat.checkpoints.adapter_config import (
    CONFIG,
    LoraConfig,
    alters_base,
    pattern_values,
    read_lora_config,
    saved,
    targeted,
    unmatched,
)
from jaxchat.checkpoints.adapter_gguf import read_gguf_adapter
from jaxchat.checkpoints.assembled import gathered_config
from jaxchat.checkpoints.fingerprint import bytes_of
from jaxchat.checkpoints.low_rank import Adapter, LowRank
from jaxchat.checkpoints.safetensors_file import SafetensorsFile
from jaxchat.checkpoints.source import fold_layers, listed
from jaxchat.checkpoints.torch_file import TorchFile
from jaxchat.config import EMBED, HEAD, ModelConfig, Param
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.families import family_of, parameter_table
from jaxchat.families.tables import OUTPUT_HEAD
from jaxchat.visible import shown, visible

FILES = ("adapter_model.safetensors", "adapter_model.bin")
"""The tensors, in the order of preference."""

logger = logging.getLogger(__name__)


class Module(NamedTuple):
    """One of a model's modules: the parameters that its tensors are (parts of), in one layer."""

    layer: int
    params: Mapping[str, tuple[Param, ...]]  # `weight` or `bias` -> in the order of the fused tensor


class Entry(NamedTuple):
    """What a tensor's name says it is."""

    module: str
    kind: str  # one of `_KINDS`
    tensor: str  # `weight` or `bias`, of the module or of a factor


_NAMED = r"(?:\.(?!weight$|bias$)[^.]+)?"  # the adapter's name, which versions of PEFT wrote or left out
_KINDS: Mapping[str, re.Pattern[str]] = {
    kind: re.compile(pattern)
    for kind, pattern in {
        "a": rf"(?P<module>.+)\.lora_A{_NAMED}\.(?P<tensor>weight)",
        "b": rf"(?P<module>.+)\.lora_B{_NAMED}\.(?P<tensor>weight|bias)",
        "a of embedding": rf"(?P<module>.+)\.lora_embedding_A{_NAMED}",
        "b of embedding": rf"(?P<module>.+)\.lora_embedding_B{_NAMED}",
        "magnitude": rf"(?P<module>.+)\.lora_magnitude_vector{_NAMED}(?:\.weight)?",
        "token rows": rf"(?P<module>.+)\.token_adapter\.trainable_tokens_delta{_NAMED}",
        "original": r"(?P<module>.+)\.original_module\.(?P<tensor>weight|bias)",
        "base": r"(?P<module>.+)\.base_layer\.(?P<tensor>weight|bias)",
        "saved": rf"(?P<module>.+?)(?:\.modules_to_save{_NAMED})?\.(?P<tensor>weight|bias)",
    }.items()
}
"""What a tensor can be -> its name; the first that fits counts."""

_PREFIX = re.compile(r"(?:(?:module|_orig_mod|_fsdp_wrapped_module|base_model\.model)\.)*")
"""What stands before a module's name: PEFT's two wrappers (some scripts wrapped twice), and torch's."""


def parsed(name: str) -> Entry | None:
    """What a tensor is, by its name; None of a name that PEFT does not write.

    >>> parsed("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight")
    Entry(module='model.layers.0.self_attn.q_proj', kind='a', tensor='weight')
    """
    rest = name[len(_PREFIX.match(name)[0]) :]  # type: ignore[index]  # it may be empty, but fits
    for kind, pattern in _KINDS.items():
        if match := pattern.fullmatch(rest):
            return Entry(match["module"], kind, match.groupdict().get("tensor") or "weight")
    return None


class AdapterFile:
    """An adapter's tensors, by module; none of them is read before it is asked for.

    Attributes:
      path: the file.
      modules: module -> (kind, tensor) -> the tensor's name.

    Raises:
      UsageError: there is no such file.
      JaxchatError: it is malformed, or a name in it is none that PEFT writes.
    """

    def __init__(self, directory: Path):
        found = next((directory / name for name in FILES if (directory / name).exists()), None)
        if found is None:
            raise UsageError(f"{directory}: neither {' nor '.join(FILES)} is there; copy it there")
        self.path = found
        self._file = TorchFile(found) if found.suffix == ".bin" else SafetensorsFile(found)
        self.modules: dict[str, dict[tuple[str, str], str]] = {}
        for name in self._file.entries:
            entry = parsed(name)
            if entry is None:
                raise JaxchatError(
                    f"{self.path}: {shown(name)} is no tensor of a LoRA adapter; expected names such as "
                    "base_model.model.MODULE.lora_A.weight"
                )
            if self.modules.setdefault(entry.module, {}).setdefault(entry[1:], name) != name:
                twice = self.modules[entry.module][entry[1:]]
                raise JaxchatError(
                    f"{self.path}: {shown(name)} and {shown(twice)} are the same tensor of one adapter; "
                    "expected one adapter a file, leave one of them"
                )

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return self._file.entries[name].shape

    def read(self, name: str) -> np.ndarray:
        """A tensor as it is stored.

        Raises:
          JaxchatError: it is not of floats, or holds what is no number.
        """
        entry = self._file.entries[name]
        if entry.dtype not in ("F32", "F16", "BF16"):
            raise JaxchatError(
                f"{self.path}: {name} is {entry.dtype}; expected F32, F16 or BF16: save it as one of those"
            )
        values = np.ascontiguousarray(self._file.read(name))
        if not np.isfinite(values.astype(np.float32)).all():
            raise JaxchatError(
                f"{self.path}: {name} holds NaN or infinity; the training failed, or the file is damaged"
            )
        return values

    def floats(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A tensor of a certain shape, as float32."""
        if self.shape(name) != shape:
            raise JaxchatError(
                f"{self.path}: {name} is {list(self.shape(name))}; expected {list(shape)}: take the adapter "
                "and the model that it was made for"
            )
        return self.read(name).astype(np.float32)


def read_adapter(directory: str | Path, config: ModelConfig) -> Adapter:
    """Reads an adapter for a model.

    Args:
      directory: with `adapter_config.json` and `adapter_model.safetensors` or `.bin`, as PEFT writes it; or a
        GGUF file.
      config: of the model.

    Raises:
      UsageError: no such directory, or an adapter of a kind or for a model that does not fit; the message has
        file, key or module.
      JaxchatError: a file is malformed, a tensor is missing, of another shape, or holds NaN.
    """
    path = _directory(directory)
    if path.is_file():
        return read_gguf_adapter(path, config)
    lora = read_lora_config(path)
    return _Reading(path, lora, AdapterFile(path), config).adapter()


def common_replication(adapters: Iterable[Adapter]) -> tuple[int, ...] | None:
    """The layers that adapters make of a model's, in order; None where none repeats any.

    Raises:
      UsageError: they do not agree.
    """
    repeating = [adapter for adapter in adapters if adapter.replicated is not None]
    for other in repeating[1:]:
        if other.replicated != repeating[0].replicated:
            raise _other_replication(repeating[0].path, other.path)
    return repeating[0].replicated if repeating else None


def replication(directories: Iterable[str | Path], config: ModelConfig) -> tuple[int, ...] | None:
    """The same of adapters of which only the configurations are read."""
    found: dict[Path, tuple[int, ...]] = {}
    for name in directories:
        path = _directory(name)
        if path.is_dir() and (own := read_lora_config(path).replicated) is not None:
            _check_replication(path, own, config)
            found[path] = own
    (first, layers), *others = found.items() or [(None, None)]
    for other, own in others:
        if own != layers:
            raise _other_replication(first, other)
    return layers


def _check_replication(path: Path, layers: tuple[int, ...] | None, config: ModelConfig) -> None:
    if layers is not None and max(layers) >= config.num_layers:
        raise UsageError(
            f"{path / CONFIG}: layer_replication has layer {max(layers)}; expected 0 to "
            f"{config.num_layers - 1}: take the model that the adapter was made for"
        )


def _other_replication(one: object, other: object) -> UsageError:
    return UsageError(f"{one} and {other} have different layer_replication; load them apart")


def replicated_config(config: ModelConfig, layers: tuple[int, ...]) -> ModelConfig:
    """The configuration of a model whose layer p is layer `layers[p]`, over the same stacks of weights."""
    per_layer = (param.name for param in parameter_table(config) if param.per_layer)
    rows = tuple((name, tuple(config.rows_of(name)[layer] for layer in layers)) for name in per_layer)
    return dataclasses.replace(gathered_config(config, layers), layer_rows=rows)


def _directory(given: str | Path) -> Path:
    """The folder, or the GGUF file, of an adapter; raises what is wrong with a path that is none."""
    path = Path(given)
    if path.is_dir() or (path.suffix == ".gguf" and path.exists()):
        return path
    hint = f"give the folder it is in, {path.parent}" if path.exists() else f"give a folder with {CONFIG}"
    raise UsageError(f"{path}: no such adapter; {hint}")


def modules_of(config: ModelConfig, rename: tuple[str, str] = ("", "")) -> dict[str, Module]:
    """A model's modules by their Hugging Face names, spelled with one of its family's renames."""
    family, table = family_of(config), parameter_table(config)
    if config.tied_embeddings:  # which has a module, too
        table = (*table, OUTPUT_HEAD)
    found: dict[str, Module] = {}
    for param in sorted(table, key=lambda param: param.part):
        spelled, _, tensor = family.rename(param.hf, rename).rpartition(".")
        for layer in range(config.num_layers if param.per_layer else 1):
            module = found.setdefault(spelled.format(layer), Module(layer, {}))
            assert isinstance(module.params, dict)
            module.params[tensor] = (*module.params.get(tensor, ()), param)
    return found


def best_modules(config: ModelConfig, names: Collection[str]) -> dict[str, Module]:
    """The modules in the spelling of the family's that most of an adapter's names have."""
    spelled = [modules_of(config, rename) for rename in family_of(config).renames]
    return max(spelled, key=lambda modules: sum(name in modules for name in names))


class _Reading:
    """An adapter's files while they become an `Adapter`."""

    def __init__(self, path: Path, lora: LoraConfig, file: AdapterFile, config: ModelConfig):
        self.path, self.lora, self.file = path, lora, file
        self.where = f"{path / CONFIG}"
        self.replicated = lora.replicated
        _check_replication(path, self.replicated, config)
        self.config = config
        if self.replicated:
            self.config = dataclasses.replace(config, num_layers=len(self.replicated), layer_rows=())
        self.modules = best_modules(self.config, file.modules)
        self.low_rank: dict[str, dict[int, LowRank]] = {}
        self.added: dict[str, dict[int, np.ndarray]] = {}
        self.replaced: dict[str, dict[int, np.ndarray]] = {}
        self.rows: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._digest = hashlib.blake2b(digest_size=8)
        self._digest.update(repr(dataclasses.replace(lora, base_model_name_or_path=None)).encode())

    def adapter(self) -> Adapter:
        lora, names = self.lora, self._known()
        have = [name for name in names if self._has_delta(name)]
        self._check_targets(have)
        default = {"rank": lora.r, "alpha": lora.lora_alpha}
        given = {"rank": lora.rank_pattern, "alpha": lora.alpha_pattern}
        ranks, alphas = (
            pattern_values(given[key], have, default[key], where=f"{self.where}: {key}_pattern")
            for key in ("rank", "alpha")
        )
        for name in names:
            if self._has_delta(name):
                self._read_delta(name, ranks[name], lora.scale(ranks[name], alphas[name]))
            self._read_saved(name)
        if alters_base(lora):
            logger.warning(
                "%s: init_lora_weights is %r: if the adapter was not converted when it was saved, it is for "
                "a base whose weights that method had altered, and wrong on the original one",
                self.where,
                lora.init_lora_weights,
            )
        return Adapter(
            name=self.path.resolve().name,
            path=self.path,
            replicated=self.replicated,
            low_rank=self.low_rank,
            added=self.added,
            replaced=self.replaced,
            rows=self.rows,
            digest=self._digest.hexdigest(),
        )

    def _known(self) -> list[str]:
        """The file's modules; those of other towers are left out with a warning, others refused."""
        names, family = list(self.file.modules), family_of(self.config)
        strange = [name for name in names if name not in self.modules]
        towers = [name for name in strange if family.ignores(f"{name}.weight")]
        if towers:
            logger.warning(
                "%s: left out, as they are for parts of the model that are not read: %s",
                self.file.path,
                visible(_folded(towers)),
            )
        if unknown := [name for name in strange if name not in towers]:
            base = self.lora.base_model_name_or_path
            made = f" (it was made for {shown(base)})" if base else ""
            raise UsageError(
                f"{self.file.path}: {_folded(unknown)} is in the adapter, but "
                f"no module of this {self.config.model_type} of {self.config.num_layers} layers, whose "
                f"modules are called as {shown(next(iter(self.modules)))}; take the model that the adapter "
                f"was made for{made}"
            )
        if not names:
            raise JaxchatError(f"{self.file.path}: holds no tensor; copy the adapter's file again")
        return [name for name in names if name in self.modules]

    def _has_delta(self, name: str) -> bool:
        return any(kind in _DELTA for kind, _ in self.file.modules[name])

    def _check_targets(self, have: Collection[str]) -> None:
        """Every module that the configuration is for has its delta in the file, and no other."""
        weights = {n: m.params["weight"][0] for n, m in self.modules.items() if "weight" in m.params}
        can = [n for n, p in weights.items() if p.role in ("weight", "embedding", "head")]
        linear = [n for n in can if weights[n].role == "weight"]
        wanted = targeted(self.lora, can, linear, where=self.where)
        names = list(weights)
        entries = shown(self.lora.target_modules)
        if self.lora.target_modules is not None and not wanted and (have or not self.lora.modules_to_save):
            raise UsageError(
                f"{self.where}: target_modules is {entries}, which is no module of this "
                f"{self.config.model_type} model, whose modules are called as {shown(linear[0])}; take the "
                "model that the adapter was made for"
            )
        if self.lora.target_modules is not None:
            self._refuse("has no delta of", wanted - set(have), f"which target_modules, {entries}, has")
            self._refuse("has a delta of", set(have) - wanted, f"which target_modules, {entries}, has not")
        if left := unmatched(self.lora, names):
            logger.warning(
                "%s: target_modules: no module of the model is called %s", self.where, visible(listed(left))
            )
        for entry in self.lora.modules_to_save or []:
            if not saved(dataclasses.replace(self.lora, modules_to_save=[entry]), names):
                raise UsageError(
                    f"{self.where}: modules_to_save has {shown(entry)}, which is no module of this "
                    f"{self.config.model_type} model; expected names such as {shown(names[0])}"
                )

    def _refuse(self, has: str, modules: Iterable[str], why: str) -> None:
        if modules := sorted(modules):
            raise JaxchatError(
                f"{self.file.path}: {has} {_folded(modules)} {why}; take file and {CONFIG} from one adapter"
            )

    # --- deltas

    def _read_delta(self, name: str, rank: int, scale: float) -> None:
        module, role = self.modules[name], self._role(name)
        if role not in ("weight", "embedding", "head"):
            raise UsageError(f"{self.file.path}: {name} has a delta, but is no projection; take a plain LoRA")
        params = module.params["weight"]
        self._check_tying(params[0])
        kinds = ("a of embedding", "b of embedding") if role == "embedding" else ("a", "b")
        a, b = self._factors(name, kinds, rank, params)
        magnitude = self._optional(name, ("magnitude", "weight"), len(b), "use_dora", "lora_magnitude_vector")
        added = self._optional(name, ("b", "bias"), len(b), "lora_bias", "bias of lora_B")
        with np.errstate(over="ignore"):
            b = b * np.float32(scale)
        if not np.isfinite(b).all():
            raise JaxchatError(
                f"{self.file.path}: {name}.lora_B times {scale:g} (lora_alpha and r in {CONFIG}) is too "
                "large for float32; put lora_alpha right"
            )
        for param in params:
            rows = slice(*param.fused_range(self.config)) if param.fused else slice(None)
            part = None if magnitude is None else magnitude[rows]
            self.low_rank.setdefault(param.name, {})[module.layer] = LowRank(a, b[rows], part)
            if added is not None:
                bias = param.name.removesuffix(".weight") + ".bias"
                self.added.setdefault(bias, {})[module.layer] = added[rows] * np.float32(scale)

    def _role(self, name: str) -> str | None:
        """What the weight of a module is; None where it has none."""
        params = self.modules[name].params.get("weight")
        return None if params is None else params[0].role

    def _optional(
        self, name: str, entry: tuple[str, str], outputs: int, key: str, what: str
    ) -> np.ndarray | None:
        """A vector [O] of a module that is in the file exactly if a switch of the configuration says so."""
        stored, wanted = self.file.modules[name].get(entry), bool(getattr(self.lora, key))
        if wanted != (stored is not None):
            raise JaxchatError(
                f"{self.file.path}: {name} has {'no' if wanted else 'a'} {what}, but {key} is "
                f"{str(wanted).lower()}; take file and {CONFIG} from one adapter"
            )
        return None if stored is None else self._tensor(stored, (outputs,))

    def _check_tying(self, param: Param) -> None:
        tied = self.config.tied_embeddings and param.name in (EMBED, HEAD)
        if tied and self.lora.ensure_weight_tying:
            raise UsageError(
                f"{self.where}: ensure_weight_tying is true and {param.hf} has a delta: one delta for "
                "embedding and head is not supported; leave the embedding out of target_modules"
            )

    def _factors(
        self, name: str, kinds: tuple[str, str], rank: int, params: tuple[Param, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        """A [R, I] and B [O, R] of a module, of which fused parameters are parts."""
        found = self.file.modules[name]
        for kind in kinds:
            if (kind, "weight") not in found:
                other = next(iter(found.values()))
                raise JaxchatError(
                    f"{self.file.path}: {name} has {shown(other)} but no lora_{kind[0].upper()}; expected "
                    "both factors, copy the file again"
                )
        out, inp = params[0].hf_shape(self.config)[:: -1 if params[0].transposed else 1]
        if params[0].role == "embedding":
            out, inp = inp, out
        a, b = (found[kind, "weight"] for kind in kinds)
        if self.lora.enable_lora:
            return self._grouped(a, b, rank, out, inp)
        if self.file.shape(a) != (rank, inp) and self.file.shape(a)[1:] == (inp,):
            raise JaxchatError(
                f"{self.file.path}: {a} is {list(self.file.shape(a))}, of rank {self.file.shape(a)[0]}, but "
                f"r and rank_pattern in {CONFIG} make it {rank}; take both from one adapter"
            )
        return self._tensor(a, (rank, inp)), self._tensor(b, (out, rank))

    def _grouped(self, a: str, b: str, rank: int, out: int, inp: int) -> tuple[np.ndarray, np.ndarray]:
        """The factors of PEFT 0.2's `MergedLinear`: a grouped convolution over the parts that are enabled.

        Part g of the output, of equal parts, is `b[g] @ a[g]`, and zero where `enable_lora` is false.
        """
        enabled = self.lora.enable_lora or []
        size, count = out // len(enabled), sum(enabled)
        if out % len(enabled) or not count:
            raise JaxchatError(
                f"{self.where}: enable_lora is {shown(enabled)}; expected some true, and as many entries as "
                f"divide the {out} outputs"
            )
        factors = self._tensor(a, (count * rank, inp))
        narrow = self._tensor(b, (count * size, rank, 1))[..., 0]
        wide = np.zeros((out, count * rank), np.float32)
        for group, part in enumerate(np.flatnonzero(enabled)):
            columns = slice(group * rank, (group + 1) * rank)
            wide[part * size : (part + 1) * size, columns] = narrow[group * size : (group + 1) * size]
        return factors, wide

    def _tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        values = self.file.floats(name, shape)
        self._count(name, values)
        return values

    def _count(self, name: str, values: np.ndarray) -> None:
        self._digest.update(f"{name}{values.dtype}{values.shape}".encode())
        self._digest.update(bytes_of(values))

    # --- what stands in the place of a parameter

    def _read_saved(self, name: str) -> None:
        found, module = self.file.modules[name], self.modules[name]
        if (rows := found.get(("token rows", "weight"))) is not None:
            self._read_rows(name, rows)
        for (kind, tensor), stored in found.items():
            if kind not in ("saved", "base"):
                continue
            if tensor not in module.params:
                raise JaxchatError(
                    f"{self.file.path}: {stored}: {name} has no {tensor} in this {self.config.model_type} "
                    "model; take the model that the adapter was made for"
                )
            self._check_saved(name, tensor, stored)
            self._replace(module, module.params[tensor], stored)

    def _read_rows(self, name: str, stored: str) -> None:
        """Rows of single tokens; of a tied head those of the embedding, as in PEFT."""
        param = self.modules[name].params["weight"][0]
        given = self.lora.trainable_token_indices
        ends = [name.endswith(key) for key in given] if isinstance(given, dict) else []
        ids = list(given.values())[ends.index(True)] if isinstance(given, dict) and any(ends) else given
        if param.role not in ("embedding", "head") or not isinstance(ids, list) or not ids:
            raise JaxchatError(
                f"{self.file.path}: {stored}: trainable_token_indices in {CONFIG} has no tokens of {name}; "
                "take both from one adapter"
            )
        if max(ids) >= self.config.vocab_size:
            raise UsageError(
                f"{self.where}: trainable_token_indices has token {max(ids)}; expected one below "
                f"{self.config.vocab_size}: tokens were added; give the model those, too "
                "(resize_token_embeddings)"
            )
        values = self._tensor(stored, (len(ids), self.config.hidden_size))
        self.rows[param.name] = np.asarray(ids), values
        if param.role == "embedding" and self.config.tied_embeddings:
            self.rows.setdefault(HEAD, self.rows[EMBED])

    def _check_saved(self, name: str, tensor: str, stored: str) -> None:
        """A whole tensor has a reason in the configuration, or is a resized embedding's."""
        ends = self.modules[name].params[tensor][0].role in ("embedding", "head")
        by_bias = tensor == "bias" and self.lora.bias != "none"
        if not (saved(self.lora, [name]) or ends or by_bias):
            raise JaxchatError(
                f"{self.file.path}: {stored} is a whole tensor, but modules_to_save in {CONFIG} does not "
                f"have {name}; take both from one adapter"
            )

    def _replace(self, module: Module, params: tuple[Param, ...], stored: str) -> None:
        expected = params[0].hf_shape(self.config)
        shape = self.file.shape(stored)
        if shape != expected:
            more = (
                ": tokens were added; give the model those, too (resize_token_embeddings)"
                if len(shape) == 2 and params[0].role in ("embedding", "head") and shape[1:] == expected[1:]
                else ": take the adapter and the model that it was made for"
            )
            raise UsageError(f"{self.file.path}: {stored} is {list(shape)}; expected {list(expected)}{more}")
        values = self.file.read(stored)
        self._count(stored, values)
        if params[0].transposed:
            values = values.T
        for param in params:
            rows = slice(*param.fused_range(self.config)) if param.fused else slice(None)
            self.replaced.setdefault(param.name, {})[module.layer] = np.ascontiguousarray(values[rows])


def _folded(modules: Iterable[str]) -> str:
    return listed([name[:-1] for name in fold_layers(f"{name}." for name in modules)])


_DELTA = ("a", "b", "a of embedding", "b of embedding", "magnitude")
