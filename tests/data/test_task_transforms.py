"""Transforms of supervised data: sizes, fills, reproducibility, and training that looks like evaluation."""

import pickle

import pytest
import torch
from task_stand_ins import EVERYTHING, MOVES, Options, coded_sample, decode_depth
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as TF

from dinov2.data.datasets.dense_targets import IGNORED
from dinov2.data.decoding import MAX_PIXELS
from dinov2.data.loaders import make_data_loader
from dinov2.data.task_transforms import make_eval_transform, make_train_transform
from dinov2.data.transforms import IMAGENET_MEAN, IMAGENET_STD

MEAN, STD = torch.tensor(IMAGENET_MEAN)[:, None, None], torch.tensor(IMAGENET_STD)[:, None, None]


def denormalize(image):
    return 255 * (image * STD + MEAN)


class Photos(Dataset):
    def __init__(self, transform, size=12):
        self.transform, self.size = transform, size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return self.transform({**coded_sample(), "index": index})


@pytest.mark.parametrize("resize", ["stretch", "shorter_side", "original"])
@pytest.mark.parametrize("image_size", [(56, 56), (28, 84), (140, 42)])
def test_kinds_and_sizes(resize, image_size):
    transform = make_train_transform(EVERYTHING, image_size, resize)
    torch.manual_seed(0)
    for _ in range(10):
        sample = transform(coded_sample())
        for key, dtype in (("image", torch.float32), ("mask", torch.int64), ("depth", torch.float32)):
            assert type(sample[key]) is torch.Tensor
            assert sample[key].dtype == dtype
            assert sample[key].shape[-2:] == image_size
            assert sample[key].is_contiguous()
        assert sample["image"].isfinite().all()
        assert len(sample["boxes"]) == len(sample["box_labels"])
        assert sample["index"] == 5


def test_beyond_the_photo_everything_is_nothing():
    transform = make_train_transform(EVERYTHING, (56, 84), "stretch")
    seen = 0
    for seed in range(40):
        torch.manual_seed(seed)
        sample = transform(coded_sample())
        outside = sample["mask"] == IGNORED
        seen += int(outside.sum())
        assert torch.equal(outside, sample["depth"].isnan())
        assert (sample["image"][:, outside] == 0).all()
        assert (sample["image"][:, ~outside] != 0).float().mean() > 0.95
    assert seen > 1000


def test_image_and_targets_of_training_tell_the_same_place():
    transform = make_train_transform(MOVES, (56, 84), "stretch")
    for seed in range(30):
        torch.manual_seed(seed)
        sample = transform(coded_sample())
        inside = ~sample["depth"].isnan()
        rows, columns = decode_depth(sample["depth"][inside])
        image = denormalize(sample["image"])[:, inside] / 2
        # The edge of the photo is mixed with what lies beyond; the median does not see it.
        assert (image[0] - columns).abs().median() < 1.5
        assert (image[1] - rows).abs().median() < 1.5


def test_training_without_options_equals_evaluation():
    torch.manual_seed(0)
    trained = make_train_transform(Options(), (56, 84), "stretch")(coded_sample())
    evaluated = make_eval_transform((56, 84), "stretch")(coded_sample())
    for key in ("image", "mask", "depth", "boxes", "box_labels"):
        assert torch.equal(trained[key], evaluated[key]), key


def test_the_sample_given_is_left_alone():
    for transform in (
        make_train_transform(EVERYTHING, (56, 84), "stretch"),
        make_eval_transform((90, 120), "original"),
    ):
        sample = coded_sample()
        transform(sample)["image"].zero_()
        for key, value in coded_sample().items():
            assert torch.equal(sample[key], value) if isinstance(value, torch.Tensor) else sample[key] == value
            assert type(sample[key]) is type(value)


def test_seeds_repeat_everything_and_transforms_travel():
    transform = make_train_transform(EVERYTHING, (56, 84), "stretch")
    results = []
    for seed, made in ((1, transform), (1, pickle.loads(pickle.dumps(transform))), (2, transform)):
        torch.manual_seed(seed)
        results.append(made(coded_sample()))
    assert all(torch.equal(results[0][key], results[1][key]) for key in ("image", "mask", "boxes"))
    assert not torch.equal(results[0]["image"], results[2]["image"])


def test_seeded_workers_repeat_everything():
    def epoch(seed):
        loader: DataLoader = make_data_loader(
            dataset=Photos(make_train_transform(EVERYTHING, (28, 42), "stretch")),
            batch_size=1,
            num_workers=2,
            seed=seed,
            shuffle=False,
            sampler_type=None,
            collate_fn=list,
        )
        return torch.stack([batch[0]["image"] for batch in loader])

    first, again, other = epoch(0), epoch(0), epoch(1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len({image.sum().item() for image in first}) == len(first), "workers draw different numbers"


@pytest.mark.parametrize(
    ("size", "resize", "expected"),
    [
        ((90, 120), "stretch", (56, 84)),
        ((90, 120), "shorter_side", (56, 75)),
        ((120, 90), "shorter_side", (75, 56)),
        ((90, 120), "original", (90, 120)),
        ((1, 1), "shorter_side", (56, 56)),
        ((1, 1), "stretch", (56, 84)),
    ],
)
def test_sizes_of_evaluation(size, resize, expected):
    photo = coded_sample(*size, box=(0, 0, 1, 1))
    sample = make_eval_transform((56, 84), resize)(photo)
    assert sample["image"].shape == (3, *expected)
    assert sample["mask"].shape == sample["depth"].shape == expected
    resized = TF.resize(photo["image"], list(expected), interpolation=TF.InterpolationMode.BICUBIC, antialias=True)
    torch.testing.assert_close(denormalize(sample["image"]), resized.float(), atol=1e-3, rtol=0)


def test_center_crop_of_evaluation():
    photo = coded_sample()
    whole = make_eval_transform((56, 56), "shorter_side")(photo)
    crop = make_eval_transform((56, 56), "shorter_side", center_crop=True)(photo)
    assert torch.equal(crop["image"], whole["image"][:, :, 9:65])
    assert torch.equal(crop["mask"], whole["mask"][:, 9:65])
    padded = make_eval_transform((56, 84), "shorter_side", center_crop=True)(photo)
    outside = torch.ones(56, 84, dtype=torch.bool)
    outside[:, 5:80] = False  # 75 of 84 columns, one pixel more on the left
    assert torch.equal(padded["mask"] == IGNORED, outside)
    assert torch.equal(padded["depth"].isnan(), outside)
    assert (padded["image"][:, outside] == 0).all()


def test_evaluation_keeps_every_box():
    photo = coded_sample(box=(70, 20, 71, 21))
    sample = make_eval_transform((14, 14), "stretch")(photo)
    torch.testing.assert_close(sample["boxes"].tolist(), [[70 * 14 / 120, 20 * 14 / 90, 71 * 14 / 120, 21 * 14 / 90]])


def test_photos_that_would_burst_are_refused():
    photo = {"image": torch.zeros(3, 1, 1, dtype=torch.uint8).expand(3, 1, 20_000)}
    with pytest.raises(ValueError, match=f"would be resized to 518 x 10360000 .*more than {MAX_PIXELS} pixels"):
        make_eval_transform((518, 518), "shorter_side")(photo)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resize": "squash"}, "unknown resize 'squash'"),
        ({"resize": "original", "center_crop": True}, "center_crop goes with resize=shorter_side only, got original"),
    ],
)
def test_bad_evaluation(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_eval_transform((28, 28), **arguments)


def test_bad_training():
    with pytest.raises(ValueError, match=r"min_box_visibility must lie in 0\.\.1, got 2"):
        make_train_transform(Options(), (28, 28), min_box_visibility=2)
    transform = make_train_transform(Options(foreground_crop_prob=1.0), (28, 28))
    with pytest.raises(ValueError, match="foreground_crop_prob needs masks or boxes"):
        transform({"image": coded_sample()["image"]})
