"""What transformers would stumble over hours later, looked at when the arguments are read: metrics and reporting."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ultrarag.errors import UsageError, did_you_mean
from ultrarag.evaluation import DEFAULT_METRICS, MAIN_METRIC

#: where --report_to may report, and the package that it takes; None: nothing to install, the surroundings give it
_REPORTERS = {
    "azure_ml": "azureml-sdk",
    "clearml": "clearml",
    "codecarbon": "codecarbon",
    "comet_ml": "comet-ml",
    "dagshub": "dagshub mlflow",
    "dvclive": "dvclive",
    "flyte": "flytekit",
    "kubeflow": None,
    "mlflow": "mlflow",
    "neptune": "neptune",
    "swanlab": "swanlab",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
}
#: where transformers asks for a reporter by another name than its own
_ASKED_AS = {"azure_ml": "azureml", "comet_ml": "comet", "flyte": "flytekit"}
#: the default, as the log names it
BEST_METRIC = f"eval_{MAIN_METRIC.lower()}"


def logged_metric(name: str) -> str:
    """Return the name under which an evaluation between steps logs a metric, in place of any spelling of it.

    Raises:
        UsageError: it is none of those that are measured.

    Example:
        >>> logged_metric("nDCG@10")
        'eval_ndcg@10'
    """
    known = {metric.lower(): metric for metric in DEFAULT_METRICS}
    plain = name.lower().removeprefix("eval_")
    if plain in known:
        return f"eval_{plain}"
    why = "no loss is computed on the held-out data" if plain == "loss" else "it is not measured"
    raise UsageError(
        f"--metric_for_best_model {name}: {why}; measured are {', '.join(DEFAULT_METRICS)}{did_you_mean(plain, known)}"
    )


def check_best_metric(values: dict[str, Any]) -> None:
    """Put the metric's name as the log has it; refuse one that is not measured, or less of which would be better.

    Raises:
        UsageError: see there.
    """
    if values.get("metric_for_best_model") is not None:
        values["metric_for_best_model"] = logged_metric(values["metric_for_best_model"])
    if values.get("greater_is_better") is False:
        raise UsageError(
            f"--greater_is_better False would keep the worst checkpoint: more is better of {', '.join(DEFAULT_METRICS)}"
            "; leave it out"
        )


def check_reporters(asked: str | Iterable[str] | None) -> None:
    """Refuse a place to report to that is unknown or not installed.

    Raises:
        UsageError: names the package.
    """
    for name in [asked] if isinstance(asked, str) else asked or []:
        if name in ("all", "none"):
            continue
        if name not in _REPORTERS:
            known = ", ".join([*_REPORTERS, "all", "none"])
            raise UsageError(f"--report_to {name} is unknown{did_you_mean(name, _REPORTERS)}; known are {known}")
        if not _available(name):
            raise UsageError(f"--report_to {name} {_needs(name)}, or leave it out")


def _available(name: str) -> bool:
    from transformers.integrations import integration_utils

    return bool(getattr(integration_utils, f"is_{_ASKED_AS.get(name, name)}_available")())


def _needs(name: str) -> str:
    package = _REPORTERS[name]
    if package is None:
        return "works only inside of a job of Kubeflow's (KUBEFLOW_TRAINER_SERVER_URL is not set): start it there"
    return f"needs the package {package.replace(' ', ' and ')}: pip install {package}"
