"""What draws are worth: scores of predictions, convergence of functions, temperatures. NumPy and xarray only."""

from bnn_ppl.diagnostics.bias_certificate import bias_certificate
from bnn_ppl.diagnostics.classification import (
    accuracy,
    brier,
    calibration_error,
    classification_scores,
    nll,
    reliability,
)
from bnn_ppl.diagnostics.function_space import (
    agreement,
    cosine_similarity,
    disagreement,
    function_dataset,
    function_diagnostics,
    predictive_differences,
    summarize,
    total_variation,
)
from bnn_ppl.diagnostics.hidden_temperature import describe_temperature, hidden_temperature
from bnn_ppl.diagnostics.rademacher import RademacherBound, rademacher_bound
from bnn_ppl.diagnostics.regression import (
    coverage,
    crps,
    log_density,
    regression_scores,
    rmse,
    sample_coverage,
    sample_crps,
)
from bnn_ppl.diagnostics.sparsity import log_alpha, prune, signal_to_noise, sparsity
from bnn_ppl.diagnostics.temperature import (
    batch_means_error,
    expected_configurational_temperature,
    expected_kinetic_temperature,
    site_temperatures,
    temperature_band,
)
from bnn_ppl.diagnostics.temperature_table import temperature_series, temperature_table
from bnn_ppl.diagnostics.uncertainty import (
    mutual_information,
    out_of_distribution_auroc,
    predictive_entropy,
    risk_coverage,
    selective_auroc,
)
from bnn_ppl.diagnostics.weight_norm import weight_norm

__all__ = [
    "RademacherBound",
    "accuracy",
    "agreement",
    "batch_means_error",
    "bias_certificate",
    "brier",
    "calibration_error",
    "classification_scores",
    "cosine_similarity",
    "coverage",
    "crps",
    "describe_temperature",
    "disagreement",
    "expected_configurational_temperature",
    "expected_kinetic_temperature",
    "function_dataset",
    "function_diagnostics",
    "hidden_temperature",
    "log_alpha",
    "log_density",
    "mutual_information",
    "nll",
    "out_of_distribution_auroc",
    "predictive_differences",
    "predictive_entropy",
    "prune",
    "rademacher_bound",
    "regression_scores",
    "reliability",
    "risk_coverage",
    "rmse",
    "sample_coverage",
    "sample_crps",
    "selective_auroc",
    "signal_to_noise",
    "site_temperatures",
    "sparsity",
    "summarize",
    "temperature_band",
    "temperature_series",
    "temperature_table",
    "total_variation",
    "weight_norm",
]
