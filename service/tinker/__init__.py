"""The Tinker wire (/api/v1): a translation onto sessions and samplers. What is trained and sampled is done there."""
