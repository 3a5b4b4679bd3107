"""Every LLM recommender that the package has, against the contract."""

import pytest

from recbole_hatllm.registry import model_class, own_models
from tests.model_contract import ModelContract

pytestmark = pytest.mark.versions


@pytest.mark.parametrize("name", [name for name in own_models() if getattr(model_class(name), "is_llm", False)])
class TestContract(ModelContract):
    pass
