"""A server for HOPE models with OpenAI's interface, and sessions whose memory lasts. See docs/serve.md.

`streams.py` and `engine.py` draw tokens for many streams at once and know no HTTP. `sessions.py` keeps states. `app.py` and what it
imports speak HTTP and know no tensors.
"""
