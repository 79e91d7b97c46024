#!/usr/bin/env bash
# Runs every study in the tables of docs/results.md, on real sections. Finished folds are kept: run it again to resume.
#
#   benchmarks/results.sh DATA WEIGHTS OUT [EPOCHS]
#
# DATA: folder with samples.csv (sections of several patients at one resolution), samples_lowres.csv (a labelled section of
# coarser resolution) and her2st/panel_785.txt; WEIGHTS: ImageNet weights of DenseNet-121; OUT: folder for tiles and results.
set -euo pipefail
data=$(realpath "$1") weights=$(realpath "$2") out=$3 epochs=${4:-8}
jobs=$(dirname "$0")/../jobs
mkdir -p "$out"
tracking=(--tracking.uri "sqlite:///$(realpath "$out")/mlflow.db")
one_worker=(--train.num_workers 1 --train.cpus_per_worker "$(nproc)" --train.precision auto)

study() { # arguments: name, tiles, protocol, config, settings...
    local name=$1 tiles=$2 protocol=$3 config=$4
    shift 4
    python "$jobs/cross_validate.py" --protocol "$protocol" --data "$out/$tiles" --out "$out/studies" --name "$name" \
        --config "$jobs/configs/$config.yaml" --model.image_weights "$weights" --floor-weights "$weights" \
        --cohort her2st "${one_worker[@]}" "${tracking[@]}" "$@"
    python "$jobs/report.py" --run "$out/studies/$name" --cohort her2st "${tracking[@]}"
}

python "$jobs/prepare.py" --config "$jobs/configs/reference.yaml" --samples "$data/samples.csv" --out "$out/tiles" \
    --tiles.sentence_length 64 --tiles.wide_um none
panel=(--genes.panel "$data/her2st/panel_785.txt")
study reference tiles reference reference "${panel[@]}" --train.epochs "$epochs"
study reference-patient tiles patient reference "${panel[@]}" --train.epochs "$epochs"
for protocol in patient reference; do
    for config in finetune stnet bleep; do
        study "$config-$protocol" tiles "$protocol" "$config" --train.epochs "$epochs" --train.batch_sentences 2
    done
done

python "$jobs/prepare.py" --samples "$data/samples.csv" --out "$out/wide" --tiles.min_tissue 0
for protocol in patient reference; do
    study "default-$protocol" wide "$protocol" default --train.precision fp32 --train.epochs 0
done

python "$(dirname "$0")/frozen_features.py" "$out/tiles" "$weights" "$out"

# The labelled section is five times coarser, so all sections are cut at its resolution, in tiles of 218 um.
python "$(dirname "$0")/join_sheets.py" "$data/samples.csv" "$data/samples_lowres.csv" > "$out/all.csv"
python "$jobs/prepare.py" --samples "$out/all.csv" --out "$out/tiles_coarse" --tiles.size_px 64 --tiles.mpp 3.4 \
    --tiles.sentence_length 64 --tiles.min_tissue 0 --tiles.wide_um none
study domains tiles_coarse patient finetune --folds A --train.epochs 30 --train.batch_sentences 2
