"""Fixtures shared by the tests: the large reference data, tiny models, and one compilation cache per run."""

import gc
import os
import signal
from pathlib import Path

import hypothesis
import jax
import jaxtyping
import numpy as np
import pytest

# Shapes and dtypes that annotations name are checked in the tests, and cost nothing outside of them.
jaxtyping.install_import_hook(
    [
        "jaxchat.model",
        *(
            f"jaxchat.layers.{name}"
            for name in ("attention", "block", "cache", "chimera", "ends", "mlp", "norms", "rope")
        ),
    ],
    "beartype.beartype",
)

# No test asks the Hub on the network; those of fetching have their own.
os.environ["HF_HUB_OFFLINE"] = "1"

from jaxchat.checkpoints.load import load_params  # noqa: E402
from tests.support.commands import Commands  # noqa: E402
from tests.support.tiny import write_tiny_hf  # noqa: E402

# Shells start background jobs with SIGINT ignored, children inherit that, and the tests of Ctrl-C need it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# A slow or busy machine is no failure.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


def pytest_configure(config):
    """Eight CPU devices for tests of meshes, and compiling in half the time.

    Commands run as processes have one device and compile as they do for users.

    So does all of the live comparison. XLA reads its flags once, when the first devices are asked for; one it
    does not know ends the process, and later versions may not know this one.
    """
    jax.config.update("jax_num_cpu_devices", 8)
    if config.getoption("markexpr") == "parity" or jax.__version_info__ >= (0, 11):
        return
    before = os.environ.get("XLA_FLAGS")
    os.environ["XLA_FLAGS"] = f"{before or ''} --xla_cpu_use_fusion_emitters=false"
    jax.devices()
    if before is None:
        del os.environ["XLA_FLAGS"]
    else:
        os.environ["XLA_FLAGS"] = before


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """Each executable is compiled once per run, in subprocesses too; set the variable to keep them longer."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        directory = str(tmp_path_factory.mktemp("xla"))
        settings = {"jax_compilation_cache_dir": directory, "jax_persistent_cache_min_compile_time_secs": 0.0}
        for name, value in settings.items():
            jax.config.update(name, value)
            os.environ[name.upper()] = str(value)


@pytest.fixture(scope="module", autouse=True)
def few_mappings():
    """Drops compiled programs before they are too many for a process: Linux allows it 65,530 mappings.

    Each takes several, and where one more cannot be had, XLA aborts.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def commands(capsys, monkeypatch):
    """`commands("generate", "-p", "hello")`: what that writes, run in this process."""
    return Commands(capsys, monkeypatch)


@pytest.fixture
def rng():
    """Fresh inputs each time; the seed of a failure is in its output."""
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    return np.random.default_rng(seed)


@pytest.fixture
def quick_compilation():
    """For tests whose time goes into compiling: the programs are the same, only slower."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Reference data (tokenizers, models, expected values) that is too large for the repository."""
    path = Path(__file__).parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip("needs the reference data in ../shared/data beside the repository")
    return path


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory):
    """`tiny_directory(model_type, **write_tiny_hf arguments)`: its directory, written once per run."""
    made = {}

    def make(model_type, **options) -> Path:
        key = model_type, repr(sorted(options.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp(model_type)
            write_tiny_hf(made[key], model_type, **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_model(tiny_directory):
    """`tiny_model(model_type, load_dtype=None, ...)`: configuration and parameters, loaded once per run."""
    loaded = {}

    def load(model_type, *, load_dtype=None, **options):
        directory = tiny_directory(model_type, **options)
        if (directory, load_dtype) not in loaded:
            loaded[directory, load_dtype] = load_params(directory, dtype=load_dtype)
        return loaded[directory, load_dtype]

    return load
