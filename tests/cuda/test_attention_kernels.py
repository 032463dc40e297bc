"""Masks are nested in every kernel that draws them: plain dropout, and each kernel of scaled_dot_product_attention.

Each kernel of attention draws in its own way, so each has to drop at a higher rate what it dropped at a lower one; and
the choice among them must not change with the number of drops, since the masks of two kernels have nothing in common.
"""

import itertools

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from cmp_trainer import CmpDrop
from cmp_trainer.execution.ablated import Ablated
from tests.cuda.steps import DEVICE

DROPS = 3
LENGTH = 64
SHAPE = (2, 4, LENGTH, LENGTH)  # batch, heads, positions, size of a head
# With what PyTorch's profiler calls them.
KERNELS = {
    SDPBackend.MATH: "aten::_scaled_dot_product_attention_math",
    SDPBackend.EFFICIENT_ATTENTION: "aten::_scaled_dot_product_efficient_attention",
    SDPBackend.FLASH_ATTENTION: "aten::_scaled_dot_product_flash_attention",
    SDPBackend.CUDNN_ATTENTION: "aten::_scaled_dot_product_cudnn_attention",
}
ROUNDING = {SDPBackend.CUDNN_ATTENTION: 1 / 16}  # of a rate
# Newer versions of PyTorch leave rates that are no multiples of 1/16 to other kernels than cuDNN's.
RATES = {"compound": CmpDrop(base_rate=0.3), "sixteenths": CmpDrop(rates=(4 / 16, 7 / 16, 11 / 16))}
NO_KERNEL = "No available kernel|No viable backend"

every_type = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
every_mask = pytest.mark.parametrize("mask", ["none", "padding", "bias", "causal"])


def arguments_of(mask, dtype):
    """The mask as arguments of attention, and which weights it leaves, `(batch, heads, queries, keys)`."""
    kept = torch.ones(SHAPE, device=DEVICE, dtype=torch.bool)
    if mask == "padding":
        kept[1, :, :, -16:] = False
        return {"attn_mask": kept[:, :1].contiguous()}, kept
    if mask == "bias":
        numbers = torch.arange(2 * LENGTH * LENGTH, device=DEVICE, dtype=torch.float32)
        return {"attn_mask": numbers.sin().view(2, 1, LENGTH, LENGTH).to(dtype)}, kept
    if mask == "causal":
        return {"is_causal": True}, kept.tril()
    return {}, kept


def attention_weights(drop, drops, dtype, arguments):
    """Attention over an identity returns its own weights, 0 where they were dropped or masked."""
    query = torch.zeros(SHAPE, device=DEVICE, dtype=dtype, requires_grad=True)
    identity = torch.eye(LENGTH, device=DEVICE, dtype=dtype).repeat(*SHAPE[:2], 1, 1)
    torch.manual_seed(3)
    with Ablated([drop], [drops]):
        return F.scaled_dot_product_attention(query, query, identity, dropout_p=0.3, **arguments)


def assert_nested(dropped, kept, drop, rounding=0.0):
    """Nothing is dropped at level 0, more at each level, what was dropped stays dropped, and the rates are right."""
    assert not dropped[0].any()
    for fewer, more in itertools.pairwise(dropped):
        assert (fewer <= more).all() and fewer.sum() < more.sum()
    for drops, mask in enumerate(dropped):
        assert float(mask.sum() / kept.sum()) == pytest.approx(drop.rate(0.3, drops), abs=rounding + 0.02)


def kernels_used(run):
    """The kernels of attention that were called in `run()`, by the names of PyTorch's profiler."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run()
    return {event.key for event in profiled.key_averages() if event.key.startswith("aten::_scaled_dot_product_")}


@pytest.mark.parametrize("drop", RATES.values(), ids=RATES)
@every_mask
@every_type
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_masks_are_nested_in_every_kernel_of_attention(kernel, dtype, mask, drop):
    arguments, kept = arguments_of(mask, dtype)
    dropped = []
    with sdpa_kernel(kernel):
        for drops in range(1 + DROPS):

            def run(drops=drops):
                dropped.append((attention_weights(drop, drops, dtype, arguments) == 0) & kept)

            try:
                used = kernels_used(run)
            except RuntimeError as error:
                if kernel is SDPBackend.MATH or not any(reason in str(error) for reason in NO_KERNEL.split("|")):
                    raise
                pytest.skip(f"{kernel.name} does not take this")
            assert used == {KERNELS[kernel]}
    assert_nested(dropped, kept, drop, ROUNDING.get(kernel, 0.0))


# At a rate of 1/4, one drop and two make multiples of 1/16, which cuDNN takes, and three do not.
@pytest.mark.parametrize("rate", [0.1, 0.25])
@every_mask
@every_type
def test_the_kernel_that_is_chosen_does_not_change_with_the_number_of_drops(dtype, mask, rate):
    arguments, kept = arguments_of(mask, dtype)
    drop, dropped, chosen = CmpDrop(base_rate=rate), [], []
    for drops in range(1 + DROPS):

        def run(drops=drops):
            dropped.append((attention_weights(drop, drops, dtype, arguments) == 0) & kept)

        chosen.append(kernels_used(run))
    assert all(len(names) == 1 for names in chosen), chosen
    assert all(names == chosen[1] for names in chosen[1:]), chosen  # the full model drops nothing, whatever its kernel
    assert_nested(dropped, kept, drop, 1 / 16)


def attention(dtype, masked):
    """Attention over an identity returns its own weights."""
    query = torch.zeros(2, 4, 64, 64, device=DEVICE, dtype=dtype)
    identity = torch.eye(64, device=DEVICE, dtype=dtype).expand(2, 4, 64, 64)
    mask = torch.ones(2, 1, 1, 64, device=DEVICE, dtype=torch.bool) if masked else None
    return F.scaled_dot_product_attention(query, query, identity, attn_mask=mask, dropout_p=0.3)


def plain(dtype, masked):
    return F.dropout(torch.ones(64, 257, device=DEVICE, dtype=dtype), 0.3)


@pytest.mark.parametrize("call", [plain, attention])
@pytest.mark.parametrize("masked", [False, True])
@every_type
def test_masks_of_more_drops_contain_masks_of_fewer(call, masked, dtype):
    masks = []
    for drops in range(4):
        torch.manual_seed(3)
        with Ablated([CmpDrop()], [drops]):
            masks.append(call(dtype, masked) == 0)
    assert not masks[0].any()
    for fewer, more in itertools.pairwise(masks):
        assert (fewer <= more).all() and fewer.sum() < more.sum()
