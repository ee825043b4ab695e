"""Networks, each for every family of layers: adders, their multiplying twins, Euclid distances."""

from jadder.models.creation import create
from jadder.models.family import FAMILIES, Family, get_family
from jadder.models.files import Description, SavedModel, load, save
from jadder.models.lenet import LeNet5
from jadder.models.normalization import BatchNorm, LayerNorm
from jadder.models.published import pretrained
from jadder.models.registry import MODELS, Architecture, names
from jadder.models.resnet import (
    BasicBlock,
    Bottleneck,
    ResNet,
    resnet8,
    resnet18,
    resnet20,
    resnet32,
    resnet34,
    resnet50,
)
from jadder.models.statistics import update_statistics
from jadder.models.swin import Swin
from jadder.models.torch_state import load_torch_state
from jadder.models.vgg import VGGSmall
from jadder.models.vit import AdderViT

__all__ = [
    "FAMILIES",
    "MODELS",
    "AdderViT",
    "Architecture",
    "BasicBlock",
    "BatchNorm",
    "Bottleneck",
    "Description",
    "Family",
    "LayerNorm",
    "LeNet5",
    "ResNet",
    "SavedModel",
    "Swin",
    "VGGSmall",
    "create",
    "get_family",
    "load",
    "load_torch_state",
    "names",
    "pretrained",
    "resnet8",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet34",
    "resnet50",
    "save",
    "update_statistics",
]
