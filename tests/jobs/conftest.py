"""A tiny model that answers the lines of jobs."""

import pytest

import jaxchat
from tests.support.adapters import lora_tensors, projections, write_adapter
from tests.support.tiny_chat import write_tiny_chat


@pytest.fixture(scope="package")
def job_directory(tmp_path_factory):
    return write_tiny_chat(tmp_path_factory.mktemp("job"), max_position_embeddings=1024)


@pytest.fixture(scope="package")
def job_adapter(job_directory, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "poet"
    config = jaxchat.load(job_directory).config
    return str(write_adapter(folder, lora_tensors(projections(config)), target_modules="all-linear"))


@pytest.fixture(scope="package")
def job_model(job_directory, job_adapter):
    """With an adapter that is not used where nobody asks for it."""
    return jaxchat.load(job_directory, adapter=job_adapter).with_adapters(None)
