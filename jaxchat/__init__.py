"""jaxchat: chat with open LLMs in JAX on TPU, GPU and CPU, and reshape their layers on the fly.

>>> import jaxchat
>>> model = jaxchat.load("path/to/model", plan="0:8,4:12,8:")  # doctest: +SKIP
>>> model.chat("do you like music?").text  # doctest: +SKIP
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxchat.chat.replies import Result, Score, TextStream, Timings
    from jaxchat.chat.session import ChatSession
    from jaxchat.checkpoints.assembly import Assembly
    from jaxchat.config import ModelConfig
    from jaxchat.engine.session import ContextOverflowError, Engine, Session
    from jaxchat.errors import JaxchatError, UsageError
    from jaxchat.layer_plan import LayerPlan, PlanError, Slot
    from jaxchat.options import GenerateOptions
    from jaxchat.recipes.recipe import RecipeError, read_recipe, to_mergekit
    from jaxchat.runtime import Model, load

__version__ = "0.1.0"

__all__ = [
    "Assembly",
    "ChatSession",
    "ContextOverflowError",
    "Engine",
    "GenerateOptions",
    "JaxchatError",
    "LayerPlan",
    "Model",
    "ModelConfig",
    "PlanError",
    "RecipeError",
    "Result",
    "Score",
    "Session",
    "Slot",
    "TextStream",
    "Timings",
    "UsageError",
    "__version__",
    "load",
    "read_recipe",
    "to_mergekit",
]

if not TYPE_CHECKING:
    # Resolved at first use (PEP 562): importing JAX takes half a second that `--help`, `--show` and tools
    # which only need a plan or a configuration should not wait for.
    _HOMES = {
        "Assembly": "checkpoints.assembly",
        "ChatSession": "chat.session",
        "ContextOverflowError": "engine.session",
        "Engine": "engine.session",
        "GenerateOptions": "options",
        "JaxchatError": "errors",
        "LayerPlan": "layer_plan",
        "Model": "runtime",
        "ModelConfig": "config",
        "PlanError": "layer_plan",
        "RecipeError": "recipes.recipe",
        "Result": "chat.replies",
        "Score": "chat.replies",
        "Session": "engine.session",
        "Slot": "layer_plan",
        "TextStream": "chat.replies",
        "Timings": "chat.replies",
        "UsageError": "errors",
        "load": "runtime",
        "read_recipe": "recipes.recipe",
        "to_mergekit": "recipes.recipe",
    }

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
