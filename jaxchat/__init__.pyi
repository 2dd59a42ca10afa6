from .adapter_use import AdapterUse
from .chat.replies import Result, Score, TextStream, Timings
from .chat.session import ChatSession
from .checkpoints.assembly import Assembly
from .config import ModelConfig
from .engine.session import ContextOverflowError, Engine, Session
from .errors import JaxchatError, UsageError
from .layer_plan import LayerPlan, PlanError, Slot
from .options import GenerateOptions
from .recipes.recipe import RecipeError, read_recipe, to_mergekit
from .runtime import Model, load

__version__: str

__all__ = [
    "AdapterUse",
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
