"""The command line `engram`. Nothing here imports torch before a command needs it."""
