"""The names of the tables of this package, for the command line, whose --help must not import torch.

tests/test_names.py compares each with its table: `SAMPLERS` with `distill.samplers.SAMPLERS`, and so on.
"""

SAMPLERS = (
    "ddim",
    "heun",
    "dpm++2m",
    "dpm++3m",
    "unipc",
    "ipndm",
    "deis",
    "ancestral",
    "consistency",
    "jump",
    "sde",
    "pc",
    "langevin",
)
BASELINES = ("ddim", "heun", "dpm++2m", "dpm++3m", "unipc", "ipndm", "deis")
SAMPLER_TEXT = f"{', '.join(SAMPLERS)} and consistency:GAMMA with GAMMA from 0 to 1, sde:ETA with ETA from 0 to 10"
GRIDS = ("uniform", "trailing", "karras", "logsnr")
PREDICTIONS = ("x0", "eps", "v", "score", "flow", "edm")
DRAWS = ("uniform", "lognormal")
DISTANCES = ("l2", "pseudo_huber")
WEIGHTS = ("x0", "snr", "truncated_snr", "snr_plus_one", "min_snr", "soft_min_snr", "p2")
GAP_WEIGHTS = ("one", "inverse_gap", "inverse_level", "truncated_snr")
RESIDUALS = ("martingale", "fokker-planck", "self-consistency")
OPTIMIZERS = ("adamw", "adamw8bit")
MASKED_SAMPLERS = ("ancestral", "confidence")
