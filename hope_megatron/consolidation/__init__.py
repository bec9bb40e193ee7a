"""Offline consolidation: what a model's fast memories picked up by day is replayed at night, and moves into slower weights.

By day the model reads documents, and its state (memories, fast CMS levels) adapts. What surprised it most is kept in a bounded
buffer, each row with answers of the adapted model (`waking`), and so are dreams: text of the adapted model's own (`dreaming`). At
night a CMS level learns to give the same answers without the state: minimise KL(adapted || model) on these rows and
KL(old || model) on general text (`night`). Answers are tokens drawn from the teacher, whose cross entropy has the gradient of the
KL divergence on average; so a night is ordinary training on these draws, in any parallel layout.
"""
