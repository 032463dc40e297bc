"""Every training collects garbage twice, which takes half a second among the modules of these libraries."""

import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def imported_modules_are_no_garbage():
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
