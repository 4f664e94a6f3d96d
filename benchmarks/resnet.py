"""ResNet-18 for small images (He et al. 2016), and random images of CIFAR's shape to train it on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from evoloss.tasks import Split, Task


class _Block(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut; group normalisation, because batch normalisation keeps statistics."""

    def __init__(self, num_inputs: int, num_outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(num_inputs, num_outputs, 3, stride, padding=1, bias=False)
        self.first_norm = nn.GroupNorm(num_outputs // 8, num_outputs)
        self.second = nn.Conv2d(num_outputs, num_outputs, 3, padding=1, bias=False)
        self.second_norm = nn.GroupNorm(num_outputs // 8, num_outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or num_inputs != num_outputs:
            self.shortcut = nn.Conv2d(num_inputs, num_outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return features (rows, outputs, height / stride, width / stride)."""
        hidden = self.first_norm(self.first(x)).relu()
        total: Tensor = self.second_norm(self.second(hidden)) + self.shortcut(x)
        return total.relu()


def make_resnet18(task: Task, width: int = 64, seed: int = 0) -> nn.Module:
    """Return the network with ``width`` channels (a multiple of 8) in its first stage; 64 is ResNet-18."""
    stages = ((width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        layers: list[nn.Module] = [
            nn.Conv2d(task.input_shape[0], width, 3, padding=1, bias=False),
            nn.GroupNorm(width // 8, width),
            nn.ReLU(),
        ]
        channels = width
        for size, stride in stages:
            layers += [_Block(channels, size, stride), _Block(size, size, 1)]
            channels = size
        head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, task.num_outputs))
        return nn.Sequential(*layers, *head)


def make_image_task(device: torch.device, rows: int, seed: int = 0) -> Task:
    """Return a task of random 3 x 32 x 32 images in 10 classes: right for timing, nothing to learn."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 3, 32, 32, generator=generator).to(device)
    split = Split(x, torch.randint(10, (rows,), generator=generator).to(device))
    names = ("classification", "error_rate", "cross_entropy")
    return Task("random images", *names, 10, (3, 32, 32), split, split, split)
