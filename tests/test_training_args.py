"""Arguments: from the command line, JSON and YAML, and what is refused."""

import copy
import json

import pytest
import torch
from transformers import HfArgumentParser

from cmp_trainer import (
    CmpCrop,
    CmpDrop,
    CmpSeq2SeqTrainingArguments,
    CmpTrainingArguments,
    ComparativeLoss,
    RegularizedLoss,
    plan,
)
from tests.helpers import training_arguments

GIVEN = {"cmp_num_ablations": 3, "cmp_num_crops": 1, "cmp_dropout_rates": [0.1, 0.3], "cmp_baseline": "0.5"}


def parser(kind=CmpTrainingArguments):
    return HfArgumentParser(kind)


@pytest.mark.parametrize("kind", [CmpTrainingArguments, CmpSeq2SeqTrainingArguments])
@pytest.mark.parametrize("source", ["command line", "json", "yaml"])
def test_arguments_come_from_command_line_json_and_yaml(source, kind, tmp_path):
    file = tmp_path / "arguments.json"  # JSON is YAML too
    file.write_text(json.dumps({"output_dir": str(tmp_path), **GIVEN}))
    if source == "command line":
        flags = "--cmp_num_ablations 3 --cmp_num_crops 1 --cmp_dropout_rates 0.1 0.3 --cmp_baseline 0.5"
        (args,) = parser(kind).parse_args_into_dataclasses(["--output_dir", str(tmp_path), *flags.split()])
    else:
        (args,) = parser(kind).parse_json_file(file) if source == "json" else parser(kind).parse_yaml_file(file)
    assert {name: getattr(args, name) for name in GIVEN} == GIVEN
    assert args.cmp_ablations == plan(3, 1, CmpDrop(rates=(0.1, 0.3)), CmpCrop())
    assert args.cmp_objective_function == ComparativeLoss(baseline=0.5)


def test_without_cmp_arguments_nothing_is_ablated(tmp_path):
    assert CmpTrainingArguments(output_dir=str(tmp_path)).cmp_num_ablations == 0


def test_arguments_survive_serialization(tmp_path):
    args = CmpTrainingArguments(output_dir=str(tmp_path), **GIVEN)
    assert {name: json.loads(args.to_json_string())[name] for name in GIVEN} == GIVEN


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"cmp_num_ablations": -1}, "--cmp_num_ablations -1 must be a non-negative integer"),
        ({"cmp_num_ablations": 1.5}, "--cmp_num_ablations 1.5 must be a non-negative integer"),
        ({"cmp_num_ablations": 2, "cmp_num_crops": 3}, "--cmp_num_crops 3 is more than --cmp_num_ablations 2"),
        ({"cmp_num_crops": -1}, "--cmp_num_crops -1 must be a non-negative integer"),
        ({"cmp_dropout": 1.0}, "--cmp_dropout 1.0 must be between 0 and 1"),
        ({"cmp_dropout": 0.0}, "--cmp_dropout 0.0 must be between 0 and 1"),
        ({"cmp_num_ablations": 2, "cmp_dropout": 0.5, "cmp_dropout_schedule": "linear"}, "reaches 2 . 0.5 >= 1"),
        ({"cmp_num_ablations": 2, "cmp_dropout_rates": [0.2, 0.1]}, "must increase strictly"),
        ({"cmp_num_ablations": 2, "cmp_dropout_rates": [0.1]}, "1 rates for 2 drops"),
        ({"cmp_dropout": 0.1, "cmp_dropout_rates": [0.1]}, "replace --cmp_dropout"),
        ({"cmp_dropout_schedule": "linear", "cmp_dropout_rates": [0.1]}, "replace the linear schedule"),
        ({"cmp_dropout_schedule": "cubic"}, "--cmp_dropout_schedule cubic is not a valid choice"),
        ({"cmp_baseline": "worst"}, "--cmp_baseline worst is not a valid baseline"),
        ({"cmp_baseline": "nan"}, "--cmp_baseline nan is not a valid baseline"),
        ({"cmp_temperature": 0.0}, "--cmp_temperature 0.0 must be a positive number"),
        ({"cmp_margin": -0.1}, "--cmp_margin -0.1 must be 0 or a positive number"),
        ({"cmp_margin": 0.1, "cmp_ranking": "listwise"}, "--cmp_margin 0.1 has no effect with the listwise ranking"),
        ({"cmp_primary": "mean"}, "--cmp_primary mean has no effect with the comparative objective"),
        ({"cmp_weight": 0.5}, "--cmp_weight 0.5 has no effect with the comparative objective"),
        ({"cmp_objective": "regularized", "cmp_baseline": "best"}, "--cmp_baseline best has no effect with the regul"),
        ({"cmp_objective": "regularized", "cmp_weight": -1.0}, "--cmp_weight -1.0 must be 0 or a positive number"),
        ({"cmp_ranking": "pairwize"}, "--cmp_ranking pairwize is not a valid choice"),
        ({"cmp_dropout": "1e-1"}, "--cmp_dropout 1e-1 is str, not a number; in YAML write 0.1"),
        ({"cmp_temperature": None}, "--cmp_temperature None is NoneType, not a number"),
        ({"cmp_dropout_rates": 0.1}, "--cmp_dropout_rates 0.1 must be a list of numbers"),
        ({"cmp_dropout_rates": ["1e-1"]}, "must be a list of numbers"),
        ({"cmp_baseline": None}, "--cmp_baseline None is not a valid baseline"),
    ],
)
def test_invalid_values_are_rejected_with_the_argument_and_the_fix(bad, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        CmpTrainingArguments(output_dir=str(tmp_path), **bad)


def test_a_config_for_ablations_can_be_switched_to_the_baseline(tmp_path):
    args = CmpTrainingArguments(output_dir=str(tmp_path), cmp_num_ablations=0, cmp_baseline="first", cmp_dropout=0.2)
    assert args.cmp_num_ablations == 0


def test_the_arguments_build_the_objective(tmp_path):
    regularized = {"cmp_objective": "regularized", "cmp_primary": "mean", "cmp_weight": 0.5, "cmp_loss_threshold": 1.1}
    args = CmpTrainingArguments(output_dir=str(tmp_path), cmp_temperature=2.0, **regularized)
    assert args.cmp_objective_function == RegularizedLoss("mean", 0.5, 1.1, temperature=2.0)
    args = CmpTrainingArguments(output_dir=str(tmp_path), cmp_baseline="first", cmp_ranking="listwise")
    assert args.cmp_objective_function == ComparativeLoss("first", "listwise")


@pytest.mark.parametrize("kind", [CmpTrainingArguments, CmpSeq2SeqTrainingArguments])
def test_the_token_of_the_hub_is_used_and_copied_but_never_written(kind, tmp_path):
    args = training_arguments(tmp_path, kind, hub_token="hf_secret", cmp_num_ablations=1)
    assert {args.hub_token, copy.copy(args).hub_token, copy.deepcopy(args).hub_token} == {"hf_secret"}
    assert copy.deepcopy(args).to_dict() == args.to_dict()
    torch.save(args, tmp_path / "training_args.bin")
    assert b"hf_secret" not in (tmp_path / "training_args.bin").read_bytes()
    loaded = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert (loaded.hub_token, loaded.cmp_num_ablations) == (None, 1)
