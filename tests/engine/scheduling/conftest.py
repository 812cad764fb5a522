"""The harness asserts on the tests' behalf: its assertions are rewritten too, so that they explain themselves and hold under -O."""

import pytest

pytest.register_assert_rewrite("tests.engine.scheduling.harness", "tests.engine.scheduling.toy_model")
