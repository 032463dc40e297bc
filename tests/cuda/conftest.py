"""What the tests here share: they are skipped where there is no GPU of NVIDIA, and float32 means float32."""

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    """Skips the tests of this folder, and no others that are collected with them."""
    if not torch.cuda.is_available():
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs a GPU of NVIDIA"))


@pytest.fixture(autouse=True)
def float32_without_shortcuts():
    """torch.compile lets the Trainer turn TF32 on for the whole process, by the newer of PyTorch's two ways to say so;
    where they contradict each other, reading one is an error."""
    _set_tf32(matmul=False, cudnn=False)
    yield
    _set_tf32(matmul=False, cudnn=True)  # PyTorch's defaults


def _set_tf32(matmul, cudnn):
    if hasattr(torch.backends, "fp32_precision"):
        torch.backends.fp32_precision = "none"
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn
