"""What a process of this project shares with whoever started it: variables, reports, exit codes, files. No torch."""
