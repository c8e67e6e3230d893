"""A backbone of one's own: MobileNetV1, built here and trained by name.

    tes train PHOTOS --backbone examples.mobilenetv1:mobilenetv1_025 --checkpoint weights.safetensors

`forward` returns pooled features (B, F); the linear layer called `fc` is the classifier that the network was
pre-trained with. That is the whole contract. Howard et al. 2017 (1704.04861), with LeakyReLU(0.1).
"""

from __future__ import annotations

from torch import Tensor, nn


class MobileNetV1(nn.Module):
    """Depthwise-separable convolutions in three stages, mean pooling.

    Args:
        width: Channels of the first layer; 8 is the network at a quarter of its width.
        num_source_classes: Rows of the pre-training classifier `fc`.
    """

    def __init__(self, width: int = 8, num_source_classes: int = 1000) -> None:
        super().__init__()
        w = width
        self.stage1 = nn.Sequential(
            _conv(3, w, stride=2),
            _separable(w, 2 * w),
            _separable(2 * w, 4 * w, stride=2),
            _separable(4 * w, 4 * w),
            _separable(4 * w, 8 * w, stride=2),
            _separable(8 * w, 8 * w),
        )
        self.stage2 = nn.Sequential(
            _separable(8 * w, 16 * w, stride=2), *(_separable(16 * w, 16 * w) for _ in range(5))
        )
        self.stage3 = nn.Sequential(_separable(16 * w, 32 * w, stride=2), _separable(32 * w, 32 * w))
        self.fc = nn.Linear(32 * w, num_source_classes)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Return pooled features (B, 32 * width) of normalised images (B, 3, H, W)."""
        return self.stage3(self.stage2(self.stage1(images_B3HW))).mean(dim=(2, 3))


def mobilenetv1_025() -> MobileNetV1:
    """Return the network at a quarter of its width: 256 features."""
    return MobileNetV1(width=8)


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.LeakyReLU(0.1)
    )


def _separable(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False),
        nn.BatchNorm2d(inputs),
        nn.LeakyReLU(0.1),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.LeakyReLU(0.1),
    )
