#!/usr/bin/env bash
# From a fresh machine to a k-NN score: installs what is missing, lays out 2,624 images of solar cells, scores a random
# backbone, pretrains a small ViT on the unlabelled images, scores it again, and draws what it learnt.
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
config=configs/train/elpv_quickstart.yaml
train_set=GroupedJSON:split=TRAIN:root=$data
test_set=GroupedJSON:split=TEST:root=$data

ensure_environment demo elpv_dataset cv2 sklearn matplotlib fvcore tensorboard

say "1/5 the images as a grouped set: $data"
"$PYTHON" tools/prepare_elpv.py --output "$data"

say "2/5 k-NN with a random backbone"
"$PYTHON" eval/knn.py --config-file "$config" --train-dataset "$train_set" --val-dataset "$test_set" \
    --output-dir "$out/knn_random"

say "3/5 pretraining (no label is used)"
"$PYTHON" run/train/train.py --config "$config" "train.output_dir=$out"

say "4/5 k-NN with the pretrained backbone"
teacher=$(ls -t "$out"/eval/training_*/teacher_checkpoint.pth | head -n 1)
"$PYTHON" eval/knn.py --config-file "$config" --pretrained-weights "$teacher" \
    --train-dataset "$train_set" --val-dataset "$test_set" --output-dir "$out/knn_pretrained"

say "5/5 what the patch features see"
"$PYTHON" tools/visualize_features.py --config-file "$config" --pretrained-weights "$teacher" \
    --dataset "$test_set" --num-images 4 --image-size 320 --output "$out/plots/patch_pca.png"

say "result"
"$PYTHON" tools/compare_knn.py "random=$out/knn_random" "pretrained=$out/knn_pretrained"
cat <<EOF

files
  $teacher  (backbone and heads)
  $out/plots/losses.png  $out/plots/knn.png  $out/plots/patch_pca.png
  $out/metrics.jsonl  $out/log/log.txt  $out/config.yaml

next
  longer      $PYTHON run/train/train.py --config $config optim.epochs=100 train.output_dir=outputs/longer
  own images  docs/own_data.md, then
              $PYTHON run/train/train.py --config configs/train/cpu_10min.yaml \\
                  train.dataset_path=ImageFolder:root=/path/to/photos train.output_dir=outputs/mine --dry-run
  more GPUs   docs/multi_gpu.md
EOF
