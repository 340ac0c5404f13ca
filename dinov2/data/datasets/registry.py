"""Datasets by the name that dataset strings use."""

from collections.abc import Mapping
from types import MappingProxyType

from dinov2.data.datasets.base import ImageDataset
from dinov2.data.datasets.cifar10 import CIFAR10
from dinov2.data.datasets.elpv import ELPV
from dinov2.data.datasets.grouped_json import GroupedJSON
from dinov2.data.datasets.image_folder import ImageFolder
from dinov2.data.datasets.image_mask_folder import ImageMaskFolder
from dinov2.data.datasets.image_net import ImageNet
from dinov2.data.datasets.image_net_22k import ImageNet22k
from dinov2.data.datasets.kitti_depth import KITTIDepth
from dinov2.data.datasets.nyu_depth_v2 import NYUDepthV2
from dinov2.data.datasets.voc_segmentation import VOCSegmentation

_ALL: tuple[type[ImageDataset], ...] = (
    CIFAR10,
    ELPV,
    GroupedJSON,
    ImageFolder,
    ImageMaskFolder,
    ImageNet,
    ImageNet22k,
    KITTIDepth,
    NYUDepthV2,
    VOCSegmentation,
)
DATASETS: Mapping[str, type[ImageDataset]] = MappingProxyType({dataset.__name__: dataset for dataset in _ALL})
