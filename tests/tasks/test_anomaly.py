"""Anomaly detection as a task: a memory of good parts or a decoder, from the run to the prediction."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fine_tune_stand_ins import BACKBONE, make_small
from PIL import Image
from predictor_stand_ins import write_package
from torch.nn.functional import normalize

import dinov2
from dinov2.config import ConfigError
from dinov2.eval.anomaly.memory import MemoryOrigin, PatchMemory
from dinov2.models.heads.anomaly import MemoryHead, ReconstructionHead
from dinov2.predict.calibrate import main as calibrate
from dinov2.predict.images import main as infer_images
from dinov2.tasks import load_task_config
from dinov2.tasks.anomaly import AnomalyPrediction
from dinov2.tasks.engine import main
from dinov2.tasks.package import load_task_package
from tests.anomaly_plates import draw_plates

ORIGIN = MemoryOrigin(backbone="0" * 64, image_size=(32, 32), blocks=(0, 1))


@pytest.fixture(scope="module")
def plates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of ten plates in ``train`` two are defective, of sixteen in ``val`` half; and the config of a backbone."""
    root = draw_plates(tmp_path_factory.mktemp("set") / "plates", {"train": (10, 2), "val": (16, 8)})
    (root / "backbone.yaml").write_text(BACKBONE)
    return root


def finetune(plates: Path, output: Path, *pairs: str) -> int:
    given = {
        "task": "anomaly",
        "backbone.blocks": "[0,1]",
        "backbone.config_file": str(plates / "backbone.yaml"),
        "data.image_size": "32",
        "data.num_workers": "0",
        "train.batch_size_per_gpu": "4",
        "evaluation.num_pictures": "1",
        "evaluation.threshold_false_alarms": "0.2",
        "anomaly.smoothing": "1.0",
        "data.train_dataset_path": f"GroupedJSON:split=TRAIN:root={plates}",
        "data.val_dataset_path": f"GroupedJSON:split=VAL:root={plates}",
        **dict(pair.split("=", 1) for pair in pairs),
    }
    return main([f"--output-dir={output}", *(f"{name}={value}" for name, value in given.items())])


@pytest.mark.parametrize("kind", ["memory", "reconstruction"])
def test_a_run_is_a_model_package(kind: str, plates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)
    out = tmp_path / "run"
    more = ("optim.epochs=3", "head.channels=16", "optim.lr=0.01") if kind == "reconstruction" else ()
    assert finetune(plates, out, f"head.kind={kind}", *more) == 0
    results = json.loads((out / "val" / "results.json").read_text())
    found = results["extra"]["figures"]
    assert found["image_auroc"] == found["part_auroc"] == 1.0
    assert found["part_false_alarms_at_zero_escapes"] == 0.0
    assert found["pixel_aupro_0.3"] > 0.4
    assert found["pixel_segf1"] > 0.1
    assert (out / "val" / "predictions.csv").read_text().startswith("image,part,label,prediction,score\n")

    model = dinov2.load(out / "best.pth")
    good, bad = plates / "val" / "17.png", plates / "val" / "1.png"
    found = model.predict([good, bad])
    assert [one.describe(scores=False) for one in found] == ["good", "anomalous"]
    assert found[1].map.shape == (48, 64)
    top, left = np.unravel_index(found[1].map.argmax(), (48, 64))
    assert 8 <= top < 32
    assert 16 <= left < 44
    words = [f"{entry.text} {entry.value}" for entry in found[1].legend()]
    assert any(text.startswith("threshold ") for text in words)
    assert any(text.startswith("false alarms ") for text in words)
    assert found[1].draw(Image.open(bad).convert("RGB")).height > 48
    frame = np.zeros((48, 64, 3), dtype=np.uint8)
    assert found[1].draw(frame, keep_size=True).size == (64, 48), "as frames of a video need it"
    assert found[0].image_score() < 0.5 < found[1].image_score()
    places = (f"--input={good.parent}", f"--output-dir={tmp_path / 'found'}", "--defect-maps")
    assert infer_images([f"--weights={out / 'best.pth'}", *places]) == 0
    assert np.load(tmp_path / "found" / "anomaly" / "1.npy").shape == (48, 64)
    rows = (tmp_path / "found" / "predictions.csv").read_text().splitlines()
    assert rows[0] == "image,width,height,label,score,threshold,anomalous_pixels"


def test_the_memory_scores_as_the_evaluator_does() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = [(torch.randn(3, 6, 2, 4, generator=generator), torch.zeros(3, 6)) for _ in range(2)]
    rows = torch.cat([normalize(one.flatten(2).transpose(1, 2), dim=2) for one, _ in maps], dim=2) / 2**0.5
    memory = PatchMemory.fit(normalize(torch.randn(200, 12, generator=generator), dim=1), ORIGIN, share=0.2)
    head = MemoryHead(6, 1, num_blocks=2).eval()
    head.remember(memory.centres, radius=memory.radius, num_patches=200)
    outputs = head(maps)
    patches, images = memory.score(rows)
    torch.testing.assert_close(outputs["patches"].flatten(1), patches, atol=2e-3, rtol=0)
    torch.testing.assert_close(outputs["score"], images, atol=2e-3, rtol=0)
    other = MemoryHead(6, 1, num_blocks=2).eval()
    other.load_state_dict(head.state_dict())
    torch.testing.assert_close(other(maps)["score"], outputs["score"])
    head.remember(memory.centres, radius=0.1, num_patches=200, foreground=torch.ones(13))
    other = MemoryHead(6, 1, num_blocks=2).double()
    other.load_state_dict(head.state_dict())
    assert other.foreground is not None
    assert other.foreground.dtype == other.centres.dtype == torch.float64
    head.remember(memory.centres[:1], radius=0.0, num_patches=1)
    assert head(maps)["score"].tolist() == head(maps)["patches"].flatten(1).amax(dim=1).tolist()


def test_what_surrounds_the_parts_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bright parts on a dark ground that shows dust: of a spot there nothing is said, of one on the part it is."""
    make_small(monkeypatch)
    generator = np.random.default_rng(0)
    (tmp_path / "backbone.yaml").write_text(BACKBONE)
    (tmp_path / "good").mkdir()

    def plate(spot: tuple[int, int] | None = None) -> np.ndarray:
        pixels = generator.integers(0, 20, (64, 64)).astype(np.uint8)
        pixels[16:48, 16:48] += 200
        if spot is not None:
            pixels[spot[0] : spot[0] + 8, spot[1] : spot[1] + 8] = 110
        return pixels

    for number in range(12):
        Image.fromarray(plate()).save(tmp_path / "good" / f"{number}.png")
    good = f"ImageFolder:root={tmp_path / 'good'}"
    pairs = (f"data.train_dataset_path={good}", f"data.val_dataset_path={good}", "evaluation.metric=good_score")
    more = ("data.image_size=64", "anomaly.foreground=pca", "anomaly.smoothing=0", "evaluation.num_pictures=0")
    assert finetune(tmp_path, tmp_path / "run", *pairs, *more) == 0
    model = dinov2.load(tmp_path / "run" / "best.pth")
    clean, around, on_it = model.predict([plate(), plate((0, 0)), plate((28, 28))])
    assert around.map[:8, :8].max() == 0
    assert around.score < 1.5 * clean.score < on_it.score
    assert load_task_package(tmp_path / "run" / "best.pth").model.head.foreground is not None


def test_a_decoder_that_gives_back_everything_finds_nothing() -> None:
    head = ReconstructionHead(4, 1, num_blocks=2, channels=8, dropout=0.5).eval()
    maps = [(torch.randn(2, 4, 3, 3), torch.zeros(2, 4)) for _ in range(2)]
    head.layers = torch.nn.Identity()
    assert head(maps)["patches"].abs().max() < 1e-5
    head.layers = torch.nn.Upsample(scale_factor=1)
    head.layers.forward = lambda given: -given  # the opposite
    torch.testing.assert_close(head(maps)["score"], torch.full((2,), 2.0))


def test_large_images_are_seen_window_by_window(plates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)
    more = ("data.resize=original", "evaluation.num_pictures=0", "anomaly.rotations=2", "train.ema_momentum=0.9")
    assert finetune(plates, tmp_path, *more) == 0  # of a memory there is no average
    predictor = dinov2.load(tmp_path / "best.pth").predictor
    pixels = np.full((90, 130, 3), 100, dtype=np.uint8)
    pixels[60:76, 100:116] = 250
    large, small = predictor.predict([pixels, pixels[:20, :29]])
    assert large.map.shape == (90, 130)
    top, left = np.unravel_index(large.map.argmax(), large.map.shape)
    assert 52 <= top < 84
    assert 92 <= left < 124
    assert small.map.shape == (20, 29)
    assert small.score < large.score


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["backbone.mode=full"], "needs a frozen backbone"),
        (["data.resize=shorter_side"], "cuts borders off"),
        (["evaluation.threshold=f1"], "not for task=anomaly"),
        (["anomaly.foreground=pca", "data.resize=original"], "must be stretch"),
    ],
)
def test_options_that_do_not_go_with_it(pairs: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_task_config(None, ["task=anomaly", *pairs])


def test_sets_without_good_parts(plates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)
    with pytest.raises(ValueError, match=r"\[36, 32\] must be a multiple of the patch size"):
        finetune(plates, tmp_path, "data.image_size=[36,32]")
    with pytest.raises(ValueError, match=r"good_class=2: .* has the classes"):
        finetune(plates, tmp_path, "anomaly.good_class=2")
    table = json.loads((plates / "annotations" / "train.json").read_text())
    bad = tmp_path / "bad"
    (bad / "annotations").mkdir(parents=True)
    table["data_list"] = [row for row in table["data_list"] if row["gt_label"]]
    for row in table["data_list"]:
        row |= {name: f"../{row[name]}" for name in ()}
    (bad / "annotations" / "train.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match="no good part"):
        finetune(plates, tmp_path, f"data.train_dataset_path=GroupedJSON:split=TRAIN:root={bad}")


def test_the_good_class_is_another_one_in_val(plates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders number their own classes: what is good in training must not be a defect in val."""
    make_small(monkeypatch)
    for folder in ("train/good", "val/crack", "val/good"):
        (tmp_path / folder).mkdir(parents=True)
        for number in range(6):
            Image.new("L", (32, 32), 20 * number).save(tmp_path / folder / f"{number}.png")
    sets = [f"data.{name}_dataset_path=ImageFolder:root={tmp_path / name}" for name in ("train", "val")]
    with pytest.raises(ValueError, match=r"val: .* there are \['crack', 'good'\], in training \['good'\]"):
        finetune(plates, tmp_path / "run", *sets)


def test_a_prediction_without_thresholds(tmp_path: Path) -> None:
    found = AnomalyPrediction(0.25, np.linspace(0, 0.5, 12, dtype=np.float32).reshape(3, 4))
    assert found.to_dict() == {"label": None, "score": 0.25, "threshold": None, "anomalous_pixels": None}
    assert found.value_range() == (0.0, 0.5)
    assert found.certainty() is None
    assert len(found.legend()) == 1
    assert found.draw(Image.new("RGB", (4, 3))).size[0] >= 320


def test_calibration_on_site(plates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)
    assert finetune(plates, tmp_path / "run", "evaluation.num_pictures=0") == 0
    model = tmp_path / "run" / "best.pth"
    before = load_task_package(model)
    site = tmp_path / "site"
    generator = np.random.default_rng(5)
    for number in range(24):
        (site / f"part {number // 2}").mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(60, 140, (48, 64)).astype(np.uint8)  # noisier than what was learnt
        Image.fromarray(pixels).save(site / f"part {number // 2}" / f"{number}.png")
    rate = "--false-alarm-rate=0.1"
    assert calibrate([str(model), f"--good={site}", rate, f"--output={tmp_path / 'other.pth'}"]) == 0
    other = load_task_package(tmp_path / "other.pth")
    assert other.thresholds["image"] > before.thresholds["image"]
    assert other.thresholds["part.num_good"] == 12
    assert other.thresholds["part.false_alarm_rate"] == pytest.approx(1 / 13)
    images = sorted(site.rglob("*.png"))
    alarms = [found.is_anomalous for found in dinov2.load(tmp_path / "other.pth").predict(images)]
    assert sum(alarms) <= 3
    assert all(found.is_anomalous for found in dinov2.load(model).predict(images))

    assert calibrate([str(model), f"--good={site}", f"--add={site}", rate]) == 0
    grown = load_task_package(model)
    assert len(grown.model.head.centres) > len(before.model.head.centres)
    assert grown.model.head.num_patches == before.model.head.num_patches + 24 * 16
    assert grown.thresholds["image"] < other.thresholds["image"], "what is remembered is near"
    for words, message in (([f"--good={site / 'part 0'}"], "too few"), (["--good=nowhere"], "no folder")):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            calibrate([str(model), *words])


def test_calibration_by_the_class_that_the_model_holds_for_good(
    plates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of a labelled set the good class of the model counts, not class 0."""
    make_small(monkeypatch)
    for split in ("train", "val"):
        table = json.loads((plates / "annotations" / f"{split}.json").read_text())
        table["metainfo"]["classes"] = ["defect", "good"]
        rows = [{**row, "gt_label": 1 - row["gt_label"]} for row in table["data_list"]]
        for row in rows:
            row.pop("mask_path", None)
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / f"{split}.json").write_text(json.dumps({**table, "data_list": rows}))
        (tmp_path / split).symlink_to(plates / split)
    sets = {name: f"GroupedJSON:split={name.upper()}:root={tmp_path}" for name in ("train", "val")}
    more = [f"data.{name}_dataset_path={text}" for name, text in sets.items()]
    more += ["anomaly.good_class=1", "anomaly.margin=0.1", "evaluation.num_pictures=0"]
    assert finetune(plates, tmp_path / "run", *more) == 0
    model = tmp_path / "run" / "best.pth"
    before = load_task_package(model).thresholds
    assert calibrate([str(model), f"--good={sets['val']}"]) == 0
    assert "16 of 32 images are left out: their parts are not good" in "".join(capfd.readouterr())
    assert load_task_package(model).thresholds == pytest.approx(before), "parts, rate and margin are those of training"
    table = json.loads((plates / "annotations" / "train.json").read_text())
    table["data_list"] = [row for row in table["data_list"] if row["gt_label"] == 0]
    (tmp_path / "annotations" / "test.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match=r"GroupedJSON.*no good part: .* \(1 of \['good', 'defect'\]\)"):
        calibrate([str(model), f"--good=GroupedJSON:split=TEST:root={tmp_path}"])


def test_models_that_are_not_calibrated(tmp_path: Path) -> None:
    path = write_package(tmp_path / "best.pth", "segmentation")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="task=segmentation sets no thresholds from good parts"):
        calibrate([str(path), f"--good={tmp_path}"])
    with pytest.raises(ValueError, match="takes no further images"):
        calibrate([str(path), f"--good={tmp_path}", f"--add={tmp_path}"])


def test_good_parts_that_are_all_even(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Constant images are learnt: one patch stands for all, and a spot stands out."""
    make_small(monkeypatch)
    (tmp_path / "backbone.yaml").write_text(BACKBONE)
    for number in range(6):
        (tmp_path / "good").mkdir(exist_ok=True)
        Image.new("L", (32, 32), 128).save(tmp_path / "good" / f"{number}.png")
    good = f"ImageFolder:root={tmp_path / 'good'}"
    pairs = (f"data.train_dataset_path={good}", f"data.val_dataset_path={good}", "evaluation.metric=good_score")
    assert finetune(tmp_path, tmp_path / "run", *pairs) == 0
    model = dinov2.load(tmp_path / "run" / "best.pth")
    spot = np.full((32, 32), 128, dtype=np.uint8)
    spot[8:16, 8:16] = 255
    even, spotted = model.predict([np.full((32, 32), 128, dtype=np.uint8), spot])
    assert not even.is_anomalous
    assert spotted.is_anomalous


def test_features_that_are_not_finite(plates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)
    monkeypatch.setattr(MemoryHead, "remember", lambda *given, **more: pytest.fail("NaN must not be remembered"))
    monkeypatch.setattr(
        "dinov2.models.heads.anomaly.patch_rows", lambda features: torch.full((len(features[0][0]), 16, 48), torch.nan)
    )
    with pytest.raises(ValueError, match="features of good parts are NaN or infinite"):
        finetune(plates, tmp_path)


@pytest.mark.parametrize("kind", ["memory", "reconstruction"])
def test_the_heads_export(kind: str) -> None:
    """Of the exported program the scores are the same; no control flow depends on values."""
    maps = [(torch.randn(2, 6, 3, 4), torch.zeros(2, 6)) for _ in range(2)]
    if kind == "memory":
        head: torch.nn.Module = MemoryHead(6, 1, num_blocks=2).eval()
        head.remember(normalize(torch.randn(20, 12), dim=1), radius=0.1, num_patches=50)
    else:
        head = ReconstructionHead(6, 1, num_blocks=2, channels=4, dropout=0.2).eval()
    with torch.no_grad():
        program = torch.export.export(head, (maps,))
        torch.testing.assert_close(program.module()(maps)["score"], head(maps)["score"])
