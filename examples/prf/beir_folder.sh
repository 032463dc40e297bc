#!/bin/sh
# Five trainings side by side in one collection: baseline, regularized and comparative with 1 and 2 crops.
#   examples/prf/beir_folder.sh data/cranfield sentence-transformers/all-MiniLM-L6-v2 runs/prf_beir
# Run again after an interruption: finished folds are kept.
set -eu
collection=$1 model=$2 runs=$3
here=$(dirname "$0")

train() {  # name crops epochs batch [arguments]
    name=$1 crops=$2 epochs=$3 batch=$4
    shift 4
    python "$here/run_prf.py" "$here/beir_folder.yaml" \
        --train_collection "$collection" --model_name_or_path "$model" \
        --first_pass_dir "$runs/first_pass" --output_dir "$runs/$name" \
        --cmp_num_ablations "$crops" --cmp_num_crops "$crops" \
        --num_train_epochs "$epochs" --per_device_train_batch_size "$batch" "$@"
}

train baseline 0 2 6
train comparative_1 1 1 3
train regularized_1 1 1 3 --cmp_objective regularized --cmp_primary mean --cmp_weight 1
train comparative_2 2 0.66666 2
train regularized_2 2 0.66666 2 --cmp_objective regularized --cmp_primary mean --cmp_weight 1
python "$here/compare.py" "$runs/baseline" "$runs/regularized_1" "$runs/regularized_2" \
    "$runs/comparative_1" "$runs/comparative_2" --output "$runs/comparison.png" | tee "$runs/comparison.md"
