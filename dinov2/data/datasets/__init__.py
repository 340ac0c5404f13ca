"""Image datasets: what they share (`base`), one module per layout, and their names (`registry`)."""

from dinov2.data.datasets.base import ImageDataset
from dinov2.data.datasets.elpv import ELPV
from dinov2.data.datasets.grouped_json import GroupedJSON
from dinov2.data.datasets.image_folder import ImageFolder
from dinov2.data.datasets.image_net import ImageNet
from dinov2.data.datasets.image_net_22k import ImageNet22k

__all__ = ["ELPV", "GroupedJSON", "ImageDataset", "ImageFolder", "ImageNet", "ImageNet22k"]
