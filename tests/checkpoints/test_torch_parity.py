"""PyTorch's files, read as PyTorch itself reads them: those it writes here, and those others made."""

import warnings
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")

from jaxchat.checkpoints.torch_file import TorchFile  # noqa: E402
from jaxchat.errors import JaxchatError  # noqa: E402


def assert_equals(file: TorchFile, expected: dict[str, Any]) -> None:
    assert file.entries.keys() == expected.keys()
    for name, tensor in expected.items():
        found = file.read(name)
        bits = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b""
        assert found.shape == tuple(tensor.shape)
        assert found.tobytes() == bytes(bits), name


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_files_that_torch_writes(tmp_path: Path, zipped: bool, protocol: int):
    base = torch.randn(6, 4)
    state = {
        "base": base,
        "tied": base,
        "part": base[2:5],
        "turned": base.T,
        "steps": base[::2, 1::2],
        "expanded": torch.ones(1, 4).expand(3, 4),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "half": torch.randn(5, 2).half(),
        "bfloat16": torch.randn(5, 2).bfloat16(),
        "double": torch.randn(2).double(),
        "ids": torch.arange(7),
        "flags": torch.tensor([True, False]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
    }
    path = tmp_path / "pytorch_model.bin"
    torch.save(state, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    assert_equals(TorchFile(path), state)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    torch.save({"epoch": 3, "state_dict": module.state_dict()}, path, _use_new_zipfile_serialization=zipped)
    assert_equals(TorchFile(path), module.state_dict())


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_eight_bit_floats(tmp_path: Path, dtype: str):
    state = {"w": torch.randn(4, 3).to(getattr(torch, dtype))}
    torch.save(state, tmp_path / "a.pt")
    assert_equals(TorchFile(tmp_path / "a.pt"), state)


def tensors_in(value: Any) -> dict[str, Any]:
    holder = {name: inner for name, inner in value.items() if isinstance(inner, torch.Tensor)}
    inner = [tensors_in(part) for part in value.values() if isinstance(part, dict)]
    return max((holder, *inner), key=len) if isinstance(value, dict) else {}


def test_files_that_others_made(shared_data: Path):
    files = [path for path in (shared_data / "torch-files").rglob("*") if path.suffix in (".pt", ".pth")]
    files += (shared_data / "models").rglob("pytorch_model.bin")
    compared = 0
    for path in files:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                expected = torch.load(path, map_location="cpu", weights_only=True)
            except Exception:  # then it may be anything
                continue
        if not isinstance(expected, dict) or not tensors_in(expected):
            continue
        try:
            file = TorchFile(path)
        except JaxchatError:
            assert any(isinstance(part, dict) for part in expected.values()), path  # nested deeper
            continue
        holders = [expected, *(part for part in expected.values() if isinstance(part, dict))]
        holder = next(h for h in holders if file.entries.keys() <= h.keys())
        assert_equals(file, {name: holder[name] for name in file.entries})
        compared += 1
    assert compared > 50
