"""Datasets by the name that dataset strings use."""

from collections.abc import Mapping
from types import MappingProxyType

from dinov2.data.datasets.base import ImageDataset
from dinov2.data.datasets.elpv import ELPV
from dinov2.data.datasets.grouped_json import GroupedJSON
from dinov2.data.datasets.image_folder import ImageFolder
from dinov2.data.datasets.image_net import ImageNet
from dinov2.data.datasets.image_net_22k import ImageNet22k

DATASETS: Mapping[str, type[ImageDataset]] = MappingProxyType(
    {dataset.__name__: dataset for dataset in (ELPV, GroupedJSON, ImageFolder, ImageNet, ImageNet22k)}
)
