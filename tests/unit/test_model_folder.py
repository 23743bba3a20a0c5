"""What a model's config says of its context."""

from typing import Any

import pytest

from service.jobs.model_folder import context_of

LONG = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}


@pytest.mark.parametrize(
    ("config", "context"),
    [
        ({}, None),
        ({"max_position_embeddings": 64}, 64),
        ({"n_positions": 32}, 32),
        ({"max_position_embeddings": "long", "n_positions": True, "seq_length": 8}, 8),
        ({"max_position_embeddings": 0}, None),
        # The factors change with the longest row of a batch beyond the original length: no row gets there.
        ({"max_position_embeddings": 64, "original_max_position_embeddings": 16, "rope_scaling": LONG}, 16),
        ({"max_position_embeddings": 64, "rope_parameters": {**LONG, "original_max_position_embeddings": 16}}, 16),
        ({"max_position_embeddings": 64, "rope_scaling": {"type": "su"}, "original_max_position_embeddings": 16}, 16),
        (
            {
                "max_position_embeddings": 64,
                "rope_parameters": {"full_attention": {**LONG, "original_max_position_embeddings": 8}},
            },
            8,
        ),
        ({"max_position_embeddings": 64, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, 64),
        # Factors that no row changes.
        ({"max_position_embeddings": 64, "rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 16}}, 64),
        (
            {"max_position_embeddings": 64, "rope_parameters": {"rope_type": "llama3", "original_max_position_embeddings": 16}},
            64,
        ),
        ({"max_position_embeddings": 64, "rope_parameters": "default", "rope_scaling": [1]}, 64),
    ],
)
def test_the_context_of_a_config(config: dict[str, Any], context: int | None) -> None:
    assert context_of(config) == context
