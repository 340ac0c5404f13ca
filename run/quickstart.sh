#!/usr/bin/env bash
# From a fresh machine to scores: installs what is missing, lays out 2,624 images of solar cells, pretrains a small ViT on
# the unlabelled images, and draws what it learnt. Two tests on images that it has not seen, each beside a random backbone
# and simple statistics of brightness: are cells called defective where their neighbours are (a label), and is a cell found
# again after it was turned, cropped and relit (no label)?
#
#   bash run/quickstart.sh [FOLDER]    results go to FOLDER, by default outputs/quickstart
#
# About ten minutes on two cores after installation; a GPU is used when there is one. Starting it again goes on where it
# stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
. run/environment.sh

case ${1:-} in
    -h | --help)
        print_header run/quickstart.sh
        exit
        ;;
    -*) die "unknown option $1; usage: bash run/quickstart.sh [FOLDER]" ;;
esac
[ $# -le 1 ] || die "expected one folder at most, found $#: $*; usage: bash run/quickstart.sh [FOLDER]"

out=${1:-outputs/quickstart}
data=data/elpv
config=configs/train/cpu_10min.yaml
train_set=GroupedJSON:split=TRAIN:root=$data
val_set=GroupedJSON:split=VAL:root=$data
test_set=GroupedJSON:split=TEST:root=$data
# 400 of the recipe's 600 steps, and evaluation at twice instead of four times the crops' size, so that installing excepted ten
# minutes are enough for everything.
recipe=(optim.epochs=8 evaluation.image_size=192)

ensure_environment demo elpv_dataset cv2 sklearn matplotlib fvcore tensorboard

say "1/5 the images as a grouped set: $data"
"$PYTHON" tools/prepare_elpv.py --output "$data"

say "2/5 pretraining (no label is used, but for scores beside it)"
"$PYTHON" run/train/train.py --config "$config" "train.dataset_path=$train_set" "train.output_dir=$out" \
    "evaluation.train_dataset_path=$train_set" "evaluation.val_dataset_path=$val_set" "${recipe[@]}"

teacher=$(ls -t "$out"/eval/training_*/teacher_checkpoint.pth | head -n 1)
backbone=(--config-file "$out/config.yaml" --pretrained-weights "$teacher")

say "3/5 the label: k-NN on test"
"$PYTHON" eval/knn.py "${backbone[@]}" --compare-random --nb-knn 20 \
    --train-dataset "$train_set" --val-dataset "$test_set" --output-dir "$out/knn"

say "4/5 without labels: test's cells found again"
"$PYTHON" eval/retrieval.py "${backbone[@]}" --compare-random --reidentification \
    --val-dataset "$test_set" --output-dir "$out/reidentification"

say "5/5 what the patch features see"
"$PYTHON" tools/visualize_features.py "${backbone[@]}" \
    --dataset "$test_set" --num-images 4 --image-size 320 --output "$out/plots/patch_pca.png"

say "result: defective or not (95 % intervals)"
"$PYTHON" tools/compare_knn.py "pretrained=$out/knn" --intervals --yardsticks
say "result: the same cell found again (95 % intervals)"
"$PYTHON" tools/compare_knn.py "pretrained=$out/reidentification" --intervals --yardsticks
cat <<EOF

files
  $teacher  (backbone and heads)
  $out/plots/losses.png  $out/plots/knn.png  $out/plots/patch_pca.png
  $out/metrics.jsonl  $out/log/log.txt  $out/config.yaml

next
  longer      $PYTHON run/train/train.py --config configs/train/cpu_60min.yaml train.dataset_path=$train_set \\
                  train.output_dir=outputs/longer
  own images  docs/own_data.md, then
              $PYTHON run/train/train.py --config $config \\
                  train.dataset_path=ImageFolder:root=/path/to/images train.output_dir=outputs/mine --dry-run
  more GPUs   docs/multi_gpu.md
EOF
