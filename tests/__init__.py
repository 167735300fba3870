"""Tests. pytest also shows the values in assertions that fail in the test helpers."""

import pytest

pytest.register_assert_rewrite("tests.contracts", "tests.support")
