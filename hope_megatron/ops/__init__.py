"""Pure mathematics on torch tensors: no process groups, no Megatron, no configuration objects."""
