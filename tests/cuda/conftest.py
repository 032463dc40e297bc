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
    """torch.compile lets the Trainer turn TF32 on for the whole process."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
