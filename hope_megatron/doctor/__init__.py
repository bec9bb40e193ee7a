"""What `hope doctor` looks at: each check gives findings, with advice where something is wrong."""
