"""The multiplying networks in PyTorch, as one would write them there.

They are those of `jadder.models` with the family "conv", layer for layer, with the same names, but
that attention has one layer for queries, keys and values, and PyTorch's own product of them.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from jadder.models.vit import sincos_position_embedding


class BasicBlock(nn.Module):  # type: ignore[misc]
    """Two 3 x 3 convolutions, the first with the stride, and the shortcut around them."""

    def __init__(self, in_features: int, features: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_features, features, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(features)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(features)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_features != features:
            shortcut = nn.Conv2d(in_features, features, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(features))

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return functional.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):  # type: ignore[misc]
    """`jadder.models.ResNet`: images (batch, 3, height, width) to logits."""

    def __init__(self, stage_sizes: tuple[int, ...], width: int, num_classes: int) -> None:
        super().__init__()
        self.imagenet = width == 64
        window, stride = (7, 2) if self.imagenet else (3, 1)
        self.conv1 = nn.Conv2d(3, width, window, stride, padding=window // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        in_features = width
        self.stages = len(stage_sizes)
        for stage, size in enumerate(stage_sizes):
            features = width * 2**stage
            blocks = []
            for index in range(size):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(BasicBlock(in_features, features, stride))
                in_features = features
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(in_features, num_classes, bias=self.imagenet)
        self.bn2 = nn.BatchNorm1d(num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(images)))
        if self.imagenet:
            x = functional.max_pool2d(x, 3, 2, padding=1)
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        logits: Tensor = self.bn2(self.fc(x.mean((2, 3))))
        return logits


class Attention(nn.Module):  # type: ignore[misc]
    """Four heads of dot products; tokens (batch, tokens, features) to the same."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(features, 3 * features, bias=False)
        self.out = nn.Linear(features, features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, features = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, tokens, features))
        return out


class Block(nn.Module):  # type: ignore[misc]
    """Layer norm and attention, then layer norm and MLP, each added to its input."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(features)
        self.attention = Attention(features, heads)
        self.mlp_norm = nn.LayerNorm(features)
        self.mlp_in = nn.Linear(features, features)
        self.mlp_out = nn.Linear(features, features)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        hidden = functional.gelu(self.mlp_in(self.mlp_norm(x)))
        out: Tensor = x + self.mlp_out(hidden)
        return out


class SimpleViT(nn.Module):  # type: ignore[misc]
    """`jadder.models.AdderViT` at its sizes: images (batch, 3, height, width) to logits."""

    def __init__(self, size: int, features: int = 128, depth: int = 4, patch: int = 4) -> None:
        super().__init__()
        self.patch = patch
        self.patch_norm = nn.LayerNorm(3 * patch * patch)
        self.patch_embedding = nn.Linear(3 * patch * patch, features)
        self.embedding_norm = nn.LayerNorm(features)
        self.blocks = nn.Sequential(*(Block(features, heads=4) for _ in range(depth)))
        self.encoder_norm = nn.LayerNorm(features)
        self.head = nn.Linear(features, 10)
        places = sincos_position_embedding(size // patch, size // patch, features)
        self.register_buffer("places", torch.tensor(places, dtype=torch.float32), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        batch, channels, height, width = images.shape
        grid = images.reshape(
            batch, channels, height // self.patch, self.patch, width // self.patch, self.patch
        )
        patches = grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, channels * self.patch**2)
        x = self.embedding_norm(self.patch_embedding(self.patch_norm(patches))) + self.places
        logits: Tensor = self.head(self.encoder_norm(self.blocks(x)).mean(1))
        return logits


def create(name: str, size: int) -> nn.Module:
    """The network that jadder calls ``name``, for square images of ``size`` pixels.

    Example:
      >>> create("resnet20", 8)(torch.zeros(2, 3, 8, 8)).shape
      torch.Size([2, 10])
    """
    if name == "resnet20":
        return ResNet((3, 3, 3), 16, 10)
    if name == "resnet18":
        return ResNet((2, 2, 2, 2), 64, 1000)
    if name == "vit":
        return SimpleViT(size)
    raise ValueError(f"there is no network {name!r} in PyTorch here")
