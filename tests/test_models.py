"""Every LLM recommender that the package has, against the contract."""

import pytest

from recbole_hatllm.registry import own_models
from tests.model_contract import ModelContract

pytestmark = pytest.mark.versions


@pytest.mark.parametrize("name", own_models())
class TestContract(ModelContract):
    pass
