"""Numbers and formulas as people write them: signs, units, final answers. Text only, no algebra (service.rewards.formulas)."""
