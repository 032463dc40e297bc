"""CmpDrop: rates, the calls it reaches, nested masks, and that it leaves nothing behind."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from cmp_trainer.ablations.drop import CmpDrop, any_rate
from cmp_trainer.checks.first_batch import NotedRates
from cmp_trainer.execution.ablated import Ablated
from cmp_trainer.execution.modes import train_mode_except_batch_norm
from cmp_trainer.execution.random_state import RandomState, preserve_rng_state
from tests.helpers import batch_of, tiny_bert, token_data

ONES = torch.ones(4, 6, 50)
IDENTITY = torch.eye(6).expand(4, 6, 6)  # attention over it returns its own weights


def attention(p: float) -> torch.Tensor:
    return F.scaled_dot_product_attention(torch.zeros(4, 6, 8), torch.zeros(4, 6, 8), IDENTITY, dropout_p=p)


DROPOUT_CALLS = {
    "module": lambda p: nn.Dropout(p)(ONES),
    "functional": lambda p: F.dropout(ONES, p=p),
    "positional": lambda p: F.dropout(ONES, p, True),
    "in place": lambda p: F.dropout(ONES.clone(), p, True, True),
    "channels": lambda p: F.dropout1d(ONES, p),
    "torch": lambda p: torch.dropout(ONES, p, True),
    "native": lambda p: torch.native_dropout(ONES, p, True)[0],
    "sdpa": attention,
}
ALPHA_CALLS = {"alpha": nn.AlphaDropout, "feature alpha": nn.FeatureAlphaDropout}


def drops_of(drops, drop=None):
    """The context of a forward after so many drops."""
    return Ablated([drop or CmpDrop()], [drops])


def dropped(call, p, drops, drop=None):
    torch.manual_seed(3)
    with drops_of(drops, drop):
        return call(p) == 0


@given(p=st.floats(0, 0.9), drops=st.integers(0, 6))
def test_compound_rate_is_that_of_dropping_k_times(p, drops):
    kept = 1.0
    for _ in range(drops):
        kept *= 1 - p
    assert CmpDrop().rate(p, drops) == pytest.approx(1 - kept)


def test_linear_schedule_base_rate_and_explicit_rates():
    assert CmpDrop("linear").rate(0.2, 3) == pytest.approx(0.6)
    assert CmpDrop(base_rate=0.5).rate(0.0, 2) == 0.75
    assert CmpDrop(rates=(0.1, 0.4)).rate(0.9, 2) == 0.4
    assert CmpDrop(rates=(0.1, 0.4)).rate(0.9, 0) == 0.0


@pytest.mark.parametrize(
    ("schedule", "drops", "message"),
    [(CmpDrop("linear"), 5, "reaches 5 . 0.2 >= 1"), (CmpDrop(rates=(0.1,)), 2, "2 drops, but only")],
)
def test_impossible_rates_are_rejected(schedule, drops, message):
    with pytest.raises(ValueError, match=message):
        schedule.rate(0.2, drops)


@pytest.mark.parametrize("call", DROPOUT_CALLS.values(), ids=DROPOUT_CALLS)
def test_zero_drops_drop_nothing(call):
    assert not dropped(call, 0.5, drops=0)[..., :6].any()


@pytest.mark.parametrize("call", DROPOUT_CALLS.values(), ids=DROPOUT_CALLS)
def test_masks_of_more_drops_contain_masks_of_fewer(call):
    masks = [dropped(call, 0.3, drops) for drops in range(1, 5)]
    for fewer, more in itertools.pairwise(masks):
        assert (fewer <= more).all()
        assert fewer.sum() < more.sum()


@pytest.mark.parametrize("module", ALPHA_CALLS.values(), ids=ALPHA_CALLS)
def test_alpha_dropout_follows_the_rate(module):
    with drops_of(0):
        assert torch.equal(module(0.5)(ONES), ONES)
    with drops_of(2):
        assert not torch.equal(module(0.5)(ONES), ONES)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_full_under_zero_drops(kind, packed):
    layer = kind(50, 8, num_layers=2, dropout=0.5, batch_first=True)
    data = nn.utils.rnn.pack_padded_sequence(ONES, [6, 5, 5, 2], batch_first=True) if packed else ONES

    def run():
        output = layer(data)[0]
        return output.data if packed else output

    with drops_of(0):
        full = run()
    assert torch.equal(full, layer.eval() and run())
    layer.train()
    with drops_of(1):
        assert not torch.equal(run(), full)


def test_multi_head_attention_of_pytorch_is_reached():
    layer = nn.MultiheadAttention(50, 2, dropout=0.5)
    with drops_of(0):
        assert torch.equal(layer(ONES, ONES, ONES)[0], layer(ONES, ONES, ONES, need_weights=True)[0])
    with drops_of(2):
        assert not torch.equal(layer(ONES, ONES, ONES)[0], layer(ONES, ONES, ONES)[0])


def test_one_drop_is_ordinary_dropout_to_the_bit():
    torch.manual_seed(3)
    ordinary = F.dropout(ONES, 0.3)
    torch.manual_seed(3)
    with drops_of(1):
        assert torch.equal(F.dropout(ONES, 0.3), ordinary)


def test_a_module_in_eval_mode_is_left_alone():
    with drops_of(2):
        assert torch.equal(nn.Dropout(0.5).eval()(ONES), ONES)


def test_the_base_rate_holds_at_sites_whose_own_rate_is_zero():
    assert dropped(DROPOUT_CALLS["functional"], 0.0, 1, CmpDrop(base_rate=0.5)).any()
    assert dropped(attention, 0.0, 1, CmpDrop(base_rate=0.5))[..., :6].any()


def test_sites_are_listed_with_their_own_rates():
    sites = []
    with Ablated([NotedRates(CmpDrop(), sites)], [0]):
        F.dropout(ONES, 0.3)
        F.dropout(ONES, 0.4, training=False)
        attention(0.2)
    assert sites == [("dropout", 0.3, True), ("dropout", 0.4, False), ("scaled_dot_product_attention", 0.2, True)]


def test_an_error_inside_leaves_no_context_behind():
    with pytest.raises(RuntimeError, match="stop"), drops_of(0):
        raise RuntimeError("stop")
    assert (F.dropout(ONES, 0.5) == 0).any()


def test_random_state_is_restored_also_after_an_error():
    before = RandomState.capture()
    with pytest.raises(RuntimeError, match="stop"), preserve_rng_state():
        torch.rand(3)
        raise RuntimeError("stop")
    assert torch.equal(RandomState.capture().cpu, before.cpu)


def test_an_eval_model_drops_in_train_mode_and_is_in_eval_mode_afterwards():
    model, batch = tiny_bert().eval(), batch_of(token_data())
    full = model(**batch).logits
    with train_mode_except_batch_norm(model), drops_of(2):
        assert not torch.equal(model(**batch).logits, full)
    assert not any(module.training for module in model.modules())
    assert torch.equal(model(**batch).logits, full)


def test_batch_norm_stays_in_eval_mode():
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5)).eval()
    with train_mode_except_batch_norm(model), drops_of(1):
        model(ONES)
    assert model[0].num_batches_tracked == 0


@pytest.mark.parametrize("settings", [{"growth": "cubic"}, {"base_rate": 1.0}, {"rates": (0.1, 1.5)}], ids=str)
def test_impossible_settings_are_rejected(settings):
    with pytest.raises(ValueError, match="CmpDrop: "):
        CmpDrop(**settings)


def test_attention_on_a_gpu_drops_in_a_kernel_that_takes_any_rate():
    class OnGpu:
        is_cuda = True

    before = torch.backends.cuda.cudnn_sdp_enabled()
    with any_rate(F.scaled_dot_product_attention, 0.1, (OnGpu(),)):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
    for func, rate, query in [
        (F.dropout, 0.1, OnGpu()),
        (F.scaled_dot_product_attention, 0.0, OnGpu()),
        (F.scaled_dot_product_attention, 0.1, torch.ones(1)),
    ]:
        with any_rate(func, rate, (query,)):
            assert torch.backends.cuda.cudnn_sdp_enabled() == before
