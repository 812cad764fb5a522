"""From files to a model on its device."""

from engine.loading.loader import LoadedModel, LoadPlan, load_model, plan_load

__all__ = ["LoadPlan", "LoadedModel", "load_model", "plan_load"]
