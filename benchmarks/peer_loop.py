"""Progressive distillation as a user writes it with PyTorch and diffusers alone: the peer of `distill.train` with `Progressive`.

Salimans & Ho 2202.00512, Alg. 2, for a class-conditional v network on a discrete table; clipping, Adam, and an average of the weights.
It imports nothing of this project.
"""

import copy

import torch
import torch.nn.functional as F


def loss_of(teacher, student, alphas_cumprod, x0, labels, noise, index, steps):
    """Return the mean loss for student steps ``index`` [B] of 0..steps-1, counted from the noise."""

    def at(entry):
        table = torch.cat([torch.ones(1, device=x0.device), alphas_cumprod])  # entry 0 is the data
        a = table[entry].view(-1, 1, 1, 1)
        return a.sqrt(), (1 - a).sqrt()

    def predict_x0(unet, x, entry):
        alpha, sigma = at(entry)
        v = unet(x, entry - 1, class_labels=labels).sample
        return alpha * x - sigma * v

    length = len(alphas_cumprod) // steps
    start = len(alphas_cumprod) - index * length
    middle, end = start - length // 2, start - length
    (a_t, s_t), (a_m, s_m), (a_e, s_e) = at(start), at(middle), at(end)
    x_t = a_t * x0 + s_t * noise
    with torch.no_grad():
        first = predict_x0(teacher, x_t, start)
        x_m = a_m * first + s_m * (x_t - a_t * first) / s_t
        second = predict_x0(teacher, x_m, middle)
        x_e = a_e * second + s_e * (x_m - a_m * second) / s_m
        ratio = s_e / s_t
        target = (x_e - ratio * x_t) / (a_e - ratio * a_t)
    prediction = predict_x0(student, x_t, start)
    weight = (a_t**2 / s_t**2).clamp(min=1)
    return (weight * F.mse_loss(prediction, target, reduction="none")).mean()


def training(teacher, student, alphas_cumprod, images, labels, batch, steps, lr=1e-3, halflife_images=4_000, fused=False):
    """Yield the loss of each training step. ``images``: uint8 [N, C, H, W]."""
    device = next(student.parameters()).device
    alphas_cumprod = alphas_cumprod.to(device)
    student.train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, weight_decay=0.0, fused=fused or None)
    average = copy.deepcopy(student).requires_grad_(False)
    beta = 0.5 ** (batch / halflife_images)
    while True:
        rows = torch.randint(len(images), (batch,))
        x0 = images[rows].to(device).float() / 127.5 - 1
        index = torch.randint(steps, (batch,), device=device)
        loss = loss_of(teacher, student, alphas_cumprod, x0, labels[rows].to(device), torch.randn_like(x0), index, steps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for kept, new in zip(average.parameters(), student.parameters(), strict=True):
                kept.lerp_(new, 1 - beta)
        yield loss.detach()
