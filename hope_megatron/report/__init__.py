"""Pages for people: blocks that become Markdown or HTML, and the page of a run."""
