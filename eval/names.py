"""Names and texts of this package for the command line, whose --help must not import torch, and the name of a distance in texts."""

import re

METRICS = ("all", "fid")  # tests/test_names.py compares them with `eval.collect.COLLECTORS`
ON_SEARCHED_GRIDS = ("ddim", "dpm++2m", "ipndm")  # samplers that --search-grid also measures on a searched time grid
EXTRACTORS = (
    "clip:FOLDER, a .safetensors of recipes/classifier.py, a TorchScript .pt or .ts, or 'package.module:factory': uint8 [B, 3, H, W] ->"
    " features, or (features, logits)"
)
REFERENCES = "a .safetensors reference of this project, or an .npz with mu [D] and sigma [D, D]"


def named(text: str, distance: str | None) -> str:
    """Return a text of a report with the name of the distance of a user's features instead of FID; None keeps it. Pictures in it stay."""
    if distance is None:
        return text
    return re.sub(r'data:[^"]*|\bFID(?=s?\b)', lambda found: distance if found[0] == "FID" else found[0], text)
