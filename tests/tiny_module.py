"""Small networks for accelerometer rows, with odd shapes, and rows that are drawn."""

from __future__ import annotations

import torch
from torch import nn

import edgetune as et


class SensorNet(nn.Module):
    """x [N, 3, T] -> [N, 5]: convolutions of every kind that matters, statistics, attention, a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(3, 36, 5, padding="same")  # too small for a grid
        self.norm = nn.BatchNorm1d(36)
        self.wide = nn.Conv1d(36, 40, 4, padding="same")  # more zeros at the right than at the left
        self.strided = nn.Conv1d(40, 44, 3, stride=2, padding=1, bias=False)
        self.depthwise = nn.Conv1d(44, 44, 3, groups=44)
        self.attention = nn.TransformerEncoderLayer(44, 4, 52, dropout=0.0, batch_first=True)
        self.gru = nn.GRU(44, 20, batch_first=True)
        self.head = nn.Linear(20, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.norm(self.stem(x)))
        h = torch.relu(self.strided(torch.relu(self.wide(h))))
        h = self.attention(self.depthwise(h).transpose(1, 2))
        return self.head(self.gru(h)[0][:, -1])


class SmallNet(nn.Module):
    """x [N, 3, T] -> [N, 5]: two convolutions, a mean over time and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv1d(3, 40, 5, padding="same")
        self.b = nn.Conv1d(40, 44, 4, stride=2, padding=1)
        self.mlp = nn.Sequential(nn.Linear(44, 70), nn.ReLU(), nn.Linear(70, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(torch.relu(self.b(torch.relu(self.a(x)))).mean(-1))


class ImageNet2d(nn.Module):
    """x [N, 2, H, W] -> [N, 3]: two-dimensional convolutions and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 24, (5, 3), padding=(2, 1))
        self.b = nn.Conv2d(24, 30, 3, stride=(2, 1))
        self.mlp = nn.Sequential(nn.Linear(30, 70), nn.GELU(), nn.Linear(70, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3)))


def seeded(kind: type[nn.Module]) -> nn.Module:
    """A network of this kind with seeded weights and statistics that are not those of a start, in evaluation."""
    torch.manual_seed(0)
    net = kind()
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm1d):
            layer.running_mean.normal_()  # type: ignore[union-attr]
            layer.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return net.eval()


def drawn(attached: et.AttachedModule) -> et.AttachedModule:
    """The same with an adapter that is not zero."""
    generator = torch.Generator().manual_seed(3)
    for value in attached.trainable().values():
        value.data.normal_(0, 0.1, generator=generator)
    return attached


def accelerometer_rows(count: int, length: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Three axes [count, 3, length] of five movements, which differ in frequency, and their labels [count]."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % 5
    time = torch.arange(length) / length
    phase = torch.rand(count, 3, 1, generator=generator) * 6
    waves = torch.sin(6.28 * (labels[:, None, None] * 2 + 1) * time + phase)
    return waves + 0.2 * torch.randn(count, 3, length, generator=generator), labels
