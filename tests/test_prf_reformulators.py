"""examples/prf: reformulators as models that are saved, loaded and started from public layouts."""

import subprocess
import sys

import pytest
import torch
from reformulators import DenseReformulator, SparseReformulator
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from tests.hub_server import HubServer, take_for_the_hub

SIZE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 30}
IDS = torch.tensor([[2, 7, 8, 9, 3], [2, 10, 3, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


ELSEWHERE = f"""
import sys, torch
from transformers import AutoModel
assert not any("prf" in path for path in sys.path)
for name in ("dense", "sparse"):
    model = AutoModel.from_pretrained(name, trust_remote_code=True).eval()
    ids, mask = torch.tensor({IDS.tolist()}), torch.tensor({MASK.tolist()})
    torch.save(model(input_ids=ids, attention_mask=mask).query_vectors.detach(), name + ".pt")
"""


def environment(folder) -> dict[str, str]:
    return {"HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""}


@pytest.fixture
def bert(tmp_path):
    BertModel(BertConfig(**SIZE)).save_pretrained(tmp_path / "bert")
    return str(tmp_path / "bert")


@pytest.fixture
def masked_lm(tmp_path):
    torch.manual_seed(1)
    BertForMaskedLM(BertConfig(**SIZE, initializer_range=0.5)).save_pretrained(tmp_path / "mlm")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(25))]
    tokenizer = Tokenizer(models.WordLevel({word: row for row, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), words, strict=False))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(tmp_path / "mlm")
    return str(tmp_path / "mlm")


def vectors_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, attention_mask=MASK).query_vectors


def test_mean_pooling_leaves_padding_out(bert):
    model = DenseReformulator.from_encoder(bert, pooling="mean", normalize=True, scale=2.0)
    with torch.no_grad():
        states = BertModel.from_pretrained(bert).eval()(input_ids=IDS[1:, :3]).last_hidden_state
    wanted = 2.0 * nn.functional.normalize(states.mean(1), dim=-1)
    torch.testing.assert_close(vectors_of(model)[1:], wanted)


@pytest.mark.parametrize("prefix", ["", "ance_encoder."])
def test_the_ance_layout_is_taken_with_its_head(tmp_path, prefix):
    config = RobertaConfig(**SIZE, max_position_embeddings=40, pad_token_id=0)
    encoder, linear, norm = RobertaModel(config), nn.Linear(16, 12), nn.LayerNorm(12)
    nn.init.normal_(norm.weight)
    config.save_pretrained(tmp_path)
    parts = (("roberta", encoder), ("embeddingHead", linear), ("norm", norm))
    weights = {f"{prefix}{name}.{key}": value for name, part in parts for key, value in part.state_dict().items()}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    model = DenseReformulator.from_encoder(str(tmp_path))
    with torch.no_grad():
        states = encoder.eval()(input_ids=IDS, attention_mask=MASK).last_hidden_state
        torch.testing.assert_close(vectors_of(model), norm(linear(states[:, 0])))


def test_an_ance_head_without_its_encoder_is_refused(tmp_path):
    RobertaConfig(**SIZE).save_pretrained(tmp_path)
    torch.save({"embeddingHead.weight": torch.zeros(12, 16)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="has an ANCE head but lacks"):
        DenseReformulator.from_encoder(str(tmp_path))


def test_sparse_vectors_are_the_maximum_over_tokens_without_special_ones(masked_lm):
    model = SparseReformulator.from_encoder(masked_lm, normalize=False)
    with torch.no_grad():
        logits = BertForMaskedLM.from_pretrained(masked_lm).eval()(input_ids=IDS[1:, :3]).logits
    wanted = logits.amax(1).relu()
    assert (wanted[:, :5] > 0).any()  # there is something to zero
    wanted[:, :5] = 0.0
    torch.testing.assert_close(vectors_of(model)[1:], wanted)


def test_ids_below_the_first_weighted_one_get_no_weight_but_the_unknown_token(masked_lm):
    model = SparseReformulator.from_encoder(masked_lm, normalize=False, first_weighted_id=20)
    assert model.config.zeroed_ids == [0, *range(2, 20)]  # 1 is [UNK]
    with torch.no_grad():
        wanted = BertForMaskedLM.from_pretrained(masked_lm).eval()(input_ids=IDS[1:, :3]).logits.amax(1).relu()
    assert wanted[0, 1] > 0 and (wanted[:, 5:20] > 0).any()
    wanted[:, model.config.zeroed_ids] = 0.0
    torch.testing.assert_close(vectors_of(model)[1:], wanted)


def test_a_saved_reformulator_loads_without_this_project(bert, masked_lm, tmp_path):
    reformulators = {
        "dense": DenseReformulator.from_encoder(bert, scale=3.0),
        "sparse": SparseReformulator.from_encoder(masked_lm),
    }
    for name, model in reformulators.items():
        model.save_pretrained(tmp_path / name)
        torch.testing.assert_close(vectors_of(type(model).from_pretrained(tmp_path / name)), vectors_of(model))
        torch.testing.assert_close(vectors_of(AutoModel.from_pretrained(tmp_path / name)), vectors_of(model))
    subprocess.run([sys.executable, "-c", ELSEWHERE], check=True, cwd=tmp_path, env=environment(tmp_path))
    for name, model in reformulators.items():
        torch.testing.assert_close(torch.load(tmp_path / f"{name}.pt"), vectors_of(model))


PUSHED = f"""
import torch
from transformers import AutoModel, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("someone/reformulator", trust_remote_code=True)
assert tokenizer("w2 w3")["input_ids"] == [7, 8]
model = AutoModel.from_pretrained("someone/reformulator", trust_remote_code=True).eval()
ids, mask = torch.tensor({IDS.tolist()}), torch.tensor({MASK.tolist()})
torch.save(model(input_ids=ids, attention_mask=mask).query_vectors.detach(), "pushed.pt")
"""


def test_a_pushed_reformulator_loads_from_the_hub_without_this_project(masked_lm, tmp_path, monkeypatch):
    model = SparseReformulator.from_encoder(masked_lm, log_saturation=True)
    with HubServer(tmp_path / "hub") as hub:
        take_for_the_hub(hub, monkeypatch)
        model.push_to_hub("someone/reformulator", token=hub.token)
        AutoTokenizer.from_pretrained(masked_lm).push_to_hub("someone/reformulator", token=hub.token)
        files = {"config.json", "model.safetensors", "reformulators.py", "tokenizer.json"}
        assert files <= set(hub.files("someone/reformulator"))
        reached = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        elsewhere = environment(tmp_path) | reached
        subprocess.run([sys.executable, "-c", PUSHED], check=True, cwd=tmp_path, env=elsewhere, timeout=300)
    torch.testing.assert_close(torch.load(tmp_path / "pushed.pt"), vectors_of(model))


def test_every_weight_gets_a_gradient(bert):
    model = DenseReformulator.from_encoder(bert)
    model(input_ids=IDS, attention_mask=MASK).query_vectors.pow(2).sum().backward()
    without = [name for name, weight in model.named_parameters() if weight.grad is None]
    assert without == []  # else distributed training would wait for it


def test_an_unknown_pooling_is_refused(bert):
    with pytest.raises(ValueError, match="pooling 'last' is unknown; give first or mean"):
        DenseReformulator.from_encoder(bert, pooling="last")
