#!/usr/bin/env bash
# Predicts real slides with jobs/predict.py: one without a resolution, and one with measured counts, read in three ways.
#
#   benchmarks/real_slides.sh DATA MODEL OUT
#
# DATA: folder with samples.csv (its section C5 with counts) and slides/ (C5_aperio.svs, the same section as a pyramid, and
# another slide without a resolution); MODEL: a model's folder, trained at the sections' resolution; OUT: a new folder. If
# you have no model, train a small one (a minute or two; its scores mean nothing):
#
#   python jobs/prepare.py --samples DATA/samples.csv --out tiles --tiles.size_px 64 --tiles.sentence_length 64
#   python jobs/train.py --config jobs/configs/finetune.yaml --data tiles --name tiny --split.protocol reference \
#       --split.test_sections C5,B4 --model.image_weights random --model.image_encoder small_cnn --model.spot_layers 1 --train.epochs 1 --train.num_workers 1
set -euo pipefail
data=$(realpath "$1") model=$(realpath "$2") out=$3
mkdir -p "$out"
out=$(realpath "$out")
here=$(dirname "$0")
jobs=$here/../jobs

predict() { # arguments: name, samples, further options...
    echo "--- predict $1"
    python "$jobs/predict.py" --model "$model" --out "$out/$1" --samples "$2" --tracking.uri "sqlite:///$out/mlflow.db" \
        "${@:3}"
}

if predict slides "$data/slides"; then
    echo "the slide without a resolution was not quarantined"
    exit 1
fi
predict slides "$data/slides" --assume-mpp 0.5
python "$jobs/prepare.py" --samples "$data/samples.csv" --out "$out/tiles" --tiles.size_px 64 --tiles.sentence_length 64
python "$here/real_slides.py" list "$data" "$out"
predict spots "$out/spot_slides.csv" --spots "$out/spots.csv"
python "$here/real_slides.py" compare "$model" "$out"
