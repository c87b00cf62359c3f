"""Exports of a model, each compared with this project's sampler before it counts.

deliver     diffusers pipelines of stock classes: check, write, compare in a process without this project
pixel       the pipeline of a pixel-space model, used by deliver
latent      the pipeline of a latent or text-to-image model, used by deliver
lora        the adapter of a LoRA student, for its teacher's pipeline
one_step    a single step as a torch.export or ONNX program
card        the model card, README.md
"""
