"""What the presets of two sets of real images have in common: the data, and the files that the commands of docs/real-images.md write."""

from __future__ import annotations

REAL_IMAGES = "fashion and cifar10 are described in docs/real-images.md"  # for the help of --preset

FASHION = {"data": "fashionmnist:data,pad=32,box=2"}  # 16x16
FASHION_FEATURES = {"features": "runs/fashion/features/features.safetensors"}
FASHION_STUDENTS = FASHION | FASHION_FEATURES | {"teacher": "runs/fashion/teacher/teacher.safetensors"}

CIFAR10 = {"data": "cifar10:data,flip"}  # 32x32
CIFAR10_FEATURES = {"features": "inception-v3-compat"}
CIFAR10_STUDENTS = CIFAR10 | CIFAR10_FEATURES | {"teacher": "runs/cifar10/teacher/teacher.safetensors"}
