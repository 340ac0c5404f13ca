"""Image datasets: what they share (`base`, `dense_targets`, `boxes`, `references`), and one module per layout."""

from dinov2.data.datasets.base import ImageDataset
from dinov2.data.datasets.boxes import BoxSource
from dinov2.data.datasets.cifar10 import CIFAR10
from dinov2.data.datasets.coco_detection import CocoDetection
from dinov2.data.datasets.dagm import DAGM2007
from dinov2.data.datasets.dense_targets import IGNORED, BadTargetError, DepthSource, MaskSource
from dinov2.data.datasets.depth import KITTIDepth, NYUDepthV2
from dinov2.data.datasets.elpv import ELPV
from dinov2.data.datasets.gdxray import GDXray
from dinov2.data.datasets.grouped_json import GroupedJSON
from dinov2.data.datasets.image_folder import ImageFolder, ImageMaskFolder
from dinov2.data.datasets.image_net import ImageNet, ImageNet22k
from dinov2.data.datasets.mura import MURA
from dinov2.data.datasets.mvtec_ad import MVTecAD
from dinov2.data.datasets.references import ReferenceSource
from dinov2.data.datasets.visa import VisA
from dinov2.data.datasets.voc_detection import VOCDetection
from dinov2.data.datasets.voc_segmentation import VOCSegmentation
from dinov2.data.datasets.yolo_detection import YOLODetection

__all__ = [
    "CIFAR10",
    "DAGM2007",
    "ELPV",
    "IGNORED",
    "MURA",
    "BadTargetError",
    "BoxSource",
    "CocoDetection",
    "DepthSource",
    "GDXray",
    "GroupedJSON",
    "ImageDataset",
    "ImageFolder",
    "ImageMaskFolder",
    "ImageNet",
    "ImageNet22k",
    "KITTIDepth",
    "MVTecAD",
    "MaskSource",
    "NYUDepthV2",
    "ReferenceSource",
    "VOCDetection",
    "VOCSegmentation",
    "VisA",
    "YOLODetection",
]
