"""What an image goes through before a frozen backbone sees it."""

from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional as TF

from dinov2.data.transforms import make_classification_eval_transform, make_normalize_transform

MARGIN = 256 / 224  # of the resized image over the crop, as published


class ResizeToCover:
    """Resizes so that the image just covers a size, keeping its shape.

    Args:
        size: height and width in pixels.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def __call__(self, image: Tensor) -> Tensor:
        """Returns the resized image (PIL or ``[C, H, W]``), at least ``size`` in both directions."""
        _, height, width = TF.get_dimensions(image)
        scale = max(self.size[0] / height, self.size[1] / width)
        size = [max(round(height * scale), self.size[0]), max(round(width * scale), self.size[1])]
        resized: Tensor = TF.resize(image, size, interpolation=transforms.InterpolationMode.BICUBIC)
        return resized


def make_eval_transform(image_size: int | tuple[int, int] = 224, *, whole_image: bool = False) -> transforms.Compose:
    """Builds the transform from a PIL image to a normalised tensor ``[3, H, W]``.

    Args:
        image_size: pixels of the result: one number for a square, or height and width.
        whole_image: squeezes the whole image into that size. By default the middle is cropped, as published, after
            resizing to 256/224 of the size, which cuts off at least an eighth of each side: a defect at the border is
            then never seen.

    Raises:
        ValueError: for a size below 1.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if min(height, width) < 1:
        raise ValueError(f"image_size must be at least 1, found {image_size}")
    if not whole_image and height == width:
        return make_classification_eval_transform(resize_size=round(height * MARGIN), crop_size=height)
    if whole_image:
        resize = [transforms.Resize((height, width), interpolation=transforms.InterpolationMode.BICUBIC)]
    else:
        resize = [
            ResizeToCover((round(height * MARGIN), round(width * MARGIN))),
            transforms.CenterCrop((height, width)),
        ]
    return transforms.Compose([*resize, transforms.ToTensor(), make_normalize_transform()])
