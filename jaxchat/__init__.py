"""jaxchat: chat with open LLMs in JAX on TPU, GPU and CPU, and reshape their layers on the fly.

>>> import jaxchat
>>> model = jaxchat.load("path/to/model", plan="0:8,4:12,8:")  # doctest: +SKIP
>>> model.chat("do you like music?").text  # doctest: +SKIP
"""

from jaxchat.config import ModelConfig
from jaxchat.engine import ContextOverflowError, Engine, Session
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.layer_plan import LayerPlan, PlanError, Slot
from jaxchat.runtime import (
    ChatSession,
    GenerateOptions,
    Model,
    Result,
    Score,
    TextStream,
    Timings,
    load,
)

__version__ = "0.1.0"

__all__ = [
    "ChatSession",
    "ContextOverflowError",
    "Engine",
    "GenerateOptions",
    "JaxchatError",
    "LayerPlan",
    "Model",
    "ModelConfig",
    "PlanError",
    "Result",
    "Score",
    "Session",
    "Slot",
    "TextStream",
    "Timings",
    "UsageError",
    "__version__",
    "load",
]
