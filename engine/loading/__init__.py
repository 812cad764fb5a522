"""From files to a model on its device."""

from engine.loading.loader import LoadedModel, load_model, plan_load

__all__ = ["LoadedModel", "load_model", "plan_load"]
