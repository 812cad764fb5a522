"""What every section of the configuration is: frozen, explained field by field, closed to unknown keys."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A section of the file. Unknown keys are errors; docstrings below a field explain it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)
