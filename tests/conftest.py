"""Settings of every test: one thread (tiny models), few hypothesis examples, no tracker, no network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_DISABLED", "true")

import pytest
import torch
import torch._dynamo
from hypothesis import settings

settings.register_profile("cmp_trainer", max_examples=25, deadline=None)
settings.load_profile("cmp_trainer")


@pytest.fixture(autouse=True)
def environment_of_its_own():
    """transformers 4 leaves bf16 and torch_compile in the environment, where every later trainer finds them."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})


@pytest.fixture(autouse=True)
def no_compiled_code_of_other_tests():
    """What torch.compile keeps is dropped while the models that it was made for are alive."""
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def one_thread_and_one_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)
