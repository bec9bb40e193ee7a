"""Where launcher and training meet: records on disk, heartbeats, exit codes. Standard library only; imports nothing of ours."""
