"""Asserts in the helpers of the tests show their values, too."""

import pytest

pytest.register_assert_rewrite("tests.contracts", "tests.support")
