"""Models of BasicSR, of any class, made to keep what a run relies on."""

from collections.abc import Callable
from functools import partial
from typing import Any

from dlgsanet_arch import training
from dlgsanet_arch.pipeline.logs import RunLog


def build(opt: dict[str, Any], log: RunLog) -> Any:
    """Build the model that the options name; averages and warm-up are put right on the instance.

    A class of a third party that has its own method for one of them keeps it, with a warning.

    Args:
        opt: The run's options, complete.
        log: Where a method that stays is named.
    """
    from basicsr.models import build_model
    from basicsr.models.base_model import BaseModel

    model = build_model(opt)
    replacements: dict[str, Callable] = {
        "model_ema": partial(training.update_average, model),
        "update_learning_rate": partial(training.update_learning_rate, model),
    }
    if isinstance(model, training.DLGSANetModel):
        return model  # has both
    for name, replacement in replacements.items():
        if getattr(type(model), name, None) is getattr(BaseModel, name):
            setattr(model, name, replacement)
        else:
            log.warning(f"{type(model).__name__} has a method {name} of its own, which stays")
    return model
