"""Names and texts of this package for the command line, whose --help must not import torch."""

METRICS = ("all", "fid")  # tests/test_names.py compares them with `eval.collect.COLLECTORS`
EXTRACTORS = (
    "clip:FOLDER, a .safetensors of recipes/classifier.py, a TorchScript .pt or .ts, or 'package.module:factory': uint8 [B, 3, H, W] ->"
    " features, or (features, logits)"
)
REFERENCES = "a .safetensors reference of this project, or an .npz with mu [D] and sigma [D, D]"
