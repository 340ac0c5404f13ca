"""Dataset strings: what they mean, and what is wrong with those that mean nothing."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dinov2.data.datasets import ImageDataset, registry
from dinov2.data.datasets.registry import named_value_range, parse_dataset_string, with_value_range
from dinov2.data.value_range import ValueRange


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("GroupedJSON:split=TRAIN:root=/data/parts", {"split": "TRAIN", "root": "/data/parts"}),
        ("ImageNet:split=TRAIN:root=/a:extra=/b", {"split": "TRAIN", "root": "/a", "extra": "/b"}),
        ("ImageNet22k:root=/a:extra=/b", {"root": "/a", "extra": "/b"}),
        ("ImageFolder:root=/a b/ü", {"root": "/a b/ü"}),
        (" ELPV:split=val:seed=3\n", {"split": "val", "seed": 3}),
        ("CIFAR10:root=/a:split=TRAIN", {"root": "/a", "split": "TRAIN"}),
        ("VOCSegmentation:root=/a:split=val:year=2007", {"root": "/a", "split": "val", "year": 2007}),
        (
            "ImageMaskFolder:root=/a:split=b:mask_values=0,255",
            {"root": "/a", "split": "b", "mask_values": "0,255"},
        ),
        (
            "CocoDetection:root=/a:split=TRAIN:annotations=b.json",
            {"root": "/a", "split": "TRAIN", "annotations": "b.json"},
        ),
        ("VOCDetection:root=/a:split=val:one_based=no", {"root": "/a", "split": "val", "one_based": False}),
        ("YOLODetection:root=/a:split=VAL", {"root": "/a", "split": "VAL"}),
        ("NYUDepthV2:root=/a:split=TEST", {"root": "/a", "split": "TEST"}),
        ("KITTIDepth:root=/a:split=TEST", {"root": "/a", "split": "TEST"}),
        (r"ImageFolder:root=C\:/data", {"root": "C:/data"}),
        (r"ImageFolder:root=a\\\:b\\", {"root": r"a\:b" + "\\"}),
        (r"ImageFolder:root=a\b", {"root": r"a\b"}),
        ("ImageFolder:root=a=b", {"root": "a=b"}),
        ("ImageFolder:root=a:light=standardized", {"root": "a", "light": "standardized"}),
        ("ImageFolder:root=a:range=-0.5,2e3", {"root": "a", "value_range": ValueRange(-0.5, 2000)}),
        ("ImageFolder:root=a:bits=12", {"root": "a", "value_range": ValueRange(0, 4095)}),
    ],
)
def test_meaning(text: str, arguments: dict[str, Any]) -> None:
    dataset_class, found = parse_dataset_string(text)
    assert (dataset_class.__name__, found) == (text.strip().partition(":")[0], arguments)


def test_a_path_is_told_which_dataset_string_opens_it(tmp_path: Path) -> None:
    root = tmp_path / "line:3"
    (root / "annotations").mkdir(parents=True)
    (root / "train").mkdir()
    (root / "annotations" / "train.json").touch()
    escaped = str(root).replace(":", r"\:")
    for path in (root, f"{root}/", root / "annotations" / "train.json"):
        with pytest.raises(ValueError, match=r"is a path and names no dataset") as error:
            parse_dataset_string(str(path))
        for advised in (f"GroupedJSON:split=TRAIN:root={escaped}", f"ImageFolder:root={escaped}:labels=none"):
            assert advised in str(error.value)
            assert parse_dataset_string(advised)[1]["root"] == str(root)
    with pytest.raises(ValueError, match=r" is a path and names no dataset: write "):
        parse_dataset_string(f"{tmp_path}:labels=none")
    (tmp_path / "images.zip").touch()
    with pytest.raises(ValueError, match=r"images\.zip' is a file and names no dataset: a set is a folder"):
        parse_dataset_string(str(tmp_path / "images.zip"))
    with pytest.raises(ValueError, match=r"'/no/such/photos' names no dataset, and there is no folder /no/such/photos"):
        parse_dataset_string("/no/such/photos")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unknown dataset ''; known: CIFAR10, CocoDetection, DAGM2007, ELPV"),
        ("groupedjson:split=TRAIN", r"unknown dataset 'groupedjson' \(did you mean GroupedJSON\?\)"),
        ("Imagenet", "did you mean ImageNet or ImageNet22k"),
        ("Nothing", "unknown dataset 'Nothing'; known: CIFAR10, CocoDetection, DAGM2007, ELPV, GDXray, GroupedJSON"),
        ("ImageNet22k", r"missing 'root'; write ImageNet22k:root=\.\.\."),
        ("GroupedJSON", r"missing 'root', 'split'; write GroupedJSON:root=\.\.\.:split=\.\.\."),
        ("GroupedJSON:splt=TRAIN:root=/a", r"no key 'splt' \(did you mean split\?\); its keys are root \(required\)"),
        ("GroupedJSON:transform=x", "no key 'transform'"),
        ("ImageFolder:root=/a:groups=/a/parts.csv", "no key 'groups'.*; from a table of labels, dinov2 prepare_csv"),
        ("/data/labels.csv", "names no dataset, .*; from a table of labels, dinov2 prepare_csv"),
        ("labels.csv", r"unknown dataset .*; from a table of labels, dinov2 prepare_csv labels\.csv --image"),
        ("GroupedJSON:root=/a:root=/b:split=TRAIN", "key 'root' is given twice"),
        ("GroupedJSON:root=/a::split=TRAIN", "'' is not of the form key=value"),
        ("GroupedJSON:root=C:/data:split=TRAIN", r"'/data' is not of the form key=value \(write \\: for a colon"),
        ("GroupedJSON:root=:split=TRAIN", "key 'root' has no value"),
        ("ELPV:split=TRAIN:seed=one", "seed='one' is not of type int"),
        ("ImageFolder:root=a:range=5", "'ImageFolder:root=a:range=5': a range of values is LO,HI, .* found '5'"),
        ("ImageFolder:root=a:range=5,1", "a range of values is LO,HI with LO below HI, both finite, found 5,1"),
        ("ImageFolder:root=a:bits=24", "bits must be 8 to 16, found 24"),
        ("ImageFolder:root=a:bits=twelve", "bits='twelve' is not of type int"),
        ("ImageFolder:root=a:bits=12:range=0,1", "range and bits exclude each other"),
        ("ELPV:split=TRAIN:light=dim", "light must be one of original, standardized, found 'dim'"),
    ],
)
def test_errors(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_dataset_string(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ImageFolder:root=a", "ImageFolder:root=a:range=0,0.1"),
        ("ImageFolder:root=a:bits=12", "ImageFolder:root=a:bits=12"),
        ("ImageFolder:root=a:range=1,2", "ImageFolder:root=a:range=1,2"),
        (r"ImageFolder:root=C\:\a" + "\\", r"ImageFolder:root=C\:\a\\" + ":range=0,0.1"),
        ("", ""),
    ],
)
def test_a_range_is_named_once(text: str, expected: str) -> None:
    assert with_value_range(text, ValueRange(0, 0.1)) == expected
    assert with_value_range(text, None) == text
    assert named_value_range(with_value_range(text, ValueRange(0, 0.1))) == named_value_range(expected)
    if text:
        root = parse_dataset_string(text)[1]["root"]
        assert parse_dataset_string(expected)[1]["root"] == root


def test_flags_and_numbers_are_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Typed(ImageDataset):
        def __init__(self, *, flag: bool = False, share: float = 0.0, transform: None = None) -> None:
            super().__init__(transform=transform)

    monkeypatch.setattr("dinov2.data.datasets.registry.DATASETS", {"Typed": Typed})
    assert parse_dataset_string("Typed:flag=True:share=0.5") == (Typed, {"flag": True, "share": 0.5})
    assert parse_dataset_string("Typed:flag=no") == (Typed, {"flag": False})
    with pytest.raises(ValueError, match="flag='maybe' is not of type bool"):
        parse_dataset_string("Typed:flag=maybe")


def test_every_dataset_is_registered_under_its_own_name_and_opens_by_keywords(tmp_path: Path) -> None:
    for name, dataset in registry.DATASETS.items():
        assert dataset.__name__ == name
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    dataset_class, arguments = parse_dataset_string(f"ImageFolder:root={tmp_path}")
    assert len(dataset_class(transform=None, target_transform=None, **arguments)) == 1
