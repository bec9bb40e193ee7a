"""The paper's tests at a size of ours: synthetic tasks, small models of each family, tables beside the published claims."""
