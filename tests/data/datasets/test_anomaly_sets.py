"""MVTec AD, AD 2 and VisA: labels, parts and masks as their layouts say."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2.data.loaders import make_dataset


def save(path: Path, values: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 8), 90, dtype=np.uint8) if values is None else values).save(path)


MASK = np.zeros((6, 8), dtype=np.uint8)
MASK[1:3, 2:5] = 255


def test_mvtec_ad(tmp_path: Path) -> None:
    for name in ("bottle/train/good/000", "bottle/test/good/000", "bottle/test/crack/000", "cable/test/good/000"):
        save(tmp_path / f"{name}.png")
    save(tmp_path / "bottle/ground_truth/crack/000_mask.png", MASK)
    train = make_dataset(dataset_str=f"MVTecAD:split=TRAIN:root={tmp_path}")
    assert train.get_targets().tolist() == [0]
    test = make_dataset(dataset_str=f"MVTecAD:split=TEST:root={tmp_path}:category=bottle")
    assert test.get_targets().tolist() == [1, 0]
    assert [int(test.get_mask(index).sum()) for index in range(2)] == [6, 0]
    assert len(set(test.get_group_ids())) == 2
    assert len(make_dataset(dataset_str=f"MVTecAD:split=TEST:root={tmp_path}")) == 3
    save(tmp_path / "bottle/test/crack/001.png")
    with pytest.raises(ValueError, match=r"crack/001 .* has no mask such as .*001_mask\.png"):
        make_dataset(dataset_str=f"MVTecAD:split=TEST:root={tmp_path}")
    for words, message in (
        ("split=VAL", "holds no image in"),
        ("split=NONE", "unknown split"),
        ("split=TEST:category=x", "x/test"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            make_dataset(dataset_str=f"MVTecAD:{words}:root={tmp_path}")


def test_mvtec_ad_2(tmp_path: Path) -> None:
    for name in ("train/good/000_regular", "validation/good/000_regular", "test_public/good/000_regular"):
        save(tmp_path / "can" / f"{name}.png")
    for light in ("regular", "overexposed", "shift_1"):
        save(tmp_path / f"can/test_public/bad/003_{light}.png")
        save(tmp_path / f"can/test_public/ground_truth/bad/003_{light}_mask.png", MASK)
    test = make_dataset(dataset_str=f"MVTecAD:split=TEST:root={tmp_path}")
    assert sorted(test.get_targets().tolist()) == [0, 1, 1, 1]
    assert len(set(test.get_group_ids())) == 2, "an object in three lights is one part"
    assert sum(int(test.get_mask(index).sum()) for index in range(4)) == 18
    assert len(make_dataset(dataset_str=f"MVTecAD:split=VAL:root={tmp_path}")) == 1


def test_visa(tmp_path: Path) -> None:
    rows = ["object,split,label,image,mask"]
    for kind, split, label, name in (
        ("candle", "train", "normal", "Normal/0"),
        ("candle", "test", "normal", "Normal/1"),
        ("candle", "test", "anomaly", "Anomaly/0"),
        ("pcb1", "train", "normal", "Normal/0"),
    ):
        image, mask = f"{kind}/Data/Images/{name}.JPG", f"{kind}/Data/Masks/{name}.png" if label == "anomaly" else ""
        save(tmp_path / image)
        rows.append(f"{kind},{split},{label},{image},{mask}")
    kinds = MASK // 255
    kinds[2] *= 3  # another kind of anomaly
    save(tmp_path / "candle/Data/Masks/Anomaly/0.png", kinds)
    table = tmp_path / "split_csv" / "1cls.csv"
    table.parent.mkdir()
    table.write_text("\n".join(rows))
    test = make_dataset(dataset_str=f"VisA:split=TEST:root={tmp_path}")
    assert test.get_targets().tolist() == [0, 1]
    assert [int(test.get_mask(index).sum()) for index in range(2)] == [0, 6]
    assert test.get_mask(1).max() == 1
    assert len(make_dataset(dataset_str=f"VisA:split=TRAIN:root={tmp_path}:category=pcb1")) == 1
    wrong = {
        "split=VAL": "unknown split",
        "split=TEST:category=pcb1": "lists no image",
        "split=TEST:table=2": "no table",
    }
    for words, message in wrong.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            make_dataset(dataset_str=f"VisA:{words}:root={tmp_path}")
    for text, message in (("object,split\n", "lacks the columns"), (f"{rows[0]}\ncandle,test,bad,x,\n", "label 'bad'")):
        table.write_text(text)
        with pytest.raises(ValueError, match=message):
            make_dataset(dataset_str=f"VisA:split=TEST:root={tmp_path}")
